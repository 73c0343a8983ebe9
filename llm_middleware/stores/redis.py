"""`RedisStore`: one cache for any number of processes and machines, in a Redis that others may use too.

Each operation is written once, as a plan (`redis_plan`), so that the two faces differ in nothing. A plan is
one step, so one round trip (in a Cluster, one per node, side by side), except for `flush`. A hit is
the one operation that needs no plan, and does without. What changes entries also tells the other processes
that share them: in the same round trip; in a Cluster, where commands of different nodes have no order, in a
second one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from ..errors import InvalidRequestError, StoreError
from ..types import Clock
from .redis_connect import RedisConnection
from .redis_leases import RedisLeases
from .redis_peers import RedisPeers
from .redis_plan import Command, Plan, Step, arun, milliseconds, pipeline, run, send
from .redis_recent import RecentEntries
from .redis_scan import Page, scan_heads, scan_keys

__all__ = ["RedisStore"]

logger = logging.getLogger("llm_middleware")

T = TypeVar("T")

Kept = tuple[str, bytes, float | None]

_NOBODY: Final[Mapping[str, str]] = {}


class RedisStore:
    """Answers in a Redis, a Cluster or behind sentinels, for every process that uses the same namespace.

    Both faces: `get` for threads, `aget` for event loops, and so on; one object serves all of them at once.
    ``clock`` gives seconds since the epoch; entries end by the server's clock, `ping` says how far they are
    apart. Every method raises `StoreError` when Redis cannot do it within the connection's budget;
    `CorruptEntryError` where something that is no string lies under the key.
    ``peers``: the processes that are told of changes, and among which `claim` finds one to make a call.
    ``recents``: the index that `recent` reads.
    """

    tier = "redis"
    budgeted = True  # no operation takes longer than the connection's budget

    def __init__(
        self,
        connection: RedisConnection,
        *,
        clock: Clock = time.time,
        peers: RedisPeers | None = None,
        recents: RecentEntries | None = None,
    ) -> None:
        self.connection = connection
        self.peers = peers
        self._recents = recents
        self._clock = clock
        self._warned = False

    def get(self, key: str) -> bytes | None:
        """The bytes under ``key``, or None where there are none or their time is over. One GET."""
        value: bytes | None
        with self.connection.use() as client:
            if self.connection.clustered:
                value = client.execute_command("GET", key)
                return value
            # What `execute_command` does, less its retries, metrics and look at the command: half its time.
            pool = client.connection_pool
            line = pool.get_connection()
            try:
                line.send_command("GET", key)
                value = line.read_response()
            finally:
                pool.release(line)
        return value

    async def aget(self, key: str) -> bytes | None:
        value: bytes | None
        async with self.connection.ause() as client:
            if self.connection.clustered:
                value = await client.execute_command("GET", key)
                return value
            pool = client.connection_pool
            line = await pool.get_connection()
            try:
                await line.send_command("GET", key)
                value = await line.read_response()
            finally:
                await pool.release(line)
        return value

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """What `get` says of each of ``keys``. One MGET; in a Cluster one per slot, pipelined by node."""
        return self._run(_mget(keys, self.connection.clustered))

    async def amget(self, keys: Sequence[str]) -> list[bytes | None]:
        return await self._arun(_mget(keys, self.connection.clustered))

    def set(self, key: str, value: bytes, ttl: float | None, owner: str | None = None) -> None:
        """Keep ``value`` for ``ttl`` seconds (None: until evicted), replacing what was there. One SET.

        A ``ttl`` of zero or less removes what was there. ``owner``: among whose `recent` entries it is.
        """
        self._run(self._set([(key, value, ttl)], {} if owner is None else {key: owner}))

    async def aset(self, key: str, value: bytes, ttl: float | None, owner: str | None = None) -> None:
        await self._arun(self._set([(key, value, ttl)], {} if owner is None else {key: owner}))

    def mset(self, entries: Sequence[Kept], owners: Mapping[str, str] = _NOBODY) -> None:
        """`set` for each ``(key, value, ttl)`` in one round trip. A failure leaves some unwritten."""
        self._run(self._set(entries, owners))

    async def amset(self, entries: Sequence[Kept], owners: Mapping[str, str] = _NOBODY) -> None:
        await self._arun(self._set(entries, owners))

    def recent(self, owner: str) -> list[tuple[str, bytes]]:
        """The most recent entries of ``owner`` that are still there, in one round trip."""
        return [] if self._recents is None else self._recents.recent(owner)

    async def arecent(self, owner: str) -> list[tuple[str, bytes]]:
        return [] if self._recents is None else await self._recents.arecent(owner)

    def delete(self, keys: Sequence[str]) -> int:
        """Remove ``keys``; how many were there."""
        return self._run(self._delete(keys))

    async def adelete(self, keys: Sequence[str]) -> int:
        return await self._arun(self._delete(keys))

    def flush(self, namespace: str) -> int:
        """Remove every key ``<namespace>:<64 hex digits>`` on every master, no other; how many there were.

        Looks through the whole keyspace in steps of a thousand keys, each within the budget, so that the
        server's other users get their turn. A failure half-way leaves the rest.
        """
        return self._run(self._flush(namespace))

    async def aflush(self, namespace: str) -> int:
        return await self._arun(self._flush(namespace))

    def heads(self, namespace: str, cursor: str | None, size: int) -> Page:
        """One page of the entries ``<namespace>:<64 hex digits>``: the cursor of the next one (None at the
        end), and each key with the first ``size`` bytes of its value.

        Two round trips, three where values are empty. `InvalidRequestError` for a bad cursor, with the code
        ``cursor_outdated`` where a Cluster has other masters since: begin again."""
        return self._run(scan_heads(namespace, cursor, size, self.connection.clustered))

    async def aheads(self, namespace: str, cursor: str | None, size: int) -> Page:
        return await self._arun(scan_heads(namespace, cursor, size, self.connection.clustered))

    def ping(self) -> dict[str, object]:
        """Ask every master: server and version, latency, and where that is, with no secret.

        ``clock_skew_ms``: how far the server's clock is ahead of this process's, to about half the latency.
        """
        return self._run(_ping(self.connection, self._clock))

    async def aping(self) -> dict[str, object]:
        return await self._arun(_ping(self.connection, self._clock))

    def claim(self, key: str, lease: str) -> tuple[str | None, bytes | None]:
        """Try to be the one process that makes the call for ``key``: a token, or None where another has the
        ``lease``; and what `get` says of ``key`` after that. One round trip."""
        return self._leases.claim(key, lease)

    async def aclaim(self, key: str, lease: str) -> tuple[str | None, bytes | None]:
        return await self._leases.aclaim(key, lease)

    @property
    def _leases(self) -> RedisLeases:
        assert self.peers is not None
        return self.peers.leases

    def close(self) -> None:
        """Close this process's sync client. The store may be used again and then connects again."""
        self.connection.close()

    async def aclose(self) -> None:
        """Close this event loop's client. The store may be used again and then connects again."""
        await self.connection.aclose()

    def _set(self, entries: Sequence[Kept], owners: Mapping[str, str]) -> Plan[None]:
        commands = [_set_command(*entry) for entry in entries]
        also: list[Command] = []
        if self._recents is not None and owners:
            for key, _, ttl in entries:
                also += self._recents.noting(owners[key], key, ttl) if key in owners else ()
        yield from self._told(commands, "changed", [key for key, _, _ in entries], also)

    def _delete(self, keys: Sequence[str]) -> Plan[int]:
        groups = _groups(keys, self.connection.clustered)
        names = [key for group in groups for key in group]
        return sum((yield from self._told([("UNLINK", *group) for group in groups], "changed", names)))

    def _flush(self, namespace: str) -> Plan[int]:
        removed = yield from _flush(namespace, self.connection.clustered)
        yield from self._told([], "flushed", [namespace])
        return removed

    def _told(
        self, commands: Sequence[Command], verb: str, names: Sequence[str], also: Sequence[Command] = ()
    ) -> Plan[list[Any]]:
        """The replies to ``commands``, of which the other processes hear, if there are any. What ``also`` is
        sent may fail, as may the telling: the entries are as they should be all the same."""
        told: list[Command] = []
        if self.peers is not None and names:
            told.append(("PUBLISH", self.peers.channel, self.peers.message(verb, names)))
        if not also and not told:
            return (yield from send(commands))
        if self.connection.clustered or not commands:
            replies = yield from send(commands)
            for group in (also, told):
                try:
                    yield from send(group)
                except StoreError as exc:
                    self._untold(exc)
            return replies
        replies = yield pipeline([*commands, *also, *told], strict=False)
        for reply in replies[: len(commands)]:
            if isinstance(reply, Exception):
                self.connection.fail(reply, self.connection.budget)
        for reply in replies[len(commands) :]:
            if isinstance(reply, Exception):
                self._untold(reply)
        return list(replies[: len(commands)])

    def _untold(self, error: Exception) -> None:
        """The entries are as they should be; only what is beside them is not."""
        if not self._warned:
            self._warned = True
            logger.warning("redis: what goes with a change, for other processes, is refused: %s", error)

    def _run(self, plan: Plan[T]) -> T:
        return run(self.connection, plan)

    async def _arun(self, plan: Plan[T]) -> T:
        return await arun(self.connection, plan)


def _mget(keys: Sequence[str], clustered: bool) -> Plan[list[bytes | None]]:
    groups = _groups(keys, clustered)
    replies = yield from send([("MGET", *group) for group in groups])
    values: dict[str, bytes | None] = {}
    for group, reply in zip(groups, replies, strict=True):
        values.update(zip(group, reply, strict=True))
    return [values[key] for key in keys]


def _unlink(keys: Sequence[str], clustered: bool) -> Plan[int]:
    replies: list[int] = yield from send([("UNLINK", *group) for group in _groups(keys, clustered)])
    return sum(replies)


def _flush(namespace: str, clustered: bool) -> Plan[int]:
    removed = 0
    cursor: str | None = None
    while True:
        try:
            cursor, keys = yield from scan_keys(namespace, cursor, clustered)
        except InvalidRequestError:
            cursor = None  # other masters since: what is removed stays so, the walk begins again
            continue
        removed += yield from _unlink(keys, clustered)
        if cursor is None:
            return removed


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
    if ttl is not None and ttl <= 0:
        return ("UNLINK", key)
    lives = milliseconds(ttl)
    return ("SET", key, value) if lives is None else ("SET", key, value, "PX", lives)


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
