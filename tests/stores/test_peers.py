"""Processes that share a Redis: what one changes leaves the others' memory (C59, C60), and one call is made
for all who ask at once (C54, C55, C58). Two managers in one process behave like two processes; where one dies
it is a real one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import secrets
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llm_middleware import CacheManager
from llm_middleware.asgi import LLMCacheMiddleware as ASGIMiddleware
from llm_middleware.caching import near as near_module
from llm_middleware.caching import peers as peers_module
from llm_middleware.caching.entry import Entry
from llm_middleware.caching.near import Near
from llm_middleware.stores.memory import MemoryStore
from llm_middleware.testing import FakeClock
from tests.services import HOST, RedisServer, redis_cluster, redis_server, wait_for
from tests.support import CHAT, AsgiFront, Host, WsgiFront, chat_stream, completion

ROOT = Path(__file__).parents[2]
AMPLE = 10.0  # seconds: a budget that a busy machine keeps
COUNTED = {"get", "mget", "set", "unlink", "publish", "evalsha", "eval", "scan", "getrange"}
STREAM = chat_stream("one ", "two ", "three")


def body(text: str = "hi", **changes: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **changes}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


class Managers:
    """Managers of one namespace in one Redis, each as if it were a process of its own."""

    def __init__(self, **settings: object) -> None:
        self.namespace = f"n{secrets.token_hex(6)}"
        self.settings = {"namespace": self.namespace, "store_timeout": AMPLE, **settings}
        self.made: list[CacheManager] = []

    def __call__(self, *, listening: bool = True, **changes: object) -> CacheManager:
        cache = CacheManager("redis", **{**self.settings, **changes})
        self.made.append(cache)
        if listening:
            hears(cache)
        return cache

    def some(self, count: int, **changes: object) -> list[CacheManager]:
        return [self(**changes) for _ in range(count)]

    def close(self) -> None:
        for cache in self.made:
            cache.close()


@pytest.fixture
def managers(server: RedisServer) -> Iterator[Managers]:
    made = Managers(host=HOST, port=server.port)
    yield made
    made.close()


@contextlib.contextmanager
def own_server(*options: str, **settings: object) -> Iterator[tuple[RedisServer, Managers]]:
    """A server that the test may kill, and its managers."""
    with redis_server(*options) as server:
        made = Managers(host=HOST, port=server.port, **settings)
        try:
            yield server, made
        finally:
            made.close()


def peers(cache: CacheManager):
    return cache._flow.tiers.peers


def hears(cache: CacheManager) -> None:
    peers(cache).listen()
    wait_for(lambda: peers(cache).live, "the channel is live")


def waiting(cache: CacheManager) -> int:
    """How many of this manager's requests wait for another's answer."""
    return sum(len(waits) for name, waits in list(peers(cache)._waiting.items()) if "lease" in name)


def asking(cache: CacheManager) -> int:
    """How many of this manager's requests are in a flight, as leader or behind one."""
    flights = list(cache._flow.flights._flights.values())
    return sum(1 + flight.readers for flight in flights)


def at_rest(server: RedisServer, *caches: CacheManager) -> None:
    """Nothing is left of what went on: no flight, no wait, no claim, no lease."""
    for cache in caches:
        wait_for(lambda cache=cache: len(cache._flow.flights) == 0, "no flight")
        assert (peers(cache)._waiting, peers(cache)._claimed) == ({}, {})
        store = cache._flow.tiers.store
        wait_for(lambda store=store: store.peers.leases.held == 0, "no lease is held")
    wait_for(lambda: leases(server, caches[0]) == [], "no lease is left")


def leases(server: RedisServer, cache: CacheManager) -> list[bytes]:
    with server.client() as client:
        return list(client.scan_iter(f"{{{cache.settings.namespace}:*:lease:*", 1000))


def key_of(cache: CacheManager, request: dict[str, object]) -> str:
    return cache.plan("chat", request).key


class Upstream:
    """Counts its calls, numbers its answers, and gives none before it is let go."""

    def __init__(self, *, held: bool = False) -> None:
        self.gate = threading.Event()
        self.calls = 0
        self._lock = threading.Lock()
        self.answer: Callable[[int], object] = lambda number: completion(f"answer {number}")
        if not held:
            self.gate.set()

    def count(self) -> int:
        with self._lock:
            self.calls += 1
            return self.calls

    def __call__(self, request: object) -> object:
        number = self.count()
        assert self.gate.wait(30)
        return self.answer(number)

    async def acall(self, request: object) -> object:
        number = self.count()
        assert await asyncio.to_thread(self.gate.wait, 30)
        result = self.answer(number)
        return _items(result) if isinstance(result, Iterator) else result


async def _items(items: Iterator[object]):
    for item in items:
        await asyncio.sleep(0)
        yield item


def text_in(data: bytes) -> str:
    return json.loads(data)["choices"][0]["message"]["content"]


def text_of(answer) -> str:
    return text_in(answer.body)


@contextlib.contextmanager
def threads(count: int) -> Iterator[Callable[..., Future]]:
    with ThreadPoolExecutor(count) as pool:
        yield pool.submit


