"""`Pending`: the entries that one process has yet to write to Redis, and the thread that writes them."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from ..errors import StoreError
from ..types import Clock
from .redis import RedisStore

__all__ = ["Held", "Pending", "is_of"]

logger = logging.getLogger("llm_middleware")

_THREAD: Final = "llm-middleware-redis-buffer"
_MOST_BATCHES: Final = 16  # that may be pending
_BATCH_BYTES: Final = 2**20  # so that a batch fits into a budget of 0.25 s on any local network
_IDLE: Final = 30.0  # seconds without anything pending after which the thread ends
_JOIN: Final = 1.0  # seconds that closing waits for the thread, which has nothing left to do by then
_DIGITS: Final = 65  # of a key: the colon and 64 hexadecimal digits
# Every buffer that lives, to be written when the interpreter exits.
_OPEN: Final[weakref.WeakSet[Pending]] = weakref.WeakSet()


class Held(NamedTuple):
    value: bytes
    expires: float  # by the store's clock
    owner: str | None


_NOTHING: Final = (frozenset[str](), threading.Event())  # keys under way, and the end of that


class Pending:
    """What one process has pending, and the thread that writes it."""

    def __init__(self, store: RedisStore, size: int, interval: float, max_bytes: int, clock: Clock) -> None:
        self.pid = os.getpid()
        self.table: dict[str, Held] = {}  # the oldest first
        self.dropped = 0
        self._store = store
        self._size = size
        self._interval = interval
        self._max_bytes = max_bytes
        self._clock = clock
        self._patience = max(_JOIN, 4 * store.connection.budget)  # more than a batch takes, in a Cluster too
        self._bytes = 0
        self._changed = threading.Condition(threading.Lock())  # of the table and the thread
        self._thread: threading.Thread | None = None  # whose turn it is; another one ends
        self._writing = threading.Lock()  # for one batch
        self._batch = _NOTHING
        self._room = _BATCH_BYTES
        self._skipped = 0  # entries that failed: they must not keep back those behind them
        self._enough: float = size  # entries that are written at once; none are while Redis fails
        _OPEN.add(self)
        atexit.unregister(_write_all)  # a forked child may have it from its parent, or may have lost it
        atexit.register(_write_all)

    def set(self, key: str, value: bytes, ttl: float | None, owner: str | None = None) -> None:
        now = self._clock()
        expires = math.inf if ttl is None else now + ttl
        entry = Held(value if expires > now else b"", expires, owner)
        with self._changed:
            self._remove(key)
            if _weight(key, entry) > self._max_bytes:
                self.dropped += 1
                return
            self.table[key] = entry
            self._bytes += _weight(key, entry)
            while len(self.table) > _MOST_BATCHES * self._size or self._bytes > self._max_bytes:
                self._remove(next(iter(self.table)))
                self.dropped += 1
            if len(self.table) in (1, self._size):
                self._changed.notify()
            if self._thread is not None:
                return
            thread = self._thread = threading.Thread(target=self._run, name=_THREAD, daemon=True)
        self._start(thread)

    def remove(self, keys: Iterable[str]) -> dict[str, Held]:
        """Those of ``keys`` that were pending, and are not any more."""
        removed = {}
        for key in keys:
            with self._changed:
                entry = self._remove(key)
            if entry is not None:
                removed[key] = entry
        return removed

    def settle(self, keys: Iterable[str]) -> None:
        """Wait for a batch that has some of ``keys``, which were removed. `StoreError` if it does not end."""
        under_way, over = self._batch
        if not under_way.isdisjoint(keys) and not over.wait(self._patience):
            raise StoreError("redis: a write that has to end first does not")

    def names(self, namespace: str) -> list[str]:
        """The keys of ``namespace`` that are pending or under way."""
        under_way, _ = self._batch
        return [key for key in [*under_way, *list(self.table)] if is_of(key, namespace)]

    def close(self) -> None:
        """Write what is pending, and end the thread."""
        with self._changed:
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if not self.write():
            logger.warning("redis: %d entries were not written on closing", len(self.table))
        if thread is not None and thread.is_alive():
            thread.join(_JOIN)

    def write(self) -> bool:
        """Write what is pending at this moment, as far as that succeeds; whether it did."""
        todo = list(self.table.items())
        first = self._skipped % max(1, len(todo))
        todo = todo[first:] + todo[:first]
        while todo:
            count = _fitting(todo[: self._size], self._room)
            if not self._write(todo[:count]):
                self._skipped += count
                return False
            del todo[:count]
        self._skipped, self._enough = 0, self._size
        return True

    def _write(self, entries: Sequence[tuple[str, Held]]) -> bool:
        if not self._writing.acquire(timeout=self._patience):
            return False
        self._batch = _, over = frozenset(key for key, _ in entries), threading.Event()
        try:
            # After the batch was shown: who removes an entry and is not seen here waits for the end of this.
            there = [(key, entry) for key, entry in entries if self.table.get(key) is entry]
            now = self._clock()
            # One whose time is over removes what it was to replace.
            owners = {key: entry.owner for key, entry in there if entry.owner is not None}
            self._store.mset([(key, entry.value, entry.expires - now) for key, entry in there], owners)
        except Exception as exc:
            self._room = max(1, self._room // 2)  # it may have been too much for the budget
            if self._enough == self._size:
                logger.warning("redis: %d entries wait to be written: %s", len(self.table), exc)
            self._enough = math.inf
            return False
        finally:
            self._batch = _NOTHING
            over.set()
            self._writing.release()
        self._room = min(_BATCH_BYTES, 2 * self._room)
        for key, entry in there:
            with self._changed:  # for each: a set need not wait for all of them
                if self.table.get(key) is entry:
                    self._remove(key)
        return True

    def _remove(self, key: str) -> Held | None:
        entry = self.table.pop(key, None)
        if entry is not None:
            self._bytes -= _weight(key, entry)
        return entry

    # --- the thread

    def _start(self, thread: threading.Thread) -> None:
        try:
            thread.start()
        except RuntimeError as exc:  # no more threads, or the interpreter ends
            logger.debug("redis: nothing writes what is pending: %s", exc)
            with self._changed:
                if self._thread is thread:
                    self._thread = None

    def _run(self) -> None:
        while self._due():
            self.write()

    def _due(self) -> bool:
        """Wait until it is time to write. False where this thread is to end."""
        me = threading.current_thread()
        with self._changed:
            self._changed.wait_for(lambda: self.table or self._thread is not me, _IDLE)
            if not self.table and self._thread is me:
                self._thread = None
            self._changed.wait_for(
                lambda: self._thread is not me or len(self.table) >= self._enough, self._interval
            )
            return self._thread is me


def _write_all() -> None:
    """What every buffer of this process has pending, when the interpreter exits."""
    for buffer in list(_OPEN):
        if buffer.pid == os.getpid() and buffer.table:
            buffer.close()


def is_of(key: str, namespace: str) -> bool:
    return len(key) == len(namespace) + _DIGITS and key.startswith(f"{namespace}:")


def _weight(key: str, entry: Held) -> int:
    return len(key) + len(entry.value)


def _fitting(entries: Sequence[tuple[str, Held]], room: int) -> int:
    """How many of ``entries`` go into ``room`` bytes: the first at any rate."""
    for count, (key, entry) in enumerate(entries):
        room -= _weight(key, entry)
        if room < 0 and count:
            return count
    return len(entries)
