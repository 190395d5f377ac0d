"""A folder as the Hugging Face hub wants it: weights, config, model card, pictures, licence.

Nothing is sent anywhere: `hf upload OWNER/NAME FOLDER` is the user's own step.
"""

import json
from dataclasses import asdict
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from calligrapher.durable import atomic_write
from calligrapher.errors import ParamsError
from calligrapher.model.adapter_files import adapter_state, config_of
from calligrapher.model.export import LORA_FILE, write_lora
from calligrapher.tiny.pack import TINY
from tasks.artifacts.disk import room_for
from tasks.params.run_params import RunParams
from tasks.reports.status import run_params
from tasks.stages.evaluate import GRID
from tasks.tracking.journal import REPORT
from tasks.weights.checkpoints import Checkpoint, base_folder, find_checkpoint
from tasks.weights.convert import refuse_existing
from tasks.weights.exports import ADAPTER_FILE, Trained
from tasks.weights.origin import evaluation_of, origin, rounds_done

CONFIG, CARD, LICENSE, IMAGES = "config.json", "README.md", "LICENSE", "images"
_MEASURES = {
    "ocr_accuracy": "OCR accuracy",
    "exact_match": "exact match",
    "style_score": "style (SigLIP)",
    "reward": "reward",
}
_LICENSED = "apache-2.0"  # the embedded model and all that is trained from it


def write_hub_folder(
    source: str,
    folder: Path,
    *,
    license: str | None = None,
    base_model: str | None = None,
    weights: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    runs_dir: Path = Path("runs"),
) -> list[Path]:
    """Write what the hub shows of the checkpoint `source` into `folder`; return the files.

    license: an identifier of the hub; None: that of the embedded model, for what was trained from
    it. base_model: the base's name on the hub, OWNER/NAME. Raises ParamsError for weights of no
    run, for a licence that must be told, and for files that are there already.
    """
    found = find_checkpoint(source, runs_dir, weights)
    if isinstance(found, Path):
        raise ParamsError(f"--to hub needs a run, which knows its scores. {source} is one file.")
    if license is None and found.model["base"] != TINY:
        raise ParamsError(
            f"--license must name the licence of what was trained from {found.model['base']}, which"
            " follows the base's. Use an identifier of the hub; other for one that has none."
        )
    trained = Trained(source, found)
    params = run_params(found.run)
    pictures = _pictures(found, params)
    licence = _licence(found, license)
    names = [ADAPTER_FILE, *([LORA_FILE] if trained.pairs else []), CONFIG, CARD]
    names += [*pictures, *([LICENSE] if licence else [])]
    written = [folder / name for name in names]
    refuse_existing(written, force)
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
    with room_for(str(folder), folder):
        trained.write_adapter(folder / ADAPTER_FILE, dtype)
        if trained.pairs:
            write_lora(trained.lora("diffusers-lora"), folder / LORA_FILE, dtype, trained.metadata)
        for name, file in pictures.items():
            atomic_write(folder / name, file.read_bytes())
        if licence:
            atomic_write(folder / LICENSE, licence)
        config = _config(found, params, folder / ADAPTER_FILE)
        atomic_write(folder / CONFIG, (json.dumps(config, indent=1) + "\n").encode())
        card = _card(
            params,
            config,
            license=license or _LICENSED,
            base_model=base_model,
            lora=bool(trained.pairs),
            pictures=list(pictures),
        )
        atomic_write(folder / CARD, card.encode())
    return written


def _pictures(found: Checkpoint, params: RunParams) -> dict[str, Path]:
    """Return name in the folder -> file: the evaluation's grid, and what the run shows."""
    run, rounds = found.run, rounds_done(found)
    files = {}
    if evaluation := evaluation_of(run, rounds):
        files["grid.png"] = evaluation.path / GRID
    if rounds == params.rounds:
        for name in ("before_after.png", "learning_curve.png"):
            files[name] = run / REPORT / name
    return {f"{IMAGES}/{name}": file for name, file in files.items() if file.is_file()}


def _licence(found: Checkpoint, license: str | None) -> bytes | None:
    """Return the licence's text: ours for what is ours, else the one that lies in the base."""
    if license in (None, _LICENSED):
        text = distribution("calligrapher").read_text("licenses/LICENSE")
        return text and text.encode()
    files = sorted(base_folder(found.model["base"]).glob("LICENSE*"))
    return files[0].read_bytes() if files else None


