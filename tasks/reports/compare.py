"""Two runs side by side: the params that differ, the curves, and the last evaluations case by case.

```
found = compare(Path("runs/a"), Path("runs/b"))
found.params["nft.nft_beta"]       # (0.5, 0.1); None where a run has no such section
found.difference["ocr_accuracy"]   # (0.03, 0.01, 0.05): b minus a, and its 95 % interval
```
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calligrapher.tables.parquet import read_table
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.run_dir import RunDir
from tasks.pipeline import planned, rounds_done
from tasks.reports.status import run_params
from tasks.resources.rewards import further_numbers
from tasks.stages.evaluate import SCORES
from tasks.stages.statistics import group_means, means_with_intervals

MEASURES = ("ocr_accuracy", "ocr_likelihood", "style_score", "reward")
_WHERE = ("launch", "tracking", "retention")  # they decide no result


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    params: key -> the value in each run, where they differ. curves: rounds done -> held-out OCR
    accuracy of each run (None = not evaluated then). difference: measure -> (mean, low, high) of
    second minus first over the cases of both last evaluations; empty, with a `reason`, where these
    were not made alike.
    """

    runs: tuple[str, str]
    params: dict[str, tuple[Any, Any]]
    curves: dict[int, tuple[float | None, float | None]]
    difference: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    reason: str | None = None

    def text(self) -> str:
        """The comparison for a terminal."""
        first, second = self.runs
        lines = ["params that differ:" if self.params else "The params are the same."]
        lines += [f"  {key}: {a!r} | {b!r}" for key, (a, b) in self.params.items()]
        lines.append(f"held-out OCR accuracy after so many rounds: {first} | {second}")
        lines += [f"  {n:>5}: {_shown(a)} | {_shown(b)}" for n, (a, b) in self.curves.items()]
        if self.reason:
            return "\n".join([*lines, f"The last evaluations do not compare: {self.reason}."])
        lines.append(f"last evaluations, case by case: {second} minus {first} [95 % interval]")
        lines += [
            f"  {name}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            for name, (mean, low, high) in self.difference.items()
        ]
        return "\n".join(lines)


def compare(first: Path, second: Path) -> Comparison:
    """Return how the runs in two folders differ. Raises ArtifactError when one is no run."""
    params = [run_params(folder) for folder in (first, second)]
    flat = [_flat({k: v for k, v in p.resolved().items() if k not in _WHERE}) for p in params]
    differ = {
        key: (flat[0].get(key), flat[1].get(key))
        for key in sorted(flat[0].keys() | flat[1].keys())
        if flat[0].get(key) != flat[1].get(key)
    }
    made = [_evaluations(RunDir(folder)) for folder in (first, second)]
    curves = {
        n: (_accuracy(made[0].get(n)), _accuracy(made[1].get(n)))
        for n in sorted(made[0].keys() | made[1].keys())
    }
    names = (first.resolve().name, second.resolve().name)
    if not all(made):
        return Comparison(names, differ, curves, reason="a run has none")
    last = [evaluations[max(evaluations)] for evaluations in made]
    reason = _unlike(*last)
    if reason:
        return Comparison(names, differ, curves, reason=reason)
    return Comparison(names, differ, curves, _difference(*last, params[0].evaluate))


def _evaluations(run_dir: RunDir) -> dict[int, Artifact]:
    """Return rounds done -> the evaluation made then, previews left out."""
    params = run_params(run_dir.path)
    names = [n for n in planned(params) if n.rpartition("/")[2] == "evaluate"]
    return {rounds_done(n): run_dir.load(n) for n in names if run_dir.stage_path(n).exists()}


def _accuracy(evaluation: Artifact | None) -> float | None:
    return None if evaluation is None else evaluation.meta.get("ocr_accuracy")


def _unlike(first: Artifact, second: Artifact) -> str | None:
    """Return why two evaluations were not made alike; None where they were."""
    if first.inputs["evaluation_data"] != second.inputs["evaluation_data"]:
        return "they show other cases"
    kinds = ("num_cases", "num_images_per_case", "seed")
    settings = [[a.params["evaluate"][kind] for kind in kinds] for a in (first, second)]
    if settings[0] != settings[1]:
        return "evaluate." + ", evaluate.".join(kinds) + " must be the same"
    if first.manifest.extra["scored_by"] != second.manifest.extra["scored_by"]:
        return "they were scored by other engines"
    return None


def _difference(first: Artifact, second: Artifact, settings) -> dict[str, Any]:
    group = settings.num_images_per_case
    tables = [read_table(artifact.file(SCORES)) for artifact in (first, second)]
    columns = {}
    both = [name for name in further_numbers(tables[0]) if name in tables[1]]
    for name in (*MEASURES, *both):
        means = [group_means(table[name], group) for table in tables]
        columns[name] = [
            None if a is None or b is None else b - a for a, b in zip(*means, strict=True)
        ]
    found = means_with_intervals(columns)
    return {n: (found[n], found[f"{n}_low"], found[f"{n}_high"]) for n in columns if n in found}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _shown(accuracy: float | None) -> str:
    return "  -  " if accuracy is None else f"{accuracy:.3f}"
