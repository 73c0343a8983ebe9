"""The nearest rows by vector sets, which every Redis has from 8.0 on, in a Cluster too.

A set for each scope, ``<name>:set:<dimensions>:<scope>``, holds the keys of its rows by their vectors, not
quantized. So a search meets rows of its scope only. Sets of up to ``_EXACT`` rows are compared row by row, in
larger ones Redis walks a graph. A set lives as long as the last of its rows, and an empty one is gone. What
is over leaves a set when a search meets it, by `purge`, or when a row is added: that looks at a few others.
A search is one script, for which the server is busy for about 0.4 ms per thousand rows of 384 dimensions; in
a Cluster, where rows lie on nodes of their own, it reads them in a second round trip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from ..stores.redis_plan import Plan, pipeline
from .records import Neighbour
from .redis_rows import (
    FIELDS,
    PUT_ROW,
    Entry,
    Rows,
    Taken,
    batches,
    decoded,
    encoded,
    neighbour,
    script,
)

__all__ = ["VectorSetEngine"]

_TURNS: Final = 3  # of a search: what it meets that is over is removed, and it is made again
_MORE: Final = 4  # times as many rows are asked for in each
_EXACT = 10_000  # rows: comparing them takes no longer than a graph that finds the nearest as surely
_OVER: Final = 100  # rows removed in one round trip, about

# Gives the keys of others that are over, and no more in the set.
# ARGV of both that add: milliseconds to live; the vector; the key; when it is over, for a filter; the time.
_PUT_IN_SET: Final = """
local function put_in_set(set)
  local ms, vector, key, expires, now = unpack(ARGV, 1, 5)
  local left = redis.call('PTTL', set)
  redis.call('VADD', set, 'FP32', vector, key, 'NOQUANT', 'SETATTR', '{"e":' .. expires .. '}')
  if ms == '' then
    if left >= 0 then redis.call('PERSIST', set) end
  elseif left == -2 or (left >= 0 and left < tonumber(ms)) then
    redis.call('PEXPIRE', set, ms)
  end
  local over = {}
  for _, other in ipairs(redis.call('VRANDMEMBER', set, 3)) do
    local attributes = redis.call('VGETATTR', set, other)
    if attributes and tonumber(string.match(attributes, ':(.*)}')) <= tonumber(now) then
      redis.call('VREM', set, other)
      over[#over + 1] = other
    end
  end
  return over
end
"""
# KEYS: the row, the set. ARGV: those; what the names of sets begin with; the row's fields.
_ADD: Final = script(
    PUT_ROW
    + _PUT_IN_SET
    + """
local was = put_row(KEYS[1], ARGV[1], 7)
local old = was[1] and ARGV[6] .. was[1] .. ':' .. was[2]
if old and old ~= KEYS[2] then redis.call('VREM', old, ARGV[3]) end
return put_in_set(KEYS[2])
"""
)
# The same in two steps, for a Cluster.
_ADD_ROW: Final = script(PUT_ROW + "return put_row(KEYS[1], ARGV[1], 2)")
_ADD_TO_SET: Final = script(_PUT_IN_SET + "return put_in_set(KEYS[1])")
# KEYS: the set. ARGV: the vector; how many; the time; whether to pass over what is over; what the names of
# rows begin with, where they are reached from here; up to how many rows each is compared; keys that were met
# and are over.
_NEAR: Final = script(
    """
local set, rows, exact = KEYS[1], ARGV[5], tonumber(ARGV[6])
for i = 7, #ARGV do
  local attributes = redis.call('VGETATTR', set, ARGV[i])
  local over = attributes and tonumber(string.match(attributes, ':(.*)}')) <= tonumber(ARGV[3])
  if over or rows == '' or redis.call('EXISTS', rows .. ARGV[i]) == 0 then
    redis.call('VREM', set, ARGV[i])
  end
end
local size = redis.call('VCARD', set)
if size == 0 then return {{}, {}} end
local command = {'VSIM', set, 'FP32', ARGV[1], 'WITHSCORES', 'COUNT', ARGV[2]}
local function also(...) for _, word in ipairs({...}) do command[#command + 1] = word end end
if size <= exact then also('TRUTH') else also('EF', math.max(1000, ARGV[2])) end
if ARGV[4] == '1' then
  also('FILTER', '.e > ' .. ARGV[3])
  if size > exact then also('FILTER-EF', 20000) end
end
local near, fields = redis.call(unpack(command)), {}
if rows ~= '' then
  for i = 1, #near, 2 do
    fields[#fields + 1] = redis.call('HMGET', rows .. near[i], 'scope', 'dims', 'text', 'payload', 'expires')
  end
end
return {near, fields}
"""
)
# KEYS: the set. ARGV: the time; how many at most; up to how many rows each is looked at. The keys that were
# over.
_SWEEP: Final = script(
    """
local some = redis.call('VRANDMEMBER', KEYS[1])
if not some then return {} end
local how = redis.call('VCARD', KEYS[1]) > tonumber(ARGV[3]) and {'FILTER-EF', 20000} or {'TRUTH'}
local filter = '.e <= ' .. ARGV[1]
local over = redis.call('VSIM', KEYS[1], 'ELE', some, 'COUNT', ARGV[2], 'FILTER', filter, unpack(how))
for _, key in ipairs(over) do redis.call('VREM', KEYS[1], key) end
return over
"""
)
_NEVER: Final = "9e15"  # later than any time: JSON has no infinity


class VectorSetEngine:
    """Its `purge` and `count` go through all keys of the server, a thousand at a time."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._sets = f"{rows.name}:set:"
        # What a script may make names of for itself; nothing in a Cluster, where it must name its keys.
        self._near_rows = b"" if rows.clustered else encoded(rows.rows)
        self._near_sets = "" if rows.clustered else self._sets

    def add(self, entry: Entry, now: float) -> Plan[None]:
        row, fields = self._rows.row(entry.row.key), entry.fields()
        expires = _NEVER if entry.left is None else entry.expires
        set_ = self._set(entry.dims, entry.row.scope)
        item: tuple[bytes | str | int, ...] = (
            entry.lives,
            entry.row.vector,
            encoded(entry.row.key),
            expires,
            repr(now),
        )
        if self._rows.clustered:
            (was,) = yield from self._rows.call([(_ADD_ROW, [row], [entry.lives, *fields])])
            (over,) = yield from self._rows.call([(_ADD_TO_SET, [set_], item)])
            if was[0] and self._set(int(was[0]), was[1].decode()) != set_:
                yield from self._leave([Taken(entry.row.key, int(was[0]), was[1].decode(), 0.0)])
        else:
            (over,) = yield from self._rows.call([(_ADD, [row, set_], [*item, encoded(self._sets), *fields])])
        yield from self._rows.take(list(map(decoded, over)), over=now)

    def search(
        self, scope: str, vector: bytes, dims: int, k: int, now: float, *, known: bool
    ) -> Plan[list[Neighbour]]:
        over: list[bytes] = []
        found: list[Neighbour] = []
        for turn in range(_TURNS):
            ask = (vector, k * _MORE**turn, repr(now), int(turn > 0), self._near_rows, _EXACT, *over)
            met = yield from self._meet(self._set(dims, scope), ask)
            over, found = [], []
            for key, score, values in met:
                if _is_of(values, scope, dims, now):
                    fields = dict(zip(FIELDS, values, strict=True))
                    found.append(neighbour(decoded(key), 2 * float(score) - 1, fields))
                else:
                    over.append(key)
            yield from self._rows.take(list(map(decoded, over)), over=now)
            if not over or len(found) >= k:
                break
        return found[:k]

    def _meet(
        self, set_: bytes, ask: Sequence[bytes | str | int]
    ) -> Plan[list[tuple[bytes, bytes, list[Any]]]]:
        """What is nearest: the key, the score and the row's `FIELDS`, Nones where it is gone."""
        ((near, hashes),) = yield from self._rows.call([(_NEAR, [set_], ask)])
        if self._rows.clustered and near:
            hashes = yield pipeline([("HMGET", self._rows.row(decoded(key)), *FIELDS) for key in near[::2]])
        return list(zip(near[::2], near[1::2], hashes, strict=True))

    def remove(self, keys: Sequence[str]) -> Plan[list[Taken]]:
        taken = yield from self._rows.take(keys, sets=self._near_sets)
        if self._rows.clustered:
            yield from self._leave(taken)
        return taken

    def count(self) -> Plan[int]:
        seen: set[int] = set()  # SCAN may tell a key twice

        def count(names: list[bytes]) -> Plan[int]:
            before = len(seen)
            seen.update(map(hash, names))
            return len(seen) - before
            yield

        return (yield from self._rows.walk("row", count))

    def purge(self, now: float) -> Plan[int]:
        def purge(sets: list[bytes]) -> Plan[int]:
            removed = 0
            sizes = (yield pipeline([("VCARD", name) for name in sets])) if sets else []
            for batch in _loads(sets, sizes):
                removed += yield from self._sweep(batch, now)
            return removed

        return (yield from self._rows.walk("set", purge))

    def _sweep(self, sets: Sequence[bytes], now: float) -> Plan[int]:
        removed = 0
        while sets:
            arguments = (repr(now), _OVER // len(sets) + 1, _EXACT)
            replies = yield from self._rows.call([(_SWEEP, [name], arguments) for name in sets])
            keys = [decoded(key) for reply in replies for key in reply]
            yield from self._rows.take(keys, over=now)
            removed += len(keys)
            sets = [name for name, reply in zip(sets, replies, strict=True) if reply]
        return removed

    def _leave(self, taken: Sequence[Taken]) -> Plan[None]:
        """Take rows that are gone out of their sets."""
        for batch in batches(taken, _OVER):
            commands = [("VREM", self._set(row.dims, row.scope), encoded(row.key)) for row in batch]
            yield pipeline(commands)

    def _set(self, dims: int, scope: str) -> bytes:
        return encoded(f"{self._sets}{dims}:{scope}")


def _loads(sets: Sequence[bytes], sizes: Sequence[int]) -> Iterator[list[bytes]]:
    """``sets`` in turn, as many at a time as are looked through in a few milliseconds."""
    load, weight = list[bytes](), 0
    for name, size in zip(sets, sizes, strict=True):
        if load and (weight + size > _EXACT or len(load) == _OVER):
            yield load
            load, weight = [], 0
        load.append(name)
        weight += size
    if load:
        yield load


def _is_of(values: Sequence[Any], scope: str, dims: int, now: float) -> bool:
    """Whether a row is still there, in this set, and not over. ``values``: of `FIELDS`."""
    if None in values:
        return False
    return (values[0].decode(), int(values[1])) == (scope, dims) and float(values[4]) > now
