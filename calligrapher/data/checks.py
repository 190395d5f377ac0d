"""What is wrong with the pictures of a case: each file taken alone, and how they go together."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from calligrapher.data.case import Case
from calligrapher.data.images import load_grey, load_mask, load_rgb
from calligrapher.errors import DataError

MIN_SIDE = 2  # A line of single pixels shows no style and holds no text.
# At canvas width, a taller reference would make thousands of context rows.
MAX_REFERENCE_TALLNESS = 8


@dataclass(frozen=True)
class Inspection:
    """What one picture file is like, taken alone."""

    size: tuple[int, int] | None  # (width, height); None where the file cannot be read
    problems: tuple[str, ...]


def problems_of(case: Case, inspect: Callable[[Path, str], Inspection]) -> Iterator[str]:
    """Yield all that is wrong with the pictures of a case.

    `inspect` is the function below, or a cached one where cases share files.
    """
    files = {"source": case.source, "mask": case.mask, "reference": case.reference}
    if case.target is not None:
        files["target"] = case.target
    inspections = {role: inspect(path, role) for role, path in files.items()}
    for inspection in inspections.values():
        yield from inspection.problems
    if _same_bytes(case.source, case.mask):
        yield f"{case.mask} must be another picture than its source. Found the same bytes in both."
    source_size = inspections["source"].size
    for role in ("mask", "target"):
        size = inspections[role].size if role in inspections else None
        if source_size and size and source_size != size:
            yield (
                f"{files[role]} must be as large as its source, {source_size[0]}x{source_size[1]}."
                f" Found {size[0]}x{size[1]}."
            )


def _same_bytes(one: Path, other: Path) -> bool:
    if not (one.is_file() and other.is_file()) or one.stat().st_size != other.stat().st_size:
        return False
    return one.read_bytes() == other.read_bytes()


def _all_dark(brightest: int) -> str:
    """Return what a mask looks like that has no white pixel."""
    if brightest == 0:
        return "it is black all over, so nothing would be painted"
    return f"its brightest pixel is {brightest}. Save it with 0 and 255"


def inspect(path: Path, role: str) -> Inspection:
    """Return the size of one picture and what is wrong with it, taken alone."""
    try:
        image = load_mask(path) if role == "mask" else load_rgb(path)
    except DataError as error:
        return Inspection(None, (str(error),))
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        too_small = f"{path} must be at least {MIN_SIDE} pixels a side. Found {width}x{height}."
        return Inspection(image.size, (too_small,))
    problems = []
    if role == "mask":
        painted = image.histogram()[255]
        if painted == 0:
            problems.append(
                f"{path} must have a white pixel (128 to 255, white = paint). Found none:"
                f" {_all_dark(int(load_grey(path).max()))}."
            )
        if painted == width * height:
            problems.append(
                f"{path} must keep a part of the source (black). Found that it covers the whole"
                " image."
            )
    if role == "reference" and height > MAX_REFERENCE_TALLNESS * width:
        problems.append(
            f"{path} must be at most {MAX_REFERENCE_TALLNESS} times as tall as wide. Found"
            f" {width}x{height}."
        )
    return Inspection(image.size, tuple(problems))
