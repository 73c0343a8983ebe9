"""Run the async core from sync code, with no event loop.

The core awaits only what a port hands it. With the sync port every wait is a blocking call inside, so a
coroutine runs to its end on the first ``send(None)``; one that does not was handed something truly async.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Generator
from typing import TypeVar

from .errors import SuspendedInSyncError

__all__ = ["iter_sync", "run_sync"]

T = TypeVar("T")


def run_sync(coroutine: Coroutine[object, object, T]) -> T:
    """The coroutine's result. `SuspendedInSyncError` where it would have to wait for an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    coroutine.close()
    raise SuspendedInSyncError("this must be awaited: use the async method (afetch, aget, ...) instead")


async def _next(chunks: AsyncIterator[T]) -> T:
    return await chunks.__anext__()


def iter_sync(chunks: AsyncIterator[T]) -> Generator[T, None, None]:
    """A generator over an async one; closing it closes that."""
    try:
        while True:
            try:
                item = run_sync(_next(chunks))
            except StopAsyncIteration:
                return
            yield item
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            run_sync(close())
