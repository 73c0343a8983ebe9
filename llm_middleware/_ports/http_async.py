"""`AsyncTransport`: requests to providers from an event loop, over the fastest client that is installed."""

from __future__ import annotations

import importlib.util
from typing import Protocol

from ..errors import ConfigError
from ..providers.messages import Outgoing, Reply, Timeouts
from .http_loops import Closable, PerLoop
from .http_settings import SOCKS, HTTPSettings, Route, require_httpx

__all__ = ["AsyncTransport"]


class _Client(Closable, Protocol):
    async def send(self, request: Outgoing, timeouts: Timeouts) -> Reply: ...


class AsyncTransport:
    """A `Transport` for coroutines. Nothing is imported or connected before the first request; every process
    has its own connections, and so has each event loop, which closes them when it ends.

    `ConfigError` where no client is installed that can do what the settings say.
    """

    def __init__(self, settings: HTTPSettings | None = None) -> None:
        self.settings = HTTPSettings() if settings is None else settings
        self._route: Route | None = None
        self._clients: PerLoop[_Client] = PerLoop(self._make)

    async def send(self, request: Outgoing, timeouts: Timeouts) -> Reply:
        return await self._clients.here().send(request, timeouts)

    async def aclose(self) -> None:
        """Close the running loop's connections, and have other loops close theirs. A user's own client stays
        open."""
        await self._clients.aclose()

    def _make(self) -> _Client:
        settings = self.settings
        if self._route is None:
            self._route = Route(settings)
        route = self._route
        if not settings.needs_httpx and not route.proxy_schemes() & SOCKS:
            if importlib.util.find_spec("aiohttp") is not None:
                from .http_aiohttp import AiohttpClient

                return AiohttpClient(settings, route)
            if settings.client == "aiohttp":
                raise ConfigError("client: aiohttp is not installed: pip install aiohttp", param="client")
        require_httpx(settings, route)
        from .http_httpx import AsyncHttpxClient

        return AsyncHttpxClient(settings, route)
