"""What is measured of a picture: names, ranges and weights, written once (standard library only).

The server answers these fields, the client returns them, a training weighs them. A new one is a
field of `Measured`, in the order in which a reward adds its parts up.
"""

from dataclasses import dataclass, field, fields
from typing import Any


def _number(*, weight: str | None = None, lowest: float = 0.0, sees_reference: bool = False) -> Any:
    """Declare a number of `lowest`..1.

    weight: the key of `params.reward` that weighs it, if any. sees_reference: whether it depends on
    the reference picture too.
    """
    facts = {"weight": weight, "lowest": lowest, "sees_reference": sees_reference}
    return field(default=None, metadata=facts)


@dataclass(frozen=True)
class Measured:
    """What one picture was measured to be; None stands for what could not be measured.

    Example: `Measured(ocr_text="Hi", ocr_confidence=0.9, ocr_accuracy=1.0)`.
    """

    ocr_text: str | None = None
    ocr_confidence: float | None = _number()
    ocr_accuracy: float | None = _number(weight="ocr_weight")
    ocr_likelihood: float | None = _number(weight="likelihood_weight")
    vlm_score: float | None = _number(weight="vlm_weight", sees_reference=True)
    style_score: float | None = _number(weight="style_weight", lowest=-1.0, sees_reference=True)


NAMES = tuple(one.name for one in fields(Measured))
# Component -> key of `params.reward`, for those that can be part of a reward.
WEIGHT_OF: dict[str, str] = {
    one.name: one.metadata["weight"] for one in fields(Measured) if one.metadata.get("weight")
}
SEES_REFERENCE = frozenset(
    one.name for one in fields(Measured) if one.metadata.get("sees_reference")
)
# Component -> the smallest number that it may be; the largest is always 1.
LOWEST: dict[str, float] = {
    one.name: one.metadata["lowest"] for one in fields(Measured) if "lowest" in one.metadata
}
