"""Pictures in and out: files, PIL images and tensors, each conversion in one place.

Image tensors are `[3, H, W]` float32 in [-1, 1]; mask tensors `[1, H, W]` float32 in {0, 1}, 1 =
paint. A mask as a PIL image is mode "L" with 0 and 255 only. PIL sizes are (width, height), tensors
have height first.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from calligrapher.errors import CalligrapherError, DataError

# What Pillow raises on damaged files: some broken chunks are SyntaxError, struct or zlib errors.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

CONTEXT_MULTIPLE = 16  # The VAE shrinks by 8 and packing by 2.


def load_rgb(path: Path) -> Image.Image:
    """Return a picture as 8-bit RGB.

    It is turned upright by EXIF and laid on white where transparent; CMYK and grey are converted.
    Raises DataError when the file is missing, cannot be decoded, or has no agreed range (32 bits,
    float).
    """
    image = _open(path)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(canvas, layer)
    rgb = image.convert("RGB")
    if rgb.info.get("icc_profile", b"")[16:20] != b"RGB ":
        rgb.info.pop("icc_profile", None)  # That of CMYK or grey says nothing of these numbers.
    return rgb


def upright_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of the picture that `load_rgb` gives, from the file's header alone.

    Raises DataError when there is no picture.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # a quarter turn
            return image.size[::-1] if turned else image.size
    except _DECODE_ERRORS as error:
        raise DataError(f"{path} must be a whole, readable image. Found: {error}.") from error


def load_mask(path: Path) -> Image.Image:
    """Return a mask as mode "L" with 0 and 255 only, white = paint: 128 and brighter is white.

    Raises DataError as `load_grey` does.
    """
    return Image.fromarray(np.where(load_grey(path) >= 128, 255, 0).astype(np.uint8))


def load_grey(path: Path) -> np.ndarray:
    """Return the brightness [H, W] of a mask, 0 to 255.

    Raises DataError when it cannot be read, is transparent somewhere (painted or not?) or has
    colours.
    """
    image = _open(path)
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise DataError(
            f"{path} must be an opaque mask. Found transparent pixels. Save it without alpha."
        )
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    coloured = int(((red != green) | (green != blue)).sum())
    if coloured:
        raise DataError(
            f"{path} must be a grey mask (red = green = blue). Found {coloured} coloured pixel(s)."
        )
    return red


def _open(path: Path) -> Image.Image:
    """Return the whole file decoded, turned upright, with at most 8 bits per channel."""
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "nothing"
            raise DataError(f"{path} must be an image file. Found {found} there.")
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # A camera's JPEG with its preview is MPO.
                raise DataError(
                    f"{path} must hold one picture. Found {frames} frames or pages. Save the one"
                    " wanted as a file of its own."
                )
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path} must be an image. Found {path.stat().st_size} bytes in no known image format."
        ) from error
    except DataError:  # Is a ValueError as well: it must not be taken for a decoder's.
        raise
    except _DECODE_ERRORS as error:
        raise DataError(f"{path} must be a whole, readable image. Found: {error}.") from error
    if upright.mode.startswith("I;16"):
        return _upper_8_bits(upright)
    if upright.mode in ("I", "F"):
        raise DataError(
            f"{path} must have 8 or 16 bits per channel. Found 32 ({upright.mode!r}). Save it as"
            " 8-bit PNG."
        )
    return upright


def _upper_8_bits(image: Image.Image) -> Image.Image:
    """Return a picture of 16-bit grey as 8-bit grey, with alpha where it is transparent."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    clear = image.info.get("transparency")  # In a PNG one grey value may stand for transparent.
    if clear is None:
        return grey
    alpha = np.where(values == clear, 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


def to_tensor(image: Image.Image, width: int, height: int) -> Tensor:
    """Return an RGB picture as [3, height, width] float32 in [-1, 1], resized with Lanczos."""
    pixels_HWC = np.array(
        _resized(image, width, height, Image.Resampling.LANCZOS), dtype=np.float32
    )
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous() / 127.5 - 1.0


def mask_to_tensor(mask: Image.Image, width: int, height: int) -> Tensor:
    """Return a mask of 0 and 255 as [1, height, width] float32 in {0, 1}, resized to nearest."""
    pixels_HW = np.asarray(_resized(mask, width, height, Image.Resampling.NEAREST))
    return torch.from_numpy((pixels_HW >= 128).astype(np.float32))[None]


def to_image(tensor: Tensor) -> Image.Image:
    """Return [3, H, W] in [-1, 1], of any float type and device, as RGB: rounded, then clamped.

    Raises CalligrapherError on NaN or infinity: an overflowed VAE must not turn into a scored black
    picture.
    """
    assert tensor.shape[:1] == (3,), f"must be [3, H, W]. Got {tuple(tensor.shape)}."
    pixels = tensor.detach().float().cpu()
    broken = int((~pixels.isfinite()).sum())
    if broken:
        raise CalligrapherError(
            f"An image must be finite. Found {broken} of {pixels.numel()} values NaN or infinite."
        )
    pixels_HWC = ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels_HWC.contiguous().numpy())


def letterbox(image: Image.Image, size: int = 512) -> Image.Image:
    """Return the picture in a black square of `size`, centred; bilinear as the released scripts."""
    longest = max(image.size)
    width, height = (max(1, side * size // longest) for side in image.size)
    canvas = Image.new("RGB", (size, size))
    canvas.paste(
        _resized(image, width, height, Image.Resampling.BILINEAR),
        ((size - width) // 2, (size - height) // 2),
    )
    return canvas


def reference_context(reference: Image.Image, width: int) -> Image.Image:
    """Return the reference at canvas width, its height the nearest multiple of 16, at least 16.

    A tie goes down.
    """
    height = context_height(reference.size, width)
    return _resized(reference, width, height, Image.Resampling.LANCZOS)


def context_height(size: tuple[int, int], width: int) -> int:
    """Return the height of `reference_context` for a reference of `size` (width, height)."""
    below, rest = divmod(width * size[1] // size[0], CONTEXT_MULTIPLE)
    return CONTEXT_MULTIPLE * max(1, below + (rest > CONTEXT_MULTIPLE // 2))


def stack_context(
    context: Image.Image, source: Image.Image, mask: Image.Image
) -> tuple[Image.Image, Image.Image]:
    """Return `context` on top of `source`, and a black strip (nothing to paint) on `mask`."""
    assert context.width == source.width, (
        f"context must be as wide as the source. Got {context.width}, {source.width}."
    )
    assert mask.size == source.size, (
        f"mask must be as large as the source. Got {mask.size}, {source.size}."
    )
    size = (source.width, context.height + source.height)
    image, stacked_mask = Image.new("RGB", size), Image.new("L", size)
    image.paste(context, (0, 0))
    image.paste(source, (0, context.height))
    stacked_mask.paste(mask, (0, context.height))
    return image, stacked_mask


def mask_box(mask: Image.Image) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the white pixels, as `Image.crop` takes it.

    Right and bottom are exclusive. Raises DataError when there are none.
    """
    box = mask.getbbox()
    if box is None:
        raise DataError("A mask must have a white pixel (white = paint). Found none.")
    return box


def png_bytes(image: Image.Image, level: int = 1) -> bytes:
    """Return a picture as PNG; `level` is zlib's, 0 to 9.

    The default is 1: level 6 takes three times as long for a tenth fewer bytes, and encoding
    dominates writing a rollout.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=level)
    return buffer.getvalue()


def _resized(
    image: Image.Image, width: int, height: int, resample: Image.Resampling
) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), resample)
