"""Which pixels of a line are ink, and what the ink's shape says: cut letters, strokes across."""

import unicodedata
from collections.abc import Sequence

import cv2
import numpy as np

SEEN_AT = 48  # px; lines are looked at no higher than this
_ONE_HOLE = frozenset("abdeopqADOPQR0469")
_TWO_HOLES = frozenset("gB8&@%")  # g: in a double-storey face
_LAB_ZERO = (0, 128, 128, 0)  # as bytes, a and b lie around 128
_COARSE = 3  # px for each of which the ground's colour is told
_HOLE = 4  # px; smaller ones are noise
_JOINED = 0.85  # of the ink's width: how much of it one shape spans that joins its letters


def ink_of(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ink bool [h, w], shade [h, w] in CIELAB units) of a line uint8 [H, W, 3].

    h is at most `SEEN_AT`. Ink and ground are the two sides of Otsu's threshold along the axis of
    greatest colour spread; the ground is what the line's border shows more of. Shades are seen
    against the colours around (`_around`): a ground that varies more than the letters stand out
    from it would be what is split.
    """
    height, width = pixels.shape[:2]
    if height > SEEN_AT:
        size = (max(round(width * SEEN_AT / height), 1), SEEN_AT)
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        width, height = size
    lab_HWC = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    lab_HWC -= _around(lab_HWC)
    # By cv2: numpy is four times as slow with one number for each of three channels.
    middle = lab_HWC.mean(axis=(0, 1)).tolist()
    flat = cv2.subtract(lab_HWC, (*middle, 0)).reshape(-1, 3)
    axis = np.linalg.eigh(flat.T @ flat)[1][:, -1]
    shade = (flat @ axis).reshape(height, width)
    ends = [shade.size // 100, shade.size - 1 - shade.size // 100]
    low, high = np.partition(shade, ends, axis=None)[ends]
    levels = ((shade - low) / max(high - low, 1e-6) * 255).clip(0, 255).astype(np.uint8)
    _, split = cv2.threshold(levels, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    border = np.concatenate([split[0], split[-1], split[:, 0], split[:, -1]])
    return split.astype(bool) ^ (2 * np.count_nonzero(border) > border.size), shade


def _around(lab_HWC: np.ndarray) -> np.ndarray:
    """The colours of a line's ground at each place: medians over half of its height, smoothed."""
    height, width = lab_HWC.shape[:2]
    size = (max(width // _COARSE, 1), max(height // _COARSE, 1))
    small = cv2.resize(cv2.add(lab_HWC, _LAB_ZERO), size, interpolation=cv2.INTER_AREA)
    middle = cv2.medianBlur(small.round().clip(0, 255).astype(np.uint8), max(size[1] // 2 | 1, 3))
    middle = cv2.GaussianBlur(middle.astype(np.float32), (0, 0), max(size[1] / 8, 0.5))
    return cv2.subtract(cv2.resize(middle, (width, height)), _LAB_ZERO)


def crossing(ink: np.ndarray, inside: np.ndarray, reach: float) -> np.ndarray:
    """Which ink [h, w] belongs to shapes that lie on both sides of an edge, bool [h, w].

    inside: bool [h, w]. A shape counts that goes on for more than `reach` px on either side.
    """
    _, shapes = cv2.connectedComponents(ink.astype(np.uint8), connectivity=8)
    depths = [
        cv2.distanceTransform(np.pad(side.astype(np.uint8), 1, mode="edge"), cv2.DIST_C, 3)[
            1:-1, 1:-1
        ]
        for side in (inside, ~inside)
    ]
    deepest = [np.zeros(shapes.max() + 1, dtype=np.float32) for _ in depths]
    for depth, found in zip(depths, deepest, strict=True):
        np.maximum.at(found, shapes.ravel(), depth.ravel())
    both = (deepest[0] > reach) & (deepest[1] > reach)
    both[0] = False  # the ground
    return both[shapes]


def crossed(ink: np.ndarray, text: str) -> float:
    """Excess of holes in the ink [h, w] over those of the text's letters, for each letter.

    A stroke through a word joins its letters and closes what is open in them. 0 where no shape
    joins the word (an underline does, and adds no holes), or where a letter's holes are not known.
    """
    letters = unicodedata.normalize("NFKD", text)
    letters = [one for one in letters if not one.isspace() and not unicodedata.combining(one)]
    if len(letters) < 3 or not all(one.isascii() for one in letters):
        return 0.0
    shapes = cv2.connectedComponentsWithStats(ink.astype(np.uint8), connectivity=8)[2][1:]
    columns = np.flatnonzero(ink.any(axis=0))
    if not len(columns) or shapes[:, cv2.CC_STAT_WIDTH].max() < _JOINED * (
        columns[-1] + 1 - columns[0]
    ):
        return 0.0
    gaps = cv2.connectedComponentsWithStats((~ink).astype(np.uint8), connectivity=4)[2][1:]
    left, top, wide, high, area = gaps.T
    closed = (left > 0) & (top > 0) & (left + wide < ink.shape[1]) & (top + high < len(ink))
    holes = int((closed & (area >= _HOLE)).sum())
    return (holes - _holes_of(letters)) / len(letters)


def gaps(ink: np.ndarray) -> int:
    """How often the ink [h, w] stops between its first and its last row and goes on below.

    Letters do so once or twice at most: a dot, an accent, an underline.
    """
    rows = np.flatnonzero(ink.any(axis=1))
    return int((np.diff(rows) > 1).sum())


def _holes_of(letters: Sequence[str]) -> int:
    return sum((one in _ONE_HOLE) + 2 * (one in _TWO_HOLES) for one in letters)
