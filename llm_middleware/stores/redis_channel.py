"""`RedisChannel`: one process's ear on one pub/sub channel of a Redis: a thread and a connection of its own.

Rules:

* a process listens for itself: a forked child never reads from its parent's connection nor closes it, and
  neither does a thread that came along with a fork (gevent's do);
* silence is told from death by a PING in every heartbeat without traffic, and an answer within the next;
* a server that answers may still be the wrong one: messages are published at the master that the sentinels
  name, and at nodes of the Cluster. So those are asked now and then;
* whatever fails is tried again for as long as the channel is open.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from .redis_clients import close_sync_client, sync_client
from .redis_connect import RedisConnection
from .redis_deadline import begin, end, remaining

__all__ = ["RedisChannel"]

logger = logging.getLogger("llm_middleware")

_NAME: Final = "llm-middleware-redis-channel"
# Seconds from a failure to the next attempt, less up to a half.
_FASTEST: Final = 0.05
_SLOWEST: Final = 2.0
_PATIENCE: Final = 1.0  # seconds to connect and subscribe, and for the thread to end
# Heartbeats from one look at where to listen to the next. A Cluster's answer names all of its nodes.
_LOOKS: Final = {"sentinel": 1, "cluster": 10}
# What parents listened with. Held, since what the garbage collector finds it closes.
_INHERITED: Final[list[_Ear]] = []


class RedisChannel:
    """Calls ``told(data)`` for each message on the channel ``name``, once `listen` was called.

    ``gap()`` is called when messages may have been lost: with each subscription but the first, before
    ``live`` is True again. The first one of a forked child counts as another where its parent was subscribed,
    and so does the one after `close`. Both are called on the listening thread, which waits for them; what
    they raise is logged, the first time for each. ``heartbeat``: seconds. Nothing here raises for what Redis
    does. The thread ends with `close` or the process.
    """

    def __init__(
        self,
        connection: RedisConnection,
        name: str,
        *,
        told: Callable[[bytes], None],
        gap: Callable[[], None],
        heartbeat: float = 1.0,
    ) -> None:
        self.connection = connection
        self.name = name
        self.told = told
        self.gap = gap
        self.heartbeat = heartbeat
        self.subscribed_before = False
        self._ear: _Ear | None = None
        self._locks: dict[int, threading.Lock] = {}

    @property
    def live(self) -> bool:
        """Whether this process is subscribed at this moment. Two heartbeats late at most."""
        ear = self._ear
        return ear is not None and ear.live and ear.pid == os.getpid()

    def listen(self) -> None:
        """Listen from now on, if this process does not yet. Returns at once."""
        ear = self._ear
        if ear is None or ear.pid != os.getpid() or ear.ended:
            self._start()

    def close(self) -> None:
        """Stop listening: no call to ``told`` or ``gap`` begins after this. Waits a second at most for one
        that is under way, or for a connection being made."""
        with self._lock():
            ear = self._ear
            if ear is None or ear.pid != os.getpid():
                return
            self._ear = None
        ear.stop()

    def _start(self) -> None:
        with self._lock():
            ear, pid = self._ear, os.getpid()
            if ear is not None and ear.pid != pid:
                _INHERITED.append(ear)
            elif ear is not None and not ear.ended:
                return
            ear = _Ear(self)
            try:
                ear.thread.start()
            except RuntimeError as exc:  # no more threads, or the interpreter is about to exit
                logger.debug("the Redis channel %s is not heard: %s", self.name, exc)
                ear = None
            self._ear = ear

    def _lock(self) -> threading.Lock:
        """This process's own: one that another thread held at a fork is never released in the child."""
        return self._locks.setdefault(os.getpid(), threading.Lock())


