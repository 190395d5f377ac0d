"""A rule: how large the text is within its mask. No model.

`--scorer text_size=examples/rewards/text_size.py:TextSize`
"""

import numpy as np


class TextSize:
    """Extent of the ink over the extent of the mask's box, of width and height whichever is larger.

    A line is as large as it can be once it fills one of the two. Ink is what differs from the
    mask's ground (its median colour) by more than `contrast` of 255 grey levels in any channel. A
    mask without ink has no size: null.
    """

    def __init__(self, contrast: str = "40"):
        self.contrast = float(contrast)  # arguments come as texts

    def score(self, items):
        """Return one number of 0..1, or None, for each item."""
        return [self._size(item) for item in items]

    def _size(self, item) -> float | None:
        mask = np.ones(item.image.shape[:2], bool) if item.mask is None else item.mask
        ground = np.median(item.image[mask], axis=0)  # [3]
        far = np.abs(item.image.astype(float) - ground).max(axis=2) > self.contrast  # [H, W]
        ink = extent(far & mask)
        if ink is None:
            return None
        return max(part / whole for part, whole in zip(ink, extent(mask), strict=True))


def extent(where: np.ndarray) -> tuple[int, int] | None:
    """Return height and width of the box around what is true in [H, W]; None where nothing is."""
    rows, columns = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
    if not len(rows):
        return None
    return int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
