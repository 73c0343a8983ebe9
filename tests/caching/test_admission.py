from __future__ import annotations

import json
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_middleware.caching.admission import REASONS, body_reasons, stream_reasons, verdict
from llm_middleware.caching.sse import event_ends, format_event

JSON = dict[str, object]
DONE = b"data: [DONE]\n\n"
KINDS = ("chat", "text", "embedding", "transcription", "responses", "messages", "json")
TYPE = b"application/json"
SAID: JSON = {"role": "assistant", "content": "Hi"}


def judged(kind: str, body: object, content_type: bytes = TYPE) -> set[str]:
    return body_reasons(kind, json.dumps(body).encode(), content_type)


def streamed(kind: str, *payloads: JSON, end: bytes = DONE) -> set[str]:
    return stream_reasons(kind, b"".join(format_event(json.dumps(each)) for each in payloads) + end)


def chat(message: object, finish: str | None = "stop", **more: object) -> JSON:
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], **more}


def delta(delta: object, finish: str | None = None, index: int = 0) -> JSON:
    return {"choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def call(arguments: object, **more: object) -> JSON:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}, **more}


def test_the_closed_list() -> None:
    stored = {code for code, stored in REASONS.items() if stored}
    assert stored == {"tool-calls", "sampled"}
    assert set(REASONS) - stored == {
        "upstream-error",
        "unexpected-body",
        "empty",
        "truncated",
        "content-filter",
        "refusal",
        "invalid-tool-call",
        "unterminated",
        "error-event",
    }


@pytest.mark.parametrize(
    ("reasons", "policy", "expected"),
    [
        (set(), {}, None),
        ({"upstream-error"}, {}, "upstream-error"),  # C95
        ({"empty", "truncated"}, {}, "truncated"),  # C97
        ({"empty", "truncated"}, {"truncated": True}, "empty"),
        ({"empty", "truncated"}, {"truncated": True, "empty": True}, None),
        ({"empty", "unterminated"}, {}, "unterminated"),
        ({"tool-calls", "sampled"}, {}, None),
        ({"tool-calls", "sampled"}, {"tool-calls": False}, "tool-calls"),  # C98
        ({"tool-calls", "sampled"}, {"sampled": False}, "sampled"),  # C99
        ({"tool-calls"}, {**REASONS, "sampled": False}, None),
    ],
)
def test_c95_c98_c99_the_verdict(reasons: set[str], policy: dict[str, bool], expected: str | None) -> None:
    assert verdict(reasons, policy) == expected


# Chat.

CHAT = [
    (SAID, "stop", set()),
    ({"content": None, "audio": {"id": "a"}}, "stop", set()),
    ({"content": [{"type": "text", "text": "Hi"}]}, "stop", set()),
    (SAID, "length", {"truncated"}),
    (SAID, "MAX_TOKENS", {"truncated"}),
    (SAID, "content_filter", {"content-filter"}),
    (SAID, "content_filter: SAFETY", {"content-filter"}),
    (SAID, "error", {"error-event"}),
    ({"content": ""}, "length", {"truncated", "empty"}),
    ({"content": ""}, "content_filter", {"content-filter", "empty"}),
    ({"content": ""}, "stop", {"empty"}),
    ({"content": None, "reasoning_content": "Hm"}, "stop", {"empty"}),
    ({"content": None, "tool_calls": []}, "stop", {"empty"}),
    ({"content": None, "refusal": "No"}, "stop", {"refusal"}),
    ({"tool_calls": [call("{}")]}, "tool_calls", {"tool-calls"}),
    ({"tool_calls": [call('{"a":1}', index=0), call("{}", index=1)]}, "tool_calls", {"tool-calls"}),
    ({"tool_calls": [call("{}", index=0), call('{"a":', index=1)]}, "x", {"tool-calls", "invalid-tool-call"}),
    ({"tool_calls": [call("")]}, "tool_calls", {"tool-calls", "invalid-tool-call"}),
    ({"tool_calls": [call({"a": 1})]}, "tool_calls", {"tool-calls", "invalid-tool-call"}),
    ({"tool_calls": [5]}, "tool_calls", {"tool-calls", "invalid-tool-call"}),
    ({"tool_calls": [{"type": "custom", "custom": {"input": "{"}}]}, "x", {"tool-calls"}),
    ({"function_call": {"name": "f", "arguments": "{}"}}, "function_call", {"tool-calls"}),
    ({"function_call": {"name": "f", "arguments": "{"}}, "x", {"tool-calls", "invalid-tool-call"}),
]


@pytest.mark.parametrize(("message", "finish", "expected"), CHAT)
def test_c97_c98_a_chat_answer(message: JSON, finish: str, expected: set[str]) -> None:
    """The same answer gets the same codes, plain and streamed."""
    assert judged("chat", chat(message, finish)) == expected
    assert streamed("chat", delta(message), delta({}, finish)) == expected
    assert streamed("chat", delta(message), delta({}, finish), {"choices": [], "usage": {}}) == expected


def test_calls_numbered_alike_in_a_plain_message_are_apart() -> None:
    message = {"tool_calls": [call("{}", index=0), call("{}", index=0)]}
    assert judged("chat", chat(message)) == {"tool-calls"}


def test_arguments_are_joined_over_the_stream() -> None:
    def piece(at: int, arguments: str | None) -> JSON:
        return delta({"tool_calls": [{"index": at, "function": {"arguments": arguments}}]})

    pieces = [
        piece(0, ""),
        piece(1, '{"b"'),
        piece(0, '{"a"'),
        piece(0, None),
        piece(1, ":2}"),
        piece(0, ":1}"),
    ]
    assert streamed("chat", *pieces, delta({}, "tool_calls")) == {"tool-calls"}
    assert streamed("chat", *pieces[:-1], delta({}, "tool_calls")) == {"tool-calls", "invalid-tool-call"}
    odd = delta({"tool_calls": [call({"x": 1}, index=0)]})
    assert streamed("chat", *pieces, odd, delta({}, "tool_calls")) == {"tool-calls", "invalid-tool-call"}


def test_c96_no_choices() -> None:
    assert judged("chat", {"choices": []}) == {"empty"}
    assert judged("text", {"choices": []}) == {"empty"}
    assert streamed("chat", {"choices": []}) == {"empty"}


def test_c80_every_choice_counts() -> None:
    both = [
        {"index": 0, "message": SAID},
        {"index": 1, "message": {"content": ""}, "finish_reason": "length"},
    ]
    assert judged("chat", {"choices": both}) == {"empty", "truncated"}
    start = (delta(SAID), delta(SAID, index=1), delta({}, "stop", index=1))
    assert streamed("chat", *start, delta({}, "stop")) == set()
    assert streamed("chat", *start) == {"unterminated"}


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (DONE, set()),
        (b"data: [DONE]", set()),
        (b"", {"unterminated"}),
        (b"data: [DO", {"unterminated", "unexpected-body"}),
        (b"data: garbage\n\n" + DONE, {"unexpected-body"}),
        (b"data: 5\n\n" + DONE, {"unexpected-body"}),
        (b'data: {"error": {"message": "overloaded"}}\n\n', {"error-event", "unterminated"}),
        (b'data: {"error": null}\n\n' + DONE, set()),
        (b"event: error\ndata: oops\n\n" + DONE, {"error-event"}),
        (b"event: ping\ndata: {}\n\n: comment\n\nevent: bye\n\n" + DONE, set()),
    ],
)
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_c83_c95_how_a_stream_ends(kind: str, end: bytes, expected: set[str]) -> None:
    said = {"choices": [{"index": 0, "delta": SAID, "text": "Hi", "finish_reason": "stop"}]}
    assert streamed(kind, said, end=end) == expected


