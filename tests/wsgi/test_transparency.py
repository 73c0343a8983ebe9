"""Behind the WSGI middleware everything is as it was without it (PEP 3333).

`serve` plays the server: it holds to the rules of the protocol, and `wsgiref.validate` holds the app and the
middleware to them, from the outside and from the inside. `same` runs an app bare and wrapped.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest

from llm_middleware import CacheManager
from llm_middleware.wsgi import LLMCacheMiddleware
from llm_middleware.wsgi.exchange import Body
from tests.support import CHAT, chat_stream, completion

ROOT = Path(__file__).parents[2]
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
RAW = json.dumps(REQUEST).encode()
STREAM = json.dumps({**REQUEST, "stream": True}).encode()
ANSWER = json.dumps(completion()).encode()
EVENTS = chat_stream("a", "b", "c")
JSON = [("Content-Type", "application/json")]
SSE = [("Content-Type", "text/event-stream")]


@dataclass
class Served:
    """What a server sent to its client."""

    status: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    @property
    def cache(self) -> str | None:
        return self.header("x-llm-cache")


def environ_of(body: bytes = RAW, path: str = CHAT, method: str = "POST", **more: object) -> dict:
    environ: dict = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "a=1",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)),
        "SERVER_NAME": "test",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "test",
        "HTTP_X_OWN": "é".encode().decode("latin-1"),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        **more,
    }
    return {key: value for key, value in environ.items() if value is not None}


class Server:
    """Headers leave with the first chunk that is not empty; until then they may be replaced for an error."""

    def __init__(self) -> None:
        self.served = Served()
        self.head: tuple[str, list] | None = None

    def start_response(self, status, headers, exc_info=None):
        if exc_info is not None:
            try:
                if self.served.status:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None
        elif self.head:
            raise AssertionError("headers already set")
        self.head = (status, headers)
        return self.send

    def send(self, data: bytes) -> None:
        if self.head is None:
            raise AssertionError("write() before start_response()")
        if not self.served.status:
            self.served.status, self.served.headers = self.head
        if data:
            self.served.chunks.append(data)

    def run(self, result, take: int | None) -> None:
        for chunk in result:
            if chunk:
                self.send(chunk)
            if take is not None and len(self.served.chunks) >= take:
                return
        if not self.served.status:
            self.send(b"")


def serve(app, environ: dict, *, take: int | None = None) -> Served:
    """Call an app as servers do, ``close`` at the end. ``take``: the client leaves after so many chunks."""
    server = Server()
    result = None
    try:
        result = app(environ, server.start_response)
        server.run(result, take)
    except Exception as exc:
        server.served.error = exc
    finally:
        close = getattr(result, "close", None)
        if close is not None:
            close()
    return server.served


def wrap(app, **options: object) -> LLMCacheMiddleware:
    return LLMCacheMiddleware(app, **{"cache": CacheManager(), **options})


def checked(app, **options: object):
    """The middleware between two validators."""
    return validator(wrap(validator(app), **options))


def own(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The app's own headers, in one spelling."""
    ours = ("x-llm-", "cache-status", "age", "x-accel-buffering")
    lowered = [(name.lower(), value) for name, value in headers]
    private = ("cache-control", "private, no-store")
    return [pair for pair in lowered if not pair[0].startswith(ours) and pair != private]


def same(app, environ: Callable[[], dict] = environ_of, **options: object) -> Served:
    """Serve bare and wrapped, between validators; assert that the client gets the same. The wrapped one."""
    bare, wrapped = serve(validator(app), environ()), serve(checked(app, **options), environ())
    assert wrapped.status == bare.status
    # A length that the app did not tell may be told: then it is true.
    told = [pair for pair in own(wrapped.headers) if pair[0] != "content-length"]
    assert told == [pair for pair in own(bare.headers) if pair[0] != "content-length"]
    length = wrapped.header("content-length")
    assert bare.header("content-length") in (None, length)
    assert wrapped.body == bare.body
    if length is not None and wrapped.error is None:
        assert int(length) == len(wrapped.body)
    assert repr(wrapped.error) == repr(bare.error)
    return wrapped


