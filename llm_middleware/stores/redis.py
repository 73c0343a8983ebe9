"""`RedisStore`: one cache for any number of processes and machines, in a Redis that others may use too.

Each operation is written once, as a *plan*: a generator that yields steps and is sent their replies. A step
is a function from a redis-py client to a reply; of the async client, to something to be awaited for it. The
two faces differ in the loop that runs the steps, and in nothing else.

A plan is one step, so one round trip (in a Cluster, one per node, side by side), except for `flush`. A hit is
the one operation that needs no plan, and does without.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from ..types import Clock
from .redis_connect import RedisConnection

__all__ = ["RedisStore"]

T = TypeVar("T")

Command = tuple[bytes | str | int, ...]
Step = Callable[[Any], Any]
Plan = Generator[Step, Any, T]

_MOST_MS: Final = 2.0**53  # from here on a time to live is for ever: Redis refuses it
_SCANNED: Final = 1000  # keys looked at per step of a flush
_DIGITS: Final = re.compile(rb":[0-9a-f]{64}\Z")
_GLOB: Final = re.compile(r"([\\*?\[\]])")


class RedisStore:
    """Answers in a Redis, a Cluster or behind sentinels, for every process that uses the same namespace.

    Both faces: `get` for threads, `aget` for event loops, and so on; one object serves all of them at once.
    ``clock`` gives seconds since the epoch; entries end by the server's clock, `ping` says how far they are
    apart. Every method raises `StoreError` when Redis cannot do it within the connection's budget;
    `CorruptEntryError` where something that is no string lies under the key.
    """

    tier = "redis"

    def __init__(self, connection: RedisConnection, *, clock: Clock = time.time) -> None:
        self.connection = connection
        self._clock = clock

    def get(self, key: str) -> bytes | None:
        """The bytes under ``key``, or None where there are none or their time is over. One GET."""
        with self.connection.use() as client:
            value: bytes | None = client.execute_command("GET", key)
        return value

    async def aget(self, key: str) -> bytes | None:
        async with self.connection.ause() as client:
            value: bytes | None = await client.execute_command("GET", key)
        return value

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """What `get` says of each of ``keys``. One MGET; in a Cluster one per slot, pipelined by node."""
        return self._run(_mget(keys, self.connection.clustered))

    async def amget(self, keys: Sequence[str]) -> list[bytes | None]:
        return await self._arun(_mget(keys, self.connection.clustered))

    def set(self, key: str, value: bytes, ttl: float | None) -> None:
        """Keep ``value`` for ``ttl`` seconds (None: until evicted), replacing what was there. One SET.

        A ``ttl`` of zero or less removes what was there.
        """
        self._run(_set([(key, value, ttl)]))

    async def aset(self, key: str, value: bytes, ttl: float | None) -> None:
        await self._arun(_set([(key, value, ttl)]))

    def mset(self, entries: Iterable[tuple[str, bytes, float | None]]) -> None:
        """`set` for each ``(key, value, ttl)`` in one round trip. A failure leaves some unwritten."""
        self._run(_set(entries))

    async def amset(self, entries: Iterable[tuple[str, bytes, float | None]]) -> None:
        await self._arun(_set(entries))

    def delete(self, keys: Sequence[str]) -> int:
        """Remove ``keys``; how many were there."""
        return self._run(_unlink(keys, self.connection.clustered))

    async def adelete(self, keys: Sequence[str]) -> int:
        return await self._arun(_unlink(keys, self.connection.clustered))

    def flush(self, namespace: str) -> int:
        """Remove every key ``<namespace>:<64 hex digits>`` on every master, no other; how many there were.

        Looks through the whole keyspace in steps of a thousand keys, each within the budget, so that the
        server's other users get their turn. A failure half-way leaves the rest.
        """
        return self._run(_flush(namespace, self.connection.clustered))

    async def aflush(self, namespace: str) -> int:
        return await self._arun(_flush(namespace, self.connection.clustered))

    def ping(self) -> dict[str, object]:
        """Ask every master: server and version, latency, and where that is, with no secret.

        ``clock_skew_ms``: how far the server's clock is ahead of this process's, to about half the latency.
        """
        return self._run(_ping(self.connection, self._clock))

    async def aping(self) -> dict[str, object]:
        return await self._arun(_ping(self.connection, self._clock))

    def close(self) -> None:
        """Close this process's sync client. The store may be used again and then connects again."""
        self.connection.close()

    async def aclose(self) -> None:
        """Close this event loop's client. The store may be used again and then connects again."""
        await self.connection.aclose()

    def _run(self, plan: Plan[T]) -> T:
        reply = None
        while True:
            try:
                step = plan.send(reply)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            with self.connection.use() as client:
                reply = step(client)

    async def _arun(self, plan: Plan[T]) -> T:
        reply = None
        while True:
            try:
                step = plan.send(reply)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            async with self.connection.ause() as client:
                reply = await step(client)


