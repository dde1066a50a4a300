"""The Lua script that counts in the server how much of a prompt each pod holds: one round trip, and atomic.

It walks the prompt block by block, or searches. An entry of a living writer of chained blocks (hash scheme `prefix`) proves
that the pod holds all blocks before it, too: this project's writers add blocks after those that they follow, and remove them
before. So for such pods it is enough to find the last entry that counts, by bisection. Entries of other writers prove
nothing of the kind, and those of a writer that is gone become too old one by one: there the script looks at every block.
"""

from __future__ import annotations

from collections.abc import Iterable

from matrixinfer.config.endpoint_names import ENDS_SUFFIX
from matrixinfer.index.redis.layout import SUFFIX
from matrixinfer.index.redis.read_scripts import READING

MOST_HOLDERS = 1_000
"""A block with more holders is not read whole if the names to look for are known."""
BUDGET = 25_000
"""Entries that one run reads, about, before it stops."""
CROWDED, CUT = 1, 2
"""States of an answer: it needs the names to look for; it counted only up to the budget."""

_WIDTH = 21
"""Characters of a packed hash: the 20 digits of 64 bits, and a space."""


def packed(hashes: Iterable[int]) -> str:
    """Hashes as the script reads them: in columns, so that it finds any of them without reading those before it."""
    every = tuple(hashes)
    return f"%-{_WIDTH}d" * len(every) % every


