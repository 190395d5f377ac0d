"""One training run: its folder, params and tracker, and the one way to make an artifact of it.

Read `tasks/pipeline.py` first: which artifacts there are, and what each is made from. The stages
are plain functions in `tasks/stages/`; a launcher calls them (`tasks/launch/`).
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from calligrapher.durable import atomic_write
from calligrapher.rl.train_state import STATE
from calligrapher.threads import machine
from tasks import pipeline
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.digests import canonical_json
from tasks.artifacts.layout import (
    EVALUATE,
    PARAMS,
    PARTIAL_SUFFIX,
    RunsDir,
    evaluation_name,
    round_number,
)
from tasks.artifacts.provenance import Provenance, fingerprint
from tasks.artifacts.run_dir import RunDir, stale
from tasks.evaluation.alarm import Alarm
from tasks.launch.calls import Launcher, StageCall
from tasks.launch.in_process import InProcess
from tasks.params.run_params import RunParams
from tasks.progress import Progress
from tasks.reports.summary import Summary, summarise
from tasks.resources.cases import Cases
from tasks.resources.resources import Resources
from tasks.resources.rewards import RewardScorer
from tasks.runs import retention
from tasks.runs.after_stage import AfterStage
from tasks.stages.reweigh import can_reweigh
from tasks.stages.score import AHEAD
from tasks.tracking.pointer import lineage_tags, refuse_password
from tasks.tracking.tracker import Tracker
from tasks.weights.model_files import model_files

logger = logging.getLogger(__name__)


class Run:
    """A run that this process holds the lock of. Build it with `open_run`.

    built: names of the artifacts that this process made.
    """

    def __init__(
        self, folder: RunDir, resources: Resources, tracker: Tracker, launcher: Launcher
    ) -> None:
        self.folder, self.resources = folder, resources
        self.tracker, self.launcher = tracker, launcher
        self.sources = resources.sources
        self.after_stage = AfterStage(folder, tracker, resources.params)
        self._alarm = Alarm(resources.cases)
        self.started = time.monotonic()
        self.built: set[str] = set()

    @property
    def params(self) -> RunParams:
        return self.resources.params

    def has(self, name: str) -> bool:
        """Whether the artifact `name` is made."""
        return self.folder.stage_path(name).exists()

    def make(self, name: str, **inputs: Artifact) -> Artifact:
        """Return the artifact `name` made from `inputs`: the one that is there, or built now.

        inputs: by the names of the pipeline's table; without any, the run's own artifacts. What
        the stage measured is tracked. Raises ArtifactError as `RunDir.ensure` does.
        """
        inputs = inputs or self._inputs(name)
        cost: dict[str, float] = {}
        is_new = False
        if name in self.folder.shared:
            artifact = self.folder.load(name)
        else:
            asked = self._provenance(name, inputs)
            is_new = not self.has(name)

            def build(out: Path) -> dict[str, Any]:
                answer = self.launcher.run(self._call(name, inputs), out)
                cost.update(answer.cost)
                return answer.meta

            artifact = self.folder.ensure(name, asked, build, inputs=inputs.values())
            if is_new:
                self.built.add(name)
                self.launcher.committed(artifact.path)
        self.after_stage(name, artifact, is_new=is_new, cost=cost)
        return artifact

    def make_planned(
        self,
        names: Iterable[str] | None = None,
        make: "Callable[[Run, str], Artifact] | None" = None,
    ) -> Artifact | None:
        """Make the artifacts `names` in order, each from the run's own; return the last of them.

        names: default, all that are planned. make: does one of them, in place of `Run.make`.
        Ends where the run is over, after the evaluation that is due then.
        """
        artifact = None
        names = pipeline.planned(self.params) if names is None else list(names)
        for name in names:
            stage = pipeline.stage_of(name)
            if stage == pipeline.ROUND[0] and self._ended_before(name):
                break
            if stage == EVALUATE:
                checkpoint = self._inputs(name)["checkpoint"]
                name = self.due_evaluation(pipeline.rounds_done(name), checkpoint) or name
            if stage == "update":
                following = pipeline.round_of(name) + 1
                if pipeline.name_of("rollout", following) in names:
                    self.begin_rollout(following)
            artifact = make(self, name) if make else self.make(name)
        return artifact

    def begin_rollout(self, round_index: int) -> None:
        """Let the ranks that only sample begin with a round whose `make` comes later.

        The update of the round before may be missing. Nothing is begun where no rank is free for
        it, or where that update may be the last.
        """
        name = pipeline.name_of("rollout", round_index)
        if not self.launcher.samplers or round_index >= self.params.rounds:
            return
        newest = self.folder.load(pipeline.name_of("update", round_index - 2))
        if self.finished(newest, after=self.params.updates_per_round):
            return
        inputs = self._inputs(name)
        asked = self._provenance(name, inputs)
        out = self.folder.begin(name, asked, inputs=inputs.values())
        if out is not None:
            self.launcher.begin(self._call(name, inputs), out)

    def finished(self, checkpoint: Artifact, *, after: int = 0) -> bool:
        """Whether `checkpoint` has `update.max_train_steps`: more rounds would change nothing.

        after: so many more steps.
        """
        limit = self.params.update.max_train_steps
        if limit is None or checkpoint.stage != "update":
            return limit is not None and after >= limit
        return json.loads(checkpoint.file(STATE).read_text())["step"] + after >= limit

    def over(self, rounds_done: int, checkpoint: Artifact) -> bool:
        """Whether no round follows the first `rounds_done`, whose last update is `checkpoint`."""
        return self.finished(checkpoint) or bool(self.alarm(rounds_done))

    def alarm(self, rounds_done: int) -> list[str]:
        """Return what falls while the reward rises, where the evaluation then ends the run.

        [] without `evaluate.stop_on_alarm`, and where the next round is there already: the run has
        gone on once, and only a later evaluation can end it.
        """
        name, following = evaluation_name(rounds_done), pipeline.name_of("rollout", rounds_done)
        watched = self.params.evaluate.stop_on_alarm and rounds_done > 0
        if not watched or not self.has(name) or self.has(following):
            return []
        scores = [self.folder.load(pipeline.name_of("score", r)) for r in range(rounds_done)]
        return self._alarm.raised(
            self.folder.load(name),
            self.folder.load(evaluation_name(0)),
            [score.meta["reward_mean"] for score in scores],
        )

    def newest_update(self) -> Artifact:
        """Return the update of the last round that was made."""
        names = [n for n in pipeline.planned(self.params) if pipeline.stage_of(n) == "update"]
        return self.folder.load([name for name in names if self.has(name)][-1])

    def summarise(self, last: Artifact) -> Summary:
        """Write `summary.json` and the closing picture; `last` is the update that ends the run."""
        return summarise(
            self.folder,
            self.params,
            self.tracker,
            last=last,
            evaluation_cases=lambda: self.resources.cases.evaluation,
            seconds=time.monotonic() - self.started,
            reward_hacking=self.alarm(round_number(last.path.parent.name) + 1),
        )

    def due_evaluation(self, rounds_done: int, checkpoint: Artifact) -> str | None:
        """Return the name of the evaluation after so many rounds; None where the run has none."""
        last = rounds_done == self.params.rounds or self.finished(checkpoint)
        return pipeline.due_evaluation(self.params, rounds_done, last=last)

    def _inputs(self, name: str) -> dict[str, Artifact]:
        made_from = pipeline.parents(name, self.params.rollout.staleness)
        return {key: self.folder.load(other) for key, other in made_from.items()}

    def _provenance(self, name: str, inputs: dict[str, Artifact]) -> Provenance:
        digests = {key: artifact.digest for key, artifact in inputs.items()}
        return pipeline.provenance(name, self.params, self.sources, digests)

    def _call(self, name: str, inputs: dict[str, Artifact]) -> StageCall:
        call = StageCall(name, {key: artifact.path for key, artifact in inputs.items()})
        match pipeline.stage_of(name):
            case "rollout":
                return replace(call, ahead=self._ahead(name))
            case "score":
                earlier = self._earlier_scores(name, inputs["rollout"])
                return replace(call, ahead=self._ahead(name), earlier=earlier)
            case "evaluate":
                num_cases, images_per_case = pipeline.evaluated(name, self.params)
                return replace(call, num_cases=num_cases, images_per_case=images_per_case)
        return call

    def _ended_before(self, rollout: str) -> bool:
        """Whether the run is over before the round of `rollout`."""
        round_index = pipeline.round_of(rollout)
        before = pipeline.name_of("update", round_index - 1)
        return self.has(before) and self.over(round_index, self.folder.load(before))

    def _earlier_scores(self, name: str, rollout: Artifact) -> Path | None:
        """Return the parent's scores of the same images by the same scorer, if they suffice."""
        fork = self.folder.fork
        path = fork and self.folder.path / fork.parent / name
        if not path or not path.is_dir():
            return None
        earlier = Artifact.load(path)
        same = earlier.inputs["rollout"] == rollout.digest
        same = same and earlier.manifest.extra["scored_by"] == self.sources["scored_by"]()
        return path if same and can_reweigh(earlier, self.params) else None

    def _ahead(self, name: str) -> Path:
        """Return where the scores of a round wait; another way of scoring never finds them."""
        stage = pipeline.STAGES["score"]
        reads = pipeline.reads(self.params, stage.name)
        scored_by = self.sources["scored_by"]()
        key = fingerprint("ahead", stage.version, reads, {}, scored_by=scored_by)
        folder = self.folder.stage_path(name).parent
        return folder / f"{AHEAD}{key[:12]}{PARTIAL_SUFFIX}"


