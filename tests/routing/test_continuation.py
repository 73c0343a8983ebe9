"""Streams that break in the midst of their text, and another deployment that goes on with them."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_middleware import CacheManager
from llm_middleware._drive import run_sync
from llm_middleware.caching.sse import parse_events
from llm_middleware.errors import DeadlineError, ProviderError, UpstreamConnectionError, UpstreamServerError
from llm_middleware.routing.continuation import Continued, continuable
from llm_middleware.routing.router import Router
from llm_middleware.testing import FakeClock, FakeUpstream
from tests.services import HOST, PATIENCE, FaultProxy, wait_for

ASK = [{"role": "user", "content": "Count to six."}]
DONE = b"data: [DONE]\n\n"
FOREVER: dict[str, Any] = {"allowed_fails": 0, "cooldown_time": 3600}


# -- what upstreams say


def piece(name: str, delta: Mapping[str, object], finish: str | None = None, **more: object) -> bytes:
    """An event of the stream ``name``."""
    choice = {"index": 0, "delta": dict(delta), "finish_reason": finish, **more}
    head = {"id": f"id-{name}", "object": "chat.completion.chunk", "created": len(name), "model": f"m-{name}"}
    return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"


def words(name: str, *texts: str) -> bytes:
    """The beginning of the stream ``name``: the role, then the texts."""
    return piece(name, {"role": "assistant", "content": ""}) + b"".join(
        piece(name, {"content": text}) for text in texts
    )


def end(name: str) -> bytes:
    return piece(name, {}, "stop") + DONE


ERROR = b'data: {"error": {"message": "broke", "type": "server_error", "code": null}}\n\n'


class Script:
    """An upstream that answers each call with the next thing it is told to `say`; else it fails the call."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.when_asked: Callable[[], object] = lambda: None
        self._cut = threading.Event()
        self._lines: deque[tuple[bytes, str, bytes]] = deque()
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

            def do_POST(self) -> None:
                script.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                script.when_asked()
                with suppress(ConnectionError):
                    script._answer(self)

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://{HOST}:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Script:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._cut.set()
        self._server.shutdown()
        self._server.server_close()

    def say(self, data: bytes, then: str = "end", last: bytes = b"") -> Script:
        """``then``: ``end``; ``cut`` the connection, when `cut` was called; ``hold`` until the client has
        gone. ``last``: what is said when `cut` was called, instead of that."""
        self._lines.append((data, then, last))
        return self

    def cut(self) -> None:
        """Break the connection of the stream that waits for it."""
        self._cut.set()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        data, then, last = self._lines.popleft() if self._lines else (b"", "fail", b"")
        if then == "fail":
            handler.send_response(500)
            handler.send_header("content-length", "0")
            handler.end_headers()
            return
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        if data:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        handler.close_connection = then != "end"
        if then == "end":
            handler.wfile.write(b"0\r\n\r\n")
        elif then == "cut":
            assert self._cut.wait(PATIENCE)
            self._cut.clear()
            if last:
                handler.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(last), last))
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            handler.connection.settimeout(PATIENCE)
            while handler.connection.recv(65536):
                pass
            self.left.set()


# -- who reads


