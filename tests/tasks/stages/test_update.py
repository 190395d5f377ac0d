"""Advantage, update, refresh and evaluation inside real runs: which weights, which rows, when it
ends."""

import gc
import json
import weakref
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file

from calligrapher.errors import ArtifactError, RewardError
from calligrapher.tables.parquet import read_shard, read_table
from tasks.stages.evaluate import summarise
from tasks.stages.statistics import bootstrap_interval


def test_refresh_moves_old_by_the_formula_and_grpo_copies(train):
    for algorithm, decay in (("nft", 0.001 * 2), ("grpo", 0.0)):
        folder, _ = train(algorithm, algorithm, rounds=1)
        start = load_file(folder / "warmup/trained.safetensors")
        end = load_file(folder / "round-0000/update/trained.safetensors")
        old = load_file(folder / "round-0000/refresh/old.safetensors")
        manifest = json.loads((folder / "round-0000/refresh/artifact.json").read_text())
        assert manifest["meta"] == {"old_decay": decay}  # two optimizer steps
        for name, weight in old.items():
            torch.testing.assert_close(weight, decay * start[name] + (1 - decay) * end[name])


def test_an_update_leaves_no_optimizer_and_only_the_policies_it_needs_in_memory(train, monkeypatch):
    from tasks.launch.dispatch import FUNCTIONS
    from tasks.stages import update as stage

    states, kept, new_state, update = [], [], stage.new_state, stage.update

    def noted(policy, **settings):
        state = new_state(policy, **settings)
        states.append(weakref.ref(state))
        return state

    def counted(resources, *arguments, **more):
        meta = update(resources, *arguments, **more)
        kept.append(len(resources._weights))
        return meta

    monkeypatch.setattr(stage, "new_state", noted)
    monkeypatch.setitem(FUNCTIONS, "update", counted)
    for algorithm, kl_coef, wanted in (
        ("nft", 0.1, [1, 2]),
        ("nft", 0.0, [1, 1]),
        ("grpo", 0.1, [1, 1]),
    ):
        kept.clear()
        gc.disable()
        try:
            train(f"{algorithm}-{kl_coef}", algorithm, **{algorithm: {"kl_coef": kl_coef}})
            assert [state() for state in states] == [None] * len(states)
        finally:
            gc.enable()
        assert kept == wanted  # in round 0 `old` is the reference


