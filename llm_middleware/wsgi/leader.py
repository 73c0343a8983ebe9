"""The request that calls the host's WSGI app, while others may wait for the same answer.

A plain answer is collected first, since its headers say whether it was stored. A stream passes chunk by
chunk: the server's thread and those of followers all read the flight's record, and whichever needs the next
chunk takes it from the app. Neither a slow client nor one that leaves holds the others.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from .._drive import iter_sync, run_sync
from .._ports.sync import SyncPort
from ..caching import headers as http
from ..caching.fastlane import is_failure
from ..caching.flight import ABANDONED, DONE, FAILED, Flight, FlightReader, Head, lead
from ..caching.keeper import Recorded
from ..caching.landing import Landing
from ..caching.lookup import Opened
from ..caching.plan import Plan
from ..caching.pump import SyncPump
from ..types import Headers
from .exchange import Body, Exchange, reader_close, status_line

__all__ = ["Leader"]

logger = logging.getLogger("llm_middleware")

_port = SyncPort()
_END = b""


@dataclass(slots=True)
class _Started:
    """What the app said to ``start_response``, and wrote with the callable that it returns."""

    status: str = ""
    headers: Headers = ()
    written: list[bytes] = field(default_factory=list)
    sent: bool = False
    starts: int = 0

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: object = None
    ) -> Callable[[bytes], object]:
        if exc_info is not None and self.sent:
            raise exc_info[1].with_traceback(exc_info[2])  # type: ignore[index]
        if self.status and exc_info is None:
            raise AssertionError("start_response was called twice without exc_info")
        self.starts += 1
        self.status = status
        self.headers = tuple(
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers
        )
        return self.written.append

    @property
    def code(self) -> int:
        return int(self.status[:3])


class Leader:
    def __init__(self, exchange: Exchange, plan: Plan, flight: Flight, opened: Opened) -> None:
        self.exchange = exchange
        self.flow = exchange.flow
        self.plan = plan
        self.flight = flight
        self.opened = opened
        self.fallback = opened.fallback
        if exchange.told is not None:
            exchange.told.fallback = self.fallback is not None
        self.started = _Started()
        # Everything of the app's runs in one context, whichever thread takes the next chunk.
        self.context = contextvars.copy_context()
        self.result: Iterable[bytes] = ()
        self.chunks: Iterator[bytes] = iter(())

    def run(self) -> Iterable[bytes]:
        self.context.run(lead, self.flight)
        try:
            return self._call()
        except Exception as exc:
            self._close_result(quiet=True)
            if self.fallback is not None and not self.started.sent:
                logger.warning("answered stale, the handler failed: %s: %s", type(exc).__name__, exc)
                return self._fall_back()
            self.flight.end(FAILED, error=exc)
            self.flow.flights.land(self.flight)
            raise
        except BaseException:
            self.flight.end(ABANDONED)
            self.flow.flights.land(self.flight)
            raise

    def _call(self) -> Iterable[bytes]:
        exchange = self.exchange
        forward = self.opened.forwarded(exchange.body if self.plan.forward is None else self.plan.forward)
        if forward is not None:
            exchange.give(forward)
        self.result = self.context.run(exchange.app, exchange.environ, self.started.start_response)
        if exchange.told is not None:
            exchange.told.fallback = False  # what fails from here on is within a stream
        self.chunks = self.context.run(iter, self.result)
        first = self._first()
        if self.fallback is not None and self.started.status and is_failure(self.started.code):
            self._close_result(quiet=True)
            return self._fall_back()
        return self._plain(self._whole(first)) if self._is_plain() else self._stream(first)

    def _whole(self, first: bytes) -> bytes:
        """The rest of a plain body. An app that starts over with an error, which it may since nothing was
        sent, leaves what it said before."""
        parts, starts = [first], self.started.starts
        while chunk := self._next():
            if self.started.starts != starts:
                parts, starts = [], self.started.starts
            parts.append(chunk)
        return b"".join(parts)

    def _next(self) -> bytes:
        """The app's next chunk that is not empty; empty at the end."""
        while True:
            chunk = self.context.run(next, self.chunks, None)
            if chunk is None:
                return _END
            if chunk:
                return chunk

    def _first(self) -> bytes:
        # The app may call start_response only now, and write() before.
        chunk = self._next()
        written, self.started.written[:] = b"".join(self.started.written), []
        return written + chunk

    def _is_plain(self) -> bool:
        headers = self.started.headers
        kind = http.content_type(headers)
        if kind == b"text/event-stream":
            return False
        return (
            kind == http.JSON
            or any(name == b"content-length" for name, _ in headers)
            or isinstance(self.result, (list, tuple))
            or getattr(self.result, "streaming", True) is False
        )

    def _close_result(self, *, quiet: bool = False) -> None:
        close = getattr(self.result, "close", None)
        self.result = ()
        if close is None:
            return
        try:
            self.context.run(close)
        except Exception:
            if not quiet:
                raise

    def _fall_back(self) -> Iterable[bytes]:
        found = self.fallback
        assert found is not None
        self.flow.flights.land_with(self.flight, found)
        return self.exchange.found(self.plan, found)

    def _plain(self, body: bytes) -> Iterable[bytes]:
        started, exchange = self.started, self.exchange
        if not started.status:
            raise AssertionError("the app returned without calling start_response")
        info, record = run_sync(
            self.flow.keeper.complete(
                _port,
                self.plan,
                Recorded(started.code, started.headers, body),
                self.opened,
                exchange.header,
            )
        )
        self.flight.vary = http.varies(started.headers, exchange.header)
        self.flow.flights.land(self.flight)
        if exchange.told is not None and exchange.told.own:
            self.flight.end(ABANDONED)  # who waits asks on its own account
        else:
            self.flight.begin(Head(record.status, record.headers, streamed=False))
            self.flight.push(record.body)
            self.flight.end(DONE, outcome=info)
        self.flow.tell(self.plan, info)
        started.sent = True
        status, sent = started.status, started.headers
        if self.opened.batch is not None:
            status, sent, body = status_line(record.status), record.headers, record.body
        headers = http.add_info(sent, info, exchange.front.profile)
        if body and not any(name == b"content-length" for name, _ in headers):
            headers.append((b"content-length", b"%d" % len(body)))
        exchange.start(status, headers)
        return Body([body], self._close_result)

    def _stream(self, first: bytes) -> Iterable[bytes]:
        started, exchange, flight = self.started, self.exchange, self.flight
        detail = None if started.code == 200 else "upstream-error"
        info = self.opened.miss(self.plan, detail)
        self.flow.tell(self.plan, info)
        encoded = http.content_encoding(started.headers)
        flight.vary = None if encoded else http.varies(started.headers, exchange.header)
        flight.begin(Head(started.code, started.headers, streamed=True))
        flight.push(first)
        flight.enter()
        policy = self.flow.settings.on_disconnect
        self._pump().begin(finish=policy == "finish")
        started.sent = True
        headers = started.headers
        if http.content_type(headers) == b"text/event-stream":
            headers = tuple(http.stream_headers(headers))
        exchange.start(started.status, http.add_info(headers, info, exchange.front.profile))
        reader = FlightReader(flight, _port, ends_all=policy == "cancel")
        chunks = iter_sync(reader)
        return Body(chunks, reader_close(chunks, reader))

    def _pump(self) -> SyncPump:
        landing = Landing(
            self.flow.keeper,
            self.flow.flights,
            self.plan,
            self.flight,
            opened=self.opened,
            header=self.exchange.header,
            items=self.exchange.told,
        )
        return SyncPump(
            self.flow.flights,
            self.flight,
            landing,
            port=_port,
            pull=lambda: self._next_in_context() or None,
            close=getattr(self.result, "close", None),
            context=self.context,
        )

    def _next_in_context(self) -> bytes:
        return next((chunk for chunk in self.chunks if chunk), _END)