class Face:
    """Streams of a Router as bytes, on the sync or on the async face."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self.reading: Iterator[bytes] = iter(())

    def open(self, router: Router, name: str = "completion", content: object = ASK, **options: object) -> Any:
        if self.loop is None:
            return getattr(router, name)("m", content, stream=True, **options)
        work = getattr(router, f"a{name}")("m", content, stream=True, **options)
        return self.loop.run_until_complete(work)

    def read(
        self, stream: Any, at: Mapping[str, Callable[[], object]] | None = None, until: str | None = None
    ) -> tuple[bytes, Exception | None]:
        """The bytes, up to those with ``until`` in them, and what was raised after them. ``at``: what to do
        as soon as a text has come."""
        got, waiting = b"", dict(at or {})

        def took(data: bytes) -> bool:
            nonlocal got
            got += data
            for text in [text for text in waiting if text.encode() in got]:
                waiting.pop(text)()
            return until is not None and until.encode() in got

        async def read() -> None:
            async for data in stream.events:
                if took(data):
                    return

        try:
            if self.loop is None:
                self.reading = iter(stream.events)  # kept: one that is dropped is closed
                any(took(data) for data in self.reading)
            else:
                self.loop.run_until_complete(read())
        except ProviderError as exc:
            return got, exc
        return got, None

    def close(self, stream: Any) -> None:
        if self.loop is None:
            stream.close()
        else:
            self.loop.run_until_complete(stream.aclose())

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for it, and let what runs beside the caller go on."""

        def happened() -> object:
            if self.loop is not None:
                self.loop.run_until_complete(asyncio.sleep(0))
            return condition()

        wait_for(happened, what)

    def idle(self, router: Router) -> None:
        """Wait until no call is in flight."""
        states = [router._routing.state.of(each) for each in router.deployments]
        self.until(lambda: not any(state.in_flight for state in states), "the calls to be over")


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
def scripts() -> Iterator[list[Script]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Script()) for _ in range(3)]


def row(up: Any, order: int, group: str = "m") -> dict[str, Any]:
    made = {"model": "openai/gpt-4o-mini", "api_key": "sk-a", "api_base": up.url, "order": order}
    return {"model_name": group, "litellm_params": made, "model_info": {"id": f"{group}{order}"}}


def router(*ups: Any, **settings: Any) -> Router:
    """One group, whose deployments are asked in their order."""
    rows = [row(up, order) for order, up in enumerate(ups, 1)]
    return Router(rows, random=Random(3), **{"on_stream_error": "continue", **settings})


def benched(made: Router) -> list[bool]:
    state, now = made._routing.state, made._routing.clock()
    return [state.of(each).health.admits(now) == "no" for each in made.deployments]


def text_of(events: bytes) -> str:
    chunks = [json.loads(event.data) for event in parse_events(events) if event.data != "[DONE]"]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def well_formed(events: bytes) -> list[dict[str, Any]]:
    """The chunks of one whole stream; what is wrong with it is an `AssertionError`."""
    *chunks, last = [event.data for event in parse_events(events)]
    read: list[dict[str, Any]] = [json.loads(chunk) for chunk in chunks]
    assert last == "[DONE]"
    for name in ("id", "created", "model", "object"):
        assert len({chunk[name] for chunk in read}) == 1
    choices = [choice for chunk in read for choice in chunk["choices"]]
    assert [choice["index"] for choice in choices] == [0] * len(choices)
    assert [choice["delta"]["role"] for choice in choices if "role" in choice["delta"]] == ["assistant"]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    return read


# -- another one goes on


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("of_the_call", [False, True], ids=["setting", "option"])
def test_r52_another_goes_on_and_the_reader_sees_one_stream(
    face: Face, scripts: list[Script], cached: bool, of_the_call: bool
) -> None:
    first, second, _ = scripts
    first.say(words("one", "One ", "twö ", "thr"), "cut")
    second.say(words("second", "ee ", "four") + end("second"))
    settings = {"on_stream_error": "error"} if of_the_call else {}
    options = {"on_stream_error": "continue"} if of_the_call else {}
    made = router(first, second, cache=CacheManager() if cached else None, **FOREVER, **settings)
    stream = face.open(made, max_tokens=100, max_completion_tokens=2, temperature=0, **options)
    data, error = face.read(stream, {"thr": first.cut})
    assert error is None
    seam = words("one", "One ", "twö ", "thr") + b"".join(
        # Compact, and in the first one's name.
        json_event({**json.loads(part[6:]), "id": "id-one", "created": 3, "model": "m-one"}, *order)
        for order in [("id", "created", "model", "object", "choices")]
        for part in [
            piece("second", {"content": ""}),
            piece("second", {"content": "ee "}),
            piece("second", {"content": "four"}),
            piece("second", {}, "stop"),
        ]
    )
    assert data == seam + DONE
    well_formed(data)
    # Asked with all that was said, and for less than that.
    (asked,) = second.asked
    *before, so_far, instruction = asked.pop("messages")
    assert (before, so_far) == (ASK, {"role": "assistant", "content": "One twö thr"})
    assert (instruction["role"], "Go on exactly where it stops" in instruction["content"]) == ("user", True)
    assert asked == {
        "model": "gpt-4o-mini",
        "stream": True,
        "max_tokens": 98,  # 11 characters less, four to a token
        "max_completion_tokens": 1,
        "temperature": 0,
    }
    assert first.asked[0]["messages"] == ASK
    # Told, penalised, and not kept.
    route = stream.route
    assert (route.attempts, route.deployment, route.model, route.fallback) == (2, "m2", "m", False)
    assert route.failures == [("m1", "connection_error")]
    assert benched(made) == [True, False]
    face.idle(made)
    second.say(words("third", "anew") + end("third"))
    again = face.open(made, max_tokens=100, max_completion_tokens=2, temperature=0, **options)
    assert text_of(face.read(again)[0]) == "anew"
    assert len(second.asked) == 2
    if cached:
        assert again.cache.status == "miss"
        kept = face.open(made, max_tokens=100, max_completion_tokens=2, temperature=0, **options)
        assert (kept.cache.status, text_of(face.read(kept)[0])) == ("hit", "anew")


