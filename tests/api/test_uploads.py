"""Uploads of recordings: read as they arrive, kept in a temporary file, sent on from it, on both fronts."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import tempfile
import threading
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_middleware.api.uploads import LONGEST_FIELD, MOST_FIELDS
from llm_middleware.caching.cache_key import UnkeyableError
from llm_middleware.caching.multipart import FormParser, Part, PartHead, form_parts
from llm_middleware.testing import FakeUpstream
from tests.api import serving
from tests.api.serving import error, refused, until
from tests.servers.conftest import run_server

served, server, upstream = serving.served, serving.server, serving.upstream
asgi_server, wsgi_server = serving.asgi_server, serving.wsgi_server

PATH = "/v1/audio/transcriptions"
TYPE = "multipart/form-data; boundary=B"
MIB = 2**20


def audio(size: int, seed: int = 0) -> bytes:
    """Bytes that differ everywhere, with what looks like delimiters among them."""
    block = hashlib.shake_256(b"%d" % seed).digest(4099) + b"\r\n--"
    return (block * (size // len(block) + 1))[:size]


def form(content: bytes | None, name: str = "a.wav", **fields: str) -> bytes:
    fields = {"model": "m", **fields}
    parts = [f'name="{field}"\r\n\r\n{value}'.encode() for field, value in fields.items()]
    if content is not None:
        parts.append(f'name="file"; filename="{name}"\r\nContent-Type: audio/wav\r\n\r\n'.encode() + content)
    return raw(*parts)


def raw(*parts: bytes) -> bytes:
    begin = b"--B\r\nContent-Disposition: form-data; "
    return b"".join([begin + part + b"\r\n" for part in parts]) + b"--B--\r\n"


def send(client: httpx.Client, body: object, path: str = PATH, **headers: str) -> httpx.Response:
    return client.post(path, content=body, headers={"content-type": TYPE, **headers})


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """How many temporary files are open. They have no names, so none can be left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def count() -> int:
        found = 0
        for each in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found += os.readlink(f"/proc/self/fd/{each}").startswith(str(tmp_path))
        assert list(tmp_path.iterdir()) == []
        return found

    yield count
    until(lambda: count() == 0, "the temporary files are closed")


# The parser ---------------------------------------------------------------------------------------


def fed(body: bytes, cuts: list[int]) -> list[Part]:
    """The parts of a form that comes in pieces."""
    parser = FormParser(TYPE)
    found: list[tuple[PartHead, list[bytes]]] = []
    for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
        for event in parser.feed(body[start:end]):
            if isinstance(event, PartHead):
                found.append((event, []))
            else:
                assert event
                found[-1][1].append(event)
    parser.finish()
    return [Part(*head, b"".join(content)) for head, content in found]


def split(body: bytes) -> list[tuple[bytes, bytes]]:
    """Headers and contents, the plain way: by RFC 2046 a delimiter has a line to itself."""
    first, *parts = (b"\r\n" + body).split(b"\r\n--B")
    if first.strip() or not parts or not parts[-1].startswith(b"--"):
        raise UnkeyableError("not delimited")
    found = []
    for part in parts[:-1]:
        head, blank, content = part[2:].partition(b"\r\n\r\n")
        if not part.startswith(b"\r\n") or not blank:
            raise UnkeyableError("no line of its own, or no blank line")
        found.append((head, content))
    return found


HEAD = b'\r\nContent-Disposition: form-data; name="a"'
FILE = HEAD + b'; filename="x"'
SHREDS = [b"--B", b"--B--", b"\r\n", b"\r\n\r\n", b"\r\n--B", b"\r", b"\n", b"-", b"x", b" ", HEAD, FILE]
BODIES = st.one_of(
    st.lists(st.sampled_from(SHREDS), max_size=14).map(b"".join),
    st.lists(st.binary(max_size=30), max_size=4).map(
        lambda all_: raw(*[b'name="a"\r\n\r\n' + x for x in all_])
    ),
    st.lists(st.lists(st.sampled_from(SHREDS), max_size=5), max_size=3).map(
        lambda all_: raw(*[b'name="a"; filename=x\r\n\r\n' + b"".join(each) for each in all_])
    ),
)


