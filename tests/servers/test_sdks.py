"""The providers' own SDKs against the example apps on real servers, in front of a fake provider."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import anthropic
import openai
import pytest

from llm_middleware.testing import FakeUpstream

APPS = {
    "fastapi": ("uvicorn", "examples.fastapi_app.main:app"),
    "flask": ("gunicorn-gthread", "examples.flask_app.main:app"),
    "django-asgi": ("uvicorn", "examples.django_app.asgi:application"),
    "django-wsgi": ("gunicorn-gthread", "examples.django_app.wsgi:application"),
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as made:
        yield made


@pytest.fixture(scope="module", params=APPS)
def base_url(request: pytest.FixtureRequest, serve, upstream: FakeUpstream) -> Iterator[str]:
    server, app = APPS[request.param]
    with serve(server, app, {"OPENAI_BASE_URL": upstream.url}) as url:
        yield url


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_openai_sync(base_url: str, upstream: FakeUpstream) -> None:
    with openai.OpenAI(base_url=base_url + "/v1", api_key="sk-sync", max_retries=0) as client:
        create = client.chat.completions.with_raw_response.create
        before = upstream.count
        first, second = (create(model="m", messages=messages("sync")) for _ in range(2))
        assert [first.headers["x-llm-cache"], second.headers["x-llm-cache"]] == ["miss", "hit"]
        assert first.parse() == second.parse()
        assert upstream.count == before + 1
        # Given with the SDK's own means, the controls do not reach the provider.
        fresh = create(model="m", messages=messages("sync"), extra_body={"cache": {"no-cache": True}})
        assert fresh.headers["cache-status"] == "llm-middleware; fwd=request; stored"
        assert "cache" not in upstream.calls[-1].json
        assert fresh.parse().id != first.parse().id


def test_openai_stream_and_tools(base_url: str) -> None:
    with openai.OpenAI(base_url=base_url + "/v1", api_key="sk-stream", max_retries=0) as client:

        def stream() -> tuple[str, list]:
            asked = messages("the weather in two cities")
            with client.chat.completions.create(
                model="m",
                messages=asked,
                tools=[WEATHER],
                stream=True,
                stream_options={"include_usage": True},
            ) as events:
                return events.response.headers["x-llm-cache"], list(events)

        (state, events), (again, replay) = stream(), stream()
        assert state == "miss"
        assert again == "hit"
        assert replay == events
        names = [
            call.function.name
            for event in events
            for choice in event.choices
            for call in choice.delta.tool_calls or []
            if call.function.name
        ]
        assert names == ["get_weather", "get_weather"]
        assert events[-1].usage.total_tokens > 0
        # The recorded stream answers the plain request, with the same calls.
        plain = client.chat.completions.with_raw_response.create(
            model="m", messages=messages("the weather in two cities"), tools=[WEATHER]
        )
        assert plain.headers["x-llm-cache"] == "hit"
        calls = plain.parse().choices[0].message.tool_calls
        assert [call.function.name for call in calls] == names


def test_openai_async(base_url: str, upstream: FakeUpstream) -> None:
    async def main() -> tuple[list[str], int]:
        async with openai.AsyncOpenAI(base_url=base_url + "/v1", api_key="sk-async", max_retries=0) as client:
            create = client.chat.completions.with_raw_response.create
            before = upstream.count
            upstream.hold()
            calls = [asyncio.ensure_future(create(model="m", messages=messages("async"))) for _ in range(10)]
            await asyncio.to_thread(upstream.wait_for, before + 1)
            upstream.release()
            replies = await asyncio.gather(*calls)
            return sorted({reply.headers["x-llm-cache"] for reply in replies}), upstream.count - before

    states, calls = asyncio.run(main())
    assert "miss" in states
    assert set(states) <= {"miss", "collapsed", "hit"}
    assert calls == 1


def test_openai_errors_keep_their_class(base_url: str, upstream: FakeUpstream) -> None:
    with openai.OpenAI(base_url=base_url + "/v1", api_key="sk-errors", max_retries=0) as client:
        upstream.fail_next(429, headers={"retry-after": "7"})
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="m", messages=messages("errors"))
        assert caught.value.response.headers["retry-after"] == "7"
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                model="m", messages=messages("errors"), extra_body={"cache": {"ttl": "abc"}}
            )
        assert refused.value.param == "cache.ttl"
        assert refused.value.code == "invalid_cache_control"


def test_openai_embeddings_in_part(base_url: str) -> None:
    with openai.OpenAI(base_url=base_url + "/v1", api_key="sk-embed", max_retries=0) as client:
        create = client.embeddings.with_raw_response.create
        first = create(model="e", input=["a", "b"]).parse()
        partial = create(model="e", input=["b", "c", "a"])
        assert partial.headers["cache-status"] == 'llm-middleware; fwd=partial; stored; detail="2/3"'
        rows = partial.parse().data
        assert [row.index for row in rows] == [0, 1, 2]
        assert (rows[0].embedding, rows[2].embedding) == (first.data[1].embedding, first.data[0].embedding)


def test_openai_responses(base_url: str) -> None:
    with openai.OpenAI(base_url=base_url + "/v1", api_key="sk-responses", max_retries=0) as client:
        with client.responses.create(model="m", input="hello", stream=True) as events:
            streamed = list(events)
        plain = client.responses.with_raw_response.create(model="m", input="hello")
        assert plain.headers["x-llm-cache"] == "hit"
        assert plain.parse().output_text == streamed[-1].response.output_text


def test_anthropic_messages(base_url: str) -> None:
    with anthropic.Anthropic(base_url=base_url, api_key="sk-ant", max_retries=0) as client:
        create = client.messages.with_raw_response.create
        first, second = (create(model="c", max_tokens=64, messages=messages("hello")) for _ in range(2))
        assert [first.headers["x-llm-cache"], second.headers["x-llm-cache"]] == ["miss", "hit"]
        assert first.parse() == second.parse()

        def stream() -> tuple[str, list]:
            with client.messages.create(
                model="c", max_tokens=64, messages=messages("hello"), stream=True
            ) as events:
                return events.response.headers["x-llm-cache"], list(events)

        (state, events), (again, replay) = stream(), stream()
        # Messages are replayed in the mode they were recorded in.
        assert (state, again) == ("miss", "hit")
        assert replay == events
