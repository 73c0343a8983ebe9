"""OpenAI's chat completions over Bedrock's Converse API: requests, signatures, answers and event streams."""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import json
import urllib.parse
import zlib
from collections.abc import AsyncIterator
from itertools import pairwise

import botocore.session
import moto
import pytest
from botocore.eventstream import EventStreamBuffer
from botocore.parsers import create_parser
from botocore.serialize import create_serializer
from botocore.validate import validate_parameters
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming._deltas import accumulate_delta
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from llm_middleware._drive import iter_sync
from llm_middleware._ports.bedrock import BedrockSigner
from llm_middleware.errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    ContextWindowExceededError,
    DeadlineError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    UpstreamConnectionError,
    UpstreamServerError,
)
from llm_middleware.providers.bedrock import answer, build, events, failure
from llm_middleware.providers.bedrock_frames import frames
from llm_middleware.providers.messages import Outgoing
from llm_middleware.providers.registry import registry
from llm_middleware.providers.target import Target

HI = [{"role": "user", "content": "hi"}]
CLAUDE = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
NEWER = "global.anthropic.claude-opus-4-7"
NOVA = "amazon.nova-pro-v1:0"
BASE = "https://bedrock-runtime.eu-west-1.amazonaws.com"
SERVICE = botocore.session.Session().get_service_model("bedrock-runtime")


def target(model=NOVA, base=BASE, headers=None, **more) -> Target:
    row = registry()["bedrock"]
    return Target(provider=row, model=model, base_url=base, headers=headers or {}, **more)


def sent(to: Target | None = None, **body: object) -> dict:
    """The fields that go over the wire, which are what boto3 would send for them."""
    request = build(to or target(), "chat", {"messages": HI, **body}, False)
    fields = json.loads(request.body)
    operation = SERVICE.operation_model("Converse")
    params = {**raw(fields), "modelId": (to or target()).model}
    validate_parameters(params, operation.input_shape)
    serialized = create_serializer("rest-json").serialize_to_request(params, operation)
    assert json.loads(serialized["body"]) == fields
    assert request.url == BASE + serialized["url_path"]
    return fields


