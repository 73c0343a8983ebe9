"""`events`: Anthropic's stream as OpenAI's, event by event, and cut wherever the network cuts it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from ..errors import ProviderError, UpstreamConnectionError
from .anthropic_answer import dump, finish, refusal, unexpected, usage
from .failures import failure

__all__ = ["DONE", "Chunks", "drained", "events", "line"]

_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
DONE: Final = b"data: [DONE]\n\n"


async def events(
    chunks: AsyncIterator[bytes],
    *,
    model: str = "",
    include_usage: bool = False,
    secrets: Iterable[str] = (),
    clock: Callable[[], float] = time.time,
) -> AsyncGenerator[bytes, None]:
    """One event of OpenAI's stream at a time, ``data: [DONE]`` last. Closes ``chunks``.

    Nothing comes before the first event that says something: until then another deployment can take over.
    ``model``: its name where the stream has none. ``include_usage``: whether the last chunk tells the
    tokens. ``secrets``: as in `failure`. The error is `failure`'s for an error event, and
    `UpstreamConnectionError` for a stream that ends too early.
    """
    made: Chunks | None = None
    payloads = _payloads(chunks)
    try:
        async for payload in payloads:
            event = _event(payload)
            if event.get("type") == "error":
                raise failure(200, {}, payload, secrets=secrets)
            if event.get("type") == "message_start":
                made = Chunks(event.get("message"), model, int(clock()), include_usage)
            for chunk in made.of(event) if made is not None else ():
                yield line(chunk)
            if made is not None and made.ended:
                yield DONE
                await drained(payloads)
                return
        raise UpstreamConnectionError("the provider's stream ended before its last event")
    finally:
        await payloads.aclose()


def line(chunk: object) -> bytes:
    """A chunk as an event."""
    return b"data: " + dump(chunk) + b"\n\n"


async def drained(payloads: AsyncIterator[object]) -> None:
    """Read what is left, so that the connection can be used again; the answer is complete without it."""
    try:
        async for _ in payloads:
            pass
    except ProviderError:
        pass


def _event(payload: bytes) -> Mapping[str, Any]:
    try:
        event = json.loads(payload)
    except (ValueError, RecursionError):
        raise unexpected() from None
    if not isinstance(event, Mapping):
        raise unexpected()
    return event


async def _payloads(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The data of each event (https://html.spec.whatwg.org/multipage/server-sent-events.html); of the last
    one too where no blank line follows."""
    data: list[bytes] = []
    lines = _lines(chunks)
    try:
        async for line in lines:
            name, _, value = line.partition(b":")
            if name == b"data":
                data.append(value.removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []
        if data:
            yield b"\n".join(data)
    finally:
        await lines.aclose()


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    pieces: list[bytes] = []  # of a line that has no end yet
    try:
        async for chunk in chunks:
            pieces.append(chunk)
            if b"\n" not in chunk and b"\r" not in chunk:
                continue
            text = b"".join(pieces)
            kept = text[-1:] if text.endswith(b"\r") else b""  # it may be half a line end
            *lines, rest = _LINE_END.split(text[: len(text) - len(kept)])
            pieces = [rest + kept]
            for line in lines:
                yield line
        for line in _LINE_END.split(b"".join(pieces)):
            yield line
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()


class Chunks:
    """Makes the chunks of one answer from Anthropic's events, in their order.

    ``message``: the one of ``message_start``. ``ended``: whether the last chunk was made.
    """

    def __init__(self, message: object, model: str, created: int, include_usage: bool) -> None:
        begun: Mapping[str, Any] = message if isinstance(message, Mapping) else {}
        self._head = {
            "id": begun.get("id"),
            "object": "chat.completion.chunk",
            "created": created,
            "model": begun.get("model") or model,
        }
        self._include_usage = include_usage
        self._usage = dict(_part(begun, "usage"))
        self._spoke = False
        self._finished = False
        self._calls: dict[int, int] = {}  # by the index of their blocks
        self._unargued: set[int] = set()
        self._thoughts: dict[int, int] = {}
        self.ended = False

    def of(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of one event, often none. Unknown events have none: there may be new ones any time."""
        kind, place = event.get("type"), event.get("index")
        make = _EVENTS.get(kind) if isinstance(kind, str) else None
        if make is not None:
            yield from make(self, event, place if isinstance(place, int) else 0)

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        if not self._spoke:
            delta = {"role": "assistant", "content": "", **delta}
            self._spoke = True
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage_later = {"usage": None} if self._include_usage else {}
        return {**self._head, "choices": [choice], **usage_later}

    def _block(self, event: Mapping[str, Any], place: int) -> Iterator[dict[str, Any]]:
        block = _part(event, "content_block")
        kind = block.get("type")
        if kind == "tool_use":
            yield self._chunk({"tool_calls": [self._call(place, block)]})
        elif kind == "redacted_thinking":
            thought = {"type": kind, "data": block.get("data")}
            yield self._chunk({"thinking_blocks": [self._thought(place, thought)]})
        elif kind in ("text", "thinking") and block.get(kind):  # none at Anthropic; other servers have some
            yield from self._delta({"delta": {**block, "type": f"{kind}_delta"}}, place)

    def _call(self, place: int, block: Mapping[str, Any]) -> dict[str, Any]:
        number = self._calls.setdefault(place, len(self._calls))
        given = block.get("input")
        if not given:
            self._unargued.add(place)
        arguments = json.dumps(given, separators=(",", ":"), ensure_ascii=False) if given else ""
        function = {"name": block.get("name"), "arguments": arguments}
        return {"index": number, "id": block.get("id"), "type": "function", "function": function}

    def _thought(self, place: int, block: dict[str, Any]) -> dict[str, Any]:
        # The index lets clients join the pieces of each block, as those of tool calls.
        return {"index": self._thoughts.setdefault(place, len(self._thoughts)), **block}

    def _delta(self, event: Mapping[str, Any], place: int) -> Iterator[dict[str, Any]]:
        delta = _part(event, "delta")
        kind = delta.get("type")
        if kind == "text_delta" and delta.get("text"):
            yield self._chunk({"content": delta["text"]})
        elif kind == "input_json_delta" and delta.get("partial_json") and place in self._calls:
            self._unargued.discard(place)
            yield self._chunk({"tool_calls": [self._arguments(place, delta["partial_json"])]})
        elif kind == "thinking_delta" and delta.get("thinking"):
            thought = {"type": "thinking", "thinking": delta["thinking"]}
            blocks = [self._thought(place, thought)]
            yield self._chunk({"reasoning_content": delta["thinking"], "thinking_blocks": blocks})
        elif kind == "signature_delta" and delta.get("signature"):
            signed = {"type": "thinking", "thinking": "", "signature": delta["signature"]}
            yield self._chunk({"thinking_blocks": [self._thought(place, signed)]})
        elif kind == "citations_delta":
            yield self._chunk({"provider_specific_fields": {"citation": delta.get("citation")}})

    def _arguments(self, place: int, text: str) -> dict[str, Any]:
        return {"index": self._calls[place], "function": {"arguments": text}}

    def _block_end(self, _: Mapping[str, Any], place: int) -> Iterator[dict[str, Any]]:
        """A call without arguments has ``{}``, which clients read as JSON."""
        if place in self._unargued:
            self._unargued.discard(place)
            yield self._chunk({"tool_calls": [self._arguments(place, "{}")]})

    def _message(self, event: Mapping[str, Any], _: int) -> Iterator[dict[str, Any]]:
        # Running totals; what is not told again stays.
        counts = _part(event, "usage")
        self._usage |= {name: value for name, value in counts.items() if value is not None}
        delta = _part(event, "delta")
        if delta.get("stop_reason") is not None and not self._finished:
            self._finished = True
            said = refusal(delta)
            yield self._chunk({"refusal": said} if said else {}, finish(delta["stop_reason"]))

    def _end(self, _: Mapping[str, Any], place: int) -> Iterator[dict[str, Any]]:
        self.ended = True
        if not self._finished:
            yield self._chunk({}, "stop")
        if self._include_usage:
            yield {**self._head, "choices": [], "usage": usage(self._usage)}


def _part(event: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = event.get(name)
    return part if isinstance(part, Mapping) else {}


_Make = Callable[[Chunks, Mapping[str, Any], int], Iterator[dict[str, Any]]]
_EVENTS: Final[Mapping[str, _Make]] = {
    "content_block_start": Chunks._block,
    "content_block_delta": Chunks._delta,
    "content_block_stop": Chunks._block_end,
    "message_delta": Chunks._message,
    "message_stop": Chunks._end,
}
