"""Charts as inline SVG: lines with intervals, histograms. Colours are the page's own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tasks.reports.page.elements import Html, el

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 350, 12, 166


@dataclass(frozen=True)
class Curve:
    """A line: (step, value), and (step, low, high) of its intervals where there are any.

    colour: a number, that of the class `c0`, `c1`, ... of the page's styles.
    """

    name: str
    points: Points
    band: Sequence[tuple[float, float, float]] = field(default_factory=tuple)
    colour: int = 0


def line_chart(title: str, curves: Sequence[Curve], xlabel: str) -> Html | None:
    """Return a figure with all `curves`; None where none has a point."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    ys += [y for curve in curves for _, *ends in curve.band for y in ends]
    across, up = _Axis(min(xs), max(xs), _LEFT, _RIGHT), _Axis(*_range(ys), _BOTTOM, _TOP)
    drawn: list[Html] = []
    for tick in up.ticks(4):
        y = up(tick)
        drawn.append(el("line", x1=_LEFT, x2=_RIGHT, y1=_f(y), y2=_f(y), class_="grid"))
        drawn.append(el("text", f"{tick:g}", x=_LEFT - 6, y=_f(y + 3.5), text_anchor="end"))
    for tick in across.ticks(6, whole=True):
        drawn.append(
            el("text", f"{tick:g}", x=_f(across(tick)), y=_BOTTOM + 16, text_anchor="middle")
        )
    for curve in curves:
        if len(curve.band) > 1:
            edge = [(x, low) for x, low, _ in curve.band]
            edge += [(x, high) for x, _, high in reversed(curve.band)]
            drawn.append(
                el("polygon", points=_points(edge, across, up), class_=f"band c{curve.colour}")
            )
    for curve in curves:
        colour = f"c{curve.colour}"
        drawn.append(
            el("polyline", points=_points(curve.points, across, up), class_=f"curve {colour}")
        )
        if len(curve.points) <= 60:
            ends = {x: (low, high) for x, low, high in curve.band}
            for x, y in curve.points:
                interval = f" [{ends[x][0]:.3f}, {ends[x][1]:.3f}]" if x in ends else ""
                told = el("title", f"{curve.name}, {xlabel} {x:g}: {y:.4g}{interval}")
                drawn.append(el("g", Html(_dot(across(x), up(y))), told, class_=f"dot {colour}"))
    image = el(
        "svg",
        *drawn,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title}, {xlabel}",
    )
    legend = [el("span", f"{c.name} {_ends(c.points)}", class_=f"key c{c.colour}") for c in curves]
    caption = el("figcaption", el("b", title), " by ", xlabel, el("br"), *legend)
    return el("figure", caption, image, class_="chart")


def histogram(title: str, values: Sequence[float], low: float, high: float, bins: int = 20) -> Html:
    """Return a small figure: how many of `values` lie where between `low` and `high`."""
    counts, _ = np.histogram(values, bins, (low, high))
    most = max(int(counts.max(initial=0)), 1)
    width, height, floor = 180, 84, 68
    step = (width - 8) / bins
    drawn = [
        el(
            "rect",
            x=_f(4 + i * step + 0.5),
            y=_f(floor - count / most * 60),
            width=_f(step - 1),
            height=_f(count / most * 60),
            class_="bar",
        )
        for i, count in enumerate(counts)
        if count
    ]
    drawn.append(el("line", x1=4, x2=width - 4, y1=floor, y2=floor, class_="grid"))
    drawn.append(el("text", f"{low:g}", x=4, y=height - 4))
    drawn.append(el("text", f"{high:g}", x=width - 4, y=height - 4, text_anchor="end"))
    mean = f"mean {np.mean(values):.3f}, {len(values)} images" if values else "no image was scored"
    if values:
        x = 4 + (float(np.mean(values)) - low) / ((high - low) or 1) * (width - 8)
        drawn.append(el("line", x1=_f(x), x2=_f(x), y1=2, y2=floor, class_="mean"))
    image = el("svg", *drawn, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)
    return el("figure", image, el("figcaption", el("b", title), el("br"), mean), class_="small")


class _Axis:
    """Maps values from `low` to `high` to pixels from `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = (low, high) if high > low else (low - 0.5, high + 0.5)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int, *, whole: bool = False) -> list[float]:
        """Return round values on the axis, about `most` of them."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
        step = max(step, 1.0) if whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low >= 0 and high <= 1 and high > 0.2:
        return 0.0, 1.0
    room = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def _points(points: Points, across: _Axis, up: _Axis) -> str:
    return " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)


def _dot(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'


def _ends(points: Points) -> str:
    if len(points) == 1:
        return f"{points[0][1]:.4g}"
    return f"{points[0][1]:.4g} → {points[-1][1]:.4g}"


def _f(value: float) -> str:
    return f"{value:.1f}"
