"""`RedisLeases`: leases in a Redis, so that among all processes that use it one leads the call for a key.

Rules that hold here:

* A lease is a key with a random token and a short time to live. Whoever set it where nothing was has it; who
  else asks learns that and, by the same round trip, whether the answer is there already.
* A lease that is held is extended every third of its time by a thread, so it outlives any call, and no dead
  process by more than its time. Only its owner extends or deletes it: a script compares the token.
* The thread never waits for a Redis longer than the connection's budget (in a Cluster: for each node that
  hangs). A heartbeat that fails is made up for by the next one, a release that fails by the lease's end.
* What is held, and the thread, belong to a process: a forked child has nothing and starts its own.

A release may come from an event loop or a finalizer, so nothing here waits for a lock: what threads share is
changed by single operations that are atomic.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Final, NamedTuple

from ..errors import ConfigError, StoreError
from .per_process import PerProcess
from .redis_connect import RedisConnection

__all__ = ["RedisLeases", "lease_name"]

logger = logging.getLogger("llm_middleware")

_THREAD: Final = "llm-middleware-redis-leases"
_BEATS: Final = 3  # in the life of a lease: one may fail, and one be late
_JOIN: Final = 1.0  # seconds that `RedisLeases.close` waits for the thread

_Held = tuple[str, str]  # a lease and its token
_Call = tuple[str | bytes | int, ...]  # of a script: a lease, its token and what else it takes


class _Script(NamedTuple):
    body: str
    sha: str


def _script(body: str) -> _Script:
    return _Script(body, hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest())


_EXTEND: Final = _script(
    "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end"
    " return redis.call('PEXPIRE', KEYS[1], ARGV[2])"
)
_RELEASE: Final = _script(
    "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end redis.call('DEL', KEYS[1])"
    " if ARGV[3] then redis.call('PUBLISH', ARGV[2], ARGV[3]) end return 1"
)


def lease_name(key: str, form: str) -> str:
    """Where the lease for the cache key ``key`` lies, one for each ``form`` in which its call may be made.

    In a Cluster that is the key's slot, unless the key itself has braces.
    """
    return f"{{{key}}}:lease:{form}"


class RedisLeases:
    """Leases of ``seconds`` in the Redis of ``connection``. One object serves all threads and event loops.

    ``channel``: where a release says what it is told to say. `claim` and `aclaim` raise `StoreError`,
    nothing else here raises. Close it before the connection. `ConfigError` for seconds that are none.
    """

    def __init__(self, connection: RedisConnection, *, seconds: float = 5.0, channel: str) -> None:
        if not 0 < seconds < math.inf:
            raise ConfigError(f"seconds: expected a number > 0, got {seconds!r}", param="seconds")
        self._connection = connection
        self._seconds = seconds
        self._milliseconds = math.ceil(seconds * 1e3)
        self._channel = channel
        self._keepers = PerProcess(
            lambda: _Keeper(self._connection, self._seconds / _BEATS, self._milliseconds)
        )

    def claim(self, key: str, lease: str) -> tuple[str | None, bytes | None]:
        """Try to get ``lease``: its token, or None where another has it; and the value under ``key``, if any.

        A token and no value: nobody stored one before the claim, and it is for the caller to make it. What
        was claimed is held until its `release`, which a caller owes even if it fails. One round trip.
        """
        with self._claiming(lease) as (keeper, token):
            with self._connection.use() as client:
                won, value = self._asked(client, key, lease, token).execute()
                if won and value is None and self._apart(key, lease):
                    value = client.execute_command("GET", key)
            if won:
                keeper.hold(lease, token)
        return token if won else None, value

    async def aclaim(self, key: str, lease: str) -> tuple[str | None, bytes | None]:
        """`claim`, for a coroutine. Who is cancelled in it holds nothing."""
        with self._claiming(lease) as (keeper, token):
            async with self._connection.ause() as client:
                won, value = await self._asked(client, key, lease, token).execute()
                if won and value is None and self._apart(key, lease):
                    value = await client.execute_command("GET", key)
            if won:
                keeper.hold(lease, token)
        return token if won else None, value

    def hold(self, lease: str, token: str) -> None:
        """Extend ``lease`` from now on, as long as it has this ``token``. `claim` does so itself."""
        self._mine().hold(lease, token)

    def release(self, lease: str, token: str, message: bytes | None = None) -> None:
        """Give up ``lease`` and, if it was still ours, publish ``message``.

        Returns at once: the thread does it, or leaves it if Redis fails. Nothing happens to a lease that this
        process does not hold under this ``token``.
        """
        told = () if message is None else (self._channel, message)
        self._mine().release(lease, token, told)

    def close(self) -> None:
        """Release what this process holds and end its thread; waits a second for that at most.

        The leases may be used again.
        """
        keeper = self._keepers.made()
        if keeper is not None:
            keeper.close()

    @property
    def held(self) -> int:
        """How many leases this process holds, as far as it knows."""
        return len(self._mine().held)

    def _mine(self) -> _Keeper:
        return self._keepers.mine()

    @contextlib.contextmanager
    def _claiming(self, lease: str) -> Iterator[tuple[_Keeper, str]]:
        """A fresh token for a claim. One that fails may have been granted all the same, so it is undone."""
        keeper, token = self._mine(), os.urandom(16).hex()
        try:
            yield keeper, token
        except BaseException:
            keeper.undo(lease, token)
            raise

    def _asked(self, client: Any, key: str, lease: str, token: str) -> Any:
        # In this order: a value that the lease's last owner stored is seen by who gets the lease after it.
        pipe = client.pipeline(transaction=False)
        pipe.execute_command("SET", lease, token, "NX", "PX", self._milliseconds)
        pipe.execute_command("GET", key)
        return pipe

    def _apart(self, key: str, lease: str) -> bool:
        """Whether they may lie on two nodes, which do not keep the order of what one client asks of them."""
        if not self._connection.clustered:
            return False
        from redis.crc import key_slot

        return key_slot(key.encode()) != key_slot(lease.encode())


class _Keeper:
    """What one process holds, and the thread that extends and releases it.

    ``interval``: seconds from one heartbeat to the next; ``milliseconds``: what each extends a lease to.
    """

    def __init__(self, connection: RedisConnection, interval: float, milliseconds: int) -> None:
        self.held: set[_Held] = set()
        self._pid = os.getpid()
        self._connection = connection
        self._interval = interval
        self._milliseconds = milliseconds
        # Calls of the release script; what wakes the thread (None); and what ends it.
        self._inbox: SimpleQueue[_Call | threading.Event | None] = SimpleQueue()
        self._running = threading.Lock()  # held by whoever starts the thread, then by the thread
        self._thread: threading.Thread | None = None

    def hold(self, lease: str, token: str) -> None:
        self.held.add((lease, token))
        self._put(None)

    def release(self, lease: str, token: str, told: _Call) -> None:
        try:
            self.held.remove((lease, token))
        except KeyError:
            return
        self._put((lease, token, *told))

    def undo(self, lease: str, token: str) -> None:
        """Release what may never have been granted. Not in a child: a copy of a claim ends there as well."""
        if self._pid == os.getpid():
            self.held.discard((lease, token))
            self._put((lease, token))

    def close(self) -> None:
        for lease, token in self.held.copy():
            self.release(lease, token, ())
        if not self._running.locked():
            return
        until = time.monotonic() + _JOIN
        over = threading.Event()
        self._inbox.put(over)
        thread = self._thread
        if over.wait(_JOIN) and thread is not None:
            thread.join(max(0.0, until - time.monotonic()))

    def _put(self, item: _Call | None) -> None:
        self._inbox.put(item)
        self._start()

    def _start(self) -> None:
        """See to it that the thread runs."""
        if not self._running.acquire(blocking=False):
            return
        thread = threading.Thread(target=self._run, name=_THREAD, daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:  # no more threads, or the interpreter ends: leases end by themselves
            self._running.release()
            logger.debug("redis leases are not looked after: %s", exc)
        else:
            self._thread = thread

    # --- the thread

    def _run(self) -> None:
        try:
            ended = self._look_after()
        finally:
            self._running.release()
        for over in ended:
            over.set()
        # Who came since the end was decided found the lock taken.
        if self.held or not self._inbox.empty():
            self._start()

    def _look_after(self) -> list[threading.Event]:
        """Extend and release until told to end; by whom."""
        due: float | None = None  # None: nothing is held
        while True:
            calls, ended = self._received(due)
            if due is not None and time.monotonic() >= due:
                due = time.monotonic() + self._interval  # from its beginning, however long it takes
                self._guarded(self._extend)
            if calls:
                self._guarded(self._let_go, calls)
            if ended:
                return ended
            if not self.held:
                due = None
            elif due is None:
                due = time.monotonic() + self._interval

    def _received(self, due: float | None) -> tuple[list[_Call], list[threading.Event]]:
        """Wait for something to do, until ``due`` at most: the releases asked for, and who wants the end."""
        calls: list[_Call] = []
        ended: list[threading.Event] = []
        with contextlib.suppress(Empty):
            item = self._inbox.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
            while True:
                if isinstance(item, threading.Event):
                    ended.append(item)
                elif item is not None:
                    calls.append(item)
                item = self._inbox.get_nowait()
        return calls, ended

    def _guarded(self, work: Callable[..., object], *args: object) -> None:
        """Do ``work``, and log what goes wrong: the thread is needed for what comes after."""
        try:
            work(*args)
        except StoreError as exc:
            logger.debug("redis leases: %s", exc)
        except Exception:
            logger.debug("redis leases", exc_info=True)

    def _extend(self) -> None:
        calls = [(lease, token, self._milliseconds) for lease, token in self.held.copy()]
        for (lease, token, _), reply in _evaluate(self._connection, _EXTEND, calls):
            if reply == 0:
                self.held.discard((str(lease), str(token)))
                logger.debug("redis lease lost: %s", lease)

    def _let_go(self, calls: Sequence[_Call]) -> None:
        for call, reply in _evaluate(self._connection, _RELEASE, calls):
            if isinstance(reply, Exception):
                logger.debug("redis lease %s is left to end by itself: %s", call[0], reply)


def _evaluate(
    connection: RedisConnection, script: _Script, calls: Sequence[_Call]
) -> Iterator[tuple[_Call, Any]]:
    """Each of ``calls`` that was answered, and the answer: what ``script`` returns, or an exception.

    One pipeline; in a Cluster one for each node, so that a node that hangs costs the others one budget.
    """
    for node, group in _by_node(connection, calls):
        try:
            with connection.use() as client:
                replies = _send(client, script, group, node)
        except StoreError as exc:
            logger.debug("redis leases: %s", exc)
        else:
            yield from zip(group, replies, strict=True)


def _by_node(connection: RedisConnection, calls: Sequence[_Call]) -> Iterable[tuple[Any, Sequence[_Call]]]:
    """``calls`` by the node of a Cluster that has their lease; all of them under None where there is none."""
    if not connection.clustered:
        return [(None, calls)]
    groups: dict[Any, list[_Call]] = {}
    with connection.use() as client:
        for call in calls:
            groups.setdefault(_node(client, call[0]), []).append(call)
    return groups.items()


def _node(client: Any, lease: object) -> Any:
    """The node that has ``lease``; None where none has, which is for redis-py to report."""
    from redis.exceptions import SlotNotCoveredError

    try:
        return client.get_node_from_key(lease)
    except SlotNotCoveredError:
        return None


def _send(client: Any, script: _Script, calls: Sequence[_Call], node: Any) -> list[Any]:
    from redis.exceptions import NoScriptError

    replies = _pipeline(client, ("EVALSHA", script.sha, 1), calls, node)
    unknown = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
    if unknown:
        again = _pipeline(client, ("EVAL", script.body, 1), [calls[index] for index in unknown], node)
        for index, reply in zip(unknown, again, strict=True):
            replies[index] = reply
    return replies


def _pipeline(client: Any, command: _Call, calls: Sequence[_Call], node: Any) -> list[Any]:
    """The replies to ``command`` with each of ``calls``, which are sent at once; some may be exceptions."""
    # A Cluster's pipeline asks the server for the keys of each script, unless it is told the node.
    target = {} if node is None else {"target_nodes": node}
    pipe = client.pipeline(transaction=False)
    for call in calls:
        pipe.execute_command(*command, *call, **target)
    replies: list[Any] = pipe.execute(raise_on_error=False)
    return replies
