"""A stream that was seen once is seen again, to the byte, over both fronts (C77 to C86).

``front`` posts through a middleware to a host whose handler the test gives; the streams are those of a fake
provider (`FakeUpstream`'s builders) and, where a case needs awkward bytes, written out here.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
from collections.abc import Callable, Iterator

import pytest

from llm_middleware import CacheManager
from llm_middleware._fake_items import messages, responses
from llm_middleware._fake_payloads import Stamp, chat, text_completion
from llm_middleware.asgi import LLMCacheMiddleware as ASGIMiddleware
from llm_middleware.wsgi import LLMCacheMiddleware as WSGIMiddleware
from tests.support import CHAT, Reply, Seen, chat_stream, chunk, completion, sse

TEXT, RESPONSES, MESSAGES = "/v1/completions", "/v1/responses", "/v1/messages"
ROUTES = {CHAT: "chat", TEXT: "text", RESPONSES: "responses", MESSAGES: "messages", "/ask": "json"}
BUILDERS = {CHAT: chat, TEXT: text_completion, RESPONSES: responses, MESSAGES: messages}
SSE = {"content-type": "text/event-stream; charset=utf-8"}
USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture
def fresh(front):
    """`front` with a cache of its own."""

    def make(handler: Callable[[Seen], object], **settings: object):
        return front(handler, routes=ROUTES, **{"cache": CacheManager(), **settings})

    return make


@pytest.fixture
def provider(fresh):
    """``provider(**settings)``: a front whose host is a provider; no two answers have ids in common."""
    numbers = itertools.count(1)

    def handler(seen: Seen) -> object:
        number = next(numbers)
        made = BUILDERS[seen.path](seen.json(), Stamp(f"{number:04x}", 1_700_000_000 + number), 5)
        headers = {"content-type": made.content_type}
        if made.streamed:
            return 200, headers, list(made.chunks)
        return 200, {**headers, "content-length": str(len(made.chunks[0]))}, made.chunks[0]

    def make(**settings: object):
        return fresh(handler, **settings)

    return make


@pytest.fixture
def streaming(fresh):
    """``streaming(chunks, ...)``: a front whose host streams these chunks in turn, one list per call."""

    def make(*answers: list[bytes], headers: dict[str, str] = SSE, **settings: object):
        turn = iter(answers)
        return fresh(lambda seen: (200, headers, next(turn)), **settings)

    return make


def stream(**fields: object) -> dict:
    return {"model": "m", "messages": USER, "stream": True, **fields}


def events(reply: Reply) -> list[dict]:
    """The JSON payloads of an event stream, ``[DONE]`` left out."""
    lines = [line for line in reply.body.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def same_again(client, body: object, path: str = CHAT) -> Reply:
    """Post twice: the second is a hit with the same body, in the same pieces, under the same type."""
    miss, hit = client.post(body, path), client.post(body, path)
    assert (miss.cache, hit.cache) == ("miss", "hit")
    assert hit.chunks == miss.chunks
    assert hit.headers["content-type"] == miss.headers["content-type"]
    assert "content-length" not in hit.headers
    assert client.host.calls == 1
    return hit


# C77: byte for byte -------------------------------------------------------------------------------


def test_c77_ids_created_chunks_and_done_are_the_same(provider):
    client = provider()
    hit = same_again(client, stream())
    payloads = events(hit)
    assert hit.chunks[-1] == b"data: [DONE]\n\n"
    assert {(payload["id"], payload["created"]) for payload in payloads} == {("chatcmpl-0001", 1_700_000_001)}
    assert len(hit.chunks) == len(payloads) + 1
    assert int(hit.headers["age"]) >= 0
    assert hit.headers["x-accel-buffering"] == "no"
    assert hit.headers["content-type"] == "text/event-stream; charset=utf-8"


LINE = json.dumps(chunk("é日本", "stop"), ensure_ascii=False).encode()
HALVES = [LINE[: len(LINE) // 2], LINE[len(LINE) // 2 :]]
DONE = b"data: [DONE]\n\n"
AWKWARD = {
    "crlf": [b"data: " + LINE + b"\r\n\r\n", b"data: [DONE]\r\n\r\n"],
    "cr": [b"data: " + LINE + b"\r\r", b"data: [DONE]\r\r"],
    "mixed line ends": [b"data: " + LINE + b"\r\n\n", b"data: [DONE]\n\r\n"],
    "comments": [b": ping\n\n", b"data: " + LINE + b"\n\n", b": keep-alive\n\n", DONE],
    "comment in an event": [b": ping\ndata: " + LINE + b"\n\n", DONE],
    "event lines": [b"event: message\nid: 7\nretry: 10\ndata: " + LINE + b"\n\n", DONE],
    "data over lines": [b"data: " + LINE[:-1] + b"\ndata: }\n\n", DONE],
    "no space": [b"data:" + LINE + b"\n\n", b"data:[DONE]\n\n"],
    "no final blank line": [b"data: " + LINE + b"\n\n", b"data: [DONE]"],
    "one line end at the end": [b"data: " + LINE + b"\n\n", b"data: [DONE]\n"],
    "blank lines at the start": [b"\n\n\ndata: " + LINE + b"\n\n", DONE],
    "byte order mark": [b"\xef\xbb\xbfdata: " + LINE + b"\n\n", DONE],
    "line separator in the text": [
        b"data: " + LINE.replace("日".encode(), "\u2028\u2029\x85".encode()) + b"\n\n",
        DONE,
    ],
}


@pytest.mark.parametrize("name", AWKWARD)
def test_c77_awkward_streams_are_replayed_with_the_same_events(streaming, name: str):
    chunks = AWKWARD[name]
    hit = same_again(streaming(chunks), stream())
    assert hit.chunks == chunks


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_c77_a_replay_is_cut_at_events_however_the_stream_came(streaming, name: str, size: int):
    """Pieces of one byte split every character and every line end; one big piece joins all the events."""
    whole = b"".join(AWKWARD[name])
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    client = streaming(pieces)
    miss, hit = client.post(stream()), client.post(stream())
    assert (miss.chunks, miss.cache, hit.cache) == (pieces, "miss", "hit")
    assert hit.chunks == AWKWARD[name]


def test_c77_an_opaque_stream_is_replayed_in_the_pieces_it_came_in(streaming):
    pieces = [b'{"n": 1}\n', b'{"n', b'": 2}\n{"n": 3}', b"\n"]
    client = streaming(pieces, headers={"content-type": "application/x-ndjson"})
    hit = same_again(client, {"question": "why?"}, "/ask")
    assert hit.chunks == pieces
    assert "x-accel-buffering" not in hit.headers


def test_c77_a_long_stream(streaming):
    words = [f"word {number} é日本" for number in range(5000)]
    chunks = chat_stream(*words)
    assert same_again(streaming(chunks), stream()).chunks == chunks


def test_c77_the_disk_keeps_a_stream_as_well(streaming, tmp_path):
    chunks = chat_stream("a", "é", "日本")
    cache = CacheManager(type="disk", disk_cache_dir=str(tmp_path))
    try:
        assert same_again(streaming(chunks, cache=cache), stream()).chunks == chunks
    finally:
        cache.close()


# C78 to C82: what is in the stream ----------------------------------------------------------------


def test_c78_reasoning_deltas_are_replayed(streaming):
    chunks = sse(
        chunk(None, role="assistant", reasoning_content="let me"),
        chunk(None, reasoning_content=" think"),
        chunk(None, reasoning="in another field"),
        chunk("42"),
        chunk(None, "stop"),
    )
    hit = same_again(streaming(chunks), stream())
    deltas = [payload["choices"][0]["delta"] for payload in events(hit)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "let me think"
    assert deltas[2] == {"reasoning": "in another field"}


def test_c79_usage_with_details_is_identical(streaming):
    usage = {
        "prompt_tokens": 11,
        "completion_tokens": 5,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 2, "accepted_prediction_tokens": 1},
        "cost": 0.000123,
    }
    chunks = sse(chunk("a"), chunk(None, "stop"), {**chunk(None), "choices": [], "usage": usage})
    hit = same_again(streaming(chunks), stream(stream_options={"include_usage": True}))
    assert events(hit)[-1]["usage"] == usage


def test_c80_two_choices_stay_apart(provider):
    client = provider()
    hit = same_again(client, stream(n=2))
    texts = {0: "", 1: ""}
    for payload in events(hit):
        for choice in payload["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts[1] == texts[0] + " (2)"


def test_c81_two_parallel_tool_calls(provider):
    client = provider()
    asked = [{"role": "user", "content": "the weather in two cities"}]
    hit = same_again(client, stream(messages=asked, tools=TOOLS))
    calls: dict[int, dict] = {}
    for payload in events(hit):
        for call in payload["choices"][0]["delta"].get("tool_calls", ()):
            known = calls.setdefault(call["index"], {"arguments": ""})
            known.setdefault("id", call.get("id"))
            known.setdefault("name", call["function"].get("name"))
            known["arguments"] += call["function"].get("arguments", "")
    assert calls == {
        0: {"id": "call_00010", "name": "weather", "arguments": '{"city": "Paris"}'},
        1: {"id": "call_00011", "name": "weather", "arguments": '{"city": "Oslo"}'},
    }


def test_c82_text_completions(provider):
    hit = same_again(provider(), {"model": "m", "prompt": "hi", "stream": True}, TEXT)
    assert {payload["object"] for payload in events(hit)} == {"text_completion"}


def test_c82_responses(provider):
    hit = same_again(provider(), {"model": "m", "input": "hi", "stream": True}, RESPONSES)
    payloads = events(hit)
    assert [payload["sequence_number"] for payload in payloads] == list(range(len(payloads)))
    assert payloads[-1]["type"] == "response.completed"
    assert hit.chunks[0].startswith(b"event: response.created\ndata: ")


def messages_request(*, streamed: bool) -> dict:
    return {"model": "m", "max_tokens": 9, "messages": USER, "stream": streamed}


def test_c82_anthropic_messages(provider):
    hit = same_again(provider(), messages_request(streamed=True), MESSAGES)
    assert [payload["type"] for payload in events(hit)][-2:] == ["message_delta", "message_stop"]


@pytest.mark.parametrize("first", [False, True])
def test_c85_anthropic_messages_are_given_only_in_the_form_they_came_in(provider, first: bool):
    """The other form is a miss, and then the entry has both."""
    client = provider()
    one, other = messages_request(streamed=first), messages_request(streamed=not first)
    replies = [client.post(body, MESSAGES) for body in (one, other, one, other)]
    assert [reply.cache for reply in replies] == ["miss", "miss", "hit", "hit"]
    assert [reply.chunks for reply in replies[2:]] == [reply.chunks for reply in replies[:2]]
    assert client.host.calls == 2
    assert replies[0].headers["x-llm-cache-key"] == replies[1].headers["x-llm-cache-key"]


# C83: cut streams ---------------------------------------------------------------------------------

WHOLE = chat_stream("a", "b", "c")
CUTS = {
    "no done": WHOLE[:-1],
    "in the middle": WHOLE[:2],
    "in an event": [*WHOLE[:2], WHOLE[2][:20]],
    "in the last line": [*WHOLE[:-1], b"data: [DO"],
    "an error event": [*WHOLE[:2], b'data: {"error": {"message": "overloaded"}}\n\n', WHOLE[-1]],
    "nothing at all": [],
}


@pytest.mark.parametrize("cut", CUTS)
def test_c83_a_stream_that_the_provider_cut_is_not_served(streaming, cut: str):
    client = streaming(CUTS[cut], WHOLE)
    replies = [client.post(stream()) for _ in range(3)]
    assert [reply.cache for reply in replies] == ["miss", "miss", "hit"]
    assert [reply.body for reply in replies] == [b"".join(CUTS[cut]), *[b"".join(WHOLE)] * 2]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"model": "m", "prompt": "hi", "stream": True}),
        (RESPONSES, {"model": "m", "input": "hi", "stream": True}),
        (MESSAGES, messages_request(streamed=True)),
    ],
)
def test_c83_a_cut_stream_of_the_other_kinds_is_not_served(fresh, path: str, body: dict):
    whole = list(BUILDERS[path](body, Stamp("1", 1), 5).chunks)
    turn = iter([whole[:-1], whole])
    client = fresh(lambda seen: (200, SSE, next(turn)))
    assert [client.post(body, path).cache for _ in range(3)] == ["miss", "miss", "hit"]


def test_c83_a_stream_that_raises_is_not_served(fresh):
    def broken() -> Iterator[bytes]:
        yield from WHOLE[:2]
        raise ConnectionError("reset by peer")

    turn: Iterator[object] = iter([broken(), WHOLE])
    client = fresh(lambda seen: (200, SSE, next(turn)))
    with pytest.raises(ConnectionError, match="reset by peer"):
        client.post(stream())
    assert [client.post(stream()).cache for _ in range(2)] == ["miss", "hit"]


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_c83_a_stream_under_an_error_status_is_not_served(fresh, status: int):
    turn = iter([(status, SSE, WHOLE), (200, SSE, WHOLE)])
    client = fresh(lambda seen: next(turn))
    replies = [client.post(stream()) for _ in range(3)]
    assert [(reply.status, reply.cache) for reply in replies] == [
        (status, "miss"),
        (200, "miss"),
        (200, "hit"),
    ]


# C84: clients that leave --------------------------------------------------------------------------


def read_some(
    kind: str, cache: CacheManager, chunks: list[bytes], count: int, after: Callable
) -> list[bytes]:
    """Post a stream, take ``count`` chunks and leave. The handler calls ``after`` after them all."""
    if kind == "wsgi":
        return read_some_wsgi(cache, chunks, count, after)
    return asyncio.run(read_some_asgi(cache, chunks, count, after))


def read_some_wsgi(cache: CacheManager, chunks: list[bytes], count: int, after: Callable) -> list[bytes]:
    def app(environ, start_response):
        start_response("200 OK", list(SSE.items()))

        def body() -> Iterator[bytes]:
            yield from chunks
            after()

        return body()

    raw = json.dumps(stream()).encode()
    environ = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": CHAT,
        "CONTENT_LENGTH": str(len(raw)),
        "wsgi.input": io.BytesIO(raw),
    }
    result = WSGIMiddleware(app, cache=cache)(environ, lambda *args: None)
    got = list(itertools.islice(iter(result), count))
    result.close()
    return got


async def read_some_asgi(
    cache: CacheManager, chunks: list[bytes], count: int, after: Callable
) -> list[bytes]:
    gone = asyncio.Event()
    got: list[bytes] = []
    raw = json.dumps(stream()).encode()
    given = [{"type": "http.request", "body": raw, "more_body": False}]

    async def app(scope, receive, send) -> None:
        await receive()
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream")],
            }
        )
        for piece in chunks:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await asyncio.sleep(0)
        after()
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> dict:
        if given:
            return given.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        if gone.is_set():
            raise OSError("the client has left")
        if message["type"] == "http.response.body" and message["body"]:
            got.append(message["body"])
            if len(got) == count:
                gone.set()
                # Time for the news to reach whoever listens for it.
                for _ in range(5):
                    await asyncio.sleep(0)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "root_path": ""}
    await ASGIMiddleware(app, cache=cache)(scope, receive, send)
    return got


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
@pytest.mark.parametrize("policy", ["auto", "cancel"])
def test_c84_a_client_that_leaves_in_the_middle_leaves_nothing(kind: str, policy: str):
    cache, ends = CacheManager(on_disconnect=policy), []
    assert read_some(kind, cache, WHOLE, 2, lambda: ends.append(1)) == WHOLE[:2]
    assert ends == []
    assert cache.stats()["flights"] == 0
    assert "stored" not in cache.stats()
    assert cache.get(stream(), scope="caller:anonymous") is None


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
def test_c84_finish_completes_it_behind_the_client(kind: str):
    cache, ends = CacheManager(on_disconnect="finish"), []
    assert read_some(kind, cache, WHOLE, 2, lambda: ends.append(1)) == WHOLE[:2]
    assert ends == [1]
    assert list(cache.get(stream(), scope="caller:anonymous")) == WHOLE


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
@pytest.mark.parametrize("policy", ["auto", "cancel", "finish"])
def test_c84_a_client_that_leaves_right_after_done_leaves_a_stored_answer(kind: str, policy: str):
    """SDKs hang up at ``[DONE]``, before the response has formally ended."""
    cache = CacheManager(on_disconnect=policy)
    assert read_some(kind, cache, WHOLE, len(WHOLE), lambda: None) == WHOLE
    assert cache.stats()["flights"] == 0
    assert list(cache.get(stream(), scope="caller:anonymous")) == WHOLE


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
def test_c84_a_client_that_leaves_right_before_done_leaves_nothing(kind: str):
    cache = CacheManager()
    assert read_some(kind, cache, WHOLE, len(WHOLE) - 1, lambda: None) == WHOLE[:-1]
    assert cache.get(stream(), scope="caller:anonymous") is None


# C85: the other form ------------------------------------------------------------------------------

WITH_USAGE = {"stream_options": {"include_usage": True}}


def test_c85_a_stream_with_usage_answers_a_plain_request(provider):
    client = provider()
    recorded = client.post(stream(**WITH_USAGE))
    plain = client.post({"model": "m", "messages": USER})
    assert (recorded.cache, plain.cache, client.host.calls) == ("miss", "hit", 1)
    told = events(recorded)
    text = "".join(c["delta"].get("content") or "" for event in told for c in event["choices"])
    body = plain.json()
    assert body["object"] == "chat.completion"
    assert (body["id"], body["created"]) == (told[0]["id"], told[0]["created"])
    assert body["choices"][0]["message"]["content"] == text
    assert body["usage"] == told[-1]["usage"]
    assert plain.headers["content-type"] == "application/json"
    assert plain.headers["content-length"] == str(len(plain.body))


def test_c85_a_stream_without_usage_cannot_answer_a_plain_request(provider):
    """A plain body always tells its usage, and nobody can know it."""
    client = provider()
    bodies = [stream(), {"model": "m", "messages": USER}]
    replies = [client.post(body) for body in bodies * 2]
    assert [reply.cache for reply in replies] == ["miss", "miss", "hit", "hit"]
    assert [reply.body for reply in replies[2:]] == [reply.body for reply in replies[:2]]
    assert client.host.calls == 2


@pytest.mark.parametrize("usage", [False, True])
def test_c85_a_plain_answer_answers_a_stream(provider, usage: bool):
    client = provider()
    plain = client.post({"model": "m", "messages": USER})
    hit = client.post(stream(**(WITH_USAGE if usage else {})))
    assert (plain.cache, hit.cache, client.host.calls) == ("miss", "hit", 1)
    told, body = events(hit), plain.json()
    assert hit.chunks[-1] == DONE
    assert hit.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in hit.headers
    assert {(event["id"], event["created"], event["object"]) for event in told} == {
        (body["id"], body["created"], "chat.completion.chunk")
    }
    text = "".join(c["delta"].get("content") or "" for event in told for c in event["choices"])
    assert text == body["choices"][0]["message"]["content"]
    assert [event["usage"] for event in told if event.get("usage")] == ([body["usage"]] if usage else [])


def test_c85_usage_is_left_out_for_those_who_did_not_ask(provider):
    client = provider()
    recorded = client.post(stream(**WITH_USAGE))
    hit = client.post(stream())
    assert (recorded.cache, hit.cache) == ("miss", "hit")
    assert hit.chunks == [*recorded.chunks[:-2], recorded.chunks[-1]]


def test_c85_usage_is_fetched_for_those_who_ask(provider):
    """A stream recorded without usage is no answer to a request for it."""
    client = provider()
    assert client.post(stream()).cache == "miss"
    asked = client.post(stream(**WITH_USAGE))
    assert asked.cache == "miss"
    assert events(asked)[-1]["usage"]["total_tokens"] > 0
    again = client.post(stream(**WITH_USAGE))
    assert (again.cache, again.chunks) == ("hit", asked.chunks)


def test_c85_both_ways_between_tool_calls(provider):
    client = provider()
    asked = [{"role": "user", "content": "the weather in two cities"}]
    plain = client.post({"model": "m", "messages": asked, "tools": TOOLS})
    hit = client.post(stream(messages=asked, tools=TOOLS))
    assert hit.cache == "hit"
    whole: dict[int, str] = {}
    for event in events(hit):
        for choice in event["choices"]:
            for call in choice["delta"].get("tool_calls") or ():
                whole[call["index"]] = whole.get(call["index"], "") + call["function"]["arguments"]
    made = plain.json()["choices"][0]["message"]["tool_calls"]
    assert list(whole.values()) == [call["function"]["arguments"] for call in made]


def test_c85_text_completions_both_ways(provider):
    body = {"model": "m", "prompt": "hi"}
    client = provider()
    plain = client.post(body, TEXT)
    hit = client.post({**body, "stream": True}, TEXT)
    assert hit.cache == "hit"
    assert "".join(event["choices"][0]["text"] for event in events(hit)) == plain.json()["choices"][0]["text"]

    client = provider()
    recorded = client.post({**body, "stream": True, **WITH_USAGE}, TEXT)
    hit = client.post(body, TEXT)
    text = "".join(event["choices"][0]["text"] for event in events(recorded) if event["choices"])
    assert (hit.cache, hit.json()["choices"][0]["text"]) == ("hit", text)


def test_c85_responses_both_ways(provider):
    body = {"model": "m", "input": "hi"}
    client = provider()
    plain = client.post(body, RESPONSES)
    hit = client.post({**body, "stream": True}, RESPONSES)
    assert (hit.cache, events(hit)[-1]["response"]) == ("hit", plain.json())

    client = provider()
    recorded = client.post({**body, "stream": True}, RESPONSES)
    hit = client.post(body, RESPONSES)
    assert (hit.cache, hit.json()) == ("hit", events(recorded)[-1]["response"])


def test_c85_what_cannot_be_converted_is_fetched(streaming):
    """A stream whose pieces contradict each other is replayed as it is, and never turned into a body."""
    odd = sse(chunk("a"), {**chunk("b"), "model": "another"}, {**chunk(None, "stop"), "usage": {"n": 1}})
    plain = [json.dumps(completion()).encode()]
    client = streaming(odd, plain)
    assert same_again(client, stream()).chunks == odd
    assert client.post({"model": "m", "messages": USER}).cache == "miss"


def test_c85_a_replay_of_a_converted_stream_is_the_same_every_time(provider):
    client = provider()
    client.post({"model": "m", "messages": USER})
    first, second = client.post(stream()), client.post(stream())
    assert (first.cache, first.chunks) == ("hit", second.chunks)


# C86: the first event -----------------------------------------------------------------------------


def test_c86_a_replay_needs_no_upstream(fresh):
    """After the first answer the host's handler is never asked again."""

    def once(seen: Seen) -> object:
        assert not used
        used.append(1)
        return 200, SSE, WHOLE

    used: list[int] = []
    client = fresh(once)
    assert [client.post(stream()).chunks for _ in range(5)] == [WHOLE] * 5


def test_c86_the_first_event_of_a_replay_does_not_wait_for_the_rest():
    """ASGI: each event is a message of its own, in order; WSGI: each step of the iterator is one event."""
    cache = CacheManager()
    cache.set(stream(), b"".join(WHOLE), scope="caller:anonymous")
    never: list[int] = []
    for kind in ("asgi", "wsgi"):
        assert read_some(kind, cache, [b"never"], 10, lambda: never.append(1)) == WHOLE
    assert never == []
