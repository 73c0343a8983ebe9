"""The disk tier: its contract, locks, crashes, and what someone else may have put in its directory."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diskcache
import pytest

from llm_middleware._store_contract import ContractClock, StoreContract
from llm_middleware.caching.entry import Entry, Form, decode, encode
from llm_middleware.errors import ConfigError, CorruptEntryError, StoreError
from llm_middleware.stores import _diskcache
from llm_middleware.stores.disk import DiskStore
from llm_middleware.types import Clock, Store

ROOT = Path(__file__).parents[2]
LARGE = 40_000  # bytes, from 32 KiB on diskcache keeps a value in a file of its own


def key(number: int, namespace: str = "llm") -> str:
    return f"{namespace}:{number:064x}"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def store(directory: Path) -> Iterator[DiskStore]:
    store = DiskStore(directory, timeout=5)
    yield store
    store.close()


@contextmanager
def database(directory: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(directory / "cache.db", isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def locked(directory: Path, begin: str) -> Iterator[threading.Event]:
    """Another connection, in a thread, holds a lock until the block is left; the event is set after that."""
    held, release, released = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        with database(directory) as connection:
            connection.execute(begin)
            held.set()
            release.wait()
            connection.execute("ROLLBACK")
        released.set()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        yield released
    finally:
        release.set()
        thread.join()


def value_files(directory: Path) -> list[Path]:
    return list(directory.glob("*/*/*.val"))


class TestContract(StoreContract):
    @pytest.fixture(autouse=True)
    def _directories(self, tmp_path: Path) -> None:
        self._made = 0
        self._tmp_path = tmp_path

    def make_store(self, clock: Clock) -> Store:
        self._made += 1
        return DiskStore(self._tmp_path / str(self._made), timeout=5, clock=clock)


class TestOpening:
    def test_nothing_is_made_before_the_first_write(self, directory: Path, store: DiskStore) -> None:
        assert store.get(key(1)) is None
        assert not directory.exists()
        assert store.inline is False

    def test_the_directory_is_for_its_owner_only(self, directory: Path, store: DiskStore) -> None:
        before = os.umask(0)
        try:
            store.set(key(1), b"value", 60)
        finally:
            os.umask(before)
        assert directory.stat().st_mode & 0o777 == 0o700

    def test_inline_from_the_first_read_to_the_end(self, store: DiskStore) -> None:
        store.set(key(1), b"value", 60)
        assert store.inline is False
        assert store.get(key(1)) == b"value"
        assert store.inline is True
        store.close()
        assert store.inline is False

    def test_without_diskcache_the_error_says_what_to_install(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "diskcache", None)
        _diskcache.cache_type.cache_clear()
        try:
            with pytest.raises(ConfigError, match=r"pip install 'llm-middleware\[disk\]'"):
                DiskStore(directory)
        finally:
            _diskcache.cache_type.cache_clear()

    def test_a_size_below_one_is_refused(self, directory: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            DiskStore(directory, max_bytes=0)
        assert caught.value.param == "max_bytes"

    def test_a_file_where_the_directory_should_be(self, directory: Path, store: DiskStore) -> None:
        directory.write_text("in the way")
        assert store.get(key(1)) is None
        with pytest.raises(StoreError):
            store.set(key(1), b"value", 60)

    def test_a_database_that_is_none(self, directory: Path, store: DiskStore) -> None:
        directory.mkdir()
        (directory / "cache.db").write_bytes(b"not a database" * 1000)
        with pytest.raises(StoreError):
            store.get(key(1))
        with pytest.raises(StoreError):
            store.set(key(1), b"value", 60)


class Planted:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, mark: Path, size: int) -> None:
        self.mark = mark
        self.ballast = bytes(size)

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.mark),), self.ballast or None


class TestPlanted:
    """C30, C31: what was put into the directory by others is never run, and goes when it is deleted."""

    @pytest.mark.parametrize("size", [0, LARGE], ids=["row", "file"])
    def test_c30_a_pickle_is_not_loaded(self, directory: Path, store: DiskStore, size: int) -> None:
        mark = directory.parent / "executed"
        with diskcache.Cache(str(directory)) as foreign:
            foreign.set(key(1), Planted(mark, size))
        with database(directory) as connection:
            rows = connection.execute("SELECT mode, filename IS NOT NULL FROM Cache").fetchall()
        assert rows == [(4, size > 0)]
        for _ in range(2):
            with pytest.raises(CorruptEntryError):
                store.get(key(1))
        store.set(key(2), b"value", 60)
        with pytest.raises(CorruptEntryError):
            store.get(key(1))
        assert store.delete([key(1)]) == 1
        assert store.get(key(1)) is None
        assert store.get(key(2)) == b"value"
        assert not mark.exists()
        assert value_files(directory) == []

    def test_c30_the_plant_would_have_worked(self, directory: Path) -> None:
        mark = directory.parent / "executed"
        with diskcache.Cache(str(directory)) as foreign:
            foreign.set(key(1), Planted(mark, 0))
            assert foreign.get(key(1)) is None
        assert mark.exists()

    def test_c30_a_pickled_key_is_not_loaded(self, directory: Path, store: DiskStore) -> None:
        mark = directory.parent / "executed"
        with diskcache.Cache(str(directory)) as foreign:
            foreign.set(Planted(mark, 0), b"value", expire=-1)
        store.set(key(1), b"value", 60)
        assert store.flush("llm") == 1
        assert not mark.exists()

    @pytest.mark.parametrize("value", ["text", "text" * LARGE, 5, 2.5], ids=["str", "file", "int", "float"])
    def test_c31_other_kinds_of_value_are_corrupt(
        self, directory: Path, store: DiskStore, value: object
    ) -> None:
        with diskcache.Cache(str(directory)) as foreign:
            foreign.set(key(1), value)
        with pytest.raises(CorruptEntryError):
            store.get(key(1))
        assert store.flush("llm") == 1
        assert store.get(key(1)) is None

    @pytest.mark.parametrize("absolute", [True, False])
    def test_a_row_cannot_name_a_file_elsewhere(
        self, directory: Path, store: DiskStore, absolute: bool
    ) -> None:
        victim = directory.parent / "victim.val"
        victim.write_bytes(b"precious")
        store.set(key(1), bytes(LARGE), 60)
        with database(directory) as connection:
            name = str(victim) if absolute else "../victim.val"
            connection.execute("UPDATE Cache SET filename = ?", (name,))
        with pytest.raises(CorruptEntryError):
            store.get(key(1))
        assert store.delete([key(1)]) == 1
        assert victim.read_bytes() == b"precious"

    def test_c31_an_expiry_of_another_kind(self, directory: Path, store: DiskStore) -> None:
        store.set(key(1), b"value", 60)
        with database(directory) as connection:
            connection.execute("UPDATE Cache SET tag = 'tomorrow'")
        with pytest.raises(CorruptEntryError):
            store.get(key(1))
        assert store.delete([key(1)]) == 1

    @pytest.mark.parametrize(
        ("name", "value"), [("size", None), ("disk_evil", 1), ("set", 1), ("sqlite_a; DROP TABLE Cache", 1)]
    )
    def test_planted_settings_are_a_store_error(
        self, directory: Path, store: DiskStore, name: str, value: object
    ) -> None:
        store.set(key(1), b"value", 60)
        store.close()
        with database(directory) as connection:
            connection.execute("INSERT OR REPLACE INTO Settings VALUES (?, ?)", (name, value))
        with pytest.raises(StoreError):
            store.set(key(2), b"value", 60)
        assert store.get(key(1)) == b"value"

    def test_c31_a_file_cut_short_is_returned_as_it_is(self, directory: Path, store: DiskStore) -> None:
        store.set(key(1), bytes(LARGE), 60)
        (path,) = value_files(directory)
        path.write_bytes(b"cut")
        assert store.get(key(1)) == b"cut"

    def test_a_row_without_its_file_is_a_miss(self, directory: Path, store: DiskStore) -> None:
        store.set(key(1), bytes(LARGE), 60)
        (path,) = value_files(directory)
        path.unlink()
        assert store.get(key(1)) is None
        store.set(key(1), bytes(LARGE), 60)
        assert store.get(key(1)) == bytes(LARGE)

    @pytest.mark.parametrize("value", ["text", bytearray(b"x"), None, 5])
    def test_only_bytes_are_written(self, store: DiskStore, value: bytes) -> None:
        with pytest.raises(StoreError):
            store.set(key(1), value, 60)
        with pytest.raises(StoreError):
            store.set(5, b"value", 60)  # type: ignore[arg-type]


class TestLocks:
    """C66: reads do not wait for writers, and writes not longer than they are told to."""

    @pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
    def test_c66_a_read_returns_while_another_holds_the_lock(self, directory: Path, begin: str) -> None:
        store = DiskStore(directory, timeout=0.01)
        store.set(key(1), b"inline", 60)
        store.set(key(2), bytes(LARGE), 60)
        assert store.get(key(1)) == b"inline"
        with locked(directory, begin) as released:
            assert store.inline is True
            assert store.get(key(1)) == b"inline"
            assert store.get(key(2)) == bytes(LARGE)
            assert store.get(key(3)) is None
            with pytest.raises(StoreError):
                store.set(key(1), b"new", 60)
            with pytest.raises(StoreError):
                store.set(key(2), bytes(LARGE), 60)
            with pytest.raises(StoreError):
                store.delete([key(1)])
            with pytest.raises(StoreError):
                store.flush("llm")
            with pytest.raises(StoreError):
                store.purge_expired()
            assert store.heads("llm", None, 4) == (None, [(key(1), b"inli"), (key(2), bytes(4))])
            assert not released.is_set()
        assert len(value_files(directory)) == 1  # a write that came to nothing leaves nothing
        store.set(key(1), b"new", 60)
        assert store.get(key(1)) == b"new"
        store.close()

    def test_c66_a_store_opened_under_a_lock_reads_at_once(self, directory: Path, store: DiskStore) -> None:
        store.set(key(1), b"value", 60)
        late = DiskStore(directory, timeout=0.01)
        with locked(directory, "BEGIN EXCLUSIVE") as released:
            assert late.get(key(1)) == b"value"
            assert late.inline is True
            with pytest.raises(StoreError):
                late.set(key(1), b"new", 60)
            assert not released.is_set()
        late.close()

    def test_c66_a_database_in_the_making_is_an_error_at_once(self, directory: Path) -> None:
        directory.mkdir()
        store = DiskStore(directory, timeout=0.01)
        with locked(directory, "BEGIN EXCLUSIVE") as released:
            with pytest.raises(StoreError):
                store.get(key(1))
            with pytest.raises(StoreError):
                store.set(key(1), b"value", 60)
            assert not released.is_set()
        store.set(key(1), b"value", 60)
        assert store.get(key(1)) == b"value"
        store.close()

    def test_a_thread_that_writes_does_not_hold_up_a_read(self, store: DiskStore) -> None:
        store.set(key(1), b"value", 60)
        with store._writing():
            assert store.get(key(1)) == b"value"

    def test_c67_eight_threads(self, store: DiskStore) -> None:
        failures: list[object] = []
        start = threading.Barrier(8)

        def work(seed: int) -> None:
            start.wait()
            try:
                for step in range(40):
                    number = (seed * 7 + step * 13) % 20
                    if step % 9 == 0:
                        store.delete([key(number)])
                    elif step % 2:
                        store.set(key(number), b"%d " % number * (20_000 if number == 3 else 1), 60)
                    else:
                        value = store.get(key(number))
                        if value is not None and value.split()[0] != b"%d" % number:
                            failures.append((number, value[:20]))
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


class TestSize:
    def test_the_oldest_go_and_the_limit_holds(self, directory: Path) -> None:
        store = DiskStore(directory, max_bytes=1_000_000, timeout=5)
        for number in range(50):
            store.set(key(number), bytes(LARGE), 60)
            files = sum(path.stat().st_size for path in value_files(directory))
            assert files < 1_000_000
        kept = [number for number in range(50) if store.get(key(number)) is not None]
        assert kept == list(range(50 - len(kept), 50))
        assert len(kept) == len(value_files(directory))
        assert len(kept) == (1_000_000 - tables(directory)) // LARGE
        store.close()

    def test_small_values_are_bounded_too(self, directory: Path) -> None:
        store = DiskStore(directory, max_bytes=200_000, timeout=5)
        for number in range(300):
            store.set(key(number), bytes(1000), 60)
        assert tables(directory) <= 200_000
        assert store.get(key(299)) == bytes(1000)
        assert store.get(key(0)) is None
        store.close()

    def test_a_value_larger_than_the_store_removes_its_predecessor(self, directory: Path) -> None:
        store = DiskStore(directory, max_bytes=200_000, timeout=5)
        store.set(key(1), b"old", 60)
        store.set(key(2), b"other", 60)
        store.set(key(1), bytes(200_001), 60)
        assert store.get(key(1)) is None
        assert store.get(key(2)) == b"other"
        store.close()

    def test_what_is_over_is_cleared_up_by_the_next_write(self, directory: Path, store: DiskStore) -> None:
        store.set(key(1), bytes(LARGE), 60)
        with database(directory) as connection:
            connection.execute("UPDATE Cache SET expire_time = 1.0")
        store.set(key(2), b"value", 60)
        with database(directory) as connection:
            assert connection.execute("SELECT key FROM Cache").fetchall() == [(key(2),)]
        assert value_files(directory) == []

    def test_delete_flush_and_replacement_remove_the_files(self, directory: Path, store: DiskStore) -> None:
        for number in range(3):
            store.set(key(number), bytes(LARGE), 60)
        store.set(key(0), bytes(LARGE), 60)
        assert len(value_files(directory)) == 3
        assert store.delete([key(0)]) == 1
        assert len(value_files(directory)) == 2
        assert store.flush("llm") == 2
        assert value_files(directory) == []

    def test_a_file_without_a_row_goes_after_an_hour(self, directory: Path, store: DiskStore) -> None:
        store.set(key(1), bytes(LARGE), 60)
        store.close()
        for name, age in (("aa", 0), ("bb", 3700)):
            orphan = directory / name / name / (name * 14 + ".val")
            orphan.parent.mkdir(parents=True)
            orphan.write_bytes(b"x")
            modified = orphan.stat().st_mtime - age
            os.utime(orphan, (modified, modified))
        (kept,) = (path for path in value_files(directory) if path.parts[-3] not in ("aa", "bb"))
        os.utime(kept, (1.0, 1.0))
        store.set(key(2), b"value", 60)
        assert not (directory / "bb/bb" / ("bb" * 14 + ".val")).exists()
        assert (directory / "aa/aa" / ("aa" * 14 + ".val")).exists()
        assert store.get(key(1)) == bytes(LARGE)


class TestPurge:
    """What is over by the store's own clock, and nothing else."""

    def test_rows_and_files_go(self, directory: Path) -> None:
        clock = ContractClock()
        store = DiskStore(directory, timeout=5, clock=clock)
        for number, ttl in enumerate((10, 10.5, None, 100, 10)):
            store.set(key(number), bytes(LARGE) if number < 4 else b"small", ttl)
        store.set(key(5, "other"), b"other", 10)
        assert store.purge_expired() == 0
        clock.advance(10)
        assert store.purge_expired() == 3
        assert store.purge_expired() == 0
        with database(directory) as connection:
            assert connection.execute("SELECT key FROM Cache").fetchall() == [(key(1),), (key(2),), (key(3),)]
        assert len(value_files(directory)) == 3
        clock.advance(0.5)
        assert store.purge_expired() == 1
        assert [store.get(key(number)) for number in (1, 2, 3)] == [None, bytes(LARGE), bytes(LARGE)]
        store.close()

    def test_many(self, directory: Path) -> None:
        """More than a page of rows, some pages with nothing in them that is over."""
        clock = ContractClock()
        store = DiskStore(directory, timeout=5, clock=clock)
        for number in range(2500):
            store.set(key(number), b"value", 10 if number < 900 or number % 100 == 0 else 100)
        clock.advance(10)
        assert store.purge_expired() == 900 + 16
        with database(directory) as connection:
            assert connection.execute("SELECT COUNT(*) FROM Cache").fetchall() == [(2500 - 916,)]
        assert store.flush("llm") == 2500 - 916
        store.close()

    def test_rows_that_this_store_did_not_write_stay(self, directory: Path, store: DiskStore) -> None:
        for number in range(3):
            store.set(key(number), b"value", 60)
        with database(directory) as connection:
            connection.execute("UPDATE Cache SET tag = 'yesterday' WHERE key = ?", (key(0),))
            connection.execute("UPDATE Cache SET tag = 1 WHERE key = ?", (key(1),))
            connection.execute("UPDATE Cache SET tag = 1.0, raw = 0 WHERE key = ?", (key(2),))
        assert store.purge_expired() == 0

    def test_nothing_is_made_where_there_is_nothing(self, directory: Path, store: DiskStore) -> None:
        assert store.purge_expired() == 0
        assert not directory.exists()


