"""Items as they travel: JSON with base64 PNG, or, where a server knows of it, files in a form.

A picture that several items share is encoded once, and in a form it travels once.
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

from reward_server.client.failover import Request
from reward_server.text import Match

_FILES = 2  # the protocol from which on a server has /score_files


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


@dataclass(frozen=True)
class SentItem:
    """One item: its words, and its pictures by field."""

    words: dict[str, str]
    pictures: dict[str, Picture]
    components: tuple[str, ...] | None = None  # what is to be measured; None: all

    @property
    def size(self) -> int:
        """Bytes that it takes in a request, at most."""
        words = sum(len(word) for word in self.words.values())
        return words + sum(picture.size for picture in self.pictures.values())


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
            return self._form if protocol >= _FILES else self._json

    @cached_property
    def _json(self) -> Request:
        items = [
            {**item.words, **{name: one.base64() for name, one in item.pictures.items()}}
            for item in self._items
        ]
        return Request("POST", "/score_batch", json.dumps({"items": items}).encode())

    @cached_property
    def _form(self) -> Request:
        names: dict[Picture, str] = {}
        items: list[dict[str, Any]] = []
        for item in self._items:
            named = {
                field: names.setdefault(picture, f"p{len(names)}")
                for field, picture in item.pictures.items()
            }
            asked = {} if item.components is None else {"components": item.components}
            items.append({**item.words, **named, **asked})
        boundary = uuid.uuid4().hex  # 122 random bits: no picture holds them
        parts = [("items", json.dumps({"items": items}).encode())]
        parts += [(name, picture.file()) for picture, name in names.items()]
        body: list[bytes] = []
        for name, content in parts:
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
        pictures = {"image": once(item.image)}
        if item.mask is not None:
            pictures["mask"] = once(item.mask)
        if item.reference is not None:
            pictures["reference"] = once(item.reference)
        sent.append(SentItem(words, pictures, names))
    return sent
