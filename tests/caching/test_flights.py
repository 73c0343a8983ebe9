"""Concurrent identical requests share one call (C54, C56, C57, C58, C84), whoever asks, leaves or fails.

Most tests run in five worlds, each a way to reach the cache with a stream: `fetch`, `afetch` with an async
and with a sync iterator, and the two middlewares. A `World` opens `Client`s that the test drives step by
step; what the upstream does is ordered by `Gate`s, never by time.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import gzip
import io
import json
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from llm_middleware import CacheManager
from llm_middleware.asgi import LLMCacheMiddleware as ASGIMiddleware
from llm_middleware.errors import FlightAbandonedError, SuspendedInSyncError
from llm_middleware.wsgi import LLMCacheMiddleware as WSGIMiddleware
from tests.support import CHAT, chat_stream, completion

PATIENCE_S = 10
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**BODY, "stream": True}
EVENTS = chat_stream("a", "b", "c")
JSON_HEADERS = {"content-type": "application/json"}
SSE_HEADERS = {"content-type": "text/event-stream"}


class Gate:
    """Opens once, from any thread; threads and tasks wait for it."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._futures: list[tuple[asyncio.AbstractEventLoop, asyncio.Future]] = []

    @property
    def is_open(self) -> bool:
        return self._event.is_set()

    def open(self) -> None:
        with self._lock:
            self._event.set()
            futures, self._futures = self._futures, []
        for loop, future in futures:
            loop.call_soon_threadsafe(lambda future=future: future.done() or future.set_result(None))

    def wait(self) -> None:
        if not self._event.wait(PATIENCE_S):
            raise TimeoutError("the gate was never opened")

    async def await_(self) -> None:
        with self._lock:
            if self._event.is_set():
                return
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            self._futures.append((loop, future))
        async with asyncio.timeout(PATIENCE_S):
            await future


class Plain:
    """A plain answer, or an error, that the upstream gives once ``go`` is open."""

    def __init__(
        self,
        value: object = None,
        *,
        status: int = 200,
        error: BaseException | None = None,
        held: bool = False,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status = status
        self.headers = headers or JSON_HEADERS
        self.body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.error = error
        self.reached = Gate()
        self.go = Gate()
        self.cancelled = False
        if not held:
            self.go.open()

    def wait(self) -> None:
        self.reached.open()
        self.go.wait()
        if self.error is not None:
            raise self.error

    async def await_(self) -> None:
        self.reached.open()
        try:
            await self.go.await_()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.error is not None:
            raise self.error


class Source:
    """The upstream's stream, sync and async: stops before event ``hold_at`` until ``go`` is open, ends with
    ``error`` where one is given, and counts how often it was closed."""

    def __init__(
        self,
        events: list[bytes] = EVENTS,
        *,
        hold_at: int | None = None,
        error: BaseException | None = None,
        headers: dict[str, str] | None = None,
        on_close: Callable[[], object] | None = None,
    ) -> None:
        self.events = events
        self.headers = headers or SSE_HEADERS
        self.hold_at = hold_at
        self.error = error
        self.at = 0
        self.closed = 0
        self.reached = Gate()
        self.go = Gate()
        self.on_close = on_close

    def _take(self) -> bytes | None:
        if self.at == len(self.events):
            if self.error is not None:
                raise self.error
            return None
        self.at += 1
        return self.events[self.at - 1]

    def _close(self) -> None:
        self.closed += 1
        if self.on_close is not None:
            self.on_close()


class SyncSource(Source):
    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self.at == self.hold_at:
            self.reached.open()
            self.go.wait()
        item = self._take()
        if item is None:
            raise StopIteration
        return item

    def close(self) -> None:
        self._close()


class AsyncSource(Source):
    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self.at == self.hold_at:
            self.reached.open()
            await self.go.await_()
        item = self._take()
        if item is None:
            raise StopAsyncIteration
        return item

    async def aclose(self) -> None:
        self._close()


# Worlds -------------------------------------------------------------------------------------------


class LoopThread:
    """An event loop that runs in a thread of its own, as a server's does. At its end no task is left."""

    def __init__(self) -> None:
        self.problems: list[object] = []
        self.runner = asyncio.Runner()
        self.loop = self.runner.get_loop()
        self.loop.set_exception_handler(lambda loop, context: self.problems.append(context))
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def submit(self, coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine):
        return self.submit(coroutine).result(PATIENCE_S)

    def call(self, function: Callable[[], object]) -> object:
        async def work() -> object:
            return function()

        return self.run(work())

    def tasks(self) -> set[asyncio.Task]:
        return asyncio.all_tasks(self.loop)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PATIENCE_S)
        self.runner.close()


class World:
    """One way to reach the cache. ``answers(number)`` makes the upstream's answer to call ``number``."""

    name: str
    source: type[Source]
    counts_leader = True  # the leader of a stream is one of its flight's readers

    def __init__(self, cache: CacheManager, answers: Callable[[int], object], loop: LoopThread) -> None:
        self.cache = cache
        self.answers = answers
        self.loop = loop
        self.calls = 0
        self._lock = threading.Lock()

    def answer(self) -> object:
        with self._lock:
            self.calls += 1
            number = self.calls
        return self.answers(number)

    @property
    def readers(self) -> int:
        return sum(flight.readers for flight in list(self.cache._flow.flights._flights.values()))

    @property
    def flights(self) -> int:
        return self.cache.stats()["flights"]

    def open(self, body: object = STREAM, **options: object) -> Client:
        raise NotImplementedError

    def ask(self, body: object = BODY, **options: object) -> bytes:
        """The whole answer, plain or streamed."""
        return b"".join(self.open(body, **options).rest())


class Client:
    """One caller with an answer that has begun. ``next`` is None at the end."""

    cache: str
    status: int

    def next(self) -> bytes | None:
        raise NotImplementedError

    def rest(self) -> list[bytes]:
        return list(iter(self.next, None))

    def leave(self, way: str) -> None:
        raise NotImplementedError


class FetchWorld(World):
    name = "fetch"
    source = SyncSource

    def open(self, body: object = STREAM, **options: object) -> Client:
        return FetchClient(self.cache.fetch(body, self._call, **options))

    def _call(self, body: object) -> object:
        made = self.answer()
        if isinstance(made, Plain):
            made.wait()
            return response_of(made)
        return made


class FetchClient(Client):
    def __init__(self, answer) -> None:
        self.answer = answer
        self.cache = answer.cache.status
        self.status = answer.status
        self.iterator = None

    def next(self) -> bytes | None:
        if self.iterator is None:
            self.iterator = iter(self.answer) if self.answer.streamed else iter([self.answer.body])
        return next(self.iterator, None)

    def leave(self, way: str) -> None:
        if way == "close":
            self.answer.close()
        elif way == "iterator":
            self.iterator.close()
        else:
            self.answer = self.iterator = None
            gc.collect()


class AfetchWorld(World):
    name = "afetch"
    source = AsyncSource

    def open(self, body: object = STREAM, **options: object) -> Client:
        return AfetchClient(self.loop, self.loop.run(self.afetch(body, **options)))

    def afetch(self, body: object = STREAM, **options: object):
        return self.cache.afetch(body, self._call, **options)

    async def _call(self, body: object) -> object:
        made = self.answer()
        if isinstance(made, Plain):
            await made.await_()
            return response_of(made)
        return made


class AfetchSyncIteratorWorld(AfetchWorld):
    """The call of an async caller returns a sync iterator."""

    name = "afetch-sync"
    source = SyncSource


class AfetchClient(Client):
    def __init__(self, loop: LoopThread, answer) -> None:
        self.loop = loop
        self.answer = answer
        self.cache = answer.cache.status
        self.status = answer.status
        self.iterator = answer.__aiter__()

    def next(self) -> bytes | None:
        async def step() -> bytes | None:
            return await anext(self.iterator, None)

        return self.loop.run(step())

    def leave(self, way: str) -> None:
        if way == "close":
            self.loop.run(self.answer.aclose())
            return

        def drop() -> None:
            self.answer = self.iterator = None
            gc.collect()

        self.loop.call(drop)


