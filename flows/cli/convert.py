"""The command that writes weights in another format."""

import argparse
from pathlib import Path


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
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as it is")
    convert.add_argument("--force", action="store_true", help="replace what is there")
    convert.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="where names are looked up"
    )
    convert.set_defaults(command=_convert)


def _convert(chosen: argparse.Namespace) -> int:
    import torch

    from tasks.weights.convert import convert

    written = convert(
        chosen.source,
        chosen.target,
        weights=chosen.weights,
        lora=chosen.lora,
        dtype=chosen.dtype and getattr(torch, chosen.dtype),
        base=chosen.base,
        force=chosen.force,
        runs_dir=chosen.runs_dir,
    )
    for path in written:
        print(path)
    return 0
