"""Who may be given whose answer. Cases C22-C25, C29, and the ``identify`` and ``share`` options."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from llm_middleware import CacheManager
from llm_middleware.asgi import LLMCacheMiddleware as ASGIMiddleware
from tests.support import CHAT, AsgiFront, Host, WsgiFront, completion

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


class Answers:
    """Each call gets another answer."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _: object) -> dict:
        self.calls += 1
        return completion(f"answer {self.calls}")


def asking(front, **options: object):
    """``ask(**headers)``: (what the cache did, the answer's text), and the client it goes through."""
    options.setdefault("cache", CacheManager())
    client = front(Answers(), **options)

    def ask(body: object = BODY, **headers: str) -> tuple[str, str]:
        reply = client.post(body, headers={name.replace("_", "-"): value for name, value in headers.items()})
        return reply.cache, reply.json()["choices"][0]["message"]["content"]

    ask.client = client
    return ask


CREDENTIALS = {
    "a bearer token": ({"authorization": "Bearer a"}, {"authorization": "Bearer b"}),
    "another scheme": ({"authorization": "Bearer a"}, {"authorization": "Basic a"}),
    "letter case": ({"authorization": "Bearer a"}, {"authorization": "Bearer A"}),
    "a key of Anthropic's": ({"x_api_key": "a"}, {"x_api_key": "b"}),
    "a key of Azure's": ({"api_key": "a"}, {"api_key": "b"}),
    "a key of Google's": ({"x_goog_api_key": "a"}, {"x_goog_api_key": "b"}),
    "a session": ({"cookie": "session=a"}, {"cookie": "session=b"}),
    "an empty one": ({"authorization": "Bearer a"}, {"authorization": ""}),
    "no one": ({"authorization": "Bearer a"}, {}),
    "the same value elsewhere": ({"authorization": "a"}, {"x_api_key": "a"}),
    "a second credential": ({"authorization": "a"}, {"authorization": "a", "cookie": "session=b"}),
    "values that run together": (
        {"authorization": "a", "cookie": "bc"},
        {"authorization": "ab", "cookie": "c"},
    ),
    "latin-1": ({"authorization": "Bearer \xe9"}, {"authorization": "Bearer \xe8"}),
}


@pytest.mark.parametrize("callers", CREDENTIALS.values(), ids=CREDENTIALS)
def test_c22_two_callers_share_nothing(front, callers):
    ask = asking(front)
    one, other = callers
    assert [ask(**one), ask(**other)] == [("miss", "answer 1"), ("miss", "answer 2")]
    assert [ask(**one), ask(**other)] == [("hit", "answer 1"), ("hit", "answer 2")]


def test_c22_callers_without_credentials_share(front):
    ask = asking(front)
    assert [ask(), ask(user_agent="other")] == [("miss", "answer 1"), ("hit", "answer 1")]


def test_c22_the_key_told_does_not_tell_of_the_caller_or_the_prompt(front):
    """Two callers' keys for one prompt have nothing in common, nor with a bare hash of it."""
    ask = asking(front)
    keys = {
        ask.client.post(BODY, headers=headers).headers["x-llm-cache-key"]
        for headers in ({}, {"authorization": "a"}, {"authorization": "b"})
    }
    assert len(keys) == 3
    assert CacheManager().plan("chat", BODY).digest not in keys


def test_c22_every_cookie_header_counts():
    """HTTP/2 clients split cookies, and ASGI servers hand the headers over one by one."""
    host = Host(Answers())
    app = ASGIMiddleware(host.asgi, cache=CacheManager())
    raw = json.dumps(BODY).encode()

    def ask(*cookies: bytes) -> str:
        sent: list[dict] = []

        async def run() -> None:
            messages = [{"type": "http.request", "body": raw, "more_body": False}]

            async def receive() -> dict:
                if not messages:
                    await asyncio.Event().wait()
                return messages.pop()

            async def send(message: dict) -> None:
                sent.append(message)

            headers = [(b"content-length", b"%d" % len(raw)), *((b"cookie", cookie) for cookie in cookies)]
            await app({"type": "http", "method": "POST", "path": CHAT, "headers": headers}, receive, send)

        asyncio.run(run())
        return dict(sent[0]["headers"])[b"x-llm-cache"].decode()

    assert ask(b"theme=dark", b"session=a") == "miss"
    assert ask(b"theme=dark", b"session=b") == "miss"
    assert ask(b"theme=dark") == "miss"
    assert ask(b"theme=dark", b"session=a") == "hit"
    assert ask(b"theme=dark", b"session=b") == "hit"