def _mget(keys: Sequence[str], clustered: bool) -> Plan[list[bytes | None]]:
    groups = _groups(keys, clustered)
    replies = yield from _send([("MGET", *group) for group in groups])
    values: dict[str, bytes | None] = {}
    for group, reply in zip(groups, replies, strict=True):
        values.update(zip(group, reply, strict=True))
    return [values[key] for key in keys]


def _set(entries: Iterable[tuple[str, bytes, float | None]]) -> Plan[None]:
    yield from _send([_set_command(*entry) for entry in entries])


def _unlink(keys: Sequence[str], clustered: bool) -> Plan[int]:
    replies: list[int] = yield from _send([("UNLINK", *group) for group in _groups(keys, clustered)])
    return sum(replies)


def _send(commands: Sequence[Command]) -> Plan[list[Any]]:
    """The replies to ``commands``, which are sent at once."""
    if len(commands) == 1:
        return [(yield lambda client: client.execute_command(*commands[0]))]
    return (yield _pipeline(commands)) if commands else []


def _flush(namespace: str, clustered: bool) -> Plan[int]:
    pattern = _GLOB.sub(r"\\\1", namespace) + ":" + "?" * 64
    start = len(namespace.encode())
    removed = 0
    cursors: dict[str | None, int] = {None: 0}
    while cursors:
        node, cursor = cursors.popitem()
        following, found = yield _scan(node, cursor, pattern, clustered)
        cursors |= _unfinished(following if clustered else {None: following})
        keys = [key.decode() for key in found if _DIGITS.match(key, start)]
        removed += yield from _unlink(keys, clustered)
    return removed


def _scan(node: str | None, cursor: int, pattern: str, clustered: bool) -> Step:
    """The next keys; in a Cluster of ``node``, or the first ones of every master (None)."""

    def step(client: Any) -> Any:
        if not clustered:
            return client.scan(cursor, pattern, _SCANNED)
        masters = client.PRIMARIES if node is None else client.get_node(node_name=node)
        return client.scan(cursor, pattern, _SCANNED, target_nodes=masters)

    return step


def _unfinished(cursors: Mapping[str | None, int]) -> dict[str | None, int]:
    return {node: cursor for node, cursor in cursors.items() if cursor}


def _ping(connection: RedisConnection, clock: Clock) -> Plan[dict[str, object]]:
    clustered = connection.clustered
    every = {"target_nodes": "primaries"} if clustered else {}
    yield lambda client: client.execute_command("PING", **every)  # connects, which is not what latency means
    began, now = time.perf_counter(), clock()
    seconds, microseconds = yield _ask_one("TIME", clustered)
    latency = time.perf_counter() - began
    old = connection.settings.arguments.get("protocol") == 2  # as it is for servers that know no HELLO
    reply = [] if old else (yield _ask_one("HELLO", clustered))
    greeting = reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))
    return {
        "server": greeting.get(b"server", b"redis").decode(),
        "server_version": greeting[b"version"].decode() if greeting else None,
        "latency_ms": round(latency * 1e3, 3),
        "clock_skew_ms": round((seconds + microseconds / 1e6 - now - latency / 2) * 1e3),
        "connection": connection.describe(),
    }


def _ask_one(command: str, clustered: bool) -> Step:
    """``command`` to the server; in a Cluster to any master."""

    def step(client: Any) -> Any:
        target = {"target_nodes": client.get_primaries()[0]} if clustered else {}
        return client.execute_command(command, **target)

    return step


def _set_command(key: str, value: bytes, ttl: float | None) -> Command:
    if ttl is None or ttl * 1e3 >= _MOST_MS:
        return ("SET", key, value)
    if ttl <= 0:
        return ("UNLINK", key)
    return ("SET", key, value, "PX", math.ceil(ttl * 1e3))


def _pipeline(commands: Sequence[Command]) -> Step:
    """``commands`` at once; their replies in order."""

    def step(client: Any) -> Any:
        pipe = client.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        return pipe.execute()

    return step


def _groups(keys: Sequence[str], clustered: bool) -> list[list[str]]:
    """``keys`` without repetition, as one command can name them: those of one slot in a Cluster."""
    distinct = list(dict.fromkeys(keys))
    if not clustered:
        return [distinct] if distinct else []
    from redis.crc import key_slot

    slots: dict[int, list[str]] = {}
    for key in distinct:
        slots.setdefault(key_slot(key.encode()), []).append(key)
    return list(slots.values())
