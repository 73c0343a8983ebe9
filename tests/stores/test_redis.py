"""The Redis store: its contract on every topology and both faces, what it sends, and what failures cost."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterator

import pytest
from redis._parsers import _HiredisParser, _RESP3Parser
from redis.crc import key_slot

from llm_middleware._store_contract import ContractClock, StoreContract
from llm_middleware.errors import CorruptEntryError, StoreError
from llm_middleware.stores.redis import RedisStore
from llm_middleware.stores.redis_connect import RedisConnection
from llm_middleware.types import AsyncStore, Clock, Store
from tests.services import (
    FACES,
    HOST,
    FaultProxy,
    RedisCluster,
    RedisServer,
    SyncFace,
    redis_cluster,
    redis_sentinel,
    redis_server,
    redis_tls,
    wait_for,
)

AMPLE = 10.0  # seconds: a budget that no test uses up
UPPER = 10.0  # seconds: what a failure must not cost however slow the machine is


def key(number: int, namespace: str = "llm") -> str:
    return f"{namespace}:{number:064x}"


def make(settings: dict[str, object], budget: float = AMPLE, clock: Clock = time.time) -> RedisStore:
    return RedisStore(RedisConnection.from_settings(settings, {}, budget=budget), clock=clock)


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Iterator[SyncFace]:
    made = FACES[request.param]()
    yield made
    made.close()


@pytest.fixture(scope="module")
def tls() -> Iterator[tuple[RedisServer, dict[str, object]]]:
    with redis_tls() as (server, made):
        yield server, {"host": HOST, "port": server.port, "ssl": True, "ssl_ca_certs": made.authority}


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisStore]:
    made = make({"host": HOST, "port": server.port})
    yield made
    made.close()


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[FaultProxy]:
    with FaultProxy(server.port) as made:
        yield made


class ServerClock(ContractClock):
    """Makes time pass on servers: what advances is every key's remaining time to live.

    The contract's seconds are a thousand of the server's (`Slow`), and its quarters of a second the grid to
    which a remaining time is rounded up: however long a test takes, nothing is over that should not be.
    """

    SCALE = 1000

    def __init__(self, servers: list[RedisServer]) -> None:
        super().__init__()
        self.servers = servers

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        for server in self.servers:
            with server.client() as client:
                for name in client.scan_iter():
                    self._age(client, name, seconds * 1000 * self.SCALE)

    def _age(self, client, name: bytes, milliseconds: float) -> None:
        left, grid = client.pttl(name), 250 * self.SCALE
        if left >= 0:
            client.pexpire(name, max(0, math.ceil(left / grid) * grid - int(milliseconds)))


class Slow(RedisStore):
    """For which a second is a thousand of the server's."""

    def set(self, key: str, value: bytes, ttl: float | None) -> None:
        super().set(key, value, None if ttl is None else ttl * ServerClock.SCALE)

    async def aset(self, key: str, value: bytes, ttl: float | None) -> None:
        await super().aset(key, value, None if ttl is None else ttl * ServerClock.SCALE)


class AsyncOnly:
    """The async face of a store, as a sync one."""

    tier = "redis"

    def __init__(self, store: RedisStore) -> None:
        self.store = store
        self.face = FACES["async"]()

    def get(self, *args: object) -> object:
        return self.face.do(self.store, "get", *args)

    def set(self, *args: object) -> object:
        return self.face.do(self.store, "set", *args)

    def delete(self, *args: object) -> object:
        return self.face.do(self.store, "delete", *args)

    def flush(self, *args: object) -> object:
        return self.face.do(self.store, "flush", *args)

    def close(self) -> None:
        self.face.do(self.store, "close")

    def shut(self) -> None:
        self.face.close()