def answering(*chunks: bytes, headers: list[tuple[str, str]] = JSON, status: str = "200 OK"):
    def app(environ, start_response):
        read(environ)
        start_response(status, list(headers))
        return list(chunks)

    return app


def read(environ: dict) -> bytes:
    """The request body, as frameworks read it."""
    if environ.get("wsgi.input_terminated"):
        return b"".join(iter(lambda: environ["wsgi.input"].read(64), b""))
    return environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))


def echo(environ, start_response):
    """Tells what it was given."""
    body = read(environ)
    told = {key: repr(value) for key, value in sorted(environ.items()) if not key.startswith("wsgi.")}
    start_response("200 OK", list(JSON))
    return [json.dumps({"environ": told, "body": body.decode("latin-1")}).encode()]


class Chunks:
    """An iterable that is not its own iterator, and counts its closes; ``error`` at the end."""

    def __init__(self, *chunks: bytes, error: Exception | None = None) -> None:
        self.chunks = chunks
        self.error = error
        self.closed = 0
        self.given = 0
        self.given_at_close = -1

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.chunks:
            assert not self.closed, "read after close"
            self.given += 1
            yield chunk
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.closed += 1
        self.given_at_close = self.given


# What is not ours ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"])
def test_other_methods_on_a_cached_path(method: str):
    wrapped = same(echo, lambda: environ_of(method=method))
    assert wrapped.cache is None


@pytest.mark.parametrize("path", ["/", "/other", CHAT + "/", "/v2" + CHAT, None])
def test_other_paths(path: str | None):
    wrapped = same(echo, lambda: environ_of(path=path, SCRIPT_NAME="" if path else "/app"))
    assert wrapped.cache is None


def test_the_very_objects_are_passed_on_for_other_paths():
    got: list = []

    def app(*args):
        got.extend(args)
        return result

    result, environ, start = [b""], environ_of(path="/other"), lambda *args: None
    assert wrap(app)(environ, start) is result
    assert got[0] is environ
    assert got[1] is start


def test_mounted_below_a_script_name():
    """`DispatcherMiddleware` moves the prefix from PATH_INFO to SCRIPT_NAME, and back never."""
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    inner = wrap(answering(ANSWER))
    app = DispatcherMiddleware(answering(b"outer"), {"/llm": inner})
    paths = ["/llm" + CHAT, "/llm" + CHAT, CHAT]
    assert [serve(app, environ_of(path=path)).cache for path in paths] == ["miss", "hit", None]


def test_around_a_dispatcher():
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    outer = DispatcherMiddleware(answering(b"outer"), {"/llm": echo})
    app = wrap(outer, routes={"/llm" + CHAT: "json"})
    miss, hit = (serve(app, environ_of(path="/llm" + CHAT)) for _ in range(2))
    assert (miss.cache, hit.cache) == ("miss", "hit")
    assert json.loads(miss.body)["environ"]["SCRIPT_NAME"] == "'/llm'"


# Requests -----------------------------------------------------------------------------------------


def test_the_environ_as_it_came():
    wrapped = same(echo)
    assert json.loads(wrapped.body)["body"].encode() == RAW


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b"\xff\xfe", b'{"model": "m"'])
def test_bodies_of_no_known_shape(body: bytes):
    assert same(echo, lambda: environ_of(body)).cache == "bypass"


