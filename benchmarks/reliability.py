"""What a failing store costs requests: a run of mixed requests through each fault, and the same run without.

Three managers stand for three processes that share the store, two with memory in front. Each is asked by
threads and by tasks of an event loop at the same time, for plain answers and for streams, new questions and
known ones. The fault begins a quarter into the run and ends at three quarters. Every answer is checked; then
each manager must store something that the next one reads from the store.

    python -m benchmarks.reliability [--requests N] [--pause S] [--write] [FAULT ...]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from llm_middleware import CacheManager, StoreError
from llm_middleware.caching.answer import Answer
from llm_middleware.events import Event
from tests.s3_services import moto_server
from tests.services import (
    HOST,
    PATIENCE,
    FaultProxy,
    RedisServer,
    free_port,
    redis_cluster,
    redis_sentinel,
    redis_server,
    wait_for,
)
from tests.support import chat_stream, completion

from .s3_store import _clean_environment

__all__ = ["FAULTS", "Clock", "Outcome", "Target", "run", "table"]

ROOT = Path(__file__).parents[1]
_PAGE = ROOT / "docs" / "reliability.md"
_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"
_WORKERS, _THREADS, _TASKS = 3, 2, 4
_AT_ONCE = 2  # what a caller may ask a store at one time: what it waits for, and a lease's renewal or release
_TTL = 3600.0
_RECOVERY = 2.0  # seconds for which an open breaker asks nothing
_SLICES = 10  # how often a fault is renewed while it lasts

Ask = Callable[[object], object]


class Clock:
    """Seconds since the epoch, ``offset`` seconds off."""

    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset


def _nothing() -> None:
    pass


@dataclass
class Target:
    """A store and what happens to it. ``settings``: of the managers. ``renew``: called again and again while
    the fault lasts. ``evidence``: how often the fault struck; unless given, the errors of the store.
    ``dead``: whether nothing works while it lasts, so that the breaker bounds the errors."""

    settings: Mapping[str, object]
    begin: Callable[[], object] = _nothing
    lift: Callable[[], object] = _nothing
    renew: Callable[[], object] = _nothing
    evidence: Callable[[], int] | None = None
    dead: bool = False
    from_start: bool = False
    clocks: Sequence[Clock] = field(default_factory=lambda: [Clock() for _ in range(_WORKERS)])


@dataclass
class Outcome:
    """``failed`` and ``wrong``: what requests raised, and answers that are not those to their questions.
    ``ages``: those that no entry can have.
    ``seconds``: from the request's begin to its answer's end, of the requests since the fault began. During
    the fault: ``errors`` of the store, by manager; ``allowed``: how many of them a breaker lets happen;
    ``hits``: the share of hits. ``back_after``: seconds from its end until all managers share again."""

    failed: list[str]
    wrong: list[str]
    ages: list[float]
    answered: int
    seconds: list[float]
    errors: list[int]
    allowed: float
    hits: float
    evidence: int
    back_after: float
    dead: bool

    @property
    def bounded(self) -> bool:
        """Whether the breaker kept the errors of a store that is dead to those that it lets happen."""
        return not self.dead or max(self.errors) <= self.allowed


# --- questions, and what the upstream says to them


def _content(question: str) -> str:
    size = 200 if question[-1] in "02468" else 2500
    return f"{question}: {hashlib.shake_256(question.encode()).hexdigest(size)}"


def _reply(body: Mapping[str, object]) -> object:
    messages: list[dict[str, str]] = body["messages"]  # type: ignore[assignment]
    content = _content(messages[0]["content"])
    if not body.get("stream"):
        return completion(content)
    words = [content[at : at + 400] for at in range(0, len(content), 400)]
    return iter(chat_stream(*words))


async def _areply(body: Mapping[str, object]) -> object:
    reply = _reply(body)
    await asyncio.sleep(0)
    return _async_items(reply) if isinstance(reply, Iterator) else reply


async def _async_items(items: Iterator[object]) -> AsyncIterator[object]:
    for item in items:
        await asyncio.sleep(0)
        yield item


def _body(question: str, stream: bool = False) -> dict[str, object]:
    body = {"model": "m", "messages": [{"role": "user", "content": question}]}
    return {**body, "stream": True} if stream else body


def _question(number: int, requests: int) -> tuple[str, bool]:
    """What request ``number`` asks, and whether for a stream. Always the same."""
    choice = random.Random(number)
    stream = choice.random() < 0.3
    if number % 25 == 12 and requests // 4 <= number < requests // 2:
        return f"orphan {number // 25 % 4}", False
    if choice.random() < 0.7:
        return f"known {choice.randrange(max(8, requests // 10))}", stream
    return f"new {number}", stream


def _said(raw: bytes, stream: bool) -> str:
    """The text of a whole answer; of one that is not whole, what it is instead."""
    if not stream:
        choice = json.loads(raw)["choices"][0]
        return choice["message"]["content"] if choice["finish_reason"] == "stop" else f"cut: {raw!r}"
    *events, last, rest = raw.split(b"\n\n")
    if (last, rest) != (b"data: [DONE]", b""):
        return f"cut: {raw!r}"
    choices = [choice for event in events for choice in json.loads(event[6:])["choices"]]
    if choices[-1]["finish_reason"] != "stop":
        return f"cut: {raw!r}"
    return "".join(choice["delta"].get("content") or "" for choice in choices)


# --- one run


class _Script:
    """Hands out the numbers of requests, and stops at those for which something must happen first."""

    def __init__(self, requests: int, stops: Sequence[int]) -> None:
        self._next, self._requests = 0, requests
        self._gates = {stop: threading.Event() for stop in stops}
        self._asked: set[int] = set()
        self._changed = threading.Condition()

    def take(self) -> int | None:
        with self._changed:
            number = self._next
            if number >= self._requests:
                return None
            self._next += 1
            self._asked.add(number)
            self._changed.notify_all()
            return number

    def ended(self, number: int) -> None:
        with self._changed:
            self._asked.discard(number)
            self._changed.notify_all()

    def gate(self, number: int) -> threading.Event | None:
        """What to wait for before request ``number``."""
        shut = [gate for stop, gate in self._gates.items() if stop <= number and not gate.is_set()]
        return shut[0] if shut else None

    def reached(self, number: int) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._next > number, 10 * PATIENCE):
                raise RuntimeError(f"request {number} was never begun")

    def passed(self, number: int) -> None:
        """Return when all requests before this one have ended."""
        with self._changed:
            done = self._changed.wait_for(lambda: min(self._asked, default=number) >= number, 10 * PATIENCE)
            if not done:
                raise RuntimeError(f"a request before {number} never ended")

    def open(self, stop: int) -> None:
        self._gates[stop].set()


class _Worker:
    """One manager, and those who ask it."""

    def __init__(self, settings: Mapping[str, object], clock: Clock) -> None:
        self.errors = 0
        self.cache = CacheManager(
            **{"ttl": _TTL, "ttl_jitter": 0.0, **settings}, clock=clock, hooks=[self._saw]
        )

    def _saw(self, event: Event) -> None:
        self.errors += event.name == "store-error"


class _Run:
    def __init__(self, target: Target, requests: int, pause: float, changes: Mapping[str, object]) -> None:
        self.requests, self.pause = requests, pause
        self.warm = not target.from_start
        first = 0 if target.from_start else requests // 4
        self.window = range(first, 3 * requests // 4)
        self.script = _Script(requests, (self.window.start, self.window.stop))
        own = target.settings = {**target.settings, **changes}
        self.workers = [
            _Worker({**own, "memory_tier": number < 2}, clock) for number, clock in enumerate(target.clocks)
        ]
        self.failed: list[str] = []
        self.wrong: list[str] = []
        self.ages: list[float] = []
        self.seconds: dict[int, float] = {}
        self.hits = 0
        self.attempts = itertools.count()

    def go(self, target: Target, inject: bool) -> Outcome:
        threads = [threading.Thread(target=ask, args=(worker,)) for worker, ask in self._askers()]
        for thread in threads:
            thread.start()
        errors = self._through_the_fault(target if inject else Target({}), threads)
        evidence, took = errors.pop(), errors.pop()
        lifted = time.monotonic()
        self._in_use()
        back_after = time.monotonic() - lifted
        for thread in threads:
            thread.join()
        for worker in self.workers:
            worker.cache.close()
        return Outcome(
            failed=self.failed,
            wrong=self.wrong,
            ages=self.ages,
            answered=len(self.seconds),
            seconds=[taken for number, taken in self.seconds.items() if number >= self.window.start],
            errors=[int(count) for count in errors],
            allowed=3 + _AT_ONCE * (_THREADS + _TASKS) - 1 + took // _RECOVERY + 1,
            hits=self.hits / len(self.window),
            evidence=int(evidence),
            back_after=back_after,
            dead=target.dead,
        )

    def _askers(self) -> Iterator[tuple[_Worker, Callable[[_Worker], None]]]:
        for worker in self.workers:
            yield worker, lambda worker: asyncio.run(self._tasks(worker))
            for _ in range(_THREADS):
                yield worker, self._thread

    def _through_the_fault(self, target: Target, threads: Sequence[threading.Thread]) -> list[float]:
        """Errors by worker during the fault, the seconds that it lasted, and the evidence of it."""
        script, window = self.script, self.window
        script.reached(window.start)
        if self.warm:
            self._in_use()
        before = [worker.errors for worker in self.workers]
        began = time.monotonic()
        try:
            target.begin()
            script.open(window.start)
            for number in window[:: max(1, len(window) // _SLICES)]:
                script.reached(number)
                target.renew()
            script.reached(window.stop)
            script.passed(window.stop)  # else the window may be over before a store that hangs was given up
        finally:
            script.open(window.start)
            took = time.monotonic() - began
            errors: list[float] = [
                worker.errors - count for worker, count in zip(self.workers, before, strict=True)
            ]
            evidence = sum(errors) if target.evidence is None else target.evidence()
            target.lift()
            script.open(window.stop)
        return [*errors, took, evidence]

    def _thread(self, worker: _Worker) -> None:
        while (number := self.script.take()) is not None:
            if (gate := self.script.gate(number)) is not None:
                gate.wait()
            if self.pause:
                time.sleep(self.pause)
            question, stream = _question(number, self.requests)
            began = time.perf_counter()
            try:
                answer = worker.cache.fetch(_body(question, stream), _reply)
                raw = b"".join(answer) if stream else answer.body  # type: ignore[arg-type]
            except Exception as exc:
                self.failed.append(f"{question}: {exc!r}")
                continue
            finally:
                self.script.ended(number)
            self._check(number, question, stream, raw, answer, time.perf_counter() - began)

    async def _tasks(self, worker: _Worker) -> None:
        # Connecting for the first time may take a busy machine longer than the budget.
        while self.warm:
            with contextlib.suppress(StoreError):
                await worker.cache.aping()
                break
        await asyncio.gather(*(self._task(worker) for _ in range(_TASKS)))
        await worker.cache.aclose()

    async def _task(self, worker: _Worker) -> None:
        while (number := self.script.take()) is not None:
            if (gate := self.script.gate(number)) is not None:
                await asyncio.to_thread(gate.wait)
            await asyncio.sleep(self.pause)
            question, stream = _question(number, self.requests)
            began = time.perf_counter()
            try:
                answer = await worker.cache.afetch(_body(question, stream), _areply)
                raw = b"".join([piece async for piece in answer]) if stream else answer.body
            except Exception as exc:
                self.failed.append(f"{question}: {exc!r}")
                continue
            finally:
                self.script.ended(number)
            self._check(number, question, stream, raw, answer, time.perf_counter() - began)

    def _check(
        self, number: int, question: str, stream: bool, raw: bytes, answer: Answer, seconds: float
    ) -> None:
        self.seconds[number] = seconds
        said = _said(raw, stream)
        if said != _content(question):
            self.wrong.append(f"{question}: {said[:100]}")
        age = answer.cache.age
        if age is not None and not 0 <= age <= _TTL:
            self.ages.append(age)
        if number in self.window and answer.cache.status == "hit":
            self.hits += 1

    def _in_use(self) -> None:
        """Return when what each worker stores the next one has from the store, by threads and by event loops:
        so no breaker is open that a slow start or a fault has opened."""
        with asyncio.Runner() as runner:
            for number, worker in enumerate(self.workers):
                other = self.workers[(number + 1) % _WORKERS].cache
                attempts = (f"in use {number} {attempt}" for attempt in self.attempts)

                def shared(cache: CacheManager = worker.cache, other: CacheManager = other) -> bool:
                    tiers = [
                        _shared(cache, other, _body(next(attempts))),  # noqa: B023 - called here only
                        runner.run(_ashared(cache, other, _body(next(attempts)))),  # noqa: B023
                    ]
                    return not {None, "memory"} & set(tiers)

                wait_for(shared, "the store is used")


def _shared(cache: CacheManager, other: CacheManager, body: dict[str, object]) -> str | None:
    """The tier from which ``other`` has what ``cache`` stores."""
    cache.fetch(body, _reply)
    answer = other.get(body)
    return None if answer is None else answer.cache.tier


async def _ashared(cache: CacheManager, other: CacheManager, body: dict[str, object]) -> str | None:
    await cache.afetch(body, _areply)
    answer = await other.aget(body)
    return None if answer is None else answer.cache.tier


def run(fault: str, requests: int, *, inject: bool = True, pause: float = 0.0, **changes: object) -> Outcome:
    """One run. ``inject``: whether the fault happens. ``pause``: seconds before each request of a caller.
    ``changes``: to the managers' settings."""
    with FAULTS[fault]() as target:
        return _Run(target, requests, pause, changes).go(target, inject)


