"""What a start of a run would make, in which order, in about what time and on how much disk."""

import itertools
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from calligrapher.errors import CalligrapherError
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import EVALUATE, PARAMS, PARTIAL_SUFFIX, PREVIEW
from tasks.artifacts.run_dir import RunDir
from tasks.params.run_params import RunParams
from tasks.pipeline import ROUND, evaluated, planned, round_of, rounds_done, stage_of
from tasks.planning.cost import cost, price
from tasks.planning.work import disk, forwards, rounds_made
from tasks.reports.status import ended_by, run_params
from tasks.reports.words import duration, size
from tasks.runs.run import refuse_other_params

STATES = ("there", "unfinished", "missing")
REFILLED = ("rollout", "score")  # what a refill makes more of
Pace = Callable[[str], float | None]  # name of an artifact -> seconds that it takes


@dataclass(frozen=True)
class Step:
    """One artifact: whether it is there, unfinished or missing, and what is left of its time."""

    name: str
    state: str
    seconds: float | None  # None = not reckoned; 0 where it is there

    @property
    def kind(self) -> str:
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class DryRun:
    """What `dry_run` found. disk: bytes of the whole run by kind; there, free: bytes now.

    pace: the name of the run whose rounds the times are reckoned from; None where there is none.
    refill: how often a round may be refilled. alarm: `evaluate.stop_on_alarm` may end the run
    early; ended_by: it has done so, for these measures, and a start makes no further round.
    """

    run: Path
    algorithm: str
    rounds: int
    steps: list[Step]
    pace: str | None
    refill: int
    alarm: bool
    ended_by: str | None
    disk: dict[str, int]
    there: int
    free: int

    @property
    def fits(self) -> bool:
        return sum(self.disk.values()) - self.there <= self.free

    @property
    def seconds(self) -> float:
        """What is left to do, as far as it is reckoned."""
        return sum(step.seconds or 0 for step in self.steps)

    @property
    def at_most(self) -> float:
        """The same with every refill that `rollout.refill` allows, and its scores."""
        refilled = [s for s in self.steps if s.state != "there" and s.kind in REFILLED]
        return self.seconds + self.refill * sum(step.seconds or 0 for step in refilled)

    def text(self) -> str:
        """The stages in order, time and disk for a terminal."""
        made = sum(step.state == "there" for step in self.steps)
        lines = [
            "A dry run: nothing is made.",
            f"{self.run}: {self.algorithm}, {self.rounds} rounds, {made} of {len(self.steps)}"
            " artifacts are there",
        ]
        return "\n".join([*lines, *self._order(), *self._alarm(), self._time(), self._disk()])

    def _order(self) -> Iterator[str]:
        trained = [s for s in self.steps if stage_of(s.name) != EVALUATE]
        by_round = itertools.groupby(trained, lambda s: round_of(s.name))
        yield from _rounds([list(steps) for _, steps in by_round])
        for kind, state in itertools.product((EVALUATE, PREVIEW), STATES):
            steps = [s for s in self.steps if (s.kind, s.state) == (kind, state)]
            if steps:
                done = [str(rounds_done(s.name)) for s in steps]
                when = ", ".join([*done[:4], "...", done[-1]] if len(done) > 6 else done)
                yield _line(kind, f"after {when} rounds ({state})", steps)

    def _alarm(self) -> Iterator[str]:
        if self.ended_by:
            yield (
                f"evaluate.stop_on_alarm has ended the run after {self.rounds} rounds"
                f" ({self.ended_by}); with false it goes on"
            )
        elif self.alarm:
            yield "evaluate.stop_on_alarm may end the run after any evaluation but the first"

    def _time(self) -> str:
        left = [step for step in self.steps if step.state != "there"]
        if not left:
            return "time: nothing is left to do"
        if self.pace is None:
            return (
                "time: not reckoned, for no run beside this one has a finished round;"
                " `calligrapher plan PARAMS --tflops N` tells a round's at a GPU's speed"
            )
        unknown = sorted({step.kind for step in left if step.seconds is None})
        without = f", without {', '.join(unknown)}" if unknown else ""
        most = f", up to {duration(self.at_most)} with all refills" if self.refill else ""
        return f"time: about {duration(self.seconds)}{most}{without}, at the pace of {self.pace}"

    def _disk(self) -> str:
        parts = ", ".join(f"{kind} {size(count)}" for kind, count in self.disk.items())
        total = size(sum(self.disk.values()))
        room = f"{size(self.there)} are there, {size(self.free)} free"
        verdict = "" if self.fits else ": too little. Keep fewer rounds (retention), or free some"
        return f"disk: at most {total} in the end ({parts}); {room}{verdict}"


