"""`IteratedReply`: a `Reply` that is the iterator over its own body."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

__all__ = ["IteratedReply"]


class IteratedReply(ABC):
    """A client's replies say how the next piece comes, and how they are closed."""

    __slots__ = ()

    async def read(self) -> bytes:
        return b"".join([chunk async for chunk in self])

    def chunks(self) -> AsyncIterator[bytes]:
        return self

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    @abstractmethod
    async def __anext__(self) -> bytes: ...
