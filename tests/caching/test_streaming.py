from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from llm_middleware.caching.sse import event_ends, format_event, parse_events
from llm_middleware.caching.streaming import assemble, explode, without_usage

JSON = dict[str, object]
DONE = b"data: [DONE]\n\n"
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 12,
    "total_tokens": 21,
    "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 3, "accepted_prediction_tokens": 0},
}
HEAD: JSON = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1700000000,
    "model": "gpt-4o-2024-08-06",
    "service_tier": "default",
    "system_fingerprint": "fp_1",
}


def sse(*payloads: JSON, done: bytes = DONE) -> bytes:
    return b"".join(format_event(json.dumps(payload)) for payload in payloads) + done


def chunk(*choices: JSON, usage: object = None, **more: object) -> JSON:
    return {**HEAD, "choices": list(choices), "usage": usage, **more}


def choice(delta: JSON, finish: str | None = None, index: int = 0, **more: object) -> JSON:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish, **more}


USAGE_CHUNK = chunk(usage=USAGE)
END = (chunk(choice({}, "stop")), USAGE_CHUNK)


def assembled(*payloads: JSON, kind: str = "chat", done: bytes = DONE) -> JSON | None:
    body = assemble(kind, sse(*payloads, done=done))
    return None if body is None else json.loads(body)


def message(*deltas: JSON) -> object:
    """The message that these deltas make up."""
    body = assembled(*(chunk(choice(delta)) for delta in deltas), *END)
    assert body is not None
    return body["choices"][0]["message"]  # type: ignore[index]


def payloads(stream: bytes) -> list[JSON]:
    return [json.loads(event.data) for event in parse_events(stream) if event.data != "[DONE]"]


