"""The ear on a Redis channel: what it hears on every topology, how deafness is noticed, forks and exits."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis._parsers import _HiredisParser, _RESP2Parser, _RESP3Parser

from llm_middleware.stores.redis import RedisStore
from llm_middleware.stores.redis_channel import RedisChannel, _Ear, _is_refusal, _Line
from llm_middleware.stores.redis_connect import RedisConnection
from tests.services import (
    HOST,
    FaultProxy,
    RedisServer,
    free_port,
    redis_cluster,
    redis_sentinel,
    redis_server,
    redis_tls,
    wait_for,
)

AMPLE = 20.0  # seconds: a heartbeat in which no healthy server is taken for dead
QUICK = 0.6  # seconds: a heartbeat for deaths that only silence tells
NAME = "llm:~changes"
THREAD = "llm-middleware-redis-channel"


class Heard:
    """A channel and what it told."""

    def __init__(self, settings: dict[str, object], *, heartbeat: float = AMPLE, **options: object) -> None:
        self.messages: list[bytes] = []
        self.gaps = 0
        self.connection = RedisConnection.from_settings(settings, {}, **{"budget": 10.0, **options})
        self.channel = RedisChannel(
            self.connection, NAME, told=self.messages.append, gap=self._gap, heartbeat=heartbeat
        )

    def __enter__(self) -> Heard:
        return self

    def __exit__(self, *exc: object) -> None:
        self.channel.close()

    def _gap(self) -> None:
        assert not self.channel.live
        self.gaps += 1

    def live(self) -> None:
        self.channel.listen()
        wait_for(lambda: self.channel.live, "the channel is live")

    def hears(self, server: RedisServer, message: bytes) -> None:
        """What is published at ``server`` arrives, after what was heard so far and once."""
        before = list(self.messages)
        server.ask("PUBLISH", NAME, message)
        wait_for(lambda: len(self.messages) > len(before), f"{message!r} arrives")
        assert self.messages == [*before, message]


@contextlib.contextmanager
def listening(settings: dict[str, object], **options: object) -> Iterator[Heard]:
    with Heard(settings, **options) as heard:
        heard.live()
        yield heard


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    wait_for(lambda: subscribers(shared) == 0, "nobody listens from before")
    shared.ask("CONFIG", "RESETSTAT")
    return shared


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "llm_middleware")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "llm_middleware"]


def at(server: RedisServer | FaultProxy, **more: object) -> dict[str, object]:
    return {"host": HOST, "port": server.port, **more}


def subscribers(server: RedisServer) -> int:
    return server.ask("PUBSUB", "NUMSUB", NAME)[1]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


class TestHearing:
    def test_nothing_happens_before_listen(self, server: RedisServer) -> None:
        with FaultProxy(server.port) as proxy, Heard(at(proxy)) as heard:
            assert (heard.channel.live, proxy.connections, threads()) == (False, 0, [])

    def test_a_message_arrives(self, server: RedisServer) -> None:
        with listening(at(server)) as heard:
            heard.hears(server, b"\x00first\xff")
            heard.hears(server, b"")
            assert heard.gaps == 0
            assert [thread.daemon for thread in threads()] == [True]

    def test_other_channels_are_not_heard(self, server: RedisServer) -> None:
        with listening(at(server)) as heard:
            assert server.ask("PUBLISH", NAME + "x", b"other") == 0
            heard.hears(server, b"own")

    @pytest.mark.parametrize("parser", [_HiredisParser, None], ids=["hiredis", "python"])
    @pytest.mark.parametrize("protocol", [2, 3])
    def test_every_protocol_and_parser(
        self, server: RedisServer, parser: type | None, protocol: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kind = parser or {2: _RESP2Parser, 3: _RESP3Parser}[protocol]

        def set_parser(connection: redis.Connection, parser_class: type) -> None:
            connection._parser = kind(socket_read_size=connection._socket_read_size)

        monkeypatch.setattr(redis.connection.AbstractConnection, "set_parser", set_parser)
        with listening(at(server, protocol=protocol), heartbeat=1.0) as heard:
            monkeypatch.undo()
            assert type(heard.channel._ear._line._connection._parser) is kind
            wait_for(lambda: server.calls().get("ping", 0) >= 2, "silence is asked about, and again")
            assert heard.gaps == 0
            messages = [b"%d" % number * 2000 for number in range(300)]
            with server.client() as client, client.pipeline(transaction=False) as pipe:
                for message in messages:
                    pipe.publish(NAME, message)
                pipe.execute()
            wait_for(lambda: len(heard.messages) >= 300, "all arrive")
            assert heard.messages == messages

    def test_listening_twice_is_listening_once(self, server: RedisServer) -> None:
        with Heard(at(server)) as heard:
            callers = [threading.Thread(target=heard.channel.listen) for _ in range(20)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
            heard.live()
            assert (len(threads()), server.calls()["subscribe"]) == (1, 1)
            heard.hears(server, b"once")

    def test_operations_keep_their_turns_and_their_client(self, server: RedisServer) -> None:
        with listening(at(server, max_connections=1)) as heard:
            store = RedisStore(heard.connection)
            store.set("key", b"value", 60)
            assert store.get("key") == b"value"
            store.close()
            heard.hears(server, b"still here")
            assert heard.gaps == 0

    def test_a_health_check_of_redis_py_does_not_disturb(self, server: RedisServer) -> None:
        with listening(at(server, health_check_interval=1, protocol=2), heartbeat=1.2) as heard:
            wait_for(lambda: server.calls().get("ping", 0) >= 2, "silence is asked about, and again")
            heard.hears(server, b"message")
            assert heard.gaps == 0

    def test_a_failing_callback_is_logged_once_and_does_no_harm(
        self, server: RedisServer, warnings: Callable[[], list[str]]
    ) -> None:
        heard: list[bytes] = []

        def told(data: bytes) -> None:
            heard.append(data)
            raise ValueError("told")

        def gap() -> None:
            heard.append(b"gap")
            raise ValueError("gap")

        connection = RedisConnection.from_settings(at(server), {}, budget=10.0)
        channel = RedisChannel(connection, NAME, told=told, gap=gap, heartbeat=AMPLE)
        channel.listen()
        wait_for(lambda: channel.live, "live")
        for message in (b"1", b"2", b"3"):
            server.ask("PUBLISH", NAME, message)
        wait_for(lambda: len(heard) == 3, "all are told")
        server.ask("CLIENT", "KILL", "TYPE", "pubsub")
        wait_for(lambda: len(heard) == 4 and channel.live, "live again")
        server.ask("PUBLISH", NAME, b"4")
        wait_for(lambda: len(heard) == 5, "it goes on")
        channel.close()
        assert heard == [b"1", b"2", b"3", b"gap", b"4"]
        texts = [f"the Redis channel {NAME}: told failed", f"the Redis channel {NAME}: gap failed"]
        assert [text for text in warnings() if "failed" in text] == texts


class TestClosing:
    def test_nothing_is_left(self, server: RedisServer) -> None:
        with listening(at(server)) as heard:
            pass
        assert (heard.channel.live, threads()) == (False, [])
        wait_for(lambda: subscribers(server) == 0, "the server noticed")
        heard.channel.close()

    def test_it_may_listen_again_and_has_missed_something(self, server: RedisServer) -> None:
        with listening(at(server)) as heard:
            heard.hears(server, b"before")
            heard.channel.close()
            assert server.ask("PUBLISH", NAME, b"lost") in (0, 1)
            heard.live()
            assert heard.gaps == 1
            heard.hears(server, b"after")
            assert (heard.messages, heard.gaps) == ([b"before", b"after"], 1)

    def test_by_its_own_callback(self, server: RedisServer) -> None:
        with listening(at(server)) as heard:
            heard.channel.told = lambda data: heard.channel.close()
            server.ask("PUBLISH", NAME, b"close")
            wait_for(lambda: not threads(), "the thread ends")
            assert not heard.channel.live

    def test_while_nothing_answers(self, server: RedisServer) -> None:
        with FaultProxy(server.port) as proxy:
            proxy.blackhole = True
            with Heard(at(proxy), budget=0.2) as heard:
                heard.channel.listen()
                wait_for(lambda: proxy.received, "it greets the server")
                heard.channel.close()
                wait_for(lambda: not threads(), "the thread ends")

    def test_a_callback_under_way_is_not_waited_for_without_end(self, server: RedisServer) -> None:
        entered, release = threading.Event(), threading.Event()
        with listening(at(server)) as heard:

            def told(data: bytes) -> None:
                heard.messages.append(data)
                entered.set()
                release.wait()

            heard.channel.told = told
            server.ask("PUBLISH", NAME, b"1")
            assert entered.wait(30)
            server.ask("PUBLISH", NAME, b"2")
            heard.channel.close()
            release.set()
            wait_for(lambda: not threads(), "the thread ends")
            assert heard.messages == [b"1"]


class TestDeaths:
    def test_a_server_that_restarts(self, warnings: Callable[[], list[str]]) -> None:
        with redis_server() as server, listening(at(server)) as heard:
            for time in (1, 2):
                server.kill()
                wait_for(lambda: not heard.channel.live, "its death is noticed")
                server.restart()
                wait_for(lambda: heard.channel.live, "live again")
                assert heard.gaps == time
                heard.hears(server, b"%d" % time)
            assert len(warnings()) == 1  # within a heartbeat it is one row of failures
            assert warnings()[0].startswith(
                f"the Redis channel {NAME} is not heard for now: redis at {HOST}:{server.port}: "
            )

    def test_each_row_of_failures_is_logged_once(self, warnings: Callable[[], list[str]]) -> None:
        with redis_server() as server, listening(at(server), heartbeat=1.0) as heard:
            ear = heard.channel._ear
            for time in (1, 2):
                server.kill()
                wait_for(lambda: ear._failures >= 3, "it fails again and again")
                server.restart()
                wait_for(lambda: heard.channel.live, "live again")
                wait_for(lambda: not ear._failures, "a heartbeat without a failure has passed")
                assert (heard.gaps, len(warnings())) == (time, time)

    def test_a_server_that_hangs(self) -> None:
        with redis_server() as server, listening(at(server), heartbeat=QUICK, budget=QUICK) as heard:
            server.pause()
            wait_for(lambda: not heard.channel.live, "silence is noticed")
            server.resume()
            wait_for(lambda: heard.channel.live, "live again")
            assert heard.gaps >= 1
            heard.hears(server, b"after")

    def test_a_network_that_swallows_everything(self, server: RedisServer) -> None:
        with FaultProxy(server.port) as proxy:
            settings = at(proxy)
            with listening(settings, heartbeat=QUICK, budget=QUICK) as heard:
                proxy.blackhole = True
                wait_for(lambda: not heard.channel.live, "silence is noticed")
                server.ask("PUBLISH", NAME, b"lost")
                proxy.heal()
                wait_for(lambda: heard.channel.live, "live again")
                assert heard.gaps >= 1
                heard.hears(server, b"after")
                assert heard.messages == [b"after"]

    def test_a_reset_is_noticed_without_a_heartbeat(self, server: RedisServer) -> None:
        with (
            FaultProxy(server.port) as proxy,
            listening(at(proxy), heartbeat=3600) as heard,
        ):
            proxy.refuse()
            wait_for(lambda: not heard.channel.live, "the reset is noticed")
            proxy.accept()
            wait_for(lambda: heard.channel.live, "live again")
            assert heard.gaps == 1
            heard.hears(server, b"after")

    def test_a_message_cut_in_half(self, server: RedisServer) -> None:
        with FaultProxy(server.port) as proxy:
            settings = at(proxy)
            with listening(settings, heartbeat=QUICK, budget=QUICK) as heard:
                proxy.rate = 1000.0  # a message of some seconds
                server.ask("PUBLISH", NAME, b"x" * 100_000)
                wait_for(lambda: not heard.channel.live, "no whole message and no answer")
                proxy.heal()
                wait_for(lambda: heard.channel.live, "live again")
                assert heard.messages == []
                heard.hears(server, b"after")

    @pytest.mark.parametrize("hung", [False, True], ids=["refused", "hung"])
    def test_a_server_that_is_not_there_at_first(self, hung: bool, warnings: Callable[[], list[str]]) -> None:
        with redis_server() as server, FaultProxy(server.port) as proxy:
            proxy.blackhole = hung
            if not hung:
                proxy.refuse()
            with Heard(at(proxy), budget=QUICK) as heard:
                heard.channel.listen()
                wait_for(lambda: heard.channel._ear._failures >= 2, "it is tried again")
                assert (heard.channel.live, len(warnings())) == (False, 1)
                proxy.heal()
                if not hung:
                    proxy.accept()
                heard.live()
                assert heard.gaps == 0

    def test_attempts_become_rarer(self) -> None:
        ear = _Ear(Heard({"host": HOST, "port": free_port()}).channel)
        for longest in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0):
            assert longest / 2 <= ear._failed(ConnectionError("gone")) <= longest
        ear = _Ear(Heard({"host": HOST, "port": free_port()}).channel)
        pauses = {ear._failed(redis.exceptions.NoPermissionError("NOPERM")) for _ in range(20)}
        assert min(pauses) >= 1.0
        assert max(pauses) <= 2.0
        assert len(pauses) > 10


class TestRefusals:
    def test_a_user_without_the_channel(self, warnings: Callable[[], list[str]]) -> None:
        with redis_server() as server:
            server.ask("ACL", "SETUSER", "app", "on", ">secret-word", "~*", "+@all", "resetchannels")
            with Heard(at(server, username="app", password="secret-word")) as heard:
                heard.channel.listen()
                wait_for(lambda: heard.channel._ear._failures == 2, "it is refused twice")
                assert (heard.channel.live, len(warnings())) == (False, 1)
                assert "no permissions to access one of the channels" in warnings()[0]
                server.ask("ACL", "SETUSER", "app", f"&{NAME}")
                heard.live()
                assert heard.gaps == 0
                heard.hears(server, b"allowed")
                server.ask("ACL", "SETUSER", "app", "resetchannels")
                wait_for(lambda: not heard.channel.live, "what was allowed is forbidden")

    def test_a_wrong_password_is_not_told(self, warnings: Callable[[], list[str]]) -> None:
        with redis_server("--requirepass", "right", password="right") as server:
            # A word of the server's answer, so that it would be told with it.
            with Heard(at(server, password="username")) as heard:
                heard.channel.listen()
                wait_for(warnings, "it is logged")
                assert not heard.channel.live
            [text] = warnings()
            assert text.endswith(
                f"redis at {HOST}:{server.port}: invalid ***-password pair or user is disabled."
            )

    def test_what_counts_as_one(self) -> None:
        errors = redis.exceptions
        refusals = [errors.ResponseError, errors.NoPermissionError, errors.AuthenticationError]
        others = [errors.ConnectionError, errors.BusyLoadingError, errors.TimeoutError, OSError, ValueError]
        assert [_is_refusal(kind("x")) for kind in refusals] == [True] * 3
        assert [_is_refusal(kind("x")) for kind in others] == [False] * 5

    def test_a_token_that_is_over_is_replaced(self) -> None:
        token = "token-1"
        with redis_server(
            "--user", "admin", "on", ">admin", "~*", "&*", "+@all", username="admin", password="admin"
        ) as server:
            server.ask("ACL", "SETUSER", "default", "resetpass", ">token-1")
            settings = at(server, gcp_service_account="cache@project.iam")
            with listening(settings, fetch_token=lambda account: (token, 4102444800.0)) as heard:
                token = "token-2"
                server.ask("ACL", "SETUSER", "default", "resetpass", ">token-2")
                server.ask("CLIENT", "KILL", "TYPE", "pubsub")
                wait_for(lambda: heard.gaps == 1 and heard.channel.live, "the new token is used")
                heard.hears(server, b"after")


class TestTopologies:
    def test_a_unix_socket(self, tmp_path: Path) -> None:
        path = str(tmp_path / "redis.sock")
        with redis_server("--unixsocket", path) as server, listening({"unix_socket_path": path}) as heard:
            heard.hears(server, b"message")

    def test_tls(self) -> None:
        with redis_tls() as (server, made):
            settings = at(server, ssl=True, ssl_ca_certs=made.authority)
            with listening(settings, heartbeat=1.0) as heard:
                pings = server.calls()["ping"]
                wait_for(lambda: server.calls()["ping"] >= pings + 2, "silence is asked about, and again")
                assert heard.gaps == 0
                messages = [b"%d" % number * 20_000 for number in range(30)]
                for message in messages:
                    server.ask("PUBLISH", NAME, message)
                wait_for(lambda: len(heard.messages) >= 30, "all arrive")
                assert heard.messages == messages
                heard.channel.close()
                assert threads() == []

    def test_a_cluster_whose_node_dies(self) -> None:
        with redis_cluster() as cluster:
            settings = {"redis_startup_nodes": cluster.nodes}
            with listening(settings, heartbeat=QUICK, budget=1.0) as heard:
                for server in cluster.servers:
                    heard.hears(server, b"by any node")
                [dying] = [server for server in cluster.servers if subscribers(server)]
                dying.kill()
                wait_for(lambda: heard.gaps >= 1 and heard.channel.live, "live at another")
                for server in cluster.servers:
                    if server is not dying:
                        heard.hears(server, b"by any that is left")

    def test_a_cluster_whose_node_failed_before(self) -> None:
        with redis_cluster() as cluster, Heard({"redis_startup_nodes": cluster.nodes}) as heard:
            names = {f"{HOST}:{server.port}" for server in cluster.servers}
            for name in names:
                line = _Line(heard.connection, NAME, lambda: True)
                line.open(avoided="")
                chosen = set()
                for _ in range(100):
                    line._pool(name)
                    chosen.add(line.node)
                line.close()
                assert chosen == names - {name}

    def test_a_cluster_that_a_node_leaves(self) -> None:
        with redis_cluster() as cluster:
            settings = {"redis_startup_nodes": cluster.nodes}
            with listening(settings, heartbeat=QUICK, budget=1.0) as heard:
                [leaving] = [server for server in cluster.servers if subscribers(server)]
                name = leaving.ask("CLUSTER", "MYID")
                slots = [row for row in leaving.ask("CLUSTER SLOTS") if row[2][2] == name]
                staying = [server for server in cluster.servers if server is not leaving]
                leaving.ask("CLUSTER", "RESET", "HARD")
                for server in staying:
                    server.ask("CLUSTER", "FORGET", name)
                staying[0].ask("CLUSTER", "ADDSLOTSRANGE", *slots[0][:2])
                wait_for(lambda: any(map(subscribers, staying)), "it listens where messages are")
                wait_for(lambda: heard.channel.live, "live")
                assert leaving.running
                for server in staying:
                    heard.hears(server, b"by those who stay")

    def test_a_failover_of_sentinels(self) -> None:
        with redis_sentinel() as sentinels:
            old, new = sentinels.master, sentinels.replica
            settings = {"sentinel_nodes": sentinels.nodes, "service_name": sentinels.service}
            with listening(settings, heartbeat=QUICK, budget=1.0) as heard:
                heard.hears(old, b"before")
                old.kill()
                wait_for(lambda: not heard.channel.live, "its death is noticed")
                wait_for(lambda: sentinels.master_port() == new.port, "the replica is the master")
                wait_for(lambda: heard.channel.live and subscribers(new), "live at the new master")
                heard.hears(new, b"after")
                old.restart()  # and takes itself for the master still
                assert subscribers(old) == 0
                heard.hears(new, b"and on")

    def test_an_old_master_that_lives_on(self) -> None:
        """Sentinels name another one, of which the old one knows nothing: it answers every PING."""
        with redis_sentinel() as sentinels, redis_server() as new:
            old = sentinels.master
            settings = {"sentinel_nodes": sentinels.nodes, "service_name": sentinels.service}
            with listening(settings, heartbeat=QUICK, budget=1.0) as heard:
                assert subscribers(old) == 1
                for sentinel in sentinels.sentinels:
                    sentinel.ask("SENTINEL", "REMOVE", sentinels.service)
                    sentinel.ask("SENTINEL", "MONITOR", sentinels.service, HOST, new.port, 2)
                wait_for(lambda: subscribers(new) and heard.channel.live, "live at the one that is named")
                assert heard.gaps >= 1
                assert subscribers(old) == 0
                heard.hears(new, b"after")

    def test_sentinels_that_are_gone_are_no_reason_to_leave(self) -> None:
        with redis_sentinel() as sentinels:
            settings = {"sentinel_nodes": sentinels.nodes, "service_name": sentinels.service}
            with listening(settings, heartbeat=1.0, budget=1.0) as heard:
                for sentinel in sentinels.sentinels:
                    sentinel.kill()
                ear = heard.channel._ear
                looked, ask = threading.Semaphore(0), ear._line.misplaced

                def misplaced() -> bool:
                    answer = ask()
                    looked.release()
                    return answer

                ear._line.misplaced = misplaced
                assert looked.acquire(timeout=30)
                assert looked.acquire(timeout=30)
                heard.hears(sentinels.master, b"still here")
                assert heard.gaps == 0


PRELUDE = """
import json, os, sys, threading, time
from llm_middleware.stores.redis_channel import RedisChannel
from llm_middleware.stores.redis_connect import RedisConnection
import redis

