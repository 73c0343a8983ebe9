"""`QdrantStore` over real HTTP, against a server over Qdrant's own engine (`tests.servers.qdrant_edge`)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from llm_middleware import CacheManager
from llm_middleware._drive import run_sync
from llm_middleware._store_contract import ContractClock, StoreContract
from llm_middleware.errors import ConfigError, CorruptEntryError, InvalidRequestError, StoreError
from llm_middleware.stores.qdrant import QdrantStore, States
from llm_middleware.stores.qdrant_http import QdrantHTTP
from llm_middleware.types import AsyncStore, Store
from tests.qdrant_services import API_KEY, QdrantServer, answering, qdrant_server
from tests.services import FaultProxy, free_port
from tests.stores.on_loop import OnLoop

AMPLE = 30.0  # seconds for a request where the machine may be busy
SHORT = 0.5  # and where none will be answered


@pytest.fixture(scope="module")
def server() -> Iterator[QdrantServer]:
    with qdrant_server() as server:
        yield server


@pytest.fixture(params=["sync", "async"])
def opened(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Opens stores on one of the two faces, as sync ones, and closes them."""
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())

        def open_one(url: str, **settings: Any) -> Any:
            store = QdrantStore(url, **{"api_key": API_KEY, "timeout": AMPLE, **settings})
            made = store if request.param == "sync" else OnLoop(store, runner)
            stack.callback(made.close)
            return made

        yield open_one


@pytest.fixture
def name(server: QdrantServer) -> Iterator[str]:
    """A collection that is not there yet."""
    name = f"test-{uuid.uuid4().hex}"
    yield name
    server.drop(name)


def key(number: int, namespace: str = "llm") -> str:
    return f"{namespace}:{number:064x}"


class TestContract(StoreContract):
    """C38, C39, C52, C60, C75, C115, C117. One collection for all, emptied: it takes long to make one."""

    @pytest.fixture(autouse=True)
    def _prepared(self, server: QdrantServer, opened: Any) -> None:
        self.server, self.opened = server, opened

    def make_store(self, clock: ContractClock) -> Store:  # type: ignore[override]
        self.server.empty("contract")
        store: Store = self.opened(self.server.url, collection="contract", clock=clock)
        return store