class Loop:
    """An event loop in a thread of its own, to which coroutines are given from the test."""

    def __enter__(self) -> Loop:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        return self

    def submit(self, coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def __exit__(self, *exc: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.run_until_complete(self._end())
        self.loop.close()

    async def _end(self) -> None:
        pending = asyncio.all_tasks() - {asyncio.current_task()}
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await self.loop.shutdown_asyncgens()
        await self.loop.shutdown_default_executor()


class Crowd:
    """Requests in threads and in tasks of one loop, at the same time."""

    def __init__(self, mode: str, caches: list[CacheManager]) -> None:
        self.mode = mode
        self.caches = caches
        self.futures: list[Future] = []

    def __enter__(self) -> Crowd:
        self.pool = ThreadPoolExecutor(32)
        self.loop = Loop().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        for cache in self.caches:
            held = peers(cache)._shared.leases
            wait_for(lambda held=held: held.held == 0, "no lease is held")
            held.close()  # so that none is released over a connection that is being closed
            self.loop.submit(cache._flow.tiers.store.aclose()).result(30)
        self.loop.__exit__()
        self.pool.shutdown()

    def ask(self, cache: CacheManager, request: dict[str, object], upstream: Upstream) -> Future:
        """Fetch and read to the end; ``(status, body)``."""
        is_sync = {"sync": True, "async": False, "mixed": len(self.futures) % 2 == 0}[self.mode]
        if is_sync:
            future = self.pool.submit(self._fetch, cache, request, upstream)
        else:
            future = self.loop.submit(self._afetch(cache, request, upstream))
        self.futures.append(future)
        return future

    def results(self) -> list[tuple[str, bytes]]:
        return [future.result(40) for future in self.futures]

    def _fetch(self, cache: CacheManager, request: dict[str, object], upstream: Upstream):
        answer = cache.fetch(request, upstream)
        return answer.cache.status, b"".join(answer) if request.get("stream") else answer.body

    async def _afetch(self, cache: CacheManager, request: dict[str, object], upstream: Upstream):
        answer = await cache.afetch(request, upstream.acall)
        if request.get("stream"):
            return answer.cache.status, b"".join([piece async for piece in answer])
        return answer.cache.status, answer.body


@pytest.fixture(params=["sync", "async", "mixed"])
def mode(request) -> str:
    return request.param


# --- what one process changes, the others do not go on giving (C59, C60)


def warmed(face, *caches: CacheManager, request: dict[str, object] | None = None, **options: object) -> None:
    """All of ``caches`` have the same answer in memory. One that hears late of what it has just read reads it
    once more."""
    face.fetch(caches[0], request or body(), lambda _: completion("old"), **options)
    for cache in caches:

        def near(cache: CacheManager = cache) -> bool:
            return face.fetch(cache, request or body(), None, **options).cache.tier == "memory"

        wait_for(near, "the answer is in memory")
        wait_for(lambda cache=cache: len(cache._flow.flights) == 0, "no flight")


def test_c59_a_hit_in_memory_asks_redis_nothing(face, managers, server):
    one, other = managers.some(2)
    warmed(face, one, other)
    at_rest(server, one, other)
    before = counted(server)
    for _ in range(100):
        assert face.fetch(one, body(), None).cache.tier == "memory"
        assert face.fetch(other, body(), None).cache.tier == "memory"
    assert counted(server) == before


def counted(server: RedisServer) -> dict[str, int]:
    return {name: calls for name, calls in server.calls().items() if name in COUNTED}


CHANGES = {
    "delete": lambda face, cache, key: face.do(cache, "delete", key),
    "flush": lambda face, cache, key: face.do(cache, "flush"),
    "tags": lambda face, cache, key: invalidate(face, cache, tags=["blue"]),
    "model": lambda face, cache, key: invalidate(face, cache, model="m"),
    "scope": lambda face, cache, key: invalidate(face, cache, scope="tenant"),
    "namespace": lambda face, cache, key: invalidate(face, cache, namespace="part"),
    "kind": lambda face, cache, key: invalidate(face, cache, kind="chat"),
    "prefix": lambda face, cache, key: invalidate(face, cache, prefix=key[:8]),
}


def invalidate(face, cache: CacheManager, **criteria: object) -> int:
    if face.name == "sync":
        return cache.invalidate(**criteria)
    return face.run(cache.ainvalidate(**criteria))


@pytest.mark.parametrize("change", CHANGES)
def test_c59_what_one_removes_the_other_asks_for_anew(face, managers, change):
    one, other = managers.some(2)
    request = body(cache={"tags": ["blue"], "namespace": "part"})
    warmed(face, one, other, request=request, scope="tenant")
    key = face.get(one, request, scope="tenant").cache.key
    assert CHANGES[change](face, one, key) == 1
    memory = other._flow.tiers.memory
    wait_for(lambda: len(memory) == 0, "the other's memory is empty")
    for cache in (other, one):  # one's own memory is without it too: it has the other's new answer
        answer = face.fetch(cache, request, lambda _: completion("new"), scope="tenant")
        assert text_of(answer) == "new"


def test_c59_what_one_replaces_the_other_gets_anew(face, managers):
    one, other = managers.some(2)
    warmed(face, one, other)
    assert face.set(one, body(), completion("new")) is not None
    wait_for(lambda: len(other._flow.tiers.memory) == 0, "the other's memory is empty")
    answer = face.fetch(other, body(), lambda _: pytest.fail("called"))
    assert (text_of(answer), answer.cache.tier) == ("new", "redis")


def test_c59_own_changes_do_not_leave_own_memory(face, managers):
    one, other = managers.some(2)
    for number in range(20):
        face.set(one, body(str(number)), completion("mine"))
    face.set(other, body("end"), completion("end"))
    face.set(one, body("end"), completion("mine"))
    memory = other._flow.tiers.memory
    wait_for(lambda: memory.get(key_of(one, body("end"))) is None, "the other heard all of it")
    warm = [face.fetch(one, body(str(number)), None).cache.tier for number in range(20)]
    assert warm == ["memory"] * 20


def test_c59_other_namespaces_of_the_same_redis_are_left_alone(face, server, managers):
    stranger = managers(namespace=managers.namespace + "2")
    one, other = managers.some(2)
    warmed(face, one, other)
    face.set(stranger, body(), completion("theirs"))
    assert face.do(one, "flush") == 1
    wait_for(lambda: len(other._flow.tiers.memory) == 0, "the other heard")
    assert face.fetch(stranger, body(), None).cache.tier == "memory"
    assert invalidate(face, stranger, model="m", dry_run=True) == 1


def test_c59_after_a_gap_memory_is_empty_and_the_channel_live_again(face):
    with own_server() as (server, managers):
        one, other = managers.some(2)
        warmed(face, one, other)
        server.kill()
        wait_for(lambda: not peers(other).live, "the channel is down")
        server.restart()
        wait_for(lambda: peers(other).live and peers(one).live, "the channel is live")
        assert (len(one._flow.tiers.memory), len(other._flow.tiers.memory)) == (0, 0)
        other._flow.tiers._breaker.succeeded()
        assert text_of(face.fetch(other, body(), lambda _: completion("new"))) == "new"


def test_c59_without_the_channel_memory_keeps_entries_a_second(face, caplog):
    with own_server() as (server, managers):
        server.ask("ACL", "SETUSER", "mute", "on", ">secret", "~*", "+@all", "resetchannels")
        clock = FakeClock()
        given = {"username": "mute", "password": "secret", "clock": clock, "listening": False}
        one, other = managers.some(2, **given)
        with caplog.at_level(logging.WARNING, "llm_middleware"):
            for number in range(3):
                face.set(one, body(str(number)), completion("old"))
            assert face.fetch(other, body("0"), None).cache.tier == "redis"
            assert face.do(one, "delete", key_of(one, body("0"))) == 1
            assert face.do(one, "delete", key_of(one, body("1"))) == 1
        told = [record for record in caplog.records if "other processes" in record.getMessage()]
        assert [record.levelname for record in told] == ["WARNING"]
        assert face.fetch(other, body("0"), None).cache.tier == "memory"
        clock.advance(0.99)
        assert face.fetch(other, body("0"), None).cache.tier == "memory"
        clock.advance(0.02)
        assert text_of(face.fetch(other, body("0"), lambda _: completion("new"))) == "new"
        assert face.fetch(one, body("2"), None).cache.tier == "redis"
        assert peers(one).live is False
        wait_for(lambda: leases(server, one) == [], "the lease is released, though nobody is told")


def test_c59_with_the_channel_memory_keeps_entries_a_minute(face, managers):
    clock = FakeClock()
    one, other = managers.some(2, clock=clock)
    warmed(face, one, other)
    clock.advance(59)
    assert [face.fetch(cache, body(), None).cache.tier for cache in (one, other)] == ["memory", "memory"]
    clock.advance(2)
    assert [face.fetch(cache, body(), None).cache.tier for cache in (one, other)] == ["redis", "redis"]


def test_c59_in_a_cluster_too(face):
    with redis_cluster() as cluster:
        managers = Managers(redis_startup_nodes=cluster.nodes)
        try:
            one, other = managers.some(2)
            for number in range(8):
                warmed(face, one, other, request=body(str(number)))
            assert face.do(one, "delete", key_of(one, body("0"))) == 1
            assert face.set(one, body("1"), completion("new")) is not None
            keys = [key_of(one, body(number)) for number in "01"]
            memory = other._flow.tiers.memory
            wait_for(lambda: not any(map(memory.get, keys)), "the other dropped both")
            assert invalidate(face, one, model="m") == 7
            wait_for(lambda: len(memory) == 0, "the other dropped them all")
        finally:
            if face.name == "async":
                for cache in managers.made:
                    face.run(cache.aclose())
            managers.close()


def test_c54_one_call_in_a_cluster_too(mode):
    with redis_cluster() as cluster:
        managers = Managers(redis_startup_nodes=cluster.nodes)
        try:
            caches = managers.some(2)
            upstream = Upstream(held=True)
            with Crowd(mode, caches) as crowd:
                for cache in caches * 4:
                    crowd.ask(cache, body(), upstream)
                wait_for(lambda: sum(map(asking, caches)) == 8, "all ask")
                upstream.gate.set()
                assert [text_in(text) for _, text in crowd.results()] == ["answer 1"] * 8
            assert upstream.calls == 1
            for node in cluster.servers:
                wait_for(lambda node=node: leases(node, caches[0]) == [], "no lease is left")
        finally:
            managers.close()


_READER = """
    import json, sys, threading
    from llm_middleware import CacheManager
    from tests.services import wait_for

    settings, body = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    cache = CacheManager("redis", **settings)
    cache._flow.tiers.peers.listen()
    wait_for(lambda: cache._flow.tiers.peers.live, "live")
    def refuse(_):
        raise AssertionError("called")
    print(cache.fetch(body, refuse).cache.tier, cache.fetch(body, refuse).cache.tier, flush=True)
    sys.stdin.readline()
    wait_for(lambda: len(cache._flow.tiers.memory) == 0, "dropped")
    print("dropped", flush=True)
"""


@contextlib.contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(json.dumps, arguments)]
    popen = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with popen:
        try:
            yield popen
        finally:
            popen.kill()


def test_c59_a_real_process_drops_what_this_one_deletes(managers):
    cache = managers()
    cache.set(body(), completion("old"))
    with process(_READER, managers.settings, body()) as reader:
        assert reader.stdout.readline() == "redis memory\n"
        assert cache.delete(key_of(cache, body())) == 1
        reader.stdin.write("\n")
        assert reader.stdout.readline() == "dropped\n"
        assert reader.wait(30) == 0


_FORKED = """
    import json, os, sys
    from llm_middleware import CacheManager
    from tests.services import wait_for

    settings = json.loads(sys.argv[1])
    cache = CacheManager("redis", **settings)
    def body(text):
        return {"model": "m", "messages": [{"role": "user", "content": text}]}
    def answer(text):
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    def live():
        cache._flow.tiers.peers.listen()
        wait_for(lambda: cache._flow.tiers.peers.live, "live")
    live()
    cache.set(body("a"), answer("old"))
    heard, say = os.pipe()
    child = os.fork()
    if child == 0:
        live()
        cache.set(body("b"), answer("old"))
        print("child", cache.fetch(body("b"), None).cache.tier, flush=True)
        sys.stdin.readline()
        wait_for(lambda: len(cache._flow.tiers.memory) == 0, "dropped")
        print("child dropped", flush=True)
        os.read(heard, 1)
        cache.set(body("a"), answer("new"))
        os._exit(0)
    wait_for(lambda: len(cache._flow.tiers.memory) == 0, "dropped")
    cache.set(body("a"), answer("old"))
    os.write(say, b"x")
    assert os.waitpid(child, 0)[1] == 0
    wait_for(lambda: len(cache._flow.tiers.memory) == 0, "the child is another process")
    print(cache.fetch(body("a"), None).cache.tier, flush=True)
"""


def test_c59_a_forked_child_is_a_process_of_its_own(managers):
    cache = managers()
    with process(_FORKED, managers.settings) as parent:
        assert parent.stdout.readline() == "child memory\n"
        assert cache.invalidate(model="m") == 2
        parent.stdin.write("\n")
        assert parent.stdout.readline() == "child dropped\n"
        assert parent.stdout.readline() == "redis\n"
        assert parent.wait(30) == 0


# --- what is on its way while it changes (C59)


def late(cache: CacheManager, meanwhile: Callable[[], object]) -> None:
    """The next value that ``cache`` reads from Redis arrives after ``meanwhile`` was done."""
    store = cache._flow.tiers.store
    read, aread = store.get, store.aget

    def get(key: str) -> bytes | None:
        store.get, store.aget = read, aread
        value = read(key)
        meanwhile()
        return value

    async def aget(key: str) -> bytes | None:
        store.get, store.aget = read, aread
        value = await aread(key)
        await asyncio.to_thread(meanwhile)
        return value

    store.get, store.aget = get, aget


def test_c59_a_value_read_before_a_change_is_not_kept(face, managers):
    one, other = managers.some(2)
    face.set(one, body(), completion("old"))
    dropped = other._flow.tiers.near.moment()

    def meanwhile() -> None:
        one.set(body(), completion("new"))
        wait_for(lambda: other._flow.tiers.near.moment() > dropped, "the other heard")

    late(other, meanwhile)
    assert text_of(face.fetch(other, body(), None)) == "old"  # it was so when it was asked
    assert text_of(face.fetch(other, body(), None)) == "new"


def test_c59_a_value_read_before_the_channel_was_heard_is_kept_a_second(face, managers):
    clock = FakeClock()
    one, other = managers(clock=clock), managers(clock=clock, listening=False)
    face.set(one, body(), completion("old"))
    listen, peers(other).listen = peers(other).listen, lambda: None

    def meanwhile() -> None:
        one.set(body(), completion("new"))  # nobody hears
        peers(other).listen = listen
        hears(other)

    late(other, meanwhile)
    assert text_of(face.fetch(other, body(), None)) == "old"
    clock.advance(1.01)
    assert text_of(face.fetch(other, body(), None)) == "new"


# --- `Near` by itself


def entry(number: int) -> Entry:
    return Entry("chat", float(number), 1e12, None, None, None, (), (), b"")


def make_near() -> Near:
    return Near(MemoryStore(max_bytes=10**6, size_of=lambda _: 1, clock=FakeClock()), 60.0)


KEYS = [f"{namespace}:{number:064x}" for namespace in ("a", "b") for number in range(3)]


def test_c59_near_fills_what_nobody_changed():
    near = make_near()
    near.fill(KEYS[0], entry(1), 60, near.moment())
    assert near.memory.get(KEYS[0]) == entry(1)


@pytest.mark.parametrize(
    "change",
    [
        lambda near: near.drop([KEYS[1], KEYS[0]]),
        lambda near: near.drop_all("a"),
        lambda near: near.drop_everything(),
    ],
)
def test_c59_near_does_not_fill_what_was_changed_since(change):
    near = make_near()
    near.put(KEYS[0], entry(1), 60)
    since = near.moment()
    change(near)
    near.fill(KEYS[0], entry(1), 60, since)
    assert near.memory.get(KEYS[0]) is None
    near.fill(KEYS[0], entry(2), 60, near.moment())
    assert near.memory.get(KEYS[0]) == entry(2)


def test_c59_near_keeps_what_was_put_over_what_was_on_its_way():
    near = make_near()
    since = near.moment()
    near.put(KEYS[0], entry(2), 60)
    near.fill(KEYS[0], entry(1), 60, since)
    assert near.memory.get(KEYS[0]) == entry(2)


def test_c59_near_forgets_single_changes_and_remembers_that_there_were_some():
    near = make_near()
    since = near.moment()
    near.drop([KEYS[0]])
    later = near.moment()
    near.drop([f"a:{number:064x}" for number in range(10, 10 + near_module._REMEMBERED)])
    assert len(near._changed) == near_module._REMEMBERED
    near.fill(KEYS[0], entry(1), 60, since)
    assert near.memory.get(KEYS[0]) is None
    near.fill(KEYS[0], entry(1), 60, later)
    assert near.memory.get(KEYS[0]) == entry(1)
    near.fill(KEYS[3], entry(1), 60, since)  # nobody knows any more
    assert near.memory.get(KEYS[3]) is None


class Story:
    """A store, messages on their way and reads on their way. Once what was changed is told, memory has the
    store's value or none."""

    def __init__(self) -> None:
        self.near = make_near()
        self.live = True
        self.near.live = lambda: self.live
        self.store = dict.fromkeys(KEYS, 0)
        self.messages: list[tuple[str, ...]] = []
        self.reads: list[tuple[str, int, int]] = []
        self.numbers = itertools.count(1)

    def another_changes(self, key: str) -> None:
        self.store[key] = next(self.numbers)
        self._tell(key)

    def another_flushes(self, key: str) -> None:
        for other in KEYS:
            if other[0] == key[0]:
                self.store[other] = next(self.numbers)
        self._tell("all", key[0])

    def _tell(self, *names: str) -> None:
        if self.live:
            self.messages.append(names)

    def this_one_writes(self, key: str) -> None:
        self.store[key] = number = next(self.numbers)
        self.near.put(key, entry(number), 60 if self.live else 1)

    def this_one_deletes(self, key: str) -> None:
        self.near.drop([key])
        self.store[key] = next(self.numbers)
        self.near.drop([key])

    def a_read_begins(self, key: str) -> None:
        self.reads.append((key, self.near.moment(), self.store[key]))

    def a_read_arrives(self, key: str) -> None:
        if self.reads:
            key, since, number = self.reads.pop(KEYS.index(key) % len(self.reads))
            self.near.fill(key, entry(number), 60 if self.live else 1, since)

    def a_message_arrives(self, key: str) -> None:
        if self.messages:
            name, *namespace = self.messages.pop(0)
            if namespace:
                self.near.drop_all(*namespace)
            else:
                self.near.drop([name])

    def the_channel_breaks(self, key: str) -> None:
        self.live = False
        self.messages.clear()

    def the_channel_is_back(self, key: str) -> None:
        if not self.live:
            self.near.drop_everything()
            self.live = True

    def a_second_passes(self, key: str) -> None:
        self.near.memory._clock.advance(1)

    def check(self) -> None:
        assert len(self.near._changed) <= 2
        for key in KEYS:
            told = self.live and (key,) not in self.messages and ("all", key[0]) not in self.messages
            kept = self.near.memory.get(key)
            if told and kept is not None:
                assert kept.created == self.store[key]


EVENTS = [name for name in vars(Story) if name.split("_")[0] in ("another", "this", "a", "the")]


@hypothesis_settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.sampled_from(KEYS)), max_size=60))
def test_c59_near_has_what_the_store_has_or_nothing(events):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_module, "_REMEMBERED", 2)
        story = Story()
        for name, key in events:
            getattr(story, name)(key)
            story.check()


