"""The wire side of `llm_middleware.testing.FakeUpstream`: sockets, framing, and noticing who left."""

from __future__ import annotations

import json
import math
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from ._fake_items import messages, responses
from ._fake_payloads import (
    Answer,
    Builder,
    Stamp,
    chat,
    embeddings,
    models,
    parse_multipart,
    text_completion,
    transcription,
)
from .errors import InvalidRequestError

if TYPE_CHECKING:
    from .testing import FakeUpstream

__all__ = ["Call", "Failure", "FakeServer"]

_BUILDERS: Mapping[str, Builder] = {
    "/chat/completions": chat,
    "/completions": text_completion,
    "/embeddings": embeddings,
    "/audio/transcriptions": transcription,
    "/responses": responses,
    "/messages": messages,
}

_STATUSES = frozenset(HTTPStatus)


@dataclass(frozen=True, slots=True)
class Call:
    """One request as the upstream received it. Header names are lower-case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        """The fields of the body, of a JSON object or of a multipart form (files as bytes)."""
        content_type = self.headers.get("content-type", "")
        if content_type.startswith("multipart/form-data"):
            return parse_multipart(content_type, self.body)
        value = json.loads(self.body)
        if not isinstance(value, dict):
            raise ValueError(f"the body is not a JSON object but {type(value).__name__}")
        return value


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer that was put in the way of a request."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class _ClientGone(Exception):  # noqa: N818 - not an error
    """The client closed its end before the answer was over."""


class FakeServer(ThreadingHTTPServer):
    """Threads that end with the server: `stop` closes their connections and waits for them."""

    request_queue_size = 1024
    daemon_threads = True

    def __init__(self, upstream: FakeUpstream, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.upstream = upstream
        self.stopping = False
        self._open: set[socket.socket] = set()
        self._closed = threading.Condition()

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        with self._closed:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        super().shutdown_request(request)
        with self._closed:
            self._open.discard(request)
            self._closed.notify_all()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the game; anything else is a bug worth its traceback."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def stop(self) -> None:
        """Close the listener and every connection, and wait for the threads that served them."""
        self.stopping = True
        self.shutdown()
        self.server_close()
        with self._closed:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._closed.wait_for(lambda: not self._open, 5.0)


class _Handler(BaseHTTPRequestHandler):
    """One connection. Answers are written whole, head and body together; streams event by event."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing: the calls are on record."""

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_GET  # noqa: N815

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(self.command, self.path, headers, self._read_body(headers))
        upstream = self.server.upstream
        failure, stamp = upstream.arrived(call)
        status, answer = _answer(call, stamp, upstream.stream_events)
        extra = {"x-request-id": f"req_{stamp.token}"}
        if failure is not None:
            status, answer, extra = failure.status, Answer((failure.body,)), {**extra, **failure.headers}
        try:
            self._pause(upstream.latency)
            if answer.streamed:
                self._stream(answer, extra)
            else:
                self._wait_while_held(math.inf)
                self._write_head(status, {"content-type": answer.content_type, **extra}, answer.chunks[0])
        except (_ClientGone, ConnectionError):
            self.close_connection = True
            if answer.streamed and not self.server.stopping:
                upstream.left()

    def _stream(self, answer: Answer, extra: Mapping[str, str]) -> None:
        """Send the events one by one, each in an HTTP chunk of its own."""
        upstream = self.server.upstream
        cut = upstream.next_cut()
        self._wait_while_held(0)
        kind = {"content-type": answer.content_type, "cache-control": "no-cache"}
        self._write_head(200, {**kind, **extra, "transfer-encoding": "chunked"})
        for sent, event in enumerate(answer.chunks):
            if sent:
                self._pause(upstream.chunk_delay)
                self._wait_while_held(sent)
            if sent == cut:
                break
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
        if cut is not None and cut <= len(answer.chunks):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _write_head(self, status: int, headers: Mapping[str, str], body: bytes | None = None) -> None:
        """Head and body in one write: `send_response` and its kin would make it two packets."""
        phrase = HTTPStatus(status).phrase if status in _STATUSES else "Unknown"
        lines = [f"HTTP/1.1 {status} {phrase}", f"date: {self.date_time_string()}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body is not None:
            lines.append(f"content-length: {len(body)}")
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""))

    def _wait_while_held(self, sent: float) -> None:
        while self.server.upstream.is_held(sent, wait=0.02):
            self._pause(0)

    def _pause(self, seconds: float) -> None:
        """Let time pass, but raise `_ClientGone` as soon as the client hangs up."""
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            if not selector.select(seconds):
                return
        if not self.connection.recv(1, socket.MSG_PEEK):
            raise _ClientGone
        time.sleep(max(0.0, until - time.monotonic()))  # a pipelined request woke us too early

    def _read_body(self, headers: Mapping[str, str]) -> bytes:
        if "chunked" not in headers.get("transfer-encoding", ""):
            return self._read(int(headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0] or b"0", 16):
            body += self._read(size + 2)[:-2]
        while self.rfile.readline().strip():
            """Trailers: read past."""
        return body

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionResetError("the client left in the middle of its request")
        return data


def _answer(call: Call, stamp: Stamp, pieces: int) -> tuple[int, Answer]:
    """Status and answer to a request, as the API would give them."""
    path = call.path.partition("?")[0].removeprefix("/v1")
    if call.method == "GET" and path == "/models":
        return 200, models(stamp.created)
    builder = _BUILDERS.get(path)
    if builder is None or call.method != "POST":
        return 404, Answer((InvalidRequestError(f"Invalid URL ({call.method} {call.path})").body(),))
    try:
        return 200, builder(call.json, stamp, pieces)
    except InvalidRequestError as error:
        return error.status, Answer((error.body(),))
    except ValueError as error:
        return 400, Answer((InvalidRequestError(f"cannot parse the body: {error}").body(),))
