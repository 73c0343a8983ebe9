"""One deadline for all that a blocking Redis operation does: connect, shake hands, ask a sentinel, read.

redis-py's own timeouts hold for one read each, so a server that sends a byte now and then is waited for
without end, and a first connection through three hung sentinels takes three times the timeout. Here a
thread says how long its operation may take (`begin`), and every socket made by a `timed` connection class
waits no longer than what is left of it. After its `end` the socket's own timeout holds, as ever.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Any, Final

from ..errors import StoreError

__all__ = ["Turns", "begin", "end", "remaining", "timed", "waiting_for"]

_SLACK: Final = 1.1  # a limit that is a tenth too long is not worth a system call per read
_thread = threading.local()


def begin(seconds: float) -> float | None:
    """What this thread does until `end` is over in ``seconds``. Returns the outer deadline, which stays if it
    is earlier, for `end`."""
    outer: float | None = getattr(_thread, "ends", None)
    ends = time.monotonic() + seconds
    _thread.ends = ends if outer is None or ends < outer else outer
    return outer


def end(outer: float | None) -> None:
    """What began is over; the outer deadline holds again."""
    _thread.ends = outer


def remaining() -> float | None:
    """Seconds left to this thread, never below zero; None where there is no deadline."""
    ends = getattr(_thread, "ends", None)
    return None if ends is None else max(0.0, ends - time.monotonic())


class Turns:
    """A semaphore that is waited for no longer than the thread's deadline; a tenth of the stdlib's cost."""

    def __init__(self, count: int) -> None:
        self._free: SimpleQueue[None] = SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    def take(self) -> None:
        """`StoreError` where the deadline passes first."""
        try:
            self._free.get_nowait()
        except Empty:
            self._wait()

    def give(self) -> None:
        self._free.put(None)

    def _wait(self) -> None:
        try:
            self._free.get(timeout=remaining())
        except Empty:
            raise StoreError("redis: no free connection in time") from None


@contextlib.contextmanager
def waiting_for(lock: threading.Lock) -> Iterator[None]:
    """Hold ``lock``. `StoreError` where the thread's deadline passes first."""
    left = remaining()
    if not lock.acquire(timeout=-1 if left is None else left):
        raise StoreError("redis: still connecting")
    try:
        yield
    finally:
        lock.release()


def _allowed(timeout: float | None) -> float | None:
    """The shorter of ``timeout`` and what is left, to a tenth. TimeoutError where nothing is left."""
    left = remaining()
    if left is None or (timeout is not None and timeout <= left * _SLACK):
        return timeout
    if not left:
        raise TimeoutError("the time for this operation is over")
    return left


class TimedSocket:
    """A socket, plain or TLS, whose reads and writes also end with the thread's deadline."""

    __slots__ = ("_set", "_sock", "_timeout", "fileno")

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        self._sock = sock
        self._timeout = timeout  # what redis-py asked for
        self._set = sock.gettimeout()  # what the socket has
        self.fileno = sock.fileno

    def settimeout(self, timeout: float | None) -> None:
        self._timeout = timeout

    def recv(self, size: int, flags: int = 0) -> bytes:
        self._limit()
        return self._sock.recv(size, flags)

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        self._limit()
        return self._sock.recv_into(buffer, size, flags)

    def sendall(self, data: Any, flags: int = 0) -> None:
        self._limit()
        self._sock.sendall(data, flags)

    def _limit(self) -> None:
        timeout = self._timeout if self._timeout == 0 else _allowed(self._timeout)
        if timeout != self._set:
            self._sock.settimeout(timeout)
            self._set = timeout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class _Timed:
    """Mixed into redis-py's blocking connection classes."""

    socket_timeout: float | None
    socket_connect_timeout: float | None

    def _connect(self) -> TimedSocket:
        reading, connecting = self.socket_timeout, self.socket_connect_timeout
        try:
            # A TLS handshake is timed by ``socket_timeout``.
            self.socket_connect_timeout = _allowed(connecting)
            self.socket_timeout = _allowed(reading)
            sock = super()._connect()  # type: ignore[misc]
        finally:
            self.socket_timeout, self.socket_connect_timeout = reading, connecting
        return TimedSocket(sock, reading)


@functools.cache
def timed(connection_class: type) -> type:
    """A blocking connection class of redis-py that keeps to the thread's deadline."""
    return type(f"Timed{connection_class.__name__}", (_Timed, connection_class), {})
