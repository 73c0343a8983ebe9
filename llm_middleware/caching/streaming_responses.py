"""Responses: the event sequence to the response object, the object to the event sequence.

The last event of a Responses stream holds the whole response, so nothing has to be put together.
Shapes: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from .sse import dump_json, format_event
from .streaming_chat import JSON, LossyError, list_of, object_of, text_of

__all__ = ["responses_body", "responses_stream"]

_TERMINAL: Mapping[str, str] = {"completed": "response.completed", "incomplete": "response.incomplete"}


def responses_body(events: Sequence[JSON]) -> JSON:
    """The response in the stream's last event; `LossyError` where it did not end, failed or is partial."""
    last = events[-1] if events else {}
    if last.get("type") not in _TERMINAL.values():
        raise LossyError("unterminated")
    response = object_of(last.get("response"))
    done = sum(event.get("type") == "response.output_item.done" for event in events)
    # Some servers leave out of the final response the items that have already gone by.
    if done > len(list_of(response.get("output"))):
        raise LossyError("the final response is not whole")
    return response


def responses_stream(response: JSON) -> bytes:
    """The event sequence of a finished response; `LossyError` for items whose events are not known here."""
    terminal = _TERMINAL.get(str(response.get("status")))
    if response.get("object") != "response" or terminal is None:
        raise LossyError("not a finished response")
    begun = {**response, "status": "in_progress", "output": []}
    begun |= {key: None for key in ("usage", "completed_at", "incomplete_details") if key in response}
    events: list[JSON] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
    ]
    for index, item in enumerate(list_of(response.get("output"))):
        events += _item(object_of(item), index)
    events.append({"type": terminal, "response": response})
    return b"".join(
        format_event(
            dump_json({"type": event["type"], "sequence_number": number, **event}), text_of(event["type"])
        )
        for number, event in enumerate(events)
    )


def _item(item: JSON, index: int) -> Iterator[JSON]:
    walk = _WALKS.get(text_of(item.get("type")))
    if walk is None:
        raise LossyError("an item whose events are not known")
    place: JSON = {"item_id": text_of(item.get("id")), "output_index": index}
    steps = list(walk(item, place))
    begun = {key: _BEGUN[key] if value and key in _BEGUN else value for key, value in item.items()}
    yield {"type": "response.output_item.added", "output_index": index, "item": begun}
    yield from steps
    yield {"type": "response.output_item.done", "output_index": index, "item": item}


# What an item's fields hold before anything of it was said.
_BEGUN: Mapping[str, object] = {
    "status": "in_progress",
    "content": [],
    "summary": [],
    "arguments": "",
}


def _message(item: JSON, place: JSON) -> Iterator[JSON]:
    yield from _parts(item.get("content"), place, "content", ("output_text", "refusal"))


def _reasoning(item: JSON, place: JSON) -> Iterator[JSON]:
    yield from _parts(item.get("summary") or [], place, "summary", ("summary_text",))
    yield from _parts(item.get("content") or [], place, "content", ("reasoning_text",))


def _function_call(item: JSON, place: JSON) -> Iterator[JSON]:
    arguments = text_of(item.get("arguments"))
    event = "response.function_call_arguments"
    if arguments:
        yield {"type": f"{event}.delta", **place, "delta": arguments}
    yield {"type": f"{event}.done", **place, "arguments": arguments}


_WALKS: Mapping[str, Callable[[JSON, JSON], Iterator[JSON]]] = {
    "message": _message,
    "reasoning": _reasoning,
    "function_call": _function_call,
}

# A part's type -> the field its text is in, the events that carry the text.
_TEXTS: Mapping[str, tuple[str, str]] = {
    "output_text": ("text", "response.output_text"),
    "refusal": ("refusal", "response.refusal"),
    "reasoning_text": ("text", "response.reasoning_text"),
    "summary_text": ("text", "response.reasoning_summary_text"),
}
_PARTS: Mapping[str, str] = {
    "content": "response.content_part",
    "summary": "response.reasoning_summary_part",
}


def _parts(parts: object, place: JSON, where: str, known: Sequence[str]) -> Iterator[JSON]:
    for index, part in enumerate(map(object_of, list_of(parts))):
        if part.get("type") not in known:
            raise LossyError("a part whose events are not known")
        yield from _part(part, {**place, f"{where}_index": index}, _PARTS[where])


def _part(part: JSON, place: JSON, events: str) -> Iterator[JSON]:
    field, text_events = _TEXTS[text_of(part["type"])]
    text = text_of(part.get(field))
    annotations = list_of(part.get("annotations") or [])
    logprobs: JSON = {"logprobs": part.get("logprobs") or []} if part["type"] == "output_text" else {}
    lists: JSON = {key: [] for key in ("annotations", "logprobs") if part.get(key)}
    yield {"type": f"{events}.added", **place, "part": {**part, **lists, field: ""}}
    if text:
        yield {"type": f"{text_events}.delta", **place, "delta": text, **logprobs}
    for index, annotation in enumerate(annotations):
        step = {"annotation_index": index, "annotation": annotation}
        yield {"type": "response.output_text.annotation.added", **place, **step}
    yield {"type": f"{text_events}.done", **place, field: text, **logprobs}
    yield {"type": f"{events}.done", **place, "part": part}
