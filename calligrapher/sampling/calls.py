"""Which rows each call of the transformer moves on, and by which of their steps.

A call is a list of (rows, step): rows that are one and the same so far are walked as one. Legend:
B rows, S sampling steps, W window steps.
"""

from collections.abc import Sequence

Call = list[tuple[list[int], int]]


def abreast(rows: int, num_steps: int) -> list[Call]:
    """Return S calls of all B rows, each row walked by itself."""
    return [[([b], i) for b in range(rows)] for i in range(num_steps)]


def from_trunks(
    starts_from: Sequence[int], window_starts: Sequence[int], width: int, num_steps: int
) -> list[Call]:
    """Return calls that walk rows with one seed in `starts_from` as one, into their window.

    First the trunks; then the windows abreast, whose first step still sees one image of each trunk
    and leaves as many as it has rows; then what is left of each row. A window's j-th step is one
    call whatever the noise levels, as it is in the update: batches of equal size give both the same
    bits. Where windows start at different steps there are more calls than S, of fewer rows.
    """
    trunks: dict[tuple[int, int], list[int]] = {}
    for b, key in enumerate(zip(starts_from, window_starts, strict=True)):
        trunks.setdefault(key, []).append(b)
    before = [
        [(rows, i) for (_, start), rows in trunks.items() if i < start]
        for i in range(max(window_starts))
    ]
    fork = [(rows, start) for (_, start), rows in trunks.items()]
    inside = [[([b], start + j) for b, start in enumerate(window_starts)] for j in range(1, width)]
    after = [
        [([b], i) for b, start in enumerate(window_starts) if start + width <= i]
        for i in range(min(window_starts) + width, num_steps)
    ]
    return [*before, fork, *inside, *after]
