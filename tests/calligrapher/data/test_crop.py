"""Cutting the part around a mask, and pasting it back: odd sizes, corners, full width, islands,
seams."""

import numpy as np
import pytest
from PIL import Image

from calligrapher.data.crop import crop_box, faded, paste, whole
from calligrapher.data.images import mask_box

CANVAS = (96, 32)


def mask_of(size, *boxes):
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(255, box)
    return mask


CASES = {
    "in the middle": ((301, 173), [(120, 70, 190, 95)]),
    "in a corner": ((301, 173), [(0, 0, 31, 17)]),
    "in the opposite corner": ((1999, 777), [(1900, 760, 1999, 777)]),
    "across the full width": ((301, 173), [(0, 80, 301, 99)]),
    "across the full width of a large picture": ((1999, 777), [(0, 5, 1999, 60)]),
    "across the full height": ((301, 173), [(3, 0, 17, 173)]),
    "two islands": ((1999, 777), [(400, 300, 520, 340), (700, 310, 905, 377)]),
    "two islands far apart": ((1999, 777), [(0, 0, 9, 9), (1990, 768, 1999, 777)]),
    "a picture smaller than the canvas": ((41, 19), [(5, 3, 30, 12)]),
    "one pixel": ((301, 173), [(300, 172, 301, 173)]),
}


@pytest.mark.parametrize("canvas", [CANVAS, (64, 64), (48, 512)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_crop_holds_the_mask_in_the_picture_and_has_the_canvas_shape(name, canvas):
    size, boxes = CASES[name]
    inner = mask_box(mask_of(size, *boxes))
    left, top, right, bottom = box = crop_box(inner, size, canvas, 1.5)
    assert 0 <= left <= inner[0] < inner[2] <= right <= size[0]
    assert 0 <= top <= inner[1] < inner[3] <= bottom <= size[1]
    if box != whole(size):
        # Some size, in canvases, gives both sides when rounded.
        least, most = (
            pick(((right - left + off) / canvas[0], (bottom - top + off) / canvas[1]))
            for pick, off in ((max, -0.5), (min, 0.5))
        )
        assert least <= most


def test_a_mask_that_fits_on_the_canvas_is_cut_out_at_the_canvas_size():
    for mask in [(100, 60, 190, 84), (0, 0, 96, 32), (250, 150, 251, 151)]:
        left, top, right, bottom = crop_box(mask, (301, 173), CANVAS, 1.5)
        assert (right - left, bottom - top) == CANVAS


def test_a_larger_mask_grows_the_crop_by_the_factor_and_lies_in_its_middle():
    # 192 / 96 = 2 canvases wide, times 1.5: 288 x 96 around the centre (400, 300).
    assert crop_box((304, 290, 496, 310), (1000, 700), CANVAS, 1.5) == (256, 252, 544, 348)
    assert crop_box((304, 290, 496, 310), (1000, 700), CANVAS, 1.0) == (304, 268, 496, 332)
    # At the border it is moved inwards, and it never exceeds the picture.
    assert crop_box((0, 0, 192, 20), (1000, 700), CANVAS, 1.5) == (0, 0, 288, 96)
    assert crop_box((0, 0, 192, 20), (250, 700), CANVAS, 1.5) == (0, 0, 250, 83)


def test_without_a_crop_of_the_canvas_shape_the_whole_picture_is_taken():
    assert crop_box((0, 10, 301, 20), (301, 50), CANVAS, 1.5) == (0, 0, 301, 50)
    assert crop_box((3, 0, 17, 173), (301, 173), CANVAS, 1.5) == (0, 0, 301, 173)


def test_the_fade_rises_inwards_by_equal_steps_and_leaves_the_picture_border_alone():
    mask = mask_of(
        (300, 200), (0, 50, 300, 200)
    )  # One edge: its upper side. 150 thick, twice: no limit.
    column = np.asarray(faded(mask, 3))[:, 150]
    assert column[:50].max() == 0
    assert column[50:55].tolist() == [64, 128, 191, 255, 255]
    assert (column[54:] == 255).all()


def test_a_thin_mask_has_a_thin_seam():
    # 40 x 16: 640 pixels, 108 of them at the edge, mean thickness 11: an eighth is one pixel.
    found = np.asarray(faded(mask_of((100, 60), (20, 20, 60, 36)), 8))
    assert found[20, 21:59].tolist() == [128] * 38
    assert (found[21:35, 21:59] == 255).all()


def test_without_feather_the_fade_is_the_mask():
    mask = mask_of((301, 173), (5, 7, 90, 100), (200, 160, 301, 173))
    assert faded(mask, 0).tobytes() == mask.tobytes()


@pytest.mark.parametrize("feather", [0, 8])
@pytest.mark.parametrize("name", CASES)
def test_pixels_outside_of_the_mask_stay_and_those_deep_inside_are_all_new(name, feather):
    size, boxes = CASES[name]
    rng = np.random.default_rng(0)
    source = Image.fromarray(rng.integers(0, 200, (size[1], size[0], 3), dtype=np.uint8))
    mask = mask_of(size, *boxes)
    box = crop_box(mask_box(mask), size, CANVAS, 1.5)
    weights = faded(mask, feather)
    result = paste(source, Image.new("RGB", CANVAS, (250, 251, 252)), box, weights)

    assert result.size == size
    outside = np.asarray(mask) == 0
    assert (np.asarray(result)[outside] == np.asarray(source)[outside]).all()
    inside = np.asarray(weights) == 255
    assert inside.any()
    assert (np.asarray(result)[inside] == (250, 251, 252)).all()


def test_a_picture_of_the_size_of_its_box_is_not_resampled():
    rng = np.random.default_rng(1)
    source, painted = (
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in [(301, 173), CANVAS]
    )
    mask = mask_of(source.size, (103, 64, 193, 88))
    left, top, right, bottom = box = crop_box(mask_box(mask), source.size, CANVAS, 1.5)
    result = paste(source, painted, box, mask)
    white = np.asarray(mask.crop(box)) == 255
    assert (right - left, bottom - top) == CANVAS
    assert (np.asarray(result.crop(box))[white] == np.asarray(painted)[white]).all()
