"""Reads every byte of a run and names what is not as it was written."""

import json
from dataclasses import dataclass
from pathlib import Path

from calligrapher.errors import ArtifactError
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import MANIFEST, PARAMS, PARTIAL_SUFFIX
from tasks.artifacts.run_dir import RunDir
from tasks.pipeline import parents


@dataclass(frozen=True)
class Verified:
    """What was read, and one line for each problem."""

    artifacts: int
    files: int
    bytes: int
    problems: list[str]

    def text(self) -> str:
        """What was read in a line, and a line for each problem."""
        read = f"{self.artifacts} artifacts, {self.files} files, {self.bytes} bytes were read."
        return "\n".join([read, *(f"damaged: {problem}" for problem in self.problems)])


def verify(run_folder: Path) -> Verified:
    """Check every file's sha256, every manifest's own digests, and that each artifact's inputs are
    these.

    What retention deleted and what is unfinished is left out. Never raises for damage.
    """
    run_dir, loaded, problems = RunDir(run_folder), {}, []
    for path in sorted(run_folder.rglob(MANIFEST)):
        name = path.parent.relative_to(run_folder).as_posix()
        if PARTIAL_SUFFIX not in name and not _of_another_run(path, run_folder):
            try:
                loaded[name] = Artifact.load(path.parent)
            except ArtifactError as error:
                problems.append(str(error))
    staleness = 0
    try:
        # Read as it is: a run of other params than are valid today can be looked at, too.
        staleness = json.loads((run_folder / PARAMS).read_text())["rollout"].get("staleness", 0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problems.append(f"{run_folder / PARAMS}: it cannot be read ({error!r})")
    for name, artifact in loaded.items():
        problems += [f"{artifact.path / line}" for line in artifact.damage()]
        problems += _chain(run_dir, name, loaded, staleness)
    entries = [e for a in loaded.values() for n, e in a.files.items() if n not in a.pruned()]
    return Verified(len(loaded), len(entries), sum(entry.bytes for entry in entries), problems)


def _of_another_run(manifest: Path, run_folder: Path) -> bool:
    """Whether the artifact belongs to a run whose folder lies inside this one's."""
    between = [folder for folder in manifest.parents if run_folder in folder.parents]
    return any((folder / PARAMS).is_file() for folder in between)


def _chain(run_dir: RunDir, name: str, loaded: dict[str, Artifact], staleness: int) -> list[str]:
    """Problems between artifacts: one that was made from other bytes than its input has now."""
    artifact = loaded[name]
    if name in run_dir.shared:
        same = run_dir.shared[name] == artifact.digest
        return [] if same else [f"{artifact.path}: it is not what the fork shares with its parent"]
    return [
        f"{artifact.path}: it was made from another {parent} than the one that is there"
        for key, parent in parents(name, staleness).items()
        if parent in loaded and artifact.inputs[key] != loaded[parent].digest
    ]