@settings(max_examples=1000, deadline=None)
@given(BODIES, st.data())
def test_a_form_is_the_same_however_it_is_cut(body, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    try:
        expected = [content for _, content in split(body)]
        plain = form_parts(body, TYPE)
    except UnkeyableError:
        for tried in (cuts, list(range(len(body)))):
            with pytest.raises(UnkeyableError):
                fed(body, tried)
    else:
        assert [part.content for part in plain] == expected
        assert fed(body, cuts) == fed(body, list(range(len(body)))) == plain


@settings(max_examples=1000, deadline=None)
@given(BODIES)
def test_whatever_a_plain_reading_refuses_is_refused(body):
    try:
        split(body)
    except UnkeyableError:
        with pytest.raises(UnkeyableError):
            form_parts(body, TYPE)


def test_long_headers_of_a_part_are_not_collected():
    parser = FormParser(TYPE)
    list(parser.feed(b"--B\r\n"))
    for _ in range(16):
        assert list(parser.feed(b"x" * 1000)) == []
    with pytest.raises(UnkeyableError, match="too long headers"):
        list(parser.feed(b"x" * 1000))


# What is asked, and what is kept ------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, MIB // 8, MIB, MIB + 1, 3 * MIB])
def test_the_provider_gets_the_file(served, upstream, disk, size):
    client = served()
    content = audio(size)
    body = form(content, prompt="hush", language="", temperature="0.5")
    answer = send(client, body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-llm-cache"] == "miss"
    (call,) = upstream.calls
    assert call.json == {
        "model": "m-up",
        "prompt": "hush",
        "language": "",
        "temperature": "0.5",
        "file": content,
    }
    assert int(call.headers["content-length"]) == len(call.body)
    assert "transfer-encoding" not in call.headers
    assert b'filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n' in call.body
    again = send(client, body)
    assert (again.headers["x-llm-cache"], again.content) == ("hit", answer.content)
    assert upstream.count == 1


@pytest.mark.parametrize("http", [{"client": "httpx"}, {"client": "httpx", "http2": False}, {}], ids=str)
def test_every_client_sends_from_the_file(served, upstream, disk, http):
    client = served(router={"http": http})
    content = audio(2 * MIB)
    assert send(client, form(content)).status_code == 200
    (call,) = upstream.calls
    assert call.json["file"] == content
    assert int(call.headers["content-length"]) == len(call.body)
    assert "transfer-encoding" not in call.headers


@pytest.mark.parametrize("size", [3, 2 * MIB])
def test_c14_c15_c16_the_key_is_of_the_content_and_the_fields(served, upstream, disk, size):
    client = served()
    content = audio(size)
    bodies = {
        "miss": form(content, language="en"),
        "hit: C14 another name": form(content, "b.mp3", language="en"),
        "hit: C16 the default": form(content, language="en", response_format="json"),
        "miss: C15 other bytes": form(content[:-1], language="en"),
        "miss: C16 a prompt": form(content, language="en", prompt="x"),
        "miss: C16 another prompt": form(content, language="en", prompt="y"),
        "miss: C16 a language": form(content, language="de"),
        "miss: C16 a format": form(content, language="en", response_format="text"),
    }
    for expected, body in bodies.items():
        answer = send(client, body)
        assert answer.headers["x-llm-cache"] == expected.partition(":")[0], expected
        plan = client.core.cache.plan("transcription", body, scope="caller:anonymous", content_type=TYPE)
        assert answer.headers["x-llm-cache-key"] == plan.digest  # as it is of a form that is read whole
    assert upstream.count == 6


def test_a_part_of_a_list_of_fields(served, upstream):
    client = served()
    lists = [f'name="timestamp_granularities[]"\r\n\r\n{each}'.encode() for each in ("word", "segment")]
    file = b'name="file"; filename="a.wav"\r\n\r\nRIFF'
    body = raw(b'name="model"\r\n\r\nm', *lists, file)
    assert send(client, body).status_code == 200
    assert upstream.calls[0].body.count(b'name="timestamp_granularities[]"') == 2
    plan = client.core.cache.plan("transcription", body, scope="caller:anonymous", content_type=TYPE)
    assert send(client, body).headers["x-llm-cache-key"] == plan.digest


@pytest.mark.parametrize("before", ["/engines/org/deep/m", "/openai/deployments/org/deep/m"])
def test_the_model_in_the_path_takes_the_place_of_the_forms(served, upstream, disk, before):
    client = served()
    content = audio(2 * MIB)
    answers = [
        send(client, form(content), f"{before}/audio/transcriptions"),
        send(client, form(content, model="org/deep/m")),
        send(client, form(content)),
    ]
    assert [answer.headers["x-llm-cache"] for answer in answers] == ["miss", "hit", "miss"]
    assert [call.json["model"] for call in upstream.calls] == ["org/deep/m-up", "m-up"]


def test_cache_controls_hold(served, upstream, disk):
    client = served()
    body = form(audio(2 * MIB))
    assert [send(client, body, **{"cache-control": "no-store"}).status_code for _ in range(2)] == [200] * 2
    missing = send(client, body, **{"cache-control": "only-if-cached"})
    assert refused(missing)[0] == 504
    assert upstream.count == 2
    wrong = send(client, form(b"RIFF", cache="x"))
    assert wrong.status_code == 400
    assert upstream.count == 2


def test_a_form_that_is_compressed_is_read_whole(served, upstream):
    import gzip

    client = served()
    body = form(audio(2 * MIB))
    packed = send(client, gzip.compress(body), **{"content-encoding": "gzip"})
    assert packed.headers["x-llm-cache"] == "miss"
    assert send(client, body).headers["x-llm-cache"] == "hit"
    assert upstream.count == 1


# How it arrives -----------------------------------------------------------------------------------


def test_a_form_in_chunks(served, upstream, disk):
    client = served()
    content = audio(2 * MIB)
    body = form(content)

    def chunks():
        for at in range(0, len(body), 10_007):
            yield body[at : at + 10_007]

    assert send(client, chunks()).headers["x-llm-cache"] == "miss"
    assert send(client, body).headers["x-llm-cache"] == "hit"
    assert upstream.calls[0].json["file"] == content


def connected(client: serving.Client, *headers: str) -> socket.socket:
    """A connection that has sent the head of an upload."""
    host, port = client.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), serving.PATIENCE_S)
    lines = [f"POST {PATH} HTTP/1.1", "host: test", f"content-type: {TYPE}", *headers, "", ""]
    connection.sendall("\r\n".join(lines).encode())
    return connection