def json_event(value: Mapping[str, object], *order: str) -> bytes:
    text = json.dumps({name: value[name] for name in order}, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("options", [{}, {"on_stream_error": "error"}], ids=["setting", "option"])
def test_r52_without_it_the_same_is_raised(
    face: Face, scripts: list[Script], cached: bool, options: dict[str, Any]
) -> None:
    first, second, _ = scripts
    first.say(words("one", "One "), "cut")
    setting = "continue" if options else "error"
    cache = CacheManager() if cached else None
    made = router(first, second, cache=cache, **FOREVER, on_stream_error=setting)
    data, error = face.read(face.open(made, **options), {"One": first.cut})
    assert (data, type(error)) == (words("one", "One "), UpstreamConnectionError)
    assert (second.asked, benched(made)) == ([], [True, False])
    face.idle(made)
    second.say(words("b", "anew") + end("b"))
    assert text_of(face.read(face.open(made, **options))[0]) == "anew"


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_r52_from_an_error_event_it_goes_on_too(face: Face, scripts: list[Script], cached: bool) -> None:
    first, second, _ = scripts
    first.say(words("one", "One "), "cut", ERROR)
    second.say(words("b", "two") + end("b"))
    made = router(first, second, cache=CacheManager() if cached else None, **FOREVER)
    stream = face.open(made)
    data, error = face.read(stream, {"One": first.cut})
    well_formed(data)
    assert (text_of(data), error) == ("One two", None)
    assert (stream.route.failures, benched(made)) == ([("m1", "upstream_error")], [True, False])


@pytest.mark.parametrize("mode", ["continue", "error"])
def test_what_comes_with_an_error_is_not_lost(face: Face, scripts: list[Script], mode: str) -> None:
    first, second, _ = scripts
    first.say(words("one", "One ", "two ") + ERROR)  # in one piece
    second.say(words("b", "three") + end("b"))
    data, error = face.read(face.open(router(first, second, on_stream_error=mode, **FOREVER)))
    assert text_of(data) == ("One two three" if mode == "continue" else "One two ")
    assert type(error) is (type(None) if mode == "continue" else UpstreamServerError)


def test_r52_a_group_that_stands_in_goes_on(face: Face, scripts: list[Script]) -> None:
    first, second, _ = scripts
    first.say(words("one", "One "), "cut")
    second.say(words("b", "two") + end("b"))
    made = Router(
        [row(first, 1), row(second, 1, "other")],
        fallbacks=[{"m": ["other"]}],
        on_stream_error="continue",
        num_retries=0,
        **FOREVER,
    )
    stream = face.open(made)
    data, error = face.read(stream, {"One": first.cut})
    well_formed(data)
    assert (text_of(data), error) == ("One two", None)
    route = stream.route
    assert (route.model, route.fallback, route.deployment, route.attempts) == ("other", True, "other1", 2)


def test_r50_r52_a_group_that_the_caller_may_not_use_does_not_go_on(
    face: Face, scripts: list[Script]
) -> None:
    first, second, _ = scripts
    first.say(words("one", "One "), "cut")
    made = Router(
        [row(first, 1), row(second, 1, "other")],
        fallbacks=[{"m": ["other"]}],
        on_stream_error="continue",
        **FOREVER,
    )
    stream = face.open(made, may_use=lambda group: group == "m")
    data, error = face.read(stream, {"One": first.cut})
    assert (data, type(error), second.asked) == (words("one", "One "), UpstreamConnectionError, [])


def test_r52_only_one_deployment_and_no_room_there(face: Face, scripts: list[Script]) -> None:
    first = scripts[0].say(words("one", "One "), "cut")
    stream = face.open(router(first, **FOREVER))
    data, error = face.read(stream, {"One": first.cut})
    assert (data, type(error), len(first.asked)) == (words("one", "One "), UpstreamConnectionError, 1)


def test_r52_the_first_error_is_raised_where_the_other_fails_too(face: Face, scripts: list[Script]) -> None:
    first, second, _ = scripts
    first.say(words("one", "One "), "cut")
    made = router(first, second, num_retries=0, **FOREVER)
    stream = face.open(made)
    data, error = face.read(stream, {"One": first.cut})
    assert (data, type(error), len(second.asked)) == (words("one", "One "), UpstreamConnectionError, 1)
    assert stream.route.failures == [("m1", "connection_error"), ("m2", "upstream_error")]
    face.idle(made)


# -- more than once


@pytest.mark.parametrize("settings", [FOREVER, {"cooldown_time": 0}], ids=["benched", "free"])
def test_r52_it_goes_on_a_second_time_with_all_that_was_said(
    face: Face, scripts: list[Script], settings: dict[str, Any]
) -> None:
    first, second, third = scripts
    first.say(words("one", "One "), "cut")
    second.say(words("b", "two "), "cut")
    third.say(words("c", "three") + end("c"))
    stream = face.open(router(first, second, third, **settings), max_tokens=9)
    data, error = face.read(stream, {"One": first.cut, "two": second.cut})
    well_formed(data)
    assert (text_of(data), error, stream.route.attempts) == ("One two three", None, 3)
    assert third.asked[0]["messages"][1] == {"role": "assistant", "content": "One two "}
    assert (len(third.asked[0]["messages"]), third.asked[0]["max_tokens"]) == (3, 7)


@pytest.mark.parametrize(("num_retries", "calls"), [(0, 2), (1, 2), (2, 3), (4, 5)])
def test_r52_it_goes_on_as_often_as_a_call_is_repeated(
    face: Face, scripts: list[Script], num_retries: int, calls: int
) -> None:
    only = scripts[0]
    for number in range(9):
        only.say(words("one", f"part {number} "), "cut")
    made = router(only, cooldown_time=0, num_retries=num_retries)
    data, error = face.read(face.open(made), {f"part {number}": only.cut for number in range(9)})
    assert text_of(data) == "".join(f"part {number} " for number in range(calls))
    assert (type(error), len(only.asked)) == (UpstreamConnectionError, calls)
    face.idle(made)


# -- the end


@pytest.mark.parametrize("broken", ["cut", "error"])
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_r52_a_stream_that_breaks_after_its_last_word_is_ended(
    face: Face, scripts: list[Script], cached: bool, broken: str
) -> None:
    first, second, _ = scripts
    whole = words("one", "One") + piece("one", {}, "stop")
    first.say(whole, "cut", ERROR if broken == "error" else b"")
    made = router(first, second, cache=CacheManager() if cached else None, **FOREVER)
    data, error = face.read(face.open(made), {'"stop"': first.cut})
    assert (data, error, second.asked) == (whole + DONE, None, [])
    assert benched(made) == [True, False]
    face.idle(made)
    second.say(words("b", "anew") + end("b"))  # it was not kept: usage may have come after that
    assert text_of(face.read(face.open(made))[0]) == "anew"


@pytest.mark.parametrize("whole", [words("one", "One") + end("one"), words("one", "One") + DONE])
def test_r52_a_stream_that_breaks_after_its_end_has_one_end(
    face: Face, scripts: list[Script], whole: bytes
) -> None:
    first = scripts[0]
    first.say(whole, "cut")
    assert face.read(face.open(router(first, **FOREVER)), {"[DONE]": first.cut}) == (whole, None)
    assert len(first.asked) == 1


# -- where it cannot be

CALL = {"tool_calls": [{"index": 0, "id": "t", "type": "function", "function": {"name": "f"}}]}
PLAIN = words("one", "One ")


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 2}, PLAIN),
        ({"logprobs": True}, PLAIN),
        ({"response_format": {"type": "json_object"}}, PLAIN),
        ({"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}, PLAIN),
        ({}, PLAIN + piece("one", CALL)),
        ({}, PLAIN + piece("one", {"refusal": "I"})),
        ({}, piece("one", {"reasoning_content": "Hm"}) + PLAIN),
        ({}, PLAIN + piece("one", {"content": "Eins"}, index=1)),
        ({}, piece("one", {"content": "", "refusal": "One"})),  # no text
    ],
    ids=["n", "logprobs", "json", "audio", "tools", "refusal", "reasoning", "choices", "nothing"],
)
def test_r52_what_a_seam_would_spoil_is_not_gone_on_with(
    face: Face, scripts: list[Script], options: dict[str, Any], said: bytes, cached: bool
) -> None:
    first, second, _ = scripts
    first.say(said, "cut")
    made = router(first, second, cache=CacheManager() if cached else None, **FOREVER)
    data, error = face.read(face.open(made, **options), {said[-40:].decode(): first.cut})
    assert (data, type(error)) == (said, UpstreamConnectionError)
    assert (second.asked, benched(made)) == ([], [True, False])
    face.idle(made)


