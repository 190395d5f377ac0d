"""Cases cut out of a picture: what is masked, what is the reference, and why a text is left out."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from calligrapher.data.cutting import Rules, TextPlace, cut_cases, text_mask

SIZE = (200, 120)


def place(text, left, top, right, bottom, confidence=0.99):
    return TextPlace(text, confidence, ((left, top), (right, top), (right, bottom), (left, bottom)))


ABOVE = place("above", 10, 10, 90, 30)
MIDDLE = place("middle", 10, 50, 110, 80)
BELOW = place("below", 10, 95, 90, 112)


def left_out(*places, size=SIZE, **rules):
    cuts, reasons = cut_cases(size, places, Rules(**rules))
    assert len(cuts) + reasons.total() == len(places)
    return [cut.text for cut in cuts], dict(reasons)


def test_each_text_is_masked_and_styled_after_the_other_one_nearest_in_height():
    cuts, reasons = cut_cases(SIZE, [ABOVE, MIDDLE, BELOW], Rules())
    assert [cut.text for cut in cuts] == ["above", "middle", "below"]
    assert not reasons
    # 20, 30 and 17 px high; the margin of a box is 0.15 of its height.
    below, above = (7, 92, 94, 116), (7, 7, 94, 34)
    assert [cut.reference for cut in cuts] == [below, above, above]
    assert cuts[0].mask.getbbox() == (7, 7, 94, 34)


def test_a_mask_grows_by_a_share_of_the_height_and_has_round_corners():
    mask = np.asarray(text_mask(SIZE, MIDDLE, grow=0.2)) > 0
    rows, columns = mask.nonzero()
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (4, 44, 116, 86)
    assert not mask[44, 4]
    assert mask[46, 7]
    assert np.asarray(text_mask(SIZE, ABOVE, grow=0))[8, 50] == 255  # Never less than 2 px.


def test_a_slanted_text_is_masked_along_its_slant():
    slanted = TextPlace("slanted", 0.99, ((20, 60), (140, 20), (147, 41), (27, 81)))
    assert slanted.height == pytest.approx(22.136, abs=1e-3)  # sqrt(7^2 + 21^2)
    mask = np.asarray(text_mask(SIZE, slanted, grow=0.15)) > 0
    assert mask[50, 83]
    assert not mask[22, 22]
    assert not mask[78, 140]
    assert mask.sum() < 0.5 * (120 + 6) * (61 + 6)


@pytest.mark.parametrize(
    ("odd", "rules", "reason"),
    [
        (place("low", 120, 10, 190, 25), {}, "lower than 16 px"),
        (place("faint", 120, 10, 190, 30, 0.89), {}, "read with less confidence than 0.9"),
        (place("upright", 150, 5, 170, 75), {}, "letters on their side"),
        (place(" ", 120, 10, 190, 30), {}, "not a text of one line with a visible character"),
        (
            place("wordy", 120, 10, 190, 30),
            {"max_length": 4, "pattern": "wordy"},
            "longer than 4 characters",
        ),
        (place("Été", 120, 10, 190, 30), {"pattern": "[a-z]+"}, "does not match the pattern"),
        (place("close", 80, 10, 190, 30), {}, "too near to another text"),
    ],
)
def test_a_text_that_makes_no_case_is_counted_with_why(odd, rules, reason):
    texts, reasons = left_out(
        MIDDLE, BELOW, odd, *([ABOVE] if odd.text == "close" else []), **rules
    )
    assert odd.text.strip() not in texts
    assert reason in reasons


def test_a_blank_around_a_text_is_not_written():
    texts, _ = left_out(place(" above ", 10, 10, 90, 30), MIDDLE)
    assert texts == ["above", "middle"]


def test_a_text_alone_needs_itself_as_reference():
    assert left_out(ABOVE) == ([], {"no other text for the reference": 1})
    cuts, _ = cut_cases(SIZE, [ABOVE], Rules(self_reference=True))
    assert cuts[0].reference == (7, 7, 94, 34)


def test_a_faint_text_is_no_reference_either():
    assert left_out(ABOVE, place("faint", 10, 50, 110, 80, 0.2))[1] == {
        "no other text for the reference": 1,
        "read with less confidence than 0.9": 1,
    }


def test_a_reference_shows_nothing_of_what_is_painted():
    # The slanted one's upright box takes in a corner of the other's mask, its own shape does not.
    other = place("other", 10, 10, 60, 28)
    slanted = TextPlace("slanted", 0.99, ((40, 100), (160, 20), (170, 36), (50, 116)))
    left, top, _, _ = slanted.box(SIZE)
    assert (left < 60, top < 28) == (True, True)
    assert "no other text for the reference" in left_out(other, slanted)[1]


def test_a_text_that_fills_the_picture_is_left_out():
    filling = place("filling", 0, 0, 59, 29)
    assert left_out(filling, size=(60, 30), self_reference=True) == ([], {"fills the picture": 1})


def test_boxes_end_where_the_picture_ends():
    cuts, _ = cut_cases(
        (92, 82), [place("above", 0, 0, 91, 30), place("below", 0, 55, 91, 81)], Rules()
    )
    assert [cut.reference for cut in cuts] == [(0, 51, 92, 82), (0, 0, 92, 36)]
    assert all(isinstance(cut.mask, Image.Image) and cut.mask.size == (92, 82) for cut in cuts)


@pytest.mark.parametrize(
    "rules",
    [{"min_height": 0}, {"min_confidence": 1.1}, {"pattern": "("}, {"grow": -1}, {"max_length": 0}],
)
def test_rules_out_of_bounds_are_refused(rules):
    with pytest.raises(ValidationError):
        Rules(**rules)
