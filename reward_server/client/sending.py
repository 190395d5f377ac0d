"""Items as they travel: JSON with base64 PNG, or, where a server knows of it, files in a form.

A picture that several items share is encoded once, and in a form it travels once. Where a server's
scorers all keep to the mask, no more of a large picture travels than they look at.
"""

import base64
import io
import json
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from reward_server.client.failover import FILES, PARTS, Request
from reward_server.client.png import upper_rows
from reward_server.surroundings import Box, looked_at
from reward_server.text import Match

WORTH = 0.5  # of a picture: a part of it that is larger is not cut out
_WHITE = 128  # of 255: from this on a mask is white


@dataclass(frozen=True)
class RewardItem:
    """One picture to score.

    Pictures: PNG bytes (sent as they are), PIL images, or uint8 arrays [H, W, 3] or [H, W].
    """

    image: Any
    prompt: str
    mask: Any = None
    text: str | None = None
    reference: Any = None
    match: Match | None = None  # whether case and spaces count; None = as the server is set up
    letters: bool = False  # ask about each character of the text; where `/info` says `letters`


def encode_png(picture: Any) -> str:
    """base64 of a picture's PNG; PNG bytes are taken as they are."""
    if not isinstance(picture, bytes | bytearray | memoryview):
        from PIL import Image

        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", compress_level=1)
        picture = buffer.getvalue()
    return base64.b64encode(picture).decode("ascii")


def encode_file(picture: Any) -> bytes:
    """A picture as a file: PNG bytes as they are, else BMP, which costs no deflating."""
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    from PIL import Image

    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    # A BMP holds no transparency that everybody reads alike.
    image.save(buffer, format="BMP" if image.mode in ("RGB", "L") else "PNG", compress_level=1)
    return buffer.getvalue()


