"""Lua scripts that look up, in the server: one round trip each, and atomic.

They build keys themselves, so they run on a single server only (with or without Sentinel). A key that holds something else
than a hash reads as an empty one.
"""

from __future__ import annotations

from matrixinfer.config.endpoint_names import ENDS_SUFFIX
from matrixinfer.index.redis.layout import SUFFIX, UNDATED

MOST_HOLDERS = 1_000
"""A block with more holders is not read whole if the names to look for are known."""
BUDGET = 25_000
"""Entries that one run of `MATCH` reads, about, before it stops."""
CROWDED, CUT = 1, 2
"""States of an answer of `MATCH`: it needs the names to look for; it counted only up to the budget."""

STAMPS = f"""
local UNDATED = {UNDATED}
local known = {{}}
-- As `layout.stamp_of`, with -1 for no entry. Most stamps of a prompt are equal: each text is parsed once.
local function stamp_of(text)
  if not text then return -1 end
  local at = known[text]
  if not at then
    local digits = string.match(text, '^0*(%d+)$') or string.match(text, '^0*(%d+)%.%d*$')
    local size = digits and #digits or 20
    if size > 19 then
      at = UNDATED
    else
      at = tonumber(string.sub(digits, 1, size - (size == 19 and 9 or size >= 16 and 6 or size >= 13 and 3 or 0)))
    end
    known[text] = at
  end
  return at
end
"""

_READING = f"""
{STAMPS}
local prefix, now, oldest = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local suffix = '{SUFFIX}'
local wrong = ''

-- Read a hash. Returns nil for a key of another type, and notes the first such key.
local function read(command, key, ...)
  local got = redis.pcall(command, key, ...)
  if type(got) == 'table' and got.err then
    if not string.find(got.err, 'WRONGTYPE', 1, true) then error(got.err, 0) end
    if wrong == '' then wrong = key end
    return nil
  end
  return got
end

-- As `layout.number`, with 0 for invalid text.
local function number(text)
  return text and #text < 20 and string.match(text, '^%d+$') and tonumber(text) or 0
end

local function canonical(name)
  if #name > #suffix and string.sub(name, -#suffix) == suffix then return string.sub(name, 1, -#suffix - 1) end
  return name
end

-- Some fields of a hash, in the order of `names`; false for those that are missing.
local function fields(key, names)
  if #names == 0 then return {{}} end
  if #names <= 4000 then return read('HMGET', key, unpack(names)) or {{}} end
  local values = {{}}
  for from = 1, #names, 4000 do
    local upto = math.min(from + 3999, #names)
    for i, value in ipairs(read('HMGET', key, unpack(names, from, upto)) or {{}}) do values[from + i - 1] = value end
  end
  return values
end

-- The values of pods in a table. Reads the whole table if that is cheaper than reading each pod.
local function values_of(key, names)
  local values = {{}}
  if (read('HLEN', key) or 0) <= 4 * #names then
    local flat = read('HGETALL', key) or {{}}
    for i = 1, #flat, 2 do values[flat[i]] = flat[i + 1] end
  else
    for i, value in ipairs(fields(key, names)) do values[names[i]] = value end
  end
  return values
end

-- The smallest stamp of a pod that counts, and whether the pod is ruled, so that its stamps must be readable: it has a row in
-- a table. Its engine started within the second before `started`.
local function floor_of(epoch, lease, started)
  local floor, is_ruled = number(epoch), epoch or lease
  if not lease or number(lease) < now then
    floor = math.max(floor, oldest, not started and 0 or is_ruled and started - 1 or started)
  end
  return floor, is_ruled
end
"""

