"""OpenAI's chat completions over Anthropic's Messages API: what is sent, and what its answers become."""

from __future__ import annotations

import copy
import json
import urllib.request
from collections.abc import AsyncIterator, Iterable, Mapping
from itertools import pairwise

import pytest
from anthropic.types import Message
from anthropic.types.message_create_params import (
    MessageCreateParams,
    MessageCreateParamsBase,
    MessageCreateParamsStreaming,
)
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming._deltas import accumulate_delta
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from llm_middleware._drive import iter_sync
from llm_middleware.errors import (
    AuthenticationError,
    BadRequestError,
    ContextWindowExceededError,
    PermissionDeniedError,
    RateLimitError,
    UpstreamConnectionError,
    UpstreamServerError,
)
from llm_middleware.providers.anthropic import answer, build, events, failure
from llm_middleware.providers.registry import registry
from llm_middleware.providers.target import Target, target_of
from llm_middleware.routing.deployment import Deployment
from llm_middleware.testing import FakeUpstream

HI = [{"role": "user", "content": "hi"}]
SAID_HI = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
PARAMS = TypeAdapter(MessageCreateParams)
FIELDS = MessageCreateParamsStreaming.__annotations__.keys() | MessageCreateParamsBase.__annotations__.keys()
FIELDS |= {"temperature", "top_p", "top_k"}  # the SDK has given them up
OLD, NEW = "claude-sonnet-4-5-20250929", "claude-opus-4-7"


def target(model=NEW, base="https://api.anthropic.com", headers=None, **more) -> Target:
    headers = {"x-api-key": "k", **(headers or {})}
    return Target(provider=registry()["anthropic"], model=model, base_url=base, headers=headers, **more)


def spent(value: object) -> None:
    """Look at all of a lazily validated value."""
    if isinstance(value, Mapping):
        for item in value.values():
            spent(item)
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for item in value:
            spent(item)


def sent(to: Target | None = None, stream=False, **body: object) -> dict:
    """The fields that go over the wire, which Anthropic's own SDK would take."""
    fields = json.loads(build(to or target(), "chat", {"messages": HI, **body}, stream).body)
    assert fields.keys() <= FIELDS
    spent(PARAMS.validate_python(fields))
    return fields


def turns(*messages: object) -> list:
    return sent(messages=list(messages))["messages"]


def content(*parts: object) -> list:
    return turns({"role": "user", "content": list(parts)})[0]["content"]


def refused(to: Target | None = None, **body: object) -> BadRequestError:
    with pytest.raises(BadRequestError) as caught:
        build(to or target(), "chat", {"messages": HI, **body}, False)
    return caught.value


class TestRequests:
    def test_a_chat_is_exactly_this(self):
        body = {"model": "group", "messages": HI, "max_tokens": 9}
        request = build(target(), "chat", body, False)
        assert request.method == "POST"
        assert request.url == "https://api.anthropic.com/v1/messages"
        assert request.headers == {
            "content-type": "application/json",
            "accept": "application/json",
            "anthropic-version": "2023-06-01",
            "x-api-key": "k",
        }
        assert request.body == (
            b'{"model":"claude-opus-4-7","max_tokens":9,'
            b'"messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}]}'
        )

    def test_a_stream_is_asked_for_by_the_argument(self):
        body = {"messages": HI, "stream": False, "stream_options": {"include_usage": True}}
        request = build(target(), "chat", body, True)
        assert request.headers["accept"] == "text/event-stream"
        assert json.loads(request.body)["stream"] is True
        assert "stream_options" not in json.loads(request.body)
        assert "stream" not in sent(stream=False)

    @pytest.mark.parametrize(
        "base",
        [
            "https://h.example",
            "https://h.example/v1",
            "https://h.example/v1/",
            "https://h.example/v1/messages",
        ],
    )
    def test_addresses(self, base):
        assert (
            build(target(base=base), "chat", {"messages": HI}, False).url == "https://h.example/v1/messages"
        )

    def test_an_address_below_another_path(self):
        url = build(target(base="https://h.example/anthropic"), "chat", {"messages": HI}, False).url
        assert url == "https://h.example/anthropic/v1/messages"

    @pytest.mark.parametrize("kind", ["text", "embedding", "transcription", "responses"])
    def test_there_is_only_chat(self, kind):
        with pytest.raises(BadRequestError, match=f"no '{kind}' requests") as caught:
            build(target(), kind, {"input": "a"}, False)
        assert caught.value.param == "kind"

    def test_headers_of_the_deployment_have_the_last_word_and_betas_join(self):
        to = target(headers={"anthropic-version": "2026-10-21", "anthropic-beta": "a-1"})
        body = {"messages": HI, "anthropic_beta": ["b-2", "c-3"]}
        request = build(to, "chat", body, False)
        assert request.headers["anthropic-version"] == "2026-10-21"
        assert request.headers["anthropic-beta"] == "a-1,b-2,c-3"
        assert "anthropic_beta" not in json.loads(request.body)
        one = build(target(), "chat", {"messages": HI, "anthropic_beta": "b-2"}, False)
        assert one.headers["anthropic-beta"] == "b-2"

    @pytest.mark.parametrize("beta", ["a\r\nx-api-key: z", ["a", 1], {"a": 1}, "é"])
    def test_a_beta_is_a_name(self, beta):
        assert refused(anthropic_beta=beta).param == "anthropic_beta"

    def test_the_callers_body_does_not_change(self):
        messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, *HI]
        body = {
            "messages": messages,
            "tools": [function("f")],
            "user": "u",
            "output_config": {"effort": "low"},
        }
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
        before = copy.deepcopy(body)
        build(target(drop=frozenset(["user"])), "chat", body, True)
        assert body == before

    def test_what_json_cannot_hold_is_named(self):
        assert refused(top_k=float("nan")).param == "top_k"


