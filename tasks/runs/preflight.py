"""Checks before a model, a server or an orchestrator is started: what can be known by then."""

import functools
import importlib.util
import json
import logging
from pathlib import Path

from calligrapher.errors import CheckpointError, DataError, ParamsError
from tasks.params.run_params import RunParams, check_multiple
from tasks.pipeline import WARMUP
from tasks.tracking.mirror import backend_class

logger = logging.getLogger(__name__)


def preflight(params: RunParams, data_dir: Path, *, run: Path | None = None) -> None:
    """Check folders, sizes, packages, every case and every prompt.

    `data_dir` is where tiny cases are drawn. run: the folder of a run that may go on; what only its
    warm-up needs is not asked for where that is made. Raises ParamsError, CheckpointError or
    DataError. Costs a decoding of each picture, once per process.
    """
    learns = params.warmup.steps > 0 and not (run is not None and (run / WARMUP).is_dir())
    _preflight(params.model_dump_json(), data_dir.absolute(), learns=learns)


@functools.cache
def _preflight(params_json: str, data_dir: Path, *, learns: bool) -> None:
    from calligrapher.model.compiling import check_compiler
    from calligrapher.model.loading import check_attention_backend, pick_device
    from tasks.resources.cases import Cases
    from tasks.resources.rewards import check_scorers
    from tasks.weights.model_files import model_files

    params = RunParams.model_validate_json(params_json)
    files, cases = model_files(params.model, data_dir.parent), Cases(params, data_dir)
    base = files.base
    _weights_are_there(base, files.siglip, files.adapter)
    _canvas_fits(params, base)
    _lora_has_layers(params, base, files.siglip, files.adapter)
    pick_device(params.model.device)
    if params.model.attention_backend is not None:
        check_attention_backend(params.model.attention_backend)
    if params.model.compile:
        check_compiler()
    check_scorers(params.reward)
    for name in params.tracking.used:
        backend_class(name)
    eight_bit = [n for n in ("warmup", "update") if getattr(params, n).use_8bit_adam]
    if eight_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ParamsError(
            f"{eight_bit[0]}.use_8bit_adam must be false where the package bitsandbytes is not"
            " installed. Got true. Install it (`pip install bitsandbytes`), or set it to false."
        )
    lists = {"data.train": (cases.train_folder, cases.train)}
    if params.evaluate.every > 0:
        lists["data.evaluation"] = (cases.evaluation_folder, cases.evaluation)
    _prompts_fit(params, base, lists)
    _demands_are_met(params, lists, learns=learns)
    _letters_are_known(params, lists)


def _demands_are_met(params: RunParams, lists: dict, *, learns: bool) -> None:
    from calligrapher.data.canvas import Canvas
    from tasks.data.demands import Demands, heights_on, require

    m = params.model
    for key, (where, cases) in lists.items():
        demands = Demands(
            Canvas(m.width, m.height, m.reference_context),
            warmup=learns and not params.data.reconstruct and key == "data.train",
            scored=not params.reward.disable_reward_model,
        )
        try:
            require(cases, demands)
        except DataError as error:
            raise DataError(f"{key} {where} has {error}") from None
        if (told := heights_on(demands.canvas, cases)) is not None:
            logger.info("%s: %s", key, told)


def _letters_are_known(params: RunParams, lists: dict) -> None:
    """Raise DataError where too many training texts could never be scored; warn of the others.

    Servers that are there already have weights of their own, and are asked what they know.
    """
    from reward_server.alphabet import bundled_alphabet
    from tasks.data.letters import told, unreadable
    from tasks.launch.places import named_servers
    from tasks.resources.rewards import served_alphabet

    reward = params.reward
    read = {"ocr_accuracy", "ocr_likelihood"} & set(reward.component_weights)
    if reward.disable_reward_model or not read:
        return
    servers = named_servers(params, 1)
    whose, alphabet_for = "the bundled OCR", bundled_alphabet
    if servers:
        whose = "the reward servers' OCR"
        alphabet_for = functools.partial(served_alphabet, reward, servers)
    for key, (where, cases) in lists.items():
        try:
            lacking = unreadable(cases, reward.ocr_match or "loose", alphabet_for)
        except (FileNotFoundError, ImportError, LookupError) as error:
            logger.warning("%s: whether the OCR knows all letters is not known: %s", key, error)
            return
        if key == "data.train" and len(lacking) > reward.max_unscored_share * len(cases):
            raise DataError(
                f"{key} {where} must have at most {reward.max_unscored_share:.0%} of texts without"
                f" a score (reward.max_unscored_share). {told(lacking, len(cases), whose)}"
            )
        if lacking:
            logger.warning("%s %s: %s", key, where, told(lacking, len(cases), whose))


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

    from calligrapher.model.conditioning import check_prompts

    tokenizer = AutoTokenizer.from_pretrained(base / "tokenizer_2")
    for key, (where, cases) in lists.items():
        try:
            check_prompts(tokenizer, cases, params.model.max_sequence_length)
        except DataError as error:
            raise DataError(f"{key} {where}: {error}") from None
