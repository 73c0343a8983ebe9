"""Writes to Redis in batches: what is sent and when, what is read meanwhile, failures, forks and exits."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_middleware._store_contract import ContractClock, StoreContract
from llm_middleware.errors import ConfigError, StoreError
from llm_middleware.stores import redis_pending
from llm_middleware.stores.redis import RedisStore
from llm_middleware.stores.redis_buffer import BufferedRedisStore
from llm_middleware.stores.redis_connect import RedisConnection
from llm_middleware.stores.redis_peers import RedisPeers
from llm_middleware.testing import FakeClock
from llm_middleware.types import AsyncStore, Store
from tests.services import (
    FACES,
    HOST,
    FaultProxy,
    RedisCluster,
    RedisServer,
    SyncFace,
    redis_server,
    wait_for,
)
from tests.stores.test_redis import AsyncOnly, ServerClock

AMPLE = 10.0  # seconds: a budget that no test uses up
NEVER = 3600.0  # seconds: an interval that no test waits for
ROOT = Path(__file__).parents[2]


def key(number: int, namespace: str = "llm") -> str:
    return f"{namespace}:{number:064x}"


def connect(port: int, budget: float = AMPLE, **settings: object) -> RedisConnection:
    return RedisConnection.from_settings({"host": HOST, "port": port, **settings}, {}, budget=budget)


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Iterator[SyncFace]:
    made = FACES[request.param]()
    yield made
    made.close()


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[FaultProxy]:
    with FaultProxy(server.port) as made:
        yield made


@pytest.fixture
def make(server: RedisServer) -> Iterator[Callable[..., BufferedRedisStore]]:
    """``make(size, interval, port=..., budget=..., **options)``: closed at the end, whatever is pending."""
    made: list[BufferedRedisStore] = []

    def make(
        size: int = 1000, interval: float = NEVER, port: int = 0, budget: float = AMPLE, **options: object
    ) -> BufferedRedisStore:
        store = RedisStore(connect(port or server.port, budget))
        made.append(BufferedRedisStore(store, size=size, interval=interval, **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


def written(store: BufferedRedisStore) -> None:
    wait_for(lambda: store.pending == 0, "nothing is pending any more")


def threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "llm-middleware-redis-buffer"]


class Slow(RedisStore):
    """For which a second is a thousand of the server's."""

    def mset(self, entries, owners) -> None:
        scaled = [(k, v, None if ttl is None else ttl * ServerClock.SCALE) for k, v, ttl in entries]
        super().mset(scaled, owners)


class BufferClock(ServerClock):
    """Time passes for what is pending and for what is written; nothing is on its way then."""

    store: BufferedRedisStore
    settles = False

    def advance(self, seconds: float) -> None:
        if self.settles:
            written(self.store)
        super().advance(seconds)


class TestContract(StoreContract):
    """With everything pending, and written while the next operation comes; both faces."""

    @pytest.fixture(autouse=True, params=["sync", "async"])
    def _faces(self, request: pytest.FixtureRequest, shared: RedisServer) -> None:
        self.server, self.asynchronous = shared, request.param == "async"

    @pytest.fixture(autouse=True, params=[10_000, 50])
    def _sizes(self, request: pytest.FixtureRequest) -> None:
        self.size = request.param

    @contextlib.contextmanager
    def open_store(self) -> Iterator[tuple[Store, ContractClock]]:
        self.server.ask("FLUSHALL")
        clock = BufferClock([self.server])
        interval = NEVER if self.size == 10_000 else 0.0005
        store = BufferedRedisStore(
            Slow(connect(self.server.port)), size=self.size, interval=interval, clock=clock
        )
        clock.store, clock.settles = store, interval < NEVER
        if not self.asynchronous:
            with contextlib.closing(store):
                yield store, clock
            return
        face = AsyncOnly(store)
        try:
            yield face, clock  # type: ignore[misc]
        finally:
            face.shut()
            store.close()