def test_c83_a_stream_cut_anywhere_is_not_stored() -> None:
    whole = b"".join(format_event(json.dumps(each)) for each in (delta(SAID), delta({}, "stop"))) + DONE
    assert stream_reasons("chat", whole) == set()
    for at in range(len(whole) - len("\n\n")):
        assert "unterminated" in stream_reasons("chat", whole[:at])


# Text, embeddings, transcriptions.


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        ("Hi", "stop", set()),
        ("", "stop", {"empty"}),
        ("Hi", "length", {"truncated"}),
        ("", "content_filter", {"content-filter", "empty"}),
    ],
)
def test_c82_c97_a_text_answer(text: str, finish: str, expected: set[str]) -> None:
    body = {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    assert judged("text", body) == expected
    assert (
        streamed("text", {"choices": [{"index": 0, "text": text, "finish_reason": None}]}, body) == expected
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [({"data": [{"embedding": [1]}]}, set()), ({"data": []}, {"empty"}), ({}, {"unexpected-body"})],
)
def test_an_embedding_answer(body: JSON, expected: set[str]) -> None:
    assert judged("embedding", body) == expected
    assert streamed("embedding", body) == {"unexpected-body"}


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        (b'{"text": "Hi"}', TYPE, set()),
        (b'{"text": "Hi"}', b"", set()),
        (b'{"text": ""}', b"Application/JSON; charset=utf-8", {"empty"}),
        (b'{"error": {}}', TYPE, {"unexpected-body"}),
        (b'{"error": {}}', b"", {"unexpected-body"}),
        (b"", TYPE, {"unexpected-body"}),
        (b"", b"text/plain", {"unexpected-body"}),
        (b"\n", b"text/plain", {"empty"}),
        (b"WEBVTT\n", b"text/vtt", set()),
        (b'{"not": "judged"}', b"text/plain", set()),
        (b"1\n00:00", b"", set()),
    ],
)
def test_a_transcription(body: bytes, content_type: bytes, expected: set[str]) -> None:
    assert body_reasons("transcription", body, content_type) == expected


