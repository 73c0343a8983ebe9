"""Servers under load: started on a free port, measured by the CPU that their processes spend."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .harness import quick
from .load import Outcome, drive, generator

__all__ = ["GUNICORN", "UVICORN", "Server", "serving"]

_ROOT = Path(__file__).parents[1]
_START_S = 30.0

UVICORN = (
    "uvicorn --host 127.0.0.1 --port {port} --loop uvloop --http httptools --no-access-log"
    " --log-level warning --timeout-keep-alive 60 {app}"
)
GUNICORN = (
    "gunicorn --bind 127.0.0.1:{port} --workers 1 --worker-class gthread --threads 4 --keep-alive 60"
    " --graceful-timeout 1 --log-level warning {app}"
)


class Server:
    """One running server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, pool: ProcessPoolExecutor) -> None:
        self._process = process
        self._port = port
        self._pool = pool

    def cpu(self) -> float:
        """CPU seconds of the server and its workers so far."""
        return sum(map(_cpu, _tree(self._process.pid)))

    def send(self, requests: Sequence[bytes], connections: int = 16) -> Outcome:
        """Drive the server from another process; see `load.drive`."""
        return self._pool.submit(drive, self._port, requests, connections).result()

    def candidate(self, requests: Callable[[int], Sequence[bytes]], count: int) -> Callable[[], float]:
        """For `harness.compare`: CPU seconds per request over ``count`` of them."""

        def sample() -> float:
            batch = requests(count // 4 if quick() else count)
            before = self.cpu()
            self.send(batch)
            return (self.cpu() - before) / len(batch)

        return sample


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _tree(int(child))


def _cpu(pid: int) -> float:
    # In nanoseconds; the times of /proc/<pid>/stat are in hundredths of a second.
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def serving(command: str, apps: Mapping[str, str]) -> Iterator[dict[str, Server]]:
    """Every app (name to ``module:attribute``) under a server of its own, all at the same time."""
    with ExitStack() as stack:
        pool = stack.enter_context(generator())
        servers = {}
        for name, app in apps.items():
            process, port = _start(command, app)
            stack.callback(_stop, process)
            servers[name] = Server(process, port, pool)
        yield servers


def _start(command: str, app: str) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    arguments = command.format(port=port, app=app).split()
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=_ROOT, env={**os.environ, "PYTHONPATH": str(_ROOT)}
    )
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0 and probe.getsockname() != probe.getpeername():
                return process, port
        time.sleep(0.05)
    _stop(process)
    raise RuntimeError(f"the server of {app} did not start")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
