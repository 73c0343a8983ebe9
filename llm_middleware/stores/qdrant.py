"""`QdrantStore`: answers in a Qdrant, as payloads of points without vectors; `States`: small values there.

For those who keep their vectors in Qdrant and want no second server: every read is an HTTP request, and every
value grows by a third, to base64. Qdrant removes nothing by itself: call `QdrantStore.purge_expired`.
"""

from __future__ import annotations

import base64
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias
from uuid import UUID

from .._drive import run_sync
from ..errors import CorruptEntryError, InvalidRequestError
from ..types import Clock
from .qdrant_http import Ask, QdrantHTTP
from .qdrant_points import (
    NEVER,
    Collection,
    after,
    broken_where,
    from_wire,
    here,
    over,
    point_id,
    to_wire,
)

__all__ = ["QdrantStore", "States"]

Page: TypeAlias = tuple[str | None, list[tuple[str, bytes]]]

_NO_VECTORS: Final[Mapping[str, object]] = {"vectors": {}}
_INDEXES: Final[Mapping[str, object]] = {"namespace": "keyword", "expires": "float"}
_PAGE: Final = 64  # entries in one answer, which holds all of their bytes


class QdrantStore:
    """Answers in one collection of a Qdrant, shared by all who use it. It is made at the first `set`.

    ``url``: ``http(s)://host[:port][/prefix]``. ``timeout``: seconds for one request; the few that go through
    many entries have 30. Neither importing nor making a store connects. ``clock`` gives seconds since the
    epoch. Whatever goes wrong is a `StoreError` whose ``code`` is ``timeout``, ``unreachable``,
    ``broken_answer`` or the HTTP status, such as ``http_401``.
    """

    tier = "qdrant"

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        collection: str = "llm-cache",
        timeout: float = 5.0,
        clock: Clock = time.time,
    ) -> None:
        self._http = QdrantHTTP(url, api_key=api_key, timeout=timeout)
        self._sync = _Entries(collection, self._http.ask, clock)
        self._async = _Entries(collection, self._http.aask, clock)

    def get(self, key: str) -> bytes | None:
        """The bytes under ``key``, or None where there are none or their time is over.

        `CorruptEntryError` for a point that this store did not write.
        """
        return run_sync(self._sync.get(key))

    def set(self, key: str, value: bytes, ttl: float | None) -> None:
        """Keep ``value`` for ``ttl`` seconds (None: until removed), replacing what was there.

        A value that is out of time still removes the old one.
        """
        run_sync(self._sync.set(key, value, ttl))

    def delete(self, keys: Sequence[str]) -> int:
        """Remove ``keys``; how many were there and alive."""
        return run_sync(self._sync.delete(keys))

    def flush(self, namespace: str) -> int:
        """Remove the entries of exactly this namespace; how many, those included whose time was over."""
        return run_sync(self._sync.flush(namespace))

    def purge_expired(self) -> int:
        """Remove every entry whose time is over; how many."""
        return run_sync(self._sync.purge())

    def heads(self, namespace: str, cursor: str | None, size: int) -> Page:
        """The next page of exactly ``namespace``: its cursor, None at the end, and entries as (key, first
        ``size`` bytes). ``cursor``: None to begin, else as the last page gave it; `InvalidRequestError` for
        any other. Whole values are read."""
        return run_sync(self._sync.heads(namespace, cursor, size))

    def ping(self) -> dict[str, object]:
        """Ask for the collection: ``latency_ms``, and what is known of the connection, without secrets."""
        began = time.perf_counter()
        found = run_sync(self._sync.collection.describe())
        return self._facts(began, found)

    def close(self) -> None:
        """Close this process's connections. The next call opens others."""
        self._http.close()

    async def aget(self, key: str) -> bytes | None:
        return await self._async.get(key)

    async def aset(self, key: str, value: bytes, ttl: float | None) -> None:
        await self._async.set(key, value, ttl)

    async def adelete(self, keys: Sequence[str]) -> int:
        return await self._async.delete(keys)

    async def aflush(self, namespace: str) -> int:
        return await self._async.flush(namespace)

    async def apurge_expired(self) -> int:
        return await self._async.purge()

    async def aheads(self, namespace: str, cursor: str | None, size: int) -> Page:
        return await self._async.heads(namespace, cursor, size)

    async def aping(self) -> dict[str, object]:
        began = time.perf_counter()
        return self._facts(began, await self._async.collection.describe())

    async def aclose(self) -> None:
        await self._http.aclose()

    def _facts(self, began: float, found: Any) -> dict[str, object]:
        return {
            "latency_ms": round((time.perf_counter() - began) * 1e3, 3),
            "endpoint": self._http.url,
            "collection": self._sync.collection.name,
            "points": 0 if found is None else found.get("points_count"),
        }