class TestStore:
    def test_it_has_both_faces(self) -> None:
        store = QdrantStore("http://host")
        assert isinstance(store, Store)
        assert isinstance(store, AsyncStore)
        assert (store.tier, hasattr(store, "inline")) == ("qdrant", False)

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"url": "localhost:6333"}, "qdrant_api_base"),
            ({"api_key": "se cret"}, "qdrant_api_key"),
            ({"collection": "a/b"}, "collection"),
            ({"timeout": -1}, "timeout"),
        ],
    )
    def test_bad_settings(self, change: dict[str, Any], param: str) -> None:
        with pytest.raises(ConfigError) as caught:
            QdrantStore(**{"url": "http://host", **change})
        assert caught.value.param == param
        assert "cret" not in str(caught.value)

    def test_what_is_there(self, server: QdrantServer, opened: Any, name: str) -> None:
        """As Qdrant's own client sees it: no vectors, and what filters name is indexed."""
        clock = ContractClock()
        store = opened(server.url, collection=name, clock=clock)
        store.set(key(1, "a:b"), b"\x00\xff", 60)
        store.set(key(2, "\ud800"), b"value", math.inf)
        with server.client() as client:
            points, _ = client.scroll(name, with_payload=True, with_vectors=True)
            found = client.get_collection(name)
        assert sorted((point.payload for point in points), key=lambda each: each["expires"]) == [
            {"key": key(1, "a:b"), "namespace": "a:b", "expires": clock() + 60, "value": "AP8="},
            {
                "key": f'json:"\\ud800:{2:064x}"',
                "namespace": 'json:"\\ud800"',
                "expires": 1e18,
                "value": base64.b64encode(b"value").decode(),
            },
        ]
        assert [point.vector for point in points] in ([None] * 2, [{}] * 2)
        assert found.config.params.vectors in (None, {})
        assert {field: index.data_type for field, index in found.payload_schema.items()} == {
            "namespace": "keyword",
            "expires": "float",
        }

    def test_namespaces_of_any_text(self, server: QdrantServer, opened: Any, name: str) -> None:
        names = ["\ud800", 'json:"\\ud800"', "json:", "\x00", "\U0001f600", "'"]
        store = opened(server.url, collection=name)
        for number, namespace in enumerate(names):
            store.set(key(1, namespace), b"%d" % number, 60)
        for number, namespace in enumerate(names):
            assert store.get(key(1, namespace)) == b"%d" % number
            assert store.heads(namespace, None, 9) == (None, [(key(1, namespace), b"%d" % number)])
            assert store.flush(namespace) == 1

    def test_purge_removes_what_is_over(self, server: QdrantServer, opened: Any, name: str) -> None:
        clock = ContractClock()
        store = opened(server.url, collection=name, clock=clock)
        assert store.purge_expired() == 0  # no collection
        for number in range(10):
            store.set(key(number), b"value", None if number == 9 else 1 + number)
        clock.advance(4)
        assert (store.purge_expired(), store.purge_expired()) == (4, 0)
        clock.advance(1e6)
        assert (store.purge_expired(), store.ping()["points"]) == (5, 1)

    def test_heads_of_many_pages(self, server: QdrantServer, opened: Any, name: str) -> None:
        store = opened(server.url, collection=name)
        for number in range(150):
            store.set(key(number), b"%d" % number, 60)
        found: list[tuple[str, bytes]] = []
        cursor, pages = None, 0
        while pages == 0 or cursor is not None:
            cursor, page = store.heads("llm", cursor, 2)
            found += page
            pages += 1
        assert pages == 3
        assert sorted(found) == [(key(number), (b"%d" % number)[:2]) for number in range(150)]
        with pytest.raises(InvalidRequestError) as caught:
            store.heads("llm", "{11111111-1111-1111-1111-111111111111}", 2)
        assert caught.value.param == "cursor"

    @pytest.mark.parametrize(
        "payload",
        [
            {},
            {"key": key(1), "expires": 1e18},
            {"key": key(1), "expires": "soon", "value": ""},
            {"key": key(1), "expires": 1e18, "value": "not base64"},
            {"key": 7, "expires": 1e18, "value": ""},
        ],
    )
    def test_what_it_did_not_write_is_an_error(
        self, server: QdrantServer, opened: Any, name: str, payload: dict[str, object]
    ) -> None:
        store = opened(server.url, collection=name)
        store.set(key(1), b"value", 60)
        points = server.ask("POST", f"/collections/{name}/points/scroll", {})["points"]
        point = {"id": points[0]["id"], "vector": {}, "payload": payload}
        server.ask("PUT", f"/collections/{name}/points?wait=true", {"points": [point]})
        with pytest.raises(CorruptEntryError):
            store.get(key(1))
        store.set(key(1), b"again", 60)
        assert store.get(key(1)) == b"again"

    def test_a_collection_that_is_deleted_in_use_is_made_again(
        self, server: QdrantServer, opened: Any, name: str
    ) -> None:
        store = opened(server.url, collection=name)
        store.set(key(1), b"value", 60)
        server.drop(name)
        assert (store.get(key(1)), store.delete([key(1)]), store.flush("llm")) == (None, 0, 0)
        assert store.heads("llm", None, 8) == (None, [])
        store.set(key(2), b"value", 60)
        assert (store.get(key(1)), store.get(key(2))) == (None, b"value")

    def test_ping(self, server: QdrantServer, opened: Any, name: str) -> None:
        store = opened(server.url, collection=name)
        facts = store.ping()
        assert facts.pop("latency_ms") > 0
        assert facts == {"endpoint": server.url, "collection": name, "points": 0}

    def test_one_object_serves_both_faces_at_once(self, server: QdrantServer, name: str) -> None:
        """C94."""
        store = QdrantStore(server.url, api_key=API_KEY, collection=name, timeout=AMPLE)
        store.set(key(1), b"sync", None)

        async def handler() -> bytes | None:
            assert await store.aget(key(1)) == b"sync"
            await store.aset(key(1), b"async", None)
            return await asyncio.to_thread(store.get, key(1))

        assert asyncio.run(handler()) == b"async"
        assert store.get(key(1)) == b"async"
        store.close()

    def test_behind_a_cache(self, server: QdrantServer, name: str) -> None:
        """What one process has stored, another one serves."""
        calls: list[bytes] = []

        def call(body: bytes) -> bytes:
            calls.append(body)
            message = {"role": "assistant", "content": "hello"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]}).encode()

        request = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'
        answers = []
        for _ in range(2):
            store = QdrantStore(server.url, api_key=API_KEY, collection=name, timeout=AMPLE)
            cache = CacheManager(store=store, memory_tier=False, store_timeout=AMPLE)
            answers.append(cache.fetch(request, call).body)
            cache.close()
        assert answers[0] == answers[1]
        assert len(calls) == 1


