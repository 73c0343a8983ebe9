"""`Index`: a vector index as requests use it: on the face of its caller, within a budget, left alone for a
moment while it fails, and with texts that it cannot read where the cache is encrypted."""

from __future__ import annotations

import base64
import binascii
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .._ports.protocol import Port
from ..caching.at_rest import AtRest
from ..caching.breaker import Breaker
from ..errors import CorruptEntryError, InvalidRequestError, StoreError
from .records import Neighbour, Row

__all__ = ["Index"]

logger = logging.getLogger("llm_middleware")

_PURGE = 600.0  # seconds between two times that rows which are over are removed from where they stay


class Index:
    """``index``: a `VectorIndex` or an `AsyncVectorIndex`. ``budget``: seconds that an operation may take.
    ``at_rest``: how texts lie in it; None: as they are. Vectors are never hidden, or nothing could be
    compared. Every method raises what the index raises, and `StoreError` where it is not asked."""

    def __init__(self, index: Any, *, budget: float, at_rest: AtRest | None = None) -> None:
        self.index = index
        self._budget = budget
        self._inline = bool(getattr(index, "inline", False))
        self._at_rest = at_rest
        self._breaker = Breaker()
        self._purge_at = time.monotonic() + _PURGE if getattr(index, "keeps_over", False) else None

    async def search(self, port: Port, scope: str, vector: bytes, k: int) -> list[Neighbour]:
        if self._inline:
            found: list[Neighbour] = self.index.search(scope, vector, k)
        else:
            found = await self._ask(port, "search", scope, vector, k)
        return (
            found if self._at_rest is None else [one for one in map(self._opened, found) if one is not None]
        )

    async def add(self, port: Port, row: Row, caller: str) -> None:
        """``caller``: whose answer it is, as in the cache key."""
        if self._at_rest is not None:
            text = self._at_rest.seal(row.text.encode("utf-8", "surrogatepass"), key=row.key, scope=caller)
            row = replace(row, text=base64.b64encode(text).decode())
        if self._inline:
            self.index.add(row)
        else:
            await self._ask(port, "add", row)
        if self._purge_at is not None and time.monotonic() >= self._purge_at:
            self._purge_at = time.monotonic() + _PURGE
            port.spawn(lambda: self._purged(port))

    def _opened(self, one: Neighbour) -> Neighbour | None:
        """With its text; None where that was sealed for another name, or with a key that is not known
        here."""
        assert self._at_rest is not None
        try:
            text = self._at_rest.open(base64.b64decode(one.row.text, validate=True), key=one.row.key)
            return replace(one, row=replace(one.row, text=text.decode("utf-8", "surrogatepass")))
        except (CorruptEntryError, binascii.Error, UnicodeDecodeError):
            return None

    async def _purged(self, port: Port) -> None:
        try:
            await self.purge(port)
        except Exception as exc:
            logger.debug("a vector index could not be purged: %s", exc)

    async def update(self, port: Port, key: str, payload: Mapping[str, object]) -> bool:
        if self._inline:
            return bool(self.index.update(key, payload))
        return bool(await self._ask(port, "update", key, payload))

    async def remove(self, port: Port, keys: Sequence[str]) -> int:
        return int(await self._ask(port, "remove", keys))

    async def flush(self, port: Port, namespace: str) -> int:
        return int(await self._ask(port, "flush", namespace, bounded=False))

    async def state(self, port: Port, name: str) -> bytes | None:
        state: bytes | None = await self._ask(port, "state", name)
        return state

    async def keep_state(self, port: Port, name: str, data: bytes, before: bytes | None) -> bool:
        return bool(await self._ask(port, "keep_state", name, data, before))

    async def purge(self, port: Port) -> int:
        return int(await self._ask(port, "purge", bounded=False))

    async def close(self, port: Port) -> None:
        await port.store(self.index, "close")

    async def _ask(self, port: Port, operation: str, *args: object, bounded: bool = True) -> Any:
        if not self._breaker.allow():
            raise StoreError("the vector index is not asked, it failed a moment ago", code="breaker_open")
        try:
            result = await port.store(self.index, operation, *args, budget=self._budget if bounded else None)
        except InvalidRequestError:
            self._breaker.succeeded()
            raise
        except Exception:
            self._breaker.failed()
            raise
        self._breaker.succeeded()
        return result
