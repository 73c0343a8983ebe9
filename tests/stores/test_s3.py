"""The S3 tier against two real servers: its contract, what it leaves in the bucket, and all that can fail."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import socket
import subprocess
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from llm_middleware import CacheManager
from llm_middleware._store_contract import ContractClock, StoreContract
from llm_middleware.errors import ConfigError, CorruptEntryError, StoreError
from llm_middleware.stores import s3, s3_fast
from llm_middleware.stores.s3 import S3Settings, S3Store
from llm_middleware.types import AsyncStore, Clock, Store
from tests import s3_services
from tests.s3_services import S3Server, without_aws
from tests.stores.on_loop import OnLoop

moto, swift = s3_services.moto, s3_services.swift  # fixtures

ROOT = Path(__file__).parents[2]
BUCKET = "answers"
NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT
READERS = ["boto3", "obstore"]


def key(number: int, namespace: str = "llm") -> str:
    return f"{namespace}:{number:064x}"


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_aws(patch)
        yield


class Stores:
    """Makes stores on one face, and closes them at the end."""

    def __init__(self, face: str, runner: asyncio.Runner) -> None:
        self.face = face
        self.runner = runner
        self.made: list[S3Store] = []

    @classmethod
    @contextlib.contextmanager
    def on_face(cls, face: str) -> Iterator[Stores]:
        with asyncio.Runner() as runner:
            stores = cls(face, runner)
            yield stores
            for store in stores.made:
                store.close()

    def __call__(self, settings: dict[str, object], clock: Clock | None = None) -> S3Store | OnLoop:
        store = S3Store.from_settings(settings, clock=clock or ContractClock(NOW))
        self.made.append(store)
        return store if self.face == "sync" else OnLoop(store, self.runner)

    def on(self, server: S3Server, clock: Clock | None = None, **changes: object) -> S3Store | OnLoop:
        """A store on the server's bucket, with a path of its own unless told."""
        changes.setdefault("s3_path", uuid.uuid4().hex)
        return self(settings_on(server, **changes), clock)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each face with each reader on moto, and on Swift, which takes its time, each of them once."""
    given = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    names = [name for name in _WAYS if name in metafunc.fixturenames and name not in given]
    ways = [("moto", face, reader) for face in ("sync", "async") for reader in READERS]
    ways += [("swift", "sync", "boto3"), ("swift", "async", "obstore")]
    chosen = [tuple(way[_WAYS.index(name)] for name in names) for way in ways]
    if names:
        metafunc.parametrize(names, list(dict.fromkeys(chosen)), indirect=True)


_WAYS = ("server", "stores", "reader")


@pytest.fixture
def stores(request: pytest.FixtureRequest) -> Iterator[Stores]:
    with Stores.on_face(request.param) as made:
        yield made


@pytest.fixture
def reader(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def server(request: pytest.FixtureRequest) -> S3Server:
    return request.getfixturevalue(request.param)


def settings_on(server: S3Server, **changes: object) -> dict[str, object]:
    if server.name not in _with_bucket:
        with contextlib.closing(server.client()) as client:
            client.create_bucket(Bucket=BUCKET)
        _with_bucket.add(server.name)
    return server.settings(BUCKET, **changes)


_with_bucket: set[str] = set()


@contextlib.contextmanager
def bucket_of(server: S3Server) -> Iterator[Any]:
    with contextlib.closing(server.client()) as client:
        yield client


def names_in(server: S3Server, path: str) -> list[str]:
    """The keys of all objects below a path."""
    with bucket_of(server) as client:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{path}/")
        return [item["Key"] for page in pages for item in page.get("Contents", ())]


def head(server: S3Server, name: str) -> dict[str, Any]:
    with bucket_of(server) as client:
        return client.head_object(Bucket=BUCKET, Key=name)


def run(script: str, settings: dict[str, object]) -> list[str]:
    """The lines that a new Python prints."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout.splitlines()


CASES = [f"moto {face} {reader}" for face in ("sync", "async") for reader in READERS]
CASES += ["swift sync boto3", "swift async obstore"]  # it takes its time


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
class TestContract(StoreContract):
    """C38, C117 and the rest of what every store does."""

    @pytest.fixture(autouse=True)
    def take(self, case: str, request: pytest.FixtureRequest) -> Iterator[None]:
        server, face, self.reader = case.split()
        self.many = 600 if server == "moto" else 60
        self.server = request.getfixturevalue(server)
        with Stores.on_face(face) as self.stores:
            yield

    def make_store(self, clock: Clock) -> Store:
        return self.stores.on(self.server, clock, client=self.reader)


def test_it_has_both_faces(moto: S3Server) -> None:
    store = S3Store.from_settings(settings_on(moto))
    assert isinstance(store, Store)
    assert isinstance(store, AsyncStore)
    assert store.tier == "s3"


# What is in the bucket


