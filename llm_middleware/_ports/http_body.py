"""Bodies that go out piece by piece, for clients that take them from an async iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ..providers.messages import Pieces

__all__ = ["as_they_are_read"]


async def as_they_are_read(body: Pieces) -> AsyncIterator[bytes]:
    """The pieces of ``body``, each read in a thread: it may come from a disk."""
    pieces = body.pieces()
    while piece := await asyncio.to_thread(next, pieces, b""):
        yield piece
