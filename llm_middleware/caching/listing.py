"""Listing the entries of a store, page by page, without reading the answers in them.

A cursor is ``<last key shown>.<the store's own cursor>``: pages here are shorter than those of a store, so
that the store's page is asked for again, and what was shown of it left out. As in the store's walk, what is
there all the time is shown, some of it perhaps twice.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from heapq import nsmallest

from .._ports.protocol import Port
from ..errors import CorruptEntryError, InvalidRequestError
from .endpoints import ENDPOINTS
from .entry import About, Entry, about, peek
from .invalidation import heads
from .labels import carries, label, unlabelled
from .tiers import Tiers

__all__ = ["Page", "list_entries"]

Page = tuple[str | None, list[dict[str, object]]]
"""The cursor of the next page, None at the end, and the entries of this one."""

_WALKED = 20  # pages of the store that are walked for one page here: an empty store is soon walked
_DIGITS = 64
_SHOWN = 4000  # characters of an answer
_KINDS = {kind: label("kind", kind) for kind in ENDPOINTS}


async def list_entries(
    port: Port,
    tiers: Tiers,
    namespace: str,
    *,
    now: float,
    prefix: str = "",
    cursor: str | None = None,
    limit: int = 100,
    models: Iterable[str] = (),
    content: bool = False,
) -> Page:
    """At most ``limit`` entries whose keys begin with ``prefix``; see `CacheManager.entries`. ``models``:
    names that are recognised where an entry's own is encrypted."""
    after, at = _read(cursor)
    rows: list[dict[str, object]] = []
    for _ in range(_WALKED):
        following, found = await _walk(port, tiers, namespace, at)
        fits = {key: value for key, value in found.items() if key.startswith(prefix) and key > after}
        chosen = nsmallest(limit - len(rows), fits)
        rows += [
            await _row(port, tiers, f"{namespace}:{key}", fits[key], now, models, content) for key in chosen
        ]
        if len(chosen) < len(fits):
            return _cursor(chosen[-1] if chosen else after, at), rows
        after, at = "", following
        if at is None:
            return None, rows
        if len(rows) == limit:
            break
    return _cursor(after, at), rows


async def _walk(
    port: Port, tiers: Tiers, namespace: str, at: str | None
) -> tuple[str | None, dict[str, Entry | bytes]]:
    """The entries of one page of the farthest tier, by their keys without the namespace."""
    memory = tiers.memory
    if tiers.store is not None or memory is None:
        following, found = await heads(port, tiers, namespace, at)
        return following, {key[-_DIGITS:]: head for key, head in found}
    if at is not None:
        raise _refused()
    keys = [key for key in memory.keys() if key[: -_DIGITS - 1] == namespace]  # noqa: SIM118 - no mapping
    entries = {key[-_DIGITS:]: memory.get(key) for key in keys}
    return None, {key: entry for key, entry in entries.items() if entry is not None}


async def _row(
    port: Port, tiers: Tiers, key: str, found: Entry | bytes, now: float, models: Iterable[str], content: bool
) -> dict[str, object]:
    entry = found if isinstance(found, Entry) else (await tiers.read(port, key) if content else None)
    known = about(entry) if entry is not None else _told(tiers, found, models)
    row: dict[str, object] = {
        "key": key[-_DIGITS:],
        "kind": known.kind,
        "model": known.model,
        "tags": None if known.tags is None else list(known.tags),
        "age": _seconds(now, known.created),
        "ttl": _seconds(known.expires, now),
        "size": known.size,
    }
    if content:
        row["content"] = None if entry is None else _content(entry)
    return row


def _told(tiers: Tiers, head: object, models: Iterable[str]) -> About:
    """What the first bytes of a stored value tell."""
    assert isinstance(head, bytes)
    try:
        labels, sealed = unlabelled(head)
        known = peek(tiers.peek(sealed))
    except (CorruptEntryError, zlib.error):
        return About()
    if known.kind is not None:
        return known
    kind = next((name for name, mark in _KINDS.items() if carries(labels, (mark,))), None)
    model = next((name for name in models if carries(labels, (label("model", name),))), None)
    return known._replace(kind=kind, model=model)


def _content(entry: Entry) -> str:
    form = entry.plain or entry.stream
    return "" if form is None else form.body.decode("utf-8", "replace")[:_SHOWN]


def _seconds(end: float | None, begin: float | None) -> float | None:
    """None where there is no end, or nobody knows."""
    if end is None or begin is None or not math.isfinite(end - begin):
        return None
    return round(end - begin, 3)


def _cursor(after: str, at: str | None) -> str:
    return f"{after}.{at or ''}"


def _read(cursor: str | None) -> tuple[str, str | None]:
    if cursor is None:
        return "", None
    after, dot, at = cursor.partition(".")
    if not dot or len(after) not in (0, _DIGITS):
        raise _refused()
    return after, at or None


def _refused() -> InvalidRequestError:
    return InvalidRequestError("cursor: not one that this cache gave", param="cursor")
