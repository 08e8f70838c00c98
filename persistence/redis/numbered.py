"""The scripts of scopes with revisions, and how their commands are made (docs/design/0040-redis-revisions.md).

As in `script.py`, Python computes every value. A script only compares and stores, and it reads before it writes, so a
command is executed whole or not at all. Each change takes the next number, which is at least the time of the engine in
microseconds. So numbers rise and never repeat, even if Redis has lost the last ones.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from scopestate.ops.turns import Range
from scopestate.persistence.redis import sidecar
from scopestate.persistence.redis.connection import pack_text
from scopestate.persistence.redis.script import HANDLED, LIMITED, SOURCES, Shape

# One plain write of one key, without events: KEYS hash, side; ARGV field, value, number, digest ('': compute it), and
# for a condition `n` (there must be no value), `c expected`, or `r expected number`. Replies: the value before, or
# DONE; the number. A key with a deadline, or a scope with an index, is for `WRITES`: in a slot that is being moved a
# command has to find all its KEYS.
SET_ONE: Final = b"""
local call, hash, side, field, number = redis.call, KEYS[1], KEYS[2], ARGV[1], ARGV[3]
local old = call('HGET', hash, field)
local there, condition = call('HMGET', side, '\\255', field, '\\254'), ARGV[5]
if there[3] or (there[2] and #there[2] > 32) then return {3, ''} end
if condition then
  if condition == 'n' then
    if old then return {0, ''} end
  elseif old ~= ARGV[6] or (condition == 'r' and string.sub(there[2] or '', 1, 16) ~= ARGV[7]) then
    return {0, ''}
  end
end
if there[1] and number <= there[1] then number = string.format('%016d', tonumber(there[1]) + 1) end
local digest = ARGV[4]
if digest == '' then digest = string.sub(redis.sha1hex(ARGV[2]), 1, 16) end
call('HSET', hash, field, ARGV[2])
call('HSET', side, '\\255', number, field, number .. digest)
if not old then call('PERSIST', side) end
return {condition and 1 or old, number}
"""

# The same with its event. KEYS hash, side, the stream, the counter of its events, its limit; ARGV how many events are
# kept, the scope, then as for `SET_ONE`, without `r`. Replies: as there, but in between the number of the event, 0 if
# nothing was written. The server needs half of the time that it needs for `WRITES`
# (docs/design/0087-speed-of-shared-events.md).
PUBLISH_ONE: Final = (
    b"""
local call, hash, side, stream, counter, limit = redis.call, KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local kept, field, value, number, condition, depth = ARGV[1], ARGV[3], ARGV[4], ARGV[5], ARGV[7], nil
"""
    + LIMITED
    + b"""
local old = call('HGET', hash, field)
local there = call('HMGET', side, '\\255', field, '\\254')
if there[3] or (there[2] and #there[2] > 32) then return {3, 0, ''} end
if condition then
  if condition == 'n' then
    if old then return {0, 0, ''} end
  elseif old ~= ARGV[8] then
    return {0, 0, ''}
  end
end
local full = is_full()
if full then return full end
if there[1] and number <= there[1] then number = string.format('%016d', tonumber(there[1]) + 1) end
local last = call('INCR', counter)
local added
if old then
  added = add({'n', last, 's', ARGV[2], 'k', field, 'o', old, 'v', value, 'r', number})
else
  added = add({'n', last, 's', ARGV[2], 'k', field, 'v', value, 'r', number})
end
if type(added) == 'table' then
  call('DECR', counter)
  return added
end
local digest = ARGV[6]
if digest == '' then digest = string.sub(redis.sha1hex(value), 1, 16) end
call('HSET', hash, field, value)
call('HSET', side, '\\255', number, field, number .. digest)
if not old then call('PERSIST', side) end
return {condition and 1 or old, last, number}
"""
)

# A transaction that only writes keys without deadlines, few of them, and without events: KEYS hash, side; ARGV a number
# as above, how many fields are expected, how many written; the fields; the value and the number of each, '' for no
# value; field, value and digest of each that is written. Replies DONE, 0, or 3 for what only `WRITES` can do; the
# number.
COMMIT: Final = b"""
local call, hash, side, number = redis.call, KEYS[1], KEYS[2], ARGV[1]
local expected, written = tonumber(ARGV[2]), tonumber(ARGV[3])
local found = call('HMGET', hash, unpack(ARGV, 4, 3 + expected))
local there = call('HMGET', side, '\\255', '\\254', unpack(ARGV, 4, 3 + expected))
if there[2] then return {3, ''} end
local at, creates = 4 + expected, false
for i = 1, expected do
  local entry = there[i + 2]
  if ARGV[at + 1] == '' then
    if found[i] then return {0, ''} end
    creates = true
  elseif found[i] ~= ARGV[at] or not entry or string.sub(entry, 1, 16) ~= ARGV[at + 1] then
    return {0, ''}
  elseif #entry > 32 then
    return {3, ''}
  end
  at = at + 2
end
if written == 0 then return {1, ''} end
if there[1] and number <= there[1] then number = string.format('%016d', tonumber(there[1]) + 1) end
local values, entries, size, text = {}, {}, 0, number
for i = 1, written do
  if i > 1 then text = string.format('%016d', tonumber(number) + i - 1) end
  local digest = ARGV[at + 2]
  if digest == '' then digest = string.sub(redis.sha1hex(ARGV[at + 1]), 1, 16) end
  values[size + 1], values[size + 2] = ARGV[at], ARGV[at + 1]
  entries[size + 1], entries[size + 2] = ARGV[at], text .. digest
  at, size = at + 3, size + 2
end
call('HSET', hash, unpack(values))
call('HSET', side, '\\255', text, unpack(entries))
if creates then call('PERSIST', side) end
return {1, number}
"""

# Functions that the other scripts share. `put` writes an entry of the side hash; `WRITES` has its own.
_FIRST: Final = b"""
local call, hash, side, due, index = redis.call, KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now
local function time()
  if not now then
    local parts = call('TIME')
    now = parts[1] * 1000 + math.floor(parts[2] / 1000)
  end
  return now
end
local function digest_of(value) return string.sub(redis.sha1hex(value), 1, 16) end
"""
_DIRECT: Final = b"""
local function entry_of(field) return call('HGET', side, field) or '' end
local function put(field, entry, text) call('HSET', side, '\\255', text, field, entry) end
"""
_REST: Final = b"""
local function has_lapsed(entry, value)
  return value and #entry > 32 and tonumber(string.sub(entry, 33)) <= time()
    and string.sub(entry, 17, 32) == digest_of(value)
end
local number, first = nil, ''

local function take()
  if not number then
    local there = call('HGET', side, '\\255')
    first = ARGV[1]
    if there and first <= there then first = string.format('%016d', tonumber(there) + 1) end
    number = tonumber(first)
  else
    number = number + 1
  end
  return string.format('%016d', number)
end
local function adopted(field, value, entry)
  if string.sub(entry, 17, 32) == digest_of(value) then return entry end
  if #entry > 32 then call('ZREM', due, field) end
  local text = take()
  entry = text .. digest_of(value)
  put(field, entry, text)
  return entry
end
"""
_SHARED: Final = _FIRST + _DIRECT + _REST

# One read: KEYS hash, side, due; ARGV field. Reply: the value, none if its deadline has passed.
GET_ONE: Final = b"""
local old, entry = redis.call('HGET', KEYS[1], ARGV[1]), redis.call('HGET', KEYS[2], ARGV[1])
if old and entry and #entry > 32 then
  local time = redis.call('TIME')
  if tonumber(string.sub(entry, 33)) <= time[1] * 1000 + math.floor(time[2] / 1000)
    and string.sub(entry, 17, 32) == string.sub(redis.sha1hex(old), 1, 16) then
    return false
  end
end
return old
"""

# The whole scope: KEYS hash, side, due, index. Replies: the server's time in milliseconds, the fields whose deadline
# has passed, fields and values.
WHOLE: Final = (
    _SHARED
    + b"""
local lapsed = {}
for _, field in ipairs(call('ZRANGEBYSCORE', due, '-inf', time())) do
  if has_lapsed(entry_of(field), call('HGET', hash, field)) then lapsed[#lapsed + 1] = field end
end
return {now, lapsed, call('HGETALL', hash)}
"""
)

# Everything else. KEYS: hash, side, due, index; with shared events also the stream, the counter of its events and its
# limit; then the keys of kept answers. ARGV: the number that the first change takes unless the last one was larger; how
# many events are kept ('': they are not shared); the scope; then the entries of `script.py`, each new value followed by
# its digest
# ('' lets the script compute it), and:
#   l field                    look: replies {value, entry of the side hash, the server's time in milliseconds}; a value
#                              that another program wrote gets the next number first, without an event
#   o index                    look at a kept answer: replies it
#   t expected stored kept fingerprint answer number assumed ...
#                              a transaction. The two counts; the index of the kept answer, what is kept ('' for none);
#                              the number of the last change if nothing else may have changed, with the number of keys
#                              behind a colon ('': any); the time that was assumed ('': none). Then what is expected:
#                              `field state value entry`, state 0: no value, 1: this one, 2: this one, and its deadline
#                              has passed. Then what is stored: `kind field value digest deadline`, kind w: write, r:
#                              remove, x: remove because the deadline has passed, e: only the deadline is another.
#   a consumer engine member   the next `t` acknowledges a delivery; it replies 5, and does nothing, if this engine no
#                              longer holds that. Has no reply
#   e limit                    remove keys whose deadline has passed: replies {time, key that is due next, its deadline,
#                              then field, value, deadline for each that was removed}
# Replies: as in `script.py`. A set or delete of a key whose deadline had passed removes that first, by a change of its
# own, and replies {value, deadline}; so does a successful `n`. A `t` replies {4, kept} if an answer is kept. Last come,
# with shared events, the number of the newest event, and the number of the first change, '' without any.
_PENDING: Final = b"""
local pending, order, size = {}, {}, 0
local function entry_of(field)
  local entry = pending[field]
  if entry == nil then entry = call('HGET', side, field) or '' end
  return entry
end
local function put(field, entry)
  if pending[field] == nil then
    size = size + 1
    order[size] = field
  end
  pending[field] = entry
end
"""
WRITES: Final = (
    _FIRST
    + _PENDING
    + _REST
    + b"""
local stream, counter, limit, kept, kept_keys = nil, nil, nil, ARGV[2], 4
if kept ~= '' then stream, counter, limit, kept_keys = KEYS[5], KEYS[6], KEYS[7], 7 end
local replies, count, failed, last, depth, trace, following = {}, 0, nil, 0, nil, nil, 0
local creates, emptied, indexed, ack = false, false, nil, nil
"""
    + LIMITED
    + b"""
local function acknowledge(it, engine, member)
"""
    + HANDLED
    + b"""
  return handled(it, engine, member)
end

local function has_index()
  if indexed == nil then indexed = call('HEXISTS', side, '\\254') == 1 end
  return indexed
end

local function flush()
  local entries, count, gone, lost = {}, 0, {}, 0
  for i = 1, size do
    local field, entry = order[i], pending[order[i]]
    if entry == '' then
      lost = lost + 1
      gone[lost] = field
    else
      entries[count + 1], entries[count + 2], count = field, entry, count + 2
    end
  end
  if number then
    entries[count + 1], entries[count + 2], count = '\\255', string.format('%016d', number), count + 2
  end
  for i = 1, count, 4000 do call('HSET', side, unpack(entries, i, math.min(i + 3999, count))) end
  for i = 1, lost, 4000 do call('HDEL', side, unpack(gone, i, math.min(i + 3999, lost))) end
  if emptied then call('EXPIRE', side, 86400) elseif creates then call('PERSIST', side) end
end

local function store(field, old, entry, new, digest, deadline, expired)
  if stream then
    local full = is_full()
    if full then return full end
  end
  local text = take()
  if stream then
    last = call('INCR', counter)
    local event = {'n', last, 's', ARGV[3], 'k', field}
    local size = 6
    if old then event[size + 1], event[size + 2], size = 'o', old, size + 2 end
    if new then event[size + 1], event[size + 2], size = 'v', new, size + 2 end
    if depth then event[size + 1], event[size + 2], size = 'd', depth, size + 2 end
    if trace then event[size + 1], event[size + 2], size = 't', trace, size + 2 end
    event[size + 1], event[size + 2], size = 'r', text, size + 2
    if expired then event[size + 1], event[size + 2], size = 'x', expired, size + 2 end
    if following > 0 then event[size + 1], event[size + 2] = 'm', following end
    local added = add(event)
    if type(added) == 'table' then
      call('DECR', counter)
      return added
    end
  end
  if new then
    if digest == '' then digest = digest_of(new) end
    call('HSET', hash, field, new)
    put(field, text .. digest .. deadline)
    if not old then
      creates, emptied = true, false
      if has_index() then call('ZADD', index, 0, field) end
    end
    if deadline ~= '' then
      call('ZADD', due, deadline, field)
    elseif #entry > 32 then
      call('ZREM', due, field)
    end
  else
    if old then call('HDEL', hash, field) end
    if entry ~= '' then put(field, '') end
    if #entry > 32 then call('ZREM', due, field) end
    if call('EXISTS', hash) == 0 then
      emptied = true
      if has_index() then
        call('HDEL', side, '\\254')
        call('DEL', index)
        indexed = false
      end
    elseif old and has_index() then
      call('ZREM', index, field)
    end
  end
end

local function transact(at)
  local expected, stored, index = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), ARGV[at + 2]
  local fingerprint, answer, unchanged, assumed = ARGV[at + 3], ARGV[at + 4], ARGV[at + 5], ARGV[at + 6]
  at = at + 7
  call('ZCARD', due)
  local fits, skipped, here = true, false, at
  if assumed ~= '' and math.abs(time() - assumed) > 1000 then fits = false end
  if unchanged ~= '' then
    local last = number and string.format('%016d', number) or call('HGET', side, '\\255') or ''
    if unchanged ~= last .. ':' .. call('HLEN', hash) then fits = false end
  end
  for j = 1, expected do
    local field, state = ARGV[at], ARGV[at + 1]
    local old = call('HGET', hash, field)
    skipped = skipped or (failed and failed[field])
    if state == '0' then
      if old then fits = false end
    else
      local entry = entry_of(field)
      if old ~= ARGV[at + 2] or entry ~= ARGV[at + 3] or (has_lapsed(entry, old) or false) ~= (state == '2') then
        fits = false
      end
    end
    at = at + 4
  end
  local kept = index ~= '' and not skipped and call('GET', KEYS[kept_keys + index])
  local delivery = ack
  ack = nil
  if delivery and fits and not call('ZSCORE', delivery[1] .. ':held:' .. delivery[2], delivery[3]) then return 5 end
  if kept or skipped or not fits then
    failed = failed or {}
    for j = 1, expected do failed[ARGV[here + 4 * (j - 1)]] = true end
    return kept and {4, kept} or skipped and 2 or 0
  end
  for j = 0, stored - 1 do
    if ARGV[at + 5 * j] ~= 'e' then following = following + 1 end
  end
  for j = 1, stored do
    local kind, field, value, deadline = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 4]
    if kind ~= 'e' then following = following - 1 end
    local old, entry = call('HGET', hash, field), entry_of(field)
    local failure
    if kind == 'w' then
      failure = store(field, old, entry, value, ARGV[at + 3], deadline)
    elseif kind == 'r' then
      failure = store(field, old, entry)
    elseif kind == 'x' then
      failure = store(field, old, entry, nil, nil, nil, string.sub(entry, 33))
    else
      put(field, string.sub(entry, 1, 32) .. deadline)
      if deadline ~= '' then call('ZADD', due, deadline, field) else call('ZREM', due, field) end
    end
    if failure then return failure end
    at = at + 5
  end
  if delivery then acknowledge(unpack(delivery)) end
  if index ~= '' then
    call('SET', KEYS[kept_keys + index], fingerprint .. string.format('%016d', number or 0) .. answer, 'PX', 86400000)
  end
  return 1
end

local function sweep(limit)
  local gone, size = {time(), '', ''}, 3
  for _, field in ipairs(call('ZRANGEBYSCORE', due, '-inf', time(), 'LIMIT', 0, limit)) do
    local old, entry = call('HGET', hash, field), entry_of(field)
    if has_lapsed(entry, old) then
      local deadline = string.sub(entry, 33)
      local failure = store(field, old, entry, nil, nil, nil, deadline)
      if failure then return failure end
      gone[size + 1], gone[size + 2], gone[size + 3], size = field, old, deadline, size + 3
    else
      -- Another program has written or removed it: what it wrote has no deadline.
      call('ZREM', due, field)
      if entry ~= '' then put(field, string.sub(entry, 1, 32)) end
    end
  end
  local next = call('ZRANGE', due, 0, 0, 'WITHSCORES')
  if next[1] then gone[2], gone[3] = next[1], next[2] end
  return gone
end

local sizes = {g = 2, l = 2, o = 2, d = 2, e = 2, s = 4, n = 4, c = 5}

local function run()
  local i = 4
  while ARGV[i] do
    local kind, field, value = ARGV[i], ARGV[i + 1], ARGV[i + 2]
    local reply, failure
    if kind == 'p' then
      depth, trace = string.match(field, '^(%d+) ?(.*)$')
      depth, trace = depth ~= '0' and depth or nil, trace ~= '' and trace or nil
      i = i + 2
    elseif kind == 'a' then
      ack = {field, value, ARGV[i + 3]}
      i = i + 4
    else
      if kind == 't' then
        reply = transact(i + 1)
        i = i + 8 + 4 * field + 5 * value
      elseif kind == 'e' then
        reply = sweep(field)
      elseif kind == 'o' then
        reply = call('GET', KEYS[kept_keys + field])
      elseif failed and failed[field] then
        reply = 2
      else
        local old, entry = call('HGET', hash, field), entry_of(field)
        if kind == 'l' then
          if old then entry = adopted(field, old, entry) end
          reply = {old, entry, time()}
        elseif kind == 'g' then
          reply = not has_lapsed(entry, old) and old
        else
          local lapsed, digest, deadline = has_lapsed(entry, old), ARGV[i + 3], ''
          local fits = true
          if kind == 'n' then
            fits = not old or lapsed
          elseif kind == 'c' then
            fits = old == value and not lapsed
            value, digest, deadline = ARGV[i + 3], ARGV[i + 4], string.sub(entry, 33)
          end
          if not fits then
            failed = failed or {}
            failed[field] = true
            reply = 0
          else
            reply = old
            if lapsed then
              local at = string.sub(entry, 33)
              failure = store(field, old, entry, nil, nil, nil, at)
              reply, old, entry = {old, at}, nil, ''
            elseif kind == 'n' or kind == 'c' then
              reply = 1
            end
            if kind == 'd' then
              failure = failure or store(field, old, entry)
            else
              failure = failure or store(field, old, entry, value, digest, deadline)
            end
          end
        end
      end
      i = i + (sizes[kind] or 0)
      if failure then return failure end
      if type(reply) == 'table' and reply.err then return reply end
      count = count + 1
      replies[count] = reply or false
    end
  end
end

local failure = run()
flush()
if failure then return failure end
if stream then
  count = count + 1
  replies[count] = last
end
replies[count + 1] = first
return replies
"""
)


# Keys in order. KEYS: hash, side, due, index; ARGV: a number as above; what is wanted: `k` keys, `v` values, `e`
# entries, `c` their count; the bounds as ZRANGEBYLEX has them; '1' for the largest first; how many at most ('': all).
# Replies 0 if the index must be made first, else: the server's time, the number of the last change and of keys, with a
# colon between; whether these are all the keys of the scope, in no order; then the keys, and what is wanted of each, or
# their count with the keys to subtract, whose deadline has passed. An entry is adopted as by `l`.
RANGE: Final = (
    _SHARED
    + b"""
local kind, low, high, backwards, limit = ARGV[2], ARGV[3], ARGV[4], ARGV[5] == '1', tonumber(ARGV[6])
local size, state = call('HLEN', hash), call('HGET', side, '\\254')
local is_small = size <= 1000 and state ~= 'ready'
if not is_small and (state ~= 'ready' or call('ZCARD', index) ~= size) then return 0 end

local lapsed, gone = {}, {}
for _, field in ipairs(call('ZRANGEBYSCORE', due, '-inf', time())) do
  if has_lapsed(entry_of(field), call('HGET', hash, field)) then
    lapsed[field] = true
    gone[#gone + 1] = field
  end
end
local function stamp() return (call('HGET', side, '\\255') or '') .. ':' .. size end

if kind == 'c' and not is_small then
  return {time(), stamp(), 0, call('ZLEXCOUNT', index, low, high), gone}
end

local found, values, entries, count = {}, {}, {}, 0
local function add(field)
  if lapsed[field] then return true end
  count = count + 1
  found[count] = field
  if kind == 'v' or kind == 'e' then
    local value = call('HGET', hash, field)
    if not value then return false end
    values[count] = value
    if kind == 'e' then entries[count] = adopted(field, value, entry_of(field)) end
  end
  return true
end

if is_small then
  for _, field in ipairs(call('HKEYS', hash)) do add(field) end
  return {time(), stamp(), 1, found, values, entries}
end
local wanted = limit or -1
if kind == 'k' and #gone == 0 then
  local first, last = low, high
  if backwards then first, last = high, low end
  local names = call(backwards and 'ZREVRANGEBYLEX' or 'ZRANGEBYLEX', index, first, last, 'LIMIT', 0, wanted)
  return {time(), stamp(), 0, names, {}, {}}
end
while true do
  local chunk
  if backwards then
    chunk = call('ZREVRANGEBYLEX', index, high, low, 'LIMIT', 0, wanted)
  else
    chunk = call('ZRANGEBYLEX', index, low, high, 'LIMIT', 0, wanted)
  end
  for _, field in ipairs(chunk) do
    if not add(field) then
      call('HDEL', side, '\\254')
      return 0
    end
    if count == limit then break end
  end
  if not limit or count >= limit or #chunk < wanted then break end
  if backwards then high = '(' .. chunk[#chunk] else low = '(' .. chunk[#chunk] end
end
return {time(), stamp(), 0, found, values, entries}
"""
)

# One step of making the index. KEYS as above; ARGV: a number, and the cursor that the step before has replied, '' for
# the first. Writers keep it from the first step on. Replies the cursor; '0' when it is ready, '' if it does not fit the
# hash: another program has written meanwhile.
BUILD: Final = (
    _SHARED
    + b"""
local cursor = ARGV[2]
if cursor == '' then
  call('DEL', index)
  cursor = '0'
  call('HSET', side, '\\254', 'building')
end
local scan = call('HSCAN', hash, cursor, 'COUNT', 250)
for at = 1, #scan[2], 2 do call('ZADD', index, 0, scan[2][at]) end
if scan[1] == '0' then
  if call('ZCARD', index) ~= call('HLEN', hash) then
    call('HDEL', side, '\\254')
    return ''
  end
  call('HSET', side, '\\254', 'ready')
end
return scan[1]
"""
)


DONE: Final = 1
SKIPPED: Final = 2
SLOW: Final = 3
"""The reply of `SET_ONE` and `PUBLISH_ONE` to an entry that they cannot do. Nothing was done; `WRITES` must do it."""
KEPT: Final = 4
NOT_HELD: Final = 5
"""The reply to a transaction that acknowledges a delivery which another engine holds by now."""


_ONE: Final = frozenset({"s", "n", "c", "r", "q"})
"""Entries that `SET_ONE` and `COMMIT` can do. Only these two do `r` and `q`."""
_PUBLISHED: Final = frozenset({"s", "n", "c"})
"""Entries that `PUBLISH_ONE` can do."""


class NumberedShape(Shape):
    """How the commands of an adapter with revisions are made."""

    numbers = True

    def __init__(
        self,
        key_prefix: str,
        *,
        events_kept: int = 0,
        clustered: bool = False,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`wall_ns`: the time since the epoch, in nanoseconds."""
        super().__init__(key_prefix, events_kept=events_kept, clustered=clustered)
        self._kept = str(events_kept) if events_kept else ""
        self._wall_ns = wall_ns

    def names(self, hash_key: bytes) -> tuple[bytes, ...]:
        """Return the Redis keys of a scope: its hash and those beside it."""
        prefixes = (sidecar.PREFIX, sidecar.DUE_PREFIX, sidecar.INDEX_PREFIX)
        return hash_key, *[sidecar.beside(prefix, hash_key) for prefix in prefixes]

    def set_entry(self, key: str, data: bytes) -> tuple[Any, ...]:
        # `sidecar.digest_if_large`, inlined, because every plain set comes here.
        return "s", key, data, sidecar.digest_of(data) if len(data) >= sidecar.CLIENT_DIGEST_BYTES else b""

    def head_of_set(self, names: tuple[bytes, ...], scope: str) -> bytes:
        if self.publishes:
            return b"*14" + pack_text(self._publish_one(names, scope))[3:]
        return b"*9" + pack_text(("EVALSHA", _SET_ONE, "2", names[0], names[1]))[2:]

    def _publish_one(self, names: tuple[bytes, ...], scope: str) -> tuple[Any, ...]:
        """Return the parts of a command of `PUBLISH_ONE` that are the same for every write of a scope."""
        events = self.event_keys(names[0])
        return "EVALSHA", _PUBLISH_ONE, "5", names[0], names[1], *events, self._kept, scope

    def swap_entry(self, key: str, raw: bytes | None, after: bytes) -> tuple[Any, ...]:
        digest = sidecar.digest_if_large(after)
        return ("n", key, after, digest) if raw is None else ("c", key, raw, after, digest)

    def read(self, names: tuple[bytes, ...], key: str) -> tuple[Any, ...]:
        return "EVALSHA", _GET_ONE, "2", names[0], names[1], key

    def read_all(self, names: tuple[bytes, ...]) -> tuple[Any, ...]:
        return "EVALSHA", _WHOLE, "4", *names

    def read_range(self, names: tuple[bytes, ...], kind: str, within: Range) -> tuple[Any, ...]:
        """Return the parts of the command that reads the keys within a range."""
        low, included = within.low()
        high = within.high()
        bounds = (
            f"{'[' if included else '('}{low}" if low or not included else "-",
            "+" if high is None else f"({high}",
        )
        limit = "" if within.limit is None else str(within.limit)
        return "EVALSHA", _RANGE, "4", *names, self._number(), kind, *bounds, "1" if within.reverse else "", limit

    def build_index(self, names: tuple[bytes, ...], cursor: bytes) -> tuple[Any, ...]:
        """Return the parts of the command that does one step of building the index of the keys."""
        return "EVALSHA", _BUILD, "4", *names, self._number(), cursor

    def _number(self) -> bytes:
        return b"%016d" % (self._wall_ns() // 1000)

    def write_one(self, names: tuple[bytes, ...], scope: str, entry: tuple[Any, ...]) -> tuple[Any, ...]:
        """As `write`, for one entry of a key without a deadline."""
        kind = entry[0]
        if kind not in (_PUBLISHED if self.publishes else _ONE):
            return self.write(names, scope, entry)
        number = b"%d" % (self._wall_ns() // 1000)
        if self.publishes:
            if kind == "s":
                return *self._publish_one(names, scope), entry[1], entry[2], number, entry[3]
            _, key, *expected, after, digest = entry
            return *self._publish_one(names, scope), key, after, number, digest, kind, *expected
        if kind == "s":
            return "EVALSHA", _SET_ONE, "2", names[0], names[1], entry[1], entry[2], number, entry[3]
        if kind == "q":
            return "EVALSHA", _COMMIT, "2", names[0], names[1], number, *entry[1:]
        _, key, *expected, after, digest = entry
        return "EVALSHA", _SET_ONE, "2", names[0], names[1], key, after, number, digest, kind, *expected

    def swap_entry_of(self, key: str, raw: bytes, number: bytes, after: bytes) -> tuple[Any, ...]:
        """Return the entry that sets a key if it has the value `raw` and the revision `number`. For `write_one`."""
        return "r", key, raw, number, after, sidecar.digest_if_large(after)

    def write(
        self, names: tuple[bytes, ...], scope: str, entries: Sequence[Any], kept: Sequence[bytes] = ()
    ) -> tuple[Any, ...]:
        events = self.event_keys(names[0])
        count = str(len(names) + len(events) + len(kept))
        return "EVALSHA", _WRITES, count, *names, *events, *kept, self._number(), self._kept, scope, *entries


def packed_set(head: bytes, parts: tuple[Any, ...]) -> bytes:
    """Return the command of `write_one` for one plain set as the bytes to send. `head`: that of its scope.

    hiredis packs every other command. It takes twice as long, which was a tenth of the time of a set.
    """
    key, data, number, digest = parts[-4:]
    name = key.encode()
    return b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
        head,
        len(name),
        name,
        len(data),
        data,
        len(number),
        number,
        len(digest),
        digest,
    )


def _registered(source: bytes) -> str:
    digest = hashlib.sha1(source).hexdigest()  # noqa: S324 - the name that Redis gives a script
    SOURCES[digest] = source
    return digest


_SET_ONE: Final = _registered(SET_ONE)
_PUBLISH_ONE: Final = _registered(PUBLISH_ONE)
_COMMIT: Final = _registered(COMMIT)
_GET_ONE: Final = _registered(GET_ONE)
_WHOLE: Final = _registered(WHOLE)
_WRITES: Final = _registered(WRITES)
_RANGE: Final = _registered(RANGE)
_BUILD: Final = _registered(BUILD)
