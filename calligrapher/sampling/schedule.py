"""Noise levels: sigma in [0, 1], `x = (1 - sigma) * x0 + sigma * noise`.

The schedule is FLUX's: linear from 1 to 1/N, shifted towards noise for longer sequences, then 0.
"""

import math

import torch
from torch import Tensor


def time_shift_mu(num_tokens: int) -> float:
    """FLUX's shift exponent, linear in the number of image tokens: 256 -> 0.5, 4096 -> 1.15."""
    return 0.5 + (num_tokens - 256) * (1.15 - 0.5) / (4096 - 256)


def sigma_schedule(num_steps: int, num_tokens: int) -> Tensor:
    """Sigmas [num_steps + 1] in float32, descending from 1 to 0.

    Source: `FlowMatchEulerDiscreteScheduler` with dynamic (exponential) shifting.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1. Got {num_steps}.")
    shift = math.exp(time_shift_mu(num_tokens))
    linear = torch.linspace(1.0, 1.0 / num_steps, num_steps, dtype=torch.float64)
    shifted = shift / (shift + (1.0 / linear - 1.0))
    return torch.cat([shifted, torch.zeros(1, dtype=torch.float64)]).float()


def trained_steps(num_steps: int, timestep_fraction: float) -> int:
    """How many of the schedule's first (noisiest) steps are trained: at least one."""
    return max(1, min(num_steps, round(num_steps * timestep_fraction)))