def raw(value: object, name: str = "") -> object:
    """With the bytes that boto3 takes, where the wire has base64."""
    if isinstance(value, dict):
        return {key: raw(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [raw(item, name) for item in value]
    return base64.b64decode(value) if name in ("bytes", "redactedContent") else value


def refused(to: Target | None = None, **body: object) -> BadRequestError:
    with pytest.raises(BadRequestError) as caught:
        build(to or target(), "chat", {"messages": HI, **body}, False)
    return caught.value


def function(name: str, **more: object) -> dict:
    return {"type": "function", "function": {"name": name, **more}}


def call(number: str, name: str, arguments: str) -> dict:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def data(media: str) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:{media};base64,AAAA"}}


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
SPEC = {"toolSpec": {"name": "f", "inputSchema": {"json": SCHEMA}}}


class TestRequests:
    def test_a_chat_is_exactly_this(self):
        to = target(CLAUDE, headers={"authorization": "Bearer k"})
        request = build(to, "chat", {"model": "group", "messages": HI, "max_tokens": 9}, False)
        assert request.method == "POST"
        assert request.url == f"{BASE}/model/us.anthropic.claude-sonnet-4-5-20250929-v1%3A0/converse"
        assert request.headers == {
            "content-type": "application/json",
            "accept": "application/json",
            "authorization": "Bearer k",
        }
        assert request.body == (
            b'{"messages":[{"role":"user","content":[{"text":"hi"}]}],"inferenceConfig":{"maxTokens":9}}'
        )

    def test_a_stream_has_an_address_of_its_own(self):
        request = build(target(), "chat", {"messages": HI, "stream_options": {"include_usage": True}}, True)
        assert request.url == f"{BASE}/model/amazon.nova-pro-v1%3A0/converse-stream"
        assert request.headers["accept"] == "application/vnd.amazon.eventstream"
        assert request.body == b'{"messages":[{"role":"user","content":[{"text":"hi"}]}]}'

    def test_an_arn_is_one_part_of_the_path(self):
        arn = "arn:aws:bedrock:eu-west-1:1:application-inference-profile/x"
        assert sent(target(arn))["messages"]
        assert build(target(f"converse/{arn}"), "chat", {"messages": HI}, False).url == (
            f"{BASE}/model/{urllib.parse.quote(arn, safe='')}/converse"
        )
        with pytest.raises(BadRequestError, match="no name of a model"):
            build(target(".."), "chat", {"messages": HI}, False)

    def test_what_it_needs(self):
        with pytest.raises(BadRequestError, match="no 'embedding' requests"):
            build(target(), "embedding", {"input": "a"}, False)
        with pytest.raises(ConfigError, match="needs aws_region_name"):
            build(target(base=""), "chat", {"messages": HI}, False)

    def test_the_callers_body_does_not_change(self):
        body = {"messages": [*HI, *HI], "tools": [function("f")], "temperature": 2}
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
        before = copy.deepcopy(body)
        build(target(CLAUDE), "chat", body, True)
        assert body == before


class TestMessages:
    def test_all_kinds_of_content(self):
        mark = {"type": "ephemeral", "ttl": "1h"}
        thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
        pdf = {"file_data": "data:application/pdf;base64,AAAA", "filename": "a_b  c.pdf"}
        fields = sent(
            messages=[
                {"role": "system", "content": "be good", "cache_control": mark},
                {"role": "user", "content": [{"type": "text", "text": "see"}, data("image/jpg")]},
                {
                    "role": "user",
                    "content": [
                        {"type": "file", "file": pdf},
                        {"type": "file", "file": {"file_data": "data:text/plain;base64,aGk="}},
                    ],
                },
                {
                    "role": "assistant",
                    "content": "calling",
                    "thinking_blocks": [thought, {"type": "redacted_thinking", "data": "AAAA"}],
                    "tool_calls": [call("t1", "f", '{"a":"b"}'), call("t2", "f", "{}")],
                },
                {
                    "role": "tool",
                    "tool_call_id": "t1",
                    "content": [{"type": "text", "text": "r"}, data("image/gif")],
                },
                {"role": "tool", "tool_call_id": "t2", "content": "", "is_error": True},
            ],
            tools=[{**function("f", parameters=SCHEMA, description="d", strict=True), "cache_control": mark}],
        )
        point = {"cachePoint": {"type": "default", "ttl": "1h"}}
        assert fields == {
            "system": [{"text": "be good"}, point],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"text": "see"},
                        {"image": {"format": "jpeg", "source": {"bytes": "AAAA"}}},
                        {"document": {"format": "pdf", "name": "a b c pdf", "source": {"bytes": "AAAA"}}},
                        {"document": {"format": "txt", "name": "document", "source": {"bytes": "aGk="}}},
                    ],
                },
                {
                    "role": "assistant",
                    "content": [
                        {"reasoningContent": {"reasoningText": {"text": "hm", "signature": "s"}}},
                        {"reasoningContent": {"redactedContent": "AAAA"}},
                        {"text": "calling"},
                        {"toolUse": {"toolUseId": "t1", "name": "f", "input": {"a": "b"}}},
                        {"toolUse": {"toolUseId": "t2", "name": "f", "input": {}}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "toolResult": {
                                "toolUseId": "t1",
                                "content": [
                                    {"text": "r"},
                                    {"image": {"format": "gif", "source": {"bytes": "AAAA"}}},
                                ],
                            }
                        },
                        {"toolResult": {"toolUseId": "t2", "content": [], "status": "error"}},
                    ],
                },
            ],
            "toolConfig": {
                "tools": [
                    {
                        "toolSpec": {
                            "name": "f",
                            "inputSchema": {"json": SCHEMA},
                            "description": "d",
                            "strict": True,
                        }
                    },
                    point,
                ]
            },
        }

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": {"url": "https://h.example/a.png"}},
            {"type": "file", "file": {"file_id": "file_1"}},
            data("image/tiff"),
            {"type": "search_result"},
            {"type": "image", "source": 1},
            {"type": "tool_result", "content": 1},
            {"type": "tool_result", "content": [1]},
        ],
    )
    def test_what_it_does_not_read(self, part):
        assert refused(messages=[{"role": "user", "content": [part]}]).param == "messages"


