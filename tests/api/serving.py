"""The sub-app on real servers in threads of the test's own process, so that a test can look inside.

One uvicorn and one threaded WSGI server live as long as the session; each test puts its app there. Test
modules take the fixtures by name: ``served = serving.served``.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import uvicorn
from werkzeug.serving import WSGIRequestHandler, make_server

from llm_middleware.api.app import LLMApp
from llm_middleware.asgi import llm_app as asgi_app
from llm_middleware.testing import FakeUpstream
from llm_middleware.wsgi import llm_app as wsgi_app

__all__ = ["PATIENCE_S", "Client", "Leaving", "Serve", "chat", "config", "in_flight", "model", "until"]

PATIENCE_S = 20.0
UPSTREAM_KEY = "sk-upstream-secret-0123456789"
SLASHES = "org/deep/m"

CHAT = "/v1/chat/completions"
AUDIO = {"file": ("a.wav", b"RIFF0000WAVE", "audio/wav")}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}

App = Any


def chat(text: str = "hi", model: str = "m", **fields: object) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


def model(
    name: str, upstream: FakeUpstream, *, identity: str | None = None, **params: object
) -> dict[str, Any]:
    """A deployment of the group ``name``, which the upstream knows as ``name-up``."""
    known = {"model": f"openai/{name}-up", "api_base": upstream.url, "api_key": UPSTREAM_KEY}
    return {
        "model_name": name,
        "litellm_params": {**known, **params},
        "model_info": {"id": identity or f"{name.replace('/', '-')}-1"},
    }


def config(upstream: FakeUpstream, **sections: Any) -> dict[str, Any]:
    """Two models that are asked once, and a cache in memory; or ``sections``."""
    made = {
        "models": [model("m", upstream), model(SLASHES, upstream)],
        "cache": {"type": "local"},
        **sections,
        "router": {"num_retries": 0, **sections.get("router", {})},
    }
    return {name: section for name, section in made.items() if section is not None}


def in_flight(core: LLMApp) -> int:
    """Calls that the Router has begun and not ended."""
    return sum(each.in_flight for each in core.router._routing.state._states.values())


def until(condition: Callable[[], bool], what: str = "the condition", timeout: float = PATIENCE_S) -> float:
    """Wait until it holds; the seconds that this took."""
    began = time.monotonic()
    tick = threading.Event()
    while not condition():
        assert time.monotonic() - began < timeout, f"never so: {what}"
        tick.wait(0.005)
    return time.monotonic() - began


def readers(core: LLMApp) -> int:
    """Requests that wait for, or read along with, calls that others have made."""
    return sum(flight.readers for flight in list(core.cache._flow.flights._flights.values()))


def exchanged(url: str, method: str, path: str) -> bytes:
    """All that a server sends for one request, to the end of the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def idle(core: LLMApp) -> bool:
    """Whether no call is under way that others could join."""
    return not core.cache._flow.flights._flights


def nobody_is_connected(upstream: FakeUpstream) -> bool:
    assert upstream._server is not None
    return not upstream._server._open


class Leaving:
    """A client on a bare socket that hangs up when it is told to."""

    def __init__(self, url: str, path: str, body: object) -> None:
        raw = json.dumps(body).encode()
        host, port = url.removeprefix("http://").split(":")
        head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        self._socket = socket.create_connection((host, int(port)), PATIENCE_S)
        self._socket.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)

    def read_until(self, mark: bytes) -> bytes:
        data = b""
        while mark not in data:
            piece = self._socket.recv(1 << 16)
            assert piece, "the server hung up"
            data += piece
        return data

    def leave(self) -> None:
        self._socket.close()


def payloads(body: bytes) -> list[bytes]:
    """The data of the events; every event ends with a blank line."""
    *events, rest = body.split(b"\n\n")
    assert rest == b""
    assert all(event.startswith(b"data: ") for event in events), events
    return [event.removeprefix(b"data: ") for event in events]


