"""SIGKILL at any moment, then the same command: the result is that of a run that was never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Imports once, then forks a process for each run: the imports take longer than the run.
SERVER = """
import json, os, sys, traceback
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from conftest import HashScorer
from diffusers import FluxFillPipeline
from transformers import AutoImageProcessor, SiglipVisionModel
from tasks.bench import Bench
from tasks.params import RunParams
from tasks.run import open_run
from tasks.summary import summarise

def train(params, folder, name):
    params, folder = RunParams.model_validate(params), Path(folder)
    bench = Bench(params, folder / "data", HashScorer())
    with open_run(params, name, folder, bench) as run:
        start = checkpoint = old = run.warmup()
        run.evaluate(0, checkpoint)
        for round in range(params.rounds):
            images = run.rollout(round, old)
            scores = run.score(round, images)
            advantages = run.advantage(round, scores)
            checkpoint = run.update(round, checkpoint, start, old, images, advantages)
            old = run.refresh(round, old, checkpoint)
            run.evaluate(round + 1, checkpoint)
        summarise(run, checkpoint)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            train(*json.loads(line))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
# Where the kills come: as soon as the work folder of this stage appears, or a little later.
MOMENTS = [
    "warmup",
    "round-0000/rollout",
    "round-0000/score",
    "round-0000/advantage",
    "round-0000/update",
    "round-0000/refresh",
    "round-0001/rollout",
    "round-0001/update",
    "round-0001/evaluate",
]


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(tests=str(Path(__file__).parent))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def start(server):
    """Start a run in a process of its own: (its pid, a function that waits for its exit status)."""

    def start(params, folder, name):
        server.stdin.write(json.dumps([params, str(folder), name]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), lambda: int(server.stdout.readline())

    return start


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_a_run_that_is_killed_in_every_stage_ends_as_one_that_never_was(start, values, tmp_path, algorithm):
    settings = values(
        algorithm,
        update={"checkpointing_steps": 1, "gradient_accumulation_steps": 1},
        warmup={"steps": 3, "checkpointing_steps": 1},
        evaluate={"every": 1},
    )
    _, status = start(settings, tmp_path, "whole")
    assert status() == 0
    whole = json.loads((tmp_path / "whole/summary.json").read_text())
    dice = random.Random(0)
    for moment in MOMENTS:
        pid, status = start(settings, tmp_path, "killed")
        work, done = (tmp_path / "killed" / f"{moment}{end}" for end in (".partial", ""))
        stop_at = time.monotonic() + 120
        while not work.exists() and not done.exists() and time.monotonic() < stop_at:
            time.sleep(0.0005)
        time.sleep(dice.choice([0.0, 0.002, 0.02]))
        os.kill(pid, signal.SIGKILL)
        assert status() == -signal.SIGKILL, moment
    _, status = start(settings, tmp_path, "killed")
    assert status() == 0
    resumed = json.loads((tmp_path / "killed/summary.json").read_text())
    assert resumed["adapter_digest"] == whole["adapter_digest"]
    left = [p for p in (tmp_path / "killed").rglob("*") if p.suffix == ".partial" or ".writing-" in p.name]
    assert left == []
