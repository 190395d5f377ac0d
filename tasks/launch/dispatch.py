"""Stage call -> stage function; the only file that imports all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.artifacts.artifact import Artifact
from tasks.launch.calls import StageCall
from tasks.pipeline import STAGES, round_of, stage_of
from tasks.resources.resources import Resources
from tasks.stages.advantage import advantage
from tasks.stages.evaluate import evaluate
from tasks.stages.refresh import refresh
from tasks.stages.rollout import rollout
from tasks.stages.score import score
from tasks.stages.update import update
from tasks.stages.warmup import warmup

FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "warmup": warmup,
    "rollout": rollout,
    "score": score,
    "advantage": advantage,
    "update": update,
    "refresh": refresh,
    "evaluate": evaluate,
}


def do(call: StageCall, resources: Resources, out: Path) -> dict[str, Any]:
    """Run the stage function of `call` and return the artifact's meta; its files are in `out`.

    Where several ranks do it, the files are complete when one of them returns, and the meta is the
    first one's.
    """
    stage = stage_of(call.name)
    inputs = {key: Artifact.load(path) for key, path in call.inputs.items()}
    shared = STAGES[stage].done_by == "ranks"
    given = resources if shared else resources.params
    meta = FUNCTIONS[stage](given, round_of(call.name), out, **inputs, **call.options)
    if shared:
        resources.ranks.barrier()
    return meta
