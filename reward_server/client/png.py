"""The upper rows of a PNG file: what lies below need not be inflated (standard library only)."""

import struct
import zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def upper_rows(png: bytes, size: tuple[int, int], rows: int) -> bytes | None:
    """Return a file of the first `rows` rows of the picture `png`, of `size` (width, height).

    It is the same file but for the height in its header, where decoders stop. None of one that is
    damaged anywhere, of another size, or interlaced: there rows do not come from top to bottom.
    """
    if not _is_whole(png) or struct.unpack_from(">II", png, 16) != size or png[28] != 0:
        return None
    header = png[12:20] + struct.pack(">I", rows) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def _is_whole(png: bytes) -> bool:
    """Whether it is a PNG whose chunks, the header to the end, are as their checksums say."""
    place, view = len(_SIGNATURE), memoryview(png)
    if png[:place] != _SIGNATURE or png[12:16] != b"IHDR":
        return False
    while place + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        end = place + 8 + length
        if png[end : end + 4] != struct.pack(">I", zlib.crc32(view[place + 4 : end])):
            return False
        if kind == b"IEND":
            return True
        place = end + 4
    return False