class TestParameters:
    def test_names_that_differ(self):
        fields = sent(
            max_tokens=5,
            temperature=1.5,
            top_p=0.5,
            stop="END",
            service_tier="flex",
            user="u",
            guardrailConfig={"guardrailIdentifier": "g", "guardrailVersion": "1"},
            performanceConfig={"latency": "optimized"},
            top_k=7,
            additionalModelRequestFields={"x": 1},
        )
        assert fields == {
            "messages": [{"role": "user", "content": [{"text": "hi"}]}],
            "inferenceConfig": {"maxTokens": 5, "temperature": 1, "topP": 0.5, "stopSequences": ["END"]},
            "serviceTier": {"type": "flex"},
            "guardrailConfig": {"guardrailIdentifier": "g", "guardrailVersion": "1"},
            "performanceConfig": {"latency": "optimized"},
            "additionalModelRequestFields": {"top_k": 7, "x": 1},
        }

    def test_a_temperature_of_nothing_is_one(self):
        assert sent(temperature=0)["inferenceConfig"] == {"temperature": 0}

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("n", 2),
            ("seed", 1),
            ("service_tier", "scale"),
            ("response_format", {"type": "json_object"}),
            ("parallel_tool_calls", False),
        ],
    )
    def test_what_is_not_there_is_named_or_dropped(self, name, value):
        body = {"tools": [function("f", parameters=SCHEMA)], name: value}
        assert refused(**body).param == name
        assert sent(target(drop_params=True), **body) == sent(tools=body["tools"])

    def test_thinking_is_the_models_own(self):
        budget = sent(target(CLAUDE), reasoning_effort="low")
        assert budget["additionalModelRequestFields"] == {
            "thinking": {"type": "enabled", "budget_tokens": 1024}
        }
        assert budget["inferenceConfig"] == {"maxTokens": 5120}
        small = sent(target(CLAUDE, max_output_tokens=3000), reasoning_effort="low")
        assert small["inferenceConfig"] == {"maxTokens": 3000}
        assert "inferenceConfig" not in sent(target(CLAUDE, max_output_tokens=3000))
        effort = sent(target(NEWER), reasoning_effort="high")
        assert effort["additionalModelRequestFields"] == {"thinking": {"type": "adaptive"}}
        assert effort["outputConfig"] == {"effort": "high"}
        other = sent(target("openai.gpt-oss-120b-1:0"), reasoning_effort="high")
        assert other["additionalModelRequestFields"] == {"reasoning_effort": "high"}

    def test_a_schema(self):
        wanted = {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {**SCHEMA, "minProperties": 1}},
        }
        output = sent(response_format=wanted)["outputConfig"]["textFormat"]
        assert output["type"] == "json_schema"
        made = output["structure"]["jsonSchema"]
        assert made["name"] == "x"
        assert json.loads(made["schema"]) == {
            **SCHEMA,
            "additionalProperties": False,
            "description": "{minProperties: 1}",
        }

    @pytest.mark.parametrize(
        ("said", "choice"),
        [
            ("auto", None),
            ("required", {"any": {}}),
            (function("f"), {"tool": {"name": "f"}}),
        ],
    )
    def test_choices(self, said, choice):
        made = sent(tools=[function("f", parameters=SCHEMA)], tool_choice=said)["toolConfig"]
        assert made == {"tools": [SPEC]} | ({"toolChoice": choice} if choice else {})

    def test_no_tool_is_none_at_all(self):
        tools = [function("f", parameters=SCHEMA)]
        assert "toolConfig" not in sent(tools=tools, tool_choice="none")
        used = [*HI, {"role": "assistant", "tool_calls": [call("t", "f", "{}")]}]
        assert refused(messages=used, tools=tools, tool_choice="none").param == "tool_choice"

    def test_earlier_calls_have_their_tools(self):
        used = [*HI, {"role": "assistant", "tool_calls": [call("t", "g", "{}"), call("u", "g", "{}")]}]
        empty = {"json": {"type": "object", "properties": {}}}
        assert sent(messages=used)["toolConfig"] == {
            "tools": [{"toolSpec": {"name": "g", "inputSchema": empty}}]
        }

    def test_only_functions_are_tools(self):
        assert refused(tools=[{"type": "web_search_20250305", "name": "web_search"}]).param == "tools"


