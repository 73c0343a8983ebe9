"""What the core may ask of the world it runs in."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Protocol, TypeVar

__all__ = ["Port", "Waiter"]

T = TypeVar("T")


class Waiter(Protocol):
    """One wait for one thing. `wake` may come from any thread, before or after `wait`, more than once."""

    def wake(self) -> None: ...

    async def wait(self, seconds: float | None = None) -> None:
        """Until it is woken; or until ``seconds`` have passed."""
        ...


class Port(Protocol):
    """Blocking calls in async clothes, or the event loop's own waits."""

    def waiter(self) -> Waiter:
        """A waiter for the calling thread or task."""
        ...

    async def call(self, function: Callable[..., object], *args: object) -> object:
        """What the host's function returns; awaited where it returns an awaitable."""
        ...

    async def store(
        self, store: object, operation: str, *args: object, budget: float | None = None
    ) -> object:
        """A store's operation (``get``, ``set``, ``delete``, ``flush``, ``close``), on its fitting face.

        ``budget``: seconds after which the caller goes on without it, where the port can do that.
        """
        ...

    async def pull(self, function: Callable[[], None]) -> None:
        """Run a function that blocks; once begun it runs to its end even where the caller is cancelled."""
        ...

    async def blocking(self, function: Callable[..., T], *args: object) -> T:
        """What a function returns that may block: it holds up nobody but the caller."""
        ...

    async def bounded(self, work: Coroutine[object, object, T], seconds: float | None) -> T:
        """What ``work`` gives. `DeadlineError` after ``seconds``, where the port can leave it then."""
        ...

    def beside(self, function: Callable[[], object]) -> None:
        """Run a function that may block where it does not hold the caller up, if there is such a place."""
        ...

    def spawn(self, work: Callable[[], Coroutine[object, object, object]]) -> Callable[[], None]:
        """Run ``work`` beside the caller; the function returned cancels it where that is possible."""
        ...
