"""Cuts cases out of a picture of several texts: one is masked, another one is the reference.

What stands where is found by others (an OCR engine); here it is decided which texts make good
cases.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, Field, field_validator

from calligrapher.data.case import checked_text
from calligrapher.data.crop import Box
from calligrapher.errors import DataError

MAX_COVERED = 0.05  # share of another text that a mask may hide
_UPRIGHT = 1.5  # times as tall as wide: turned before it is read, so its letters lie on their side


@dataclass(frozen=True)
class TextPlace:
    """One text of a picture: what was read, how surely, and where."""

    text: str
    confidence: float
    corners: tuple[tuple[float, float], ...]  # 4 in px, clockwise from the text's own top left

    @property
    def height(self) -> float:
        """Mean length in px of the sides at the text's beginning and end."""
        a, b, c, d = np.asarray(self.corners, dtype=float)
        return float(np.linalg.norm(d - a) + np.linalg.norm(c - b)) / 2

    @property
    def width(self) -> float:
        """Mean length in px of the sides above and below the text."""
        a, b, c, d = np.asarray(self.corners, dtype=float)
        return float(np.linalg.norm(b - a) + np.linalg.norm(c - d)) / 2

    def box(self, size: tuple[int, int], margin: float = 0) -> Box:
        """The upright box around the corners, `margin` px wider, inside a picture of `size`."""
        xs, ys = zip(*self.corners, strict=True)
        left, top = (max(0, int(np.floor(min(values) - margin))) for values in (xs, ys))
        right, bottom = (
            min(side, int(np.ceil(max(values) + margin)) + 1)
            for side, values in zip(size, (xs, ys), strict=True)
        )
        return left, top, right, bottom


class Rules(BaseModel):
    """Which texts make cases, and how they are masked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    min_height: Annotated[float, Field(gt=0)] = Field(
        16, description="Least height of a text in px."
    )
    min_confidence: Annotated[float, Field(ge=0, le=1)] = Field(
        0.9, description="Least OCR confidence."
    )
    max_length: Annotated[int, Field(ge=1)] = Field(40, description="Most characters of a text.")
    pattern: str | None = Field(
        None, description="Regular expression that a whole text must match."
    )
    grow: Annotated[float, Field(ge=0, le=1)] = Field(
        0.15, description="How far a mask reaches beyond the text's box, as a share of its height."
    )
    self_reference: bool = Field(
        False,
        description="Take the text itself as the reference; false = another text of the picture.",
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"must be a regular expression. Got {pattern!r}: {error}.") from error
        return pattern


@dataclass(frozen=True)
class Cut:
    """A case inside a picture."""

    text: str
    mask: Image.Image  # mode L, 0 and 255, as large as the picture
    reference: Box


def cut_cases(
    size: tuple[int, int], places: Sequence[TextPlace], rules: Rules
) -> tuple[list[Cut], Counter[str]]:
    """Return the cases in the order of the places, and reason -> number of texts without one."""
    cuts_or_reasons = [_cut(size, place, places=places, rules=rules) for place in places]
    cuts = [cut for cut in cuts_or_reasons if isinstance(cut, Cut)]
    return cuts, Counter(reason for reason in cuts_or_reasons if isinstance(reason, str))


def _cut(
    size: tuple[int, int], place: TextPlace, *, places: Sequence[TextPlace], rules: Rules
) -> Cut | str:
    """Return the case that writes the text of `place`, or why it makes none."""
    others = [other for other in places if other is not place]
    if reason := _illegible(place, rules) or _unwanted(place, rules):
        return reason
    mask = text_mask(size, place, rules.grow)
    if mask.getextrema()[0] == 255:
        return "fills the picture"
    if any(_covered(mask, other) > MAX_COVERED for other in others):
        return "too near to another text"
    if rules.self_reference:
        return Cut(place.text.strip(), mask, place.box(size, rules.grow * place.height))
    box = _reference(mask, place, others=others, rules=rules)
    return "no other text for the reference" if box is None else Cut(place.text.strip(), mask, box)


def text_mask(size: tuple[int, int], place: TextPlace, grow: float) -> Image.Image:
    """Return a mask, white on the text and `grow` times its height (at least 2 px) around it."""
    margin = max(2, round(grow * place.height))
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).polygon(place.corners, fill=255)
    left, top, right, bottom = place.box(size, margin)
    points = np.moveaxis(np.mgrid[top:bottom, left:right][::-1], 0, -1)  # [h, w, 2] as (x, y)
    corners = np.asarray(place.corners, dtype=float)
    for start, side in zip(corners, np.roll(corners, -1, axis=0) - corners, strict=True):
        along = ((points - start) @ side / max(side @ side, 1e-9)).clip(0, 1)
        distance = np.linalg.norm(points - (start + along[..., None] * side), axis=-1)
        mask.paste(255, (left, top), Image.fromarray(distance <= margin))
    return mask


def _illegible(place: TextPlace, rules: Rules) -> str | None:
    """Return why its letters are no good as a style; None where they are good."""
    if place.height >= _UPRIGHT * place.width:
        return "letters on their side"
    if place.height < rules.min_height:
        return f"lower than {rules.min_height:g} px"
    if place.confidence < rules.min_confidence:
        return f"read with less confidence than {rules.min_confidence:g}"
    return None


def _unwanted(place: TextPlace, rules: Rules) -> str | None:
    """Return why its text is not to be written; None where it is."""
    try:
        text = checked_text(place.text)
    except DataError:
        return "not a text of one line with a visible character"
    if len(text) > rules.max_length:
        return f"longer than {rules.max_length} characters"
    if rules.pattern is not None and not re.fullmatch(rules.pattern, text):
        return "does not match the pattern"
    return None


def _covered(mask: Image.Image, place: TextPlace) -> float:
    """Return the share of a place that the mask hides."""
    box = place.box(mask.size)
    if box[0] >= box[2] or box[1] >= box[3]:
        return 0.0
    shape = Image.new("L", (box[2] - box[0], box[3] - box[1]))
    ImageDraw.Draw(shape).polygon([(x - box[0], y - box[1]) for x, y in place.corners], fill=255)
    inside = np.asarray(shape) > 0
    return float((np.asarray(mask.crop(box)) > 0)[inside].mean()) if inside.any() else 0.0


def _reference(
    mask: Image.Image, place: TextPlace, *, others: Sequence[TextPlace], rules: Rules
) -> Box | None:
    """Return the box of the legible text nearest in height that shows nothing of the mask."""
    styles = [other for other in others if _illegible(other, rules) is None]
    for style in sorted(styles, key=lambda style: abs(np.log(style.height / place.height))):
        box = style.box(mask.size, margin=rules.grow * style.height)
        if mask.crop(box).getbbox() is None:
            return box
    return None
