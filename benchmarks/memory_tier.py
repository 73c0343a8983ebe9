"""A hit in the memory in front of a Redis, beside one of a cache that has nothing but memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from llm_middleware import CacheManager
from tests.services import RedisServer, redis_server, wait_for

from .harness import Row, Samples, compare, in_process, show
from .network import commands, counted, environment, settings
from .payloads import ANSWER, chat, http_request
from .repeat_hit import SCOPE, filled, look_up
from .servers import UVICORN, serving

__all__ = ["results"]

_FLOOR = "the same of a cache with nothing but memory"
_COUNTED = 1000

Bodies = Sequence[bytes]


def results() -> list[Row]:
    with redis_server() as server:
        return [*_in_process(server), *_served(server)]


def _never(body: object) -> object:
    raise AssertionError("a hit makes no call")


def _heard(server: RedisServer) -> bool:
    """Whether a process listens: before that, memory keeps an entry for a second only."""
    return bool(server.ask("PUBSUB", "CHANNELS"))


def _in_process(server: RedisServer) -> list[Row]:
    body = json.dumps(chat(2048)).encode()
    local = filled(body)
    with asyncio.Runner() as runner:
        # Measured for longer than the minute for which memory keeps what others may change.
        tiered = CacheManager("redis", **settings(server), default_in_memory_ttl=3600)
        tiered.get(body, scope=SCOPE)
        wait_for(lambda: _heard(server), "this process hears what others change")
        assert tiered.set(body, ANSWER, scope=SCOPE)
        samples, spent = _compared(local, tiered, server, runner, body)
        runner.run(tiered.aclose())
        tiered.close()
    path = "hit in the memory before Redis, 2 KB"
    return [
        samples.row(f"{path}: look-up", "look up", "local look up", _FLOOR, 1.1),
        samples.row(f"{path}: `fetch`", "fetch", "local fetch", _FLOOR, 1.1),
        samples.row(f"{path}: `afetch`", "afetch", "local afetch", _FLOOR, 1.1),
        counted(path, spent, _COUNTED, 0),
    ]


def _compared(
    local: CacheManager, tiered: CacheManager, server: RedisServer, runner: asyncio.Runner, body: bytes
) -> tuple[Samples, dict[str, int]]:
    def copies(count: int) -> Bodies:
        return [bytes(bytearray(body)) for _ in range(count)]

    def fetch(cache: CacheManager, bodies: Bodies) -> None:
        for raw in bodies:
            assert cache.fetch(raw, _never, scope=SCOPE).body == ANSWER

    async def afetch(cache: CacheManager, bodies: Bodies) -> None:
        for raw in bodies:
            assert (await cache.afetch(raw, _never, scope=SCOPE)).body == ANSWER

    def candidates(cache: CacheManager, prefix: str) -> dict[str, object]:
        return {
            f"{prefix}look up": in_process(copies, look_up(cache)),
            f"{prefix}fetch": in_process(copies, lambda bodies: fetch(cache, bodies)),
            f"{prefix}afetch": in_process(
                copies, lambda bodies: runner.run(afetch(cache, bodies)), batch=1000
            ),
        }

    samples = compare({**candidates(local, "local "), **candidates(tiered, "")})  # type: ignore[arg-type]
    spent = commands(server, lambda: fetch(tiered, copies(_COUNTED)))
    return samples, dict(spent)


def _served(server: RedisServer) -> list[Row]:
    request = http_request("/v1/chat/completions", json.dumps(chat(1536)).encode())
    apps = {"local": "benchmarks.redis_apps:local_asgi", "tiered": "benchmarks.redis_apps:cached_asgi"}
    variables = {"BENCHMARK_REDIS_PORT": server.port, "BENCHMARK_ANSWER": len(ANSWER)}
    with environment(**variables, BENCHMARK_MEMORY_TIER=1), serving(UVICORN, apps) as servers:
        servers["local"].send([request])

        def in_memory() -> bool:
            servers["tiered"].send([request])
            return _heard(server) and not commands(server, lambda: servers["tiered"].send([request] * 8))

        wait_for(in_memory, "hits come from memory")
        spent = commands(server, lambda: servers["tiered"].send([request] * _COUNTED))
        samples = compare(
            {name: one.candidate(lambda count: [request] * count, 12000) for name, one in servers.items()}
        )
    path = "ASGI hit in the memory before Redis, 1.5 KB, uvicorn"
    return [samples.row(path, "tiered", "local", _FLOOR, 1.1), counted(path, spent, _COUNTED, 0)]


if __name__ == "__main__":
    show(results)
