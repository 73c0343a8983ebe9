"""Paging over a namespace's entries with the first bytes of each, on every store that others share."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import diskcache
import pytest

from llm_middleware.errors import InvalidRequestError, StoreError
from llm_middleware.stores import s3
from llm_middleware.stores.disk import DiskStore
from llm_middleware.stores.functions import FunctionStore
from llm_middleware.stores.redis import RedisStore
from llm_middleware.stores.redis_connect import RedisConnection
from llm_middleware.stores.redis_scan import scan_heads
from llm_middleware.stores.s3 import S3Store
from tests import s3_services
from tests.s3_services import S3Server
from tests.services import FACES, HOST, FaultProxy, RedisCluster, RedisServer, SyncFace, redis_cluster

moto, swift = s3_services.moto, s3_services.swift  # fixtures

AMPLE = 30.0  # seconds: a budget that no test uses up
BUCKET = "heads"
LARGE = 40_000  # bytes, from 32 KiB on the disk keeps a value in a file of its own
SIZE = 8


def key(number: int, namespace: str = "a") -> str:
    return f"{namespace}:{number:064x}"


def redis_store(**settings: object) -> RedisStore:
    return RedisStore(RedisConnection.from_settings(settings, {}, budget=AMPLE))


def pages(
    face: SyncFace, store: object, namespace: str, size: int = SIZE
) -> Iterator[list[tuple[str, bytes]]]:
    cursor = None
    while True:
        cursor, page = face.do(store, "heads", namespace, cursor, size)
        assert cursor is None or isinstance(cursor, str)
        yield page
        if cursor is None:
            return


def walk(face: SyncFace, store: object, namespace: str, size: int = SIZE) -> list[tuple[str, bytes]]:
    return list(itertools.chain.from_iterable(pages(face, store, namespace, size)))


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Iterator[SyncFace]:
    made = FACES[request.param]()
    yield made
    made.close()


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisStore]:
    with contextlib.closing(redis_store(host=HOST, port=server.port)) as made:
        yield made


@pytest.fixture(scope="module")
def masters() -> Iterator[RedisCluster]:
    with redis_cluster() as made:
        yield made


@pytest.fixture
def cluster(masters: RedisCluster) -> RedisCluster:
    for server in masters.servers:
        server.ask("FLUSHALL")
    return masters


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskStore]:
    with contextlib.closing(DiskStore(tmp_path / "cache", timeout=AMPLE)) as made:
        yield made


_with_bucket: set[str] = set()


def s3_settings(server: S3Server, path: str) -> dict[str, object]:
    if server.name not in _with_bucket:
        with contextlib.closing(server.client()) as client:
            client.create_bucket(Bucket=BUCKET)
        _with_bucket.add(server.name)
    return server.settings(BUCKET, s3_path=path)


# Every entry that is there during the whole walk


@dataclass
class Place:
    """A kind of store: how to make one, whether it may tell an entry twice, entries for several pages."""

    make: Callable[[], object]
    repeats: bool
    entries: int


@pytest.fixture(params=["redis", "cluster", "disk", "moto", "swift"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "redis":
        port = request.getfixturevalue("server").port
        return Place(lambda: redis_store(host=HOST, port=port), True, 2500)
    if request.param == "cluster":
        nodes = request.getfixturevalue("cluster").nodes
        return Place(lambda: redis_store(redis_startup_nodes=nodes), True, 4000)
    if request.param == "disk":
        return Place(lambda: DiskStore(tmp_path / "cache", timeout=AMPLE), False, 2200)
    monkeypatch.setattr(s3, "_PAGE", 10)
    settings = s3_settings(request.getfixturevalue(request.param), tmp_path.name)
    return Place(lambda: S3Store.from_settings(settings), False, 25)


class Writers:
    """Threads that each call a function with 0, 1, 2 ... until the block is left, at least so often."""

    def __init__(self, *functions: Callable[[int], object], least: int = 5) -> None:
        self._stop = threading.Event()
        self._least = least
        self._threads = [threading.Thread(target=self._run, args=(function,)) for function in functions]
        self._failures: list[Exception] = []

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self._failures == []

    def _run(self, function: Callable[[int], object]) -> None:
        try:
            for step in itertools.count():
                function(step)
                if self._stop.is_set() and step >= self._least:
                    return
        except Exception as exc:
            self._failures.append(exc)


def value(number: int, mark: str = "old") -> bytes:
    """Its first bytes say whose it is; some are large."""
    return b"%04d %s" % (number, mark.encode()) + b"." * (LARGE if number % 7 == 0 else 20)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_walk_finds_all_that_is_there_while_others_write(place: Place, asynchronous: bool) -> None:
    store, other = place.make(), place.make()
    asynchronous = asynchronous and hasattr(store, "aheads")
    face = FACES["async" if asynchronous else "sync"]()
    numbers = range(place.entries)
    for number in numbers:
        other.set(key(number), value(number), 600)
    for number, namespace in itertools.product(range(5), ("a:b", "", "b", "A", "ab")):
        other.set(key(number, namespace), b"not in a", 600)

    def replace(step: int) -> None:
        number = step * 7 % place.entries
        other.set(key(number), value(number, "new"), 600)

    def come_and_go(step: int) -> None:
        other.set(key(10_000 + step % 50), b"guest", 600)
        other.delete([key(10_000 + (step + 25) % 50)])

    def write_elsewhere(step: int) -> None:
        other.set(key(step % 50, "a:b"), b"not in a", 600)

    with Writers(replace, come_and_go, write_elsewhere):
        found = walk(face, store, "a")
    lasting = [(name, head) for name, head in found if head != b"guest"]
    assert {name for name, _ in lasting} == {key(number) for number in numbers}
    assert all(
        head in (b"%04d old" % int(name[2:], 16), b"%04d new" % int(name[2:], 16)) for name, head in lasting
    )
    assert {name for name, head in found if head == b"guest"} <= {key(10_000 + step) for step in range(50)}
    if not place.repeats:
        assert len(lasting) == place.entries

    other.delete([key(10_000 + step) for step in range(50)])
    for number in numbers[::9]:
        other.set(key(number), value(number, "end"), 600)
    expected = {key(n): b"%04d %s" % (n, b"end" if n % 9 == 0 else b"...") for n in numbers}
    found = [
        (name, head if head[5:] == b"end" else head[:5] + b"...") for name, head in walk(face, store, "a")
    ]
    assert dict(found) == expected
    assert place.repeats or len(found) == len(expected)
    assert {name for name, _ in walk(face, store, "a:b")} >= {key(number, "a:b") for number in range(5)}
    assert walk(face, store, "nothing") == []
    assert other.flush("a") == place.entries
    assert walk(face, store, "a") == []
    face.do(store, "close")
    if asynchronous:
        store.close()
    other.close()
    face.close()


def test_a_walk_goes_on_in_another_store(place: Place) -> None:
    """As in another process: a cursor is all that a walk needs."""
    store = place.make()
    for number in range(place.entries):
        store.set(key(number), b"value", 600)
    store.close()
    cursor, found, steps = None, set(), 0
    while steps == 0 or cursor is not None:
        following = place.make()
        with contextlib.closing(following):
            if steps % 2 and hasattr(following, "aheads"):
                cursor, page = asyncio.run(following.aheads("a", cursor, SIZE))
            else:
                cursor, page = following.heads("a", cursor, SIZE)
        found |= set(page)
        steps += 1
    assert found == {(key(number), b"value") for number in range(place.entries)}
    assert steps >= 3


@pytest.mark.parametrize(
    "cursor", ["", "x", "-1", " 1", "1 ", "1.5", "\u0661", "\ud800", str(2**64), "9" * 40, "1-1", 1, b"1"]
)
def test_a_cursor_that_is_none_is_named(place: Place, cursor: object) -> None:
    with contextlib.closing(place.make()) as store:
        store.set(key(1), b"value", 600)
        with pytest.raises(InvalidRequestError) as caught:
            store.heads("a", cursor, SIZE)
        assert caught.value.param == "cursor"
        assert caught.value.status == 400
        if hasattr(store, "aheads"):
            with pytest.raises(InvalidRequestError):
                asyncio.run(store.aheads("a", cursor, SIZE))


def test_a_store_of_two_functions_has_no_walk() -> None:
    assert not hasattr(FunctionStore, "heads")
    assert not hasattr(FunctionStore, "aheads")


# Redis


def test_redis_only_strings_and_only_of_the_form_of_a_key(
    face: SyncFace, server: RedisServer, store: RedisStore
) -> None:
    store.set(key(1), b"value", None)
    store.set(key(2), b"", None)
    server.ask("RPUSH", key(3), "a", "list")
    server.ask("HSET", key(4), "a", "hash")
    server.ask("SET", "a:" + "g" * 64, "no digits")
    server.ask("SET", "a:" + "1" * 63, "too short")
    server.ask("SET", "xa:" + "1" * 64, "longer name")
    assert sorted(walk(face, store, "a")) == [(key(1), b"value"), (key(2), b"")]
    assert walk(face, store, "a", 0) == [(name, b"") for name, _ in walk(face, store, "a")]


def test_redis_sends_one_scan_and_one_range_per_entry(
    face: SyncFace, server: RedisServer, store: RedisStore
) -> None:
    for number in range(30):
        store.set(key(number), b"value", None)
    cursor, page = face.do(store, "heads", "a", None, 3)
    assert cursor is None
    assert sorted(page) == [(key(number), b"val") for number in range(30)]
    calls = server.calls()
    assert (calls["scan"], calls["getrange"]) == (1, 30)
    assert not {"get", "mget", "exists", "keys"} & set(calls)


def test_redis_pages_are_bounded(face: SyncFace, server: RedisServer, store: RedisStore) -> None:
    """Whatever else there is: a page looks at a thousand keys, and finds what is among them."""
    store.mset([(key(number, "other"), b"value", None) for number in range(5000)])
    store.set(key(1), b"value", None)
    found = list(pages(face, store, "a"))
    assert 3 <= len(found) <= 6
    assert list(itertools.chain(*found)) == [(key(1), b"value")]


def test_redis_an_entry_that_goes_meanwhile_is_left_out(server: RedisServer, store: RedisStore) -> None:
    for number in range(3):
        store.set(key(number), b"" if number else b"value", None)
    plan = scan_heads("a", None, SIZE, False)
    with server.client() as client:
        step = next(plan)
        found = step(client)
        client.delete(key(0), key(1))
        step = plan.send(found)
        heads = step(client)
        step = plan.send(heads)
        with pytest.raises(StopIteration) as done:
            plan.send(step(client))
    assert done.value.value == (None, [(key(2), b"")])


def test_redis_what_may_not_be_read_is_an_error(
    face: SyncFace, server: RedisServer, store: RedisStore
) -> None:
    store.set(key(1), b"value", None)
    server.ask("ACL", "SETUSER", "lister", "on", ">secret", "~*", "+@connection", "+scan")
    limited = redis_store(host=HOST, port=server.port, username="lister", password="secret")
    with pytest.raises(StoreError, match="getrange"):
        face.do(limited, "heads", "a", None, SIZE)
    face.do(limited, "close")


def test_cluster_masters_are_walked_in_turn(face: SyncFace, cluster: RedisCluster) -> None:
    with contextlib.closing(redis_store(redis_startup_nodes=cluster.nodes)) as store:
        for number in range(300):
            store.set(key(number), b"%d" % number, None)
        found = list(pages(face, store, "a"))
        assert len(found) == 3
        assert sorted(len(page) for page in found) == sorted(
            server.ask("DBSIZE") for server in cluster.servers
        )
        assert dict(itertools.chain(*found)) == {key(number): b"%d" % number for number in range(300)}
        face.do(store, "close")


def test_cluster_a_cursor_of_other_masters_is_told(face: SyncFace, cluster: RedisCluster) -> None:
    with contextlib.closing(redis_store(redis_startup_nodes=cluster.nodes)) as store:
        cursor, _ = face.do(store, "heads", "a", None, SIZE)
        mark, number, at = cursor.split("-")
        assert (number, at) == ("1", "0")
        other = f"{int(mark, 16) ^ 1:08x}"
        for bad, code in (
            (f"{other}-{number}-{at}", "cursor_outdated"),
            (f"{mark}-3-0", "invalid_request"),
            (at, "invalid_request"),
        ):
            with pytest.raises(InvalidRequestError) as caught:
                face.do(store, "heads", "a", bad, SIZE)
            assert (caught.value.param, caught.value.code) == ("cursor", code)
        face.do(store, "close")


def test_cluster_a_type_that_is_no_string_is_left_out(face: SyncFace, cluster: RedisCluster) -> None:
    with contextlib.closing(redis_store(redis_startup_nodes=cluster.nodes)) as store:
        for number in range(20):
            store.set(key(number), b"value", None)
        with store.connection.use() as client:
            for number in range(0, 20, 2):
                client.delete(key(number))
                client.rpush(key(number), "item")
        assert sorted(walk(face, store, "a")) == [(key(number), b"value") for number in range(1, 20, 2)]
        face.do(store, "close")


# Disk


def value_files(store: DiskStore) -> list[Path]:
    return sorted(store.directory.glob("*/*/*.val"))


def test_disk_nothing_is_made_by_a_walk(disk: DiskStore) -> None:
    assert disk.heads("a", None, SIZE) == (None, [])
    assert not disk.directory.exists()


def test_disk_a_page_is_a_thousand_rows(disk: DiskStore) -> None:
    for number in range(1500):
        disk.set(key(number, "a" if number % 3 else "b"), b"value", 600)
    cursor, page = disk.heads("a", None, SIZE)
    assert (cursor, [name for name, _ in page]) == ("1000", [key(n) for n in range(1000) if n % 3])
    cursor, page = disk.heads("a", cursor, SIZE)
    assert (cursor, [name for name, _ in page]) == (None, [key(n) for n in range(1000, 1500) if n % 3])
    assert disk.heads("a", "1500", SIZE) == (None, [])
    assert disk.heads("nothing", None, SIZE) == ("1000", [])


def test_disk_only_the_first_bytes_of_a_file_are_read(disk: DiskStore) -> None:
    disk.set(key(1), b"first bytes" + bytes(LARGE), 600)
    (path,) = value_files(disk)
    os.truncate(path, 2**40)
    assert disk.heads("a", None, SIZE) == (None, [(key(1), b"first by")])


def test_disk_what_is_damaged_or_planted_is_left_out(disk: DiskStore, tmp_path: Path) -> None:
    with diskcache.Cache(str(disk.directory)) as foreign:
        for number, planted in enumerate(({"a": "pickle"}, "text", "text" * LARGE, 5, 2.5, [bytes(LARGE)])):
            foreign.set(key(number), planted)
    for number in range(10, 17):
        disk.set(key(number), b"%d" % number * (LARGE if number < 13 else 1), 600)
    victim = tmp_path / "victim.val"
    victim.write_bytes(b"precious")
    disk.close()
    with diskcache.Cache(str(disk.directory)) as foreign:
        value_files_of = dict(foreign._sql("SELECT key, filename FROM Cache").fetchall())
        (disk.directory / value_files_of[key(10)]).unlink()
        foreign._sql("UPDATE Cache SET filename = '../victim.val' WHERE key = ?", (key(11),))
        foreign._sql("UPDATE Cache SET tag = 'tomorrow' WHERE key = ?", (key(13),))
        foreign._sql(
            "UPDATE Cache SET key = CAST(x'613AFF' || substr(key, 4) AS TEXT) WHERE key = ?", (key(14),)
        )
        foreign._sql(
            "UPDATE Cache SET key = 'a:' || replace(hex(zeroblob(32)), '0', 'G') WHERE key = ?", (key(15),)
        )
    assert disk.heads("a", None, 4) == (None, [(key(12), b"1212"), (key(16), b"16")])


def test_disk_a_walk_holds_up_no_read_and_no_write(disk: DiskStore) -> None:
    for number in range(10):
        disk.set(key(number), b"value", 600)
    with disk._walking() as reader:
        rows = reader.execute("SELECT key FROM Cache")
        assert rows.fetchone() == (key(0),)  # a statement under way
        assert disk.get(key(1)) == b"value"
        disk.set(key(1), b"new", 600)
        assert disk.get(key(1)) == b"new"


# S3


@pytest.fixture(params=["moto", "swift"])
def bucket(request: pytest.FixtureRequest) -> S3Server:
    return request.getfixturevalue(request.param)


def test_s3_only_what_this_store_wrote_and_is_not_over(
    bucket: S3Server, tmp_path: Path, face: SyncFace
) -> None:
    path = f"{tmp_path.name}-{face.name}"
    now = [1_700_000_000.0]
    store = S3Store.from_settings(s3_settings(bucket, path), clock=lambda: now[0])
    for number, ttl in enumerate((10, 100, None, 10)):
        store.set(key(number), b"value %d" % number, ttl)
    with contextlib.closing(bucket.client()) as client:
        for name in ("theirs", f"{8:064x}", "deeper/" + f"{9:064x}"):
            client.put_object(Bucket=BUCKET, Key=f"{path}/a/{name}", Body=b"theirs")
        endless = {"llm-expires": "inf"}
        client.put_object(Bucket=BUCKET, Key=f"{path}/a/{'g' * 64}", Body=b"no digits", Metadata=endless)
    now[0] += 10
    assert walk(face, store, "a") == [(key(1), b"value 1"), (key(2), b"value 2")]
    face.do(store, "close")


def test_s3_only_the_first_bytes_come(moto: S3Server, tmp_path: Path, face: SyncFace) -> None:
    settings = s3_settings(moto, f"{tmp_path.name}-{face.name}")
    with FaultProxy(int(moto.url.rpartition(":")[2])) as proxy:
        store = S3Store.from_settings({**settings, "s3_endpoint_url": f"http://127.0.0.1:{proxy.port}"})
        for number in range(5):
            store.set(key(number), b"first bytes" + bytes(300_000), 600)
        before = proxy.sent
        assert walk(face, store, "a") == [(key(number), b"first by") for number in range(5)]
        assert proxy.sent - before < 30_000
        face.do(store, "close")


def test_s3_a_cursor_is_for_one_namespace(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PAGE", 2)
    with contextlib.closing(S3Store.from_settings(s3_settings(moto, tmp_path.name))) as store:
        for number in range(3):
            store.set(key(number), b"value", 600)
            store.set(key(number, "b"), b"value", 600)
        cursor, page = store.heads("a", None, SIZE)
        assert [name for name, _ in page] == [key(0), key(1)]
        for bad in (cursor + "0", cursor[1:], cursor[:-1], cursor[:8]):
            with pytest.raises(InvalidRequestError):
                store.heads("a", bad, SIZE)
        with pytest.raises(InvalidRequestError):
            store.heads("b", cursor, SIZE)
        assert store.heads("a", cursor, SIZE) == (None, [(key(2), b"value")])
