"""What responses say of the cache, and which headers are kept. Cases C109, C110, C112 and C113."""

from __future__ import annotations

import asyncio
import gzip
import io
import json

import pytest

from llm_middleware import CacheManager, Event
from llm_middleware.caching.answer import CacheInfo
from llm_middleware.caching.headers import add_info, info_headers
from tests.support import AsgiFront, Host, WsgiFront, chat_stream, completion

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**BODY, "stream": True}
JSON = "application/json"


def raw_answer(**headers: str):
    """A handler whose answer has these headers."""
    raw = json.dumps(completion()).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda seen: (200, {"content-type": JSON, "content-length": str(len(raw)), **named}, raw)


def pairs(client, body: object = BODY, headers: dict[str, str] | None = None) -> list[tuple[str, str]]:
    """The response headers one by one, as the server gets them."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    if isinstance(client, WsgiFront):
        started: list = []
        environ = {
            "REQUEST_METHOD": "POST",
            "PATH_INFO": "/v1/chat/completions",
            "CONTENT_TYPE": JSON,
            "CONTENT_LENGTH": str(len(raw)),
            "wsgi.input": io.BytesIO(raw),
            **{"HTTP_" + name.upper().replace("-", "_"): value for name, value in (headers or {}).items()},
        }
        result = client.app(
            environ, lambda status, given, exc=None: started.extend(given) or (lambda data: None)
        )
        for _ in result:
            pass
        if hasattr(result, "close"):
            result.close()
        return [(name.lower(), value) for name, value in started]

    sent: list[dict] = []
    messages = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive() -> dict:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message: dict) -> None:
        sent.append(message)

    given = [(b"content-length", b"%d" % len(raw))]
    given += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": given}
    asyncio.run(client.app(scope, receive, send))
    return [(name.decode(), value.decode()) for name, value in sent[0]["headers"]]


def values(found: list[tuple[str, str]], name: str) -> list[str]:
    return [value for other, value in found if other == name]


def cache_headers(reply) -> dict[str, str]:
    names = ("cache-status", "age")
    return {
        name: value
        for name, value in reply.headers.items()
        if name in names or name.startswith(("x-llm-", "x-litellm-"))
    }


KEY = CacheManager().plan("chat", BODY, scope="caller:anonymous").digest


# --- C109, C110: what is told


def test_c109_a_miss(front):
    client = front(lambda seen: completion(), cache=CacheManager())
    assert cache_headers(client.post(BODY)) == {
        "cache-status": "llm-middleware; fwd=miss; stored",
        "x-llm-cache": "miss",
        "x-llm-cache-key": KEY,
    }


def test_c110_a_hit(front, clock):
    client = front(lambda seen: completion(), cache=CacheManager(ttl=300, ttl_jitter=0, clock=clock))
    client.post(BODY)
    clock.advance(12.7)
    assert cache_headers(client.post(BODY)) == {
        "cache-status": "llm-middleware; hit; ttl=287",
        "x-llm-cache": "hit",
        "x-llm-cache-key": KEY,
        "x-llm-cache-tier": "memory",
        "age": "12",
    }


def test_c110_a_hit_on_disk(front, tmp_path):
    cache = CacheManager("disk", disk_cache_dir=tmp_path)
    client = front(lambda seen: completion(), cache=cache)
    client.post(BODY)
    assert client.post(BODY).headers["x-llm-cache-tier"] == "disk"
    cache.close()


def test_c110_a_hit_that_never_ends(front):
    """There is no number of seconds to tell."""
    client = front(lambda seen: completion(), cache=CacheManager(ttl=None))
    client.post(BODY)
    assert client.post(BODY).cache_status == "llm-middleware; hit"


def test_the_clock_was_set_back(front, clock):
    client = front(lambda seen: completion(), cache=CacheManager(ttl=300, ttl_jitter=0, clock=clock))
    client.post(BODY)
    clock.advance(-60)
    reply = client.post(BODY)
    assert (reply.headers["age"], reply.cache_status) == ("0", "llm-middleware; hit; ttl=360")


def test_a_refresh_that_the_client_asked_for(front):
    client = front(lambda seen: completion(), cache=CacheManager())
    assert cache_headers(client.post({**BODY, "cache": {"no-cache": True}})) == {
        "cache-status": "llm-middleware; fwd=request; stored",
        "x-llm-cache": "miss",
        "x-llm-cache-key": KEY,
    }


@pytest.mark.parametrize(
    ("controls", "told"),
    [
        ({"no-store": True}, "llm-middleware; fwd=miss; detail=no-store"),
        ({"ttl": 0}, "llm-middleware; fwd=miss; detail=ttl-zero"),
        ({"no-cache": True, "ttl": 0}, "llm-middleware; fwd=request; detail=ttl-zero"),
        ({"no-cache": True, "no-store": True}, "llm-middleware; fwd=bypass; detail=no-store"),
    ],
)
def test_why_an_answer_was_not_stored(front, controls, told):
    client = front(lambda seen: completion(), cache=CacheManager())
    assert client.post({**BODY, "cache": controls}).cache_status == told


@pytest.mark.parametrize(
    ("settings", "body", "detail"),
    [
        ({"enabled": False}, BODY, "disabled"),
        ({"mode": "default_off"}, BODY, "default-off"),
        ({"supported_call_types": ["embedding"]}, BODY, "call-type-off"),
        ({}, b"{", "unparsable-body"),
        ({"max_body_bytes": 10}, BODY, "body-too-large"),
    ],
)
def test_a_bypass(front, settings, body, detail):
    client = front(lambda seen: completion(), cache=CacheManager(**settings))
    reply = client.post(body)
    assert (reply.status, reply.json()) == (200, completion())
    assert cache_headers(reply) == {
        "cache-status": f"llm-middleware; fwd=bypass; detail={detail}",
        "x-llm-cache": "bypass",
    }


def test_a_conversation_that_grows_is_bypassed(front):
    client = front(lambda seen: {}, cache=CacheManager())
    reply = client.post({"model": "m", "input": "x", "conversation": "c"}, "/v1/responses")
    assert reply.cache_status == "llm-middleware; fwd=bypass; detail=stateful"


def test_an_encoding_that_is_not_known_is_bypassed(front):
    client = front(lambda seen: completion(), cache=CacheManager())
    reply = client.post(b"\x8b\x00", headers={"content-encoding": "br"})
    assert reply.cache_status == "llm-middleware; fwd=bypass; detail=encoded-body"


def test_a_streamed_miss_and_hit(front):
    client = front(lambda seen: chat_stream("a", "b"), cache=CacheManager())
    assert cache_headers(client.post(STREAM)) == {
        "cache-status": "llm-middleware; fwd=miss",
        "x-llm-cache": "miss",
        "x-llm-cache-key": KEY,
    }
    hit = client.post(STREAM)
    assert hit.headers["x-llm-cache"] == "hit"
    assert hit.chunks == chat_stream("a", "b")
    assert hit.headers["x-accel-buffering"] == "no"
    assert "content-length" not in hit.headers


def waiting_for_a_follower(cache: CacheManager, when, answer):
    """A handler that answers once another request reads along."""

    def handler(seen):
        when(lambda: any(flight.readers for flight in cache._flow.flights._flights.values()))
        return answer(seen)

    return handler


def test_a_collapsed_request(front, when):
    cache = CacheManager()
    client = front(waiting_for_a_follower(cache, when, lambda seen: completion()), cache=cache)
    told = sorted((cache_headers(reply) for reply in client.together(BODY, BODY)), key=str)
    assert told == [
        {
            "cache-status": "llm-middleware; fwd=miss; collapsed",
            "x-llm-cache": "collapsed",
            "x-llm-cache-key": KEY,
        },
        {"cache-status": "llm-middleware; fwd=miss; stored", "x-llm-cache": "miss", "x-llm-cache-key": KEY},
    ]
    assert client.host.calls == 1


def test_the_litellm_profile(front):
    client = front(lambda seen: completion(), cache=CacheManager(), header_profile="litellm")
    for _ in range(2):
        reply = client.post(BODY)
        assert reply.headers["x-litellm-cache-key"] == reply.headers["x-llm-cache-key"] == KEY
    client = front(lambda seen: completion(), cache=CacheManager(enabled=False), header_profile="litellm")
    assert "x-litellm-cache-key" not in client.post(BODY).headers


@pytest.mark.parametrize(
    ("info", "told"),
    [
        (CacheInfo("hit", "k", ttl=0.5, age=1.5, tier="redis"), "llm-middleware; hit; ttl=0"),
        (CacheInfo("stale", "k", "max-stale", ttl=-0.5), "llm-middleware; hit; ttl=-1; detail=max-stale"),
        (CacheInfo("stale", "k", "max-stale", ttl=-12.0), "llm-middleware; hit; ttl=-12; detail=max-stale"),
        (CacheInfo("partial", "k", "3/4", "partial"), 'llm-middleware; fwd=partial; detail="3/4"'),
        (CacheInfo("miss", "k", forward="miss", stored=True), "llm-middleware; fwd=miss; stored"),
        (CacheInfo("collapsed", "k", forward="miss"), "llm-middleware; fwd=miss; collapsed"),
    ],
)
def test_cache_status(info, told):
    assert dict(info_headers(info))[b"cache-status"].decode() == told


# --- Cache-Control


def test_answers_stay_out_of_other_caches(front):
    client = front(lambda seen: completion(), cache=CacheManager())
    told = [client.post(BODY).headers["cache-control"] for _ in range(2)]
    assert told == ["private, no-store"] * 2
    off = front(lambda seen: completion(), cache=CacheManager(enabled=False))
    assert off.post(BODY).headers["cache-control"] == "private, no-store"


@pytest.mark.parametrize("enabled", [True, False])
def test_the_hosts_own_cache_control_stays(front, enabled):
    client = front(raw_answer(cache_control="public, max-age=60"), cache=CacheManager(enabled=enabled))
    for _ in range(2):
        assert values(pairs(client), "cache-control") == ["public, max-age=60"]


def test_the_providers_cache_control_does_not_forbid_storing(front):
    """Providers always send ``no-cache``."""
    client = front(raw_answer(cache_control="no-cache, no-store, private"), cache=CacheManager())
    assert [client.post(BODY).cache for _ in range(2)] == ["miss", "hit"]


@pytest.mark.parametrize("enabled", [True, False])
def test_another_caches_status_stands_beside_ours(front, enabled):
    """RFC 9211: each cache on the way adds its own member."""
    client = front(raw_answer(cache_status="upstream; hit"), cache=CacheManager(enabled=enabled))
    found = ", ".join(values(pairs(client), "cache-status"))
    ours = "llm-middleware; fwd=miss; stored" if enabled else "llm-middleware; fwd=bypass; detail=disabled"
    assert found == f"upstream; hit, {ours}"


# --- what is kept

KEPT = {
    "content-type": JSON,
    "x-request-cost": "0.1",
    "openai-version": "2020-10-01",
    "vary": "Accept-Encoding",
    "content-language": "de",
    "access-control-allow-origin": "*",
    "etag": '"abc"',
}
DROPPED = {
    "set-cookie": "session=secret",
    "date": "Thu, 01 Jan 1970 00:00:00 GMT",
    "server": "x",
    "age": "5",
    "via": "1.1 proxy",
    "x-request-id": "r1",
    "request-id": "r2",
    "retry-after": "5",
    "server-timing": "a",
    "x-ratelimit-remaining-tokens": "5",
    "anthropic-ratelimit-tokens-limit": "5",
    "x-llm-deployment": "d",
    "x-litellm-model-id": "d",
    "alt-svc": "h3",
    "keep-alive": "timeout=5",
}


def test_which_headers_a_hit_has(front):
    raw = json.dumps(completion()).encode()
    sent = {**KEPT, **DROPPED, "content-length": str(len(raw))}
    client = front(lambda seen: (200, sent, raw), cache=CacheManager())
    miss = pairs(client)
    assert {name: values(miss, name)[0] for name in sent} == sent
    hit = pairs(client)
    for name, value in KEPT.items():
        assert values(hit, name) == [value]
    assert values(hit, "content-length") == [str(len(raw))]
    assert values(hit, "age") == ["0"]
    assert not {name for name, _ in hit} & ({*DROPPED} - {"age"})
    names = [name for name, _ in hit]
    assert len(names) == len(set(names))


def test_set_cookie_is_never_replayed(front):
    """Each client that is really answered by the handler gets its own; a hit sets none."""
    client = front(raw_answer(set_cookie="session=secret"), cache=CacheManager())
    assert values(pairs(client), "set-cookie") == ["session=secret"]
    assert values(pairs(client), "set-cookie") == []


@pytest.mark.parametrize("stream", [False, True])
def test_set_cookie_goes_to_the_caller_that_it_was_made_for(front, when, stream):
    """Whoever reads along gets the answer, not the leader's session, nor what is about the leader's call."""
    cache = CacheManager()
    personal = {"set-cookie": "session=secret", "x-request-id": "r1", "x-ratelimit-remaining-tokens": "5"}
    raw = json.dumps(completion()).encode()

    def answer(seen):
        if stream:
            return 200, {"content-type": "text/event-stream", **personal}, chat_stream("a")
        return 200, {"content-type": JSON, "content-length": str(len(raw)), **personal}, raw

    client = front(waiting_for_a_follower(cache, when, answer), cache=cache)
    body = STREAM if stream else BODY
    replies = {reply.cache: reply for reply in client.together(body, body)}
    assert {*replies} == {"miss", "collapsed"}
    assert {name: replies["miss"].headers.get(name) for name in personal} == personal
    assert {name: replies["collapsed"].headers.get(name) for name in personal} == dict.fromkeys(personal)
    assert replies["collapsed"].body == replies["miss"].body


def test_headers_in_any_case_are_dropped(front):
    raw = json.dumps(completion()).encode()
    sent = {"Content-Type": JSON, "Set-Cookie": "session=secret", "X-Request-Id": "r1"}
    client = front(lambda seen: (200, sent, raw), cache=CacheManager())
    client.post(BODY)
    hit = client.post(BODY)
    assert hit.cache == "hit"
    assert hit.headers["content-type"] == JSON
    assert not {"set-cookie", "x-request-id"} & {*hit.headers}


def test_several_headers_of_one_name_are_kept():
    given = [(b"link", b"<a>"), (b"link", b"<b>")]
    out = add_info(given, CacheInfo("hit", "k"))
    assert out[:2] == given


# --- Vary


def test_vary_on_a_header_of_the_request(front):
    client = front(raw_answer(vary="X-Language"), cache=CacheManager())

    def ask(**headers: str) -> str:
        return client.post(
            BODY, headers={name.replace("_", "-"): value for name, value in headers.items()}
        ).cache

    assert [ask(x_language="de"), ask(x_language="de"), ask(x_language="en"), ask()] == [
        "miss",
        "hit",
        "miss",
        "miss",
    ]


def test_vary_of_streams(front):
    sent = {"content-type": "text/event-stream", "vary": "X-Language"}
    client = front(lambda seen: (200, sent, chat_stream("a")), cache=CacheManager())
    told = [client.post(STREAM, headers={"x-language": language}).cache for language in ("de", "de", "en")]
    assert told == ["miss", "hit", "miss"]


def test_vary_of_readers_along(front, when):
    """Two requests at once whose answers differ by a header: each gets its own."""
    cache = CacheManager()
    raw = json.dumps(completion()).encode()
    first = []

    def handler(seen):
        if not first:
            first.append(1)
            when(lambda: any(flight.readers for flight in cache._flow.flights._flights.values()))
        return 200, {"content-type": JSON, "vary": "*"}, raw

    client = front(handler, cache=cache)
    replies = client.together(BODY, BODY)
    assert [reply.cache for reply in replies] == ["miss", "miss"]
    assert client.host.calls == 2


# --- encodings


def test_a_compressed_answer_is_stored_decoded(front):
    plain = json.dumps(completion()).encode()
    packed = gzip.compress(plain)
    sent = {"content-type": JSON, "content-encoding": "gzip", "content-length": str(len(packed))}
    client = front(lambda seen: (200, sent, packed), cache=CacheManager())
    miss = client.post(BODY)
    assert (miss.body, miss.headers["content-encoding"]) == (packed, "gzip")
    assert miss.headers["content-length"] == str(len(packed))
    hit = client.post(BODY)
    assert (hit.cache, hit.body) == ("hit", plain)
    assert "content-encoding" not in hit.headers
    assert hit.headers["content-length"] == str(len(plain))


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("br", b"\x0b\x02\x80"),
        ("gzip", b"no gzip"),
        ("gzip", gzip.compress(b"{}" * 50, mtime=0)[:-9]),
        ("gzip, br", b"x"),
    ],
)
def test_an_answer_that_cannot_be_decoded_is_passed_on_and_not_stored(front, encoding, packed):
    sent = {"content-type": JSON, "content-encoding": encoding, "content-length": str(len(packed))}
    client = front(lambda seen: (200, sent, packed), cache=CacheManager())
    for _ in range(2):
        reply = client.post(BODY)
        assert (reply.body, reply.headers["content-encoding"]) == (packed, encoding)
        assert reply.cache_status == "llm-middleware; fwd=miss; detail=encoded-answer"


def test_a_compressed_answer_that_unpacks_to_too_much_is_not_stored(front):
    packed = gzip.compress(b" " * 100_000)
    sent = {"content-type": JSON, "content-encoding": "gzip"}
    client = front(lambda seen: (200, sent, packed), cache=CacheManager(max_entry_bytes=10_000))
    reply = client.post(BODY)
    assert (reply.body, reply.cache_status) == (packed, "llm-middleware; fwd=miss; detail=encoded-answer")


def test_identity_is_no_encoding(front):
    client = front(raw_answer(content_encoding="identity"), cache=CacheManager())
    assert [client.post(BODY).cache for _ in range(2)] == ["miss", "hit"]


def test_a_compressed_request_and_a_plain_one_are_the_same(front):
    client = front(lambda seen: completion(), cache=CacheManager())
    packed = gzip.compress(json.dumps(BODY).encode())
    assert client.post(packed, headers={"content-encoding": "GZip"}).cache == "miss"
    assert client.host.seen[0].body == packed
    assert client.post(BODY).cache == "hit"
    assert client.post(BODY, headers={"content-encoding": "identity"}).cache == "hit"


def test_a_compressed_request_of_which_a_part_is_stored(front):
    """The handler gets what is missing, in the encoding that the headers say."""

    def handler(seen):
        raw = gzip.decompress(seen.body) if seen.headers.get("content-encoding") == "gzip" else seen.body
        inputs = json.loads(raw)["input"]
        return {"data": [{"index": at, "embedding": [text]} for at, text in enumerate(inputs)]}

    client = front(handler, cache=CacheManager())
    client.post({"model": "e", "input": ["a"]}, "/v1/embeddings")
    packed = gzip.compress(json.dumps({"model": "e", "input": ["a", "b"]}).encode())
    reply = client.post(packed, "/v1/embeddings", {"content-encoding": "gzip"})
    assert [row["embedding"] for row in reply.json()["data"]] == [["a"], ["b"]]
    assert reply.cache_status == 'llm-middleware; fwd=partial; stored; detail="1/2"'


@pytest.mark.parametrize(
    "packed",
    [
        b"no gzip",
        b"",
        gzip.compress(b"{}", mtime=0)[:-1],
        gzip.compress(b"{}", mtime=0) + b"x",
        gzip.compress(b" " * 2000, mtime=0),
    ],
    ids=["no gzip", "empty", "cut", "more behind it", "a bomb"],
)
def test_a_compressed_request_that_is_none_passes_untouched(front, packed):
    client = front(lambda seen: completion(), cache=CacheManager(max_body_bytes=1000))
    reply = client.post(packed, headers={"content-encoding": "gzip"})
    assert reply.cache_status == "llm-middleware; fwd=bypass; detail=unparsable-body"
    assert client.host.seen[0].body == packed


# --- C112, C113: hooks


@pytest.fixture
def told():
    """(events, a hook that collects them)."""
    events: list[Event] = []
    return events


def test_c112_what_hooks_are_told_of_a_miss_and_a_hit(front, told, clock):
    cache = CacheManager(hooks=[told.append], clock=clock, ttl_jitter=0)
    client = front(lambda seen: completion(), cache=cache)
    client.post(BODY)
    clock.advance(5)
    client.post(BODY)
    assert sorted(told[:2], key=lambda event: event.name) == [
        Event("miss", "chat", KEY, cache_hit=False, model="m"),
        Event("stored", "chat", KEY, cache_hit=None, model="m", tier="memory"),
    ]
    assert told[2:] == [Event("hit", "chat", KEY, cache_hit=True, model="m", tier="memory", age=5.0)]


def test_c112_hooks_of_fetch(face, told):
    cache = CacheManager(hooks=[told.append])
    for _ in range(2):
        face.fetch(cache, BODY, lambda body: completion())
    names = [(event.name, event.cache_hit) for event in told]
    assert names == [("stored", None), ("miss", False), ("hit", True)]
    assert {event.key for event in told} == {cache.plan("chat", BODY).digest}


def test_c112_hooks_of_an_answer_that_is_not_stored(front, told):
    client = front(lambda seen: (500, {"content-type": JSON}, b"{}"), cache=CacheManager(hooks=[told.append]))
    client.post(BODY)
    assert [(event.name, event.cache_hit, event.detail) for event in told] == [
        ("not-stored", None, "upstream-error"),
        ("miss", False, "upstream-error"),
    ]


def test_c112_hooks_of_a_bypass(front, told):
    client = front(lambda seen: completion(), cache=CacheManager(hooks=[told.append], mode="default_off"))
    client.post(BODY)
    assert told == [Event("bypass", "chat", None, cache_hit=False, model="m", detail="default-off")]


def test_c113_hooks_of_streams(front, told):
    cache = CacheManager(hooks=[told.append])
    client = front(lambda seen: chat_stream("a"), cache=cache)
    client.post(STREAM)
    client.post(STREAM)
    assert [(event.name, event.cache_hit, event.key, event.stream) for event in told] == [
        ("miss", False, KEY, True),
        ("stored", None, KEY, True),
        ("hit", True, KEY, True),
    ]


def test_a_hook_that_fails_harms_nobody(front, told, caplog):
    def fails(event: Event) -> None:
        raise ValueError("hook")

    cache = CacheManager(hooks=[fails, told.append])
    client = front(lambda seen: completion(), cache=cache)
    assert [client.post(BODY).cache for _ in range(3)] == ["miss", "hit", "hit"]
    assert [event.name for event in told] == ["stored", "miss", "hit", "hit"]
    assert cache.stats()["hook-error"] == 4
    assert [record.levelname for record in caplog.records if record.name == "llm_middleware"] == ["ERROR"]


def test_both_fronts_say_the_same():
    told = []
    for kind in (AsgiFront, WsgiFront):
        client = kind(Host(raw_answer(x_own="1")), cache=CacheManager())
        told.append([sorted(pairs(client)) for _ in range(2)])
    assert told[0] == told[1]
