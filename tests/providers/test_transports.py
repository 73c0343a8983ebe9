"""The transports: one contract for every client, against a real upstream that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import os
import socket
import ssl
import struct
import subprocess
import sys
import textwrap
import threading
import zlib
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from llm_middleware._drive import run_sync
from llm_middleware._ports.http_async import AsyncTransport
from llm_middleware._ports.http_decode import HAS_BROTLI
from llm_middleware._ports.http_settings import HTTPSettings
from llm_middleware._ports.http_sync import SyncTransport
from llm_middleware.errors import ConfigError, DeadlineError, InvalidRequestError, UpstreamConnectionError
from llm_middleware.providers.messages import Outgoing, Timeouts
from tests.services import HOST, PATIENCE, certificates, free_port, wait_for

KEY = "sk-not-for-anybody"
PATIENT = Timeouts(connect=PATIENCE, read=PATIENCE)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def sized(body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 200 OK", b"content-length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@dataclass
class Got:
    """A request as it came."""

    line: str
    headers: dict[str, str]
    body: bytes


class Link:
    """One connection, at the upstream's end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._kept = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def gone(self) -> None:
        """Wait until the client has gone."""
        with contextlib.suppress(OSError):
            while self.sock.recv(65536):
                pass

    def request(self) -> Got | None:
        """The next one; None where the client has gone."""
        while b"\r\n\r\n" not in self._kept:
            if not self._more():
                return None
        head, _, self._kept = self._kept.partition(b"\r\n\r\n")
        line, *rest = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)}
        length = int(headers.get("content-length", 0))
        while len(self._kept) < length:
            if not self._more():
                return None
        body, self._kept = self._kept[:length], self._kept[length:]
        return Got(line, headers, body)

    def _more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except OSError:
            return False
        self._kept += data
        return bool(data)


@dataclass
class Upstream:
    """A server with a thread for each connection. ``answer(link, got)``: returns whether the connection stays
    open. ``at_once``: the most connections that were open at a time."""

    answer: Callable[[Link, Got], object]
    tls: ssl.SSLContext | None = None
    got: list[Got] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    at_once: int = 0

    def __enter__(self) -> Upstream:
        self._lock = threading.Lock()
        self._links: list[socket.socket] = []
        self._listener = socket.create_server((HOST, 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._links:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)

    def url(self, path: str = "/v1/chat", host: str = HOST) -> str:
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{path}"

    def request(self, path: str = "/v1/chat", **headers: str) -> Outgoing:
        return Outgoing(self.url(path), {"authorization": f"Bearer {KEY}", **headers}, b'{"model":"m"}')

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self.connections += 1
                    self.open += 1
                    self.at_once = max(self.at_once, self.open)
                self._links.append(sock)
                self._threads.append(threading.Thread(target=self._serve, args=(sock,), daemon=True))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError):
                if self.tls is not None:
                    sock = self.tls.wrap_socket(sock, server_side=True)
                link = Link(sock)
                while (got := link.request()) is not None:
                    self.got.append(got)
                    if not self.answer(link, got):
                        break
        finally:
            sock.close()
            with self._lock:
                self.open -= 1


def says(data: bytes, stay: bool = True) -> Callable[[Link, Got], object]:
    def answer(link: Link, got: Got) -> bool:
        link.send(data)
        return stay

    return answer


class Kind:
    """One client: how to make its transport, and how to run a test's coroutine with it."""

    def __init__(self, name: str, own: bool = False) -> None:
        self.name = name
        self.own = own
        self.sync = name in ("stdlib", "httpx.Client", "httpx sync")

    def transport(self, **settings: object) -> AsyncTransport | SyncTransport:
        if self.own:
            limits = httpx.Limits(max_connections=settings.pop("max_connections", 1000))
            made = httpx.Client if self.sync else httpx.AsyncClient
            settings["http_client"] = made(limits=limits, trust_env=False)
        elif self.name.startswith("httpx"):
            settings["client"] = "httpx"
        elif self.name == "aiohttp":
            settings["client"] = "aiohttp"
        return (SyncTransport if self.sync else AsyncTransport)(HTTPSettings(**settings))

    def run(self, body: Callable[..., Coroutine[object, object, object]], **settings: object) -> object:
        async def whole() -> object:
            transport = self.transport(**settings)
            try:
                return await body(transport)
            finally:
                await transport.aclose()
                await self._close(transport.settings.http_client)

        result = run_sync(whole()) if self.sync else asyncio.run(whole())
        gc.collect()  # what was not closed says so, and that is an error
        return result

    async def _close(self, client: object) -> None:
        if isinstance(client, httpx.AsyncClient):
            await client.aclose()
        elif isinstance(client, httpx.Client):
            client.close()

    async def until(self, event: threading.Event) -> None:
        """Wait for an event of the upstream; on a loop without holding it up."""
        happened = event.wait(PATIENCE) if self.sync else await asyncio.to_thread(event.wait, PATIENCE)
        assert happened

    def __repr__(self) -> str:
        return self.name


