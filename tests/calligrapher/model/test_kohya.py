"""LoRA under kohya's names: diffusers reads it, and the model computes what it computed."""

import pytest
import torch
from diffusers import FluxFillPipeline
from velocities import call

from calligrapher.errors import CheckpointError
from calligrapher.model.export import lora_pairs, write_lora
from calligrapher.model.kohya import kohya_lora
from calligrapher.model.lora import add_lora

ATTENTION = ["to_q", "to_v", "to_out.0", "add_k_proj", "to_add_out"]


def pair(rank, width, out):
    return torch.randn(rank, width), torch.randn(out, rank)


def test_diffusers_loads_the_double_blocks_and_computes_the_same(
    random_transformer, random_model, tmp_path
):
    targets = [f"transformer_blocks.0.{name}" for name in ("norm1.linear", "ff.net.2")]
    targets += [f"transformer_blocks.0.attn.{name}" for name in ATTENTION]
    add_lora(random_transformer, rank=3, alpha=5.0, targets=targets, seed=1)
    with torch.no_grad():
        for name, parameter in random_transformer.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    weights = {f"transformer.{n}": w for n, w in random_transformer.state_dict().items()}
    layers = kohya_lora(lora_pairs(weights, "transformer"), 5 / 3)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    assert layers[f"{name}.lora_down.weight"].shape[0] == 9
    assert layers[f"{name}.alpha"] == pytest.approx(15)
    write_lora(layers, tmp_path / "kohya.safetensors")
    pipeline = FluxFillPipeline.from_pretrained(random_model / "flux-fill")
    before = call(pipeline.transformer)
    pipeline.load_lora_weights(tmp_path / "kohya.safetensors")
    found, wanted = call(pipeline.transformer), call(random_transformer)
    assert (wanted - before).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_single_block_of_the_full_size_comes_back_as_the_pairs_that_it_was():
    width, block = 3072, "single_transformer_blocks.7"
    pairs = {
        f"{block}.attn.to_k": pair(2, width, width),
        f"{block}.proj_mlp": pair(2, width, 4 * width),
        f"{block}.proj_out": pair(2, 5 * width, width),
    }
    found = FluxFillPipeline.lora_state_dict(kohya_lora(pairs, 0.5))
    for layer, (a, b) in pairs.items():
        got_a, got_b = (found[f"transformer.{layer}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(got_b @ got_a[:, :5], 0.5 * b @ a[:, :5])
    assert not found[f"transformer.{block}.attn.to_q.lora_B.weight"].any()


def test_each_layer_of_the_blocks_is_laid_out_as_the_loader_of_sd_scripts_wants_it(
    random_transformer,
):
    """Names and sizes of all modules that its `networks/lora_flux.py` makes for these blocks.

    That loader took such a file without a missing or an unexpected key, and gave the same velocity
    (docs/formats.md).
    """
    config, rank, scale = random_transformer.config, 3, 5 / 3
    blocks = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2"]
    blocks += ["to_q", "to_k", "to_v", "to_out.0", "norm1.linear", "norm1_context.linear"]
    numbers = range(config.num_single_layers)
    blocks += ["proj_mlp", *(f"single_transformer_blocks.{i}.proj_out" for i in numbers)]
    blocks += [f"single_transformer_blocks.{i}.norm.linear" for i in numbers]
    add_lora(random_transformer, rank=rank, alpha=5.0, targets=blocks, seed=1)
    weights = {f"transformer.{n}": w for n, w in random_transformer.state_dict().items()}
    pairs = lora_pairs(weights, "transformer")
    layers = kohya_lora(pairs, scale)

    one = config.attention_head_dim * config.num_attention_heads
    double = {"attn_qkv": (1, 3, 3), "attn_proj": (1, 1, 1), "mod_lin": (1, 6, 1)}
    double |= {"mlp_0": (1, 4, 1), "mlp_2": (4, 1, 1)}
    single = {"linear1": (1, 7, 4), "linear2": (5, 1, 1), "modulation_lin": (1, 3, 1)}
    modules = {
        f"lora_unet_double_blocks_{i}_{side}_{name}": sizes
        for i in range(config.num_layers)
        for side in ("img", "txt")
        for name, sizes in double.items()
    } | {
        f"lora_unet_single_blocks_{i}_{name}": sizes
        for i in numbers
        for name, sizes in single.items()
    }
    wanted = {}
    for module, (width_in, width_out, parts) in modules.items():
        wanted[f"{module}.lora_down.weight"] = (parts * rank, width_in * one)
        wanted[f"{module}.lora_up.weight"] = (width_out * one, parts * rank)
        wanted[f"{module}.alpha"] = ()
    assert {name: tuple(tensor.shape) for name, tensor in layers.items()} == wanted
    for module, (_, _, parts) in modules.items():  # alpha / rank is the scale
        assert layers[f"{module}.alpha"].item() == pytest.approx(scale * parts * rank)
    assert {tensor.dtype for tensor in layers.values()} == {torch.float32}
    name = "lora_unet_single_blocks_0_linear1"
    down, up = (layers[f"{name}.lora_{direction}.weight"] for direction in ("down", "up"))
    a, b = pairs["single_transformer_blocks.0.proj_mlp"]
    assert torch.equal(down[3 * rank :], a)
    assert torch.equal(up[3 * one :, 3 * rank :], b)
    assert not up[: 3 * one, 3 * rank :].any()


def test_layers_without_a_name_that_all_know_are_refused():
    pairs = {"proj_out": pair(1, 4, 4), "x_embedder": pair(1, 4, 4)}
    with pytest.raises(
        CheckpointError, match=r"Got pairs of proj_out, x_embedder\. Use diffusers-l"
    ):
        kohya_lora(pairs, 1.0)