class TestFaces:
    def test_it_has_both(self, make) -> None:
        store = make()
        assert isinstance(store, Store)
        assert isinstance(store, AsyncStore)
        assert (store.tier, hasattr(store, "inline"), hasattr(store, "claim"), store.peers) == (
            "redis",
            False,
            False,
            None,
        )

    def test_what_is_no_size_and_no_interval(self, server: RedisServer) -> None:
        store = RedisStore(connect(server.port))
        for wrong in ({"size": 0}, {"size": 1, "interval": 0}, {"size": 1, "interval": -1.0}):
            with pytest.raises(ConfigError, match="expected a number > 0"):
                BufferedRedisStore(store, **wrong)

    def test_ping_is_the_store_s(self, face: SyncFace, make) -> None:
        assert face.do(make(), "ping")["connection"]["topology"] == "standalone"


class TestWhatIsSent:
    def test_as_many_sets_as_keys_in_one_pipeline(self, face: SyncFace, server: RedisServer, make) -> None:
        """C65."""
        store = make(100)
        for number in range(100):
            face.do(store, "set", key(number), b"%d" % number, 60)
        written(store)
        calls = server.calls()
        assert calls["set"] == 100
        assert not {"get", "mget", "unlink", "publish"} & set(calls)
        assert [face.do(store, "get", key(number)) for number in (0, 50, 99)] == [b"0", b"50", b"99"]
        with server.client() as client:
            assert all(0 < client.pttl(key(number)) <= 60_000 for number in range(100))

    def test_one_batch(self, face: SyncFace, server: RedisServer) -> None:
        class Counting(RedisStore):
            def mset(self, entries, owners) -> None:
                batches.append(list(entries))
                super().mset(batches[-1], owners)

        batches: list[list[object]] = []
        store = BufferedRedisStore(Counting(connect(server.port)), size=100, interval=NEVER)
        for number in range(100):
            face.do(store, "set", key(number), b"v", None)
        written(store)
        assert batches == [[(key(number), b"v", float("inf")) for number in range(100)]]
        face.do(store, "close")

    def test_one_round_trip(self, server: RedisServer, proxy: FaultProxy, make) -> None:
        """Each answer is late: with one for each SET, the time for all would be over four times."""
        store = make(100, port=proxy.port, budget=5.0)
        store.set(key(1000), b"connects", 60)
        store._mine().write()
        proxy.latency = 0.2
        for number in range(100):
            store.set(key(number), b"v", 60)
        written(store)
        assert (server.calls()["set"], store.dropped) == (101, 0)

    def test_nothing_before_there_are_enough(self, face: SyncFace, server: RedisServer, make) -> None:
        store = make(10)
        for number in range(9):
            face.do(store, "set", key(number), b"v", 60)
        assert store.pending == 9
        assert "set" not in server.calls()
        face.do(store, "set", key(9), b"v", 60)
        written(store)
        assert server.calls()["set"] == 10

    def test_the_interval(self, face: SyncFace, server: RedisServer, make) -> None:
        store = make(1000, 0.01)
        for number in range(3):
            face.do(store, "set", key(number), b"v", 60)
            written(store)
        assert server.calls()["set"] == 3

    def test_a_key_set_again_is_one_set(self, face: SyncFace, server: RedisServer, make) -> None:
        store = make()
        for number in range(50):
            face.do(store, "set", key(number % 5), b"%d" % number, 60)
        assert store.pending == 5
        face.do(store, "close")
        assert server.calls()["set"] == 5
        assert server.ask("MGET", *map(key, range(5))) == [b"45", b"46", b"47", b"48", b"49"]

    def test_mset(self, face: SyncFace, server: RedisServer, make) -> None:
        store = make()
        face.do(store, "mset", [(key(number), b"%d" % number, None) for number in range(5)])
        assert store.pending == 5
        face.do(store, "close")
        assert server.ask("MGET", *map(key, range(5))) == [b"0", b"1", b"2", b"3", b"4"]

    def test_a_cluster(self, face: SyncFace, cluster: RedisCluster) -> None:
        for server in cluster.servers:
            server.ask("FLUSHALL")
            server.ask("CONFIG", "RESETSTAT")
        connection = RedisConnection.from_settings({"redis_startup_nodes": cluster.nodes}, {}, budget=AMPLE)
        store = BufferedRedisStore(RedisStore(connection), size=50, interval=NEVER)
        for number in range(60):
            face.do(store, "set", key(number), b"v", 60)
        wait_for(lambda: cluster.calls("set") >= 50, "fifty are written")
        assert face.do(store, "flush", "llm") == 60
        assert sum(server.ask("DBSIZE") for server in cluster.servers) == 0
        face.do(store, "close")

    def test_others_are_told_when_it_is_written(self, server: RedisServer) -> None:
        heard: list[tuple[str, list[str]]] = []
        theirs = RedisPeers(connect(server.port), "llm")
        theirs.attend(lambda verb, names: heard.append((verb, list(names))), lambda: None)
        theirs.listen()
        wait_for(lambda: theirs.live, "they listen")
        connection = connect(server.port)
        store = BufferedRedisStore(
            RedisStore(connection, peers=RedisPeers(connection, "llm")), size=100, interval=NEVER
        )
        assert store.peers is store._store.peers is not None
        store.set(key(1), b"v", 60)
        store.set(key(2), b"v", 60)
        assert heard == []
        store.close()
        wait_for(lambda: heard, "they are told")
        assert heard == [("changed", [key(1), key(2)])]
        theirs.close()


