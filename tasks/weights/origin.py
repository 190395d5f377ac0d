"""Where a checkpoint comes from, in few words: what travels with weights that leave the project."""

import json
from pathlib import Path
from typing import Any

from tasks.artifacts.artifact import Artifact
from tasks.artifacts.digests import file_sha256
from tasks.artifacts.layout import WARMUP, evaluation_name, round_number
from tasks.artifacts.run_dir import RunDir
from tasks.weights.checkpoints import Checkpoint

SCORES = ("ocr_accuracy", "exact_match", "style_score", "reward")
Scores = dict[str, dict[str, float]]  # measure -> mean, low, high (bootstrap 95 %)


def rounds_done(checkpoint: Checkpoint) -> int:
    """Return how many rounds had been trained; 0 for a warm-up."""
    if checkpoint.artifact.stage == WARMUP:
        return 0
    return round_number(checkpoint.artifact.path.parent.name) + 1


def evaluation_of(run: Path, rounds: int) -> Artifact | None:
    """Return the run's own evaluation after so many rounds, if it made one."""
    path = RunDir(run).stage_path(evaluation_name(rounds))
    return Artifact.load(path) if path.exists() else None


def scores_of(evaluation: Artifact | None) -> Scores:
    """Return the measures of `SCORES` that an evaluation has; none of no evaluation."""
    meta = {} if evaluation is None else evaluation.meta
    return {
        name: {"mean": meta[name], "low": meta[f"{name}_low"], "high": meta[f"{name}_high"]}
        for name in SCORES
        if name in meta
    }


def origin(found: Checkpoint | Path) -> dict[str, Any]:
    """Return base, run, stage, rounds, digest (sha256 of the weights file) and scores.

    Of a file that is no artifact's, the digest alone is known.
    """
    if isinstance(found, Path):
        return {"digest": file_sha256(found)}
    rounds = rounds_done(found)
    return {
        "base": found.model["base"],
        "run": found.run.resolve().name,
        "stage": str(found.artifact.path.relative_to(found.run)),
        "rounds": rounds,
        "digest": found.artifact.files[found.path.name].sha256,
        "scores": {
            "before": scores_of(evaluation_of(found.run, 0)),
            "after": scores_of(evaluation_of(found.run, rounds)) if rounds else {},
        },
    }


def as_metadata(origin: dict[str, Any]) -> dict[str, str]:
    """Return an origin as texts for the header of a safetensors file: `calligrapher.run`, ..."""
    return {
        f"calligrapher.{key}": value if isinstance(value, str) else json.dumps(value)
        for key, value in origin.items()
    }