class AsgiWorld(World):
    name = "asgi"
    source = AsyncSource
    counts_leader = False

    def __init__(self, cache: CacheManager, answers: Callable[[int], object], loop: LoopThread) -> None:
        super().__init__(cache, answers, loop)
        self.app = ASGIMiddleware(self._handler, cache=cache)

    async def _handler(self, scope, receive, send) -> None:
        await receive()
        made = self.answer()
        start = {"type": "http.response.start", "headers": pairs(made.headers)}
        if isinstance(made, Plain):
            await made.await_()
            await send({**start, "status": made.status})
            await send({"type": "http.response.body", "body": made.body})
            return
        await send({**start, "status": 200})
        try:
            async for event in made:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            await made.aclose()
        await send({"type": "http.response.body", "body": b""})

    def open(self, body: object = STREAM, **options: object) -> Client:
        client = AsgiClient(self, body, **options)
        client.begin()
        return client


class AsgiClient(Client):
    """``reads`` False: a client whose connection takes the headers and then nothing more."""

    def __init__(
        self,
        world: AsgiWorld,
        body: object,
        *,
        headers: dict[str, str] | None = None,
        reads: bool = True,
        spec: str = "2.3",
    ) -> None:
        self.world = world
        self.messages: queue.Queue = queue.Queue()
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        if reads:
            self.reads.set()
        self.scope, self.raw = http_scope(body, headers)
        self.scope["asgi"]["spec_version"] = spec
        self.task = None
        self.future = world.loop.submit(self._run())

    async def _run(self) -> None:
        given = [{"type": "http.request", "body": self.raw, "more_body": False}]
        self.task = asyncio.current_task()

        async def receive() -> dict:
            if given:
                return given.pop()
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            if self.gone.is_set():
                raise OSError("the client has left")
            self.messages.put(message)
            if message["type"] == "http.response.body":
                await self.reads.wait()
                if not message.get("more_body"):
                    self.gone.set()  # as servers do: nothing more is to come

        try:
            await self.world.app(self.scope, receive, send)
        except BaseException as exc:
            self.messages.put(exc)
            raise
        self.messages.put(None)

    def begin(self) -> None:
        start = self._message()
        if start is None:
            raise AssertionError("no answer")
        self.status = start["status"]
        self.headers = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
        self.cache = self.headers["x-llm-cache"]

    def _message(self) -> dict | None:
        message = self.messages.get(timeout=PATIENCE_S)
        if isinstance(message, BaseException):
            raise message
        return message

    def next(self) -> bytes | None:
        while (message := self._message()) is not None:
            if message["body"]:
                return message["body"]
        return None

    def leave(self, way: str) -> None:
        def go() -> None:
            self.gone.set()
            self.reads.set()
            if way == "cancel":
                self.task.cancel()

        self.world.loop.call(go)


class WsgiWorld(World):
    name = "wsgi"
    source = SyncSource

    def __init__(self, cache: CacheManager, answers: Callable[[int], object], loop: LoopThread) -> None:
        super().__init__(cache, answers, loop)
        self.app = WSGIMiddleware(self._handler, cache=cache)

    def _handler(self, environ, start_response):
        made = self.answer()
        if isinstance(made, Plain):
            made.wait()
            start_response(f"{made.status} Status", list(made.headers.items()))
            return [made.body]
        start_response("200 OK", list(made.headers.items()))
        return made

    def open(self, body: object = STREAM, **options: object) -> Client:
        return WsgiClient(self.app, body, **options)


class WsgiClient(Client):
    def __init__(self, app, body: object, *, headers: dict[str, str] | None = None) -> None:
        started: list = []
        self.result = app(wsgi_environ(body, headers), lambda *args: started.append(args))
        self.iterator = iter(self.result)
        self.status = int(started[0][0][:3])
        self.headers = {name.lower(): value for name, value in started[0][1]}
        self.cache = self.headers["x-llm-cache"]

    def next(self) -> bytes | None:
        try:
            piece = next(self.iterator, None)
        except BaseException:
            self.close()
            raise
        if piece is None:
            self.close()
        return piece

    def close(self) -> None:
        if hasattr(self.result, "close"):
            self.result.close()

    def leave(self, way: str) -> None:
        if way == "close":
            self.close()
        elif way == "drop":
            self.result = self.iterator = None
            gc.collect()


class _Response:
    """A response as HTTP clients have them."""

    def __init__(self, made: Plain) -> None:
        self.status_code, self.content, self.headers = made.status, made.body, made.headers


def response_of(made: Plain) -> _Response:
    return _Response(made)


def pairs(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


def http_scope(body: object, headers: dict[str, str] | None = None) -> tuple[dict, bytes]:
    raw = json.dumps(body).encode()
    sent = {"content-type": "application/json", "content-length": str(len(raw)), **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "root_path": "",
        "query_string": b"",
        "server": ("test", 80),
        "client": ("test", 1),
        "headers": pairs(sent),
    }
    return scope, raw


def wsgi_environ(body: object, headers: dict[str, str] | None = None) -> dict:
    raw = json.dumps(body).encode()
    environ = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": CHAT,
        "SCRIPT_NAME": "",
        "QUERY_STRING": "",
        "SERVER_NAME": "test",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(raw)),
        "wsgi.input": io.BytesIO(raw),
        "wsgi.errors": io.StringIO(),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for name, value in (headers or {}).items():
        environ["HTTP_" + name.upper().replace("-", "_")] = value
    return environ


WORLDS = {
    kind.name: kind for kind in (FetchWorld, AfetchWorld, AfetchSyncIteratorWorld, AsgiWorld, WsgiWorld)
}
FRONTS = ["asgi", "wsgi"]
WAYS = [
    ("fetch", "close"),
    ("fetch", "drop"),
    ("afetch", "close"),
    ("afetch", "drop"),
    ("afetch-sync", "close"),
    ("afetch-sync", "drop"),
    ("asgi", "disconnect"),
    ("asgi", "cancel"),
    ("wsgi", "close"),
    ("wsgi", "drop"),
]
each_world = pytest.mark.parametrize("name", WORLDS)
each_front = pytest.mark.parametrize("name", FRONTS)
each_direct = pytest.mark.parametrize(("name", "way"), [("fetch", "iterator"), ("wsgi", "close")])
each_way = pytest.mark.parametrize(("name", "way"), WAYS)


@pytest.fixture
def loop(when):
    made = LoopThread()
    yield made
    try:
        when(lambda: not made.tasks())
    finally:
        made.close()
    assert made.problems == []


@pytest.fixture
def new_cache(when):
    """``new_cache(**settings)``: a manager whose flights have all landed at the end of the test."""
    made: list[CacheManager] = []

    def make(**settings: object) -> CacheManager:
        made.append(CacheManager(**settings))
        return made[-1]

    yield make
    for cache in made:
        when(lambda cache=cache: cache.stats()["flights"] == 0)


@pytest.fixture
def world_of(new_cache, loop):
    """``world_of(name, answers, **settings)``: a `World` with a cache of its own."""

    def make(name: str, answers: Callable[[int], object], **settings: object) -> World:
        return WORLDS[name](new_cache(**settings), answers, loop)

    return make


@pytest.fixture
def pool():
    """``pool(function, *args)``: run it in a thread; a `Future`."""
    with ThreadPoolExecutor(64) as threads:
        yield threads.submit


def outcome(future: Future) -> object:
    """The future's result, or the exception it ended with."""
    error = future.exception(PATIENCE_S)
    return error if error is not None else future.result()


# One call for all ---------------------------------------------------------------------------------


@each_world
@pytest.mark.parametrize("count", [20, 50])
def test_c54_concurrent_identical_requests_make_one_call(world_of, pool, when, name: str, count: int):
    plain = Plain(completion(), held=True)
    world = world_of(name, lambda number: plain)
    futures = [pool(world.ask) for _ in range(count)]
    plain.reached.wait()
    when(lambda: world.readers == count - 1)
    plain.go.open()
    assert [outcome(future) for future in futures] == [plain.body] * count
    assert world.calls == 1
    stats = world.cache.stats()
    assert (stats["miss"], stats["collapsed"], stats["stored"]) == (1, count - 1, 1)


@pytest.mark.parametrize("leader", ["sync", "async"])
def test_c54_threads_and_tasks_share_one_flight(new_cache, loop, pool, when, leader: str):
    cache = new_cache()
    plain = Plain(completion(), held=True)
    threads = FetchWorld(cache, lambda number: plain, loop)
    tasks = AfetchWorld(cache, lambda number: plain, loop)
    first, second = (threads, tasks) if leader == "sync" else (tasks, threads)
    futures = [pool(first.ask)]
    plain.reached.wait()
    futures += [pool(second.ask) for _ in range(10)] + [pool(first.ask) for _ in range(9)]
    when(lambda: first.readers == 19)
    plain.go.open()
    assert [outcome(future) for future in futures] == [plain.body] * 20
    assert threads.calls + tasks.calls == 1