OURS = [Kind("aiohttp"), Kind("httpx async"), Kind("stdlib"), Kind("httpx sync")]
ALL = [*OURS, Kind("httpx.AsyncClient", own=True), Kind("httpx.Client", own=True)]
ASYNC = [kind for kind in ALL if not kind.sync]


@pytest.fixture(params=ALL, ids=repr)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(params=OURS, ids=repr)
def ours(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


async def fetch(transport: object, request: Outgoing, timeouts: Timeouts = PATIENT) -> bytes:
    reply = await transport.send(request, timeouts)
    return await reply.read()


async def failure(transport: object, request: Outgoing, timeouts: Timeouts = PATIENT) -> Exception:
    """The error that a call ends with, wherever it comes; checked for what it must not tell."""
    try:
        reply = await transport.send(request, timeouts)
        got = [piece async for piece in reply.chunks()]
    except (DeadlineError, UpstreamConnectionError) as exc:
        error = exc
    else:
        raise AssertionError(f"answered {reply.status} {got}")
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None
    for secret in (KEY, HOST, request.url, str(httpx.URL(request.url).port), "localhost"):
        assert secret not in str(error)
    return error


# -- requests and answers


def test_a_request_goes_out_as_it_is_and_the_answer_comes_back(kind: Kind) -> None:
    head = b"HTTP/1.1 418 Teapot\r\nX-Request-ID: r1\r\nVary: a\r\nVary: b\r\nContent-Length: 4\r\n\r\n"
    answer = head + b"\x00\xff\r\n"
    with Upstream(says(answer)) as upstream:

        async def body(transport):
            request = upstream.request("/v1/a%2Fb/%7Ec?k=%20x&y=1", **{"x-own": "one"})
            reply = await transport.send(request, PATIENT)
            return reply.status, dict(reply.headers), await reply.read()

        status, headers, data = kind.run(body)
    assert (status, data) == (418, b"\x00\xff\r\n")
    assert headers == {"x-request-id": "r1", "vary": "a, b", "content-length": "4"}
    (got,) = upstream.got
    assert got.line == "POST /v1/a%2Fb/%7Ec?k=%20x&y=1 HTTP/1.1"
    assert got.body == b'{"model":"m"}'
    assert got.headers["host"] == f"{HOST}:{upstream.port}"
    assert got.headers["authorization"] == f"Bearer {KEY}"
    assert got.headers["x-own"] == "one"
    assert got.headers["content-length"] == "13"
    assert "gzip" in got.headers["accept-encoding"]
    assert "content-type" not in got.headers
    if not kind.own:
        assert got.headers["user-agent"] == "llm-middleware"


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_other_methods_and_answers_without_a_body(ours: Kind, method: str) -> None:
    with Upstream(says(b"HTTP/1.1 204 No Content\r\n\r\n")) as upstream:
        request = Outgoing(upstream.url(), {}, b"", method)

        async def body(transport):
            replies = [await transport.send(request, PATIENT) for _ in range(2)]
            return [(reply.status, await reply.read()) for reply in replies]

        assert ours.run(body) == [(204, b"")] * 2
    assert {got.line.split()[0] for got in upstream.got} == {method}


def test_headers_of_the_request_stand_in_for_those_of_the_client(ours: Kind) -> None:
    with Upstream(says(OK)) as upstream:
        request = upstream.request(
            **{"user-agent": "mine", "accept": "text/event-stream", "accept-encoding": ""}
        )
        ours.run(lambda transport: fetch(transport, request))
    headers = upstream.got[0].headers
    assert (headers["user-agent"], headers["accept"], headers["accept-encoding"]) == (
        "mine",
        "text/event-stream",
        "",
    )


def test_users_in_urls_are_credentials_unless_there_are_others(ours: Kind) -> None:
    with Upstream(says(OK)) as upstream:
        url = upstream.url().replace("://", "://us%40er:pa%3Ass@")

        async def body(transport):
            await fetch(transport, Outgoing(url, {}, b""))
            await fetch(transport, Outgoing(url, {"authorization": "Bearer k"}, b""))

        ours.run(body)
    assert [got.headers["authorization"] for got in upstream.got] == ["Basic dXNAZXI6cGE6c3M=", "Bearer k"]
    assert {got.headers["host"] for got in upstream.got} == {f"{HOST}:{upstream.port}"}


def test_redirects_are_answers_and_cookies_are_not_kept(ours: Kind) -> None:
    answer = b"HTTP/1.1 307 T\r\nlocation: /other\r\nset-cookie: a=1; path=/\r\ncontent-length: 0\r\n\r\n"
    with Upstream(says(answer)) as upstream:

        async def body(transport):
            # By name: some keep no cookies of addresses.
            request = Outgoing(upstream.url(host="localhost"), {}, b"")
            replies = [await transport.send(request, PATIENT) for _ in range(2)]
            return [(reply.status, reply.headers["location"], await reply.read()) for reply in replies]

        assert ours.run(body) == [(307, "/other", b"")] * 2
    assert len(upstream.got) == 2
    assert not any("cookie" in got.headers for got in upstream.got)


def test_informational_answers_are_passed_over(ours: Kind) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    with Upstream(says(hints + OK)) as upstream:
        assert ours.run(lambda transport: fetch(transport, upstream.request())) == b"ok"


# aiohttp may see the end of the connection first, and asyncio a reset: then there is no answer.
REFUSED = [(kind, True) for kind in OURS if kind.name != "aiohttp"]
REFUSED += [(kind, False) for kind in OURS if kind.sync]


@pytest.mark.parametrize(("kind", "polite"), REFUSED, ids=str)
def test_a_refusal_is_read_though_the_body_was_not_taken(kind: Kind, polite: bool) -> None:
    class Hasty(Upstream):
        def _serve(self, sock: socket.socket) -> None:
            sock.recv(100)
            sock.sendall(b"HTTP/1.1 413 Large\r\nconnection: close\r\ncontent-length: 3\r\n\r\nbig")
            if polite:
                sock.shutdown(socket.SHUT_WR)
                Link(sock).gone()
            sock.close()  # with bytes unread: a reset

    with Hasty(says(b"")) as upstream:
        request = Outgoing(upstream.url(), {}, b"x" * 8_000_000)

        async def body(transport):
            reply = await transport.send(request, PATIENT)
            return reply.status, await reply.read()

        assert kind.run(body) == (413, b"big")


def test_what_cannot_be_sent_is_the_callers_error(ours: Kind) -> None:
    with Upstream(says(OK)) as upstream:
        request = upstream.request(**{"x-bad": "a\r\nx-injected: 1"})

        async def body(transport):
            with pytest.raises(InvalidRequestError, match="cannot be sent"):
                await transport.send(request, PATIENT)
            return await fetch(transport, upstream.request())

        assert ours.run(body, max_connections=1) == b"ok"
    assert len(upstream.got) == 1


# -- connections


def test_a_connection_is_used_again(kind: Kind) -> None:
    def answer(link: Link, got: Got) -> bool:
        link.send(CHUNKED + chunk(b"a") + chunk(b"b") + chunk(b"") if "stream" in got.line else OK)
        return True

    with Upstream(answer) as upstream:

        async def body(transport):
            seen = [await fetch(transport, upstream.request())]
            reply = await transport.send(upstream.request("/stream"), PATIENT)
            seen.append(b"".join([piece async for piece in reply.chunks()]))
            await reply.aclose()
            await reply.aclose()
            return [*seen, await fetch(transport, upstream.request())]

        assert kind.run(body) == [b"ok", b"ab", b"ok"]
    assert upstream.connections == 1


def test_a_connection_that_closed_while_idle_is_not_sent_over(kind: Kind) -> None:
    closed = threading.Event()

    def answer(link: Link, got: Got) -> bool:
        link.send(OK)
        link.sock.shutdown(socket.SHUT_RDWR)
        closed.set()
        return False

    with Upstream(answer) as upstream:

        async def body(transport):
            first = await fetch(transport, upstream.request("/1"))
            assert closed.wait(PATIENCE)  # the loop is held up: it has not seen the end
            return first, await fetch(transport, upstream.request("/2"))

        assert kind.run(body) == (b"ok", b"ok")
    assert [got.line.split()[1] for got in upstream.got] == ["/1", "/2"]
    assert upstream.connections == 2


def test_a_request_that_was_sent_is_not_sent_again(kind: Kind) -> None:
    def answer(link: Link, got: Got) -> bool:
        first = " /1 " in got.line
        if first:
            link.send(OK)
        return first

    with Upstream(answer) as upstream:

        async def body(transport):
            await fetch(transport, upstream.request("/1"))
            return await failure(transport, upstream.request("/2"))

        assert isinstance(kind.run(body), UpstreamConnectionError)
    assert [got.line.split()[1] for got in upstream.got] == ["/1", "/2"]
    assert upstream.connections == 1


def test_an_idle_connection_is_not_kept_for_longer_than_is_said(ours: Kind) -> None:
    with Upstream(says(OK)) as upstream:

        async def body(transport):
            for _ in range(3):
                await fetch(transport, upstream.request())

        ours.run(body, keepalive=0)
    assert upstream.connections == 3


def test_an_answer_without_a_length_ends_with_its_connection(kind: Kind) -> None:
    with Upstream(says(b"HTTP/1.1 200 OK\r\n\r\nall of it", stay=False)) as upstream:

        async def body(transport):
            return [await fetch(transport, upstream.request()) for _ in range(2)]

        assert kind.run(body) == [b"all of it"] * 2
    assert upstream.connections == 2


def test_connections_are_few_and_who_waits_too_long_is_told(kind: Kind) -> None:
    release = threading.Event()

    def answer(link: Link, got: Got) -> bool:
        link.send(CHUNKED + chunk(b"a"))
        assert release.wait(PATIENCE)
        link.send(chunk(b""))
        return True

    with Upstream(answer) as upstream:

        async def body(transport):
            reply = await transport.send(upstream.request(), PATIENT)
            error = await failure(transport, upstream.request(), Timeouts(connect=0.05))
            release.set()
            return error, await reply.read(), await fetch(transport, upstream.request())

        error, first, second = kind.run(body, max_connections=1)
    assert isinstance(error, DeadlineError)
    assert str(error).startswith("no connection to the provider within 0.")
    assert (first, second) == (b"a", b"a")
    assert (upstream.connections, len(upstream.got)) == (1, 2)


@pytest.mark.parametrize("other", ["httpx sync", "stdlib"])
def test_threads_wait_for_a_connection(other: str) -> None:
    kind = next(each for each in OURS if each.name == other)
    with Upstream(says(OK)) as upstream:
        transport = kind.transport(max_connections=2)

        def call(number: int) -> bytes:
            return run_sync(fetch(transport, upstream.request(f"/{number}")))

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(call, range(100))) == [b"ok"] * 100
        assert upstream.at_once <= 2
        run_sync(transport.aclose())
    assert len({got.line for got in upstream.got}) == 100


