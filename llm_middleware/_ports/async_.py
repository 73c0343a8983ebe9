"""The async port: the waits of the asyncio event loop that the caller runs on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar

from ..errors import DeadlineError, StoreError

__all__ = ["AsyncPort"]

T = TypeVar("T")

# Tasks that nobody awaits are held here: the loop itself keeps only weak references.
_background: set[asyncio.Task[object]] = set()


class _LoopWaiter:
    __slots__ = ("_future", "_loop", "_thread")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._future: asyncio.Future[None] = self._loop.create_future()

    def _set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def wake(self) -> None:
        if threading.get_ident() == self._thread:
            self._set()
            return
        try:
            self._loop.call_soon_threadsafe(self._set)
        except RuntimeError:  # the loop is closed, and with it the task that waited
            pass

    async def wait(self, seconds: float | None = None) -> None:
        if seconds is None:
            await self._future
        else:
            await asyncio.wait((self._future,), timeout=seconds)


class AsyncPort:
    """Waits on whichever loop is running. Stateless: bound to no loop at import or in ``__init__``."""

    def waiter(self) -> _LoopWaiter:
        return _LoopWaiter()

    async def call(self, function: Callable[..., object], *args: object) -> object:
        result = function(*args)
        return await result if isinstance(result, Awaitable) else result

    async def store(
        self, store: object, operation: str, *args: object, budget: float | None = None
    ) -> object:
        if getattr(store, "inline", False) and operation == "get":
            # Microseconds, and no wait that a budget could end.
            return await self._operation(store, operation, args)
        if getattr(store, "budgeted", False):
            # It ends its operations in time itself: one timer does.
            return await self._operation(store, operation, args)
        try:
            async with asyncio.timeout(budget) as limit:
                return await self._operation(store, operation, args)
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise StoreError(f"{operation} took longer than {budget} s") from exc

    async def _operation(self, store: object, operation: str, args: tuple[object, ...]) -> object:
        method = getattr(store, "a" + operation, None)
        if method is not None:
            return await self.call(method, *args)
        method = getattr(store, operation)
        if getattr(store, "inline", False) and operation == "get":
            return await self.call(method, *args)
        return await asyncio.to_thread(method, *args)

    async def pull(self, function: Callable[[], None]) -> None:
        # Shielded: a reader that leaves must not leave the function queued and never run.
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, function))

    async def blocking(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.to_thread(function, *args)

    async def bounded(self, work: Coroutine[object, object, T], seconds: float | None) -> T:
        try:
            async with asyncio.timeout(seconds) as limit:
                return await work
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise DeadlineError("no answer before the deadline") from exc

    def beside(self, function: Callable[[], object]) -> None:
        try:
            asyncio.get_running_loop().run_in_executor(None, function)
        except RuntimeError:  # no loop any more, so nobody to hold up
            function()

    def spawn(self, work: Callable[[], Coroutine[object, object, object]]) -> Callable[[], None]:
        loop = asyncio.get_running_loop()
        task: asyncio.Task[object] = loop.create_task(work())
        _background.add(task)
        task.add_done_callback(_background.discard)

        def cancel() -> None:
            try:
                loop.call_soon_threadsafe(task.cancel)
            except RuntimeError:
                pass

        return cancel
