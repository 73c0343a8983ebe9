"""What a request says about its caching: the ``cache`` object, ``Cache-Control``, and who wins.

Cases C34-C37, C39-C41, C43-C51 and C53, and of C27, C28 and C50 what `CacheManager.plan` makes of them.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import time

import pytest

from llm_middleware import CacheManager, CacheMissError, ConfigError, InvalidRequestError
from llm_middleware.asgi import LLMCacheMiddleware as ASGIMiddleware
from llm_middleware.caching.controls import Controls, merge, parse_body, parse_header
from tests.support import CHAT, Host, completion

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def with_cache(controls: object, **changes: object) -> dict:
    return {**BODY, "cache": controls, **changes}


class Upstream:
    """Counts the calls it answers; each answer is another one."""

    def __init__(self) -> None:
        self.bodies: list[object] = []

    def __call__(self, body: object) -> dict:
        self.bodies.append(body)
        return completion(f"answer {len(self.bodies)}")


@pytest.fixture
def ask(face):
    """``ask(cache, controls)``: one fetch; what the cache did and which answer it was."""
    upstream = Upstream()

    def fetch(cache: CacheManager, sent: object = None, **options: object) -> tuple[str, str]:
        body = BODY if sent is None else with_cache(sent)
        answer = face.fetch(cache, body, upstream, **options)
        return answer.cache.status, answer.json()["choices"][0]["message"]["content"]

    return fetch


@pytest.fixture
def posting(front):
    """``posting(**settings)``: a client; ``post(controls, header)`` the same as `ask` over HTTP."""

    def make(**settings: object):
        upstream = Upstream()
        client = front(upstream, cache=CacheManager(**settings))

        def post(controls: object = None, header: str | None = None):
            body = BODY if controls is None else with_cache(controls)
            return client.post(body, headers={} if header is None else {"cache-control": header})

        post.upstream = upstream
        return post

    return make


# --- C34, C37, C40, C43, C45: what is wrong, and what it is answered

WRONG = {
    "cache": [
        ([], "cache: expected an object, got []"),
        ("no-cache", 'cache: expected an object, got "no-cache"'),
        (True, "cache: expected an object, got true"),
        (0, "cache: expected an object, got 0"),
    ],
    "cache.ttl": [
        ("abc", 'cache.ttl: expected seconds >= 0, got "abc"'),
        (-1, "cache.ttl: expected seconds >= 0, got -1"),
        ("-1", 'cache.ttl: expected seconds >= 0, got "-1"'),
        (-0.5, "cache.ttl: expected seconds >= 0, got -0.5"),
        (True, "cache.ttl: expected seconds >= 0, got true"),
        ("", 'cache.ttl: expected seconds >= 0, got ""'),
        ("inf", 'cache.ttl: expected seconds >= 0, got "inf"'),
        ("nan", 'cache.ttl: expected seconds >= 0, got "nan"'),
        ("1_0", 'cache.ttl: expected seconds >= 0, got "1_0"'),
        (" 5", 'cache.ttl: expected seconds >= 0, got " 5"'),
        ("\u0665", 'cache.ttl: expected seconds >= 0, got "\u0665"'),
        ("1e999", 'cache.ttl: expected seconds >= 0, got "1e999"'),
        ([5], "cache.ttl: expected seconds >= 0, got [5]"),
        ({"s": 5}, 'cache.ttl: expected seconds >= 0, got {"s": 5}'),
    ],
    "cache.s-maxage": [
        ("soon", 'cache.s-maxage: expected seconds >= 0, got "soon"'),
        (-1, "cache.s-maxage: expected seconds >= 0, got -1"),
    ],
    "cache.s-max-age": [(False, "cache.s-max-age: expected seconds >= 0, got false")],
    "cache.stale-while-revalidate": [(-1, "cache.stale-while-revalidate: expected seconds >= 0, got -1")],
    "cache.stale-if-error": [("x", 'cache.stale-if-error: expected seconds >= 0, got "x"')],
    "cache.no-cache": [
        ("yes", 'cache.no-cache: expected true or false, got "yes"'),
        (2, "cache.no-cache: expected true or false, got 2"),
        (-1, "cache.no-cache: expected true or false, got -1"),
        ("", 'cache.no-cache: expected true or false, got ""'),
        ([], "cache.no-cache: expected true or false, got []"),
    ],
    "cache.no-store": [("no", 'cache.no-store: expected true or false, got "no"')],
    "cache.use-cache": [({}, "cache.use-cache: expected true or false, got {}")],
    "cache.namespace": [
        ("", 'cache.namespace: expected a string of 1 to 256 characters, got ""'),
        (5, "cache.namespace: expected a string of 1 to 256 characters, got 5"),
        (
            "x" * 257,
            f'cache.namespace: expected a string of 1 to 256 characters, got "{"x" * 76}...',
        ),
    ],
    "cache.tags": [
        ("a", 'cache.tags: expected a list of at most 64 strings, got "a"'),
        ({"a": 1}, 'cache.tags: expected a list of at most 64 strings, got {"a": 1}'),
    ],
    "cache.tags[1]": [(["a", 1], "cache.tags[1]: expected a string of 1 to 256 characters, got 1")],
}
WRONG_CASES = [
    pytest.param(field, value, message, id=message[:60])
    for field, cases in WRONG.items()
    for value, message in cases
]
UNKNOWN = {
    "no_cache": 'cache.no_cache: unknown cache control; did you mean "no-cache"?',
    "No-Cache": 'cache.No-Cache: unknown cache control; did you mean "no-cache"?',
    "smaxage": 'cache.smaxage: unknown cache control; did you mean "s-maxage"?',
    "tll": 'cache.tll: unknown cache control; did you mean "ttl"?',
    "cache_key": (
        "cache.cache_key: unknown cache control; known: ttl, s-maxage, s-max-age, no-cache, no-store, "
        "namespace, use-cache, tags, stale-while-revalidate, stale-if-error"
    ),
    "": (
        "cache.: unknown cache control; known: ttl, s-maxage, s-max-age, no-cache, no-store, "
        "namespace, use-cache, tags, stale-while-revalidate, stale-if-error"
    ),
}


def controls_for(field: str, value: object) -> object:
    return value if field == "cache" else {field[6:].partition("[")[0]: value}


@pytest.mark.parametrize(("field", "value", "message"), WRONG_CASES)
def test_c34_c40_wrong_controls_are_a_400(posting, field, value, message):
    post = posting()
    reply = post(controls_for(field, value))
    assert reply.status == 400
    error = {
        "message": message,
        "type": "invalid_request_error",
        "param": field,
        "code": "invalid_cache_control",
    }
    assert reply.json() == {"error": error}
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["content-length"] == str(len(reply.body))
    assert reply.cache_status == "llm-middleware; fwd=bypass; detail=invalid_cache_control"
    assert post.upstream.bodies == []


@pytest.mark.parametrize("name", UNKNOWN)
def test_c45_unknown_controls_are_a_400(posting, name):
    post = posting()
    reply = post({name: 1})
    assert reply.status == 400
    error = {
        "message": UNKNOWN[name],
        "type": "invalid_request_error",
        "param": f"cache.{name}",
        "code": "unknown_cache_control",
    }
    assert reply.json() == {"error": error}
    assert post.upstream.bodies == []


@pytest.mark.parametrize(("field", "value", "message"), WRONG_CASES)
def test_c34_wrong_controls_raise_in_a_handler(face, field, value, message):
    upstream = Upstream()
    with pytest.raises(InvalidRequestError) as caught:
        face.fetch(CacheManager(), with_cache(controls_for(field, value)), upstream)
    assert (caught.value.message, caught.value.param, caught.value.status) == (message, field, 400)
    assert upstream.bodies == []


def test_c34_bad_requests_do_not_harm_later_ones(posting):
    post = posting()
    assert [post({"ttl": "abc"}).status for _ in range(300)] == [400] * 300
    assert [post().cache, post().cache] == ["miss", "hit"]


def test_wrong_controls_of_a_get_and_a_set_raise_too(face):
    for method in (face.get, lambda *args: face.set(*args, completion())):
        with pytest.raises(InvalidRequestError, match=r"cache\.ttl: expected seconds >= 0"):
            method(CacheManager(), with_cache({"ttl": -1}))


def test_wrong_controls_given_by_the_host_raise(face):
    with pytest.raises(InvalidRequestError, match=r"ttl: expected seconds >= 0, got -1"):
        face.fetch(CacheManager(), BODY, Upstream(), controls={"ttl": -1})


def test_a_long_unknown_control_is_not_told_in_full(posting):
    reply = posting()({"x" * 100_000: 1})
    assert reply.status == 400
    assert len(reply.body) < 2_000


def deeply_nested(depth: int) -> list[bytes]:
    nested = b"[" * depth + b"]" * depth
    return [b'{"model":"m","cache":%b}' % nested, b'{"model":"m","cache":{"ttl":%b}}' % nested]


def test_a_deeply_nested_control_is_a_400_or_no_json():
    """However close to the interpreter's own limit: no error but the one for wrong controls."""
    cache, raised = CacheManager(), set()
    for depth in (*range(900, 1010), 200_000):  # around Python's limit, and far over any release's
        for body in deeply_nested(depth):
            try:
                raised.add(cache.plan("chat", body).bypass)
            except Exception as exc:
                raised.add(type(exc))
    assert raised == {InvalidRequestError, "unparsable-body"}


