"""What a run's folder says about itself: its state, why a stage is stale, whether its bytes are
whole."""

import json
import shutil
from dataclasses import replace

import pytest

from calligrapher.errors import ArtifactError, ParamsError
from tasks.artifacts.lock import run_lock
from tasks.reports.status import status
from tasks.reports.verify import verify
from tasks.reports.why import why
from tasks.runs.rerun import prepare_rerun
from tasks.tracking.locate import locate


def states(folder):
    return {stage.name: stage.state for stage in status(folder).stages}


def flip(path, at=-9):
    """Change one bit, as a bad disk does: the size stays."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_finished_run_is_told_stage_by_stage(train):
    folder, _ = train("a", evaluate={"every": 2})
    found = status(folder)
    assert (found.run, found.algorithm, found.rounds, found.rounds_done) == ("a", "nft", 2, 2)
    assert (found.state, found.holder, found.fork) == ("finished", None, None)
    assert [s.name for s in found.stages][:4] == [
        "warmup",
        "evaluate",
        "round-0000/rollout",
        "round-0000/score",
    ]
    assert {s.state for s in found.stages} == {"done"}
    files = [p for s in found.stages for p in (folder / s.name).rglob("*") if p.is_file()]
    assert found.bytes == sum(s.bytes for s in found.stages) == sum(p.stat().st_size for p in files)
    score = next(s for s in found.stages if s.name == "round-0001/score")
    meta = json.loads((folder / "round-0001/score/artifact.json").read_text())["meta"]
    assert (score.reward, score.ocr_accuracy) == (meta["reward_mean"], None)
    evaluations = [s for s in found.stages if s.name.endswith("evaluate")]
    assert all(s.reward is None for s in evaluations)
    for evaluation in evaluations:
        meta = json.loads((folder / evaluation.name / "artifact.json").read_text())["meta"]
        assert evaluation.ocr_accuracy == meta["ocr_accuracy"]
        assert f"accuracy {meta['ocr_accuracy']:.3f}" in found.text()
    assert score.seconds >= 0
    assert json.loads(found.model_dump_json())["stages"][0]["name"] == "warmup"
    assert f"{folder}: nft, 2 of 2 rounds, finished (nobody works on it)" in found.text()
    assert "round-0001\n  rollout" in found.text()


def test_what_runs_what_waits_and_what_is_missing(train):
    folder, _ = train("a")
    shutil.rmtree(folder / "round-0001/refresh")
    (folder / "round-0001/update").rename(folder / "round-0001/update.partial")
    assert status(folder).state == "stopped"
    found = states(folder)
    assert (
        found["round-0001/advantage"],
        found["round-0001/update"],
        found["round-0001/refresh"],
    ) == (
        "done",
        "unfinished",
        "missing",
    )
    with run_lock(folder):
        assert status(folder).state == "running"
        assert "Process" in status(folder).holder
        assert states(folder)["round-0001/update"] == "running"
    assert status(folder).holder is None


def test_a_run_that_max_train_steps_ended_is_finished(train):
    folder, _ = train("a", rounds=5, update={"max_train_steps": 3})  # two steps a round
    found = status(folder)
    assert (found.state, found.rounds_done, found.rounds) == ("finished", 2, 5)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no params\.json"):
        status(tmp_path)


def test_status_marks_what_is_shared_pruned_and_cut_short(train):
    folder, _ = train("a", rounds=3, retention={"keep_last": 1})
    fork = prepare_rerun(folder, "round-0002/advantage", [], "b").folder.path
    found = {s.name: s for s in status(fork).stages}
    assert found["round-0000/update"].shared
    assert found["round-0000/update"].pruned
    assert found["round-0002/advantage"].state == "missing"
    assert status(fork).fork == "rerun of round-0002/advantage of a"
    shard = folder / "round-0001/rollout/shard-0001.parquet"
    shard.unlink()
    one = next(s for s in status(folder).stages if s.name == "round-0001/rollout")
    assert (one.state, one.problem) == ("damaged", "shard-0001.parquet: missing")


def test_a_flipped_bit_is_found_and_named(train):
    folder, _ = train("a")
    whole = verify(folder)
    assert (whole.artifacts, whole.problems) == (11, [])
    shard = folder / "round-0001/rollout/shard-0001.parquet"
    flip(shard)
    flip(folder / "round-0000/update/ema.safetensors")
    assert verify(folder).problems == [
        f"{folder}/round-0000/update/ema.safetensors: other bytes than were written",
        f"{shard}: other bytes than were written",
    ]
    assert states(folder)["round-0001/rollout"] == "done"  # status reads no bytes


def test_an_edited_manifest_and_a_broken_chain_are_found_and_named(train):
    folder, _ = train("a")
    other, _ = train("b", seed=4)
    shutil.rmtree(folder / "round-0001/score")
    shutil.copytree(other / "round-0001/score", folder / "round-0001/score")
    manifest = folder / "round-0000/score/artifact.json"
    manifest.write_text(manifest.read_text().replace('"ocr_weight": 1.0', '"ocr_weight": 2.0'))
    problems = verify(folder).problems
    assert len(problems) == 3
    assert "round-0000/score/artifact.json was changed by hand" in problems[0]
    assert (
        problems[1]
        == f"{folder}/round-0001/advantage: it was made from another round-0001/score than the one"
        " that is there"
    )
    assert (
        problems[2]
        == f"{folder}/round-0001/score: it was made from another round-0001/rollout than the one"
        " that is there"
    )


def test_a_damaged_shard_stops_the_run_before_it_is_used_and_is_mended_as_told(train):
    whole, _ = train("whole")
    folder, _ = train("a", rounds=1)
    want = json.loads((whole / "summary.json").read_text())["adapter_digest"]
    for stage in ("update", "refresh"):
        shutil.rmtree(folder / "round-0000" / stage)
    flip(folder / "round-0000/rollout/shard-0001.parquet")
    with pytest.raises(
        ArtifactError, match=r"rollout is damaged:\n  shard-0001\.parquet: other bytes.*\nDelete"
    ):
        train("a")
    assert not (folder / "round-0000/update").exists()
    shutil.rmtree(folder / "round-0000/rollout")
    _, summary = train("a")
    assert summary["adapter_digest"] == want


def test_nothing_is_stale_in_a_run_that_is_as_it_was_made(train, encodings):
    folder, _ = train("a", evaluate={"every": 1})
    for stage in (
        "warmup",
        "evaluate",
        "1/rollout",
        "1/score",
        "1/update",
        "1/refresh",
        "1/evaluate",
    ):
        found = why(folder, stage, [], encodings)
        assert (found.state, found.reasons, found.notes) == ("up to date", [], []), found


def test_a_changed_param_is_named_and_what_is_made_from_it_too(train, encodings):
    folder, _ = train("a")
    found = why(folder, "round-0001/update", ["nft.nft_beta=0.2"], encodings)
    assert found.state == "stale"
    assert found.reasons == [
        "params.nft.nft_beta: 1.0 -> 0.2",
        "it is made from round-0000/update (previous), which is stale",
        "it is made from round-0000/refresh (old), which is stale",
        "it is made from round-0001/rollout (rollout), which is stale",
        "it is made from round-0001/advantage (advantages), which is stale",
    ]
    assert why(folder, "round-0000/advantage", ["nft.nft_beta=0.2"], encodings).reasons == []
    assert (
        why(folder, "round-0000/update", ["rounds=9", "model.device=cuda"], encodings).reasons == []
    )


def test_a_changed_input_and_a_changed_version_are_named(train, encodings, monkeypatch):
    from tasks.pipeline import STAGES

    folder, _ = train("a")
    other, _ = train("b", seed=4)
    shutil.rmtree(folder / "round-0001/rollout")
    shutil.copytree(other / "round-0001/rollout", folder / "round-0001/rollout")
    reason, *_ = why(folder, "round-0001/score", [], encodings).reasons
    assert reason.startswith("inputs.rollout: ")
    assert reason.endswith("(round-0001/rollout has other bytes now)")
    monkeypatch.setitem(STAGES, "refresh", replace(STAGES["refresh"], version=2))
    assert "stage_version: 1 -> 2" in why(folder, "round-0000/refresh", [], encodings).reasons


def test_data_that_changed_is_named_and_a_model_that_is_gone_is_not_compared(
    train, encodings, cases, tmp_path
):
    moved = tmp_path / "cases"
    shutil.copytree(cases / "train", moved)
    folder, _ = train("a", data={"train": str(moved)})
    with (moved / "self_bench.txt").open("a") as file:
        file.write("\n")
    reason, *_ = why(folder, "0/score", [], encodings).reasons
    assert reason.startswith("inputs.train_data: ")
    found = why(folder, "warmup", ["model.base=/nowhere", "model.siglip=/nowhere"], encodings)
    assert (found.state, found.reasons) == ("up to date", [])
    assert "not compared: /nowhere must be there" in found.notes[0]


def test_the_files_of_the_data_that_changed_are_named(train, encodings, cases, tmp_path):
    moved = shutil.copytree(cases / "train", tmp_path / "cases")
    folder, _ = train("a", data={"train": str(moved)})
    shutil.copytree(encodings / "contents", tmp_path / "data" / "contents")
    shutil.copy(moved / "test1_ref.png", moved / "test2_ref.png")
    (moved / "test3_target.png").unlink()
    found = why(folder, "0/score", [], tmp_path / "data")
    assert found.state == "stale"
    assert found.notes == ["train_data: changed: test2_ref.png; gone: test3_target.png"]


def test_other_library_versions_are_told_but_do_not_make_stale(train, encodings, monkeypatch):
    from tasks.reports import why as module

    folder, _ = train("a", rounds=1)
    monkeypatch.setattr(module, "code_version", lambda: {"torch": "9.9"})
    found = why(folder, "warmup", [], encodings)
    assert found.state == "up to date"
    assert any(
        "not compared: code.torch: " in note and note.endswith("-> 9.9") for note in found.notes
    )


def test_what_is_not_there_says_what_it_waits_for(train, encodings):
    folder, _ = train("a")
    for stage in ("update", "refresh"):
        shutil.rmtree(folder / "round-0001" / stage)
    found = why(folder, "round-0001/refresh", [], encodings)
    assert (
        found.text()
        == "round-0001/refresh is missing.\n  round-0001/update, which it is made from, is not"
        " there either"
    )
    work = folder / "round-0001/update.partial"
    work.mkdir()
    (work / "x").write_text("x")
    assert "its work folder holds 1 files" in why(folder, "round-0001/update", [], encodings).text()
    flip_me = folder / "round-0000/score/scores-0000.parquet"
    flip_me.unlink()
    assert why(folder, "round-0000/score", [], encodings).state == "damaged"


def test_a_refused_start_leaves_the_runs_params_as_they_were(train):
    folder, _ = train("a")
    before = (folder / "params.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"params\.nft\.nft_beta: 1\.0 -> 0\.2"):
        train("a", nft={"nft_beta": 0.2})
    assert (folder / "params.json").read_bytes() == before


def test_a_run_is_found_by_name_path_and_uri(train, tmp_path, monkeypatch):
    folder, _ = train("a b")
    (folder / "mlflow.json").write_text(json.dumps({"run_id": "0123abcd"}))
    monkeypatch.chdir(tmp_path)
    shard = folder / "round-0001/rollout/shard-0000.parquet"
    for text, name in (
        ("a b", None),
        (str(folder), None),
        (str(folder / "warmup"), "warmup"),
        (str(folder / "round-0001/update/"), "round-0001/update"),
        (shard.as_uri(), "round-0001/rollout"),
        ((folder / "round-0001/update").as_uri(), "round-0001/update"),
        ("runs:/0123abcd", None),
        ("runs:/0123abcd/round-0000/score", "round-0000/score"),
    ):
        found, stage = locate(text, tmp_path)
        assert (found.resolve(), stage) == (folder.resolve(), name), text
    for text in ("nothing", "runs:/ffff", str(tmp_path)):
        with pytest.raises(ArtifactError, match="must"):
            locate(text, tmp_path)


def test_an_unknown_stage_is_refused_with_the_nearest(train, encodings):
    folder, _ = train("a")
    with pytest.raises(
        ParamsError, match=r"Got 'round-0009/update'\. Nearest: round-0000/update, round-0001/u"
    ):
        why(folder, "round-0009/update", [], encodings)
