"""An estimate of what a forward, with or without its backward, needs besides weights and their
gradients.

Legend: B rows, L image tokens, T text tokens, I style tokens, D transformer width, e bytes of a
number.

```
kept by a double block       B D (image L + text T + style I)       } bytes of _KEPT, depend on e
kept by a single block       B D (token (L + T) + style I)
kept with checkpointing      B D e (L + T) a block
kept by LoRA                 B tokens in_features e a layer
cast by autocast             2 bytes for each number in a trained matrix, until a forward ends
```

The bytes were read off the tensors that autograd keeps
(`tests/calligrapher/sizing/test_activations.py`), with layer norms in float32 as CUDA's autocast
has them. What the first block saves because nothing before it is trained is not taken off.
`docs/full-size.md` says how far the estimate is from simulated runs.
"""

from dataclasses import dataclass

from torch import nn

from calligrapher.sizing.meta_model import MetaModel


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps of a block, for each token and unit of width."""

    image: int  # of a double block's image stream
    text: int  # of its text stream
    single: int  # of a single block
    style: int  # of the keys and values of the style tokens
    passing: int  # not kept: what a single block holds at once while it runs


_KEPT = {2: Kept(36, 20, 32, 14, 40), 4: Kept(56, 36, 52, 12, 62)}


@dataclass(frozen=True)
class Batch:
    """What goes through the transformer at once."""

    rows: int  # B
    image: int  # L
    text: int  # T


def number_bytes(model: MetaModel) -> int:
    """Bytes of one number in the model's forwards."""
    return model.policy.autocast.itemsize if model.policy.autocast else 4


def training_peak(model: MetaModel, batch: Batch, *, checkpointing: bool) -> int:
    """The most that a forward and its backward hold at once, of three moments.

    The end of the forward; the backward through one block that was computed anew; the largest
    matrix's gradient, in autocast's type and in float32, before it is added to the others.
    """
    size, width = number_bytes(model), model.transformer.inner_dim
    blocks = _blocks(model, batch)
    all_casts, projections = _casts(model)
    largest = max((p.numel() for p in model.policy.parameters.values()), default=0)
    gradient = largest * (4 + (size if size < 4 else 0))
    if not checkpointing:
        return max(sum(blocks) + all_casts + forward_peak(model, batch), gradient)
    inputs = len(blocks) * batch.rows * width * size * (batch.image + batch.text)
    forward = inputs + all_casts + forward_peak(model, batch)
    backward = inputs + projections + 2 * max(blocks)
    return max(forward, backward, gradient)


def forward_peak(model: MetaModel, batch: Batch) -> int:
    """What a forward without gradient holds at once, under weights that need no cast: one block's
    work."""
    passing = _KEPT[number_bytes(model)].passing
    return batch.rows * model.transformer.inner_dim * passing * (batch.image + batch.text)


def decode_peak(model: MetaModel, rows: int, pixels: int) -> int:
    """What the VAE's decoder holds at once: six maps of its first width at full resolution."""
    return 6 * model.vae.config.block_out_channels[0] * rows * pixels * number_bytes(model)


def _blocks(model: MetaModel, batch: Batch) -> list[int]:
    """Bytes that each block keeps without checkpointing, in the order of the blocks."""
    kept, width = _KEPT[number_bytes(model)], model.transformer.inner_dim
    tokens = batch.image + batch.text
    style = kept.style * model.adapter.image_proj_mlp.num_tokens
    double = kept.image * batch.image + kept.text * batch.text + style
    transformer = model.transformer
    found = [
        batch.rows * width * double + _lora(model, block, batch)
        for block in transformer.transformer_blocks
    ]
    return found + [
        batch.rows * width * (kept.single * tokens + style) + _lora(model, block, batch, joint=True)
        for block in transformer.single_transformer_blocks
    ]


def _lora(model: MetaModel, block: nn.Module, batch: Batch, *, joint: bool = False) -> int:
    """Bytes of the inputs that a block's LoRA layers keep."""
    text_layers = ("add_", "to_add_out", "context")
    total = 0
    for name, module in block.named_modules():
        if name.endswith("lora_A.default"):
            of_text = any(part in name for part in text_layers)
            tokens = batch.image + batch.text if joint else batch.text if of_text else batch.image
            total += batch.rows * tokens * module.in_features * number_bytes(model)
    return total


def _casts(model: MetaModel) -> tuple[int, int]:
    """Bytes of autocast's copies of the trained matrices: of all, and of the style projections
    alone."""
    policy = model.policy
    copies = {
        n: p.numel() * 2
        for n, p in policy.parameters.items()
        if policy.storage_dtype(n).itemsize == 2
    }
    return sum(copies.values()), sum(
        size for name, size in copies.items() if ".image_proj_" in name
    )
