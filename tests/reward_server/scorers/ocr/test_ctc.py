from itertools import product

import numpy as np
import pytest

from reward_server.alphabet import Alphabet
from reward_server.scorers.ocr.ctc import align, likelihood_per_character, log_likelihood

LETTERS = ["blank", "a", "A", "b", " "]


def random_output(frames: int, classes: int, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(frames, classes))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def by_enumeration(probs: np.ndarray, text: str) -> float:
    """Sum over all alignments over the normalised classes: blank+space, a+A, b."""
    merged = np.stack([probs[:, 0] + probs[:, 4], probs[:, 1] + probs[:, 2], probs[:, 3]], axis=1)
    total = 0.0
    for path in product(range(3), repeat=len(probs)):
        letters = [
            one for place, one in enumerate(path) if one and (place == 0 or path[place - 1] != one)
        ]
        if "".join(" ab"[one] for one in letters) == text:
            total += float(np.prod([merged[frame, one] for frame, one in enumerate(path)]))
    return total


@pytest.mark.parametrize("text", ["a", "ab", "aa", "aba", "bb"])
def test_it_is_the_sum_over_all_alignments(text):
    probs = random_output(5, 5, seed=len(text))
    assert np.exp(log_likelihood(probs, text, Alphabet(LETTERS))) == pytest.approx(
        by_enumeration(probs, text), rel=1e-12
    )


def test_it_agrees_with_torch():
    torch = pytest.importorskip("torch")
    probs, target = random_output(17, 8, seed=3), [3, 3, 5, 1]
    loss = torch.nn.functional.ctc_loss(
        torch.tensor(probs).log()[:, None], torch.tensor([target]), [17], [4], reduction="sum"
    )
    alphabet = Alphabet(["blank", *"tuvwxyz"])
    text = "".join("_tuvwxyz"[one] for one in target)
    assert log_likelihood(probs, text, alphabet) == pytest.approx(-loss.item(), rel=1e-9)


def test_case_and_spaces_do_not_count():
    probs = random_output(6, 5, seed=1)
    alphabet = Alphabet(LETTERS)
    assert log_likelihood(probs, "A b", alphabet) == log_likelihood(probs, "ab", alphabet)


def test_quotes_and_dashes_are_spelled_by_any_of_their_forms():
    alphabet = Alphabet(["blank", "a", "'", "\u2019", "\u2014"])
    probs = random_output(6, 5, seed=2)
    assert alphabet.missing("a\u2018-\u2013a") == []
    assert log_likelihood(probs, "a\u2018", alphabet) == log_likelihood(probs, "a'", alphabet)
    assert alphabet.missing('a"') == ['"']


def test_the_mean_is_geometric_over_the_characters():
    certain = np.zeros((3, 5))
    certain[[0, 1, 2], [1, 0, 3]] = [0.25, 1, 1]
    certain[0, 0] = 0.75
    alphabet = Alphabet(LETTERS)
    assert likelihood_per_character(certain, "ab", alphabet) == pytest.approx(0.5)  # sqrt(.25)


def test_a_text_longer_than_the_output_is_impossible():
    assert likelihood_per_character(random_output(2, 5, seed=0), "aba", Alphabet(LETTERS)) == 0.0
    assert likelihood_per_character(random_output(2, 5, seed=0), "aa", Alphabet(LETTERS)) == 0.0


def test_a_letter_outside_the_alphabet_is_an_error():
    alphabet = Alphabet(LETTERS)
    assert alphabet.missing("bad!d") == ["d", "!"]
    with pytest.raises(ValueError, match="recogniser's alphabet"):
        log_likelihood(random_output(4, 5, seed=0), "bd", alphabet)


def test_a_zero_probability_gives_a_finite_number():
    probs = np.zeros((2, 5))
    probs[:, 0] = 1
    assert 0 < likelihood_per_character(probs, "b", Alphabet(LETTERS)) < 1e-20


def test_a_letter_that_folds_to_two_is_spelled_by_its_own_class():
    alphabet = Alphabet(["blank", "s", "\u00df"])
    assert alphabet.spell("S\u00df s") == ["s", "ss", "s"]
    assert Alphabet(["blank", "s"]).spell("\u00df") == ["s", "s"]
    certain = np.eye(3)[[2]]
    assert likelihood_per_character(certain, "\u00df", alphabet) == 1.0


def by_the_best_path(probs: np.ndarray, text: str) -> list[int]:
    """The frames of each letter on the likeliest alignment over blank+space, a+A, b."""
    merged = np.stack([probs[:, 0] + probs[:, 4], probs[:, 1] + probs[:, 2], probs[:, 3]], axis=1)
    best, found = -1.0, []
    for path in product(range(3), repeat=len(probs)):
        starts = [
            place
            for place, one in enumerate(path)
            if one and (place == 0 or path[place - 1] != one)
        ]
        if "".join(" ab"[path[place]] for place in starts) != text:
            continue
        chance = float(np.prod([merged[frame, one] for frame, one in enumerate(path)]))
        if chance > best:
            best, found = chance, [(place, path[place]) for place in starts]
    return found


@pytest.mark.parametrize("text", ["a", "ab", "aa", "aba", "bb"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_letters_stand_where_the_likeliest_alignment_puts_them(text, seed):
    probs = random_output(6, 5, seed=10 * seed + len(text))
    merged = {"a": probs[:, 1] + probs[:, 2], "b": probs[:, 3]}
    letters = align(probs, text, Alphabet(LETTERS))
    assert [one.first for one in letters] == [at for at, _ in by_the_best_path(probs, text)]
    for letter, one in zip(text, letters, strict=True):
        assert one.likelihood == pytest.approx(merged[letter][one.first : one.end].max())


def test_a_wrong_letter_is_unlikely_and_its_neighbours_are_not():
    probs = np.full((7, 5), 0.01)
    for frame, key in ((1, 1), (3, 3), (5, 1)):  # a b a
        probs[frame, key] = 0.96
    probs[[0, 2, 4, 6], 0] = 0.96
    alphabet = Alphabet(LETTERS)
    assert [one.likelihood for one in align(probs, "aba", alphabet)] == [0.97, 0.96, 0.97]
    wrong = align(probs, "abb", alphabet)
    assert [one.likelihood > 0.9 for one in wrong] == [True, True, False]
    assert [(one.first, one.end) for one in wrong[:2]] == [(1, 2), (3, 4)]


def test_a_text_with_more_letters_than_frames_has_none_that_is_likely():
    letters = align(random_output(2, 5, seed=0), "aab", Alphabet(LETTERS))
    assert [one.likelihood for one in letters] == [0, 0, 0]
    assert all(0 <= one.first < one.end <= 2 for one in letters)


def test_no_letter_is_likelier_than_certain():
    probs = np.array([[0.0, 1.0, 3e-7, 0.0, 0.0]], dtype=np.float32)  # a and A
    (letter,) = align(probs, "a", Alphabet(LETTERS))
    assert letter.likelihood == 1.0
