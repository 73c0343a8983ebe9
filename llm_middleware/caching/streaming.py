"""A recorded stream as the plain body the same API would give, and a plain body as a stream.

Both directions are lossless or they do not happen: None means that the answer must be fetched in
the form that was asked for. Chunks have the shape of OpenAI's API reference,
https://platform.openai.com/docs/api-reference/chat-streaming.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from .sse import DONE, dump_json, event_ends, format_event, load_json, parse_events
from .streaming_chat import (
    HEAD,
    JSON,
    LOGPROBS,
    LossyError,
    chat_body,
    index_of,
    list_of,
    object_of,
    text_body,
    text_of,
)
from .streaming_responses import responses_body, responses_stream

__all__ = ["assemble", "explode", "without_usage"]

_BODIES: Mapping[str, Callable[[Sequence[JSON]], JSON]] = {
    "chat": chat_body,
    "text": text_body,
    "responses": responses_body,
}


def assemble(kind: str, stream: bytes) -> bytes | None:
    """The JSON body a request without ``stream`` would have got, from a recorded event stream.

    None for a stream that is cut, reports an error, tells no usage (chat and text), is not UTF-8 JSON
    throughout, or says a field in several versions that no rule puts together; and for other kinds
    than chat, text and responses.
    """
    build = _BODIES.get(kind)
    if build is None:
        return None
    try:
        return dump_json(build(list(_payloads(kind, stream))))
    except (ValueError, RecursionError):
        return None


def _payloads(kind: str, stream: bytes) -> Iterator[JSON]:
    stream.decode()  # strictly: a replaced character would be a lost one
    done = False
    for event in parse_events(stream):
        if done:
            raise LossyError("more after the end")
        if event.data == DONE:
            done = True
            continue
        payload = object_of(load_json(event.data))
        if event.event == "error" or payload.get("type") == "error" or payload.get("error") is not None:
            raise LossyError("error event")
        yield payload
    if not done and kind != "responses":  # whose last payload is its end
        raise LossyError("unterminated")


def explode(kind: str, body: bytes, *, usage: bool) -> bytes | None:
    """The event stream a request with ``stream`` would have got, from a plain JSON body.

    ``usage``: the request asked for ``stream_options.include_usage`` (chat and text; a Responses
    stream always tells its usage). None where the stream cannot say what the body says, or where usage
    was asked for and the body has none.

    ``assemble`` makes the same JSON of the stream (with usage) again, with two spellings made
    OpenAI's: a message without ``content`` gets null, and a plain tool call loses an ``index``.
    """
    try:
        value = object_of(load_json(body))
        if value.get("error") is not None:
            return None
        return responses_stream(value) if kind == "responses" else _chunks(kind, value, usage)
    except (ValueError, RecursionError):
        return None


def _chunks(kind: str, body: JSON, usage: bool) -> bytes | None:
    if kind == "chat":
        return _stream(body, usage, _chat_pieces, "chat.completion", "chat.completion.chunk")
    if kind == "text":
        return _stream(body, usage, _text_pieces, "text_completion", "text_completion")
    return None


def without_usage(stream: bytes) -> bytes:
    """``stream`` without its last usage-only chunk (no choices, usage told), the rest byte for byte.

    For a client that did not ask for usage, from a chat or text stream that was recorded with it.
    """
    if b'"usage"' not in stream:
        return stream
    ends = event_ends(stream)
    for start, end in zip(reversed([0, *ends[:-1]]), reversed(ends), strict=True):
        for choices, usage in _choices_and_usage(stream[start:end]):
            if choices:
                return stream
            if choices == [] and usage is not None:
                return stream[:start] + stream[end:]
    return stream


def _choices_and_usage(piece: bytes) -> Iterator[tuple[object, object]]:
    for event in parse_events(piece):
        try:
            payload = load_json(event.data)
        except ValueError:
            continue  # the end, or not for us to judge
        if isinstance(payload, dict):
            yield payload.get("choices"), payload.get("usage")


def _stream(
    body: JSON, usage: bool, split: Callable[[JSON], Iterator[JSON]], plain_name: str, name: str
) -> bytes:
    choices = [object_of(choice) for choice in list_of(body.get("choices"))]
    order = [index_of(choice) for choice in choices]
    if body.get("object") != plain_name or "obfuscation" in body or not order or order != sorted(set(order)):
        raise LossyError(f"not a {plain_name}")
    head: JSON = {key: body[key] for key in HEAD if key in body} | {"object": name}
    untold: JSON = {"usage": None} if usage else {}
    chunks = [head | {"choices": [piece]} | untold for choice in choices for piece in split(choice)]
    chunks[0] |= {key: value for key, value in body.items() if key not in {*head, "choices", "usage"}}
    if usage:
        chunks.append(head | {"choices": [], "usage": object_of(body.get("usage"))})
    return b"".join([*(format_event(dump_json(chunk)) for chunk in chunks), format_event(DONE)])


def _text_pieces(choice: JSON) -> Iterator[JSON]:
    """The text, then the finish reason and whatever else the choice has."""
    logprobs, rest = _take_logprobs(choice)
    yield {"index": choice["index"], "text": text_of(choice.get("text")), **logprobs, "finish_reason": None}
    yield {**rest, "text": ""}


def _chat_pieces(choice: JSON) -> Iterator[JSON]:
    """The role, what was said, then the finish reason and whatever else the choice has."""
    if "delta" in choice:
        raise LossyError("a delta in a plain body")
    logprobs, rest = _take_logprobs(choice)
    deltas = list(_deltas(object_of(rest.pop("message", None))))
    spoken = (at for at, delta in enumerate(deltas) if at and ("content" in delta or "refusal" in delta))
    with_logprobs = next(spoken, 0)
    for at, delta in enumerate(deltas):
        told = logprobs if at == with_logprobs else dict.fromkeys(logprobs)
        yield {"index": choice["index"], "delta": delta, **told, "finish_reason": None}
    yield {"index": choice["index"], "delta": {}, **rest}


def _take_logprobs(choice: JSON) -> tuple[JSON, JSON]:
    """The choice's logprobs, and the choice as its last piece shall have it."""
    if not text_of(choice.get("finish_reason")):
        raise LossyError("an unfinished choice")
    if "logprobs" not in choice:
        return {}, choice.copy()
    logprobs = choice["logprobs"]
    if logprobs is not None:
        for key in LOGPROBS:
            _listed(object_of(logprobs), key)
    return {"logprobs": logprobs}, {**choice, "logprobs": None}


