"""What MLflow needs around it: settings in the environment, and one creator of a database at a
time."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path


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
