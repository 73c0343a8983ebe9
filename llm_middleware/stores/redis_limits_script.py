"""What `RedisLimits` and its script in Redis say to each other: the script, the questions, the replies."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

__all__ = ["SCRIPT", "SHA", "Limit", "Reply", "Seen", "Told", "read_reply"]

# KEYS: the candidates' hashes, in order, and then those of which something is told.
# Fields: w the beginning of the minute; r, t requests and tokens in it; c the end of the cooldown, p of the
# probe; f failures until fe; a, b the means, each as total, count and time of the last value.
SCRIPT: Final = """
local ask = cjson.decode(ARGV[1])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function mean(key, name, total, count)
  if count == 0 then return end
  local old = redis.call('HMGET', key, name .. 's', name .. 'n', name .. 'u')
  local age = now - (tonumber(old[3] or 0))
  local kept = 0
  if age <= ask.ttl then kept = 0.5 ^ (age * ask.half / ask.ttl) end
  redis.call('HSET', key, name .. 's', (tonumber(old[1] or 0)) * kept + total,
    name .. 'n', (tonumber(old[2] or 0)) * kept + count, name .. 'u', now)
end
local function live(key)
  local cool = tonumber(redis.call('HGET', key, 'c') or 0) or 0
  redis.call('PEXPIRE', key, ask.keep + math.max(0, cool - now))