def dry_run(params: RunParams, run: Path) -> DryRun:
    """Return what a start of the run in the folder `run` would make; nothing is written.

    Raises ArtifactError where a start would refuse what is there: it was made with other params.
    """
    folder = RunDir(run)
    refuse_other_params(folder, params)
    pace, of_run = _pace(params, run)
    refreshes = [name for name in planned(params) if stage_of(name) == "refresh"]
    made = sum(folder.stage_path(name).exists() for name in refreshes)
    ended = ended_by(run, params, made)
    rounds = made if ended else rounds_made(params)
    steps = [_step(folder, name, pace) for name in planned(params, rounds)]
    there = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    return DryRun(
        run=run,
        algorithm=params.algorithm,
        rounds=rounds,
        steps=steps,
        pace=of_run,
        refill=params.rollout.refill,
        alarm=params.evaluate.stop_on_alarm,
        ended_by=ended,
        disk=disk(params),
        there=there,
        free=shutil.disk_usage(_existing(run)).free,
    )


def _step(folder: RunDir, name: str, pace: Pace) -> Step:
    path = folder.stage_path(name)
    if path.exists():
        return Step(name, "there", 0.0)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    return Step(name, "unfinished" if partial.exists() else "missing", pace(name))


def _pace(params: RunParams, run: Path) -> tuple[Pace, str | None]:
    """Return how long a stage takes, and which run's rounds say so: this one's, or the newest
    beside it, of which the times are scaled by the operations that each run's model takes."""
    others = sorted(
        (path.parent for path in run.absolute().parent.glob(f"*/{PARAMS}")),
        key=lambda folder: (folder.name == run.name, (folder / PARAMS).stat().st_mtime),
    )
    for folder in reversed(others):
        try:
            its = params if folder.name == run.name else run_params(folder)
            measured = _measured(folder, its)
            if {"rollout", "update"} <= measured.keys():
                return _scaled(params, its, measured), folder.name
        except (CalligrapherError, OSError):
            continue  # a run that cannot be read says nothing about time
    return lambda name: None, None


def _measured(folder: Path, params: RunParams) -> dict[str, float]:
    """Return the mean seconds of each kind of artifact that a run has made."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for name in planned(params):
        path = RunDir(folder).stage_path(name)
        if path.exists():
            seconds[name.rpartition("/")[2]].append(Artifact.load(path).manifest.seconds)
    return {kind: sum(each) / len(each) for kind, each in seconds.items()}


def _scaled(params: RunParams, other: RunParams, measured: dict[str, float]) -> Pace:
    if params is other:
        factors = dict.fromkeys(ROUND, 1.0)
    else:
        mine, its = (price(p, cost(p), tflops=1).seconds for p in (params, other))
        factors = {stage: mine[stage] / its[stage] for stage in ("rollout", "update")}
        images = params.images_per_round / other.images_per_round
        factors |= dict.fromkeys(("score", "advantage"), images) | {"refresh": 1.0}
    a_forward = measured["rollout"] * factors["rollout"]
    a_forward /= params.images_per_round * forwards(params).rollout

    def pace(name: str) -> float | None:
        kind = name.rpartition("/")[2]
        if kind in factors and kind in measured:
            return measured[kind] * factors[kind]
        if stage_of(name) == EVALUATE:
            if params is other and kind in measured:
                return measured[kind]
            return a_forward * math.prod(evaluated(name, params)) * params.evaluation_steps
        return 0.0 if params.warmup.steps == 0 else None

    return pace


def _rounds(rounds: list[list[Step]]) -> Iterator[str]:
    """Yield a line for each stretch of rounds of which the same is there and missing."""
    for _, alike in itertools.groupby(rounds, lambda steps: [(s.kind, s.state) for s in steps]):
        stretch = list(alike)
        first, last = (steps[0].name.split("/")[0] for steps in (stretch[0], stretch[-1]))
        kinds = {
            state: ", ".join(s.kind for s in stretch[0] if s.state == state) for state in STATES
        }
        whole = {s.state for s in stretch[0]} == {"there"} or len(stretch[0]) == 1
        told = "; ".join(f"{names} {state}" for state, names in kinds.items() if names)
        yield _line(
            first if first == last else f"{first} .. {last}",
            stretch[0][0].state if whole else told,
            itertools.chain(*stretch),
        )


def _line(where: str, what: str, steps: Iterable[Step]) -> str:
    seconds = [step.seconds for step in steps if step.state != "there"]
    known = [each for each in seconds if each is not None]
    took = f"  {duration(sum(known))}" if sum(known) else ""
    return f"  {where:<26}{what}{took}"


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
