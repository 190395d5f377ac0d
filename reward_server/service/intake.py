"""A request -> what the scorers see: pictures checked by their headers, then decoded."""

from dataclasses import dataclass, replace

from PIL import Image

from reward_server.scorers.base import Item
from reward_server.service.images import ImageError, bounding_box, decode_mask, decode_rgb, open_png
from reward_server.service.schema import MAX_PROMPT_CHARS, MAX_TEXT_CHARS, ScoreRequest
from reward_server.text import normalise, text_from_prompt


class ItemError(ValueError):
    """This item cannot be scored as it was sent."""


@dataclass(frozen=True)
class Opened:
    """A request's pictures, their headers checked, no pixel decoded yet."""

    image: Image.Image
    mask: Image.Image | None
    # What is wrong with a reference costs those who look at it, not the whole item.
    reference: Image.Image | ImageError | None

    @property
    def pixels(self) -> int:
        """How many the pictures have together."""
        pictures = (self.image, self.mask, self.reference)
        return sum(one.width * one.height for one in pictures if isinstance(one, Image.Image))


def open_pictures(request: ScoreRequest, max_pixels: int) -> Opened | ItemError:
    """Return the request's pictures, no pixel decoded yet, or what is wrong with them."""
    mask = reference = None
    try:
        image = open_png(request.image, field="image", max_pixels=max_pixels)
        if request.mask is not None:
            mask = open_png(request.mask, field="mask", max_pixels=max_pixels)
    except ImageError as error:
        return ItemError(str(error))
    if mask is not None and mask.size != image.size:
        return ItemError(
            f"mask must be of the image's size {image.size}. Got {mask.size} (width, height)."
        )
    if request.reference is not None:
        try:
            reference = open_png(request.reference, field="reference", max_pixels=max_pixels)
        except ImageError as error:
            return Opened(image, mask, error)
    return Opened(image, mask, reference)


def decode(request: ScoreRequest, opened: Opened) -> Item:
    """Return the item of a request. Raises ItemError: no text, a damaged picture, a black mask."""
    text = _target(request)
    try:
        mask = box = None
        image = decode_rgb(opened.image, field="image")
        crop = image
        if opened.mask is not None:
            mask = decode_mask(opened.mask)
            box = top, bottom, left, right = bounding_box(mask)
            crop = image[top:bottom, left:right]
    except ImageError as error:
        raise ItemError(str(error)) from None
    item = Item(image, crop, text, mask is not None, mask, box, prompt=request.prompt)
    if opened.reference is None:
        return item
    try:
        if isinstance(opened.reference, ImageError):
            raise opened.reference
        return replace(item, reference=decode_rgb(opened.reference, field="reference"))
    except ImageError as error:
        return replace(item, reference_error=str(error))


def _target(request: ScoreRequest) -> str:
    for field, value, limit in (
        ("prompt", request.prompt, MAX_PROMPT_CHARS),
        ("text", request.text or "", MAX_TEXT_CHARS),
    ):
        if len(value) > limit:
            raise ItemError(f"{field} must have at most {limit} characters. Got {len(value)}.")
    try:
        text = request.text if request.text is not None else text_from_prompt(request.prompt)
    except ValueError as error:
        raise ItemError(str(error)) from None
    if not normalise(text):
        raise ItemError(f"text must hold at least one character that is not a space. Got {text!r}.")
    return text
