"""The upper rows of a PNG file are those of the whole picture, or there are none."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from reward_server.client.png import upper_rows

SIZE = (33, 40)


@pytest.fixture
def png():
    """The file of a picture with grain, in a mode: every row has a filter of its own."""

    def png(mode="RGB", size=SIZE):
        shape = (size[1], size[0], 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels.cumsum(axis=1, dtype=np.uint8)).convert(mode).save(file, "PNG")
        return file.getvalue()

    return png


def opened(file):
    return Image.open(io.BytesIO(file), formats=("PNG",))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA"])
@pytest.mark.parametrize("rows", [1, 17, 40])
def test_the_upper_rows_are_those_of_the_whole_picture(png, mode, rows):
    found, whole = opened(upper_rows(png(mode), SIZE, rows)), opened(png(mode))
    assert (found.size, found.mode) == ((33, rows), mode)
    assert found.tobytes() == whole.crop((0, 0, 33, rows)).tobytes()


def test_a_picture_of_many_chunks_is_read_no_further_than_its_rows(png):
    size = (400, 400)
    file = png(size=size)
    assert file.count(b"IDAT") > 4
    upper = upper_rows(file, size, 3)
    (length,) = struct.unpack_from(">I", file, 33)
    assert opened(upper[: 33 + 12 + length]).size == (400, 3)
    assert opened(upper).tobytes() == opened(file).crop((0, 0, 400, 3)).tobytes()


def test_a_damaged_or_interlaced_file_or_one_of_another_size_has_no_upper_rows(png):
    file = png()
    flipped = bytearray(file)
    flipped[-30] ^= 1  # in the last rows
    assert upper_rows(bytes(flipped), SIZE, 2) is None
    assert upper_rows(file[:-1], SIZE, 2) is None
    assert upper_rows(file[:20], SIZE, 2) is None
    assert upper_rows(b"nothing", SIZE, 2) is None
    assert upper_rows(file, (40, 33), 2) is None
    interlaced = file[12:28] + b"\1"
    interlaced = file[:12] + interlaced + struct.pack(">I", zlib.crc32(interlaced)) + file[33:]
    assert opened(interlaced).info["interlace"] == 1
    assert upper_rows(interlaced, SIZE, 2) is None
