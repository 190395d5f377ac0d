"""Forks: a stage made anew, or training from another run's images, while all else is shared on
disk."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from calligrapher.errors import ArtifactError, CheckpointError, ParamsError, RewardError
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import RunsDir
from tasks.pipeline import planned
from tasks.reports.verify import verify
from tasks.resources.resources import Resources
from tasks.runs.rerun import carry_out, prepare_replay, prepare_rerun
from tasks.runs.run import open_run, resources_of


class NoModelResources(Resources):
    """Fails when a stage asks for the model."""

    @property
    def model(self):
        raise AssertionError("no stage may load the model")

    @property
    def sources(self):
        return super().sources | {"model": lambda: self.model}


@pytest.fixture
def go(encodings, hash_scorer):
    """Carry out what was prepared, with a scorer of its own unless recorded scores suffice."""

    def go(todo, scorer=None, kind=Resources):
        scorer = scorer or todo.recorded_scorer() or hash_scorer
        resources = resources_of(todo.params, RunsDir(encodings.parent), scorer)
        resources.__class__ = kind
        with open_run(resources, todo.folder.path) as run:
            return carry_out(run, todo)

    return go


def inodes(folder):
    return {
        p.relative_to(folder).as_posix(): p.stat().st_ino for p in folder.rglob("*") if p.is_file()
    }


def bytes_of(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def digest(folder, name):
    return Artifact.load(folder / name).digest


def test_a_rerun_stage_is_made_anew_and_the_rest_is_the_same_bytes_on_disk(train, go):
    parent, _ = train("a")
    before = bytes_of(parent)
    todo = prepare_rerun(parent, "1/update", ["nft.nft_beta=0.2"], "b")
    found = go(todo)
    fork = todo.folder.path
    assert found["artifact"] == str(fork / "round-0001/update")
    assert found["digest"] != digest(parent, "round-0001/update")
    theirs, ours = inodes(parent), inodes(fork)
    shared = [n for n in ours if n.startswith(("warmup", "round-0000", "round-0001/rollout"))]
    assert len(shared) > 20
    assert all(ours[name] == theirs[name] for name in shared)
    assert not (fork / "round-0001/refresh").exists()
    assert bytes_of(parent) == before
    assert verify(fork).problems == []


def test_a_fork_says_where_it_comes_from(train, go):
    parent, _ = train("a")
    todo = prepare_rerun(parent, "round-0001/update", ["nft.nft_beta=0.2"], "b")
    go(todo)
    fork = json.loads((todo.folder.path / "fork.json").read_text())
    assert (fork["kind"], fork["parent"], fork["stage"]) == ("rerun", "../a", "round-0001/update")
    assert fork["overrides"] == ["nft.nft_beta=0.2"]
    assert fork["shared"]["round-0001/rollout"] == digest(parent, "round-0001/rollout")
    events = [json.loads(line) for line in (todo.folder.path / "events.jsonl").open()]
    tags = {k: v for event in events if event["kind"] == "tags" for k, v in event["tags"].items()}
    assert (tags["forked_from"], tags["stage"], tags["round"]) == ("a", "update", "1")


def test_the_curves_of_a_fork_begin_with_those_of_its_parent(train, go):
    parent, _ = train("a")
    todo = prepare_rerun(parent, "round-0001/update", ["nft.nft_beta=0.2"], "b")
    go(todo)

    def points(folder, stage):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        return [r for r in records if r["stage"] == stage]

    fork = todo.folder.path
    for stage in ("round-0000/update", "round-0001/score"):
        assert points(fork, stage) == points(parent, stage) != []
    one, other = points(fork, "round-0001/update"), points(parent, "round-0001/update")
    assert [p["step"] for p in one] == [p["step"] for p in other]
    assert one != other


@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_a_rerun_downstream_with_unchanged_params_ends_as_its_parent(train, go, algorithm):
    parent, whole = train("a", algorithm, rounds=3, evaluate={"every": 2})
    todo = prepare_rerun(parent, "round-0001/update", [], "b", downstream=True)
    assert todo.names == [
        "round-0001/update",
        "round-0001/refresh",
        "round-0001/evaluate",
        *(
            f"round-0002/{s}"
            for s in ("rollout", "score", "advantage", "update", "refresh", "evaluate")
        ),
    ]
    summary = go(todo)
    assert summary["adapter_digest"] == whole["adapter_digest"]
    assert (summary["run"], summary["rounds"]) == ("b", 3)


def test_a_fork_goes_on_as_a_run_of_its_own(train, go, values, encodings, hash_scorer, tmp_path):
    from tasks.params.run_params import load_params

    parent, _ = train("a")
    go(prepare_rerun(parent, "round-0000/update", ["nft.nft_beta=0.2"], "b"))
    params = load_params(tmp_path / "b/params.json", ["rounds=2"])
    assert params.nft.nft_beta == 0.2
    todo = prepare_rerun(parent, "round-0000/update", ["nft.nft_beta=0.2"], "b", downstream=True)
    summary = go(todo)
    alone = go(
        prepare_rerun(parent, "round-0000/update", ["nft.nft_beta=0.2"], "c", downstream=True)
    )
    assert summary["adapter_digest"] == alone["adapter_digest"]


def test_the_same_rerun_goes_on_and_another_one_under_the_same_name_is_refused(train, go):
    parent, _ = train("a")
    first = go(prepare_rerun(parent, "round-0001/update", ["nft.nft_beta=0.2"], "b"))
    assert go(prepare_rerun(parent, "round-0001/update", ["nft.nft_beta=0.2"], "b")) == first
    with pytest.raises(
        ArtifactError, match=r"another fork \(rerun of round-0001/update of a with nft"
    ):
        prepare_rerun(parent, "round-0001/update", ["nft.nft_beta=0.3"], "b")
    with pytest.raises(ArtifactError, match="It is a run"):
        prepare_rerun(parent, "round-0001/update", [], "a")
    with pytest.raises(ParamsError, match="must be a name of at most"):
        prepare_rerun(parent, "round-0001/update", [], "../b")


def test_parent_and_fork_can_be_deleted_without_harm_to_the_other(train, go):
    parent, _ = train("a")
    todo = prepare_rerun(parent, "round-0001/update", ["nft.nft_beta=0.2"], "b")
    go(todo)
    again = prepare_rerun(todo.folder.path, "round-0001/update", ["nft.nft_beta=0.3"], "c")
    shutil.rmtree(parent)
    assert verify(todo.folder.path).problems == []
    go(again)
    shutil.rmtree(todo.folder.path)
    assert verify(again.folder.path).problems == []


def test_a_killed_fork_leaves_nothing_under_its_name(train, monkeypatch):
    from tasks.runs import fork

    parent, _ = train("a")
    monkeypatch.setattr(fork, "write_fork", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare_rerun(parent, "round-0001/update", [], "b")
    assert not (parent.parent / "b").exists()
    monkeypatch.undo()
    prepare_rerun(parent, "round-0001/update", [], "b")
    assert [p.name for p in parent.parent.iterdir() if p.name.startswith(".")] == []


def test_where_the_disk_has_no_links_the_files_are_copied(train, monkeypatch):
    import errno

    def refused(*args):
        raise OSError(errno.EPERM, "no links here")

    parent, _ = train("a", rounds=1)
    monkeypatch.setattr(os, "link", refused)
    todo = prepare_rerun(parent, "round-0000/update", [], "b")
    assert verify(todo.folder.path).problems == []
    assert not set(inodes(parent).values()) & set(inodes(todo.folder.path).values())


def test_what_cannot_be_rerun_is_refused_before_a_fork_is_made(train):
    parent, _ = train("a", rounds=3, retention={"keep_last": 1})
    with pytest.raises(ArtifactError, match=r"round-0000/update/.* was deleted by retention"):
        prepare_rerun(parent, "round-0001/update", [], "b")
    with pytest.raises(ParamsError, match=r"Nearest: round-0000/update, round-0001/update"):
        prepare_rerun(parent, "round-0007/update", [], "b")
    with pytest.raises(
        ParamsError, match=r"something that update reads\. .* only what .*score reads"
    ):
        prepare_rerun(parent, "round-0000/update", ["reward.ocr_weight=0.5"], "b")
    shutil.rmtree(parent / "round-0002/score")
    with pytest.raises(ArtifactError, match="round-0002/score must be a finished artifact"):
        prepare_rerun(parent, "round-0002/advantage", [], "b")
    assert not (parent.parent / "b").exists()


def rewards(folder, round=0):
    from calligrapher.tables.parquet import read_table

    files = sorted((folder / f"round-000{round}/score").glob("*.parquet"))
    return [r for file in files for r in read_table(file)["reward"]]


def test_other_weights_rescore_a_round_without_model_servers_or_a_new_picture(
    train, go, constant_scorer
):
    parent, _ = train("a")
    todo = prepare_rerun(parent, "round-0000/score", ["reward.ocr_weight=0.5"], "b")
    go(todo, todo.recorded_scorer(), NoModelResources)
    assert rewards(todo.folder.path) == [0.5 * r for r in rewards(parent)]
    theirs, ours = inodes(parent), inodes(todo.folder.path)
    pictures = [name for name in ours if "rollout" in name]
    assert pictures
    assert all(ours[name] == theirs[name] for name in pictures)
    assert digest(todo.folder.path, "round-0000/score") != digest(parent, "round-0000/score")


class WeighingScorer:
    """Components from the picture's bytes, weighed by the params; every fourth picture has no
    OCR."""

    def __init__(self, params):
        self.params, self.calls = params, 0

    def identity(self):
        return {"scorers": "weighing"}

    def score(self, images, cases, letters=False):
        import hashlib

        from reward_server.components import NAMES
        from tasks.resources.rewards import reward_of

        self.calls += len(images)
        rows = []
        for image in images:
            a, b = hashlib.sha256(image).digest()[:2]
            row = dict.fromkeys(NAMES) | {"vlm_score": b / 256}
            errors = {"ocr_accuracy": "no line; none at all"} if a % 4 == 0 else {}
            row |= {} if errors else {"ocr_accuracy": a / 256}
            rows.append(row | reward_of(self.params, row, errors))
        return rows


VLM = {
    "server_urls": ["http://127.0.0.1:9"],
    "ocr_weight": 0.7,
    "vlm_weight": 0.3,
    "max_unscored_share": 1.0,
}


@pytest.fixture
def weighed(train, values):
    from tasks.params.run_params import RunParams

    scorer = WeighingScorer(RunParams.model_validate(values("nft", reward=VLM)).reward)
    return train("a", "nft", scorer, rounds=1, reward=VLM)[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["reward.ocr_weight=0.1"],
        ["reward.ocr_weight=0"],
        ["reward.vlm_weight=0", "reward.ocr_weight=2"],
    ],
)
def test_recorded_scores_give_what_scoring_anew_gives(weighed, go, overrides):
    recorded = prepare_rerun(weighed, "round-0000/score", overrides, "b")
    go(recorded, recorded.recorded_scorer(), NoModelResources)
    shutil.rmtree(weighed / "round-0000/score")  # now nothing is recorded
    asked = prepare_rerun(weighed, "round-0000/score", overrides, "c")
    assert asked.recorded_scorer() is None
    scorer = WeighingScorer(asked.params.reward)
    go(asked, scorer, NoModelResources)
    assert scorer.calls == 9
    one, other = (f.folder.path for f in (recorded, asked))
    assert digest(one, "round-0000/score") == digest(other, "round-0000/score")
    assert rewards(one) == rewards(other)


def test_a_component_that_was_not_measured_needs_the_servers(weighed):
    todo = prepare_rerun(weighed, "round-0000/score", ["reward.style_weight=0.5"], "b")
    assert todo.recorded_scorer() is None


def test_another_scorer_scores_the_old_pictures_anew(train, go, constant_scorer):
    parent, _ = train("a")
    overrides = ["reward.server_urls=[http://127.0.0.1:9]"]
    todo = prepare_rerun(parent, "round-0000/score", overrides, "b")
    assert todo.recorded_scorer() is None
    constant_scorer.identity = lambda: {"scorers": "another"}
    go(todo, constant_scorer, NoModelResources)
    assert rewards(todo.folder.path) == [0.25] * 9
    assert [len(images) for images, _ in constant_scorer.calls] == [4, 4, 1]


def test_the_recorded_scorer_never_makes_up_a_score(weighed):
    todo = prepare_rerun(weighed, "round-0000/score", ["reward.ocr_weight=0.1"], "b")
    with pytest.raises(RewardError, match="No reward server was started"):
        todo.recorded_scorer().score([b""], [None])


def average(folder, name):
    return load_file(folder / name / "ema.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_fork_that_switches_the_average_on_starts_it_from_the_trained_weights(train, go):
    from calligrapher.rl.ema import ema_decay, lerp_

    parent, _ = train("a", ema={"use_ema": False}, evaluate={"every": 1})
    assert average(parent, "round-0001/update") == {}
    on = ["ema.use_ema=true", "ema.update_interval=4", "ema.decay=0.9"]
    todo = prepare_rerun(parent, "round-0001/update", on, "b", downstream=True)
    summary = go(todo)
    fork = todo.folder.path
    expected, trained = (
        load_file(parent / f"round-000{r}/update/trained.safetensors") for r in (0, 1)
    )
    lerp_(expected, trained, ema_decay(4, 0.9))  # two steps a round: once in this one
    assert equal(average(fork, "round-0001/update"), expected)
    file = Artifact.load(fork / "round-0001/update").files["ema.safetensors"]
    assert summary["adapter_digest"] == file.sha256
    assert summary["ocr_accuracy_after"] is not None


def test_a_fork_that_switches_the_average_off_does_not_carry_the_old_one(train, go):
    from tasks.weights.checkpoints import find_checkpoint

    parent, _ = train("a")
    todo = prepare_rerun(parent, "round-0001/update", ["ema.use_ema=false"], "b", downstream=True)
    go(todo)
    fork = todo.folder.path
    assert average(fork, "round-0001/update") == {}
    trained = "round-0001/update/trained.safetensors"
    assert (fork / trained).read_bytes() == (parent / trained).read_bytes()
    assert find_checkpoint(str(fork), fork.parent).path == fork / trained


def test_a_fork_with_other_moments_is_told_to_keep_them_or_begin_anew(train, go, monkeypatch):
    import sys
    from types import SimpleNamespace

    class EightBit(torch.optim.SGD):  # bitsandbytes' is not installed everywhere
        def __init__(self, params, *, lr, betas, eps, weight_decay):
            super().__init__(params, lr=lr)

    parent, _ = train("a")
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=EightBit))
    eight = ["update.use_8bit_adam=true"]
    with pytest.raises(
        CheckpointError, match=r"32-bit ones\. Set update\.use_8bit_adam=false, or begin"
    ):
        go(prepare_rerun(parent, "round-0001/update", eight, "b"))
    go(prepare_rerun(parent, "round-0000/update", eight, "c"))  # as the message advises


@pytest.mark.parametrize("switched_on", [True, False])
def test_a_shared_checkpoint_is_evaluated_as_it_was_made(train, go, monkeypatch, switched_on):
    from tasks.stages import evaluate

    parent, _ = train("a", ema={"use_ema": not switched_on}, evaluate={"every": 2})
    used, real = [], evaluate.evaluate_weights

    def capture(resources, weights, *rest, **more):
        used.append(weights)
        return real(resources, weights, *rest, **more)

    monkeypatch.setattr(evaluate, "evaluate_weights", capture)
    overrides = [f"ema.use_ema={str(switched_on).lower()}", "evaluate.seed=5"]
    go(prepare_rerun(parent, "round-0001/evaluate", overrides, "b"))
    kind = "trained" if switched_on else "ema"
    assert equal(used[0], load_file(parent / f"round-0001/update/{kind}.safetensors"))


@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_a_replay_with_unchanged_params_ends_as_the_run_that_sampled(train, go, algorithm):
    parent, whole = train("a", algorithm)
    todo = prepare_replay(parent, [], "b")
    summary = go(todo)
    assert summary["adapter_digest"] == whole["adapter_digest"]
    theirs, ours = inodes(parent), inodes(todo.folder.path)
    shared = [n for n in ours if "/rollout/" in n or "/score/" in n or n.startswith("warmup/")]
    assert len(shared) > 15
    assert all(ours[name] == theirs[name] for name in shared)


def test_a_replay_trains_by_its_own_params_on_the_same_images(train, go):
    parent, whole = train("a")
    summary = go(
        prepare_replay(parent, ["update.learning_rate=5e-4", "reward.ocr_weight=0.5"], "b")
    )
    assert summary["adapter_digest"] != whole["adapter_digest"]
    assert (summary["rounds"], summary["images"]) == (2, 18)
    assert rewards(parent.parent / "b", 1) == [0.5 * r for r in rewards(parent, 1)]


def test_nft_replays_images_that_grpo_sampled_but_not_the_reverse(train, go, tmp_path):
    parent, _ = train("a", "grpo")
    nft = "nft={nft_beta: 1.0, num_train_sigmas: 1, kl_coef: 0.0}"
    summary = go(prepare_replay(parent, ["grpo=null", nft], "b"))
    assert summary["algorithm"] == "nft"
    other, _ = train("c", "nft")
    with pytest.raises(ParamsError, match="algorithm: nft -> grpo"):
        prepare_replay(other, ["nft=null", "grpo={window_size: 1}"], "d")
    with pytest.raises(ParamsError, match=r"rollout\.num_inference_steps: 3 -> 4"):
        prepare_replay(other, ["rollout.num_inference_steps=4"], "d")


def test_the_order_of_the_plan_is_that_in_which_a_run_makes_its_artifacts(train, make_resources):
    folder, _ = train("a", evaluate={"every": 2})
    there = {p.parent.relative_to(folder).as_posix() for p in folder.rglob("artifact.json")}
    assert there == set(planned(make_resources(evaluate={"every": 2}).params))


@pytest.mark.slow
def test_mlflow_shows_a_fork_under_its_parent_with_curves_on_the_same_axis(train, go, tmp_path):
    from mlflow import MlflowClient

    parent, _ = train("a", tracking={"enabled": True})
    go(prepare_rerun(parent, "round-0001/update", ["nft.nft_beta=0.2"], "b"))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("calligrapher-rl").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert runs.keys() == {"a", "b"}
    tags = runs["b"].data.tags
    assert tags["mlflow.parentRunId"] == runs["a"].info.run_id
    assert (tags["forked_from"], tags["stage"], tags["round"]) == ("a", "update", "1")
    for key, same in (("score/reward_mean", True), ("update/loss", False)):
        theirs, ours = (
            [(m.step, m.value) for m in client.get_metric_history(runs[name].info.run_id, key)]
            for name in ("a", "b")
        )
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        assert (ours == theirs) is same
    params = [runs[name].data.params["nft.nft_beta"] for name in ("a", "b")]
    assert params == ["1.0", "0.2"]


def test_a_fork_is_made_beside_its_parent_also_from_inside_it(train, go, monkeypatch):
    from pathlib import Path

    parent, _ = train("a", rounds=1)
    monkeypatch.chdir(parent)
    todo = prepare_rerun(Path("."), "round-0000/advantage", [], "b")
    go(todo)
    assert todo.folder.path == parent.parent / "b"
    assert todo.folder.fork.parent == "../a"


def test_a_parent_that_was_prolonged_does_not_prolong_its_fork(train, go):
    parent, _ = train("a", rounds=1)
    first = go(prepare_replay(parent, [], "b"))
    train("a", rounds=2)
    again = prepare_replay(parent, [], "b")
    assert again.params.rounds == 1
    assert go(again)["adapter_digest"] == first["adapter_digest"]


def test_after_a_mended_sample_a_fork_goes_on_with_it_and_keeps_what_was_made(
    train, go, cases, tmp_path
):
    data = shutil.copytree(cases / "train", tmp_path / "cases")
    here = {"data": {"train": str(data)}}
    parent, _ = train("a", rounds=2, **here)
    for stage in ("rollout", "score", "advantage", "update", "refresh"):
        shutil.rmtree(parent / "round-0001" / stage)  # as if the run had ended there
    shutil.copy(data / "test1_ref.png", data / "test2_ref.png")
    with pytest.raises(ArtifactError, match=r"(?s)train_data.*rerun RUN STAGE --fork NAME --down"):
        train("a", rounds=2, **here)
    todo = prepare_rerun(parent, "round-0001/rollout", [], "b", downstream=True)
    assert go(todo)["rounds"] == 2
    assert digest(todo.folder.path, "round-0000/update") == digest(parent, "round-0000/update")


def test_a_password_in_the_store_s_address_is_refused_before_a_fork_holds_it(train):
    folder, _ = train("parent", rounds=1)
    told = ["tracking.uri=postgresql://me:secret@host/db", "nft.nft_beta=0.5"]
    with pytest.raises(ParamsError, match="must not hold a password"):
        prepare_rerun(folder, "round-0000/update", told, "fork")
    assert [path.name for path in folder.parent.iterdir()] == ["parent"]


def test_a_password_in_the_store_s_address_is_refused_before_a_run_holds_it(
    make_resources, tmp_path
):
    resources = make_resources(tracking={"uri": "https://me:secret@host"})
    with (
        pytest.raises(ParamsError, match="must not hold a password"),
        open_run(resources, tmp_path / "a"),
    ):
        pass
    assert not (tmp_path / "a").exists()