def tables(directory: Path) -> int:
    with database(directory) as connection:
        ((pages,),) = connection.execute("PRAGMA page_count").fetchall()
        ((size,),) = connection.execute("PRAGMA page_size").fetchall()
    return int(pages) * int(size)


def test_its_own_clock_decides(directory: Path) -> None:
    """diskcache's notion of time only clears up: an old clock serves what a new one does not."""
    clock = ContractClock(1000.0)
    store = DiskStore(directory, timeout=5, clock=clock)
    store.set(key(1), b"value", 60)
    later = DiskStore(directory, timeout=5, clock=ContractClock(1060.0))
    assert store.get(key(1)) == b"value"
    assert later.get(key(1)) is None
    store.close()
    later.close()


def run(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, str(directory)], cwd=ROOT, capture_output=True, text=True, check=False
    )


SECOND = """
import sys
from llm_middleware.stores.disk import DiskStore
store = DiskStore(sys.argv[1], timeout=5)
print(store.get("llm:" + "1" * 64), len(store.get("llm:" + "2" * 64)))
store.set("llm:" + "3" * 64, b"from the second", 60)
print(store.delete(["llm:" + "1" * 64]))
store.close()
"""


def test_a_second_process_sees_the_entries(directory: Path, store: DiskStore) -> None:
    store.set("llm:" + "1" * 64, b"from the first", 60)
    store.set("llm:" + "2" * 64, bytes(LARGE), 60)
    done = run(SECOND, directory)
    assert (done.stdout, done.stderr) == (f"b'from the first' {LARGE}\n1\n", "")
    assert store.get("llm:" + "1" * 64) is None
    assert store.get("llm:" + "3" * 64) == b"from the second"