def test_idle_connections_make_room_for_others() -> None:
    with contextlib.ExitStack() as stack:
        upstreams = [stack.enter_context(Upstream(says(OK))) for _ in range(3)]

        async def body(transport):
            for upstream in [*upstreams, *upstreams]:
                await fetch(transport, upstream.request())
            wait_for(lambda: sum(upstream.open for upstream in upstreams) == 2, "one made room")

        Kind("stdlib").run(body, max_connections=2)
        assert [upstream.connections for upstream in upstreams] == [2, 2, 2]


@pytest.mark.parametrize("kind", [each for each in OURS if not each.sync], ids=repr)
def test_each_loop_has_its_connections_and_closes_them(kind: Kind) -> None:
    with Upstream(says(OK)) as upstream:
        transport = kind.transport()

        async def twice() -> list[bytes]:
            return [await fetch(transport, upstream.request()) for _ in range(2)]

        for loops in (1, 2):
            assert asyncio.run(twice()) == [b"ok"] * 2
            gc.collect()
            assert upstream.connections == loops
            wait_for(lambda: upstream.open == 0, "the loop's connection is closed")


def test_a_transport_that_was_closed_is_opened_by_the_next_call(kind: Kind) -> None:
    with Upstream(says(OK)) as upstream:

        async def body(transport):
            first = await fetch(transport, upstream.request())
            await transport.aclose()
            await transport.aclose()
            return first, await fetch(transport, upstream.request())

        assert kind.run(body) == (b"ok", b"ok")
    assert upstream.connections == (1 if kind.own else 2)


