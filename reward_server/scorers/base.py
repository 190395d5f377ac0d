"""What a scorer is: the Protocol, the record it gets and the record it gives."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from reward_server.components import Letter
from reward_server.text import Match


@dataclass(frozen=True)
class Item:
    """One picture, decoded and checked, as every scorer sees it."""

    image: np.ndarray  # [H, W, 3] uint8 RGB, the whole picture
    crop: np.ndarray  # [h, w, 3] uint8 RGB, the mask's bounding box; all of it without a mask
    text: str  # what it should show
    has_mask: bool = True
    mask: np.ndarray | None = None  # [H, W] bool, the painted part; None without a mask
    box: tuple[int, int, int, int] | None = None  # top, bottom, left, right of the mask; ends excl.
    reference: np.ndarray | None = None  # [H', W', 3] uint8 RGB, the picture whose style was wanted
    # Why the reference that was sent cannot be used: who looks at one is not asked about this item.
    reference_error: str | None = None
    prompt: str = ""  # what the model was told
    match: Match | None = None  # whether case and spaces count; None: as the server is set up
    letters: bool = False  # whether each character of the text is asked about


@dataclass(frozen=True)
class Outcome:
    """A scorer's answer for one item: each of its fields has a value or an error, never both."""

    values: dict[str, float | str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    # Kind of the errors (see KINDS); `kinds` names the fields whose error is of another.
    kind: str = "refused"
    kinds: dict[str, str] = field(default_factory=dict)
    letters: list[Letter] | None = None  # of OCR, where the item asks for them

    def kind_of(self, field: str) -> str:
        """Kind of a field's error."""
        return self.kinds.get(field, self.kind)

    @property
    def all_kinds(self) -> set[str]:
        """Kinds of all errors."""
        return {self.kind_of(field) for field in self.errors}


# Kind of an error -> what it says of the item, and of asking again.
KINDS = {
    "refused": "it cannot be scored as it is; asking again gives the same",
    "denied": "a remote model's server refuses what it is asked: its key, model or set-up is wrong",
    "unavailable": "what the scorer depends on did not answer; asking again helps once it does",
    "timeout": "it took longer than --score-timeout",
    "exception": "the scorer failed on it",
    "no_number": "the scorer gave something that is no number of the component's range",
    "not_asked": "the request named other components",
    "not_configured": "the server has no scorer for it",
}


class ScorerUnavailableError(RuntimeError):
    """What the scorer depends on (a remote model) does not answer now; trying later may help."""


class Scorer(Protocol):
    """Turns items into outcomes.

    `score_items` is called from `parallel` threads with at most `max_batch` items. An outcome must
    not depend on the other items of its batch. An exception fails every item of the batch.
    """

    @property
    def name(self) -> str: ...

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of ScoreResponse which it answers for."""

    @property
    def parallel(self) -> int: ...

    @property
    def max_batch(self) -> int: ...

    @property
    def max_wait_s(self) -> float:
        """How long the first item of a batch may wait for company."""

    @property
    def info(self) -> dict[str, str]:
        """What decides its scores: engine, model, versions, digests of weights and prompts."""

    def score_items(self, items: Sequence[Item]) -> list[Outcome]:
        """One outcome per item, in order."""

    def close(self) -> None:
        """Release threads and connections."""


def failed(fields: Sequence[str], reason: str, kind: str = "refused") -> Outcome:
    """The outcome of an item that could not be scored."""
    return Outcome(errors=dict.fromkeys(fields, reason), kind=kind)


def is_remote(scorer: Scorer) -> bool:
    """Whether another server does the work: `remote = True` in the scorer's class says so."""
    return getattr(scorer, "remote", False)


def pairs_items(scorer: Scorer) -> bool:
    """Whether one item alone costs as much as two: `pairs = True` says so."""
    return getattr(scorer, "pairs", False)


def keeps_to_the_mask(scorer: Scorer) -> bool:
    """Whether it looks at a picture no further around the mask than `surroundings.looked_at`."""
    return getattr(scorer, "keeps_to_the_mask", False)


def probe_item() -> Item:
    """Return the picture with which a scorer shows that it works.

    It is a white strip with black bars, with any text.
    """
    image = np.full((32, 96, 3), 255, dtype=np.uint8)
    image[8:24, 20:24] = image[8:24, 40:44] = 0
    return Item(image=image, crop=image, text="ll", reference=image)
