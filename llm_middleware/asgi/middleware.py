"""The ASGI middleware: one dictionary look-up for requests that are not ours, an `Exchange` for ours.

Pure ASGI; nothing is started before the first request, since not every server has a lifespan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..api.front import Front
from ..caching.manager import CacheManager
from .exchange import Exchange
from .types import ASGIApp, Receive, Scope, Send

__all__ = ["LLMCacheMiddleware"]


class LLMCacheMiddleware:
    """Answers repeated POSTs to LLM endpoints of ``app`` from the cache.

    ``cache``: a `CacheManager`; without one, ``**settings`` make one, and without those it is the process's
    default cache. ``routes``: path to endpoint kind, by default OpenAI's paths with and without ``/v1``.
    ``identify(scope)``: the caller's id, in place of a digest of ``Authorization``, ``X-API-Key`` and
    ``Cookie``; it may be async. ``max_body_bytes``: longer request bodies pass through uncached.
    ``header_profile="litellm"`` adds the header names that LiteLLM's clients read.

        app.add_middleware(LLMCacheMiddleware, cache=CacheManager(ttl=600))
    """

    def __init__(
        self,
        app: ASGIApp,
        /,
        *,
        cache: CacheManager | None = None,
        routes: Mapping[str, str] | None = None,
        identify: Callable[[Scope], object] | None = None,
        max_body_bytes: int | None = None,
        header_profile: str = "standard",
        **settings: object,
    ) -> None:
        self.app = app
        self._front = Front(cache, routes, identify, max_body_bytes, header_profile, settings)
        self._routes = self._front.routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path not in self._routes and scope.get("root_path"):
            # Servers told of a prefix put it in front of the path; routes are written without it.
            path = path.removeprefix(scope["root_path"])
        kind = self._routes.get(path)
        if kind is None or scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        await Exchange(self._front, self.app, kind, path, scope, receive, send).run()
