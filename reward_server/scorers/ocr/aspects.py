"""What a recogniser does not mind and a person does: aspects of the lines found, each in 0..1.

1 = as it should be, 0 = no person would accept it; linear between two values that were read off
labelled pictures (docs/reward-server.md). Lines weigh by their area.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import cv2
import numpy as np

from reward_server.scorers.ocr.ink import crossed, gaps, ink_of
from reward_server.scorers.ocr.lines import Line, Place, longest_run, sides

# Each pair: where an aspect is 0 and where it is 1.
_VISIBILITY = (2.0, 7.0)  # CIELAB distance between ink and ground; 2 of 255 grey levels are 0.8
_SIZE = (0.1, 0.3)  # of the mask's width or height, whichever the text fills more
_BLUR = (0.30, 0.12)  # width of an edge as a share of the line's height
_STRIKE = (0.75, 0.45)  # longest level stroke in the middle as a share of the text's width
_CROSSED = (0.3, 0.1)  # holes for each letter that its own do not explain, in letters joined by one
_GAPS = (4, 2)  # rows without ink between rows that have some, each run of them counted once
_STRIKE_BAND = (0.25, 0.8)  # of the line's height, from the top
_LONG = 1.5  # times its height: how wide a text is at least in which a level stroke strikes it out
_BEST_TURNED = (0.8, 0.95)  # confidence of the turned line ...
_BY = (0.05, 0.15)  # ... and how much higher it is
SURE = 0.95  # a line read with this confidence is upright
UNREAD = 0.5  # text of which one of `GATES` is below this says nothing
GATES = ("visibility", "upright", "unstruck", "size")


@dataclass(frozen=True)
class Aspects:
    """Of the text found on one picture: 0 where none was found, None where it is not defined."""

    visibility: float | None = None  # ink and ground can be told apart
    upright: float | None = None  # it is not read better turned by 180 degrees
    unstruck: float | None = None  # no stroke runs through its whole width, no rows are missing
    sharpness: float | None = None  # edges are narrow for the letters' size
    inside: float | None = None  # share of the lines' length within the mask
    size: float | None = None  # large enough for the mask

    @classmethod
    def of_nothing(cls, *, masked: bool) -> "Aspects":
        """Return the aspects of a picture without text."""
        place = 0.0 if masked else None
        return cls(0.0, 0.0, 0.0, 0.0, inside=place, size=place)

    @property
    def clarity(self) -> float:
        """The lowest of visibility, unstruck and size: by how much the likelihood is lessened.

        Upside-down text is unlikely as it stands.
        """
        return min(
            1.0 if one is None else one for one in (self.visibility, self.unstruck, self.size)
        )

    def legible(self) -> bool:
        """Whether a person would take it for text: none of `GATES` is low."""
        return all((value := getattr(self, gate)) is None or value >= UNREAD for gate in GATES)


NAMES = tuple(field.name for field in fields(Aspects))


@dataclass(frozen=True)
class Seen:
    """One line as it was read."""

    line: Line
    text: str  # what was read on it; "" = not told
    pixels: np.ndarray  # uint8 [h, w, 3], upright
    confidence: float
    turned: float | None  # confidence when turned by 180 degrees; None = not asked, upright


def aspects_of(lines: Sequence[Seen], place: Place, *, masked: bool) -> Aspects:
    """Return the aspects of all text found in a place; there must be some."""
    shares = np.ones(1)
    if len(lines) > 1:
        areas = np.array([max(np.prod(sides(seen.line.boxes[0])), 1.0) for seen in lines])
        shares = areas / areas.sum()
    looks = np.array([look(seen.pixels, seen.text) for seen in lines])
    visibility, sharpness, unstruck = map(float, shares @ looks)
    upright = float(shares @ [_upright(seen) for seen in lines])
    inside = float(shares @ [seen.line.inside for seen in lines])
    return Aspects(
        visibility=visibility,
        upright=upright,
        unstruck=unstruck,
        sharpness=sharpness,
        inside=min(inside, 1.0) if masked else None,
        size=_size([seen.line for seen in lines], place) if masked else None,
    )


def look(pixels: np.ndarray, text: str = "") -> tuple[float, float, float]:
    """(visibility, sharpness, unstruck) of an upright line uint8 [h, w, 3] read as `text`."""
    ink, shade = ink_of(pixels)
    if not ink.any() or ink.all():
        return 0.0, 0.0, 1.0
    contrast = abs(float(shade[ink].mean() - shade[~ink].mean()))
    slope = np.hypot(
        cv2.Sobel(shade, cv2.CV_32F, 1, 0, scale=1 / 8),
        cv2.Sobel(shade, cv2.CV_32F, 0, 1, scale=1 / 8),
    )
    # An edge is 1 to 2 px wide however sharp the picture is.
    steep = int(0.97 * slope.size)
    steepest = float(np.partition(slope, steep, axis=None)[steep])
    edge = max(contrast / max(steepest, 1e-6) - 2, 0) / len(ink)
    unstruck = min(
        _rise(_strike(ink), _STRIKE),
        _rise(crossed(ink, text), _CROSSED),
        _rise(gaps(ink), _GAPS),
    )
    return _rise(contrast, _VISIBILITY), _rise(edge, _BLUR), unstruck


def _strike(ink: np.ndarray) -> float:
    """Longest level stroke in the middle rows as a share of the width of the ink [h, w]."""
    height = len(ink)
    columns = np.flatnonzero(ink.any(axis=0))
    span = columns[-1] - columns[0] + 1
    if span < _LONG * height:
        return 0.0
    band = ink[int(_STRIKE_BAND[0] * height) : int(_STRIKE_BAND[1] * height)].astype(np.uint8)
    reach = np.ones((int(0.04 * height) | 1, int(0.03 * height) | 1), dtype=np.uint8)
    rows = cv2.dilate(band, reach).astype(bool)
    long = rows[rows.sum(axis=1) >= _STRIKE[1] * span]  # no other row has so long a stroke
    return max((longest_run(row) for row in long), default=0) / span


def _upright(seen: Seen) -> float:
    if seen.turned is None:
        return 1.0
    better = _rise(seen.turned - seen.confidence, _BY) * _rise(seen.turned, _BEST_TURNED)
    return 1.0 - better


def _size(lines: Sequence[Line], place: Place) -> float:
    """How much of the mask's box the largest line fills, along or across it."""
    corners = [line.boxes[0] for line in lines]
    spans = [np.ptp(box, axis=0) / (place.width, place.height) for box in corners]
    return _rise(float(max(span.max() for span in spans)), _SIZE)


def _rise(value: float, ends: tuple[float, float]) -> float:
    """0 at the first of `ends`, 1 at the second, linear between them."""
    return float(min(max((value - ends[0]) / (ends[1] - ends[0]), 0.0), 1.0))