def test_a_number_too_long_to_show_is_a_400(face):
    with pytest.raises(InvalidRequestError, match=r"cache\.ttl: expected seconds >= 0"):
        face.fetch(CacheManager(), with_cache({"ttl": 10**5000}), Upstream())


# --- C35-C37, C39, C44, C46, C47: what each control does


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "True", "TRUE", "1"])
def test_c35_c37_no_cache_calls_and_stores(ask, value):
    cache = CacheManager()
    assert ask(cache) == ("miss", "answer 1")
    assert ask(cache, {"no-cache": value}) == ("miss", "answer 2")
    assert ask(cache) == ("hit", "answer 2")


@pytest.mark.parametrize("value", [True, 1, "true", "1"])
def test_c36_no_store_reads_and_does_not_store(ask, value):
    cache = CacheManager()
    assert ask(cache, {"no-store": value}) == ("miss", "answer 1")
    assert ask(cache) == ("miss", "answer 2")
    assert ask(cache, {"no-store": value}) == ("hit", "answer 2")


@pytest.mark.parametrize("value", [False, 0, "false", "FALSE", "0", None])
@pytest.mark.parametrize("name", ["no-cache", "no-store"])
def test_c37_false_is_false(ask, name, value):
    cache = CacheManager()
    assert ask(cache, {name: value}) == ("miss", "answer 1")
    assert ask(cache, {name: value}) == ("hit", "answer 1")


