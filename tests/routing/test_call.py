"""`Router.call`: a client's request as it came, and what it may not say; `Router(http=...)`."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llm_middleware import CacheManager
from llm_middleware.caching.multipart import form_parts
from llm_middleware.errors import (
    BadRequestError,
    ConfigError,
    DeadlineError,
    InvalidRequestError,
    LLMMiddlewareError,
    ModelNotFoundError,
    UpstreamConnectionError,
    UpstreamServerError,
)
from llm_middleware.providers.target import CONNECTION
from llm_middleware.routing.router import Router
from llm_middleware.testing import FakeUpstream
from tests.services import HOST, certificates

ASK = [{"role": "user", "content": "Who is there?"}]
CHAT: dict[str, Any] = {"model": "m", "messages": ASK}
FORM = "multipart/form-data; boundary=B"


class Face:
    """`call` or `acall`; a stream is read to its end, to its bytes."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._loop = loop

    def __call__(self, router: Router, kind: str, body: object, **options: Any) -> Any:
        if self._loop is None:
            return router.call(kind, body, **options)
        return self._loop.run_until_complete(router.acall(kind, body, **options))

    def chat(self, router: Router, **changes: Any) -> Any:
        return self(router, "chat", json.dumps({**CHAT, **changes}).encode())

    def events(self, stream: Any) -> bytes:
        if self._loop is None:
            return b"".join(stream.events)

        async def read() -> bytes:
            return b"".join([event async for event in stream.events])

        return self._loop.run_until_complete(read())


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    if request.param == "sync":
        yield Face(None)
        return
    loop = asyncio.new_event_loop()
    yield Face(loop)
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture
def upstreams() -> Iterator[Callable[[], FakeUpstream]]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(FakeUpstream())


@pytest.fixture
def up(upstreams: Callable[[], FakeUpstream]) -> FakeUpstream:
    return upstreams()


def row(base: str, name: str = "m") -> dict[str, Any]:
    return {
        "model_name": name,
        "litellm_params": {"model": "openai/gpt-4o-mini", "api_key": "sk-a", "api_base": base},
    }


def router(*ups: FakeUpstream, **settings: Any) -> Router:
    """A group for each: ``m``, ``b`` ..."""
    rows = [row(each.url, name) for each, name in zip(ups, "mbcd", strict=False)]
    return Router(rows, **{"num_retries": 0, "cooldown_time": 0, **settings})


def form(*parts: tuple[str, bytes] | tuple[str, bytes, str]) -> bytes:
    """Fields, (name, value), and files, (name, content, the rest of the head)."""
    made = b""
    for name, content, *rest in parts:
        head = f'Content-Disposition: form-data; name="{name}"' + "".join(rest)
        made += b"--B\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n"
    return made + b"--B--\r\n"


AUDIO = ("file", b"RIFF\x00\xff", '; filename="one.flac"\r\nContent-Type: audio/x-flac')


# -- requests of every kind

BODIES: dict[str, dict[str, Any]] = {
    "chat": {"messages": ASK},
    "text": {"prompt": "Say so"},
    "embedding": {"input": ["a"]},
    "responses": {"input": "Say so"},
}
PATHS = {
    "chat": "/v1/chat/completions",
    "text": "/v1/completions",
    "embedding": "/v1/embeddings",
    "responses": "/v1/responses",
}
OTHERS = {"user": "é", "seed": 2**60, "own": {"deep": [None, True, 0.5]}, "extra": None}


@pytest.mark.parametrize("mapping", [False, True], ids=["bytes", "mapping"])
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("kind", BODIES)
def test_a_body_goes_upstream_as_it_is(
    face: Face, up: FakeUpstream, kind: str, cached: bool, mapping: bool
) -> None:
    body = {"model": "m", **BODIES[kind], **OTHERS, "cache": {"ttl": 60}}
    before = json.dumps(body)
    made = router(up, cache=CacheManager() if cached else None)
    answer = face(made, kind, body if mapping else before.encode(), content_type="text/plain")
    (call,) = up.calls
    assert call.path == PATHS[kind]
    assert call.json == {"model": "gpt-4o-mini", **BODIES[kind], **OTHERS}
    assert json.dumps(body) == before
    assert answer["object"] == json.loads(answer.raw)["object"]
    assert (answer.route.asked, answer.route.model) == ("m", "m")


