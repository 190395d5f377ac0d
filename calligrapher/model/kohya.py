"""LoRA of the transformer under the names of kohya's scripts: `lora_unet_*`, down, up and alpha.

They follow Black Forest Labs' layers, in which query, key and value (in a single block also the
MLP's first layer) are one: the pairs of those parts lie in one pair, whose up matrix is block
diagonal. diffusers, ComfyUI and the like take it apart again.
"""

import re

import torch
from torch import Tensor

from calligrapher.errors import CheckpointError
from calligrapher.model.export import Pairs

# Layer of a block in diffusers -> (layer in kohya's names, which part of it, how many parts).
_DOUBLE = {
    "ff.net.0.proj": ("img_mlp_0", 0, 1),
    "ff.net.2": ("img_mlp_2", 0, 1),
    "ff_context.net.0.proj": ("txt_mlp_0", 0, 1),
    "ff_context.net.2": ("txt_mlp_2", 0, 1),
    "attn.to_out.0": ("img_attn_proj", 0, 1),
    "attn.to_add_out": ("txt_attn_proj", 0, 1),
    "norm1.linear": ("img_mod_lin", 0, 1),
    "norm1_context.linear": ("txt_mod_lin", 0, 1),
    "attn.to_q": ("img_attn_qkv", 0, 3),
    "attn.to_k": ("img_attn_qkv", 1, 3),
    "attn.to_v": ("img_attn_qkv", 2, 3),
    "attn.add_q_proj": ("txt_attn_qkv", 0, 3),
    "attn.add_k_proj": ("txt_attn_qkv", 1, 3),
    "attn.add_v_proj": ("txt_attn_qkv", 2, 3),
}
_SINGLE = {
    "proj_out": ("linear2", 0, 1),
    "norm.linear": ("modulation_lin", 0, 1),
    "attn.to_q": ("linear1", 0, 4),
    "attn.to_k": ("linear1", 1, 4),
    "attn.to_v": ("linear1", 2, 4),
    "proj_mlp": ("linear1", 3, 4),
}
_BLOCKS = {
    "transformer_blocks": ("double_blocks", _DOUBLE),
    "single_transformer_blocks": ("single_blocks", _SINGLE),
}
_MLP_RATIO = 4  # FLUX's hidden width of a single block's MLP, in widths


def kohya_lora(pairs: Pairs, scale: float) -> dict[str, Tensor]:
    """Return the pairs as `lora_unet_NAME.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    alpha / rank is `scale`. A joined layer of n parts has n times the rank, and zeros for the parts
    without a pair. Raises CheckpointError for layers outside of the blocks, which have no name that
    all readers know.
    """
    joined: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    counts: dict[str, int] = {}
    unnamed = []
    for layer, pair in sorted(pairs.items()):
        if (found := _name(layer)) is None:
            unnamed.append(layer)
            continue
        name, part, counts[name] = found
        joined.setdefault(name, {})[part] = pair
    if unnamed:
        raise CheckpointError(
            "kohya's format must hold LoRA of the blocks' layers alone. Got pairs of"
            f" {', '.join(unnamed)}. Use diffusers-lora, or train without these targets."
        )
    layers = {}
    for name, parts in joined.items():
        down, up = _one_pair(parts, counts[name])
        layers[f"{name}.lora_down.weight"] = down
        layers[f"{name}.lora_up.weight"] = up
        layers[f"{name}.alpha"] = torch.tensor(scale * len(down))
    return layers


def _name(layer: str) -> tuple[str, int, int] | None:
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer)
    if match is None or match[1] not in _BLOCKS:
        return None
    blocks, names = _BLOCKS[match[1]]
    if match[3] not in names:
        return None
    name, part, count = names[match[3]]
    return f"lora_unet_{blocks}_{match[2]}_{name}", part, count


def _one_pair(parts: dict[int, tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Return down [count * rank, in] and the block diagonal up [sum of outs, count * rank]."""
    if count == 1:
        return parts[0]
    a, _ = next(iter(parts.values()))
    rank, width = a.shape
    outs = [width] * 3 + [_MLP_RATIO * width] * (count - 3)
    downs = [parts[i][0] if i in parts else a.new_zeros(rank, width) for i in range(count)]
    ups = [parts[i][1] if i in parts else a.new_zeros(outs[i], rank) for i in range(count)]
    return torch.cat(downs), torch.block_diag(*ups)