@pytest.mark.parametrize("length", [None, "", "0"])
def test_no_length_is_no_body(length: str | None):
    """What else is on the connection is the next request's."""

    def app(environ, start_response):
        seen.append(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
        return answering(ANSWER)(environ, start_response)

    seen: list[bytes] = []
    source = io.BytesIO(b"GET /next HTTP/1.1\r\n\r\n")
    served = serve(wrap(app), environ_of(CONTENT_LENGTH=length, **{"wsgi.input": source}))
    assert (served.status, seen, source.tell()) == ("200 OK", [b""], 0)


@pytest.mark.parametrize("length", [None, "", "0"])
def test_chunked_bodies_are_read_to_their_end(length: str | None):
    def environ() -> dict:
        return environ_of(CONTENT_LENGTH=length, **{"wsgi.input_terminated": True})

    seen: list[bytes] = []

    def app(environ, start_response):
        seen.append(read(environ))
        return answering(ANSWER)(environ, start_response)

    wrapped = checked(app)
    assert [serve(wrapped, environ()).cache for _ in range(2)] == ["miss", "hit"]
    assert seen == [RAW]
    assert serve(wrapped, environ_of()).cache == "hit"


class Dribble(io.RawIOBase):
    """A connection on which a few bytes come at a time."""

    def __init__(self, body: bytes, size: int) -> None:
        super().__init__()
        self.source, self.size = io.BytesIO(body), size

    def read(self, size: int = -1) -> bytes:
        return self.source.read(self.size if size < 0 else min(size, self.size))


@pytest.mark.parametrize("terminated", [False, True])
def test_a_body_that_comes_in_dribbles(terminated: bool):
    def environ() -> dict:
        more: dict[str, object] = {"wsgi.input": Dribble(RAW, 3)}
        if terminated:
            more |= {"wsgi.input_terminated": True, "CONTENT_LENGTH": None}
        return environ_of(**more)

    seen: list[bytes] = []

    def app(environ, start_response):
        seen.append(read(environ))
        start_response("200 OK", list(JSON))
        return [ANSWER]

    assert serve(wrap(app), environ()).cache == "miss"
    assert seen == [RAW]


def test_a_body_over_the_limit_by_its_length_is_the_apps_to_read():
    wrapped = same(echo, max_body_bytes=20)
    assert wrapped.cache == "bypass"


def test_a_chunked_body_over_the_limit_is_the_apps_to_read():
    def environ() -> dict:
        return environ_of(CONTENT_LENGTH=None, **{"wsgi.input_terminated": True})

    wrapped = same(echo, environ, max_body_bytes=20)
    assert wrapped.cache == "bypass"
    assert json.loads(wrapped.body)["body"].encode() == RAW


LINES = b"one\ntwo\nthree and more than the limit\nfour\nfive"


@pytest.mark.parametrize(
    "way",
    [
        lambda stream: [stream.read(-1)],
        lambda stream: [stream.read(5), stream.read(100), stream.read(5)],
        lambda stream: list(iter(lambda: stream.read(3), b"")),
        lambda stream: list(iter(lambda: stream.readline(), b"")),
        lambda stream: list(iter(lambda: stream.readline(4), b"")),
        lambda stream: stream.readlines(),
        lambda stream: list(stream),
        lambda stream: [stream.readline(), stream.read(2), *stream],
    ],
)
def test_a_body_over_the_limit_reads_like_the_stream_that_it_is(way: Callable):
    got: list[list[bytes]] = []

    def app(environ, start_response):
        got.append(way(environ["wsgi.input"]))
        return answering(b"{}")(environ, start_response)

    def environ() -> dict:
        return environ_of(LINES, CONTENT_LENGTH=None, **{"wsgi.input_terminated": True})

    serve(app, environ())
    serve(wrap(app, max_body_bytes=20), environ())
    assert b"".join(got[0]) == LINES
    assert got[1] == got[0]


def test_a_body_that_is_cut_short_is_not_answered_from_the_cache():
    """The client has left: the app meets the short body, as it would without us, and nothing is kept."""
    seen: list[tuple[bytes, str]] = []

    def app(environ, start_response):
        seen.append((environ["wsgi.input"].read(1000), environ["CONTENT_LENGTH"]))
        start_response("400 Bad Request", list(JSON))
        return [b"{}"]

    def environ() -> dict:
        return environ_of(RAW[:-5], CONTENT_LENGTH=str(len(RAW)))

    wrapped = same(app, environ)
    assert wrapped.cache == "bypass"
    assert seen == [(RAW[:-5], str(len(RAW)))] * 2


def test_a_handler_that_does_not_read_the_body():
    def app(environ, start_response):
        start_response("401 Unauthorized", list(JSON))
        return [b'{"error": "who are you?"}']

    same(app)


def test_the_cache_field_is_taken_out_and_the_length_is_right():
    body = json.dumps({**REQUEST, "cache": {"ttl": 5}}).encode()
    seen: list[tuple[bytes, str]] = []

    def app(environ, start_response):
        seen.append((environ["wsgi.input"].read(10_000), environ["CONTENT_LENGTH"]))
        start_response("200 OK", list(JSON))
        return [ANSWER]

    serve(wrap(app), environ_of(body))
    ((raw, length),) = seen
    assert json.loads(raw) == REQUEST
    assert length == str(len(raw))


# Answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status", ["200 OK", "201 Created", "400 Bad Request", "404 Nothing Here", "503 Busy", "299 Odd One"]
)
def test_plain_answers(status: str):
    headers = [*JSON, ("Content-Length", str(len(ANSWER))), ("Set-Cookie", "a=1"), ("set-cookie", "b=2")]
    same(answering(ANSWER, headers=headers, status=status))


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_answers_without_a_body(status: str):
    wrapped = same(answering(headers=[("X-Own", "1")], status=status))
    assert (wrapped.body, wrapped.header("content-type")) == (b"", None)


