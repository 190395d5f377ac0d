"""Drawing sheets of captioned pictures with Pillow: fonts, colours, cells and their arrangement."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from tasks.pictures.fonts import pieces

PAPER, INK, MUTED, LINE = "#ffffff", "#1f2430", "#6b7280", "#d7dbe2"
GOOD, BAD, ACCENT = "#15803d", "#c2410c", "#2563eb"
GAP, MARGIN = 14, 18
TEXT, SMALL, TITLE = 16, 13, 20
_SIDE = 320  # a cell's picture is at most this wide and high


@dataclass(frozen=True)
class Span:
    """A piece of a caption."""

    text: str
    colour: str = INK
    bold: bool = False
    size: int = TEXT


Line = tuple[Sequence[Span], Sequence[Span]]  # left-aligned, right-aligned


def width_of(spans: Sequence[Span]) -> int:
    """The width of a piece of a line in pixels."""
    parts = (part for span in spans for part in pieces(span.text, span.size, span.bold))
    return math.ceil(sum(face.getlength(text) for text, face in parts))


def fitted(spans: Sequence[Span], room: int) -> list[Span]:
    """The spans, the last ones shortened with an ellipsis until all fit into `room` pixels."""
    kept = list(spans)
    while kept and width_of(kept) > room:
        last = kept[-1]
        text = last.text.removesuffix("…")
        kept[-1:] = (
            [Span(text[:-1] + "…", last.colour, last.bold, last.size)] if len(text) > 1 else []
        )
    return kept


def shown(image: Image.Image, side: int = _SIDE) -> Image.Image:
    """Return a picture as large as a cell takes it; a tiny one is enlarged by a whole factor."""
    image = image.convert("RGB")
    factor = side // max(image.size)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def cell(image: Image.Image | None, lines: Sequence[Line], width: int) -> Image.Image:
    """A picture with a thin frame over its lines of text, `width` pixels wide."""
    height = 0 if image is None else image.height + 2
    size = TEXT + 7
    drawn = Image.new("RGB", (width, height + size * len(lines)), PAPER)
    draw = ImageDraw.Draw(drawn)
    if image is not None:
        left = (width - image.width - 2) // 2
        draw.rectangle((left, 0, left + image.width + 1, image.height + 1), outline=LINE)
        drawn.paste(image, (left + 1, 1))
    for i, (left_spans, right_spans) in enumerate(lines):
        base = height + i * size + TEXT + 2
        right = width_of(right_spans)
        write(draw, (0, base), fitted(left_spans, width - right - (6 if right else 0)))
        write(draw, (width - right, base), right_spans)
    return drawn


def write(draw: ImageDraw.ImageDraw, at: tuple[int, int], spans: Sequence[Span]) -> None:
    """Write spans from `at` on: x of the first letter, y of the line the letters stand on."""
    x = float(at[0])
    for span in spans:
        for text, face in pieces(span.text, span.size, span.bold):
            draw.text((x, at[1]), text, fill=span.colour, font=face, anchor="ls")
            x += face.getlength(text)


def stacked(rows: Sequence[Sequence[Image.Image]], gap: int = GAP) -> Image.Image:
    """Rows of cells on one sheet, each column as wide as its widest cell; short rows end early."""
    columns = max((len(row) for row in rows), default=0)
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(columns)]
    heights = [max((c.height for c in row), default=0) for row in rows]
    width = sum(widths) + gap * max(columns - 1, 0) + 2 * MARGIN
    height = sum(heights) + gap * max(len(rows) - 1, 0) + 2 * MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    y = MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        x = MARGIN
        for item, column_width in zip(row, widths, strict=False):
            sheet.paste(item, (x, y))
            x += column_width + gap
        y += row_height + gap
    return sheet
