"""The scorer of `--disable-reward-model`: numbers made up from the picture's bytes, to try a loop
out."""

import hashlib
from collections.abc import Sequence

from reward_server.components import NAMES
from reward_server.scorers.base import Item, Outcome


class DebugScorer:
    """Answers every component; equal pictures get equal numbers in [0, 1]. Marked in every
    response."""

    name = "debug"
    fields = NAMES
    parallel, max_batch, max_wait_s = 1, 64, 0.0
    info = {"engine": "none: the reward model is disabled, the numbers mean nothing"}  # noqa: RUF012

    def score_items(self, items: Sequence[Item]) -> list[Outcome]:
        """See Scorer."""
        return [self._score_one(item) for item in items]

    def close(self) -> None:
        """Nothing to release."""

    @staticmethod
    def _score_one(item: Item) -> Outcome:
        digest = hashlib.sha256(item.crop.tobytes() + item.text.encode()).digest()
        values: dict[str, float | str] = {
            field: digest[place] / 255 for place, field in enumerate(NAMES)
        }
        values["ocr_text"] = item.text
        return Outcome(values)
