"""How much one server takes in at a time: items of each queue and pixels, each with a bound."""

import threading
from collections import Counter
from collections.abc import Mapping


class OverloadedError(RuntimeError):
    """No room for this request now; `retry_after` seconds later there may be."""

    def __init__(self, reason: str, retry_after: int = 1):
        super().__init__(reason)
        self.retry_after = retry_after


_NONE: Mapping[str, int] = {}


class Admission:
    """Bounds the items of each queue, and the pixels that are in the house at one time.

    Each scorer has a queue: where a slow one is full, items that do not ask for it still get in.
    """

    def __init__(self, max_items: int, max_pixels: int):
        self.max_items, self.max_pixels = max_items, max_pixels
        self.pixels = 0
        self._queued: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def items(self) -> int:
        """How many are in the longest queue."""
        return max(self._queued.values(), default=0)

    def queued(self, name: str) -> int:
        """How many were admitted to a queue and are not answered yet."""
        return self._queued[name]

    def enter(self, places: Mapping[str, int] = _NONE, *, pixels: int = 0) -> None:
        """Take room or raise OverloadedError. An empty house admits any single request.

        places: how many are needed in each queue.
        """
        with self._lock:
            for name, items in places.items():
                if self._queued[name] and self._queued[name] + items > self.max_items:
                    raise OverloadedError(
                        f"{self._queued[name]} items are in the queue of {name}, {self.max_items}"
                        " may be"
                    )
            if pixels and self.pixels and self.pixels + pixels > self.max_pixels:
                raise OverloadedError(
                    f"{self.pixels} pixels are in the queue, {self.max_pixels} may be"
                )
            self._queued.update(places)
            self.pixels += pixels

    def leave(self, places: Mapping[str, int] = _NONE, *, pixels: int = 0) -> None:
        """Give room back."""
        with self._lock:
            self._queued.subtract(places)
            self.pixels -= pixels
