"""A control: style rewarded by another case's reference than the model is shown, so style must not
rise.

    control="tests/scripts/shuffled_style.py:ShuffledStyle?siglip=SIGLIP&references=CASES"
    calligrapher train tiny-nft run=shuffled reward.style_weight=1e-9 reward.weights.shuffled=1 \\
        reward.scorers.shuffled="$control"

SIGLIP is the model's (`calligrapher/tiny/data/siglip`), CASES those that a run has drawn before
(`runs/data/tiny-train-512`).

A weight of 1e-9 rewards nothing of the right reference, and has it measured all the same.
"""

import zlib
from pathlib import Path

import numpy as np

from calligrapher.data.images import load_rgb
from reward_server.scorers.style import StyleScorer


class ShuffledStyle:
    """The style score against a picture of `references`, always the same one for an item's own.

    siglip: the folder of its SigLIP. references: a folder of cases in the bench layout.
    """

    sees_reference = True

    def __init__(self, siglip: str, references: str):
        self.references = sorted(Path(references).glob("test*_ref.png"))
        if not self.references:
            raise ValueError(f"references must hold test*_ref.png. Found none in {references}.")
        self.scorer = StyleScorer.load(Path(siglip), device="cpu", max_wait_s=0.0)

    def score(self, items):
        """Return a style score in [0, 1] for each item."""
        found = []
        for item in items:
            place = zlib.crc32(np.ascontiguousarray(item.reference)) % len(self.references)
            other = np.asarray(load_rgb(self.references[place]))
            found.append(self.scorer.match(*self.scorer.embed([item.crop, other])))
        return found
