"""Who answers where deployments fail: a Router over a group of three, one dead, one rate limited, one slow.

Nothing listens where the dead one should be; the limited one answers most calls with a 429. The others are
real servers on this machine. Each request asks something of its own, has a deadline, and its answer is
compared with what it must be. A run for each strategy, by tasks of an event loop and by threads, for plain
answers and for streams.

    python -m benchmarks.failover [--requests N] [--write] [STRATEGY ...]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import platform
import socket
import sys
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from llm_middleware._fake_payloads import Stamp, answer_text
from llm_middleware._fake_server import Failure
from llm_middleware.errors import RateLimitError
from llm_middleware.routing.cooldown import CooldownPolicy
from llm_middleware.routing.deployment import Deployment
from llm_middleware.routing.limits import MemoryLimits, Outcome, Refusal, Reservation
from llm_middleware.routing.response import RouteInfo
from llm_middleware.routing.router import Router
from llm_middleware.routing.state import RouterState
from llm_middleware.testing import Call, FakeUpstream

__all__ = ["CALLERS", "STRATEGIES", "Faults", "Ledger", "RateLimited", "Result", "Tally", "run", "table"]

STRATEGIES = ("simple-shuffle", "latency-based-routing", "least-busy", "usage-based-routing")
CALLERS = {"async": 20, "sync": 16}  # tasks, threads
_NAMES = ("dead", "limited", "slow")
_PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
_BEGIN, _END = "<!-- failover table: begin -->", "<!-- failover table: end -->"


class RateLimited(FakeUpstream):
    """Lets ``passing`` requests through in every ``retry_after`` seconds; all others get a 429 that says
    ``Retry-After: retry_after``. ``came``: when each request was here, by `time.monotonic`."""

    def __init__(self, passing: int, retry_after: float) -> None:
        super().__init__()
        self.came: list[float] = []
        self._passing, self._retry_after = passing, retry_after
        self._ends, self._passed = 0.0, 0
        self._counting = threading.Lock()

    def arrived(self, call: Call) -> tuple[Failure | None, Stamp]:
        failure, stamp = super().arrived(call)
        with self._counting:
            now = time.monotonic()
            self.came.append(now)
            if now >= self._ends:
                self._ends, self._passed = now + self._retry_after, 0
            self._passed += 1
            if self._passed <= self._passing:
                return failure, stamp
        body = b'{"error":{"message":"slow down","type":"rate_limit_error","param":null,"code":null}}'
        return Failure(429, {"retry-after": f"{self._retry_after:g}"}, body), stamp


@dataclass(frozen=True, slots=True)
class Tally:
    """Of one deployment: ``calls`` is what was ``answered`` and what ended in ``errors``; ``cooled``: how
    often it was left alone, what extended that not counted."""

    calls: int
    answered: int
    errors: int
    cooled: int


class Ledger(MemoryLimits):
    """Limits that write down what they grant and what comes of it."""

    def __init__(self, cooldown: CooldownPolicy) -> None:
        super().__init__(RouterState(), cooldown)
        self.granted: defaultdict[str, list[float]] = defaultdict(list)
        self.ended: list[tuple[str, Outcome, float, float]] = []
        """Deployment, outcome, and when settling it began and was over."""
        self._until: Counter[str] = Counter()
        self._cooled: Counter[str] = Counter()
        self._writing = threading.Lock()

    def take(self, candidates: Sequence[Deployment], tokens: int, now: float) -> Reservation | Refusal:
        result = super().take(candidates, tokens, now)
        if isinstance(result, Reservation):
            with self._writing:
                self.granted[result.deployment.id].append(now)
        return result

    def settle(self, reservation: Reservation, outcome: Outcome, now: float, *, alone: bool = False) -> float:
        seconds = super().settle(reservation, outcome, now, alone=alone)
        name = reservation.deployment.id
        with self._writing:
            self.ended.append((name, outcome, now, time.monotonic()))
            if seconds:
                self._cooled[name] += now >= self._until[name]
                self._until[name] = max(self._until[name], now + seconds)  # type: ignore[assignment]
        return seconds

    def tally(self, name: str) -> Tally:
        outcomes = [outcome for one, outcome, *_ in self.ended if one == name]
        errors = sum(outcome.error is not None for outcome in outcomes)
        answered = sum(outcome.error is None and not outcome.abandoned for outcome in outcomes)
        return Tally(len(self.granted[name]), answered, errors, self._cooled[name])

    def too_early(self, name: str, came: Sequence[float], retry_after: float) -> int:
        """How many requests were at the server of ``name`` within ``retry_after`` seconds of a 429 that the
        Router knew of, beyond those that it had sent before it knew."""
        came, granted = sorted(came), sorted(self.granted[name])
        early = 0
        for one, outcome, told, known in self.ended:
            if one == name and isinstance(outcome.error, RateLimitError):
                early = max(early, bisect_left(came, told + retry_after) - bisect_right(granted, known))
        return early


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """``passing`` calls of the limited one pass in every ``retry_after`` seconds; the slow one takes
    ``latency`` seconds to begin an answer. ``cooldown_time``: the Router's. ``timeout``: of each request."""

    passing: int = 10
    retry_after: float = 1.0
    latency: float = 0.15
    cooldown_time: float = 5.0
    timeout: float = 10.0


