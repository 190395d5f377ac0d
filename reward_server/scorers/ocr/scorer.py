"""The OCR scorer: what the picture says, how much of the target that is, how likely the target was.

A score depends on nothing but its own picture: forwards are single-threaded, a line is padded to a
width derived from that line alone, and it shares a forward only with lines of that width, in a way
that does not change a bit of it (`Recogniser.probs`). `num_threads` batches are read side by side.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image

from reward_server.alphabet import Alphabet
from reward_server.components import Letter
from reward_server.scorers.base import Item, Outcome
from reward_server.scorers.ocr.aspects import NAMES, Aspects
from reward_server.scorers.ocr.ctc import align, likelihood_per_character
from reward_server.scorers.ocr.letters import letter_boxes
from reward_server.scorers.ocr.models import load_detector, load_recogniser
from reward_server.scorers.ocr.reading import Picture, Piece, Reader, Reading
from reward_server.text import Match, normalise, ocr_accuracy, picture_order

# Raised with every change of what is read: part of a server's setup.
READING = 4
_READ = ("ocr_text", "ocr_confidence", "ocr_accuracy", "ocr_likelihood")


@dataclass(frozen=True)
class OCRScore:
    """A reading compared with its target.

    A part that cannot be had is None and `errors` says why.
    """

    text: str
    confidence: float
    aspects: Aspects | None = None  # None: no lines were looked for
    accuracy: float | None = None
    likelihood: float | None = None  # geometric mean per character of the target's CTC probability
    letters: list[Letter] | None = None  # in the picture's order; None: not asked for
    errors: dict[str, str] = field(default_factory=dict)


class OCRScorer:
    """PaddleOCR as a Scorer, also usable by itself through `score`.

    `mode`: auto (lines are found around the mask; one that fills it is read as the mask's box),
    scene (lines are always read as found), line (the mask's box is one line of text). `match`:
    whether case and spaces count, where an item does not say. `engine`: onnxruntime with bundled
    weights, or paddle with `model_dir` (and `det_model_dir` unless `mode` is line).
    """

    name = "ocr"
    max_batch, max_wait_s = 8, 0.0
    keeps_to_the_mask = True

    def __init__(
        self,
        *,
        num_threads: int = 1,
        mode: str = "line",
        match: Match = "loose",
        engine: str = "onnxruntime",
        model_dir: Path | None = None,
        det_model_dir: Path | None = None,
        device: str = "cpu",
    ):
        if num_threads < 1:
            raise ValueError(f"ocr_threads must be at least 1. Got {num_threads}.")
        if engine == "paddle" and mode != "line" and det_model_dir is None:
            raise ValueError(
                f"ocr_det_model_dir must be given for ocr_mode {mode} with ocr_engine paddle."
            )
        # A Paddle predictor serves one thread at a time; it may use several itself.
        self.parallel = num_threads if engine == "onnxruntime" else 1
        self.mode, self.match = mode, match
        self._recogniser = load_recogniser(
            engine, model_dir=model_dir, device=device, threads=num_threads
        )
        self.pairs = self._recogniser.together > 1  # a line that is alone takes its own copy along
        self._detector = None
        if mode != "line":
            self._detector = load_detector(
                engine, model_dir=det_model_dir, device=device, threads=num_threads
            )
        self._alphabets = {
            match: Alphabet(self._recogniser.characters, match) for match in get_args(Match)
        }
        self._reader = Reader(self._recogniser, self._detector, always_find=mode == "scene")
        self._pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="ocr-read")

    @property
    def characters(self) -> list[str]:
        """What each output class of the recogniser spells, class 0 nothing."""
        return list(self._recogniser.characters)

    @property
    def fields(self) -> tuple[str, ...]:
        """See Scorer: with `mode` line nothing is known of lines."""
        return _READ if self.mode == "line" else (*_READ, *(f"ocr_{name}" for name in NAMES))

    @property
    def info(self) -> dict[str, str]:
        """See Scorer."""
        parts = {"recogniser": self._recogniser, "detector": self._detector}
        told = {
            f"{part}_{key}": text
            for part, model in parts.items()
            if model
            for key, text in model.info.items()
        }
        return {"mode": self.mode, "match": self.match, "reading": str(READING), **told}

    def score(
        self,
        images: Sequence[Image.Image | np.ndarray],
        targets: Sequence[str],
        *,
        scene: bool = False,
    ) -> list[OCRScore]:
        """Read each picture, as one line or as a scene of many, and compare; order kept."""
        if len(images) != len(targets):
            raise ValueError(
                f"images and targets must be as many. Got {len(images)} and {len(targets)}."
            )
        # Here and not in the pool: one lazy PIL image must not be loaded by two threads.
        asked = [
            _Ask(Picture(_rgb(image), search=scene), target, self.match)
            for image, target in zip(images, targets, strict=True)
        ]
        batches = [
            asked[start : start + self.max_batch] for start in range(0, len(asked), self.max_batch)
        ]
        return [score for scores in self._pool.map(self._score_batch, batches) for score in scores]

    def score_items(self, items: Sequence[Item]) -> list[Outcome]:
        """See Scorer."""
        asked = [
            _Ask(self._picture(item), item.text, item.match or self.match, item.letters)
            for item in items
        ]
        return [_outcome(score) for score in self._score_batch(asked)]

    def boxes(self, item: Item) -> list[np.ndarray]:
        """Where text was read: a box [4 corners, 2 px] for each line."""
        return self._reader.read([self._picture(item)])[0].boxes

    def close(self) -> None:
        """Stop the worker threads."""
        self._pool.shutdown()

    def _picture(self, item: Item) -> Picture:
        top, _, left, _ = item.box or (0, 0, 0, 0)
        if self.mode == "line":
            return Picture(item.crop, corner=(left, top))
        if item.has_mask and item.mask is None:
            return Picture(item.crop, masked=True, search=True, corner=(left, top))
        return Picture(item.image, item.mask, masked=item.has_mask, search=True)

    def _score_batch(self, asked: Sequence["_Ask"]) -> list[OCRScore]:
        """Score pictures with their targets. Order kept."""
        for ask in asked:
            if not normalise(ask.target):
                raise ValueError(
                    "text must hold at least one character that is not a space. Got"
                    f" {ask.target!r}."
                )
        readings = self._reader.read([ask.picture for ask in asked])
        return [self._compare(reading, ask) for reading, ask in zip(readings, asked, strict=True)]

    def _compare(self, reading: Reading, ask: "_Ask") -> OCRScore:
        target, alphabet = ask.target, self._alphabets[ask.match]
        told = OCRScore(reading.text, reading.confidence, reading.aspects)
        absent = alphabet.missing(target)
        if absent:
            # What no picture can be read as is a failure, not a low score.
            reason = f"the recogniser's alphabet has no {' '.join(absent)!r}"
            return replace(told, errors={"ocr_accuracy": reason, "ocr_likelihood": reason})
        told = replace(told, accuracy=ocr_accuracy(target, reading.text, ask.match))
        if reading.rows > 1 and picture_order(target) != target:
            reason = "right-to-left text in several rows has no one order of frames"
            return replace(told, errors={"ocr_likelihood": reason})
        probs, starts = self._joined(reading.pieces, alphabet)
        target = picture_order(target)
        likelihood = likelihood_per_character(probs, target, alphabet)
        clarity = reading.aspects.clarity if reading.aspects and reading.any_text else 1.0
        told = replace(told, likelihood=likelihood * clarity)
        if not ask.letters:
            return told
        left, top = ask.picture.corner
        found = align(probs, target, alphabet)
        boxes = letter_boxes(found, alphabet.spell(target), reading.pieces, starts, reading.place)
        letters = [
            Letter(one.likelihood * clarity, x0 + left, y0 + top, x1 + left, y1 + top)
            for one, (x0, y0, x1, y1) in zip(found, boxes, strict=True)
        ]
        return replace(told, letters=letters)

    def _joined(
        self, pieces: Sequence[tuple[Piece, bool]], alphabet: Alphabet
    ) -> tuple[np.ndarray, list[int]]:
        """One CTC output for all lines, and the frame with which each of them begins.

        A certain blank between lines keeps their letters apart; where spaces count, a certain space
        stands between words as well.
        """
        if len(pieces) == 1:
            return pieces[0][0].probs, [0]
        blank = np.zeros((1, len(self._recogniser.characters)), dtype=np.float32)
        blank[0, 0] = 1
        parts, starts = [blank], []
        for place, (piece, space) in enumerate(pieces):
            if place and space and alphabet.spaces:
                between = np.zeros_like(blank)
                between[0, alphabet.spaces[0]] = 1
                parts += [between, blank]
            starts.append(sum(map(len, parts)))
            parts += [piece.probs, blank]
        return np.concatenate(parts), starts


@dataclass(frozen=True)
class _Ask:
    """A picture, what it should show, and what is asked about it."""

    picture: Picture
    target: str
    match: Match
    letters: bool = False


def _rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    return np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)


def _outcome(score: OCRScore) -> Outcome:
    values: dict[str, float | str] = {"ocr_text": score.text, "ocr_confidence": score.confidence}
    errors = dict(score.errors)
    if score.accuracy is not None:
        values["ocr_accuracy"] = score.accuracy
    if score.likelihood is not None:
        values["ocr_likelihood"] = score.likelihood
    for name in NAMES if score.aspects else ():
        value = getattr(score.aspects, name)
        if value is None:
            errors[f"ocr_{name}"] = "the item has no mask"
        else:
            values[f"ocr_{name}"] = value
    return Outcome(values, errors, letters=score.letters)
