"""The fake upstream, read by the vendors' own SDKs: they must find in it what they find in the real ones."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import anthropic
import httpx
import openai
import pytest

from llm_middleware.testing import FakeClock, FakeUpstream

ASK = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "What is a cache?"}]}
TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


class Client:
    """One way to call both faces of an SDK: ``client(lambda api: api.models.list())``."""

    def __init__(self, sync_api: Callable[[], Any], async_api: Callable[[], Any], face: str) -> None:
        self._sync_api, self._async_api, self._face = sync_api, async_api, face

    def __call__(self, call: Callable[[Any], Any]) -> Any:
        """What ``call`` returns; a list of the events where that is a stream."""
        if self._face == "async":
            return asyncio.run(self._acall(call))
        with self._sync_api() as api:
            answer = call(api)
            return list(answer) if isinstance(answer, openai.Stream | anthropic.Stream) else answer

    async def _acall(self, call: Callable[[Any], Awaitable[Any]]) -> Any:
        async with self._async_api() as api:
            answer = await call(api)
            return [event async for event in answer] if isinstance(answer, AsyncIterator) else answer


@pytest.fixture(params=["sync", "async"])
def ai(upstream: FakeUpstream, request: pytest.FixtureRequest) -> Client:
    """OpenAI's SDK, both faces."""
    options: dict[str, Any] = {"base_url": upstream.url, "api_key": "sk-test", "max_retries": 0}
    return Client(lambda: openai.OpenAI(**options), lambda: openai.AsyncOpenAI(**options), request.param)


@pytest.fixture(params=["sync", "async"])
def claude(upstream: FakeUpstream, request: pytest.FixtureRequest) -> Client:
    """Anthropic's SDK, both faces."""
    base_url = upstream.url.removesuffix("/v1")
    options: dict[str, Any] = {"base_url": base_url, "api_key": "sk-test", "max_retries": 0}
    return Client(
        lambda: anthropic.Anthropic(**options), lambda: anthropic.AsyncAnthropic(**options), request.param
    )


def post(upstream: FakeUpstream, path: str = "/chat/completions", **body: object) -> httpx.Response:
    return httpx.post(upstream.url + path, json={**ASK, **body}, timeout=30)


# Shapes -------------------------------------------------------------------------------------------


def test_chat(ai: Client, upstream: FakeUpstream) -> None:
    first = ai(lambda api: api.chat.completions.create(**ASK))
    second = ai(lambda api: api.chat.completions.create(**ASK))
    assert first.choices[0].message.content.startswith("You said: What is a cache?.")
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].finish_reason == "stop"
    assert first.usage.prompt_tokens == 4
    assert first.id != second.id
    assert first.created < second.created
    assert upstream.count == 2
    assert upstream.calls[0].path == "/v1/chat/completions"
    assert upstream.calls[0].headers["authorization"] == "Bearer sk-test"
    assert upstream.calls[0].json == ASK


def test_chat_stream_says_what_the_plain_answer_says(ai: Client, upstream: FakeUpstream) -> None:
    upstream.stream_events = 5
    plain = ai(lambda api: api.chat.completions.create(**ASK))
    chunks = ai(
        lambda api: api.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert len(pieces) == 7  # the opening, five pieces, the end
    assert "".join(piece or "" for piece in pieces) == plain.choices[0].message.content
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage


def test_stream_has_no_usage_unless_asked(ai: Client) -> None:
    chunks = ai(lambda api: api.chat.completions.create(**ASK, stream=True))
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)


def test_two_choices_stay_apart_in_a_stream(ai: Client) -> None:
    plain = ai(lambda api: api.chat.completions.create(**ASK, n=2))
    texts = {0: "", 1: ""}
    for chunk in ai(lambda api: api.chat.completions.create(**ASK, n=2, stream=True)):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in plain.choices]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(("place", "cities"), [("Paris", ["Paris"]), ("two cities", ["Paris", "Oslo"])])
