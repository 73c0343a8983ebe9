"""Bedrock's Converse API behind OpenAI's chat completions, for every model that Bedrock serves by it.

The same four functions as in `anthropic`, by whose shapes the translation goes. `build` makes a request that
`_ports.bedrock` signs, where no API key of Bedrock's is in its headers. Streams come as AWS event streams.

* ``maxTokens`` is sent where the caller sets one. ``temperature`` above 1 becomes 1, the most there is.
* What is no name of OpenAI's and none of Converse's goes to ``additionalModelRequestFields``.
* Images and files come as ``data:`` URLs: Bedrock fetches nothing.

Source: https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html and
API_runtime_ConverseStream.html.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from ..errors import ProviderError, UpstreamConnectionError
from . import failures
from .anthropic_answer import completion, dump, unexpected
from .anthropic_stream import DONE, Chunks, drained, line
from .bedrock_frames import Frame, frames
from .bedrock_request import build

__all__ = ["answer", "build", "events", "failure"]

_REASONS: Final[Mapping[str, str]] = {"content_filtered": "refusal", "guardrail_intervened": "refusal"}
_STATUS: Final[Mapping[str, int]] = {
    "accessDeniedException": 403,
    "internalServerException": 500,
    "modelErrorException": 424,
    "modelNotReadyException": 429,
    "modelStreamErrorException": 424,
    "modelTimeoutException": 408,
    "resourceNotFoundException": 404,
    "serviceUnavailableException": 503,
    "throttlingException": 429,
    "validationException": 400,
}


def answer(
    body: bytes,
    *,
    model: str = "",
    secrets: Iterable[str] = (),
    clock: Callable[[], float] = time.time,
) -> bytes:
    """The JSON of a chat completion, with a new id: Converse has none, and does not name its ``model``.

    Else as `anthropic.answer`.
    """
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        raise unexpected() from None
    message = _mapping(_mapping(_mapping(said).get("output")).get("message"))
    blocks = message.get("content")
    if not isinstance(blocks, list):
        raise unexpected()
    translated = {
        "id": _new_id(),
        "content": [made for block in blocks for made in _block(_mapping(block))],
        "stop_reason": _reason(said.get("stopReason")),
        "usage": _usage(said.get("usage")),
    }
    return dump(completion(translated, model, int(clock())))


async def events(
    chunks: AsyncIterator[bytes],
    *,
    model: str = "",
    include_usage: bool = False,
    secrets: Iterable[str] = (),
    clock: Callable[[], float] = time.time,
) -> AsyncGenerator[bytes, None]:
    """As `anthropic.events`, from an AWS event stream."""
    made = Chunks({"id": _new_id()}, model, int(clock()), include_usage)
    stopped = False
    told = frames(chunks)
    try:
        async for frame in told:
            if frame.kind != "event":
                raise _exception(frame, secrets)
            stopped = stopped or frame.name == "messageStop"
            for event in _events(frame):
                for chunk in made.of(event):
                    yield line(chunk)
            if frame.name == "metadata" and stopped:
                break
        if not stopped:
            raise UpstreamConnectionError("the provider's stream ended before its last event")
        for chunk in made.of({"type": "message_stop"}):
            yield line(chunk)
        yield DONE
        await drained(told)
    finally:
        await told.aclose()


def failure(
    status: int, headers: Mapping[str, str], body: bytes, *, secrets: Iterable[str] = ()
) -> ProviderError:
    """As `failures.failure`; AWS says the kind of an error in a header."""
    kind = headers.get("x-amzn-errortype", "").partition(":")[0]
    if kind:
        try:
            said = json.loads(body)
        except (ValueError, RecursionError):
            said = None
        if isinstance(said, Mapping) and "__type" not in said:
            body = dump({**said, "__type": kind})
    return failures.failure(status, headers, body, secrets=secrets)


def _exception(frame: Frame, secrets: Iterable[str]) -> ProviderError:
    named = {"x-amzn-errortype": frame.name}
    return failure(_STATUS.get(frame.name, 500), named, frame.payload, secrets=secrets)


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# --- Converse's words as Anthropic's


def _reason(reason: object) -> object:
    return _REASONS.get(reason, reason) if isinstance(reason, str) else reason


def _usage(given: object) -> dict[str, Any]:
    counts = _mapping(given)
    return {
        "input_tokens": counts.get("inputTokens"),
        "output_tokens": counts.get("outputTokens"),
        "cache_read_input_tokens": counts.get("cacheReadInputTokens"),
        "cache_creation_input_tokens": counts.get("cacheWriteInputTokens"),
    }


def _block(block: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The block in Anthropic's words; none for one of a kind that has no place in a chat completion."""
    if isinstance(block.get("text"), str):
        yield {"type": "text", "text": block["text"]}
    elif "toolUse" in block:
        call = _mapping(block["toolUse"])
        named = {"id": call.get("toolUseId"), "name": call.get("name")}
        yield {"type": "tool_use", **named, "input": call.get("input")}
    elif "citationsContent" in block:
        for part in _mapping(block["citationsContent"]).get("content") or []:
            yield from _block(_mapping(part))
    elif "reasoningContent" in block:
        thought = _mapping(block["reasoningContent"])
        if "redactedContent" in thought:
            yield {"type": "redacted_thinking", "data": thought["redactedContent"]}
        else:
            told = _mapping(thought.get("reasoningText"))
            signed = {"signature": told["signature"]} if told.get("signature") else {}
            yield {"type": "thinking", "thinking": told.get("text") or "", **signed}


def _events(frame: Frame) -> Iterator[dict[str, Any]]:
    try:
        said = _mapping(json.loads(frame.payload))
    except (ValueError, RecursionError):
        raise unexpected() from None
    place = {"index": said.get("contentBlockIndex")}
    if frame.name == "contentBlockStart":
        for block in _block(_mapping(said.get("start"))):
            yield {"type": "content_block_start", **place, "content_block": block}
    elif frame.name == "contentBlockDelta":
        yield from ({**event, **place} for event in _deltas(_mapping(said.get("delta"))))
    elif frame.name == "contentBlockStop":
        yield {"type": "content_block_stop", **place}
    elif frame.name == "messageStop":
        yield {
            "type": "message_delta",
            "delta": {"stop_reason": _reason(said.get("stopReason")) or "end_turn"},
        }
    elif frame.name == "metadata":
        yield {"type": "message_delta", "usage": _usage(said.get("usage"))}


def _deltas(delta: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    thought = _mapping(delta.get("reasoningContent"))
    if "redactedContent" in thought:
        block = {"type": "redacted_thinking", "data": thought["redactedContent"]}
        yield {"type": "content_block_start", "content_block": block}
    for kind, name, value in (
        ("text_delta", "text", delta.get("text")),
        ("input_json_delta", "partial_json", _mapping(delta.get("toolUse")).get("input")),
        ("thinking_delta", "thinking", thought.get("text")),
        ("signature_delta", "signature", thought.get("signature")),
    ):
        if value:
            yield {"type": "content_block_delta", "delta": {"type": kind, name: value}}
