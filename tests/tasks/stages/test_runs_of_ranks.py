"""Runs whose stages several ranks do: the same files as one process makes, whatever their
number."""

import json

import pytest
from safetensors.torch import load_file
from shared_runs import interrupted, train_on
from two_ranks import on_ranks

from calligrapher.ranks import ALONE
from tasks.pipeline import ROUND, name_of

pytestmark = pytest.mark.slow
ALGORITHMS = ("nft", "grpo")
EVERY = {"evaluate": {"every": 1}}


def as_two(ranks, values, folder, runs_dir):
    """Both algorithms on two ranks, then each on one; then the beginning of a run on two."""
    for algorithm in ALGORITHMS:
        train_on(ranks, values[algorithm], folder / f"two-{algorithm}", runs_dir)
    mine = ALGORITHMS[ranks.rank]
    train_on(ALONE, values[mine], folder / f"one-{mine}", runs_dir)
    for name, last in (("shared", 1), ("held", 4)):
        names = ["warmup", *(name_of(stage, 0) for stage in ROUND[:last])]
        train_on(ranks, values[name], folder / f"two-{name}", runs_dir, names=names)
        if ranks.is_first:
            train_on(ALONE, values[name], folder / f"one-{name}", runs_dir, names=names)
    if ranks.is_first:
        train_on(ALONE, values["without"], folder / "one-without", runs_dir, names=names)
    ranks.barrier()
    moving = values["grpo"]
    interrupted(1, train_on, ranks, moving, folder / "moving", runs_dir)
    if ranks.is_first:
        assert [p.name for p in folder.glob("moving/round-0000/update*/inner/*")] == [
            "step-00000001"
        ]
        interrupted(3, train_on, ALONE, moving, folder / "moving", runs_dir)


def as_three(ranks, values, folder, runs_dir):
    """Go on with the run that moves; and a round of another from its beginning."""
    train_on(ranks, values["grpo"], folder / "moving", runs_dir)
    for algorithm in ALGORITHMS:
        names = ["warmup", "round-0000/rollout", "round-0000/score"]
        train_on(ranks, values[algorithm], folder / f"three-{algorithm}", runs_dir, names=names)


@pytest.fixture(scope="module")
def runs(random_model, cases, encodings, tmp_path_factory, run_values):
    folder = tmp_path_factory.mktemp("runs")
    changes = {"update": {"checkpointing_steps": 1}, **EVERY}
    values = {name: run_values(name, **changes) for name in ALGORITHMS}
    trunk = {"rollout": {"shared_trunk": True}, "grpo": {"noise": "group"}}
    values["shared"] = run_values("grpo", **trunk)
    held = {"timestep_fraction": 0.5, "background_coef": 0.5, "background_rows": 3}
    values["held"] = run_values("nft", nft=held)
    values["without"] = run_values("nft", nft=held | {"background_rows": 0})
    on_ranks(2, as_two, values, folder, encodings.parent)
    on_ranks(3, as_three, values, folder, encodings.parent)
    return folder


def bytes_of(folder, pattern):
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(pattern)}
    assert found
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("number", ["two", "three"])
def test_rollouts_and_scores_of_two_and_three_ranks_have_the_bytes_of_one(runs, algorithm, number):
    for pattern in ("warmup/trained.safetensors", "round-0000/rollout/*.parquet"):
        expected = bytes_of(runs / f"one-{algorithm}", pattern)
        assert bytes_of(runs / f"{number}-{algorithm}", pattern) == expected
    pattern = "round-0000/score/*.parquet"
    expected = bytes_of(runs / f"one-{algorithm}", pattern)
    assert len(expected) == 3  # of three ranks each has a shard, of two the first has two
    assert bytes_of(runs / f"{number}-{algorithm}", pattern) == expected


