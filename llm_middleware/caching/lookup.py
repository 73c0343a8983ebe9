"""`Lookup`: from a plan to a stored answer, through whatever store there is."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._ports.protocol import Port
from ..types import Clock
from .answer import CacheInfo, Found
from .batch import Batch, joined, reduced
from .entry import Entry
from .fastlane import no_header, select, usable_on_error
from .flight import Flight
from .plan import Plan
from .tiers import Tiers

if TYPE_CHECKING:
    from ..semantic.tier import Sought

__all__ = ["Header", "Lookup", "Opened"]

Header = Callable[[str], str]

_GZIP = b"\x1f\x8b"


def _bytes(body: object) -> bytes:
    assert isinstance(body, bytes)
    return body


@dataclass(slots=True)
class Opened:
    """How a request begins: with a stored answer, behind another caller, or as the one that calls.

    ``beside``: an entry that lives but lacks the form asked for; the new answer joins it.
    ``fallback``: an answer to give if the call fails. ``batch``: of a list of embeddings, what is stored.
    ``sought``: what looking for a question of like meaning came to.
    """

    found: Found | None = None
    flight: Flight | None = None
    leads: bool = False
    beside: Entry | None = None
    fallback: Found | None = None
    batch: Batch | None = None
    sought: Sought | None = None

    def miss(self, plan: Plan, detail: str | None = None) -> CacheInfo:
        """What to tell of a request that goes on."""
        sought = self.sought
        if sought is None:
            return plan.miss(detail)
        info = plan.miss(detail or sought.detail)
        info.similarity = sought.similarity
        return info

    def forwarded(self, body: bytes) -> bytes | None:
        """The body for the handler where some of a list's embeddings are stored, else None."""
        if self.batch is None or self.batch.whole:
            return None
        if body[:2] != _GZIP:
            return _bytes(reduced(body, self.batch))
        # A compressed body, whose plan has seen that it can be read.
        return gzip.compress(_bytes(reduced(gzip.decompress(body), self.batch)), mtime=0)


class Lookup:
    def __init__(self, tiers: Tiers, clock: Clock) -> None:
        self.tiers = tiers
        self.clock = clock

    def now(self, plan: Plan, header: Header = no_header) -> Found | None:
        """The fast lane: an answer from process memory, with no wait."""
        memory = self.tiers.memory
        if memory is None or not plan.lookup:
            return None
        if plan.items:
            return self._whole_batch(plan, memory.get, header)
        entry = memory.get(plan.key)
        return None if entry is None else select(entry, plan, self.clock(), "memory", header)

    def _item(self, entry: Entry | None, plan: Plan, tier: str, header: Header) -> Found | None:
        if entry is None:
            return None
        found = select(entry, plan, self.clock(), tier, header)
        return found if found is not None and found.stale is None else None

    def _whole_batch(self, plan: Plan, get: Callable[[str], Entry | None], header: Header) -> Found | None:
        """The answer to a list of embeddings where every one of them is in memory."""
        items = {}
        for key in plan.items:
            if key not in items:
                found = self._item(get(key), plan, "memory", header)
                if found is None:
                    return None
                items[key] = found
        return _joined_found(plan, items)

    async def _look_batch(self, port: Port, plan: Plan, header: Header) -> Opened:
        items: dict[str, Found] = {}
        if plan.lookup:
            entries = await self.tiers.get_many(port, plan.kind, list(dict.fromkeys(plan.items)))
            for key, (entry, tier) in entries.items():
                found = self._item(entry, plan, tier, header)
                if found is not None:
                    items[key] = found
        if len(items) == len(set(plan.items)):
            whole = _joined_found(plan, items)
            if whole is not None:
                return Opened(whole)
        first = next(iter(items.values()), None)
        bodies = {key: found.body for key, found in items.items()}
        return Opened(batch=Batch(plan.items, bodies, () if first is None else first.headers))

    async def find(self, port: Port, plan: Plan, header: Header = no_header) -> Found | None:
        """A stored answer that fits, or None."""
        if plan.items:
            return (await self._look_batch(port, plan, header)).found
        entry, tier = await self._entry(port, plan)
        return None if entry is None else select(entry, plan, self.clock(), tier, header)

    async def look(self, port: Port, plan: Plan, header: Header) -> Opened:
        if plan.items:
            return await self._look_batch(port, plan, header)
        entry, tier = await self._entry(port, plan)
        return Opened() if entry is None else self.judge(entry, plan, tier, header)

    async def _entry(self, port: Port, plan: Plan) -> tuple[Entry | None, str]:
        if self.tiers.recents:
            await self.tiers.bring_recent(port, plan)
        return await self.tiers.get(port, plan.kind, plan.key)

    def judge(self, entry: Entry, plan: Plan, tier: str, header: Header) -> Opened:
        """What a stored entry is good for."""
        now = self.clock()
        if plan.lookup:
            found = select(entry, plan, now, tier, header)
            if found is not None:
                return Opened(found)
        fallback = usable_on_error(entry, plan, now, tier, header)
        lacks_form = plan.lookup and entry.expires > now and plan.simple
        return Opened(beside=entry if lacks_form else None, fallback=fallback)


def _joined_found(plan: Plan, items: dict[str, Found]) -> Found | None:
    try:
        body = joined(plan.items, {key: found.body for key, found in items.items()})
    except ValueError:
        return None
    some = list(items.values())
    age, ttl = max(found.age for found in some), min(found.ttl for found in some)
    return Found(some[0].headers, body, None, age, ttl, some[0].tier)