# --- faults


def _at(port: int, **more: object) -> dict[str, object]:
    return {"type": "redis", "host": HOST, "port": port, "namespace": f"chaos{port}", **more}


def _client(server: RedisServer, **changes: object) -> redis.Redis:
    """A client that reports a failure at once."""
    return server.client(retry=Retry(NoBackoff(), 0), **changes)


@contextlib.contextmanager
def _hung() -> Iterator[Target]:
    with redis_server() as server:
        yield Target(_at(server.port), server.pause, server.resume, dead=True)


@contextlib.contextmanager
def _killed() -> Iterator[Target]:
    with redis_server() as server:
        yield Target(_at(server.port), server.kill, server.restart, dead=True)


@contextlib.contextmanager
def _failover() -> Iterator[Target]:
    with redis_sentinel() as group:
        settings = {"sentinel_nodes": group.nodes, "service_name": group.service, "namespace": "chaos"}

        def promoted() -> None:
            if not group.master.running:
                wait_for(lambda: group.master_port() == group.replica.port, "the replica is promoted")

        yield Target({"type": "redis", **settings}, group.master.kill, promoted, dead=True)


@contextlib.contextmanager
def _refused() -> Iterator[Target]:
    with redis_server() as server, FaultProxy(server.port) as proxy:
        yield Target(_at(proxy.port), proxy.refuse, proxy.accept, dead=True, from_start=True)


