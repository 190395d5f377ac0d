"""Loads a whole model (FLUX.1-Fill, SigLIP, style adapter, LoRA); decodes latents to pictures."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from calligrapher.data.canvas import Canvas
from calligrapher.data.images import to_image
from calligrapher.errors import CheckpointError, ParamsError
from calligrapher.model import latents
from calligrapher.model.adapter_files import load_adapter
from calligrapher.model.compiling import compile_blocks
from calligrapher.model.conditioning import Encoders
from calligrapher.model.ip_adapter import AdapterConfig, StyleAdapter
from calligrapher.model.lora import add_loras
from calligrapher.model.policy import Policy, StyledTransformer
from calligrapher.model.sharding import Strategy
from calligrapher.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Model:
    """A policy and the frozen parts around it, on one device."""

    policy: Policy
    encoders: Encoders
    device: torch.device

    @property
    def vae(self):
        return self.encoders.vae

    @property
    def multiple(self) -> int:
        """Width and height must be multiples of this: the VAE's factor times the 2x2 packing."""
        return 2 * latents.vae_factor(self.vae)


def pick_device(name: str) -> torch.device:
    """Return the device `name`; `auto` is CUDA when there is one, else the CPU.

    Raises ParamsError for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ParamsError(
            f"model.device must be a device of this machine (auto, cpu, cuda, ...). Got {name!r}:"
            f" {reason}"
        ) from None
    return device


def load_model(
    base: Path,
    siglip: Path,
    adapter: Path | None,
    *,
    digest: str,
    guidance_scale: float,
    max_sequence_length: int,
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
    offload_text_encoder_two: bool = False,
    train_adapter: bool = True,
    lora: dict | None = None,
    device: str = "auto",
    seed: int = 0,
    attention_backend: str | None = None,
    compiled: bool = False,
    strategy: Strategy = "ddp",
    ranks: Ranks = ALONE,
) -> Model:
    """Load everything from folders in diffusers' and transformers' layout.

    `adapter=None` makes a new one with random weights from `seed`; `digest` names the frozen
    weights in the conditioning cache. Frozen weights are held in `mixed_precision`'s type (of a
    frozen adapter the matrices alone: see `Policy.storage_dtype`), trained ones always in float32.
    attention_backend: how attention is computed, by its name in diffusers; None: torch's own.
    compiled: each block when it is first called (`compiling`); not with `fsdp2`.
    strategy `fsdp2` shares the policy's weights out among `ranks`; the encoders are whole on each.
    Raises CheckpointError for folders and files that do not fit.
    """
    from diffusers import FluxFillPipeline
    from transformers import AutoImageProcessor, SiglipVisionModel

    where = pick_device(device)
    autocast = DTYPES[mixed_precision]
    dtype = autocast or torch.float32
    for name, folder, file in (
        ("base", base, "model_index.json"),
        ("siglip", siglip, "config.json"),
    ):
        if not (folder / file).is_file():
            raise CheckpointError(
                f"model.{name} must be a folder that holds {file}. Got {folder}, which does not."
            )
    pipeline = FluxFillPipeline.from_pretrained(base, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    transformer = pipeline.transformer
    if not transformer.config.guidance_embeds:
        raise ParamsError(
            f"model.base must embed the guidance, as FLUX.1-Fill does. {base} does not."
        )
    tower = SiglipVisionModel.from_pretrained(siglip, dtype=dtype)
    if adapter is not None:
        style = load_adapter(adapter, transformer)
    else:
        torch.manual_seed(seed)
        sizes = AdapterConfig(
            style_dim=tower.config.hidden_size, token_dim=transformer.config.joint_attention_dim
        )
        style = StyleAdapter(sizes, len(transformer.attn_processors), transformer.inner_dim)
    add_loras(transformer, style, lora, seed=seed)
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    styled = StyledTransformer(transformer, style, guidance_scale)
    policy = Policy(styled, train_adapter=train_adapter, autocast=autocast)
    for name, parameter in styled.named_parameters():
        if name in policy.parameters:
            parameter.data = parameter.data.float()
        elif name.startswith("adapter."):
            parameter.data = parameter.data.to(policy.storage_dtype(name))
    if attention_backend is not None:
        _set_attention_backend(transformer, attention_backend)
    if compiled:
        compile_blocks(transformer)
    policy.shard(ranks if strategy == "fsdp2" else ALONE, where)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, tower):
        part.eval().requires_grad_(False)
        if not (part is pipeline.text_encoder_2 and offload_text_encoder_two):
            part.to(where)
    encoders = Encoders(
        pipeline=pipeline,
        siglip=tower,
        image_processor=AutoImageProcessor.from_pretrained(siglip),
        digest=digest,
        max_sequence_length=max_sequence_length,
        offload_text_encoder_two=offload_text_encoder_two,
    )
    return Model(policy, encoders, where)


def check_attention_backend(name: str) -> None:
    """Raise ParamsError where diffusers has no such backend or this machine cannot run it."""
    from diffusers import FluxTransformer2DModel

    smallest = {"num_layers": 1, "num_single_layers": 0, "num_attention_heads": 1}
    sizes = {"attention_head_dim": 8, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    _set_attention_backend(FluxTransformer2DModel(in_channels=4, **smallest, **sizes), name)


def _set_attention_backend(transformer, name: str) -> None:
    """Let every attention of `transformer` be computed by `name`; ParamsError where it cannot."""
    try:
        transformer.set_attention_backend(name)
    except (ValueError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ParamsError(
            "model.attention_backend must name a way to compute attention that diffusers has and"
            f" this machine can run (native, flash, ...), or be null. Got {name!r}: {reason}"
        ) from None


@torch.no_grad()
def pictures(model: Model, x0: torch.Tensor, canvas: Canvas) -> list[Image.Image]:
    """Return clean packed latents [B, L, D] as B pictures of the canvas' size.

    The reference's strip is cut off.
    """
    columns = canvas.width // model.multiple
    rows = x0.shape[1] // columns
    pixels = latents.decode(model.vae, latents.unpack(x0.to(model.device), 2 * rows, 2 * columns))
    return [to_image(picture[:, -canvas.height :]) for picture in pixels.cpu()]
