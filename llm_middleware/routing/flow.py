"""The way of one routed call: choose, reserve, attempt; retry elsewhere; fall back to other groups.

Written once, as coroutines that await only their port and their transport; the sync face drives them without
an event loop. One deadline holds for everything: attempts, waits, fallbacks and the reading of the answer.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from .._ports.bedrock import BedrockSigner
from .._ports.protocol import Port
from ..errors import (
    DeadlineError,
    ModelNotFoundError,
    NoCapacityError,
    NotFoundError,
    ProviderError,
    RateLimitError,
)
from ..providers.adapters import Signer
from ..providers.messages import Timeouts, Transport
from ..providers.registry import Registry
from ..providers.target import Target, target_of
from .attempt import Attempt, within
from .continuation import Continued, continuable
from .deployment import Deployment
from .fallback import Fallbacks
from .limits import Limits, Outcome, Refusal, Reservation
from .model_list import Groups
from .response import RouteInfo
from .retry import Retries, repeatable
from .select import fitting, prompt_tokens, tagged, tags_of, without_tags
from .state import RouterState, View
from .strategies import Strategy, rank_by_order

__all__ = ["Asked", "RoutedCall", "Routing"]

_LOOK = 0.5  # seconds until who waits looks for room again, where nobody calls: others' probes, a lost call


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
    signer: Signer = field(default_factory=BedrockSigner)
    targets: dict[str, Target] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Asked:
    """One request. ``timeout``: seconds, of the caller's. ``fallbacks``: groups of this request's own.
    ``connection``: credentials and addresses of the caller's own. ``may_use``: whether the caller may use a
    group, which fallbacks ask. ``avoid``: deployments that are asked only where no other has room."""

    kind: str
    body: Mapping[str, object]
    stream: bool = False
    timeout: float | None = None
    fallbacks: Sequence[str] | None = None
    num_retries: int | None = None
    connection: Mapping[str, object] = field(default_factory=dict)
    may_use: Callable[[str], bool] | None = None
    avoid: frozenset[str] = frozenset()


class RoutedCall:
    """One call on its way. ``route`` tells of it, also where it fails."""

    __slots__ = ("asked", "deadline", "patient_until", "port", "route", "routing", "tokens", "transport")

    def __init__(
        self, routing: Routing, port: Port, transport: Transport, asked: Asked, route: RouteInfo
    ) -> None:
        self.routing = routing
        self.port = port
        self.transport = transport
        self.asked = asked
        self.route = route
        self.tokens = prompt_tokens(asked.body)
        allowed = routing.timeout if asked.timeout is None else asked.timeout
        now = routing.clock()
        self.deadline = None if allowed is None else now + allowed
        # Until then a 429 is no failed attempt but one more sign that there is no room.
        self.patient_until = now + routing.wait_for_capacity

    async def run(self) -> bytes | AsyncIterator[bytes]:
        """The answer's bytes, or the events of its stream. Raises `ProviderError`."""
        routing, asked = self.routing, self.asked
        seen = {self.route.asked}
        pending = [self.route.asked]
        others = 0  # groups that were called after the first
        error: ProviderError | None = None
        while pending and not (error and (others >= routing.max_fallbacks or self._late())):
            group = pending.pop(0)
            deployments = routing.groups.find(group)
            if not deployments:
                if error is None:
                    raise ModelNotFoundError(f"the model {group!r} does not exist", param="model")
                continue
            first, before = error is None, self.route.attempts
            try:
                answer = await self._group(group, deployments)
            except ProviderError as exc:
                error = error or exc
                others += not first and self.route.attempts > before
                for other in routing.fallbacks.after(exc, group, asked.fallbacks):
                    if other not in seen and (asked.may_use is None or asked.may_use(other)):
                        seen.add(other)
                        pending.append(other)
                continue
            self.route.model, self.route.fallback = group, not first
            return answer
        assert error is not None
        raise error

    def continued(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """``events``, the rest from another deployment where this one breaks off and another can go on."""
        body, route = self.asked.body, self.route

        async def again(error: ProviderError, body: Mapping[str, object]) -> AsyncIterator[bytes]:
            route.failures.append((route.deployment or "", error.code))
            if self._late():
                raise error
            asked = replace(self.asked, body=body, avoid=frozenset(name for name, _ in route.failures))
            other = RoutedCall(self.routing, self.port, self.transport, asked, route)
            other.deadline = self.deadline
            try:
                result = await other.run()
            except ProviderError:
                raise error from None
            assert not isinstance(result, bytes)
            return result

        if not continuable(self.asked.kind, body):
            return events
        return Continued(events, body, again, max(1, self._retries().num_retries))

    async def _group(self, group: str, deployments: Sequence[Deployment]) -> bytes | AsyncIterator[bytes]:
        """One group's answer, after as many attempts as it may have."""
        routing = self.routing
        if routing.filter_tags:
            deployments = tagged(deployments, tags_of(self.asked.body))
            if not deployments:
                raise NotFoundError("no deployment of this model has one of these tags", param="metadata")
        if routing.check_windows:
            deployments = fitting(deployments, self.tokens)
        retries = self._retries()
        alone = len(deployments) == 1
        tried = set(self.asked.avoid)
        made = 0
        last: ProviderError | None = None
        while True:
            try:
                reservation = await self._reserve(deployments, tried)
            except NoCapacityError as exc:
                raise last or exc from None  # why nobody is left says more than that nobody is
            deployment = reservation.deployment
            try:
                return await self._attempt(reservation, alone=alone)
            except ProviderError as exc:
                last = exc
                tried.add(deployment.id)
                self.route.failures.append((deployment.id, exc.code))
                waits = isinstance(exc, RateLimitError) and routing.clock() < self.patient_until
                decision = retries.after(
                    exc,
                    made=0 if waits else made,
                    another=self._another(deployments, tried),
                    now=routing.clock(),
                    random=routing.random,
                    deadline=self.deadline,
                )
                if decision.action == "give up":
                    raise
                made += not waits
                if not repeatable(exc):
                    deployments = [each for each in deployments if each.id != deployment.id]
                if decision.seconds:
                    await self.port.waiter().wait(decision.seconds)

    def _late(self) -> bool:
        return self.deadline is not None and self.routing.clock() >= self.deadline

    def _retries(self) -> Retries:
        retries, own = self.routing.retries, self.asked.num_retries
        return retries if own is None else replace(retries, num_retries=own, retry_policy=None)

    def _another(self, deployments: Sequence[Deployment], tried: set[str]) -> bool:
        now, limits = self.routing.clock(), self.routing.limits
        return any(each.id not in tried and limits.has_room(each, self.tokens, now) for each in deployments)

    # --- room for a call

    async def _reserve(self, deployments: Sequence[Deployment], tried: set[str]) -> Reservation:
        """Room at a deployment that was not tried yet, else at any. Who waits for it does so in line."""
        routing = self.routing
        began = routing.clock()
        if not (routing.wait_for_capacity and self._line(deployments)):
            result = await self._take(deployments, tried)
            if isinstance(result, Reservation):
                return result
            self._pause(result, began + routing.wait_for_capacity)
        return await self._in_line(deployments, tried, began + routing.wait_for_capacity)

    def _line(self, deployments: Sequence[Deployment]) -> bool:
        """Whether others wait for the same."""
        lines = self.routing.state.lines
        return bool(lines) and lines.waiting([each.id for each in deployments])

    async def _in_line(self, deployments: Sequence[Deployment], tried: set[str], until: float) -> Reservation:
        refusal = Refusal(None, busy=True)
        with self.routing.state.lines.place([each.id for each in deployments]) as place:
            while True:
                place.ready(self.port)
                if place.first:
                    result = await self._take(deployments, tried)
                    if isinstance(result, Reservation):
                        return result
                    refusal = result
                await place.wait(self._pause(refusal, until))

    async def _take(self, deployments: Sequence[Deployment], tried: set[str]) -> Reservation | Refusal:
        routing = self.routing
        refusal: Refusal | None = None
        for candidates in _in_turn(deployments, tried):
            if not candidates:
                continue
            now = routing.clock()
            result = await routing.limits.reserve(self.port, self._ranked(candidates, now), self.tokens, now)
            if isinstance(result, Reservation):
                return result
            refusal = _sooner(refusal, result)
        assert refusal is not None
        return refusal

    def _ranked(self, candidates: Sequence[Deployment], now: float) -> Sequence[Deployment]:
        if len(candidates) == 1:
            return candidates
        routing = self.routing
        view = View(routing.state, now, self.tokens, self._max_tokens(), self.asked.stream)
        return rank_by_order(routing.strategy, candidates, view, routing.random)

    def _pause(self, refusal: Refusal, until: float) -> float:
        """Seconds until there may be room again. `NoCapacityError` where that is too long."""
        now = self.routing.clock()
        end = until if self.deadline is None else min(until, self.deadline)
        pause = refusal.retry_after
        if refusal.busy:
            pause = _LOOK if pause is None else min(pause, _LOOK)
        if pause is None or now >= end or (not refusal.busy and now + pause > end):
            raise NoCapacityError(
                "no deployment of this model is free: all are at their limits or cooling down",
                retry_after=refusal.retry_after,
            )
        return min(pause, end - now)

    def _max_tokens(self) -> int | None:
        body = self.asked.body
        value = body.get("max_completion_tokens", body.get("max_tokens"))
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    async def _attempt(self, reservation: Reservation, *, alone: bool) -> bytes | AsyncIterator[bytes]:
        routing, asked, deployment = self.routing, self.asked, reservation.deployment

        def finish(outcome: Outcome) -> None:
            if outcome.latency is not None:
                self.route.latency = outcome.latency
                tokens, output = outcome.tokens, outcome.output_tokens
                if tokens is None and outcome.first_token is not None:
                    tokens = self.tokens + output  # a stream whose tokens nobody counted
                self.route.tokens, self.route.output_tokens = tokens, output
                self.route.cost = _cost(deployment, tokens, output)
            elif outcome.output_tokens:
                self.route.output_tokens = outcome.output_tokens
                self.route.tokens = self.tokens + outcome.output_tokens
                self.route.cost = _cost(deployment, self.route.tokens, outcome.output_tokens)
            routing.limits.settle(reservation, outcome, routing.clock(), alone=alone)

        try:
            timeouts, own = self._timeouts(deployment)
            target = self._target(deployment)
            attempt = Attempt(
                self.port,
                self.transport,
                routing.signer,
                target,
                timeouts,
                routing.clock,
                finish,
                own_timeout=own,
            )
        except BaseException:
            finish(Outcome(abandoned=True))
            raise
        self.route.attempts += 1
        self.route.deployment = deployment.id
        body = {**deployment.params, **asked.body} if deployment.params else dict(asked.body)
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
        if deployment.timeout is not None:
            timeouts = within(timeouts, deployment.timeout)
        silence = deployment.stream_timeout or self.routing.stream_timeout
        if self.asked.stream and silence is not None:
            timeouts = replace(timeouts, read=silence)
        if self.deadline is None:
            return timeouts, False
        left = self.deadline - self.routing.clock()
        if left <= 0:
            raise DeadlineError("no answer before the deadline")
        own = self.asked.timeout is not None and (timeouts.total is None or left < timeouts.total)
        return within(timeouts, left), own


def _cost(deployment: Deployment, tokens: int | None, output: int) -> float | None:
    """By the deployment's prices; None where they or the tokens are not known."""
    read = deployment.info.get("input_cost_per_token")
    written = deployment.info.get("output_cost_per_token")
    if tokens is None or not isinstance(read, int | float) or not isinstance(written, int | float):
        return None
    return max(0, tokens - output) * read + output * written


def _in_turn(deployments: Sequence[Deployment], tried: set[str]) -> Iterable[Sequence[Deployment]]:
    """Those that were not tried yet, and then the others."""
    if not tried:
        return (deployments,)
    return (
        [each for each in deployments if each.id not in tried],
        [each for each in deployments if each.id in tried],
    )


def _sooner(one: Refusal | None, other: Refusal) -> Refusal:
    if one is None:
        return other
    waits = [wait for wait in (one.retry_after, other.retry_after) if wait is not None]
    return Refusal(min(waits, default=None), one.busy or other.busy)
