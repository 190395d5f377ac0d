"""PaddleOCR's models: a line recogniser and a text detector.

Pre-processing, runner and post-processing are PaddleOCR's own; the order of the lines found is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from reward_server.alphabet import REC_FILE
from reward_server.scorers.ocr.weights import (
    DET_FILE,
    LINE_HEIGHT,
    describe,
    detection_config_of,
    offline_paddle,
    recognition_config_of,
    weights_folder,
)

WIDTH_STEP = 32  # px; widths are padded to a multiple of this
# px of padding at least: the last letter is read better with some room (.902 -> .910, noisy words)
RIGHT_MARGIN = 8
MAX_TOGETHER = 8  # lines per forward; 16 gain nothing more
MAX_WIDTH = 3200  # px; wider lines are squeezed

# The numbers of PaddleOCR's own pipeline (its OCR.yaml).
_DETECTION = {
    "limit_side_len": 64,
    "limit_type": "min",
    "thresh": 0.3,
    "box_thresh": 0.6,
    "unclip_ratio": 1.5,
}


def padded_width(width: int, height: int) -> int:
    """Return the width in px that a line of this size has in the recogniser's input."""
    line_width = -(-LINE_HEIGHT * width // height)
    return min(-(-(line_width + RIGHT_MARGIN) // WIDTH_STEP) * WIDTH_STEP, MAX_WIDTH)


@dataclass(frozen=True)
class Recogniser:
    """Reads single lines."""

    runner: Any
    decoder: Any  # PaddleOCR's CTCLabelDecode
    resize_op: Any
    together: int  # pictures that may share a forward, see `_together`
    info: dict[str, str]

    @property
    def characters(self) -> list[str]:
        """Label of each output class; class 0 is the blank."""
        return self.decoder.character

    def probs(self, lines: Sequence[np.ndarray]) -> list[np.ndarray]:
        """CTC output [T frames, C classes] of each line, uint8 [H, W, 3]; order kept.

        Lines of one padded width share forwards. One that is alone takes its own copy along where
        `together` is more than 1: kernels round differently for a single row, and only then.
        """
        places: dict[int, list[int]] = {}
        for place, line in enumerate(lines):
            places.setdefault(padded_width(line.shape[1], line.shape[0]), []).append(place)
        found: dict[int, np.ndarray] = {}
        for width, same in places.items():
            # Never a last one alone: 9 lines of which 8 may go together are 5 and 4.
            parts = -(-len(same) // self.together)
            for share in np.array_split(same, parts):
                outputs = self._forward([lines[place] for place in share], width)
                found.update(zip(share.tolist(), outputs, strict=False))
        return [found[place] for place in range(len(lines))]

    def _forward(self, lines: list[np.ndarray], width: int) -> np.ndarray:
        resize = self.resize_op(rec_image_shape=[3, LINE_HEIGHT, width])
        pixels = resize(
            [np.ascontiguousarray(line[:, :, ::-1]) for line in lines]
        )  # trained on BGR
        if len(pixels) == 1 and self.together > 1:
            pixels = [*pixels, *pixels]
        return self.runner(x=[np.stack(pixels)])[0]

    def decode(self, probs: np.ndarray) -> tuple[str, float]:
        """(text, mean confidence of its characters, 0 when there are none)."""
        texts, confidences = self.decoder([probs[None]])
        return texts[0], float(confidences[0])


@dataclass(frozen=True)
class Detector:
    """Finds lines of text."""

    predictor: Any
    crop_boxes: Any
    info: dict[str, str]

    def rows(self, rgb: np.ndarray) -> list[list[np.ndarray]]:
        """Return upright crops uint8 [h, w, 3] of the pieces of text.

        They come in rows from the top, each from the left.
        """
        return [[crop for _, crop in row] for row in self.places(rgb)]

    def boxes(self, rgb: np.ndarray) -> list[np.ndarray]:
        """Return the box [4 corners, 2 px] of each piece of text, in no order.

        The picture is looked at as it is: its sides must be multiples of 32.
        """
        bgr = np.ascontiguousarray(rgb[:, :, ::-1])
        batch = SimpleNamespace(instances=[bgr], input_paths=[None], page_indexes=[None])
        largest = max(rgb.shape[:2])
        found = self.predictor.process(batch, limit_side_len=largest, limit_type="max")
        return list(found["dt_polys"][0])

    def places(self, rgb: np.ndarray) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Return the same, each crop after its box [4 corners, 2 px].

        The corners go clockwise from the text's own top left.
        """
        bgr = np.ascontiguousarray(rgb[:, :, ::-1])
        batch = SimpleNamespace(instances=[bgr], input_paths=[None], page_indexes=[None])
        rows = rows_of(self.predictor.process(batch)["dt_polys"][0])
        crops = [zip(row, self.crop_boxes(rgb, row), strict=True) for row in rows]
        return [
            [(box, np.ascontiguousarray(crop)) for box, crop in row if crop.size] for row in crops
        ]


def rows_of(boxes: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Boxes [4 corners, 2 px] in reading order: rows from top to bottom, each from left to right.

    Seen level, by the median slant of the boxes, a box shares the row of the one above it when
    their middles are less than half a box's height apart. (PaddleOCR's own order asks for 10 px,
    however large the letters are.)
    """
    if len(boxes) < 2:
        return [list(boxes)] if len(boxes) else []
    corners = np.asarray(boxes, dtype=np.float64)  # [N, 4, 2]
    run, rise = (corners[:, 1] - corners[:, 0]).T
    slant = float(np.median(np.arctan2(rise, run)))
    level = corners @ np.array([[np.cos(slant), -np.sin(slant)], [np.sin(slant), np.cos(slant)]])
    middles, heights = level.mean(axis=1), np.linalg.norm(level[:, 3] - level[:, 0], axis=1)

    rows: list[list[int]] = []
    for place in np.argsort(middles[:, 1], kind="stable"):
        above = rows[-1][-1] if rows else None
        if above is not None and (
            middles[place, 1] - middles[above, 1] < min(heights[place], heights[above]) / 2
        ):
            rows[-1].append(place)
        else:
            rows.append([place])
    return [
        [boxes[place] for place in sorted(row, key=lambda one: middles[one, 0])] for row in rows
    ]


def load_recogniser(
    engine: str, *, model_dir: Path | None, device: str, threads: int
) -> Recogniser:
    """The recogniser of an engine; `model_dir` only for `paddle`."""
    with offline_paddle():
        from paddleocr import TextRecognition
        from paddlex.inference.models.text_recognition.processors import OCRReisizeNormImg
    with weights_folder(engine, model_dir, REC_FILE, recognition_config_of) as (folder, name):
        model = TextRecognition(
            model_name=name, model_dir=str(folder), **_engine_flags(engine, device, threads)
        )
        info = describe(engine, name, folder)
    predictor = model.paddlex_predictor
    together = _together(predictor.runner) if engine == "onnxruntime" else 1
    info["lines_per_forward"] = f"2..{together}" if together > 1 else "1"
    return Recogniser(predictor.runner, predictor.post_op, OCRReisizeNormImg, together, info)


def _together(runner: Any) -> int:
    """How many lines may share a forward without changing a bit of one another's output; tried out.

    On the processors seen, a row of a batch of two or more is the same to the last bit whatever the
    batch, and the output layer's 9 MB of weights are read once for all of them. Where it is not so,
    the answer is 1.
    """
    rows = np.random.default_rng(0).random(
        (MAX_TOGETHER, 3, LINE_HEIGHT, 2 * WIDTH_STEP), dtype=np.float32
    )
    together = runner(x=[rows])[0]
    pairs = [runner(x=[rows[[place, place]]])[0][0] for place in range(MAX_TOGETHER)]
    return MAX_TOGETHER if np.array_equal(together, np.stack(pairs)) else 1


def load_detector(engine: str, *, model_dir: Path | None, device: str, threads: int) -> Detector:
    """The detector of an engine; `model_dir` only for `paddle`."""
    with offline_paddle():
        from paddleocr import TextDetection
        from paddlex.inference.pipelines.components import CropByPolys
    with weights_folder(engine, model_dir, DET_FILE, detection_config_of) as (folder, name):
        flags = {**_engine_flags(engine, device, threads), **_DETECTION}
        model = TextDetection(model_name=name, model_dir=str(folder), **flags)
        info = describe(engine, name, folder)
    return Detector(model.paddlex_predictor, CropByPolys(det_box_type="quad"), info)


def _engine_flags(engine: str, device: str, threads: int) -> dict[str, Any]:
    if engine == "onnxruntime":
        # An arena keeps what the largest picture took for as long as the server lives.
        config: dict[str, Any] = {
            "intra_op_num_threads": 1,
            "inter_op_num_threads": 1,
            "enable_cpu_mem_arena": False,
        }
        return {"engine": engine, "device": "cpu", "engine_config": config}
    return {"engine": "paddle", "device": device, "cpu_threads": threads, "enable_mkldnn": False}
