"""The sync port: blocking calls in async clothes, driven by `llm_middleware._drive.run_sync`."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Coroutine
from typing import TypeVar

from .._drive import run_sync
from ..errors import StoreError

__all__ = ["SyncPort"]

T = TypeVar("T")


class _ThreadWaiter:
    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def wake(self) -> None:
        self._event.set()

    async def wait(self, seconds: float | None = None) -> None:
        self._event.wait(seconds)


class SyncPort:
    """Each wait blocks the calling thread. Stateless: one serves all threads."""

    def waiter(self) -> _ThreadWaiter:
        return _ThreadWaiter()

    async def call(self, function: Callable[..., object], *args: object) -> object:
        result = function(*args)
        if isinstance(result, Coroutine):
            return run_sync(result)
        return result

    async def store(
        self, store: object, operation: str, *args: object, budget: float | None = None
    ) -> object:
        # A blocking call cannot be left: stores with a sync face keep a budget of their own.
        method = getattr(store, operation, None)
        if method is None:
            raise StoreError(f"{type(store).__name__} has no sync {operation}(): use the async methods")
        return await self.call(method, *args)

    async def pull(self, function: Callable[[], None]) -> None:
        function()

    async def blocking(self, function: Callable[..., T], *args: object) -> T:
        return function(*args)

    async def bounded(self, work: Coroutine[object, object, T], seconds: float | None) -> T:
        return await work  # it blocks this thread: nobody could leave it

    def beside(self, function: Callable[[], object]) -> None:
        function()

    def spawn(self, work: Callable[[], Coroutine[object, object, object]]) -> Callable[[], None]:
        context = contextvars.copy_context()
        thread = threading.Thread(
            target=lambda: context.run(run_sync, work()), name="llm-middleware-background", daemon=True
        )
        thread.start()
        return lambda: None
