"""What a round costs, against the calls and bytes of real rounds of a tiny model."""

from collections import Counter
from itertools import product
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from calligrapher.sampling.calls import from_trunks
from tasks.launch import dispatch
from tasks.params.run_params import RunParams, load_params
from tasks.planning import scale
from tasks.planning.cost import cost, price
from tasks.planning.memory import memory
from tasks.planning.scale import scale_table
from tasks.planning.work import forwards

TENSORS = ("x0", "trajectory", "log_prob", "window_sigmas", "mean_old")
ANEW = {"recompute_log_prob": True, "kl_coef": 0.0}
HELD = {"background_coef": 0.1, "background_rows": 2}


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("nft", {"kl_coef": 0.0, "num_train_sigmas": 2, "old_policy": "copy"}),
        ("grpo", {"kl_coef": 0.1, "window_size": 2, "guard": True}),
        ("grpo", {"kl_coef": 0.0, "trust_region": "dppo", "recompute_log_prob": True}),
        ("awm", {"kl_coef": 0.0, "num_train_sigmas": 2}),
        ("nft", {"timestep_fraction": 0.3, **HELD}),
        ("grpo", {"window_size": 1, "timestep_fraction": 0.5, **HELD}),
        ("grpo", {"window_size": 1, "timestep_fraction": 0.3, "noise": "group", **HELD}),
        ("grpo", {"window_size": 2, "timestep_fraction": 0.5, "kl_coef": 0.1, "noise": "group"}),
        ("grpo", {"window_size": 1, "timestep_fraction": 0.3, "noise": "group", **ANEW}),
    ],
)
def test_calls_and_bytes_are_those_of_a_real_round(algorithm, settings, train, values, monkeypatch):
    from calligrapher.model.policy import Policy

    calls, rows, velocity, at = Counter(), Counter(), Policy.velocity, []

    def counted(self, x, *more):
        calls[at[-1]] += 1
        rows[at[-1]] += len(x)
        return velocity(self, x, *more)

    def named(name, function):
        def stage(*args, **kwargs):
            at.append(name)
            return function(*args, **kwargs)

        return stage

    monkeypatch.setattr(Policy, "velocity", counted)
    for name, function in dispatch.FUNCTIONS.items():
        monkeypatch.setitem(dispatch.FUNCTIONS, name, named(name, function))
    changes = {algorithm: settings, "warmup": {"steps": 0}, "rounds": 1}
    changes["rollout"] = {"shared_trunk": "noise" in settings}
    params = RunParams.model_validate(values(algorithm, **changes))
    folder, _ = train("counted", algorithm, **changes)
    told = cost(params)
    assert dict(calls) == told.calls
    assert dict(rows) == told.rows
    shards = [pq.read_table(path) for path in folder.glob("round-*/rollout/*.parquet")]
    names = [name for name in TENSORS if name in shards[0].column_names]
    assert told.tensors == sum(
        len(value.as_py()) for shard in shards for name in names for value in shard[name]
    )


def test_the_busiest_rank_has_its_shards_and_its_batches_of_each_step(values):
    params = RunParams.model_validate(values("nft", nft={"num_train_sigmas": 1, "kl_coef": 0.0}))
    # 9 images: shards of 4, 4 and 1; batches of 4, 4 and 1 in steps of two and one.
    one, two, many = (cost(params, ranks) for ranks in (1, 2, 64))
    assert (one.busiest["rollout"], two.busiest["rollout"], many.busiest["rollout"]) == (27, 15, 12)
    assert (one.busiest["update"], two.busiest["update"], many.busiest["update"]) == (18, 10, 10)
    assert (one.steps, one.reduced, two.efficiency("rollout")) == (2, 0, 27 / 30)
    assert two.reduced == many.reduced > 0


def test_a_round_takes_as_long_as_the_longer_of_what_goes_on_side_by_side(values):
    apart = {"num_processes": 4, "rollout_processes": 3}
    params = RunParams.model_validate(values("nft", rollout={"staleness": 1}, launch=apart))
    all_do_all, found = cost(params, 4, 0), cost(params)
    # 9 images: shards of 4, 4 and 1 on three ranks; batches of 4, 4 and 1 on the one that is left.
    assert (found.ranks, found.samplers, found.busiest["rollout"]) == (4, 3, 12)
    assert found.busiest["update"] == cost(params, 1, 0).busiest["update"]
    assert (all_do_all.reduced > 0, found.reduced) == (True, 0)
    assert found.rows == all_do_all.rows
    assert found.efficiency("rollout") == 27 / (3 * 12)
    assert found.efficiency("update") == 1
    both = price(params, found, tflops=1e-3, bandwidth=1.0)
    seconds = both.seconds
    assert seconds["all-reduce"] == 0
    assert both.total == max(seconds["rollout"], seconds["update"])
    assert both.gpu_hours == pytest.approx(4 * both.total / 3600)
    turns = price(params, all_do_all, tflops=1e-3, bandwidth=1.0)
    assert turns.total == pytest.approx(sum(turns.seconds.values()))


