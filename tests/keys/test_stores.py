"""Every store of keys keeps the contract, and what is peculiar to one."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from llm_middleware.errors import ConfigError, StoreError
from llm_middleware.keys.store import make_store
from llm_middleware.stores.keys_memory import MemoryKeys
from llm_middleware.stores.keys_redis import RedisKeys
from llm_middleware.stores.keys_sql import SQLKeys
from llm_middleware.stores.keys_sqlite import SQLiteKeys
from llm_middleware.stores.keys_tables import TABLES
from tests.keys.conftest import placed
from tests.keys.contract import A, KeyStoreContract, ask, row


class TestStores(KeyStoreContract):
    """Memory, SQLite, Redis, a Redis Cluster, PostgreSQL."""


class TestSQLiteThroughSQLAlchemy(KeyStoreContract):
    @pytest.fixture
    def store(self, everywhere, tmp_path):
        made = make_store({"type": "sql", "url": f"sqlite:///{tmp_path}/alchemy.db"}, everywhere.clock)
        yield made
        made.close()

    @pytest.fixture(params=["sqlite"])
    def everywhere(self, request, place):
        return place

    @pytest.fixture(params=["sqlite"])
    def place(self, request):
        with placed(request, "sqlite") as made:
            yield made

    def test_many_at_once_are_counted_one_by_one(self, store, everywhere, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(
            everywhere,
            "store",
            lambda: make_store(f"sqlite+pysqlite:///{tmp_path}/alchemy.db", everywhere.clock),
        )
        super().test_many_at_once_are_counted_one_by_one(store, everywhere)


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        (None, MemoryKeys),
        ("memory", MemoryKeys),
        ({"type": "memory"}, MemoryKeys),
        ("sqlite:///keys.db", SQLiteKeys),
        ({"type": "sqlite", "path": "x/keys.db", "timeout": 1}, SQLiteKeys),
        ("redis", RedisKeys),
        ("redis://127.0.0.1:1/0", RedisKeys),
        ({"type": "redis", "host": "h", "namespace": "mine"}, RedisKeys),
        ("postgresql://u:p@h/db", SQLKeys),
        ({"type": "sql", "url": "sqlite:///x.db"}, SQLKeys),
    ],
)
def test_a_store_is_made_of_its_setting_and_opens_nothing(setting, kind, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = make_store(setting, lambda: 0.0, {})
    assert type(made) is kind
    assert list(tmp_path.iterdir()) == []
    assert make_store(made, lambda: 0.0) is made


@pytest.mark.parametrize(
    ("setting", "param", "says"),
    [
        ("rediss", "store.type", "did you mean 'redis'"),
        (7, "store", "a value of type int"),
        ({"path": "x"}, "store", "a mapping"),
        ({"type": "sqlite"}, "store.path", "path: expected a string"),
        ({"type": "sqlite", "pth": "x"}, "store.pth", "did you mean 'path'"),
        ({"type": "sqlite", "path": "x", "timeout": 0}, "store.timeout", "seconds > 0"),
        ({"type": "redis", "hots": "h"}, "store.hots", "did you mean 'host'"),
        ({"type": "redis", "namespace": "{x}"}, "store.namespace", "no braces"),
        ({"type": "memory", "path": "x"}, "store.path", "unknown setting"),
        ({"type": "sql", "url": "nonsense"}, "store.url", "not the URL of a database"),
        ({"type": "sql", "url": "mysql://u:geheim@h/db"}, "store.url", "mysql"),
        ({"type": "sql", "url": "postgresql+asyncpg://u:geheim@h/db"}, "store.url", "postgresql"),
        ({"type": "sql", "url": "sqlite+aiosqlite:///x"}, "store.url", "sqlite"),
        ({"type": "redis", "password": "os.environ/MISSING_PASSWORD"}, "store.password", "MISSING_PASSWORD"),
    ],
)
def test_a_wrong_setting_is_named(setting, param, says) -> None:
    with pytest.raises(ConfigError) as caught:
        make_store(setting, lambda: 0.0, {})
    assert caught.value.param == param
    assert says in caught.value.message
    assert "geheim" not in caught.value.message


def test_the_file_is_its_owners_alone(tmp_path) -> None:
    store = SQLiteKeys(tmp_path / "new" / "keys.db")
    store.add(row(), 0.0, None)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "new").iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    store.close()


def test_a_file_that_is_no_database(tmp_path) -> None:
    (tmp_path / "keys.db").write_bytes(b"not a database, and long enough to be looked at" * 30)
    with pytest.raises(StoreError, match="file is not a database"):
        SQLiteKeys(tmp_path / "keys.db").get(A)


def test_a_forked_child_uses_the_file_too(tmp_path) -> None:
    code = f"""
