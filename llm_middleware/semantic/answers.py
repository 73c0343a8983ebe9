"""What an answer says: the text that a judge compares, and whether the answer is nothing but text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ..caching.sse import DONE, parse_events

__all__ = ["answer_text", "only_text"]

# What stands in an answer that does more than say something, in any wording of JSON.
_ACTS: Mapping[str, tuple[bytes, ...]] = {
    "chat": (b'"tool_calls"', b'"function_call"', b'"audio"'),
    "messages": (b'"tool_use"', b'"server_tool_use"', b'"mcp_tool_use"'),
    "responses": (b'_call"', b'"mcp_approval_request"'),
}


def only_text(kind: str, body: bytes) -> bool:
    """Whether an answer, plain or as a stream of events, does nothing but say something: what calls a tool
    with a question's own words answers that question alone."""
    acts = _ACTS.get(kind, ())
    if not any(act in body for act in acts):
        return True
    return _text(kind, body) is not None


def answer_text(kind: str, body: bytes) -> str | None:
    """The text of an answer, plain or as a stream; None where it is not one text."""
    if kind == "json":
        return body.decode("utf-8", "replace")
    return _text(kind, body)


def _text(kind: str, body: bytes) -> str | None:
    streamed = body[:5] == b"data:" or body[:6] == b"event:"
    read = (_STREAMS if streamed else _READERS).get(kind)
    if read is None:
        return None
    try:
        return _said(read(_events(body) if streamed else json.loads(body)))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def _said(text: object) -> str | None:
    return text if isinstance(text, str) and text else None


def _events(body: bytes) -> list[Any]:
    data = [event.data for event in parse_events(body)]
    return [json.loads(text) for text in data if text and text != DONE]


# --- by endpoint kind: None, or any error of a look-up, is an answer that does more than say something


def _chat(answer: Any) -> str | None:
    (choice,) = answer["choices"]
    message = choice["message"]
    if message.get("tool_calls") or message.get("function_call") or message.get("audio"):
        return None
    return message["content"]  # type: ignore[no-any-return]


def _completion(answer: Any) -> str | None:
    (choice,) = answer["choices"]
    return choice["text"]  # type: ignore[no-any-return]


def _messages(answer: Any) -> str | None:
    parts = [part for part in answer["content"] if part["type"] not in ("thinking", "redacted_thinking")]
    if any(part["type"] != "text" for part in parts):
        return None
    return "".join(part["text"] for part in parts)


def _responses(answer: Any) -> str | None:
    items = [item for item in answer["output"] if item["type"] != "reasoning"]
    if any(item["type"] != "message" for item in items):
        return None
    parts = [part for item in items for part in item["content"]]
    if any(part["type"] != "output_text" for part in parts):
        return None
    return "".join(part["text"] for part in parts)


def _chat_stream(chunks: list[Any]) -> str | None:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk.get("choices", ())]
    if any(delta.get("tool_calls") or delta.get("function_call") or delta.get("audio") for delta in deltas):
        return None
    return "".join(delta.get("content") or "" for delta in deltas)


def _completion_stream(chunks: list[Any]) -> str | None:
    return "".join(choice["text"] for chunk in chunks for choice in chunk.get("choices", ()))


def _messages_stream(told: list[Any]) -> str | None:
    blocks = [each["content_block"] for each in told if each["type"] == "content_block_start"]
    if any(block["type"] not in ("text", "thinking", "redacted_thinking") for block in blocks):
        return None
    deltas = [each["delta"] for each in told if each["type"] == "content_block_delta"]
    return "".join(delta["text"] for delta in deltas if delta["type"] == "text_delta")


def _responses_stream(told: list[Any]) -> str | None:
    (answer,) = [each["response"] for each in told if each["type"] == "response.completed"]
    return _responses(answer)


_READERS: Mapping[str, Callable[[Any], str | None]] = {
    "chat": _chat,
    "text": _completion,
    "messages": _messages,
    "responses": _responses,
}
_STREAMS: Mapping[str, Callable[[list[Any]], str | None]] = {
    "chat": _chat_stream,
    "text": _completion_stream,
    "messages": _messages_stream,
    "responses": _responses_stream,
}