FORK = """
import asyncio, os, sys
from llm_middleware._drive import run_sync
from llm_middleware._ports.http_async import AsyncTransport
from llm_middleware._ports.http_sync import SyncTransport
from llm_middleware._ports.http_settings import HTTPSettings
from llm_middleware.providers.messages import Outgoing, Timeouts

kind, client, url = sys.argv[1:]
transport = (AsyncTransport if kind == "async" else SyncTransport)(HTTPSettings(client=client))

async def call(name):
    reply = await transport.send(Outgoing(f"{url}/{name}", {}, b""), Timeouts())
    assert await reply.read() == b"ok"

if kind == "sync":
    run_sync(call("parent"))
    child = os.fork()
    run_sync(call("child" if not child else "parent"))
    if child:
        assert os.waitpid(child, 0)[1] == 0
        run_sync(call("parent"))
else:
    async def main():
        await call("parent")
        child = os.fork()
        if not child:
            asyncio.events._set_running_loop(None)
            asyncio.run(call("child"))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        await call("parent")
        await call("parent")
    asyncio.run(main())
"""


def test_a_forked_child_has_connections_of_its_own(ours: Kind) -> None:
    seen: list[tuple[int, str]] = []

    def answer(link: Link, got: Got) -> bool:
        seen.append((id(link), got.line.split()[1]))
        link.send(OK)
        return True

    with Upstream(answer) as upstream:
        client = "httpx" if ours.name.startswith("httpx") else "auto"
        command = [sys.executable, "-W", "error", "-c", FORK, "sync" if ours.sync else "async", client]
        done = subprocess.run([*command, upstream.url("")], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path for _, path in seen) == ["/child", *["/parent"] * 3]
    assert upstream.connections == 2
    assert len({link for link, path in seen if path == "/parent"}) == 1


# -- timeouts


