"""The index in Redis: the contract by both engines and both faces, what lies there, and what it costs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_middleware.errors import ConfigError, InvalidRequestError, StoreError
from llm_middleware.semantic import redis_vectorset
from llm_middleware.semantic.index_numpy import NumpyIndex
from llm_middleware.semantic.index_redis import RedisIndex
from llm_middleware.semantic.records import AsyncVectorIndex, Row, VectorIndex
from llm_middleware.semantic.redis_rows import Rows
from llm_middleware.stores.redis_connect import RedisConnection
from llm_middleware.stores.redis_plan import run
from llm_middleware.testing import FakeClock
from llm_middleware.types import Clock
from tests.contract.vectors import (
    NEVER,
    AsyncVectorIndexContract,
    AtomicStatesContract,
    Awaited,
    key_of,
    keys,
    make_row,
    scope_of,
    unit_vectors,
)
from tests.services import (
    HOST,
    FaultProxy,
    RedisCluster,
    RedisServer,
    free_port,
    redis_cluster,
    redis_sentinel,
    redis_server,
    wait_for,
)
from tests.vector_services import on_redis_8, redisearch, tls_front

AMPLE = 10.0  # seconds: a budget that no test uses up
UPPER = 10.0  # seconds: what a failure must not cost however slow the machine is
ENGINES = ["search", "vectorset"]


class Slow(RedisIndex):
    """A second of the clock is a thousand of the server's: only the clock makes rows be over."""

    def _left(self, seconds: float) -> int | None:
        return super()._left(seconds * 1000)


def connect(server: RedisServer, budget: float = AMPLE, **more: object) -> RedisConnection:
    return reach({"host": HOST, "port": server.port, **more}, budget)


def reach(where: dict[str, object], budget: float = AMPLE) -> RedisConnection:
    return RedisConnection.from_settings(where, {}, budget=budget)


def emptied(server: RedisServer) -> RedisServer:
    server.ask("FLUSHALL")
    server.ask("SCRIPT", "FLUSH")
    return server


@pytest.fixture(scope="module")
def with_search() -> Iterator[RedisServer]:
    with on_redis_8(redis_server(*redisearch())) as server:
        yield server


@pytest.fixture(scope="module")
def without() -> Iterator[RedisServer]:
    with on_redis_8(redis_server()) as server:
        yield server


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with on_redis_8(redis_cluster()) as made:
        yield made


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def server(engine: str, request: pytest.FixtureRequest) -> RedisServer:
    """An empty server of which ``engine`` is what an index finds by itself."""
    made = emptied(request.getfixturevalue("with_search" if engine == "search" else "without"))
    made.ask("CONFIG", "RESETSTAT")
    return made


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(time.time())


@pytest.fixture
def index(server: RedisServer, clock: FakeClock) -> Iterator[RedisIndex]:
    made = Slow(connect(server), clock=clock)
    yield made
    made.close()


# The contract ---------------------------------------------------------------------------------------


class RedisContract(AtomicStatesContract):
    threads = 3
    rounds = 60
    examples = 10

    def make(self, clock: Clock) -> RedisIndex:
        raise NotImplementedError

    @contextmanager
    def open_index(self, clock: Clock) -> Iterator[VectorIndex]:
        index = self.make(clock)
        try:
            yield index
        finally:
            index.close()

    def reopen(self, index: VectorIndex, clock: Clock) -> VectorIndex:
        index.close()
        if isinstance(index, Awaited):
            index.index = Slow(index.index.connection, clock=clock)  # type: ignore[attr-defined]
            return index
        return Slow(index.connection, clock=clock)  # type: ignore[attr-defined]


class TestSearch(RedisContract):
    @pytest.fixture(autouse=True)
    def _server(self, with_search: RedisServer) -> None:
        self.server = with_search

    def make(self, clock: Clock) -> RedisIndex:
        return Slow(connect(emptied(self.server)), clock=clock)


class TestSets(TestSearch):
    @pytest.fixture(autouse=True)
    def _server(self, without: RedisServer) -> None:
        self.server = without


class TestSetsAsGraphs(TestSets):
    """As sets are searched that are too large to compare every row."""

    @pytest.fixture(autouse=True)
    def _no_set_is_small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(redis_vectorset, "_EXACT", 0)


