"""Which deployment is tried first: the strategies, by the names that LiteLLM's Router has for them.

A strategy ranks: the best deployment first, and then those to be tried where that one is at its limit. Equals
come in random order. None of them looks at limits or cooldowns; a reservation passes over who has none left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Final, Protocol

from ..errors import ConfigError, nearest
from .deployment import Deployment
from .fields import check_number
from .state import View

__all__ = [
    "CostBased",
    "LatencyBased",
    "LeastBusy",
    "SimpleShuffle",
    "Strategy",
    "UsageBased",
    "first_order",
    "named_strategy",
    "rank_by_order",
]

_EPSILON: Final = 1e-9  # the share of a figure in which two are the same
_UNKNOWN: Final = 1e18  # the figure of who has none
_OUTPUT_TOKENS: Final = 256  # of an answer to which the caller sets no limit


class Strategy(Protocol):
    """What a strategy of one's own must have."""

    def rank(self, candidates: Sequence[Deployment], view: View, random: Random) -> list[Deployment]:
        """All of ``candidates``, the best first. Called from any thread; it must not wait."""
        ...


class SimpleShuffle:
    """``simple-shuffle``: at random, in proportion to ``weight``, which is 1 unless set. Where nobody's is
    set and all have an ``rpm``, in proportion to that; or else to ``tpm``, where all have one."""

    def rank(self, candidates: Sequence[Deployment], view: View, random: Random) -> list[Deployment]:
        draw, log = random.random, math.log
        weights = _weights(candidates)
        if weights is None:
            return _ascending(candidates, [draw() for _ in candidates])
        # The least of exponential variates at these rates is each one's in proportion to its rate
        # (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006).
        return _ascending(
            candidates,
            [-log(1.0 - draw()) / weight if weight > 0 else _UNKNOWN * (1 + draw()) for weight in weights],
        )


class UsageBased:
    """``usage-based-routing``, ``usage-based-routing-v2``: the fewest tokens in the minute that runs."""

    def rank(self, candidates: Sequence[Deployment], view: View, random: Random) -> list[Deployment]:
        of, now, draw = view.state.of, view.now, random.random
        return _ascending(candidates, [of(each).used(now) + draw() for each in candidates])


class LeastBusy:
    """``least-busy``: the fewest calls of this process in flight."""

    def rank(self, candidates: Sequence[Deployment], view: View, random: Random) -> list[Deployment]:
        of, draw = view.state.of, random.random
        return _ascending(candidates, [len(of(each).flying) + draw() for each in candidates])


class LatencyBased:
    """``latency-based-routing``: the least mean latency of late: until the first token for streams, for each
    token of the answer for other calls.

    Of whom nothing is known is tried first, by one call at a time; that is so too after
    `RouterState.latency_ttl` seconds without a call, and so an outlier is not for ever.
    ``lowest_latency_buffer``: those that take up to this share longer than the best count as equals of it.
    """

    def __init__(self, *, lowest_latency_buffer: float = 0.0) -> None:
        check_number("lowest_latency_buffer", lowest_latency_buffer)
        self._buffer = lowest_latency_buffer

    def rank(self, candidates: Sequence[Deployment], view: View, random: Random) -> list[Deployment]:
        draw, figures = random.random, self._figures(candidates, view)
        known = [figure for figure in figures if 0 <= figure < _UNKNOWN]
        near = min(known, default=0.0) * (1 + self._buffer + _EPSILON)
        return _ascending(
            candidates,
            [
                draw() - 2
                if figure < 0
                else draw() - 1
                if figure <= near
                else figure * (1 + _EPSILON * draw())
                for figure in figures
            ],
        )

    def _figures(self, candidates: Sequence[Deployment], view: View) -> list[float]:
        """Seconds; -1 for who is to be tried; `_UNKNOWN` for who is being tried."""
        of, now, ttl, stream = view.state.of, view.now, view.state.latency_ttl, view.stream
        figures: list[float] = []
        for each in candidates:
            state = of(each)
            mean = (state.first_token if stream else state.per_token).value(now, ttl)
            figures.append(mean if mean is not None else _UNKNOWN if state.flying else -1.0)
        return figures


