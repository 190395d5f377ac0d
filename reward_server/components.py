"""What is measured of a picture: names, ranges and weights, written once (standard library only).

The server answers these fields, the client returns them, a training weighs them. A new one is a
field of `Measured`, in the order in which a reward adds its parts up. Users' scorers add components
that stand in no table (`scorer_files`): a number up to 1 under a name that is not in `NAMES`.
"""

from dataclasses import dataclass, field, fields
from typing import Any


def _measured(
    *,
    by: str,
    weight: str | None = None,
    lowest: float | None = 0.0,
    sees_reference: bool = False,
    weighable: bool = False,
) -> Any:
    """Declare a component.

    by: the option with which a server measures it. weight: the key of `params.reward` that weighs
    it, if any. lowest: it is a number of `lowest`..1; None = a text. sees_reference: whether it
    depends on the reference picture too. weighable: it may be part of a reward, by
    `params.reward.weights`, without a key of its own.
    """
    facts = {"by": by, "weight": weight, "lowest": lowest, "sees_reference": sees_reference}
    facts |= {"weighable": weighable or weight is not None}
    return field(default=None, metadata=facts)


_OCR = "--ocr-engine onnxruntime"
_LINES = f"{_OCR} and --ocr-mode auto"


@dataclass(frozen=True)
class Measured:
    """What one picture was measured to be; None stands for what could not be measured.

    Example: `Measured(ocr_text="Hi", ocr_confidence=0.9, ocr_accuracy=1.0)`.
    """

    ocr_text: str | None = _measured(by=_OCR, lowest=None)
    ocr_confidence: float | None = _measured(by=_OCR)
    ocr_accuracy: float | None = _measured(by=_OCR, weight="ocr_weight")
    ocr_likelihood: float | None = _measured(by=_OCR, weight="likelihood_weight")
    vlm_score: float | None = _measured(
        by="--vlm-model-path or --vlm-url", weight="vlm_weight", sees_reference=True
    )
    style_score: float | None = _measured(
        by="--siglip-path", weight="style_weight", lowest=-1.0, sees_reference=True
    )


@dataclass(frozen=True)
class Letter:
    """One character of the target as a picture shows it: how likely it is, and where it stands.

    likelihood: 0..1, the highest probability that the recogniser gives it where the likeliest
    alignment puts it. The box is upright, in px of the whole picture.
    """

    likelihood: float
    left: float
    top: float
    right: float
    bottom: float


LETTERS = "ocr_letters"  # the field of an answer that has one for each character, where asked for

_FACTS = {one.name: one.metadata for one in fields(Measured)}
NAMES = tuple(_FACTS)
# Component -> the option with which a server measures it.
MEASURED_BY: dict[str, str] = {name: facts["by"] for name, facts in _FACTS.items()}
# Component -> the key of `params.reward` that weighs it, for those that can be part of a reward.
WEIGHT_OF: dict[str, str] = {
    name: facts["weight"] for name, facts in _FACTS.items() if facts["weight"] is not None
}
# Component -> the smallest number that it may be; the largest is always 1.
LOWEST: dict[str, float] = {
    name: facts["lowest"] for name, facts in _FACTS.items() if facts["lowest"] is not None
}
# Those that depend on the reference picture too.
SEES_REFERENCE = frozenset(name for name, facts in _FACTS.items() if facts["sees_reference"])
STYLE = "style_score"
# What OCR read of the text, as `reward.factors` may lessen it.
LESSENED = ("ocr_accuracy", "ocr_likelihood")
# How well a text can be seen, 0..1: what a server measures besides where it looks for lines. They
# may lessen what is read (`reward.factors`).
FACTORS = (
    "ocr_visibility",
    "ocr_upright",
    "ocr_unstruck",
    "ocr_sharpness",
    "ocr_inside",
    "ocr_size",
)
# Those that may be part of a reward.
WEIGHABLE = tuple(name for name, facts in _FACTS.items() if facts["weighable"])


def is_weighable(name: str) -> bool:
    """Whether a component may be part of a reward: one of `WEIGHABLE`, or a user's own."""
    return name in WEIGHABLE or name not in NAMES


def measured_by(name: str) -> str:
    """Return the option with which a server measures a component, also a user's own."""
    return _LINES if name in FACTORS else MEASURED_BY.get(name, f"--scorer {name}=FILE:CLASS")
