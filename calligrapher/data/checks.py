"""What is wrong with the pictures of a case: each file taken alone, and how they go together."""

from collections.abc import Callable, Iterator
from pathlib import Path

from calligrapher.data.case import Case
from calligrapher.data.images import load_mask, load_rgb
from calligrapher.errors import DataError

MIN_SIDE = 2  # A line of single pixels shows no style and holds no text.
MAX_REFERENCE_TALLNESS = (
    8  # At canvas width, a taller reference would make thousands of context rows.
)

Findings = tuple[tuple[int, int] | None, list[str]]


def problems_of(case: Case, inspect: Callable[[Path, str], Findings]) -> Iterator[str]:
    """All that is wrong with the pictures of a case; `inspect` is the function below or a cached
    one."""
    files = {"source": case.source, "mask": case.mask, "reference": case.reference}
    if case.target is not None:
        files["target"] = case.target
    sizes = {}
    for role, path in files.items():
        sizes[role], problems = inspect(path, role)
        yield from problems
    if _same_bytes(case.source, case.mask):
        yield f"{case.mask} must be another picture than its source. Found the same bytes in both."
    for role in ("mask", "target"):
        if sizes["source"] and sizes.get(role) and sizes["source"] != sizes[role]:
            wanted, found = ("x".join(map(str, sizes[name])) for name in ("source", role))
            yield f"{files[role]} must be as large as its source, {wanted}. Found {found}."


def _same_bytes(one: Path, other: Path) -> bool:
    if not (one.is_file() and other.is_file()) or one.stat().st_size != other.stat().st_size:
        return False
    return one.read_bytes() == other.read_bytes()


def inspect(path: Path, role: str) -> Findings:
    """(width, height) if it could be read, and what is wrong with this file taken alone."""
    try:
        image = load_mask(path) if role == "mask" else load_rgb(path)
    except DataError as error:
        return None, [str(error)]
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        return image.size, [
            f"{path} must be at least {MIN_SIDE} pixels a side. Found {width}x{height}."
        ]
    problems = []
    if role == "mask":
        painted = image.histogram()[255]
        if painted == 0:
            problems.append(
                f"{path} must have a white pixel (128 to 255, white = paint). Found none. "
                "A mask saved as 0 and 1 looks like this."
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
    return image.size, problems