port, name = int(sys.argv[1]), sys.argv[2]
server = redis.Redis(port=port)
messages, gaps = [], []
connection = RedisConnection.from_settings({"host": "127.0.0.1", "port": port}, {})

def told(data):
    messages.append(data.decode())

def make(heartbeat=20.0):
    return RedisChannel(connection, name, told=told, gap=lambda: gaps.append(1), heartbeat=heartbeat)

def until(condition):
    ends, tick = time.monotonic() + 30, threading.Event()
    while not condition():
        assert time.monotonic() < ends
        tick.wait(0.005)

def subscribers():
    with redis.Redis(port=port) as client:
        return client.pubsub_numsub(name)[0][1]

def ears():
    with redis.Redis(port=port) as client:
        return sorted(client["id"] for client in client.client_list("pubsub"))

def in_child(work):
    '''Run in a fork; returns the function that waits for its result.'''
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(write)
    def result():
        with open(read) as source:
            said = source.read()
        os.waitpid(pid, 0)
        return json.loads(said)
    return result
"""


def run(server: RedisServer, script: str, *options: str, before: str = "") -> object:
    """What ``script`` prints, as JSON. It exits with 0 and writes nothing to stderr."""
    code = before + PRELUDE + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, *options, "-c", code, str(server.port), NAME],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


GEVENT = "from gevent import monkey; monkey.patch_all()\n"
WORKER = """
def worker():
    before = channel.live
    channel.listen()
    until(lambda: "last" in messages)
    channel.close()
    return [before, messages, len(gaps)]
