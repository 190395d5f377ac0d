"""Names of models as files, and all that a run learned as the start of another."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_runs import rewrite_average

from calligrapher.errors import CheckpointError, ParamsError
from calligrapher.model.adapter_files import adapter_state
from calligrapher.model.loading import load_model
from calligrapher.tiny.pack import DATA
from tasks.artifacts.digests import path_digest
from tasks.params.sections import ModelParams
from tasks.weights.model_files import model_files

ONE_ROUND = {
    "rounds": 1,
    "warmup": {"steps": 0},
    "rollout": {"num_cases": 2, "num_images_per_prompt": 2},
}
LORA = {"rank": 3, "alpha": 5.0, "targets": ["to_q", "proj_out"]}


@pytest.fixture
def encodings(tmp_path):
    """The data folder where `calligrapher train` has it: beside the runs."""
    return tmp_path / "data"


@pytest.fixture
def section(values):
    """`section(lora=...)` -> the params' section `model` of the random model."""
    return lambda **changes: ModelParams.model_validate(values()["model"] | changes)


@pytest.fixture
def trained(train):
    """`trained("first", lora=...)` -> a run whose checkpoint holds weights that moved far."""

    def trained(name, **model):
        folder, _ = train(name, **ONE_ROUND, model=model)
        update = folder / "round-0000/update"
        torch.manual_seed(0)
        weights = load_file(update / "ema.safetensors")
        weights = {name: torch.randn(w.shape) * 0.2 for name, w in weights.items()}
        rewrite_average(update, weights)
        return folder, weights

    return trained


def policy_of(model, files):
    """The policy that a run with the params' section `model` starts from."""
    loaded = load_model(
        files.base,
        files.siglip,
        files.adapter,
        digest=files.digest,
        guidance_scale=3.5,
        max_sequence_length=24,
        train_adapter=model.train_adapter,
        lora=model.lora and model.lora.model_dump(),
        device="cpu",
    )
    files.load_lora(loaded.policy)
    return loaded.policy


def test_the_word_tiny_means_the_embedded_model(tmp_path):
    model = ModelParams(base="tiny", initial_adapter="tiny")
    files = model_files(model, tmp_path)
    expected = (DATA / "flux-fill", DATA / "siglip", DATA / "calligrapher.bin")
    assert (files.base, files.siglip, files.adapter) == expected
    assert files.digest == "+".join(path_digest(path) for path in expected)
    assert model_files(ModelParams(base="tiny"), tmp_path).digest.endswith("+new")
    assert not list(tmp_path.iterdir())


def test_another_base_needs_a_siglip_of_its_own(section, tmp_path):
    with pytest.raises(ParamsError, match=r"model\.siglip must name SigLIP's folder"):
        model_files(section(siglip=None), tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.initial_adapter must name weights\. Got no"):
        model_files(section(initial_adapter="nowhere"), tmp_path)


def test_lora_on_the_adapter_is_added_once_to_a_file_of_its_own(trained, section, tmp_path):
    lora = {"rank": 3, "alpha": 5.0, "targets": [], "adapter_targets": ["to_k_ip"]}
    trained("first", train_adapter=False, lora=lora)
    files = [model_files(section(initial_adapter="first"), tmp_path) for _ in range(2)]
    assert files[0] == files[1]
    assert files[0].lora is None
    assert list((tmp_path / "data/adapters").iterdir()) == [files[0].adapter]


def test_training_goes_on_from_all_of_another_run(trained, train, tmp_path):
    model = {"train_adapter": False, "lora": LORA}
    _, weights = trained("first", **model)
    second, _ = train("second", **ONE_ROUND, model=model | {"initial_adapter": "first"})
    start = load_file(second / "warmup/trained.safetensors")
    assert start.keys() == weights.keys()
    assert all(torch.equal(start[name], weights[name]) for name in weights)
    third, _ = train("third", **ONE_ROUND, model=model | {"initial_adapter": "second"})
    began = load_file(third / "warmup/trained.safetensors")
    left = load_file(second / "round-0000/update/ema.safetensors")
    assert all(torch.equal(began[name], left[name]) for name in left)


@pytest.mark.parametrize("train_adapter", [False, True])
def test_a_run_goes_on_from_all_that_another_learned_on_the_transformer(
    trained, section, random_model, tmp_path, train_adapter, caplog
):
    model = {"train_adapter": train_adapter, "lora": LORA}
    _, weights = trained("first", **model)
    model = section(initial_adapter="first", **model)
    files = model_files(model, tmp_path)
    start = policy_of(model, files).snapshot()
    assert start.keys() == weights.keys()
    assert all(torch.equal(start[name], weights[name]) for name in weights)
    assert files.digest.count("+") == 3
    assert dataclasses.replace(files, lora=None).digest == files.digest.rpartition("+")[0]
    if not train_adapter:
        assert files.adapter == random_model / "calligrapher.bin"
    assert "Only its adapter is read" not in caplog.text


def test_lora_on_both_goes_along_whole(trained, section, random_model, tmp_path):
    lora = LORA | {"adapter_targets": ["to_k_ip"]}
    _, weights = trained("first", train_adapter=False, lora=lora)
    model = section(initial_adapter="first", train_adapter=True, lora=LORA)
    files = model_files(model, tmp_path)
    start = policy_of(model, files).snapshot()
    began = adapter_state(random_model / "calligrapher.bin")
    moved = {n for n, w in began.items() if not torch.equal(start[f"adapter.{n}"], w)}
    assert moved == {name for name in began if name.endswith("to_k_ip.weight")}
    on_transformer = [name for name in weights if name.startswith("transformer.")]
    assert all(torch.equal(start[name], weights[name]) for name in on_transformer)


@pytest.mark.parametrize(
    "lora", [None, LORA | {"rank": 2}, LORA | {"alpha": 6.0}, LORA | {"targets": ["to_q"]}]
)
def test_lora_that_the_new_run_has_no_place_for_is_refused_with_the_way(
    trained, section, tmp_path, lora
):
    trained("first", train_adapter=False, lora=LORA)
    model = section(initial_adapter="first", lora=lora)
    with pytest.raises(CheckpointError) as refusal:
        model_files(model, tmp_path)
    assert "must be {rank: 3, alpha: 5, targets: [to_q, proj_out]}" in str(refusal.value)
    assert "calligrapher convert first FOLDER/calligrapher.bin --lora merged" in str(refusal.value)


def test_the_order_of_the_targets_does_not_matter(trained, section, tmp_path):
    trained("first", train_adapter=False, lora=LORA)
    turned = LORA | {"targets": LORA["targets"][::-1]}
    assert model_files(section(initial_adapter="first", lora=turned), tmp_path).lora


def test_lora_of_another_base_is_refused(trained, section, tmp_path, random_model):
    trained("first", train_adapter=False, lora=LORA)
    base = shutil.copytree(random_model / "flux-fill", tmp_path / "base")
    model = section(initial_adapter="first", lora=LORA, base=str(base))
    assert model_files(model, tmp_path).lora  # the same files elsewhere
    (base / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.base must be the one that first trained"):
        model_files(model, tmp_path)
