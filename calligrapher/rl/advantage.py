"""Advantages: how much better an image is than its group.

Legend: P groups (one case each), G members of a group. No history is kept between rounds.
"""

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from calligrapher.errors import InputError
from calligrapher.params import Section

STD_FLOOR = 1e-4  # added to the standard deviation, as in Flow-GRPO
LETTER_STD_FLOOR = 0.05  # of letters' likelihoods: 0.99 beside 1 says next to nothing
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

    combine: Literal["sum", "standardized"] = Field(
        "sum",
        description=(
            "How the components of the reward meet: sum: weighed and added, then compared; "
            "standardized: each compared within its group first, so that one with a wide spread "
            "does not drown the others. global_std then divides the sum by its own standard "
            "deviation over the round."
        ),
    )
    per_letter: bool = Field(
        False,
        description=(
            "Compare ocr_likelihood letter by letter: each place of a picture follows the advantage"
            " of the letter that stands there. Needs combine: standardized, and reward servers that"
            " tell where letters stand."
        ),
    )
    drop_solved: bool = Field(
        False,
        description=(
            "Leave out groups that can hardly do better: mean reward above 0.9 and standard "
            "deviation below 0.05, as shares of the highest reward there can be."
        ),
    )

    @model_validator(mode="after")
    def _round_has_one_std(self) -> Self:
        if self.baseline == "round" and not self.global_std:
            raise ValueError(
                "advantage.global_std must be true when advantage.baseline is 'round'. Got false."
            )
        if self.baseline == "round" and self.combine == "standardized":
            raise ValueError(
                "advantage.baseline must be 'group' when advantage.combine is 'standardized', which"
                " compares within groups. Got 'round'."
            )
        if self.per_letter and self.combine != "standardized":
            raise ValueError(
                "advantage.combine must be 'standardized' where advantage.per_letter is true, for"
                f" a letter has one component alone. Got {self.combine!r}."
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


def standardized_advantages(
    components: Tensor, weights: Tensor, *, global_std: bool = True, valid: Tensor | None = None
) -> Tensor:
    """Each component standardised within its group, then weighed, added and whitened.

    components: [K, P, G]; weights: [K]; valid: [P, G] bool, false for images that lack a component;
    returns [P, G] float64. `A_k = (c_k - mean_k) / (std_k + 1e-4)` over the valid members of a
    group, `S = sum_k w_k A_k`, and with global_std `(S - mean(S)) / (std(S) + 1e-4)` over the valid
    images of the round; standard deviations with Bessel's correction. A component without spread in
    a group says nothing there. Images that are not valid, and those of groups with fewer than two
    valid ones, enter no statistic and get 0. Raises InputError as `group_advantages` does.
    Source: GDPO, arXiv 2601.05242; TRL's `normalize_then_sum`.
    """
    total, valid = _combined(components, weights, valid)
    if not global_std or not valid.any():
        return total
    everything = total[valid]
    whitened = (total - everything.mean()) / (everything.std() + STD_FLOOR)
    # A group in which nothing has spread teaches nothing; whitening would only add rounding.
    return torch.where(valid & (total != 0).any(1, keepdim=True), whitened, 0.0)


def letter_advantages(
    letters: Sequence[Tensor],
    weight: float,
    components: Tensor,
    weights: Tensor,
    *,
    global_std: bool = True,
    valid: Tensor,
) -> list[Tensor]:
    """Return the advantage of each letter, [G, N] float64 of each group; N letters in its text.

    letters: [G, N] of each group, how good each letter is; rows of members that are not valid are
    not looked at. The rest as in `standardized_advantages`, K may be 0. A letter has `S + weight *
    (l - mean) / (std + 0.05)`, compared with the same letter of the other valid members; with
    global_std all are divided by their own standard deviation + 1e-4. An image as a whole has the
    mean of its letters. They add up to 0 in each group, as `S` does.
    """
    total, valid = _combined(components, weights, valid)
    found = []
    for own, values, counts in zip(total, letters, valid, strict=True):
        known = values[counts].double()
        compared = torch.zeros(values.shape, dtype=torch.float64)
        if len(known) >= 2:
            spread = known.amax(0) - known.amin(0) > SAME_REWARD
            apart = torch.where(spread, known - known.mean(0), 0.0)
            compared[counts] = apart / (known.std(0) + LETTER_STD_FLOOR)
        found.append(own[:, None] + weight * compared)
    if not global_std or not valid.any():
        return found
    everything = [one[counts].flatten() for one, counts in zip(found, valid, strict=True)]
    return [one / (torch.cat(everything).std() + STD_FLOOR) for one in found]


def _combined(components: Tensor, weights: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return `S` of `standardized_advantages`, [P, G], and which images it is compared for."""
    checked = [_checked(component, valid) for component in components]
    valid = checked[0][1] if checked else valid
    valid = valid & (valid.sum(1, keepdim=True) >= 2)
    total = torch.zeros(valid.shape, dtype=torch.float64)
    if not valid.any():
        return total, valid
    counts = valid.sum(1, keepdim=True).clamp(min=2)
    for (component, measured), weight in zip(checked, weights.double(), strict=True):
        values = torch.where(valid, component, 0.0)
        centred = torch.where(valid, values - values.sum(1, keepdim=True) / counts, 0.0)
        std = ((centred**2).sum(1, keepdim=True) / (counts - 1)).sqrt()
        spread = ~zero_spread(component, measured)[:, None]
        total += weight * torch.where(spread, centred / (std + STD_FLOOR), 0.0)
    return total, valid


def solved(rewards: Tensor, highest: float, valid: Tensor | None = None) -> Tensor:
    """Return which groups can hardly do better, [P] bool: mean above 0.9 and std below 0.05.

    As shares of `highest`, over the valid members; population std. Source: Edit-R1's filter.
    """
    rewards, valid = _checked(rewards, valid)
    counts = valid.sum(1).clamp(min=1)
    mean = rewards.sum(1) / counts
    variance = (torch.where(valid, rewards - mean[:, None], 0.0) ** 2).sum(1) / counts
    is_high, is_narrow = mean > 0.9 * highest, variance.sqrt() < 0.05 * highest
    return valid.any(1) & is_high & is_narrow


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