def test_no_cache_and_no_store_leave_the_cache_alone(ask):
    cache = CacheManager()
    assert ask(cache) == ("miss", "answer 1")
    assert ask(cache, {"no-cache": True, "no-store": True}) == ("bypass", "answer 2")
    assert ask(cache) == ("hit", "answer 1")


@pytest.mark.parametrize("value", [0, 0.0, "0", "0.0", "-0"])
def test_c39_a_ttl_of_0_stores_nothing(ask, value):
    cache = CacheManager()
    assert ask(cache, {"ttl": value}) == ("miss", "answer 1")
    assert cache.stats()["entries"] == 0
    assert ask(cache) == ("miss", "answer 2")
    assert ask(cache, {"ttl": value}) == ("hit", "answer 2")


@pytest.mark.parametrize("name", ["s-maxage", "s-max-age"])
@pytest.mark.parametrize("value", [0, "0", 0.0])
def test_c41_an_s_maxage_of_0_accepts_nothing(ask, name, value):
    cache = CacheManager()
    assert ask(cache) == ("miss", "answer 1")
    assert ask(cache, {name: value}) == ("miss", "answer 2")
    assert ask(cache) == ("hit", "answer 2")


@pytest.mark.parametrize("kind", ["embedding", "text", "responses", "json"])
def test_c41_an_s_maxage_of_0_in_every_kind(kind):
    plan = CacheManager().plan(kind, {"input": "x", "cache": {"s-maxage": 0}})
    assert (plan.lookup, plan.store) == (False, True)


def test_c43_an_s_maxage_in_text_is_its_number(clock, ask):
    cache = CacheManager(clock=clock)
    ask(cache)
    clock.advance(6)
    assert ask(cache, {"s-maxage": "6"}) == ("hit", "answer 1")
    assert ask(cache, {"s-maxage": "5"}) == ("miss", "answer 2")


