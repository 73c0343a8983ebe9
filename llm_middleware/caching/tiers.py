"""`Tiers`: this process's memory in front of a store that others share, as one place to look.

Memory holds `Entry` objects, the store behind it holds their bytes. Rules that hold here:
- Memory never keeps an entry longer than ``memory_ttl``: what another process deletes or replaces is gone
  from here by then at the latest, and as a rule at once, through the store's invalidations.
- Every operation on the store behind has a budget and goes through a breaker. What fails there is a miss or
  an entry not kept; it is counted, and never raised to a request.
- Bytes that are not an entry are a miss, counted and removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .._ports.protocol import Port
from ..errors import CorruptEntryError, StoreError
from ..stores.memory import MemoryStore
from ..types import Clock
from .at_rest import AtRest
from .breaker import Breaker
from .entry import Entry, decode, encode
from .reporter import Reporter

__all__ = ["Tiers"]


class Tiers:
    """``memory``: the nearest tier, if any. ``store``: the store behind it, if any (`Store`, `AsyncStore`).
    ``budget``: seconds that one operation there may take."""

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
    ) -> None:
        self.memory = memory
        self.store = store
        self.tier = reporter.tier = "memory" if store is None else str(getattr(store, "tier", "custom"))
        self._clock = clock
        self._reporter = reporter
        self._at_rest = at_rest
        self._breaker = breaker
        self._budget = budget
        self._memory_ttl = memory_ttl

    def replace(self, store: object) -> None:
        """Use ``store`` alone from now on."""
        self.memory, self.store = None, store
        self.tier = self._reporter.tier = str(getattr(store, "tier", "custom"))

    # --- one operation on the store behind

    async def _ask(self, port: Port, operation: str, *args: object) -> object:
        """What the store behind answers; `StoreError` at once while its breaker is open."""
        if not self._breaker.allow():
            raise StoreError(f"{self.tier}: not asked, it failed a moment ago", code="breaker_open")
        try:
            result = await port.store(self.store, operation, *args, budget=self._budget)
        except CorruptEntryError:
            self._breaker.succeeded()
            raise
        except Exception:
            self._breaker.failed()
            raise
        self._breaker.succeeded()
        self._reporter.store_answered(operation)
        return result

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
        try:
            value = await self._ask(port, "get", key)
            entry = None if value is None else self._opened(key, value)
        except CorruptEntryError as exc:
            self._reporter.store_failed(kind, key, exc)
            await self._remove(port, kind, key)
            return None, self.tier
        except Exception as exc:
            self._failed(kind, key, exc, "get")
            return None, self.tier
        if entry is None or entry.kind != kind:
            return None, self.tier
        self._fill(key, entry)
        return entry, self.tier

    def _opened(self, key: str, value: object) -> Entry:
        if not isinstance(value, bytes):
            raise CorruptEntryError(f"the store returned {type(value).__name__}, not bytes")
        return decode(self._at_rest.open(value, key=key))

    def _fill(self, key: str, entry: Entry) -> None:
        """Bring an entry nearer, for the rest of its life and no longer."""
        left = min(entry.expires - self._clock(), self._memory_ttl)
        if self.memory is not None and left > 0:
            self.memory.set(key, entry, left)

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
        try:
            values = await self._ask(port, "mget", missing)
            assert isinstance(values, list)
        except Exception as exc:
            self._failed(kind, missing[0], exc, "mget")
            return found
        for key, value in zip(missing, values, strict=True):
            if value is not None and (entry := await self._checked(port, kind, key, value)) is not None:
                found[key] = entry, self.tier
        return found

    async def _checked(self, port: Port, kind: str, key: str, value: object) -> Entry | None:
        try:
            entry = self._opened(key, value)
        except CorruptEntryError as exc:
            self._reporter.store_failed(kind, key, exc)
            await self._remove(port, kind, key)
            return None
        if entry.kind != kind:
            return None
        self._fill(key, entry)
        return entry

    # --- writing

    async def set(self, port: Port, kind: str, key: str, entry: Entry, kept_for: float | None) -> bool:
        """Keep an entry in every tier; False where the one behind fails (it is in memory all the same)."""
        if self.memory is not None:
            near = kept_for
            if self.store is not None:
                near = self._memory_ttl if kept_for is None else min(kept_for, self._memory_ttl)
            self.memory.set(key, entry, near)
        if self.store is None:
            return True
        try:
            sealed = self._at_rest.seal(encode(entry), key=key)
            await self._ask(port, "set", key, sealed, kept_for)
        except Exception as exc:
            self._failed(kind, key, exc, "set")
            return False
        return True

    async def _remove(self, port: Port, kind: str, key: str) -> None:
        try:
            await self._ask(port, "delete", [key])
        except Exception as exc:
            self._failed(kind, key, exc, "delete")

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
        await port.store(self.store, "set", key, self._at_rest.seal(encode(entry), key=key), 60.0)
        value = await port.store(self.store, "get", key)
        await port.store(self.store, "delete", [key])
        return value is not None and self._opened(key, value) == entry

    async def facts(self, port: Port) -> dict[str, object]:
        """What the store tells of its server and connection, without secrets."""
        if not (hasattr(self.store, "ping") or hasattr(self.store, "aping")):
            return {}
        told = await port.store(self.store, "ping")
        return dict(told) if isinstance(told, Mapping) else {}

    async def delete(self, port: Port, keys: Sequence[str]) -> int:
        near = 0 if self.memory is None else self.memory.delete(keys)
        if self.store is None:
            return near
        return _count(await port.store(self.store, "delete", keys))

    async def flush(self, port: Port, namespace: str) -> int:
        near = 0 if self.memory is None else self.memory.flush(namespace)
        if self.store is None:
            return near
        return _count(await port.store(self.store, "flush", namespace))

    async def close(self, port: Port) -> None:
        if self.store is not None:
            await port.store(self.store, "close")


def _count(value: object) -> int:
    assert isinstance(value, int)
    return value
