"""Makes a fork: a run of its own that shares artifacts of its parent, without a copy of bytes.

Its files are hard links to the parent's. Artifacts are never written to once they are there, so
neither run can change the other's; and each can be deleted, whole or by retention, without harm to
the other.
"""

import datetime
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from calligrapher.durable import atomic_write, fsync_path
from calligrapher.errors import ArtifactError
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.digests import canonical_json
from tasks.artifacts.layout import MANIFEST, PARAMS, PRUNED
from tasks.artifacts.lineage import Fork, read_fork, write_fork
from tasks.artifacts.run_dir import RunDir
from tasks.params.names import check_run_name
from tasks.params.run_params import RunParams
from tasks.tracking.journal import METRICS_FILE
from tasks.tracking.pointer import refuse_password

_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP}

logger = logging.getLogger(__name__)


def fork(
    parent: Path,
    name: str,
    params: RunParams,
    overrides: list[str],
    shared: Iterable[str],
    *,
    kind: Literal["rerun", "replay"],
    stage: str | None = None,
) -> RunDir:
    """Return the run `name` beside `parent`, made with the artifacts `shared` of it.

    One that is there already is returned if it is the fork asked for. It appears whole or not at
    all. Raises ArtifactError when another run has the name, or an artifact of the parent is
    damaged, ParamsError for a password in `tracking.uri`.
    """
    check_run_name(name, "the fork's name")
    refuse_password(params.tracking.uri)
    final = parent.absolute().parent / name
    if final.exists():
        _must_be(final, (kind, os.path.relpath(parent, final), stage, overrides))
        return RunDir(final)
    digests = {n: RunDir(parent).load(n).digest for n in shared}
    wanted = Fork(
        kind=kind,
        parent=os.path.relpath(parent, final),
        stage=stage,
        overrides=overrides,
        shared=digests,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    making = final.with_name(f".forking-{name}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    for artifact in digests:
        share(Artifact.load(parent / artifact), making / artifact)
    _copy_metrics(parent, making, set(digests))
    atomic_write(making / PARAMS, canonical_json(params.resolved()) + b"\n")
    write_fork(making, wanted)
    os.replace(making, final)
    fsync_path(final.parent)
    return RunDir(final)


def share(artifact: Artifact, to: Path) -> None:
    """Make `to` the same artifact: the same bytes under a second name.

    Where the disk cannot do that, they are copied.
    """
    artifact.verify(read_bytes=False)
    pruned = artifact.pruned()
    for name in [*sorted(set(artifact.files) - pruned), MANIFEST, *([PRUNED] if pruned else [])]:
        target = to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(artifact.path / name, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            logger.warning("%s: this file system has no hard links, so %s is copied", to, name)
            shutil.copy2(artifact.path / name, target)
    fsync_path(to)


def _must_be(final: Path, wanted: tuple[str, str, str | None, list[str]]) -> None:
    there = read_fork(final)
    if there is None or (there.kind, there.parent, there.stage, there.overrides) != wanted:
        found = "a run" if there is None else f"another fork ({there.described()})"
        raise ArtifactError(
            f"{final} must be free, or be this very fork. It is {found}. A run is never"
            " overwritten: give the fork another name."
        )


def _copy_metrics(parent: Path, fork_folder: Path, shared: set[str]) -> None:
    """The shared artifacts' points, so that the fork's curves begin where its parent's do."""
    path = parent / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    # A key of several rows of one artifact goes on after its name, as in round-0003/update/time.
    names = ["/".join(json.loads(line)["stage"].split("/")[:2]) for line in whole]
    kept = [line for line, name in zip(whole, names, strict=True) if name in shared]
    atomic_write(fork_folder / METRICS_FILE, b"".join(kept))
