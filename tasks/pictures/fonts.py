"""Faces for captions: DejaVu, and for letters that it lacks another font of the machine."""

import functools
import itertools
import logging
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from fontTools.ttLib import TTCollection, TTFont, TTLibError
from PIL import ImageFont

logger = logging.getLogger(__name__)


@functools.cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib carries it: on every machine, Latin, Greek and Cyrillic letters."""
    return ImageFont.truetype(_dejavu(bold), size)


@functools.cache
def letters_of(path: Path) -> frozenset[str]:
    """Return the characters that a font file has glyphs for; none of what is no font.

    Of a collection (`.ttc`) its first face counts, which is the one that Pillow opens. The font
    LastResort, which draws a sign of its alphabet for every letter, has none.
    """
    if path.name.startswith("LastResort"):
        return frozenset()
    try:
        with path.open("rb") as file:
            is_collection = file.read(4) == b"ttcf"
        face = TTCollection(path, lazy=True).fonts[0] if is_collection else TTFont(path, lazy=True)
        return frozenset(map(chr, face.getBestCmap() or ()))
    except (TTLibError, OSError, AssertionError):
        return frozenset()


def pieces(
    text: str, size: int, bold: bool = False
) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """Yield the parts of `text` with the face that draws each.

    A letter that no font of the machine has is written as its number, as U+6F22: never as the
    square that stands for all such letters. That is told once, with the package to install.
    """
    for path, part in itertools.groupby(text, lambda letter: _face_of(letter, bold)):
        letters = "".join(part)
        if path is None:
            _advise()
            letters = "".join(f"U+{ord(letter):04X}" for letter in letters)
            yield letters, font(size, bold)
        else:
            yield letters, ImageFont.truetype(path, size)


@functools.cache
def _face_of(letter: str, bold: bool) -> Path | None:
    dejavu = _dejavu(bold)
    blank = letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf")
    if blank or letter in letters_of(dejavu):
        return dejavu
    return next((path for path in system_fonts() if letter in letters_of(path)), None)


@functools.cache
def system_fonts() -> list[Path]:
    """Return the machine's font files, those for Chinese, Japanese and Korean first."""
    from matplotlib.font_manager import findSystemFonts

    paths = [Path(name) for name in findSystemFonts()]
    return sorted(paths, key=lambda path: ("CJK" not in path.name, path.name))


@functools.cache
def _advise() -> None:
    logger.warning(
        "Captions have letters that no font here has, and write them as their numbers. For Chinese,"
        " Japanese and Korean: apt-get install fonts-noto-cjk."
    )


def _dejavu(bold: bool) -> Path:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
