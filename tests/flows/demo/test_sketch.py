"""From what was drawn, uploaded and typed to a case: sizes, paint, and what must hold."""

import numpy as np
import pytest
from PIL import Image

from calligrapher.data.images import load_mask, load_rgb
from calligrapher.errors import DataError
from flows.demo.sketch import (
    PAINT,
    DemoInput,
    Taken,
    editor_value,
    mask_of_layers,
    mask_on,
    scaled_for_editor,
    uploaded_mask,
    write_case,
)


def picture(width=13, height=7, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask_of(box, size=(13, 7)):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def sketch(**changes):
    whole = {
        "source": picture(),
        "mask": mask_of((2, 1, 9, 5)),
        "reference": picture(seed=1),
        "text": "Hi",
    }
    return DemoInput(**whole | changes)


def test_a_sketch_becomes_a_case_with_the_same_pixels(tmp_path):
    case = write_case(sketch(text="  Hi, you "), tmp_path)
    assert (case.text, case.prompt) == ("Hi, you", "The text is 'Hi, you'.")
    assert load_rgb(case.source) == picture()
    assert load_rgb(case.reference) == picture(seed=1)
    assert load_mask(case.mask) == mask_of((2, 1, 9, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, "There must be a source picture."),
        ({"reference": None}, "There must be a reference picture."),
        ({"mask": None}, "The mask must have a painted pixel."),
        ({"mask": mask_of((0, 0, 0, 0))}, "The mask must have a painted pixel."),
        ({"mask": mask_of((0, 0, 13, 7))}, "mask.png must keep a part of the source (black)."),
        ({"text": " "}, "text must have a visible character."),
        ({"text": "one\ntwo"}, "text must be one line"),
        (
            {"reference": picture(3, 25)},
            "reference.png must be at most 8 times as tall as wide. Found 3x25.",
        ),
    ],
)
def test_what_must_hold_is_said(tmp_path, changes, message):
    with pytest.raises(DataError) as told:
        write_case(sketch(**changes), tmp_path)
    assert str(told.value).removeprefix(f"{tmp_path}/").startswith(message)


@pytest.mark.parametrize("size", [(13, 7), (96, 32), (960, 3), (1920, 500), (700, 1500)])
def test_a_mask_survives_the_editor_as_it_is_where_the_picture_is_not_reduced(tmp_path, size):
    mask = mask_of((size[0] // 4, size[1] // 3, size[0] // 2 + 1, size[1]), size)
    shown = editor_value(tmp_path, picture(*size), mask)
    assert shown == editor_value(tmp_path, picture(*size), mask)
    background, layer = (Image.open(path) for path in (shown["background"], *shown["layers"]))
    assert max(background.size) <= 960
    assert background.size == layer.size
    back = np.asarray(mask_of_layers([layer], size)) != np.asarray(mask)
    assert back.mean() == 0 if max(size) <= 960 else back.mean() < 0.01


def test_small_pictures_are_enlarged_by_a_whole_factor():
    shown = scaled_for_editor(picture(96, 32))
    assert shown.size == (960, 320)
    assert shown.resize((96, 32), Image.Resampling.NEAREST) == picture(96, 32)


def test_paint_counts_from_half_opacity_on_and_layers_add_up():
    faint, strong = Image.new("RGBA", (26, 14)), Image.new("RGBA", (26, 14))
    faint.paste((*PAINT[:3], 127), (0, 0, 26, 14))
    strong.paste((*PAINT[:3], 128), (4, 2, 10, 6))
    assert mask_of_layers([faint], (13, 7)).getbbox() is None
    assert mask_of_layers([faint, strong], (13, 7)) == mask_of((2, 1, 5, 3))
    assert mask_of_layers([], (13, 7)).getbbox() is None


def test_an_uploaded_mask_fits_its_source(tmp_path):
    path = tmp_path / "mask.png"
    mask_of((2, 1, 9, 5)).save(path)
    assert uploaded_mask(path, picture()) == mask_of((2, 1, 9, 5))
    with pytest.raises(DataError, match=r"as large as the source, 12x7\. Found 13x7\."):
        uploaded_mask(path, picture(12, 7))


def test_until_the_editor_has_drawn_a_picture_its_own_mask_counts(tmp_path):
    def drawn(source, mask=None):
        shown = editor_value(tmp_path, source, mask)
        layers = [Image.open(path) for path in shown["layers"]]
        return {"background": Image.open(shown["background"]), "layers": layers}

    own, painted = mask_of((2, 1, 9, 5)), mask_of((0, 0, 4, 4))
    taken = Taken(picture(), own)
    assert mask_on(taken, drawn(picture(), painted)) == painted
    assert mask_on(taken, drawn(picture(seed=1), painted)) == own  # still the picture before
    assert mask_on(taken, drawn(picture())).getbbox() is None  # erased
    assert mask_on(taken, {"background": None, "layers": []}) == own
    assert mask_on(taken, None) == own
    assert mask_on(Taken(picture()), drawn(picture(seed=1), painted)) is None
