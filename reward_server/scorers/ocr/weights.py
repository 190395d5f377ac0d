"""PaddleOCR's weights as folders that PaddleX can load, made and described without a network.

Engine `onnxruntime`: the PP-OCRv6 small weights that the `rapidocr` wheel carries (the recogniser's
character list is in the ONNX file's metadata). Engine `paddle`: folders as PaddleOCR publishes them
(`inference.yml` beside the weights).
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import yaml

from reward_server.alphabet import bundled, characters_of

REC_NAME = "PP-OCRv6_small_rec"
DET_NAME, DET_FILE = "PP-OCRv6_small_det", "PP-OCRv6_det_small.onnx"

LINE_HEIGHT = 48  # px, what the recognisers were trained on
_WEIGHTS = (".onnx", ".pdiparams", ".pdmodel", ".json", ".yml")


@contextmanager
def weights_folder(
    engine: str, model_dir: Path | None, onnx: str, config_of: Callable[[Path], dict]
) -> Iterator[tuple[Path, str]]:
    """Return the folder that PaddleX can load, and the model's name.

    The folder is `model_dir` for paddle, else one around bundled weights.
    """
    if engine == "onnxruntime":
        weights = bundled(onnx)
        with onnx_folder(weights, config_of(weights)) as found:
            yield found
        return
    path = Path(model_dir or "") / "inference.yml"
    if model_dir is None or not path.is_file():
        raise FileNotFoundError(
            f"the folder of a Paddle model must hold inference.yml. Got {model_dir}."
        )
    yield model_dir, yaml.safe_load(path.read_text(encoding="utf-8"))["Global"]["model_name"]


@contextmanager
def onnx_folder(weights: Path, config: dict) -> Iterator[tuple[Path, str]]:
    """A temporary folder with `inference.onnx` and `inference.yml`, and the model's name."""
    with tempfile.TemporaryDirectory(prefix="reward-ocr-") as folder:
        (Path(folder) / "inference.onnx").symlink_to(weights)
        text = yaml.safe_dump(config, allow_unicode=True)
        (Path(folder) / "inference.yml").write_text(text, encoding="utf-8")
        yield Path(folder), config["Global"]["model_name"]


def recognition_config_of(weights: Path) -> dict:
    """The `inference.yml` of an ONNX recogniser that carries its characters in its metadata."""
    return recognition_config(REC_NAME, characters_of(weights))


def recognition_config(name: str, characters: list[str]) -> dict:
    """Return the `inference.yml` of a recogniser with these output characters.

    PaddleOCR adds blank and space.
    """
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
    mean_std = {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "scale": 1 / 255,
        "order": "hwc",
    }
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


def detection_config_of(weights: Path) -> dict:
    """The `inference.yml` of the bundled detector."""
    return detection_config(DET_NAME)


def describe(engine: str, name: str, folder: Path) -> dict[str, str]:
    """Engine and version, model name, digest of the weights."""
    library = "onnxruntime" if engine == "onnxruntime" else "paddlepaddle"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS):
        digest.update(path.name.encode() + path.read_bytes())
    return {"engine": f"{library} {_version(library)}", "model": name, "sha256": digest.hexdigest()}


def _version(library: str) -> str:
    for name in (library, f"{library}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


@contextmanager
def offline_paddle() -> Iterator[None]:
    """Import PaddleX without what it would download models with.

    It imports two download clients, which import torch, transformers and peft: 5 of 7 seconds and
    400 MB that nothing here uses. Empty stand-ins take their place for as long as the import lasts.
    """
    os.environ.setdefault(
        "PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True"
    )  # no look-up of the nearest host
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
