"""OpenAI's SDK and LangChain against the sub-app, on both fronts."""

from __future__ import annotations

import asyncio
import time

import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.api import serving
from tests.api.serving import SLASHES

served, server, upstream = serving.served, serving.server, serving.upstream
asgi_server, wsgi_server = serving.asgi_server, serving.wsgi_server

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
AUDIO = ("a.wav", b"RIFF0000WAVE")


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def api(served):
    """``api(**sections)``: OpenAI's client of the sub-app of that configuration."""
    clients = []

    def make(*, max_retries: int = 0, **sections):
        base = served(**sections)
        clients.append(openai.OpenAI(base_url=f"{base.url}/v1", api_key="sk-caller", max_retries=max_retries))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def test_chat(api, upstream):
    create = api().chat.completions.with_raw_response.create
    asked = {"model": SLASHES, "messages": messages("hello"), "temperature": 0}
    first, second = create(**asked), create(**asked)
    assert [each.headers["x-llm-cache"] for each in (first, second)] == ["miss", "hit"]
    assert first.parse().choices[0].message.content.startswith("You said: hello")
    assert second.parse() == first.parse()
    fresh = create(**asked, extra_body={"cache": {"no-cache": True}}, timeout=20)
    assert fresh.headers["cache-status"] == "llm-middleware; fwd=request; stored"
    assert upstream.count == 2
    assert upstream.calls[1].json == {**asked, "model": f"{SLASHES}-up"}


def stream_of(client, **asked):
    with client.chat.completions.create(model="m", stream=True, **asked) as events:
        return events.response.headers["x-llm-cache"], list(events)


def test_streams_with_tools_and_usage(api, upstream):
    client = api()
    asked = {"messages": messages("the weather in two cities"), "tools": [WEATHER]}
    options = {"stream_options": {"include_usage": True}}
    (state, events), (again, replay) = (stream_of(client, **asked, **options) for _ in range(2))
    assert (state, again) == ("miss", "hit")
    assert replay == events
    assert events[-1].usage.total_tokens > 0
    plain = client.chat.completions.with_raw_response.create(model="m", **asked)
    assert plain.headers["x-llm-cache"] == "hit"
    calls = plain.parse().choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["get_weather", "get_weather"]
    assert [call.function.arguments for call in calls] == ['{"city": "Paris"}', '{"city": "Oslo"}']
    assert upstream.count == 1


def test_the_sdks_own_stream_helper(api):
    with api().chat.completions.stream(model="m", messages=messages("hello")) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content.startswith("You said: hello")


def test_async(served, upstream):
    url = f"{served().url}/v1"

    async def main():
        async with openai.AsyncOpenAI(base_url=url, api_key="sk-caller", max_retries=0) as client:
            create = client.chat.completions.create
            upstream.hold()
            calls = [asyncio.create_task(create(model="m", messages=messages("hello"))) for _ in range(10)]
            await asyncio.to_thread(upstream.wait_for, 1)
            upstream.release()
            answers = await asyncio.gather(*calls)
            assert {answer.id for answer in answers} == {answers[0].id}
            assert upstream.count == 1
            stream = await create(model="m", messages=messages("more"), stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text.startswith("You said: more")
            assert [model.id async for model in await client.models.list()] == ["m", SLASHES]

    asyncio.run(main())


def test_embeddings(api, upstream):
    client = api()
    create = client.embeddings.with_raw_response.create
    default = create(model="m", input=["a", "b"])  # which asks for base64, and shows numbers
    floats = create(model="m", input=["a", "b"], encoding_format="float")
    assert [call.json["encoding_format"] for call in upstream.calls] == ["base64", "float"]
    assert floats.headers["x-llm-cache"] == "miss"
    vectors = [row.embedding for row in default.parse().data]
    assert vectors == [row.embedding for row in floats.parse().data]
    assert len(vectors[0]) == 8
    partial = create(model="m", input=["b", "c"])
    assert partial.headers["cache-status"] == 'llm-middleware; fwd=partial; stored; detail="1/2"'
    assert partial.parse().data[0].embedding == vectors[1]
    assert upstream.calls[-1].json["input"] == ["c"]
    again = client.embeddings.create(model="m", input=["a", "b"])
    assert [row.embedding for row in again.data] == vectors
    assert upstream.count == 3


def test_transcriptions(api, upstream):
    client = api()
    create = client.audio.transcriptions.with_raw_response.create
    asked = {"model": "m", "file": AUDIO, "timestamp_granularities": ["word", "segment"], "language": "en"}
    answers = [create(**asked, response_format=form) for form in ("json", "json", "text", "verbose_json")]
    states = [answer.headers["x-llm-cache"] for answer in answers]
    assert states == ["miss", "hit", "miss", "miss"]
    assert answers[0].parse().text.startswith("You said: 12 bytes")
    assert answers[3].parse().duration == 1.0
    assert upstream.calls[0].json["file"] == AUDIO[1]
    assert upstream.calls[0].json["model"] == "m-up"


def test_responses(api, upstream):
    client = api()
    with client.responses.create(model="m", input="hello", stream=True) as events:
        streamed = list(events)
    plain = client.responses.with_raw_response.create(model="m", input="hello")
    assert plain.headers["x-llm-cache"] == "hit"
    assert plain.parse().output_text == streamed[-1].response.output_text
    assert upstream.count == 1


def test_completions(api):
    client = api()
    answer = client.completions.create(model="m", prompt="hello")
    assert answer.choices[0].text.startswith("You said: hello")


def test_models(api):
    client = api()
    assert [model.id for model in client.models.list()] == ["m", SLASHES]
    assert client.models.retrieve(SLASHES).owned_by == "llm-middleware"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_azures_client(served, upstream):
    client = openai.AzureOpenAI(
        azure_endpoint=served().url, api_key="sk-caller", api_version="2024-10-21", max_retries=0
    )
    with client:
        ask = client.chat.completions.with_raw_response.create
        answers = [ask(model=SLASHES, messages=messages("hello")) for _ in range(2)]
        assert [answer.headers["x-llm-cache"] for answer in answers] == ["miss", "hit"]
        heard = client.audio.transcriptions.create(model=SLASHES, file=AUDIO)
        assert heard.text.startswith("You said: 12 bytes")
        with client.chat.completions.create(model="m", messages=messages("a"), stream=True) as events:
            assert list(events)[-1].choices[0].finish_reason == "stop"
    assert [call.json["model"] for call in upstream.calls] == [f"{SLASHES}-up"] * 2 + ["m-up"]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "context_length_exceeded", openai.BadRequestError),
        (401, "invalid_api_key", openai.AuthenticationError),
        (403, "not_allowed", openai.PermissionDeniedError),
        (404, "model_gone", openai.NotFoundError),
        (409, "conflict", openai.ConflictError),
        (422, "unprocessable", openai.UnprocessableEntityError),
        (429, "rate_limit_exceeded", openai.RateLimitError),
        (503, "overloaded", openai.InternalServerError),
    ],
)
def test_errors_have_the_sdks_classes(api, upstream, status, code, kind):
    client = api()
    upstream.fail_next(
        status, body={"error": {"message": "no", "type": "t", "param": "messages", "code": code}}
    )
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="m", messages=messages("a"))
    assert type(caught.value) is kind
    assert (caught.value.status_code, caught.value.code, caught.value.param) == (status, code, "messages")