MATCH = f"""
-- How many of the given blocks each pod holds consecutively from the start. Names of reusable ends do not match.
-- KEYS epochs, leases
-- ARGV key prefix, now, oldest stamp without a lease, hashes in columns (`packed`), 1 if an entry of a living writer proves
--   those of all blocks before it, most holders of a block or 0 for any number, budget, number of starts, then repeatedly:
--   pod, its smallest stamp by the start of its engine; then the names to look for, if there are too many holders otherwise
-- Returns state ({CROWDED}: there are too many holders, {CUT}: the budget ended it), a key of another type or '',
--   then pod, count, pod, count, ...
{READING}
local ends, chained, most, budget, starts = '{ENDS_SUFFIX}', ARGV[5] == '1', tonumber(ARGV[6]), tonumber(ARGV[7]), {{}}
for i = 9, 8 + 2 * tonumber(ARGV[8]), 2 do starts[ARGV[i]] = tonumber(ARGV[i + 1]) end
local asked = {{}}
for i = 9 + 2 * tonumber(ARGV[8]), #ARGV do asked[#asked + 1] = ARGV[i] end
local last, names_given = #ARGV[4] / {_WIDTH}, #asked > 0
local floors, ruled, found = {{}}, {{}}, {{0, ''}}
local highest, spent, holds, NONE = 0, 0, {{}}, {{}}

-- The key of a block, counted from 1.
local function key_of(block)
  return prefix .. string.match(ARGV[4], '%d+', {_WIDTH} * (block - 1) + 1)
end

-- The better of two stamps of one pod: the newer one, but a readable one before any other.
local function better(a, b)
  if a < 0 or b < 0 or a ~= UNDATED and b ~= UNDATED then return a > b and a or b end
  return a < b and a or b
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
  for i = 1, #names do both[2 * i - 1], both[2 * i] = names[i], names[i] .. '{SUFFIX}' end
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
    seen[name] = better(seen[name] or -1, stamp_of(entries[i + 1]))
  end
  return seen, names
end

-- The pods that hold the first block: those whose later blocks follow from one another, and the others.
local function first(entries)
  local seen, names = stamps_of(entries)
  local epochs, leases = values_of(KEYS[1], names), values_of(KEYS[2], names)
  local searched, walked = {{}}, {{}}
  for i = 1, #names do
    local name = names[i]
    local floor, is_ruled, is_alive = floor_of(epochs[name], leases[name], starts[name])
    floors[name], ruled[name] = floor, is_ruled
    local at = seen[name]
    if at >= floor and (at ~= UNDATED or not is_ruled) and not string.find(name, ends, -#ends, true) then
      local pods = chained and is_alive and searched or walked
      pods[#pods + 1] = name
      if floor > highest then highest = floor end
    end
  end
  return searched, walked
end

-- Whether entries contain every pod, in the same order. For neighbouring blocks of a prompt that is usually true.
local function alike(entries, names)
  local next, name, good = 1, names[1], nil
  for i = 1, #entries, 2 do
    if entries[i] == name then
      local text = entries[i + 1]
      if text ~= good then
        local at = stamp_of(text)
        if at < floors[name] or at == UNDATED then return false end
        if at >= highest then good = text end
      end
      next = next + 1
      name = names[next]
      if not name then return true end
    end
  end
  return false
end

-- The text of each entry of a block by name, in either spelling, and whether there are any in the long one.
local function texts_of(entries)
  local texts, any_long = {{}}, false
  for i = 1, #entries, 2 do
    local name = entries[i]
    texts[name] = entries[i + 1]
    any_long = any_long or canonical(name) ~= name
  end
  return texts, any_long
end

-- The same for some pods, read by name.
local function texts_by_name(key, names)
  local values, texts, long = fields(key, names), {{}}, {{}}
  spent = spent + #names
  for i = 1, #names do
    local name, text = names[i], values[i]
    if text then texts[name] = text end
    local at = text and stamp_of(text)
    if not at or at == UNDATED or at < floors[name] then long[#long + 1] = name .. '{SUFFIX}' end
  end
  for i, text in ipairs(fields(key, long)) do
    if text then texts[long[i]] = text end
  end
  return texts, true
end

-- Divide pods into those that hold a block, and the others. A few among many (`size`) are read by name, else all entries.
-- Those that hold it come in the order of its entries (`alike`), if all were read. Returns the block's size, too, or `size`.
local function divide(block, names, size)
  local key, entries, texts, any_long = key_of(block), nil, nil, nil
  if names_given or #names * 4 < size and #names <= 1000 then
    texts, any_long = texts_by_name(key, names)
  else
    entries = all_of(key)
    size = #entries / 2
    if alike(entries, names) then return names, NONE, size end
    texts, any_long = texts_of(entries)
  end
  local held, others, n, m = {{}}, {{}}, 0, 0
  for i = 1, #names do
    local name = names[i]
    local at = stamp_of(texts[name])
    if any_long then at = better(at, stamp_of(texts[name .. '{SUFFIX}'])) end
    if at >= floors[name] and (at ~= UNDATED or not ruled[name]) then
      n = n + 1
      held[n], holds[name] = name, block
    else
      m = m + 1
      others[m] = name
    end
  end
  if entries and n > 1 then
    n = 0
    for i = 1, #entries, 2 do
      local name = canonical(entries[i])
      if holds[name] == block then
        n = n + 1
        held[n], holds[name] = name, nil
      end
    end
  end
  return held, others, size
end

local function report(names, count)
  local n = #found
  for i = 1, #names do
    found[n + 1], found[n + 2] = names[i], count
    n = n + 2
  end
end

-- Look at one block after the other. The pods hold the first one, which has `size` entries.
local function walk(names, size)
  local block = 1
  while #names > 0 and block < last and spent <= budget do
    local held, others
    held, others, size = divide(block + 1, names, size)
    if others ~= NONE then report(others, block) end
    names, block = held, block + 1
  end
  report(names, block)
end

-- Find the last block of each pod by bisection. The pods hold block `low`, which has `size` entries; none holds block `high`.
local function search(names, low, high, size)
  while #names > 0 and high - low > 1 and spent <= budget do
    local middle = math.floor((low + high) / 2)
    local held, others, count = divide(middle, names, size)
    if #held == 0 then
      high = middle
    else
      search(others, low, middle, size)
      names, low, size = held, middle, count
    end
  end
  report(names, low)
end

local entries
if names_given then
  entries = some_of(key_of(1), asked)
elseif most > 0 and (read('HLEN', key_of(1)) or 0) > most then
  return {{{CROWDED}, wrong}}
else
  entries = all_of(key_of(1))
end
local searched, walked = first(entries)
search(searched, 1, last + 1, #entries / 2)
walk(walked, #entries / 2)
if spent > budget then found[1] = {CUT} end
found[2] = wrong
return found
"""