@pytest.mark.parametrize("name", ["acompletion", "completion", "chat"])
def test_litellms_names_of_kinds_will_do(face: Face, up: FakeUpstream, name: str) -> None:
    assert face(router(up), name, json.dumps(CHAT).encode()).object == "chat.completion"


def test_an_answer_is_kept_byte_for_byte(face: Face, up: FakeUpstream) -> None:
    choice = '{"index": 0, "finish_reason":"stop", "message": {"role":"assistant","content":"\\u00e9 é"}}'
    odd = (
        f' {{"object":\t"chat.completion", "n": 1.50, "choices": [{choice}], "id":"x", "id":"y"}}\n'.encode()
    )
    up.fail_next(200, body=odd)
    made = router(up, cache=CacheManager())
    first, second = face.chat(made), face.chat(made)
    assert (first.raw, second.raw) == (odd, odd)
    assert (first.cache.status, second.cache.status, up.count) == ("miss", "hit", 1)
    assert second.choices[0].message.content == "é é"


@pytest.mark.parametrize("kind", ["chat", "text", "responses"])
def test_a_stream_is_kept_byte_for_byte(face: Face, up: FakeUpstream, kind: str) -> None:
    made = router(up, cache=CacheManager())
    body = json.dumps({"model": "m", **BODIES[kind], "stream": True}).encode()
    first = face(made, kind, body)
    data = face.events(first)
    second = face(made, kind, body)
    assert (face.events(second), second.cache.status, up.count) == (data, "hit", 1)
    assert data.count(b"\n\n") > 8
    assert up.calls[0].json["stream"] is True


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_a_form_goes_upstream_as_it_came(face: Face, up: FakeUpstream, cached: bool) -> None:
    body = form(
        ("model", b"m"),
        ("language", "dé".encode()),
        ("timestamp_granularities[]", b"word"),
        ("timestamp_granularities[]", b"segment"),
        ("temperature", b"0.5"),
        ("own", b"5"),
        ("one[]", b"1"),
        AUDIO,
    )
    made = router(up, cache=CacheManager() if cached else None)
    answers = [face(made, "transcription", body, content_type=FORM) for _ in range(2)]
    assert [answer.raw for answer in answers] == [answers[0].raw] * 2 if cached else True
    assert up.count == (1 if cached else 2)
    call = up.calls[0]
    assert call.path == "/v1/audio/transcriptions"
    got = form_parts(call.body, call.headers["content-type"])
    assert sorted((part.name, part.content) for part in got) == sorted(
        [
            ("model", b"gpt-4o-mini"),
            ("language", "dé".encode()),
            ("timestamp_granularities[]", b"word"),
            ("timestamp_granularities[]", b"segment"),
            ("temperature", b"0.5"),
            ("own", b"5"),
            ("one[]", b"1"),
            ("file", b"RIFF\x00\xff"),
        ]
    )
    granularities = [part.content for part in got if part.name == "timestamp_granularities[]"]
    assert granularities == [b"word", b"segment"]
    (file,) = [part for part in got if part.name == "file"]
    assert (file.filename, file.content_type) == ("one.flac", "audio/x-flac")


def test_a_file_without_a_type_is_told_by_its_name(face: Face, up: FakeUpstream) -> None:
    file = ("file", b"ID3", '; filename="one.mp3"')
    face(router(up), "transcription", form(("model", b"m"), file), content_type=FORM)
    call = up.calls[0]
    (part,) = [part for part in form_parts(call.body, call.headers["content-type"]) if part.name == "file"]
    assert (part.filename, part.content_type) == ("one.mp3", "audio/mpeg")


def test_a_transcription_may_stream(face: Face, up: FakeUpstream) -> None:
    for said, streamed in ((b"true", True), (b"True", True), (b"false", False)):
        body = form(("model", b"m"), AUDIO, ("stream", said))
        answer = face(router(up), "transcription", body, content_type=FORM)
        if streamed:
            assert b"transcript.text.done" in face.events(answer)
        else:
            assert answer.text.startswith("You said")


