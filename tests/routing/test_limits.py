"""Limits of one process: exact under threads, released once, bounded; with a clock that is told."""

from __future__ import annotations

import gc
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_middleware._drive import run_sync
from llm_middleware._ports.faces import SYNC
from llm_middleware.errors import UpstreamServerError
from llm_middleware.routing.deployment import Deployment
from llm_middleware.routing.limits import MemoryLimits, Outcome, Refusal, Reservation
from llm_middleware.routing.state import RouterState, View
from llm_middleware.routing.strategies import named_strategy, rank_by_order

STRATEGIES = (
    "simple-shuffle",
    "usage-based-routing",
    "usage-based-routing-v2",
    "least-busy",
    "latency-based-routing",
    "cost-based-routing",
)


def deployment(name: str = "a", **facts: object) -> Deployment:
    return Deployment(id=name, group="gpt", provider="openai", model="gpt", **facts)  # type: ignore[arg-type]


def limits() -> MemoryLimits:
    return MemoryLimits(RouterState())


def granted(made: MemoryLimits, target: Deployment, tokens: int, now: float) -> Reservation:
    taken = made.take([target], tokens, now)
    assert isinstance(taken, Reservation)
    return taken


@pytest.mark.parametrize("name", STRATEGIES)
def test_r5_r9_exactly_rpm_calls_pass_under_every_strategy(name: str) -> None:
    made, strategy, random, a = limits(), named_strategy(name), Random(1), deployment(rpm=10)
    passed = 0
    for number in range(12):
        now = number * 4.0
        taken = made.take(rank_by_order(strategy, [a], View(made.state, now), random), 100, now)
        if isinstance(taken, Reservation):
            passed += 1
            made.settle(taken, Outcome(tokens=50), now)
    assert passed == 10
    assert taken == Refusal(60.0 - 44.0)
    assert made.state.of(a).requests == 10
    assert made.state.of(a).tokens == 500


def test_r6_the_rest_learns_the_true_time_to_wait_and_passes_then() -> None:
    made, a = limits(), deployment(rpm=2)
    granted(made, a, 0, 7.0)  # the minute begins with the first call
    granted(made, a, 0, 20.0)
    assert [made.take([a], 0, now) for now in (30.0, 66.5)] == [Refusal(37.0), Refusal(0.5)]
    granted(made, a, 0, 67.0)
    granted(made, a, 0, 68.0)
    assert made.take([a], 0, 69.0) == Refusal(58.0)


def test_the_first_with_room_is_taken_and_the_soonest_is_told() -> None:
    made, a, b = limits(), deployment("a", rpm=1), deployment("b", rpm=1)
    assert [made.take([a, b], 0, now).deployment.id for now in (0.0, 10.0)] == ["a", "b"]  # type: ignore[union-attr]
    assert made.take([b, a], 0, 15.0) == Refusal(45.0)


def test_tokens_are_reserved_and_settled_in_the_minute_of_the_call() -> None:
    made, a = limits(), deployment(tpm=1000)
    first = granted(made, a, 600, 0.0)
    assert made.take([a], 600, 1.0) == Refusal(59.0)
    made.settle(first, Outcome(tokens=400), 2.0)
    second = granted(made, a, 600, 3.0)
    assert made.state.of(a).tokens == 1000
    granted(made, a, 100, 60.0)
    made.settle(second, Outcome(tokens=5), 61.0)  # of a minute that is over
    assert made.state.of(a).tokens == 100


def test_a_call_is_settled_once() -> None:
    made, a = limits(), deployment(tpm=1000)
    taken = granted(made, a, 600, 0.0)
    for _ in range(3):
        made.settle(taken, Outcome(tokens=500), 1.0)
    assert made.state.of(a).tokens == 500


def test_an_estimate_stands_where_nothing_is_known() -> None:
    made, a = limits(), deployment(tpm=1000)
    made.settle(granted(made, a, 600, 0.0), Outcome(error=UpstreamServerError("")), 1.0)
    assert made.state.of(a).tokens == 600


def test_what_is_larger_than_the_limit_never_passes() -> None:
    assert limits().take([deployment(tpm=1000), deployment("b", rpm=0)], 1001, 0.0) == Refusal(None)
    assert limits().take([], 0, 0.0) == Refusal(None)


def test_calls_in_flight_have_a_limit_too() -> None:
    made, a, b = limits(), deployment("a", max_parallel_requests=1), deployment("b", rpm=1)
    first = granted(made, a, 0, 0.0)
    assert made.take([a], 0, 0.0) == Refusal(None, busy=True)
    assert made.take([a, b], 0, 0.0).deployment is b  # type: ignore[union-attr]
    assert made.take([a, b], 0, 10.0) == Refusal(50.0, busy=True)
    first.release()
    granted(made, a, 0, 10.0)


def test_r13_calls_in_flight_are_released_once_however_they_end() -> None:
    made, a = limits(), deployment()
    state = made.state.of(a)
    settled, left, lost, other = (granted(made, a, 0, 0.0) for _ in range(4))
    assert state.in_flight == 4
    made.settle(settled, Outcome(), 1.0)
    settled.release()
    with left:
        pass
    del settled, left
    assert state.in_flight == 2
    ring: list[object] = [lost]
    ring.append(ring)  # only the collector finds it
    del lost, ring
    gc.collect()
    assert state.in_flight == 1
    with pytest.raises(KeyError), other:
        raise KeyError
    assert state.in_flight == 0


