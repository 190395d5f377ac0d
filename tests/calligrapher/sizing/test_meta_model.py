"""The full-size model on the meta device: counts, names, shapes and types, from the packaged
configs."""

import json

import pytest
import torch
from safetensors import safe_open

from calligrapher.model.ip_adapter import StyleAttnProcessor
from calligrapher.sizing import configs as full
from calligrapher.sizing.meta_model import PARTS, build, config_folders, count


@pytest.fixture(scope="module")
def model():
    return build(full.BASE, full.SIGLIP, None, autocast=torch.bfloat16)


def test_the_full_size_model_has_the_published_numbers_of_parameters(model):
    found = {part: count(getattr(model, part)) for part in (*PARTS, "siglip", "adapter")}
    assert found == {
        "transformer": 11_902_391_360,  # published as 12 B; its bfloat16 files take 23.80 GB
        "vae": 83_819_683,  # 168 MB
        "text_encoder": 123_060_480,  # 246 MB
        "text_encoder_2": 4_762_310_656,  # 9.52 GB
        "siglip": 428_225_600,  # published as 428 M
        "adapter": 3_018_043_904,
    }
    adapter = model.adapter
    assert count(adapter.image_proj_mlp) == 1_211_148_544
    assert count(adapter.attn_adapter) == 1_434_451_968
    assert {p.device.type for part in found for p in getattr(model, part).parameters()} == {"meta"}


def test_fill_differs_from_flux_dev_in_its_first_layer_alone(model):
    config = model.transformer.config
    assert (config.in_channels, config.out_channels, config.guidance_embeds) == (
        64 + 64 + 256,
        64,
        True,
    )
    assert tuple(model.transformer.x_embedder.weight.shape) == (3072, 384)
    # The published FLUX.1-dev, whose first layer reads 64 channels.
    assert count(model.transformer) - (384 - 64) * 3072 == 11_901_408_320


def test_the_adapter_sits_in_all_57_blocks_double_blocks_first(model):
    processors = list(model.transformer.attn_processors.items())
    names = [f"transformer_blocks.{i}.attn.processor" for i in range(19)]
    names += [f"single_transformer_blocks.{i}.attn.processor" for i in range(38)]
    assert [name for name, _ in processors] == names
    for i, (_, processor) in enumerate(processors):
        assert isinstance(processor, StyleAttnProcessor)
        assert processor.style is model.adapter.attn_adapter[i]


def test_the_adapter_alone_trains_and_only_its_matrices_may_be_held_in_bfloat16(model):
    policy = model.policy
    assert len(policy.parameters) == 2 * 57 + 6 + 13  # attention, MLP, QFormer
    assert all(name.startswith("adapter.") for name in policy.parameters)
    held = {name for name in policy.parameters if policy.storage_dtype(name) == torch.bfloat16}
    assert sum(policy.parameters[n].numel() for n in held) > 0.98 * count(model.adapter)
    assert {n.rpartition(".")[2] for n in held} == {"weight"}
    assert not any("norm" in name for name in held)


def test_lora_is_counted_and_can_train_in_the_adapters_place():
    lora = {"rank": 16, "alpha": 16.0, "targets": ["to_q", "to_k", "to_v", "to_out.0"]}
    policy = build(full.BASE, full.SIGLIP, None, train_adapter=False, lora=lora).policy
    layers = 4 * 19 + 3 * 38  # single blocks have no to_out
    assert len(policy.parameters) == 2 * layers
    assert sum(p.numel() for p in policy.parameters.values()) == layers * 16 * (3072 + 3072)


def test_a_model_from_its_own_folder_has_the_names_and_shapes_of_its_files(random_model):
    """The same code that sizes the full model, on one whose weights are there."""
    base, siglip = random_model / "flux-fill", random_model / "siglip"
    assert config_folders(base, siglip) == (base, siglip)
    small = build(base, siglip, random_model / "calligrapher.bin")
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(file, "pt") as tensors:
        stored = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    assert {n: tuple(p.shape) for n, p in small.transformer.named_parameters()} == stored
    assert small.adapter.image_proj_mlp.num_tokens == 3  # read from the adapter's own file


def test_folders_that_are_not_there_are_replaced_by_the_packaged_configs(tmp_path):
    assert config_folders(tmp_path / "none", tmp_path / "none") == (full.BASE, full.SIGLIP)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    assert config_folders(tmp_path, full.SIGLIP) == (full.BASE, full.SIGLIP)  # not whole


def test_the_packaged_configs_are_the_layout_of_a_base_folder():
    for part in PARTS:
        config = json.loads((full.BASE / part / "config.json").read_text())
        assert config.get("_class_name") or config["architectures"]
    vae = json.loads((full.BASE / "vae" / "config.json").read_text())
    assert (vae["shift_factor"], vae["scaling_factor"], vae["latent_channels"]) == (
        0.1159,
        0.3611,
        16,
    )
