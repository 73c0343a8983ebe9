"""Apps that pass what they are asked on to ``BENCHMARK_UPSTREAM``, behind a cache in Redis.

Every answer says in ``x-worker`` which process it came from. The waiting apps are the floor: they have no
cache and no upstream, and each request waits ``BENCHMARK_WAIT`` seconds by itself.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import httpx

from llm_middleware import CacheManager
from llm_middleware.asgi import LLMCacheMiddleware as ASGIMiddleware
from llm_middleware.wsgi import LLMCacheMiddleware as WSGIMiddleware

from .payloads import ANSWER

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from llm_middleware.asgi.types import Message, Receive, Scope, Send

__all__ = ["asgi", "waiting_asgi", "waiting_wsgi", "wsgi"]

_URL = os.environ.get("BENCHMARK_UPSTREAM", "")
_WAIT = float(os.environ.get("BENCHMARK_WAIT", "0"))
_JSON = {"content-type": "application/json"}


def _cache() -> CacheManager:
    return CacheManager("redis", host="127.0.0.1", port=int(os.environ.get("BENCHMARK_REDIS_PORT", "6379")))


@functools.cache
def _aclient() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=30)


@functools.cache
def _client() -> httpx.Client:
    return httpx.Client(timeout=30)


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _proxy(scope: Scope, receive: Receive, send: Send) -> None:
    body = await _body(receive)
    async with _aclient().stream("POST", _URL, content=body, headers=_JSON) as answer:
        headers = [(b"content-type", answer.headers["content-type"].encode())]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        async for chunk in answer.aiter_raw():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _wsgi_body(environ: WSGIEnvironment) -> bytes:
    return environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))


def _wsgi_proxy(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    body = _wsgi_body(environ)
    if json.loads(body).get("stream"):
        chunks = _streamed(body)
        next(chunks)
        start_response("200 OK", [("content-type", "text/event-stream; charset=utf-8")])
        return chunks
    answer = _client().post(_URL, content=body, headers=_JSON)
    start_response(f"{answer.status_code} OK", [("content-type", answer.headers["content-type"])])
    return [answer.content]


def _streamed(body: bytes) -> Iterator[bytes]:
    with _client().stream("POST", _URL, content=body, headers=_JSON) as answer:
        yield b""
        yield from answer.iter_raw()


_cached_asgi = ASGIMiddleware(_proxy, cache=_cache())
_cached_wsgi = WSGIMiddleware(_wsgi_proxy, cache=_cache())


def _worker() -> str:
    return str(os.getpid())


async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
    """Passes requests on, through the cache."""
    if scope["type"] != "http":
        return

    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-worker", _worker().encode())]
        await send(message)

    await _cached_asgi(scope, receive, marked)


async def waiting_asgi(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body, waits and answers."""
    if scope["type"] != "http":
        return
    await _body(receive)
    await asyncio.sleep(_WAIT)
    headers = [(b"content-type", b"application/json"), (b"x-worker", _worker().encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})


def wsgi(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Passes requests on, through the cache."""

    def marked(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> object:
        return start_response(status, [*headers, ("x-worker", _worker())], exc_info)  # type: ignore[arg-type]

    return _cached_wsgi(environ, marked)  # type: ignore[arg-type]


def waiting_wsgi(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Reads the body, waits and answers."""
    _wsgi_body(environ)
    time.sleep(_WAIT)
    start_response("200 OK", [("content-type", "application/json"), ("x-worker", _worker())])
    return [ANSWER]
