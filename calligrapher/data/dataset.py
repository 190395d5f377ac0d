"""Cases (what to write where, in whose style): read from a list or a table, all checked first.

Five kinds of datasets are read: the lists of `lists.py` (self, cross, jsonl) and the tables of
`tables.py` (parquet, huggingface). A broken sample is an error, never left out and never replaced
by another: `load_cases` names all that is wrong with all of them.

The target, if there is one, is the picture that should come out: the source with the text written
in the reference's style. Supervised learning needs it; everything else does without.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from calligrapher.data.case import Case
from calligrapher.data.checks import inspect, problems_of
from calligrapher.data.lists import Columns, ListEntry, find_list, listed_entries
from calligrapher.data.tables import huggingface_entries, parquet_entries
from calligrapher.errors import DataError, ParamsError

DatasetKind = Literal["self", "cross", "jsonl", "parquet", "huggingface"]


@dataclass(frozen=True)
class ListedSample:
    """One case of a dataset as it was found; no case where the place itself cannot be read."""

    where: str  # as `self_bench.txt line 3`
    case: Case | None
    problems: tuple[str, ...]  # empty when the case is sound

    @property
    def place(self) -> str:
        """Where it stands and, where it has one, the name of its case."""
        return f"{self.where} ({self.case.case_id})" if self.case else self.where

    def messages(self) -> list[str]:
        """The problems, each with the place and the case."""
        return [f"{self.place}: {problem}" for problem in self.problems]


def load_cases(
    path: Path | str,
    kind: DatasetKind = "self",
    cache_dir: Path | str | None = None,
    columns: Columns | None = None,
) -> list[Case]:
    """Return all cases, checked, in the order of the list.

    `path` is a bench folder ("self", "cross"), a JSONL file, a Parquet file or a folder of them, or
    what `datasets` reads. Pictures that a table holds are written to `cache_dir`, once, named by
    their bytes. `columns` says which field of a case has which name in a table (jsonl, parquet,
    huggingface); the table's other columns do not count then. Every picture is decoded once. Raises
    one DataError that names every broken sample (file, place, what must hold, what was found);
    ParamsError on an unknown kind, and for columns of a kind that has none.
    """
    samples = list(survey(path, kind, cache_dir, columns))
    problems = [problem for sample in samples for problem in sample.messages()]
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise DataError(
            f"{_place(path, kind)} has {len(problems)} problem(s); mend or remove these"
            f" samples:\n{listed}"
        )
    return [sample.case for sample in samples if sample.case]


def survey(
    path: Path | str,
    kind: DatasetKind,
    cache_dir: Path | str | None = None,
    columns: Columns | None = None,
) -> Iterator[ListedSample]:
    """Yield every sample of a dataset with what is wrong with it; arguments as `load_cases`."""
    if kind not in get_args(DatasetKind):
        raise ParamsError(f"kind must be one of {', '.join(get_args(DatasetKind))}. Got {kind!r}.")
    if columns and kind in ("self", "cross"):
        raise ParamsError(
            f"data.columns must be left out where data.kind is {kind}, which has no columns."
        )
    place = _place(path, kind)
    cache = None if cache_dir is None else Path(cache_dir).absolute()
    empty = True
    for sample in _checked(_entries(place, kind, cache, columns)):
        empty = False
        yield sample
    if empty:
        yield ListedSample(place.name, None, ("must list at least one case. Found none.",))


def _place(path: Path | str, kind: DatasetKind) -> Path:
    """Return what lists the cases: a file or, for tables, what was given."""
    if kind == "huggingface":
        return Path(path).expanduser()  # A name on the hub stays as it is.
    path = Path(path).expanduser().absolute()
    return path if kind == "parquet" else find_list(path, kind)


def _entries(
    place: Path, kind: DatasetKind, cache_dir: Path | None, columns: Columns | None
) -> Iterator[ListEntry]:
    if kind == "huggingface":
        return huggingface_entries(str(place), cache_dir, columns)
    if kind == "parquet":
        return parquet_entries(place, cache_dir, columns)
    return listed_entries(place, kind, columns)


def _checked(entries: Iterator[ListEntry]) -> Iterator[ListedSample]:
    """Yield the samples of the entries, with what is wrong within a case and between cases."""
    inspected = functools.cache(inspect)  # Cross cases share sources, masks and references.
    place_of: dict[str, str] = {}
    text_of: dict[tuple[Path, Path], str] = {}
    for entry in entries:
        where = entry.where
        if entry.error is not None:
            yield ListedSample(where, None, (str(entry.error),))
        for case in entry.cases:
            if case.case_id in place_of:
                twice = (
                    "every case must have a case_id of its own. Found that of"
                    f" {place_of[case.case_id]}."
                )
                yield ListedSample(where, case, (twice,))
                continue
            place_of[case.case_id] = where
            problems = list(problems_of(case, inspected))
            if case.target and text_of.setdefault((case.target, case.mask), case.text) != case.text:
                other = text_of[case.target, case.mask]
                problems.insert(
                    0, f"{case.target} must show one text. Found it listed for {other!r} already."
                )
            yield ListedSample(where, case, tuple(problems))