@pytest.mark.parametrize("leader", ["fetch", "afetch", "afetch-sync"])
@pytest.mark.parametrize("follower", ["fetch", "afetch"])
def test_c57_threads_and_tasks_share_one_stream(new_cache, loop, pool, when, leader: str, follower: str):
    cache = new_cache()
    source = WORLDS[leader].source(hold_at=2)
    leads = WORLDS[leader](cache, lambda number: source, loop)
    follows = WORLDS[follower](cache, lambda number: None, loop)
    first = leads.open()
    second = follows.open()
    assert [first.next(), first.next()] == EVENTS[:2]
    assert [second.next(), second.next()] == EVENTS[:2]
    rest = [pool(client.rest) for client in (first, second)]
    source.go.open()
    assert [outcome(future) for future in rest] == [EVENTS[2:]] * 2
    assert (first.cache, second.cache) == ("miss", "collapsed")
    assert (leads.calls, follows.calls) == (1, 0)


def test_c54_twenty_tasks_on_one_loop_make_one_call(new_cache, face):
    cache, calls = new_cache(), []

    async def main() -> list:
        begun = asyncio.Event()

        async def call(body: object) -> dict:
            calls.append(body)
            await begun.wait()
            return completion()

        tasks = [asyncio.ensure_future(cache.afetch(BODY, call)) for _ in range(20)]
        await until(lambda: cache._flow.flights._flights and _readers(cache) == 19)
        begun.set()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(main())
    assert [answer.json() for answer in answers] == [completion()] * 20
    assert sorted(answer.cache.status for answer in answers) == ["collapsed"] * 19 + ["miss"]
    assert calls == [BODY]


def _readers(cache: CacheManager) -> int:
    return sum(flight.readers for flight in list(cache._flow.flights._flights.values()))


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition never held")


@each_world
def test_c54_other_bodies_have_flights_of_their_own(world_of, pool, name: str):
    held = Plain(completion("held"), held=True)
    free = Plain(completion("free"))
    world = world_of(name, lambda number: held if number == 1 else free)
    first = pool(world.ask)
    held.reached.wait()
    assert world.ask({**BODY, "seed": 1}) == free.body
    assert world.flights == 1
    held.go.open()
    assert outcome(first) == held.body


@each_world
def test_c58_an_immediate_repeat_is_a_hit(world_of, name: str):
    world = world_of(name, lambda number: Plain(completion(str(number))))
    for _ in range(20):
        assert world.ask() == Plain(completion("1")).body
    stats = world.cache.stats()
    assert (world.calls, stats["miss"], stats["hit"]) == (1, 1, 19)


@each_world
def test_c58_an_immediate_repeat_of_a_stream_is_a_hit(world_of, name: str):
    world = world_of(name, lambda number: WORLDS[name].source())
    assert world.open().rest() == EVENTS
    again = world.open()
    assert (again.cache, again.rest()) == ("hit", EVENTS)
    assert world.calls == 1


# Streams ------------------------------------------------------------------------------------------


@each_world
def test_c57_concurrent_streams_share_one_upstream_and_a_late_joiner_gets_the_prefix(
    world_of, pool, name: str
):
    source = WORLDS[name].source(hold_at=3)
    world = world_of(name, lambda number: source)
    leader = world.open()
    assert [leader.next() for _ in range(3)] == EVENTS[:3]
    followers = [world.open() for _ in range(5)]
    # The record's prefix is there at once, although the upstream gives nothing.
    assert [[client.next() for _ in range(3)] for client in followers] == [EVENTS[:3]] * 5
    assert [client.cache for client in (leader, *followers)] == ["miss"] + ["collapsed"] * 5
    rests = [pool(client.rest) for client in (leader, *followers)]
    source.go.open()
    assert [outcome(rest) for rest in rests] == [EVENTS[3:]] * 6
    assert world.calls == 1
    assert source.closed <= 1
    assert world.cache.stats()["stored"] == 1


@each_world
def test_c57_twenty_streams_asked_for_at_once(world_of, pool, when, name: str):
    source = WORLDS[name].source(hold_at=1)
    world = world_of(name, lambda number: source)
    futures = [pool(lambda: world.open().rest()) for _ in range(20)]
    when(lambda: world.readers == (20 if world.counts_leader else 19))
    source.go.open()
    assert [outcome(future) for future in futures] == [EVENTS] * 20
    assert world.calls == 1


@each_world
def test_c57_live_events_reach_a_follower_one_by_one(world_of, pool, name: str):
    """An event is passed on when it is there, not when the next one is."""
    source = WORLDS[name].source(hold_at=1)
    world = world_of(name, lambda number: source)
    leader = world.open()
    assert leader.next() == EVENTS[0]
    follower = world.open()
    assert follower.next() == EVENTS[0]
    source.reached.open()
    nexts = [pool(leader.next), pool(follower.next)]
    source.go.open()
    assert [outcome(future) for future in nexts] == [EVENTS[1]] * 2
    assert [outcome(pool(client.rest)) for client in (follower, leader)] == [EVENTS[2:]] * 2


LONG = [b'data: {"n":%d}\n\n' % number for number in range(2000)] + [b"data: [DONE]\n\n"]


@each_world
def test_c57_a_leader_that_does_not_read_holds_nobody(world_of, pool, name: str):
    """`fetch`: the answer is not read at all; ASGI: its ``send`` is stuck; WSGI: one step was taken."""
    source = WORLDS[name].source(LONG, hold_at=1)
    world = world_of(name, lambda number: source)
    leader = world.open(reads=False) if name == "asgi" else world.open()
    if name == "wsgi":
        assert leader.next() == LONG[0]
    followers = [world.open() for _ in range(3)]
    rests = [pool(client.rest) for client in followers]
    source.reached.wait()
    source.go.open()
    try:
        assert [outcome(rest) for rest in rests] == [LONG] * 3
    finally:
        if name == "asgi":
            world.loop.call(leader.reads.set)
    assert leader.rest() == (LONG[1:] if name == "wsgi" else LONG)
    assert world.calls == 1
    assert source.closed <= 1


@each_world
def test_c57_a_leader_that_does_not_read_and_then_leaves_holds_nobody(world_of, pool, when, name: str):
    source = WORLDS[name].source(LONG, hold_at=1000)
    world = world_of(name, lambda number: source)
    leader = world.open(reads=False) if name == "asgi" else world.open()
    follower = world.open()
    assert [follower.next() for _ in range(500)] == LONG[:500]
    leader.leave("close")
    rest = pool(follower.rest)
    source.reached.wait()
    source.go.open()
    assert outcome(rest) == LONG[500:]
    assert world.calls == 1
    assert source.closed <= 1


@each_way
def test_c57_the_leader_leaves_and_its_followers_get_everything(world_of, pool, when, name: str, way: str):
    source = WORLDS[name].source(hold_at=2)
    world = world_of(name, lambda number: source)
    leader = world.open()
    assert [leader.next(), leader.next()] == EVENTS[:2]
    first, second = world.open(), world.open()
    leader.leave(way)
    late = world.open()
    rests = [pool(client.rest) for client in (first, second, late)]
    source.go.open()
    assert [outcome(rest) for rest in rests] == [EVENTS] * 3
    assert world.calls == 1
    assert source.closed <= 1
    repeat = world.open()
    assert (repeat.cache, repeat.rest()) == ("hit", EVENTS)


@each_way
def test_c57_the_leader_leaves_without_having_read(world_of, pool, name: str, way: str):
    source = WORLDS[name].source(hold_at=1)
    world = world_of(name, lambda number: source)
    leader = world.open()
    follower = world.open()
    leader.leave(way)
    rest = pool(follower.rest)
    source.go.open()
    assert outcome(rest) == EVENTS
    assert world.calls == 1
    assert source.closed <= 1