class TestAssembleChat:
    def test_c85_a_whole_stream_becomes_the_plain_body(self) -> None:
        """C79, C85: header fields once, content joined, usage with its details untouched."""
        body = assembled(
            chunk(choice({"role": "assistant", "content": "", "refusal": None}), obfuscation="x1"),
            chunk(choice({"content": "Hel"}), obfuscation="x22"),
            chunk(choice({"content": "lo \U0001f600"}), obfuscation="x333"),
            *END,
        )
        assert body == {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1700000000,
            "model": "gpt-4o-2024-08-06",
            "service_tier": "default",
            "system_fingerprint": "fp_1",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hello \U0001f600", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": USAGE,
        }
        ChatCompletion.model_validate(body)

    def test_c78_reasoning_deltas_are_joined(self) -> None:
        assert message(
            {"role": "assistant", "content": None, "reasoning_content": "Let", "reasoning": "A"},
            {"content": None, "reasoning_content": " me", "reasoning": "B"},
            {"content": "42", "reasoning_content": None},
        ) == {"role": "assistant", "content": "42", "reasoning_content": "Let me", "reasoning": "AB"}

    def test_c80_interleaved_choices_stay_apart(self) -> None:
        body = assembled(
            chunk(choice({"role": "assistant", "content": ""}, index=1)),
            chunk(choice({"role": "assistant", "content": ""})),
            chunk(choice({"content": "a"}), choice({"content": "x"}, index=1)),
            chunk(choice({"content": "y"}, index=1)),
            chunk(choice({"content": "b"})),
            chunk(choice({}, "stop", index=1)),
            chunk(choice({}, "length")),
            USAGE_CHUNK,
        )
        assert body is not None
        assert body["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ab"},
                "logprobs": None,
                "finish_reason": "length",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "xy"},
                "logprobs": None,
                "finish_reason": "stop",
            },
        ]

    def test_c81_parallel_tool_calls_are_put_together_by_index(self) -> None:
        first = {"index": 0, "id": "call_a", "type": "function", "function": {"name": "f", "arguments": ""}}
        second = {"index": 1, "id": "call_b", "type": "function", "function": {"name": "g", "arguments": ""}}
        assert message(
            {"role": "assistant", "content": None, "tool_calls": [second]},
            {"tool_calls": [first]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"x"'}}]},
            {
                "tool_calls": [
                    {"index": 1, "id": "", "function": {"name": None, "arguments": "{}"}},
                    {"index": 0, "function": {"arguments": ":1}"}},
                ]
            },
        ) == {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
                {"id": "call_b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        }

    @pytest.mark.parametrize("said", [{}, {"content": None}, {"content": ""}])
    def test_content_is_null_where_only_tools_are_called(self, said: JSON) -> None:
        calls = [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
        made = message({"role": "assistant", **said}, {"tool_calls": calls})
        assert made["content"] is None  # type: ignore[index]

    def test_legacy_function_call(self) -> None:
        assert message(
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}},
            {"function_call": {"arguments": "{"}},
            {"function_call": {"arguments": "}"}},
        ) == {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}

    def test_refusal(self) -> None:
        assert message({"role": "assistant", "content": ""}, {"refusal": "I "}, {"refusal": "won't"}) == {
            "role": "assistant",
            "content": None,
            "refusal": "I won't",
        }

    def test_logprobs_are_joined(self) -> None:
        def token(text: str) -> JSON:
            return {"token": text, "logprob": -0.25, "bytes": None, "top_logprobs": []}

        def part(text: str) -> JSON:
            return choice({"content": text}, logprobs={"content": [token(text)], "refusal": None})

        body = assembled(chunk(choice({"role": "assistant"})), chunk(part("a")), chunk(part("b")), *END)
        assert body is not None
        assert body["choices"][0]["logprobs"] == {  # type: ignore[index]
            "content": [token("a"), token("b")],
            "refusal": None,
        }

    def test_an_empty_header_field_gives_way_to_the_real_one(self) -> None:
        """Azure opens with a chunk that has no choices and only knows its prompt filter's verdict."""
        opening = {"id": "", "object": "", "created": 0, "model": "", "choices": [], "filter": [{"index": 0}]}
        body = assembled(opening, chunk(choice({"role": "assistant", "content": "a"})), *END)
        assert body is not None
        assert (body["id"], body["created"], body["model"]) == (HEAD["id"], HEAD["created"], HEAD["model"])
        assert body["filter"] == [{"index": 0}]

    def test_unknown_fields_said_once_or_alike_are_kept(self) -> None:
        delta = {"role": "assistant", "content": "a", "annotations": [{"type": "url_citation"}]}
        body = assembled(
            chunk(choice(delta, stop_reason=None), provider="p"),
            chunk(choice({"content": "b"}, stop_reason=None), provider="p"),
            chunk(choice({}, "stop", stop_reason=128009), provider="p", citations=["u"]),
            USAGE_CHUNK,
        )
        assert body is not None
        assert (body["provider"], body["citations"]) == ("p", ["u"])
        assert body["choices"][0] == {  # type: ignore[index]
            "index": 0,
            "message": {"role": "assistant", "content": "ab", "annotations": [{"type": "url_citation"}]},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": 128009,
        }

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (chunk(choice({"thinking": "a"})), chunk(choice({"thinking": "b"}))),
            # Equal pieces of text: "ha" twice is "haha".
            (chunk(choice({"thinking": "ha"})), chunk(choice({"thinking": "ha"}))),
            (chunk(choice({"parts": [1]})), chunk(choice({"parts": [1]}))),
            (chunk(choice({}, flags={"a": 1})), chunk(choice({}, flags={"a": True}))),
            (chunk(choice({}), provider="a"), chunk(choice({}), provider="b")),
            (chunk(choice({}), model="m1"), chunk(choice({}), model="m2")),
            (chunk(choice({}, "length")), chunk(choice({}, "stop"))),
            (chunk(choice({"content": [{"text": "a"}]})), chunk(choice({}))),
            (chunk({"delta": {"content": "no index"}}), chunk(choice({}))),
            (chunk(choice({}, index=True), choice({}, "stop", index=True)), chunk(choice({}))),
            (chunk(choice({}, message={"content": "a"})), chunk(choice({}))),
            (
                chunk(choice({"tool_calls": [{"index": 0, "id": "a"}]})),
                chunk(choice({"tool_calls": [{"index": 0, "id": "b"}]})),
            ),
        ],
    )
    def test_what_no_rule_puts_together_is_refused(self, first: JSON, second: JSON) -> None:
        start = chunk(choice({"role": "assistant", "content": ""}))
        assert assembled(start, *END) is not None
        assert assembled(start, first, second, *END) is None

    def test_no_usage_no_plain_body(self) -> None:
        assert assembled(chunk(choice({"role": "assistant", "content": "a"}, "stop"))) is None

    def test_usage_told_as_it_grows_ends_at_the_total(self) -> None:
        body = assembled(
            chunk(choice({"role": "assistant", "content": "a"}), usage={"total_tokens": 1}),
            chunk(choice({}, "stop"), usage={"total_tokens": 2}),
        )
        assert body is not None
        assert body["usage"] == {"total_tokens": 2}

    @pytest.mark.parametrize(
        "stream",
        [
            b"",
            DONE,
            sse(*END, done=b""),
            sse(*END)[:-30],
            sse(*END, done=b"data: [DO"),
            sse(chunk(choice({"role": "assistant", "content": "a"})), USAGE_CHUNK),
            sse(*END, {"error": {"message": "overloaded"}}),
            sse(*END, done=b"event: error\ndata: {}\n\n" + DONE),
            sse(*END) + format_event(json.dumps(USAGE_CHUNK)),
            sse(*END, done=b"data: 5\n\n" + DONE),
            sse(*END, done=b": \xff\n\n" + DONE),
            sse(chunk(choice({"content": "a"}, "stop")), chunk(usage={"x": 1})).replace(b"1}", b"1e999}"),
        ],
    )
    def test_c83_cut_failed_and_unreadable_streams_have_no_plain_body(self, stream: bytes) -> None:
        assert assemble("chat", stream) is None

    def test_awkward_but_legal_streams_are_read(self) -> None:
        stream = b": hello\n\n" + sse(chunk(choice({"role": "assistant", "content": "é"})), *END)
        body = assemble("chat", stream)
        assert body is not None
        assert assemble("chat", stream.replace(b"\n", b"\r\n")) == body
        assert assemble("chat", stream.rstrip(b"\n")) == body
        pretty = [
            format_event(json.dumps(payload, indent=1)) for payload in payloads(stream)
        ]  # one data line per line
        assert assemble("chat", b"".join(pretty) + DONE) == body