# --- answers

CONTENT = [
    {"reasoningContent": {"reasoningText": {"text": "let me see", "signature": "sig=="}}},
    {"reasoningContent": {"redactedContent": "AAAA"}},
    {"text": "18 °C "},
    {"toolUse": {"toolUseId": "t1", "name": "weather", "input": {"city": "Köln"}}},
    {"toolUse": {"toolUseId": "t2", "name": "now", "input": {}}},
]
USAGE = {"inputTokens": 10, "outputTokens": 30, "totalTokens": 580}
USAGE |= {"cacheReadInputTokens": 500, "cacheWriteInputTokens": 40}
COUNTED = {
    "prompt_tokens": 550,
    "completion_tokens": 30,
    "total_tokens": 580,
    "prompt_tokens_details": {"cached_tokens": 500, "cache_creation_tokens": 40},
    "cache_read_input_tokens": 500,
    "cache_creation_input_tokens": 40,
}


def converse(content=CONTENT, reason="tool_use") -> bytes:
    message = {"role": "assistant", "content": content}
    said = {"output": {"message": message}, "stopReason": reason, "usage": USAGE, "metrics": {"latencyMs": 1}}
    return json.dumps(said).encode()


class TestAnswers:
    def test_an_answer_is_exactly_this(self):
        reply = {"body": converse(), "headers": {}, "status_code": 200}
        shape = SERVICE.operation_model("Converse").output_shape
        assert create_parser("rest-json").parse(reply, shape)["stopReason"] == "tool_use"
        made = answer(converse(), model="m", clock=lambda: 7.5)
        ChatCompletion.model_validate_json(made)
        found = json.loads(made)
        assert found.pop("id").startswith("chatcmpl-")
        assert found == {
            "object": "chat.completion",
            "created": 7,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": "18 °C ",
                        "refusal": None,
                        "tool_calls": [call("t1", "weather", '{"city":"Köln"}'), call("t2", "now", "{}")],
                        "reasoning_content": "let me see",
                        "thinking_blocks": [
                            {"type": "thinking", "thinking": "let me see", "signature": "sig=="},
                            {"type": "redacted_thinking", "data": "AAAA"},
                        ],
                    },
                    "logprobs": None,
                    "finish_reason": "tool_calls",
                }
            ],
            "usage": COUNTED,
        }

    @pytest.mark.parametrize(
        ("reason", "finish"),
        [
            ("end_turn", "stop"),
            ("max_tokens", "length"),
            ("model_context_window_exceeded", "length"),
            ("content_filtered", "content_filter"),
            ("guardrail_intervened", "content_filter"),
            ("malformed_tool_use", "stop"),
        ],
    )
    def test_why_it_ended(self, reason, finish):
        assert json.loads(answer(converse(reason=reason)))["choices"][0]["finish_reason"] == finish
        assert streamed(stream_of(reason=reason))[0]["finish_reason"] == finish

    def test_cited_text_is_text(self):
        cited = [{"citationsContent": {"content": [{"text": "a"}, {"text": "b"}], "citations": []}}]
        assert json.loads(answer(converse(cited)))["choices"][0]["message"]["content"] == "ab"

    @pytest.mark.parametrize(
        "body", [b"", b"[]", b"{}", b'{"output":{"message":{"content":1}}}', b"[" * 99_999]
    )
    def test_what_is_no_answer_is_the_providers_fault(self, body):
        with pytest.raises(UpstreamServerError) as caught:
            answer(body)
        assert (caught.value.status, caught.value.code) == (502, "unexpected_upstream_answer")


