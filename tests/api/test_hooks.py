"""What observers are told: one event for each request for a model, on both fronts."""

from __future__ import annotations

import asyncio
import json
import logging
import threading

import pytest

from llm_middleware import events as events_module
from llm_middleware.asgi import llm_app as asgi_app
from llm_middleware.errors import ConfigError
from llm_middleware.events import Event
from llm_middleware.keys.record import KeyRecord
from llm_middleware.wsgi import llm_app as wsgi_app
from tests.api import serving
from tests.api.serving import AUDIO, CHAT, chat, payloads

served, server, upstream = serving.served, serving.server, serving.upstream
asgi_server, wsgi_server = serving.asgi_server, serving.wsgi_server

PRICES = {"id": "m-1", "input_cost_per_token": 0.5, "output_cost_per_token": 2.0}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
JSON_KINDS = {
    "chat": (CHAT, chat()),
    "stream": (CHAT, chat(**STREAM)),
    "text": ("/v1/completions", {"model": "m", "prompt": "hi"}),
    "embedding": ("/v1/embeddings", {"model": "m", "input": "hi"}),
    "responses": ("/v1/responses", {"model": "m", "input": "hi"}),
    "streamed responses": ("/v1/responses", {"model": "m", "input": "hi", "stream": True}),
}
KINDS = {"stream": "chat", "streamed responses": "responses"}


class Seen(list[Event]):
    """A hook that keeps its events."""

    __call__ = list.append

    def wait(self, count: int) -> None:
        serving.until(lambda: len(self) >= count, f"{count} events")

    @property
    def told(self) -> list[tuple[object, ...]]:
        return [(each.name, each.cache_hit, each.detail) for each in self]


@pytest.fixture
def seen():
    return Seen()


@pytest.fixture
def ask(served, upstream, seen):
    """``ask(**sections)``: a client of a sub-app whose one model has prices, and whose events are `seen`."""

    def make(*, options=None, **sections):
        models = [{**serving.model("m", upstream), "model_info": PRICES}]
        return served(models=models, options={"hooks": [seen], **(options or {})}, **sections)

    return make


# Who answered, and what it cost ---------------------------------------------------------------------


@pytest.mark.parametrize("name", JSON_KINDS)
def test_c112_c113_a_miss_and_a_hit(ask, seen, name):
    """C112: ``cache_hit`` is False on a miss. C113: the key is there on a hit, of a stream too."""
    client = ask()
    path, body = JSON_KINDS[name]
    answers = [client.post(path, json=body) for _ in range(2)]
    assert [each.headers["x-llm-cache"] for each in answers] == ["miss", "hit"]
    seen.wait(2)
    miss, hit = seen
    assert seen.told == [("success", False, None), ("success", True, None)]
    kind, stream = KINDS.get(name, name), body.get("stream") is True
    assert [(each.kind, each.stream, each.model) for each in seen] == [(kind, stream, "m")] * 2
    assert [each.key for each in seen] == [each.headers["x-llm-cache-key"] for each in answers]
    assert (miss.deployment, hit.deployment) == ("m-1", None)
    assert miss.tokens > 0
    assert miss.cost == (miss.tokens - miss.output_tokens) * 0.5 + miss.output_tokens * 2.0
    assert miss.latency > 0
    assert (hit.tokens, hit.output_tokens, hit.cost, hit.latency) == (None, None, None, None)
    assert (miss.tier, miss.age) == (None, None)
    assert hit.tier == "memory"
    assert hit.age >= 0


def test_what_a_plain_answer_says_it_used(ask, seen):
    usage = ask().chat("one two three").json()["usage"]
    assert (seen[0].tokens, seen[0].output_tokens) == (usage["total_tokens"], usage["completion_tokens"])
    assert seen[0].cost == usage["prompt_tokens"] * 0.5 + usage["completion_tokens"] * 2.0


