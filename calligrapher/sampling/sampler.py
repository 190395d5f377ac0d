"""Samples images with a policy: the ODE, for GRPO with a window of stochastic steps.

Legend: B rows, L image tokens, D packed channels, S sampling steps, W window steps. Every row has a
random stream of its own, derived from (run seed, round, case, member), so that what is sampled does
not depend on batches, shards or workers.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from calligrapher.model.policy import Conditioning, Policy
from calligrapher.sampling.exploration import Exploration, Window, stochastic_step, window_length
from calligrapher.sampling.schedule import sigma_schedule
from calligrapher.sampling.step import Solver, dpm2_step, ode_step


@dataclass(frozen=True)
class SampledBatch:
    """Clean latents of B rows and, for GRPO, their windows."""

    x0: Tensor  # [B, L, D] float32
    window: Window | None


def sample_seed(seed: int, round_index: int, case_id: str, member: int | str) -> int:
    """The seed of one image's random stream, or of what a group's images share (member `all`)."""
    digest = hashlib.sha256(f"image/{seed}/{round_index}/{case_id}/{member}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def sample(
    policy: Policy,
    conditioning: Conditioning,
    seeds: list[int],
    num_steps: int,
    *,
    starts_from: list[int] | None = None,
    window_starts: list[int] | None = None,
    exploration: Exploration | None = None,
    solver: Solver = "euler",
) -> SampledBatch:
    """Sample one image per row with one transformer call per step.

    conditioning: B rows; seeds: B. The noise a row starts from is drawn from `starts_from[b]` where
    that is given, so rows may share it. With `exploration`, row b takes stochastic steps from
    `window_starts[b]` on; its other steps are ODE steps, as all are without. Noise is drawn on the
    CPU, so results do not depend on the device's generator. The solver `dpm2` is for paths without
    stochastic steps: it goes on from where the step before saw the image, which noise would move.
    """
    assert solver == "euler" or exploration is None
    length = conditioning.masked.shape[1]
    channels = policy.model.transformer.out_channels
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise(generators: Iterable[torch.Generator]) -> Tensor:
        drawn = [torch.randn(length, channels, generator=generator) for generator in generators]
        return torch.stack(drawn).to(conditioning.masked.device)

    sigmas = sigma_schedule(num_steps, length).tolist()
    x = noise(
        [torch.Generator().manual_seed(seed) for seed in starts_from] if starts_from else streams
    )
    width = (
        window_length(num_steps, exploration.window_size, exploration.timestep_fraction)
        if exploration
        else 0
    )
    # Lists per row: windows start at different steps, so at one step some rows are in theirs.
    trajectory, means, log_probs, window_sigmas = ([[] for _ in seeds] for _ in range(4))
    before = None  # of dpm2: where the step before saw the image, and at which noise level
    for i in range(num_steps):
        velocity = policy.velocity(x, x.new_full((len(x),), sigmas[i]), conditioning)
        if solver == "dpm2":
            x_next, x0_hat = dpm2_step(velocity, x, sigmas[i], sigmas[i + 1], before=before)
            before = x0_hat, sigmas[i]
        else:
            x_next = ode_step(velocity, x, sigmas[i], sigmas[i + 1])
        if exploration is not None:
            inside = [b for b, start in enumerate(window_starts) if start <= i < start + width]
            if inside:
                # One call of the transformer serves both kinds of rows. Those inside take their
                # step from the same velocity; it replaces the ODE step that all rows took.
                rows = torch.tensor(inside, device=x.device)
                step = stochastic_step(
                    velocity[rows],
                    x[rows],
                    sigmas[i],
                    sigmas[i + 1],
                    sigmas[1],
                    exploration,
                    # Of the row's own stream: the other rows inside do not change it.
                    noise=noise(streams[b] for b in inside),
                )
                x_next[rows] = step.x_next
                for j, b in enumerate(inside):
                    if not trajectory[b]:  # W steps have W + 1 ends
                        trajectory[b].append(x[b])
                        window_sigmas[b].append(sigmas[i])
                    trajectory[b].append(step.x_next[j])
                    window_sigmas[b].append(sigmas[i + 1])
                    means[b].append(step.mean[j])
                    log_probs[b].append(step.log_prob[j])
        x = x_next
    if exploration is None:
        return SampledBatch(x, None)
    # The rows stack: each window ends before the last step, so each row has all W of its steps.
    return SampledBatch(
        x,
        Window(
            trajectory=torch.stack([torch.stack(row) for row in trajectory]),
            log_prob=torch.stack([torch.stack(row) for row in log_probs]),
            mean=torch.stack([torch.stack(row) for row in means]),
            sigmas=torch.tensor(window_sigmas),
        ),
    )
