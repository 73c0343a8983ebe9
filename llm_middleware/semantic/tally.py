"""`Tally`: what a semantic tier counts, and what of it is told."""

from __future__ import annotations

import logging
import threading
from collections import Counter

__all__ = ["Tally"]

logger = logging.getLogger("llm_middleware")


class Tally:
    """Counters by name; those of look-ups are ``hit:<how>`` and ``miss:<why>``."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._expected = 0.0
        self._lock = threading.Lock()
        self._failing: set[str] = set()

    def add(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def looked(self, *, hit: bool, detail: str) -> None:
        with self._lock:
            self._counts["lookups"] += 1
            self._counts[f"{'hit' if hit else 'miss'}:{detail}"] += 1

    def served(self, probability: float) -> None:
        """An answer was served that is right with this probability."""
        with self._lock:
            self._expected += 1.0 - probability

    def failed(self, error: Exception, doing: str) -> None:
        """Something failed and its request went on. Logged once for each burst of failures in ``doing`` one
        thing: searching may go on while storing fails."""
        self.add("error")
        first = doing not in self._failing
        self._failing.add(doing)
        (logger.warning if first else logger.debug)(
            "the semantic cache failed at %s: %s: %s", doing, type(error).__name__, error
        )

    def worked(self, doing: str) -> None:
        self._failing.discard(doing)

    def told(self, *, bounded: bool) -> dict[str, object]:
        """``lookups``; of them ``hits`` and ``misses`` by their details; ``exact_only``, by its reasons, what
        could not be looked up; whatever else was counted; and as shares of look-ups ``hit_rate`` and, where a
        bound is kept to (``bounded``), ``error_rate``: of the wrong answers that are expected among those
        served."""
        with self._lock:
            counts, expected = dict(self._counts), self._expected
        lookups = counts.pop("lookups", 0)
        hits = {name[4:]: count for name, count in counts.items() if name[:4] == "hit:"}
        return {
            "lookups": lookups,
            "hits": hits,
            "misses": {name[5:]: count for name, count in counts.items() if name[:5] == "miss:"},
            "exact_only": {name[6:]: count for name, count in counts.items() if name[:6] == "exact:"},
            **{name: count for name, count in counts.items() if ":" not in name},
            "hit_rate": sum(hits.values()) / lookups if lookups else None,
            "error_rate": expected / lookups if lookups and bounded else None,
        }
