"""Finds trained weights: a file, or what a run's or artifact's folder, name or URI stands for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from calligrapher.errors import ArtifactError, CheckpointError
from calligrapher.rl.train_state import EMA, STATE, TRAINED
from calligrapher.tiny.pack import DATA, TINY
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.digests import file_sha256
from tasks.artifacts.layout import MANIFEST, PARAMS, WARMUP, newest_update
from tasks.artifacts.run_dir import RunDir
from tasks.tracking.locate import locate

SUFFIXES = (".bin", ".safetensors")
FILES = {"trained": TRAINED, "ema": EMA}


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a warm-up or an update; `path` is one of its two files of them."""

    run: Path
    artifact: Artifact
    path: Path

    @property
    def step(self) -> int:
        """Optimizer steps since the optimizer was new."""
        return json.loads(self.artifact.file(STATE).read_bytes())["step"]

    @property
    def model(self) -> dict[str, Any]:
        """The section `model` of the run's params."""
        return json.loads((self.run / PARAMS).read_bytes())["model"]

    @property
    def lora_scale(self) -> float:
        """What the product of each LoRA pair is multiplied with: alpha / rank."""
        lora = self.artifact.params["model"]["lora"]
        return lora["alpha"] / lora["rank"]


def find_checkpoint(text: str, runs_dir: Path, weights: str | None = None) -> Checkpoint | Path:
    """Return the weights that `text` names: a Path for a file that is no artifact's.

    A run stands for its newest update. `weights` is `ema`, `trained`, or None: ema where there is
    one. Raises ArtifactError when there is no such run, and when the weights are damaged or were
    deleted by retention.
    """
    path = Path(text)
    file = path.name if path.suffix in SUFFIXES else None
    is_uri = text.startswith(("file:", "runs:"))
    if file and not is_uri and not (path.parent / MANIFEST).is_file():
        return path
    try:
        run, name = locate(text, runs_dir)
    except ArtifactError as error:
        if is_uri or text.startswith("models:"):
            raise
        raise ArtifactError(
            f"There is no weights file ({' or '.join(SUFFIXES)}) of this name, and {error}"
        ) from None
    artifact = RunDir(run).load(name or newest_update(run) or WARMUP)
    files = [file] if file else [FILES[weights]] if weights else [EMA, TRAINED]
    if not set(files) <= set(FILES.values()):
        raise CheckpointError(f"{text} must be an artifact's {TRAINED} or {EMA}.")
    for path in (_whole(artifact, file) for file in files):
        if not _is_empty(path):
            return Checkpoint(run, artifact, path)
    raise CheckpointError(
        f"{artifact.path / files[0]} must hold weights. It is empty: the stage kept no average. Use"
        " trained."
    )


def _whole(artifact: Artifact, name: str) -> Path:
    path = artifact.file(name)
    if file_sha256(path) != artifact.files[name].sha256:
        raise ArtifactError(f"{path} is damaged: it holds other bytes than were written.")
    return path


def base_folder(text: str) -> Path:
    """The folder that `model.base` names."""
    return DATA / "flux-fill" if text == TINY else Path(text)


def siglip_folder(text: str | None) -> Path:
    """The folder that `model.siglip` names; the embedded model has its own."""
    return DATA / "siglip" if text in (None, TINY) else Path(text)


def _is_empty(path: Path) -> bool:
    with safe_open(path, framework="pt") as content:
        return not list(content.keys())
