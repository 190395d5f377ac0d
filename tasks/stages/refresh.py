"""Stage `refresh`: let the old policy, which samples for NFT, follow the trained one."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from calligrapher.durable import save_tensors
from calligrapher.rl.ema import lerp_, old_policy_decay
from calligrapher.rl.train_loop import STATE, TRAINED
from tasks.artifacts.run_dir import Artifact
from tasks.params.run_params import RunParams

VERSION = 1
OLD = "old.safetensors"


def refresh(params: RunParams, old: Path, updated: Artifact, out: Path) -> dict[str, Any]:
    """Write `old <- d old + (1 - d) trained`, with d from the optimizer step count
    (`nft.old_policy`).

    GRPO samples with the trained weights, so its `old` is a copy of them. Files: `old.safetensors`.
    Meta: old_decay.
    """
    step = json.loads(updated.file(STATE).read_text())["step"]
    decay = old_policy_decay(params.nft.old_policy, step) if params.nft is not None else 0.0
    weights = load_file(old)
    lerp_(weights, load_file(updated.file(TRAINED)), decay)
    save_tensors(weights, out / OLD)
    return {"old_decay": decay}