class _Ear:
    """The thread of one process, from a `listen` to the next `close`."""

    def __init__(self, channel: RedisChannel) -> None:
        self.pid = os.getpid()
        self.live = False
        self.ended = False
        self.thread = threading.Thread(target=self._run, name=_NAME, daemon=True)
        self._channel = channel
        self._heartbeat = channel.heartbeat
        self._stopped = threading.Event()
        self._line: _Line | None = None
        self._avoided = ""  # the node at which listening failed last
        self._failures = 0
        self._logged: set[str] = set()

    def stop(self) -> None:
        """Have the thread end, and wait for that."""
        self._stopped.set()
        line = self._line
        if line is not None:
            line.wake()
        if self.thread is not threading.current_thread():
            self.thread.join(_PATIENCE)

    def _goes_on(self) -> bool:
        return not self._stopped.is_set() and self.pid == os.getpid()

    def _run(self) -> None:
        try:
            while self._goes_on():
                pause = self._attempt()
                if pause and self._goes_on():
                    self._stopped.wait(pause)
        finally:
            self.ended = True
            if self.pid != os.getpid():
                # A thread of gevent's, in a child that knows nothing of it: its end would be an error.
                threading.Event().wait()

    def _attempt(self) -> float:
        """Listen until that fails, or is better done elsewhere; seconds until the next attempt."""
        channel = self._channel
        line = self._line = _Line(channel.connection, channel.name, self._goes_on)
        try:
            line.open(self._avoided)
            self._subscribed()
            self._hear(line)
            return 0.0
        except Exception as exc:
            self._avoided = line.node
            return self._failed(exc) if self._goes_on() else 0.0
        finally:
            self.live = False
            if self.pid == os.getpid():
                self._line = None
                line.close()

    def _subscribed(self) -> None:
        channel = self._channel
        again, channel.subscribed_before = channel.subscribed_before, True
        if again and self._goes_on():
            self._call("gap", channel.gap)
        self.live = True

    def _hear(self, line: _Line) -> None:
        """Pass on what is heard. Returns where this is no longer the place, raises where the line is dead."""
        now = time.monotonic()
        settled, look = now + self._heartbeat, now + self._heartbeat * line.looks
        while self._goes_on():
            reply = line.next(self._heartbeat)
            if reply is None and self._goes_on():
                line.ping()
                reply = line.next(self._heartbeat)
                if reply is None and self._goes_on():
                    raise TimeoutError(f"no answer to PING within {self._heartbeat} s")
            if isinstance(reply, list) and reply[0] == b"message":
                self._call("told", self._channel.told, reply[2])
            now = time.monotonic()
            if now >= settled:
                # Not before: a server that hangs up at once is not asked again at once, time after time.
                self._failures = 0
                self._logged.difference_update(("lost", "refused"))
            if now >= look and self._goes_on():
                if line.misplaced():
                    return
                look = time.monotonic() + self._heartbeat * line.looks

    def _call(self, name: str, function: Callable[..., None], *args: bytes) -> None:
        try:
            function(*args)
        except Exception:
            if self._first(name):
                logger.exception("the Redis channel %s: %s failed", self._channel.name, name)

    def _failed(self, exc: Exception) -> float:
        """Log the first failure of a row, and the first of them that was the server's word."""
        refused, reason = _is_refusal(exc), self._reason(exc)
        if self._first("refused" if refused else "lost"):
            logger.warning("the Redis channel %s is not heard for now: %s", self._channel.name, reason)
        pause = _SLOWEST if refused else min(_SLOWEST, _FASTEST * 2 ** min(self._failures, 10))
        self._failures += 1
        return pause * random.uniform(0.5, 1.0)

    def _first(self, what: str) -> bool:
        """Whether to log this: once, and nothing when the interpreter is about to exit."""
        first = what not in self._logged
        self._logged.add(what)
        return first and threading.main_thread().is_alive()

    def _reason(self, exc: Exception) -> str:
        """What went wrong, with no secret. A token that was refused is not used again."""
        try:
            self._channel.connection.fail(exc, _PATIENCE)
        except Exception as error:
            return str(error)


class _Line:
    """One subscribed connection, in no pool, and the client that knows where to make it.

    ``goes_on``: asked after each wait, before the connection is touched again.
    """

    def __init__(self, connection: RedisConnection, name: str, goes_on: Callable[[], bool]) -> None:
        self.node = ""  # in a Cluster, where this listens
        self.looks: float = _LOOKS.get(connection.settings.topology, float("inf"))
        self._owner = connection
        self._name = name
        self._goes_on = goes_on
        self._client: Any = None
        self._connection: Any = None

    def open(self, avoided: str) -> None:
        """Connect and subscribe; in a Cluster at any node, at ``avoided`` only if there is no other."""
        outer = begin(max(_PATIENCE, self._owner.budget))
        try:
            process = self._owner.mine()
            if process.tokens is not None:
                process.tokens.wait()
            self._client = sync_client(self._owner.settings, process.arguments)
            self._connection = self._pool(avoided).make_connection()
            self._connection.connect()
            self._connection.send_command("SUBSCRIBE", self._name, check_health=False)
            if self.next(remaining() or 0.0) is None:
                raise TimeoutError("no answer to SUBSCRIBE")
        finally:
            end(outer)

    def _pool(self, avoided: str) -> Any:
        if not self._owner.clustered:
            return self._client.connection_pool
        nodes = self._client.get_nodes()
        node = random.choice([node for node in nodes if node.name != avoided] or nodes)
        self.node = node.name
        return self._client.get_redis_connection(node).connection_pool

    def next(self, seconds: float) -> Any:
        """The next reply or message; None where none comes within ``seconds``, or it goes on no more."""
        from redis.exceptions import TimeoutError as NothingYet

        until = time.monotonic() + seconds
        while True:
            # What is there is read without a wait: all waiting is done where nothing is read.
            with contextlib.suppress(NothingYet):
                return self._connection.read_response(timeout=0, disconnect_on_error=False, push_request=True)
            left = until - time.monotonic()
            if left <= 0 or not _readable(self._connection._sock, left) or not self._goes_on():
                return None

    def ping(self) -> None:
        self._connection.send_command("PING", check_health=False)

    def misplaced(self) -> bool:
        """Whether messages are published elsewhere by now. False where nobody says."""
        outer = begin(self._owner.budget)
        try:
            if self._owner.clustered:
                self._client.nodes_manager.initialize()
                return self._client.get_node(node_name=self.node) is None
            master = self._client.connection_pool.get_master_address()
            return bool(master != (self._connection.host, self._connection.port))
        except Exception:  # what cannot be asked is no reason to leave a server that answers
            return False
        finally:
            end(outer)

    def wake(self) -> None:
        """End a wait; from another thread. Closing would leave the thread with another's descriptor."""
        with contextlib.suppress(Exception):
            self._connection._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            if self._connection is not None:
                self._connection.disconnect()
        with contextlib.suppress(Exception):
            if self._client is not None:
                close_sync_client(self._client)


def _is_refusal(exc: Exception) -> bool:
    """Whether the server answered, and the answer is an error."""
    try:
        from redis.exceptions import AuthenticationError, AuthorizationError, ResponseError
    except ImportError:
        return False
    return isinstance(exc, AuthenticationError | AuthorizationError | ResponseError)


def _readable(sock: Any, seconds: float) -> bool:
    """Whether there is something to read within ``seconds``, be it the end."""
    if not hasattr(select, "poll"):  # Windows, where a descriptor may have any number
        return bool(select.select([sock], [], [], seconds)[0])
    poller = select.poll()
    poller.register(sock.fileno(), select.POLLIN)
    return bool(poller.poll(seconds * 1000))
