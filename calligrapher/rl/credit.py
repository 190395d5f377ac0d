"""Credit by place: each latent position follows the advantage of the letter that stands there.

A text is right letter by letter, and what a letter looks like is decided where it stands. Compared
picture by picture, a letter shares its advantage with all others of its text, whose luck is noise
to it. Here is also what an image as a whole is drawn along (`drawn`). Legend: B rows, L image
tokens, D packed channels, N letters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from calligrapher.errors import InputError

_POSITIONS = 4  # of a token, 2x2, last in the order of its channels


def letter_credit(
    letters: Sequence[float],
    boxes: Sequence[Sequence[float]],
    own: float,
    *,
    image_ids: Tensor,
    channels: int,
    width: int,
    height: int,
) -> Tensor:
    """Return the advantage of each latent position of a picture, [L, D] float32.

    A position has that of the letter whose box is nearest to its middle, of several the one with
    the smallest box, and the picture's `own` where none is as near as that letter is high.

    letters: N advantages. boxes: their left, top, right and bottom in px of the picture, which is
    `width` x `height`. image_ids: [L, 3], of the tokens; a strip of context lies above the picture.
    channels: D. Raises InputError where the tokens are none of such a picture.
    """
    rows, columns = (int(side) + 1 for side in image_ids[:, 1:].amax(0).tolist())
    side = width / columns  # px of a token
    if len(image_ids) != rows * columns or rows * side < height or channels % _POSITIONS:
        raise InputError(
            f"tokens must cover a picture of {width} x {height} px in {_POSITIONS} positions each."
            f" Got {len(image_ids)} tokens in {rows} rows and {columns} columns of {channels}"
            " channels."
        )
    if not letters:
        return torch.full((len(image_ids), channels), own)
    corner = image_ids[:, 1:].double().cpu() * side  # [L, 2] top and left of each token
    corner[:, 0] -= rows * side - height
    middle = torch.tensor([0.25, 0.75], dtype=torch.float64) * side
    y = (corner[:, :1] + middle.repeat_interleave(2)).reshape(-1, 1)  # [4 L, 1]
    x = (corner[:, 1:] + middle.repeat(2)).reshape(-1, 1)
    sides = torch.tensor(boxes, dtype=torch.float64)  # [N, 4]
    # The first of equals is taken: one that stands anywhere in a place yields to those within.
    smallest_first = (sides[:, 2:] - sides[:, :2]).prod(1).argsort(stable=True)
    left, top, right, bottom = sides[smallest_first].T
    across = (left - x).clamp(min=0) + (x - right).clamp(min=0)  # [4 L, N] px
    along = (top - y).clamp(min=0) + (y - bottom).clamp(min=0)
    distance = torch.hypot(across, along)
    distance = torch.where(distance <= bottom - top, distance, torch.inf)
    found = torch.tensor(letters, dtype=torch.float32)[smallest_first]
    nearest = found[distance.argmin(1)]
    credit = torch.where(distance.isfinite().any(1), nearest, own)
    return credit.reshape(-1, _POSITIONS).repeat(1, channels // _POSITIONS)


def credited(velocity: Tensor, credit: Tensor) -> Tensor:
    """Return the velocity, to the bit; its gradient counts `credit` times at each place."""
    held = velocity.detach()
    return held + (velocity - held) * credit


def less_their_mean(x0: Tensor, groups: Sequence[int]) -> Tensor:
    """Return how each of x0 [B, L, D] differs from the mean of its group's; groups: B numbers."""
    numbers = torch.tensor(groups, device=x0.device)
    deviation = torch.empty_like(x0)
    for number in numbers.unique():
        own = numbers == number
        deviation[own] = x0[own] - x0[own].mean(0)
    return deviation


def drawn(log_prob: Tensor, mean: Tensor, pull: Tensor) -> Tensor:
    """Return log_prob [B], to the bit; its gradient draws the mean along `pull`, both [B, L, D].

    It is that of `-(target - mean)^2 / 2`, averaged over L and D, with `pull` for `target - mean`.
    """
    along = (pull * mean).flatten(1).mean(1)
    return log_prob.detach() + (along - along.detach())


def gain(advantages: Tensor, ratio: Tensor, *, is_credited: bool) -> Tensor:
    """Return `advantages * ratio`, [B]; its gradient is that, or the ratio's alone.

    is_credited: the ratio's gradient holds the advantages already, by `credited` or `drawn`.
    """
    value = advantages * ratio
    return value.detach() + (ratio - ratio.detach()) if is_credited else value