MATCH = f"""
-- How many of the given blocks each pod holds consecutively from the start. Names of reusable ends do not match.
-- KEYS epochs, leases
-- ARGV key prefix, now, oldest stamp without a lease, hashes separated by spaces, most holders of a block or 0 for any
--   number, budget, number of starts, then repeatedly: pod, its smallest stamp by the start of its engine; then the names to
--   look for, if there are too many holders otherwise
-- Returns state ({CROWDED}: there are too many holders, {CUT}: the budget ended it), a key of another type or '',
--   then pod, count, pod, count, ...
{_READING}
local ends, most, budget, starts = '{ENDS_SUFFIX}', tonumber(ARGV[5]), tonumber(ARGV[6]), {{}}
for i = 8, 7 + 2 * tonumber(ARGV[7]), 2 do starts[ARGV[i]] = tonumber(ARGV[i + 1]) end
local asked = {{}}
for i = 8 + 2 * tonumber(ARGV[7]), #ARGV do asked[#asked + 1] = ARGV[i] end
local pods, floors, ruled, kept, found = {{}}, {{}}, {{}}, {{}}, {{0, ''}}
local size, highest, spent = 0, 0, 0
local names_given = #asked > 0

local function counts(name, at)
  return at >= floors[name] and (at ~= UNDATED or not ruled[name])
end

-- The better of two stamps of one pod: the newer one, but a readable one before any other.
local function better(a, b)
  if not a then return b end
  if a == UNDATED or b == UNDATED then return math.min(a, b) end
  return math.max(a, b)
end

-- All entries of a block as a flat list.
local function all_of(key)
  local entries = read('HGETALL', key) or {{}}
  spent = spent + #entries / 2
  return entries
end

-- The entries of some pods of a block, in both spellings, as a flat list.
local function some_of(key, names)
  local both, entries = {{}}, {{}}
  for i = 1, #names do both[2 * i - 1], both[2 * i] = names[i], names[i] .. suffix end
  for i, stamp in ipairs(fields(key, both)) do
    if stamp then entries[#entries + 1], entries[#entries + 2] = both[i], stamp end
  end
  spent = spent + #both
  return entries
end

-- The stamp of each pod of a block, by canonical name, and those names.
local function stamps_of(entries)
  local seen, names = {{}}, {{}}
  for i = 1, #entries, 2 do
    local name = canonical(entries[i])
    if not seen[name] then names[#names + 1] = name end
    seen[name] = better(seen[name], stamp_of(entries[i + 1]))
  end
  return seen, names
end

local function first(entries)
  local seen, names = stamps_of(entries)
  local epochs, leases = values_of(KEYS[1], names), values_of(KEYS[2], names)
  size = #entries / 2
  for i = 1, #names do
    local name = names[i]
    floors[name], ruled[name] = floor_of(epochs[name], leases[name], starts[name])
    if string.sub(name, -#ends) ~= ends and counts(name, seen[name]) then
      pods[#pods + 1] = name
      if floors[name] > highest then highest = floors[name] end
    else
      floors[name] = nil
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
        local at = stamp_of(text)
        if not counts(pod, at) then return false end
        if at >= highest and at ~= UNDATED then good = text end
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
    if floors[name] and seen[name] and counts(name, seen[name]) then
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
  if not names_given and (#pods * 4 >= size or #pods > 1000) then
    local entries = all_of(key)
    size = #entries / 2
    if not alike(entries) then
      local seen, names = stamps_of(entries)
      keep(names, seen, block)
    end
    return
  end
  local stamps, missing, long = fields(key, pods), {{}}, {{}}
  spent = spent + #pods
  for i = 1, #pods do
    if not stamps[i] or not counts(pods[i], stamp_of(stamps[i])) then
      missing[#missing + 1], long[#long + 1] = i, pods[i] .. suffix
    end
  end
  if #missing == 0 then return end
  local seen = {{}}
  for i = 1, #pods do seen[pods[i]] = stamps[i] and stamp_of(stamps[i]) end
  stamps = fields(key, long)
  for i = 1, #missing do
    local pod = pods[missing[i]]
    if stamps[i] then seen[pod] = better(seen[pod], stamp_of(stamps[i])) end
  end
  keep(pods, seen, block)
end

local block = 0
for hash in string.gmatch(ARGV[4], '%d+') do
  local key = prefix .. hash
  if block == 0 then
    if names_given then
      first(some_of(key, asked))
    elseif most > 0 and (read('HLEN', key) or 0) > most then
      return {{{CROWDED}, wrong}}
    else
      first(all_of(key))
    end
  elseif spent > budget then
    break
  else
    narrow(key, block)
  end
  if #pods == 0 then break end
  block = block + 1
end
for _, name in ipairs(pods) do
  found[#found + 1], found[#found + 2] = name, block
end
if spent > budget then found[1] = {CUT} end
found[2] = wrong
return found
"""

LAST = f"""
-- The position of the last of the given blocks that each of the given pods holds, counted from 0.
-- KEYS epochs, leases  ARGV key prefix, now, oldest stamp without a lease, hashes separated by spaces, pods...
-- Returns 0, a key of another type or '', then pod, position, pod, position, ...
{_READING}
local names, hashes, floors, ruled, left = {{}}, {{}}, {{}}, {{}}, 0
local found = {{0, ''}}
for i = 5, #ARGV do names[i - 4] = ARGV[i] end
for hash in string.gmatch(ARGV[4], '%d+') do hashes[#hashes + 1] = hash end
local epochs, leases = values_of(KEYS[1], names), values_of(KEYS[2], names)
for _, name in ipairs(names) do
  floors[name], ruled[name] = floor_of(epochs[name], leases[name])
  left = left + 1
end

-- The entries of a block. Reads a few pods among many by name, in both spellings.
local function entries_of(key)
  local size = read('HLEN', key) or 0
  if size == 0 then return {{}} end
  if left * 4 >= size or left > 1000 then return read('HGETALL', key) end
  local asked, entries = {{}}, {{}}
  for name in pairs(floors) do
    asked[#asked + 1], asked[#asked + 2] = name, name .. suffix
  end
  for i, stamp in ipairs(fields(key, asked)) do
    if stamp then entries[#entries + 1], entries[#entries + 2] = asked[i], stamp end
  end
  return entries
end

for position = #hashes, 1, -1 do
  local entries = entries_of(prefix .. hashes[position])
  local seen = {{}}
  for i = 1, #entries, 2 do
    local name, at = canonical(entries[i]), stamp_of(entries[i + 1])
    if floors[name] then
      local other = seen[name]
      if other and (other == UNDATED or at == UNDATED) then at = math.min(other, at) elseif other then at = math.max(other, at) end
      seen[name] = at
    end
  end
  for name, at in pairs(seen) do
    if at >= floors[name] and (at ~= UNDATED or not ruled[name]) then
      found[#found + 1], found[#found + 2], floors[name] = name, position - 1, nil
      left = left - 1
    end
  end
  if left == 0 then break end
end
found[2] = wrong
return found
"""
