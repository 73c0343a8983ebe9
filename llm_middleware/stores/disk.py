"""The disk tier: `diskcache <https://grantjenks.com/docs/diskcache/>`_ without its pickle.

diskcache unpickles what it finds (CVE-2025-69872), so whoever may write to the directory runs code in the
process that reads it. Here only ``bytes`` under ``str`` keys are written, and a row that says anything else
is a `CorruptEntryError`: it is never opened, let alone unpickled, and never names a file elsewhere.

Two handles per process, both shared by all threads and re-made after a fork (a walk over the entries opens
one of its own for each page, so that it holds up neither):

* the *reader* never waits: not for a writer (SQLite's write-ahead log lets both work side by side) and not
  for a lock of any other kind, which it reports as `StoreError` at once. It creates and changes nothing.
* the *writer* is the diskcache, opened by the first write. It waits ``timeout`` seconds for other writers.

When an entry is over is decided by the store's own clock, kept in diskcache's ``tag`` column; diskcache's
own expiry follows the system's clock and serves to clear up.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from ..errors import ConfigError, CorruptEntryError, InvalidRequestError, StoreError
from ..types import Clock
from ._diskcache import cache_type, connect, fetch_value

__all__ = ["DiskStore"]

Page: TypeAlias = tuple[str | None, list[tuple[str, bytes]]]

_BATCH: Final = 256  # rows removed per transaction, so that other writers get their turn
_DIGITS: Final = 65  # a key ends in ":" and 64 hex digits
_PAGE: Final = 1000  # rows looked at per page
_CURSOR: Final = re.compile(r"[0-9]{1,19}")
_MOST: Final = 2**63  # no rowid is as large
_ENTRY: Final = re.compile(r":[0-9a-f]{64}\Z")
_ORPHAN_AGE: Final = 3600.0  # seconds; no writer takes that long from a value file to its row

_READ: Final = "SELECT mode, filename, value, tag FROM Cache WHERE key = ? AND raw = 1"
_FIND: Final = "SELECT rowid, filename, tag FROM Cache WHERE key = ? AND raw = 1"
# ";" follows ":" in ASCII, so the range holds the namespace's keys and those of longer ones ("a", "a:b").
_IN_NAMESPACE: Final = (
    "SELECT rowid, filename, tag FROM Cache WHERE key >= ? || ':' AND key < ? || ';' AND raw = 1"
    f" AND substr(key, 1, length(key) - {_DIGITS}) = ? LIMIT {_BATCH}"
)
# Pages of rows rather than of what is looked for: a page takes the same time whatever else there is.
_WINDOW: Final = f"SELECT rowid FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT {_PAGE}"
_HEADS: Final = (
    "SELECT rowid, key, mode, filename, tag,"
    " CASE WHEN length(value) > ? THEN substr(value, 1, ?) ELSE value END"
    " FROM Cache NOT INDEXED WHERE rowid > ? AND rowid <= ? AND raw = 1"
    " AND key >= ? || ':' AND key < ? || ';' ORDER BY rowid"
)
_OVER: Final = (
    "SELECT rowid, filename, tag FROM Cache NOT INDEXED"
    " WHERE rowid > ? AND rowid <= ? AND raw = 1 AND typeof(tag) = 'real' AND tag <= ?"
)
_OLDEST: Final = (
    "SELECT rowid, filename, COALESCE(size, 0) + COALESCE(LENGTH(value), 0) FROM Cache"
    f" ORDER BY store_time, rowid LIMIT {_BATCH}"
)
_EXPIRED: Final = f"SELECT rowid, filename, tag FROM Cache WHERE expire_time < ? LIMIT {_BATCH}"
_ANY_EXPIRED: Final = "SELECT 1 FROM Cache WHERE expire_time < ? LIMIT 1"


class DiskStore:
    """Answers in a directory, shared by every process on this machine and kept when they end.

    ``directory`` is created with mode 0700 by the first write; keep one that exists as closed as that, and
    on a local disk. ``max_bytes`` bounds the database and its value files; the oldest entries go first.
    ``timeout``: seconds a write waits for another. ``clock`` gives seconds since the epoch.

    Reads answer in microseconds and never wait, so they may be made on an event loop as soon as `inline`
    says so; everything else belongs in a worker thread there. Needs the ``disk`` extra: `ConfigError`
    without it. All methods raise `StoreError` where the disk or the database fails.
    """

    tier = "disk"

    def __init__(
        self,
        directory: str | Path,
        *,
        max_bytes: int = 2**30,
        timeout: float = 0.25,
        clock: Clock = time.time,
    ) -> None:
        if max_bytes < 1:
            raise ConfigError("max_bytes must be at least 1", param="max_bytes")
        self.directory = Path(os.path.expandvars(directory)).expanduser().absolute()
        self.max_bytes = max_bytes
        self._database = self.directory / "cache.db"
        self._timeout = timeout
        self._clock = clock
        self._cache_type = cache_type()
        self._handles = _Handles()

    @property
    def inline(self) -> bool:
        """Whether `get` may be called on an event loop: the reader is open in this process."""
        handles = self._handles
        return handles.reader is not None and handles.pid == os.getpid()

    def get(self, key: str) -> bytes | None:
        """The bytes under ``key``, or None where there are none or their time is over. Never waits.

        `CorruptEntryError` for a row that this class did not write.
        """
        try:
            rows = self._read(key)
            if not rows:
                return None
            mode, filename, value, expires = rows[0]
            if not isinstance(expires, float | None):
                raise CorruptEntryError("a row whose expiry this store did not write")
            if not _is_alive(expires, self._clock()):
                return None
            return fetch_value(self.directory, mode, filename, value)
        except FileNotFoundError:  # replaced or evicted since the row was read
            return None
        except (sqlite3.Error, OSError) as exc:
            raise StoreError(f"disk cache cannot be read: {exc}") from exc

    def set(self, key: str, value: bytes, ttl: float | None) -> None:
        """Keep ``value`` for ``ttl`` seconds (None: until evicted), replacing what was there.

        A value that cannot be kept, being larger than the store or out of time, still removes the old one.
        """
        with self._writing() as cache:
            if len(value) > self.max_bytes or (ttl is not None and ttl <= 0):
                self._take(cache, _FIND, key)
                return
            expires = None if ttl is None else float(self._clock() + ttl)
            cache.set(key, value, expire=ttl, tag=expires)
            self._trim(cache)

    def delete(self, keys: Sequence[str]) -> int:
        """Remove ``keys``, each in a transaction of its own; how many were there and alive."""
        with self._writing() as cache:
            return sum(self._take(cache, _FIND, key)[1] for key in keys)

    def flush(self, namespace: str) -> int:
        """Remove every key of exactly this namespace; how many were alive.

        Works in batches, so that other writers get their turn: a failure half-way leaves the rest.
        """
        removed, alive = 1, 0
        with self._writing() as cache:
            while removed:
                removed, counted = self._take(cache, _IN_NAMESPACE, namespace, namespace, namespace)
                alive += counted
        return alive

    def purge_expired(self) -> int:
        """Remove every row whose time is over by this store's clock; how many. Looks at each row there is, in
        batches, so that other writers get their turn: a failure half-way leaves the rest."""
        removed, after, more = 0, 0, True
        while more:
            with self._walking() as reader:
                last, more = _window(reader, after)
            if last > after:
                with self._writing() as cache:
                    removed += self._take(cache, _OVER, after, last, self._clock())[0]
            after = last
        return removed

    def heads(self, namespace: str, cursor: str | None, size: int) -> Page:
        """The next page of exactly ``namespace``: its cursor, None at the end, and entries as (key, first
        ``size`` bytes), each once. What is over, and what this store did not write, is left out.

        Looks at a thousand rows, whosever they are, so it may be empty; waits ``timeout`` seconds for a lock.
        ``cursor``: None to begin, else as the last page gave it; `InvalidRequestError` for any other.
        """
        after = 0 if cursor is None else _rowid(cursor)
        with self._walking() as reader:
            last, more = _window(reader, after)
            heads = [] if reader is None else list(self._heads(reader, namespace, size, after, last))
        return str(last) if more else None, heads

    def close(self) -> None:
        """Close this process's connections. The next call opens them again."""
        handles = self._mine()
        with handles.writing:
            if handles.cache is not None:
                handles.cache.close()
            handles.cache = None
        with handles.reading:
            if handles.reader is not None:
                handles.reader.close()
            handles.reader = None

    def _mine(self) -> _Handles:
        """This process's handles. SQLite forbids a child even to close what its parent opened."""
        handles = self._handles
        if handles.pid != os.getpid():
            _INHERITED.append(handles)
            handles = self._handles = _Handles()
        return handles

    def _read(self, key: str) -> list[tuple[object, object, object, object]]:
        handles = self._mine()
        with handles.reading:
            if handles.reader is None:
                handles.reader = self._open_reader()
            return [] if handles.reader is None else handles.reader.execute(_READ, (key,)).fetchall()

    def _open_reader(self, timeout: float = 0.0) -> sqlite3.Connection | None:
        """A connection that cannot write, nor waits unless told; None while there is nothing to read."""
        if not self._database.exists():
            return None
        reader = connect(f"{self._database.as_uri()}?mode=rw", timeout=timeout)
        try:
            reader.execute("PRAGMA query_only = 1")
            if reader.execute("SELECT 1 FROM sqlite_master WHERE name = 'Cache'").fetchall():
                return reader
        except BaseException:
            reader.close()
            raise
        reader.close()
        return None

    def _heads(
        self,
        reader: sqlite3.Connection,
        namespace: str,
        size: int,
        after: int,
        last: int,
        missing: object = None,
    ) -> Iterator[tuple[str, bytes]]:
        """The heads of rows from ``after`` to ``last``. ``missing``: a value file known to be."""
        rows = reader.execute(_HEADS, (size, size, after, last, namespace, namespace)).fetchall()
        for rowid, key, mode, filename, expires, value in rows:
            if not isinstance(key, str) or key[:-_DIGITS] != namespace or _ENTRY.search(key) is None:
                continue
            if not isinstance(expires, float | None) or not _is_alive(expires, self._clock()):
                continue
            try:
                yield key, fetch_value(self.directory, mode, filename, value, size)
            except CorruptEntryError:
                continue
            except FileNotFoundError:
                if filename != missing:  # where it was replaced since, its row names another file
                    yield from self._heads(reader, namespace, size, rowid - 1, rowid, filename)

    @contextlib.contextmanager
    def _walking(self) -> Iterator[sqlite3.Connection | None]:
        """A reader for one page, which waits for locks and reads whatever text there is; None as there."""
        reader = None
        try:
            reader = self._open_reader(self._timeout)
            if reader is not None:
                reader.text_factory = functools.partial(str, encoding="utf-8", errors="surrogateescape")
            yield reader
        except (sqlite3.Error, OSError) as exc:
            raise StoreError(f"disk cache cannot be read: {exc}") from exc
        finally:
            if reader is not None:
                reader.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        """The diskcache, opened if need be, for one thread at a time; its errors become `StoreError`."""
        handles = self._mine()
        if not handles.writing.acquire(timeout=self._timeout):
            raise StoreError(f"disk cache is busy: no turn to write within {self._timeout} s")
        try:
            if handles.cache is None:
                handles.cache = self._open_cache()
            yield handles.cache
        except StoreError:
            raise
        except Exception as exc:  # any: diskcache trusts the settings in the database, which may be planted
            reason = str(exc) or f"no turn to write within {self._timeout} s"  # diskcache.Timeout is mute
            raise StoreError(f"disk cache cannot be written: {reason}") from exc
        finally:
            handles.writing.release()

    def _open_cache(self) -> Any:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        cache = self._cache_type(str(self.directory), self._timeout, self.max_bytes)
        self._remove_orphans(cache)
        return cache

    def _remove_orphans(self, cache: Any) -> None:
        """Value files whose writer was killed before their row was written: no size limit counts them."""
        known = {str(filename) for (filename,) in cache.sql("SELECT filename FROM Cache")}
        before = time.time() - _ORPHAN_AGE
        for path in self.directory.glob("??/??/*.val"):
            with contextlib.suppress(OSError):
                if str(path.relative_to(self.directory)) not in known and path.stat().st_mtime < before:
                    path.unlink()

    def _take(self, cache: Any, select: str, *values: object) -> tuple[int, int]:
        """Remove the selected rows and their files; how many there were and how many of them alive."""
        now = self._clock()
        with cache.transact():
            rows = cache.sql(select, *values)
            cache.sql(_remove_rows(row[0] for row in rows))
        cache.remove_files(row[1] for row in rows)
        return len(rows), sum(_is_alive(row[2], now) for row in rows)

    def _trim(self, cache: Any) -> None:
        """Remove rows that are over, then the oldest, until database and files fit ``max_bytes``."""
        now = time.time()
        if cache.sql(_ANY_EXPIRED, now):
            self._take(cache, _EXPIRED, now)
        while (excess := cache.volume() - self.max_bytes) > 0:
            with cache.transact():
                doomed = _first_of_size(cache.sql(_OLDEST), excess)
                cache.sql(_remove_rows(rowid for rowid, _ in doomed))
            cache.remove_files(filename for _, filename in doomed)
            if not doomed:  # the empty tables alone are larger
                return