def test_tool_calls(ai: Client, place: str, cities: list[str]) -> None:
    messages = [{"role": "user", "content": f"The weather in {place}?"}]
    body = {"model": "gpt-4o-mini", "messages": messages, "tools": [{"type": "function", "function": TOOL}]}
    choice = ai(lambda api: api.chat.completions.create(**body)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"] * len(cities)
    assert [json.loads(call.function.arguments)["city"] for call in choice.message.tool_calls] == cities
    assert len({call.id for call in choice.message.tool_calls}) == len(cities)

    arguments: dict[int, str] = {}
    for chunk in ai(lambda api: api.chat.completions.create(**body, stream=True)):
        for call in chunk.choices[0].delta.tool_calls or []:
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    assert [json.loads(text)["city"] for text in arguments.values()] == cities


def test_a_tool_result_is_answered_with_text(ai: Client) -> None:
    tools = [{"type": "function", "function": TOOL}]
    messages = [
        {"role": "user", "content": "The weather?"},
        {"role": "tool", "tool_call_id": "c", "content": "Sun"},
    ]
    answer = ai(lambda api: api.chat.completions.create(model="gpt-4o-mini", messages=messages, tools=tools))
    assert answer.choices[0].message.content.startswith("You said: Sun.")


def test_logprobs(ai: Client) -> None:
    choice = ai(lambda api: api.chat.completions.create(**ASK, logprobs=True)).choices[0]
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content


def test_text_completion(ai: Client) -> None:
    body = {"model": "gpt-3.5-turbo-instruct", "prompt": "Once", "n": 2}
    plain = ai(lambda api: api.completions.create(**body))
    assert plain.object == "text_completion"
    assert plain.choices[0].text.startswith("You said: Once.")
    texts = ["", ""]
    for chunk in ai(lambda api: api.completions.create(**body, stream=True)):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in plain.choices]


@pytest.mark.parametrize("given", ["a cat", ["a cat", "a dog"], [1, 2, 3], [[1, 2, 3], [4]]])
def test_embeddings_are_equal_in_both_encodings(ai: Client, given: Any) -> None:
    floats = ai(lambda api: api.embeddings.create(model="m", input=given, encoding_format="float"))
    packed = ai(lambda api: api.embeddings.create(model="m", input=given))  # the SDK asks for base64
    assert [item.embedding for item in floats.data] == [item.embedding for item in packed.data]
    assert [item.index for item in floats.data] == list(range(len(floats.data)))
    assert len(floats.data) == (2 if isinstance(given[0], list) or given == ["a cat", "a dog"] else 1)
    assert sum(x * x for x in floats.data[0].embedding) == pytest.approx(1.0)


def test_an_embedding_belongs_to_its_text(ai: Client) -> None:
    create = {"model": "m", "encoding_format": "float", "dimensions": 3}
    pair = ai(lambda api: api.embeddings.create(**create, input=["cat", "dog"])).data
    swapped = ai(lambda api: api.embeddings.create(**create, input=["dog", "cat"])).data
    assert [len(item.embedding) for item in pair] == [3, 3]
    assert pair[0].embedding == swapped[1].embedding
    assert pair[0].embedding != pair[1].embedding


def test_transcription(ai: Client, upstream: FakeUpstream) -> None:
    audio = bytes(range(256)) + b"\r\n--not a boundary\r\n"
    answer = ai(lambda api: api.audio.transcriptions.create(model="whisper-1", file=("a.mp3", audio)))
    other = ai(lambda api: api.audio.transcriptions.create(model="whisper-1", file=("a.mp3", b"RIFF")))
    assert answer.text.startswith(f"You said: {len(audio)} bytes, ")
    assert other.text != answer.text
    assert upstream.calls[0].json == {"model": "whisper-1", "file": audio}


def test_transcription_formats(ai: Client) -> None:
    def transcribe(shape: str) -> Any:
        file = ("a.wav", b"RIFF")
        return ai(
            lambda api: api.audio.transcriptions.create(model="whisper-1", file=file, response_format=shape)
        )

    text = transcribe("json").text
    assert transcribe("text") == text + "\n"
    assert text in transcribe("srt")
    assert transcribe("vtt").startswith("WEBVTT")
    assert transcribe("verbose_json").segments[0].text == text


