"""The nearest rows by RediSearch: Redis 8 as it is delivered, Redis Stack, or any Redis with that module.

One index, ``<name>:<dimensions>``, for all scopes: the scope is a filter. The vector lies in the row's hash,
in a field of its own for each number of dimensions, so vectors of two models are never compared. Redis keeps
the index up to date with the hashes, also when one leaves by itself, and builds it from them in the
background where it is made anew. RediSearch keeps an index on each node of a Cluster: that is not for here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ..errors import StoreError
from ..stores.redis_plan import Command, Plan, one
from .records import Neighbour
from .redis_rows import PUT_ROW, Entry, Rows, Taken, decoded, encoded, neighbour, script

__all__ = ["SearchEngine"]

_MISSING: Final = re.compile(r"no such index|unknown index|index not found", re.IGNORECASE)
_PAGE: Final = 200  # rows that are over, removed in one go
_SHOWN: Final = ("distance", "text", "payload", "expires")
# Measured: finds the nearest of 10 000 directions at random, the hardest case, in 99 of 100 searches.
_EFFORT: Final = {"flat": (), "hnsw": ("EF_RUNTIME", 500)}
_PUT: Final = script(PUT_ROW + "put_row(KEYS[1], ARGV[1], 2)")


class SearchEngine:
    """``algorithm``: ``flat`` compares every row of a scope, ``hnsw`` walks a graph; of indexes made here."""

    def __init__(self, rows: Rows, algorithm: str) -> None:
        self._rows = rows
        self._algorithm = algorithm
        self._made: set[int] = set()

    def add(self, entry: Entry, now: float) -> Plan[None]:
        if entry.dims not in self._made:
            yield from self._make(entry.dims)
        fields = [*entry.fields(), _field(entry.dims), entry.row.vector]
        yield from self._rows.call([(_PUT, [self._rows.row(entry.row.key)], [entry.lives, *fields])])

    def search(
        self, scope: str, vector: bytes, dims: int, k: int, now: float, *, known: bool
    ) -> Plan[list[Neighbour]]:
        command = self._nearest(scope, vector, dims, k, now)
        try:
            reply = yield one(command)
        except StoreError as exc:
            if not _MISSING.search(str(exc)):
                raise
            if not known:
                return []
            yield from self._make(dims)
            reply = yield one(command)
        found = []
        for name, fields in _documents(reply):
            fields["scope"] = scope.encode()
            found.append(neighbour(self._rows.key(name), 1 - float(fields["distance"]), fields))
        return found

    def remove(self, keys: Sequence[str]) -> Plan[list[Taken]]:
        return (yield from self._rows.take(keys))

    def count(self) -> Plan[int]:
        index = yield from self._any()
        if index is None:
            return 0
        reply = yield one(("FT.SEARCH", index, "*", "LIMIT", 0, 0, "DIALECT", 2))
        return int(reply[b"total_results"] if isinstance(reply, Mapping) else reply[0])

    def purge(self, now: float) -> Plan[int]:
        index = yield from self._any()
        removed = 0
        while index is not None:
            over = f"@over:[-inf {now!r}]"
            reply = yield one(("FT.SEARCH", index, over, "NOCONTENT", "LIMIT", 0, _PAGE, "DIALECT", 2))
            keys = [self._rows.key(name) for name in _names(reply)]
            taken = yield from self._rows.take(keys, over=now)
            removed += len(taken)
            if not taken:
                break
        return removed

    def _any(self) -> Plan[bytes | None]:
        """An index that has all rows, whatever their dimensions: they all do."""
        ours = re.compile(re.escape(encoded(self._rows.name)) + rb":[0-9]+")
        return next((index for index in (yield one(("FT._LIST",))) if ours.fullmatch(index)), None)

    def _make(self, dims: int) -> Plan[None]:
        """Make the index, if no other process has."""
        effort = _EFFORT[self._algorithm]
        vector = ("TYPE", "FLOAT32", "DIM", dims, "DISTANCE_METRIC", "COSINE", *effort)
        schema = ("scope", "TAG", "CASESENSITIVE", "expires", "AS", "over", "NUMERIC", _field(dims), "VECTOR")
        rows = ("ON", "HASH", "PREFIX", 1, encoded(self._rows.rows), "SCHEMA")
        command = ("FT.CREATE", self._index(dims), *rows, *schema, self._algorithm.upper(), len(vector))
        try:
            yield one((*command, *vector))
        except StoreError as exc:
            if "already exists" not in str(exc):
                raise
        self._made.add(dims)

    def _nearest(self, scope: str, vector: bytes, dims: int, k: int, now: float) -> Command:
        mine = f"(@scope:{{{scope}}} @over:[({now!r} +inf])"
        query = f"{mine}=>[KNN {k} @{_field(dims)} $vector AS distance]"
        how = ("RETURN", len(_SHOWN), *_SHOWN, "SORTBY", "distance", "LIMIT", 0, k, "DIALECT", 2)
        return ("FT.SEARCH", self._index(dims), query, "PARAMS", 2, "vector", vector, *how)

    def _index(self, dims: int) -> bytes:
        return encoded(f"{self._rows.name}:{dims}")


def _field(dims: int) -> str:
    return f"v{dims}"


def _names(reply: Any) -> list[bytes]:
    """The documents of a reply without their content."""
    if isinstance(reply, Mapping):
        return [document[b"id"] for document in reply[b"results"]]
    return list(reply[1:])


def _documents(reply: Any) -> Iterator[tuple[bytes, dict[str, bytes]]]:
    """The documents of a reply: a map where the connection speaks RESP 3. One that left while it was being
    made has no fields."""
    if isinstance(reply, Mapping):
        pairs = [(document[b"id"], document.get(b"extra_attributes")) for document in reply[b"results"]]
    else:
        lists = zip(reply[1::2], reply[2::2], strict=True)
        pairs = [
            (name, dict(zip(flat[::2], flat[1::2], strict=True)) if flat else None) for name, flat in lists
        ]
    for name, fields in pairs:
        if fields and len(fields) >= len(_SHOWN):
            yield name, {decoded(field): value for field, value in fields.items()}