class TestGraph(TestSearch):
    """RediSearch's graph finds in small scopes all that there is."""

    def make(self, clock: Clock) -> RedisIndex:
        return Slow(connect(emptied(self.server)), clock=clock, algorithm="hnsw")


class TestCluster(RedisContract):
    threads = 2
    rounds = 30
    examples = 5

    @pytest.fixture(autouse=True)
    def _cluster(self, cluster: RedisCluster) -> None:
        self.cluster = cluster

    def make(self, clock: Clock) -> RedisIndex:
        for server in self.cluster.servers:
            emptied(server)
        return Slow(reach({"redis_startup_nodes": self.cluster.nodes}), clock=clock)


class AsyncContract(AsyncVectorIndexContract):
    make: Any

    @contextmanager
    def open_async_index(self, clock: Clock) -> Iterator[AsyncVectorIndex]:
        yield self.make(clock)

    open_index = AsyncVectorIndexContract.open_index


class TestSearchAsync(AsyncContract, TestSearch):
    pass


class TestSetsAsync(AsyncContract, TestSets):
    pass


class TestClusterAsync(AsyncContract, TestCluster):
    pass


def test_it_agrees_with_the_index_in_process(
    index: RedisIndex, clock: FakeClock, server: RedisServer
) -> None:
    """Fuzz: what one finds the other finds, at the same similarity."""
    vectors = unit_vectors(40, 8, seed=3)
    numbers = st.integers(0, 39)
    rows = st.tuples(
        st.just("add"), numbers, numbers, st.integers(0, 2), st.sampled_from([1.0, 5.0, NEVER]), st.text()
    )
    steps = st.one_of(
        rows,
        rows,
        st.tuples(st.just("remove"), st.lists(numbers, max_size=5)),
        st.tuples(st.just("update"), numbers, st.dictionaries(st.text(), st.integers() | st.text())),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 1.0, 3.0])),
        st.tuples(st.just("purge")),
    )

    @settings(
        max_examples=25,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    @given(st.lists(steps, min_size=1, max_size=40))
    def agree(taken: list[tuple[Any, ...]]) -> None:
        server.ask("FLUSHALL")
        both = [Slow(index.connection, clock=clock), NumpyIndex(clock=clock)]
        for what, *values in taken:
            results = [_step(one, clock, vectors, what, values) for one in both]
            assert results[0] == results[1], what
            clock.advance(values[0] if what == "wait" else 0)
        for scope in range(3):
            for query in vectors[:5]:
                found, expected = (one.search(scope_of(scope), query.tobytes(), 50) for one in both)
                assert sorted(keys(found)) == sorted(keys(expected))
                assert [n.similarity for n in found] == pytest.approx(
                    [n.similarity for n in expected], abs=1e-5
                )
                rows = [
                    {n.row.key: (n.row.text, n.row.expires, n.row.payload) for n in f}
                    for f in (found, expected)
                ]
                assert rows[0] == rows[1]

    agree()


def _step(one: VectorIndex, clock: FakeClock, vectors: Any, what: str, given: list[Any]) -> object:
    if what == "add":
        number, vector, scope, ttl, text = given
        one.add(make_row(number, vectors[vector], scope=scope, expires=clock() + ttl, text=text))
    elif what == "remove":
        return one.remove([key_of(number) for number in given[0]])
    elif what == "update":
        # Of a row that is over and was not removed, either may be said.
        one.update(key_of(given[0]), given[1])
    elif what == "purge":
        one.purge()
        return one.count()
    return None


def set_sizes(server: RedisServer) -> dict[bytes, int]:
    """The vector sets on a server and how many rows each has."""
    with server.client() as client:
        names = list(client.scan_iter("llm-semantic:set:*"))
        return {name: client.execute_command("VCARD", name) for name in names}


# What lies in Redis ---------------------------------------------------------------------------------


class TestKeys:
    def test_all_begin_with_the_name_and_none_other_is_touched(self, server: RedisServer) -> None:
        """C60: whatever it is called."""
        for name in ("llm-semantic", "s*", "s[1]", "{tag}", "s ü:"):
            emptied(server)
            server.ask("SET", "llm:" + "0" * 64, "theirs")
            others = [RedisIndex(connect(server), name=other) for other in (name + "x", "x" + name, "s1")]
            mine = RedisIndex(connect(server), name=name)
            for one in (*others, mine):
                one.add(make_row(1, unit_vectors(1)[0]))
                one.keep_state("learnt", b"1", None)
            with server.client() as client:
                names = [key for key in client.scan_iter() if key.startswith(name.encode() + b":")]
            assert len(names) in (2, 3)  # the row, the state and, of vector sets, the set
            assert (mine.count(), mine.flush("a"), mine.purge(), mine.count()) == (1, 1, 0, 0)
            assert [one.count() for one in others] == [1, 1, 1]
            assert server.ask("GET", "llm:" + "0" * 64) == b"theirs"
            for one in (*others, mine):
                one.close()

    def test_rows_leave_by_the_servers_clock(self, engine: str, server: RedisServer) -> None:
        """C75: though the index's own clock stands still, and nothing is asked of it."""
        index = RedisIndex(connect(server), clock=FakeClock())
        vectors = unit_vectors(3)
        for number, vector in enumerate(vectors):
            index.add(make_row(number, vector, expires=FakeClock().now + 0.3, scope=number % 2))
        wait_for(lambda: server.ask("DBSIZE") == 0, "all keys are gone")
        assert index.search(scope_of(0), vectors[0].tobytes(), 3) == []
        assert index.count() == 0
        index.close()

    def test_times_to_live(self, server: RedisServer) -> None:
        """In milliseconds, rounded up, whatever the difference of the clocks; never for a row that stays."""
        clock = FakeClock()
        index = RedisIndex(connect(server), clock=clock)
        for number, (ttl, left) in enumerate(
            [(60, 60_000), (1e-4, 1), (1e9, 1e12), (NEVER, -1), (1e300, -1)]
        ):
            index.add(make_row(number, unit_vectors(1)[0], expires=clock() + ttl))
            said = server.ask("PTTL", f"llm-semantic:row:{key_of(number)}")
            if left > 1:
                assert left - 30_000 < said <= left
            else:
                assert said in ((-1,) if left == -1 else (-2, 0, 1))
        index.close()

    def test_a_set_lives_as_long_as_its_last_row(self, without: RedisServer) -> None:
        emptied(without)
        clock, vector = FakeClock(), unit_vectors(1)[0]
        index = RedisIndex(connect(without), clock=clock)
        set_ = f"llm-semantic:set:16:{scope_of(0)}"
        left = []
        for number, ttl in enumerate([60, 30, 3600, 60]):
            index.add(make_row(number, vector, expires=clock() + ttl))
            left.append(round(without.ask("PTTL", set_) / 60_000))
            assert without.ask("PTTL", set_) >= without.ask("PTTL", f"llm-semantic:row:{key_of(number)}")
        assert left == [1, 1, 60, 60]
        index.add(make_row(8, vector))
        index.add(make_row(9, vector, expires=clock() + 60))
        assert without.ask("PTTL", set_) == -1
        assert index.remove([key_of(number) for number in range(10)]) == 6
        assert without.ask("DBSIZE") == 0
        index.add(make_row(9, vector, expires=clock() + 60))
        assert round(without.ask("PTTL", set_) / 60_000) == 1
        index.close()

    def test_rows_that_are_over_leave_their_set_as_others_come(self, without: RedisServer) -> None:
        """A set that no search meets in full and that never ends does not grow without bound."""
        emptied(without)
        clock, vectors = FakeClock(), unit_vectors(60)
        index = RedisIndex(connect(without), clock=clock)
        set_ = f"llm-semantic:set:16:{scope_of(0)}"
        for number, vector in enumerate(vectors):
            index.add(make_row(number, vector, expires=clock() + 60 if number else NEVER))
        clock.advance(60)
        for _ in range(2000):
            index.add(make_row(0, vectors[0]))
            if without.ask("VCARD", set_) == 1:
                break
        assert (without.ask("VCARD", set_), index.count()) == (1, 1)
        assert keys(index.search(scope_of(0), vectors[9].tobytes(), 9)) == [key_of(0)]
        index.close()

    def test_rows_that_are_over_leave_when_a_search_meets_them(self, without: RedisServer) -> None:
        emptied(without)
        clock, vectors = FakeClock(), unit_vectors(9)
        index = RedisIndex(connect(without), clock=clock)
        for number, vector in enumerate(vectors):
            index.add(make_row(number, vector, expires=clock() + 60 if number else NEVER))
        clock.advance(60)
        assert keys(index.search(scope_of(0), vectors[5].tobytes(), 9)) == [key_of(0)]
        assert (without.ask("VCARD", f"llm-semantic:set:16:{scope_of(0)}"), without.ask("DBSIZE")) == (1, 2)
        index.close()

    def test_a_row_that_the_server_dropped_is_no_neighbour(
        self, index: RedisIndex, server: RedisServer
    ) -> None:
        """As Redis does where memory is short. It hides no other, and nothing makes it come back."""
        vectors = unit_vectors(12)
        for number, vector in enumerate(vectors):
            index.add(make_row(number, vector))
        for number in range(8):
            server.ask("DEL", f"llm-semantic:row:{key_of(number)}")
        for query in vectors[:2]:
            found = index.search(scope_of(0), query.tobytes(), 4)
            assert sorted(keys(found)) == [key_of(number) for number in range(8, 12)]
        assert index.update(key_of(0), {"n": 1}) is False
        assert server.ask("EXISTS", f"llm-semantic:row:{key_of(0)}") == 0
        assert index.remove([key_of(0), key_of(9)]) == 1
        assert index.count() == 3

    def test_what_is_over_is_looked_at_again_when_it_is_removed(self, server: RedisServer) -> None:
        """A row that was replaced since it was seen to be over stays."""
        rows = Rows(connect(server), "s")
        index = RedisIndex(rows.connection, name="s")
        for number, ttl in enumerate([60, 120, NEVER]):
            index.add(make_row(number, unit_vectors(1)[0], expires=time.time() + ttl))
        taken = run(
            rows.connection, rows.take([key_of(number) for number in range(4)], over=time.time() + 90)
        )
        assert [row.key for row in taken] == [key_of(0)]
        assert index.count() == 2
        index.close()

    def test_purge_goes_through_all_sets(self, without: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """In turns that are short, however the rows lie."""
        monkeypatch.setattr(redis_vectorset, "_EXACT", 60)
        monkeypatch.setattr(redis_vectorset, "_OVER", 7)
        emptied(without)
        clock, vectors = FakeClock(), unit_vectors(400)
        index = Slow(connect(without), clock=clock)
        for number, vector in enumerate(vectors):
            scope = 0 if number < 100 else 1 if number < 150 else number
            index.add(make_row(number, vector, scope=scope, expires=clock() + (60 if number % 4 else NEVER)))
        clock.advance(60)
        assert (index.purge(), index.purge(), index.count()) == (300, 0, 100)
        assert sum(set_sizes(without).values()) == 100
        index.close()


class TestCommands:
    """What is sent, as the server counts it."""

    def test_each_operation_is_one_round_trip(
        self, engine: str, server: RedisServer, index: RedisIndex
    ) -> None:
        vectors = unit_vectors(10)
        index.add(make_row(0, vectors[0]))  # also looks which engine there is, and makes the index
        asked = {
            "add": lambda n: index.add(make_row(n, vectors[n])),
            "search": lambda n: index.search(scope_of(0), vectors[n].tobytes(), 5),
            "update": lambda n: index.update(key_of(n), {"n": n}),
            "keep_state": lambda n: index.keep_state("s", b"%d" % n, b"%d" % (n - 1) if n else None),
            "state": lambda n: index.state("s"),
            "remove": lambda n: index.remove([key_of(n), key_of(n + 100)]),
        }
        sent = {}
        for name, ask in asked.items():
            ask(0)
            before = self.round_trips(server)
            for number in range(1, 10):
                ask(number)
            sent[name] = (self.round_trips(server) - before) / 9
        assert sent == dict.fromkeys(asked, 1.0)

    def round_trips(self, server: RedisServer) -> int:
        """Commands of clients, not those of scripts: a GET of `keep_state` has its SET."""
        calls = server.calls()
        gets = calls.get("get", 0) - calls.get("set", 0)
        return sum(calls.get(name, 0) for name in ("evalsha", "eval", "FT.SEARCH")) + gets

    def test_which_engine_is_asked_once(self, engine: str, server: RedisServer, index: RedisIndex) -> None:
        for number, vector in enumerate(unit_vectors(5)):
            index.add(make_row(number, vector))
            index.search(scope_of(0), vector.tobytes(), 1)
        calls = server.calls()
        looks = {name: calls.get(name, 0) for name in ("FT._LIST", "FT.CREATE", "VCARD")}
        searched = 5  # the script that searches a set asks how large it is
        sets = {"FT._LIST": 0, "FT.CREATE": 0, "VCARD": 1 + searched}
        assert looks == ({"FT._LIST": 1, "FT.CREATE": 1, "VCARD": 0} if engine == "search" else sets)

    def test_scripts_that_the_server_forgot(self, server: RedisServer, index: RedisIndex) -> None:
        """As after its restart; also where only some of those in one round trip are unknown."""
        vectors = unit_vectors(120)
        for number, vector in enumerate(vectors):
            if number % 10 == 0:
                server.ask("SCRIPT", "FLUSH")
            index.add(make_row(number, vector))
        server.ask("SCRIPT", "FLUSH")
        assert len(index.search(scope_of(0), vectors[0].tobytes(), 200)) == 120
        server.ask("SCRIPT", "FLUSH")
        assert index.remove([key_of(number) for number in range(120)]) == 120
        assert index.count() == 0


# Which engine ---------------------------------------------------------------------------------------


class TestEngines:
    def test_it_takes_redisearch_where_it_is(self, with_search: RedisServer) -> None:
        emptied(with_search)
        index = RedisIndex(connect(with_search))
        index.add(make_row(1, unit_vectors(1)[0]))
        assert with_search.ask("FT._LIST") == [b"llm-semantic:16"]
        assert with_search.ask("DBSIZE") == 1
        index.close()

    def test_it_takes_sets_if_told(self, with_search: RedisServer) -> None:
        emptied(with_search)
        index = RedisIndex(connect(with_search), engine="vectorset")
        index.add(make_row(1, unit_vectors(1)[0]))
        assert keys(index.search(scope_of(0), unit_vectors(1)[0].tobytes(), 5)) == [key_of(1)]
        assert with_search.ask("FT._LIST") == []
        assert with_search.ask("VCARD", f"llm-semantic:set:16:{scope_of(0)}") == 1
        index.close()

    def test_it_takes_sets_in_another_database(self, with_search: RedisServer) -> None:
        """RediSearch sees database 0 only."""
        emptied(with_search)
        index = RedisIndex(connect(with_search, db=1))
        index.add(make_row(1, unit_vectors(1)[0]))
        assert keys(index.search(scope_of(0), unit_vectors(1)[0].tobytes(), 5)) == [key_of(1)]
        assert (with_search.ask("FT._LIST"), with_search.ask("DBSIZE")) == ([], 0)
        index.close()

    @pytest.mark.parametrize("face", ["sync", "async"])
    @pytest.mark.parametrize("wanted", ["auto", "vectorset", "search"])
    def test_neither_is_an_error_that_says_what_is_needed(self, wanted: Any, face: str) -> None:
        """It is looked again every time: the server may be another one by then."""
        port = free_port()
        row, query = make_row(1, unit_vectors(1)[0]), unit_vectors(1)[0].tobytes()
        index: Any = RedisIndex(reach({"host": HOST, "port": port}), engine=wanted)
        if face == "async":
            index = Awaited(index)
        asked = [
            lambda: index.add(row),
            lambda: index.search(scope_of(0), query, 1),
            lambda: index.remove([key_of(1)]),
            lambda: index.flush("a"),
            lambda: index.count(),
            lambda: index.purge(),
        ]
        with redis_server(port=port):
            for ask in asked:
                with pytest.raises(
                    StoreError, match="Redis 8 or later, or a Redis with the module"
                ) as caught:
                    ask()
                assert caught.value.code == "no_vector_search"
                assert str(port) in caught.value.message
            assert index.keep_state("s", b"1", None) is True
        with on_redis_8(redis_server(*redisearch(), port=port)):
            index.close()
            index.add(row)
            assert keys(index.search(scope_of(0), query, 1)) == [key_of(1)]
        index.end() if face == "async" else index.close()

    def test_one_that_may_not_be_used_is_no_missing_one(self, with_search: RedisServer) -> None:
        with_search.ask("ACL", "SETUSER", "app", "on", ">pw", "~*", "+@all", "-FT._LIST")
        index = RedisIndex(connect(with_search, username="app", password="pw"))
        with pytest.raises(StoreError, match="permissions") as caught:
            index.count()
        assert caught.value.code == "store_refused"
        index.close()

    def test_a_server_that_fails_is_asked_again(self, server: RedisServer) -> None:
        with FaultProxy(server.port) as proxy:
            index = RedisIndex(reach({"host": HOST, "port": proxy.port}, budget=1.0))
            row = make_row(1, unit_vectors(1)[0])
            proxy.refuse()
            began = time.monotonic()
            with pytest.raises(StoreError) as caught:
                index.add(row)
            assert caught.value.code != "no_vector_search"
            with pytest.raises(StoreError):
                index.search(scope_of(0), row.vector, 1)
            assert time.monotonic() - began < UPPER
            proxy.accept()
            index.add(row)
            proxy.blackhole = True
            with pytest.raises(StoreError):
                index.search(scope_of(0), row.vector, 1)
            assert time.monotonic() - began < UPPER
            proxy.heal()
            proxy.reset()
            assert keys(index.search(scope_of(0), row.vector, 1)) == [key_of(1)]
            index.close()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("name", ""),
            ("name", None),
            ("dimensions", 0),
            ("dimensions", True),
            ("dimensions", 1.5),
            ("engine", "hnsw"),
            ("algorithm", "ivf"),
        ],
    )
    def test_settings_are_checked(self, name: str, value: object) -> None:
        with pytest.raises(ConfigError) as caught:
            RedisIndex(reach({}), **{name: value})  # type: ignore[arg-type]
        assert caught.value.param == name

    @pytest.mark.parametrize("where", [{"db": 1}, {"redis_startup_nodes": [{"host": HOST, "port": 1}]}])
    def test_redisearch_is_refused_where_it_cannot_be(self, where: dict[str, object]) -> None:
        with pytest.raises(ConfigError, match="RediSearch is not for") as caught:
            RedisIndex(reach(where), engine="search")
        assert caught.value.param == "engine"

    def test_it_connects_at_the_first_use(self) -> None:
        assert RedisIndex(reach({"host": HOST, "port": free_port()}), dimensions=8).dimensions == 8


