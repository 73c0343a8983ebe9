"""What clients see of answers by meaning, on both fronts: C75 and C100 to C108."""

from __future__ import annotations

import json

import pytest

from llm_middleware import CacheManager
from llm_middleware.semantic.answers import answer_text
from tests.semantic.conftest import (
    PATIENT,
    Counted,
    Held,
    Upstream,
    asked,
    question_in,
    reworded,
    talk,
    toy,
)
from tests.support import CHAT, completion

BRIEFLY, SLOWLY = reworded("gardens", "briefly"), reworded("gardens", "slowly")
CALMLY = reworded("gardens", "calmly")
RIVERS = reworded("rivers", "briefly")
OURS = ("cache-status", "age", "x-llm-cache", "x-llm-cache-tier", "x-llm-cache-similarity")


def semantic(**settings: object) -> CacheManager:
    known = {"embedding_model": toy, "embedding_budget": PATIENT, "similarity_threshold": 0.5}
    return CacheManager("semantic", **{**known, **settings})


@pytest.fixture
def client(front):
    """``client(**settings)``: one of a host whose answers tell its calls apart."""

    def make(profile: str = "standard", **settings: object):
        upstream = Upstream()
        handler = {True: lambda seen: list(upstream(seen.json())), False: lambda seen: upstream(seen.json())}
        return front(
            lambda seen: handler[bool(seen.json().get("stream"))](seen),
            cache=semantic(**settings),
            header_profile=profile,
        )

    return make


def told(reply) -> dict[str, str]:
    """What the headers say."""
    return {name: reply.headers[name] for name in OURS if name in reply.headers}


def said(reply) -> str:
    assert reply.status == 200, reply.body
    return answer_text("chat", reply.body)


def test_c108_headers_of_a_miss_and_of_a_hit(client, clock):
    host = client(clock=clock, ttl=600, ttl_jitter=0)
    miss = host.post(asked(BRIEFLY))
    assert told(miss) == {
        "cache-status": "llm-middleware; fwd=miss; stored; detail=none",
        "x-llm-cache": "miss",
        "x-llm-cache-similarity": "0.0000",
    }
    clock.advance(60)
    hit = host.post(asked(SLOWLY))
    assert told(hit) == {
        "cache-status": "llm-middleware; hit; ttl=540; detail=semantic",
        "age": "60",
        "x-llm-cache": "semantic-hit",
        "x-llm-cache-tier": "semantic",
        "x-llm-cache-similarity": "0.9413",
    }
    assert hit.headers["x-llm-cache-key"] == miss.headers["x-llm-cache-key"]
    assert hit.body == miss.body
    far = host.post(asked(reworded("rivers", "slowly")))
    assert told(far) == {
        "cache-status": "llm-middleware; fwd=miss; stored; detail=uncertain",
        "x-llm-cache": "miss",
        "x-llm-cache-similarity": "0.0023",
    }
    assert host.host.calls == 2


def test_c108_an_exact_hit_says_nothing_of_meanings(client):
    host = client(ttl=None)
    host.post(asked(BRIEFLY))
    assert told(host.post(asked(BRIEFLY))) == {
        "cache-status": "llm-middleware; hit",
        "age": "0",
        "x-llm-cache": "hit",
        "x-llm-cache-tier": "memory",
    }


def test_c108_the_reason_of_a_veto_without_the_words(client):
    host = client()
    host.post(asked(f"{BRIEFLY} in 10 lines"))
    assert told(host.post(asked(f"{SLOWLY} in 12 lines"))) == {
        "cache-status": "llm-middleware; fwd=miss; stored; detail=veto-number",
        "x-llm-cache": "miss",
        "x-llm-cache-similarity": "0.9413",
    }


def test_another_spelling(client):
    host = client(ttl=None)
    host.post(asked(BRIEFLY))
    assert told(host.post(asked(f" {BRIEFLY.capitalize()}."))) == {
        "cache-status": "llm-middleware; hit; detail=normalized",
        "age": "0",
        "x-llm-cache": "semantic-hit",
        "x-llm-cache-tier": "semantic",
        "x-llm-cache-similarity": "1.0000",
    }