class TestFailures:
    @pytest.mark.parametrize(
        ("status", "kind", "text", "expected", "shown"),
        [
            (400, "ValidationException", "no such field", BadRequestError, 400),
            (
                400,
                "ValidationException:http://internal.amazon.com/x/",
                "Input is too long for requested model.",
                ContextWindowExceededError,
                400,
            ),
            (403, "AccessDeniedException", "not yours", PermissionDeniedError, 403),
            (403, "UnrecognizedClientException", "invalid token", AuthenticationError, 401),
            (404, "ResourceNotFoundException", "no model", NotFoundError, 404),
            (408, "ModelTimeoutException", "too slow", DeadlineError, 408),
            (424, "ModelErrorException", "broken", UpstreamServerError, 424),
            (429, "ThrottlingException", "Too many tokens, please wait", RateLimitError, 429),
            (500, "InternalServerException", "oh", UpstreamServerError, 500),
            (503, "ServiceUnavailableException", "busy", UpstreamServerError, 503),
        ],
    )
    def test_awss_errors(self, status, kind, text, expected, shown):
        found = failure(status, {"x-amzn-errortype": kind}, json.dumps({"message": text}).encode())
        assert type(found) is expected
        assert (found.status, found.message) == (shown, text)

    def test_bodies_that_are_no_json(self):
        assert type(failure(503, {"x-amzn-errortype": "X"}, b"<html>")) is UpstreamServerError
        assert type(failure(403, {}, b"")) is PermissionDeniedError


# --- streams


def frame(name: str, payload: object, kind: str = "event", **more: bytes) -> bytes:
    headers = {f":{kind}-type": name, ":content-type": "application/json", ":message-type": kind}
    head = b"".join(
        bytes([len(key)]) + key.encode() + b"\x07" + len(value).to_bytes(2) + value.encode()
        for key, value in headers.items()
    )
    head += b"".join(bytes([len(key)]) + key.encode() + value for key, value in more.items())
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    prelude = (16 + len(head) + len(body)).to_bytes(4) + len(head).to_bytes(4)
    prelude += zlib.crc32(prelude).to_bytes(4)
    return prelude + head + body + zlib.crc32(prelude + head + body).to_bytes(4)


def delta(index: int, **fields: object) -> bytes:
    return frame("contentBlockDelta", {"contentBlockIndex": index, "delta": fields, "p": "abc"})


def stop(index: int) -> bytes:
    return frame("contentBlockStop", {"contentBlockIndex": index})


def began(index: int, number: str, name: str) -> bytes:
    start = {"toolUse": {"toolUseId": number, "name": name}}
    return frame("contentBlockStart", {"contentBlockIndex": index, "start": start})


