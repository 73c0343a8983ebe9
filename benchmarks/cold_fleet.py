"""200 identical requests that nobody has made before, at once, to the four workers of one server: how often
the upstream is called, and how long the slowest waits. Wall time, since waiting is what it is about."""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

from llm_middleware.testing import FakeUpstream
from tests.services import HOST, RedisServer, redis_server

from .harness import Row, quick, show
from .load import generator
from .network import commands, environment
from .payloads import chat
from .servers import serving

__all__ = ["results"]

_PATH = "/v1/chat/completions"
_REQUESTS, _WORKERS = 200, 4
_ROUNDS, _QUICK_ROUNDS = 9, 2
_PATIENCE_S = 60.0
_LATENCY_S = 0.3
# A stream takes as long: a third of it until it begins, the rest spread over its events.
_STREAM = {"latency": 0.1, "chunk_delay": 0.025}

_UVICORN = (
    f"uvicorn --host 127.0.0.1 --port {{port}} --workers {_WORKERS} --loop uvloop --http httptools"
    " --no-access-log --log-level warning {app}"
)
# A thread for every request: a gthread worker accepts no more than it has threads for.
_GUNICORN = (
    f"gunicorn --bind 127.0.0.1:{{port}} --workers {_WORKERS} --worker-class gthread --threads {_REQUESTS}"
    " --graceful-timeout 1 --log-level warning {app}"
)
_SERVERS = (
    (f"uvicorn, {_WORKERS} workers", _UVICORN, "asgi"),
    (f"gunicorn gthread, {_WORKERS} workers", _GUNICORN, "wsgi"),
)


@dataclass(frozen=True, slots=True)
class _Round:
    """``calls``: of the upstream. ``spent``: commands to Redis. Seconds: ``alone``, one call of the upstream
    with nobody between; ``waiting``, the slowest of as many requests to an app that only waits; ``slowest``,
    of those to the app with the cache."""

    calls: int
    spent: Counter[str]
    alone: float
    waiting: float
    slowest: float


def results() -> list[Row]:
    rows = []
    with redis_server() as redis, generator() as pool, _upstream() as upstream:
        variables = {
            "BENCHMARK_REDIS_PORT": redis.port,
            "BENCHMARK_UPSTREAM": f"{upstream.url}/chat/completions",
        }
        with environment(**variables, BENCHMARK_WAIT=_LATENCY_S):
            for name, command, face in _SERVERS:
                for stream in (False, True):
                    rounds = _rounds(pool, redis, upstream, command, face, stream)
                    rows += _rows(name, stream, rounds)
    return rows


def _rows(name: str, stream: bool, rounds: Sequence[_Round]) -> list[Row]:
    path = f"{_REQUESTS} cold {'streams' if stream else 'requests'}, {name}"
    calls = [one.calls for one in rounds]
    rows = [
        # The worst round is what counts.
        Row(f"{path}: calls of the upstream", "", 1, max(calls), min(calls), max(calls), "calls"),
        _asked(path, [one.spent for one in rounds]),
        _slowest(path, "one call of the upstream alone", [(one.slowest, one.alone) for one in rounds], 1.3),
    ]
    if not stream:
        floor = "an app in which each request waits as long by itself"
        rows.append(_slowest(path, floor, [(one.slowest, one.waiting) for one in rounds]))
    return rows


def _asked(path: str, rounds: Sequence[Counter[str]]) -> Row:
    totals = sorted(spent.total() for spent in rounds)
    gets = statistics.median(spent["get"] for spent in rounds)
    described = f"{path}: commands to Redis, of them {gets:g} GET"
    return Row(described, "", None, statistics.median(totals), totals[0], totals[-1], "commands")


def _slowest(path: str, floor: str, times: Sequence[tuple[float, float]], goal: float | None = None) -> Row:
    ratios = [own / least for own, least in times]
    own, least = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    absolute = f"{own:,.0f} / {least:,.0f} ms"
    described = f"{path}: slowest answer (wall clock)"
    return Row(described, floor, goal, statistics.median(ratios), min(ratios), max(ratios), absolute=absolute)


