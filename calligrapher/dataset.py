"""Cases (what to write where, in whose style): read from a bench folder or a JSONL file, all checked first.

A bench folder holds `testN_source.png`, `testN_mask.png`, `testN_ref.png` and lists:

- `self_bench.txt`, lines `N-text`: the style comes from `testN_ref.png`;
- `cross_bench.txt`, lines `N-ref1,ref2-text`: one case per reference, styled after `test{ref1}_ref.png`, ...

The text is all that follows, '-' and ',' included. A JSONL file holds one
`{source, mask, reference, text[, case_id][, target]}` a line, paths relative to the file. A broken sample is
an error, never left out and never replaced by another: `load_cases` names all that is wrong with all of them.

The target, if there is one, is the picture that should come out: the source with the text written in the
reference's style. Supervised learning needs it; everything else does without. Self cases find theirs as
`testN_target.png`; cross cases have none, for that picture is in another reference's style.
"""

import functools
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calligrapher.errors import DataError, ParamsError
from calligrapher.images import load_mask, load_rgb

DatasetKind = Literal["self", "cross", "jsonl"]

MIN_SIDE = 2  # A line of single pixels shows no style and holds no text.
MAX_REFERENCE_TALLNESS = 8  # At canvas width, a taller reference would make thousands of context rows.

_SELF_LINE = re.compile(r"([0-9]{1,9})\s*-(.*)")
_CROSS_LINE = re.compile(r"([0-9]{1,9})\s*-\s*([0-9]{1,9}(?:\s*,\s*[0-9]{1,9})*)\s*-(.*)")

_Findings = tuple[tuple[int, int] | None, list[str]]

CaseId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,119}$")]  # Becomes part of file names.


def prompt_for(text: str) -> str:
    """The prompt that Calligrapher was trained with, full stop included."""
    return f"The text is '{text}'."


class Case(BaseModel):
    """One case: the unit that is rolled out, grouped and evaluated. Paths are absolute."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    case_id: CaseId
    text: str
    source: Path
    mask: Path
    reference: Path
    target: Path | None = None

    @property
    def prompt(self) -> str:
        return prompt_for(self.text)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the files' bytes and the text; where the files lie does not count.

        Read anew each time: a changed file must never hide behind an old digest. Raises DataError when a file
        cannot be read.
        """
        whole = hashlib.sha256()
        for path in (self.source, self.mask, self.reference):
            whole.update(_file_digest(path))
        whole.update(self.text.encode())
        if self.target is not None:
            whole.update(b"\0" + _file_digest(self.target))  # A text holds no zero byte.
        return whole.hexdigest()


def _file_digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise DataError(f"{path} must be a readable file. Found: {error.strerror}.") from error


