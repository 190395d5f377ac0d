"""What is not to be painted of rows, and how far from their sources it is.

Legend: B rows, L image tokens, D channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from calligrapher.model.policy import Conditioning


@dataclass(frozen=True)
class Background:
    """The sources of rows, and where they are to stay."""

    x0: Tensor  # [B, L, D] clean latents of the sources
    outside: Tensor  # [B, L, D] of bool: latent positions without a pixel to paint

    @classmethod
    def of(cls, sources: Tensor, conditioning: Conditioning) -> "Background":
        """Return the background of `sources` [B, L, D], masked as the conditioning says."""
        # A token is 2x2 latent positions, last in the order of its channels, of sources and masks.
        mask = conditioning.masked[..., sources.shape[-1] :].unflatten(-1, (-1, 4))
        outside = (mask == 0).all(-2)  # [B, L, 4]
        return cls(sources, outside.repeat(1, 1, sources.shape[-1] // 4))

    def pick(self, index: list[int]) -> "Background":
        return Background(self.x0[index], self.outside[index])

    def apart(self, velocity: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity of x at sigma [B] without a gradient outside, and the error there.

        The error is a scalar with gradient: the mean square of `x - sigma v - source`, the clean
        latent that the velocity leads to against the source's, over what is outside of all rows; 0
        where nothing is.
        """
        inside = torch.where(self.outside, velocity.detach(), velocity)
        reached = x.detach().float() - sigma.detach().float()[:, None, None] * velocity.float()
        squared = (reached - self.x0.float()) ** 2
        error = (squared * self.outside).sum() / self.outside.sum().clamp(min=1)
        return inside, error
