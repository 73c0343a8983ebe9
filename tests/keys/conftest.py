"""Both faces of a `KeyResolver`, and a place for each kind of store."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import psycopg
import pytest

from llm_middleware.keys.resolver import KeyResolver
from llm_middleware.keys.store import KeyStore, make_store
from llm_middleware.testing import FakeClock
from tests.keys.postgres import PostgreSQL, postgresql
from tests.services import RedisCluster, RedisServer, redis_cluster, redis_server


class SyncFace:
    """The sync methods."""

    name = "sync"

    def do(self, target: object, method: str, *args: object, **options: object):
        """Call ``generate``, ``resolve``, ``begin``, ``end`` ..."""
        return getattr(target, method)(*args, **options)

    def together(self, *calls: tuple[object, ...]) -> list:
        """``(target, method, *args)`` at the same time; results, or exceptions, in order."""
        with ThreadPoolExecutor(min(16, len(calls))) as pool:
            futures = [pool.submit(self.do, *call) for call in calls]
            return [future.exception() or future.result() for future in futures]

    def close(self) -> None:
        pass


class AsyncFace(SyncFace):
    """The async methods, on one event loop that lives as long as the test."""

    name = "async"

    def __init__(self) -> None:
        self.runner = asyncio.Runner()

    def do(self, target: object, method: str, *args: object, **options: object):
        return self.runner.run(getattr(target, "a" + method)(*args, **options))

    def together(self, *calls: tuple[object, ...]) -> list:
        async def gather() -> list:
            made = [getattr(target, "a" + method)(*args) for target, method, *args in calls]
            return await asyncio.gather(*made, return_exceptions=True)

        return self.runner.run(gather())

    def close(self) -> None:
        self.runner.close()


@pytest.fixture(params=["sync", "async"])
def face(request) -> Iterator[SyncFace]:
    made = SyncFace() if request.param == "sync" else AsyncFace()
    yield made
    made.close()


@dataclass
class Place:
    """Where keys are kept. ``setting``: what a resolver is given to use it. ``dump``: all bytes that are
    there. ``pass_time(seconds)``: what is there becomes so much older."""

    kind: str
    setting: object
    clock: FakeClock
    dump: Callable[[], bytes]
    pass_time: Callable[[float], None]
    made: list[object] = field(default_factory=list)

    def store(self) -> KeyStore:
        """A store as another process has it; in memory there is but one."""
        store = make_store(self.setting, self.clock)
        self.made.append(store)
        return store

    def resolver(self, **options: object) -> KeyResolver:
        """Closed at the end of the test."""
        made = KeyResolver(self.setting, **{"clock": self.clock, **options})
        self.made.append(made)
        return made


@pytest.fixture(scope="session")
def redis_of_all() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def cluster_of_all() -> Iterator[RedisCluster]:
    with redis_cluster() as made:
        yield made


@pytest.fixture(scope="session")
def postgres_of_all() -> Iterator[PostgreSQL]:
    with postgresql() as server:
        yield server


_numbers = itertools.count()


def _memory(request, clock: FakeClock) -> Place:
    store = make_store(None, clock)
    return Place("memory", store, clock, lambda: repr(vars(store)).encode(), clock.advance)


def _sqlite(request, clock: FakeClock) -> Place:
    path = request.getfixturevalue("tmp_path") / "keys.db"

    def dump() -> bytes:
        with sqlite3.connect(path) as connection:
            text = "\n".join(connection.iterdump()).encode()
        connection.close()
        return text + b"".join(file.read_bytes() for file in path.parent.glob("keys.db*"))

    return Place("sqlite", {"type": "sqlite", "path": str(path)}, clock, dump, clock.advance)


def _sql(request, clock: FakeClock) -> Place:
    server: PostgreSQL = request.getfixturevalue("postgres_of_all")
    names = ("llm_keys", "llm_key_use", "llm_key_calls", "llm_key_changes")
    for name in names:
        server.ask(f"DROP TABLE IF EXISTS {name}")

    def dump() -> bytes:
        with psycopg.connect(server.url) as connection:
            rows = [connection.execute(f"SELECT * FROM {name}").fetchall() for name in names]
        return repr(rows).encode()

    return Place("sql", {"type": "sql", "url": server.url}, clock, dump, clock.advance)


def _redis_place(
    kind: str, setting: dict[str, object], servers: list[RedisServer], clock: FakeClock
) -> Place:
    """Redis has a clock of its own, so time passes by what is stored growing older."""
    namespace = f"test{next(_numbers)}"

    def names(pattern: str) -> Iterator[tuple[RedisServer, bytes]]:
        for server in servers:
            with server.client() as client:
                yield from ((server, name) for name in client.scan_iter(pattern))

    def dump() -> bytes:
        parts = []
        for server, name in names(f"*{namespace}*"):
            with server.client() as client:
                readers = {b"hash": client.hgetall, b"zset": lambda n, c=client: c.zrange(n, 0, -1)}
                parts += [name, repr(readers[client.type(name)](name)).encode()]
        return b"\n".join(parts)

    def pass_time(seconds: float) -> None:
        clock.advance(seconds)
        for server, name in names(f"{{{namespace}:*:use"):
            with server.client() as client:
                for column in ("rf", "tf", "resets"):
                    value = float(client.hget(name, column) or 0)
                    if value:
                        client.hset(name, column, repr(value - seconds))
                held = name.replace(b":use", b":held")
                for call, text in client.hgetall(held).items():
                    begun, rest = text.decode().split(" ", 1)
                    aged = float(begun) - seconds if float(begun) else 0.0
                    client.hset(held, call, f"{aged!r} {rest}")
                for call, over in client.zrange(name.replace(b":use", b":calls"), 0, -1, withscores=True):
                    client.zadd(name.replace(b":use", b":calls"), {call: over - seconds})

    setting = {"type": "redis", "namespace": namespace, "timeout": 5.0, **setting}
    return Place(kind, setting, clock, dump, pass_time)


def _redis(request, clock: FakeClock) -> Place:
    server: RedisServer = request.getfixturevalue("redis_of_all")
    return _redis_place("redis", {"host": "127.0.0.1", "port": server.port}, [server], clock)


def _cluster(request, clock: FakeClock) -> Place:
    made: RedisCluster = request.getfixturevalue("cluster_of_all")
    return _redis_place("cluster", {"redis_startup_nodes": made.nodes}, made.servers, clock)


_PLACES = {"memory": _memory, "sqlite": _sqlite, "redis": _redis, "cluster": _cluster, "sql": _sql}


@pytest.fixture(params=list(_PLACES))
def everywhere(request) -> Iterator[Place]:
    """One kind of store after the other."""
    with placed(request, request.param) as made:
        yield made


@pytest.fixture(params=["memory", "sqlite", "redis"])
def place(request) -> Iterator[Place]:
    """The kinds that need not much."""
    with placed(request, request.param) as made:
        yield made


@pytest.fixture(params=["sqlite", "redis"])
def shared(request) -> Iterator[Place]:
    """The kinds that processes share."""
    with placed(request, request.param) as made:
        yield made


@contextlib.contextmanager
def placed(request, kind: str) -> Iterator[Place]:
    """A place of this kind; its resolvers and stores are closed afterwards."""
    # It is now: Redis has no other time.
    made = _PLACES[kind](request, FakeClock(float(int(time.time()))))
    yield made
    for each in made.made:
        each.close()
