"""Turns what was drawn, uploaded and typed on the page into a checked case in a folder.

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

EDITOR_SIDE = 960  # pixels; the longest side of a picture on the page
PAINT = (236, 72, 153, 153)  # RGBA of the brush
HALF = 128  # A pixel counts as painted from this alpha on.
THUMBNAIL = (32, 32)  # px
ALIKE = 16  # of 255: thumbnails of one picture differ by less, however an editor drew it


@dataclass(frozen=True)
class Taken:
    """A source as it was taken, and the mask that it came with, as `DemoInput` has them."""

    source: Image.Image
    mask: Image.Image | None = None


@dataclass(frozen=True)
class DemoInput:
    """What the page holds when pictures are asked for; None where nothing was given."""

    source: Image.Image | None
    mask: Image.Image | None  # mode L, 0 and 255, as large as the source
    reference: Image.Image | None
    text: str


def write_case(given: DemoInput, folder: Path) -> Case:
    """Return a case with its files in `folder`. Raises DataError that says what must hold."""
    for role in ("source", "reference"):
        if getattr(given, role) is None:
            raise DataError(f"There must be a {role} picture. Upload one, or choose an example.")
    if given.mask is None or given.mask.getbbox() is None:
        raise DataError(
            "The mask must have a painted pixel. Paint over the place where the text shall stand."
        )
    pictures = {"source": given.source, "mask": given.mask, "reference": given.reference}
    paths = {role: folder / f"{role}.png" for role in pictures}
    for role, picture in pictures.items():
        picture.save(paths[role])
    case = Case(case_id="sketch", text=checked_text(given.text.strip()), **paths)
    if problems := list(problems_of(case, inspect)):
        raise DataError(" ".join(problems))
    return case


def scaled_for_editor(picture: Image.Image) -> Image.Image:
    """Return the picture at the editor's size; a small one by a whole factor, its pixels crisp."""
    longest = max(picture.size)
    if longest <= EDITOR_SIDE:
        return picture.resize(
            [side * (EDITOR_SIDE // longest) for side in picture.size], Image.Resampling.NEAREST
        )
    size = [max(1, side * EDITOR_SIDE // longest) for side in picture.size]
    return picture.resize(size, Image.Resampling.LANCZOS)


def editor_value(folder: Path, source: Image.Image, mask: Image.Image | None = None) -> dict:
    """Return what the editor shows, as files in `folder`: the source, and the mask as paint."""
    background, layers = scaled_for_editor(source), []
    if mask is not None:
        layers.append(Image.new("RGBA", background.size))
        layers[0].paste(PAINT, mask=mask.resize(background.size, Image.Resampling.NEAREST))
    paint = [write_once(folder, layer) for layer in layers]
    return {"background": write_once(folder, background), "layers": paint, "composite": None}


def write_once(folder: Path, picture: Image.Image) -> str:
    """Return the picture's file in `folder`; written once: a browser may be reading it."""
    data = png_bytes(picture)
    path = folder / f"{hashlib.sha256(data).hexdigest()}.png"
    if not path.exists():
        atomic_write(path, data)
    return str(path)


def mask_on(taken: Taken, editor: dict | None) -> Image.Image | None:
    """Return what is painted over a source in the editor, or what it came with.

    The editor fetches a source after it is told of it, and tells nobody when it has drawn it: until
    then it holds the picture before, whose paint is none of this one.
    """
    shown = editor["background"] if editor else None
    if shown is None or not _alike(shown, scaled_for_editor(taken.source)):
        return taken.mask
    return mask_of_layers(editor["layers"], taken.source.size)


def _alike(one: Image.Image, other: Image.Image) -> bool:
    thumbnails = [
        np.asarray(image.convert("RGB").resize(THUMBNAIL, Image.Resampling.BOX), dtype=np.int16)
        for image in (one, other)
    ]
    return np.abs(thumbnails[0] - thumbnails[1]).max() < ALIKE


def mask_of_layers(layers: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image:
    """Return all paint of the RGBA `layers` as a mask of 0 and 255, as large as the source."""
    mask = Image.new("L", size)
    for layer in layers:
        alpha_HW = np.asarray(layer.getchannel("A").resize(size, Image.Resampling.NEAREST))
        mask.paste(255, mask=Image.fromarray(np.where(alpha_HW >= HALF, 255, 0).astype(np.uint8)))
    return mask


def uploaded_mask(path: Path, source: Image.Image) -> Image.Image:
    """Return the mask in a file. Raises DataError unless it is as large as `source`."""
    mask = load_mask(path)
    if mask.size != source.size:
        expected, actual = ("x".join(map(str, picture.size)) for picture in (source, mask))
        raise DataError(f"The mask must be as large as the source, {expected}. Found {actual}.")
    return mask
