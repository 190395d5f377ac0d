"""Targets that the OCR cannot read, whatever is painted: they have no score, ever."""

import functools
from collections.abc import Callable, Mapping, Sequence

from calligrapher.data.case import Case
from reward_server.alphabet import Alphabet, bundled_alphabet
from reward_server.text import Match

ADVICE = (
    "Leave them out, or name reward servers in reward.server_urls whose PaddleOCR weights know"
    " these letters (--ocr-engine paddle --ocr-model-dir DIR)."
)
_SHOWN = 20


def unreadable(
    cases: Sequence[Case],
    match: Match = "loose",
    alphabet_for: Callable[[Match], Alphabet] = bundled_alphabet,
) -> dict[str, list[str]]:
    """Return case id -> the letters of its text that the recogniser's alphabet lacks.

    match: for cases that do not say theirs. alphabet_for: not asked for ASCII, which all have; the
    bundled one raises FileNotFoundError or ImportError where the extra `reward` is not installed.
    """
    alphabet_for = functools.cache(alphabet_for)
    found = {}
    for case in cases:
        if not case.text.isascii():
            alphabet = alphabet_for(case.ocr_match or match)
            if letters := alphabet.missing(case.text):
                found[case.case_id] = letters
    return found


def told(found: Mapping[str, Sequence[str]], total: int, whose: str = "the bundled OCR") -> str:
    """Say which of `total` cases have letters that `whose` lacks, and what to do."""
    listed = [f"{name} ({' '.join(letters)})" for name, letters in list(found.items())[:_SHOWN]]
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"{len(found)} of {total} texts have letters that {whose} does not know, and so no OCR"
        f" score: {', '.join(listed)}{more}. {ADVICE}"
    )
