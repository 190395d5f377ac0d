"""The stochastic window of a rollout: its settings, where it lies, its steps, and what it leaves.

Legend: B rows, L image tokens, D packed channels, W window steps.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from calligrapher.errors import InputError
from calligrapher.params import Section
from calligrapher.sampling.schedule import trained_steps
from calligrapher.sampling.step import Step, cps_step, dance_step, sde_step


class Exploration(Section):
    """How a rollout explores: which of its steps are stochastic, and with how much noise."""

    noise_level: float = Field(
        0.7,
        gt=0,
        description=(
            "How much noise a stochastic step adds: exploration. At most 1 with the cps sampler."
        ),
    )
    sampler: Literal["sde", "dance", "cps"] = Field(
        "sde",
        description=(
            "The stochastic step: Flow-GRPO's SDE; DanceGRPO's, whose noise is the same at every"
            " sigma; or the coefficient-preserving one, whose images stay clean at high noise"
            " levels."
        ),
    )
    window_size: int | None = Field(
        2,
        ge=1,
        description=(
            "Stochastic, trained steps per image, in one window per group; the others are"
            " deterministic. null = every step that timestep_fraction leaves, the last one always"
            " excepted."
        ),
    )
    window: Literal["random", "progressive"] = Field(
        "random",
        description=(
            "Where the window lies: random draws its place for each group and round; progressive"
            " is one place for all groups, which moves from the noisy end to the clean one and"
            " begins again (MixGRPO)."
        ),
    )
    window_interval: int = Field(
        25, ge=1, description="Rounds that a progressive window stays where it is."
    )
    window_stride: int = Field(
        1, ge=1, description="Steps of the schedule by which a progressive window moves on."
    )
    noise: Literal["row", "group"] = Field(
        "row",
        description=(
            "The noise that sampling starts from is drawn for every image, or once for all images"
            " of a group: they then differ by what was explored in the window and by nothing else."
        ),
    )
    guard: bool = Field(
        False,
        description=(
            "GRPO-Guard: centre the ratio and make it and the loss comparable between noise levels."
            " Not with the cps sampler; needs a far smaller clip_range."
        ),
    )
    timestep_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the schedule, from its noisy end, in which the window may lie.",
    )

    @property
    def keeps_means(self) -> bool:
        """Whether the rollout writes down the means of its stochastic steps."""
        return self.guard

    @model_validator(mode="after")
    def _window_can_move(self) -> Self:
        if self.window == "progressive" and self.window_size is None:
            raise ValueError(
                "window_size must be a number with window 'progressive'. Got null: a window of all"
                " steps has one place only."
            )
        return self

    @model_validator(mode="after")
    def _cps_limits(self) -> Self:
        if self.sampler == "cps" and self.noise_level > 1.0:
            raise ValueError(
                f"noise_level must be at most 1 with sampler 'cps'. Got {self.noise_level}."
            )
        if self.sampler == "cps" and self.guard:
            raise ValueError(
                "guard must be false with sampler 'cps': its log-probability has no variance to"
                " undo."
            )
        return self


def fresh_noise(level: float, num_steps: int) -> Exploration | None:
    """Return how all steps but the last put fresh noise in the place of the old, as `cps_step`
    does; None where none does: at level 0, the ODE, and with one step.

    To paint with, not to train on. level: 0 to 1, where nothing is left of the old noise: what a
    step read into its noise then binds the next one by the clean image alone that it saw.
    """
    if level == 0 or num_steps == 1:
        return None
    return Exploration(sampler="cps", noise_level=level, window_size=None)


@dataclass(frozen=True)
class Window:
    """The stochastic steps of B rows: what GRPO needs to weigh them again under another policy."""

    trajectory: Tensor  # [B, W + 1, L, D] float32, x before each step and after the last
    log_prob: Tensor  # [B, W]
    mean: Tensor  # [B, W, L, D] the rollout policy's step means
    sigmas: Tensor  # [B, W + 1]
    trunks: Tensor | None = None  # [B]; rows of one number see one image in their first step

    def pick(self, index: list[int]) -> "Window":
        return Window(
            self.trajectory[index],
            self.log_prob[index],
            self.mean[index],
            self.sigmas[index],
            None if self.trunks is None else self.trunks[index],
        )


def window_length(num_steps: int, window_size: int | None, timestep_fraction: float) -> int:
    """Return how many steps the window has.

    Raises InputError when it does not fit before the last step.
    """
    available = min(trained_steps(num_steps, timestep_fraction), num_steps - 1)
    length = available if window_size is None else window_size
    if not 1 <= length <= available:
        raise InputError(
            f"the window must lie within the first {available} of {num_steps} steps"
            f" (timestep_fraction = {timestep_fraction}; the last step is never trained). Got a"
            f" window of {length}. Lower window_size, or raise the number of steps or"
            " timestep_fraction."
        )
    return length


def window_places(num_steps: int, window_size: int | None, timestep_fraction: float) -> int:
    """Return at how many steps the window may start: 0, 1, ...

    Raises InputError as `window_length` does.
    """
    length = window_length(num_steps, window_size, timestep_fraction)
    return min(trained_steps(num_steps, timestep_fraction), num_steps - 1) - length + 1


def window_start(
    seed: int,
    round_index: int,
    group: int | str,
    num_steps: int,
    window_size: int | None,
    timestep_fraction: float,
) -> int:
    """The window's first step: one for all members of a group, uniform over groups and rounds.

    The window is `range(start, start + window_length(...))` and ends before the last step. A window
    per sample would compare members that explored at different noise levels. Equal arguments give
    equal starts on every machine. Raises InputError as `window_length` does.
    """
    places = window_places(num_steps, window_size, timestep_fraction)
    digest = hashlib.sha256(f"window/{seed}/{round_index}/{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % places


def moving_start(round_index: int, num_steps: int, exploration: Exploration) -> int:
    """The first step of a progressive window in a round: `min(k window_stride, last)`.

    k counts the `window_interval` rounds that are over, and begins again after the last place: the
    window is always whole and ends before the last step. Raises InputError as `window_length` does.
    Source: MixGRPO (arXiv 2507.21802), with `roll_back` as in its released script.
    """
    stops = moving_stops(num_steps, exploration)
    return stops[round_index // exploration.window_interval % len(stops)]


def moving_stops(num_steps: int, exploration: Exploration) -> list[int]:
    """Return the first steps of a progressive window, in the order in which it takes them."""
    last = window_places(num_steps, exploration.window_size, exploration.timestep_fraction) - 1
    return [*range(0, last, exploration.window_stride), last]


def windows_of(
    case_ids: list[str], seed: int, *, round_index: int, num_steps: int, exploration: Exploration
) -> list[int]:
    """The window's start for each row: one per case and round."""
    if exploration.window == "progressive":
        return [moving_start(round_index, num_steps, exploration)] * len(case_ids)
    return [
        window_start(
            seed,
            round_index,
            case_id,
            num_steps,
            exploration.window_size,
            exploration.timestep_fraction,
        )
        for case_id in case_ids
    ]


def stochastic_step(
    velocity: Tensor,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    sigma_max: float,
    exploration: Exploration,
    **given: Tensor,
) -> Step:
    """Return `sde_step`, `dance_step` or `cps_step`, as `exploration` says.

    given: `noise` (to sample) or `x_next` (to score).
    """
    if exploration.sampler != "sde":
        step = cps_step if exploration.sampler == "cps" else dance_step
        return step(velocity, x, sigma, sigma_next, noise_level=exploration.noise_level, **given)
    return sde_step(
        velocity,
        x,
        sigma,
        sigma_next,
        noise_level=exploration.noise_level,
        sigma_max=sigma_max,
        **given,
    )