def text_of(body: bytes) -> str:
    """What a streamed chat completion says."""
    chunks = [json.loads(data) for data in payloads(body) if data != b"[DONE]"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def error(answer: httpx.Response) -> dict[str, Any]:
    """The error in OpenAI's shape (R60: with nothing else)."""
    assert answer.headers["content-type"] == "application/json"
    found: dict[str, Any] = answer.json()
    assert list(found) == ["error"]
    assert set(found["error"]) == {"message", "type", "param", "code"}
    told: dict[str, Any] = found["error"]
    return told


def refused(answer: httpx.Response) -> tuple[int, Any, Any]:
    found = error(answer)
    return answer.status_code, found["code"], found["param"]


def openai_error(message: str, **fields: object) -> dict[str, Any]:
    return {"error": {"message": message, "type": None, "param": None, "code": None, **fields}}


class Client(httpx.Client):
    """Of an app on a server. ``core``: the sub-app's `LLMApp`; ``front``: ``asgi`` or ``wsgi``."""

    def __init__(self, url: str, front: str, core: LLMApp | None) -> None:
        limits = httpx.Limits(max_connections=100)
        super().__init__(base_url=url, timeout=PATIENCE_S, trust_env=False, limits=limits)
        self.url = url
        self.front = front
        self._core = core

    @property
    def core(self) -> LLMApp:
        assert self._core is not None
        return self._core

    def chat(
        self, text: str = "hi", *, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        return self.post("/v1/chat/completions", json=chat(text, **fields), headers=headers)

    def together(self, count: int, send: Callable[[], httpx.Response]) -> Callable[[], list[httpx.Response]]:
        """Send ``count`` requests at once; what collects their answers."""
        pool = ThreadPoolExecutor(count)
        futures = [pool.submit(send) for _ in range(count)]
        pool.shutdown(wait=False)
        return lambda: [future.result(PATIENCE_S) for future in futures]


class AsgiServer:
    """uvicorn in a thread. ``app``: what answers."""

    front = "asgi"

    def __init__(self, app: App = None, **settings: Any) -> None:
        self.app = app
        self.loop: asyncio.AbstractEventLoop
        listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        settings = {"lifespan": "off", "ws": "none", "log_level": "error", **settings}
        self._server = uvicorn.Server(uvicorn.Config(self._answer, interface="asgi3", **settings))
        self._thread = threading.Thread(target=self._run, args=([listening],), daemon=True)
        self._thread.start()
        until(lambda: self._server.started, "uvicorn has started")

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)

    def _run(self, sockets: list[socket.socket]) -> None:
        with asyncio.Runner() as runner:
            self.loop = runner.get_loop()
            runner.run(self._server.serve(sockets))
            runner.run(asyncio.sleep(0))  # connections that are being closed are, one turn later

    def run(self, work: Awaitable[object]) -> object:
        """The result of ``work`` on the server's own loop."""

        async def waited() -> object:
            return await work

        return asyncio.run_coroutine_threadsafe(waited(), self.loop).result(PATIENCE_S)

    def sub_app(self, *args: Any, **options: Any) -> App:
        return asgi_app(*args, **options)

    def close(self, app: App) -> None:
        self.run(app.aclose())

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: object) -> None:  # noqa: A002 - werkzeug's name
        """Nobody reads it."""


class WsgiServer:
    """werkzeug's server, a thread for each connection. ``app``: what answers."""

    front = "wsgi"

    def __init__(self) -> None:
        self.app: App = None
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def _answer(self, environ: Any, start_response: Any) -> Any:
        return self.app(environ, start_response)

    def sub_app(self, *args: Any, **options: Any) -> App:
        return wsgi_app(*args, **options)

    def close(self, app: App) -> None:
        app.close()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE_S)


Server = AsgiServer | WsgiServer
Serve = Callable[..., Client]


def _running(kind: type[Any]) -> Iterator[Any]:
    server = kind()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def asgi_server() -> Iterator[AsgiServer]:
    yield from _running(AsgiServer)


@pytest.fixture(scope="session")
def wsgi_server() -> Iterator[WsgiServer]:
    yield from _running(WsgiServer)


@pytest.fixture(params=["asgi", "wsgi"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as made:
        yield made


@pytest.fixture
def served(server: Server, upstream: FakeUpstream) -> Iterator[Serve]:
    """``served(**sections)``: a client of the sub-app of that `config`. ``mount``: from the sub-app to the
    host that is served in its place; ``options``: of ``llm_app``."""
    clients: list[Client] = []
    apps: list[App] = []

    def serve(
        *,
        mount: Callable[[App], App] | None = None,
        options: Mapping[str, Any] | None = None,
        **sections: Any,
    ) -> Client:
        app = server.sub_app(config(upstream, **sections), **(options or {}))
        apps.append(app)
        server.app = app if mount is None else mount(app)
        clients.append(Client(server.url, server.front, app.core))
        return clients[-1]

    yield serve
    upstream.release()
    for client in clients:
        client.close()
    for app in apps:
        server.close(app)
