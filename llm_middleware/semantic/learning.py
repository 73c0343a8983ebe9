"""What the verified mode has learnt, family by family: in memory for decisions, and with the index for other
processes and the next start.

Each process learns on by itself. From time to time, behind a request, what it added is merged with what the
others added (`State.merge`), by compare and set, so that labels count once wherever they came from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from random import Random

from .._ports.protocol import Port
from ..errors import CorruptEntryError
from ..stores.per_process import PerProcess
from .calibration import State
from .decision import Decision, Learnt, Policy, decide, learn, report
from .indexing import Index
from .records import Neighbour

__all__ = ["Families", "Family"]

logger = logging.getLogger("llm_middleware")

_MOST = 1000  # families in memory; one is 20 kB
_LABELS = 20  # after so many new ones they are shared
_SECONDS = 30.0  # and after so long, if anything happened
_ATTEMPTS = 5
_LOST = 60.0  # seconds after which nobody shares any more: an event loop ended, or the process was forked


class Family:
    """What was learnt for one family of scopes."""

    def __init__(self, name: str, stored: bytes | None) -> None:
        self.name = name
        self.lock = threading.Lock()
        self.state = _state(name, stored)
        self.base = self.state.to_bytes()  # what of it others have too
        self.lookups = self.labels = 0.0  # at the last sharing
        self.shared_at = time.monotonic()
        self.pause = 0.0  # seconds until it is tried again, after it failed
        self.sharing: float | None = None  # since when somebody shares
        self.tried: tuple[bytes, bytes] | None = None  # what may have been written, though nobody said so
        self.unjudged = 0  # comparisons of this process that gave no label

    def decide(
        self,
        text: str,
        neighbours: Sequence[Neighbour],
        policy: Policy,
        random: Random,
        *,
        teaches: bool = True,
    ) -> Decision:
        with self.lock:
            return decide(
                text, neighbours, self.state, policy, random, teaches=teaches, unjudged=self.unjudged
            )

    def not_judged(self) -> None:
        """A comparison gave no label: it counts in the budget all the same."""
        with self.lock:
            self.unjudged += 1

    def learn(self, decision: Decision, fits: bool) -> Learnt:
        with self.lock:
            return learn(self.state, decision, fits)

    def report(self, probability: float) -> None:
        with self.lock:
            report(self.state, probability)

    def due(self) -> bool:
        """Whether it is time to share."""
        now = time.monotonic()
        with self.lock:
            new = self.state.labels - self.labels
            waited = now - self.shared_at >= _SECONDS and self.state.lookups != self.lookups
            pause = now - self.shared_at >= self.pause
            return self._free(now) and pause and self._worth() and (new >= _LABELS or waited)

    def _worth(self) -> bool:
        """Whether anything was learnt: look-ups alone teach nothing, and of any name that a request makes up
        there would be a state for ever."""
        return self.state.labels > 0 or self.state.checks > 0

    def _free(self, now: float) -> bool:
        return self.sharing is None or now - self.sharing >= _LOST

    def begins(self) -> bool:
        """Whether the caller shares now: one at a time, or labels would count twice."""
        now = time.monotonic()
        with self.lock:
            free = self._free(now)
            if free:
                self.sharing = now
            return free

    def ends(self, *, shared: bool = True) -> None:
        with self.lock:
            self.pause = 0.0 if shared else _SECONDS
            self.sharing, self.shared_at = None, time.monotonic()

    def changed(self) -> bool:
        """Whether there is anything that others do not have."""
        with self.lock:
            return self._worth() and self.state.to_bytes() != self.base


def _state(name: str, stored: bytes | None) -> State:
    if stored is None:
        return State()
    try:
        return State.from_bytes(stored)
    except CorruptEntryError:
        logger.warning("what a semantic cache had learnt (%s) cannot be read and begins anew", name)
        return State()


class Families:
    """``index``: where what is learnt is kept."""

    def __init__(self, index: Index) -> None:
        self._index = index
        # In a forked child nothing: what its parent learnt, its parent shares.
        self._families: PerProcess[OrderedDict[str, Family]] = PerProcess(OrderedDict)
        self._lock = threading.Lock()

    @property
    def _known(self) -> OrderedDict[str, Family]:
        return self._families.mine()

    async def of(self, port: Port, name: str) -> Family:
        """The family of this name; at first from the index, which may raise."""
        with self._lock:
            family = self._known.get(name)
            if family is not None:
                self._known.move_to_end(name)
                return family
        loaded = Family(name, await self._index.state(port, name))
        with self._lock:
            family = self._known.setdefault(name, loaded)
            gone = self._known.popitem(last=False)[1] if len(self._known) > _MOST else None
        if gone is not None and gone.changed():
            port.spawn(lambda: self.share(port, gone))
        return family

    async def share(self, port: Port, family: Family) -> None:
        """Merge with what other processes have learnt, unless that is being done; nothing is lost where it
        fails."""
        if not family.begins():
            return
        shared = False
        try:
            for _ in range(_ATTEMPTS):
                stored = await self._index.state(port, family.name)
                if family.tried is not None and stored == family.tried[0]:
                    await port.blocking(_adopt, family, *family.tried)  # it was written the last time
                merged, mine = await port.blocking(_merged, family, stored)
                family.tried = merged, mine
                shared = await self._index.keep_state(port, family.name, merged, stored)
                if shared:
                    await port.blocking(_adopt, family, merged, mine)
                family.tried = None
                if shared:
                    return
        except Exception as exc:
            logger.debug("a semantic cache could not share what it learnt: %s", exc)
        finally:
            family.ends(shared=shared)

    async def close(self, port: Port) -> None:
        """Share what others do not have yet."""
        for family in self.known():
            if family.changed():
                await self.share(port, family)

    def known(self) -> list[Family]:
        with self._lock:
            return list(self._known.values())


def _merged(family: Family, stored: bytes | None) -> tuple[bytes, bytes]:
    """(what all have learnt, what this process had at that moment)"""
    with family.lock:
        mine = family.state.to_bytes()
    both = State.merge(State.from_bytes(mine), State.from_bytes(family.base), _state(family.name, stored))
    return both.to_bytes(), mine


def _adopt(family: Family, merged: bytes, mine: bytes) -> None:
    """Go on from ``merged``, with what was learnt here meanwhile."""
    with family.lock:
        if family.state.to_bytes() == mine:
            family.state = State.from_bytes(merged)
        else:
            family.state = State.merge(family.state, State.from_bytes(mine), State.from_bytes(merged))
        family.base = merged
        family.lookups, family.labels = family.state.lookups, family.state.labels
