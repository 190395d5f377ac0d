"""The command that writes weights in another format."""

import argparse
from pathlib import Path

from flows.cli.output import add_json, show


def add_convert_commands(commands: argparse._SubParsersAction) -> None:
    """Add convert."""
    convert = commands.add_parser(
        "convert", help="write weights in another format, or a run's for other programs"
    )
    convert.add_argument(
        "source", help="a weights file, or a run or artifact: folder, name or MLflow URI"
    )
    convert.add_argument(
        "target",
        help=(
            "ip-adapter or calligrapher, with .bin or .safetensors; or a folder, which gets"
            " checkpoint-STEP"
        ),
    )
    convert.add_argument(
        "--weights", choices=("ema", "trained"), help="default: ema, where there is one"
    )
    convert.add_argument(
        "--lora",
        choices=("merged", "separate"),
        help=(
            "the transformer's LoRA: as a whole transformer/ or (default) as a file, beside the"
            " target"
        ),
    )
    convert.add_argument(
        "--base",
        type=Path,
        help="diffusers folder that merged LoRA is added to; default: the run's",
    )
    convert.add_argument(
        "--to",
        choices=("diffusers-lora", "kohya-lora", "adapter-safetensors", "hub"),
        help=(
            "instead of the target's name: LoRA of the transformer for diffusers, or in kohya's"
            " names; the adapter with its origin in the header; a folder for the Hugging Face hub"
        ),
    )
    convert.add_argument(
        "--license", help="of hub: an identifier of the hub; default: the embedded model's"
    )
    convert.add_argument(
        "--base-model", metavar="OWNER/NAME", help="of hub: the base's name on the hub"
    )
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as it is")
    convert.add_argument("--force", action="store_true", help="replace what is there")
    convert.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="where names are looked up"
    )
    add_json(convert)
    convert.set_defaults(command=_convert)


def _convert(chosen: argparse.Namespace) -> int:
    import torch

    from calligrapher.errors import ParamsError
    from tasks.reports.hub import write_hub_folder
    from tasks.weights.convert import convert
    from tasks.weights.exports import export

    options = {
        "weights": chosen.weights,
        "dtype": chosen.dtype and getattr(torch, chosen.dtype),
        "force": chosen.force,
        "runs_dir": chosen.runs_dir,
    }
    of_names = {"--lora": chosen.lora, "--base": chosen.base}
    of_hub = {"--license": chosen.license, "--base-model": chosen.base_model}
    idle = (of_names if chosen.to else {}) | (of_hub if chosen.to != "hub" else {})
    if given := [option for option, value in idle.items() if value is not None]:
        what = f"--to {chosen.to}" if chosen.to else "a target without --to"
        raise ParamsError(f"{', '.join(given)} must be left out: it says nothing of {what}.")
    if chosen.to == "hub":
        written = write_hub_folder(
            chosen.source,
            Path(chosen.target),
            license=chosen.license,
            base_model=chosen.base_model,
            **options,
        )
    elif chosen.to:
        written = [export(chosen.source, chosen.target, chosen.to, **options)]
    else:
        written = convert(
            chosen.source, chosen.target, lora=chosen.lora, base=chosen.base, **options
        )
    show({"written": written}, lambda: "\n".join(map(str, written)), as_json=chosen.json)
    return 0
