"""Where the embedded model lives, and how a pretrained one is written in its layout."""

from pathlib import Path

import torch

from calligrapher.model.adapter_files import write_calligrapher_bin

TINY = "tiny"  # the word for the embedded model in params and commands
DATA = Path(__file__).parent / "data"
"""The embedded model: `flux-fill/`, `siglip/`, `calligrapher.bin`."""


def write_model(out: Path, pipeline, siglip, processor, adapter) -> Path:
    """Write a model in the layout of the full-size one, in fp16."""
    adapter_state = {k: v.to(torch.float16) for k, v in adapter.state_dict().items()}
    write_calligrapher_bin(adapter_state, out / "calligrapher.bin")
    pipeline.transformer.set_attn_processor(_plain_processor())
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, part).to(torch.float16)
    pipeline.save_pretrained(out / "flux-fill")
    siglip.to(torch.float16).save_pretrained(out / "siglip")
    processor.save_pretrained(out / "siglip")
    return out


def _plain_processor():
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    return FluxAttnProcessor()
