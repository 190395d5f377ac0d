"""What a stage costs beside its model's calls: `python -m flows.bench --ranks 2`.

1. A run of the tiny model in so many processes is timed stage by stage; a rule gives the rewards.
2. As many processes record the transformer's calls and the decoding that each rank had in a round,
   then repeat them side by side in a bare loop.
3. A rollout that finds all its shards is called again and again: what is left is dispatch, the
   median and the shortest, which other programs of the machine can lengthen least.
"""

import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from calligrapher.model.policy import Policy
from calligrapher.ranks import Ranks
from flows.contexts import opened_run
from tasks.artifacts.layout import RunsDir
from tasks.launch.calls import Launcher, StageAnswer, StageCall
from tasks.launch.dispatch import do
from tasks.launch.places import threads_of_a_rank
from tasks.params.files import find_params_file
from tasks.params.run_params import RunParams, load_params
from tasks.pipeline import stage_of
from tasks.runs.run import Run, resources_of
from tasks.stages import rollout

PARAMS, RULE = "tiny-nft", Path(__file__).parents[1] / "examples/rewards/text_size.py"
STAGES = ("rollout", "update")
DISPATCHES = 100
PATIENCE_S = 600  # for a rank of the bare loop


def stage_costs(ranks: int, rounds: int, settings: list[str], folder: Path) -> str:
    """Train `rounds` rounds, the first of them to warm up; return the table of what they cost."""
    with rule_server(folder) as url:
        given = [f"rounds={rounds}", f"launch.num_processes={ranks}", *overrides(url), *settings]
        params = load_params(find_params_file(PARAMS), given)
        with opened_run(params, folder / "bench") as run:
            timed = Timed(run.launcher)
            run.launcher = timed
            run.make_planned()
            calls = {stage_of(c.name): c for c in timed.calls}
            dispatch = _dispatch(timed.launcher, calls["rollout"], run, folder)
        bare = _bare(params, folder, [calls[stage] for stage in STAGES], ranks)
    lines = [f"{'stage':8} {'s a round':>10} {'bare loop, s':>13} {'ratio':>6}"]
    for stage in STAGES:
        wall = statistics.median(timed.seconds[stage][1:])
        lines.append(f"{stage:8} {wall:10.3f} {bare[stage]:13.3f} {wall / bare[stage]:6.3f}")
    median, shortest = 1000 * statistics.median(dispatch), 1000 * min(dispatch)
    told = f"dispatch of a stage: {median:.1f} ms, shortest of {DISPATCHES} {shortest:.1f} ms"
    return "\n".join([*lines, told, ""])


def overrides(url: str) -> list[str]:
    """Return what makes stages cost nothing but themselves: a rule's rewards, nothing to watch."""
    return [
        f"reward.server_urls=[{url}]",
        f"reward.scorers.text_size={RULE}:TextSize",
        "reward.weights.text_size=1.0",
        "reward.ocr_weight=0.0",
        "reward.likelihood_weight=0.0",
        "reward.style_weight=0.0",
        "advantage.per_letter=false",
        "launch.allow_fewer_servers=true",
        "tracking.enabled=false",
        "evaluate.every=0",
    ]


@contextmanager
def rule_server(folder: Path) -> Iterator[str]:
    """Yield the address of a reward server without any model."""
    from reward_server.processes.launch import local_server

    flags = ["--ocr-engine=none", f"--scorer=text_size={RULE}:TextSize"]
    with local_server(flags=flags, log_path=folder / "reward-server.log") as url:
        yield url


