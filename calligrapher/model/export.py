"""Turns trained weights into files for other programs, without holding a model in memory.

A run's `trained.safetensors` and `ema.safetensors` have `adapter.` and `transformer.` names; LoRA
pairs (peft) end in `.lora_A.default.weight` and `.lora_B.default.weight`. What must be computed (a
sum, another number type) goes tensor by tensor to scratch files beside the target: memory does not
grow with the model.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from calligrapher.durable import atomic_path, fsync_path, save_tensors
from calligrapher.errors import CheckpointError
from calligrapher.model.adapter_files import ADAPTER, TRANSFORMER

Pairs = dict[str, tuple[Tensor, Tensor]]  # name of a linear layer -> A [rank, in], B [out, rank]
Empty = Callable[[torch.Size, torch.dtype], Tensor]

LORA_FILE = "pytorch_lora_weights.safetensors"
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"
_ROWS = 1024  # of a matrix that are summed at once
_NUMBERS = 1 << 16  # of a tensor that are looked at at once


@contextmanager
def scratch(folder: Path) -> Iterator[Empty]:
    """Yield `empty(shape, dtype)`: tensors in files below `folder`, deleted when the block ends."""
    with TemporaryDirectory(dir=folder, prefix=".writing-") as place:
        names = (str(Path(place) / str(i)) for i in itertools.count())

        def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
            count = shape.numel()
            if count == 0:
                return torch.empty(shape, dtype=dtype)
            name = next(names)
            with open(name, "wb") as file:
                # A full disk is an OSError here; in the mapping it would kill the process.
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
            return torch.from_file(name, shared=True, size=count, dtype=dtype).view(shape)

        yield empty


def lora_pairs(weights: Mapping[str, Tensor], part: str) -> Pairs:
    """Return the LoRA pairs of `part` (adapter or transformer) by their layers' names in it."""
    pairs = {}
    for name, a in weights.items():
        if name.startswith(f"{part}.") and name.endswith(_A):
            layer = name.removesuffix(_A)
            pairs[layer.removeprefix(f"{part}.")] = (a, weights[layer + _B])
    return pairs


def own_adapter(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's own weights among a run's, by the names of `StyleAdapter`'s state."""
    prefix = f"{ADAPTER}."
    return {
        n.removeprefix(prefix): w
        for n, w in weights.items()
        if n.startswith(prefix) and ".lora_" not in n
    }


def check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError that names the first tensor with a number that is not finite."""
    for name, weight in weights.items():
        bad = sum(int((~part.isfinite()).sum()) for part in weight.flatten().split(_NUMBERS))
        if bad:
            raise CheckpointError(
                f"{source} must hold finite numbers. {bad} of {weight.numel()} in {name} are NaN or"
                " infinite. Name an earlier checkpoint."
            )


def cast(state: Mapping[str, Tensor], dtype: torch.dtype, empty: Empty) -> dict[str, Tensor]:
    """`state` in another number type; tensors that have it already stay themselves."""
    return {n: w if w.dtype == dtype else empty(w.shape, dtype).copy_(w) for n, w in state.items()}


def with_lora(
    state: Mapping[str, Tensor], pairs: Pairs, scale: float, empty: Empty
) -> dict[str, Tensor]:
    """`state` with `scale * B @ A` added to each layer's weight, summed in float32."""
    merged = dict(state)
    for layer, (a, b) in pairs.items():
        weight = state[f"{layer}.weight"]
        out = empty(weight.shape, weight.dtype)
        for rows, b_rows, out_rows in zip(
            weight.split(_ROWS), b.split(_ROWS), out.split(_ROWS), strict=True
        ):
            out_rows.copy_(torch.addmm(rows.float(), b_rows.float(), a.float(), alpha=scale))
        check_finite({f"{layer}.weight": out}, "The sum of weights and LoRA")
        merged[f"{layer}.weight"] = out
    return merged


def diffusers_lora(pairs: Pairs, scale: float) -> dict[str, Tensor]:
    """Return the transformer's pairs as diffusers' `load_lora_weights` takes them.

    B carries `scale`, so that a reader which is told no alpha, and takes the rank for it, computes
    the same.
    """
    layers = {}
    for layer, (a, b) in sorted(pairs.items()):
        layers[f"{TRANSFORMER}.{layer}.lora_A.weight"] = a
        layers[f"{TRANSFORMER}.{layer}.lora_B.weight"] = b * scale
    return layers


def write_lora(
    layers: Mapping[str, Tensor],
    path: Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the tensors of a LoRA, all in `dtype` (None: as they are), as safetensors."""
    with atomic_path(path) as partial:
        save_tensors(
            {name: tensor.to(dtype or tensor.dtype) for name, tensor in layers.items()},
            partial,
            metadata={"format": "pt", **(metadata or {})},
        )


def check_layers(source: Path, pairs: Pairs) -> None:
    """Raise CheckpointError unless the diffusers folder `source` has the layers of all pairs."""
    shapes = {}
    for file in source.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            shapes |= {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    wrong = [n for n, (a, b) in pairs.items() if shapes.get(f"{n}.weight") != [len(b), a.shape[1]]]
    if wrong:
        raise CheckpointError(
            f"{source} must hold, as safetensors, the transformer that the LoRA was trained on."
            f" {len(wrong)} of {len(pairs)} layers are missing or of another shape, the first:"
            f" {wrong[0]}."
        )


def write_merged_transformer(source: Path, pairs: Pairs, scale: float, out: Path) -> None:
    """Write the diffusers folder `source` as `out`, with LoRA added, in its own number types.

    An older `out` is replaced at the end. A crash leaves it, or a folder `.writing-*` besides.
    """
    with TemporaryDirectory(dir=out.parent, prefix=".writing-") as place:
        made = Path(place) / out.name
        made.mkdir()
        for file in sorted(path for path in source.iterdir() if path.is_file()):
            if file.suffix != ".safetensors":
                shutil.copyfile(file, made / file.name)
            else:
                with scratch(made.parent) as empty:
                    state = load_file(file)
                    here = {
                        layer: pair for layer, pair in pairs.items() if f"{layer}.weight" in state
                    }
                    merged = with_lora(state, here, scale, empty)
                    save_tensors(merged, made / file.name, metadata={"format": "pt"})
            fsync_path(made / file.name)
        if out.exists():
            shutil.rmtree(out)
        os.replace(made, out)
    fsync_path(out.parent)