def steps(reason: str = "tool_use") -> list[bytes]:
    """`CONTENT` as Bedrock streams it."""
    return [
        frame("messageStart", {"role": "assistant"}),
        delta(0, reasoningContent={"text": "let me "}),
        delta(0, reasoningContent={"text": "see"}),
        delta(0, reasoningContent={"signature": "sig=="}),
        stop(0),
        delta(1, reasoningContent={"redactedContent": "AAAA"}),
        stop(1),
        delta(2, text="18 "),
        delta(2, text="°C "),
        stop(2),
        began(3, "t1", "weather"),
        delta(3, toolUse={"input": ""}),
        delta(3, toolUse={"input": '{"city":'}),
        delta(3, toolUse={"input": '"Köln"}'}),
        stop(3),
        began(4, "t2", "now"),
        stop(4),
        frame("messageStop", {"stopReason": reason}),
        frame("metadata", {"usage": USAGE, "metrics": {"latencyMs": 1}}),
    ]


def stream_of(reason: str = "tool_use") -> bytes:
    return b"".join(steps(reason))


async def chunked(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def read(*chunks: bytes, **options: object) -> list[dict]:
    made = list(iter_sync(events(chunked(*chunks), model="m", clock=lambda: 7.0, **options)))
    assert made[-1] == b"data: [DONE]\n\n"
    found = [json.loads(event[6:]) for event in made[:-1]]
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk)
        assert chunk.pop("id").startswith("chatcmpl-")
    return found


def streamed(*chunks: bytes) -> list[dict]:
    whole: dict = {}
    for chunk in read(*chunks):
        whole = accumulate_delta(whole, chunk)
    return whole["choices"]


class TestStreams:
    def test_the_frames_are_awss(self):
        buffer = EventStreamBuffer()
        buffer.add_data(stream_of())
        theirs = [(event.headers[":event-type"], event.payload) for event in buffer]
        ours = [(one.name, one.payload) for one in iter_sync(frames(chunked(stream_of())))]
        assert ours == theirs
        assert len(ours) == 19

    def test_headers_of_other_types_are_passed_over(self):
        more = {
            "t": b"\x00",
            "f": b"\x01",
            "i": b"\x04" + bytes(4),
            "s": b"\x03" + bytes(2),
            "y": b"\x02\x01",
            "l": b"\x05" + bytes(8),
            "d": b"\x08" + bytes(8),
            "b": b"\x06\x00\x02ab",
            "u": b"\x09" + bytes(16),
        }
        data = frame("x", b"{}", **more)
        buffer = EventStreamBuffer()
        buffer.add_data(data)
        assert next(buffer).headers["b"] == b"ab"
        [one] = iter_sync(frames(chunked(data)))
        assert (one.kind, one.name, one.payload) == ("event", "x", b"{}")

    def test_a_stream_says_what_the_whole_answer_says(self):
        [choice] = streamed(stream_of())
        spoken = json.loads(answer(converse()))["choices"][0]["message"]
        for name in ("tool_calls", "thinking_blocks"):
            for item in choice["delta"][name]:
                item.pop("index")
        assert choice["delta"] == {name: value for name, value in spoken.items() if name != "refusal"}
        assert choice["finish_reason"] == "tool_calls"

    def test_the_last_chunks(self):
        made = read(stream_of(), include_usage=True)
        head = {"object": "chat.completion.chunk", "created": 7, "model": "m"}
        last = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}
        assert made[-2:] == [
            {**head, "choices": [last], "usage": None},
            {**head, "choices": [], "usage": COUNTED},
        ]
        assert not any("usage" in chunk for chunk in read(stream_of()))

    @given(st.lists(st.integers(0, 4000), max_size=30), st.booleans())
    def test_where_it_is_cut_changes_nothing(self, cuts, single):
        whole = stream_of()
        bounds = [0, *(range(len(whole)) if single else sorted(cuts)), len(whole)]
        assert read(*(whole[a:b] for a, b in pairwise(bounds))) == read(whole)

    def test_a_stream_without_its_tokens_is_whole(self):
        assert read(b"".join(steps()[:-1])) == read(stream_of())

    @pytest.mark.parametrize("end", [-1, -5])
    def test_a_stream_that_ends_too_early(self, end):
        with pytest.raises(UpstreamConnectionError, match="ended within an event"):
            read(stream_of()[:end])
        with pytest.raises(UpstreamConnectionError, match="ended before its last event"):
            read(b"".join(steps()[: end - 1]))

    @pytest.mark.parametrize(
        ("name", "expected", "status"),
        [
            ("throttlingException", RateLimitError, 429),
            ("validationException", BadRequestError, 400),
            ("modelStreamErrorException", UpstreamServerError, 424),
            ("serviceUnavailableException", UpstreamServerError, 503),
            ("internalServerException", UpstreamServerError, 500),
            ("modelErrorException", UpstreamServerError, 424),
            ("modelNotReadyException", RateLimitError, 429),
            ("modelTimeoutException", DeadlineError, 408),
            ("accessDeniedException", PermissionDeniedError, 403),
            ("resourceNotFoundException", NotFoundError, 404),
            ("somethingNew", UpstreamServerError, 500),
        ],
    )
    def test_r51_an_exception_before_the_first_word_comes_before_any_event(self, name, expected, status):
        data = steps()[0] + frame(name, {"message": "no"}, kind="exception")
        with pytest.raises(expected, match=r"^no$") as caught:
            next(iter_sync(events(chunked(data))))
        assert type(caught.value) is expected
        assert caught.value.status == status

    def test_bytes_that_are_no_frames(self):
        whole = stream_of()
        for wrong in (
            b"<html><body>no</body></html>",
            whole[:20] + b"X" + whole[21:],
            bytes(12),
            frame("contentBlockDelta", b"{"),
            (2**31).to_bytes(4) + whole[4:],
        ):
            with pytest.raises(UpstreamServerError) as caught:
                read(wrong)
            assert caught.value.code == "unexpected_upstream_answer"


