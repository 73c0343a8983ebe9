"""`Answer`: what `fetch` and `get` return, and `CacheInfo`: what the cache did for it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from .._drive import iter_sync, run_sync
from ..types import Headers

__all__ = ["Answer", "CacheInfo", "Found"]


@dataclass(slots=True)
class CacheInfo:
    """What the cache did, in the words of the response headers.

    ``status``: ``hit``, ``semantic-hit``, ``stale``, ``miss``, ``collapsed``, ``partial`` or ``bypass``.
    ``key``: the cache key (64 hex digits). ``detail``: a reason code. ``forward``: why the request went on,
    as RFC 9211 names it. ``age`` and ``ttl``: seconds; ``ttl`` is negative for a stale answer.
    ``similarity``: of the nearest stored question where one was looked for by meaning, a cosine; on a hit of
    that, ``key`` is the stored answer's."""

    status: str
    key: str | None = None
    detail: str | None = None
    forward: str | None = None
    stored: bool = False
    age: float | None = None
    ttl: float | None = None
    tier: str | None = None
    similarity: float | None = None


@dataclass(slots=True)
class Answer:
    """An answer, from the cache or fresh.

    A plain one has ``body`` (bytes), ``text`` and ``json()``. A streamed one is iterated, with ``for`` or
    ``async for``, and gives the stream's bytes event by event; `close`/`aclose` ends it early. ``cache``
    tells what the cache did.
    """

    cache: CacheInfo
    status: int = 200
    headers: Headers = ()
    body: bytes = b""
    stream: Callable[[], AsyncIterator[bytes]] | None = None
    _chunks: AsyncIterator[bytes] | None = field(default=None, repr=False)

    @property
    def streamed(self) -> bool:
        return self.stream is not None

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def json(self) -> object:
        return json.loads(self.body)

    def chunks(self) -> AsyncIterator[bytes]:
        """The stream's chunks, once; a plain answer is one chunk."""
        if self._chunks is None:
            self._chunks = self.stream() if self.stream is not None else _one(self.body)
        return self._chunks

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.chunks()

    def __iter__(self) -> Iterator[bytes]:
        return iter_sync(self.chunks())

    async def aclose(self) -> None:
        close = getattr(self.chunks(), "aclose", None)
        if close is not None:
            await close()

    def close(self) -> None:
        run_sync(self.aclose())


async def _one(body: bytes) -> AsyncIterator[bytes]:
    yield body


@dataclass(slots=True)
class Found:
    """A stored answer that fits a request. ``stale``: past its time; ``revalidate``: and to be refreshed.

    ``like``: of an answer to another question, how that was found (``semantic``, ``normalized``); then
    ``key`` is the answer's own cache key, and ``similarity`` that of the questions."""

    headers: Headers
    body: bytes
    chunks: list[bytes] | None
    age: float
    ttl: float
    tier: str
    stale: str | None = None
    status: int = 200
    like: str | None = None
    key: str = ""
    similarity: float = 1.0

    def info(self, digest: str) -> CacheInfo:
        """What to tell of it where it answers a request whose cache key is ``digest``."""
        if self.like is not None:
            info = CacheInfo("semantic-hit", self.key, self.like, similarity=self.similarity)
        else:
            info = CacheInfo("stale" if self.stale else "hit", digest, self.stale)
        info.age, info.ttl, info.tier = self.age, self.ttl, self.tier
        return info
