"""Weights of runs as files for other programs: what is written computes what was trained."""

import itertools
import json
import shutil
import subprocess

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from small_runs import rewrite_average
from velocities import velocity

from calligrapher.errors import ArtifactError, CheckpointError, ParamsError
from calligrapher.model.adapter_files import adapter_state, load_adapter, write_calligrapher_bin
from calligrapher.model.export import with_lora
from tasks.weights.convert import convert

ONE_ROUND = {
    "rounds": 1,
    "warmup": {"steps": 0},
    "rollout": {"num_cases": 2, "num_images_per_prompt": 2},
}
TARGETS = {"targets": ["to_q", "proj_out"], "adapter_targets": ["to_k_ip", "proj.2", "id_proj.0"]}
LORA = {"model": {"train_adapter": False, "lora": {"rank": 3, "alpha": 5.0, **TARGETS}}}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def encodings(tmp_path):
    """The data folder where `calligrapher train` has it: beside the runs, by which their names are
    found."""
    return tmp_path / "data"


@pytest.fixture
def plain(train):
    """The folder of a run that trained the adapter whole."""
    return train("plain", **ONE_ROUND)[0]


@pytest.fixture
def tuned(train):
    """The folder of a run that trained LoRA alone, on transformer and adapter."""
    return train("tuned", **ONE_ROUND, **LORA)[0]


def trained(folder, name="ema"):
    return load_file(folder / f"round-0000/update/{name}.safetensors")


def test_a_run_is_written_bit_by_bit_and_read_again(plain, tmp_path):
    targets = ["ip-adapter.bin", "ip-adapter.safetensors", "calligrapher.bin"]
    for name, target in itertools.product(("ema", "trained"), targets):
        (written,) = convert(str(plain), str(tmp_path / name / target), weights=name)
        assert written == tmp_path / name / target
        wanted = {n.removeprefix("adapter."): w for n, w in trained(plain, name).items()}
        assert equal(adapter_state(written), wanted)
        (again,) = convert(str(written), str(tmp_path / "calligrapher.safetensors"), force=True)
        assert equal(adapter_state(again), wanted)


def test_every_way_to_name_a_checkpoint_gives_the_same_file(plain, tmp_path):
    update = plain / "round-0000/update"
    file = update / "ema.safetensors"
    names = [
        plain,
        "plain",
        update,
        "plain/round-0000/update",
        update.as_uri(),
        file,
        file.as_uri(),
    ]
    files = []
    for i, name in enumerate(names):
        files += convert(str(name), str(tmp_path / str(i) / "calligrapher.bin"), runs_dir=tmp_path)
    assert len({file.read_bytes() for file in files}) == 1
    assert not equal(adapter_state(files[0]), adapter_state(update / "trained.safetensors"))


def test_a_folder_gets_the_optimizers_step(plain, tmp_path):
    step = json.loads((plain / "round-0000/update/state.json").read_text())["step"]
    (written,) = convert(str(plain), str(tmp_path / "out"))
    assert written == tmp_path / f"out/checkpoint-{step}/ip-adapter.bin"
    assert set(torch.load(written, weights_only=True)) == {
        "image_proj",
        "image_proj_qformer",
        "ip_adapter",
    }
    (written,) = convert(str(plain / "warmup"), str(tmp_path / "out"))
    assert written.parent.name == "checkpoint-0"


def test_another_number_type_is_that_of_every_tensor(plain, tmp_path):
    (written,) = convert(str(plain), str(tmp_path / "calligrapher.bin"), dtype=torch.bfloat16)
    found = adapter_state(written)
    assert {w.dtype for w in found.values()} == {torch.bfloat16}
    wanted = {n.removeprefix("adapter."): w.bfloat16() for n, w in trained(plain).items()}
    assert equal(found, wanted)


@pytest.mark.parametrize(
    ("lora", "rest"), [("merged", False), ("separate", False), ("separate", True)]
)
def test_what_a_lora_run_leaves_computes_what_it_trained(
    train, make_resources, random_model, tmp_path, lora, rest
):
    model = {"model": LORA["model"] | {"train_adapter": rest}}
    tuned, _ = train("tuned", **ONE_ROUND, **model)
    resources = make_resources(**ONE_ROUND, **model)
    # Weights that have moved far, so that a wrong scale or a left out pair would show.
    weights = {n: torch.randn(w.shape) * 0.2 for n, w in resources.model.policy.snapshot().items()}
    rewrite_average(tuned / "round-0000/update", weights)
    resources.model.policy.load(weights)
    model = resources.model.policy.model
    wanted = velocity(model.transformer, model.adapter)

    out = tmp_path / "out" / "calligrapher.bin"
    adapter_file, beside = convert(str(tuned), str(out), lora=lora)
    folder = beside if lora == "merged" else random_model / "flux-fill/transformer"
    transformer = FluxTransformer2DModel.from_pretrained(folder).eval()
    if lora == "separate":
        transformer.load_lora_adapter(beside)
    found = velocity(transformer, load_adapter(adapter_file, transformer))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert {path.name for path in out.parent.iterdir()} == {out.name, beside.name}


