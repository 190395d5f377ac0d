"""A bounded memory of what was made before: the least recently used goes first."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class LRU:
    """Values by key, of `capacity` together; `size_of` says how much one takes."""

    def __init__(self, capacity: int, size_of: Callable[[Any], int] = lambda _: 1):
        self.capacity, self.size = capacity, 0
        self._size_of = size_of
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Any | None:
        """The value, which counts as just used; None when it is not (any more) there."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value; what is larger than all the room is not kept."""
        size = self._size_of(value)
        if size > self.capacity:
            return
        with self._lock:
            if key in self._values:
                self.size -= self._size_of(self._values.pop(key))
            self._values[key] = value
            self.size += size
            while self.size > self.capacity:
                _, oldest = self._values.popitem(last=False)
                self.size -= self._size_of(oldest)