def test_r41_a_body_that_drips_ends_at_the_deadline(kind: Kind) -> None:
    gone, tick = threading.Event(), threading.Event()

    def answer(link: Link, got: Got) -> bool:
        link.send(CHUNKED)
        try:
            while not tick.wait(0.01):
                link.send(chunk(b"drip"))
        except OSError:
            gone.set()
        return False

    with Upstream(answer) as upstream:

        async def body(transport):
            reply = await transport.send(upstream.request(), Timeouts(total=0.5))
            seen = 0
            chunks = reply.chunks()
            with pytest.raises(DeadlineError) as raised:  # noqa: PT012 - the last of many
                while await anext(chunks):
                    seen += 1
            await kind.until(gone)
            with pytest.raises(DeadlineError):
                await fetch(transport, upstream.request(), Timeouts(total=0.3))
            return seen, str(raised.value)

        seen, message = kind.run(body)
    assert seen > 0
    assert message == "the provider's answer was not whole within 0.5 s"


# httpx gives no hold on the head of an answer to a sync call.
@pytest.mark.parametrize(
    "kind", [each for each in ALL if each.name not in ("httpx sync", "httpx.Client")], ids=repr
)
def test_r41_a_head_that_drips_ends_at_the_deadline(kind: Kind) -> None:
    stop = threading.Event()

    def answer(link: Link, got: Got) -> bool:
        link.send(b"HTTP/1.1 200 OK\r\nx-long: ")
        while not stop.wait(0.01):
            link.send(b"x")
        return False

    with Upstream(answer) as upstream:
        error = kind.run(lambda transport: failure(transport, upstream.request(), Timeouts(total=0.3)))
        stop.set()
    assert str(error) == "the provider's answer was not whole within 0.3 s"


@pytest.mark.parametrize("before", [b"", CHUNKED, CHUNKED + chunk(b"some")], ids=["nothing", "head", "piece"])
def test_silence_ends_after_the_read_timeout(kind: Kind, before: bytes) -> None:
    def answer(link: Link, got: Got) -> bool:
        link.send(before)
        link.gone()
        return False

    with Upstream(answer) as upstream:
        limits = Timeouts(connect=PATIENCE, read=0.1, total=PATIENCE)
        error = kind.run(lambda transport: failure(transport, upstream.request(), limits))
        wait_for(lambda: upstream.open == 0, "the connection is dropped")
    assert isinstance(error, DeadlineError)
    assert str(error) == "nothing came from the provider for 0.1 s"


def test_silence_ends_at_the_deadline_where_that_is_earlier(kind: Kind) -> None:
    with Upstream(lambda link, got: link.gone()) as upstream:
        limits = Timeouts(connect=PATIENCE, read=PATIENCE, total=0.1)
        error = kind.run(lambda transport: failure(transport, upstream.request(), limits))
    assert str(error) == "the provider's answer was not whole within 0.1 s"


