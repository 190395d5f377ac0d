"""One case as tensors: canvas, mask, target and style image, with and without the reference on
top."""

import pytest
import torch
from PIL import Image

from calligrapher.data.canvas import Canvas, prepare
from calligrapher.data.case import Case
from calligrapher.errors import DataError

SIZE = (24, 18)


def paint_mask(path, box):
    image = Image.new("L", SIZE)
    image.paste(255, box)
    image.save(path)


@pytest.fixture
def case(tmp_path):
    """Source red, reference green, target blue, each of value 12; the mask a box."""
    Image.new("RGB", SIZE, (12, 0, 0)).save(tmp_path / "source.png")
    Image.new("RGB", (40, 11), (0, 12, 0)).save(tmp_path / "reference.png")
    Image.new("RGB", SIZE, (0, 0, 12)).save(tmp_path / "target.png")
    paint_mask(tmp_path / "mask.png", box=(3, 4, 15, 9))
    files = {name: tmp_path / f"{name}.png" for name in ("source", "mask", "reference", "target")}
    return Case(case_id="one", text="word", **files)


def test_prepare_without_context_gives_the_bare_canvas(case):
    prepared = prepare(case, Canvas(48, 32))
    assert prepared.image.shape == (3, 32, 48)
    assert prepared.mask.shape == (1, 32, 48)
    assert prepared.context_height == 0
    # Source (12, 0, 0): 12 / 127.5 - 1.
    assert prepared.image.amax((1, 2)).tolist() == pytest.approx([12 / 127.5 - 1, -1, -1])
    # The box (3, 4, 15, 9) of 24x18 is (6, 7.1, 30, 16) of 48x32.
    rows, columns = prepared.mask[0].nonzero(as_tuple=True)
    assert (columns.min(), columns.max()) == (6, 29)
    assert (rows.min(), rows.max()) == (7, 15)


def test_prepare_with_context_puts_the_reference_on_top_and_never_paints_it(case):
    bare = prepare(case, Canvas(48, 32))
    stacked = prepare(case, Canvas(48, 32, reference_context=True))
    assert stacked.context_height == 16  # 40x11 at width 48 is 13 high.
    assert stacked.image.shape == (3, 48, 48)
    assert stacked.image[:, :16].amax((1, 2)).tolist() == pytest.approx([-1, 12 / 127.5 - 1, -1])
    assert not stacked.mask[:, :16].any()
    assert stacked.image[:, 16:].equal(bare.image)
    assert stacked.mask[:, 16:].equal(bare.mask)


def test_prepare_letterboxes_the_reference_not_the_source(case):
    style = prepare(case, Canvas(32, 32, reference_context=True)).style_image
    assert style.size == (512, 512)
    assert style.getbbox() == (0, 186, 512, 326)  # 40x11 -> 512x140.
    assert style.getpixel((256, 256)) == (0, 12, 0)


def test_prepare_refuses_a_canvas_on_which_the_mask_vanishes(case):
    paint_mask(case.mask, box=(1, 1, 2, 2))  # Between the pixels that nearest picks: 0, 2, 3, ...
    with pytest.raises(
        DataError, match=r"mask\.png must have a white pixel left on a 16x16 canvas"
    ):
        prepare(case, Canvas(16, 16))


def test_a_target_lies_on_the_canvas_like_the_source(case):
    for context, height in ((False, 32), (True, 48)):
        prepared = prepare(case, Canvas(48, 32, reference_context=context))
        assert prepared.target.shape == (3, height, 48)
        assert prepared.target[:, :16].equal(prepared.image[:, :16]) == context
        below = prepared.target[:, prepared.context_height :]
        assert below.amax((1, 2)).tolist() == pytest.approx([-1, -1, 12 / 127.5 - 1])


def test_nothing_stands_in_for_a_target_that_is_not_there(case):
    canvas = Canvas(48, 32, reference_context=True)
    bare = prepare(case.model_copy(update={"target": None}), canvas)
    assert bare.target is None
    assert torch.equal(bare.image, prepare(case, canvas).image)