def test_c59_near_keeps_what_was_asked_for_while_nothing_was_told_a_second():
    near = make_near()
    near.live = lambda: False
    since = near.moment()
    near.live = lambda: True
    near.fill(KEYS[0], entry(1), 60, since)
    near.memory._clock.advance(0.99)
    assert near.memory.get(KEYS[0]) == entry(1)
    near.memory._clock.advance(0.02)
    assert near.memory.get(KEYS[0]) is None


def test_c59_near_in_threads_never_keeps_what_was_replaced():
    near, store = make_near(), dict.fromkeys(KEYS, 0)
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            for key in KEYS:
                since = near.moment()
                near.fill(key, entry(store[key]), 60, since)

    with threads(4) as submit:
        readers = [submit(read) for _ in range(3)]
        try:
            for number in range(1, 2000):
                key = KEYS[number % len(KEYS)]
                store[key] = number
                near.drop([key])
                kept = near.memory.get(key)
                assert kept is None or kept.created == number
        finally:
            stop.set()
        for reader in readers:
            reader.result()


# --- one call for all who ask at once (C54, C55)


def test_c54_one_call_for_twenty_requests_of_three_processes(mode, managers, server):
    caches = managers.some(3)
    upstream = Upstream(held=True)
    with Crowd(mode, caches) as crowd:
        for number in range(20):
            crowd.ask(caches[number % 3], body(), upstream)
        wait_for(lambda: sum(map(asking, caches)) == 20, "all ask")
        wait_for(lambda: upstream.calls == 1 and sum(map(waiting, caches)) == 2, "two processes wait")
        upstream.gate.set()
        told = crowd.results()
    assert [text_in(text) for _, text in told] == ["answer 1"] * 20
    assert upstream.calls == 1
    assert [status for status, _ in told].count("miss") == 1
    at_rest(server, *caches)


