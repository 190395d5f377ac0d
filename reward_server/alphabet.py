"""The letters that a recogniser can give, known without loading the engine.

What no picture can be read as has no score: params and data sets are held against it before a run.
"""

import functools
import unicodedata
from importlib.util import find_spec
from pathlib import Path

from reward_server.text import Match, normalise, normalise_exact

REC_FILE = "PP-OCRv6_rec_small.onnx"


class Alphabet:
    """Which output classes spell which character.

    `characters`: the class labels in order, class 0 = blank. `match` loose: whatever its case and
    width; classes whose labels normalise to the same text ('A' and 'a') count as one, and classes
    that normalise to nothing (the space) count as blank. exact: case and spaces count. A sign that
    only folds to a letter of the other writing direction (the mathematical alef) does not spell it.
    """

    def __init__(self, characters: list[str], match: Match = "loose"):
        self.classes: dict[str, list[int]] = {}
        self.blank = [0]
        self._exact = match == "exact"
        for index, label in enumerate(characters[1:], start=1):
            key = self._key(label)
            if not key:
                self.blank.append(index)
            elif _direction(key) == _direction(label):
                self.classes.setdefault(key, []).append(index)
        self.spaces = self.classes.get(" ", [])

    def _key(self, label: str) -> str:
        if not self._exact:
            return normalise(label)
        return " " if label.isspace() else normalise_exact(label)

    def spell(self, text: str) -> list[str]:
        """The text as keys of `classes`, one per character.

        A character whose folded form is longer ('ß' -> 'ss') is one key if a class has that form,
        else several. Keys without a class are kept.
        """
        if self._exact:
            return list(normalise_exact(text))
        keys: list[str] = []
        for char in unicodedata.normalize("NFKC", text):
            folded = normalise(char)
            keys.extend([folded] if folded in self.classes else folded)
        return keys

    def missing(self, text: str) -> list[str]:
        """Characters of the text which no class spells, each once, in order."""
        return list(dict.fromkeys(key for key in self.spell(text) if key not in self.classes))


def _direction(text: str) -> bool:
    return unicodedata.bidirectional(text[0]) in {"R", "AL"}


@functools.cache
def bundled_alphabet(match: Match = "loose") -> Alphabet:
    """Return the alphabet of the bundled recogniser, that of `--ocr-engine onnxruntime`.

    Raises FileNotFoundError or ImportError where the extra `reward` is not installed.
    """
    # As PaddleOCR does: the blank before, the space after.
    return Alphabet(["blank", *characters_of(bundled(REC_FILE)), " "], match)


def characters_of(weights: Path) -> list[str]:
    """Return the characters that an ONNX recogniser carries in its metadata."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(weights), providers=["CPUExecutionProvider"])
    return session.get_modelmeta().custom_metadata_map["character"].split("\n")


def bundled(file_name: str) -> Path:
    """Path of weights inside the installed `rapidocr` wheel. Raises FileNotFoundError."""
    spec = find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the OCR weights come from the `rapidocr` wheel, which must be installed."
        )
    path = Path(spec.origin).parent / "models" / file_name
    if not path.is_file():
        raise FileNotFoundError(f"{path} must exist. Install the pinned rapidocr version again.")
    return path
