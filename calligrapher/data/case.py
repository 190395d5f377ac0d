"""One case: what to write where, in whose style.

It is the unit that is sampled, grouped and evaluated.
"""

import hashlib
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from calligrapher.errors import DataError

CaseId = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,119}$")
]  # Becomes part of file names.

OcrMatch = Literal["loose", "exact"]


def prompt_for(text: str) -> str:
    """Return the prompt that Calligrapher was trained with, full stop included."""
    return f"The text is '{text}'."


class Case(BaseModel):
    """A text, the file of each picture (paths are absolute), and a name that no other case has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    case_id: CaseId
    text: str
    source: Path
    mask: Path
    reference: Path
    target: Path | None = None
    ocr_match: OcrMatch | None = None  # whether case and spaces count; None = as the run says

    @property
    def prompt(self) -> str:
        return prompt_for(self.text)

    @property
    def digest(self) -> str:
        """The sha256 (hex) of the files' bytes and the text; where the files lie does not count.

        Read anew each time: a changed file must never hide behind an old digest. Raises DataError
        when a file cannot be read.
        """
        whole = hashlib.sha256()
        for path in (self.source, self.mask, self.reference):
            whole.update(_file_digest(path))
        whole.update(self.text.encode())
        if self.target is not None:
            whole.update(b"\0" + _file_digest(self.target))  # A text holds no zero byte.
        if self.ocr_match is not None:
            whole.update(b"\0ocr_match " + self.ocr_match.encode())
        return whole.hexdigest()


def _file_digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise DataError(f"{path} must be a readable file. Found: {error.strerror}.") from error


def checked_text(text: str) -> str:
    """Return the text without the blanks around it, which are layout wherever it was given.

    Raises DataError when it cannot be written as one line.
    """
    text = text.strip()
    categories = [unicodedata.category(character) for character in text]
    if not any(category[0] in "LMNPS" for category in categories):
        raise DataError(f"text must have a visible character. Found {text!r}.")
    forbidden = [
        c
        for c, category in zip(text, categories, strict=True)
        if category in ("Cc", "Zl", "Zp", "Cs")
    ]
    if forbidden:
        raise DataError(
            f"text must be one line without control characters. Found {forbidden[0]!r} in {text!r}."
        )
    return text


def slug(text: str) -> str:
    """Return the text for use in file names; a hash keeps apart what the cleaning makes equal."""
    plain = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:32]
    if plain and plain == text:
        return plain
    return f"{plain or 'text'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
