"""Which lines of text lie in a mask, each turned upright: geometry only, no model.

A mask is bool [H, W]; boxes are float [4 corners, 2 px], clockwise from the text's own top left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import cv2
import numpy as np

from reward_server.scorers.ocr.ink import crossing, ink_of
from reward_server.surroundings import Box, margin_around

SIDE_LIMIT = 736  # px; the detector's input is never larger, whatever the picture
_SMALL = 24  # px; a mask that is lower is enlarged before lines are looked for
_ENLARGED = 32  # px, to this
_STEP = 32  # px; the detector's sides are multiples of this
_STEEP = 50  # degrees; a longer side that is steeper is read up, down, or as a column of letters
_NARROW = 8  # px; what is narrower is no column: no letter in it could be read
_TALL = 1.5  # times its width: how high a box is that may be a column
_CORE = (0.2, 0.8)  # the share of a line's height that decides whether a column of it is inside
_INSIDE = 0.75  # of the core: how much of a column must be inside; less is text of the scene
_SLACK = 0.2  # of a line's height: how far a box may reach over the mask's edge
_CUT = 0.08  # of a line's height: how far a letter goes on beyond the mask that is cut off by it
_CUT_ROWS = 0.25  # of the letters' ink: above or below the mask, as much makes them unreadable
_LEVEL = 10  # degrees; a line that is steeper does not fit an upright box
_FITS = 0.4  # of the mask's height: how high one line must be at least to count as filling it
_SOLID = 0.95  # of its box: how much of it a mask fills that is a rectangle
_PART, _PARTS = 0.3, 0.06  # of the text's height: lower shapes are dots; so much of its ink at most
_ONE_ROW = 0.4  # of the text's height: the middle letter of one row is at least so high
_ROOM = 0.15  # of the text's height: around its ink, as the detector leaves it
MAX_LINES = 64  # read on one picture, the largest first: what a request may cost
# Of all lines together, in heights: more than the longest target fills (256 letters, square ones
# at most).
MAX_LENGTH = 300


@dataclass(frozen=True)
class Region:
    """The part of a picture in which lines are looked for, and the size it is shown at."""

    top: int
    left: int
    pixels: np.ndarray  # uint8 [h, w, 3], as the detector sees it: sides are multiples of 32
    scale: tuple[float, float]  # of `pixels` to the picture, x and y

    def to_picture(self, box: np.ndarray) -> np.ndarray:
        """A box of `pixels` in the picture's coordinates."""
        return np.asarray(box, dtype=np.float64) / self.scale + (self.left, self.top)


@dataclass(frozen=True)
class Line:
    """A line of text, or a column of letters.

    ways: what it looks like read in each possible way, uint8 [h, w, 3] with the letters upright in
    the right one. boxes: the box of each way; corners differ where it begins elsewhere. inside: the
    share of it that lies in the mask. whole: its letters are in the mask from top to bottom.
    column: the last way shows letters side by side that stand below each other.
    """

    ways: tuple[np.ndarray, ...]
    boxes: tuple[np.ndarray, ...]
    inside: float
    whole: bool = True
    column: bool = False

    @property
    def height(self) -> float:
        """Of its shorter side, in px."""
        return float(min(sides(self.boxes[0])))


@dataclass(frozen=True)
class Place:
    """Where text was to be painted: the mask, its box and how much of the box it fills."""

    mask: np.ndarray | None  # bool [H, W]; None = everywhere
    top: int
    bottom: int
    left: int
    right: int
    fill: float

    @classmethod
    def of(cls, rgb: np.ndarray, mask: np.ndarray | None) -> "Place":
        """Return the place of a mask, which must have a white pixel; all of `rgb` without one."""
        height, width = rgb.shape[:2]
        if mask is None or mask.all():
            return cls(None, 0, height, 0, width, 1.0)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        left, right = int(columns[0]), int(columns[-1]) + 1
        fill = float(mask[top:bottom, left:right].mean())
        return cls(mask, top, bottom, left, right, fill)

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    def box(self) -> np.ndarray:
        """Its bounding box."""
        corners = [(self.left, self.top), (self.right, self.top)]
        corners += [(self.right, self.bottom), (self.left, self.bottom)]
        return np.array(corners, dtype=np.float64)

    def crop(self, rgb: np.ndarray) -> np.ndarray:
        """What of a picture its bounding box shows."""
        return rgb[self.top : self.bottom, self.left : self.right]


