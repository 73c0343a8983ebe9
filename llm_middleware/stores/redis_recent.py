"""`RecentEntries`: for each caller, which entries were stored for it last, so that all of them come at once.

The index of an owner is a list of the 64 digits of cache keys, newest first. A list and no sorted set: its
order is that in which the server was asked, whatever clocks say; a hundred names of 64 bytes lie in one block
of memory, so that finding one takes microseconds; and taking the hundred newest is one command.

Names of entries that are gone are removed when they are seen. A flush leaves indexes as they are: they hold
no more than names, and end by themselves.
"""

from __future__ import annotations

from typing import Any, Final

from ..errors import StoreError
from .redis_connect import RedisConnection
from .redis_plan import Command, Plan, arun, milliseconds, one, pipeline, run

__all__ = ["RecentEntries"]

_MOST_BYTES: Final = 4 * 2**20  # what comes at once: a budget of 0.25 s has room for it on any local network

# The digits to the front, and the index kept for as long as any of its entries. PTTL: -2 for no index, -1 for
# one without end. An index that LREM empties loses its time to live, so that is asked first.
_NOTE: Final = """\
local left = redis.call('PTTL', KEYS[1])
redis.call('LREM', KEYS[1], 0, ARGV[1])
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('LTRIM', KEYS[1], 0, ARGV[2] - 1)
if ARGV[3] == '' then
  redis.call('PERSIST', KEYS[1])
elseif left ~= -1 then
  redis.call('PEXPIRE', KEYS[1], math.max(left, ARGV[3]))
end"""

# Values newest first, none that makes them too many bytes. What is gone, or is no string, leaves the index;
# pcall, as a server that takes no writes at the moment can still be read.
_READ: Final = """\
local found, gone, room = {}, {}, tonumber(ARGV[2])
for _, name in ipairs(redis.call('LRANGE', KEYS[1], 0, ARGV[3] - 1)) do
  local size = redis.pcall('STRLEN', ARGV[1] .. name)
  if type(size) ~= 'number' then
    gone[#gone + 1] = name
  elseif size <= room then
    local value = redis.call('GET', ARGV[1] .. name)
    if value then
      found[#found + 1] = name
      found[#found + 1] = value
      room = room - size
    else
      gone[#gone + 1] = name
    end
  end
end
for _, name in ipairs(gone) do
  redis.pcall('LREM', KEYS[1], 0, name)
end
return found"""


class RecentEntries:
    """The ``most`` newest entries of each owner among those of ``namespace``.

    An owner is an opaque string of hex digits: who called, and for what kind of answer. The index lies under
    ``<namespace>:~recent:<owner>``, which is no entry's key. ``most_bytes``: of values that come at once.
    """

    def __init__(
        self,
        connection: RedisConnection,
        namespace: str,
        *,
        most: int = 100,
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self._connection = connection
        self._prefix = f"{namespace}:"
        self._most = most
        self._most_bytes = most_bytes

    def noting(self, owner: str, key: str, ttl: float | None) -> list[Command]:
        """Commands that make ``key`` the newest of ``owner``, to be sent with the SET that has this ``ttl``.

        No command for a key of another namespace; one that removes it for a ``ttl`` of zero or less. An
        error that one of them is answered with concerns the index alone: the entry is stored all the same.

        One script; in a Cluster plain commands, as redis-py asks the server for the keys of each script that
        a pipeline has. Two of them need Redis 7, and an index whose entries live for ever is given an end
        there by an entry that does not.
        """
        index, name = self._index(owner), key.removeprefix(self._prefix)
        if name == key or ":" in name:
            return []
        if ttl is not None and ttl <= 0:
            return [("LREM", index, 0, name)]
        lives = milliseconds(ttl)
        if not self._connection.clustered:
            return [("EVAL", _NOTE, 1, index, name, self._most, "" if lives is None else lives)]
        moved: list[Command] = [
            ("LREM", index, 0, name),
            ("LPUSH", index, name),
            ("LTRIM", index, 0, self._most - 1),
        ]
        if lives is None:
            return [*moved, ("PERSIST", index)]
        # GT alone would leave a new index without end.
        return [*moved, *(("PEXPIRE", index, lives, flag) for flag in ("NX", "GT"))]

    def recent(self, owner: str) -> list[tuple[str, bytes]]:
        """The keys and values of what is still there, newest first. Raises `StoreError`.

        One round trip, which leaves out values for which there is no room any more. In a Cluster two, a third
        if some are gone; values are left out that are longer than an equal share of the room, or empty.
        """
        return run(self._connection, self._recent(owner))

    async def arecent(self, owner: str) -> list[tuple[str, bytes]]:
        return await arun(self._connection, self._recent(owner))

    def _index(self, owner: str) -> str:
        return f"{self._prefix}~recent:{owner}"

    def _recent(self, owner: str) -> Plan[list[tuple[str, bytes]]]:
        index = self._index(owner)
        if self._connection.clustered:
            return (yield from self._from_nodes(index))
        asked: Command = ("EVAL", _READ, 1, index, self._prefix, self._most_bytes, self._most)
        found: list[bytes] = yield one(asked)
        return [
            (self._prefix + name.decode(), value) for name, value in zip(found[::2], found[1::2], strict=True)
        ]

    def _from_nodes(self, index: str) -> Plan[list[tuple[str, bytes]]]:
        names: list[bytes] = yield one(("LRANGE", index, 0, self._most - 1))
        if not names:
            return []
        keys = [self._prefix + name.decode() for name in dict.fromkeys(names)]
        share = self._most_bytes // len(keys)
        replies: list[Any] = yield pipeline([("GETRANGE", key, 0, share) for key in keys], strict=False)
        found, gone = [], []
        for key, value in zip(keys, replies, strict=True):
            if not value or _is_no_string(value):
                gone.append(key.removeprefix(self._prefix))
            elif isinstance(value, Exception):
                self._connection.fail(value, self._connection.budget)
            elif len(value) <= share:
                found.append((key, value))
        if gone:
            try:
                yield pipeline([("LREM", index, 0, name) for name in gone])
            except StoreError:
                pass  # they are seen again
        return found


def _is_no_string(reply: object) -> bool:
    return isinstance(reply, Exception) and "WRONGTYPE" in str(reply)
