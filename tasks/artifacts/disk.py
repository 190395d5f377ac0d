"""A full disk, in words: which libraries say it how, and what the user can do."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calligrapher.errors import ArtifactError


def is_disk_full(error: BaseException | None, folder: Path) -> bool:
    """Return whether `error`, or what it came from, is a full disk.

    Libraries report it in words of their own.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        if "no space left" in str(error).lower():  # safetensors
            return True
        if (
            isinstance(error, RuntimeError)
            and "failed writing" in str(error)
            and _free_bytes(folder) < 1 << 20
        ):
            return True  # torch.save
        error = error.__cause__ or error.__context__
    return False


def disk_full(name: str, partial: Path, error: BaseException) -> ArtifactError:
    """Return the error for a person whose disk was full.

    The artifact `name` was being made in `partial`.
    """
    file = getattr(error, "filename", None) or partial
    return ArtifactError(
        f"the disk must have room for {name!r}. It is full: {_free_bytes(partial)} bytes are free"
        f" where {file} was being written ({error}). Nothing half-written was kept as an artifact."
        " Free some space and start the same command again: it goes on from the last whole file."
    )


@contextmanager
def room_for(what: str, folder: Path) -> Iterator[None]:
    """Run a block that writes `what` into `folder`.

    A full disk becomes an ArtifactError that says so.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error, folder):
            raise
        raise ArtifactError(
            f"the disk must have room for {what}. It is full: {_free_bytes(folder)} bytes are free "
            f"in {folder}. Nothing half-written was kept."
        ) from error


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
