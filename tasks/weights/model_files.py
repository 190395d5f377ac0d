"""The files of the model that a params file names: base, SigLIP, adapter, LoRA to start from.

```
files = model_files(params.model, Path("runs"))    # before the run is opened: this may write a file
model = load_model(files.base, files.siglip, files.adapter, digest=files.digest, ...)
files.load_lora(model.policy)
```
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from calligrapher.errors import ArtifactError, CheckpointError, ParamsError
from calligrapher.model.adapter_files import (
    ADAPTER,
    TRANSFORMER,
    adapter_state,
    write_calligrapher_bin,
)
from calligrapher.model.export import Empty, cast, lora_pairs, own_adapter, scratch, with_lora
from calligrapher.model.policy import Policy
from calligrapher.model.sharding import held
from calligrapher.tiny.pack import DATA, TINY
from tasks.artifacts.digests import path_digest
from tasks.artifacts.provenance import fingerprint
from tasks.artifacts.run_dir import RunDir
from tasks.params.sections import ModelParams
from tasks.weights.checkpoints import Checkpoint, base_folder, find_checkpoint, siglip_folder


@dataclass(frozen=True)
class ModelFiles:
    """Where the weights lie that a run starts from."""

    base: Path  # a diffusers folder of FLUX.1-Fill
    siglip: Path  # a folder of SigLIP
    adapter: Path | None  # None: a new one, with random weights
    lora: Path | None = None  # a checkpoint whose LoRA of the transformer is gone on from

    @property
    def paths(self) -> list[Path]:
        """Return those that there are."""
        paths = (self.base, self.siglip, self.adapter, self.lora)
        return [path for path in paths if path is not None]

    @cached_property
    def digest(self) -> str:
        """Return the digests of all the files, joined by `+`, in the order of the fields."""
        adapter = path_digest(self.adapter) if self.adapter else "new"
        digests = [path_digest(self.base), path_digest(self.siglip), adapter]
        if self.lora:
            digests.append(path_digest(self.lora))
        return "+".join(digests)

    def load_lora(self, policy: Policy) -> None:
        """Give a newly loaded policy the LoRA of the transformer that it goes on from, if any."""
        if self.lora is None:
            return
        with safe_open(self.lora, framework="pt") as content, torch.no_grad():
            for name, parameter in policy.parameters.items():
                if name.startswith(f"{TRANSFORMER}."):
                    held(parameter).copy_(policy.part(name, content.get_tensor(name)))


def model_files(model: ModelParams, runs_dir: Path) -> ModelFiles:
    """Return the files that the section `model` of the params names.

    The word `tiny` stands for the embedded model's; `initial_adapter` may be a run or an artifact:
    its folder, its name below `runs_dir`, or its MLflow URI. Of a run all that it learned is
    meant. Its LoRA on the adapter is added to the adapter, which is written to
    `runs_dir/data/adapters`; its LoRA on the transformer is gone on from. Raises CheckpointError
    when that is impossible, or when `initial_adapter` names no weights.
    """
    if model.siglip is None and model.base != TINY:
        raise ParamsError(
            f"model.siglip must name SigLIP's folder when model.base is {model.base!r}. Got null."
        )
    base = base_folder(model.base)
    siglip = siglip_folder(model.siglip)
    if model.initial_adapter is None:
        return ModelFiles(base, siglip, None)
    try:
        source = _source(model.initial_adapter, runs_dir)
        adapter = source if isinstance(source, Path) else _adapter_file_of(source, runs_dir)
    except ArtifactError as error:
        raise CheckpointError(
            f"model.initial_adapter must name weights. Got {model.initial_adapter}: {error}"
        ) from error
    if isinstance(source, Path) or not has_transformer_lora(source):
        return ModelFiles(base, siglip, adapter)
    _check_lora_goes_on(source, model, base)
    return ModelFiles(base, siglip, adapter, source.path)


def adapter_file(text: str, runs_dir: Path) -> Path:
    """Return the file of the whole adapter that `text` names; reading it shows whether it fits.

    An adapter that is no file yet (LoRA added, or taken out of a checkpoint with LoRA of the
    transformer) is written to `runs_dir/data/adapters`.
    """
    source = _source(text, runs_dir)
    return source if isinstance(source, Path) else _adapter_file_of(source, runs_dir)


def whole_adapter(
    checkpoint: Checkpoint, trained: dict[str, Tensor], empty: Empty
) -> dict[str, Tensor]:
    """Return the adapter of a checkpoint: what was trained, over what the run began with."""
    own, pairs = own_adapter(trained), lora_pairs(trained, ADAPTER)
    if own and not pairs:
        return own
    whole = adapter_state(_initial_adapter_of(checkpoint)) | own
    if not pairs:
        return whole
    return with_lora(cast(whole, torch.float32, empty), pairs, checkpoint.lora_scale, empty)


def has_transformer_lora(checkpoint: Checkpoint) -> bool:
    """Return whether the checkpoint holds LoRA pairs of the transformer."""
    with safe_open(checkpoint.path, framework="pt") as content:
        return any(name.startswith(f"{TRANSFORMER}.") for name in content.keys())  # noqa: SIM118


def _source(text: str, runs_dir: Path) -> Checkpoint | Path:
    if text == TINY:
        return DATA / "calligrapher.bin"
    return find_checkpoint(text, runs_dir)


def _adapter_file_of(checkpoint: Checkpoint, runs_dir: Path) -> Path:
    trained = load_file(checkpoint.path)
    own, pairs = own_adapter(trained), lora_pairs(trained, ADAPTER)
    if not own and not pairs:
        return _initial_adapter_of(checkpoint)
    if own and not pairs and not lora_pairs(trained, TRANSFORMER):
        return checkpoint.path
    made_from = {"weights": checkpoint.artifact.digest, "model": _began(checkpoint)}
    params = checkpoint.artifact.params["model"]
    key = fingerprint("adapter", 1, params, made_from, file=checkpoint.path.name)
    out = runs_dir / "data" / "adapters" / f"{key}.safetensors"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch(out.parent) as empty:
            write_calligrapher_bin(whole_adapter(checkpoint, trained, empty), out)
    return out


def _initial_adapter_of(checkpoint: Checkpoint) -> Path:
    """Return the file of the adapter that the checkpoint's run began with, if it is unchanged."""
    initial = checkpoint.model["initial_adapter"]
    if initial is None:
        raise CheckpointError(
            f"{checkpoint.path} must hold a whole adapter, or its run must name"
            " model.initial_adapter. It is null."
        )
    file = adapter_file(initial, checkpoint.run.parent)
    _, _, adapter, *_ = _began(checkpoint).split("+")
    if adapter != path_digest(file):
        raise CheckpointError(
            f"{file} must be the adapter that the run {checkpoint.run} began with. It has changed."
        )
    return file