def test_a_rollout_with_a_shared_trunk_has_the_bytes_of_one_process(runs):
    pattern = "round-0000/rollout/*.parquet"
    assert bytes_of(runs / "two-shared", pattern) == bytes_of(runs / "one-shared", pattern)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_evaluation_is_shared_and_written_once(runs, algorithm):
    pattern = "evaluate/*"
    expected = bytes_of(runs / f"one-{algorithm}", pattern)
    found = bytes_of(runs / f"two-{algorithm}", pattern)
    for files in (expected, found):
        del files["evaluate/artifact.json"]  # when, and how long it took
    assert sorted(found) == [
        "evaluate/grid.png",
        "evaluate/images.parquet",
        "evaluate/metrics.json",
        "evaluate/scores.parquet",
    ]
    assert found == expected


def away(folder, other, start, rounds=2):
    """Return the largest difference of two runs' ends, over the way that the weights moved."""
    name = f"round-{rounds - 1:04d}/update/trained.safetensors"
    ends, begin = [load_file(run / name) for run in (folder, other)], load_file(start)
    way = max((ends[1][n] - begin[n]).abs().max() for n in begin)
    assert way > 0
    return (max((ends[0][n] - ends[1][n]).abs().max() for n in begin) / way).item()


@pytest.mark.parametrize(
    ("run", "algorithm"), [("two-nft", "nft"), ("two-grpo", "grpo"), ("moving", "grpo")]
)
def test_the_adapter_is_that_of_one_process(runs, run, algorithm):
    one = runs / f"one-{algorithm}"
    assert away(runs / run, one, one / "warmup/trained.safetensors") <= 1e-3


def test_rows_that_hold_the_background_are_those_of_one_process(runs):
    one = runs / "one-held"
    start = one / "warmup/trained.safetensors"
    assert away(runs / "two-held", one, start, rounds=1) <= 1e-3
    assert away(runs / "one-without", one, start, rounds=1) > 0.1


@pytest.mark.parametrize(
    ("run", "algorithm"), [("two-nft", "nft"), ("two-grpo", "grpo"), ("moving", "grpo")]
)
def test_state_files_have_the_names_shapes_and_counts_of_one_process(runs, run, algorithm):
    """Also those of the run that was interrupted on two ranks, then on one, and ended on three."""
    for number in (0, 1):
        there, one = (
            runs / name / f"round-000{number}/update" for name in (run, f"one-{algorithm}")
        )
        assert sorted(p.name for p in there.iterdir()) == sorted(p.name for p in one.iterdir())
        for name in ("trained", "ema", "optimizer"):
            found, expected = (load_file(p / f"{name}.safetensors") for p in (there, one))
            assert found.keys() == expected.keys()
            assert len(found) > 0
            for key in found:
                assert found[key].shape == expected[key].shape
                scale = expected[key].double().abs().max().clamp(min=1e-12)
                assert ((found[key] - expected[key]).abs().max() / scale).item() <= 2e-2, (
                    name,
                    key,
                )
        assert (there / "state.json").read_text() == (one / "state.json").read_text()
        steps = [
            [json.loads(line)["step"] for line in (p / "metrics.jsonl").read_text().splitlines()]
            for p in (there, one)
        ]
        assert steps[0] == steps[1] == ([1, 2] if number == 0 else [3, 4])


@pytest.mark.parametrize("run", ["two", "one"])
def test_the_metrics_are_those_of_all_rows(runs, run):
    """The loss of GRPO's first step, whose ratios are exactly 1, tells nothing: NFT's does."""
    for algorithm, names in (("nft", ["loss", "grad_norm"]), ("grpo", ["ratio_mean"])):
        first, expected = (
            json.loads(
                (runs / f"{n}-{algorithm}/round-0000/update/metrics.jsonl").open().readline()
            )
            for n in (run, "one")
        )
        assert first.keys() == expected.keys()
        for name in names:
            assert first[name] == pytest.approx(expected[name], rel=1e-5), name
        if algorithm == "grpo":
            assert (first["ratio_mean"], first["ratio_max_dev"]) == (1.0, 0.0)
