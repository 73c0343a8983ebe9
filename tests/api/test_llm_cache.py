"""What the cache in front of the sub-app's model endpoints does and says, on both fronts."""

from __future__ import annotations

import itertools
import re

import pytest

from tests.api import serving
from tests.api.serving import (
    TOOL,
    openai_error,
    refused,
)

served, server, upstream = serving.served, serving.server, serving.upstream
asgi_server, wsgi_server = serving.asgi_server, serving.wsgi_server

# Headers ------------------------------------------------------------------------------------------


def told(answer):
    """What the headers say of the way of an answer."""
    names = ("cache-status", "x-llm-cache", "x-llm-cache-tier", "x-llm-model", "x-llm-deployment")
    names += ("x-llm-attempts", "x-llm-fallback", "cache-control")
    return {name: answer.headers[name] for name in names if name in answer.headers}


ROUTED = {
    "x-llm-model": "m",
    "x-llm-deployment": "m-1",
    "x-llm-attempts": "1",
    "x-llm-fallback": "false",
    "cache-control": "private, no-store",
}


def test_c109_c110_headers_of_a_miss_and_a_hit(served):
    client = served(cache={"type": "local", "ttl": 600, "ttl_jitter": 0})
    miss, hit = client.chat(), client.chat()
    assert told(miss) == {
        "cache-status": "llm-middleware; fwd=miss; stored",
        "x-llm-cache": "miss",
        **ROUTED,
    }
    left = hit.headers["cache-status"].removeprefix("llm-middleware; hit; ttl=")
    assert 600 - serving.PATIENCE_S < int(left) <= 600
    assert told(hit) == {
        "cache-status": f"llm-middleware; hit; ttl={left}",
        "x-llm-cache": "hit",
        "x-llm-cache-tier": "memory",
        "cache-control": "private, no-store",
    }
    assert 0 <= int(hit.headers["age"]) < serving.PATIENCE_S
    assert "age" not in miss.headers
    assert hit.headers["x-llm-cache-key"] == miss.headers["x-llm-cache-key"]
    assert re.fullmatch("[0-9a-f]{64}", hit.headers["x-llm-cache-key"])
    assert hit.content == miss.content


def test_headers_of_a_bypass(served, upstream):
    client = served(cache={"type": "local", "supported_call_types": ["embedding"]})
    for _ in range(2):
        answer = client.chat()
        assert told(answer) == {
            "cache-status": "llm-middleware; fwd=bypass; detail=call-type-off",
            "x-llm-cache": "bypass",
            **ROUTED,
        }
    assert upstream.count == 2


def test_without_a_cache(served, upstream):
    client = served(cache=None)
    for _ in range(2):
        answer = client.chat(cache={"ttl": 5})
        assert told(answer) == {
            "cache-status": "llm-middleware; fwd=bypass; detail=disabled",
            "x-llm-cache": "bypass",
            **ROUTED,
        }
        assert "cache" not in upstream.calls[-1].json
    streams = [client.chat(stream=True).content for _ in range(2)]
    assert streams[0] != streams[1]
    assert upstream.count == 4


def test_the_headers_that_litellms_clients_read(served):
    client = served(server={"header_profile": "litellm"})
    for answer in (client.chat(), client.chat()):
        assert answer.headers["x-litellm-cache-key"] == answer.headers["x-llm-cache-key"]


# Controls -----------------------------------------------------------------------------------------


def states(client, upstream, *requests):
    """``x-llm-cache`` of each, and how many calls they made."""
    before = upstream.count
    answers = [client.chat(**request) for request in requests]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    for call in upstream.calls:
        assert "cache" not in call.json
    return [answer.headers["x-llm-cache"] for answer in answers], upstream.count - before


