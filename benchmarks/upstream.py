"""A provider that costs next to nothing: 1 kB in, 1 kB and a dozen headers out; and samples of calls of it.

It is a process of its own, so that what it takes is in nobody's CPU time.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sized
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import cast

from .harness import quick

__all__ = [
    "BODY",
    "CONTENT",
    "HEADERS",
    "KEY",
    "PROMPT",
    "REQUEST",
    "RESPONSE",
    "TASKS",
    "THREADS",
    "Call",
    "Close",
    "Make",
    "aiohttp_alone",
    "async_sample",
    "thread_sample",
    "upstream",
]

TASKS = (1, 16, 64, 200)
THREADS = (1, 16)
_CALLS = 400  # in one sample, unless said otherwise

PROMPT = "q" * 950
CONTENT = "a" * 720
KEY = "sk-0123456789abcdef0123456789abcdef"
HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
REQUEST = b'{"model":"gpt-4o","messages":[{"role":"user","content":"%s"}]}' % PROMPT.encode()
BODY = (
    b'{"id":"chatcmpl-0","object":"chat.completion","created":1760000000,"model":"gpt-4o","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"%s"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":240,"completion_tokens":180,"total_tokens":420}}' % CONTENT.encode()
)
RESPONSE = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 2026 12:00:00 GMT\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: keep-alive\r\nserver: upstream\r\nopenai-processing-ms: 412\r\n"
    b"openai-version: 2020-10-01\r\nx-ratelimit-limit-requests: 10000\r\n"
    b"x-ratelimit-remaining-requests: 9999\r\nx-ratelimit-reset-requests: 6ms\r\nx-request-id: req_0123\r\n"
    b"strict-transport-security: max-age=31536000\r\n\r\n" % len(BODY)
) + BODY

Call = Callable[[], Awaitable[Sized]]
Close = Callable[[], Awaitable[None]]
Make = Callable[[int], tuple[Call, Close]]
"""From the upstream's port to one call of it, and to what closes the connections."""


class _Upstream(asyncio.Protocol):
    """Answers when as many bytes have come as are left of a head and its body."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._kept = b""

    def data_received(self, data: bytes) -> None:
        self._kept += data
        head, end, body = self._kept.partition(b"\r\n\r\n")
        if end:
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            if len(body) >= length:
                self._kept = body[length:]
                self._transport.write(RESPONSE)


def _serve(port: Connection) -> None:
    import uvloop

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(_Upstream, "127.0.0.1", 0, backlog=1024)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


@contextmanager
def upstream() -> Iterator[int]:
    """The port of one that runs inside the ``with`` block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def aiohttp_alone(port: int) -> tuple[Callable[[], Awaitable[bytes]], Close]:
    """The fastest client for event loops, as an app would use it: one call's answer as bytes."""
    import aiohttp

    jar = aiohttp.DummyCookieJar()
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1000), cookie_jar=jar)

    async def call() -> bytes:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        async with session.post(url, data=REQUEST, headers=HEADERS) as response:
            return await response.read()

    return call, session.close


def async_sample(
    runner: asyncio.Runner, make: Make, port: int, tasks: int, size: int, calls: int = _CALLS
) -> Callable[[], float]:
    """A sample of ``tasks`` calls at a time, on a loop that stays, over connections that stay. ``size``: the
    length of what a call gives."""
    calls = max(calls // (4 if quick() else 1), tasks)
    made: list[Call] = []

    async def work(left: list[None]) -> None:
        while left:
            left.pop()
            if len(await made[0]()) != size:
                raise RuntimeError("not the answer")

    async def several() -> None:
        if not made:
            call, _ = make(port)
            made.append(call)
        left = [None] * calls
        await asyncio.gather(*(work(left) for _ in range(tasks)))

    def sample() -> float:
        began = time.process_time()
        runner.run(several())
        return (time.process_time() - began) / calls

    return sample


def thread_sample(
    call: Callable[[], Sized], threads: int, size: int, calls: int = _CALLS
) -> Callable[[], float]:
    """A sample of ``threads`` that each make their share of the calls; a thread's start is in the cost of
    every candidate alike. ``size``: the length of what a call gives."""
    share = calls // (4 if quick() else 1) // threads

    def work() -> None:
        for _ in range(share):
            if len(call()) != size:
                raise RuntimeError("not the answer")

    def sample() -> float:
        began = time.process_time()
        running = [threading.Thread(target=work) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return (time.process_time() - began) / (share * threads)

    return sample
