"""`Reporter`: tells hooks, counters and the log what the cache does; what fails in it stays in it."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence

from ..events import Event, Hook
from .answer import CacheInfo
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

    def emit(self, event: Event) -> None:
        with self._lock:
            self.counts[event.name] += 1
        for hook in self.hooks:
            try:
                hook(event)
            except Exception:
                with self._lock:
                    self.counts["hook-error"] += 1
                    first = self.counts["hook-error"] == 1
                if first:
                    logger.exception("a cache hook failed; further failures are only counted")

    def tell(self, plan: Plan, info: CacheInfo) -> None:
        """One event about an answer given."""
        hit = info.status == "hit" or info.status == "stale"
        name = "hit" if hit else info.status
        if not self.hooks:  # the hit path: nobody would see the event
            with self._lock:
                self.counts[name] += 1
            return
        self.emit(
            Event(name, plan.kind, info.key, hit, plan.stream, plan.model, info.detail, info.tier, info.age)
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
