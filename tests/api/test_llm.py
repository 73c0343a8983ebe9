"""The sub-app's model endpoints over HTTP, on both fronts: paths, refusals, and what upstreams say."""

from __future__ import annotations

import gzip
import json
from urllib.parse import unquote

import pytest

from llm_middleware.testing import FakeUpstream
from tests.api import serving
from tests.api.serving import (
    AUDIO,
    CHAT,
    SLASHES,
    chat,
    error,
    openai_error,
    refused,
)

served, server, upstream = serving.served, serving.server, serving.upstream
asgi_server, wsgi_server = serving.asgi_server, serving.wsgi_server

JSON_BODIES = {
    "chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "completions": {"prompt": "hi"},
    "embeddings": {"input": "hi"},
    "responses": {"input": "hi"},
}


def ask(client, endpoint, path, *, named=True):
    """Ask ``endpoint`` at ``path``; ``named``: with the model in the body."""
    fields = {"model": SLASHES} if named else {}
    if endpoint == "audio/transcriptions":
        return client.post(path, data=fields, files=AUDIO)
    return client.post(path, json={**fields, **JSON_BODIES[endpoint]})


@pytest.mark.parametrize("endpoint", [*JSON_BODIES, "audio/transcriptions"])
def test_every_path_of_an_endpoint_asks_the_same(served, upstream, endpoint):
    client = served()
    answers = [
        ask(client, endpoint, f"/v1/{endpoint}"),
        ask(client, endpoint, f"/{endpoint}"),
        ask(client, endpoint, f"/engines/{SLASHES}/{endpoint}", named=False),
        ask(client, endpoint, f"/openai/deployments/{SLASHES}/{endpoint}", named=False),
        ask(client, endpoint, f"/openai/deployments/{SLASHES}/{endpoint}"),
    ]
    assert [answer.status_code for answer in answers] == [200] * 5, [answer.text for answer in answers]
    assert [answer.headers["x-llm-cache"] for answer in answers] == ["miss", "hit", "hit", "hit", "hit"]
    assert {answer.content for answer in answers} == {answers[0].content}
    (call,) = upstream.calls
    assert (call.method, call.path) == ("POST", f"/v1/{endpoint}")
    assert call.json["model"] == f"{SLASHES}-up"


def test_models_are_listed_and_shown(served):
    client = served()
    listed = client.get("/v1/models").json()
    shown = {"object": "model", "created": 0, "owned_by": "llm-middleware"}
    assert listed == {"object": "list", "data": [{"id": name, **shown} for name in ("m", SLASHES)]}
    assert client.get("/models").json() == listed
    for path in (f"/v1/models/{SLASHES}", f"/models/{SLASHES}", "/v1/models/org%2Fdeep%2Fm"):
        assert client.get(path).json() == {"id": SLASHES, **shown}
    missing = client.get("/v1/models/org/other")
    assert (missing.status_code, error(missing)["code"]) == (404, "model_not_found")


def test_a_models_name_may_have_any_letters(served, upstream):
    client = served(models=[serving.model("größe/日本", upstream)])
    assert client.get("/v1/models/größe/日本").json()["id"] == "größe/日本"
    answer = client.post("/engines/größe/日本/completions", json={"prompt": "hi"})
    assert answer.status_code == 200
    assert unquote(answer.headers["x-llm-model"]) == "größe/日本"
    assert upstream.calls[0].json["model"] == "größe/日本-up"


# Refusals -----------------------------------------------------------------------------------------