end
for i, told in ipairs(ask.told) do
  local key = KEYS[#ask.limits + i]
  if told[2] ~= 0 or told[11] ~= 0 then
    local held = redis.call('HMGET', key, 'w', 't', 'r')
    if held[1] and tonumber(held[1]) == told[1] then
      redis.call('HSET', key, 't', math.max(0, tonumber(held[2]) + told[2]),
        'r', math.max(0, tonumber(held[3]) + told[11]))
    end
  end
  if told[3] > 0 then
    local held = redis.call('HMGET', key, 'f', 'fe')
    if not held[1] or tonumber(held[2]) <= now then
      redis.call('HSET', key, 'f', told[3], 'fe', now + ask.window)
    else
      redis.call('HSET', key, 'f', tonumber(held[1]) + told[3])
    end
  end
  if told[5] > 0 and tonumber(redis.call('HGET', key, 'c') or 0) <= now then
    redis.call('HDEL', key, 'c', 'p', 'f', 'fe')
  end
  if told[6] > 0 then redis.call('HDEL', key, 'p') end
  if told[4] > 0 then
    local cool = tonumber(redis.call('HGET', key, 'c') or 0) or 0
    redis.call('HSET', key, 'c', math.max(cool, now + told[4]))
    redis.call('HDEL', key, 'p', 'f', 'fe')
  end
  mean(key, 'a', told[7], told[8])
  mean(key, 'b', told[9], told[10])
  live(key)
end
local taken, probe, soonest, busy, shown = 0, 0, -1, 0, {}
for i, limit in ipairs(ask.limits) do
  if taken > 0 and i > ask.shown then break end
  local key = KEYS[i]
  local h = redis.call('HMGET', key, 'w', 'r', 't', 'c', 'p', 'f', 'fe',
    'as', 'an', 'au', 'bs', 'bn', 'bu')
  for j = 1, 13 do h[j] = tonumber(h[j] or 0) or 0 end
  if h[1] + ask.window <= now then h[1], h[2], h[3] = 0, 0, 0 end
  local rpm, tpm = limit[1], limit[2]
  local wait = 0
  if h[4] > now then wait = h[4] - now elseif h[5] > now then wait = h[5] - now end
  local never = (rpm >= 0 and rpm < 1) or (tpm >= 0 and ask.tokens > tpm)
  if (rpm >= 0 and h[2] >= rpm) or (tpm >= 0 and h[3] + ask.tokens > tpm) then
    wait = math.max(wait, h[1] + ask.window - now)
  end
  if never then wait = -1 end
  if wait == 0 and taken == 0 then
    if h[1] == 0 then h[1] = now end
    taken = i
    h[2], h[3] = h[2] + 1, h[3] + ask.tokens
    redis.call('HSET', key, 'w', h[1], 'r', h[2], 't', h[3])
    if h[4] > 0 then
      probe = 1
      redis.call('HSET', key, 'p', now + ask.probe)
    end
    live(key)
  elseif wait > 0 and (soonest < 0 or wait < soonest) then
    soonest = wait
  end
  if wait > 0 and h[4] <= now and h[5] > now then busy = 1 end
  if h[7] <= now then h[6], h[7] = 0, now end
  local cool = -1
  if h[4] > 0 then cool = math.max(0, h[4] - now) end
  shown[i] = table.concat({string.format('%.0f', h[1]), math.max(0, h[1] + ask.window - now), h[2], h[3],
    cool, h[6], h[7] - now, h[8], h[9], now - h[10], h[11], h[12], now - h[13]}, ' ')
end
return {taken, probe, soonest, busy, unpack(shown)}
"""
SHA: Final = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()


class Limit(NamedTuple):
    """A candidate. ``rpm``, ``tpm``: calls and tokens per minute; None: no limit."""

    id: str
    rpm: int | None
    tpm: int | None


class Seen(NamedTuple):
    """What all processes together know of a candidate. ``window``: its minute, which lasts ``left`` seconds
    more. ``cool``: seconds until its cooldown ends; 0: it is over and not yet probed; None: it has none.
    ``fails``: failures that count, for ``fails_left`` seconds more. ``first_token``, ``per_token``: a mean's
    total, count and age in seconds."""

    window: int
    left: float
    requests: int
    tokens: int
    cool: float | None
    fails: int
    fails_left: float
    first_token: tuple[float, float, float]
    per_token: tuple[float, float, float]


class Reply(NamedTuple):
    """``taken``: which candidate, counted from 0; None: none has room, the first in ``retry_after`` seconds
    (None: never). ``probe``: the call probes it. ``busy``: another call probes one of them. ``seen``: of the
    first candidates, in order."""

    taken: int | None
    probe: bool
    busy: bool
    retry_after: float | None
    seen: list[Seen]


@dataclass(slots=True)
class Told:
    """What came of a call. ``tokens``: what was used less the estimate, in ``window``; ``requests``: -1 where
    the call was not made. ``fails``: failures that count. ``cool``: seconds to leave it alone from `begin`.
    ``closed``: a cooldown is over; ``freed``: its probe told nothing. ``first_token``, ``per_token``: sums of
    so many latencies, in seconds."""

    window: int
    tokens: int = 0
    requests: int = 0
    fails: int = 0
    cool: float = 0.0
    closed: bool = False
    freed: bool = False
    first_token: float = 0.0
    first_tokens: int = 0
    per_token: float = 0.0
    per_tokens: int = 0
    _cool_ends: float = 0.0

    def begin(self) -> Told:
        """What is told; its cooldown has begun."""
        if self.cool:
            self._cool_ends = time.monotonic() + self.cool
        return self

    def merge(self, later: Told) -> None:
        """Tell both at once."""
        self.tokens += later.tokens
        self.requests += later.requests
        if later.closed:
            self.fails, self._cool_ends, self.closed = 0, 0.0, True
        self.fails = 0 if later._cool_ends else self.fails + later.fails
        self._cool_ends = max(self._cool_ends, later._cool_ends)
        self.freed |= later.freed
        self.first_token += later.first_token
        self.first_tokens += later.first_tokens
        self.per_token += later.per_token
        self.per_tokens += later.per_tokens

    def lasting(self) -> Told | None:
        """What is told again where nobody knows whether it was heard: what does no harm if it was."""
        if self._cool_ends or self.tokens > 0:
            return Told(self.window, tokens=max(0, self.tokens), _cool_ends=self._cool_ends)
        return None

    def row(self) -> list[float]:
        """For the script."""
        left = round((self._cool_ends - time.monotonic()) * 1e3)
        cool = max(1, left) if self._cool_ends else 0  # one that is over still begins with a probe
        means = (self.first_token, self.first_tokens, self.per_token, self.per_tokens)
        flags = (int(self.closed), int(self.freed))
        return [self.window, self.tokens, self.fails, cool, *flags, *means, self.requests]


def read_reply(answer: Any) -> Reply:
    taken, probe, soonest, busy, *shown = answer
    retry_after = soonest / 1e3 if soonest > 0 else None
    return Reply(taken - 1 if taken else None, bool(probe), bool(busy), retry_after, list(_seen(shown)))


def _seen(shown: Sequence[bytes]) -> Iterator[Seen]:
    for text in shown:
        window, left, requests, tokens, cool, fails, fails_left, *means = map(float, text.split())
        total, count, age, other, others, other_age = means
        yield Seen(
            int(window),
            left / 1e3,
            int(requests),
            int(tokens),
            None if cool < 0 else cool / 1e3,
            int(fails),
            fails_left / 1e3,
            (total, count, age / 1e3),
            (other, others, other_age / 1e3),
        )
