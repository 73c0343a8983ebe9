"""What the semantic cache would have answered, and how much of it wrongly: requests replayed through the
cache's own decisions, `decide_static` and `decide`.

Two kinds of data. A `Log` is questions in the order in which they arrived, each with the class of its right
answer: what is not answered is stored, and may answer what comes later. `Pairs` are a stored question and an
asked one each, and whether one answer serves both. Shares are shares of all requests. Pure Python, with no
input or output of its own; chance comes from a seed, so a run can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, sqrt
from random import Random
from typing import Literal, Protocol

from ..errors import ConfigError
from .calibration import State
from .decision import Policy, decide, learn
from .records import Neighbour, Row
from .static_mode import decide_static

__all__ = [
    "BOUNDS",
    "THRESHOLDS",
    "Counts",
    "Data",
    "Kind",
    "Log",
    "Nearest",
    "Outcome",
    "Pairs",
    "Plan",
    "Shelf",
    "best_static",
    "evaluate",
    "replay_static",
    "replay_verified",
    "verdict",
    "wilson",
]

BOUNDS = (0.01, 0.02, 0.05)
"""Wrong answers as a share of all requests."""
THRESHOLDS = (0.7, 0.75, 0.8, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)

_NEIGHBOURS = 8
_MISTAKES_KEPT = 30
_TOLD_EVERY = 256
_SURE = 1.959964  # standard deviations: 95 %

Kind = Literal["plain", "guards", "target", "verified", "doubtful"]
"""Of a setting: a threshold alone; a threshold with guards; the threshold that an error target gives, with
guards; the verified mode; the verified mode with a judge that errs."""


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95 % interval (Wilson's) of a share that was ``count`` of ``of``: (0, 1) where ``of`` is 0."""
    if not of:
        return 0.0, 1.0
    share, spread = count / of, _SURE**2 / of
    middle = share + spread / 2.0
    half = sqrt(max(0.0, share * (1.0 - share) * spread + spread * spread / 4.0))
    low, high = (middle - half) / (1.0 + spread), (middle + half) / (1.0 + spread)
    return (0.0 if not count else low), (1.0 if count == of else high)


@dataclass(slots=True)
class Counts:
    """Of some requests how many were answered from the cache, and how many of these wrongly."""

    requests: int = 0
    hits: int = 0
    wrong: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests if self.requests else 0.0

    @property
    def wrong_rate(self) -> float:
        return self.wrong / self.requests if self.requests else 0.0

    @property
    def precision(self) -> float | None:
        """The share of hits that were right; None without a hit."""
        return 1.0 - self.wrong / self.hits if self.hits else None

    def minus(self, other: Counts) -> Counts:
        return Counts(self.requests - other.requests, self.hits - other.hits, self.wrong - other.wrong)


@dataclass(slots=True)
class Outcome:
    """What one setting came to.

    ``setting``: the threshold, or the bound on wrong answers. ``threshold``: the cosine, None in the
    verified mode. ``judged``: comparisons by the judge. ``mistakes``: the first thirty wrong answers as
    (stored question, asked question, cosine).
    """

    kind: Kind
    setting: float
    threshold: float | None = None
    whole: Counts = field(default_factory=Counts)
    second: Counts = field(default_factory=Counts)
    judged: int = 0
    mistakes: list[tuple[str, str, float]] = field(default_factory=list)

    @property
    def first(self) -> Counts:
        return self.whole.minus(self.second)

    def _begin(self, requests: int) -> None:
        self.whole.requests, self.second.requests = requests, requests - requests // 2

    def _serve(self, late: bool, fits: bool, neighbour: Neighbour, asked: str) -> None:
        for counts in (self.whole, self.second) if late else (self.whole,):
            counts.hits += 1
            counts.wrong += not fits
        if not fits and len(self.mistakes) < _MISTAKES_KEPT:
            self.mistakes.append((neighbour.row.text, asked, neighbour.similarity))


# ---- data


class Shelf(Protocol):
    """What is stored during one replay."""

    def found(self, at: int, count: int, least: float) -> list[Neighbour]:
        """The nearest ``count`` that are stored when request ``at`` comes, at least ``least`` near."""
        ...

    def keep(self, at: int, group: str | None) -> None:
        """Store request ``at``, whose answer is that of ``group``."""
        ...

    def learnt(self, neighbour: Neighbour, payload: Mapping[str, object]) -> None: ...


