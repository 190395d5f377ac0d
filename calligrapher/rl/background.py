"""What is not to be painted: a policy's loss leaves it alone, and a loss of its own holds it.

No reward sees what lies outside of the mask, so a round's gradient is noise there, and the picture
drifts. But what belongs there is known: the source. Legend: B rows, L image tokens, D channels.
"""

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from calligrapher.model.policy import Conditioning, Policy
from calligrapher.params import Section


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


class HeldBackground(Section):
    """The weight of the background's loss. Base of an algorithm's section that has such a loss."""

    background_coef: float = Field(
        0.0,
        ge=0,
        description=(
            "Weight of the squared error to the source outside of the mask, which no reward sees;"
            " there the policy's loss and KL then have no gradient. 0: they cover the whole"
            " picture, as published."
        ),
    )

    @property
    def holds_background(self) -> bool:
        return self.background_coef > 0

    def trained_velocity(
        self,
        policy: Policy,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        background: Background | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the velocity under the trained weights, and the error outside of the mask.

        Where the background is held the velocity has no gradient there; elsewhere the error is
        None.
        """
        velocity = policy.velocity(x, sigma, conditioning)
        return (velocity, None) if background is None else background.apart(velocity, x, sigma)

    def whole_loss(
        self, loss: Tensor, metrics: dict[str, Tensor], error: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a noise level's loss with its background's, and the metrics with both."""
        if error is not None:
            loss = loss + self.background_coef * error
            metrics = metrics | {"background": error.detach()}
        return loss, metrics | {"loss": loss.detach()}