class Contract(StoreContract):
    """The store contract, on servers that `reach` names; a `ServerClock` makes their time pass."""

    @pytest.fixture(autouse=True, params=["sync", "async"])
    def _prepared(self, request: pytest.FixtureRequest) -> None:
        self.servers, self.settings = self.reach(request)
        self.asynchronous = request.param == "async"

    def reach(self, request: pytest.FixtureRequest) -> tuple[list[RedisServer], dict[str, object]]:
        raise NotImplementedError

    @contextlib.contextmanager
    def open_store(self) -> Iterator[tuple[Store, ContractClock]]:
        for server in self.servers:
            server.ask("FLUSHALL")
        clock = ServerClock(self.servers)
        store = Slow(RedisConnection.from_settings(self.settings, {}, budget=AMPLE), clock=clock)
        if not self.asynchronous:
            with contextlib.closing(store):
                yield store, clock
            return
        face = AsyncOnly(store)
        try:
            yield face, clock  # type: ignore[misc]
        finally:
            face.shut()


class TestStandaloneContract(Contract):
    def reach(self, request):
        server = request.getfixturevalue("shared")
        return [server], {"host": HOST, "port": server.port, "db": 0}


class TestClusterContract(Contract):
    def reach(self, request):
        cluster = request.getfixturevalue("cluster")
        return cluster.servers, {"redis_startup_nodes": cluster.nodes}


class TestSentinelContract(Contract):
    def reach(self, request):
        made = request.getfixturevalue("sentinels")
        return [made.master], {"sentinel_nodes": made.nodes, "service_name": made.service}


class TestTlsContract(Contract):
    def reach(self, request):
        server, settings = request.getfixturevalue("tls")
        return [server], settings


class TestFaces:
    def test_it_has_both(self) -> None:
        store = make({})
        assert isinstance(store, Store)
        assert isinstance(store, AsyncStore)
        assert (store.tier, hasattr(store, "inline")) == ("redis", False)

    def test_one_object_serves_both_at_once(self, store: RedisStore) -> None:
        """C94."""
        store.set(key(1), b"sync", None)

        async def handler() -> bytes | None:
            assert await store.aget(key(1)) == b"sync"
            await store.aset(key(1), b"async", None)
            return await asyncio.to_thread(store.get, key(1))

        assert asyncio.run(handler()) == b"async"
        assert store.get(key(1)) == b"async"

    def test_a_caller_that_leaves_costs_the_next_one_nothing(
        self, store: RedisStore, proxy: FaultProxy
    ) -> None:
        """A cancelled read must not leave its answer to whoever reads next on that connection."""
        slow = make({"host": HOST, "port": proxy.port, "max_connections": 1})

        async def handler() -> list[bytes | None]:
            await slow.aset(key(1), b"one", None)
            await slow.aset(key(2), b"two", None)
            proxy.latency = 0.2
            asked = proxy.received
            task = asyncio.ensure_future(slow.aget(key(1)))
            await asyncio.to_thread(wait_for, lambda: proxy.received > asked, "the question is on its way")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            proxy.latency = 0
            return [await slow.aget(key(2)), await slow.aget(key(1))]

        assert asyncio.run(handler()) == [b"two", b"one"]


