"""One case as tensors: pictures on the canvas, the style image, and the reference on top if
wanted."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from calligrapher.data import images
from calligrapher.data.crop import Box, whole
from calligrapher.data.dataset import Case
from calligrapher.data.images import (
    letterbox,
    load_mask,
    load_rgb,
    mask_to_tensor,
    stack_context,
    to_tensor,
)
from calligrapher.errors import DataError


@dataclass(frozen=True, eq=False)
class Prepared:
    """One case as the model takes it, on a canvas of `width` x `height`; the context strip lies on
    top."""

    image: Tensor  # [3, context_height + height, width] in [-1, 1]; not masked
    mask: Tensor  # [1, context_height + height, width] in {0, 1}, 1 = paint; 0 in the context strip
    target: Tensor | None  # like image, the text written; None when the case has no target
    style_image: Image.Image  # RGB 512x512, the reference letterboxed on black: input of SigLIP
    context_height: int  # rows to crop from the top of the output; 0 without reference context

    @property
    def learned(self) -> Tensor:
        """What supervised learning paints: the target or, without one, the source itself.

        The source teaches to fill the mask with what it shows. That is right only for
        reconstruction, where the text of the case is what its source shows already.
        """
        return self.image if self.target is None else self.target


def prepare(
    case: Case, width: int, height: int, reference_context: bool, box: Box | None = None
) -> Prepared:
    """Load one case onto a canvas of `width` x `height` pixels (multiples of 16).

    The source, or the part of it in `box`, is stretched to the canvas: the whole, as the released
    model's own scripts do. With `reference_context` the reference is stacked on top. Raises
    DataError when a file can no longer be read, or when nothing of the mask is left at this size.
    """
    reference, mask = load_rgb(case.reference), load_mask(case.mask)
    mask = mask.crop(box or whole(mask.size)).resize((width, height), Image.Resampling.NEAREST)
    if mask.getbbox() is None:
        raise DataError(
            f"{case.mask} must have a white pixel left on a {width}x{height} canvas. Found none. "
            "Paint more, or use a larger canvas."
        )
    context = images.reference_context(reference, width) if reference_context else None

    def on_canvas(path: Path) -> tuple[Image.Image, Image.Image]:
        picture = load_rgb(path)
        picture = picture.crop(box or whole(picture.size)).resize(
            (width, height), Image.Resampling.LANCZOS
        )
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