class TestMessages:
    def test_system_and_developer_messages_are_hoisted(self):
        fields = sent(
            messages=[
                {"role": "system", "content": "one"},
                *HI,
                {"role": "developer", "content": [{"type": "text", "text": "two"}]},
            ]
        )
        assert fields["system"] == [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        assert fields["messages"] == SAID_HI

    def test_turns_of_one_role_become_one(self):
        assert turns(
            *HI, {"role": "user", "content": "there"}, {"role": "assistant", "content": "a"}, *HI
        ) == [
            {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            *SAID_HI,
        ]

    def test_calls_and_their_results_in_one_turn(self):
        calls = [call("call_1", "f", '{"a":1}'), call("call.2/x", "g", "")]
        made = turns(
            *HI,
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "call_1", "content": "one"},
            {"role": "tool", "tool_call_id": "call.2/x", "content": [{"type": "text", "text": "two"}, IMAGE]},
            {"role": "user", "content": "go on"},
        )
        assert made[1:] == [
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": 1}},
                    {"type": "tool_use", "id": "call_2_x", "name": "g", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_1",
                        "content": [{"type": "text", "text": "one"}],
                    },
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_2_x",
                        "content": [{"type": "text", "text": "two"}, IMAGE_BLOCK],
                    },
                    {"type": "text", "text": "go on"},
                ],
            },
        ]

    def test_an_empty_result_and_one_that_failed(self):
        message = {"role": "tool", "tool_call_id": "c", "content": "", "is_error": True}
        block = {"type": "tool_result", "tool_use_id": "c", "is_error": True}
        assert turns(message) == [{"role": "user", "content": [block]}]

    def test_thinking_comes_back_as_it_was_and_only_if_it_is_anthropics(self):
        blocks = [
            {"index": 0, "type": "thinking", "thinking": "hm", "signature": "s"},
            {"index": 1, "type": "redacted_thinking", "data": "d"},
            {"type": "thinking", "thinking": "another's"},
        ]
        said = {"role": "assistant", "content": "a", "thinking_blocks": blocks, "reasoning_content": "hm"}
        assert turns(*HI, said, *HI)[1]["content"] == [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "redacted_thinking", "data": "d"},
            {"type": "text", "text": "a"},
        ]

    def test_texts_of_nothing_are_left_out(self):
        assert turns({"role": "user", "content": ""}, *HI, {"role": "assistant", "content": " \n"}) == SAID_HI

    def test_an_answer_to_continue_does_not_end_in_space(self):
        assert turns(*HI, {"role": "assistant", "content": "It is "})[1]["content"] == [
            {"type": "text", "text": "It is"}
        ]
        assert turns({"role": "user", "content": "It is "})[0]["content"][0]["text"] == "It is "

    def test_marks_for_the_prompt_cache_stay(self):
        mark = {"type": "ephemeral", "ttl": "1h"}
        fields = sent(
            messages=[
                {"role": "system", "content": "s", "cache_control": mark},
                {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": mark}, IMAGE]},
                {"role": "assistant", "content": None, "tool_calls": [call("c", "f", "{}")]},
                {"role": "tool", "tool_call_id": "c", "content": "r", "cache_control": mark},
            ],
            tools=[{**function("f"), "cache_control": mark}],
            cache_control=mark,
        )
        assert fields["system"] == [{"type": "text", "text": "s", "cache_control": mark}]
        assert fields["messages"][0]["content"] == [
            {"type": "text", "text": "a", "cache_control": mark},
            IMAGE_BLOCK,
        ]
        assert fields["messages"][2]["content"][0]["cache_control"] == mark
        assert fields["tools"][0]["cache_control"] == mark
        assert fields["cache_control"] == mark

    @pytest.mark.parametrize(
        ("messages", "param"),
        [
            (None, "messages"),
            ([], "messages"),
            ("hi", "messages"),
            ([{"role": "system", "content": "only"}], "messages"),
            (["hi"], "messages[0]"),
            ([*HI, {"role": "function", "content": "a"}], "messages[1].role"),
            ([{"role": ["user"], "content": "a"}], "messages[0].role"),
            ([{"role": "user", "content": 1}], "messages[0].content"),
            ([{"role": "user", "content": [1]}], "messages[0].content[0]"),
            ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
            ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0]"),
            ([{"role": "tool", "content": "a"}], "messages[0].tool_call_id"),
            ([{"role": "assistant", "tool_calls": {}, "content": "a"}, *HI], None),
            ([{"role": "assistant", "tool_calls": "x"}], "messages[0].tool_calls"),
            ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
            (
                [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": 1}}]}],
                "messages[0].tool_calls[0].function.name",
            ),
        ],
    )
    def test_a_wrong_message_is_named(self, messages, param):
        if param is None:
            assert len(turns(*messages)) == 2
        else:
            assert refused(messages=messages).param == param

    @pytest.mark.parametrize("arguments", ["{", "[1]", '"a"', "1", "[" * 100_000])
    def test_arguments_are_a_json_object(self, arguments):
        message = {"role": "assistant", "tool_calls": [call("c", "f", arguments)]}
        assert refused(messages=[message]).param == "messages[0].tool_calls[0].function.arguments"


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "high"}}
IMAGE_BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


def call(number: str, name: str, arguments: str) -> dict:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def function(name: str, **more: object) -> dict:
    return {"type": "function", "function": {"name": name, **more}}


def file(**fields: object) -> dict:
    return {"type": "file", "file": fields}


def base64(media: str, data: str = "AAAA") -> dict:
    return {"type": "base64", "media_type": media, "data": data}


