"""PaddleOCR's models, loaded from folders and never from the network: a line recogniser and a text detector.

Engine `onnxruntime`: the PP-OCRv6 small weights that the `rapidocr` wheel carries (the recogniser's
character list is in the ONNX file's metadata). Engine `paddle`: folders as PaddleOCR publishes them
(`inference.yml` beside the weights). Pre-processing, runner and post-processing are PaddleOCR's own.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

REC_NAME, REC_FILE = "PP-OCRv6_small_rec", "PP-OCRv6_rec_small.onnx"
DET_NAME, DET_FILE = "PP-OCRv6_small_det", "PP-OCRv6_det_small.onnx"

LINE_HEIGHT = 48  # px, what the recognisers were trained on
WIDTH_STEP = 32  # px; widths are padded to a multiple of this
RIGHT_MARGIN = (
    8  # px of padding at least: the last letter is read better with some room (.902 -> .910, noisy words)
)
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
    """Width in px which a line of this size has in the recogniser's input; depends on nothing else."""
    line_width = -(-LINE_HEIGHT * width // height)
    return min(-(-(line_width + RIGHT_MARGIN) // WIDTH_STEP) * WIDTH_STEP, MAX_WIDTH)


@dataclass(frozen=True)
class Recogniser:
    """Reads single lines."""

    runner: Any
    decoder: Any  # PaddleOCR's CTCLabelDecode
    resize_op: Any
    info: dict[str, str]

    @property
    def characters(self) -> list[str]:
        """Label of each output class; class 0 is the blank."""
        return self.decoder.character

    def probs(self, rgb: np.ndarray) -> np.ndarray:
        """CTC output [T frames, C classes] of one line, uint8 [H, W, 3]; one line per forward (see `ocr`)."""
        height, width = rgb.shape[:2]
        resize = self.resize_op(rec_image_shape=[3, LINE_HEIGHT, padded_width(width, height)])
        bgr = np.ascontiguousarray(rgb[:, :, ::-1])  # PaddleOCR's models see BGR
        return self.runner(x=[np.stack(resize([bgr]))])[0][0]

    def decode(self, probs: np.ndarray) -> tuple[str, float]:
        """(text, mean confidence of its characters, 0 when there are none)."""
        texts, confidences = self.decoder([probs[None]])
        return texts[0], float(confidences[0])


@dataclass(frozen=True)
class Detector:
    """Finds lines of text."""

    predictor: Any
    sort_boxes: Any
    crop_boxes: Any
    info: dict[str, str]

    def lines(self, rgb: np.ndarray) -> list[np.ndarray]:
        """Crops of the lines, upright, from top to bottom and left to right; each uint8 [h, w, 3]."""
        bgr = np.ascontiguousarray(rgb[:, :, ::-1])
        batch = SimpleNamespace(instances=[bgr], input_paths=[None], page_indexes=[None])
        boxes = self.predictor.process(batch)["dt_polys"][0]
        if not len(boxes):
            return []
        crops = self.crop_boxes(rgb, self.sort_boxes(boxes))
        return [np.ascontiguousarray(crop) for crop in crops if crop.size]


def load_recogniser(engine: str, *, model_dir: Path | None, device: str, threads: int) -> Recogniser:
    """The recogniser of an engine; `model_dir` only for `paddle`."""
    with offline_paddle():
        from paddleocr import TextRecognition
        from paddlex.inference.models.text_recognition.processors import OCRReisizeNormImg
    with _folder(engine, model_dir, bundled(REC_FILE), recognition_config_of) as (folder, name):
        model = TextRecognition(
            model_name=name, model_dir=str(folder), **_engine_flags(engine, device, threads)
        )
        info = _info(engine, name, folder)
    predictor = model.paddlex_predictor
    return Recogniser(predictor.runner, predictor.post_op, OCRReisizeNormImg, info)


def load_detector(engine: str, *, model_dir: Path | None, device: str, threads: int) -> Detector:
    """The detector of an engine; `model_dir` only for `paddle`."""
    with offline_paddle():
        from paddleocr import TextDetection
        from paddlex.inference.pipelines.components import CropByPolys, SortQuadBoxes
    with _folder(engine, model_dir, bundled(DET_FILE), _detection_config) as (folder, name):
        flags = {**_engine_flags(engine, device, threads), **_DETECTION}
        model = TextDetection(model_name=name, model_dir=str(folder), **flags)
        info = _info(engine, name, folder)
    return Detector(model.paddlex_predictor, SortQuadBoxes(), CropByPolys(det_box_type="quad"), info)


def bundled(file_name: str) -> Path:
    """Path of weights inside the installed `rapidocr` wheel. Raises FileNotFoundError."""
    from importlib.util import find_spec

    spec = find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the OCR weights come from the `rapidocr` wheel, which must be installed.")
    path = Path(spec.origin).parent / "models" / file_name
    if not path.is_file():
        raise FileNotFoundError(f"{path} must exist. Install the pinned rapidocr version again.")
    return path


def _engine_flags(engine: str, device: str, threads: int) -> dict[str, Any]:
    if engine == "onnxruntime":
        config: dict[str, Any] = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
        return {"engine": engine, "device": "cpu", "engine_config": config}
    return {"engine": "paddle", "device": device, "cpu_threads": threads, "enable_mkldnn": False}


@contextmanager
def _folder(engine: str, model_dir: Path | None, onnx: Path, config_of) -> Iterator[tuple[Path, str]]:
    """(folder that PaddleX can load, model name): `model_dir` for paddle, else one around ONNX weights."""
    import yaml

    if engine == "onnxruntime":
        with onnx_folder(onnx, config_of(onnx)) as found:
            yield found
        return
    path = Path(model_dir or "") / "inference.yml"
    if model_dir is None or not path.is_file():
        raise FileNotFoundError(f"the folder of a Paddle model must hold inference.yml. Got {model_dir}.")
    yield model_dir, yaml.safe_load(path.read_text(encoding="utf-8"))["Global"]["model_name"]


@contextmanager
def onnx_folder(weights: Path, config: dict) -> Iterator[tuple[Path, str]]:
    """A temporary folder with `inference.onnx` and `inference.yml`, and the model's name."""
    import yaml

    with tempfile.TemporaryDirectory(prefix="reward-ocr-") as folder:
        (Path(folder) / "inference.onnx").symlink_to(weights)
        text = yaml.safe_dump(config, allow_unicode=True)
        (Path(folder) / "inference.yml").write_text(text, encoding="utf-8")
        yield Path(folder), config["Global"]["model_name"]


def recognition_config_of(weights: Path) -> dict:
    """The `inference.yml` of an ONNX recogniser that carries its characters in its metadata."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(weights), providers=["CPUExecutionProvider"])
    characters = session.get_modelmeta().custom_metadata_map["character"].split("\n")
    return recognition_config(REC_NAME, characters)


def recognition_config(name: str, characters: list[str]) -> dict:
    """The `inference.yml` of a recogniser with these output characters; PaddleOCR adds blank and space."""
    return {
        "Global": {"model_name": name},
        "PreProcess": {
            "transform_ops": [
                {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                {"RecResizeImg": {"image_shape": [3, LINE_HEIGHT, 320]}},
            ]
        },
        "PostProcess": {"name": "CTCLabelDecode", "character_dict": characters},
    }


def detection_config(name: str) -> dict:
    """The `inference.yml` of a detector."""
    mean_std = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "scale": 1 / 255, "order": "hwc"}
    return {
        "Global": {"model_name": name},
        "PreProcess": {
            "transform_ops": [
                {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                {"DetResizeForTest": {"resize_long": 960}},
                {"NormalizeImage": mean_std},
                {"ToCHWImage": None},
            ]
        },
        "PostProcess": {"name": "DBPostProcess"},
    }


def _detection_config(weights: Path) -> dict:
    return detection_config(DET_NAME)


def _info(engine: str, name: str, folder: Path) -> dict[str, str]:
    from importlib.metadata import version

    library = "onnxruntime" if engine == "onnxruntime" else "paddlepaddle"
    weights = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (".onnx", ".pdiparams", ".pdmodel", ".json", ".yml")
    )
    digest = hashlib.sha256()
    for path in weights:
        digest.update(path.name.encode() + path.read_bytes())
    return {"engine": f"{library} {_version(library, version)}", "model": name, "sha256": digest.hexdigest()}


def _version(library: str, version) -> str:
    for name in (library, f"{library}-gpu"):
        try:
            return version(name)
        except Exception:
            continue
    return "unknown"


@contextmanager
def offline_paddle() -> Iterator[None]:
    """Import PaddleX without what it would download models with.

    It imports two download clients, which import torch, transformers and peft: 5 of 7 seconds and 400 MB that
    nothing here uses. Empty stand-ins take their place for as long as the import lasts.
    """
    os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")  # no look-up of the nearest host
    wanted: dict[str, dict] = {
        "modelscope": {},
        "aistudio_sdk": {},
        "aistudio_sdk.errors": {"NotExistError": LookupError},
    }
    wanted["aistudio_sdk.snapshot_download"] = {"snapshot_download": None}
    stand_ins = {name: ModuleType(name) for name in wanted if name not in sys.modules}
    for name, module in stand_ins.items():
        module.__dict__.update(wanted[name])
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
