import pytest

from reward_server.text import normalise, ocr_accuracy, picture_order, text_from_prompt


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("The text is 'Hello'.", "Hello"),
        ("The text is 'Hello'", "Hello"),
        ('A sign. The text is "Open - 24, daily".', "Open - 24, daily"),
        ("The text is \u2018it\u2019s\u2019.", "it\u2019s"),
        ("The text is 'it's'.", "it's"),
        ("The text is 'say 'yes' now'.", "say 'yes' now"),
        (
            "The text is \u201c\u4f60\u597d\uff0c\u4e16\u754c\u201d.",
            "\u4f60\u597d\uff0c\u4e16\u754c",
        ),
        ("The text is '\u0645\u0631\u062d\u0628\u0627'.", "\u0645\u0631\u062d\u0628\u0627"),
        ("the TEXT is: 'end.'.  ", "end."),
        ("The text is '1''.", "1'"),
        ("The text is 'The text is 'a''.", "The text is 'a'"),
        ("The text is 'a\nb'.", "a\nb"),
    ],
)
def test_the_text_is_what_stands_between_the_first_and_the_last_quote(prompt, text):
    assert text_from_prompt(prompt) == text


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        ".",
        "Hello",
        "The text is Hello.",
        "The text is ''.",
        "The text is ' '.",
        "The text is 'a'. Red.",
    ],
)
def test_a_prompt_without_a_quoted_end_is_refused(prompt):
    with pytest.raises(ValueError, match="The text is 'X'"):
        text_from_prompt(prompt)


def test_a_hostile_prompt_costs_no_time():
    assert text_from_prompt("text is '" * 400 + " " * 400 + "x'").endswith("x")
    with pytest.raises(ValueError, match="prompt must end"):
        text_from_prompt("text is '" * 400 + " " * 400 + "x")


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        (" A b\u00a0C\n", "abc"),
        ("\uff21\uff11", "a1"),
        ("Stra\u00dfe", "strasse"),
        ("e\u0301", "\u00e9"),
        ("\ufb01", "fi"),
        ("\u0130", "i\u0307"),
        ("\u200f\u05d0\u200b\u05d1\u200e", "\u05d0\u05d1"),
        ("soft\u00adhyphen", "softhyphen"),
        ("\u200b", ""),
        ("\u201cIt\u2019s\u201d", '"it\'s"'),
        ("\u2018a\u201ab\u201bc\u2019", "'a'b'c'"),
        ("\u201ea\u201fb\u201d", '"a"b"'),
        ("a\u2010b\u2011c\u2012d\u2013e\u2014f\u2015", "a-b-c-d-e-f-"),
    ],
)
def test_normalising_folds_width_and_case_and_drops_what_cannot_be_seen(raw, normal):
    assert normalise(raw) == normal
    assert normalise(normal) == normal


@pytest.mark.parametrize(
    ("target", "read", "accuracy"),
    [
        ("Cafe", "CAFB", 0.75),  # one of four letters wrong
        ("open", "o p e n", 1.0),
        ("open", "", 0.0),
        ("ab", "xyzxyzxyz", 0.0),  # clipped at the target's length, never negative
        ("It\u2019s", "it's", 1.0),
        ("\u201ca\u201d", '\u201ea"', 1.0),
        ("2010\u20132015", "2010-2015", 1.0),
        ("a-b", "a\u2014b", 1.0),
        ("kitten", "sitting", 0.5),  # distance 3 of 6
        ("\u4f60\u597d", "\u4f60", 0.5),
    ],
)
def test_accuracy_is_one_minus_the_clipped_edit_distance(target, read, accuracy):
    assert ocr_accuracy(target, read) == accuracy


def test_an_empty_target_has_no_accuracy():
    with pytest.raises(ValueError, match="at least one character"):
        ocr_accuracy(" \t", "anything")


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("Hello, 12", "Hello, 12"),
        ("\u05d0\u05d1\u05d2", "\u05d2\u05d1\u05d0"),
        ("\u05d0\u05d1 12.5", "12.5 \u05d1\u05d0"),
        ("\u0645\u0631 Cafe \u062d", "\u062d Cafe \u0631\u0645"),
        ("", ""),
    ],
)
def test_right_to_left_text_is_turned_round_and_numbers_and_latin_words_in_it_are_not(
    written, seen
):
    assert picture_order(written) == seen
    assert picture_order(seen) == written
