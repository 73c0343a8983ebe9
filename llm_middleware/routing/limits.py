"""Reservations: which of the ranked deployments has room for a call now, counted before the call is made.

Rules that hold here:

* A minute of a deployment begins with its first call; in it no more than ``rpm`` calls and ``tpm`` tokens are
  granted, whatever the strategy, and however many threads and, with `SharedLimits`, processes ask.
* A reservation counts the call and its estimated tokens at once; `settle` puts what was used in the place of
  the estimate, in the minute in which it was reserved.
* A call in flight is counted until its reservation is released: by `settle`, at the end of a ``with`` block,
  or when nothing refers to it any more; once, however many of these happen. Calls in flight, and so
  ``max_parallel_requests``, are of one process.
* A failing Redis fails no call: `SharedLimits` then goes on with what it knows, for this process alone. What
  is granted meanwhile is not told to Redis afterwards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

from .._ports.protocol import Port
from ..caching.breaker import Breaker
from ..errors import ProviderError
from ..stores.redis_limits_script import Limit, Reply, Seen, Told
from .cooldown import CooldownPolicy, blames
from .deployment import Deployment
from .state import DeploymentState, Mean, RouterState

if TYPE_CHECKING:
    from ..stores.redis_limits import RedisLimits  # it brings asyncio

__all__ = ["Limits", "MemoryLimits", "Outcome", "Refusal", "Reservation", "SharedLimits"]

_MINUTE: Final = 60.0
_calls = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Refusal:
    """No candidate has room. ``retry_after``: seconds until the first one's cooldown or minute ends; None
    where that makes no room. ``busy``: some have as many calls in flight as they may have, or one that probes
    them, and are free when that ends."""

    retry_after: float | None
    busy: bool = False


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of a call. ``tokens``: used in all; None: not known, so the estimate stands. ``latency``,
    ``first_token``: seconds until the whole answer and until its first token; None: there was none.
    ``output_tokens``: of the answer. ``error``: why it failed; ``own_key``, ``own_timeout``: under a key, or
    by a timeout, of the caller's. ``abandoned``: the caller ended it; nothing is known of the deployment."""

    tokens: int | None = None
    latency: float | None = None
    first_token: float | None = None
    output_tokens: int = 0
    error: ProviderError | None = None
    own_key: bool = False
    own_timeout: bool = False
    abandoned: bool = False


class Reservation:
    """Room for one call at ``deployment``. ``probe``: the call probes it after a cooldown. ``shared``: Redis
    counts it as well. A context manager that releases it."""

    __slots__ = ("_state", "call", "deployment", "probe", "settled", "shared", "tokens", "window")

    def __init__(
        self,
        deployment: Deployment,
        state: DeploymentState,
        tokens: int,
        *,
        probe: bool,
        shared: bool = False,
    ) -> None:
        self.deployment = deployment
        self.tokens = tokens
        self.window = state.window
        self.probe = probe
        self.shared = shared
        self.settled = False
        self.call = next(_calls)
        self._state = state
        state.flying.add(self.call)

    def release(self) -> None:
        """The call is over. What was reserved stays counted unless it is settled. May be repeated."""
        self._forget()
        if self._state.lines:
            self._state.lines.freed(self.deployment.id)

    def _forget(self) -> None:
        # No lock: a finalizer may run this while its thread has one.
        self._state.flying.discard(self.call)
        if self.probe and self._state.health.prober == self.call:
            self._state.health.prober = 0

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self._forget()  # those who wait look again after a while


class Limits(Protocol):
    """Where calls are counted: `MemoryLimits` or `SharedLimits`."""

    state: RouterState

    async def reserve(
        self, port: Port, candidates: Sequence[Deployment], tokens: int, now: float
    ) -> Reservation | Refusal:
        """Room for one call of about ``tokens`` tokens at the first of ``candidates`` that has any."""
        ...

    def settle(self, reservation: Reservation, outcome: Outcome, now: float, *, alone: bool = False) -> float:
        """Tell what came of the call, once. Releases the reservation. The seconds for which the deployment is
        left alone for it, or 0. ``alone``: there is no other deployment in its group."""
        ...

    def has_room(self, deployment: Deployment, tokens: int, now: float) -> bool:
        """Whether `reserve` would find room there, as far as is known here."""
        ...

    async def close(self, port: Port) -> None:
        """Give back what is open. It may be used again."""
        ...


