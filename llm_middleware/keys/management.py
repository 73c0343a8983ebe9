"""What an administrator does with keys: make, look at, change, replace, block and remove them. Both faces.

Answers are mappings with LiteLLM's names, and hold the key itself only where it was just made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from .._drive import run_sync
from .._ports.faces import SYNC, async_port
from .._ports.protocol import Port
from ..errors import InvalidRequestError, KeyNotFoundError
from ..types import Clock
from .asking import Asker
from .duration import parse_duration
from .fields import check_fields, check_key
from .lookup import Lookup
from .record import KeyRecord, id_of, masked, new_key, record_of

__all__ = ["Management", "shown"]

Answer = dict[str, Any]
Ids = list[str]

_MOST_KEYS: Final = 1000
_NEW: Final[Mapping[str, Any]] = {
    "alias": None,
    "user": None,
    "team": None,
    "models": [],
    "aliases": {},
    "metadata": {},
    "allowed_cache_controls": None,
    "expires": None,
    "rpm_limit": None,
    "tpm_limit": None,
    "max_parallel_requests": None,
    "max_budget": None,
    "budget_duration": None,
    "blocked": False,
    "admin": False,
    "config": {},
}


class Management:
    """The half of `KeyResolver` that no request needs."""

    _asker: Asker
    _lookup: Lookup
    _clock: Clock

    def generate(self, **fields: object) -> Answer:
        """Make a key. ``fields``: LiteLLM's: ``key_alias``, ``user_id``, ``team_id``, ``models``,
        ``aliases``, ``metadata``, ``allowed_cache_controls``, ``duration`` (None: for ever), ``rpm_limit``,
        ``tpm_limit``, ``max_parallel_requests``, ``max_budget``, ``budget_duration``, ``spend``,
        ``blocked``, ``config``; and ``admin``, and ``key``, one of your own that begins with ``sk-``.

        What `info` tells, ``key``, which is shown only here, and ``token``, its id. `InvalidRequestError`
        names a field that is wrong, before anything is written.
        """
        return run_sync(self._generate(SYNC, fields))

    async def agenerate(self, **fields: object) -> Answer:
        """`generate` for async callers."""
        return await self._generate(async_port(), fields)

    async def _generate(self, port: Port, fields: Mapping[str, object]) -> Answer:
        columns = check_fields(fields, besides=("key",))
        key = new_key() if fields.get("key") is None else check_key(fields["key"])
        if self._lookup.is_master(key):
            raise InvalidRequestError("key: this is the master key", param="key")
        now = self._clock()
        values, use = _values(columns, now)
        row = {**_NEW, **values, "id": id_of(key), "name": masked(key), "created": now, "updated": now}
        spend, resets = use.get("spend", 0.0), use.get("budget_resets")
        if not await self._asker.manage(port, "add", row, spend, resets):
            raise InvalidRequestError("key: there is such a key already", param="key", code="key_exists")
        self._lookup.forget(row["id"])
        return {"key": key, **self._shown({**row, "spend": spend, "budget_resets": resets})}

    def info(self, key_or_id: str) -> Answer:
        """``{"key": its id, "info": {...}}``. `KeyNotFoundError` where there is none."""
        return run_sync(self._info(SYNC, key_or_id))

    async def ainfo(self, key_or_id: str) -> Answer:
        """`info` for async callers."""
        return await self._info(async_port(), key_or_id)

    async def _info(self, port: Port, key_or_id: str) -> Answer:
        row = await self._row(port, key_or_id)
        return {"key": row["id"], "info": self._shown(row)}

    def update(self, key_or_id: str, **fields: object) -> Answer:
        """Change ``fields``, those of `generate`, and leave all others as they are; None clears one. What was
        spent goes on being counted. ``{"key": its id, ...}`` as in `info`."""
        return run_sync(self._update(SYNC, key_or_id, fields))

    async def aupdate(self, key_or_id: str, **fields: object) -> Answer:
        """`update` for async callers."""
        return await self._update(async_port(), key_or_id, fields)

    async def _update(self, port: Port, key_or_id: str, fields: Mapping[str, object]) -> Answer:
        key_id, columns, now = _id(key_or_id), check_fields(fields), self._clock()
        values, use = _values(columns, now)
        row = await self._asker.manage(port, "change", key_id, {**values, "updated": now}, use)
        if row is None:
            raise _unknown()
        self._lookup.forget(key_id)
        return {"key": key_id, **self._shown(row)}

    def delete(self, keys_or_ids: str | Sequence[str]) -> Ids:
        """Remove keys; the ids of those there were. Effective at once here, within a second elsewhere."""
        return run_sync(self._delete(SYNC, keys_or_ids))

    async def adelete(self, keys_or_ids: str | Sequence[str]) -> Ids:
        """`delete` for async callers."""
        return await self._delete(async_port(), keys_or_ids)

    async def _delete(self, port: Port, keys_or_ids: str | Sequence[str]) -> Ids:
        given = [keys_or_ids] if isinstance(keys_or_ids, str) else keys_or_ids
        if not isinstance(given, list | tuple) or len(given) > _MOST_KEYS:
            raise InvalidRequestError(f"keys: expected a list of at most {_MOST_KEYS} keys", param="keys")
        ids = [_id(each, "keys") for each in given]
        removed: Ids = await self._asker.manage(port, "remove", ids)
        for key_id in ids:
            self._lookup.forget(key_id)
        return removed

    def regenerate(self, key_or_id: str, **fields: object) -> Answer:
        """Put a new key in the place of this one, with all it may do and has spent, changed by ``fields``;
        the old one is refused from now on. As `generate`. ``new_key``: one of your own. What calls in flight
        under the old key cost is not counted."""
        return run_sync(self._regenerate(SYNC, key_or_id, fields))

    async def aregenerate(self, key_or_id: str, **fields: object) -> Answer:
        """`regenerate` for async callers."""
        return await self._regenerate(async_port(), key_or_id, fields)

    async def _regenerate(self, port: Port, key_or_id: str, fields: Mapping[str, object]) -> Answer:
        columns = check_fields(fields, besides=("new_key",))
        key = new_key() if fields.get("new_key") is None else check_key(fields["new_key"], "new_key")
        if self._lookup.is_master(key):
            raise InvalidRequestError("new_key: this is the master key", param="new_key")
        key_id, now = _id(key_or_id), self._clock()
        values, use = _values(columns, now)
        new = {**values, "id": id_of(key), "name": masked(key), "updated": now}
        row = await self._asker.manage(port, "replace", key_id, new, use)
        if row is None:
            await self._row(port, key_id)  # unknown, or else
            raise InvalidRequestError(
                "new_key: there is such a key already", param="new_key", code="key_exists"
            )
        self._lookup.forget(key_id)
        self._lookup.forget(row["id"])
        return {"key": key, **self._shown(row)}

    def block(self, key_or_id: str) -> Answer:
        """Refuse the key until `unblock`. As `update`."""
        return run_sync(self._update(SYNC, key_or_id, {"blocked": True}))

    async def ablock(self, key_or_id: str) -> Answer:
        """`block` for async callers."""
        return await self._update(async_port(), key_or_id, {"blocked": True})

    def unblock(self, key_or_id: str) -> Answer:
        return run_sync(self._update(SYNC, key_or_id, {"blocked": False}))

    async def aunblock(self, key_or_id: str) -> Answer:
        """`unblock` for async callers."""
        return await self._update(async_port(), key_or_id, {"blocked": False})

    def list(
        self, page: int = 1, size: int = 100, user_id: str | None = None, team_id: str | None = None
    ) -> Answer:
        """A page of keys, the latest first: ``{"keys": [as in info], "total_count", "current_page",
        "total_pages"}``; of one user or team where that is given."""
        return run_sync(self._list(SYNC, page, size, user_id, team_id))

    async def alist(
        self, page: int = 1, size: int = 100, user_id: str | None = None, team_id: str | None = None
    ) -> Answer:
        """`list` for async callers."""
        return await self._list(async_port(), page, size, user_id, team_id)

    async def _list(self, port: Port, page: int, size: int, user: str | None, team: str | None) -> Answer:
        _check_number("page", page, 10**9)
        _check_number("size", size, _MOST_KEYS)
        asked = {"user_id": user, "team_id": team}
        where = {name: value for name, value in check_fields(asked).items() if value is not None}
        rows, total = await self._asker.manage(port, "page", (page - 1) * size, size, where)
        keys = [self._shown(row) for row in rows]
        pages = math.ceil(total / size)
        return {"keys": keys, "total_count": total, "current_page": page, "total_pages": pages}

    async def _row(self, port: Port, key_or_id: str) -> dict[str, Any]:
        row: dict[str, Any] | None = await self._asker.manage(port, "get", _id(key_or_id))
        if row is None:
            raise _unknown()
        return row

    def _shown(self, row: Mapping[str, Any]) -> Answer:
        return shown(record_of(row, self._clock()))


def shown(record: KeyRecord) -> Answer:
    """A record under LiteLLM's names; times are ISO 8601, in UTC."""
    controls = record.allowed_cache_controls
    return {
        "token": record.id,
        "token_id": record.id,
        "key_name": record.name,
        "key_alias": record.alias,
        "user_id": record.user,
        "team_id": record.team,
        "models": list(record.models),
        "aliases": dict(record.aliases),
        "metadata": dict(record.metadata),
        "allowed_cache_controls": None if controls is None else sorted(controls),
        "expires": _time(record.expires),
        "rpm_limit": record.rpm_limit,
        "tpm_limit": record.tpm_limit,
        "max_parallel_requests": record.max_parallel_requests,
        "max_budget": record.max_budget,
        "budget_duration": record.budget_duration,
        "budget_reset_at": _time(record.budget_resets),
        "spend": record.spend,
        "blocked": record.blocked,
        "admin": record.admin,
        "config": dict(record.config),
        "created_at": _time(record.created),
        "updated_at": _time(record.updated),
    }


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.removesuffix("+00:00") + "Z"


def _values(columns: Mapping[str, Any], now: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns of the record, and what is set of its use."""
    values, use = dict(columns), {}
    if "duration" in values:
        duration = parse_duration(values.pop("duration"))
        values["expires"] = None if duration is None else duration.after(now)
    if "spend" in values:
        use["spend"] = values.pop("spend")
    if "budget_duration" in values:
        renewed = parse_duration(values["budget_duration"], field="budget_duration")
        use["budget_resets"] = None if renewed is None else renewed.after(now)
    return values, use


def _id(key_or_id: object, field: str = "key") -> str:
    if not isinstance(key_or_id, str) or not key_or_id:
        raise InvalidRequestError(f"{field}: expected a key or its id", param=field)
    return id_of(key_or_id)


def _unknown() -> KeyNotFoundError:
    return KeyNotFoundError("there is no such API key", param="key")


def _check_number(field: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidRequestError(f"{field}: expected a whole number from 1 to {most}", param=field)
