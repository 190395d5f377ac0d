"""Where a run is mirrored, and under which parent: `mlflow.json` in the run's folder."""

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from calligrapher.durable import atomic_write
from calligrapher.errors import ParamsError
from tasks.artifacts.layout import round_number
from tasks.artifacts.lineage import read_fork

POINTER_FILE = "mlflow.json"
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def write_pointer(run_dir: Path, uri: str, experiment: str) -> None:
    """Note where the run is mirrored. Another experiment gets an MLflow run of its own.

    So does another store, unless it knows the run's id: then it is the same one at another address.
    """
    refuse_password(uri)
    pointer = read_pointer(run_dir)
    if pointer.get("experiment") != experiment:
        store_pointer(run_dir, {"uri": uri, "experiment": experiment, "run_id": None})
    elif pointer.get("uri") != uri:
        store_pointer(run_dir, pointer | {"uri": uri})


def refuse_password(uri: str | None) -> None:
    """Raise ParamsError when `uri` holds a password: it would stand in the run's files and MLflow.

    A variable in its place is kept as it is written, and looked up where MLflow is asked.
    """
    password = urlsplit(uri).password if uri else None
    if password and not _VARIABLE.fullmatch(password):
        raise ParamsError(
            "tracking.uri must not hold a password. It does. Name a variable in its place, as in"
            " `postgresql://user:${MLFLOW_PASSWORD}@host/db`, or, for an MLflow server, set"
            " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )


def with_variables(uri: str) -> str:
    """Return `uri` with the environment's values for each `${NAME}`. Raises ParamsError."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ParamsError(
                f"tracking.uri names the variable {match[1]}, which must be set. It is not."
            )
        return os.environ[match[1]]

    return _VARIABLE.sub(value, uri)


def store_pointer(run_dir: Path, pointer: dict[str, Any]) -> None:
    """Write `mlflow.json`."""
    atomic_write(run_dir / POINTER_FILE, json.dumps(pointer, indent=1).encode())


def read_pointer(run_dir: Path) -> dict[str, Any]:
    """Return what `mlflow.json` says (`uri`, `experiment`, `run_id`, `experiment_id`), or {}."""
    path = run_dir / POINTER_FILE
    return json.loads(path.read_bytes()) if path.is_file() else {}


def lineage_tags(run_dir: Path) -> dict[str, str]:
    """Return the tags by which MLflow shows a fork under its parent; {} for a run of its own."""
    fork = read_fork(run_dir)
    if fork is None:
        return {}
    tags = {"forked_from": Path(fork.parent).name, "fork_kind": fork.kind}
    if fork.stage is not None:
        folder, _, stage = fork.stage.rpartition("/")
        tags["stage"] = stage
        if folder:
            tags["round"] = str(round_number(folder))
    if run_id := read_pointer(run_dir / fork.parent).get("run_id"):
        tags["mlflow.parentRunId"] = run_id
    return tags
