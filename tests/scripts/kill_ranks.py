"""Kills ranks and parents of runs of several processes: `kill_proof.py --ranks 2 --kills 20`.

Each kill takes one process of the run, the parent or a rank, at a random time after a random stage
has begun. What is left must end within ten seconds; then the same run is started again.
"""

import itertools
import json
import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
from kill_proof import begun, digest, in_a_child, leftovers, twice
from scripted import Script, hash_scored

from calligrapher.data.canvas import Canvas
from tasks.artifacts.layout import RunsDir
from tasks.launch.rank_group import RankGroup
from tasks.launch.rank_process import LOG
from tasks.launch.spawned import Spawned
from tasks.params.run_params import RunParams
from tasks.pipeline import planned, stage_of
from tasks.reports.verify import verify
from tasks.resources.rewards import RewardScorer
from tasks.runs.run import open_run, resources_of

KILLS_OF_A_RUN = 10
NEXT = 4  # the artifact to strike in is drawn among so many that come next: few are passed over
END_S = 10.0  # for all that a kill leaves behind


@contextmanager
def reward_server() -> Iterator[str]:
    """The address of a server in a process of its own, whose rewards the pictures' bytes decide."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(writing, Script(hash_scored).url.encode())
        while True:
            signal.pause()
    try:
        yield os.read(reading, 100).decode()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def train(params: RunParams, runs: Path, name: str) -> None:
    """Make all artifacts of the run that are not there yet, in ranks of its own.

    `NAME.log` gets each artifact that it begins with, and when.
    """
    m = params.model
    canvas = Canvas(m.width, m.height, m.reference_context)
    scorer = RewardScorer(params.reward, lambda: params.reward.server_urls, canvas)
    resources = resources_of(params, RunsDir(runs), scorer)
    group = RankGroup(
        resources,
        Spawned(runs / name / "logs", []),
        size=params.launch.size,
        samplers=params.launch.rollout_processes,
        servers=lambda: params.reward.server_urls,
        runs_dir=runs,
        logs=runs / name / "logs",
    )
    with (
        open_run(resources, runs / name, launcher=group) as run,
        closing(group),
        (runs / f"{name}.log").open("w") as log,
    ):

        def make(run, artifact):
            log.write(json.dumps([artifact, time.monotonic()]) + "\n")
            log.flush()
            return run.make(artifact)

        run.make_planned(make=make)
        log.write(json.dumps(["end", time.monotonic()]) + "\n")
        run.summarise(run.newest_update())


def start(params: RunParams, runs: Path, name: str) -> psutil.Process:
    """Fork a process that trains."""
    (runs / f"{name}.log").unlink(missing_ok=True)
    if pid := os.fork():
        return psutil.Process(pid)
    os.setsid()
    errors = (runs / f"{name}.errors").open("a")
    os.dup2(errors.fileno(), 2)
    try:
        train(params, runs, name)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ranks_of(folder: Path) -> list[psutil.Process]:
    """The ranks of the run in `folder`, in their order, whoever their parent is."""
    found = {}
    for process in psutil.process_iter():
        try:
            log = process.environ().get(LOG, "")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if log.startswith(f"{folder}/") and process.status() != psutil.STATUS_ZOMBIE:
            found[log] = process
    return [found[log] for log in sorted(found)]


def status_of(process: psutil.Process) -> int:
    """Wait for its end; its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])


def begins(runs: Path, name: str, victim: str, parent: psutil.Process) -> bool:
    """Wait until the run begins with the artifact `victim`; whether it does before it ends."""
    log = runs / f"{name}.log"
    while parent.status() != psutil.STATUS_ZOMBIE:
        if log.exists() and any(artifact == victim for artifact, _ in begun(runs, name)):
            return True
        time.sleep(0.02)
    return False


def under_way(runs: Path, name: str) -> str:
    """The stage that the run has begun with last; `start` before the first."""
    there = begun(runs, name) if (runs / f"{name}.log").exists() else []
    return stage_of(there[-1][0]) if there else "start"


def kill(
    params: RunParams, runs: Path, name: str, dice: random.Random, seconds: dict[str, float]
) -> tuple[str, str] | str | None:
    """Start the run and kill one of its processes; (who, in which stage), or what was wrong.

    The time is drawn by how long the stage took in the run that was never killed; it may have ended
    by then, and the next one is struck. None where the run had ended before.
    """
    folder = runs / name
    left = [a for a in planned(params) if not (folder / a).exists()]
    victim, who = dice.choice(left[:NEXT]), dice.randrange(params.launch.size + 1)
    parent = start(params, runs, name)
    if begins(runs, name, victim, parent):
        time.sleep(dice.uniform(0, seconds[victim]))
    processes = [parent, *ranks_of(folder)]
    who = who if who < len(processes) else 0  # the ranks may not be there yet
    over = parent.status() == psutil.STATUS_ZOMBIE
    stage = under_way(runs, name)
    if not over:
        processes[who].kill()
    killed = time.monotonic()
    while ranks_of(folder) or parent.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() - killed > END_S:
            alive = [p.pid for p in ranks_of(folder)]
            return f"{END_S:g} s after the kill of {who} in {stage} these were alive: {alive}"
        time.sleep(0.05)
    status_of(parent)
    return None if over else ("parent" if who == 0 else "rank", stage)


def prove(params: RunParams, runs: Path, name: str, dice: random.Random, kills: int) -> dict:
    """Kill the run `name` at most `kills` times and let it end; the outcome."""
    times = itertools.pairwise(begun(runs, "whole"))
    seconds = {artifact: end - began for (artifact, began), (_, end) in times}
    hits, wrong = Counter(), []
    for _ in range(kills):
        found = kill(params, runs, name, dice, seconds)
        if isinstance(found, str):
            wrong.append(found)
        elif found is not None:
            hits[" in ".join(found)] += 1
        if all((runs / name / a).exists() for a in planned(params)):
            break
    last = start(params, runs, name)
    errors = runs / f"{name}.errors"
    assert status_of(last) == 0, "the run must end when nobody kills it: " + errors.read_text()
    return {
        "hits": hits,
        "same_digest": digest(runs, name) == digest(runs, "whole"),
        "leftovers": wrong + leftovers(runs / name, [last.pid]),
        "twice": in_a_child(twice, runs / name, mlflow=False),
        "damaged": verify(runs / name).problems,
    }


def prove_all(params: RunParams, runs: Path, dice: random.Random, kills: int) -> Iterator[dict]:
    """Kill runs of the params until there were `kills` kills; the outcome of each run."""
    runs.mkdir(parents=True)
    whole = start(params, runs, "whole")
    assert status_of(whole) == 0, (runs / "whole.errors").read_text()
    done = 0
    for number in itertools.count():
        most = min(KILLS_OF_A_RUN, kills - done)
        found = prove(params, runs, f"killed-{number}", dice, most)
        done += sum(found["hits"].values())
        yield found
        if done >= kills:
            return
