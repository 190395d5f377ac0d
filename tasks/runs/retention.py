"""What a run may delete: weights that retention does not keep, leftovers of killed processes."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from calligrapher.durable import is_temporary
from calligrapher.rl.train_state import EMA, OPTIMIZER, TRAINED
from tasks.artifacts.artifact import Artifact, prune
from tasks.artifacts.layout import MANIFEST, PARTIAL_SUFFIX, ROUNDS, round_number
from tasks.artifacts.run_dir import RunDir
from tasks.params.run_params import RetentionParams
from tasks.pipeline import name_of
from tasks.stages.refresh import OLD
from tasks.stages.score import AHEAD

_WEIGHTS = {"update": (TRAINED, EMA, OPTIMIZER), "refresh": (OLD,)}


@dataclass(frozen=True)
class Removable:
    """A file that may go. freed: bytes that the disk gets back; 0 where a fork holds them too."""

    path: Path
    freed: int
    why: str


def clean_up(
    run_dir: RunDir, retention: RetentionParams, *, dry_run: bool = False
) -> list[Removable]:
    """Delete all that may go (with `dry_run`: nothing) and say what it is. The run must be locked.

    Manifests, rollouts, scores, advantages, metrics and unfinished work folders always stay.
    """
    removable = [*_leftovers(run_dir), *_expired(run_dir, retention)]
    if not dry_run:
        remove_leftovers(run_dir)
        apply_retention(run_dir, retention)
    return removable


def apply_retention(run_dir: RunDir, retention: RetentionParams) -> None:
    """Delete the weights of rounds that `retention` does not keep."""
    for artifact, files in _expired_files(run_dir, retention):
        prune(artifact, files)


def remove_leftovers(run_dir: RunDir) -> None:
    """Delete what killed processes left and nobody will go on with."""
    for removable in list(_leftovers(run_dir)):
        removable.path.unlink(missing_ok=True)
    for folder in run_dir.path.glob(f"{ROUNDS}/*{PARTIAL_SUFFIX}"):
        if _is_over(folder):
            shutil.rmtree(folder)


def kept_rounds(run_dir: RunDir, retention: RetentionParams) -> set[int]:
    """Return the rounds whose weights stay: the newest, every n-th, and the best one."""
    rounds = _rounds(run_dir, "refresh")
    newest = max(rounds, default=0)
    kept = {r for r in rounds if r > newest - retention.keep_last}
    kept |= {r for r in rounds if retention.keep_every and r % retention.keep_every == 0}
    if retention.keep_best and (best := best_round(run_dir)) is not None:
        kept.add(best)
    return kept


def best_round(run_dir: RunDir) -> int | None:
    """The round after which the held-out OCR accuracy was highest; None before the first
    evaluation."""
    scores: dict[int, float] = {}
    for round_index in _rounds(run_dir, "evaluate"):
        meta = Artifact.load(run_dir.stage_path(name_of("evaluate", round_index))).meta
        if "ocr_accuracy" in meta:
            scores[round_index] = meta["ocr_accuracy"]
    return max(scores, key=lambda r: scores[r]) if scores else None


def _rounds(run_dir: RunDir, stage: str) -> list[int]:
    return sorted(round_number(path.parent.name) for path in run_dir.path.glob(f"{ROUNDS}/{stage}"))


def _expired_files(
    run_dir: RunDir, retention: RetentionParams
) -> Iterator[tuple[Artifact, list[str]]]:
    kept = kept_rounds(run_dir, retention)
    for round_index in _rounds(run_dir, "refresh"):
        for stage, names in _WEIGHTS.items() if round_index not in kept else ():
            path = run_dir.stage_path(name_of(stage, round_index))
            files = [name for name in names if (path / name).exists()]
            if files:
                yield Artifact.load(path), files


def _expired(run_dir: RunDir, retention: RetentionParams) -> Iterator[Removable]:
    for artifact, files in _expired_files(run_dir, retention):
        for name in files:
            yield _removable(artifact.path / name, "retention")


def _leftovers(run_dir: RunDir) -> Iterator[Removable]:
    """Half-written files, and files of work folders whose artifact is finished by now."""
    for path in sorted(run_dir.path.rglob("*")):
        partial = next((p for p in path.parents if p.name.endswith(PARTIAL_SUFFIX)), None)
        if partial is None and is_temporary(path):
            yield _removable(path, "half-written")
        elif partial is not None and path.is_file() and _is_over(partial):
            yield _removable(path, "unused work folder")


def _is_over(partial: Path) -> bool:
    """Whether nobody goes on with this work folder: its artifact is there."""
    stage = "score" if partial.name.startswith(AHEAD) else partial.name.removesuffix(PARTIAL_SUFFIX)
    return (partial.parent / stage / MANIFEST).is_file()


def _removable(path: Path, why: str) -> Removable:
    stat = path.stat()
    return Removable(path, stat.st_size if stat.st_nlink == 1 else 0, why)
