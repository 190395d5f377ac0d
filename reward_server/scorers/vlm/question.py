"""What both VLM scorers share: the question asked, and how an answer becomes a score in [0, 1]."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal

from reward_server.scorers.base import Item

Mode = Literal["expectation", "generate"]

DIGITS = "0123456789"
_BEST_DIGIT, _BEST_NUMBER = 9, 10.0
_ANSWER = re.compile(r"<score>\s*(-?\d+(?:\.\d+)?)\s*</score>", re.IGNORECASE)


class NoScoreError(ValueError):
    """The model's answer holds no score."""


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
        """The question about one item, with its text put in."""
        template = self.plain if item.reference is None else self.with_reference
        return Template(template).safe_substitute(text=item.text)

    @property
    def digest(self) -> str:
        return hashlib.sha256(
            "\0".join((self.mode, self.plain, self.with_reference)).encode()
        ).hexdigest()


def expectation(digit_probs: Mapping[str, float], *, min_mass: float) -> float:
    """Expected digit / 9, over the digits' probabilities made to sum to 1.

    By hand: P(9) = .6, P(0) = .2 -> .6 / .8 = .75. Raises NoScoreError when the digits hold less
    than `min_mass` of the probability: the model was about to say something else.
    """
    mass = sum(digit_probs.values())
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