class Timed:
    """A launcher that notes the calls and how long each took."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.calls: list[StageCall] = []
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @property
    def samplers(self) -> int:
        return self.launcher.samplers

    def run(self, call: StageCall, out: Path) -> StageAnswer:
        began = time.perf_counter()
        answer = self.launcher.run(call, out)
        self.seconds[stage_of(call.name)].append(time.perf_counter() - began)
        self.calls.append(call)
        return answer

    def begin(self, call: StageCall, out: Path) -> None:
        self.launcher.begin(call, out)

    def committed(self, path: Path) -> None:
        self.launcher.committed(path)


def _dispatch(launcher: Launcher, call: StageCall, run: Run, folder: Path) -> list[float]:
    """Return the seconds of calls that find their work done; one before them scores it."""
    call, out = replace(call, ahead=folder / "ahead"), run.folder.stage_path(call.name)
    launcher.run(call, out)
    again = Timed(launcher)
    for _ in range(DISPATCHES):
        again.run(call, out)
    return again.seconds["rollout"]


class _Unheard(Ranks):
    """A rank that does its share and asks nobody."""

    def sum_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        pass

    def combine(
        self, values: Mapping[str, float], maxima: Callable[[str], bool] = lambda name: False
    ) -> dict[str, float]:
        return dict(values)

    def gather(self, what: Any) -> list[Any]:
        return [what]

    def barrier(self) -> None:
        pass


def _bare(params: RunParams, folder: Path, calls: list[StageCall], ranks: int) -> dict[str, float]:
    """Return the seconds of each stage's calls of the model alone: those of the slowest rank."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(ranks, timeout=PATIENCE_S)
    with ProcessPoolExecutor(
        ranks, mp_context=context, initializer=_meet_at, initargs=(barrier,)
    ) as pool:
        asked = [pool.submit(_repeat, params, folder, calls, rank, ranks) for rank in range(ranks)]
        for first in as_completed(asked):
            first.result()  # a rank's own error, before that of those who wait for it
        found = [answer.result() for answer in asked]
    return {stage: max(seconds[stage] for seconds in found) for stage in STAGES}


_barrier: Any = None


def _meet_at(barrier: Any) -> None:
    """A worker begins: where it meets the others."""
    global _barrier
    _barrier = barrier


def _repeat(
    params: RunParams, folder: Path, calls: list[StageCall], rank: int, ranks: int
) -> dict[str, float]:
    """Be a rank that does the stages once, then their calls of the model alone, as long as all;
    return the seconds of each stage's calls."""
    try:
        return _seconds(params, folder, calls, rank, ranks)
    except BaseException:
        _barrier.abort()
        raise


def _seconds(
    params: RunParams, folder: Path, calls: list[StageCall], rank: int, ranks: int
) -> dict[str, float]:
    torch.set_num_threads(threads_of_a_rank(ranks))
    with opened(params, folder) as resources:
        resources.ranks = _Unheard(rank, ranks)
        seconds = {}
        for call in calls:
            recorded: list[Callable[[], None]] = []
            with recording(recorded), tempfile.TemporaryDirectory() as out:
                ahead = {"ahead": Path(out) / "ahead"} if call.ahead else {}
                do(replace(call, **ahead), resources, Path(out))
            times = []
            for _ in range(3):
                _barrier.wait()
                began = time.perf_counter()
                for repeat in recorded:
                    repeat()
                times.append(time.perf_counter() - began)
            seconds[stage_of(call.name)] = statistics.median(times)
        return seconds


@contextmanager
def opened(params: RunParams, folder: Path) -> Iterator[Any]:
    """Yield what the stages of the run work with, in this process alone."""
    from flows.contexts import lazy_scorer

    runs = RunsDir(folder)
    with lazy_scorer(params, folder / "bench", runs.data) as scorer:
        yield resources_of(params, runs, scorer)


@contextmanager
def recording(recorded: list[Callable[[], None]]) -> Iterator[None]:
    """Note the calls of transformer and decoder, as functions that repeat them."""
    velocity, decoded = Policy.velocity, rollout.pictures

    def of_policy(policy: Policy, *given: Any, **named: Any) -> torch.Tensor:
        trains = torch.is_grad_enabled()

        def repeat() -> None:
            with contextlib.nullcontext() if trains else torch.no_grad():
                found = velocity(policy, *given, **named)
            if trains:
                found.backward(torch.ones_like(found))

        recorded.append(repeat)
        return velocity(policy, *given, **named)

    def of_decoder(*given: Any) -> Any:
        recorded.append(lambda: decoded(*given) and None)
        return decoded(*given)

    with patch.object(Policy, "velocity", of_policy), patch.object(rollout, "pictures", of_decoder):
        yield