class TestAssembleText:
    def test_c82_text_completions(self) -> None:
        """C82: pieces are text_completion objects, and so is the whole."""

        def piece(text: str, finish: str | None, at: int) -> JSON:
            logprobs = {
                "tokens": [text],
                "token_logprobs": [-1.5],
                "top_logprobs": [{text: -1.5}],
                "text_offset": [at],
            }
            return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}

        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}
        stream = (
            {**head, "choices": [piece("ab", None, 0)], "usage": None},
            {**head, "choices": [piece("c", "length", 2)], "usage": None},
            {**head, "choices": [], "usage": {"total_tokens": 3}},
        )
        body = assembled(*stream, kind="text")
        assert body == {
            **head,
            "choices": [
                {
                    "index": 0,
                    "text": "abc",
                    "logprobs": {
                        "tokens": ["ab", "c"],
                        "token_logprobs": [-1.5, -1.5],
                        "top_logprobs": [{"ab": -1.5}, {"c": -1.5}],
                        "text_offset": [0, 2],
                    },
                    "finish_reason": "length",
                }
            ],
            "usage": {"total_tokens": 3},
        }
        assert assembled(*stream[:-1], kind="text") is None


@pytest.mark.parametrize("kind", ["embedding", "transcription", "messages", "json"])
def test_other_kinds_have_one_form(kind: str) -> None:
    assert assembled(chunk(choice({"content": "a"})), *END, kind=kind) is None
    assert explode(kind, b"{}", usage=False) is None


# Explode: plain body to stream.

TOOL_CALL = {"id": "call_a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
PLAIN: JSON = {
    **HEAD,
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Hi",
                "refusal": None,
                "annotations": [],
                "tool_calls": [TOOL_CALL],
            },
            "logprobs": {
                "content": [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}]
            },
            "finish_reason": "tool_calls",
        }
    ],
    "usage": USAGE,
}


def exploded(kind: str, body: object, *, usage: bool = True) -> bytes | None:
    return explode(kind, json.dumps(body).encode(), usage=usage)


def test_c85_a_chat_body_becomes_openais_chunks() -> None:
    stream = exploded("chat", PLAIN)
    assert stream is not None
    assert stream.endswith(b"\n\n" + DONE)
    call = {"index": 0, **TOOL_CALL, "function": {"name": "f", "arguments": ""}}
    role = {"role": "assistant", "content": "", "refusal": None, "annotations": []}
    assert payloads(stream) == [
        chunk(choice(role)),
        chunk(choice({"content": "Hi"}, logprobs=PLAIN["choices"][0]["logprobs"])),  # type: ignore[index]
        chunk(choice({"tool_calls": [call]})),
        chunk(choice({"tool_calls": [{"index": 0, "function": {"arguments": '{"x":1}'}}]})),
        chunk(choice({}, "tool_calls")),
        USAGE_CHUNK,
    ]


