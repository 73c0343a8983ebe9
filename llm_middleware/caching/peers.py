"""`Peers`: the other processes that share a store, what they change, and whose answer to wait for.

Single-flight across processes: who leads a flight in this process claims the key's lease in the store. With
the lease it makes the call; without, it waits for whoever has it. Rules that hold here:

- A claim looks for the entry once more, after the lease is taken: what was stored before is never called for.
- A wait ends with a message (the entry was stored, or will not be), and where the message is lost with the
  next poll: of a lease whose holder died, the first to ask after its end takes it over.
- Whose answer is not stored tells so, and everybody waiting makes a call of their own: in turn would take as
  many times as long.
- A store that fails is no reason to wait: single-flight then holds for this process alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .._ports.protocol import Port, Waiter
from .flight import FAILED, Flight
from .near import Near

__all__ = ["Claimed", "Peers", "Shared"]

_FIRST_POLL = 0.05
# Seconds between polls at most: while messages arrive, and while they do not.
_POLL_LIVE = 1.0
_POLL_BLIND = 0.25


Told = Callable[[str, Sequence[str]], None]


class Shared(Protocol):
    """What a store offers whose processes can speak to each other."""

    @property
    def live(self) -> bool:
        """Whether messages arrive at this moment."""
        ...

    def attend(self, told: Told, gap: Callable[[], None]) -> None: ...

    def listen(self) -> None: ...

    def lease(self, key: str, form: str) -> str:
        """The name of the lease for answers to ``key`` in this form."""
        ...

    def release(self, lease: str, token: str, verb: str | None) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Claimed:
    """A lease that this process holds for ``key``. ``stored``: None until its answer was settled. ``flight``:
    the one that makes the call."""

    key: str
    lease: str
    token: str
    stored: bool | None = None
    flight: Flight | None = None


class Peers:
    """``heed(verb, names)``: what the store itself has to do with what others say, if anything."""

    def __init__(self, shared: Shared, near: Near | None, heed: Told | None = None) -> None:
        self._shared = shared
        self._near = near
        self._heed = heed
        # Re-entrant: a stream that is garbage-collected gives its lease up, wherever the collector runs.
        self._lock = threading.RLock()
        self._claimed: dict[str, list[Claimed]] = {}
        self._waiting: dict[str, list[_Wait]] = {}
        self.listen, self.lease = shared.listen, shared.lease
        shared.attend(self._told, self._gap)
        if near is not None:
            near.live = lambda: shared.live

    @classmethod
    def of(cls, store: object | None, near: Near | None) -> Peers | None:
        """For a store that has them."""
        shared = getattr(store, "peers", None)
        return None if shared is None else cls(shared, near, getattr(store, "heed", None))

    @property
    def live(self) -> bool:
        return self._shared.live

    # --- what others say

    def _told(self, verb: str, names: Sequence[str]) -> None:
        if self._heed is not None:
            self._heed(verb, names)
        if verb == "changed":
            if self._near is not None:
                self._near.drop(names)
            self._wake(names)
        elif verb == "flushed":
            for namespace in names if self._near is not None else ():
                self._near.drop_all(namespace)  # type: ignore[union-attr]
        elif verb in ("ended", "freed"):
            self._wake(names, ended=verb == "ended")

    def _gap(self) -> None:
        if self._near is not None:
            self._near.drop_everything()

    def _wake(self, names: Sequence[str], *, ended: bool = False) -> None:
        with self._lock:
            waits = [wait for name in names for wait in self._waiting.get(name, ())]
        for wait in waits:
            wait.ended = wait.ended or ended
            wait.waiter.wake()

    # --- who calls

    def settled(self, key: str, *, stored: bool) -> None:
        """The answer for ``key`` is stored, or will not be."""
        if self._claimed:
            with self._lock:
                for claimed in self._claimed.get(key, ()):
                    # A stream that is being left says nothing of what another gets who reads it to the end.
                    if stored or claimed.flight is None or not claimed.flight._closing:
                        claimed.stored = stored

    def hold(self, flight: Flight, claimed: Claimed) -> None:
        """``flight`` makes the call for all; its landing gives the lease up."""
        claimed.flight = flight
        with self._lock:
            self._claimed[claimed.key] = [*self._claimed.get(claimed.key, ()), claimed]
        flight.on_land = lambda: self._release(flight, claimed)

    def _release(self, flight: Flight, claimed: Claimed) -> None:
        with self._lock:
            left = [other for other in self._claimed.pop(claimed.key, ()) if other is not claimed]
            if left:
                self._claimed[claimed.key] = left
        verb: str | None = "freed"
        if claimed.stored is not None or flight.state == FAILED:
            verb = None if claimed.stored else "ended"
        self.give_up(claimed, verb)

    def give_up(self, claimed: Claimed, verb: str | None = None) -> None:
        self._shared.release(claimed.lease, claimed.token, verb)

    async def wait(
        self, port: Port, key: str, lease: str, attempt: Callable[[], Awaitable[bool]], seconds: float
    ) -> None:
        """Try ``attempt()`` until it is True, the answer is known not to come, or ``seconds`` have passed."""
        until, pause = time.monotonic() + seconds, _FIRST_POLL
        while True:
            wait = _Wait(port.waiter())
            self._enter((key, lease), wait)
            try:
                # Waiting began before the attempt: a message that comes in between wakes it.
                if await attempt() or wait.ended:
                    return
                left = until - time.monotonic()
                if left <= 0:
                    return
                await wait.waiter.wait(min(left, pause))
                if wait.ended:
                    return
            finally:
                self._leave((key, lease), wait)
            pause = min(2 * pause, _POLL_LIVE if self.live else _POLL_BLIND)

    def _enter(self, names: Sequence[str], wait: _Wait) -> None:
        with self._lock:
            for name in names:
                self._waiting.setdefault(name, []).append(wait)

    def _leave(self, names: Sequence[str], wait: _Wait) -> None:
        with self._lock:
            for name in names:
                waits = self._waiting[name]
                waits.remove(wait)
                if not waits:
                    del self._waiting[name]

    def close(self) -> None:
        self._shared.close()


@dataclass(slots=True, eq=False)
class _Wait:
    waiter: Waiter
    ended: bool = False
