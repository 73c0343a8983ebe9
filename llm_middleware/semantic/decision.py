"""The verified mode: serve a stored answer only while the expected share of wrong ones stays under a bound.

`decide` looks at a question's neighbours and says hit, miss, or explore: go upstream as for a miss, and
have the stored answer compared with the fresh one afterwards. `learn` takes the outcome of that
comparison. Both are pure but for the `State` handed to them; chance comes from the caller's generator, so
a run can be repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import sqrt
from random import Random
from typing import Literal

from ..errors import ConfigError
from .calibration import State, sigmoid
from .features import vector_of
from .guards import conflict
from .phrases import Phrase, phrase_of
from .records import Neighbour

__all__ = ["Decision", "Learnt", "Policy", "decide", "learn", "report"]

_TRIES = 3  # candidates that may be passed over because a guard minds
_BLOCKED_KEPT = 16
_HISTORY_KEPT = 0.97  # of an entry's history, with each new label
_LAPSE = 0.005  # of answers that look certain and are wrong all the same: no logistic curve knows of them
_HISTORY_SD = 0.6  # how far one entry's log-odds are thought to lie from the model's


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator chose, and the few constants of the mode.

    ``max_error_rate``: wrong answers as a share of all look-ups, over 0 and under 1. ``judge_budget``:
    comparisons per thousand look-ups. ``floor``: the least cosine that makes a neighbour a candidate.
    """

    max_error_rate: float
    judge_budget: float = 1000.0
    floor: float = 0.55
    safety: float = 0.9
    caution: float = 0.75
    """Standard deviations that a probability is taken lower for not being known better."""
    learning: int = 100
    """Labels before the first hit."""
    shadow: bool = False
    """Nothing is served; what would be is judged, within the budget."""
    check_rate: float = 0.02
    """The share of would-be hits that are judged instead of served, once a few dozen were."""

    def __post_init__(self) -> None:
        if not 0.0 < self.max_error_rate < 1.0:
            raise ConfigError("max_error_rate: expected a share over 0 and under 1", param="max_error_rate")
        if not 0.0 <= self.judge_budget <= 1000.0:
            raise ConfigError("judge_budget: expected calls per thousand, 0 to 1000", param="judge_budget")


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with one question."""

    action: Literal["hit", "miss", "explore"]
    neighbour: Neighbour | None
    """Whose answer to serve (hit), or to compare with the fresh one (explore)."""
    probability: float
    """That its answer is right, taken low; 0 without a neighbour."""
    similarity: float
    """Of the nearest neighbour, whatever became of it; 0 without one."""
    reason: str
    """``match``; ``check`` (a would-be hit, judged instead); ``learning``, ``uncertain``; ``none``
    (nothing near), ``blocked`` (judged different before), ``budget`` (no comparison left), or a guard's
    ``rule:theirs!=ours``."""
    vector: tuple[float, ...] = field(default=(), repr=False)
    offset: float = 0.0
    text: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a comparison changes outside the `State`."""

    payload: Mapping[str, object]
    """The neighbour's payload from now on."""
    group: str | None
    """For the new entry's payload (``"group"``): its answer is that of this group's entries. ``None``: its
    own."""


def decide(
    text: str,
    neighbours: Sequence[Neighbour],
    state: State,
    policy: Policy,
    random: Random,
    *,
    teaches: bool = True,
    unjudged: float = 0.0,
) -> Decision:
    """What to do with ``text``, whose neighbours in its scope are ``neighbours``, best first. Counts one
    look-up, unless there will be no fresh answer to learn from (``teaches``): such look-ups cost nothing, and
    with many of them anybody could lower the bar. ``unjudged``: comparisons that gave no label."""
    near = [one for one in neighbours if one.similarity >= policy.floor]
    asked = phrase_of(text)
    found, passed, why = _candidate(near, asked)
    if found is None:
        if teaches:
            state.seen(0.0)
        return Decision("miss", None, 0.0, neighbours[0].similarity if neighbours else 0.0, why)
    vector = _vector(found, near, passed, policy.floor, asked)
    offset, doubt = _history(found)
    mean, variance = state.judge(vector)
    sure = sigmoid(mean + offset - policy.caution * sqrt(variance + doubt))
    probability = sure * (1.0 - _LAPSE)
    if teaches:
        state.seen(probability)
        action, reason = _action(probability, state, policy, random, unjudged)
    else:
        action, reason = _untaught(probability, state, policy)
    return Decision(action, found, probability, near[0].similarity, reason, tuple(vector), offset, text)


