"""Rows of a vector index in a Redis: what both engines share (`redis_search`, `redis_vectorset`).

A row is a hash, ``<name>:row:<key>``, that leaves by itself when its time is over. What finds the nearest
rows lies beside it and differs by engine. Whatever reads before it writes is a script, and so atomic; in a
Cluster a script names one key, as each row lies where its own key says.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from ..stores.redis_connect import RedisConnection
from ..stores.redis_plan import Command, Plan, Step, pipeline
from .records import Neighbour, Row

__all__ = [
    "FIELDS",
    "PUT_ROW",
    "Call",
    "Engine",
    "Entry",
    "Rows",
    "Script",
    "Taken",
    "batches",
    "decoded",
    "encoded",
    "neighbour",
    "script",
]

FIELDS: Final = ("scope", "dims", "text", "payload", "expires")
_BATCH: Final = (
    50  # rows removed in one round trip: from a large graph each takes a fraction of a millisecond
)
_GLOB: Final = re.compile(r"([\\*?\[\]])")


class Script(NamedTuple):
    body: str
    sha: str


def script(body: str) -> Script:
    return Script(body, hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest())


Call: TypeAlias = tuple[Script, Sequence[bytes], Sequence[bytes | str | int]]
"""A script, its keys and its arguments."""

# The fields from ARGV[first] on, in place of what was there. Which set that was in: its dims and its scope.
PUT_ROW: Final = """
local function put_row(name, ms, first)
  local was = redis.call('HMGET', name, 'dims', 'scope')
  redis.call('DEL', name)
  redis.call('HSET', name, unpack(ARGV, first))
  if ms ~= '' then redis.call('PEXPIRE', name, ms) end
  return was
end
"""
# KEYS: rows. ARGV: what the names of sets begin with, where they are reached from here; the time, where only
# what is over is meant; how long the part of a row's name before its key is.
_TAKE: Final = script("""
local taken = {}
for i, name in ipairs(KEYS) do
  local row = redis.call('HMGET', name, 'dims', 'scope', 'expires')
  local meant = row[1] and (ARGV[2] == '' or (tonumber(row[3]) or math.huge) <= tonumber(ARGV[2]))
  taken[i] = meant and row
  if meant then
    redis.call('DEL', name)
    if ARGV[1] ~= '' then
      redis.call('VREM', ARGV[1] .. row[1] .. ':' .. row[2], string.sub(name, ARGV[3] + 1))
    end
  end
end
return taken
""")
_UPDATE: Final = script("""
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'payload', ARGV[1])
return 1
""")
# ARGV: the data; whether there is one to compare with, and it.
_KEEP: Final = script("""
local kept = redis.call('GET', KEYS[1])
if ARGV[2] == '0' then
  if kept then return 0 end
elseif kept ~= ARGV[3] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1])
return 1
""")


class Entry(NamedTuple):
    """A row that has been checked. ``left``: milliseconds that it is to live, None: for ever."""

    row: Row
    dims: int
    payload: str
    left: int | None

    @property
    def lives(self) -> str:
        """``left`` as a script takes it."""
        return "" if self.left is None else str(self.left)

    @property
    def expires(self) -> str:
        return repr(float(self.row.expires))

    def fields(self) -> list[bytes | str | int]:
        """The fields of the row's hash and their values, in turn."""
        row = self.row
        texts = ("text", encoded(row.text), "payload", self.payload)
        return ["scope", row.scope, "dims", self.dims, *texts, "expires", self.expires]


class Taken(NamedTuple):
    """A row that was removed."""

    key: str
    dims: int
    scope: str
    expires: float


class Engine(Protocol):
    """What finds the nearest rows."""

    def add(self, entry: Entry, now: float) -> Plan[None]: ...

    def search(
        self, scope: str, vector: bytes, dims: int, k: int, now: float, *, known: bool
    ) -> Plan[list[Neighbour]]:
        """``known``: there are rows of so many dimensions, or are to be."""
        ...

    def remove(self, keys: Sequence[str]) -> Plan[list[Taken]]: ...

    def count(self) -> Plan[int]: ...

    def purge(self, now: float) -> Plan[int]: ...


