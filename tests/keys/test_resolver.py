"""Who is calling: right keys and wrong ones, what is remembered and for how long, the host's own function."""

from __future__ import annotations

import asyncio
import hmac
import json
import threading

import pytest

from llm_middleware.errors import (
    BlockedKeyError,
    ExpiredKeyError,
    InvalidKeyError,
    KeyStoreUnavailable,
    LLMMiddlewareError,
    SuspendedInSyncError,
)
from llm_middleware.keys import lookup
from llm_middleware.keys.record import KeyRecord, id_of
from llm_middleware.keys.resolver import KeyResolver
from llm_middleware.stores.keys_memory import MemoryKeys

MASTER = "sk-master-0123456789"


class Counted:
    """A store that counts how often it is asked, in a place that is not this process's memory."""

    inline = False
    live = False

    def __init__(self, clock) -> None:
        self.store = MemoryKeys(clock=clock)
        self.asked: list[str] = []
        self.reading = lambda: None

    def get(self, key_id: str):
        self.asked.append("get")
        row = self.store.get(key_id)
        self.reading()
        return row

    def generation(self) -> int:
        self.asked.append("generation")
        return self.store.generation()

    def __getattr__(self, name: str):
        return getattr(self.store, name)


@pytest.mark.parametrize(
    "key",
    [
        "",
        None,
        5,
        b"sk-bytes",
        "sk-",
        "sk-short",
        "wrong",
        "sk-" + "x" * 40,
        "sk-" + "x" * 5000,
        "sk-\ud800" * 10,
        "sk-\x00" * 9,
    ],
)
def test_wrong_keys(key, place, face) -> None:
    """R68."""
    resolver = place.resolver(master_key=MASTER)
    with pytest.raises(InvalidKeyError) as caught:
        face.do(resolver, "resolve", key)
    assert resolver.known(key) is None
    error = json.loads(caught.value.body())["error"]
    assert (caught.value.status, error["code"]) == (401, "invalid_api_key")


def test_what_can_be_no_key_is_refused_without_a_store(face, clock) -> None:
    """R68."""
    store = Counted(clock)
    resolver = KeyResolver(store, clock=clock)
    for key in ("", "wrong", "sk-short", "sk-" + "x" * 5000):
        with pytest.raises(InvalidKeyError):
            face.do(resolver, "resolve", key)
    assert store.asked == []


def test_the_master_key(place, face) -> None:
    resolver = place.resolver(master_key=MASTER)
    for record in (resolver.known(MASTER), face.do(resolver, "resolve", MASTER)):
        assert record.admin is True
        assert record.may_use("anything")
        limits = (record.rpm_limit, record.tpm_limit, record.max_parallel_requests, record.max_budget)
        assert limits == (None, None, None, None)
    assert resolver.known(MASTER[:-1]) is None
    face.do(resolver, "admit", record, count=1000)
    face.do(face.do(resolver, "begin", record, 10**9), "end", cost=5.0)
    assert face.do(resolver, "list")["keys"] == []
    with pytest.raises(InvalidKeyError):
        face.do(place.resolver(), "resolve", MASTER)


def test_the_master_key_is_compared_in_constant_time(monkeypatch) -> None:
    """R68: digests, by `hmac.compare_digest`."""
    compared: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    resolver = KeyResolver(master_key=MASTER)
    monkeypatch.setattr(lookup, "hmac", type("Hmac", (), {"compare_digest": staticmethod(compare)}))
    assert resolver.known(MASTER).admin
    assert resolver.known("x") is None
    assert compared == [(32, 32), (32, 32)]


def test_the_master_key_comes_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("OUR_MASTER_KEY", MASTER)
    assert KeyResolver(master_key="os.environ/OUR_MASTER_KEY").known(MASTER).admin


def test_expiry(place, face) -> None:
    """R69."""
    resolver = place.resolver()
    key = face.do(resolver, "generate", duration="1s")["key"]
    assert face.do(resolver, "resolve", key).id == id_of(key)
    assert resolver.known(key) is not None
    place.clock.advance(0.999)
    assert face.do(resolver, "resolve", key).id == id_of(key)
    place.clock.advance(1.001)
    assert resolver.known(key) is None
    with pytest.raises(ExpiredKeyError) as caught:
        face.do(resolver, "resolve", key)
    error = json.loads(caught.value.body())["error"]
    assert (caught.value.status, error["code"]) == (401, "expired_key")
    face.do(resolver, "update", key, duration="1h")
    assert face.do(resolver, "resolve", key).id == id_of(key)


