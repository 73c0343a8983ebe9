"""Behind the ASGI middleware everything is as it was without it: each test runs an app bare and wrapped.

`talk` holds one connection with an app and records what it sends; `same` asserts that the recordings with and
without the middleware are alike, the headers that tell about the cache aside.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import types
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from llm_middleware import CacheManager
from llm_middleware.asgi import LLMCacheMiddleware
from llm_middleware.asgi.handover import send_or_hand_over
from llm_middleware.caching.flight import Flight
from tests.support import CHAT, chat_stream, completion

PATIENCE_S = 10
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
RAW = json.dumps(REQUEST).encode()
ANSWER = json.dumps(completion()).encode()
EVENTS = chat_stream("a", "b", "c")
JSON = [(b"content-type", b"application/json")]
SSE = [(b"content-type", b"text/event-stream")]
OURS = (b"x-llm-", b"cache-status", b"age")
DISCONNECT = {"type": "http.disconnect"}


def http(
    path: str = CHAT, method: str = "POST", headers: dict[str, str] | None = None, **more: object
) -> dict:
    sent = {"host": "test", "content-type": "application/json", **(headers or {})}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
        "server": ("test", 80),
        "client": ("127.0.0.1", 1234),
        "state": {},
        **more,
    }


def request(body: bytes = RAW, more: bool = False) -> dict:
    return {"type": "http.request", "body": body, "more_body": more}


@dataclass
class Talk:
    """What an app sent, and how its call ended."""

    sent: list[dict] = field(default_factory=list)
    error: BaseException | None = None
    received: int = 0

    @property
    def start(self) -> dict:
        return next(message for message in self.sent if message["type"] == "http.response.start")

    @property
    def status(self) -> int:
        return self.start["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode().lower(): value.decode("latin-1") for name, value in self.start["headers"]}

    @property
    def chunks(self) -> list[bytes]:
        return [m["body"] for m in self.sent if m["type"] == "http.response.body" and m.get("body")]

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def cache(self) -> str:
        return self.headers["x-llm-cache"]


async def talk(
    app, scope: dict, given: list[dict] | None = None, on_send: Callable[[dict], object] | None = None
) -> Talk:
    """One connection, as servers hold it: once the response is complete, or all of ``given`` was received and
    ``http.disconnect`` was the last of it, ``receive`` returns ``http.disconnect``."""
    done = Talk()
    pending = list([request()] if given is None else given)
    over = asyncio.Event()

    async def receive() -> dict:
        done.received += 1
        if pending:
            message = pending.pop(0)
            if message["type"] == "http.disconnect":
                over.set()
            return message
        await over.wait()
        return DISCONNECT

    async def send(message: dict) -> None:
        done.sent.append(message)
        if on_send is not None:
            result = on_send(message)
            if isinstance(result, Awaitable):
                await result
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            over.set()

    async with asyncio.timeout(PATIENCE_S):
        try:
            await app(scope, receive, send)
        except Exception as exc:
            done.error = exc
    return done


def plain(messages: list[dict]) -> list[dict]:
    """The messages without what tells about the cache, in one spelling."""
    found = []
    for message in messages:
        message = dict(message)
        if message["type"] == "http.response.start":
            message["headers"] = [
                (bytes(name).lower(), bytes(value))
                for name, value in message.get("headers", ())
                if not bytes(name).lower().startswith(OURS)
                and (name, value) != (b"cache-control", b"private, no-store")
                and (name, value) != (b"x-accel-buffering", b"no")
            ]
        if message["type"] == "http.response.body":
            message = {
                "type": message["type"],
                "body": message.get("body", b""),
                "more_body": message.get("more_body", False),
            }
        found.append(message)
    return found


def wrap(app, **options: object) -> LLMCacheMiddleware:
    return LLMCacheMiddleware(app, **{"cache": CacheManager(), **options})


def same(app, scope: Callable[[], dict] = http, given: list[dict] | None = None, **options: object) -> Talk:
    """Run bare and wrapped; assert that both say the same and end alike. The wrapped one's `Talk`."""

    async def both() -> tuple[Talk, Talk]:
        return await talk(app, scope(), given), await talk(wrap(app, **options), scope(), given)

    bare, wrapped = asyncio.run(both())
    assert plain(wrapped.sent) == plain(bare.sent)
    assert repr(wrapped.error) == repr(bare.error)
    return wrapped


