"""`SQLKeys`: API keys in a PostgreSQL (or SQLite) that SQLAlchemy reaches."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any, Final

from ..errors import ConfigError, StoreError
from ..types import Clock
from .keys_tables import TABLES, Run, TableKeys
from .per_process import PerProcess

__all__ = ["SQLKeys"]

_DIALECTS: Final = ("postgresql", "sqlite")
_DRIVERS: Final = {"postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg"}
# Any number: tables are made by one process at a time, which PostgreSQL does not see to itself.
_MAKING: Final = 0x11A3


class SQLKeys(TableKeys):
    """``url``: SQLAlchemy's, such as ``postgresql://user:password@host/database`` (with psycopg unless it
    names another driver that is sync). ``timeout``: seconds that an operation may take, and a connection.
    ``clock`` gives seconds since the epoch. Tables are made on first use.

    Blocks: on an event loop it belongs in a worker thread. `ConfigError` without the ``sql`` extra, and for
    another kind of database.
    """

    def __init__(self, url: str, *, timeout: float = 5.0, clock: Clock = time.time) -> None:
        super().__init__(clock=clock)
        self._timeout = timeout
        self._url = _parsed(url)
        self._dialect = self._url.get_backend_name()
        self.locking = " FOR UPDATE" if self._dialect == "postgresql" else ""
        self._engines: PerProcess[Any] = PerProcess(self._make_engine)
        if self._dialect not in _DIALECTS:
            raise ConfigError(f"url: expected one of {list(_DIALECTS)}, got {self._dialect}", param="url")
        _check_driver(self._url)

    def close(self) -> None:
        engine = self._engines.made()
        if engine is not None:
            engine.dispose()

    @contextlib.contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Run]:
        from sqlalchemy.exc import SQLAlchemyError

        try:
            engine = self._engines.mine()
            if not getattr(engine, "has_tables", False):
                self._make_tables(engine)
            with engine.begin() as connection:
                self._lock(connection, writes)
                yield functools.partial(_run, connection)
        except SQLAlchemyError as exc:
            # Its text may hold the URL of the database, and what was written.
            raise StoreError(f"the database of API keys failed: {_reason(exc)}") from None

    def _lock(self, connection: Any, writes: bool) -> None:
        if self._dialect == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    def _make_tables(self, engine: Any) -> None:
        with engine.begin() as connection:
            self._lock(connection, True)
            if self._dialect == "postgresql":
                _run(connection, "SELECT pg_advisory_xact_lock(:number)", number=_MAKING)
            for statement in TABLES:
                _run(connection, statement)
        engine.has_tables = True

    def _make_engine(self) -> Any:
        import sqlalchemy

        if self._dialect == "sqlite":
            arguments: dict[str, object] = {"timeout": self._timeout, "isolation_level": None}
        else:
            milliseconds = max(1, round(self._timeout * 1e3))
            arguments = {
                "connect_timeout": max(2, round(self._timeout)),
                "options": f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}",
            }
        return sqlalchemy.create_engine(
            self._url,
            connect_args=arguments,
            pool_pre_ping=True,
            hide_parameters=True,
            **({} if self._dialect == "sqlite" else {"pool_timeout": self._timeout, "max_overflow": 15}),
        )


def _run(connection: Any, statement: str, **values: Any) -> list[tuple[Any, ...]]:
    import sqlalchemy

    result = connection.execute(sqlalchemy.text(statement), values)
    return [tuple(row) for row in result] if result.returns_rows else []


def _parsed(url: str) -> Any:
    try:
        import sqlalchemy
    except ImportError as exc:
        message = "keys in a database need SQLAlchemy: pip install 'llm-middleware[sql]'"
        raise ConfigError(message, param="url") from exc
    try:
        made = sqlalchemy.make_url(url)
        return made.set(drivername=_DRIVERS.get(made.drivername, made.drivername))
    except sqlalchemy.exc.ArgumentError:
        message = "url: not the URL of a database, such as postgresql://user:password@host/database"
        raise ConfigError(message, param="url") from None


def _check_driver(url: Any) -> None:
    import sqlalchemy

    try:
        dialect = url.get_dialect()
        dialect.import_dbapi()
    except sqlalchemy.exc.ArgumentError:
        raise ConfigError(f"url: SQLAlchemy has no {url.drivername}", param="url") from None
    except ImportError:
        message = f"url: {url.drivername} is not installed: pip install 'llm-middleware[sql]'"
        raise ConfigError(message, param="url") from None
    if dialect.is_async:
        raise ConfigError(f"url: {url.drivername} is an async driver; name a sync one", param="url")


def _reason(exc: Exception) -> str:
    """The driver's words, or the name of what happened."""
    cause = getattr(exc, "orig", None)
    return f"{type(cause).__name__}: {cause}".splitlines()[0] if cause is not None else type(exc).__name__
