"""A hit in Redis with no memory in front, beside a bare ``GET`` of the same answer; and what each operation
makes the server do."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import redis
from redis import asyncio as aredis

from llm_middleware import CacheManager
from tests.services import RedisServer, redis_server, wait_for

from .harness import Row, Samples, compare, in_process, show
from .network import answer, commands, counted, environment, on_one_core, settings
from .payloads import chat, http_request
from .redis_apps import FLOOR_KEY
from .repeat_hit import SCOPE
from .servers import GUNICORN, UVICORN, Server, serving

__all__ = ["results"]

# Bytes of an answer, and how it is called. One that is longer than ``compress_above`` is compressed.
_SIZES = ((1024, "1 KB"), (16384, "16 KB"))
_CLIENT = "`client.get(key)` of the same answer"
_APP = "the app that sends what `client.get(key)` returned"
_COUNTED = 50

Bodies = Sequence[bytes]


def results() -> list[Row]:
    rows = []
    with redis_server() as server:
        for size, name in _SIZES:
            for compress in ("zlib", None) if size > 4096 else ("zlib",):
                described = name if compress else f"{name}, `compress=None`"
                rows += _in_process(server, answer(size), described, compress)
        for size, name in _SIZES:
            rows += _served(server, size, name)
            server.ask("FLUSHALL")
        rows += _counts(server)
    return rows


def _never(body: object) -> object:
    raise AssertionError("a hit makes no call")


@contextmanager
def _manager(server: RedisServer, **changes: object) -> Iterator[CacheManager]:
    cache = CacheManager("redis", **{**settings(server), "memory_tier": False, **changes})
    try:
        yield cache
    finally:
        cache.close()


# --- in this process


def _in_process(server: RedisServer, kept: bytes, name: str, compress: str | None) -> list[Row]:
    body = json.dumps(chat(1536)).encode()
    with _manager(server, compress=compress) as cache, server.client() as client, asyncio.Runner() as runner:
        client.set(FLOOR_KEY, kept)
        assert cache.set(body, kept, scope=SCOPE)
        with on_one_core(server):
            samples = _compared(cache, client, server, runner, body, kept)
        runner.run(cache.aclose())
    return [
        samples.row(f"Redis hit, {name}: `fetch`", "fetch", "get", _CLIENT),
        samples.row(f"Redis hit, {name}: `afetch`", "afetch", "aget", f"{_CLIENT}, async"),
    ]


def _compared(
    cache: CacheManager,
    client: redis.Redis,
    server: RedisServer,
    runner: asyncio.Runner,
    body: bytes,
    kept: bytes,
) -> Samples:
    def fetch(bodies: Bodies) -> None:
        for raw in bodies:
            assert cache.fetch(raw, _never, scope=SCOPE).body == kept

    def get(bodies: Bodies) -> None:
        for _ in bodies:
            assert client.get(FLOOR_KEY) == kept

    async def afetch(bodies: Bodies) -> None:
        for raw in bodies:
            assert (await cache.afetch(raw, _never, scope=SCOPE)).body == kept

    async def aget(bodies: Bodies) -> None:
        for _ in bodies:
            assert await aclient.get(FLOOR_KEY) == kept

    def copies(count: int) -> Bodies:
        return [bytes(bytearray(body)) for _ in range(count)]

    aclient = aredis.Redis(port=server.port)
    try:
        return compare(
            {
                "get": in_process(copies, get),
                "fetch": in_process(copies, fetch),
                "aget": in_process(copies, lambda bodies: runner.run(aget(bodies))),
                "afetch": in_process(copies, lambda bodies: runner.run(afetch(bodies))),
            }
        )
    finally:
        runner.run(aclient.aclose())


# --- in a server


def _served(server: RedisServer, size: int, name: str) -> list[Row]:
    server.ask("SET", FLOOR_KEY, answer(size))
    with environment(BENCHMARK_REDIS_PORT=server.port, BENCHMARK_ANSWER=size):
        asgi = _requests(server, UVICORN, "asgi", 3000)
        wsgi = _requests(server, GUNICORN, "wsgi", 1500)
    return [
        asgi.row(f"ASGI Redis hit, {name}, uvicorn", "cached", "bare", _APP, 1.35),
        wsgi.row(f"WSGI Redis hit, {name}, gunicorn gthread", "cached", "bare", _APP, 1.35),
    ]


def _requests(server: RedisServer, command: str, face: str, count: int) -> Samples:
    request = http_request("/v1/chat/completions", json.dumps(chat(1536)).encode())
    apps = {name: f"benchmarks.redis_apps:{name}_{face}" for name in ("bare", "cached")}
    with serving(command, apps) as servers:
        _check(server, servers["cached"], request)
        return compare(
            {name: one.candidate(lambda count: [request] * count, count) for name, one in servers.items()}
        )


def _check(server: RedisServer, cached: Server, request: bytes) -> None:
    """That every request but the first is a hit, and one GET."""
    cached.send([request])
    cached.send([request] * 64)  # connects
    before = server.calls()["get"]
    assert cached.send([request] * _COUNTED).hits == _COUNTED
    if server.calls()["get"] - before != _COUNTED:
        raise RuntimeError(f"{server.calls()['get'] - before} GET for {_COUNTED} hits")


# --- what the server is asked


def _counts(server: RedisServer) -> list[Row]:
    numbers = itertools.count()

    def fresh() -> bytes:
        return json.dumps(chat(1536, user=f"user-{next(numbers)}")).encode()

    known, kept = fresh(), answer(1024)

    def hit(cache: CacheManager) -> None:
        assert cache.fetch(known, _never, scope=SCOPE).body == kept

    def write(cache: CacheManager) -> None:
        assert cache.set(fresh(), kept, scope=SCOPE)

    def miss(cache: CacheManager) -> None:
        assert cache.fetch(fresh(), lambda body: kept, scope=SCOPE).cache.status == "miss"
        released.append(None)
        wait_for(lambda: server.calls().get("evalsha") == first + len(released), "the lease is released")

    with _manager(server) as cache:
        assert cache.set(known, kept, scope=SCOPE)
        cache.fetch(fresh(), lambda body: kept, scope=SCOPE)  # the server learns the script
        wait_for(lambda: server.calls().get("evalsha") and _listening(server), "the process is connected")
        first, released = server.calls()["evalsha"], []  # type: int, list[None]
        hits, writes, misses = (
            commands(server, lambda call=call: [call(cache) for _ in range(_COUNTED)])  # type: ignore[misc]
            for call in (hit, write, miss)
        )
    return [
        counted("hit, `fetch`", hits, _COUNTED, 1),
        counted("write, `set`", writes, _COUNTED, 2),
        counted("miss, `fetch`, with the release of its lease", misses, _COUNTED),
    ]


def _listening(server: RedisServer) -> bool:
    channels = server.ask("PUBSUB", "CHANNELS")
    return bool(channels)


if __name__ == "__main__":
    show(results)