def test_responses(ai: Client) -> None:
    body = {"model": "gpt-4o-mini", "input": "What is a cache?"}
    plain = ai(lambda api: api.responses.create(**body))
    events = ai(lambda api: api.responses.create(**body, stream=True))
    assert plain.output_text.startswith("You said: What is a cache?.")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == plain.output_text
    assert events[-1].response.usage == plain.usage
    assert events[-1].response.id != plain.id


def test_responses_tool_calls(ai: Client) -> None:
    tools = [{"type": "function", **TOOL, "strict": False}]
    body = {"model": "gpt-4o-mini", "input": "The weather in two cities?", "tools": tools}
    plain = ai(lambda api: api.responses.create(**body))
    assert [json.loads(item.arguments)["city"] for item in plain.output] == ["Paris", "Oslo"]
    events = ai(lambda api: api.responses.create(**body, stream=True))
    done = [event.arguments for event in events if event.type == "response.function_call_arguments.done"]
    assert done == [item.arguments for item in plain.output]


def test_anthropic_messages(claude: Client) -> None:
    body = {**ASK, "max_tokens": 100}
    plain = claude(lambda api: api.messages.create(**body))
    events = claude(lambda api: api.messages.create(**body, stream=True))
    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    assert text == plain.content[0].text
    assert plain.stop_reason == "end_turn"
    assert [events[0].type, events[-1].type] == ["message_start", "message_stop"]
    assert events[0].message.id != plain.id


def test_anthropic_tool_use(claude: Client) -> None:
    tools = [{"name": "get_weather", "input_schema": TOOL["parameters"]}]
    messages = [{"role": "user", "content": [{"type": "text", "text": "The weather in two cities?"}]}]
    body = {"model": "claude-test", "max_tokens": 100, "messages": messages, "tools": tools}
    plain = claude(lambda api: api.messages.create(**body))
    assert [block.input for block in plain.content] == [{"city": "Paris"}, {"city": "Oslo"}]
    assert plain.stop_reason == "tool_use"
    fragments = ["", ""]
    for event in claude(lambda api: api.messages.create(**body, stream=True)):
        if event.type == "content_block_delta":
            fragments[event.index] += event.delta.partial_json
    assert [json.loads(text) for text in fragments] == [block.input for block in plain.content]


def test_models(ai: Client) -> None:
    assert "gpt-4o-mini" in [model.id for model in ai(lambda api: api.models.list()).data]


# Knobs --------------------------------------------------------------------------------------------


def test_fail_next_fails_so_many(ai: Client, upstream: FakeUpstream) -> None:
    upstream.fail_next(429, n=2, headers={"Retry-After": "7"})
    for _ in range(2):
        with pytest.raises(openai.RateLimitError) as caught:
            ai(lambda api: api.chat.completions.create(**ASK))
        assert caught.value.response.headers["retry-after"] == "7"
    assert ai(lambda api: api.chat.completions.create(**ASK)).object == "chat.completion"


def test_fail_next_can_script_an_answer(upstream: FakeUpstream) -> None:
    upstream.fail_next(200, body={"choices": []})
    upstream.fail_next(502, body="<html>bad gateway</html>", headers={"content-type": "text/html"})
    scripted, gateway = post(upstream), post(upstream)
    assert (scripted.status_code, scripted.json()) == (200, {"choices": []})
    assert (gateway.status_code, gateway.headers["content-type"]) == (502, "text/html")


def test_wrong_requests_get_openai_errors(upstream: FakeUpstream) -> None:
    unknown = post(upstream, "/nowhere")
    unparsed = httpx.post(f"{upstream.url}/chat/completions", content=b"{")
    incomplete = httpx.post(f"{upstream.url}/embeddings", json={"model": "m"})
    assert [r.status_code for r in (unknown, unparsed, incomplete)] == [404, 400, 400]
    assert incomplete.json()["error"]["param"] == "input"


