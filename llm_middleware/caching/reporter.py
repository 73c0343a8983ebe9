"""`Reporter`: tells hooks, counters and the log what the cache does; what fails in it stays in it."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Awaitable, Sequence

from ..events import Event, Hook
from .answer import CacheInfo, Found
from .plan import Plan

__all__ = ["Reporter"]

logger = logging.getLogger("llm_middleware")


class Reporter:
    """``tier``: the name of the store that is reported on."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = tuple(hooks)
        self.tier = "memory"
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._failing: set[str] = set()

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1

    def tell_found(self, plan: Plan, found: Found) -> None:
        """`tell`, for a stored answer: on the hit path no record is made that nobody looks at."""
        if not self.hooks:
            self._count("hit")
            return
        self.tell(plan, found.info(plan.digest))

    def emit(self, event: Event) -> None:
        self._count(event.name)
        for hook in self.hooks:
            try:
                result = hook(event)
                if result is not None and isinstance(result, Awaitable):
                    self._detach(result)
            except Exception:
                self._hook_failed()

    def _detach(self, work: Awaitable[object]) -> None:
        from .._ports.detached import detached  # on first use: it brings asyncio

        detached(self._watched(work))

    async def _watched(self, work: Awaitable[object]) -> None:
        try:
            await work
        except Exception:
            self._hook_failed()

    def _hook_failed(self) -> None:
        with self._lock:
            self.counts["hook-error"] += 1
            first = self.counts["hook-error"] == 1
        if first:
            logger.exception("a hook failed; further failures are only counted")

    def tell(self, plan: Plan, info: CacheInfo) -> None:
        """One event about an answer given."""
        hit = info.status in ("hit", "stale", "semantic-hit")
        name = "hit" if hit else info.status
        if not self.hooks:
            self._count(name)
            return
        self.emit(
            Event(
                name,
                plan.kind,
                info.key,
                hit,
                plan.stream,
                plan.model,
                info.detail,
                info.tier,
                info.age,
                similarity=info.similarity,
            )
        )

    def store_failed(self, kind: str, key: str, error: BaseException, operation: str = "") -> None:
        """The store failed, and the request goes on. Logged once for each burst of failures."""
        with self._lock:
            first = not self._failing
            self._failing.add(operation)
        self.emit(Event("store-error", kind, key, tier=self.tier, error=error))
        (logger.warning if first else logger.debug)(
            "cache store %s failed: %s: %s", self.tier, type(error).__name__, error
        )

    def store_answered(self, operation: str) -> None:
        """``operation`` works. When all that failed do again, the next failure begins another burst."""
        if self._failing:
            with self._lock:
                self._failing.discard(operation)

    def background_failed(self, plan: Plan, error: BaseException) -> None:
        """A refresh behind a stale answer failed; the stale answer stays."""
        self.emit(Event("refresh-error", plan.kind, plan.digest, model=plan.model, error=error))
        logger.warning("a background refresh failed: %s: %s", type(error).__name__, error)
