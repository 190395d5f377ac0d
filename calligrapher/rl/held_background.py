"""What is not to be painted: a policy's loss leaves it alone, and a loss of its own holds it.

No reward sees what lies outside of the mask, so a round's gradient is noise there, and the picture
drifts. But what belongs there is known: the source. Where an algorithm trains noisy steps alone,
most of the drift comes about in the clean ones, which nothing holds: for those a few images are
noised once more. Legend: B rows, L image tokens, D channels.
"""

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from calligrapher.model.policy import Conditioning, Policy, velocity_once
from calligrapher.params import Section
from calligrapher.rl.algorithm import Losses
from calligrapher.rl.background import Background
from calligrapher.rl.rows import TrainRows, noised
from calligrapher.rl.seeds import seeded
from calligrapher.sampling.schedule import sigma_schedule, trained_steps


class HeldBackground(Section):
    """The weight of the background's loss. Base of an algorithm's section that has such a loss."""

    timestep_fraction: float
    background_coef: float = Field(
        0.0,
        ge=0,
        description=(
            "Weight of the squared error to the source outside of the mask, which no reward sees;"
            " there the policy's loss and KL then have no gradient. 0: they cover the whole"
            " picture, as published."
        ),
    )

    background_rows: int = Field(
        0,
        ge=0,
        description=(
            "Images of a batch that are noised once more, each to a step of the schedule that is"
            " not trained, for background_coef's error there: a forward and a backward of so many"
            " rows a batch."
        ),
    )

    @model_validator(mode="after")
    def _rows_have_a_loss(self) -> Self:
        if self.background_rows and not self.background_coef:
            raise ValueError(
                "background_rows must be 0 where background_coef is 0, for that is the weight of"
                f" their loss. Got {self.background_rows}."
            )
        return self

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
        *,
        alike: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the velocity under the trained weights, and the error outside of the mask.

        Where the background is held the velocity has no gradient there; elsewhere the error is
        None. alike: see `velocity_once`.
        """
        velocity = velocity_once(policy, x, sigma, conditioning, alike)
        return (velocity, None) if background is None else background.apart(velocity, x, sigma)

    def whole_loss(
        self, loss: Tensor, metrics: dict[str, Tensor], error: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a noise level's loss with its background's, and the metrics with both."""
        if error is not None:
            loss = loss + self.background_coef * error
            metrics = metrics | {"background": error.detach()}
        return loss, metrics | {"loss": loss.detach()}

    def background_rows_of(self, batch_size: int) -> int:
        return min(self.background_rows, batch_size)

    def steps_trained(self, num_steps: int) -> int:
        """Return how many of the schedule's steps, from its noisy end, may be trained."""
        return trained_steps(num_steps, self.timestep_fraction)

    def fits(self, num_steps: int) -> None:
        if self.background_rows and self.steps_trained(num_steps) == num_steps:
            raise ValueError(
                f"{self.name}.background_rows must be 0 where {self.name}.timestep_fraction leaves"
                f" no step of rollout.num_inference_steps = {num_steps} out. Got"
                f" {self.background_rows} and {self.timestep_fraction}."
            )

    def untrained_steps(self, policy: Policy, rows: TrainRows, key: str, num_steps: int) -> Losses:
        """Yield the background's loss at steps that are not trained, of rows evenly spaced.

        Their levels and noise are drawn by names that derive from `key` and the row's place.
        Nothing where `background_rows` is 0.
        """
        count = self.background_rows_of(len(rows))
        if not count:
            return
        picked = rows.pick([i * len(rows) // count for i in range(count)])
        schedule = sigma_schedule(num_steps, picked.x0.shape[1])[:-1]
        levels = schedule[self.steps_trained(num_steps) :]
        sigmas, noises = [], []
        for group, member in picked.places.tolist():
            generator = seeded(f"{key}/{group}/{member}", "background")
            sigmas.append(levels[torch.randint(len(levels), (), generator=generator)])
            noises.append(torch.randn(picked.x0.shape[1:], generator=generator))
        device = picked.x0.device
        sigma, noise = torch.stack(sigmas).to(device), torch.stack(noises).to(device)
        x = noised(picked.x0, sigma, noise)
        velocity = policy.velocity(x, sigma, picked.conditioning)
        _, error = picked.background.apart(velocity, x, sigma)
        yield self.background_coef * error, {"background_untrained": error.detach()}