def test_a_transcription_stream() -> None:
    piece, done = {"type": "transcript.text.delta"}, {"type": "transcript.text.done", "text": "Hi"}
    assert streamed("transcription", piece, done, end=b"") == set()
    assert streamed("transcription", piece) == set()
    assert streamed("transcription", piece, end=b"") == {"unterminated"}
    assert streamed("transcription", {"type": "error"}) == {"error-event"}


# Responses.


def response(*output: object, **more: object) -> JSON:
    return {"status": "completed", "error": None, "output": list(output), **more}


def item(*content: JSON) -> JSON:
    return {"type": "message", "content": list(content)}


TEXT = {"type": "output_text", "text": "Hi"}
FUNCTION: JSON = {"type": "function_call", "name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (response(item(TEXT)), set()),
        (response(item(TEXT), status=None), set()),
        (response({"type": "reasoning"}, item(TEXT)), set()),
        (response({"type": "image_generation_call", "result": "x"}), set()),
        (response(), {"empty"}),
        (response({"type": "reasoning"}), {"empty"}),
        (response(item({"type": "output_text", "text": ""})), {"empty"}),
        (response(item({"type": "refusal", "refusal": "No"})), {"refusal"}),
        (response(FUNCTION), {"tool-calls"}),
        (response(FUNCTION, {**FUNCTION, "arguments": "{"}), {"tool-calls", "invalid-tool-call"}),
        (response({**FUNCTION, "arguments": None}), {"tool-calls", "invalid-tool-call"}),
        (response({"type": "custom_tool_call", "input": "{"}), {"tool-calls"}),
        (response(item(TEXT), status="incomplete"), {"truncated"}),
        (
            response(item(TEXT), status="incomplete", incomplete_details={"reason": "max_output_tokens"}),
            {"truncated"},
        ),
        (
            response(status="incomplete", incomplete_details={"reason": "content_filter"}),
            {"content-filter", "empty"},
        ),
        (response(status="failed", error={"code": "server_error"}), {"error-event"}),
    ],
)
def test_c96_c97_c98_a_response(body: JSON, expected: set[str]) -> None:
    """The same answer gets the same codes, plain and streamed."""
    assert judged("responses", body) == expected
    last = f"response.{body['status'] or 'completed'}"
    start = {"type": "response.created", "response": {"status": "in_progress", "output": []}}
    assert streamed("responses", start, {"type": last, "response": body}, end=b"") == expected
    named = format_event(json.dumps({"response": body}), last)
    assert streamed("responses", start, end=named) == expected


