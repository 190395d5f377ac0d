"""The pictures of a run: captioned grids, the histogram of rewards, the learning curve."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from reward_server.text import normalise
from tasks.pictures.fonts import font
from tasks.pictures.sheets import (
    ACCENT,
    BAD,
    GOOD,
    INK,
    LINE,
    MARGIN,
    MUTED,
    PAPER,
    SMALL,
    TEXT,
    TITLE,
    Line,
    Span,
    cell,
    shown,
    stacked,
    width_of,
    write,
)

_COLOURS = (ACCENT, "#d97706", "#7c3aed", "#0f766e", "#be123c")


Series = Mapping[str, Sequence[tuple[float, float]]]  # name of a line -> (step, value)


@dataclass(frozen=True)
class CaptionedImage:
    """One image, the text it should show, what was read (None: unread), its reward (or None).

    ocr_accuracy, style: both in [0, 1], None where not measured.
    """

    image: Image.Image
    text: str
    read: str | None
    reward: float | None
    ocr_accuracy: float | None = None
    style: float | None = None

    def lines(self) -> list[Line]:
        """Two lines: the target, and below it what was read, with the reward at the right."""
        reward = reward_label(self.reward)
        return [
            ([Span(self.text, bold=True)], []),
            ([Span("read  ", MUTED, size=SMALL), *self.reading()], [Span(reward, MUTED)]),
        ]

    def figures(self) -> str:
        """How well it was spelled and kept the style, or its reward where neither was measured."""
        measured = {"OCR": self.ocr_accuracy, "style": self.style}
        figures = [f"{name} {value:.2f}" for name, value in measured.items() if value is not None]
        return "  ".join(figures) or reward_label(self.reward)

    def reading(self) -> list[Span]:
        """What was read: green where it is the target, else red."""
        if self.read is None:
            return [Span("not read", MUTED)]
        same = normalise(self.read) == normalise(self.text)  # as the reward compares them
        return [Span(self.read or "(nothing)", GOOD if same else BAD)]


def reward_label(reward: float | None) -> str:
    """Return the reward as a caption says it: no accuracy, its scale is the sum of its weights."""
    return "unscored" if reward is None else f"reward {reward:.2f}"


def open_picture(path: str | Path) -> Image.Image:
    """Read a picture of a report."""
    with Image.open(path) as image:
        return image.convert("RGB")


def image_grid(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int = 4
) -> Image.Image:
    """Captioned pictures, row by row, `columns` in each. Too long captions are shortened."""
    pictures = [shown(image) for image in images]
    width = max((picture.width + 2 for picture in pictures), default=0)
    cells = [
        cell(picture, [([Span(caption)], [])], width)
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    return stacked([cells[i : i + columns] for i in range(0, len(cells), columns)])


def best_and_worst(best: Sequence[CaptionedImage], worst: Sequence[CaptionedImage]) -> Image.Image:
    """Return the samples with the highest rewards over those with the lowest, best first."""
    width = max((shown(s.image).width + 2 for s in (*best, *worst)), default=240)
    rows: list[list[Image.Image]] = []
    for title, samples in (("Highest rewards", best), ("Lowest rewards", worst)):
        rows.append([_heading(title, width)])
        rows.append([cell(shown(s.image), s.lines(), width) for s in samples])
    return stacked(rows)


def before_after(
    references: Sequence[Image.Image],
    sources: Sequence[Image.Image],
    targets: Sequence[Image.Image | None],
    before: Sequence[CaptionedImage],
    after: Sequence[CaptionedImage],
) -> Image.Image:
    """Return a row per case: reference, source, target where the cases have one, and both outputs
    with what was read and how they score in spelling and style."""
    side = 288
    width = max(shown(sample.image, side).width + 2 for sample in before)

    def plain(image: Image.Image | None, lines: Sequence[Line] = ()) -> Image.Image:
        return cell(None if image is None else shown(image, width - 2), lines, width)

    def painted(sample: CaptionedImage) -> Image.Image:
        read = [Span("read  ", MUTED, size=SMALL), *sample.reading()]
        return plain(sample.image, [(read, [Span(sample.figures(), MUTED, size=SMALL)])])

    titles = ["Style reference", "Source", "Target", "Before training", "After training"]
    columns: list[list[Image.Image]] = [
        [plain(image) for image in references],
        [
            plain(image, [([Span("write  ", MUTED, size=SMALL), Span(one.text, bold=True)], [])])
            for image, one in zip(sources, before, strict=True)
        ],
        [plain(image) for image in targets],
        [painted(sample) for sample in before],
        [painted(sample) for sample in after],
    ]
    if not any(targets):
        del titles[2], columns[2]
    headings = [_heading(title, width) for title in titles]
    return stacked([headings, *zip(*columns, strict=True)])


def score_histogram(
    rewards: Sequence[float], *, bins: int = 20, title: str = "Rewards"
) -> Image.Image:
    """Draw how many images got which reward; the axis is 0 to 1 while all rewards are."""
    sheet = Image.new("RGB", (720, 400), PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, 36), [Span(title, bold=True, size=TITLE)])
    left, top, right, bottom = 60, 64, 696, 350
    if not rewards:
        write(draw, (left, (top + bottom) // 2), [Span("No image was scored.", MUTED)])
        return sheet
    values = np.asarray(rewards, dtype=np.float64)
    low, high = min(0.0, float(values.min())), max(1.0, float(values.max()))
    counts, edges = np.histogram(values, bins, (low, high))
    step = _nice_step(int(counts.max()) / 4, whole=True)
    ceiling = max(step * math.ceil(int(counts.max()) / step), 1)

    def place(value: float, count: float) -> tuple[float, float]:
        x = left + (value - low) / (high - low) * (right - left)
        return x, bottom - count / ceiling * (bottom - top)

    for count in range(0, int(ceiling) + 1, int(step)):
        y = place(low, count)[1]
        draw.line((left, y, right, y), fill=LINE if count else MUTED)
        draw.text((left - 8, y), str(count), fill=MUTED, font=font(SMALL), anchor="rm")
    for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            x, y = place(start, count)
            draw.rectangle((x + 1, min(y, bottom - 1), place(end, 0)[0] - 2, bottom - 1), ACCENT)
    tick = _nice_step((high - low) / 6)
    for i in range(math.ceil(low / tick), math.floor(high / tick) + 1):
        x = place(i * tick, 0)[0]
        draw.text((x, bottom + 8), f"{i * tick:g}", fill=MUTED, font=font(SMALL), anchor="mt")
    mean = float(values.mean())
    x = place(mean, 0)[0]
    draw.line((x, top - 6, x, bottom), fill=INK, width=2)
    summary = [Span(f"{len(values)} images   mean ", MUTED), Span(f"{mean:.3f}", bold=True)]
    write(draw, (right - width_of(summary), 36), summary)
    return sheet


def learning_curve(
    series: Series,
    *,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    below: Series | None = None,
    title: str | None = None,
    xlabel: str = "round",
) -> Image.Image:
    """Draw lines of (step, value) with their first and last values; several also get names.

    bands: per line (step, low, high), drawn as a pale area: intervals. below: further lines in a
    panel of their own, whose scale is another one. Only steps with a value of `series` have a tick.
    The y axis is 0 to 1 where all values are.
    """
    figure = Figure(figsize=(8, 6 if below else 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    if below:
        axes, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
        _draw_lines(lower, below, {}, _COLOURS[1:])
        lower.set_title(" and ".join(below), loc="left", color=MUTED, fontsize=10)
    else:
        axes = lower = figure.add_subplot()
    _draw_lines(axes, series, bands or {}, _COLOURS)
    steps = sorted({step for points in series.values() for step, _ in points})
    lower.set_xticks(thinned(steps))
    lower.set_xlabel(xlabel, color=MUTED)
    heading = title or (next(iter(series)) if len(series) == 1 else "Learning curve")
    axes.set_title(heading, loc="left", color=INK, fontweight="bold", fontsize=13, pad=14)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def thinned(steps: Sequence[float], most: int = 12) -> list[float]:
    """Return at most `most` of the sorted steps, evenly chosen; the first and the last stay."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _draw_lines(axes: Any, series: Series, bands: Mapping, colours: Sequence[str]) -> None:
    for (name, points), colour in zip(series.items(), itertools.cycle(colours), strict=False):
        if bands.get(name):
            steps, low, high = zip(*bands[name], strict=True)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=2.2, marker="o", markersize=4)
        end = f"{points[-1][1]:.2f}" + (f"  {name}" if len(series) > 1 else "")
        label: dict[str, Any] = {
            "textcoords": "offset points",
            "color": colour,
            "fontweight": "bold",
        }
        axes.annotate(
            end, points[-1], (9, 0), ha="left", va="center", annotation_clip=False, **label
        )
        if len(points) > 1:
            axes.annotate(f"{points[0][1]:.2f}", points[0], (2, -16), ha="left", **label)
    values = [value for points in series.values() for _, value in points]
    if values and min(values) >= 0 and max(values) <= 1:
        axes.set_ylim(0, 1.03)
    else:
        axes.margins(y=0.25)  # room for the first value below its point
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, length=0)


def _heading(text: str, width: int) -> Image.Image:
    return cell(None, [([Span(text, bold=True, size=TEXT)], [])], width)


def _nice_step(rough: float, *, whole: bool = False) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `rough`."""
    if whole and rough <= 1:
        return 1
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough - 1e-12)
    return round(step) if whole else step