class TestStates:
    """What another writer does between two requests of ours, at the worst moments."""

    @pytest.fixture
    def states(self, server: QdrantServer, name: str) -> Iterator[tuple[States, States, list[Any]]]:
        """One writer, another, and what that does, by the number of the first one's next request."""
        http = QdrantHTTP(server.url, api_key=API_KEY, timeout=AMPLE)
        before: list[Any] = []

        async def ask(*request: Any, **options: Any) -> Any:
            if before and (work := before.pop(0)) is not None:
                work()
            return await http.ask(*request, **options)

        yield States(name, ask), States(name, http.ask), before
        http.close()

    def test_the_first_value_of_another_stays(self, states: tuple[States, States, list[Any]]) -> None:
        ours, other, before = states
        run_sync(other.keep("made", b"", None))
        assert run_sync(ours.keep("s", b"", b"x")) is False
        before += [None, None, lambda: run_sync(other.keep("s", b"theirs", None))]
        assert run_sync(ours.keep("s", b"ours", None)) is False
        assert (run_sync(ours.get("s")), before) == (b"theirs", [])

    def test_a_newer_value_of_another_stays(self, states: tuple[States, States, list[Any]]) -> None:
        ours, other, before = states
        run_sync(other.keep("s", b"first", None))
        before += [None, lambda: run_sync(other.keep("s", b"theirs", b"first"))]
        assert run_sync(ours.keep("s", b"ours", b"first")) is False
        assert (run_sync(ours.get("s")), before) == (b"theirs", [])

    def test_who_was_built_upon_has_succeeded(self, states: tuple[States, States, list[Any]]) -> None:
        ours, other, before = states
        run_sync(other.keep("s", b"first", None))
        before += [None, None, lambda: run_sync(other.keep("s", b"theirs", b"ours"))]
        assert run_sync(ours.keep("s", b"ours", b"first")) is True
        assert (run_sync(ours.get("s")), before) == (b"theirs", [])


class TestFailures:
    """Each ends in time, in a `StoreError` with no secret in it."""

    def works(self, store: Any) -> list[Any]:
        return [
            lambda: store.get(key(1)),
            lambda: store.set(key(1), b"value", 60),
            lambda: store.delete([key(1)]),
            lambda: store.flush("llm"),
            lambda: store.heads("llm", None, 8),
            store.purge_expired,
            store.ping,
        ]

    def test_a_wrong_api_key(self, server: QdrantServer, opened: Any) -> None:
        for work in self.works(opened(server.url, api_key="another-key-of-mine")):
            with pytest.raises(StoreError, match="401 Invalid API key") as caught:
                work()
            assert caught.value.code == "http_401"
            assert "another-key-of-mine" not in str(caught.value)

    def test_a_server_that_is_gone(self, opened: Any) -> None:
        for work in self.works(opened(f"http://127.0.0.1:{free_port()}")):
            with pytest.raises(StoreError) as caught:
                work()
            assert caught.value.code == "unreachable"

    @pytest.mark.parametrize(
        ("status", "body", "code"),
        [
            (500, b'{"status": {"error": "Service internal error: KEY"}, "time": 0}', "http_500"),
            (200, b"garbage", "broken_answer"),
        ],
    )
    def test_an_answer_that_is_none(self, opened: Any, status: int, body: bytes, code: str) -> None:
        with answering(status, body.replace(b"KEY", API_KEY.encode())) as url:
            for work in self.works(opened(url)):
                with pytest.raises(StoreError) as caught:
                    work()
                assert caught.value.code == code
                assert API_KEY not in str(caught.value)

    def test_a_server_that_hangs(self, server: QdrantServer, opened: Any) -> None:
        with FaultProxy(server.port) as proxy:
            proxy.blackhole = True
            store = opened(f"http://127.0.0.1:{proxy.port}", timeout=SHORT)
            for work in self.works(store)[:2]:
                with pytest.raises(StoreError, match=r"no answer within 0\.5 s") as caught:
                    work()
                assert caught.value.code == "timeout"

    def test_a_server_that_comes_back(self, server: QdrantServer, opened: Any, name: str) -> None:
        with FaultProxy(server.port) as proxy:
            store = opened(f"http://127.0.0.1:{proxy.port}", collection=name)
            store.set(key(1), b"value", 60)
            proxy.refuse()
            with pytest.raises(StoreError):
                store.get(key(1))
            proxy.accept()
            assert store.get(key(1)) == b"value"
