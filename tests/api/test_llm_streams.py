"""The streams of the sub-app's model endpoints, and clients that leave, on both fronts."""

from __future__ import annotations

import json

import pytest

from tests.api import serving
from tests.api.serving import (
    AUDIO,
    CHAT,
    SLASHES,
    TOOL,
    chat,
    openai_error,
    payloads,
    refused,
    text_of,
)

served, server, upstream = serving.served, serving.server, serving.upstream
asgi_server, wsgi_server = serving.asgi_server, serving.wsgi_server

# Streams ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(stream=True)),
        (CHAT, chat("two cities' weather", stream=True, tools=[TOOL])),
        (CHAT, chat(stream=True, stream_options={"include_usage": True}, n=2)),
        ("/v1/completions", {"model": "m", "prompt": "hi", "stream": True}),
        ("/v1/responses", {"model": "m", "input": "hi", "stream": True}),
        (f"/engines/{SLASHES}/chat/completions", chat(stream=True)),
    ],
)
def test_c77_a_stream_is_replayed_byte_for_byte(served, upstream, path, body):
    client = served()
    miss, hit = client.post(path, json=body), client.post(path, json=body)
    assert [answer.headers["x-llm-cache"] for answer in (miss, hit)] == ["miss", "hit"]
    assert miss.headers["cache-status"] == "llm-middleware; fwd=miss"
    assert miss.headers["x-llm-attempts"] == "1"
    for answer in (miss, hit):
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-accel-buffering"] == "no"
        assert "content-length" not in answer.headers
    assert hit.content == miss.content
    if "responses" not in path:
        assert payloads(miss.content)[-1] == b"[DONE]"
    assert upstream.count == 1


def test_transcriptions_may_be_streamed(served, upstream):
    client = served()
    fields = {"model": "m", "stream": "true"}
    answers = [client.post("/v1/audio/transcriptions", data=fields, files=AUDIO) for _ in range(2)]
    assert answers[0].headers["content-type"] == "text/event-stream; charset=utf-8"
    assert b"transcript.text.done" in answers[0].content
    assert answers[1].content == answers[0].content


@pytest.mark.parametrize("form", ["text", "srt", "vtt"])
def test_transcriptions_as_plain_text(served, form):
    client = served()
    fields = {"model": "m", "response_format": form}
    answers = [client.post("/v1/audio/transcriptions", data=fields, files=AUDIO) for _ in range(2)]
    assert [answer.headers["x-llm-cache"] for answer in answers] == ["miss", "hit"]
    assert {answer.headers["content-type"] for answer in answers} == {"text/plain; charset=utf-8"}
    assert answers[1].content == answers[0].content
    assert b"You said: 12 bytes" in answers[0].content


@pytest.mark.parametrize("cache", [{"type": "local"}, None])
def test_the_first_event_is_not_held_back(served, upstream, cache):
    client = served(cache=cache)
    upstream.hold(after_events=3)
    with client.stream("POST", CHAT, json=chat(stream=True)) as answer:
        chunks = answer.iter_raw()
        got = b""
        while got.count(b"\n\n") < 3:  # the others are still held
            got += next(chunks)
        upstream.release()
        got += b"".join(chunks)
    assert payloads(got)[-1] == b"[DONE]"


def test_c85_a_streamed_answer_answers_a_plain_request(served, upstream):
    client = served()
    streamed = client.chat(stream=True, stream_options={"include_usage": True})
    plain = client.chat()
    assert plain.headers["x-llm-cache"] == "hit"
    assert plain.json()["choices"][0]["message"]["content"] == text_of(streamed.content)
    assert plain.json()["usage"] == json.loads(payloads(streamed.content)[-2])["usage"]
    assert upstream.count == 1


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
def test_r52_c83_a_stream_that_breaks_ends_with_an_error(served, upstream, path):
    client = served()
    body = {**chat(stream=True), "input": "hi"}
    if "responses" in path:
        del body["messages"]
    upstream.cut_stream_after(4)
    cut = client.post(path, json=body)
    assert cut.status_code == 200
    *events, last, rest = cut.content.split(b"\n\n")
    assert (len(events), rest) == (4, b"")
    found = json.loads(last.rpartition(b"data: ")[2])["error"]
    assert (found["type"], found["code"]) == ("server_error", "connection_error")
    assert last.startswith(b"event: error\n") == ("responses" in path)
    assert b"[DONE]" not in cut.content
    assert upstream.url.encode() not in cut.content
    # The deployment has failed, and nothing was kept.
    again = client.post(path, json=body)
    assert again.headers["x-llm-cache"] == "miss"
    assert len(again.content) > len(cut.content)
    assert upstream.count == 2
    assert serving.in_flight(client.core) == 0


