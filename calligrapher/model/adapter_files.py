"""Reads and writes adapter weights: the only place that knows key names.

| file | top keys | |---|---| | the released `calligrapher.bin` | `image_proj_mlp`,
`image_proj_qformer`, `attn_adapter` | | our `ip-adapter.bin` | `image_proj` (the MLP),
`image_proj_qformer`, `ip_adapter` | | older `ip-adapter.bin` | `image_proj` and `ip_adapter`, or
`image_proj_mlp` and `attn_adapter`; no QFormer | | a `.safetensors` twin of any of these |
`top_key.key` | | `trained.safetensors`, `ema.safetensors` of a run | `adapter.` and the twin's
names; `transformer.`: LoRA |

`image_proj` holds the MLP's own keys (`proj.0.weight`, ..., `norm.bias`), as in the public training
code, so that its loader takes our file and merely leaves the QFormer aside. When reading, `mlp.*`
and `qformer.*` below `image_proj` are understood as well. `attn_adapter` and `ip_adapter` hold
`{i}.to_k_ip.weight` and `{i}.to_v_ip.weight`; i is the position in `transformer.attn_processors`,
double blocks first.
"""

import logging
import re
import struct
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from calligrapher.durable import atomic_path, save_tensors
from calligrapher.errors import CheckpointError
from calligrapher.model.ip_adapter import AdapterConfig, StyleAdapter

logger = logging.getLogger(__name__)

MLP, QFORMER, ATTENTION = "image_proj_mlp", "image_proj_qformer", "attn_adapter"
JOINT, IP_ATTENTION = "image_proj", "ip_adapter"
ADAPTER, TRANSFORMER = (
    "adapter",
    "transformer",
)  # in the files of a run: the modules of `StyledTransformer`
QUERIES = f"{QFORMER}.query_embeds"

# What torch's and safetensors' readers raise on damaged files, besides what they document.
_READ_ERRORS = (
    UnpicklingError,
    SafetensorError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    struct.error,
)

Nested = dict[str, dict[str, Tensor]]


def read_tensors(path: Path) -> Nested:
    """Return top key -> key -> tensor, as a `.bin` or a `.safetensors` file holds them.

    The file is memory-mapped; a `.bin` is read with `weights_only=True`. Raises CheckpointError for
    a file that is missing, damaged, or holds anything but tensors two levels deep.
    """
    if not path.is_file():
        raise CheckpointError(f"An adapter file must exist. Got {path}, which does not.")
    try:
        if path.suffix == ".safetensors":
            nested: Nested = defaultdict(dict)
            for name, tensor in load_file(path).items():
                top, _, key = name.partition(".")
                nested[top][key] = tensor
            return dict(nested)
        mapped = zipfile.is_zipfile(path)  # Files of torch before 1.6 cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _READ_ERRORS as error:
        raise CheckpointError(
            f"{path} must be a whole weights file that holds nothing but tensors. "
            f"Reading it gave: {_cause(error)}. Nothing in it was executed."
        ) from error
    if not _is_nested(content):
        raise CheckpointError(
            f"{path} must hold tensors below top keys such as {MLP} or {JOINT}. Found"
            f" {_described(content)}."
        )
    return content


def _cause(error: Exception) -> str:
    """Return what a reader met, without torch's advice to read the file unsafely."""
    if isinstance(error, UnpicklingError):
        named = re.search(r"GLOBAL (\S+)", str(error))
        return f"a pickled {named[1]}" if named else "a pickle of another kind"
    sentence = str(error).strip().split("\n")[0].split(". ")[0].removesuffix(".")
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__


def _is_nested(content: object) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(top, str)
        and isinstance(part, Mapping)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in part.items())
        for top, part in content.items()
    )


