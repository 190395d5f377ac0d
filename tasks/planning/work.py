"""How often the transformer runs, and what is written, from params and configs alone."""

import math
from dataclasses import dataclass

from calligrapher.sampling.exploration import moving_stops, window_places
from tasks.artifacts.layout import EVALUATE
from tasks.params.run_params import RunParams
from tasks.pipeline import evaluated, planned, stage_of
from tasks.planning.batches import groups_in, rows_of_a_policy, update_batches
from tasks.planning.memory import copies, meta_model, optimizer_bytes, row_bytes, t5_moved

PNG_BYTES = 3  # of a pixel, at most but for the file's frame: noise does not compress


@dataclass(frozen=True)
class Forwards:
    """Calls of the transformer for one image: in its rollout, and in one pass of the update."""

    rollout: float  # whole, unless the images of a group share their trunk: then in the mean
    # each with a backward, which runs the blocks once more under gradient checkpointing; in the
    # mean where the background has rows of its own
    trained: float
    old: float
    reference: float


@dataclass(frozen=True)
class Files:
    """Bytes on the disk, and in the CPU's memory."""

    conditioning: int  # of one case, in the cache
    rollout: int  # Parquet of one round, at most
    checkpoint: int  # weights and optimizer of a round that keeps them
    cpu_memory: int  # EMA and its update, or old and trained in the refresh; an offloaded T5


def forwards(params: RunParams) -> Forwards:
    """Return the calls of the transformer for one image, from round 1 on.

    In the first round of NFT `old` is the reference and needs no forward of its own.
    """
    steps = params.rollout.num_inference_steps
    images, batches = params.images_per_round, update_batches(params)
    each = sum(rows_of_a_policy(params, batch) for batch in batches) / images
    needed = copies(params)
    rollout: float = steps
    if params.rollout.shared_trunk:
        rollout = sum(shard.rows for shard in sampling(params)) / images
    held = sum(params.rl.background_rows_of(len(batch)) for batch in batches)
    return Forwards(rollout, each + held / images, each * needed["old"], each * needed["reference"])


@dataclass(frozen=True)
class Sampling:
    """Work of one shard's rollout: calls of the transformer, and the rows of all of them.

    With `rollout.shared_trunk` both are means over where windows may lie.
    """

    calls: float
    rows: float


def sampling(params: RunParams) -> list[Sampling]:
    """Return the work of each shard of a round's rollout.

    A trunk saves, in each batch, all members of a group but one the steps before the window, and
    the window's first: its start, uniform on 0 .. n - 1, is (n - 1) / 2 in the mean. The windows of
    a batch's k groups lie `(n - 1) - 2 sum (t / n)^k` steps apart, t from 1 to n - 1, and each such
    step is a call more. Progressive windows are all in one place: n is 1, and the start the mean of
    a whole cycle.
    """
    r, explores = params.rollout, params.rl.exploration
    steps = r.num_inference_steps
    places, start, saved = 1, 0.0, 0.0
    if r.shared_trunk and explores.window == "progressive":
        stops = moving_stops(steps, explores)
        start = sum(stops) / len(stops)
    elif r.shared_trunk:
        places = window_places(steps, explores.window_size, explores.timestep_fraction)
        start = (places - 1) / 2
    if r.shared_trunk:
        saved = start + 1
    found = []
    for first in range(0, params.images_per_round, r.shard_size):
        end = min(first + r.shard_size, params.images_per_round)
        calls: float = 0
        rows: float = steps * (end - first)
        for at in range(first, end, r.batch_size):
            images = range(at, min(at + r.batch_size, end))
            groups = groups_in(params, images)
            apart = places - 1 - 2 * sum((t / places) ** groups for t in range(1, places))
            calls += steps + apart
            rows -= (len(images) - groups) * saved
        found.append(Sampling(calls, rows))
    return found


def files(params: RunParams) -> Files:
    """What a round leaves on the disk; compression and tables are not counted, they are small."""
    model = meta_model(params)
    m, sizes = params.model, row_bytes(params, model)
    weights = list(model.policy.parameters.values())
    trained = 4 * sum(w.numel() for w in weights)
    ema = trained * params.ema.use_ema
    return Files(
        conditioning=sizes["conditioning"],
        rollout=params.most_images_per_round * (sizes["sampled"] + PNG_BYTES * m.width * m.height),
        checkpoint=2 * trained + ema + optimizer_bytes(weights, params.update.use_8bit_adam),
        cpu_memory=2 * trained + t5_moved(params, model),
    )


def rounds_made(params: RunParams) -> int:
    """Return how many rounds a run has where every optimizer step of a round is taken.

    `update.max_train_steps` may end it before `rounds`.
    """
    return math.ceil(params.total_updates / params.updates_per_round)


def disk(params: RunParams) -> dict[str, int]:
    """Return the bytes that a run writes in the end, by kind; pictures at their largest.

    Weights are those that retention keeps, and those of the round at work.
    """
    sizes, keeps, rounds = files(params), params.retention, rounds_made(params)
    kept = 1 + keeps.keep_last + keeps.keep_best
    kept += rounds // keeps.keep_every if keeps.keep_every else 0
    looks = [name for name in planned(params, rounds) if stage_of(name) == EVALUATE]
    images = sum(math.prod(evaluated(name, params)) for name in looks)
    cases = params.cases_per_round + (params.evaluate.num_cases if params.evaluate.every else 0)
    return {
        "rollouts": rounds * sizes.rollout,
        "weights": min(kept, rounds + 1) * sizes.checkpoint,
        "evaluations": images * PNG_BYTES * params.model.width * params.model.height,
        "encodings": cases * sizes.conditioning,
    }
