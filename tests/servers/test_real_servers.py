"""Shared calls under real servers: crowds (C54), leaders that leave (C57, C84), leaders that do not read.

The apps below run in the server's process; the tests talk to them over sockets and ask ``/count`` what
happened there. What a prompt's stream does is told by the ``model``:

``crowd``    a plain answer, once as many others wait for it as ``CROWD`` says
``held``     the first event, and the others after ``POST /release``
``endless``  event after event, until the client leaves
``big``      `BIG_EVENTS` events of `BIG_BYTES` bytes each, as fast as they are taken
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llm_middleware import CacheManager
from llm_middleware.asgi import LLMCacheMiddleware as ASGIMiddleware
from llm_middleware.wsgi import LLMCacheMiddleware as WSGIMiddleware

PATIENCE_S = 20.0
CHAT = "/v1/chat/completions"
BIG_EVENTS, BIG_BYTES = 100, 64 << 10
LAST = b"data: [DONE]\n\n"
CROWD = int(os.environ.get("CROWD", "0"))

# The apps ----------------------------------------------------------------------------------------

cache = CacheManager()
counts = {"calls": 0, "finished": 0, "broken": 0}
released = threading.Event()
_lock = threading.Lock()


def count(name: str) -> int:
    with _lock:
        counts[name] += 1
        return counts[name]


def told() -> dict[str, int]:
    gc.collect()  # Starlette leaves the generator of a stream whose client left to the garbage collector
    flights = list(cache._flow.flights._flights.values())
    stats = cache.stats()
    return {
        **counts,
        "flights": len(flights),
        "readers": sum(flight.readers for flight in flights),
        "stored": stats.get("stored", 0),
    }


def crowded() -> bool:
    return sum(flight.readers for flight in list(cache._flow.flights._flights.values())) >= CROWD


def completion(number: int) -> dict:
    message = {"role": "assistant", "content": f"call {number}"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {
        "id": f"c{number}",
        "object": "chat.completion",
        "created": 1,
        "model": "crowd",
        "choices": [choice],
    }


def event(number: int, content: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
    body = {"id": f"c{number}", "object": "chat.completion.chunk", "created": 1, "choices": [choice]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def events(model: str, number: int) -> Iterator[bytes | None]:
    """The events of a stream; None where it waits for a moment and looks again."""
    outcome = "broken"
    try:
        if model == "held":
            yield event(number, "first")
            while not released.is_set():
                yield None
            yield event(number, "second")
        elif model == "endless":
            for index in range(100_000):
                yield event(number, f"{index}")
                yield None
        else:
            for index in range(BIG_EVENTS):
                yield event(number, f"{index}".ljust(BIG_BYTES, "."))
        yield event(number, "", "stop")
        yield LAST
        outcome = "finished"
    finally:
        count(outcome)


async def aevents(model: str, number: int) -> AsyncIterator[bytes]:
    with contextlib.closing(events(model, number)) as steps:
        for step in steps:
            if step is None:
                await asyncio.sleep(0.005)
            else:
                yield step


def sync_events(model: str, number: int) -> Iterator[bytes]:
    tick = threading.Event()
    with contextlib.closing(events(model, number)) as steps:
        for step in steps:
            if step is None:
                tick.wait(0.005)
            else:
                yield step


async def starlette_chat(request: Request) -> Response:
    body = await request.json()
    number = count("calls")
    if body.get("stream"):
        return StreamingResponse(aevents(body["model"], number), media_type="text/event-stream")
    for _ in range(4000):
        if crowded():
            break
        await asyncio.sleep(0.005)
    return JSONResponse(completion(number))


async def starlette_count(request: Request) -> Response:
    return JSONResponse(told())


async def starlette_release(request: Request) -> Response:
    released.set()
    return JSONResponse({})


starlette = Starlette(
    routes=[
        Route(CHAT, starlette_chat, methods=["POST"]),
        Route("/count", starlette_count),
        Route("/release", starlette_release, methods=["POST"]),
    ]
)


async def raw_app(scope, receive, send) -> None:
    """The same without a framework: it does not look whether its client is still there."""
    if scope["type"] != "http" or scope["path"] != CHAT:
        await starlette(scope, receive, send)
        return
    body = json.loads((await receive())["body"])
    number = count("calls")
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async with contextlib.aclosing(aevents(body["model"], number)) as steps:
        async for step in steps:
            await send({"type": "http.response.body", "body": step, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def wsgi(environ, start_response):
    path = environ["PATH_INFO"]
    if path == CHAT:
        body = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        number = count("calls")
        if body.get("stream"):
            start_response("200 OK", [("Content-Type", "text/event-stream")])
            return sync_events(body["model"], number)
        tick = threading.Event()
        for _ in range(4000):
            if crowded():
                break
            tick.wait(0.005)
        answer: object = completion(number)
    else:
        if path == "/release":
            released.set()
        answer = told()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]


asgi_app = ASGIMiddleware(starlette, cache=cache)
asgi_raw = ASGIMiddleware(raw_app, cache=cache)
wsgi_app = WSGIMiddleware(wsgi, cache=cache)

# The tests ---------------------------------------------------------------------------------------

SERVERS = {
    "uvicorn starlette": ("uvicorn", "test_real_servers:asgi_app"),
    "uvicorn raw": ("uvicorn", "test_real_servers:asgi_raw"),
    "uvicorn-h11 starlette": ("uvicorn-h11", "test_real_servers:asgi_app"),
    "gunicorn-gthread": ("gunicorn-gthread", "test_real_servers:wsgi_app"),
}
each_server = pytest.mark.parametrize("name", SERVERS)


@pytest.fixture
def url(serve, name: str) -> Iterator[str]:
    """The server ``name``, started for this test alone."""
    server, app = SERVERS[name]
    # With eight threads more than seven can never wait at once.
    crowd = "6" if server == "gunicorn-gthread" else "49"
    with serve(server, app, {"CROWD": crowd}) as base:
        yield base


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=0)
    with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False, limits=limits) as session:
        yield session


def body_of(model: str, **fields: object) -> dict:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}


def counted(client: httpx.Client) -> dict[str, int]:
    return client.get("/count").json()


def wait_until(client: httpx.Client, condition: Callable[[dict], bool]) -> dict[str, int]:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        now = counted(client)
        if condition(now):
            return now
        assert time.monotonic() < deadline, f"never so: {now}"


def round_trips(client: httpx.Client) -> None:
    """Let the server notice what there is to be noticed."""
    for _ in range(50):
        counted(client)


class Leader:
    """A client on a bare socket, which reads when it is told to and can hang up at any time."""

    def __init__(self, url: str, body: dict, *, window: int | None = None) -> None:
        self.socket = socket.socket()
        if window is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        self.socket.settimeout(PATIENCE_S)
        host, port = url.removeprefix("http://").split(":")
        self.socket.connect((host, int(port)))
        raw = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(raw)}\r\nconnection: close\r\n\r\n"
        self.socket.sendall(head.encode() + raw)

    def read_until(self, mark: bytes) -> bytes:
        data = b""
        while mark not in data:
            piece = self.socket.recv(1 << 16)
            assert piece, "the server hung up"
            data += piece
        return data

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()


@pytest.mark.parametrize("name", ["uvicorn starlette", "uvicorn-h11 starlette", "gunicorn-gthread"])
def test_c54_fifty_concurrent_requests_make_one_call(client: httpx.Client):
    with ThreadPoolExecutor(50) as pool:
        futures = [pool.submit(client.post, CHAT, json=body_of("crowd")) for _ in range(50)]
        replies = [future.result(PATIENCE_S * 2) for future in futures]
    assert {reply.status_code for reply in replies} == {200}
    assert [reply.json() for reply in replies] == [completion(1)] * 50
    assert counted(client)["calls"] == 1
    states = [reply.headers["x-llm-cache"] for reply in replies]
    assert states.count("miss") == 1
    assert set(states) <= {"miss", "collapsed", "hit"}


@each_server
def test_c57_the_leader_leaves_and_a_follower_gets_everything(url: str, client: httpx.Client):
    body = body_of("held", stream=True)
    with Leader(url, body) as leader:
        leader.read_until(b"first")
        with client.stream("POST", CHAT, json=body) as follower:
            assert follower.headers["x-llm-cache"] == "collapsed"
            chunks = follower.iter_raw()
            got = next(chunks)
            leader.socket.close()
            round_trips(client)
            client.post("/release")
            got += b"".join(chunks)
    whole = event(1, "first") + event(1, "second") + event(1, "", "stop") + LAST
    assert got == whole
    now = wait_until(client, lambda now: now["flights"] == 0)
    assert (now["calls"], now["finished"], now["broken"], now["stored"]) == (1, 1, 0, 1)
    again = client.post(CHAT, json=body)
    assert (again.headers["x-llm-cache"], again.content) == ("hit", whole)


@each_server
def test_c84_the_only_client_leaves_and_the_handler_is_ended(url: str, client: httpx.Client):
    body = body_of("endless", stream=True)
    with Leader(url, body) as leader:
        leader.read_until(b"data: ")
    now = wait_until(client, lambda now: now["broken"] == 1 and now["flights"] == 0)
    assert (now["calls"], now["finished"], now["stored"]) == (1, 0, 0)
    with Leader(url, body) as leader:
        assert b"x-llm-cache: miss" in leader.read_until(b"data: ").lower()
    wait_until(client, lambda now: now["broken"] == 2 and now["flights"] == 0)


@each_server
def test_c84_the_follower_leaves_too_and_the_handler_is_ended(url: str, client: httpx.Client):
    body = body_of("endless", stream=True)
    with Leader(url, body) as leader, Leader(url, body) as follower:
        for each in (leader, follower):
            each.read_until(b"data: ")
        leader.socket.close()
        round_trips(client)
        assert counted(client)["broken"] == 0
        follower.read_until(b"data: ")
    now = wait_until(client, lambda now: now["broken"] == 1 and now["flights"] == 0)
    assert (now["calls"], now["finished"], now["stored"]) == (1, 0, 0)


@each_server
def test_c57_a_leader_that_does_not_read_holds_nobody(url: str, client: httpx.Client):
    body = body_of("big", stream=True)
    with Leader(url, body, window=4096) as leader:
        wait_until(client, lambda now: now["calls"] == 1)
        round_trips(client)
        assert counted(client)["finished"] == 0, "the leader's connection took all of the stream"
        follower = client.post(CHAT, json=body)
        assert follower.headers["x-llm-cache"] == "collapsed"
        assert len(follower.content) > BIG_EVENTS * BIG_BYTES
        assert follower.content.count(b"data: ") == BIG_EVENTS + 2
        assert follower.content.endswith(LAST)
        assert counted(client)["calls"] == 1
        # And the leader, when it reads at last, gets the same.
        got = leader.read_until(LAST)
        assert got.count(b"data: ") == BIG_EVENTS + 2
    again = client.post(CHAT, json=body)
    assert (again.headers["x-llm-cache"], again.content) == ("hit", follower.content)


@each_server
def test_c57_a_leader_that_does_not_read_and_hangs_up(url: str, client: httpx.Client):
    body = body_of("big", stream=True)
    with Leader(url, body, window=4096):
        wait_until(client, lambda now: now["calls"] == 1)
        follower = client.post(CHAT, json=body)
        assert follower.content.endswith(LAST)
    now = wait_until(client, lambda now: now["flights"] == 0)
    assert (now["calls"], now["finished"], now["stored"]) == (1, 1, 1)