class _Record(BaseModel):
    """One line of a JSONL file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: str
    mask: str
    reference: str
    text: str
    case_id: CaseId | None = None
    target: str | None = None


def load_cases(path: Path | str, kind: DatasetKind = "self") -> list[Case]:
    """Read and check all cases, in the order of the list.

    `path` is a bench folder ("self", "cross") or a JSONL file. Every picture is decoded once. Raises one
    DataError that names every broken sample (file, line, what must hold, what was found); ParamsError on an
    unknown kind.
    """
    if kind not in get_args(DatasetKind):
        raise ParamsError(f"kind must be one of {', '.join(get_args(DatasetKind))}. Got {kind!r}.")
    listing = _listing(Path(path).expanduser().absolute(), kind)
    parse = {"self": _parse_self, "cross": _parse_cross, "jsonl": _parse_jsonl}[kind]
    inspect = functools.cache(_inspect)  # Cross cases share sources, masks and references.

    cases: list[Case] = []
    line_of: dict[str, int] = {}
    text_of: dict[Path, str] = {}
    problems: list[str] = []
    for number, line in enumerate(listing.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{listing.name} line {number}"
        try:
            parsed = parse(listing.parent, _decoded(line)) if line.strip() else []
        except DataError as error:
            problems.append(f"{where}: {error}")
            continue
        for case in parsed:
            if case.case_id in line_of:
                problems.append(
                    f"{where} ({case.case_id}): every case must have a case_id of its own. "
                    f"Found it on line {line_of[case.case_id]} already."
                )
                continue
            line_of[case.case_id] = number
            cases.append(case)
            if case.target and text_of.setdefault(case.target, case.text) != case.text:
                problems.append(
                    f"{where} ({case.case_id}): {case.target} must show one text. "
                    f"Found it listed for {text_of[case.target]!r} already."
                )
            problems += [f"{where} ({case.case_id}): {problem}" for problem in _problems_of(case, inspect)]

    if not cases and not problems:
        problems.append(f"{listing.name}: must list at least one case. Found none.")
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise DataError(f"{listing} has {len(problems)} problem(s); mend or remove these samples:\n{listed}")
    return cases


def _listing(path: Path, kind: DatasetKind) -> Path:
    """The file that lists the cases."""
    if kind == "jsonl":
        if not path.is_file():
            raise DataError(
                f"{path} must be a JSONL file. Found {'a folder' if path.is_dir() else 'nothing'} there."
            )
        return path
    if not path.is_dir():
        raise DataError(
            f"{path} must be a bench folder. Found {'a file' if path.exists() else 'nothing'} there."
        )
    listing = path / f"{kind}_bench.txt"
    if not listing.is_file():
        raise DataError(f"{path} must hold {listing.name} for {kind} cases. Found no such file.")
    return listing


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
    number, text = int(match[1]), _checked_text(match[2].strip())
    case = _bench_case(folder, number, number, f"test{number}-{_slug(text)}", text)
    target = folder / f"test{number}_target.png"
    # A link to nowhere is a broken target, not a missing one.
    return [case.model_copy(update={"target": target}) if os.path.lexists(target) else case]


def _parse_cross(folder: Path, line: str) -> list[Case]:
    match = _CROSS_LINE.fullmatch(line)
    if match is None:
        raise DataError(f"must read N-ref1,ref2-text, N and the refs whole numbers. Found {line!r}.")
    number, text = int(match[1]), _checked_text(match[3].strip())
    refs = [int(ref) for ref in match[2].split(",")]
    return [_bench_case(folder, number, ref, f"test{number}-ref{ref}-{_slug(text)}", text) for ref in refs]


def _parse_jsonl(folder: Path, line: str) -> list[Case]:
    try:
        record = _Record.model_validate_json(line)
    except ValidationError as error:
        wrong = "; ".join(
            ".".join(map(str, item["loc"])) + (": " if item["loc"] else "") + item["msg"]
            for item in error.errors(include_url=False, include_input=False)
        )
        raise DataError(
            f"must be {{source, mask, reference, text[, case_id][, target]}}. Found {line[:80]!r} ({wrong})."
        ) from error
    text = _checked_text(record.text)
    source = folder / record.source
    return [
        Case(
            case_id=record.case_id or f"{_slug(source.stem)}-{_slug(text)}",
            text=text,
            source=source,
            mask=folder / record.mask,
            reference=folder / record.reference,
            target=None if record.target is None else folder / record.target,
        )
    ]


def _bench_case(folder: Path, number: int, ref: int, case_id: str, text: str) -> Case:
    return Case(
        case_id=case_id,
        text=text,
        source=folder / f"test{number}_source.png",
        mask=folder / f"test{number}_mask.png",
        reference=folder / f"test{ref}_ref.png",
    )


def _checked_text(text: str) -> str:
    categories = [unicodedata.category(character) for character in text]
    if not any(category[0] in "LMNPS" for category in categories):
        raise DataError(f"text must have a visible character. Found {text!r}.")
    if text != text.strip():
        raise DataError(f"text must not begin or end with a blank. Found {text!r}.")
    forbidden = [
        c for c, category in zip(text, categories, strict=True) if category in ("Cc", "Zl", "Zp", "Cs")
    ]
    if forbidden:
        raise DataError(
            f"text must be one line without control characters. Found {forbidden[0]!r} in {text!r}."
        )
    return text


def _slug(text: str) -> str:
    """Safe in file names; texts that do not survive the cleaning keep apart by a hash."""
    plain = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:32]
    if plain == text:
        return plain
    return f"{plain or 'text'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _problems_of(case: Case, inspect: Callable[[Path, str], _Findings]) -> Iterator[str]:
    files = {"source": case.source, "mask": case.mask, "reference": case.reference}
    if case.target is not None:
        files["target"] = case.target
    sizes = {}
    for role, path in files.items():
        sizes[role], problems = inspect(path, role)
        yield from problems
    for role in ("mask", "target"):
        if sizes["source"] and sizes.get(role) and sizes["source"] != sizes[role]:
            wanted, found = ("x".join(map(str, sizes[name])) for name in ("source", role))
            yield f"{files[role]} must be as large as its source, {wanted}. Found {found}."


def _inspect(path: Path, role: str) -> _Findings:
    """(width, height) if it could be read, and what is wrong with this file taken alone."""
    try:
        image = load_mask(path) if role == "mask" else load_rgb(path)
    except DataError as error:
        return None, [str(error)]
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        return image.size, [f"{path} must be at least {MIN_SIDE} pixels a side. Found {width}x{height}."]
    problems = []
    if role == "mask":
        painted = image.histogram()[255]
        if painted == 0:
            problems.append(
                f"{path} must have a white pixel (128 to 255, white = paint). Found none. "
                "A mask saved as 0 and 1 looks like this."
            )
        if painted == width * height:
            problems.append(
                f"{path} must keep a part of the source (black). Found that it covers the whole image."
            )
    if role == "reference" and height > MAX_REFERENCE_TALLNESS * width:
        problems.append(
            f"{path} must be at most {MAX_REFERENCE_TALLNESS} times as tall as wide. Found {width}x{height}."
        )
    return image.size, problems
