"""The script of durable triggers: which engine handles which event of the stream (docs/design/0050-redis-journal.md).

A durable trigger is a consumer: a consumer group of the stream, by its name, and keys `scopestate:consumer:<prefix>...`
beside it. Each operation is one script, so it is done whole or not at all, also if the engine or the server is killed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from scopestate.ops.triggers import Trigger
from scopestate.persistence.redis.script import HANDLED, SOURCES, Shape

# KEYS: the stream, its counter, the limit of the stream, the names of the consumers, the consumer, and a key that never
# exists: so while a cluster moves the slot key by key, the script is refused there (TRYAGAIN), and never finds some of
# its keys gone. ARGV: the operation, the engine, the name of the consumer, then what the operation needs.
#
# What is kept of a consumer, KEYS[5] being `it`:
#
#   it           hash: `number` the last event read from the stream; `paused` why; `lost` events that it never saw;
#                `dead` the most dead letters
#   it:engines   sorted set: engine -> until when what it holds is its own (ms); it renews that with each operation
#   it:held:E    sorted set: member -> number, of the events that engine E holds
#   it:lanes     hash: lane -> engine and how many events of it that holds; or `!` for a lane that is blocked
#   it:parked    sorted set, in the order of the members: events that no engine holds: behind others of their lane, or
#                of an engine that is gone
#   it:ready     sorted set: lane without an engine -> when its first event may be handled (ms)
#   it:tried     hash: entry id -> attempts, time of the first one, when the next one is due, the last error
#   it:open      sorted set: entry id -> number, of the events above that are only in the stream
#   it:copies    hash: entry id -> the event, of those above that the stream no longer has, and of dead letters
#   it:letters   hash: entry id -> what an engine has said about a dead letter; and :m its member, :n its replays
#   it:dead      sorted set: entry id -> number, of the dead letters
#
# A member is `lane \n number : entry id`, so the events of a lane are in order. A lane says how long it is, so none is
# the beginning of another one. An event is in exactly one of: beyond `number`, held, parked, a dead letter, gone.
SOURCE: Final = (
    HANDLED
    + b"""
local call, format, match = redis.call, string.format, string.match
local stream, counter, limit, names, it = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local operation, me, group = ARGV[1], ARGV[2], ARGV[3]
local engines, lanes, parked, ready = it .. ':engines', it .. ':lanes', it .. ':parked', it .. ':ready'
local tried, open, copies = it .. ':tried', it .. ':open', it .. ':copies'
local letters, dead = it .. ':letters', it .. ':dead'
local mine = it .. ':held:' .. me
local parts_of_time = call('TIME')
local now = parts_of_time[1] * 1000 + math.floor(parts_of_time[2] / 1000)

local function parts(member) return match(member, '^(.*)\\n(%d+):([%d-]+)$') end
local function first_of(lane, most)
  return call('ZRANGEBYLEX', parked, '[' .. lane .. '\\n0', '(' .. lane .. '\\n:', 'LIMIT', 0, most)
