"""When a stored answer is served for a question of like meaning: by one threshold, or under a bound."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, Protocol

from .._ports.protocol import Port
from .decision import Decision, Policy
from .embed_cache import CachedEmbedder
from .learning import Families
from .records import Neighbour
from .static_mode import decide_static, shipped_pairs, threshold_for

__all__ = ["Mode", "Static", "Verified"]

logger = logging.getLogger("llm_middleware")

_AGAIN = 60.0  # seconds until a threshold that was not found is looked for again


class Mode(Protocol):
    async def decide(
        self, port: Port, family: str, text: str, neighbours: Sequence[Neighbour], *, teaches: bool = True
    ) -> Decision: ...


class Static:
    """One cosine for all, and guards. ``threshold``: the cosine. ``error_target``: in its place, the share of
    wrong answers for which the shipped pairs give one; until that is known, beside the first look-ups,
    nothing is served."""

    def __init__(
        self, embedder: CachedEmbedder, threshold: float | None, error_target: float | None = None
    ) -> None:
        self.threshold = threshold
        self._embedder = embedder
        self._target = error_target
        self._lock = threading.Lock()
        self._measure_at = 0.0

    async def decide(
        self, port: Port, family: str, text: str, neighbours: Sequence[Neighbour], *, teaches: bool = True
    ) -> Decision:
        if self.threshold is None:
            if self._due():
                port.spawn(lambda: self.measure(port))
            similarity = neighbours[0].similarity if neighbours else 0.0
            return Decision("miss", None, 0.0, similarity, "learning" if neighbours else "none")
        return decide_static(text, neighbours, self.threshold)

    def _due(self) -> bool:
        now = time.monotonic()
        with self._lock:
            due = now >= self._measure_at
            if due:
                self._measure_at = now + _AGAIN
            return due

    async def measure(self, port: Port) -> None:
        """Find the threshold: embeds 500 short texts."""
        assert self._target is not None
        try:
            texts = list(dict.fromkeys(text for pair in shipped_pairs() for text in pair[:2]))
            vectors: Any = await port.store(self._embedder, "embed", texts)
            known = dict(zip(texts, vectors, strict=True))
            self.threshold = threshold_for(self._target, lambda asked: [known[text] for text in asked])
        except Exception as exc:
            logger.warning("no threshold for static_error_target yet: %s: %s", type(exc).__name__, exc)


class Verified:
    """``policy``: the bound and what may be spent on keeping it. ``shadow``: nothing is served; what would be
    is compared with the fresh answer instead."""

    threshold = None

    def __init__(self, families: Families, policy: Policy, *, shadow: bool = False, seed: int | None = None):
        self.families = families
        self.policy = replace(policy, shadow=shadow)
        self._random = Random(seed)

    async def decide(
        self, port: Port, family: str, text: str, neighbours: Sequence[Neighbour], *, teaches: bool = True
    ) -> Decision:
        known = await self.families.of(port, family)
        decision = known.decide(text, neighbours, self.policy, self._random, teaches=teaches)
        if known.due():
            port.spawn(lambda: self.families.share(port, known))
        return decision