GZIP = {"content-type": "application/json", "content-encoding": "gzip"}
WRONG = {
    "no JSON": (CHAT, b'{"model": ', {}, (400, "invalid_request", None)),
    "no object": (CHAT, b"[1, 2]", {}, (400, "invalid_request", None)),
    "nothing": (CHAT, b"", {}, (400, "invalid_request", None)),
    "no model": (CHAT, b'{"messages": []}', {}, (400, "invalid_request", "model")),
    "no name": (CHAT, b'{"model": 5, "messages": []}', {}, (400, "invalid_request", "model")),
    "unknown model": (CHAT, b'{"model": "n", "messages": []}', {}, (404, "model_not_found", "model")),
    "in the path": ("/engines/n/completions", b"{}", {}, (404, "model_not_found", "model")),
    "no JSON, in the path": ("/engines/m/completions", b"{", {}, (400, "invalid_request", None)),
    "no form": ("/v1/audio/transcriptions", b"x", {}, (400, "invalid_request", None)),
    "stream": (CHAT, b'{"model": "m", "messages": [], "stream": 1}', {}, (400, "invalid_request", "stream")),
    "embeddings in a stream": (
        "/v1/embeddings",
        b'{"model": "m", "input": "a", "stream": true}',
        {},
        (400, "invalid_request", "stream"),
    ),
    "brotli": (CHAT, b"x", {"content-encoding": "br"}, (400, "invalid_request", "content-encoding")),
    "no gzip": (CHAT, b"x", GZIP, (400, "invalid_request", "content-encoding")),
    "too deep": (CHAT, b"[" * 100_000, {}, (400, "invalid_request", None)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_refused(served, upstream, name):
    path, body, headers, expected = WRONG[name]
    client = served()
    answer = client.post(path, content=body, headers=headers)
    assert refused(answer) == expected
    assert answer.headers["x-llm-cache"] in ("miss", "bypass")
    assert upstream.count == 0


OURS = ["api_base", "api_key", "base_url", "organization", "extra_headers", "extra_body", "max_retries"]
OURS += ["scope", "controls", "caching", "may_use", "on_stream_error"]


@pytest.mark.parametrize("field", OURS)
def test_clients_do_not_say_where_they_go_or_as_whom(served, upstream, field):
    client = served()
    answer = client.chat(**{field: "https://elsewhere.example"})
    assert refused(answer) == (400, "invalid_request", field)
    assert upstream.count == 0


def test_unknown_paths_and_methods(served):
    client = served()
    for method, path in (("GET", "/v1/nowhere"), ("POST", "/"), ("POST", "/v1/engines/m/completions")):
        assert refused(client.request(method, path)) == (404, "not_found", None)
    for method, path, allowed in (
        ("GET", CHAT, "POST"),
        ("OPTIONS", CHAT, "POST"),
        ("PUT", f"/openai/deployments/{SLASHES}/chat/completions", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", f"/models/{SLASHES}", "GET, HEAD"),
    ):
        answer = client.request(method, path)
        assert refused(answer) == (405, "method_not_allowed", None)
        assert answer.headers["allow"] == allowed


def test_head_is_get_without_a_body(served):
    client = served()
    for path in ("/v1/models", "/v1/models/m", "/v1/models/n", "/nowhere", CHAT):
        asked = client.get(path)
        head, _, body = serving.exchanged(client.url, "HEAD", path).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % asked.status_code)
        if asked.status_code != 405:
            assert b"content-length: %d" % len(asked.content) in head.lower()
        assert body == b""


def in_pieces(body):
    yield body[:10]
    yield body[10:]


@pytest.mark.parametrize("path", [CHAT, "/engines/m/chat/completions"])
def test_long_bodies_are_413(served, upstream, path):
    client = served(server={"max_body_bytes": 200})
    fits, long = (json.dumps(chat("x" * size)).encode() for size in (100, 200))
    assert (len(fits) <= 200, len(long) > 200) == (True, True)
    for content in (long, in_pieces(long)):
        answer = client.post(path, content=content)
        assert refused(answer) == (413, "request_too_large", None)
    for content in (fits, in_pieces(fits)):
        assert client.post(path, content=content).status_code == 200
    # No more when it is unpacked.
    packed = gzip.compress(json.dumps(chat("x" * 10_000)).encode())
    assert len(packed) < 200
    assert client.post(path, content=packed, headers=GZIP).status_code == 400
    assert upstream.count == 1


def test_gzip_bodies_are_read(served, upstream):
    client = served()
    packed = gzip.compress(json.dumps(chat(cache={"ttl": 60})).encode())
    answers = [
        client.post(path, content=packed, headers=GZIP)
        for path in (CHAT, CHAT, "/engines/m/chat/completions")
    ]
    assert [answer.headers["x-llm-cache"] for answer in answers] == ["miss", "hit", "hit"]
    assert client.chat().headers["x-llm-cache"] == "hit"
    (call,) = upstream.calls
    assert call.json == chat(model="m-up")
    other = client.post(f"/engines/{SLASHES}/chat/completions", content=packed, headers=GZIP)
    assert other.headers["x-llm-cache"] == "miss"
    assert upstream.calls[1].json == chat(model=f"{SLASHES}-up")


def test_r60_what_goes_wrong_in_here_is_not_told(served, monkeypatch):
    client = served()

    async def broken(*args, **options):
        raise RuntimeError("the secret of the house")

    monkeypatch.setattr(client.core.router, "_call", broken)
    for answer in (client.chat(), client.chat(stream=True)):
        assert refused(answer) == (500, "internal_error", None)
        assert error(answer)["message"] == "internal error"


# What upstreams say -------------------------------------------------------------------------------


def test_r58_a_prompt_that_is_too_long_keeps_its_code(served, upstream):
    client = served()
    text = "This model's maximum context length is 8192 tokens. However, your messages have 9000 tokens."
    told = openai_error(text, type="invalid_request_error", param="messages", code="context_length_exceeded")
    upstream.fail_next(400, body=told)
    answer = client.chat()
    assert answer.status_code == 400
    assert error(answer) == told["error"]


def test_r59_retry_after_is_handed_on(served, upstream):
    client = served()
    for given, seconds, millis in (
        ({"retry-after": "7"}, "7", "7000"),
        ({"retry-after-ms": "1500"}, "2", "1500"),
        ({"retry-after": "0.25"}, "1", "250"),
    ):
        upstream.fail_next(429, headers=given)
        answer = client.chat()
        assert refused(answer) == (429, "rate_limit_exceeded", None)
        assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == (seconds, millis)
    upstream.fail_next(429)
    assert "retry-after" not in client.chat().headers
    assert upstream.count == 4


def test_r59_everybody_who_shared_the_call_gets_retry_after(served, upstream):
    client = served()
    upstream.hold()
    upstream.fail_next(429, headers={"retry-after": "7"})
    answers = client.together(5, client.chat)
    serving.until(lambda: serving.readers(client.core) == 4, "four wait for the call of the fifth")
    upstream.release()
    assert [(each.status_code, each.headers.get("retry-after")) for each in answers()] == [(429, "7")] * 5
    assert upstream.count == 1


def test_r61_a_400_that_speaks_of_rate_limits_stays_a_400(served, upstream):
    client = served()
    upstream.fail_next(400, body=openai_error("the word 'rate limit' is not allowed in a tool's name"))
    answer = client.chat()
    assert refused(answer) == (400, "invalid_request", None)
    assert "rate limit" in error(answer)["message"]


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "invalid_api_key", (401, "invalid_api_key")),
        (403, "unsupported_country", (403, "unsupported_country")),
        (404, "model_gone", (404, "model_gone")),
        (409, "conflict", (409, "conflict")),
        (413, "too_big", (413, "too_big")),
        (422, "not_so", (422, "not_so")),
        (429, "insufficient_quota", (429, "insufficient_quota")),
        (400, "content_filter", (400, "content_policy_violation")),
        (500, None, (500, "upstream_error")),
        (503, "overloaded", (503, "overloaded")),
        (529, "overloaded_error", (529, "overloaded_error")),
    ],
)
def test_providers_status_and_codes_are_kept(served, upstream, status, code, expected):
    client = served(router={"cooldown_time": 0})
    upstream.fail_next(status, body=openai_error("no", code=code, param="tools[0]"))
    answer = client.chat()
    assert (answer.status_code, error(answer)["code"]) == expected
    assert error(answer)["param"] == "tools[0]"
    assert answer.headers["x-llm-cache"] == "miss"
    # And it is not kept (C95).
    assert client.chat().status_code == 200
    assert upstream.count == 2


