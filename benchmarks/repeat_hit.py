"""A request that came before, byte for byte, answered from memory in this process."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence

from llm_middleware import CacheManager

from .harness import Row, compare, in_process, show
from .payloads import ANSWER, chat

__all__ = ["FLOOR", "filled", "floor_of", "look_up", "results"]

FLOOR = "json.loads + sorted json.dumps + SHA-256 + dict"
SCOPE = "caller:0123456789abcdef"

Bodies = Sequence[bytes]


def floor_of(body: bytes) -> Callable[[Bodies], None]:
    """What a cache must do that has no memo: parse, write in order, digest, look up."""

    def key(raw: bytes) -> str:
        return hashlib.sha256(json.dumps(json.loads(raw), sort_keys=True).encode()).hexdigest()

    table = {key(body): ANSWER}

    def run(bodies: Bodies) -> None:
        for raw in bodies:
            assert table.get(key(raw)) is ANSWER

    return run


def filled(body: bytes, **settings: object) -> CacheManager:
    """A cache that knows the answer to ``body``."""
    cache = CacheManager(**settings)  # type: ignore[arg-type]
    assert cache.set(body, ANSWER, scope=SCOPE)
    return cache


def look_up(cache: CacheManager) -> Callable[[Bodies], None]:
    """The part of a hit that both middlewares and both faces share."""
    plan, now = cache.planner.quick, cache._flow.now

    def run(bodies: Bodies) -> None:
        for raw in bodies:
            found = now(plan("chat", "", raw, SCOPE, ""))
            assert found is not None
            assert found.body is ANSWER

    return run


def _never(body: object) -> object:
    raise AssertionError("a hit makes no call")


def results() -> list[Row]:
    body = json.dumps(chat(2048)).encode()
    cache = filled(body)

    def copies(count: int) -> Bodies:
        return [bytes(bytearray(body)) for _ in range(count)]

    def fetch(bodies: Bodies) -> None:
        for raw in bodies:
            assert cache.fetch(raw, _never, scope=SCOPE).body is ANSWER

    async def afetch(bodies: Bodies) -> None:
        for raw in bodies:
            assert (await cache.afetch(raw, _never, scope=SCOPE)).body is ANSWER

    with asyncio.Runner() as runner:
        samples = compare(
            {
                "floor": in_process(copies, floor_of(body)),
                "look up": in_process(copies, look_up(cache)),
                "fetch": in_process(copies, fetch),
                "afetch": in_process(copies, lambda bodies: runner.run(afetch(bodies)), batch=1000),
            }
        )
    path = "memory hit, same bytes, 2 KB"
    return [
        samples.row(f"{path}: look-up", "look up", "floor", FLOOR, 0.15),
        samples.row(f"{path}: `fetch`", "fetch", "floor", FLOOR),
        samples.row(f"{path}: `afetch`", "afetch", "floor", FLOOR),
    ]


if __name__ == "__main__":
    show(results)
