"""`Recent`: the records that this process has read, and for how long it believes them.

Rules that hold here:

* A record is believed for ``ttl`` seconds, a key that is nobody's for ``negative_ttl``: unless it is told
  of a change. While nobody would tell, a record is believed for half a second.
* What was read while something changed is used once and not kept.
* A record that is no longer believed is kept: while the store fails it is the best there is, until it is
  ten times ``ttl`` old. One that is known to have changed is not.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from .record import KeyRecord

__all__ = ["BLIND", "GRACE", "Recent"]

BLIND: Final = 0.5  # seconds
GRACE: Final = 10.0  # times ttl
_MOST: Final = 100_000
_MOST_WRONG: Final = 10_000


@dataclass(slots=True)
class _Entry:
    record: KeyRecord
    read: float
    until: float
    told: bool  # whether a change would have been told since it was read


class Recent:
    """By id. ``told``: whether somebody tells of changes at all; where nobody can, and the store has no
    generation either, ``ttl`` alone counts."""

    def __init__(self, ttl: float, negative_ttl: float) -> None:
        self.changes = 0
        self._ttl, self._negative_ttl = ttl, negative_ttl
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._wrong: dict[str, float] = {}

    def find(self, key_id: str, now: float, live: bool) -> KeyRecord | None:
        """The record, if it is believed. ``live``: whether changes are told at this moment."""
        entry = self._entries.get(key_id)
        if entry is None or not entry.read <= now < entry.until:
            return None
        if entry.told and not live and now >= entry.read + BLIND:
            return None
        return entry.record

    def is_wrong(self, key_id: str, now: float) -> bool:
        """Whether the key is known to be nobody's."""
        until = self._wrong.get(key_id)
        return until is not None and until - self._negative_ttl <= now < until

    def kept(self, key_id: str, now: float) -> KeyRecord | None:
        """The record, believed or not, within the time of grace; believed again for a moment."""
        entry = self._entries.get(key_id)
        if entry is None or not entry.read <= now < entry.read + max(self._ttl, BLIND) * GRACE:
            return None
        entry.until, entry.told = max(entry.until, now + BLIND), False
        return entry.record

    def keep(self, key_id: str, record: KeyRecord, now: float, since: int, ttl: float, told: bool) -> None:
        """Keep what was read, if nothing ``changes`` since the number was ``since``."""
        with self._lock:
            if self.changes != since:
                return
            self._wrong.pop(key_id, None)
            self._entries.pop(key_id, None)
            self._entries[key_id] = _Entry(record, now, now + ttl, told)
            if len(self._entries) > _MOST:
                del self._entries[next(iter(self._entries))]

    def keep_wrong(self, key_id: str, now: float, since: int) -> None:
        with self._lock:
            if self.changes != since or not self._negative_ttl:
                return
            self._entries.pop(key_id, None)
            self._wrong.pop(key_id, None)
            self._wrong[key_id] = now + self._negative_ttl
            if len(self._wrong) > _MOST_WRONG:
                del self._wrong[next(iter(self._wrong))]

    def forget(self, key_id: str | None) -> None:
        """This key was changed; None: some were, nobody knows which."""
        with self._lock:
            self.changes += 1
            if key_id is None:
                self._entries.clear()
                self._wrong.clear()
            else:
                self._entries.pop(key_id, None)
                self._wrong.pop(key_id, None)

    def doubt(self) -> None:
        """Changes may have been missed: believe nothing any more, and keep it for the time of grace."""
        with self._lock:
            self.changes += 1
            self._wrong.clear()
            for entry in self._entries.values():
                entry.until = min(entry.until, entry.read)