# Shared by processes, dropped, of other models ------------------------------------------------------


class TestShared:
    def test_two_processes_have_the_same_rows(self, server: RedisServer, index: RedisIndex) -> None:
        code = (
            "import sys\n"
            "from llm_middleware.semantic.index_redis import RedisIndex\n"
            "from llm_middleware.stores.redis_connect import RedisConnection\n"
            "from tests.contract.vectors import make_row, key_of, keys, scope_of, unit_vectors\n"
            f"where = {{'host': {HOST!r}, 'port': {server.port}}}\n"
            f"index = RedisIndex(RedisConnection.from_settings(where, {{}}, budget={AMPLE}))\n"
            "one, two = unit_vectors(2)\n"
            "print(keys(index.search(scope_of(0), one.tobytes(), 5)) == [key_of(1)])\n"
            "print(index.update(key_of(1), {'seen': True}), index.keep_state('s', b'theirs', b'ours'))\n"
            "index.add(make_row(2, two, text='theirs'))\n"
            "print(index.count())\n"
        )
        one, two = unit_vectors(2)
        index.add(make_row(1, one))
        assert index.keep_state("s", b"ours", None) is True
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["True", "True", "True", "2"]
        assert index.keep_state("s", b"mine", b"ours") is False
        assert index.state("s") == b"theirs"
        best = index.search(scope_of(0), two.tobytes(), 1)[0].row
        assert (best.key, best.text) == (key_of(2), "theirs")
        assert index.search(scope_of(0), one.tobytes(), 1)[0].row.payload == {"seen": True}
        assert index.remove([key_of(2)]) == 1

    def test_an_index_made_by_another_is_no_error(self, server: RedisServer) -> None:
        """Of all that begin at once, one makes it."""
        vectors = unit_vectors(16)
        made = [RedisIndex(connect(server)) for _ in range(8)]

        async def begin() -> None:
            rows = [make_row(number, vector) for number, vector in enumerate(vectors)]
            await asyncio.gather(*(one.aadd(row) for one, row in zip(made * 2, rows, strict=True)))
            for one in made:
                await one.aclose()

        asyncio.run(begin())
        assert sorted(keys(made[0].search(scope_of(0), vectors[0].tobytes(), 20))) == [
            key_of(number) for number in range(16)
        ]
        made[0].close()

    def test_an_index_that_was_dropped_is_made_again(self, with_search: RedisServer) -> None:
        """From the rows that are there; where they were dropped too, from those to come."""
        index = RedisIndex(connect(emptied(with_search)))
        vectors = unit_vectors(20)
        for number, vector in enumerate(vectors):
            index.add(make_row(number, vector))
        with_search.ask("FT.DROPINDEX", "llm-semantic:16")
        wait_for(
            lambda: len(index.search(scope_of(0), vectors[0].tobytes(), 99)) == 20, "the index has all rows"
        )
        with_search.ask("FT.DROPINDEX", "llm-semantic:16", "DD")
        assert index.search(scope_of(0), vectors[0].tobytes(), 99) == []
        index.add(make_row(1, vectors[1]))
        assert keys(index.search(scope_of(0), vectors[0].tobytes(), 99)) == [key_of(1)]
        with_search.ask("FLUSHALL")
        index.add(make_row(2, vectors[2]))
        wait_for(lambda: index.search(scope_of(0), vectors[0].tobytes(), 99), "the index has the row")
        index.close()

    def test_a_search_alone_makes_no_index(self, with_search: RedisServer) -> None:
        index = RedisIndex(connect(emptied(with_search)))
        assert index.search(scope_of(0), unit_vectors(1)[0].tobytes(), 3) == []
        assert (index.count(), index.purge()) == (0, 0)
        assert with_search.ask("FT._LIST") == []
        index.close()

    def test_vectors_of_two_models_never_meet(self, server: RedisServer, clock: FakeClock) -> None:
        """As while one version of an app takes the other's place: each finds its own rows, all are counted
        and removed by either."""
        old, new = (Slow(connect(server), clock=clock) for _ in range(2))
        short, long = unit_vectors(6), unit_vectors(6, 32)
        for number in range(6):
            if number < 4:
                old.add(make_row(number, short[number], expires=clock() + 10 + number))
            if number > 1:
                new.add(make_row(number, long[number], expires=clock() + 10 + number))
        assert (old.dimensions, new.dimensions) == (16, 32)
        assert sorted(keys(old.search(scope_of(0), short[0].tobytes(), 9))) == [key_of(0), key_of(1)]
        found = new.search(scope_of(0), long[0].tobytes(), 9)
        assert sorted(keys(found)) == [key_of(number) for number in range(2, 6)]
        with pytest.raises(InvalidRequestError, match="16 dimensions, got 32") as caught:
            old.search(scope_of(0), long[0].tobytes(), 9)
        assert caught.value.param == "vector"
        made = (old, new, Slow(old.connection))
        wait_for(lambda: [one.count() for one in made] == [6, 6, 6], "both indexes have all rows")
        assert (old.remove([key_of(5)]), new.remove([key_of(0)])) == (1, 1)
        clock.advance(11)
        assert (old.purge(), old.count(), new.flush("a"), old.count()) == (1, 3, 3, 0)
        old.close()
        new.close()

    @pytest.mark.parametrize("scope", ["", "a", "A" * 64, f"{'0' * 63}}}", "0" * 65, f"{'0' * 64}\n", None])
    def test_a_scope_is_no_query(self, index: RedisIndex, scope: Any) -> None:
        vector = unit_vectors(1)[0].tobytes()
        with pytest.raises(InvalidRequestError) as caught:
            index.search(scope, vector, 1)
        assert caught.value.param == "scope"
        with pytest.raises(InvalidRequestError) as caught:
            index.add(Row(key_of(1), scope, "text", vector, NEVER, {}))
        assert caught.value.param == "scope"

    @pytest.mark.parametrize("field", ["expires", "payload"])
    def test_bad_rows_are_refused(self, index: RedisIndex, field: str) -> None:
        row = make_row(1, unit_vectors(1)[0], expires=float("nan") if field == "expires" else NEVER)
        if field == "payload":
            row = make_row(1, unit_vectors(1)[0], payload={"a": {1, 2}})
        with pytest.raises(InvalidRequestError) as caught:
            index.add(row)
        assert caught.value.param == field
        assert index.count() == 0


