"""A picture with nothing on it, and the place where a text shall stand: cases without a source."""

import re

from PIL import Image, ImageColor

from calligrapher.data.checks import MIN_SIDE
from calligrapher.errors import ParamsError

Size = tuple[int, int]  # width, height
Place = tuple[int, int, int, int]  # left, top, right, bottom; the last two lie outside

MARGIN = 8  # the part of the shorter side that stays, unless a place is named
_RGBA = re.compile(r"rgba?\(([\d.]+), *([\d.]+), *([\d.]+)(?:, *[\d.]+)?\)")


def size_of(text: str) -> Size:
    """Return the size that `WIDTHxHEIGHT` says, in pixels."""
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if min(size) < MIN_SIDE:
        raise ParamsError(
            f"A size must be WIDTHxHEIGHT in pixels, at least {MIN_SIDE} each. Got {text!r}."
        )
    return size


def color_of(text: str) -> tuple[int, int, int]:
    """Return the RGB (0 to 255) of a colour as CSS writes it: `#fff`, `navy`, `rgb(1, 2, 3)`."""
    if match := _RGBA.fullmatch(text):  # a browser's may have fractions
        red, green, blue = (min(255, round(float(part))) for part in match.groups())
        return red, green, blue
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise ParamsError(f"A colour must be as '#fff' or navy. Got {text!r}.") from error


def place_of(text: str | None, size: Size) -> Place:
    """Return the place to paint that `LEFT,TOP,RIGHT,BOTTOM` or `full` says.

    None: all but a margin, by which the model sees the colour.
    """
    width, height = size
    if text == "full":
        return 0, 0, width, height
    if text is None:
        margin = max(1, min(size) // MARGIN)
        if 2 * margin >= min(size):
            return 0, 0, width, height
        return margin, margin, width - margin, height - margin
    match = re.fullmatch(r"(\d{1,5}),(\d{1,5}),(\d{1,5}),(\d{1,5})", text)
    left, top, right, bottom = map(int, match.groups()) if match else (0, 0, 0, 0)
    if not (left < right <= width and top < bottom <= height):
        raise ParamsError(
            f"A place must be LEFT,TOP,RIGHT,BOTTOM within {width}x{height}, or full. Got {text!r}."
        )
    return left, top, right, bottom


def blank_picture(size: Size, color: tuple[int, int, int]) -> Image.Image:
    """Return an RGB picture of one colour."""
    return Image.new("RGB", size, color)


def place_mask(size: Size, place: Place) -> Image.Image:
    """Return a mask (mode L) that is 255 in `place` and 0 elsewhere."""
    mask = Image.new("L", size)
    mask.paste(255, place)
    return mask
