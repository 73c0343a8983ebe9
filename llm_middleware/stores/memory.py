"""The memory tier: an S3-FIFO cache with a time to live per entry and a byte budget.

S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023) keeps new entries in
a small queue, a tenth of the store. Who leaves it without having been read is gone: one pass over cold
keys never reaches the main queue. Who was read moves on to the main queue, and there each read, up to
three, buys another round. A key that comes back soon after it was dropped (its hash is still among the
ghosts) starts in the main queue.

A read takes no lock and writes nothing but a counter of two bits. Three rules make that safe:

* a node is complete before it enters the table, and its value and expiry never change afterwards;
* replacing a value puts a new node in the old one's place, so a reader sees the old pair or the new one;
* everything but `MemoryStore.get` and a node's counter is touched under the lock only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Final, Generic, TypeVar

from ..errors import ConfigError
from ..types import Clock, SizeOf

__all__ = ["MemoryStore"]

V = TypeVar("V")

_NEVER: Final = float("inf")
_MOST_READS: Final = 3
# Nodes a set looks at while something is over, and those looked at for one eviction: both bound the time
# that a set holds the lock.
_SWEPT_PER_SET: Final = 16
_CHANCES: Final = 64
_DIGITS: Final = 65  # a key ends in ":" and 64 hex digits


class _Node(float, Generic[V]):
    """One entry. The node *is* the moment it expires: a float of its own would cost each read a cache line.

    All nodes stand in one ring, cut into the two queues by two marker nodes. A marker never expires,
    its ``size`` is the bytes of the queue behind it.
    """

    __slots__ = ("data", "freq", "key", "next", "prev", "queue", "size")  # CPython lays them out by name

    data: V
    freq: int
    key: str
    next: _Node[V]
    prev: _Node[V]
    queue: _Node[V]
    size: int


class MemoryStore(Generic[V]):
    """Values of this process, gone with it: the tier that is asked first.

    Keeps any object as it is, without copying; ``size_of`` says how many bytes it counts for. Never
    holds more than ``max_bytes`` (and, if given, ``max_entries``): what is least worth keeping goes
    first. A value larger than the whole budget is not kept. ``clock`` gives seconds since the epoch.

    Safe to use from any number of threads. Raises `ConfigError` for a budget below one.
    """

    tier = "memory"
    inline = True

    def __init__(
        self,
        *,
        max_bytes: int = 256 * 2**20,
        max_entries: int | None = None,
        size_of: SizeOf = len,  # type: ignore[assignment]  # of a store that keeps bytes
        clock: Clock = time.time,
    ) -> None:
        if max_bytes < 1:
            raise ConfigError("max_bytes must be at least 1", param="max_bytes")
        if max_entries is not None and max_entries < 1:
            raise ConfigError("max_entries must be at least 1", param="max_entries")
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self._most_entries = max_entries or _NEVER
        self._bytes = 0
        self._size_of = size_of
        self._clock = clock
        self._lock = threading.Lock()
        self._table: dict[str, _Node[V]] = {}
        self._small: _Node[V] = _Node(_NEVER)
        self._main: _Node[V] = _Node(_NEVER)
        for marker, other in ((self._small, self._main), (self._main, self._small)):
            marker.prev = marker.next = other
            marker.size = 0
        self._hand = self._small
        # Nothing is over before ``_due``: the least expiry found on the last lap of the sweeping hand, and
        # of what came in since. ``_lap_due`` gathers the same for the lap under way.
        self._due = self._lap_due = _NEVER
        self._ghosts: set[int] = set()
        self._old_ghosts: set[int] = set()

    def get(self, key: str) -> V | None:
        """The value under ``key``, or None where there is none or its time is over."""
        node = self._table.get(key)
        if node is None or node <= self._clock():
            return None
        if node.freq < _MOST_READS:  # two threads may count one read: it is an estimate
            node.freq += 1
        return node.data

    def set(self, key: str, value: V, ttl: float | None) -> None:
        """Keep ``value`` for ``ttl`` seconds (None: until evicted), replacing what was there.

        A value that cannot be kept, being larger than the store or out of time, still removes the old one.
        """
        size = self._size_of(value)
        now = self._clock()
        expires = _NEVER if ttl is None else now + ttl
        node: _Node[V] = _Node(expires)
        node.data, node.key = value, key
        node.size, node.freq = size, 0
        self._lock.acquire()  # half the time of a with statement
        try:
            if now >= self._due:
                self._sweep(now)
            if expires < self._lap_due:
                self._expect(expires)
            old = self._table.get(key)
            if size > self.max_bytes or expires <= now:
                if old is not None:
                    self._remove(old)
            elif old is None:
                if self._bytes + size > self.max_bytes or len(self._table) >= self._most_entries:
                    self._make_room(size, now, entries=1)
                self._append(node, self._main if self._ghosts and self._is_ghost(key) else self._small)
                self._table[key] = node
            else:
                self._replace(old, node, now)
        finally:
            self._lock.release()

    def delete(self, keys: Sequence[str]) -> int:
        """Remove ``keys``; how many of them were there and alive."""
        with self._lock:
            return self._discard(keys)

    def flush(self, namespace: str) -> int:
        """Remove every key of exactly this namespace; how many were alive. Takes time for each entry held."""
        with self._lock:
            return self._discard([key for key in self._table if key[:-_DIGITS] == namespace])

    def purge_expired(self) -> int:
        """Give back the memory of all entries that are over; how many. They go little by little anyway."""
        now = self._clock()
        with self._lock:
            over = [node for node in self._table.values() if node <= now]
            for node in over:
                self._remove(node)
        return len(over)

    def close(self) -> None:
        """Nothing to release: the entries go with the object."""

    def keys(self) -> list[str]:
        """The keys that are alive now."""
        now = self._clock()
        with self._lock:
            return [key for key, node in self._table.items() if node > now]

    def __len__(self) -> int:
        """Entries held, those included that are over but not yet swept out."""
        return len(self._table)

    @property
    def bytes(self) -> int:
        """Bytes held, as ``size_of`` counts them; never more than ``max_bytes``."""
        return self._bytes

    def _replace(self, old: _Node[V], node: _Node[V], now: float) -> None:
        """Put ``node`` where ``old`` is; if that takes evictions, at the end of the same queue."""
        node.freq = old.freq
        queue, grown = old.queue, node.size - old.size
        if self._bytes + grown > self.max_bytes:
            self._unlink(old)
            self._make_room(node.size, now)
            self._append(node, queue)
        else:
            before, after = old.prev, old.next
            node.prev, node.next, node.queue = before, after, queue
            before.next = after.prev = node
            queue.size += grown
            self._bytes += grown
            if self._hand is old:
                self._hand = node
        self._table[node.key] = node

    def _make_room(self, size: int, now: float, entries: int = 0) -> None:
        """Evict until ``size`` more bytes and ``entries`` more entries fit."""
        while self._bytes + size > self.max_bytes or len(self._table) + entries > self._most_entries:
            self._evict(now)

    def _evict(self, now: float) -> None:
        """Drop one entry: the first in line that is over or has no read to its credit."""
        for _ in range(_CHANCES):
            node = self._next_in_line()
            if node <= now or not node.freq:
                break
            node.freq = node.freq - 1 if node.queue is self._main else 0
            self._unlink(node)
            self._append(node, self._main)
        else:
            node = self._next_in_line()
        if node.queue is self._small and node > now:
            self._remember(node.key)
        self._remove(node)

    def _next_in_line(self) -> _Node[V]:
        """The oldest of the small queue while that holds its tenth, else the oldest of the main queue."""
        oldest = self._small.next
        if oldest is not self._main and self._small.size * 10 >= self._bytes:
            return oldest
        return self._main.next if self._main.next is not self._small else oldest

    def _sweep(self, now: float) -> None:
        """Look at the next nodes of the ring and give back the memory of those that are over."""
        for _ in range(_SWEPT_PER_SET):
            node = self._hand
            self._hand = node.next
            if node <= now:
                self._remove(node)
            elif node < self._lap_due:
                self._lap_due = float(node)
            if node is self._small:  # once round: the lap has seen every node that is still here
                self._due, self._lap_due = self._lap_due, _NEVER

    def _expect(self, expires: float) -> None:
        self._lap_due = expires
        self._due = min(self._due, expires)

    def _discard(self, keys: Sequence[str]) -> int:
        now = self._clock()
        alive = 0
        for key in keys:
            node = self._table.get(key)
            if node is not None:
                self._remove(node)
                alive += node > now
        return alive

    def _remove(self, node: _Node[V]) -> None:
        del self._table[node.key]
        self._unlink(node)

    def _append(self, node: _Node[V], queue: _Node[V]) -> None:
        """At the end of ``queue``, which is just before the marker of the other one."""
        end = self._main if queue is self._small else self._small
        node.queue, node.next, node.prev = queue, end, end.prev
        end.prev.next = end.prev = node
        queue.size += node.size
        self._bytes += node.size

    def _unlink(self, node: _Node[V]) -> None:
        node.prev.next, node.next.prev = node.next, node.prev
        node.queue.size -= node.size
        self._bytes -= node.size
        if self._hand is node:
            self._hand = node.next

    def _is_ghost(self, key: str) -> bool:
        mark = hash(key)
        return mark in self._ghosts or mark in self._old_ghosts

    def _remember(self, key: str) -> None:
        """Note a key that left unread. Two generations stand for a queue: together at most one per entry."""
        if len(self._ghosts) * 2 >= len(self._table):
            self._old_ghosts, self._ghosts = self._ghosts, set()
        self._ghosts.add(hash(key))