def test_limits_are_exact_under_threads() -> None:
    made, a = limits(), deployment(rpm=500, tpm=4000)

    def worker(_: int) -> int:
        return sum(isinstance(made.take([a], 10, 1.0), Reservation) for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(worker, range(8))) == 400
    assert (made.state.of(a).requests, made.state.of(a).tokens) == (400, 4000)
    assert made.state.of(a).in_flight == 0


def test_reserve_is_the_same_for_who_awaits() -> None:
    made, a = limits(), deployment(rpm=1)
    assert isinstance(run_sync(made.reserve(SYNC, [a], 0, 0.0)), Reservation)
    assert run_sync(made.reserve(SYNC, [a], 0, 15.0)) == Refusal(45.0)


def test_r12_r20_state_is_bounded_over_time() -> None:
    deployments = [deployment(f"d{number}", rpm=10, tpm=10_000) for number in range(500)]
    tracemalloc.start()
    try:
        made = limits()
        for minute in range(25 * 60):
            for target in deployments[minute % 10 :: 10] if minute else deployments:
                call(made, target, minute * 60.0)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert grown < 2**20
    assert grown / 500 < 2048
    assert all(made.state.of(target).requests == 1 for target in deployments)


def call(made: MemoryLimits, target: Deployment, now: float) -> None:
    error = UpstreamServerError("") if now % 7 == 0 else None
    taken = made.take([target], 100, now)
    if isinstance(taken, Reservation):
        made.settle(taken, Outcome(tokens=90, latency=0.3, first_token=0.1, error=error), now + 1.0)
        made.settle(taken, Outcome(tokens=90, latency=0.3), now + 1.0)


def test_r20_no_counter_is_dropped_while_its_minute_runs() -> None:
    made, deployments = limits(), [deployment(f"d{number}", rpm=1) for number in range(500)]
    for target in deployments:
        granted(made, target, 0, 0.0)
    assert made.take(deployments, 0, 59.0) == Refusal(1.0)


def test_r17_what_is_known_goes_by_id() -> None:
    made = limits()
    granted(made, deployment("a", rpm=1, connection={"api_key": "old"}), 0, 0.0)
    assert made.take([deployment("a", rpm=1, connection={"api_key": "new"})], 0, 1.0) == Refusal(59.0)


def test_deployments_that_are_gone_are_forgotten() -> None:
    made, a, b = limits(), deployment("a", rpm=1), deployment("b", rpm=1)
    granted(made, a, 0, 0.0)
    granted(made, b, 0, 0.0)
    made.state.keep([b])
    assert made.take([b], 0, 1.0) == Refusal(59.0)
    granted(made, a, 0, 1.0)


class LimitsMachine(RuleBasedStateMachine):
    """Two deployments under random calls: never more than their limits in any minute, and never less."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.made = limits()
        self.deployments = [deployment("a", rpm=3, tpm=100), deployment("b", rpm=2, max_parallel_requests=1)]
        self.minutes: dict[str, tuple[float, int, int]] = {}
        self.flying: list[tuple[Reservation, float]] = []

    def minute(self, name: str) -> tuple[float, int, int]:
        began, calls, tokens = self.minutes.get(name, (-100.0, 0, 0))
        return (began, calls, tokens) if self.now < began + 60.0 else (self.now, 0, 0)

    def waits(self, target: Deployment, tokens: int) -> float:
        began, calls, used = self.minute(target.id)
        if target.tpm is not None and tokens > target.tpm:
            return float("inf")
        over = calls + 1 > (target.rpm or 0) or (target.tpm is not None and used + tokens > target.tpm)
        return began + 60.0 - self.now if over else 0.0

    def busy(self, target: Deployment) -> bool:
        return target.id == "b" and any(taken.deployment is target for taken, _ in self.flying)

    @rule(seconds=st.sampled_from([0.5, 20.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(tokens=st.sampled_from([1, 40, 100, 101]), backwards=st.booleans())
    def begins(self, tokens: int, backwards: bool) -> None:
        candidates = self.deployments[::-1] if backwards else self.deployments
        idle = [each for each in candidates if not self.busy(each)]
        waits = [self.waits(each, tokens) for each in idle]
        taken = self.made.take(candidates, tokens, self.now)
        if 0.0 in waits:
            target = idle[waits.index(0.0)]
            assert isinstance(taken, Reservation)
            assert taken.deployment is target
            began, calls, used = self.minute(target.id)
            self.minutes[target.id] = began, calls + 1, used + tokens
            self.flying.append((taken, began))
        else:
            soonest = min(waits, default=float("inf"))
            told = None if soonest == float("inf") else pytest.approx(soonest)
            assert taken == Refusal(told, len(idle) < len(candidates))

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), used=st.sampled_from([None, 0, 50, 120]))
    def ends(self, data: st.DataObject, used: int | None) -> None:
        taken, minute = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        self.made.settle(taken, Outcome(tokens=used), self.now)
        began, calls, tokens = self.minutes[taken.deployment.id]
        if used is not None and began == minute:
            self.minutes[taken.deployment.id] = began, calls, tokens + used - taken.tokens

    @invariant()
    def counts_what_is_in_flight(self) -> None:
        held = sum(self.made.state.of(each).in_flight for each in self.deployments)
        assert held == len(self.flying)


LimitsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_random_histories = LimitsMachine.TestCase
