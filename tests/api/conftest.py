"""Fixtures of the sub-app's tests: clients on both fronts, an upstream, and a cache of each type."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_middleware import CacheManager
from llm_middleware.testing import FakeUpstream
from tests import s3_services
from tests.api.clients import AsgiClient, Client, WsgiClient, config
from tests.services import HOST, RedisServer, redis_server

moto = s3_services.moto  # a fixture

STORES = ["local", "disk", "redis", "s3"]


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def shared_redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def redis(shared_redis: RedisServer) -> RedisServer:
    shared_redis.ask("FLUSHALL")
    return shared_redis


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of this machine's is a setting."""
    s3_services.without_aws(monkeypatch)


Front = Callable[..., Client]


@pytest.fixture(params=["asgi", "wsgi"])
def front(request: pytest.FixtureRequest, upstream: FakeUpstream) -> Iterator[Front]:
    """``front(**options)``: a client of a sub-app; ``sections``: of its configuration, see `config`."""
    made: list[Client] = []

    def make(sections: dict[str, object] | None = None, **options: Any) -> Client:
        kind = AsgiClient if request.param == "asgi" else WsgiClient
        made.append(kind(config(upstream.url, **(sections or {})), **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def cache_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., CacheManager]:
    """``cache_of(type, **changes)``: a cache; those of one type share one store and one namespace."""
    name = f"n{secrets.token_hex(6)}"
    buckets: set[str] = set()

    def settings(kind: str) -> dict[str, object]:
        if kind == "disk":
            return {"disk_cache_dir": str(tmp_path / "cache")}
        if kind == "redis":
            return {"host": HOST, "port": request.getfixturevalue("redis").port, "store_timeout": 10}
        if kind == "s3":
            moto = request.getfixturevalue("moto")
            if name not in buckets:
                moto.client().create_bucket(Bucket=name)
                buckets.add(name)
            return {**moto.settings(name), "store_timeout": 30}
        return {}

    def make(kind: str, **changes: object) -> CacheManager:
        return CacheManager(kind, **{"namespace": name, **settings(kind), **changes})

    return make


@pytest.fixture(params=STORES)
def cache(request: pytest.FixtureRequest, cache_of: Callable[..., CacheManager]) -> CacheManager:
    return cache_of(request.param)