class Data(Protocol):
    """Requests to be replayed."""

    asked: Sequence[str]

    def fits(self, at: int, neighbour: Neighbour) -> bool:
        """Whether the neighbour's answer is right for request ``at``."""
        ...

    def shelf(self) -> Shelf: ...


class Nearest(Protocol):
    """Of each request of a log the earlier ones, nearest first."""

    def of(self, at: int) -> Iterable[tuple[int, float]]:
        """(its number, the cosine) of every request before ``at``."""
        ...


class Log:
    """Questions in order of arrival, and of each the class of its right answer. ``nearest``: which earlier
    ones are near it (`vectors.nearest_earlier`)."""

    def __init__(self, asked: Sequence[str], answers: Sequence[str], nearest: Nearest) -> None:
        if len(asked) != len(answers):
            raise ConfigError("answers: expected one for each question", param="answers")
        self.asked, self.answers, self.nearest = asked, answers, nearest

    def fits(self, at: int, neighbour: Neighbour) -> bool:
        return self.answers[int(neighbour.row.key)] == self.answers[at]

    def shelf(self) -> Shelf:
        return _Shelf(self)


class _Shelf:
    def __init__(self, log: Log) -> None:
        self._log = log
        self._rows: list[Row | None] = [None] * len(log.asked)

    def found(self, at: int, count: int, least: float) -> list[Neighbour]:
        found = []
        for other, similarity in self._log.nearest.of(at):
            if similarity < least:
                break
            row = self._rows[other]
            if row is not None:
                found.append(Neighbour(row, similarity))
                if len(found) == count:
                    break
        return found

    def keep(self, at: int, group: str | None) -> None:
        self._rows[at] = _row(at, self._log.asked[at], {"group": group} if group else {})

    def learnt(self, neighbour: Neighbour, payload: Mapping[str, object]) -> None:
        at = int(neighbour.row.key)
        self._rows[at] = _row(at, neighbour.row.text, dict(payload))


class Pairs:
    """Stored questions, asked ones, whether one answer serves both, and the cosine: each pair by itself, with
    no other question near."""

    def __init__(
        self,
        stored: Sequence[str],
        asked: Sequence[str],
        same: Sequence[bool],
        cosines: Sequence[float],
    ) -> None:
        if not len(stored) == len(asked) == len(same) == len(cosines):
            raise ConfigError("pairs: expected as many of each", param="pairs")
        self.stored, self.asked, self.same, self.cosines = stored, asked, same, cosines

    def fits(self, at: int, neighbour: Neighbour) -> bool:
        return self.same[at]

    def shelf(self) -> Shelf:
        return _Apart(self)


class _Apart:
    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def found(self, at: int, count: int, least: float) -> list[Neighbour]:
        similarity = self._pairs.cosines[at]
        if similarity < least:
            return []
        return [Neighbour(_row(at, self._pairs.stored[at], {}), similarity)]

    def keep(self, at: int, group: str | None) -> None: ...

    def learnt(self, neighbour: Neighbour, payload: Mapping[str, object]) -> None: ...


def _row(at: int, text: str, payload: dict[str, object]) -> Row:
    return Row(str(at), "", text, b"", inf, payload)


# ---- replay

Tell = Callable[[int], object]
"""Told how many requests were replayed since it was told last."""


def _silent(_: int) -> None: ...


def _requests(data: Data, tell: Tell) -> Iterator[tuple[int, str, bool]]:
    """(number, question, whether it is of the second half)"""
    half = len(data.asked) // 2
    for at, text in enumerate(data.asked):
        yield at, text, at >= half
        if not (at + 1) % _TOLD_EVERY:
            tell(_TOLD_EVERY)
    tell(len(data.asked) % _TOLD_EVERY)


def replay_static(
    data: Data, threshold: float, *, guards: bool = True, kind: Kind | None = None, tell: Tell = _silent
) -> Outcome:
    """``data`` through the static mode; without ``guards`` a bare threshold, as other caches have it."""
    outcome = Outcome(kind or ("guards" if guards else "plain"), threshold, threshold)
    outcome._begin(len(data.asked))
    shelf = data.shelf()
    for at, text, late in _requests(data, tell):
        found = shelf.found(at, 1, threshold)
        if found and (not guards or decide_static(text, found, threshold).action == "hit"):
            outcome._serve(late, data.fits(at, found[0]), found[0], text)
        else:
            shelf.keep(at, None)
    return outcome


