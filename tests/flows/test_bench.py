import time

import pytest

from flows import bench
from tasks import stages
from tasks.artifacts import RunDir


def test_overhead_is_what_lies_between_the_stages_own_work(tmp_path, monkeypatch):
    def ensured(self, name, build):
        time.sleep(0.05)  # hashing, fsync
        return build(tmp_path)

    def train(params, overrides, run, runs_dir):
        folder = RunDir(tmp_path / run)
        stages.warmup(folder)
        folder.ensure("round-0000/rollout", lambda out: time.sleep(0.15))

    monkeypatch.setattr(RunDir, "ensure", ensured)
    monkeypatch.setattr(stages, "warmup", lambda run: run.ensure("warmup", lambda out: time.sleep(0.3)))
    monkeypatch.setattr(bench, "rl_train", train)
    clock = bench.Clock()
    share = bench.overhead(clock, [], tmp_path)
    assert share == pytest.approx(0.05 / 0.2, rel=0.3)
    assert clock.rounds == pytest.approx(0.2, rel=0.3)
    assert RunDir.ensure is ensured
