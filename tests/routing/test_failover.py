"""Deployments that fail in the midst of traffic cost no request: the run of ``benchmarks.failover``, shorter,
and a deployment that goes away and comes back. Real servers, threads and event loops."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random
from typing import Any

import pytest

from benchmarks.failover import CALLERS, STRATEGIES, Faults, run
from llm_middleware.routing.router import Router
from llm_middleware.testing import FakeClock, FakeUpstream

ASK = [{"role": "user", "content": "Who is there?"}]
REQUESTS = 150
# Who is benched for a failure that is no 429 stays so to the end of the run.
FAULTS = Faults(passing=2, retry_after=0.2, latency=0.05, cooldown_time=3600.0, timeout=10.0)
ENOUGH = 5  # calls of which so many failed that their share benches


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_r24_r29_r35_r51_two_failing_deployments_of_three_cost_no_request(
    strategy: str, caller: str, stream: bool
) -> None:
    result = run(strategy, REQUESTS, face=caller, stream=stream, faults=FAULTS)
    dead, limited, slow = (result.tallies[name] for name in ("dead", "limited", "slow"))
    assert (result.failed, result.wrong) == ([], [])
    assert limited.answered + slow.answered == REQUESTS
    assert (slow.errors, slow.cooled) == (0, 0)
    # Benched once, by the fifth failure; beyond that only those calls fail that were under way by then.
    assert (dead.answered, dead.cooled) == (0, 1)
    assert ENOUGH <= dead.errors < ENOUGH + CALLERS[caller]
    assert limited.answered > 0
    assert limited.cooled > 0
    assert result.too_early == 0  # nothing was sent while it had asked to be left alone
    # Every call that was made is one of a request's attempts, and each deployment got at most one of them.
    assert sum(count * times for count, times in result.attempts.items()) == sum(
        tally.calls for tally in (dead, limited, slow)
    )
    assert set(result.attempts) <= {1, 2, 3}


class Face:
    """Asks a Router, on the sync or on the async face, for an answer or a stream."""

    def __init__(self, name: str, stream: bool) -> None:
        self._stream = stream
        self._pool = ThreadPoolExecutor(2)
        self._loop = asyncio.new_event_loop() if name == "async" else None
        if self._loop is not None:
            self._running = self._pool.submit(self._loop.run_forever)

    def begin(self, router: Router) -> Future[tuple[str | None, int]]:
        """Which deployment will have answered, and after how many attempts."""
        if self._loop is not None:
            return asyncio.run_coroutine_threadsafe(self._aask(router), self._loop)
        return self._pool.submit(self._ask, router)

    def ask(self, router: Router) -> tuple[str | None, int]:
        return self.begin(router).result(30)

    def _ask(self, router: Router) -> tuple[str | None, int]:
        answer = router.completion("m", ASK, stream=self._stream)
        return self._seen(answer, list(answer)[-1] if self._stream else answer)

    async def _aask(self, router: Router) -> tuple[str | None, int]:
        answer = await router.acompletion("m", ASK, stream=self._stream)
        return self._seen(answer, [chunk async for chunk in answer][-1] if self._stream else answer)

    def _seen(self, answer: Any, last: Any) -> tuple[str | None, int]:
        assert last.choices[0].finish_reason == "stop"
        return answer.route.deployment, answer.route.attempts

    def close(self, router: Router) -> None:
        if self._loop is None:
            router.close()
        else:
            asyncio.run_coroutine_threadsafe(router.aclose(), self._loop).result(30)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._running.result(30)
            self._loop.close()
        self._pool.shutdown()


@pytest.fixture
def upstreams() -> Iterator[list[FakeUpstream]]:
    with FakeUpstream() as first, FakeUpstream() as second:
        yield [first, second]


def ordered(upstreams: list[FakeUpstream], **settings: Any) -> Router:
    """A Router that asks ``second`` only where ``first`` cannot."""
    rows = [
        {
            "model_name": "m",
            "litellm_params": {"model": "openai/x", "api_key": "k", "api_base": up.url, "order": order},
            "model_info": {"id": called},
        }
        for order, (called, up) in enumerate(zip(("first", "second"), upstreams, strict=True))
    ]
    return Router(rows, random=Random(1), **settings)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("name", ["sync", "async"])
def test_r32_one_request_finds_out_that_a_deployment_is_back(
    upstreams: list[FakeUpstream], name: str, stream: bool
) -> None:
    first, second = upstreams
    face, clock, router = Face(name, stream), FakeClock(), ordered(upstreams, cooldown_time=5)
    router._routing.clock = clock
    assert face.ask(router) == ("first", 1)
    first.stop()
    # The first success counts among a minute's calls: the fourth failure is the fifth call.
    assert [face.ask(router) for _ in range(5)] == [("second", 2)] * 4 + [("second", 1)]
    first.start()
    clock.advance(4.9)
    assert face.ask(router) == ("second", 1)
    clock.advance(0.2)
    first.hold()
    probe = face.begin(router)
    first.wait_for(2)
    assert [face.ask(router) for _ in range(2)] == [("second", 1)] * 2
    first.release()
    assert probe.result(30) == ("first", 1)
    assert [face.ask(router) for _ in range(2)] == [("first", 1)] * 2
    assert (first.count, second.count) == (4, 8)
    face.close(router)
