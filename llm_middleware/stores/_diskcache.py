"""diskcache made safe: it keeps bytes under strings, unpickles nothing and opens one connection.

Its methods that pickle are replaced one by one, and what it reads of its settings from the database, where
they may have been planted, is given explicitly.
"""

from __future__ import annotations

import functools
import os
import re
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from ..errors import ConfigError, CorruptEntryError, StoreError

__all__ = ["cache_type", "connect", "fetch_value"]

_RAW: Final = 1  # diskcache's MODE_RAW: the value is in the row
_FILE: Final = 2  # diskcache's MODE_BINARY: the value is a file of its own
_VALUE_FILE: Final = re.compile(r"[0-9a-f]{2}[/\\][0-9a-f]{2}[/\\][0-9a-f]{28}\.val")
_WAL_BYTES: Final = 4 * 2**20  # what the write-ahead log is cut back to


@functools.cache
def cache_type() -> Callable[[str, float, int], Any]:
    """diskcache, made safe. Its classes can only be derived from once it is known to be installed."""
    try:
        import diskcache
    except ImportError as exc:
        raise ConfigError("a disk cache needs diskcache: pip install 'llm-middleware[disk]'") from exc
    return _shared_cache(diskcache.Cache, _bytes_disk(diskcache.Disk))


def _bytes_disk(base: type) -> type:
    class BytesDisk(base):  # type: ignore[misc]
        """Writes bytes under str and reads nothing else: each method that might pickle is replaced."""

        def put(self, key: object) -> tuple[str, bool]:
            if type(key) is not str:
                raise StoreError(f"the disk keeps bytes by str, not by {type(key).__name__}")
            return key, True

        def get(self, key: object, raw: object) -> str:
            if type(key) is not str or not raw:
                raise CorruptEntryError("a key that this store did not write")
            return key

        def store(self, value: object, read: bool, key: object = None) -> object:
            if type(value) is not bytes or read:
                raise StoreError(f"the disk keeps bytes, not {type(value).__name__}")
            return super().store(value, False, key=key)

        def fetch(self, mode: object, filename: object, value: object, read: bool) -> bytes:
            return fetch_value(Path(self._directory), mode, filename, value)

        def remove(self, file_path: object) -> None:
            if _is_value_file(file_path):  # a planted row must not name a file elsewhere
                super().remove(file_path)

    return BytesDisk


def _shared_cache(base: type, disk: type) -> Callable[[str, float, int], Any]:
    class SharedCache(base):  # type: ignore[misc]
        """One connection for all threads, where diskcache opens one for each, and no minute of retries.

        The caller sees to it that one thread uses it at a time.
        """

        def __init__(self, directory: str, timeout: float, max_bytes: int) -> None:
            self._patience = timeout
            self._shared: sqlite3.Connection | None = None
            try:
                super().__init__(directory, timeout, disk, size_limit=max_bytes, **_SETTINGS)
            except BaseException:
                self.close()
                raise

        @property
        def _con(self) -> sqlite3.Connection:
            if self._shared is None:
                path = os.path.join(self._directory, "cache.db")
                self._shared = connect(path, self._patience)
                for pragma in _PRAGMAS:
                    self._shared.execute(f"PRAGMA {pragma}").fetchall()
            return self._shared

        @property
        def _sql_retry(self) -> Callable[..., sqlite3.Cursor]:
            return self._con.execute

        def close(self) -> None:
            if self._shared is not None:
                self._shared.close()
                self._shared = None

        def sql(self, statement: str, *values: object) -> list[tuple[object, ...]]:
            return self._con.execute(statement, values).fetchall()

        def remove_files(self, filenames: Iterable[object]) -> None:
            for filename in filenames:
                self._disk.remove(filename)

    return SharedCache


def connect(database: str, timeout: float) -> sqlite3.Connection:
    """In autocommit mode, for any thread; ``database`` is a path or a ``file:`` URI."""
    return sqlite3.connect(database, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)


# Made explicit because diskcache otherwise takes them from the database, where they may have been planted.
# Reads write nothing, culling is `DiskStore._trim`'s, and a mapped file that shrinks would end the process.
_SETTINGS: Final[dict[str, int | str]] = {
    "statistics": 0,
    "tag_index": 0,
    "eviction_policy": "least-recently-stored",
    "cull_limit": 0,
    "sqlite_auto_vacuum": 1,
    "sqlite_cache_size": 2048,
    "sqlite_journal_mode": "wal",
    "sqlite_mmap_size": 0,
    "sqlite_synchronous": 1,
    "disk_min_file_size": 2**15,
    "disk_pickle_protocol": 4,
}
# Per connection; the order matters, as a journal mode ends the time in which auto_vacuum can be chosen.
_PRAGMAS: Final = (
    "auto_vacuum = 1",
    "journal_mode = wal",
    "synchronous = 1",
    "mmap_size = 0",
    f"journal_size_limit = {_WAL_BYTES}",
)


def fetch_value(
    directory: Path, mode: object, filename: object, value: object, size: int | None = None
) -> bytes:
    """The value of a row, or its first ``size`` bytes; `CorruptEntryError` for one of any other kind than
    this module writes."""
    if mode == _RAW and type(value) is bytes:
        return value[:size]
    if mode == _FILE and _is_value_file(filename):
        with (directory / str(filename)).open("rb") as file:
            return file.read(-1 if size is None else size)
    raise CorruptEntryError(f"a row of mode {mode!r} that this store did not write")


def _is_value_file(filename: object) -> bool:
    return type(filename) is str and _VALUE_FILE.fullmatch(filename) is not None
