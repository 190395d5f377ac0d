"""A run that is started again: nothing is done twice, and the result is that of one that never
stopped."""

import json

import pytest
import torch
from safetensors.torch import load_file

from calligrapher.rl.train_loop import TrainLoop
from tasks.launch.dispatch import FUNCTIONS


def manifests(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("artifact.json")}


def leftovers(folder):
    return [p for p in folder.rglob("*") if p.name.endswith(".partial") or ".writing-" in p.name]


@pytest.fixture
def built(monkeypatch):
    """The stages that were built, in order."""
    names = []

    def counted(name, real):
        return lambda *args, **kwargs: names.append(name) or real(*args, **kwargs)

    for name, real in FUNCTIONS.items():
        monkeypatch.setitem(FUNCTIONS, name, counted(name, real))
    return names


ROUND = ["rollout", "score", "advantage", "update", "refresh"]


def test_a_run_builds_each_stage_once_and_a_second_start_builds_nothing(train, built):
    every_round = {"evaluate": {"every": 1}}
    folder, first = train("a", **every_round)
    assert built == ["warmup", "evaluate", *ROUND, "evaluate", *ROUND, "evaluate"]
    there = manifests(folder)
    assert len(there) == 14
    assert leftovers(folder) == []
    built.clear()
    folder, second = train("a", **every_round)
    assert built == []
    assert manifests(folder) == there
    timings = ("seconds", "training_seconds")
    assert {k: v for k, v in second.items() if k not in timings} == {
        k: v for k, v in first.items() if k not in timings
    }
    assert json.loads((folder / "summary.json").read_text()) == second
    assert (second["rounds"], second["images"], second["algorithm"]) == (2, 18, "nft")
    assert 0 <= second["ocr_accuracy_after"]["mean"] < 1


def test_a_rollout_with_a_shared_trunk_goes_on_to_the_same_bits(train, monkeypatch):
    from tasks.stages import rollout as stage

    changes = {"rollout": {"shared_trunk": True}, "grpo": {"noise": "group"}, "rounds": 1}
    real, written = stage.write_shard, []

    def write_shard(path, *args):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        real(path, *args)

    monkeypatch.setattr(stage, "write_shard", write_shard)
    with pytest.raises(KeyboardInterrupt):
        train("a", "grpo", **changes)
    monkeypatch.setattr(stage, "write_shard", real)
    _, resumed = train("a", "grpo", **changes)
    _, whole = train("b", "grpo", **changes)
    assert resumed["adapter_digest"] == whole["adapter_digest"]


@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_one_round_and_one_more_give_what_two_rounds_give(train, built, algorithm):
    _, one = train("a", algorithm, rounds=1)
    _, one_more = train("a", algorithm, rounds=2)
    assert built == ["warmup", *ROUND, *ROUND]
    _, two = train("b", algorithm, rounds=2)
    assert one_more["adapter_digest"] == two["adapter_digest"] != one["adapter_digest"]


def test_a_finished_run_starts_again_though_retention_deleted_its_first_rounds(train, built):
    folder, first = train("a", rounds=3, retention={"keep_last": 1})
    assert not (folder / "round-0000/update/trained.safetensors").exists()
    assert (folder / "round-0002/update/trained.safetensors").exists()
    built.clear()
    _, second = train("a", rounds=3, retention={"keep_last": 1})
    assert built == []
    assert second["adapter_digest"] == first["adapter_digest"]


@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_an_error_in_the_middle_of_an_update_costs_the_steps_since_the_last_inner_checkpoint(
    train, algorithm, monkeypatch
):

    settings = {
        "rounds": 1,
        "update": {
            "gradient_accumulation_steps": 1,
            "checkpointing_steps": 2,
        },  # three steps a round
        "warmup": {"steps": 0},
    }
    _, whole = train("whole", algorithm, **settings)
    real, taken = TrainLoop._step, []

    def step(self, *args):
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(self.state.step)
        return real(self, *args)

    monkeypatch.setattr(TrainLoop, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        train("a", algorithm, **settings)
    monkeypatch.setattr(
        TrainLoop, "_step", lambda self, *args: taken.append(self.state.step) or real(self, *args)
    )
    folder, resumed = train("a", algorithm, **settings)
    assert taken == [0, 1, 2]
    assert resumed["adapter_digest"] == whole["adapter_digest"]
    assert leftovers(folder) == []
    steps = [
        json.loads(line)["step"] for line in (folder / "round-0000/update/metrics.jsonl").open()
    ]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_constant_rewards_leave_the_weights_as_they_were_bit_by_bit(
    train, constant_scorer, algorithm, kl_coef
):
    how = {"update": {"weight_decay": 0.01}, algorithm: {"kl_coef": kl_coef}}
    folder, _ = train("a", algorithm, constant_scorer, **how)
    start = load_file(folder / "warmup/trained.safetensors")
    for file in ("update/trained", "update/ema", "refresh/old"):
        end = load_file(folder / f"round-0001/{file}.safetensors")
        assert start.keys() == end.keys()
        assert all((start[name] == end[name]).all() for name in start)
    update = folder / "round-0001/update"
    assert json.loads((update / "state.json").read_text())["step"] == 0
    assert (update / "metrics.jsonl").read_text() == ""
    assert load_file(update / "optimizer.safetensors") == {}
    meta = json.loads((update / "artifact.json").read_text())["meta"]
    left_out, untaken = (9, 0) if kl_coef == 0 else (0, 2)
    assert meta == {
        "optimizer_steps": 0,
        "images": 0,
        "left_out": left_out,
        "untaken_steps": untaken,
    }


@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_rewards_that_differ_move_the_weights(train, algorithm):
    folder, _ = train("a", algorithm, rounds=1)
    start = load_file(folder / "warmup/trained.safetensors")
    end = load_file(folder / "round-0000/update/trained.safetensors")
    assert any((start[name] != end[name]).any() for name in start)


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_grpo_is_on_policy_at_the_first_step_of_every_round(train, shared_trunk):
    # With a shared trunk batches of several groups, whose windows lie apart.
    size = 6 if shared_trunk else 3
    rollout = {"batch_size": size, "shard_size": 6, "num_inference_steps": 6}
    update = {"batch_size": size, "gradient_accumulation_steps": 1}
    noise = "group" if shared_trunk else "row"
    grpo = {"kl_coef": 0.1, "window_size": 2, "noise": noise}
    rollout["shared_trunk"] = shared_trunk
    folder, _ = train("a", "grpo", update=update, grpo=grpo, rollout=rollout)
    for round in (0, 1):
        lines = (folder / f"round-000{round}/update/metrics.jsonl").read_text().splitlines()
        first, *later = map(json.loads, lines)
        assert first["ratio_mean"] == 1.0
        assert first["ratio_max_dev"] == 0.0
        assert first["approx_kl"] == 0.0
        assert any(row["approx_kl"] > 0 for row in later)
        assert (first["kl"] > 0) == (
            round == 1
        )  # the reference is the warm-up, which samples round 0


def test_a_run_that_goes_on_with_another_number_of_threads_says_so(train, monkeypatch, caplog):
    from tasks.runs import run

    folder, _ = train("a", rounds=1)
    code = json.loads((folder / "warmup/artifact.json").read_text())["code"]
    assert code["threads"] == str(torch.get_num_threads())
    train("a", rounds=1)
    assert "equal to the bit" not in caplog.text
    monkeypatch.setattr(run, "machine", lambda: {"threads": "63", "cpu": code["cpu"]})
    train("a", rounds=1)
    assert f"a goes on with threads: {code['threads']} -> 63. Its results stay right" in caplog.text
