"""Real servers, each in a process of its own on a free port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

ROOT = Path(__file__).parents[2]
START_S = 30.0
STOP_S = 10.0

GUNICORN = "gunicorn --workers 1 --graceful-timeout 1 --log-level warning --bind 127.0.0.1:{port}"
UVICORN = "uvicorn --host 127.0.0.1 --port {port} --log-level warning --timeout-graceful-shutdown 1"
GRANIAN = "granian --host 127.0.0.1 --port {port} --workers 1 --workers-kill-timeout 1 --no-ws"

ASGI_SERVERS: Mapping[str, str] = {
    "uvicorn": f"{UVICORN} --http httptools --loop uvloop {{app}}",
    "uvicorn-h11": f"{UVICORN} --http h11 --loop asyncio {{app}}",
    "hypercorn": "hypercorn --bind 127.0.0.1:{port} --graceful-timeout 1 {app}",
    "daphne": "daphne --bind 127.0.0.1 --port {port} --verbosity 0 {app}",
    "granian-asgi": f"{GRANIAN} --interface asgi {{app}}",
}
WSGI_SERVERS: Mapping[str, str] = {
    "granian-wsgi": f"{GRANIAN} --interface wsgi --blocking-threads 4 {{app}}",
    "gunicorn-sync": f"{GUNICORN} --worker-class sync {{app}}",
    "gunicorn-gthread": f"{GUNICORN} --worker-class gthread --threads 8 {{app}}",
    "gunicorn-gevent": f"{GUNICORN} --worker-class gevent {{app}}",
    "waitress": "waitress --listen 127.0.0.1:{port} --threads 8 {app}",
}
COMMANDS = {**ASGI_SERVERS, **WSGI_SERVERS}

_running: dict[str, int] = {}

Serve: TypeAlias = Callable[[str, str, Mapping[str, str]], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def serve() -> Serve:
    """``with serve("uvicorn", "examples.fastapi_app.main:app", {"NAME": "value"}) as base_url:``

    The app is importable from the repository's root, or a module beside this file (``apps:asgi_app``).
    """
    return run_server


@pytest.fixture(scope="module", params=COMMANDS)
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Every server in turn with the app of `apps` that it can run: its name and base URL."""
    app = "apps:asgi_app" if request.param in ASGI_SERVERS else "apps:wsgi_app"
    with run_server(request.param, app, {}) as base_url:
        yield request.param, base_url


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the running servers have logged beside a failure."""
    report = yield
    if report.failed:
        report.sections += [(f"Log of {name}", read(log)) for name, log in _running.items()]
    return report


@contextmanager
def run_server(server: str, app: str, env: Mapping[str, str]) -> Iterator[str]:
    """Start a server, wait until it takes connections, and stop it at the end; yields its base URL."""
    with tempfile.TemporaryFile("w+") as log:
        process, port = start(server, app, env, log.fileno())
        name = f"{server} on port {port}"
        _running[name] = log.fileno()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process)
            del _running[name]


def start(server: str, app: str, env: Mapping[str, str], log: int) -> tuple[subprocess.Popen[bytes], int]:
    """A running server and its port. Another process may snatch the free port: then once more."""
    for _ in range(3):
        port = free_port()
        process = spawn(server, app, env, log, port)
        if accepts(process, port):
            return process, port
        stop(process)
        if "in use" not in read(log):
            break
    raise RuntimeError(f"{server} did not start:\n{read(log)}")


def spawn(server: str, app: str, env: Mapping[str, str], log: int, port: int) -> subprocess.Popen[bytes]:
    command = COMMANDS[server].format(port=port, app=app).split()
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **env, "PYTHONPATH": path},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether the server takes connections, within `START_S` and as long as it lives."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            # A socket can connect to itself where nobody listens on an ephemeral port.
            if probe.connect_ex(("127.0.0.1", port)) == 0 and probe.getsockname() != probe.getpeername():
                return True
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        return False
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then make its process group end: some servers have workers."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(log: int) -> str:
    return os.pread(log, 1 << 20, 0).decode("utf-8", "replace")
