"""`Tiers`: this process's memory in front of a store that others share, as one place to look.

Memory holds `Entry` objects, the store behind it holds their bytes. Rules that hold here:
- What another process deletes or replaces is gone from here as soon as that is told. While nothing can be
  told, memory keeps an entry for a second; where the store has no way to tell, for ``memory_ttl``.
- Every operation on the store behind has a budget and goes through a breaker. What fails there is a miss or
  an entry not kept; it is counted, and never raised to a request.
- Bytes that are not an entry are a miss, counted and removed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._ports.protocol import Port
from ..errors import CorruptEntryError, StoreError
from ..stores.memory import MemoryStore
from ..types import Clock
from .at_rest import AtRest
from .breaker import Breaker
from .entry import Entry, decode, encode
from .labels import labelled, unlabelled
from .near import Near
from .peers import Claimed, Peers
from .plan import Plan
from .reporter import Reporter

if TYPE_CHECKING:
    from ..semantic.tier import SemanticTier

__all__ = ["Tiers"]

# While the store fails it is only read, until it answers again or so many seconds have passed: so a request
# waits for it once, and not again to claim the call and to keep the answer.
_READS = ("get", "mget")
_TELLING = (*_READS, "recent", "claim")  # before the call; what fails after it, the next request sees
_SHUNNED = 30.0
# Callers of whom it is known that their recent answers were brought.
_CALLERS = 10_000


class Tiers:
    """``memory``: the nearest tier, if any. ``store``: the store behind it, if any (`Store`, `AsyncStore`).
    ``budget``: seconds that one operation there may take. ``semantic``: what knows entries by their
    questions' meaning, and is told of those that are removed."""

    def __init__(
        self,
        memory: MemoryStore[Entry] | None,
        store: object | None,
        *,
        clock: Clock,
        reporter: Reporter,
        at_rest: AtRest,
        breaker: Breaker,
        budget: float | None,
        memory_ttl: float,
        recents: bool = False,
    ) -> None:
        self.memory = memory
        self.near = None if memory is None or store is None else Near(memory, memory_ttl)
        self.store = store
        self.peers = Peers.of(store, self.near)
        self.tier = reporter.tier = "memory" if store is None else str(getattr(store, "tier", "custom"))
        self._clock = clock
        self._reporter = reporter
        self._at_rest = at_rest
        self._breaker = breaker
        self._budget = budget
        self._memory_ttl = memory_ttl
        self.recents = recents
        self.semantic: SemanticTier | None = None
        self._shunned_until = 0.0
        self._brought: dict[str, float] = {}

    def replace(self, store: object) -> None:
        """Use ``store`` alone from now on."""
        if self.peers is not None:
            self.peers.close()
        self.memory, self.near, self.peers, self.store = None, None, None, store
        self.recents = False
        self.tier = self._reporter.tier = str(getattr(store, "tier", "custom"))

    # --- one operation on the store behind

    async def _ask(self, port: Port, operation: str, *args: object) -> object:
        """What the store behind answers; `StoreError` at once while its breaker is open."""
        if self.peers is not None:
            self.peers.listen()
        asked = operation in _READS or time.monotonic() >= self._shunned_until
        if not asked or not self._breaker.allow():
            raise StoreError(f"{self.tier}: not asked, it failed a moment ago", code="breaker_open")
        try:
            result = await port.store(self.store, operation, *args, budget=self._budget)
        except CorruptEntryError:
            self._breaker.succeeded()
            raise
        except Exception as exc:
            # A store that is full or read-only refuses writes at once, and reads go on.
            if isinstance(exc, StoreError) and exc.code == "store_refused":
                self._breaker.succeeded()
            else:
                self._breaker.failed()
                if operation in _TELLING:
                    self._shunned_until = time.monotonic() + _SHUNNED
            raise
        self._breaker.succeeded()
        self._shunned_until = 0.0
        self._reporter.store_answered(operation)
        return result

    def failed(self, plan: Plan, error: Exception, operation: str) -> None:
        """The store failed at an operation whose error was raised."""
        self._failed(plan.kind, plan.key, error, operation)

    def _failed(self, kind: str, key: str, error: Exception, operation: str) -> None:
        if not (isinstance(error, StoreError) and error.code == "breaker_open"):
            self._reporter.store_failed(kind, key, error, operation)

    # --- reading

    async def get(self, port: Port, kind: str, key: str) -> tuple[Entry | None, str]:
        """The entry, whatever its age, and its tier; None where there is none or the store fails."""
        if self.memory is not None:
            entry = self.memory.get(key)
            if entry is not None or self.store is None:
                return entry, "memory"
        since = self._moment()
        try:
            value = await self._ask(port, "get", key)
        except Exception as exc:
            await self._unreadable(port, kind, key, exc, "get")
            return None, self.tier
        return await self._checked(port, kind, key, value, since), self.tier

    async def bring_recent(self, port: Port, plan: Plan) -> None:
        """Bring a caller's most recent answers nearer, in one round trip, with its first request; and again
        when memory may have let go of them."""
        owner, now = plan.owner, self._clock()
        if self._brought.get(owner, 0.0) > now:
            return
        if len(self._brought) >= _CALLERS:
            self._brought.clear()
        self._brought[owner] = now + self._memory_ttl
        since = self._moment()
        try:
            found: Any = await self._ask(port, "recent", owner)
        except Exception as exc:
            self._failed(plan.kind, plan.key, exc, "recent")
            return
        for key, value in found:
            await self._checked(port, plan.kind, key, value, since)

    async def claim(self, port: Port, plan: Plan, lease: str) -> tuple[Claimed | None, Entry | None]:
        """The lease, where the caller now holds it and so is the one to call; and the entry, where it is
        stored by now. Raises what the store raises."""
        since = self._moment()
        answer: Any = await self._ask(port, "claim", plan.key, lease)
        token, value = answer
        claimed = None if token is None else Claimed(plan.key, lease, token)
        try:
            return claimed, await self._checked(port, plan.kind, plan.key, value, since)
        except BaseException:
            if claimed is not None and self.peers is not None:
                self.peers.give_up(claimed, "freed")
            raise

    def _moment(self) -> int:
        return 0 if self.near is None else self.near.moment()

    async def _checked(self, port: Port, kind: str, key: str, value: object, since: int) -> Entry | None:
        """The entry that the store's value is, which comes nearer; None where it is none of this kind."""
        if value is None:
            return None
        try:
            entry = self._opened(key, value)
        except Exception as exc:
            await self._unreadable(port, kind, key, exc, "get")
            return None
        if entry.kind != kind:
            return None
        self._fill(key, entry, since)
        return entry

    async def _unreadable(self, port: Port, kind: str, key: str, error: Exception, operation: str) -> None:
        if not isinstance(error, CorruptEntryError):
            self._failed(kind, key, error, operation)
            return
        self._reporter.store_failed(kind, key, error)
        try:
            await self._ask(port, "delete", [key])
        except Exception as exc:
            self._failed(kind, key, exc, "delete")

    def _sealed(self, key: str, entry: Entry, scope: str = "") -> bytes:
        return labelled(entry.labels, self._at_rest.seal(encode(entry), key=key, scope=scope))

    def _opened(self, key: str, value: object) -> Entry:
        if not isinstance(value, bytes):
            raise CorruptEntryError(f"the store returned {type(value).__name__}, not bytes")
        labels, sealed = unlabelled(value)
        entry = decode(self._at_rest.open(sealed, key=key))
        entry.labels = labels
        return entry

    def _fill(self, key: str, entry: Entry, since: int) -> None:
        """Bring an entry nearer, for the rest of its life and no longer."""
        if self.near is None:
            return
        left = entry.expires - self._clock()
        if left > 0:
            self.near.fill(key, entry, left, since)

    async def get_many(self, port: Port, kind: str, keys: Sequence[str]) -> dict[str, tuple[Entry, str]]:
        """Those of ``keys`` that are stored, in one round trip where the store has one."""
        found: dict[str, tuple[Entry, str]] = {}
        memory = self.memory
        if memory is not None:
            for key in keys:
                entry = memory.get(key)
                if entry is not None:
                    found[key] = entry, "memory"
        missing = [key for key in keys if key not in found]
        if self.store is None or not missing:
            return found
        if not (hasattr(self.store, "mget") or hasattr(self.store, "amget")):
            for key in missing:
                entry, tier = await self.get(port, kind, key)
                if entry is not None:
                    found[key] = entry, tier
            return found
        since = self._moment()
        try:
            values = await self._ask(port, "mget", missing)
            assert isinstance(values, list)
        except Exception as exc:
            self._failed(kind, missing[0], exc, "mget")
            return found
        for key, value in zip(missing, values, strict=True):
            entry = await self._checked(port, kind, key, value, since)
            if entry is not None:
                found[key] = entry, self.tier
        return found

    async def gone(self, port: Port, key: str) -> bool:
        """Whether the last tier has no such entry; raises what the store raises, and `StoreError` where it
        is not asked."""
        if self.store is None:
            assert self.memory is not None
            return self.memory.get(key) is None
        return await self._ask(port, "get", key) is None

    # --- writing

    async def set(self, port: Port, plan: Plan, entry: Entry, kept_for: float | None) -> bool:
        """Keep an entry in every tier; False where the one behind fails (it is in memory all the same)."""
        if self.store is None:
            assert self.memory is not None
            self.memory.set(plan.key, entry, kept_for)
            return True
        if self.near is not None:
            self.near.put(plan.key, entry, kept_for)
        try:
            owner = (plan.owner,) if self.recents else ()
            await self._ask(
                port, "set", plan.key, self._sealed(plan.key, entry, plan.scope), kept_for, *owner
            )
        except Exception as exc:
            self._failed(plan.kind, plan.key, exc, "set")
            if self.near is not None:
                self.near.put(plan.key, entry, kept_for, alone=True)
            return False
        if self.near is not None:
            self.near.written(plan.key, entry)
        return True

    # --- the operator's words: these raise what the store raises

    async def probe(self, port: Port, key: str, entry: Entry) -> bool:
        """Write, read and delete ``entry`` on the farthest tier; whether it came back as it was."""
        if self.store is None:
            memory = self.memory
            assert memory is not None
            memory.set(key, entry, 60.0)
            back = memory.get(key)
            memory.delete([key])
            return back == entry
        await port.store(self.store, "set", key, self._sealed(key, entry), 60.0)
        value = await port.store(self.store, "get", key)
        await port.store(self.store, "delete", [key])
        return value is not None and self._opened(key, value) == entry

    async def facts(self, port: Port) -> dict[str, object]:
        """What the store tells of its server and connection, without secrets."""
        if not (hasattr(self.store, "ping") or hasattr(self.store, "aping")):
            return {}
        told = await port.store(self.store, "ping")
        return dict(told) if isinstance(told, Mapping) else {}

    async def read(self, port: Port, key: str) -> Entry | None:
        """The entry on the farthest tier, which comes no nearer; None where none can be read."""
        if self.store is None:
            assert self.memory is not None
            return self.memory.get(key)
        value = await port.store(self.store, "get", key)
        try:
            return None if value is None else self._opened(key, value)
        except StoreError:
            return None

    def peek(self, sealed: bytes) -> bytes:
        """The first bytes of an entry, of those of what the store has; others where they cannot be told."""
        return self._at_rest.peek(sealed)

    async def delete(self, port: Port, keys: Sequence[str]) -> int:
        if self.semantic is not None:
            await self.semantic.removed(port, keys)
        return await self._delete(port, keys)

    async def _delete(self, port: Port, keys: Sequence[str]) -> int:
        if self.store is None:
            assert self.memory is not None
            return self.memory.delete(keys)
        if self.near is not None:
            self.near.drop(keys)
        try:
            return _count(await port.store(self.store, "delete", keys))
        finally:
            if self.near is not None:  # what came nearer while they were being removed
                self.near.drop(keys)

    async def count(self, port: Port, keys: Sequence[str]) -> int:
        """How many of ``keys`` are there."""
        distinct = list(dict.fromkeys(keys))
        if self.store is None:
            assert self.memory is not None
            return sum(self.memory.get(key) is not None for key in distinct)
        if hasattr(self.store, "mget") or hasattr(self.store, "amget"):
            values = await port.store(self.store, "mget", distinct)
            assert isinstance(values, list)
        else:
            values = [await port.store(self.store, "get", key) for key in distinct]
        return sum(value is not None for value in values)

    async def purge_expired(self, port: Port) -> int:
        near = 0 if self.memory is None else self.memory.purge_expired()
        if self.store is None:
            return near
        able = hasattr(self.store, "purge_expired") or hasattr(self.store, "apurge_expired")
        return _count(await port.store(self.store, "purge_expired")) if able else 0

    async def flush(self, port: Port, namespace: str) -> int:
        if self.semantic is not None:
            await self.semantic.flushed(port, namespace)
        return await self._flush(port, namespace)

    async def _flush(self, port: Port, namespace: str) -> int:
        if self.store is None:
            assert self.memory is not None
            return self.memory.flush(namespace)
        if self.near is not None:
            self.near.drop_all(namespace)
        try:
            return _count(await port.store(self.store, "flush", namespace))
        finally:
            if self.near is not None:
                self.near.drop_all(namespace)

    async def close(self, port: Port) -> None:
        if self.peers is not None:
            self.peers.close()
        if self.semantic is not None:
            await self.semantic.close(port)
        if self.store is not None:
            await port.store(self.store, "close")


def _count(value: object) -> int:
    assert isinstance(value, int)
    return value
