"""What goes over the wire to those who speak OpenAI's API."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping
from email.parser import BytesParser
from email.policy import HTTP

import pytest

from llm_middleware.errors import BadRequestError
from llm_middleware.providers.multipart import read_file
from llm_middleware.providers.openai import build
from llm_middleware.providers.registry import registry
from llm_middleware.providers.target import Target

MESSAGES = [{"role": "user", "content": "grüße 👋"}]


def target(provider="groq", model="m-1", base="https://h.example/v1", rows=None, **more) -> Target:
    row = registry(rows)[provider]
    return Target(provider=row, model=model, base_url=base, headers={"authorization": "Bearer k"}, **more)


def sent(to: Target, body: Mapping[str, object], kind="chat", stream=False) -> dict[str, object]:
    return json.loads(build(to, kind, body, stream).body)


class TestRequests:
    def test_chat_is_exactly_this(self):
        request = build(target(), "chat", {"messages": MESSAGES, "model": "group", "temperature": 0.5}, False)
        assert request.method == "POST"
        assert request.url == "https://h.example/v1/chat/completions"
        assert request.headers == {
            "content-type": "application/json",
            "accept": "application/json",
            "authorization": "Bearer k",
        }
        assert request.body == (
            '{"messages":[{"role":"user","content":"grüße 👋"}],"model":"m-1","temperature":0.5}'.encode()
        )

    def test_a_stream_is_asked_for_by_the_argument(self):
        body = {"messages": [], "stream": False, "stream_options": {"include_usage": True}}
        request = build(target(), "chat", body, True)
        assert json.loads(request.body) == {
            "messages": [],
            "stream_options": {"include_usage": True},
            "model": "m-1",
            "stream": True,
        }
        assert request.headers["accept"] == "text/event-stream"
        assert sent(target(), {**body, "stream": True}) == {"messages": [], "model": "m-1"}

    @pytest.mark.parametrize(
        ("kind", "path"),
        [
            ("chat", "chat/completions"),
            ("text", "completions"),
            ("embedding", "embeddings"),
            ("responses", "responses"),
        ],
    )
    @pytest.mark.parametrize("base", ["https://h.example/v1", "https://h.example/v1/"])
    def test_paths(self, kind, path, base):
        assert build(target(base=base), kind, {}, False).url == f"https://h.example/v1/{path}"

    def test_a_base_may_have_a_query_or_the_whole_path(self):
        base = "https://h.example/v1/chat/completions?tier=a"
        assert build(target(base=base), "chat", {}, False).url == base
        assert build(target(base="https://h.example/?a=1"), "embedding", {}, False).url == (
            "https://h.example/embeddings?a=1"
        )
        assert (
            build(target(base="https://h.example"), "text", {}, False).url == "https://h.example/completions"
        )

    def test_an_unknown_kind_is_the_callers_error(self):
        with pytest.raises(BadRequestError, match="no 'messages' requests"):
            build(target(), "messages", {}, False)

    def test_the_callers_body_does_not_change(self):
        body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 5}
        before = copy.deepcopy(body)
        build(target("publicai", drop=frozenset(["max_tokens"])), "chat", body, True)
        assert body == before

    def test_half_a_surrogate_pair_is_escaped(self):
        request = build(target(), "chat", {"user": "a\ud800"}, False)
        assert request.body == b'{"user":"a\\ud800","model":"m-1"}'

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object(), b"x"])
    def test_what_json_cannot_hold_is_named(self, value):
        with pytest.raises(BadRequestError, match=r"^top_p has a value") as caught:
            build(target(), "chat", {"messages": [], "top_p": value}, False)
        assert caught.value.param == "top_p"

    def test_nesting_without_end_is_named(self):
        deep: list[object] = []
        for _ in range(100_000):
            deep = [deep]
        with pytest.raises(BadRequestError, match=r"^messages has a value"):
            build(target(), "chat", {"messages": deep}, False)

    def test_extra_headers_have_the_last_word_and_keys_are_not_shown(self):
        to = target()
        request = build(
            Target(
                provider=to.provider,
                model="m",
                base_url=to.base_url,
                headers={"accept": "x/y", "authorization": "Bearer hidden"},
            ),
            "chat",
            {},
            False,
        )
        assert request.headers["accept"] == "x/y"
        assert "hidden" not in repr(request)


class TestParameters:
    def test_renames(self):
        assert sent(target("poe"), {"max_completion_tokens": 7}) == {"model": "m-1", "max_tokens": 7}
        assert sent(target("mistral"), {"seed": 3}) == {"model": "m-1", "random_seed": 3}
        assert sent(target("groq"), {"max_completion_tokens": 7}) == {
            "max_completion_tokens": 7,
            "model": "m-1",
        }
        both = {"max_completion_tokens": 7, "max_tokens": 9}
        assert sent(target("poe"), both)["max_tokens"] == 7
        assert sent(target("poe"), {"max_completion_tokens": 7}, "embedding") == {
            "max_completion_tokens": 7,
            "model": "m-1",
        }

    def test_forced_and_largest_values(self):
        assert sent(target("parasail"), {"store": True})["store"] is False
        assert "store" not in sent(target("parasail"), {"input": "a"}, "embedding")
        assert sent(target("scx-ai"), {"temperature": 2})["temperature"] == 1.99
        assert sent(target("scx-ai"), {"temperature": 1.5})["temperature"] == 1.5

    def test_content_as_one_text(self):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
        body = {"messages": [{"role": "user", "content": content} for content in (parts, image, "c", None)]}
        contents = [message["content"] for message in sent(target("publicai"), body)["messages"]]
        assert contents == ["ab", image, "c", None]
        assert sent(target("groq"), body)["messages"][0]["content"] == parts

    def test_extra_body_has_the_last_word(self):
        to = target("poe", extra_body={"top_k": 3, "max_tokens": 1})
        assert sent(to, {"max_completion_tokens": 7}) == {"model": "m-1", "max_tokens": 1, "top_k": 3}

    def test_parameters_that_are_to_be_left_out(self):
        rows = {"house": {"base_url": "https://h.example/v1", "unsupported": ["seed"]}}
        body = {"seed": 1, "user": "u", "n": 2}
        assert sent(target("house", rows=rows), body) == {**body, "model": "m-1"}
        assert sent(target("house", rows=rows, drop_params=True), body) == {
            "user": "u",
            "n": 2,
            "model": "m-1",
        }
        assert sent(target("house", rows=rows, drop=frozenset(["user"])), body) == {
            "seed": 1,
            "n": 2,
            "model": "m-1",
        }

    @pytest.mark.parametrize(
        ("model", "base_model", "reasons"),
        [
            ("o1", "", True),
            ("o3-mini-2025", "", True),
            ("gpt-5-mini", "", True),
            ("gpt-5-chat-latest", "", False),
            ("gpt-4o", "", False),
            ("o1x", "", False),
            ("my-name", "o4-mini", True),
            ("o1", "gpt-4o", False),
        ],
    )
    def test_openais_reasoning_models_have_another_name_for_the_limit(self, model, base_model, reasons):
        to = target("openai", model, base_model=base_model, drop_params=True)
        name = "max_completion_tokens" if reasons else "max_tokens"
        expected = {name: 5, "model": model} | ({} if reasons else {"temperature": 0.2})
        assert sent(to, {"max_tokens": 5, "temperature": 0.2}) == expected
        kept = sent(target("openai", model, base_model=base_model), {"temperature": 0.2})
        assert kept["temperature"] == 0.2  # without drop_params OpenAI says what it refuses
        assert sent(target("groq", model), {"max_tokens": 5}) == {"max_tokens": 5, "model": model}


def parsed(request) -> dict[str, tuple[str | None, str, bytes]]:
    message = BytesParser(policy=HTTP).parsebytes(
        b"content-type: " + request.headers["content-type"].encode() + b"\r\n\r\n" + request.body
    )
    return {
        part.get_param("name", header="content-disposition"): (
            part.get_filename(),
            part.get_content_type(),
            part.get_payload(decode=True),
        )
        for part in message.iter_parts()
    }


class TestTranscriptions:
    def test_it_is_a_form(self):
        body = {
            "file": ("talk.mp3", b"\x00\r\n--x\xff"),
            "model": "group",
            "language": "de",
            "temperature": 0.5,
            "prompt": None,
            "timestamp_granularities": ["word"],
        }
        request = build(target(), "transcription", body, True)
        assert request.url == "https://h.example/v1/audio/transcriptions"
        assert request.headers["content-type"].startswith("multipart/form-data; boundary=form-")
        assert request.headers["authorization"] == "Bearer k"
        assert parsed(request) == {
            "file": ("talk.mp3", "audio/mpeg", b"\x00\r\n--x\xff"),
            "model": (None, "text/plain", b"m-1"),
            "language": (None, "text/plain", b"de"),
            "temperature": (None, "text/plain", b"0.5"),
            "timestamp_granularities[]": (None, "text/plain", b"word"),
            "stream": (None, "text/plain", b"true"),
        }

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (b"abc", ("audio.wav", b"abc", "audio/wav")),
            (bytearray(b"abc"), ("audio.wav", b"abc", "audio/wav")),
            (("a.FLAC", b"abc"), ("a.FLAC", b"abc", "audio/flac")),
            (("a.bin", io.BytesIO(b"abc")), ("a.bin", b"abc", "application/octet-stream")),
            (["a.bin", b"abc", "audio/x-own"], ("a.bin", b"abc", "audio/x-own")),
            ((None, b"abc", None, {}), ("audio.wav", b"abc", "audio/wav")),
            (("../../etc/a.ogg", b"abc"), ("a.ogg", b"abc", "audio/ogg")),
            (("a.mp3", b"abc", "audio/x\r\nevil: 1"), ("a.mp3", b"abc", "audio/mpeg")),
        ],
    )
    def test_what_a_file_may_be(self, value, expected):
        assert read_file(value) == expected

    def test_an_open_file_can_be_sent_again(self, tmp_path):
        path = tmp_path / "a.webm"
        path.write_bytes(b"head-audio")
        with path.open("rb") as file:
            file.seek(5)
            bodies = [parsed(build(target(), "transcription", {"file": file}, False)) for _ in range(2)]
        assert [body["file"] for body in bodies] == [("a.webm", "audio/webm", b"audio")] * 2

    @pytest.mark.parametrize(
        "value", ["a.mp3", 5, None, ("a.mp3",), (5, b"x"), ("a", "text"), io.StringIO("text"), []]
    )
    def test_what_is_no_file_is_the_callers_error(self, value):
        with pytest.raises(BadRequestError) as caught:
            build(target(), "transcription", {"file": value}, False)
        assert caught.value.param == "file"

    def test_a_name_cannot_leave_its_place(self):
        request = build(target(), "transcription", {"file": ('a"\r\nx-evil: 1\r\n\r\n.mp3', b"x")}, False)
        assert b'filename="a%22%0D%0Ax-evil: 1%0D%0A%0D%0A.mp3"' in request.body
        assert list(parsed(request)) == ["file", "model"]

    def test_its_type_is_its_own(self):
        to = Target(
            provider=registry()["groq"],
            model="m",
            base_url="https://h.example",
            headers={"content-type": "application/json"},
        )
        request = build(to, "transcription", {"file": b"x"}, False)
        assert parsed(request)["file"] == ("audio.wav", "audio/wav", b"x")

    def test_what_a_form_cannot_hold_is_named(self):
        with pytest.raises(BadRequestError, match=r"^prompt has a value"):
            build(target(), "transcription", {"file": b"x", "prompt": object()}, False)