def test_a_client_that_waits_to_be_told_to_go_on(served, upstream, disk):
    client = served()
    content = audio(2 * MIB)
    body = form(content)
    with connected(client, f"content-length: {len(body)}", "expect: 100-continue") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        # Some servers say twice that the client may go on.
        answer = read_until(connection, b'"created"')
        assert re.search(rb"\r\n\r\nHTTP/1.[01] 200|\AHTTP/1.[01] 200", answer), answer
    assert upstream.calls[0].json["file"] == content


@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_a_client_that_leaves_in_the_middle(served, upstream, disk, size):
    client = served()
    body = form(audio(4 * MIB))
    with connected(client, f"content-length: {len(body)}") as connection:
        connection.sendall(body[:size])
        if size > 2 * MIB:
            until(lambda: disk() == 1, "the file is on disk")
    until(lambda: disk() == 0, "the file is gone")
    assert send(client, form(b"RIFF")).status_code == 200
    assert upstream.count == 1


def test_r53_a_client_that_leaves_while_the_call_is_made(served, upstream, disk):
    client = served()
    upstream.hold()
    body = form(audio(2 * MIB))
    with connected(client, f"content-length: {len(body)}") as connection:
        connection.sendall(body)
        upstream.wait_for(1)
        assert disk() == 1
    if client.front == "wsgi":  # a server of threads sees it when it answers
        upstream.release()
    until(lambda: disk() == 0, "the file is gone")
    until(lambda: serving.in_flight(client.core) == 0, "the call is over")


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
def test_a_form_that_is_too_large_is_refused_at_once(served, upstream, disk, chunked):
    client = served(server={"max_body_bytes": 3 * MIB})
    assert send(client, form(audio(3 * MIB - 1000))).status_code == 200
    body = form(audio(3 * MIB + 200_000))
    framing = "transfer-encoding: chunked" if chunked else f"content-length: {len(body)}"
    with connected(client, framing) as connection:
        if chunked:  # there is no end to it
            connection.sendall(b"%x\r\n%b\r\n" % (len(body), body))
        answer = read_until(connection, b"}}")
    assert re.match(rb"HTTP/1.[01] 413", answer), answer
    assert b'"code":"request_too_large"' in answer.replace(b" ", b"")
    assert upstream.count == 1


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        piece = connection.recv(1 << 16)
        assert piece, data
        data += piece
    return data