@pytest.mark.usefixtures("no_polls")
def test_c54_one_call_for_twenty_requests_of_a_stream(mode, managers, server):
    caches = managers.some(3)
    upstream = Upstream(held=True)
    upstream.answer = lambda number: iter(STREAM)
    with Crowd(mode, caches) as crowd:
        for number in range(20):
            crowd.ask(caches[number % 3], body(stream=True), upstream)
        wait_for(lambda: sum(map(asking, caches)) == 20, "all ask")
        upstream.gate.set()
        told = crowd.results()
    assert {text for _, text in told} == {b"".join(STREAM)}
    assert told[0][1].endswith(b"data: [DONE]\n\n")
    assert upstream.calls == 1
    at_rest(server, *caches)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [AsgiFront, WsgiFront])
def test_c54_one_call_behind_three_middlewares(kind, stream, managers, server):
    caches = managers.some(3)

    def handler(seen):
        wait_for(lambda: sum(map(waiting, caches)) == 2, "the two others wait")
        return list(STREAM) if stream else completion("answer")

    fronts = [kind(Host(handler), cache=cache) for cache in caches]
    request = body(stream=True) if stream else body()
    with threads(3) as submit:
        futures = [submit(front.together, *[request] * 7) for front in fronts]
        replies = [reply for future in futures for reply in future.result(40)]
    assert sum(front.host.calls for front in fronts) == 1
    expected = b"".join(STREAM) if stream else json.dumps(completion("answer")).encode()
    assert [reply.body for reply in replies] == [expected] * 21
    assert sorted({reply.cache for reply in replies})[-1] == "miss"
    at_rest(server, *caches)


