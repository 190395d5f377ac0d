"""Why an artifact is not what would be made now: which param, input or version is another one."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

from calligrapher.errors import ArtifactError, CalligrapherError
from tasks.artifacts import contents
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.digests import code_version
from tasks.artifacts.layout import MANIFEST, PARAMS, PARTIAL, PARTIAL_SUFFIX
from tasks.artifacts.provenance import Provenance, differences
from tasks.artifacts.run_dir import RunDir
from tasks.params.run_params import RunParams, load_params
from tasks.pipeline import Sources, artifact_name, parents, planned, provenance
from tasks.resources.cases import Cases
from tasks.weights.model_files import model_files


@dataclass(frozen=True)
class Why:
    """What makes the artifact `name` stale, or absent; no reason = up to date.

    notes: which samples of the data differ, and what was not compared.
    """

    name: str
    state: str
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """A headline and a line for each reason and note."""
        return "\n  ".join([f"{self.name} is {self.state}.", *self.reasons, *self.notes])


def why(run_folder: Path, name: str, overrides: list[str], data_dir: Path) -> Why:
    """Compare the artifact `name` with what the run's params, changed by `overrides`, would make
    now.

    No model is loaded and no server asked: who scored counts as unchanged. Raises ParamsError for
    an unknown name.
    """
    params = load_params(run_folder / PARAMS, overrides)
    names = planned(params)
    name = artifact_name(name, names)
    files, cases = model_files(params.model, data_dir.parent), Cases(params, data_dir)
    sources = {
        "model": functools.cache(lambda: files.digest),
        "train_data": lambda: cases.train_digest,
        "evaluation_data": lambda: cases.evaluation_digest,
    }
    answers: dict[str, Why] = {}
    for other in names[: names.index(name) + 1]:  # what an artifact is made from comes before it
        answers[other] = _compare(RunDir(run_folder), other, params, sources, answers)
    return answers[name]


def _compare(
    run_dir: RunDir, name: str, params: RunParams, sources: Sources, answers: dict[str, Why]
) -> Why:
    path = run_dir.stage_path(name)
    made_from = parents(name, params.rollout.staleness).items()
    above = {key: answers[parent] for key, parent in made_from if parent in answers}
    if not path.exists():
        return _absent(run_dir, name, above)
    try:
        artifact = run_dir.load(name)
    except ArtifactError as error:
        return Why(name, "damaged", [str(error)])
    if run_dir.fork and name in run_dir.shared:
        return Why(
            name, "up to date", notes=[f"shared with its parent ({run_dir.fork.described()})"]
        )
    reasons = [
        f"it is made from {made.name} ({key}), which is {made.state}"
        for key, made in above.items()
        if made.state != "up to date"
    ]
    notes = [
        f"not compared: {line}" for line in differences(_versions(artifact), code_version(), "code")
    ]
    try:
        asked = _asked(run_dir, name, params, sources, artifact)
    except CalligrapherError as error:
        return Why(
            name, "stale" if reasons else "up to date", reasons, [f"not compared: {error}", *notes]
        )
    changes = differences(artifact.provenance.as_dict(), asked.as_dict())
    notes = contents.explain(path, artifact.inputs, asked.inputs) + notes
    reasons = [_with_parent(line, dict(made_from)) for line in changes] + reasons
    return Why(name, "stale" if reasons else "up to date", reasons, notes)


def _asked(
    run_dir: RunDir, name: str, params: RunParams, sources: Sources, artifact: Artifact
) -> Provenance:
    """Return what `name` would be made from now; who scored counts as unchanged."""
    made_from = parents(name, params.rollout.staleness).items()
    digests = {key: Artifact.load(run_dir.stage_path(p)).digest for key, p in made_from}
    scored_by = artifact.manifest.extra.get("scored_by")
    return provenance(name, params, {**sources, "scored_by": lambda: scored_by}, digests)


def _versions(artifact: Artifact) -> dict[str, str]:
    """Return the versions of the code that made it, without the machine that it ran on."""
    return {k: v for k, v in artifact.manifest.code.items() if k not in ("ranks", "threads", "cpu")}


def _with_parent(line: str, made_from: dict[str, str]) -> str:
    section, _, key = line.partition(":")[0].partition(".")
    parent = made_from.get(key) if section == "inputs" else None
    return f"{line} ({parent} has other bytes now)" if parent else line


def _absent(run_dir: RunDir, name: str, above: dict[str, Why]) -> Why:
    missing = [made.name for made in above.values() if not run_dir.stage_path(made.name).exists()]
    reasons = [f"{other}, which it is made from, is not there either" for other in missing]
    partial = run_dir.stage_path(name + PARTIAL_SUFFIX)
    if not partial.exists():
        return Why(name, "missing", reasons or ["it was not made yet"])
    files = sum(p.is_file() and p.name not in {PARTIAL, MANIFEST} for p in partial.rglob("*"))
    return Why(
        name,
        "unfinished",
        [f"its work folder holds {files} files; the next start goes on from them"],
    )
