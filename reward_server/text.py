"""Text of the OCR reward: how it is normalised, compared, and read out of a prompt.

Formula: `ocr_accuracy = 1 - min(levenshtein(T, R), len(T)) / len(T)` with T (target) and R
(recognised) both normalised: NFKC, spaces and invisible marks removed, quotes and dashes of any
form as ' " -, case folded. By hand: `ocr_accuracy("Cafe", "CAFB") == 0.75`.
"""

import re
import unicodedata
from typing import Literal

Match = Literal["loose", "exact"]

_OPENING = re.compile("text is:? ?(['\"\u2018\u2019\u201c\u201d])", re.IGNORECASE)
# Which quotes may close a quote of each kind (curly ones are often typed the wrong way round).
_CLOSED_BY = {
    "'": "'\u2019",
    '"': '"\u201d',
    "\u2018": "\u2019'",
    "\u2019": "\u2019'",
    "\u201c": '\u201d"',
    "\u201d": '\u201d"',
}
# Raised with every change of what `normalise` or `ocr_accuracy` returns: part of a server's setup.
RULE = 2
# Typographic quotes and dashes look as their plain forms do, and a recogniser gives either.
_PLAIN = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015", "-")
)
# Unicode's bidirectional classes of Latin letters, numbers, and the signs inside numbers.
_LEFT_TO_RIGHT = {"L", "EN", "AN", "ES", "ET", "CS"}


def normalise(text: str) -> str:
    """Return what counts of a text: NFKC, case folded, quotes and dashes plain, no white space.

    NFKC comes again after folding, which may leave a decomposed form. With the white space go marks
    that cannot be seen: of writing direction, joiners, soft hyphens.
    """
    plain = unicodedata.normalize("NFKC", text).translate(_PLAIN)
    folded = unicodedata.normalize("NFKC", plain.casefold())
    return "".join(
        char for char in folded if not (char.isspace() or unicodedata.category(char) == "Cf")
    )


def normalise_exact(text: str) -> str:
    """Return what counts of a text where case and spaces do: as `normalise`, without folding.

    White space of any length is one space; at the ends it is removed.
    """
    plain = unicodedata.normalize("NFKC", text).translate(_PLAIN)
    return " ".join("".join(c for c in plain if unicodedata.category(c) != "Cf").split())


def ocr_accuracy(target: str, recognised: str, match: Match = "loose") -> float:
    """1 minus the clipped edit distance as a share of the target's length, in [0, 1].

    match: loose compares without case and spaces, exact with them. By hand: "iPhone" for "IPHONE"
    is 1 loosely and 1 - 5/6 exactly.

    Raises ValueError when the target is empty after normalisation: nothing can be compared then.
    """
    from rapidfuzz.distance import Levenshtein

    counts = normalise if match == "loose" else normalise_exact
    wanted, found = counts(target), counts(recognised)
    if not wanted:
        raise ValueError(
            f"text must hold at least one character that is not a space. Got {target!r}."
        )
    return 1.0 - min(Levenshtein.distance(wanted, found), len(wanted)) / len(wanted)


def picture_order(text: str) -> str:
    """Return the characters as they stand in a picture from left to right.

    That is how a recogniser gives them. Right-to-left text is turned round; numbers and Latin
    words in it keep their direction. Its own inverse; text without right-to-left letters stays as
    it is. By hand: 'אב 12' <-> '12 בא'.
    """
    kinds = [unicodedata.bidirectional(char) for char in text]
    if not {"R", "AL"} & set(kinds):
        return text
    runs: list[str] = []
    for place, (char, kind) in enumerate(zip(text, kinds, strict=True)):
        if place and {kind, kinds[place - 1]} <= _LEFT_TO_RIGHT:
            runs[-1] += char
        else:
            runs.append(char)
    return "".join(reversed(runs))


def text_from_prompt(prompt: str) -> str:
    """Return the X of a prompt that ends in `The text is 'X'.`

    Quotes may be straight or curly, the full stop is optional. X runs from the first such quote to
    the prompt's last character (before the full stop), so it may itself hold quotes, '-', ',' and
    any script. Raises ValueError when the prompt has no such ending.
    """
    quoted = prompt.rstrip().removesuffix(".").rstrip()
    for opening in _OPENING.finditer(quoted):
        inside = quoted[opening.end() : -1]
        if quoted[-1] in _CLOSED_BY[opening.group(1)] and inside.strip():
            return inside
    raise ValueError(
        "prompt must end in \"The text is 'X'.\" when `text` is not given. "
        f"Got {prompt[-80:]!r}. Send `text` beside the prompt."
    )
