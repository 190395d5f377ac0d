"""One training run: its folder, params, bench and tracker, and how each stage's artifact is asked
for.

The stages themselves are plain functions in files of their own; here they get their inputs, their
place in the run's folder and their fingerprint, and what they found is tracked when it is
committed.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from calligrapher.durable import atomic_write
from calligrapher.rl.train_loop import EMA, STATE, TRAINED
from tasks.artifacts.digests import canonical_json, fingerprint
from tasks.artifacts.layout import evaluation_name, round_name, round_number
from tasks.artifacts.lineage import PARAMS
from tasks.artifacts.run_dir import Artifact, Build, RunDir, made_from, stale
from tasks.params.run_params import RunParams
from tasks.pipeline import WARMUP, planned, stage_of
from tasks.reports.round_pictures import describe, show_grid, show_round
from tasks.reports.summary import Summary, summarise
from tasks.resources.resources import Bench
from tasks.runs import retention as gc
from tasks.runs.reads import Reads
from tasks.stages import advantage as advantage_stage
from tasks.stages import checkpointed_loop as training
from tasks.stages import evaluate as evaluate_stage
from tasks.stages import refresh as refresh_stage
from tasks.stages import reweigh as rescore
from tasks.stages import rollout as rollout_stage
from tasks.stages import score as score_stage
from tasks.stages import update as update_stage
from tasks.stages import warmup as warmup_stage
from tasks.stages.refresh import OLD
from tasks.tracking.pointer import lineage_tags, refuse_password
from tasks.tracking.tracker import Tracker

logger = logging.getLogger(__name__)


class Run:
    """A run that this process holds the lock of. Build it with `open_run`."""

    def __init__(self, folder: RunDir, params: RunParams, bench: Bench, tracker: Tracker):
        self.folder, self.params, self.bench, self.tracker = folder, params, bench, tracker
        self.reads = Reads(bench)
        self.started = time.monotonic()
        self.built: set[str] = set()  # names of the artifacts that this process made

    def has(self, name: str) -> bool:
        """Whether the artifact `name` is made."""
        return self.folder.stage_path(name).exists()

    def warmup(self) -> Artifact:
        """The supervised start of the run: also the reference policy and the first old one."""
        made = self._ensure(WARMUP, {}, lambda out: warmup_stage.warmup(self.bench, out))
        self._track_steps(made, "warmup")
        return made

    def rollout(self, round: int, old: Artifact) -> Artifact:
        """Images of this round under the old policy; their scoring goes on at the same time."""
        name = f"{round_name(round)}/rollout"

        def build(out: Path) -> dict[str, Any]:
            started = time.monotonic()
            with score_stage.ScoreAhead(self.bench, self._ahead(round)) as ahead:
                weights = self.bench.weights(old.file(old_file(old)))
                meta = rollout_stage.rollout(
                    self.bench, round, weights, old.digest, out, ahead.submit
                )
                meta["seconds_sampling"] = time.monotonic() - started
            return meta

        made = self._ensure(name, {"old": old}, build)
        seconds = made.meta["seconds_sampling"]
        speed = {
            "rollout/seconds": seconds,
            "rollout/images_per_second": made.meta["images"] / seconds,
        }
        self.tracker.log(name, round, speed)
        return made

    def score(self, round: int, rollout: Artifact) -> Artifact:
        """The rewards of a round: reckoned from the parent's components in a fork, where those
        suffice."""
        name = f"{round_name(round)}/score"

        def build(out: Path) -> dict[str, Any]:
            earlier = self._earlier_scores(name, rollout)
            if earlier is None:
                return score_stage.score(self.bench, rollout, self._ahead(round), out)
            return score_stage.summary(
                self.bench, rescore.reweigh(earlier, self.params.reward, out)
            )

        made = self._ensure(name, {"rollout": rollout}, build)
        self.tracker.log(name, round, {f"score/{k}": v for k, v in made.meta.items()})
        show_round(self.tracker, round, rollout=rollout, scores=made)
        return made

    def advantage(self, round: int, scores: Artifact) -> Artifact:
        name = f"{round_name(round)}/advantage"
        made = self._ensure(
            name,
            {"scores": scores},
            lambda out: advantage_stage.advantage(self.params, scores, out),
        )
        self.tracker.log(name, round, {f"advantage/{k}": v for k, v in made.meta.items()})
        return made

    def update(
        self,
        round: int,
        previous: Artifact,
        start: Artifact,
        old: Artifact,
        rollout: Artifact,
        advantages: Artifact,
    ) -> Artifact:
        name = f"{round_name(round)}/update"
        inputs = {
            "previous": previous,
            "start": start,
            "old": old,
            "rollout": rollout,
            "advantages": advantages,
        }

        def build(out: Path) -> dict[str, Any]:
            # The same bytes are the same policy: one forward then serves as old and as reference.
            moved = old.files[old_file(old)].sha256 != start.files[TRAINED].sha256
            return update_stage.update(
                self.bench,
                round,
                previous=previous,
                warmup=start,
                old=old.file(old_file(old)) if moved else start.file(TRAINED),
                rollout=rollout,
                advantages=advantages,
                out=out,
            )

        made = self._ensure(name, inputs, build)
        self.bench.model_is(made)
        self._track_steps(made, "update")
        return made

    def refresh(self, round: int, old: Artifact, updated: Artifact) -> Artifact:
        name = f"{round_name(round)}/refresh"
        made = self._ensure(
            name,
            {"old": old, "updated": updated},
            lambda out: refresh_stage.refresh(self.params, old.file(old_file(old)), updated, out),
        )
        self.tracker.log(name, round, {f"refresh/{k}": v for k, v in made.meta.items()})
        if name in self.built:
            gc.retain(self.folder, self.params.retention)
        return made

    def finished(self, checkpoint: Artifact) -> bool:
        """Whether `checkpoint` has `update.max_train_steps`: then further rounds would change
        nothing."""
        limit = self.params.update.max_train_steps
        if limit is None or checkpoint.stage != "update":
            return False
        return json.loads(checkpoint.file(STATE).read_text())["step"] >= limit

    def evaluate(self, round: int, checkpoint: Artifact) -> Artifact | None:
        """Evaluate after `round` rounds: all cases when it is due, otherwise the ones of the
        picture grid."""
        settings = self.params.evaluate
        if settings.every == 0:
            return None
        last = round == self.params.rounds or self.finished(checkpoint)
        full = last or round % settings.every == 0
        name = evaluation_name(round, preview=not full)
        cases = settings.num_cases if full else settings.grid_cases
        weights = EMA if self.params.ema.use_ema and checkpoint.stage == "update" else TRAINED

        def build(out: Path) -> dict[str, Any]:
            policy = self.bench.weights(checkpoint.file(weights))
            return evaluate_stage.evaluate(self.bench, round, policy, checkpoint.digest, cases, out)

        made = self._ensure(name, {"checkpoint": checkpoint}, build)
        if full:
            self.tracker.log(name, round, {f"evaluate/{k}": v for k, v in made.meta.items()})
            self.tracker.log_checkpoint(
                f"round-{round:04d}",
                checkpoint.digest,
                checkpoint.path,
                round,
                {f"evaluate/{k}": v for k, v in made.meta.items()},
            )
            logger.info("after %d rounds: %s", round, describe(made.meta))
        show_grid(self.tracker, round, made)
        return made

    def summarise(self, last: Artifact) -> Summary:
        """Write `summary.json` and the closing pictures; `last` is the update that ends the run."""
        return summarise(
            self.folder,
            self.params,
            self.tracker,
            last=last,
            evaluation_cases=lambda: self.bench.evaluation_cases,
            seconds=time.monotonic() - self.started,
        )

    def _ensure(self, name: str, made_from: dict[str, Artifact], build: Build) -> Artifact:
        if name in self.folder.shared:
            return self.folder.load(name)
        asked = self.reads.of(name, made_from)
        if not self.has(name):
            self.built.add(name)
        memory: dict[str, float] = {}
        made = self.folder.ensure(
            name,
            lambda out: gpu_peak(lambda: build(out), memory),
            stage=asked.stage,
            params=asked.params,
            inputs=asked.inputs,
            stage_version=asked.stage_version,
            **asked.extra,
        )
        if name.startswith("round-"):
            cost = {"seconds": made.manifest.seconds, **memory}
            if "images" in made.meta and made.manifest.seconds:
                cost["images_per_second"] = made.meta["images"] / made.manifest.seconds
            row = {f"time/{Path(name).name}_{key}": value for key, value in cost.items()}
            self.tracker.log(f"{name}/time", round_number(Path(name).parts[0]), row)
        return made

    def _earlier_scores(self, name: str, rollout: Artifact) -> Artifact | None:
        """The parent's scores of the same images by the same scorer, if they hold what is weighed
        now."""
        fork = self.folder.fork
        path = fork and self.folder.path / fork.parent / name
        if not path or not path.is_dir():
            return None
        earlier = Artifact.load(path)
        same = earlier.inputs["rollout"] == rollout.digest
        same = same and earlier.manifest.extra["scored_by"] == self.reads.scored_by
        return earlier if same and rescore.can_reweigh(earlier, self.params.reward) else None

    def _ahead(self, round: int) -> Path:
        """Where the scores that run ahead wait; another way of scoring never finds them."""
        reads = self.params.reads("score")
        key = fingerprint("ahead", score_stage.VERSION, reads, {}, scored_by=self.reads.scored_by)
        return self.folder.path / round_name(round) / f"score-ahead-{key[:12]}.partial"

    def _track_steps(self, made: Artifact, stage: str) -> None:
        rows = [json.loads(line) for line in made.file(training.METRICS).read_text().splitlines()]
        key = str(made.path.relative_to(self.folder.path))
        self.tracker.log_rows(
            key, [(row.pop("step"), {f"{stage}/{k}": v for k, v in row.items()}) for row in rows]
        )


@contextmanager
def open_run(params: RunParams, name: str, runs_dir: Path, bench: Bench) -> Iterator[Run]:
    """Take the lock of `runs_dir/name`, store the params there, and track the run until the block
    ends.

    Raises ArtifactError when the run has artifacts that were made with other params; nothing is
    changed then.
    """
    refuse_password(params.tracking.uri)
    folder = RunDir(runs_dir / name)
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.lock():
        _refuse_other_params(folder, params)
        gc.sweep(folder)
        atomic_write(folder.path / PARAMS, canonical_json(params.resolved()) + b"\n")
        with Tracker(folder.path, params, tags=lineage_tags(folder.path)) as tracker:
            yield Run(folder, params, bench, tracker)


def gpu_peak(work: Callable[[], Any], found: dict[str, float]) -> Any:
    """What `work` returns; the most memory that its tensors took goes to `found`, where there is a
    GPU."""
    if not torch.cuda.is_available():
        return work()
    torch.cuda.reset_peak_memory_stats()
    result = work()
    found["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def _refuse_other_params(folder: RunDir, params: RunParams) -> None:
    for name in planned(params):
        path = folder.stage_path(name)
        if name not in folder.shared and path.exists():
            artifact = Artifact.load(path)
            if artifact.params != (now := json.loads(json.dumps(params.reads(stage_of(name))))):
                raise stale(artifact, made_from(artifact) | {"params": now})


def old_file(artifact: Artifact) -> str:
    """The file that holds the old policy: a refresh's own, or the weights of the warm-up."""
    return OLD if artifact.stage == "refresh" else TRAINED
