"""`Teacher`: has pairs of answers judged behind their requests, and tells the verified mode what came of
it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from .._ports.protocol import Port
from ..caching.fastlane import select
from ..caching.memo import Memo
from ..types import Clock
from .answers import answer_text
from .decision import Decision
from .indexing import Index
from .judges import Judge, Pair
from .learning import Families
from .tally import Tally

if TYPE_CHECKING:
    from ..caching.plan import Plan
    from ..caching.tiers import Tiers

__all__ = ["Teacher"]


def _with(decision: Decision, told: Mapping[str, object] | None) -> Decision:
    """``decision``, whose neighbour's payload has what was written ``told`` since it was read."""
    near = decision.neighbour
    if near is None or told is None:
        return decision
    was, now = near.row.payload.get("not"), told.get("not")
    blocked = [name for names in (was, now) if isinstance(names, list) for name in names]
    payload = {**near.row.payload, **told, **({"not": list(dict.fromkeys(blocked))} if blocked else {})}
    return replace(decision, neighbour=replace(near, row=replace(near.row, payload=payload)))


_JUDGING = 60.0  # seconds that a judge may take
_LOST = 2 * _JUDGING  # after which nobody judges any more: an event loop ended, or the process was forked
_MOST_JUDGED = 32  # at one time
_SERVED = 10_000  # answers served by meaning, of which a report can teach something
_UNKNOWN = 0.5  # how sure of an answer one was that another process, or the exact tier, may have served


class Teacher:
    """``families``: what learns."""

    def __init__(
        self, judge: Judge, families: Families, index: Index, tiers: Tiers, clock: Clock, tally: Tally
    ) -> None:
        self.judge, self.families = judge, families
        self._index, self._tiers, self._clock, self._tally = index, tiers, clock, tally
        self._served: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._judging: dict[object, float] = {}  # since when
        self._told: Memo[str, Mapping[str, object]] = Memo(1000, 1 << 30)  # payloads, as written last
        self._lock = threading.Lock()

    def begin(self, port: Port, plan: Plan, family: str, decision: Decision, body: bytes) -> None:
        """Have the answer that ``decision`` explored compared with the fresh one, beside the caller."""
        turn = object()
        if not self._begins(turn):
            self._tally.add("judge-busy")
            return
        try:
            port.spawn(lambda: self._compare(port, plan, family, decision, body, turn))
        except BaseException:
            self._ended(turn)
            raise

    def _begins(self, turn: object) -> bool:
        now = time.monotonic()
        with self._lock:
            if len(self._judging) >= _MOST_JUDGED:
                self._judging = {each: since for each, since in self._judging.items() if now - since < _LOST}
            if len(self._judging) >= _MOST_JUDGED:
                return False
            self._judging[turn] = now
            return True

    def _ended(self, turn: object) -> None:
        with self._lock:
            self._judging.pop(turn, None)

    async def _compare(
        self, port: Port, plan: Plan, family: str, decision: Decision, body: bytes, turn: object
    ) -> None:
        try:
            fits = await self._verdict(port, plan, decision, body)
            self._tally.add("unjudged" if fits is None else "judged-right" if fits else "judged-wrong")
            if fits is None:
                await self._unjudged(port, family)
            else:
                await self._learn(port, plan, family, decision, fits=fits)
            self._tally.worked("judging")
        except Exception as exc:
            self._tally.add("judge-error")
            await self._unjudged(port, family)
            self._tally.failed(exc, "judging")
        finally:
            self._ended(turn)

    async def _unjudged(self, port: Port, family: str) -> None:
        with contextlib.suppress(Exception):
            (await self.families.of(port, family)).not_judged()

    async def _verdict(self, port: Port, plan: Plan, decision: Decision, body: bytes) -> bool | None:
        assert decision.neighbour is not None
        row = decision.neighbour.row
        answer, fresh = await self._stored_text(port, plan, row.key), answer_text(plan.kind, body)
        if answer is None or fresh is None:
            return None
        pair = Pair(row.text, answer, decision.text, fresh)
        said = await port.store(self.judge, "judge", pair, budget=_JUDGING)
        return said if isinstance(said, bool) else None

    async def _stored_text(self, port: Port, plan: Plan, key: str) -> str | None:
        entry, tier = await self._tiers.get(port, plan.kind, key)
        if entry is None:
            if await self._tiers.gone(port, key):
                await self._index.remove(port, [key])
            return None
        for stream in (False, True):
            found = select(entry, replace(plan, stream=stream), self._clock(), tier)
            if found is not None:
                return answer_text(plan.kind, found.body)
        return None

    async def _learn(self, port: Port, plan: Plan, family: str, decision: Decision, *, fits: bool) -> None:
        assert decision.neighbour is not None
        known = await self.families.of(port, family)
        key = decision.neighbour.row.key
        with self._lock:  # what others judged of this row meanwhile is not to be lost
            decision = _with(decision, self._told.get(key))
            learnt = known.learn(decision, fits)
            self._told.put(key, learnt.payload)
        await self._index.update(port, key, learnt.payload)
        if learnt.group is not None:
            await self._index.update(port, plan.key, {"group": learnt.group})
        if known.due():
            await self.families.share(port, known)

    # --- what users say

    def served(self, key: str, family: str, decision: Decision) -> None:
        """The answer under ``key`` (64 hex digits) was served by this decision."""
        with self._lock:
            self._served[key] = family, decision.probability
            self._served.move_to_end(key)
            if len(self._served) > _SERVED:
                self._served.popitem(last=False)

    async def report(self, port: Port, key: str, family: str | None) -> None:
        """Somebody says that the answer under ``key`` was wrong. ``family``: of its question, if that is
        known."""
        with self._lock:
            served = self._served.pop(key[-64:], None)
        if served is None and family is None:
            return
        name, probability = served or (str(family), _UNKNOWN)
        known = await self.families.of(port, name)
        known.report(probability)
        await self.families.share(port, known)
