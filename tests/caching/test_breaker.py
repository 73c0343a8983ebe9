from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_middleware import errors
from llm_middleware.caching.breaker import Breaker
from llm_middleware.testing import FakeClock


def opened(clock: FakeClock, **options: float) -> Breaker:
    """A breaker that has just opened, two seconds before its first probe."""
    breaker = Breaker(failures=3, clock=clock, **options)
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
    return breaker


def test_closed_allows_everything(clock: FakeClock) -> None:
    breaker = Breaker(clock=clock)
    assert breaker.state == "closed"
    assert [breaker.allow() for _ in range(5)] == [True] * 5
    assert breaker.succeeded() is False
    assert breaker.state == "closed"


def test_opens_after_failures_in_a_row_only(clock: FakeClock) -> None:
    breaker = Breaker(failures=3, clock=clock)
    for _ in range(10):
        assert breaker.failed() is False
        assert breaker.failed() is False
        assert breaker.succeeded() is False
    assert breaker.state == "closed"
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
    assert breaker.state == "open"
    assert breaker.allow() is False


def test_one_failure_may_be_enough(clock: FakeClock) -> None:
    breaker = Breaker(failures=1, clock=clock)
    assert breaker.failed() is True
    assert breaker.allow() is False


def test_one_probe_when_the_time_has_come(clock: FakeClock) -> None:
    breaker = opened(clock)
    clock.advance(1.99)
    assert breaker.allow() is False
    clock.advance(0.01)
    assert breaker.state == "open"
    assert [breaker.allow() for _ in range(4)] == [True, False, False, False]
    assert breaker.state == "half-open"


def test_a_probe_that_succeeds_closes_it_and_forgets_the_failures(clock: FakeClock) -> None:
    breaker = opened(clock)
    clock.advance(2)
    assert breaker.allow() is True
    assert breaker.succeeded() is True
    assert breaker.state == "closed"
    assert [breaker.allow() for _ in range(3)] == [True] * 3
    assert [breaker.failed() for _ in range(3)] == [False, False, True]


def test_a_probe_that_fails_opens_it_for_another_recovery(clock: FakeClock) -> None:
    breaker = opened(clock)
    clock.advance(2)
    assert breaker.allow() is True
    clock.advance(0.5)
    assert breaker.failed() is False  # one line per burst: it was open before
    assert breaker.state == "open"
    clock.advance(1.99)
    assert breaker.allow() is False
    clock.advance(0.01)
    assert [breaker.allow(), breaker.allow()] == [True, False]


def test_a_lost_probe_is_replaced(clock: FakeClock) -> None:
    breaker = opened(clock)
    clock.advance(2)
    assert breaker.allow() is True
    clock.advance(1.99)
    assert breaker.allow() is False
    clock.advance(0.01)
    assert [breaker.allow(), breaker.allow()] == [True, False]
    assert breaker.state == "half-open"
    assert breaker.succeeded() is True
    assert breaker.state == "closed"


def test_calls_from_before_it_opened_change_nothing(clock: FakeClock) -> None:
    breaker = opened(clock)
    assert breaker.succeeded() is False
    assert breaker.state == "open"
    clock.advance(1.5)
    assert breaker.failed() is False  # and the probe is not put off
    clock.advance(0.5)
    assert breaker.allow() is True


def test_other_settings(clock: FakeClock) -> None:
    breaker = opened(clock, recovery=0.25)
    clock.advance(0.24)
    assert breaker.allow() is False
    clock.advance(0.25)
    assert breaker.allow() is True


@pytest.mark.parametrize("failures", [0, -1])
def test_at_least_one_failure(failures: int) -> None:
    with pytest.raises(errors.ConfigError, match=r"failures: expected a number >= 1") as caught:
        Breaker(failures=failures)
    assert caught.value.param == "failures"


@pytest.mark.parametrize("recovery", [0, -1.0, float("inf"), float("nan")])
def test_a_recovery_that_ends(recovery: float) -> None:
    with pytest.raises(errors.ConfigError, match=r"recovery: expected seconds > 0") as caught:
        Breaker(recovery=recovery)
    assert caught.value.param == "recovery"


def test_no_lock_while_all_is_well_nor_while_refusing(clock: FakeClock) -> None:
    """Were a lock taken, these calls would wait for ever for the one that is held here."""
    healthy, broken = Breaker(clock=clock), opened(clock)
    with healthy._lock, broken._lock:
        assert healthy.allow() is True
        assert healthy.succeeded() is False
        assert broken.allow() is False


@given(st.lists(st.sampled_from(["allow", "succeeded", "failed", "wait"])), st.integers(1, 4))
def test_it_does_what_its_rules_say(steps: list[str], failures: int) -> None:
    clock = FakeClock()
    breaker = Breaker(failures=failures, recovery=2.0, clock=clock)
    state, row, due = "closed", 0, 0.0
    for step in steps:
        if step == "wait":
            clock.advance(1.0)
        elif step == "allow":
            expected = state == "closed" or clock() >= due
            assert breaker.allow() is expected
            if state != "closed" and expected:
                state, due = "half-open", clock() + 2.0
        elif step == "succeeded":
            assert breaker.succeeded() is (state == "half-open")
            if state != "open":
                state, row = "closed", 0
        else:
            row += state == "closed"
            opens = state == "closed" and row == failures
            assert breaker.failed() is opens
            if opens or state == "half-open":
                state, due = "open", clock() + 2.0
        assert breaker.state == state


def test_threads_get_exactly_one_probe_and_open_it_once(clock: FakeClock) -> None:
    crowd, rounds = 16, 30
    breaker = Breaker(failures=crowd, clock=clock)
    together = threading.Barrier(crowd)

    def at_once(call):
        together.wait()
        return call()

    with ThreadPoolExecutor(crowd) as pool:

        def all_at_once(call) -> int:
            return sum(pool.map(at_once, [call] * crowd))

        for _ in range(rounds):
            assert all_at_once(breaker.failed) == 1
            assert all_at_once(breaker.allow) == 0
            clock.advance(2)
            assert all_at_once(breaker.allow) == 1
            clock.advance(2)  # that one is lost
            assert all_at_once(breaker.allow) == 1
            assert all_at_once(breaker.succeeded) == 1
            assert all_at_once(breaker.allow) == crowd
            assert breaker.state == "closed"


def test_threads_that_hammer_it_never_meet_more_than_one_probe_per_recovery() -> None:
    clock = FakeClock(0.0)
    breaker = Breaker(failures=1, recovery=1.0, clock=clock)
    breaker.failed()
    probes: list[float] = []
    done = threading.Event()

    def hammer() -> None:
        while not done.is_set():
            if breaker.allow():
                probes.append(clock())
                breaker.failed()

    threads = [threading.Thread(target=hammer) for _ in range(8)]
    for thread in threads:
        thread.start()
    tick = threading.Event()
    for second in range(1, 21):
        clock.advance(1.0)
        while len(probes) < second:
            tick.wait(0.0005)
    done.set()
    for thread in threads:
        thread.join()
    assert probes == [float(second) for second in range(1, 21)]
