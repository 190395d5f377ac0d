"""The commands on datasets: check, split, make from pictures, draw from fonts and words."""

import argparse
from pathlib import Path

from flows.cli.output import add_json, show


def add_data_commands(commands: argparse._SubParsersAction) -> None:
    """Add data check, data make, data draw and data split."""
    data = commands.add_parser(
        "data", help="check and split datasets, make cases from pictures or draw them"
    ).add_subparsers(required=True, metavar="WHAT")
    check = data.add_parser(
        "check", help="name every broken sample (exit status 1); statistics; a sheet"
    )
    _add_dataset(check)
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
    add_json(check)
    check.set_defaults(command=_check)

    split = data.add_parser(
        "split", help="two lists of a dataset's cases: to train on, and held out by a hash"
    )
    _add_dataset(split)
    split.add_argument("out", type=Path, help="train.jsonl and evaluation.jsonl are written here")
    split.add_argument(
        "--held-out", type=float, default=0.1, metavar="SHARE", help="about so many (default: 0.1)"
    )
    split.add_argument(
        "--by",
        choices=("text", "source", "case_id"),
        default="text",
        help="cases with the same one are on one side (default: text)",
    )
    add_json(split)
    split.set_defaults(command=_split)

    draw = data.add_parser("draw", help="draw cases, with targets, from fonts and words")
    draw.add_argument("fonts", type=Path, help="a font file, or a folder of them")
    draw.add_argument("words", type=Path, help="a text file, one word or line of words a line")
    draw.add_argument("out", type=Path, help="a bench folder is written here")
    draw.add_argument("--num", type=positive, default=64, help="cases (default: 64)")
    draw.add_argument("--width", type=positive, default=96, help="of the pictures (default: 96)")
    draw.add_argument("--height", type=positive, default=32, help="default: 32")
    draw.add_argument(
        "--cell",
        type=positive,
        metavar="PX",
        help="width of each letter; 15 for the embedded model; default: as the font has it",
    )
    draw.add_argument("--seed", type=count, default=0)
    add_json(draw)
    draw.set_defaults(command=_draw)

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
    add_json(make)
    make.set_defaults(command=_make, resumes=True)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    """Add what says where the cases of a dataset are and how they are listed."""
    parser.add_argument("path", help="a folder, a file, or a dataset's name; as data.train")
    parser.add_argument("--kind", help="as data.kind; default: told by what lies there")
    add_columns(parser)
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="keeps the pictures of tables"
    )


def add_columns(parser: argparse._ActionsContainer) -> None:
    """Add --columns."""
    parser.add_argument(
        "--columns",
        type=_columns,
        metavar="FIELD=NAME,...",
        help="names of a table's columns, as source=image,text=caption; as data.columns",
    )


def _columns(text: str) -> dict[str, str]:
    from typing import get_args

    from calligrapher.data.lists import Column

    pairs = [part.partition("=") for part in text.split(",")]
    fields = get_args(Column)
    if any(field not in fields or not name for field, _, name in pairs):
        raise argparse.ArgumentTypeError(
            f"must be FIELD=NAME,..., the fields {', '.join(fields)}. Got {text!r}."
        )
    return {field: name for field, _, name in pairs}


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
        columns=chosen.columns,
    )
    sheets = write_sheets(checked, chosen.sheet, chosen.sheet_cases) if chosen.sheet else []
    show(
        checked.as_json() | {"sheets": [str(path) for path in sheets]},
        lambda: "\n".join([checked.text(), *(f"The sheet is {path}." for path in sheets)]),
        as_json=chosen.json,
    )
    return 1 if checked.problems else 0


def _split(chosen: argparse.Namespace) -> int:
    from calligrapher.data.dataset import load_cases
    from calligrapher.errors import ParamsError
    from tasks.data.check import detect
    from tasks.data.split import split_cases

    if not 0 < chosen.held_out < 1:
        raise ParamsError(f"--held-out must lie between 0 and 1. Got {chosen.held_out:g}.")
    path, kind = (chosen.path, chosen.kind) if chosen.kind else detect(Path(chosen.path))
    cases = load_cases(path, kind, chosen.runs_dir / "data" / "pictures", chosen.columns)
    found = split_cases(cases, chosen.out, share=chosen.held_out, by=chosen.by)
    show(found, found.text, as_json=chosen.json)
    return 0


def _draw(chosen: argparse.Namespace) -> int:
    from tasks.data.draw import Sheet, draw_cases

    sheet = Sheet(chosen.width, chosen.height, chosen.cell)
    drawn = draw_cases(
        chosen.fonts, chosen.words, chosen.out, num_cases=chosen.num, sheet=sheet, seed=chosen.seed
    )
    show(drawn, drawn.text, as_json=chosen.json)
    return 0


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
    show(made, made.text, as_json=chosen.json)
    return 0
