"""A whole call of a Router, beside the same call made by hand with the fastest client there is.

CPU time of one chat call: 1 kB of prompt, 1 kB of answer, and the answer's text read. By hand is aiohttp for
event loops and our own client for threads; the request's body is there already, and the answer goes through
``json.loads``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager

from llm_middleware._drive import run_sync
from llm_middleware._ports.http_settings import HTTPSettings
from llm_middleware._ports.http_sync import SyncTransport
from llm_middleware.providers.messages import Outgoing, Timeouts
from llm_middleware.routing.limits import Limits, SharedLimits
from llm_middleware.routing.router import Router
from llm_middleware.routing.state import RouterState
from llm_middleware.stores.redis_connect import RedisConnection
from llm_middleware.stores.redis_limits import RedisLimits
from tests.services import RedisServer, redis_server

from .harness import Row, compare, show
from .network import commands, counted, settings
from .upstream import (
    CONTENT,
    HEADERS,
    KEY,
    PROMPT,
    REQUEST,
    TASKS,
    THREADS,
    Call,
    Close,
    Make,
    aiohttp_alone,
    async_sample,
    thread_sample,
    upstream,
)

__all__ = ["results"]

_GOAL = 1.5
_CALLS, _SYNC_CALLS = 1000, 2000  # in one sample
_MESSAGES = [{"role": "user", "content": PROMPT}]
_BY_HAND, _ROUTER, _LIMITED, _SHARED = "by hand", "router", "limited", "shared"
_ASYNC_FLOOR, _SYNC_FLOOR = "aiohttp and json.loads", "our client and json.loads"
_COUNTED, _COUNTS = 20, 11  # calls of one count, one after the other; counts
# What the script of a reservation calls: within its one round trip.
_IN_SCRIPT = ("time", "hget", "hmget", "hset", "hdel", "hincrby", "pexpire")


def results() -> list[Row]:
    rows: list[Row] = []
    with upstream() as port:
        for tasks in TASKS:
            rows += _async_rows(port, tasks)
        for threads in THREADS:
            rows += _sync_rows(port, threads)
        with redis_server() as server:
            rows += _shared_rows(port, server)
    return rows


def _router(port: int, deployments: int = 1, limits: Limits | None = None) -> Router:
    """One, or several with limits of their own that nobody reaches."""
    params = {"model": "openai/gpt-4o", "api_key": KEY, "api_base": f"http://127.0.0.1:{port}/v1"}
    own = {"rpm": 10**9, "tpm": 10**12} if deployments > 1 else {}
    entry = {"model_name": "gpt-4o", "litellm_params": params, **own}
    return Router([entry] * deployments, limits=limits)


# --- async


def _by_hand(port: int) -> tuple[Call, Close]:
    ask, close = aiohttp_alone(port)

    async def call() -> str:
        text: str = json.loads(await ask())["choices"][0]["message"]["content"]
        return text

    return call, close


def _routed(deployments: int = 1, limits: Limits | None = None) -> Make:
    def make(port: int) -> tuple[Call, Close]:
        router = _router(port, deployments, limits)

        async def call() -> str:
            answer = await router.acompletion("gpt-4o", _MESSAGES)
            text: str = answer.choices[0].message.content
            return text

        return call, router.aclose

    return make


@contextmanager
def _sampled(
    makes: dict[str, Make], port: int, tasks: int
) -> Iterator[tuple[asyncio.Runner, dict[str, Callable[[], float]]]]:
    """A loop, and samples of ``makes`` on it; their connections are closed at the end."""
    closing: list[Close] = []

    def kept(make: Make) -> Make:
        def making(port: int) -> tuple[Call, Close]:
            call, close = make(port)
            closing.append(close)
            return call, close

        return making

    with asyncio.Runner() as runner:
        yield (
            runner,
            {
                name: async_sample(runner, kept(make), port, tasks, len(CONTENT), _CALLS)
                for name, make in makes.items()
            },
        )
        for close in closing:
            runner.run(_awaited(close))


async def _awaited(close: Close) -> None:
    await close()


def _async_rows(port: int, tasks: int) -> list[Row]:
    makes = {_BY_HAND: _by_hand, _ROUTER: _routed(), _LIMITED: _routed(deployments=3)}
    with _sampled(makes, port, tasks) as (_, candidates):
        samples = compare(candidates)
    path = f"`Router.acompletion`, {tasks} at a time"
    return [
        samples.row(path, _ROUTER, _BY_HAND, _ASYNC_FLOOR, _GOAL),
        samples.row(f"{path}, 3 deployments with rpm and tpm", _LIMITED, _BY_HAND, _ASYNC_FLOOR, _GOAL),
    ]


# --- sync


def _sync_by_hand(port: int) -> Callable[[], Sized]:
    transport = SyncTransport(HTTPSettings())
    url, timeouts = f"http://127.0.0.1:{port}/v1/chat/completions", Timeouts(total=60.0)

    async def ask() -> bytes:
        return await (await transport.send(Outgoing(url, HEADERS, REQUEST), timeouts)).read()

    def call() -> str:
        text: str = json.loads(run_sync(ask()))["choices"][0]["message"]["content"]
        return text

    return call


def _sync_routed(router: Router) -> Callable[[], Sized]:
    def call() -> str:
        text: str = router.completion("gpt-4o", _MESSAGES).choices[0].message.content
        return text

    return call


def _sync_rows(port: int, threads: int) -> list[Row]:
    calls = {
        _BY_HAND: _sync_by_hand(port),
        _ROUTER: _sync_routed(_router(port)),
        _LIMITED: _sync_routed(_router(port, deployments=3)),
    }
    samples = compare(
        {name: thread_sample(call, threads, len(CONTENT), _SYNC_CALLS) for name, call in calls.items()}
    )
    path = f"`Router.completion`, {threads} thread{'s' if threads > 1 else ''}"
    return [
        samples.row(path, _ROUTER, _BY_HAND, _SYNC_FLOOR, _GOAL),
        samples.row(f"{path}, 3 deployments with rpm and tpm", _LIMITED, _BY_HAND, _SYNC_FLOOR, _GOAL),
    ]


# --- limits in Redis


@contextmanager
def _limits(server: RedisServer) -> Iterator[SharedLimits]:
    connection = RedisConnection.from_settings(settings(server), {})
    store = RedisLimits(connection)
    try:
        yield SharedLimits(RouterState(), store)
    finally:
        store.close()
        connection.close()


def _shared_rows(port: int, server: RedisServer) -> list[Row]:
    with _limits(server) as limits:
        makes = {_BY_HAND: _by_hand, _SHARED: _routed(deployments=3, limits=limits)}
        with _sampled(makes, port, 16) as (runner, candidates):
            samples = compare(candidates)
            asynchronous = _counted_async(server, runner, _routed(deployments=3, limits=limits)(port))
            runner.run(limits.store._connection.aclose())
        path = "`Router.acompletion`, limits in Redis"
        rows = [samples.row(f"{path}, 16 at a time", _SHARED, _BY_HAND, _ASYNC_FLOOR)]
        call = _sync_routed(_router(port, deployments=3, limits=limits))
        return [*rows, asynchronous, _counted("`Router.completion`", server, call)]


def _counted_async(server: RedisServer, runner: asyncio.Runner, made: tuple[Call, Close]) -> Row:
    call, close = made

    async def called() -> None:
        await call()

    row = _counted("`Router.acompletion`", server, lambda: runner.run(called()))
    runner.run(_awaited(close))
    return row


def _counted(path: str, server: RedisServer, call: Callable[[], object]) -> Row:
    """The round trips of a call: those counts in which the thread that tells of the last calls took no part
    are the most."""

    def several() -> None:
        for _ in range(_COUNTED):
            call()

    several()
    counts = []
    for _ in range(_COUNTS):
        spent = commands(server, several)
        counts.append({name: times for name, times in spent.items() if name not in _IN_SCRIPT})
    rows = [counted(f"{path}, limits in Redis", spent, _COUNTED, 1) for spent in counts]
    rows.sort(key=lambda row: row.median)
    middle = rows[len(rows) // 2]
    return Row(middle.path, "", middle.goal, middle.median, rows[0].median, rows[-1].median, unit=middle.unit)


if __name__ == "__main__":
    show(results)
