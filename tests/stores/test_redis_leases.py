"""Leases in Redis: who gets one, how long it lives, what its end tells, and what failures leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis.crc import key_slot

from llm_middleware.errors import ConfigError, CorruptEntryError, StoreError
from llm_middleware.stores.redis import RedisStore
from llm_middleware.stores.redis_connect import RedisConnection
from llm_middleware.stores.redis_leases import RedisLeases, lease_name
from tests.services import (
    FACES,
    HOST,
    FaultProxy,
    RedisCluster,
    RedisServer,
    SyncFace,
    redis_cluster,
    redis_sentinel,
    redis_server,
    wait_for,
)

ROOT = Path(__file__).parents[2]
AMPLE = 10.0  # seconds: a budget that no test uses up
ENDLESS = 3600.0  # seconds: who waits for this is ended by the test's own limit
CHANNEL = "llm:leases"
THREAD = "llm-middleware-redis-leases"


def key(number: int, namespace: str = "llm") -> str:
    return f"{namespace}:{number:064x}"


def lease(number: int, form: str = "chat") -> str:
    return lease_name(key(number), form)


Make = Callable[..., RedisLeases]


@pytest.fixture
def make() -> Iterator[Make]:
    """``make(settings, seconds, budget)``: leases that live for ever unless told, closed after the test."""
    with contextlib.ExitStack() as stack:

        def one(
            settings: dict[str, object],
            seconds: float = ENDLESS,
            budget: float = AMPLE,
            channel: str = CHANNEL,
        ) -> RedisLeases:
            connection = RedisConnection.from_settings(settings, {}, budget=budget)
            stack.callback(connection.close)
            leases = RedisLeases(connection, seconds=seconds, channel=channel)
            stack.callback(leases.close)
            return leases

        yield one


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Iterator[SyncFace]:
    made = FACES[request.param]()
    yield made
    made.close()


@pytest.fixture
def settings(server: RedisServer) -> dict[str, object]:
    return {"host": HOST, "port": server.port}


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[FaultProxy]:
    with FaultProxy(server.port) as made:
        yield made


class Place:
    """A Redis of any topology: how to connect, and what is there."""

    def __init__(self, servers: list[RedisServer], settings: dict[str, object]) -> None:
        self.servers = servers
        self.settings = settings
        for one in servers:
            one.ask("FLUSHALL")
            one.ask("SCRIPT", "FLUSH")
            one.ask("CONFIG", "RESETSTAT")

    def at(self, name: str) -> RedisServer:
        """The server that has ``name``."""
        return self.servers[min(len(self.servers) - 1, key_slot(name.encode()) * len(self.servers) // 16384)]

    def ask(self, command: str, name: str, *args: object) -> object:
        return self.at(name).ask(command, name, *args)

    def calls(self, command: str) -> int:
        return sum(one.calls().get(command, 0) for one in self.servers)


@pytest.fixture(params=["standalone", "cluster", "sentinel"])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "standalone":
        server = request.getfixturevalue("shared")
        return Place([server], {"host": HOST, "port": server.port})
    if request.param == "cluster":
        cluster = request.getfixturevalue("cluster")
        return Place(cluster.servers, {"redis_startup_nodes": cluster.nodes})
    made = request.getfixturevalue("sentinels")
    return Place([made.master], {"sentinel_nodes": made.nodes, "service_name": made.service})


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def gone(place: Place | RedisServer, name: str) -> None:
    wait_for(lambda: place.ask("EXISTS", name) == 0, f"{name} is gone")


def extended(place: Place | RedisServer, name: str) -> None:
    """A heartbeat comes: what was made to live for ever has an end again."""
    assert place.ask("PERSIST", name) == 1
    wait_for(lambda: place.ask("PTTL", name) > 0, f"{name} is extended")


class TestNames:
    def test_a_lease_lies_in_the_slot_of_its_key(self) -> None:
        assert lease_name("llm:ab", "chat") == "{llm:ab}:lease:chat"
        assert {key_slot(lease(n).encode()) == key_slot(key(n).encode()) for n in range(100)} == {True}

    def test_a_flush_leaves_leases(self, face: SyncFace, place: Place, make: Make) -> None:
        leases = make(place.settings)
        store = RedisStore(leases._connection)
        face.do(store, "set", key(1), b"value", None)
        token, _ = face.do(leases, "claim", key(1), lease(1))
        assert face.do(store, "flush", "llm") == 1
        assert place.ask("GET", lease(1)) == token.encode()
        assert place.ask("EXISTS", key(1)) == 0

    @pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan])
    def test_seconds(self, make: Make, seconds: float) -> None:
        with pytest.raises(ConfigError, match="seconds: expected a number > 0"):
            make({}, seconds)


class TestClaims:
    def test_one_has_it_until_it_is_released(self, face: SyncFace, place: Place, make: Make) -> None:
        ours, theirs = make(place.settings), make(place.settings)
        token, value = face.do(ours, "claim", key(1), lease(1))
        assert (len(bytes.fromhex(token)), value) == (16, None)
        assert place.ask("GET", lease(1)) == token.encode()
        assert face.do(theirs, "claim", key(1), lease(1)) == (None, None)
        assert face.do(ours, "claim", key(1), lease(1)) == (None, None)
        assert (ours.held, theirs.held) == (1, 0)
        assert face.do(theirs, "claim", key(1), lease(1, "image"))[0] is not None
        ours.release(lease(1), token)
        assert ours.held == 0
        gone(place, lease(1))
        again, value = face.do(theirs, "claim", key(1), lease(1))
        assert (len(again), value, theirs.held) == (32, None, 2)
        assert again != token

    def test_who_has_it_or_not_learns_the_value(self, face: SyncFace, place: Place, make: Make) -> None:
        ours, theirs = make(place.settings), make(place.settings)
        place.ask("SET", key(1), b"\x00value\xff")
        token, value = face.do(ours, "claim", key(1), lease(1))
        assert token is not None
        assert value == b"\x00value\xff"
        assert face.do(theirs, "claim", key(1), lease(1)) == (None, b"\x00value\xff")

    def test_its_time_to_live(self, face: SyncFace, server: RedisServer, make: Make) -> None:
        leases = make({"host": HOST, "port": server.port}, 1000.0004)
        face.do(leases, "claim", key(1), lease(1))
        with server.client() as client:
            until = client.execute_command("PEXPIRETIME", lease(1))
            now = client.execute_command("TIME")
        assert 0 <= 1_000_001 - (until - now[0] * 1000 - now[1] / 1000) < 30_000

    def test_two_commands_in_this_order(self, face: SyncFace, server: RedisServer, make: Make) -> None:
        leases = make({"host": HOST, "port": server.port}, 60)
        seen = []
        with server.client() as client, client.monitor() as monitor:
            token, _ = face.do(leases, "claim", key(1), lease(1))
            while len(seen) < 2:
                command = monitor.next_command()["command"]
                if command.startswith(("SET", "GET", "EXISTS", "EVAL")):
                    seen.append(command)
        assert seen == [f"SET {lease(1)} {token} NX PX 60000", f"GET {key(1)}"]

    def test_one_round_trip(self, face: SyncFace, server: RedisServer, make: Make) -> None:
        leases = make({"host": HOST, "port": server.port})
        face.do(leases, "claim", key(0), lease(0))  # connects
        with server.client() as client:
            before, calls = client.info("stats")["total_reads_processed"], server.calls()
            reads = client.info("stats")["total_reads_processed"] - before  # what it costs to look
            before = client.info("stats")["total_reads_processed"]
            face.do(leases, "claim", key(1), lease(1))
            after = client.info("stats")["total_reads_processed"]
        assert reads > 1  # `calls` connected
        assert after - before == 2  # the claim, and the last look
        now = server.calls()
        assert {name: now[name] - calls[name] for name in ("set", "get")} == {"set": 1, "get": 1}
        assert set(now) <= {"set", "get", "info", "hello", "script|flush", "config|resetstat"}

    def test_two_commands_in_a_cluster(self, face: SyncFace, cluster: RedisCluster, make: Make) -> None:
        place = Place(cluster.servers, {"redis_startup_nodes": cluster.nodes})
        leases = make(place.settings)
        for number in range(10):
            assert face.do(leases, "claim", key(number), lease(number))[0] is not None
        assert (place.calls("set"), place.calls("get"), leases.held) == (10, 10, 10)

    @pytest.mark.parametrize(
        ("namespace", "apart"), [("{a}b", True), ("a{b}c", True), ("a}b", True), ("{", False), ("a{b", False)]
    )
    def test_keys_with_braces(
        self, face: SyncFace, cluster: RedisCluster, make: Make, namespace: str, apart: bool
    ) -> None:
        """In a slot of their own: a value that was stored before the lease was free is seen all the same."""
        place = Place(cluster.servers, {"redis_startup_nodes": cluster.nodes})
        leases = make(place.settings)
        name = key(1, namespace)
        held = lease_name(name, "chat")
        assert (key_slot(name.encode()) != key_slot(held.encode())) is apart
        token, value = face.do(leases, "claim", name, held)
        assert value is None
        assert place.calls("get") == 1 + apart  # once more when the lease is ours
        assert place.ask("GET", held) == token.encode()
        place.ask("SET", name, b"value")
        assert face.do(leases, "claim", name, held) == (None, b"value")
        assert place.calls("get") == 3 + apart
        leases.release(held, token)
        gone(place, held)

    def test_among_threads(self, server: RedisServer, make: Make) -> None:
        leases = make({"host": HOST, "port": server.port})
        barrier = threading.Barrier(8)

        def claim(_: int) -> list[str | None]:
            barrier.wait()
            return [leases.claim(key(n), lease(n))[0] for n in range(25)]

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(claim, range(8)))
        for number in range(25):
            tokens = [row[number] for row in won if row[number] is not None]
            assert [server.ask("GET", lease(number))] == [token.encode() for token in tokens]
        assert leases.held == 25

    def test_among_processes(self, place: Place) -> None:
        script = """
            input()
            won = [n for n in range(40) if leases.claim(key(n), lease_name(key(n), "chat"))[0]]
            print(json.dumps(won), flush=True)
        """
        with contextlib.ExitStack() as stack:
            running = [stack.enter_context(child(script, place.settings, ENDLESS)) for _ in range(4)]
            for one in running:
                assert one.stdout.readline() == "ready\n"
            for one in running:
                one.stdin.write("\n")
                one.stdin.flush()
            won = [json.loads(one.stdout.readline()) for one in running]
        assert sorted(number for numbers in won for number in numbers) == list(range(40))


PRELUDE = """
import asyncio, json, os, sys, threading
from llm_middleware.stores.redis_connect import RedisConnection
from llm_middleware.stores.redis_leases import RedisLeases, lease_name

