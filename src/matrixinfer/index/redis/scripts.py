"""Lua scripts that run in the server: one round trip each, and atomic.

`MATCH`, `LAST` and `WRITE` build keys themselves, so they run on a single server only (with or without Sentinel). The other
scripts receive all their keys as arguments and run on Cluster, too.
"""

from __future__ import annotations

from matrixinfer.config.endpoint_names import ENDS_SUFFIX
from matrixinfer.index.redis.layout import SUFFIX

_NUMBER = """
local known = {}
local function number(text)
  -- As `layout.number`, with -1 for invalid text. Most stamps of a prompt are equal: each text is parsed once.
  if not text then return -1 end
  if not known[text] then
    known[text] = #text < 20 and string.match(text, '^%d+$') and tonumber(text) or -1
  end
  return known[text]
end
"""

_READING = f"""
{_NUMBER}
local prefix, now, oldest = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local suffix = '{SUFFIX}'
local call = redis.call

local function canonical(name)
  if #name > #suffix and string.sub(name, -#suffix) == suffix then return string.sub(name, 1, -#suffix - 1) end
  return name
end

-- The values of pods in a table. Reads the whole table if that is cheaper than reading each pod.
local function values_of(key, names)
  local values = {{}}
  if call('HLEN', key) <= 4 * #names then
    local flat = call('HGETALL', key)
    for i = 1, #flat, 2 do values[flat[i]] = flat[i + 1] end
  else
    for from = 1, #names, 4000 do
      local upto = math.min(from + 3999, #names)
      for i, value in ipairs(call('HMGET', key, unpack(names, from, upto))) do values[names[from + i - 1]] = value end
    end
  end
  return values
end

-- The smallest stamp of a pod that counts.
local function floor_of(epoch, lease)
  local floor = math.max(number(epoch), 0)
  if number(lease) < now and floor < oldest then floor = oldest end
  return floor
end
"""

MATCH = f"""
-- How many of the given blocks each pod holds consecutively from the start. Names of reusable ends do not match.
-- KEYS epochs, leases  ARGV key prefix, now, oldest stamp without a lease, hashes separated by spaces
-- Returns pod, count, pod, count, ...
{_READING}
local ends = '{ENDS_SUFFIX}'
local pods, floors, kept, found, size, highest = {{}}, {{}}, {{}}, {{}}, 0, 0

-- The newest stamp of each pod of a block, by canonical name, and those names.
local function all(entries)
  local seen, names = {{}}, {{}}
  for i = 1, #entries, 2 do
    local name, at = canonical(entries[i]), number(entries[i + 1])
    if at >= 0 then
      if not seen[name] then names[#names + 1] = name end
      if not seen[name] or seen[name] < at then seen[name] = at end
    end
  end
  return seen, names
end

local function first(entries)
  local seen, names = all(entries)
  local epochs, leases = values_of(KEYS[1], names), values_of(KEYS[2], names)
  size = #entries / 2
  for i = 1, #names do
    local name = names[i]
    local floor = floor_of(epochs[name], leases[name])
    if string.sub(name, -#ends) == ends then floor = math.huge end
    if seen[name] >= floor then
      pods[#pods + 1], floors[name] = name, floor
      if floor > highest then highest = floor end
    end
  end
end

-- Whether entries contain every pod, in the same order. For the next block of a prompt that is usually true.
local function alike(entries)
  local next, pod, good = 1, pods[1], nil
  for i = 1, #entries, 2 do
    if entries[i] == pod then
      local text = entries[i + 1]
      if text ~= good then
        local at = number(text)
        if at < floors[pod] then return false end
        if at >= highest then good = text end
      end
      next = next + 1
      pod = pods[next]
      if not pod then return true end
    end
  end
  return false
end

-- Keep those of `names` that still match and whose stamps count.
local function keep(names, seen, block)
  local left = {{}}
  for i = 1, #names do
    local name = names[i]
    local floor = floors[name]
    if floor and seen[name] >= floor then
      left[#left + 1], kept[name] = name, block
    end
  end
  for i = 1, #pods do
    local name = pods[i]
    if kept[name] ~= block then
      found[#found + 1], found[#found + 2], floors[name] = name, block, nil
    end
  end
  pods = left
end

-- Read a few pods among many by name, else read all entries.
local function narrow(key, block)
  if #pods * 4 >= size or #pods > 1000 then
    local entries = call('HGETALL', key)
    size = #entries / 2
    if not alike(entries) then
      local seen, names = all(entries)
      keep(names, seen, block)
    end
    return
  end
  local stamps, missing, long = call('HMGET', key, unpack(pods)), {{}}, {{}}
  for i = 1, #pods do
    if number(stamps[i]) < floors[pods[i]] then
      missing[#missing + 1], long[#long + 1] = i, pods[i] .. suffix
    end
  end
  if #missing == 0 then return end
  local seen = {{}}
  for i = 1, #pods do seen[pods[i]] = number(stamps[i]) end
  stamps = call('HMGET', key, unpack(long))
  for i = 1, #missing do
    local pod = pods[missing[i]]
    seen[pod] = math.max(seen[pod], number(stamps[i]))
  end
  keep(pods, seen, block)
end

local block = 0
for hash in string.gmatch(ARGV[4], '%d+') do
  if block == 0 then
    first(call('HGETALL', prefix .. hash))
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

LAST = f"""
-- The position of the last of the given blocks that each of the given pods holds, counted from 0.
-- KEYS epochs, leases  ARGV key prefix, now, oldest stamp without a lease, hashes separated by spaces, pods...
-- Returns pod, position, pod, position, ...
{_READING}
local names, hashes, floors, found, left = {{}}, {{}}, {{}}, {{}}, 0
for i = 5, #ARGV do names[i - 4] = ARGV[i] end
for hash in string.gmatch(ARGV[4], '%d+') do hashes[#hashes + 1] = hash end
local epochs, leases = values_of(KEYS[1], names), values_of(KEYS[2], names)
for _, name in ipairs(names) do
  floors[name], left = floor_of(epochs[name], leases[name]), left + 1
end

-- The entries of a block. Reads a few pods among many by name, in both spellings.
local function entries_of(key)
  local size = call('HLEN', key)
  if size == 0 then return {{}} end
  if left * 4 >= size or left > 1000 then return call('HGETALL', key) end
  local asked, entries = {{}}, {{}}
  for name in pairs(floors) do
    asked[#asked + 1], asked[#asked + 2] = name, name .. suffix
  end
  for i, stamp in ipairs(call('HMGET', key, unpack(asked))) do
    if stamp then entries[#entries + 1], entries[#entries + 2] = asked[i], stamp end
  end
  return entries
end

for position = #hashes, 1, -1 do
  local entries = entries_of(prefix .. hashes[position])
  for i = 1, #entries, 2 do
    local name = canonical(entries[i])
    if floors[name] and number(entries[i + 1]) >= floors[name] then
      found[#found + 1], found[#found + 2], floors[name] = name, position - 1, nil
      left = left - 1
    end
  end
  if left == 0 then break end
end
return found
"""

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
-- Add and remove a pod's blocks, in order.
-- KEYS tokens, epochs, stamps  ARGV pod, token, now, smallest stamp, then repeatedly: key prefix, + or -, hashes
-- Returns the stamp, or 0 if another writer has taken over.
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
-- Delete the entries of one block that do not count. KEYS block  ARGV default floor, suffix, then repeatedly: pod, floor
-- Returns the number of deleted entries.
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
