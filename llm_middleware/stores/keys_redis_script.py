"""What `RedisKeys` has Redis do at once: scripts, and what goes into and comes out of the one that counts.

``COUNT`` is `stores.keys_rules` in Lua, on the server's clock. Numbers are stored with 17 digits, so that a
float comes back as it went in.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final, NamedTuple

from .keys_rules import WEIGHT, Ask, Reply

__all__ = ["ADD", "CHANGE", "COUNT", "READ", "REMOVE", "Script", "asked", "replied"]


class Script(NamedTuple):
    body: str
    sha: str


def _script(body: str) -> Script:
    return Script(body, hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest())


# KEYS of all: the record, its use, the calls in flight by when they are over, what they hold.

# ARGV: the channel, the id; how many fields of the record, and they; the fields of the use.
ADD: Final = _script("""
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local last = 3 + ARGV[3] * 2
redis.call('HSET', KEYS[1], unpack(ARGV, 4, last))
redis.call('DEL', KEYS[2], KEYS[3], KEYS[4])
redis.call('HSET', KEYS[2], unpack(ARGV, last + 1))
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 1
""")
# As above; either may have no fields.
CHANGE: Final = _script("""
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local last = 3 + ARGV[3] * 2
if last > 3 then redis.call('HSET', KEYS[1], unpack(ARGV, 4, last)) end
if #ARGV > last then redis.call('HSET', KEYS[2], unpack(ARGV, last + 1)) end
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 1
""")
READ: Final = _script("return {redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[2])}")
# ARGV: the channel, the id. What was spent; nothing where there was no key.
REMOVE: Final = _script("""
if redis.call('EXISTS', KEYS[1]) == 0 then return false end
local spend = redis.call('HGET', KEYS[2], 'spend') or '0'
redis.call('DEL', unpack(KEYS))
redis.call('PUBLISH', ARGV[1], ARGV[2])
return spend
""")
# Fields of the use: rf, r the window of requests; tf, t that of tokens; held of the budget by calls.
COUNT: Final = _script(
    """
local ask = cjson.decode(ARGV[1])
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
local function text(number) return string.format('%.17g', number) end
local h = redis.call('HMGET', KEYS[2], 'rf', 'r', 'tf', 't', 'spend', 'resets', 'mean', 'held')
if not h[5] then
  if ask.stored or ask.settles then return {'gone', '-1', '0'} end
  h[5], h[6] = ask.spend, ask.resets
end
for i = 1, 8 do h[i] = tonumber(h[i] or 0) end
local rf, r, tf, t, spend, resets, mean, held = unpack(h)
if resets > 0 and resets <= now then spend, resets = 0, ask.following end
for _, ended in ipairs(ask.ended) do
  local id, tokens, cost, again = unpack(ended)
  local call = id ~= '' and redis.call('HGET', KEYS[4], id)
  if call then
    local from, taken, part = string.match(call, '^(%S+) (%S+) (%S+)$')
    redis.call('HDEL', KEYS[4], id)
    redis.call('ZREM', KEYS[3], id)
    held = held - part
    if tokens >= 0 and tonumber(from) == tf then t = math.max(0, t + tokens - taken) end
  end
  if (call or again == 0) and cost > 0 then
    spend = spend + cost
    if mean > 0 then mean = mean + (cost - mean) * WEIGHT else mean = cost end
  end
end
local function wait(from, used, more, limit)
  if more > limit or limit < 1 then return -1 end
  if from <= now and now < from + ask.window and used + more > limit then return from + ask.window - now end
  return 0
end
local function judge()
  if ask.rpm >= 0 and ask.requests > 0 then
    local seconds = wait(rf, r, ask.requests, ask.rpm)
    if seconds ~= 0 then return 'rpm', seconds, 0 end
  end
  if ask.call == '' then return '', -1, 0 end
  for _, over in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', text(now), 'LIMIT', 0, 1000)) do
    local part = string.match(redis.call('HGET', KEYS[4], over) or '', '^%S+ %S+ (%S+)$')
    held = held - (part or 0)
    redis.call('HDEL', KEYS[4], over)
    redis.call('ZREM', KEYS[3], over)
  end
  local flying = redis.call('ZCARD', KEYS[3])
  if flying == 0 then held = 0 end
  if ask.parallel >= 0 and flying >= ask.parallel then return 'parallel', -1, 0 end
  if ask.tpm >= 0 then
    local seconds = wait(tf, t, ask.tokens, ask.tpm)
    if seconds ~= 0 then return 'tpm', seconds, 0 end
  end
  if ask.budget < 0 then return '', -1, 0 end
  local cost, slack = ask.cost, 1e-9 * ask.budget
  if cost < 0 then
    if mean > 0 then cost = mean else cost = ask.share * ask.budget end
    cost = math.max(ask.minimum, cost)
  end
  if spend >= ask.budget - slack then
    if resets > 0 then return 'budget', resets - now, 0 end
    return 'budget', -1, 0
  end
  if flying > 0 and spend + held + cost > ask.budget + slack then return 'held', -1, 0 end
  return '', -1, cost
end
local refused, seconds, cost = '', -1, 0
if not ask.settles then refused, seconds, cost = judge() end
if refused == '' then
  if ask.rpm >= 0 and ask.requests > 0 then
    if not (rf <= now and now < rf + ask.window) then rf, r = now, 0 end
    r = r + ask.requests
  end
  if ask.call ~= '' then
    if ask.tpm >= 0 then
      if not (tf <= now and now < tf + ask.window) then tf, t = now, 0 end
      t = t + ask.tokens
    end
    held = held + cost
    redis.call('ZADD', KEYS[3], text(now + ask.hold), ask.call)
    redis.call('HSET', KEYS[4], ask.call, text(tf) .. ' ' .. text(ask.tokens) .. ' ' .. text(cost))
  end
end
redis.call('HSET', KEYS[2], 'rf', text(rf), 'r', text(r), 'tf', text(tf), 't', text(t),
  'spend', text(spend), 'resets', text(resets), 'mean', text(mean), 'held', text(math.max(0, held)))
return {refused, text(seconds), text(cost)}
""".replace("WEIGHT", str(WEIGHT))
)


def asked(ask: Ask) -> str:
    """For ``COUNT``: no limit is -1."""

    def limit(value: float | None) -> float:
        return -1 if value is None else value

    return json.dumps(
        {
            "stored": ask.stored,
            "settles": ask.settles_only,
            "requests": ask.requests,
            "rpm": limit(ask.rpm),
            "call": ask.call,
            "tokens": ask.tokens,
            "tpm": limit(ask.tpm),
            "parallel": limit(ask.parallel),
            "budget": limit(ask.budget),
            "cost": limit(ask.cost),
            "minimum": ask.minimum,
            "share": ask.share,
            "window": ask.window,
            "hold": ask.hold,
            "spend": ask.spend,
            "resets": ask.resets or 0,
            "following": ask.following or 0,
            "ended": [[each.call, limit(each.tokens), each.cost, int(each.again)] for each in ask.ended],
        }
    )


def replied(answer: Any) -> Reply:
    refused, seconds, cost = (bytes(part).decode() for part in answer)
    return Reply(refused, float(seconds) if float(seconds) >= 0 else None, float(cost))
