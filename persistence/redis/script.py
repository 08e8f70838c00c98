"""Reads and writes of one scope as one command of Redis, and the errors for its refusals.

The pure Python turns compute every value; the script only compares and stores (docs/design/0030-redis.md). It reads
before it writes, so everything that can fail (a key of another type, no memory, a read-only server) fails before the
first change: a command is executed whole or not at all.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any, Final, Self

from redis.crc import key_slot

from scopestate.errors import StorageError
from scopestate.persistence.redis.connection import PASSING, Refusal
from scopestate.persistence.redis.slots import tags

# How an event is added. While there are durable triggers, `limit` is a `b` or a `p`, followed by the most entries of
# the stream. Beyond that, `b` refuses writes, and those of handlers beyond twice as many; `p` trims the stream, and a
# consumer that has not read that far is paused. `is_full` checks once in each command, before anything is written.
LIMITED: Final = b"""
local looked
local function is_full()
  if looked then return end
  looked = true
  local text = redis.call('GET', limit)
  if not text then return end
  kept = string.sub(text, 2)
  if string.sub(text, 1, 1) ~= 'b' then return end
  local most = tonumber(kept)
  kept = nil
  if redis.call('XLEN', stream) >= (depth and 2 * most or most) then
    looked = nil
    return redis.error_reply('JOURNALFULL durable triggers have not handled ' .. most .. ' events (journal_events)')
  end
end
local function add(event)
  if kept then return redis.pcall('XADD', stream, 'MAXLEN', '~', kept, '*', unpack(event)) end
  return redis.pcall('XADD', stream, '*', unpack(event))
end
"""

# `handled(it, engine, member)` removes an event that was handled, and lets its lane continue. It returns false if the
# engine does not hold the event. The script that writes has it too, for a transaction that acknowledges a delivery.
HANDLED: Final = b"""
local function release_lane(it, lane)
  local first = redis.call(
    'ZRANGEBYLEX', it .. ':parked', '[' .. lane .. '\\n0', '(' .. lane .. '\\n:', 'LIMIT', 0, 1)[1]
  if first then
    local text = redis.call('HGET', it .. ':tried', string.match(first, ':([%d-]+)$'))
    redis.call('ZADD', it .. ':ready', text and string.match(text, '^%d+ %d+ (%d+)') or '0', lane)
  else
    redis.call('ZREM', it .. ':ready', lane)
  end
end
local function leave_lane(it, engine, lane)
  local count = tonumber(string.match(redis.call('HGET', it .. ':lanes', lane) or '', ' (%d+)$') or 0)
  if count > 1 then
    redis.call('HSET', it .. ':lanes', lane, engine .. ' ' .. (count - 1))
  else
    redis.call('HDEL', it .. ':lanes', lane)
    release_lane(it, lane)
  end
end
local function handled(it, engine, member)
  if redis.call('ZREM', it .. ':held:' .. engine, member) == 0 then return false end
  local lane, _, id = string.match(member, '^(.*)\\n(%d+):([%d-]+)$')
  redis.call('ZREM', it .. ':open', id)
  redis.call('HDEL', it .. ':tried', id)
  redis.call('HDEL', it .. ':copies', id)
  redis.call('HDEL', it .. ':letters', id .. ':n')
  leave_lane(it, engine, lane)
  return true
end
"""

# KEYS: the hash; with shared events also the stream, the counter of its events, and its limit (see `LIMITED`).
# ARGV: with shared events first how many are kept and the scope; then the entries:
#   g field                   read
#   s field value             set
#   d field                   delete
#   n field value             set if there is no value
#   c field expected value    set if the value is the expected one
#   t expected changes ...    set and delete several fields, if several have the expected values: the two counts, then
#                             for each of both kinds `field 1 value`, or `field 0 ''` for no value; a changed field is
#                             an expected one as well
#   p depth                   the depth of the entries that follow: how many handlers led to them; 0 before the first
#                             `p`. After a space, the trace that they are part of, if any. Has no reply
# Replies, one for each entry: the value before; for `n`, `c` and `t` DONE if the values were as expected.
# Once an `n`, `c` or `t` has failed, later entries on its fields are not done and are answered SKIPPED, because they
# were made after it. Last, with shared events, the number of the newest event. An event that cannot be appended is not
# counted, because readers would take its number for an event that they have missed.
SOURCE: Final = (
    b"""
local hash, stream, counter, limit, kept = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1]
local i = stream and 3 or 1
local replies, count, failed, last, depth, trace, following = {}, 0, nil, 0, nil, nil, 0
"""
    + LIMITED
    + b"""
