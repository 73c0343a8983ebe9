"""Which deployment each strategy tries first, with seeded randomness and a clock that is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest

from llm_middleware.errors import ConfigError, RateLimitError
from llm_middleware.routing.deployment import Deployment
from llm_middleware.routing.limits import MemoryLimits, Outcome, Reservation
from llm_middleware.routing.state import RouterState, View
from llm_middleware.routing.strategies import Strategy, first_order, named_strategy, rank_by_order


def deployment(name: str, **facts: object) -> Deployment:
    return Deployment(id=name, group="gpt", provider="openai", model="gpt", **facts)  # type: ignore[arg-type]


def view(now: float = 0.0, **facts: object) -> View:
    return View(RouterState(), now, **facts)  # type: ignore[arg-type]


def firsts(strategy: Strategy, candidates: Sequence[Deployment], seen: View, calls: int) -> Counter[str]:
    random = Random(7)
    return Counter(strategy.rank(candidates, seen, random)[0].id for _ in range(calls))


def names(ranked: Sequence[Deployment]) -> str:
    return "".join(each.id for each in ranked)


def call(limits: MemoryLimits, target: Deployment, now: float, tokens: int = 0, **outcome: object) -> None:
    taken = limits.take([target], tokens, now)
    assert isinstance(taken, Reservation)
    limits.settle(taken, Outcome(**outcome), now)  # type: ignore[arg-type]


def test_r1_weights_are_shares() -> None:
    counts = firsts(
        named_strategy("simple-shuffle"),
        [deployment("a", weight=1.0), deployment("b", weight=3.0)],
        view(),
        4000,
    )
    assert counts["a"] == pytest.approx(1000, abs=120)
    assert counts["b"] == pytest.approx(3000, abs=120)


def test_r2_without_a_weight_it_is_one() -> None:
    candidates = [deployment("a", weight=1.0), deployment("b"), deployment("c", weight=3.0)]
    counts = firsts(named_strategy("simple-shuffle"), candidates, view(), 2000)
    assert counts["a"] == pytest.approx(400, abs=60)
    assert counts["b"] == pytest.approx(400, abs=60)
    assert counts["c"] == pytest.approx(1200, abs=60)


def test_r3_one_with_rpm_and_one_with_tpm_share_equally() -> None:
    counts = firsts(
        named_strategy("simple-shuffle"), [deployment("a", rpm=10), deployment("b", tpm=90_000)], view(), 2000
    )
    assert counts["a"] == pytest.approx(1000, abs=60)
    assert counts["b"] == pytest.approx(1000, abs=60)


@pytest.mark.parametrize("limit", ["rpm", "tpm"])
def test_r3_limits_that_all_have_are_weights(limit: str) -> None:
    candidates = [deployment("a", **{limit: 100}), deployment("b", **{limit: 300})]
    counts = firsts(named_strategy("simple-shuffle"), candidates, view(), 2000)
    assert counts["a"] == pytest.approx(500, abs=60)


def test_r3_a_weight_that_is_set_counts_more_than_rpm() -> None:
    candidates = [deployment("a", rpm=900, weight=1.0), deployment("b", rpm=100, weight=3.0)]
    assert firsts(named_strategy("simple-shuffle"), candidates, view(), 2000)["b"] == pytest.approx(
        1500, abs=60
    )


def test_r3_a_weight_of_one_that_is_set_is_not_the_same_as_none() -> None:
    strategy = named_strategy("simple-shuffle")
    limited = [deployment("a", rpm=900), deployment("b", rpm=100)]
    assert firsts(strategy, limited, view(), 2000)["a"] == pytest.approx(1800, abs=60)
    weighted = [deployment("a", rpm=900, weight=1.0), deployment("b", rpm=100, weight=1.0)]
    assert firsts(strategy, weighted, view(), 2000)["a"] == pytest.approx(1000, abs=80)
    mixed = [deployment("a", rpm=900), deployment("b", rpm=100, weight=1.0)]
    assert firsts(strategy, mixed, view(), 2000)["a"] == pytest.approx(1000, abs=80)


def test_r4_without_weights_the_choice_is_uniform_and_so_is_the_rest_of_the_ranking() -> None:
    strategy, random = named_strategy("simple-shuffle"), Random(3)
    candidates = [deployment(name) for name in "abc"]
    counts = Counter(names(strategy.rank(candidates, view(), random)) for _ in range(6000))
    assert len(counts) == 6
    assert all(count == pytest.approx(1000, abs=120) for count in counts.values())


def test_a_weight_of_zero_comes_last() -> None:
    candidates = [deployment("a", weight=0.0), deployment("b", weight=1.0), deployment("c", weight=2.0)]
    random = Random(1)
    ranked = {names(named_strategy("simple-shuffle").rank(candidates, view(), random)) for _ in range(200)}
    assert ranked == {"bca", "cba"}


@pytest.mark.parametrize("name", ["usage-based-routing", "usage-based-routing-v2"])
def test_usage_ranks_by_the_tokens_of_the_minute_that_runs(name: str) -> None:
    strategy, state = named_strategy(name), RouterState()
    limits = MemoryLimits(state)
    a, b, c = (deployment(each) for each in "abc")
    call(limits, a, 0.0, 300)
    call(limits, b, 30.0, 200)
    call(limits, c, 30.0, 100)
    assert names(strategy.rank([a, b, c], View(state, 59.9), Random(1))) == "cba"
    assert names(strategy.rank([a, b, c], View(state, 60.0), Random(1))) == "acb"  # a's minute is over


def test_least_busy_ranks_by_calls_in_flight_and_breaks_ties_at_random() -> None:
    strategy, state = named_strategy("least-busy"), RouterState()
    limits = MemoryLimits(state)
    a, b, c = (deployment(each) for each in "abc")
    flying = [limits.take([each], 0, 0.0) for each in (a, a, b)]
    assert names(strategy.rank([a, b, c], View(state, 0.0), Random(1))) == "cba"
    flying.clear()
    assert firsts(strategy, [a, b, c], View(state, 0.0), 3000)["a"] == pytest.approx(1000, abs=100)


def test_r10_two_routers_learn_independently() -> None:
    a, b = deployment("a"), deployment("b")
    shares = []
    for slow in (a, b):
        state, random = RouterState(), Random(5)
        limits, strategy = MemoryLimits(state), named_strategy("latency-based-routing")
        chosen: Counter[str] = Counter()
        for number in range(200):
            now = number * 0.5
            first = strategy.rank([a, b], View(state, now), random)[0]
            chosen[first.id] += 1
            call(limits, first, now, latency=5.0 if first is slow else 0.1)
        shares.append(chosen[(b if slow is a else a).id])
    assert min(shares) >= 180


def test_latency_of_streams_is_until_the_first_token_and_of_others_per_token() -> None:
    strategy, state = named_strategy("latency-based-routing"), RouterState()
    limits = MemoryLimits(state)
    a, b = deployment("a"), deployment("b")
    call(limits, a, 0.0, latency=2.0, output_tokens=100)  # 20 ms a token
    call(limits, b, 0.0, latency=1.0, output_tokens=10)  # 100 ms a token
    call(limits, a, 0.0, first_token=0.9, latency=9.0)
    call(limits, b, 0.0, first_token=0.3, latency=9.0)
    assert names(strategy.rank([a, b], View(state, 1.0), Random(1))) == "ab"
    assert names(strategy.rank([a, b], View(state, 1.0, stream=True), Random(1))) == "ba"


def test_the_latency_buffer_makes_equals() -> None:
    state = RouterState()
    limits = MemoryLimits(state)
    candidates = [deployment(name) for name in "abc"]
    for target, seconds in zip(candidates, (0.10, 0.14, 4.66), strict=True):
        call(limits, target, 0.0, latency=seconds)
    wide = named_strategy("latency-based-routing", lowest_latency_buffer=0.5)
    counts = firsts(wide, candidates, View(state, 0.0), 2000)
    assert counts["a"] == pytest.approx(1000, abs=80)
    assert counts["c"] == 0
    assert firsts(named_strategy("latency-based-routing"), candidates, View(state, 0.0), 100) == {"a": 100}


def test_r14_an_outlier_is_probed_by_one_call_at_a_time_and_returns() -> None:
    strategy, state = named_strategy("latency-based-routing"), RouterState(latency_ttl=60.0)
    limits, random = MemoryLimits(state), Random(1)
    a, b = deployment("a"), deployment("b")
    call(limits, a, 0.0, latency=30.0)
    for now in range(61):
        call(limits, b, float(now), latency=0.2)
        assert names(strategy.rank([a, b], View(state, float(now)), random)) == "ba"
    assert names(strategy.rank([a, b], View(state, 60.5), random)) == "ab"
    probe = limits.take([a], 0, 60.5)
    assert isinstance(probe, Reservation)
    assert names(strategy.rank([a, b], View(state, 60.5), random)) == "ba"
    limits.settle(probe, Outcome(latency=0.1), 60.6)
    assert names(strategy.rank([a, b], View(state, 60.6), random)) == "ab"


def test_recent_latencies_count_more() -> None:
    state = RouterState(latency_ttl=40.0)
    limits, a = MemoryLimits(state), deployment("a")
    call(limits, a, 0.0, latency=9.0)
    call(limits, a, 10.0, latency=3.0)
    assert state.of(a).per_token.value(10.0, 40.0) == pytest.approx((9.0 / 2 + 3.0) / 1.5)
    assert state.of(a).per_token.value(50.1, 40.0) is None


def test_r15_order_two_serves_when_order_one_cools() -> None:
    state, random = RouterState(), Random(1)
    limits, strategy = MemoryLimits(state), named_strategy("simple-shuffle")
    one, two, zwei = deployment("1", order=1), deployment("2", order=2), deployment("3", order=2)
    candidates = [two, one, zwei]
    assert list(first_order(candidates)) == [one]
    for _ in range(50):
        taken = limits.take(rank_by_order(strategy, candidates, View(state, 0.0), random), 0, 0.0)
        assert isinstance(taken, Reservation)
        assert taken.deployment is one
    limits.settle(taken, Outcome(error=RateLimitError("")), 0.0)
    served = set()
    for _ in range(50):
        taken = limits.take(rank_by_order(strategy, candidates, View(state, 1.0), random), 0, 1.0)
        assert isinstance(taken, Reservation)
        served.add(taken.deployment.id)
    assert served == {"2", "3"}


def priced(name: str, read: float, written: float) -> Deployment:
    return deployment(name, info={"input_cost_per_token": read, "output_cost_per_token": written})


def test_r21_cost_is_that_of_this_request() -> None:
    # The sum of the rates is lower at a, the price of a long prompt with a short answer at b.
    a, b, free = priced("a", 3e-6, 4e-6), priced("b", 1e-6, 9e-6), deployment("c")
    strategy = named_strategy("cost-based-routing")
    long = view(prompt_tokens=10_000, max_tokens=10)
    assert names(strategy.rank([free, a, b], long, Random(1))) == "bac"
    assert names(strategy.rank([free, a, b], view(prompt_tokens=10, max_tokens=10_000), Random(1))) == "abc"
    assert names(strategy.rank([a, b], view(prompt_tokens=100), Random(1))) == "ab"  # 256 tokens of answer


def test_a_price_that_is_none_comes_last() -> None:
    a = deployment("a", info={"input_cost_per_token": "1e-6", "output_cost_per_token": "1e-6"})
    b = deployment("b", info={"input_cost_per_token": 1e-6, "output_cost_per_token": None})
    strategy, seen = named_strategy("cost-based-routing"), view(prompt_tokens=10)
    ranked = {names(strategy.rank([a, b, priced("c", 9, 9)], seen, Random(seed))) for seed in range(30)}
    assert ranked == {"cab", "cba"}


def test_costs_that_are_the_same_are_ties() -> None:
    counts = firsts(
        named_strategy("cost-based-routing"),
        [priced("a", 0, 0), priced("b", 0, 0)],
        view(prompt_tokens=5),
        2000,
    )
    assert counts["a"] == pytest.approx(1000, abs=80)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("least_busy", r"did you mean 'least-busy'\?"),
        ("latency-based", r"did you mean 'latency-based-routing'\?"),
        ("zzz", r"there are simple-shuffle, usage-based-routing"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        named_strategy(name)


def test_options_that_a_strategy_does_not_have() -> None:
    with pytest.raises(ConfigError, match="least-busy does not take these: lowest_latency_buffer"):
        named_strategy("least-busy", lowest_latency_buffer=0.1)


@pytest.mark.parametrize("value", ["1", True, float("nan"), float("inf"), -1, None])
@pytest.mark.parametrize(
    ("name", "option"),
    [("latency-based-routing", "lowest_latency_buffer"), ("cost-based-routing", "output_tokens")],
)
def test_the_value_of_an_option_is_a_number(name: str, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{option}: expected a (whole )?number >= 0") as caught:
        named_strategy(name, **{option: value})
    assert caught.value.param == option


@pytest.mark.parametrize(
    "name", ["simple-shuffle", "least-busy", "latency-based-routing", "cost-based-routing"]
)
def test_no_candidates_make_an_empty_ranking(name: str) -> None:
    assert named_strategy(name).rank([], view(), Random(1)) == []
    assert rank_by_order(named_strategy(name), [], view(), Random(1)) == []