class TestParts:
    @pytest.mark.parametrize(
        ("part", "block"),
        [
            (IMAGE, IMAGE_BLOCK),
            (
                {"type": "image_url", "image_url": "DATA:image/jpg;base64,AAAA"},
                {"source": base64("image/jpeg")},
            ),
            (
                {"type": "image_url", "image_url": {"url": "https://h.example/a.png"}},
                {"source": {"type": "url", "url": "https://h.example/a.png"}},
            ),
            (
                file(file_data="data:application/pdf;base64,AAAA", filename="a.pdf"),
                {"type": "document", "source": base64("application/pdf"), "title": "a.pdf"},
            ),
            (file(file_data="data:application/pdf,%00%00%00"), {"source": base64("application/pdf")}),
            (file(file_data="data:image/gif;base64,AAAA"), {"type": "image", "source": base64("image/gif")}),
            (
                file(file_data="data:text/markdown;base64,Z3LDvMOfZQ=="),
                {"source": {"type": "text", "media_type": "text/plain", "data": "grüße"}},
            ),
            (file(file_id="file_1"), {"type": "document", "source": {"type": "file", "file_id": "file_1"}}),
            (
                file(file_id="https://h.example/a.pdf"),
                {"type": "document", "source": {"type": "url", "url": "https://h.example/a.pdf"}},
            ),
            (IMAGE_BLOCK, IMAGE_BLOCK),
        ],
    )
    def test_images_and_files(self, part, block):
        [made] = content(part)
        assert {name: made.get(name) for name in block} == block
        assert set(made) <= {"type", "source", "title"}

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url"},
            {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
            {"type": "image_url", "image_url": {"url": 1}},
            {"type": "file", "file": "a"},
            file(),
            file(file_data="AAAA"),
            file(file_data="data:text/plain;base64,!!"),
            file(file_data="data:text/plain;base64,/w=="),
            file(file_data="data:application/zip;base64,AAAA"),
        ],
    )
    def test_others_are_named(self, part):
        error = refused(messages=[{"role": "user", "content": [part]}])
        assert error.param.startswith("messages[0].content[0]")


class TestParameters:
    def test_the_limit(self):
        assert sent()["max_tokens"] == 4096
        assert sent(max_tokens=5)["max_tokens"] == 5
        assert sent(max_tokens=5, max_completion_tokens=7)["max_tokens"] == 7
        assert sent(max_tokens=None)["max_tokens"] == 4096
        assert refused(max_tokens="5").param == "max_tokens"

    def test_the_longest_answer_of_the_model_is_the_default_where_it_is_known(self):
        large, small = target(OLD, max_output_tokens=64_000), target(OLD, max_output_tokens=1500)
        assert sent(large)["max_tokens"] == 64_000
        assert sent(large, max_tokens=5)["max_tokens"] == 5
        fields = sent(large, reasoning_effort="high")  # what is thought counts as well
        assert (fields["thinking"]["budget_tokens"], fields["max_tokens"]) == (4096, 64_000)
        fields = sent(small, reasoning_effort="high")
        assert (fields["thinking"]["budget_tokens"], fields["max_tokens"]) == (1499, 1500)
        assert "thinking" not in sent(target(OLD, max_output_tokens=1024), reasoning_effort="low")

    @pytest.mark.parametrize(
        ("told", "sends"), [(8192, 8192), (None, 4096), ("8192", 4096), (0, 4096), (True, 4096)]
    )
    def test_the_deployment_tells_it(self, told, sends):
        named = Deployment(
            id="d", group="g", provider="anthropic", model=NEW, info={"max_output_tokens": told}
        )
        assert sent(target_of(named, environ={}))["max_tokens"] == sends

    def test_names_that_differ(self):
        fields = sent(stop="END", user="u-1", service_tier="default", temperature=0.5, top_p=0.9, top_k=4)
        assert fields == {
            "model": NEW,
            "max_tokens": 4096,
            "messages": SAID_HI,
            "stop_sequences": ["END"],
            "metadata": {"user_id": "u-1"},
            "service_tier": "standard_only",
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 4,
        }
        assert sent(stop=["a", "b"])["stop_sequences"] == ["a", "b"]
        assert sent(metadata={"user_id": "m", "x": "y"}, user="u")["metadata"] == {"user_id": "m"}
        assert sent(safety_identifier="s")["metadata"] == {"user_id": "s"}

    def test_what_says_nothing_of_the_answer_is_not_sent(self):
        quiet = {"store": True, "prompt_cache_key": "k", "metadata": {"a": "b"}, "n": 1, "logprobs": False}
        quiet |= {
            "presence_penalty": 0.0,
            "frequency_penalty": 0,
            "modalities": ["text"],
            "logit_bias": {},
            "top_logprobs": 0,
        }
        assert sent(**quiet, seed=None) == {"model": NEW, "max_tokens": 4096, "messages": SAID_HI}

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("n", 2),
            ("logprobs", True),
            ("seed", 1),
            ("presence_penalty", 0.5),
            ("logit_bias", {"1": 2}),
            ("modalities", ["text", "audio"]),
            ("functions", [{"name": "f"}]),
            ("service_tier", "flex"),
            ("response_format", {"type": "json_object"}),
        ],
    )
    def test_what_is_not_there_is_named_or_dropped(self, name, value):
        error = refused(**{name: value})
        assert (error.param, error.code, error.status) == (name, "unsupported_parameter", 400)
        assert name not in sent(target(drop_params=True), **{name: value})
        assert name not in sent(target(drop=frozenset([name])), **{name: value})

    def test_what_is_anthropics_is_sent_as_it_is(self):
        fields = sent(target(extra_body={"top_k": 5, "speed": "fast"}), container="c", top_k=1)
        assert (fields["container"], fields["top_k"], fields["speed"]) == ("c", 5, "fast")

    def test_heat_ends_at_one(self):
        assert sent(temperature=1.7)["temperature"] == 1
        assert sent(temperature=0)["temperature"] == 0

    @pytest.mark.parametrize(
        ("model", "headers", "more", "kept"),
        [
            (OLD, {}, {}, True),
            ("claude-opus-4-6", {}, {}, True),
            ("claude-opus-4-7", {}, {}, False),
            ("claude-mythos-preview", {}, {}, False),
            (OLD, {"anthropic-version": "2026-10-21"}, {}, False),
            (OLD, {}, {"reasoning_effort": "low"}, False),
            (OLD, {}, {"thinking": {"type": "disabled"}}, True),
        ],
    )
    def test_sampling_is_dropped_where_it_is_refused(self, model, headers, more, kept):
        to = target(model, headers=headers, drop_params=True)
        assert ("temperature" in sent(to, temperature=0.2, **more)) is kept
        assert "temperature" in sent(target(model, headers=headers), temperature=0.2, **more)

    def test_stops_of_space_are_dropped_with_what_is_refused(self):
        assert sent(stop=["\n", "a"])["stop_sequences"] == ["\n", "a"]
        assert sent(target(drop_params=True), stop=["\n", "a"])["stop_sequences"] == ["a"]
        assert "stop_sequences" not in sent(target(drop_params=True), stop="\n")


