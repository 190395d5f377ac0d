"""What an update may take from a rollout that was sampled under other params."""

import pytest
import torch

from calligrapher.errors import ParamsError
from tasks.artifacts.run_dir import RunDir
from tasks.stages.training_rows import training_rows

TOGETHER = {"rollout": {"shared_trunk": True}, "grpo": {"noise": "group"}}


def rows_of(folder, resources):
    run = RunDir(folder)
    inputs = [run.load(f"round-0000/{stage}") for stage in ("rollout", "advantage")]
    rows = training_rows(resources, *inputs)
    return rows.pick(list(range(len(rows))))


def test_images_are_one_in_a_step_only_where_the_rollout_sampled_them_so(train, make_resources):
    apart, _ = train("apart", "grpo", rounds=1)
    forked = make_resources("grpo", rounds=1, **TOGETHER)
    assert rows_of(apart, forked).window.trunks is None
    together, _ = train("together", "grpo", rounds=1, **TOGETHER)
    found = rows_of(together, make_resources("grpo", rounds=1))
    assert found.window.trunks.tolist() == found.places[:, 0].tolist()
    for group in found.window.trunks.unique():
        first = found.window.trajectory[found.window.trunks == group, 0]
        # Not to the bit: parts of a group that shards cut were walked apart.
        torch.testing.assert_close(first, first[:1].expand_as(first))


def test_images_that_started_from_noise_of_their_own_are_not_compared(train, make_resources):
    folder, _ = train("a", "grpo", rounds=1)
    along = {"noise": "group", "direction": "image"}
    with pytest.raises(ParamsError, match=r"grpo\.noise must have been 'group' .* Got 'row'"):
        rows_of(folder, make_resources("grpo", rounds=1, grpo=along))
    folder, _ = train("b", "nft", rounds=1)
    with pytest.raises(ParamsError, match=r"grpo\.noise must have been 'group' .* Got None"):
        rows_of(folder, make_resources("grpo", rounds=1, grpo=along))
    folder, _ = train("c", "grpo", rounds=1, grpo={"noise": "group"})
    found = rows_of(folder, make_resources("grpo", rounds=1, grpo=along))
    for group in found.places[:, 0].unique():
        own = found.places[:, 0] == group
        assert own.sum() == 3
        expected = found.x0[own] - found.x0[own].mean(0)
        torch.testing.assert_close(found.deviation[own], expected)
