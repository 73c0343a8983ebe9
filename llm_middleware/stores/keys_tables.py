"""`TableKeys`: API keys and their use in the tables of a database, in SQL that SQLite and PostgreSQL share.

Four tables: ``llm_keys`` (a row for each key: what may be looked for, and the record as JSON),
``llm_key_use`` (what was counted and spent), ``llm_key_calls`` (calls in flight) and ``llm_key_changes`` (a
number that each change of a key raises, so that other processes see that there was one). Counting never
touches ``llm_keys``.
"""

from __future__ import annotations

import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ..types import Clock
from .keys_rules import GONE, Ask, Call, Reply, Use, judge, renew, settle

__all__ = ["TABLES", "Run", "TableKeys"]

Row = dict[str, Any]
Run = Callable[..., list[tuple[Any, ...]]]
"""``run(sql, **parameters)``: the rows that a statement of the transaction gave."""

TABLES: Final = (
    """CREATE TABLE IF NOT EXISTS llm_keys (id TEXT PRIMARY KEY, user_id TEXT, team_id TEXT,
    created DOUBLE PRECISION NOT NULL, record TEXT NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS llm_keys_by_user ON llm_keys (user_id)",
    "CREATE INDEX IF NOT EXISTS llm_keys_by_team ON llm_keys (team_id)",
    """CREATE TABLE IF NOT EXISTS llm_key_use (key_id TEXT PRIMARY KEY,
    requests_from DOUBLE PRECISION NOT NULL, requests BIGINT NOT NULL,
    tokens_from DOUBLE PRECISION NOT NULL, tokens BIGINT NOT NULL,
    spend DOUBLE PRECISION NOT NULL, resets DOUBLE PRECISION NOT NULL, mean DOUBLE PRECISION NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS llm_key_calls (id TEXT PRIMARY KEY, key_id TEXT NOT NULL,
    started DOUBLE PRECISION NOT NULL, tokens BIGINT NOT NULL, cost DOUBLE PRECISION NOT NULL,
    expires DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS llm_key_calls_by_key ON llm_key_calls (key_id, expires)",
    "CREATE TABLE IF NOT EXISTS llm_key_changes (id BIGINT PRIMARY KEY, generation BIGINT NOT NULL)",
    "INSERT INTO llm_key_changes (id, generation) VALUES (1, 0) ON CONFLICT DO NOTHING",
)
_GENERATION: Final = "SELECT generation FROM llm_key_changes WHERE id = 1"
_CHANGED: Final = "UPDATE llm_key_changes SET generation = generation + 1 WHERE id = 1"
_ROWS: Final = "SELECT k.record, u.spend, u.resets FROM llm_keys k JOIN llm_key_use u ON u.key_id = k.id"
_GET: Final = f"{_ROWS} WHERE k.id = :id"
_LATEST: Final = "ORDER BY k.created DESC, k.id DESC LIMIT :size OFFSET :offset"
_ADD: Final = (
    "INSERT INTO llm_keys (id, user_id, team_id, created, record)"
    " VALUES (:id, :user, :team, :created, :record) ON CONFLICT DO NOTHING RETURNING id"
)
_SET: Final = "UPDATE llm_keys SET user_id = :user, team_id = :team, record = :record WHERE id = :id"
_REMOVE: Final = "DELETE FROM llm_keys WHERE id = :id RETURNING id"
_ADD_USE: Final = (
    "INSERT INTO llm_key_use (key_id, requests_from, requests, tokens_from, tokens, spend, resets, mean)"
    " VALUES (:id, 0, 0, 0, 0, :spend, :resets, 0) ON CONFLICT DO NOTHING"
)
_GET_USE: Final = (
    "SELECT requests_from, requests, tokens_from, tokens, spend, resets, mean FROM llm_key_use"
    " WHERE key_id = :id"
)
_SET_USE: Final = (
    "UPDATE llm_key_use SET requests_from = :requests_from, requests = :requests, tokens_from = :tokens_from,"
    " tokens = :tokens, spend = :spend, resets = :resets, mean = :mean WHERE key_id = :id"
)
_END_CALL: Final = (
    "DELETE FROM llm_key_calls WHERE id = :call AND key_id = :id RETURNING started, tokens, cost, expires"
)
_OVER: Final = "DELETE FROM llm_key_calls WHERE key_id = :id AND expires <= :now"
_FLYING: Final = "SELECT COUNT(*), COALESCE(SUM(cost), 0) FROM llm_key_calls WHERE key_id = :id"
_ADD_CALL: Final = (
    "INSERT INTO llm_key_calls (id, key_id, started, tokens, cost, expires)"
    " VALUES (:call, :id, :started, :tokens, :cost, :expires)"
)


class TableKeys(ABC):
    """A subclass says what a transaction is. Every method raises `StoreError` where the database fails."""

    inline = False
    live = False
    locking = ""
    """What makes a SELECT lock its row for the transaction."""

    def __init__(self, *, clock: Clock = time.time) -> None:
        self._clock = clock

    @abstractmethod
    def _transaction(self, *, writes: bool) -> contextlib.AbstractContextManager[Run]:
        """A transaction that is undone where its body raises. One that writes is alone with its rows."""

    @abstractmethod
    def close(self) -> None:
        """Close this process's connections. The next call opens others."""

    def generation(self) -> int:
        """Another number after each change of any key by any process."""
        with self._transaction(writes=False) as run:
            return int(run(_GENERATION)[0][0])

    def add(self, row: Mapping[str, Any], spend: float, resets: float | None) -> bool:
        """Keep a new key; False where there is one of this id."""
        with self._transaction(writes=True) as run:
            if not run(_ADD, created=row["created"], **_columns(row)):
                return False
            run(_ADD_USE, id=row["id"], spend=spend, resets=resets or 0.0)
            _set_use(run, row["id"], {"spend": spend, "budget_resets": resets})
            run(_CHANGED)
            return True

    def get(self, key_id: str) -> Row | None:
        """The row, with ``spend`` and ``budget_resets``; None where there is none."""
        with self._transaction(writes=False) as run:
            return _first(run(_GET, id=key_id))

    def change(self, key_id: str, fields: Mapping[str, Any], use: Mapping[str, Any]) -> Row | None:
        """Set ``fields`` of the row, and ``spend`` and ``budget_resets`` where ``use`` has them, and nothing
        else. The row as it is then."""
        with self._transaction(writes=True) as run:
            found = run(f"SELECT record FROM llm_keys WHERE id = :id{self.locking}", id=key_id)
            if not found:
                return None
            run(_SET, **_columns({**json.loads(found[0][0]), **fields}))
            _set_use(run, key_id, use)
            run(_CHANGED)
            return _first(run(_GET, id=key_id))

    def replace(self, key_id: str, fields: Mapping[str, Any], use: Mapping[str, Any]) -> Row | None:
        """As `change`, but a change of the ``id``: the use is taken along, and the calls in flight forgotten.
        None also where there is a key of the new id."""
        new = fields["id"]
        with self._transaction(writes=True) as run:
            taken = run("SELECT 1 FROM llm_keys WHERE id = :id", id=new)
            found = [] if taken else run("DELETE FROM llm_keys WHERE id = :id RETURNING record", id=key_id)
            if not found:
                return None
            row = {**json.loads(found[0][0]), **fields}
            run(_ADD, created=row["created"], **_columns(row))
            run("UPDATE llm_key_use SET key_id = :new WHERE key_id = :id", id=key_id, new=new)
            run("DELETE FROM llm_key_calls WHERE key_id = :id", id=key_id)
            _set_use(run, new, use)
            run(_CHANGED)
            return _first(run(_GET, id=new))

    def remove(self, ids: Sequence[str]) -> list[str]:
        """Forget these keys and their use; which of them there were."""
        with self._transaction(writes=True) as run:
            in_order = sorted(set(ids))  # so that two who do this wait for each other in turn
            removed = [each for each in in_order if run(_REMOVE, id=each)]
            for gone in removed:
                run("DELETE FROM llm_key_use WHERE key_id = :id", id=gone)
                run("DELETE FROM llm_key_calls WHERE key_id = :id", id=gone)
            if removed:
                run(_CHANGED)
            return removed

    def page(self, offset: int, size: int, where: Mapping[str, str]) -> tuple[list[Row], int]:
        """So many rows, the latest first, and how many there are in all, of those with these columns."""
        terms = " AND ".join(f"{name}_id = :{name}" for name in sorted(where))
        clause = f"WHERE {terms}" if terms else ""
        with self._transaction(writes=False) as run:
            rows = run(f"{_ROWS} {clause} {_LATEST}", size=size, offset=offset, **where)
            total = run(f"SELECT COUNT(*) FROM llm_keys {clause}", **where)[0][0]
            return [_read(row) for row in rows], int(total)

    def count(self, key_id: str, ask: Ask) -> Reply:
        """Settle what ended, and count what is asked for if there is room."""
        with self._transaction(writes=True) as run:
            found = run(_GET_USE + self.locking, id=key_id)
            if not found:
                if ask.stored or ask.settles_only:
                    return GONE
                run(_ADD_USE, id=key_id, spend=ask.spend, resets=ask.resets or 0.0)
                found = run(_GET_USE + self.locking, id=key_id)
            use, now = Use(*found[0]), self._clock()
            renew(use, ask, now)
            for ended in ask.ended:
                held = run(_END_CALL, id=key_id, call=ended.call) if ended.call else []
                settle(use, ended, Call(*held[0]) if held else None)
            reply = Reply() if ask.settles_only else _judged(run, key_id, use, ask, now)
            run(_SET_USE, id=key_id, **{name: getattr(use, name) for name in Use.__slots__})
            return reply


def _judged(run: Run, key_id: str, use: Use, ask: Ask, now: float) -> Reply:
    flying, held = 0, 0.0
    if ask.call:
        run(_OVER, id=key_id, now=now)
        flying, held = run(_FLYING, id=key_id)[0]
    reply, call = judge(use, ask, int(flying), float(held), now)
    if call is not None:
        started, tokens, cost, expires = call
        run(_ADD_CALL, id=key_id, call=ask.call, started=started, tokens=tokens, cost=cost, expires=expires)
    return reply


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "user": row["user"], "team": row["team"], "record": json.dumps(dict(row))}


def _set_use(run: Run, key_id: str, use: Mapping[str, Any]) -> None:
    if "spend" in use:
        run("UPDATE llm_key_use SET spend = :value WHERE key_id = :id", id=key_id, value=use["spend"])
    if "budget_resets" in use:
        resets = use["budget_resets"] or 0.0
        run("UPDATE llm_key_use SET resets = :value WHERE key_id = :id", id=key_id, value=resets)


def _first(rows: list[tuple[Any, ...]]) -> Row | None:
    return _read(rows[0]) if rows else None


def _read(row: tuple[Any, ...]) -> Row:
    record, spend, resets = row
    return {**json.loads(record), "spend": spend, "budget_resets": resets or None}