class MemoryLimits:
    """Limits of one process. ``cooldown``: when failures bench a deployment."""

    def __init__(self, state: RouterState, cooldown: CooldownPolicy | None = None) -> None:
        self.state = state
        self.cooldown = cooldown or CooldownPolicy()

    async def reserve(
        self, port: Port, candidates: Sequence[Deployment], tokens: int, now: float
    ) -> Reservation | Refusal:
        return self.take(candidates, tokens, now)

    def take(self, candidates: Sequence[Deployment], tokens: int, now: float) -> Reservation | Refusal:
        """`reserve`, which waits for nothing."""
        soonest, busy, of = math.inf, False, self.state.of
        with self.state.lock:
            for deployment in candidates:
                state = of(deployment)
                if deployment.max_parallel_requests is not None and full(deployment, state):
                    busy = True
                    continue
                wait = _wait(deployment, state, tokens, now)
                if wait <= 0:
                    return self._granted(deployment, state, tokens, now)
                soonest = min(soonest, wait)
                busy |= wait < math.inf and state.health.prober != 0
        return Refusal(soonest if soonest < math.inf else None, busy)

    def _granted(
        self, deployment: Deployment, state: DeploymentState, tokens: int, now: float
    ) -> Reservation:
        if now >= state.ends:
            state.window, state.ends = -next(_calls), now + _MINUTE
            state.requests = state.tokens = 0
        state.requests += 1
        state.tokens += tokens
        health = state.health
        probe = bool(health.until) and health.admits(now) == "probe"
        reservation = Reservation(deployment, state, tokens, probe=probe)
        if probe:
            health.prober, health.probe_ends = reservation.call, now + self.cooldown.probe_time
        return reservation

    async def close(self, port: Port) -> None:
        """Nothing is open here."""

    def has_room(self, deployment: Deployment, tokens: int, now: float) -> bool:
        state = self.state.of(deployment)
        return not full(deployment, state) and _wait(deployment, state, tokens, now) <= 0

    def settle(self, reservation: Reservation, outcome: Outcome, now: float, *, alone: bool = False) -> float:
        return self.settled(reservation, outcome, now, alone)[0]

    def settled(
        self, reservation: Reservation, outcome: Outcome, now: float, alone: bool
    ) -> tuple[float, Told | None]:
        """`settle`, and what others are to know of it: None where it had been settled before."""
        state = self.state.of(reservation.deployment)
        told = Told(window=reservation.window)
        with self.state.lock:
            if reservation.settled:
                return 0.0, None
            reservation.settled = True
            if outcome.tokens is not None:
                told.tokens = outcome.tokens - reservation.tokens
                if state.window == reservation.window:
                    state.tokens = max(0, state.tokens + told.tokens)
            self._measured(state, outcome, now, told)
            seconds = self._judged(reservation, state, outcome, now, alone, told)
        reservation.release()
        return seconds, told

    def _measured(self, state: DeploymentState, outcome: Outcome, now: float, told: Told) -> None:
        ttl = self.state.latency_ttl
        if outcome.first_token is not None:
            state.first_token.add(outcome.first_token, now, ttl)
            told.first_token, told.first_tokens = outcome.first_token, 1
        elif outcome.latency is not None:
            each = outcome.latency / max(1, outcome.output_tokens)
            state.per_token.add(each, now, ttl)
            told.per_token, told.per_tokens = each, 1

    def _judged(
        self,
        reservation: Reservation,
        state: DeploymentState,
        outcome: Outcome,
        now: float,
        alone: bool,
        told: Told,
    ) -> float:
        health, error, probe = state.health, outcome.error, reservation.probe
        if outcome.abandoned:
            told.freed = probe
            return 0.0
        if error is None:
            told.closed = self.cooldown.succeeded(health, now, probe=probe)
            return 0.0
        if not blames(error, own_key=outcome.own_key, own_timeout=outcome.own_timeout):
            told.freed = probe
            return 0.0
        seconds = self.cooldown.failed(health, error, now, alone=alone, probe=probe)
        told.cool = seconds
        told.closed = probe and not health.until
        told.fails = 0 if seconds or self.cooldown.bucket(error) else 1
        return seconds


