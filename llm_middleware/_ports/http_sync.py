"""`SyncTransport`: requests to providers from threads."""

from __future__ import annotations

import os
import threading
from typing import Final, Protocol

from ..providers.messages import Outgoing, Reply, Timeouts
from .http_settings import HTTPSettings, Route, require_httpx

__all__ = ["SyncTransport"]

# What a forked child has of its parent's: closing it would end the parent's connections.
_LEFT_BEHIND: Final[list[object]] = []


class _Client(Protocol):
    def send(self, request: Outgoing, timeouts: Timeouts) -> Reply: ...

    def close(self) -> None: ...


class SyncTransport:
    """A `Transport` whose coroutines never suspend, for all threads of a process. Nothing is imported or
    connected before the first request; a forked child has its own connections."""

    def __init__(self, settings: HTTPSettings | None = None) -> None:
        self.settings = HTTPSettings() if settings is None else settings
        self._client: _Client | None = None
        self._making = threading.Lock()
        self._pid = os.getpid()

    async def send(self, request: Outgoing, timeouts: Timeouts) -> Reply:
        client = self._client
        if client is None or self._pid != os.getpid():
            client = self._join()
        return client.send(request, timeouts)

    async def aclose(self) -> None:
        """Close the idle connections, and those in use as they are given back. A user's own client stays
        open."""
        if self._pid == os.getpid():
            with self._making:
                client, self._client = self._client, None
            if client is not None:
                client.close()

    def _join(self) -> _Client:
        if self._pid != os.getpid():
            _LEFT_BEHIND.append(self._client)
            self._client, self._making, self._pid = None, threading.Lock(), os.getpid()
        with self._making:
            if self._client is None:
                self._client = self._make()
            return self._client

    def _make(self) -> _Client:
        settings, route = self.settings, Route(self.settings)
        if not settings.needs_httpx and route.proxy_schemes() <= {"http"}:
            from .http_stdlib import StdlibClient

            return StdlibClient(settings, route)
        require_httpx(settings, route)
        from .http_httpx import SyncHttpxClient

        return SyncHttpxClient(settings, route)
