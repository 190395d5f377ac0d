"""A text under a recogniser's CTC output: how probable it is, and where each character stands."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from reward_server.alphabet import Alphabet

_FLOOR = 1e-30  # a class probability of exactly 0 in float32 would make the reward's log infinite


def log_likelihood(probs: np.ndarray, text: str, alphabet: Alphabet) -> float:
    """Return log P(text | probs) summed over all alignments; -inf when there are too few frames.

    probs: [T frames, C classes], rows sum to 1. Source: Graves et al. 2006, equations 6-8.
    """
    log_emit_TS, may_skip_S = _emissions(probs, text, alphabet)
    alpha_S = _begun(log_emit_TS)
    for row_S in log_emit_TS[1:]:
        stay_S, step_S, skip_S = _ways(alpha_S, may_skip_S)
        alpha_S = np.logaddexp(np.logaddexp(stay_S, step_S), skip_S) + row_S
    return float(np.logaddexp(alpha_S[-1], alpha_S[-2]))


def likelihood_per_character(probs: np.ndarray, text: str, alphabet: Alphabet) -> float:
    """Geometric mean over the target's characters of P(text | probs), in [0, 1]."""
    return float(np.exp(log_likelihood(probs, text, alphabet) / len(alphabet.spell(text))))


@dataclass(frozen=True)
class Aligned:
    """Where a character of the text stands among the frames, and how likely it is there."""

    likelihood: float  # 0..1, the highest of its frames
    first: int
    end: int  # exclusive


def align(probs: np.ndarray, text: str, alphabet: Alphabet) -> list[Aligned]:
    """Return where each of the text's characters stands on the likeliest alignment, in order.

    probs: [T frames, C classes]. A character that is not there stands where the alignment has room
    for it, with a low likelihood. With too few frames for the text all are unlikely, and share the
    frames evenly. Source: the Viterbi algorithm on the states of Graves et al. 2006.
    """
    log_emit_TS, may_skip_S = _emissions(probs, text, alphabet)
    frames, states = log_emit_TS.shape
    best_S, came_TS = _begun(log_emit_TS), np.zeros((frames, states), dtype=int)
    for frame in range(1, frames):
        ways = np.stack(_ways(best_S, may_skip_S))
        came_TS[frame] = ways.argmax(axis=0)
        best_S = ways.max(axis=0) + log_emit_TS[frame]
    state = states - 1 if best_S[-1] >= best_S[-2] else states - 2
    if not np.isfinite(best_S[state]):
        edges = np.linspace(0, frames, states // 2 + 1)
        return [Aligned(0.0, int(a), int(np.ceil(b))) for a, b in pairwise(edges)]
    path_T = np.empty(frames, dtype=int)
    for frame in range(frames - 1, -1, -1):
        path_T[frame] = state
        state -= came_TS[frame, state]  # ways in the order of the states that they skip
    found = []
    for state in range(1, states, 2):
        at = np.flatnonzero(path_T == state)
        highest = np.exp(log_emit_TS[at, state].max())
        # What several classes add up to may round to more than 1.
        found.append(Aligned(min(float(highest), 1.0), int(at[0]), int(at[-1]) + 1))
    return found


def _emissions(probs: np.ndarray, text: str, alphabet: Alphabet) -> tuple[np.ndarray, np.ndarray]:
    """Return log P of each state in each frame, and which states a path may enter past a blank.

    [T, S] and [S], S = 2 L + 1: blank, character 1, blank, ..., character L, blank. Raises
    ValueError for a text that the alphabet does not spell.
    """
    target = alphabet.spell(text)
    absent = alphabet.missing(text)
    if absent:
        raise ValueError(
            f"text must be spelled in the recogniser's alphabet. It has no {' '.join(absent)!r}."
        )
    blank_T = probs[:, alphabet.blank].sum(axis=1, dtype=np.float64)
    emit_TS = np.repeat(blank_T[:, None], 2 * len(target) + 1, axis=1)
    # A blank may be skipped between two different characters only.
    may_skip_S = np.zeros(emit_TS.shape[1], dtype=bool)
    for place, key in enumerate(target):
        emit_TS[:, 2 * place + 1] = probs[:, alphabet.classes[key]].sum(axis=1, dtype=np.float64)
        may_skip_S[2 * place + 1] = place > 0 and key != target[place - 1]
    return np.log(np.maximum(emit_TS, _FLOOR)), may_skip_S


def _begun(log_emit_TS: np.ndarray) -> np.ndarray:
    """Return log P of the paths of one frame, [S]: they begin with a blank or a character."""
    begun_S = np.full(log_emit_TS.shape[1], -np.inf)
    begun_S[:2] = log_emit_TS[0, :2]
    return begun_S


def _ways(paths_S: np.ndarray, may_skip_S: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return log P of the paths that stay in a state, come from the one before, or skip one."""
    step_S = np.concatenate(([-np.inf], paths_S[:-1]))
    skip_S = np.where(may_skip_S, np.concatenate(([-np.inf, -np.inf], paths_S[:-2])), -np.inf)
    return paths_S, step_S, skip_S
