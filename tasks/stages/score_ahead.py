"""Scoring while the rollout goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from calligrapher.data.case import Case
from calligrapher.tables.parquet import read_shard, write_scores
from tasks.artifacts.digests import file_sha256
from tasks.resources.resources import Resources

READS = ("sample_id", "case_id", "image")


class ScoreAhead:
    """Scores shards in a thread of its own while the rollout samples the next ones.

    `with ScoreAhead(resources, folder) as scoring: scoring.submit(shard)`. A failure in the thread
    is raised by the next `submit`, or at the end of the block: sampling for servers that are down
    is no use.
    """

    def __init__(self, resources: Resources, folder: Path):
        self.resources, self.folder = resources, folder
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="score-ahead")
        self.futures: list[Future[None]] = []

    def submit(self, shard: Path) -> None:
        """Score `shard` soon.

        It is read now: its folder gets another name when the rollout ends.
        """
        for future in self.futures:
            if future.done():
                future.result()
        target = scored_shard(self.folder, file_sha256(shard))
        if not target.exists():
            rows = read_shard(shard, READS)
            self.futures.append(self.pool.submit(score_rows, self.resources, rows, target))

    def wait(self) -> None:
        """Wait until all that was submitted is scored; raise what failed."""
        for future in self.futures:
            future.result()

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
                self.wait()
        finally:
            self.pool.shutdown(wait=True, cancel_futures=True)


def scored_shard(folder: Path, sha256: str) -> Path:
    """Return where the scores of the shard with these bytes wait."""
    return folder / f"{sha256}.parquet"


def score_rows(resources: Resources, rows: dict[str, list[Any]], out: Path) -> None:
    """Write the score table of one shard's rows (columns `READS`) to `out`."""
    by_id: dict[str, Case] = {case.case_id: case for case in resources.cases.train}
    scored = resources.scorer.score(
        rows["image"],
        [by_id[i] for i in rows["case_id"]],
        letters=resources.params.compares_letters,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = {key: [row[key] for row in scored] for key in scored[0]}
    write_scores(out, {"sample_id": rows["sample_id"]} | columns)