@dataclass(slots=True)
class Result:
    """``failed``: what requests raised, or that they were late; ``wrong``: answers that are not those to
    their questions. ``attempts``: how many requests took how many. ``seconds``: of each request; ``took``: of
    all together. ``too_early``: see `Ledger.too_early`."""

    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    tallies: dict[str, Tally] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    took: float = 0.0
    too_early: int = 0


# --- one run


class _Run:
    def __init__(self, router: Router, requests: int, stream: bool, timeout: float) -> None:
        self.router, self.stream, self.timeout = router, stream, timeout
        self.result = Result()
        self._numbers = iter(range(requests))
        self._taking = threading.Lock()

    def _take(self) -> int | None:
        with self._taking:
            return next(self._numbers, None)

    def threads(self, count: int) -> None:
        askers = [threading.Thread(target=self._thread) for _ in range(count)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        self.router.close()

    async def tasks(self, count: int) -> None:
        await asyncio.gather(*(self._task() for _ in range(count)))
        await self.router.aclose()

    def _thread(self) -> None:
        while (number := self._take()) is not None:
            with self._judged(number) as said:
                answer = self.router.completion("m", **self._asked(number))
                said += [answer] if not self.stream else answer
                self._count(answer.route)

    async def _task(self) -> None:
        while (number := self._take()) is not None:
            with self._judged(number) as said:
                answer = await self.router.acompletion("m", **self._asked(number))
                said += [answer] if not self.stream else [chunk async for chunk in answer]
                self._count(answer.route)

    def _asked(self, number: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": _question(number)}]
        return {"messages": messages, "timeout": self.timeout, **({"stream": True} if self.stream else {})}

    def _count(self, route: RouteInfo) -> None:
        with self._taking:
            self.result.attempts[route.attempts] += 1

    @contextlib.contextmanager
    def _judged(self, number: int) -> Iterator[list[Any]]:
        """Takes what the answer to a question consists of, and judges it and how long it took."""
        said: list[Any] = []
        began = time.perf_counter()
        try:
            yield said
        except Exception as exc:
            self.result.failed.append(f"{_question(number)}: {exc!r}")
            return
        took = time.perf_counter() - began
        self.result.seconds.append(took)
        if took > self.timeout:
            self.result.failed.append(f"{_question(number)}: took {took:.1f} s")
        if (text := _text(said, self.stream)) != answer_text(_question(number), 8):
            self.result.wrong.append(f"{_question(number)}: {text}")


def _question(number: int) -> str:
    return f"question {number}"


def _text(said: Sequence[Any], stream: bool) -> str:
    """Of a whole answer; of one that is not whole, what it is instead."""
    choices = [part.choices[0] for part in said if part.choices]
    if not choices or choices[-1].finish_reason != "stop":
        return f"cut: {said!r}"
    if stream:
        return "".join(choice.delta.content or "" for choice in choices)
    return str(choices[0].message.content)


@contextlib.contextmanager
def _nowhere() -> Iterator[str]:
    """The URL of a port that nothing listens on, and that nobody else gets meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"


def run(strategy: str, requests: int, *, face: str, stream: bool, faults: Faults | None = None) -> Result:
    """One run, by the `CALLERS` of ``face`` at a time."""
    faults = faults or Faults()
    ledger = Ledger(CooldownPolicy(cooldown_time=faults.cooldown_time))
    with (
        _nowhere() as dead,
        RateLimited(faults.passing, faults.retry_after) as limited,
        FakeUpstream(latency=faults.latency) as slow,
    ):
        rows = [
            {
                "model_name": "m",
                "litellm_params": {"model": "openai/gpt-4o-mini", "api_key": "sk-a", "api_base": url},
                "model_info": {"id": name},
            }
            for name, url in zip(_NAMES, (dead, limited.url, slow.url), strict=True)
        ]
        router = Router(rows, limits=ledger, routing_strategy=strategy, random=Random(1))
        going = _Run(router, requests, stream, faults.timeout)
        began = time.perf_counter()
        if face == "sync":
            going.threads(CALLERS[face])
        else:
            asyncio.run(going.tasks(CALLERS[face]))
        result = going.result
        result.took = time.perf_counter() - began
        result.tallies = {name: ledger.tally(name) for name in _NAMES}
        result.too_early = ledger.too_early("limited", limited.came, faults.retry_after)
    return result


# --- the table


def _percentile(seconds: Sequence[float], share: float) -> str:
    ordered = sorted(seconds)
    return f"{1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]:,.0f}" if ordered else ""


def _row(strategy: str, face: str, stream: bool, result: Result) -> list[str]:
    tallies = [
        f"{tally.calls} = {tally.answered} + {tally.errors}, {tally.cooled}"
        for tally in result.tallies.values()
    ]
    attempts = [str(result.attempts[count]) for count in (1, 2, 3)]
    late = [_percentile(result.seconds, share) for share in (0.5, 0.99, 1.0)]
    return [
        strategy,
        f"{face}, {'stream' if stream else 'plain'}",
        str(len(result.failed)),
        str(len(result.wrong)),
        *tallies,
        str(result.too_early),
        " / ".join(attempts),
        " / ".join(late),
        f"{result.took:.1f}",
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows in Markdown."""
    head = [
        "strategy", "callers", "failed", "wrong", *_NAMES, "too early", "1 / 2 / 3 attempts",
        "p50 / p99 / max ms", "s",
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _write(text: str) -> None:
    head, begin, rest = _PAGE.read_text().partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not (begin and end):
        raise SystemExit(f"{_PAGE.name} has no {_BEGIN} ... {_END}")
    _PAGE.write_text(f"{head}{_BEGIN}\n{text}\n{_END}{tail}")


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{os.cpu_count()} CPUs, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.failover")
    parser.add_argument("--requests", type=int, default=1000, help="in each run (1000)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    parser.add_argument("only", nargs="*", metavar="STRATEGY", help=f"of {', '.join(STRATEGIES)}")
    chosen = parser.parse_args()
    rows, troubles = [], []
    for strategy, face, stream in itertools.product(chosen.only or STRATEGIES, CALLERS, (False, True)):
        result = run(strategy, chosen.requests, face=face, stream=stream)
        rows.append(_row(strategy, face, stream, result))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        troubles += [f"{strategy}, {face}: {what}" for what in result.failed + result.wrong]
        if result.too_early:
            troubles.append(f"{strategy}, {face}: {result.too_early} requests within a Retry-After")
    text = table(rows)
    print(text)
    if chosen.write:
        command = " ".join(["python -m benchmarks.failover", *sys.argv[1:]])
        _write(f"`{command}` with {_machine()}.\n\n{text}")
    if troubles:
        raise SystemExit("\n".join(troubles[:20]))


if __name__ == "__main__":
    main()
