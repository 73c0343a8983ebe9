"""Send in the caller's own task, and give a send that is stuck to another task once others wait.

A send that completes costs nothing extra: its coroutine is stepped in place. When the server makes it wait
(its client reads slowly), the future it waits for is watched together with the flight: if a reader joins
before that future is done, the rest of the coroutine is returned for a task of its own, and the caller is
free. This is a writer's queue that exists only from the moment it is needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from functools import partial
from typing import Any

from ..caching.flight import Flight

__all__ = ["Sending", "send_or_hand_over"]


_UNBEGUN = object()


class _Rest:
    """The remainder of a coroutine that waits for ``pending``."""

    def __init__(self, step: Generator[Any, Any, None], pending: asyncio.Future[object]) -> None:
        self._step = step
        self._pending = pending

    def __await__(self) -> Generator[Any, Any, None]:
        try:
            yield from self._pending.__await__()
        except BaseException as exc:
            return (yield from _thrown(self._step, exc))
        yield from self._step
        return None


def _thrown(step: Generator[Any, Any, None], exc: BaseException) -> Generator[Any, Any, None]:
    try:
        pending = step.throw(exc)
    except StopIteration:
        return
    yield pending
    yield from step


class Sending:
    """Runs a send until it is done or a reader joins while it is stuck; then returns its `_Rest`."""

    def __init__(self, step: Generator[Any, Any, None], flight: Flight, pending: object = _UNBEGUN) -> None:
        self._step = step
        self._pending = pending
        self._flight = flight

    def __await__(self) -> Generator[Any, Any, _Rest | None]:
        step = self._step
        # What __await__ returns need only be an iterator; servers in other languages give no more.
        resume = partial(next, step) if self._pending is _UNBEGUN else lambda: self._pending
        while True:
            try:
                pending = resume()
            except StopIteration:
                return None
            resume = partial(next, step)
            try:
                if isinstance(pending, asyncio.Future) and not pending.done():
                    pending._asyncio_future_blocking = False
                    if (yield from self._watch(pending).__await__()):
                        return _Rest(step, pending)
                else:
                    # A bare yield, or a wait of the server's own making: pass it on as it is.
                    value = yield pending
                    if value is not None:
                        resume = partial(step.send, value)
            except BaseException as exc:
                if not hasattr(step, "throw"):
                    raise
                resume = partial(step.throw, exc)

    async def _watch(self, pending: asyncio.Future[object]) -> bool:
        """Wait for ``pending`` or for a reader; whether a reader came first."""
        loop = asyncio.get_running_loop()
        wake = loop.create_future()

        def ready(_: object = None) -> None:
            if not wake.done():
                wake.set_result(None)

        pending.add_done_callback(ready)
        self._flight.on_join = partial(loop.call_soon_threadsafe, ready)
        try:
            if self._flight.readers == 0:
                await wake
        except asyncio.CancelledError:
            pending.cancel()
            raise
        finally:
            self._flight.on_join = None
            pending.remove_done_callback(ready)
        return not pending.done()


async def send_or_hand_over(sending: Awaitable[None], flight: Flight) -> Awaitable[None] | None:
    """Await ``sending``; None when it is done. Where it is stuck and ``flight`` has readers: what is left of
    it, to be awaited by another task."""
    if not flight.joinable:
        await sending
        return None
    return await Sending(sending.__await__(), flight)
