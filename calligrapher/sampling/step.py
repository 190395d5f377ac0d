"""One step of the sampler from `sigma` to `sigma_next`: without noise (ODE, DPM-Solver++) or with
(SDE, Dance-SDE, CPS).

Everything is computed in float32 whatever the precision of the model. Rollout and update call one
function, once with `noise` and once with the stored `x_next`; equal inputs give bit-equal `mean`
and `log_prob`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calligrapher.errors import InputError

Solver = Literal["euler", "dpm2"]


@dataclass(frozen=True)
class Step:
    """What a stochastic step gave.

    `mean` and `log_prob` carry the gradient of `velocity`, `x_next` none.
    """

    x_next: Tensor  # [B, ...] float32, detached
    mean: Tensor  # [B, ...] float32
    std: Tensor  # [] float32, the standard deviation of x_next around mean
    log_prob: Tensor  # [B] float32, the mean over the non-batch dims


def ode_step(
    velocity: Tensor, x: Tensor, sigma: float | Tensor, sigma_next: float | Tensor
) -> Tensor:
    """Euler's step `x + (sigma_next - sigma) * velocity`; [B, ...] -> [B, ...] in float32."""
    return x.float() + (float(sigma_next) - float(sigma)) * velocity.float()


def dpm2_step(
    velocity: Tensor,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    *,
    before: tuple[Tensor, float] | None,
) -> tuple[Tensor, Tensor]:
    """One step of DPM-Solver++(2M): (x_next, x0_hat), both [B, ...] float32.

    velocity, x: [B, ...]; 0 <= sigma_next < sigma <= 1. before: x0_hat and sigma of the step
    before; None in the first one. With `lambda = ln((1 - sigma) / sigma)` it goes on in a straight
    line: `D = x0_hat + (x0_hat - x0_before) h / (2 h_before)`, h the length of a step in lambda,
    and `x_next = (sigma_next / sigma) x + (1 - sigma_next / sigma) D`. Where a length is infinite,
    at sigma 1 and 0, D is x0_hat, and the step Euler's. Source: arXiv 2211.01095, as in diffusers'
    `DPMSolverMultistepScheduler` with flow sigmas.
    """
    x = x.float()
    x0_hat = target = x - sigma * velocity.float()
    if before is not None and before[1] < 1.0 and sigma_next > 0.0:
        x0_before, sigma_before = before
        lambdas = [math.log1p(-s) - math.log(s) for s in (sigma_before, sigma, sigma_next)]
        reach = (lambdas[2] - lambdas[1]) / (2.0 * (lambdas[1] - lambdas[0]))
        target = x0_hat + reach * (x0_hat - x0_before)
    share = sigma_next / sigma
    return share * x + (1.0 - share) * target, x0_hat


def sde_step(
    velocity: Tensor,
    x: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    noise_level: float,
    sigma_max: float | Tensor,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
) -> Step:
    """One reverse-SDE step of Flow-GRPO; `std` is the effective `S = std_dev * sqrt(-dt)`.

    velocity, x: [B, ...]; sigma, sigma_next: 0 <= sigma_next < sigma <= 1. `sigma_max` is the
    schedule's second sigma; it replaces sigma == 1, where the noise would be infinite. Give `noise`
    to sample, `x_next` to score. Raises InputError for sigmas out of order, a noise level of 0, or
    both or neither of noise and x_next. Source: Flow-GRPO, `sde_step_with_logprob` (arXiv
    2505.05470).
    """
    sigma, sigma_next = _checked(sigma, sigma_next, noise_level)
    s = float(sigma_max) if sigma >= 1.0 - 1e-6 else sigma
    if not 0.0 < s < 1.0:
        raise InputError(
            f"sigma_max must lie between 0 and 1. Got {s}. Give the second sigma of the schedule; "
            "a schedule of one step has none, so use the ODE or the CPS step there."
        )
    velocity, x = velocity.float(), x.float()
    dt = sigma_next - sigma
    std_dev = math.sqrt(sigma / (1.0 - s)) * noise_level
    drift = std_dev**2 / (2.0 * sigma)
    mean = x * (1.0 + drift * dt) + velocity * ((1.0 + drift * (1.0 - sigma)) * dt)
    return _normal_step(mean, std_dev * math.sqrt(-dt), noise, x_next)


