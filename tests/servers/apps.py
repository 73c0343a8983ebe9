"""One ASGI and one WSGI app without any framework, behind the cache, for the real servers to run.

They keep count of what their handlers did, since a test in another process cannot look:

``POST /v1/chat/completions``  an answer, or with ``stream`` one of `EVENTS` events, whose id counts the calls
``POST /ask``                  the same for a body of no known shape
``POST /echo``                 not cached: the body that came
``POST /release``              lets held streams go on
``GET /count``                 `Counts` as JSON

A stream whose ``model`` is "drip" comes slowly, one whose model is "held" stops after the first event until
the release; both only when their prompt is seen for the first time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from llm_middleware import CacheManager
from llm_middleware.asgi import LLMCacheMiddleware as ASGIMiddleware
from llm_middleware.wsgi import LLMCacheMiddleware as WSGIMiddleware

EVENTS = 20
DRIP_S = 0.1
PATIENCE_S = 20.0
ROUTES = {"/v1/chat/completions": "chat", "/ask": "json"}
PACES = ("drip", "held")
SSE = "text/event-stream; charset=utf-8"
JSON = "application/json"


@dataclass
class Counts:
    """What the handlers of this process did: ``broken`` are streams that were closed before their end."""

    calls: int = 0
    open: int = 0
    finished: int = 0
    broken: int = 0


counts = Counts()
released = threading.Event()
_lock = threading.Lock()
_seen: set[str] = set()


def count(**changes: int) -> int:
    """Add to the counts; the number of calls after that."""
    with _lock:
        for name, change in changes.items():
            setattr(counts, name, getattr(counts, name) + change)
        return counts.calls


@dataclass
class Reply:
    """A plain answer, or the events of a stream and how they are to be slowed down."""

    body: bytes = b""
    events: tuple[bytes, ...] = ()
    pace: str = ""
    content_type: str = JSON


def reply_to(method: str, path: str, raw: bytes) -> Reply:
    """What the handler answers, whichever interface it is called through."""
    if path == "/count":
        gc.collect()  # a generator that a framework dropped ends when the collector finds it
        return Reply(json.dumps(asdict(counts)).encode())
    if path == "/echo":
        return Reply(raw, content_type="application/octet-stream")
    if path == "/release":
        released.set()
        return Reply(b"{}")
    body = json.loads(raw)
    number = count(calls=1)
    if path == "/ask":
        return Reply(
            json.dumps({"call": number, "answer": body["question"], "fields": sorted(body)}).encode()
        )
    return stream_of(body, number) if body.get("stream") else Reply(json.dumps(chat(body, number)).encode())


def chat(body: dict[str, Any], number: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": f"You said {body['messages'][-1]['content']}"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    head = {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": number,
        "model": body["model"],
    }
    return {**head, "choices": [choice], "usage": usage, "fields": sorted(body)}


def stream_of(body: dict[str, Any], number: int) -> Reply:
    head = {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion.chunk",
        "created": number,
        "model": body["model"],
    }
    last = EVENTS - 2
    choices = [
        {"index": 0, "delta": {"content": f"…{i} "}, "finish_reason": "stop" if i == last else None}
        for i in range(EVENTS - 1)
    ]
    events = [
        f"data: {json.dumps({**head, 'choices': [c]}, ensure_ascii=False)}\n\n".encode() for c in choices
    ]
    with _lock:
        prompt = body["messages"][-1]["content"]
        pace = body["model"] if body["model"] in PACES and prompt not in _seen else ""
        _seen.add(prompt)
    return Reply(events=(*events, b"data: [DONE]\n\n"), pace=pace, content_type=SSE)


# ASGI ---------------------------------------------------------------------------------------------

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def asgi_handler(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    raw = b""
    while True:
        message = await receive()
        raw += message.get("body", b"")
        if not message.get("more_body"):
            break
    reply = reply_to(scope["method"], scope["path"], raw)
    headers = [(b"content-type", reply.content_type.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if reply.events:
        async for event in aslowly(reply, receive):
            await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": reply.body})


async def lifespan(receive: Receive, send: Send) -> None:
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})


async def aslowly(reply: Reply, receive: Receive) -> AsyncIterator[bytes]:
    """The events at their pace, until the client leaves."""
    leaving = asyncio.ensure_future(disconnect(receive))
    count(open=1)
    outcome = "broken"
    try:
        for event in reply.events:
            if leaving.done():
                return
            yield event
            deadline = time.monotonic() + (DRIP_S if reply.pace == "drip" else PATIENCE_S)
            while reply.pace and not leaving.done() and time.monotonic() < deadline:
                if reply.pace == "held" and released.is_set():
                    break
                await asyncio.wait({leaving}, timeout=0.01)
        outcome = "finished"
    finally:
        count(open=-1, **{outcome: 1})
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving


async def disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        """Anything else after the body is not ours."""


# WSGI ---------------------------------------------------------------------------------------------


def wsgi_handler(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
    reply = reply_to(environ["REQUEST_METHOD"], environ["PATH_INFO"], wsgi_body(environ))
    start_response("200 OK", [("Content-Type", reply.content_type)])
    return slowly(reply) if reply.events else iter([reply.body])


def wsgi_body(environ: dict[str, Any]) -> bytes:
    """The whole body: by its length, or to the end where the server marks the end of a chunked one."""
    if length := int(environ.get("CONTENT_LENGTH") or 0):
        body: bytes = environ["wsgi.input"].read(length)
    else:
        body = environ["wsgi.input"].read() if environ.get("wsgi.input_terminated") else b""
    return body


def slowly(reply: Reply) -> Iterator[bytes]:
    """The events at their pace, until the server closes the iterator."""
    count(open=1)
    outcome = "broken"
    try:
        for event in reply.events:
            yield event
            if reply.pace == "drip":
                time.sleep(DRIP_S)
            elif reply.pace == "held":
                released.wait(PATIENCE_S)
        outcome = "finished"
    finally:
        count(open=-1, **{outcome: 1})


asgi_app = ASGIMiddleware(asgi_handler, cache=CacheManager(type="local"), routes=ROUTES)
wsgi_app = WSGIMiddleware(wsgi_handler, cache=CacheManager(type="local"), routes=ROUTES)
