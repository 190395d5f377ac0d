"""The tiny model is the full-size one with other numbers: same folders, same classes, same
interfaces."""

import json

import pytest
import torch
from diffusers import FluxFillPipeline
from transformers import AutoImageProcessor, SiglipVisionModel

from calligrapher.model.adapter_files import adapter_state, load_adapter
from calligrapher.model.latents import vae_factor
from calligrapher.tiny.build import (
    RANDOM,
    TinySizes,
    build_pipeline,
    clip_tokenizer,
    rope_axes,
    t5_tokenizer,
    write_random,
)

PRINTABLE = [chr(code) for code in range(33, 127)]


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folders_are_those_of_diffusers_and_transformers(random_model):
    found = set(files(random_model))
    assert {
        "calligrapher.bin",
        "siglip/config.json",
        "siglip/model.safetensors",
        "siglip/preprocessor_config.json",
        "flux-fill/model_index.json",
        "flux-fill/scheduler/scheduler_config.json",
        "flux-fill/tokenizer/tokenizer_config.json",
        "flux-fill/tokenizer_2/tokenizer.json",
        *(
            f"flux-fill/{part}/{name}"
            for part, name in (
                ("transformer", "diffusion_pytorch_model.safetensors"),
                ("vae", "diffusion_pytorch_model.safetensors"),
                ("text_encoder", "model.safetensors"),
                ("text_encoder_2", "model.safetensors"),
            )
        ),
    } <= found
    index = json.loads((random_model / "flux-fill" / "model_index.json").read_text())
    classes = {
        name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]
    }
    assert classes == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": classes["tokenizer_2"],  # The T5 tokenizer's class has had several names.
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
    }
    assert classes["tokenizer_2"].startswith("T5Tokenizer")


def test_what_was_written_loads_with_the_public_classes_and_fits_together(random_model):
    pipeline = FluxFillPipeline.from_pretrained(random_model / "flux-fill")
    siglip = SiglipVisionModel.from_pretrained(random_model / "siglip")
    processor = AutoImageProcessor.from_pretrained(random_model / "siglip")
    adapter = load_adapter(random_model / "calligrapher.bin", pipeline.transformer)

    factor = vae_factor(pipeline.vae)
    config = pipeline.transformer.config
    assert factor == pipeline.vae_scale_factor == 4
    assert config.in_channels == 4 * (16 + 16 + factor * factor) == 192
    assert pipeline.transformer.out_channels == 4 * pipeline.vae.config.latent_channels == 64
    assert config.guidance_embeds
    assert config.joint_attention_dim == pipeline.text_encoder_2.config.d_model
    assert config.pooled_projection_dim == pipeline.text_encoder.config.hidden_size
    assert sum(config.axes_dims_rope) == config.attention_head_dim
    assert processor.size["height"] == processor.size["width"] == siglip.config.image_size
    assert adapter.tokens(torch.zeros(2, siglip.config.hidden_size)).shape == (
        2,
        3,
        config.joint_attention_dim,
    )


def test_the_embedded_sizes_are_legal_and_small():
    sizes = TinySizes()
    with torch.device("meta"):
        transformer = build_pipeline(sizes).transformer
    assert sizes.width == 160
    assert len(transformer.attn_processors) == 6
    assert 3e6 < sum(p.numel() for p in transformer.parameters()) < 5e6


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_rope_axes_fill_the_head_with_even_parts_as_flux_does(head_dim):
    axes = rope_axes(head_dim)
    assert sum(axes) == head_dim
    assert all(axis > 0 and axis % 2 == 0 for axis in axes)
    assert rope_axes(128) == (16, 56, 56)


def test_everything_follows_from_the_seed(random_model, tmp_path):
    torch.manual_seed(123)  # Whatever was drawn before must not matter.
    again = files(write_random(tmp_path / "again"))
    assert again == files(random_model)
    other = files(write_random(tmp_path / "other", seed=1))
    changed = {name for name in other if other[name] != again[name]}
    weights = {name for name in other if name.endswith((".safetensors", ".bin"))}
    assert changed == weights


def test_every_printable_character_is_a_token_of_its_own():
    t5, clip = t5_tokenizer(), clip_tokenizer()
    unknown = t5.unk_token_id
    ids = [t5(f"a{c}a", add_special_tokens=False).input_ids for c in PRINTABLE]
    assert all(unknown not in row for row in ids)
    assert {len(row) for row in ids} == {4}  # The leading blank, and three characters.
    assert len({row[2] for row in ids}) == len(PRINTABLE)
    assert all(len(clip(c).input_ids) == 3 for c in PRINTABLE)  # Start, the character, end.


def test_a_prompt_has_one_token_per_character_and_keeps_case():
    t5 = t5_tokenizer()
    ids = t5("The text is 'AbA'.").input_ids
    assert len(ids) == 1 + len("The text is 'AbA'.") + 1
    letters = t5.convert_ids_to_tokens(ids)
    assert letters[0] == "▁"
    assert letters[-1] == "</s>"
    assert "".join(letters[:-1]).replace("▁", " ").strip() == "The text is 'AbA'."


def test_the_adapter_file_holds_an_adapter_of_the_random_sizes(random_model):
    state = adapter_state(random_model / "calligrapher.bin")
    assert state["image_proj_qformer.query_embeds"].shape == (RANDOM.style_tokens, RANDOM.text_dim)
    assert sum(name.startswith("attn_adapter") for name in state) == 2 * 3