def test_known_asks_nobody(face, clock) -> None:
    store = Counted(clock)
    resolver = KeyResolver(store, clock=clock)
    key = face.do(resolver, "generate")["key"]
    store.asked.clear()
    assert resolver.known(key) is None
    assert store.asked == []
    face.do(resolver, "resolve", key)
    assert store.asked == ["generation", "get"]
    for _ in range(5):
        assert resolver.known(key).id == id_of(key)
        assert face.do(resolver, "resolve", key).id == id_of(key)
    assert store.asked == ["generation", "get"]


def test_what_is_known_is_looked_at_again(face, clock) -> None:
    """Whether anything changed: twice a second at most; the record itself: after ``ttl``."""
    store = Counted(clock)
    resolver = KeyResolver(store, clock=clock, ttl=60)
    key = face.do(resolver, "generate")["key"]
    face.do(resolver, "resolve", key)
    store.asked.clear()
    clock.advance(0.6)
    assert resolver.known(key) is None
    face.do(resolver, "resolve", key)
    assert resolver.known(key) is not None
    assert store.asked == ["generation"]
    clock.advance(60)
    face.do(resolver, "resolve", key)
    assert store.asked == ["generation", "generation", "get"]


def test_a_clock_that_is_set_back(face, clock) -> None:
    store = Counted(clock)
    resolver = KeyResolver(store, clock=clock, ttl=60)
    key = face.do(resolver, "generate")["key"]
    face.do(resolver, "resolve", key)
    clock.advance(-10_000)
    store.asked.clear()
    face.do(resolver, "resolve", key)
    assert store.asked == ["generation", "get"]


def test_wrong_keys_are_remembered_too(face, clock) -> None:
    store = Counted(clock)
    resolver = KeyResolver(store, clock=clock, negative_ttl=5)
    own = "sk-chosen-0123456789-0123"
    for _ in range(3):
        with pytest.raises(InvalidKeyError):
            face.do(resolver, "resolve", own)
    assert store.asked.count("get") == 1
    clock.advance(5.1)
    with pytest.raises(InvalidKeyError):
        face.do(resolver, "resolve", own)
    assert store.asked.count("get") == 2
    face.do(resolver, "generate", key=own)
    assert face.do(resolver, "resolve", own).id == id_of(own)


def test_what_changed_while_it_was_read_is_not_kept(clock) -> None:
    store = Counted(clock)
    resolver = KeyResolver(store, clock=clock)
    key = resolver.generate()["key"]
    store.reading = lambda: (setattr(store, "reading", lambda: None), resolver.block(key))
    assert resolver.resolve(key).blocked is False  # it was not, when it was asked
    with pytest.raises(BlockedKeyError):
        resolver.resolve(key)


def test_another_resolver_of_the_store_hears_of_changes(place, face, when) -> None:
    """R71, in one process."""
    ours, other = place.resolver(), place.resolver()
    key = face.do(ours, "generate", rpm_limit=1)["key"]
    assert face.do(other, "resolve", key).rpm_limit == 1
    if place.kind == "redis":
        when(lambda: other._asker.store.live)
        place.clock.advance(1)
        assert face.do(other, "resolve", key).rpm_limit == 1
    assert other.known(key) is not None
    face.do(ours, "update", key, rpm_limit=2)
    if place.kind == "redis":
        when(lambda: other.known(key) is None)  # it is told
    else:
        place.clock.advance(0.6)  # it looks
    assert face.do(other, "resolve", key).rpm_limit == 2
    face.do(ours, "delete", key)
    if place.kind == "redis":
        when(lambda: other.known(key) is None)
    else:
        place.clock.advance(0.6)
    with pytest.raises(InvalidKeyError):
        face.do(other, "resolve", key)


