"""Copies of the adapter's weights that follow the trained ones: `ema` and `old`.

`ema` is evaluated; `old` samples NFT's rollouts. `decay` is the share of the copy that stays: 1
leaves it alone, 0 overwrites it.
"""

from typing import Literal

import torch
from torch import Tensor

from calligrapher.errors import InputError

OldPolicy = Literal["fixed", "slow", "fast", "copy"]


def ema_decay(step: int, max_decay: float) -> float:
    """Return `min((1 + t) / (10 + t), max_decay)`.

    The average forgets its start quickly, then settles at max_decay.

    step: optimizer steps so far, t >= 0. Source: DiffusionNFT's and Flow-GRPO's `EMAModuleWrapper`.
    """
    _check_step(step)
    return min((1 + step) / (10 + step), max_decay)


def old_policy_decay(kind: OldPolicy, step: int) -> float:
    """The decay of `old` at the end of a round; step: optimizer steps so far.

    fixed: 1 (never updated). slow: 0.001 t, at most 0.5. fast: 0 while t < 75, then 0.0075 (t -
    75), at most 0.999. copy: 0 (on-policy). Source: DiffusionNFT's `return_decay`, whose type 0 is
    our `copy`.
    """
    _check_step(step)
    match kind:
        case "fixed":
            return 1.0
        case "slow":
            return min(0.001 * step, 0.5)
        case "fast":
            return 0.0 if step < 75 else min((step - 75) * 0.0075, 0.999)
        case "copy":
            return 0.0
    raise InputError(f"old_policy must be one of fixed, slow, fast, copy. Got {kind!r}.")


@torch.no_grad()
def lerp_(target: dict[str, Tensor], source: dict[str, Tensor], decay: float) -> None:
    """`target <- decay * target + (1 - decay) * source`, in place, name by name.

    Computed in float32, stored in the target's dtype: keep the copies in float32, since bfloat16
    rounds small updates away for good. Raises InputError for a decay outside [0, 1], for names or
    shapes that differ, and for a target that shares memory with its source.
    """
    if not 0.0 <= decay <= 1.0:
        raise InputError(f"decay must lie in [0, 1]. Got {decay}.")
    if target.keys() != source.keys():
        differ = sorted(target.keys() ^ source.keys())
        raise InputError(
            f"both sides must have the same names. {len(differ)} differ, the first: {differ[:3]}."
        )
    for name, kept in target.items():
        new = source[name].detach()
        if kept.shape != new.shape:
            raise InputError(
                f"{name} must have one shape on both sides. Got {tuple(kept.shape)} and"
                f" {tuple(new.shape)}."
            )
        if kept.numel() and kept.data_ptr() == new.data_ptr():
            raise InputError(
                f"{name} shares its memory with its source. Make the copy with `snapshot`."
            )
    if decay == 1.0:
        return
    for name, kept in target.items():
        new = source[name].detach()
        if decay == 0.0:
            kept.copy_(new)
        else:
            kept.copy_(kept.float().lerp(new.to(kept.device).float(), 1.0 - decay))


@torch.no_grad()
def snapshot(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return real copies of `params` on the same device.

    `.detach().cpu()` would alias weights that already are on the CPU.
    """
    return {name: tensor.detach().clone() for name, tensor in params.items()}


def _check_step(step: int) -> None:
    if step < 0:
        raise InputError(f"step must be 0 or more. Got {step}.")
