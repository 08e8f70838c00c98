"""Events for one engine of a group: each goes to one engine, and to another one if that dies before it is handled."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import time
from typing import Any, Final

from scopestate.errors import StorageError
from scopestate.persistence.redis.connection import Connection, Refusal, Target
from scopestate.persistence.redis.keeper import Group, Keeper
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.reading import BLOCK_S, CUT_FILE, Event, Handler, Outlet, Reader, event_of, place_of
from scopestate.persistence.redis.script import Shape

log = logging.getLogger("scopestate.persistence.redis")

_COUNT: Final = 32
"""Entries taken at a time, and acknowledged together."""
_MOST_HELD: Final = 64
"""Entries that an engine holds, approximately. With more, other engines would be idle while this one is behind."""
_NO_TRIGGERS_S: Final = 0.05
"""Pause of an engine without a trigger, which takes no events from the others."""
_FAR_AWAY_MS: Final = 10**12
_LOOK_AGAIN_S: Final = 0.01
"""Pause between checks of how far the group is, while a caller waits for that."""
_BEGINNING: Final = b"0-0"

# KEYS: the stream, its counter, the ends (see `keeper.Group`). ARGV: the group, and where it begins.
_CREATE: Final = b"""
local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], ARGV[2], 'MKSTREAM')
if made.err then return made end
local before = redis.call('GET', KEYS[2]) or 0
if ARGV[2] == '0' then
  -- The oldest entry of scopestate: other programs may have added theirs.
  for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 100)) do
    local number = entry[2][1] == 'n' and tonumber(entry[2][2])
    if number then
      before = number - 1
      break
    end
  end