def test_a_redis_that_tells_nothing_is_asked_twice_a_second(redis_of_all, face, clock) -> None:
    """Until this process hears of changes, half a second is all that is believed."""
    resolver = KeyResolver({"type": "redis", "port": redis_of_all.port, "namespace": "deaf"}, clock=clock)
    resolver._asker.store.listen = lambda: None
    key = face.do(resolver, "generate")["key"]
    face.do(resolver, "resolve", key)
    assert resolver.known(key) is not None
    clock.advance(0.6)
    assert resolver.known(key) is None
    face.do(resolver, "close")


def test_the_hosts_own_function(face, clock) -> None:
    asked: list[str] = []

    def look_up(key: str) -> KeyRecord | None:
        asked.append(key)
        if key == "host-key":
            return KeyRecord(id="user-7", user="7", models=("gpt",), rpm_limit=1, max_budget=1.0, spend=0.9)
        return None

    async def alook_up(key: str) -> KeyRecord | None:
        await asyncio.sleep(0)
        return look_up(key)

    resolver = KeyResolver(resolve=look_up if face.name == "sync" else alook_up, clock=clock, ttl=30)
    assert resolver.known("host-key") is None
    record = face.do(resolver, "resolve", "host-key")
    assert (record.id, record.stored) == ("user-7", False)
    assert resolver.known("host-key") is record
    face.do(resolver, "resolve", "host-key")
    assert asked == ["host-key"]
    for _ in range(2):
        with pytest.raises(InvalidKeyError):
            face.do(resolver, "resolve", "other")
    assert asked == ["host-key", "other"]
    clock.advance(31)
    face.do(resolver, "resolve", "host-key")
    assert asked == ["host-key", "other", "host-key"]
    # Its limits hold as well.
    face.do(resolver, "admit", record)
    with pytest.raises(LLMMiddlewareError) as caught:
        face.do(resolver, "admit", record)
    assert caught.value.status == 429
    allowance = face.do(resolver, "begin", record, 5)
    face.do(allowance, "end", cost=0.2)
    with pytest.raises(LLMMiddlewareError) as caught:
        face.do(resolver, "begin", record, 5)
    assert caught.value.code == "insufficient_quota"
    # Keys that were made here go on working beside it.
    key = face.do(resolver, "generate")["key"]
    assert face.do(resolver, "resolve", key).stored is True


def test_a_function_that_fails(face, clock) -> None:
    answers: list[object] = [KeyRecord(id="a"), OSError("down"), OSError("down"), "no record"]

    def look_up(key: str) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    resolver = KeyResolver(resolve=look_up, clock=clock, ttl=10)
    assert face.do(resolver, "resolve", "one").id == "a"
    clock.advance(11)
    assert face.do(resolver, "resolve", "one").id == "a"  # within the grace
    with pytest.raises(KeyStoreUnavailable) as caught:
        face.do(resolver, "resolve", "two")
    assert (caught.value.status, caught.value.code) == (503, "key_store_unavailable")
    with pytest.raises(TypeError, match="returned str"):
        face.do(resolver, "resolve", "two")


def test_an_async_function_on_the_sync_face() -> None:
    async def look_up(key: str) -> None:
        await asyncio.sleep(0)

    with pytest.raises(SuspendedInSyncError):
        KeyResolver(resolve=look_up).resolve("sk-0123456789")


def test_threads_and_loops_share_a_resolver(place) -> None:
    resolver = place.resolver()
    keys = [resolver.generate()["key"] for _ in range(20)]
    found: list[str] = []

    def work() -> None:
        found.extend(resolver.resolve(key).id for key in keys)

    async def awork() -> None:
        found.extend([(await resolver.aresolve(key)).id for key in keys])

    threads = [threading.Thread(target=target) for target in [work, lambda: asyncio.run(awork())] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted([id_of(key) for key in keys] * 6)


def test_what_is_remembered_is_bounded(clock, monkeypatch) -> None:
    from llm_middleware.keys import recent

    monkeypatch.setattr(recent, "_MOST", 10)
    monkeypatch.setattr(recent, "_MOST_WRONG", 10)
    resolver = KeyResolver(Counted(clock), clock=clock)
    keys = [resolver.generate()["key"] for _ in range(30)]
    for key in keys:
        resolver.resolve(key)
        with pytest.raises(InvalidKeyError):
            resolver.resolve(key + "x")
    assert len(resolver._lookup.recent._entries) == 10
    assert len(resolver._lookup.recent._wrong) == 10
    assert resolver.known(keys[-1]) is not None
