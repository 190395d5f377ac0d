"""The flow hands each stage the artifacts that the pipeline's table names."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from flows import rl_train, stages
from tasks.pipeline import ROUND, name_of, parents


@pytest.mark.parametrize("staleness", [0, 1])
def test_each_stage_is_made_from_what_the_pipeline_says(monkeypatch, staleness):
    params = SimpleNamespace(rounds=4, rollout=SimpleNamespace(staleness=staleness))
    made, begun = {}, []

    @contextmanager
    def run(*args):
        yield SimpleNamespace(
            params=params,
            begin_rollout=lambda r: begun.append((r, list(made)[-1])),
            over=lambda rounds_done, checkpoint: False,
            summarise=lambda checkpoint: SimpleNamespace(reward_hacking=[], last=checkpoint),
        )

    def stage(stage):
        def make(training, round_index, **inputs):
            made[name_of(stage, round_index)] = inputs
            return name_of(stage, round_index)

        return make

    monkeypatch.setattr(rl_train, "training_run", run)
    monkeypatch.setattr(stages, "warmup", lambda training: "warmup")
    monkeypatch.setattr(stages, "evaluate", lambda *args, **inputs: None)
    for name in ROUND:
        monkeypatch.setattr(stages, name, stage(name))
    assert rl_train.rl_train.fn().last == "round-0003/update"
    assert made == {name: parents(name, staleness) for name in made}
    assert len(made) == 4 * len(ROUND)
    assert begun == [(r + 1, f"round-000{r}/advantage") for r in range(4)]
