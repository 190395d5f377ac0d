"""The reader of `data make`: all texts of a picture, by the reward server's OCR models."""

from collections.abc import Callable

import numpy as np

from calligrapher.data.cutting import TextPlace
from reward_server.scorers.ocr.models import load_detector, load_recogniser
from reward_server.text import picture_order


def scene_reader() -> tuple[Callable[[np.ndarray], list[TextPlace]], dict[str, str]]:
    """Return a reader of pictures (uint8 [H, W, 3]), and its engines, models and digests."""
    detector = load_detector("onnxruntime", model_dir=None, device="cpu", threads=1)
    recogniser = load_recogniser("onnxruntime", model_dir=None, device="cpu", threads=1)

    def read(rgb: np.ndarray) -> list[TextPlace]:
        places = [place for row in detector.places(rgb) for place in row]
        readings = map(recogniser.decode, recogniser.probs([crop for _, crop in places]))
        return [
            TextPlace(picture_order(text), confidence, tuple(map(tuple, box.tolist())))
            for (box, _), (text, confidence) in zip(places, readings, strict=True)
        ]

    parts = {"detector": detector.info, "recogniser": recogniser.info}
    decides = ("engine", "model", "sha256")  # How many lines share a forward does not.
    return read, {f"{part}_{key}": info[key] for part, info in parts.items() for key in decides}