class SharedLimits(MemoryLimits):
    """Limits of all processes that use ``store``, one round trip for each reservation.

    What others have used and benched is known here with the next reservation. ``breaker``: asks Redis nothing
    while it fails. Failures that an ``allowed_fails_policy`` counts by class, and the share of failures, are
    counted by each process for itself; cooldowns are everybody's. ``connection``: that of ``store``, if it is
    closed with this.
    """

    def __init__(
        self,
        state: RouterState,
        store: RedisLimits,
        cooldown: CooldownPolicy | None = None,
        *,
        breaker: Breaker | None = None,
        connection: object = None,
    ) -> None:
        super().__init__(state, cooldown)
        self.store = store
        self._breaker = breaker or Breaker()
        self._connection = connection

    async def close(self, port: Port) -> None:
        await port.pull(self.store.close)
        if self._connection is not None:
            await port.store(self._connection, "close")

    async def reserve(
        self, port: Port, candidates: Sequence[Deployment], tokens: int, now: float
    ) -> Reservation | Refusal:
        while True:
            free = [each for each in candidates if not full(each, self.state.of(each))]
            if not free:
                return Refusal(None, bool(candidates))
            reply = await self._asked(port, free, tokens)
            if reply is None:
                return self.take(candidates, tokens, now)
            answer = self._answered(free, len(free) < len(candidates), tokens, reply, now)
            if answer is not None:
                return answer

    async def _asked(self, port: Port, free: Sequence[Deployment], tokens: int) -> Reply | None:
        if not self._breaker.allow():
            return None
        limits = [Limit(each.id, each.rpm, each.tpm) for each in free]
        try:
            reply = await port.store(self.store, "reserve", free[0].group, limits, tokens)
        except Exception:
            self._breaker.failed()
            return None
        self._breaker.succeeded()
        assert isinstance(reply, Reply)
        return reply

    def _answered(
        self, free: Sequence[Deployment], busy: bool, tokens: int, reply: Reply, now: float
    ) -> Reservation | Refusal | None:
        """None where another call took the last place in flight while Redis was asked."""
        with self.state.lock:
            for deployment, seen in zip(free, reply.seen, strict=False):
                _follow(self.state.of(deployment), seen, now)
            if reply.taken is None:
                return Refusal(reply.retry_after, busy or reply.busy)
            deployment = free[reply.taken]
            state = self.state.of(deployment)
            if full(deployment, state):
                back = Told(state.window, tokens=-tokens, requests=-1, freed=reply.probe)
                self.store.tell(deployment.group, deployment.id, back)
                return None
            made = Reservation(deployment, state, tokens, probe=reply.probe, shared=True)
            if reply.probe:
                state.health.prober, state.health.probe_ends = made.call, now + self.cooldown.probe_time
            return made

    def settle(self, reservation: Reservation, outcome: Outcome, now: float, *, alone: bool = False) -> float:
        seconds, told = self.settled(reservation, outcome, now, alone)
        if told is not None:
            if not reservation.shared:
                told.tokens = 0
            self.store.tell(reservation.deployment.group, reservation.deployment.id, told)
        return seconds


def full(deployment: Deployment, state: DeploymentState) -> bool:
    """Whether it has as many calls in flight as it may have."""
    most = deployment.max_parallel_requests
    return most is not None and len(state.flying) >= most


def _wait(deployment: Deployment, state: DeploymentState, tokens: int, now: float) -> float:
    """Seconds until there is room for a call; infinite where there never will be."""
    rpm, tpm = deployment.rpm, deployment.tpm
    wait = state.health.wait(now) if state.health.until else 0.0
    if rpm is None and tpm is None:
        return wait
    if (rpm is not None and rpm < 1) or (tpm is not None and tokens > tpm):
        return math.inf
    if now < state.ends and (
        (rpm is not None and state.requests >= rpm) or (tpm is not None and state.tokens + tokens > tpm)
    ):
        return max(wait, state.ends - now)
    return wait


def _follow(state: DeploymentState, seen: Seen, now: float) -> None:
    """Know what Redis knows."""
    state.window, state.requests, state.tokens = seen.window, seen.requests, seen.tokens
    state.ends = now + seen.left
    health = state.health
    if seen.cool is None:
        health.until = 0.0
    elif seen.cool > 0:
        health.until = now + seen.cool
    elif not 0 < health.until <= now:
        health.until = math.nextafter(now, -math.inf)  # over, and not yet probed
    if seen.fails and (
        health.fails is None or now >= health.fails_end or seen.fails > health.fails.get("", 0)
    ):
        health.fails = {**(health.fails or {}), "": seen.fails}
        health.fails_end = now + seen.fails_left
    for mean, values in ((state.first_token, seen.first_token), (state.per_token, seen.per_token)):
        _follow_mean(mean, values, now)


def _follow_mean(mean: Mean, values: tuple[float, float, float], now: float) -> None:
    total, count, age = values
    if count:
        mean.total, mean.count, mean.at = total, count, now - age