local function store(field, old, new)
  if stream then
    local full = is_full()
    if full then return full end
    last = redis.call('INCR', counter)
    local event = {'n', last, 's', ARGV[2], 'k', field}
    local size = 6
    if old then event[size + 1], event[size + 2], size = 'o', old, size + 2 end
    if new then event[size + 1], event[size + 2], size = 'v', new, size + 2 end
    if depth then event[size + 1], event[size + 2], size = 'd', depth, size + 2 end
    if trace then event[size + 1], event[size + 2], size = 't', trace, size + 2 end
    if following > 0 then event[size + 1], event[size + 2] = 'm', following end
    local entry = add(event)
    if type(entry) == 'table' then
      redis.call('DECR', counter)
      return entry
    end
  end
  if new then
    redis.call('HSET', hash, field, new)
  elseif old then
    redis.call('HDEL', hash, field)
  end
end

local function transact(at, expected, changes)
  local fits, skipped = true, false
  for j = 1, expected do
    local field, old = ARGV[at], redis.call('HGET', hash, ARGV[at])
    skipped = skipped or (failed and failed[field])
    if old ~= (ARGV[at + 1] == '1' and ARGV[at + 2]) then fits = false end
    at = at + 3
  end
  if skipped or not fits then
    failed = failed or {}
    for j = 1, expected do failed[ARGV[at - 3 * j]] = true end
    return skipped and 2 or 0
  end
  for j = 1, changes do
    following = changes - j
    local failure = store(ARGV[at], redis.call('HGET', hash, ARGV[at]), ARGV[at + 1] == '1' and ARGV[at + 2] or nil)
    if failure then return failure end
    at = at + 3
  end
  return 1
end

while ARGV[i] do
  local kind, field, value = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if kind == 'p' then
    depth, trace = string.match(field, '^(%d+) ?(.*)$')
    depth, trace = depth ~= '0' and depth or nil, trace ~= '' and trace or nil
    i = i + 2
  elseif kind == 't' then
    local reply = transact(i + 3, tonumber(field), tonumber(value))
    if type(reply) == 'table' then return reply end
    count = count + 1
    replies[count] = reply
    i = i + 3 + 3 * (tonumber(field) + tonumber(value))
  else
    local old = redis.call('HGET', hash, field)
    local reply, size, failure = old, 3, nil
    if failed and failed[field] then
      reply = 2
      if kind == 'c' then size = 4 elseif kind == 'g' or kind == 'd' then size = 2 end
    elseif kind == 's' then
      failure = store(field, old, value)
    elseif kind == 'd' then
      failure = store(field, old, nil)
      size = 2
    elseif kind == 'g' then
      size = 2
    else
      local fits = not old
      if kind == 'c' then fits, value, size = (old == value), ARGV[i + 3], 4 end
      if fits then
        failure = store(field, old, value)
        reply = 1
      else
        failed = failed or {}
        failed[field] = true
      end
    end
    if failure then return failure end
    count = count + 1
    replies[count] = reply
    i = i + size
  end
end
if stream then replies[count + 1] = last end
return replies
"""
)

DIGEST: Final = hashlib.sha1(SOURCE).hexdigest()  # noqa: S324 - the name that Redis gives a script

SOURCES: Final[dict[str, bytes]] = {DIGEST: SOURCE}
"""All scripts by name. `numbered.py` adds its own."""

DONE: Final = 1
SKIPPED: Final = 2


class Shape:
    """Makes the commands of one adapter: has the names of keys, and whether events are published. Without revisions."""

    numbers = False
    """True if each key has a revision."""

    stream: str
    """The key of the stream of events. Fields of an entry: `n` number, `s` scope, `k` key, `o` old and `v` new value if
    any, `d` depth, `t` trace if any, `r` revision, `x` deadline if it has expired, `m` how many more events of its
    transaction follow."""
    counter: str
    """The key that has the number of the newest event."""
    limit: str
    """The key that has the limit of the stream while there are durable triggers: see `LIMITED`."""
    place: str
    """The end of the names of all keys that belong to this stream."""

    def __init__(self, key_prefix: str, *, events_kept: int = 0, clustered: bool = False) -> None:
        """`events_kept`: how many events a stream keeps; 0: none are published. `clustered`: each slot has a stream."""
        self.key_prefix = key_prefix
        self.publishes = bool(events_kept)
        self._kept = str(events_kept)
        self.place = key_prefix
        self._event_keys: tuple[str, ...] = ()
        self.stream, self.counter, self.limit = keys = _event_keys(key_prefix)
        if events_kept:
            self._event_keys = keys
        self.by_slot = [_event_keys(f"{key_prefix}{{{tag}}}") for tag in tags()] if clustered else None
        """In a cluster: the stream of each slot, its counter and its limit."""

    def in_slot(self, slot: int) -> Self:
        """Return the shape for one slot of a cluster."""
        other = copy.copy(self)
        other.place = f"{self.key_prefix}{{{tags()[slot]}}}"
        other.stream, other.counter, other.limit = other._event_keys = _event_keys(other.place)
        other.by_slot = None
        return other

    def event_keys(self, hash_key: bytes) -> tuple[str, ...]:
        """Return the stream of a scope, its counter and its limit; none if no events are published."""
        return self._event_keys if self.by_slot is None else self.by_slot[key_slot(hash_key)]

    def key_of(self, scope: str) -> bytes:
        """Return the key of a scope's hash."""
        return (self.key_prefix + scope).encode()

    def names(self, hash_key: bytes) -> tuple[bytes, ...]:
        """Return the keys of a scope."""
        return (hash_key,)

    def set_entry(self, key: str, data: bytes) -> tuple[Any, ...]:
        """Return the entry that sets a key."""
        return "s", key, data

    def head_of_set(self, names: tuple[bytes, ...], scope: str) -> bytes:
        """Return the `head` of a scope for `numbered.packed_set`; b"" if that cannot be used."""
        del names, scope
        return b""

    def swap_entry(self, key: str, raw: bytes | None, after: bytes) -> tuple[Any, ...]:
        """Return the entry that sets a key if it has the value `raw`; None: if it has no value."""
        return ("n", key, after) if raw is None else ("c", key, raw, after)

    def read(self, names: tuple[bytes, ...], key: str) -> tuple[Any, ...]:
        """Return the parts of the command that reads one key."""
        return "HGET", names[0], key

    def read_all(self, names: tuple[bytes, ...]) -> tuple[Any, ...]:
        """Return the parts of the command that reads all keys."""
        return "HGETALL", names[0]

    def write_one(self, names: tuple[bytes, ...], scope: str, entry: tuple[Any, ...]) -> tuple[Any, ...]:
        """As `write`, for one entry."""
        return self.write(names, scope, entry)

    def write(
        self, names: tuple[bytes, ...], scope: str, entries: Sequence[Any], kept: Sequence[bytes] = ()
    ) -> tuple[Any, ...]:
        """Return the parts of the command that does the entries. `kept`: the keys of kept answers they refer to."""
        if self.publishes:
            keys = (*names, *self.event_keys(names[0]))
            return ("EVALSHA", DIGEST, "4", *keys, self._kept, scope, *entries)
        return ("EVALSHA", DIGEST, "1", *names, *entries)


