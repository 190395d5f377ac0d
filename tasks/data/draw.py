"""Draws cases with a user's fonts and words: source, mask, reference, and the target as well.

A case is drawn as the tiny world draws its own: a picture that shows one word, a mask over it, a
reference that shows another word in another font and ink, and the target, which is the source with
the text in the reference's font and ink. Everything follows from the seed.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from calligrapher.data.case import checked_text
from calligrapher.durable import atomic_write
from calligrapher.errors import DataError
from calligrapher.files import files_below
from calligrapher.tiny.world import LISTING, Style, paper, random_style, to_image
from tasks.pictures.fonts import letters_of

SUFFIXES = (".ttf", ".otf", ".ttc")


@dataclass(frozen=True)
class Sheet:
    """The paper of all pictures, in pixels. cell: width of each letter; None: as the font has it.

    The embedded model has learned letters in cells of 15 on 96 x 32.
    """

    width: int = 96
    height: int = 32
    cell: int | None = None

    @property
    def band(self) -> tuple[int, int]:
        """First and last row of the text."""
        return self.height // 8, self.height - self.height // 8

    @property
    def left(self) -> int:
        return (self.cell or self.height // 2) // 5


@dataclass(frozen=True)
class DrawnCases:
    """What was drawn. left_out: fonts that have the letters of no word."""

    path: Path
    cases: int
    fonts: int
    words: int
    left_out: tuple[str, ...]

    def text(self) -> str:
        lines = [
            f"{self.cases} cases of {self.words} words in {self.fonts} fonts are in {self.path}."
        ]
        if self.left_out:
            lines.append(f"fonts without the letters of any word: {', '.join(self.left_out)}")
        return "\n".join(lines)


def draw_cases(
    fonts: Path, words: Path, out: Path, *, num_cases: int, sheet: Sheet, seed: int = 0
) -> DrawnCases:
    """Write `num_cases` cases with targets in the bench layout into `out`.

    fonts: a font file, or a folder of them. words: a text file, one a line. A word is drawn in
    fonts that have all its letters. Raises DataError where a word has no such font or does not fit,
    where there are fewer than two words, and where `out` holds a list.
    """
    if (out / LISTING).exists():
        raise DataError(f"{out / LISTING} must not be there yet. Name another folder.")
    texts = read_words(words)
    files = _font_files(fonts)
    able = {
        text: [file for file in files if letters_of(file) >= set(text) - {" "}] for text in texts
    }
    _check_words(texts, able, files, sheet)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(1, num_cases + 1):
        rng = np.random.default_rng([seed, number])
        text, pictures = _draw(rng, texts, able, sheet)
        for role, picture in pictures.items():
            to_image(picture).save(out / f"test{number}_{role}.png")
        lines.append(f"{number}-{text}\n")
    atomic_write(out / LISTING, "".join(lines).encode())
    used = {file for chosen in able.values() for file in chosen}
    left_out = tuple(file.name for file in files if file not in used)
    return DrawnCases(out, num_cases, len(used), len(texts), left_out)


def read_words(path: Path) -> list[str]:
    """Return the texts of a file, one a line, each once. Raises DataError for what is no text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8. Found {error.reason} at {error.start}.") from error
    texts = list(dict.fromkeys(checked_text(line) for line in lines if line.strip()))
    if len(texts) < 2:
        raise DataError(
            f"{path} must hold at least two words, one a line: a case shows one and asks for"
            f" another. Found {len(texts)}."
        )
    return texts


def _font_files(fonts: Path) -> list[Path]:
    files = [fonts] if fonts.is_file() else list(files_below(fonts)) if fonts.is_dir() else []
    files = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not files:
        raise DataError(f"{fonts} must be a font or a folder of fonts ({', '.join(SUFFIXES)}).")
    if broken := [str(file) for file in files if not letters_of(file)]:
        raise DataError(f"{', '.join(broken)} must be fonts with letters. Found none in them.")
    return files


def _check_words(
    texts: Sequence[str], able: Mapping[str, Sequence[Path]], files: Sequence[Path], sheet: Sheet
) -> None:
    """Raise one DataError that names every word which cannot be drawn."""
    known = frozenset().union(*(letters_of(file) for file in files))
    wrong = []
    for text in texts:
        if not able[text]:
            lacking = "".join(dict.fromkeys(c for c in text if c not in known and c != " "))
            why = f"no font has {lacking}" if lacking else "no font has all its letters"
            wrong.append(f"{text}: {why}")
        elif sheet.cell and sheet.left + len(text) * sheet.cell > sheet.width:
            wrong.append(f"{text}: {len(text)} cells of {sheet.cell} px exceed {sheet.width} px")
    if wrong:
        listed = "\n".join(f"- {line}" for line in wrong)
        raise DataError(f"Every word must be drawn whole. Found:\n{listed}")


