"""When deployments are benched and how they come back, through the reservations that obey it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_middleware.errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    DeadlineError,
    NoCapacityError,
    NotFoundError,
    PermissionDeniedError,
    ProviderError,
    RateLimitError,
    UnprocessableError,
    UpstreamConnectionError,
    UpstreamServerError,
)
from llm_middleware.routing.cooldown import CooldownPolicy, Health, blames
from llm_middleware.routing.deployment import Deployment
from llm_middleware.routing.limits import MemoryLimits, Outcome, Refusal, Reservation
from llm_middleware.routing.state import RouterState

A, B = (Deployment(id=name, group="gpt", provider="openai", model="gpt") for name in "ab")
FAILED = UpstreamServerError("")


def limits(**policy: object) -> MemoryLimits:
    return MemoryLimits(RouterState(), CooldownPolicy(**policy))  # type: ignore[arg-type]


def begin(made: MemoryLimits, now: float, *candidates: Deployment) -> Reservation:
    taken = made.take(candidates or [A], 0, now)
    assert isinstance(taken, Reservation)
    return taken


def fail(made: MemoryLimits, now: float, error: ProviderError = FAILED, **facts: bool) -> float:
    alone = facts.pop("alone", False)
    return made.settle(begin(made, now), Outcome(error=error, **facts), now, alone=alone)


def free(made: MemoryLimits, now: float) -> bool:
    """Whether A would get the next call."""
    taken = made.take([A, B], 0, now)
    assert isinstance(taken, Reservation)
    with taken:
        return taken.deployment is A


@pytest.mark.parametrize(
    "error",
    [
        BadRequestError(""),
        UnprocessableError(""),
        NotFoundError(""),
        NoCapacityError(""),
    ],
)
def test_r22_the_callers_mistakes_bench_nobody(error: ProviderError) -> None:
    made = limits(allowed_fails=0)
    for now in range(20):
        assert fail(made, now, error) == 0.0
    assert free(made, 20.0)


@pytest.mark.parametrize("error", [AuthenticationError(""), PermissionDeniedError(""), RateLimitError("")])
def test_r22_a_key_of_the_callers_own_benches_nobody(error: ProviderError) -> None:
    made = limits()
    assert fail(made, 0.0, error, own_key=True) == 0.0
    assert free(made, 0.0)
    assert fail(made, 0.0, error) == 5.0
    assert not free(made, 0.0)


def test_r22_the_only_deployment_is_not_benched_by_a_model_that_is_not_there() -> None:
    made, missing = limits(), NotFoundError("", code="model_not_found")
    assert fail(made, 0.0, missing, alone=True) == 0.0
    assert free(made, 0.0)
    assert fail(made, 0.0, missing) == 5.0


def test_what_is_the_deployments_fault() -> None:
    faults: list[ProviderError] = [
        RateLimitError(""),
        AuthenticationError(""),
        PermissionDeniedError(""),
        NotFoundError("", code="DeploymentNotFound"),
        ProviderError("", status=408),
        DeadlineError(""),
        UpstreamServerError("", status=529),
        UpstreamConnectionError(""),
    ]
    assert [blames(error) for error in faults] == [True] * 8
    assert not blames(ProviderError("", status=409))


def test_r23_the_only_deployment_is_not_benched_by_429() -> None:
    made = limits()
    for now in range(20):
        assert fail(made, now, RateLimitError("", retry_after=30.0), alone=True) == 0.0
    assert free(made, 20.0)


def test_r24_after_429_the_next_call_goes_elsewhere() -> None:
    made = limits()
    assert fail(made, 0.0, RateLimitError("")) == 5.0
    assert begin(made, 0.0, A, B).deployment is B


def test_429_cools_for_as_long_as_the_provider_says_and_an_hour_at_most() -> None:
    made = limits()
    assert fail(made, 0.0, RateLimitError("", retry_after=1.5)) == 1.5
    assert not free(made, 1.49)
    assert free(made, 1.5)
    assert fail(limits(), 0.0, RateLimitError("", retry_after=86_400.0)) == 3600.0


def test_r25_another_failure_extends_a_cooldown_and_never_shortens_it() -> None:
    made = limits()
    first, second, third = (begin(made, 0.0) for _ in range(3))
    made.settle(first, Outcome(error=RateLimitError("", retry_after=1.0)), 0.0)
    made.settle(second, Outcome(error=RateLimitError("", retry_after=60.0)), 0.5)
    made.settle(third, Outcome(error=RateLimitError("", retry_after=2.0)), 0.6)
    assert not free(made, 60.4)
    assert free(made, 60.5)


def test_r26_failures_within_a_minute_add_up() -> None:
    made = limits(allowed_fails=1)
    assert [fail(made, 0.0), fail(made, 10.0)] == [0.0, 5.0]


def test_failures_of_different_minutes_do_not_add_up() -> None:
    made = limits(allowed_fails=1)
    assert [fail(made, 0.0), fail(made, 60.0), fail(made, 119.9)] == [0.0, 0.0, 5.0]


def test_r27_the_fourth_failure_exceeds_three() -> None:
    made = limits(allowed_fails=3)
    assert [fail(made, now, RateLimitError("")) for now in range(4)] == [0.0, 0.0, 0.0, 5.0]
    assert not free(made, 7.9)
    assert free(made, 8.0)


def test_r28_no_cooldowns() -> None:
    made = limits(cooldown_time=0, allowed_fails=0)
    assert [fail(made, 0.0, RateLimitError("", retry_after=9.0)) for _ in range(10)] == [0.0] * 10
    assert free(made, 0.0)


def test_r29_every_deployment_that_fails_is_counted() -> None:
    made = limits(allowed_fails=0)
    for deployment in (A, B):  # the first attempt of a request, and its retry
        made.settle(begin(made, 0.0, deployment), Outcome(error=FAILED), 0.0)
    assert made.take([A, B], 0, 1.0) == Refusal(4.0)


def test_by_default_half_of_a_minutes_calls_may_fail() -> None:
    made = limits()
    made.settle(begin(made, 0.0), Outcome(), 0.0)
    made.settle(begin(made, 0.0), Outcome(), 0.0)
    assert [fail(made, now) for now in (1.0, 2.0, 3.0)] == [0.0, 0.0, 5.0]  # the third of five
    alone = limits()
    assert [fail(alone, now, alone=True) for now in range(9)] == [0.0] * 9


def test_classes_with_a_number_of_their_own_are_counted_apart() -> None:
    made = limits(allowed_fails=1, allowed_fails_policy={"TimeoutErrorAllowedFails": 2})
    errors = [DeadlineError(""), FAILED, DeadlineError(""), DeadlineError("")]
    assert [fail(made, now, error) for now, error in enumerate(errors)] == [0.0, 0.0, 0.0, 5.0]


def test_r31_who_is_refused_learns_the_time_that_remains() -> None:
    made = limits()
    made.settle(begin(made, 0.0, A), Outcome(error=RateLimitError("", retry_after=40.0)), 0.0)
    made.settle(begin(made, 0.0, B), Outcome(error=RateLimitError("", retry_after=30.0)), 0.0)
    assert made.take([A, B], 0, 12.5) == Refusal(17.5)


def test_r32_one_probe_goes_first_and_its_success_closes() -> None:
    made = limits()
    fail(made, 0.0, RateLimitError(""))
    probe = begin(made, 5.0)
    assert probe.probe
    assert not free(made, 5.0)
    assert made.take([A], 0, 6.0) == Refusal(29.0, busy=True)  # until another may take its place
    made.settle(probe, Outcome(), 7.0)
    assert not begin(made, 7.0).probe


def test_r32_a_probe_that_fails_cools_again() -> None:
    made = limits(allowed_fails=3)
    for _ in range(4):
        fail(made, 0.0)
    assert made.settle(begin(made, 5.0), Outcome(error=FAILED), 6.0) == 5.0
    assert not free(made, 10.9)
    assert free(made, 11.0)


def test_r32_a_lost_probe_is_replaced() -> None:
    made = limits()
    fail(made, 0.0, RateLimitError(""))
    held = begin(made, 5.0)
    assert not free(made, 34.9)
    assert free(made, 35.0)  # too long without a word
    fail(made, 35.0, RateLimitError(""))
    probe = begin(made, 40.0)
    del probe  # cancelled: nobody settles it
    assert begin(made, 40.0).probe
    assert held.probe


@pytest.mark.parametrize("outcome", [Outcome(error=BadRequestError("")), Outcome(abandoned=True)])
def test_r32_a_probe_that_tells_nothing_is_replaced(outcome: Outcome) -> None:
    made = limits()
    fail(made, 0.0, RateLimitError(""))
    made.settle(begin(made, 5.0), outcome, 6.0)
    assert begin(made, 6.0).probe


def test_r32_calls_from_before_the_cooldown_do_not_end_it() -> None:
    made = limits()
    early = begin(made, 0.0)
    fail(made, 0.0, RateLimitError(""))
    made.settle(early, Outcome(), 1.0)
    assert not free(made, 1.0)


def test_r32_a_probe_that_was_replaced_does_not_end_the_next_cooldown() -> None:
    made = limits()
    fail(made, 0.0, RateLimitError(""))
    slow = begin(made, 5.0)
    fail(made, 35.0, RateLimitError(""))
    made.settle(slow, Outcome(), 36.0)
    assert not free(made, 39.9)


def test_r34_a_timeout_of_the_callers_own_benches_nobody() -> None:
    made = limits(allowed_fails=0)
    assert fail(made, 0.0, DeadlineError(""), own_timeout=True) == 0.0
    assert free(made, 0.0)
    assert fail(made, 0.0, DeadlineError("")) == 5.0


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match="did you mean 'RateLimitErrorAllowedFails'"):
        CooldownPolicy(allowed_fails_policy={"RateLimitAllowedFails": 1})
    for name in ("allowed_fails", "cooldown_time", "failure_share", "failure_calls", "probe_time"):
        for value in ("x", "1", True, float("nan"), float("inf"), -1, [1]):
            with pytest.raises(ConfigError, match=rf"^{name}: expected a (whole )?number >= 0") as caught:
                CooldownPolicy(**{name: value})  # type: ignore[arg-type]
            assert caught.value.param == name
    with pytest.raises(ConfigError, match="allowed_fails: expected a whole number"):
        CooldownPolicy(allowed_fails=1.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cooldown_time: expected a number >= 0, got None"):
        CooldownPolicy(cooldown_time=None)  # type: ignore[arg-type]
    assert CooldownPolicy(allowed_fails=None).allowed_fails is None
    with pytest.raises(ConfigError, match="cooldown_time: expected a number >= 0, got -1"):
        CooldownPolicy(cooldown_time=-1)


class CooldownMachine(RuleBasedStateMachine):
    """One deployment under calls that begin, succeed, fail and are lost, against the rules in words."""

    ALLOWED, TIME, PROBE = 2, 5.0, 30.0

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.made = limits(allowed_fails=self.ALLOWED, cooldown_time=self.TIME, probe_time=self.PROBE)
        self.calls: list[Reservation] = []
        self.fails: list[float] = []  # of the minute that runs
        self.until: float | None = None

    @rule(seconds=st.sampled_from([0.5, 3.0, 5.0, 31.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def begins(self) -> None:
        taken = self.made.take([A], 0, self.now)
        half_open = self.until is not None and self.now >= self.until
        if self.until is not None and self.now < self.until:
            assert taken == Refusal(pytest.approx(self.until - self.now))
        elif isinstance(taken, Reservation):
            assert taken.probe == half_open
            self.calls.append(taken)
        else:
            assert half_open
            assert taken.busy
            assert any(call.probe for call in self.calls)

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), good=st.booleans())
    def ends(self, data: st.DataObject, good: bool) -> None:
        call = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        seconds = self.made.settle(call, Outcome(error=None if good else FAILED), self.now)
        if good:
            assert seconds == 0.0
            if call.probe and self.until is not None and self.now >= self.until:
                self.until, self.fails = None, []
            return
        if self.fails and self.now >= self.fails[0] + 60.0:
            self.fails = []
        self.fails.append(self.now)
        cools = call.probe or len(self.fails) > self.ALLOWED
        assert seconds == (self.TIME if cools else 0.0)
        if cools:
            self.until, self.fails = max(self.until or 0.0, self.now + self.TIME), []

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def is_lost(self, data: st.DataObject) -> None:
        self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))

    @invariant()
    def counts_what_is_in_flight(self) -> None:
        assert self.made.state.of(A).in_flight == len(self.calls)


CooldownMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_random_histories = CooldownMachine.TestCase


def test_a_healthy_deployment_admits_everybody() -> None:
    health = Health()
    assert [health.admits(0.0), health.wait(0.0)] == ["yes", 0.0]
