"""Checks a dataset before a run does: every broken sample, and what the sound ones are like."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from calligrapher.data.case import Case
from calligrapher.data.dataset import DatasetKind, ListedSample, survey
from calligrapher.data.images import load_mask, load_rgb
from calligrapher.data.lists import Columns
from calligrapher.data.tables import SAVED
from calligrapher.errors import DataError
from tasks.data.demands import Demands, advice, heights_on, unmet
from tasks.data.letters import told, unreadable
from tasks.progress import Progress

_LONGEST_COUNT = 40  # kinds of characters or sizes that are counted out


@dataclass(frozen=True)
class CheckedDataset:
    """A dataset's samples, with what is wrong with each on the canvas of the model."""

    path: Path
    kind: DatasetKind
    demands: Demands
    samples: list[ListedSample]

    @property
    def sound(self) -> list[Case]:
        return [sample.case for sample in self.samples if sample.case and not sample.problems]

    @property
    def problems(self) -> list[str]:
        return [problem for sample in self.samples for problem in sample.messages()]

    @property
    def title(self) -> str:
        broken = sum(bool(sample.problems) for sample in self.samples)
        return f"{self.path} (kind {self.kind}): {len(self.samples)} samples, {broken} broken"

    @property
    def cases(self) -> list[Case]:
        return [sample.case for sample in self.samples if sample.case]

    def statistics(self) -> dict[str, str]:
        """Return what the sound cases are like, and which texts can have no OCR score."""
        found = dict(_statistics(self.sound))
        if (shapes := heights_on(self.demands.canvas, self.sound)) is not None:
            found["shapes"] = str(shapes)
        try:
            if lacking := unreadable(self.cases):
                found["unreadable"] = told(lacking, len(self.cases))
        except (FileNotFoundError, ImportError) as error:
            found["unreadable"] = f"not known: {error}"
        return found

    def text(self) -> str:
        """The title, the problems, and the statistics of the sound cases."""
        broken = [f"broken: {problem}" for problem in self.problems]
        rows = [f"{name:<12} {value}" for name, value in self.statistics().items()]
        return "\n".join([self.title, *broken, *advice(self.cases, self.demands), *rows])

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "samples": len(self.samples),
            "broken": [
                {
                    "where": sample.where,
                    "case_id": sample.case and sample.case.case_id,
                    "problems": list(sample.problems),
                }
                for sample in self.samples
                if sample.problems
            ],
            "advice": list(advice(self.cases, self.demands)),
            "statistics": self.statistics(),
        }


def check(
    path: Path,
    kind: DatasetKind | None,
    *,
    demands: Demands,
    cache_dir: Path,
    columns: Columns | None = None,
) -> CheckedDataset:
    """Return every sample of `path`, checked; without a `kind` it is told by what lies there.

    columns: as `data.columns`.
    """
    if kind is None:
        path, kind = detect(path)
    samples, broken = [], 0
    with Progress("data check", None, "sample") as progress:
        for sample in survey(path, kind, cache_dir, columns):
            samples.append(_demanded(sample, demands))
            broken += bool(samples[-1].problems)
            progress.advance(broken=broken)
    return CheckedDataset(path, kind, demands, samples)


def detect(path: Path) -> tuple[Path, DatasetKind]:
    """Return what to read and its kind. Raises DataError when not exactly one list is there."""
    folder, _, split = str(path).partition("#")
    if split and any((Path(folder) / name).is_file() for name in SAVED):
        return path, "huggingface"
    if path.is_file():
        kinds: dict[str, DatasetKind] = {".jsonl": "jsonl", ".parquet": "parquet"}
        if path.suffix in kinds:
            return path, kinds[path.suffix]
    elif any((path / name).is_file() for name in SAVED):
        return path, "huggingface"
    else:
        lists: list[tuple[Path, DatasetKind]] = [
            (path, kind) for kind in ("self", "cross") if (path / f"{kind}_bench.txt").is_file()
        ]
        lists += [(file, "jsonl") for file in sorted(path.glob("*.jsonl"))]
        if any(path.glob("*.parquet")):
            lists.append((path, "parquet"))
        if len(lists) == 1:
            return lists[0]
        if lists:
            listed = ", ".join(f"{kind} ({where.name})" for where, kind in lists)
            raise DataError(
                f"{path} must hold one kind of list. Found {listed}. Name one with --kind."
            )
    raise DataError(
        f"{path} must hold self_bench.txt, cross_bench.txt, a JSONL or Parquet file, or a saved"
        " dataset. Found none of them. Name the kind with --kind."
    )


def mask_share(mask: Image.Image) -> float:
    """Return the share of the picture that is painted."""
    return mask.histogram()[255] / (mask.width * mask.height)


def _demanded(sample: ListedSample, demands: Demands) -> ListedSample:
    """Return the sample; one that is sound by itself, with the demands that it does not meet."""
    if sample.case is None or sample.problems:
        return sample
    return dataclasses.replace(sample, problems=tuple(unmet(sample.case, demands)))


def _statistics(cases: Sequence[Case]) -> Iterator[tuple[str, str]]:
    if not cases:
        return
    texts = [case.text for case in cases]
    shares = [mask_share(load_mask(case.mask)) for case in cases]
    lengths = _range([len(text) for text in texts], "{:.0f}")
    yield "texts", f"{len(set(texts))} different, characters per text: {lengths}"
    yield "characters", _counted(Counter("".join(texts).replace(" ", "")))
    yield "sources", _counted(Counter(_size(case.source) for case in cases))
    yield "references", _counted(Counter(_size(case.reference) for case in cases))
    yield "masks", f"share of the source painted: {_range(shares, '{:.1%}')}"
    targets = sum(case.target is not None for case in cases)
    needs = "" if targets == len(cases) else "; without all of them warmup.steps must be 0"
    yield "targets", f"{targets} of {len(cases)}{needs}"


def _range(values: Sequence[float], form: str) -> str:
    low, middle, high = (form.format(f(values)) for f in (min, statistics.median, max))
    return low if low == high else f"{low} to {high} (median {middle})"


def _counted(counts: Counter[str]) -> str:
    most = "  ".join(f"{name} {count}" for name, count in counts.most_common(_LONGEST_COUNT))
    return f"{len(counts)} different: {most}{' ...' if len(counts) > _LONGEST_COUNT else ''}"


def _size(path: Path) -> str:
    return "x".join(map(str, load_rgb(path).size))
