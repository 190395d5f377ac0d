import numpy as np
import pytest

from reward_server.scorers.base import Item, probe_item
from reward_server.scorers.vlm.question import (
    NoScoreError,
    Question,
    close_up,
    expectation,
    framed,
    parse_answer,
    pictures,
)


def test_the_score_is_the_expected_digit_over_nine():
    assert expectation({"9": 0.6, "0": 0.2}, min_mass=0.5) == pytest.approx(0.75)
    assert expectation({"9": 1.0}, min_mass=0.5) == 1.0
    assert expectation({"0": 0.9, "3": 0.1}, min_mass=0.5) == pytest.approx(0.1 * 3 / 9)


@pytest.mark.parametrize("probs", [{}, {"5": 0.0}, {"5": 0.4}])
def test_without_enough_mass_on_digits_there_is_no_score(probs):
    with pytest.raises(NoScoreError, match=r"at least 0\.5"):
        expectation(probs, min_mass=0.5)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("fine. <Score>7</Score>", 0.7),
        ("<score> 2.5 </score>", 0.25),
        ("<Score>1</Score> no, <Score>10</Score>", 1.0),
    ],
)
def test_a_written_answer_ends_in_a_score(answer, score):
    assert parse_answer(answer) == score


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "8",
        "<Score>eight</Score>",
        "<Score>11</Score>",
        "<Score>-1</Score>",
        "<Score>nan</Score>",
        "<Score>8",
    ],
)
def test_an_answer_without_a_usable_score_is_no_number(answer):
    with pytest.raises(NoScoreError):
        parse_answer(answer)


@pytest.mark.parametrize("mode", ["expectation", "generate"])
def test_the_question_holds_the_text_and_speaks_of_a_reference_only_when_there_is_one(mode):
    question = Question.load(mode)
    probe = probe_item()
    hostile = "$text {x} 100% “q”"
    with_reference = question.ask(Item(probe.image, probe.crop, hostile, reference=probe.image))
    without = question.ask(Item(probe.image, probe.crop, hostile))
    assert hostile in without
    assert hostile in with_reference
    assert "second picture" in with_reference
    assert "second picture" not in without
    assert question.digest == Question.load(mode).digest


def test_a_template_of_ones_own_must_hold_the_text(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("Is it $text?")
    bad.write_text("Is it good?")
    assert Question.load("expectation", good).ask(probe_item()) == "Is it ll?"
    with pytest.raises(ValueError, match=r"must hold \$text"):
        Question.load("expectation", bad)


def placed(box, size=(60, 90), reference=False) -> Item:
    image = np.full((*size, 3), 200, dtype=np.uint8)
    top, bottom, left, right = box
    image[top:bottom, left:right] = np.arange(right - left, dtype=np.uint8)[None, :, None]
    mask = np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = True
    crop = image[top:bottom, left:right]
    other = image[:7] if reference else None
    return Item(image, crop, "t", mask=mask, box=box, reference=other)


@pytest.mark.parametrize("reference", [False, True])
def test_the_judge_is_shown_the_place_in_a_frame_and_up_close(reference):
    box = (20, 30, 10, 40)
    item = placed(box, reference=reference)
    shown = pictures(item)
    question = Question.load("expectation")
    assert len(shown) == 2 + reference
    red = (shown[0] == (255, 0, 0)).all(axis=-1)
    assert np.argwhere(red).min(axis=0).tolist() == [19, 9]
    assert np.argwhere(red).max(axis=0).tolist() == [30, 40]
    assert (shown[0][20:30, 10:40] == item.crop).all()  # nothing of the text is covered
    assert not (item.image == (255, 0, 0)).all(axis=-1).any()  # others see it without the frame
    assert (shown[-1].shape[0], shown[-1].shape[1]) == (168, 336)  # 20 x 40 px, enlarged
    assert question.ask(item).startswith("A red frame in the first picture")
    assert question.ask(item).endswith(question.ask(Item(item.image, item.image, "t",
        reference=item.reference)))  # fmt: skip


@pytest.mark.parametrize("item", [probe_item(), placed((0, 60, 2, 88))])
def test_a_place_that_is_the_whole_picture_is_not_pointed_at(item):
    assert (pictures(item)[0] == item.image).all()
    assert "frame" not in Question.load("generate").ask(item)


def test_a_place_at_the_edge_has_its_frame_where_there_is_room():
    shown = framed(np.zeros((8, 8, 3), dtype=np.uint8), (0, 4, 0, 8))
    assert (shown[4] == (255, 0, 0)).all()
    assert not shown[:4].any()
    assert close_up(np.zeros((900, 900, 3), dtype=np.uint8), (0, 500, 0, 800)).shape[:2] == (
        750,
        900,
    )


def test_probabilities_that_add_up_to_more_than_one_are_refused():
    with pytest.raises(NoScoreError, match="at most 1"):
        expectation({"9": 0.9, "7": 0.2}, min_mass=0.5)
    assert expectation({"9": 0.9, "0": 0.105}, min_mass=0.5) == pytest.approx(0.9 / 1.005)
