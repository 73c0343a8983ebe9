"""`RedisLimits`: what all processes of a Router use of their deployments, counted in one Redis.

Rules that hold here:

* A reservation is one script, so it is atomic, and one round trip; it carries along what this process has to
  tell of calls that ended. What no reservation took along is sent by a thread a tenth of a second later.
* There is one hash for each deployment, ``{<namespace>:router:<group>}:<id>``: a group is one slot of a
  Cluster. A hash lives for ten minutes after its last change, and as long as its minute or cooldown lasts.
* The server's clock counts, and what it tells is told as seconds from now: no process's own clock matters.
* What is to be told is bounded, and dropped where Redis fails: but a cooldown, and tokens that were used
  beyond their estimate, are kept and told again.
* What is to be told, and the thread, belong to a process: a forked child has nothing and starts its own.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from typing import Final

from ..errors import StoreError
from .per_process import PerProcess
from .redis_connect import RedisConnection
from .redis_limits_script import SCRIPT, SHA, Limit, Reply, Told, read_reply

__all__ = ["RedisLimits"]

logger = logging.getLogger("llm_middleware")

_THREAD: Final = "llm-middleware-redis-limits"
_INTERVAL: Final = 0.1  # seconds from one round of the thread to the next
_IDLE: Final = 50  # rounds with nothing to tell after which the thread ends
_JOIN: Final = 1.0  # seconds that `RedisLimits.close` waits for the thread
_MOST: Final = 4096  # things to tell that are kept
_SHOWN: Final = 32  # candidates of which the reply tells, unless more of them were looked at
_TTL: Final = 600.0  # seconds

_Batch = dict[tuple[str, int], Told]  # by deployment and minute


class RedisLimits:
    """Counts in the Redis of ``connection``, for every process that uses the same ``namespace``.

    Both faces; one object serves all threads and event loops. ``window``: seconds that a minute has;
    ``probe``: seconds that a probe is believed; ``latency_ttl``: see `RouterState`. `reserve` and `areserve`
    raise `StoreError`, nothing else here raises. Close it before the connection.
    """

    def __init__(
        self,
        connection: RedisConnection,
        *,
        namespace: str = "llm",
        window: float = 60.0,
        probe: float = 30.0,
        latency_ttl: float = 60.0,
        half_lives: int = 4,
    ) -> None:
        self._connection = connection
        self._namespace = namespace
        self._fixed = {
            "window": round(window * 1e3),
            "probe": round(probe * 1e3),
            "ttl": round(latency_ttl * 1e3),
            "half": half_lives,
            "keep": round(max(_TTL, 2 * window) * 1e3),
            "shown": _SHOWN,
        }
        self._outboxes = PerProcess(lambda: _Outbox(self))

    def reserve(self, group: str, limits: Sequence[Limit], tokens: int) -> Reply:
        """Count a call of ``tokens`` tokens at the first of ``limits`` that has room and is not cooling."""
        batch = self._mine().take(group)
        arguments = self._arguments(group, limits, tokens, batch)
        try:
            with self._connection.use() as client:
                try:
                    answer = client.execute_command("EVALSHA", SHA, *arguments)
                except _no_script():
                    answer = client.execute_command("EVAL", SCRIPT, *arguments)
        except BaseException:
            self._mine().again(group, batch)
            raise
        return read_reply(answer)

    async def areserve(self, group: str, limits: Sequence[Limit], tokens: int) -> Reply:
        batch = self._mine().take(group)
        arguments = self._arguments(group, limits, tokens, batch)
        try:
            async with self._connection.ause() as client:
                try:
                    answer = await client.execute_command("EVALSHA", SHA, *arguments)
                except _no_script():
                    answer = await client.execute_command("EVAL", SCRIPT, *arguments)
        except BaseException:
            self._mine().again(group, batch)
            raise
        return read_reply(answer)

    def tell(self, group: str, deployment: str, told: Told) -> None:
        """Have ``told`` counted with the next reservation in ``group``, or else soon. Returns at once."""
        self._mine().put(group, deployment, told.begin())

    def key(self, group: str, deployment: str) -> str:
        """The name of a deployment's hash."""
        return f"{{{self._namespace}:router:{group}}}:{deployment}"

    @property
    def untold(self) -> int:
        """How many things this process has yet to tell."""
        return self._mine().size

    def close(self) -> None:
        """Tell what is to be told, and end the thread; waits a second for that at most. The limits may be
        used again."""
        outbox = self._outboxes.made()
        if outbox is not None:
            outbox.close()

    def send(self, group: str, batch: _Batch) -> None:
        """Tell ``batch`` without reserving anything."""
        self._mine()
        arguments = self._arguments(group, (), 0, batch)
        with self._connection.use() as client:
            try:
                client.execute_command("EVALSHA", SHA, *arguments)
            except _no_script():
                client.execute_command("EVAL", SCRIPT, *arguments)

    def _mine(self) -> _Outbox:
        return self._outboxes.mine()

    def _arguments(
        self, group: str, limits: Sequence[Limit], tokens: int, batch: _Batch
    ) -> tuple[object, ...]:
        names = [limit.id for limit in limits] + [name for name, _ in batch]
        asked = {
            **self._fixed,
            "tokens": tokens,
            "limits": [[-1 if most is None else most for most in limit[1:]] for limit in limits],
            "told": [told.row() for told in batch.values()],
        }
        return len(names), *(self.key(group, name) for name in names), json.dumps(asked)


