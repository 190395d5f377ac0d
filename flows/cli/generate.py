"""The command that paints: one case given by its pictures, or all cases of a dataset."""

import argparse
from pathlib import Path
from typing import Any

from calligrapher.durable import atomic_path
from calligrapher.errors import DataError, ParamsError
from flows.cli.data import add_columns
from flows.cli.output import add_json, show

_FILES = {"source": "image", "mask": "mask", "reference": "reference"}  # role -> option
_SINGLE = (*_FILES.values(), "text")
_BLANK = ("size", "reference", "text")
_OF_BLANK = ("color", "place")
_MODEL = ("base", "siglip", "adapter")
_INSTEAD = (
    "num_steps",
    "noise_level",
    "width",
    "height",
    "reference_context",
    "guidance_scale",
    "max_sequence_length",
    "mixed_precision",
    "device",
)
_HOW = ("seed", "num_images", "scale", "crop", "grow", "feather", "batch_size")


def add_generate_commands(commands: argparse._SubParsersAction) -> None:
    """Add generate."""
    parser = commands.add_parser(
        "generate", help="write a text into a picture, in the style of another"
    )
    case = parser.add_argument_group("what to paint: one case, or those of a dataset")
    case.add_argument("--image", metavar="IMG", help="the picture to write into")
    case.add_argument("--mask", help="a picture as large: white where the text shall stand")
    case.add_argument(
        "--size", metavar="WxH", help="instead of a picture and a mask: an empty one, in pixels"
    )
    case.add_argument("--color", help="of the empty picture, as CSS writes it (#fff)")
    case.add_argument(
        "--place",
        metavar="L,T,R,B",
        help="of the empty picture: where to paint, or full (all but a margin of an eighth)",
    )
    case.add_argument("--reference", metavar="REF", help="the picture whose style is copied")
    case.add_argument("--text", help="what is written")
    case.add_argument(
        "--bench", metavar="FOLDER", help="a bench folder or another dataset: all its cases"
    )
    case.add_argument(
        "--kind", help="how it is read, as data.kind: self (default), cross, jsonl, ..."
    )
    add_columns(case)
    model = parser.add_argument_group(
        "what with: a run, or a model (default: the embedded tiny one)"
    )
    model.add_argument(
        "--run", help="a run: its folder, its name, or an artifact's path or MLflow URI"
    )
    model.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="where names are looked up"
    )
    model.add_argument(
        "--variant", help="base, warmup or trained; default: trained where there is a run"
    )
    model.add_argument("--base", help="folder of a diffusers FLUX.1-Fill, or tiny")
    model.add_argument("--siglip", help="folder of its SigLIP")
    model.add_argument("--adapter", help="its adapter: a weights file, or a run")
    _add_settings(parser.add_argument_group("how"))
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the results"
    )
    add_json(parser)
    parser.set_defaults(command=_generate, resumes=True)


def _add_settings(how: argparse._ArgumentGroup) -> None:
    """Add options that are checked as params; what is not given is the run's or the model's."""
    how.add_argument("--scale", type=float, help="weight of the style (1); 0 = FLUX.1-Fill alone")
    how.add_argument(
        "--seed", type=int, help="seed of the first picture (0); the next ones count up"
    )
    how.add_argument("--num-images", type=int, help="pictures per case (4)")
    how.add_argument("--batch-size", type=int, help="pictures sampled at once (8)")
    how.add_argument("--steps", dest="num_steps", type=int, help="sampling steps")
    how.add_argument(
        "--noise-level",
        type=float,
        help="fresh noise of each step but the last, 0 (none) to 1",
    )
    how.add_argument("--guidance", dest="guidance_scale", type=float)
    how.add_argument("--width", type=int, help="of the canvas, in pixels")
    how.add_argument("--height", type=int)
    how.add_argument(
        "--context",
        dest="reference_context",
        action=argparse.BooleanOptionalAction,
        help="show the reference on top of the canvas as well",
    )
    how.add_argument(
        "--crop",
        action=argparse.BooleanOptionalAction,
        help=(
            "paint the part around the mask (default); without: stretch the whole picture to the"
            " canvas"
        ),
    )
    how.add_argument("--grow", type=float, help="room around a mask larger than the canvas (1.5)")
    how.add_argument("--feather", type=int, help="depth of the seam in pixels, at most (8)")
    how.add_argument("--max-sequence-length", type=int, help="longest prompt in T5 tokens")
    how.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"))
    how.add_argument("--device", help="auto, cpu, cuda, cuda:1, ...")


