"""`MemoryKeys`: API keys and their use in this process's memory, gone when it ends.

Rows are plain dictionaries. What comes in and goes out is copied, so that nobody changes a row by accident.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..types import Clock
from .keys_rules import GONE, Ask, Call, Reply, Use, judge, renew, settle

__all__ = ["MemoryKeys"]

Row = dict[str, Any]


class MemoryKeys:
    """``clock`` gives seconds since the epoch. Every method takes microseconds and may be called anywhere."""

    inline = True
    live = False

    def __init__(self, *, clock: Clock = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._rows: dict[str, Row] = {}
        self._uses: dict[str, Use] = {}
        self._calls: dict[str, dict[str, Call]] = {}
        self._generation = 0

    def generation(self) -> int:
        """Another number after each change of any key."""
        return self._generation

    def add(self, row: Mapping[str, Any], spend: float, resets: float | None) -> bool:
        """Keep a new key; False where there is one of this id."""
        with self._lock:
            if row["id"] in self._rows:
                return False
            self._rows[row["id"]] = copy.deepcopy(dict(row))
            self._uses[row["id"]] = Use(spend=spend, resets=resets or 0.0)
            self._generation += 1
            return True

    def get(self, key_id: str) -> Row | None:
        """The row, with ``spend`` and ``budget_resets``; None where there is none."""
        with self._lock:
            return self._read(key_id)

    def change(self, key_id: str, fields: Mapping[str, Any], use: Mapping[str, Any]) -> Row | None:
        """Set ``fields`` of the row, and ``spend`` and ``budget_resets`` where ``use`` has them, and nothing
        else. The row as it is then."""
        with self._lock:
            if key_id not in self._rows:
                return None
            self._rows[key_id].update(copy.deepcopy(dict(fields)))
            self._set_use(self._uses[key_id], use)
            self._generation += 1
            return self._read(key_id)

    def replace(self, key_id: str, fields: Mapping[str, Any], use: Mapping[str, Any]) -> Row | None:
        """As `change`, but a change of the ``id``: the use is taken along, and the calls in flight forgotten.
        None also where there is a key of the new id."""
        with self._lock:
            new = fields["id"]
            if key_id not in self._rows or new in self._rows:
                return None
            self._rows[new] = {**self._rows.pop(key_id), **copy.deepcopy(dict(fields))}
            self._uses[new] = self._uses.pop(key_id)
            self._calls.pop(key_id, None)
            self._set_use(self._uses[new], use)
            self._generation += 1
            return self._read(new)

    def remove(self, ids: Sequence[str]) -> list[str]:
        """Forget these keys and their use; which of them there were."""
        with self._lock:
            removed = [each for each in ids if self._rows.pop(each, None) is not None]
            for gone in removed:
                self._uses.pop(gone, None)
                self._calls.pop(gone, None)
            self._generation += bool(removed)
            return removed

    def page(self, offset: int, size: int, where: Mapping[str, str]) -> tuple[list[Row], int]:
        """So many rows, the latest first, and how many there are in all, of those with these columns."""
        with self._lock:
            found = [row for row in self._rows.values() if all(row[n] == value for n, value in where.items())]
            found.sort(key=lambda row: (row["created"], row["id"]), reverse=True)
            rows = [self._read(row["id"]) for row in found[offset : offset + size]]
            return [row for row in rows if row is not None], len(found)

    def count(self, key_id: str, ask: Ask) -> Reply:
        """Settle what ended, and count what is asked for if there is room."""
        with self._lock:
            now, use = self._clock(), self._uses.get(key_id)
            if use is None:
                if ask.stored or ask.settles_only:
                    return GONE
                use = self._uses[key_id] = Use(spend=ask.spend, resets=ask.resets or 0.0)
            calls = self._calls.setdefault(key_id, {})
            renew(use, ask, now)
            for ended in ask.ended:
                settle(use, ended, calls.pop(ended.call, None))
            if ask.settles_only:
                return Reply()
            for over in [name for name, call in calls.items() if call.expires <= now]:
                del calls[over]
            reply, call = judge(use, ask, len(calls), sum(call.cost for call in calls.values()), now)
            if call is not None:
                calls[ask.call] = call
            return reply

    def close(self) -> None:
        """Nothing is open here."""

    def _read(self, key_id: str) -> Row | None:
        row, use = self._rows.get(key_id), self._uses.get(key_id)
        if row is None or use is None:
            return None
        return {**copy.deepcopy(row), "spend": use.spend, "budget_resets": use.resets or None}

    def _set_use(self, use: Use, values: Mapping[str, Any]) -> None:
        if "spend" in values:
            use.spend = values["spend"]
        if "budget_resets" in values:
            use.resets = values["budget_resets"] or 0.0
