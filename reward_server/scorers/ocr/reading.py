"""Reads pictures: finds lines, turns them upright, recognises them, puts them in order.

A line is looked for around the mask (`lines.region_around`) and kept where it lies in the mask
itself. One level line that fills a rectangular mask is read as the mask's box shows it. A line that
may run up, down or be a column of letters is read in each way; the surest reading counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from reward_server.scorers.ocr.aspects import SURE, Aspects, Seen, aspects_of
from reward_server.scorers.ocr.lines import (
    Line,
    Place,
    fits,
    lines_in,
    plain_line,
    region_around,
    whole_place,
)
from reward_server.scorers.ocr.models import Detector, Recogniser, padded_width, rows_of
from reward_server.scorers.ocr.weights import LINE_HEIGHT
from reward_server.text import picture_order


@dataclass(frozen=True)
class Picture:
    """What is to be read.

    masked: text was to be painted in one place (`mask`, all of the picture when it is None), so
    something is read there even where no line is found. search: lines are looked for; else the
    picture is one line. corner: left and top of it in the whole picture that it was cut out of.
    """

    rgb: np.ndarray  # uint8 [H, W, 3]
    mask: np.ndarray | None = None  # bool [H, W]
    masked: bool = False
    search: bool = False
    corner: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Piece:
    """A line in the way in which it was surest."""

    text: str
    confidence: float
    probs: np.ndarray  # [T frames, C classes]
    box: np.ndarray
    pixels: np.ndarray
    ways: int
    turned: float | None = None
    column: bool = False  # its letters stand below each other, and side by side in `pixels`

    @property
    def frame(self) -> float:
        """What a frame shows of the line's length, as a share; what it was padded by lies after."""
        high, wide = self.pixels.shape[:2]
        # In px of the line; one that is squeezed fills its frames.
        padded = max(padded_width(wide, high) * high / LINE_HEIGHT, wide)
        return padded / wide / len(self.probs)

    def part(self, begin: float, end: float) -> list[float]:
        """Left, top, right and bottom in px of what lies between two shares of its length."""
        here, right, across, below = self.box
        if self.column:
            right, below = below, right
        shares = np.clip([begin, end], 0.0, 1.0)[:, None]
        corners = [here + shares * (right - here), below + shares * (across - below)]
        corners = np.concatenate(corners)
        return [*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()]


@dataclass(frozen=True)
class Reading:
    """What was read on one picture; illegible text (`Aspects.legible`) counts as none."""

    text: str  # rows joined by a space
    # Mean over the lines of the mean over their characters; 0 when nothing was read.
    confidence: float
    # The lines in order, and whether a space goes before each
    pieces: list[tuple["Piece", bool]]
    rows: int
    aspects: Aspects | None  # None: no lines were looked for
    any_text: bool  # a text was read, legible or not
    place: Place  # where text was to be painted
    boxes: list[np.ndarray] = field(default_factory=list)  # of the lines, [4 corners, 2 px]


@dataclass(frozen=True)
class _Page:
    """A picture's lines: those found, and those read (one: the place, where a line fills it)."""

    picture: Picture
    place: Place
    found: list[Line]
    read: list[Line]


