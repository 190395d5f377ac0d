"""Probability of a text under a recogniser's CTC output (the forward algorithm, in log space)."""

import unicodedata

import numpy as np

from reward_server.text import Match, normalise, normalise_exact

_FLOOR = 1e-30  # a class probability of exactly 0 in float32 would make the reward's log infinite


class Alphabet:
    """Which output classes spell which character.

    `characters`: the class labels in order, class 0 = blank. `match` loose: whatever its case and
    width; classes whose labels normalise to the same text ('A' and 'a') count as one, and classes
    that normalise to nothing (the space) count as blank. exact: case and spaces count. A sign that
    only folds to a letter of the other writing direction (the mathematical alef) does not spell it.
    """

    def __init__(self, characters: list[str], match: Match = "loose"):
        self.classes: dict[str, list[int]] = {}
        self.blank = [0]
        self._exact = match == "exact"
        for index, label in enumerate(characters[1:], start=1):
            key = self._key(label)
            if not key:
                self.blank.append(index)
            elif _direction(key) == _direction(label):
                self.classes.setdefault(key, []).append(index)
        self.spaces = self.classes.get(" ", [])

    def _key(self, label: str) -> str:
        if not self._exact:
            return normalise(label)
        return " " if label.isspace() else normalise_exact(label)

    def spell(self, text: str) -> list[str]:
        """The text as keys of `classes`, one per character.

        A character whose folded form is longer ('ß' -> 'ss') is one key if a class has that form,
        else several. Keys without a class are kept.
        """
        if self._exact:
            return list(normalise_exact(text))
        keys: list[str] = []
        for char in unicodedata.normalize("NFKC", text):
            folded = normalise(char)
            keys.extend([folded] if folded in self.classes else folded)
        return keys

    def missing(self, text: str) -> list[str]:
        """Characters of the text which no class spells, each once, in order."""
        return list(dict.fromkeys(key for key in self.spell(text) if key not in self.classes))


def _direction(text: str) -> bool:
    return unicodedata.bidirectional(text[0]) in {"R", "AL"}


def log_likelihood(probs: np.ndarray, text: str, alphabet: Alphabet) -> float:
    """Return log P(text | probs) summed over all alignments; -inf when there are too few frames.

    probs: [T frames, C classes], rows sum to 1. Source: Graves et al. 2006, equations 6-8.
    """
    target = alphabet.spell(text)
    absent = alphabet.missing(text)
    if absent:
        raise ValueError(
            f"text must be spelled in the recogniser's alphabet. It has no {' '.join(absent)!r}."
        )
    blank_T = probs[:, alphabet.blank].sum(axis=1, dtype=np.float64)
    # Extended target: blank, c1, blank, c2, ... blank  [2L + 1]
    emit_TS = np.repeat(blank_T[:, None], 2 * len(target) + 1, axis=1)
    for position, key in enumerate(target):
        emit_TS[:, 2 * position + 1] = probs[:, alphabet.classes[key]].sum(axis=1, dtype=np.float64)
    log_emit_TS = np.log(np.maximum(emit_TS, _FLOOR))
    # A blank may be skipped between two different characters only.
    may_skip_S = np.zeros(emit_TS.shape[1], dtype=bool)
    for position in range(1, len(target)):
        may_skip_S[2 * position + 1] = target[position] != target[position - 1]

    alpha_S = np.full(emit_TS.shape[1], -np.inf)
    alpha_S[:2] = log_emit_TS[0, :2]
    for row_S in log_emit_TS[1:]:
        step_S = np.concatenate(([-np.inf], alpha_S[:-1]))
        skip_S = np.where(may_skip_S, np.concatenate(([-np.inf, -np.inf], alpha_S[:-2])), -np.inf)
        alpha_S = np.logaddexp(np.logaddexp(alpha_S, step_S), skip_S) + row_S
    return float(np.logaddexp(alpha_S[-1], alpha_S[-2]))


def likelihood_per_character(probs: np.ndarray, text: str, alphabet: Alphabet) -> float:
    """Geometric mean over the target's characters of P(text | probs), in [0, 1]."""
    return float(np.exp(log_likelihood(probs, text, alphabet) / len(alphabet.spell(text))))
