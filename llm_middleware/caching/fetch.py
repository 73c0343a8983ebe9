"""`fetch`: look up, else call and store. What a call may return, and how it becomes an `Answer`."""

from __future__ import annotations

import contextvars
from collections.abc import AsyncIterator, Callable, Iterator

from .._ports.protocol import Port
from .._ports.sync import SyncPort
from ..errors import NOT_CACHED, CacheMissError, SuspendedInSyncError
from ..types import Headers
from .answer import Answer, CacheInfo, Found
from .batch import reduced
from .fastlane import is_failure
from .flight import ABANDONED, DONE, FAILED, Flight, FlightReader, Head, lead, lead_ends
from .flow import Flow
from .headers import EVENT_STREAM
from .landing import Landing
from .lookup import Opened
from .plan import Plan
from .pump import SyncPump
from .results import Relay, close_items, recorded

__all__ = ["Fetch", "answer_found"]

Call = Callable[..., object]

_STREAM_HEADERS: Headers = ((b"content-type", EVENT_STREAM),)
# An opaque stream is replayed in the pieces it came in, whatever they are.
_OPAQUE_HEADERS: Headers = ((b"content-type", b"application/octet-stream"),)


def answer_found(plan: Plan, found: Found) -> Answer:
    """A stored answer as an `Answer`."""
    info = found.info(plan.digest)
    if found.chunks is None:
        return Answer(info, found.status, found.headers, found.body)
    chunks = found.chunks
    return Answer(info, found.status, found.headers, found.body, lambda: _replay(chunks))