@pytest.mark.parametrize("profile", ["standard", "litellm"])
@pytest.mark.parametrize("stream", [False, True])
def test_c108_the_header_that_litellms_clients_read(client, profile, stream):
    host = client(profile)
    replies = [host.post(asked(text, stream=stream)) for text in (BRIEFLY, SLOWLY, RIVERS, BRIEFLY)]
    assert [each.cache for each in replies] == ["miss", "semantic-hit", "miss", "hit"]
    for reply in replies:
        ours, theirs = "x-llm-cache-similarity", "x-litellm-semantic-similarity"
        expected = reply.headers.get(ours) if profile == "litellm" else None
        assert reply.headers.get(theirs) == expected
    assert [("x-llm-cache-similarity" in each.headers) for each in replies] == [True, True, True, False]


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False), (True, True)])
def test_forms(client, first, second):
    """A streamed answer for a plain paraphrase, and all other ways."""
    host = client()
    usage = {"stream_options": {"include_usage": True}}
    miss = host.post(asked(BRIEFLY, stream=first, **usage))
    hit = host.post(asked(SLOWLY, stream=second, **usage))
    assert (miss.cache, hit.cache) == ("miss", "semantic-hit")
    assert said(hit) == said(miss) == f"answer 1: {BRIEFLY}"
    if first and second:
        assert hit.body == miss.body
    kind = "text/event-stream" if second else "application/json"
    assert hit.headers["content-type"].startswith(kind)
    assert "fwd=miss" in miss.cache_status


def test_c104_two_authorization_headers(client):
    host = client()
    one, other = {"authorization": "Bearer sk-one"}, {"authorization": "Bearer sk-two"}
    assert host.post(asked(BRIEFLY), headers=one).cache == "miss"
    assert host.post(asked(SLOWLY), headers=other).cache == "miss"
    assert host.post(asked(CALMLY)).cache == "miss"
    again = host.post(asked(CALMLY), headers=one)
    assert (again.cache, said(again)) == ("semantic-hit", f"answer 1: {BRIEFLY}")


def test_callers_share_where_they_are_told_to(client):
    host = client(share="all")
    host.post(asked(BRIEFLY), headers={"authorization": "Bearer sk-one"})
    assert host.post(asked(SLOWLY), headers={"authorization": "Bearer sk-two"}).cache == "semantic-hit"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/v1/responses"])
def test_other_endpoints(front, path):
    calls = []
    kinds = {"/v1/completions": "text", "/v1/messages": "messages", "/v1/responses": "responses"}
    bodies = {
        "/v1/completions": lambda text: {"model": "m", "prompt": text},
        "/v1/messages": lambda text: {
            "model": "m",
            "max_tokens": 9,
            "system": "s",
            "messages": [{"role": "user", "content": text}],
        },
        "/v1/responses": lambda text: {"model": "m", "input": text},
    }
    answers = {
        "/v1/completions": {"choices": [{"index": 0, "text": "yes", "finish_reason": "stop"}]},
        "/v1/messages": {"content": [{"type": "text", "text": "yes"}], "stop_reason": "end_turn"},
        "/v1/responses": {
            "status": "completed",
            "output": [{"type": "message", "content": [{"type": "output_text", "text": "yes"}]}],
        },
    }

    def handler(seen):
        calls.append(seen)
        return {"id": f"{len(calls)}", "model": "m", **answers[path]}

    host = front(handler, cache=semantic(), routes={path: kinds[path], CHAT: "chat"})
    replies = [host.post(bodies[path](text), path) for text in (BRIEFLY, SLOWLY, RIVERS)]
    assert [each.cache for each in replies] == ["miss", "semantic-hit", "miss"]
    assert replies[1].body == replies[0].body
    assert host.post(asked(SLOWLY)).cache == "miss"  # at another endpoint


def test_two_endpoints_of_one_kind_share_nothing(front):
    upstream = Upstream()
    host = front(lambda seen: upstream(seen.json()), cache=semantic(), routes={"/a": "chat", "/b": "chat"})
    assert host.post(asked(BRIEFLY), "/a").cache == "miss"
    assert host.post(asked(SLOWLY), "/b").cache == "miss"
    assert said(host.post(asked(CALMLY), "/a")) == f"answer 1: {BRIEFLY}"


def test_what_says_nothing_of_the_answer_parts_no_questions(client):
    """Controls, and what is only for the caller's own books."""
    host = client()
    host.post(asked(BRIEFLY, cache={"ttl": 60, "tags": ["a"]}, metadata={"trace": "1"}))
    assert host.post(asked(SLOWLY, metadata={"trace": "2"})).cache == "semantic-hit"
    other = host.post(asked(CALMLY, cache={"namespace": "n"}))
    assert (other.cache, other.headers["x-llm-cache-similarity"]) == ("miss", "0.0000")


