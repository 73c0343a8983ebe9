"""Limits of many processes over a real Redis: exact, one round trip each, and none where Redis fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

from llm_middleware._drive import run_sync
from llm_middleware._ports.faces import SYNC, async_port
from llm_middleware._ports.protocol import Port
from llm_middleware.caching.breaker import Breaker
from llm_middleware.errors import RateLimitError, UpstreamServerError
from llm_middleware.routing.cooldown import CooldownPolicy
from llm_middleware.routing.deployment import Deployment
from llm_middleware.routing.limits import Outcome, Refusal, Reservation, SharedLimits
from llm_middleware.routing.state import RouterState
from llm_middleware.stores.redis_connect import RedisConnection
from llm_middleware.stores.redis_limits import RedisLimits
from llm_middleware.stores.redis_limits_script import Limit, Told
from tests.services import HOST, RedisServer, redis_cluster, redis_server, wait_for

ROOT = Path(__file__).parents[2]
AMPLE = 10.0  # seconds: a budget that no test uses up
THREAD = "llm-middleware-redis-limits"


def deployment(name: str = "a", **facts: object) -> Deployment:
    return Deployment(id=name, group="gpt", provider="openai", model="gpt", **facts)  # type: ignore[arg-type]


A, B = deployment("a"), deployment("b")
ONE = [Limit("a", None, None)]


class Worker:
    """A Router's limits in one process, called through one of its faces. Its clock is told."""

    def __init__(self, limits: SharedLimits, asynchronous: bool) -> None:
        self.limits = limits
        self.now = 0.0
        self._runner = asyncio.Runner() if asynchronous else None

    def run(self, work: Callable[[Port], Coroutine[Any, Any, Any]]) -> Any:
        if self._runner is None:
            return run_sync(work(SYNC))
        return self._runner.run(work(async_port()))

    def reserve(self, *candidates: Deployment, tokens: int = 0) -> Reservation | Refusal:
        return self.run(lambda port: self.limits.reserve(port, candidates, tokens, self.now))  # type: ignore[no-any-return]

    def granted(self, *candidates: Deployment, tokens: int = 0) -> Reservation:
        taken = self.reserve(*candidates, tokens=tokens)
        assert isinstance(taken, Reservation)
        return taken

    def settle(self, taken: Reservation, **outcome: object) -> float:
        return self.limits.settle(taken, Outcome(**outcome), self.now)  # type: ignore[arg-type]

    def told(self) -> None:
        wait_for(lambda: not self.limits.store.untold, "everything is told")

    def close(self) -> None:
        self.limits.store.close()
        if self._runner is not None:
            self._runner.run(self.limits.store._connection.aclose())
            self._runner.close()
        self.limits.store._connection.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as one:
        yield one


@pytest.fixture
def fresh(server: RedisServer) -> RedisServer:
    server.ask("FLUSHALL")
    server.ask("CONFIG", "RESETSTAT")
    return server


Make = Callable[..., Worker]


@pytest.fixture(params=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """``make(port, ...)``: a worker of its own state and connection, closed after the test."""
    with contextlib.ExitStack() as stack:

        def one(port: int, budget: float = AMPLE, breaker: Breaker | None = None, **facts: Any) -> Worker:
            policy = facts.pop("policy", None)
            connection = RedisConnection.from_settings({"host": HOST, "port": port}, {}, budget=budget)
            store = RedisLimits(connection, **facts)
            worker = Worker(
                SharedLimits(RouterState(), store, policy, breaker=breaker), request.param == "async"
            )
            stack.callback(worker.close)
            return worker

        yield one


def fields(server: RedisServer, name: str = "a") -> dict[str, float]:
    held = server.ask("HGETALL", f"{{llm:router:gpt}}:{name}")
    assert isinstance(held, dict)
    return {key.decode(): float(value) for key, value in held.items()}


CHILD = """
import json, sys
from llm_middleware._drive import run_sync
from llm_middleware._ports.faces import SYNC
from llm_middleware.errors import RateLimitError
from llm_middleware.routing.deployment import Deployment
from llm_middleware.routing.limits import Outcome, Reservation, SharedLimits
from llm_middleware.routing.state import RouterState
from llm_middleware.stores.redis_connect import RedisConnection
from llm_middleware.stores.redis_limits import RedisLimits

port, name, rpm, calls, outcome = json.loads(sys.argv[1])
store = RedisLimits(RedisConnection.from_settings({"host": "127.0.0.1", "port": port}, {}, budget=10.0))
limits = SharedLimits(RouterState(), store)
target = Deployment(id=name, group="gpt", provider="openai", model="gpt", rpm=rpm)
print("ready", flush=True)
sys.stdin.readline()
error = RateLimitError("", retry_after=30.0) if outcome.pop("cools", False) else None
granted = 0
for _ in range(calls):
    taken = run_sync(limits.reserve(SYNC, [target], 10, 0.0))
    if isinstance(taken, Reservation):
        granted += 1
        limits.settle(taken, Outcome(error=error, **outcome), 0.0)
print(granted, flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def children(
    server: RedisServer, *tasks: tuple[str, int | None, int, dict[str, object]]
) -> Iterator[list[int]]:
    """What each process was granted. They began together, and live until the block ends."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps([server.port, *task])],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in tasks
    ]
    try:
        for child in running:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in running:
            assert child.stdin is not None
            print(file=child.stdin, flush=True)
        yield [int(child.stdout.readline()) for child in running if child.stdout is not None]
    finally:
        for child in running:
            child.communicate("\n")
        assert [child.returncode for child in running] == [0] * len(running)