def _config(found: Checkpoint, params: RunParams, adapter: Path) -> dict[str, Any]:
    """Return what a program must know to load the weights and to paint as the run did."""
    model = params.model
    return {
        "adapter": asdict(config_of(adapter_state(adapter))),
        "lora": model.lora and model.lora.model_dump(mode="json"),
        "canvas": {
            "width": model.width,
            "height": model.height,
            "reference_context": model.reference_context,
        },
        "guidance_scale": model.guidance_scale,
        "num_inference_steps": params.evaluation_steps,
        "noise_level": params.evaluate.noise_level,
        "max_sequence_length": model.max_sequence_length,
    } | origin(found)


def _card(
    params: RunParams,
    config: dict[str, Any],
    *,
    license: str,
    base_model: str | None,
    lora: bool,
    pictures: list[str],
) -> str:
    """Return the model card; lora: whether there is one of the transformer."""
    scores, name = config["scores"], config["run"]
    data = ModelCardData(
        license=license,
        base_model=base_model,
        pipeline_tag="image-to-image",
        tags=["calligrapher", "flux", "text-rendering", "reinforcement-learning"]
        + (["lora"] if lora else []),
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-to-image",
                dataset_type="held-out-cases",
                dataset_name=f"{params.evaluate.num_cases} held-out cases",
                metric_type=measure,
                metric_name=_MEASURES[measure],
                metric_value=round(value["mean"], 4),
            )
            for measure, value in scores["after"].items()
        ]
        or None,
    )
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {name}",
        "",
        "A style adapter for FLUX.1-Fill that writes a given text in the style of a reference"
        f" picture, trained with Calligrapher RL ({params.algorithm.upper()}, {config['rounds']}"
        f" rounds of {params.images_per_round} pictures).",
        "",
        f"- Base: `{config['base']}`",
        f"- Weights: sha256 `{config['digest']}`, from `{config['stage']}`",
        f"- `{ADAPTER_FILE}`: the adapter, in the names of the released `calligrapher.bin`",
    ]
    if lora:
        lines.append(f"- `{LORA_FILE}`: LoRA of the transformer; both are needed")
    lines += ["", *_table(scores, params), "", *_usage(config, lora)]
    for picture in pictures:
        lines += ["", f"![{Path(picture).stem.replace('_', ' ')}]({picture})"]
    return "\n".join(lines) + "\n"


def _table(scores: dict[str, Any], params: RunParams) -> list[str]:
    """Return the measured table: before and after, with intervals."""
    if not scores["after"]:
        return ["No held-out scores were measured for these weights."]
    evaluate = params.evaluate
    return [
        f"Measured on {evaluate.num_cases} held-out cases, {evaluate.num_images_per_case} pictures"
        " each, bootstrap 95 % intervals over cases:",
        "",
        "| | before | after |",
        "|---|---|---|",
        *(
            f"| {_MEASURES[name]} | {_shown(scores['before'].get(name))} | {_shown(value)} |"
            for name, value in scores["after"].items()
        ),
    ]


def _shown(value: dict[str, float] | None) -> str:
    if value is None:
        return "not measured"
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _usage(config: dict[str, Any], lora: bool) -> list[str]:
    """Return how to paint with it; with LoRA: what diffusers loads beside the adapter."""
    if lora:
        return [
            "```python",
            f'pipeline.load_lora_weights(folder, weight_name="{LORA_FILE}")  # FluxFillPipeline',
            "```",
        ]
    canvas = config["canvas"]
    base = "" if config["base"] == TINY else " --base BASE --siglip SIGLIP"
    noise = f" --noise-level {config['noise_level']:g}" if config["noise_level"] else ""
    return [
        "```",
        f"calligrapher generate{base} --adapter {ADAPTER_FILE} --image IMG --mask MASK"
        f" --reference REF --text TEXT --width {canvas['width']} --height {canvas['height']}"
        f" --steps {config['num_inference_steps']}{noise} --guidance {config['guidance_scale']:g}"
        " --out out",
        "```",
    ]
