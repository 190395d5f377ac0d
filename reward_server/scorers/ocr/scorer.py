"""The OCR scorer: what the picture says, how much of the target that is, how likely the target was.

A score depends on nothing but its own picture: forwards are single-threaded, a line is padded to a
width derived from that line alone, and it shares a forward only with lines of that width, in a way
that does not change a bit of it (`Recogniser.probs`). `num_threads` batches are read side by side.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from reward_server.scorers.base import Item, Outcome
from reward_server.scorers.ocr.ctc import Alphabet, likelihood_per_character
from reward_server.scorers.ocr.models import load_detector, load_recogniser
from reward_server.text import normalise, ocr_accuracy, picture_order


@dataclass(frozen=True)
class Reading:
    """What was read on one picture."""

    text: str  # rows joined by a space
    confidence: (
        float  # mean over the lines of the mean over their characters; 0 when nothing was read
    )
    probs: np.ndarray  # [T frames, C classes] CTC output of all lines
    rows: int


@dataclass(frozen=True)
class OCRScore:
    """A reading compared with its target.

    A part that cannot be had is None and `errors` says why.
    """

    text: str
    confidence: float
    accuracy: float | None
    likelihood: float | None  # geometric mean per character of the target's CTC probability
    errors: dict[str, str]


class OCRScorer:
    """PaddleOCR as a Scorer, also usable by itself through `score`.

    `mode`: line (the picture is one line of text), scene (lines are found first), auto (line for
    items with a mask). `engine`: onnxruntime with bundled weights, or paddle with `model_dir` (and
    `det_model_dir` for scene).
    """

    name = "ocr"
    fields = ("ocr_text", "ocr_confidence", "ocr_accuracy", "ocr_likelihood")
    max_batch, max_wait_s = 8, 0.0

    def __init__(
        self,
        *,
        num_threads: int = 1,
        mode: str = "line",
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
        self.mode = mode
        self._recogniser = load_recogniser(
            engine, model_dir=model_dir, device=device, threads=num_threads
        )
        self._detector = None
        if mode != "line":
            self._detector = load_detector(
                engine, model_dir=det_model_dir, device=device, threads=num_threads
            )
        self.alphabet = Alphabet(self._recogniser.characters)
        self._pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="ocr-read")

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
        return {"mode": self.mode, **told}

    def score(
        self,
        images: Sequence[Image.Image | np.ndarray],
        targets: Sequence[str],
        *,
        scene: bool = False,
    ) -> list[OCRScore]:
        """Recognise and compare with the target texts; order kept."""
        if len(images) != len(targets):
            raise ValueError(
                f"images and targets must be as many. Got {len(images)} and {len(targets)}."
            )
        # Here and not in the pool: one lazy PIL image must not be loaded by two threads.
        asked = [
            (_rgb(image), target, scene) for image, target in zip(images, targets, strict=True)
        ]
        batches = [
            asked[start : start + self.max_batch] for start in range(0, len(asked), self.max_batch)
        ]
        return [score for scores in self._pool.map(self._score_batch, batches) for score in scores]

    def score_items(self, items: Sequence[Item]) -> list[Outcome]:
        """See Scorer."""
        scores = self._score_batch([(item.crop, item.text, self._as_scene(item)) for item in items])
        return [_outcome(score) for score in scores]

    def close(self) -> None:
        """Stop the worker threads."""
        self._pool.shutdown()

    def _as_scene(self, item: Item) -> bool:
        return self.mode == "scene" or (self.mode == "auto" and not item.has_mask)

    def _score_batch(self, asked: Sequence[tuple[np.ndarray, str, bool]]) -> list[OCRScore]:
        """Score pictures with their targets; `True` where lines must be found first. Order kept."""
        for _, target, _ in asked:
            if not normalise(target):
                raise ValueError(
                    f"text must hold at least one character that is not a space. Got {target!r}."
                )
        pages = [self._rows(rgb) if scene else [[rgb]] for rgb, _, scene in asked]
        outputs = iter(
            self._recogniser.probs([line for rows in pages for row in rows for line in row])
        )
        readings = [self._read([[next(outputs) for _ in row] for row in rows]) for rows in pages]
        return [
            self._compare(reading, target)
            for reading, (_, target, _) in zip(readings, asked, strict=True)
        ]

    def _rows(self, rgb: np.ndarray) -> list[list[np.ndarray]]:
        assert self._detector is not None, "reading scenes needs mode scene or auto"
        return self._detector.rows(rgb)

    def _read(self, rows: list[list[np.ndarray]]) -> Reading:
        """What the CTC outputs of a picture's lines say; rows from the top, each from the left."""
        readings = [[self._recogniser.decode(probs) for probs in row] for row in rows]
        confidences = [confidence for row in readings for _, confidence in row]
        return Reading(
            text=" ".join(picture_order(" ".join(text for text, _ in row)) for row in readings),
            confidence=float(np.mean(confidences)) if confidences else 0.0,
            probs=self._joined([probs for row in rows for probs in row]),
            rows=len(rows),
        )

    def _joined(self, outputs: list[np.ndarray]) -> np.ndarray:
        """One CTC output for all lines: a certain blank between them keeps their letters apart."""
        if len(outputs) == 1:
            return outputs[0]
        blank = np.zeros((1, len(self._recogniser.characters)), dtype=np.float32)
        blank[0, 0] = 1
        return np.concatenate([blank, *(rows for probs in outputs for rows in (probs, blank))])

    def _compare(self, reading: Reading, target: str) -> OCRScore:
        errors: dict[str, str] = {}
        accuracy = likelihood = None
        absent = self.alphabet.missing(target)
        if absent:
            errors["ocr_likelihood"] = f"the recogniser's alphabet has no {' '.join(absent)!r}"
        elif reading.rows > 1 and picture_order(target) != target:
            errors["ocr_likelihood"] = (
                "right-to-left text in several rows has no one order of frames"
            )
        else:
            likelihood = likelihood_per_character(
                reading.probs, picture_order(target), self.alphabet
            )
        if len(absent) == len(set(self.alphabet.spell(target))):
            # 0 for every picture of a script that the recogniser never learned is a failure.
            errors["ocr_accuracy"] = (
                f"the recogniser's alphabet has none of the characters of {target!r}"
            )
        else:
            accuracy = ocr_accuracy(target, reading.text)
        return OCRScore(reading.text, reading.confidence, accuracy, likelihood, errors)


def _rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    return np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)


def _outcome(score: OCRScore) -> Outcome:
    values: dict[str, float | str] = {"ocr_text": score.text, "ocr_confidence": score.confidence}
    if score.accuracy is not None:
        values["ocr_accuracy"] = score.accuracy
    if score.likelihood is not None:
        values["ocr_likelihood"] = score.likelihood
    return Outcome(values, score.errors)
