import pytest

from reward_server.scorers.base import Item, probe_item
from reward_server.scorers.vlm.question import NoScoreError, Question, expectation, parse_answer


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