class TestReading:
    def test_what_is_pending_takes_no_network(self, face: SyncFace, make) -> None:
        with redis_server() as gone:
            port = gone.port
        store = make(port=port, budget=0.25)
        face.do(store, "set", key(1), b"one", 60)
        face.do(store, "set", key(2), b"two", None)
        face.do(store, "set", key(3), b"three", 0)
        assert face.do(store, "get", key(1)) == b"one"
        assert face.do(store, "mget", [key(2), key(1), key(3), key(2)]) == [b"two", b"one", None, b"two"]
        assert face.do(store, "get", key(3)) is None
        with pytest.raises(StoreError):
            face.do(store, "get", key(4))
        with pytest.raises(StoreError):
            face.do(store, "mget", [key(1), key(4)])

    def test_of_both(self, face: SyncFace, server: RedisServer, make) -> None:
        store = make()
        server.ask("SET", key(1), "theirs")
        server.ask("SET", key(2), "theirs")
        face.do(store, "set", key(2), b"ours", 60)
        assert face.do(store, "mget", [key(n) for n in (3, 2, 1, 2)]) == [None, b"ours", b"theirs", b"ours"]
        assert server.calls()["mget"] == 1

    def test_an_async_read_of_what_is_pending_never_waits(
        self, server: RedisServer, proxy: FaultProxy, make
    ) -> None:
        """The first step of the coroutine is its last, even while a batch is under way."""
        store = make(1, port=proxy.port, budget=5.0)
        proxy.blackhole = True
        store.set(key(1), b"value", 60)
        wait_for(lambda: proxy.received > 0, "the batch is under way")
        with pytest.raises(StopIteration) as done:
            store.aget(key(1)).send(None)
        assert done.value.value == b"value"
        with pytest.raises(StopIteration):
            store.aset(key(1), b"newer", 60).send(None)
        assert store.get(key(1)) == b"newer"
        proxy.heal()
        proxy.reset()
        wait_for(lambda: server.ask("GET", key(1)) == b"newer" or _write(store), "the newer one is written")

    def test_an_entry_set_again_during_its_batch_is_written(
        self, server: RedisServer, proxy: FaultProxy, make
    ) -> None:
        store = make(1, 0.01, port=proxy.port)
        proxy.latency = 0.2
        store.set(key(1), b"older", 60)
        wait_for(lambda: store._mine()._batch[0], "the batch is under way")
        store.set(key(1), b"newer", 60)
        assert store.get(key(1)) == b"newer"
        written(store)
        assert server.ask("GET", key(1)) == b"newer"
        assert server.calls()["set"] == 2


def _write(store: BufferedRedisStore) -> bool:
    return store._mine().write() and False


