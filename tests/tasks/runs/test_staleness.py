"""Rounds that an older policy samples: which one, what that makes stale, what may begin early."""

import json

import pytest

from tasks.artifacts.artifact import Artifact
from tasks.launch.in_process import InProcess
from tasks.pipeline import name_of, parents, planned, reads
from tasks.reports.verify import verify
from tasks.reports.why import why
from tasks.runs.rerun import carry_out, prepare_rerun
from tasks.runs.run import open_run

ROUNDS = 3
STALE = {"rounds": ROUNDS, "rollout": {"staleness": 1}}
CHANGES = {"nft": STALE, "grpo": STALE | {"grpo": {"importance_cap": 2.0}}}


@pytest.fixture(scope="module")
def made(random_model, run_values, encodings, tmp_path_factory):
    """`made(algorithm)` -> folder of a whole run with a staleness, in one process; made once."""
    from small_runs import HashScorer

    from tasks.artifacts.layout import RunsDir
    from tasks.params.run_params import RunParams
    from tasks.runs.run import resources_of

    folder, done = tmp_path_factory.mktemp("stale"), {}

    def made(algorithm="nft"):
        if algorithm not in done:
            params = RunParams.model_validate(run_values(algorithm, **CHANGES[algorithm]))
            resources = resources_of(params, RunsDir(encodings.parent), HashScorer())
            with open_run(resources, folder / algorithm) as run:
                run.make_planned()
            done[algorithm] = folder / algorithm
        return done[algorithm]

    return made


def digests(folder, stage, rounds=ROUNDS):
    return [Artifact.load(folder / name_of(stage, r)).digest for r in range(rounds)]


def olds(folder, stage):
    return [Artifact.load(folder / name_of(stage, r)).inputs["old"] for r in range(ROUNDS)]


def test_a_round_is_made_from_the_policy_of_a_round_before_the_last(made):
    folder = made()
    start = Artifact.load(folder / "warmup").digest
    refreshed = digests(folder, "refresh")
    assert olds(folder, "rollout") == [start, start, refreshed[0]]
    assert olds(folder, "update") == olds(folder, "rollout")  # nft's old is what sampled
    assert olds(folder, "refresh") == [start, *refreshed[:2]]
    updates = [Artifact.load(folder / name_of("update", r)).inputs for r in range(ROUNDS)]
    assert [u["previous"] for u in updates] == [start, *digests(folder, "update", 2)]
    assert verify(folder).problems == []


def test_the_first_two_rounds_and_no_other_are_those_that_the_start_samples():
    sampled_by = [parents(name_of("rollout", r), 1)["old"] for r in range(4)]
    assert sampled_by == ["warmup", "warmup", "round-0000/refresh", "round-0001/refresh"]
    assert parents("round-0003/refresh", 1) == parents("round-0003/refresh", 0)
    assert parents("round-0003/rollout", 0) == {"old": "round-0002/refresh"}


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


def test_grpo_is_bounded_around_where_the_update_begins_and_weighed_by_who_sampled(made):
    for round_index in range(ROUNDS):
        path = made("grpo") / name_of("update", round_index) / "metrics.jsonl"
        first = json.loads(path.read_text().splitlines()[0])
        assert first["ratio_max_dev"] == 0.0  # whichever policy sampled
        # Round 0 is sampled by what it begins with: its weights are off by unequal batches alone.
        assert (first["importance_max_dev"] > 1e-5) == (round_index > 0)
        assert first["importance_mean"] == pytest.approx(1.0, abs=1e-2)


@pytest.fixture
def go(make_resources):
    """Carry out what was prepared, by a launcher of the kind that is given."""

    def go(todo, kind=InProcess):
        resources = make_resources()
        resources.params = todo.params
        launcher = kind(resources)
        with open_run(resources, todo.folder.path, launcher=launcher) as run:
            carry_out(run, todo)
        return launcher

    return go