class TestCommands:
    """What is sent, as the server counts it."""

    def test_one_command_per_hit_and_one_per_write(
        self, face: SyncFace, server: RedisServer, store: RedisStore
    ) -> None:
        for number in range(10):
            face.do(store, "set", key(number), b"value", 60)
        for number in range(20):
            assert face.do(store, "get", key(number)) == (b"value" if number < 10 else None)
        calls = server.calls()
        assert (calls["set"], calls["get"]) == (10, 20)
        assert set(calls) <= {"set", "get", "hello", "info", "config|resetstat"}

    @pytest.mark.parametrize(
        ("ttl", "left"),
        [(None, -1), (60, 60_000), (0.5, 500), (1.0004, 1001), (math.inf, -1), (1e18, -1), (1e9, 1e12)],
    )
    def test_times_to_live(
        self, face: SyncFace, server: RedisServer, store: RedisStore, ttl: float | None, left: float
    ) -> None:
        face.do(store, "set", key(1), b"value", ttl)
        with server.client() as client:
            until = client.execute_command("PEXPIRETIME", key(1))
            now = client.execute_command("TIME")
        if left == -1:
            assert until == -1
        else:
            assert 0 <= left - (until - now[0] * 1000 - now[1] / 1000) < 30_000

    def test_the_time_to_live_is_sent_in_milliseconds(self, face: SyncFace, server: RedisServer) -> None:
        seen = []
        with server.client() as client, client.monitor() as monitor:
            store = make({"host": HOST, "port": server.port})
            for ttl in (60, 0.0001, 1.0004, None, 0, -1):
                face.do(store, "set", key(1), b"v", ttl)
            while len(seen) < 6:
                command = monitor.next_command()["command"]
                if command.startswith(("SET", "UNLINK")):
                    seen.append(command.replace(key(1), "k"))
            store.close()
        assert seen == [
            "SET k v PX 60000",
            "SET k v PX 1",
            "SET k v PX 1001",
            "SET k v",
            "UNLINK k",
            "UNLINK k",
        ]

    def test_a_hundred_keys_are_one_mget(
        self, face: SyncFace, server: RedisServer, store: RedisStore
    ) -> None:
        """C93."""
        face.do(store, "mset", [(key(n), b"%d" % n, 60) for n in range(0, 100, 2)])
        got = face.do(store, "mget", [key(n) for n in range(100)])
        assert got == [b"%d" % n if n % 2 == 0 else None for n in range(100)]
        assert server.calls()["mget"] == 1
        assert "get" not in server.calls()
        assert server.calls()["set"] == 50

    def test_repeated_and_no_keys(self, face: SyncFace, server: RedisServer, store: RedisStore) -> None:
        face.do(store, "set", key(1), b"one", None)
        assert face.do(store, "mget", [key(1), key(2), key(1)]) == [b"one", None, b"one"]
        assert face.do(store, "mget", []) == []
        assert face.do(store, "mset", []) is None
        assert face.do(store, "delete", [key(1), key(1), key(2)]) == 1
        assert face.do(store, "delete", []) == 0
        assert (server.calls()["mget"], server.calls()["unlink"]) == (1, 1)

    def test_in_a_cluster_one_command_per_slot(self, face: SyncFace, cluster: RedisCluster) -> None:
        """C93: keys of one slot share a command; each node is asked once, however many slots it has."""
        for server in cluster.servers:
            server.ask("FLUSHALL")
            server.ask("CONFIG", "RESETSTAT")
        store = make({"redis_startup_nodes": cluster.nodes})
        keys = [key(n) for n in range(100)] + [key(n, "{tag}") for n in range(100)]
        slots = {key_slot(k.encode()) for k in keys}
        face.do(store, "mset", [(k, k.encode(), 60) for k in keys])
        assert face.do(store, "mget", keys) == [k.encode() for k in keys]
        assert (cluster.calls("mget"), cluster.calls("set"), len(slots)) == (len(slots), 200, 101)
        assert face.do(store, "delete", [*keys, key(999)]) == 200
        assert cluster.calls("unlink") == len(slots | {key_slot(key(999).encode())})
        store.close()


