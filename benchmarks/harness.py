"""How everything here is measured.

A candidate is a function that does one sample of work and returns the CPU seconds of one operation. The
candidates of a comparison take turns, in rotating order, so that what else the machine does meets all of
them alike; a ratio is taken within each round, and the row tells the median of these ratios and their range.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Row", "Samples", "compare", "in_process", "quick", "set_quick", "show", "table"]

T = TypeVar("T")

_ROUNDS, _QUICK_ROUNDS = 11, 3
_SAMPLE_S, _QUICK_SAMPLE_S = 0.15, 0.05

_quick = False


def set_quick(on: bool) -> None:
    """Fewer rounds of less work: to see that everything runs, not to quote."""
    global _quick
    _quick = on


def quick() -> bool:
    return _quick


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: ratios to ``floor``, or figures in ``unit`` where that is given.

    ``goal``: what ``median`` must not exceed, None where the figure is only reported. ``absolute``: what the
    ratio stands for, in microseconds, for orientation.
    """

    path: str
    floor: str
    goal: float | None
    median: float
    low: float
    high: float
    unit: str = ""
    absolute: str = ""

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.median <= self.goal


@dataclass(frozen=True, slots=True)
class Samples:
    """CPU seconds of one operation, by candidate and round."""

    by_name: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.by_name[name])

    def row(self, path: str, name: str, floor: str, described: str, goal: float | None = None) -> Row:
        """``name`` against ``floor``, which the table describes as ``described``."""
        ratios = [own / least for own, least in zip(self.by_name[name], self.by_name[floor], strict=True)]
        absolute = f"{self.median(name) * 1e6:,.1f} / {self.median(floor) * 1e6:,.1f} µs"
        return Row(
            path, described, goal, statistics.median(ratios), min(ratios), max(ratios), absolute=absolute
        )


def compare(candidates: Mapping[str, Callable[[], float]], *, rounds: int = _ROUNDS) -> Samples:
    """Sample every candidate once to warm up, and then once in each of ``rounds`` rounds."""
    for sample in candidates.values():
        sample()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for _ in range(_QUICK_ROUNDS if _quick else rounds):
        for name in order:
            # The collector stays on, as in an app, but no candidate pays for the garbage of another.
            gc.collect()
            taken[name].append(candidates[name]())
        order.append(order.pop(0))
    return Samples(taken)


def in_process(
    prepare: Callable[[int], Sequence[T]], run: Callable[[Sequence[T]], object], *, batch: int = 200
) -> Callable[[], float]:
    """A candidate that runs in this process: ``run`` works through what ``prepare(batch)`` made. Preparing is
    not timed, and what is prepared is never used twice: a ``bytes`` remembers its own hash."""

    def sample() -> float:
        spent, count, budget = 0.0, 0, _QUICK_SAMPLE_S if _quick else _SAMPLE_S
        while spent < budget:
            work = prepare(batch)
            began = time.process_time()
            run(work)
            spent += time.process_time() - began
            count += batch
        return spent / count

    return sample


def _figure(row: Row, value: float) -> str:
    return f"{value:,.2f} {row.unit}".strip()


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| path | floor | goal | median | range | path / floor | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal = "" if row.goal is None else f"≤ {row.goal:g} {row.unit}".strip()
        met = {None: "", True: "yes", False: "**no**"}[row.met]
        spread = f"{_figure(row, row.low)} to {_figure(row, row.high)}"
        cells = (row.path, row.floor, goal, _figure(row, row.median), spread, row.absolute, met)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show(results: Callable[[], list[Row]]) -> None:
    """Run one module alone."""
    import sys

    set_quick("--quick" in sys.argv[1:])
    print(table(results()))
