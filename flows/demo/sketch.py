"""From what was drawn, uploaded and typed on the page to a checked case in a folder.

The page shows a picture as large as is good to paint on; the mask comes back at that size and is
brought to the source's own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from calligrapher.data.case import Case, checked_text
from calligrapher.data.checks import inspect, problems_of
from calligrapher.data.images import load_mask, png_bytes
from calligrapher.durable import atomic_write
from calligrapher.errors import DataError

EASEL = 960  # pixels; the longest side of a picture on the page
PAINT = (236, 72, 153, 153)  # RGBA of the brush
HALF = 128  # A pixel counts as painted from this alpha on.


@dataclass(frozen=True)
class Sketch:
    """What the page holds when pictures are asked for; None where nothing was given."""

    source: Image.Image | None
    mask: Image.Image | None  # mode L, 0 and 255, as large as the source
    reference: Image.Image | None
    text: str


def write_case(sketch: Sketch, folder: Path) -> Case:
    """The sketch as a case with its files in `folder`. Raises DataError that says what must
    hold."""
    for role in ("source", "reference"):
        if getattr(sketch, role) is None:
            raise DataError(f"There must be a {role} picture. Upload one, or choose an example.")
    if sketch.mask is None or sketch.mask.getbbox() is None:
        raise DataError(
            "The mask must have a painted pixel. Paint over the place where the text shall stand."
        )
    pictures = {"source": sketch.source, "mask": sketch.mask, "reference": sketch.reference}
    paths = {role: folder / f"{role}.png" for role in pictures}
    for role, picture in pictures.items():
        picture.save(paths[role])
    case = Case(case_id="sketch", text=checked_text(sketch.text.strip()), **paths)
    if problems := list(problems_of(case, inspect)):
        raise DataError(" ".join(problems))
    return case


def on_easel(picture: Image.Image) -> Image.Image:
    """As large as is good to paint on: a small picture by a whole factor, its pixels kept crisp."""
    longest = max(picture.size)
    if longest <= EASEL:
        return picture.resize(
            [side * (EASEL // longest) for side in picture.size], Image.Resampling.NEAREST
        )
    size = [max(1, side * EASEL // longest) for side in picture.size]
    return picture.resize(size, Image.Resampling.LANCZOS)


def easel(folder: Path, source: Image.Image, mask: Image.Image | None = None) -> dict:
    """What the editor shows, as files in `folder`: the source, and the mask as a layer of paint on
    it."""
    background, layers = on_easel(source), []
    if mask is not None:
        layers.append(Image.new("RGBA", background.size))
        layers[0].paste(PAINT, mask=mask.resize(background.size, Image.Resampling.NEAREST))
    paint = [kept(folder, layer) for layer in layers]
    return {"background": kept(folder, background), "layers": paint, "composite": None}


def kept(folder: Path, picture: Image.Image) -> str:
    """The picture as a file in `folder`. One is written once and never again: a browser may be
    reading it."""
    data = png_bytes(picture)
    path = folder / f"{hashlib.sha256(data).hexdigest()}.png"
    if not path.exists():
        atomic_write(path, data)
    return str(path)


def painted(layers: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image:
    """All paint of the RGBA `layers` as one mask of 0 and 255, `size` = (width, height) of the
    source."""
    mask = Image.new("L", size)
    for layer in layers:
        alpha_HW = np.asarray(layer.getchannel("A").resize(size, Image.Resampling.NEAREST))
        mask.paste(255, mask=Image.fromarray(np.where(alpha_HW >= HALF, 255, 0).astype(np.uint8)))
    return mask


def uploaded_mask(path: Path, source: Image.Image) -> Image.Image:
    """A mask file for `source`. Raises DataError when the sizes differ."""
    mask = load_mask(path)
    if mask.size != source.size:
        wanted, found = ("x".join(map(str, picture.size)) for picture in (source, mask))
        raise DataError(f"The mask must be as large as the source, {wanted}. Found {found}.")
    return mask