class TestFlush:
    """C60: this namespace only, whatever it is called, and nothing else on the server."""

    OTHERS = (
        "app:session",
        "llm",
        "llm:",
        "llm:short",
        f"llm:{'g' * 64}",
        f"llm:{'A' * 64}",
        f"llm2:{1:064x}",
    )

    def test_other_applications_are_left_alone(
        self, face: SyncFace, server: RedisServer, store: RedisStore
    ) -> None:
        others = [*self.OTHERS, f"llm:{1:065x}", f"x:llm:{1:064x}", f"llm:{1:064x}:meta", f"llm:{1:064x}\n"]
        with server.client() as client, server.client(db=1) as elsewhere:
            for name in others:
                client.set(name, "theirs")
            client.lpush("app:queue", "job")
            elsewhere.set(key(1), "theirs")
            for number in range(2500):
                client.set(key(number), "ours")
            assert face.do(store, "flush", "llm") == 2500
            assert sorted(client.keys()) == sorted(name.encode() for name in [*others, "app:queue"])
            assert elsewhere.keys() == [key(1).encode()]
        assert not {"flushall", "flushdb", "keys"} & (set(server.calls()) - {"flushall", "keys"})

    def test_it_never_flushes_a_database(
        self, face: SyncFace, server: RedisServer, store: RedisStore
    ) -> None:
        face.do(store, "set", key(1), b"value", None)
        face.do(store, "flush", "llm")
        assert set(server.calls()) - {"hello", "info", "config|resetstat"} == {"set", "scan", "unlink"}

    @pytest.mark.parametrize(
        "namespace", ["*", "l?m", "[a-z]", "a\\", "\\*", "[", "]", "ü", "a:b", "{x}", "a b", "^"]
    )
    def test_a_namespace_is_no_pattern(
        self, face: SyncFace, server: RedisServer, store: RedisStore, namespace: str
    ) -> None:
        for other in ("llm", "a", "lxm", "z", "", namespace + "x", "x" + namespace):
            face.do(store, "set", key(1, other), b"other", None)
        face.do(store, "set", key(1, namespace), b"ours", None)
        assert face.do(store, "flush", namespace) == 1
        assert server.ask("DBSIZE") == 7
        assert face.do(store, "get", key(1, namespace)) is None

    def test_on_every_master(self, face: SyncFace, cluster: RedisCluster) -> None:
        store = make({"redis_startup_nodes": cluster.nodes})
        for server in cluster.servers:
            server.ask("FLUSHALL")
        face.do(store, "mset", [(key(n), b"v", None) for n in range(3000)])
        face.do(store, "mset", [(key(n, "llm2"), b"v", None) for n in range(30)])
        assert all(server.ask("DBSIZE") > 500 for server in cluster.servers)
        assert face.do(store, "flush", "llm") == 3000
        assert sum(server.ask("DBSIZE") for server in cluster.servers) == 30
        store.close()


class TestPing:
    def test_it_says_what_answers_and_where(
        self, face: SyncFace, server: RedisServer, store: RedisStore
    ) -> None:
        """C33, C114."""
        said = face.do(store, "ping")
        assert said["server"] == "redis"
        assert said["server_version"] == server.ask("INFO", "server")["redis_version"]
        assert 0 < said["latency_ms"] < AMPLE * 1000
        assert abs(said["clock_skew_ms"]) <= 1000
        assert said["connection"] == store.connection.describe()

    def test_a_clock_that_is_off(self, face: SyncFace, server: RedisServer) -> None:
        store = make({"host": HOST, "port": server.port}, clock=lambda: time.time() - 90)
        assert abs(face.do(store, "ping")["clock_skew_ms"] - 90_000) <= 1000
        store.close()

    def test_a_cluster(self, face: SyncFace, cluster: RedisCluster) -> None:
        store = make({"redis_startup_nodes": cluster.nodes})
        before = cluster.calls("ping")
        assert face.do(store, "ping")["connection"]["topology"] == "cluster"
        assert cluster.calls("ping") - before == 3
        store.close()

    def test_with_the_old_protocol(self, face: SyncFace, server: RedisServer) -> None:
        store = make({"host": HOST, "port": server.port, "protocol": 2})
        assert face.do(store, "ping")["server_version"] is None
        face.do(store, "set", key(1), b"value", 60)
        assert face.do(store, "mget", [key(1), key(2)]) == [b"value", None]
        assert face.do(store, "flush", "llm") == 1
        assert "hello" not in server.calls(protocol=2)
        store.close()