def region_around(rgb: np.ndarray, place: Place) -> Region:
    """Return the place with a margin of half its shorter side: text that goes on is seen."""
    height, width = rgb.shape[:2]
    side = min(place.height, place.width)
    margin = margin_around(Box(place.left, place.top, place.right, place.bottom))
    top, bottom = max(place.top - margin, 0), min(place.bottom + margin, height)
    left, right = max(place.left - margin, 0), min(place.right + margin, width)
    part = rgb[top:bottom, left:right]
    scale = max(1.0, _ENLARGED / side if side < _SMALL else 1.0)
    scale = min(scale, SIDE_LIMIT / max(part.shape[:2]))
    high, wide = (max(round(side * scale / _STEP) * _STEP, _STEP) for side in part.shape[:2])
    if (high, wide) != part.shape[:2]:
        smaller = scale < 1
        part = cv2.resize(
            part, (wide, high), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        )
    factors = (wide / (right - left), high / (bottom - top))
    return Region(top, left, np.ascontiguousarray(part), factors)


def lines_in(rgb: np.ndarray, boxes: Sequence[np.ndarray], place: Place) -> list[Line]:
    """Return those lines, and parts of lines, that lie in the place; at most `MAX_LINES`.

    Where there is none, those whose letters lie half in it (not `Line.whole`).
    """
    found: list[Line] = []
    length = 0.0
    for box in sorted(boxes, key=lambda one: -np.prod(sides(one))):
        for part, inside, whole in _parts_inside(rgb, _reading_box(box), place):
            found.append(replace(_line(rgb, part, inside), whole=whole))
            length += max(sides(part)) / max(min(sides(part)), 1.0)
        if len(found) >= MAX_LINES or length >= MAX_LENGTH:
            break
    if not found and place.mask is not None:
        found = [
            replace(_line(rgb, box, 1.0), whole=False)
            for box in map(_reading_box, boxes)
            if _half_inside(rgb, box, place.mask)
        ]
    return found[:MAX_LINES]


def whole_place(rgb: np.ndarray, place: Place) -> Line:
    """The place's bounding box as a line."""
    if place.height < _TALL * place.width or place.width < _NARROW:
        return Line((place.crop(rgb),), (place.box(),), 1.0)
    return _line(rgb, place.box(), 1.0)


def fits(lines: Sequence[Line], rows: int, place: Place) -> bool:
    """Whether the lines are one level row that fills the place: its box is then read as it is."""
    return (
        rows == 1
        and place.fill >= _SOLID
        and place.height < _TALL * place.width
        and all(line.inside == 1 for line in lines)
        and all(abs(_angle(line.boxes[0])) <= _LEVEL for line in lines)
        and max(line.height for line in lines) >= _FITS * place.height
    )


def plain_line(rgb: np.ndarray, place: Place) -> Line | None:
    """Return the line that fills a place, where its ink shows that without looking for lines.

    The ink is one row of letters of about one height, clear of the mask's edges, on even ground. A
    second line, text beside it, a letter that is cut, a busy ground: None, and lines are looked
    for.
    """
    if place.fill < _SOLID or place.height >= _TALL * place.width:
        return None
    ink, _ = ink_of(place.crop(rgb))
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if len(rows) < _FITS * len(ink) or len(rows) != rows[-1] - rows[0] + 1:
        return None
    if ink[[0, -1]].any() or ink[:, [0, -1]].any():
        return None
    shapes = cv2.connectedComponentsWithStats(ink.astype(np.uint8), connectivity=8)[2][1:]
    heights, areas = shapes[:, cv2.CC_STAT_HEIGHT] / len(rows), shapes[:, cv2.CC_STAT_AREA]
    small = heights < _PART
    if areas[small].sum() > _PARTS * areas.sum() or median(heights[~small].tolist()) < _ONE_ROW:
        return None
    scale, room = place.height / len(ink), _ROOM * len(rows)
    top, bottom = max(rows[0] - room, 0), min(rows[-1] + 1 + room, len(ink))
    left, right = max(columns[0] - room, 0), min(columns[-1] + 1 + room, ink.shape[1])
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    return _line(rgb, corners * scale + (place.left, place.top), 1.0)


def _line(rgb: np.ndarray, box: np.ndarray, inside: float) -> Line:
    width, height = sides(box)
    upright = cut_out(rgb, box)
    if height < _TALL * width or width < _NARROW:
        return Line((upright,), (box,), inside)
    # A high box: a word that runs down or up, a column of letters, or one narrow letter.
    boxes = [np.roll(box, 1, axis=0), np.roll(box, -1, axis=0)]
    ways = [cut_out(rgb, turned) for turned in boxes]
    if height < 4 * width:
        ways.append(upright)
        boxes.append(box)
    column = _column(upright)
    if column is not None:
        ways.append(column)
        boxes.append(box)
    return Line(tuple(ways), tuple(boxes), inside, column=column is not None)