class Reader:
    """Reads batches of pictures; a reading depends on its own picture alone.

    always_find: lines are read as found even where one of them fills its mask.
    """

    def __init__(
        self, recogniser: Recogniser, detector: Detector | None, *, always_find: bool = False
    ):
        self._recogniser, self._detector = recogniser, detector
        self._always_find = always_find

    def read(self, pictures: Sequence[Picture]) -> list[Reading]:
        """Return a reading per picture, in order."""
        pages = [self._page(picture) for picture in pictures]
        pieces = self._recognise([page.read for page in pages])
        pieces = self._turn(pages, pieces)
        return [_reading(page, found) for page, found in zip(pages, pieces, strict=True)]

    def _page(self, picture: Picture) -> _Page:
        place = Place.of(picture.rgb, picture.mask)
        if not picture.search:
            line = Line((picture.rgb,), (place.box(),), 1.0)
            return _Page(picture, place, [line], [line])
        assert self._detector is not None, "looking for lines needs mode scene or auto"
        plain = plain_line(picture.rgb, place) if picture.masked and not self._always_find else None
        if plain is not None:
            return _Page(picture, place, [plain], [whole_place(picture.rgb, place)])
        region = region_around(picture.rgb, place)
        boxes = [region.to_picture(box) for box in self._detector.boxes(region.pixels)]
        lines = lines_in(picture.rgb, boxes, place)
        if not picture.masked:
            return _Page(picture, place, lines, lines)
        whole = [whole_place(picture.rgb, place)]
        if not lines:
            return _Page(picture, place, whole, whole)
        rows = len(rows_of([line.boxes[0] for line in lines]))
        if not all(line.whole for line in lines):
            lines = [line for line in lines if line.whole]
            return _Page(picture, place, lines, lines)
        if not self._always_find and fits(lines, rows, place):
            return _Page(picture, place, lines, whole)
        return _Page(picture, place, lines, lines)

    def _recognise(self, pages: Sequence[Sequence[Line]]) -> list[list[Piece]]:
        """Read each line in each of its ways; the surest counts."""
        asked = [way for lines in pages for line in lines for way in line.ways]
        outputs = iter(self._recogniser.probs(asked))

        def best(line: Line) -> Piece:
            ways = []
            for number, (pixels, box) in enumerate(zip(line.ways, line.boxes, strict=True), 1):
                probs = next(outputs)
                text, confidence = self._recogniser.decode(probs)
                count = len(line.ways)
                column = line.column and number == count
                ways.append(Piece(text, confidence, probs, box, pixels, count, column=column))
            return max(ways, key=lambda piece: piece.confidence)

        return [[best(line) for line in lines] for lines in pages]

    def _turn(self, pages: Sequence[_Page], pieces: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
        """Read lines that are not surely upright once more, turned by 180 degrees."""
        unsure = [
            (one, other)
            for one, page in enumerate(pages)
            if page.picture.search
            for other, piece in enumerate(pieces[one])
            if piece.ways == 1 and piece.text and piece.confidence < SURE
        ]
        result = [list(found) for found in pieces]
        turned = [np.ascontiguousarray(result[a][b].pixels[::-1, ::-1]) for a, b in unsure]
        for (a, b), probs in zip(unsure, self._recogniser.probs(turned), strict=True):
            piece = result[a][b]
            _, confidence = self._recogniser.decode(probs)
            result[a][b] = Piece(**{**vars(piece), "turned": confidence})
        return result


def _reading(page: _Page, pieces: Sequence[Piece]) -> Reading:
    boxes = [piece.box for piece in pieces]
    rows = rows_of(boxes)
    by_box = {id(piece.box): piece for piece in pieces}
    ordered = [[by_box[id(box)] for box in row] for row in rows]
    confidence = float(np.mean([piece.confidence for piece in pieces])) if pieces else 0.0
    aspects = _aspects(page, pieces) if page.picture.search else None
    text, told = "", []
    for row in ordered:
        words = picture_order(" ".join(piece.text for piece in row))
        # Letters below each other are a column: one word.
        column = len(words) == 1 and len(text.rpartition(" ")[2]) >= 1 and _single(told)
        text = words if not text else f"{text}{'' if column else ' '}{words}"
        told += [(piece, not (column and place == 0)) for place, piece in enumerate(row)]
    shown = text if aspects is None or aspects.legible() else ""
    return Reading(shown, confidence, told, len(rows), aspects, bool(text), page.place, boxes)


def _single(told: Sequence[tuple[Piece, bool]]) -> bool:
    return bool(told) and len(told[-1][0].text) == 1


def _aspects(page: _Page, pieces: Sequence[Piece]) -> Aspects:
    """Aspects of what was read; of the lines found where their place was read in their stead."""
    if not any(piece.text for piece in pieces):
        return Aspects.of_nothing(masked=page.picture.masked)
    if page.found is page.read:
        seen = [
            Seen(line, piece.text, piece.pixels, piece.confidence, piece.turned)
            for line, piece in zip(page.read, pieces, strict=True)
        ]
    else:
        whole = pieces[0]
        text = whole.text if len(page.found) == 1 else ""
        seen = [
            Seen(line, text, line.ways[0], whole.confidence, whole.turned) for line in page.found
        ]
    return aspects_of(seen, page.place, masked=page.picture.masked)
