"""Dynamic batching: single items from many requests in, batches for one scorer out, on its own threads."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from reward_server.scorer import Item, Outcome, Scorer, ScorerUnavailableError, failed

log = logging.getLogger(__name__)


@dataclass
class _Waiting:
    item: Item
    future: Future
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Feeds one scorer from a queue with `scorer.parallel` threads.

    A thread takes a batch when `max_batch` items wait or the oldest has waited `max_wait_s`. Waiting items
    are shared out evenly between the threads. The queue's length is bounded by whoever admits requests
    (`service.Admission`).
    """

    def __init__(
        self, scorer: Scorer, on_batch: Callable[[str, int, float, list[Outcome]], None] | None = None
    ):
        self.scorer = scorer
        self._on_batch = on_batch or (lambda *args: None)
        self._waiting: deque[_Waiting] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{scorer.name}-{number}", daemon=True)
            for number in range(scorer.parallel)
        ]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, item: Item) -> "Future[Outcome]":
        """Queue one item; the future gives its outcome and never an exception of the scorer."""
        waiting = _Waiting(item, Future())
        with self._wake:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._waiting.append(waiting)
            self._wake.notify()
        return waiting.future

    def close(self) -> None:
        """Finish the batches in hand, fail what still waits, end the threads, close the scorer."""
        with self._wake:
            self._closed = True
            left, self._waiting = list(self._waiting), deque()
            self._wake.notify_all()
        for waiting in left:
            waiting.future.set_result(failed(self.scorer.fields, "the server is stopping"))
        for thread in self._threads:
            thread.join(timeout=10)
        self.scorer.close()

    def _work(self) -> None:
        while batch := self._take():
            batch = [waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()]
            if not batch:
                continue
            started = time.monotonic()
            outcomes = score_safely(self.scorer, [waiting.item for waiting in batch])
            self._on_batch(self.scorer.name, len(batch), time.monotonic() - started, outcomes)
            for waiting, outcome in zip(batch, outcomes, strict=True):
                waiting.future.set_result(outcome)

    def _take(self) -> list[_Waiting]:
        """The next batch; empty when closed."""
        with self._wake:
            while True:
                while not self._waiting and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return []
                patience = self._waiting[0].since + self.scorer.max_wait_s - time.monotonic()
                if len(self._waiting) >= self.scorer.max_batch or patience <= 0:
                    break
                self._wake.wait(timeout=patience)
            share = -(-len(self._waiting) // self.scorer.parallel)
            return [self._waiting.popleft() for _ in range(min(share, self.scorer.max_batch))]


def score_safely(scorer: Scorer, items: list[Item]) -> list[Outcome]:
    """Outcomes of a batch; when it raises, each item is tried alone, so one bad item fails only itself."""
    try:
        outcomes = scorer.score_items(items)
        assert len(outcomes) == len(items), (
            f"{scorer.name} gave {len(outcomes)} outcomes for {len(items)} items"
        )
        return outcomes
    except ScorerUnavailableError as error:
        return [failed(scorer.fields, f"{scorer.name} is unavailable: {error}")] * len(items)
    except Exception as error:
        if len(items) > 1:
            return [score_safely(scorer, [item])[0] for item in items]
        log.exception("%s failed on an item", scorer.name)
        return [failed(scorer.fields, f"{type(error).__name__}: {error}")]
