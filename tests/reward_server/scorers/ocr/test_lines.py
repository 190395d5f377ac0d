"""Where lines are looked for and which of them lie in a mask; no model is asked."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from reward_server.scorers.ocr.lines import (
    MAX_LENGTH,
    SIDE_LIMIT,
    Place,
    lines_in,
    plain_line,
    region_around,
)

RGB = np.zeros((120, 200, 3), dtype=np.uint8)


def box(left, top, right, bottom):
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=float)


def place(left, top, right, bottom, rgb=RGB):
    mask = np.zeros(rgb.shape[:2], dtype=bool)
    mask[top:bottom, left:right] = True
    return Place.of(rgb, mask)


@pytest.mark.parametrize(
    ("found", "inside"),
    [
        (box(60, 45, 140, 65), [1.0]),
        (box(60, 45, 154, 65), [1.0]),  # a box reaches a little over its letters
        (box(60, 45, 230, 65), [0.53]),  # goes on to the right
        (box(60, 2, 140, 22), []),
        (box(60, 70, 140, 92), []),  # its lower half is the scene's
    ],
)
def test_what_lies_in_the_mask_is_kept_and_what_goes_on_is_cut(found, inside):
    lines = lines_in(RGB, [found], place(50, 30, 150, 80))
    assert [line.inside for line in lines] == pytest.approx(inside, abs=0.01)


def test_of_a_page_full_of_text_no_more_is_read_than_a_target_may_fill():
    page = [box(0, 2 * row, 200, 2 * row + 2) for row in range(60)]  # 100 times as long as high
    lines = lines_in(RGB, page, Place.of(RGB, None))
    assert len(lines) == MAX_LENGTH / 100 == 3


def test_a_high_box_may_run_up_or_down_or_be_a_column():
    (line,) = lines_in(RGB, [box(90, 10, 110, 110)], Place.of(RGB, None))
    assert {way.shape[:2] for way in line.ways} >= {(20, 100)}
    assert len(line.ways) >= 2
    assert line.boxes[0][0].tolist() == [90, 110]  # read upwards, it begins at the bottom


@pytest.mark.parametrize("shape", [(4096, 4096), (9, 4000), (700, 1), (1, 1), (32, 96)])
def test_the_detectors_input_is_bounded_whatever_the_picture(shape):
    rgb = np.zeros((*shape, 3), dtype=np.uint8)
    region = region_around(rgb, Place.of(rgb, None))
    height, width = region.pixels.shape[:2]
    assert max(height, width) <= SIDE_LIMIT
    assert height % 32 == width % 32 == 0
    corner = region.to_picture(np.array([(width, height)]))
    assert corner == pytest.approx(np.array([shape[::-1]]))


def test_the_region_is_the_mask_with_half_its_height_around_it():
    region = region_around(RGB, place(50, 30, 150, 80))
    assert (region.left, region.top) == (25, 5)


def strip(text: str, left: int = 10, height: int = 40) -> np.ndarray:
    image = Image.new("RGB", (160, height), (236, 232, 222))
    font = ImageFont.load_default(size=24)
    ImageDraw.Draw(image).multiline_text((left, 4), text, (30, 25, 70), font, spacing=0)
    return np.asarray(image)


def test_one_plain_line_that_fills_its_mask_is_known_without_a_detector():
    rgb = strip("gardens")
    line = plain_line(rgb, Place.of(rgb, None))
    (left, top), _, (right, bottom), _ = line.boxes[0]
    inked = (rgb < 120).any(axis=2)
    assert not np.delete(inked, np.s_[int(top) : int(np.ceil(bottom))], axis=0).any()
    assert not np.delete(inked, np.s_[int(left) : int(np.ceil(right))], axis=1).any()
    assert bottom - top < 35
    assert line.inside == 1


@pytest.mark.parametrize(
    "rgb",
    [
        strip("two\nlines", height=70),
        strip("cut", left=-6),
        strip(""),
        strip("low", height=90),
        np.random.default_rng(0).integers(0, 255, (40, 160, 3), dtype=np.uint8),
    ],
    ids=["two lines", "cut", "empty", "low", "noise"],
)
def test_what_is_not_plainly_one_line_is_looked_for(rgb):
    assert plain_line(rgb, Place.of(rgb, None)) is None
