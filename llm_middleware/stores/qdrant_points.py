"""`Collection`: what is asked of one collection of a Qdrant, and how keys, texts and times are written there.

A point is found by its key, from which its id is made, and its payload says when it is over: ``expires``, in
seconds since the epoch. Qdrant removes nothing by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar
from urllib.parse import quote
from uuid import UUID

from ..errors import ConfigError
from .qdrant_http import Ask, RefusedError, broken_answer

__all__ = ["NEVER", "Collection", "after", "broken_where", "from_wire", "here", "over", "point_id", "to_wire"]

T = TypeVar("T")
NEVER: Final = 1e18
"""Seconds since the epoch for what is never over: JSON has no infinity."""

_BATCH: Final = 1000  # ids in one request
_ESCAPED: Final = "json:"
_NAME: Final = re.compile(r'[^<>:"/\\|?*\x00-\x1f\ud800-\udfff]{1,255}')


class Collection:
    """What is asked of one collection, on one face. One that is not there has no points.

    ``indexes``: the payload fields that filters name, and their schemas. `ConfigError` for a name that Qdrant
    would not take.
    """

    def __init__(self, name: str, ask: Ask, indexes: Mapping[str, object]) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"collection: not a name of a Qdrant collection: {name!r}", param="collection")
        self.name = name
        self._ask = ask
        self._path = f"/collections/{quote(name, safe='')}"
        self._indexes = indexes
        self._made = False

    async def describe(self) -> Any:
        """What Qdrant tells of it; None where it is not there."""
        try:
            return await self._ask("GET", self._path)
        except RefusedError as exc:
            return _missing(exc, None)

    async def make(self, body: Mapping[str, object]) -> None:
        """Make it, if it is not there, and what it has no index for yet. Others may do so meanwhile."""
        if self._made:
            return
        found = await self.describe()
        if found is None:
            try:
                await self._ask("PUT", self._path, body, bulk=True)
            except RefusedError:
                if await self.describe() is None:  # else it was made by somebody else
                    raise
            found = {}
        known = found.get("payload_schema") or {}
        for name, schema in self._indexes.items():
            if name not in known:
                index = {"field_name": name, "field_schema": schema}
                await self._ask("PUT", f"{self._path}/index?wait=true", index, bulk=True)
        self._made = True

    async def put(self, body: Mapping[str, object], point: Mapping[str, object], **options: object) -> None:
        """Write a point; ``body`` makes the collection where it is not there (any more)."""
        await self.make(body)
        request = {"points": [point], **options}
        try:
            await self._ask("PUT", f"{self._path}/points?wait=true", request)
        except RefusedError as exc:
            _missing(exc, None)
            self._made = False
            await self.make(body)
            await self._ask("PUT", f"{self._path}/points?wait=true", request)

    async def payload(self, key: str) -> Mapping[str, Any] | None:
        """The payload of the point of ``key``; None where there is none."""
        request = {"ids": [point_id(key)], "with_payload": True}
        try:
            found = await self._ask("POST", f"{self._path}/points", request)
        except RefusedError as exc:
            return _missing(exc, None)
        with broken_where(self.name):
            return dict(found[0]["payload"]) if found else None

    async def set_payload(self, chosen: Mapping[str, object], payload: Mapping[str, object]) -> bool:
        """Change some fields of points that are there; False where Qdrant says that they are not."""
        request = {**chosen, "payload": payload}
        try:
            await self._ask("POST", f"{self._path}/points/payload?wait=true", request)
        except RefusedError as exc:
            return _missing(exc, False)
        return True

    async def query(self, request: Mapping[str, object]) -> list[Any]:
        try:
            found = await self._ask("POST", f"{self._path}/points/query", request)
        except RefusedError as exc:
            return _missing(exc, [])
        with broken_where(self.name):
            return list(found["points"])

    async def scroll(self, request: Mapping[str, object]) -> tuple[list[Any], str | None]:
        """A page of points, and where the next one begins."""
        try:
            found = await self._ask("POST", f"{self._path}/points/scroll", request)
        except RefusedError as exc:
            return _missing(exc, ([], None))
        with broken_where(self.name):
            return list(found["points"]), found["next_page_offset"]

    async def count(self, *conditions: Mapping[str, object]) -> int:
        request = {"exact": True, **({"filter": {"must": conditions}} if conditions else {})}
        try:
            found = await self._ask("POST", f"{self._path}/points/count", request, bulk=True)
        except RefusedError as exc:
            return _missing(exc, 0)
        with broken_where(self.name):
            return int(found["count"])

    async def remove(
        self, *conditions: Mapping[str, object], counted: Sequence[Mapping[str, object]] = ()
    ) -> int:
        """Remove the points of which all ``conditions`` hold; of how many all of ``counted`` held as well."""
        count = await self.count(*conditions, *counted)
        request = {"filter": {"must": conditions}}
        try:
            await self._ask("POST", f"{self._path}/points/delete?wait=true", request, bulk=True)
        except RefusedError as exc:
            return _missing(exc, 0)
        return count

    async def remove_keys(self, keys: Sequence[str], now: float) -> int:
        """Remove the points of ``keys``; how many were there and not over."""
        ids = list(dict.fromkeys(map(point_id, keys)))
        count = 0
        for first in range(0, len(ids), _BATCH):
            count += await self.remove({"has_id": ids[first : first + _BATCH]}, counted=[after(now)])
        return count


@contextlib.contextmanager
def broken_where(name: str) -> Iterator[None]:
    """What is read inside is an answer of Qdrant's; one that is not as it should be is a `StoreError`."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError) as exc:
        raise broken_answer(f"collection {name!r}") from exc


def _missing(exc: RefusedError, instead: T) -> T:
    """``instead``, where the collection or the point is not there; raises any other error."""
    if exc.answered != 404:
        raise exc
    return instead


def here(field: str, value: str) -> dict[str, object]:
    """The condition that a field is exactly ``value``."""
    return {"key": field, "match": {"value": value}}


def after(now: float) -> dict[str, object]:
    """The condition that a point is not over."""
    return {"key": "expires", "range": {"gt": now}}


def over(now: float) -> dict[str, object]:
    """The condition that a point is over."""
    return {"key": "expires", "range": {"lte": now}}


def point_id(key: str) -> str:
    """The point of a key: Qdrant takes numbers and UUIDs only."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return str(UUID(bytes=digest[:16], version=5))


def to_wire(text: str) -> str:
    """``text`` as a server takes it that knows no lone surrogates: itself where that is possible."""
    if not text.startswith(_ESCAPED):
        with contextlib.suppress(UnicodeEncodeError):
            text.encode()
            return text
    return _ESCAPED + json.dumps(text)


def from_wire(text: str) -> str:
    if not text.startswith(_ESCAPED):
        return text
    return str(json.loads(text[len(_ESCAPED) :]))
