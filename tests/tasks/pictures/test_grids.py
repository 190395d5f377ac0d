import numpy as np
import pytest
from PIL import Image

from tasks.pictures.grids import (
    CaptionedImage,
    before_after,
    best_and_worst,
    image_grid,
    learning_curve,
    open_picture,
    score_histogram,
    thinned,
)
from tasks.pictures.sheets import ACCENT, BAD, GOOD, Span, fitted, shown, width_of


def picture(colour=(200, 30, 40), size=(30, 10)):
    return Image.new("RGB", size, colour)


def pixels(image, colour):
    """How many pixels of the sheet have exactly this colour ('#rrggbb' or a triple)."""
    wanted = (
        tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) if isinstance(colour, str) else colour
    )
    return int((np.asarray(image) == np.array(wanted)).all(-1).sum())


def test_tiny_pictures_are_enlarged_by_a_whole_factor_and_large_ones_reduced():
    assert shown(picture(size=(96, 32))).size == (288, 96)
    assert shown(picture(size=(1024, 768))).size == (320, 240)
    assert shown(picture(size=(4000, 3))).size == (320, 1)


def test_a_grid_shows_every_picture_once_also_when_the_last_row_is_short():
    colours = [(10 * i, 100, 7) for i in range(5)]
    grid = image_grid([picture(c) for c in colours], [f"text {i}" for i in range(5)], columns=2)
    for colour in colours:
        assert pixels(grid, colour) == 300 * 100
    assert grid.width < 2 * 320 + 100


def test_a_grid_without_a_caption_for_every_picture_is_a_mistake():
    with pytest.raises(ValueError, match="shorter"):
        image_grid([picture(), picture()], ["one"])


def test_a_caption_is_shortened_to_the_width_of_its_picture():
    spans = fitted([Span("short "), Span("a text that does not fit at all")], 150)
    assert width_of(spans) <= 150
    assert spans[-1].text.endswith("…")
    assert fitted([Span("fits")], 150) == [Span("fits")]
    assert fitted([Span("wide")], 3) == []


def test_a_reading_is_green_where_it_is_the_target_and_red_where_it_is_not():
    right = best_and_worst([CaptionedImage(picture(), "CAFE 9", "cafe9", 1.0)], [])
    wrong = best_and_worst([], [CaptionedImage(picture(), "CAFE", "CAFF", 0.75)])
    unread = best_and_worst([], [CaptionedImage(picture(), "CAFE", None, None)])
    assert pixels(right, GOOD) > 0 == pixels(right, BAD)
    assert pixels(wrong, BAD) > 0 == pixels(wrong, GOOD)
    assert pixels(unread, BAD) == pixels(unread, GOOD) == 0


REFERENCE, SOURCE, TARGET, ONE, TWO = ((i, 90, 90) for i in range(1, 6))


def sheet_of(targets):
    return before_after(
        [picture(REFERENCE, (12, 12))] * 3,
        [picture(SOURCE)] * 3,
        targets,
        [CaptionedImage(picture(ONE), "A", "B", 0.0, 0.0, 0.4)] * 3,
        [CaptionedImage(picture(TWO), "A", "A", 2.0, 1.0, 0.95)] * 3,
    )


def test_before_and_after_stand_beside_reference_source_and_target():
    sheet = sheet_of([picture(TARGET)] * 3)
    for colour in (SOURCE, TARGET, ONE, TWO):
        assert pixels(sheet, colour) == 3 * 270 * 90
    columns = [
        np.argwhere((np.asarray(sheet) == colour).all(-1))[:, 1].mean()
        for colour in (REFERENCE, SOURCE, TARGET, ONE, TWO)
    ]
    assert columns == sorted(columns)


def test_cases_without_a_target_need_no_column_for_it():
    full, some = sheet_of([picture(TARGET)] * 3), sheet_of([None, picture(TARGET), None])
    none = sheet_of([None] * 3)
    assert full.size == some.size
    assert pixels(some, TARGET) == 270 * 90
    assert full.width * 4 < none.width * 5 < full.width * 5