@contextlib.contextmanager
def _full() -> Iterator[Target]:
    with redis_server() as server:
        begin, lift = (_configured(server, maxmemory=size) for size in (1, 0))
        yield Target(_at(server.port), begin, lift)


def _configured(server: RedisServer, **settings: object) -> Callable[[], None]:
    def configure() -> None:
        for name, value in settings.items():
            server.ask("CONFIG", "SET", name.replace("_", "-"), value)

    return configure


@contextlib.contextmanager
def _evicting() -> Iterator[Target]:
    """A part of all entries is evicted at once, and from then on some for each new one."""
    with redis_server("--maxmemory-policy", "allkeys-random") as server, server.client() as client:

        def begin() -> None:
            # Much that may go: with the entries alone, connections would soon need more than is left.
            client.mset({f"filler {number}": os.urandom(10_000) for number in range(500)})
            client.config_set("maxmemory", client.info("memory")["used_memory"] - 2_000_000)

        def evicted() -> int:
            return client.info("stats")["evicted_keys"]

        yield Target(_at(server.port), begin, _configured(server, maxmemory=0), evidence=evicted)


@contextlib.contextmanager
def _read_only() -> Iterator[Target]:
    """The server is told to follow one that is not there: it answers, and takes nothing."""
    with redis_server() as server, server.client() as client:
        nowhere = free_port()
        yield Target(
            _at(server.port),
            lambda: client.execute_command("REPLICAOF", HOST, nowhere),
            lambda: client.execute_command("REPLICAOF", "NO", "ONE"),
        )


