"""`QdrantIndex` over real HTTP, against a server over Qdrant's own engine (`tests.servers.qdrant_edge`)."""

from __future__ import annotations

import asyncio
import math
import ssl
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from qdrant_client import models

from llm_middleware.errors import ConfigError, InvalidRequestError, StoreError
from llm_middleware.semantic.index_qdrant import QdrantIndex
from llm_middleware.semantic.records import AsyncVectorIndex, VectorIndex
from llm_middleware.testing import FakeClock
from llm_middleware.types import Clock
from tests.contract.vectors import (
    AsyncVectorIndexContract,
    AtomicStatesContract,
    Awaited,
    key_of,
    keys,
    make_row,
    scope_of,
    unit_vectors,
)
from tests.qdrant_services import API_KEY, ROOT, QdrantServer, answering, qdrant_server
from tests.services import FaultProxy, free_port, wait_for

AMPLE = 30.0  # seconds for a request where the machine may be busy
SHORT = 0.5  # and where none will be answered
LONGEST = 20.0  # no wait of SHORT takes that long, however busy the machine


@pytest.fixture(scope="module")
def server() -> Iterator[QdrantServer]:
    with qdrant_server("--indexing-threshold", "100") as server:
        yield server


@pytest.fixture(params=["sync", "async"])
def opened(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Opens indexes on one of the two faces, as sync ones, and closes them."""
    made: list[QdrantIndex] = []
    awaited: list[Awaited] = []

    def open_one(url: str, **settings: Any) -> VectorIndex:
        index = QdrantIndex(url, **{"api_key": API_KEY, "timeout": AMPLE, **settings})
        if request.param == "sync":
            made.append(index)
            return index
        awaited.append(Awaited(index))
        return awaited[-1]

    yield open_one
    for index in made:
        index.close()
    for each in awaited:
        each.end()


@pytest.fixture
def name(server: QdrantServer) -> Iterator[str]:
    """A collection that is not there yet."""
    name = f"test-{uuid.uuid4().hex}"
    yield name
    for each in (name, f"{name}-state"):
        server.drop(each)


class Contract(AtomicStatesContract):
    """One collection for all tests of a dimension, emptied: it takes long to make one."""

    threads = 2
    rounds = 15
    examples = 6

    @pytest.fixture(autouse=True)
    def _prepared(self, server: QdrantServer) -> None:
        self.server = server
        self.fuzzing = False

    def make(self, clock: Clock) -> QdrantIndex:
        name = f"{type(self).__name__}-{'fuzz' if self.fuzzing else 'tests'}"
        self.server.empty(name, f"{name}-state")
        return QdrantIndex(self.server.url, api_key=API_KEY, collection=name, timeout=AMPLE, clock=clock)

    def test_it_agrees_with_a_plain_list(self) -> None:
        self.fuzzing = True
        super().test_it_agrees_with_a_plain_list()


class TestSync(Contract):
    @contextmanager
    def open_index(self, clock: Clock) -> Iterator[VectorIndex]:
        with closing(self.make(clock)) as index:
            yield index


class TestAsync(Contract, AsyncVectorIndexContract):
    @contextmanager
    def open_async_index(self, clock: Clock) -> Iterator[AsyncVectorIndex]:
        yield self.make(clock)


class TestSettings:
    @pytest.mark.parametrize(
        "url",
        [
            "",
            "localhost:6333",
            "ftp://host",
            "http://",
            "http://host:port",
            "http://host:99999",
            "http://user:secret@host",
            "http://host?x=1",
            "http://host#x",
            "http://ho st",
            "http://h\u00f6st",
            None,
            7,
        ],
    )
    def test_bad_urls(self, url: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            QdrantIndex(url)
        assert caught.value.param == "qdrant_api_base"
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("dimensions", 0),
            ("dimensions", 1.5),
            ("dimensions", True),
            ("quantization", "ternary"),
            ("timeout", 0),
            ("timeout", math.inf),
            ("timeout", math.nan),
            ("timeout", "5"),
            ("timeout", True),
            ("collection", ""),
            ("collection", "a/b"),
            ("collection", "a" * 256),
            ("collection", None),
        ],
    )
    def test_bad_settings(self, setting: str, value: object) -> None:
        with pytest.raises(ConfigError, match=f"^{setting}: ") as caught:
            QdrantIndex("http://host", **{setting: value})  # type: ignore[arg-type]
        assert caught.value.param == setting

    @pytest.mark.parametrize("api_key", ["", "se cret", "se\ncret", "s\u00e9cret", 7])
    def test_bad_api_keys_are_not_shown(self, api_key: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            QdrantIndex("http://host", api_key=api_key)
        assert caught.value.param == "qdrant_api_key"
        assert "cret" not in str(caught.value)

    def test_nothing_connects_before_it_is_used(self) -> None:
        index = QdrantIndex(f"http://127.0.0.1:{free_port()}", api_key="secret")
        assert index.dimensions is None
        assert index.inline is False
        assert "secret" not in f"{vars(index)}"
        index.close()
        asyncio.run(index.aclose())

    def test_a_url_may_have_a_prefix(self, opened: Any) -> None:
        with answering(200, b'{"result": {"count": 7}}') as url:
            assert opened(f"{url}/qdrant/").count() == 7

    def test_https(self, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only of a server whose certificate is trusted."""
        authority = trustme.CA()
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(tls)
        with answering(200, b'{"result": {"count": 7}}', tls) as url:
            with pytest.raises(StoreError) as caught:
                opened(url).count()
            assert caught.value.code == "unreachable"
            authority.cert_pem.write_to_path(tmp_path / "ca.pem")
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
            assert opened(url).count() == 7


class TestWhatIsThere:
    """As Qdrant's own client sees it."""

    def test_rows(self, server: QdrantServer, opened: Any, name: str, clock: FakeClock) -> None:
        index = opened(server.url, collection=name, clock=clock)
        vectors = unit_vectors(2)
        index.add(
            make_row(1, vectors[0], namespace="a:b", text="Wie?", expires=clock() + 60, payload={"n": 1})
        )
        index.add(make_row(2, vectors[1], text="\ud800"))
        with server.client() as client:
            found, _ = client.scroll(name, with_payload=True, with_vectors=True)
            hit = client.query_points(name, query=vectors[0].tolist(), limit=1).points[0]
        payloads = sorted((point.payload for point in found), key=lambda payload: payload["expires"])
        assert payloads == [
            {
                "key": key_of(1, "a:b"),
                "scope": scope_of(0),
                "namespace": "a:b",
                "text": "Wie?",
                "expires": clock() + 60,
                "payload": '{"n":1}',
            },
            {
                "key": key_of(2),
                "scope": scope_of(0),
                "namespace": "a",
                "text": 'json:"\\ud800"',
                "expires": 1e18,
                "payload": "{}",
            },
        ]
        assert hit.score == pytest.approx(1, abs=1e-5)
        assert sorted(point.vector for point in found) == [
            pytest.approx(vector, abs=1e-6) for vector in sorted(vectors.tolist())
        ]

    def test_the_collection(self, server: QdrantServer, opened: Any, name: str) -> None:
        opened(server.url, collection=name).add(make_row(1, unit_vectors(1)[0]))
        with server.client() as client:
            found = client.get_collection(name)
        params = found.config.params.vectors
        assert isinstance(params, models.VectorParams)
        assert (params.size, params.distance, params.on_disk) == (16, models.Distance.COSINE, None)
        assert (found.config.hnsw_config.m, found.config.hnsw_config.payload_m) == (0, 16)
        assert found.config.quantization_config is None
        assert {field: index.data_type for field, index in found.payload_schema.items()} == {
            "scope": "keyword",
            "namespace": "keyword",
            "expires": "float",
        }
        assert found.payload_schema["scope"].params.is_tenant is True

    @pytest.mark.parametrize(
        ("quantization", "expected"),
        [
            ("binary", {"binary": {"always_ram": True}}),
            ("scalar", {"scalar": {"type": "int8", "quantile": 0.99, "always_ram": True}}),
            ("product", {"product": {"compression": "x16", "always_ram": True}}),
        ],
    )
    def test_quantization(
        self, server: QdrantServer, name: str, quantization: Any, expected: dict[str, object]
    ) -> None:
        """It arrives, and similarities are exact all the same."""
        vectors = unit_vectors(1500, 64)
        url = server.url
        index = QdrantIndex(url, api_key=API_KEY, collection=name, quantization=quantization, timeout=AMPLE)
        with closing(index):
            for number, vector in enumerate(vectors[:1]):
                index.add(make_row(number, vector))
            with server.client() as client:
                rows = client.retrieve(name, [client.scroll(name)[0][0].id])[0].payload
                points = [
                    models.PointStruct(
                        id=number, vector=vector.tolist(), payload={**rows, "key": key_of(number)}
                    )
                    for number, vector in enumerate(vectors)
                    if number
                ]
                client.upsert(name, points, wait=True)
                config = client.get_collection(name).config
            assert config.quantization_config.model_dump(mode="json", exclude_none=True) == expected
            assert config.params.vectors.on_disk is True
            assert server.ask("POST", f"/collections/{name}/optimize") is True
            drawn = np.random.default_rng(3).standard_normal(vectors[:40].shape, dtype=np.float32)
            queries = vectors[:40] + 0.05 * drawn
            for number, query in enumerate(queries / np.linalg.norm(queries, axis=1, keepdims=True)):
                best = index.search(scope_of(0), query.tobytes(), 1)[0]
                assert best.row.key == key_of(number)
                assert best.similarity == pytest.approx(float(vectors[number] @ query), abs=1e-5)

    def test_states(self, server: QdrantServer, opened: Any, name: str) -> None:
        index = opened(server.url, collection=name)
        assert index.keep_state("learnt", b"\x00\xff", None) is True
        with server.client() as client:
            (point,), _ = client.scroll(f"{name}-state")
            vectors = client.get_collection(f"{name}-state").config.params.vectors
        assert (point.payload["key"], point.payload["value"]) == ("learnt", "AP8=")
        assert vectors in (None, {})


class TestRows:
    def test_a_ttl_of_a_minute_is_over_after_61_seconds(
        self, server: QdrantServer, opened: Any, name: str, clock: FakeClock
    ) -> None:
        """C75."""
        index = opened(server.url, collection=name, clock=clock)
        vector = unit_vectors(1)[0]
        index.add(make_row(1, vector, expires=clock() + 60))
        clock.advance(59)
        assert keys(index.search(scope_of(0), vector.tobytes(), 1)) == [key_of(1)]
        clock.advance(2)
        assert index.search(scope_of(0), vector.tobytes(), 1) == []
        assert index.count() == 1
        assert index.purge() == 1
        assert index.count() == 0

    def test_an_update_of_a_row_that_is_gone_brings_nothing_back(
        self, server: QdrantServer, opened: Any, name: str
    ) -> None:
        index = opened(server.url, collection=name)
        assert index.update(key_of(1), {"n": 1}) is False  # no collection
        index.add(make_row(1, unit_vectors(1)[0]))
        index.remove([key_of(1)])
        assert index.update(key_of(1), {"n": 1}) is False
        assert (index.count(), index.search(scope_of(0), unit_vectors(1)[0].tobytes(), 1)) == (0, [])

    def test_texts_and_namespaces_that_json_servers_refuse(
        self, server: QdrantServer, opened: Any, name: str
    ) -> None:
        """A lone surrogate, and what is written like the form that stands for one."""
        texts = ["\ud800", 'json:"\ud800"', 'json:"x"', "json:", "\udfff\x00\U0001f600", "\x00"]
        index = opened(server.url, collection=name)
        vectors = unit_vectors(len(texts))
        for number, text in enumerate(texts):
            index.add(make_row(number, vectors[number], namespace=text, text=text, payload={text: text}))
        for number, text in enumerate(texts):
            row = index.search(scope_of(0), vectors[number].tobytes(), 1)[0].row
            assert (row.key, row.text, dict(row.payload)) == (key_of(number, text), text, {text: text})
            assert index.update(key_of(number, text), {"n": number}) is True
        assert [index.flush(text) for text in texts] == [1] * len(texts)

    def test_more_keys_than_one_request_holds(self, server: QdrantServer, opened: Any, name: str) -> None:
        index = opened(server.url, collection=name)
        vectors = unit_vectors(3)
        for place, number in enumerate((0, 1500, 2999)):
            index.add(make_row(number, vectors[place]))
        assert index.remove([key_of(number) for number in range(3000)]) == 3
        assert index.count() == 0

    @pytest.mark.parametrize(
        ("change", "param"),
        [({"expires": math.nan}, "expires"), ({"payload": {"x": object()}}, "payload")],
    )
    def test_what_cannot_be_kept_is_refused(self, change: Any, param: str) -> None:
        index = QdrantIndex("http://127.0.0.1:1")
        with pytest.raises(InvalidRequestError) as caught:
            index.add(replace(make_row(1, unit_vectors(1)[0]), **change))
        assert caught.value.param == param


class TestCollections:
    def test_one_that_is_deleted_in_use_is_made_again(
        self, server: QdrantServer, opened: Any, name: str
    ) -> None:
        index = opened(server.url, collection=name)
        vector = unit_vectors(1)[0]
        index.add(make_row(1, vector))
        index.keep_state("s", b"one", None)
        server.drop(name)
        server.drop(f"{name}-state")
        assert index.search(scope_of(0), vector.tobytes(), 1) == []
        assert (index.count(), index.flush("a"), index.remove([key_of(1)]), index.purge()) == (0, 0, 0, 0)
        assert index.update(key_of(1), {}) is False
        assert (index.state("s"), index.keep_state("s", b"two", b"one")) == (None, False)
        index.add(make_row(2, vector))
        assert index.keep_state("s", b"two", None) is True
        assert keys(index.search(scope_of(0), vector.tobytes(), 5)) == [key_of(2)]
        assert index.state("s") == b"two"
        with server.client() as client:
            assert set(client.get_collection(name).payload_schema) == {"scope", "namespace", "expires"}

    def test_another_process_makes_it_meanwhile(self, server: QdrantServer, opened: Any, name: str) -> None:
        indexes = [opened(server.url, collection=name) for _ in range(6)]
        begin = threading.Barrier(len(indexes))
        failures: list[BaseException] = []

        def add(number: int) -> None:
            begin.wait()
            try:
                indexes[number].add(make_row(number, unit_vectors(6)[number]))
            except BaseException as exc:
                failures.append(exc)

        workers = [threading.Thread(target=add, args=(number,)) for number in range(len(indexes))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert failures == []
        assert [index.count() for index in indexes] == [6] * 6

    def test_what_it_has_no_index_for_is_added(self, server: QdrantServer, opened: Any, name: str) -> None:
        """Another process was ended before it had made them."""
        with server.client() as client:
            client.create_collection(name, models.VectorParams(size=16, distance=models.Distance.COSINE))
            client.create_payload_index(name, "expires", models.PayloadSchemaType.FLOAT)
            opened(server.url, collection=name).add(make_row(1, unit_vectors(1)[0]))
            assert set(client.get_collection(name).payload_schema) == {"scope", "namespace", "expires"}

    def test_vectors_of_another_length_are_never_mixed(
        self, server: QdrantServer, opened: Any, name: str
    ) -> None:
        opened(server.url, collection=name).add(make_row(1, unit_vectors(1)[0]))
        other = opened(server.url, collection=name)
        longer = unit_vectors(1, 32)[0]
        message = f"'{name}' holds 16 dimensions, got 32"
        with pytest.raises(InvalidRequestError, match=message) as caught:
            other.add(make_row(2, longer))
        assert caught.value.param == "vector"
        with pytest.raises(InvalidRequestError, match=message):
            other.search(scope_of(0), longer.tobytes(), 1)
        assert other.dimensions == 16
        given = opened(server.url, collection=name, dimensions=32)
        assert given.dimensions == 32
        with pytest.raises(InvalidRequestError, match=message):
            given.add(make_row(2, longer))
        with pytest.raises(InvalidRequestError, match="holds 32 dimensions, got 16"):
            given.search(scope_of(0), unit_vectors(1)[0].tobytes(), 1)
        assert other.count() == 1

    def test_one_that_was_made_again_for_another_model_may_be_used(
        self, server: QdrantServer, opened: Any, name: str
    ) -> None:
        index = opened(server.url, collection=name)
        index.add(make_row(1, unit_vectors(1)[0]))
        server.drop(name)
        longer = unit_vectors(1, 32)[0]
        index.add(make_row(1, longer))
        assert index.dimensions == 32
        assert keys(index.search(scope_of(0), longer.tobytes(), 1)) == [key_of(1)]

    def test_one_of_another_kind_is_not_used(self, server: QdrantServer, opened: Any, name: str) -> None:
        with server.client() as client:
            client.create_collection(name, models.VectorParams(size=8, distance=models.Distance.EUCLID))
        with pytest.raises(StoreError, match="not one of cosine vectors") as caught:
            opened(server.url, collection=name).add(make_row(1, unit_vectors(1)[0]))
        assert caught.value.code == "wrong_collection"


class TestFailures:
    """Each ends in time, in a `StoreError` with no secret in it."""

    @pytest.mark.parametrize(
        ("api_key", "said"), [("another-key-of-mine", "Invalid API key"), (None, "Must provide")]
    )
    def test_a_wrong_api_key(
        self, server: QdrantServer, opened: Any, name: str, api_key: str | None, said: str
    ) -> None:
        index = opened(server.url, collection=name, api_key=api_key)
        for work in operations(index):
            with pytest.raises(StoreError, match=f"401 {said}") as caught:
                work()
            assert caught.value.code == "http_401"
            assert "another-key-of-mine" not in everything(caught.value)

    def test_a_server_that_is_gone(self, opened: Any) -> None:
        index = opened(f"http://127.0.0.1:{free_port()}")
        for work in operations(index):
            with pytest.raises(StoreError) as caught:
                work()
            assert caught.value.code == "unreachable"
            assert API_KEY not in everything(caught.value)

    @pytest.mark.parametrize(
        ("status", "body", "code"),
        [
            (500, b'{"status": {"error": "Service internal error: disk"}, "time": 0}', "http_500"),
            (502, b"<html>KEY</html>" + b"x" * 10_000, "http_502"),
            (307, b"", "http_307"),
            (400, b'{"status": {"error": "Wrong input: KEY"}}', "http_400"),
            (429, b'{"status": null}', "http_429"),
            (200, b"garbage", "broken_answer"),
            (200, b"", "broken_answer"),
            (200, b"[1]", "broken_answer"),
            (200, b'{"result": 7}', "broken_answer"),
            (200, b"[" * 100_000, "broken_answer"),
            (200, b'{"result": {"points": [{"payload": null}], "count": null}}', "broken_answer"),
        ],
    )
    def test_an_answer_that_is_none(self, opened: Any, status: int, body: bytes, code: str) -> None:
        """Proxies answer too, and may show what they were sent."""
        with answering(status, body.replace(b"KEY", API_KEY.encode()), location="/elsewhere") as url:
            index = opened(url)
            for work in operations(index)[1:3]:
                with pytest.raises(StoreError) as caught:
                    work()
                assert caught.value.code == code
                assert API_KEY not in everything(caught.value)
                assert len(str(caught.value)) < 300

    def test_a_server_that_hangs(self, server: QdrantServer, opened: Any) -> None:
        with FaultProxy(server.port) as proxy:
            proxy.blackhole = True
            index = opened(f"http://127.0.0.1:{proxy.port}", timeout=SHORT)
            for work in (operations(index)[place] for place in (0, 1, 4)):
                began = time.monotonic()
                with pytest.raises(StoreError, match=r"no answer within 0\.5 s") as caught:
                    work()
                assert SHORT * 0.9 < time.monotonic() - began < LONGEST
                assert caught.value.code == "timeout"
                assert API_KEY not in everything(caught.value)

    def test_an_answer_that_drips(self, server: QdrantServer, opened: Any, name: str) -> None:
        """Every byte is in time, and the whole would not be."""
        row = make_row(1, unit_vectors(1)[0], text="x" * 20_000)
        opened(server.url, collection=name).add(row)
        with FaultProxy(server.port) as proxy:
            index = opened(f"http://127.0.0.1:{proxy.port}", collection=name, timeout=SHORT)
            assert index.count() == 1
            proxy.rate = 1000  # bytes a second
            began = time.monotonic()
            with pytest.raises(StoreError) as caught:
                index.search(scope_of(0), row.vector, 1)
            assert caught.value.code == "timeout"
            assert time.monotonic() - began < LONGEST
            proxy.heal()
            proxy.reset()
            assert index.count() == 1

    def test_connections_are_used_again(self, server: QdrantServer, opened: Any, name: str) -> None:
        with FaultProxy(server.port) as proxy:
            index = opened(f"http://127.0.0.1:{proxy.port}", collection=name, timeout=AMPLE)
            for _ in range(20):
                index.count()
            assert proxy.connections == 1
            index.close()
            index.count()
            assert proxy.connections == 2


class TestProcesses:
    SCRIPT = """
import sys
from llm_middleware.semantic.index_qdrant import QdrantIndex
from tests.contract.vectors import make_row, unit_vectors
index = QdrantIndex(sys.argv[1], api_key=sys.argv[2], collection=sys.argv[3], timeout=30)
for number in range(5, 10):
    index.add(make_row(number, unit_vectors(10)[number]))
print(index.count(), index.state("s"), index.keep_state("s", b"child", b"parent"))
"""

    def test_two_share_it(self, server: QdrantServer, opened: Any, name: str) -> None:
        """A process that ends without `close` does so quietly."""
        index = opened(server.url, collection=name)
        for number in range(5):
            index.add(make_row(number, unit_vectors(10)[number]))
        index.keep_state("s", b"parent", None)
        command = [sys.executable, "-W", "error", "-c", self.SCRIPT, server.url, API_KEY, name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert (done.stdout, done.stderr) == ("10 b'parent' True\n", "")
        found = index.search(scope_of(0), unit_vectors(10)[7].tobytes(), 10)
        assert (keys(found)[0], len(found), index.state("s")) == (key_of(7), 10, b"child")

    FORKING = """
import asyncio, os, sys
from llm_middleware.semantic.index_qdrant import QdrantIndex
index = QdrantIndex(sys.argv[1], api_key=sys.argv[2], collection=sys.argv[3], timeout=30)
asyncio.run(index.acount())
print(index.count(), flush=True)
if os.fork() == 0:
    print(index.count(), asyncio.run(index.acount()), flush=True)
    index.close()
else:
    assert os.wait()[1] == 0
    print(index.count(), asyncio.run(index.acount()), flush=True)
"""

    def test_a_forked_child_has_connections_of_its_own(
        self, server: QdrantServer, opened: Any, name: str
    ) -> None:
        """The parent's connection is neither used nor closed by it."""
        opened(server.url, collection=name).add(make_row(1, unit_vectors(1)[0]))
        with FaultProxy(server.port) as proxy:
            url = f"http://127.0.0.1:{proxy.port}"
            command = [sys.executable, "-c", self.FORKING, url, API_KEY, name]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
            assert (done.stdout, done.stderr) == ("1\n1 1\n1 1\n", "")
            # The first loop's, the parent's sync one; two of the child; the second loop's.
            assert proxy.connections == 5

    def test_each_event_loop_closes_its_own_connection(self, server: QdrantServer, name: str) -> None:
        """Though nobody closes the index, and whichever way the loop ends."""
        with FaultProxy(server.port) as proxy:
            index = QdrantIndex(f"http://127.0.0.1:{proxy.port}", api_key=API_KEY, collection=name)
            for _ in range(3):
                assert asyncio.run(index.acount()) == 0
            assert proxy.connections == 3
            wait_for(lambda: not proxy._links, "the connections are closed")

    def test_close_reaches_other_loops(self, server: QdrantServer, name: str) -> None:
        with FaultProxy(server.port) as proxy:
            index = QdrantIndex(f"http://127.0.0.1:{proxy.port}", api_key=API_KEY, collection=name)
            awaited = Awaited(index)
            try:
                assert (awaited.count(), index.count(), len(proxy._links)) == (0, 0, 2)
                index.close()
                wait_for(lambda: not proxy._links, "both connections are closed")
                assert (awaited.count(), index.count()) == (0, 0)
            finally:
                awaited.end()
                index.close()

    def test_a_caller_that_leaves_costs_the_next_one_nothing(self, server: QdrantServer, name: str) -> None:
        """A cancelled search must not leave its answer to whoever asks next."""
        vectors = unit_vectors(2)

        async def handler(proxy: FaultProxy) -> list[str]:
            index = QdrantIndex(
                f"http://127.0.0.1:{proxy.port}", api_key=API_KEY, collection=name, timeout=AMPLE
            )
            for number in range(2):
                await index.aadd(make_row(number, vectors[number]))
            proxy.latency = 0.2
            asked = proxy.received
            task = asyncio.ensure_future(index.asearch(scope_of(0), vectors[0].tobytes(), 1))
            await asyncio.to_thread(wait_for, lambda: proxy.received > asked, "the question is on its way")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            proxy.latency = 0
            found = await index.asearch(scope_of(0), vectors[1].tobytes(), 1)
            await index.aclose()
            return keys(found)

        with FaultProxy(server.port) as proxy:
            assert asyncio.run(handler(proxy)) == [key_of(1)]


def operations(index: VectorIndex) -> list[Callable[[], object]]:
    """One of each, all of which ask the server."""
    vector = unit_vectors(1)[0]
    return [
        lambda: index.add(make_row(1, vector)),
        lambda: index.search(scope_of(0), vector.tobytes(), 1),
        index.count,
        lambda: index.update(key_of(1), {}),
        lambda: index.state("s"),
        lambda: index.keep_state("s", b"x", None),
        lambda: index.remove([key_of(1)]),
        lambda: index.flush("a"),
        index.purge,
    ]


def everything(exc: BaseException | None) -> str:
    """What a log would have of an error."""
    return "" if exc is None else "".join(traceback.format_exception(exc)) + repr(vars(exc))