@contextlib.contextmanager
def unanswering() -> Iterator[int]:
    """A port whose queue of connections is full: the next one to connect is left waiting."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((HOST, 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_connecting_takes_no_longer_than_the_connect_timeout(kind: Kind) -> None:
    with unanswering() as port:
        request = Outgoing(f"http://{HOST}:{port}/", {}, b"")
        error = kind.run(lambda transport: failure(transport, request, Timeouts(connect=0.2)))
    assert isinstance(error, DeadlineError)
    assert str(error).startswith("no connection to the provider within 0.2")


# -- failures


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncont", id="half a head"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", id="half a body"),
        pytest.param(CHUNKED + chunk(b"one") + b"5\r\ntw", id="half a chunk"),
        pytest.param(CHUNKED + chunk(b"one"), id="no last chunk"),
        pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n\r\n", id="another protocol"),
        pytest.param(CHUNKED + b"zz\r\nnot a size\r\n", id="no chunk"),
        pytest.param(sized(b"plain", b"content-encoding: gzip"), id="not compressed"),
    ],
)
def test_an_answer_that_breaks_off_or_is_none(kind: Kind, data: bytes) -> None:
    with Upstream(says(data, stay=False)) as upstream:

        async def body(transport):
            errors = [await failure(transport, upstream.request())]
            with pytest.raises(UpstreamConnectionError):
                await fetch(transport, upstream.request())
            return errors[0]

        error = kind.run(body, max_connections=1)
    assert isinstance(error, UpstreamConnectionError)
    assert str(error).startswith("the connection to the provider broke off")


def test_a_reset(kind: Kind) -> None:
    with Upstream(lambda link, got: link.reset()) as upstream:
        error = kind.run(lambda transport: failure(transport, upstream.request()))
    assert isinstance(error, UpstreamConnectionError)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}/", "http://nowhere.invalid:{port}/", "ftp://127.0.0.1/"]
)
def test_a_provider_that_cannot_be_reached(kind: Kind, url: str) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
    request = Outgoing(url.format(port=port), {"authorization": KEY}, b"")

    async def body(transport):
        return [await failure(transport, request) for _ in range(3)]

    errors = kind.run(body, max_connections=1)
    assert [type(error) for error in errors] == [UpstreamConnectionError] * 3
    assert {str(error).partition(" (")[0] for error in errors} == {"the provider could not be reached"}


# -- streams


def test_pieces_come_as_they_are_sent(kind: Kind) -> None:
    taken = threading.Event()

    def answer(link: Link, got: Got) -> bool:
        link.send(CHUNKED)
        for number in range(3):
            link.send(chunk(b"piece %d" % number))
            assert taken.wait(PATIENCE)
            taken.clear()
        link.send(chunk(b""))
        return True

    with Upstream(answer) as upstream:

        async def body(transport):
            seen = []
            reply = await transport.send(upstream.request(), PATIENT)
            async for piece in reply.chunks():
                seen.append(piece)
                taken.set()
            return seen

        assert kind.run(body) == [b"piece 0", b"piece 1", b"piece 2"]


@pytest.mark.parametrize("pieces", [0, 1])
def test_closing_early_drops_the_connection(kind: Kind, pieces: int) -> None:
    gone = threading.Event()

    def answer(link: Link, got: Got) -> bool:
        link.send(CHUNKED + chunk(b"first"))
        link.gone()
        gone.set()
        return False

    with Upstream(answer) as upstream:

        async def body(transport):
            reply = await transport.send(upstream.request(), PATIENT)
            chunks = reply.chunks()
            seen = [await anext(chunks) for _ in range(pieces)]
            await reply.aclose()
            await kind.until(gone)
            return seen

        assert kind.run(body, max_connections=1) == [b"first"] * pieces


@pytest.mark.parametrize("kind", ASYNC, ids=repr)
@pytest.mark.parametrize("when", ["head", "chunks", "read"])
def test_cancelling_drops_the_connection(kind: Kind, when: str) -> None:
    asked, gone = threading.Event(), threading.Event()

    def answer(link: Link, got: Got) -> bool:
        if when != "head":
            link.send(CHUNKED)
        asked.set()
        link.gone()
        gone.set()
        return False

    with Upstream(answer) as upstream:

        async def body(transport):
            at_body = asyncio.Event()

            async def call() -> None:
                reply = await transport.send(upstream.request(), PATIENT)
                at_body.set()
                if when == "read":
                    await reply.read()
                await anext(reply.chunks())

            task = asyncio.create_task(call())
            await kind.until(asked)
            if when != "head":
                await at_body.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await kind.until(gone)

        kind.run(body, max_connections=1)


ENCODED = {
    "gzip": lambda data: gzip.compress(data),
    "gzip of two": lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:]),
    "deflate": zlib.compress,
}
PLAIN = b'data: {"choices": [{"delta": {"content": "word"}}]}\n\n' * 200


def raw_deflate(data: bytes) -> bytes:
    made = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return made.compress(data) + made.flush()


ENCODED["deflate raw"] = raw_deflate
if HAS_BROTLI:
    import brotli

    ENCODED["br"] = brotli.compress


@pytest.mark.parametrize("name", ENCODED)
def test_content_encodings_are_undone(ours: Kind, name: str) -> None:
    data = ENCODED[name](PLAIN)
    answer = sized(data, b"content-encoding: " + name.split()[0].encode())
    bitwise = b"".join(chunk(data[at : at + 1]) for at in range(len(data))) + chunk(b"")
    dripped = CHUNKED[:-2] + b"content-encoding: " + name.split()[0].encode() + b"\r\n\r\n" + bitwise

    def say(link: Link, got: Got) -> bool:
        link.send(dripped if "drip" in got.line else answer)
        return True

    with Upstream(say) as upstream:

        async def body(transport):
            whole = [await fetch(transport, upstream.request(path)) for path in ("/drip", "/")]
            reply = await transport.send(upstream.request("/drip"), PATIENT)
            return [*whole, b"".join([piece async for piece in reply.chunks()])]

        assert ours.run(body) == [PLAIN] * 3
    assert upstream.connections == 1


def test_a_compressed_stream_is_not_held_back(ours: Kind) -> None:
    taken = threading.Event()
    head = CHUNKED[:-2] + b"content-encoding: gzip\r\n\r\n"

    def answer(link: Link, got: Got) -> bool:
        link.send(head)
        made = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
        for number in range(3):
            link.send(chunk(made.compress(b"piece %d" % number) + made.flush(zlib.Z_SYNC_FLUSH)))
            assert taken.wait(PATIENCE)
            taken.clear()
        link.send(chunk(made.flush()) + chunk(b""))
        return True

    with Upstream(answer) as upstream:

        async def body(transport):
            seen = []
            reply = await transport.send(upstream.request(), PATIENT)
            async for piece in reply.chunks():
                seen.append(piece)
                taken.set()
            return seen

        assert ours.run(body) == [b"piece 0", b"piece 1", b"piece 2"]


@pytest.mark.parametrize("kind", ASYNC, ids=repr)
def test_two_hundred_streams_at_a_time(kind: Kind) -> None:
    together = threading.Barrier(200)

    def answer(link: Link, got: Got) -> bool:
        link.send(CHUNKED + chunk(got.line.split()[1].encode()))
        together.wait(PATIENCE)
        link.send(chunk(b".") + chunk(b""))
        return True

    with Upstream(answer) as upstream:

        async def body(transport):
            calls = [fetch(transport, upstream.request(f"/{number}")) for number in range(200)]
            return await asyncio.gather(*calls)

        assert kind.run(body) == [b"/%d." % number for number in range(200)]
    assert upstream.connections == 200


# -- proxies, TLS, clients of the user's own


@contextlib.contextmanager
def forwarding(tunnelled: bytes = b"") -> Iterator[Upstream]:
    """A proxy: answers for HTTP itself, and connects for HTTPS."""

    def answer(link: Link, got: Got) -> bool:
        if not got.line.startswith("CONNECT"):
            link.send(sized(b"by proxy"))
            return True
        host, _, port = got.line.split()[1].rpartition(":")
        with socket.create_connection((host, int(port))) as there:
            link.send(tunnelled or b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=pump, args=(there, link.sock), daemon=True)
            back.start()
            pump(link.sock, there)
            back.join(PATIENCE)
        return False

    with Upstream(answer) as proxy:
        yield proxy


def pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for sock in (source, target):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("explicit", [True, False])
def test_requests_go_through_a_proxy(ours: Kind, explicit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with forwarding() as proxy:
        url = f"http://us%40er:pa%3Ass@{HOST}:{proxy.port}"
        if not explicit:
            monkeypatch.setenv("HTTP_PROXY", url)
            monkeypatch.setenv("NO_PROXY", "elsewhere.invalid,.internal.invalid")
        request = Outgoing("http://provider.invalid/v1/x?y=1", {}, b"body")

        async def body(transport):
            return [await fetch(transport, request) for _ in range(2)]

        assert ours.run(body, **({"proxy": url} if explicit else {})) == [b"by proxy"] * 2
    assert {got.line for got in proxy.got} == {"POST http://provider.invalid/v1/x?y=1 HTTP/1.1"}
    assert proxy.got[0].headers["host"] == "provider.invalid"
    assert proxy.got[0].headers["proxy-authorization"] == "Basic dXNAZXI6cGE6c3M="
    assert proxy.got[0].body == b"body"
    assert proxy.connections == 1


@pytest.mark.parametrize(
    ("no_proxy", "trust_env"),
    [(HOST, True), ("*", True), (f"other.invalid, {HOST}", True), ("", False)],
)
def test_some_requests_do_not_go_through_a_proxy(
    ours: Kind, no_proxy: str, trust_env: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with forwarding() as proxy, Upstream(says(OK)) as upstream:
        monkeypatch.setenv("ALL_PROXY", f"http://{HOST}:{proxy.port}")
        monkeypatch.setenv("NO_PROXY", no_proxy)
        assert ours.run(lambda t: fetch(t, upstream.request()), trust_env=trust_env) == b"ok"
    assert proxy.connections == 0


@dataclass
class Tls:
    authority: str
    pair: tuple[str, str]
    server: ssl.SSLContext


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    made = certificates(tmp_path_factory.mktemp("tls"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)
    return Tls(made.authority, (made.certificate, made.key), context)


@pytest.mark.parametrize("how", ["file", "directory", "variable", "off", "context"])
def test_certificates_are_trusted_as_is_said(
    ours: Kind, how: str, tls: Tls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ca").mkdir()
    hashed = subprocess.run(
        ["openssl", "x509", "-hash", "-noout", "-in", tls.authority],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (tmp_path / "ca" / f"{hashed}.0").write_bytes(Path(tls.authority).read_bytes())
    if how == "variable":
        monkeypatch.setenv("SSL_CERT_FILE", tls.authority)
    verify = {
        "file": tls.authority,
        "directory": str(tmp_path / "ca"),
        "variable": True,
        "off": False,
        "context": ssl.create_default_context(cafile=tls.authority),
    }[how]
    with Upstream(says(OK), tls=tls.server) as upstream:

        async def body(transport):
            return [await fetch(transport, upstream.request()) for _ in range(2)]

        assert ours.run(body, verify=verify) == [b"ok"] * 2
    assert upstream.connections == 1


def test_certificates_of_others_are_not_trusted(ours: Kind, tls: Tls) -> None:
    with Upstream(says(OK), tls=tls.server) as upstream:
        error = ours.run(lambda transport: failure(transport, upstream.request()))
        request = Outgoing(upstream.url(host="127.0.0.2"), {}, b"")
        other = ours.run(lambda transport: failure(transport, request), verify=tls.authority)
    assert isinstance(error, UpstreamConnectionError)
    assert isinstance(other, UpstreamConnectionError)
    assert upstream.got == []


def test_the_clients_certificate_is_shown(ours: Kind, tls: Tls) -> None:
    asking = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.authority)
    asking.load_cert_chain(*tls.pair)
    asking.verify_mode = ssl.CERT_REQUIRED
    with Upstream(says(OK), tls=asking) as upstream:
        settings = {"verify": tls.authority, "cert": tls.pair}
        assert ours.run(lambda t: fetch(t, upstream.request()), **settings) == b"ok"
        error = ours.run(lambda t: failure(t, upstream.request()), verify=tls.authority)
    assert isinstance(error, UpstreamConnectionError)
    assert len(upstream.got) == 1


def test_https_goes_through_a_tunnel(ours: Kind, tls: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    with forwarding() as proxy, Upstream(says(OK), tls=tls.server) as upstream:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@{HOST}:{proxy.port}")

        async def body(transport):
            return [await fetch(transport, upstream.request()) for _ in range(2)]

        assert ours.run(body, verify=tls.authority) == [b"ok"] * 2
    assert [got.line for got in proxy.got] == [f"CONNECT {HOST}:{upstream.port} HTTP/1.1"]
    assert proxy.got[0].headers["proxy-authorization"] == "Basic dXNlcjpzZWNyZXQ="
    assert "authorization" not in proxy.got[0].headers
    assert upstream.got[0].headers["authorization"] == f"Bearer {KEY}"
    assert "proxy-authorization" not in upstream.got[0].headers


def test_a_proxy_that_refuses(ours: Kind, tls: Tls) -> None:
    refusal = b"HTTP/1.1 407 No\r\ncontent-length: 0\r\n\r\n"
    with Upstream(says(refusal)) as proxy:
        request = Outgoing("https://provider.invalid/", {}, b"")
        proxied = f"http://{HOST}:{proxy.port}"
        error = ours.run(lambda transport: failure(transport, request), proxy=proxied)
    assert isinstance(error, UpstreamConnectionError)
    assert str(error).startswith("the provider could not be reached")


@pytest.mark.parametrize("kind", [each for each in ALL if each.own], ids=repr)
def test_a_client_of_the_users_own_is_used_as_it_is(kind: Kind) -> None:
    with Upstream(says(OK)) as upstream:
        made = (httpx.Client if kind.sync else httpx.AsyncClient)(headers={"x-theirs": "1"}, trust_env=False)

        async def body(_):
            transport = (SyncTransport if kind.sync else AsyncTransport)(HTTPSettings(http_client=made))
            seen = await fetch(transport, upstream.request())
            await transport.aclose()
            assert not made.is_closed
            await kind._close(made)
            return seen

        assert kind.run(body) == b"ok"
    assert upstream.got[0].headers["x-theirs"] == "1"


ECHO = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["http_version"].encode()})
"""


