"""Where the letters of a text stand: a box for each, out of the frames in which it was read.

A recogniser tells where about the middle of a letter is, not how wide it is. Neighbours share what
lies between their middles as letters of their kind are wide: a W beside an I has most of it.
"""

from collections.abc import Sequence
from itertools import pairwise

from reward_server.scorers.ocr.ctc import Aligned
from reward_server.scorers.ocr.lines import Place
from reward_server.scorers.ocr.reading import Piece

# As wide as others, about, in the usual fonts: Helvetica's I is .28 em, its E .67, its W .94.
_WIDTHS = dict.fromkeys("ijlftr1.,:;'!|()[]{}-", 0.5) | dict.fromkeys("mw%@", 1.5)


def letter_boxes(
    letters: Sequence[Aligned],
    spelled: Sequence[str],
    lines: Sequence[tuple[Piece, bool]],
    starts: Sequence[int],
    place: Place,
) -> list[list[float]]:
    """Return left, top, right and bottom of each letter in px.

    spelled: the letters. lines: in order, which begin with the frames `starts` of the joined output
    that the letters were aligned with. A letter in none of them has all of the place.
    """
    whole = [float(side) for side in (place.left, place.top, place.right, place.bottom)]
    boxes = [whole] * len(letters)
    for (line, _), start in zip(lines, starts, strict=True):
        middles = [(one.first + one.end) / 2 - start for one in letters]
        here = [n for n, middle in enumerate(middles) if 0 <= middle <= len(line.probs)]
        at = [middles[n] * line.frame for n in here]
        widths = [_WIDTHS.get(spelled[n].lower(), 1.0) for n in here]
        inner = [
            one + (other - one) * width / (width + next_width)
            for (one, other), (width, next_width) in zip(
                pairwise(at), pairwise(widths), strict=True
            )
        ]
        # At the ends as far on one side of the middle as on the other.
        edges = [2 * at[0] - inner[0], *inner, 2 * at[-1] - inner[-1]] if inner else [0.0, 1.0]
        for n, (begin, end) in zip(here, pairwise(edges), strict=False):
            boxes[n] = line.part(begin, end)
    return boxes