FORK = """
import os, sys
from llm_middleware.stores.disk import DiskStore
store = DiskStore(sys.argv[1], timeout=5)
store.set("llm:" + "1" * 64, b"from the parent", 60)
store.get("llm:" + "1" * 64)
child = os.fork()
if child == 0:
    print(store.inline, store.get("llm:" + "1" * 64), store.inline, flush=True)
    store.set("llm:" + "2" * 64, b"from the child", 60)
    store.close()
    os._exit(0)
print(os.waitpid(child, 0)[1], store.inline, store.get("llm:" + "2" * 64))
store.set("llm:" + "1" * 64, b"again", 60)
print(store.get("llm:" + "1" * 64))
store.close()
"""


def test_a_fork_opens_connections_of_its_own(directory: Path) -> None:
    done = run(FORK, directory)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "False b'from the parent' True",
        "0 True b'from the child'",
        "b'again'",
    ]


WRITER = """
import sys
from llm_middleware.caching.entry import Entry, Form, encode
from llm_middleware.stores.disk import DiskStore
store = DiskStore(sys.argv[1], max_bytes=3_000_000, timeout=5)
for step in range(100_000):
    body = b"%d " % step * (30_000 if step % 3 == 0 else 20)
    store.set("llm:%064x" % (step % 40), encode(Entry("chat", 0.0, 60.0, Form((), body))), 60)
    print(step, flush=True)
"""


@pytest.mark.parametrize("steps", [1, 20, 45, 90])
def test_a_killed_writer_leaves_nothing_broken(directory: Path, store: DiskStore, steps: int) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    with writer.stdout:
        for _ in range(steps):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    writer.wait()
    found = 0
    for number in range(40):
        value = store.get(key(number))
        if value is not None:
            form = decode(value).plain
            assert form is not None
            assert int(form.body.split()[0]) % 40 == number
            found += 1
    assert found >= min(steps, 40)
    whole = encode(Entry("chat", 0.0, 60.0, Form((), b"after")))
    store.set(key(1), whole, 60)
    assert store.get(key(1)) == whole