@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
def test_the_weight_of_the_kl_follows_the_round_before_and_reaches_the_loss(train, algorithm):
    settings = {"kl_coef": 0.5, "kl_target": 1e-9}

    def steps(folder, number):
        lines = (folder / f"round-000{number}/update/metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    folder, _ = train("a", algorithm, rounds=3, **{algorithm: settings})
    coefficient = 0.5
    for number in range(3):
        if number:
            kl = fmean(row["kl"] for row in steps(folder, number - 1))
            error = min(max(kl / 1e-9 - 1, -0.2), 0.2)
            coefficient *= 1 + 0.1 * error
        state = json.loads((folder / f"round-000{number}/update/state.json").read_text())
        assert state["kl_coef"] == pytest.approx(coefficient, rel=1e-12)
        for row in steps(folder, number):
            assert row["kl_coef"] == state["kl_coef"]
            assert row["loss"] - row["policy_loss"] == pytest.approx(
                coefficient * row["kl"], rel=1e-3, abs=1e-7
            )
    other, _ = train("b", algorithm, rounds=1, **{algorithm: settings})
    train("b", algorithm, rounds=3, **{algorithm: settings})  # goes on where it was
    assert steps(other, 2) == steps(folder, 2)
    constant, _ = train("c", algorithm, rounds=1, **{algorithm: {"kl_coef": 0.5}})
    assert "kl_coef" not in (constant / "round-0000/update/state.json").read_text()


def test_a_fixed_old_policy_costs_no_forward_of_its_own_in_any_round(train, monkeypatch):
    from calligrapher.model.policy import Policy

    calls, real = [], Policy.velocity

    def velocity(self, *args):
        calls.append(torch.is_grad_enabled())
        return real(self, *args)

    monkeypatch.setattr(Policy, "velocity", velocity)
    settings = {"kl_coef": 0.1, "num_train_sigmas": 1}
    for old_policy, frozen in (("fixed", 1 + 1), ("copy", 1 + 2)):
        calls.clear()
        train(old_policy, nft={**settings, "old_policy": old_policy}, warmup={"steps": 0})
        trained = calls.count(True)
        assert trained == 2 * 3  # rounds * batches of 4, 4 and 1
        sampled = 2 * 3 * 5  # rounds * steps * batches
        assert calls.count(False) - sampled == trained // 2 * frozen


def test_the_run_ends_with_the_last_optimizer_step_that_it_is_allowed(train):
    folder, summary = train(
        "a", rounds=5, update={"max_train_steps": 3}, evaluate={"every": 9}, ema={"use_ema": False}
    )
    assert (summary["rounds"], summary["images"]) == (2, 18)  # two steps a round
    assert sorted(path.name for path in folder.glob("round-*")) == ["round-0000", "round-0001"]
    assert json.loads((folder / "round-0001/update/state.json").read_text())["step"] == 3
    assert (folder / "round-0001/evaluate").is_dir()
    assert summary["ocr_accuracy_after"] is not None


def test_evaluation_uses_the_average_of_the_weights_when_there_is_one(train, monkeypatch):
    from tasks.stages import evaluate

    used, real = [], evaluate.evaluate_weights

    def capture(resources, weights, *rest, **more):
        used.append(weights)
        return real(resources, weights, *rest, **more)

    monkeypatch.setattr(evaluate, "evaluate_weights", capture)
    folder, _ = train("a", rounds=1, evaluate={"every": 1})
    expected = [
        load_file(folder / "warmup/trained.safetensors"),
        load_file(folder / "round-0000/update/ema.safetensors"),
    ]
    assert all(torch.equal(a[n], b[n]) for a, b in zip(used, expected, strict=True) for n in a)


def test_evaluations_of_one_run_and_of_two_compare_picture_by_picture(train):
    seeds = []
    for name, seed in (("a", 1), ("b", 2)):
        folder, _ = train(
            name, seed=seed, rounds=1, evaluate={"every": 1}, update={"learning_rate": 1e-9}
        )
        for where in ("evaluate", "round-0000/evaluate"):
            seeds.append(read_shard(folder / where / "images.parquet", ["seed"]))
    assert all(found == seeds[0] for found in seeds)


def test_a_round_without_two_scores_in_any_group_stops(train, scorer_class):
    class OneEach(scorer_class):
        def score(self, images, cases, letters=False):
            rows = super().score(images, cases)
            for row, case in zip(rows, cases, strict=True):
                if case.case_id in self.seen:
                    row |= dict.fromkeys(row) | {"reason": "late"}
                self.seen.add(case.case_id)
            return rows

    scorer = OneEach()
    scorer.seen = set()
    with pytest.raises(RewardError, match=r"group with two scored images\. It has none: 6 of 9"):
        train("a", scorer=scorer, rounds=1, reward={"max_unscored_share": 0.9})


def test_advantages_of_a_real_run_are_zero_in_the_mean_of_each_group(train):
    folder, _ = train("a", rounds=1)
    table = read_table(folder / "round-0000/advantage/advantages.parquet")
    groups = torch.tensor(table["advantage"]).reshape(3, 3)
    assert groups.sum(1).abs().max() < 1e-6
    assert groups.abs().max() > 0.1


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("group", {"zero_spread_share": 0.5, "kept_share": 6 / 9, "dropped_groups": 1}),
        ("round", {"zero_spread_share": 0.5, "kept_share": 7 / 9, "dropped_groups": 0}),
    ],
)
def test_a_group_that_was_not_scored_is_dropped_and_not_one_without_spread(
    train, scorer_class, baseline, expected
):
    # Three groups of three: one score; three equal ones; three that differ.
    rewards = iter([0.1, None, None, 0.5, 0.5, 0.5, 0.2, 0.4, 0.9])

    class Scorer(scorer_class):
        def reward(self, image, case):
            return next(rewards)

    folder, _ = train(
        "a",
        scorer=Scorer(),
        rounds=1,
        reward={"max_unscored_share": 0.9},
        advantage={"baseline": baseline},
    )
    meta = json.loads((folder / "round-0000/advantage/artifact.json").read_text())["meta"]
    assert meta == pytest.approx(expected)


@pytest.fixture
def one_flat_group(scorer_class):
    """Three groups of three: the first of equal rewards."""

    class Scorer(scorer_class):
        def __init__(self):
            super().__init__()
            self.left = [0.5, 0.5, 0.5, 0.1, 0.2, 0.9, 0.2, 0.4, 0.9]

        def reward(self, image, case):
            return self.left.pop(0)

    return Scorer