def test_c22_fetch_keeps_scopes_apart(face):
    cache, answers = CacheManager(), Answers()

    def ask(**options: object) -> tuple[str, str]:
        answer = face.fetch(cache, BODY, answers, **options)
        return answer.cache.status, answer.json()["choices"][0]["message"]["content"]

    scopes = [{}, {"scope": "a"}, {"scope": "b"}, {"scope": "A"}]
    assert [ask(**scope) for scope in scopes] == [("miss", f"answer {n}") for n in (1, 2, 3, 4)]
    assert [ask(**scope) for scope in scopes] == [("hit", f"answer {n}") for n in (1, 2, 3, 4)]
    assert face.get(cache, BODY, scope="c") is None
    assert face.get(cache, BODY, scope="b").json() == completion("answer 3")
    face.set(cache, BODY, completion("set"), scope="c")
    assert [ask(scope="c"), ask(scope="a")] == [("hit", "set"), ("hit", "answer 2")]


@pytest.mark.parametrize("credentials", CREDENTIALS.values(), ids=CREDENTIALS)
def test_c23_a_shared_scope_is_shared(front, credentials):
    ask = asking(front, cache=CacheManager(share="all"))
    one, other = credentials
    assert [ask(**one), ask(**other)] == [("miss", "answer 1"), ("hit", "answer 1")]


def test_c23_a_shared_scope_is_that_of_fetch(front, face):
    """What the app itself fetched serves its clients, where answers are everybody's."""
    cache = CacheManager(share="all")
    face.fetch(cache, BODY, lambda body: completion("fetched"))
    assert asking(front, cache=cache)(authorization="a") == ("hit", "fetched")


def test_c23_sharing_ignores_identify(front):
    ask = asking(front, cache=CacheManager(share="all"), identify=lambda request: 1 / 0)
    assert [ask(authorization="a"), ask(authorization="b")] == [("miss", "answer 1"), ("hit", "answer 1")]


def test_c23_sharing_can_be_turned_on_and_off(front):
    cache = CacheManager()
    ask = asking(front, cache=cache)
    assert ask(authorization="a") == ("miss", "answer 1")
    cache.update(share="all")
    assert [ask(authorization="a"), ask(authorization="b")] == [("miss", "answer 2"), ("hit", "answer 2")]
    cache.update(share="caller")
    assert [ask(authorization="a"), ask(authorization="b")] == [("hit", "answer 1"), ("miss", "answer 3")]


@pytest.mark.parametrize("field", ["cache_key", "preset_cache_key", "cache-key", "x-llm-cache-key"])
def test_c24_a_client_cannot_name_the_entry_it_wants(front, field):
    ask = asking(front)
    key = ask.client.post(BODY, headers={"authorization": "a"}).headers["x-llm-cache-key"]
    for name in (key, f"llm:{key}"):
        assert ask({**BODY, field: name}, authorization="b")[0] == "miss"
        assert ask({**BODY, "metadata": {field: name}}, authorization="c" + name)[0] == "miss"
        assert ask(BODY, authorization="d" + name, **{field.replace("-", "_"): name})[0] == "miss"
        reply = ask.client.post({**BODY, "cache": {field: name}}, headers={"authorization": "b"})
        assert (reply.status, reply.json()["error"]["code"]) == (400, "unknown_cache_control")


def test_c25_a_namespace_is_inside_the_callers_scope(front):
    ask = asking(front)

    def inside(namespace: str) -> dict:
        return {**BODY, "cache": {"namespace": namespace}}

    assert ask(inside("team"), authorization="a") == ("miss", "answer 1")
    assert ask(inside("team"), authorization="b") == ("miss", "answer 2")
    assert ask(inside("team"), authorization="a") == ("hit", "answer 1")
    assert ask(inside("team")) == ("miss", "answer 3")
    assert ask(BODY, authorization="a") == ("miss", "answer 4")


