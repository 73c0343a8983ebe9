"""`answer`: Anthropic's message as OpenAI's chat completion."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from ..errors import ProviderError, UpstreamServerError
from .failures import failure

__all__ = ["answer", "completion", "dump", "finish", "refusal", "unexpected", "usage"]

_FINISH: Final[Mapping[str, str]] = {
    "end_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "pause_turn": "stop",
    "refusal": "content_filter",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
}


def answer(
    body: bytes,
    *,
    model: str = "",
    secrets: Iterable[str] = (),
    clock: Callable[[], float] = time.time,
) -> bytes:
    """The JSON of a chat completion. What the model thought is in ``reasoning_content``, and in
    ``thinking_blocks`` as it has to be sent back; citations in ``provider_specific_fields``.

    ``model``: its name where the answer has none. ``clock``: seconds since the epoch, for ``created``, which
    Anthropic does not say. ``secrets``: as in `failure`. The error is `failure`'s where the body is an error,
    else an `UpstreamServerError` with status 502 where it is no message.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise unexpected() from None
    if isinstance(message, Mapping) and message.get("type") == "error":
        raise failure(200, {}, body, secrets=secrets)
    return dump(completion(message, model, int(clock())))


def completion(message: object, model: str, created: int) -> dict[str, Any]:
    """The chat completion of a message. `UpstreamServerError` where it is none."""
    blocks = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or not isinstance(blocks, list):
        raise unexpected()
    if not all(isinstance(block, Mapping) for block in blocks):
        raise unexpected()
    choice = {"index": 0, "message": _spoken(message, blocks), "logprobs": None}
    choice["finish_reason"] = finish(message.get("stop_reason"))
    return {
        "id": message.get("id"),
        "object": "chat.completion",
        "created": created,
        "model": message.get("model") or model,
        "choices": [choice],
        "usage": usage(message.get("usage")),
    }


def unexpected() -> ProviderError:
    """The error for bytes that are not what was asked for."""
    message = "the provider's answer is no message of Anthropic's API"
    return UpstreamServerError(message, status=502, code="unexpected_upstream_answer")


def dump(value: object) -> bytes:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: it has an escape, and no UTF-8
        return json.dumps(value, separators=(",", ":")).encode()


def _spoken(message: Mapping[str, Any], blocks: list[Mapping[str, Any]]) -> dict[str, Any]:
    texts = [str(block.get("text") or "") for block in _of(blocks, "text")]
    calls = [_call(block) for block in _of(blocks, "tool_use")]
    spoken: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(texts) if texts or not calls else None,
        "refusal": refusal(message),
    }
    if calls:
        spoken["tool_calls"] = calls
    thought = _of(blocks, "thinking", "redacted_thinking")
    if thought:
        spoken["reasoning_content"] = "".join(str(block.get("thinking") or "") for block in thought)
        spoken["thinking_blocks"] = thought
    citations = [block["citations"] for block in _of(blocks, "text") if block.get("citations")]
    if citations:
        spoken["provider_specific_fields"] = {"citations": citations}
    return spoken


def _of(blocks: list[Mapping[str, Any]], *kinds: str) -> list[Mapping[str, Any]]:
    return [block for block in blocks if block.get("type") in kinds]


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(block.get("input") or {}, separators=(",", ":"), ensure_ascii=False)
    function = {"name": block.get("name"), "arguments": arguments}
    return {"id": block.get("id"), "type": "function", "function": function}


def refusal(message: Mapping[str, Any]) -> str | None:
    """Why the model did not go on, where it refused and says so."""
    details = message.get("stop_details")
    said = details.get("explanation") if isinstance(details, Mapping) else None
    return said if message.get("stop_reason") == "refusal" and isinstance(said, str) else None


def finish(reason: object) -> str:
    """OpenAI's ``finish_reason``. A turn that is paused for a tool of the server's has come to a ``stop``."""
    return _FINISH.get(reason, "stop") if isinstance(reason, str) else "stop"


def usage(given: object) -> dict[str, Any]:
    """Tokens as OpenAI counts them: the prompt's include those read from a cache and written to it."""
    counts = given if isinstance(given, Mapping) else {}
    fresh, made = _count(counts, "input_tokens"), _count(counts, "output_tokens")
    read, written = _count(counts, "cache_read_input_tokens"), _count(counts, "cache_creation_input_tokens")
    prompt = fresh + read + written
    found: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": read, "cache_creation_tokens": written},
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": written,
    }
    details = counts.get("output_tokens_details")
    if isinstance(details, Mapping):
        thought = _count(details, "thinking_tokens")
        found["completion_tokens_details"] = {"reasoning_tokens": thought}
    return found


def _count(counts: Mapping[str, Any], name: str) -> int:
    value = counts.get(name)
    return value if isinstance(value, int) else 0
