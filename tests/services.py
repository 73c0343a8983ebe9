"""Real servers for the tests, on free ports of the loopback address, and a proxy that makes the network fail.

Every server runs in a directory of its own and is stopped by the process that was started. A program that is
missing is an error that names the Debian package: ``apt-get install redis-server``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import redis
import trustme

HOST = "127.0.0.1"
PATIENCE = 30.0  # seconds for a server to come up, a replica to follow, a failover to end

_START = 60.0  # seconds for a server that brings much with it
_REDIS = ("--bind", HOST, "--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], object], what: str) -> object:
    """What ``condition`` returns once that is true; an exception counts as not yet."""
    until = time.monotonic() + PATIENCE
    tick = threading.Event()
    trouble: Exception | None = None
    while time.monotonic() < until:
        try:
            if result := condition():
                return result
        except (redis.RedisError, OSError) as exc:
            trouble = exc
        tick.wait(0.005)
    raise AssertionError(f"not in {PATIENCE} s: {what}") from trouble


@contextlib.contextmanager
def telling_port(
    command: Sequence[str | Path], environment: Mapping[str, str], directory: Path
) -> Iterator[tuple[int, int]]:
    """Start a server that prints its port, and kill it at the end: nothing of it is worth saving. Yields the
    port and the pid."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, cwd=directory
        )
        assert process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], _START)
            line = process.stdout.readline() if ready else ""
            if not line:
                said = os.pread(log.fileno(), 1 << 20, 0).decode("utf-8", "replace")
                raise RuntimeError(f"a server did not start:\n{said}")
            yield int(line), process.pid
        finally:
            process.kill()
            process.wait(PATIENCE)
            process.stdout.close()


def program(name: str, package: str) -> str:
    """Where a program is; an error that says how to get it."""
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is not installed: apt-get install {package}")
    return path


