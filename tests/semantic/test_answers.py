"""What an answer says, of every endpoint, plain and streamed; and which do more than say something."""

from __future__ import annotations

import json

import pytest

from llm_middleware.semantic.answers import answer_text, only_text
from llm_middleware.testing import FakeUpstream
from tests.support import chat_stream, chunk, completion, sse

TOOL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def plain(value: object) -> bytes:
    return json.dumps(value).encode()


def chat(**message: object) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
    return plain(completion(choices=[choice]))


def events(*told: dict[str, object], named: bool = True) -> bytes:
    lines = [(f"event: {each['type']}\n" if named else "") + f"data: {json.dumps(each)}\n\n" for each in told]
    return "".join(lines).encode()


def block(kind: str, at: int = 0, **fields: object) -> dict[str, object]:
    content = {"type": kind, **fields}
    return {"type": "content_block_start", "index": at, "content_block": content}


def delta(kind: str, name: str, text: str, at: int = 0) -> dict[str, object]:
    return {"type": "content_block_delta", "index": at, "delta": {"type": kind, name: text}}


def output(*items: dict[str, object]) -> dict[str, object]:
    return {"id": "r", "object": "response", "status": "completed", "output": list(items)}


def message(*texts: str, kind: str = "output_text") -> dict[str, object]:
    return {
        "type": "message",
        "role": "assistant",
        "content": [{"type": kind, "text": text} for text in texts],
    }


CALLED = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
USE = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "s"}