def test_c44_null_is_absent(ask, posting):
    cache = CacheManager()
    assert ask(cache) == ("miss", "answer 1")
    assert ask(cache, {}) == ("hit", "answer 1")
    post = posting()
    assert post().cache == "miss"
    assert post.upstream.bodies[0].body == json.dumps(BODY).encode()
    client_null = {**BODY, "cache": None}
    assert CacheManager().plan("chat", client_null).key == CacheManager().plan("chat", BODY).key
    assert CacheManager().plan("chat", client_null).bypass is None


def test_c44_null_is_absent_over_http(front):
    client = front(Upstream(), cache=CacheManager())
    assert client.post(BODY).cache == "miss"
    assert client.post({**BODY, "cache": None}).cache == "hit"


def test_a_null_control_is_absent(ask):
    cache = CacheManager()
    nothing = {"ttl": None, "no-cache": None, "namespace": None, "tags": None, "s-maxage": None}
    assert ask(cache) == ("miss", "answer 1")
    assert ask(cache, nothing) == ("hit", "answer 1")


def test_namespaces_are_kept_apart(ask):
    cache = CacheManager()
    assert ask(cache) == ("miss", "answer 1")
    assert ask(cache, {"namespace": "a"}) == ("miss", "answer 2")
    assert ask(cache, {"namespace": "b"}) == ("miss", "answer 3")
    assert ask(cache, {"namespace": "a"}) == ("hit", "answer 2")
    assert ask(cache) == ("hit", "answer 1")


def test_tags_do_not_change_the_key(ask):
    cache = CacheManager()
    assert ask(cache, {"tags": ["a", "b"]}) == ("miss", "answer 1")
    assert ask(cache, {"tags": []}) == ("hit", "answer 1")


@pytest.mark.parametrize("value", [True, 1, "true"])
def test_c46_use_cache_opts_in(ask, value):
    cache = CacheManager(mode="default_off")
    assert ask(cache) == ("bypass", "answer 1")
    assert ask(cache) == ("bypass", "answer 2")
    assert ask(cache, {"use-cache": value}) == ("miss", "answer 3")
    assert ask(cache, {"use-cache": value}) == ("hit", "answer 3")
    assert ask(cache, {"use-cache": False}) == ("bypass", "answer 4")


def test_c46_use_cache_changes_nothing_where_the_cache_is_on(ask):
    cache = CacheManager()
    assert ask(cache, {"use-cache": False}) == ("miss", "answer 1")
    assert ask(cache, {"use-cache": True}) == ("hit", "answer 1")


@pytest.mark.parametrize("value", ["vector", [0.5]])
def test_c47_use_cache_for_embeddings(front, value):
    answer = {"object": "list", "data": [{"index": 0, "embedding": value}]}
    client = front(lambda seen: answer, cache=CacheManager(mode="default_off"))
    body = {"model": "e", "input": "text"}
    told = [client.post(body, "/v1/embeddings").cache for _ in range(2)]
    told += [client.post({**body, "cache": {"use-cache": True}}, "/v1/embeddings").cache for _ in range(2)]
    assert told == ["bypass", "bypass", "miss", "hit"]


def test_c48_caching_off_for_one_call(ask):
    cache = CacheManager()
    assert ask(cache, caching=False) == ("bypass", "answer 1")
    assert ask(cache) == ("miss", "answer 2")
    assert ask(cache, caching=False) == ("bypass", "answer 3")
    assert ask(cache) == ("hit", "answer 2")


