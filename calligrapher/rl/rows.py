"""The rows that are trained on, and noise added to them.

Legend: B rows, L image tokens, D packed channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from calligrapher.model.policy import Conditioning
from calligrapher.rl.background import Background
from calligrapher.sampling.exploration import Window


@dataclass(frozen=True)
class TrainRows:
    """Training rows: what was sampled, what it was conditioned on, and how good it was."""

    x0: Tensor  # [B, L, D]
    conditioning: Conditioning
    advantages: Tensor  # [B]; zeros in the warm-up
    window: Window | None = None  # GRPO only
    places: Tensor | None = None  # [B, 2] group and member; what is drawn for a row derives from it
    background: Background | None = None  # None: the policy's loss covers the whole picture
    credit: Tensor | None = None  # [B, L, D] advantages by place; None: the row's is everywhere
    deviation: Tensor | None = None  # [B, L, D] x0 less the mean of its group's, where asked for

    def __len__(self) -> int:
        return len(self.x0)

    def pick(self, index: list[int]) -> "TrainRows":
        window = self.window.pick(index) if self.window else None
        places = self.places[index] if self.places is not None else None
        background = self.background.pick(index) if self.background else None
        credit = self.credit[index] if self.credit is not None else None
        deviation = self.deviation[index] if self.deviation is not None else None
        return TrainRows(
            self.x0[index],
            self.conditioning.rows(index),
            self.advantages[index],
            window,
            places,
            background,
            credit,
            deviation,
        )


def noised(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Return `x = (1 - sigma) x0 + sigma noise`; x0 and noise [B, L, D], sigma [B]."""
    return torch.lerp(x0, noise, sigma[:, None, None])