def key(number):
    return f"llm:{number:064x}"

connection = RedisConnection.from_settings(json.loads(sys.argv[1]), {}, budget=10)
leases = RedisLeases(connection, seconds=float(sys.argv[2]), channel="llm:leases")
print("ready", flush=True)
"""


@contextlib.contextmanager
def child(
    script: str, settings: dict[str, object], seconds: float, before: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """A process that runs ``script`` after `PRELUDE`."""
    lines = [line.removeprefix(" " * 12) for line in script.splitlines()]
    code = before + PRELUDE + "\n".join(lines)
    popen = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(settings), str(seconds)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with popen:
        try:
            yield popen
        finally:
            popen.kill()


class TestHeartbeats:
    def test_a_lease_outlives_its_time(self, face: SyncFace, place: Place, make: Make) -> None:
        leases = make(place.settings, 1.2)
        token, _ = face.do(leases, "claim", key(1), lease(1))
        wait_for(lambda: place.calls("evalsha") >= 4, "heartbeats, for longer than the lease's time")
        assert place.ask("GET", lease(1)) == token.encode()
        assert leases.held == 1

    def test_each_gives_it_its_whole_time(self, place: Place, make: Make) -> None:
        leases = make(place.settings, 1.2)
        token, _ = leases.claim(key(1), lease(1))
        for _ in range(2):
            place.ask("PEXPIRE", lease(1), 10_000_000)
            wait_for(lambda: 0 < place.ask("PTTL", lease(1)) <= 1200, "the lease has its own time again")
        assert place.ask("GET", lease(1)) == token.encode()

    def test_whoever_holds_what_was_set_elsewhere(self, server: RedisServer, make: Make) -> None:
        leases = make({"host": HOST, "port": server.port}, 1.2)
        server.ask("SET", lease(1), "token")
        leases.hold(lease(1), "token")
        wait_for(lambda: server.ask("PTTL", lease(1)) > 0, "the lease is extended")
        assert leases.held == 1

    def test_a_hundred_are_one_pipeline(self, server: RedisServer, make: Make) -> None:
        leases = make({"host": HOST, "port": server.port}, 3)
        for number in range(100):
            server.ask("SET", lease(number), "token")
        with server.client() as client:
            before, looks = client.info("everything")["total_reads_processed"], 0
            for number in range(100):
                leases.hold(lease(number), "token")

            def beaten() -> dict[str, object] | None:
                nonlocal looks
                looks += 1
                info = client.info("everything")
                return info if info.get("cmdstat_evalsha", {}).get("calls", 0) >= 300 else None

            info = wait_for(beaten, "three heartbeats")
        reads = info["total_reads_processed"] - before - looks
        assert 0 < reads * 5 < info["cmdstat_evalsha"]["calls"]
        assert leases.held == 100
        assert {server.ask("PTTL", lease(n)) > 0 for n in range(100)} == {True}

    def test_in_a_cluster_by_node(self, cluster: RedisCluster, make: Make) -> None:
        """Without a question of where the keys of a script lie."""
        place = Place(cluster.servers, {"redis_startup_nodes": cluster.nodes})
        leases = make(place.settings, 3)
        for number in range(30):
            place.ask("SET", lease(number), "token")
            leases.hold(lease(number), "token")
        assert len({place.at(lease(n)).port for n in range(30)}) == 3
        for number in range(30):
            wait_for(lambda n=number: place.ask("PTTL", lease(n)) > 0, "every lease is extended")
        assert place.calls("command|getkeys") == 0
        assert leases.held == 30

    def test_slots_that_moved(self, cluster: RedisCluster, make: Make) -> None:
        place = Place(cluster.servers, {"redis_startup_nodes": cluster.nodes})
        leases = make(place.settings, 1.2)
        number = next(n for n in range(1000) if key_slot(key(n).encode()) < 5000)
        slot = key_slot(key(number).encode())
        token, _ = leases.claim(key(number), lease(number))
        source, target, other = cluster.servers
        ids = {server.port: server.ask("CLUSTER", "MYID") for server in cluster.servers}
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
        source.ask("MIGRATE", HOST, target.port, lease(number), 0, 5000)
        for server in (target, source, other):
            server.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[target.port])
        try:
            extended(target, lease(number))
            assert target.ask("GET", lease(number)) == token.encode()
            leases.release(lease(number), token)
            gone(target, lease(number))
        finally:
            for server in (source, target, other):
                server.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[source.port])

    def test_a_lease_that_another_has_is_dropped(
        self, place: Place, make: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "llm_middleware")
        leases = make(place.settings, 1.2)
        leases.claim(key(1), lease(1))
        leases.claim(key(2), lease(2))
        kept, _ = leases.claim(key(3), lease(3))
        place.ask("SET", lease(1), "theirs")
        place.ask("DEL", lease(2))
        wait_for(lambda: leases.held == 1, "two leases are seen to be lost")
        extended(place, lease(3))
        assert place.ask("GET", lease(1)) == b"theirs"
        assert place.ask("PTTL", lease(1)) == -1
        assert place.ask("EXISTS", lease(2)) == 0
        assert place.ask("GET", lease(3)) == kept.encode()
        lost = {f"redis lease lost: {lease(1)}", f"redis lease lost: {lease(2)}"}
        assert {record.message for record in caplog.records} == lost
        assert {record.levelname for record in caplog.records} == {"DEBUG"}

    def test_a_server_that_forgot_the_scripts(self, place: Place, make: Make) -> None:
        leases = make(place.settings, 1.2)
        token, _ = leases.claim(key(1), lease(1))
        extended(place, lease(1))
        assert place.calls("eval") == 1
        place.at(lease(1)).ask("SCRIPT", "FLUSH")
        extended(place, lease(1))
        assert place.calls("eval") == 2
        leases.release(lease(1), token)
        gone(place, lease(1))
        assert place.calls("eval") == 3

    def test_a_killed_process_loses_its_leases(self, place: Place, make: Make) -> None:
        script = """
            print(leases.claim(key(1), lease_name(key(1), "chat"))[0], flush=True)
            input()
        """
        leases = make(place.settings, 1.2)
        with child(script, place.settings, 1.2) as holder:
            assert holder.stdout.readline() == "ready\n"
            token = holder.stdout.readline().strip()
            wait_for(lambda: place.calls("evalsha") >= 4, "heartbeats, for longer than the lease's time")
            assert leases.claim(key(1), lease(1)) == (None, None)
            assert place.ask("GET", lease(1)) == token.encode()
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            got = wait_for(lambda: leases.claim(key(1), lease(1))[0], "another gets the lease")
        assert place.ask("GET", lease(1)) == got.encode()

    def test_with_nothing_held_the_thread_sleeps(self, server: RedisServer, make: Make) -> None:
        """It does not run at all while that of others, as fast, goes on."""
        idle = make({"host": HOST, "port": server.port}, 0.9)
        token, _ = idle.claim(key(1), lease(1))
        (thread,) = threads()
        idle.release(lease(1), token)
        gone(server, lease(1))
        busy = make({"host": HOST, "port": server.port}, 0.9)
        busy.claim(key(2), lease(2))
        extended(server, lease(2))
        before = switches(thread)
        for _ in range(5):
            extended(server, lease(2))
        assert switches(thread) == before
        again, _ = idle.claim(key(1), lease(1))
        extended(server, lease(1))
        assert server.ask("GET", lease(1)) == again.encode()

    def test_a_blocked_event_loop_keeps_its_leases(self, server: RedisServer, make: Make) -> None:
        leases = make({"host": HOST, "port": server.port}, 1.2)

        async def handler() -> None:
            await leases.aclaim(key(1), lease(1))
            extended(server, lease(1))  # waits without an await

        asyncio.run(handler())


def switches(thread: threading.Thread) -> list[str]:
    """How often the system has put ``thread`` on a processor, or taken it off."""
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text().splitlines()
    return [line for line in status if "ctxt_switches" in line]


class TestReleases:
    @pytest.fixture
    def heard(self, place: Place) -> Iterator[Callable[[int], list[bytes]]]:
        """``heard(n)``: the first ``n`` messages on the channel; in a Cluster as any node passes them on."""
        with place.servers[-1].client() as client, client.pubsub() as subscription:
            subscription.subscribe(CHANNEL)
            wait_for(lambda: subscription.get_message(timeout=1), "the subscription")
            messages: list[bytes] = []

            def hear(count: int) -> list[bytes]:
                while len(messages) < count:
                    messages.append(
                        wait_for(lambda: subscription.get_message(timeout=1), f"message {len(messages)}")[
                            "data"
                        ]
                    )
                return messages

            yield hear

    def test_each_is_told_once_and_only_if_it_was_ours(
        self, place: Place, make: Make, heard: Callable[[int], list[bytes]]
    ) -> None:
        leases = make(place.settings)
        forms = [lease(1, form) for form in "abcde"]  # of one slot, so told in order
        tokens = [leases.claim(key(1), form)[0] for form in forms]
        place.ask("SET", forms[1], "theirs")
        leases.release(forms[0], tokens[0], b"\x00first\xff")
        leases.release(forms[0], tokens[0], b"again")
        leases.release(forms[1], tokens[1], b"stolen")
        leases.release(forms[2], tokens[2])
        leases.release(forms[3], "unknown", b"unknown")
        leases.release(forms[3], tokens[3], b"")
        leases.release(forms[4], tokens[4], b"last")
        assert heard(3) == [b"\x00first\xff", b"", b"last"]
        assert [place.ask("GET", form) for form in forms] == [None, b"theirs", None, None, None]
        assert leases.held == 0

    def test_what_another_process_holds_stays(self, place: Place, make: Make) -> None:
        ours, theirs = make(place.settings), make(place.settings)
        token, _ = theirs.claim(key(1), lease(1))
        fence, _ = ours.claim(key(1), lease(1, "fence"))
        ours.release(lease(1), token)
        ours.release(lease(1, "fence"), fence)
        gone(place, lease(1, "fence"))
        assert place.ask("GET", lease(1)) == token.encode()
        assert (ours.held, theirs.held) == (0, 1)

    def test_many_at_once(self, place: Place, make: Make, heard: Callable[[int], list[bytes]]) -> None:
        leases = make(place.settings)
        tokens = [leases.claim(key(n), lease(n))[0] for n in range(200)]
        for number, token in enumerate(tokens):
            leases.release(lease(number), token, b"%d" % number)
        assert sorted(map(int, heard(200))) == list(range(200))
        assert [one.ask("DBSIZE") for one in place.servers] == [0] * len(place.servers)


class TestFailures:
    def test_refused(self, face: SyncFace, proxy: FaultProxy, server: RedisServer, make: Make) -> None:
        leases = make({"host": HOST, "port": proxy.port}, budget=AMPLE)
        proxy.refuse()
        with pytest.raises(StoreError):
            face.do(leases, "claim", key(1), lease(1))
        assert leases.held == 0
        proxy.accept()
        token, _ = face.do(leases, "claim", key(1), lease(1))
        assert server.ask("GET", lease(1)) == token.encode()

    def test_a_claim_that_fails_leaves_no_lease(self, face: SyncFace, place: Place, make: Make) -> None:
        """The lease was granted, and then what lies under the key was no answer."""
        leases = make(place.settings)
        place.ask("HSET", key(1), "field", "value")
        with pytest.raises(CorruptEntryError):
            face.do(leases, "claim", key(1), lease(1))
        assert place.calls("set") == 1
        gone(place, lease(1))
        assert leases.held == 0

    def test_a_caller_that_is_cancelled_leaves_no_lease(
        self, server: RedisServer, proxy: FaultProxy, make: Make
    ) -> None:
        leases = make({"host": HOST, "port": proxy.port})

        async def handler() -> None:
            await leases.aclaim(key(0), lease(0))
            proxy.rate = 0.01  # bytes per second: the answer does not come
            task = asyncio.ensure_future(leases.aclaim(key(1), lease(1)))
            await asyncio.to_thread(wait_for, lambda: server.ask("EXISTS", lease(1)), "the lease is granted")
            proxy.heal()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(handler())
        gone(server, lease(1))
        assert leases.held == 1
        assert server.ask("EXISTS", lease(0)) == 1

    def test_a_cancellation_that_comes_with_the_answer(self, server: RedisServer, make: Make) -> None:
        """At whatever step of the loop it comes: who was cancelled holds nothing, who was not does."""
        leases = make({"host": HOST, "port": server.port})

        async def handler(steps: int) -> str | None:
            task = asyncio.ensure_future(leases.aclaim(key(steps), lease(steps)))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            try:
                return (await task)[0]
            except asyncio.CancelledError:
                return None

        async def every() -> dict[int, str | None]:
            await leases.aclaim(key(1000), lease(1000))
            return {steps: await handler(steps) for steps in range(200)}

        tokens = asyncio.run(every())
        got = {number: token for number, token in tokens.items() if token is not None}
        assert 0 < len(got) < 200
        assert leases.held == len(got) + 1
        fence, _ = leases.claim(key(1001), lease(1001))
        leases.release(lease(1001), fence)
        gone(server, lease(1001))
        for number, token in tokens.items():
            if token is None:
                gone(server, lease(number))
            else:
                assert server.ask("GET", lease(number)) == token.encode()

    def test_a_release_does_not_wait(self, server: RedisServer, make: Make) -> None:
        leases = make({"host": HOST, "port": server.port}, budget=ENDLESS)
        one, _ = leases.claim(key(1), lease(1))
        two, _ = leases.claim(key(2), lease(2))
        server.pause()
        try:
            leases.release(lease(1), one)
            leases.release(lease(2), two)
            assert leases.held == 0
        finally:
            server.resume()
        gone(server, lease(1))
        gone(server, lease(2))

    def test_a_server_that_hung(
        self, server: RedisServer, make: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What was released meanwhile ends by itself at the latest; what is held lives on."""
        caplog.set_level(logging.DEBUG, "llm_middleware")
        leases = make({"host": HOST, "port": server.port}, 1.2, budget=0.1)
        patient = make({"host": HOST, "port": server.port})
        given_up = wait_for(lambda: claimed(leases, 1), "a lease")
        token = wait_for(lambda: claimed(leases, 2), "another")
        server.ask("PERSIST", lease(2))
        server.pause()
        try:
            leases.release(lease(1), given_up)
            with pytest.raises(StoreError):
                leases.claim(key(3), lease(3))
            wait_for(lambda: len(caplog.records) >= 4, "heartbeats and releases that fail")
            assert leases.held == 1
            server.resume()
        finally:
            server.resume()
        wait_for(lambda: server.ask("PTTL", lease(2)) > 0, "the lease that is held is extended")
        assert server.ask("GET", lease(2)) == token.encode()
        for number in (1, 3):
            wait_for(lambda n=number: claimed(patient, n), "a lease that is not held is free")
        assert leases.held == 1

    def test_a_release_is_tried_once(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "llm_middleware")
        with redis_server() as server:
            leases = make({"host": HOST, "port": server.port})
            token, _ = leases.claim(key(1), lease(1))
            server.kill()
            leases.release(lease(1), token)
            wait_for(lambda: [r for r in caplog.records if str(server.port) in r.message], "it fails")
            server.restart()
            server.ask("SET", lease(1), token)
            fence, _ = leases.claim(key(2), lease(2))
            leases.release(lease(2), fence)
            gone(server, lease(2))
            assert server.ask("GET", lease(1)) == token.encode()
            assert (server.calls()["evalsha"], server.calls()["eval"]) == (1, 1)

    def test_a_restarted_server_has_no_leases(self, make: Make) -> None:
        with redis_server() as server:
            leases = make({"host": HOST, "port": server.port}, 1.2)
            leases.claim(key(1), lease(1))
            server.kill()
            server.restart()
            wait_for(lambda: leases.held == 0, "the lease is seen to be lost")
            assert server.ask("EXISTS", lease(1)) == 0

    def test_a_node_that_hangs_costs_the_others_nothing(self, make: Make) -> None:
        with redis_cluster(3, "--cluster-require-full-coverage", "no") as made:
            place = Place(made.servers, {"redis_startup_nodes": made.nodes})
            leases = make(place.settings, 1.2, budget=0.2)
            numbers = [next(n for n in range(9999) if place.at(lease(n)) is one) for one in place.servers]
            for number in numbers:
                wait_for(lambda n=number: claimed(leases, n), "a lease")
            extended(place, lease(numbers[1]))
            place.ask("PERSIST", lease(numbers[1]))
            made.servers[1].pause()
            try:
                for _ in range(3):
                    extended(place, lease(numbers[0]))
                    extended(place, lease(numbers[2]))
            finally:
                made.servers[1].resume()
            wait_for(lambda: place.ask("PTTL", lease(numbers[1])) > 0, "the third is extended again")
            assert leases.held == 3

    def test_the_leases_follow_the_sentinels(self, make: Make) -> None:
        with redis_sentinel() as made:
            leases = make({"sentinel_nodes": made.nodes, "service_name": made.service}, 3, budget=1.0)
            made.master.ask("SET", lease(1), "token")
            assert wait_for(lambda: claimed(leases, 2), "a lease on the old master") is not None
            wait_for(lambda: made.replica.ask("DBSIZE") == 2, "the replica has both")
            made.master.kill()
            leases.hold(lease(1), "token")
            wait_for(lambda: made.replica.ask("PTTL", lease(1)) > 0, "the new master extends the lease")
            leases.release(lease(1), "token")
            gone(made.replica, lease(1))
            assert wait_for(lambda: claimed(leases, 3), "a lease on the new master") is not None


