"""Stage `refresh`: let the old policy, which samples for NFT, follow the trained one."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from calligrapher.durable import save_tensors
from calligrapher.rl.ema import lerp_
from calligrapher.rl.train_state import STATE, TRAINED
from tasks.artifacts.artifact import Artifact
from tasks.params.run_params import RunParams

OLD = "old.safetensors"


def old_weights(old: Artifact) -> Path:
    """Return the file of the old policy: a refresh's own, or the weights of the warm-up."""
    return old.file(OLD if OLD in old.files else TRAINED)


def refresh(
    params: RunParams, round_index: int, out: Path, *, old: Artifact, updated: Artifact
) -> dict[str, Any]:
    """Write `old <- d old + (1 - d) trained`; the algorithm gives d for the optimizer step count.

    Files: `old.safetensors`. Meta: old_decay.
    """
    step = json.loads(updated.file(STATE).read_text())["step"]
    decay = params.rl.old_policy_decay(step, round_index)
    weights = load_file(old_weights(old))
    lerp_(weights, load_file(updated.file(TRAINED)), decay)
    save_tensors(weights, out / OLD)
    return {"old_decay": decay}