"""


class TestProcesses:
    @pytest.mark.parametrize("before", ["", GEVENT], ids=["threads", "gevent"])
    def test_forked_from_one_that_does_not_listen(self, server: RedisServer, before: str) -> None:
        script = """
        channel = make()
        results = [in_child(worker), in_child(worker)]
        until(lambda: subscribers() == 2)
        server.publish(name, "first")
        server.publish(name, "last")
        print(json.dumps([[result() for result in results], channel.live, messages]))
        """
        said = run(server, WORKER + textwrap.dedent(script), before=before)
        assert said == [[[False, ["first", "last"], 0]] * 2, False, []]

    @pytest.mark.parametrize("before", ["", GEVENT], ids=["threads", "gevent"])
    def test_forked_from_one_that_listens(self, server: RedisServer, before: str) -> None:
        script = """
        channel = make()
        channel.listen()
        until(lambda: channel.live)
        ear = ears()
        server.publish(name, "before")
        until(lambda: messages)
        messages_of_parent = list(messages)
        messages.clear()
        result = in_child(worker)
        until(lambda: subscribers() == 2)
        expected = [f"{number}" for number in range(200)] + ["last"]
        for message in expected:
            server.publish(name, message)
        child = result()
        until(lambda: "last" in messages)
        until(lambda: subscribers() == 1)
        server.publish(name, "after")
        until(lambda: "after" in messages)
        print(json.dumps([
            messages_of_parent, messages == [*expected, "after"], len(gaps), ears() == ear, channel.live,
            child[0], child[1] == expected, child[2],
        ]))
        """
        said = run(server, WORKER + textwrap.dedent(script), before=before)
        # The child has missed what came between the fork and its subscription, the parent nothing.
        assert said == [["before"], True, 0, True, True, False, True, 1]

    @pytest.mark.parametrize("before", ["", GEVENT], ids=["threads", "gevent"])
    def test_a_child_that_never_listens_does_no_harm(self, server: RedisServer, before: str) -> None:
        script = """
        import gc
        channel = make(heartbeat=0.2)
        channel.listen()
        until(lambda: channel.live)
        ear = ears()
        release, go = os.pipe()

        def idle():
            live = channel.live
            channel.close()
            channel._ear = None
            gc.collect()
            os.read(release, 1)
            return [live, messages]

        result = in_child(idle)
        expected = [f"{number}" for number in range(200)]
        for message in expected:
            server.publish(name, message)
        until(lambda: len(messages) >= 200)
        os.write(go, b"x")
        child = result()
        server.publish(name, "after")
        until(lambda: "after" in messages)
        print(json.dumps([child, messages == [*expected, "after"], len(gaps), ears() == ear]))
        """
        # The heartbeat is short: a PING by the child would be one too many, and is no harm to wait for.
        assert run(server, script, before=before) == [[False, []], True, 0, True]

    def test_a_child_does_not_even_close_what_its_parent_listens_with(self, server: RedisServer) -> None:
        script = """
        import gc
        channel = make()
        channel.listen()
        until(lambda: channel.live)
        descriptor = channel._ear._line._connection._sock.fileno()
        expected = os.fstat(descriptor)

        def look():
            channel.listen()
            until(lambda: channel.live)
            gc.collect()
            return os.fstat(descriptor) == expected

        print(json.dumps(in_child(look)()))
        """
        assert run(server, script) is True

    def test_a_fork_while_a_lock_is_held(self, server: RedisServer) -> None:
        script = """
        channel = make()
        with channel._lock():
            result = in_child(worker)
        until(lambda: subscribers() == 1)
        server.publish(name, "last")
        print(json.dumps(result()))
        """
        assert run(server, WORKER + textwrap.dedent(script)) == [False, ["last"], 0]

    def test_two_that_have_nothing_in_common(self, server: RedisServer) -> None:
        with listening(at(server)) as heard:
            script = """
            channel = make()
            channel.listen()
            until(lambda: channel.live)
            server.publish(name, "hello")
            until(lambda: messages)
            print(json.dumps(messages))
            """
            assert run(server, script) == ["hello"]
            wait_for(lambda: heard.messages, "it arrives here too")
            assert heard.messages == [b"hello"]

    def test_the_caller_connects_nothing(self, server: RedisServer) -> None:
        script = """
        connected = []

        def audit(event, args):
            if event == "socket.connect":
                connected.append(threading.current_thread().name)

        sys.addaudithook(audit)
        channel = make()
        first = list(connected)
        channel.listen()
        until(lambda: channel.live)
        channel.listen()
        channel.close()
        print(json.dumps([first, connected]))
        """
        assert run(server, script) == [[], [THREAD]]

    def test_a_callback_that_ends_the_thread(self, server: RedisServer) -> None:
        script = """
        channel = make()
        channel.listen()
        until(lambda: channel.live)
        channel.told = lambda data: sys.exit()
        server.publish(name, "exit")
        until(lambda: not channel.live and channel._ear.ended)
        channel.told = told
        channel.listen()
        until(lambda: channel.live)
        server.publish(name, "again")
        until(lambda: messages)
        print(json.dumps([messages, len(gaps)]))
        """
        assert run(server, script) == [["again"], 1]

    @pytest.mark.parametrize("options", [(), ("-X", "dev")], ids=["plain", "dev"])
    @pytest.mark.parametrize("before", ["", GEVENT], ids=["threads", "gevent"])
    def test_an_exit_is_silent(self, server: RedisServer, before: str, options: tuple[str, ...]) -> None:
        script = """
        channel = make()
        channel.listen()
        until(lambda: channel.live)
        server.close()
        print(json.dumps(channel.live))
        """
        assert run(server, script, *options, before=before) is True

    def test_an_exit_is_silent_while_nothing_answers(self) -> None:
        with redis_server() as server:
            server.pause()
            script = """
            channel = make()
            channel.listen()
            print(json.dumps(channel.live))
            """
            assert run(server, script) is False
            server.resume()

    def test_an_exit_is_silent_at_the_death_of_the_server(self, server: RedisServer) -> None:
        script = """
        import atexit
        channel = make()
        channel.listen()
        until(lambda: channel.live)

        @atexit.register
        def lose():
            server.client_kill_filter(_type="pubsub")
            until(lambda: not channel.live or channel._ear._logged)

        print(json.dumps(channel.live))
        """
        assert run(server, script) is True