def replay_verified(
    data: Data,
    bound: float,
    *,
    seed: int = 0,
    judge_error: float = 0.0,
    policy: Policy | None = None,
    tell: Tell = _silent,
) -> Outcome:
    """``data`` through the verified mode, learning as it goes, with a judge that knows the right answers and
    errs on a share ``judge_error`` of its verdicts, whatever the question."""
    if not 0.0 <= judge_error < 0.5:
        raise ConfigError("judge_error: expected a share from 0 to under 0.5", param="judge_error")
    policy = policy or Policy(bound)
    random, mistakes, state = Random(seed), Random(seed + 1000), State()
    outcome = Outcome("doubtful" if judge_error else "verified", bound)
    outcome._begin(len(data.asked))
    shelf = data.shelf()
    for at, text, late in _requests(data, tell):
        decision = decide(text, shelf.found(at, _NEIGHBOURS, policy.floor), state, policy, random)
        neighbour, group = decision.neighbour, None
        if neighbour is not None and decision.action == "hit":
            outcome._serve(late, data.fits(at, neighbour), neighbour, text)
            continue
        if neighbour is not None and decision.action == "explore":
            erred = judge_error > 0.0 and mistakes.random() < judge_error
            learnt = learn(state, decision, data.fits(at, neighbour) != erred)
            shelf.learnt(neighbour, learnt.payload)
            group, outcome.judged = learnt.group, outcome.judged + 1
        shelf.keep(at, group)
    return outcome


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be replayed. ``targets``: of each error target the cosine that it comes to."""

    thresholds: Sequence[float] = THRESHOLDS
    targets: Mapping[float, float] = field(default_factory=dict)
    bounds: Sequence[float] = BOUNDS
    judge_error: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for bound in self.bounds:
            Policy(bound)
        if not all(0.0 < threshold <= 1.0 for threshold in (*self.thresholds, *self.targets.values())):
            raise ConfigError("thresholds: expected cosines over 0, up to 1", param="thresholds")
        if not 0.0 <= self.judge_error < 0.5:
            raise ConfigError("judge_error: expected a share from 0 to under 0.5", param="judge_error")

    @property
    def replays(self) -> int:
        """How many times the data are gone through."""
        return (
            2 * len(self.thresholds) + len(self.targets) + len(self.bounds) * (2 if self.judge_error else 1)
        )


def evaluate(data: Data, plan: Plan, tell: Tell = _silent) -> list[Outcome]:
    """Every setting of ``plan`` on ``data``: thresholds without and with guards, error targets, the verified
    mode, and that with a judge that errs."""
    outcomes = [
        replay_static(data, threshold, guards=guards, tell=tell)
        for guards in (False, True)
        for threshold in sorted(plan.thresholds)
    ]
    for target, threshold in plan.targets.items():
        outcome = replay_static(data, threshold, kind="target", tell=tell)
        outcome.setting = target
        outcomes.append(outcome)
    for errs in (0.0, plan.judge_error) if plan.judge_error else (0.0,):
        outcomes += [
            replay_verified(data, bound, seed=plan.seed, judge_error=errs, tell=tell) for bound in plan.bounds
        ]
    return outcomes


# ---- which setting


def best_static(outcomes: Iterable[Outcome], bound: float) -> Outcome | None:
    """Of the thresholds with guards that are sure to keep to ``bound`` in the *first* half the one with the
    most hits there: what it does in the second half was not looked at. None where no threshold is."""
    fine = [
        outcome
        for outcome in outcomes
        if outcome.kind == "guards" and verdict(outcome.first, bound) == "sure"
    ]
    return max(
        fine, key=lambda outcome: (outcome.first.hits, -outcome.first.wrong, outcome.setting), default=None
    )


def verdict(counts: Counts, bound: float) -> Literal["sure", "likely", "broken"]:
    """Whether wrong answers stay within ``bound``: of the 95 % interval all (sure), or at least what was
    measured (likely)."""
    if counts.wrong > bound * counts.requests:
        return "broken"
    return "sure" if wilson(counts.wrong, counts.requests)[1] <= bound else "likely"
