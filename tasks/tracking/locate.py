"""Finds the run, and the artifact in it, that a path or an MLflow URI names."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from calligrapher.errors import ArtifactError
from tasks.artifacts.layout import PARAMS
from tasks.tracking.models import TrackedRun, model_path
from tasks.tracking.pointer import POINTER_FILE, read_pointer


def locate(text: str, runs_dir: Path = Path("runs")) -> tuple[Path, str | None]:
    """(run folder, artifact name or None) of what `text` names.

    It may be a run's folder or a name in `runs_dir`; an artifact's folder or a file in it; the same
    as a `file://` URI, as the datasets in MLflow have; or, of runs in `runs_dir`, what MLflow
    shows: `runs:/MLFLOW_RUN_ID[/round-0003/update]`, `models:/m-MODEL_ID`, or
    `models:/RUN@champion`: of the run named RUN, the checkpoint that an evaluation made champion.
    Raises ArtifactError when no run of this disk is meant.
    """
    if match := re.fullmatch(r"runs:/+([^/]+)/?(.*)", text):
        return _tracked(match[1], runs_dir), match[2].strip("/") or None
    if match := re.fullmatch(r"models:/+([^/@]+)(@champion)?", text):
        return locate(
            _champion(match[1], runs_dir) if match[2] else _model(match[1], runs_dir), runs_dir
        )
    path = Path(unquote(urlsplit(text).path)) if text.startswith("file:") else Path(text)
    # A folder of that name here that is no run does not hide the run, and an artifact that is gone
    # is still its run's: whoever opens it says why.
    for place in sorted((path, runs_dir / text), key=lambda place: not place.exists()):
        for folder in (place, *place.absolute().parents):
            if (folder / PARAMS).is_file():
                parts = place.absolute().relative_to(folder.absolute()).parts
                return folder, (
                    "/".join(parts[: 2 if parts[0].startswith("round-") else 1]) if parts else None
                )
    raise ArtifactError(
        f"{text} must name a run on this disk: its folder, its name in {runs_dir}, an artifact in"
        " it, or runs:/MLFLOW_RUN_ID or models:/m-MODEL_ID. There is none."
    )


def _tracked(run_id: str, runs_dir: Path) -> Path:
    for folder, pointer in _pointers(runs_dir):
        if pointer.get("run_id") == run_id:
            return folder
    raise ArtifactError(f"{runs_dir} must hold the run that MLflow knows as {run_id}. It does not.")


def _model(model_id: str, runs_dir: Path) -> str:
    for uri in sorted({pointer["uri"] for _, pointer in _pointers(runs_dir) if pointer.get("uri")}):
        if path := model_path(uri, model_id):
            return path
    raise ArtifactError(
        f"{runs_dir} must hold the run of the model {model_id}. No MLflow of its runs has it."
    )


def _champion(run: str, runs_dir: Path) -> str:
    if path := TrackedRun(runs_dir / run).champion_path():
        return path
    raise ArtifactError(
        f"{runs_dir / run} must have a champion. None of its checkpoints was evaluated as one."
    )


def _pointers(runs_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each tracked run's folder, and where it is in MLflow."""
    for path in sorted(runs_dir.glob(f"*/{POINTER_FILE}")):
        yield path.parent, read_pointer(path.parent)
