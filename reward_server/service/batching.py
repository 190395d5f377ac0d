"""Dynamic batching: items of many requests in, batches for one scorer out, on its own threads."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from reward_server.scorers.base import Item, Outcome, Scorer, failed, is_remote, pairs_items
from reward_server.scorers.safely import probe, score_safely

_SUSPECT = {"exception", "no_number"}  # kinds of errors that a broken scorer makes
_CLOSE_S = 2.0  # how long the batches in hand may take once the server stops
_COMPANY_S = 0.005  # how long an item that would cost as much as two waits for one that is coming


@dataclass
class _Waiting:
    item: Item
    future: Future
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Feeds one scorer from a queue with `scorer.parallel` threads.

    A thread takes a batch when `max_batch` items wait or the oldest has waited `max_wait_s`.
    Waiting items are shared out evenly between the threads. Where one item costs as much as two
    (`pairs_items`), none is taken alone while another waits or is coming: `under_way` says how many
    were admitted and are not answered yet. The queue's length is bounded by whoever admits requests
    (`admission`). `on_batch(scorer, items, seconds, outcomes)` is called after each batch;
    `on_broken(scorer, reason)` when an item failed for no reason of its own: the probe picture
    fails too.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        under_way: Callable[[], int] = lambda: 0,
        on_batch: Callable[[str, int, float, list[Outcome]], None] = lambda *_: None,
        on_broken: Callable[[str, str], None] = lambda *_: None,
    ):
        self.scorer = scorer
        self._least = 2 if pairs_items(scorer) else 1  # items that a thread takes if it can
        self._under_way, self._in_hand = under_way, 0
        self._on_batch, self._on_broken = on_batch, on_broken
        self._taken_at: dict[int, float] = {}  # thread -> since when it works on a batch
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

    def seconds_in_hand(self) -> float:
        """How long the oldest batch that is being scored has been."""
        now = time.monotonic()
        # A copy: the working threads write to it meanwhile.
        return max((now - taken_at for taken_at in self._taken_at.copy().values()), default=0.0)

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
        # Outside of the lock: a result wakes who waits for it, and that may ask for the lock.
        for waiting in left:
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_result(
                    failed(self.scorer.fields, "the server is stopping", "unavailable")
                )
        stop_at = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.join(timeout=max(0.0, stop_at - time.monotonic()))
        self.scorer.close()

    def _work(self) -> None:
        while batch := self._take():
            # Whoever gave up has cancelled the future: nobody would read the score.
            wanted = [one for one in batch if one.future.set_running_or_notify_cancel()]
            if wanted:
                outcomes = self._score([waiting.item for waiting in wanted])
                for waiting, outcome in zip(wanted, outcomes, strict=True):
                    waiting.future.set_result(outcome)
            with self._wake:
                self._in_hand -= len(batch)

    def _score(self, items: list[Item]) -> list[Outcome]:
        me, started = threading.get_ident(), time.monotonic()
        self._taken_at[me] = started
        outcomes = score_safely(self.scorer, items)
        # An item may fail by its own fault; if the probe picture fails too, the scorer is broken.
        # A remote one is not: what fails there is mended there, and no restart here would help.
        if not is_remote(self.scorer) and any(_SUSPECT & one.all_kinds for one in outcomes):
            shown = probe(self.scorer)
            if _SUSPECT & shown.all_kinds:
                self._on_broken(self.scorer.name, next(iter(shown.errors.values())))
        del self._taken_at[me]
        self._on_batch(self.scorer.name, len(items), time.monotonic() - started, outcomes)
        return outcomes

    def _take(self) -> list[_Waiting]:
        """The next batch; empty when closed."""
        with self._wake:
            while True:
                while not self._waiting and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return []
                # A batch waits for company, but never longer than its oldest item may.
                few = len(self._waiting) < self._least
                coming = self._under_way() > len(self._waiting) + self._in_hand
                patience = self.scorer.max_wait_s
                if few and coming:
                    patience = max(patience, _COMPANY_S)
                patience -= time.monotonic() - self._waiting[0].since
                if len(self._waiting) >= self.scorer.max_batch or patience <= 0:
                    break
                self._wake.wait(timeout=patience)
            # Rounded up, so that none is left over; a thread that took all would leave others idle.
            share = max(-(-len(self._waiting) // self.scorer.parallel), self._least)
            share = min(share, self.scorer.max_batch, len(self._waiting))
            self._in_hand += share
            return [self._waiting.popleft() for _ in range(share)]
