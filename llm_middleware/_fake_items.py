"""The answers of the two APIs whose streams are typed events: OpenAI's Responses and Anthropic's Messages.

The second half of `llm_middleware._fake_payloads`; see there.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence

from ._fake_payloads import (
    Answer,
    Json,
    Stamp,
    ToolCall,
    answer_text,
    counts,
    last_message,
    named_event,
    plain,
    split,
    stream,
    tool_calls,
)

__all__ = ["messages", "responses"]

# Responses ----------------------------------------------------------------------------------------


def responses(request: Json, stamp: Stamp, pieces: int) -> Answer:
    prompt = last_message(request, "input")
    calls = tool_calls(request, prompt, stamp)
    text = answer_text(prompt, pieces)
    items = [_call_item(call, call.arguments) for call in calls] or [_message_item(stamp, text)]
    given, made = counts(prompt, calls[0].arguments if calls else text)
    usage = {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": given + made,
    }
    begun = _response(request, stamp, "in_progress", [], None)
    done = _response(request, stamp, "completed", items, usage)
    if not request.get("stream"):
        return plain(done)
    steps = itertools.chain(
        [
            {"type": "response.created", "response": begun},
            {"type": "response.in_progress", "response": begun},
        ],
        *(_item_steps(item, i, pieces) for i, item in enumerate(items)),
        [{"type": "response.completed", "response": done}],
    )
    return stream(named_event({**step, "sequence_number": i}) for i, step in enumerate(steps))


def _response(request: Json, stamp: Stamp, status: str, items: list[Json], usage: Json | None) -> Json:
    asked = {
        name: request.get(name) for name in ("model", "instructions", "previous_response_id", "metadata")
    }
    return {
        **asked,
        "id": f"resp_{stamp.token}",
        "object": "response",
        "created_at": stamp.created,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "output": items,
        "parallel_tool_calls": True,
        "tool_choice": request.get("tool_choice", "auto"),
        "tools": request.get("tools", []),
        "temperature": request.get("temperature", 1.0),
        "top_p": request.get("top_p", 1.0),
        "store": request.get("store", True),
        "usage": usage,
    }


def _message_item(stamp: Stamp, text: str) -> Json:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    identity = {"id": f"msg_{stamp.token}", "type": "message", "role": "assistant"}
    return {**identity, "status": "completed", "content": [part]}


def _call_item(call: ToolCall, arguments: str) -> Json:
    identity = {"id": f"fc_{call.token}", "type": "function_call", "call_id": f"call_{call.token}"}
    return {**identity, "name": call.name, "arguments": arguments, "status": "completed"}


def _item_steps(item: Json, index: int, pieces: int) -> Iterator[Json]:
    """The events that build one output item: added, its parts, done."""
    empty: Json = {"content": []} if item["type"] == "message" else {"arguments": ""}
    added = {**item, "status": "in_progress", **empty}
    yield {"type": "response.output_item.added", "output_index": index, "item": added}
    place = {"item_id": item["id"], "output_index": index}
    if isinstance(content := item.get("content"), list):
        yield from _text_steps(content[0], {**place, "content_index": 0}, pieces)
    else:
        arguments, kind = str(item["arguments"]), "response.function_call_arguments"
        for piece in split(arguments, 3):
            yield {"type": f"{kind}.delta", **place, "delta": piece}
        yield {"type": f"{kind}.done", **place, "name": item["name"], "arguments": arguments}
    yield {"type": "response.output_item.done", "output_index": index, "item": item}


def _text_steps(part: Json, place: Json, pieces: int) -> Iterator[Json]:
    text = str(part["text"])
    yield {"type": "response.content_part.added", **place, "part": {**part, "text": ""}}
    for piece in split(text, pieces):
        yield {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
    yield {"type": "response.output_text.done", **place, "text": text, "logprobs": []}
    yield {"type": "response.content_part.done", **place, "part": part}


# Anthropic messages -------------------------------------------------------------------------------


def messages(request: Json, stamp: Stamp, pieces: int) -> Answer:
    prompt = last_message(request, "messages")
    calls = tool_calls(request, prompt, stamp)
    text = answer_text(prompt, pieces)
    given, made = counts(prompt, calls[0].arguments if calls else text)
    blocks: list[dict[str, object]] = [
        {
            "type": "tool_use",
            "id": f"toolu_{call.token}",
            "name": call.name,
            "input": json.loads(call.arguments),
        }
        for call in calls
    ] or [{"type": "text", "text": text}]
    ending = {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}
    message = {
        "id": f"msg_{stamp.token}",
        "type": "message",
        "role": "assistant",
        "model": request.get("model"),
    }
    usage = {"input_tokens": given, "output_tokens": made}
    if request.get("stream"):
        begun = {**message, "content": [], "stop_reason": None, "stop_sequence": None}
        begun["usage"] = {**usage, "output_tokens": 1}
        last = {"type": "message_delta", "delta": ending, "usage": {"output_tokens": made}}
        return stream(map(named_event, _message_steps(begun, blocks, last, pieces)))
    return plain({**message, "content": blocks, **ending, "usage": usage})


def _message_steps(
    message: Json, blocks: Sequence[dict[str, object]], last: Json, pieces: int
) -> Iterator[Json]:
    yield {"type": "message_start", "message": message}
    yield {"type": "ping"}
    for i, block in enumerate(blocks):
        is_text = block["type"] == "text"
        empty: Json = {"text": ""} if is_text else {"input": {}}
        yield {"type": "content_block_start", "index": i, "content_block": {**block, **empty}}
        text, count = (str(block["text"]), pieces) if is_text else (json.dumps(block["input"]), 3)
        kind, field = ("text_delta", "text") if is_text else ("input_json_delta", "partial_json")
        for piece in split(text, count):
            yield {"type": "content_block_delta", "index": i, "delta": {"type": kind, field: piece}}
        yield {"type": "content_block_stop", "index": i}
    yield last
    yield {"type": "message_stop"}