@contextlib.contextmanager
def _loading() -> Iterator[Target]:
    """The server loads its entries anew, and many more, with a delay for each."""
    options = ["--enable-debug-command", "local", "--loading-process-events-interval-bytes", "1024"]
    with redis_server(*options, "--rdbcompression", "no") as server:
        reload = threading.Thread(
            target=server.ask, args=("DEBUG", "RELOAD"), kwargs={"socket_timeout": None}
        )

        def refuses() -> bool:
            with _client(server) as client:
                try:
                    client.get("key")
                except redis.BusyLoadingError:
                    return True
            return False

        def begin() -> None:
            server.ask("DEBUG", "POPULATE", 20_000, "filler", 1100)
            server.ask("CONFIG", "SET", "key-load-delay", 4000)
            reload.start()
            wait_for(refuses, "the server is loading")

        def lift() -> None:
            if reload.ident is not None:
                wait_for(_configured_at_once, "the server loads without delay")
                reload.join()

        def _configured_at_once() -> bool:
            with _client(server) as client:
                return bool(client.execute_command("CONFIG", "SET", "key-load-delay", 0))

        yield Target(_at(server.port), begin, lift, dead=True)


def _network(dead: bool, **faults: object) -> Callable[[], AbstractContextManager[Target]]:
    """Redis behind a network that fails as told."""

    @contextlib.contextmanager
    def fault() -> Iterator[Target]:
        with redis_server() as server, FaultProxy(server.port) as proxy:

            def begin() -> None:
                for name, value in faults.items():
                    setattr(proxy, name, value)

            # A network that is slow, but not too slow, leaves no error behind.
            evidence = None if dead else lambda: int(bool(proxy.latency))
            yield Target(_at(proxy.port), begin, proxy.heal, evidence=evidence, dead=dead)

    return fault


