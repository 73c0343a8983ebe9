"""The way of one routed call: choose, reserve, attempt; retry elsewhere; fall back to other groups.

Written once, as coroutines that await only their port and their transport; the sync face drives them without
an event loop. One deadline holds for everything: attempts, waits, fallbacks and the reading of the answer.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from .._ports.protocol import Port
from ..errors import DeadlineError, ModelNotFoundError, NoCapacityError, NotFoundError, ProviderError
from ..providers.messages import Timeouts, Transport
from ..providers.registry import Registry
from ..providers.target import Target, target_of
from .attempt import Attempt, within
from .deployment import Deployment
from .fallback import Fallbacks
from .limits import Limits, Outcome, Refusal, Reservation
from .model_list import Groups
from .response import RouteInfo
from .retry import Retries
from .select import fitting, prompt_tokens, tagged, tags_of, without_tags
from .state import RouterState, View
from .strategies import Strategy, rank_by_order

__all__ = ["Asked", "RoutedCall", "Routing"]

_POLL = 0.02  # seconds between looks for a place in flight


@dataclass(slots=True, kw_only=True)
class Routing:
    """What all calls of a Router share. Times are seconds."""

    groups: Groups
    providers: Registry
    strategy: Strategy
    limits: Limits
    state: RouterState
    retries: Retries
    fallbacks: Fallbacks
    timeouts: Timeouts
    timeout: float | None = None
    stream_timeout: float | None = None
    max_fallbacks: int = 5
    wait_for_capacity: float = 0.0
    check_windows: bool = False
    filter_tags: bool = False
    clock: Callable[[], float] = time.monotonic
    random: Random = field(default_factory=Random)
    targets: dict[str, Target] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Asked:
    """One request. ``timeout``: seconds, of the caller's. ``fallbacks``: groups of this request's own.
    ``connection``: credentials and addresses of the caller's own. ``may_use``: whether the caller may use a
    group, which fallbacks ask."""

    kind: str
    body: Mapping[str, object]
    stream: bool = False
    timeout: float | None = None
    fallbacks: Sequence[str] = ()
    num_retries: int | None = None
    connection: Mapping[str, object] = field(default_factory=dict)
    may_use: Callable[[str], bool] | None = None


class RoutedCall:
    """One call on its way. ``route`` tells of it, also where it fails."""

    def __init__(
        self, routing: Routing, port: Port, transport: Transport, asked: Asked, route: RouteInfo
    ) -> None:
        self.routing = routing
        self.port = port
        self.transport = transport
        self.asked = asked
        self.route = route
        self.tokens = prompt_tokens(asked.body)
        general = routing.stream_timeout if asked.stream and routing.stream_timeout else routing.timeout
        allowed = general if asked.timeout is None else asked.timeout
        self.deadline = None if allowed is None else routing.clock() + allowed

    async def run(self) -> bytes | AsyncIterator[bytes]:
        """The answer's bytes, or the events of its stream. Raises `ProviderError`."""
        routing, asked = self.routing, self.asked
        seen = {self.route.asked}
        pending = [self.route.asked]
        calls = -1
        error: ProviderError | None = None
        while pending and calls < routing.max_fallbacks and not (error and self._late()):
            group = pending.pop(0)
            deployments = routing.groups.find(group)
            if not deployments:
                if error is None:
                    raise ModelNotFoundError(f"the model {group!r} does not exist", param="model")
                continue
            calls += 1
            try:
                answer = await self._group(group, deployments)
            except ProviderError as exc:
                error = exc if error is None or calls == 0 else error
                for other in routing.fallbacks.after(exc, group, asked.fallbacks):
                    if other not in seen and (asked.may_use is None or asked.may_use(other)):
                        seen.add(other)
                        pending.append(other)
                continue
            self.route.model, self.route.fallback = group, calls > 0
            return answer
        assert error is not None
        raise error

    async def _group(self, group: str, deployments: Sequence[Deployment]) -> bytes | AsyncIterator[bytes]:
        """One group's answer, after as many attempts as it may have."""
        routing = self.routing
        if routing.filter_tags:
            deployments = tagged(deployments, tags_of(self.asked.body))
            if not deployments:
                raise NotFoundError("no deployment of this model has one of these tags", param="metadata")
        if routing.check_windows:
            deployments = fitting(deployments, self.tokens)
        retries = routing.retries if self.asked.num_retries is None else self._own_retries()
        tried: set[str] = set()
        made = 0
        last: ProviderError | None = None
        while True:
            try:
                reservation = await self._reserve(deployments, tried)
            except NoCapacityError as exc:
                raise last or exc from None  # why nobody is left says more than that nobody is
            deployment = reservation.deployment
            try:
                return await self._attempt(reservation, alone=len(deployments) == 1)
            except ProviderError as exc:
                last = exc
                tried.add(deployment.id)
                self.route.failures.append((deployment.id, exc.code))
                decision = retries.after(
                    exc,
                    made=made,
                    another=self._another(deployments, tried),
                    now=routing.clock(),
                    random=routing.random,
                    deadline=self.deadline,
                )
                if decision.action == "give up":
                    raise
                made += 1
                if decision.seconds:
                    await self.port.waiter().wait(decision.seconds)

    def _late(self) -> bool:
        return self.deadline is not None and self.routing.clock() >= self.deadline

    def _own_retries(self) -> Retries:
        from dataclasses import replace

        assert self.asked.num_retries is not None
        return replace(self.routing.retries, num_retries=self.asked.num_retries, retry_policy=None)

    def _another(self, deployments: Sequence[Deployment], tried: set[str]) -> bool:
        now, state = self.routing.clock(), self.routing.state
        return any(each.id not in tried and state.of(each).health.admits(now) != "no" for each in deployments)

    async def _reserve(self, deployments: Sequence[Deployment], tried: set[str]) -> Reservation:
        """Room at a deployment that was not tried yet, else at any. Waits for it as long as it may."""
        routing = self.routing
        until = routing.clock() + routing.wait_for_capacity
        while True:
            refusal: Refusal | None = None
            for candidates in (
                [each for each in deployments if each.id not in tried],
                [each for each in deployments if each.id in tried],
            ):
                if not candidates:
                    continue
                now = routing.clock()
                view = View(routing.state, now, self.tokens, self._max_tokens(), self.asked.stream)
                ranked = rank_by_order(routing.strategy, candidates, view, routing.random)
                result = await routing.limits.reserve(self.port, ranked, self.tokens, now)
                if isinstance(result, Reservation):
                    return result
                refusal = _sooner(refusal, result)
            assert refusal is not None
            await self._wait(refusal, until)

    async def _wait(self, refusal: Refusal, until: float) -> None:
        """Until there may be room again. `NoCapacityError` where that is too long."""
        now = self.routing.clock()
        end = until if self.deadline is None else min(until, self.deadline)
        pause = _POLL if refusal.busy else refusal.retry_after
        if pause is None or now >= end or (not refusal.busy and now + pause > end):
            raise NoCapacityError(
                "no deployment of this model is free: all are at their limits or cooling down",
                retry_after=refusal.retry_after,
            )
        await self.port.waiter().wait(min(pause, end - now))

    def _max_tokens(self) -> int | None:
        body = self.asked.body
        value = body.get("max_completion_tokens", body.get("max_tokens"))
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    async def _attempt(self, reservation: Reservation, *, alone: bool) -> bytes | AsyncIterator[bytes]:
        routing, asked, deployment = self.routing, self.asked, reservation.deployment

        def finish(outcome: Outcome) -> None:
            routing.limits.settle(reservation, outcome, routing.clock(), alone=alone)

        try:
            timeouts, own = self._timeouts(deployment)
            target = self._target(deployment)
            attempt = Attempt(self.transport, target, timeouts, routing.clock, finish, own_timeout=own)
        except BaseException:
            finish(Outcome(abandoned=True))
            raise
        self.route.attempts += 1
        self.route.deployment = deployment.id
        body = {**deployment.params, **asked.body}
        if routing.filter_tags:
            body = without_tags(body)
        if asked.stream:
            return await attempt.stream(asked.kind, body)
        return await attempt.plain(asked.kind, body)

    def _target(self, deployment: Deployment) -> Target:
        routing = self.routing
        if self.asked.connection:
            return target_of(deployment, self.asked.connection, providers=routing.providers)
        key = f"{deployment.id}/{deployment.model}"
        target = routing.targets.get(key)
        if target is None:
            if len(routing.targets) > 10_000:  # wildcards make one for each model
                routing.targets.clear()
            target = routing.targets[key] = target_of(deployment, providers=routing.providers)
        return target

    def _timeouts(self, deployment: Deployment) -> tuple[Timeouts, bool]:
        """The time that this attempt has, and whether its end is the caller's word."""
        timeouts = self.routing.timeouts
        seconds = deployment.stream_timeout if self.asked.stream and deployment.stream_timeout else None
        timeouts = within(timeouts, deployment.timeout if seconds is None else seconds)
        if self.deadline is None:
            return timeouts, False
        left = self.deadline - self.routing.clock()
        if left <= 0:
            raise DeadlineError("no answer before the deadline")
        own = self.asked.timeout is not None and (timeouts.total is None or left < timeouts.total)
        return within(timeouts, left), own


def _sooner(one: Refusal | None, other: Refusal) -> Refusal:
    if one is None:
        return other
    waits = [wait for wait in (one.retry_after, other.retry_after) if wait is not None]
    return Refusal(min(waits, default=None), one.busy or other.busy)