@pytest.mark.parametrize("chunks", [[], [b""], [b"", b""]])
@pytest.mark.parametrize("headers", [JSON, SSE, [*JSON, ("Content-Length", "0")]])
def test_empty_answers(chunks: list[bytes], headers: list):
    same(answering(*chunks, headers=headers))


@pytest.mark.parametrize("headers", [JSON, SSE, [("Content-Type", "application/x-ndjson")]])
def test_answers_in_chunks(headers: list):
    def app(environ, start_response):
        start_response("200 OK", list(headers))
        return (event for event in [b"", *EVENTS, b""])

    same(app)


def test_values_beyond_ascii():
    same(answering(ANSWER, headers=[*JSON, ("X-Own", "caf\xe9")]))


def test_a_streams_chunks_pass_one_by_one():
    """Each chunk has left when the next one is made."""
    log: list[str] = []

    def app(environ, start_response):
        start_response("200 OK", list(SSE))
        for number, event in enumerate(EVENTS):
            log.append(f"made {number}")
            yield event
        log.append("end")

    result = wrap(app)(environ_of(STREAM), lambda *args: log.append("start"))
    for number, _ in enumerate(result):
        log.append(f"sent {number}")
    result.close()
    expected = [step for number in range(len(EVENTS)) for step in (f"made {number}", f"sent {number}")]
    # The status is known once the app was asked for its first chunk.
    assert [step for step in log if step != "start"] == [*expected, "end"]
    assert log.index("start") < log.index("sent 0")


@pytest.mark.parametrize("kind", ["application/x-ndjson", "text/plain"])
def test_other_streams_are_replayed_piece_by_piece(kind: str):
    pieces = [b'{"n": 1}\n', b'{"n', b'": 2}\n', b"\n"]
    calls: list[int] = []

    def app(environ, start_response):
        calls.append(1)
        start_response("200 OK", [("Content-Type", kind)])
        return iter(pieces)

    wrapped = checked(app, routes={"/ask": "json"})
    miss, hit = (serve(wrapped, environ_of(path="/ask")) for _ in range(2))
    assert (miss.cache, hit.cache, calls) == ("miss", "hit", [1])
    assert miss.chunks == hit.chunks == pieces
    assert hit.header("content-type") == kind


def test_start_response_late_in_the_first_next():
    def app(environ, start_response):
        body = read(environ)
        start_response("200 OK", list(JSON))
        yield b'{"echo": '
        yield json.dumps(body.decode()).encode()
        yield b"}"

    same(app)


def test_start_response_late_in_a_stream():
    def app(environ, start_response):
        start_response("200 OK", list(SSE))
        yield from EVENTS

    wrapped = checked(app)
    miss, hit = (serve(wrapped, environ_of(STREAM)) for _ in range(2))
    assert (miss.cache, hit.cache, miss.chunks, hit.chunks) == ("miss", "hit", EVENTS, EVENTS)


