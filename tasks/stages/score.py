"""Stage `score`: the rewards of a round's images, component by component."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from calligrapher.errors import RewardError
from calligrapher.tables.parquet import read_shard, read_table
from tasks.artifacts.artifact import Artifact
from tasks.params.run_params import RunParams
from tasks.resources.resources import Resources
from tasks.resources.rewards import measured_numbers
from tasks.stages.reweigh import reweigh
from tasks.stages.score_ahead import READS, score_rows, scored_shard

AHEAD = "score-ahead-"
"""Beginning of the folders, beside the artifact, in which scores wait for this stage."""


def score(
    resources: Resources,
    round_index: int,
    out: Path,
    *,
    rollout: Artifact,
    ahead: Path,
    earlier: Path | None = None,
) -> dict[str, Any]:
    """Score every shard, taking from `ahead` what was scored while the rollout went on.

    Shard k is scored by the rank that sampled it, k mod N.

    earlier: the parent's scores of the same images, which hold all that is weighed now; no server
    is asked then. Files: `scores-0000.parquet`, ... Meta: counts, means. Raises RewardError when
    the servers fail or more than `reward.max_unscored_share` of the images stay unscored.
    """
    ranks = resources.ranks
    if earlier is not None:
        if not ranks.is_first:  # It takes no time: there is nothing to share.
            return {}
        tables = reweigh(Artifact.load(earlier), resources.params.reward, out)
        return summary(resources.params, tables)
    shards = [name for name in sorted(rollout.files) if name.endswith(".parquet")]
    targets = {name: out / name.replace("shard-", "scores-") for name in shards}
    own = [name for number, name in enumerate(shards) if ranks.owns(number)]
    label = f"round {round_index} score"
    with resources.progress(label, total=len(own), unit="shard") as bar:
        for name in own:
            target = targets[name]
            if not target.exists():
                done = scored_shard(ahead, rollout.files[name].sha256)
                if not done.exists():
                    score_rows(resources, read_shard(rollout.file(name), READS), done)
                os.replace(done, target)
            rewards = read_table(target)["reward"]
            bar.advance(reward=np.mean([r for r in rewards if r is not None] or [np.nan]))
    ranks.barrier()
    if ranks.is_first:
        for waiting in ahead.parent.glob(f"{AHEAD}*"):  # also what was scored in another way before
            shutil.rmtree(waiting, ignore_errors=True)
    return summary(resources.params, [read_table(target) for target in targets.values()])


def summary(params: RunParams, tables: list[dict[str, list[Any]]]) -> dict[str, Any]:
    """Return counts and means of score tables.

    Raises RewardError when too many images are unscored.
    """
    rewards = [r for table in tables for r in table["reward"]]
    scored = [r for r in rewards if r is not None]
    unscored = len(rewards) - len(scored)
    if unscored > params.reward.max_unscored_share * len(rewards) or not scored:
        reasons = sorted({r for table in tables for r in table["reason"] if r})
        raise RewardError(
            f"At most {params.reward.max_unscored_share:.0%} of the images may stay"
            f" unscored (reward.max_unscored_share). {unscored} of {len(rewards)} are:"
            f" {'; '.join(reasons[:3])}."
        )
    metrics: dict[str, Any] = {"images": len(rewards), "unscored": unscored}
    for name in ("reward", *measured_numbers(tables[0])):
        metrics |= _statistics(name, [v for table in tables for v in table[name] if v is not None])
    if accuracy := [a for table in tables for a in table["ocr_accuracy"] if a is not None]:
        metrics["exact_match"] = float(np.mean(np.equal(accuracy, 1)))
    return metrics


def _statistics(name: str, values: list[float]) -> dict[str, float]:
    """Return mean, spread and percentiles; nothing of what was not measured."""
    if not values:
        return {}
    metrics = {f"{name}_mean": float(np.mean(values)), f"{name}_std": float(np.std(values))}
    return metrics | {f"{name}_p{q}": float(np.percentile(values, q)) for q in (10, 50, 90)}