@pytest.mark.parametrize("options", [{"n": 1}, {"response_format": {"type": "text"}}, {"logprobs": False}])
def test_r52_what_says_no_more_than_the_default_is_gone_on_with(options: dict[str, Any]) -> None:
    assert continuable("chat", {"messages": ASK, **options})
    assert not continuable("text", {"prompt": "x", **options})


@pytest.mark.parametrize("kind", ["text_completion", "responses"])
def test_r52_other_kinds_are_raised(face: Face, scripts: list[Script], kind: str) -> None:
    first, second, _ = scripts
    if kind == "responses":
        said = b'data: {"type": "response.output_text.delta", "delta": "One "}\n\n'
    else:
        said = b'data: {"choices": [{"index": 0, "text": "One "}]}\n\n'
    first.say(said, "cut")
    stream = face.open(router(first, second, **FOREVER), kind, "Say so")
    data, error = face.read(stream, {"One": first.cut})
    assert (data, type(error), second.asked) == (said, UpstreamConnectionError, [])


def test_calls_that_are_whole_are_ended(face: Face, scripts: list[Script]) -> None:
    first, second, _ = scripts
    said = piece("one", CALL) + piece("one", {}, "tool_calls")
    first.say(said, "cut")
    data, error = face.read(
        face.open(router(first, second, **FOREVER)), {'"finish_reason": "tool_calls"': first.cut}
    )
    assert (data, error, second.asked) == (said + DONE, None, [])