@pytest.mark.parametrize("headers", [JSON, SSE])
def test_write(headers: list):
    """What is written comes before what is returned."""

    def app(environ, start_response):
        write = start_response("200 OK", list(headers))
        write(b"one")
        write(b"")
        write(b"two")
        return [b"three"]

    same(app)


@pytest.mark.parametrize("headers", [JSON, SSE])
def test_write_alone(headers: list):
    def app(environ, start_response):
        start_response("200 OK", list(headers))(ANSWER)
        return []

    same(app)


def test_start_response_again_with_an_error_before_anything_was_sent():
    def app(environ, start_response):
        start_response("200 OK", [*JSON, ("X-First", "1")])
        try:
            raise ValueError("broken")
        except ValueError:
            start_response("500 Oops", list(JSON), sys.exc_info())
        return [b'{"error": 1}']

    wrapped = same(app)
    assert (wrapped.status, wrapped.header("x-first")) == ("500 Oops", None)


@pytest.mark.parametrize("headers", [SSE, [("Content-Type", "application/x-ndjson")]])
def test_start_response_again_with_an_error_in_a_stream(headers: list):
    """Too late: the server raises the error that it is given."""

    def app(environ, start_response):
        start_response("200 OK", list(headers))
        yield EVENTS[0]
        try:
            raise ValueError("broken")
        except ValueError:
            start_response("500 Oops", list(JSON), sys.exc_info())
        yield b"never"

    wrapped = same(app)
    assert (wrapped.chunks, repr(wrapped.error)) == ([EVENTS[0]], "ValueError('broken')")


def test_start_response_again_with_an_error_in_a_plain_body_does_not_mix_the_two():
    """Part of the first answer and the error page in one body are neither."""

    def app(environ, start_response):
        start_response("200 OK", list(JSON))
        yield b'{"half": '
        try:
            raise ValueError("broken")
        except ValueError:
            start_response("500 Oops", list(JSON), sys.exc_info())
        yield b'{"error": 1}'

    served = serve(checked(app), environ_of())
    if served.error is None:
        assert (served.status, served.body) == ("500 Oops", b'{"error": 1}')
    else:
        assert isinstance(served.error, ValueError)
        assert served.chunks in ([], [b'{"half": '])


def test_start_response_twice_without_an_error():
    def app(environ, start_response):
        start_response("200 OK", list(JSON))
        start_response("200 OK", list(JSON))
        return [b"{}"]

    served = serve(wrap(app), environ_of())
    assert isinstance(served.error, AssertionError)


def test_no_start_response_at_all():
    served = serve(wrap(lambda environ, start_response: [b"{}"]), environ_of())
    assert isinstance(served.error, AssertionError)


@pytest.mark.parametrize("stage", ["call", "first", "stream"])
def test_the_handler_raises(stage: str):
    def calls(environ, start_response):
        raise ValueError("broken")

    def app(environ, start_response):
        start_response("200 OK", list(SSE))
        if stage == "stream":
            yield from EVENTS[:2]
        raise ValueError("broken")

    wrapped = same(calls if stage == "call" else app)
    assert repr(wrapped.error) == "ValueError('broken')"
    assert wrapped.chunks == (EVENTS[:2] if stage == "stream" else [])


# close() ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [JSON, SSE, [("Content-Type", "application/x-ndjson")]])
def test_close_once_after_the_last_chunk(headers: list):
    made: list[Chunks] = []

    def app(environ, start_response):
        start_response("200 OK", list(headers))
        made.append(Chunks(*EVENTS))
        return made[-1]

    same(app)
    assert [(each.closed, each.given_at_close) for each in made] == [(1, len(EVENTS))] * 2