@each_way
def test_c57_followers_leave_and_the_leader_gets_everything(world_of, pool, when, name: str, way: str):
    source = WORLDS[name].source(hold_at=2)
    world = world_of(name, lambda number: source)
    leader = world.open()
    followers = [world.open() for _ in range(3)]
    assert [client.next() for client in followers] == EVENTS[:1] * 3
    for client in followers:
        client.leave(way)
    when(lambda: world.readers == (1 if world.counts_leader else 0))
    rest = pool(leader.rest)
    source.go.open()
    assert outcome(rest) == EVENTS
    assert world.calls == 1
    assert source.closed <= 1


# Leaving, and what becomes of the upstream --------------------------------------------------------


@each_way
@pytest.mark.parametrize("policy", ["auto", "cancel"])
@pytest.mark.parametrize("read", [0, 2])
def test_c84_the_last_reader_leaves_and_the_upstream_is_closed_once(
    world_of, when, name: str, way: str, policy: str, read: int
):
    sources: list[Source] = []

    def answers(number: int) -> Source:
        sources.append(WORLDS[name].source(hold_at=2 if number == 1 else None))
        return sources[-1]

    world = world_of(name, answers, on_disconnect=policy)
    client = world.open()
    for event in EVENTS[:read]:
        assert client.next() == event
    client.leave(way)
    when(lambda: world.flights == 0 and sources[0].closed > 0)
    assert sources[0].closed == 1
    assert "stored" not in world.cache.stats()
    again = world.open()
    assert (again.cache, again.rest()) == ("miss", EVENTS)
    assert sources[0].closed == 1
    assert sources[1].closed <= 1


@each_way
def test_c84_all_leave_one_after_the_other(world_of, when, name: str, way: str):
    source = WORLDS[name].source(hold_at=2)
    world = world_of(name, lambda number: source)
    clients = [world.open() for _ in range(4)]
    for number, client in enumerate(clients):
        assert client.next() == EVENTS[0]
        client.leave(way)
        if number < 3:
            assert source.closed == 0
    when(lambda: world.flights == 0 and source.closed > 0)
    assert source.closed == 1
    assert "stored" not in world.cache.stats()


@each_way
def test_c84_finish_reads_the_stream_to_its_end_and_stores_it(world_of, when, name: str, way: str):
    world = world_of(name, lambda number: WORLDS[name].source(), on_disconnect="finish")
    client = world.open()
    assert client.next() == EVENTS[0]
    client.leave(way)
    when(lambda: world.flights == 0 and "stored" in world.cache.stats())
    again = world.open()
    assert (again.cache, again.rest()) == ("hit", EVENTS)
    assert world.calls == 1


@each_way
def test_c84_finish_with_followers(world_of, pool, name: str, way: str):
    source = WORLDS[name].source(hold_at=2)
    world = world_of(name, lambda number: source, on_disconnect="finish")
    leader, follower = world.open(), world.open()
    assert leader.next() == EVENTS[0]
    leader.leave(way)
    rest = pool(follower.rest)
    source.go.open()
    assert outcome(rest) == EVENTS
    assert world.calls == 1
    assert source.closed <= 1


@each_way
def test_c84_cancel_ends_the_stream_for_all_when_the_leader_leaves(world_of, when, name: str, way: str):
    source = WORLDS[name].source(hold_at=2)
    world = world_of(name, lambda number: source, on_disconnect="cancel")
    leader, follower = world.open(), world.open()
    assert [leader.next(), follower.next()] == EVENTS[:1] * 2
    leader.leave(way)
    with pytest.raises(FlightAbandonedError):
        follower.rest()
    when(lambda: source.closed > 0)
    assert source.closed == 1
    assert "stored" not in world.cache.stats()


@pytest.mark.parametrize("way", ["disconnect", "cancel"])
@pytest.mark.parametrize("policy", ["auto", "cancel", "finish"])
def test_c84_asgi_plain_and_nobody_else_waits(world_of, when, policy: str, way: str):
    plain = Plain(completion(), held=True)
    world = world_of("asgi", lambda number: plain, on_disconnect=policy)
    client = AsgiClient(world, BODY)
    plain.reached.wait()
    client.leave(way)
    if policy == "finish":
        plain.go.open()
        when(lambda: world.flights == 0)
        assert not plain.cancelled
        assert world.open(BODY).cache == "hit"
        return
    when(lambda: world.flights == 0 and plain.cancelled)
    assert "stored" not in world.cache.stats()
    assert client.messages.get(timeout=PATIENCE_S) is None or way == "cancel"


@pytest.mark.parametrize("way", ["disconnect", "cancel"])
@pytest.mark.parametrize("policy", ["auto", "finish"])
def test_c84_asgi_plain_goes_on_for_a_follower(world_of, pool, when, policy: str, way: str):
    plain = Plain(completion(), held=True)
    world = world_of("asgi", lambda number: plain, on_disconnect=policy)
    leader = AsgiClient(world, BODY)
    plain.reached.wait()
    follower = pool(world.ask)
    when(lambda: world.readers == 1)
    leader.leave(way)
    plain.go.open()
    assert outcome(follower) == plain.body
    assert (world.calls, plain.cancelled) == (1, False)
    assert world.cache.stats()["stored"] == 1


def test_c84_asgi_a_follower_that_leaves_before_the_answer(world_of, pool, when):
    plain = Plain(completion(), held=True)
    world = world_of("asgi", lambda number: plain)
    leader = pool(world.ask)
    plain.reached.wait()
    follower = AsgiClient(world, BODY)
    when(lambda: world.readers == 1)
    follower.leave("disconnect")
    when(lambda: world.readers == 0)
    assert follower.messages.get(timeout=PATIENCE_S) is None
    plain.go.open()
    assert outcome(leader) == plain.body
    assert not plain.cancelled


@pytest.mark.parametrize("policy", ["auto", "finish"])
def test_c84_a_reader_is_cancelled_while_it_waits_for_a_sync_iterator(world_of, loop, when, policy: str):
    """The iterator is in the middle of ``next()`` in a worker thread: it cannot be closed there and then."""
    source = SyncSource(hold_at=1)
    world = world_of("afetch-sync", lambda number: source, on_disconnect=policy)
    client = world.open()
    assert client.next() == EVENTS[0]

    async def step() -> bytes:
        return await anext(client.iterator)

    waiting = loop.submit(step())
    source.reached.wait()
    loop.call(lambda: None)
    task = next(task for task in loop.tasks() if task.get_coro().__name__ == "step")
    loop.call(task.cancel)
    ended = asyncio.run_coroutine_threadsafe(_outcome_of(task), loop.loop).result(PATIENCE_S)
    source.go.open()
    assert isinstance(ended, asyncio.CancelledError), repr(ended)
    assert waiting.cancelled() or isinstance(waiting.exception(PATIENCE_S), asyncio.CancelledError)
    when(lambda: world.flights == 0)
    when(lambda: source.closed == 1)
    assert world.cache.stats().get("stored", 0) == (policy == "finish")


async def _outcome_of(task: asyncio.Task) -> object:
    await asyncio.wait({task})
    try:
        return task.exception() or task.result()
    except asyncio.CancelledError as exc:
        return exc


def test_c84_leaving_a_sync_stream_does_not_block_the_event_loop(world_of, loop, pool, when):
    """``finish`` reads on behind the caller's back, not on its event loop."""
    source = SyncSource(hold_at=1)
    world = world_of("afetch-sync", lambda number: source, on_disconnect="finish")
    client = world.open()
    assert client.next() == EVENTS[0]
    left = pool(client.leave, "close")
    source.reached.wait()
    alive = loop.submit(asyncio.sleep(0, "the loop runs"))
    try:
        assert alive.result(2) == "the loop runs"
    finally:
        source.go.open()
    outcome(left)
    when(lambda: world.cache.stats().get("stored") == 1)


@each_direct
def test_c84_the_leader_closes_while_a_follower_pulls_under_cancel(world_of, pool, when, name: str, way: str):
    """The follower's thread is inside the upstream's ``next()`` when the leader ends the call for all."""
    source = SyncSource(hold_at=1)
    ticks = iter(EVENTS)

    def generator() -> Iterator[bytes]:
        try:
            yield next(ticks)
            source.reached.open()
            source.go.wait()
            yield from ticks
        finally:
            source.closed += 1

    made = generator()
    answers = (lambda number: made) if name == "fetch" else (lambda number: _WsgiResult(made))
    world = world_of(name, answers, on_disconnect="cancel")
    leader, follower = world.open(), world.open()
    assert [leader.next(), follower.next()] == EVENTS[:1] * 2
    rest = pool(follower.rest)
    source.reached.wait()
    closing = pool(leader.leave, way)
    source.go.open()
    assert outcome(closing) is None
    outcome(rest)
    when(lambda: world.flights == 0 and source.closed > 0)
    assert source.closed == 1