def test_r7_processes_together_get_exactly_the_limit(fresh: RedisServer) -> None:
    with children(fresh, ("a", 100, 150, {}), ("a", 100, 150, {})) as granted:
        assert sum(granted) == 100
    assert fields(fresh)["r"] == 100
    assert fields(fresh)["t"] == 1000


def test_r8_limits_made_without_a_loop_count_every_async_call(fresh: RedisServer, make: Make) -> None:
    worker = make(fresh.port)
    for _ in range(20):
        worker.settle(worker.granted(A, tokens=10), tokens=7)
    assert fields(fresh)["r"] == 20
    wait_for(lambda: fields(fresh)["t"] == 140, "the tokens are told")
    assert worker.limits.store.untold == 0
    assert worker.limits.state.of(A).in_flight == 0


def test_r11_latencies_of_two_processes_are_both_held(fresh: RedisServer, make: Make) -> None:
    with children(fresh, ("a", None, 1, {"latency": 0.5}), ("b", None, 1, {"first_token": 0.25})):
        wait_for(lambda: "bs" in fields(fresh, "a") and "as" in fields(fresh, "b"), "latencies are told")
    worker = make(fresh.port)
    worker.reserve(A, B)
    state = worker.limits.state
    assert state.of(A).per_token.value(0.0, 60.0) == pytest.approx(0.5)
    assert state.of(B).first_token.value(0.0, 60.0) == pytest.approx(0.25)


def test_r33_what_another_process_benched_is_not_used(fresh: RedisServer, make: Make) -> None:
    worker = make(fresh.port)
    assert worker.granted(A, B).deployment is A
    with children(fresh, ("a", None, 1, {"cools": True})):
        wait_for(lambda: worker.granted(A, B).deployment is B, "the cooldown is told")
    assert worker.limits.state.of(A).health.admits(worker.now) == "no"
    refused = worker.reserve(A)
    assert isinstance(refused, Refusal)
    assert refused.retry_after == pytest.approx(30.0, abs=20.0)


def test_a_reservation_is_one_round_trip_and_takes_along_what_is_to_be_told(
    fresh: RedisServer, make: Make
) -> None:
    worker, candidates = make(fresh.port), [deployment(f"d{number}", rpm=3) for number in range(50)]
    outbox = worker.limits.store._mine()
    outbox._thread = threading.current_thread()  # so none is started
    taken = worker.granted(*candidates, tokens=10)
    fresh.ask("CONFIG", "RESETSTAT")
    for _ in range(30):
        worker.settle(taken, tokens=1)
        taken = worker.granted(*candidates, tokens=10)
    inside = {"time", "hmget", "hset", "hget", "pexpire"}
    outside = {name: calls for name, calls in fresh.calls().items() if name not in inside}
    assert outside.pop("evalsha") == 30
    assert set(outside) <= {"config|resetstat", "config", "info", "hello"}  # the test's own
    assert worker.limits.store.untold == 0
    outbox._thread = None