class TestThinking:
    @pytest.mark.parametrize(
        ("effort", "budget"),
        [("minimal", 1024), ("low", 1024), ("medium", 2048), ("high", 4096), ("xhigh", 8192), ("max", 16384)],
    )
    @pytest.mark.parametrize("model", [OLD, "claude-opus-4-20250514", "claude-3-7-sonnet-20250219", "glm-5"])
    def test_older_models_have_a_budget_on_top_of_the_answer(self, model, effort, budget):
        fields = sent(target(model), reasoning_effort=effort)
        assert fields["thinking"] == {"type": "enabled", "budget_tokens": budget}
        assert fields["max_tokens"] == 4096 + budget

    @pytest.mark.parametrize(
        ("most", "thinking"),
        [
            (3000, {"type": "enabled", "budget_tokens": 2999}),
            (1025, {"type": "enabled", "budget_tokens": 1024}),
        ],
    )
    def test_a_budget_fits_in_the_callers_limit(self, most, thinking):
        fields = sent(target(OLD), reasoning_effort="high", max_tokens=most)
        assert (fields["thinking"], fields["max_tokens"]) == (thinking, most)

    def test_a_limit_without_room_for_a_budget_has_none(self):
        assert "thinking" not in sent(target(OLD), reasoning_effort="high", max_tokens=1024)

    @pytest.mark.parametrize(
        "model", [NEW, "claude-sonnet-4-6", "claude-sonnet-5", "claude-haiku-5-5", "claude-mythos-preview"]
    )
    @pytest.mark.parametrize(
        ("effort", "expected"), [("minimal", "low"), ("medium", "medium"), ("max", "max")]
    )
    def test_newer_models_have_an_effort(self, model, effort, expected):
        fields = sent(target(model), reasoning_effort=effort)
        assert fields["thinking"] == {"type": "adaptive"}
        assert fields["output_config"] == {"effort": expected}
        assert fields["max_tokens"] == 4096

    def test_the_models_own_name_decides(self):
        fields = sent(target("my-claude", base_model=OLD), reasoning_effort="low")
        assert fields["thinking"] == {"type": "enabled", "budget_tokens": 1024}

    def test_the_callers_own_thinking_decides(self):
        thinking = {"type": "enabled", "budget_tokens": 9000}
        fields = sent(target(OLD), thinking=thinking, reasoning_effort="low")
        assert (fields["thinking"], fields["max_tokens"]) == (thinking, 13096)

    def test_none_and_what_is_no_effort(self):
        assert "thinking" not in sent(reasoning_effort="none")
        assert refused(reasoning_effort="much").param == "reasoning_effort"
        assert refused(reasoning_effort={"effort": "low"}).param == "reasoning_effort"


class TestTools:
    def test_functions(self):
        schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
        own = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
        tools = [function("f", description="does f", parameters=schema, strict=True), function("g"), own]
        assert sent(tools=tools)["tools"] == [
            {"name": "f", "input_schema": schema, "description": "does f", "strict": True},
            {"name": "g", "input_schema": {"type": "object", "properties": {}}},
            own,
        ]
        assert "tools" not in sent(tools=[])

    @pytest.mark.parametrize(
        ("tool", "param"),
        [
            (1, "tools[0]"),
            ({"type": "custom", "custom": {"name": "c"}}, "tools[0]"),
            ({"type": "function"}, "tools[0]"),
            (function("f", parameters=[1]), "tools[0]"),
        ],
    )
    def test_a_wrong_tool_is_named(self, tool, param):
        assert refused(tools=[tool]).param == param

    def test_tools_are_a_list(self):
        assert refused(tools={"a": 1}).param == "tools"

    @pytest.mark.parametrize(
        ("said", "parallel", "choice"),
        [
            (None, None, None),
            (None, True, None),
            (None, False, {"type": "auto", "disable_parallel_tool_use": True}),
            ("auto", None, {"type": "auto"}),
            ("none", False, {"type": "none"}),
            ("required", None, {"type": "any"}),
            ("required", False, {"type": "any", "disable_parallel_tool_use": True}),
            (function("f"), None, {"type": "tool", "name": "f"}),
            (function("f"), False, {"type": "tool", "name": "f", "disable_parallel_tool_use": True}),
            ({"type": "any"}, None, {"type": "any"}),
        ],
    )
    def test_choices(self, said, parallel, choice):
        fields = sent(tools=[function("f")], tool_choice=said, parallel_tool_calls=parallel)
        assert fields.get("tool_choice") == choice

    def test_a_choice_needs_tools_and_a_known_word(self):
        assert "tool_choice" not in sent(tool_choice="none", parallel_tool_calls=False)
        for wrong in ("any", {"type": "allowed_tools"}, {"type": "function", "function": {}}, 1):
            assert refused(tools=[function("f")], tool_choice=wrong).param == "tool_choice"


