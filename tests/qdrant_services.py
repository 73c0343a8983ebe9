"""The Qdrant of the tests, in a process of its own on a free port: see `tests.servers.qdrant_edge`."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import sys
import tempfile
import threading
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from qdrant_client import QdrantClient

from tests.services import telling_port

__all__ = ["API_KEY", "QdrantServer", "answering", "qdrant_server"]

ROOT = Path(__file__).parents[1]
API_KEY = "key-of-qdrant-7f3a"
START_S = 60.0


@dataclass(frozen=True, slots=True)
class QdrantServer:
    """A running server."""

    port: int
    api_key: str = API_KEY

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """Qdrant's own client, to see what is there, and to do what others would."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would have TLS for an API key
            client = QdrantClient(url=self.url, api_key=self.api_key, check_compatibility=False, timeout=30)
        try:
            yield client
        finally:
            client.close()

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """The result of one request."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"api-key": self.api_key, "content-type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=START_S) as response:
            return json.load(response)["result"]

    def empty(self, *names: str) -> None:
        """Remove all points of these collections: sooner done than to make others."""
        for name in set(names) & {each["name"] for each in self.ask("GET", "/collections")["collections"]}:
            self.ask("POST", f"/collections/{name}/points/delete?wait=true", {"filter": {"must": []}})

    def drop(self, name: str) -> None:
        self.ask("DELETE", f"/collections/{name}")


@contextlib.contextmanager
def qdrant_server(*options: str) -> Iterator[QdrantServer]:
    """Start a server, with options of `tests.servers.qdrant_edge`, and stop it at the end."""
    command = [sys.executable, "-m", "tests.servers.qdrant_edge", "--api-key", API_KEY, *options]
    # In memory where that can be had: the engine waits for its disk, and nothing there is worth keeping.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="qdrant-", dir=place) as home,
        telling_port(command, {**os.environ, "TMPDIR": home}, ROOT) as (port, _),
    ):
        yield QdrantServer(port)


@contextlib.contextmanager
def answering(status: int, body: bytes, tls: ssl.SSLContext | None = None, **headers: str) -> Iterator[str]:
    """The URL of a server that answers every request with the same; ``tls``: over HTTPS."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *args: None  # type: ignore[method-assign]  # who does not trust it
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
