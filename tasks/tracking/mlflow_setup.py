"""What MLflow needs around it: settings in the environment, and one creator of a database at a
time."""

import contextlib
import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit


def prepare_mlflow() -> None:
    """Settings that MLflow reads from the environment: no telemetry, no chatter, short
    time-outs."""
    os.environ["DO_NOT_TRACK"] = "true"
    for key, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    }.items():
        os.environ.setdefault(key, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)


@contextlib.contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Two processes that create the same SQLite database at once break it."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def create_database(uri: str) -> None:
    """Create MLflow's tables, once, however many processes ask for it at the same time."""
    prepare_mlflow()
    import mlflow

    with one_at_a_time(uri):
        mlflow.MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def follow_moved_folder(uri: str) -> None:
    """Have a SQLite database beside `mlartifacts` keep its pictures there, after a move as well.

    MLflow notes absolute places: of a moved or copied folder, it would write to the old one.
    """
    database = Path(uri.removeprefix("sqlite:///")).absolute()
    if not uri.startswith("sqlite:///") or not database.is_file():
        return
    here = database.parent / "mlartifacts"
    columns = {
        "experiments": "artifact_location",
        "runs": "artifact_uri",
        "logged_models": "artifact_location",
    }
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        rows = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (place,) in rows:
            old = Path(unquote(urlsplit(place or "").path))
            moved = (place or "").startswith("file:") and old.name == here.name
            if not moved or old.resolve() == here.resolve():
                continue
            for table, column in columns.items():
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    f" WHERE {column} = ? OR {column} LIKE ?",
                    (here.as_uri(), len(place) + 1, place, f"{place}/%"),
                )
