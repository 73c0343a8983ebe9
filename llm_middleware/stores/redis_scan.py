"""Paging over the entries of one namespace in a Redis, as a plan for `RedisStore` to run.

A page is what one SCAN of a thousand keys finds, so it is bounded however much else the server holds, and may
be empty. A Cluster's masters are walked one after the other, in the order of their names. A cursor says where
the walk is: ``<SCAN's cursor>``, in a Cluster ``<mark>-<master>-<its cursor>``, where the mark is made of the
masters' names and tells when they have become others. SCAN's own guarantee holds: what is there during the
whole walk is found, some of it perhaps twice.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from ..errors import InvalidRequestError
from .redis_plan import Plan, Step, pipeline

__all__ = ["OUTDATED", "Page", "scan_heads", "scan_keys"]

OUTDATED: Final = "cursor_outdated"
"""The code of the error for a cursor that a Cluster's other masters have made useless."""

Page: TypeAlias = tuple[str | None, list[tuple[str, bytes]]]
"""The cursor of the next page, None at the end, and this one's entries: the key and the first bytes."""

_SCANNED: Final = 1000  # keys looked at per page
_CURSOR: Final = re.compile(r"(?:([0-9a-f]{8})-([0-9]{1,5})-)?([0-9]{1,20})")
_MOST: Final = 2**64  # from here on Redis refuses a cursor
_DIGITS: Final = re.compile(rb":[0-9a-f]{64}\Z")
_GLOB: Final = re.compile(r"([\\*?\[\]])")


def scan_heads(namespace: str, cursor: str | None, size: int, clustered: bool) -> Plan[Page]:
    """One page of the entries of exactly ``namespace``, each with the first ``size`` bytes of its value.

    Two round trips, three where there are empty values. `InvalidRequestError` for a cursor that is none; with
    the code ``cursor_outdated`` for one of a Cluster that has other masters now: begin again then.
    """
    following, keys = yield from scan_keys(namespace, cursor, clustered)
    return following, (yield from _heads(keys, size))


def scan_keys(namespace: str, cursor: str | None, clustered: bool) -> Plan[tuple[str | None, list[str]]]:
    """`scan_heads` without the values: one round trip."""
    mark, number, at = ("", 0, 0) if cursor is None else _read_cursor(cursor, clustered)
    masters = _masters((yield _connected)) if clustered else [None]
    current = _mark(masters)
    if mark not in ("", current):
        raise _refused("the cluster has other masters now: begin again", code=OUTDATED)
    if number >= len(masters):
        raise _refused("not one that this store gave")
    reply, found = yield _scan(masters[number], at, namespace)
    at = next(iter(reply.values())) if clustered else reply
    number += at == 0
    following = (f"{current}-{number}-{at}" if clustered else str(at)) if number < len(masters) else None
    start = len(namespace.encode())
    # A dict, as one SCAN may tell a key twice.
    return following, list(dict.fromkeys(key.decode() for key in found if _DIGITS.match(key, start)))


def _read_cursor(cursor: object, clustered: bool) -> tuple[str, int, int]:
    """The masters' mark, the number of the master and its cursor."""
    match = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
    if match is None or (match[1] is not None) is not clustered or int(match[3]) >= _MOST:
        raise _refused("not one that this store gave")
    return match[1] or "", int(match[2] or 0), int(match[3])


def _refused(why: str, code: str | None = None) -> InvalidRequestError:
    return InvalidRequestError(f"cursor: {why}", param="cursor", code=code)


def _connected(client: Any) -> Any:
    """The client of a Cluster once it knows the masters: an async one asks for them when it is first used."""
    return client.initialize() if hasattr(client, "initialize") else client


def _masters(client: Any) -> list[Any]:
    return sorted(client.get_primaries(), key=_name)


def _name(node: Any) -> str:
    return str(node.name)


def _mark(masters: Sequence[Any]) -> str:
    return f"{zlib.crc32(','.join(map(_name, masters)).encode()):08x}" if masters != [None] else ""


def _scan(master: Any, at: int, namespace: str) -> Step:
    pattern = _GLOB.sub(r"\\\1", namespace) + ":" + "?" * 64
    target = {} if master is None else {"target_nodes": master}
    return lambda client: client.scan(at, pattern, _SCANNED, **target)


def _heads(keys: Sequence[str], size: int) -> Plan[list[tuple[str, bytes]]]:
    """The first bytes of those of ``keys`` that are there and are strings."""
    last = max(size, 1) - 1  # GETRANGE takes -1 for the end
    replies = yield from _each([("GETRANGE", key, 0, last) for key in keys])
    # An empty value and a key that has just gone look alike to GETRANGE.
    empty = [key for key, reply in zip(keys, replies, strict=True) if reply == b""]
    again = dict(zip(empty, (yield from _each([("GET", key) for key in empty])), strict=True))
    values = [(key, again.get(key, reply)) for key, reply in zip(keys, replies, strict=True)]
    return [(key, value[:size]) for key, value in values if value is not None]


def _each(commands: Sequence[tuple[str | int, ...]]) -> Plan[list[Any]]:
    """The replies to ``commands``, sent at once; None also where there is something that is no string."""

    replies: list[Any] = (yield pipeline(commands, strict=False)) if commands else []
    failed = [reply for reply in replies if isinstance(reply, Exception) and "WRONGTYPE" not in str(reply)]
    if failed:
        yield _raise(failed[0])
    return [None if isinstance(reply, Exception) else reply for reply in replies]


def _raise(error: Exception) -> Step:
    """Raise where the errors of steps are translated."""

    def step(client: Any) -> Any:
        raise error

    return step
