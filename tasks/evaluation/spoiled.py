"""Right pictures spoiled in what one aspect of the OCR is there to see, and in nothing else.

The letters stay the right ones: what is read of them may say nothing of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

_FAINT = 0.03  # of the contrast stays
_SMALL = 0.2  # of the width and height
_BLUR = 0.2  # of the height, the radius
_STROKE = (0.42, 0.58)  # of the height, from the top


@dataclass(frozen=True)
class Spoiled:
    """A kind of picture, told in words that go on from `the target`.

    make: gets the right picture and the source, uint8 [H, W, 3], and the mask, bool [H, W, 1];
    returns the picture, None where there is no room for it.
    """

    told: str
    make: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray | None]


def _within(change: Callable[[np.ndarray, np.ndarray], np.ndarray]):
    """Return a `Spoiled.make` that changes the mask's box, given with the colour of its ground."""

    def make(target: np.ndarray, source: np.ndarray, mask: np.ndarray) -> np.ndarray:
        rows, columns = _box(mask)
        picture, box = target.copy(), target[rows, columns]
        ground = np.median(box.reshape(-1, 3), axis=0)
        picture[rows, columns] = change(box.astype(float), ground).round().clip(0, 255)
        return np.where(mask, picture, target)

    return make


def _box(mask: np.ndarray) -> tuple[slice, slice]:
    rows, columns = np.nonzero(mask[..., 0])
    return slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)


def _faint(box: np.ndarray, ground: np.ndarray) -> np.ndarray:
    return ground + _FAINT * (box - ground)


def _turned(box: np.ndarray, ground: np.ndarray) -> np.ndarray:
    return box[::-1, ::-1]


def _struck(box: np.ndarray, ground: np.ndarray) -> np.ndarray:
    struck = box.copy()
    inks = box.reshape(-1, 3)
    first, last = (round(len(box) * at) for at in _STROKE)
    struck[first:last] = inks[np.abs(inks - ground).sum(1).argmax()]
    return struck


def _small(box: np.ndarray, ground: np.ndarray) -> np.ndarray:
    height, width = (max(1, round(_SMALL * side)) for side in box.shape[:2])
    top, left = (box.shape[0] - height) // 2, (box.shape[1] - width) // 2
    small = np.broadcast_to(ground, box.shape).copy()
    shrunk = Image.fromarray(box.astype(np.uint8)).resize((width, height))
    small[top : top + height, left : left + width] = np.asarray(shrunk)
    return small


def _blurred(target: np.ndarray, source: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The whole picture, for the mask's edge would be sharp."""
    rows, _ = _box(mask)
    blur = ImageFilter.GaussianBlur(float(_BLUR * (rows.stop - rows.start)))
    return np.asarray(Image.fromarray(target).filter(blur))


def _aside(target: np.ndarray, source: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """Half of the mask's box stands to its right, where the picture is that wide."""
    rows, columns = _box(mask)
    half = (columns.stop - columns.start) // 2
    if columns.stop + half > target.shape[1]:
        return None
    picture, box = source.copy(), target[rows, columns]
    picture[rows, columns] = np.median(box.reshape(-1, 3), axis=0)
    picture[rows, columns.start + half : columns.stop + half] = box
    return picture


SPOILED = {
    "ocr_visibility": Spoiled("with 3 % of its contrast", _within(_faint)),
    "ocr_upright": Spoiled("turned upside down", _within(_turned)),
    "ocr_unstruck": Spoiled("struck out in its ink", _within(_struck)),
    "ocr_sharpness": Spoiled("blurred, by a fifth of the mask's height", _blurred),
    "ocr_inside": Spoiled("half beside the mask", _aside),
    "ocr_size": Spoiled("at a fifth of its size", _within(_small)),
}
"""Aspect of the OCR -> the right picture spoiled in it."""
