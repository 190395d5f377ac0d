"""The canvas, and one case on it as tensors: pictures, mask, style image, reference on top."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from calligrapher.data import images
from calligrapher.data.case import Case
from calligrapher.data.crop import Box, whole
from calligrapher.data.images import (
    letterbox,
    load_mask,
    load_rgb,
    mask_to_tensor,
    stack_context,
    to_tensor,
    upright_size,
)
from calligrapher.errors import DataError


@dataclass(frozen=True)
class Canvas:
    """The size of the generated picture, in pixels, and whether the reference is stacked on top."""

    width: int
    height: int
    reference_context: bool = False

    def height_with(self, case: Case) -> int:
        """Return the height of what the model sees of `case`, its reference on top included.

        Costs the reading of the reference's header. Cases of unlike heights share no batch.
        """
        if not self.reference_context:
            return self.height
        return self.height + images.context_height(upright_size(case.reference), self.width)


@dataclass(frozen=True, eq=False)
class Prepared:
    """One case as the model takes it, on a canvas; the context strip, if any, lies on top."""

    image: Tensor  # [3, context_height + height, width] in [-1, 1]; not masked
    mask: Tensor  # [1, context_height + height, width] in {0, 1}, 1 = paint; 0 in the context strip
    target: Tensor | None  # like image, what should come out; None when the case has no target
    style_image: Image.Image  # RGB 512x512, the reference letterboxed on black: input of SigLIP
    context_height: int  # rows to crop from the top of the output; 0 without reference context


def prepare(case: Case, canvas: Canvas, *, box: Box | None = None) -> Prepared:
    """Return one case as it lies on the canvas, whose sides are multiples of 16.

    The source, or the part of it in `box`, is stretched to the canvas: the whole, as the released
    model's own scripts do. With `reference_context` the reference is stacked on top. Raises
    DataError when a file can no longer be read, or when nothing of the mask is left at this size.
    """
    size = (canvas.width, canvas.height)
    reference = load_rgb(case.reference)
    mask = mask_on_canvas(case, canvas, box=box)
    context = None
    if canvas.reference_context:
        context = images.reference_context(reference, canvas.width)

    def on_canvas(path: Path) -> tuple[Image.Image, Image.Image]:
        picture = load_rgb(path)
        picture = picture.crop(box or whole(picture.size)).resize(size, Image.Resampling.LANCZOS)
        return (picture, mask) if context is None else stack_context(context, picture, mask)

    source, canvas_mask = on_canvas(case.source)
    target = None if case.target is None else on_canvas(case.target)[0]
    return Prepared(
        image=to_tensor(source, *source.size),
        mask=mask_to_tensor(canvas_mask, *canvas_mask.size),
        target=None if target is None else to_tensor(target, *target.size),
        style_image=letterbox(reference),
        context_height=0 if context is None else context.height,
    )


def mask_on_canvas(case: Case, canvas: Canvas, *, box: Box | None = None) -> Image.Image:
    """Return the mask, or the part of it in `box`, at the size of the canvas; 0 and 255 only.

    Raises DataError when no white pixel of it is left.
    """
    mask = load_mask(case.mask)
    size = (canvas.width, canvas.height)
    mask = mask.crop(box or whole(mask.size)).resize(size, Image.Resampling.NEAREST)
    if mask.getbbox() is None:
        raise DataError(
            f"{case.mask} must have a white pixel left on a {canvas.width}x{canvas.height} canvas."
            " Found none. Paint more, or use a larger canvas."
        )
    return mask