class _Outbox:
    """What one process has to tell, by group, and the thread that tells what no reservation took along."""

    def __init__(self, limits: RedisLimits) -> None:
        self.size = 0
        self._limits = limits
        self._lock = threading.RLock()  # a finalizer may tell something in a thread that has it
        self._batches: dict[str, _Batch] = {}
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def take(self, group: str) -> _Batch:
        if group not in self._batches:
            return {}
        with self._lock:
            batch = self._batches.pop(group, {})
            count = len(batch)
            self.size -= count
            return batch

    def put(self, group: str, deployment: str, told: Told) -> None:
        with self._lock:
            self._add(group, (deployment, told.window), told)
            if self._thread is None:
                self._start()

    def again(self, group: str, batch: _Batch) -> None:
        for (deployment, _), told in batch.items():
            lasting = told.lasting()
            if lasting is not None:
                self.put(group, deployment, lasting)

    def _add(self, group: str, place: tuple[str, int], told: Told) -> None:
        batch = self._batches.setdefault(group, {})
        if self.size >= _MOST and place not in batch:
            logger.debug("redis limits: too much to tell, something is left out")
            return
        held = batch.setdefault(place, told)
        if held is told:
            self.size += 1
        else:
            held.merge(told)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=_THREAD, daemon=True)
        self._over.clear()
        try:
            thread.start()
        except RuntimeError as exc:  # no more threads, or the interpreter ends
            logger.debug("redis limits are told with reservations only: %s", exc)
        else:
            self._thread = thread

    def close(self) -> None:
        with self._lock:
            thread = self._thread
        self._over.set()
        if thread is not None:
            thread.join(_JOIN)

    def _run(self) -> None:
        idle = 0
        while True:
            over = self._over.wait(_INTERVAL)
            idle = 0 if self._tell_all() else idle + 1
            with self._lock:
                if over or (idle >= _IDLE and not self.size):
                    self._thread = None
                    return

    def _tell_all(self) -> bool:
        """Send what there is; whether there was anything."""
        groups = list(self._batches)
        for group in groups:
            batch = self.take(group)
            try:
                if batch:
                    self._limits.send(group, batch)
            except StoreError as exc:
                logger.debug("redis limits: %s", exc)
                self.again(group, batch)
            except Exception:
                logger.debug("redis limits", exc_info=True)
        return bool(groups)


def _no_script() -> type[Exception]:
    from redis.exceptions import NoScriptError

    return NoScriptError
