"""What runs in the server: one round trip each, and atomic.

The scripts work on keys that they put together themselves, so they are for one server (alone, or behind Sentinel); what
takes all its keys as such runs on Cluster, too.
"""

from __future__ import annotations

from matrixinfer.index.redis.layout import SUFFIX

_NUMBER = """
local known = {}
local function number(text)
  -- As `layout.number`, with -1 for what is none. Most stamps of a prompt are equal: each is looked at once.
  if not text then return -1 end
  if not known[text] then
    known[text] = #text < 20 and string.match(text, '^%d+$') and tonumber(text) or -1
  end
  return known[text]
end
"""

MATCH = f"""
-- How many of the given blocks each pod holds consecutively from the start.
-- KEYS epochs, leases  ARGV key prefix, now, oldest stamp without a lease, hashes separated by blanks
-- Returns pod, count, pod, count, ...
{_NUMBER}
local prefix, now, oldest = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local suffix = '{SUFFIX}'
local pods, floors, found = {{}}, {{}}, {{}}

local function first(entries)
  local seen, names = {{}}, {{}}
  for i = 1, #entries, 2 do
    local name = entries[i]
    if #name > #suffix and string.sub(name, -#suffix) == suffix then name = string.sub(name, 1, -#suffix - 1) end
    local at = number(entries[i + 1])
    if at >= 0 then
      if not seen[name] then names[#names + 1] = name end
      if not seen[name] or seen[name] < at then seen[name] = at end
    end
  end
  for from = 1, #names, 1000 do
    local some = {{unpack(names, from, math.min(from + 999, #names))}}
    local epochs = redis.call('HMGET', KEYS[1], unpack(some))
    local leases = redis.call('HMGET', KEYS[2], unpack(some))
    for i, name in ipairs(some) do
      local floor = math.max(number(epochs[i]), 0)
      if math.max(number(leases[i]), 0) < now and floor < oldest then floor = oldest end
      if seen[name] >= floor then
        pods[#pods + 1], floors[#floors + 1] = name, floor
      end
    end
  end
end

local function newest(key, names)
  local stamps = {{}}
  for from = 1, #names, 4000 do
    local upto = math.min(from + 3999, #names)
    for i, at in ipairs(redis.call('HMGET', key, unpack(names, from, upto))) do
      stamps[from + i - 1] = number(at)
    end
  end
  return stamps
end

local function narrow(key, block)
  local stamps, doubtful, long = newest(key, pods), {{}}, {{}}
  for i, at in ipairs(stamps) do
    if at < floors[i] then
      doubtful[#doubtful + 1], long[#long + 1] = i, pods[i] .. suffix
    end
  end
  if #doubtful == 0 then return end
  for i, at in ipairs(newest(key, long)) do
    stamps[doubtful[i]] = math.max(at, stamps[doubtful[i]])
  end
  local left, kept = {{}}, {{}}
  for i, name in ipairs(pods) do
    if stamps[i] >= floors[i] then
      left[#left + 1], kept[#kept + 1] = name, floors[i]
    else
      found[#found + 1], found[#found + 2] = name, block
    end
  end
  pods, floors = left, kept
end

local block = 0
for hash in string.gmatch(ARGV[4], '%d+') do
  if block == 0 then
    first(redis.call('HGETALL', prefix .. hash))
  else
    narrow(prefix .. hash, block)
  end
  if #pods == 0 then break end
  block = block + 1
end
for _, name in ipairs(pods) do
  found[#found + 1], found[#found + 2] = name, block
end
return found
"""

ACQUIRE = """
-- Become the writer of a pod, or stay it.
-- KEYS tokens, writers, leases, epochs, stamps  ARGV pod, writer, now, lease in seconds, 1 for a new token
-- Returns the fencing token, and the least epoch above all that was stamped; nothing while another writer lives.
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
-- Tell how far the pod's events are believed. KEYS tokens, states  ARGV pod, token, state
-- Returns 0 where another writer has come.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
return 1
"""

RELEASE = """
-- Stop to be the writer of a pod. KEYS tokens, leases  ARGV pod, token
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then redis.call('HDEL', KEYS[2], ARGV[1]) end
return 1
"""

EPOCH = """
-- Let nothing count that is stamped below an epoch. KEYS tokens, epochs, stamps  ARGV pod, token, epoch or 0, now
-- Epoch 0 clears: the epoch is then the least above all stamps. Returns the epoch, 0 where another writer has come.
local pod = ARGV[1]
if redis.call('HGET', KEYS[1], pod) ~= ARGV[2] then return 0 end
local epoch, last = tonumber(redis.call('HGET', KEYS[2], pod) or 0) or 0, tonumber(redis.call('HGET', KEYS[3], pod) or 0) or 0
local new = tonumber(ARGV[3])
if new == 0 then new = math.max(math.floor(tonumber(ARGV[4])), epoch, last) + 1 end
if new > epoch then redis.call('HSET', KEYS[2], pod, string.format('%d', new)) end
return math.max(new, epoch)
"""

PURGE = """
-- Let nothing of a pod count, whoever wrote it; a living writer finds its token gone, and writes anew what the pod holds.
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
-- The stamp for a pod's entries now. KEYS tokens, epochs, stamps  ARGV pod, token, now, least stamp
-- Returns 0 where another writer has come.
"""
    + _STAMP
    + "return tonumber(stamp)"
)

WRITE = (
    """
-- Add and remove a pod's blocks, in order.
-- KEYS tokens, epochs, stamps  ARGV pod, token, now, least stamp, then `key prefix, + or -, hashes` again and again
-- Returns the stamp, 0 where another writer has come.
"""
    + _STAMP
    + """
for i = 5, #ARGV, 3 do
  local prefix, adds = ARGV[i], ARGV[i + 1] == '+'
  for hash in string.gmatch(ARGV[i + 2], '%d+') do
    if adds then redis.call('HSET', prefix .. hash, pod, stamp) else redis.call('HDEL', prefix .. hash, pod) end
  end
end
return tonumber(stamp)
"""
)

RECLAIM = (
    """
-- Delete the entries of one block that do not count. KEYS block  ARGV default floor, suffix, then `pod, floor` again and again
-- Returns how many.
"""
    + _NUMBER
    + """
local floors, suffix, gone = {}, ARGV[2], {}
for i = 3, #ARGV, 2 do floors[ARGV[i]] = tonumber(ARGV[i + 1]) end
local entries = redis.call('HGETALL', KEYS[1])
for i = 1, #entries, 2 do
  local name, at = entries[i], number(entries[i + 1])
  if #name > #suffix and string.sub(name, -#suffix) == suffix then name = string.sub(name, 1, -#suffix - 1) end
  if at < 0 or at < (floors[name] or tonumber(ARGV[1])) then gone[#gone + 1] = entries[i] end
end
for _, name in ipairs(gone) do redis.call('HDEL', KEYS[1], name) end
return #gone
"""
)