end
local function release(lane) release_lane(it, lane) end
local function leave(lane) leave_lane(it, me, lane) end
local function dismiss(engine)
  local key, order, seen = it .. ':held:' .. engine, {}, {}
  for _, member in ipairs(call('ZRANGE', key, 0, -1)) do
    local lane = parts(member)
    if lane then
      call('ZADD', parked, 0, member)
      if not seen[lane] then
        seen[lane] = true
        order[#order + 1] = lane
      end
    end
  end
  call('DEL', key)
  call('ZREM', engines, engine)
  for _, lane in ipairs(order) do
    call('HDEL', lanes, lane)
    release(lane)
  end
  return #order
end
local function forget(id)
  call('ZREM', open, id)
  call('HDEL', tried, id)
  call('HDEL', copies, id)
  call('HDEL', letters, id .. ':n')
end
local function unpacked(copy)
  local ok, fields = pcall(cmsgpack.unpack, copy)
  return ok and type(fields) == 'table' and fields or nil
end
local function event_at(id)
  local entry = call('XRANGE', stream, id, id)[1]
  if entry then return entry[2] end
  local copy = call('HGET', copies, id)
  return copy and unpacked(copy)
end
local function copy(id)
  local entry = call('XRANGE', stream, id, id)[1]
  if entry then call('HSET', copies, id, cmsgpack.pack(entry[2])) end
end
local function exists() return call('EXISTS', it) == 1 end
local function number_of(fields)
  return fields[1] == 'n' and fields[3] == 's' and fields[5] == 'k' and tonumber(fields[2])
end
local function oldest()
  for _, entry in ipairs(call('XRANGE', stream, '-', '+', 'COUNT', 100)) do
    if number_of(entry[2]) then return entry end
  end
end

local run = {}

-- begin, id, number, limit, dead: make the consumer if there is none. begin: `now`, `earliest`, or `at` an id and its
-- number. Replies 1 if it was made, 2 if only its group was, 0 if both were there.
function run.join()
  local begin, id, number = ARGV[4], ARGV[5], ARGV[6]
  call('SET', limit, ARGV[7])
  local first = begin == 'now' and '$' or begin == 'at' and id or '0'
  local known = exists()
  if known then first = '0' end
  local made = redis.pcall('XGROUP', 'CREATE', stream, group, first, 'MKSTREAM')
  if made.err then
    if not string.find(made.err, 'BUSYGROUP') then return made end
    if not known then call('XGROUP', 'SETID', stream, group, first) end
  end
  if not known then
    if begin == 'now' then
      number = call('GET', counter) or 0
    elseif begin == 'earliest' then
      local entry = oldest()
      number = entry and format('%d', entry[2][2] - 1) or call('GET', counter) or 0
    end
    call('HSET', it, 'number', number)
  end
  call('HSET', it, 'dead', ARGV[8])
  call('HSET', names, group, now)
  return not known and 1 or not made.err and 2 or 0
end

local function row_of(member, id, fields, text)
  local attempts, first, due, err = match(text or '', '^(%d+) (%d+) (%d+) (.*)$')
  return {member, id, fields, attempts or '0', first or '0', due or '0', err or ''}
end

-- members: replies what this engine holds beside those, in order, as `fetch` does: a reply may have been lost.
function run.again()
  local known, rows = {}, {}
  for i = 4, #ARGV do known[ARGV[i]] = true end
  for _, member in ipairs(call('ZRANGE', mine, 0, -1)) do
    local _, _, id = parts(member)
    if id and not known[member] then
      rows[#rows + 1] = row_of(member, id, event_at(id) or {}, call('HGET', tried, id))
    end
  end
  return rows
end

local filter = {}
local function wanted(fields)
  local scope, key = fields[4], fields[6]
  if filter.scope and scope ~= filter.scope or filter.key and key ~= filter.key then return false end
  if filter.scopes and string.sub(scope, 1, #filter.scopes) ~= filter.scopes then return false end
  if filter.keys and string.sub(key, 1, #filter.keys) ~= filter.keys then return false end
  if filter.kinds then
    local old, new, expired = false, false, false
    for i = 7, #fields, 2 do
      if fields[i] == 'o' then old = true elseif fields[i] == 'v' then new = true
      elseif fields[i] == 'x' then expired = true end
    end
    local kind = expired and 'x' or not new and 'd' or not old and 'c' or 'u'
    return string.find(filter.kinds, kind, 1, true) ~= nil
  end
  return true
end
local function lane_of(order, id, fields)
  local scope, key = fields[4], fields[6]
  if order == 'key' then return (#scope + #key) .. ':' .. #scope .. ':' .. scope .. key end
  if order == 'scope' then return #scope .. ':' .. scope end
  if order == 'none' then return id end
  return '0'
end
-- The last number that the consumer has read. If what is kept there is damaged, no event counts as lost.
local function last_read()
  return tonumber(call('HGET', it, 'number') or '') or tonumber(call('GET', counter) or '') or 0
end
-- What an engine does shows that it lives. Replies 1 if it was taken for dead, or is new.
local function renew(wait)
  local known = call('ZSCORE', engines, me)
  -- Its entry alone may be gone, if somebody has deleted it: the engine no longer knows what it holds.
  if not known then dismiss(me) end
  call('ZADD', engines, now + wait, me)
  return known and 0 or 1
end

-- The id of the last entry of the stream that was taken, and the number of its event; the entry that is being taken.
-- Used if the script fails between: see the end.
local taken, taken_number, taking
local function before_id(id)
  local ms, seq = match(id, '^(%d+)-(%d+)$')
  if seq ~= '0' then return ms .. '-' .. format('%.0f', seq - 1) end
  return format('%.0f', ms - 1) .. '-18446744073709551615'
end

-- wait, most, order, scope, key, scopes, keys, kinds: give this engine up to so many events. wait: how long what it
-- holds is its own (ms). The filters: '-' for none, else '=' and the text. Replies `gone` without a consumer, else:
-- what `renew` does, the reason of a pause or '', events lost, when to ask again (ms, '' not by itself), 1 if there may
-- be more now, the last number read; then for each event: member, entry id, fields, attempts, first, due, error.
function run.fetch()
  if not exists() then return 'gone' end
  local wait, room, order = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
  for i, name in ipairs({'scope', 'key', 'scopes', 'keys', 'kinds'}) do
    local text = ARGV[6 + i]
    filter[name] = string.sub(text, 1, 1) == '=' and string.sub(text, 2) or nil
  end
  local is_new, lost, count, more = renew(wait), 0, 0, 0
  for _, engine in ipairs(call('ZRANGEBYSCORE', engines, '-inf', '(' .. format('%d', now), 'LIMIT', 0, 4)) do
    dismiss(engine)
  end
  local replies = {is_new, call('HGET', it, 'paused') or '', 0, '', 0, call('HGET', it, 'number')}
  local function give(member, id, number, fields, text)
    call('ZADD', mine, number, member)
    count = count + 1
    replies[6 + count] = row_of(member, id, fields, text)
  end
  if replies[2] == '' then
    for _, lane in ipairs(call('ZRANGEBYSCORE', ready, '-inf', now, 'LIMIT', 0, room)) do
      local given = 0
      for _, member in ipairs(first_of(lane, room - count)) do
        local _, number, id = parts(member)
        local fields, text = event_at(id), call('HGET', tried, id)
        if fields then
          give(member, id, number, fields, text)
          given = given + 1
        end
        call('ZREM', parked, member)
        if not fields then
          forget(id)
          lost = lost + 1
        end
      end
      if given > 0 then
        call('HSET', lanes, lane, me .. ' ' .. given)
        call('ZREM', ready, lane)
      else
        release(lane)
      end
      if count >= room then break end
    end
    local number, scanned = last_read(), 0
    taken_number = number
    local some = call('ZCARD', parked)
    while count < room and scanned < 1000 do
      local reply = redis.pcall(
        'XREADGROUP', 'GROUP', group, 'scopestate', 'COUNT', room - count, 'NOACK', 'STREAMS', stream, '>')
      if reply and reply.err then
        if string.find(reply.err, 'NOGROUP') then return 'gone' end
        return reply
      end
      if not reply then break end
      local entries = reply[1][2]
      scanned = scanned + #entries
      for _, entry in ipairs(entries) do
        local id, fields = entry[1], entry[2]
        taking = id
        local this = number_of(fields)
        if this then
          if this > number + 1 then lost = lost + this - number - 1 end
          number = this
          if wanted(fields) then
            local lane = lane_of(order, id, fields)
            local member = lane .. '\\n' .. format('%016d', this) .. ':' .. id
            local owner = call('HGET', lanes, lane)
            local is_mine = owner and match(owner, '^[^ ]*') == me
            call('ZADD', open, this, id)
            if (owner and not is_mine) or (some > 0 and first_of(lane, 1)[1]) then
              call('ZADD', parked, 0, member)
              some = some + 1
            else
              give(member, id, this, fields)
              call('HSET', lanes, lane, me .. ' ' .. (is_mine and tonumber(match(owner, ' (%d+)$') or 0) + 1 or 1))
            end
          end
        end
        taken, taken_number = id, number
      end
    end
    replies[6] = format('%d', number)
    call('HSET', it, 'number', replies[6])
    if count >= room or scanned >= 1000 then more = 1 end
  end
  if lost > 0 then redis.pcall('HINCRBY', it, 'lost', lost) end
  replies[3], replies[5] = lost, more
  local next = nil
  for _, key in ipairs({replies[2] == '' and ready or engines, engines}) do
    local head = call('ZRANGE', key, 0, 1, 'WITHSCORES')
    local at = head[1] == me and 3 or 1
    if head[at] and (not next or tonumber(head[at + 1]) < next) then next = tonumber(head[at + 1]) end
  end
  if call('ZCARD', parked) > 0 then next = math.min(next or now + 100, now + 100) end
  if next then replies[4] = math.max(next - now, 0) end
  return replies
end

-- wait, then member and attempt for each: these attempts begin. Replies the members that are no longer held.
function run.began()
  if not exists() then return 'gone' end
  renew(tonumber(ARGV[4]))
  local lost = {}
  for i = 5, #ARGV, 2 do
    local _, _, id = parts(ARGV[i])
    if call('ZSCORE', mine, ARGV[i]) then
      local first = match(call('HGET', tried, id) or '', '^%d+ (%d+)') or '0'
      if first == '0' then first = format('%d', now) end
      call('HSET', tried, id, ARGV[i + 1] .. ' ' .. first .. ' 0 ')
    else
      lost[#lost + 1] = ARGV[i]
    end
  end
  return lost
end

-- wait, then for each event: `d member`: it is handled; `r member attempts first due error`: it is tried again by this
-- engine at that time; `p member`: this engine gives it back, and what it holds behind it in its lane as well;
-- `x member letter` or `b member letter`: it is given up, and its lane goes on or is blocked. Replies the members that
-- are no longer held, then those that were given back (`p`, and what is behind `b`), what `renew` does, and the reason
-- of a pause: with `dead`, the list of dead letters is full.
function run.ended()
  if not exists() then return 'gone' end
  local lost, back, i, is_new = {}, {}, 5, renew(tonumber(ARGV[4]))
  local function put_back(member)
    local lane = parts(member)
    local others = {}
    for _, other in ipairs(call('ZRANGE', mine, 0, -1)) do
      if parts(other) == lane then others[#others + 1] = other end
    end
    for _, other in ipairs(others) do
      call('ZADD', parked, 0, other)
      call('ZREM', mine, other)
      back[#back + 1] = other
    end
    call('HDEL', lanes, lane)
    return lane
  end
  while ARGV[i] do
    local kind, member = ARGV[i], ARGV[i + 1]
    local lane, number, id = parts(member)
    if kind == 'd' then
      if not handled(it, me, member) then lost[#lost + 1] = member end
      i = i + 2
    else
      local held = call('ZSCORE', mine, member)
      if not held then lost[#lost + 1] = member end
      if kind == 'r' then
        if held then
          local text = ARGV[i + 2] .. ' ' .. ARGV[i + 3] .. ' ' .. ARGV[i + 4] .. ' ' .. ARGV[i + 5]
          call('HSET', tried, id, text)
        end
        i = i + 6
      elseif kind == 'p' then
        if held then release(put_back(member)) end
        i = i + 2
      else
        if held then
          if call('HEXISTS', copies, id) == 0 then copy(id) end
          call('HSET', letters, id, ARGV[i + 2], id .. ':m', member)
          call('ZADD', dead, number, id)
          call('ZREM', open, id)
          call('HDEL', tried, id)
          call('ZREM', mine, member)
          if kind == 'b' then
            put_back(member)
            call('HSET', lanes, lane, '! ' .. id)
          else
            leave(lane)
          end
          local most = tonumber(call('HGET', it, 'dead') or '') or math.huge
          if call('ZCARD', dead) >= most and call('HEXISTS', it, 'paused') == 0 then
            call('HSET', it, 'paused', 'dead')
          end
        end
        i = i + 3
      end
    end
  end
  return {lost, back, is_new, call('HGET', it, 'paused') or ''}
end

-- This engine gives back all that it holds.
function run.leave() return dismiss(me) end

-- Replies: number read, counter, pause, lost, held, parked, dead, engines, time of the oldest event not handled (ms,
-- 0: none), now, when the next is due (0: none waits).
function run.status()
  if not exists() then return 'gone' end
  local held, rows = 0, call('ZRANGE', engines, 0, -1)
  for _, engine in ipairs(rows) do held = held + call('ZCARD', it .. ':held:' .. engine) end
  local of_it = call('HMGET', it, 'number', 'paused', 'lost')
  local first = call('ZRANGE', open, 0, 0)[1]
  local at, number = first and tonumber(match(first, '^%d+') or '') or 0, last_read()
  if at == 0 and number < tonumber(call('GET', counter) or 0) then
    for _, row in ipairs(call('XINFO', 'GROUPS', stream)) do
      if row[2] == group then
        local last
        for i = 1, #row, 2 do if row[i] == 'last-delivered-id' then last = row[i + 1] end end
        local entry = call('XRANGE', stream, '(' .. last, '+', 'COUNT', 1)[1]
        if entry then at = tonumber(match(entry[1], '^%d+')) end
      end
    end
  end
  local head = call('ZRANGE', ready, 0, 0, 'WITHSCORES')
  return {format('%d', number), call('GET', counter) or '0', of_it[2] or '', of_it[3] or '0', held,
    call('ZCARD', parked), call('ZCARD', dead), #rows, format('%d', at), format('%d', now), head[2] or '0'}
end

-- reason: pause the consumer; '': resume it. Replies 0 if there is none, else 1 and the events lost so far, which are
-- told once.
function run.pause()
  if not exists() then return {0, 0} end
  local lost = tonumber(call('HGET', it, 'lost') or '') or 0
  if ARGV[4] ~= '' then
    call('HSET', it, 'paused', ARGV[4])
  else
    call('HDEL', it, 'paused', 'lost')
  end
  return {1, lost}
end

-- Forget the consumer with all that is kept of it. Without any consumer the stream is bounded by number again.
function run.forget()
  local known = exists()
  for _, engine in ipairs(redis.pcall('ZRANGE', engines, 0, -1)) do call('DEL', it .. ':held:' .. engine) end
  call('DEL', it, engines, lanes, parked, ready, tried, open, copies, letters, dead)
  redis.pcall('XGROUP', 'DESTROY', stream, group)
  call('HDEL', names, group)
  if call('EXISTS', names) == 0 then call('DEL', limit) end
  return known and 1 or 0
end

-- keep: copy events that a consumer still needs and the stream is about to lose, at most 500, and trim the stream to
-- about so many entries. Replies how many entries are left, and whether more could go at once.
function run.trim()
  local keep, copied = tonumber(ARGV[4]), 0
  local more = call('XLEN', stream) - keep
  if more <= 0 then return {more + keep, 0} end
  local counted = tonumber(call('GET', counter) or 0)
  local last, positions = nil, {}
  local function before(one, other)
    local ms, seq = match(one, '^(%d+)-(%d+)$')
    local other_ms, other_seq = match(other, '^(%d+)-(%d+)$')
    ms, seq, other_ms, other_seq = tonumber(ms), tonumber(seq), tonumber(other_ms), tonumber(other_seq)
    return ms < other_ms or (ms == other_ms and seq < other_seq)
  end
  for _, row in ipairs(call('XINFO', 'GROUPS', stream)) do
    local one = {}
    for i = 1, #row, 2 do one[row[i]] = row[i + 1] end
    positions[one.name] = one['last-delivered-id']
  end
  local base = ARGV[5]
  for _, name in ipairs(call('HKEYS', names)) do
    local its = base .. name
    local here = positions[name]
    if here then
      while copied < 500 do
        -- A consumer whose keys are damaged must not keep the others' events from being trimmed.
        local first = redis.pcall('ZRANGE', its .. ':open', 0, 0, 'WITHSCORES')
        if not first[1] or tonumber(first[2]) > counted - keep then break end
        local entries = redis.pcall('XRANGE', stream, first[1], first[1])
        local entry = entries[1]
        local done = entry and redis.pcall('HSET', its .. ':copies', first[1], cmsgpack.pack(entry[2]))
        if type(done) == 'table' then break end
        call('ZREM', its .. ':open', first[1])
        copied = copied + 1
      end
      local first = redis.pcall('ZRANGE', its .. ':open', 0, 0)[1]
      if first and match(first, '^%d+-%d+$') and before(first, here) then here = first end
      if not last or before(here, last) then last = here end
    end
  end
  if last then call('XTRIM', stream, 'MINID', '~', last, 'LIMIT', more) end
  return {call('XLEN', stream), copied >= 500 and 1 or 0}
end

-- after, most: replies numbers, ids, letters, events and replays of dead letters with higher numbers.
function run.letters()
  local found = {}
  for _, id in ipairs(call('ZRANGEBYSCORE', dead, '(' .. ARGV[4], '+inf', 'LIMIT', 0, ARGV[5])) do
    local letter, event = call('HGET', letters, id), call('HGET', copies, id)
    if letter then
      local number, replays = call('ZSCORE', dead, id), call('HGET', letters, id .. ':n') or '0'
      found[#found + 1] = {number, id, letter, event and unpacked(event) or {}, replays}
    end
  end
  return found
end

local function unblock(id, member)
  local lane = parts(member or '')
  if not lane then return end
  if call('HGET', lanes, lane) == '! ' .. id then call('HDEL', lanes, lane) end
  if not call('HGET', lanes, lane) then release(lane) end
end

-- what, reset, then numbers: what is `some` (those), `all`, or `before` a time in ms (of the letter's text before its
-- first space). Each goes back to its place in its lane. Replies how many.
local function chosen()
  local what = ARGV[4]
  if what == 'all' then return call('ZRANGE', dead, 0, 4999) end
  local ids = {}
  if what == 'before' then
    for _, id in ipairs(call('ZRANGE', dead, 0, -1)) do
      if tonumber(match(call('HGET', letters, id) or '', '^%d+') or 0) < tonumber(ARGV[6]) then ids[#ids + 1] = id end
    end
    return ids
  end
  for i = 6, #ARGV do
    for _, id in ipairs(call('ZRANGEBYSCORE', dead, ARGV[i], ARGV[i])) do ids[#ids + 1] = id end
  end
  return ids
end
function run.replay()
  local count = 0
  for _, id in ipairs(chosen()) do
    local member = call('HGET', letters, id .. ':m')
    if member and parts(member) then
      if ARGV[5] == '0' then
        local attempts, first = match(call('HGET', letters, id) or '', '^%d+ (%d+) (%d+)')
        if attempts then call('HSET', tried, id, attempts .. ' ' .. first .. ' 0 ') end
      end
      call('ZADD', parked, 0, member)
      call('ZREM', dead, id)
      call('HDEL', letters, id, id .. ':m')
      redis.pcall('HINCRBY', letters, id .. ':n', 1)
      unblock(id, member)
      count = count + 1
    end
  end
  return count
end
function run.purge()
  local ids = chosen()
  for _, id in ipairs(ids) do
    local member = call('HGET', letters, id .. ':m')
    call('HDEL', letters, id, id .. ':m', id .. ':n')
    call('ZREM', dead, id)
    call('HDEL', copies, id)
    unblock(id, member)
  end
  return #ids
end

local ok, reply = pcall(run[operation])
if ok then return reply end
-- What was taken from the stream and not entered anywhere is taken again, once the key that is wrong was put right.
if taking then
  redis.pcall('XGROUP', 'SETID', stream, group, taken or before_id(taking))
  redis.pcall('HSET', it, 'number', format('%d', taken_number))
end
return type(reply) == 'table' and reply or redis.error_reply('ERR ' .. reply)
"""
)

CONSUME: Final = hashlib.sha1(SOURCE).hexdigest()  # noqa: S324 - the name that Redis gives a script
SOURCES[CONSUME] = SOURCE


class Names:
    """The keys of one consumer, and how the commands of an engine on it are made."""

    def __init__(self, shape: Shape, consumer: str, engine: str) -> None:
        """`engine`: a name of this engine that no other one has, without spaces and colons."""
        self.consumer = consumer
        base = f"scopestate:consumer:{shape.place}:"
        self._it = base + consumer
        self._keys = (shape.stream, shape.counter, shape.limit, names_key(shape), self._it, absent_key(self._it))
        self._base = base
        self._engine = engine

    def _command(self, operation: str, *arguments: Any) -> tuple[Any, ...]:
        return "EVALSHA", CONSUME, "6", *self._keys, operation, self._engine, self.consumer, *arguments

    def join(self, begin: Begin, limit: str, most_dead: int) -> tuple[Any, ...]:
        """Make the consumer if there is none. `limit`: see `script.LIMITED`."""
        return self._command("join", begin.kind, begin.entry_id, begin.number, limit, most_dead)

    def fetch(self, wait_ms: int, most: int, order: str, trigger: Trigger) -> tuple[Any, ...]:
        """Give this engine up to `most` events. What it holds is its own for `wait_ms`."""
        texts = [trigger.scope, trigger.key, trigger.scope_prefix, trigger.prefix, _kinds(trigger)]
        filters = ["-" if text is None else f"={text}" for text in texts]
        return self._command("fetch", wait_ms, most, order, *filters)

    def began(self, wait_ms: int, attempts: Iterable[tuple[bytes, int]]) -> tuple[Any, ...]:
        """Note the attempts that begin: member, and number of the attempt."""
        return self._command("began", wait_ms, *[part for attempt in attempts for part in attempt])

    def ended(self, wait_ms: int, outcomes: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
        """Note how attempts have ended, in the words of the script."""
        return self._command("ended", wait_ms, *[part for outcome in outcomes for part in outcome])

    def acknowledging(self, member: bytes) -> tuple[Any, ...]:
        """Return the entry of the script that writes which acknowledges an event that this engine holds."""
        return "a", self._it, self._engine, member

    def holds(self, member: bytes) -> tuple[Any, ...]:
        """Ask whether this engine holds an event: the reply is None if not."""
        return "ZSCORE", f"{self._it}:held:{self._engine}", member

    def exists(self) -> tuple[Any, ...]:
        """Ask whether the consumer is there: 1, else 0."""
        return "EXISTS", self._it

    def count_letters(self) -> tuple[Any, ...]:
        """Ask how many dead letters there are."""
        return "ZCARD", f"{self._it}:dead"

    def again(self, known: Iterable[bytes]) -> tuple[Any, ...]:
        """Ask for what this engine holds beside those members."""
        return self._command("again", *known)

    def leave(self) -> tuple[Any, ...]:
        """Give back what this engine holds."""
        return self._command("leave")

    def status(self) -> tuple[Any, ...]:
        """Ask how far the consumer is."""
        return self._command("status")

    def pause(self, why: str) -> tuple[Any, ...]:
        """Pause it; with "", resume it."""
        return self._command("pause", why)

    def forget(self) -> tuple[Any, ...]:
        """Forget it, with its dead letters."""
        return self._command("forget")

    def trim(self, keep: int) -> tuple[Any, ...]:
        """Trim the stream to about `keep` entries, behind the slowest consumer."""
        return self._command("trim", keep, self._base)

    def letters(self, after: int, most: int) -> tuple[Any, ...]:
        """Read dead letters, by number."""
        return self._command("letters", after, most)

    def replay(self, numbers: Sequence[int] | None, *, reset: bool) -> tuple[Any, ...]:
        """Put dead letters back to their places; None: the oldest 5,000."""
        return self._command("replay", "all" if numbers is None else "some", int(reset), *(numbers or ()))

    def purge(self, numbers: Sequence[int] | None) -> tuple[Any, ...]:
        """Remove dead letters; None: the oldest 5,000."""
        return self._command("purge", "all" if numbers is None else "some", "0", *(numbers or ()))

    def purge_before(self, time_ms: int) -> tuple[Any, ...]:
        """Remove the dead letters that were given up before this time."""
        return self._command("purge", "before", "0", time_ms)


class Begin(NamedTuple):
    """Where a new consumer begins."""

    kind: str
    """`now`, `earliest`, or `at`: behind the event with the next two."""
    entry_id: str = ""
    number: int = 0


def absent_key(it: str) -> str:
    """Return the key that never exists, beside those of the consumer with the key `it`: see `SOURCE`."""
    return f"{it}:absent"


def names_key(shape: Shape) -> str:
    """Return the key of the names of all consumers."""
    return f"scopestate:consumers:{shape.place}"


_LETTERS: Final = {"created": "c", "updated": "u", "deleted": "d", "expired": "x"}


def _kinds(trigger: Trigger) -> str | None:
    return None if trigger.events is None else "".join(_LETTERS[name] for name in trigger.events)
