"""Stand-ins for tests of apps that use this library: a fake upstream, a fake clock, store contracts.

`FakeUpstream` is a real HTTP/1.1 server on 127.0.0.1 that speaks OpenAI's API and Anthropic's Messages::

    with FakeUpstream() as upstream:
        client = openai.OpenAI(base_url=upstream.url, api_key="sk-test")
        client.chat.completions.create(model="gpt-4o-mini", messages=[...])
        assert upstream.count == 1

Its texts depend on the prompt alone; ids and creation times are never used twice, so a replayed answer can
be told from a second call. ``python -m llm_middleware.testing --port 8001`` runs one to play with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ._fake_payloads import Json, Stamp
from ._fake_server import Call, Failure, FakeServer

if TYPE_CHECKING:
    from ._store_contract import StoreContract as StoreContract

__all__ = ["Call", "FakeClock", "FakeUpstream", "StoreContract"]


def __getattr__(name: str) -> object:
    """`StoreContract` on first use: it needs pytest, which a demo or a benchmark does not have."""
    if name == "StoreContract":
        from ._store_contract import StoreContract

        return StoreContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class FakeClock:
    """A clock that stands still until it is told to go on: ``clock()`` is seconds since the epoch."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move on by ``seconds``; a negative number sets the clock back, as an NTP step may."""
        self.now += seconds


class FakeUpstream:
    """An OpenAI-shaped server in a thread, with knobs for everything that can go slow or wrong.

    Paths (with and without ``/v1``): chat/completions, completions, embeddings, audio/transcriptions,
    responses, messages, models. Use it as a context manager, or call `start` and `stop`; after a `stop`,
    `start` brings it back on the same port. The three timing attributes may be set at any time:

    ``latency``: seconds before the first byte. ``chunk_delay``: seconds between the events of a stream.
    ``stream_events``: the number of pieces a streamed text comes in.
    """

    def __init__(
        self, *, latency: float = 0.0, chunk_delay: float = 0.0, stream_events: int = 8, port: int = 0
    ) -> None:
        self.latency = latency
        self.chunk_delay = chunk_delay
        self.stream_events = stream_events
        self._port = port
        self._server: FakeServer | None = None
        self._changed = threading.Condition()
        self._calls: list[Call] = []
        self._disconnected = 0
        self._failures: deque[Failure] = deque()
        self._cuts: deque[int] = deque()
        self._hold_after: int | None = None
        self._serial = itertools.count()
        self._created = 0

    # Running ------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen; requests are answered from here on."""
        if self._server is None:
            self._server = FakeServer(self, self._port)
            self._port = self._server.server_address[1]
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening and drop every open connection, held requests included."""
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The base URL to give to OpenAI's SDK, ``http://127.0.0.1:PORT/v1``."""
        return f"http://127.0.0.1:{self._port}/v1"

    # What was seen ------------------------------------------------------------------------------

    @property
    def calls(self) -> list[Call]:
        """The requests received so far, in the order they came."""
        with self._changed:
            return list(self._calls)

    @property
    def count(self) -> int:
        """How many requests were received so far."""
        return len(self._calls)

    @property
    def disconnected(self) -> int:
        """How many requests for a stream were given up by the client before the stream's end."""
        return self._disconnected

    def wait_for(self, count: int, timeout: float = 10.0) -> None:
        """Return once ``count`` requests were received in all; `TimeoutError` after ``timeout`` seconds."""
        self._wait(lambda: len(self._calls), count, "requests", timeout)

    def wait_for_disconnects(self, count: int, timeout: float = 10.0) -> None:
        """Return once ``count`` streams were given up; `TimeoutError` after ``timeout`` seconds."""
        self._wait(lambda: self._disconnected, count, "disconnects", timeout)

    def _wait(self, seen: Callable[[], int], count: int, what: str, timeout: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: seen() >= count, timeout):
                raise TimeoutError(f"{seen()} of {count} {what} after {timeout} s")

    # Knobs --------------------------------------------------------------------------------------

    def fail_next(
        self,
        status: int,
        n: int = 1,
        headers: Mapping[str, str] | None = None,
        body: bytes | str | Json | None = None,
    ) -> None:
        """Answer the next ``n`` requests with this status, and with this body instead of OpenAI's error.

        Taken by requests as they arrive. A ``status`` of 200 with a ``body`` is a scripted answer.
        """
        if body is None:
            kind = "rate_limit_error" if status == 429 else "server_error"
            error = {"message": f"fake failure {status}", "type": kind, "param": None, "code": None}
            body = {"error": error}
        if not isinstance(body, bytes):
            body = (body if isinstance(body, str) else json.dumps(body)).encode()
        failure = Failure(status, {name.lower(): value for name, value in (headers or {}).items()}, body)
        with self._changed:
            self._failures.extend([failure] * n)

    def cut_stream_after(self, n_events: int, n: int = 1) -> None:
        """Drop the connection of the next ``n`` streams when so many events have been sent."""
        with self._changed:
            self._cuts.extend([n_events] * n)

    def hold(self, after_events: int = 0) -> None:
        """Make requests wait until `release`: streams when they have sent so many events, others at once."""
        with self._changed:
            self._hold_after = after_events

    def release(self) -> None:
        """Let the held requests, and all later ones, go on."""
        with self._changed:
            self._hold_after = None
            self._changed.notify_all()

    # For the handler ----------------------------------------------------------------------------

    def arrived(self, call: Call) -> tuple[Failure | None, Stamp]:
        """Record a request; the failure it is to get, if any, and a stamp no other answer has."""
        with self._changed:
            self._calls.append(call)
            self._created = max(self._created + 1, int(time.time()))
            self._changed.notify_all()
            failure = self._failures.popleft() if self._failures else None
            return failure, Stamp(f"{secrets.token_hex(8)}{next(self._serial):04x}", self._created)

    def next_cut(self) -> int | None:
        """After how many events the stream that now begins is to be cut, if it is."""
        with self._changed:
            return self._cuts.popleft() if self._cuts else None

    def left(self) -> None:
        """Record that a client has given up its stream."""
        with self._changed:
            self._disconnected += 1
            self._changed.notify_all()

    def is_held(self, sent: float, wait: float) -> bool:
        """Whether a request that has sent so many events is still held back ``wait`` seconds from now."""
        with self._changed:
            return not self._changed.wait_for(
                lambda: self._hold_after is None or sent < self._hold_after, wait
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a `FakeUpstream` until it is interrupted; its URL is the first line of output."""
    parser = argparse.ArgumentParser(prog="python -m llm_middleware.testing", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one (default)")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before the first byte")
    parser.add_argument("--chunk-delay", type=float, default=0.0, help="seconds between stream events")
    parser.add_argument("--stream-events", type=int, default=8, help="pieces a streamed text comes in")
    with FakeUpstream(**vars(parser.parse_args(argv))) as upstream, suppress(KeyboardInterrupt):
        print(upstream.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
