"""Where a run is mirrored, and under which parent: `mlflow.json` in the run's folder."""

import json
from pathlib import Path
from typing import Any

from calligrapher.durable import atomic_write
from tasks.artifacts.layout import round_number
from tasks.artifacts.lineage import read_fork

POINTER_FILE = "mlflow.json"


def write_pointer(run_dir: Path, uri: str, experiment: str) -> None:
    """Note where the run is mirrored. Another experiment gets an MLflow run of its own.

    So does another store, unless it knows the run's id: then it is the same one at another address.
    """
    pointer = read_pointer(run_dir)
    if pointer.get("experiment") != experiment:
        store_pointer(run_dir, {"uri": uri, "experiment": experiment, "run_id": None})
    elif pointer.get("uri") != uri:
        store_pointer(run_dir, pointer | {"uri": uri})


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