def test_c85_without_include_usage_no_chunk_speaks_of_usage() -> None:
    stream = exploded("chat", PLAIN, usage=False)
    assert stream is not None
    assert b'"usage"' not in stream
    assert [len(each["choices"]) for each in payloads(stream)] == [1] * 5  # type: ignore[arg-type]


def without(key: str) -> JSON:
    return {name: value for name, value in PLAIN.items() if name != key}


def with_choice(**fields: object) -> JSON:
    return {**PLAIN, "choices": [{**PLAIN["choices"][0], **fields}]}  # type: ignore[index]


def with_message(**fields: object) -> JSON:
    return with_choice(message={"role": "assistant", "content": "Hi", **fields})


@pytest.mark.parametrize(
    "body",
    [
        [],
        without("object"),
        {**PLAIN, "object": "text_completion"},
        without("choices"),
        {**PLAIN, "choices": []},
        {**PLAIN, "choices": [1]},
        {**PLAIN, "choices": [with_choice(index=at)["choices"][0] for at in (1, 0)]},  # type: ignore[index]
        {**PLAIN, "choices": [with_choice(index=at)["choices"][0] for at in (0, 0)]},  # type: ignore[index]
        without("usage"),
        {**PLAIN, "usage": None},
        {**PLAIN, "error": {"message": "x"}},
        {**PLAIN, "obfuscation": "x"},
        with_choice(index=None),
        with_choice(finish_reason=None),
        with_choice(finish_reason=""),
        with_choice(delta={}),
        with_choice(message=None),
        with_choice(logprobs=[]),
        with_choice(logprobs={"content": "x"}),
        with_message(content=[{"type": "text", "text": "Hi"}]),
        with_message(reasoning={"text": "Hi"}),
        with_message(tool_calls=""),
        with_message(tool_calls=[1]),
        with_message(tool_calls=[{**TOOL_CALL, "index": 3}]),
        with_message(tool_calls=[{**TOOL_CALL, "function": {"name": "f", "arguments": {"x": 1}}}]),
        with_message(tool_calls=[{**TOOL_CALL, "function": "f"}]),
        with_message(function_call="f"),
    ],
)
def test_a_chat_body_that_chunks_cannot_carry_is_refused(body: object) -> None:
    assert exploded("chat", body) is None


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b"NaN"])
@pytest.mark.parametrize("kind", ["chat", "text", "responses"])
def test_what_is_not_json_is_refused(kind: str, body: bytes) -> None:
    assert explode(kind, body, usage=False) is None
    assert assemble(kind, b"data: " + body + b"\n\n" + DONE) is None


def test_two_spellings_become_openais() -> None:
    body = with_choice(message={"role": "assistant", "tool_calls": [{"index": 0, **TOOL_CALL}]})
    stream = exploded("chat", body)
    assert stream is not None
    again = json.loads(assemble("chat", stream) or b"")
    assert again["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [TOOL_CALL],
    }


def test_c82_a_text_body_becomes_text_completion_objects() -> None:
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}
    whole = {"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop"}
    body = {**head, "choices": [whole], "usage": {"total_tokens": 3}}
    stream = exploded("text", body)
    assert stream is not None
    assert payloads(stream) == [
        {**head, "choices": [{**whole, "finish_reason": None}], "usage": None},
        {**head, "choices": [{**whole, "text": ""}], "usage": None},
        {**head, "choices": [], "usage": {"total_tokens": 3}},
    ]
    assert exploded("text", {**body, "choices": [{**whole, "text": None}]}) is None


# Round trips. Values stand for themselves: what matters is that each field comes back as it was.

texts = st.text(max_size=8)
scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2)
)
known = {
    *("id", "object", "created", "model", "choices", "usage", "error", "obfuscation", "type", "index"),
    *("delta", "message", "finish_reason", "logprobs", "text", "role", "content", "refusal", "function"),
    *("reasoning", "reasoning_content", "tool_calls", "function_call", "service_tier", "arguments", "name"),
    *("tokens", "token_logprobs", "top_logprobs", "text_offset", "system_fingerprint"),
}
extra = st.dictionaries(texts.filter(lambda key: key not in known), values, max_size=2)