@contextlib.contextmanager
def _resets() -> Iterator[Target]:
    """Each connection is reset after some kilobytes, in the midst of a value; now and then all are."""
    with redis_server() as server, FaultProxy(server.port) as proxy:

        def begin() -> None:
            proxy.cut_after = 3000

        yield Target(_at(proxy.port), begin, proxy.heal, proxy.reset, evidence=lambda: proxy.resets)


@contextlib.contextmanager
def _corrupt() -> Iterator[Target]:
    """Entries whose bits are flipped, that are lists, and that are somebody else's bytes."""
    with redis_server() as server, server.client() as client:
        chance = random.Random(1)

        def damage() -> None:
            for key in list(client.scan_iter(f"chaos{server.port}:*", 1000)):
                if client.type(key) == b"string":
                    chance.choice(damages)(key)

        def flip(key: bytes) -> None:
            value = client.get(key)
            if value:  # managers remove what they find damaged
                at = chance.randrange(len(value))
                client.setrange(key, at, bytes([value[at] ^ 1 << chance.randrange(8)]))

        def retype(key: bytes) -> None:
            with client.pipeline() as pipe:  # at once: a manager may write the key in between
                pipe.delete(key)
                pipe.rpush(key, "one", "two")
                pipe.execute()

        def replace(key: bytes) -> None:
            client.set(key, chance.choice([b"", b"{}", b"\x80\x04]\x94.", b"LLMC\x01", bytes(100)]))

        damages = (flip, retype, replace)
        yield Target(_at(server.port), damage, _nothing, damage)


