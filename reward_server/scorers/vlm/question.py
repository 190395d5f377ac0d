"""What both VLM scorers share: the question asked, and how an answer becomes a score in [0, 1]."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal

import numpy as np
from PIL import Image

from reward_server.scorers.base import Item

Mode = Literal["expectation", "generate"]
Box = tuple[int, int, int, int]  # top, bottom, left, right; ends exclusive

DIGITS = "0123456789"
_BEST_DIGIT, _BEST_NUMBER = 9, 10.0
_PLACE = (
    "A red frame in the first picture marks the place where the text was to be painted; the last"
    " picture shows this place up close.\n"
)
_FRAME = (255, 0, 0)
_NEARLY_ALL = 0.8  # share of the picture from which on the mask's box tells a judge nothing
_CLOSE_UP_SIDE = 336  # px of a close-up's longer side, at least
_ROUNDING = 0.01  # by which ten rounded probabilities may exceed 1 together
_ANSWER = re.compile(r"<score>\s*(-?\d+(?:\.\d+)?)\s*</score>", re.IGNORECASE)


class NoScoreError(ValueError):
    """The model's answer holds no score."""


class DeniedError(ValueError):
    """The model's server does not answer what it is asked: key, model name or set-up are wrong."""


@dataclass(frozen=True)
class Question:
    """The templates of a mode: with a reference picture and without.

    `$text` stands for the target text.
    """

    mode: Mode
    plain: str
    with_reference: str

    @classmethod
    def load(cls, mode: Mode, path: Path | None = None) -> "Question":
        """Return the packaged templates, or one file for both cases.

        Raises ValueError when `$text` is missing.
        """
        if path is None:
            folder = files("reward_server.scorers.vlm") / "prompts"
            plain, with_reference = (
                (folder / f"{mode}{suffix}.txt").read_text(encoding="utf-8")
                for suffix in ("", "_reference")
            )
        else:
            plain = with_reference = path.read_text(encoding="utf-8")
        for template in (plain, with_reference):
            if "$text" not in template:
                raise ValueError(
                    f"a prompt template must hold $text. Got {path or mode}: {template[:80]!r}."
                )
        return cls(mode, plain.strip(), with_reference.strip())

    def ask(self, item: Item) -> str:
        """The question about one item, with its text put in; where to look comes first."""
        template = self.plain if item.reference is None else self.with_reference
        place = "" if _place(item) is None else _PLACE
        return place + Template(template).safe_substitute(text=item.text)

    @property
    def digest(self) -> str:
        return hashlib.sha256(
            "\0".join((self.mode, _PLACE, self.plain, self.with_reference)).encode()
        ).hexdigest()


def pictures(item: Item) -> list[np.ndarray]:
    """What is shown with the question, each uint8 RGB [H, W, 3].

    The picture, the reference if there is one; and where a mask says that only a part was painted,
    a frame around that part and, last, the part up close.
    """
    place = _place(item)
    shown = [item.image if place is None else framed(item.image, place)]
    if item.reference is not None:
        shown.append(item.reference)
    if place is not None:
        shown.append(close_up(item.image, place))
    return shown


def framed(image: np.ndarray, box: Box) -> np.ndarray:
    """A copy of a picture with a red frame just outside of `box`: nothing inside is covered."""
    top, bottom, left, right = box
    width = max(1, round(max(image.shape[:2]) / 200))
    marked = image.copy()
    marked[max(0, top - width) : bottom + width, max(0, left - width) : right + width] = _FRAME
    marked[top:bottom, left:right] = image[top:bottom, left:right]
    return marked


def close_up(image: np.ndarray, box: Box) -> np.ndarray:
    """The box with half of its shorter side around it; small ones enlarged."""
    top, bottom, left, right = box
    margin = min(bottom - top, right - left) // 2
    part = image[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin]
    height, width = part.shape[:2]
    scale = _CLOSE_UP_SIDE / max(height, width)
    if scale <= 1:
        return part
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BICUBIC))


def _place(item: Item) -> Box | None:
    """The mask's box where it is worth showing: not when it is nearly the whole picture."""
    if item.box is None:
        return None
    top, bottom, left, right = item.box
    height, width = item.image.shape[:2]
    whole = (bottom - top) * (right - left) >= _NEARLY_ALL * height * width
    return None if whole else item.box


def expectation(digit_probs: Mapping[str, float], *, min_mass: float) -> float:
    """Expected digit / 9, over the digits' probabilities made to sum to 1.

    By hand: P(9) = .6, P(0) = .2 -> .6 / .8 = .75. Raises NoScoreError when the digits hold less
    than `min_mass` of the probability (the model was about to say something else) or more than all
    of it (they are no probabilities).
    """
    mass = sum(digit_probs.values())
    if mass > 1 + _ROUNDING:
        raise NoScoreError(
            f"probabilities must add up to at most 1. Got {mass:.3g} for the digits."
        )
    if mass < min_mass or mass <= 0:
        raise NoScoreError(
            f"the digits must hold at least {min_mass:g} of the answer's probability. Got"
            f" {mass:.3g}."
        )
    return sum(int(digit) * prob for digit, prob in digit_probs.items()) / mass / _BEST_DIGIT


def parse_answer(answer: str) -> float:
    """n / 10 of the last `<Score>n</Score>` in a written answer. Raises NoScoreError."""
    numbers = _ANSWER.findall(answer)
    if not numbers:
        raise NoScoreError(f"the answer must hold <Score>n</Score>. Got {answer[-200:]!r}.")
    score = float(numbers[-1])
    if not 0 <= score <= _BEST_NUMBER:
        raise NoScoreError(f"the score must lie in 0..{_BEST_NUMBER:g}. Got {score:g}.")
    return score / _BEST_NUMBER