def test_c25_no_namespace_reaches_another_scope_or_the_managers_own(front):
    cache = CacheManager(namespace="llm")
    ask = asking(front, cache=cache)
    key = ask.client.post(BODY, headers={"authorization": "a"}).headers["x-llm-cache-key"]
    for namespace in ("llm", "", "*", "..", "llm:" + key, key, "\x00", "caller:anonymous"):
        body = {**BODY, "cache": {"namespace": namespace} if namespace else {}}
        assert ask(body, authorization="b" + namespace.encode().hex())[0] == "miss"
        plan = cache.plan("chat", body, scope="s")
        assert plan.key.startswith("llm:")
        assert len(plan.key) == 4 + 64


def test_c25_a_flight_is_not_shared_across_scopes(face):
    """Two tenants at the same time make two calls."""
    cache, answers = CacheManager(), Answers()
    first = face.fetch(cache, BODY, lambda body: face_inside(cache, answers), scope="a")
    assert first.json() == completion("answer 1")
    assert answers.calls == 1


def face_inside(cache: CacheManager, answers: Answers) -> object:
    """Another tenant's fetch while the first one's call is under way."""
    inner = cache.fetch(BODY, answers, scope="b")
    assert inner.cache.status == "miss"
    return inner.body


# --- C29: guardrails


def test_c29_a_guardrail_in_the_body(front):
    ask = asking(front)
    with_guard = {**BODY, "guardrails": ["pii"]}
    assert ask(with_guard) == ("miss", "answer 1")
    assert ask(BODY) == ("miss", "answer 2")
    assert ask({**BODY, "guardrails": ["other"]}) == ("miss", "answer 3")
    assert [ask(with_guard), ask(BODY)] == [("hit", "answer 1"), ("hit", "answer 2")]


def test_c29_a_guardrail_in_a_header_that_the_answer_varies_on(front):
    answers = Answers()

    def handler(seen):
        raw = json.dumps(answers(seen)).encode()
        return 200, {"content-type": "application/json", "vary": "X-Guardrail, Accept-Encoding"}, raw

    client = front(handler, cache=CacheManager())

    def ask(**headers: str) -> tuple[str, str]:
        reply = client.post(BODY, headers={name.replace("_", "-"): value for name, value in headers.items()})
        return reply.cache, reply.json()["choices"][0]["message"]["content"]

    assert ask(x_guardrail="on") == ("miss", "answer 1")
    assert ask(x_guardrail="on") == ("hit", "answer 1")
    assert ask(x_guardrail="on", accept_encoding="gzip") == ("hit", "answer 1")
    assert ask(x_guardrail="off") == ("miss", "answer 2")
    assert ask() == ("miss", "answer 3")
    assert ask() == ("hit", "answer 3")
    assert ask(x_guardrail="") == ("hit", "answer 3")


def test_c29_an_answer_that_varies_on_everything_is_not_kept(front):
    raw = json.dumps(completion()).encode()
    client = front(
        lambda seen: (200, {"content-type": "application/json", "vary": "*"}, raw), cache=CacheManager()
    )
    replies = [client.post(BODY) for _ in range(2)]
    assert [reply.cache_status for reply in replies] == ["llm-middleware; fwd=miss; detail=vary"] * 2


# --- identify


def header_of(front, request: dict, name: str) -> str:
    if front.name == "asgi":
        return dict(request["headers"]).get(name.encode(), b"").decode()
    return request.get("HTTP_" + name.upper().replace("-", "_"), "")


def test_identify_takes_the_place_of_credentials(front):
    ask = asking(front, identify=lambda request: header_of(front, request, "x-tenant"))
    assert ask(x_tenant="a", authorization="1") == ("miss", "answer 1")
    assert ask(x_tenant="a", authorization="2") == ("hit", "answer 1")
    assert ask(x_tenant="b", authorization="1") == ("miss", "answer 2")
    assert ask(x_tenant="", authorization="1") == ("miss", "answer 3")