def test_c112_transcriptions(ask, seen):
    client = ask()
    answers = [client.post("/v1/audio/transcriptions", data={"model": "m"}, files=AUDIO) for _ in range(2)]
    assert seen.told == [("success", False, None), ("success", True, None)]
    assert {each.kind for each in seen} == {"transcription"}
    assert [each.key for each in seen] == [each.headers["x-llm-cache-key"] for each in answers]


def test_some_embeddings_of_a_list_are_cached(ask, seen):
    """The tokens are those of what was asked for."""
    client = ask()
    first = client.post("/v1/embeddings", json={"model": "m", "input": ["one two"]})
    both = client.post("/v1/embeddings", json={"model": "m", "input": ["one two", "three"]})
    again = client.post("/v1/embeddings", json={"model": "m", "input": ["one two", "three"]})
    states = [each.headers["x-llm-cache"] for each in (first, both, again)]
    assert states == ["miss", "partial", "hit"]
    assert [(each.name, each.cache_hit) for each in seen] == [
        ("success", False),
        ("success", False),
        ("success", True),
    ]
    alone = client.post("/v1/embeddings", json={"model": "m", "input": ["three"]}, headers={"x-api-key": "b"})
    assert alone.headers["x-llm-cache"] == "miss"
    assert seen[1].tokens == seen[3].tokens


def test_without_a_cache_there_is_no_key(ask, seen):
    client = ask(cache=None)
    for _ in range(2):
        answer = client.chat()
        assert answer.headers["x-llm-cache"] == "bypass"
        assert "x-llm-cache-key" not in answer.headers
    assert seen.told == [("success", False, None)] * 2
    assert [each.key for each in seen] == [None, None]
    assert seen[0].tokens > 0


def test_a_request_that_passes_the_cache_by(ask, seen):
    client = ask()
    client.chat(cache={"no-cache": True, "no-store": True})
    client.chat()
    assert seen.told == [("success", False, None)] * 2


def test_the_caller_is_the_id_of_its_key(ask, seen):
    client = ask(keys={"master_key": "sk-master-0123456789"})
    headers = {"authorization": "Bearer sk-master-0123456789"}
    made = client.post("/key/generate", json={}, headers=headers).json()
    for _ in range(2):
        client.chat(headers={"authorization": f"Bearer {made['key']}"})
    client.chat("else", headers=headers)
    assert [each.caller for each in seen] == [made["token"], made["token"], "master"]


# Failures -------------------------------------------------------------------------------------------


def test_an_upstream_that_fails(ask, upstream, seen):
    client = ask()
    upstream.fail_next(429)
    upstream.fail_next(400, body=serving.openai_error("no", code="context_length_exceeded"))
    upstream.fail_next(503)
    answers = [client.chat() for _ in range(3)]
    assert [each.name for each in seen] == ["failure"] * 3
    assert [each.detail for each in seen] == [each.json()["error"]["code"] for each in answers]
    assert [each.error.status for each in seen] == [each.status_code for each in answers]
    assert {(each.cache_hit, each.deployment, each.model, each.tokens) for each in seen} == {
        (False, "m-1", "m", None)
    }


def test_a_stream_that_breaks_off(ask, upstream, seen):
    client = ask()
    upstream.cut_stream_after(4)
    answer = client.chat(**STREAM)
    assert b'"error"' in answer.content
    seen.wait(1)
    assert seen.told == [("failure", False, "connection_error")]
    assert (seen[0].error.code, seen[0].stream, seen[0].deployment) == ("connection_error", True, "m-1")
    assert seen[0].key == answer.headers["x-llm-cache-key"]


@pytest.mark.parametrize("cache", [{"type": "local"}, None], ids=["cached", "uncached"])
def test_a_client_that_leaves_a_stream(ask, upstream, seen, cache):
    client = ask(cache=cache)
    upstream.stream_events, upstream.chunk_delay = 500, 0.02
    with client.stream("POST", CHAT, json=chat(stream=True)) as answer:
        next(answer.iter_raw())
    seen.wait(1)
    serving.until(lambda: serving.in_flight(client.core) == 0, "the call is over")
    assert seen.told == [("failure", False, "client-disconnected")]


