"""What a Router lets through, end to end: limits, calls in flight, learning, and answers that cost none."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llm_middleware import CacheManager
from llm_middleware.errors import ConfigError, NoCapacityError
from llm_middleware.routing.router import Router
from llm_middleware.testing import FakeClock
from tests.routing.callers import PATIENCE, Callers, Recorder, ask, in_flight, in_line, row, said

ROOT = Path(__file__).parents[2]
STRATEGIES = (
    "simple-shuffle",
    "usage-based-routing",
    "usage-based-routing-v2",
    "least-busy",
    "latency-based-routing",
    "cost-based-routing",
)


@pytest.fixture(params=["sync", "async"])
def callers(request: pytest.FixtureRequest) -> Iterator[Callers]:
    made = Callers(request.param)
    yield made
    made.close()


@pytest.fixture
def up() -> Iterator[Recorder]:
    with Recorder() as recorder:
        yield recorder


@pytest.fixture
def ups() -> Iterator[list[Recorder]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Recorder()) for _ in range(2)]


def clocked(*rows: dict[str, Any], **settings: Any) -> tuple[Router, FakeClock]:
    router, clock = Router(list(rows), random=Random(7), **settings), FakeClock()
    router._routing.clock = clock
    return router, clock


def attempt(callers: Callers, router: Router, content: str = "?", **options: object) -> float | None:
    """None where the call was answered; where it was refused, the seconds it was told to wait."""
    try:
        callers(router, "completion", "m", ask(content), **options)
    except NoCapacityError as exc:
        return exc.retry_after
    return None


# --- requests and tokens of a minute


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_r5_r9_of_twelve_calls_ten_pass(callers: Callers, up: Recorder, strategy: str) -> None:
    router, clock = clocked(row(up, rpm=10), routing_strategy=strategy)
    told = []
    for _ in range(12):
        told.append(attempt(callers, router))
        clock.advance(4)
    assert told == [None] * 10 + [20.0, 16.0]
    assert up.count == 10
    clock.advance(12)
    assert attempt(callers, router) is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_r6_the_rest_is_told_the_true_rest_of_the_minute(
    callers: Callers, up: Recorder, strategy: str
) -> None:
    router, clock = clocked(row(up, rpm=2), routing_strategy=strategy)
    told = []
    for _ in range(6):
        told.append(attempt(callers, router))
        clock.advance(5)
    assert told == [None, None, 50.0, 45.0, 40.0, 35.0]
    assert up.count == 2


def test_r6_a_wait_that_is_too_short_is_not_begun(callers: Callers, up: Recorder) -> None:
    router, _ = clocked(row(up, rpm=2), wait_for_capacity=59)
    assert [attempt(callers, router) for _ in range(4)] == [None, None, 60.0, 60.0]
    in_line(router, 0)


def test_r6_the_rest_waits_and_passes_in_order(
    callers: Callers, up: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = 0.4
    monkeypatch.setattr("llm_middleware.routing.limits._MINUTE", window)
    router = Router([row(up, rpm=2)], wait_for_capacity=20)
    calls = [callers.begin(router, "completion", "m", ask(content)) for content in "12"]
    assert [call.result(PATIENCE).route.attempts for call in calls] == [1, 1]
    for place, content in enumerate("3456", 1):
        calls.append(callers.begin(router, "completion", "m", ask(content)))
        in_line(router, place)
    assert [call.result(PATIENCE).route.attempts for call in calls] == [1] * 6
    order = said(up)
    # Two at a time, so either may be there before the other.
    assert [set(order[place : place + 2]) for place in (0, 2, 4)] == [set("12"), set("34"), set("56")]
    assert up.arrivals[2] - up.arrivals[0] >= window * 0.9
    assert up.arrivals[4] - up.arrivals[2] >= window * 0.9


def test_tokens_have_a_limit_end_to_end(callers: Callers, up: Recorder) -> None:
    """What a call used counts, not what it was thought to use."""
    router, clock = clocked(row(up, tpm=1000))
    usage = {"prompt_tokens": 900, "completion_tokens": 60, "total_tokens": 960}
    choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
    up.fail_next(200, body={"object": "chat.completion", "choices": [choice], "usage": usage})
    assert attempt(callers, router, "w" * 80) is None  # 24 tokens, by the estimate
    clock.advance(10)
    assert attempt(callers, router, "w" * 160) == 50.0  # 44 tokens
    assert attempt(callers, router, "w" * 16) is None  # 8
    clock.advance(50)
    assert attempt(callers, router, "w" * 160) is None
    assert up.count == 3


def test_the_second_deployment_takes_what_the_first_has_no_room_for(
    callers: Callers, ups: list[Recorder]
) -> None:
    first, second = ups
    router, _ = clocked(row(first, rpm=2, order=1), row(second, rpm=1, order=2))
    assert [attempt(callers, router) for _ in range(4)] == [None, None, None, 60.0]
    assert (first.count, second.count) == (2, 1)


# --- calls in flight


@pytest.mark.parametrize("kind", ["sync", "async", "mixed"])
def test_r55_eight_callers_and_one_place(kind: str) -> None:
    callers = Callers(kind)
    with Recorder(latency=0.02) as up:
        router = Router([row(up, max_parallel_requests=1)], wait_for_capacity=60)
        calls = [
            callers.begin(router, "completion", "m", ask(f"{caller}"))
            for _ in range(4)
            for caller in range(8)
        ]
        assert [call.result(PATIENCE).route.attempts for call in calls] == [1] * 32
        assert (up.most, up.count, in_flight(router)) == (1, 32, [0])
        callers.close(router)


@pytest.mark.parametrize("name", ["max_parallel_requests", "default_max_parallel_requests"])
def test_r55_the_routers_own_limit_is_that_of_deployments_without_one(
    callers: Callers, ups: list[Recorder], name: str
) -> None:
    first, second = ups
    given: dict[str, Any] = {name: 3, "wait_for_capacity": 60}
    router = Router([row(first, "m"), row(second, "n", max_parallel_requests=5)], **given)
    assert [each.max_parallel_requests for each in router.deployments] == [3, 5]
    for up in ups:
        up.hold()
    calls = [
        callers.begin(router, "completion", model, ask(str(number))) for model in "mn" for number in range(8)
    ]
    first.wait_for(3)
    second.wait_for(5)
    in_line(router, 8)
    for up in ups:
        up.release()
    assert [call.result(PATIENCE).route.attempts for call in calls] == [1] * 16
    assert (first.most, second.most) == (3, 5)


def test_r57_the_cap_holds_for_long_and_among_many_others(callers: Callers, up: Recorder) -> None:
    others = [row(up, f"other-{number}") for number in range(300)]
    router, clock = clocked(row(up, max_parallel_requests=2, rpm=5), *others, timeout=None)
    up.hold()
    held = [callers.begin(router, "completion", "m", ask(content)) for content in "12"]
    up.wait_for(2)
    clock.advance(600)
    routing = router._routing
    taken = [routing.limits.take(routing.groups.find(f"other-{n}"), 1, clock()) for n in range(300)]  # type: ignore[attr-defined]
    gc.collect()
    assert sum(in_flight(router)) == 302
    with pytest.raises(NoCapacityError):
        callers(router, "completion", "m", ask("3"))
    assert up.count == 2
    del taken
    up.release()
    assert [call.result(PATIENCE).route.attempts for call in held] == [1, 1]
    # The minute of those two is over: five more pass.
    assert [attempt(callers, router) for _ in range(6)] == [None] * 5 + [60.0]
    assert sum(in_flight(router)) == 0


FORKED = """
import os, sys, threading
from llm_middleware.routing.router import Router
params = {"model": "openai/x", "api_key": "k", "api_base": sys.argv[1], "max_parallel_requests": 1}
router = Router([{"model_name": "m", "litellm_params": params}], wait_for_capacity=5)
ask = [{"role": "user", "content": "?"}]
stream = router.completion("m", ask, stream=True)
state = router._routing.state
ready, over = threading.Event(), threading.Event()

