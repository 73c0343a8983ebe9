"""Redis servers that the tests of one file share; a file that needs another has one of the same name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services import (
    RedisCluster,
    RedisSentinels,
    RedisServer,
    redis_cluster,
    redis_sentinel,
    redis_server,
)


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    """One server, empty and as if nothing had been asked of it."""
    shared.ask("FLUSHALL")
    shared.ask("SCRIPT", "FLUSH")
    shared.ask("CONFIG", "RESETSTAT")
    return shared


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with redis_cluster() as made:
        yield made


@pytest.fixture(scope="module")
def sentinels() -> Iterator[RedisSentinels]:
    with redis_sentinel() as made:
        yield made
