"""Exceptions of a rank as data: what it says of them, and what its parent raises.

An error that the project raises on purpose, or that the system told with a file's name, is raised
in the parent as it was in the rank, so that a run of several processes ends as one of a single
process does. All others become a RankError.
"""

import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calligrapher import errors
from calligrapher.errors import CalligrapherError, RankError

TAIL_LINES = 15


def describe(error: BaseException) -> dict[str, Any]:
    """Return `error` as plain JSON.

    `lost` says that it is only what a collective makes of another rank's end.
    """
    return {
        "type": type(error).__name__,
        "message": str(error),
        "lost": _is_of_a_collective(error),
        "system": [error.errno, error.strerror, error.filename]
        if isinstance(error, OSError) and error.errno is not None
        else None,
        "traceback": "".join(traceback.format_exception(error)),
    }


def restored(told: dict[str, Any], where: str) -> Exception:
    """Return the exception that `describe` told of; `where` is added as a note.

    where: rank, host, stage and log, as a sentence.
    """
    error: Exception
    kind = getattr(errors, told["type"], None)
    if isinstance(kind, type) and issubclass(kind, CalligrapherError):
        error = kind(told["message"])
    elif told["system"] is not None:
        number, text, filename = told["system"]
        error = OSError(number, text, filename)
    else:
        return RankError(f"{told['type']}: {told['message']}\n{where}\n{told['traceback'].strip()}")
    error.add_note(where)
    return error


def log_of(logs: Path, rank: int) -> Path:
    """Return the file that a rank's process appends to."""
    return logs / f"rank-{rank}.log"


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """Return where the log is and how it ends."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            last = file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError as error:
        last = [f"({error.strerror})"]
    return "\n".join([f"--- end of {log}:", *last])


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether torch.distributed itself raised `error`, and not for want of memory."""
    if not isinstance(error, RuntimeError) or type(error).__name__ == "OutOfMemoryError":
        return False
    return any(_is_distributed(one) for one in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_distributed(error: BaseException) -> bool:
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and f"torch{os.sep}distributed{os.sep}" in frames[-1].filename
