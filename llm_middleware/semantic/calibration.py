"""What the verified mode has learnt in one family of scopes: a Bayesian logistic model of "this answer
fits", how its probabilities are spread over recent look-ups, and how its promises compared with checks.

A family's state is a few kilobytes, in plain floats, with no clock and no chance in it: the same labels in
the same order give the same bytes. Several workers learn from one base and `merge` what each added. Pure
Python: a look-up costs tens of microseconds, and a label, which comes off the request's way, about a tenth
of a millisecond.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from math import exp, log2, pi, sqrt
from operator import mul

from ..errors import CorruptEntryError
from .features import DIMENSIONS, PRIOR_MEAN, PRIOR_SD, VERSION

__all__ = ["State", "sigmoid"]

_MAGIC = b"SEMC"
_HEAD = struct.Struct("<4sHHI")
_BINS = 97
_STEPS = 8  # bins per halving of the chance of being wrong
_WINDOW = 4000.0  # look-ups that the spread of probabilities remembers
_REFRESH = 50  # look-ups between two computations of the bar
_COUNTERS = ("lookups", "labels", "hits", "checks", "wrong", "expected")
_CHECKS_KEPT = 0.998  # of what checks have shown, with each new one
_LEAST_WEIGHT = 1e-3


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + exp(-value)) if value > -30.0 else 1e-13


class State:
    """What was learnt in one family of scopes. Not safe for threads: its owner holds a lock around each
    call."""

    __slots__ = (
        "_bar",
        "_bar_for",
        "_bar_until",
        "_covariance",
        "_increment",
        "_precision",
        "_spread",
        "checks",
        "expected",
        "hits",
        "labels",
        "lookups",
        "mean",
        "wrong",
    )

    def __init__(self) -> None:
        self.mean = list(PRIOR_MEAN)
        self._covariance = _diagonal([sd * sd for sd in PRIOR_SD])
        self._precision = _diagonal([1.0 / (sd * sd) for sd in PRIOR_SD])
        self._spread = [0.0] * _BINS
        self._increment = 1.0
        self._bar, self._bar_for, self._bar_until = float(_BINS), -1.0, -1.0
        self.lookups = self.labels = self.hits = self.checks = 0.0
        self.wrong = self.expected = 0.0

    # ---- the model

    def judge(self, vector: Sequence[float]) -> tuple[float, float]:
        """(mean, variance) of the log-odds that the answer fits."""
        spread = [sum(map(mul, row, vector)) for row in self._covariance]
        return sum(map(mul, self.mean, vector)), sum(map(mul, spread, vector))

    def learn(self, vector: Sequence[float], fits: bool, offset: float = 0.0) -> None:
        """A label: whether the answer fitted. ``offset``: what was known of this entry beside the model."""
        spread = [sum(map(mul, row, vector)) for row in self._covariance]
        log_odds = sum(map(mul, self.mean, vector)) + offset
        variance = sum(map(mul, spread, vector))
        plain = sigmoid(log_odds)
        weight = max(plain * (1.0 - plain), _LEAST_WEIGHT)
        gain = weight / (1.0 + weight * variance)
        error = float(fits) - sigmoid(log_odds / sqrt(1.0 + pi * variance / 8.0))
        step = error * (1.0 - gain * variance)
        for at, (row, share, value) in enumerate(zip(self._covariance, spread, vector, strict=True)):
            factor = gain * share
            self._covariance[at] = [old - factor * other for old, other in zip(row, spread, strict=True)]
            self.mean[at] += step * share
            known = self._precision[at]
            self._precision[at] = [
                old + weight * value * other for old, other in zip(known, vector, strict=True)
            ]
        self.labels += 1

    def checked(self, fits: bool, probability: float) -> None:
        """A would-be hit of ``probability`` that was judged instead of served."""
        self.wrong = self.wrong * _CHECKS_KEPT + (not fits)
        self.expected = self.expected * _CHECKS_KEPT + 1.0 - probability
        self.checks += 1
        self._bar_until = -1.0

    @property
    def strictness(self) -> float:
        """How many times more often checks found a wrong answer than was promised; never below 1."""
        return max(1.0, (1.0 + self.wrong) / (1.0 + self.expected))

    # ---- the bar

    def seen(self, probability: float) -> None:
        """Counts a look-up whose candidate fits with ``probability`` (0: there was none)."""
        self.lookups += 1
        self._increment /= 1.0 - 1.0 / _WINDOW
        self._spread[_bin(probability)] += self._increment
        if self._increment > 1e9:
            self._spread = self._normal_spread()
            self._increment = 1.0

    def passes(self, probability: float, share: float) -> bool:
        """Whether a hit of ``probability`` is among the best whose wrong answers stay under ``share`` of
        look-ups."""
        if share != self._bar_for or self.lookups >= self._bar_until:
            self._bar = self._bar_at(share / self.strictness)
            self._bar_for, self._bar_until = share, self.lookups + _REFRESH
        return probability >= 0.5 and _bin(probability) >= self._bar

    def _bar_at(self, share: float) -> int:
        left = share * sum(self._spread)
        for place in range(_BINS - 1, -1, -1):
            left -= self._spread[place] * 2.0 ** (-(place + 0.5) / _STEPS)
            if left < 0.0:
                return place + 1
        return 0

    def _normal_spread(self) -> list[float]:
        return [count / self._increment for count in self._spread]

    # ---- as bytes

    def to_bytes(self) -> bytes:
        """The state; `from_bytes` takes it back."""
        values = [
            *(getattr(self, name) for name in _COUNTERS),
            *self._normal_spread(),
            *_product(self._precision, self.mean),
        ]
        for at, row in enumerate(self._precision):
            values += row[at:]
        body = struct.pack(f"<{len(values)}d", *values)
        return _HEAD.pack(_MAGIC, VERSION, DIMENSIONS, zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """What `to_bytes` made. `CorruptEntryError` for other bytes, and for those of another version."""
        size = DIMENSIONS
        count = len(_COUNTERS) + _BINS + size + size * (size + 1) // 2
        if len(data) != _HEAD.size + 8 * count:
            raise CorruptEntryError("not the state of a semantic cache")
        magic, version, dimensions, crc = _HEAD.unpack_from(data)
        if (magic, version, dimensions) != (_MAGIC, VERSION, size) or zlib.crc32(data[_HEAD.size :]) != crc:
            raise CorruptEntryError("not the state of a semantic cache of this version")
        values = list(struct.unpack_from(f"<{count}d", data, _HEAD.size))
        state = cls()
        for name, value in zip(_COUNTERS, values, strict=False):
            setattr(state, name, value)
        at = len(_COUNTERS)
        state._spread, at = values[at : at + _BINS], at + _BINS
        weighted, at = values[at : at + size], at + size
        state._set(_symmetric(values[at:], size), weighted)
        return state

    @classmethod
    def merge(cls, mine: State, base: State, stored: State) -> State:
        """``stored`` with what ``mine`` has learnt since ``base``: labels of both count once."""
        merged = cls()
        for name in _COUNTERS:
            added = getattr(mine, name) - getattr(base, name)
            setattr(merged, name, max(0.0, getattr(stored, name) + added))
        both = zip(mine._normal_spread(), stored._normal_spread(), strict=True)
        merged._spread = [(one + other) / 2.0 for one, other in both]
        precision = [
            [old + new - was for old, new, was in zip(*rows, strict=True)]
            for rows in zip(stored._precision, mine._precision, base._precision, strict=True)
        ]
        parts = (_product(state._precision, state.mean) for state in (stored, mine, base))
        merged._set(precision, [old + new - was for old, new, was in zip(*parts, strict=True)])
        return merged

    def _set(self, precision: list[list[float]], weighted: list[float]) -> None:
        self._precision = precision
        self._covariance = _inverse(precision)
        self.mean = _product(self._covariance, weighted)


def _bin(probability: float) -> int:
    return min(_BINS - 1, int(-log2(max(1.0 - probability, 1e-9)) * _STEPS))


def _diagonal(values: Sequence[float]) -> list[list[float]]:
    return [
        [value if at == other else 0.0 for other in range(len(values))] for at, value in enumerate(values)
    ]


def _product(matrix: list[list[float]], vector: Sequence[float]) -> list[float]:
    return [sum(map(mul, row, vector)) for row in matrix]


def _symmetric(values: Sequence[float], size: int) -> list[list[float]]:
    """The matrix whose upper triangle is ``values``, row by row."""
    matrix = [[0.0] * size for _ in range(size)]
    numbers = iter(values)
    for at in range(size):
        for other in range(at, size):
            matrix[at][other] = matrix[other][at] = next(numbers)
    return matrix


def _inverse(matrix: list[list[float]]) -> list[list[float]]:
    """Of a symmetric positive definite matrix: Gauss-Jordan, which needs no pivoting there."""
    size = len(matrix)
    rows = [list(row) + one for row, one in zip(matrix, _diagonal([1.0] * size), strict=True)]
    for at in range(size):
        pivot = 1.0 / rows[at][at]
        lead = rows[at] = [value * pivot for value in rows[at]]
        for other in range(size):
            if other != at and rows[other][at]:
                factor = rows[other][at]
                rows[other] = [value - factor * best for value, best in zip(rows[other], lead, strict=True)]
    return [row[size:] for row in rows]
