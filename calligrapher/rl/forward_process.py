"""What the algorithms of the forward process share: clean latents in, noise added anew.

They need nothing of how an image was sampled but the image: any sampler will do, and no step of the
rollout explores. Legend: B rows, K noise levels per row, N steps of the rollout's schedule.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from calligrapher.errors import InputError
from calligrapher.params import Positive
from calligrapher.rl.algorithm import Algorithm
from calligrapher.rl.ema import OldPolicy, old_policy_decay
from calligrapher.rl.held_background import HeldBackground
from calligrapher.rl.kl import KLToReference
from calligrapher.rl.rows import TrainRows, noised
from calligrapher.rl.seeds import seeded
from calligrapher.sampling.schedule import sigma_schedule, trained_steps

Following = OldPolicy | Annotated[float, Field(gt=0, lt=1)]
DECAY_TYPES: dict[int, OldPolicy] = {0: "fixed", 1: "slow", 2: "fast"}


@dataclass(frozen=True)
class Noised:
    """The rows of a batch at one noise level each."""

    x: Tensor  # [B, L, D] = (1 - sigma) x0 + sigma noise
    sigma: Tensor  # [B]
    noise: Tensor  # [B, L, D]


class ForwardProcess(HeldBackground, KLToReference, Algorithm):
    """The settings of an algorithm that noises the rollouts' images anew."""

    kl_coef: float = Field(
        0.01,
        ge=0,
        description="Weight of mean((v - v_ref)^2). 0 saves the reference's forward.",
    )
    num_train_sigmas: int | None = Field(
        None,
        ge=1,
        description=(
            "Noise levels trained per image and update, drawn anew for each; null = all of"
            " timestep_fraction. The cost knob: each costs a forward+backward and the old and"
            " reference forwards."
        ),
    )
    timestep_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the schedule, from its noisy end, that noise levels are drawn from.",
    )
    sigmas: Literal["schedule", "stratified"] = Field(
        "schedule",
        description=(
            "Noise levels are different ones of the rollout's schedule, or lie anywhere between"
            " them: timestep_fraction's steps are cut into num_train_sigmas equal parts, and one is"
            " drawn from each."
        ),
    )
    noise: Literal["row", "group"] = Field(
        "row",
        description=(
            "Noise and noise levels are drawn for every image, or once for all images of a group: "
            "what does not depend on the image then cancels, for a group's advantages add up to 0."
            " What is drawn does not depend on batches."
        ),
    )
    old_policy: Following = Field(
        "fixed",
        description=(
            "How the rollout policy follows the trained one after a round. fixed: never; slow:"
            " decay 0.001 t up to 0.5; fast: copies for 75 steps, then a decay of 0.0075 (t - 75)"
            " up to 0.999; copy: always. A number between 0 and 1 is a constant decay; 0, 1 and 2"
            " (nft_decay_type) stand for fixed, slow, fast."
        ),
    )
    old_policy_interval: Positive = Field(
        1, description="Rounds after which the rollout policy follows; it stays in the others."
    )

    @field_validator("old_policy", mode="before")
    @classmethod
    def _decay_type(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return DECAY_TYPES.get(value, value)
        return value

    @property
    def exploration(self) -> None:
        return None

    @property
    def needs_old(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def old_is_start(self) -> bool:
        return self.old_policy == "fixed"

    @property
    def decides_old(self) -> dict[str, Any]:
        interval = self.old_policy_interval
        # Only where it is set: what was made before there was such a key is not stale.
        return {"old_policy": self.old_policy} | (
            {"old_policy_interval": interval} if interval > 1 else {}
        )

    def old_policy_decay(self, step: int, round_index: int) -> float:
        if (round_index + 1) % self.old_policy_interval:
            return 1.0
        return old_policy_decay(self.old_policy, step)

    def forwards_per_image(self, num_steps: int) -> int:
        return self.num_train_sigmas or trained_steps(num_steps, self.timestep_fraction)

    def fits(self, num_steps: int) -> None:
        super().fits(num_steps)
        available = trained_steps(num_steps, self.timestep_fraction)
        if self.sigmas == "schedule" and (self.num_train_sigmas or 0) > available:
            raise ValueError(
                f"{self.name}.num_train_sigmas must be at most {available}"
                f" ({self.name}.timestep_fraction of {num_steps} rollout.num_inference_steps)."
                f" Got {self.num_train_sigmas}."
            )

    def noised_rows(self, rows: TrainRows, key: str, num_steps: int) -> Iterator[Noised]:
        """Yield the rows at each of their `num_train_sigmas` noise levels.

        Noise and levels are drawn on the CPU for every row, or once for a group, by names that
        derive from `key` and the row's place: what shares a batch changes none of them.
        """
        schedule = sigma_schedule(num_steps, rows.x0.shape[1])
        # Rows of one name share what is drawn.
        names = [f"{key}/{group}/{member}" for group, member in rows.places.tolist()]
        if self.noise == "group":
            names = [f"{key}/{group}" for group, _ in rows.places.tolist()]
        sigmas_KB = _drawn(names, lambda name: train_sigmas(schedule, self, seeded(name, "sigmas")))
        sigmas_KB = sigmas_KB.T.to(rows.x0.device)
        for k, sigma in enumerate(sigmas_KB):
            noise = _drawn(names, partial(_noise, rows.x0.shape[1:], k)).to(rows.x0.device)
            yield Noised(noised(rows.x0, sigma, noise), sigma, noise)


def train_sigmas(sigmas: Tensor, params: ForwardProcess, generator: torch.Generator) -> Tensor:
    """Noise levels to train a row on, [K].

    sigmas: the schedule [N + 1], ending in 0, which is never drawn. K = num_train_sigmas, or as
    many as timestep_fraction leaves of the schedule. `schedule`: different ones of those, drawn
    without replacement; raises InputError when more are asked for than there are. `stratified`:
    one from each of K equal parts of them, linear between two levels.
    """
    available = trained_steps(len(sigmas) - 1, params.timestep_fraction)
    count = available if params.num_train_sigmas is None else params.num_train_sigmas
    if params.sigmas == "stratified":
        drawn = torch.rand(count, generator=generator, dtype=torch.float64)
        place = (torch.arange(count) + drawn) * (available / count)
        below = place.long().clamp(max=available - 1).to(sigmas.device)
        share = (place.to(sigmas.device) - below).to(sigmas.dtype)
        return torch.lerp(sigmas[below], sigmas[below + 1], share)
    if count > available:
        raise InputError(
            f"num_train_sigmas must be at most {available} (timestep_fraction of {len(sigmas) - 1}"
            f" steps). Got {count}. Lower it, or raise the number of steps or timestep_fraction."
        )
    return sigmas[torch.randperm(available, generator=generator)[:count].to(sigmas.device)]


def _drawn(names: list[str], draw: Callable[[str], Tensor]) -> Tensor:
    """Return what `draw` gives for each name, [B, ...]; equal names share one draw."""
    drawn = {name: draw(name) for name in dict.fromkeys(names)}
    return torch.stack([drawn[name] for name in names])


def _noise(shape: torch.Size, k: int, name: str) -> Tensor:
    """Return the noise of a row's k-th noise level, drawn on the CPU."""
    return torch.randn(shape, generator=seeded(name, k))