def record(required: dict[str, st.SearchStrategy[object]], **optional: st.SearchStrategy[object]) -> object:
    fields = st.fixed_dictionaries(required, optional=optional)
    return st.builds(lambda more, own: {**more, **own}, extra, fields)


maybe_text = st.none() | texts
tokens = st.none() | st.lists(values, max_size=2)
functions = record({"name": texts, "arguments": texts})
tool_calls = st.lists(record({"id": texts, "type": st.just("function"), "function": functions}), max_size=2)
messages = record(
    {"content": maybe_text},
    role=st.just("assistant"),
    refusal=maybe_text,
    reasoning=maybe_text,
    reasoning_content=maybe_text,
    tool_calls=st.none() | tool_calls,
    function_call=st.none() | functions,
)
finishes = st.sampled_from(["stop", "length", "tool_calls"])
chat_choices = record(
    {"message": messages, "finish_reason": finishes},
    logprobs=st.none() | record({}, content=tokens, refusal=tokens),
)
text_choices = record(
    {"text": texts, "finish_reason": finishes},
    logprobs=st.none() | record({}, tokens=tokens, token_logprobs=tokens, top_logprobs=tokens),
)


def bodies(name: str, choices: object) -> st.SearchStrategy[JSON]:
    numbered = st.lists(choices, min_size=1, max_size=3).map(  # type: ignore[arg-type]
        lambda each: [{**choice, "index": at} for at, choice in enumerate(each)]
    )
    return record(
        {
            "id": texts,
            "object": st.just(name),
            "created": st.integers(0, 9),
            "model": texts,
            "choices": numbered,
            "usage": st.dictionaries(texts, values, max_size=2),
        },
        service_tier=maybe_text,
        system_fingerprint=maybe_text,
    )


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("chat", lambda: bodies("chat.completion", chat_choices)),
        ("text", lambda: bodies("text_completion", text_choices)),
    ],
)
def test_c85_there_and_back_again(kind: str, make: Callable[[], st.SearchStrategy[JSON]]) -> None:
    """C79, C80, C81, C85: any number of choices and calls, unknown fields, nulls and empty values."""

    @given(make())
    def there_and_back(body: JSON) -> None:
        stream = exploded(kind, body)
        assert stream is not None
        assert b"".join(format_event(event.data) for event in parse_events(stream)) == stream
        back = assemble(kind, stream)
        assert back is not None
        assert json.dumps(json.loads(back), sort_keys=True) == json.dumps(body, sort_keys=True)

    there_and_back()


@pytest.mark.parametrize("usage", [True, False])
def test_exploded_chunks_are_the_sdks_chunks(usage: bool) -> None:
    stream = exploded("chat", PLAIN, usage=usage)
    assert stream is not None
    chunks = [ChatCompletionChunk.model_validate(payload, strict=True) for payload in payloads(stream)]
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == "Hi"
    assert (chunks[-1].usage is not None) is usage


def test_exploded_text_is_the_sdks_completion() -> None:
    whole = {"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop"}
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}
    stream = exploded("text", {**head, "choices": [whole], "usage": None}, usage=False)
    assert stream is not None
    # The SDK's own type wants a finish reason in every piece; OpenAI sends null in all but the last.
    with_reason = [{**each["choices"][0], "finish_reason": "stop"} for each in payloads(stream)]  # type: ignore[index]
    pieces = [Completion.model_validate({**head, "choices": [each]}) for each in with_reason]
    assert "".join(piece.choices[0].text for piece in pieces) == "abc"


REASONING: JSON = {
    "id": "rs_1",
    "type": "reasoning",
    "summary": [{"type": "summary_text", "text": "First"}, {"type": "summary_text", "text": ""}],
    "content": [{"type": "reasoning_text", "text": "Hm"}],
    "encrypted_content": "abc",
    "status": None,
}
ANNOTATION: JSON = {"type": "url_citation", "start_index": 0, "end_index": 2, "title": "t", "url": "u"}
LOGPROB: JSON = {"token": "Hi", "bytes": [72, 105], "logprob": -0.5, "top_logprobs": []}
TEXT: JSON = {"type": "output_text", "text": "Hi", "annotations": [ANNOTATION], "logprobs": [LOGPROB]}
REFUSAL: JSON = {"type": "refusal", "refusal": "No"}
SAID: JSON = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [TEXT, REFUSAL],
}
CALL: JSON = {
    "id": "fc_1",
    "type": "function_call",
    "call_id": "call_1",
    "name": "f",
    "arguments": '{"x":1}',
    "status": "completed",
}
RESPONSE: JSON = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1700000000,
    "completed_at": 1700000002,
    "status": "completed",
    "error": None,
    "incomplete_details": None,
    "model": "gpt-4o",
    "output": [REASONING, SAID, CALL],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "usage": {
        "input_tokens": 1,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 3,
    },
    "x-unknown": {"kept": [1.5, None]},
}


