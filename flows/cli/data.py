"""The commands on datasets: check what lies there, make cases from pictures that show text."""

import argparse
from pathlib import Path


def add_data_commands(commands: argparse._SubParsersAction) -> None:
    """Add data check and data make."""
    data = commands.add_parser(
        "data", help="check datasets, make cases from pictures"
    ).add_subparsers(required=True, metavar="WHAT")
    check = data.add_parser(
        "check", help="name every broken sample (exit status 1); statistics; a sheet"
    )
    check.add_argument("path", help="a folder, a file, or a dataset's name; as data.train")
    check.add_argument("--kind", help="as data.kind; default: told by what lies there")
    check.add_argument("--width", type=positive, default=512, help="canvas, as model.width")
    check.add_argument("--height", type=positive, default=512, help="canvas, as model.height")
    check.add_argument(
        "--reference-context", action="store_true", help="as model.reference_context"
    )
    check.add_argument(
        "--warmup", action="store_true", help="for warmup.steps > 0: each case must have a target"
    )
    check.add_argument(
        "--sheet", type=Path, help="draw a contact sheet here (more pages: NAME-2.png, ...)"
    )
    check.add_argument(
        "--sheet-cases", type=positive, default=36, help="draw so many, broken ones first"
    )
    check.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="keeps the pictures of tables"
    )
    check.set_defaults(command=_check)

    make = data.add_parser("make", help="make training cases from pictures that show text; resumes")
    make.add_argument("pictures", type=Path, help="a folder; its subfolders count")
    make.add_argument("out", type=Path, help="cases.jsonl and its pictures are written here")
    make.add_argument("--min-height", help="least height of a text in px (default: 16)")
    make.add_argument("--min-confidence", help="least OCR confidence, 0 to 1 (default: 0.9)")
    make.add_argument("--max-length", help="most characters of a text (default: 40)")
    make.add_argument(
        "--pattern", help="regular expression that a whole text must match, as '[A-Z0-9 ]+'"
    )
    make.add_argument(
        "--grow", help="margin of the mask as a share of the text's height (default: 0.15)"
    )
    make.add_argument(
        "--self-reference", action="store_true", help="the text itself is the reference"
    )
    make.add_argument("--max-cases", type=positive, help="stop after so many")
    make.set_defaults(command=_make, resumes=True)


def positive(text: str) -> int:
    """A whole number from 1, as argparse wants it said."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1. Got {text!r}.")
    return int(text)


def count(text: str) -> int:
    """A whole number from 0, as argparse wants it said."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0. Got {text!r}.")
    return int(text)


def _check(chosen: argparse.Namespace) -> int:
    from calligrapher.data.canvas import Canvas
    from tasks.data.check import check
    from tasks.data.demands import Demands
    from tasks.data.sheet import write_sheets
    from tasks.params.run_params import check_multiple

    for side in ("width", "height"):
        check_multiple(f"--{side}", getattr(chosen, side), 16)
    canvas = Canvas(chosen.width, chosen.height, chosen.reference_context)
    checked = check(
        Path(chosen.path),
        chosen.kind,
        demands=Demands(canvas, warmup=chosen.warmup),
        cache_dir=chosen.runs_dir / "data" / "pictures",
    )
    print(checked.text())
    if chosen.sheet:
        for path in write_sheets(checked, chosen.sheet, chosen.sheet_cases):
            print(f"The sheet is {path}.")
    return 1 if checked.problems else 0


def _make(chosen: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from calligrapher.data.cutting import Rules
    from calligrapher.data.lists import wrong_fields
    from calligrapher.errors import ParamsError
    from flows.cli.scene_reader import scene_reader
    from tasks.data.make import make_cases

    given = {name: getattr(chosen, name) for name in Rules.model_fields}
    try:
        rules = Rules.model_validate(
            {name: value for name, value in given.items() if value is not None}
        )
    except ValidationError as error:
        raise ParamsError(f"a rule of data make cannot be used: {wrong_fields(error)}.") from error
    read, reads_with = scene_reader()
    made = make_cases(
        chosen.pictures,
        chosen.out,
        read=read,
        reads_with=reads_with,
        rules=rules,
        max_cases=chosen.max_cases,
    )
    print(made.text())
    return 0
