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
from calligrapher.sampling.calls import abreast, from_trunks
from calligrapher.sampling.exploration import Exploration, Window, stochastic_step, window_length
from calligrapher.sampling.schedule import sigma_schedule
from calligrapher.sampling.step import Solver, Step, dpm2_step, ode_step


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
    keep_window: bool = True,
    solver: Solver = "euler",
    shared_trunk: bool = False,
) -> SampledBatch:
    """Sample one image per row with one transformer call per step.

    conditioning: B rows; seeds: B. The noise a row starts from is drawn from `starts_from[b]` where
    that is given, so rows may share it. With `exploration`, row b takes stochastic steps from
    `window_starts[b]` on, without that from the first; its other steps are ODE steps, as all are
    without. `keep_window` False forgets them, for images that are only looked at. Noise is drawn on
    the CPU, so results do not depend on the device's generator. The solver `dpm2` is for paths
    without stochastic steps: it goes on from where the step before saw the image, which noise would
    move. With `shared_trunk`, rows with one seed in `starts_from`, which must then be of one case,
    are one up to what they explore: fewer rows a call, see `from_trunks`.
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
    window_starts = window_starts or [0] * len(seeds)
    everyone = list(range(len(seeds)))
    calls = abreast(len(seeds), num_steps)
    if shared_trunk:
        calls = from_trunks(starts_from, window_starts, width, num_steps)
    record = _Record(len(seeds))
    before = None  # of dpm2: where the step before saw the image, and at which noise level
    for call in calls:
        heads = [rows[0] for rows, _ in call]
        seen = conditioning if heads == everyone else conditioning.rows(heads)
        velocities = policy.velocity(x[heads], x.new_tensor([sigmas[i] for _, i in call]), seen)
        x_next = x.clone()
        for i in dict.fromkeys(i for _, i in call):
            at = [k for k, (_, step) in enumerate(call) if step == i]
            rows = [heads[k] for k in at]
            velocity = velocities[at]
            if solver == "dpm2":
                moved, x0_hat = dpm2_step(
                    velocity, x[rows], sigmas[i], sigmas[i + 1], before=before
                )
                before = x0_hat, sigmas[i]
            else:
                moved = ode_step(velocity, x[rows], sigmas[i], sigmas[i + 1])
            for j, k in enumerate(at):
                x_next[call[k][0]] = moved[j]
            inside = [
                (j, b)
                for j, k in enumerate(at)
                if width and 0 <= i - window_starts[rows[j]] < width
                for b in call[k][0]
            ]
            if inside:
                # One call of the transformer serves both kinds of rows. Those inside take their
                # step from the same velocity; it replaces the ODE step that all rows took.
                seen_by, own = map(list, zip(*inside, strict=True))
                step = stochastic_step(
                    velocity[seen_by],
                    x[own],
                    sigmas[i],
                    sigmas[i + 1],
                    sigmas[1],
                    exploration,
                    # Of the row's own stream: the other rows inside do not change it.
                    noise=noise(streams[b] for b in own),
                )
                x_next[own] = step.x_next
                if keep_window:
                    record.add(own, x, step, sigmas[i], sigmas[i + 1])
        x = x_next
    return SampledBatch(x, record.window() if exploration and keep_window else None)


class _Record:
    """The windows of B rows as they come: they start at different steps."""

    def __init__(self, rows: int):
        # A list per row.
        self.trajectory, self.means, self.log_probs, self.sigmas = (
            [[] for _ in range(rows)] for _ in range(4)
        )

    def add(self, rows: list[int], x: Tensor, step: Step, sigma: float, sigma_next: float) -> None:
        """Add a step that `rows` of x [B, L, D] took; its tensors have a row for each of them."""
        for j, b in enumerate(rows):
            if not self.trajectory[b]:  # W steps have W + 1 ends
                self.trajectory[b].append(x[b])
                self.sigmas[b].append(sigma)
            self.trajectory[b].append(step.x_next[j])
            self.sigmas[b].append(sigma_next)
            self.means[b].append(step.mean[j])
            self.log_probs[b].append(step.log_prob[j])

    def window(self) -> Window:
        """Stack the rows: each window ends before the last step, so each row has all W steps."""
        trajectory, log_prob, mean = (
            torch.stack([torch.stack(row) for row in rows])
            for rows in (self.trajectory, self.log_probs, self.means)
        )
        return Window(trajectory, log_prob, mean, torch.tensor(self.sigmas))