def test_a_host_that_raises_leaves_nothing(front):
    upstream = Upstream()

    def handler(seen):
        if "briefly" in question_in(seen.json()):
            raise OSError("no model today")
        return upstream(seen.json())

    host = front(handler, cache=semantic())
    with pytest.raises(OSError, match="no model today"):
        host.post(asked(BRIEFLY))
    assert host.post(asked(SLOWLY)).cache == "miss"
    assert said(host.post(asked(BRIEFLY))) == f"answer 1: {SLOWLY}"  # and no call


REASONS = {
    "many-answers": asked(BRIEFLY, n=2),
    "few-words": asked("And then?"),
    "tool-result": talk(("user", "x"), ("assistant", "y"), ("tool", BRIEFLY)),
    "media": asked([{"type": "image_url", "image_url": {"url": "data:image/png;base64,Zm94"}}]),
    "not-user": talk(("user", "x"), ("assistant", BRIEFLY)),
}


@pytest.mark.parametrize(("reason", "body"), REASONS.items(), ids=REASONS)
def test_why_no_meaning_was_looked_for(front, reason, body):
    choices = completion()["choices"] * body.get("n", 1)
    host = front(lambda seen: completion(choices=choices), cache=semantic())
    assert told(host.post(body)) == {
        "cache-status": f"llm-middleware; fwd=miss; stored; detail={reason}",
        "x-llm-cache": "miss",
    }
    assert host.post(body).cache == "hit"


def test_only_if_cached_is_answered_by_a_like_question(client):
    host = client()
    only = {"cache-control": "only-if-cached"}
    assert host.post(asked(BRIEFLY), headers=only).status == 504
    host.post(asked(BRIEFLY))
    assert host.post(asked(SLOWLY), headers=only).cache == "semantic-hit"
    assert host.post(asked(RIVERS), headers=only).status == 504
    assert host.host.calls == 1


def test_controls_in_headers(client):
    host = client()
    host.post(asked(BRIEFLY))
    assert host.post(asked(SLOWLY), headers={"cache-control": "max-age=0"}).cache == "miss"
    assert host.post(asked(CALMLY), headers={"cache-control": "no-store"}).cache == "semantic-hit"
    reply = host.post(asked(CALMLY), headers={"cache-control": "no-cache"})
    assert (reply.cache, reply.cache_status) == ("miss", "llm-middleware; fwd=request; stored")
    assert "x-llm-cache-similarity" not in reply.headers


def test_vary(front):
    """An answer that varies by a header answers those alone who sent the same."""

    def handler(seen):
        return 200, {"content-type": "application/json", "vary": "x-plan"}, answer(seen)

    def answer(seen) -> bytes:

        return json.dumps(
            completion(f"for {seen.headers.get('x-plan')}: {question_in(seen.json())}")
        ).encode()

    host = front(handler, cache=semantic())
    gold, free = {"x-plan": "gold"}, {"x-plan": "free"}
    assert host.post(asked(BRIEFLY), headers=gold).cache == "miss"
    assert host.post(asked(SLOWLY), headers=free).cache == "miss"
    again = host.post(asked(f"{BRIEFLY}."), headers=gold)
    assert (again.cache, said(again)) == ("semantic-hit", f"for gold: {BRIEFLY}")
    assert said(host.post(asked(f"{BRIEFLY}."), headers=free)) == f"for free: {BRIEFLY}."


@pytest.mark.parametrize("answer", [(500, b'{"error": {"message": "no"}}'), (200, b"\x00\x01")])
def test_failures_and_bytes_of_a_host_are_not_compared(front, answer):
    status, content = answer
    cache = semantic()
    host = front(lambda seen: (status, {"content-type": "application/octet-stream"}, content), cache=cache)
    replies = [host.post(asked(text)) for text in (BRIEFLY, SLOWLY, BRIEFLY)]
    assert [(each.status, each.cache, each.body) for each in replies] == [(status, "miss", content)] * 3
    assert cache._flow.semantic.index.index.count() == 0


def test_an_answer_for_bad_times_is_not_one_of_like_meaning_that_is_over(client, clock):
    """stale-if-error: the question's own old answer stands in, after like ones that are fresh."""
    host = client(clock=clock, ttl=10, ttl_jitter=0, stale_if_error=1000)
    host.post(asked(BRIEFLY))
    clock.advance(20)
    assert host.post(asked(SLOWLY)).cache == "miss"
    reply = host.post(asked(BRIEFLY))
    assert (reply.cache, said(reply)) == ("semantic-hit", f"answer 2: {SLOWLY}")


