"""`RedisKeys`: API keys in one Redis, for every process that uses it; a change is told to all of them at
once.

Rules that hold here:

* A key is ``{<namespace>:<id>}`` and four Redis keys of that slot: ``:key``, a hash with a field for each
  column, so that nothing is written but what changes; ``:use``, what was counted and spent; ``:calls`` and
  ``:held``, the calls in flight. ``<namespace>:index`` has all ids by age.
* What counts is one script, and one round trip, on the server's clock.
* A change is published on ``<namespace>:changes``, by the script that makes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from ..errors import StoreError
from .keys_redis_script import ADD, CHANGE, COUNT, READ, REMOVE, Script, asked, replied
from .keys_rules import Ask, Reply
from .redis_channel import RedisChannel
from .redis_connect import RedisConnection
from .redis_plan import Plan, arun, one, pipeline, run

__all__ = ["RedisKeys"]

T = TypeVar("T")
Row = dict[str, Any]

_PAGE: Final = 200  # ids of the index that are looked at in one go


class RedisKeys:
    """Both faces; one object serves all threads and event loops. Every method raises `StoreError` where Redis
    fails. ``namespace``: what the names of its Redis keys begin with."""

    inline = False

    def __init__(self, connection: RedisConnection, *, namespace: str = "llm:keys") -> None:
        self.connection = connection
        self.namespace = namespace
        self.channel = f"{namespace}:changes"
        self._attending: list[Callable[[str | None], None]] = []
        self._ear = RedisChannel(connection, self.channel, told=self._hear, gap=self._missed)

    def attend(self, told: Callable[[str | None], None]) -> None:
        """From now on `listen` hears for this: ``told(id)`` for a key that was changed, ``told(None)`` where
        messages may have been lost. It is called in the listening thread."""
        self._attending.append(told)

    @property
    def live(self) -> bool:
        """Whether changes are heard of at this moment."""
        return self._ear.live

    def listen(self) -> None:
        """Hear of changes from now on, if this process does not yet. Returns at once."""
        self._ear.listen()

    def add(self, row: Mapping[str, Any], spend: float, resets: float | None) -> bool:
        """Keep a new key; False where there is one of this id."""
        return run(self.connection, self._add(row, {"spend": spend, "resets": resets or 0.0}))

    async def aadd(self, row: Mapping[str, Any], spend: float, resets: float | None) -> bool:
        return await arun(self.connection, self._add(row, {"spend": spend, "resets": resets or 0.0}))

    def get(self, key_id: str) -> Row | None:
        """The row, with ``spend`` and ``budget_resets``; None where there is none."""
        return run(self.connection, self._get(key_id))

    async def aget(self, key_id: str) -> Row | None:
        return await arun(self.connection, self._get(key_id))

    def change(self, key_id: str, fields: Mapping[str, Any], use: Mapping[str, Any]) -> Row | None:
        """Set ``fields`` of the row, and ``spend`` and ``budget_resets`` where ``use`` has them, and nothing
        else. The row as it is then."""
        return run(self.connection, self._change(key_id, fields, use))

    async def achange(self, key_id: str, fields: Mapping[str, Any], use: Mapping[str, Any]) -> Row | None:
        return await arun(self.connection, self._change(key_id, fields, use))

    def replace(self, key_id: str, fields: Mapping[str, Any], use: Mapping[str, Any]) -> Row | None:
        """As `change`, but a change of the ``id``: the use is taken along, and the calls in flight forgotten.
        None also where there is a key of the new id. First the new one is made, then the old one removed: if
        this fails between, both are there."""
        return run(self.connection, self._replace(key_id, fields, use))

    async def areplace(self, key_id: str, fields: Mapping[str, Any], use: Mapping[str, Any]) -> Row | None:
        return await arun(self.connection, self._replace(key_id, fields, use))

    def remove(self, ids: Sequence[str]) -> list[str]:
        """Forget these keys and their use; which of them there were."""
        return run(self.connection, self._remove(ids))

    async def aremove(self, ids: Sequence[str]) -> list[str]:
        return await arun(self.connection, self._remove(ids))

    def page(self, offset: int, size: int, where: Mapping[str, str]) -> tuple[list[Row], int]:
        """So many rows, the latest first, and how many there are in all, of those with these columns. Reads
        all rows where there are any such columns."""
        return run(self.connection, self._page(offset, size, where))

    async def apage(self, offset: int, size: int, where: Mapping[str, str]) -> tuple[list[Row], int]:
        return await arun(self.connection, self._page(offset, size, where))

    def count(self, key_id: str, ask: Ask) -> Reply:
        """Settle what ended, and count what is asked for if there is room. One round trip."""
        return run(self.connection, self._count(key_id, ask))

    async def acount(self, key_id: str, ask: Ask) -> Reply:
        return await arun(self.connection, self._count(key_id, ask))

    def close(self) -> None:
        """Close this process's connections. The next call opens others."""
        self._ear.close()
        self.connection.close()

    async def aclose(self) -> None:
        self._ear.close()
        await self.connection.aclose()

    @property
    def index(self) -> str:
        return f"{self.namespace}:index"

    def names(self, key_id: str) -> list[str]:
        """The Redis keys of one key."""
        return [f"{{{self.namespace}:{key_id}}}:{part}" for part in ("key", "use", "calls", "held")]

    def _add(self, row: Mapping[str, Any], use: Mapping[str, float]) -> Plan[bool]:
        # First into the index: there an id without a key is passed over, but a key without it is not listed.
        yield one(("ZADD", self.index, "NX", _text(row["created"]), row["id"]))
        fields = _fields(row)
        arguments = (
            len(row),
            *fields,
            *(part for name, value in use.items() for part in (name, _text(value))),
        )
        return bool((yield from self._call(ADD, row["id"], self.channel, row["id"], *arguments)))

    def _get(self, key_id: str) -> Plan[Row | None]:
        record, use = yield from self._call(READ, key_id)
        return _row(record, use)

    def _change(self, key_id: str, fields: Mapping[str, Any], use: Mapping[str, Any]) -> Plan[Row | None]:
        changed = (len(fields), *_fields(fields), *_use(use))
        if not (yield from self._call(CHANGE, key_id, self.channel, key_id, *changed)):
            return None
        return (yield from self._get(key_id))

    def _replace(self, key_id: str, fields: Mapping[str, Any], use: Mapping[str, Any]) -> Plan[Row | None]:
        record, counted = yield from self._call(READ, key_id)
        if not record:
            return None
        row = {**_columns(record), **fields}
        taken = {name.decode(): float(value) for name, value in _pairs(counted) if name != b"held"}
        if not (yield from self._add(row, taken)):
            return None
        spent = yield from self._call(REMOVE, key_id, self.channel, key_id)
        yield one(("ZREM", self.index, key_id))
        new = self.names(row["id"])[1]
        if spent is not None and float(spent) != taken["spend"]:  # by calls that ended meanwhile
            yield one(("HINCRBYFLOAT", new, "spend", _text(float(spent) - taken["spend"])))
        return (yield from (self._change(row["id"], {}, use) if use else self._get(row["id"])))

    def _remove(self, ids: Sequence[str]) -> Plan[list[str]]:
        removed = []
        for key_id in dict.fromkeys(ids):
            if (yield from self._call(REMOVE, key_id, self.channel, key_id)) is not None:
                removed.append(key_id)
            yield one(("ZREM", self.index, key_id))
        return removed

    def _page(self, offset: int, size: int, where: Mapping[str, str]) -> Plan[tuple[list[Row], int]]:
        if not where:
            total = yield one(("ZCARD", self.index))
            ids = yield one(("ZRANGE", self.index, offset, offset + size - 1, "REV"))
            return (yield from self._rows(ids)), int(total)
        found: list[Row] = []
        at = 0
        while ids := (yield one(("ZRANGE", self.index, at, at + _PAGE - 1, "REV"))):
            rows = yield from self._rows(ids)
            found += [row for row in rows if all(row[name] == value for name, value in where.items())]
            at += len(ids)
        return found[offset : offset + size], len(found)

    def _rows(self, ids: Sequence[bytes]) -> Plan[list[Row]]:
        names = [name for key_id in ids for name in self.names(key_id.decode())[:2]]
        hashes = (yield pipeline([("HGETALL", name) for name in names])) if names else []
        rows = [_row(record, use) for record, use in zip(hashes[::2], hashes[1::2], strict=True)]
        return [row for row in rows if row is not None]

    def _count(self, key_id: str, ask: Ask) -> Plan[Reply]:
        return replied((yield from self._call(COUNT, key_id, asked(ask))))

    def _call(self, script: Script, key_id: str, *arguments: Any) -> Plan[Any]:
        names = self.names(key_id)
        rest = (len(names), *names, *arguments)
        try:
            return (yield one(("EVALSHA", script.sha, *rest)))
        except StoreError as exc:
            if "No matching script" not in str(exc):
                raise
        return (yield one(("EVAL", script.body, *rest)))

    def _hear(self, data: bytes) -> None:
        for told in self._attending:
            told(data.decode())

    def _missed(self) -> None:
        for told in self._attending:
            told(None)


def _text(number: float) -> str:
    return format(number, ".17g")


def _fields(columns: Mapping[str, Any]) -> list[str]:
    return [part for name, value in columns.items() for part in (name, json.dumps(value))]


def _use(use: Mapping[str, Any]) -> list[str]:
    names = {"spend": "spend", "budget_resets": "resets"}
    return [part for name, value in use.items() for part in (names[name], _text(value or 0.0))]


def _pairs(flat: Any) -> list[tuple[bytes, bytes]]:
    """The fields of a hash, which a script gives as a list."""
    if isinstance(flat, Mapping):
        return list(flat.items())
    return list(zip(flat[::2], flat[1::2], strict=True))


def _columns(record: Any) -> Row:
    return {name.decode(): json.loads(value) for name, value in _pairs(record)}


def _row(record: Any, use: Any) -> Row | None:
    if not record:
        return None
    counted = dict(_pairs(use))
    resets = float(counted.get(b"resets", 0))
    return {**_columns(record), "spend": float(counted.get(b"spend", 0)), "budget_resets": resets or None}
