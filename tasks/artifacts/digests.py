"""Hashes of what a stage reads and of what it wrote; and which code wrote it."""

import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calligrapher.data.lists import is_bench_file
from calligrapher.errors import ArtifactError
from calligrapher.files import files_below

_WHOLE_BYTES = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 20


def canonical_json(value: Any) -> bytes:
    """The one spelling of `value` that is hashed. Raises ValueError for NaN and infinities."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode(errors="surrogateescape")  # File names may be bytes that are no UTF-8.


def path_digest(path: str | Path) -> str:
    """Return the digest of an input that is not an artifact: a weights file or a folder of them.

    Folders behind links count as if they lay there. Names and bytes count, places and times do not.
    Of files above 64 MiB, 64 evenly spread blocks of 1 MiB and the size are read: a fingerprint of
    weights in a second, not a proof of each byte.
    """
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"{path} must be there to be used as an input. It is missing.")
    files = [path] if path.is_file() else files_below(path)
    names = {p.relative_to(path).as_posix() if p != path else "": _quick_sha256(p) for p in files}
    return contents_digest(names)


def bench_contents(folder: Path) -> dict[str, str]:
    """Return name -> sha256 of the files that make up a bench folder; no other file counts.

    The digest of these is the `path_digest` of a folder that holds nothing else.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} must be a bench folder. It is missing.")
    files = sorted(path for path in folder.iterdir() if is_bench_file(path.name))
    return {path.name: _quick_sha256(path) for path in files if path.is_file()}


def contents_digest(contents: Mapping[str, str]) -> str:
    """Return the digest of names and their hashes, in any order."""
    return hashlib.sha256(canonical_json(contents)).hexdigest()


def cases_digest(contents: Mapping[str, str]) -> str:
    """Return the digest of cases, given as case_id -> digest, in their order.

    Where and how they were listed does not count.
    """
    return hashlib.sha256(canonical_json([list(pair) for pair in contents.items()])).hexdigest()


def _quick_sha256(path: Path) -> str:
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        return file_sha256(path)
    hasher = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            hasher.update(file.read(_SAMPLE_BYTES))
    return hasher.hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def code_version() -> dict[str, str]:
    """Which code is running: recorded in each manifest, hashed in none."""
    found = {"python": platform.python_version()}
    for package in ("calligrapher", "torch", "diffusers", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    head = Path(__file__).resolve().parents[2] / ".git" / "HEAD"
    if head.is_file():
        name = head.read_text().strip().removeprefix("ref: ")
        ref = head.parent / name
        found["commit"] = ref.read_text().strip() if ref.is_file() else name
    return found