def test_lora_on_the_transformer_alone_leaves_the_adapter_the_run_began_with_and_says_so(
    train, random_model, tmp_path, caplog
):
    lora = {"train_adapter": False, "lora": {"rank": 2, "alpha": 2.0, "targets": ["to_q"]}}
    folder, _ = train("a", **ONE_ROUND, model=lora)
    written, _ = convert(str(folder), str(tmp_path / "calligrapher.bin"))
    assert equal(adapter_state(written), adapter_state(random_model / "calligrapher.bin"))
    assert "must load " + str(tmp_path / "pytorch_lora_weights.safetensors") in caplog.text
    caplog.clear()
    convert(str(folder), str(tmp_path / "calligrapher.bin"), lora="separate", force=True)
    assert caplog.text == ""


@pytest.mark.parametrize("change", ["another adapter", "no adapter"])
def test_lora_without_the_adapter_that_it_was_trained_on_is_refused(
    tuned, tmp_path, random_model, change
):
    state = {n: w + 1 for n, w in adapter_state(random_model / "calligrapher.bin").items()}
    write_calligrapher_bin(state, tmp_path / "other.bin")
    params = json.loads((tuned / "params.json").read_text())
    params["model"]["initial_adapter"] = (
        str(tmp_path / "other.bin") if change == "another adapter" else None
    )
    (tuned / "params.json").write_text(json.dumps(params))
    with pytest.raises(
        CheckpointError, match=r"began with. It has changed|must name model.initial_adapter"
    ):
        convert(str(tuned), str(tmp_path / "calligrapher.bin"))
    assert not (tmp_path / "calligrapher.bin").exists()
    assert not list(tmp_path.glob(".writing-*"))


# --- any checkpoint continues training ---


def test_a_run_can_begin_with_what_another_left(plain, make_resources, tmp_path):
    update = plain / "round-0000/update"
    files = [update, update / "trained.safetensors"]
    for name in ("calligrapher.bin", "ip-adapter.safetensors"):
        files += convert(str(update), str(tmp_path / name))
    for file in files:
        resources = make_resources(**ONE_ROUND, model={"initial_adapter": str(file)})
        wanted = trained(plain, "trained" if file.stem == "trained" else "ema")
        assert equal(resources.model.policy.snapshot(), wanted)


def test_a_run_can_begin_with_the_adapter_that_a_lora_run_left(train, make_resources, tmp_path):
    lora = LORA["model"]["lora"] | {"targets": []}
    tuned, _ = train("tuned", **ONE_ROUND, model={"train_adapter": False, "lora": lora})
    (whole,) = convert(str(tuned), str(tmp_path / "calligrapher.bin"))
    resources = make_resources(**ONE_ROUND, model={"initial_adapter": str(tuned)})
    wanted = {f"adapter.{name}": weight for name, weight in adapter_state(whole).items()}
    assert equal(resources.model.policy.snapshot(), wanted)
    (kept,) = (tmp_path / "data/adapters").iterdir()
    assert resources.files.adapter == kept


def test_lora_on_the_adapter_of_another_run_is_exported_from_anywhere(
    plain, train, tmp_path, monkeypatch
):
    folder, _ = train("b", **ONE_ROUND, model=LORA["model"] | {"initial_adapter": "plain"})
    monkeypatch.chdir("/")
    (written, _) = convert(str(folder), str(tmp_path / "calligrapher.bin"))
    layers = [name for name in trained(folder) if name.startswith("adapter.") and "lora_A" in name]
    changed = {f"{name.removeprefix('adapter.').split('.lora_A')[0]}.weight" for name in layers}
    found, began = (
        adapter_state(written),
        adapter_state(plain / "round-0000/update/ema.safetensors"),
    )
    assert {name for name in found if not torch.equal(found[name], began[name])} == changed


def test_the_name_of_a_run_is_looked_up_where_the_runs_are(plain, make_resources, tmp_path):
    resources = make_resources(model={"initial_adapter": "plain"})
    assert resources.files.adapter == tmp_path / "plain/round-0000/update/ema.safetensors"


def test_an_adapter_that_is_nowhere_is_told_by_its_key(make_resources):
    with pytest.raises(
        CheckpointError, match=r"model\.initial_adapter must name weights. Got no-such-run"
    ):
        make_resources(model={"initial_adapter": "no-such-run"})


# --- refused ---


def test_an_existing_target_is_replaced_only_by_force(tuned, tmp_path):
    target = tmp_path / "calligrapher.bin"
    beside = tmp_path / "pytorch_lora_weights.safetensors"
    beside.write_bytes(b"mine")
    with pytest.raises(
        ParamsError, match=r"pytorch_lora_weights\.safetensors must not be there yet"
    ):
        convert(str(tuned), str(target))
    assert (target.exists(), beside.read_bytes()) == (False, b"mine")
    convert(str(tuned), str(target), force=True)
    assert load_file(beside)
    (tmp_path / "transformer").mkdir()
    convert(str(tuned), str(target), lora="merged", force=True)
    assert (tmp_path / "transformer/config.json").is_file()