def test_an_object_says_what_it_is_and_when_it_is_over(server: S3Server, stores: Stores) -> None:
    store = stores.on(server, ContractClock(NOW + 0.25), s3_path="said")
    store.set(key(1), b"value", 60.5)
    found = head(server, f"said/llm/{1:064x}")
    assert found["ContentType"] == "application/octet-stream"
    assert found["CacheControl"] == "max-age=60"
    assert found["Expires"] == datetime(2023, 11, 14, 22, 14, 20, tzinfo=UTC)
    name = "Llm-Expires" if server.name == "swift" else "llm-expires"
    assert found["Metadata"] == {name: "1700000060.75"}


@pytest.mark.parametrize("ttl", [None, float("inf")])
def test_an_object_without_an_end_says_none(server: S3Server, stores: Stores, ttl: float | None) -> None:
    stores.on(server, s3_path="endless").set(key(1), b"value", ttl)
    found = head(server, f"endless/llm/{1:064x}")
    assert "CacheControl" not in found
    assert "Expires" not in found
    assert list(found["Metadata"].values()) == ["inf"]


def test_an_end_beyond_all_dates_is_kept(moto: S3Server, stores: Stores, reader: str) -> None:
    store = stores.on(moto, s3_path=f"far-{reader}", client=reader)
    store.set(key(1), b"value", 1e15)
    found = head(moto, f"far-{reader}/llm/{1:064x}")
    assert found["Expires"] == datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert found["CacheControl"] == "max-age=1000000000000000"
    assert store.get(key(1)) == b"value"


NAMESPACES = {
    "": "=",
    "=": "=3D",
    "a": "a",
    "a:b": "a=3Ab",
    "a/b": "a=2Fb",
    "gpt-4.1_x": "gpt-4.1_x",
    ".": "=2E",
    "..": "=2E.",
    "~": "=7E",
    "a%2Fb": "a=252Fb",
    "é ?": "=C3=A9=20=3F",
    "\ud800": "=ED=A0=80",
}


def test_object_keys(server: S3Server, stores: Stores, reader: str) -> None:
    path = uuid.uuid4().hex
    store = stores.on(server, s3_path=path, client=reader)
    for namespace in NAMESPACES:
        store.set(key(1, namespace), ascii(namespace).encode(), 60)
    assert sorted(names_in(server, path)) == sorted(f"{path}/{part}/{1:064x}" for part in NAMESPACES.values())
    found = [store.get(key(1, namespace)) for namespace in NAMESPACES]
    assert found == [ascii(namespace).encode() for namespace in NAMESPACES]
    for number, namespace in enumerate(NAMESPACES, start=1):
        assert store.flush(namespace) == 1
        assert len(names_in(server, path)) == len(NAMESPACES) - number


@pytest.mark.parametrize(
    ("path", "prefix"), [("", ""), ("p", "p/"), ("/p/", "p/"), ("p//q/", "p/q/"), (None, "")]
)
def test_the_path_goes_before_every_key(moto: S3Server, path: str | None, prefix: str) -> None:
    store = S3Store.from_settings(settings_on(moto, s3_path=path))
    assert store._name("a:b") == f"{prefix}a/b"


def test_a_flush_leaves_what_is_not_its_own(server: S3Server, stores: Stores) -> None:
    path = uuid.uuid4().hex
    outer, inner = stores.on(server, s3_path=path), stores.on(server, s3_path=f"{path}/a")
    outer.set(key(1, "a"), b"outer", 60)
    inner.set(key(1, "b"), b"inner", 60)
    with bucket_of(server) as client:
        client.put_object(Bucket=BUCKET, Key=f"{path}/a", Body=b"theirs")
        client.put_object(Bucket=BUCKET, Key=f"{path}/a/b/c/theirs", Body=b"theirs")
    assert outer.flush("a") == 1
    assert names_in(server, path) == [f"{path}/a", f"{path}/a/b/{1:064x}", f"{path}/a/b/c/theirs"]
    assert inner.get(key(1, "b")) == b"inner"


