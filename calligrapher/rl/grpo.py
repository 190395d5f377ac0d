"""Flow-GRPO: the clipped policy-gradient loss on a rollout's stochastic steps, and which steps
those are.

Legend: B rows. Optional GRPO-Guard ratio. The steps themselves are `calligrapher.sampling.step`'s.
"""

import hashlib
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from calligrapher.errors import InputError
from calligrapher.sampling.schedule import trained_steps


class GRPOParams(BaseModel):
    """The settings of Flow-GRPO. The learning rate, batch sizes and passes belong to the update
    stage."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    clip_range: float = Field(
        0.2,
        gt=0,
        lt=1,
        description=(
            "The ratio is clipped to 1 +- this. Ratios here live within about 1 +- 1e-4, so 0.2"
            " never clips; 1e-5 to 1e-3 does (2e-6 to 4e-6 with guard). See clip_fraction and"
            " ratio_max_dev."
        ),
    )
    kl_coef: float = Field(
        0.1,
        ge=0,
        description="Weight of the KL to the frozen reference. 0 saves the reference's forward.",
    )
    adv_clip_max: float = Field(5.0, gt=0, description="Advantages are clipped to +- this.")
    noise_level: float = Field(
        0.7,
        gt=0,
        description=(
            "How much noise a stochastic step adds: exploration. At most 1 with the cps sampler."
        ),
    )
    sampler: Literal["sde", "cps"] = Field(
        "sde",
        description=(
            "The stochastic step: Flow-GRPO's SDE, or the coefficient-preserving one, whose images "
            "stay clean at high noise levels."
        ),
    )
    window_size: int | None = Field(
        2,
        ge=1,
        description=(
            "Stochastic, trained steps per image, in one window drawn per group; the others are"
            " deterministic. null = every step that timestep_fraction leaves, the last one always"
            " excepted."
        ),
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
            " Needs the sde sampler and a far smaller clip_range."
        ),
    )
    timestep_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the schedule, from its noisy end, in which the window may lie.",
    )

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


def window_length(num_steps: int, window_size: int | None, timestep_fraction: float) -> int:
    """How many steps the window has. Raises InputError when it does not fit before the last
    step."""
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


def window_start(
    seed: int,
    round: int,
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
    length = window_length(num_steps, window_size, timestep_fraction)
    starts = min(trained_steps(num_steps, timestep_fraction), num_steps - 1) - length + 1
    digest = hashlib.sha256(f"window/{seed}/{round}/{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % starts


def grpo_loss(
    log_prob: Tensor,  # [B] of the trained policy, with gradient
    old_log_prob: Tensor,  # [B] from the rollout
    advantages: Tensor,  # [B]
    params: GRPOParams,
    *,
    mean: Tensor | None = None,  # [B, ...] the trained policy's step mean, with gradient
    mean_ref: Tensor | None = None,  # [B, ...] the reference's
    mean_old: Tensor | None = None,  # [B, ...] the rollout's
    std: (
        float | Tensor | None
    ) = None,  # [] or [B], Step.std (that is S, the square root of -dt included)
    dt: float | Tensor | None = None,  # [] or [B], sigma_next - sigma (negative)
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy + kl_coef * kl`, a scalar with gradient, and detached 0-d metrics, for the rows of
    one step.

    `kl_coef > 0` needs mean, mean_ref, std (and dt with the sde sampler); `guard` needs mean,
    mean_old, std and dt. Metrics: policy_loss, clip_fraction (rows whose ratio lies outside the
    clip range), approx_kl = mean((log_prob - old_log_prob)^2) / 2, ratio_mean, ratio_max_dev = max
    |ratio - 1|, kl (when computed). Before the first optimizer step of a round ratio == 1 and
    approx_kl == 0, exactly on the CPU. Raises InputError for missing or wrongly shaped inputs.
    Source: Flow-GRPO (arXiv 2505.05470), `train_flux.py`; GRPO-Guard (arXiv 2510.22319).
    """
    if not log_prob.ndim == 1 or not log_prob.shape == old_log_prob.shape == advantages.shape:
        raise InputError(
            "log_prob, old_log_prob and advantages must all be [B]. "
            f"Got {tuple(log_prob.shape)}, {tuple(old_log_prob.shape)}, {tuple(advantages.shape)}."
        )
    log_prob = log_prob.float()
    log_ratio = log_prob - old_log_prob.detach().float()
    advantages = advantages.detach().float().clamp(-params.adv_clip_max, params.adv_clip_max)

    exponent, weight = log_ratio, 1.0
    if params.guard:
        _need("guard", mean=mean, mean_old=mean_old, std=std, dt=dt)
        std_B, dt_B = _per_row(std, log_prob), _per_row(dt, log_prob)
        exponent = (log_ratio + _distance(mean, mean_old) / (2.0 * std_B**2)) * std_B
        weight = 1.0 / -dt_B
    ratio = exponent.exp()
    clipped = ratio.clamp(1.0 - params.clip_range, 1.0 + params.clip_range)
    policy = loss = (torch.maximum(-advantages * ratio, -advantages * clipped) * weight).mean()
    deviation = (ratio - 1.0).abs()
    metrics = {
        "policy_loss": policy,
        "clip_fraction": (deviation > params.clip_range).float().mean(),
        "approx_kl": 0.5 * (log_ratio**2).mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max_dev": deviation.max(),
    }
    if params.kl_coef > 0 or mean_ref is not None:
        metrics["kl"] = _reference_kl(log_prob, params, mean, mean_ref, std, dt)
    if params.kl_coef > 0:
        loss = policy + params.kl_coef * metrics["kl"]
    return loss, {name: value.detach() for name, value in metrics.items()}


def _reference_kl(log_prob: Tensor, params: GRPOParams, mean, mean_ref, std, dt) -> Tensor:
    """`mean((mu - mu_ref)^2) / (2 std_dev^2)`: std_dev is `S / sqrt(-dt)` for the SDE and `S` for
    CPS."""
    _need("kl_coef > 0", mean=mean, mean_ref=mean_ref, std=std)
    variance = _per_row(std, log_prob) ** 2
    if params.sampler == "sde":
        _need("the KL of the sde sampler", dt=dt)
        variance = variance / -_per_row(dt, log_prob)
    return (_distance(mean, mean_ref) / (2.0 * variance)).mean()


def _distance(mean: Tensor, other: Tensor) -> Tensor:
    """[B, ...] -> [B]: the mean squared distance of each row; `other` carries no gradient."""
    return ((mean.float() - other.detach().float()) ** 2).flatten(1).mean(1)


def _per_row(value: float | Tensor, like: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float32, device=like.device).detach()
    if value.ndim > 0 and value.shape != like.shape:
        raise InputError(
            f"std and dt must be scalars or {tuple(like.shape)}. Got {tuple(value.shape)}."
        )
    return value.expand_as(like)


def _need(reason: str, **inputs: object) -> None:
    missing = [name for name, value in inputs.items() if value is None]
    if missing:
        raise InputError(f"{reason} needs {', '.join(inputs)}. Missing: {', '.join(missing)}.")
