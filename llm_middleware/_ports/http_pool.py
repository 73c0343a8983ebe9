"""`Pool`: the open connections of a process, idle ones by where they lead, and no more than so many."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from typing import Any, Generic, Protocol, TypeVar

from .http_errors import earlier
from .http_stale import is_stale
from .http_turns import ThreadTurns

__all__ = ["Pool"]


class _Connection(Protocol):
    sock: Any

    def close(self) -> None: ...


K = TypeVar("K")
C = TypeVar("C", bound=_Connection)


class Pool(Generic[K, C]):
    """Who takes something out gives it back or drops it, once.

    ``most``: connections, idle ones included. ``keepalive``: seconds for which an idle one is kept.
    """

    def __init__(self, most: int, keepalive: float) -> None:
        self._most = most
        self._keepalive = keepalive
        self._turns = ThreadTurns(most)
        self._lock = threading.Lock()
        self._open = 0
        self._closed = False
        self._idle: dict[K, deque[tuple[C, float]]] = {}
        # For a pool that nobody closes; also when the interpreter ends.
        self._finalizer = weakref.finalize(self, _close_all, self._idle)

    def take(self, key: K, until: float | None) -> C | None:
        """An idle connection to ``key``, or None: the caller may open one. `TimeoutError` where neither
        may be had before ``until``."""
        self._turns.take(earlier(None, until))
        spent: list[C] = []
        with self._lock:
            found = self._find(key, spent)
            if found is None:
                self._open += 1
                if self._open > self._most:
                    spent.append(self._oldest())
                    self._open -= 1
        for each in spent:
            each.close()
        return found

    def _find(self, key: K, spent: list[C]) -> C | None:
        """The one that was used last, if it still can be used; others that cannot go to ``spent``."""
        idle = self._idle.get(key)
        if not idle:
            return None
        freshest = time.monotonic() - self._keepalive
        while idle and idle[0][1] < freshest:
            spent.append(idle.popleft()[0])
            self._open -= 1
        while idle:
            connection, _ = idle.pop()
            if not is_stale(connection.sock):
                return connection
            spent.append(connection)
            self._open -= 1
        return None

    def _oldest(self) -> C:
        """Of all that are idle. There is one: at most ``most`` are taken, and this one's taker has a turn."""
        longest = min((idle for idle in self._idle.values() if idle), key=lambda idle: idle[0][1])
        return longest.popleft()[0]

    def give(self, key: K, connection: C) -> None:
        """It can be used again."""
        with self._lock:
            kept = not self._closed
            if kept:
                self._idle.setdefault(key, deque()).append((connection, time.monotonic()))
        if kept:
            self._turns.give()
        else:
            self.drop(connection)

    def drop(self, connection: C | None) -> None:
        """It is closed; None: it never came to be."""
        if connection is not None:
            connection.close()
        with self._lock:
            self._open -= 1
        self._turns.give()

    def close(self) -> None:
        """Close the idle ones; the others as they come back."""
        with self._lock:
            self._closed = True
            self._open -= sum(map(len, self._idle.values()))
            left = dict(self._idle)
            self._idle.clear()
        _close_all(left)


def _close_all(idle: dict[K, deque[tuple[C, float]]]) -> None:
    for connections in idle.values():
        for connection, _ in connections:
            connection.close()
    idle.clear()
