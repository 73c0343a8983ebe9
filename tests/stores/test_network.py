"""`CacheManager` with a store on the network: real Redis, both faces, and what its failures cost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llm_middleware import CacheManager, ConfigError
from tests.services import RedisServer, redis_server
from tests.support import chat_stream, completion

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
def manager(server: RedisServer, face) -> Iterator:
    made: list[CacheManager] = []

    def make(**settings: object) -> CacheManager:
        # A busy machine may take longer than the default budget, which is not what is tested here.
        settings = {"store_timeout": 10, **settings}
        made.append(CacheManager("redis", host="127.0.0.1", port=server.port, **settings))
        return made[-1]

    yield make
    for cache in made:
        face.do(cache, "close")
        cache.close()


def test_c38_another_process_gets_the_rest_of_its_life_and_no_more(manager, face, clock) -> None:
    """Two managers stand for two processes; memory in front never outlives the entry."""
    writer = manager(namespace=f"c38-{face.name}", clock=clock, ttl=2, ttl_jitter=0)
    reader = manager(namespace=f"c38-{face.name}", clock=clock)
    face.fetch(writer, BODY, lambda body: completion("first"))
    clock.advance(1)
    tiers = [face.fetch(reader, BODY, lambda body: completion("x")).cache.tier for _ in range(2)]
    assert tiers == ["redis", "memory"]
    clock.advance(1.5)
    assert face.get(reader, BODY) is None


def test_c126_the_ttl_in_redis_has_two_names(manager, face, server: RedisServer) -> None:
    for name in ("default_in_redis_ttl", "default_redis_ttl"):
        cache = manager(namespace=f"{name}-{face.name}", ttl_jitter=0, ttl=5, **{name: 1000})
        key = face.set(cache, BODY, completion())
        assert 990 < server.ask("TTL", f"{cache.settings.namespace}:{key}") <= 1000


def test_c60_flush_removes_this_namespace_and_nothing_else(manager, face, server: RedisServer) -> None:
    server.ask("SET", "somebody else's", "value")
    mine, other = manager(namespace=f"mine-{face.name}"), manager(namespace=f"mine-{face.name}:2")
    for cache in (mine, other):
        face.set(cache, BODY, completion())
    assert face.do(mine, "flush") == 1
    assert face.get(mine, BODY) is None
    assert face.get(other, BODY).json() == completion()
    assert server.ask("GET", "somebody else's") in (b"value", "value")


def test_c33_c114_c115_ping_and_delete(manager, face) -> None:
    cache = manager(namespace=f"ping-{face.name}")
    answer = face.do(cache, "ping")
    assert (answer["status"], answer["tier"]) == ("healthy", "redis")
    assert answer["server_version"].count(".") == 2
    assert answer["connection"]["topology"] == "standalone"
    key = face.set(cache, BODY, completion())
    assert face.do(cache, "delete", key, "0" * 64) == 1
    assert face.do(cache, "delete", "0" * 64) == 0


def test_entries_lie_compressed_and_encrypted(manager, face, server: RedisServer) -> None:
    keys = {"compress_above": 0, "encryption_key": bytes(range(32))}
    cache = manager(namespace=f"sealed-{face.name}", memory_tier=False, **keys)
    key = face.set(cache, BODY, completion("secret " * 500))
    stored = server.ask("GET", f"{cache.settings.namespace}:{key}")
    stored = stored if isinstance(stored, bytes) else str(stored).encode()
    assert len(stored) < 700
    assert b"secret" not in stored
    assert face.get(cache, BODY).json() == completion("secret " * 500)
    # Without the key the entry is a miss, counted, and removed.
    stranger = manager(namespace=f"sealed-{face.name}", memory_tier=False)
    assert face.get(stranger, BODY) is None
    assert stranger.stats()["store-error"] == 1


def test_a_scope_without_its_key_is_unreadable_and_others_are_not(manager, face) -> None:
    namespace = f"scopes-{face.name}"
    keys = {"alice": bytes(32), "bob": bytes([1]) * 32}
    writer = manager(namespace=namespace, encryption_key=keys)
    for scope in keys:
        assert face.set(writer, BODY, completion(scope), scope=scope) is not None
    # Whoever has no key has no entry.
    assert face.set(writer, BODY, completion("eve"), scope="eve") is None
    reader = manager(namespace=namespace, encryption_key={"bob": keys["bob"]})
    assert face.get(reader, BODY, scope="alice") is None
    assert face.get(reader, BODY, scope="bob").json() == completion("bob")


def test_c65_c76_writes_in_batches_through_the_manager(manager, face, server: RedisServer, when) -> None:
    namespace = f"c65-{face.name}"
    writer = manager(
        namespace=namespace, redis_flush_size=10, redis_flush_interval=3600, memory_tier=False, ttl_jitter=0
    )
    reader = manager(namespace=namespace, memory_tier=False)
    before = server.calls().get("set", 0)
    bodies = [{**BODY, "seed": number} for number in range(25)]
    for number, body in enumerate(bodies):
        face.set(writer, body, completion(str(number)), controls={"ttl": 1000 + number})
        assert face.get(writer, body).json() == completion(str(number))
    when(lambda: server.calls().get("set", 0) - before > 25 - 10)
    face.do(writer, "close")
    writer.close()
    assert server.calls()["set"] - before == 25
    for number, body in enumerate(bodies):
        assert face.get(reader, body).json() == completion(str(number))
    lives = {round(server.ask("PTTL", key) / 1e3) for key in server.ask("KEYS", f"{namespace}:*")}
    assert max(lives) <= 1024
    assert min(lives) >= 1000 - 30


def test_c59_what_another_process_removes_is_not_written_afterwards(manager, face, when) -> None:
    namespace = f"heed-{face.name}"
    writer = manager(namespace=namespace, redis_flush_size=1000, redis_flush_interval=3600)
    other = manager(namespace=namespace)
    assert face.get(writer, BODY) is None  # from now on it listens
    when(lambda: writer._flow.tiers.peers.live)
    key = face.set(writer, BODY, completion())
    other.delete(key)
    when(lambda: face.get(writer, BODY) is None)
    face.do(writer, "close")
    writer.close()
    assert face.get(other, BODY) is None


def test_a_callers_recent_answers_come_in_one_round_trip(manager, face, server: RedisServer) -> None:
    namespace = f"recent-{face.name}"
    writer = manager(namespace=namespace, batch_redis_requests=True)
    bodies = [{**BODY, "seed": number} for number in range(30)]
    for number, body in enumerate(bodies):
        face.set(writer, body, completion(str(number)), scope="alice")
    face.set(writer, BODY, completion("bob's"), scope="bob")
    reader = manager(namespace=namespace, batch_redis_requests=True)
    assert face.get(reader, bodies[0], scope="alice").json() == completion("0")
    before = server.calls()
    for number, body in enumerate(bodies):
        answer = face.get(reader, body, scope="alice")
        assert (answer.json(), answer.cache.tier) == (completion(str(number)), "memory")
    after = server.calls()
    assert after["get"] == before["get"]
    assert reader.stats()["entries"] == 30


def test_an_entry_that_was_removed_during_the_call_does_not_come_back_with_the_other_form(
    manager, face, when
) -> None:
    cache = manager(namespace=f"beside-{face.name}")
    other = manager(namespace=f"beside-{face.name}")
    stream = {**BODY, "stream": True}
    # This stream cannot be turned into a plain answer, which therefore is to join it.
    assert face.chunks(face.fetch(cache, stream, lambda body: iter(chat_stream("old")))) == chat_stream("old")

    def call(body: object) -> dict:
        other.flush()
        when(lambda: cache.stats()["entries"] == 0)
        return completion("new")

    assert face.fetch(cache, BODY, call).cache.status == "miss"
    assert b"old" not in b"".join(face.chunks(face.get(cache, stream)))


def test_c62_a_hung_redis_is_waited_for_once_in_a_request(face) -> None:
    with redis_server() as running:
        cache = CacheManager("redis", host="127.0.0.1", port=running.port, store_timeout=0.05)
        running.pause()
        answer = face.fetch(cache, BODY, lambda body: completion("a"))
        assert (answer.json(), answer.cache.detail) == (completion("a"), "backend-down")
        assert cache.stats()["store-error"] == 1
        # What this process made it answers from memory meanwhile.
        assert face.fetch(cache, BODY, lambda body: completion("b")).json() == completion("a")
        running.resume()
        face.do(cache, "close")
        cache.close()


def test_c61_c64_a_redis_that_dies_and_comes_back(face, when) -> None:
    with redis_server() as running:
        cache = CacheManager(
            "redis", host="127.0.0.1", port=running.port, memory_tier=False, store_timeout=10
        )
        port = running.port
        assert face.fetch(cache, BODY, lambda body: completion()).cache.stored is True
    for _ in range(5):
        answer = face.fetch(cache, BODY, lambda body: completion())
        assert (answer.cache.status, answer.cache.stored, answer.cache.detail) == (
            "miss",
            False,
            "backend-down",
        )
    assert cache.stats()["store-error"] == 3  # then its breaker is open, and it is not asked
    with redis_server(port=port):
        when(lambda: face.fetch(cache, BODY, lambda body: completion()).cache.stored)
        assert face.fetch(cache, BODY, lambda body: completion()).cache.status == "hit"
        face.do(cache, "close")
        cache.close()


@pytest.mark.parametrize("kind", ["redis", "s3"])
def test_c122_unknown_settings_of_a_connection_name_the_nearest(kind: str) -> None:
    wrong, near = {"redis": ("hots", "host"), "s3": ("s3_bucket_nam", "s3_bucket_name")}[kind]
    with pytest.raises(ConfigError, match=f"'{near}'"):
        CacheManager(kind, **{wrong: "x"})
