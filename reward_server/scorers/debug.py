"""The scorer of `--disable-reward-model`: numbers from a picture's bytes, to try out a loop."""

import hashlib
from collections.abc import Sequence

from reward_server.components import NAMES
from reward_server.scorers.base import Item, Outcome


class DebugScorer:
    """Answers every component; equal pictures get equal numbers in [0, 1].

    Every response is marked.
    """

    name = "debug"
    parallel, max_batch, max_wait_s = 1, 64, 0.0
    info = {"engine": "none: the reward model is disabled, the numbers mean nothing"}  # noqa: RUF012

    def __init__(self, own: tuple[str, ...] = ()):
        self.fields = NAMES + own

    def score_items(self, items: Sequence[Item]) -> list[Outcome]:
        """See Scorer."""
        return [self._score_one(item) for item in items]

    def close(self) -> None:
        """Nothing to release."""

    def _score_one(self, item: Item) -> Outcome:
        digest = hashlib.sha256(item.crop.tobytes() + item.text.encode()).digest()
        values: dict[str, float | str] = {
            field: digest[place % len(digest)] / 255 for place, field in enumerate(self.fields)
        }
        values["ocr_text"] = item.text
        return Outcome(values)
