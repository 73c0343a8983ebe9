"""`StdlibClient`: a process's client for its threads, with nothing but the standard library.

Every wait ends in time: what a call may still wait is set anew before each read from the socket, in the head
of an answer as in its body. Only the system's name resolution cannot be left early.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain
from typing import Any, Final, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from ..errors import DeadlineError, LLMMiddlewareError
from ..providers.messages import Outgoing, Reply, Timeouts
from .http_answer import Answer
from .http_decode import HAS_BROTLI, Decoder, decoder
from .http_errors import (
    broken_off,
    deadline_passed,
    earlier,
    monotonic_end,
    no_answer,
    no_connection,
    unreachable,
    unsendable,
)
from .http_pool import Pool
from .http_reply import IteratedReply
from .http_settings import HTTPSettings, Route, base_headers, basic

__all__ = ["StdlibClient"]

_SMALL: Final = 2**16  # bytes of a body that goes out in one piece with its head


class _Origin(NamedTuple):
    """Where a connection leads."""

    scheme: str
    host: str
    port: int
    proxy: str | None


class _Place(NamedTuple):
    """What a URL says."""

    scheme: str
    host: str
    port: int
    authority: str
    target: str
    credentials: str | None


@lru_cache(256)
def _place(url: str) -> _Place:
    """`ValueError` for what is no URL of HTTP."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    authority = parts.netloc.rpartition("@")[2]
    port = parts.port or _default(parts.scheme)
    return _Place(parts.scheme, parts.hostname, port, authority, target, _credentials(parts))


def _default(scheme: str) -> int:
    return 443 if scheme == "https" else 80


class _Connection:
    """One connection, and the limits of the call that has it."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.timeouts = Timeouts()
        self.until: float | None = None

    def wait_no_longer(self) -> None:
        """Have the socket wait for as long as the call may still. `DeadlineError` where it may not."""
        until, read = self.until, self.timeouts.read
        if until is None:
            self.sock.settimeout(read)
            return
        left = earlier(read, until)
        if left is None or left <= 0:
            raise deadline_passed(self.timeouts)
        self.sock.settimeout(left)

    def late(self) -> DeadlineError:
        over = self.until is not None and time.monotonic() >= self.until - 0.001
        return (deadline_passed if over else no_answer)(self.timeouts)

    def receive(self, most: int) -> bytes:
        """What comes, none at the end. `DeadlineError`."""
        self.wait_no_longer()
        try:
            data: bytes = self.sock.recv(most)
        except TimeoutError:
            raise self.late() from None
        return data

    def close(self) -> None:
        self.sock.close()


class StdlibClient:
    """One process's client."""

    def __init__(self, settings: HTTPSettings, route: Route) -> None:
        self._route = route
        self._headers = base_headers(HAS_BROTLI)
        self._pool: Pool[_Origin, _Connection] = Pool(settings.max_connections, settings.keepalive)

    def send(self, request: Outgoing, timeouts: Timeouts) -> Reply:
        until = monotonic_end(timeouts)
        try:
            place = _place(request.url)
        except ValueError as exc:
            raise unreachable(exc) from None
        proxy = self._route.proxy(place.scheme, place.authority)
        head = self._head(request, place, proxy)
        origin = _Origin(place.scheme, place.host, place.port, proxy)
        connection = self._connection(origin, timeouts, until)
        try:
            connection.timeouts, connection.until = timeouts, until
            return _Reply(_exchange(connection, head, request), connection, origin, self._pool)
        except LLMMiddlewareError:
            self._pool.drop(connection)
            raise
        except (OSError, ValueError) as exc:
            self._pool.drop(connection)
            raise broken_off(exc) from None
        except BaseException:
            self._pool.drop(connection)
            raise

    def _head(self, request: Outgoing, place: _Place, proxy: str | None) -> bytes:
        absolute = proxy is not None and place.scheme == "http"
        target = f"http://{place.authority}{place.target}" if absolute else place.target
        headers = {"host": place.authority, **self._headers, **request.headers}
        if place.credentials is not None:
            headers.setdefault("authorization", place.credentials)
        headers["content-length"] = str(len(request.body))
        if absolute and proxy is not None:
            headers.update(_proxy_credentials(proxy))
        lines = [f"{request.method} {target} HTTP/1.1", *(f"{name}: {headers[name]}" for name in headers)]
        text = "\r\n".join(lines) + "\r\n\r\n"
        if text.count("\n") != len(lines) + 1 or text.count("\r") != len(lines) + 1 or " " in target:
            raise unsendable()
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError:
            raise unsendable() from None

    def _connection(self, origin: _Origin, timeouts: Timeouts, until: float | None) -> _Connection:
        """An idle one or another; `connect` holds for the wait for either."""
        before = until
        if timeouts.connect is not None:
            limit = time.monotonic() + timeouts.connect
            before = limit if until is None else min(limit, until)
        try:
            found = self._pool.take(origin, before)
            if found is not None:
                return found
            try:
                return _Connection(_dial(origin, self._route, before))
            except BaseException:
                self._pool.drop(None)
                raise
        except LLMMiddlewareError:
            raise
        except TimeoutError:
            raise (deadline_passed if before == until else no_connection)(timeouts) from None
        except (OSError, ValueError) as exc:
            raise unreachable(exc) from None

    def close(self) -> None:
        self._pool.close()


