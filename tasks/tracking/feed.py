"""A thread that shows a run's journals in one tracker, while nobody waits for it."""

import threading
import time
from pathlib import Path

from tasks.tracking.journal import Journal
from tasks.tracking.mirror import Failed, Mirror

_GIVE_UP_AFTER = 3  # failures in a row: each may have cost a time-out
_GATHER_S = 2.0  # what comes within this time is sent together: a call costs MLflow 50 ms


class Feed:
    """Shows new lines whenever woken.

    After several failures in a row it tries only once more, at the end.
    """

    def __init__(
        self,
        backend: type[Mirror],
        run_dir: Path,
        journals: tuple[Journal, Journal],
        failed: Failed,
    ) -> None:
        self.title = backend.title
        self._backend, self._given, self._failed = backend, (run_dir, journals, failed), failed
        self._wake, self._closing = threading.Event(), threading.Event()
        self._wake.set()
        self._status = "FINISHED"
        self._thread = threading.Thread(
            target=self._work, name=f"tracking {self.title}", daemon=True
        )
        self._thread.start()

    def wake(self) -> None:
        """Say that there are new lines."""
        self._wake.set()

    def finish(self, status: str) -> None:
        """Say that there will be no more; the tracker is told how the run ended."""
        self._status = status
        self._closing.set()
        self._wake.set()

    def ended_by(self, deadline: float) -> bool:
        """Wait until `time.monotonic()` is `deadline`; return whether all has been shown."""
        self._thread.join(max(deadline - time.monotonic(), 0))
        return not self._thread.is_alive()

    def _work(self) -> None:
        mirror: Mirror | None = None
        in_a_row = 0
        while True:
            self._wake.wait()
            self._closing.wait(_GATHER_S)
            self._wake.clear()
            closing = self._closing.is_set()
            if in_a_row < _GIVE_UP_AFTER or closing:
                try:
                    # This imports the tracker's package, which may take seconds.
                    mirror = mirror or self._backend(*self._given)
                    mirror.catch_up()
                    if closing:
                        mirror.end(self._status)
                    in_a_row = 0
                except Exception as error:
                    in_a_row += 1
                    self._failed(f"showing the run in {self.title}", error)
            if closing:
                return