SAID = {
    "chat": ("chat", chat(content="hello"), "hello"),
    "chat with empty tools": ("chat", chat(content="hello", tool_calls=[], function_call=None), "hello"),
    "chat that speaks of tools": ("chat", chat(content='say "tool_calls"'), 'say "tool_calls"'),
    "chat, streamed": ("chat", b"".join(chat_stream("hel", "lo")), "hello"),
    "chat, streamed, with usage": (
        "chat",
        b"".join(
            sse(chunk("", role="assistant"), chunk("hello"), {"choices": [], "usage": {"total_tokens": 1}})
        ),
        "hello",
    ),
    "chat, reasoning": ("chat", chat(content="hello", reasoning_content="hm"), "hello"),
    "text": ("text", plain({"choices": [{"text": "hello"}]}), "hello"),
    "text, streamed": (
        "text",
        events(
            {"type": "x", "choices": [{"text": "hel"}]},
            {"type": "x", "choices": [{"text": "lo"}]},
            named=False,
        ),
        "hello",
    ),
    "messages": (
        "messages",
        plain({"content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}),
        "hello",
    ),
    "messages, thinking": (
        "messages",
        plain({"content": [THOUGHT, {"type": "text", "text": "hello"}]}),
        "hello",
    ),
    "messages, streamed": (
        "messages",
        events(
            {"type": "message_start", "message": {"content": []}},
            block("thinking", thinking=""),
            delta("thinking_delta", "thinking", "hm"),
            delta("signature_delta", "signature", "s"),
            block("text", 1, text=""),
            delta("text_delta", "text", "hel", 1),
            delta("text_delta", "text", "lo", 1),
            {"type": "message_stop"},
        ),
        "hello",
    ),
    "responses": (
        "responses",
        plain(output({"type": "reasoning", "summary": []}, message("hel", "lo"))),
        "hello",
    ),
    "responses, streamed": (
        "responses",
        events(
            {"type": "response.created", "response": output()},
            {"type": "response.completed", "response": output(message("hello"))},
        ),
        "hello",
    ),
    "json": ("json", b'{"anything": 1}', '{"anything": 1}'),
}


@pytest.mark.parametrize(("kind", "body", "text"), SAID.values(), ids=SAID)
def test_the_text_of_an_answer(kind, body, text):
    assert answer_text(kind, body) == text
    assert only_text(kind, body)


ACTS = {
    "chat": ("chat", chat(content=None, tool_calls=[TOOL])),
    "chat, with words too": ("chat", chat(content="hello", tool_calls=[TOOL])),
    "chat, a function": ("chat", chat(content=None, function_call=TOOL["function"])),
    "chat, audio": ("chat", chat(content=None, audio={"id": "a", "data": "Zm94"})),
    "chat, streamed": (
        "chat",
        b"".join(sse(chunk(None, tool_calls=[{"index": 0, **TOOL}]), chunk(None, "tool_calls"))),
    ),
    "chat, streamed, behind words": (
        "chat",
        b"".join(sse(chunk("hello"), chunk(None, tool_calls=[{"index": 0, **TOOL}]))),
    ),
    "chat, streamed, audio": ("chat", b"".join(sse(chunk(None, audio={"id": "a"})))),
    "messages": (
        "messages",
        plain({"content": [{"type": "text", "text": "hello"}, USE], "stop_reason": "tool_use"}),
    ),
    "messages, streamed": (
        "messages",
        events(block("text"), delta("text_delta", "text", "hello"), block("tool_use", 1, id="t")),
    ),
    "messages, a server's tool": ("messages", plain({"content": [{**USE, "type": "server_tool_use"}]})),
    "responses": ("responses", plain(output(CALLED))),
    "responses, with words too": ("responses", plain(output(message("hello"), CALLED))),
    "responses, a search": (
        "responses",
        plain(output({"type": "web_search_call", "id": "w"}, message("hello"))),
    ),
    "responses, streamed": ("responses", events({"type": "response.completed", "response": output(CALLED)})),
    "responses, approval": ("responses", plain(output({"type": "mcp_approval_request", "id": "a"}))),
}


@pytest.mark.parametrize(("kind", "body"), ACTS.values(), ids=ACTS)
def test_what_does_more_than_say_something(kind, body):
    assert not only_text(kind, body)
    assert answer_text(kind, body) is None


NEITHER = {
    "no answer": ("chat", b"not json"),
    "two choices": (
        "chat",
        plain({"choices": [{"message": {"content": "a"}}, {"message": {"content": "b"}}]}),
    ),
    "empty": ("chat", chat(content="")),
    "a refusal": ("chat", chat(content=None, refusal="no")),
    "other types": ("chat", b'{"choices": [{"message": {"content": 5}}]}'),
    "a list": ("chat", b"[]"),
    "a stream of nonsense": ("chat", b"data: {\n\n"),
    "responses, refused": ("responses", plain(output(message("no", kind="refusal")))),
    "responses, streamed, unfinished": (
        "responses",
        events({"type": "response.created", "response": output()}),
    ),
    "an endpoint without words": ("embedding", plain({"data": []})),
}


@pytest.mark.parametrize(("kind", "body"), NEITHER.values(), ids=NEITHER)
def test_what_says_nothing_that_could_be_compared(kind, body):
    assert answer_text(kind, body) is None
    assert only_text(kind, body)


@pytest.mark.parametrize("body", [b"\xff\xfe", b"", "höher".encode()])
def test_json_of_the_hosts_own_is_compared_as_it_is(body):
    assert answer_text("json", body) == body.decode("utf-8", "replace")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["chat", "text", "messages", "responses"])
def test_a_servers_answers(kind, stream):
    """What a server sends over HTTP, plain and streamed, says the same."""
    import urllib.request

    paths = {
        "chat": "chat/completions",
        "text": "completions",
        "messages": "messages",
        "responses": "responses",
    }
    turns = [{"role": "user", "content": "hi there"}]
    asked = {
        "chat": {"messages": turns},
        "text": {"prompt": "hi there"},
        "messages": {"messages": turns, "max_tokens": 9},
        "responses": {"input": "hi there"},
    }
    with FakeUpstream() as upstream:
        request = urllib.request.Request(
            f"{upstream.url}/{paths[kind]}",
            plain({"model": "m", "stream": stream, **asked[kind]}),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            body = response.read()
    text = answer_text(kind, body)
    assert text is not None
    assert text.startswith("You said: hi there. ")
    assert only_text(kind, body)
