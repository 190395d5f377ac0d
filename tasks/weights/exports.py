"""Weights in the forms that other programs load: LoRA (diffusers', kohya's), an adapter."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from calligrapher.errors import ParamsError
from calligrapher.model.adapter_files import (
    TRANSFORMER,
    adapter_state,
    blocks_and_width,
    fitting_adapter,
    write_calligrapher_bin,
)
from calligrapher.model.export import (
    LORA_FILE,
    Pairs,
    cast,
    check_finite,
    diffusers_lora,
    lora_pairs,
    scratch,
    write_lora,
)
from calligrapher.model.kohya import kohya_lora
from tasks.artifacts.disk import room_for
from tasks.weights.checkpoints import Checkpoint, find_checkpoint
from tasks.weights.convert import refuse_existing
from tasks.weights.model_files import whole_adapter
from tasks.weights.origin import as_metadata, origin

ADAPTER_FILE = "calligrapher.safetensors"
_LORA: dict[str, Callable[[Pairs, float], dict[str, Tensor]]] = {
    "diffusers-lora": diffusers_lora,
    "kohya-lora": kohya_lora,
}
FILES = {
    "diffusers-lora": LORA_FILE,
    "kohya-lora": "kohya_lora.safetensors",
    "adapter-safetensors": ADAPTER_FILE,
}


@dataclass(frozen=True)
class Trained:
    """Weights found by their name. Their files say where they come from (`origin`) in the header.

    source: as the user named them; messages do the same.
    """

    source: str
    found: Checkpoint | Path

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds, all of it finite; nothing of a file that is no artifact's."""
        weights = {} if isinstance(self.found, Path) else load_file(self.found.path)
        check_finite(weights, self.source)
        return weights

    @cached_property
    def pairs(self) -> Pairs:
        """The LoRA of the transformer."""
        return lora_pairs(self.weights, TRANSFORMER)

    @cached_property
    def metadata(self) -> dict[str, str]:
        return as_metadata(origin(self.found))

    def write_adapter(self, path: Path, dtype: torch.dtype | None) -> None:
        """Write the whole adapter. Raises CheckpointError when it does not fit together."""
        with scratch(path.parent) as empty:
            if isinstance(self.found, Path):
                state = adapter_state(self.found)
            else:
                state = whole_adapter(self.found, self.weights, empty)
            fitting_adapter(state, *blocks_and_width(state), Path(self.source))
            check_finite(state, self.source)
            state = cast(state, dtype, empty) if dtype else state
            write_calligrapher_bin(state, path, self.metadata)

    def lora(self, to: str) -> dict[str, Tensor]:
        """Return the tensors of the LoRA in the format `to`.

        Raises ParamsError where there is no LoRA, CheckpointError where the format has no names.
        """
        if isinstance(self.found, Path) or not self.pairs:
            raise ParamsError(
                f"--to {to} needs a run that trained LoRA on the transformer (model.lora.targets)."
                f" {self.source} has none."
            )
        return _LORA[to](self.pairs, self.found.lora_scale)


def export(
    source: str,
    target: str,
    to: str,
    *,
    weights: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    runs_dir: Path = Path("runs"),
) -> Path:
    """Write the weights `source` in the format `to`, a key of `FILES`; return the file.

    target: a `.safetensors` file, or a folder, in which the file has its usual name.
    """
    out = Path(target)
    if out.suffix != ".safetensors" or out.is_dir():
        out /= FILES[to]
    trained = Trained(source, find_checkpoint(source, runs_dir, weights))
    layers = trained.lora(to) if to in _LORA else None
    refuse_existing([out], force)
    out.parent.mkdir(parents=True, exist_ok=True)
    with room_for(str(out), out.parent):
        if layers is None:
            trained.write_adapter(out, dtype)
        else:
            write_lora(layers, out, dtype, trained.metadata)
    return out
