"""Lists of cases that name files: the two lists of a bench folder, and JSONL.

A bench folder holds `testN_source.png`, `testN_mask.png`, `testN_ref.png` and lists:

- `self_bench.txt`, lines `N-text`: the style comes from `testN_ref.png`;
- `cross_bench.txt`, lines `N-ref1,ref2-text`: one case per reference, styled after
  `test{ref1}_ref.png`, ...

The text is all that follows, '-' and ',' included. A JSONL file holds one
`{source, mask, reference, text[, case_id][, target][, ocr_match]}` a line, paths relative to the
file.

Self cases find their target as `testN_target.png`; cross cases have none, for that picture is in
another reference's style.
"""

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calligrapher.data.case import Case, CaseId, OcrMatch, checked_text, slug
from calligrapher.errors import DataError

FileName = Annotated[str, Field(min_length=1)]
ListKind = Literal["self", "cross", "jsonl"]
Column = Literal["source", "mask", "reference", "text", "case_id", "target", "ocr_match"]
Columns = Mapping[Column, str]  # field of a case -> the name that it has in a table

_BENCH_FILE = re.compile(r"(self|cross)_bench\.txt|test[0-9]+_(source|mask|ref|target)\.png")
_SELF_LINE = re.compile(r"([0-9]{1,9})\s*-(.*)")
_CROSS_LINE = re.compile(r"([0-9]{1,9})\s*-\s*([0-9]{1,9}(?:\s*,\s*[0-9]{1,9})*)\s*-(.*)")


@dataclass(frozen=True)
class ListEntry:
    """One line of a list or row of a table: its cases, or what is wrong with it."""

    where: str  # as `self_bench.txt line 3`
    cases: tuple[Case, ...] = ()
    error: DataError | None = None


class ListedCase(BaseModel):
    """One line of a JSONL file, or one row of a table."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: FileName
    mask: FileName
    reference: FileName
    text: str
    case_id: CaseId | None = None
    target: FileName | None = None
    ocr_match: OcrMatch | None = None

    def case(self, folder: Path, name: str) -> Case:
        """Return the case, its paths relative to `folder`.

        `name` begins the case_id of one that has none.
        """
        text = checked_text(self.text)
        return Case(
            case_id=self.case_id or f"{name}-{slug(text)}",
            text=text,
            source=folder / self.source,
            mask=folder / self.mask,
            reference=folder / self.reference,
            target=None if self.target is None else folder / self.target,
            ocr_match=self.ocr_match,
        )


def under_our_names(record: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Return a record with its fields under their names here.

    Without `columns` it is as it was; with them, only fields of a case are kept.
    """
    if not columns:
        return dict(record)
    theirs = {field: columns.get(field, field) for field in ListedCase.model_fields}
    return {field: record[name] for field, name in theirs.items() if name in record}


def wrong_fields(error: ValidationError) -> str:
    """Return what is wrong with the fields of a record, in one line."""
    return "; ".join(
        ".".join(map(str, item["loc"])) + (": " if item["loc"] else "") + item["msg"]
        for item in error.errors(include_url=False, include_input=False)
    )


def listed_entries(
    listing: Path, kind: ListKind, columns: Columns | None = None
) -> Iterator[ListEntry]:
    """Yield the entries of a list, line by line; blank lines are layout. columns: of JSONL."""
    jsonl = functools.partial(_parse_jsonl, columns=columns or {})
    parse = {"self": _parse_self, "cross": _parse_cross, "jsonl": jsonl}[kind]
    for number, line in enumerate(
        listing.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1
    ):
        if not line.strip():
            continue
        where = f"{listing.name} line {number}"
        try:
            yield ListEntry(where, tuple(parse(listing.parent, _decoded(line))))
        except DataError as error:
            yield ListEntry(where, error=error)


def find_list(path: Path, kind: ListKind) -> Path:
    """Return the file that lists the cases of a bench folder, or `path` itself for JSONL."""
    if kind == "jsonl":
        if not path.is_file():
            raise DataError(
                f"{path} must be a JSONL file. Found {'a folder' if path.is_dir() else 'nothing'}"
                " there."
            )
        return path
    if not path.is_dir():
        raise DataError(
            f"{path} must be a bench folder. Found {'a file' if path.exists() else 'nothing'}"
            " there."
        )
    listing = path / f"{kind}_bench.txt"
    if not listing.is_file():
        raise DataError(f"{path} must hold {listing.name} for {kind} cases. Found no such file.")
    return listing


def is_bench_file(name: str) -> bool:
    """Return whether a file of a bench folder belongs to it: its lists and the cases' pictures."""
    return _BENCH_FILE.fullmatch(name) is not None


def _decoded(line: bytes) -> str:
    try:
        return line.decode().strip()
    except UnicodeDecodeError as error:
        found = f"{error.reason} at byte {error.start} of {line[:40]!r}"
        raise DataError(f"must be UTF-8. Found {found}. Save the list as UTF-8.") from error


def _parse_self(folder: Path, line: str) -> list[Case]:
    match = _SELF_LINE.fullmatch(line)
    if match is None:
        raise DataError(f"must read N-text, N a whole number. Found {line!r}.")
    number, text = int(match[1]), checked_text(match[2])
    case = _bench_case(folder, number, number, f"test{number}-{slug(text)}", text)
    target = folder / f"test{number}_target.png"
    # A link to nowhere is a broken target, not a missing one.
    return [case.model_copy(update={"target": target}) if os.path.lexists(target) else case]


def _parse_cross(folder: Path, line: str) -> list[Case]:
    match = _CROSS_LINE.fullmatch(line)
    if match is None:
        raise DataError(
            f"must read N-ref1,ref2-text, N and the refs whole numbers. Found {line!r}."
        )
    number, text = int(match[1]), checked_text(match[3])
    refs = [int(ref) for ref in match[2].split(",")]
    return [
        _bench_case(folder, number, ref, f"test{number}-ref{ref}-{slug(text)}", text)
        for ref in refs
    ]


def _parse_jsonl(folder: Path, line: str, columns: Columns) -> list[Case]:
    try:
        if columns and isinstance(found := json.loads(line), dict):
            record = ListedCase.model_validate(under_our_names(found, columns))
        else:
            record = ListedCase.model_validate_json(line)
    except json.JSONDecodeError as error:
        raise DataError(f"must be JSON. Found {line[:80]!r} ({error}).") from error
    except ValidationError as error:
        raise DataError(
            "must be {source, mask, reference, text[, case_id][, target][, ocr_match]}."
            f" Found {line[:80]!r} ({wrong_fields(error)})."
        ) from error
    return [record.case(folder, slug(Path(record.source).stem))]


def _bench_case(folder: Path, number: int, ref: int, case_id: str, text: str) -> Case:
    return Case(
        case_id=case_id,
        text=text,
        source=folder / f"test{number}_source.png",
        mask=folder / f"test{number}_mask.png",
        reference=folder / f"test{ref}_ref.png",
    )
