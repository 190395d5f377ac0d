"""Advantages: how much better an image is than its group.

Legend: P groups (one case each), G members of a group. No history is kept between rounds.
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from calligrapher.errors import InputError
from calligrapher.params import Section

STD_FLOOR = 1e-4  # added to the standard deviation, as in Flow-GRPO
SAME_REWARD = 1e-6  # rewards closer than this are equal: weighted sums differ by rounding alone


class AdvantageParams(Section):
    """How rewards become advantages.

    The old `rl_per_prompt_stat_tracking: true` is `baseline: group, global_std: false`; `false`,
    which compared an image with the whole round, is `baseline: round`. The default is Flow-GRPO's.
    The clip of the advantages belongs to the losses (`adv_clip_max`).
    """

    baseline: Literal["group", "round"] = Field(
        "group",
        description=(
            "The mean that is subtracted: that of the group (one case), or that of all images of"
            " the round. `round` also serves groups of one image, but rewards easy cases for being"
            " easy."
        ),
    )
    global_std: bool = Field(
        True,
        description=(
            "Divide by the standard deviation of all rewards of the round (true) or of the group"
            " (false). False gives groups with tiny differences the same weight as groups with"
            " large ones."
        ),
    )

    @model_validator(mode="after")
    def _round_has_one_std(self) -> Self:
        if self.baseline == "round" and not self.global_std:
            raise ValueError(
                "advantage.global_std must be true when advantage.baseline is 'round'. Got false."
            )
        return self


def group_advantages(
    rewards: Tensor,
    *,
    global_std: bool,
    valid: Tensor | None = None,
    baseline: Literal["group", "round"] = "group",
) -> Tensor:
    """`(reward - mean) / (std + 1e-4)` with the population std; [P, G] -> [P, G] float64.

    valid: [P, G] bool, false for images without a score. They enter no statistic and get 0, as do
    members of groups with fewer than two valid members or with equal rewards; `kept` says which
    rows count. Raises InputError for other shapes and for a reward that is not finite though it is
    valid. Source: Flow-GRPO's `PerPromptStatTracker`, with the case in place of the prompt string.
    """
    rewards, valid = _checked(rewards, valid)
    keep = kept(rewards, valid, baseline=baseline)
    if not keep.any():
        return torch.zeros_like(rewards)
    values = torch.where(valid, rewards, 0.0)
    everything = rewards[valid]
    if baseline == "round":
        mean = everything.mean().expand_as(rewards)
        no_spread = (everything.max() - everything.min() <= _tolerance(everything)).expand_as(
            rewards
        )
    else:
        mean = (values.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)).expand_as(
            rewards
        )
        no_spread = zero_spread(rewards, valid)[:, None].expand_as(rewards)
    centred = torch.where(valid, rewards - mean, 0.0)
    if global_std or baseline == "round":
        std = everything.std(correction=0)
    else:
        std = ((centred**2).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)).sqrt()
    return torch.where(keep & ~no_spread, centred / (std + STD_FLOOR), 0.0)


def kept(
    rewards: Tensor, valid: Tensor | None = None, *, baseline: Literal["group", "round"] = "group"
) -> Tensor:
    """Return which images can be trained on, [P, G] bool.

    They have a score, and somebody to be compared to.
    """
    rewards, valid = _checked(rewards, valid)
    if baseline == "round":
        return valid & (valid.sum() >= 2)
    return valid & (valid.sum(1, keepdim=True) >= 2)


def zero_spread(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return which groups have two or more valid rewards, and these all equal; [P] bool.

    Such a group teaches nothing; one with fewer valid rewards has no spread that could be zero.
    """
    rewards, valid = _checked(rewards, valid)
    top = torch.where(valid, rewards, -torch.inf).amax(1)
    bottom = torch.where(valid, rewards, torch.inf).amin(1)
    return (valid.sum(1) >= 2) & (top - bottom <= _tolerance(rewards[valid]))


def _checked(rewards: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    if rewards.ndim != 2:
        raise InputError(
            f"rewards must be [groups, members]. Got the shape {tuple(rewards.shape)}."
        )
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid.bool()
    if valid.shape != rewards.shape:
        raise InputError(
            f"valid must be shaped like rewards, {tuple(rewards.shape)}. Got {tuple(valid.shape)}."
        )
    wrong = (valid & ~rewards.isfinite()).nonzero().tolist()
    if wrong:
        raise InputError(
            f"every valid reward must be finite. Got {rewards[tuple(wrong[0])].item()} at [group,"
            f" member] {wrong[0]} ({len(wrong)} in all). Mark images without a score as not valid."
        )
    # Where not valid the reward may be NaN: a masked NaN must not reach the arithmetic.
    return torch.where(valid, rewards.double(), 0.0), valid


def _tolerance(rewards: Tensor) -> float:
    return SAME_REWARD * max(1.0, rewards.abs().max().item()) if rewards.numel() else SAME_REWARD