class TestSchemas:
    def test_a_schema_is_a_native_output(self):
        schema = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "description": "top",
            "properties": {
                "n": {"type": "integer", "minimum": 1, "maximum": 9, "description": "a number"},
                "s": {"type": "string", "format": "date", "pattern": "^2"},
                "t": {"type": "string", "format": "regex"},
                "l": {"type": "array", "items": {"$ref": "#/$defs/o"}, "minItems": 1, "maxItems": 3},
                "u": {"oneOf": [{"type": "null"}, {"const": 1}, {"enum": ["a"], "default": "a"}]},
                "title": {"type": "string"},
            },
            "required": ["n"],
            "$defs": {"o": {"type": "object", "properties": {}, "additionalProperties": True}},
        }
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
        assert sent(response_format=wanted, reasoning_effort="low")["output_config"] == {
            "effort": "low",
            "format": {
                "type": "json_schema",
                "schema": {
                    "type": "object",
                    "description": "top",
                    "properties": {
                        "n": {"type": "integer", "description": "a number\n\n{minimum: 1, maximum: 9}"},
                        "s": {"type": "string", "format": "date", "description": "{pattern: ^2}"},
                        "t": {"type": "string", "description": "{format: regex}"},
                        "l": {
                            "type": "array",
                            "items": {"$ref": "#/$defs/o"},
                            "minItems": 1,
                            "description": "{maxItems: 3}",
                        },
                        "u": {"anyOf": [{"type": "null"}, {"const": 1}, {"enum": ["a"], "default": "a"}]},
                        "title": {"type": "string"},
                    },
                    "required": ["n"],
                    "$defs": {"o": {"type": "object", "properties": {}, "additionalProperties": False}},
                    "additionalProperties": False,
                },
            },
        }

    @pytest.mark.parametrize("wrong", ["x", [1], 1.5, [["a", "b"]]])
    def test_an_output_config_is_a_mapping(self, wrong):
        assert refused(output_config=wrong).param == "output_config"

    def test_text_asks_for_nothing(self):
        assert "output_config" not in sent(response_format={"type": "text"})
        assert sent(output_config={"effort": "max"})["output_config"] == {"effort": "max"}

    def test_an_output_config_of_the_callers_stays(self):
        wanted = {"type": "json_schema", "json_schema": {"schema": {"allOf": [{"type": "object"}]}}}
        made = sent(output_config={"effort": "max"}, response_format=wanted, reasoning_effort="low")
        assert made["output_config"] == {
            "effort": "max",
            "format": {
                "type": "json_schema",
                "schema": {"allOf": [{"type": "object", "additionalProperties": False}]},
            },
        }

    def test_a_schema_that_is_none_is_named(self):
        deep: dict = {}
        for _ in range(100_000):
            deep = {"items": deep}
        for schema in (None, [1], deep):
            wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
            assert refused(response_format=wanted).param == "response_format"
        assert refused(response_format={"type": "json_schema"}).param == "response_format"
        while deep:  # taken apart here: its end would be as deep
            deep = deep["items"]


# --- answers

BLOCKS = [
    {"type": "thinking", "thinking": "let me see", "signature": "sig=="},
    {"type": "redacted_thinking", "data": "xyz"},
    {"type": "text", "text": "It is 18 °C "},
    {
        "type": "tool_use",
        "id": "toolu_1",
        "name": "weather",
        "input": {"city": "Köln", "n": [1, {"a": None}]},
    },
    {"type": "tool_use", "id": "toolu_2", "name": "now", "input": {}},
    {"type": "text", "text": "there."},
]
USAGE = {
    "input_tokens": 10,
    "output_tokens": 30,
    "cache_read_input_tokens": 500,
    "cache_creation_input_tokens": 40,
    "output_tokens_details": {"thinking_tokens": 12},
    "service_tier": "standard",
}
COUNTED = {
    "prompt_tokens": 550,
    "completion_tokens": 30,
    "total_tokens": 580,
    "prompt_tokens_details": {"cached_tokens": 500, "cache_creation_tokens": 40},
    "cache_read_input_tokens": 500,
    "cache_creation_input_tokens": 40,
    "completion_tokens_details": {"reasoning_tokens": 12},
}


def message(blocks=BLOCKS, reason: str | None = "tool_use", **more: object) -> dict:
    fields = {"id": "msg_1", "type": "message", "role": "assistant", "model": NEW, "content": blocks}
    fields |= {"stop_reason": reason, "stop_sequence": None, "usage": USAGE, **more}
    return fields


def completed(given: object) -> dict:
    made = answer(json.dumps(given).encode(), clock=lambda: 1_700_000_000.5)
    ChatCompletion.model_validate_json(made)
    return json.loads(made)


