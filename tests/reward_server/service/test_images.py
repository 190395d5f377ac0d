import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from reward_server.service.images import ImageError, bounding_box, decode_mask, decode_rgb, open_png


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode()


def png_header(width: int, height: int) -> str:
    """A PNG that promises this size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return base64.b64encode(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    ).decode()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("!!!", "base64"),
        ("", "PNG file"),
        ("é", "base64"),
        (base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode(), "PNG file"),
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "PNG file"),
        (encoded(Image.new("RGB", (4, 4)), "JPEG"), "PNG file"),
        (png_header(10_000, 10_000), "at most 1000 pixels"),
        (png_header(65_535, 65_535), "at most 1000 pixels"),
        (encoded(Image.new("RGB", (40, 26))), "Got 40 x 26"),
        (png_header(0, 5), "PNG file|at least one pixel"),
    ],
)
def test_what_is_no_small_png_is_refused_by_its_header(data, told):
    with pytest.raises(ImageError, match=told):
        open_png(data, field="image", max_pixels=1000)


def test_a_truncated_png_is_refused_when_its_pixels_are_read():
    whole = base64.b64decode(
        encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), "uint8")))
    )
    opened = open_png(base64.b64encode(whole[:600]).decode(), field="image", max_pixels=1000)
    with pytest.raises(ImageError, match="undamaged"):
        decode_rgb(opened, field="image")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_kind_of_png_becomes_rgb(mode):
    rgb = decode_rgb(
        open_png(encoded(Image.new(mode, (5, 3))), field="image", max_pixels=99), field="image"
    )
    assert rgb.shape == (3, 5, 3)
    assert rgb.dtype == np.uint8


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    rgb = decode_rgb(open_png(encoded(image), field="image", max_pixels=99), field="image")
    assert rgb.tolist() == [[[255, 255, 255], [255, 255, 255]]]


def test_the_box_is_around_the_white_part():
    mask = Image.new("L", (7, 5))
    mask.putpixel((2, 1), 255)
    mask.putpixel((4, 3), 128)
    mask.putpixel((6, 4), 127)  # darker than half: not painted
    decoded = decode_mask(open_png(encoded(mask), field="mask", max_pixels=99))
    assert bounding_box(decoded) == (1, 4, 2, 5)


def test_a_black_mask_is_refused():
    with pytest.raises(ImageError, match="white"):
        bounding_box(np.zeros((3, 4), dtype=bool))
