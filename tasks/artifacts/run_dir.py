"""A run's folder: each stage is built once, whole or not at all, and found by its fingerprint.

```
runs/NAME/round-0003/update/            a finished artifact: its files and `artifact.json`
runs/NAME/round-0003/update.partial/    the work folder of one being built, or left by a kill
```
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from calligrapher.durable import atomic_write, fsync_path, is_temporary
from calligrapher.errors import ArtifactError
from tasks.artifacts import contents
from tasks.artifacts.artifact import Artifact, payload_files, write_manifest
from tasks.artifacts.disk import disk_full, is_disk_full
from tasks.artifacts.layout import INNER, MANIFEST, PARTIAL, PARTIAL_SUFFIX
from tasks.artifacts.lineage import Fork, read_fork
from tasks.artifacts.lock import run_lock
from tasks.artifacts.provenance import Provenance, differences

Build = Callable[[Path], dict[str, Any] | None]


class RunDir:
    """The folder of one run. Work in it under `with run_dir.lock():`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._whole: set[tuple[Path, str]] = set()  # made or read through by this process
        self._begun: dict[Path, str] = {}  # work folder -> fingerprint

    @cached_property
    def fork(self) -> Fork | None:
        """What this run is a fork of; None for a run of its own."""
        return read_fork(self.path)

    @property
    def shared(self) -> dict[str, str]:
        """Name -> digest of the artifacts that a fork has from its parent.

        Empty for a run of its own.
        """
        return self.fork.shared if self.fork else {}

    def lock(self) -> AbstractContextManager[None]:
        """Hold the run for this process. Raises RunLockedError when another one holds it."""
        return run_lock(self.path)

    def stage_path(self, name: str) -> Path:
        """The folder of the artifact `name`, as in `round-0003/update`."""
        parts = Path(name).parts
        assert parts, "an artifact needs a name"
        assert not {"/", ".."} & set(parts), f"{name} must lie inside the run"
        return self.path / name

    def artifacts(self) -> Iterator[Artifact]:
        """Every finished artifact of the run, in the order of their paths."""
        for path in sorted(self.path.rglob(MANIFEST)):
            if not any(part.endswith(PARTIAL_SUFFIX) for part in path.relative_to(self.path).parts):
                yield Artifact.load(path.parent)

    def load(self, name: str) -> Artifact:
        """The finished artifact `name`, with all its files there. Raises ArtifactError.

        What a fork shares must still be what its parent had: other bytes under its name are
        refused.
        """
        path = self.stage_path(name)
        if not path.exists():
            hint = (
                " Make the fork anew: this one's part of it was deleted."
                if name in self.shared
                else ""
            )
            raise ArtifactError(f"{path} must be a finished artifact. It is not there.{hint}")
        artifact = Artifact.load(path)
        if self.shared.get(name, artifact.digest) != artifact.digest:
            raise ArtifactError(
                f"{path} must be the artifact {self.shared[name][:12]} that this run shares with"
                f" its parent. It is {artifact.digest[:12]}. Make the fork anew."
            )
        artifact.verify(read_bytes=False)
        return artifact

    def ensure(
        self,
        name: str,
        asked: Provenance,
        build: Build,
        *,
        inputs: Iterable[Artifact] = (),
    ) -> Artifact:
        """Return the artifact `name` that `asked` describes: the one that is there, or built now.

        `build(folder)` writes the files into `folder` and returns `meta` (plain JSON) or None. It
        finds there what an earlier, killed attempt *with the same fingerprint* left; what it keeps
        in `folder/inner` (checkpoints to resume from) does not become part of the artifact. SIGKILL
        at any moment leaves no artifact or a whole one. inputs: artifacts whose bytes are read
        through before something is built from them.

        Raises ArtifactError when `name` was made from something else (says what), when files of it
        are gone, when an input's bytes are not those that were written, and when the disk is full.
        """
        final = self.stage_path(name)
        if final.exists():
            artifact = self.load(name)
            if artifact.fingerprint != asked.fingerprint:
                raise stale(artifact, asked)
            return artifact
        partial = final.with_name(final.name + PARTIAL_SUFFIX)
        with _full_disk_told(name, partial):
            if self._begun.pop(partial, None) != asked.fingerprint:
                _open_partial(partial, asked.fingerprint)
            if not (partial / MANIFEST).exists():
                self._check(inputs)
                started = time.monotonic()
                meta = build(partial) or {}
                _fsync_tree(partial)
                seconds = time.monotonic() - started
                manifest = write_manifest(partial, asked, meta=meta, seconds=seconds)
                self._whole.add((final, manifest.digest))
        _commit(partial, final)
        return Artifact.load(final)

    def begin(
        self, name: str, asked: Provenance, *, inputs: Iterable[Artifact] = ()
    ) -> Path | None:
        """Return the work folder of `name`, for others to fill before `ensure` is called for it.

        None where there is nothing to do but to call `ensure`. Raises ArtifactError as it does.
        """
        final = self.stage_path(name)
        partial = final.with_name(final.name + PARTIAL_SUFFIX)
        if final.exists() or _manifested(partial) is not None:
            return None
        self._check(inputs)
        with _full_disk_told(name, partial):
            _open_partial(partial, asked.fingerprint)
        self._begun[partial] = asked.fingerprint
        return partial

    def _check(self, inputs: Iterable[Artifact]) -> None:
        """Read every byte of what this process has not read before. Raises ArtifactError."""
        for artifact in inputs:
            if (artifact.path, artifact.digest) not in self._whole:
                artifact.verify()
                self._whole.add((artifact.path, artifact.digest))


