"""A load generator: a fixed number of requests over keep-alive connections, from a process of its own."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import cast

__all__ = ["Outcome", "drive", "generator"]

_PATIENCE_S = 60.0
_LAST_CHUNK = b"\r\n0\r\n\r\n"


@dataclass
class Outcome:
    """``hits``: answers that told of a cache hit. ``first``: seconds from each request to the first byte of
    its answer's body."""

    answers: int = 0
    hits: int = 0
    first: list[float] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """Sends one request after the other, the next when an answer is whole."""

    def __init__(self, waiting: deque[bytes], outcome: Outcome, done: asyncio.Future[None]) -> None:
        self._waiting = waiting
        self._outcome = outcome
        self._done = done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of no class of asyncio's
        self._next()

    def _next(self) -> None:
        self._headed = self._begun = False
        self._left: int | None = None
        self._tail = b""
        if not self._waiting:
            self._finish(None)
            return
        self._sent = time.perf_counter()
        self._transport.write(self._waiting.popleft())

    def _finish(self, error: Exception | None) -> None:
        self._transport.close()
        if not self._done.done():
            self._done.set_result(None) if error is None else self._done.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(exc or ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        if not self._headed:
            data = self._after_head(data)
        if not data:
            return
        if not self._begun:
            self._begun = True
            self._outcome.first.append(time.perf_counter() - self._sent)
        if self._left is not None:
            self._left -= len(data)
            whole = self._left <= 0
        else:
            self._tail = self._tail[-7:] + data[-7:]
            whole = self._tail.endswith(_LAST_CHUNK)
        if whole:
            self._outcome.answers += 1
            self._next()

    def _after_head(self, data: bytes) -> bytes:
        """Read the head of an answer; what came of its body."""
        head, end, body = data.partition(b"\r\n\r\n")
        if not end or not head.startswith(b"HTTP/1.1 200"):
            self._finish(ConnectionError(f"not an answer: {data[:200]!r}"))
            return b""
        self._headed = True
        head = head.lower()
        self._outcome.hits += b"\r\nx-llm-cache: hit" in head
        _, length, rest = head.partition(b"\r\ncontent-length:")
        self._left = int(rest.partition(b"\r\n")[0]) if length else None
        return body


async def _drive(port: int, requests: Sequence[bytes], connections: int) -> Outcome:
    loop = asyncio.get_running_loop()
    outcome, waiting = Outcome(), deque(requests)
    ends: list[asyncio.Future[None]] = []
    for _ in range(min(connections, len(requests))):
        done = loop.create_future()
        ends.append(done)
        await loop.create_connection(lambda done=done: _Connection(waiting, outcome, done), "127.0.0.1", port)  # type: ignore[misc]
    async with asyncio.timeout(_PATIENCE_S):
        await asyncio.gather(*ends)
    return outcome


def drive(port: int, requests: Sequence[bytes], connections: int) -> Outcome:
    """Send every request once, over ``connections`` connections, and read every answer to its end.

    First-byte times are meaningful over one connection only.
    """
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(_drive(port, requests, connections))
    if outcome.answers != len(requests):
        raise RuntimeError(f"{outcome.answers} answers to {len(requests)} requests")
    return outcome


def generator() -> ProcessPoolExecutor:
    """A process to call `drive` in."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
