"""Single-flight: concurrent identical requests share one call and read its one record.

Rules that hold here:
- A `Flight` is the record of one call in progress. One leader writes it; any number of readers, in any
  thread or task, read it from the beginning at their own pace. The record is the answer's own chunks, so
  a late reader gets the prefix at once and a slow one holds nobody up.
- It ends exactly once: *done*, *failed* (readers get the error) or *abandoned* (the leader was cancelled;
  a reader that has seen nothing yet takes over with a call of its own).
- All state changes under ``lock``; nothing waits while holding it. Waiters are woken from any thread.
- A caller that leads a flight and, inside that call, asks for the same key again does not join itself.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

from .._ports.protocol import Port, Waiter
from ..errors import FlightAbandonedError
from ..types import Headers
from .answer import Found

__all__ = [
    "ABANDONED",
    "DONE",
    "FAILED",
    "OPEN",
    "Flight",
    "FlightReader",
    "FlightTable",
    "Head",
    "lead",
    "lead_ends",
]

Beside = Callable[[Callable[[], object]], object]

OPEN, DONE, FAILED, ABANDONED = "open", "done", "failed", "abandoned"

# How many chunks a producer of its own may run ahead of the fastest reader.
_LEAD = 256

_leading: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("llm_leading", default=frozenset())


@dataclass(frozen=True, slots=True)
class Head:
    """What is known before the body: status, headers, and whether it comes as a stream."""

    status: int
    headers: Headers
    streamed: bool


class Flight:
    """One call in progress, shared by all who asked for the same thing meanwhile."""

    __slots__ = (
        "_afterwards",
        "_cancel",
        "_closing",
        "_finishes",
        "_furthest",
        "_lock",
        "_pumping",
        "_room",
        "_source",
        "_waiters",
        "chunks",
        "error",
        "head",
        "joinable",
        "key",
        "on_join",
        "on_land",
        "outcome",
        "readers",
        "size",
        "state",
        "vary",
    )

    def __init__(self, key: str, *, joinable: bool) -> None:
        self.key = key
        self.joinable = joinable
        self.head: Head | None = None
        self.chunks: list[bytes] = []
        self.size = 0
        self.state = OPEN
        self.error: BaseException | None = None
        self.outcome: object = None
        self.vary: tuple[tuple[str, str], ...] | None = ()
        self.readers = 0
        self.on_join: Callable[[], object] | None = None
        self.on_land: Callable[[], object] | None = None
        # Re-entrant: a reader that is garbage-collected leaves, wherever the collector happens to run.
        self._lock = threading.RLock()
        self._waiters: list[Waiter] = []
        self._room: list[Waiter] = []
        self._furthest = 0
        self._source: Callable[[], None] | None = None
        self._pumping = False
        self._cancel: Callable[[], object] | None = None
        self._afterwards: Callable[[], object] | None = None
        self._closing = False
        self._finishes = False

    # --- the leader's side

    def begin(self, head: Head) -> None:
        with self._lock:
            self.head = head
            self._wake()

    def push(self, chunk: bytes) -> None:
        with self._lock:
            self.chunks.append(chunk)
            self.size += len(chunk)
            if self._waiters:
                self._wake()

    def end(self, state: str, *, error: BaseException | None = None, outcome: object = None) -> None:
        """Done, failed or abandoned; only the first end counts."""
        with self._lock:
            if self.state == OPEN:
                self.state, self.error, self.outcome = state, error, outcome
            self._source = self._cancel = None
            self._wake()
        self._make_room()

    def feed(self, source: Callable[[], None]) -> None:
        """Let readers pull: ``source()`` reads one chunk from a sync upstream and pushes it, or ends the
        flight. One reader at a time runs it, in its own thread."""
        with self._lock:
            self._source = source
            self._wake()

    def cancel_with(self, cancel: Callable[[], object], *, finishes: bool = False) -> None:
        """``cancel()`` stops the call, or ``finishes`` it; it runs when the last reader has left."""
        with self._lock:
            self._cancel = cancel
            self._finishes = finishes

    async def room(self, port: Port) -> None:
        """Wait while the fastest reader is far behind: what nobody reads yet is not fetched yet."""
        while True:
            with self._lock:
                ahead = len(self.chunks) - self._furthest
                if ahead <= _LEAD or self.readers == 0 or self.state != OPEN:
                    return
                waiter = port.waiter()
                self._room.append(waiter)
            await waiter.wait()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.wake()

    def _make_room(self) -> None:
        with self._lock:
            waiters, self._room = self._room, []
        for waiter in waiters:
            waiter.wake()

    # --- the readers' side

    def enter(self) -> bool:
        """One more reader; False where the flight is being cancelled and takes none."""
        with self._lock:
            if self._closing:
                return False
            self.readers += 1
            on_join = self.on_join
        if on_join is not None:
            on_join()
        return True

    def close_to_readers(self) -> None:
        """From now on `enter` refuses: the call is about to be cancelled."""
        with self._lock:
            self._closing = True

    def leave(self, *, ends_all: bool = False, beside: Beside | None = None) -> None:
        """A reader goes. The last one, or one that ``ends_all``, stops the call: in ``beside``, which runs a
        function that may block, where it is given."""
        with self._lock:
            self.readers -= 1
            cancel = None
            if (self.readers == 0 or ends_all) and self.state == OPEN:
                cancel, self._cancel = self._cancel, None
            if cancel is not None:
                self._closing = not self._finishes
                if self._pumping:
                    # Whoever is pulling now must not be disturbed, and does it afterwards.
                    self._afterwards, cancel = cancel, None
                elif self._source is not None:
                    self._pumping = True
            # Whoever waits may now have to pump for itself.
            self._wake()
        self._make_room()
        if cancel is not None:
            stop = partial(self._stop, cancel)
            beside(stop) if beside is not None and self._source is not None else stop()

    def _stop(self, cancel: Callable[[], object]) -> None:
        try:
            cancel()
        finally:
            with self._lock:
                self._pumping = False
                self._wake()

    async def _advance(self, port: Port, seen: int, *, head: bool = False) -> None:
        """Wait until there is more than ``seen`` chunks (or a head, or an end), pulling it if nobody does."""
        with self._lock:
            if self.state != OPEN or len(self.chunks) > seen or (head and self.head is not None):
                return
            pump = not self._pumping and self._source is not None
            if pump:
                self._pumping = True
            else:
                waiter = port.waiter()
                self._waiters.append(waiter)
        await (port.pull(self._pump) if pump else waiter.wait())

    def _pump(self) -> None:
        source = self._source
        try:
            if source is not None:
                source()
        finally:
            with self._lock:
                afterwards, self._afterwards = self._afterwards, None
                self._pumping = afterwards is not None
                self._wake()
            if afterwards is not None:
                self._stop(afterwards)

    async def begun(self, port: Port) -> Head | None:
        """The head, once it is there; None where the flight was abandoned. Raises what the leader met."""
        while self.head is None and self.state == OPEN:
            await self._advance(port, 0, head=True)
        if self.state == FAILED and self.head is None:
            assert self.error is not None
            raise self.error
        return None if self.state == ABANDONED else self.head

    async def read(self, port: Port, at: int = 0) -> AsyncIterator[bytes]:
        """The record from chunk ``at`` on, and then what comes, to the end. Raises what the leader met."""
        while True:
            while at < len(self.chunks):
                at += 1
                if at > self._furthest:
                    self._furthest = at
                    if self._room:
                        self._make_room()
                yield self.chunks[at - 1]
            if self.state == OPEN:
                await self._advance(port, at)
            elif at >= len(self.chunks):
                break
        if self.state == FAILED and self.error is not None:
            raise self.error
        if self.state == ABANDONED:
            raise FlightAbandonedError("the call that this stream came from was cancelled")

    async def body(self, port: Port) -> bytes:
        return b"".join([chunk async for chunk in self.read(port)])


class FlightTable:
    """The flights of one cache, by key; shared by sync and async callers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[str, Flight] = {}
        self.landed = 0

    def __len__(self) -> int:
        return len(self._flights)

    def join(self, key: str) -> tuple[Flight, bool]:
        """The flight for ``key``, and whether the caller leads it."""
        if key in _leading.get():
            return Flight(key, joinable=False), True
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None and flight.enter():
                return flight, False
            flight = self._flights[key] = Flight(key, joinable=True)
            return flight, True

    def solo(self, key: str) -> Flight:
        """A flight that nobody can join, for an answer that only its caller may have."""
        return Flight(key, joinable=False)

    def land(self, flight: Flight) -> None:
        """The flight takes no more readers."""
        with self._lock:
            self.landed += 1
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
            on_land, flight.on_land = flight.on_land, None
        if on_land is not None:
            on_land()

    def land_with(self, flight: Flight, found: Found) -> None:
        """A stored answer stands in for the one that the call did not get."""
        self.land(flight)
        flight.begin(Head(found.status, found.headers, found.chunks is not None))
        for chunk in [found.body] if found.chunks is None else found.chunks:
            flight.push(chunk)
        flight.end(DONE)


def lead(flight: Flight) -> contextvars.Token[frozenset[str]]:
    """Mark the current context as inside ``flight``'s call."""
    return _leading.set(_leading.get() | {flight.key})


def lead_ends(token: contextvars.Token[frozenset[str]]) -> None:
    _leading.reset(token)


class FlightReader:
    """One reader's place in a flight's record: an async iterator that leaves the flight when it ends, is
    closed, or is dropped without ever having been read."""

    __slots__ = ("_beside", "_chunks", "_ends_all", "_flight", "_left")

    def __init__(self, flight: Flight, port: Port, *, ends_all: bool = False) -> None:
        self._flight = flight
        self._chunks = flight.read(port)
        self._beside = port.beside
        self._ends_all = ends_all
        self._left = False

    def __aiter__(self) -> FlightReader:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self._chunks.__anext__()
        except BaseException:
            self._leave()
            raise

    async def aclose(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            self._flight.leave(ends_all=self._ends_all, beside=self._beside)

    def __del__(self) -> None:
        self._leave()