class _Handles:
    """The two connections of one process, and the locks that let its threads share them."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.reading = threading.Lock()
        self.writing = threading.Lock()
        self.reader: sqlite3.Connection | None = None
        self.cache: Any = None  # diskcache is untyped


_INHERITED: Final[list[_Handles]] = []


def _rowid(cursor: object) -> int:
    if isinstance(cursor, str) and _CURSOR.fullmatch(cursor) and int(cursor) < _MOST:
        return int(cursor)
    raise InvalidRequestError("cursor: not one that this store gave", param="cursor")


def _window(reader: sqlite3.Connection | None, after: int) -> tuple[int, bool]:
    """The last of the next rows, and whether there may be more."""
    rows = [] if reader is None else reader.execute(_WINDOW, (after,)).fetchall()
    return rows[-1][0] if rows else after, len(rows) == _PAGE


def _is_alive(expires: object, now: float) -> bool:
    return not isinstance(expires, float) or expires > now


def _remove_rows(rowids: Iterable[object]) -> str:
    return f"DELETE FROM Cache WHERE rowid IN ({','.join(str(rowid) for rowid in rowids)})"


def _first_of_size(rows: Sequence[tuple[object, ...]], size: int) -> list[tuple[object, object]]:
    """The first rows that together take ``size`` bytes."""
    chosen: list[tuple[object, object]] = []
    for rowid, filename, taken in rows:
        if size <= 0:
            break
        chosen.append((rowid, filename))
        size -= taken if isinstance(taken, int) else 0
    return chosen