@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_a_group_without_spread_is_left_out_and_counted_unless_a_kl_holds_it(
    train, one_flat_group, algorithm
):
    counts = {}
    for kl_coef in (0.0, 0.1):
        folder, _ = train(
            f"kl-{kl_coef}",
            algorithm,
            one_flat_group(),
            rounds=1,
            update={"batch_size": 3, "gradient_accumulation_steps": 1},
            **{algorithm: {"kl_coef": kl_coef}},
        )
        meta = json.loads((folder / "round-0000/update/artifact.json").read_text())["meta"]
        counts[kl_coef] = [
            meta[key] for key in ("optimizer_steps", "images", "left_out", "untaken_steps")
        ]
        tracked = [
            (line["step"], line["metrics"])
            for line in lines_of(folder / "metrics.jsonl")
            if line["stage"].endswith("/update/idle")
        ]
        expected = {f"update/{key}": meta[key] for key in ("left_out", "untaken_steps")}
        assert tracked == [(0, expected)]
    assert counts == {0.0: [2, 6, 3, 0], 0.1: [2, 6, 0, 1]}


def test_nft_learns_the_same_in_batches_that_are_accumulated(train):
    """All of a pass in one step: batches of 9, of 4, 4 and 1, and of 1."""
    ends = []
    for size, accumulated in ((9, 1), (4, 3), (1, 9)):
        update = {"batch_size": size, "gradient_accumulation_steps": accumulated}
        folder, _ = train(
            f"of-{size}",
            rounds=1,
            nft={"noise": "group", "kl_coef": 0.1},
            update=update | {"adam_epsilon": 1e-2},  # so that rounding does not turn a sign
        )
        ends.append(load_file(folder / "round-0000/update/trained.safetensors"))
    for other in ends[1:]:
        for name, weight in ends[0].items():
            torch.testing.assert_close(other[name], weight, atol=1e-6, rtol=0)


def test_an_update_that_an_older_program_made_says_so_and_its_rounds_can_be_kept(
    train, make_resources, monkeypatch, tmp_path
):
    from calligrapher.rl.nft import NFTParams
    from tasks.runs.rerun import carry_out, prepare_rerun
    from tasks.runs.run import open_run

    with monkeypatch.context() as older:
        older.setattr(NFTParams, "update_version", 1)
        folder, _ = train("a", rounds=1)
        manifest = json.loads((folder / "round-0000/update/artifact.json").read_text())
        assert "update_version" not in manifest["params"]
    with pytest.raises(ArtifactError, match=VERSION) as told:
        train("a", rounds=2)
    assert "--fork NAME --downstream" in str(told.value)
    assert "only the program that made it" in str(told.value)

    rerun = prepare_rerun(folder, "round-0001/rollout", ["rounds=2"], "b", downstream=True)
    with open_run(make_resources(rounds=2), rerun.folder.path) as run:
        summary = carry_out(run, rerun)
    assert summary["rounds"] == 2
    shared = json.loads((tmp_path / "b/round-0000/update/artifact.json").read_text())
    assert shared == manifest


VERSION = r"params\.update_version: \(absent\) -> 2"


def test_grpos_updates_have_no_version_in_their_fingerprint(train):
    folder, _ = train("a", "grpo", rounds=1)
    manifest = json.loads((folder / "round-0000/update/artifact.json").read_text())
    assert "update_version" not in manifest["params"]


def row(accuracy):
    scored = {
        "ocr_accuracy": accuracy,
        "ocr_likelihood": None,
        "style_score": None,
        "reward": accuracy,
    }
    return scored | {"ocr_text": None}


def test_evaluation_averages_a_cases_images_first_and_leaves_out_what_was_not_scored():
    found = summarise([row(1.0), row(0.5), row(None), row(0.25)], group=2)
    assert (found["images"], found["unscored"]) == (4, 1)
    assert found["ocr_accuracy"] == pytest.approx((0.75 + 0.25) / 2)
    assert found["exact_match"] == pytest.approx((0.5 + 0.0) / 2)
    assert "style_score" not in found
    assert "ocr_accuracy" not in summarise([row(None)], group=1)


def test_the_interval_of_a_mean_is_the_bootstraps():
    import numpy as np

    values = np.repeat([0.0, 1.0], 32)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert low == pytest.approx(0.5 - 1.96 / 16, abs=0.02)
    assert high == pytest.approx(0.5 + 1.96 / 16, abs=0.02)
    assert bootstrap_interval(np.array([0.3])) == (pytest.approx(0.3), pytest.approx(0.3))


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_half_precision_trains_and_is_still_on_policy(train, mixed_precision):
    folder, _ = train(
        "a",
        "grpo",
        rounds=1,
        model={"mixed_precision": mixed_precision},
        rollout={"batch_size": 3, "shard_size": 9},
        update={"batch_size": 3, "gradient_accumulation_steps": 1},
    )
    rows = list(
        map(json.loads, (folder / "round-0000/update/metrics.jsonl").read_text().splitlines())
    )
    assert len(rows) == 3
    assert rows[0]["ratio_mean"] == 1.0
    assert rows[0]["approx_kl"] == 0.0
    assert all(0 < row["grad_norm"] < float("inf") for row in rows)
    trained = load_file(folder / "round-0000/update/trained.safetensors")
    assert all(
        weight.dtype == torch.float32 and weight.isfinite().all() for weight in trained.values()
    )


