"""A request -> what the scorers see: pictures checked by their headers, then decoded."""

from PIL import Image

from reward_server.scorers.base import Item
from reward_server.service.images import ImageError, bounding_box, decode_mask, decode_rgb, open_png
from reward_server.service.schema import ScoreRequest
from reward_server.text import normalise, text_from_prompt

Opened = dict[str, Image.Image]  # field -> picture whose header was checked


class ItemError(ValueError):
    """This item cannot be scored as it was sent."""


def open_pictures(request: ScoreRequest, max_pixels: int) -> Opened | ItemError:
    """Return the request's pictures, no pixel decoded yet, or what is wrong with them."""
    sent = {"image": request.image, "mask": request.mask, "reference": request.reference}
    try:
        opened = {
            field: open_png(data, field=field, max_pixels=max_pixels)
            for field, data in sent.items()
            if data is not None
        }
    except ImageError as error:
        return ItemError(str(error))
    if "mask" in opened and opened["mask"].size != opened["image"].size:
        return ItemError(
            f"mask must be of the image's size {opened['image'].size}. "
            f"Got {opened['mask'].size} (width, height)."
        )
    return opened


def pixels_of(opened: Opened | ItemError) -> int:
    """Pixels of all pictures of an item; none when it is refused."""
    if isinstance(opened, ItemError):
        return 0
    return sum(image.width * image.height for image in opened.values())


def decode(request: ScoreRequest, opened: Opened) -> Item:
    """The item of a request. Raises ItemError: no text, a damaged picture, a black mask."""
    text = _target(request)
    try:
        image = crop = decode_rgb(opened["image"], field="image")
        if "mask" in opened:
            top, bottom, left, right = bounding_box(decode_mask(opened["mask"]))
            crop = image[top:bottom, left:right]
        reference = (
            decode_rgb(opened["reference"], field="reference") if "reference" in opened else None
        )
    except ImageError as error:
        raise ItemError(str(error)) from None
    return Item(image=image, crop=crop, text=text, has_mask="mask" in opened, reference=reference)


def _target(request: ScoreRequest) -> str:
    try:
        text = request.text if request.text is not None else text_from_prompt(request.prompt)
    except ValueError as error:
        raise ItemError(str(error)) from None
    if not normalise(text):
        raise ItemError(f"text must hold at least one character that is not a space. Got {text!r}.")
    return text
