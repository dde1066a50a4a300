"""What callers have used, counted in Redis for all gateways: `quota.Ledger` as scripts in the server.

Its clock is the server's. An account has two keys, in one slot of a Cluster: a hash with the amounts of each slice, and a
sorted set of the requests that are running, by the end of their leases, so that a gateway that dies frees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from matrixinfer.access.quota import KINDS, NOTHING, SLICES, Amounts, Verdict, judge, limits_of
from matrixinfer.config.access import QuotaConfig
from matrixinfer.index.redis.store import Script, Store

LEASE_SECONDS = 60

_RESERVE = """
-- KEYS use, running
-- ARGV window in seconds, slices, request, lease, most running or -1, four limits or -1, four amounts
-- Returns whether there was room, the current slice, the time, how many are running, then field and value of each amount.
local window, slices = tonumber(ARGV[1]), tonumber(ARGV[2])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local current = math.floor(now * slices / window)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
local running = redis.call('ZCARD', KEYS[2])
local fields, kept, used = redis.call('HGETALL', KEYS[1]), {}, {0, 0, 0, 0}
for i = 1, #fields, 2 do
  local number, kind = string.match(fields[i], '^(%d+):(%d)$')
  if number == nil or tonumber(number) < current - slices then
    redis.call('HDEL', KEYS[1], fields[i])
  else
    used[tonumber(kind)] = used[tonumber(kind)] + tonumber(fields[i + 1])
    table.insert(kept, fields[i])
    table.insert(kept, fields[i + 1])
  end
end
local room = 1
if tonumber(ARGV[5]) >= 0 and running >= tonumber(ARGV[5]) then room = 0 end
for kind = 1, 4 do
  local limit = tonumber(ARGV[5 + kind])
  if limit >= 0 and used[kind] + tonumber(ARGV[9 + kind]) > limit then room = 0 end
end
if room == 1 then
  for kind = 1, 4 do
    if tonumber(ARGV[9 + kind]) ~= 0 then redis.call('HINCRBY', KEYS[1], current .. ':' .. kind, ARGV[9 + kind]) end
  end
  redis.call('ZADD', KEYS[2], now + tonumber(ARGV[4]), ARGV[3])
  redis.call('EXPIRE', KEYS[1], math.ceil(window * 2) + 1)
  redis.call('EXPIRE', KEYS[2], tonumber(ARGV[4]) * 2)
end
return {room, tostring(current), tostring(now), running, unpack(kept)}
"""

_SETTLE = """
-- KEYS use, running  ARGV request, slice, four changes
redis.call('ZREM', KEYS[2], ARGV[1])
for kind = 1, 4 do
  local field = ARGV[2] .. ':' .. kind
  local change = tonumber(ARGV[2 + kind])
  if change ~= 0 and redis.call('EXISTS', KEYS[1]) == 1 then
    if redis.call('HINCRBY', KEYS[1], field, change) < 0 then redis.call('HSET', KEYS[1], field, 0) end
  end
end
return 1
"""

_RENEW = """
-- KEYS running  ARGV lease, requests
local clock = redis.call('TIME')
local ends = tonumber(clock[1]) + tonumber(clock[2]) / 1000000 + tonumber(ARGV[1])
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', ends, ARGV[i]) end
redis.call('EXPIRE', KEYS[1], tonumber(ARGV[1]) * 2)
return 1
"""
_RENEWED = 1000
"""Requests whose leases one call renews."""


class SharedLedger:
    """The accounts of all gateways on one server. Every method may raise `IndexUnavailable`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reserve, self._settle, self._renew = Script(_RESERVE), Script(_SETTLE), Script(_RENEW)

    async def reserve(self, name: str, quota: QuotaConfig, amounts: Amounts, request: str) -> tuple[Verdict, int]:
        """As `Ledger.reserve`, and the slice in which the request began."""
        limits = [-1 if limit is None else limit for limit in (quota.concurrent_requests, *limits_of(quota))]
        answer = await self._store.run(
            self._reserve, _keys(name), [quota.window_seconds, SLICES, request, LEASE_SECONDS, *limits, *amounts]
        )
        room, current, now, running, *fields = answer
        slices = _slices(fields)
        verdict = judge(slices, int(running), quota, amounts, float(now))
        if room:
            return verdict._replace(refused_by=None), int(current)
        return verdict, int(current)

    async def settle(self, name: str, request: str, number: int, change: Amounts) -> None:
        """As `Ledger.settle`."""
        await self._store.run(self._settle, _keys(name), [request, number, *change])

    async def renew(self, name: str, requests: Sequence[str]) -> None:
        """Renew the leases of requests that are still running."""
        for start in range(0, len(requests), _RENEWED):
            some = requests[start : start + _RENEWED]
            await self._store.run(self._renew, [_keys(name)[1]], [LEASE_SECONDS, *some])


def _keys(name: str) -> Sequence[str]:
    """The keys of an account. Its name may have any characters, and need not be read in Redis."""
    account = sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return f"matrix:limits:{{{account}}}:use", f"matrix:limits:{{{account}}}:running"


def _slices(fields: Sequence[Any]) -> dict[int, Amounts]:
    found: dict[int, Amounts] = {}
    for place, value in zip(fields[::2], fields[1::2], strict=True):
        number, _, kind = bytes(place).decode().partition(":")
        slot = KINDS[int(kind) - 1]
        found[int(number)] = found.get(int(number), NOTHING)._replace(**{slot: int(value)})
    return found