def _event_keys(place: str) -> tuple[str, str, str]:
    return f"scopestate:events:{place}", f"scopestate:count:{place}", f"scopestate:limit:{place}"


def keys_of(parts: tuple[Any, ...]) -> tuple[bytes | str, ...]:
    """Return the keys of a script's command: that of the hash, and those of the events if they are published."""
    return parts[3 : 3 + int(parts[2])]


def with_source(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the command with the source of its script, for a server that does not have the script yet."""
    return ("EVAL", SOURCES[parts[1]], *parts[2:])


_NOTHING: Final = "nothing was written"

_MEANINGS: Final[dict[str, str]] = {
    "OOM": "Redis at {address} has no memory left for writes{nothing}: raise its maxmemory, or delete something",
    "READONLY": "Redis at {address} is a read-only replica{nothing}: connect to the primary, or set `sentinels`",
    "MISCONF": "Redis at {address} refuses writes because it cannot save its data{nothing}: see its log",
    "NOREPLICAS": "Redis at {address} refuses writes because too few replicas follow it{nothing}",
    "NOPERM": (
        "the user of this connection to Redis at {address} may not do that ({text}){nothing}; beside the keys of "
        "scopes it needs `~scopestate:*` and `+time`, or there are no revisions with `revisions: false`"
    ),
    "NOAUTH": "Redis at {address} asks for a password{nothing}: set `password`",
    "WRONGTYPE": (
        "what Redis at {address} has at {keys} is not what scopestate keeps there{nothing}: delete it, or choose "
        "another key_prefix"
    ),
}


def code_of(refusal: Refusal) -> str:
    """Return the code of a refusal, such as `WRONGTYPE`."""
    word, text = refusal.word, refusal.text
    if word == "ERR":
        # If a command within a script fails, Redis 6 puts the error's code later in the text.
        word = next((known for known in _MEANINGS if f" {known} " in text), word)
        if "ACL failure in script" in text:
            word = "NOPERM"
    return word


def explain(
    refusal: Refusal, address: str, *keys: bytes | str, nothing: str = _NOTHING, waited: bool = True
) -> StorageError:
    """Return the error for a refusal that is final.

    `keys`: the keys of the command, if it has any; the server does not say which of them it means. `nothing`: what has
    not happened, "" for a read. `waited`: the command was retried for `call_timeout_ms`, if waiting could help.
    """
    word, text = code_of(refusal), refusal.text
    names = [repr(key if isinstance(key, str) else key.decode(errors="replace")) for key in keys]
    clause = f"; {nothing}" if nothing else ""
    if word in PASSING:
        within = " within call_timeout_ms" if waited else ""
        problem = f"Redis at {address} was not ready for it{within} ({text}){clause}"
    elif word in _MEANINGS and (names or word != "WRONGTYPE"):
        either = " or ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)
        problem = _MEANINGS[word].format(address=address, keys=either, text=text, nothing=clause)
    else:
        problem = f"Redis at {address} refused it: {text}"
        if names and nothing:
            problem += f"; read {names[0]} before retrying a write"
    error = StorageError(problem)
    error.__cause__ = refusal
    return error