@pytest.mark.parametrize("headers", [JSON, SSE])
@pytest.mark.parametrize("count", [0, 2])
def test_close_once_after_an_error(headers: list, count: int):
    made: list[Chunks] = []

    def app(environ, start_response):
        start_response("200 OK", list(headers))
        made.append(Chunks(*EVENTS[:count], error=ValueError("broken")))
        return made[-1]

    bare, wrapped = serve(validator(app), environ_of()), serve(checked(app), environ_of())
    assert repr(bare.error) == repr(wrapped.error) == "ValueError('broken')"
    assert [each.closed for each in made] == [1, 1]
    if headers is SSE:
        assert wrapped.chunks == bare.chunks


@pytest.mark.parametrize("take", [1, 2])
def test_close_once_when_the_client_leaves(take: int):
    made: list[Chunks] = []

    def app(environ, start_response):
        start_response("200 OK", list(SSE))
        made.append(Chunks(*EVENTS))
        return made[-1]

    served = serve(checked(app), environ_of(STREAM), take=take)
    assert served.chunks == EVENTS[:take]
    assert (made[0].closed, made[0].given) == (1, take)


def test_close_once_when_the_server_never_reads():
    made: list[Chunks] = []

    def app(environ, start_response):
        start_response("200 OK", list(SSE))
        made.append(Chunks(*EVENTS))
        return made[-1]

    wrapped = wrap(app)
    result = wrapped(environ_of(STREAM), lambda *args: None)
    result.close()
    result.close()
    assert made[0].closed == 1
    assert wrapped._front.cache.stats()["flights"] == 0


def test_close_that_raises_reaches_the_server():
    """As without us; the answer was sent and is kept."""

    class Broken(Chunks):
        def close(self) -> None:
            super().close()
            raise ValueError("cannot close")

    def app(environ, start_response):
        start_response("200 OK", list(JSON))
        return Broken(ANSWER)

    wrapped = wrap(app)
    for made in (app, wrapped):
        with pytest.raises(ValueError, match="cannot close"):
            serve(made, environ_of())
    assert serve(wrapped, environ_of()).cache == "hit"


def test_close_when_start_response_raises():
    """The server could not take the headers: the app's iterable is closed all the same."""
    made: list[Chunks] = []

    def app(environ, start_response):
        start_response("200 OK", list(JSON))
        made.append(Chunks(ANSWER))
        return made[-1]

    def start_response(status, headers, exc_info=None):
        raise OSError("the client has left")

    cache = CacheManager()
    with pytest.raises(OSError, match="the client has left"):
        wrap(app, cache=cache)(environ_of(), start_response)
    assert made[0].closed == 1
    assert cache.stats()["flights"] == 0


def test_close_when_start_response_raises_in_a_stream():
    made: list[Chunks] = []

    def app(environ, start_response):
        start_response("200 OK", list(SSE))
        made.append(Chunks(*EVENTS))
        return made[-1]

    def start_response(status, headers, exc_info=None):
        raise OSError("the client has left")

    cache = CacheManager()
    with pytest.raises(OSError, match="the client has left"):
        wrap(app, cache=cache)(environ_of(STREAM), start_response)
    assert made[0].closed == 1
    assert cache.stats()["flights"] == 0
    assert serve(wrap(app, cache=cache), environ_of(STREAM)).chunks == EVENTS


def test_close_of_a_bypassed_answer():
    made: list[Chunks] = []

    def app(environ, start_response):
        start_response("200 OK", list(SSE))
        made.append(Chunks(*EVENTS))
        return made[-1]

    body = json.dumps({**REQUEST, "cache": {"no-cache": True, "no-store": True}}).encode()
    served = serve(checked(app), environ_of(body))
    assert (served.cache, served.chunks, made[0].closed) == ("bypass", EVENTS, 1)


def test_body_is_closed_once_and_read_through():
    closes: list[int] = []
    body = Body([b"a", b"b"], lambda: closes.append(1))
    assert iter(body) is iter(body)
    assert list(body) == [b"a", b"b"]
    assert closes == []
    body.close()
    body.close()
    assert closes == [1]
    Body([b"a"]).close()


