"""`BufferedRedisStore`: the writes of a `RedisStore` in batches, so that a busy process sends few packets.

Rules:

* an entry is in one place: the table, until it is in Redis. Who reads looks there first, so a set is seen at
  once, also while its batch is under way or after that failed;
* setting and reading what is pending never waits for the network, only for a lock held for microseconds;
* a batch under way is waited for by who removes one of its entries: what was removed is not written after;
* the table and its thread belong to a process: a forked child begins with nothing, the parent writes its own.

What is pending is lost with a process that is killed: by SIGTERM too, unless something handles it as servers
do, and by `os._exit`, which is how a forked child of `multiprocessing` ends before Python 3.13. And it is
unknown to other processes: single-flight among them needs a store that has entries at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from ..errors import ConfigError
from ..types import Clock
from .per_process import PerProcess
from .redis import RedisStore
from .redis_peers import RedisPeers
from .redis_pending import Held, Pending, is_of
from .redis_scan import Page

__all__ = ["BufferedRedisStore"]

_MOST_BYTES: Final = 64 * 2**20


class BufferedRedisStore:
    """``store``, written to by a thread: once ``size`` entries are pending, or ``interval`` seconds after
    the first. Both faces; one object serves all threads and event loops.

    A key set again while it is pending is written once. While Redis fails, entries stay pending and are tried
    again every ``interval``, at most ``16 * size`` of them and ``max_bytes``: beyond that the oldest are
    dropped. ``clock`` gives seconds since the epoch. What the thread has no answer to is logged, once until
    everything was written again. `ConfigError` for a ``size`` or an ``interval`` that is none.

    `set` and `mset` raise nothing; every other method raises what ``store`` raises. There is no `claim`.
    """

    tier = "redis"

    def __init__(
        self,
        store: RedisStore,
        *,
        size: int,
        interval: float = 1.0,
        max_bytes: int = _MOST_BYTES,
        clock: Clock = time.time,
    ) -> None:
        for name, value, right in (("size", size, size >= 1), ("interval", interval, interval > 0)):
            if not right:
                raise ConfigError(f"{name}: expected a number > 0, got {value!r}", param=name)
        self.peers: RedisPeers | None = store.peers
        self._store = store
        self._clock = clock
        self._pending = PerProcess(lambda: Pending(store, size, interval, max_bytes, clock))

    @property
    def pending(self) -> int:
        """How many entries this process has yet to write."""
        return len(self._mine().table)

    @property
    def dropped(self) -> int:
        """How many entries of this process were given up, for want of room."""
        return self._mine().dropped

    def get(self, key: str) -> bytes | None:
        """The bytes under ``key``, or None where there are none or their time is over. One GET, or none."""
        entry = self._mine().table.get(key)
        return self._store.get(key) if entry is None else self._alive(entry)

    async def aget(self, key: str) -> bytes | None:
        entry = self._mine().table.get(key)
        return await self._store.aget(key) if entry is None else self._alive(entry)

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """What `get` says of each of ``keys``, in one round trip at most."""
        held, missing = self._held(keys)
        values = dict(zip(missing, self._store.mget(missing), strict=True)) if missing else {}
        return [self._alive(held[key]) if key in held else values[key] for key in keys]

    async def amget(self, keys: Sequence[str]) -> list[bytes | None]:
        held, missing = self._held(keys)
        values = dict(zip(missing, await self._store.amget(missing), strict=True)) if missing else {}
        return [self._alive(held[key]) if key in held else values[key] for key in keys]

    def set(self, key: str, value: bytes, ttl: float | None, owner: str | None = None) -> None:
        """`RedisStore.set`, in memory for now. Returns at once."""
        self._mine().set(key, value, ttl, owner)

    async def aset(self, key: str, value: bytes, ttl: float | None, owner: str | None = None) -> None:
        self._mine().set(key, value, ttl, owner)

    def recent(self, owner: str) -> list[tuple[str, bytes]]:
        """`RedisStore.recent`: what is pending is not among them."""
        return self._store.recent(owner)

    async def arecent(self, owner: str) -> list[tuple[str, bytes]]:
        return await self._store.arecent(owner)

    def mset(self, entries: Iterable[tuple[str, bytes, float | None]]) -> None:
        """`set` for each ``(key, value, ttl)``."""
        for entry in entries:
            self._mine().set(*entry)

    async def amset(self, entries: Iterable[tuple[str, bytes, float | None]]) -> None:
        self.mset(entries)

    def delete(self, keys: Sequence[str]) -> int:
        """Remove ``keys``, pending or not; how many were there."""
        removed, alive = self._forget(keys)
        return alive + self._store.delete([key for key in keys if key not in removed])

    async def adelete(self, keys: Sequence[str]) -> int:
        return await asyncio.to_thread(self.delete, keys)

    def flush(self, namespace: str) -> int:
        """Remove every key of exactly this namespace, pending or not; how many there were."""
        _, alive = self._forget(self._mine().names(namespace))
        return alive + self._store.flush(namespace)

    async def aflush(self, namespace: str) -> int:
        return await asyncio.to_thread(self.flush, namespace)

    def heads(self, namespace: str, cursor: str | None, size: int) -> Page:
        """`RedisStore.heads`; the first page has the entries that are pending as well."""
        held = self._of(namespace)  # before Redis is asked: what is written meanwhile is in one of the two
        return self._merged(held, cursor, size, self._store.heads(namespace, cursor, size))

    async def aheads(self, namespace: str, cursor: str | None, size: int) -> Page:
        held = self._of(namespace)
        return self._merged(held, cursor, size, await self._store.aheads(namespace, cursor, size))

    def heed(self, verb: str, names: Sequence[str]) -> None:
        """Another process ``changed`` these keys or ``flushed`` these namespaces: what is pending here is
        older and is not written. Returns at once."""
        mine = self._mine()
        if verb == "flushed":
            names = [key for namespace in names for key in mine.names(namespace)]
        mine.remove(names)

    def ping(self) -> dict[str, object]:
        """What `RedisStore.ping` tells."""
        return self._store.ping()

    async def aping(self) -> dict[str, object]:
        return await self._store.aping()

    def close(self) -> None:
        """Write what is pending, until a batch fails, and close this process's clients. Each batch has the
        connection's budget. What is left is logged and stays pending: the store may be used again."""
        self._mine().close()
        self._store.close()

    async def aclose(self) -> None:
        """`close`, in another thread as far as it waits."""
        await asyncio.to_thread(self._mine().close)
        await self._store.aclose()

    def _mine(self) -> Pending:
        return self._pending.mine()

    def _forget(self, keys: Sequence[str]) -> tuple[dict[str, Held], int]:
        """Remove those of ``keys`` that are pending, and what they were to replace; how many were alive."""
        mine = self._mine()
        removed = mine.remove(keys)
        mine.settle(keys)
        if removed:
            self._store.delete(list(removed))
        return removed, sum(self._alive(entry) is not None for entry in removed.values())

    def _alive(self, entry: Held) -> bytes | None:
        return entry.value if entry.expires > self._clock() else None

    def _held(self, keys: Sequence[str]) -> tuple[dict[str, Held], list[str]]:
        """Those of ``keys`` that are pending, and the others."""
        table = self._mine().table
        held = {key: entry for key in keys if (entry := table.get(key)) is not None}
        return held, [key for key in dict.fromkeys(keys) if key not in held]

    def _of(self, namespace: str) -> dict[str, Held]:
        return {key: entry for key, entry in list(self._mine().table.items()) if is_of(key, namespace)}

    def _merged(self, held: Mapping[str, Held], cursor: str | None, size: int, page: Page) -> Page:
        """``page``, as it will be once those that are ``held`` are written."""
        ours = {key: value[:size] for key, entry in held.items() if (value := self._alive(entry)) is not None}
        found = {key: ours.get(key, head) for key, head in page[1] if key in ours or key not in held}
        return page[0], list((ours | found if cursor is None else found).items())
