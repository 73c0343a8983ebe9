"""`Asker`: how a store of keys is asked: directly, or through the port, and not at all while it fails."""

from __future__ import annotations

import time
from typing import Any, Final

from .._ports.protocol import Port
from ..caching.breaker import Breaker
from ..errors import KeyStoreUnavailable, LLMMiddlewareError, StoreError
from .store import KeyStore

__all__ = ["Asker", "Paused"]

_REST: Final = 15.0  # seconds


class Paused(StoreError):  # noqa: N818 - what is so, and no fault
    """The store was not asked: it has just failed, again and again."""


class Asker:
    """One store, asked by threads and event loops. Who asks while it hangs waits for its timeout, so one that
    tells of changes, and tells nothing now, is asked seldom: its recovery is heard of first."""

    def __init__(self, store: KeyStore) -> None:
        self.store = store
        self.inline = bool(getattr(store, "inline", False))
        self._tells = hasattr(store, "attend")
        self._heard()
        if self._tells:
            store.attend(self._heard)  # type: ignore[attr-defined]

    async def ask(self, port: Port, operation: str, *args: object) -> Any:
        """What a request needs. `StoreError` where the store fails; `Paused` where it is not asked."""
        if self.inline:
            return getattr(self.store, operation)(*args)
        if self._rests() or not self._breaker.allow():
            raise Paused("the store of API keys fails")
        try:
            answer = await port.store(self.store, operation, *args)
        except StoreError:
            self._failed()
            raise
        except LLMMiddlewareError:
            raise
        except Exception as exc:  # of a store of the host's own
            self._failed()
            raise StoreError(f"the store of API keys failed: {type(exc).__name__}") from exc
        self._breaker.succeeded()
        return answer

    def _heard(self, key_id: str | None = None) -> None:
        """The store answers again: it tells of changes, or did what it was told."""
        if key_id is None:
            self._breaker = Breaker(recovery=1.0, clock=time.monotonic)
            self._rests_until = 0.0

    def _rests(self) -> bool:
        return time.monotonic() < self._rests_until and not self.store.live

    def _failed(self) -> None:
        self._breaker.failed()
        if self._tells and self._breaker.state != "closed":
            self._rests_until = time.monotonic() + _REST

    async def manage(self, port: Port, operation: str, *args: object) -> Any:
        """What an administrator asks for, whatever happened before. `KeyStoreUnavailable` where it fails."""
        try:
            if self.inline:
                return getattr(self.store, operation)(*args)
            answer = await port.store(self.store, operation, *args)
        except StoreError as exc:
            raise KeyStoreUnavailable(f"API keys cannot be managed now: {exc.message}") from exc
        if self._breaker.state != "closed":
            self._heard()
        return answer