def test_a_rerun_shares_the_next_round_s_images_which_its_update_does_not_decide(made, go):
    todo = prepare_rerun(made(), "round-0001/update", [], "shares", downstream=True)
    sampled = {f"round-0002/{stage}" for stage in ("rollout", "score", "advantage")}
    assert sampled <= set(todo.folder.shared)
    assert todo.names == [f"round-000{r}/{s}" for r in (1, 2) for s in ("update", "refresh")]
    go(todo)
    assert digests(todo.folder.path, "update") == digests(made(), "update")


@pytest.mark.parametrize("after", [0, 1])
def test_a_rerun_with_another_staleness_samples_all_later_rounds_anew(made, train, go, after):
    parent = made() if after == 0 else train("fresh", rounds=ROUNDS)[0]
    changed = [f"rollout.staleness={after}"]
    todo = prepare_rerun(parent, "round-0001/rollout", changed, f"now-{after}", downstream=True)
    assert todo.names == [
        n for n in planned(todo.params) if n.startswith(("round-0001", "round-0002"))
    ]
    go(todo)
    fork = todo.folder.path
    assert olds(fork, "rollout")[2] == digests(fork, "refresh")[1 - after]
    assert verify(fork).problems == []


def test_why_names_the_policy_that_sampled(made, encodings):
    assert why(made(), "round-0002/rollout", [], encodings).state == "up to date"
    found = why(made(), "round-0002/rollout", ["nft.old_policy=copy"], encodings)
    assert found.reasons == ["it is made from round-0000/refresh (old), which is stale"]
    found = why(made(), "round-0001/rollout", ["rollout.staleness=0"], encodings)
    assert any("staleness" in line for line in found.reasons)


class Early(InProcess):
    """Does what is begun at once, before the update that comes first."""

    samplers = 1

    def __init__(self, resources, stops_at=None):
        super().__init__(resources)
        self.begun, self.answers, self.stops_at = [], {}, stops_at

    def begin(self, call, out):
        self.begun.append(call.name)
        self.answers[call.name] = super().run(call, out)

    def run(self, call, out):
        if call.name == self.stops_at:
            raise KeyboardInterrupt
        return self.answers.pop(call.name, None) or super().run(call, out)


@pytest.fixture
def early(make_resources, tmp_path):
    """`early("name", "nft", stops_at=None, **changes)` -> (folder, the launcher)."""

    def early(name, algorithm="nft", stops_at=None, **changes):
        resources = make_resources(algorithm, **changes)
        launcher = Early(resources, stops_at)
        with open_run(resources, tmp_path / name, launcher=launcher) as run:
            run.make_planned()
        return run.folder.path, launcher

    return early


@pytest.mark.parametrize("algorithm", CHANGES)
def test_rollouts_that_come_before_the_update_have_the_same_bits(made, early, algorithm):
    other, launcher = early("other", algorithm, **CHANGES[algorithm])
    assert launcher.begun == ["round-0001/rollout", "round-0002/rollout"]
    assert launcher.answers == {}
    for stage in ("rollout", "score", "update", "refresh"):
        assert digests(other, stage) == digests(made(algorithm), stage)


def test_a_run_that_is_stopped_beside_an_update_samples_no_shard_twice(
    made, train, early, tmp_path
):
    with pytest.raises(KeyboardInterrupt):
        early("stopped", stops_at="round-0001/update", **STALE)
    left = tmp_path / "stopped/round-0002/rollout.partial"
    written = {path.name: path.stat().st_mtime_ns for path in left.glob("*.parquet")}
    assert len(written) == 3
    folder, _ = train("stopped", **STALE)
    there = (folder / "round-0002/rollout").glob("*.parquet")
    assert {path.name: path.stat().st_mtime_ns for path in there} == written
    assert digests(folder, "update") == digests(made(), "update")


def test_nothing_is_begun_that_may_not_be_asked_for(made, early, go):
    # 9 images are 2 steps a round: after 4 the run is over, and round 1 may be its last.
    folder, launcher = early("limited", update={"max_train_steps": 4}, **STALE)
    assert launcher.begun == ["round-0001/rollout"]
    assert not (folder / "round-0002").exists()
    todo = prepare_rerun(made(), "round-0001/update", ["nft.nft_beta=0.2"], "alone")
    assert go(todo, Early).begun == []