WAV = b'name="file"; filename="a.wav"\r\n\r\nRIFF'
MODEL = b'name="model"\r\n\r\nm'
TEXT = b'name="file"\r\n\r\nRIFF'
LONG = b"x" * (LONGEST_FIELD + 1)
REFUSED = {
    "two files": (raw(MODEL, WAV, WAV), "file"),
    "two files, one in brackets": (raw(MODEL, WAV, WAV.replace(b'"file"', b'"file[]"')), "file"),
    "no file": (raw(MODEL), "file"),
    "a text for a file": (raw(MODEL, TEXT), "file"),
    "a text and a file": (raw(MODEL, TEXT, WAV), "file"),
    "a file elsewhere": (raw(MODEL, WAV.replace(b'"file"', b'"prompt"')), "prompt"),
    "no model": (raw(WAV), "model"),
    "a field twice": (raw(MODEL, MODEL, WAV), "model"),
    "a long field": (raw(MODEL, b'name="prompt"\r\n\r\n' + LONG, WAV), "prompt"),
    "many fields": (raw(*[b'name="f%d"\r\n\r\n' % n for n in range(MOST_FIELDS)], WAV), None),
    "an address of its own": (raw(MODEL, b'name="api_base"\r\n\r\nhttp://x', WAV), "api_base"),
    "no end": (raw(MODEL, WAV)[:-6], None),
    "nothing": (b"", None),
    "no form": (b"{}", None),
    "a preamble": (b"x\r\n" + raw(MODEL, WAV), None),
    "no name": (raw(MODEL, b"x=1\r\n\r\n"), None),
    "a transfer encoding": (
        raw(MODEL, WAV.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n")),
        None,
    ),
    "long headers": (raw(MODEL, b"x=" + b"x" * 2**15 + b"\r\n\r\n"), None),
    "line feeds": (raw(MODEL, WAV).replace(b"\r\n", b"\n"), None),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_odd_forms_are_refused(served, upstream, disk, case):
    body, param = case
    client = served()
    answer = send(client, body)
    assert answer.status_code == 400
    assert error(answer)["param"] == param
    assert upstream.count == 0


@pytest.mark.parametrize("name", ["file", "prompt"])
def test_a_file_that_is_not_expected_is_refused_before_it_is_read(served, upstream, disk, name):
    client = served()
    second = f'--B\r\nContent-Disposition: form-data; name="{name}"; filename="b.wav"\r\n\r\n'.encode()
    begun = raw(MODEL, WAV).removesuffix(b"--B--\r\n") + second + audio(200_000)
    with connected(client, f"content-length: {4 * MIB}") as connection:
        connection.sendall(begun)
        assert re.match(rb"HTTP/1.[01] 400", read_until(connection, b"}}"))
    assert upstream.count == 0


def test_a_field_may_be_long_but_no_longer(served, upstream):
    client = served()
    fields = [b'name="f%d"\r\n\r\n1' % n for n in range(MOST_FIELDS - 3)]
    prompt = b'name="prompt"\r\n\r\n' + LONG[1:]
    assert send(client, raw(MODEL, prompt, *fields, WAV)).status_code == 200
    assert upstream.calls[0].json["prompt"] == LONG[1:].decode()


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", 'multipart/form-data; boundary=""', "multipart/form-data; boundary*=x"]
)
def test_a_form_without_a_boundary(served, kind):
    answer = served().post(PATH, content=form(b"RIFF"), headers={"content-type": kind})
    assert refused(answer) == (400, "invalid_request", None)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([raw, lambda body: body, lambda body: raw(MODEL, WAV, body)]))
def test_no_form_is_an_internal_error(clients, body, wrap):
    for client in clients:
        assert send(client, wrap(body)).status_code in (200, 400)


@pytest.fixture(scope="module")
def clients(asgi_server, wsgi_server):
    """Of a sub-app on each server."""
    with FakeUpstream() as upstream, contextlib.ExitStack() as stack:
        made = []
        for server in (asgi_server, wsgi_server):
            server.app = app = server.sub_app(serving.config(upstream))
            stack.callback(server.close, app)
            made.append(stack.enter_context(serving.Client(server.url, server.front, app.core)))
        yield made


