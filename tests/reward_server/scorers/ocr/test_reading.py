"""Reading what lies in a mask, with the real PP-OCRv6 weights on small drawn scenes."""

from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from reward_server.alphabet import Alphabet, bundled_alphabet
from reward_server.scorers.base import Item
from reward_server.scorers.ocr.aspects import look
from reward_server.scorers.ocr.ink import ink_of
from reward_server.scorers.ocr.scorer import OCRScorer

FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


def written(text: str, points: int = 40, angle: int = 0) -> Image.Image:
    """The text as coverage, turned counter-clockwise."""
    face = ImageFont.truetype(FONT, points)
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=face)
    layer = Image.new("L", (int(box[2] - box[0]) + 4, int(box[3] - box[1]) + 4))
    draw = ImageDraw.Draw(layer)
    draw.multiline_text((2 - box[0], 2 - box[1]), text, font=face, fill=255, align="center")
    return layer.rotate(angle, expand=True, resample=Image.Resampling.BICUBIC)


def scene(*parts, mask=(40, 60, 280, 180), size=(320, 240)) -> tuple[np.ndarray, np.ndarray]:
    """A picture with each (layer, left, top), and a mask (left, top, right, bottom)."""
    image = Image.new("RGB", size, (236, 232, 222))
    for layer, left, top in parts:
        image.paste((30, 25, 70), (left, top), layer)
    white = Image.new("L", size)
    ImageDraw.Draw(white).rectangle(mask, fill=255)
    return np.asarray(image), np.asarray(white) > 0


@pytest.fixture(scope="module")
def scorer():
    scorer = OCRScorer(mode="auto")
    yield scorer
    scorer.close()


def score(scorer: OCRScorer, drawn: tuple[np.ndarray, np.ndarray], text: str, match=None) -> dict:
    image, mask = drawn
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    crop = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    (outcome,) = scorer.score_items([Item(image, crop, text, mask=mask, match=match)])
    return outcome.values | {"errors": outcome.errors}


def test_two_lines_in_a_mask_are_read_in_order(scorer):
    assert score(scorer, scene((written("Fresh\nBread"), 90, 70)), "Fresh Bread") == {
        "ocr_text": "Fresh Bread",
        "ocr_confidence": pytest.approx(1, abs=0.05),
        "ocr_accuracy": 1.0,
        "ocr_likelihood": pytest.approx(1, abs=0.05),
        "errors": {},
        **dict.fromkeys(
            ["ocr_visibility", "ocr_upright", "ocr_unstruck", "ocr_sharpness", "ocr_inside"], 1.0
        ),
        "ocr_size": 1.0,
    }


