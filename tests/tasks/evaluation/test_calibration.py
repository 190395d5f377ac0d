"""What the measures say of pictures whose worth is known."""

from dataclasses import replace

import numpy as np
import pytest
from small_runs import HashScorer

from calligrapher.errors import DataError
from calligrapher.tables.parquet import decode_png
from reward_server.style_scale import StyleScale
from tasks.artifacts.layout import RunsDir
from tasks.evaluation import second_ocr
from tasks.evaluation.calibration import Calibration, calibrate
from tasks.evaluation.spoiled import SPOILED
from tasks.params.files import find_params_file
from tasks.params.run_params import load_params
from tasks.runs.run import resources_of


@pytest.fixture
def resources(tmp_path, monkeypatch):
    monkeypatch.setattr(second_ocr, "version", lambda: None)  # hundreds of calls of a program

    def resources(*changes):
        params = load_params(find_params_file("tiny-nft"), list(changes))
        return resources_of(params, RunsDir(tmp_path), HashScorer())

    return resources


def test_style_tells_the_embedded_worlds_right_pictures_from_wrong_and_untouched_ones(
    resources, tmp_path
):
    found = calibrate(resources(), tmp_path, num_cases=48, paint=False)
    style = {kind: values["style_match"] for kind, values in found.values.items()}
    assert style["perfect"] >= 0.9
    assert style["other"] <= 0.3
    assert style["source"] <= 0.3
    assert style["noise"] <= 0.3
    assert style["copied"] >= 0.7  # it has the style; that it is not the text, OCR says
    assert found.values["noise"]["background_error"] == 0
    assert "style_match" not in found.unclear
    assert found.scale.same > 0.9 > 0.3 > found.scale.other
    assert "style_match" in found.text()


def test_a_siglip_that_tells_no_styles_apart_is_shown_and_gets_no_scale():
    found = Calibration(2, {"perfect": {"style_match": 0.51}}, ["style_match"], 0.5, 0.51)
    assert "no measure here" in found.text()
    assert "other 0.500, same 0.510" in found.text()
    with pytest.raises(DataError, match="does not tell the styles"):
        _ = found.scale


def test_cases_without_targets_are_refused(resources, tmp_path):
    cases = resources().cases.evaluation_folder
    for target in cases.glob("*_target.png"):
        target.unlink()
    with pytest.raises(DataError, match="without a target"):
        calibrate(resources(f"data.evaluation={cases}"), tmp_path / "w", num_cases=4)


def test_a_scale_makes_other_zero_and_same_one_and_is_refused_where_it_tells_nothing(tmp_path):
    scale = StyleScale(0.2, 0.7)
    assert [scale.score(c) for c in (-1, 0.2, 0.45, 0.7, 1)] == pytest.approx([0, 0, 0.5, 1, 1])
    (tmp_path / "style_scale.json").write_text(scale.text())
    assert StyleScale.read(tmp_path) == scale
    assert StyleScale.read(tmp_path / "none").score(0.3) == 0.3
    with pytest.raises(ValueError, match="does not tell the styles"):
        StyleScale(0.5, 0.51)
    (tmp_path / "style_scale.json").write_text('{"other": 1')
    with pytest.raises(ValueError, match="must be JSON with the numbers"):
        StyleScale.read(tmp_path)


def test_an_aspect_that_no_case_has_room_to_be_spoiled_in_is_told_and_not_judged(
    resources, tmp_path, monkeypatch
):
    world = resources()
    world.scorer = LooksScorer()
    nowhere = replace(SPOILED["ocr_visibility"], make=lambda *_: None)
    monkeypatch.setitem(SPOILED, "ocr_visibility", nowhere)
    found = calibrate(world, tmp_path, num_cases=2, paint=False)
    assert list(found.spoiled) == ["ocr_sharpness"]
    assert "ocr_visibility" not in found.unclear
    (line,) = (line for line in found.text().splitlines() if line.startswith("ocr_visibility"))
    assert "no measure" not in line


class LooksScorer(HashScorer):
    """Says how visible the text is: by how far the mask's middle row differs within itself."""

    def row(self, image, case):
        pixels = np.asarray(decode_png(image).convert("RGB"), dtype=float)
        return super().row(image, case) | {
            "ocr_visibility": min(1.0, float(np.ptp(pixels[12:20])) / 100),
            "ocr_sharpness": 1.0,
        }


def test_aspects_of_the_text_are_held_against_right_pictures_spoiled_in_them(resources, tmp_path):
    world = resources()
    world.scorer = LooksScorer()
    found = calibrate(world, tmp_path, num_cases=4, paint=False)
    assert list(found.spoiled) == ["ocr_visibility", "ocr_sharpness"]
    visible = found.spoiled["ocr_visibility"]
    assert visible.perfect == 1.0
    assert visible.spoiled < 0.7
    assert visible.cases == 4
    assert "ocr_visibility" not in found.unclear, "the source has text that is seen as well"
    assert "ocr_sharpness" in found.unclear
    (line,) = (line for line in found.text().splitlines() if line.startswith("ocr_sharpness"))
    assert line.endswith("the target blurred, by a fifth of the mask's height  no measure here")
    assert found.text().count("ocr_visibility") == 1


@pytest.fixture
def sheet():
    """A picture of 12 x 20 px with ink in half of its mask of 8 x 8, its source, and the mask."""
    mask = np.zeros((12, 20, 1), bool)
    mask[2:10, 1:9] = True
    source = np.full((12, 20, 3), 200, np.uint8)
    target = source.copy()
    target[2:10, 1:3] = 20
    return target, source, mask


def test_a_right_picture_is_spoiled_in_one_thing_and_within_its_mask(sheet):
    target, _, mask = sheet
    made = {name: spoiled.make(*sheet) for name, spoiled in SPOILED.items()}
    for name in ("ocr_visibility", "ocr_upright", "ocr_unstruck", "ocr_size"):
        assert (made[name] == target)[~mask[..., 0]].all(), name
        assert (made[name] != target).any(), name
    assert np.ptp(made["ocr_visibility"]) == round(0.03 * 180)
    assert (made["ocr_upright"][2:10, 7:9] == 20).all()
    assert (made["ocr_unstruck"][5:7, 1:9] == 20).all()
    assert (made["ocr_size"] < 200).any(2).sum() <= 4
    assert (made["ocr_inside"][2:10, 5:7] == 20).all()
    assert (made["ocr_inside"][2:10, 1:5] == 200).all()
    assert np.abs(np.diff(made["ocr_sharpness"].astype(float), axis=1)).max() < 90


def test_what_has_no_room_beside_the_mask_is_left_out(sheet):
    target, source, mask = (part[:, :12] for part in sheet)
    assert SPOILED["ocr_inside"].make(target, source, mask) is None