class TestTimeToLive:
    def test_what_is_left_of_it(self, face: SyncFace, server: RedisServer, make) -> None:
        clock = FakeClock()
        store = make(clock=clock)
        face.do(store, "set", key(1), b"v", 5000)
        face.do(store, "set", key(2), b"v", None)
        clock.advance(2000)
        face.do(store, "close")
        assert 2_900_000 < server.ask("PTTL", key(1)) <= 3_000_000
        assert server.ask("PTTL", key(2)) == -1

    def test_what_is_over_is_not_written_and_hides_what_it_replaced(
        self, face: SyncFace, server: RedisServer, make
    ) -> None:
        clock = FakeClock()
        store = make(clock=clock)
        for number in (1, 2):
            server.ask("SET", key(number), "older")
        face.do(store, "set", key(1), b"over", 10)
        face.do(store, "set", key(2), b"never", 0)
        face.do(store, "set", key(3), b"over", 10)
        clock.advance(10)
        assert face.do(store, "mget", [key(1), key(2), key(3)]) == [None] * 3
        assert [face.do(store, "get", key(number)) for number in (1, 2, 3)] == [None] * 3
        assert face.do(store, "delete", [key(3)]) == 0
        server.ask("CONFIG", "RESETSTAT")
        face.do(store, "close")
        assert server.ask("DBSIZE") == 0
        assert "set" not in server.calls()


class TestRemoving:
    def test_each_key_counts_once(self, face: SyncFace, server: RedisServer, make) -> None:
        store = make()
        for number in range(4):
            server.ask("SET", key(number), "theirs")
        for number in range(2, 6):
            face.do(store, "set", key(number), b"ours", 60)
        assert face.do(store, "delete", [key(number) for number in (1, 2, 5, 9, 2, 1)]) == 3
        assert face.do(store, "flush", "llm") == 3
        assert (store.pending, server.ask("DBSIZE")) == (0, 0)

    def test_what_is_pending_is_not_written_after(self, face: SyncFace, server: RedisServer, make) -> None:
        store = make()
        for number in range(3):
            face.do(store, "set", key(number), b"v", 60)
            face.do(store, "set", key(number, "other"), b"v", 60)
        assert face.do(store, "delete", [key(0)]) == 1
        assert face.do(store, "flush", "llm") == 2
        face.do(store, "close")
        assert sorted(server.ask("KEYS", "*")) == [key(number, "other").encode() for number in range(3)]

    @pytest.mark.parametrize("how", ["delete", "flush", "heeded"])
    def test_a_batch_under_way_comes_first(
        self, face: SyncFace, server: RedisServer, proxy: FaultProxy, make, how: str
    ) -> None:
        """The network holds the batch up; what removes its entries goes by a fast way, and still waits."""
        store = make(3, port=proxy.port)
        direct = RedisStore(connect(server.port))
        store.set(key(7), b"connects", 60)
        store._mine().write()
        proxy.latency = 0.3
        for number in range(3):
            face.do(store, "set", key(number), b"v", 60)
        wait_for(lambda: store._mine()._batch[0], "the batch is under way")
        slow, store._store = store._store, direct
        if how == "delete":
            assert face.do(store, "delete", [key(0), key(1)]) == 2
        else:
            if how == "heeded":  # they are on their way all the same
                store.heed("flushed", ["llm"])
            assert face.do(store, "flush", "llm") == 4
        written(store)
        left = {"delete": [key(2).encode(), key(7).encode()], "flush": [], "heeded": []}[how]
        assert sorted(server.ask("KEYS", "*")) == left
        store._store = slow
        direct.close()

    def test_entries_of_no_batch_wait_for_none(
        self, face: SyncFace, server: RedisServer, proxy, make
    ) -> None:
        store = make(1, port=proxy.port, budget=30.0)
        direct = RedisStore(connect(server.port))
        server.ask("SET", key(2), "theirs")
        proxy.blackhole = True
        store.set(key(1), b"v", 60)
        wait_for(lambda: store._mine()._batch[0], "the batch is under way")
        slow, store._store = store._store, direct
        assert face.do(store, "delete", [key(2)]) == 1
        assert store._mine()._batch[0] == {key(1)}
        store._store = slow
        proxy.heal()
        proxy.reset()
        direct.close()

    def test_redis_fails_and_so_does_removing(self, face: SyncFace, make) -> None:
        with redis_server() as gone:
            port = gone.port
        store = make(port=port, budget=0.25)
        face.do(store, "set", key(1), b"v", 60)
        for operation in (("delete", [key(1)]), ("flush", "llm")):
            with pytest.raises(StoreError):
                face.do(store, *operation)
        assert store.pending == 0

    def test_what_others_changed_is_not_written_over(self, server: RedisServer, make) -> None:
        store = make()
        for number in range(4):
            store.set(key(number), b"ours", 60)
            store.set(key(number, "other"), b"ours", 60)
        server.ask("SET", key(1), "theirs")
        store.heed("changed", [key(1), key(9)])
        store.heed("ended", [f"{{{key(2)}}}:lease:sync"])
        assert (store.get(key(1)), store.pending) == (b"theirs", 7)
        store.heed("flushed", ["other"])
        assert store.pending == 3
        store.close()
        assert server.ask("MGET", key(0), key(1), key(0, "other")) == [b"ours", b"theirs", None]


