"""Rounds that an older policy samples: which one, what that makes stale, and how a run goes on."""

import json

import pytest

from tasks.artifacts.artifact import Artifact
from tasks.pipeline import name_of, parents, planned, reads
from tasks.reports.verify import verify
from tasks.reports.why import why
from tasks.runs.rerun import carry_out, prepare_rerun
from tasks.runs.run import open_run

STALE = {"rounds": 4, "rollout": {"staleness": 1}}
WEIGHED = STALE | {"grpo": {"importance_cap": 2.0}}


def digests(folder, stage, rounds=4):
    return [Artifact.load(folder / name_of(stage, r)).digest for r in range(rounds)]


def olds(folder, stage):
    return [Artifact.load(folder / name_of(stage, r)).inputs["old"] for r in range(4)]


def test_a_round_is_made_from_the_policy_of_a_round_before_the_last(train):
    folder, _ = train("a", **STALE)
    start = Artifact.load(folder / "warmup").digest
    refreshed = digests(folder, "refresh")
    assert olds(folder, "rollout") == [start, start, *refreshed[:2]]
    assert olds(folder, "update") == olds(folder, "rollout")  # nft's old is what sampled
    assert olds(folder, "refresh") == [start, *refreshed[:3]]
    updates = [Artifact.load(folder / name_of("update", r)).inputs for r in range(4)]
    assert [u["previous"] for u in updates] == [start, *digests(folder, "update", 3)]
    assert verify(folder).problems == []


def test_only_where_it_is_set_staleness_is_in_a_fingerprint(make_resources):
    fresh, stale = (make_resources(rollout={"staleness": s}).params for s in (0, 1))
    assert "staleness" not in reads(fresh, "rollout")["rollout"]
    assert reads(stale, "rollout")["rollout"].pop("staleness") == 1
    for stage in ("warmup", "score", "advantage", "update", "refresh", "evaluate"):
        assert reads(stale, stage) == reads(fresh, stage)
    weighed = make_resources("grpo", grpo={"importance_cap": 2.0}).params
    assert reads(weighed, "update")["grpo"]["importance_cap"] == 2.0
    assert "importance_cap" not in reads(make_resources("grpo").params, "update")["grpo"]
    assert "importance_cap" not in reads(weighed, "rollout")["grpo"]


def test_the_first_two_rounds_and_no_other_are_those_that_the_start_samples():
    sampled_by = [parents(name_of("rollout", r), 1)["old"] for r in range(4)]
    assert sampled_by == ["warmup", "warmup", "round-0000/refresh", "round-0001/refresh"]
    assert parents("round-0003/refresh", 1) == parents("round-0003/refresh", 0)
    assert parents("round-0003/rollout", 0) == {"old": "round-0002/refresh"}


def steps(folder, round_index):
    lines = (folder / name_of("update", round_index) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_grpo_is_bounded_around_where_the_update_begins_and_weighed_by_who_sampled(train):
    folder, _ = train("a", "grpo", update={"checkpointing_steps": 1}, **WEIGHED)
    for round_index in range(4):
        first = steps(folder, round_index)[0]
        assert first["ratio_max_dev"] == 0.0  # whichever policy sampled
        # Round 0 is sampled by what it begins with: its weights are off by unequal batches alone.
        assert (first["importance_max_dev"] > 1e-5) == (round_index > 0)
        assert first["importance_mean"] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize(("algorithm", "changes"), [("nft", STALE), ("grpo", WEIGHED)])
def test_a_run_that_is_started_anew_for_each_stage_ends_with_the_same_bits(
    train, make_resources, tmp_path, algorithm, changes
):
    _, whole = train("whole", algorithm, **changes)
    for name in planned(make_resources(algorithm, **changes).params):
        with open_run(make_resources(algorithm, **changes), tmp_path / "parts") as run:
            run.make_planned([name])
    assert train("parts", algorithm, **changes)[1]["adapter_digest"] == whole["adapter_digest"]


@pytest.fixture
def go(make_resources):
    def go(todo):
        resources = make_resources()
        resources.params = todo.params
        with open_run(resources, todo.folder.path) as run:
            return carry_out(run, todo)

    return go


def test_a_rerun_shares_the_next_round_s_images_which_its_update_does_not_decide(train, go):
    parent, whole = train("a", **STALE)
    todo = prepare_rerun(parent, "round-0001/update", [], "b", downstream=True)
    assert {"round-0002/rollout", "round-0002/score", "round-0002/advantage"} <= set(
        todo.folder.shared
    )
    assert todo.names == [
        "round-0001/update",
        "round-0001/refresh",
        "round-0002/update",
        "round-0002/refresh",
        *(f"round-0003/{s}" for s in ("rollout", "score", "advantage", "update", "refresh")),
    ]
    assert go(todo)["adapter_digest"] == whole["adapter_digest"]


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0)])
def test_a_rerun_with_another_staleness_samples_all_later_rounds_anew(train, go, before, after):
    parent, _ = train("a", **STALE | {"rollout": {"staleness": before}})
    changed = [f"rollout.staleness={after}"]
    todo = prepare_rerun(parent, "round-0001/rollout", changed, "b", downstream=True)
    made = [name for name in planned(todo.params) if name >= "round-0001" and name != "warmup"]
    assert todo.names == made
    go(todo)
    fork = todo.folder.path
    refreshed = digests(fork, "refresh")
    assert olds(fork, "rollout")[2:] == refreshed[1 - after : 3 - after]
    assert verify(fork).problems == []


def test_why_names_the_policy_that_sampled(train, encodings):
    folder, _ = train("a", **STALE)
    assert why(folder, "round-0003/rollout", [], encodings).state == "up to date"
    found = why(folder, "round-0003/rollout", ["nft.nft_beta=0.2"], encodings)
    assert found.reasons == ["it is made from round-0001/refresh (old), which is stale"]
    found = why(folder, "round-0001/rollout", ["rollout.staleness=0"], encodings)
    assert any("staleness" in line for line in found.reasons)
