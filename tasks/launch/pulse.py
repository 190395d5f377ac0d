"""Whether the thread that does a rank's work gets anywhere.

A process that stands still sends nothing, and is missed. One that is alive may hang all the same:
its thread waits for a lock, or for a disk that does not answer, and soon the other ranks wait in a
sum. Then none of them computes.
"""

import sys
import threading
import time
from types import FrameType

_OURS = {"calligrapher", "tasks", "reward_server"}


class Pulse:
    """The pulse of the thread that makes it; any other may feel it."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        clock_of = getattr(time, "pthread_getcpuclockid", None)  # macOS has none
        self._clock = clock_of(self._thread) if clock_of else None
        self._seconds = 0.0

    def has_moved(self) -> bool:
        """Whether the thread has computed anything since it was last asked.

        One that waits for other ranks over gloo takes no time of a processor; one that waits for
        its GPU does. Always true where a thread's time cannot be asked for.
        """
        if self._clock is None:
            return True
        before, self._seconds = self._seconds, time.clock_gettime(self._clock)
        return self._seconds != before

    def place(self) -> str:
        """Return where the thread is: the innermost function of the project, and the line."""
        frame: FrameType | None = sys._current_frames().get(self._thread)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.partition(".")[0] in _OURS:
                return f"{module}.{frame.f_code.co_qualname}, line {frame.f_lineno}"
            frame = frame.f_back
        return "an unknown place"