@pytest.mark.parametrize("status", ["queued", "in_progress", "cancelled"])
def test_a_response_that_is_not_finished(status: str) -> None:
    assert judged("responses", response(item(TEXT), status=status)) == {"unterminated"}


def test_c83_a_responses_stream_without_its_end() -> None:
    start = {"type": "response.created", "response": response(item(TEXT))}
    assert streamed("responses", start) == {"unterminated"}
    assert streamed("responses", start, {"type": "error", "message": "x"}) == {"unterminated", "error-event"}


def test_items_that_went_by_count_where_the_final_response_leaves_them_out() -> None:
    done = {"type": "response.output_item.done", "item": {**FUNCTION, "arguments": "{"}}
    last = {"type": "response.completed", "response": response()}
    assert streamed("responses", done, last) == {"tool-calls", "invalid-tool-call"}


# Anthropic messages.


def message(*content: object, stop: str | None = "end_turn") -> JSON:
    return {"type": "message", "content": list(content), "stop_reason": stop}


def events(*blocks: tuple[JSON, list[JSON]], stop: str | None = "end_turn") -> list[JSON]:
    found: list[JSON] = [{"type": "message_start", "message": message(stop=None)}, {"type": "ping"}]
    for index, (block, deltas) in enumerate(blocks):
        found.append({"type": "content_block_start", "index": index, "content_block": block})
        found += [{"type": "content_block_delta", "index": index, "delta": each} for each in deltas]
        found.append({"type": "content_block_stop", "index": index})
    found.append({"type": "message_delta", "delta": {"stop_reason": stop}, "usage": {"output_tokens": 1}})
    return [*found, {"type": "message_stop"}]


def tool(*pieces: str, kind: str = "tool_use") -> tuple[JSON, list[JSON]]:
    deltas: list[JSON] = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
    return {"type": kind, "name": "f", "input": {}}, deltas


WORDS: tuple[JSON, list[JSON]] = ({"type": "text", "text": ""}, [{"type": "text_delta", "text": "Hi"}])
THOUGHT: tuple[JSON, list[JSON]] = ({"type": "thinking"}, [{"type": "thinking_delta", "thinking": "Hm"}])


@pytest.mark.parametrize(
    ("content", "stop", "expected"),
    [
        ([{"type": "text", "text": "Hi"}], "end_turn", set()),
        ([{"type": "text", "text": "Hi"}], "max_tokens", {"truncated"}),
        ([{"type": "text", "text": "Hi"}], "model_context_window_exceeded", {"truncated"}),
        ([], "refusal", {"refusal", "empty"}),
        ([], "end_turn", {"empty"}),
        ([{"type": "thinking", "thinking": "Hm"}, {"type": "text", "text": ""}], "end_turn", {"empty"}),
        ([{"type": "tool_use", "input": {}}], "tool_use", {"tool-calls"}),
        ([{"type": "tool_use", "input": "{"}], "tool_use", {"tool-calls", "invalid-tool-call"}),
        ([{"type": "web_search_tool_result"}], "end_turn", set()),
    ],
)
def test_c96_c97_c98_a_message(content: list[JSON], stop: str, expected: set[str]) -> None:
    assert judged("messages", message(*content, stop=stop)) == expected


@pytest.mark.parametrize(
    ("blocks", "stop", "expected"),
    [
        ([WORDS], "end_turn", set()),
        ([THOUGHT, WORDS], "max_tokens", {"truncated"}),
        ([], "refusal", {"refusal", "empty"}),
        ([THOUGHT], "end_turn", {"empty"}),
        ([tool("", '{"a"', ":1}"), tool()], "tool_use", {"tool-calls"}),
        ([tool('{"a"'), tool("{}")], "tool_use", {"tool-calls", "invalid-tool-call"}),
        ([tool("{", kind="server_tool_use"), WORDS], "end_turn", set()),
        ([WORDS], None, {"unterminated"}),
    ],
)
def test_c96_c97_c98_a_message_stream(
    blocks: list[tuple[JSON, list[JSON]]], stop: str | None, expected: set[str]
) -> None:
    whole = events(*blocks, stop=stop)
    assert streamed("messages", *whole, end=b"") == expected
    named = b"".join(format_event(json.dumps(each), str(each["type"])) for each in whole)
    assert stream_reasons("messages", named) == expected


