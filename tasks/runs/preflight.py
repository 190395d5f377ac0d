"""Checks before a model, a server or an orchestrator is started: what can be known to be wrong by
then."""

import functools
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

from calligrapher.errors import CheckpointError, DataError, ParamsError
from tasks.params.run_params import RunParams, check_multiple


def preflight(params: RunParams, data_dir: Path) -> None:
    """Check folders, sizes, packages, every case and every prompt; `data_dir` is where tiny cases
    are drawn.

    Raises ParamsError, CheckpointError or DataError. Costs a decoding of each picture, once per
    process.
    """
    _preflight(params.model_dump_json(), data_dir.absolute())


@functools.cache
def _preflight(params_json: str, data_dir: Path) -> None:
    from calligrapher.model.loading import pick_device
    from tasks.resources.resources import Bench

    params = RunParams.model_validate_json(params_json)
    bench = Bench(params, data_dir, scorer=None)  # type: ignore[arg-type]  # nothing is scored here
    base, siglip, adapter = bench.model_paths
    _weights_are_there(base, siglip, adapter)
    _canvas_fits(params, base)
    _lora_has_layers(params, base, siglip, adapter)
    pick_device(params.model.device)
    eight_bit = [n for n in ("warmup", "update") if getattr(params, n).use_8bit_adam]
    if eight_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ParamsError(
            f"{eight_bit[0]}.use_8bit_adam must be false where the package bitsandbytes is not"
            " installed. Got true. Install it (`pip install bitsandbytes`), or set it to false."
        )
    lists = {"data.train": (bench.train_folder, bench.train_cases)}
    if params.evaluate.every > 0:
        lists["data.evaluation"] = (bench.evaluation_folder, bench.evaluation_cases)
    _prompts_fit(params, base, lists)


def _weights_are_there(base: Path, siglip: Path, adapter: Path | None) -> None:
    for key, folder, file in (
        ("base", base, "model_index.json"),
        ("siglip", siglip, "config.json"),
    ):
        if not (folder / file).is_file():
            raise CheckpointError(
                f"model.{key} must be a folder that holds {file}. Got {folder}, which does not."
            )
    if adapter is not None and not adapter.exists():
        raise CheckpointError(
            f"model.initial_adapter must be there. Got {adapter}, which is missing."
        )


def _canvas_fits(params: RunParams, base: Path) -> None:
    config = base / "vae" / "config.json"
    if not config.is_file():
        raise CheckpointError(f"model.base must hold vae/config.json. Got {base}, which does not.")
    levels = len(json.loads(config.read_text())["block_out_channels"])
    for side in ("width", "height"):
        check_multiple(
            f"model.{side}", getattr(params.model, side), 2**levels
        )  # 2x2 packing included


def _lora_has_layers(params: RunParams, base: Path, siglip: Path, adapter: Path | None) -> None:
    """Raise ParamsError for a target of model.lora that no layer has; no weights are loaded."""
    from calligrapher.sizing.meta_model import build

    if params.model.lora is not None:
        build(base, siglip, adapter, lora=params.model.lora.model_dump())


def _prompts_fit(params: RunParams, base: Path, lists: dict) -> None:
    from transformers import AutoTokenizer

    from calligrapher.model.conditioning import Encoders

    pipeline = SimpleNamespace(tokenizer_2=AutoTokenizer.from_pretrained(base / "tokenizer_2"))
    encoders = Encoders(pipeline, None, None, "", params.model.max_sequence_length)  # type: ignore[arg-type]
    for key, (where, cases) in lists.items():
        try:
            encoders.check_prompts(cases)
        except DataError as error:
            raise DataError(f"{key} {where}: {error}") from None