@pytest.mark.parametrize("names", [["acompletion"], ["completion"], ["chat"], ["chat", "atext_completion"]])
def test_c51_call_types_by_litellms_names(front, names):
    cache = CacheManager(supported_call_types=names)
    chat = front(lambda seen: completion(), cache=cache)
    embed = front(lambda seen: {"data": [{"index": 0, "embedding": [1]}]}, cache=cache)
    assert [chat.post(BODY).cache for _ in range(2)] == ["miss", "hit"]
    replies = [embed.post({"model": "e", "input": "x"}, "/v1/embeddings") for _ in range(2)]
    assert [reply.cache_status for reply in replies] == [
        "llm-middleware; fwd=bypass; detail=call-type-off"
    ] * 2
    assert embed.host.calls == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("completion", "chat"),
        ("acompletion", "chat"),
        ("text_completion", "text"),
        ("atext_completion", "text"),
        ("embedding", "embedding"),
        ("aembedding", "embedding"),
        ("transcription", "transcription"),
        ("atranscription", "transcription"),
        ("responses", "responses"),
        ("aresponses", "responses"),
        ("anthropic_messages", "messages"),
        ("json", "json"),
    ],
)
def test_c51_every_call_type(face, name, kind):
    kinds = ("chat", "text", "embedding", "transcription", "responses", "messages", "json")
    cache = CacheManager(supported_call_types=[name])
    on = [k for k in kinds if cache.plan(k, {"input": "x"}).bypass is None]
    assert on == [kind]
    assert face.fetch(cache, {"input": "x"}, lambda body: {}, kind=name).cache.status == "miss"


def test_c51_an_unknown_call_type_names_the_nearest(face):
    with pytest.raises(
        ConfigError,
        match=r"supported_call_types: unknown call type 'acompletions'; did you mean 'acompletion'\?",
    ):
        CacheManager(supported_call_types=["acompletions"])
    with pytest.raises(ConfigError, match=r"kind: unknown call type 'chats'; did you mean 'chat'\?"):
        face.fetch(CacheManager(), BODY, Upstream(), kind="chats")


def test_c51_no_call_types_is_no_caching(ask):
    cache = CacheManager(supported_call_types=[])
    assert [ask(cache)[0], ask(cache)[0]] == ["bypass", "bypass"]


def test_c53_a_conversation_of_five_messages(front):
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    body = {
        "model": "m",
        "messages": [{"role": role, "content": f"turn {at}"} for at, role in enumerate(roles)],
    }
    client = front(lambda seen: completion(), cache=CacheManager())
    assert [client.post(body).cache for _ in range(2)] == ["miss", "hit"]
    changed = {**body, "messages": [{**body["messages"][0], "content": "other"}, *body["messages"][1:]]}
    assert client.post(changed).cache == "miss"


# --- C49: Cache-Control


def test_c49_no_cache(posting):
    post = posting()
    assert post().cache == "miss"
    reply = post(header="no-cache")
    assert (reply.cache, reply.cache_status) == ("miss", "llm-middleware; fwd=request; stored")
    reply = post()
    assert (reply.cache, reply.json()["choices"][0]["message"]["content"]) == ("hit", "answer 2")


def test_c49_no_store(posting):
    post = posting()
    assert post(header="no-store").cache_status == "llm-middleware; fwd=miss; detail=no-store"
    assert post().cache == "miss"
    assert post(header="no-store").cache == "hit"


def test_c49_no_cache_and_no_store(posting):
    post = posting()
    assert post(header="no-cache, no-store").cache_status == "llm-middleware; fwd=bypass; detail=no-store"


def test_c49_max_age(posting, clock):
    post = posting(clock=clock)
    post()
    clock.advance(6)
    assert post(header="max-age=6").cache == "hit"
    assert post(header="max-age=5").cache == "miss"
    assert post(header="max-age=0").cache_status == "llm-middleware; fwd=request; stored"


def test_c49_min_fresh(posting, clock):
    post = posting(clock=clock, ttl=100, ttl_jitter=0)
    post()
    clock.advance(60)
    assert post(header="min-fresh=40").cache == "hit"
    reply = post(header="min-fresh=41")
    assert (reply.cache, reply.cache_status) == ("miss", "llm-middleware; fwd=miss; stored")
    assert post(header="min-fresh=41").cache == "hit"


def test_c49_max_stale(posting, clock):
    post = posting(clock=clock, ttl=100, ttl_jitter=0, stale_if_error=1000)
    post()
    clock.advance(110)
    reply = post(header="max-stale=10")
    assert (reply.cache, reply.cache_status) == ("stale", "llm-middleware; hit; ttl=-10; detail=max-stale")
    assert post(header="max-stale").cache == "stale"
    assert post(header='max-stale=""').cache == "stale"
    assert post(header="max-stale=9").cache == "miss"
    assert post(header="max-stale=9").cache == "hit"


