"""Cases made from drawn scenes with the real OCR have the texts drawn and masks over their ink."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from calligrapher.data.dataset import load_cases
from calligrapher.tiny.world import FONTS
from flows.cli.main import main

SIZE = (512, 384)
SIGNS = (
    "Harbor 27",
    "Coffee",
    "open all day",
    "BAKERY",
    "since 1924",
    "Fresh bread",
    "No. 5",
    "Station",
)


def scene(seed):
    """(picture, text -> where its ink is, bool [H, W]) of three signs in own fonts."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", SIZE, tuple(rng.integers(185, 256, 3).tolist()))
    ink_of, top = {}, 15
    for text in rng.choice(SIGNS, 3, replace=False).tolist():
        name, size = FONTS[rng.integers(len(FONTS))][0], int(rng.integers(28, 60))
        font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
        at, ink = (int(rng.integers(20, 90)), top), tuple(rng.integers(0, 110, 3).tolist())
        ImageDraw.Draw(image).text(at, text, font=font, fill=ink)
        cover = Image.new("L", SIZE)
        ImageDraw.Draw(cover).text(at, text, font=font, fill=255)
        ink_of[text] = np.asarray(cover) > 0
        top += size + 60
    return image, ink_of


def made(tmp_path, seeds, *options):
    """[(case, ink of the scene's texts)] of the scenes, as the command makes them."""
    inks = {}
    (tmp_path / "pictures").mkdir()
    for seed in seeds:
        image, inks[f"scene{seed}"] = scene(seed)
        image.save(tmp_path / "pictures" / f"scene{seed}.png")
    assert main(["data", "make", str(tmp_path / "pictures"), str(tmp_path / "out"), *options]) == 0
    cases = load_cases(tmp_path / "out" / "cases.jsonl", "jsonl")
    return [(case, inks[case.case_id.split("-")[0]]) for case in cases]


def check_pictures(cases):
    """Count cases with the text drawn there; masks cover its ink, references show another."""
    right = 0
    for case, ink_of in cases:
        mask = np.asarray(Image.open(case.mask)) > 0
        covered = [text for text, ink in ink_of.items() if mask[ink].all()]
        assert len(covered) == 1, case
        right += covered == [case.text]
        picture, reference = (
            np.asarray(Image.open(case.source)),
            np.asarray(Image.open(case.reference)),
        )
        painted = {tuple(colour) for colour in picture[ink_of[covered[0]]].tolist()}
        darkest = min(painted, key=sum)
        assert not (reference == darkest).all(-1).any(), case
    return right


def test_the_texts_found_are_the_texts_drawn(tmp_path):
    cases = made(tmp_path, range(2))
    assert check_pictures(cases) == len(cases) == 6


@pytest.mark.slow
def test_of_120_drawn_texts_almost_all_become_the_right_cases(tmp_path):
    cases = made(tmp_path, range(100, 140))
    assert len(cases) >= 118
    assert check_pictures(cases) >= 0.98 * len(cases)


def test_mistakes_are_told_before_a_model_is_loaded(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    arguments = ["data", "make", str(tmp_path / "pictures"), str(tmp_path / "out")]
    assert main([*arguments, "--grow", "2", "--pattern", "("]) == 2
    said = capsys.readouterr().err
    assert "pattern: Value error, must be a regular expression." in said
    assert "grow: Input should be less than or equal to 1" in said
    assert not (tmp_path / "out").exists()


def test_a_limit_and_a_pattern_are_obeyed(tmp_path):
    cases = made(
        tmp_path, range(2), "--max-cases", "2", "--pattern", "[A-Za-z0-9. ]+", "--self-reference"
    )
    assert len(cases) == 2
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["rules"]["self_reference"] is True
    assert settings["reads_with"]["detector_model"] == "PP-OCRv6_small_det"