class _WsgiResult:
    """A WSGI app's iterable around a generator."""

    headers = SSE_HEADERS

    def __init__(self, events: Iterator[bytes]) -> None:
        self.events = events
        self.close = events.close

    def __iter__(self) -> Iterator[bytes]:
        return self.events


@each_direct
def test_c84_a_request_that_comes_while_the_stream_is_read_to_its_end(
    world_of, pool, when, name: str, way: str
):
    """``finish``: the last reader's thread drains the upstream; somebody asks for the same meanwhile."""
    source = SyncSource(hold_at=2)
    world = world_of(name, lambda number: source, on_disconnect="finish")
    leader = world.open()
    assert leader.next() == EVENTS[0]
    leaving = pool(leader.leave, way)
    source.reached.wait()
    late = pool(lambda: world.open().rest())
    when(lambda: world.readers == 1 or late.done())
    source.go.open()
    assert outcome(late) == EVENTS
    assert outcome(leaving) is None
    assert world.calls == 1
    assert source.closed <= 1


@each_direct
def test_c84_a_request_that_comes_while_an_abandoned_stream_is_closed(
    world_of, pool, when, name: str, way: str
):
    """Closing the upstream takes a while: who asks meanwhile gets a call of its own, not the dead stream."""
    closing, go = Gate(), Gate()

    def on_close() -> None:
        closing.open()
        go.wait()

    def answers(number: int) -> Source:
        return SyncSource(on_close=on_close) if number == 1 else SyncSource()

    world = world_of(name, answers)
    leader = world.open()
    assert leader.next() == EVENTS[0]
    leaving = pool(leader.leave, way)
    closing.wait()
    late = pool(lambda: world.open().rest())
    when(lambda: world.readers == 1 or world.calls == 2)
    go.open()
    assert outcome(late) == EVENTS
    assert outcome(leaving) is None
    assert world.calls == 2


@pytest.mark.parametrize("streamed", [True, False])
def test_c84_asgi_a_request_that_comes_while_a_cancelled_handler_cleans_up(
    new_cache, loop, pool, when, streamed
):
    """The cancelled handler waits for something in its ``finally``: its call is no longer worth joining."""
    cleaning, go = Gate(), Gate()
    calls: list[int] = []

    async def handler(scope, receive, send) -> None:
        await receive()
        calls.append(1)
        source = AsyncSource(hold_at=2 if len(calls) == 1 else None)
        await send({"type": "http.response.start", "status": 200, "headers": pairs(SSE_HEADERS)})
        try:
            async for event in source:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            if len(calls) == 1:
                cleaning.open()
                await go.await_()
        await send({"type": "http.response.body", "body": b""})

    world = AsgiWorld(new_cache(), lambda number: None, loop)
    world.app = ASGIMiddleware(handler, cache=world.cache)
    body = STREAM if streamed else BODY
    leader = world.open(body)
    assert [leader.next(), leader.next()] == EVENTS[:2]
    leader.leave("disconnect")
    cleaning.wait()
    late = pool(lambda: world.open(body).rest())
    when(lambda: world.readers == 1 or len(calls) == 2)
    go.open()
    assert outcome(late) == EVENTS
    assert len(calls) == 2


@pytest.mark.parametrize("policy", ["auto", "finish", "cancel"])
def test_asgi_a_stuck_leader_whose_request_the_server_cancels_leaves_no_task(
    world_of, pool, when, policy: str
):
    """Followers made the handler go on without the stuck leader; then the server gives the leader up."""
    source = AsyncSource(LONG)
    world = world_of("asgi", lambda number: source, on_disconnect=policy)
    leader = world.open(reads=False)
    assert world.open().rest() == LONG

    world.loop.call(leader.task.cancel)
    try:
        when(lambda: not world.loop.tasks())
    finally:
        world.loop.call(leader.reads.set)


# The leader fails or is cancelled -----------------------------------------------------------------


@each_world
def test_c56_what_the_leader_meets_its_followers_meet(world_of, pool, when, name: str):
    failing = Plain(error=ValueError("upstream is down"), held=True)
    fine = Plain(completion("fine"))
    world = world_of(name, lambda number: failing if number == 1 else fine)
    futures = [pool(world.ask) for _ in range(5)]
    failing.reached.wait()
    when(lambda: world.readers == 4)
    failing.go.open()
    ends = [outcome(future) for future in futures]
    assert [(type(end), str(end)) for end in ends] == [(ValueError, "upstream is down")] * 5
    assert world.calls == 1
    assert "stored" not in world.cache.stats()
    assert world.ask() == fine.body
    assert world.calls == 2


@each_world
def test_c56_an_error_answer_reaches_the_followers_and_is_not_stored(world_of, pool, when, name: str):
    error = {"error": {"message": "down", "type": "server_error", "param": None, "code": None}}
    failing = Plain(error, status=500, held=True)
    fine = Plain(completion("fine"))
    world = world_of(name, lambda number: failing if number == 1 else fine)
    futures = [pool(world.open, BODY) for _ in range(5)]
    failing.reached.wait()
    when(lambda: world.readers == 4)
    failing.go.open()
    clients = [future.result(PATIENCE_S) for future in futures]
    assert sorted((client.status, client.cache) for client in clients) == [(500, "collapsed")] * 4 + [
        (500, "miss")
    ]
    assert [b"".join(client.rest()) for client in clients] == [failing.body] * 5
    assert (world.calls, "stored" in world.cache.stats()) == (1, False)
    again = world.open(BODY)
    assert (again.status, again.cache, world.calls) == (200, "miss", 2)


class Leaves(BaseException):
    """What is not an `Exception`: a worker's timeout, for one."""


@pytest.mark.parametrize("name", ["fetch", "wsgi"])
def test_c56_a_leader_that_is_torn_away_is_followed_by_another(world_of, pool, when, name: str):
    torn = Plain(error=Leaves(), held=True)
    fine = Plain(completion("fine"))
    world = world_of(name, lambda number: torn if number == 1 else fine)
    leader = pool(world.ask)
    torn.reached.wait()
    followers = [pool(world.ask) for _ in range(5)]
    when(lambda: world.readers == 5)
    torn.go.open()
    assert [outcome(future) for future in followers] == [fine.body] * 5
    assert isinstance(outcome(leader), Leaves)
    assert world.calls == 2