def test_c35_c36_c39_controls_in_the_body(served, upstream):
    client = served()
    plain = {}

    def said(**controls):
        return {"cache": controls}

    # no-store reads, and does not write.
    assert states(client, upstream, said(**{"no-store": True}), plain, plain) == (["miss", "miss", "hit"], 2)
    # no-cache does not read, and writes.
    fresh = client.chat(cache={"no-cache": True})
    assert fresh.headers["cache-status"] == "llm-middleware; fwd=request; stored"
    assert client.chat().content == fresh.content
    nothing = client.chat(cache={"no-cache": "true", "no-store": 1})
    assert nothing.headers["cache-status"] == "llm-middleware; fwd=bypass; detail=no-store"
    assert states(client, upstream, {"text": "b", **said(ttl=0)}, {"text": "b"}) == (["miss", "miss"], 2)
    assert states(client, upstream, {"text": "c", "cache": None}, {"text": "c"}) == (["miss", "hit"], 1)
    # A namespace of its own.
    assert states(client, upstream, said(namespace="n"), said(namespace="n")) == (["miss", "hit"], 1)


@pytest.mark.parametrize(
    ("controls", "code", "param"),
    [
        ({"ttl": "abc"}, "invalid_cache_control", "cache.ttl"),
        ({"ttl": -1}, "invalid_cache_control", "cache.ttl"),
        ({"no-cache": "perhaps"}, "invalid_cache_control", "cache.no-cache"),
        ({"no_cache": True}, "unknown_cache_control", "cache.no_cache"),
        ({"cache_key": "x"}, "unknown_cache_control", "cache.cache_key"),
        ("yes", "invalid_cache_control", "cache"),
    ],
)
def test_c34_c37_c40_c45_wrong_controls_are_400(served, upstream, controls, code, param):
    client = served()
    assert refused(client.chat(cache=controls)) == (400, code, param)
    assert upstream.count == 0
    assert [client.chat().headers["x-llm-cache"] for _ in range(2)] == ["miss", "hit"]


def test_c49_the_cache_control_header(served, upstream):
    client = served()

    def with_header(value):
        return client.chat(headers={"cache-control": value})

    missing = with_header("only-if-cached")
    assert refused(missing) == (504, "only_if_cached", None)
    assert upstream.count == 0
    assert with_header("no-store").headers["cache-status"] == "llm-middleware; fwd=miss; detail=no-store"
    assert client.chat().headers["x-llm-cache"] == "miss"
    assert with_header("only-if-cached").headers["x-llm-cache"] == "hit"
    assert with_header("no-cache").headers["cache-status"] == "llm-middleware; fwd=request; stored"
    assert with_header("max-age=0").headers["x-llm-cache"] == "miss"
    assert with_header("max-age=60").headers["x-llm-cache"] == "hit"
    assert upstream.count == 4


def test_c46_default_off_is_opted_in(served, upstream):
    client = served(cache={"type": "local", "mode": "default_off"})
    opt_in = {"cache": {"use-cache": True}}
    assert states(client, upstream, {}, {}, opt_in, opt_in, {}) == (
        ["bypass", "bypass", "miss", "hit", "bypass"],
        4,
    )


@pytest.mark.parametrize("stream", [False, True])
def test_c98_c99_what_is_kept_is_configured(served, upstream, stream):
    client = served(cache={"type": "local", "admission": {"tool-calls": False, "sampled": False}})
    called = {"text": "the weather", "tools": [TOOL], "stream": stream}
    assert states(client, upstream, called, called) == (["miss", "miss"], 2)
    assert states(client, upstream, *[{"temperature": 0.7, "stream": stream}] * 2) == (["miss", "miss"], 2)
    assert states(client, upstream, *[{"temperature": 0, "stream": stream}] * 2) == (["miss", "hit"], 1)
    if not stream:
        told = client.chat(**called).headers["cache-status"]
        assert told == "llm-middleware; fwd=miss; detail=tool-calls"


def test_c22_callers_do_not_see_each_others_answers(served, upstream):
    client = served()
    callers = [{"authorization": f"Bearer sk-caller-{number}"} for number in (1, 2, 1)]
    answers = [client.chat(headers=headers) for headers in callers]
    assert [answer.headers["x-llm-cache"] for answer in answers] == ["miss", "miss", "hit"]
    # And the upstream does not see the callers' credentials.
    keys = {call.headers["authorization"] for call in upstream.calls}
    assert keys == {f"Bearer {serving.UPSTREAM_KEY}"}


