"""The index of each caller's recent entries: order, bounds, what it costs, on a server and in a Cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from llm_middleware.errors import StoreError
from llm_middleware.stores.redis_connect import RedisConnection
from llm_middleware.stores.redis_recent import RecentEntries
from tests.services import (
    HOST,
    FaultProxy,
    RedisCluster,
    RedisServer,
    redis_sentinel,
    redis_server,
    wait_for,
)

AMPLE = 10.0  # seconds: a budget that no test uses up
OWNER, OTHER = "0a" * 32, "0b" * 32


def key(number: int, namespace: str = "llm") -> str:
    return f"{namespace}:{number:064x}"


class Redis:
    """A connection, and what both topologies are asked alike."""

    def __init__(self, servers: list[RedisServer], settings: dict[str, object]) -> None:
        self.servers = servers
        self.connection = RedisConnection.from_settings(settings, {}, budget=AMPLE)

    def send(self, *commands: tuple[object, ...]) -> list[object]:
        """In one pipeline, as the store does."""
        with self.connection.use() as client:
            pipe = client.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*command)
            return pipe.execute()

    def store(
        self, recent: RecentEntries, number: int, value: bytes = b"v", ttl: float | None = 60, owner=OWNER
    ) -> None:
        name = key(number)
        self.send(("SET", name, value), *recent.noting(owner, name, ttl))

    def index(self, owner: str = OWNER, namespace: str = "llm") -> list[int]:
        [names] = self.send(("LRANGE", f"{namespace}:~recent:{owner}", 0, -1))
        return [int(name, 16) for name in names]

    def left(self, owner: str = OWNER) -> int:
        [milliseconds] = self.send(("PTTL", f"llm:~recent:{owner}"))
        return milliseconds

    def calls(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for server in self.servers:
            for name, count in server.calls().items():
                total[name] = total.get(name, 0) + count
        return total


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as made:
        yield made


@pytest.fixture(params=["standalone", "cluster"])
def redis(request: pytest.FixtureRequest) -> Iterator[Redis]:
    if request.param == "standalone":
        server = request.getfixturevalue("server")
        made = Redis([server], {"host": HOST, "port": server.port})
    else:
        cluster = request.getfixturevalue("cluster")
        made = Redis(cluster.servers, {"redis_startup_nodes": cluster.nodes})
    for one in made.servers:
        one.ask("FLUSHALL")
    yield made
    made.connection.close()


@pytest.fixture
def single(server: RedisServer) -> Iterator[Redis]:
    server.ask("FLUSHALL")
    made = Redis([server], {"host": HOST, "port": server.port})
    yield made
    made.connection.close()


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest):
    """``ask(recent, owner)``: numbers and values, newest first."""

    def ask(recent: RecentEntries, owner: str = OWNER) -> list[tuple[int, bytes]]:
        found = recent.recent(owner) if request.param == "sync" else asyncio.run(_asked(recent, owner))
        assert all(name == key(int(name[-64:], 16)) for name, _ in found)
        return [(int(name[-64:], 16), value) for name, value in found]

    return ask


async def _asked(recent: RecentEntries, owner: str) -> list[tuple[str, bytes]]:
    try:
        return await recent.arecent(owner)
    finally:
        await recent._connection.aclose()


class TestOrder:
    def test_the_newest_first_and_none_twice(self, redis: Redis, ask) -> None:
        recent = RecentEntries(redis.connection, "llm")
        for number in (1, 2, 3, 1):
            redis.store(recent, number, b"%d" % number)
        assert ask(recent) == [(1, b"1"), (3, b"3"), (2, b"2")]
        assert redis.index() == [1, 3, 2]

    def test_nothing_yet(self, redis: Redis, ask) -> None:
        assert ask(RecentEntries(redis.connection, "llm")) == []

    def test_no_more_than_the_newest(self, redis: Redis, ask) -> None:
        recent = RecentEntries(redis.connection, "llm", most=5)
        for number in range(12):
            redis.store(recent, number)
        assert [number for number, _ in ask(recent)] == [11, 10, 9, 8, 7]
        assert redis.index() == [11, 10, 9, 8, 7]
        assert [number for number, _ in ask(RecentEntries(redis.connection, "llm", most=2))] == [11, 10]

    def test_a_hundred_unless_told_otherwise(self, redis: Redis, ask) -> None:
        recent = RecentEntries(redis.connection, "llm")
        redis.send(*[c for n in range(130) for c in (("SET", key(n), n), *recent.noting(OWNER, key(n), 60))])
        assert ask(recent) == [(number, b"%d" % number) for number in range(129, 29, -1)]

    def test_owners_see_their_own(self, redis: Redis, ask) -> None:
        recent = RecentEntries(redis.connection, "llm")
        for number in range(6):
            redis.store(recent, number, owner=OTHER if number % 2 else OWNER)
        assert [number for number, _ in ask(recent)] == [4, 2, 0]
        assert [number for number, _ in ask(recent, OTHER)] == [5, 3, 1]
        assert ask(recent, "0c" * 32) == []

    def test_namespaces_see_their_own(self, redis: Redis, ask) -> None:
        recent, other = (RecentEntries(redis.connection, name) for name in ("llm", "llm:b"))
        redis.store(recent, 1)
        redis.send(("SET", key(2, "llm:b"), b"b"), *other.noting(OWNER, key(2, "llm:b"), 60))
        assert ask(recent) == [(1, b"v")]
        assert other.recent(OWNER) == [(key(2, "llm:b"), b"b")]
        assert recent.noting(OWNER, key(2, "llm:b"), 60) == []
        assert recent.noting(OWNER, key(2, "ll"), 60) == []
        assert other.noting(OWNER, key(2), 60) == []


class TestWhatIsGone:
    def test_it_leaves_the_index_when_it_is_seen(self, redis: Redis, ask) -> None:
        recent = RecentEntries(redis.connection, "llm")
        for number in range(5):
            redis.store(recent, number)
        redis.send(("DEL", key(1)), ("DEL", key(4)), ("DEL", key(2)), ("LPUSH", key(2), "theirs"))
        assert [number for number, _ in ask(recent)] == [3, 0]
        assert redis.index() == [3, 0]
        assert 0 < redis.left() <= 60_000

    def test_all_of_it(self, redis: Redis, ask) -> None:
        recent = RecentEntries(redis.connection, "llm")
        for number in range(5):
            redis.store(recent, number)
        redis.send(*[("DEL", key(number)) for number in range(5)])
        assert ask(recent) == []
        assert redis.index() == []
        assert redis.left() == -2

    def test_an_entry_that_is_removed_by_a_set(self, redis: Redis, ask) -> None:
        recent = RecentEntries(redis.connection, "llm")
        for number in range(3):
            redis.store(recent, number)
        redis.send(*recent.noting(OWNER, key(1), 0), *recent.noting(OWNER, key(2), -1))
        assert redis.index() == [0]


class TestTimeToLive:
    def test_that_of_the_longest(self, redis: Redis) -> None:
        recent = RecentEntries(redis.connection, "llm")
        redis.store(recent, 1, ttl=1000)
        assert 900_000 < redis.left() <= 1_000_000
        redis.store(recent, 2, ttl=5000)
        redis.store(recent, 1, ttl=100)
        assert 4_900_000 < redis.left() <= 5_000_000

    def test_of_a_single_entry_that_is_set_again(self, redis: Redis) -> None:
        recent = RecentEntries(redis.connection, "llm")
        redis.store(recent, 1, ttl=None)
        assert redis.left() == -1
        redis.send(("DEL", f"llm:~recent:{OWNER}"))
        redis.store(recent, 1, ttl=1000.0005)
        assert 900_000 < redis.left() <= 1_000_001

    @pytest.mark.parametrize("ttl", [None, float("inf"), 1e15])
    def test_without_end(self, redis: Redis, ttl: float | None) -> None:
        recent = RecentEntries(redis.connection, "llm")
        redis.store(recent, 1, ttl=1000)
        redis.store(recent, 2, ttl=ttl)
        assert redis.left() == -1

    def test_an_end_does_not_come_back(self, single: Redis) -> None:
        recent = RecentEntries(single.connection, "llm")
        single.store(recent, 1, ttl=None)
        single.store(recent, 2, ttl=1000)
        single.store(recent, 1, ttl=1000)
        assert single.left() == -1


class TestCost:
    def test_one_script_to_note_and_one_to_read(self, single: Redis, ask) -> None:
        recent = RecentEntries(single.connection, "llm")
        for number in range(100):
            assert len(recent.noting(OWNER, key(number), 60)) == 1
            single.store(recent, number)
        single.servers[0].ask("CONFIG", "RESETSTAT")
        assert len(ask(recent)) == 100
        calls = single.calls()
        assert (calls["eval"], calls["get"], calls["strlen"]) == (1, 100, 100)
        assert not {"scan", "keys", "mget", "evalsha", "lrem"} & set(calls)

    def test_one_round_trip(self, single: Redis, server: RedisServer) -> None:
        """What the client sends comes as one piece: a proxy sees no second one."""
        recent = RecentEntries(single.connection, "llm")
        for number in range(100):
            single.store(recent, number)
        with FaultProxy(server.port) as proxy:
            near = RedisConnection.from_settings({"host": HOST, "port": proxy.port}, {}, budget=AMPLE)
            warm = RecentEntries(near, "llm")
            assert warm.recent(OTHER) == []
            before = proxy.received
            assert warm.recent(OTHER) == []
            alone = proxy.received - before
            before = proxy.received
            assert len(warm.recent(OWNER)) == 100
            assert proxy.received - before == alone
            near.close()

    def test_no_scripts_in_a_cluster(self, cluster: RedisCluster, ask) -> None:
        made = Redis(cluster.servers, {"redis_startup_nodes": cluster.nodes})
        for server in cluster.servers:
            server.ask("FLUSHALL")
        recent = RecentEntries(made.connection, "llm")
        for number in range(20):
            made.store(recent, number)
        for server in cluster.servers:
            server.ask("CONFIG", "RESETSTAT")
        assert [number for number, _ in ask(recent)] == list(range(19, -1, -1))
        calls = made.calls()
        assert (calls["lrange"], calls["getrange"]) == (1, 20)
        assert not {"eval", "evalsha", "command|getkeys", "scan", "get", "lrem"} & set(calls)
        made.connection.close()

    def test_in_a_cluster_noting_asks_for_no_keys(self, cluster: RedisCluster) -> None:
        made = Redis(cluster.servers, {"redis_startup_nodes": cluster.nodes})
        recent = RecentEntries(made.connection, "llm")
        for server in cluster.servers:
            server.ask("CONFIG", "RESETSTAT")
        made.store(recent, 1)
        calls = made.calls()
        assert [calls[name] for name in ("set", "lrem", "lpush", "ltrim", "pexpire")] == [1, 1, 1, 1, 2]
        assert "command|getkeys" not in calls
        made.connection.close()


class TestRoom:
    def test_on_one_server_the_newest_that_fit(self, single: Redis, ask) -> None:
        recent = RecentEntries(single.connection, "llm", most_bytes=1000)
        for number, size in enumerate([10, 500, 1, 400, 2000, 300]):
            single.store(recent, number, b"x" * size)
        assert [(number, len(value)) for number, value in ask(recent)] == [
            (5, 300),
            (3, 400),
            (2, 1),
            (0, 10),
        ]
        assert single.index() == [5, 4, 3, 2, 1, 0]

    def test_four_megabytes_unless_told_otherwise(self, single: Redis, ask) -> None:
        recent = RecentEntries(single.connection, "llm")
        for number in range(10):
            single.store(recent, number, b"x" * 2**20)
        assert [number for number, _ in ask(recent)] == [9, 8, 7, 6]

    def test_in_a_cluster_an_equal_share(self, cluster: RedisCluster, ask) -> None:
        made = Redis(cluster.servers, {"redis_startup_nodes": cluster.nodes})
        for server in cluster.servers:
            server.ask("FLUSHALL")
        recent = RecentEntries(made.connection, "llm", most_bytes=1000)
        for number, size in enumerate([250, 251, 1, 2000]):
            made.store(recent, number, b"x" * size)
        assert [(number, len(value)) for number, value in ask(recent)] == [(2, 1), (0, 250)]
        assert made.index() == [3, 2, 1, 0]
        made.connection.close()


class TestValues:
    def test_any_bytes(self, redis: Redis, ask) -> None:
        recent = RecentEntries(redis.connection, "llm")
        values = [b"\x00", b"\xff\xfe", b"\r\n", bytes(range(256)), b"x" * 30_000]
        for number, value in enumerate(values):
            redis.store(recent, number, value)
        assert ask(recent) == list(reversed(list(enumerate(values))))


class TestFailures:
    def test_a_server_that_is_gone(self, ask) -> None:
        with redis_server() as server:
            port = server.port
        connection = RedisConnection.from_settings({"host": HOST, "port": port}, {}, budget=0.25)
        with pytest.raises(StoreError, match=str(port)):
            ask(RecentEntries(connection, "llm"))

    def test_an_index_of_another_type(self, redis: Redis, ask) -> None:
        redis.send(("SET", f"llm:~recent:{OWNER}", "theirs"))
        with pytest.raises(StoreError):
            ask(RecentEntries(redis.connection, "llm"))

    def test_what_takes_no_writes_is_read(self, single: Redis, ask) -> None:
        recent = RecentEntries(single.connection, "llm")
        for number in range(3):
            single.store(recent, number)
        single.send(("DEL", key(1)))
        server = single.servers[0]
        server.ask("REPLICAOF", HOST, "1")
        try:
            assert [number for number, _ in ask(recent)] == [2, 0]
        finally:
            server.ask("REPLICAOF", "NO", "ONE")
        assert single.index() == [2, 1, 0]


class TestPersistence:
    def test_what_a_replica_gets(self, ask) -> None:
        """Sentinel: the index that is written at the master is the replica's too, and survives it."""
        with redis_sentinel() as made:
            redis = Redis([made.master], {"sentinel_nodes": made.nodes, "service_name": made.service})
            recent = RecentEntries(redis.connection, "llm", most=3)
            for number in (1, 2, 3, 4, 3):
                redis.store(recent, number, b"%d" % number, ttl=1000)
            name = f"llm:~recent:{OWNER}"
            wait_for(
                lambda: made.replica.ask("LRANGE", name, 0, -1) == made.master.ask("LRANGE", name, 0, -1),
                "the replica has it",
            )
            assert made.replica.ask("PEXPIRETIME", name) == made.master.ask("PEXPIRETIME", name) > 0
            assert ask(recent) == [(3, b"3"), (4, b"4"), (2, b"2")]
            redis.connection.close()

    def test_what_an_append_only_file_keeps(self) -> None:
        with redis_server("--appendonly", "yes", "--appendfsync", "always") as server:
            redis = Redis([server], {"host": HOST, "port": server.port})
            recent = RecentEntries(redis.connection, "llm")
            for number in (1, 2, 1):
                redis.store(recent, number, b"%d" % number, ttl=1000)
            server.kill()
            server.restart()
            wait_for(lambda: recent.recent(OWNER) == [(key(1), b"1"), (key(2), b"2")], "it is read again")
            redis.connection.close()
