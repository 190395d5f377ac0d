"""Stage `rollout`: sample the round's images and write them to Parquet, shard by shard.

Its version stands in `tasks/pipeline.py`, as that of every stage.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from calligrapher.data.case import Case
from calligrapher.model.loading import pictures
from calligrapher.model.policy import Weights
from calligrapher.sampling.exploration import windows_of
from calligrapher.sampling.sampler import SampledBatch, sample_seed
from calligrapher.tables.parquet import write_shard
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.digests import file_sha256
from tasks.resources.resources import Resources
from tasks.stages.advantage import compare, read_scores
from tasks.stages.refresh import old_weights
from tasks.stages.sampling import (
    Row,
    in_order,
    rows_of,
    sample_batches,
    stacked,
    table_columns,
)
from tasks.stages.score_ahead import ScoreAhead, scored_shard
from tasks.stages.turns import Turn, turns

REFILLED = ("refilled_groups", "lacking_groups")  # counts of a round with `rollout.refill`


def rollout(
    resources: Resources, round_index: int, out: Path, *, old: Artifact, ahead: Path
) -> dict[str, Any]:
    """Sample `num_images_per_prompt` images of each of the round's cases under the policy `old`.

    Rows are prompt-major. Shard k is rank k mod N's. Every finished shard, those of an earlier
    attempt included, is scored into the folder `ahead` while the next ones are sampled. With
    `rollout.refill` the scores are awaited, and a further case is sampled for each group that has
    nothing to teach, so many times at most. Files: `shard-0000.parquet`, ... Meta: images,
    seconds_sampling (of the slowest rank), with `refill` also refilled_groups and lacking_groups.
    """
    settings, ranks = resources.params.rollout, resources.ranks
    cases, further = resources.cases.of_round(round_index), []
    wanted, lacking = len(cases), 0
    if settings.refill:
        further = resources.cases.further(round_index)
    started = time.monotonic()
    with ScoreAhead(resources, ahead) as scoring:
        sampling = _Sampling(resources, round_index, out, old, scoring)
        sampling.sample(cases)
        for attempt in range(settings.refill + 1 if settings.refill else 0):
            scoring.wait()
            ranks.barrier()  # what the others scored can be read then
            lacking = wanted - sampling.teaching_groups(ahead)
            picked, further = further[:lacking], further[lacking:]
            if attempt == settings.refill or not picked:
                break
            sampling.sample(picked)
        seconds = time.monotonic() - started  # without waiting for the last scores
    slowest = ranks.combine({"seconds_sampling": seconds}, lambda name: True)
    counts = dict(zip(REFILLED, (sampling.groups - wanted, lacking), strict=True))
    images = sampling.groups * settings.num_images_per_prompt
    return {"images": images, **slowest, **(counts if settings.refill else {})}


@dataclass
class _Sampling:
    """The shards of a round, as they come to be."""

    resources: Resources
    round_index: int
    out: Path
    old: Artifact
    scoring: ScoreAhead
    groups: int = 0
    paths: list[Path] = field(default_factory=list)

    def sample(self, cases: list[Case]) -> None:
        """Sample further `cases` into shards of their own, and have them scored."""
        resources, ranks = self.resources, self.resources.ranks
        settings = resources.params.rollout
        rows = rows_of(cases, settings.num_images_per_prompt, first=self.groups)
        first, size = len(self.paths), settings.shard_size
        cut = (rows[at : at + size] for at in range(0, len(rows), size))
        shards = dict(enumerate(cut, first))
        paths = {number: self.out / f"shard-{number:04d}.parquet" for number in shards}
        self.paths += paths.values()
        weights = resources.weights(old_weights(self.old))
        own = [number for number in shards if ranks.owns(number)]
        label = f"round {self.round_index} " + ("refill" if self.groups else "rollout")
        self.groups += len(cases)
        images = sum(len(shards[number]) for number in own)
        with resources.progress(label, total=images, unit="img") as bar:
            missing = [number for number, path in paths.items() if not path.exists()]
            ranks.barrier()  # all look which shards there are before anybody writes one
            for number in (number for number in own if number not in missing):
                self.scoring.submit(paths[number])
                bar.advance(len(shards[number]))
            for turn in turns(resources, {n: [row.case for row in shards[n]] for n in missing}):
                _write(
                    resources,
                    shards[turn.number],
                    paths[turn.number],
                    turn,
                    round_index=self.round_index,
                    weights=weights,
                    policy_digest=self.old.digest,
                )
                if turn.own:
                    self.scoring.submit(paths[turn.number])
                    bar.advance(len(shards[turn.number]))

    def teaching_groups(self, ahead: Path) -> int:
        """Return how many of the groups so far, which are all scored, have something to teach."""
        params = self.resources.params
        scored = [scored_shard(ahead, file_sha256(path)) for path in self.paths]
        return compare(params, [read_scores(params, path) for path in scored]).teaching_groups


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
        shared_trunk=params.rollout.shared_trunk,
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
