"""Apps whose answers lie in a Redis: bare ones, which ask for them by themselves, and ones behind the cache.

``BENCHMARK_REDIS_PORT``: the Redis. ``BENCHMARK_ANSWER``: bytes of an answer. ``BENCHMARK_MEMORY_TIER``: 1
for memory in front.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import redis
from redis import asyncio as aredis

from llm_middleware import CacheManager
from llm_middleware.asgi import LLMCacheMiddleware as ASGIMiddleware
from llm_middleware.wsgi import LLMCacheMiddleware as WSGIMiddleware

from .network import answer

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from llm_middleware.asgi.types import Receive, Scope, Send

__all__ = ["FLOOR_KEY", "bare_asgi", "bare_wsgi", "cached_asgi", "cached_wsgi", "local_asgi"]

FLOOR_KEY = "floor"
"""Where the bare apps find their answer."""

_PORT = int(os.environ.get("BENCHMARK_REDIS_PORT", "6379"))
_ANSWER = answer(int(os.environ.get("BENCHMARK_ANSWER", "1024")))
_aclient = aredis.Redis(port=_PORT)
_client = redis.Redis(port=_PORT)


def _cache() -> CacheManager:
    return CacheManager(
        "redis",
        host="127.0.0.1",
        port=_PORT,
        memory_tier=os.environ.get("BENCHMARK_MEMORY_TIER") == "1",
        default_in_memory_ttl=3600,
    )


async def _read(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass


async def _send(send: Send, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def bare_asgi(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body, gets the answer from Redis and sends it."""
    if scope["type"] != "http":
        return
    await _read(receive)
    await _send(send, await _aclient.get(FLOOR_KEY))


async def _handler(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    await _read(receive)
    await _send(send, _ANSWER)


def _answered(start_response: StartResponse, body: bytes) -> Iterable[bytes]:
    start_response("200 OK", [("content-type", "application/json"), ("content-length", str(len(body)))])
    return [body]


def bare_wsgi(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Reads the body, gets the answer from Redis and sends it."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    return _answered(start_response, _client.get(FLOOR_KEY))  # type: ignore[arg-type]


def _wsgi_handler(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    return _answered(start_response, _ANSWER)


cached_asgi = ASGIMiddleware(_handler, cache=_cache())
cached_wsgi = WSGIMiddleware(_wsgi_handler, cache=_cache())
local_asgi = ASGIMiddleware(_handler, cache=CacheManager())