_LEADER = """
    import json, sys, threading
    from llm_middleware import CacheManager

    def call(_):
        print("calling", flush=True)
        threading.Event().wait()

    CacheManager("redis", **json.loads(sys.argv[1])).fetch(json.loads(sys.argv[2]), call)
"""


def test_c55_where_the_leader_is_killed_one_other_calls(mode, managers, server):
    managers.settings["single_flight_lease"] = 0.5
    caches = managers.some(3)
    upstream = Upstream()
    with process(_LEADER, managers.settings, body()) as leader, Crowd(mode, caches) as crowd:
        assert leader.stdout.readline() == "calling\n"
        for cache in caches * 2:
            crowd.ask(cache, body(), upstream)
        wait_for(lambda: sum(map(asking, caches)) == 6, "all ask")
        assert upstream.calls == 0
        leader.kill()
        told = crowd.results()
    assert len({text for _, text in told}) == 1
    assert upstream.calls == 1
    at_rest(server, *caches)


def test_c55_a_leader_that_takes_longer_than_a_lease_keeps_it(managers, server):
    one, other = managers.some(2, single_flight_lease=0.3)
    upstream = Upstream(held=True)
    with Crowd("sync", [one, other]) as crowd:
        crowd.ask(one, body(), upstream)
        wait_for(lambda: upstream.calls == 1, "the call")
        before = server.calls().get("set", 0)
        crowd.ask(other, body(), upstream)
        # Each look of the other is one SET; the sixth comes more than a lease's time after the first.
        wait_for(lambda: server.calls()["set"] >= before + 6, "the other looked six times")
        assert upstream.calls == 1
        upstream.gate.set()
        crowd.results()
    assert upstream.calls == 1


def failing_answers() -> dict[str, object]:
    filtered = completion("no")
    filtered["choices"][0]["finish_reason"] = "content_filter"
    return {"upstream 500": Failing(), "content filter": filtered, "not admitted": completion("unwanted")}


class Failing:
    """A response of the provider that is an error, as httpx has it."""

    def __init__(self) -> None:
        self.status_code = 500
        self.headers = {"content-type": "application/json"}
        self.content = b'{"error": {"message": "broken"}}'

    def read(self) -> bytes:
        return self.content

    async def aread(self) -> bytes:
        return self.content


def admit(plan, answer) -> bool:
    return b"unwanted" not in answer.body


@pytest.mark.usefixtures("no_polls")
@pytest.mark.parametrize("case", ["upstream 500", "content filter", "not admitted", "raises"])
def test_c55_where_the_answer_is_not_stored_all_others_call_at_once(mode, managers, server, case):
    caches = managers.some(4, admit=admit)
    leader, upstream, together = Upstream(held=True), Upstream(), threading.Barrier(3)

    def unstored(number: int) -> object:
        if case == "raises":
            raise ValueError("the provider is not there")
        return failing_answers()[case]

    def answer(number: int) -> object:
        together.wait(20)  # in turn they would never be three
        return failing_answers()["content filter"]

    leader.answer, upstream.answer = unstored, answer
    if mode != "sync":  # a wait in the loop would hold up the others

        async def acall(request: object) -> object:
            upstream.count()
            return await asyncio.to_thread(answer, 0)

        upstream.acall = acall
    with Crowd(mode, caches) as crowd:
        first = crowd.ask(caches[0], body(), leader)
        wait_for(lambda: leader.calls == 1, "the call")
        for cache in caches[1:]:
            crowd.ask(cache, body(), upstream)
        wait_for(lambda: sum(map(waiting, caches)) == 3, "all others wait")
        leader.gate.set()
        if case == "raises":
            with pytest.raises(ValueError, match="the provider is not there"):
                first.result(30)
        told = [future.result(30) for future in crowd.futures[1:]]
    assert len(told) == upstream.calls == 3
    at_rest(server, *caches)


