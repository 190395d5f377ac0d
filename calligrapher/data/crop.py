"""Where a large picture is cut for the canvas, and how what was painted goes back into it.

Boxes are (left, top, right, bottom) in pixels of the picture, right and bottom exclusive, as PIL's
are.
"""

import numpy as np
from PIL import Image, ImageFilter

from calligrapher.data.images import mask_box

Box = tuple[int, int, int, int]
Size = tuple[int, int]  # (width, height)

# The seam takes at most this part of the mask's thickness: behind it the old text shows.
FADE_SHARE = 8


def whole(picture: Size) -> Box:
    """Return the box of all of the picture."""
    return (0, 0, *picture)


def crop_box(mask: Box, picture: Size, canvas: Size, grow: float) -> Box:
    """Return the part of the picture that is put on the canvas: it holds all of the box `mask`.

    It has the shape of the canvas and `mask` in its middle, but lies inside the picture. It is as
    large as the canvas where `mask` fits on it, so that nothing is resampled; around a larger
    `mask` it is the smallest one of that shape, times `grow`. Where no box of that shape holds
    `mask` and fits into the picture, it is the whole picture.
    """
    left, top, right, bottom = mask
    needed = max((right - left) / canvas[0], (bottom - top) / canvas[1])
    size = 1.0 if needed <= 1 else needed * grow
    size = min(size, picture[0] / canvas[0], picture[1] / canvas[1])
    if size < needed:
        return whole(picture)
    width, height = round(size * canvas[0]), round(size * canvas[1])
    x = min(max(0, (left + right - width) // 2), picture[0] - width)
    y = min(max(0, (top + bottom - height) // 2), picture[1] - height)
    return x, y, x + width, y + height


def faded(mask: Image.Image, feather: int) -> Image.Image:
    """Return how much of each pixel is new, 0..255 (mode L).

    It is 0 outside of the mask and rises inwards from its edge: the n-th pixel from the edge has
    n / (depth + 1), at most 1. The depth is `feather` pixels, or an eighth of the mask's mean
    thickness where that is less. The picture's own border is no edge.
    """
    left, top, right, bottom = mask_box(mask)
    region = (
        max(0, left - 1),
        max(0, top - 1),
        min(mask.width, right + 1),
        min(mask.height, bottom + 1),
    )
    layers = [mask.crop(region)]
    layers += [layers[0].filter(ImageFilter.MinFilter(3))]
    painted, inside = (layer.histogram()[255] for layer in layers)
    thickness = 2 * painted // max(1, painted - inside)  # area over half the outline
    depth = min(feather, thickness // FADE_SHARE)
    while len(layers) <= depth:
        layers.append(layers[-1].filter(ImageFilter.MinFilter(3)))
    mean = np.mean([np.asarray(layer, np.float32) for layer in layers[: depth + 1]], axis=0)
    weights = Image.new("L", mask.size)
    weights.paste(Image.fromarray(mean.round().astype(np.uint8)), region[:2])
    return weights


def paste(source: Image.Image, painted: Image.Image, box: Box, weights: Image.Image) -> Image.Image:
    """Return `source` with `painted` in `box`, mixed by `weights` (see `faded`).

    Where the weights are 0 it is the source. `painted` is brought to the size of `box`. Both
    pictures are RGB; `weights` is as large as `source`.
    """
    size = (box[2] - box[0], box[3] - box[1])
    if painted.size != size:
        painted = painted.resize(size, Image.Resampling.LANCZOS)
    result = source.copy()
    result.paste(painted, box[:2], weights.crop(box))
    return result