def _described(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return "the keys " + (_some([str(key) for key in content]))


def adapter_state(path: Path) -> dict[str, Tensor]:
    """Flat state of a `StyleAdapter` from any of the formats in the table above.

    The tensors stay mapped to the file. Raises CheckpointError when a part is missing, unknown, or
    there twice.
    """
    content = read_tensors(path)
    if content and content.keys() <= {ADAPTER, TRANSFORMER}:
        content = _adapter_of_run(content, path)
    parts: Nested = defaultdict(dict)
    unexpected, twice = [], []
    for top, part in content.items():
        if top not in (MLP, QFORMER, ATTENTION, JOINT, IP_ATTENTION):
            unexpected.append(top)
        for key, tensor in part.items():
            name, inner = {IP_ATTENTION: ATTENTION}.get(top, top), key
            if top == JOINT:
                name = QFORMER if key.startswith("qformer.") else MLP
                inner = key.removeprefix("qformer.").removeprefix("mlp.")
            if inner in parts[name]:
                twice.append(f"{top}.{key}")
            parts[name][inner] = tensor
    missing = [
        f"{a} or {b}" for a, b in ((MLP, JOINT), (ATTENTION, IP_ATTENTION)) if not parts.get(a)
    ]
    if missing or unexpected or twice:
        raise CheckpointError(
            f"{path} must hold {MLP} (or {JOINT}) and {ATTENTION} (or {IP_ATTENTION}), each once.\n"
            f"  missing: {_some(missing)}\n  unexpected: {_some(sorted(unexpected))}\n  twice:"
            f" {_some(twice)}"
        )
    if not parts.get(QFORMER):
        logger.warning("%s has no QFormer: its share of the style tokens is zero.", path)
    state = {f"{top}.{key}": tensor for top, part in parts.items() for key, tensor in part.items()}
    if QUERIES in state and state[QUERIES].ndim == 3 and state[QUERIES].shape[0] == 1:
        state[QUERIES] = state[QUERIES][0]
    return state


def _adapter_of_run(content: Nested, path: Path) -> Nested:
    """Top key -> key -> tensor of a run's adapter, which must have been trained whole."""
    adapter = content.get(ADAPTER, {})
    if not adapter or any(".lora_" in key for key in adapter):
        raise CheckpointError(
            f"{path} must hold a whole adapter. It holds"
            f" {'LoRA pairs of one' if adapter else 'none'}: the rest was not trained."
            " `calligrapher convert ARTIFACT FILE`, with the folder of the artifact that it lies"
            " in, puts the two together."
        )
    if TRANSFORMER in content:
        logger.warning("%s also holds LoRA of the transformer. Only its adapter is read.", path)
    nested: Nested = defaultdict(dict)
    for name, tensor in adapter.items():
        top, _, key = name.partition(".")
        nested[top][key] = tensor
    return dict(nested)


def config_of(state: Mapping[str, Tensor]) -> AdapterConfig:
    """The sizes that a state was made with, from its shapes (the QFormer always has 8 heads)."""
    names = {n: f"{MLP}.{n}" for n in ("proj.0.weight", "proj.2.weight", "norm.weight")}
    wrong = [name for name in names.values() if name not in state or 0 in state[name].shape]
    wrong += [
        n for n in names.values() if n not in wrong and state[n].ndim != (1 if "norm" in n else 2)
    ]
    if wrong:
        raise CheckpointError(
            "The adapter's sizes must follow from its MLP: proj.0.weight and proj.2.weight are"
            f" matrices, norm.weight is a vector. Missing or of another shape: {_some(wrong)}."
        )
    style_dim = state[names["proj.0.weight"]].shape[1]
    token_dim = state[names["norm.weight"]].shape[0]
    num_tokens = state[names["proj.2.weight"]].shape[0] // token_dim
    read = state.get(f"{QFORMER}.id_proj.2.weight")
    if read is None:
        return AdapterConfig(style_dim, token_dim, num_tokens)
    return AdapterConfig(
        style_dim, token_dim, num_tokens, qformer_tokens=read.shape[0] // token_dim
    )


def load_adapter(path: Path, transformer, dtype: torch.dtype = torch.float32) -> StyleAdapter:
    """A `StyleAdapter` for `transformer` with the weights of `path`; not yet installed.

    The file is read once, tensor by tensor, and not needed any more afterwards. Raises
    `CheckpointError` that lists missing, unexpected and wrongly shaped keys.
    """
    state = adapter_state(path)
    adapter = fitting_adapter(state, len(transformer.attn_processors), transformer.inner_dim, path)
    # Copies, not the file's mapping: what happens to the file later must not reach the weights.
    adapter.load_state_dict({k: v.to(dtype, copy=True) for k, v in state.items()}, assign=True)
    return adapter


def fitting_adapter(
    state: Mapping[str, Tensor], blocks: int, width: int, path: Path
) -> StyleAdapter:
    """Return an adapter without memory that `state` fits into, or raise CheckpointError.

    `path` is the file that `state` was read from; messages name it.
    """
    with torch.device("meta"):
        adapter = StyleAdapter(config_of(state), blocks, width)
    if not any(key.startswith(f"{QFORMER}.") for key in state):
        adapter.image_proj_qformer = None
    wanted = adapter.state_dict()
    missing = sorted(set(wanted) - set(state))
    unexpected = sorted(set(state) - set(wanted))
    misshaped = [
        f"{k}: must be {list(wanted[k].shape)}, is {list(state[k].shape)}"
        for k in wanted
        if k in state and wanted[k].shape != state[k].shape
    ]
    if missing or unexpected or misshaped:
        raise CheckpointError(
            f"{path} must fit this model ({blocks} attention blocks of width {width}).\n"
            f"  missing: {_some(missing)}\n  unexpected: {_some(unexpected)}\n"
            f"  wrong shape: {_some(misshaped)}"
        )
    return adapter


def blocks_and_width(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """For how many attention blocks, and of what width, a state was made."""
    keys = [
        state[name] for name in state if name.startswith(f"{ATTENTION}.") and ".to_k_ip." in name
    ]
    return len(keys), keys[0].shape[0] if keys and keys[0].ndim else 0


def _some(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"


def split_state(state: Mapping[str, Tensor]) -> Nested:
    """Return a flat adapter state as `{image_proj_mlp, image_proj_qformer, attn_adapter}`.

    LoRA is left out.
    """
    nested: Nested = {MLP: {}, QFORMER: {}, ATTENTION: {}}
    for name, tensor in sorted(state.items()):  # Sorted: equal weights give equal files.
        top, _, key = name.partition(".")
        if top in nested:
            nested[top][key] = _own_storage(tensor.detach().cpu().contiguous())
    return {top: part for top, part in nested.items() if part}


def _own_storage(tensor: Tensor) -> Tensor:
    """A slice of something bigger would be saved with all of it."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def write_calligrapher_bin(
    state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the released format, as a `.bin` or, by its suffix, as `.safetensors`; atomically.

    metadata: texts in the header of a `.safetensors`; a `.bin` has no place for them.
    """
    _write(split_state(state), path, metadata)


def write_ip_adapter_bin(state: Mapping[str, Tensor], path: Path) -> None:
    """Write `{image_proj, image_proj_qformer, ip_adapter}`; suffix and atomicity as above."""
    names = {MLP: JOINT, ATTENTION: IP_ATTENTION}
    _write({names.get(top, top): part for top, part in split_state(state).items()}, path)


def _write(nested: Nested, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        if path.suffix == ".safetensors":
            save_tensors(
                {f"{top}.{k}": v for top, part in nested.items() for k, v in part.items()},
                partial,
                dict(metadata) if metadata else None,
            )
        else:
            with partial.open(
                "wb"
            ) as file:  # Given a path, torch would write its name into the file.
                torch.save(nested, file)