# Stale answers ------------------------------------------------------------------------------------


def test_a_stale_answer_is_refreshed_behind_the_client(served, upstream):
    client = served(cache={"type": "local", "ttl": 0.2, "ttl_jitter": 0, "stale_while_revalidate": 60})
    first = client.chat()
    answers = []
    serving.until(lambda: answers.append(client.chat()) or answers[-1].headers["x-llm-cache"] == "stale")
    assert answers[-1].content == first.content
    upstream.wait_for(2)
    serving.until(lambda: serving.in_flight(client.core) == 0, "it was refreshed")
    serving.until(lambda: client.chat().content != first.content, "the fresh answer is there")


def test_c71_a_stale_answer_stands_in_for_an_error(served, upstream):
    client = served(cache={"type": "local", "ttl": 0.2, "ttl_jitter": 0, "stale_if_error": 60})
    first = client.chat()
    serving.until(lambda: client.chat(headers={"cache-control": "only-if-cached"}).status_code == 504)
    upstream.fail_next(503)
    stale = client.chat()
    assert (stale.status_code, stale.headers["x-llm-cache"]) == (200, "stale")
    assert stale.content == first.content
    assert stale.headers["cache-status"].endswith("detail=stale-if-error")
    upstream.fail_next(400, body=openai_error("no"))
    assert client.chat().status_code == 400


# Hooks --------------------------------------------------------------------------------------------


def test_c112_hooks_are_told_of_every_end(served, upstream):
    events = []
    client = served(
        models=[
            {**serving.model("m", upstream), "model_info": {"id": "m-1", "input_cost_per_token": 0.5}},
        ],
        options={"hooks": [events.append]},
    )
    client.chat("one two"), client.chat("one two")
    client.chat("three", stream=True, stream_options={"include_usage": True})
    upstream.fail_next(429)
    client.chat("four")
    upstream.cut_stream_after(4)
    client.chat("five", stream=True)
    client.chat("six", model="unknown")
    found = [
        (each.name, each.cache_hit, each.stream, each.model, each.deployment, each.detail) for each in events
    ]
    assert found == [
        ("success", False, False, "m", "m-1", None),
        ("success", True, False, "m", None, None),
        ("success", False, True, "m", "m-1", None),
        ("failure", False, False, "m", "m-1", "rate_limit_exceeded"),
        ("failure", False, True, "m", "m-1", "connection_error"),
        ("failure", False, False, "unknown", None, "model_not_found"),
    ]
    assert events[0].tokens > events[0].output_tokens > 0
    assert events[2].tokens > events[2].output_tokens > 0
    assert events[0].key == events[1].key
    assert events[0].latency > 0
    assert events[1].age is not None


# Many at once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_c54_c57_fifty_at_once_make_one_call(served, upstream, stream):
    client = served()
    upstream.hold()
    answers = client.together(50, lambda: client.chat(stream=stream))
    # A stream's leader reads its own record under WSGI.
    serving.until(lambda: serving.readers(client.core) >= 49, "the others wait for one")
    upstream.release()
    got = answers()
    assert {answer.status_code for answer in got} == {200}
    assert len({answer.content for answer in got}) == 1
    found = sorted(answer.headers["x-llm-cache"] for answer in got)
    assert found == ["collapsed"] * 49 + ["miss"]
    assert {answer.headers["x-llm-deployment"] for answer in got} == {"m-1"}
    assert upstream.count == 1
    assert serving.in_flight(client.core) == 0


def test_different_requests_do_not_wait_for_each_other(served, upstream):
    client = served()
    upstream.hold()
    numbers = itertools.count()
    answers = client.together(20, lambda: client.chat(f"number {next(numbers)}"))
    upstream.wait_for(20)
    assert serving.in_flight(client.core) == 20
    upstream.release()
    assert {answer.headers["x-llm-cache"] for answer in answers()} == {"miss"}
    assert serving.in_flight(client.core) == 0
