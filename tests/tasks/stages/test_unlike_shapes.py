"""Whole runs on references of unlike shapes, stacked on top of the canvas."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from calligrapher.model.policy import Policy
from calligrapher.rl.train_loop import TrainLoop
from calligrapher.tables.parquet import read_shard

REFERENCES = [
    (96, 32),
    (96, 20),
    (96, 64),
    (32, 48),
]  # at a width of 48: 16, 16, 32 and 64 (72) tall


@pytest.fixture(scope="module")
def unlike(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlike")
    for name in ("train", "evaluation"):
        shutil.copytree(cases / name, folder / name)
        for i, path in enumerate(sorted((folder / name).glob("test*_ref.png"))):
            Image.open(path).resize(REFERENCES[i % 4]).save(path)
    return folder


@pytest.fixture
def how(unlike):
    return {
        "data": {"train": str(unlike / "train"), "evaluation": str(unlike / "evaluation")},
        "model": {"reference_context": True},
        "rollout": {"num_cases": 7, "num_images_per_prompt": 2, "batch_size": 3, "shard_size": 5},
        "rounds": 1,
    }


def rows_of(folder):
    shards = [
        read_shard(path)
        for path in sorted((folder / "round-0000/rollout").glob("*"))
        if path.suffix == ".parquet"
    ]
    return {name: [v for shard in shards for v in shard[name]] for name in shards[0]}


@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_rows_of_several_lengths_are_sampled_stored_trained_on_and_evaluated(
    train, how, algorithm, monkeypatch
):
    lengths, real = set(), Policy.velocity

    def velocity(self, x, *more):
        lengths.add(x.shape[1])
        return real(self, x, *more)

    monkeypatch.setattr(Policy, "velocity", velocity)
    folder, summary = train("a", algorithm, **how, evaluate={"every": 1})
    assert len(lengths) == 3
    rows = rows_of(folder)
    assert [(g, m) for g in range(7) for m in range(2)] == list(
        zip(rows["group_id"], rows["member"], strict=True)
    )
    assert {len(x0) for x0 in rows["x0"]} == lengths
    if algorithm == "grpo":
        assert all(
            t.shape[1] == len(x) for t, x in zip(rows["trajectory"], rows["x0"], strict=True)
        )
    assert len(summary["adapter_digest"]) == 64
    start = load_file(folder / "warmup/trained.safetensors")
    end = load_file(folder / "round-0000/update/trained.safetensors")
    assert any(not torch.equal(start[name], end[name]) for name in start)
    meta = json.loads((folder / "round-0000/update/artifact.json").read_text())["meta"]
    assert meta["images"] == 14 - meta["left_out"]


@pytest.mark.slow
def test_each_image_is_the_one_that_is_sampled_alone(train, how):
    folder, _ = train("a", **how)
    alone, _ = train("b", **how | {"rollout": how["rollout"] | {"batch_size": 1}})
    for one, other in zip(rows_of(folder)["x0"], rows_of(alone)["x0"], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_ratio_is_exactly_one_in_batches_as_the_rollout_had_them(train, how):
    update = {"batch_size": 3, "gradient_accumulation_steps": 1}
    folder, _ = train("a", "grpo", **how, update=update, grpo={"kl_coef": 0.1})
    lines = (folder / "round-0000/update/metrics.jsonl").read_text().splitlines()
    first, *later = map(json.loads, lines)
    assert first["ratio_mean"] == 1.0
    assert first["ratio_max_dev"] == 0.0
    assert any(row["approx_kl"] > 0 for row in later)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_an_update_that_died_goes_on_as_it_would_have_gone(train, how, algorithm, monkeypatch):
    how |= {"update": {"gradient_accumulation_steps": 1, "checkpointing_steps": 1}}
    _, whole = train("whole", algorithm, **how)
    real, taken = TrainLoop._step, []

    def step(self, *args):
        if len(taken) == 3:  # one of the warm-up, two of the update
            raise KeyboardInterrupt
        taken.append(self.state.step)
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(TrainLoop, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            train("a", algorithm, **how)
    _, resumed = train("a", algorithm, **how)
    assert resumed["adapter_digest"] == whole["adapter_digest"]


@pytest.mark.slow
def test_images_of_several_lengths_are_replayed(train, how, make_resources):
    from tasks.runs.rerun import carry_out, prepare_replay
    from tasks.runs.run import open_run

    folder, _ = train("a", "grpo", **how)
    replay = prepare_replay(folder, ["update.learning_rate=2e-3"], "b")
    resources = make_resources("grpo", **how | {"update": {"learning_rate": 2e-3}})
    with open_run(resources, replay.folder.path) as run:
        assert carry_out(run, replay)["rounds"] == 1


def test_a_plan_counts_the_largest_and_tells_the_mean(values, how, unlike):
    from tasks.data.demands import heights_on
    from tasks.params.run_params import RunParams
    from tasks.planning.memory import batch_of, meta_model
    from tasks.planning.shapes import shapes

    params = RunParams.model_validate(values(**how))
    found = shapes(params)
    tall = [16, 16, 32, 64, 16, 16, 32]  # of seven cases, 72 being nearer to 64 than to 80: a tie
    assert (found.largest, found.mean) == (32 + max(tall), pytest.approx(32 + sum(tall) / 7))
    model = meta_model(params)
    tokens = 48 * found.largest // model.multiple**2
    assert batch_of(params, model, 3).image == tokens
    assert "16 to 64 tall (27 in the mean)" in found.words

    from calligrapher.data.canvas import Canvas, prepare
    from calligrapher.data.dataset import load_cases

    canvas, cases = Canvas(48, 32, True), load_cases(unlike / "train")
    assert [canvas.height_with(case) for case in cases] == [
        prepare(case, canvas).image.shape[1] for case in cases
    ]
    assert "3 heights from 48 to 96" in heights_on(canvas, cases)
    assert heights_on(Canvas(48, 32), cases) is None
    gone = how | {"data": {"train": "not-there", "evaluation": None}}
    assert shapes(RunParams.model_validate(values(**gone))).largest == 32 + 48