def overflow_at(monkeypatch, calls, *, die_at=None):
    """Make the gradients of these optimizer steps infinite, counted over the whole training."""
    from itertools import count

    from calligrapher.rl.train_loop import TrainLoop

    real, number = TrainLoop._backward, count()

    def backward(self, *arguments):
        step = next(number)
        if step == die_at:
            raise KeyboardInterrupt
        metrics = real(self, *arguments)
        if step in calls:
            next(iter(self.policy.parameters.values())).grad.fill_(float("inf"))
        return metrics

    monkeypatch.setattr(TrainLoop, "_backward", backward)


def lines_of(path):
    def strict(name):
        raise AssertionError(f"{path} holds {name}, which is no JSON")

    return [json.loads(line, parse_constant=strict) for line in path.read_text().splitlines()]


FP16 = {"model": {"mixed_precision": "fp16"}, "update": {"checkpointing_steps": 1}}


def test_steps_that_overflow_in_fp16_are_counted_and_left_out_of_all_else(train, monkeypatch):
    overflow_at(monkeypatch, {2, 3})  # one step of the warm-up, two in each round
    folder, _ = train("a", **FP16)
    first, second = (folder / f"round-000{r}/update" for r in (0, 1))
    rows = lines_of(first / "metrics.jsonl")
    assert [(row["step"], row["skipped_steps"]) for row in rows] == [(1, 0), (1, 1)]
    assert rows[1].keys() == {"step", "skipped_steps"}
    meta = json.loads((first / "artifact.json").read_text())["meta"]
    assert (meta["optimizer_steps"], meta["skipped_steps"], meta["images"]) == (1, 1, 9)
    assert meta["loss"] == rows[0]["loss"]
    assert meta["grad_norm"] == rows[0]["grad_norm"]
    assert json.loads((second / "state.json").read_text())["step"] == 2
    refresh = json.loads((folder / "round-0000/refresh/artifact.json").read_text())
    assert refresh["meta"] == {"old_decay": 0.001 * 1}
    tracked = [
        (line["step"], line["metrics"]["update/skipped_steps"], "update/loss" in line["metrics"])
        for line in lines_of(folder / "metrics.jsonl")
        if line["stage"].endswith("/update")
    ]
    assert tracked == [(1, 1, True), (1, 1, False), (2, 0, True)]


def test_a_run_that_died_after_a_skipped_step_ends_as_one_that_did_not(train, monkeypatch):
    how = FP16 | {"rounds": 1, "update": {"checkpointing_steps": 1, "num_inner_epochs": 2}}
    with monkeypatch.context() as patched:
        overflow_at(patched, {2})
        _, whole = train("a", **how)
    with monkeypatch.context() as patched:
        overflow_at(patched, {2}, die_at=3)
        with pytest.raises(KeyboardInterrupt):
            train("b", **how)
    folder, resumed = train("b", **how)
    assert resumed["adapter_digest"] == whole["adapter_digest"]
    assert len(lines_of(folder / "round-0000/update/metrics.jsonl")) == 4


def test_a_metric_that_is_not_finite_is_left_out_and_counted(train, monkeypatch):
    from calligrapher.rl.nft import NFTParams

    real = NFTParams.losses

    def losses(self, *arguments, **more):
        for loss, metrics in real(self, *arguments, **more):
            yield loss, metrics | {"old_distance": metrics["old_distance"] / 0}

    monkeypatch.setattr(NFTParams, "losses", losses)
    folder, _ = train("a", rounds=1)
    rows = lines_of(folder / "round-0000/update/metrics.jsonl")
    assert [row["not_finite"] for row in rows] == [1, 1]
    assert all("old_distance" not in row for row in rows)
    meta = json.loads((folder / "round-0000/update/artifact.json").read_text())["meta"]
    assert meta["not_finite"] == 2
    assert "old_distance" not in meta


def test_the_largest_ratio_of_a_stage_is_the_largest_of_its_steps(train):
    folder, _ = train("a", "grpo", rounds=1, update={"num_inner_epochs": 3})
    rows = lines_of(folder / "round-0000/update/metrics.jsonl")
    largest = [row["ratio_max_dev"] for row in rows]
    meta = json.loads((folder / "round-0000/update/artifact.json").read_text())["meta"]
    assert meta["ratio_max_dev"] == max(largest) > sum(largest) / len(largest)