def _exchange(connection: _Connection, head: bytes, request: Outgoing) -> Answer:
    """Send the request and read the head of the answer."""
    body = request.body
    connection.wait_no_longer()
    try:
        if not isinstance(body, bytes):
            for piece in chain((head,), body.pieces()):
                connection.wait_no_longer()
                connection.sock.sendall(piece)
        elif len(body) <= _SMALL:
            connection.sock.sendall(head + body)
        else:
            connection.sock.sendall(head)
            connection.sock.sendall(body)
    except TimeoutError:
        raise connection.late() from None
    except (BrokenPipeError, ConnectionResetError):
        pass  # who refuses a request half-way may have said why
    return Answer(connection.receive, request.method)


def _left(before: float | None) -> float | None:
    """`TimeoutError` where nothing is left."""
    left = earlier(None, before)
    if left is not None and left <= 0:
        raise TimeoutError
    return left


def _dial(origin: _Origin, route: Route, before: float | None) -> Any:
    """A socket that leads to the provider, through the proxy and encrypted where that is so."""
    context = route.tls if origin.scheme == "https" else None
    if origin.proxy is None:
        sock = _connect(origin.host, origin.port, before)
    else:
        parts = urlsplit(origin.proxy)
        sock = _connect(parts.hostname or "", parts.port or _default(parts.scheme), before)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            if origin.proxy is not None:
                _tunnel(sock, origin, before)
            sock.settimeout(_left(before))
            return context.wrap_socket(sock, server_hostname=origin.host)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect(host: str, port: int, before: float | None) -> socket.socket:
    """To the first of the host's addresses that accepts."""
    trouble: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
        left = _left(before)
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(left)
            sock.connect(address)
            return sock
        except OSError as exc:
            sock.close()
            trouble = exc
        except BaseException:
            sock.close()
            raise
    raise trouble or OSError


def _tunnel(sock: socket.socket, origin: _Origin, before: float | None) -> None:
    """Have the proxy connect to the provider."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    lines = [f"CONNECT {host}:{origin.port} HTTP/1.1", f"host: {host}:{origin.port}"]
    lines += [f"{name}: {value}" for name, value in _proxy_credentials(origin.proxy or "").items()]
    connection = _Connection(sock)
    connection.timeouts, connection.until = Timeouts(read=None), before
    try:
        connection.wait_no_longer()
        sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        answer = Answer(connection.receive, "CONNECT")
    except DeadlineError:
        raise TimeoutError from None
    if answer.status != 200:
        raise ConnectionRefusedError


def _credentials(parts: SplitResult) -> str | None:
    return basic(parts.username and unquote(parts.username), unquote(parts.password or ""))


def _proxy_credentials(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy)
    value = _credentials(parts)
    if value is None:
        return {}
    return {"proxy-authorization": value}


class _Reply(IteratedReply):
    """A `Reply` whose coroutines never suspend, and the iterator over its own body."""

    __slots__ = ("_answer", "_connection", "_decoder", "_origin", "_pool", "headers", "status")

    def __init__(
        self, answer: Answer, connection: _Connection, origin: _Origin, pool: Pool[_Origin, _Connection]
    ) -> None:
        self._answer = answer
        self._connection: _Connection | None = connection
        self._origin = origin
        self._pool = pool
        self.status = answer.status
        self.headers: Mapping[str, str] = answer.headers
        encoding = self.headers.get("content-encoding")
        self._decoder: Decoder | None = None if encoding is None else decoder(encoding)

    async def read(self) -> bytes:
        pieces = []
        while piece := self._next():
            pieces.append(piece)
        return b"".join(pieces)

    async def __anext__(self) -> bytes:
        if piece := self._next():
            return piece
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self._leave()

    def _next(self) -> bytes:
        """What comes next; nothing at the end, and then the connection is given back."""
        try:
            while self._connection is not None:
                data = self._answer.next()
                if not data:
                    self._finish()
                elif plain := data if self._decoder is None else self._decoder.decode(data):
                    return plain
        except LLMMiddlewareError:
            self._leave()
            raise
        except (OSError, ValueError) as exc:
            self._leave()
            raise broken_off(exc) from None
        except BaseException:
            self._leave()
            raise
        return b""

    def _finish(self) -> None:
        if self._decoder is not None:
            self._decoder.finish()
        self._leave()

    def _leave(self) -> None:
        """Give the connection back, or drop it."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._answer.ended and self._answer.reusable:
            self._pool.give(self._origin, connection)
        else:
            self._pool.drop(connection)