class TestServerErrors:
    """What a server says no with becomes a `StoreError` that names no secret."""

    def fails(self, face: SyncFace, store: RedisStore, method: str, *args: object) -> StoreError:
        with pytest.raises(StoreError) as caught:
            face.do(store, method, *args)
        return caught.value

    def test_out_of_memory(self, face: SyncFace, server: RedisServer, store: RedisStore) -> None:
        face.do(store, "set", key(1), b"value", None)
        server.ask("CONFIG", "SET", "maxmemory", "1")
        try:
            assert "used memory > 'maxmemory'" in str(self.fails(face, store, "set", key(2), b"v", 60))
            assert face.do(store, "get", key(1)) == b"value"
        finally:
            server.ask("CONFIG", "SET", "maxmemory", "0")
        face.do(store, "set", key(2), b"v", 60)

    def test_read_only(self, face: SyncFace, server: RedisServer, store: RedisStore) -> None:
        server.ask("REPLICAOF", HOST, "1")
        try:
            assert "read only" in str(self.fails(face, store, "set", key(1), b"v", 60))
            assert face.do(store, "get", key(1)) is None
        finally:
            server.ask("REPLICAOF", "NO", "ONE")
        face.do(store, "set", key(1), b"v", 60)

    def test_another_type_under_the_key_is_damage_to_one_entry(
        self, face: SyncFace, server: RedisServer, store: RedisStore
    ) -> None:
        """C31: a miss that its caller removes, not a store that is down."""
        server.ask("LPUSH", key(1), "theirs")
        assert type(self.fails(face, store, "get", key(1))) is CorruptEntryError
        assert face.do(store, "mget", [key(1)]) == [None]
        assert face.do(store, "delete", [key(1)]) == 1
        server.ask("LPUSH", key(1), "theirs")
        face.do(store, "set", key(1), b"ours", None)
        assert face.do(store, "get", key(1)) == b"ours"

    def test_no_and_wrong_credentials(self, face: SyncFace) -> None:
        with redis_server("--requirepass", "right", password="right") as server:
            for settings in ({}, {"password": "wr0ng-secret"}, {"username": "u", "password": "wr0ng-secret"}):
                store = make({"host": HOST, "port": server.port, **settings})
                error = self.fails(face, store, "get", key(1))
                assert type(error) is StoreError
                assert "wr0ng-secret" not in repr(error)
                store.close()
            store = make({"host": HOST, "port": server.port, "password": "right"})
            assert face.do(store, "get", key(1)) is None
            store.close()

    def test_a_server_that_repeats_what_it_was_sent(self, face: SyncFace) -> None:
        """Before version 6 HELLO is unknown, and the error quotes its arguments: the password."""
        with redis_server("--rename-command", "HELLO", "HI", protocol=2) as server:
            store = make({"host": HOST, "port": server.port, "password": "s3cret-word"})
            error = self.fails(face, store, "get", key(1))
            assert "unknown command" in str(error)
            assert "***" in str(error)
            assert "s3cret-word" not in str(error)
            assert error.__cause__ is None
            assert error.__suppress_context__ is True
            store.close()

    def test_loading(self, face: SyncFace, store: RedisStore, server: RedisServer) -> None:
        with redis_server("--enable-debug-command", "yes") as other:
            other.ask("SET", "x", "y" * 1000)
            loading = make({"host": HOST, "port": other.port})
            face.do(loading, "set", key(1), b"v", 60)
            other.ask("DEBUG", "POPULATE", "20000")
            other.ask("CONFIG", "SET", "key-load-delay", "200")
            other.ask("CONFIG", "SET", "loading-process-events-interval-bytes", "1024")
            with other.client(retry=None, socket_timeout=0.05) as client, contextlib.suppress(Exception):
                client.execute_command("DEBUG", "RELOAD")
            wait_for(lambda: _says_loading(face, loading), "the server loads its data")
            loading.close()

    def test_an_answer_that_breaks_off(self, face: SyncFace) -> None:
        with redis_server() as server, FaultProxy(server.port) as proxy:
            store = make({"host": HOST, "port": proxy.port})
            face.do(store, "set", key(1), b"x" * 10_000, None)
            proxy.cut_after = 5_000
            assert type(self.fails(face, store, "get", key(1))) is StoreError
            proxy.heal()
            assert face.do(store, "get", key(1)) == b"x" * 10_000
            store.close()

    def test_an_acl_user_with_just_what_is_needed(self, face: SyncFace, server: RedisServer) -> None:
        rules = [
            "on",
            ">pass",
            "~llm:*",
            "-@all",
            "+get",
            "+set",
            "+mget",
            "+unlink",
            "+scan",
            "+ping",
            "+time",
        ]
        server.ask("ACL", "SETUSER", "app", *rules, "+hello")
        settings = {"host": HOST, "port": server.port, "username": "app", "password": "pass"}
        store = make(settings)
        face.do(store, "set", key(1), b"value", 60)
        assert face.do(store, "get", key(1)) == b"value"
        assert face.do(store, "mget", [key(1), key(2)]) == [b"value", None]
        assert face.do(store, "ping")["connection"]["username"] == "app"
        assert face.do(store, "delete", [key(1)]) == 1
        assert face.do(store, "flush", "llm") == 0
        assert "permission" in str(self.fails(face, store, "set", key(1, "other"), b"v", 60)).lower()
        store.close()

    def test_slots_that_moved(self, face: SyncFace, cluster: RedisCluster) -> None:
        """MOVED and ASK are followed: the answer comes, if a command later."""
        store = make({"redis_startup_nodes": cluster.nodes})
        moved = next(k for k in map(key, range(1000)) if key_slot(k.encode()) < 5000)
        slot = key_slot(moved.encode())
        source, target = cluster.servers[0], cluster.servers[1]
        ids = {server.port: server.ask("CLUSTER", "MYID") for server in cluster.servers}
        face.do(store, "set", moved, b"value", None)
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
        source.ask("MIGRATE", HOST, target.port, moved, 0, 5000)
        try:
            assert face.do(store, "get", moved) == b"value"  # ASK
        finally:
            for server in (target, source, cluster.servers[2]):
                server.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[target.port])
        assert face.do(store, "get", moved) == b"value"  # MOVED
        assert face.do(store, "mget", [moved, key(1)])[0] == b"value"
        assert face.do(store, "delete", [moved]) == 1
        for server in (source, target, cluster.servers[2]):
            server.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[source.port])
        store.close()


