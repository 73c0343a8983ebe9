"""A circuit breaker: after some failures in a row, ask a store nothing but one question at a time.

The rules, all of them:

* *closed*: every call is allowed. A success forgets the failures before it; ``failures`` in a row open it.
* *open*: no call is allowed until ``recovery`` seconds have passed. Calls from before it opened may still
  report; they say nothing about the store as it is now and change nothing.
* *half-open*: the first caller after that is the probe, and the only one that is allowed. It succeeds:
  closed. It fails: open again, for ``recovery`` seconds from now. It is lost (cancelled, killed, never
  reports): after ``recovery`` seconds the next caller takes its place.

While all is well no lock is taken, and none while calls are being refused. Nothing here waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

from ..errors import ConfigError

__all__ = ["Breaker"]


class Breaker:
    """``failures``: how many in a row open it. ``recovery``: seconds until the store is asked again, and that
    a probe may take. ``clock``: seconds on any scale that never goes back.

    Ask `allow` before each call and tell what came of it with `succeeded` or `failed`. One object serves all
    threads and event loops of a process.
    """

    __slots__ = ("_clock", "_failures", "_limit", "_lock", "_probing", "_recovery", "_retry_at")

    def __init__(
        self, *, failures: int = 3, recovery: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if failures < 1:
            raise ConfigError(f"failures: expected a number >= 1, got {failures!r}", param="failures")
        if not 0 < recovery < float("inf"):
            raise ConfigError(f"recovery: expected seconds > 0, got {recovery!r}", param="recovery")
        self._limit, self._recovery, self._clock = failures, recovery, clock
        self._lock = threading.Lock()
        self._failures = 0  # in a row; 0 only while closed
        self._retry_at: float | None = None  # None: closed
        self._probing = False

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """``open`` until a probe has been let through, even if its time has come."""
        with self._lock:
            if self._retry_at is None:
                return "closed"
            return "half-open" if self._probing else "open"

    def allow(self) -> bool:
        """Whether to make the call. Who is told True reports the outcome, as it may be the probe."""
        retry_at = self._retry_at
        if retry_at is None:
            return True
        now = self._clock()
        return now >= retry_at and self._admit(now)

    def _admit(self, now: float) -> bool:
        with self._lock:
            if self._retry_at is None:  # a probe came back meanwhile
                return True
            if now < self._retry_at:  # another caller became the probe
                return False
            self._probing, self._retry_at = True, now + self._recovery
            return True

    def succeeded(self) -> bool:
        """A call that was allowed went well. True if this closed the breaker."""
        if not self._failures:
            return False
        with self._lock:
            was_open = self._retry_at is not None
            if was_open and not self._probing:
                return False
            self._failures, self._retry_at, self._probing = 0, None, False
            return was_open

    def failed(self) -> bool:
        """A call that was allowed failed. True if this opened a closed breaker: one line to log per burst."""
        with self._lock:
            was_open = self._retry_at is not None
            if was_open and not self._probing:
                return False
            self._failures += 1
            if was_open or self._failures >= self._limit:
                self._retry_at, self._probing = self._clock() + self._recovery, False
            return not was_open and self._retry_at is not None