def cut_out(rgb: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Return what a box shows, upright, uint8 [h, w, 3]."""
    width, height = (max(round(side), 1) for side in sides(box))
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float32)
    turn = cv2.getPerspectiveTransform(box.astype(np.float32), corners)
    return cv2.warpPerspective(
        rgb, turn, (width, height), borderMode=cv2.BORDER_REPLICATE, flags=cv2.INTER_CUBIC
    )


def _parts_inside(
    rgb: np.ndarray, box: np.ndarray, place: Place
) -> list[tuple[np.ndarray, float, bool]]:
    """Return the parts of a box that lie in the mask: each, its share of the box, and `Line.whole`.

    A box reaches a little over its letters, so a part may reach over the mask by `_SLACK`; a letter
    that does so by more than `_CUT` is cut off, and not part of it.
    """
    if place.mask is None:
        return [(box, 1.0, True)]
    width, height = (max(round(side), 1) for side in sides(box))
    along = width >= height  # cut across the longer side
    length, thickness = max(width, height), min(width, height)
    seen = _mask_of(box, place.mask, width, height)
    core = slice(int(_CORE[0] * thickness), max(int(_CORE[1] * thickness), 1))
    inside = (seen[core].mean(axis=0) if along else seen[:, core].mean(axis=1)) >= _INSIDE
    cut, whole = np.zeros(length, dtype=bool), True
    ends = _ends_at_edge(box, rgb.shape[:2], along)
    if inside.any() and (any(ends) or not seen.all()):
        cut, whole = _cut_letters(cut_out(rgb, box), seen, inside, ends, along)
    slack = _SLACK * thickness
    parts = []
    for start, stop in _runs(inside):
        if stop - start < min(0.25 * thickness, length):
            continue
        start = 0 if start <= slack else start
        stop = length if length - stop <= slack else stop
        # A letter's width at most: what is joined to it may be a whole word.
        for begin, end in _runs(cut):
            if begin <= start + 1 < end:
                start = min(end, start + thickness, stop)
            elif begin < stop - 1 <= end:
                stop = max(begin, stop - thickness, start)
        if stop - start < min(0.25 * thickness, length):
            continue
        share = (stop - start) / length
        part = box if share == 1 else _slice(box, start / length, stop / length, along)
        parts.append((part, share, whole))
    return parts


def _cut_letters(
    upright: np.ndarray, seen: np.ndarray, inside: np.ndarray, ends: tuple[bool, bool], along: bool
) -> tuple[np.ndarray, bool]:
    """Return where along a line uint8 [h, w, 3] its letters are cut off, bool [length], and
    whether they are in the mask from top to bottom.

    seen: bool [h, w], the mask. inside: bool [length]. ends: whether it begins, and stops, at the
    picture's edge, where a letter that touches it is cut off.
    """
    ink, _ = ink_of(upright)
    seen = cv2.resize(seen.astype(np.uint8), ink.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
    if not along:
        ink, seen = ink.T, seen.T
    high, wide = ink.shape
    columns = cv2.resize(inside.astype(np.uint8)[None], (wide, 1), interpolation=0)[0] > 0
    within = np.repeat(columns[None], high, axis=0)
    reach = max(_CUT * high, 1.0)
    cut = crossing(ink, within, reach)
    for end, touched in zip((0, wide - 1), ends, strict=True):
        if touched and ink[:, end].sum() > reach:
            beyond = np.zeros((high, 2 * high), dtype=bool)
            at_edge = np.repeat(ink[:, end : end + 1], beyond.shape[1], axis=1)
            parts = (at_edge, ink) if end == 0 else (ink, at_edge)
            sides_of = (beyond, ~np.zeros_like(ink)) if end == 0 else (~np.zeros_like(ink), beyond)
            found = crossing(np.hstack(parts), np.hstack(sides_of), reach)
            cut |= found[:, beyond.shape[1] :] if end == 0 else found[:, :wide]
    across = crossing(ink & within, seen, reach) & within
    outside = (across & ~seen).sum() / max((ink & within & (seen | across)).sum(), 1)
    length = len(inside)
    flags = cv2.resize(cut.any(axis=0).astype(np.uint8)[None], (length, 1), interpolation=0)[0] > 0
    return flags, bool(outside <= _CUT_ROWS)


def _half_inside(rgb: np.ndarray, box: np.ndarray, mask: np.ndarray) -> bool:
    """Whether a good part of a line's ink lies in the mask, of letters that go on beyond it."""
    ink, _ = ink_of(cut_out(rgb, box))
    width, height = (max(round(side), 1) for side in sides(box))
    seen = _mask_of(box, mask, width, height).astype(np.uint8)
    seen = cv2.resize(seen, ink.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
    across = crossing(ink, seen, max(_CUT * min(ink.shape), 1.0))
    return bool((across & seen).sum() >= _CUT_ROWS * max(ink.sum(), 1))


def _ends_at_edge(box: np.ndarray, size: tuple[int, int], along: bool) -> tuple[bool, bool]:
    """Whether a box begins, and whether it stops, at the edge of a picture of [H, W]."""
    corners = ((0, 3), (1, 2)) if along else ((0, 1), (3, 2))
    limit = np.array(size[::-1]) - 1.5
    middles = [box[list(pair)].mean(axis=0) for pair in corners]
    return tuple(bool((one <= 1).any() or (one >= limit).any()) for one in middles)


def _mask_of(box: np.ndarray, mask: np.ndarray, width: int, height: int) -> np.ndarray:
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float32)
    turn = cv2.getPerspectiveTransform(box.astype(np.float32), corners)
    return cv2.warpPerspective(
        mask.astype(np.uint8), turn, (width, height), flags=cv2.INTER_NEAREST
    ).astype(bool)


def _slice(box: np.ndarray, start: float, stop: float, along: bool) -> np.ndarray:
    first, second, third, fourth = box
    if along:
        return np.array(
            [
                first + start * (second - first),
                first + stop * (second - first),
                fourth + stop * (third - fourth),
                fourth + start * (third - fourth),
            ]
        )
    return np.array(
        [
            first + start * (fourth - first),
            second + start * (third - second),
            second + stop * (third - second),
            first + stop * (fourth - first),
        ]
    )


def _column(upright: np.ndarray) -> np.ndarray | None:
    """Return the letters of a column side by side, or None when it cannot be cut into letters."""
    height, width = upright.shape[:2]
    light = cv2.cvtColor(upright, cv2.COLOR_RGB2GRAY).astype(np.float32)
    spread = light.max(axis=1) - light.min(axis=1)  # of each row: high where a letter is
    level, _ = cv2.threshold(
        spread.clip(0, 255).astype(np.uint8)[:, None], 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU
    )
    pieces: list[list[int]] = []
    for start, stop in _runs(spread > level):
        # Parts of one letter (the dot of an i, the strokes of 三) lie close together.
        near = pieces and start - pieces[-1][1] <= 0.2 * width
        if near and stop - pieces[-1][0] <= 1.1 * width:
            pieces[-1][1] = stop
        else:
            pieces.append([start, stop])
    letters = []
    for start, stop in pieces:
        count = max(round((stop - start) / width), 1) if stop - start > 1.6 * width else 1
        edges = np.linspace(start, stop, count + 1).round().astype(int)
        letters += [(a, b) for a, b in pairwise(edges)]
    letters = [(a, b) for a, b in letters if b - a >= 0.2 * width]
    if len(letters) < 2:
        return None
    tallest = max(b - a for a, b in letters)
    room = round(tallest * 0.15) + 1
    tiles = []
    for a, b in letters:
        spare = tallest - (b - a)
        top, bottom = a - spare // 2 - room, b + spare - spare // 2 + room
        rows = np.clip(np.arange(top, bottom), max(a - room, 0), min(b + room, height) - 1)
        tiles.append(upright[rows])
    return np.ascontiguousarray(np.concatenate(tiles, axis=1))


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def longest_run(flags: np.ndarray) -> int:
    """How many True follow each other at most."""
    return max((stop - start for start, stop in _runs(flags)), default=0)


def _reading_box(box: np.ndarray) -> np.ndarray:
    """Corners clockwise from the text's top left, if it is read to the right or is a column.

    The side that is nearer to level becomes the top; a long line up to `_STEEP` is read along its
    longer side.
    """
    corners = np.asarray(box, dtype=np.float64)
    centre = corners.mean(axis=0)
    order = np.argsort(np.arctan2(*(corners - centre).T[::-1]))  # clockwise, as y points down
    corners = corners[order]
    turns = [np.roll(corners, -turn, axis=0) for turn in range(4)]
    for turned in turns:
        width, height = sides(turned)
        if width >= _TALL * height and abs(_angle(turned)) <= _STEEP:
            return turned
    return min(turns, key=lambda turned: abs(_angle(turned)))


def sides(box: np.ndarray) -> tuple[float, float]:
    """Length along the text and across it."""
    box = np.asarray(box, dtype=np.float64)
    along = (np.linalg.norm(box[1] - box[0]) + np.linalg.norm(box[2] - box[3])) / 2
    across = (np.linalg.norm(box[3] - box[0]) + np.linalg.norm(box[2] - box[1])) / 2
    return float(along), float(across)


def _angle(box: np.ndarray) -> float:
    """Degrees by which the text's direction points below level."""
    run, rise = box[1] - box[0]
    return float(np.degrees(np.arctan2(rise, run)))
