"""Which consumers there are in a cluster. What they have handled is in each slot; this is in one (0080).

A consumer is made in every slot that is in use, one after the other, and its events may not be handled before that is
done: its state says so, and any engine can complete what another one has begun.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from scopestate.errors import StorageError
from scopestate.persistence.redis.cluster_lines import Lines
from scopestate.persistence.redis.consuming import absent_key
from scopestate.persistence.redis.script import SOURCES, Shape

SLOT: Final = 0
"""The slot of the registry."""

# KEYS: the registry; and a key that never exists (see `consuming.SOURCE`). ARGV: the operation, then what it needs.
#
#   it           hash: name -> state, a space, and which life of the consumer this is. `joining`: it is being made;
#                `ready`; `forgetting`: it is being removed
#   it:paused    hash: name -> why it is paused
#   it:engines   sorted set: engine, a space, name -> until when that engine counts as alive (ms)
#   it:changes   how often an engine has changed something that the others must look at
SOURCE: Final = b"""
local call, it, operation = redis.call, KEYS[1], ARGV[1]
local paused, engines, changes = it .. ':paused', it .. ':engines', it .. ':changes'
local parts_of_time = call('TIME')
local now = parts_of_time[1] * 1000 + math.floor(parts_of_time[2] / 1000)
local run = {}

-- engine, wait (ms), names: the engine takes events of these. Replies the number of changes; then for each consumer its
-- name, its record, why it is paused ('': it is not), and how many engines take its events.
function run.look()
  local me, wait = ARGV[2], ARGV[3]
  for i = 4, #ARGV do
    if call('HEXISTS', it, ARGV[i]) == 1 then call('ZADD', engines, now + wait, me .. ' ' .. ARGV[i]) end
  end
  call('ZREMRANGEBYSCORE', engines, '-inf', now)
  local counts = {}
  for _, member in ipairs(call('ZRANGE', engines, 0, -1)) do
    local name = string.match(member, '^[^ ]* (.*)$')
    counts[name] = (counts[name] or 0) + 1
  end
  local replies = {call('GET', changes) or '0'}
  local rows = call('HGETALL', it)
  for i = 1, #rows, 2 do
    replies[#replies + 1] = {rows[i], rows[i + 1], call('HGET', paused, rows[i]) or '', counts[rows[i]] or 0}
  end
  return replies
end

-- name, life: begin to make it, if there is none. Replies its record.
function run.join()
  call('HSETNX', it, ARGV[2], 'joining ' .. ARGV[3])
  return call('HGET', it, ARGV[2])
end

-- name, life: it is made. Replies 0 if that life has ended in between.
function run.ready()
  local record = call('HGET', it, ARGV[2])
  if record ~= 'joining ' .. ARGV[3] then return record == 'ready ' .. ARGV[3] and 1 or 0 end
  call('HSET', it, ARGV[2], 'ready ' .. ARGV[3])
  return 1
end

-- name, life: slots have it, and it is not here: it was lost.
function run.adopt() return call('HSETNX', it, ARGV[2], 'ready ' .. ARGV[3]) end

-- name, reason: pause it; '': resume it. Replies 0 if there is none.
function run.pause()
  if call('HEXISTS', it, ARGV[2]) == 0 then return 0 end
  if ARGV[3] ~= '' then call('HSET', paused, ARGV[2], ARGV[3]) else call('HDEL', paused, ARGV[2]) end
  call('INCR', changes)
  return 1
end

-- name: begin to remove it. Replies 0 if there is none.
function run.forgetting()
  local record = call('HGET', it, ARGV[2])
  if not record then return 0 end
  call('HSET', it, ARGV[2], 'forgetting ' .. string.match(record, ' (.*)$'))
  return 1
end

-- name: it is removed from every slot.
function run.forgotten()
  if string.match(call('HGET', it, ARGV[2]) or '', '^forgetting ') then
    call('HDEL', it, ARGV[2])
    call('HDEL', paused, ARGV[2])
    call('INCR', changes)
  end
  return 1
end

function run.changed() return call('INCR', changes) end

-- engine, names: it takes events of these no more.
function run.leave()
  for i = 3, #ARGV do call('ZREM', engines, ARGV[2] .. ' ' .. ARGV[i]) end
  return 1
end

return run[operation]()
"""
_REGISTER: Final = hashlib.sha1(SOURCE).hexdigest()  # noqa: S324 - the name that Redis gives a script
SOURCES[_REGISTER] = SOURCE


class Record(NamedTuple):
    """What the registry has of one consumer."""

    state: str
    """`joining`, `ready` or `forgetting`."""
    life: str
    """No other consumer of this name, before or after, has it."""
    paused: str = ""
    """Why it is paused; "": it is not."""
    engines: int = 0
    """How many engines take its events."""


class Registry:
    """The consumers of a cluster. Its methods wait for a server, and raise StorageError."""

    def __init__(self, shape: Shape, lines: Lines, engine: str, patience_s: float) -> None:
        """`patience_s`: how long to try again while the slot of the registry moves."""
        key = f"scopestate:registry:{shape.in_slot(SLOT).place}"
        self._keys = (key, absent_key(key))
        self._lines = lines
        self._engine = engine
        self._patience_s = patience_s

    def look(self, wait_ms: int, names: Iterable[str]) -> tuple[int, dict[str, Record]]:
        """Say that this engine takes events of these consumers, for `wait_ms`.

        Return how often something was changed, and all consumers.
        """
        changes, *rows = self._ask("look", self._engine, wait_ms, *names, wait_s=0.0)
        found: dict[str, Record] = {}
        for name, record, paused, engines in rows:
            found[name.decode()] = _record_of(record)._replace(paused=paused.decode(), engines=engines)
        return int(changes), found

    def join(self, name: str) -> Record:
        """Begin to make a consumer, if there is none. Return what there is."""
        return _record_of(self._ask("join", name, time.time_ns()))

    def ready(self, name: str, life: str) -> bool:
        """Record that a consumer is made; False if it was forgotten in between."""
        return bool(self._ask("ready", name, life))

    def adopt(self, name: str) -> bool:
        """Record a consumer that only slots have; False if it is here already."""
        return bool(self._ask("adopt", name, time.time_ns()))

    def pause(self, name: str, why: str) -> bool:
        """Pause it; with "", resume it. False if there is none."""
        return bool(self._ask("pause", name, why))

    def forgetting(self, name: str) -> bool:
        """Begin to remove it; False if there is none."""
        return bool(self._ask("forgetting", name))

    def forgotten(self, name: str) -> None:
        """Record that it is removed from every slot."""
        self._ask("forgotten", name)

    def changed(self) -> None:
        """Have every engine look whether there is something to handle."""
        self._ask("changed")

    def leave(self, names: Sequence[str]) -> None:
        """This engine takes events of these consumers no more."""
        self._ask("leave", self._engine, *names)

    def _ask(self, operation: str, *arguments: Any, wait_s: float | None = None) -> Any:
        command = ("EVALSHA", _REGISTER, "2", *self._keys, operation, *arguments)
        wait_s = self._patience_s if wait_s is None else wait_s
        (reply,) = self._lines.ask_many([(SLOT, command)], wait_s=wait_s)
        if isinstance(reply, StorageError):
            raise reply
        return reply


def _record_of(text: bytes) -> Record:
    state, life = text.decode().split(" ", 1)
    return Record(state, life)