def _draw(
    rng: np.random.Generator, texts: Sequence[str], able: Mapping[str, Sequence[Path]], sheet: Sheet
) -> tuple[str, dict[str, np.ndarray]]:
    """Return the text of a case and its pictures by their role in the bench layout."""
    text, old, shown = (texts[i] for i in _different(rng, len(texts)))
    source_style, style = random_style(rng, "train"), random_style(rng, "train")
    while (sum(source_style.paper[0]) > 1.5) != (sum(style.paper[0]) > 1.5):
        style = random_style(rng, "train")  # its ink must be legible on the source's paper
    old_font, font = (able[word][int(rng.integers(len(able[word])))] for word in (old, text))
    if not letters_of(font) >= set(shown) - {" "}:
        shown = text
    background = paper(source_style, sheet.width, sheet.height)
    before, after = _cover(old_font, old, sheet), _cover(font, text, sheet)
    return text, {
        "source": _inked(background, before, source_style),
        "mask": _mask(before, after, sheet, max(len(old), len(text))),
        "ref": _inked(paper(style, sheet.width, sheet.height), _cover(font, shown, sheet), style),
        "target": _inked(background, after, style),
    }


def _different(rng: np.random.Generator, count: int) -> list[int]:
    """Return three places among `count`, different as far as there are so many."""
    chosen = list(rng.permutation(count)[:3])
    return [*chosen, *chosen[1:]][:3]


def _inked(background: np.ndarray, cover: np.ndarray, style: Style) -> np.ndarray:
    """Return [H, W, 3]: the ink of a style on a background where `cover` [H, W] says so."""
    return (1 - cover[..., None]) * background + cover[..., None] * np.asarray(style.ink)


def _mask(before: np.ndarray, after: np.ndarray, sheet: Sheet, letters: int) -> np.ndarray:
    """Return a mask [H, W] over the text's band, as wide as the longer of both words."""
    top, bottom = sheet.band
    right = sheet.left + letters * (sheet.cell or 0)
    if sheet.cell is None:
        right = int(np.flatnonzero((before + after).any(axis=0))[-1]) + 1 + sheet.left
    mask = np.zeros((sheet.height, sheet.width), dtype=np.float32)
    mask[top:bottom, sheet.left if sheet.cell else 0 : right] = 1.0
    return mask


def _cover(file: Path, text: str, sheet: Sheet) -> np.ndarray:
    """Return where the ink of a text is, [H, W] in [0, 1]."""
    top, bottom = sheet.band
    picture = Image.new("L", (sheet.width, sheet.height))
    draw = ImageDraw.Draw(picture)
    room = sheet.width - 2 * sheet.left
    if sheet.cell is None:
        face = _face(file, bottom - top)
        if (needed := face.getlength(text)) > room:
            face = _face(file, max(1, int((bottom - top) * room / needed)))
        draw.text((sheet.left, _base(face, sheet)), text, font=face, fill=255, anchor="ls")
    else:
        face = _face(file, bottom - top)
        for place, letter in enumerate(text):
            glyph = _glyph(face, letter, sheet)
            middle = sheet.left + place * sheet.cell + (sheet.cell - glyph.width) // 2
            picture.paste(glyph, (middle, top))
    return np.asarray(picture, dtype=np.float32) / 255


def _glyph(face: ImageFont.FreeTypeFont, letter: str, sheet: Sheet) -> Image.Image:
    """Return a letter of the band's height, squeezed where it is wider than its cell."""
    top, bottom = sheet.band
    wide = Image.new("L", (4 * (bottom - top), bottom - top))
    at = (wide.width // 2, _base(face, sheet) - top)
    ImageDraw.Draw(wide).text(at, letter, font=face, fill=255, anchor="ms")
    left, _, right, _ = wide.getbbox() or (0, 0, 1, 0)
    glyph = wide.crop((left, 0, right, wide.height))
    room = (sheet.cell or 0) - 1
    size = (min(glyph.width, room), glyph.height)
    return glyph if glyph.width <= room else glyph.resize(size, Image.Resampling.LANCZOS)


@functools.cache
def _face(file: Path, height: int) -> ImageFont.FreeTypeFont:
    """Return a font at the size at which its lines are at most `height` px high."""
    ascent, descent = ImageFont.truetype(file, 100).getmetrics()
    return ImageFont.truetype(file, max(1, int(100 * height / (ascent + descent))))


def _base(face: ImageFont.FreeTypeFont, sheet: Sheet) -> int:
    """Return the row that the letters stand on: the line lies in the middle of the band."""
    top, bottom = sheet.band
    ascent, descent = face.getmetrics()
    return top + (bottom - top - ascent - descent) // 2 + ascent