class TestHeads:
    def walk(self, face: SyncFace, store: BufferedRedisStore, namespace: str = "llm") -> dict[str, bytes]:
        found, cursor = {}, None
        while True:
            cursor, page = face.do(store, "heads", namespace, cursor, 3)
            found.update(page)
            if cursor is None:
                return found

    def test_of_both(self, face: SyncFace, server: RedisServer, make) -> None:
        clock = FakeClock()
        store = make(10_000, clock=clock)
        with server.client() as client:
            client.mset({key(number): "theirs" for number in range(2500)})
        face.do(store, "set", key(1), b"ours", 60)
        face.do(store, "set", key(2), b"over", 1)
        face.do(store, "set", key(3000), b"o", 60)
        face.do(store, "set", key(1, "other"), b"o", 60)
        clock.advance(1)
        expected = {key(number): b"the" for number in range(2500)} | {key(1): b"our", key(3000): b"o"}
        del expected[key(2)]
        assert self.walk(face, store) == expected
        assert self.walk(face, store, "other") == {key(1, "other"): b"o"}

    def test_while_they_are_written(self, server: RedisServer, make) -> None:
        store = make(50, 0.001)
        names = {key(number) for number in range(300)}
        for round_ in range(30):
            store.mset([(name, b"%d" % round_, 60) for name in names])
            assert set(self.walk(SyncFace(), store)) == names