def test_c49_max_stale_and_max_age(posting, clock):
    """The age asked for holds for a stale answer too."""
    post = posting(clock=clock, ttl=100, ttl_jitter=0, stale_if_error=1000)
    post()
    clock.advance(110)
    assert post(header="max-stale=60, max-age=110").cache == "stale"
    assert post(header="max-stale=60, max-age=109").cache == "miss"


def test_c49_only_if_cached(posting):
    post = posting()
    reply = post(header="only-if-cached")
    assert reply.status == 504
    error = {
        "message": "only-if-cached: no stored answer fits this request",
        "type": "server_error",
        "param": None,
        "code": "only_if_cached",
    }
    assert reply.json() == {"error": error}
    assert post.upstream.bodies == []
    assert post().cache == "miss"
    assert post(header="only-if-cached").cache == "hit"
    assert post(header="only-if-cached, no-cache").status == 504
    assert post(header="only-if-cached, max-age=0").status == 504
    assert len(post.upstream.bodies) == 1


@pytest.mark.parametrize(
    ("settings", "header"),
    [
        ({"mode": "default_off"}, "only-if-cached"),
        ({"enabled": False}, "only-if-cached"),
        ({"supported_call_types": ["embedding"]}, "only-if-cached"),
        ({}, "only-if-cached, no-cache, no-store"),
    ],
)
def test_c49_only_if_cached_never_calls_where_the_cache_is_off(posting, settings, header):
    """Who asks for a stored answer or none does not want to pay for a call."""
    post = posting(**settings)
    assert post(header=header).status == 504
    assert post.upstream.bodies == []


def test_only_if_cached_is_an_error_of_the_library(face):
    cache = CacheManager()
    plan = cache.plan("chat", BODY, cache_control="only-if-cached")
    assert plan.controls.only_if_cached is True
    assert (CacheMissError.status, CacheMissError.code) == (504, "only_if_cached")


HEADERS = {
    "": {},
    "no-cache": {"no_cache": True},
    "No-Cache": {"no_cache": True},
    "no-cache=x": {"no_cache": True},
    'no-cache="authorization, cookie"': {"no_cache": True},
    "no-cache,no-store": {"no_cache": True, "no_store": True},
    "  no-cache  ,\tno-store ": {"no_cache": True, "no_store": True},
    ",, ,no-cache,,": {"no_cache": True},
    "max-age=5": {"max_age": 5.0},
    "MAX-AGE=5": {"max_age": 5.0},
    'max-age="5"': {"max_age": 5.0},
    "max-age = 5": {"max_age": 5.0},
    "max-age=5, max-age=7": {"max_age": 7.0},
    "max-age=0005": {"max_age": 5.0},
    "min-fresh=3": {"min_fresh": 3.0},
    "max-stale": {"max_stale": math.inf},
    "max-stale=": {"max_stale": math.inf},
    "max-stale=8": {"max_stale": 8.0},
    "only-if-cached": {"only_if_cached": True},
    "stale-if-error=60": {"stale_if_error": 60.0},
    "no-transform": {},
    "private, community=UCI, max-age=5": {"max_age": 5.0},
    'community="a, no-store", no-cache': {"no_cache": True},
    'community="a\\", no-store", no-cache': {"no_cache": True},
    "s-maxage=5": {},
    "must-revalidate, public, immutable=1": {},
}


@pytest.mark.parametrize("header", HEADERS)
def test_c49_directives(header):
    assert parse_header(header) == HEADERS[header]


@pytest.mark.parametrize(
    "header", ['"x", no-store', "=5, no-store", "a b, no-store", "max-age=5 x, no-store", "@=;, no-store"]
)
def test_c49_junk_does_not_hide_a_directive(header):
    assert parse_header(header)["no_store"] is True


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("max-age=abc", 'Cache-Control: max-age: expected seconds >= 0, got "abc"'),
        ("max-age=-1", 'Cache-Control: max-age: expected seconds >= 0, got "-1"'),
        ("max-age=", 'Cache-Control: max-age: expected seconds >= 0, got ""'),
        ("min-fresh=1.2.3", 'Cache-Control: min-fresh: expected seconds >= 0, got "1.2.3"'),
        ("max-stale=x", 'Cache-Control: max-stale: expected seconds >= 0, got "x"'),
        ("stale-if-error=é", 'Cache-Control: stale-if-error: expected seconds >= 0, got "é"'),
    ],
)
def test_c49_a_number_that_is_none_is_a_400(posting, header, message):
    reply = posting()(header=header)
    assert reply.status == 400
    param = message.partition(": expected")[0]
    error = {
        "message": message,
        "type": "invalid_request_error",
        "param": param,
        "code": "invalid_cache_control",
    }
    assert reply.json() == {"error": error}


