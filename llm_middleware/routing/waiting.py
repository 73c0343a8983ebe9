"""Lines of calls that wait for room: first come, first served among those for the same deployments.

Rules that hold here:

* Joining and leaving a line take a lock; telling a line that there may be room, which every call does at its
  end, takes none. A finalizer may do any of it, also in a thread that has the lock.
* Who does not come back a second after its wait was to end is passed over: its event loop is busy, or gone.
  After a minute it loses its place: should it come back, it joins the line's end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from .._ports.protocol import Port, Waiter

__all__ = ["Lines", "Place"]

_LATE: Final = 1.0  # seconds after which one is passed over
_GONE: Final = 60.0  # seconds after which one loses its place


class Place:
    """One call's place in the line for the deployments of ``ids``. ``due``: when its wait is to end.
    ``stands``: whether it is in the line."""

    __slots__ = ("_lines", "_waiter", "due", "ids", "stands")

    def __init__(self, lines: Lines, ids: Sequence[str]) -> None:
        self.ids = tuple(ids)
        self.due = time.monotonic()
        self.stands = False
        self._lines = lines
        self._waiter: Waiter | None = None

    @property
    def first(self) -> bool:
        """Whether nobody stands before it who comes when called."""
        return self._lines.is_first(self)

    def ready(self, port: Port) -> None:
        """From now on nothing that is told to the line is missed by `wait`."""
        self._waiter = port.waiter()
        self.due = time.monotonic()

    async def wait(self, seconds: float) -> None:
        """Until there may be room, or this place is the first one; ``seconds`` at most."""
        assert self._waiter is not None
        self.due = time.monotonic() + seconds
        await self._waiter.wait(seconds)

    def wake(self) -> None:
        """End the wait. From any thread."""
        if self._waiter is not None:
            self.due = min(self.due, time.monotonic())
            self._waiter.wake()


class Lines:
    """All lines of a Router, by the deployments they wait for. Whether a place stands in one is for itself to
    say: a finalizer may take it out while its line is written."""

    __slots__ = ("_lines", "_lock")

    def __init__(self) -> None:
        # Tuples: who reads one needs no lock.
        self._lines: dict[tuple[str, ...], tuple[Place, ...]] = {}
        self._lock = threading.RLock()

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __len__(self) -> int:
        """How many calls wait."""
        return sum(map(len, self._lines.copy().values()))

    def waiting(self, ids: Sequence[str]) -> bool:
        """Whether somebody waits for these deployments."""
        return bool(self._lines) and tuple(ids) in self._lines

    def freed(self, deployment: str) -> None:
        """A call at ``deployment`` has ended."""
        for ids in self._lines.copy():
            if deployment in ids:
                self._call(ids)

    @contextmanager
    def place(self, ids: Sequence[str]) -> Iterator[Place]:
        """The last place of the line, until the block ends; then the next one is called."""
        place = Place(self, ids)
        self._join(place)
        try:
            yield place
        finally:
            self._leave(place)

    def clear(self) -> None:
        """Nobody waits: a forked child has none of its parent's callers."""
        self._lock = threading.RLock()
        self._lines.clear()

    def is_first(self, place: Place) -> bool:
        if not place.stands:
            self._join(place)  # it was away for too long
        now = time.monotonic()
        for other in self._lines.get(place.ids, ()):
            if other is place:
                break
            if other.stands and now - other.due <= _LATE:
                return False
            if now - other.due > _GONE:
                self._leave(other)
        return True

    def _join(self, place: Place) -> None:
        with self._lock:
            place.stands = True
            self._lines[place.ids] = (*self._lines.get(place.ids, ()), place)

    def _leave(self, place: Place) -> None:
        with self._lock:
            if not place.stands:
                return
            place.stands = False
            rest = tuple(each for each in self._lines.get(place.ids, ()) if each.stands)
            if rest:
                self._lines[place.ids] = rest
            else:
                self._lines.pop(place.ids, None)
        self._call(place.ids)

    def _call(self, ids: tuple[str, ...]) -> None:
        """There may be room for the first one, and for the next where that one does not come."""
        now = time.monotonic()
        for place in self._lines.get(ids, ()):
            late = now - place.due > _LATE
            place.wake()
            if not late:
                return