class TestFailures:
    def test_what_is_pending_outlives_a_restart(self, face: SyncFace, caplog) -> None:
        """C61: kept, readable, tried again, and logged once."""
        with redis_server() as server, caplog.at_level(logging.WARNING, "llm_middleware"):
            store = BufferedRedisStore(RedisStore(connect(server.port, 0.25)), size=5, interval=0.01)
            server.kill()
            for number in range(8):
                face.do(store, "set", key(number), b"%d" % number, 600)
            wait_for(lambda: store._mine()._room < 1000, "it was tried again and again")
            assert store.pending == 8
            assert [face.do(store, "get", key(number)) for number in (0, 7)] == [b"0", b"7"]
            assert len(caplog.records) == 1
            assert str(server.port) in caplog.text
            server.restart()
            written(store)
            assert server.ask("MGET", *map(key, range(8))) == [b"%d" % number for number in range(8)]
            # Another burst is logged again.
            wait_for(lambda: store._mine()._enough == 5, "the burst is over")
            server.kill()
            face.do(store, "set", key(9), b"9", 600)
            wait_for(lambda: len(caplog.records) == 2, "logged again")
            server.restart()
            written(store)
            assert server.ask("GET", key(9)) == b"9"
            face.do(store, "close")

    def test_a_server_that_hangs(self, face: SyncFace, server: RedisServer, make) -> None:
        store = make(2, 0.01, budget=0.25)
        server.pause()
        try:
            for number in range(4):
                face.do(store, "set", key(number), b"v", 60)
            wait_for(lambda: store._mine()._room < redis_pending._BATCH_BYTES, "a batch failed")
            assert store.pending == 4
        finally:
            server.resume()
        written(store)
        assert server.ask("DBSIZE") == 4

    def test_the_oldest_are_dropped(self, face: SyncFace, make) -> None:
        with redis_server() as gone:
            port = gone.port
        store = make(10, port=port, budget=0.25)
        for number in range(200):
            face.do(store, "set", key(number), b"%d" % number, 60)
        assert (store.pending, store.dropped) == (160, 40)
        assert face.do(store, "get", key(40)) == b"40"
        assert face.do(store, "get", key(199)) == b"199"
        # One attempt was made: there is another after the interval, however many more are pending.
        wait_for(lambda: store._mine()._room == redis_pending._BATCH_BYTES // 2, "a batch failed")
        with pytest.raises(StoreError):
            face.do(store, "get", key(39))
        # One that is set again is new.
        face.do(store, "set", key(40), b"again", 60)
        face.do(store, "set", key(200), b"200", 60)
        assert face.do(store, "get", key(40)) == b"again"
        assert (store.pending, store.dropped) == (160, 41)
        assert store._mine()._room == redis_pending._BATCH_BYTES // 2

    def test_bytes_are_bounded(self, face: SyncFace, make) -> None:
        store = make(1000, max_bytes=10_000)
        for number in range(20):
            face.do(store, "set", key(number), b"x" * 932, 60)  # a thousand bytes with its key of 68
        assert (store.pending, store.dropped) == (10, 10)
        face.do(store, "set", key(19), b"x" * 20_000, 60)  # leaves the others alone
        assert (store.pending, store.dropped) == (9, 11)
        face.do(store, "delete", [key(number) for number in range(10, 19)])
        for number in range(20):
            face.do(store, "set", key(number), b"x" * 932, 60)
        assert (store.pending, store.dropped) == (10, 21)

    def test_memory_is_bounded(self, make) -> None:
        store = make(1000, max_bytes=1_000_000)
        tracemalloc.start()
        try:
            for number in range(3000):
                store.set(key(number), os.urandom(10_000), 60)
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 2_000_000
        finally:
            tracemalloc.stop()
        store.delete([key(number) for number in range(3000)])

    def test_one_that_cannot_be_written_keeps_none_back(self, server: RedisServer, make) -> None:
        server.ask("ACL", "SETUSER", "app", "on", ">pass", "~llm:*", "+@all")
        store = RedisStore(connect(server.port, username="app", password="pass"))
        ours = BufferedRedisStore(store, size=20, interval=0.005)
        for number in range(3):
            ours.set(key(number, "theirs"), b"v", 600)
        for number in range(100):
            ours.set(key(number), b"v", 600)
        wait_for(lambda: ours.pending == 3, "the others are written")
        assert server.ask("DBSIZE") == 100
        ours.delete([key(number) for number in range(100)])
        with pytest.raises(StoreError, match="ermission"):
            ours.delete([key(number, "theirs") for number in range(3)])
        ours.close()
        server.ask("ACL", "DELUSER", "app")

    def test_large_ones_go_in_several_batches(self, server: RedisServer, proxy: FaultProxy, make) -> None:
        store = make(10, port=proxy.port)
        for number in range(10):
            store.set(key(number), b"x" * 400_000, 60)
        written(store)
        assert server.ask("DBSIZE") == 10
        assert [_fits([400_000] * 10), _fits([2_000_000, 1]), _fits([1, 2_000_000]), _fits([])] == [
            2,
            1,
            1,
            0,
        ]


def _fits(sizes: list[int]) -> int:
    entries = [(key(number), redis_pending.Held(b"x" * size, 0.0, None)) for number, size in enumerate(sizes)]
    return redis_pending._fitting(entries, redis_pending._BATCH_BYTES)


class TestClosing:
    def test_it_writes_and_ends_the_thread(self, face: SyncFace, server: RedisServer, make) -> None:
        """C76."""
        before = threads()
        store = make()
        for number in range(3):
            face.do(store, "set", key(number), b"v", 60)
        assert len(threads()) == len(before) + 1
        face.do(store, "close")
        assert (store.pending, server.ask("DBSIZE")) == (0, 3)
        assert threads() == before
        face.do(store, "set", key(3), b"v", 60)
        assert face.do(store, "get", key(3)) == b"v"
        face.do(store, "close")
        assert server.ask("DBSIZE") == 4
        wait_for(
            lambda: server.ask("INFO", "clients")["connected_clients"] == 1, "its connections are closed"
        )

    def test_it_waits_for_the_batch_under_way(self, face: SyncFace, server: RedisServer, proxy, make) -> None:
        store = make(1, port=proxy.port)
        proxy.latency = 0.2
        face.do(store, "set", key(1), b"v", 60)
        wait_for(lambda: store._mine()._batch[0], "the batch is under way")
        face.do(store, "set", key(2), b"v", 60)
        face.do(store, "close")
        assert server.ask("DBSIZE") == 2
        assert server.calls()["set"] == 2

    def test_what_is_left_is_said_and_kept(self, face: SyncFace, caplog) -> None:
        with redis_server() as server:
            store = BufferedRedisStore(RedisStore(connect(server.port, 0.25)), size=100, interval=NEVER)
            server.kill()
            face.do(store, "set", key(1), b"v", 60)
            face.do(store, "set", key(2), b"v", 60)
            with caplog.at_level(logging.WARNING, "llm_middleware"):
                face.do(store, "close")
            assert "2 entries were not written on closing" in caplog.text
            assert face.do(store, "get", key(1)) == b"v"
            server.restart()
            face.do(store, "close")
            assert server.ask("DBSIZE") == 2

    def test_aclose_leaves_the_loop_free(self, server: RedisServer, proxy: FaultProxy, make) -> None:
        store = make(1000, port=proxy.port, budget=5.0)

        async def main() -> int:
            await store.aset(key(1), b"v", 60)
            proxy.latency = 0.2
            closing = asyncio.ensure_future(store.aclose())
            turns = 0
            while not closing.done():
                turns += 1
                await asyncio.sleep(0)
            await closing
            return turns

        assert asyncio.run(main()) > 50
        assert server.ask("DBSIZE") == 1

    def test_a_store_that_is_dropped_is_written_first(self, server: RedisServer) -> None:
        store = BufferedRedisStore(RedisStore(connect(server.port)), size=1000, interval=0.05)
        store.set(key(1), b"v", 60)
        del store
        gc.collect()
        wait_for(lambda: server.ask("DBSIZE") == 1, "it is written")

    def test_the_thread_ends_when_there_is_nothing_to_do(self, server, make, monkeypatch) -> None:
        monkeypatch.setattr(redis_pending, "_IDLE", 0.01)
        before = threads()
        store = make(1)
        for number in range(3):
            store.set(key(number), b"v", 60)
            wait_for(lambda: threads() == before, "the thread has ended")
            assert server.ask("DBSIZE") == number + 1


HEADER = """
import os, signal, sys, threading
from llm_middleware.stores.redis import RedisStore
from llm_middleware.stores.redis_buffer import BufferedRedisStore
from llm_middleware.stores.redis_connect import RedisConnection

def key(number):
    return f"llm:{number:064x}"

connection = RedisConnection.from_settings({"host": "127.0.0.1", "port": int(sys.argv[1])}, {}, budget=10.0)
store = BufferedRedisStore(RedisStore(connection), size=1000, interval=3600.0)
store.set(key(1), b"parent", 600)
store.set(key(2), b"parent", 600)
"""


def run(port: int, script: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", HEADER + script, str(port)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stderr) == (code, "")
    return done.stdout


class TestExit:
    """C76: what is pending is written when the interpreter ends in order."""

    @pytest.mark.parametrize(
        ("script", "code"),
        [
            ("", 0),
            ("sys.exit(3)", 3),
            (
                "signal.signal(signal.SIGTERM, lambda *_: sys.exit(4)); os.kill(os.getpid(), signal.SIGTERM)",
                4,
            ),
            ("import asyncio\nasync def main(): await store.aset(key(3), b'v', 600)\nasyncio.run(main())", 0),
            ("threading.Thread(target=store.set, args=(key(3), b'v', 600)).start()", 0),
            ("connection.sync_client().ping()", 0),
        ],
    )
    def test_in_order(self, server: RedisServer, script: str, code: int) -> None:
        assert run(server.port, script, code) == ""
        assert server.ask("DBSIZE") == (3 if "key(3)" in script else 2)

    def test_during_a_batch(self, server: RedisServer, proxy: FaultProxy) -> None:
        proxy.latency = 0.2
        script = """
store._mine()._enough = 1
store.set(key(3), b"v", 600)
with store._mine()._changed:
    store._mine()._changed.notify_all()
while not store._mine()._batch[0]:
    pass
store.set(key(4), b"v", 600)
"""
        run(proxy.port, script)
        assert (server.ask("DBSIZE"), server.calls()["set"]) == (4, 4)

    def test_a_server_that_is_gone(self) -> None:
        with redis_server() as gone:
            port = gone.port
        script = """
import logging
logging.getLogger("llm_middleware").addHandler(logging.StreamHandler(sys.stdout))
"""
        assert "2 entries were not written on closing" in run(port, script)

    def test_the_default_action_of_sigterm(self, server: RedisServer) -> None:
        """Nothing of the process runs: documented."""
        run(server.port, "os.kill(os.getpid(), signal.SIGTERM)", -15)
        assert server.ask("DBSIZE") == 0


class TestFork:
    def test_a_child_begins_with_nothing(self, server: RedisServer) -> None:
        script = """
pid = os.fork()
if pid == 0:
    assert store.pending == 0, store.pending
    store.set(key(3), b"child", 600)
    assert store.get(key(1)) is None
    sys.exit(5)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
assert store.pending == 2
assert store.get(key(3)) == b"child"
assert store.get(key(1)) == b"parent"
print(connection.sync_client().dbsize())
"""
        assert run(server.port, script) == "1\n"
        assert server.ask("MGET", key(1), key(2), key(3)) == [b"parent", b"parent", b"child"]
        assert server.calls()["set"] == 3

    def test_a_fork_while_the_locks_are_held(self, server: RedisServer) -> None:
        script = """
mine = store._mine()
mine._changed.acquire()
mine._writing.acquire()
pid = os.fork()
if pid == 0:
    store.set(key(3), b"child", 600)
    store.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
mine._writing.release()
mine._changed.release()
"""
        run(server.port, script)
        assert server.ask("MGET", key(1), key(2), key(3)) == [b"parent", b"parent", b"child"]
        assert server.calls()["set"] == 3

    def test_the_child_s_thread_is_its_own(self, server: RedisServer) -> None:
        script = """
pid = os.fork()
if pid == 0:
    ours = store._mine()
    ours._enough, ours._size = 2, 2
    store.set(key(3), b"child", 600)
    store.set(key(4), b"child", 600)
    while store.pending:
        threading.Event().wait(0.001)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
os._exit(0)
"""
        run(server.port, script)
        assert server.ask("MGET", key(1), key(3), key(4)) == [None, b"child", b"child"]


class Worker:
    """Sets, removes and reads keys of its own, and knows what it must see."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.choice = random.Random(number)
        self.last: dict[str, bytes | None] = {}
        self.wrong: list[object] = []

    def turns(self) -> Iterator[tuple[str, str, bytes | None]]:
        for turn in range(400):
            name, chance = key(self.number * 100 + self.choice.randrange(8)), self.choice.random()
            operation = "set" if chance < 0.5 else "delete" if chance < 0.55 else "get"
            if operation != "get":
                self.last[name] = b"%d" % turn if operation == "set" else None
            yield operation, name, self.last.get(name)

    def sees(self, name: str, seen: bytes | None) -> None:
        if seen != self.last.get(name):
            self.wrong.append((name, seen, self.last.get(name)))

    def work(self, store: BufferedRedisStore) -> None:
        for operation, name, value in self.turns():
            if operation == "set":
                store.set(name, value, 600)
            elif operation == "delete":
                store.delete([name])
            self.sees(name, store.get(name))

    async def awork(self, store: BufferedRedisStore) -> None:
        for operation, name, value in self.turns():
            if operation == "set":
                await store.aset(name, value, 600)
            elif operation == "delete":
                await store.adelete([name])
            [seen] = await store.amget([name])
            self.sees(name, seen)


class TestHammer:
    def test_no_one_reads_what_is_older_than_what_he_wrote(self, server: RedisServer, make) -> None:
        """Threads and loops; the table is written, and removed from, all the time."""
        store = make(16, 0.001)
        workers = [Worker(number) for number in range(10)]

        async def tasks(some: list[Worker]) -> None:
            await asyncio.gather(*[worker.awork(store) for worker in some])
            await store._store.aclose()

        work = [threading.Thread(target=worker.work, args=(store,)) for worker in workers[:4]]
        for some in (workers[4:7], workers[7:]):
            work.append(threading.Thread(target=asyncio.run, args=(tasks(some),)))  # noqa: PERF401
        for one in work:
            one.start()
        for one in work:
            one.join()
        assert [worker.wrong for worker in workers] == [[]] * 10
        assert server.calls()["set"] > 500
        store.close()
        mine = store._mine()
        assert (store.pending, store.dropped, mine._bytes, mine._batch) == (0, 0, 0, redis_pending._NOTHING)