def test_r60_no_error_tells_what_is_behind(served, upstream):
    gone = FakeUpstream().start()
    gone.stop()
    client = served(
        models=[
            serving.model("m", upstream, identity="deployment-id-1"),
            serving.model("gone", gone, identity="deployment-id-2"),
            serving.model("busy", upstream, identity="deployment-id-3", rpm=1),
        ],
        router={"cooldown_time": 0},
    )
    key, port = serving.UPSTREAM_KEY, upstream.url.split(":")[2].partition("/")[0]
    page = f"<html>nginx at {upstream.url}</html>"
    failures = [
        (401, {}, openai_error(f"Incorrect API key provided: {key}. See {upstream.url}/keys")),
        (500, {"content-type": "text/html"}, page),
        (502, {}, f"bad gateway {upstream.url} {key}"),
        (500, {}, openai_error("boom", deployment="deployment-id-1", api_base=upstream.url)),
        (200, {"content-type": "text/html"}, page),
        (307, {"location": f"{upstream.url}/elsewhere?key={key}"}, ""),
    ]
    answers = []
    for status, headers, body in failures:
        upstream.fail_next(status, headers=headers, body=body)
        answers.append(client.chat())
    upstream.hold()
    answers.append(client.chat(timeout=0.05))
    upstream.release()
    answers += [client.chat(model="gone"), client.chat(model="unknown")]
    assert client.chat(model="busy").status_code == 200
    answers.append(client.chat(model="busy", seed=2))
    answers.append(client.chat(fallbacks=5))
    statuses = [answer.status_code for answer in answers]
    assert statuses == [401, 500, 502, 500, 500, 502, 504, 502, 404, 429, 400], statuses
    for answer in answers:
        error(answer)
        said = answer.text + " ".join(answer.headers.values())
        for secret in (key, "deployment-id", port, "127.0.0.1", "http://", "Traceback", "-up"):
            assert secret not in said, (secret, said)


