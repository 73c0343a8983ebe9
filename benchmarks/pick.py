"""Choosing among 100 deployments: passing over lesser orders, ranking, and reserving in memory.

CPU time of one choice, in microseconds, for each strategy; with a tenth of the deployments cooling down.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from random import Random

from llm_middleware.errors import RateLimitError
from llm_middleware.routing.deployment import Deployment
from llm_middleware.routing.limits import MemoryLimits, Outcome, Reservation
from llm_middleware.routing.state import RouterState, View
from llm_middleware.routing.strategies import Strategy, named_strategy, rank_by_order

from .harness import Row, compare, in_process, show

__all__ = ["results"]

_GOAL = 60.0  # microseconds
_STRATEGIES = (
    "simple-shuffle",
    "usage-based-routing",
    "least-busy",
    "latency-based-routing",
    "cost-based-routing",
)


def results() -> list[Row]:
    candidates = {name: in_process(_calls, _chooser(named_strategy(name))) for name in _STRATEGIES}
    samples = compare(candidates)
    rows = []
    for name in _STRATEGIES:
        taken = [seconds * 1e6 for seconds in samples.by_name[name]]
        rows.append(
            Row(
                f"choose among 100: {name}",
                "",
                _GOAL,
                statistics.median(taken),
                min(taken),
                max(taken),
                unit="µs",
            )
        )
    return rows


def _calls(count: int) -> Sequence[float]:
    return [number / 1e3 for number in range(count)]


def _chooser(strategy: Strategy) -> Callable[[Sequence[float]], None]:
    """What chooses at each of the moments given; every call is in flight until ten more have begun."""
    state, random = RouterState(), Random(1)
    limits = MemoryLimits(state)
    deployments = _deployments()
    for number, deployment in enumerate(deployments):
        error = RateLimitError("", retry_after=3600.0) if number % 10 == 0 else None
        taken = limits.take([deployment], 10, 0.0)
        assert isinstance(taken, Reservation)
        limits.settle(taken, Outcome(tokens=10, latency=random.random(), error=error), 0.0)
    flying: list[Reservation] = []
    rounds = itertools.cycle(range(10))

    def run(moments: Sequence[float]) -> None:
        for now in moments:
            view = View(state, now, prompt_tokens=100)
            taken = limits.take(rank_by_order(strategy, deployments, view, random), 100, now)
            assert isinstance(taken, Reservation)
            if len(flying) < 10:
                flying.append(taken)
            else:
                flying[next(rounds)] = taken

    return run


def _deployments() -> list[Deployment]:
    return [
        Deployment(
            id=f"d{number}",
            group="gpt-4o",
            provider="openai",
            model="gpt-4o",
            rpm=10**9,
            tpm=10**12,
            weight=1.0 + number % 3,
            info={"input_cost_per_token": number * 1e-7, "output_cost_per_token": number * 4e-7},
        )
        for number in range(100)
    ]


if __name__ == "__main__":
    show(results)