def test_a_client_that_leaves_before_a_plain_answer(asgi_server, upstream, seen):
    """Under WSGI no app hears of it before it answers."""
    app = asgi_server.sub_app(serving.config(upstream), hooks=[seen])
    asgi_server.app = app
    upstream.hold()
    leaving = serving.Leaving(asgi_server.url, CHAT, chat())
    upstream.wait_for(1)
    leaving.leave()
    seen.wait(1)
    assert seen.told == [("failure", False, "client-disconnected")]
    asgi_server.close(app)


def test_a_client_that_leaves_with_the_last_event_has_its_answer(upstream, seen):
    """OpenAI's SDKs hang up on ``[DONE]``; what was used is known by then."""
    app = wsgi_app(serving.config(upstream), hooks=[seen])
    body = json.dumps(chat(**STREAM)).encode()
    environ = environ_of(body)
    chunks = app(environ, lambda status, headers: None)
    for chunk in chunks:
        if b"[DONE]" in chunk:
            break
    chunks.close()
    assert seen.told == [("success", False, None)]
    assert seen[0].tokens > seen[0].output_tokens > 0
    app.close()


def test_a_client_of_asgi_that_leaves_with_the_last_event(upstream, seen):
    app = asgi_app(serving.config(upstream), hooks=[seen])
    body = json.dumps(chat(**STREAM)).encode()

    async def main():
        pending = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def receive():
            if pending:
                return pending.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if b"[DONE]" in message.get("body", b""):
                gone.set()
                raise OSError("the client has left")

        try:
            await app({**SCOPE, "headers": [(b"content-type", b"application/json")]}, receive, send)
        except OSError:
            """As servers see it."""
        await app.aclose()

    asyncio.run(main())
    assert seen.told == [("success", False, None)]
    assert seen[0].tokens > seen[0].output_tokens > 0


SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": CHAT,
    "raw_path": CHAT.encode(),
    "root_path": "",
    "query_string": b"",
    "server": ("host", 80),
    "client": ("client", 1),
}


def environ_of(body: bytes) -> dict[str, object]:
    from werkzeug.test import EnvironBuilder

    return EnvironBuilder(CHAT, method="POST", data=body, content_type="application/json").get_environ()


def test_an_error_of_our_own_is_no_client_that_left(ask, seen):
    client = ask()

    async def broken(*args, **options):
        raise RuntimeError("a bug")

    client.core.router._call = broken
    answer = client.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert seen.told == [("failure", False, "internal_error")]


def test_a_model_that_is_not_there(ask, seen):
    assert ask().chat(model="unknown").status_code == 404
    assert [(*told, each.model) for told, each in zip(seen.told, seen, strict=True)] == [
        ("failure", False, "model_not_found", "unknown")
    ]


def test_what_is_refused_before_it_is_asked_has_no_event(ask, seen):
    """Whoever may not call, or asks what cannot be read, is not told of: that is the access log's."""
    client = ask(keys={"master_key": "sk-master-0123456789"})
    admin = {"authorization": "Bearer sk-master-0123456789"}
    made = client.post("/key/generate", json={"models": ["n"], "rpm_limit": 1}, headers=admin).json()
    key = {"authorization": f"Bearer {made['key']}"}
    refused = [
        client.chat(),
        client.chat(headers={"authorization": "Bearer sk-nobodys-0123456789"}),
        client.chat(headers=key),
        client.chat(headers=key),
        client.post(CHAT, content=b"{", headers=admin),
        client.chat(headers={**admin, "cache-control": "only-if-cached"}),
        client.get("/v1/models", headers=admin),
    ]
    assert [each.status_code for each in refused] == [401, 401, 403, 429, 400, 504, 200]
    assert seen == []