@pytest.mark.parametrize(
    ("text", "angle", "mask"),
    [
        ("garden", 25, (40, 20, 280, 220)),
        ("garden", 90, (110, 20, 220, 220)),
        ("garden", -90, (110, 20, 220, 220)),
    ],
)
def test_a_turned_line_is_read_upright(scorer, text, angle, mask):
    layer = written(text, angle=angle)
    place = (layer, 160 - layer.width // 2, 120 - layer.height // 2)
    assert score(scorer, scene(place, mask=mask), text)["ocr_accuracy"] == 1.0


def test_letters_below_each_other_are_one_word(scorer):
    drawn = scene((written("C\nA\nF\nE", points=42), 140, 15), mask=(115, 5, 205, 235))
    found = score(scorer, drawn, "CAFE")
    assert (found["ocr_text"], found["ocr_accuracy"]) == ("CAFE", 1.0)


def test_text_in_the_mask_beside_the_target_counts_and_text_outside_does_not(scorer):
    word, junk = written("garden", points=36), written("stock photo", points=13)
    inside = score(scorer, scene((word, 90, 80), (junk, 180, 155)), "garden")
    outside = score(scorer, scene((word, 90, 80), (junk, 180, 205)), "garden")
    assert outside["ocr_text"] == "garden"
    assert outside["ocr_accuracy"] == 1.0
    assert inside["ocr_accuracy"] < 0.5
    assert inside["ocr_likelihood"] < 0.1 < 0.9 < outside["ocr_likelihood"]


def test_what_lies_in_the_masks_box_and_not_in_the_mask_is_not_read(scorer):
    image, mask = scene(
        (written("GOOD", 34), 90, 25),
        (written("BETWEEN", 30), 75, 100),
        (written("NIGHT", 34), 85, 180),
        mask=(40, 15, 280, 75),
    )
    mask = mask | scene(mask=(40, 165, 280, 230))[1]
    assert score(scorer, (image, mask), "good night")["ocr_text"] == "GOOD NIGHT"


def test_a_line_that_goes_on_beyond_the_mask_is_cut_off(scorer):
    found = score(
        scorer, scene((written("flowerpot"), 50, 90), mask=(40, 80, 165, 150)), "flowerpot"
    )
    assert 0.3 < found["ocr_accuracy"] < 0.9
    assert found["ocr_inside"] < 0.8


def test_a_line_that_fills_its_mask_is_read_as_the_masks_box_shows_it(scorer):
    line = OCRScorer(mode="line")
    image, _ = scene((written("garden", points=22), 10, 6), size=(112, 36))
    same = [score(one, (image, np.ones((36, 112), dtype=bool)), "gardon") for one in (scorer, line)]
    for part in ("ocr_text", "ocr_confidence", "ocr_accuracy", "ocr_likelihood"):
        assert same[0][part] == same[1][part]
    assert "ocr_visibility" not in same[1]
    line.close()


def test_text_that_nobody_would_accept_is_not_read_and_an_aspect_says_why(scorer):
    word = written("kitchen")
    struck = word.copy()
    ImageDraw.Draw(struck).line([(0, 22), (struck.width, 22)], fill=255, width=4)
    faint = np.full((240, 320, 3), 200, dtype=np.uint8)
    faint[90 : 90 + word.height, 80 : 80 + word.width] += np.uint8(
        np.asarray(word)[..., None] > 127
    ) * np.uint8(1)
    mask = scene()[1]
    for drawn, aspect in (
        (scene((word.rotate(180), 80, 95)), "upright"),
        (scene((struck, 80, 95)), "unstruck"),
        (scene((written("kitchen", points=10), 140, 115)), "size"),
        ((faint, mask), "visibility"),
    ):
        found = score(scorer, drawn, "kitchen")
        assert found[f"ocr_{aspect}"] < 0.6, aspect
        assert found["ocr_accuracy"] < 1, aspect


def test_an_empty_mask_has_scores_and_no_aspect_above_0(scorer):
    found = score(scorer, scene(), "word")
    assert (found["ocr_text"], found["ocr_accuracy"], found["errors"]) == ("", 0.0, {})
    assert found["ocr_likelihood"] < 0.05
    assert found["ocr_visibility"] == found["ocr_size"] == found["ocr_upright"] == 0.0


def test_case_and_spaces_count_where_the_item_says_so(scorer):
    drawn = scene((written("Old town"), 70, 95))
    assert score(scorer, drawn, "old TOWN", "loose")["ocr_accuracy"] == 1.0
    assert score(scorer, drawn, "Old Town", "exact")["ocr_accuracy"] == pytest.approx(7 / 8)
    exact = [score(scorer, drawn, text, "exact") for text in ("Old town", "Oldtown", "Old Town")]
    assert exact[0]["ocr_accuracy"] == 1.0
    assert exact[1]["ocr_accuracy"] == pytest.approx(6 / 7)
    likely = [found["ocr_likelihood"] for found in exact]
    assert likely[0] > 0.9 > max(likely[1:])


@pytest.mark.parametrize("text", ["2026 Москва", "Việt Nam", "שלום!", "אבא", "K-팝"])
def test_a_target_with_one_letter_beyond_the_alphabet_is_null_with_the_reason(scorer, text):
    found = score(scorer, scene((written("Hi"), 120, 95)), text)
    assert set(found["errors"]) == {"ocr_accuracy", "ocr_likelihood"}
    assert "alphabet has no" in found["errors"]["ocr_accuracy"]


@pytest.mark.parametrize("match", ["loose", "exact"])
def test_the_alphabet_known_before_a_run_is_the_engines(scorer, match):
    assert bundled_alphabet(match).classes == Alphabet(scorer._recogniser.characters, match).classes


def test_large_letters_in_a_large_picture_are_read(scorer):
    image = Image.new("RGB", (1024, 1024), "white")
    image.paste((10, 10, 10), (160, 380), written("Hello", points=256))
    item = Item(np.asarray(image), np.asarray(image), "Hello", has_mask=False)
    (outcome,) = scorer.score_items([item])
    assert outcome.values["ocr_accuracy"] == 1.0
    assert set(outcome.errors) == {"ocr_inside", "ocr_size"}


@pytest.mark.parametrize(("left", "right", "read"), [(0, 0, True), (0, 14, False), (14, 0, False)])
def test_a_letter_that_the_masks_edge_cuts_is_not_read(scorer, left, right, read):
    word = written("garden", points=48)
    mask = (60 + left, 70, 60 + word.width - right, 160)
    found = score(scorer, scene((word, 60, 85), mask=mask), "garden")
    assert (found["ocr_accuracy"] == 1.0) == read


def test_a_letter_that_the_pictures_edge_cuts_is_not_read_and_one_beside_it_is(scorer):
    word = written("garden", points=48)
    read = [
        score(scorer, scene((word, left, 85), mask=(100, 70, 319, 160)), "garden")["ocr_accuracy"]
        for left in (318 - word.width, 320 - word.width + 10)
    ]
    assert read[0] == 1.0 > read[1]


def test_a_word_whose_lower_third_lies_outside_of_the_mask_is_not_read(scorer):
    word = written("SUMMIT", points=56)
    read = [
        score(scorer, scene((word, 50, 80), mask=(40, 60, 300, bottom)), "SUMMIT")["ocr_accuracy"]
        for bottom in (81 + word.height, 80 + round(0.55 * word.height))
    ]
    assert read == [1.0, 0.0]


def test_a_stroke_across_all_letters_strikes_them_out_and_an_underline_does_not(scorer):
    word = written("kitchen", points=48)
    across = word.copy()
    ImageDraw.Draw(across).line([(0, word.height), (word.width, 0)], fill=255, width=4)
    below = Image.new("L", (word.width, word.height + 8))
    below.paste(word)
    ImageDraw.Draw(below).line([(0, word.height + 4), (word.width, word.height + 4)], 255, 3)
    found = [score(scorer, scene((one, 60, 90)), "kitchen") for one in (across, below)]
    assert [one["ocr_accuracy"] for one in found] == [0.0, 1.0]
    assert found[0]["ocr_unstruck"] < 0.5
    assert found[1]["ocr_unstruck"] == 1.0


def test_letters_of_which_most_rows_are_missing_are_not_read(scorer):
    word = np.asarray(written("Winter", points=56)).copy()
    read = []
    for kept in (8, 3):
        for row in range(kept, 8):
            word[row::8] = 0
        read.append(score(scorer, scene((Image.fromarray(word), 60, 85)), "Winter"))
    assert [one["ocr_accuracy"] for one in read] == [1.0, 0.0]
    assert [one["ocr_unstruck"] for one in read] == [1.0, 0.0]


@pytest.mark.parametrize(("levels", "visible"), [(40, True), (2, False)])
def test_ink_is_seen_against_the_ground_around_it(levels, visible):
    word = np.asarray(written("galaxy", points=56)) / 255
    slope = np.linspace(60, 200, word.shape[1])  # more than the letters differ from it
    shown = np.repeat((slope + levels * word)[..., None], 3, axis=2).round().astype(np.uint8)
    assert (look(shown)[0] == 1.0) == visible
    if visible:
        ink, _ = ink_of(shown)
        painted = cv2.resize(word, ink.shape[::-1], interpolation=cv2.INTER_AREA) > 0.5
        assert (ink == painted).mean() > 0.93
