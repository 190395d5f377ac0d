"""Stage `rollout`: sample the round's images and write them to Parquet, shard by shard.

Its version stands in `tasks/pipeline.py`, as that of every stage.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from calligrapher.model.loading import pictures
from calligrapher.model.policy import Weights
from calligrapher.sampling.exploration import windows_of
from calligrapher.sampling.sampler import SampledBatch, sample_seed
from calligrapher.tables.parquet import write_shard
from tasks.artifacts.artifact import Artifact
from tasks.resources.resources import Resources
from tasks.stages.refresh import old_weights
from tasks.stages.sampling import (
    Row,
    in_order,
    rows_of,
    sample_batches,
    stacked,
    table_columns,
)
from tasks.stages.score_ahead import ScoreAhead
from tasks.stages.turns import Turn, turns


def rollout(
    resources: Resources, round_index: int, out: Path, *, old: Artifact, ahead: Path
) -> dict[str, Any]:
    """Sample `num_images_per_prompt` images of each of the round's cases under the policy `old`.

    Rows are prompt-major. Shard k is rank k mod N's. Every finished shard, those of an earlier
    attempt included, is scored into the folder `ahead` while the next ones are sampled. Files:
    `shard-0000.parquet`, ... Meta: images, seconds_sampling (of the slowest rank).
    """
    params = resources.params
    rows = rows_of(resources.cases.of_round(round_index), params.rollout.num_images_per_prompt)
    size = params.rollout.shard_size
    shards = [rows[at : at + size] for at in range(0, len(rows), size)]
    paths = [out / f"shard-{number:04d}.parquet" for number in range(len(shards))]
    ranks = resources.ranks
    started = time.monotonic()
    weights = resources.weights(old_weights(old))
    own = [number for number in range(len(shards)) if ranks.owns(number)]
    images = sum(len(shards[number]) for number in own)
    with (
        ScoreAhead(resources, ahead) as scoring,
        resources.progress(f"round {round_index} rollout", total=images, unit="img") as bar,
    ):
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        ranks.barrier()  # all look which shards there are before anybody writes one
        for number in (number for number in own if number not in missing):
            scoring.submit(paths[number])
            bar.advance(len(shards[number]))
        for turn in turns(resources, {n: [row.case for row in shards[n]] for n in missing}):
            _write(
                resources,
                shards[turn.number],
                paths[turn.number],
                turn,
                round_index=round_index,
                weights=weights,
                policy_digest=old.digest,
            )
            if turn.own:
                scoring.submit(paths[turn.number])
                bar.advance(len(shards[turn.number]))
        seconds = time.monotonic() - started  # without waiting for the last scores
    slowest = ranks.combine({"seconds_sampling": seconds}, lambda name: True)
    return {"images": len(rows), **slowest}


def _write(
    resources: Resources,
    rows: list[Row],
    path: Path,
    turn: Turn,
    *,
    round_index: int,
    weights: Weights,
    policy_digest: str,
) -> None:
    params = resources.params
    cases = [row.case for row in rows]
    ids = [case.case_id for case in cases]
    seeds = [sample_seed(params.seed, round_index, row.case.case_id, row.member) for row in rows]
    explores = params.rl.exploration
    windows = starts_from = None
    if explores is not None:
        windows = windows_of(
            ids,
            params.seed,
            round_index=round_index,
            num_steps=params.rollout.num_inference_steps,
            exploration=explores,
        )
        if explores.noise == "group":
            starts_from = [sample_seed(params.seed, round_index, i, "all") for i in ids]
    sampled = sample_batches(
        resources,
        cases,
        seeds=seeds,
        weights=weights,
        num_steps=params.rollout.num_inference_steps,
        window_starts=windows,
        starts_from=starts_from,
        at_least=turn.at_least,
        solver=params.rollout.solver,
    )
    if not turn.own:
        return
    kept: dict[str, Callable[[SampledBatch], Tensor]] = {"x0": lambda s: s.x0}
    if explores is not None:
        kept |= {
            "trajectory": lambda s: s.window.trajectory,
            "log_prob": lambda s: s.window.log_prob,
            "window_sigmas": lambda s: s.window.sigmas,
        }
        if explores.keeps_means:
            kept["mean_old"] = lambda s: s.window.mean
    tensors = {
        name: stacked(in_order((index, of(batch)) for index, batch in sampled))
        for name, of in kept.items()
    }
    canvas = resources.conditioning.canvas
    images = in_order(
        (index, pictures(resources.model, batch.x0, canvas)) for index, batch in sampled
    )
    columns = table_columns(
        resources,
        rows,
        round_index=round_index,
        seeds=seeds,
        policy_digest=policy_digest,
        num_steps=params.rollout.num_inference_steps,
    )
    write_shard(path, columns, images, tensors)