class TestTopologies:
    """The other ways to reach a Redis; a Cluster passes the whole contract."""

    @pytest.fixture(params=["sentinel", "tls", "RESP 2 with_search", "RESP 2 without"])
    def where(self, request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
        if request.param == "sentinel":
            with on_redis_8(redis_sentinel()) as made:
                yield {"sentinel_nodes": made.nodes, "service_name": made.service}
        elif request.param == "tls":
            server = emptied(request.getfixturevalue("with_search"))
            with tls_front(server.port) as (port, authority):
                yield {"host": HOST, "port": port, "ssl": True, "ssl_ca_certs": authority}
        else:
            server = emptied(request.getfixturevalue(request.param.split()[-1]))
            yield {"host": HOST, "port": server.port, "protocol": 2}

    def test_every_operation(self, where: dict[str, object]) -> None:
        vectors = unit_vectors(8)
        made = RedisIndex(reach(where))
        awaited = Awaited(made)
        for index, other in ((made, awaited), (awaited, made)):
            for number, vector in enumerate(vectors):
                index.add(make_row(number, vector, scope=number % 2, namespace="ab"[number // 6]))
            assert other.update(key_of(2), {"n": 2}) is True
            found = other.search(scope_of(0), vectors[2].tobytes(), 9)
            assert sorted(keys(found)) == sorted([*map(key_of, (0, 2, 4)), key_of(6, "b")])
            assert found[0].row.payload == {"n": 2}
            assert (other.remove([key_of(2)]), other.count(), index.purge()) == (1, 7, 0)
            assert (index.flush("a"), other.flush("b"), other.count()) == (5, 2, 0)
            before = index.state("s")
            assert (index.keep_state("s", b"1", b"no"), other.keep_state("s", b"1", before)) == (False, True)
        awaited.end()
        made.close()

    @pytest.mark.parametrize("kind", ["server", "cluster"])
    def test_sets_keep_no_row_that_moved_or_was_removed(
        self, kind: str, cluster: RedisCluster, without: RedisServer
    ) -> None:
        servers = cluster.servers if kind == "cluster" else [without]
        for server in servers:
            emptied(server)
        nodes = {"redis_startup_nodes": cluster.nodes}
        index = RedisIndex(reach(nodes if kind == "cluster" else {"host": HOST, "port": without.port}))
        vectors = unit_vectors(30)
        for scope in (0, 1):
            for number, vector in enumerate(vectors):
                index.add(make_row(number, vector, scope=scope * number))
        sizes = {name: size for server in servers for name, size in set_sizes(server).items()}
        assert sizes == {f"llm-semantic:set:16:{scope_of(n)}".encode(): 1 for n in range(30)}
        assert index.remove([key_of(number) for number in range(20)]) == 20
        assert sum(len(set_sizes(server)) for server in servers) == 10
        assert index.flush("a") == 10
        assert [server.ask("DBSIZE") for server in servers] == [0] * len(servers)
        index.close()

    def test_a_cluster_spreads_scopes(self, cluster: RedisCluster) -> None:
        """Each scope's vectors are on one node, and every node has some."""
        for server in cluster.servers:
            emptied(server)
        index = RedisIndex(reach({"redis_startup_nodes": cluster.nodes}))
        vectors = unit_vectors(60)
        for number, vector in enumerate(vectors):
            index.add(make_row(number, vector, scope=number % 20))
        for number, vector in enumerate(vectors):
            best = index.search(scope_of(number % 20), vector.tobytes(), 3)
            assert sorted(keys(best)) == sorted(key_of(n) for n in range(60) if n % 20 == number % 20)
            assert best[0].row.key == key_of(number)
        sets = [len(set_sizes(server)) for server in cluster.servers]
        assert sum(sets) == 20
        assert min(sets) > 0
        index.close()