class Picture:
    """One picture, encoded when it is first sent, once for all items and attempts."""

    def __init__(self, picture: Any, encode: Callable[[Any], str]):
        self._picture, self._encode, self._lock = picture, encode, threading.Lock()
        self._base64: str | None = None
        self._file: bytes | None = None
        self._cuts: dict[Box, bytes | None] = {}

    @property
    def size(self) -> int:
        """Bytes that it takes in a request, at most."""
        if isinstance(self._picture, bytes | bytearray | memoryview):
            return -(-len(self._picture) // 3) * 4
        if hasattr(self._picture, "nbytes"):
            pixels = self._picture.nbytes
        else:
            pixels = self._picture.width * self._picture.height * len(self._picture.getbands())
        return 2 * pixels + 4096

    def base64(self) -> str:
        """As JSON holds it."""
        with self._lock:
            if self._base64 is None:
                self._base64 = self._encode(self._picture)
            return self._base64

    def file(self) -> bytes:
        """As a form holds it."""
        with self._lock:
            if self._file is None:
                self._file = encode_file(self._picture)
            return self._file

    def cut(self, box: Box, size: tuple[int, int]) -> bytes | None:
        """Return a part of it, as a form holds it.

        None where it is not of this size (width, height), or where a part might mean another thing
        than it does in the whole: see `_plain`. Of a PNG file no row below the part is decoded.
        """
        with self._lock:
            if box not in self._cuts:
                self._cuts[box] = self._cut(box, size)
            return self._cuts[box]

    def _cut(self, box: Box, size: tuple[int, int]) -> bytes | None:
        picture, (width, height) = self._picture, size
        if isinstance(picture, bytes | bytearray | memoryview):
            upper = upper_rows(bytes(picture), size, box.bottom)
            if upper is not None:
                picture, height = upper, box.bottom
        image = _plain(picture)
        if image is None or image.size != (width, height):
            return None
        return encode_file(image.crop((box.left, box.top, box.right, box.bottom)))

    @cached_property
    def white(self) -> tuple[Box, tuple[int, int]] | None:
        """The box of a mask's white part, and the mask's width and height."""
        with self._lock:
            image = _plain(self._picture)
        if image is None:
            return None
        box = image.convert("L").point(lambda level: 255 * (level >= _WHITE)).getbbox()
        return None if box is None else (Box(*box), image.size)


def _plain(picture: Any) -> Any:
    """Return a picture decoded; None of a damaged one, of which the server says what is wrong, and
    of one with transparency or a palette.
    """
    from PIL import Image

    image = picture
    try:
        if isinstance(image, bytes | bytearray | memoryview):
            image = Image.open(io.BytesIO(image), formats=("PNG", "BMP"))
        elif not isinstance(image, Image.Image):
            image = Image.fromarray(image)
        image.load()
    except Exception:  # decoders raise all kinds; sent whole, the server's word counts
        return None
    plain = image.mode in ("RGB", "L", "1") and not image.has_transparency_data
    return image if plain else None


@dataclass(frozen=True)
class SentItem:
    """One item: its words, and its pictures by field."""

    words: dict[str, str | bool]
    pictures: dict[str, Picture]
    components: tuple[str, ...] | None = None  # what is to be measured; None: all

    @property
    def size(self) -> int:
        """Bytes that it takes in a request, at most."""
        words = sum(len(str(word)) for word in self.words.values())
        return words + sum(picture.size for picture in self.pictures.values())

    def part(self) -> tuple[Box, tuple[int, int]] | None:
        """What of its picture scorers look at who keep to the mask, and the whole's size.

        None where all of it is to be sent: without a mask, or where a part is not worth it.
        """
        mask = self.pictures.get("mask")
        if mask is None or mask.white is None:
            return None
        white, size = mask.white
        box = looked_at(white, size)
        if box.pixels > WORTH * size[0] * size[1]:
            return None
        cuts = (self.pictures[field].cut(box, size) for field in ("mask", "image"))
        return None if None in cuts else (box, size)


class Chunk:
    """The items of one request, encoded once for all attempts, in the way a server understands."""

    def __init__(self, items: Sequence[SentItem]):
        self._items = items
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def request_for(self, protocol: int) -> Request:
        """What a server of this protocol is asked."""
        with self._lock:
            if protocol >= PARTS:
                return self._form_of_parts
            return self._form if protocol >= FILES else self._json

    @cached_property
    def _json(self) -> Request:
        items = [
            {**item.words, **{name: one.base64() for name, one in item.pictures.items()}}
            for item in self._items
        ]
        return Request("POST", "/score_batch", json.dumps({"items": items}).encode())

    @cached_property
    def _form(self) -> Request:
        return self._form_of([None] * len(self._items))

    @cached_property
    def _form_of_parts(self) -> Request:
        return self._form_of([item.part() for item in self._items])

    def _form_of(self, parts: Sequence[tuple[Box, tuple[int, int]] | None]) -> Request:
        """Return the form; of an item with a part only that travels, and no reference."""
        names: dict[tuple[Picture, Any], str] = {}
        items: list[dict[str, Any]] = []
        for item, part in zip(self._items, parts, strict=True):
            named = {
                field: names.setdefault((picture, part), f"p{len(names)}")
                for field, picture in item.pictures.items()
                if part is None or field != "reference"
            }
            asked: dict[str, Any] = {}
            if item.components is not None:
                asked["components"] = item.components
            if part is not None:
                box, (width, height) = part
                corner = {"left": box.left, "top": box.top}
                asked["part"] = {**corner, "width": width, "height": height}
            items.append({**item.words, **named, **asked})
        boundary = uuid.uuid4().hex  # 122 random bits: no picture holds them
        contents = [("items", json.dumps({"items": items}).encode())]
        contents += [
            (name, picture.file() if part is None else picture.cut(*part))
            for (picture, part), name in names.items()
        ]
        body: list[bytes] = []
        for name, content in contents:
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
            body += [head.encode(), content, b"\r\n"]
        body.append(f"--{boundary}--\r\n".encode())
        return Request(
            "POST", "/score_files", b"".join(body), f"multipart/form-data; boundary={boundary}"
        )


def sent_items(
    items: Sequence[RewardItem],
    encode: Callable[[Any], str] = encode_png,
    components: Sequence[str] | None = None,
) -> list[SentItem]:
    """Return the items as they travel; `encode` makes a picture the base64 that JSON holds."""
    held: dict[int, Picture] = {}  # by identity: the items keep their pictures alive
    names = None if components is None else tuple(components)

    def once(picture: Any) -> Picture:
        return held.setdefault(id(picture), Picture(picture, encode))

    sent = []
    for item in items:
        said = {"prompt": item.prompt, "text": item.text, "match": item.match}
        words = {name: word for name, word in said.items() if word is not None}
        if item.letters:
            words["letters"] = True
        pictures = {"image": once(item.image)}
        if item.mask is not None:
            pictures["mask"] = once(item.mask)
        if item.reference is not None:
            pictures["reference"] = once(item.reference)
        sent.append(SentItem(words, pictures, names))
    return sent
