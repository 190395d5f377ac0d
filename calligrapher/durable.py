"""Writing files so that a crash leaves the old file or the whole new one, never a half.

Order: write to a hidden sibling, fsync it, rename it over the target, fsync the folder. A power cut
after the rename therefore finds the new name *and* its bytes on disk.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_MARK = ".writing-"


def fsync_path(path: Path) -> None:
    """Flush one file's bytes, or one folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling file to write to; it becomes `path` when the block ends.

    After an exception the temporary file is removed and an older `path` is untouched. The suffix is
    kept, for writers that look at it. Raises OSError as the file system does (ENOSPC when the disk
    is full).
    """
    path = Path(path)
    temporary = _sibling(path)
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename) == str(temporary):
            error.filename, error.filename2 = str(path), None  # the name that the user knows
        raise
    fsync_path(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling folder to write to; it becomes `path` when the block ends.

    For caches that several processes may make at once, each of them alike: the first one's folder
    stays, and nobody ever sees half of one. The files are not flushed, since they can be made
    again. Raises OSError as the file system does.
    """
    path = Path(path)
    temporary = _sibling(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():  # Otherwise another process was first.
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sibling(path: Path) -> Path:
    """Return a name beside `path` that no other process takes, on this host or on another."""
    return path.with_name(f"{_MARK}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`: after any crash `path` is the old file or the whole new one."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def is_temporary(path: Path) -> bool:
    """Whether `path` is a leftover of an `atomic_path` that was killed."""
    return path.name.startswith(_MARK)


def save_tensors(
    tensors: Mapping[str, "Tensor"], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to the safetensors file `path`, with the mode that the user's umask gives.

    safetensors itself makes a file that its owner alone may read.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)
