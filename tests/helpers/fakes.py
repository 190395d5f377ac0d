"""Scorers and pictures for tests of everything around the models."""

import base64
import io
import threading
import time

import numpy as np
from PIL import Image

from reward_server.components import Letter
from reward_server.scorers.base import Outcome, ScorerUnavailableError


class FakeScorer:
    """Scores `text` by its length; obeys it: 'boom' raises, 'slow' waits, 'gone' is unavailable.

    Letters are as likely as they come late, and 1 px wide.
    """

    name = "ocr"
    fields = ("ocr_text", "ocr_confidence", "ocr_accuracy", "ocr_likelihood")
    info = {"engine": "fake"}  # noqa: RUF012

    def __init__(self, *, parallel=1, max_batch=4, max_wait_s=0.0, delay_s=0.0, pairs=False):
        self.parallel, self.max_batch, self.max_wait_s, self.delay_s = (
            parallel,
            max_batch,
            max_wait_s,
            delay_s,
        )
        self.pairs = pairs  # one item costs as much as two
        self.batches: list[int] = []
        self.seen: list[str] = []
        self.closed = self.broken = False
        self.gate = threading.Event()
        self.gate.set()

    def score_items(self, items):
        self.gate.wait(20)
        time.sleep(self.delay_s)
        if self.broken:
            raise RuntimeError("the device is lost")
        if any(item.text == "gone" for item in items):
            raise ScorerUnavailableError("nobody there")
        if any(item.text == "boom" for item in items):
            raise ValueError("a number that nobody has seen")
        if any(item.text == "slow" for item in items):
            time.sleep(1.0)
        self.batches.append(len(items))
        self.seen += [item.text for item in items]
        return [self._outcome(item) for item in items]

    def close(self):
        self.closed = True

    @staticmethod
    def _outcome(item):
        share = len(item.text) / 256
        values = {"ocr_text": item.text, "ocr_confidence": share, "ocr_accuracy": share}
        if item.text == "half":
            return Outcome(values, {"ocr_likelihood": "no alphabet"})
        letters = [
            Letter(place / len(item.text), place, 0.0, place + 1, item.image.shape[0])
            for place in range(len(item.text))
        ]
        told = letters if item.letters else None
        return Outcome({**values, "ocr_likelihood": share}, letters=told)


def png(width=12, height=8, colour="white", mode="RGB") -> str:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), colour).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def noisy_png(side: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(side).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
