"""How large a model is: built from its configs on the meta device by the classes that load it, and
counted.

No weights are read but the shapes of an adapter that is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from calligrapher.model import latents
from calligrapher.model.adapter_files import QFORMER, adapter_state, config_of
from calligrapher.model.ip_adapter import AdapterConfig, StyleAdapter
from calligrapher.model.lora import add_loras
from calligrapher.model.policy import Policy, StyledTransformer
from calligrapher.sizing import configs as full

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class MetaModel:
    """All parts of a model as modules without memory."""

    policy: Policy  # transformer, style adapter and LoRA
    vae: nn.Module
    text_encoder: nn.Module
    text_encoder_2: nn.Module
    siglip: nn.Module

    @property
    def transformer(self) -> nn.Module:
        return self.policy.model.transformer

    @property
    def adapter(self) -> StyleAdapter:
        return self.policy.model.adapter

    @property
    def multiple(self) -> int:
        """Pixels of one image token along a side."""
        return 2 * latents.vae_factor(self.vae)


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def config_folders(base: Path, siglip: Path) -> tuple[Path, Path]:
    """(base, siglip), each replaced by the packaged public configs where its own are not there."""
    whole = all((base / part / "config.json").is_file() for part in PARTS)
    return base if whole else full.BASE, siglip if (
        siglip / "config.json"
    ).is_file() else full.SIGLIP


def build(
    base: Path,
    siglip: Path,
    adapter: Path | None,
    *,
    train_adapter: bool = True,
    lora: Mapping | None = None,
    autocast: torch.dtype | None = None,
) -> MetaModel:
    """The model of `load_model`, from configs alone. An adapter file that is not there has default
    sizes."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        SiglipVisionConfig,
        SiglipVisionModel,
        T5Config,
        T5EncoderModel,
    )

    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(
            FluxTransformer2DModel.load_config(base / "transformer")
        )
        tower = SiglipVisionModel(SiglipVisionConfig.from_pretrained(siglip))
        style = _adapter(adapter, transformer, tower.config.hidden_size)
        add_loras(transformer, style, lora, seed=0)
        return MetaModel(
            Policy(
                StyledTransformer(transformer, style, 0.0),
                train_adapter=train_adapter,
                autocast=autocast,
            ),
            AutoencoderKL.from_config(AutoencoderKL.load_config(base / "vae")),
            CLIPTextModel(CLIPTextConfig.from_pretrained(base / "text_encoder")),
            T5EncoderModel(T5Config.from_pretrained(base / "text_encoder_2")),
            tower,
        )


def _adapter(path: Path | None, transformer, style_dim: int) -> StyleAdapter:
    state = adapter_state(path) if path is not None and path.is_file() else None
    if state is None:
        config = AdapterConfig(
            style_dim=style_dim, token_dim=transformer.config.joint_attention_dim
        )
    else:
        config = config_of(state)
    style = StyleAdapter(config, len(transformer.attn_processors), transformer.inner_dim)
    if state is not None and not any(key.startswith(f"{QFORMER}.") for key in state):
        style.image_proj_qformer = None
    return style