def test_of_eight_gpus_four_sample_the_shipped_round_soonest(monkeypatch):
    monkeypatch.setattr(scale, "SIZES", (4, 8))
    given = (400.0, 100.0, None)
    lines = scale_table(Path("params/nft.yaml"), ["rollout.staleness=1"], *given).splitlines()
    assert [line.split()[0] for line in lines] == ["GPUs", "4", "8"]
    assert lines[0].endswith("sample")
    found = [[float(cell.strip("%")) for cell in line.split()] for line in lines[1:]]
    assert [(row[-1], row[4]) for row in found] == [(0, 109.6), (4, 75.7)]
    own = ["rollout.staleness=1", "launch.num_processes=8", "launch.rollout_processes=6"]
    line = scale_table(Path("params/nft.yaml"), own, *given, own=True).splitlines()[-1].split()
    assert (line[0], line[1], line[-1]) == ("8", "75.7", "6")  # 4 shards: 2 ranks have nothing


@pytest.mark.parametrize(("batch_size", "shard_size"), [(3, 3), (2, 4), (5, 7), (9, 9)])
def test_a_shared_trunk_is_counted_in_the_mean_over_where_windows_may_lie(
    batch_size, shard_size, values
):
    cut = {"batch_size": batch_size, "shard_size": shard_size, "num_inference_steps": 6}
    params = RunParams.model_validate(
        values(
            "grpo", grpo={"noise": "group", "window_size": 2}, rollout=cut | {"shared_trunk": True}
        )
    )
    shards = [range(9)[at : at + shard_size] for at in range(0, 9, shard_size)]
    batches = [
        rows[at : at + batch_size] for rows in shards for at in range(0, len(rows), batch_size)
    ]
    calls = rows = 0
    drawn = list(product(range(4), repeat=3))  # a window of 2 before the last of 6 steps
    for starts in drawn:
        for batch in batches:
            groups = [row // 3 for row in batch]
            made = from_trunks(groups, [starts[g] for g in groups], 2, 6)
            calls += len(made)
            rows += sum(map(len, made))
    told = cost(params)
    assert told.calls["rollout"] == pytest.approx(calls / len(drawn))
    assert told.rows["rollout"] == pytest.approx(rows / len(drawn))
    assert forwards(params).rollout == pytest.approx(rows / len(drawn) / 9)


def test_a_progressive_window_is_counted_in_the_mean_of_its_cycle(values):
    rollout = {"num_inference_steps": 6, "shared_trunk": True, "batch_size": 4}
    settings = {"noise": "group", "window": "progressive", "window_size": 2, "window_stride": 2}
    params = RunParams.model_validate(values("grpo", grpo=settings, rollout=rollout))
    # At 0, 2 and 3: 5 / 3 steps before it in the mean, and its first. Shards of 3 + 1, 2 + 2 and 1
    # rows of a group.
    assert cost(params).rows["rollout"] == pytest.approx(9 * 6 - (2 + 0 + 1 + 1) * (5 / 3 + 1))
    assert cost(params).calls["rollout"] == 3 * 6


@pytest.mark.parametrize(
    ("name", "places", "members", "steps"), [("grpo", 44, 4, 2), ("tiny-grpo", 1, 8, 1)]
)
def test_a_shared_trunk_saves_the_steps_before_a_window_and_the_first_of_its_update(
    name, places, members, steps
):
    path, group = f"params/{name}.yaml", ["grpo.noise=group", "rollout.shared_trunk=false"]
    alone = forwards(load_params(path, group))
    shared = forwards(load_params(path, [*group[:1], "rollout.shared_trunk=true"]))
    others = 1 - 1 / members
    assert alone.rollout - shared.rollout == pytest.approx(others * (places + 1) / 2)
    assert alone.trained - shared.trained == pytest.approx(others)
    assert alone.reference - shared.reference == pytest.approx(others * (alone.reference > 0))
    assert alone.reference in (0, steps)


def test_an_update_of_one_shared_step_needs_memory_for_groups_and_not_for_images():
    def activations(*overrides):
        update = memory(load_params("params/tiny-grpo.yaml", overrides))[-1]
        return update.parts["activations"]

    # Of 80 images in groups of 8 at most 11 groups, where a batch begins and ends within one.
    small = ["rollout.batch_size=11", "update.batch_size=11"]
    few = ["grpo.background_coef=0", "grpo.background_rows=0", "rollout.shared_trunk=true"]
    apart = activations("rollout.shared_trunk=false", *few[:2])
    assert activations(*few) == activations("rollout.shared_trunk=false", *few[:2], *small) < apart
    # Background rows are a forward of their own, and a window of two steps has one of all images.
    held = "grpo.background_rows=30"
    assert activations(held, few[2]) > activations(*few)
    two = ["grpo.window_size=2", "grpo.timestep_fraction=0.5"]
    assert activations(*few, *two) == apart