@contextmanager
def _full_disk_told(name: str, partial: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_disk_full(error, partial):
            raise
        raise disk_full(name, partial, error) from error


def _open_partial(partial: Path, wanted: str) -> None:
    """Make the work folder, or keep the one of the same fingerprint.

    What is kept holds work to go on from.
    """
    note = partial / PARTIAL
    if partial.exists() and _noted(note) != wanted and _manifested(partial) != wanted:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    for path in list(partial.rglob("*")):
        if is_temporary(path):
            path.unlink()
    atomic_write(note, json.dumps({"fingerprint": wanted}).encode())


def _noted(note: Path) -> str | None:
    return json.loads(note.read_bytes())["fingerprint"] if note.is_file() else None


def _manifested(partial: Path) -> str | None:
    manifest = partial / MANIFEST
    return json.loads(manifest.read_bytes())["fingerprint"] if manifest.is_file() else None


def _commit(partial: Path, final: Path) -> None:
    """Give the finished work folder its name. A killed commit is ended by the next one."""
    shutil.rmtree(partial / INNER, ignore_errors=True)
    (partial / PARTIAL).unlink(missing_ok=True)
    fsync_path(partial)
    os.replace(partial, final)
    fsync_path(final.parent)


def _fsync_tree(folder: Path) -> None:
    folders = {folder}
    for path in payload_files(folder):
        fsync_path(path)
        folders.update(parent for parent in path.parents if folder in parent.parents)
    for path in folders:
        fsync_path(path)


_OTHER_ENGINES = (
    " The reward servers score with other engines, versions or models now (scored_by): start"
    " them as they were, on the same kind of CPU, to put that back."
)

_UPDATE_VERSION = "params.update_version"
_OTHER_PROGRAM = (
    " A version is that of the program, which makes this in another way now: only the program that"
    " made it can go on with this run. To keep its rounds and go on with this program, fork at the"
    " first stage that is missing."
)


def stale(artifact: Artifact, asked: Provenance) -> ArtifactError:
    """Return the error that lists how `artifact` differs from what is asked for."""
    changes = differences(artifact.provenance.as_dict(), asked.as_dict())
    data = contents.explain(artifact.path, artifact.inputs, asked.inputs)
    lines = "".join(f"\n  {line}" for line in (*changes, *data))
    other_engines = "\n  extra.scored_by." in lines
    other_program = any(f"\n  {key}: " in lines for key in ("stage_version", _UPDATE_VERSION))
    return ArtifactError(
        f"{artifact.path} was made from other params or inputs than are asked for now:{lines}\nA"
        " finished artifact is never overwritten. Put the old values back to go on with this run,"
        " give the changed run a new name, or keep what was made before a stage and make the rest"
        " anew in a fork: `calligrapher rerun RUN STAGE --fork NAME --downstream`. After a mended"
        " sample STAGE is the first one that `calligrapher status RUN` shows as missing."
        + (_OTHER_ENGINES if other_engines else "")
        + (_OTHER_PROGRAM if other_program else "")
    )
