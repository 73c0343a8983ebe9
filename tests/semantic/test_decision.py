"""The decision: verified mode under a bound, static mode under a threshold, and the state between them
(C103)."""

from __future__ import annotations

import math
from random import Random

import pytest

from llm_middleware.errors import ConfigError, CorruptEntryError
from llm_middleware.semantic.calibration import State
from llm_middleware.semantic.decision import Decision, Policy, decide, learn, report
from llm_middleware.semantic.features import DIMENSIONS, PRIOR_MEAN, PRIOR_SD
from llm_middleware.semantic.records import Neighbour, Row
from llm_middleware.semantic.static_mode import decide_static, shipped_pairs, threshold_for

POLICY = Policy(max_error_rate=0.05)


def near(
    similarity: float, text: str = "How do I reset my password?", key: str = "a", **payload: object
) -> Neighbour:
    return Neighbour(Row(key, "s", text, b"", math.inf, payload), similarity)


def simulate(
    state: State, count: int, seed: int = 3, errs: float = 0.0, policy: Policy = POLICY
) -> tuple[int, int, int]:
    """(hits, wrong hits, comparisons) over ``count`` look-ups whose answers fit with a chance that rises
    with cosine."""
    random, world = Random(seed), Random(seed + 1)
    hits = wrong = judged = 0
    for _ in range(count):
        similarity = world.uniform(0.6, 1.0)
        fits = world.random() < 1.0 / (1.0 + math.exp(-30.0 * (similarity - 0.8)))
        decision = decide("How can I reset my password?", [near(similarity)], state, policy, random)
        if decision.action == "hit":
            hits, wrong = hits + 1, wrong + (not fits)
        elif decision.action == "explore":
            judged += 1
            learn(state, decision, fits != (world.random() < errs))
    return hits, wrong, judged


