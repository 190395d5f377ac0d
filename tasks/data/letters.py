"""Targets that the bundled OCR cannot read, whatever is painted: they have no score, ever."""

from collections.abc import Mapping, Sequence

from calligrapher.data.case import Case
from reward_server.alphabet import bundled_alphabet
from reward_server.text import Match

ADVICE = (
    "Leave them out, or name reward servers in reward.server_urls whose PaddleOCR weights know"
    " these letters (--ocr-engine paddle --ocr-model-dir DIR)."
)
_SHOWN = 20


def unreadable(cases: Sequence[Case], match: Match = "loose") -> dict[str, list[str]]:
    """Return case id -> the letters of its text that the bundled recogniser's alphabet lacks.

    match: for cases that do not say theirs. Nothing is loaded for ASCII, which it has. Raises
    FileNotFoundError or ImportError where the extra `reward` is not installed.
    """
    found = {}
    for case in cases:
        if not case.text.isascii():
            alphabet = bundled_alphabet(case.ocr_match or match)
            if letters := alphabet.missing(case.text):
                found[case.case_id] = letters
    return found


def told(found: Mapping[str, Sequence[str]], total: int) -> str:
    """Say which of `total` cases lack which letters, and what to do."""
    listed = [f"{name} ({' '.join(letters)})" for name, letters in list(found.items())[:_SHOWN]]
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"{len(found)} of {total} texts have letters that the bundled OCR does not know, and so no"
        f" OCR score: {', '.join(listed)}{more}. {ADVICE}"
    )