def dance_step(
    velocity: Tensor,
    x: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    noise_level: float,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
) -> Step:
    """One reverse-SDE step of DanceGRPO, with the same noise per time at every sigma.

    `std = noise_level sqrt(-dt)` and `mean = x + (v - noise_level^2 score / 2) dt` with
    `score = -(x - (1 - sigma) x0_hat) / sigma^2`; finite at sigma 1. Shapes and errors as in
    `sde_step`. Source: DanceGRPO (arXiv 2505.07818), `flux_step`.
    """
    sigma, sigma_next = _checked(sigma, sigma_next, noise_level)
    velocity, x = velocity.float(), x.float()
    dt = sigma_next - sigma
    x0_hat = x - sigma * velocity
    drift = (0.5 * noise_level**2 / sigma**2) * (x - (1.0 - sigma) * x0_hat)
    mean = x + (velocity + drift) * dt
    return _normal_step(mean, noise_level * math.sqrt(-dt), noise, x_next)


def cps_step(
    velocity: Tensor,
    x: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    noise_level: float,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
) -> Step:
    """One coefficient-preserving step: the total noise in `x_next` is exactly `sigma_next`.

    `std = sigma_next * sin(noise_level * pi / 2)`, so 0 < noise_level <= 1; the log-probability is
    `-(x_next - mean)^2`, without variance and constants. Shapes and errors as in `sde_step`.
    Source: Flow-CPS (arXiv 2509.05952), as in Flow-GRPO's code.
    """
    sigma, sigma_next = _checked(sigma, sigma_next, noise_level)
    if noise_level > 1.0:
        raise InputError(f"noise_level must be at most 1 for the CPS step. Got {noise_level}.")
    velocity, x = velocity.float(), x.float()
    std = sigma_next * math.sin(noise_level * math.pi / 2.0)
    x0_hat = x - sigma * velocity
    x1_hat = x + (1.0 - sigma) * velocity
    mean = x0_hat * (1.0 - sigma_next) + x1_hat * math.sqrt(max(sigma_next**2 - std**2, 0.0))
    x_next = _landing(mean, std, noise, x_next)
    log_prob = -((x_next - mean) ** 2)
    return Step(x_next, mean, mean.new_tensor(std), log_prob.flatten(1).mean(1))


def _checked(
    sigma: float | Tensor, sigma_next: float | Tensor, noise_level: float
) -> tuple[float, float]:
    sigma, sigma_next = float(sigma), float(sigma_next)
    if not 0.0 <= sigma_next < sigma <= 1.0 + 1e-6:
        raise InputError(
            f"a step must go down: 0 <= sigma_next < sigma <= 1. Got {sigma=}, {sigma_next=}."
        )
    if not noise_level > 0.0:
        raise InputError(
            f"noise_level must be above 0 for a stochastic step. Got {noise_level}. Without noise"
            " there is neither exploration nor gradient; use ode_step for a deterministic step."
        )
    return min(sigma, 1.0), sigma_next


def _normal_step(mean: Tensor, std: float, noise: Tensor | None, x_next: Tensor | None) -> Step:
    x_next = _landing(mean, std, noise, x_next)
    log_prob = (
        -((x_next - mean) ** 2) / (2.0 * std**2) - math.log(std) - 0.5 * math.log(2.0 * math.pi)
    )
    return Step(x_next, mean, mean.new_tensor(std), log_prob.flatten(1).mean(1))


def _landing(mean: Tensor, std: float, noise: Tensor | None, x_next: Tensor | None) -> Tensor:
    """Return where the step lands, without gradient.

    A gradient through x_next would cancel that of log_prob.
    """
    if (noise is None) == (x_next is None):
        found = "neither" if noise is None else "both"
        raise InputError(
            f"give exactly one of noise (to sample) and x_next (to score). Got {found}."
        )
    given = noise if noise is not None else x_next
    if given.shape != mean.shape:
        raise InputError(
            f"noise or x_next must be shaped like x, {tuple(mean.shape)}. Got {tuple(given.shape)}."
        )
    with torch.no_grad():
        return (mean + std * noise.float() if noise is not None else x_next.float()).detach()
