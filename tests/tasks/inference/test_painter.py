"""Opening a model to paint with: a run's variants and canvas, the embedded model, what cannot be
opened."""

import shutil

import pytest
from safetensors.torch import load_file

from calligrapher.data.canvas import Canvas
from calligrapher.data.dataset import load_cases
from calligrapher.data.images import load_rgb
from calligrapher.errors import ArtifactError, CheckpointError, ParamsError
from calligrapher.rl.train_state import EMA, TRAINED
from tasks.inference.painter import open_painter


def same(weights, path):
    wanted = load_file(path)
    return weights.keys() == wanted.keys() and all((weights[n] == wanted[n]).all() for n in wanted)


def differ(one, other):
    return one.tobytes() != other.tobytes()


@pytest.fixture(scope="module")
def trained_once():
    return {}


@pytest.fixture
def run(trained_once, train):
    """A run of two rounds; its learning rate makes every variant visible. Read-only: all tests
    share it."""
    if not trained_once:
        made, _ = train(
            "first",
            update={"learning_rate": 0.02},
            warmup={"learning_rate": 0.02},
            nft={"num_train_sigmas": 2},
        )
        trained_once["run"] = made
    return trained_once["run"]


@pytest.fixture
def case(cases):
    return load_cases(cases / "evaluation")[0]


def test_a_run_is_painted_with_before_and_after_its_training(run, case):
    painter = open_painter(str(run))
    assert (painter.canvas, painter.num_steps) == (Canvas(48, 32), 3)
    assert list(painter.variants) == ["base", "warmup", "trained"]
    assert same(painter.variants["warmup"], run / "warmup" / TRAINED)
    assert same(painter.variants["trained"], run / "round-0001/update" / EMA)
    assert len(set(painter.digests.values())) == 3

    before, middle, after = (painter.paint(name, case, seeds=[1, 2]) for name in painter.variants)
    again = painter.paint("base", case, seeds=[1, 2])
    for i in range(2):
        assert before[i].size == load_rgb(case.source).size
        assert differ(before[i], middle[i])
        assert differ(middle[i], after[i])
        assert not differ(before[i], again[i])


def test_an_artifact_of_a_round_names_that_rounds_checkpoint(run):
    earlier = open_painter(str(run / "round-0000" / "update"))
    assert same(earlier.variants["trained"], run / "round-0000/update" / EMA)
    by_name = open_painter("first", runs_dir=run.parent)
    assert same(by_name.variants["trained"], run / "round-0001/update" / EMA)
    assert list(open_painter(str(run / "warmup")).variants) == ["base", "warmup"]


def test_a_run_without_an_average_is_painted_with_its_trained_weights_while_its_model_is_there(
    train, random_model, tmp_path
):
    adapter = shutil.copy(random_model / "calligrapher.bin", tmp_path)
    run, _ = train("plain", ema={"use_ema": False}, model={"initial_adapter": adapter}, rounds=1)
    assert same(open_painter(str(run)).variants["trained"], run / "round-0000/update" / TRAINED)
    with open(adapter, "ab") as file:
        file.write(b"\0")
    with pytest.raises(ParamsError, match="They have changed since"):
        open_painter(str(run))


def test_the_variants_of_a_case_cost_one_encoding(run, case, cases, count_calls):
    painter = open_painter(str(run))
    other = load_cases(cases / "evaluation")[1]
    with count_calls(painter.model) as calls:
        for variant in painter.variants:
            painter.paint(variant, case, seeds=[1, 2])
        painter.paint("base", other, seeds=[1])
    encoders = dict.fromkeys(("clip", "t5", "siglip", "vae_encode"), 2)
    assert calls == encoders | {"transformer": 4 * 3, "vae_decode": 4}