def test_cut_stream(upstream: FakeUpstream) -> None:
    upstream.cut_stream_after(3)
    lines: list[str] = []
    with pytest.raises(httpx.RemoteProtocolError), open_stream(upstream) as response:
        lines += (line for line in response.iter_lines() if line)
    assert len(lines) == 3
    assert post(upstream, stream=True).text.endswith("data: [DONE]\n\n")


def open_stream(upstream: FakeUpstream) -> Any:
    return httpx.stream("POST", f"{upstream.url}/chat/completions", json={**ASK, "stream": True}, timeout=30)


def test_hold_orders_concurrent_requests(upstream: FakeUpstream) -> None:
    upstream.hold()
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(post, upstream) for _ in range(3)]
        upstream.wait_for(3)
        assert not any(answer.done() for answer in answers)
        upstream.release()
        assert [answer.result().status_code for answer in answers] == [200] * 3


def test_hold_in_the_middle_of_a_stream(upstream: FakeUpstream) -> None:
    upstream.hold(after_events=2)
    with open_stream(upstream) as response:
        lines = (line for line in response.iter_lines() if line)
        assert len([next(lines), next(lines)]) == 2
        upstream.release()
        assert list(lines)[-1] == "data: [DONE]"
    assert upstream.disconnected == 0


@pytest.mark.parametrize("after_events", [0, 2])
def test_a_client_that_leaves_is_noticed(upstream: FakeUpstream, after_events: int) -> None:
    upstream.hold(after_events)
    body = json.dumps({**ASK, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", urlsplit(upstream.url).port or 0)) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        upstream.wait_for(1)
        assert upstream.disconnected == 0
    upstream.wait_for_disconnects(1)


def test_a_client_that_leaves_between_slow_events_is_noticed_at_once(upstream: FakeUpstream) -> None:
    upstream.chunk_delay = 60
    with open_stream(upstream) as response:
        next(response.iter_lines())
    upstream.wait_for_disconnects(1)


def test_waiting_in_vain_raises(upstream: FakeUpstream) -> None:
    with pytest.raises(TimeoutError, match="0 of 1 requests"):
        upstream.wait_for(1, timeout=0.01)


def test_latency_comes_before_the_first_byte(upstream: FakeUpstream) -> None:
    upstream.latency = 0.05
    assert post(upstream).elapsed.total_seconds() >= 0.05


def test_stop_frees_held_requests_and_start_takes_the_port_again(upstream: FakeUpstream) -> None:
    url = upstream.url
    upstream.hold()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, upstream)
        upstream.wait_for(1)
        upstream.stop()
        assert isinstance(answer.exception(), httpx.TransportError)
    with pytest.raises(httpx.ConnectError):
        post(upstream)
    upstream.release()
    upstream.start()
    assert upstream.url == url
    assert post(upstream).status_code == 200


def test_stop_leaves_no_thread(upstream: FakeUpstream) -> None:
    before = threading.active_count()
    with FakeUpstream() as other, httpx.Client() as client:
        client.get(f"{other.url}/models")
    for thread in threading.enumerate()[before:]:
        thread.join(5)
    assert threading.active_count() == before


# The wire -----------------------------------------------------------------------------------------


def test_connections_are_kept_and_chunked_bodies_read(upstream: FakeUpstream) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(upstream.url).port)
    body = json.dumps(ASK).encode()
    for _ in range(2):
        connection.request("POST", "/chat/completions", iter([body[:9], body[9:]]), encode_chunked=True)
        first_socket = connection.sock
        assert connection.getresponse().read().startswith(b'{"id":"chatcmpl-')
        assert connection.sock is first_socket
    connection.close()
    assert [call.body for call in upstream.calls] == [body, body]
    assert upstream.calls[0].headers["transfer-encoding"] == "chunked"


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "llm_middleware.testing", "--port", "0", "--stream-events", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", url)
        assert httpx.get(f"{url}/models").json()["object"] == "list"
        process.terminate()


def test_fake_clock_moves_when_told() -> None:
    clock = FakeClock(100.0)
    assert [clock(), clock()] == [100.0, 100.0]
    clock.advance(2.5)
    assert clock() == 102.5
