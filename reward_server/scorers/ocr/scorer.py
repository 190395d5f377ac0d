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
from reward_server.scorers.ocr.lines import (
    Line,
    Place,
    fits,
    lines_in,
    region_around,
    whole_place,
)
from reward_server.scorers.ocr.models import load_detector, load_recogniser, rows_of
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
class Picture:
    """What is to be read: the whole picture, the mask in it, whether lines are looked for."""

    rgb: np.ndarray  # uint8 [H, W, 3]
    mask: np.ndarray | None  # bool [H, W]; None = all of it
    search: bool


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
        """Read each picture, as one line or as a scene of many, and compare; order kept."""
        if len(images) != len(targets):
            raise ValueError(
                f"images and targets must be as many. Got {len(images)} and {len(targets)}."
            )
        # Here and not in the pool: one lazy PIL image must not be loaded by two threads.
        asked = [
            (Picture(_rgb(image), None, scene), target)
            for image, target in zip(images, targets, strict=True)
        ]
        batches = [
            asked[start : start + self.max_batch] for start in range(0, len(asked), self.max_batch)
        ]
        return [score for scores in self._pool.map(self._score_batch, batches) for score in scores]

    def score_items(self, items: Sequence[Item]) -> list[Outcome]:
        """See Scorer."""
        scores = self._score_batch([(self._picture(item), item.text) for item in items])
        return [_outcome(score) for score in scores]

    def close(self) -> None:
        """Stop the worker threads."""
        self._pool.shutdown()

    def _picture(self, item: Item) -> Picture:
        if self.mode == "line" or (item.has_mask and item.mask is None):
            return Picture(item.crop, None, self.mode != "line")
        return Picture(item.image, item.mask, True)

    def _score_batch(self, asked: Sequence[tuple[Picture, str]]) -> list[OCRScore]:
        """Score pictures with their targets. Order kept."""
        for _, target in asked:
            if not normalise(target):
                raise ValueError(
                    f"text must hold at least one character that is not a space. Got {target!r}."
                )
        pages = [self._lines(picture) for picture, _ in asked]
        outputs = iter(
            self._recogniser.probs([way for lines in pages for line in lines for way in line.ways])
        )
        readings = [
            self._read([[next(outputs) for _ in line.ways] for line in lines], lines)
            for lines in pages
        ]
        return [
            self._compare(reading, target)
            for reading, (_, target) in zip(readings, asked, strict=True)
        ]

    def _lines(self, picture: Picture) -> list[Line]:
        """Return the lines to be read."""
        place = Place.of(picture.rgb, picture.mask)
        if not picture.search:
            return [Line((picture.rgb,), (place.box(),), 1.0)]
        assert self._detector is not None, "looking for lines needs mode scene or auto"
        region = region_around(picture.rgb, place)
        boxes = [region.to_picture(box) for box in self._detector.boxes(region.pixels)]
        lines = lines_in(picture.rgb, boxes, place)
        if picture.mask is not None and not lines:
            return [whole_place(picture.rgb, place)]
        if picture.mask is not None and self.mode == "auto":
            rows = len(rows_of([line.boxes[0] for line in lines]))
            if fits(lines, rows, place):
                return [whole_place(picture.rgb, place)]
        return lines

    def _read(self, outputs: Sequence[Sequence[np.ndarray]], lines: Sequence[Line]) -> Reading:
        """What the CTC outputs of a picture's lines, each in each of its ways, say."""
        readings = []
        for probs_of_ways, line in zip(outputs, lines, strict=True):
            ways = [(*self._recogniser.decode(probs), probs) for probs in probs_of_ways]
            best = max(range(len(ways)), key=lambda place: ways[place][1])
            readings.append((*ways[best], line.boxes[best]))
        rows = rows_of([box for *_, box in readings])
        by_box = {id(reading[3]): reading for reading in readings}
        ordered = [[by_box[id(box)] for box in row] for row in rows]
        confidences = [confidence for _, confidence, *_ in readings]
        return Reading(
            text=" ".join(picture_order(" ".join(text for text, *_ in row)) for row in ordered),
            confidence=float(np.mean(confidences)) if confidences else 0.0,
            probs=self._joined([probs for row in ordered for _, _, probs, _ in row]),
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
        absent = self.alphabet.missing(target)
        if absent:
            # What no picture can be read as is a failure, not a low score.
            reason = f"the recogniser's alphabet has no {' '.join(absent)!r}"
            errors = {"ocr_accuracy": reason, "ocr_likelihood": reason}
            return OCRScore(reading.text, reading.confidence, None, None, errors)
        accuracy = ocr_accuracy(target, reading.text)
        if reading.rows > 1 and picture_order(target) != target:
            reason = "right-to-left text in several rows has no one order of frames"
            return OCRScore(
                reading.text, reading.confidence, accuracy, None, {"ocr_likelihood": reason}
            )
        likelihood = likelihood_per_character(reading.probs, picture_order(target), self.alphabet)
        return OCRScore(reading.text, reading.confidence, accuracy, likelihood, {})


def _rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    return np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)


def _outcome(score: OCRScore) -> Outcome:
    values: dict[str, float | str] = {"ocr_text": score.text, "ocr_confidence": score.confidence}
    if score.accuracy is not None:
        values["ocr_accuracy"] = score.accuracy
    if score.likelihood is not None:
        values["ocr_likelihood"] = score.likelihood
    return Outcome(values, score.errors)