def test_a_picture_that_changes_under_its_name_is_encoded_anew(run, case, tmp_path):
    painter = open_painter(str(run))
    path = tmp_path / "source.png"
    moving = case.model_copy(update={"source": path})
    load_rgb(case.source).save(path)
    one = painter.paint("base", moving, seeds=[1])[0]
    load_rgb(case.source).point(lambda value: 255 - value).save(path)
    assert differ(one, painter.paint("base", moving, seeds=[1])[0])


def test_settings_take_the_place_of_the_runs(run, case):
    painter = open_painter(str(run), num_steps=2, width=64, guidance_scale=2.0)
    assert (painter.canvas, painter.num_steps) == (Canvas(64, 32), 2)
    assert painter.model.policy.model.guidance_scale == 2.0
    assert (
        open_painter(str(run), num_steps=1).num_steps == 1
    )  # too few to train on, enough to paint
    with pytest.raises(ParamsError, match=r"steps must be at least 1\. Got 0"):
        open_painter(str(run), num_steps=0)
    assert (painter.noise_level, open_painter(str(run), noise_level=1).noise_level) == (0, 1)
    with pytest.raises(ParamsError, match=r"evaluate\.noise_level must be .*1.* Got 1\.5"):
        open_painter(str(run), noise_level=1.5)
    with pytest.raises(ParamsError, match=r"model\.width must be a multiple of 8\. Got 50"):
        open_painter(str(run), width=50)
    with pytest.raises(ParamsError, match=r"model\.mixed_precision must be"):
        open_painter(str(run), mixed_precision="int3")


def test_a_painter_with_fresh_noise_paints_otherwise(run, case):
    ode, fresh = (
        open_painter(str(run), noise_level=level).paint("base", case, seeds=[1])[0]
        for level in (None, 1.0)
    )
    assert differ(ode, fresh)


def test_a_model_in_folders_needs_an_adapter(random_model, case):
    folders = {"base": str(random_model / "flux-fill"), "siglip": str(random_model / "siglip")}
    size = {"width": 48, "height": 32, "max_sequence_length": 24, "device": "cpu"}
    painter = open_painter(
        **folders, adapter=str(random_model / "calligrapher.bin"), **size, num_steps=2
    )
    assert list(painter.variants) == ["base"]
    assert painter.paint("base", case, seeds=[1])[0].size == (96, 32)
    with pytest.raises(ParamsError, match=r"The weights must be base here\. Got 'trained'"):
        painter.paint("trained", case, seeds=[1])
    with pytest.raises(ParamsError, match="An adapter must be named"):
        open_painter(**folders, **size)
    with pytest.raises(CheckpointError, match="must fit this model"):
        open_painter(adapter=str(random_model / "calligrapher.bin"))


def test_a_run_that_learned_more_than_an_adapter_is_not_taken_for_one(train):
    lora = {"train_adapter": False, "lora": {"rank": 2, "alpha": 2.0, "targets": ["to_q"]}}
    run, _ = train("tuned", rounds=1, model=lora)
    with pytest.raises(ParamsError, match=r"also trained LoRA.*Name it as the run: --run tuned\."):
        open_painter(adapter="tuned", runs_dir=run.parent)
    assert differ_anywhere(open_painter("tuned", runs_dir=run.parent))


def differ_anywhere(painter):
    base, trained = painter.variants["base"], painter.variants["trained"]
    return any((base[name] != trained[name]).any() for name in base)


def test_what_is_no_whole_run_is_told(run, tmp_path):
    with pytest.raises(ParamsError, match=r"A run must be named.*adapter\.bin"):
        open_painter("adapter.bin", runs_dir=tmp_path)
    with pytest.raises(ArtifactError, match=r"rollout must hold '.*\.safetensors'"):
        open_painter(str(run / "round-0000" / "rollout"))
    with pytest.raises(ArtifactError, match="nowhere must name a run on this disk"):
        open_painter("nowhere", runs_dir=tmp_path)
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "round-0001/update" / EMA).unlink()
    with pytest.raises(ArtifactError, match="damaged"):
        open_painter(str(broken))