# -- time, and readers that leave


@pytest.mark.parametrize("told", [b"", words("b", "two ")], ids=["silent", "stalling"])
def test_r40_r52_one_deadline_holds_for_all_of_it(face: Face, scripts: list[Script], told: bytes) -> None:
    first, second, third = scripts
    first.say(words("one", "One "), "cut")
    second.say(told, "hold")
    made = router(first, second, third, cooldown_time=0)
    stream = face.open(made, timeout=2.0)
    data, error = face.read(stream, {"One": first.cut})
    assert text_of(data) == ("One two " if told else "One ")
    assert isinstance(error, DeadlineError if told else UpstreamConnectionError)
    assert second.left.wait(PATIENCE)
    assert (len(first.asked), len(second.asked), third.asked) == (1, 1, [])
    assert [name for name, _ in stream.route.failures] == ["m1", "m2"]
    face.idle(made)


def test_r40_r52_who_goes_on_has_the_time_that_is_left(face: Face, scripts: list[Script]) -> None:
    first, second, third = scripts
    first.say(words("one", "One "), "cut")
    third.say(words("c", "late") + end("c"))
    clock = FakeClock()
    made = router(first, second, third, cooldown_time=0)
    made._routing.clock = clock
    second.when_asked = lambda: clock.advance(30)  # and it fails
    stream = face.open(made, timeout=100)

    def cut() -> None:
        clock.advance(80)
        first.cut()

    data, error = face.read(stream, {"One": cut})
    assert (text_of(data), type(error)) == ("One ", UpstreamConnectionError)
    assert (len(second.asked), third.asked) == (1, [])


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_r53_closing_it_later_ends_the_other_call(face: Face, scripts: list[Script], cached: bool) -> None:
    first, second, third = scripts
    first.say(words("one", "One "), "cut")
    second.say(words("b", "two "), "hold")
    cache = CacheManager(on_disconnect="cancel") if cached else None
    made = router(first, second, third, cache=cache, **FOREVER)
    stream = face.open(made)
    data, _ = face.read(stream, {"One": first.cut}, until="two")
    assert text_of(data) == "One two "
    assert [made._routing.state.of(each).in_flight for each in made.deployments] == [0, 1, 0]
    face.close(stream)
    face.idle(made)
    face.until(second.left.is_set, "the upstream to see it")
    assert (third.asked, benched(made)) == ([], [True, False, False])


