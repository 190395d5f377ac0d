"""One process per run: the lock that a second one is refused by."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from calligrapher.errors import RunLockedError

LOCK_FILE = ".lock"

_held: set[int] = set()


def _close_in_child() -> None:
    # A forked worker shares the lock's file description: an orphan would go on holding the run.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run in `folder` for this process; the kernel lets go of it however the process ends.

    Raises RunLockedError at once, with the holder's pid, host and start, when another process (or
    another block of this one) holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise RunLockedError(
            f"the run {folder} must be free. {holder} works on it. "
            "Wait until it has ended, end it, or give this run another name."
        ) from None
    _held.add(descriptor)
    try:
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        _write(descriptor, {"pid": os.getpid(), "host": socket.gethostname(), "since": started})
        yield
    finally:
        if descriptor in _held:  # not in a forked child, which has closed it
            _held.discard(descriptor)
            _write(descriptor, {})
            os.close(descriptor)


def lock_holder(folder: Path) -> str | None:
    """Who works on the run in `folder` just now, in words; None when nobody does."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(descriptor)
    finally:
        os.close(descriptor)
    return None


def _write(descriptor: int, holder: dict[str, object]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"Process {holder['pid']} on {holder['host']} (since {holder['since']})"
    except (ValueError, KeyError):  # it has the lock, but has not yet written who it is
        return "Another process"
