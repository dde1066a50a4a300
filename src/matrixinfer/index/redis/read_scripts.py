"""What Lua scripts that look up in the server have in common, and the one that finds last blocks.

One round trip each, and atomic.

They build keys themselves, so they run on a single server only (with or without Sentinel). A key that holds something else
than a hash reads as an empty one.
"""

from __future__ import annotations

from matrixinfer.index.redis.layout import SUFFIX, UNDATED

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

READING = f"""
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
local numbers = {{}}
local function number(text)
  if not text then return 0 end
  local value = numbers[text]
  if not value then
    value = #text < 20 and not string.find(text, '%D') and tonumber(text) or 0
    numbers[text] = value
  end
  return value
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

-- The smallest stamp of a pod that counts; whether the pod is ruled, so that its stamps must be readable: it has a row in
-- a table; and whether its writer is alive. Its engine started within the second before `started`.
local function floor_of(epoch, lease, started)
  local floor, is_ruled, is_alive = number(epoch), epoch or lease, lease and number(lease) >= now
  if not is_alive then
    floor = math.max(floor, oldest, not started and 0 or is_ruled and started - 1 or started)
  end
  return floor, is_ruled, is_alive
end
"""

LAST = f"""
-- The position of the last of the given blocks that each of the given pods holds, counted from 0.
-- KEYS epochs, leases  ARGV key prefix, now, oldest stamp without a lease, hashes separated by spaces, pods...
-- Returns 0, a key of another type or '', then pod, position, pod, position, ...
{READING}
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
