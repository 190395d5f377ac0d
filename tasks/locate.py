"""Finds the run, and the artifact in it, that a path or an MLflow URI names."""

import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from calligrapher.errors import ArtifactError
from tasks.lineage import PARAMS
from tasks.tracker import POINTER


def locate(text: str, runs_dir: Path = Path("runs")) -> tuple[Path, str | None]:
    """(run folder, artifact name or None) of what `text` names.

    It may be a run's folder or a name in `runs_dir`; an artifact's folder or a file in it; the same as a
    `file://` URI, as the datasets in MLflow have; or `runs:/MLFLOW_RUN_ID[/round-0003/update]`, of a run in
    `runs_dir`. Raises ArtifactError when no run of this disk is meant.
    """
    if match := re.fullmatch(r"runs:/+([^/]+)/?(.*)", text):
        return _tracked(match[1], runs_dir), match[2].strip("/") or None
    path = Path(unquote(urlsplit(text).path)) if text.startswith("file:") else Path(text)
    if not path.exists() and (runs_dir / text).exists():
        path = runs_dir / text
    for folder in (path, *path.absolute().parents):
        if (folder / PARAMS).is_file():
            parts = path.absolute().relative_to(folder.absolute()).parts
            return folder, "/".join(parts[: 2 if parts[0].startswith("round-") else 1]) if parts else None
    raise ArtifactError(
        f"{text} must name a run on this disk: its folder, its name in {runs_dir}, an artifact in it, or "
        "runs:/MLFLOW_RUN_ID. There is none."
    )


def _tracked(run_id: str, runs_dir: Path) -> Path:
    for pointer in sorted(runs_dir.glob(f"*/{POINTER}")):
        if json.loads(pointer.read_bytes()).get("run_id") == run_id:
            return pointer.parent
    raise ArtifactError(f"{runs_dir} must hold the run that MLflow knows as {run_id}. It does not.")
