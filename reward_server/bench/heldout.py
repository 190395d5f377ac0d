"""OCR components of right, slightly wrong, mirrored and empty pictures: which can be a reward."""

import random
import statistics
from collections.abc import Callable

from PIL import Image, ImageOps

from reward_server.bench.pictures import LETTERS, picture, words
from reward_server.scorers.ocr.scorer import OCRScorer

_SIZE = (112, 36)


def heldout(count: int, threads: int) -> dict:
    """Return mean components of pictures: right, one letter of five wrong, mirrored, empty.

    A quarter of the pictures is of each kind.
    """
    rng = random.Random(7)
    scorer = OCRScorer(num_threads=threads)
    targets = words(count // 4, seed=1)

    def spoiled(word: str) -> str:
        place = rng.randrange(len(word))
        return (
            word[:place]
            + rng.choice([one for one in LETTERS if one != word[place]])
            + word[place + 1 :]
        )

    kinds: dict[str, Callable[[str], Image.Image]] = {
        "right": lambda word: picture(word, _SIZE),
        "one_wrong": lambda word: picture(spoiled(word), _SIZE),
        "mirrored": lambda word: ImageOps.mirror(picture(word, _SIZE)),
        "empty": lambda word: picture("", _SIZE),
    }
    table = {}
    for kind, paint in kinds.items():
        scores = scorer.score([paint(word) for word in targets], targets)
        table[kind] = {
            part: statistics.mean(getattr(score, part) for score in scores)
            for part in ("accuracy", "likelihood", "confidence")
        }
    scorer.close()
    return {"pictures_per_kind": len(targets), **table}
