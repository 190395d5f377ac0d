"""Captions are never squares: another font draws what DejaVu lacks, or the letter's number does."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw

from tasks.pictures import fonts
from tasks.pictures.sheets import Span, width_of, write


@pytest.fixture
def own_caches():
    for cached in (fonts.system_fonts, fonts._face_of, fonts._advise):
        cached.cache_clear()
    yield
    for cached in (fonts.system_fonts, fonts._face_of, fonts._advise):
        cached.cache_clear()


@pytest.fixture
def han(tmp_path):
    """A font whose only letter, 漢, is a filled square of 800 units."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "han"])
    builder.setupCharacterMap({ord("漢"): "han"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "han": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "han": (1000, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupPost()
    builder.save(tmp_path / "CJK.ttf")
    return tmp_path / "CJK.ttf"


def named(monkeypatch, *paths):
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: list(map(str, paths)))


def test_a_letter_that_dejavu_lacks_is_drawn_by_a_font_that_has_it(own_caches, monkeypatch, han):
    named(monkeypatch, han)
    parts = [(text, face.getname()[0]) for text, face in fonts.pieces("a漢b", 20)]
    assert [text for text, _ in parts] == ["a", "漢", "b"]
    assert [face == "DejaVu Sans" for _, face in parts] == [True, False, True]
    drawn = Image.new("RGB", (60, 30), "white")
    write(ImageDraw.Draw(drawn), (0, 20), [Span("漢", size=20)])
    assert (np.asarray(drawn)[6:18, 4:16] < 60).all()
    assert width_of([Span("漢", size=20)]) == 20


def test_without_such_a_font_it_is_written_as_its_number_and_the_package_is_told_once(
    own_caches, monkeypatch, caplog
):
    named(monkeypatch)
    assert "".join(text for text, _ in fonts.pieces("x漢字", 12)) == "xU+6F22U+5B57"
    list(fonts.pieces("漢", 12))
    assert caplog.text.count("apt-get install fonts-noto-cjk") == 1


def test_what_dejavu_has_is_drawn_by_it_alone(own_caches, monkeypatch):
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: pytest.fail("asked"))
    text = "Größe Ωμέγα Привет\u200b …"
    ((found, _),) = fonts.pieces(text, 12, bold=True)
    assert found == text
