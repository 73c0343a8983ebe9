"""A bounded memo that is read without a lock.

Two generations of a plain dictionary: new results go into the young one; when that is full it becomes the
old one and what the old one held is forgotten. A result that is still asked for is carried over, so what
is used stays and the cost of a look-up is one ``dict.get``, atomic under the interpreter's lock.
"""

from __future__ import annotations

from typing import Generic, TypeVar

__all__ = ["Memo"]

K = TypeVar("K")
V = TypeVar("V")


class Memo(Generic[K, V]):
    """At most ``2 * max_entries`` results and ``2 * max_weight`` of weight (bytes, for instance)."""

    __slots__ = ("_max_entries", "_max_weight", "_old", "_weight", "_young")

    def __init__(self, max_entries: int, max_weight: int) -> None:
        self._max_entries = max_entries
        self._max_weight = max_weight
        self._young: dict[K, V] = {}
        self._old: dict[K, V] = {}
        self._weight = 0

    def get(self, key: K, weight: int = 0) -> V | None:
        value = self._young.get(key)
        if value is None:
            value = self._old.get(key)
            if value is not None:
                self.put(key, value, weight)
        return value

    def put(self, key: K, value: V, weight: int = 0) -> None:
        # Two threads may rotate at once: then a generation is forgotten early, which a memo may do.
        if len(self._young) >= self._max_entries or self._weight + weight > self._max_weight:
            self._old, self._young, self._weight = self._young, {}, 0
        if weight <= self._max_weight:
            self._young[key] = value
            self._weight += weight
