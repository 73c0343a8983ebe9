"""`fetch`: look up, else call and store. What a call may return, and how it becomes an `Answer`."""

from __future__ import annotations

import contextvars
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

from .._drive import run_sync
from .._ports.protocol import Port
from .._ports.sync import SyncPort
from ..errors import NOT_CACHED, CacheMissError, SuspendedInSyncError
from ..types import Headers
from .answer import Answer, CacheInfo, Found
from .batch import reduced
from .entry import Entry
from .flight import ABANDONED, DONE, FAILED, Flight, FlightReader, Head, lead, lead_ends
from .flow import Flow
from .headers import EVENT_STREAM, JSON
from .keeper import Recorded
from .lookup import Opened
from .plan import Plan
from .pump import SyncPump
from .sse import format_event

__all__ = ["Fetch", "answer_found", "recorded"]

Call = Callable[..., object]

_END = object()
_JSON_HEADERS: Headers = ((b"content-type", JSON),)
_STREAM_HEADERS: Headers = ((b"content-type", EVENT_STREAM),)
# An opaque stream is replayed in the pieces it came in, whatever they are.
_OPAQUE_HEADERS: Headers = ((b"content-type", b"application/octet-stream"),)


def _json(value: object) -> bytes:
    dump = getattr(value, "model_dump_json", None)
    if dump is not None:
        # What the provider did not send must not be in the replay either.
        return str(dump(exclude_unset=True)).encode()
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def recorded(result: object) -> Recorded:
    """A call's plain result as an answer: bytes, text, JSON values, pydantic models, an `Answer`, or a
    response object of httpx or requests. `TypeError` for anything else."""
    if isinstance(result, Recorded):
        return result
    if isinstance(result, Answer):
        return Recorded(result.status, result.headers, result.body)
    if isinstance(result, (bytes, bytearray)):
        return Recorded(200, _JSON_HEADERS, bytes(result))
    if isinstance(result, str):
        return Recorded(200, _JSON_HEADERS, result.encode("utf-8", "surrogatepass"))
    if hasattr(result, "status_code") and hasattr(result, "content"):
        pairs = getattr(result, "headers", {}).items()
        sent = tuple((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs)
        # The client has decoded the content already.
        plain = tuple(pair for pair in sent if pair[0] not in (b"content-encoding", b"content-length"))
        return Recorded(result.status_code, plain, result.content)
    return Recorded(200, _JSON_HEADERS, _json(result))


def _chunk(kind: str, item: object) -> bytes:
    if isinstance(item, (bytes, bytearray)):
        return bytes(item)
    if isinstance(item, str):
        return item.encode("utf-8", "surrogatepass")
    event = item.get("type") if isinstance(item, Mapping) else getattr(item, "type", None)
    named = kind in ("responses", "messages") and isinstance(event, str)
    return format_event(_json(item), event if named else None)


def _last(kind: str, item: object) -> bytes | None:
    """What ends a stream whose items were objects: SDKs swallow the provider's own end."""
    if isinstance(item, (bytes, bytearray, str)) or kind not in ("chat", "text"):
        return None
    return format_event(b"[DONE]")


def answer_found(plan: Plan, found: Found) -> Answer:
    """A stored answer as an `Answer`."""
    info = CacheInfo(
        "stale" if found.stale else "hit",
        plan.digest,
        found.stale,
        age=found.age,
        ttl=found.ttl,
        tier=found.tier,
    )
    if found.chunks is None:
        return Answer(info, 200, found.headers, found.body)
    chunks = found.chunks
    return Answer(info, 200, found.headers, found.body, lambda: _replay(chunks))


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
        self.beside: Entry | None = None

    async def run(self) -> Answer:
        if self.plan.bypass is not None:
            return await self._bypass()
        while True:
            opened = await self.flow.open(self.port, self.plan)
            if opened.found is not None:
                if opened.found.stale == "stale-while-revalidate":
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
        kind = self.plan.kind
        if isinstance(result, AsyncIterator):
            stream: Callable[[], AsyncIterator[bytes]] = lambda: _encoded_async(kind, result)  # noqa: E731
        else:
            stream = lambda: _encoded(kind, result)  # noqa: E731
        return self._told(Answer(info, 200, _STREAM_HEADERS, b"", stream))

    # --- leading

    async def _lead(self, flight: Flight, opened: Opened) -> Answer:
        self.beside, fallback = opened.beside, opened.fallback
        token = lead(flight)
        try:
            batch = opened.batch
            body = self.body if batch is None or batch.whole else reduced(self.body, batch)
            result = await self.port.call(self.call, body)
            if isinstance(result, (AsyncIterator, Iterator)):
                return self._stream(flight, result)
            answer = recorded(result)
            if fallback is not None and _failed(answer.status):
                raise _UpstreamFailedError(answer.status)
            info, answer = await self.flow.keeper.complete(self.port, self.plan, answer, opened)
        except Exception as exc:
            if fallback is not None:
                return await self._fallback(flight, fallback)
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

    async def _fallback(self, flight: Flight, found: Found) -> Answer:
        chunks = [found.body] if found.chunks is None else found.chunks
        flight.begin(Head(200, found.headers, found.chunks is not None))
        for chunk in chunks:
            flight.push(chunk)
        flight.end(DONE)
        self.flow.flights.land(flight)
        return answer_found(self.plan, found)

    def _stream(self, flight: Flight, items: AsyncIterator[object] | Iterator[object]) -> Answer:
        if isinstance(items, AsyncIterator) and isinstance(self.port, SyncPort):
            raise SuspendedInSyncError("the call returned an async iterator: use the async method instead")
        policy = self.flow.settings.on_disconnect
        finish = policy == "finish"
        headers = _OPAQUE_HEADERS if self.plan.kind == "json" else _STREAM_HEADERS
        flight.begin(Head(200, headers, streamed=True))
        flight.enter()
        if isinstance(items, AsyncIterator):
            cancel = self.port.spawn(lambda: self._produce(flight, items))
            if not finish:
                flight.cancel_with(cancel)
        else:
            self._pump(flight, items).begin(finish=finish)
        info = CacheInfo("miss", self.plan.digest, forward="miss" if self.plan.lookup else "request")
        reader = FlightReader(flight, self.port, ends_all=policy == "cancel")
        return Answer(info, 200, headers, b"", lambda: reader)

    def _pump(self, flight: Flight, items: Iterator[object]) -> SyncPump:
        port, last = SyncPort(), list[object]((b"",))

        def pull() -> bytes | None:
            item = next(items, _END)
            if item is _END:
                return None
            last[0] = item
            return _chunk(self.plan.kind, item)

        return SyncPump(
            self.flow.flights,
            flight,
            pull=pull,
            done=lambda: run_sync(self._done(port, flight, last[0])),
            left=lambda: run_sync(self._left(port, flight)),
            close=getattr(items, "close", None),
            context=contextvars.copy_context(),
        )

    async def _produce(self, flight: Flight, items: AsyncIterator[object]) -> None:
        item: object = b""
        try:
            async for item in items:
                flight.push(_chunk(self.plan.kind, item))
                await flight.room(self.port)
            await self._done(self.port, flight, item)
        except Exception as exc:
            flight.end(FAILED, error=exc)
        except BaseException:
            await _aclose(items)
            await self._left(self.port, flight)
            raise
        finally:
            self.flow.flights.land(flight)

    async def _done(self, port: Port, flight: Flight, item: object) -> None:
        last = _last(self.plan.kind, item)
        if last is not None:
            flight.push(last)
        info = await self.flow.keeper.land(port, self.plan, flight, beside=self.beside)
        flight.end(DONE, outcome=info)

    async def _left(self, port: Port, flight: Flight) -> None:
        """Nobody reads any more. What was recorded is kept only if it happens to be whole."""
        await self.flow.keeper.land(port, self.plan, flight, beside=self.beside, complete=False)
        flight.end(ABANDONED)

    # --- following

    async def _follow(self, flight: Flight) -> Answer | None:
        info = CacheInfo("collapsed", self.plan.digest, forward="miss")
        left = False
        try:
            head = await flight.begun(self.port)
            if head is None:
                return None
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


def _failed(status: int) -> bool:
    return status >= 500 or status == 429


async def _aclose(items: AsyncIterator[object]) -> None:
    close = getattr(items, "aclose", None) or getattr(items, "close", None)
    if close is not None:
        result = close()
        if hasattr(result, "__await__"):
            await result


async def _encoded_async(kind: str, items: AsyncIterator[object]) -> AsyncIterator[bytes]:
    item: object = b""
    async for item in items:
        yield _chunk(kind, item)
    last = _last(kind, item)
    if last is not None:
        yield last


async def _encoded(kind: str, items: Iterator[object]) -> AsyncIterator[bytes]:
    item: object = b""
    for item in items:
        yield _chunk(kind, item)
    last = _last(kind, item)
    if last is not None:
        yield last