def claimed(leases: RedisLeases, number: int) -> str | None:
    try:
        return leases.claim(key(number), lease(number))[0]
    except StoreError:
        return None


class TestForks:
    def test_a_child_has_no_leases_and_a_thread_of_its_own(self, place: Place) -> None:
        script = """
            mine, one, two, three = key(1), *(lease_name(key(1), form) for form in ("one", "two", "three"))
            other, _ = leases.claim(mine, three)
            token, _ = leases.claim(mine, one)
            beating = [thread.name for thread in threading.enumerate()]
            pid = os.fork()
            if pid == 0:
                before = leases.held, [thread.name for thread in threading.enumerate()]
                leases.release(one, token, b"message")
                leases.close()
                refused, _ = leases.claim(mine, one)
                own, _ = leases.claim(mine, two)
                after = leases.held, [thread.name for thread in threading.enumerate()]
                print(json.dumps([before, refused, after]), flush=True)
                input()
                leases.close()
                connection.close()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            leases.release(three, other)
            print(json.dumps([leases.held, beating]), flush=True)
            input()
            leases.close()
            connection.close()
        """
        names = [lease(1, form) for form in ("one", "two", "three")]
        warned = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n"
        with child(script, place.settings, 1.2, warned) as parent:
            assert parent.stdout.readline() == "ready\n"
            before, refused, after = json.loads(parent.stdout.readline())
            assert before == [0, ["MainThread"]]
            assert refused is None
            assert after == [1, ["MainThread", THREAD]]
            for name in names:
                extended(place, name)
            parent.stdin.write("\n")
            parent.stdin.flush()
            assert json.loads(parent.stdout.readline()) == [1, ["MainThread", THREAD]]
            gone(place, names[1])
            gone(place, names[2])
            extended(place, names[0])
            parent.stdin.write("\n")
            parent.stdin.flush()
            assert parent.wait() == 0
            assert parent.stderr.read() == ""
        assert place.ask("EXISTS", names[0]) == 0


