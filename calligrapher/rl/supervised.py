"""The objective of the warm-up: flow matching on given pictures."""

import torch

from calligrapher.model.policy import Policy
from calligrapher.rl.algorithm import Losses
from calligrapher.rl.rows import TrainRows, noised


def supervised(
    policy: Policy, rows: TrainRows, generator: torch.Generator, style_dropout: float
) -> Losses:
    """Flow matching on the rows' x0: `mean((v - (noise - x0))^2)` at logit-normal sigmas."""
    sigma = torch.sigmoid(torch.randn(len(rows), generator=generator)).to(rows.x0.device)
    styled = (torch.rand(len(rows), generator=generator) >= style_dropout).to(rows.x0)
    noise = torch.randn(rows.x0.shape, generator=generator).to(rows.x0.device)
    velocity = policy.velocity(noised(rows.x0, sigma, noise), sigma, rows.conditioning, styled)
    loss = ((velocity - (noise - rows.x0)) ** 2).mean()
    yield loss, {"loss": loss.detach()}