def _listed(fields: JSON, key: str) -> list[object]:
    return [] if fields.get(key) is None else list_of(fields[key])


_SPOKEN = ("reasoning_content", "reasoning", "content", "refusal")


def _deltas(message: JSON) -> Iterator[JSON]:
    """The role with all that takes no pieces, the texts, the calls."""
    calls = [object_of(call) for call in _listed(message, "tool_calls")]
    function = message.get("function_call")
    said = {key: text_of(value) for key in _SPOKEN if (value := message.get(key)) is not None}
    later = {*said}
    later |= {"tool_calls"} if calls else set()
    later |= {"function_call"} if function is not None else set()
    first = {key: value for key, value in message.items() if key not in later}
    yield first | ({"content": ""} if "content" in said else {})
    for key, text in said.items():
        yield {key: text}
    for at, call in enumerate(calls):
        if call.get("index", at) != at:
            raise LossyError("a tool call out of place")
        for piece in _in_two(call, "function"):
            yield {"tool_calls": [{"index": at, **piece}]}
    if function is not None:
        yield from _in_two({"function_call": function}, "function_call")


def _in_two(call: JSON, key: str) -> Iterator[JSON]:
    """A call with its function's name and no arguments yet, then the arguments."""
    if call.get(key) is None or object_of(call[key]).get("arguments") is None:
        yield call
        return
    function = object_of(call[key])
    arguments = text_of(function["arguments"])
    yield {**call, key: {**function, "arguments": ""}}
    if arguments:
        yield {key: {"arguments": arguments}}