@pytest.mark.parametrize("bound", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("errs", [0.0, 0.05])
def test_wrong_answers_stay_under_the_bound_and_hits_come(bound: float, errs: float) -> None:
    hits, wrong, _ = simulate(State(), 6000, errs=errs, policy=Policy(bound))
    assert wrong <= bound * 6000
    assert hits > (1500 if not errs else 200)


def test_a_looser_bound_gives_more_hits() -> None:
    assert simulate(State(), 4000, policy=Policy(0.01))[0] < simulate(State(), 4000, policy=Policy(0.1))[0]


def test_there_is_no_hit_before_enough_was_judged() -> None:
    state = State()
    hits, _, judged = simulate(state, 100)
    assert (hits, judged, state.labels) == (0, 100, 100)
    decision = decide("x y z", [near(0.99)], State(), POLICY, Random(1))
    assert (decision.action, decision.reason, decision.similarity) == ("explore", "learning", 0.99)


def test_the_same_seed_gives_the_same_decisions_and_bytes() -> None:
    one, other = State(), State()
    assert simulate(one, 1500) == simulate(other, 1500)
    assert one.to_bytes() == other.to_bytes()


def test_a_guard_vetoes_whatever_was_learnt() -> None:
    """C103"""
    state = State()
    simulate(state, 3000)
    stored = near(0.995, "How do I enable 2FA?")
    decision = decide("How do I disable 2FA?", [stored], state, POLICY, Random(1))
    assert (decision.action, decision.reason) == ("miss", "opposite:enabl!=disabl")
    assert (decision.neighbour, decision.similarity) == (None, 0.995)


def test_a_vetoed_neighbour_is_passed_over_for_the_next() -> None:
    vetoed, right = near(0.99, "How do I enable 2FA?", "a"), near(0.9, "How can I disable 2FA?", "b")
    decision = decide("How do I disable 2FA?", [vetoed, right], State(), POLICY, Random(1))
    assert decision.action == "explore"
    assert decision.neighbour is right


def test_nothing_near_is_a_miss_with_nothing_to_compare() -> None:
    assert decide("x", [], State(), POLICY, Random(1)) == Decision("miss", None, 0.0, 0.0, "none")
    assert decide("x", [near(0.5)], State(), POLICY, Random(1)).reason == "none"


def test_a_positive_verdict_puts_the_new_wording_into_the_group() -> None:
    state = State()
    decision = decide("How can I reset it?", [near(0.9, key="ns:1")], state, POLICY, Random(1))
    assert learn(state, decision, True).group == "ns:1"
    decision = decide("How can I reset it?", [near(0.9, key="ns:2", group="ns:1")], state, POLICY, Random(1))
    assert learn(state, decision, True).group == "ns:1"


def test_a_negative_verdict_blocks_the_pair_and_no_other() -> None:
    state = State()
    decision = decide("How can I reset it?", [near(0.9)], state, POLICY, Random(1))
    learnt = learn(state, decision, False)
    assert learnt.group is None
    again = near(0.9, "How do I reset my password?", "a", **dict(learnt.payload))
    assert decide("how can I RESET it?", [again], state, POLICY, Random(1)).reason == "blocked"
    assert decide("How can we reset it?", [again], state, POLICY, Random(1)).reason == "learning"


def test_an_entry_that_was_wrong_before_is_trusted_less() -> None:
    state, fresh = State(), near(0.9)
    asked = "How can I reset my password?"
    before = decide(asked, [fresh], state, POLICY, Random(1))
    spoilt = near(0.9, told=[-3.0, 1.0])
    assert decide(asked, [spoilt], state, POLICY, Random(1)).probability < before.probability


@pytest.mark.parametrize(
    "payload", [{"told": "x"}, {"told": [1]}, {"not": 5}, {"group": None}, {"not": [7, None]}]
)
def test_a_payload_of_others_does_no_harm(payload: dict[str, object]) -> None:
    decision = decide(
        "How can I reset it?",
        [near(0.9, "How do I reset my password?", "a", **payload)],
        State(),
        POLICY,
        Random(1),
    )
    assert decision.action == "explore"


def test_the_judge_is_asked_within_its_budget() -> None:
    state = State()
    _, _, judged = simulate(state, 4000, policy=Policy(0.05, judge_budget=50.0))
    assert judged <= 4000 * 0.05 + 1
    assert judged >= 150


def test_what_is_learnt_survives_as_bytes() -> None:
    state = State()
    simulate(state, 1000)
    again = State.from_bytes(state.to_bytes())
    vector = [1.0] + [0.3] * (DIMENSIONS - 1)
    assert again.judge(vector) == pytest.approx(state.judge(vector), rel=1e-6)
    assert (again.lookups, again.labels, again.hits) == (state.lookups, state.labels, state.hits)
    assert len(state.to_bytes()) < 4000


@pytest.mark.parametrize(
    "spoil", [lambda b: b"", lambda b: b[:-1], lambda b: b"X" + b[1:], lambda b: b[:-1] + b"\x55"]
)
def test_other_bytes_are_refused(spoil: object) -> None:
    with pytest.raises(CorruptEntryError):
        State.from_bytes(spoil(State().to_bytes()))  # type: ignore[operator]


def test_two_workers_states_merge_to_what_one_would_know() -> None:
    base = State()
    simulate(base, 400, seed=1)
    one, other, both = (State.from_bytes(base.to_bytes()) for _ in range(3))
    for state, fits, times in ((one, True, 30), (other, False, 20)):
        for _ in range(times):
            state.learn([1.0] * DIMENSIONS, fits)
    merged = State.merge(one, base, other)
    for fits, times in ((True, 30), (False, 20)):
        for _ in range(times):
            both.learn([1.0] * DIMENSIONS, fits)
    assert merged.labels == both.labels == base.labels + 50
    vector = [1.0] * DIMENSIONS
    mean, variance = merged.judge(vector)
    alone, other_alone = one.judge(vector)[0], other.judge(vector)[0]
    assert other_alone < mean < alone
    assert variance < min(one.judge(vector)[1], other.judge(vector)[1])


def test_merging_nothing_new_changes_nothing() -> None:
    base, stored = State(), State()
    simulate(stored, 500)
    merged = State.merge(base, base, stored)
    vector = [1.0] + [0.2] * (DIMENSIONS - 1)
    assert merged.judge(vector) == pytest.approx(stored.judge(vector), rel=1e-9)


def test_feedback_tightens_and_never_loosens() -> None:
    state = State()
    simulate(state, 2000)
    state.wrong = state.expected = 0.0
    for _ in range(50):
        state.checked(True, 0.5)
    assert state.strictness == 1.0
    state.wrong = state.expected = 0.0
    report(state)
    report(state)
    assert state.strictness > 2.9
    strict, _, _ = simulate(state, 300, seed=9)
    plain = State()
    simulate(plain, 2000)
    assert strict < simulate(plain, 300, seed=9)[0]


def test_a_decision_without_a_neighbour_teaches_nothing() -> None:
    with pytest.raises(ValueError, match="only a decision with a neighbour"):
        learn(State(), decide("x", [], State(), POLICY, Random(1)), True)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_the_bound_is_a_share(rate: float) -> None:
    with pytest.raises(ConfigError) as raised:
        Policy(rate)
    assert raised.value.param == "max_error_rate"


def test_the_budget_is_per_thousand() -> None:
    with pytest.raises(ConfigError) as raised:
        Policy(0.01, judge_budget=1001.0)
    assert raised.value.param == "judge_budget"


def test_the_prior_names_each_dimension() -> None:
    assert len(PRIOR_MEAN) == len(PRIOR_SD) == DIMENSIONS == 22


# ---- static


def test_a_static_hit_needs_the_threshold_and_no_veto() -> None:
    asked = "How can I reset my password?"
    assert decide_static(asked, [near(0.93)], 0.92).action == "hit"
    assert decide_static(asked, [near(0.91)], 0.92).reason == "uncertain"
    assert decide_static(asked, [], 0.92).reason == "none"


def test_a_vetoed_best_neighbour_ends_a_static_look_up() -> None:
    """C103"""
    vetoed, right = near(0.99, "How do I enable 2FA?"), near(0.98, "How can I disable 2FA?")
    decision = decide_static("How do I disable 2FA?", [vetoed, right], 0.9)
    assert (decision.action, decision.reason) == ("miss", "opposite:enabl!=disabl")


def test_four_hundred_pairs_are_shipped_and_differ() -> None:
    pairs = shipped_pairs()
    assert len(pairs) == 400
    assert sum(fits for *_, fits in pairs) == 200
    assert len({pair[:2] for pair in pairs}) == 400
    assert all(a and b and a != b for a, b, _ in pairs)


def test_a_smaller_error_target_gives_a_higher_threshold() -> None:
    import numpy as np

    def embed(texts: object) -> list[bytes]:
        made = []
        for text in texts:  # type: ignore[attr-defined]
            vector = np.zeros(512, "<f4")
            for word in text.lower().split():
                vector[sum(map(ord, word)) % 512] += 1.0
            made.append((vector / np.linalg.norm(vector)).tobytes())
        return made

    strict, loose = threshold_for(0.001, embed), threshold_for(0.05, embed)
    assert 0.5 <= loose < strict <= 0.999
    with pytest.raises(ConfigError) as raised:
        threshold_for(0.0, embed)
    assert raised.value.param == "max_error"
