"""What the measures say of pictures whose worth is known."""

import pytest
from small_runs import HashScorer

from calligrapher.errors import DataError
from reward_server.style_scale import StyleScale
from tasks.artifacts.layout import RunsDir
from tasks.evaluation import second_ocr
from tasks.evaluation.calibration import Calibration, calibrate
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