def resources_of(
    params: RunParams,
    runs: RunsDir,
    scorer: RewardScorer,
    *,
    progress: Callable[..., Progress] = Progress,
) -> Resources:
    """Return what the stages of a run below `runs` work with; nothing is loaded yet.

    Raises ParamsError or CheckpointError when the params name a model that is none.
    """
    files, cases = model_files(params.model, runs.path), Cases(params, runs.data)
    return Resources(params, files, cases, scorer, progress=progress)


@contextmanager
def open_run(
    resources: Resources, path: Path, *, launcher: Launcher | None = None
) -> Iterator[Run]:
    """Take the lock of the run in the folder `path` and track it until the block ends.

    Its params are stored there. launcher: default, this process. Raises ParamsError for a password
    in `tracking.uri`, ArtifactError when the run has artifacts that were made with other params
    (nothing is changed then), RunLockedError when another process works on it.
    """
    params = resources.params
    refuse_password(params.tracking.uri)
    folder = RunDir(path)
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.lock():
        refuse_other_params(folder, params)
        _tell_other_machine(folder, params)
        retention.remove_leftovers(folder)
        atomic_write(folder.path / PARAMS, canonical_json(params.resolved()) + b"\n")
        with Tracker(folder.path, params, tags=lineage_tags(folder.path)) as tracker:
            yield Run(folder, resources, tracker, launcher or InProcess(resources))


def _tell_other_machine(folder: RunDir, params: RunParams) -> None:
    """Warn where ranks, threads or processor of the newest artifact were others than they are."""
    there = [name for name in pipeline.planned(params) if folder.stage_path(name).exists()]
    if not there:
        return
    made_by, now = Artifact.load(folder.stage_path(there[-1])).manifest.code, machine()
    changes = [
        f"{key}: {made_by[key]} -> {value}"
        for key, value in now.items()
        if made_by.get(key, value) != value
    ]
    if changes:
        logger.warning(
            "%s goes on with %s. Its results stay right, but are equal to the bit only on equal"
            " machines (set launch.num_processes and OMP_NUM_THREADS as they were for that)",
            folder.path.name,
            "; ".join(changes),
        )


def refuse_other_params(folder: RunDir, params: RunParams) -> None:
    """Raise ArtifactError where the run has artifacts that were made with other params."""
    for name in pipeline.planned(params):
        path = folder.stage_path(name)
        if name not in folder.shared and path.exists():
            there = Artifact.load(path)
            now = replace(there.provenance, params=pipeline.reads(params, pipeline.stage_of(name)))
            if there.params != now.as_dict()["params"]:
                raise stale(there, now)
