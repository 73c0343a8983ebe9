"""At most so many calls at a time. The wait for a turn is a part of the wait for a connection."""

from __future__ import annotations

import asyncio
from queue import Empty, SimpleQueue

__all__ = ["LoopTurns", "ThreadTurns"]


class ThreadTurns:
    """For the threads of a process; a tenth of the cost of `threading.Semaphore`."""

    __slots__ = ("_free",)

    def __init__(self, count: int) -> None:
        self._free: SimpleQueue[None] = SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    def take(self, seconds: float | None) -> None:
        """`TimeoutError` where there is none within ``seconds``."""
        try:
            self._free.get_nowait()
        except Empty:
            try:
                self._free.get(timeout=None if seconds is None else max(seconds, 0.0))
            except Empty:
                raise TimeoutError from None

    def give(self) -> None:
        self._free.put(None)


class LoopTurns:
    """For the tasks of one event loop."""

    __slots__ = ("_free",)

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)

    async def take(self, seconds: float | None) -> None:
        """`TimeoutError` where there is none within ``seconds``."""
        if not self._free.locked():
            await self._free.acquire()
            return
        async with asyncio.timeout(seconds):
            await self._free.acquire()

    def give(self) -> None:
        self._free.release()
