"""Calls that wait for room: first come, first served, whoever they are and however they leave the line."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random
from typing import Any

import pytest

from llm_middleware._drive import run_sync
from llm_middleware._ports.faces import SYNC
from llm_middleware.errors import NoCapacityError, UpstreamServerError
from llm_middleware.routing.router import Router
from llm_middleware.routing.waiting import Lines
from tests.routing.callers import PATIENCE, Callers, Recorder, ask, in_flight, in_line, row, said

LONG = 60.0  # seconds to wait: far more than any test takes


@pytest.fixture(autouse=True)
def no_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits is told when to look; looking now and then is for what cannot be told."""
    monkeypatch.setattr("llm_middleware.routing.flow._LOOK", LONG)


@pytest.fixture(params=["sync", "async"])
def callers(request: pytest.FixtureRequest) -> Iterator[Callers]:
    made = Callers(request.param)
    yield made
    made.close()


@pytest.fixture
def up() -> Iterator[Recorder]:
    with Recorder() as recorder:
        yield recorder


def one_place(up: Recorder, **settings: Any) -> Router:
    """A Router whose only deployment takes one call at a time."""
    given = {"wait_for_capacity": LONG, **settings}
    return Router([row(up, max_parallel_requests=1)], random=Random(7), **given)


def begin(callers: Callers, router: Router, content: str, **options: object) -> Future[Any]:
    return callers.begin(router, "completion", "m", ask(content), **options)


def queued(callers: Callers, router: Router, up: Recorder, *contents: str) -> list[Future[Any]]:
    """Calls of which the first is at the upstream, which must hold it, and the others stand in line in
    this order."""
    calls = []
    for place, content in enumerate(contents):
        calls.append(begin(callers, router, content))
        if place:
            in_line(router, place)
        else:
            up.wait_for(1)
    return calls


@pytest.mark.parametrize("kind", ["sync", "async", "mixed"])
def test_r56_who_came_first_is_served_first(up: Recorder, kind: str) -> None:
    callers, router = Callers(kind), one_place(up, wait_for_capacity=3)
    up.hold()
    calls = queued(callers, router, up, *"12345")
    up.release()
    assert [call.result(PATIENCE).route.attempts for call in calls] == [1] * 5
    assert said(up) == list("12345")
    assert (up.most, in_flight(router)) == (1, [0])
    in_line(router, 0)
    callers.close(router)


def test_r56_where_nobody_may_wait_one_passes(callers: Callers, up: Recorder) -> None:
    router = one_place(up, wait_for_capacity=0)
    up.hold()
    first = begin(callers, router, "1")
    up.wait_for(1)
    for call in [begin(callers, router, content) for content in "2345"]:
        with pytest.raises(NoCapacityError) as caught:
            call.result(PATIENCE)
        assert (caught.value.status, caught.value.retry_after) == (429, None)
    up.release()
    assert first.result(PATIENCE).choices
    assert said(up) == ["1"]
    in_line(router, 0)


def test_who_comes_while_others_wait_does_not_pass_them(callers: Callers, up: Recorder) -> None:
    """A place is free before the one it is meant for has taken it: a newcomer leaves it alone."""
    router = one_place(up)
    lines, ids = router._routing.state.lines, [router.deployments[0].id]
    with lines.place(ids):
        newcomer = begin(callers, router, "new")
        in_line(router, 2)
        assert up.count == 0
    assert newcomer.result(PATIENCE).route.attempts == 1


def test_a_waiter_whose_time_is_over_leaves_the_line(callers: Callers, up: Recorder) -> None:
    router = one_place(up, wait_for_capacity=0.3)
    up.hold()
    first, second, third = queued(callers, router, up, *"123")
    for call in (second, third):
        with pytest.raises(NoCapacityError):
            call.result(PATIENCE)
    in_line(router, 0)
    up.release()
    assert first.result(PATIENCE).choices
    assert begin(callers, router, "4").result(PATIENCE).choices
    assert said(up) == ["1", "4"]


def test_a_waiter_whose_deadline_ends_leaves_the_line(callers: Callers, up: Recorder) -> None:
    router = one_place(up)
    up.hold()
    (first,) = queued(callers, router, up, "1")
    hasty = begin(callers, router, "hasty", timeout=0.3)
    in_line(router, 1)
    patient = begin(callers, router, "patient")
    in_line(router, 2)
    with pytest.raises(NoCapacityError) as caught:
        hasty.result(PATIENCE)
    assert caught.value.status == 429
    in_line(router, 1)
    up.release()
    assert [call.result(PATIENCE).route.attempts for call in (first, patient)] == [1, 1]
    assert said(up) == ["1", "patient"]