@pytest.mark.parametrize("made", [AsyncTransport, SyncTransport])
@pytest.mark.parametrize(("http2", "spoken"), [(True, b"2"), (False, b"1.1")])
def test_http2_is_spoken_where_that_is_wanted(
    made: type, http2: bool, spoken: bytes, tls: Tls, tmp_path: Path
) -> None:
    (tmp_path / "echo.py").write_text(ECHO)
    port = free_port()
    files = ["--certfile", tls.pair[0], "--keyfile", tls.pair[1], "--bind", f"{HOST}:{port}"]
    command = [sys.executable, "-m", "hypercorn", *files, "--log-level", "error", "echo:app"]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: socket.create_connection((HOST, port)).close() or True, "hypercorn listens")
        transport = made(HTTPSettings(verify=tls.authority, http2=http2))

        async def both() -> list[bytes]:
            request = Outgoing(f"https://{HOST}:{port}/", {}, b"body")
            try:
                return [await fetch(transport, request) for _ in range(2)]
            finally:
                await transport.aclose()

        assert (run_sync(both()) if made is SyncTransport else asyncio.run(both())) == [spoken] * 2
    finally:
        server.terminate()
        server.wait(PATIENCE)


# -- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("proxy", "127.0.0.1:3128"),
        ("proxy", "ftp://127.0.0.1"),
        ("verify", "/no/such/file"),
        ("verify", 1),
        ("cert", ("only one",)),
        ("max_connections", 0),
        ("max_connections", True),
        ("keepalive", -1),
        ("keepalive", float("inf")),
        ("http2", "yes"),
        ("trust_env", None),
        ("client", "requests"),
    ],
)
def test_settings_that_cannot_be(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: expected ") as raised:
        HTTPSettings(**{name: value})
    assert raised.value.param == name


def test_certificates_that_are_none(ours: Kind, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    request = Outgoing(f"https://{HOST}:1/", {}, b"")

    async def body(transport):
        with pytest.raises(ConfigError, match=r"^verify or cert: not usable certificates"):
            await transport.send(request, PATIENT)

    ours.run(body, cert=str(tmp_path / "empty.pem"))


def test_secrets_are_not_shown() -> None:
    shown = repr(HTTPSettings(proxy="http://user:secret@proxy.invalid", cert=("a", "b", "secret")))
    assert "secret" not in shown


def test_no_client_is_imported_before_the_first_request() -> None:
    code = """
        import sys
        from llm_middleware._ports.http_async import AsyncTransport
        from llm_middleware._ports.http_sync import SyncTransport
        AsyncTransport(), SyncTransport()
        print(*sorted({"httpx", "aiohttp", "urllib.request", "http.client"} & set(sys.modules)))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.split() == []