def busy():
    with state.lock, state.lines.place(["x"]), state.lines._lock:
        ready.set()
        over.wait()

thread = threading.Thread(target=busy)
thread.start()
ready.wait()
child = os.fork()
if not child:
    print([state.of(each).in_flight for each in router.deployments], len(state.lines), sep="|")
    with state.lines.place(["x"]):
        for _ in range(2):
            print(router.completion("m", ask).choices[0].finish_reason, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print([state.of(each).in_flight for each in router.deployments], len(state.lines), sep="|", flush=True)
over.set()
thread.join()
stream.close()
"""


def test_r57_a_forked_child_counts_its_own_calls(up: Recorder) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, up.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout.splitlines() == ["[0]|0", "stop", "stop", "[1]|1"], done.stderr


# --- learning


def test_r10_two_routers_learn_for_themselves(callers: Callers) -> None:
    with Recorder(latency=0.15) as slow, Recorder() as fast:
        routers = [
            Router(
                [row(one, id="a"), row(other, id="b")],
                routing_strategy="latency-based-routing",
                random=Random(7),
            )
            for one, other in ((slow, fast), (fast, slow))
        ]
        went: list[list[str]] = [[], []]
        for _ in range(40):
            for router, names in zip(routers, went, strict=True):
                names.append(callers(router, "completion", "m", ask("?")).route.deployment)
        assert set(went[0]) == set(went[1]) == {"a", "b"}
        assert went[0].count("b") >= 36
        assert went[1].count("a") >= 36
        assert fast.count == went[0].count("b") + went[1].count("a")


# --- answers that are kept


def test_hits_cost_no_limit(callers: Callers, up: Recorder) -> None:
    router, clock = clocked(
        row(up, rpm=1, tpm=1000, max_parallel_requests=1), cache_responses=True, wait_for_capacity=0
    )
    first = callers(router, "completion", "m", ask("once"))
    state = router._routing.state.of(router.deployments[0])
    before = (state.requests, state.tokens)
    up.hold()
    for _ in range(20):
        again = callers(router, "completion", "m", ask("once"))
        assert (again.cache.status, again.id, again.route.attempts) == ("hit", first.id, 0)
    assert (state.requests, state.tokens) == before
    assert attempt(callers, router, "another") == 60.0
    clock.advance(60)
    other = callers.begin(router, "completion", "m", ask("another"))
    up.wait_for(2)
    assert callers(router, "completion", "m", ask("once")).cache.status == "hit"  # though none is free
    up.release()
    assert other.result(PATIENCE).cache.status == "miss"
    assert up.count == 2


def statuses(callers: Callers, router: Router, *models: str) -> list[str]:
    return [callers(router, "completion", model, ask("?")).cache.status for model in models]


def test_groups_that_are_listed_together_share_answers(callers: Callers, up: Recorder) -> None:
    rows = [row(up, name) for name in ("gpt", "azure-gpt", "claude", "lone")]
    router = Router(
        rows,
        cache=CacheManager(),
        caching_groups=[["gpt", "azure-gpt"], ("claude",)],
        model_group_alias={"best": "azure-gpt", "solo": "lone"},
    )
    assert statuses(callers, router, "gpt", "azure-gpt", "best", "gpt") == ["miss", "hit", "hit", "hit"]
    assert statuses(callers, router, "claude", "lone", "solo", "claude") == ["miss", "miss", "hit", "hit"]
    assert up.count == 3


def test_groups_that_are_not_listed_share_nothing(callers: Callers, up: Recorder) -> None:
    router = Router([row(up, name) for name in ("gpt", "azure-gpt")], cache_responses=True)
    assert statuses(callers, router, "gpt", "azure-gpt", "gpt", "azure-gpt") == ["miss", "miss", "hit", "hit"]
    assert up.count == 2


def test_shared_answers_are_of_one_scope_and_of_every_kind(callers: Callers, up: Recorder) -> None:
    router = Router(
        [row(up, "gpt"), row(up, "azure-gpt")], cache_responses=True, caching_groups=[["gpt", "azure-gpt"]]
    )
    assert callers(router, "embedding", "azure-gpt", ["a"]).cache.status == "miss"
    assert callers(router, "embedding", "gpt", ["a"]).cache.status == "hit"
    assert callers(router, "embedding", "gpt", ["a", "b"]).cache.status == "partial"
    assert [call.json["input"] for call in up.calls] == [["a"], ["b"]]
    assert callers(router, "completion", "gpt", ask("?"), scope="one").cache.status == "miss"
    assert callers(router, "completion", "azure-gpt", ask("?"), scope="two").cache.status == "miss"
    assert callers(router, "completion", "azure-gpt", ask("?"), scope="one").cache.status == "hit"


@pytest.mark.parametrize(
    ("groups", "param"),
    [
        ("gpt", "caching_groups"),
        (3, "caching_groups"),
        ({"gpt": ["b"]}, "caching_groups"),
        (["gpt"], "caching_groups[0]"),
        ([["a"], 3], "caching_groups[1]"),
        ([["a", 3]], "caching_groups[0]"),
        ([["a", "b"], ["c", "b"]], "caching_groups"),
        ([["a", "b"], ["a", "c"]], "caching_groups"),
        ([["a", "b"], ["b", "a"]], "caching_groups"),
    ],
)
def test_wrong_caching_groups_are_refused(groups: object, param: str) -> None:
    with pytest.raises(ConfigError, match="caching_groups") as caught:
        Router([], caching_groups=groups)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "name", ["max_parallel_requests", "default_max_parallel_requests", "wait_for_capacity"]
)
@pytest.mark.parametrize("value", [-1, "2", True, float("nan"), float("inf")])
def test_wrong_numbers_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Router([], **{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name.removeprefix("default_")
