"""A vector index in a Redis that all processes share, through the same connections as the Redis store.

Every operation is written once, as a plan (`stores.redis_plan`), so that the two faces differ in nothing.
What finds the nearest rows is RediSearch or, where there is none, vector sets (`redis_search`,
`redis_vectorset`). Rows, sets, indexes and states have names that begin with ``<name>:``.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

from ..errors import ConfigError, InvalidRequestError, StoreError
from ..stores.redis_connect import RedisConnection
from ..stores.redis_plan import Plan, arun, milliseconds, one, pipeline, run
from ..stores.redis_scan import scan_keys
from ..types import Clock
from .checks import check_expires, check_k, mismatch, payload_text, vector_size
from .records import Neighbour, Row
from .redis_rows import Engine, Entry, Rows
from .redis_search import SearchEngine
from .redis_vectorset import VectorSetEngine

__all__ = ["RedisIndex"]

T = TypeVar("T")

_SCOPE: Final = re.compile(r"[0-9a-f]{64}")
_ENGINES: Final = ("auto", "search", "vectorset")
_ALGORITHMS: Final = ("flat", "hnsw")
_NEED: Final = "it takes Redis 8 or later, or a Redis with the module RediSearch (Redis Stack)"


class RedisIndex:
    """A `VectorIndex` and an `AsyncVectorIndex`; one object serves all threads and event loops.

    ``name``: what the names of its Redis keys begin with. ``dimensions``: of the vectors; where it is None,
    those of the first row that this object adds. Vectors of other dimensions may lie under the same name, and
    never meet. ``engine``: ``search`` (RediSearch), ``vectorset`` (Redis 8), or ``auto``: the first of them
    that the server has, as it is asked at the first use. RediSearch is no choice in a Cluster, nor in a
    database but 0. ``algorithm``: of a RediSearch index that is made here: ``flat`` is exact, for some ten
    thousand rows in a scope; ``hnsw`` is for more.

    A row is over by ``clock``, and leaves Redis by the server's. Every method raises `StoreError` where Redis
    cannot do it within the connection's budget; with the code ``no_vector_search`` where it has no engine.
    `flush`, and with vector sets `count` and `purge`, go through all keys of the server, a thousand at a
    time.
    """

    inline = False

    def __init__(
        self,
        connection: RedisConnection,
        *,
        name: str = "llm-semantic",
        dimensions: int | None = None,
        engine: Literal["auto", "search", "vectorset"] = "auto",
        algorithm: Literal["flat", "hnsw"] = "flat",
        clock: Clock = time.time,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"name: expected a name, got {name!r}", param="name")
        if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
            raise ConfigError(
                f"dimensions: expected a whole number >= 1, got {dimensions!r}", param="dimensions"
            )
        _check_choice("engine", engine, _ENGINES)
        _check_choice("algorithm", algorithm, _ALGORITHMS)
        self.connection = connection
        self.name = name
        self._clock = clock
        self._wanted = engine
        self._algorithm = algorithm
        self._rows = Rows(connection, name)
        self._engine: Engine | None = None
        self._dimensions = dimensions
        self._fixing = threading.Lock()
        if engine == "search" and self._no_search:
            raise ConfigError(f"engine: RediSearch is not for {self._no_search}", param="engine")

    @property
    def dimensions(self) -> int | None:
        return self._dimensions

    def add(self, row: Row) -> None:
        self._run(self._add(row))

    async def aadd(self, row: Row) -> None:
        await self._arun(self._add(row))

    def update(self, key: str, payload: Mapping[str, object]) -> bool:
        return self._run(self._rows.update(key, payload_text(payload)))

    async def aupdate(self, key: str, payload: Mapping[str, object]) -> bool:
        return await self._arun(self._rows.update(key, payload_text(payload)))

    def search(self, scope: str, vector: bytes, k: int) -> list[Neighbour]:
        return self._run(self._search(scope, vector, k))

    async def asearch(self, scope: str, vector: bytes, k: int) -> list[Neighbour]:
        return await self._arun(self._search(scope, vector, k))

    def remove(self, keys: Sequence[str]) -> int:
        return self._run(self._remove(keys))

    async def aremove(self, keys: Sequence[str]) -> int:
        return await self._arun(self._remove(keys))

    def flush(self, namespace: str) -> int:
        return self._run(self._flush(namespace))

    async def aflush(self, namespace: str) -> int:
        return await self._arun(self._flush(namespace))

    def count(self) -> int:
        return self._run(self._count())

    async def acount(self) -> int:
        return await self._arun(self._count())

    def purge(self) -> int:
        return self._run(self._purge())

    async def apurge(self) -> int:
        return await self._arun(self._purge())

    def state(self, name: str) -> bytes | None:
        return self._run(self._state(name))

    async def astate(self, name: str) -> bytes | None:
        return await self._arun(self._state(name))

    def keep_state(self, name: str, data: bytes, before: bytes | None) -> bool:
        return self._run(self._rows.keep_state(name, data, before))

    async def akeep_state(self, name: str, data: bytes, before: bytes | None) -> bool:
        return await self._arun(self._rows.keep_state(name, data, before))

    def close(self) -> None:
        """Close this process's connections. The next operation opens others."""
        self.connection.close()

    async def aclose(self) -> None:
        await self.connection.aclose()

    # The plans ----------------------------------------------------------------------------------

    def _add(self, row: Row) -> Plan[None]:
        check_expires(row)
        _check_scope(row.scope)
        payload, dims, now = (
            payload_text(row.payload),
            vector_size(row.vector, self._dimensions),
            self._clock(),
        )
        if row.expires <= now:
            yield from self._remove([row.key])
            return
        self._fix(dims)
        engine = yield from self._engined()
        yield from engine.add(Entry(row, dims, payload, self._left(row.expires - now)), now)

    def _search(self, scope: str, vector: bytes, k: int) -> Plan[list[Neighbour]]:
        check_k(k)
        _check_scope(scope)
        dims, known = vector_size(vector, self._dimensions), self._dimensions is not None
        engine = yield from self._engined()
        return (yield from engine.search(scope, vector, dims, k, self._clock(), known=known))

    def _remove(self, keys: Sequence[str]) -> Plan[int]:
        if not keys:
            return 0
        engine, now = (yield from self._engined()), self._clock()
        return sum(row.expires > now for row in (yield from engine.remove(keys)))

    def _flush(self, namespace: str) -> Plan[int]:
        engine = yield from self._engined()
        removed = 0
        cursor: str | None = None
        while True:
            try:
                cursor, names = yield from scan_keys(
                    self._rows.rows + namespace, cursor, self._rows.clustered
                )
            except InvalidRequestError:
                cursor = None  # other masters since: what is removed stays so, the walk begins again
                continue
            keys = [name[len(self._rows.rows) :] for name in names]
            removed += len((yield from engine.remove(keys)))
            if cursor is None:
                return removed

    def _count(self) -> Plan[int]:
        return (yield from (yield from self._engined()).count())

    def _purge(self) -> Plan[int]:
        return (yield from (yield from self._engined()).purge(self._clock()))

    def _state(self, name: str) -> Plan[bytes | None]:
        state: bytes | None = yield one(("GET", self._rows.state(name)))
        return state

    # Which engine -------------------------------------------------------------------------------

    def _engined(self) -> Plan[Engine]:
        if self._engine is None:
            self._engine = yield from self._look()
        return self._engine

    def _look(self) -> Plan[Engine]:
        """Ask the server what it has, by commands of the engines' own. A name that it does not know is an
        error of another kind than one that this user may not use."""
        why = self._no_search
        if self._wanted != "vectorset" and not why:
            if (yield from self._has("FT._LIST")):
                return SearchEngine(self._rows, self._algorithm)
            why = "it has no RediSearch"
        if self._wanted != "search":
            if (yield from self._has("VCARD", f"{self.name}:set:")):
                return VectorSetEngine(self._rows)
            why = f"{why}, and no vector sets" if why else "it has no vector sets"
        address = self.connection.describe()["address"]
        raise StoreError(f"redis at {address}: {why}: {_NEED}", code="no_vector_search")

    def _has(self, *command: str) -> Plan[bool]:
        (reply,) = yield pipeline([command], strict=False)
        if isinstance(reply, Exception):
            if "unknown command" not in str(reply).lower():
                self.connection.fail(reply, self.connection.budget)
            return False
        return True

    @property
    def _no_search(self) -> str:
        """Why RediSearch cannot be used with this connection."""
        if self.connection.clustered:
            return "a Cluster"
        return "a database but 0" if self.connection.settings.arguments.get("db", 0) else ""

    # Checks and faces ---------------------------------------------------------------------------

    def _fix(self, dimensions: int) -> None:
        with self._fixing:
            if self._dimensions is None:
                self._dimensions = dimensions
        if dimensions != self._dimensions:
            raise mismatch(self._dimensions, dimensions)

    def _left(self, seconds: float) -> int | None:
        """How many milliseconds of the server's clock a row has left; None: it never leaves."""
        return milliseconds(seconds)

    def _run(self, plan: Plan[T]) -> T:
        return run(self.connection, plan)

    async def _arun(self, plan: Plan[T]) -> T:
        return await arun(self.connection, plan)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}", param=name)


def _check_scope(scope: Any) -> None:
    if not isinstance(scope, str) or not _SCOPE.fullmatch(scope):
        raise InvalidRequestError(f"scope: expected 64 hex digits, got {scope!r}", param="scope")