class TestResponses:
    def stream(self, **fields: object) -> bytes | None:
        return exploded("responses", {**RESPONSE, **fields}, usage=False)

    def test_c85_there_and_back_again(self) -> None:
        stream = self.stream()
        assert stream is not None
        assert json.loads(assemble("responses", stream) or b"") == RESPONSE

    def test_c85_the_events_in_their_order(self) -> None:
        events = parse_events(self.stream() or b"")
        read = [json.loads(event.data) for event in events]
        assert [event.event for event in events] == [each["type"] for each in read]
        assert [each["sequence_number"] for each in read] == list(range(len(read)))
        part, summary, item = "response.content_part", "response.reasoning_summary", "response.output_item"
        assert [event.event for event in events] == [
            "response.created",
            "response.in_progress",
            f"{item}.added",
            f"{summary}_part.added",
            f"{summary}_text.delta",
            f"{summary}_text.done",
            f"{summary}_part.done",
            f"{summary}_part.added",
            f"{summary}_text.done",
            f"{summary}_part.done",
            f"{part}.added",
            "response.reasoning_text.delta",
            "response.reasoning_text.done",
            f"{part}.done",
            f"{item}.done",
            f"{item}.added",
            f"{part}.added",
            "response.output_text.delta",
            "response.output_text.annotation.added",
            "response.output_text.done",
            f"{part}.done",
            f"{part}.added",
            "response.refusal.delta",
            "response.refusal.done",
            f"{part}.done",
            f"{item}.done",
            f"{item}.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            f"{item}.done",
            "response.completed",
        ]

    def test_c85_what_the_events_say(self) -> None:
        read = payloads(self.stream() or b"")
        begun = {**RESPONSE, "status": "in_progress", "output": [], "usage": None, "completed_at": None}
        assert read[0] == {"type": "response.created", "sequence_number": 0, "response": begun}
        place = {"item_id": "msg_1", "output_index": 1, "content_index": 0}
        assert read[15:22] == [
            {
                "type": "response.output_item.added",
                "sequence_number": 15,
                "output_index": 1,
                "item": {**SAID, "status": "in_progress", "content": []},
            },
            {
                "type": "response.content_part.added",
                "sequence_number": 16,
                **place,
                "part": {**TEXT, "text": "", "annotations": [], "logprobs": []},
            },
            {
                "type": "response.output_text.delta",
                "sequence_number": 17,
                **place,
                "delta": "Hi",
                "logprobs": [LOGPROB],
            },
            {
                "type": "response.output_text.annotation.added",
                "sequence_number": 18,
                **place,
                "annotation_index": 0,
                "annotation": ANNOTATION,
            },
            {
                "type": "response.output_text.done",
                "sequence_number": 19,
                **place,
                "text": "Hi",
                "logprobs": [LOGPROB],
            },
            {"type": "response.content_part.done", "sequence_number": 20, **place, "part": TEXT},
            {
                "type": "response.content_part.added",
                "sequence_number": 21,
                **place,
                "content_index": 1,
                "part": {"type": "refusal", "refusal": ""},
            },
        ]
        assert read[2]["item"] == {**REASONING, "summary": [], "content": []}
        added, delta, done, finished = read[26:30]
        assert added["item"] == {**CALL, "status": "in_progress", "arguments": ""}
        assert (delta["delta"], done["arguments"], finished["item"]) == ('{"x":1}', '{"x":1}', CALL)
        assert read[30]["response"] == RESPONSE

    def test_the_events_are_the_sdks_events(self) -> None:
        adapter: TypeAdapter[object] = TypeAdapter(ResponseStreamEvent)
        for payload in payloads(self.stream() or b""):
            event = adapter.validate_python(payload)
            assert event.type == payload["type"]  # type: ignore[attr-defined]
        Response.model_validate(RESPONSE)

    def test_an_incomplete_response_ends_as_one(self) -> None:
        details = {"reason": "max_output_tokens"}
        stream = self.stream(status="incomplete", incomplete_details=details)
        assert stream is not None
        assert payloads(stream)[0]["response"]["incomplete_details"] is None  # type: ignore[index]
        assert parse_events(stream)[-1].event == "response.incomplete"
        assert json.loads(assemble("responses", stream) or b"")["incomplete_details"] == details

    @pytest.mark.parametrize(
        "fields",
        [
            {"status": "in_progress"},
            {"status": "failed"},
            {"status": None},
            {"object": "list"},
            {"error": {"code": "server_error"}},
            {"output": None},
            {"output": [{"id": "ws_1", "type": "web_search_call", "status": "completed"}]},
            {"output": [{**SAID, "id": None}]},
            {"output": [{**SAID, "content": "Hi"}]},
            {"output": [{**SAID, "content": [{"type": "output_audio"}]}]},
            {"output": [{**SAID, "content": [{"type": "summary_text", "text": "x"}]}]},
            {"output": [{**CALL, "arguments": None}]},
            {"output": [{**REASONING, "summary": [{"type": "summary_text"}]}]},
            {"output": [5]},
        ],
    )
    def test_what_the_events_cannot_say_is_refused(self, fields: JSON) -> None:
        assert self.stream(**fields) is None

    def test_c83_cut_and_failed_streams_have_no_plain_body(self) -> None:
        stream = self.stream() or b""
        ends = event_ends(stream)
        assert assemble("responses", stream + DONE) == assemble("responses", stream)
        for end in ends[:-1]:
            assert assemble("responses", stream[:end]) is None
        failed = format_event(
            json.dumps({"type": "response.failed", "response": RESPONSE}), "response.failed"
        )
        assert assemble("responses", stream[: ends[-2]] + failed) is None
        error = format_event(json.dumps({"type": "error", "message": "x"}))
        assert assemble("responses", stream[: ends[-2]] + error + stream[ends[-2] :]) is None

    def test_a_final_response_without_the_items_that_went_by_is_refused(self) -> None:
        stream = self.stream() or b""
        cut = event_ends(stream)[-2]
        final = {"type": "response.completed", "response": {**RESPONSE, "output": []}}
        assert assemble("responses", stream[:cut] + format_event(json.dumps(final))) is None