@dataclass
class Process:
    """A server that was started. `stop` lets it end in order, `kill` does not; `pause` makes it hang."""

    popen: subprocess.Popen[bytes]

    def pause(self) -> None:
        os.kill(self.popen.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.popen.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> None:
        if self.popen.poll() is None:
            self.resume()
            self.popen.terminate()
            try:
                self.popen.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill()

    @property
    def running(self) -> bool:
        return self.popen.poll() is None


@dataclass
class RedisServer(Process):
    """One redis-server. ``arguments``: what `client` connects with."""

    port: int
    directory: Path
    arguments: dict[str, object] = field(default_factory=dict)

    def client(self, **changes: object) -> redis.Redis:
        return redis.Redis(**{"host": HOST, "port": self.port, **self.arguments, **changes})

    def ask(self, *command: object, **changes: object) -> object:
        """The reply to one command, on a connection of its own."""
        with self.client(**changes) as client:
            return client.execute_command(*command)

    def calls(self, **changes: object) -> dict[str, int]:
        """How often each command was called, by INFO commandstats."""
        with self.client(**changes) as client:
            stats = client.info("commandstats")
        return {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()}

    def restart(self) -> None:
        """Start the same server again, at the same port."""
        self.popen = subprocess.Popen(self.popen.args, cwd=self.directory, stdout=subprocess.DEVNULL)
        wait_for(lambda: self.ask("PING"), f"redis-server at port {self.port}")


def _start(directory: Path, port: int, command: list[str], arguments: dict[str, object]) -> RedisServer:
    log = (directory / "log").open("ab")
    with log:
        popen = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
    server = RedisServer(popen, port, directory, arguments)

    def answers() -> object:
        if not server.running:
            raise RuntimeError(f"{command[0]} ended: {(directory / 'log').read_text()[-2000:]}")
        return server.ask("PING")

    try:
        wait_for(answers, f"redis-server at port {port}")
    except BaseException:
        server.stop()
        raise
    return server


@contextlib.contextmanager
def redis_server(
    *options: str, tls: bool = False, port: int | None = None, **arguments: object
) -> Iterator[RedisServer]:
    """A redis-server with ``options``, whose `client` takes ``arguments``. It keeps nothing on disk."""
    port = port or free_port()
    ports = ["--port", "0", "--tls-port", str(port)] if tls else ["--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="redis-") as path:
        command = [program("redis-server", "redis-server"), *ports, "--dir", path, *_REDIS, *options]
        server = _start(Path(path), port, command, arguments)
        try:
            yield server
        finally:
            server.stop()


@dataclass
class RedisCluster:
    """Masters that share the slots, and what follows them. ``nodes``: the masters' addresses."""

    servers: list[RedisServer]
    replicas: list[RedisServer]

    @property
    def nodes(self) -> list[dict[str, object]]:
        return [{"host": HOST, "port": server.port} for server in self.servers]

    def calls(self, command: str) -> int:
        return sum(server.calls().get(command, 0) for server in self.servers)


@contextlib.contextmanager
def redis_cluster(
    masters: int = 3, *options: str, replicas: int = 0, **arguments: object
) -> Iterator[RedisCluster]:
    """A Redis Cluster whose first ``replicas`` masters have a replica each."""
    with contextlib.ExitStack() as stack:
        servers, buses = [], []
        for _ in range(masters + replicas):
            buses.append(str(free_port()))
            own = ["--cluster-enabled", "yes", "--cluster-port", buses[-1], "--cluster-node-timeout", "1000"]
            servers.append(stack.enter_context(redis_server(*own, *options, **arguments)))
        for index, server in enumerate(servers):
            low, high = 16384 * index // masters, 16384 * (index + 1) // masters - 1
            if index < masters:
                server.ask("CLUSTER", "ADDSLOTSRANGE", low, high)
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            servers[0].ask("CLUSTER", "MEET", HOST, server.port, buses[index])
        for server in servers:
            wait_for(lambda server=server: _cluster_is_up(server, len(servers)), "the cluster is up")
        for master, replica in zip(servers, servers[masters:], strict=False):
            replica.ask("CLUSTER", "REPLICATE", master.ask("CLUSTER", "MYID"))
            wait_for(lambda replica=replica: _follows(replica), "the replica follows")
        yield RedisCluster(servers[:masters], servers[masters:])


def _cluster_is_up(server: RedisServer, nodes: int) -> bool:
    info = server.ask("CLUSTER INFO")
    return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == str(nodes)


def _follows(replica: RedisServer) -> bool:
    return replica.ask("INFO", "replication").get("master_link_status") == "up"


@dataclass
class RedisSentinels:
    """A master, its replica and three sentinels that watch them as ``service``."""

    master: RedisServer
    replica: RedisServer
    sentinels: list[RedisServer]
    service: str = "mymaster"

    @property
    def nodes(self) -> list[list[object]]:
        return [[HOST, sentinel.port] for sentinel in self.sentinels]

    def master_port(self) -> int:
        """The port of the master as the sentinels that still run agree on it; 0 while they do not."""
        said = {int(s.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1]) for s in self.sentinels}
        return said.pop() if len(said) == 1 else 0


@contextlib.contextmanager
def redis_sentinel(password: str | None = None) -> Iterator[RedisSentinels]:
    """A master with a replica behind three sentinels; ``password`` is that of the sentinels."""
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(redis_server())
        replica = stack.enter_context(redis_server("--replicaof", f"{HOST} {master.port}"))
        wait_for(lambda: _follows(replica), "the replica follows")
        sentinels = [stack.enter_context(_sentinel(master.port, password)) for _ in range(3)]
        for sentinel in sentinels:
            wait_for(lambda sentinel=sentinel: _sees_all(sentinel), "the sentinels see each other")
        yield RedisSentinels(master, replica, sentinels)


@contextlib.contextmanager
def _sentinel(master: int, password: str | None) -> Iterator[RedisServer]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="sentinel-") as path:
        lines = [
            f"port {port}",
            f"bind {HOST}",
            f"dir {path}",
            f"sentinel monitor mymaster {HOST} {master} 2",
            "sentinel down-after-milliseconds mymaster 500",
            "sentinel failover-timeout mymaster 3000",
        ]
        if password is not None:
            lines += [f"requirepass {password}", f"sentinel sentinel-pass {password}"]
        (Path(path) / "sentinel.conf").write_text("\n".join(lines) + "\n")
        command = [program("redis-server", "redis-server"), f"{path}/sentinel.conf", "--sentinel"]
        server = _start(Path(path), port, command, {} if password is None else {"password": password})
        try:
            yield server
        finally:
            server.stop()


def _sees_all(sentinel: RedisServer) -> bool:
    with sentinel.client() as client:
        state = client.sentinel_master("mymaster")
    return state["num-other-sentinels"] == 2 and state["num-slaves"] == 1


@dataclass
class Certificates:
    """Files of an authority and of a certificate that it issued."""

    authority: str
    certificate: str
    key: str


def certificates(directory: Path, *names: str) -> Certificates:
    """Made anew, for ``names`` (localhost and 127.0.0.1 unless given)."""
    authority = trustme.CA()
    issued = authority.issue_cert(*(names or ("localhost", HOST)))
    files = [directory / name for name in ("ca.pem", "server.pem", "server.key")]
    authority.cert_pem.write_to_path(str(files[0]))
    issued.cert_chain_pems[0].write_to_path(str(files[1]))
    issued.private_key_pem.write_to_path(str(files[2]))
    return Certificates(*map(str, files))


@contextlib.contextmanager
def redis_tls(*options: str, **arguments: object) -> Iterator[tuple[RedisServer, Certificates]]:
    """A redis-server that speaks TLS only, and its certificates."""
    with tempfile.TemporaryDirectory(prefix="tls-") as path:
        made = certificates(Path(path))
        tls = [
            "--tls-cert-file",
            made.certificate,
            "--tls-key-file",
            made.key,
            "--tls-ca-cert-file",
            made.authority,
        ]
        given = {"ssl": True, "ssl_ca_certs": made.authority, **arguments}
        with redis_server(*tls, "--tls-auth-clients", "no", *options, tls=True, **given) as server:
            yield server, made