def test_r53_a_reader_that_is_cancelled_while_another_is_asked_ends_that_call(scripts: list[Script]) -> None:
    first, second, third = scripts
    first.say(words("one", "One "), "cut")
    second.say(b"", "hold")
    made = router(first, second, third, **FOREVER)

    async def main() -> None:
        stream = await made.acompletion("m", ASK, stream=True)

        async def read() -> None:
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    first.cut()

        task = asyncio.create_task(read())
        await asyncio.to_thread(wait_for, lambda: second.asked, "the other to be asked")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(second.left.wait, PATIENCE)
        await made.aclose()

    asyncio.run(main())
    assert [made._routing.state.of(each).in_flight for each in made.deployments] == [0, 0, 0]
    assert (third.asked, benched(made)) == ([], [True, False, False])


def test_r52_all_who_wait_for_it_get_the_same_bytes(face: Face, scripts: list[Script]) -> None:
    first, second, _ = scripts
    first.say(words("one", "One "), "cut")
    second.say(words("b", "two") + end("b"))
    made = router(first, second, cache=CacheManager(), **FOREVER)
    streams = [face.open(made) for _ in range(3)]
    data, error = face.read(streams[1], {"One": first.cut})
    well_formed(data)
    assert (text_of(data), error) == ("One two", None)
    assert [face.read(stream) for stream in streams[::2]] == [(data, None)] * 2
    assert [stream.cache.status for stream in streams] == ["miss", "collapsed", "collapsed"]
    assert (len(first.asked), len(second.asked)) == (1, 1)


# -- cut anywhere


@pytest.mark.parametrize("cut", range(350, 2400, 205))
def test_r52_over_a_real_connection_that_is_cut_anywhere(face: Face, cut: int) -> None:
    with FakeUpstream() as first, FakeUpstream() as second, FaultProxy(_port(first)) as proxy:
        proxy.cut_after = cut
        proxied = SimpleNamespace(url=f"http://{HOST}:{proxy.port}/v1")
        made = router(proxied, second, **FOREVER)
        data, error = face.read(face.open(made))
        assert error is None
        well_formed(data)
        messages: Any = second.calls[0].json["messages"]
        said = messages[1]["content"] if len(messages) > 1 else ""  # else it broke before it had said any
        whole, rest = _answer(first, messages[:1]), _answer(second, messages)
    assert whole.startswith(said)
    assert text_of(data) == said + rest


def _port(up: FakeUpstream) -> int:
    return int(up.url.split(":")[2].removesuffix("/v1"))


def _answer(up: FakeUpstream, messages: list[object]) -> str:
    text: str = router(up).completion("m", messages).choices[0].message.content
    return text


TEXTS = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)
    | st.sampled_from(["é", "日本", "😀", "\n\n"]),
    max_size=5,
)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