class TestEnds:
    def test_close_releases_what_is_held(self, place: Place, make: Make) -> None:
        leases = make(place.settings)
        tokens = [leases.claim(key(n), lease(n))[0] for n in range(20)]
        (thread,) = threads()
        place.ask("SET", lease(7), "theirs")
        leases.close()
        thread.join()
        assert [place.ask("GET", lease(n)) for n in range(20)] == [None] * 7 + [b"theirs"] + [None] * 12
        assert (leases.held, threads()) == (0, [])
        leases.close()
        again, _ = leases.claim(key(1), lease(1))
        assert again not in [None, *tokens]
        assert (leases.held, len(threads())) == (1, 1)
        leases.release(lease(1), again)
        gone(place, lease(1))

    def test_before_the_first_claim_there_is_nothing(self, server: RedisServer, make: Make) -> None:
        leases = make({"host": HOST, "port": server.port})
        leases.release(lease(1), "token", b"message")
        assert leases.held == 0
        leases.close()
        assert threads() == []
        leases.claim(key(1), lease(1))
        make({"host": HOST, "port": server.port}).claim(key(1), lease(1))
        assert len(threads()) == 1  # none for who holds nothing

    def test_close_does_not_wait_for_a_server_that_hangs(self, server: RedisServer, make: Make) -> None:
        leases = make({"host": HOST, "port": server.port}, budget=ENDLESS)
        leases.claim(key(1), lease(1))
        server.pause()
        try:
            leases.close()
        finally:
            server.resume()
        gone(server, lease(1))
        wait_for(lambda: threads() == [], "the thread ends")

    def test_what_is_held_while_the_thread_ends(self, server: RedisServer, make: Make) -> None:
        """It is told to end, and has yet to: the lease is extended all the same."""
        leases = make({"host": HOST, "port": server.port}, 1.2, budget=ENDLESS)
        leases.claim(key(1), lease(1))
        server.ask("SET", lease(2), "token")
        server.pause()
        try:
            leases.close()
            leases.hold(lease(2), "token")
            assert len(threads()) == 1
        finally:
            server.resume()
        wait_for(lambda: server.ask("PTTL", lease(2)) > 0, "the lease is extended")
        gone(server, lease(1))
        assert leases.held == 1

    def test_close_among_claims(self, server: RedisServer, make: Make) -> None:
        leases = make({"host": HOST, "port": server.port})
        done = threading.Event()

        def close() -> None:
            while not done.is_set():
                leases.close()

        closer = threading.Thread(target=close)
        closer.start()
        for number in range(300):
            assert leases.claim(key(number), lease(number))[0] is not None
        done.set()
        closer.join()
        leases.close()
        wait_for(lambda: server.ask("DBSIZE") == 0, "all are released")
        wait_for(lambda: threads() == [], "the thread ends")

    def test_a_process_that_ends_is_silent(self, server: RedisServer, settings: dict[str, object]) -> None:
        script = """
            leases.claim(key(1), lease_name(key(1), "chat"))
            print(leases.held, flush=True)
        """
        with child(script, settings, 0.3) as ending:
            out, err = ending.communicate()
        assert (out, err, ending.returncode) == ("ready\n1\n", "", 0)
        gone(server, lease(1))

    def test_under_gevent(self, server: RedisServer, settings: dict[str, object], make: Make) -> None:
        script = """
            token, _ = leases.claim(key(1), lease_name(key(1), "chat"))
            print(token, flush=True)
            gevent.get_hub().threadpool.spawn(input).get()
            leases.release(lease_name(key(1), "chat"), token)
            leases.close()
            print(leases.held, flush=True)
        """
        before = "import gevent, gevent.monkey; gevent.monkey.patch_all()\n"
        with child(script, settings, 1.2, before) as patched:
            assert patched.stdout.readline() == "ready\n"
            token = patched.stdout.readline().strip()
            extended(server, lease(1))
            assert server.ask("GET", lease(1)) == token.encode()
            out, err = patched.communicate("\n")
        assert (out, err, patched.returncode) == ("0\n", "", 0)
        assert server.ask("EXISTS", lease(1)) == 0
