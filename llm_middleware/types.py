"""Protocols and aliases shared by every room: what a store, a clock and a set of headers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

__all__ = ["AsyncStore", "Clock", "Headers", "Kind", "SizeOf", "Store"]

Clock: TypeAlias = Callable[[], float]
"""Seconds since the epoch (``time.time``): entries outlive processes, so the clock is the wall's."""

Headers: TypeAlias = tuple[tuple[bytes, bytes], ...]
"""Lower-case names and values, latin-1, as ASGI has them."""

Kind: TypeAlias = Literal["chat", "text", "embedding", "transcription", "responses", "messages", "json"]
"""Endpoint kinds: which fields, defaults, stream shape and admission rules hold for a request."""

SizeOf: TypeAlias = Callable[[object], int]


@runtime_checkable
class Store(Protocol):
    """The sync face of a store: bytes by key, with a time to live.

    Keys are ``<namespace>:<64 hex digits>``. Every method may raise; the caller counts the failure
    and treats it as a miss. A store that answers in microseconds without I/O sets ``inline = True``
    and is called directly on an event loop; others are called in a worker thread there, or have the
    async face (`AsyncStore`) as well.
    """

    tier: str
    """What ``x-llm-cache-tier`` says of a hit here: ``memory``, ``disk``, ``redis`` ..."""

    def get(self, key: str) -> bytes | None:
        """The bytes stored under ``key``, or None where there are none or their time is over."""
        ...

    def set(self, key: str, value: bytes, ttl: float | None) -> None:
        """Keep ``value`` for ``ttl`` seconds (None: until evicted), replacing what was there."""
        ...

    def delete(self, keys: Sequence[str]) -> int:
        """Remove ``keys``; how many of them were there."""
        ...

    def flush(self, namespace: str) -> int:
        """Remove every key of exactly this namespace and of no other; how many there were."""
        ...

    def close(self) -> None:
        """Release files and connections. The store may be used again and then re-opens itself."""
        ...


@runtime_checkable
class AsyncStore(Protocol):
    """The async face of a store: the same contract, awaited."""

    tier: str

    async def aget(self, key: str) -> bytes | None: ...

    async def aset(self, key: str, value: bytes, ttl: float | None) -> None: ...

    async def adelete(self, keys: Sequence[str]) -> int: ...

    async def aflush(self, namespace: str) -> int: ...

    async def aclose(self) -> None: ...
