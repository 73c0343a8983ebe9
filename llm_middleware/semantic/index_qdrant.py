"""A vector index in a Qdrant (1.11 or later), shared by every process that may use it.

One collection holds all rows; each search is within its scope by a filter, for which Qdrant keeps a graph of
each large scope and compares all rows of a small one. Where vectors are quantized, the best by their short
form are compared by the whole one, so that similarities are exact. What the clock says is over is never
found, and goes by `QdrantIndex.purge`. States are in a second collection, ``<collection>-state``.
"""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NoReturn

from .._drive import run_sync
from ..errors import ConfigError, InvalidRequestError, StoreError
from ..stores.qdrant import States
from ..stores.qdrant_http import Ask, QdrantHTTP, RefusedError
from ..stores.qdrant_points import (
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
from ..types import Clock
from .checks import check_expires, check_floats, check_k, check_unit, payload_text
from .records import Neighbour, Row

__all__ = ["QdrantIndex"]

_INDEXES: Final[Mapping[str, object]] = {
    "scope": {"type": "keyword", "is_tenant": True},
    "namespace": "keyword",
    "expires": "float",
}
# No graph over all rows, as nobody searches all; one for each scope that is large.
_GRAPH: Final[Mapping[str, object]] = {"m": 0, "payload_m": 16}
_EFFORT: Final = 256  # rows that a search in a graph keeps in sight
_CANDIDATES: Final = 100  # rows that are compared by their whole vectors, where there are short ones
_QUANTIZATION: Final[Mapping[str, Mapping[str, object]]] = {
    "binary": {"binary": {"always_ram": True}},
    "scalar": {"scalar": {"type": "int8", "quantile": 0.99, "always_ram": True}},
    "product": {"product": {"compression": "x16", "always_ram": True}},
}


class QdrantIndex:
    """A `VectorIndex` and an `AsyncVectorIndex` over Qdrant's REST API.

    ``url``: ``http(s)://host[:port][/prefix]``. ``dimensions``: of the vectors; where it is None, those of
    the collection, or of the first row, which makes the collection. ``quantization``: of a collection that is
    made here; the whole vectors are then on disk. ``timeout``: seconds for one request; the few that go
    through many rows have 30. Neither importing nor making an index connects.

    Besides `InvalidRequestError`, whatever goes wrong is a `StoreError` whose ``code`` is ``timeout``,
    ``unreachable``, ``broken_answer``, ``wrong_collection`` or the HTTP status, such as ``http_401``.
    """

    inline = False
    keeps_over = True  # rows that are over stay until they are purged

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        collection: str = "llm-semantic",
        dimensions: int | None = None,
        quantization: Literal["binary", "scalar", "product"] | None = None,
        timeout: float = 5.0,
        clock: Clock = time.time,
    ) -> None:
        if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
            message = f"dimensions: expected a whole number >= 1, got {dimensions!r}"
            raise ConfigError(message, param="dimensions")
        if quantization is not None and quantization not in _QUANTIZATION:
            known = ", ".join(map(repr, _QUANTIZATION))
            message = f"quantization: expected {known} or None, got {quantization!r}"
            raise ConfigError(message, param="quantization")
        self._http = QdrantHTTP(url, api_key=api_key, timeout=timeout)
        size = _Size(dimensions)
        self._sync, self._async = (
            _Rows(collection, ask, size, quantization, clock) for ask in (self._http.ask, self._http.aask)
        )

    @property
    def dimensions(self) -> int | None:
        return self._sync.size.known

    def add(self, row: Row) -> None:
        run_sync(self._sync.add(row))

    def update(self, key: str, payload: Mapping[str, object]) -> bool:
        return run_sync(self._sync.update(key, payload))

    def search(self, scope: str, vector: bytes, k: int) -> list[Neighbour]:
        return run_sync(self._sync.search(scope, vector, k))

    def remove(self, keys: Sequence[str]) -> int:
        return run_sync(self._sync.remove(keys))

    def flush(self, namespace: str) -> int:
        return run_sync(self._sync.flush(namespace))

    def count(self) -> int:
        return run_sync(self._sync.count())

    def purge(self) -> int:
        return run_sync(self._sync.purge())

    def state(self, name: str) -> bytes | None:
        return run_sync(self._sync.states.get(name))

    def keep_state(self, name: str, data: bytes, before: bytes | None) -> bool:
        """As in `VectorIndex`; with a Qdrant before 1.16, `States` tells of the one case that differs."""
        return run_sync(self._sync.states.keep(name, data, before))

    def close(self) -> None:
        """Close this process's connections. It may be used again."""
        self._http.close()

    async def aadd(self, row: Row) -> None:
        await self._async.add(row)

    async def aupdate(self, key: str, payload: Mapping[str, object]) -> bool:
        return await self._async.update(key, payload)

    async def asearch(self, scope: str, vector: bytes, k: int) -> list[Neighbour]:
        return await self._async.search(scope, vector, k)

    async def aremove(self, keys: Sequence[str]) -> int:
        return await self._async.remove(keys)

    async def aflush(self, namespace: str) -> int:
        return await self._async.flush(namespace)

    async def acount(self) -> int:
        return await self._async.count()

    async def apurge(self) -> int:
        return await self._async.purge()

    async def astate(self, name: str) -> bytes | None:
        return await self._async.states.get(name)

    async def akeep_state(self, name: str, data: bytes, before: bytes | None) -> bool:
        return await self._async.states.keep(name, data, before)

    async def aclose(self) -> None:
        await self._http.aclose()