@pytest.mark.parametrize(
    "name", ["adapter.bin", "ip-adapter.pt", "calligrapher.ckpt", "ip-adapter.bin.gz"]
)
def test_another_name_is_answered_with_the_names_there_are(random_model, tmp_path, name):
    with pytest.raises(
        ParamsError, match=r"ip-adapter.bin, ip-adapter.safetensors, calligrapher.bin, callig"
    ):
        convert(str(random_model / "calligrapher.bin"), str(tmp_path / name))


def test_choices_that_would_do_nothing_are_refused(plain, random_model, tmp_path):
    file, target = str(random_model / "calligrapher.bin"), str(tmp_path / "ip-adapter.bin")
    with pytest.raises(ParamsError, match="--weights chooses between an artifact's files"):
        convert(file, target, weights="ema")
    with pytest.raises(ParamsError, match="--weights chooses between an artifact's files"):
        convert(str(plain / "round-0000/update/ema.safetensors"), target, weights="trained")
    with pytest.raises(ParamsError, match="knows no step"):
        convert(file, str(tmp_path / "folder"))
    with pytest.raises(ParamsError, match="--lora needs LoRA of the transformer"):
        convert(str(plain), target, lora="merged")
    with pytest.raises(ParamsError, match="--base is the transformer that --lora merged"):
        convert(str(plain), target, base=random_model / "flux-fill")
    with pytest.raises(CheckpointError, match="It is empty: the stage kept no average"):
        convert(str(plain / "warmup"), target, weights="ema")
    with pytest.raises(CheckpointError, match="must be an artifact's trained"):
        convert(str(plain / "round-0000/update/optimizer.safetensors"), target)
    with pytest.raises(
        ArtifactError, match=r"must hold 'ema.safetensors'. It has shard-0000.parquet"
    ):
        convert(str(plain / "round-0000/rollout"), target)
    assert not list(tmp_path.glob("*.bin"))


def test_the_base_is_not_replaced_even_by_force(tuned, random_model, tmp_path):
    base = shutil.copytree(
        random_model / "flux-fill/transformer", tmp_path / "base/transformer"
    ).parent
    with pytest.raises(ParamsError, match="must stay as it is: it is the base"):
        convert(str(tuned), str(base / "calligrapher.bin"), lora="merged", base=base, force=True)
    assert [path.name for path in base.iterdir()] == ["transformer"]


def test_a_flipped_bit_in_an_artifact_is_not_exported(plain, tmp_path):
    path = plain / "round-0000/update/ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ArtifactError, match=r"ema.safetensors is damaged: it holds other bytes than were"
    ):
        convert(str(plain), str(tmp_path / "calligrapher.bin"))
    assert convert(str(plain), str(tmp_path / "calligrapher.bin"), weights="trained")


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_their_tensor(random_model, tmp_path, number):
    state = {n: w.clone() for n, w in adapter_state(random_model / "calligrapher.bin").items()}
    name = sorted(state)[3]
    state[name].view(-1)[-1] = number
    write_calligrapher_bin(state, tmp_path / "broken.bin")
    with pytest.raises(CheckpointError, match=f"1 of {state[name].numel()} in {name} are NaN or"):
        convert(str(tmp_path / "broken.bin"), str(tmp_path / "ip-adapter.bin"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.bin"]


def test_lora_that_is_not_finite_is_refused_by_its_tensor(tuned, tmp_path):
    weights = trained(tuned)
    name = next(name for name in weights if name.startswith("transformer."))
    weights[name][0, 0] = float("nan")
    rewrite_average(tuned / "round-0000/update", weights)
    for lora in ("merged", "separate"):
        with pytest.raises(
            CheckpointError, match=f"tuned must hold finite numbers. 1 of .* {name}"
        ):
            convert(str(tuned), str(tmp_path / "calligrapher.bin"), lora=lora)


def test_lora_that_leaves_the_range_of_the_bases_numbers_is_refused():
    state = {"to_q.weight": torch.full((2, 2), 6e4, dtype=torch.float16)}
    pair = (torch.full((1, 2), 100.0), torch.full((2, 1), 100.0))
    with pytest.raises(CheckpointError, match=r"4 of 4 in to_q\.weight are NaN or infinite"):
        with_lora(state, {"to_q": pair}, 1.0, lambda size, dtype: torch.empty(size, dtype=dtype))


def test_a_damaged_source_leaves_no_file(random_model, tmp_path):
    whole = (random_model / "calligrapher.bin").read_bytes()
    (tmp_path / "broken.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="must be a whole weights file"):
        convert(str(tmp_path / "broken.bin"), str(tmp_path / "calligrapher.bin"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.bin"]


@pytest.mark.parametrize("name", ["calligrapher.bin", "ip-adapter.safetensors"])
def test_a_full_disk_is_told_and_nothing_half_is_kept(name, random_model, small_disk):
    subprocess.run(["mount", "-o", "remount,size=16k", small_disk], check=True)
    with pytest.raises(ArtifactError, match=f"the disk must have room for .*{name}. It is full: "):
        convert(str(random_model / "calligrapher.bin"), str(small_disk / name))
    assert list(small_disk.iterdir()) == []