def test_c83_a_message_stream_that_is_cut() -> None:
    whole = b"".join(format_event(json.dumps(each)) for each in events(WORDS))
    for end in event_ends(whole)[:-1]:
        assert "unterminated" in stream_reasons("messages", whole[:end])
    error = {"type": "error", "error": {"type": "overloaded_error"}}
    assert streamed("messages", *events(WORDS)[:-2], error, end=b"") == {"unterminated", "error-event"}


# Any kind.


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"<html>", b"\xff", b"[" * 100_000, b'{"a":' * 50_000]
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "json"])
def test_c95_what_is_not_the_endpoints_answer(kind: str, body: bytes) -> None:
    assert body_reasons(kind, body, TYPE) == {"unexpected-body"}


@pytest.mark.parametrize("kind", ["chat", "text", "embedding", "transcription", "messages"])
def test_c95_an_error_with_status_200(kind: str) -> None:
    assert judged(kind, {"type": "error", "error": {"message": "x"}}) == {"unexpected-body"}


def test_c95_an_error_beside_choices() -> None:
    assert judged("chat", chat(SAID, error={"message": "x"})) == {"error-event"}


@pytest.mark.parametrize(
    ("body", "expected"), [(b"", {"empty"}), (b"null", set()), (b"\xff", set()), (b'{"error": {}}', set())]
)
def test_any_json_endpoint_may_answer_as_it_likes(body: bytes, expected: set[str]) -> None:
    assert body_reasons("json", body, b"") == expected


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"", {"empty"}),
        (b"data: x\n\n", set()),
        (b'data: {"error": {}}\n\n', set()),
        (b"event: error\ndata: x\n\n", {"error-event"}),
    ],
)
def test_any_json_endpoint_may_stream_as_it_likes(stream: bytes, expected: set[str]) -> None:
    assert stream_reasons("json", stream) == expected


# Objects made of the very words the rules look for, in every wrong place.
words = st.sampled_from(
    [
        "choices",
        "index",
        "message",
        "delta",
        "content",
        "tool_calls",
        "function",
        "arguments",
        "finish_reason",
        "output",
        "type",
        "status",
        "response",
        "item",
        "data",
        "error",
        "text",
        "refusal",
        "custom",
        "input",
        "content_block",
        "partial_json",
        "stop_reason",
        "function_call",
        "incomplete_details",
        "reason",
    ]
)
types = st.sampled_from(
    [
        "response.completed",
        "response.incomplete",
        "response.output_item.done",
        "message",
        "tool_use",
        "length",
        "failed",
        "content_block_start",
        "content_block_delta",
        "message_delta",
        "message_stop",
        "function_call",
    ]
)
leaves = st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | st.text(max_size=3) | types
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=5),
    max_leaves=20,
)
objects = st.dictionaries(words, values, max_size=6)


@given(st.sampled_from(KINDS), st.binary() | (objects | values).map(lambda each: json.dumps(each).encode()))
def test_a_body_never_raises(kind: str, body: bytes) -> None:
    assert body_reasons(kind, body, b"application/json") <= REASONS.keys()
    assert body_reasons(kind, body, body[:20]) <= REASONS.keys()


@given(
    st.sampled_from(KINDS),
    st.binary() | st.lists(objects.map(lambda each: format_event(json.dumps(each)))).map(b"".join),
)
def test_a_stream_never_raises(kind: str, stream: bytes) -> None:
    assert stream_reasons(kind, stream) <= REASONS.keys()


def test_nesting_of_any_depth() -> None:
    for kind, depth in product(KINDS, (400, 900, 5_000, 100_000)):
        for opening, closing in (("[", "]"), ('{"type":"message","content":[', "]}"), ('{"index":', "}")):
            nested = opening * depth + "1" + closing * depth
            for text in (nested, f'{{"output":[{nested}],"choices":[{nested}],"content":[{nested}]}}'):
                assert body_reasons(kind, text.encode(), TYPE) <= REASONS.keys()
                assert stream_reasons(kind, format_event(text, "response.completed")) <= REASONS.keys()
