import os
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from flows import bench, bench_stages, stages
from tasks.launch.calls import StageCall
from tasks.launch.in_process import InProcess
from tasks.params.files import find_params_file
from tasks.params.run_params import load_params
from tasks.tracking.tracker import Tracker


class Clock:
    """In the place of `time`: it shows what was slept, however busy the machine is."""

    now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class FakeRun:
    """A run whose stages sleep: 0.2 s of work and 0.05 s of the artifact's own a stage."""

    sources = {"scored_by": lambda: {}}  # noqa: RUF012

    def __init__(self, clock):
        self.clock = clock

    def make(self, name):
        self.clock.sleep(0.05)  # hashing, fsync
        return InProcess(None).run(StageCall(name, {}), Path())


@pytest.fixture
def sleeping_run(monkeypatch):
    clock = Clock()

    def run(self, call, out):
        clock.sleep(0.2)
        os.fsync(7)

    def train(params, overrides, run, runs_dir):
        training = FakeRun(clock)
        stages.warmup(training)
        training.make("round-0000/rollout")
        Tracker.close(None)

    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(os, "fsync", lambda descriptor: clock.sleep(0.1))
    monkeypatch.setattr(InProcess, "run", run)
    monkeypatch.setattr(Tracker, "close", lambda self: clock.sleep(0.15))
    monkeypatch.setattr(stages, "warmup", lambda training: training.make("warmup"))
    monkeypatch.setattr(bench, "rl_train", train)
    return run


def test_orchestration_is_what_lies_between_the_stages_own_work_and_what_they_wait_for_the_disk(
    sleeping_run, tmp_path
):
    cost = bench.measure([], tmp_path)
    assert cost.rounds == pytest.approx(0.35)
    assert cost.working == pytest.approx(0.3)
    assert cost.syncing == pytest.approx(0.1)
    assert cost.closing == pytest.approx(0.15)
    assert cost.orchestration == pytest.approx(0.15 + cost.mirroring)
    assert InProcess.run is sleeping_run, "what was measured with is gone"


def test_mlflow_can_be_made_to_be_down_full_or_never_to_answer():
    def address(settings):
        return "127.0.0.1", int(settings[0].rpartition(":")[2])

    with (
        bench.mlflow_that_is("down") as settings,
        pytest.raises(ConnectionRefusedError),
        socket.create_connection(address(settings), timeout=5),
    ):
        pass
    with (
        bench.mlflow_that_is("slow") as settings,
        socket.create_connection(address(settings), timeout=0.2) as asked,
    ):
        asked.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(TimeoutError):
            asked.recv(1)
    with (
        bench.mlflow_that_is("full") as settings,
        pytest.raises(urllib.error.HTTPError, match="507"),
    ):
        urllib.request.urlopen(settings[0].removeprefix("tracking.uri="), b"{}", timeout=5)


def test_the_params_whose_stages_are_timed_beside_their_model_are_ones_that_a_run_may_have():
    given = ["launch.num_processes=2", *bench_stages.overrides("http://127.0.0.1:9")]
    params = load_params(find_params_file(bench_stages.PARAMS), given)
    assert params.reward.component_weights == {"text_size": 1.0}
