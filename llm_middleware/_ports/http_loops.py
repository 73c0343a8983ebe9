"""`PerLoop`: one client for each event loop of a process, made on first use and closed with its loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Final, Generic, Protocol, TypeVar

__all__ = ["Closable", "PerLoop"]


class Closable(Protocol):
    """A client that is closed on its own loop."""

    async def aclose(self) -> None: ...


C = TypeVar("C", bound=Closable)

# What every loop that lives has: see `_Held.guard`.
_OPEN: Final[set[object]] = set()
# What a forked child has of its parent's. Collected, it would say that it was not closed.
_LEFT_BEHIND: Final[list[object]] = []


class PerLoop(Generic[C]):
    """The clients of one transport. ``make`` is called on the loop that its client is for."""

    def __init__(self, make: Callable[[], C]) -> None:
        self._make = make
        self._held: dict[asyncio.AbstractEventLoop, _Held[C]] = {}
        self._joining = threading.Lock()
        self._pid = os.getpid()

    def here(self) -> C:
        """The running loop's client."""
        held = self._held.get(asyncio.get_running_loop())
        if held is None:  # a forked child runs a loop of its own
            held = self._join()
        return held.client

    def _join(self) -> _Held[C]:
        if self._pid != os.getpid():
            _LEFT_BEHIND.append(self._held)
            self._held, self._joining, self._pid = {}, threading.Lock(), os.getpid()
        held = _Held(asyncio.get_running_loop(), self._make())
        with self._joining:
            for loop in [loop for loop in self._held if loop.is_closed()]:
                del self._held[loop]
            self._held[held.loop] = held
        return held

    async def aclose(self) -> None:
        """Close the running loop's client now, and have every other loop close its own. A later `here` makes
        another."""
        if self._pid != os.getpid():
            return
        with self._joining:
            held = list(self._held.values())
            self._held.clear()
        here = asyncio.get_running_loop()
        for other in held:
            if other.loop is not here:
                other.close_soon()
        for ours in held:
            if ours.loop is here:
                await ours.close()


class _Held(Generic[C]):
    """One loop's client."""

    def __init__(self, loop: asyncio.AbstractEventLoop, client: C) -> None:
        self.loop = loop
        self.client = client
        self._closing: asyncio.Task[None] | None = None
        # A loop that ends closes the asynchronous generators begun on it, and so this client. It is held
        # until then: for one that the garbage collector found first, that may come too late.
        self.guard = self._guarding()
        with contextlib.suppress(StopIteration):
            self.guard.__anext__().send(None)  # begins it without a wait
        _OPEN.add(self)

    async def close(self) -> None:
        await self.guard.aclose()

    def close_soon(self) -> None:
        """Have the loop `close` this; from any thread. A loop that has ended has done so already."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._begin_closing)

    def _begin_closing(self) -> None:
        self._closing = self.loop.create_task(self.close())

    async def _guarding(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            _OPEN.discard(self)
            await self.client.aclose()
