"""`Lookup`: from a plan to a stored answer, through whatever store there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .._ports.protocol import Port
from ..errors import CorruptEntryError
from ..types import Clock
from .answer import Found
from .batch import Batch, joined, reduced
from .entry import Entry, decode
from .fastlane import no_header, select, usable_on_error
from .flight import Flight
from .plan import Plan
from .reporter import Reporter

__all__ = ["Header", "Lookup", "Opened"]

Header = Callable[[str], str]


@dataclass(slots=True)
class Opened:
    """How a request begins: with a stored answer, behind another caller, or as the one that calls.

    ``beside``: an entry that lives but lacks the form asked for; the new answer joins it.
    ``fallback``: an answer to give if the call fails. ``batch``: of a list of embeddings, what is stored.
    """

    found: Found | None = None
    flight: Flight | None = None
    leads: bool = False
    beside: Entry | None = None
    fallback: Found | None = None
    batch: Batch | None = None

    def forwarded(self, body: bytes) -> bytes | None:
        """The body for the handler where some of a list's embeddings are stored, else None."""
        if self.batch is None or self.batch.whole:
            return None
        fewer = reduced(body, self.batch)
        assert isinstance(fewer, bytes)
        return fewer


class Lookup:
    def __init__(self, store: object, clock: Clock, reporter: Reporter) -> None:
        self.store = store
        self.objects = bool(getattr(store, "objects", False))
        self.clock = clock
        self.reporter = reporter
        self.tier = reporter.tier

    def now(self, plan: Plan, header: Header = no_header) -> Found | None:
        """The fast lane: an answer from process memory, with no wait."""
        if not self.objects or not plan.lookup:
            return None
        if plan.items:
            return self._whole_batch(plan, self.store.get, header)  # type: ignore[attr-defined]
        entry = self.store.get(plan.key)  # type: ignore[attr-defined]
        return None if entry is None else select(entry, plan, self.clock(), self.tier, header)

    def _item(self, entry: Entry | None, plan: Plan, header: Header) -> Found | None:
        if entry is None or entry.kind != plan.kind:
            return None
        found = select(entry, plan, self.clock(), self.tier, header)
        return found if found is not None and found.stale is None else None

    def _whole_batch(self, plan: Plan, get: Callable[[str], Entry | None], header: Header) -> Found | None:
        """The answer to a list of embeddings where every one of them is in memory."""
        items = {}
        for key in plan.items:
            if key not in items:
                found = self._item(get(key), plan, header)
                if found is None:
                    return None
                items[key] = found
        return _joined_found(plan, items)

    async def _look_batch(self, port: Port, plan: Plan, header: Header) -> Opened:
        items: dict[str, Found] = {}
        if plan.lookup:
            for key in dict.fromkeys(plan.items):
                entry = await self.entry(port, replace(plan, key=key))
                found = self._item(entry, plan, header)
                if found is not None:
                    items[key] = found
        if len(items) == len(set(plan.items)):
            whole = _joined_found(plan, items)
            if whole is not None:
                return Opened(whole)
        first = next(iter(items.values()), None)
        bodies = {key: found.body for key, found in items.items()}
        return Opened(batch=Batch(plan.items, bodies, () if first is None else first.headers))

    async def entry(self, port: Port, plan: Plan) -> Entry | None:
        """The stored entry, whatever its age; None where there is none or the store fails."""
        try:
            value = await port.store(self.store, "get", plan.key)
            if value is None or isinstance(value, Entry):
                return value
            entry = decode(value)  # type: ignore[arg-type]
        except CorruptEntryError as exc:
            self.reporter.store_failed(plan.kind, plan.key, exc)
            await self._remove(port, plan)
            return None
        except Exception as exc:
            self.reporter.store_failed(plan.kind, plan.key, exc)
            return None
        return entry if entry.kind == plan.kind else None

    async def find(self, port: Port, plan: Plan, header: Header = no_header) -> Found | None:
        """A stored answer that fits, or None."""
        if plan.items:
            return (await self._look_batch(port, plan, header)).found
        entry = await self.entry(port, plan)
        return None if entry is None else select(entry, plan, self.clock(), self.tier, header)

    async def look(self, port: Port, plan: Plan, header: Header) -> Opened:
        if plan.items:
            return await self._look_batch(port, plan, header)
        entry = await self.entry(port, plan)
        if entry is None:
            return Opened()
        now = self.clock()
        if plan.lookup:
            found = select(entry, plan, now, self.tier, header)
            if found is not None:
                return Opened(found)
        fallback = usable_on_error(entry, plan, now, self.tier, header)
        lacks_form = plan.lookup and entry.expires > now and plan.simple
        return Opened(beside=entry if lacks_form else None, fallback=fallback)

    async def _remove(self, port: Port, plan: Plan) -> None:
        try:
            await port.store(self.store, "delete", [plan.key])
        except Exception as exc:
            self.reporter.store_failed(plan.kind, plan.key, exc)


def _joined_found(plan: Plan, items: dict[str, Found]) -> Found | None:
    try:
        body = joined(plan.items, {key: found.body for key, found in items.items()})
    except ValueError:
        return None
    some = list(items.values())
    age, ttl = max(found.age for found in some), min(found.ttl for found in some)
    return Found(some[0].headers, body, None, age, ttl, some[0].tier)