def test_a_flush_and_a_purge_go_through_all_pages(
    server: S3Server, stores: Stores, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PAGE", 3)
    time = ContractClock(NOW)
    store = stores.on(server, time)
    for number in range(8):
        store.set(key(number, "a"), b"value", 60)
        store.set(key(number, "b"), b"value", 60 + number)
    assert store.flush("a") == 8
    time.advance(64)
    assert store.purge_expired() == 5
    assert store.flush("b") == 3


# C74: an object whose time is over


def test_an_expired_object_is_a_miss_and_is_purged(server: S3Server, stores: Stores, reader: str) -> None:
    time, path = ContractClock(NOW), uuid.uuid4().hex
    store = stores.on(server, time, s3_path=path, client=reader)
    store.set(key(1, "a"), b"short", 10)
    store.set(key(2, "a"), b"long", 100)
    store.set(key(3, "b"), b"short", 10)
    store.set(key(4, "b"), b"endless", None)
    time.advance(10)
    assert [store.get(key(number, "a")) for number in (1, 2)] == [None, b"long"]
    assert len(names_in(server, path)) == 4
    assert store.purge_expired() == 2
    assert names_in(server, path) == [f"{path}/a/{2:064x}", f"{path}/b/{4:064x}"]
    assert store.purge_expired() == 0


def test_a_purge_leaves_what_others_keep(server: S3Server, stores: Stores) -> None:
    time, path = ContractClock(NOW), uuid.uuid4().hex
    store, nested = stores.on(server, time, s3_path=path), stores.on(server, time, s3_path=f"{path}/nested")
    store.set(key(1, "a"), b"short", 10)
    nested.set(key(1, "a"), b"short", 10)
    theirs = [f"{path}/a/theirs", f"{path}/theirs"]
    with bucket_of(server) as client:
        for name in theirs:
            client.put_object(Bucket=BUCKET, Key=name, Body=b"", Expires=NOW, Metadata={"expires": "1"})
    time.advance(1000)
    assert store.purge_expired() == 1
    assert names_in(server, path) == [theirs[0], f"{path}/nested/a/{1:064x}", theirs[1]]


def test_other_clients_see_the_same_expiry(moto: S3Server, stores: Stores) -> None:
    """One store writes, another with a clock of its own reads: on whose clock it is over decides."""
    path = uuid.uuid4().hex
    stores.on(moto, ContractClock(NOW), s3_path=path).set(key(1), b"value", 60)
    assert stores.on(moto, ContractClock(NOW + 59), s3_path=path).get(key(1)) == b"value"
    assert stores.on(moto, ContractClock(NOW + 61), s3_path=path).get(key(1)) is None


@pytest.mark.parametrize("metadata", [{}, {"llm-expires": "soon"}, {"expires": "1"}])
def test_a_foreign_object_is_corrupt(
    server: S3Server, stores: Stores, reader: str, metadata: dict[str, str]
) -> None:
    """C31."""
    path = uuid.uuid4().hex
    store = stores.on(server, s3_path=path, client=reader)
    with bucket_of(server) as client:
        client.put_object(Bucket=BUCKET, Key=f"{path}/llm/{1:064x}", Body=b"theirs", Metadata=metadata)
    with pytest.raises(CorruptEntryError) as caught:
        store.get(key(1))
    assert caught.value.code == "corrupt_entry"
    assert store.delete([key(1)]) == 1
    assert store.get(key(1)) is None


# Through a cache manager


def embeddings(body: bytes) -> bytes:
    inputs = json.loads(body)["input"]
    rows = [{"object": "embedding", "index": at, "embedding": [float(t)]} for at, t in enumerate(inputs)]
    return json.dumps({"object": "list", "data": rows, "model": "m", "usage": {"total_tokens": 1}}).encode()


def test_a_list_of_embeddings_is_answered_from_the_bucket(moto: S3Server, face: Any, reader: str) -> None:
    """C92."""
    asked: list[list[str]] = []

    def handler(body: bytes) -> bytes:
        asked.append(json.loads(body)["input"])
        return embeddings(body)

    store = S3Store.from_settings(settings_on(moto, s3_path=uuid.uuid4().hex, client=reader))
    cache = CacheManager(store=store, store_timeout=30)
    texts = [str(number) for number in range(40)]
    for inputs in (texts, texts[::-1], [*texts[:5], "40"]):
        body = json.dumps({"model": "m", "input": inputs}).encode()
        answer = face.fetch(cache, body, handler, scope="x", kind="embedding")
        rows = json.loads(answer.body)["data"]
        assert [row["embedding"] for row in rows] == [[float(text)] for text in inputs]
        assert [row["index"] for row in rows] == list(range(len(inputs)))
    assert asked == [texts, ["40"]]
    face.do(cache, "close")


def test_a_failing_bucket_is_seen_and_costs_no_call(moto: S3Server, face: Any, reader: str) -> None:
    """C72: the call goes on, the failure is counted, and ping tells it."""
    store = S3Store.from_settings(moto.settings("missing-bucket", client=reader))
    cache = CacheManager(store=store, store_timeout=30)
    body = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'
    answer = {"choices": [{"index": 0, "message": {"content": "hello"}, "finish_reason": "stop"}]}
    got = face.fetch(cache, body, lambda _: json.dumps(answer).encode(), scope="x")
    assert json.loads(got.body) == answer
    with pytest.raises(StoreError, match="NoSuchBucket"):
        face.do(cache, "ping")
    assert cache.stats() == {"miss": 1, "not-stored": 1, "store-error": 1, "flights": 0}
    face.do(cache, "close")


def chat(text: str) -> bytes:
    message = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
    return json.dumps({"choices": [message]}).encode()


def ask(text: str, **controls: object) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    return json.dumps({**body, "cache": controls} if controls else body).encode()


def bucket_cache(server: S3Server, path: str, clock: Clock, **settings: object) -> CacheManager:
    given = {"memory_tier": False, "ttl_jitter": 0, "store_timeout": 30}
    return CacheManager("s3", clock=clock, **settings_on(server, s3_path=path), **given, **settings)


@pytest.mark.parametrize("ttl", ["60", "60.0", 60])
@pytest.mark.parametrize("where", ["settings", "body", "call"])
def test_c73_a_time_to_live_may_be_text(
    moto: S3Server, face: Any, clock: Clock, ttl: object, where: str
) -> None:
    path = uuid.uuid4().hex
    cache = bucket_cache(moto, path, clock, ttl=ttl if where == "settings" else 5)
    body = ask("hi", ttl=ttl) if where == "body" else ask("hi")
    options = {"controls": {"ttl": ttl}} if where == "call" else {}
    answer = face.fetch(cache, body, lambda _: chat("hello"), scope="x", **options)
    assert answer.cache.status == "miss"
    (name,) = names_in(moto, path)
    found = head(moto, name)
    assert found["Metadata"] == {"llm-expires": repr(clock() + 60)}
    assert found["CacheControl"] == "max-age=60"
    assert found["Expires"] == datetime.fromtimestamp(clock() + 60, UTC)
    face.do(cache, "close")


def test_an_answer_whose_time_is_over_is_asked_for_again(
    server: S3Server, face: Any, clock: Any, reader: str
) -> None:
    """C74."""
    path = uuid.uuid4().hex
    cache = bucket_cache(server, path, clock, ttl="60", client=reader)
    asked: list[str] = []

    def handler(body: bytes) -> bytes:
        asked.append(json.loads(body)["messages"][0]["content"])
        return chat("hello")

    def statuses(*texts: str) -> list[str]:
        return [face.fetch(cache, ask(text), handler, scope="x").cache.status for text in texts]

    assert statuses("a", "b", "a") == ["miss", "miss", "hit"]
    clock.advance(60)
    assert statuses("a", "a") == ["miss", "hit"]
    assert asked == ["a", "b", "a"]
    assert len(names_in(server, path)) == 2
    store = S3Store.from_settings(settings_on(server, s3_path=path), clock=clock)
    assert store.purge_expired() == 1
    assert len(names_in(server, path)) == 1
    assert statuses("a") == ["hit"]
    clock.advance(60)
    assert store.purge_expired() == 1
    assert names_in(server, path) == []
    store.close()
    face.do(cache, "close")


# C72: what fails is an error with a code and no secret


OPERATIONS: dict[str, Callable[[Any], object]] = {
    "get": lambda store: store.get(key(1)),
    "set": lambda store: store.set(key(1), b"value", 60),
    "set expired": lambda store: store.set(key(1), b"value", 0),
    "delete": lambda store: store.delete([key(1)]),
    "delete many": lambda store: store.delete([key(1), key(2)]),
    "flush": lambda store: store.flush("llm"),
    "heads": lambda store: store.heads("llm", None, 8),
    "purge": lambda store: store.purge_expired(),
    "ping": lambda store: store.ping(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_secret(swift: S3Server, stores: Stores, reader: str, operation: str) -> None:
    secrets = {"s3_aws_secret_access_key": "wrong-secret", "s3_aws_session_token": "a-session-token"}
    store = stores.on(swift, client=reader, **secrets)
    with pytest.raises(StoreError) as caught:
        OPERATIONS[operation](store)
    # S3 answers HEAD, which comes first in a delete, without a body that could tell more.
    expected = "http_403" if operation.startswith("delete") else "SignatureDoesNotMatch"
    assert caught.value.code == expected
    shown = "".join(traceback.format_exception(caught.value))
    assert not [secret for secret in secrets.values() if secret in shown]
    assert "StringToSign" not in shown


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_missing_bucket(server: S3Server, stores: Stores, reader: str, operation: str) -> None:
    store = stores(server.settings("missing-bucket", client=reader))
    with pytest.raises(StoreError, match="NoSuchBucket") as caught:
        OPERATIONS[operation](store)
    assert caught.value.code == "NoSuchBucket"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nobody_listens(stores: Stores, reader: str, operation: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    store = stores(local(url, client=reader))
    with pytest.raises(StoreError) as caught:
        OPERATIONS[operation](store)
    assert caught.value.code == "unreachable"


def local(url: str, **changes: object) -> dict[str, object]:
    """Settings of a server that checks nothing."""
    return S3Server("", url, "key", "secret", 0).settings(BUCKET, **changes)


class Canned:
    """An S3 server in a thread that gives one answer to each method, and keeps what it was asked."""

    def __init__(self, **answers: tuple[int, bytes]) -> None:
        self.asked: list[str] = []
        self.headers: list[Any] = []
        canned = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                canned.asked.append(self.command)
                canned.headers.append(self.headers)
                self.rfile.read(int(self.headers.get("content-length") or 0))
                status, body = answers[self.command]
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Canned:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def refusal(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>secret</Message></Error>".encode()


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ((403, refusal("AccessDenied")), "AccessDenied"),
        ((503, refusal("SlowDown")), "SlowDown"),
        ((500, refusal("InternalError")), "InternalError"),
        ((404, refusal("NoSuchBucket")), "NoSuchBucket"),
        ((502, b"<html>Bad gateway</html>"), "http_502"),
        ((400, b""), "http_400"),
    ],
)
def test_refusals_are_told_by_code_and_not_repeated(
    stores: Stores, reader: str, answer: tuple[int, bytes], code: str
) -> None:
    with Canned(GET=answer, PUT=answer) as server:
        store = stores(local(server.url, client=reader))
        for operation in ("get", "set"):
            with pytest.raises(StoreError) as caught:
                OPERATIONS[operation](store)
            assert caught.value.code == code
            assert str(caught.value) == f"s3 {operation} failed: {code}"
        assert server.asked == ["GET", "PUT"]


def test_a_body_is_sent_at_once(stores: Stores) -> None:
    """boto3 would ask whether to send it, and wait a second where nobody answers that."""
    with Canned(PUT=(200, b"")) as server:
        stores(local(server.url)).set(key(1), b"value", 60)
    (headers,) = server.headers
    assert "Expect" not in headers
    assert headers["content-length"] == "5"
    assert headers["x-amz-meta-llm-expires"] == "1700000060.0"
    assert not [name for name in headers if "checksum" in name or "trailer" in name]


def test_an_object_that_cannot_be_removed_is_an_error(stores: Stores) -> None:
    """S3 says so in an answer of status 200."""
    denied = b"<Error><Key>x</Key><Code>AccessDenied</Code><Message>No</Message></Error>"
    result = b"<DeleteResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>" + denied + b"</DeleteResult>"
    with Canned(HEAD=(404, b""), POST=(200, result)) as server:
        store = stores(local(server.url))
        with pytest.raises(StoreError) as caught:
            store.delete([key(1)])
    assert caught.value.code == "AccessDenied"


# Slow servers


class Silent:
    """Takes connections and requests and sends what ``speak`` sends, else nothing."""

    def __init__(self, speak: Callable[[socket.socket, threading.Event], None] | None = None) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._speak = speak
        self._stop = threading.Event()
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self.asked = threading.Semaphore(0)  # a request has come
        self.left = threading.Semaphore(0)  # a client has closed its connection

    @property
    def accepted(self) -> int:
        return len(self._connections)

    def __enter__(self) -> Silent:
        self._threads[0].start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            self.asked.release()
            if self._speak is not None:
                self._speak(connection, self._stop)
            while connection.recv(65536):
                pass
        self.left.release()


def trickle(connection: socket.socket, stop: threading.Event) -> None:
    """An object that comes in pieces, each soon enough, and never ends."""
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
    while not stop.wait(0.01):
        connection.sendall(b"x" * 20_000)


@pytest.mark.parametrize("operation", ["get", "set", "delete", "ping"])
def test_a_server_that_does_not_answer_costs_the_timeout(stores: Stores, reader: str, operation: str) -> None:
    with Silent() as server:
        store = stores(local(server.url, timeout=0.2, client=reader))
        with pytest.raises(StoreError) as caught:
            OPERATIONS[operation](store)
        assert caught.value.code == "timeout"
        assert server.asked.acquire(timeout=10)
        assert server.left.acquire(timeout=10)


def test_an_object_that_does_not_end_costs_the_timeout(stores: Stores, reader: str) -> None:
    with Silent(trickle) as server:
        store = stores(local(server.url, timeout=0.2, client=reader))
        with pytest.raises(StoreError) as caught:
            store.get(key(1))
        assert caught.value.code == "timeout"
        assert server.left.acquire(timeout=10)


def pool_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "llm-middleware-s3" in thread.name]


@pytest.mark.parametrize("reader", READERS)
def test_a_cancelled_call_leaves_nothing_behind(reader: str) -> None:
    async def cancel() -> None:
        store = S3Store.from_settings(local(server.url, timeout=1, client=reader))
        task = asyncio.create_task(store.aget(key(1)))
        assert await asyncio.to_thread(server.asked.acquire, timeout=10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await store.aclose()
        assert pool_threads() == []
        assert await asyncio.to_thread(server.left.acquire, timeout=10)

    with Silent() as server:
        asyncio.run(cancel())
    assert server.accepted == 1


def test_a_call_cancelled_in_the_queue_is_never_made() -> None:
    async def cancel() -> None:
        store = S3Store.from_settings(local(server.url, timeout=1, client="boto3", threads=1))
        first = asyncio.create_task(store.aget(key(1)))
        assert await asyncio.to_thread(server.asked.acquire, timeout=10)
        second = asyncio.create_task(store.aset(key(2), b"value", 60))
        await asyncio.sleep(0)
        second.cancel()
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(result) for result in results] == [StoreError, asyncio.CancelledError]
        await store.aclose()

    with Silent() as server:
        asyncio.run(cancel())
    assert server.accepted == 1


def test_a_cancelled_flush_ends_with_its_page(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_PAGE", 2)

    async def cancel() -> None:
        store = S3Store.from_settings(settings_on(moto, s3_path=uuid.uuid4().hex))
        for number in range(6):
            await store.aset(key(number), b"value", 60)
        removed, remove = threading.Event(), store._remove

        def remove_once(client: Any, names: list[str]) -> int:
            count = remove(client, names)
            loop.call_soon_threadsafe(task.cancel)
            removed.wait()
            return count

        monkeypatch.setattr(store, "_remove", remove_once)
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(store.aflush("llm"))
        with pytest.raises(asyncio.CancelledError):
            await task
        removed.set()
        monkeypatch.undo()
        assert await store.aflush("llm") == 4
        await store.aclose()

    asyncio.run(cancel())


def test_a_store_serves_many_at_once(moto: S3Server, reader: str) -> None:
    store = S3Store.from_settings(settings_on(moto, s3_path=uuid.uuid4().hex, client=reader, threads=4))

    async def use() -> list[bytes | None]:
        await asyncio.gather(*(store.aset(key(number), b"%d" % number, 60) for number in range(64)))
        return await asyncio.gather(*(store.aget(key(number)) for number in range(64)))

    assert asyncio.run(use()) == [b"%d" % number for number in range(64)]
    assert len(pool_threads()) == 4
    assert asyncio.run(use()) == [b"%d" % number for number in range(64)]  # on another event loop
    store.close()
    assert pool_threads() == []


# Processes


FORK = """
import asyncio, json, os, signal, sys
from llm_middleware.stores.s3 import S3Store

store = S3Store.from_settings(json.loads(sys.argv[1]))
store.set("llm:1", b"from the parent", 60)
print(store.get("llm:1"), asyncio.run(store.aget("llm:1")), store.ping()["reads"], flush=True)
child = os.fork()
if child == 0:
    signal.alarm(30)
    print(store.get("llm:1"), asyncio.run(store.aget("llm:1")), store.ping()["reads"], flush=True)
    asyncio.run(store.aset("llm:2", b"from the child", 60))
    store.close()
    os._exit(0)
print(os.waitpid(child, 0)[1], store.get("llm:2"), store.ping()["reads"])
asyncio.run(store.aset("llm:1", b"again", 60))
print(store.get("llm:1"))
store.close()
"""


@pytest.mark.parametrize("reader", READERS)
def test_a_fork_makes_clients_of_its_own(moto: S3Server, reader: str) -> None:
    """obstore's threads do not survive a fork: the child reads with boto3."""
    changes = {"client": "auto"} if reader == "obstore" else {"client": "boto3"}
    assert run(FORK, settings_on(moto, s3_path=uuid.uuid4().hex, **changes)) == [
        f"b'from the parent' b'from the parent' {reader}",
        "b'from the parent' b'from the parent' boto3",
        f"0 b'from the child' {reader}",
        "b'again'",
    ]


PRELOADED = """
import json, os, signal, sys
from llm_middleware.stores.s3 import S3Store

store = S3Store.from_settings(json.loads(sys.argv[1]))
child = os.fork()
if child == 0:
    signal.alarm(30)
    store.set("llm:1", b"value", 60)
    print(store.get("llm:1"), store.ping()["reads"], flush=True)
    store.close()
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


def test_a_store_made_before_a_fork_may_use_obstore(moto: S3Server) -> None:
    assert run(PRELOADED, settings_on(moto, s3_path=uuid.uuid4().hex)) == ["b'value' obstore", "0"]


PATCHED = """
from gevent import monkey
monkey.patch_all()
import json, sys
from llm_middleware.stores.s3 import S3Store

store = S3Store.from_settings(json.loads(sys.argv[1]))
store.set("llm:1", b"value", 60)
print(store.get("llm:1"), store.ping()["reads"])
store.close()
"""


def test_gevent_is_not_blocked(moto: S3Server) -> None:
    assert run(PATCHED, settings_on(moto, s3_path=uuid.uuid4().hex)) == ["b'value' boto3"]


LAZY = """
import json, sys, threading
import llm_middleware.stores.s3 as s3
assert not {"boto3", "botocore", "obstore"} & set(sys.modules)
store = s3.S3Store.from_settings(json.loads(sys.argv[1]))
print(threading.active_count())
store.close()
"""


def test_nothing_connects_before_it_is_used() -> None:
    with Silent() as server:
        assert run(LAZY, local(server.url)) == ["1"]
        assert server.accepted == 0


# Credentials


def test_credentials_that_are_renewed(
    swift: S3Server, stores: Stores, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As roles have them: boto3 is asked for them, and obstore signs with what it says."""
    keys = {
        "Version": 1,
        "AccessKeyId": swift.access_key_id,
        "SecretAccessKey": swift.secret_access_key,
        "Expiration": "2999-01-01T00:00:00Z",
    }
    source, config = tmp_path / "keys.json", tmp_path / "config"
    source.write_text(json.dumps(keys))
    config.write_text(f"[default]\ncredential_process = cat {source}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    given = {"s3_aws_access_key_id": None, "s3_aws_secret_access_key": None}
    store = stores.on(swift, client=reader, **given)
    store.set(key(1), b"value", 60)
    assert store.get(key(1)) == b"value"
    assert store.ping()["reads"] == reader


def test_without_credentials(moto: S3Server, stores: Stores) -> None:
    store = stores.on(moto, s3_aws_access_key_id=None, s3_aws_secret_access_key=None)
    with pytest.raises(StoreError) as caught:
        store.get(key(1))
    assert caught.value.code == "NoCredentialsError"


def test_obstore_asks_for_credentials_once(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    provider = s3_fast._provider

    def counting(credentials: Any) -> Callable[[], object]:
        provide = provider(credentials)
        return lambda: asked.append("asked") or provide()

    monkeypatch.setattr(s3_fast, "_provider", counting)
    store = S3Store.from_settings(settings_on(moto, client="obstore"))
    for number in range(5):
        assert store.get(key(number, "nothing")) is None
    assert asked == ["asked"]
    store.close()


# Who reads


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({}, "obstore"),
        ({"client": "boto3"}, "boto3"),
        ({"s3_api_version": "2006-03-01"}, "obstore"),
        ({"s3_config": {"max_pool_connections": 5, "signature_version": "s3v4"}}, "obstore"),
        ({"s3_config": {"s3": {"addressing_style": "path"}}}, "obstore"),
        ({"s3_config": {"s3": {"addressing_style": "virtual"}}}, "boto3"),
        ({"s3_config": {"signature_version": "s3"}}, "boto3"),
        ({"s3_config": {"proxies": {"http": "http://127.0.0.1:1"}}}, "boto3"),
        ({"s3_config": {"read_timeout": 9}}, "boto3"),
        ({"s3_verify": "/ca.pem"}, "obstore"),
        ({"s3_verify": "/ca.pem", "s3_endpoint_url": "https://127.0.0.1:1"}, "boto3"),
        ({"s3_verify": False, "s3_endpoint_url": "https://127.0.0.1:1"}, "obstore"),
        ({"s3_bucket_name": "arn:aws:s3:us-east-1:123456789012:accesspoint/mine"}, "boto3"),
        ({"s3_bucket_name": "mine--use1-az4--x-s3"}, "boto3"),
    ],
)
def test_who_reads(changes: dict[str, object], reads: str) -> None:
    store = S3Store.from_settings({**local("http://127.0.0.1:1"), **changes})
    assert ("boto3" if store._clients()[1] is None else "obstore") == reads
    store.close()
    if reads == "boto3" and "client" not in changes:
        with pytest.raises(ConfigError, match="client='obstore': it ") as caught:
            S3Store.from_settings({**local("http://127.0.0.1:1"), **changes, "client": "obstore"})._clients()
        assert caught.value.param == "client"


def test_certificates_named_in_the_environment_are_boto3s(monkeypatch: pytest.MonkeyPatch) -> None:
    import certifi

    monkeypatch.setenv("AWS_CA_BUNDLE", certifi.where())
    store = S3Store.from_settings(local("https://127.0.0.1:1"))
    assert store._clients()[1] is None
    store.close()


@pytest.mark.parametrize(
    ("changes", "endpoint", "virtual"),
    [
        ({"s3_region_name": "eu-west-1"}, "https://answers.s3.eu-west-1.amazonaws.com", True),
        ({}, "https://answers.s3.amazonaws.com", True),
        ({"s3_use_ssl": "false"}, "http://answers.s3.amazonaws.com", True),
        ({"s3_region_name": "cn-north-1"}, "https://answers.s3.cn-north-1.amazonaws.com.cn", True),
        ({"s3_bucket_name": "my.answers"}, "https://s3.amazonaws.com", False),
        ({"s3_config": {"s3": {"addressing_style": "path"}}}, "https://s3.amazonaws.com", False),
        ({"s3_endpoint_url": "https://minio:9000"}, "https://minio:9000", False),
    ],
)
def test_where_obstore_reads(changes: dict[str, object], endpoint: str, virtual: bool) -> None:
    settings = {**local("http://127.0.0.1:1"), "s3_endpoint_url": None, **changes}
    store = S3Store.from_settings(settings)
    fast = store._clients()[1]
    assert fast is not None
    config = fast._store.config
    assert config["endpoint"] == endpoint
    assert config["virtual_hosted_style_request"] == str(virtual).lower()
    assert config["region"] == settings.get("s3_region_name")
    store.close()


@pytest.mark.parametrize(
    ("module", "client", "extra"),
    [("botocore.config", "auto", "s3"), ("obstore.store", "obstore", "s3-fast")],
)
def test_a_missing_package_is_named(
    module: str, client: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as caught:
        S3Store.from_settings(local("http://127.0.0.1:1", client=client))._clients()
    assert f"pip install 'llm-middleware[{extra}]'" in caught.value.message


def test_without_obstore_boto3_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    store = S3Store.from_settings(local("http://127.0.0.1:1"))
    assert store._clients()[1] is None
    store.close()


# Settings


def test_ping_tells_the_connection_and_no_secret(moto: S3Server, stores: Stores, reader: str) -> None:
    store = stores.on(moto, s3_path="p/q", client=reader, s3_aws_session_token="a-token")
    found = store.ping()
    assert found.pop("latency_ms") > 0
    assert found.pop("server").startswith("Werkzeug/")
    assert found == {
        "bucket": BUCKET,
        "path": "p/q",
        "endpoint": moto.url,
        "region": "us-east-1",
        "reads": reader,
    }


def test_text_as_an_environment_has_it() -> None:
    settings = S3Settings(
        s3_bucket_name="b",
        s3_use_ssl="False",
        s3_verify="false",
        timeout="0.5",
        threads="3",
        s3_config=None,
    )
    assert settings == S3Settings(
        s3_bucket_name="b", s3_use_ssl=False, s3_verify=False, timeout=0.5, threads=3, s3_config={}
    )
    assert S3Settings(s3_bucket_name="b", s3_verify=Path("/ca.pem")).s3_verify == "/ca.pem"
    assert S3Settings(s3_bucket_name="b", s3_verify=True).s3_verify is True


def test_settings_do_not_show_secrets() -> None:
    settings = S3Settings(
        s3_bucket_name="b",
        s3_aws_access_key_id="id-1",
        s3_aws_secret_access_key="secret-1",
        s3_aws_session_token="secret-2",
        s3_config={"proxies": {"http": "http://user:secret-3@proxy"}},
    )
    assert "secret" not in repr(settings).replace("s3_aws_secret_access_key", "")
    assert "id-1" not in repr(settings)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("s3_bucket", "'s3_bucket_name'"),
        ("s3_endpoint", "'s3_endpoint_url'"),
        ("s3_aws_secret_key", "'s3_aws_secret_access_key'"),
        ("timeouts", "'timeout'"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        S3Store.from_settings({"s3_bucket_name": "b", name: "x"})
    assert caught.value.message == f"unknown S3 setting {name!r}; did you mean {nearest}?"
    assert caught.value.param == name


def test_an_unknown_setting_of_botocore_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        S3Store.from_settings({"s3_bucket_name": "b", "s3_config": {"read_timeouts": 1}})
    assert caught.value.message == (
        "unknown S3 setting 's3_config.read_timeouts'; did you mean 's3_config.read_timeout'?"
    )
    with pytest.raises(ConfigError) as caught:
        S3Store.from_settings({"s3_bucket_name": "b", "s3_config": {"retries": {"mode": "never"}}})
    assert caught.value.param == "s3_config"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("s3_bucket_name", ""),
        ("s3_bucket_name", None),
        ("s3_region_name", ""),
        ("s3_region_name", 1),
        ("s3_path", "a/../b"),
        ("s3_path", "./a"),
        ("s3_path", 5),
        ("s3_use_ssl", "maybe"),
        ("s3_use_ssl", None),
        ("s3_verify", ""),
        ("s3_endpoint_url", "localhost:9000"),
        ("s3_endpoint_url", "s3://bucket"),
        ("s3_endpoint_url", "https://user:secret-1@host"),
        ("s3_aws_secret_access_key", 1),
        ("s3_config", "secret-1"),
        ("timeout", 0),
        ("timeout", True),
        ("timeout", "nan"),
        ("timeout", "inf"),
        ("threads", 0),
        ("threads", 1.5),
        ("threads", True),
        ("threads", "many"),
        ("client", "minio"),
        ("client", ["auto"]),
    ],
)
def test_a_wrong_value_is_named_and_not_shown(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        S3Store.from_settings({"s3_bucket_name": "b", name: value})
    assert caught.value.param == name
    assert caught.value.message.startswith(f"{name}: expected ")
    assert "secret-1" not in caught.value.message
    assert caught.value.__cause__ is None


def test_the_clients_settings() -> None:
    """Short waits and no second try, unless ``s3_config`` says otherwise; longer waits for whole pages."""
    given = {"max_pool_connections": 7, "retries": {"total_max_attempts": 3}}
    for config, pool, attempts in (({}, 64, 1), (given, 7, 3)):
        store = S3Store.from_settings(local("http://127.0.0.1:1", timeout=0.25, s3_config=config))
        client, bulk = store._clients()[0], store._clients(bulk=True)[0]
        for made, read_timeout in ((client, 0.25), (bulk, 30.0)):
            assert made.meta.config.connect_timeout == 0.25
            assert made.meta.config.read_timeout == read_timeout
            assert made.meta.config.retries["total_max_attempts"] == attempts
            assert made.meta.config.signature_version == "s3v4"
            assert made.meta.config.max_pool_connections == pool
        assert store._clients()[0] is client
        assert store._clients(bulk=True)[0] is bulk
        store.close()