def test_refusals_of_our_own_have_the_sdks_classes(api):
    client = api()
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="unknown", messages=messages("a"))
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="m", messages=messages("a"), extra_body={"cache": {"ttl": "abc"}}
        )
    assert refused.value.param == "cache.ttl"


@pytest.mark.parametrize("call", ["chat", "responses"])
def test_a_stream_that_breaks_raises_in_the_sdk(api, upstream, call):
    client = api()
    upstream.cut_stream_after(5)
    got = []
    with pytest.raises(openai.APIError) as caught:  # noqa: PT012 - the error comes after some events
        if call == "chat":
            stream = client.chat.completions.create(model="m", messages=messages("a"), stream=True)
        else:
            stream = client.responses.create(model="m", input="a", stream=True)
        for event in stream:
            got.append(event)  # noqa: PERF402 - what came before the error is wanted
    assert len(got) >= 4
    assert caught.value.code == "connection_error"


def test_r59_the_sdk_comes_again_when_it_is_told_to(api, upstream):
    client = api(max_retries=1)
    upstream.fail_next(429, headers={"retry-after-ms": "800"})
    began = time.monotonic()
    answer = client.chat.completions.create(model="m", messages=messages("a"))
    assert time.monotonic() - began >= 0.8  # by itself it waits for half a second
    assert answer.choices[0].message.content.startswith("You said: a")
    assert upstream.count == 2


def test_the_sdk_retries_failures_of_servers(api, upstream):
    client = api(max_retries=1)
    upstream.fail_next(503, headers={"retry-after-ms": "1"})
    assert client.chat.completions.create(model="m", messages=messages("a")).id
    assert upstream.count == 2


# LangChain ----------------------------------------------------------------------------------------


@pytest.fixture
def langchain(served):
    url = f"{served().url}/v1"
    return lambda **options: ChatOpenAI(
        model="m", base_url=url, api_key="sk-caller", max_retries=0, **options
    )


def test_langchain_chat(langchain, upstream):
    model = langchain(include_response_headers=True)
    first, second = model.invoke("hello"), model.invoke("hello")
    states = [each.response_metadata["headers"]["x-llm-cache"] for each in (first, second)]
    assert states == ["miss", "hit"]
    assert first.text.startswith("You said: hello")
    assert second.text == first.text
    assert first.usage_metadata["total_tokens"] > 0
    assert upstream.count == 1


def test_langchain_stream(langchain, upstream):
    model = langchain(stream_usage=True)
    streams = [list(model.stream("hello")) for _ in range(2)]
    texts = ["".join(chunk.text for chunk in stream) for stream in streams]
    assert texts[0].startswith("You said: hello")
    assert texts[1] == texts[0]
    assert len(streams[0]) > 4
    assert upstream.count == 1
    assert asyncio.run(langchain().ainvoke("hello")).text == texts[0]
    assert upstream.count == 1  # the stream's answer


def test_langchain_tools(langchain):
    found = langchain().bind_tools([WEATHER]).invoke("the weather in two cities")
    assert [(call["name"], call["args"]) for call in found.tool_calls] == [
        ("get_weather", {"city": "Paris"}),
        ("get_weather", {"city": "Oslo"}),
    ]


def test_langchain_errors(langchain, upstream):
    upstream.fail_next(429, headers={"retry-after": "7"})
    with pytest.raises(openai.RateLimitError) as caught:
        langchain().invoke("hello")
    assert caught.value.response.headers["retry-after"] == "7"


def test_langchain_embeddings(served, upstream):
    url = f"{served().url}/v1"
    model = OpenAIEmbeddings(
        model="m", base_url=url, api_key="sk-caller", check_embedding_ctx_length=False, max_retries=0
    )
    vectors = model.embed_documents(["a", "b"])
    assert model.embed_query("b") == vectors[1]
    assert upstream.count == 1
