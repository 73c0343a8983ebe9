"""What a Router knows of its deployments at this moment: usage, calls in flight, latency, health.

All of it is kept by a deployment's id, so it outlives a change of keys; it has a fixed size for each, however
long the process runs. Times are seconds on any one scale that never goes back.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .cooldown import Health
from .deployment import Deployment
from .waiting import Lines

__all__ = ["HALF_LIVES", "LATENCY_TTL", "DeploymentState", "Mean", "RouterState", "View"]

LATENCY_TTL: Final = 60.0  # seconds
HALF_LIVES: Final = 4  # of a latency in its time to live

_living: Final[weakref.WeakSet[RouterState]] = weakref.WeakSet()


class Mean:
    """A mean in which a value counts half after a quarter of ``ttl`` seconds. After ``ttl`` seconds without a
    new one nothing is known any more: what follows begins anew."""

    __slots__ = ("at", "count", "total")

    def __init__(self) -> None:
        self.at = 0.0
        self.count = self.total = 0.0

    def add(self, value: float, now: float, ttl: float) -> None:
        age = max(0.0, now - self.at)
        kept = 0.0 if age > ttl else 0.5 ** (age * HALF_LIVES / ttl)
        self.total = self.total * kept + value
        self.count = self.count * kept + 1.0
        self.at = now

    def value(self, now: float, ttl: float) -> float | None:
        """The mean; None where nothing is known."""
        if not self.count or now - self.at > ttl:
            return None
        return self.total / self.count


class DeploymentState:
    """Of one deployment. ``window``: which minute ``requests`` and ``tokens`` count, until ``ends``; negative
    where only this process knows it. ``flying``: the calls in flight, one number for each.
    ``first_token``, ``per_token``: seconds until the first token of streams, and for each token of others.
    ``lines``: those of its Router."""

    __slots__ = (
        "ends",
        "first_token",
        "flying",
        "health",
        "lines",
        "per_token",
        "requests",
        "tokens",
        "window",
    )

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.window = 0
        self.ends = float("-inf")
        self.requests = self.tokens = 0
        # A set, as adding and discarding are atomic and can be repeated: a finalizer may do it.
        self.flying: set[int] = set()
        self.health = Health()
        self.first_token = Mean()
        self.per_token = Mean()

    @property
    def in_flight(self) -> int:
        """Calls that this process has begun and not ended."""
        return len(self.flying)

    def used(self, now: float) -> int:
        """Tokens of the minute that runs, estimates of calls in flight included."""
        return self.tokens if now < self.ends else 0


class RouterState:
    """Of all deployments of one Router. ``latency_ttl``: seconds after which a deployment that had no call is
    tried again, whatever it took before. ``lines``: of calls that wait for room. Changes are made under
    ``lock``; reading takes none."""

    __slots__ = ("__weakref__", "_states", "latency_ttl", "lines", "lock")

    def __init__(self, *, latency_ttl: float = LATENCY_TTL) -> None:
        self.latency_ttl = latency_ttl
        # Reentrant: a stream that is collected ends its call in whichever thread allocates just then.
        self.lock = threading.RLock()
        self.lines = Lines()
        self._states: dict[str, DeploymentState] = {}
        _living.add(self)

    def of(self, deployment: Deployment) -> DeploymentState:
        state = self._states.get(deployment.id)
        if state is None:
            state = self._states.setdefault(deployment.id, DeploymentState(self.lines))
        return state

    def keep(self, deployments: Iterable[Deployment]) -> None:
        """Forget every deployment that is none of these."""
        ids = {deployment.id for deployment in deployments}
        for gone in self._states.keys() - ids:
            self._states.pop(gone, None)

    def forked(self) -> None:
        """This is a child of the process that has made the calls in flight; they do not end here."""
        self.lock = threading.RLock()
        self.lines.clear()
        for state in self._states.values():
            state.flying.clear()
            state.health.prober = 0


@dataclass(slots=True)
class View:
    """What a strategy may look at for one call. ``max_tokens``: of the answer, where the caller says so.
    ``stream``: whether it is streamed."""

    state: RouterState
    now: float
    prompt_tokens: int = 0
    max_tokens: int | None = None
    stream: bool = False


def _forked() -> None:
    for state in tuple(_living):
        state.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
