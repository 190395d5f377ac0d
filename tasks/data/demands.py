"""What a run asks of its cases beyond pictures that can be read.

Known before a model is loaded, and asked of all cases at once: by `data check`, and by the checks
before a run.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from calligrapher.data.canvas import Canvas, mask_on_canvas
from calligrapher.data.case import Case
from calligrapher.errors import DataError

MAX_TEXT = 256  # characters that a reward server takes
WITHOUT_TARGETS = (
    "Warm-up learns targets, RL needs none. Give each case its target, or set warmup.steps to 0."
    " Only where a source shows the text of its case already is the source what should come out:"
    " then set data.reconstruct to true."
)


@dataclass(frozen=True)
class Demands:
    """What is done with the cases."""

    canvas: Canvas
    warmup: bool = False  # they are learned from: each needs a target
    scored: bool = True  # reward servers read them: no text may be longer than they take


def unmet(case: Case, demands: Demands) -> Iterator[str]:
    """Yield what keeps one sound case from being used."""
    try:
        mask_on_canvas(case, demands.canvas)
    except DataError as error:
        yield str(error)
    if demands.scored and len(case.text) > MAX_TEXT:
        yield (
            f"text must have at most {MAX_TEXT} characters, what a reward server takes. Found"
            f" {len(case.text)}: {case.text[:40]!r}..."
        )
    if demands.warmup and case.target is None:
        yield f"{case.source} must have a target, the picture that should come out. Found none."


def advice(cases: Iterable[Case], demands: Demands) -> list[str]:
    """Return what to do, said once, about demands that many cases fail in the same way."""
    if demands.warmup and any(case.target is None for case in cases):
        return [WITHOUT_TARGETS]
    return []


def heights_on(canvas: Canvas, cases: Sequence[Case]) -> str | None:
    """Return what references on top make of the canvas, in words; None where they do not."""
    if not canvas.reference_context or not cases:
        return None
    heights = sorted(canvas.height_with(case) for case in cases)
    if heights[0] == heights[-1]:
        return f"canvas and reference on top: {canvas.width}x{heights[0]}"
    return (
        f"canvas and reference on top: {canvas.width} wide, {len(set(heights))} heights from"
        f" {heights[0]} to {heights[-1]} (median {statistics.median(heights):.0f}); a batch has one"
    )


def require(cases: Sequence[Case], demands: Demands) -> None:
    """Raise one DataError that names every case that does not meet the demands, and why."""
    problems = [f"{case.case_id}: {problem}" for case in cases for problem in unmet(case, demands)]
    if problems:
        lines = [f"- {problem}" for problem in problems] + advice(cases, demands)
        raise DataError(f"{len(problems)} problem(s):\n" + "\n".join(lines))
