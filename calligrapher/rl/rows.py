"""What one batch of rows is trained towards: supervised flow matching, DiffusionNFT, or GRPO.

Each objective is a generator of (loss, metrics): the caller runs `backward` on a loss before it
asks for the next one, so that one forward's activations are in memory at a time. The losses of a
batch add up to its mean loss.

Legend: B rows, L image tokens, D packed channels, K noise levels, W window steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calligrapher.model.policy import Conditioning, Policy, Weights
from calligrapher.rl.grpo import GRPOParams, grpo_loss
from calligrapher.rl.nft import NFTParams, nft_loss, train_sigmas
from calligrapher.sampling.sampler import Window, stochastic_step
from calligrapher.sampling.schedule import sigma_schedule

Losses = Iterator[tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Rows:
    """Training rows: what was sampled, what it was conditioned on, and how good it was."""

    x0: Tensor  # [B, L, D]
    conditioning: Conditioning
    advantages: Tensor  # [B]; zeros in the warm-up
    window: Window | None = None  # GRPO only
    groups: Tensor | None = None  # [B], equal within a group; for NFT's shared noise

    def __len__(self) -> int:
        return len(self.x0)

    def pick(self, index: list[int]) -> "Rows":
        w = self.window
        window = (
            Window(w.trajectory[index], w.log_prob[index], w.mean[index], w.sigmas[index])
            if w
            else None
        )
        groups = self.groups[index] if self.groups is not None else None
        return Rows(
            self.x0[index], self.conditioning.rows(index), self.advantages[index], window, groups
        )


def noised(
    x0: Tensor, sigma: Tensor, generator: torch.Generator, draw: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fresh noise, and `x = (1 - sigma) x0 + sigma noise`; x0 [B, L, D], sigma [B] -> (x, noise).

    `draw` [B] numbers the rows' noises from 0: rows with one number share one noise.
    """
    count = len(x0) if draw is None else int(draw.max()) + 1
    noise = torch.randn(count, *x0.shape[1:], generator=generator)
    noise = (noise if draw is None else noise[draw.cpu()]).to(x0.device)
    return torch.lerp(x0, noise, sigma[:, None, None]), noise


def supervised(
    policy: Policy, rows: Rows, generator: torch.Generator, style_dropout: float
) -> Losses:
    """Flow matching on the rows' x0: `mean((v - (noise - x0))^2)` at logit-normal sigmas."""
    sigma = torch.sigmoid(torch.randn(len(rows), generator=generator)).to(rows.x0.device)
    styled = (torch.rand(len(rows), generator=generator) >= style_dropout).to(rows.x0)
    x, noise = noised(rows.x0, sigma, generator)
    velocity = policy.velocity(x, sigma, rows.conditioning, styled)
    loss = ((velocity - (noise - rows.x0)) ** 2).mean()
    yield loss, {"loss": loss.detach()}


def nft(
    policy: Policy,
    rows: Rows,
    generator: torch.Generator,
    params: NFTParams,
    num_steps: int,
    old: Weights,
    reference: Weights | None,
) -> Losses:
    """DiffusionNFT on `num_train_sigmas` noise levels with fresh noise, per row or group
    (`params.noise`).

    The old policy's forward is also the reference's where both are the same weights; with `kl_coef`
    0 the reference is not run at all, and may be None.
    """
    schedule = sigma_schedule(num_steps, rows.x0.shape[1])
    draw = torch.arange(len(rows))
    if params.noise == "group":
        draw = rows.groups.unique(return_inverse=True)[1].cpu()
    sigmas_KB = train_sigmas(schedule, int(draw.max()) + 1, params, generator)[:, draw].to(
        rows.x0.device
    )
    for sigma in sigmas_KB:
        x, _ = noised(rows.x0, sigma, generator, draw)
        with policy.use(old):
            velocity_old = velocity_ref = policy.velocity(x, sigma, rows.conditioning)
        if params.kl_coef == 0:
            velocity_ref = None
        elif reference is not old:
            with policy.use(reference):
                velocity_ref = policy.velocity(x, sigma, rows.conditioning)
        velocity = policy.velocity(x, sigma, rows.conditioning)
        loss, metrics = nft_loss(
            velocity, velocity_old, velocity_ref, rows.x0, x, sigma, rows.advantages, params
        )
        yield loss / len(sigmas_KB), metrics | {"loss": loss.detach()}


def grpo(
    policy: Policy,
    rows: Rows,
    generator: torch.Generator,
    params: GRPOParams,
    num_steps: int,
    reference: Weights | None,
) -> Losses:
    """Flow-GRPO on every step of the rows' windows. `generator` is not used: the noise was the
    rollout's."""
    window = rows.window
    sigma_max = sigma_schedule(num_steps, rows.x0.shape[1])[1].item()
    steps = window.log_prob.shape[1]
    for j in range(steps):
        x, x_next = window.trajectory[:, j], window.trajectory[:, j + 1]
        sigma, sigma_next = window.sigmas[:, j], window.sigmas[:, j + 1]
        mean_ref = None
        if params.kl_coef > 0:
            with policy.use(reference):
                velocity = policy.velocity(x, sigma, rows.conditioning)
                _, mean_ref, _ = _score(velocity, x, x_next, sigma, sigma_next, sigma_max, params)
        velocity = policy.velocity(x, sigma, rows.conditioning)
        log_prob, mean, std = _score(velocity, x, x_next, sigma, sigma_next, sigma_max, params)
        loss, metrics = grpo_loss(
            log_prob,
            window.log_prob[:, j],
            rows.advantages,
            params,
            mean=mean,
            mean_ref=mean_ref,
            mean_old=window.mean[:, j],
            std=std,
            dt=sigma_next - sigma,
        )
        yield loss / steps, metrics | {"loss": loss.detach()}


def _score(
    velocity: Tensor,
    x: Tensor,
    x_next: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_max: float,
    params: GRPOParams,
) -> tuple[Tensor, Tensor, Tensor]:
    """log_prob [B], mean [B, L, D] and std [B] of landing on `x_next`; rows may differ in noise
    level."""
    log_prob, mean, std = (
        velocity.new_empty(len(x)),
        torch.empty_like(velocity),
        velocity.new_empty(len(x)),
    )
    for level in sigma.unique():
        index = (sigma == level).nonzero()[:, 0]
        step = stochastic_step(
            velocity[index],
            x[index],
            level.item(),
            sigma_next[index[0]].item(),
            sigma_max,
            params,
            x_next=x_next[index],
        )
        log_prob = log_prob.index_copy(0, index, step.log_prob)
        mean = mean.index_copy(0, index, step.mean)
        std = std.index_fill(0, index, step.std.item())
    return log_prob, mean, std
