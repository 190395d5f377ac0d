"""A dry run tells what a start would make, and makes nothing."""

import pytest
from small_runs import Gamed

from calligrapher.errors import ArtifactError
from tasks.params.run_params import RunParams
from tasks.planning.work import disk, files
from tasks.reports.status import run_params
from tasks.runs.dry_run import dry_run
from tasks.runs.run import open_run


def test_what_is_there_is_told_apart_from_what_a_start_would_make(make_resources, tmp_path):
    with open_run(make_resources(evaluate={"every": 2}, rounds=4), tmp_path / "one") as run:
        run.make_planned(["warmup", "evaluate", "round-0000/rollout", "round-0000/score"])
    (run.folder.path / "round-0000/advantage.partial").mkdir()
    before = sorted(run.folder.path.rglob("*"))
    found = dry_run(run.params, run.folder.path)
    assert sorted(run.folder.path.rglob("*")) == before
    assert [(s.name, s.state) for s in found.steps[:5]] == [
        ("warmup", "there"),
        ("evaluate", "there"),
        ("round-0000/rollout", "there"),
        ("round-0000/score", "there"),
        ("round-0000/advantage", "unfinished"),
    ]
    told = [" ".join(line.split()) for line in found.text().splitlines()]
    assert told[1].endswith("nft, 4 rounds, 4 of 26 artifacts are there")
    assert told[2:8] == [
        "warmup there",
        "round-0000 rollout, score there; advantage unfinished; update, refresh missing",
        "round-0001 .. round-0003 rollout, score, advantage, update, refresh missing",
        "evaluate after 0 rounds (there)",
        "evaluate after 2, 4 rounds (missing)",
        "preview after 1, 3 rounds (missing)",
    ]
    assert "time: not reckoned" in told[-2]


def test_time_is_that_of_the_rounds_before_and_scales_with_the_work_of_another_run(train):
    folder, _ = train("one", evaluate={"every": 2})
    params = run_params(folder)
    assert dry_run(params, folder).text().count("time: nothing is left to do") == 1
    longer = RunParams.model_validate(params.resolved() | {"rounds": 6})
    found = dry_run(longer, folder)
    seconds = {s.kind: s.seconds for s in found.steps if s.state == "missing"}
    assert found.pace == "one"
    assert found.seconds == pytest.approx(
        4 * sum(seconds[k] for k in ("rollout", "score", "advantage", "update", "refresh"))
        + 2 * seconds["evaluate"]
        + 2 * seconds["preview"]
    )
    # Another run beside it, of which each round takes twice the sampling steps.
    steps = params.resolved()["rollout"] | {"num_inference_steps": 6}
    other = RunParams.model_validate(params.resolved() | {"rollout": steps})
    twice = dry_run(other, folder.parent / "two")
    assert twice.pace == "one"
    rollouts = [s.seconds for s in twice.steps if s.kind == "rollout"]
    assert rollouts == pytest.approx([2 * seconds["rollout"]] * 2)
    assert [s.seconds for s in twice.steps if s.kind == "warmup"] == [None]
    assert ", without warmup, at the pace of one" in twice.text()
    assert not (folder.parent / "two").exists()


def test_a_run_made_with_other_params_is_refused_as_a_start_would(train):
    folder, _ = train("one", rounds=1)
    values = run_params(folder).resolved()
    changed = values | {"update": values["update"] | {"learning_rate": 0.5}}
    with pytest.raises(ArtifactError, match=r"params.update.learning_rate: 0.001 -> 0.5"):
        dry_run(RunParams.model_validate(changed), folder)


def test_disk_counts_all_rollouts_and_the_weights_that_retention_keeps(values, tmp_path):
    keeps = {"keep_last": 2, "keep_every": 4, "keep_best": True}
    looks = {"every": 10, "num_images_per_case": 4}
    params = RunParams.model_validate(
        values(rounds=20, evaluate=looks, retention=keeps, update={"max_train_steps": 20})
    )
    # Nine images in batches of four, two a step: two steps a round, so ten rounds.
    sizes, kinds = files(params), disk(params)
    assert kinds["rollouts"] == 10 * sizes.rollout
    assert kinds["weights"] == (1 + 2 + 1 + 2) * sizes.checkpoint
    # Two evaluations of four images of two cases, nine previews of one image of one.
    assert kinds["evaluations"] == (2 * 2 * 4 + 9) * 3 * 48 * 32
    assert kinds["encodings"] == (3 + 2) * sizes.conditioning
    found = dry_run(params, tmp_path / "new/run")
    assert found.fits
    assert found.rounds == 10
    full = found.__class__(**{**found.__dict__, "free": 100})
    assert not full.fits
    assert "100 B free: too little" in full.text()


def test_a_run_that_an_alarm_ended_has_no_rounds_left_until_the_switch_is_off(train):
    evaluate = {"every": 1, "stop_on_alarm": True}
    folder, summary = train("a", scorer=Gamed(), rounds=4, evaluate=evaluate)
    assert summary["rounds"] == 1
    found = dry_run(run_params(folder), folder)
    assert (found.rounds, {s.state for s in found.steps}) == (1, {"there"})
    told = found.text()
    assert "has ended the run after 1 rounds (ocr_accuracy since the start); with false" in told
    assert "time: nothing is left to do" in told
    values = run_params(folder).resolved()
    off = RunParams.model_validate(
        values | {"evaluate": values["evaluate"] | {"stop_on_alarm": False}}
    )
    on = dry_run(off, folder)
    assert (on.rounds, sum(s.kind == "update" and s.state == "missing" for s in on.steps)) == (4, 3)
    assert "stop_on_alarm" not in on.text()


def test_a_run_that_an_alarm_may_end_says_so_and_refills_make_time_a_range(train, tmp_path):
    folder, _ = train("one")
    values = run_params(folder).resolved()
    changed = {
        "rollout": values["rollout"] | {"refill": 2},
        "evaluate": values["evaluate"] | {"every": 1, "stop_on_alarm": True},
    }
    found = dry_run(RunParams.model_validate(values | changed), folder.parent / "two")
    seconds = {s.kind: s.seconds for s in found.steps}
    rounds = found.rounds
    assert found.at_most - found.seconds == pytest.approx(
        2 * rounds * (seconds["rollout"] + seconds["score"])
    )
    assert "may end the run after any evaluation but the first" in found.text()
    assert " with all refills" in found.text()