class _Entries:
    """The operations of a store, written once; ``ask``: how one of its faces waits."""

    def __init__(self, collection: str, ask: Ask, clock: Clock) -> None:
        self.collection = Collection(collection, ask, _INDEXES)
        self._clock = clock

    async def get(self, key: str) -> bytes | None:
        found = await self.collection.payload(key)
        if found is None:
            return None
        try:
            if from_wire(found["key"]) != key:
                return None
            expires, value = float(found["expires"]), _decoded(found["value"])
        except (LookupError, TypeError, ValueError, AttributeError):
            raise CorruptEntryError("a point that this store did not write") from None
        return value if expires > self._clock() else None

    async def set(self, key: str, value: bytes, ttl: float | None) -> None:
        if ttl is not None and ttl <= 0:
            await self.delete([key])
            return
        expires = NEVER if ttl is None or ttl == math.inf else min(self._clock() + ttl, NEVER)
        payload = {
            "key": to_wire(key),
            "namespace": to_wire(key.rpartition(":")[0]),
            "expires": expires,
            "value": _encoded(value),
        }
        await self.collection.put(_NO_VECTORS, {"id": point_id(key), "vector": {}, "payload": payload})

    async def delete(self, keys: Sequence[str]) -> int:
        return await self.collection.remove_keys(keys, self._clock())

    async def flush(self, namespace: str) -> int:
        return await self.collection.remove(here("namespace", to_wire(namespace)))

    async def purge(self) -> int:
        return await self.collection.remove(over(self._clock()))

    async def heads(self, namespace: str, cursor: str | None, size: int) -> Page:
        conditions = [here("namespace", to_wire(namespace)), after(self._clock())]
        request: dict[str, object] = {"filter": {"must": conditions}, "limit": _PAGE, "with_payload": True}
        if cursor is not None:
            request["offset"] = _checked_cursor(cursor)
        points, following = await self.collection.scroll(request)
        with broken_where(self.collection.name):
            payloads = [point["payload"] for point in points]
            heads = [(from_wire(each["key"]), _decoded(each["value"])[:size]) for each in payloads]
        return following, heads


class States:
    """Values of a few kilobytes by name, each written only in place of the one that its writer has read.

    A value that is there is changed by one conditional write, of which Qdrant does one after another, so that
    of many in the same instant exactly one succeeds. The first value under a name is written so too by Qdrant
    1.16 and later; in an older one, which knows no such condition, of two the later stays and both succeed.
    """

    def __init__(self, collection: str, ask: Ask) -> None:
        self._collection = Collection(collection, ask, {})

    async def get(self, name: str) -> bytes | None:
        found = await self._collection.payload(name)
        if found is None:
            return None
        with broken_where(self._collection.name):
            return _decoded(found["value"])

    async def keep(self, name: str, data: bytes, before: bytes | None) -> bool:
        """Keep ``data`` if what is there is still ``before`` (None: nothing); whether that was so."""
        found = await self._collection.payload(name)
        with broken_where(self._collection.name):
            was = None if found is None else _decoded(found["value"])
            last = "" if found is None else str(found["token"])
        if was != before:
            return False
        mine = uuid.uuid4().hex
        payload = {"key": to_wire(name), "value": _encoded(data), "token": mine, "last": last}
        if before is None:
            # The condition is of what is there already, and holds for nothing that is: then it stays.
            point = {"id": point_id(name), "vector": {}, "payload": payload}
            never = {"must": [here("token", mine)]}
            await self._collection.put(_NO_VECTORS, point, update_filter=never)
        else:
            unchanged = [{"has_id": [point_id(name)]}, here("token", last)]
            await self._collection.set_payload({"filter": {"must": unchanged}}, payload)
        now = await self._collection.payload(name)
        # Qdrant does not tell whether the condition held. ``last``: another has built on what we wrote.
        return now is not None and mine in (now.get("token"), now.get("last"))


def _encoded(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _decoded(value: str) -> bytes:
    return base64.b64decode(value, validate=True)


def _checked_cursor(cursor: object) -> str:
    try:
        if isinstance(cursor, str) and str(UUID(cursor)) == cursor:
            return cursor
    except ValueError:
        pass
    raise InvalidRequestError("cursor: not one that this store gave", param="cursor")