import os
from llm_middleware.stores.keys_sqlite import SQLiteKeys
from llm_middleware.stores.keys_rules import Ask, Ended
from tests.keys.contract import A, ask, row
store = SQLiteKeys({str(tmp_path / "keys.db")!r})
store.add(row(), 0.0, None)
for _ in range(4):
    if not os.fork():
        for _ in range(300):
            store.count(A, ask(ended=(Ended("", None, 1.0),)))
        os._exit(0)
codes = [os.wait()[1] for _ in range(4)]
print(codes, store.get(A)["spend"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.getcwd(), timeout=60
    )
    assert done.stdout.split("\n")[0] == "[0, 0, 0, 0] 1200.0"


def test_tables_are_made_by_many_at_once(postgres_of_all) -> None:
    from concurrent.futures import ThreadPoolExecutor

    for name in ("llm_keys", "llm_key_use", "llm_key_calls", "llm_key_changes"):
        postgres_of_all.ask(f"DROP TABLE IF EXISTS {name}")
    stores = [SQLKeys(postgres_of_all.url) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda store: store.generation(), stores)) == [0] * 6
    for store in stores:
        store.close()
    assert len(TABLES) == 8


@pytest.mark.parametrize("kind", ["memory", "sqlite", "sql"])
def test_counting_is_no_change(kind, request) -> None:
    """Else each call of one process would have every other one read its keys again."""
    with placed(request, kind) as everywhere:
        store = everywhere.store()
        numbers = [store.generation()]
        for work in (
            lambda: store.add(row(), 0.0, None),
            lambda: store.count(A, ask(requests=1, rpm=5)),
            lambda: store.add(row(), 0.0, None),
            lambda: store.change(A, {"alias": "x"}, {}),
            lambda: store.replace(A, {"id": "b" * 64}, {}),
            lambda: store.remove([A]),
            lambda: store.remove(["b" * 64]),
        ):
            work()
            numbers.append(store.generation())
        assert [number - numbers[0] for number in numbers] == [0, 1, 1, 1, 2, 3, 3, 4]


@pytest.mark.parametrize("kind", ["redis", "cluster"])
def test_changes_are_told_and_counting_is_not(kind, request, when) -> None:
    with placed(request, kind) as everywhere:
        store, other = everywhere.store(), everywhere.store()
        told: list[object] = []
        store.attend(told.append)
        store.listen()
        when(lambda: store.live)
        other.add(row(), 0.0, None)
        other.count(A, ask(requests=1, rpm=5))
        other.change(A, {"alias": "x"}, {})
        other.replace(A, {"id": "b" * 64}, {})
        other.remove(["b" * 64])
        other.add(row("c"), 0.0, None)
        expected = [A, A, "b" * 64, A, "b" * 64, "c" * 64]
        when(lambda: len(told) >= len(expected))
        # In a Cluster each of them goes its own way.
        assert (told if kind == "redis" else sorted(told)) == (
            expected if kind == "redis" else sorted(expected)
        )


def test_a_count_is_one_round_trip(redis_of_all) -> None:
    store = make_store({"type": "redis", "port": redis_of_all.port, "namespace": "trips"}, lambda: 0.0, {})
    store.add(row(), 0.0, None)
    store.count(A, ask(requests=1, rpm=100))
    redis_of_all.ask("CONFIG", "RESETSTAT")
    for _ in range(5):
        store.count(A, ask(requests=1, rpm=100))
    calls = redis_of_all.calls()
    assert calls.get("evalsha") == 5
    assert "eval" not in calls
    store.close()


def test_scripts_are_loaded_again(redis_of_all) -> None:
    store = make_store({"type": "redis", "port": redis_of_all.port, "namespace": "reload"}, lambda: 0.0, {})
    store.add(row(), 0.0, None)
    redis_of_all.ask("SCRIPT", "FLUSH")
    assert store.count(A, ask(requests=1, rpm=1)).refused == ""
    store.close()