async def read_body(receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def echo(scope, receive, send) -> None:
    """Tells what it was given."""
    body = await read_body(receive)
    told = {key: repr(value) for key, value in sorted(scope.items()) if key not in ("app", "state")}
    answer = json.dumps({"scope": told, "body": body.decode("latin-1")}).encode()
    headers = [*JSON, (b"content-length", b"%d" % len(answer)), (b"X-Own", b"1")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def answering(
    *bodies: bytes, headers: list[tuple[bytes, bytes]] = JSON, status: int = 200, read: bool = True
):
    """An app that sends these bodies, all but the last with ``more_body``."""

    async def app(scope, receive, send) -> None:
        if read:
            await read_body(receive)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for body in bodies[:-1]:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": bodies[-1], "more_body": False})

    return app


# What is not ours ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "post"])
def test_other_methods_on_a_cached_path(method: str):
    wrapped = same(echo, lambda: http(method=method))
    assert "x-llm-cache" not in wrapped.headers


@pytest.mark.parametrize("path", ["/", "/other", CHAT + "/", "/v2" + CHAT, "/v1/chat/completions%20", ""])
def test_other_paths(path: str):
    wrapped = same(echo, lambda: http(path))
    assert "x-llm-cache" not in wrapped.headers


def test_the_very_objects_are_passed_on_for_other_paths():
    got: list = []

    async def app(*args) -> None:
        got.extend(args)

    async def receive() -> dict:
        return DISCONNECT

    async def send(message: dict) -> None: ...

    scope = http("/other")
    asyncio.run(wrap(app)(scope, receive, send))
    assert all(one is other for one, other in zip(got, (scope, receive, send), strict=True))


def test_websockets():
    async def app(scope, receive, send) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        message = await receive()
        await send({"type": "websocket.send", "text": message["text"] + "!"})
        await send({"type": "websocket.close", "code": 1000})

    given = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "hi"}]

    def scope() -> dict:
        made = http()
        del made["method"]
        return {**made, "type": "websocket", "subprotocols": []}

    assert len(same(app, scope, given).sent) == 3


@pytest.mark.parametrize("fails", [None, "startup", "shutdown"])
def test_lifespan(fails: str | None):
    async def app(scope, receive, send) -> None:
        scope["state"]["db"] = "open"
        for phase in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{phase}"
            if phase == fails:
                await send({"type": f"lifespan.{phase}.failed", "message": "no database"})
                return
            await send({"type": f"lifespan.{phase}.complete"})

    given = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    same(app, lambda: {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, given)


def test_lifespan_that_raises():
    async def app(scope, receive, send) -> None:
        raise RuntimeError("lifespan is not supported")

    wrapped = same(app, lambda: {"type": "lifespan", "asgi": {"version": "3.0"}}, [])
    assert isinstance(wrapped.error, RuntimeError)


# Requests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_body_in_many_messages(size: int):
    pieces = [RAW[at : at + size] for at in range(0, len(RAW), size)]
    given = [request(piece, more=True) for piece in pieces] + [request(b"")]
    wrapped = same(echo, given=given)
    assert json.loads(wrapped.body)["body"].encode() == RAW


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b"\xff\xfe", b'{"model": "m"'])
def test_bodies_of_no_known_shape(body: bytes):
    wrapped = same(echo, given=[request(body)])
    assert wrapped.cache == "bypass"


def test_a_request_message_without_its_optional_fields():
    same(echo, given=[{"type": "http.request"}])


def test_a_body_over_the_limit_by_its_length():
    given = [request(RAW[:10], more=True), request(RAW[10:])]
    wrapped = same(echo, lambda: http(headers={"content-length": str(len(RAW))}), given, max_body_bytes=20)
    assert wrapped.cache == "bypass"
    assert json.loads(wrapped.body)["body"].encode() == RAW


