"""Stage `score`: ask the reward servers about every image, also while later ones are being
sampled."""

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from calligrapher.data.case import Case
from calligrapher.errors import RewardError
from calligrapher.tables.parquet import read_shard, read_table, write_scores
from tasks.artifacts.digests import file_sha256
from tasks.artifacts.layout import round_number
from tasks.artifacts.run_dir import Artifact
from tasks.resources.resources import Bench
from tasks.resources.rewards import COMPONENTS

VERSION = 1
READS = ("sample_id", "case_id", "image")


def score(bench: Bench, rollout: Artifact, ahead: Path, out: Path) -> dict[str, Any]:
    """Score every shard, taking from `ahead` what was scored while the rollout went on.

    Files: `scores-0000.parquet`, ... Meta: counts, means. Raises RewardError when the servers fail
    or more than `reward.max_unscored_share` of the images stay unscored.
    """
    shards = [name for name in sorted(rollout.files) if name.endswith(".parquet")]
    tables = []
    label = f"round {round_number(rollout.path.parent.name)} score"
    with bench.progress(label, total=len(shards), unit="shard") as bar:
        for name in shards:
            target = out / name.replace("shard-", "scores-")
            if not target.exists():
                done = ahead / f"{rollout.files[name].sha256}.parquet"
                if not done.exists():
                    score_rows(bench, read_shard(rollout.file(name), READS), done)
                os.replace(done, target)
            tables.append(read_table(target))
            bar.advance(
                reward=np.mean([r for r in tables[-1]["reward"] if r is not None] or [np.nan])
            )
    for waiting in ahead.parent.glob(
        "score-ahead-*"
    ):  # also what was scored in another way, before
        shutil.rmtree(waiting, ignore_errors=True)
    return summary(bench, tables)


def score_rows(bench: Bench, rows: dict[str, list[Any]], out: Path) -> None:
    """Write the score table of one shard's rows (columns `READS`) to `out`."""
    by_id: dict[str, Case] = {case.case_id: case for case in bench.train_cases}
    scored = bench.scorer.score(rows["image"], [by_id[i] for i in rows["case_id"]])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_scores(
        out, {"sample_id": rows["sample_id"]} | {k: [row[k] for row in scored] for k in scored[0]}
    )


def summary(bench: Bench, tables: list[dict[str, list[Any]]]) -> dict[str, Any]:
    """Counts and means of score tables. Raises RewardError when too many images are unscored."""
    rewards = [r for table in tables for r in table["reward"]]
    scored = [r for r in rewards if r is not None]
    unscored = len(rewards) - len(scored)
    if unscored > bench.params.reward.max_unscored_share * len(rewards) or not scored:
        reasons = sorted({r for table in tables for r in table["reason"] if r})
        raise RewardError(
            f"At most {bench.params.reward.max_unscored_share:.0%} of the images may stay unscored"
            f" (reward.max_unscored_share). {unscored} of {len(rewards)} are:"
            f" {'; '.join(reasons[:3])}."
        )
    found = {"images": len(rewards), "unscored": unscored}
    for name in ("reward", *COMPONENTS.values()):
        found |= _statistics(name, [v for table in tables for v in table[name] if v is not None])
    if accuracy := [a for table in tables for a in table["ocr_accuracy"] if a is not None]:
        found["exact_match"] = float(np.mean(np.equal(accuracy, 1)))
    return found


def _statistics(name: str, values: list[float]) -> dict[str, float]:
    """Mean, spread and percentiles; nothing of what was not measured."""
    if not values:
        return {}
    found = {f"{name}_mean": float(np.mean(values)), f"{name}_std": float(np.std(values))}
    return found | {f"{name}_p{q}": float(np.percentile(values, q)) for q in (10, 50, 90)}


class ScoreAhead:
    """Scores shards in a thread of its own while the rollout samples the next ones.

    `with ScoreAhead(bench, folder) as ahead: rollout(..., on_shard=ahead.submit)`; a failure in the
    thread is raised by the next `submit`, or at the end of the block: sampling for servers that are
    down is no use.
    """

    def __init__(self, bench: Bench, folder: Path):
        self.bench, self.folder = bench, folder
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="score-ahead")
        self.futures: list[Future[None]] = []

    def submit(self, shard: Path) -> None:
        """Score `shard` soon. It is read now: its folder gets another name when the rollout
        ends."""
        for future in self.futures:
            if future.done():
                future.result()
        target = self.folder / f"{file_sha256(shard)}.parquet"
        if not target.exists():
            rows = read_shard(shard, READS)
            self.futures.append(self.pool.submit(score_rows, self.bench, rows, target))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                for future in self.futures:
                    future.result()
        finally:
            self.pool.shutdown(wait=True, cancel_futures=True)
