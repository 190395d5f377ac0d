"""Builds a small FLUX.1-Fill folder, SigLIP folder and adapter from code, with random weights.

The classes, the folder layout and the tokenizers are those of the full-size model; only the sizes
differ.
"""

import string
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from calligrapher.model.ip_adapter import AdapterConfig, StyleAdapter


@dataclass(frozen=True)
class TinySizes:
    """Sizes of everything; the defaults are those of the embedded model that can write."""

    heads: int = 5
    head_dim: int = 32
    double_blocks: int = 2
    single_blocks: int = 4
    text_dim: int = 64
    text_layers: int = 2
    clip_dim: int = 32
    vae_channels: tuple[int, ...] = (32, 64, 64)
    latent_channels: int = 16
    style_dim: int = 64
    style_tokens: int = 8
    qformer_tokens: int = 4
    siglip_size: int = 96
    siglip_patch: int = 12
    siglip_layers: int = 2

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


RANDOM = TinySizes(
    heads=2,
    head_dim=16,
    double_blocks=1,
    single_blocks=2,
    text_dim=16,
    text_layers=1,
    clip_dim=16,
    vae_channels=(16, 16, 16),
    style_dim=16,
    style_tokens=3,
    qformer_tokens=2,
    siglip_size=32,
    siglip_patch=8,
    siglip_layers=1,
)
"""Sizes for unit tests: builds in about a second, has learned nothing."""


def clip_tokenizer() -> CLIPTokenizer:
    """Characters as tokens: a byte vocabulary and no merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """Characters as pieces."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(c, -3.0) for c in string.ascii_letters + string.digits + string.punctuation]
    return T5TokenizerFast(vocab=specials + letters, extra_ids=0, model_max_length=512)


def build_pipeline(sizes: TinySizes, seed: int = 0) -> FluxFillPipeline:
    """Return a `FluxFillPipeline` of these sizes with random weights.

    The seed is set before each component.
    """
    factor = 2 ** (len(sizes.vae_channels) - 1)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=4 * (2 * sizes.latent_channels + factor * factor),
        out_channels=4 * sizes.latent_channels,
        num_layers=sizes.double_blocks,
        num_single_layers=sizes.single_blocks,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.heads,
        joint_attention_dim=sizes.text_dim,
        pooled_projection_dim=sizes.clip_dim,
        guidance_embeds=True,
        axes_dims_rope=rope_axes(sizes.head_dim),
    )
    torch.manual_seed(seed + 1)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(sizes.vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(sizes.vae_channels),
        block_out_channels=sizes.vae_channels,
        layers_per_block=1,
        latent_channels=sizes.latent_channels,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    torch.manual_seed(seed + 2)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.clip_dim,
            intermediate_size=2 * sizes.clip_dim,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=sizes.clip_dim,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.manual_seed(seed + 3)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=sizes.text_dim,
            d_kv=16,
            d_ff=2 * sizes.text_dim,
            num_layers=sizes.text_layers,
            num_heads=4,
            dropout_rate=0.0,
        )
    )
    return FluxFillPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Split a head's width over (stream, row, column) as FLUX does: 1/8, 7/16, 7/16, all even."""
    side = head_dim * 7 // 16 // 2 * 2
    return head_dim - 2 * side, side, side


def build_siglip(
    sizes: TinySizes, seed: int = 0
) -> tuple[SiglipVisionModel, SiglipImageProcessorPil]:
    """A SigLIP vision tower of these sizes with random weights, and its image processor."""
    torch.manual_seed(seed + 4)
    config = SiglipVisionConfig(
        hidden_size=sizes.style_dim,
        intermediate_size=2 * sizes.style_dim,
        num_hidden_layers=sizes.siglip_layers,
        num_attention_heads=4,
        image_size=sizes.siglip_size,
        patch_size=sizes.siglip_patch,
    )
    processor = SiglipImageProcessorPil(
        size={"height": sizes.siglip_size, "width": sizes.siglip_size}
    )
    return SiglipVisionModel(config).eval(), processor


def build_adapter(sizes: TinySizes, transformer, seed: int = 0) -> StyleAdapter:
    """A style adapter of these sizes for `transformer`, with random weights, not yet installed."""
    torch.manual_seed(seed + 5)
    config = AdapterConfig(
        style_dim=sizes.style_dim,
        token_dim=sizes.text_dim,
        num_tokens=sizes.style_tokens,
        qformer_tokens=sizes.qformer_tokens,
    )
    return StyleAdapter(config, len(transformer.attn_processors), transformer.inner_dim)


def write_random(folder: Path, seed: int = 0, sizes: TinySizes = RANDOM) -> Path:
    """Write `flux-fill/`, `siglip/` and `calligrapher.bin` with random weights; for unit tests."""
    pipeline = build_pipeline(sizes, seed)
    pipeline.save_pretrained(folder / "flux-fill")
    siglip, processor = build_siglip(sizes, seed)
    siglip.save_pretrained(folder / "siglip")
    processor.save_pretrained(folder / "siglip")
    from calligrapher.model.adapter_files import write_calligrapher_bin

    adapter = build_adapter(sizes, pipeline.transformer, seed)
    write_calligrapher_bin(adapter.state_dict(), folder / "calligrapher.bin")
    return folder
