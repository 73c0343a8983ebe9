"""The apps that are served: bare ones, which are the floors, and the same ones behind the cache."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llm_middleware import CacheManager
from llm_middleware.asgi import LLMCacheMiddleware as ASGIMiddleware
from llm_middleware.wsgi import LLMCacheMiddleware as WSGIMiddleware

from .payloads import ANSWER, EVENTS

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from llm_middleware.asgi.types import Receive, Scope, Send

__all__ = [
    "bare_asgi",
    "bare_replay",
    "bare_stream",
    "bare_wsgi",
    "cached_asgi",
    "cached_stream",
    "cached_wsgi",
]

_PLAIN = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]
_PLAIN_TEXT = [(name.decode(), value.decode()) for name, value in _PLAIN]
_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


async def _read(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass


async def bare_asgi(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and answers."""
    if scope["type"] != "http":
        return
    await _read(receive)
    await send({"type": "http.response.start", "status": 200, "headers": _PLAIN})
    await send({"type": "http.response.body", "body": ANSWER})


async def bare_stream(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and yields events, giving way to the event loop after each, as a proxied stream does."""
    if scope["type"] != "http":
        return
    await _read(receive)
    await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
    for event in EVENTS:
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b""})


async def bare_replay(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and sends events that it has."""
    if scope["type"] != "http":
        return
    await _read(receive)
    await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
    for event in EVENTS:
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def bare_wsgi(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Reads the body and answers."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", list(_PLAIN_TEXT))
    return [ANSWER]


cached_asgi = ASGIMiddleware(bare_asgi, cache=CacheManager())
cached_stream = ASGIMiddleware(bare_stream, cache=CacheManager())
cached_wsgi = WSGIMiddleware(bare_wsgi, cache=CacheManager())
