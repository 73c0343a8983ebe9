"""`CacheManager` with a store on the network: real Redis, both faces, and what its failures cost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llm_middleware import CacheManager, ConfigError
from tests.services import RedisServer, redis_server
from tests.support import completion

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
def manager(server: RedisServer, face) -> Iterator:
    made: list[CacheManager] = []

    def make(**settings: object) -> CacheManager:
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


def test_c61_c64_a_redis_that_dies_and_comes_back(face, when) -> None:
    with redis_server() as running:
        cache = CacheManager("redis", host="127.0.0.1", port=running.port, memory_tier=False)
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
