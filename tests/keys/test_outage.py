"""What happens while the store of keys fails: nobody is refused for it who is known, and nobody is let in."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from llm_middleware.errors import (
    BudgetExceededError,
    ExpiredKeyError,
    InvalidKeyError,
    KeyLimitError,
    KeyStoreUnavailable,
    StoreError,
)
from llm_middleware.keys.record import id_of
from llm_middleware.keys.resolver import KeyResolver
from llm_middleware.keys.store import make_store
from llm_middleware.stores.keys_memory import MemoryKeys
from llm_middleware.testing import FakeClock
from tests.services import FaultProxy, RedisServer


class Failing(MemoryKeys):
    """Fails when it is told to."""

    inline = False
    down = False

    def __getattribute__(self, name: str):
        if name in ("get", "count", "generation", "add", "change") and self.down:
            raise StoreError("no connection")
        return super().__getattribute__(name)


@pytest.fixture
def store(clock: FakeClock) -> Failing:
    return Failing(clock=clock)


@pytest.fixture
def resolver(store: Failing, clock: FakeClock) -> KeyResolver:
    return KeyResolver(store, clock=clock, ttl=60, master_key="sk-master-0123456789")


def test_known_keys_go_on_and_unknown_ones_are_not_said_to_be_wrong(resolver, store, face, clock) -> None:
    key = face.do(resolver, "generate", key_alias="a")["key"]
    face.do(resolver, "resolve", key)
    store.down = True
    for seconds in (1, 50, 300, 240):
        clock.advance(seconds)
        assert face.do(resolver, "resolve", key).alias == "a"
        assert resolver.known(key).alias == "a"  # for a moment, so that not every request asks
    clock.advance(20)  # ten times its time
    with pytest.raises(KeyStoreUnavailable):
        face.do(resolver, "resolve", key)
    for _ in range(10):
        with pytest.raises(KeyStoreUnavailable) as caught:
            face.do(resolver, "resolve", "sk-somebody-0123456789")
        assert (caught.value.status, caught.value.code) == (503, "key_store_unavailable")
    assert face.do(resolver, "resolve", "sk-master-0123456789").admin is True
    with pytest.raises(InvalidKeyError):
        face.do(resolver, "resolve", "no key at all")


def test_what_expires_meanwhile_is_refused(resolver, store, face, clock) -> None:
    key = face.do(resolver, "generate", duration="100s")["key"]
    face.do(resolver, "resolve", key)
    store.down = True
    clock.advance(99)
    assert face.do(resolver, "resolve", key) is not None
    clock.advance(1)
    with pytest.raises(ExpiredKeyError):
        face.do(resolver, "resolve", key)


def test_managing_says_so(resolver, store, face) -> None:
    store.down = True
    for method, arguments in (("generate", ()), ("info", ("sk-x",)), ("update", ("sk-x",))):
        with pytest.raises(KeyStoreUnavailable):
            face.do(resolver, method, *arguments)


def test_limits_hold_in_this_process(resolver, store, face, clock) -> None:
    key = face.do(resolver, "generate", rpm_limit=2, max_parallel_requests=1, max_budget=1, spend=0.5)["key"]
    record = face.do(resolver, "resolve", key)
    store.down = True
    for _ in range(2):
        face.do(resolver, "admit", record)
    with pytest.raises(KeyLimitError) as caught:
        face.do(resolver, "admit", record)
    assert caught.value.retry_after == 60
    allowance = face.do(resolver, "begin", record)
    with pytest.raises(KeyLimitError):
        face.do(resolver, "begin", record)
    face.do(allowance, "end", cost=0.5)
    with pytest.raises(BudgetExceededError):
        face.do(resolver, "begin", record)


def wait_until_asked_again(resolver: KeyResolver) -> None:
    """As if the time had passed after which a store that failed is asked again."""
    resolver._asker._breaker._retry_at = 0.0 if resolver._asker._breaker.state != "closed" else None


def test_what_was_spent_meanwhile_is_told_later(resolver, store, face) -> None:
    key = face.do(resolver, "generate", max_budget=10)["key"]
    other = face.do(resolver, "generate")["key"]
    record, unlimited = face.do(resolver, "resolve", key), face.do(resolver, "resolve", other)
    begun_before = face.do(resolver, "begin", record)
    store.down = True
    face.do(begun_before, "end", cost=0.5)
    for _ in range(5):
        face.do(face.do(resolver, "begin", record), "end", cost=0.25)
        face.do(face.do(resolver, "begin", unlimited), "end", cost=0.125)
    store.down = False
    wait_until_asked_again(resolver)
    face.do(face.do(resolver, "begin", record), "end", cost=0.25)
    assert face.do(resolver, "info", key)["info"]["spend"] == 2.0
    assert face.do(resolver, "info", other)["info"]["spend"] == 0.625
    assert resolver._counting._owed == {}
    assert store._calls[record.id] == {}


def test_closing_tells_it(resolver, store, face) -> None:
    key = face.do(resolver, "generate")["key"]
    record = face.do(resolver, "resolve", key)
    store.down = True
    face.do(face.do(resolver, "begin", record), "end", cost=0.5)
    store.down = False
    face.do(resolver, "close")
    assert face.do(resolver, "info", key)["info"]["spend"] == 0.5


def test_an_answer_that_is_lost_holds_no_place(resolver, store, face, monkeypatch) -> None:
    """The store has counted the call, but nobody heard of it."""
    key = face.do(resolver, "generate", max_parallel_requests=1)["key"]
    record = face.do(resolver, "resolve", key)
    count = store.count

    def lost(*args: object) -> None:
        count(*args)
        raise StoreError("the answer is lost")

    monkeypatch.setattr(store, "count", lost)
    allowance = face.do(resolver, "begin", record)
    monkeypatch.undo()
    face.do(allowance, "end")
    assert store._calls[record.id] == {}
    face.do(face.do(resolver, "begin", record), "end")


def test_each_outage_is_counted_anew(resolver, store, face) -> None:
    key = face.do(resolver, "generate", rpm_limit=2)["key"]
    record = face.do(resolver, "resolve", key)
    for _ in range(2):
        store.down = True
        for _ in range(2):
            face.do(resolver, "admit", record)
        with pytest.raises(KeyLimitError):
            face.do(resolver, "admit", record)
        store.down = False
        wait_until_asked_again(resolver)
        with contextlib.suppress(KeyLimitError):
            face.do(resolver, "admit", record)


def test_two_resolvers_of_one_redis_store(redis_of_all, face, when) -> None:
    store = make_store(
        {"type": "redis", "port": redis_of_all.port, "namespace": f"two-{face.name}"}, time.time
    )
    first, second = KeyResolver(store), KeyResolver(store)
    key = face.do(first, "generate")["key"]
    for resolver in (first, second):
        face.do(resolver, "resolve", key)
    when(lambda: store.live)
    for resolver in (first, second):
        face.do(resolver, "resolve", key)
    other = make_store(
        {"type": "redis", "port": redis_of_all.port, "namespace": f"two-{face.name}"}, time.time
    )
    other.remove([id_of(key)])
    when(lambda: first.known(key) is None and second.known(key) is None)
    other.close()
    face.do(first, "close")


@pytest.fixture
def proxied(redis_of_all: RedisServer) -> Iterator[FaultProxy]:
    with FaultProxy(redis_of_all.port) as proxy:
        yield proxy


@pytest.mark.parametrize("fault", ["refuse", "blackhole"])
def test_a_redis_that_fails(fault, proxied, redis_of_all, face, when) -> None:
    setting = {
        "type": "redis",
        "port": proxied.port,
        "namespace": f"outage-{fault}-{face.name}",
        "timeout": 0.5,
    }
    resolver = KeyResolver(setting)
    key = face.do(resolver, "generate", rpm_limit=1000, max_budget=10)["key"]
    record = face.do(resolver, "resolve", key)
    when(lambda: resolver._asker.store.live)  # nobody is just connecting
    if fault == "refuse":
        proxied.refuse()
    else:
        proxied.blackhole = True
    for _ in range(20):
        assert face.do(resolver, "resolve", key).id == record.id
        face.do(resolver, "admit", record)
        face.do(face.do(resolver, "begin", record), "end", cost=0.125)
        with pytest.raises(KeyStoreUnavailable):
            face.do(resolver, "resolve", "sk-somebody-0123456789")
    if fault == "refuse":
        proxied.accept()
    proxied.heal()

    def told() -> bool:
        face.do(face.do(resolver, "begin", record), "end", cost=0.0)
        try:
            return face.do(resolver, "info", key)["info"]["spend"] == 2.5
        except KeyStoreUnavailable:
            return False

    when(told)
    with pytest.raises(InvalidKeyError):
        face.do(resolver, "resolve", "sk-somebody-0123456789")
    face.do(resolver, "close")


def test_changes_that_were_missed_are_not_believed(proxied, redis_of_all, face, when, clock) -> None:
    """R71: who was cut off asks again as soon as it hears again."""
    namespace = f"missed-{face.name}"
    deaf = KeyResolver(
        {"type": "redis", "port": proxied.port, "namespace": namespace, "timeout": 0.5}, clock=clock
    )
    other = KeyResolver({"type": "redis", "port": redis_of_all.port, "namespace": namespace})
    key = face.do(other, "generate")["key"]
    face.do(deaf, "resolve", key)
    when(lambda: deaf._asker.store.live)
    clock.advance(1)
    face.do(deaf, "resolve", key)
    clock.advance(10)
    assert deaf.known(key) is not None  # who hears of changes believes for the whole time
    proxied.refuse()
    when(lambda: not deaf._asker.store.live)
    face.do(other, "delete", key)
    assert deaf.known(key) is None  # nobody would tell
    assert face.do(deaf, "resolve", key) is not None  # and it cannot ask
    assert deaf.known(key) is not None
    proxied.accept()

    def refused() -> bool:
        try:
            face.do(deaf, "resolve", key)
        except InvalidKeyError:
            return True
        return False

    when(refused)
    for resolver in (deaf, other):
        face.do(resolver, "close")


def test_a_postgres_that_hangs_up(postgres_of_all, face) -> None:
    resolver = KeyResolver({"type": "sql", "url": postgres_of_all.url})
    key = face.do(resolver, "generate")["key"]
    postgres_of_all.ask(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'"
    )
    assert face.do(resolver, "resolve", key).stored is True
    face.do(resolver, "close")


def test_a_database_that_is_not_there(face) -> None:
    resolver = KeyResolver({"type": "sql", "url": "postgresql://u:geheim@127.0.0.1:1/db", "timeout": 1})
    with pytest.raises(KeyStoreUnavailable) as caught:
        face.do(resolver, "resolve", "sk-somebody-0123456789")
    cause: BaseException | None = caught.value
    while cause is not None:
        assert "geheim" not in str(cause)
        cause = cause.__cause__


def test_a_file_that_cannot_be_opened(face, tmp_path) -> None:
    (tmp_path / "keys.db").mkdir()
    resolver = KeyResolver(f"sqlite:///{tmp_path}/keys.db")
    with pytest.raises(KeyStoreUnavailable):
        face.do(resolver, "resolve", "sk-somebody-0123456789")