def _generate(chosen: argparse.Namespace) -> int:
    """Mistakes in cases and settings are told before a model is loaded."""
    from tasks.inference.gallery import GenerateParams, check_folder, paint_cases
    from tasks.inference.painter import BASE, TRAINED, open_painter
    from tasks.params.errors import checked
    from tasks.pipeline import WARMUP

    how = checked(GenerateParams, _given(chosen, _HOW))
    named = _given(chosen, _MODEL)
    if chosen.run and named:
        raise ParamsError(
            f"--{' and --'.join(named)} must not be given with --run, which brings its model."
        )
    cases = _cases(chosen)
    check_folder(chosen.out)
    painter = open_painter(
        chosen.run, runs_dir=chosen.runs_dir, **named, **_given(chosen, _INSTEAD)
    )
    variant = chosen.variant or (TRAINED if TRAINED in painter.variants else BASE)
    if variant == "warm-up":  # as it is spelt in prose
        variant = WARMUP
    painted = paint_cases(painter, variant, cases, how, chosen.out)
    show({"painted": painted}, lambda: "\n".join(map(str, painted)), as_json=chosen.json)
    return 0


def _given(chosen: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(chosen, name)) is not None}


def _cases(chosen: argparse.Namespace) -> list:
    """All cases wanted. Raises ParamsError or, naming every broken one, DataError."""
    from calligrapher.data.dataset import load_cases

    single = _given(chosen, _SINGLE)
    if chosen.bench is not None and not single:
        return load_cases(
            chosen.bench,
            chosen.kind or "self",
            chosen.runs_dir / "data" / "pictures",
            chosen.columns,
        )
    of_lists = _given(chosen, ("bench", "kind", "columns"))
    blank = _given(chosen, ("size", *_OF_BLANK))
    if chosen.size is not None and not of_lists and set(single) == set(_BLANK) - {"size"}:
        return [_blank_case(chosen)]
    if blank or of_lists or len(single) < len(_SINGLE):
        raise ParamsError(
            f"There must be --{', --'.join(_SINGLE)}; or --{', --'.join(_BLANK)} and, if wanted,"
            f" --{' and --'.join(_OF_BLANK)}; or --bench and, if wanted, --kind and --columns."
            f" Got {', '.join(f'--{n}' for n in single | blank | of_lists) or 'none'}."
        )
    return [_one_case(chosen)]


def _blank_case(chosen: argparse.Namespace) -> Any:
    """The case of an empty picture, whose files lie beside the results."""
    from calligrapher.data.blank import blank_picture, color_of, place_mask, place_of, size_of
    from calligrapher.data.case import Case, checked_text, slug
    from calligrapher.data.checks import inspect
    from tasks.inference.gallery import check_folder

    size, color = size_of(chosen.size), color_of(chosen.color or "#fff")
    place, text = place_of(chosen.place, size), checked_text(chosen.text)
    reference = Path(chosen.reference).absolute()
    if problems := inspect(reference, "reference").problems:
        raise DataError("\n".join(problems))
    check_folder(chosen.out)
    chosen.out.mkdir(parents=True, exist_ok=True)
    source = chosen.out.absolute() / f"blank-{size[0]}x{size[1]}-{bytes(color).hex()}.png"
    mask = source.with_stem(f"{source.stem}-mask-{'-'.join(map(str, place))}")
    for path, picture in ((source, blank_picture(size, color)), (mask, place_mask(size, place))):
        with atomic_path(path) as partial:
            picture.save(partial)
    case_id = f"{source.stem}-{slug(reference.stem)}-{slug(text)}"
    return Case(case_id=case_id[:120], text=text, source=source, mask=mask, reference=reference)


def _one_case(chosen: argparse.Namespace) -> Any:
    """The case that four options give, checked as those of lists are."""
    from calligrapher.data.case import Case, checked_text, slug
    from calligrapher.data.checks import inspect, problems_of

    text = checked_text(chosen.text)
    files = {role: Path(getattr(chosen, option)).absolute() for role, option in _FILES.items()}
    case = Case(case_id=f"{slug(files['source'].stem)}-{slug(text)}", text=text, **files)
    if problems := list(problems_of(case, inspect)):
        raise DataError("\n".join(problems))
    return case