def _says_loading(face: SyncFace, store: RedisStore) -> bool:
    try:
        face.do(store, "get", key(1))
    except StoreError as error:
        return "loading" in str(error).lower()
    return False


class TestNetworkFaults:
    """C61, C62, C64: each failure is one `StoreError` within about the budget, and over when the fault is."""

    BUDGET = 0.25

    @pytest.fixture
    def ours(self, proxy: FaultProxy) -> Iterator[RedisStore]:
        made = make({"host": HOST, "port": proxy.port}, self.BUDGET)
        yield made
        made.close()

    def fails(self, face: SyncFace, store: RedisStore, *call: object) -> str:
        began = time.monotonic()
        with pytest.raises(StoreError) as caught:
            face.do(store, *call)
        assert time.monotonic() - began < UPPER
        return str(caught.value)

    def works_again(self, face: SyncFace, store: RedisStore) -> None:
        def once() -> bool:
            try:
                face.do(store, "set", key(1), b"again", 60)
                return face.do(store, "get", key(1)) == b"again"
            except StoreError:
                return False

        wait_for(once, "the store works again")

    def test_refused(self, face: SyncFace, proxy: FaultProxy, ours: RedisStore) -> None:
        proxy.refuse()
        for _ in range(3):
            assert f"{HOST}:{proxy.port}" in self.fails(face, ours, "get", key(1))
        assert proxy.connections == 0
        proxy.accept()
        self.works_again(face, ours)

    def test_refused_after_it_worked(self, face: SyncFace, proxy: FaultProxy, ours: RedisStore) -> None:
        self.works_again(face, ours)
        connections = proxy.connections
        proxy.refuse()
        self.fails(face, ours, "get", key(1))
        proxy.accept()
        self.works_again(face, ours)
        assert proxy.connections > connections

    def test_reset_connections_are_replaced_without_an_error(
        self, face: SyncFace, proxy: FaultProxy, ours: RedisStore
    ) -> None:
        self.works_again(face, ours)
        connections = proxy.connections
        proxy.reset()
        self.works_again(face, ours)
        assert proxy.connections == connections + 1

    def test_swallowed(self, face: SyncFace, proxy: FaultProxy, ours: RedisStore) -> None:
        self.works_again(face, ours)
        asked = proxy.received
        proxy.blackhole = True
        self.fails(face, ours, "get", key(1))
        assert proxy.received > asked  # it was sent, and nothing came
        proxy.heal()
        self.works_again(face, ours)

    def test_swallowed_from_the_start(self, face: SyncFace, proxy: FaultProxy, ours: RedisStore) -> None:
        proxy.blackhole = True
        self.fails(face, ours, "set", key(1), b"v", 60)
        self.fails(face, ours, "flush", "llm")
        self.fails(face, ours, "ping")
        assert proxy.connections == 3
        proxy.heal()
        self.works_again(face, ours)

    def test_a_trickle_ends_with_the_budget(
        self, face: SyncFace, server: RedisServer, proxy: FaultProxy, ours: RedisStore
    ) -> None:
        """A byte now and then never lets a read time out; the operation ends all the same, half-way."""
        server.ask("SET", key(2), "x" * 100_000)
        self.works_again(face, ours)
        sent = proxy.sent
        proxy.rate = 20_000.0  # bytes per second: five seconds for the value
        self.fails(face, ours, "get", key(2))
        assert 0 < proxy.sent - sent < 100_000
        proxy.heal()
        wait_for(lambda: _reads(face, ours, key(2)) == b"x" * 100_000, "the value comes whole")

    def test_a_slow_handshake_counts_as_well(
        self, face: SyncFace, proxy: FaultProxy, ours: RedisStore
    ) -> None:
        """Each answer of the handshake is in time for itself; together they are not."""
        slow = make({"host": HOST, "port": proxy.port, "db": 1, "client_name": "a"}, self.BUDGET)
        proxy.latency = self.BUDGET * 0.3  # each way: less than the budget a command, and there are four
        self.fails(face, slow, "get", key(1))
        assert proxy.sent > 0
        proxy.heal()
        self.works_again(face, slow)
        slow.close()

    def test_more_callers_than_connections_take_turns(self, face: SyncFace, server: RedisServer) -> None:
        store = make({"host": HOST, "port": server.port, "max_connections": 3})
        face.do(store, "set", key(1), b"value", None)
        assert face.together(*[(store, "get", key(1))] * 60) == [b"value"] * 60
        assert server.ask("INFO", "clients")["connected_clients"] <= 3 + 2
        store.close()

    def test_a_queue_behind_a_hung_server_ends_with_the_budget(
        self, face: SyncFace, proxy: FaultProxy, server: RedisServer
    ) -> None:
        store = make({"host": HOST, "port": proxy.port, "max_connections": 2}, self.BUDGET)
        proxy.blackhole = True
        began = time.monotonic()
        results = face.together(*[(store, "get", key(1))] * 20)
        assert {type(result) for result in results} == {StoreError}
        assert time.monotonic() - began < UPPER
        proxy.heal()
        self.works_again(face, store)
        store.close()

    def test_a_hung_process(self, face: SyncFace, server: RedisServer) -> None:
        store = make({"host": HOST, "port": server.port}, self.BUDGET)
        self.works_again(face, store)
        server.pause()
        try:
            self.fails(face, store, "get", key(1))
            self.fails(face, store, "get", key(1))
        finally:
            server.resume()
        self.works_again(face, store)
        store.close()

    def test_a_killed_process(self, face: SyncFace) -> None:
        with redis_server() as server:
            store = make({"host": HOST, "port": server.port}, self.BUDGET)
            self.works_again(face, store)
            server.kill()
            self.fails(face, store, "get", key(1))
            self.fails(face, store, "set", key(1), b"v", 60)
            server.restart()
            self.works_again(face, store)
            store.close()

    def test_a_master_of_a_cluster_that_hangs(self, face: SyncFace) -> None:
        """Keys of the other masters are answered; those of this one fail within the budget."""
        with redis_cluster() as cluster:
            store = make({"redis_startup_nodes": cluster.nodes}, 1.0)
            keys = [next(k for k in map(key, range(10_000)) if _master_of(k) == m) for m in range(3)]
            wait_for(lambda: _all_set(face, store, keys), "the cluster is reached")
            cluster.servers[1].pause()
            try:
                self.fails(face, store, "get", keys[1])
                assert face.do(store, "get", keys[0]) == b"v"
                assert face.do(store, "get", keys[2]) == b"v"
            finally:
                cluster.servers[1].resume()
            wait_for(lambda: _all_set(face, store, keys), "the cluster is whole again")
            store.close()


