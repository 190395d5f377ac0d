"""The contact sheet of a dataset: a row per case with what there is and what the model sees."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from calligrapher.data.canvas import Canvas, prepare
from calligrapher.data.case import Case
from calligrapher.data.dataset import ListedSample
from calligrapher.data.images import load_mask, load_rgb, to_image
from calligrapher.durable import atomic_path
from tasks.data.check import CheckedDataset, mask_share
from tasks.pictures.sheets import (
    BAD,
    GAP,
    MARGIN,
    MUTED,
    PAPER,
    SMALL,
    TEXT,
    TITLE,
    Line,
    Span,
    cell,
    stacked,
    write,
)

ROWS = 12  # cases on a page
_COLUMNS = (264, 264, 136, 264)  # px; the pictures of a row are at most this wide, and _HEIGHT high
_HEIGHT = 264
_WIDTH = sum(_COLUMNS) + 3 * GAP
_OUTLINE, _ALARM = "#ff2d9b", "#fde8e4"


def write_sheets(checked: CheckedDataset, path: Path, limit: int) -> list[Path]:
    """Draw at most `limit` samples, broken ones first, on pages `sheet.png`, `sheet-2.png`, ..."""
    chosen = sorted(checked.samples, key=lambda sample: not sample.problems)[:limit]
    starts = range(0, len(chosen), ROWS)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = []
    for number, start in enumerate(starts, start=1):
        files.append(path if number == 1 else path.with_stem(f"{path.stem}-{number}"))
        sheet = page(checked, chosen[start : start + ROWS], f"page {number} of {len(starts)}")
        with atomic_path(files[-1]) as temporary:
            sheet.save(temporary, format="PNG")
    return files


def page(checked: CheckedDataset, samples: Sequence[ListedSample], label: str) -> Image.Image:
    """One page: a title, then the samples."""
    canvas = checked.demands.canvas
    heads = (
        "source, mask outlined",
        "mask",
        "style reference",
        "what the model sees, grey = paint",
    )
    head = _row([(None, [_note(text)]) for text in heads])
    title = Image.new("RGB", (_WIDTH, TITLE + 10), PAPER)
    write(ImageDraw.Draw(title), (0, TITLE), [Span(_short(checked.title), bold=True, size=TEXT)])
    context = ", reference context on top" if canvas.reference_context else ""
    note = cell(None, [_note(f"{label}, canvas {canvas.width}x{canvas.height}{context}")], _WIDTH)
    rows = [
        broken_row(s) if s.problems or s.case is None else case_row(s.case, canvas) for s in samples
    ]
    return stacked([[row] for row in (title, note, head, *rows)])


def case_row(case: Case, canvas: Canvas) -> Image.Image:
    """Return source with outlined mask, mask, reference, and the model's masked input."""
    source, mask, reference = load_rgb(case.source), load_mask(case.mask), load_rgb(case.reference)
    prepared = prepare(case, canvas)
    seen = to_image(prepared.image * (1 - prepared.mask))
    text = [Span("write  ", MUTED, size=SMALL), Span(case.text, bold=True)]
    return _row(
        [
            (outlined(source, mask), [(text, []), _note(case.case_id)]),
            (mask, [_note(f"paints {mask_share(mask):.0%} of {_size(source)}")]),
            (prepared.style_image, [_note(f"of {_size(reference)}")]),
            (seen, [_note(_size(seen))]),
        ]
    )


def broken_row(sample: ListedSample) -> Image.Image:
    """A red cell with the place and the reasons."""
    reasons = [line for problem in sample.problems for line in textwrap.wrap(f"- {problem}", 124)]
    step = SMALL + 7
    row = Image.new("RGB", (_WIDTH, TEXT + 24 + step * len(reasons)), _ALARM)
    draw = ImageDraw.Draw(row)
    draw.rectangle((0, 0, 5, row.height), fill=BAD)
    write(draw, (MARGIN, TEXT + 8), [Span(sample.place, BAD, bold=True)])
    for number, reason in enumerate(reasons, start=1):
        write(draw, (MARGIN, TEXT + 8 + step * number), [Span(reason, size=SMALL)])
    return row


def outlined(source: Image.Image, mask: Image.Image) -> Image.Image:
    """The source as a cell shows it, a line of 2 px around what will be painted."""
    picture = _fitted(source, _COLUMNS[0])
    painted = mask.resize(picture.size, Image.Resampling.NEAREST)
    inner, outer = (
        painted.filter(ImageFilter.MinFilter(3)),
        painted.filter(ImageFilter.MaxFilter(3)),
    )
    picture.paste(_OUTLINE, mask=ImageChops.subtract(outer, inner))
    return picture


def _row(cells: Sequence[tuple[Image.Image | None, Sequence[Line]]]) -> Image.Image:
    """Pictures with their lines below, each in its column."""
    drawn = [
        cell(picture and _fitted(picture, width), lines, width)
        for (picture, lines), width in zip(cells, _COLUMNS, strict=True)
    ]
    row = Image.new("RGB", (_WIDTH, max(c.height for c in drawn)), PAPER)
    left = 0
    for picture, width in zip(drawn, _COLUMNS, strict=True):
        row.paste(picture, (left, 0))
        left += width + GAP
    return row


def _fitted(image: Image.Image, width: int) -> Image.Image:
    """As large as a column takes it, with its frame."""
    scale = min((width - 2) / image.width, _HEIGHT / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _note(text: str) -> Line:
    return [Span(text, MUTED, size=SMALL)], []


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _short(text: str) -> str:
    """The end of a title that is too long: its counts stand there."""
    return text if len(text) <= 92 else f"…{text[-91:]}"
