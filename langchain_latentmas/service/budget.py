"""A mapping that forgets what was used least recently, once it holds too much."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Budget(Generic[Value]):
    """Holds values up to a total size, least recently used out first. Safe to share between threads.

    Attributes:
        limit: Largest total size.
        used: Total size now.
        evictions: Values forgotten so far.
    """

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        """Starts empty.

        Args:
            limit: Largest total size.
            size: Size of a value, in the unit of `limit`.
        """
        self.limit, self.used, self.evictions = limit, 0, 0
        self._size = size
        self._values: OrderedDict[str, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Value | None:
        """The value, now the most recently used one; None if it is not there."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: str, value: Value) -> list[tuple[str, Value]]:
        """Adds a value and forgets others, or the value itself if it is larger than the limit.

        Returns:
            What was forgotten for it, the least recently used first.
        """
        with self._lock:
            if key in self._values:
                self.used -= self._size(self._values.pop(key))
            if self._size(value) > self.limit:  # it would push out all others, and then go as well
                self.evictions += 1
                return [(key, value)]
            self._values[key] = value
            self.used += self._size(value)
            return self._shrink(self.limit)

    def halve(self) -> list[tuple[str, Value]]:
        """Forgets the half that was used least recently, and returns it."""
        with self._lock:
            return self._shrink(self.used // 2)

    def pop(self, key: str) -> Value | None:
        """Takes a value out, which is no eviction; None if it is not there."""
        with self._lock:
            value = self._values.pop(key, None)
            if value is not None:
                self.used -= self._size(value)
            return value

    def clear(self) -> None:
        """Forgets everything; not counted as evictions."""
        with self._lock:
            self._values.clear()
            self.used = 0

    def _shrink(self, size: int) -> list[tuple[str, Value]]:
        """Forgets what was used least recently until no more than `size` is left. Whoever calls holds the lock."""
        forgotten = []
        while self.used > size:
            forgotten.append(self._values.popitem(last=False))
            self.used -= self._size(forgotten[-1][1])
        self.evictions += len(forgotten)
        return forgotten

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values
