"""The rows that are trained on, and noise added to them.

Legend: B rows, L image tokens, D packed channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from calligrapher.model.policy import Conditioning
from calligrapher.sampling.exploration import Window


@dataclass(frozen=True)
class TrainRows:
    """Training rows: what was sampled, what it was conditioned on, and how good it was."""

    x0: Tensor  # [B, L, D]
    conditioning: Conditioning
    advantages: Tensor  # [B]; zeros in the warm-up
    window: Window | None = None  # GRPO only
    groups: Tensor | None = None  # [B], equal within a group; for NFT's shared noise

    def __len__(self) -> int:
        return len(self.x0)

    def pick(self, index: list[int]) -> "TrainRows":
        w = self.window
        window = (
            Window(w.trajectory[index], w.log_prob[index], w.mean[index], w.sigmas[index])
            if w
            else None
        )
        groups = self.groups[index] if self.groups is not None else None
        return TrainRows(
            self.x0[index], self.conditioning.rows(index), self.advantages[index], window, groups
        )


def noised(
    x0: Tensor, sigma: Tensor, generator: torch.Generator, draw: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fresh noise, and `x = (1 - sigma) x0 + sigma noise`; x0 [B, L, D], sigma [B] -> (x, noise).

    `draw` [B] numbers the rows' noises from 0: rows with one number share one noise.
    """
    count = len(x0) if draw is None else int(draw.max()) + 1
    noise = torch.randn(count, *x0.shape[1:], generator=generator)
    noise = (noise if draw is None else noise[draw.cpu()]).to(x0.device)
    return torch.lerp(x0, noise, sigma[:, None, None]), noise
