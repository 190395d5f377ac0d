"""A request -> what the scorers see: pictures checked by their headers, then decoded.

Nothing is decoded that no scorer looks at, and a mask or a reference that several items share is
decoded once: a group of pictures has the same.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ValidationError

from reward_server.components import NAMES
from reward_server.scorers.base import Item
from reward_server.service.images import (
    ImageError,
    bounding_box,
    decode_mask,
    decode_rgb,
    open_file,
    open_png,
)
from reward_server.service.lru import LRU
from reward_server.service.schema import MAX_PROMPT_CHARS, MAX_TEXT_CHARS, Part, ScoreRequest
from reward_server.surroundings import Box, looked_at
from reward_server.text import Match, normalise, text_from_prompt

Buffer = bytes | memoryview
Picture = str | Buffer  # base64 of a PNG, or a PNG or BMP file


class ItemError(ValueError):
    """This item cannot be scored as it was sent."""


@dataclass(frozen=True)
class Ask:
    """One item as it was sent, its form and limits checked, no picture looked at."""

    image: Picture
    text: str  # the target
    prompt: str = ""
    mask: Picture | None = None
    reference: Picture | None = None
    components: tuple[str, ...] | None = None  # None: all
    match: Match | None = None
    letters: bool = False  # whether each character of the text is asked about
    part: Part | None = None  # where image and mask lie in the whole picture; None: they are whole

    @cached_property
    def image_digest(self) -> bytes:
        """Equal for equal images as sent."""
        return _digest(self.image)

    @cached_property
    def mask_digest(self) -> bytes:
        """Equal for equal masks as sent; empty without one."""
        return _digest(self.mask)

    @cached_property
    def reference_digest(self) -> bytes:
        """Equal for equal references as sent; empty without one."""
        return _digest(self.reference)

    def digest(self, *, reference: bool) -> tuple:
        """Stands for all that decides the score; the reference where somebody looks at it."""
        seen = self.reference_digest if reference else b""
        pictures = self.image_digest, self.mask_digest, seen
        words = self.text, self.prompt, self.components, self.match, self.letters
        return *pictures, *words, self.part


@dataclass(frozen=True)
class Mask:
    """A decoded mask."""

    white: np.ndarray  # [H, W] bool
    box: tuple[int, int, int, int]  # top, bottom, left, right of the white part; ends exclusive

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as PIL has them."""
        height, width = self.white.shape
        return width, height


@dataclass(frozen=True)
class Opened:
    """An item's pictures, their headers checked, no pixel decoded but of those decoded before."""

    image: Image.Image
    mask: Image.Image | Mask | None
    # What is wrong with a reference costs those who look at it, not the whole item.
    reference: Image.Image | np.ndarray | ImageError | None
    whole: tuple[int, int]  # width and height of the picture of which `image` may be a part

    @property
    def pixels(self) -> int:
        """How many the pictures have together; whether they were seen before changes no limit."""
        width, height = self.whole
        pixels = width * height * (1 if self.mask is None else 2)
        if isinstance(self.reference, np.ndarray):
            pixels += self.reference.shape[0] * self.reference.shape[1]
        elif isinstance(self.reference, Image.Image):
            pixels += self.reference.width * self.reference.height
        return pixels


def shared_pictures(capacity_bytes: int) -> LRU:
    """A memory for decoded masks and references, by their digest."""
    return LRU(
        capacity_bytes, lambda one: one.white.nbytes if isinstance(one, Mask) else one.nbytes
    )


def read_item(
    sent: Any, files: Mapping[str, Buffer] | None = None, *, names: Sequence[str] = NAMES
) -> Ask:
    """Check one item's form and limits. Raises ItemError.

    files: the pictures that the item names, when they did not come in base64. names: the components
    that it may ask for.
    """
    try:
        request = ScoreRequest.model_validate(sent)
    except ValidationError as error:
        raise ItemError(told(error.errors())) from None
    return ask_of(request, files, names=names)


def ask_of(
    request: ScoreRequest,
    files: Mapping[str, Buffer] | None = None,
    *,
    names: Sequence[str] = NAMES,
) -> Ask:
    """Return what a request of the right form asks. Raises ItemError: its limits, its names."""
    text = _target(request)
    components = request.components
    if components is not None and not (components and set(components) <= set(names)):
        raise ItemError(f"components must be some of {', '.join(names)}. Got {components}.")

    def picture(name: str | None) -> Picture | None:
        if files is None or name is None:
            return name
        if name not in files:
            raise ItemError(f"a picture must be one of the parts that were sent. Got {name!r}.")
        return files[name]

    image = picture(request.image)
    assert image is not None
    return Ask(
        image,
        text,
        request.prompt,
        picture(request.mask),
        picture(request.reference),
        None if components is None else tuple(sorted(set(components))),
        request.match,
        request.letters,
        request.part,
    )


def told(errors: list) -> str:
    """Where and why, without the value that was sent: it may be megabytes, NaN or no Unicode."""
    places = [
        f"{'.'.join(str(part) for part in one['loc'])[:200]}: {one['msg']}"[:500].lstrip(": ")
        for one in errors[:5]
    ]
    return "; ".join(places).encode("ascii", "backslashreplace").decode()


