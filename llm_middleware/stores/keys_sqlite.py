"""`SQLiteKeys`: API keys in one SQLite file, shared by the processes of this machine and kept when they
end."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ..errors import StoreError
from ..types import Clock
from .keys_tables import TABLES, Run, TableKeys

__all__ = ["SQLiteKeys"]


class SQLiteKeys(TableKeys):
    """``path``: the file, made with mode 0600 on first use; keep it on a local disk. ``timeout``: seconds
    that an operation waits for others. ``clock`` gives seconds since the epoch.

    Blocks: on an event loop it belongs in a worker thread. Safe for threads, and after a fork.
    """

    def __init__(self, path: str | Path, *, timeout: float = 5.0, clock: Clock = time.time) -> None:
        super().__init__(clock=clock)
        self.path = Path(os.path.expandvars(path)).expanduser().absolute()
        self._timeout = timeout
        self._handle = _Handle()

    def close(self) -> None:
        handle = self._mine()
        with handle.lock:
            if handle.connection is not None:
                handle.connection.close()
                handle.connection = None

    @contextlib.contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Run]:
        handle = self._mine()
        if not handle.lock.acquire(timeout=self._timeout):
            raise StoreError(f"the file of API keys is busy: no turn within {self._timeout} s")
        try:
            if handle.connection is None:
                handle.connection = self._open()
            with _begun(handle.connection, "BEGIN IMMEDIATE" if writes else "BEGIN") as run:
                yield run
        except (sqlite3.Error, OSError) as exc:
            raise StoreError(f"the file of API keys cannot be used: {exc}") from exc
        finally:
            handle.lock.release()

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(
            self.path, timeout=self._timeout, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            with _begun(connection, "BEGIN IMMEDIATE") as run:
                for statement in TABLES:
                    run(statement)
        except BaseException:
            connection.close()
            raise
        return connection

    def _mine(self) -> _Handle:
        """This process's handle. SQLite forbids a child even to close what its parent opened."""
        handle = self._handle
        if handle.pid != os.getpid():
            _INHERITED.append(handle)
            handle = self._handle = _Handle()
        return handle


class _Handle:
    """The connection of one process, and the lock that lets its threads share it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.connection: sqlite3.Connection | None = None


_INHERITED: Final[list[_Handle]] = []


@contextlib.contextmanager
def _begun(connection: sqlite3.Connection, begin: str) -> Iterator[Run]:
    def run(statement: str, **values: Any) -> list[tuple[Any, ...]]:
        return connection.execute(statement, values).fetchall()

    connection.execute(begin)
    try:
        yield run
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