class TestParsers:
    """The sync sockets keep to the deadline under redis-py's own parser and under hiredis."""

    @pytest.fixture(params=[_RESP3Parser, _HiredisParser], ids=["python", "hiredis"])
    def ours(self, request: pytest.FixtureRequest, proxy: FaultProxy) -> Iterator[RedisStore]:
        made = make({"host": HOST, "port": proxy.port}, 1.0)
        made.connection.sync_client().connection_pool.connection_kwargs["parser_class"] = request.param
        yield made
        made.close()

    def test_faults(self, server: RedisServer, proxy: FaultProxy, ours: RedisStore) -> None:
        server.ask("SET", key(1), "x" * 100_000)
        assert ours.get(key(1)) == b"x" * 100_000
        proxy.reset()
        assert ours.get(key(2)) is None
        proxy.rate = 20_000.0
        with pytest.raises(StoreError):
            ours.get(key(1))
        proxy.rate, proxy.blackhole = None, True
        with pytest.raises(StoreError):
            ours.get(key(1))
        assert proxy.connections == 3  # the blackhole took a new one: the trickle's was given up
        proxy.heal()
        wait_for(lambda: _reads(SyncFace(), ours, key(1)) == b"x" * 100_000, "the value comes whole")


def _master_of(name: str) -> int:
    return min(2, key_slot(name.encode()) * 3 // 16384)


def _all_set(face: SyncFace, store: RedisStore, keys: list[str]) -> bool:
    try:
        face.do(store, "mset", [(k, b"v", None) for k in keys])
        return [face.do(store, "get", k) for k in keys] == [b"v"] * len(keys)
    except StoreError:
        return False


class TestFailover:
    def test_the_store_follows_the_sentinels(self, face: SyncFace) -> None:
        with redis_sentinel() as made:
            store = make({"sentinel_nodes": made.nodes, "service_name": made.service}, 1.0)
            face.do(store, "set", key(1), b"before", None)
            wait_for(lambda: made.replica.ask("GET", key(1)) == b"before", "the replica has it")
            made.master.kill()
            with pytest.raises(StoreError):
                face.do(store, "set", key(2), b"lost", None)
            wait_for(lambda: made.master_port() == made.replica.port, "the sentinels chose the replica")

            def writes() -> bool:
                try:
                    face.do(store, "set", key(2), b"after", None)
                except StoreError:
                    return False
                return True

            wait_for(writes, "the store writes to the new master")
            assert made.replica.ask("GET", key(2)) == b"after"
            assert face.do(store, "get", key(1)) == b"before"
            store.close()

    def test_sentinels_that_hang_or_are_gone(self, face: SyncFace) -> None:
        """One that answers is enough; with none, all of them together cost one budget, not one each."""
        with redis_sentinel() as made:
            settings = {"sentinel_nodes": made.nodes, "service_name": made.service}
            store, late, lost = make(settings, 2.0), make(settings, 2.0), make(settings, 0.25)
            made.sentinels[0].kill()
            face.do(store, "set", key(1), b"value", None)
            made.sentinels[1].pause()
            assert face.do(late, "get", key(1)) == b"value"
            made.sentinels[2].pause()
            began = time.monotonic()
            with pytest.raises(StoreError):
                face.do(lost, "get", key(1))
            assert time.monotonic() - began < UPPER
            assert face.do(store, "get", key(1)) == b"value"  # its connection needs no sentinel
            for one in (store, late, lost):
                one.close()

    def test_the_store_follows_a_cluster(self, face: SyncFace) -> None:
        """A master that hangs, and so never says that it is gone, is replaced by its replica."""
        with redis_cluster(3, replicas=1) as cluster:
            store = make({"redis_startup_nodes": cluster.nodes}, 2.0)
            name = next(k for k in map(key, range(10_000)) if _master_of(k) == 0)
            face.do(store, "set", name, b"before", None)
            wait_for(lambda: cluster.replicas[0].ask("DBSIZE") == 1, "the replica has it")
            cluster.servers[0].pause()
            try:
                with pytest.raises(StoreError):
                    face.do(store, "get", name)
                wait_for(
                    lambda: _reads(face, store, name) == b"before", "the store reads from the new master"
                )
                face.do(store, "set", name, b"after", None)
                assert cluster.replicas[0].ask("GET", name) == b"after"
            finally:
                cluster.servers[0].resume()
            store.close()


def _reads(face: SyncFace, store: RedisStore, name: str) -> object:
    try:
        return face.do(store, "get", name)
    except StoreError:
        return None
