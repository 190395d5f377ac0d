"""How tall a run's cases are with their references on top: from the data, where it is there."""

import functools
from dataclasses import dataclass
from pathlib import Path

from calligrapher.data.canvas import Canvas
from calligrapher.data.dataset import load_cases
from calligrapher.tiny.pack import TINY
from tasks.params.run_params import RunParams


@dataclass(frozen=True)
class Shapes:
    """Heights in pixels of what the transformer sees.

    words: where they are from, as a plan's title says it; empty without references on top.
    """

    largest: int
    mean: float
    words: str = ""


def shapes(params: RunParams) -> Shapes:
    """Return the heights of the training cases; references that are not there count as square.

    Decodes each picture of the data once per process. Raises DataError for broken samples.
    """
    m = params.model
    if not m.reference_context:
        return Shapes(m.height, m.height)
    canvas = Canvas(m.width, m.height, reference_context=True)
    data = params.data
    if data.train == TINY or not Path(data.train.partition("#")[0]).exists():
        square = m.height + m.width
        return Shapes(square, square, " below a reference counted as square")
    return _of(data.train, data.kind, tuple(data.columns.items()), canvas)


@functools.lru_cache
def _of(train: str, kind: str, columns: tuple[tuple[str, str], ...], canvas: Canvas) -> Shapes:
    cases = load_cases(train, kind, Path("runs/data/pictures"), dict(columns))
    heights = [canvas.height_with(case) for case in cases]
    largest, mean = max(heights), sum(heights) / len(heights)
    least, most = (height - canvas.height for height in (min(heights), largest))
    tall = f"{most} tall"
    if least < most:
        tall = f"{least} to {most} tall ({mean - canvas.height:.0f} in the mean)"
    return Shapes(largest, mean, f" below references {tall}")
