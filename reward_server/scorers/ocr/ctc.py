"""Probability of a text under a recogniser's CTC output (the forward algorithm, in log space)."""

import numpy as np

from reward_server.alphabet import Alphabet

_FLOOR = 1e-30  # a class probability of exactly 0 in float32 would make the reward's log infinite


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
