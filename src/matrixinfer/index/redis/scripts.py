"""Lua scripts that write, in the server: one round trip each, and atomic.

`WRITE` builds keys itself, so it runs on a single server only (with or without Sentinel). The other scripts receive all
their keys as arguments and run on Cluster, too.
"""

from __future__ import annotations

from matrixinfer.index.redis.read_scripts import STAMPS

ACQUIRE = """
-- Become or remain the writer of a pod.
-- KEYS tokens, writers, leases, epochs, stamps  ARGV pod, writer, now, lease in seconds, 1 for a new token
-- Returns the fencing token and the smallest epoch above all stamps; nothing while another writer is alive.
local pod, now = ARGV[1], tonumber(ARGV[3])
local owner, lease = redis.call('HGET', KEYS[2], pod), tonumber(redis.call('HGET', KEYS[3], pod) or 0) or 0
local token = redis.call('HGET', KEYS[1], pod)
if owner ~= ARGV[2] or not token or ARGV[5] == '1' then
  if owner and owner ~= ARGV[2] and lease >= now then return {} end
  token = redis.call('HINCRBY', KEYS[1], pod, 1)
  redis.call('HSET', KEYS[2], pod, ARGV[2])
end
redis.call('HSET', KEYS[3], pod, math.floor(now + tonumber(ARGV[4])))
local epoch = tonumber(redis.call('HGET', KEYS[4], pod) or 0) or 0
local last = tonumber(redis.call('HGET', KEYS[5], pod) or 0) or 0
return {tonumber(token), math.max(math.floor(now), epoch, last) + 1}
"""

STATE = """
-- Publish the pod's state. KEYS tokens, states  ARGV pod, token, state
-- Returns 0 if another writer has taken over.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
return 1
"""

RELEASE = """
-- Stop being the writer of a pod. KEYS tokens, leases, states  ARGV pod, token, 1 if the pod has gone
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then
  redis.call('HDEL', KEYS[2], ARGV[1])
  if ARGV[3] == '1' then redis.call('HDEL', KEYS[3], ARGV[1]) end
end
return 1
"""

EPOCH = """
-- Invalidate all entries with a stamp below an epoch. KEYS tokens, epochs, stamps  ARGV pod, token, epoch or 0, now
-- Epoch 0 clears the pod: its epoch becomes the smallest one above all stamps.
-- Returns the epoch, or 0 if another writer has taken over.
local pod = ARGV[1]
if redis.call('HGET', KEYS[1], pod) ~= ARGV[2] then return 0 end
local epoch, last = tonumber(redis.call('HGET', KEYS[2], pod) or 0) or 0, tonumber(redis.call('HGET', KEYS[3], pod) or 0) or 0
local new = tonumber(ARGV[3])
if new == 0 then new = math.max(math.floor(tonumber(ARGV[4])), epoch, last) + 1 end
if new > epoch then redis.call('HSET', KEYS[2], pod, string.format('%d', new)) end
return math.max(new, epoch)
"""

PURGE = """
-- Invalidate all entries of a pod from any writer. A living writer finds its token replaced and writes all blocks again.
-- KEYS tokens, epochs, stamps  ARGV pod, now
-- Returns the epoch.
local pod = ARGV[1]
local epoch, last = tonumber(redis.call('HGET', KEYS[2], pod) or 0) or 0, tonumber(redis.call('HGET', KEYS[3], pod) or 0) or 0
local new = math.max(math.floor(tonumber(ARGV[2])), epoch, last) + 1
redis.call('HSET', KEYS[2], pod, string.format('%d', new))
if redis.call('HEXISTS', KEYS[1], pod) == 1 then redis.call('HINCRBY', KEYS[1], pod, 1) end
return new
"""

_STAMP = """
local pod = ARGV[1]
if redis.call('HGET', KEYS[1], pod) ~= ARGV[2] then return 0 end
local last = tonumber(redis.call('HGET', KEYS[3], pod) or 0) or 0
local epoch = tonumber(redis.call('HGET', KEYS[2], pod) or 0) or 0
local stamp = string.format('%d', math.max(math.floor(tonumber(ARGV[3])), tonumber(ARGV[4]), epoch))
if tonumber(stamp) > last then redis.call('HSET', KEYS[3], pod, stamp) end
"""

STAMP = (
    """
-- The current stamp for a pod's entries. KEYS tokens, epochs, stamps  ARGV pod, token, now, smallest stamp
-- Returns 0 if another writer has taken over.
"""
    + _STAMP
    + "return tonumber(stamp)"
)

WRITE = (
    """
-- Add and remove a pod's blocks, in order. Leaves out those whose keys hold something else than a hash.
-- KEYS tokens, epochs, stamps  ARGV pod, token, now, smallest stamp, then repeatedly: key prefix, + or -, hashes
-- Returns the stamp, or 0 if another writer has taken over.
"""
    + _STAMP
    + """
for i = 5, #ARGV, 3 do
  local prefix, adds = ARGV[i], ARGV[i + 1] == '+'
  for hash in string.gmatch(ARGV[i + 2], '%d+') do
    local done
    if adds then
      done = redis.pcall('HSET', prefix .. hash, pod, stamp)
    else
      done = redis.pcall('HDEL', prefix .. hash, pod)
    end
    if type(done) == 'table' and not string.find(done.err, 'WRONGTYPE', 1, true) then return redis.error_reply(done.err) end
  end
end
return tonumber(stamp)
"""
)

RECLAIM = (
    """
-- Delete the entries of one block that do not count. KEYS block  ARGV default floor, suffix, then repeatedly: pod, floor
-- The pods given are those with an epoch or a lease: only their entries go if their stamp cannot be read.
-- Returns the number of deleted entries.
"""
    + STAMPS
    + """
local floors, suffix, gone = {}, ARGV[2], {}
for i = 3, #ARGV, 2 do floors[ARGV[i]] = tonumber(ARGV[i + 1]) end
local entries = redis.call('HGETALL', KEYS[1])
for i = 1, #entries, 2 do
  local name, at = entries[i], stamp_of(entries[i + 1])
  if #name > #suffix and string.sub(name, -#suffix) == suffix then name = string.sub(name, 1, -#suffix - 1) end
  if at == UNDATED and floors[name] or at < (floors[name] or tonumber(ARGV[1])) then gone[#gone + 1] = entries[i] end
end
for _, name in ipairs(gone) do redis.call('HDEL', KEYS[1], name) end
return #gone
"""
)