@pytest.mark.parametrize("place", [1, 2])
def test_a_waiter_that_is_cancelled_leaves_the_line_at_once(up: Recorder, place: int) -> None:
    callers, router = Callers("async"), one_place(up)
    up.hold()
    calls = queued(callers, router, up, *"1234")
    calls[place].cancel()
    in_line(router, 2)
    up.release()
    rest = [call for call in calls if call is not calls[place]]
    assert [call.result(PATIENCE).route.attempts for call in rest] == [1] * 3
    assert said(up) == [content for content in "1234" if content != "1234"[place]]
    callers.close(router)


def test_the_next_one_is_called_when_the_first_leaves(callers: Callers, up: Recorder) -> None:
    """It had been told of the room that is free now, and had left without taking it."""
    router = one_place(up)
    lines, ids = router._routing.state.lines, [router.deployments[0].id]
    woken = threading.Event()

    async def second() -> None:
        with lines.place(ids) as place:
            place.ready(SYNC)
            if not place.first:
                await place.wait(LONG)
            assert place.first
            woken.set()

    with lines.place(ids):
        thread = threading.Thread(target=lambda: run_sync(second()))
        thread.start()
        in_line(router, 2)
        assert not woken.is_set()
    assert woken.wait(PATIENCE)
    thread.join(PATIENCE)
    in_line(router, 0)


def test_room_that_comes_before_the_wait_is_not_missed() -> None:
    lines = Lines()
    with lines.place(["a", "b"]) as place:
        place.ready(SYNC)
        lines.freed("b")
        began = time.monotonic()
        run_sync(place.wait(LONG))
        assert time.monotonic() - began < LONG / 2
    assert not lines


def test_lines_are_told_of_their_own_deployments_only() -> None:
    lines = Lines()
    assert not lines.waiting(["a"])
    with lines.place(["a"]) as one, lines.place(["a", "b"]) as both:
        for place in (one, both):
            place.ready(SYNC)
        lines.freed("b")
        lines.freed("c")
        assert [_told(place) for place in (one, both)] == [False, True]
        lines.freed("a")
        assert [_told(place) for place in (one, both)] == [True, True]
        assert (one.first, both.first) == (True, True)
        assert [lines.waiting(ids) for ids in (["a"], ["a", "b"], ["b"])] == [True, True, False]
    assert not lines


def _told(place: Any) -> bool:
    began = time.monotonic()
    run_sync(place.wait(0.05))
    return time.monotonic() - began < 0.05


# --- streams


def test_a_stream_holds_its_place_until_it_is_read(callers: Callers, up: Recorder) -> None:
    router = one_place(up)
    up.hold(after_events=4)
    stream = begin(callers, router, "stream", stream=True).result(PATIENCE)
    following = begin(callers, router, "next", stream=True)
    in_line(router, 1)
    assert (said(up), in_flight(router)) == (["stream"], [1])
    up.release()
    assert callers.read(stream)[-1].choices[0].finish_reason == "stop"
    after = following.result(PATIENCE)
    assert said(up) == ["stream", "next"]
    assert callers.read(after)[-1].choices[0].finish_reason == "stop"
    assert in_flight(router) == [0]


def test_a_stream_that_is_closed_frees_its_place(callers: Callers, up: Recorder) -> None:
    router = one_place(up)
    up.hold(after_events=4)
    stream = begin(callers, router, "stream", stream=True).result(PATIENCE)
    following = begin(callers, router, "next", stream=True)
    in_line(router, 1)
    callers.end(stream)
    after = following.result(PATIENCE)
    assert said(up) == ["stream", "next"]
    callers.end(after)
    assert in_flight(router) == [0]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of sockets in a cycle, closed soon after
@pytest.mark.parametrize("cycle", [False, True], ids=["dropped", "in a cycle"])
def test_a_stream_that_is_dropped_frees_its_place(callers: Callers, up: Recorder, cycle: bool) -> None:
    router = one_place(up)
    up.hold(after_events=4)
    kept: list[Any] = [begin(callers, router, "stream", stream=True).result(PATIENCE)]
    following = begin(callers, router, "next", stream=True)
    in_line(router, 1)

    def drop() -> None:
        if cycle:
            kept.append(kept.copy())
            kept[1].append(kept[1])
        kept.clear()
        gc.collect()

    drop() if callers.kind == "sync" else callers.on_loop(drop)
    after = following.result(PATIENCE)
    assert said(up) == ["stream", "next"]
    callers.end(after)
    assert in_flight(router) == [0]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_stream_may_be_collected_in_a_thread_that_counts(up: Recorder) -> None:
    """The collector runs finalizers wherever a thread allocates: also where it has the lock of the state."""
    router = one_place(up)
    up.hold(after_events=4)

    def collect() -> None:
        cycle: list[object] = [router.completion("m", ask("stream"), stream=True)]
        cycle.append(cycle)
        del cycle
        with router._routing.state.lock:
            gc.collect()

    _within_time(collect)
    assert in_flight(router) == [0]


