"""Cases (what to write where, in whose style): read from a list or a table, all checked first.

Five kinds of datasets are read: the lists of `dataset_lists` (self, cross, jsonl) and the tables of
`dataset_tables` (parquet, huggingface). A broken sample is an error, never left out and never
replaced by another: `load_cases` names all that is wrong with all of them.

The target, if there is one, is the picture that should come out: the source with the text written
in the reference's style. Supervised learning needs it; everything else does without.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from calligrapher.data.case import Case, prompt_for
from calligrapher.data.checks import inspect, problems_of
from calligrapher.data.lists import Entry, find_list, listed_entries
from calligrapher.data.tables import huggingface_entries, parquet_entries
from calligrapher.errors import DataError, ParamsError

__all__ = ["Case", "DatasetKind", "Sample", "load_cases", "prompt_for", "survey"]

DatasetKind = Literal["self", "cross", "jsonl", "parquet", "huggingface"]


@dataclass(frozen=True)
class Sample:
    """What one place of a dataset gave: a case, or none where the place itself cannot be read."""

    where: str  # as `self_bench.txt line 3`
    case: Case | None
    problems: tuple[str, ...]  # empty when the case is sound

    def told(self) -> list[str]:
        """The problems, each with its place and case."""
        place = f"{self.where} ({self.case.case_id})" if self.case else self.where
        return [f"{place}: {problem}" for problem in self.problems]


def load_cases(
    path: Path | str, kind: DatasetKind = "self", cache_dir: Path | str | None = None
) -> list[Case]:
    """Read and check all cases, in the order of the list.

    `path` is a bench folder ("self", "cross"), a JSONL file, a Parquet file or a folder of them, or
    what `datasets` reads. Pictures that a table holds are written to `cache_dir`, once, named by
    their bytes. Every picture is decoded once. Raises one DataError that names every broken sample
    (file, place, what must hold, what was found); ParamsError on an unknown kind.
    """
    samples = survey(path, kind, cache_dir)
    problems = [problem for sample in samples for problem in sample.told()]
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise DataError(
            f"{_place(path, kind)} has {len(problems)} problem(s); mend or remove these"
            f" samples:\n{listed}"
        )
    return [sample.case for sample in samples if sample.case]


def survey(
    path: Path | str, kind: DatasetKind, cache_dir: Path | str | None = None
) -> list[Sample]:
    """Every sample of a dataset with what is wrong with it; arguments as for `load_cases`."""
    if kind not in get_args(DatasetKind):
        raise ParamsError(f"kind must be one of {', '.join(get_args(DatasetKind))}. Got {kind!r}.")
    place = _place(path, kind)
    samples = list(
        _checked(_entries(place, kind, None if cache_dir is None else Path(cache_dir).absolute()))
    )
    return samples or [Sample(place.name, None, ("must list at least one case. Found none.",))]


def _place(path: Path | str, kind: DatasetKind) -> Path:
    """What lists the cases: a file or, for tables, what was given."""
    if kind == "huggingface":
        return Path(path).expanduser()  # A name on the hub stays as it is.
    path = Path(path).expanduser().absolute()
    return path if kind == "parquet" else find_list(path, kind)


def _entries(place: Path, kind: DatasetKind, cache_dir: Path | None) -> Iterator[Entry]:
    if kind == "huggingface":
        return huggingface_entries(str(place), cache_dir)
    if kind == "parquet":
        return parquet_entries(place, cache_dir)
    return listed_entries(place, kind)


def _checked(entries: Iterator[Entry]) -> Iterator[Sample]:
    """The samples of the entries, with what is wrong within a case and between cases."""
    inspected = functools.cache(inspect)  # Cross cases share sources, masks and references.
    place_of: dict[str, str] = {}
    text_of: dict[tuple[Path, Path], str] = {}
    for where, found in entries:
        if isinstance(found, DataError):
            yield Sample(where, None, (str(found),))
            continue
        for case in found:
            if case.case_id in place_of:
                twice = (
                    "every case must have a case_id of its own. Found that of"
                    f" {place_of[case.case_id]}."
                )
                yield Sample(where, case, (twice,))
                continue
            place_of[case.case_id] = where
            problems = list(problems_of(case, inspected))
            if case.target and text_of.setdefault((case.target, case.mask), case.text) != case.text:
                other = text_of[case.target, case.mask]
                problems.insert(
                    0, f"{case.target} must show one text. Found it listed for {other!r} already."
                )
            yield Sample(where, case, tuple(problems))