class CostBased:
    """``cost-based-routing``: the least estimated cost of this call, by ``input_cost_per_token`` and
    ``output_cost_per_token`` of the deployments' ``info``. Who has no price comes last."""

    def __init__(self, *, output_tokens: int = _OUTPUT_TOKENS) -> None:
        check_number("output_tokens", output_tokens, whole=True)
        self._output_tokens = output_tokens

    def rank(self, candidates: Sequence[Deployment], view: View, random: Random) -> list[Deployment]:
        draw, asked = random.random, view.prompt_tokens
        answered = self._output_tokens if view.max_tokens is None else view.max_tokens
        figures: list[float] = []
        for each in candidates:
            info, figure = each.info, _UNKNOWN * (1 + draw())
            try:
                cost = asked * info["input_cost_per_token"] + answered * info["output_cost_per_token"]  # type: ignore[operator]
                figure = (cost + 1e-15) * (1 + _EPSILON * draw())
            except (KeyError, TypeError):
                pass
            figures.append(figure)
        return _ascending(candidates, figures)


_STRATEGIES: Final[Mapping[str, Callable[..., Strategy]]] = {
    "simple-shuffle": SimpleShuffle,
    "usage-based-routing": UsageBased,
    "usage-based-routing-v2": UsageBased,
    "least-busy": LeastBusy,
    "latency-based-routing": LatencyBased,
    "cost-based-routing": CostBased,
}


def named_strategy(name: str, **options: object) -> Strategy:
    """The strategy that is called ``name``. `ConfigError`, with the nearest name, where there is none; and
    for ``options`` that it does not have."""
    make = _STRATEGIES.get(name)
    if make is None:
        near = nearest(name, _STRATEGIES, 0.4)
        hint = f" (there are {', '.join(_STRATEGIES)})" if near is None else f"; did you mean {near!r}?"
        raise ConfigError(f"routing_strategy: unknown name {name!r}{hint}", param="routing_strategy")
    try:
        return make(**options)
    except TypeError as exc:
        given = ", ".join(sorted(options))
        raise ConfigError(
            f"routing_strategy_args: {name} does not take these: {given}", param="routing_strategy_args"
        ) from exc


def first_order(candidates: Sequence[Deployment]) -> Sequence[Deployment]:
    """Those of the least ``order``."""
    orders = {each.order for each in candidates}
    if len(orders) < 2:
        return candidates
    least = min(orders)
    return [each for each in candidates if each.order == least]


def rank_by_order(
    strategy: Strategy, candidates: Sequence[Deployment], view: View, random: Random
) -> list[Deployment]:
    """All of ``candidates``, those of a lesser ``order`` before the others, and otherwise as ``strategy``
    says: so one reservation comes to the next order where the one before it cools or is at its limits."""
    if len(candidates) == 1:
        return list(candidates)  # there is nothing to choose
    ranked: list[Deployment] = []
    while candidates:
        first = first_order(candidates)
        ranked += strategy.rank(first, view, random)
        if first is candidates:
            break
        order = first[0].order
        candidates = [each for each in candidates if each.order != order]
    return ranked


def _weights(candidates: Sequence[Deployment]) -> list[float] | None:
    """None where all are equal."""
    given = [each.weight for each in candidates]
    weights = [1.0 if weight is None else weight for weight in given]
    if given.count(None) == len(given):
        for limits in ([each.rpm for each in candidates], [each.tpm for each in candidates]):
            if all(limits):
                weights = [float(limit or 0) for limit in limits]
                break
    return weights if len(set(weights)) > 1 else None


def _ascending(candidates: Sequence[Deployment], figures: Sequence[float]) -> list[Deployment]:
    # By a list of floats: comparing tuples would take most of the time that a choice may take.
    return [candidates[index] for index in sorted(range(len(figures)), key=figures.__getitem__)]