def _rounds(
    pool: ProcessPoolExecutor, redis: RedisServer, upstream: _Upstream, command: str, face: str, stream: bool
) -> list[_Round]:
    numbers = itertools.count()

    def fresh() -> bytes:
        return json.dumps(chat(1536, user=f"user-{face}-{next(numbers)}", stream=stream)).encode()

    def ask(port: int, times: int = _REQUESTS) -> list[_Answer]:
        return pool.submit(_ask, port, fresh(), times).result()

    def slowest(port: int, times: int = _REQUESTS) -> float:
        return max(answer.seconds for answer in ask(port, times))

    def one(ports: Mapping[str, int]) -> _Round:
        alone, waiting = slowest(upstream.port, 1), slowest(ports["waiting"])
        before = upstream.count()
        answers: list[_Answer] = []
        spent = commands(redis, lambda: answers.extend(ask(ports["cached"])))
        calls = upstream.count() - before
        if len({answer.body for answer in answers}) > calls:
            raise RuntimeError(f"the answers differ more than {calls} calls of the upstream explain")
        return _Round(calls, spent, alone, waiting, max(answer.seconds for answer in answers))

    upstream.set(**(_STREAM if stream else {"latency": _LATENCY_S, "chunk_delay": 0.0}))
    apps = {"cached": f"benchmarks.fleet_apps:{face}", "waiting": f"benchmarks.fleet_apps:waiting_{face}"}
    with serving(command, apps) as servers:
        ports = {name: server._port for name, server in servers.items()}
        for port in ports.values():
            _warm(ask, port)
        return [one(ports) for _ in range(_QUICK_ROUNDS if quick() else _ROUNDS)]


def _warm(ask: Callable[[int], list[_Answer]], port: int) -> None:
    """Until every worker has had requests, and with them a connection to Redis."""
    reached: set[bytes] = set()
    until = time.monotonic() + _PATIENCE_S
    while len(reached) < _WORKERS:
        if time.monotonic() > until:
            raise RuntimeError(f"requests reached {len(reached)} of {_WORKERS} workers")
        reached |= {answer.worker for answer in ask(port)}


# --- the clients, in a process of their own


@dataclass(frozen=True, slots=True)
class _Answer:
    seconds: float
    worker: bytes
    body: bytes


def _ask(port: int, body: bytes, times: int) -> list[_Answer]:
    """Connect ``times`` times, send the same request on each connection at once, and read to the end."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_ask_at_once(port, body, times))


async def _ask_at_once(port: int, body: bytes, times: int) -> list[_Answer]:
    head = f"POST {_PATH} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    async with asyncio.timeout(_PATIENCE_S):
        lines = [await asyncio.open_connection(HOST, port) for _ in range(times)]
        began = time.perf_counter()
        for _, writer in lines:
            writer.write(request)
        raw = await asyncio.gather(*(_read(*line, began) for line in lines))
    return [_parsed(seconds, data) for seconds, data in raw]


async def _read(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, began: float
) -> tuple[float, bytes]:
    data = await reader.read()
    seconds = time.perf_counter() - began
    writer.close()
    return seconds, data


def _parsed(seconds: float, data: bytes) -> _Answer:
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"not an answer: {data[:200]!r}")
    if b"\r\ntransfer-encoding: chunked" in head.lower():
        body = _dechunked(body)
    _, _, worker = head.partition(b"\r\nx-worker: ")
    return _Answer(seconds, worker.partition(b"\r\n")[0], body)


def _dechunked(data: bytes) -> bytes:
    pieces = []
    while True:
        size, _, rest = data.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            return b"".join(pieces)
        pieces.append(rest[:length])
        data = rest[length + 2 :]


# --- the upstream, in a process of its own


class _Upstream:
    def __init__(self, line: Connection) -> None:
        self._line = line
        self.url: str = line.recv()
        self.port = urlsplit(self.url).port or 0

    def set(self, **timing: float) -> None:
        self._line.send(timing)
        self._line.recv()

    def count(self) -> int:
        """How often it was called so far."""
        self._line.send({})
        calls: int = self._line.recv()
        return calls


@contextmanager
def _upstream() -> Iterator[_Upstream]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_upstream, args=(theirs,), daemon=True)
    process.start()
    try:
        yield _Upstream(ours)
    finally:
        ours.send(None)
        process.join()


def _serve_upstream(line: Connection) -> None:
    with FakeUpstream() as upstream:
        line.send(upstream.url)
        while (timing := line.recv()) is not None:
            for name, value in timing.items():
                setattr(upstream, name, value)
            line.send(upstream.count)


if __name__ == "__main__":
    show(results)