def test_a_disk_that_takes_nothing(served, upstream, monkeypatch, tmp_path):
    client = served()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert refused(send(client, form(audio(2 * MIB)))) == (503, "upload_not_kept", None)
    assert upstream.count == 0
    assert send(client, form(audio(MIB // 2))).status_code == 200


# More than one call, more than one caller ---------------------------------------------------------


def two(upstream, other) -> list[dict[str, object]]:
    """Deployments of one model at two upstreams; the first is asked first."""
    return [
        serving.model("m", upstream, identity="one", order=1),
        serving.model("m", other, identity="two", order=2),
    ]


@pytest.mark.parametrize("http", [{}, {"client": "httpx"}], ids=str)
def test_a_retry_elsewhere_sends_the_same_file(served, upstream, disk, http):
    with FakeUpstream() as other:
        client = served(models=two(upstream, other), router={"num_retries": 2, "http": http})
        content = audio(2 * MIB)
        upstream.fail_next(500, n=9)
        answer = send(client, form(content))
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-llm-deployment"] == "two"
        sent = [call.json["file"] for up in (upstream, other) for call in up.calls]
        assert len(sent) >= 2
        assert all(file == content for file in sent)


class Hasty:
    """A provider that answers 503 once it has seen the head of a request, and reads no more."""

    def __init__(self) -> None:
        self.seen = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self._open.append(connection)
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(1024)
                self.seen += 1
                connection.sendall(b"HTTP/1.1 503 No\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}")

    def stop(self) -> None:
        for each in (self._listening, *self._open):
            each.close()


def test_a_provider_that_refuses_before_it_has_read_the_file(served, upstream, disk):
    hasty = Hasty()
    # A thread sends all of a request before it reads: what it cannot send holds it up for so long.
    client = served(models=two(hasty, upstream), router={"num_retries": 1, "timeout": 8, "http": {}})
    content = audio(2 * MIB)
    if client.front == "wsgi":
        content = content[: MIB // 2]
    answer = send(client, form(content))
    hasty.stop()
    assert answer.status_code == 200, answer.text
    assert hasty.seen == 1
    assert upstream.calls[0].json["file"] == content


def test_identical_uploads_at_once_make_one_call(served, upstream, disk):
    client = served()
    upstream.hold()
    bodies = [form(audio(2 * MIB), f"{n}.wav") for n in range(5)]
    answers = client.together(5, lambda: send(client, bodies.pop()))
    upstream.wait_for(1)
    until(lambda: serving.readers(client.core) == 4, "the others wait")
    upstream.release()
    got = answers()
    assert sorted(answer.headers["x-llm-cache"] for answer in got) == ["collapsed"] * 4 + ["miss"]
    assert len({answer.content for answer in got}) == 1
    assert upstream.count == 1


def test_a_stream_from_an_upload(served, upstream, disk):
    client = served()
    body = form(audio(2 * MIB), stream="true")
    answers = [send(client, body) for _ in range(2)]
    assert [answer.headers["x-llm-cache"] for answer in answers] == ["miss", "hit"]
    assert answers[0].content == answers[1].content
    assert upstream.count == 1


def test_a_stale_answer_is_refreshed_with_the_file(served, upstream, disk):
    client = served(cache={"type": "local", "ttl": 600, "stale_while_revalidate": 600})
    content = audio(2 * MIB)
    first = send(client, form(content))
    memory = client.core.cache._flow.lookup
    now = memory.clock()
    memory.clock = lambda: now + 900
    assert send(client, form(content)).content == first.content
    until(lambda: upstream.count == 2, "it is refreshed")
    assert upstream.calls[1].json["file"] == content


# Memory -------------------------------------------------------------------------------------------

COPY = 25 * MIB


def peak(pid: int) -> int:
    """The most memory that a process had since `forget`, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def forget(pid: int) -> int:
    """Begin to measure anew; what there is now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak(pid)


@pytest.mark.parametrize(
    ("name", "app"), [("uvicorn", "asgi"), ("uvicorn-h11", "asgi"), ("gunicorn-gthread", "wsgi")]
)
def test_memory_stays_small(upstream, name, app):
    """Neither what comes in nor what goes out is held: not one copy of a large recording, and not a third of
    twenty that come at once."""
    with (
        run_server(name, f"tests.api.hosts:{app}", {"FAKE_UPSTREAM_URL": upstream.url}) as url,
        serving.Client(f"{url}/llm", app, None) as client,
    ):
        pid = int(httpx.get(f"{url}/pid").text)
        for seed in range(3):
            assert send(client, form(audio(3 * MIB, seed + 100))).status_code == 200
        before = forget(pid)
        body = form(audio(COPY))
        assert [send(client, body).headers["x-llm-cache"] for _ in range(2)] == ["miss", "hit"]
        grown = peak(pid) - before
        assert (
            hashlib.sha256(upstream.calls[-1].json["file"]).digest() == hashlib.sha256(audio(COPY)).digest()
        )
        assert grown < 6 * MIB

        before = forget(pid)
        bodies = [form(audio(5 * MIB, seed)) for seed in range(20)]
        upstream.hold()
        answers = client.together(20, lambda: send(client, bodies.pop()))
        upstream.wait_for(5)
        upstream.release()
        assert [answer.status_code for answer in answers()] == [200] * 20
        grown = peak(pid) - before
        assert grown < 60 * MIB  # of 100; three for each