def test_file_wrapper():
    """A server's own file wrapper may only be used by the server that it came from."""
    files: list[io.BytesIO] = []

    def app(environ, start_response):
        start_response("200 OK", list(JSON))
        files.append(io.BytesIO(ANSWER))
        return environ["wsgi.file_wrapper"](files[-1], 7)

    def environ() -> dict:
        return environ_of(**{"wsgi.file_wrapper": FileWrapper})

    wrapped = wrap(app)
    bare = serve(app, environ())
    miss, hit = serve(wrapped, environ()), serve(wrapped, environ())
    assert (miss.cache, hit.cache) == ("miss", "hit")
    assert bare.body == miss.body == hit.body == ANSWER
    assert all(file.closed for file in files)


# Frameworks ---------------------------------------------------------------------------------------


def flask_app():
    import flask

    app = flask.Flask(__name__)

    @app.post(CHAT)
    def chat():
        if flask.request.get_json().get("stream"):
            return flask.Response(iter(EVENTS), content_type="text/event-stream")
        answer = flask.jsonify(completion())
        answer.set_cookie("seen", "1")
        return answer

    @app.post("/v1/embeddings")
    def embeddings():
        raise ValueError("broken")

    @app.get("/v1/embeddings")
    def listed():
        return "none"

    return app


@pytest.mark.parametrize("body", [RAW, STREAM])
def test_flask_is_the_same(body: bytes):
    same(flask_app(), lambda: environ_of(body))


def test_flask_errors_and_other_routes():
    for path, method in [("/v1/embeddings", "POST"), ("/v1/embeddings", "GET"), ("/none", "POST")]:
        same(flask_app(), lambda path=path, method=method: environ_of(path=path, method=method))


def test_flask_hits():
    import flask

    app = flask_app()
    app.wsgi_app = LLMCacheMiddleware(app.wsgi_app, cache=CacheManager())
    client = app.test_client(use_cookies=False)  # a cookie makes another caller
    for asked in (REQUEST, {**REQUEST, "seed": 1, "stream": True}):
        miss, hit = (client.post(CHAT, json=asked, buffered=True) for _ in range(2))
        assert (miss.headers["x-llm-cache"], hit.headers["x-llm-cache"]) == ("miss", "hit")
        assert hit.data == miss.data
        assert "Set-Cookie" not in hit.headers
        miss.close()
        hit.close()
    assert not flask.has_request_context()


DJANGO = """
import io, json, sys
import django
from django.conf import settings
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

settings.configure(
    SECRET_KEY="s", ALLOWED_HOSTS=["*"], ROOT_URLCONF="__main__", USE_TZ=True,
    LOGGING={"version": 1, "loggers": {"django.request": {"level": "CRITICAL"}}},
)

from tests.support import completion
from tests.wsgi.test_transparency import EVENTS, RAW, STREAM, environ_of, same, serve, wrap

def chat(request):
    if json.loads(request.body).get("stream"):
        return StreamingHttpResponse(iter(EVENTS), content_type="text/event-stream")
    return JsonResponse(completion())

def broken(request):
    raise ValueError("broken")

urlpatterns = [path("v1/chat/completions", chat), path("v1/embeddings", broken)]

from django.core.signals import request_finished
from django.core.wsgi import get_wsgi_application

app = get_wsgi_application()
finished = []
request_finished.connect(lambda **given: finished.append(1), weak=False)

for body in (RAW, STREAM):
    same(app, lambda: environ_of(body))
    assert finished == [1, 1], finished
    finished.clear()
for where in ("/v1/embeddings", "/none"):
    same(app, lambda: environ_of(path=where))
    assert finished == [1, 1], finished
    finished.clear()
wrapped = wrap(app)
for body in (RAW, STREAM):
    miss, hit = serve(wrapped, environ_of(body)), serve(wrapped, environ_of(body))
    if body is RAW:
        assert (miss.cache, hit.cache, hit.body) == ("miss", "hit", miss.body)
    else:
        assert (miss.cache, hit.cache) == ("hit", "hit")  # made of the plain answer
    assert finished == ([1] if body is RAW else []), finished
    finished.clear()
print("all is well")
"""


def test_django_is_the_same():
    """In a process of its own: Django's settings are made once and for all."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", DJANGO],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("all is well\n", 0), done.stderr