def test_an_error_in_a_stream_is_told_without_what_is_behind(served, upstream):
    client = served()
    good = b'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
    bad = json.dumps(openai_error(f"no {serving.UPSTREAM_KEY} at {upstream.url}", code="overloaded"))
    upstream.fail_next(
        200, headers={"content-type": "text/event-stream"}, body=good + f"data: {bad}\n\n".encode()
    )
    answer = client.chat(stream=True)
    assert json.loads(payloads(answer.content)[-1])["error"]["code"] == "overloaded"
    assert serving.UPSTREAM_KEY not in answer.text
    assert "127.0.0.1" not in answer.text


def test_r51_a_fallback_before_the_first_content_is_not_seen(served, upstream):
    client = served(router={"fallbacks": [{"m": [SLASHES]}]})
    for fail in (lambda: upstream.fail_next(503), lambda: upstream.cut_stream_after(1)):
        fail()
        before = upstream.count
        answer = client.chat(f"{before}", stream=True)
        assert (answer.status_code, answer.headers["x-llm-fallback"]) == (200, "true")
        assert (answer.headers["x-llm-model"], answer.headers["x-llm-attempts"]) == (SLASHES, "2")
        assert payloads(answer.content)[-1] == b"[DONE]"
        assert len({json.loads(data)["id"] for data in payloads(answer.content)[:-1]}) == 1
        assert upstream.count == before + 2


def test_errors_before_the_first_content_of_a_stream_are_plain(served, upstream):
    client = served()
    upstream.fail_next(429, headers={"retry-after": "3"})
    answer = client.chat(stream=True)
    assert refused(answer) == (429, "rate_limit_exceeded", None)
    assert answer.headers["retry-after"] == "3"


def test_r52_a_stream_that_others_went_on_with_is_not_kept(served, upstream):
    client = served(
        models=[serving.model("m", upstream), serving.model("m", upstream, identity="m-2")],
        router={"on_stream_error": "continue"},
    )
    upstream.cut_stream_after(4)
    whole = client.chat(stream=True)
    assert payloads(whole.content)[-1] == b"[DONE]"
    assert text_of(whole.content).startswith("You said: hi")
    assert upstream.count == 2
    again = client.chat(stream=True)
    assert again.headers["x-llm-cache"] == "miss"
    assert upstream.count == 3
    assert client.chat(stream=True).headers["x-llm-cache"] == "hit"


# Clients that leave -------------------------------------------------------------------------------

EACH_CACHE = pytest.mark.parametrize("cache", [{"type": "local"}, None], ids=["cached", "uncached"])
AT_ONCE_S = 1.0  # R53


@EACH_CACHE
def test_r53_who_leaves_a_stream_ends_the_call(served, upstream, cache):
    client = served(cache=cache)
    if client.front == "asgi":
        upstream.hold(after_events=3)  # nothing is sent: the server itself says that the client is gone
    else:
        upstream.stream_events, upstream.chunk_delay = 500, 0.02
    with client.stream("POST", CHAT, json=chat(stream=True)) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        assert serving.in_flight(client.core) == 1
    took = serving.until(lambda: upstream.disconnected == 1, "the upstream's connection is closed")
    took += serving.until(lambda: serving.in_flight(client.core) == 0, "the call is over")
    assert took < AT_ONCE_S
    serving.until(lambda: serving.idle(client.core), "nobody reads along")
    upstream.release()
    upstream.stream_events, upstream.chunk_delay = 8, 0.0
    again = client.chat(stream=True)
    assert again.headers["x-llm-cache"] == ("miss" if cache else "bypass")
    assert payloads(again.content)[-1] == b"[DONE]"
    assert upstream.count == 2


@EACH_CACHE
def test_r53_who_leaves_a_plain_request_ends_the_call(asgi_server, upstream, cache):
    """Under WSGI no app hears of it before it answers."""
    server = asgi_server
    app = server.sub_app(serving.config(upstream, cache=cache))
    server.app = app
    upstream.hold()
    with serving.Client(server.url, "asgi", app.core) as client:
        leaving = serving.Leaving(server.url, CHAT, chat())
        upstream.wait_for(1)
        assert serving.in_flight(app.core) == 1
        leaving.leave()
        took = serving.until(lambda: serving.nobody_is_connected(upstream), "the connection is closed")
        took += serving.until(lambda: serving.in_flight(app.core) == 0, "the call is over")
        assert took < AT_ONCE_S
        upstream.release()
        assert client.chat().status_code == 200
    assert upstream.count == 2
    server.close(app)


def test_c56_who_leaves_does_not_end_the_call_of_others(served, upstream):
    client = served()
    upstream.hold(after_events=3)
    leaving = serving.Leaving(client.url, CHAT, chat(stream=True))
    leaving.read_until(b"data: ")
    with client.stream("POST", CHAT, json=chat(stream=True)) as follower:
        assert follower.headers["x-llm-cache"] == "collapsed"
        chunks = follower.iter_raw()
        got = next(chunks)
        leaving.leave()
        upstream.release()
        got += b"".join(chunks)
    assert payloads(got)[-1] == b"[DONE]"
    assert upstream.count == 1
    serving.until(lambda: serving.in_flight(client.core) == 0, "the call is over")