# Those who share a call -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_each_of_many_at_once_has_one_event(ask, upstream, seen, stream):
    client = ask()
    upstream.hold()
    answers = client.together(10, lambda: client.chat(stream=stream))
    serving.until(lambda: serving.readers(client.core) >= 9, "the others wait for one")
    upstream.release()
    keys = {each.headers["x-llm-cache-key"] for each in answers()}
    seen.wait(10)
    assert sorted(seen.told, key=str) == sorted(
        [("success", False, None), *[("success", False, "collapsed")] * 9], key=str
    )
    assert {each.key for each in seen} == keys
    assert [each.tokens is None for each in seen].count(True) == 9, "who shares a call paid nothing"
    assert len({each.deployment for each in seen if each.detail is None}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_who_shares_a_failure_is_told_of_as_such(ask, upstream, seen, stream):
    client = ask()
    upstream.hold()
    if stream:
        upstream.cut_stream_after(4)
    else:
        upstream.fail_next(503)
    answers = client.together(3, lambda: client.chat(stream=stream))
    serving.until(lambda: serving.readers(client.core) >= 2, "the others wait for one")
    upstream.release()
    assert all(b'"error"' in each.content for each in answers())
    seen.wait(3)
    assert {each.name for each in seen} == {"failure"}
    assert len(seen) == 3


def test_who_leaves_while_reading_along(ask, upstream, seen):
    client = ask()
    upstream.hold(after_events=3)
    with client.stream("POST", CHAT, json=chat(stream=True)) as leader:
        chunks = leader.iter_raw()
        next(chunks)
        with client.stream("POST", CHAT, json=chat(stream=True)) as follower:
            assert follower.headers["x-llm-cache"] == "collapsed"
            next(follower.iter_raw())
        if client.front == "asgi":
            seen.wait(1)
        upstream.release()
        rest = b"".join(chunks)
    assert payloads(rest)[-1] == b"[DONE]"
    seen.wait(2)
    serving.until(lambda: serving.idle(client.core), "nobody reads along")
    left = [told for told in seen.told if told[2] is not None]
    if client.front == "asgi":
        assert left == [("failure", False, "client-disconnected")]
    assert sorted(seen.told, key=str).count(("success", False, None)) == 1
    assert len(seen) == 2


# Stale answers --------------------------------------------------------------------------------------


def test_c71_a_stale_answer_in_place_of_an_error_is_one_event(ask, upstream, seen):
    client = ask(cache={"type": "local", "ttl": 0.2, "ttl_jitter": 0, "stale_if_error": 60})
    client.chat()
    serving.until(lambda: client.chat(headers={"cache-control": "only-if-cached"}).status_code == 504)
    seen.clear()
    upstream.fail_next(503)
    assert client.chat().headers["x-llm-cache"] == "stale"
    assert seen.told == [("success", True, "stale-if-error")]
    assert (seen[0].error.status, seen[0].deployment) == (503, "m-1")
    upstream.fail_next(400, body=serving.openai_error("no"))
    assert client.chat().status_code == 400
    assert [told[0] for told in seen.told] == ["success", "failure"]


def test_c70_a_refresh_is_told_as_one(ask, upstream, seen):
    """The request has its event; the call behind it has one of its own, since it costs too."""
    client = ask(cache={"type": "local", "ttl": 0.2, "ttl_jitter": 0, "stale_while_revalidate": 60})
    first = client.chat()
    answers = []
    serving.until(lambda: answers.append(client.chat()) or answers[-1].headers["x-llm-cache"] == "stale")
    serving.until(lambda: client.chat().content != first.content, "the fresh answer is there")
    upstream.wait_for(2)
    assert ("success", True, "stale-while-revalidate") in seen.told
    refreshed = [each for each in seen if each.detail == "refresh"]
    assert [(each.name, each.cache_hit, each.tokens > 0) for each in refreshed] == [("success", False, True)]


# Hooks of all kinds ---------------------------------------------------------------------------------


def test_an_async_hook_is_awaited_beside_the_request(ask, seen):
    """On the server's own loop under ASGI, in a thread of its own under WSGI."""
    threads = []

    async def hook(event):
        await asyncio.sleep(0)
        threads.append(threading.current_thread().name)
        seen(event)

    client = ask(options={"hooks": [hook]})
    client.chat(), client.chat()
    seen.wait(2)
    assert sorted(seen.told, key=str) == [("success", False, None), ("success", True, None)]
    assert {name == "llm-middleware-hook" for name in threads} == {client.front == "wsgi"}


def test_a_slow_async_hook_holds_up_no_hit(ask, seen):
    """The answers come while the hook has not ended; it ends when all have come."""
    release = threading.Event()

    async def hook(event):
        await asyncio.to_thread(release.wait, serving.PATIENCE_S)
        seen(event)

    client = ask(options={"hooks": [hook]})
    states = [client.chat().headers["x-llm-cache"] for _ in range(4)]
    assert states == ["miss", "hit", "hit", "hit"]
    assert seen == []
    release.set()
    seen.wait(4)
    assert len(seen) == 4


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_hook_that_raises_is_logged_once_and_counted(ask, seen, caplog, kind):
    def fails(event):
        raise RuntimeError("a hook's own affair")

    async def afails(event):
        raise RuntimeError("a hook's own affair")

    client = ask(options={"hooks": [fails if kind == "sync" else afails, seen]})
    with caplog.at_level(logging.ERROR, "llm_middleware"):
        answers = [client.chat() for _ in range(3)]
        serving.until(lambda: client.core.hooks.failed == 3, "all three are counted")
    assert [each.headers["x-llm-cache"] for each in answers] == ["miss", "hit", "hit"]
    assert len(seen) == 3, "the hooks after it are told"
    logged = [record for record in caplog.records if record.exc_info is not None]
    assert [str(record.exc_info[1]) for record in logged] == ["a hook's own affair"]


SEEN_BY_NAME = Seen()


def test_hooks_by_name(ask, seen):
    client = ask(hooks=[f"{__name__}.SEEN_BY_NAME"])
    SEEN_BY_NAME.clear()
    client.chat()
    assert seen == SEEN_BY_NAME
    assert len(seen) == 1


@pytest.mark.parametrize("app", [asgi_app, wsgi_app], ids=["asgi", "wsgi"])
@pytest.mark.parametrize(
    "hooks", [[5], print, ["print"], [None]], ids=["number", "no list", "a name", "nothing"]
)
def test_what_is_no_hook(upstream, app, hooks):
    with pytest.raises(ConfigError, match="hooks: expected") as caught:
        app(serving.config(upstream), hooks=hooks)
    assert caught.value.param == "hooks"


@pytest.mark.parametrize("name", ["nowhere.at.all", f"{__name__}.missing", f"{__name__}.PRICES"])
def test_what_is_no_hook_by_name_is_left_out(upstream, name, caplog):
    """A file of LiteLLM's that names a logger of its own starts as it is."""
    made = wsgi_app(serving.config(upstream, hooks=[name]))
    told = [record.getMessage().split(": ")[0] for record in caplog.records]
    assert told == [f"the callback {name!r} is left out"]
    assert not made.core.hooks


def test_events_are_what_the_documentation_says():
    """`Event` names every field that hooks are told of."""
    fields = set(Event.__dataclass_fields__)
    assert {"cache_hit", "detail", "deployment", "caller", "tokens", "cost", "latency"} <= fields
    for name in ("cache_hit", "detail", "tier", "deployment", "caller", "tokens", "cost", "latency"):
        assert f"``{name}``" in (Event.__doc__ or "")
    assert "success" in (events_module.Event.__doc__ or "")


def test_records_without_an_id_of_their_own(ask, seen):
    """The id that ``authorize`` gives is the caller's."""
    client = ask(options={"authorize": lambda head: KeyRecord(id=head.header("x-user"), user="u")})
    client.chat(headers={"x-user": "ann"})
    assert seen[0].caller == "ann"
