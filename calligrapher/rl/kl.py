"""The KL that holds the trained policy to the start of RL, and its weight, constant or adaptive."""

from typing import Self

from pydantic import Field, model_validator

from calligrapher.params import Section

RATE, LARGEST_ERROR = 0.1, 0.2  # K_beta, and the clip of the proportional error


class KLToReference(Section):
    """The weight of the KL in the loss. Base of an algorithm's section that has such a KL."""

    kl_coef: float
    kl_target: float | None = Field(
        None,
        gt=0,
        description=(
            "KL that kl_coef steers for: after each round it is multiplied by 1 + 0.1 times the"
            " relative error of that round's mean KL, clipped to +- 0.2; kl_coef is where it"
            " starts. null = kl_coef stays as it is."
        ),
    )

    @model_validator(mode="after")
    def _target_needs_a_weight(self) -> Self:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                "kl_coef must be greater than 0 with a kl_target: it is where the weight starts,"
                " and is multiplied. Got 0."
            )
        return self

    def kl_coef_of_round(self, before: float | None, kl: float | None) -> float | None:
        if self.kl_target is None:
            return None
        if before is None:
            return self.kl_coef
        return before if kl is None else adapted(before, kl, self.kl_target)


def adapted(kl_coef: float, kl: float, target: float) -> float:
    """Return the weight after a round whose KL was `kl`: `kl_coef (1 + 0.1 error)`.

    `error = clip(kl / target - 1, -0.2, 0.2)`, so a round changes it by 2 % at most. Source:
    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.
    """
    error = min(max(kl / target - 1.0, -LARGEST_ERROR), LARGEST_ERROR)
    return kl_coef * (1.0 + RATE * error)
