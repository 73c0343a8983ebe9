"""A call to a provider: what the HTTP client costs, by how many calls are under way.

CPU time of one POST of 1 kB and its answer of 1 kB with a dozen headers, the answer read to its end, over
connections that are open; the upstream is a process of its own that parses next to nothing. The floor is the
same exchange over the bare sockets of as many connections: of asyncio's protocols, or of threads.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any, cast

from llm_middleware._drive import run_sync
from llm_middleware._ports.http_async import AsyncTransport
from llm_middleware._ports.http_settings import HTTPSettings
from llm_middleware._ports.http_sync import SyncTransport
from llm_middleware.providers.messages import Outgoing, Timeouts

from .harness import Row, compare, show
from .upstream import (
    BODY,
    HEADERS,
    REQUEST,
    RESPONSE,
    TASKS,
    THREADS,
    Call,
    Close,
    Make,
    aiohttp_alone,
    async_sample,
    thread_sample,
    upstream,
)

__all__ = ["results"]

_WIRE = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n%s\r\n"
    % (len(REQUEST), b"".join(f"{name}: {value}\r\n".encode() for name, value in HEADERS.items()))
) + REQUEST


class _Bare(asyncio.Protocol):
    """One connection, and the answer that it waits for."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def ask(self) -> asyncio.Future[bytes]:
        self._got = b""
        self._answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.transport.write(_WIRE)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._got += data
        if len(self._got) >= len(RESPONSE):
            self._answer.set_result(self._got[-len(BODY) :])


def _bare(port: int) -> tuple[Call, Close]:
    idle: list[_Bare] = []

    async def call() -> bytes:
        loop = asyncio.get_running_loop()
        one = idle.pop() if idle else (await loop.create_connection(_Bare, "127.0.0.1", port))[1]
        body = await one.ask()
        idle.append(one)
        return body

    async def close() -> None:
        for one in idle:
            one.transport.close()

    return call, close


def _ours(client: str) -> Make:
    def make(port: int) -> tuple[Call, Close]:
        transport = AsyncTransport(HTTPSettings(client=client))
        url, timeouts = f"http://127.0.0.1:{port}/v1/chat/completions", Timeouts(total=60.0)

        async def call() -> bytes:
            return await (await transport.send(Outgoing(url, HEADERS, REQUEST), timeouts)).read()

        return call, transport.aclose

    return make


def _httpx_like(package: str) -> Make:
    def make(port: int) -> tuple[Call, Close]:
        import importlib

        module: Any = importlib.import_module(package)
        library: Any = importlib.import_module("httpx2" if package == "httpx2" else "httpx")
        made = module.HttpxAiohttpClient if package == "httpx_aiohttp" else module.AsyncClient
        limits = library.Limits(max_connections=1000, max_keepalive_connections=1000)
        client = made(limits=limits, timeout=60)

        async def call() -> bytes:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            answer = await client.post(url, content=REQUEST, headers=HEADERS)
            body: bytes = answer.content
            return body

        return call, client.aclose

    return make


class _BareThreads:
    """A connection for each thread."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._own = threading.local()

    def __call__(self) -> bytes:
        sock: socket.socket | None = getattr(self._own, "sock", None)
        if sock is None:
            sock = self._own.sock = socket.create_connection(("127.0.0.1", self._port))
        sock.sendall(_WIRE)
        got = b""
        while len(got) < len(RESPONSE):
            got += sock.recv(65536)
        return got[-len(BODY) :]


def _ours_sync(client: str, port: int) -> Callable[[], bytes]:
    transport = SyncTransport(HTTPSettings(client=client))
    url, timeouts = f"http://127.0.0.1:{port}/v1/chat/completions", Timeouts(total=60.0)

    async def call() -> bytes:
        return await (await transport.send(Outgoing(url, HEADERS, REQUEST), timeouts)).read()

    return lambda: run_sync(call())


def _urllib3(port: int) -> Callable[[], bytes]:
    import urllib3

    pool = urllib3.PoolManager(maxsize=64, block=True)
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    return lambda: pool.request("POST", url, body=REQUEST, headers=HEADERS, redirect=False).data


def _httpx_sync(package: str, port: int) -> Callable[[], bytes]:
    import importlib

    client: Any = importlib.import_module(package).Client(timeout=60)
    url = f"http://127.0.0.1:{port}/v1/chat/completions"

    def call() -> bytes:
        body: bytes = client.post(url, content=REQUEST, headers=HEADERS).content
        return body

    return call


_BARE = "bare sockets"
_ASYNC: dict[str, Make] = {
    _BARE: _bare,
    "AsyncTransport": _ours("auto"),
    "AsyncTransport(client='httpx')": _ours("httpx"),
    "aiohttp alone": aiohttp_alone,
    "httpx alone": _httpx_like("httpx"),
    "httpx2 alone": _httpx_like("httpx2"),
    "httpx over httpx-aiohttp": _httpx_like("httpx_aiohttp"),
}
_SYNC: dict[str, Callable[[int], Callable[[], bytes]]] = {
    _BARE: _BareThreads,
    "SyncTransport": lambda port: _ours_sync("auto", port),
    "SyncTransport(client='httpx')": lambda port: _ours_sync("httpx", port),
    "urllib3 alone": _urllib3,
    "httpx alone": lambda port: _httpx_sync("httpx", port),
    "httpx2 alone": lambda port: _httpx_sync("httpx2", port),
}
# What ours may cost, in calls over the client that it is built on or stands in for.
_GOALS = {"AsyncTransport": ("aiohttp alone", 1.3), "SyncTransport": ("urllib3 alone", 0.6)}


def results() -> list[Row]:
    rows: list[Row] = []
    with upstream() as port:
        for tasks in TASKS:
            rows += _async_rows(port, tasks)
        for threads in THREADS:
            candidates = {name: thread_sample(make(port), threads, len(BODY)) for name, make in _SYNC.items()}
            rows += _rows(candidates, f"{threads} threads" if threads > 1 else "1 thread")
    return rows


def _async_rows(port: int, tasks: int) -> list[Row]:
    with asyncio.Runner() as runner:
        closing: list[Close] = []

        def kept(make: Make) -> Make:
            def making(port: int) -> tuple[Call, Close]:
                call, close = make(port)
                closing.append(close)
                return call, close

            return making

        candidates = {
            name: async_sample(runner, kept(make), port, tasks, len(BODY))
            for name, make in _ASYNC.items()
            if name != "httpx over httpx-aiohttp" or _is_there("httpx_aiohttp")
        }
        rows = _rows(candidates, f"{tasks} at a time")
        for close in closing:
            runner.run(_awaited(close))
    return rows


async def _awaited(close: Close) -> None:
    await close()


def _is_there(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _rows(candidates: dict[str, Callable[[], float]], how_many: str) -> list[Row]:
    samples = compare(candidates)
    path = f"HTTP call, {how_many}"
    rows = [samples.row(f"{path}: {name}", name, _BARE, _BARE) for name in candidates if name != _BARE]
    for name, (floor, goal) in _GOALS.items():
        if name in candidates:
            rows.append(samples.row(f"{path}: {name}", name, floor, floor, goal))
    return rows


if __name__ == "__main__":
    show(results)