def test_what_no_reservation_takes_along_is_told_soon(fresh: RedisServer, make: Make) -> None:
    worker = make(fresh.port)
    worker.settle(worker.granted(A, tokens=100), tokens=30)
    wait_for(lambda: fields(fresh)["t"] == 30, "the thread tells it")


def test_a_reservation_takes_along_what_is_to_be_told(fresh: RedisServer) -> None:
    store = RedisLimits(RedisConnection.from_settings({"host": HOST, "port": fresh.port}, {}, budget=AMPLE))
    window = store.reserve("gpt", ONE, 10).seen[0].window
    outbox = store._mine()
    outbox._thread = threading.current_thread()  # so none is started
    store.tell("gpt", "a", Told(window, tokens=-4))
    store.tell("gpt", "a", Told(window, tokens=-3, fails=2))
    assert store.untold == 1
    seen = store.reserve("gpt", ONE, 100).seen[0]
    assert (seen.requests, seen.tokens, seen.fails) == (2, 103, 2)
    assert store.untold == 0
    outbox._thread = None
    store._connection.close()


def test_tokens_and_requests_have_limits_and_a_true_time_to_wait(fresh: RedisServer, make: Make) -> None:
    worker = make(fresh.port)
    a, b = deployment("a", tpm=100), deployment("b", rpm=1)
    assert [worker.granted(a, b, tokens=60).deployment.id for _ in range(2)] == ["a", "b"]
    refused = worker.reserve(a, b, tokens=60)
    assert isinstance(refused, Refusal)
    assert refused.retry_after == pytest.approx(60.0, abs=20.0)
    assert worker.reserve(a, tokens=101) == Refusal(None)
    assert worker.granted(a, tokens=40).deployment is a
    assert worker.limits.state.of(a).tokens == 100


def test_a_minute_ends_by_the_servers_clock(fresh: RedisServer, make: Make) -> None:
    worker, a = make(fresh.port, window=0.2), deployment(rpm=1)
    worker.granted(a)
    wait_for(lambda: isinstance(worker.reserve(a), Reservation), "the window ends")
    assert fields(fresh)["r"] == 1


def test_a_call_is_settled_in_the_minute_in_which_it_was_reserved(fresh: RedisServer, make: Make) -> None:
    worker, a = make(fresh.port, window=0.2), deployment(rpm=1)
    early = worker.granted(a, tokens=100)
    wait_for(lambda: isinstance(worker.reserve(a, tokens=7), Reservation), "the window ends")
    worker.settle(early, tokens=98, latency=1.0)
    wait_for(lambda: "bs" in fields(fresh), "the latency is told")
    assert fields(fresh)["t"] == 7


def test_r32_one_process_probes(fresh: RedisServer, make: Make) -> None:
    policy = CooldownPolicy(cooldown_time=0.1, allowed_fails=0)
    one, two = make(fresh.port, policy=policy), make(fresh.port, policy=policy)
    assert one.settle(one.granted(A), error=UpstreamServerError("")) == 0.1
    wait_for(lambda: "c" in fields(fresh), "the cooldown is told")
    probe = wait_for(lambda: isinstance(taken := two.reserve(A), Reservation) and taken, "it is over")
    assert isinstance(probe, Reservation)
    assert probe.probe
    assert one.granted(A, B).deployment is B
    two.settle(probe)
    wait_for(lambda: "c" not in fields(fresh), "the cooldown is over for all")
    taken = one.granted(A, B)
    assert (taken.deployment, taken.probe) == (A, False)


def test_r32_a_probe_that_tells_nothing_is_replaced_at_another_process(
    fresh: RedisServer, make: Make
) -> None:
    policy = CooldownPolicy(cooldown_time=0.1, allowed_fails=0)
    one, two = make(fresh.port, policy=policy), make(fresh.port, policy=policy)
    one.settle(one.granted(A), error=UpstreamServerError(""))
    wait_for(lambda: "c" in fields(fresh), "the cooldown is told")
    probe = wait_for(lambda: isinstance(taken := two.reserve(A), Reservation) and taken, "it is over")
    assert isinstance(probe, Reservation)
    refused = one.reserve(A)
    assert isinstance(refused, Refusal)
    assert refused.busy
    assert refused.retry_after == pytest.approx(30.0, abs=20.0)
    two.settle(probe, abandoned=True)
    following = wait_for(lambda: isinstance(taken := one.reserve(A), Reservation) and taken, "it is free")
    assert isinstance(following, Reservation)
    assert following.probe


