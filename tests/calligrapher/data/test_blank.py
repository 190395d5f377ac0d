"""Empty pictures: sizes, colours and places as people write them."""

import numpy as np
import pytest

from calligrapher.data.blank import blank_picture, color_of, place_mask, place_of, size_of
from calligrapher.errors import ParamsError


@pytest.mark.parametrize(
    ("text", "rgb"),
    [("#fff", (255, 255, 255)), ("navy", (0, 0, 128)), ("rgba(9.6, 0, 255, 1)", (10, 0, 255))],
)
def test_a_colour_is_written_as_css_writes_it(text, rgb):
    assert color_of(text) == rgb
    assert np.unique(blank_picture((3, 2), color_of(text)), axis=1).tolist() == [[list(rgb)]] * 2


def test_the_place_is_all_but_a_margin_or_what_is_said():
    assert place_of(None, size_of("96x32")) == (4, 4, 92, 28)
    assert place_of(None, (2, 2)) == place_of("full", (2, 2)) == (0, 0, 2, 2)
    mask = np.asarray(place_mask((6, 4), place_of("1,0,3,4", (6, 4))))
    assert mask.shape == (4, 6)
    assert mask.sum() == 8 * 255
    assert mask[:, 1:3].all()


@pytest.mark.parametrize("text", ["1,0,7,4", "3,0,1,4", "1,1,1,1", "all", "-1,0,3,4"])
def test_a_place_outside_is_refused(text):
    with pytest.raises(ParamsError, match=r"LEFT,TOP,RIGHT,BOTTOM within 6x4, or full\. Got"):
        place_of(text, (6, 4))


def test_other_sizes_and_colours_are_refused():
    for size in ("96", "96x", "1x40", "96*32"):
        with pytest.raises(ParamsError, match="A size must be WIDTHxHEIGHT"):
            size_of(size)
    with pytest.raises(ParamsError, match=r"A colour must be as '#fff' or navy\. Got 'paper'"):
        color_of("paper")