# --- signatures

KEYS = {
    "aws_access_key_id": "AKIDEXAMPLE",
    "aws_secret_access_key": "wJalrXUtnFEMI",
    "aws_region_name": "eu-west-1",
}


@pytest.fixture(autouse=True)
def no_aws_of_this_machine(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


def signature(request: Outgoing, secret: str, region: str) -> str:
    """AWS Signature Version 4 by the book, from what the server sees."""
    parts = urllib.parse.urlsplit(request.url)
    words = dict(
        word.split("=", 1) for word in request.headers["authorization"].partition(" ")[2].split(", ")
    )
    names = words["SignedHeaders"].split(";")
    seen = {**request.headers, "host": parts.netloc}
    canonical = [
        request.method,
        urllib.parse.quote(parts.path, safe="/-_.~"),
        parts.query,
        *(f"{name}:{seen[name]}" for name in names),
        "",
        ";".join(names),
        hashlib.sha256(request.body).hexdigest(),
    ]
    moment = request.headers["x-amz-date"]
    scope = f"{moment[:8]}/{region}/bedrock/aws4_request"
    assert words["Credential"] == f"AKIDEXAMPLE/{scope}"
    assert {"host", "x-amz-date", "content-type"} <= set(names)
    digest = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
    key = f"AWS4{secret}".encode()
    for word in scope.split("/"):
        key = hmac.digest(key, word.encode(), "sha256")
    return hmac.new(key, f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{digest}".encode(), "sha256").hexdigest()


def signed(to: Target, signer: BedrockSigner | None = None) -> Outgoing:
    signer = signer or BedrockSigner()
    to = signer.located(to)
    return signer.signed(to, build(to, "chat", {"messages": HI}, False))


class TestSignatures:
    @pytest.mark.parametrize("model", [CLAUDE, "arn:aws:bedrock:eu-west-1:1:application-inference-profile/x"])
    @pytest.mark.parametrize("token", [None, "session-token"])
    def test_a_request_is_signed(self, model, token):
        request = signed(target(model, connection={**KEYS, "aws_session_token": token}))
        expected = signature(request, KEYS["aws_secret_access_key"], "eu-west-1")
        assert request.headers["authorization"].endswith(f"Signature={expected}")
        assert request.headers.get("x-amz-security-token") == token
        assert request.headers["accept"] == "application/json"

    def test_an_api_key_needs_no_signature(self):
        to = target(headers={"authorization": "Bearer k"})
        request = build(to, "chat", {"messages": HI}, False)
        assert BedrockSigner().signed(to, request) is request

    def test_a_region_in_the_address(self):
        keys = {name: value for name, value in KEYS.items() if name != "aws_region_name"}
        for base, region in (
            ("https://bedrock-runtime.us-east-2.amazonaws.com", "us-east-2"),
            ("https://bedrock-runtime-fips.us-east-2.amazonaws.com", "us-east-2"),
            ("https://vpce-1.bedrock-runtime.us-east-2.vpce.amazonaws.com", "us-east-2"),
        ):
            request = signed(target(base=base, connection=keys))
            assert (
                signature(request, KEYS["aws_secret_access_key"], region) in request.headers["authorization"]
            )

    def test_a_profile_says_all(self, no_aws_of_this_machine):
        (no_aws_of_this_machine / "config").write_text("[profile work]\nregion = ap-south-1\n")
        (no_aws_of_this_machine / "credentials").write_text(
            "[work]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = abc\n"
        )
        request = signed(target(base="", connection={"aws_profile_name": "work"}))
        assert request.url.startswith("https://bedrock-runtime.ap-south-1.amazonaws.com/model/")
        assert signature(request, "abc", "ap-south-1") in request.headers["authorization"]

    def test_what_is_missing_is_told(self):
        with pytest.raises(ConfigError, match="needs aws_region_name"):
            BedrockSigner().located(target(base=""))
        with pytest.raises(AuthenticationError, match="no AWS credentials") as caught:
            signed(target())
        assert caught.value.code == "no_credentials"
        with pytest.raises(ConfigError, match="AWS settings are wrong"):
            signed(target(connection={"aws_profile_name": "absent"}))

    def test_credentials_that_come_later_are_found(self, monkeypatch):
        signer = BedrockSigner()
        with pytest.raises(AuthenticationError):
            signed(target(), signer)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc")
        assert signature(signed(target(), signer), "abc", "eu-west-1")

    @pytest.mark.parametrize(
        "base", ["https://h.example", "https://bedrock-runtime.eu-west-1.amazonaws.com.h.example"]
    )
    def test_credentials_of_the_environment_go_to_aws_only(self, base, monkeypatch):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc")
        with pytest.raises(AuthenticationError, match="go to AWS only"):
            signed(target(base=base, connection={"aws_region_name": "eu-west-1"}))
        request = signed(target(base=base, connection=KEYS))
        assert (
            signature(request, KEYS["aws_secret_access_key"], "eu-west-1") in request.headers["authorization"]
        )

    def test_credentials_are_looked_for_once(self):
        signer = BedrockSigner()
        for _ in range(3):
            signed(target(connection=KEYS), signer)
        assert len(signer._sessions) == 1
        for name in ("aws_session_token", "aws_region_name"):
            signed(target(connection={**KEYS, name: "us-west-2"}), signer)
        assert len(signer._sessions) == 3
        for number in range(300):
            signed(target(connection={**KEYS, "aws_secret_access_key": str(number)}), signer)
        assert len(signer._sessions) == 256

    def test_a_role_is_assumed(self):
        with moto.mock_aws():
            role = {"aws_role_name": "arn:aws:iam::123456789012:role/r", "aws_session_name": "it-is-me"}
            signer = BedrockSigner()
            request = signed(target(connection={**KEYS, **role}), signer)
            signed(target(connection=KEYS), signer)
            signed(target(connection={**KEYS, **role, "aws_session_name": "another"}), signer)
            assert len(signer._sessions) == 3
        assert "Credential=ASIA" in request.headers["authorization"]
        assert request.headers["x-amz-security-token"]