def test_r25_the_longest_cooldown_of_all_processes_holds(fresh: RedisServer, make: Make) -> None:
    one, two = make(fresh.port), make(fresh.port)
    first, second = one.granted(A), two.granted(A)
    one.settle(first, error=RateLimitError("", retry_after=1000.0))
    wait_for(lambda: "c" in fields(fresh), "the cooldown is told")
    two.settle(second, error=RateLimitError("", retry_after=1.0))
    refused = two.reserve(A)
    assert isinstance(refused, Refusal)
    assert refused.retry_after == pytest.approx(1000.0, abs=60.0)


def test_r27_failures_of_all_processes_add_up(fresh: RedisServer, make: Make) -> None:
    workers = [make(fresh.port, policy=CooldownPolicy(allowed_fails=3)) for _ in range(2)]
    seconds = []
    for number in range(4):
        worker = workers[number % 2]
        seconds.append(worker.settle(worker.granted(A), error=RateLimitError("")))
        wait_for(
            lambda number=number: fields(fresh).get("f", 0) == number + 1 or number == 3, "it is counted"
        )
    assert seconds == [0.0, 0.0, 0.0, 5.0]


def test_r12_r20_state_dies_after_its_last_use_and_not_while_it_counts(
    fresh: RedisServer, make: Make
) -> None:
    worker = make(fresh.port)
    taken = worker.granted(A)
    assert 0 < fresh.ask("PTTL", "{llm:router:gpt}:a") <= 600_000  # type: ignore[operator]
    worker.settle(taken, error=RateLimitError("", retry_after=1800.0))
    wait_for(lambda: fresh.ask("PTTL", "{llm:router:gpt}:a") > 1_800_000, "as long as the cooldown")  # type: ignore[operator]
    assert fresh.ask("MEMORY", "USAGE", "{llm:router:gpt}:a") < 2048  # type: ignore[operator]


def test_limits_are_exact_under_threads_and_tasks(fresh: RedisServer, make: Make) -> None:
    worker, a = make(fresh.port), deployment(rpm=50)
    if worker._runner is None:
        with ThreadPoolExecutor(8) as pool:
            taken = list(pool.map(lambda _: worker.reserve(a), range(100)))
    else:
        taken = worker.run(lambda port: _gathered(worker.limits, port, a, 100))
    assert sum(isinstance(one, Reservation) for one in taken) == 50


async def _gathered(limits: SharedLimits, port: Port, target: Deployment, calls: int) -> list[object]:
    return list(await asyncio.gather(*(limits.reserve(port, [target], 0, 0.0) for _ in range(calls))))


def test_calls_in_flight_are_exact_while_redis_is_asked(fresh: RedisServer, make: Make) -> None:
    worker, a = make(fresh.port), deployment(max_parallel_requests=3)
    if worker._runner is None:
        with ThreadPoolExecutor(8) as pool:
            taken = list(pool.map(lambda _: worker.reserve(a, tokens=5), range(8)))
    else:
        taken = worker.run(lambda port: _gathered(worker.limits, port, a, 8))
    assert sum(isinstance(one, Reservation) for one in taken) == 3
    assert [one for one in taken if isinstance(one, Refusal)] == [Refusal(None, busy=True)] * 5
    wait_for(lambda: fields(fresh)["r"] == 3, "what was given back is told")


@pytest.mark.parametrize("trouble", ["kill", "pause"])
def test_a_redis_that_fails_fails_no_call(make: Make, trouble: str) -> None:
    with redis_server() as own:
        worker, a = make(own.port, budget=0.25), deployment(rpm=5)
        for _ in range(3):
            worker.granted(a)
        getattr(own, trouble)()
        for _ in range(2):
            assert not worker.granted(a).shared
        assert worker.reserve(a) == Refusal(pytest.approx(60.0, abs=20.0))
        own.resume() if trouble == "pause" else own.restart()
        assert worker.limits._breaker.state == "open"