class Rows:
    """The rows and states of the index ``name``, and their names."""

    def __init__(self, connection: RedisConnection, name: str) -> None:
        self.connection = connection
        self.clustered = connection.clustered
        self.name = name
        self.rows = f"{name}:row:"
        self._skip = len(encoded(self.rows))

    def row(self, key: str) -> bytes:
        return encoded(self.rows + key)

    def key(self, row: bytes) -> str:
        return decoded(row[self._skip :])

    def call(self, calls: Sequence[Call]) -> Plan[list[Any]]:
        """What each script returns; all are sent at once. The first error is raised when all were."""
        replies: list[Any] = []
        if calls:
            replies = yield pipeline([_by_sha(*call) for call in calls], strict=False)
        unknown = [place for place, reply in enumerate(replies) if "No matching script" in _error(reply)]
        if unknown:
            again = yield pipeline([_by_body(*calls[place]) for place in unknown], strict=False)
            for place, reply in zip(unknown, again, strict=True):
                replies[place] = reply
        for reply in replies:
            if isinstance(reply, Exception):
                self.connection.fail(reply, self.connection.budget)
        return replies

    def take(self, keys: Sequence[str], *, sets: str = "", over: float | None = None) -> Plan[list[Taken]]:
        """Remove these rows, those that are over at ``over`` if that is given; which of them there were.

        ``sets``: also from the sets whose names begin so, which no Cluster allows."""
        taken: list[Taken] = []
        until = "" if over is None else repr(over)
        for batch in batches(list(dict.fromkeys(keys)), _BATCH):
            groups = [[key] for key in batch] if self.clustered else [batch]
            arguments = (encoded(sets), until, self._skip)
            calls: list[Call] = [(_TAKE, [self.row(key) for key in group], arguments) for group in groups]
            replies = yield from self.call(calls)
            for key, row in zip(batch, [row for reply in replies for row in reply], strict=True):
                if row:
                    taken.append(Taken(key, int(row[0]), row[1].decode(), float(row[2])))
        return taken

    def update(self, key: str, payload: str) -> Plan[bool]:
        return bool((yield from self.call([(_UPDATE, [self.row(key)], [payload])]))[0])

    def state(self, name: str) -> bytes:
        return encoded(f"{self.name}:state:{name}")

    def keep_state(self, name: str, data: bytes, before: bytes | None) -> Plan[bool]:
        arguments = (data, 0 if before is None else 1, before or b"")
        return bool((yield from self.call([(_KEEP, [self.state(name)], arguments)]))[0])

    def walk(self, kind: str, each: Callable[[list[bytes]], Plan[int]]) -> Plan[int]:
        """The sum of what ``each`` gives for the Redis keys ``<name>:<kind>:...``, in turns of those among a
        thousand of the server's, on every master. One that is renamed or moved meanwhile may be missed."""
        pattern = _GLOB.sub(r"\\\1", f"{self.name}:{kind}:") + "*"
        total = 0
        for master in (yield _masters) if self.clustered else [None]:
            at = 0
            while True:
                reply, found = yield _scan(master, at, pattern)
                at = next(iter(reply.values())) if self.clustered else reply
                total += yield from each(list(dict.fromkeys(found)))
                if at == 0:
                    break
        return total


def neighbour(key: str, similarity: float, fields: Mapping[str, bytes]) -> Neighbour:
    """A row as its hash has it. ``fields``: all of `FIELDS` but ``dims``."""
    payload = fields["payload"]
    row = Row(
        key,
        fields["scope"].decode(),
        decoded(fields["text"]),
        b"",
        float(fields["expires"]),
        json.loads(payload) if payload else {},
    )
    return Neighbour(row, min(1.0, similarity))


def encoded(text: str) -> bytes:
    """Any string, lone surrogates too."""
    return text.encode("utf-8", "surrogatepass")


def decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """``items`` in turn, so many at a time."""
    return (items[at : at + size] for at in range(0, len(items), size))


def _by_sha(script: Script, keys: Sequence[bytes], arguments: Sequence[bytes | str | int]) -> Command:
    return ("EVALSHA", script.sha, len(keys), *keys, *arguments)


def _by_body(script: Script, keys: Sequence[bytes], arguments: Sequence[bytes | str | int]) -> Command:
    return ("EVAL", script.body, len(keys), *keys, *arguments)


def _error(reply: object) -> str:
    return str(reply) if isinstance(reply, Exception) else ""


def _masters(client: Any) -> Any:
    """The masters; an async client has to ask for them before it is first used."""
    if not hasattr(client, "initialize"):
        return client.get_primaries()

    async def asked() -> Any:
        return (await client.initialize()).get_primaries()

    return asked()


def _scan(master: Any, at: int, pattern: str) -> Step:
    target = {} if master is None else {"target_nodes": master}
    return lambda client: client.scan(at, encoded(pattern), 1000, **target)