def _began(checkpoint: Checkpoint) -> str:
    """Return the digest of the model that the checkpoint's run began with."""
    return RunDir(checkpoint.run).load("warmup").inputs["model"]


def _check_lora_goes_on(checkpoint: Checkpoint, model: ModelParams, base: Path) -> None:
    """Raise CheckpointError unless a run with `model` can go on from the checkpoint's LoRA."""
    keys = ("rank", "alpha", "targets")
    learned = {key: checkpoint.artifact.params["model"]["lora"][key] for key in keys}
    asked = model.lora and {key: getattr(model.lora, key) for key in keys}
    if asked is None or any(_plain(asked[key]) != _plain(learned[key]) for key in keys):
        section = ", ".join(f"{key}: {_yaml(value)}" for key, value in learned.items())
        raise CheckpointError(
            f"{model.initial_adapter} trained LoRA on the transformer, which no adapter holds:"
            f" model.lora must be {{{section}}} to go on from it. Got"
            f" {'null' if asked is None else asked}. Or add it to the base: calligrapher convert"
            f" {model.initial_adapter} FOLDER/calligrapher.bin --lora merged, then name both"
            " (docs/formats.md)."
        )
    began_base = _began(checkpoint).split("+")[0]
    if path_digest(base) != began_base:
        raise CheckpointError(
            f"model.base must be the one that {model.initial_adapter} trained LoRA on,"
            f" {checkpoint.model['base']}. Got {model.base}, which holds other files."
        )


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, (list, tuple)) else value


def _yaml(value: object) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, (list, tuple)) else f"{value:g}"