def open_pictures(ask: Ask, max_pixels: int, shared: LRU, *, reference: bool) -> Opened | ItemError:
    """Return the item's pictures, no pixel decoded yet, or what is wrong with them.

    reference: whether anybody looks at one.
    """
    mask = None
    try:
        image = _open(ask.image, field="image", max_pixels=max_pixels)
        if ask.mask is not None:
            mask = shared.get(("mask", ask.mask_digest, ask.part)) or _open(
                ask.mask, field="mask", max_pixels=max_pixels
            )
        whole = _whole(image, ask.part, max_pixels)
    except ImageError as error:
        return ItemError(str(error))
    wanted = whole if isinstance(mask, Mask) else image.size
    if mask is not None and mask.size != wanted:
        return ItemError(
            f"mask must be of the image's size {wanted}. Got {mask.size} (width, height)."
        )
    if ask.reference is None or not reference:
        return Opened(image, mask, None, whole)
    seen = shared.get(("reference", ask.reference_digest))
    if seen is not None:
        return Opened(image, mask, seen, whole)
    try:
        opened = _open(ask.reference, field="reference", max_pixels=max_pixels)
    except ImageError as error:
        return Opened(image, mask, error, whole)
    return Opened(image, mask, opened, whole)


def _whole(image: Image.Image, part: Part | None, max_pixels: int) -> tuple[int, int]:
    """Width and height of the picture of which an image may be a part. Raises ImageError."""
    if part is None:
        return image.size
    right, bottom = part.left + image.width, part.top + image.height
    if right > part.width or bottom > part.height or part.width * part.height > max_pixels:
        raise ImageError(
            f"part must lie in a whole picture of at most {max_pixels} pixels. Got an image that"
            f" ends at {right}, {bottom} of {part.width} x {part.height}."
        )
    return part.width, part.height


def decode(ask: Ask, opened: Opened, shared: LRU) -> Item:
    """Return the item that scorers see. Raises ItemError: a damaged picture, a black mask."""
    try:
        image = decode_rgb(opened.image, field="image")
        mask = opened.mask
        if isinstance(mask, Image.Image):
            white = _in_whole(decode_mask(mask), ask.part)
            mask = Mask(white, bounding_box(white))
            shared.put(("mask", ask.mask_digest, ask.part), mask)
        if ask.part is not None:
            _check_part(opened.image.size, ask.part, mask)
            image = _in_whole(image, ask.part)
    except ImageError as error:
        raise ItemError(str(error)) from None
    asked = {"prompt": ask.prompt, "match": ask.match, "letters": ask.letters}
    item = Item(image, image, ask.text, has_mask=False, **asked)
    if mask is not None:
        top, bottom, left, right = mask.box
        crop = image[top:bottom, left:right]
        item = replace(item, crop=crop, has_mask=True, mask=mask.white, box=mask.box)
    reference = opened.reference
    if reference is None:
        return item
    try:
        if isinstance(reference, ImageError):
            raise reference
        if isinstance(reference, Image.Image):
            reference = decode_rgb(reference, field="reference")
            shared.put(("reference", ask.reference_digest), reference)
        return replace(item, reference=reference)
    except ImageError as error:
        return replace(item, reference_error=str(error))


def _in_whole(pixels: np.ndarray, part: Part | None) -> np.ndarray:
    """Return a part [h, w, ...] where it lies in its whole picture, which is black elsewhere."""
    if part is None:
        return pixels
    # Zeros that nobody looks at take no time and no memory.
    whole = np.zeros((part.height, part.width, *pixels.shape[2:]), dtype=pixels.dtype)
    high, wide = pixels.shape[:2]
    whole[part.top : part.top + high, part.left : part.left + wide] = pixels
    return whole


def _check_part(size: tuple[int, int], part: Part, mask: Mask | None) -> None:
    """Raise ImageError where a part is less of its picture than is looked at."""
    if mask is None:
        raise ImageError("part must come with a mask. Got none.")
    top, bottom, left, right = mask.box
    needed = looked_at(Box(left, top, right, bottom), (part.width, part.height))
    sent = Box(part.left, part.top, part.left + size[0], part.top + size[1])
    if not sent.holds(needed):
        raise ImageError(f"part must hold what is looked at, {needed}. Got {sent}.")


def _open(picture: Picture, *, field: str, max_pixels: int) -> Image.Image:
    if isinstance(picture, str):
        return open_png(picture, field=field, max_pixels=max_pixels)
    return open_file(picture, field=field, max_pixels=max_pixels)


def _digest(picture: Picture | None) -> bytes:
    if picture is None:
        return b""
    raw = picture.encode("utf-8", "surrogatepass") if isinstance(picture, str) else picture
    return hashlib.sha256(raw).digest()


def _target(request: ScoreRequest) -> str:
    for field, value, limit in (
        ("prompt", request.prompt, MAX_PROMPT_CHARS),
        ("text", request.text or "", MAX_TEXT_CHARS),
    ):
        if len(value) > limit:
            raise ItemError(f"{field} must have at most {limit} characters. Got {len(value)}.")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ItemError(f"{field} must be Unicode. Got half of a surrogate pair in it.")
    try:
        text = request.text if request.text is not None else text_from_prompt(request.prompt)
    except ValueError as error:
        raise ItemError(str(error)) from None
    if not normalise(text):
        raise ItemError(f"text must hold at least one character that is not a space. Got {text!r}.")
    return text