@contextlib.contextmanager
def _skewed() -> Iterator[Target]:
    """The second manager's clock jumps five minutes ahead, the third one's as much behind."""
    with redis_server() as server:
        target = Target(_at(server.port))

        def skew(seconds: float) -> None:
            target.clocks[1].offset, target.clocks[2].offset = seconds, -seconds

        target.begin, target.lift = lambda: skew(300.0), lambda: skew(0.0)
        target.evidence = lambda: sum(clock.offset != 0 for clock in target.clocks)
        yield target


@contextlib.contextmanager
def _unheard() -> Iterator[Target]:
    """The connections on which processes tell each other of changes are cut, again and again."""
    with redis_server() as server, server.client() as client:
        cut: list[int] = []
        yield Target(
            _at(server.port),
            renew=lambda: cut.append(client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")),
            evidence=lambda: sum(cut),
        )


@contextlib.contextmanager
def _cluster(kill: bool) -> Iterator[Target]:
    with redis_cluster(3, replicas=1) as cluster:
        node, replica = cluster.servers[0], cluster.replicas[0]

        def whole() -> None:
            wait_for(lambda: replica.ask("ROLE")[0] in (b"master", "master"), "the replica is promoted")
            if kill:
                node.restart()
            else:
                node.resume()
            for server in (node, replica, *cluster.servers[1:]):
                wait_for(
                    lambda server=server: server.ask("CLUSTER INFO")["cluster_state"] == "ok", "all is well"
                )

        struck: list[bool] = []

        def begin() -> None:
            struck.append(True)
            (node.kill if kill else node.pause)()

        settings = {"redis_startup_nodes": cluster.nodes, "namespace": "chaos"}
        yield Target({"type": "redis", **settings}, begin, lambda: whole() if struck else None)


# Takes the leases of questions that nobody asked before, and says so. Its answers never come.
_ORPHANS = """
import json, sys, threading
from llm_middleware import CacheManager
settings, bodies = json.loads(sys.argv[1])
cache = CacheManager(**settings)
calling = threading.Barrier(len(bodies) + 1)
def call(body):
    calling.wait()
    threading.Event().wait()
for body in bodies:
    threading.Thread(target=cache.fetch, args=(body, call), daemon=True).start()
calling.wait()
print("calling", flush=True)
threading.Event().wait()
"""


@contextlib.contextmanager
def _orphaned() -> Iterator[Target]:
    """A process is killed in the midst of calls that others wait for."""
    with redis_server() as server:
        killed: list[int] = []

        def begin() -> None:
            settings = {**target.settings, "store_timeout": PATIENCE}
            given = json.dumps([settings, [_body(f"orphan {number}") for number in range(4)]])
            command = [sys.executable, "-c", _ORPHANS, given]
            with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
                said = process.stdout.readline()  # type: ignore[union-attr]
                process.kill()
            killed.append(int(said == b"calling\n"))

        target = Target(_at(server.port), begin, evidence=lambda: sum(killed))
        yield target


def _s3(**faults: object) -> Callable[[], AbstractContextManager[Target]]:
    """A bucket behind a network that fails as told."""

    @contextlib.contextmanager
    def fault() -> Iterator[Target]:
        with (
            _clean_environment(),
            moto_server() as server,
            FaultProxy(int(server.url.rpartition(":")[2])) as proxy,
        ):
            with contextlib.closing(server.client()) as client:
                client.create_bucket(Bucket="chaos")
            url = f"http://{HOST}:{proxy.port}"
            settings = server.settings("chaos", type="s3", timeout=1.0, s3_endpoint_url=url)

            def begin() -> None:
                if not faults:
                    proxy.refuse()
                for name, value in faults.items():
                    setattr(proxy, name, value)

            yield Target(settings, begin, proxy.heal if faults else proxy.accept, dead=True)

    return fault


FAULTS: Mapping[str, Callable[[], AbstractContextManager[Target]]] = {
    "Redis hangs (SIGSTOP)": _hung,
    "Redis dies (SIGKILL)": _killed,
    "Sentinel: the master is killed": _failover,
    "refused from the start": _refused,
    "memory full (OOM)": _full,
    "a read-only replica answers": _read_only,
    "loading its data": _loading,
    "network 50 ms late each way": _network(False, latency=0.05),
    "network 1 s late each way": _network(True, latency=1.0),
    "network swallows everything": _network(True, blackhole=True),
    "connections reset": _resets,
    "damaged entries": _corrupt,
    "clocks 5 minutes apart": _skewed,
    "pub/sub connections cut": _unheard,
    "entries evicted": _evicting,
    "Cluster: a node is killed": lambda: _cluster(True),
    "Cluster: a node hangs": lambda: _cluster(False),
    "a process is killed in its calls": _orphaned,
    "S3: network swallows everything": _s3(blackhole=True),
    "S3: refused": _s3(),
}


# --- the table


def _percentile(seconds: Sequence[float], share: float) -> float:
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _row(fault: str, with_it: Outcome, without: Outcome) -> list[str]:
    added = [
        1000 * (_percentile(with_it.seconds, share) - _percentile(without.seconds, share))
        for share in (0.5, 0.99, 1.0)
    ]
    numbers = (with_it.answered, len(with_it.failed), len(with_it.wrong))
    hits = [f"{100 * one.hits:.0f} %" for one in (with_it, without)]
    errors = [str(max(one.errors)) for one in (with_it, without)]
    pairs = [f"{own} ({usual})" for own, usual in (errors, hits)]
    late = [f"{ms:+,.1f}" for ms in added]
    return [fault, *map(str, numbers), *late, *pairs, f"{with_it.back_after:.1f} s"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows in Markdown."""
    head = [
        "fault", "answered", "failed", "wrong", "p50 + ms", "p99 + ms", "max + ms",
        "store errors", "hits", "back after",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{os.cpu_count()} CPUs, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}"


def _write(text: str) -> None:
    head, begin, rest = _PAGE.read_text().partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not (begin and end):
        raise SystemExit(f"{_PAGE.name} has no {_BEGIN} ... {_END}")
    _PAGE.write_text(f"{head}{_BEGIN}\n{text}\n{_END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability")
    parser.add_argument("--requests", type=int, default=2000, help="in each run (2000)")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds before a caller's request (0.05)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    parser.add_argument("only", nargs="*", metavar="FAULT", help="words that the fault's name contains")
    chosen = parser.parse_args()
    rows, troubles = [], []
    for fault in FAULTS:
        if chosen.only and not any(word in fault for word in chosen.only):
            continue
        without, with_it = (
            run(fault, chosen.requests, inject=on, pause=chosen.pause) for on in (False, True)
        )
        rows.append(_row(fault, with_it, without))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        troubles += [f"{fault}: {what}" for one in (with_it, without) for what in one.failed + one.wrong]
        if with_it.ages:
            troubles.append(f"{fault}: {len(with_it.ages)} odd ages, from {min(with_it.ages):.0f} s")
        if not with_it.evidence:
            troubles.append(f"{fault}: did not strike")
        if not with_it.bounded:
            troubles.append(f"{fault}: {with_it.errors} errors, more than {with_it.allowed}")
    text = table(rows)
    print(text)
    if chosen.write:
        command = " ".join(["python -m benchmarks.reliability", *sys.argv[1:]])
        _write(f"`{command}` with {_machine()}.\n\n{text}")
    if troubles:
        raise SystemExit("\n".join(troubles[:20]))


if __name__ == "__main__":
    main()
