"""How much one server takes in at a time: items and pixels, each with a bound."""

import threading


class OverloadedError(RuntimeError):
    """No room for this request now; `retry_after` seconds later there may be."""

    def __init__(self, reason: str, retry_after: int = 1):
        super().__init__(reason)
        self.retry_after = retry_after


class Admission:
    """Bounds the items and the pixels that are in the house at one time."""

    def __init__(self, max_items: int, max_pixels: int):
        self.max_items, self.max_pixels = max_items, max_pixels
        self.items = self.pixels = 0
        self._lock = threading.Lock()

    def enter(self, *, items: int = 0, pixels: int = 0) -> None:
        """Take room or raise OverloadedError. An empty house admits any single request."""
        with self._lock:
            if items and self.items and self.items + items > self.max_items:
                raise OverloadedError(
                    f"{self.items} items are in the queue, {self.max_items} may be"
                )
            if pixels and self.pixels and self.pixels + pixels > self.max_pixels:
                raise OverloadedError(
                    f"{self.pixels} pixels are in the queue, {self.max_pixels} may be"
                )
            self.items += items
            self.pixels += pixels

    def leave(self, *, items: int = 0, pixels: int = 0) -> None:
        """Give room back."""
        with self._lock:
            self.items -= items
            self.pixels -= pixels
