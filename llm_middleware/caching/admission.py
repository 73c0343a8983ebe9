"""Which answers may be stored.

An answer is looked at once, when it is complete, and gets a set of reason codes from a closed list.
A policy says of each code whether such an answer is stored all the same. Nothing here raises, whatever
the bytes: an answer that cannot be understood is one that is not stored.

Shapes: https://platform.openai.com/docs/api-reference for chat, text, embedding, transcription and
responses; https://docs.anthropic.com/en/api/messages and .../messages-streaming for messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from .sse import DONE, Event, load_json, parse_events, thinned

__all__ = ["REASONS", "body_reasons", "stream_reasons", "verdict"]

_JSON: TypeAlias = dict[str, object]

REASONS: Mapping[str, bool] = {
    "upstream-error": False,  # a status other than 200; the caller knows
    "error-event": False,  # the answer itself reports an error
    "unterminated": False,  # a stream that was cut, or a response that is still being made
    "unexpected-body": False,  # not what the endpoint returns
    "truncated": False,  # a token limit ended the answer
    "content-filter": False,
    "refusal": False,
    "invalid-tool-call": False,  # arguments that are not JSON
    "empty": False,  # nothing said, nothing called
    "tool-calls": True,
    "sampled": True,  # temperature above 0 was asked for; the caller knows
}
"""Reason code -> stored by default? In the order in which codes are reported, causes first."""

_LIMITS = ("length", "max_tokens", "max_output_tokens", "model_length", "model_context_window_exceeded")
_FINISH: Mapping[str, str] = {
    **dict.fromkeys(_LIMITS, "truncated"),
    "content_filter": "content-filter",
    "refusal": "refusal",
    "error": "error-event",
}


def verdict(reasons: set[str], policy: Mapping[str, bool]) -> str | None:
    """The first reason that forbids storing, or None. ``policy`` overrides `REASONS` code by code."""
    for code, stored in REASONS.items():
        if code in reasons and not policy.get(code, stored):
            return code
    return None


def body_reasons(kind: str, body: bytes, content_type: bytes) -> set[str]:
    """The codes of a plain answer with status 200. Its ``content_type`` matters for transcriptions."""
    if kind == "json":
        return set() if body else {"empty"}
    if kind == "transcription" and not _is_json_type(body, content_type):
        return _text_file(body)
    try:
        value = load_json(body)
        return _BODIES[kind](value) if isinstance(value, dict) else {"unexpected-body"}
    except (ValueError, RecursionError):
        return {"unexpected-body"}


def stream_reasons(kind: str, stream: bytes) -> set[str]:
    """The codes of a recorded event stream, judged event by event."""
    events = parse_events(thinned(stream))
    if kind == "json":
        found = {"error-event"} if any(event.event == "error" for event in events) else set()
        return found if stream else {"empty"}
    judge = _STREAMS.get(kind)
    if judge is None:
        return {"unexpected-body"}
    done = any(event.data == DONE for event in events)
    read = [_payload(event) for event in events if event.data != DONE]
    payloads = [payload for payload in read if payload is not None]
    reasons = {"error-event"} if any(map(_is_error, payloads)) else set()
    if len(payloads) != len(read):
        reasons.add("unexpected-body")
    try:
        return reasons | judge(payloads, done)
    except RecursionError:
        return {"unexpected-body"}


def _payload(event: Event) -> _JSON | None:
    """What an event says, under its type; None where that is no JSON object."""
    if event.event == "error":
        return {"type": "error"}  # whatever it says
    try:
        value = load_json(event.data)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    return value if event.event is None else {"type": event.event, **value}


def _is_error(payload: _JSON) -> bool:
    return payload.get("type") == "error" or payload.get("error") is not None


def _get(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, dict) else None


def _items(value: object, key: str) -> list[object]:
    items = _get(value, key)
    return items if isinstance(items, list) else []


def _key(value: object, default: object) -> object:
    """The index that says which choice, call or block a piece belongs to."""
    index = _get(value, "index")
    return index if isinstance(index, int | str) else default


@dataclass(slots=True)
class _Answer:
    """What counts in one choice, message or response, whether it came whole or in pieces."""

    said: bool = False
    refused: bool = False
    called: bool = False
    finish: object = None
    arguments: dict[object, list[object]] = field(default_factory=dict)

    def call(self, key: object, *arguments: object) -> None:
        """One more piece of the call ``key``, whose arguments must be JSON in the end."""
        self.called = True
        self.arguments.setdefault(key, []).extend(arguments)

    def reasons(self) -> set[str]:
        found = _finish_reasons(self.finish)
        if self.called:
            found.add("tool-calls")
        if not all(map(_is_json, self.arguments.values())):
            found.add("invalid-tool-call")
        if self.refused:
            found.add("refusal")
        if not (self.said or self.called or self.refused):
            found.add("empty")
        return found


def _finish_reasons(finish: object) -> set[str]:
    # Some providers append detail after a colon, some shout.
    word = finish.lower().partition(":")[0] if isinstance(finish, str) else ""
    return {_FINISH[word]} if word in _FINISH else set()


def _is_json(pieces: list[object]) -> bool:
    texts = [piece for piece in pieces if isinstance(piece, str)]
    try:
        load_json("".join(texts))
    except ValueError:
        return False
    return len(texts) == len(pieces)


def _gathered(answers: Iterable[_Answer]) -> set[str]:
    each = [answer.reasons() for answer in answers]
    return set().union(*each) if each else {"empty"}


def _choices_body(value: _JSON) -> set[str]:
    if not isinstance(value.get("choices"), list):
        return {"unexpected-body"}
    answers = []
    for choice in _items(value, "choices"):
        answers.append(answer := _Answer())
        _hear_choice(answer, choice, _get(choice, "message"), streamed=False)
    return _gathered(answers) | ({"error-event"} if value.get("error") is not None else set())


def _choices_stream(payloads: list[_JSON], done: bool) -> set[str]:
    answers: dict[object, _Answer] = {}
    for payload in payloads:
        for choice in _items(payload, "choices"):
            answer = answers.setdefault(_key(choice, None), _Answer())
            _hear_choice(answer, choice, _get(choice, "delta"), streamed=True)
    finished = done and all(answer.finish for answer in answers.values())
    return _gathered(answers.values()) | (set() if finished else {"unterminated"})


def _hear_choice(answer: _Answer, choice: object, message: object, *, streamed: bool) -> None:
    answer.finish = _get(choice, "finish_reason") or answer.finish
    spoken = [_get(choice, "text"), *(_get(message, key) for key in ("content", "audio", "images"))]
    answer.said |= any(spoken)
    answer.refused |= bool(_get(message, "refusal"))
    for position, call in enumerate(_items(message, "tool_calls")):
        # Some providers number the calls of a plain message all alike: only a stream needs the index.
        _hear_call(answer, _key(call, position) if streamed else position, call)
    if (function := _get(message, "function_call")) is not None:
        _hear_call(answer, "function_call", {"function": function})


def _hear_call(answer: _Answer, key: object, call: object) -> None:
    if _get(call, "custom") is not None:
        answer.called = True  # its input is free text
        return
    arguments = _get(_get(call, "function"), "arguments")
    answer.call(key, *([] if arguments is None else [arguments]))


def _embedding_body(value: _JSON) -> set[str]:
    if not isinstance(value.get("data"), list):
        return {"unexpected-body"}
    return set() if value["data"] else {"empty"}


def _is_json_type(body: bytes, content_type: bytes) -> bool:
    if not content_type:
        return body.lstrip()[:1] == b"{"
    return b"json" in content_type.lower()


def _text_file(body: bytes) -> set[str]:
    """``response_format`` text, srt or vtt."""
    return set() if body.strip() else {"empty" if body else "unexpected-body"}


def _transcription_body(value: _JSON) -> set[str]:
    text = value.get("text")
    if not isinstance(text, str):
        return {"unexpected-body"}
    return set() if text else {"empty"}


def _transcription_stream(payloads: list[_JSON], done: bool) -> set[str]:
    ended = done or any(payload.get("type") == "transcript.text.done" for payload in payloads)
    return set() if ended else {"unterminated"}


def _responses_body(value: _JSON) -> set[str]:
    if value.get("status") == "failed" or value.get("error") is not None:
        return {"error-event"}
    if not isinstance(value.get("output"), list):
        return {"unexpected-body"}
    return _response_reasons(value, value.get("status"), _items(value, "output"))


def _responses_stream(payloads: list[_JSON], _done: bool) -> set[str]:
    items: list[object] = []
    for payload in payloads:
        kind = payload.get("type")
        if kind == "response.output_item.done":
            items.append(payload.get("item"))
        elif kind in ("response.completed", "response.incomplete"):
            response = payload.get("response")
            # Some servers leave out of the final response the items that have already gone by.
            return _response_reasons(response, str(kind)[9:], _items(response, "output") or items)
        elif kind == "response.failed":
            return {"error-event"}
    return {"unterminated"}


def _response_reasons(response: object, status: object, output: list[object]) -> set[str]:
    answer = _Answer()
    for index, item in enumerate(output):
        _hear_part(answer, index, item)
    reasons = answer.reasons()
    if status in ("queued", "in_progress", "cancelled"):
        reasons.add("unterminated")
    if status == "incomplete":
        reasons |= _finish_reasons(_get(_get(response, "incomplete_details"), "reason")) or {"truncated"}
    return reasons


def _hear_part(answer: _Answer, key: object, part: object) -> None:
    """An item or content part of a response, or a content block of a message."""
    kind = _get(part, "type")
    if kind == "function_call":
        answer.call(key, _get(part, "arguments"))
    elif kind in ("custom_tool_call", "tool_use"):
        answer.called = True
    elif kind == "message":
        for inner in _items(part, "content"):
            _hear_part(answer, key, inner)
    elif kind in ("output_text", "text"):
        answer.said |= bool(_get(part, "text"))
    elif kind == "refusal":
        answer.refused |= bool(_get(part, "refusal"))
    elif kind not in ("reasoning", "thinking", "redacted_thinking"):
        answer.said |= isinstance(part, dict)


def _messages_body(value: _JSON) -> set[str]:
    if not isinstance(value.get("content"), list):
        return {"unexpected-body"}
    answer = _Answer(finish=value.get("stop_reason"))
    for index, block in enumerate(_items(value, "content")):
        _hear_part(answer, index, block)
        if _get(block, "type") == "tool_use" and not isinstance(_get(block, "input"), dict):
            answer.call(index, None)
    return answer.reasons()


def _messages_stream(payloads: list[_JSON], _done: bool) -> set[str]:
    answer = _Answer()
    tools: set[object] = set()
    for payload in payloads:
        kind, index, delta = payload.get("type"), _key(payload, None), payload.get("delta")
        if kind == "content_block_start":
            block = payload.get("content_block")
            _hear_part(answer, index, block)
            tools |= {index} if _get(block, "type") == "tool_use" else set()
        elif kind == "content_block_delta":
            answer.said |= bool(_get(delta, "text"))
            if index in tools and (piece := _get(delta, "partial_json")):
                answer.call(index, piece)
        elif kind == "message_delta":
            answer.finish = _get(delta, "stop_reason") or answer.finish
    ended = answer.finish and any(payload.get("type") == "message_stop" for payload in payloads)
    return answer.reasons() | (set() if ended else {"unterminated"})


_BODIES: Mapping[str, Callable[[_JSON], set[str]]] = {
    "chat": _choices_body,
    "text": _choices_body,
    "embedding": _embedding_body,
    "transcription": _transcription_body,
    "responses": _responses_body,
    "messages": _messages_body,
}
_STREAMS: Mapping[str, Callable[[list[_JSON], bool], set[str]]] = {
    "chat": _choices_stream,
    "text": _choices_stream,
    "transcription": _transcription_stream,
    "responses": _responses_stream,
    "messages": _messages_stream,
}