class TestWithoutUsage:
    content = sse(chunk(choice({"role": "assistant", "content": "a"})), chunk(choice({}, "stop")), done=b"")
    usage = sse(USAGE_CHUNK, done=b"")

    @pytest.mark.parametrize("end", [b"\n", b"\r\n"])
    @pytest.mark.parametrize("tail", [DONE, b"", b": bye\n\n" + DONE, b"data: [DONE]"])
    def test_c79_only_the_usage_chunk_goes(self, tail: bytes, end: bytes) -> None:
        def text(data: bytes) -> bytes:
            return data.replace(b"\n", end)

        assert without_usage(text(self.content + self.usage + tail)) == text(self.content + tail)

    def test_c79_usage_beside_choices_stays(self) -> None:
        stream = sse(chunk(choice({"role": "assistant", "content": "a"}, "stop"), usage=USAGE))
        assert without_usage(stream) == stream

    def test_a_stream_without_usage_is_left_alone(self) -> None:
        bare = self.content + DONE
        assert without_usage(bare) == bare
        assert without_usage(b"") == b""

    def test_only_the_last_one_goes(self) -> None:
        stream = self.usage + self.content + self.usage + DONE
        assert without_usage(stream) == self.usage + self.content + DONE
        assert without_usage(self.usage + self.content + DONE) == self.usage + self.content + DONE

    @given(st.binary() | st.lists(st.sampled_from([content, usage, DONE, b"data: {", b"\n"])).map(b"".join))
    def test_any_bytes_will_do(self, stream: bytes) -> None:
        assert len(without_usage(stream)) <= len(stream)


@given(
    st.sampled_from(["chat", "text", "responses"]),
    st.binary() | st.lists(values.map(lambda value: format_event(json.dumps(value)))).map(b"".join),
)
def test_conversion_never_raises(kind: str, data: bytes) -> None:
    assert assemble(kind, data) is None
    assert explode(kind, data, usage=False) is None