def _candidate(near: Sequence[Neighbour], asked: Phrase) -> tuple[Neighbour | None, int, str]:
    """(the nearest that nothing speaks against, how many were passed over, why the first of them was)"""
    why, name = "", _digest(asked.text)
    for passed, one in enumerate(near[:_TRIES]):
        blocked = one.row.payload.get("not")
        minds = (
            "blocked"
            if isinstance(blocked, list) and name in blocked
            else conflict(phrase_of(one.row.text), asked)
        )
        if minds is None:
            return one, passed, why
        why = why or minds
    return None, len(near), why or "none"


def _vector(
    found: Neighbour, near: Sequence[Neighbour], passed: int, floor: float, asked: Phrase
) -> list[float]:
    group = _group(found)
    same = [one.similarity for one in near if _group(one) == group]
    others = [one.similarity for one in near if _group(one) != group]
    return vector_of(found.similarity, same, others, passed, floor, phrase_of(found.row.text), asked)


def _group(neighbour: Neighbour) -> str:
    return str(neighbour.row.payload.get("group") or neighbour.row.key)


def _history(neighbour: Neighbour) -> tuple[float, float]:
    """(by how much an entry's own labels move its log-odds, the variance of that)"""
    surprise, weight = _told(neighbour)
    variance = 1.0 / (1.0 / _HISTORY_SD**2 + weight)
    return surprise * variance, variance


def _told(neighbour: Neighbour) -> tuple[float, float]:
    told = neighbour.row.payload.get("told")
    if isinstance(told, list) and len(told) == 2:
        return float(told[0]), max(0.0, float(told[1]))
    return 0.0, 0.0


def _action(
    probability: float, state: State, policy: Policy, random: Random, unjudged: float
) -> tuple[Literal["hit", "miss", "explore"], str]:
    affordable = state.labels + unjudged < policy.judge_budget / 1000.0 * (state.lookups + 1.0)
    if state.labels < policy.learning:
        return ("explore", "learning") if affordable else ("miss", "budget")
    if not state.passes(probability, policy.safety * policy.max_error_rate):
        return ("explore", "uncertain") if affordable else ("miss", "budget")
    state.hits += 1
    if random.random() < max(policy.check_rate, 50.0 / (state.hits + 50.0)) and affordable:
        return "explore", "check"
    if policy.shadow:
        return ("explore", "check") if affordable else ("miss", "shadow")
    return "hit", "match"


def _untaught(
    probability: float, state: State, policy: Policy
) -> tuple[Literal["hit", "miss", "explore"], str]:
    if state.labels < policy.learning:
        return "miss", "learning"
    if not state.passes(probability, policy.safety * policy.max_error_rate):
        return "miss", "uncertain"
    return ("miss", "shadow") if policy.shadow else ("hit", "match")


def learn(state: State, decision: Decision, fits: bool) -> Learnt:
    """Takes a judge's verdict on ``decision`` (an explore): whether its neighbour's answer fits the
    question too."""
    if decision.neighbour is None or not decision.vector:
        raise ValueError("only a decision with a neighbour can be learnt from")
    if decision.reason == "check":
        state.checked(fits, decision.probability)
    mean, _ = state.judge(decision.vector)
    expected = sigmoid(mean + decision.offset)
    state.learn(decision.vector, fits, decision.offset)
    surprise, weight = _told(decision.neighbour)
    payload = dict(decision.neighbour.row.payload)
    payload["told"] = [
        round(surprise * _HISTORY_KEPT + fits - expected, 6),
        round(weight * _HISTORY_KEPT + expected * (1.0 - expected), 6),
    ]
    if fits:
        return Learnt(payload, _group(decision.neighbour))
    blocked = payload.get("not")
    kept = [name for name in blocked if isinstance(name, str)] if isinstance(blocked, list) else []
    payload["not"] = [*kept, _digest(phrase_of(decision.text).text)][-_BLOCKED_KEPT:]
    return Learnt(payload, None)


def report(state: State, probability: float = 1.0) -> None:
    """Somebody says that an answer served with ``probability`` was wrong: the bar rises at once."""
    state.checked(False, probability)


def _digest(text: str) -> str:
    return blake2b(text.casefold().encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