@pytest.mark.parametrize(
    ("figures", "caption"),
    [
        ((1.0, 0.955), "OCR 1.00  style 0.95"),
        ((0.5, None), "OCR 0.50"),
        ((None, None), "reward 1.25"),
    ],
)
def test_both_figures_stand_under_an_image_and_its_reward_where_there_are_none(figures, caption):
    assert CaptionedImage(picture(), "A", "B", 1.25, *figures).figures() == caption


def test_a_histogram_draws_bars_where_the_rewards_are():
    image = np.asarray(score_histogram([0.05] * 3 + [0.95]))
    bars = np.argwhere((image == [int(ACCENT[i : i + 2], 16) for i in (1, 3, 5)]).all(-1))
    left, right = bars[bars[:, 1] < 360], bars[bars[:, 1] >= 360]
    assert len(left) == pytest.approx(3 * len(right), rel=0.1)
    assert left[:, 1].max() < 130
    assert right[:, 1].min() > 620


@pytest.mark.parametrize(
    "rewards",
    [
        [],
        [0.5],
        [1.0] * 7,
        [-3.5, 0.2, 12.0],
        np.linspace(0, 1, 1000).tolist(),
        [0.0] * 900 + [0.9],
    ],
)
def test_a_histogram_can_be_drawn_of_any_rewards(rewards):
    assert score_histogram(rewards, title="Rewards of round 3").size == (720, 400)


@pytest.mark.parametrize(
    "series",
    [
        {"accuracy": [(0, 0.4), (1, 0.5), (2, 0.9)]},
        {"nft": [(0, 0.4), (3, 0.9)], "grpo": []},
        {"loss": [(10, -3.0)]},
        {},
    ],
)
def test_a_learning_curve_can_be_drawn_of_any_points(series):
    curve = learning_curve(series, bands={"accuracy": [(0, 0.3, 0.5), (2, 0.8, 1.0)]})
    assert curve.size == (960, 540)
    assert (pixels(curve, ACCENT) > 0) == bool(series)


def test_intervals_are_drawn_behind_the_line():
    series = {"accuracy": [(0, 0.4), (5, 0.5), (10, 0.9)]}

    def pale(bands):
        """How many pixels have ACCENT at 15 % over white."""
        curve = np.asarray(learning_curve(series, bands=bands)).astype(int)
        return int((abs(curve - (222, 232, 252)) <= 2).all(-1).sum())

    narrow = {"accuracy": [(0, 0.35, 0.45), (10, 0.85, 0.95)]}
    wide = {"accuracy": [(0, 0.3, 0.5), (10, 0.7, 1.0)]}
    assert pale(None) < 1000 < pale(narrow) < pale(wide)


def test_a_reward_has_a_panel_and_a_scale_of_its_own():
    reward = {"mean reward": [(i, 1.5) for i in range(10)]}
    both = learning_curve({"accuracy": [(0, 0.4), (10, 0.9)]}, below=reward)
    assert both.height > learning_curve({"accuracy": [(0, 0.4), (10, 0.9)]}).height
    orange = np.argwhere((np.asarray(both) == (217, 119, 6)).all(-1))
    blue = np.argwhere((np.asarray(both) == (37, 99, 235)).all(-1))
    assert blue[:, 0].max() < orange[:, 0].min()


def test_only_measured_steps_have_a_tick():
    assert thinned([0, 3, 7]) == [0, 3, 7]
    assert thinned(list(range(0, 51, 5)), most=6) == [0, 10, 20, 30, 40, 50]
    assert thinned([]) == []


@pytest.mark.parametrize(("reward", "label"), [(1.529, "reward 1.53"), (None, "unscored")])
def test_a_reward_is_labelled_so_that_it_is_taken_for_no_accuracy(reward, label):
    _, (_, right) = CaptionedImage(picture(), "A", "B", reward).lines()
    assert [span.text for span in right] == [label]


def test_pictures_can_be_read_again(tmp_path):
    picture().save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (200, 30, 40)


def test_a_reading_is_right_when_the_reward_says_so():
    picture = Image.new("RGB", (8, 8))
    assert CaptionedImage(picture, "ﬁne Straße", "FINE STRASSE", 1.0).reading()[0].colour == GOOD
    assert CaptionedImage(picture, "fine", "fire", 0.7).reading()[0].colour == BAD