@pytest.mark.parametrize("name", ["afetch", "asgi"])
def test_c56_a_cancelled_leader_is_followed_by_another_again_and_again(new_cache, name: str):
    """Followers never see the `CancelledError` of their leader."""
    cache = new_cache(on_disconnect="cancel")
    callers = 6
    begun: list[asyncio.Future] = []

    async def call(body: object) -> dict:
        begun.append(asyncio.get_running_loop().create_future())
        await begun[-1]
        return completion()

    async def handler(scope, receive, send) -> None:
        await receive()
        answer = json.dumps(await call(None)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": pairs(JSON_HEADERS)})
        await send({"type": "http.response.body", "body": answer})

    app = ASGIMiddleware(handler, cache=cache)

    async def ask() -> bytes:
        if name == "afetch":
            return (await cache.afetch(BODY, call)).body
        return await asgi_ask(app, BODY)

    async def main() -> list[object]:
        tasks = [asyncio.ensure_future(ask()) for _ in range(callers)]
        for turn in range(callers - 1):
            await until(lambda turn=turn: len(begun) == turn + 1 and _readers(cache) == callers - 1 - turn)
            leader = _leader_of(tasks, cache, turn)
            leader.cancel()
            await asyncio.wait({leader})
        await until(lambda: len(begun) == callers)
        begun[-1].set_result(None)
        return await asyncio.gather(*tasks, return_exceptions=True)

    ends = asyncio.run(main())
    assert [type(end) for end in ends].count(asyncio.CancelledError) == callers - 1
    assert [json.loads(end) for end in ends if isinstance(end, bytes)] == [completion()]
    assert len(begun) == callers


def _leader_of(tasks: list[asyncio.Task], cache: CacheManager, turn: int) -> asyncio.Task:
    """Callers take over in the order in which they came."""
    return next(task for task in tasks if not task.done())


async def asgi_ask(app, body: object, headers: dict[str, str] | None = None) -> bytes:
    scope, raw = http_scope(body, headers)
    given = [{"type": "http.request", "body": raw, "more_body": False}]
    got: list[dict] = []
    forever = asyncio.Event()

    async def receive() -> dict:
        if given:
            return given.pop()
        await forever.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        got.append(message)

    await app(scope, receive, send)
    return b"".join(message.get("body", b"") for message in got)


def test_c56_a_follower_that_is_cancelled_leaves_the_others_alone(new_cache):
    cache = new_cache()

    async def main() -> list[object]:
        go = asyncio.Event()

        async def call(body: object) -> dict:
            await go.wait()
            return completion()

        tasks = [asyncio.ensure_future(cache.afetch(BODY, call)) for _ in range(4)]
        await until(lambda: _readers(cache) == 3)
        tasks[2].cancel()
        await asyncio.wait({tasks[2]})
        assert _readers(cache) == 2
        go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    ends = asyncio.run(main())
    assert isinstance(ends.pop(2), asyncio.CancelledError)
    assert [end.json() for end in ends] == [completion()] * 3


def test_c56_a_thread_takes_over_from_a_cancelled_task(new_cache, loop, pool, when):
    cache = new_cache()
    held, fine = Plain(completion("held"), held=True), Plain(completion("fine"))
    tasks = AfetchWorld(cache, lambda number: held, loop)
    threads = FetchWorld(cache, lambda number: fine, loop)
    leader = loop.submit(tasks.afetch(BODY))
    held.reached.wait()
    followers = [pool(threads.ask) for _ in range(3)]
    when(lambda: threads.readers == 3)
    leader.cancel()
    assert [outcome(future) for future in followers] == [fine.body] * 3
    assert threads.calls == 1


def test_c56_the_leaders_event_loop_ends_before_its_stream_was_begun(new_cache, pool):
    """An async view under a WSGI server has an event loop of its own, which ends with the view. What it had
    begun must not keep the next caller waiting."""
    cache = new_cache()
    sources = [AsyncSource(), SyncSource()]

    async def view() -> object:
        return await cache.afetch(STREAM, lambda body: sources[0])

    asyncio.run(view())
    gc.collect()
    assert cache.stats()["flights"] == 0
    assert b"".join(cache.fetch(STREAM, lambda body: sources[1])) == b"".join(EVENTS)


def test_c56_the_leaders_event_loop_ends_in_the_middle_of_its_stream(new_cache, pool, when):
    """The follower, a thread, is told that the stream broke off; the next caller calls for itself."""
    cache = new_cache()
    source = AsyncSource(hold_at=2)
    joined = Gate()

    async def view() -> list[bytes]:
        answer = await cache.afetch(STREAM, lambda body: source)
        chunks = answer.__aiter__()
        got = [await anext(chunks), await anext(chunks)]
        await joined.await_()
        return got

    leader = pool(asyncio.run, view())
    source.reached.wait()
    follower = cache.fetch(STREAM, lambda body: SyncSource())
    chunks = iter(follower)
    assert [next(chunks), next(chunks)] == EVENTS[:2]
    joined.open()
    assert outcome(leader) == EVENTS[:2]
    with pytest.raises(FlightAbandonedError):
        next(chunks)
    assert (cache.stats()["flights"], source.closed) == (0, 1)
    assert list(cache.fetch(STREAM, lambda body: SyncSource())) == EVENTS


@each_world
@pytest.mark.parametrize("at", [0, 2])
def test_c56_an_error_in_the_middle_of_a_stream_reaches_all(world_of, pool, name: str, at: int):
    broken = WORLDS[name].source(EVENTS[:at], hold_at=at, error=ValueError("cut"))
    world = world_of(name, lambda number: broken if number == 1 else WORLDS[name].source())
    if name == "wsgi" and at == 0:
        # The app fails before its first chunk: nothing has begun.
        broken.go.open()
        with pytest.raises(ValueError, match="cut"):
            world.open()
    else:
        leader, follower = world.open(), world.open()
        ends = [pool(_read_to_error, client) for client in (leader, follower)]
        broken.go.open()
        expected = (EVENTS[:at], "ValueError('cut')")
        assert [outcome(end) for end in ends] == [expected] * 2
    assert broken.closed == 1
    assert "stored" not in world.cache.stats()
    again = world.open()
    assert (again.cache, again.rest()) == ("miss", EVENTS)


def _read_to_error(client: Client) -> tuple[list[bytes], str]:
    got: list[bytes] = []
    try:
        while (piece := client.next()) is not None:
            got.append(piece)
    except Exception as exc:
        return got, repr(exc)
    return got, "no error"


@pytest.mark.parametrize("name", ["fetch", "afetch", "afetch-sync"])
def test_an_item_that_is_no_json_ends_the_stream_and_closes_the_upstream(world_of, name: str):
    source = WORLDS[name].source([{"ok": 1}, {"not": object()}, {"never": 1}])
    world = world_of(name, lambda number: source)
    client = world.open()
    got, error = _read_to_error(client)
    assert got == [b'data: {"ok":1}\n\n']
    assert error.startswith("TypeError")
    assert source.closed == 1


@each_world
def test_the_upstream_is_closed_once_when_it_was_read_to_its_end(world_of, name: str):
    source = WORLDS[name].source()
    world = world_of(name, lambda number: source)
    client = world.open()
    assert client.rest() == EVENTS
    client.leave("close")
    assert source.closed == 1


@pytest.mark.parametrize("name", ["fetch", "afetch", "afetch-sync"])
@pytest.mark.parametrize("read", [0, 1])
def test_a_bypassed_stream_that_is_closed_early_closes_the_upstream(world_of, name: str, read: int):
    source = WORLDS[name].source()
    world = world_of(name, lambda number: source)
    client = world.open(caching=False)
    assert client.cache == "bypass"
    for event in EVENTS[:read]:
        assert client.next() == event
    if name == "fetch":
        client.answer.close()
    else:
        world.loop.run(client.answer.aclose())
    assert source.closed == 1


@pytest.mark.parametrize("name", ["fetch", "wsgi"])
def test_a_generator_gets_generator_exit_once_when_its_reader_leaves(world_of, when, name: str):
    ends: list[str] = []

    def generator() -> Iterator[bytes]:
        try:
            yield from EVENTS
            ends.append("end")
        except GeneratorExit:
            ends.append("exit")
            raise

    made = generator()
    answers = (lambda number: made) if name == "fetch" else (lambda number: _WsgiResult(made))
    world = world_of(name, answers)
    client = world.open()
    assert client.next() == EVENTS[0]
    client.leave("close")
    when(lambda: world.flights == 0 and ends)
    assert ends == ["exit"]


def test_an_async_generator_gets_generator_exit_once_when_its_reader_leaves(world_of, when):
    ends: list[str] = []
    held = Gate()

    async def generator() -> AsyncIterator[bytes]:
        try:
            for event in EVENTS[:2]:
                yield event
            await held.await_()
        except (GeneratorExit, asyncio.CancelledError) as exc:
            ends.append(type(exc).__name__)
            raise

    world = world_of("afetch", lambda number: generator())
    client = world.open()
    assert client.next() == EVENTS[0]
    client.leave("close")
    when(lambda: world.flights == 0 and ends)
    assert len(ends) == 1


def test_closing_the_iterator_of_an_answer_leaves_the_stream(world_of):
    source = SyncSource()
    world = world_of("fetch", lambda number: source)
    client = world.open()
    assert client.next() == EVENTS[0]
    client.iterator.close()
    assert (source.closed, world.flights) == (1, 0)


def test_closing_an_answer_that_was_never_read_leaves_the_stream(world_of):
    source = SyncSource()
    answer = world_of("fetch", lambda number: source).cache.fetch(STREAM, lambda body: source)
    answer.close()
    assert source.closed == 1
    answer.close()
    assert source.closed == 1


def test_closing_an_answer_that_is_being_read_leaves_the_stream(world_of):
    source = SyncSource()
    world = world_of("fetch", lambda number: source)
    client = world.open()
    assert client.next() == EVENTS[0]
    client.answer.close()
    assert (source.closed, world.flights) == (1, 0)


# Kinds of iterators -------------------------------------------------------------------------------


def test_a_sync_iterator_given_to_afetch_is_not_read_on_the_event_loops_thread(new_cache):
    cache = new_cache()
    threads: list[int] = []

    def events() -> Iterator[bytes]:
        for event in EVENTS:
            threads.append(threading.get_ident())
            yield event

    async def main() -> list[bytes]:
        answer = await cache.afetch(STREAM, lambda body: events())
        return [piece async for piece in answer]

    assert asyncio.run(main()) == EVENTS
    assert threading.get_ident() not in threads


def test_an_async_iterator_given_to_fetch_is_a_clear_error(new_cache):
    cache = new_cache()

    async def events() -> AsyncIterator[bytes]:
        yield b"never"

    with pytest.raises(SuspendedInSyncError, match=r"async iterator.*async method"):
        cache.fetch(STREAM, lambda body: events())
    assert list(cache.fetch(STREAM, lambda body: iter(EVENTS))) == EVENTS


def test_an_async_iterator_given_to_a_bypassed_fetch_is_a_clear_error(new_cache):
    cache = new_cache()

    async def events() -> AsyncIterator[bytes]:
        await asyncio.sleep(0)
        yield b"never"

    with pytest.raises(SuspendedInSyncError):
        list(cache.fetch(STREAM, lambda body: events(), caching=False))


def test_a_coroutine_function_given_to_fetch_is_a_clear_error(new_cache):
    cache = new_cache()

    async def call(body: object) -> dict:
        await asyncio.sleep(0)
        return completion()

    with pytest.raises(SuspendedInSyncError):
        cache.fetch(BODY, call)
    assert cache.fetch(BODY, lambda body: completion()).cache.status == "miss"


# Who does not join --------------------------------------------------------------------------------


def test_a_call_that_asks_for_the_same_key_does_not_wait_for_itself(new_cache, face):
    """A handler that goes through the cache again, inside its own call."""
    cache = new_cache()
    depth: list[int] = []

    def sync_call(body: object) -> object:
        depth.append(1)
        return completion() if len(depth) > 2 else cache.fetch(BODY, sync_call).json()

    async def async_call(body: object) -> object:
        depth.append(1)
        return completion() if len(depth) > 2 else (await cache.afetch(BODY, async_call)).json()

    if face.name == "sync":
        answer = cache.fetch(BODY, sync_call)
    else:
        answer = face.run(bounded(cache.afetch(BODY, async_call)))
    assert answer.json() == completion()
    assert len(depth) == 3
    assert cache.stats()["flights"] == 0


async def bounded(work):
    async with asyncio.timeout(PATIENCE_S):
        return await work


def test_a_stream_that_asks_for_the_same_key_does_not_wait_for_itself(new_cache, face):
    cache = new_cache()

    def sync_events(inner: bool = True) -> Iterator[bytes]:
        yield EVENTS[0]
        if inner:
            assert list(cache.fetch(STREAM, lambda body: sync_events(inner=False))) == EVENTS
        yield from EVENTS[1:]

    async def async_events(inner: bool = True) -> AsyncIterator[bytes]:
        yield EVENTS[0]
        if inner:
            answer = await cache.afetch(STREAM, lambda body: async_events(inner=False))
            assert [piece async for piece in answer] == EVENTS
        for event in EVENTS[1:]:
            yield event

    async def read() -> list[bytes]:
        answer = await cache.afetch(STREAM, lambda body: async_events())
        return [piece async for piece in answer]

    if face.name == "sync":
        assert list(cache.fetch(STREAM, lambda body: sync_events())) == EVENTS
    else:
        assert face.run(bounded(read())) == EVENTS


@each_front
def test_a_handler_behind_the_middleware_that_asks_the_same_cache(new_cache, loop, name: str):
    """With one scope for all, the handler's own look-up has the key of the request that it serves."""
    cache = new_cache(share="all")
    calls: list[object] = []

    def call(body: object) -> dict:
        calls.append(body)
        return completion()

    async def asgi(scope, receive, send) -> None:
        body = (await receive())["body"]
        answer = await cache.afetch(body, call)
        await send({"type": "http.response.start", "status": 200, "headers": pairs(JSON_HEADERS)})
        await send({"type": "http.response.body", "body": answer.body})

    def wsgi(environ, start_response):
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        answer = cache.fetch(body, call)
        start_response("200 OK", list(JSON_HEADERS.items()))
        return [answer.body]

    world = WORLDS[name](cache, lambda number: None, loop)
    world.app = ASGIMiddleware(asgi, cache=cache) if name == "asgi" else WSGIMiddleware(wsgi, cache=cache)
    assert json.loads(world.ask()) == completion()
    assert world.open(BODY).cache == "hit"
    assert len(calls) == 1


@each_world
@pytest.mark.parametrize("control", ["no-cache", "no-store"])
def test_requests_with_controls_of_their_own_do_not_join(world_of, pool, name: str, control: str):
    held, free = Plain(completion("held"), held=True), Plain(completion("free"))
    world = world_of(name, lambda number: held if number == 1 else free)
    leader = pool(world.ask)
    held.reached.wait()
    assert world.ask({**BODY, "cache": {control: True}}) == free.body
    assert world.readers == 0
    held.go.open()
    assert outcome(leader) == held.body
    assert world.calls == 2


@each_world
@pytest.mark.parametrize("control", ["no-cache", "no-store"])
def test_nobody_joins_requests_with_controls_of_their_own(world_of, pool, name: str, control: str):
    held, free = Plain(completion("held"), held=True), Plain(completion("free"))
    world = world_of(name, lambda number: held if number == 1 else free)
    own = pool(world.ask, {**BODY, "cache": {control: True}})
    held.reached.wait()
    assert world.ask() == free.body
    held.go.open()
    assert outcome(own) == held.body
    assert world.calls == 2


@each_front
def test_other_callers_do_not_join(world_of, pool, name: str):
    held, free = Plain(completion("held"), held=True), Plain(completion("free"))
    world = world_of(name, lambda number: held if number == 1 else free)
    leader = pool(lambda: world.ask(headers={"authorization": "Bearer a"}))
    held.reached.wait()
    assert world.ask(headers={"authorization": "Bearer b"}) == free.body
    held.go.open()
    assert outcome(leader) == held.body


@each_front
@pytest.mark.parametrize("streamed", [False, True])
def test_answers_that_vary_are_shared_only_with_the_same_header(
    world_of, pool, when, name: str, streamed: bool
):
    made: list = []

    def answers(number: int) -> object:
        if streamed:
            made.append(WORLDS[name].source(hold_at=1, headers={**SSE_HEADERS, "vary": "X-Mode"}))
        else:
            made.append(Plain(completion(str(number)), held=True, headers={**JSON_HEADERS, "vary": "X-Mode"}))
        if number > 1:
            made[-1].go.open()
        return made[-1]

    world = world_of(name, answers)
    body = STREAM if streamed else BODY
    leader = pool(lambda: world.ask(body, headers={"x-mode": "a"}))
    when(lambda: made and made[0].reached.is_open)
    same = pool(lambda: world.ask(body, headers={"x-mode": "a"}))
    other = pool(lambda: world.ask(body, headers={"x-mode": "b"}))
    if not streamed:
        when(lambda: world.readers == 2)
    else:
        when(lambda: world.calls == 2)
    made[0].go.open()
    ends = [outcome(future) for future in (leader, same, other)]
    assert world.calls == 2
    if streamed:
        assert ends == [b"".join(EVENTS)] * 3
    else:
        assert [json.loads(end)["choices"][0]["message"]["content"] for end in ends] == ["1", "1", "2"]


@each_front
def test_an_encoded_stream_is_not_shared(world_of, name: str):
    """Made for the leader's ``Accept-Encoding``: others call for themselves."""
    packed = gzip.compress(b"".join(EVENTS), mtime=0)
    half = len(packed) // 2

    def answers(number: int) -> Source:
        if number == 1:
            headers = {**SSE_HEADERS, "content-encoding": "gzip"}
            return WORLDS[name].source([packed[:half], packed[half:]], hold_at=1, headers=headers)
        return WORLDS[name].source()

    sources: list[Source] = []

    def remember(number: int) -> Source:
        sources.append(answers(number))
        return sources[-1]

    world = world_of(name, remember)
    leader = world.open(STREAM, headers={"accept-encoding": "gzip"})
    follower = world.open()
    assert "content-encoding" not in follower.headers
    assert b"".join(follower.rest()) == b"".join(EVENTS)
    sources[0].go.open()
    assert gzip.decompress(b"".join(leader.rest())) == b"".join(EVENTS)
    assert world.calls == 2


@each_front
def test_an_encoded_stream_is_not_shared_with_a_direct_fetch(new_cache, loop, name: str):
    cache = new_cache(share="all")
    packed = gzip.compress(b"".join(EVENTS), mtime=0)
    headers = {**SSE_HEADERS, "content-encoding": "gzip"}
    source = WORLDS[name].source([packed], hold_at=1, headers=headers)
    world = WORLDS[name](cache, lambda number: source, loop)
    leader = world.open(STREAM, headers={"accept-encoding": "gzip"})
    direct = FetchWorld(cache, lambda number: SyncSource(), loop)
    assert direct.open().rest() == EVENTS
    source.go.open()
    assert gzip.decompress(b"".join(leader.rest())) == b"".join(EVENTS)


@each_world
def test_streams_and_plain_answers_do_not_join_each_other(world_of, pool, name: str):
    source = WORLDS[name].source(hold_at=1)
    plain = Plain(completion())
    world = world_of(name, lambda number: source if number == 1 else plain)
    stream = world.open()
    assert stream.next() == EVENTS[0]
    assert world.ask() == plain.body
    source.go.open()
    assert stream.rest() == EVENTS[1:]
    assert world.calls == 2


# Contexts -----------------------------------------------------------------------------------------

tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")


def test_a_wsgi_generator_sees_its_own_context_whoever_pumps(new_cache, pool):
    cache = new_cache()

    def app(environ, start_response):
        tenant.set("leader")
        start_response("200 OK", list(SSE_HEADERS.items()))

        def events() -> Iterator[bytes]:
            token = tenant.set("generator")
            try:
                for number in range(3):
                    yield f"data: {number} {tenant.get()} {threading.get_ident()}\n\n".encode()
            finally:
                tenant.reset(token)  # only possible in the context it was set in
            yield f"data: {tenant.get()}\n\n".encode()

        return events()

    app = WSGIMiddleware(app, cache=cache)
    leader = WsgiClient(app, STREAM)

    def follow() -> list[bytes]:
        tenant.set("follower")
        got = WsgiClient(app, STREAM).rest()
        assert tenant.get() == "follower"
        return got

    got = outcome(pool(follow))
    words = [event.split()[1:] for event in got]
    assert [each[:2] for each in words[:3]] == [[b"%d" % number, b"generator"] for number in range(3)]
    assert words[3] == [b"leader"]
    assert {int(each[2]) for each in words[1:3]} != {threading.get_ident()}
    assert leader.rest() == got
    assert tenant.get() == "nobody"


def test_a_sync_iterator_sees_the_context_of_its_call_whoever_pumps(new_cache, face, pool):
    cache = new_cache()

    def events() -> Iterator[bytes]:
        for _ in range(3):
            yield tenant.get().encode()

    def call(body: object) -> Iterator[bytes]:
        return events()

    token = tenant.set("leader")
    try:
        if face.name == "sync":
            leader = cache.fetch(STREAM, call)
            tenant.set("later")
            assert outcome(pool(lambda: list(cache.fetch(STREAM, call)))) == [b"leader"] * 3
            assert list(leader) == [b"leader"] * 3
        else:

            async def read() -> list[bytes]:
                answer = await cache.afetch(STREAM, call)
                return [piece async for piece in answer]

            assert face.run(read()) == [b"leader"] * 3
    finally:
        tenant.reset(token)


def flask_app(torn_down: list[object]):
    """A Flask app whose stream reads the request it was made for."""
    import flask

    app = flask.Flask(__name__)
    app.teardown_request(torn_down.append)

    @app.post(CHAT)
    def chat():
        def events():
            for number in range(4):
                model = flask.request.get_json()["model"]
                yield f"data: {number} {model} {flask.request.headers['X-Who']}\n\n"

        return flask.Response(flask.stream_with_context(events()), content_type="text/event-stream")

    return app


FLASK_EVENTS = [f"data: {number} m leader\n\n".encode() for number in range(4)]
LEADER, FOLLOWER = {"x-who": "leader"}, {"x-who": "follower"}


def flask_baseline(way: str) -> list[object]:
    """What Flask alone does when a client reads all, or leaves after the first event."""
    torn_down: list[object] = []
    started: list = []
    result = flask_app(torn_down)(wsgi_environ(STREAM, LEADER), lambda *args: started.append(args))
    chunks = iter(result)
    assert next(chunks) == FLASK_EVENTS[0]
    if way == "read":
        assert list(chunks) == FLASK_EVENTS[1:]
    result.close()
    return torn_down


def test_flask_stream_with_context_when_a_follower_pumps(new_cache, pool):
    torn_down: list[object] = []
    app = flask_app(torn_down)
    app.wsgi_app = WSGIMiddleware(app.wsgi_app, cache=new_cache())
    leader = WsgiClient(app, STREAM, headers=LEADER)
    got = outcome(pool(lambda: WsgiClient(app, STREAM, headers=FOLLOWER).rest()))
    assert got == FLASK_EVENTS
    assert leader.rest() == got
    assert torn_down == flask_baseline("read")


def test_flask_stream_with_context_when_the_leader_leaves(new_cache, pool):
    torn_down: list[object] = []
    app = flask_app(torn_down)
    app.wsgi_app = WSGIMiddleware(app.wsgi_app, cache=new_cache())
    leader = WsgiClient(app, STREAM, headers=LEADER)
    assert leader.next() == FLASK_EVENTS[0]
    follower = WsgiClient(app, STREAM, headers=FOLLOWER)
    pool(leader.leave, "close").result(PATIENCE_S)
    assert outcome(pool(follower.rest)) == FLASK_EVENTS
    assert torn_down == flask_baseline("read")


def test_c84_flask_stream_with_context_when_the_last_reader_leaves(new_cache, pool):
    torn_down: list[object] = []
    app = flask_app(torn_down)
    app.wsgi_app = WSGIMiddleware(app.wsgi_app, cache=new_cache())
    leader = WsgiClient(app, STREAM, headers=LEADER)
    assert leader.next() == FLASK_EVENTS[0]
    pool(leader.leave, "close").result(PATIENCE_S)
    assert list(map(repr, torn_down)) == list(map(repr, flask_baseline("leave")))


# Starlette ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["auto", "finish"])
@pytest.mark.parametrize("spec", ["2.3", "2.4"])
def test_c57_a_starlette_stream_goes_on_for_followers_when_the_leader_leaves(
    new_cache, loop, pool, policy: str, spec: str
):
    """Below ASGI 2.4, which is what servers announce, Starlette's streams end themselves when ``receive``
    says that the client has left. Nobody may tell them so while others read."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    source = AsyncSource(hold_at=2)

    async def chat(request: Request) -> StreamingResponse:
        return StreamingResponse(source, media_type="text/event-stream")

    cache = new_cache(on_disconnect=policy)
    world = AsgiWorld(cache, lambda number: None, loop)
    world.app = ASGIMiddleware(Starlette(routes=[Route(CHAT, chat, methods=["POST"])]), cache=cache)
    leader = world.open(spec=spec)
    assert [leader.next(), leader.next()] == EVENTS[:2]
    follower = world.open()
    leader.leave("disconnect")
    loop.run(turns(50))
    rest = pool(follower.rest)
    source.go.open()
    assert outcome(rest) == EVENTS
    assert cache.stats()["stored"] == 1


async def turns(count: int) -> None:
    """Let the event loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_c84_a_starlette_stream_under_finish_is_read_to_its_end(new_cache, loop, when):
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    source = AsyncSource(hold_at=2)

    async def chat(request: Request) -> StreamingResponse:
        return StreamingResponse(source, media_type="text/event-stream")

    cache = new_cache(on_disconnect="finish")
    world = AsgiWorld(cache, lambda number: None, loop)
    world.app = ASGIMiddleware(Starlette(routes=[Route(CHAT, chat, methods=["POST"])]), cache=cache)
    leader = world.open()
    assert leader.next() == EVENTS[0]
    leader.leave("disconnect")
    loop.run(turns(50))
    source.go.open()
    when(lambda: world.flights == 0)
    assert cache.stats().get("stored") == 1