end
redis.call('DEL', KEYS[3])
redis.call('ZADD', KEYS[3], before, before)
return made
"""


class GroupReader(Reader):
    """Reads as a consumer of the group. An entry is acknowledged when every handler that got it has handled it.

    So an event is handled at least once: if an engine dies after the handler's end and before the acknowledgement, the
    event is handled again. Source: Redis, "Introduction to Redis Streams", consumer groups.
    """

    def __init__(self, target: Target, options: RedisOptions, shape: Shape) -> None:
        super().__init__(target, options, shape)
        self._group = Group(
            shape.stream,
            options.group,
            f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}",
            f"scopestate:ends:{shape.key_prefix}:{options.group}",
        )
        self._claim_after_s = options.claim_after_s
        # Four times within the time limit: one late beat must not lose an event to another engine.
        beat_s = options.claim_after_s / 4
        self._keeper = Keeper(target, self._group, options.claim_after_s, beat_s, self.note_loss)
        self._claim_every_s = min(beat_s, BLOCK_S)
        self._next_claim = 0.0
        self._passed_on = _BEGINNING
        """Id of the newest entry that was given to handlers here."""
        self._taken = 0
        """Number of the newest event that came here as a new one: the events before it have been taken too."""

    def start(self, outlet: Outlet) -> None:
        self._keeper.start()
        super().start(outlet)

    def catch_up(self, number: int, restarts: int, timeout_s: float | None, *, look: bool) -> bool:
        """Wait until engines of the group have taken everything that is in the stream now: see `Reader.catch_up`.

        True at once if there is no trigger here: this engine takes no events, and there may be no other one.
        """
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        group, newest = self._group, None
        while self._started and not self._stopped.is_set() and self._outlet.has_triggers():
            if time.monotonic() >= deadline:
                return False
            replies = self._keeper.ask(
                [
                    ("XREVRANGE", group.stream, "+", "-", "COUNT", 1),
                    ("XINFO", "GROUPS", group.stream),
                    # What this engine was given and has not published yet: the reply may not have arrived.
                    ("XPENDING", group.stream, group.name, b"(" + self._passed_on, "+", 1, group.me),
                ],
                deadline,
                self._stopped,
            )
            if replies:
                last, groups, pending = replies
                if type(last) is list:
                    now = place_of(last[0][0] if last else _BEGINNING)
                    # It goes back if the stream was flushed: earlier entries need not be waited for.
                    newest = now if newest is None else min(newest, now)
                    if not last or self._has_taken(newest, groups, pending):
                        return True
            elif number <= self._taken:
                # There is no answer now, and when there was one, nothing was missing.
                return True
            self._stopped.wait(_LOOK_AGAIN_S)
        return True

    def _has_taken(self, newest: tuple[int, int], groups: Any, pending: Any) -> bool:
        """Tell whether entries up to `newest` were given to engines, and this one has published its own."""
        if type(groups) is Refusal or type(pending) is Refusal:
            return False  # the group is gone, and will be created again
        if pending and place_of(pending[0][0]) <= newest:
            return False
        told = [dict(zip(row[::2], row[1::2], strict=True)) for row in groups]
        given = [one[b"last-delivered-id"] for one in told if one[b"name"] == self._group.name.encode()]
        return bool(given) and place_of(given[0]) >= newest

    def problem(self) -> str | None:
        return super().problem() or self._keeper.problem()

    def end(self) -> None:
        """Acknowledge what is handled by now, and no more. Other engines of the group will take over the rest."""
        super().end()
        self._keeper.end()

    # ------------------------------------------------------------------------------------------ the reader's thread

    def _begin(self, connection: Connection) -> None:
        self._create(connection, b"$")
        group = self._group
        try:
            connection.call("XAUTOCLAIM", group.stream, group.name, group.me, _FAR_AWAY_MS, "0", "COUNT", 1, "JUSTID")
        except Refusal as refusal:
            if "unknown command" not in refusal.text:
                raise
            connection.close()
            raise StorageError(
                f"`delivery: one` needs XAUTOCLAIM, which Redis at {self._target.address} does not have: use Redis 6.2 "
                "or later, or Valkey"
            ) from refusal

    def _create(self, connection: Connection, begin: bytes) -> bool:
        """Create the group. Returns False if it exists."""
        group = self._group
        try:
            connection.call("EVAL", _CREATE, 3, group.stream, self._shape.counter, group.ends, group.name, begin)
        except Refusal as refusal:
            if "BUSYGROUP" not in refusal.text:
                raise
            return False
        return True

    def _resume(self, connection: Connection) -> None:
        """Publish what was being received when the connection broke."""
        self._take_own(connection, check=True)

    def _take_own(self, connection: Connection, *, check: bool) -> None:
        """Publish what this engine was given and has not received. `check`: there may be a gap before it."""
        cursor: Any = "0"
        while not self._stopped.is_set():
            group = self._group
            # Read before the call: what is acknowledged before the reply arrives must not seem new.
            held = set(self._keeper.held)
            reply = connection.call(
                "XREADGROUP", "GROUP", group.name, group.me, "COUNT", _COUNT, "STREAMS", group.stream, cursor
            )
            entries = reply[0][1] if reply else []
            if not entries:
                return
            cursor = entries[-1][0]
            self._pass_on([entry for entry in entries if entry[0] not in held], check=check)

    def _take(self, connection: Connection) -> Handler | None:
        if not self._outlet.has_triggers():
            self._stopped.wait(_NO_TRIGGERS_S)
            return None
        if not self._keeper.has_room(_MOST_HELD, self._stopped):
            return None
        if time.monotonic() >= self._next_claim:
            self._claim(connection)
        wait_ms = max(int((self._next_claim - time.monotonic()) * 1000), 1)
        group = self._group
        reply = connection.call(
            "XREADGROUP", "GROUP", group.name, group.me, "COUNT", _COUNT, "BLOCK", wait_ms, "STREAMS", group.stream, ">"
        )
        return None if reply is None else self._pass_on(reply[0][1], check=True, are_new=True)

    def _claim(self, connection: Connection) -> None:
        """Take over the entries of engines that do not respond."""
        group, cursor = self._group, _BEGINNING
        while not self._stopped.is_set():
            held = set(self._keeper.held)  # before the call, as above
            reply = connection.call(
                "XAUTOCLAIM", group.stream, group.name, group.me, int(self._claim_after_s * 1000), cursor,
                "COUNT", _COUNT,
            )  # fmt: skip
            cursor, entries = reply[0], reply[1]
            # Those that this engine itself holds are among them.
            trimmed = [entry_id for entry_id in (reply[2] if len(reply) > 2 else ()) if entry_id not in held]
            if trimmed:
                self._report_trimmed(len(trimmed))
            if None in entries:
                # Redis 6.2 does not say which were trimmed. The list of what this engine has now shows it.
                self._take_own(connection, check=False)
            elif claimed := [entry for entry in entries if entry[0] not in held]:
                log.warning("took over %d events of engines that showed no life", len(claimed))
                self._pass_on(claimed, check=False)
            if cursor == _BEGINNING:
                break
            if not self._keeper.has_room(_MOST_HELD, self._stopped):
                return  # the next call takes the rest
        self._next_claim = time.monotonic() + self._claim_every_s

    def _pass_on(self, entries: list[Any], *, check: bool, are_new: bool = False) -> Handler | None:
        """Publish entries, and acknowledge them when they are handled. With `are_new`, returns what `_take` does.

        `check`: no engine had them before, so there may be a gap before them.
        """
        ids: list[bytes] = []
        gone: list[bytes] = []
        handlers: dict[Any, None] = {}
        first = last = 0
        keeper = self._keeper
        keeper.hold([entry[0] for entry in entries])
        here = are_new and len(entries) == 1 and not self._is_away
        handler: Handler | None = None
        interrupted = False
        for entry_id, fields in entries:
            event = self._event_of(entry_id, fields)
            if event is None:
                gone.append(entry_id)
                continue
            first, last = first or event.number, event.number
            published = None if interrupted else self._outlet.publish(event, here=here)
            if published is None:
                interrupted = True
                continue
            concerned, handler = published
            handlers.update(dict.fromkeys(concerned))
            ids.append(entry_id)
        if entries and not interrupted:
            self._passed_on = max(self._passed_on, entries[-1][0], key=place_of)
            self._taken = last if are_new and last else self._taken
        if last:
            keeper.note(last, first=first if check else None)
        if ids:
            self._outlet.when_handled(handlers, lambda: keeper.acknowledge(ids))
        if gone:
            keeper.acknowledge(gone)
        return handler

    def _event_of(self, entry_id: bytes, fields: list[bytes] | None) -> Event | None:
        if fields is None:
            self._report_trimmed(1)
            return None
        try:
            return event_of(fields)
        except (ValueError, IndexError) as error:
            log.error("entry %r of stream %r is no event: %s", entry_id, self._group.stream, error)  # noqa: TRY400
            return None

    def _report_trimmed(self, count: int) -> None:
        self.note_loss(
            count,
            f"{count} events were trimmed from the stream {self._group.stream!r} of Redis at {self._target.address} "
            "before the engine that had taken them was done: they may not have been handled, or are being handled; "
            "raise events_kept",
        )

    def _is_mended(self, connection: Connection, refusal: Refusal) -> bool:
        """Create the group again if it was flushed."""
        if refusal.word not in ("NOGROUP", "UNBLOCKED"):
            return False
        made = self._create(connection, b"0")
        self._keeper.forget()
        self._passed_on, self._taken = _BEGINNING, 0
        if made:
            self.note_loss(
                0,
                f"the group {self._group.name!r} of the stream {self._group.stream!r} of Redis at "
                f"{self._target.address} was gone (flushed, or not in the copy of a fail-over) and is made anew from "
                f"what the stream has: events from before may be missing, or handled again; {CUT_FILE}",
            )
        return True
