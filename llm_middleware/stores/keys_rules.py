"""What counts against an API key, and when it is too much: the rules, free of any store.

A key's *use* is one row: a window of requests, one of tokens, what was spent, and the mean of its latest
costs. A *call* in flight holds tokens and a part of the budget until it ends, or ``hold`` seconds have passed
without its end: then its process has died. A window is ``window`` seconds long and begins with its first
request. `stores.keys_redis_script` says the same in Lua.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

__all__ = ["GONE", "WEIGHT", "Ask", "Call", "Ended", "Reply", "Use", "judge", "renew", "settle"]

WEIGHT: Final = 0.2  # of the latest cost in the mean
_SLACK: Final = 1e-9  # of a budget: sums of floats


class Ended(NamedTuple):
    """A call that is over. ``call``: as it was begun; empty: nothing was held for it. ``tokens``: used; None:
    not known, so the estimate stands. ``again``: this may have been told before."""

    call: str
    tokens: int | None
    cost: float
    again: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Room for ``requests`` requests and for a ``call`` of about so many ``tokens`` and this ``cost`` (None:
    the mean of the latest, at least ``minimum``; ``share`` of the budget while none is known). Before that,
    ``ended`` calls are settled.

    ``stored``: whether the store must know the key; else its use begins with ``spend`` and ``resets``.
    ``following``: when the budget is renewed next after the time that runs.
    """

    stored: bool
    requests: int = 0
    rpm: int | None = None
    call: str = ""
    tokens: int = 0
    tpm: int | None = None
    parallel: int | None = None
    budget: float | None = None
    cost: float | None = None
    minimum: float = 0.0
    share: float = 0.1
    window: float = 60.0
    hold: float = 600.0
    spend: float = 0.0
    resets: float | None = None
    following: float | None = None
    ended: tuple[Ended, ...] = ()

    @property
    def settles_only(self) -> bool:
        return not self.requests and not self.call


class Reply(NamedTuple):
    """``refused``: empty, or what there is no room in: ``rpm``, ``tpm``, ``parallel``, ``budget`` (used up),
    ``held`` (by calls in flight), ``gone`` (no such key). ``retry_after``: seconds; None: nobody knows, or
    never. ``held``: the cost that the call holds."""

    refused: str = ""
    retry_after: float | None = None
    held: float = 0.0


GONE: Final = Reply("gone")


@dataclass(slots=True)
class Use:
    """A key's row. ``resets``: 0 where the budget is never renewed; ``mean``: 0 where no cost is known."""

    requests_from: float = 0.0
    requests: int = 0
    tokens_from: float = 0.0
    tokens: int = 0
    spend: float = 0.0
    resets: float = 0.0
    mean: float = 0.0


class Call(NamedTuple):
    """What a call in flight holds. ``window``: that in which its tokens count."""

    window: float
    tokens: int
    cost: float
    expires: float


def renew(use: Use, ask: Ask, now: float) -> None:
    """Begin the next time of the budget, if its time has come."""
    if 0 < use.resets <= now:
        use.spend, use.resets = 0.0, ask.following or 0.0


def settle(use: Use, ended: Ended, call: Call | None) -> None:
    """Count what a call used. ``call``: what it held; None: nothing, or no more."""
    if call is not None and ended.tokens is not None and call.window == use.tokens_from:
        use.tokens = max(0, use.tokens + ended.tokens - call.tokens)
    if (call is not None or not ended.again) and ended.cost > 0:
        use.spend += ended.cost
        use.mean = use.mean + (ended.cost - use.mean) * WEIGHT if use.mean else ended.cost


def judge(use: Use, ask: Ask, flying: int, held: float, now: float) -> tuple[Reply, Call | None]:
    """Whether there is room, while ``flying`` calls hold ``held`` of the budget; if so it is counted in
    ``use``, and what the call holds is for the store to keep."""
    cost = 0.0
    if ask.rpm is not None and ask.requests:
        wait = _wait(use.requests_from, use.requests, ask.requests, ask.rpm, ask.window, now)
        if wait != 0:
            return Reply("rpm", wait), None
    if ask.call:
        if ask.parallel is not None and flying >= ask.parallel:
            return Reply("parallel"), None
        if ask.tpm is not None:
            wait = _wait(use.tokens_from, use.tokens, ask.tokens, ask.tpm, ask.window, now)
            if wait != 0:
                return Reply("tpm", wait), None
        if ask.budget is not None:
            cost, slack = _estimate(use, ask), _SLACK * ask.budget
            if use.spend >= ask.budget - slack:
                return Reply("budget", use.resets - now if use.resets else None), None
            if flying and use.spend + held + cost > ask.budget + slack:
                return Reply("held"), None
    _count(use, ask, now)
    return Reply(held=cost), Call(use.tokens_from, ask.tokens, cost, now + ask.hold) if ask.call else None


def _wait(begin: float, used: int, more: int, limit: int, window: float, now: float) -> float | None:
    """Seconds until there is room for ``more``; None: never."""
    if more > limit or limit < 1:
        return None
    runs = begin <= now < begin + window
    return begin + window - now if runs and used + more > limit else 0.0


def _estimate(use: Use, ask: Ask) -> float:
    if ask.cost is not None:
        return ask.cost
    return max(ask.minimum, use.mean or ask.share * (ask.budget or 0.0))


def _count(use: Use, ask: Ask, now: float) -> None:
    if ask.rpm is not None and ask.requests:
        if not use.requests_from <= now < use.requests_from + ask.window:
            use.requests_from, use.requests = now, 0
        use.requests += ask.requests
    if ask.tpm is not None and ask.call:
        if not use.tokens_from <= now < use.tokens_from + ask.window:
            use.tokens_from, use.tokens = now, 0
        use.tokens += ask.tokens