@pytest.mark.parametrize("stream", [False, True])
def test_c107_twenty_at_once(front, stream):
    embed, upstream = Counted(), Upstream()
    handler = (lambda seen: list(upstream(seen.json()))) if stream else (lambda seen: upstream(seen.json()))
    host = front(handler, cache=semantic(embedding_model=embed))
    replies = host.together(*[asked(BRIEFLY, stream=stream)] * 20)
    assert {said(each) for each in replies} == {f"answer 1: {BRIEFLY}"}
    assert embed.calls == [[BRIEFLY]]
    replies = host.together(*[asked(SLOWLY, stream=stream)] * 20)
    assert {each.cache for each in replies} == {"semantic-hit"}
    assert embed.calls == [[BRIEFLY], [SLOWLY]]
    assert upstream.calls == 1


def image(url: str, text: str) -> dict[str, object]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return talk(("user", parts), ("assistant", "seen"), ("user", "tell me what makes gardens work"))


def called(arguments: str) -> dict[str, object]:
    call = {"id": "c", "type": "function", "function": {"name": "pay", "arguments": arguments}}
    return {
        "model": "m",
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "done"},
            {"role": "user", "content": "tell me what makes gardens work"},
        ],
    }


def ruled(rule: str) -> dict[str, object]:
    return talk(("system", rule), ("user", "tell me what makes gardens work"))


@pytest.mark.parametrize(
    ("stored", "other"),
    [
        pytest.param(image("http://x/1.png", "look"), image("http://x/2.png", "look"), id="C100 image"),
        pytest.param(called('{"amount": 10}'), called('{"amount": 99999}'), id="C101 tool arguments"),
        pytest.param(ruled("Answer in French."), ruled("Answer in German."), id="C102 system prompt"),
    ],
)
def test_c100_c101_c102_what_differs_beside_the_question_parts(client, stored, other):
    host = client()
    host.post(stored)
    turned = {**stored, "messages": [*stored["messages"][:-1], {"role": "user", "content": RIVERS}]}
    like = {**stored, "messages": [*stored["messages"][:-1], {"role": "user", "content": BRIEFLY}]}
    assert host.post(like).headers["x-llm-cache"] == "semantic-hit"
    assert host.post(turned).headers["x-llm-cache"] == "miss"
    assert host.post(other).headers["x-llm-cache"] == "miss"


@pytest.mark.parametrize(
    ("stored", "other", "rule"),
    [
        ("what is gardens 2+2 please", "what is gardens 2+3 please", "veto-number"),
        ("is it safe to water gardens", "is it not safe to water gardens", "veto-negation"),
    ],
)
def test_c103_guards(client, stored, other, rule):
    host = client()
    host.post(asked(stored))
    miss = host.post(asked(other))
    assert (miss.headers["x-llm-cache"], miss.headers["cache-status"].rpartition("=")[2]) == ("miss", rule)


def test_c105_an_exact_repeat_embeds_nothing(client):
    embedder = Counted()
    host = client(embedding_model=embedder)
    replies = [host.post(asked(BRIEFLY)) for _ in range(3)]
    assert [reply.headers["x-llm-cache"] for reply in replies] == ["miss", "hit", "hit"]
    assert embedder.calls == [[BRIEFLY]]


@pytest.mark.parametrize("how", ["slow", "down"])
def test_c106_an_embedder_that_is_slow_or_down_costs_no_request(client, how):
    held = Held()

    def down(texts: list[str]) -> list[list[float]]:
        raise OSError("no embedder today")

    host = client(embedding_model=held if how == "slow" else down, embedding_budget=0.05)
    try:
        reply = host.post(asked(BRIEFLY))
    finally:
        held.release()
    detail = "embedding-late" if how == "slow" else "embedding-failed"
    assert (reply.status, reply.headers["x-llm-cache"]) == (200, "miss")
    assert reply.headers["cache-status"].endswith(f"detail={detail}")


def test_c75_what_is_over_is_not_served_to_another_question(client, clock):
    host = client(clock=clock, ttl=60, ttl_jitter=0)
    host.post(asked(BRIEFLY))
    clock.advance(59)
    assert host.post(asked(SLOWLY)).headers["x-llm-cache"] == "semantic-hit"
    clock.advance(2)
    assert host.post(asked(CALMLY)).headers["x-llm-cache"] == "miss"
