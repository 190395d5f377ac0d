"""Why an artifact is not what would be made now: which param, input or version is another one."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from calligrapher.errors import ArtifactError, CalligrapherError
from tasks.artifacts.artifact import MANIFEST, PARTIAL, PARTIAL_SUFFIX
from tasks.artifacts.digests import code_version
from tasks.artifacts.lineage import PARAMS
from tasks.artifacts.run_dir import Artifact, RunDir, differences, made_from
from tasks.params.run_params import load_params
from tasks.pipeline import artifact_name, parents, planned
from tasks.resources.resources import Bench
from tasks.runs.reads import Asked, Reads


@dataclass(frozen=True)
class Why:
    """`reasons`: what makes `name` stale, or absent; none = up to date. `notes`: what was not
    compared."""

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
    reads = Reads(Bench(params, data_dir, scorer=None))  # type: ignore[arg-type]  # nothing is scored here
    found: dict[str, Why] = {}
    for other in names[: names.index(name) + 1]:  # what an artifact is made from comes before it
        found[other] = _compare(RunDir(run_folder), other, reads, found)
    return found[name]


def _compare(run_dir: RunDir, name: str, reads: Reads, found: dict[str, Why]) -> Why:
    path = run_dir.stage_path(name)
    above = {key: found[parent] for key, parent in parents(name).items() if parent in found}
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
        f"not compared: {line}"
        for line in differences(artifact.manifest.code, code_version(), "code")
    ]
    try:
        asked = _asked(run_dir, name, reads, artifact)
    except CalligrapherError as error:
        return Why(
            name, "stale" if reasons else "up to date", reasons, [f"not compared: {error}", *notes]
        )
    now = {k: getattr(asked, k) for k in ("stage", "stage_version", "params", "inputs", "extra")}
    reasons = [_with_parent(line, name) for line in differences(made_from(artifact), now)] + reasons
    return Why(name, "stale" if reasons else "up to date", reasons, notes)


def _asked(run_dir: RunDir, name: str, reads: Reads, artifact: Artifact) -> Asked:
    digests = {key: Artifact.load(run_dir.stage_path(p)).digest for key, p in parents(name).items()}
    reads.scored_by = artifact.manifest.extra.get("scored_by")
    asked = reads.of(name, digests)
    plain = json.loads(json.dumps(asked.params))  # as it was read back: tuples are lists
    return Asked(asked.stage, asked.stage_version, plain, asked.inputs, asked.extra)


def _with_parent(line: str, name: str) -> str:
    key = line.partition(":")[0]
    parent = parents(name).get(key.removeprefix("inputs.")) if key.startswith("inputs.") else None
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
