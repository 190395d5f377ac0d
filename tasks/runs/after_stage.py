"""What follows when an artifact is there: metrics, pictures, retention.

Also for artifacts that an earlier start made: the tracker leaves out what it has.
"""

import json
import logging
from dataclasses import dataclass
from typing import Any

from tasks import pipeline
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import PREVIEW, round_name
from tasks.artifacts.run_dir import RunDir
from tasks.params.run_params import RunParams
from tasks.reports.learning_curve import show_learning_curve
from tasks.reports.round_pictures import describe, show_grid, show_round
from tasks.reports.words import duration
from tasks.runs import retention
from tasks.stages.checkpointed_loop import STEP_METRICS_FILE, by_step
from tasks.stages.rollout import REFILLED
from tasks.stages.update import IDLE
from tasks.tracking.tracker import Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AfterStage:
    """Tracks the artifacts of the run in `folder`, and deletes what retention does not keep.

    Only artifacts that were made just now are told in the log.
    """

    folder: RunDir
    tracker: Tracker
    params: RunParams

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
            case "warmup":
                self._track_steps(name, artifact)
            case "update":
                self._track_steps(name, artifact)
                counts = {key: artifact.meta[key] for key in IDLE if key in artifact.meta}
                self.tracker.log(f"{name}/idle", round_index, _prefixed(stage, counts))
            case "rollout":
                seconds = artifact.meta["seconds_sampling"]
                speed = {"seconds": seconds, "images_per_second": artifact.meta["images"] / seconds}
                counts = {key: artifact.meta[key] for key in REFILLED if key in artifact.meta}
                self.tracker.log(name, round_index, _prefixed(stage, speed | counts))
            case "evaluate":
                self._track_evaluation(name, artifact, is_new=is_new)
            case _:
                self.tracker.log(name, round_index, _prefixed(stage, artifact.meta))
        if stage == "score":
            rollout = self._parent(name, "rollout")
            show_round(self.tracker, round_index, rollout=rollout, scores=artifact)
            if is_new:
                self._tell_reward(round_index, artifact)
        if stage == "refresh" and is_new:
            self._tell_time(round_index)
            retention.apply_retention(self.folder, self.params.retention)

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
        stage = pipeline.stage_of(name)
        rows = by_step(json.loads(line) for line in lines)
        self.tracker.log_rows(name, [(step, _prefixed(stage, row)) for step, row in rows.items()])

    def _tell_reward(self, round_index: int, scores: Artifact) -> None:
        logger.info(
            "%s: mean reward %.3f of at most %g",
            self._round(round_index),
            scores.meta["reward_mean"],
            self._highest_reward(),
        )

    def _tell_time(self, round_index: int) -> None:
        """Log what the round took, and what the rounds to come will take at that pace."""
        names = [pipeline.name_of(stage, round_index) for stage in pipeline.ROUND]
        seconds = sum(self.folder.load(name).manifest.seconds for name in names)
        left = (self.params.rounds - round_index - 1) * seconds
        logger.info(
            "%s took %s; about %s of training left",
            self._round(round_index),
            duration(seconds),
            duration(left),
        )

    def _round(self, round_index: int) -> str:
        return f"{round_name(round_index)} ({round_index + 1} of {self.params.rounds})"

    def _highest_reward(self) -> float:
        return sum(self.params.reward.component_weights.values())

    def _track_evaluation(self, name: str, artifact: Artifact, *, is_new: bool) -> None:
        done = pipeline.rounds_done(name)
        if not name.endswith(PREVIEW):
            metrics = _prefixed("evaluate", artifact.meta)
            self.tracker.log(name, done, metrics)
            checkpoint = self._parent(name, "checkpoint")
            self.tracker.log_checkpoint(
                round_name(done), checkpoint.digest, checkpoint.path, done, metrics
            )
            if is_new:
                outcome = describe(artifact.meta)
                logger.info("after %d of %d rounds: %s", done, self.params.rounds, outcome)
            if is_new or done == self.params.rounds:  # the start that made the last may have died
                highest = self._highest_reward()
                show_learning_curve(self.tracker, done, highest_reward=highest)
        show_grid(self.tracker, done, artifact)

    def _parent(self, name: str, key: str) -> Artifact:
        return self.folder.load(pipeline.parents(name, self.params.rollout.staleness)[key])


def _prefixed(stage: str, metrics: dict[str, Any]) -> dict[str, Any]:
    return {f"{stage}/{name}": value for name, value in metrics.items()}