# What a request says of its way -------------------------------------------------------------------


def test_a_deadline_in_the_body(served, upstream):
    client = served()
    upstream.hold()
    assert refused(client.chat(timeout=0.1)) == (504, "timeout", None)
    upstream.release()
    assert serving.in_flight(client.core) == 0
    assert refused(client.chat(timeout=0)) == (400, "invalid_request", "timeout")
    assert client.chat(timeout=30).status_code == 200
    assert "timeout" not in upstream.calls[-1].json


def test_a_deadline_of_the_router(served, upstream):
    client = served(router={"timeout": 0.1})
    upstream.hold()
    assert refused(client.chat()) == (504, "timeout", None)


def test_retries_in_the_body(served, upstream):
    client = served(router={"num_retries": 1})
    upstream.fail_next(500, n=2)
    assert refused(client.chat(num_retries=0)) == (500, "upstream_error", None)
    assert upstream.count == 1
    again = client.chat(num_retries=1)
    assert (again.status_code, again.headers["x-llm-attempts"]) == (200, "2")
    assert "num_retries" not in upstream.calls[-1].json
    assert refused(client.chat(num_retries=-1)) == (400, "invalid_request", "num_retries")


def test_r47_fallbacks_in_the_body(served, upstream):
    client = served()
    upstream.fail_next(500)
    answer = client.chat(fallbacks=[SLASHES])
    assert answer.status_code == 200
    told = {name: value for name, value in answer.headers.items() if name.startswith("x-llm-")}
    del told["x-llm-cache-key"]
    assert told == {
        "x-llm-cache": "miss",
        "x-llm-model": SLASHES,
        "x-llm-deployment": "org-deep-m-1",
        "x-llm-attempts": "2",
        "x-llm-fallback": "true",
    }
    assert [call.json["model"] for call in upstream.calls] == ["m-up", f"{SLASHES}-up"]
    assert "fallbacks" not in upstream.calls[0].json
    upstream.fail_next(500)
    assert client.chat("more", fallbacks=["unknown"]).status_code == 500