async def _replay(chunks: list[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


class Fetch:
    """One `fetch`: the plan, the host's call, and the flow they go through."""

    def __init__(self, flow: Flow, port: Port, plan: Plan, call: Call, body: object) -> None:
        self.flow = flow
        self.port = port
        self.plan = plan
        self.call = call
        self.body = body
        self.opened = Opened()

    async def run(self) -> Answer:
        if self.plan.bypass is not None:
            return await self._bypass()
        while True:
            opened = await self.flow.open(self.port, self.plan)
            if opened.found is not None:
                if opened.found.stale == "stale-while-revalidate" and self.plan.store:
                    self._revalidate()
                return self._told(answer_found(self.plan, opened.found))
            assert opened.flight is not None
            if opened.leads:
                return self._told(await self._lead(opened.flight, opened))
            answer = await self._follow(opened.flight)
            if answer is not None:
                return self._told(answer)

    def _told(self, answer: Answer) -> Answer:
        self.flow.tell(self.plan, answer.cache)
        return answer

    async def _bypass(self) -> Answer:
        if self.plan.controls.only_if_cached:
            raise CacheMissError(NOT_CACHED)
        info = CacheInfo("bypass", None, self.plan.bypass, "bypass")
        result = await self.port.call(self.call, self.body)
        if not isinstance(result, (AsyncIterator, Iterator)):
            answer = recorded(result)
            return self._told(Answer(info, answer.status, answer.headers, answer.body))
        self._iterable(result)
        relay = Relay(self.plan.kind, result)
        return self._told(Answer(info, 200, self._stream_headers, b"", lambda: relay))

    def _iterable(self, items: object) -> None:
        if isinstance(items, AsyncIterator) and isinstance(self.port, SyncPort):
            raise SuspendedInSyncError("the call returned an async iterator: use the async method instead")

    @property
    def _stream_headers(self) -> Headers:
        return _OPAQUE_HEADERS if self.plan.kind == "json" else _STREAM_HEADERS

    # --- leading

    async def _lead(self, flight: Flight, opened: Opened) -> Answer:
        self.opened, fallback = opened, opened.fallback
        token = lead(flight)
        try:
            batch = opened.batch
            body = self.body if batch is None or batch.whole else reduced(self.body, batch)
            result = await self.port.call(self.call, body)
            if isinstance(result, (AsyncIterator, Iterator)):
                return self._stream(flight, result)
            answer = recorded(result)
            if fallback is not None and is_failure(answer.status):
                raise _UpstreamFailedError(answer.status)
            info, answer = await self.flow.keeper.complete(self.port, self.plan, answer, opened)
        except Exception as exc:
            if fallback is not None:
                self.flow.flights.land_with(flight, fallback)
                return answer_found(self.plan, fallback)
            flight.end(FAILED, error=exc)
            raise
        except BaseException:
            flight.end(ABANDONED)
            raise
        finally:
            lead_ends(token)
            if flight.head is None:
                self.flow.flights.land(flight)
        flight.begin(Head(answer.status, answer.headers, streamed=False))
        flight.push(answer.body)
        flight.end(DONE, outcome=info)
        return Answer(info, answer.status, answer.headers, answer.body)

    def _stream(self, flight: Flight, items: AsyncIterator[object] | Iterator[object]) -> Answer:
        self._iterable(items)
        policy = self.flow.settings.on_disconnect
        finish = policy == "finish"
        headers = self._stream_headers
        flight.begin(Head(200, headers, streamed=True))
        landing = Landing(
            self.flow.keeper, self.flow.flights, self.plan, flight, opened=self.opened, items=items
        )
        flight.enter()
        if isinstance(items, AsyncIterator):
            cancel = self.port.spawn(lambda: self._produce(flight, landing, items))
            if not finish:
                flight.cancel_with(cancel)
        else:
            self._pump(flight, landing, items).begin(finish=finish)
        info = self.opened.miss(self.plan)
        reader = FlightReader(flight, self.port, ends_all=policy == "cancel")
        return Answer(info, 200, headers, b"", lambda: reader)

    def _pump(self, flight: Flight, landing: Landing, items: Iterator[object]) -> SyncPump:
        relay = Relay(self.plan.kind, items)
        return SyncPump(
            self.flow.flights,
            flight,
            landing,
            port=SyncPort(),
            pull=relay.pull,
            close=getattr(items, "close", None),
            context=contextvars.copy_context(),
        )

    async def _produce(self, flight: Flight, landing: Landing, items: AsyncIterator[object]) -> None:
        port = self.port
        try:
            async for chunk in Relay(self.plan.kind, items):
                await landing.before(port, chunk)
                flight.push(chunk)
                await flight.room(port)
            flight.end(DONE, outcome=await landing.end(port))
        except Exception as exc:
            flight.end(FAILED, error=exc)
        except BaseException:
            flight.close_to_readers()
            await landing.left(port)
            raise
        finally:
            self.flow.flights.land(flight)
            try:
                await close_items(items)
            finally:
                flight.end(ABANDONED)

    # --- following

    async def _follow(self, flight: Flight) -> Answer | None:
        info = CacheInfo("collapsed", self.plan.digest, forward="miss")
        left = False
        try:
            head = await flight.begun(self.port)
            if head is None:
                return None
            if flight.vary != ():
                # An answer over HTTP that was made for its caller's headers; this caller has none.
                return await self._lead(self.flow.flights.solo(self.plan.key), Opened())
            if head.streamed:
                reader, left = FlightReader(flight, self.port), True
                return Answer(info, head.status, head.headers, b"", lambda: reader)
            return Answer(info, head.status, head.headers, await flight.body(self.port))
        finally:
            if not left:
                flight.leave()

    def _revalidate(self) -> None:
        from dataclasses import replace

        # As a request that must not be answered from the store; one at a time for each key.
        flight, leads = self.flow.flights.join(f"{self.plan.key}/revalidate")
        if not leads:
            flight.leave()
            return
        plan = replace(self.plan, lookup=False)

        async def work() -> None:
            try:
                answer = await Fetch(self.flow, self.port, plan, self.call, self.body).run()
                async for _ in answer:
                    pass
            except Exception as exc:
                self.flow.reporter.background_failed(plan, exc)
            finally:
                flight.end(DONE)
                self.flow.flights.land(flight)

        self.port.spawn(work)


class _UpstreamFailedError(Exception):
    """The call's answer is an error that a stale answer may stand in for."""
