"""What a report tells of a run, read from its folder alone; the run may be at work meanwhile."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from calligrapher.tables.parquet import read_shard, read_table
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import EVALUATE, FORK, PREVIEW, RunsDir
from tasks.artifacts.lineage import Fork, read_fork
from tasks.artifacts.run_dir import RunDir
from tasks.params.run_params import RunParams
from tasks.pipeline import name_of, rounds_done
from tasks.reports.status import RunStatus, run_params, status
from tasks.tracking.journal import METRICS_FILE, Entry, whole_lines

_COLUMNS = ["sample_id", "ocr_text", "reward", "reason"]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class RunFacts:
    """A run as it is on the disk now. Raises ArtifactError where a folder is no run."""

    folder: Path

    @cached_property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def params(self) -> RunParams:
        return run_params(self.folder)

    @cached_property
    def status(self) -> RunStatus:
        return status(self.folder)

    @cached_property
    def records(self) -> list[Entry]:
        """The lines of `metrics.jsonl`."""
        return whole_lines(self.folder / METRICS_FILE)

    @cached_property
    def artifacts(self) -> dict[str, Artifact]:
        """Name -> each finished artifact that is not damaged, in the order of the pipeline."""
        run_dir = RunDir(self.folder)
        done = [s.name for s in self.status.stages if s.state == "done"]
        return {name: Artifact.load(run_dir.stage_path(name)) for name in done}

    @cached_property
    def evaluations(self) -> dict[int, Artifact]:
        """Rounds done -> the evaluation made then, previews left out."""
        found = {n: a for n, a in self.artifacts.items() if n.rpartition("/")[2] == EVALUATE}
        return {rounds_done(name): artifact for name, artifact in found.items()}

    @cached_property
    def shown_cases(self) -> dict[int, Artifact]:
        """Rounds done -> what shows the fixed cases then: an evaluation or a preview."""
        found = {
            n: a for n, a in self.artifacts.items() if n.rpartition("/")[2] in (EVALUATE, PREVIEW)
        }
        return {rounds_done(name): artifact for name, artifact in found.items()}

    @cached_property
    def scored(self) -> dict[int, Rows]:
        """Round -> its images: sample_id, text, ocr_text, reward, reason, and the file and row."""
        return {i: rows for i in range(self.params.rounds) if (rows := self._scored(i))}

    @cached_property
    def highest_reward(self) -> float:
        """Of a perfect picture: the sum of the reward's weights."""
        return sum(self.params.reward.component_weights.values())

    @cached_property
    def parents(self) -> list[tuple[str, Fork]]:
        """(name, what it is a fork of) of this run, its parent, and so on."""
        found, folder = [], self.folder.resolve()
        while (fork := read_fork(folder)) is not None and len(found) < 20:
            found.append((folder.name, fork))
            folder = (folder / fork.parent).resolve()
        return found

    @cached_property
    def forks(self) -> list[tuple[str, Fork]]:
        """(name, fork) of the runs beside this one that were forked from it."""
        here = self.folder.resolve()
        beside = sorted(path.parent for path in here.parent.glob(f"*/{FORK}"))
        read = [(folder, read_fork(folder)) for folder in beside]
        return [
            (folder.name, fork) for folder, fork in read if (folder / fork.parent).resolve() == here
        ]

    @cached_property
    def verdicts(self) -> list[dict[str, Any]]:
        """What evaluations of checkpoints said, by round; the newest way of evaluating last."""
        folder = RunsDir(self.folder.resolve().parent).evaluations(self.name)
        return [json.loads(path.read_bytes()) for path in sorted(folder.glob("*/verdicts/*.json"))]

    def score_tables(self, round_index: int) -> list[Path]:
        """Return the files of a round's scores."""
        scores = self.artifacts.get(name_of("score", round_index))
        return [scores.file(name) for name in sorted(scores.files)] if scores else []

    def history(self, key: str) -> list[tuple[int, float]]:
        """All (step, value) of one metric, by step."""
        points = {
            r["step"]: r["metrics"][key] for r in self.records if r["metrics"].get(key) is not None
        }
        return sorted(points.items())

    def intervals(self, key: str) -> list[tuple[int, float, float]]:
        """All (step, low, high) of one metric of evaluations."""
        low, high = (dict(self.history(f"{key}_{end}")) for end in ("low", "high"))
        return [(step, low[step], high[step]) for step in sorted(low.keys() & high.keys())]

    def keys(self, prefix: str) -> list[str]:
        """The names of all metrics that begin with `prefix`, in the order in which they came."""
        return list(
            dict.fromkeys(k for r in self.records for k in r["metrics"] if k.startswith(prefix))
        )

    def _scored(self, round_index: int) -> Rows:
        scores, rollout = (
            self.artifacts.get(name_of(s, round_index)) for s in ("score", "rollout")
        )
        if scores is None or rollout is None:
            return []
        rows: Rows = []
        for name in sorted(scores.files):
            shard = rollout.file(name.replace("scores-", "shard-"))
            columns = read_table(scores.file(name), _COLUMNS) | read_shard(shard, ["text"])
            for row, values in enumerate(zip(*columns.values(), strict=True)):
                rows.append(dict(zip(columns, values, strict=True)) | {"file": shard, "row": row})
        return rows
