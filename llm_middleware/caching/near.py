"""`Near`: this process's memory in front of a store that other processes change too.

A value may be on its way here while somebody replaces or removes it. So a reader notes the moment before it
asks (`moment`), and brings nearer only what was not changed since (`fill`). Checking and filling are one step
under a lock, as are noting a change and dropping what it concerns; reads of the memory take no lock.

Who asks while no changes are told may miss one for good, also where they are told again before the value is
here. What was asked for then is kept for `_UNTOLD` seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from ..stores.memory import MemoryStore
from .entry import Entry

__all__ = ["Near"]

# Changes that are remembered one by one. Of older ones all that is known is when the last of them was.
_REMEMBERED = 4096
_UNTOLD = 1.0


class Near:
    """``memory``: the tier itself, which the fast lane reads directly. ``ttl``: seconds that it keeps what
    others may change, at most. ``live()``: whether what they change is told at this moment; of a store whose
    processes tell nothing, always."""

    def __init__(self, memory: MemoryStore[Entry], ttl: float) -> None:
        self.memory = memory
        self.live: Callable[[], bool] = _always
        self._ttl = ttl
        # Re-entrant: the garbage collector may end a stream, and store it, wherever it happens to run.
        self._lock = threading.RLock()
        self._moment = 0
        self._changed: dict[str, int] = {}
        self._all_changed = 0

    def moment(self) -> int:
        """To be asked before the store is, and given to `fill`. Negative while nothing is told."""
        return self._moment if self.live() else ~self._moment

    def fill(self, key: str, entry: Entry, left: float, since: int) -> None:
        """Keep what the store had and will have for the seconds that are ``left``, unless it was changed
        ``since``."""
        ttl = min(left, self._ttl)
        if since < 0:
            since, ttl = ~since, min(ttl, _UNTOLD)
        with self._lock:
            if self._all_changed <= since and self._changed.get(key, 0) <= since:
                self.memory.set(key, entry, ttl)

    def put(self, key: str, entry: Entry, kept_for: float | None, *, alone: bool = False) -> None:
        """Keep what this process writes. ``alone``: it is nobody else's, so nobody else changes it."""
        ttl = self._ttl if alone or self.live() else min(self._ttl, _UNTOLD)
        with self._lock:
            self._note((key,))
            self.memory.set(key, entry, ttl if kept_for is None else min(kept_for, ttl))

    def written(self, key: str, entry: Entry) -> None:
        """``entry`` is in the store now. Where it was dropped here meanwhile, something older may have come
        nearer since."""
        with self._lock:
            if self.memory.get(key) is not entry:
                self._note((key,))
                self.memory.delete((key,))

    def drop(self, keys: Sequence[str]) -> int:
        """``keys`` were changed or removed, here or elsewhere; how many of them were held."""
        with self._lock:
            self._note(keys)
            return self.memory.delete(keys)

    def drop_all(self, namespace: str) -> int:
        """Anything of ``namespace`` may have changed; how many of its entries were held."""
        with self._lock:
            self._note_all()
            return self.memory.flush(namespace)

    def drop_everything(self) -> None:
        """Anything may have changed."""
        with self._lock:
            self._note_all()
            self.memory.delete(self.memory.keys())

    def _note_all(self) -> None:
        self._moment += 1
        self._all_changed = self._moment
        self._changed.clear()

    def _note(self, keys: Iterable[str]) -> None:
        self._moment += 1
        for key in keys:
            self._changed.pop(key, None)  # so that the dictionary is in order of time
            self._changed[key] = self._moment
        while len(self._changed) > _REMEMBERED:
            oldest = next(iter(self._changed))
            self._all_changed = self._changed.pop(oldest)


def _always() -> bool:
    return True
