"""The WSGI middleware: one dictionary look-up for requests that are not ours, an `Exchange` for ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from ..api.front import Front
from ..caching.manager import CacheManager
from .exchange import Exchange

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["LLMCacheMiddleware"]


class LLMCacheMiddleware:
    """Answers repeated POSTs to LLM endpoints of ``app`` from the cache.

    ``cache``: a `CacheManager`; without one, ``**settings`` make one, and without those it is the process's
    default cache. ``routes``: path to endpoint kind, by default OpenAI's paths with and without ``/v1``.
    ``identify(environ)``: the caller's id, in place of a digest of ``Authorization``, ``X-API-Key`` and
    ``Cookie``. ``max_body_bytes``: longer request bodies pass through uncached. ``header_profile="litellm"``
    adds the header names that LiteLLM's clients read.

        app.wsgi_app = LLMCacheMiddleware(app.wsgi_app, cache=CacheManager(ttl=600))
    """

    def __init__(
        self,
        app: WSGIApplication,
        /,
        *,
        cache: CacheManager | None = None,
        routes: Mapping[str, str] | None = None,
        identify: Callable[[WSGIEnvironment], object] | None = None,
        max_body_bytes: int | None = None,
        header_profile: str = "standard",
        **settings: object,
    ) -> None:
        self.app = app
        self._front = Front(cache, routes, identify, max_body_bytes, header_profile, settings)
        self._routes = self._front.routes

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        kind = self._routes.get(path)
        if kind is None or environ["REQUEST_METHOD"] != "POST":
            return self.app(environ, start_response)
        return Exchange(self._front, self.app, kind, path, environ, start_response).run()
