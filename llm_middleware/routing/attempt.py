"""One attempt: a call of one deployment, and what it was like.

A plain answer is read whole. A stream is read up to its first content before anybody sees it: until then
another deployment may take its place unnoticed.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace

from .._ports.protocol import Port
from ..caching.sse import event_ends, parse_events, split_events
from ..errors import BadRequestError, ProviderError, UpstreamConnectionError, UpstreamServerError
from ..providers.adapters import Adapter, Signer, adapter_of, prepared
from ..providers.messages import Outgoing, Reply, Timeouts, Transport
from ..providers.target import Target
from .limits import Outcome

__all__ = ["Attempt", "Finish", "within"]

Finish = Callable[[Outcome], object]

_TOTAL = (b'"total_tokens"',)
_OUTPUT = (b'"completion_tokens"', b'"output_tokens"')
_NUMBER = re.compile(rb"\s*:\s*(\d{1,12})")
_EARLY = 0.01  # seconds by which a client's timer may go off before the time
# What there is at the end of a stream that is whole; some leave the last event out.
_ENDED = dict.fromkeys(("chat", "text"), re.compile(rb'\[DONE\]|"finish_reason"\s*:\s*"'))
_HELD = 64  # events without content that are held back at most
# What the Responses API says before it has an answer.
_OPENING = frozenset({"response.created", "response.queued", "response.in_progress"})


class Attempt:
    """``finish(outcome)`` is called once, when the answer is whole, broken or left. ``own_timeout``: the time
    that the call has is the caller's word."""

    def __init__(
        self,
        port: Port,
        transport: Transport,
        signer: Signer,
        target: Target,
        timeouts: Timeouts,
        clock: Callable[[], float],
        finish: Finish,
        *,
        own_timeout: bool,
    ) -> None:
        self._port = port
        self._signer = signer
        self._transport = transport
        self._target = target
        self._adapter: Adapter = adapter_of(target)
        self._timeouts = timeouts
        self._clock = clock
        self._finish = finish
        self._own_timeout = own_timeout
        self._began = clock()

    async def plain(self, kind: str, body: Mapping[str, object]) -> bytes:
        """The answer's bytes, in OpenAI's shape. Raises `ProviderError`."""
        try:
            reply = await self._reply(kind, body, stream=False)
            data = await reply.read()
            if self._adapter.answer is not None:
                data = self._adapter.answer(data, model=self._target.model, secrets=self._target.secrets())
            elif kind != "transcription":
                self._check(data)
        except ProviderError as exc:
            self._failed(exc)
            raise
        except BaseException:
            self._finish(Outcome(abandoned=True))
            raise
        self._finish(
            Outcome(
                tokens=_last(_TOTAL, data),
                latency=self._clock() - self._began,
                output_tokens=_last(_OUTPUT, data) or 0,
            )
        )
        return data

    async def stream(self, kind: str, body: Mapping[str, object]) -> AsyncIterator[bytes]:
        """The stream's events as bytes, from its first one on. Raises `ProviderError`: here for what goes
        wrong before the first content, from the iterator for what goes wrong after it."""
        held: list[bytes] = []
        try:
            reply = await self._reply(kind, body, stream=True)
            try:
                pieces = self._pieces(reply, body)
                first: float | None = None
                async for piece in pieces:
                    held.append(piece)
                    if held[0].lstrip()[:1] == b"{":  # no event begins so
                        await self._refuse_whole(held, pieces)
                    if self._is_content(b"".join(held)) or len(held) >= _HELD:
                        first = self._clock() - self._began
                        break
                else:
                    raise UpstreamConnectionError("the provider's stream ended before it had any content")
            except BaseException:
                await reply.aclose()
                raise
        except ProviderError as exc:
            self._failed(exc)
            raise
        except BaseException:
            self._finish(Outcome(abandoned=True))
            raise
        events = self._relay(kind, held, pieces, reply, first)
        await anext(events)  # begun: a generator that never ran would not see that it is closed or dropped
        return events

    async def _refuse_whole(self, held: list[bytes], pieces: AsyncIterator[bytes]) -> None:
        """A JSON answer where a stream was asked for: an error, or of a model that has no streams."""
        self._check(b"".join([*held, *[piece async for piece in pieces]]))
        raise BadRequestError("this model does not answer in a stream", param="stream")

    def _check(self, data: bytes) -> None:
        """Some who speak OpenAI's API say with status 200 that they failed; proxies have pages."""
        if data.lstrip()[:1] != b"{":
            raise UpstreamServerError("the provider's answer is not a JSON object", code="unexpected_answer")
        if b'"error"' in data and b'"choices"' not in data and b'"object"' not in data:
            raise self._failure(200, {}, data)

    async def _reply(self, kind: str, body: Mapping[str, object], *, stream: bool) -> Reply:
        target, timeouts = self._target, self._timeouts
        if target.token is None and not self._adapter.signs:
            request = self._adapter.build(target, kind, body, stream)
        else:
            request, timeouts = await self._prepared(kind, body, stream)
        reply = await self._transport.send(request, timeouts)
        if reply.status >= 300:
            raise self._failure(reply.status, reply.headers, await reply.read())
        return reply

    async def _prepared(
        self, kind: str, body: Mapping[str, object], stream: bool
    ) -> tuple[Outgoing, Timeouts]:
        """The request with credentials that are fetched, and the time that this leaves."""
        timeouts, total = self._timeouts, self._timeouts.total
        blocking = self._port.blocking
        work = prepared(self._target, kind, body, stream, signer=self._signer, blocking=blocking)
        self._target, request = await self._port.bounded(work, total)
        if total is not None:
            timeouts = within(timeouts, max(0.0, total - (self._clock() - self._began)))
        return request, timeouts

    def _failure(self, status: int, headers: Mapping[str, str], body: bytes) -> ProviderError:
        return self._adapter.failure(status, headers, body, secrets=self._target.secrets())

    def _failed(self, error: ProviderError) -> None:
        own_key = self._target.caller_key
        self._finish(Outcome(error=error, own_key=own_key, own_timeout=self._over()))

    def _over(self) -> bool:
        """Whether the time that the caller gave is over. A provider that nobody could connect to within
        `Timeouts.connect`, or that said nothing for `Timeouts.read`, failed before that."""
        total = self._timeouts.total
        return self._own_timeout and total is not None and self._clock() - self._began > total - _EARLY

    def _pieces(self, reply: Reply, body: Mapping[str, object]) -> AsyncIterator[bytes]:
        chunks = reply.chunks()
        if self._adapter.events is None:
            return chunks
        options = body.get("stream_options")
        usage = isinstance(options, Mapping) and options.get("include_usage") is True
        secrets = self._target.secrets()
        return self._adapter.events(chunks, model=self._target.model, include_usage=usage, secrets=secrets)

    def _is_content(self, data: bytes) -> bool:
        """Whether the events so far say anything. Raises what an error event is."""
        for event in parse_events(data[: data.rfind(b"\n") + 1]):
            payload = event.data
            if payload == "[DONE]":
                return True
            try:
                value = json.loads(payload)
            except ValueError:
                continue
            self._raise_error(value)
            if not isinstance(value, dict) or _says(value):
                return True
        return False

    def _raise_error(self, event: object) -> None:
        """What an event says of a failure, if it does."""
        if not isinstance(event, dict):
            return
        told: object = None
        if event.get("error"):
            told = event
        elif event.get("type") == "error":
            told = {"error": event}
        elif event.get("type") == "response.failed":
            told = event.get("response")
        if told is not None:
            raise self._failure(200, {}, json.dumps(told).encode())

    def _look(self, part: bytes, piece: bytes) -> tuple[bytes, bytes, ProviderError | None]:
        """What is to be given of ``piece``, which follows ``part`` of an event; the part of an event at its
        end; and the error that comes among whole events: what stands before it is given."""
        data = part + piece
        whole, rest = split_events(data)
        if b'"error"' in whole:
            start = 0
            for end in event_ends(whole):
                error = self._error_in(whole[start:end])
                if error is not None:
                    return data[len(part) : start], b"", error
                start = end
        return piece, rest, None

    def _error_in(self, event: bytes) -> ProviderError | None:
        if b'"error"' not in event:
            return None
        try:
            for each in parse_events(event):
                self._raise_error(json.loads(each.data))
        except ValueError:
            return None
        except ProviderError as exc:
            return exc
        return None

    def _read(self, tail: bytes, first: float | None, said: int) -> Outcome:
        """Of a stream that came to its end."""
        tokens = _last(_TOTAL, tail)
        return Outcome(
            tokens=tokens,
            latency=self._clock() - self._began,
            first_token=first,
            output_tokens=said if tokens is None else _last(_OUTPUT, tail) or 0,
        )

    async def _relay(
        self, kind: str, held: list[bytes], pieces: AsyncIterator[bytes], reply: Reply, first: float | None
    ) -> AsyncGenerator[bytes]:
        outcome = Outcome(abandoned=True)
        tail = part = b""
        said = 0  # events: about as many as tokens, where the provider does not count
        try:
            yield b""  # for `stream`
            for piece in held:
                given, part, error = self._look(part, piece)
                tail = (tail + given)[-4096:]
                said += given.count(b"data:")
                if given:
                    yield given
                if error is not None:
                    raise error
            async for piece in pieces:
                given, part, error = self._look(part, piece)
                tail = (tail + given)[-4096:]
                said += given.count(b"data:")
                if given:
                    yield given
                if error is not None:
                    raise error
            *_, error = self._look(part, b"\n\n")
            if error is not None:
                raise error
            if kind in _ENDED and not _ENDED[kind].search(tail):
                raise UpstreamConnectionError("the provider's stream ended before its end")
            outcome = self._read(tail, first, said)
        except ProviderError as exc:
            outcome = Outcome(error=exc, own_key=self._target.caller_key, own_timeout=self._over())
            raise
        except GeneratorExit:
            if kind in _ENDED and _ENDED[kind].search(tail):  # the client hung up on the last event
                outcome = self._read(tail, first, said)
            raise
        finally:
            # What came of a stream that broke off or was left is used, too.
            self._finish(outcome if outcome.latency is not None else replace(outcome, output_tokens=said))
            await reply.aclose()


def _says(chunk: Mapping[str, object]) -> bool:
    choices = chunk.get("choices")
    if not isinstance(choices, list):
        return chunk.get("type") not in _OPENING
    for choice in choices:
        delta = choice.get("delta") if isinstance(choice, dict) else None
        if not isinstance(delta, dict):
            return True
        if choice.get("finish_reason") or any(value for name, value in delta.items() if name != "role"):
            return True
    return False


def _last(names: Sequence[bytes], data: bytes) -> int | None:
    """The number of the last field of one of these names, written as JSON."""
    for name in names:
        at = data.rfind(name)
        if at >= 0 and (found := _NUMBER.match(data, at + len(name))):
            return int(found[1])
    return None


def within(timeouts: Timeouts, seconds: float | None) -> Timeouts:
    """``timeouts`` that also end after ``seconds``."""
    if seconds is None:
        return timeouts
    total = seconds if timeouts.total is None else min(timeouts.total, seconds)
    return Timeouts(timeouts.connect, timeouts.read, total)
