"""Untrusted pictures: base64 PNG, or PNG and BMP files, to RGB arrays, within limits."""

import base64
import binascii
import io
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image


class ImageError(ValueError):
    """A picture of a request cannot be used; the message says what must hold and what was found."""


def open_png(data: str, *, field: str, max_pixels: int) -> Image.Image:
    """Check a base64 PNG by its header only: no pixel is decoded yet. Raises ImageError."""
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            f"{field} must be base64 of a PNG file. Got text that is not base64 ({error})."
        ) from None
    return open_file(raw, field=field, max_pixels=max_pixels, formats=("PNG",))


def open_file(
    raw: bytes | memoryview, *, field: str, max_pixels: int, formats: Sequence[str] = ("PNG", "BMP")
) -> Image.Image:
    """Check a picture's file by its header only: no pixel is decoded yet. Raises ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about sizes which the limit below judges
            image = Image.open(io.BytesIO(raw), formats=formats)
    except Image.DecompressionBombError:
        raise ImageError(f"{field} must have at most {max_pixels} pixels. Got far more.") from None
    except Exception as error:
        raise ImageError(
            f"{field} must be a {' or '.join(formats)} file. Got {len(raw)} bytes that are not"
            f" ({type(error).__name__})."
        ) from None
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{field} must have at most {max_pixels} pixels. Got {width} x {height}.")
    if width < 1 or height < 1:
        raise ImageError(f"{field} must have at least one pixel. Got {width} x {height}.")
    return image


def decode_rgb(image: Image.Image, *, field: str) -> np.ndarray:
    """Return the pixels of an opened picture, uint8 [H, W, 3]; transparent ones over white.

    Raises ImageError.
    """
    return np.asarray(_decoded(image, field, _to_rgb))


def decode_mask(image: Image.Image) -> np.ndarray:
    """White part of an opened mask, bool [H, W]. Raises ImageError."""
    return np.asarray(_decoded(image, "mask", lambda opened: opened.convert("L"))) >= 128


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right) of the white part, ends exclusive.

    Raises ImageError when there is none.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise ImageError(
            "mask must be white where the text was painted. Got a mask without a white pixel."
        )
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _decoded(image, field, convert):
    try:
        return convert(image)
    except Exception as error:
        raise ImageError(
            f"{field} must be an undamaged {image.format} file. Got one that breaks off ({error})."
        ) from None
