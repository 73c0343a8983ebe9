"""The request that calls the host's handler, while others may wait for the same answer.

The handler runs in a task of its own, so that its client can leave without ending it. What it sends goes to
its client directly, in the handler's task, and into the flight's record, where followers read it:

- a plain answer is held until it is whole, since its headers say whether it was stored;
- a stream passes at once, headers first;
- a client that reads slowly blocks the handler, as it would without us, until somebody follows: then the
  send under way moves to a writer task (`handover`), and the handler goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Generator
from dataclasses import replace
from functools import partial
from typing import Any

from ..caching import headers as http
from ..caching.fastlane import is_failure
from ..caching.flight import ABANDONED, DONE, FAILED, OPEN, Flight, Head, lead
from ..caching.keeper import Recorded
from ..caching.landing import Landing
from ..caching.lookup import Opened
from ..caching.plan import Plan
from ..types import Headers
from .exchange import Exchange, _port
from .handover import Sending, send_or_hand_over
from .reading import client_left
from .types import Message

__all__ = ["Leader"]

logger = logging.getLogger("llm_middleware")

# Seconds that a handler has to end by itself once it is told that its client has left.
_GRACE = 1.0


class Leader:
    def __init__(self, exchange: Exchange, plan: Plan, flight: Flight, opened: Opened) -> None:
        self.exchange = exchange
        self.flow = exchange.flow
        forward = opened.forwarded(exchange.body if plan.forward is None else plan.forward)
        self.plan = plan if forward is None else replace(plan, forward=forward)
        self.flight = flight
        self.opened = opened
        self.fallback = opened.fallback
        if exchange.told is not None:
            exchange.told.fallback = self.fallback is not None
        self.landing = Landing(
            self.flow.keeper,
            self.flow.flights,
            self.plan,
            flight,
            opened=opened,
            header=exchange.header,
            items=exchange.told,
        )
        self.policy = self.flow.settings.on_disconnect
        self.task: asyncio.Task[None] | None = None
        self.writer: asyncio.Task[None] | None = None
        self.disconnected = asyncio.Event()
        self.client_gone = False
        self.hung_up: OSError | None = None  # what the handler gets that still sends to nobody
        self.answered = False  # the handler has sent all of its answer
        self.replaced = False  # a stale answer stands in for the handler's
        self.given = False
        self.start: Message = {}
        self.status = 0
        self.headers: Headers = ()
        self.parts: list[bytes] = []
        self.streaming = False

    # --- the request's own task

    async def run(self) -> None:
        """Call the handler and wait for it; what it raises is raised here."""
        task = self.task = asyncio.create_task(self._handle())
        watcher = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({task})
            if self.writer is not None:
                await asyncio.wait({self.writer})
        except asyncio.CancelledError:
            # The server cancels a request whose client has left, and every request when it stops.
            if not self._client_left():
                self.flight.close_to_readers()
                task.cancel()
                await asyncio.wait({task})
            if self.writer is not None:
                self.writer.cancel()
                await asyncio.wait({self.writer})
            raise
        finally:
            watcher.cancel()
        if task.cancelled():
            if not self.client_gone:
                raise asyncio.CancelledError
            return
        error = task.exception()
        if error is not None and error is not self.hung_up:
            raise error

    async def refresh(self) -> None:
        """Call the handler for the store alone; its client has had a stale answer."""
        self.client_gone = True
        await self._handle()

    async def _watch(self) -> None:
        await client_left(self.exchange.receive)
        if self.answered:
            self.disconnected.set()
        elif not self._client_left():
            await self._hang_up()

    def _client_left(self) -> bool:
        """Take note that the client has left; whether the handler goes on without it."""
        self.client_gone = True
        if self.policy == "finish":
            return True
        if self.policy == "cancel" or self.flight.readers == 0 or self.task is None:
            return False
        loop = asyncio.get_running_loop()
        self.flight.cancel_with(partial(loop.call_soon_threadsafe, _port.spawn, self._hang_up))
        return True

    async def _hang_up(self) -> None:
        """Tell the handler that its client has left, and cancel it if it does not end by itself."""
        self.flight.close_to_readers()
        self.flow.flights.land(self.flight)
        self.hung_up = OSError("the client has left")
        self.disconnected.set()
        if self.task is not None:
            await asyncio.wait({self.task}, timeout=_GRACE)
            self.task.cancel()

    # --- the handler's task

    async def _handle(self) -> None:
        lead(self.flight)
        exchange = self.exchange
        try:
            with exchange.forwarding(self.plan):
                await exchange.app(exchange.scope, self._receive, self._send)
            if self.flight.state == OPEN:
                await self._broken_off()
        except Exception as exc:
            if self.fallback is not None and not self.streaming and self.flight.state == OPEN:
                logger.warning("answered stale, the handler failed: %s: %s", type(exc).__name__, exc)
                await self._fall_back()
                return
            if self.client_gone and self.flight.state == OPEN:
                await self._broken_off()  # its error is that there is no client
            self.flight.end(FAILED, error=exc)
            raise
        except BaseException:
            if self.flight.state == OPEN:
                await self._broken_off()
            raise
        finally:
            self.flow.flights.land(self.flight)

    async def _receive(self) -> Message:
        if not self.given:
            self.given = True
            return self.exchange._request(self.plan.forward)
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        """What the handler sends. The next event of a stream, of which there are hundreds, takes the short
        way: the server's own coroutine is stepped in place, and as a rule has nothing to wait for."""
        body = message.get("body", b"")
        if (
            not self.streaming
            or self.client_gone
            or self.replaced
            or self.writer is not None
            or message["type"] != "http.response.body"
            or not message.get("more_body", False)
            or not self.flight.joinable
            or self.landing.may_end(body)
        ):
            await self._take(message)
            return
        if body:
            self.flight.push(bytes(body))
        try:
            step: Generator[Any, Any, None] = self.exchange.send(message).__await__()
            pending = next(step)
        except StopIteration:
            return
        except OSError:
            if not self._client_left():
                raise
            return
        await self._finish(Sending(step, self.flight, pending))

    async def _finish(self, sending: Awaitable[Awaitable[None] | None]) -> None:
        """Wait for a send, or for what has to be sent by a task of its own from here on."""
        try:
            rest = await sending
        except OSError:
            # How servers say that the client has left (ASGI 2.4).
            if not self._client_left():
                raise
            return
        if rest is not None:
            self.writer = asyncio.create_task(self._write_on(rest, len(self.flight.chunks)))

    async def _take(self, message: Message) -> None:
        kind = message["type"]
        if self.hung_up is not None:
            raise self.hung_up  # as servers do (ASGI 2.4)
        if self.replaced:
            return
        if kind == "http.response.start":
            self.start = message
            self.status = message["status"]
            self.headers = tuple(
                (bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())
            )
            if http.content_type(self.headers) == b"text/event-stream":
                await self._begin_stream()
        elif kind == "http.response.body":
            await self._body(message)
        else:
            # An extension of the server's (a file by path, a push): not ours to record.
            if self.start and not self.streaming and not self.answered:
                await self._begin_stream(shared=False)
            await self._to_client(message)

    async def _body(self, message: Message) -> None:
        body, more = message.get("body", b""), message.get("more_body", False)
        if not self.streaming:
            if more and not self._is_whole_later():
                await self._begin_stream()
            else:
                self.parts.append(bytes(body))
                if not more:
                    await self._plain(b"".join(self.parts))
                return
            if self.replaced:
                return
        if body:
            body = bytes(body)
            await self.landing.before(_port, body)
            self.flight.push(body)
        if more:
            await self._to_client(message)
        else:
            await self._end_stream(message)

    def _is_whole_later(self) -> bool:
        # A plain answer that passes through layers of the host's comes in pieces too.
        names = {name for name, _ in self.headers}
        return b"content-length" in names or http.content_type(self.headers) == http.JSON

    # --- plain answers

    async def _plain(self, body: bytes) -> None:
        self.answered = True
        if self.fallback is not None and is_failure(self.status):
            await self._fall_back()
            return
        info, record = await self.flow.keeper.complete(
            _port, self.plan, Recorded(self.status, self.headers, body), self.opened, self.exchange.header
        )
        self._vary()
        self.flow.flights.land(self.flight)
        if self.exchange.told is not None and self.exchange.told.own:
            self.flight.end(ABANDONED)  # who waits asks on its own account
        else:
            self.flight.begin(Head(record.status, record.headers, streamed=False))
            self.flight.push(record.body)
            self.flight.end(DONE, outcome=info)
        self.flow.tell(self.plan, info)
        headers, start = self.headers, self.start
        if self.opened.batch is not None:
            body, start = record.body, {**start, "status": record.status}
            headers = (*record.headers, (b"content-length", b"%d" % len(body)))
        pairs = http.add_info(headers, info, self.exchange.front.profile)
        await self._to_client({**start, "headers": pairs})
        await self._to_client({"type": "http.response.body", "body": body, "more_body": False})

    def _vary(self) -> None:
        self.flight.vary = http.varies(self.headers, self.exchange.header)

    async def _fall_back(self) -> None:
        found = self.fallback
        assert found is not None
        self.replaced = self.answered = True
        self.flow.flights.land_with(self.flight, found)
        if not self.client_gone:
            await self.exchange.send_found(self.plan, found)

    # --- streams

    async def _begin_stream(self, *, shared: bool = True) -> None:
        if self.fallback is not None and is_failure(self.status):
            await self._fall_back()
            return
        self.streaming = True
        if self.exchange.told is not None:
            self.exchange.told.fallback = False  # too late for it
        detail = None if self.status == 200 else "upstream-error"
        info = self.opened.miss(self.plan, detail)
        self.flow.tell(self.plan, info)
        self._vary()
        if http.content_encoding(self.headers) or not shared:
            self.flight.vary = None  # made for this client; others call for themselves
        self.flight.begin(Head(self.status, self.headers, streamed=True))
        headers = http.stream_headers(self.headers) if self._is_event_stream() else self.headers
        headers = http.add_info(headers, info, self.exchange.front.profile)
        await self._to_client({**self.start, "headers": headers})
        for part in self.parts:
            self.flight.push(part)
            await self._to_client({"type": "http.response.body", "body": part, "more_body": True})

    def _is_event_stream(self) -> bool:
        return http.content_type(self.headers) == b"text/event-stream"

    async def _end_stream(self, message: Message) -> None:
        self.answered = True
        self.flight.end(DONE, outcome=await self.landing.end(_port))
        await self._to_client(message)

    async def _broken_off(self) -> None:
        """The handler ended before its answer did. A stream that is whole all the same is kept."""
        if self.streaming:
            await self.landing.left(_port)
        self.flight.end(ABANDONED)

    # --- to the client

    async def _to_client(self, message: Message) -> None:
        if self.client_gone:
            return
        if self.writer is not None:
            await self._make_room()
            return
        sending = self.exchange.send(message)
        await self._finish(sending if self.answered else send_or_hand_over(sending, self.flight))

    async def _write_on(self, rest: Awaitable[None], at: int) -> None:
        """Go on sending to a client that could not keep up, from chunk ``at`` of the record."""
        send = self.exchange.send
        try:
            await rest
            async for chunk in self.flight.read(_port, at):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            if not self._client_left():
                await self._hang_up()
        except Exception as exc:
            logger.debug("a stream ended for its client: %s: %s", type(exc).__name__, exc)

    async def _make_room(self) -> None:
        # The record is the buffer between handler and client; past the size of an entry the handler waits.
        if self.writer is not None and self.flight.size > self.flow.settings.max_entry_bytes:
            await asyncio.wait({self.writer})