def test_a_waiter_may_be_collected_in_a_thread_that_joins() -> None:
    lines = Lines()

    def collect() -> None:
        cycle: list[object] = [_standing(lines)]
        cycle.append(cycle)
        with lines.place(["a"]) as place:
            assert len(lines) == 2
            del cycle
            with lines._lock:
                gc.collect()
            assert (len(lines), place.first) == (1, True)

    _within_time(collect)
    assert not lines


def _standing(lines: Lines) -> Iterator[None]:
    def stand() -> Iterator[None]:
        with lines.place(["a"]):
            yield

    generator = stand()
    next(generator)
    return generator


def _within_time(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(PATIENCE)


# --- who does not come


def test_a_waiter_whose_loop_is_gone_holds_nobody_up(
    callers: Callers, up: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_middleware.routing.flow._LOOK", 0.1)
    router = one_place(up)
    up.hold()
    (first,) = queued(callers, router, up, "1")
    loop = asyncio.new_event_loop()
    lost = loop.create_task(router.acompletion("m", ask("lost")))
    loop.run_until_complete(asyncio.to_thread(in_line, router, 1))
    loop.close()  # with a task that is pending, as programs do that end in a hurry
    patient = begin(callers, router, "patient")
    in_line(router, 2)
    up.release()
    assert [call.result(PATIENCE).route.attempts for call in (first, patient)] == [1, 1]
    assert begin(callers, router, "last").result(PATIENCE).choices
    assert said(up) == ["1", "patient", "last"]
    lost._log_destroy_pending = False  # type: ignore[attr-defined]
    lost.get_coro().close()
    in_line(router, 0)


def test_who_is_late_is_passed_over_and_keeps_its_place() -> None:
    lines = Lines()
    with lines.place(["a"]) as late, lines.place(["a"]) as following:
        for place in (late, following):
            place.ready(SYNC)
        assert (late.first, following.first) == (True, False)
        late.due -= 2.0
        assert (late.first, following.first) == (True, True)
        lines.freed("a")
        assert [_told(place) for place in (late, following)] == [True, True]
        late.ready(SYNC)
        assert (late.first, following.first) == (True, False)
    assert not lines


def test_who_is_gone_for_long_joins_the_end_when_it_comes_back() -> None:
    lines = Lines()
    with lines.place(["a"]) as gone, lines.place(["a"]) as following:
        gone.due -= 100.0
        following.ready(SYNC)
        assert (following.first, len(lines)) == (True, 1)
        gone.ready(SYNC)
        assert (gone.first, following.first, len(lines)) == (False, True, 2)
    with lines.place(["a"]) as gone, lines.place(["a"]) as following:
        gone.due -= 100.0
        assert (following.first, len(lines)) == (True, 1)
    assert not lines  # it ended without coming back


# --- cooldowns


@pytest.mark.parametrize("status", [429, 503])
def test_r30_where_all_cool_down_a_call_waits_for_the_first(
    callers: Callers, up: Recorder, status: int
) -> None:
    seconds = 0.4
    with Recorder() as other:
        rows = [row(up, id="a"), row(other, id="b")]
        bench: dict[str, Any] = {"allowed_fails": 0, "cooldown_time": seconds, "num_retries": 1}
        router = Router(rows, random=Random(7), wait_for_capacity=5, **bench)
        for each in (up, other):
            each.fail_next(status, headers={"Retry-After-Ms": str(int(seconds * 1000))})
        if status == 503:
            with pytest.raises(UpstreamServerError):
                begin(callers, router, "both fail").result(PATIENCE)
            assert (up.count, other.count) == (1, 1)
        answer = begin(callers, router, "waits").result(PATIENCE)
        assert (answer.route.attempts, up.count + other.count) == (1 if status == 503 else 3, 3)
        again = up if up.count == 2 else other
        assert again.arrivals[1] - again.arrivals[0] >= seconds


def test_r30_a_wait_that_is_too_short_is_told_at_once(callers: Callers, up: Recorder) -> None:
    router = Router([row(up)], wait_for_capacity=5, allowed_fails=0, cooldown_time=1000, num_retries=0)
    up.fail_next(503)
    with pytest.raises(UpstreamServerError):
        begin(callers, router, "fails").result(PATIENCE)
    with pytest.raises(NoCapacityError) as caught:
        begin(callers, router, "cannot wait").result(PATIENCE)
    assert caught.value.retry_after == pytest.approx(1000, abs=PATIENCE)
    assert up.count == 1