class TestAnswers:
    def test_an_answer_is_exactly_this(self):
        Message.model_validate(message())
        assert completed(message()) == {
            "id": "msg_1",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": NEW,
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": "It is 18 °C there.",
                        "refusal": None,
                        "tool_calls": [
                            call("toolu_1", "weather", '{"city":"Köln","n":[1,{"a":null}]}'),
                            call("toolu_2", "now", "{}"),
                        ],
                        "reasoning_content": "let me see",
                        "thinking_blocks": BLOCKS[:2],
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
            ("stop_sequence", "stop"),
            ("max_tokens", "length"),
            ("model_context_window_exceeded", "length"),
            ("tool_use", "tool_calls"),
            ("refusal", "content_filter"),
            ("pause_turn", "stop"),
            ("what is new", "stop"),
            (None, "stop"),
        ],
    )
    def test_why_it_ended(self, reason, finish):
        assert completed(message(reason=reason))["choices"][0]["finish_reason"] == finish
        assert streamed(stream_of(message(reason=reason)))[0]["finish_reason"] == finish

    def test_a_refusal_says_why(self):
        details = {"type": "refusal", "category": "bio", "explanation": "not that"}
        refusing = message([], "refusal", stop_details=details)
        spoken = completed(refusing)["choices"][0]["message"]
        assert spoken == {"role": "assistant", "content": "", "refusal": "not that"}
        assert streamed(stream_of(refusing))[0]["delta"]["refusal"] == "not that"

    def test_only_calls_have_no_content(self):
        assert completed(message(BLOCKS[3:5]))["choices"][0]["message"]["content"] is None

    def test_a_name_for_an_answer_without_one(self):
        nameless = message(model=None)
        assert json.loads(answer(json.dumps(nameless).encode(), model="m"))["model"] == "m"
        assert {chunk["model"] for chunk in parsed(read(stream_of(nameless), model="m"))} == {"m"}
        assert json.loads(answer(json.dumps(message()).encode(), model="m"))["model"] == NEW

    def test_tokens_without_a_cache(self):
        usage = completed(message(usage={"input_tokens": 3, "output_tokens": 4}))["usage"]
        assert (usage["prompt_tokens"], usage["total_tokens"]) == (3, 7)
        assert "completion_tokens_details" not in usage

    def test_citations_stay(self):
        cited = {"type": "char_location", "cited_text": "a", "document_index": 0}
        spoken = completed(message([{"type": "text", "text": "a", "citations": [cited]}]))["choices"][0][
            "message"
        ]
        assert spoken["provider_specific_fields"] == {"citations": [[cited]]}
        begun, told = (
            {"type": "message_start", "message": message([])},
            {"type": "citations_delta", "citation": cited},
        )
        steps = [begun, {"type": "content_block_delta", "index": 0, "delta": told}, {"type": "message_stop"}]
        [choice] = streamed(b"".join(b"data: " + json.dumps(step).encode() + b"\n\n" for step in steps))
        assert choice["delta"]["provider_specific_fields"] == {"citation": cited}

    @pytest.mark.parametrize(
        "body",
        [b"", b"<html>", b"[]", b"{}", b'{"content":"a"}', b'{"content":[1]}', b"[" * 100_000, b"\xff"],
    )
    def test_what_is_no_message_is_the_providers_fault(self, body):
        with pytest.raises(UpstreamServerError) as caught:
            answer(body)
        assert (caught.value.status, caught.value.code) == (502, "unexpected_upstream_answer")

    def test_an_error_in_place_of_a_message(self):
        with pytest.raises(UpstreamServerError) as caught:
            answer(error("overloaded_error", "Overloaded"))
        assert (caught.value.status, caught.value.message) == (529, "Overloaded")

    def test_half_a_surrogate_pair_is_escaped(self):
        made = answer(json.dumps(message([{"type": "text", "text": "a\ud800"}])).encode())
        assert b'"content":"a\\ud800"' in made

    def test_an_answer_goes_back_as_it_was(self):
        spoken = completed(message(BLOCKS[:5]))["choices"][0]["message"]
        results = [{"role": "tool", "tool_call_id": c["id"], "content": "r"} for c in spoken["tool_calls"]]
        again = turns(*HI, spoken, *results)
        assert again[1]["content"] == BLOCKS[:5]
        assert [block["tool_use_id"] for block in again[2]["content"]] == ["toolu_1", "toolu_2"]


def error(kind: str, text: str) -> bytes:
    return json.dumps({"type": "error", "error": {"type": kind, "message": text}}).encode()


class TestFailures:
    @pytest.mark.parametrize(
        ("status", "kind", "text", "expected", "shown"),
        [
            (400, "invalid_request_error", "max_tokens: Field required", BadRequestError, 400),
            (
                400,
                "invalid_request_error",
                "prompt is too long: 210000 tokens > 200000 maximum",
                ContextWindowExceededError,
                400,
            ),
            (
                400,
                "invalid_request_error",
                "input length and `max_tokens` exceed context limit: 199000 + 4096 > 200000",
                ContextWindowExceededError,
                400,
            ),
            (401, "authentication_error", "invalid x-api-key", AuthenticationError, 401),
            (402, "billing_error", "no credit", PermissionDeniedError, 402),
            (403, "permission_error", "not yours", PermissionDeniedError, 403),
            (413, "request_too_large", "Request exceeds the maximum size", BadRequestError, 413),
            (429, "rate_limit_error", "slow down", RateLimitError, 429),
            (500, "api_error", "Internal server error", UpstreamServerError, 500),
            (529, "overloaded_error", "Overloaded", UpstreamServerError, 529),
            (200, "overloaded_error", "Overloaded", UpstreamServerError, 529),
        ],
    )
    def test_anthropics_errors(self, status, kind, text, expected, shown):
        found = failure(status, {"retry-after": "7"}, error(kind, text))
        assert type(found) is expected
        assert (found.status, found.message, found.retry_after) == (shown, text, 7)


# --- streams


