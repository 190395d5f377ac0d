"""What a run may delete: weights that retention does not keep, and leftovers of killed
processes."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from calligrapher.durable import is_temporary
from calligrapher.rl.train_state import EMA, OPTIMIZER, TRAINED
from tasks.artifacts.artifact import Artifact, prune
from tasks.artifacts.layout import MANIFEST, PARTIAL_SUFFIX, round_number
from tasks.artifacts.run_dir import RunDir
from tasks.params.run_params import RetentionParams
from tasks.stages.refresh import OLD

_WEIGHTS = {"update": (TRAINED, EMA, OPTIMIZER), "refresh": (OLD,)}


@dataclass(frozen=True)
class Garbage:
    """A file that may go. `freed`: bytes that the disk gets back; 0 where a fork or parent holds
    them too."""

    path: Path
    freed: int
    why: str


def collect(run_dir: RunDir, retention: RetentionParams, *, dry_run: bool = False) -> list[Garbage]:
    """Delete all that may go (with `dry_run`: nothing) and say what it is. The run must be locked.

    Manifests, rollouts, scores, advantages, metrics and unfinished work folders always stay.
    """
    found = [*_leftovers(run_dir), *_expired(run_dir, retention)]
    if not dry_run:
        sweep(run_dir)
        retain(run_dir, retention)
    return found


def retain(run_dir: RunDir, retention: RetentionParams) -> None:
    """Delete the weights of rounds that `retention` does not keep."""
    for artifact, files in _expired_files(run_dir, retention):
        prune(artifact, files)


def sweep(run_dir: RunDir) -> None:
    """Delete what killed processes left and nobody will go on with."""
    for garbage in list(_leftovers(run_dir)):
        garbage.path.unlink(missing_ok=True)
    for folder in run_dir.path.glob(f"round-*/*{PARTIAL_SUFFIX}"):
        if _is_over(folder):
            shutil.rmtree(folder)


def kept_rounds(run_dir: RunDir, retention: RetentionParams) -> set[int]:
    """The rounds whose weights stay: the newest, every n-th, and the one that was evaluated
    best."""
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
    for round in _rounds(run_dir, "evaluate"):
        meta = Artifact.load(run_dir.stage_path(f"round-{round:04d}/evaluate")).meta
        if "ocr_accuracy" in meta:
            scores[round] = meta["ocr_accuracy"]
    return max(scores, key=lambda r: scores[r]) if scores else None


def _rounds(run_dir: RunDir, stage: str) -> list[int]:
    return sorted(round_number(path.parent.name) for path in run_dir.path.glob(f"round-*/{stage}"))


def _expired_files(
    run_dir: RunDir, retention: RetentionParams
) -> Iterator[tuple[Artifact, list[str]]]:
    kept = kept_rounds(run_dir, retention)
    for round in _rounds(run_dir, "refresh"):
        for stage, names in _WEIGHTS.items() if round not in kept else ():
            path = run_dir.stage_path(f"round-{round:04d}/{stage}")
            files = [name for name in names if (path / name).exists()]
            if files:
                yield Artifact.load(path), files


def _expired(run_dir: RunDir, retention: RetentionParams) -> Iterator[Garbage]:
    for artifact, files in _expired_files(run_dir, retention):
        for name in files:
            yield _garbage(artifact.path / name, "retention")


def _leftovers(run_dir: RunDir) -> Iterator[Garbage]:
    """Half-written files, and files of work folders whose artifact is finished by now."""
    for path in sorted(run_dir.path.rglob("*")):
        partial = next((p for p in path.parents if p.name.endswith(PARTIAL_SUFFIX)), None)
        if partial is None and is_temporary(path):
            yield _garbage(path, "half-written")
        elif partial is not None and path.is_file() and _is_over(partial):
            yield _garbage(path, "unused work folder")


def _is_over(partial: Path) -> bool:
    """Whether nobody goes on with this work folder: its artifact is there."""
    stage = (
        "score"
        if partial.name.startswith("score-ahead-")
        else partial.name.removesuffix(PARTIAL_SUFFIX)
    )
    return (partial.parent / stage / MANIFEST).is_file()


def _garbage(path: Path, why: str) -> Garbage:
    stat = path.stat()
    return Garbage(path, stat.st_size if stat.st_nlink == 1 else 0, why)
