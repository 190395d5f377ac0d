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


def rollout(
    resources: Resources, round_index: int, out: Path, *, old: Artifact, ahead: Path
) -> dict[str, Any]:
    """Sample `num_images_per_prompt` images of each of the round's cases under the policy `old`.

    Rows are prompt-major. Every finished shard, those of an earlier attempt included, is scored
    into the folder `ahead` while the next ones are sampled. Files: `shard-0000.parquet`, ...
    Meta: images, seconds_sampling.
    """
    params = resources.params
    rows = rows_of(resources.cases.of_round(round_index), params.rollout.num_images_per_prompt)
    size = params.rollout.shard_size
    started = time.monotonic()
    weights = resources.weights(old_weights(old))
    with (
        ScoreAhead(resources, ahead) as scoring,
        resources.progress(f"round {round_index} rollout", total=len(rows), unit="img") as bar,
    ):
        for number, start in enumerate(range(0, len(rows), size)):
            path = out / f"shard-{number:04d}.parquet"
            shard = rows[start : start + size]
            if not path.exists():
                _write(
                    resources,
                    shard,
                    path,
                    round_index=round_index,
                    weights=weights,
                    policy_digest=old.digest,
                )
            scoring.submit(path)
            bar.advance(len(shard))
        seconds = time.monotonic() - started  # without waiting for the last scores
    return {"images": len(rows), "seconds_sampling": seconds}


def _write(
    resources: Resources,
    rows: list[Row],
    path: Path,
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
    )
    kept: dict[str, Callable[[SampledBatch], Tensor]] = {"x0": lambda s: s.x0}
    if explores is not None:
        kept |= {
            "trajectory": lambda s: s.window.trajectory,
            "log_prob": lambda s: s.window.log_prob,
            "window_sigmas": lambda s: s.window.sigmas,
        }
        if explores.guard:
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