@pytest.fixture
def no_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only messages end a wait."""
    monkeypatch.setattr(peers_module, "_FIRST_POLL", 100.0)
    monkeypatch.setattr(peers_module, "_POLL_LIVE", 100.0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.usefixtures("no_polls")
def test_c55_where_the_leader_is_cancelled_one_other_takes_over(managers, server, stream):
    caches = managers.some(4)
    upstream = Upstream()
    upstream.answer = lambda number: iter(STREAM) if stream else completion("answer")
    begun = threading.Event()

    async def hang(request: object) -> object:
        if stream:
            return endless()
        begun.set()
        return await asyncio.Event().wait()

    async def endless():
        yield STREAM[0]
        begun.set()
        await asyncio.Event().wait()

    async def lead() -> None:
        answer = await caches[0].afetch(body(stream=stream), hang)
        async for _ in answer:
            pass

    with Crowd("mixed", caches) as crowd:
        first = crowd.loop.submit(lead())
        assert begun.wait(30)
        for cache in caches[1:]:
            crowd.ask(cache, body(stream=stream), upstream)
        wait_for(lambda: sum(map(waiting, caches)) == 3, "all others wait")
        first.cancel()
        told = crowd.results()
    assert len({text for _, text in told}) == 1
    assert upstream.calls == 1
    at_rest(server, *caches)


class AsgiClient:
    """One request of a client that may leave."""

    def __init__(self, app, request: dict[str, object]) -> None:
        self.app = app
        self.raw = json.dumps(request).encode()
        self.gone = asyncio.Event()
        self.given = False

    async def receive(self) -> dict[str, object]:
        if not self.given:
            self.given = True
            return {"type": "http.request", "body": self.raw, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, object]) -> None:
        pass

    async def run(self) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.raw))]
        version = {"version": "3.0", "spec_version": "2.4"}
        scope = {"type": "http", "asgi": version, "method": "POST", "path": CHAT, "root_path": ""}
        await self.app({**scope, "query_string": b"", "headers": headers}, self.receive, self.send)


@pytest.mark.parametrize("leaves", ["disconnects", "is cancelled"])
@pytest.mark.parametrize("stream", [False, True])
def test_c55_where_the_leaders_client_leaves_asgi_one_other_takes_over(managers, server, stream, leaves):
    caches = managers.some(4)
    begun, upstream = threading.Event(), Upstream()
    upstream.answer = lambda number: iter(STREAM) if stream else completion("answer")

    async def app(scope, receive, send) -> None:
        if stream:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": STREAM[0], "more_body": True})
        begun.set()
        await asyncio.Event().wait()

    scopes = {"scope": "caller:anonymous"}  # that of the middleware's client, who sends no credentials

    async def fetch(cache: CacheManager) -> bytes:
        answer = await cache.afetch(body(stream=stream), upstream.acall, **scopes)
        return b"".join([piece async for piece in answer]) if stream else answer.body

    with Crowd("async", caches) as crowd:
        client = AsgiClient(ASGIMiddleware(app, cache=caches[0]), body(stream=stream))
        first = crowd.loop.submit(client.run())
        assert begun.wait(30)
        others = [crowd.loop.submit(fetch(cache)) for cache in caches[1:]]
        wait_for(lambda: sum(map(waiting, caches)) == 3, "all others wait")
        if leaves == "disconnects":
            crowd.loop.loop.call_soon_threadsafe(client.gone.set)
        else:
            first.cancel()
        told = {other.result(30) for other in others}
    assert len(told) == 1
    assert upstream.calls == 1
    at_rest(server, *caches)


def test_c55_where_the_leaders_client_leaves_wsgi_one_other_takes_over(managers, server):
    caches = managers.some(4)
    upstream = Upstream()
    upstream.answer = lambda number: iter(STREAM)
    with Crowd("sync", caches) as crowd:
        # As a WSGI server has it: the answer's iterator is closed before its end.
        answer = caches[0].fetch(body(stream=True), lambda _: iter(STREAM))
        chunks = iter(answer)
        assert next(chunks) == STREAM[0]
        for cache in caches[1:]:
            crowd.ask(cache, body(stream=True), upstream)
        wait_for(lambda: sum(map(waiting, caches)) == 3, "all others wait")
        assert upstream.calls == 0
        del chunks, answer
        told = crowd.results()
    assert {text for _, text in told} == {b"".join(STREAM)}
    assert upstream.calls == 1
    at_rest(server, *caches)


def test_c55_where_redis_is_dead_everybody_calls(mode):
    with own_server(store_timeout=0.3) as (server, managers):
        caches = managers.some(3)
        server.kill()
        upstream = Upstream(held=True)
        with Crowd(mode, caches) as crowd:
            for cache in caches * 2:
                crowd.ask(cache, body(), upstream)
            wait_for(lambda: upstream.calls == 3, "each process calls")
            upstream.gate.set()
            told = crowd.results()
        assert [text for _, text in told[:3]] == [text for _, text in told[3:]]
        assert upstream.calls == 3
        assert [len(cache._flow.flights) for cache in caches] == [0, 0, 0]
        assert [(peers(cache)._waiting, peers(cache)._claimed) for cache in caches] == [({}, {})] * 3


@pytest.mark.parametrize("fails", ["pause", "kill"])
def test_c55_where_redis_fails_while_they_wait_everybody_calls(mode, fails):
    with own_server(store_timeout=0.3) as (server, managers):
        caches = managers.some(3)
        leader, upstream = Upstream(held=True), Upstream()
        with Crowd(mode, caches) as crowd:
            first = crowd.ask(caches[0], body(), leader)
            wait_for(lambda: leader.calls == 1, "the call")
            others = [crowd.ask(cache, body(), upstream) for cache in caches[1:]]
            wait_for(lambda: sum(map(waiting, caches)) == 2, "the others wait")
            getattr(server, fails)()
            told = [other.result(30) for other in others]  # while the leader still calls
            assert leader.gate.is_set() is False
            leader.gate.set()
            first.result(30)
            if fails == "pause":
                server.resume()
        assert sorted(text_in(text) for _, text in told) == ["answer 1", "answer 2"]
        assert upstream.calls == 2
        assert [len(cache._flow.flights) for cache in caches] == [0, 0, 0]


def test_c55_a_cancelled_waiter_leaves_its_followers_to_one_of_them(managers, server):
    one, other = managers.some(2)
    leader, upstream = Upstream(held=True), Upstream()
    with Crowd("async", [one, other]) as crowd:
        crowd.ask(one, body(), leader)
        wait_for(lambda: leader.calls == 1, "the call")
        first = crowd.ask(other, body(), upstream)
        wait_for(lambda: waiting(other) == 1, "one waits")
        for _ in range(3):
            crowd.ask(other, body(), upstream)
        wait_for(lambda: asking(other) == 4, "three more behind it")
        first.cancel()
        wait_for(lambda: asking(other) == 3 and waiting(other) == 1, "one of the three waits now")
        leader.gate.set()
        told = [future.result(30)[1] for future in crowd.futures if future is not first]
    assert len(set(told)) == 1
    assert (leader.calls, upstream.calls) == (1, 0)
    at_rest(server, one, other)


def test_c55_all_waiters_cancelled_leave_nothing(managers, server):
    one, other = managers.some(2)
    leader = Upstream(held=True)
    with Crowd("async", [one, other]) as crowd:
        crowd.ask(one, body(), leader)
        wait_for(lambda: leader.calls == 1, "the call")
        waiters = [crowd.ask(other, body(), leader) for _ in range(3)]
        wait_for(lambda: asking(other) == 3 and waiting(other) == 1, "all wait")
        for waiter in waiters:
            waiter.cancel()
        wait_for(lambda: len(other._flow.flights) == 0, "nobody waits")
        assert (peers(other)._waiting, peers(other)._claimed) == ({}, {})
        leader.gate.set()
        crowd.futures[0].result(30)
    assert leader.calls == 1
    at_rest(server, one, other)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_c54_a_call_that_asks_for_its_own_key_does_not_wait_for_itself(face, managers, server, elsewhere):
    one, other = managers.some(2)
    inner = Upstream()

    def call(request: object) -> object:
        return (other if elsewhere else one).fetch(body(), inner).json()

    async def acall(request: object) -> object:
        return (await (other if elsewhere else one).afetch(body(), inner.acall)).json()

    answer = one.fetch(body(), call) if face.name == "sync" else face.run(one.afetch(body(), acall))
    assert (text_of(answer), inner.calls) == ("answer 1", 1)
    at_rest(server, one, other)


def test_c54_single_flight_in_each_process(mode, managers):
    caches = managers.some(3, single_flight="process")
    upstream = Upstream(held=True)
    with Crowd(mode, caches) as crowd:
        for cache in caches * 3:
            crowd.ask(cache, body(), upstream)
        wait_for(lambda: sum(map(asking, caches)) == 9, "all ask")
        wait_for(lambda: upstream.calls == 3, "each process calls")
        upstream.gate.set()
        crowd.results()
    assert upstream.calls == 3


def test_c54_nobody_waits_who_is_told_to_wait_no_time(mode, managers, server):
    caches = managers.some(3, single_flight_wait=0)
    upstream = Upstream(held=True)
    with Crowd(mode, caches) as crowd:
        for cache in caches:
            crowd.ask(cache, body(), upstream)
        wait_for(lambda: upstream.calls == 3, "each process calls")
        upstream.gate.set()
        crowd.results()
    at_rest(server, *caches)


def test_c54_who_waited_long_enough_calls(mode, managers, server):
    one, other = managers.some(2, single_flight_wait=0.2)
    leader, upstream = Upstream(held=True), Upstream()
    with Crowd(mode, [one, other]) as crowd:
        crowd.ask(one, body(), leader)
        wait_for(lambda: leader.calls == 1, "the call")
        told = crowd.ask(other, body(), upstream).result(30)
        assert told[0] == "miss"
        leader.gate.set()
        crowd.results()
    assert (leader.calls, upstream.calls) == (1, 1)
    at_rest(server, one, other)


def test_c54_without_memory_in_front_all_the_same(mode, managers, server):
    caches = managers.some(3, memory_tier=False)
    upstream = Upstream(held=True)
    with Crowd(mode, caches) as crowd:
        for cache in caches * 3:
            crowd.ask(cache, body(), upstream)
        wait_for(lambda: sum(map(asking, caches)) == 9, "all ask")
        upstream.gate.set()
        assert len({text for _, text in crowd.results()}) == 1
    assert upstream.calls == 1
    at_rest(server, *caches)


def test_c54_where_messages_do_not_arrive_the_answer_does(mode):
    with own_server() as (server, managers):
        server.ask("ACL", "SETUSER", "mute", "on", ">secret", "~*", "+@all", "resetchannels")
        given = {"username": "mute", "password": "secret", "listening": False}
        caches = managers.some(3, **given)
        upstream = Upstream(held=True)
        with Crowd(mode, caches) as crowd:
            for cache in caches:
                crowd.ask(cache, body(), upstream)
            wait_for(lambda: sum(map(waiting, caches)) == 2, "the others wait")
            upstream.gate.set()
            assert len({text for _, text in crowd.results()}) == 1
        assert upstream.calls == 1
        at_rest(server, *caches)


def test_c54_an_entry_in_a_form_that_does_not_fit_takes_one_call(mode, managers, server):
    caches = managers.some(3)
    usage = body(stream=True, stream_options={"include_usage": True})
    list(caches[0].fetch(body(stream=True), lambda _: iter(STREAM)))
    upstream = Upstream(held=True)
    with_usage = [*STREAM[:-1], b'data: {"choices":[],"usage":{"total_tokens":3}}\n\n', STREAM[-1]]
    upstream.answer = lambda number: iter(with_usage)
    with Crowd(mode, caches) as crowd:
        for cache in caches * 3:
            crowd.ask(cache, usage, upstream)
        wait_for(lambda: sum(map(asking, caches)) == 9, "all ask")
        upstream.gate.set()
        told = crowd.results()
    assert {text for _, text in told} == {b"".join(with_usage)}
    assert upstream.calls == 1
    at_rest(server, *caches)


def test_c54_what_was_removed_meanwhile_is_not_stored_beside_the_answer(face, managers, server):
    one, other = managers.some(2)
    # Without usage, so no plain answer can be made of it.
    face.chunks(face.fetch(one, body(stream=True), lambda _: iter(chat_stream("removed"))))
    late(other, lambda: one.delete(key_of(one, body())))
    assert face.fetch(other, body(), lambda _: completion("new")).cache.status == "miss"
    stream = b"".join(face.chunks(face.fetch(one, body(stream=True), None)))
    assert (b"new" in stream, b"removed" in stream) == (True, False)
    at_rest(server, one, other)


def test_c55_a_lease_is_given_up_where_its_entry_cannot_be_judged(face, managers, server):
    one, other = managers.some(2)
    judge = other._flow.lookup.judge

    def broken(*args: object):
        other._flow.lookup.judge = judge
        raise ValueError("a header that cannot be read")

    other._flow.lookup.judge = broken
    late(other, lambda: one.set(body(), completion("stored")))
    with pytest.raises(ValueError, match="cannot be read"):
        face.fetch(other, body(), None)
    at_rest(server, one, other)


def test_c55_a_stream_that_is_collected_while_waits_are_counted_gives_its_lease_up(managers, server):
    cache = managers()
    held: list[object] = [iter(cache.fetch(body(stream=True), lambda _: iter(STREAM)))]
    assert next(held[0]) == STREAM[0]
    assert len(leases(server, cache)) == 1

    class Collecting(dict):
        def setdefault(self, *args: object) -> object:
            held.clear()
            return super().setdefault(*args)

    peers(cache)._waiting = Collecting()
    assert text_of(cache.fetch(body("other"), lambda _: completion("not held up"))) == "not held up"
    at_rest(server, cache)


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        ({"model": "m", "input": ["a", "b"]}, "embedding"),
        (body(cache={"no-cache": True}), "chat"),
        (body(cache={"no-store": True}), "chat"),
        (body(cache={"ttl": 0}), "chat"),
    ],
)
def test_c54_what_nobody_may_share_takes_no_lease(face, managers, server, request_, kind):
    cache = managers()
    held = []

    def call(request: object) -> object:
        held.append(leases(server, cache))
        if kind == "chat":
            return completion()
        data = [{"object": "embedding", "index": index, "embedding": [0.5]} for index in range(2)]
        return {"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 2}}

    assert face.fetch(cache, request_, call, kind=kind).cache.status == "miss"
    assert held == [[]]
    assert face.fetch(cache, body("other"), call).cache.status == "miss"
    assert len(held[1]) == 1


def test_c54_what_was_stored_between_the_look_and_the_claim_is_found(face, managers, server):
    one, other = managers.some(2)
    late(other, lambda: one.set(body(), completion("stored")))
    answer = face.fetch(other, body(), lambda _: pytest.fail("called"))
    assert (text_of(answer), answer.cache.status, answer.cache.tier) == ("stored", "hit", "redis")
    at_rest(server, one, other)


def test_c54_which_commands_hits_and_misses_take(face, managers, server):
    one, other = managers.some(2)
    face.fetch(one, body("first"), lambda _: completion())  # from here on the server knows the script
    at_rest(server, one)

    def miss() -> None:
        face.fetch(one, body(), lambda _: completion())
        at_rest(server, one)

    assert commands(server, miss) == {
        "get": 3,  # the look, the claim's, and that of the script that releases the lease
        "set": 2,
        "publish": 1,
        "evalsha": 1,
    }
    assert commands(server, lambda: face.fetch(other, body(), None)) == {"get": 1}
    assert commands(server, lambda: face.fetch(other, body(), None)) == {}
    assert commands(server, lambda: face.fetch(one, body(), None)) == {}


def commands(server: RedisServer, work: Callable[[], object]) -> dict[str, int]:
    """How often ``work`` called each command that reads or changes something."""
    before = counted(server)
    work()
    after = counted(server)
    changed = {name: calls - before.get(name, 0) for name, calls in after.items()}
    return {name: calls for name, calls in changed.items() if calls and name not in ("scan", "eval")}


def test_c58_the_next_request_is_a_hit_here_and_elsewhere(face, managers):
    one, other = managers.some(2)
    for number in range(50):
        request = body(str(number))
        assert face.fetch(one, request, lambda _: completion("first")).cache.status == "miss"
        assert face.fetch(other, request, None).cache.status == "hit"
        assert face.fetch(one, request, None).cache.status == "hit"


def test_c58_the_next_request_for_a_stream_is_a_hit_here_and_elsewhere(face, managers):
    one, other = managers.some(2)
    for number in range(30):
        request = body(str(number), stream=True)
        read = []
        answer = face.fetch(one, request, lambda _: iter(STREAM))
        if face.name == "sync":
            for piece in answer:
                read.append(piece)
                if b"[DONE]" in piece:
                    assert other.fetch(request, None).cache.status == "hit"
        else:
            read = face.chunks(answer)
        assert read == STREAM
        assert face.chunks(face.fetch(other, request, None)) == STREAM


# --- nothing is left behind


def test_c54_two_thousand_requests_leave_nothing(managers, server):
    caches = managers.some(3)
    upstream = Upstream()
    upstream.answer = lambda number: (
        completion("x") if number % 5 else completion("x", choices=[{"finish_reason": "content_filter"}])
    )
    with Crowd("mixed", caches) as crowd:
        for number in range(100):
            crowd.ask(caches[number % 3], body(f"warm {number % 7}"), upstream)
        crowd.results()
        before = {thread.name.rstrip("0123456789_") for thread in threading.enumerate()}
        running = len([t for t in threading.enumerate() if t.name.startswith("llm-middleware")])
        for number in range(1900):
            request = body(f"{number % 190}")
            if number % 10 == 3:
                request["cache"] = {"no-cache": True}
            crowd.ask(caches[number % 3], request, upstream)
            if number % 97 == 0:
                caches[number % 3].invalidate(model="m")
        assert len(crowd.results()) == 2000
        after = {thread.name.rstrip("0123456789_") for thread in threading.enumerate()}
        assert after <= before | {"asyncio"}
        assert len([t for t in threading.enumerate() if t.name.startswith("llm-middleware")]) == running
    at_rest(server, *caches)
