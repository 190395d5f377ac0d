"""Writes any readable weights as one of the formats that other programs know."""

import logging
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from calligrapher.errors import ParamsError
from calligrapher.model.adapter_files import (
    TRANSFORMER,
    adapter_state,
    blocks_and_width,
    fitting_adapter,
    write_calligrapher_bin,
    write_ip_adapter_bin,
)
from calligrapher.model.export import (
    LORA_FILE,
    Pairs,
    cast,
    check_finite,
    check_layers,
    diffusers_lora,
    lora_pairs,
    scratch,
    write_lora,
    write_merged_transformer,
)
from tasks.artifacts.disk import room_for
from tasks.weights.checkpoints import SUFFIXES, Checkpoint, base_folder, find_checkpoint
from tasks.weights.model_files import whole_adapter

logger = logging.getLogger(__name__)

WRITERS = {"ip-adapter": write_ip_adapter_bin, "calligrapher": write_calligrapher_bin}
NAMES = [f"{stem}{suffix}" for stem in WRITERS for suffix in (".bin", ".safetensors")]


def convert(
    source: str,
    target: str,
    *,
    weights: Literal["ema", "trained"] | None = None,
    lora: Literal["merged", "separate"] | None = None,
    dtype: torch.dtype | None = None,
    base: Path | None = None,
    force: bool = False,
    runs_dir: Path = Path("runs"),
) -> list[Path]:
    """Write the weights `source` as `target`, whose name is the format; returns all the files.

    `lora` says what becomes of the transformer's LoRA (None: separate, where there is one), `base`
    whose transformer it is merged into. Nothing is written, and nothing replaced, unless everything
    fits.
    """
    if weights and Path(source).suffix in SUFFIXES:
        raise ParamsError(f"--weights chooses between an artifact's files. {source} is one file.")
    found = find_checkpoint(source, runs_dir, weights)
    trained = {} if isinstance(found, Path) else load_file(found.path)
    pairs = lora_pairs(trained, TRANSFORMER)
    if lora and not pairs:
        raise ParamsError(f"--lora needs LoRA of the transformer. {source} has none.")
    if base and lora != "merged":
        raise ParamsError(
            f"--base is the transformer that --lora merged adds to. Got {base} without it."
        )
    check_finite(trained, source)
    out = _target(target, found)
    beside = {"merged": "transformer", "separate": LORA_FILE}[lora or "separate"]
    written = [out, out.with_name(beside)] if pairs else [out]
    refuse_existing(written, force)
    transformer = _transformer(found, base, pairs, written[-1]) if lora == "merged" else None
    out.parent.mkdir(parents=True, exist_ok=True)
    with room_for(" and ".join(map(str, written)), out.parent):
        with scratch(out.parent) as empty:
            state = (
                adapter_state(found)
                if isinstance(found, Path)
                else whole_adapter(found, trained, empty)
            )
            fitting_adapter(state, *blocks_and_width(state), Path(source))
            check_finite(state, source)
            WRITERS[out.stem](cast(state, dtype, empty) if dtype else state, out)
        if transformer:
            write_merged_transformer(transformer, pairs, found.lora_scale, written[1])
        elif pairs:
            write_lora(diffusers_lora(pairs, found.lora_scale), written[1], dtype)
    if pairs and lora is None:
        logger.warning(
            "%s holds no LoRA of the transformer: whoever loads it must load %s as well. --lora"
            " merged writes a whole transformer instead.",
            *written,
        )
    return written


def _target(target: str, found: Checkpoint | Path) -> Path:
    """The file to write: `target`, or one below it when it is a folder."""
    out = Path(target)
    if out.name in NAMES and not out.is_dir():
        return out
    if out.suffix and not out.is_dir():
        raise ParamsError(
            f"The target must be a folder or be called {', '.join(NAMES)}. Got {target}."
        )
    if isinstance(found, Path):
        raise ParamsError(
            f"The target must be called {', '.join(NAMES)}. Got {target}: a folder gets a"
            f" checkpoint-STEP, and {found} knows no step."
        )
    return out / f"checkpoint-{found.step}" / NAMES[0]


def refuse_existing(paths: list[Path], force: bool) -> None:
    """Raise ParamsError that names those of `paths` that are there, unless by force."""
    there = [str(path) for path in paths if path.exists()]
    if there and not force:
        raise ParamsError(f"{', '.join(there)} must not be there yet. Use --force to replace it.")


def _transformer(found: Checkpoint, base: Path | None, pairs: Pairs, out: Path) -> Path:
    """Return the folder of the transformer to merge LoRA into: it fits and is not `out`."""
    folder = (base or base_folder(found.model["base"])) / "transformer"
    check_layers(folder, pairs)
    if folder.resolve() == out.resolve():
        raise ParamsError(
            f"{folder} must stay as it is: it is the base. Name a target in another folder."
        )
    return folder