class _Size:
    """The length of the vectors: as it was given, or else as it was found."""

    def __init__(self, given: int | None) -> None:
        self.given = given
        self.known = given


class _Rows:
    """The operations of an index, written once; ``ask``: how one of its faces waits."""

    def __init__(
        self, collection: str, ask: Ask, size: _Size, quantization: str | None, clock: Clock
    ) -> None:
        self.size = size
        self.states = States(f"{collection}-state", ask)
        self._points = Collection(collection, ask, _INDEXES)
        self._quantization = quantization
        self._clock = clock

    async def add(self, row: Row) -> None:
        point = {"id": point_id(row.key), "vector": _values(row.vector), "payload": _payload(row)}
        size = len(point["vector"])
        await self._check(size)
        if row.expires <= self._clock():
            await self.remove([row.key])
            return
        try:
            await self._points.put(self._made_with(size), point)
        except RefusedError as exc:
            await self._explain(exc, size)
        self.size.known = size

    async def update(self, key: str, payload: Mapping[str, object]) -> bool:
        # By its id: Qdrant writes no payload where there is no point, and says so.
        chosen = {"points": [point_id(key)]}
        return await self._points.set_payload(chosen, {"payload": _json(payload)})

    async def search(self, scope: str, vector: bytes, k: int) -> list[Neighbour]:
        check_k(k)
        values, now = _values(vector), self._clock()
        await self._check(len(values))
        request = {
            "query": values,
            "filter": {"must": [here("scope", scope), after(now)]},
            "params": {
                "hnsw_ef": max(_EFFORT, 2 * k),
                "quantization": {"rescore": True, "oversampling": max(2.0, _CANDIDATES / k)},
            },
            "limit": k,
            "with_payload": True,
        }
        try:
            found = await self._points.query(request)
        except RefusedError as exc:
            await self._explain(exc, len(values))
        with broken_where(self._points.name):
            return [_neighbour(point, scope) for point in found]

    async def remove(self, keys: Sequence[str]) -> int:
        return await self._points.remove_keys(keys, self._clock())

    async def flush(self, namespace: str) -> int:
        mine = here("namespace", to_wire(namespace))
        return await self._points.remove(mine, counted=[after(self._clock())])

    async def count(self) -> int:
        return await self._points.count()

    async def purge(self) -> int:
        return await self._points.remove(over(self._clock()))

    def _made_with(self, size: int) -> Mapping[str, object]:
        vectors: dict[str, object] = {"size": size, "distance": "Cosine"}
        if self._quantization is None:
            return {"vectors": vectors, "hnsw_config": _GRAPH}
        # What is quantized is kept in memory; the whole vectors need not be there too.
        return {
            "vectors": {**vectors, "on_disk": True},
            "hnsw_config": _GRAPH,
            "quantization_config": _QUANTIZATION[self._quantization],
        }

    async def _check(self, size: int) -> None:
        """`InvalidRequestError` for a vector of another length; one that was only found may be outdated."""
        if self.size.known in (None, size):
            return
        if self.size.given is None:
            self.size.known = await self._found()
        if self.size.known not in (None, size):
            raise self._mismatch(self.size.known, size)

    async def _explain(self, refused: RefusedError, size: int) -> NoReturn:
        """Raise what a refusal means: Qdrant refuses vectors of another length than its collection has."""
        found = await self._found() if refused.answered == 400 else None
        if found is None or found == size:
            raise refused
        if self.size.given is None:
            self.size.known = found
        raise self._mismatch(found, size)

    async def _found(self) -> int | None:
        """The length of the collection's vectors; None where there is no collection."""
        found = await self._points.describe()
        if found is None:
            return None
        with broken_where(self._points.name):
            vectors = found["config"]["params"]["vectors"]
            if "size" in vectors and vectors["distance"] == "Cosine":
                return int(vectors["size"])
        message = f"qdrant collection {self._points.name!r} is not one of cosine vectors without a name"
        raise StoreError(message, code="wrong_collection")

    def _mismatch(self, expected: object, got: int) -> InvalidRequestError:
        message = (
            f"vector: the Qdrant collection {self._points.name!r} holds {expected} dimensions, got {got}; "
            "is the embedding model another one?"
        )
        return InvalidRequestError(message, param="vector")


def _values(vector: bytes) -> tuple[float, ...]:
    check_floats(vector)
    values = struct.unpack(f"<{len(vector) // 4}f", vector)
    check_unit(math.hypot(*values))
    return values


def _payload(row: Row) -> dict[str, object]:
    check_expires(row)
    return {
        "key": to_wire(row.key),
        "scope": row.scope,
        "namespace": to_wire(row.key.rpartition(":")[0]),
        "text": to_wire(row.text),
        "expires": min(row.expires, NEVER),
        "payload": _json(row.payload),
    }


def _json(payload: Mapping[str, object]) -> str:
    """As text: it comes back as it went in, whatever Qdrant makes of numbers and of surrogates."""
    return payload_text(payload) or "{}"


def _neighbour(point: Mapping[str, Any], scope: str) -> Neighbour:
    payload = point["payload"]
    expires = float(payload["expires"])
    row = Row(
        key=from_wire(payload["key"]),
        scope=scope,
        text=from_wire(payload["text"]),
        vector=b"",
        expires=math.inf if expires >= NEVER else expires,
        payload=json.loads(payload["payload"]),
    )
    return Neighbour(row, min(1.0, float(point["score"])))
