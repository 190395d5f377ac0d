"""Cases drawn with a user's fonts and words are whole, legible, repeatable, and have targets."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from calligrapher.data.dataset import load_cases
from calligrapher.data.images import load_mask, load_rgb, mask_box
from calligrapher.errors import DataError
from tasks.data.draw import Sheet, draw_cases

SHIPPED = Path(matplotlib.get_data_path()) / "fonts/ttf"


@pytest.fixture
def fonts(tmp_path):
    folder = tmp_path / "fonts"
    folder.mkdir()
    for name in ("DejaVuSans.ttf", "STIXGeneralBol.ttf"):
        shutil.copy(SHIPPED / name, folder)
    return folder


@pytest.fixture
def words(tmp_path):
    (tmp_path / "words.txt").write_text("River\nMOON\n\nRiver\nStones!\n")
    return tmp_path / "words.txt"


def pixels(path):
    return np.asarray(load_rgb(path), dtype=int)


@pytest.mark.parametrize("sheet", [Sheet(), Sheet(96, 32, 13), Sheet(200, 48)], ids=str)
def test_the_target_is_the_source_outside_of_the_mask_and_shows_another_word_inside(
    fonts, words, tmp_path, sheet
):
    drawn = draw_cases(fonts, words, tmp_path / "out", num_cases=9, sheet=sheet, seed=4)
    assert (drawn.cases, drawn.fonts, drawn.words, drawn.left_out) == (9, 2, 3, ())
    cases = load_cases(drawn.path, "self")
    assert {case.text for case in cases} == {"River", "MOON", "Stones!"}
    for case in cases:
        source, target = pixels(case.source), pixels(case.target)
        assert source.shape == (sheet.height, sheet.width, 3)
        outside = np.asarray(load_mask(case.mask)) == 0
        assert (source == target)[outside].all()
        differs = (np.abs(source - target).sum(axis=2) > 100).sum()
        assert differs > 0.05 * (~outside).sum()
        assert np.abs(pixels(case.reference) - target).max() > 60


def test_letters_stand_in_cells_where_they_are_asked_for(fonts, words, tmp_path):
    folder = draw_cases(
        fonts, words, tmp_path / "out", num_cases=9, sheet=Sheet(120, 32, 15), seed=1
    ).path
    for case in load_cases(folder, "self"):
        left, top, right, bottom = mask_box(load_mask(case.mask))
        assert (left, top, bottom) == (3, 4, 28)
        assert (right - left) % 15 == 0
        assert right - left >= 15 * len(case.text)


def test_the_same_seed_draws_the_same_bytes_and_more_cases_begin_alike(fonts, words, tmp_path):
    for name, count in (("a", 3), ("b", 5)):
        draw_cases(fonts, words, tmp_path / name, num_cases=count, sheet=Sheet(), seed=7)
    for file in (tmp_path / "a").glob("*.png"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_words_that_cannot_be_drawn_are_all_named_before_anything_is_written(fonts, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("good\n書\nmuch-too-long\n")
    with pytest.raises(DataError) as error:
        draw_cases(fonts, words, tmp_path / "out", num_cases=2, sheet=Sheet(cell=15))
    assert "- 書: no font has 書" in str(error.value)
    assert "- much-too-long: 13 cells of 15 px exceed 96 px" in str(error.value)
    assert not (tmp_path / "out").exists()
    words.write_text("alone\n")
    with pytest.raises(DataError, match="at least two words"):
        draw_cases(fonts, words, tmp_path / "out", num_cases=2, sheet=Sheet())


def test_a_word_is_drawn_in_fonts_that_have_its_letters_and_others_are_told(fonts, words, tmp_path):
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "x"])
    builder.setupCharacterMap({ord("x"): "x"})
    empty = TTGlyphPen(None).glyph()
    builder.setupGlyf({".notdef": empty, "x": empty})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "x": (500, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupPost()
    builder.save(fonts / "icons.ttf")
    drawn = draw_cases(fonts, words, tmp_path / "out", num_cases=4, sheet=Sheet())
    assert drawn.left_out == ("icons.ttf",)
    assert drawn.text().endswith("fonts without the letters of any word: icons.ttf")
    (fonts / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(DataError, match=r"broken\.ttf must be fonts with letters"):
        draw_cases(fonts, words, tmp_path / "more", num_cases=4, sheet=Sheet())
    with pytest.raises(DataError, match=r"self_bench\.txt must not be there yet"):
        draw_cases(fonts, words, tmp_path / "out", num_cases=4, sheet=Sheet())
