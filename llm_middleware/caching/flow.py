"""The flow of one request: look up, join or lead a flight, call, admit, store.

Written once, as coroutines that await only their port; the sync face drives them without an event loop.
A failure of the store, of a hook or of the host's own predicate is counted and logged, and the request
goes on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .._ports.protocol import Port
from ..errors import NOT_CACHED, CacheMissError
from ..types import Clock
from .answer import Found
from .fastlane import no_header
from .flight import ABANDONED, Flight, FlightTable
from .keeper import Keeper
from .lookup import Header, Lookup, Opened
from .memo import Memo
from .peers import Peers
from .plan import Plan
from .reporter import Reporter
from .settings import CacheSettings
from .tiers import Tiers

if TYPE_CHECKING:
    from ..semantic.tier import SemanticTier

__all__ = ["Flow"]


class Flow:
    """The machinery of one cache: its store, flights, clock, hooks and counters. ``semantic``: where
    questions of like meaning are looked for, if they are."""

    def __init__(
        self,
        settings: CacheSettings,
        tiers: Tiers,
        *,
        clock: Clock,
        reporter: Reporter,
        semantic: SemanticTier | None = None,
    ) -> None:
        self.settings = settings
        self.tiers = tiers
        self.reporter = reporter
        self.lookup = Lookup(tiers, clock)
        self.semantic = semantic
        self.keeper = Keeper(settings, tiers, clock, reporter, semantic)
        self.flights = FlightTable()
        self._by_meaning: Memo[str, bool] = Memo(10_000, 1 << 30)  # keys that were answered so
        self.now = self.lookup.now
        self.tell = self.reporter.tell
        self.tell_found = self.reporter.tell_found

    def update(self, settings: CacheSettings) -> None:
        """Requests that begin from now on see these settings."""
        self.settings = self.keeper.settings = settings
        if self.semantic is not None:
            self.semantic.update(settings.secret)

    async def open(self, port: Port, plan: Plan, header: Header = no_header) -> Opened:
        """Find a stored answer, or a flight to join or to lead."""
        landed = self.flights.landed
        opened = await self.lookup.look(port, plan, header)
        if opened.found is not None:
            return opened
        if plan.controls.only_if_cached:
            await self._seek(port, plan, header, opened)
            if opened.found is None:
                raise CacheMissError(NOT_CACHED)
            return opened
        if not (plan.lookup and plan.store):
            await self._seek(port, plan, header, opened)
            if opened.found is None:
                opened.flight, opened.leads = self.flights.solo(plan.key), True
            return opened
        if self._by_meaning.get(plan.key):  # those who ask it at once need not wait for one another
            await self._seek(port, plan, header, opened)
            if opened.found is not None:
                return opened
        flight, leads = self.flights.join(self._flight_key(plan))
        if leads and flight.joinable:
            try:
                opened = await self._lead(port, plan, header, opened, flight, landed)
            except BaseException:
                self._abandon(flight)
                raise
            if opened.found is not None:
                if opened.found.like is not None:
                    self._by_meaning.put(plan.key, True)
                self._abandon(flight)
                return opened
        opened.flight, opened.leads = flight, leads
        return opened

    async def find(self, port: Port, plan: Plan) -> Found | None:
        """A stored answer, to this question or to one of the same meaning, or None."""
        found = await self.lookup.find(port, plan)
        opened = Opened(found)
        await self._seek(port, replace(plan, store=False), no_header, opened)  # no answer comes of it
        return opened.found

    async def _lead(
        self, port: Port, plan: Plan, header: Header, opened: Opened, flight: Flight, landed: int
    ) -> Opened:
        """Look again where an answer may have come since; and see that no other process calls too."""
        if self.flights.landed != landed:
            # A flight ended between our look and our lead: what it stored may answer.
            opened = await self.lookup.look(port, plan, header)
        await self._seek(port, plan, header, opened)
        peers = self.tiers.peers
        if (
            opened.found is not None
            or peers is None
            or plan.items
            or self.settings.single_flight != "shared"
            or not hasattr(self.tiers.store, "claim")
        ):
            return opened
        return await self._claim(port, plan, header, opened, flight, peers)

    async def _seek(self, port: Port, plan: Plan, header: Header, opened: Opened) -> None:
        """Where there is no answer to this question, look for one to another of the same meaning."""
        if self.semantic is None or opened.found is not None or opened.beside is not None:
            return
        if opened.sought is not None:  # before the lead
            return
        if plan.lookup and plan.form is not None:
            opened.sought = await self.semantic.find(port, plan, header)
            opened.found = opened.sought.found

    async def _claim(
        self, port: Port, plan: Plan, header: Header, opened: Opened, flight: Flight, peers: Peers
    ) -> Opened:
        """Lead the call for all processes, or wait for the answer of the one that does."""
        lease = peers.lease(plan.key, flight.key.rpartition("/")[2])
        current = opened

        async def attempt() -> bool:
            nonlocal current
            try:
                claimed, entry = await self.tiers.claim(port, plan, lease)
            except Exception as exc:
                self.tiers.failed(plan, exc, "claim")
                return True
            try:
                # Also where there is none any more: what was removed must not be stored beside the answer.
                judged = entry and self.lookup.judge(entry, plan, self.tiers.tier, header)
                current = judged or Opened()
            except BaseException:
                if claimed is not None:
                    peers.give_up(claimed, "freed")
                raise
            if current.found is None and claimed is not None:
                peers.hold(flight, claimed)
            elif claimed is not None:
                peers.give_up(claimed)
            return current.found is not None or claimed is not None

        await peers.wait(port, plan.key, lease, attempt, self.settings.single_flight_wait)
        current.sought = opened.sought
        return current

    def _abandon(self, flight: Flight) -> None:
        self.flights.land(flight)
        flight.end(ABANDONED)

    @staticmethod
    def _flight_key(plan: Plan) -> str:
        # Only those who want the same form can read along: a stream is no plain body.
        return f"{plan.key}/{plan.stream:d}{plan.usage:d}"