def stream_of(given: dict, pieces: int = 3, end: str = "\n") -> bytes:
    """A message as Anthropic streams it (https://platform.claude.com/docs/en/build-with-claude/streaming)."""
    begun = {**given, "content": [], "stop_reason": None}
    begun["usage"] = {**given["usage"], "output_tokens": 1}
    steps: list[dict] = [{"type": "message_start", "message": begun}, {"type": "ping"}]
    for index, block in enumerate(given["content"]):
        empty = {
            "text": {"text": ""},
            "thinking": {"thinking": "", "signature": ""},
            "tool_use": {"input": {}},
        }
        opened = {**block, **empty.get(block["type"], {})}
        steps.append({"type": "content_block_start", "index": index, "content_block": opened})
        steps += [
            {"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas(block, pieces)
        ]
        steps.append({"type": "content_block_stop", "index": index})
    ending = {"stop_reason": given["stop_reason"], "stop_details": given.get("stop_details")}
    last = {"output_tokens": given["usage"]["output_tokens"], "input_tokens": None}
    steps += [{"type": "message_delta", "delta": ending, "usage": last}, {"type": "message_stop"}]
    lines = [
        f"event: {step['type']}{end}data: {json.dumps(step, ensure_ascii=False)}{end}{end}" for step in steps
    ]
    return "".join(lines).encode()


def deltas(block: dict, pieces: int) -> list[dict]:
    def split(text: str) -> list[str]:
        size = max(1, len(text) // pieces)
        return [text[at : at + size] for at in range(0, len(text), size)]

    if block["type"] == "text":
        return [{"type": "text_delta", "text": piece} for piece in split(block["text"])]
    if block["type"] == "thinking":
        made = [{"type": "thinking_delta", "thinking": piece} for piece in split(block["thinking"])]
        return [*made, {"type": "signature_delta", "signature": block["signature"]}]
    if block["type"] == "tool_use":
        text = json.dumps(block["input"], ensure_ascii=False, separators=(",", ":")) if block["input"] else ""
        return [{"type": "input_json_delta", "partial_json": piece} for piece in ["", *split(text)]]
    return []


class Source:
    """Bytes as they come from a network: an async iterator that knows whether it was closed."""

    def __init__(self, *chunks: bytes) -> None:
        self.closed = False
        self._chunks = iter(chunks)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        for chunk in self._chunks:
            return chunk
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed = True


def read(*chunks: bytes, **options: object) -> list[bytes]:
    return list(iter_sync(events(Source(*chunks), clock=lambda: 7.0, **options)))


def parsed(made: list[bytes]) -> list[dict]:
    assert made[-1] == b"data: [DONE]\n\n"
    assert all(event.startswith(b"data: ") and event.endswith(b"\n\n") for event in made)
    found = [json.loads(event[6:]) for event in made[:-1]]
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk)
    return found


def streamed(*chunks: bytes) -> list[dict]:
    """The one choice of a stream, its pieces joined as OpenAI's SDK joins them."""
    whole: dict = {}
    for chunk in parsed(read(*chunks)):
        whole = accumulate_delta(whole, chunk)
    return whole["choices"]


class TestStreams:
    def test_a_stream_is_exactly_this(self):
        blocks = [
            {"type": "text", "text": "Hello"},
            {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
        ]
        made = parsed(read(stream_of(message(blocks), pieces=2), include_usage=True))
        head = {"id": "msg_1", "object": "chat.completion.chunk", "created": 7, "model": NEW}
        began = {"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": ""}}
        expected = [
            ({"role": "assistant", "content": "He"}, None),
            ({"content": "ll"}, None),
            ({"content": "o"}, None),
            ({"tool_calls": [began]}, None),
            ({"tool_calls": [{"index": 0, "function": {"arguments": '{"a'}}]}, None),
            ({"tool_calls": [{"index": 0, "function": {"arguments": '":1'}}]}, None),
            ({"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}, None),
            ({}, "tool_calls"),
        ]
        choices = [
            {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            for delta, finish in expected
        ]
        assert made == [
            *({**head, "choices": [choice], "usage": None} for choice in choices),
            {**head, "choices": [], "usage": COUNTED},
        ]

    def test_usage_is_told_only_where_it_is_asked_for(self):
        assert not any("usage" in chunk for chunk in parsed(read(stream_of(message()))))

    def test_a_stream_says_what_the_whole_answer_says(self):
        [choice] = streamed(stream_of(message()))
        spoken = completed(message())["choices"][0]["message"]
        for name in ("tool_calls", "thinking_blocks"):
            choice["delta"][name] = [
                {key: value for key, value in item.items() if key != "index"}
                for item in choice["delta"][name]
            ]
        assert choice["delta"] == {name: value for name, value in spoken.items() if name != "refusal"}
        assert choice["finish_reason"] == "tool_calls"

    def test_pieces_of_thinking_name_their_block(self):
        made = parsed(read(stream_of(message(BLOCKS[:2]), pieces=1)))
        assert [chunk["choices"][0]["delta"] for chunk in made[:3]] == [
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "let me see",
                "thinking_blocks": [{"index": 0, "type": "thinking", "thinking": "let me see"}],
            },
            {"thinking_blocks": [{"index": 0, "type": "thinking", "thinking": "", "signature": "sig=="}]},
            {"thinking_blocks": [{"index": 1, "type": "redacted_thinking", "data": "xyz"}]},
        ]

    @given(st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.integers(0, 3000), max_size=30), st.booleans())
    def test_where_it_is_cut_changes_nothing(self, end, cuts, single):
        whole = stream_of(message(), end=end)
        places = range(len(whole)) if single else sorted(cuts)
        bounds = [0, *places, len(whole)]
        chunks = [whole[a:b] for a, b in pairwise(bounds)]
        assert read(*chunks, include_usage=True) == read(stream_of(message()), include_usage=True)

    def test_a_last_event_without_a_blank_line_counts(self):
        assert read(stream_of(message()).rstrip(b"\n")) == read(stream_of(message()))

    def test_other_lines_and_unknown_events_do_not_count(self):
        extra = b': comment\nid: 3\nretry: 5\ndata: {"type":"new_event","index":[]}\n\n'
        extra += b'event: x\ndata:{"type":["content_block_delta"]}\n\n\n\n'
        assert read(stream_of(message()).replace(b"event: ping\n", extra)) == read(stream_of(message()))

    def test_a_server_that_gives_all_at_the_start_of_a_block(self):
        blocks = [
            {"type": "text", "text": "ab"},
            {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
        ]
        steps = [{"type": "message_start", "message": message([], None)}]
        for index, block in enumerate(blocks):
            steps.append({"type": "content_block_start", "index": index, "content_block": block})
            steps.append({"type": "content_block_stop", "index": index})
        steps.append({"type": "message_stop"})
        [choice] = streamed(b"".join(b"data: " + json.dumps(step).encode() + b"\n\n" for step in steps))
        assert choice["delta"]["content"] == "ab"
        assert choice["delta"]["tool_calls"][0]["function"]["arguments"] == '{"a":1}'
        assert choice["finish_reason"] == "stop"

    def test_r51_an_error_before_the_first_word_comes_before_any_event(self):
        start = stream_of(message()).partition(b"event: content_block_start")[0]
        source = Source(start, b"event: error\ndata: " + error("overloaded_error", "Overloaded") + b"\n\n")
        stream = iter_sync(events(source))
        with pytest.raises(UpstreamServerError, match=r"^Overloaded$") as caught:
            next(stream)
        assert caught.value.status == 529
        assert source.closed

    def test_r52_an_error_after_some_words_is_raised_after_them(self):
        start = stream_of(message([{"type": "text", "text": "abc"}])).partition(b"event: content_block_stop")[
            0
        ]
        last = b"data: " + error("rate_limit_error", "key sk-ant-abc is slow") + b"\n\n"
        stream = iter_sync(events(Source(start, last)))
        made = [json.loads(next(stream)[6:])["choices"][0]["delta"]["content"] for _ in range(3)]
        with pytest.raises(RateLimitError) as caught:
            next(stream)
        assert made == ["a", "b", "c"]
        assert caught.value.message == "key *** is slow"

    @pytest.mark.parametrize(
        "last", [b"event: message_stop", b"event: message_start", b"event: content_block_stop"]
    )
    def test_a_stream_that_ends_too_early(self, last):
        with pytest.raises(UpstreamConnectionError, match="ended before its last event"):
            read(stream_of(message()).partition(last)[0])

    @pytest.mark.parametrize("payload", [b"data: {\n\n", b"data: [1]\n\n", b"data: \xff\n\n"])
    def test_what_is_no_event_is_the_providers_fault(self, payload):
        with pytest.raises(UpstreamServerError) as caught:
            read(payload)
        assert (caught.value.status, caught.value.code) == (502, "unexpected_upstream_answer")

    def test_what_comes_after_the_last_event_is_read_and_forgotten(self):
        source = Source(stream_of(message()), b": more\n\n", b'data: {"type":"error"}\n\n')
        assert list(iter_sync(events(source)))[-1] == b"data: [DONE]\n\n"
        assert source.closed
        assert list(source._chunks) == []

    def test_a_connection_that_breaks_after_the_last_event_breaks_nothing(self):
        async def chunks() -> AsyncIterator[bytes]:
            yield stream_of(message())
            raise UpstreamConnectionError("broke off")

        assert list(iter_sync(events(chunks())))[-1] == b"data: [DONE]\n\n"

    def test_who_stops_reading_closes_the_source(self):
        source = Source(stream_of(message()))
        stream = iter_sync(events(source))
        next(stream)
        assert not source.closed
        stream.close()
        assert source.closed


class Served:
    provider = "anthropic"
    model = "claude-sonnet-5"
    info: Mapping[str, object] = {}

    def __init__(self, base: str) -> None:
        self.connection = {"api_key": "k", "api_base": base}


class TestOverTheWire:
    @pytest.fixture
    def upstream(self):
        with FakeUpstream(stream_events=3) as upstream:
            yield upstream

    def ask(self, upstream, stream: bool, **body: object) -> bytes:
        to = target_of(Served(upstream.url), environ={})
        request = build(to, "chat", {"messages": HI, **body}, stream)
        sent = urllib.request.Request(request.url, request.body, request.headers, method=request.method)
        with urllib.request.urlopen(sent, timeout=10) as reply:
            return reply.read()

    def test_an_answer(self, upstream):
        made = json.loads(answer(self.ask(upstream, False)))
        assert upstream.calls[-1].path == "/v1/messages"
        [choice] = made["choices"]
        assert (choice["finish_reason"], choice["message"]["role"]) == ("stop", "assistant")
        [streamed_choice] = streamed(self.ask(upstream, True))
        assert streamed_choice["delta"] == {"role": "assistant", "content": choice["message"]["content"]}
        assert "hi" in choice["message"]["content"]

    def test_tools(self, upstream):
        tools = [function("f", parameters={"type": "object", "properties": {"city": {"type": "string"}}})]
        asked = {"messages": [{"role": "user", "content": "the weather in two cities"}], "tools": tools}
        [choice] = json.loads(answer(self.ask(upstream, False, **asked)))["choices"]
        [again] = streamed(self.ask(upstream, True, **asked))
        for made, calls in ((choice, choice["message"]["tool_calls"]), (again, again["delta"]["tool_calls"])):
            assert made["finish_reason"] == "tool_calls"
            assert [one["function"]["name"] for one in calls] == ["f", "f"]
            cities = [json.loads(one["function"]["arguments"])["city"] for one in calls]
            assert cities == ["Paris", "Oslo"]