def test_redis_is_used_again_when_it_is_back(make: Make) -> None:
    now = [0.0]
    breaker = Breaker(failures=1, recovery=2.0, clock=lambda: now[0])
    with redis_server() as own:
        worker = make(own.port, breaker=breaker)
        own.kill()
        taken = worker.granted(A)
        assert not taken.shared
        own.restart()
        assert not worker.granted(A).shared  # not asked
        now[0] = 2.0
        assert worker.granted(A).shared
        worker.settle(taken, tokens=50)  # counted nowhere but here
        worker.told()
        assert fields(own) == {"w": fields(own)["w"], "r": 1.0, "t": 0.0}


def test_what_is_granted_while_redis_fails_is_not_settled_there(make: Make) -> None:
    with redis_server() as own:
        worker = make(own.port, budget=0.25, breaker=Breaker(failures=1, recovery=600.0))
        worker.granted(A, tokens=10)
        own.pause()
        worker.granted(B)  # the breaker opens
        taken = worker.granted(A, tokens=100)
        assert worker.limits.state.of(A).tokens == 110
        own.resume()
        worker.settle(taken, tokens=50, latency=1.0)
        wait_for(lambda: "bs" in fields(own), "the latency is told")
        assert fields(own)["t"] == 10
        assert worker.limits.state.of(A).tokens == 60


def test_a_cooldown_is_told_when_redis_is_back(make: Make) -> None:
    with redis_server() as own:
        worker = make(own.port, breaker=Breaker(failures=100))
        taken = worker.granted(A)
        own.kill()
        worker.settle(taken, error=RateLimitError("", retry_after=3000.0))
        assert worker.reserve(A, B).deployment is B  # type: ignore[union-attr]
        own.restart()
        wait_for(lambda: "c" in fields(own), "the cooldown is told")


def test_a_group_is_one_slot_of_a_cluster() -> None:
    with redis_cluster() as cluster:
        connection = RedisConnection.from_settings({"redis_startup_nodes": cluster.nodes}, {}, budget=AMPLE)
        store = RedisLimits(connection, namespace="app")
        for group in ("gpt", "odd}{name", "{}"):
            assert len({key_slot(store.key(group, name).encode()) for name in "abcdef"}) == 1
        limits = [Limit("a", 1, None), Limit("b", 1, None)]
        assert [store.reserve("gpt", limits, 0).taken for _ in range(3)] == [0, 1, None]

        async def reserve() -> int | None:
            taken = (await store.areserve("other", limits, 0)).taken
            await connection.aclose()
            return taken

        assert asyncio.run(reserve()) == 0
        before = cluster.calls("evalsha")
        for _ in range(10):
            store.reserve("gpt", limits, 0)
        assert cluster.calls("evalsha") - before == 10
        assert cluster.calls("command") <= 3  # what the client asks when it connects
        store.close()
        connection.close()


def test_closing_tells_what_is_left_and_ends_the_thread(fresh: RedisServer) -> None:
    connection = RedisConnection.from_settings({"host": HOST, "port": fresh.port}, {}, budget=AMPLE)
    store = RedisLimits(connection)
    window = store.reserve("gpt", ONE, 10).seen[0].window
    store.tell("gpt", "a", Told(window, tokens=5))
    store.close()
    assert fields(fresh)["t"] == 15
    assert THREAD not in [thread.name for thread in threading.enumerate()]
    store.tell("gpt", "a", Told(window, tokens=5))  # it may be used again
    store.close()
    assert fields(fresh)["t"] == 20
    connection.close()


def test_a_forked_child_tells_nothing_of_its_parents_and_its_own(fresh: RedisServer) -> None:
    connection = RedisConnection.from_settings({"host": HOST, "port": fresh.port}, {}, budget=AMPLE)
    store = RedisLimits(connection)
    window = store.reserve("gpt", ONE, 10).seen[0].window
    store._mine()._thread = threading.current_thread()  # so the parent tells nothing
    store.tell("gpt", "a", Told(window, tokens=1))
    child = os.fork()
    if not child:
        store.tell("gpt", "a", Told(window, tokens=100))
        store.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert fields(fresh)["t"] == 110
    store._mine()._thread = None
    connection.close()


def test_what_is_to_be_told_is_bounded() -> None:
    connection = RedisConnection.from_settings({"host": HOST, "port": 1}, {}, budget=AMPLE)
    store = RedisLimits(connection)
    store._mine()._thread = threading.current_thread()
    for number in range(5000):
        store.tell("gpt", f"d{number}", Told(0, tokens=1))
    assert store.untold == 4096
