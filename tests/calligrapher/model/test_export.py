"""LoRA that leaves the project computes what it computed inside; sums need no memory of their
own."""

import shutil

import pytest
import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from velocities import call

from calligrapher.errors import CheckpointError
from calligrapher.model.export import (
    LORA_FILE,
    cast,
    check_layers,
    diffusers_lora,
    lora_pairs,
    own_adapter,
    scratch,
    with_lora,
    write_lora,
    write_merged_transformer,
)
from calligrapher.model.lora import add_lora

TARGETS = [
    "to_q",
    "to_out.0",
    "add_k_proj",
    "to_add_out",
    "proj_mlp",
    "proj_out",
    "net.0.proj",
    "net.2",
]
SCALE = 5.0 / 3.0


@pytest.fixture
def tuned(random_transformer):
    """A transformer whose LoRA (rank 3) has moved, and its weights by the names of a run's
    files."""
    add_lora(random_transformer, rank=3, alpha=5.0, targets=TARGETS, seed=0)
    torch.manual_seed(1)
    for name, parameter in random_transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    weights = {
        f"transformer.{n}": p.data for n, p in random_transformer.named_parameters() if "lora_" in n
    }
    return random_transformer, weights


def test_the_lora_file_gives_diffusers_transformer_the_same_output(tuned, random_model, tmp_path):
    transformer, weights = tuned
    write_lora(diffusers_lora(lora_pairs(weights, "transformer"), SCALE), tmp_path / LORA_FILE)
    plain = FluxTransformer2DModel.from_pretrained(random_model / "flux-fill/transformer").eval()
    before = call(plain)
    plain.load_lora_adapter(tmp_path / LORA_FILE)
    assert (call(plain) - before).abs().max() > 1e-2
    torch.testing.assert_close(call(plain), call(transformer), rtol=1e-5, atol=1e-5)


def test_the_lora_file_is_what_the_pipeline_loads_from_a_folder(tuned, random_model, tmp_path):
    transformer, weights = tuned
    write_lora(diffusers_lora(lora_pairs(weights, "transformer"), SCALE), tmp_path / LORA_FILE)
    shutil.copyfile(
        random_model / "siglip/model.safetensors", tmp_path / "calligrapher.safetensors"
    )
    pipeline = FluxFillPipeline.from_pretrained(random_model / "flux-fill")
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(call(pipeline.transformer), call(transformer), rtol=1e-5, atol=1e-5)


def test_the_merged_transformer_computes_the_same_without_lora(tuned, random_model, tmp_path):
    transformer, weights = tuned
    source, pairs = random_model / "flux-fill/transformer", lora_pairs(weights, "transformer")
    check_layers(source, pairs)
    write_merged_transformer(source, pairs, SCALE, tmp_path / "transformer")
    merged = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(call(merged), call(transformer), rtol=1e-5, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


def test_a_sharded_transformer_in_bfloat16_is_merged_shard_by_shard(tuned, random_model, tmp_path):
    _, weights = tuned
    plain = FluxTransformer2DModel.from_pretrained(
        random_model / "flux-fill/transformer", dtype=torch.bfloat16
    )
    plain.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    pairs = lora_pairs(weights, "transformer")
    write_merged_transformer(tmp_path / "base", pairs, SCALE, tmp_path / "out")
    merged = FluxTransformer2DModel.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16
    ).state_dict()
    for name, weight in plain.state_dict().items():
        a, b = pairs.get(name.removesuffix(".weight"), (torch.zeros(1, 1), torch.zeros(1, 1)))
        wanted = weight.float() + (SCALE * (b @ a) if b.any() else 0)
        torch.testing.assert_close(merged[name].float(), wanted, rtol=2**-8, atol=1e-6, msg=name)


def test_lora_of_another_transformer_is_refused(tuned, random_model):
    pairs = lora_pairs(tuned[1], "transformer")
    source = random_model / "flux-fill/transformer"
    a, b = pairs["transformer_blocks.0.attn.to_q"]
    for wrong in ({"blocks.9.to_q": (a, b)}, {"transformer_blocks.0.attn.to_q": (a[:, 1:], b)}):
        message = rf"1 of {len(pairs | wrong)} .* the first: {next(iter(wrong))}"
        with pytest.raises(CheckpointError, match=message):
            check_layers(source, pairs | wrong)
    with pytest.raises(CheckpointError, match="must hold, as safetensors, the transformer"):
        check_layers(random_model / "siglip", pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_worked_out_in_float32_whatever_its_type_and_its_number_of_rows(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*s, generator=generator) for s in ((2050, 5), (3, 5), (2050, 3)))
    state = {"x.weight": weight.to(dtype), "x.bias": torch.zeros(2050)}
    with scratch(tmp_path) as empty:
        merged = with_lora(state, {"x": (a, b)}, 0.5, empty)
        wanted = (weight.to(dtype).double() + 0.5 * b.double() @ a.double()).to(dtype)
        torch.testing.assert_close(
            merged["x.weight"], wanted, rtol=0.0 if dtype != torch.float32 else 1e-6, atol=1e-6
        )
        assert merged["x.weight"].dtype == dtype
        assert merged["x.bias"] is state["x.bias"]
    assert not list(tmp_path.iterdir())


def test_a_cast_leaves_what_has_the_type_already_and_an_empty_tensor_is_one(tmp_path):
    state = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.ones(2).bfloat16(),
        "c": torch.zeros(0, 4),
    }
    with scratch(tmp_path) as empty:
        found = cast(state, torch.bfloat16, empty)
        assert torch.equal(found["a"], state["a"].bfloat16())
        assert found["b"] is state["b"]
        assert found["c"].shape == (0, 4)


def test_a_runs_weights_are_told_apart():
    names = [
        "adapter.norm.bias",
        "adapter.x.lora_A.default.weight",
        "adapter.x.lora_B.default.weight",
    ]
    weights = {name: torch.full((1, 1), i) for i, name in enumerate([*names, "transformer.y.bias"])}
    assert own_adapter(weights).keys() == {"norm.bias"}
    assert lora_pairs(weights, "adapter") == {"x": (1, 2)}
    assert lora_pairs(weights, "transformer") == {}


def test_b_carries_the_scale_and_the_file_has_one_number_type_when_asked(tmp_path):
    pairs = {"x": (torch.ones(2, 3), torch.ones(4, 2))}
    write_lora(diffusers_lora(pairs, 0.5), tmp_path / LORA_FILE, torch.bfloat16)
    found = load_file(tmp_path / LORA_FILE)
    assert torch.equal(found["transformer.x.lora_A.weight"], torch.ones(2, 3).bfloat16())
    assert torch.equal(found["transformer.x.lora_B.weight"], torch.full((4, 2), 0.5).bfloat16())
