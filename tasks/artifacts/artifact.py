"""One artifact: a folder of files whose `artifact.json` says what made them, byte by byte."""

import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from calligrapher.durable import atomic_write, is_temporary
from calligrapher.errors import ArtifactError
from calligrapher.threads import machine
from tasks.artifacts.digests import canonical_json, code_version, file_sha256
from tasks.artifacts.layout import INNER, MANIFEST, PARTIAL, PARTIAL_SUFFIX, PRUNED
from tasks.artifacts.provenance import Provenance

SCHEMA = 1


class FileEntry(BaseModel):
    """What the manifest knows of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str
    bytes: int


class Manifest(BaseModel):
    """The contents of `artifact.json`; no hash covers `meta`, `created`, `seconds` and `code`.

    ```
    {"schema_version": 1, "stage": "score", "stage_version": 1, "fingerprint": "9c1e...",
     "digest": "77ab...", "params": {"reward": {...}}, "inputs": {"rollout": "3fa1..."},
     "extra": {"scored_by": {...}}, "files": {"scores-0000.parquet": {"sha256": ..., "bytes": ...}},
     "meta": {"reward_mean": 0.71}, "created": "2026-11-26T16:00:00+00:00", "seconds": 3.1,
     "code": {"python": "3.11.7", "torch": "2.13.0", "threads": "2", "cpu": "AMD EPYC, AVX512"}}
    ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int
    stage: str
    stage_version: int
    fingerprint: str
    digest: str
    params: dict[str, Any]
    inputs: dict[str, str]
    extra: dict[str, Any]
    files: dict[str, FileEntry]
    meta: dict[str, Any]
    created: str
    seconds: float
    code: dict[str, str]

    @property
    def provenance(self) -> Provenance:
        """All that the fingerprint covers."""
        return Provenance(self.stage, self.stage_version, self.params, self.inputs, self.extra)


def files_digest(stage: str, files: Mapping[str, FileEntry]) -> str:
    """Return the digest of a result: its stage, and its files' names and bytes."""
    hashes = {name: entry.sha256 for name, entry in files.items()}
    return hashlib.sha256(
        canonical_json({"schema": SCHEMA, "stage": stage, "files": hashes})
    ).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder is there, so it is complete.

    `files`: name -> FileEntry. `meta`: what the stage wants people to see (counts, means); no later
    stage may compute from it, because no hash covers it. `digest`: the address of the bytes, for
    the next stage's inputs.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path) -> "Artifact":
        """Read the manifest in `path`. Raises ArtifactError unless it agrees with itself."""
        path = Path(path)
        if path.name.endswith(PARTIAL_SUFFIX):
            raise ArtifactError(
                f"{path} must be a finished artifact. It is the work folder of an unfinished one."
            )
        return cls(path, _read_manifest(path))

    @property
    def stage(self) -> str:
        return self.manifest.stage

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def provenance(self) -> Provenance:
        return self.manifest.provenance

    @property
    def params(self) -> dict[str, Any]:
        return self.manifest.params

    @property
    def inputs(self) -> dict[str, str]:
        return self.manifest.inputs

    @property
    def files(self) -> dict[str, FileEntry]:
        return self.manifest.files

    @property
    def meta(self) -> dict[str, Any]:
        return self.manifest.meta

    def file(self, name: str) -> Path:
        """Return the path of the file `name`. Raises ArtifactError when it is pruned or missing."""
        if name not in self.files:
            raise ArtifactError(
                f"{self.path} must hold {name!r}. It has {', '.join(sorted(self.files))}."
            )
        if name in self.pruned():
            raise ArtifactError(
                f"{self.path / name} was deleted by retention (see {PRUNED} beside it). Run stage"
                f" {self.stage!r} again in a new run, or raise `retention.keep_last` before the"
                " next one."
            )
        if not (self.path / name).is_file():
            raise ArtifactError(
                f"{self.path / name} is missing: the artifact is damaged. {self._mend()}"
            )
        return self.path / name

    def pruned(self) -> frozenset[str]:
        """The names of the files that retention deleted."""
        listing = self.path / PRUNED
        return (
            frozenset(json.loads(listing.read_text())["files"])
            if listing.is_file()
            else frozenset()
        )

    def verify(self, *, read_bytes: bool = True) -> None:
        """Raise an ArtifactError naming every damaged file.

        `read_bytes=False` compares only the sizes.
        """
        if problems := self.damage(read_bytes=read_bytes):
            listing = "".join(f"\n  {problem}" for problem in problems)
            raise ArtifactError(f"{self.path} is damaged:{listing}\n{self._mend()}")

    def damage(self, *, read_bytes: bool = True) -> list[str]:
        """Return a line for every file that is not as it was written.

        What retention deleted is no damage.
        """
        pruned, problems = self.pruned(), []
        for name, entry in sorted(self.files.items()):
            path = self.path / name
            if name in pruned:
                continue
            if not path.is_file():
                problems.append(f"{name}: missing")
            elif (size := path.stat().st_size) != entry.bytes:
                problems.append(f"{name}: {entry.bytes} bytes were written, {size} are there")
            elif read_bytes and file_sha256(path) != entry.sha256:
                problems.append(f"{name}: other bytes than were written")
        return problems

    def _mend(self) -> str:
        return (
            f"Delete the folder {self.path} and start the same command again: the stage is run"
            " anew."
        )


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} must be an artifact. It holds no {MANIFEST}.")
    try:
        raw = json.loads(path.read_bytes())
        if isinstance(raw, dict) and raw.get("schema_version") != SCHEMA:
            raise ArtifactError(
                f"{path} must have schema_version {SCHEMA}. Got {raw.get('schema_version')!r}."
            )
        manifest = Manifest.model_validate(raw)
    except (ValueError, ValidationError) as error:
        raise ArtifactError(
            f"{path} must be a whole manifest. It cannot be read: {error}"
        ) from error
    if manifest.fingerprint != manifest.provenance.fingerprint:
        raise ArtifactError(
            f"{path} was changed by hand: its params and inputs do not give its fingerprint."
        )
    if manifest.digest != files_digest(manifest.stage, manifest.files):
        raise ArtifactError(
            f"{path} was changed by hand: its list of files does not give its digest."
        )
    return manifest


def payload_files(folder: Path) -> Iterator[Path]:
    """Yield what a work folder holds for the artifact: no manifest, inner checkpoint, leftover."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).parts[0] == INNER
        bookkeeping = path.parent == folder and path.name in {MANIFEST, PARTIAL}
        if path.is_file() and not inner and not bookkeeping and not is_temporary(path):
            assert not path.is_symlink(), f"{path} must hold its own bytes"
            yield path


def write_manifest(
    folder: Path, provenance: Provenance, *, meta: Mapping[str, Any], seconds: float
) -> Manifest:
    """Hash every file of `folder`, which must be on disk already, and write its manifest."""
    files = {
        path.relative_to(folder).as_posix(): FileEntry(
            sha256=file_sha256(path), bytes=path.stat().st_size
        )
        for path in payload_files(folder)
    }
    manifest = Manifest(
        schema_version=SCHEMA,
        **provenance.as_dict(),
        fingerprint=provenance.fingerprint,
        digest=files_digest(provenance.stage, files),
        files=files,
        meta=dict(meta),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        code=code_version() | machine(),
    )
    try:
        text = json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{folder}: what stage {provenance.stage!r} returns must be plain JSON: {error}"
        ) from error
    atomic_write(folder / MANIFEST, text.encode())
    return manifest


def prune(artifact: Artifact, files: list[str]) -> int:
    """Delete payload `files` of `artifact` for good; return the bytes freed.

    The manifest stays, so that the fingerprints of everything made from it still resolve;
    `pruned.json` says what is gone, and is written first: a crash in between leaves files that the
    next call deletes.
    """
    unknown = sorted(set(files) - set(artifact.files))
    if unknown:
        raise ArtifactError(
            f"{artifact.path} must hold the files to prune. It has no {', '.join(unknown)}."
        )
    names = sorted(artifact.pruned() | set(files))
    atomic_write(artifact.path / PRUNED, json.dumps({"files": names}, indent=1).encode())
    freed = 0
    for name in names:
        path = artifact.path / name
        if path.is_file():
            freed += path.stat().st_size
            path.unlink()
    return freed