@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_a_body_over_the_limit_by_what_comes(pieces: int):
    size = -(-len(RAW) // pieces)
    given = [request(RAW[at : at + size], more=at + size < len(RAW)) for at in range(0, len(RAW), size)]
    wrapped = same(echo, given=given, max_body_bytes=20)
    assert wrapped.cache == "bypass"
    assert "body-too-large" in wrapped.headers["cache-status"]


def test_a_streamed_body_over_the_limit_is_not_read_ahead():
    """The app gets what was read so far, and pulls the rest itself."""
    received: list[int] = []
    pieces = 50

    async def main() -> None:
        count = 0

        async def receive() -> dict:
            nonlocal count
            count += 1
            return request(b"x" * 10, more=count < pieces)

        async def app(scope, receive, send) -> None:
            received.append(count)
            assert len(await read_body(receive)) == 10 * pieces
            await answering(b"ok", read=False)(scope, receive, send)

        async def send(message: dict) -> None: ...

        await wrap(app, max_body_bytes=35)(http(), receive, send)

    asyncio.run(main())
    assert received == [4]


@pytest.mark.parametrize("given", [[DISCONNECT], [request(RAW[:9], more=True), DISCONNECT]])
def test_the_client_leaves_before_its_body_is_whole(given: list[dict]):
    got: list[list[dict]] = []

    async def app(scope, receive, send) -> None:
        got.append([await receive() for _ in range(len(given) + 1)])

    wrapped = same(app, given=given)
    assert wrapped.sent == []
    assert got == [[*given, DISCONNECT]] * 2


def test_scope_as_it_came_and_headers_in_order():
    def scope() -> dict:
        made = http(headers={"X-A": "1", "accept": "*/*", "x-b": "é"})
        made["headers"].append((b"x-a", b"2"))
        made["extensions"] = {"http.response.pathsend": {}}
        made["query_string"] = b"a=1&a=2"
        return made

    same(echo, scope)


def test_the_cache_field_is_taken_out_and_the_length_is_right():
    body = json.dumps({**REQUEST, "cache": {"ttl": 5}}).encode()
    seen: list[tuple[dict, bytes]] = []

    async def app(scope, receive, send) -> None:
        raw = await read_body(receive)
        seen.append((dict(scope["headers"]), raw))
        await answering(ANSWER, read=False)(scope, receive, send)

    scope = http(headers={"content-length": str(len(body))})
    before = list(scope["headers"])
    asyncio.run(talk(wrap(app), scope, [request(body)]))
    headers, raw = seen[0]
    assert json.loads(raw) == REQUEST
    assert headers[b"content-length"] == b"%d" % len(raw)
    assert scope["headers"] == before


def test_what_routers_leave_in_the_scope_is_seen_outside():
    """Instrumentation reads the route and the endpoint from the scope, once the response is there."""

    async def endpoint(request: Request) -> Response:
        request.scope["state"]["model"] = "m"
        return JSONResponse(completion())

    route = Route(CHAT, endpoint, methods=["POST"])
    app = wrap(Starlette(routes=[route]))
    scope = http()
    wrapped = asyncio.run(talk(app, scope))
    assert wrapped.cache == "miss"
    assert scope["endpoint"] is endpoint
    assert scope["state"] == {"model": "m"}
    assert scope["path_params"] == {}


# Answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 204, 400, 404, 422, 500, 503])
def test_plain_answers(status: int):
    body = b"" if status == 204 else ANSWER
    headers = [
        *JSON,
        (b"content-length", b"%d" % len(body)),
        (b"Set-Cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
    ]
    same(answering(body, headers=headers, status=status))


@pytest.mark.parametrize("headers", [SSE, [(b"content-type", b"application/x-ndjson")], []])
def test_streams_pass_message_by_message(headers: list):
    same(answering(*EVENTS, b"", headers=headers))
    same(answering(*EVENTS, headers=headers))


def test_a_plain_answer_in_pieces_is_the_same_body():
    headers = [*JSON, (b"content-length", b"%d" % len(ANSWER))]
    app = answering(ANSWER[:9], ANSWER[9:], b"", headers=headers)

    async def both() -> tuple[Talk, Talk]:
        return await talk(app, http()), await talk(wrap(app), http())

    bare, wrapped = asyncio.run(both())
    assert (wrapped.status, wrapped.body) == (bare.status, bare.body)
    assert wrapped.headers.items() >= bare.headers.items()


def test_messages_without_their_optional_fields():
    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    same(app)


def test_an_answer_before_the_body_was_read():
    same(answering(b'{"error": "who are you?"}', status=401, read=False))


def test_the_handler_never_answers():
    async def app(scope, receive, send) -> None:
        await read_body(receive)

    assert same(app).sent == []


def test_the_handler_raises_before_its_answer():
    async def app(scope, receive, send) -> None:
        await read_body(receive)
        raise ValueError("broken")

    wrapped = same(app)
    assert (wrapped.sent, repr(wrapped.error)) == ([], "ValueError('broken')")


@pytest.mark.parametrize("count", [0, 2])
def test_the_handler_raises_in_its_stream(count: int):
    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": SSE})
        for event in EVENTS[:count]:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        raise ValueError("broken")

    assert isinstance(same(app).error, ValueError)


def test_the_handler_raises_after_its_answer():
    async def app(scope, receive, send) -> None:
        await answering(ANSWER)(scope, receive, send)
        raise ValueError("a background task broke")

    assert isinstance(same(app).error, ValueError)


def test_the_handler_is_told_that_the_client_left():
    """Which it learns from ``receive``, when all was sent."""
    got: list[dict] = []

    async def app(scope, receive, send) -> None:
        await answering(ANSWER)(scope, receive, send)
        got.append(await receive())

    same(app)
    assert got == [DISCONNECT] * 2


@pytest.mark.parametrize("streamed", [False, True])
def test_a_handler_cancelled_from_outside_is_cancelled(streamed: bool):
    """A server that stops, or a timeout of the host's around us."""
    ends: list[str] = []

    async def main() -> None:
        begun = asyncio.Event()

        async def app(scope, receive, send) -> None:
            try:
                if streamed:
                    await send({"type": "http.response.start", "status": 200, "headers": SSE})
                begun.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise
            finally:
                await asyncio.sleep(0)
                ends.append("cleaned up")

        cache = CacheManager()
        task = asyncio.ensure_future(talk(wrap(app, cache=cache), http()))
        await begun.wait()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert cache.stats()["flights"] == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert ends == ["cancelled", "cleaned up"]


def test_the_first_event_is_sent_before_the_second_is_made():
    """Each send has reached the server when the handler goes on: nothing is held back, nothing runs ahead."""
    log: list[str] = []

    async def app(scope, receive, send) -> None:
        await read_body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": SSE})
        for number, event in enumerate(EVENTS):
            log.append(f"made {number}")
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def on_send(message: dict) -> None:
        log.append("start" if "status" in message else f"sent {len(message['body']) > 0}")

    for made in (app, wrap(app)):
        log.clear()
        asyncio.run(talk(made, http(), on_send=on_send))
        steps = [step for number in range(len(EVENTS)) for step in (f"made {number}", "sent True")]
        assert log == ["start", *steps, "sent False"]


@pytest.mark.parametrize("kind", [b"application/x-ndjson", b"text/plain", b"application/octet-stream"])
def test_other_streams_pass_at_once_and_are_replayed_piece_by_piece(kind: bytes):
    pieces = [b'{"n": 1}\n', b'{"n', b'": 2}\n', b"\n"]
    sent_when_made: list[int] = []

    async def main() -> None:
        sent: list[bytes] = []

        async def app(scope, receive, send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
            for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                sent_when_made.append(len(sent))
            await send({"type": "http.response.body", "body": b""})

        wrapped = wrap(app, routes={"/ask": "json"})
        scope = http("/ask")
        miss = await talk(
            wrapped, scope, on_send=lambda message: message.get("body") and sent.append(message["body"])
        )
        hit = await talk(wrapped, http("/ask"))
        assert (miss.cache, hit.cache) == ("miss", "hit")
        assert miss.chunks == hit.chunks == pieces
        assert hit.headers["content-type"].encode() == kind

    asyncio.run(main())
    assert sent_when_made == [1, 2, 3, 4]


# Extensions ---------------------------------------------------------------------------------------


def test_extension_early_hints_push_and_debug_before_the_answer():
    async def app(scope, receive, send) -> None:
        await read_body(receive)
        await send({"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload"]})
        await send({"type": "http.response.push", "path": "/a.css", "headers": []})
        await send({"type": "http.response.debug", "info": {"template": "a"}})
        await answering(ANSWER, read=False)(scope, receive, send)

    assert same(app).cache == "miss"


def test_extension_a_file_by_its_path():
    async def app(scope, receive, send) -> None:
        await read_body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": JSON})
        await send({"type": "http.response.pathsend", "path": "/srv/answer.json"})

    same(app)


def test_extension_a_file_by_its_path_is_sent_to_each_who_asks():
    """What the server sends by itself cannot be read along: those who wait call for themselves."""
    calls: list[int] = []

    async def main() -> list[Talk]:
        go = asyncio.Event()

        async def app(scope, receive, send) -> None:
            await read_body(receive)
            calls.append(1)
            await go.wait()
            await send({"type": "http.response.start", "status": 200, "headers": JSON})
            await send({"type": "http.response.pathsend", "path": "/srv/answer.json"})

        cache = CacheManager()
        # Servers take their time over a file.
        tasks = [
            asyncio.ensure_future(talk(wrap(app, cache=cache), http(), on_send=lambda message: turns(20)))
            for _ in range(3)
        ]
        await until(lambda: flights_readers(cache) == 2)
        go.set()
        return await asyncio.gather(*tasks)

    talks = asyncio.run(main())
    assert [each.error for each in talks] == [None] * 3
    expected = ["http.response.start", "http.response.pathsend"]
    assert [[message["type"] for message in each.sent] for each in talks] == [expected] * 3
    assert len(calls) == 3


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition never held")


def flights_readers(cache: CacheManager) -> int:
    return sum(flight.readers for flight in cache._flow.flights._flights.values())


@pytest.mark.parametrize("headers", [JSON, SSE])
def test_extension_trailers(headers: list):
    async def app(scope, receive, send) -> None:
        await read_body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": headers, "trailers": True})
        body = ANSWER if headers is JSON else b"".join(EVENTS)
        await send({"type": "http.response.body", "body": body, "more_body": False})
        trailers = [(b"x-checksum", b"1")]
        await send({"type": "http.response.trailers", "headers": trailers, "more_trailers": False})

    same(app)


# Starlette around and inside ----------------------------------------------------------------------


def host(endpoint: Callable, *middleware: Middleware, path: str = CHAT) -> Starlette:
    return Starlette(routes=[Route(path, endpoint, methods=["POST"])], middleware=list(middleware))


async def plain_endpoint(request: Request) -> Response:
    await request.json()
    return JSONResponse(completion())


async def stream_endpoint(request: Request) -> Response:
    await request.json()

    async def events() -> AsyncIterator[bytes]:
        for event in EVENTS:
            yield event

    return StreamingResponse(events(), media_type="text/event-stream")


ENDPOINTS = {"plain": plain_endpoint, "stream": stream_endpoint}
each_endpoint = pytest.mark.parametrize("endpoint", ENDPOINTS)


def body_for(endpoint: str) -> list[dict]:
    return [request(json.dumps({**REQUEST, "stream": endpoint == "stream"}).encode())]


def caching(cache: CacheManager) -> Middleware:
    return Middleware(LLMCacheMiddleware, cache=cache)


def marking(name: str) -> Middleware:
    """A middleware made with Starlette's ``@app.middleware("http")``, which is `BaseHTTPMiddleware`."""
    from starlette.middleware.base import BaseHTTPMiddleware

    async def dispatch(request: Request, call_next: Callable) -> Response:
        response = await call_next(request)
        response.headers[name] = "1"
        return response

    return Middleware(BaseHTTPMiddleware, dispatch=dispatch)


@each_endpoint
@pytest.mark.parametrize("spec", ["2.3", "2.4"])
def test_base_http_middleware_inside_and_outside(endpoint: str, spec: str):
    cache = CacheManager()
    app = host(ENDPOINTS[endpoint], marking("x-outer"), caching(cache), marking("x-inner"))

    async def main() -> list[Talk]:
        made = []
        for _ in range(2):
            scope = http(asgi={"version": "3.0", "spec_version": spec})
            made.append(await talk(app, scope, body_for(endpoint)))
        return made

    miss, hit = asyncio.run(main())
    assert (miss.error, hit.error) == (None, None)
    assert (miss.cache, hit.cache) == ("miss", "hit")
    assert miss.body == hit.body == (ANSWER_OF[endpoint])
    for reply in (miss, hit):
        assert (reply.headers["x-outer"], reply.headers["x-inner"]) == ("1", "1")
    if endpoint == "stream":
        assert hit.chunks == miss.chunks == EVENTS


ANSWER_OF = {
    "plain": JSONResponse(completion()).body,
    "stream": b"".join(EVENTS),
}


@each_endpoint
def test_fastapi_style_middleware_decorator(endpoint: str):
    from fastapi import FastAPI

    cache = CacheManager()
    app = FastAPI()

    @app.middleware("http")
    async def before(request: Request, call_next: Callable) -> Response:
        response = await call_next(request)
        response.headers["x-before"] = "1"
        return response

    app.add_middleware(LLMCacheMiddleware, cache=cache)

    @app.middleware("http")
    async def after(request: Request, call_next: Callable) -> Response:
        response = await call_next(request)
        response.headers["x-after"] = "1"
        return response

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        return await ENDPOINTS[endpoint](request)

    async def main() -> list[Talk]:
        return [await talk(app, http(), body_for(endpoint)) for _ in range(2)]

    miss, hit = asyncio.run(main())
    assert (miss.cache, hit.cache) == ("miss", "hit")
    assert miss.body == hit.body == ANSWER_OF[endpoint]
    assert {"x-before", "x-after"} <= hit.headers.keys()


@each_endpoint
@pytest.mark.parametrize("outside", [False, True])
def test_gzip_inside_and_outside(endpoint: str, outside: bool):
    """Whoever accepts gzip gets gzip as without us, whoever does not gets plain bytes, hit or miss."""
    cache = CacheManager()
    squeeze = Middleware(GZipMiddleware, minimum_size=1)
    order = [squeeze, caching(cache)] if outside else [caching(cache), squeeze]
    app = host(ENDPOINTS[endpoint], *order)

    async def main() -> list[Talk]:
        accepts = ["gzip", "identity", "gzip", "identity"]
        return [
            await talk(app, http(headers={"accept-encoding": accept}), body_for(endpoint))
            for accept in accepts
        ]

    talks = asyncio.run(main())
    for reply in talks:
        body = gzip.decompress(reply.body) if "content-encoding" in reply.headers else reply.body
        assert body == ANSWER_OF[endpoint]
        if "content-length" in reply.headers:
            assert int(reply.headers["content-length"]) == len(reply.body)
    assert "content-encoding" not in talks[1].headers
    assert "content-encoding" not in talks[3].headers
    assert talks[3].cache == "hit"


@each_endpoint
@pytest.mark.parametrize("outside", [False, True])
def test_cors_inside_and_outside(endpoint: str, outside: bool):
    """Each origin gets an answer that its browser accepts."""
    cache = CacheManager()
    origins = ["https://a.example", "https://b.example"]
    cors = Middleware(CORSMiddleware, allow_origins=origins, allow_credentials=True, allow_methods=["POST"])
    order = [cors, caching(cache)] if outside else [caching(cache), cors]
    app = host(ENDPOINTS[endpoint], *order)

    async def main() -> list[tuple[str, Talk]]:
        return [
            (origin, await talk(app, http(headers={"origin": origin}), body_for(endpoint)))
            for origin in [*origins, *origins, origins[1]]
        ]

    talks = asyncio.run(main())
    for origin, reply in talks:
        assert reply.headers["access-control-allow-origin"] == origin
        assert reply.headers["access-control-allow-credentials"] == "true"
        assert reply.body == ANSWER_OF[endpoint]
    assert talks[-1][1].cache == "hit"


def test_cors_preflight():
    cors = Middleware(CORSMiddleware, allow_origins=["https://a.example"], allow_methods=["POST"])
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    app = host(plain_endpoint, cors)
    assert same(app, lambda: http(method="OPTIONS", headers=headers)).status == 200


@each_endpoint
@pytest.mark.parametrize("streamed_body", [False, True])
def test_background_tasks_run_to_their_end(endpoint: str, streamed_body: bool):
    """The client is told "complete", the server's ``receive`` says "disconnected", and the task goes on."""
    ends: list[str] = []

    async def work() -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        ends.append("done")

    async def handler(request: Request) -> Response:
        response = await ENDPOINTS[endpoint](request)
        response.background = BackgroundTask(work)
        return response

    asyncio.run(talk(wrap(host(handler)), http(), body_for(endpoint)))
    assert ends == ["done"]


@pytest.mark.parametrize("why", ["vary", "encoding"])
def test_background_tasks_of_a_request_that_could_not_join_run_to_their_end(why: str):
    """It waited for another's answer, found that this one was not for it, and called for itself."""
    ends: list[str] = []

    async def main() -> list[Talk]:
        go = asyncio.Event()
        cache = CacheManager()

        async def work() -> None:
            for _ in range(20):
                await asyncio.sleep(0)
            ends.append("done")

        async def handler(request: Request) -> Response:
            response: Response
            await go.wait()
            headers = {"vary": "x-mode"} if why == "vary" else {"content-encoding": "br"}
            if why == "vary":
                response = JSONResponse(completion(), headers=headers)
            else:

                async def events() -> AsyncIterator[bytes]:
                    for event in EVENTS:
                        yield event

                response = StreamingResponse(events(), media_type="text/event-stream", headers=headers)
            response.background = BackgroundTask(work)
            return response

        app = wrap(host(handler), cache=cache)
        given = body_for("plain" if why == "vary" else "stream")
        tasks = [
            asyncio.ensure_future(talk(app, http(headers={"x-mode": mode}), given)) for mode in ("a", "b")
        ]
        await until(lambda: flights_readers(cache) == 1)
        go.set()
        return await asyncio.gather(*tasks)

    talks = asyncio.run(main())
    assert [each.error for each in talks] == [None, None]
    assert [each.cache for each in talks] == ["miss", "miss"]
    assert ends == ["done", "done"]


@pytest.mark.parametrize("mount", ["inside", "outside"])
def test_mounts(mount: str):
    """Around an app with a mounted one, and in the mounted one."""
    inner = Starlette(routes=[Route(CHAT, plain_endpoint, methods=["POST"])])
    cache = CacheManager()
    if mount == "inside":
        app = Starlette(routes=[Mount("/llm", app=LLMCacheMiddleware(inner, cache=cache))])
    else:
        outer = Starlette(routes=[Mount("/llm", app=inner)])
        app = LLMCacheMiddleware(outer, cache=cache, routes={"/llm" + CHAT: "chat"})

    async def main() -> list[Talk]:
        made = [await talk(app, http("/llm" + CHAT)) for _ in range(2)]
        made.append(await talk(app, http(CHAT)))
        return made

    miss, hit, unknown = asyncio.run(main())
    assert (miss.cache, hit.cache, unknown.status) == ("miss", "hit", 404)
    assert hit.body == ANSWER_OF["plain"]


def test_a_root_path_that_the_server_puts_in_front():
    """``uvicorn --root-path /api``: the path has the prefix, the routes do not."""
    app = wrap(host(plain_endpoint))

    async def main() -> list[Talk]:
        return [await talk(app, http("/api" + CHAT, root_path="/api")) for _ in range(2)]

    miss, hit = asyncio.run(main())
    assert (miss.status, miss.cache, hit.cache) == (200, "miss", "hit")


def test_unknown_routes_of_the_host_are_the_hosts():
    app = Starlette(routes=[Route("/x", PlainTextResponse("x"))])
    wrapped = same(app)
    assert (wrapped.status, wrapped.body) == (404, b"Not Found")


def test_debug_pages_and_exception_handlers():
    async def endpoint(request: Request) -> Response:
        raise ValueError("broken")

    wrapped = same(host(endpoint))
    assert wrapped.status == 500
    assert isinstance(wrapped.error, ValueError)


# Handing a stuck send over ------------------------------------------------------------------------


def joinable() -> Flight:
    return Flight("key", joinable=True)


class Sends:
    """A server's ``send`` that waits where it is told to, and remembers how it ended."""

    def __init__(self) -> None:
        self.ends: list[str] = []

    async def run(self, wait: Callable[[], Awaitable[object]]) -> None:
        try:
            await wait()
        except BaseException as exc:
            self.ends.append(type(exc).__name__)
            raise
        else:
            self.ends.append("sent")


async def bounded(work: Awaitable):
    async with asyncio.timeout(PATIENCE_S):
        return await work


def test_handover_of_a_send_that_does_not_wait():
    async def main() -> None:
        sends = Sends()

        async def nothing() -> None: ...

        assert await bounded(send_or_hand_over(sends.run(nothing), joinable())) is None
        assert sends.ends == ["sent"]

    asyncio.run(main())


@pytest.mark.parametrize("readers", [0, 1])
def test_handover_of_a_send_that_only_yields(readers: int):
    async def main() -> None:
        sends, flight = Sends(), joinable()
        for _ in range(readers):
            flight.enter()

        async def yields() -> None:
            for _ in range(3):
                await asyncio.sleep(0)

        assert await bounded(send_or_hand_over(sends.run(yields), flight)) is None
        assert sends.ends == ["sent"]

    asyncio.run(main())


@pytest.mark.parametrize("result", ["value", "error", "cancelled"])
def test_handover_of_a_send_that_waits_alone(result: str):
    async def main() -> None:
        sends, future = Sends(), asyncio.get_running_loop().create_future()

        async def waits() -> None:
            assert await future == 1
            await asyncio.sleep(0)

        task = asyncio.ensure_future(bounded(send_or_hand_over(sends.run(waits), joinable())))
        await turns()
        assert not task.done()
        end(future, result)
        await asyncio.wait({task})
        assert sends.ends == [ENDS[result]]
        if result == "value":
            assert task.result() is None
        elif result == "error":
            assert isinstance(task.exception(), OSError)
        else:
            assert task.cancelled()

    asyncio.run(main())


ENDS = {"value": "sent", "error": "OSError", "cancelled": "CancelledError"}


def end(future: asyncio.Future, result: str) -> None:
    if result == "value":
        future.set_result(1)
    elif result == "error":
        future.set_exception(OSError("gone"))
    else:
        future.cancel()


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("result", ["value", "error", "cancelled"])
@pytest.mark.parametrize("when", ["before", "while stuck"])
def test_handover_of_a_send_that_is_stuck_while_others_wait(when: str, result: str):
    """What is left of the send goes on in another task and ends as it would have ended."""

    async def main() -> None:
        sends, flight = Sends(), joinable()
        future = asyncio.get_running_loop().create_future()

        async def waits() -> None:
            assert await future == 1
            await asyncio.sleep(0)

        if when == "before":
            flight.enter()
        task = asyncio.ensure_future(send_or_hand_over(sends.run(waits), flight))
        await turns()
        flight.enter()
        rest = await bounded(task)
        assert rest is not None
        assert sends.ends == []
        writer = asyncio.ensure_future(awaited(rest))
        await turns()
        assert not writer.done()
        end(future, result)
        await asyncio.wait({writer})
        assert sends.ends == [ENDS[result]]
        if result == "error":
            assert isinstance(writer.exception(), OSError)

    asyncio.run(main())


async def awaited(work: Awaitable) -> object:
    return await work


def test_handover_and_the_writer_is_cancelled():
    async def main() -> None:
        sends, flight = Sends(), joinable()
        future = asyncio.get_running_loop().create_future()

        async def waits() -> None:
            await future

        flight.enter()
        rest = await bounded(send_or_hand_over(sends.run(waits), flight))
        writer = asyncio.ensure_future(awaited(rest))
        await turns()
        writer.cancel()
        await asyncio.wait({writer})
        assert writer.cancelled()
        assert sends.ends == ["CancelledError"]

    asyncio.run(main())


def test_handover_of_a_send_that_raises():
    async def main() -> None:
        sends = Sends()

        async def raises() -> None:
            raise OSError("the client has left")

        with pytest.raises(OSError, match="the client has left"):
            await send_or_hand_over(sends.run(raises), joinable())
        assert sends.ends == ["OSError"]

    asyncio.run(main())


@pytest.mark.parametrize("cleanup", [False, True])
def test_handover_cancelled_while_the_send_is_stuck(cleanup: bool):
    """The send sees the `CancelledError`, as it would without us, and may await in its cleanup."""

    async def main() -> None:
        ends: list[str] = []
        future = asyncio.get_running_loop().create_future()

        async def send() -> None:
            try:
                await future
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise
            finally:
                if cleanup:
                    await asyncio.sleep(0)
                ends.append("cleaned up")

        task = asyncio.ensure_future(send_or_hand_over(send(), joinable()))
        await turns()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert ends == ["cancelled", "cleaned up"]

    asyncio.run(main())


def test_handover_cancelled_while_the_send_is_stuck_and_it_gives_in():
    """A send that takes the cancellation for "the client has left" and returns."""

    async def main() -> None:
        ends: list[str] = []
        future = asyncio.get_running_loop().create_future()

        async def send() -> None:
            try:
                await future
            except asyncio.CancelledError:
                ends.append("given up")

        task = asyncio.ensure_future(send_or_hand_over(send(), joinable()))
        await turns()
        task.cancel()
        await asyncio.wait({task})
        assert ends == ["given up"]
        assert not task.cancelled()
        assert task.exception() is None

    asyncio.run(main())


def test_handover_cancelled_while_the_send_yields():
    async def main() -> None:
        ends: list[str] = []

        async def send() -> None:
            try:
                await turns(1000)
            except asyncio.CancelledError:
                ends.append("given up")

        task = asyncio.ensure_future(send_or_hand_over(send(), joinable()))
        await turns()
        task.cancel()
        await asyncio.wait({task})
        assert ends == ["given up"]
        assert task.exception() is None

    asyncio.run(main())


def test_handover_of_a_send_that_is_a_future_or_an_awaitable_of_its_own():
    @types.coroutine
    def generator():
        yield
        return None

    class Own:
        """An awaitable of the server's own making."""

        def __await__(self):
            return generator()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for sending in (Own(), done_future(loop)):
            assert await bounded(send_or_hand_over(sending, joinable())) is None

        late = loop.create_future()
        task = asyncio.ensure_future(send_or_hand_over(late, joinable()))
        await turns()
        late.set_result(None)
        assert await bounded(task) is None

    asyncio.run(main())


def done_future(loop: asyncio.AbstractEventLoop) -> asyncio.Future:
    future = loop.create_future()
    future.set_result(None)
    return future


@pytest.mark.parametrize("cancelled", [False, True])
def test_handover_of_an_awaitable_whose_iterator_is_no_generator(cancelled: bool):
    """``__await__`` may return any iterator: servers that are not written in Python give no more."""

    class Own:
        def __init__(self) -> None:
            self.left = 5

        def __await__(self):
            return self

        def __iter__(self):
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            self.left -= 1

    async def main() -> None:
        sending = Own()
        task = asyncio.ensure_future(send_or_hand_over(sending, joinable()))
        if cancelled:
            await turns(2)
            task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() == cancelled
        assert (sending.left == 0) != cancelled

    asyncio.run(main())


def test_handover_of_what_another_framework_awaits():
    """What a send yields is passed to the event loop as it is, and the loop's answer comes back to it."""

    @types.coroutine
    def odd():
        answer = yield "a trap of another framework's"
        return answer

    got: list[object] = []

    async def send() -> None:
        got.append(await odd())

    step = send_or_hand_over(send(), joinable()).__await__()
    assert next(step) == "a trap of another framework's"
    with pytest.raises(StopIteration) as stop:
        step.send("an answer")
    assert stop.value.value is None
    assert got == ["an answer"]


def test_handover_of_a_flight_that_nobody_can_join():
    async def main() -> None:
        sends, flight = Sends(), Flight("key", joinable=False)
        future = asyncio.get_running_loop().create_future()

        async def waits() -> None:
            await future

        task = asyncio.ensure_future(send_or_hand_over(sends.run(waits), flight))
        await turns()
        flight.enter()
        await turns()
        assert not task.done()
        future.set_result(None)
        assert await bounded(task) is None

    asyncio.run(main())


# A client that leaves -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["disconnect", "send raises"])
def test_the_client_leaves_a_stream(how: str):
    """The handler ends, nothing is stored, and the server sees no error that it would not see without us."""
    ends: list[str] = []

    async def main() -> tuple[Talk, CacheManager]:
        gone = asyncio.Event()
        pending = [request()]
        done = Talk()

        async def receive() -> dict:
            if pending:
                return pending.pop()
            await (gone.wait() if how == "disconnect" else asyncio.Event().wait())
            return DISCONNECT

        async def send(message: dict) -> None:
            if gone.is_set() and how == "send raises":
                raise OSError("the client has left")
            done.sent.append(message)
            if len(done.chunks) == 2:
                gone.set()

        async def app(scope, receive, send) -> None:
            await read_body(receive)
            await send({"type": "http.response.start", "status": 200, "headers": SSE})
            try:
                for _ in range(1000):
                    await send({"type": "http.response.body", "body": EVENTS[0], "more_body": True})
                    await asyncio.sleep(0)
                ends.append("never noticed")
            finally:
                ends.append("ended")

        cache = CacheManager()
        async with asyncio.timeout(PATIENCE_S):
            try:
                await wrap(app, cache=cache)(http(), receive, send)
            except OSError as exc:
                done.error = exc
        return done, cache

    done, cache = asyncio.run(main())
    assert ends == ["ended"]
    assert (done.error is None) == (how == "disconnect")
    assert cache.stats()["flights"] == 0
    assert "stored" not in cache.stats()


def test_the_client_leaves_while_a_hit_is_sent():
    """The server's OSError is its own affair; the entry stays."""

    async def main() -> None:
        cache = CacheManager()
        app = wrap(answering(*EVENTS, b"", headers=SSE), cache=cache)
        given = [request(json.dumps({**REQUEST, "stream": True}).encode())]
        assert (await talk(app, http(), given)).cache == "miss"

        def raises(message: dict) -> None:
            if message.get("body") == EVENTS[1]:
                raise OSError("the client has left")

        cut = await talk(app, http(), given, raises)
        assert (cut.cache, type(cut.error)) == ("hit", OSError)
        assert (await talk(app, http(), given)).chunks == EVENTS

    asyncio.run(main())
