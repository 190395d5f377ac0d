"""Where each letter of a text stands in a picture, and how likely it is, with the real weights."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from reward_server.scorers.base import Item
from reward_server.scorers.ocr.ctc import Aligned
from reward_server.scorers.ocr.letters import letter_boxes
from reward_server.scorers.ocr.lines import Place
from reward_server.scorers.ocr.reading import Piece
from reward_server.scorers.ocr.scorer import OCRScorer

FACE = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", 32)
STEP = FACE.getlength("M")  # px from letter to letter


def item(*lines, mask, size=(400, 200), text, turned=0) -> Item:
    """A picture with each (words, left, top), asked about its letters."""
    image = Image.new("RGB", size, (236, 232, 222))
    for words, left, top in lines:
        ImageDraw.Draw(image).text((left, top), words, font=FACE, fill=(30, 25, 70))
    image = image.rotate(turned, expand=True)
    left, top, right, bottom = mask
    white = np.zeros((image.height, image.width), dtype=bool)
    white[top:bottom, left:right] = True
    rgb = np.asarray(image)
    box = (top, bottom, left, right)
    crop = rgb[top:bottom, left:right]
    return Item(rgb, crop, text, mask=white, box=box, letters=True)


@pytest.fixture(scope="module", params=["line", "auto"])
def scorer(request):
    scorer = OCRScorer(mode=request.param)
    yield scorer
    scorer.close()


@pytest.fixture(scope="module")
def finder():
    scorer = OCRScorer(mode="auto")
    yield scorer
    scorer.close()


def letters_of(scorer, asked):
    (outcome,) = scorer.score_items([asked])
    assert outcome.errors.keys() <= {"ocr_accuracy"}
    return outcome.letters


def middles(letters):
    return [((one.left + one.right) / 2, (one.top + one.bottom) / 2) for one in letters]


def test_each_letter_has_its_place_in_the_whole_picture(scorer):
    asked = item(("GARDEN", 130, 80), mask=(122, 76, 256, 122), text="garden")
    letters = letters_of(scorer, asked)
    assert len(letters) == 6
    for place, (letter, (x, y)) in enumerate(zip(letters, middles(letters), strict=True)):
        assert letter.likelihood > 0.9
        assert x == pytest.approx(130 + (place + 0.5) * STEP, abs=0.5 * STEP)
        assert 76 <= y <= 122


def test_of_a_text_with_a_wrong_letter_that_one_alone_is_unlikely(scorer):
    asked = item(("GAXDEN", 130, 80), mask=(122, 76, 256, 122), text="garden")
    letters = letters_of(scorer, asked)
    assert [one.likelihood > 0.5 for one in letters] == [True, True, False, True, True, True]
    assert middles(letters)[2][0] == pytest.approx(130 + 2.5 * STEP, abs=STEP)


def test_nobody_is_told_of_letters_who_did_not_ask(scorer):
    asked = item(("GARDEN", 130, 80), mask=(122, 76, 256, 122), text="garden")
    silent = Item(**{**vars(asked), "letters": False})
    (told,), (untold,) = scorer.score_items([asked]), scorer.score_items([silent])
    assert untold.letters is None
    assert told.values == untold.values


def test_letters_of_two_lines_stand_in_their_own_lines(finder):
    lines = ("FRESH", 60, 40), ("BREAD", 90, 100)
    letters = letters_of(finder, item(*lines, mask=(30, 20, 260, 160), text="Fresh bread"))
    assert len(letters) == 10  # a space is no letter
    for place, (x, y) in enumerate(middles(letters)):
        left, top = (60, 40) if place < 5 else (90, 100)
        assert x == pytest.approx(left + (place % 5 + 0.5) * STEP, abs=0.6 * STEP)
        assert top <= y <= top + 44


def test_letters_of_a_line_that_runs_up_stand_above_each_other(finder):
    line = ("GARDEN", 130, 80)
    letters = letters_of(
        finder, item(line, mask=(70, 130, 130, 290), size=(400, 200), text="garden", turned=90)
    )
    for place, (x, y) in enumerate(middles(letters)):
        assert y == pytest.approx(400 - 130 - (place + 0.5) * STEP, abs=0.6 * STEP)
        assert 70 <= x <= 130


def test_letters_of_a_column_stand_below_each_other(finder):
    lines = [(letter, 150, 20 + 40 * place) for place, letter in enumerate("HOTEL")]
    asked = item(*lines, mask=(135, 10, 185, 230), size=(320, 240), text="hotel")
    for place, (x, y) in enumerate(middles(letters_of(finder, asked))):
        assert y == pytest.approx(20 + 40 * (place + 0.5), abs=20)
        assert 135 <= x <= 185


def test_a_nearly_square_line_is_level():
    line = piece(6, 40, 40)
    assert line.part(0.0, 0.5) == [100, 20, 120, 60]


def test_where_nothing_is_written_every_letter_is_unlikely(scorer):
    letters = letters_of(scorer, item(mask=(122, 76, 256, 122), text="garden"))
    assert len(letters) == 6
    assert max(one.likelihood for one in letters) < 0.2
    for one in letters:
        assert 122 <= one.left <= one.right <= 256
        assert 76 <= one.top <= one.bottom <= 122


def piece(frames: int, width: int, height: int = 48) -> Piece:
    box = np.array([[100, 20], [100 + width, 20], [100 + width, 20 + height], [100, 20 + height]])
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    return Piece("", 1.0, np.zeros((frames, 3)), box.astype(float), pixels, 1)


def test_neighbours_share_what_lies_between_them_as_wide_as_they_are_worked_by_hand():
    # 88 px and 8 px of room are 96 px in 12 frames: a frame is 8 px. Middles at 20, 52 and 76 px.
    letters = [Aligned(1.0, 2, 3), Aligned(1.0, 6, 7), Aligned(1.0, 9, 10)]
    line = piece(12, 88)
    place = Place.of(line.pixels, None)
    boxes = letter_boxes(letters, ["w", "i", "e"], [(line, False)], [0], place)
    # w and i share 32 px as 3 to 1, i and e 24 px as 1 to 2; outside as much as inside.
    assert [(left, right) for left, _, right, _ in boxes] == [(100, 144), (144, 160), (160, 188)]
    assert {(top, bottom) for _, top, _, bottom in boxes} == {(20, 68)}


def test_a_letter_between_lines_has_all_of_the_place_and_one_alone_its_line():
    first, second = piece(12, 88), piece(12, 88)
    letters = [Aligned(1.0, 3, 4), Aligned(0.0, 13, 14), Aligned(1.0, 20, 21)]
    place = Place.of(np.zeros((90, 300, 3)), None)
    lines = [(first, False), (second, True)]
    boxes = letter_boxes(letters, ["a", "b", "c"], lines, [1, 14], place)
    assert boxes == [[100, 20, 188, 68], [0, 0, 300, 90], [100, 20, 188, 68]]