class SyncFace:
    """The sync methods of a store."""

    name = "sync"

    def do(self, store: object, method: str, *args: object) -> object:
        """Call ``get``, ``set``, ``delete`` ..."""
        return getattr(store, method)(*args)

    def together(self, *thunks: tuple[object, ...]) -> list[object]:
        """``(store, method, *args)`` at the same time; results, or exceptions, in order."""
        with ThreadPoolExecutor(len(thunks)) as pool:
            futures = [pool.submit(self.do, *thunk) for thunk in thunks]
            return [future.exception() or future.result() for future in futures]

    def close(self) -> None:
        pass


class AsyncFace(SyncFace):
    """The async methods, on one event loop that lives as long as the test; it closes the stores' clients."""

    name = "async"

    def __init__(self) -> None:
        self.runner = asyncio.Runner()

    def do(self, store: object, method: str, *args: object) -> object:
        return self.runner.run(getattr(store, "a" + method)(*args))

    def together(self, *thunks: tuple[object, ...]) -> list[object]:
        async def gather() -> list[object]:
            calls = [getattr(store, "a" + method)(*args) for store, method, *args in thunks]
            return await asyncio.gather(*calls, return_exceptions=True)

        return self.runner.run(gather())

    def close(self) -> None:
        self.runner.close()


FACES = {"sync": SyncFace, "async": AsyncFace}


class FaultProxy:
    """A TCP proxy on the loopback address that fails as it is told; a context manager.

    Faults are attributes, to be set at any time, and hold for open connections as well: ``latency`` (seconds
    by which each piece is late), ``rate`` (bytes per second towards the client), ``blackhole`` (what comes is
    swallowed, both ways), ``cut_after`` (bytes towards the client after which a connection is reset).
    `reset` and `refuse` are at once. ``connections`` counts those accepted, ``received`` the bytes that came
    from clients, ``sent`` those passed to them, ``resets`` the connections that were reset.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = free_port()
        self.latency = 0.0
        self.rate: float | None = None
        self.blackhole = False
        self.cut_after: int | None = None
        self.connections = self.received = self.sent = self.resets = 0
        self._links: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._listener: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, *exc: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def refuse(self) -> None:
        """Stop listening and reset every connection: whoever connects is refused."""
        self._run(self._stop_listening())
        self.reset()

    def accept(self) -> None:
        """Listen again, at the same port."""
        self._run(self._listen())

    def reset(self) -> None:
        """Reset every open connection."""
        self._run(self._reset_all())

    def heal(self) -> None:
        """End every fault but `refuse`."""
        self.latency, self.rate, self.blackhole, self.cut_after = 0.0, None, False, None

    def _run(self, work: Coroutine[object, object, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._accepted, HOST, self.port)

    async def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _close(self) -> None:
        await self._stop_listening()
        await self._reset_all()

    async def _reset_all(self) -> None:
        tasks = list(self._links)
        for task in tasks:
            self._reset(task)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _reset(self, link: asyncio.Task[None]) -> None:
        self.resets += 1
        for writer in self._links.get(link, ()):
            _abort(writer)
        link.cancel()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        link = asyncio.current_task()
        assert link is not None
        self._links[link] = [writer]
        try:
            ahead, onward = await asyncio.open_connection(HOST, self.target)
            self._links[link].append(onward)
            up = asyncio.ensure_future(self._pump(link, reader, onward, towards_client=False))
            down = asyncio.ensure_future(self._pump(link, ahead, writer, towards_client=True))
            try:
                await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                up.cancel()
                down.cancel()
                await asyncio.gather(up, down, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for one in self._links.pop(link):
                _abort(one)

    async def _pump(
        self,
        link: asyncio.Task[None],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        towards_client: bool,
    ) -> None:
        passed = 0
        while data := await reader.read(65536):
            if not towards_client:
                self.received += len(data)
            if self.latency:
                await asyncio.sleep(self.latency)
            for piece in self._pieces(data, towards_client):
                if self.blackhole:
                    continue
                whole = self.cut_after is None or not towards_client
                left = len(piece) if whole else max(0, self.cut_after - passed)
                await self._pass(writer, piece[:left], towards_client)
                passed += len(piece)
                if left < len(piece):
                    self._reset(link)
                    return

    def _pieces(self, data: bytes, towards_client: bool) -> list[bytes]:
        size = max(1, int(self.rate / 50)) if self.rate and towards_client else len(data)
        return [data[at : at + size] for at in range(0, len(data), size)]

    async def _pass(self, writer: asyncio.StreamWriter, piece: bytes, towards_client: bool) -> None:
        if self.rate and towards_client:
            await asyncio.sleep(len(piece) / self.rate)
        writer.write(piece)
        await writer.drain()
        if towards_client:
            self.sent += len(piece)


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close at once, with a reset: what was not sent is dropped."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