def test_a_transcription_may_be_a_mapping(face: Face, up: FakeUpstream) -> None:
    body = {"model": "m", "file": ("a.wav", b"RIFF")}
    assert face(router(up), "transcription", body).text.startswith("You said")


# -- what is no request


@pytest.mark.parametrize(
    ("kind", "body", "content_type", "param"),
    [
        ("messages", b"{}", "", "kind"),
        ("json", b"{}", "", "kind"),
        ("chats", b"{}", "", "kind"),
        (["chat"], b"{}", "", "kind"),
        ("chat", b"", "", None),
        ("chat", b"{", "", None),
        ("chat", b'{"model": "m", "n": NaN}', "", None),
        ("chat", b'"m"', "", None),
        ("chat", b"[]", "", None),
        ("chat", b"\xff{}", "", None),
        ("chat", '{"model": "m"}'.encode("utf-16"), "", None),
        ("chat", b'{"model": "m", "x": ' + b"[" * 200 + b"]" * 200 + b"}", "", None),
        ("chat", b'{"model": "m", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "", None),
        ("chat", bytearray(b"{}"), "", None),
        ("chat", b"{}", "", "model"),
        ("chat", b'{"model": ""}', "", "model"),
        ("chat", b'{"model": null}', "", "model"),
        ("chat", b'{"model": ["m"]}', "", "model"),
        ("chat", b'{"model": "m", "stream": 1}', "", "stream"),
        ("chat", b'{"model": "m", "stream": "true"}', "", "stream"),
        ("embedding", b'{"model": "m", "input": "a", "stream": true}', "", "stream"),
        ("transcription", b'{"model": "m"}', "", None),
        ("transcription", form(("model", b"m"), AUDIO), "", None),
        ("transcription", form(("model", b"m"), AUDIO)[:-9], FORM, None),
        ("transcription", form(AUDIO), FORM, "model"),
        ("transcription", form(("model[]", b"m"), AUDIO), FORM, "model"),
        ("transcription", form(("model", b"m"), ("a", b"1"), ("a[]", b"2"), AUDIO), FORM, "a"),
        ("transcription", form(("model", b"m"), ("a", b"1"), ("a", b"2"), AUDIO), FORM, "a"),
        ("transcription", form(("model", b"m"), AUDIO, AUDIO), FORM, "file"),
        ("transcription", form(("model", b"m"), ("prompt", b"x", '; filename="x"'), AUDIO), FORM, "prompt"),
        ("transcription", form(("model", b"m"), AUDIO, ("stream", b"yes")), FORM, "stream"),
    ],
)
def test_what_is_no_request_is_refused(
    face: Face, up: FakeUpstream, kind: Any, body: Any, content_type: str, param: str | None
) -> None:
    made = router(up, cache=CacheManager())
    with pytest.raises(InvalidRequestError) as caught:
        face(made, kind, body, content_type=content_type)
    assert (caught.value.param, caught.value.status, up.count) == (param, 400, 0)


@pytest.mark.parametrize("levels", [90, 110])
def test_bodies_may_be_as_deep_as_tools_are(face: Face, up: FakeUpstream, levels: int) -> None:
    value: object = 1
    for level in range(levels):
        value = {"properties": value} if level % 2 else [value]
    made = router(up)
    for body in (json.dumps({**CHAT, "x": value}).encode(), {**CHAT, "x": value}):
        if levels > 100:
            with pytest.raises(InvalidRequestError, match="nested deeper than 100"):
                face(made, "chat", body)
        else:
            face(made, "chat", body)
            assert up.calls[-1].json["x"] == value


def test_r49_an_unknown_model_is_not_found(face: Face, up: FakeUpstream) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        face.chat(router(up), model="n")
    assert (caught.value.status, caught.value.code, up.count) == (404, "model_not_found", 0)


def test_a_file_that_is_none_is_the_callers_mistake(face: Face, up: FakeUpstream) -> None:
    made = router(up)
    for body, content_type in (
        (form(("model", b"m")), FORM),
        (form(("model", b"m"), ("file", b"text")), FORM),
        (b'{"model": "m", "file": ["/etc/passwd", "/etc/passwd"]}', "application/json; charset=utf-8"),
    ):
        with pytest.raises(BadRequestError) as caught:
            face(made, "transcription", body, content_type=content_type)
        assert (caught.value.param, caught.value.status, up.count) == ("file", 400, 0)


# -- what a client may say of the way, and what not

REFUSED = sorted(
    (CONNECTION | {"scope", "controls", "caching", "may_use", "on_stream_error"}) - {"num_retries", "timeout"}
)


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_goes_and_as_whom_is_not_a_clients_to_say(face: Face, up: FakeUpstream, name: str) -> None:
    made = router(up, cache=CacheManager())
    for value in ("https://elsewhere.invalid", {"authorization": "x"}, None, True):
        for body in (json.dumps({**CHAT, name: value}).encode(), {**CHAT, name: value}):
            with pytest.raises(InvalidRequestError) as caught:
                face(made, "chat", body)
            assert (caught.value.param, caught.value.status) == (name, 400)
            assert "elsewhere" not in str(caught.value)
    for field in (name, f"{name}[]"):
        body = form(("model", b"m"), AUDIO, (field, b"x"))
        with pytest.raises(InvalidRequestError) as caught:
            face(made, "transcription", body, content_type=FORM)
        assert caught.value.param == name
    assert up.count == 0


def test_the_host_may_say_it(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up, theirs = upstreams(), upstreams()
    face(router(up), "chat", json.dumps(CHAT).encode(), api_base=theirs.url, api_key="sk-theirs")
    assert (up.count, theirs.count) == (0, 1)
    assert theirs.calls[0].headers["authorization"] == "Bearer sk-theirs"


def test_r40_a_clients_timeout_holds(face: Face, up: FakeUpstream) -> None:
    up.hold()
    with pytest.raises(DeadlineError):
        face.chat(router(up), timeout=0.2)
    body = form(("model", b"m"), AUDIO, ("timeout", b"0.2"))
    with pytest.raises(DeadlineError):
        face(router(up), "transcription", body, content_type=FORM)
    assert up.count == 2
    assert all("timeout" not in call.json for call in up.calls)


def test_a_clients_retries_hold(face: Face, up: FakeUpstream) -> None:
    up.fail_next(500, n=9)
    made = router(up, num_retries=1)
    for body, content_type, calls in (
        (json.dumps({**CHAT, "num_retries": 3}).encode(), "", 4),
        (json.dumps({**CHAT, "num_retries": 0}).encode(), "", 1),
        (json.dumps({**CHAT, "num_retries": None}).encode(), "", 2),
        (form(("model", b"m"), AUDIO, ("num_retries", b"1")), FORM, 2),
    ):
        before = up.count
        with pytest.raises(UpstreamServerError):
            face(made, "transcription" if content_type else "chat", body, content_type=content_type)
        assert up.count - before == calls
    assert all("num_retries" not in call.json for call in up.calls)


def test_a_clients_fallbacks_hold(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up, other = upstreams(), upstreams()
    up.fail_next(500, n=9)
    made = router(up, other)
    for fallbacks in (["b"], "b", [{"m": ["b"]}]):
        answer = face.chat(made, fallbacks=fallbacks)
        assert (answer.route.model, answer.route.fallback) == ("b", True)
    body = form(("model", b"m"), AUDIO, ("fallbacks[]", b"nowhere"), ("fallbacks[]", b"b"))
    assert face(made, "transcription", body, content_type=FORM).route.model == "b"
    assert all("fallbacks" not in call.json for call in other.calls)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout", 0),
        ("timeout", -1),
        ("timeout", True),
        ("timeout", "5"),
        pytest.param("timeout", 10**400, id="timeout-huge"),
        ("timeout", [5]),
        ("num_retries", -1),
        ("num_retries", 1.0),
        ("num_retries", False),
        ("num_retries", "1"),
        pytest.param("num_retries", 10**400, id="num_retries-huge"),
        ("fallbacks", 3),
        ("fallbacks", [3]),
        ("fallbacks", {"m": ["b"]}),
        ("fallbacks", ""),
        ("fallbacks", [{"m": "b"}, 3]),
    ],
)
def test_what_a_client_says_wrong_is_refused(face: Face, up: FakeUpstream, name: str, value: object) -> None:
    for made in (router(up), router(up, cache=CacheManager())):
        with pytest.raises(InvalidRequestError) as caught:
            face.chat(made, **{name: value})
        assert (caught.value.param, up.count) == (name, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("scope", 5), ("controls", []), ("caching", "no"), ("may_use", "m"), ("on_stream_error", "x")],
)
def test_what_the_host_says_wrong_is_refused(face: Face, up: FakeUpstream, name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        face(router(up), "chat", json.dumps(CHAT).encode(), **{name: value})
    assert (caught.value.param, up.count) == (name, 0)


def test_the_hosts_word_goes_before_the_clients(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up, other, third = upstreams(), upstreams(), upstreams()
    made = router(up, other, third)
    body = json.dumps({**CHAT, "timeout": 3600, "num_retries": 3, "fallbacks": ["c"]}).encode()
    up.fail_next(500, n=9)
    answer = face(made, "chat", body, num_retries=1, fallbacks=["b"])
    assert (answer.route.model, up.count, third.count) == ("b", 2, 0)
    other.hold()
    with pytest.raises(DeadlineError):
        face(made, "chat", json.dumps({**CHAT, "model": "b", "timeout": 3600}).encode(), timeout=0.2)
    assert other.count == 2


def test_another_model_of_the_hosts_is_the_one_that_is_asked_and_kept(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up, other = upstreams(), upstreams()
    made = router(up, other, cache=CacheManager())
    assert face(made, "chat", json.dumps(CHAT).encode(), model="b").route.model == "b"
    assert (up.count, other.count) == (0, 1)
    assert face.chat(made).cache.status == "miss"
    assert face.chat(made, model="b").cache.status == "hit"


def test_r50_a_group_that_the_client_may_not_use_is_no_fallback(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up, other, third = upstreams(), upstreams(), upstreams()
    up.fail_next(500, n=2)
    made = router(up, other, third, fallbacks=[{"m": ["b"]}])
    asked: list[str] = []

    def may_use(group: str) -> bool:
        asked.append(group)
        return group == "c"

    with pytest.raises(UpstreamServerError):
        face(made, "chat", json.dumps(CHAT).encode(), may_use=may_use)
    body = json.dumps({**CHAT, "fallbacks": ["b", "c"]}).encode()
    assert face(made, "chat", body, may_use=may_use).route.model == "c"
    assert (asked, other.count, third.count) == (["b", "b", "c"], 0, 1)


# -- the cache


def test_a_scope_has_answers_of_its_own(face: Face, up: FakeUpstream) -> None:
    made = router(up, cache=CacheManager())
    body = json.dumps(CHAT).encode()
    seen = [face(made, "chat", body, scope=scope).cache.status for scope in ("a", "b", "a", "b", "")]
    assert (seen, up.count) == (["miss", "miss", "hit", "hit", "miss"], 3)
    assert face(made, "chat", body).cache.status == "hit"


def test_controls_go_before_the_clients_word(face: Face, up: FakeUpstream) -> None:
    made = router(up, cache=CacheManager())

    def status(controls: dict[str, Any] | None = None, **changes: Any) -> str:
        body = json.dumps({**CHAT, **changes}).encode()
        status: str = face(made, "chat", body, controls=controls).cache.status
        return status

    assert [status({"no-store": True}), status(), status()] == ["miss", "miss", "hit"]
    assert [status({"no-cache": True}), up.count] == ["miss", 3]
    assert [status({"no-cache": False}, cache={"no-cache": True}), up.count] == ["hit", 3]
    with pytest.raises(InvalidRequestError):
        status({"no-cash": True})


def test_a_clients_cache_field_works_and_is_not_sent(face: Face, up: FakeUpstream) -> None:
    made = router(up, cache=CacheManager())
    for cache, status in (
        ({"no-store": True}, "miss"),
        ({"ttl": 60}, "miss"),
        ({}, "hit"),
        ({"no-cache": True}, "miss"),
        ({"namespace": "own"}, "miss"),
        ({"namespace": "own"}, "hit"),
    ):
        assert face.chat(made, cache=cache).cache.status == status
    assert all("cache" not in call.json for call in up.calls)
    before = up.count
    with pytest.raises(InvalidRequestError) as caught:
        face.chat(made, cache={"no-cash": True})
    assert (caught.value.param, up.count) == ("cache.no-cash", before)
    face(made, "chat", json.dumps(CHAT).encode(), caching=False)
    assert up.count == before + 1


# -- how providers are reached

ANSWER = json.dumps(
    {
        "id": "c",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
    }
).encode()
EVENTS = (
    b'data: {"choices": [{"index": 0, "delta": {"content": "ok"}, "finish_reason": "stop"}]}\n\n'
    b"data: [DONE]\n\n"
)


class Server:
    """Answers everything with the same; a proxy, for who takes it for one. ``lines``: the requests' first."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.lines: list[str] = []
        self.headers: list[dict[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

            def do_POST(self) -> None:
                server.lines.append(self.requestline)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                body = self.rfile.read(int(self.headers["content-length"]))
                plain = b"form-data" in body or json.loads(body).get("stream") is not True
                answer = ANSWER if plain else EVENTS
                self.send_response(200)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_calls_go_through_a_proxy(face: Face) -> None:
    with Server() as proxy:
        made = Router(
            [row("http://provider.invalid/v1")], http={"proxy": f"http://me:secret@{HOST}:{proxy.port}"}
        )
        assert face.chat(made).choices[0].message.content == "ok"
        assert proxy.lines == ["POST http://provider.invalid/v1/chat/completions HTTP/1.1"]
        assert proxy.headers[0]["proxy-authorization"] == "Basic bWU6c2VjcmV0"
        assert "secret" not in repr(made._http)


@pytest.mark.parametrize("verify", [True, False, "authority"])
def test_certificates_are_trusted_as_is_said(face: Face, tmp_path: Path, verify: Any) -> None:
    made_of = certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made_of.certificate, made_of.key)
    with Server(context) as server:
        settings = {"verify": made_of.authority if verify == "authority" else verify, "trust_env": False}
        made = Router([row(f"https://{HOST}:{server.port}/v1")], http=settings, num_retries=0)
        if verify is True:
            with pytest.raises(UpstreamConnectionError):
                face.chat(made)
            assert server.lines == []
        else:
            assert face.chat(made).choices[0].message.content == "ok"


@pytest.mark.parametrize(
    ("http", "param", "match"),
    [
        ({"proxi": "http://x"}, "http.proxi", r"^http: unknown setting 'proxi'; did you mean 'proxy'\?"),
        ({5: 1}, "http.5", "^http: unknown setting 5"),
        ({"proxy": "127.0.0.1:3128"}, "http.proxy", r"^http\.proxy: expected the URL"),
        ({"proxy": "ftp://me:secret@x"}, "http.proxy", r"^http\.proxy: expected the URL"),
        ({"verify": "/no/such/file"}, "http.verify", r"^http\.verify: expected True, False, a file"),
        ({"max_connections": 0}, "http.max_connections", r"^http\.max_connections: expected a whole number"),
        ({"http2": "yes"}, "http.http2", r"^http\.http2: expected True or False"),
        ("proxy", "http", "^http: expected a mapping, not str"),
        ([("proxy", "http://x")], "http", "^http: expected a mapping, not list"),
    ],
)
def test_wrong_settings_of_http_are_named(http: Any, param: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        Router([row("http://x/v1")], http=http)
    assert caught.value.param == param
    assert "secret" not in str(caught.value)


# -- odd bodies

TEXTS = ["", "m", "b", "true", "5", "\x00", "\u2028", "é", "😀", "\ud800", "x" * 300, "nan", "[]", "*", "m/x"]
NUMBERS = [0, 1, -1, 1.5, -0.0, 1e22, 1e308, 5e-324, 2**53 + 1, -(2**63), 10**40, 10**400, float("nan")]
NAMES = [
    *["model", "messages", "prompt", "input", "file", "stream", "stream_options", "n", "max_tokens", "tools"],
    *["cache", "metadata", "timeout", "num_retries", "fallbacks", "response_format", "logprobs", "user"],
    *["encoding_format", "temperature", "role", "content", "tags", "no-cache", "ttl", "namespace", "*", ""],
]
KINDS = ["chat", "text", "embedding", "responses", "transcription"]


class Odd:
    """Bodies that no client should send, from seeded dice."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def value(self, levels: int) -> object:
        pick = self.dice.choice
        shape = self.dice.random()
        if levels and shape < 0.25:
            return [self.value(levels - 1) for _ in range(self.dice.randrange(4))]
        if levels and shape < 0.5:
            return {pick(NAMES): self.value(levels - 1) for _ in range(self.dice.randrange(4))}
        if shape < 0.52:
            return self.deep(self.dice.choice([50, 95, 101, 300, 900]))
        return pick([pick(TEXTS), pick(NUMBERS), True, False, None])

    def deep(self, levels: int) -> object:
        value: object = self.dice.choice(TEXTS)
        for _ in range(levels):
            value = [value] if self.dice.random() < 0.5 else {"content": value}
        return value

    def fields(self, kind: str) -> dict[str, Any]:
        made: dict[str, Any] = {"model": "m", **BODIES.get(kind, {"file": ("a.wav", b"RIFF")})}
        for _ in range(self.dice.randrange(4)):
            made[self.dice.choice(NAMES)] = self.value(3)
        if self.dice.random() < 0.2:
            made["stream"] = kind in ("chat", "text", "responses")
        return made

    def body(self, kind: str) -> tuple[object, str]:
        made, shape = self.fields(kind), self.dice.random()
        if shape < 0.15:
            return made, ""
        if shape < 0.2:
            return self.value(3), ""
        if kind == "transcription" and shape < 0.7:
            return self.form(made), self.dice.choice([FORM, FORM, FORM, "multipart/form-data", "text/plain"])
        made.pop("file", None)
        data = json.dumps(made, ensure_ascii=self.dice.random() < 0.5).encode("utf-8", "surrogatepass")
        return self.spoiled(data) if shape < 0.35 else data, "application/json"

    def form(self, made: dict[str, Any]) -> bytes:
        parts: list[Any] = [AUDIO] * self.dice.choice([0, 1, 1, 1, 2])
        for name, value in made.items():
            if name != "file":
                text = value if isinstance(value, str) else json.dumps(value)
                name += "[]" * (self.dice.random() < 0.2)
                parts += [(name, text.encode("utf-8", "surrogatepass"))] * self.dice.choice([1, 1, 1, 2])
        data = form(*parts)
        return self.spoiled(data) if self.dice.random() < 0.2 else data

    def spoiled(self, data: bytes) -> bytes:
        at = self.dice.randrange(len(data) + 1)
        return data[:at] + self.dice.randbytes(self.dice.randrange(4)) + data[at + self.dice.randrange(9) :]


@pytest.mark.parametrize("seed", range(5))
def test_odd_bodies_raise_nothing_but_errors_of_ours(face: Face, seed: int) -> None:
    odd = Odd(seed)
    answered, errors = 0, []
    with Server() as server:
        rows = [row(f"http://{HOST}:{server.port}/v1", name) for name in "mb"]
        made = Router(rows, cooldown_time=0, cache=CacheManager(), enable_tag_filtering=seed % 2 == 0)
        for _ in range(500):
            kind = odd.dice.choice(KINDS)
            body, content_type = odd.body(kind)
            try:
                answer = face(made, kind, body, content_type=content_type)
                if hasattr(answer, "events"):
                    face.events(answer)
                answered += 1
            except LLMMiddlewareError as exc:
                errors.append(exc)
        assert not any(made._routing.state.of(each).in_flight for each in made.deployments)
    assert all(json.loads(error.body())["error"]["message"] for error in errors)
    assert {error.status for error in errors} <= {400, 404, 502, 504}
    assert min(answered, len(errors)) > 50
