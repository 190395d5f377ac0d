"""What follows when an artifact is there: metrics, pictures, retention.

Also for artifacts that an earlier start made: the tracker leaves out what it has.
"""

import json
import logging
from dataclasses import dataclass
from typing import Any

from tasks import pipeline
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import PREVIEW
from tasks.artifacts.run_dir import RunDir
from tasks.params.run_params import RetentionParams
from tasks.reports import summary
from tasks.runs import retention
from tasks.stages.checkpointed_loop import STEP_METRICS_FILE
from tasks.tracking.tracker import Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AfterStage:
    """Tracks the artifacts of the run in `folder`, and deletes what retention does not keep."""

    folder: RunDir
    tracker: Tracker
    retention: RetentionParams

    def __call__(
        self, name: str, artifact: Artifact, *, is_new: bool, cost: dict[str, float]
    ) -> None:
        """Track what the stage measured.

        is_new: the artifact was made just now. cost: what making it took; empty where it was there.
        """
        stage, round_index = pipeline.stage_of(name), pipeline.round_of(name)
        if round_index is not None and name not in self.folder.shared:
            self._track_time(name, artifact, cost)
        match stage:
            case "warmup" | "update":
                self._track_steps(name, artifact)
            case "rollout":
                seconds = artifact.meta["seconds_sampling"]
                speed = {"seconds": seconds, "images_per_second": artifact.meta["images"] / seconds}
                self.tracker.log(name, round_index, _prefixed(stage, speed))
            case "evaluate":
                self._track_evaluation(name, artifact)
            case _:
                self.tracker.log(name, round_index, _prefixed(stage, artifact.meta))
        if stage == "score":
            rollout = self._parent(name, "rollout")
            summary.show_round(self.tracker, round_index, rollout, artifact)
        if stage == "refresh" and is_new:
            retention.retain(self.folder, self.retention)

    def _track_time(self, name: str, artifact: Artifact, cost: dict[str, float]) -> None:
        measured = {"seconds": artifact.manifest.seconds, **cost}
        if "images" in artifact.meta and artifact.manifest.seconds:
            measured["images_per_second"] = artifact.meta["images"] / artifact.manifest.seconds
        kind = name.rpartition("/")[2]  # an evaluation's preview has figures of its own
        row = {f"time/{kind}_{key}": value for key, value in measured.items()}
        self.tracker.log(f"{name}/time", pipeline.round_of(name), row)

    def _track_steps(self, name: str, artifact: Artifact) -> None:
        """Track the optimizer steps that the loop wrote down."""
        lines = artifact.file(STEP_METRICS_FILE).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        stage = pipeline.stage_of(name)
        self.tracker.log_rows(name, [(row.pop("step"), _prefixed(stage, row)) for row in rows])

    def _track_evaluation(self, name: str, artifact: Artifact) -> None:
        done = pipeline.rounds_done(name)
        if not name.endswith(PREVIEW):
            metrics = _prefixed("evaluate", artifact.meta)
            self.tracker.log(name, done, metrics)
            checkpoint = self._parent(name, "checkpoint")
            self.tracker.log_checkpoint(
                f"round-{done:04d}", checkpoint.digest, checkpoint.path, done, metrics
            )
            logger.info("after %d rounds: %s", done, summary.describe(artifact.meta))
        summary.show_grid(self.tracker, done, artifact)

    def _parent(self, name: str, key: str) -> Artifact:
        return self.folder.load(pipeline.parents(name)[key])


def _prefixed(stage: str, metrics: dict[str, Any]) -> dict[str, Any]:
    return {f"{stage}/{name}": value for name, value in metrics.items()}