def lines(name: str, texts: list[str], ends: str) -> list[bytes]:
    """The events of a whole stream with such line ends, and with comments between them."""
    deltas = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts)]
    choices: list[dict[str, Any]]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    head: dict[str, Any] = {"id": name, "object": "chat.completion.chunk", "created": 1, "model": name}
    payloads = [json.dumps({**head, "choices": [choice]}, ensure_ascii=False) for choice in choices]
    return [f": on{ends}data: {payload}{ends}{ends}".encode() for payload in [*payloads, "[DONE]"]]


def pieces_of(data: bytes, cuts: set[int]) -> list[bytes]:
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    return [data[start:stop] for start, stop in pairwise(places)]


@settings(deadline=None)
@given(texts=TEXTS, rest=TEXTS, ends=st.tuples(ENDS, ENDS), data=st.data())
def test_r52_whole_events_come_through_wherever_it_is_cut(
    texts: list[str], rest: list[str], ends: tuple[str, str], data: st.DataObject
) -> None:
    events, others = lines("first", texts, ends[0]), lines("second", rest, ends[1])
    whole = b"".join(events)
    at = data.draw(st.integers(0, len(whole)), label="cut after")
    cuts = st.sets(st.integers(0, 1500), max_size=8)
    first = pieces_of(whole[:at], data.draw(cuts))
    second = pieces_of(b"".join(others), data.draw(cuts))
    given_whole = 0
    while given_whole < len(events) and len(b"".join(events[: given_whole + 1])) <= at:
        given_whole += 1
    said = "".join(texts[: max(0, given_whole - 1)])
    asked: list[Mapping[str, object]] = []
    broke = UpstreamConnectionError("broke")

    async def breaking(items: list[bytes]) -> AsyncIterator[bytes]:
        for item in items:
            yield item
        raise broke

    async def well(items: list[bytes]) -> AsyncIterator[bytes]:
        for item in items:
            yield item

    async def again(error: ProviderError, body: Mapping[str, object]) -> AsyncIterator[bytes]:
        assert error is broke
        asked.append(body)
        return well(second)

    stream = Continued(breaking(first), {"messages": ASK}, again, 1)
    got: list[bytes] = []

    async def read() -> None:
        while True:
            got.append(await anext(stream))

    finished = given_whole >= len(texts) + 2
    if not said and not finished:
        with pytest.raises(UpstreamConnectionError):
            run_sync(read())
        assert (b"".join(got), asked) == (b"".join(events[:given_whole]), [])
        with pytest.raises(StopAsyncIteration):  # and nothing of the event that was cut comes after that
            run_sync(anext(stream))
        return
    with pytest.raises(StopAsyncIteration):
        run_sync(read())
    for item in got:
        assert item[-2:] in (b"\n\n", b"\r\r") or item.endswith(b"\r\n\r\n")
    joined = b"".join(got)
    assert joined.startswith(b"".join(events[:given_whole]))
    well_formed(joined)
    assert text_of(joined) == (said if finished else said + "".join(rest))
    assert len(asked) == (0 if finished else 1)
    assert stream.no_store is (given_whole < len(events))
    for body in asked:
        messages: Any = body["messages"]
        assert messages[:-1] == [*ASK, {"role": "assistant", "content": said}]


def test_the_name_of_a_stream_is_not_that_of_what_a_filter_says() -> None:
    """Azure's first event is about the prompt, under no name."""
    filtered = (
        b'data: {"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[]}\n\n'
    )

    async def breaking() -> AsyncIterator[bytes]:
        yield filtered + words("one", "One ")
        raise UpstreamServerError("broke")

    async def well() -> AsyncIterator[bytes]:
        yield filtered + words("b", "two") + end("b")

    async def again(error: ProviderError, body: Mapping[str, object]) -> AsyncIterator[bytes]:
        return well()

    async def read() -> bytes:
        return b"".join([item async for item in Continued(breaking(), {"messages": ASK}, again, 1)])

    names = [json.loads(event.data).get("id") for event in parse_events(run_sync(read()))[:-1]]
    assert names == ["", *["id-one"] * 6]