def test_identify_may_be_async():
    async def identify(scope: dict) -> str:
        await asyncio.sleep(0)
        return dict(scope["headers"]).get(b"x-tenant", b"").decode()

    client = AsgiFront(Host(Answers()), cache=CacheManager(), identify=identify)
    told = [client.post(BODY, headers={"x-tenant": tenant}).cache for tenant in ("a", "b", "a")]
    assert told == ["miss", "miss", "hit"]


@pytest.mark.parametrize(("identity", "same"), [(b"a", "a"), (None, None), ("", "")])
def test_what_identify_may_return(front, identity, same):
    ask = asking(front, identify=lambda request: identity)
    assert [ask()[0], ask()[0]] == ["miss", "hit"]


def test_nobody_is_not_somebody_with_an_empty_name(front):
    who = {"value": None}
    ask = asking(front, identify=lambda request: who["value"])
    assert ask() == ("miss", "answer 1")
    who["value"] = ""
    assert ask() == ("miss", "answer 2")
    who["value"] = "caller:anonymous"
    assert ask() == ("miss", "answer 3")


def test_identify_of_nobody_shares_with_callers_without_credentials(front):
    cache = CacheManager()
    assert asking(front, cache=cache, identify=lambda request: None)(authorization="a")[0] == "miss"
    assert asking(front, cache=cache)()[0] == "hit"


@pytest.mark.parametrize(
    "fails", [lambda request: 1 / 0, lambda request: 5, lambda: "a", lambda request: object()]
)
def test_an_identify_that_fails_shares_nothing_and_the_request_is_answered(front, fails, caplog):
    caplog.set_level(logging.WARNING, "llm_middleware")
    cache = CacheManager()
    client = front(Answers(), cache=cache, identify=fails)
    replies = [client.post({**BODY, "cache": {"ttl": 5}}) for _ in range(2)]
    assert [reply.cache_status for reply in replies] == [
        "llm-middleware; fwd=bypass; detail=identify-failed"
    ] * 2
    assert [reply.json()["choices"][0]["message"]["content"] for reply in replies] == ["answer 1", "answer 2"]
    assert "x-llm-cache-key" not in replies[0].headers
    assert cache.stats()["entries"] == 0
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_an_async_identify_that_fails_is_no_different():
    async def identify(scope: dict) -> str:
        raise ValueError("no such tenant")

    client = AsgiFront(Host(Answers()), cache=CacheManager(), identify=identify)
    replies = [client.post(BODY) for _ in range(2)]
    assert [reply.cache_status for reply in replies] == [
        "llm-middleware; fwd=bypass; detail=identify-failed"
    ] * 2


def test_an_identify_that_fails_leaves_the_body_to_the_handler(front):
    """Less the field that the host's handler need not know."""
    client = front(Answers(), cache=CacheManager(), identify=lambda request: 1 / 0)
    client.post({**BODY, "cache": {"ttl": 5}})
    assert client.host.seen[0].json() == BODY


# --- one cache behind both kinds of app


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer a"}, {"x-api-key": "b"}, {"cookie": "c=d"}]
)
def test_a_caller_is_the_same_in_front_of_an_asgi_and_a_wsgi_app(headers):
    cache = CacheManager()
    handler = Answers()
    assert AsgiFront(Host(handler), cache=cache).post(BODY, headers=headers).cache == "miss"
    assert WsgiFront(Host(handler), cache=cache).post(BODY, headers=headers).cache == "hit"


def test_a_caller_is_the_same_in_whatever_order_its_headers_come():
    cache = CacheManager()
    headers = {"cookie": "c=d", "x-api-key": "b", "authorization": "Bearer a"}
    turned = dict(reversed(headers.items()))
    for front in (AsgiFront, WsgiFront):
        assert front(Host(Answers()), cache=cache).post(BODY, headers=turned).cache in ("miss", "hit")
    assert cache.stats()["entries"] == 1
    assert AsgiFront(Host(Answers()), cache=cache).post(BODY, headers=headers).cache == "hit"