def test_a_header_is_read_in_time_that_grows_with_its_length():
    """Servers let headers of 64 kB through; half a second of CPU is a thousand times what it takes."""

    def seconds(size: int) -> float:
        began = time.process_time()
        parse_header("a" + " " * size + '"')
        return time.process_time() - began

    seconds(1000)
    assert seconds(32_000) < 0.5


def test_headers_in_several_lines_are_one():
    """ASGI servers hand them over one by one; RFC 9110, section 5.3, joins them with commas."""
    raw = json.dumps(BODY).encode()
    app = ASGIMiddleware(Host(lambda seen: completion()).asgi, cache=CacheManager())
    sent: list[dict] = []

    async def run() -> None:
        messages = [{"type": "http.request", "body": raw, "more_body": False}]

        async def receive() -> dict:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop()

        async def send(message: dict) -> None:
            sent.append(message)

        headers = [(b"cache-control", b"no-store"), (b"cache-control", b"max-age=5")]
        headers.append((b"content-length", b"%d" % len(raw)))
        await app({"type": "http", "method": "POST", "path": CHAT, "headers": headers}, receive, send)

    asyncio.run(run())
    told = dict(sent[0]["headers"])[b"cache-status"]
    assert told == b"llm-middleware; fwd=miss; detail=no-store"


# --- C27, C28, C50: precedence


def planned(enforced: object = None, body: object = None, header: str = "", **settings: object) -> Controls:
    """The controls that hold, given what each of the four sources says."""
    sent = BODY if body is None else with_cache(body)
    given = None if enforced is None else parse_body(enforced)
    return CacheManager(**settings).plan("chat", sent, cache_control=header, enforced=given).controls


def test_c50_the_first_source_that_says_something_wins():
    manager = {"stale_if_error": 4}
    header, body, enforced = "stale-if-error=3", {"stale-if-error": 2}, {"stale-if-error": 1}
    assert planned(enforced, body, header, **manager).stale_if_error == 1
    assert planned(None, body, header, **manager).stale_if_error == 2
    assert planned(None, None, header, **manager).stale_if_error == 3
    assert planned(**manager).stale_if_error == 4
    assert planned().stale_if_error == 0


def test_c50_field_by_field():
    controls = planned({"ttl": 1}, {"ttl": 2, "no-store": True}, "no-cache, max-age=9", stale_if_error=7)
    assert controls == Controls(ttl=1.0, no_store=True, no_cache=True, max_age=9.0, stale_if_error=7.0)


def test_c50_the_body_undoes_the_header(ask, posting):
    assert planned(None, {"no-cache": False}, "no-cache").no_cache is False
    assert planned(None, {"s-maxage": 9}, "max-age=0").max_age == 9
    post = posting()
    post()
    assert post({"no-cache": False}, "no-cache").cache == "hit"
    assert (
        post({"no-store": False}, "no-cache, no-store").cache_status == "llm-middleware; fwd=request; stored"
    )


def test_c27_the_keys_word_cannot_be_undone():
    assert planned({"no-cache": True}, {"no-cache": False}).no_cache is True
    assert planned({"no-cache": False}, {"no-cache": True}, "no-cache").no_cache is False
    assert planned({"s-maxage": 0}, {"s-maxage": 100}, "max-age=50").max_age == 0
    plan = CacheManager().plan("chat", with_cache({"no-store": False}), enforced={"no_store": True})
    assert plan.store is False


def test_c28_the_keys_namespace_and_use_cache():
    cache = CacheManager(mode="default_off")
    assert cache.plan("chat", BODY).bypass == "default-off"
    assert cache.plan("chat", BODY, enforced=parse_body({"use-cache": True})).bypass is None
    assert cache.plan(
        "chat", with_cache({"use-cache": True}), enforced=parse_body({"use-cache": False})
    ).bypass == ("default-off")
    cache = CacheManager()
    theirs = cache.plan("chat", BODY, enforced=parse_body({"namespace": "team"}))
    assert (
        theirs.key
        == cache.plan("chat", with_cache({"namespace": "mine"}), enforced={"namespace": "team"}).key
    )
    assert (
        theirs.key
        == cache.plan("chat", with_cache({"namespace": "team"})).key
        != cache.plan("chat", BODY).key
    )


def test_c50_controls_given_by_the_host_win_over_the_body(ask):
    cache = CacheManager()
    assert ask(cache) == ("miss", "answer 1")
    assert ask(cache, {"no-cache": True}, controls={"no-cache": False}) == ("hit", "answer 1")
    assert ask(cache, {"no-cache": False}, controls={"no-cache": True}) == ("miss", "answer 2")


def test_merging_nothing_is_the_defaults():
    assert merge() == merge({}, {}) == Controls()


def test_c50_a_managers_ttl_gives_way(clock, ask):
    cache = CacheManager(ttl=10, ttl_jitter=0, clock=clock)
    ask(cache, {"ttl": 100})
    clock.advance(99)
    assert ask(cache) == ("hit", "answer 1")
    clock.advance(1)
    assert ask(cache) == ("miss", "answer 2")


# --- what the handler gets


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (b'{"model":"m","cache":{"ttl":5}}', b'{"model":"m"}'),
        (b'{"cache":{"ttl":5},"model":"m"}', b'{"model":"m"}'),
        (b'{ "a" : 1.50 , "cache" : {"ttl":5} , "z":"\\u00e9" }', b'{ "a" : 1.50 , "z":"\\u00e9" }'),
        (b'{"cache":null,"model":"m"}', b'{"model":"m"}'),
        (b'{"cache":{}}', b"{}"),
        (b'{"model":"m" , "messages":[{"cache":1}]}\n', b'{"model":"m" , "messages":[{"cache":1}]}\n'),
        (b'{"model":"m","c\\u0061che":{}}', b'{"model":"m"}'),
        ('{"model":"é","cache":{}}'.encode("utf-16-le"), '{"model":"é"}'.encode("utf-16-le")),
    ],
)
def test_the_handler_gets_the_body_without_cache_and_else_byte_for_byte(front, sent, got):
    client = front(lambda seen: completion(), cache=CacheManager())
    assert client.post(sent).status == 200
    (seen,) = client.host.seen
    assert seen.body == got
    assert seen.headers["content-length"] == str(len(got))


@pytest.mark.parametrize(
    "settings", [{"mode": "default_off"}, {"enabled": False}, {"supported_call_types": []}]
)
def test_cache_is_taken_out_for_the_handler_even_where_nothing_is_cached(front, settings):
    """The host's handler, or the provider behind it, need not know the field."""
    client = front(lambda seen: completion(), cache=CacheManager(**settings))
    assert client.post(with_cache({"ttl": 5})).cache == "bypass"
    assert client.host.seen[0].json() == BODY


def test_a_compressed_body_stays_compressed(front):
    client = front(lambda seen: completion(), cache=CacheManager())
    raw = gzip.compress(json.dumps(with_cache({"ttl": 5})).encode())
    assert client.post(raw, headers={"content-encoding": "gzip"}).cache == "miss"
    (seen,) = client.host.seen
    assert json.loads(gzip.decompress(seen.body)) == BODY
    assert seen.headers["content-encoding"] == "gzip"
    assert seen.headers["content-length"] == str(len(seen.body))


def test_the_call_gets_the_body_without_cache(face):
    upstream = Upstream()
    mapping = with_cache({"ttl": 5})
    face.fetch(CacheManager(), mapping, upstream)
    face.fetch(CacheManager(), json.dumps(mapping).encode(), upstream)
    assert upstream.bodies == [BODY, json.dumps(BODY).encode()]
    assert mapping["cache"] == {"ttl": 5}


def test_a_path_that_is_not_cached_keeps_its_body(front):
    client = front(lambda seen: completion(), cache=CacheManager())
    raw = json.dumps(with_cache({"ttl": "abc"})).encode()
    assert client.post(raw, "/v1/elsewhere").status == 200
    assert client.host.seen[0].body == raw
    assert client.post(raw, CHAT, method="PUT").status == 200
