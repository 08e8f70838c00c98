"""Events for one engine of a group: each goes to one engine, and to another one if that dies before it is handled."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple

from scopestate.actors.handler import HandlerActor
from scopestate.errors import NotConnected, StorageError
from scopestate.inbox import Empty, Inbox
from scopestate.persistence.redis.connection import NOT_ALL, Broken, Connection, Refusal, Target, pack
from scopestate.persistence.redis.events import (
    BLOCK_S,
    CUT_FILE,
    Arrivals,
    Event,
    Reader,
    event_of,
    number_of,
    place_of,
)
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.script import Shape
from scopestate.signals import join

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
_SETTLED_S: Final = 2.0
"""How long after a batch the end of the one before it is checked: its engine may not have noted it yet."""
_ENDS_KEPT: Final = 10_000
_PAUSE_S: Final = 0.5
"""Pause between attempts to connect."""
_ASK_S: Final = 0.2
"""The longest wait for an answer before checking whether the engine stops."""
_DEAD_BEATS: Final = 40
"""A consumer that holds nothing and has been idle for this many beats is removed."""

# KEYS: the stream, its counter, the ends (see `Group`). ARGV: the group, and where it begins.
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

# KEYS: the stream. ARGV: the group, the least idle time in ms, and the only name to check, or ''.
_REMOVE_IDLE: Final = b"""
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #row, 2 do consumer[row[i]] = row[i + 1] end
  if consumer.pending == 0 and consumer.idle >= tonumber(ARGV[2]) and (ARGV[3] == '' or ARGV[3] == consumer.name) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
  end
end
"""


class Group(NamedTuple):
    """Names of the consumer group and of this engine in it."""

    stream: str
    name: str
    me: str
    """The consumer: another one for each engine."""
    ends: str
    """A sorted set of the last numbers of batches. A batch that does not begin after one of them follows a gap."""


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

    def start(self, outlet: Arrivals) -> None:
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

    def _take(self, connection: Connection) -> HandlerActor | None:
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

    def _pass_on(self, entries: list[Any], *, check: bool, are_new: bool = False) -> HandlerActor | None:
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
        handler: HandlerActor | None = None
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


class _Job(NamedTuple):
    """A command, and a function for its reply."""

    command: tuple[Any, ...]
    then: Callable[[Any], object]


class _Question(NamedTuple):
    """Commands, with a caller that waits for their replies."""

    commands: list[tuple[Any, ...]]
    replies: list[Any]
    answered: threading.Event


class Keeper:
    """Acknowledges entries, keeps the hold on others, and checks for gaps, on its own connection and thread.

    The reader's connection cannot do it, as it waits for new entries while handlers end. Methods from any thread.
    """

    def __init__(
        self,
        target: Target,
        group: Group,
        claim_after_s: float,
        beat_s: float,
        note_loss: Callable[[int, str], object],
    ) -> None:
        """`beat_s`: how often the hold on entries is renewed."""
        self._target = target
        self._group = group
        self._idle_ms = int(claim_after_s * 1000 / 4 * _DEAD_BEATS)
        self._beat_s = beat_s
        self._note_loss = note_loss
        self.held: dict[bytes, None] = {}
        """Ids of the entries that this engine has taken and not acknowledged."""
        self._room = threading.Event()
        self._queue: Inbox[Callable[[], object] | None] = Inbox()
        self._done: list[bytes] = []
        self._ends: list[int] = []
        self._checks: list[tuple[float, int]] = []
        self._questions: list[_Question] = []
        self._dropped: set[bytes] = set()
        """Held entries that the server no longer counts as taken by this engine. Their hold is not renewed."""
        self._oldest: tuple[bytes, list[bytes]] | None = None
        """The oldest entry of the stream; None if it is empty. Read before every check and beat."""
        self._next_beat = 0.0
        self._connection: Connection | None = None
        self._thread: threading.Thread | None = None
        self._ending = False
        self._why_not: str | None = None

    # ----------------------------------------------------------------------------------------------- for the reader

    def start(self) -> None:
        """Start. Called once."""
        self._next_beat = time.monotonic() + self._beat_s
        self._thread = threading.Thread(target=self._run, name="scopestate-redis-keeper", daemon=True)
        self._thread.start()

    def hold(self, ids: list[bytes]) -> None:
        """Note taken entries; their hold is renewed from now on."""
        self.held.update(dict.fromkeys(ids))
        self._dropped.difference_update(ids)

    def has_room(self, most: int, stopped: threading.Event) -> bool:
        """Wait a moment until fewer than `most` entries are held; False if they are not."""
        while len(self.held) >= most and not stopped.is_set():
            self._room.clear()
            # Checked again: one may have left before the flag was cleared. The limit lets the reader see its end.
            if len(self.held) >= most and not self._room.wait(0.2):
                return False
        return not stopped.is_set()

    def note(self, last: int, *, first: int | None = None) -> None:
        """Note the last number of a batch. `first`: its first number, if there may be a gap before it."""

        def enter() -> None:
            self._ends.append(last)
            if first is not None:
                self._checks.append((time.monotonic() + _SETTLED_S, first))

        self._queue.put(enter)

    def forget(self) -> None:
        """Forget what is known of the group, which was created again: it holds nothing."""

        def enter() -> None:
            self._ends.clear()
            self._checks.clear()

        self._dropped.update(list(self.held))
        self._queue.put(enter)

    def acknowledge(self, ids: list[bytes]) -> None:
        """Acknowledge these entries."""
        self._queue.put(lambda: self._done.extend(ids))

    def ask(self, commands: list[tuple[Any, ...]], deadline: float, stopped: threading.Event) -> list[Any]:
        """Return the replies to commands that change nothing; they may be Refusals.

        Empty without a connection, if the engine stops, and at the deadline, in seconds of the monotonic clock.
        """
        question = _Question(commands, [], threading.Event())
        self._queue.put(lambda: self._questions.append(question))
        while (left_s := deadline - time.monotonic()) > 0 and not stopped.is_set():
            # The limit lets it see the end of the engine, after which there is no answer.
            if question.answered.wait(min(left_s, _ASK_S)):
                return question.replies
        return []

    def problem(self) -> str | None:
        """Return why handled events cannot be acknowledged now; None if they can."""
        return None if self._why_not is None else f"handled events cannot be acknowledged: {self._why_not}"

    def end(self) -> None:
        """Acknowledge what is handled by now, if there is a connection, and stop. Idempotent."""
        self._queue.put(None)
        if self._thread is not None:
            join(self._thread)

    # ------------------------------------------------------------------------------------------ the keeper's thread

    def _run(self) -> None:
        while not self._ending:
            self._collect()
            try:
                self._work()
                self._why_not = None
            except (Broken, NotConnected, Refusal) as error:
                if self._why_not is None:
                    log.warning("%s; handled events are acknowledged later", error)
                self._why_not = str(error)
                if self._connection is not None:
                    self._connection.close()
                    self._connection = None
            except Exception:
                log.exception("acknowledging the events of Redis at %s failed", self._target.address)
        if self._connection is not None:
            self._connection.close()

    def _collect(self) -> None:
        """Wait for something to do, or until something is due."""
        if self._why_not is not None:
            wait_s = _PAUSE_S
        else:
            due = min([self._next_beat, *(due for due, _ in self._checks[:1])])
            wait_s = max(due - time.monotonic(), 0.0)
        try:
            note = self._queue.get_within(wait_s)
            while True:
                if note is None:
                    self._ending = True
                else:
                    note()
                note = self._queue.get_nowait()
        except Empty:
            return

    def _work(self) -> None:
        questions, self._questions = self._questions, []
        jobs = self._jobs()
        commands = [command for question in questions for command in question.commands]
        if not jobs and not commands:
            return
        try:
            replies = iter(self._exchange([*commands, *(job.command for job in jobs)]))
            for question in questions:
                question.replies.extend(islice(replies, len(question.commands)))
        finally:
            for question in questions:
                question.answered.set()
        for job, reply in zip(jobs, replies, strict=True):
            if type(reply) is not Refusal:
                job.then(reply)
            elif not _is_gone(reply):
                # Later jobs are done again: a check for gaps needs the ends before it.
                raise reply

    def _jobs(self) -> list[_Job]:
        """Return what is due now."""
        group, now = self._group, time.monotonic()
        jobs: list[_Job] = []
        if done := self._done[:1000]:
            jobs.append(_Job(("XACK", group.stream, group.name, *done), lambda _: self._acknowledged(done)))
        if ends := self._ends[:1000]:
            pairs = [number for end in ends for number in (end, end)]
            jobs.append(_Job(("ZADD", group.ends, *pairs), lambda _: self._drop_ends(len(ends))))
            jobs.append(_Job(("ZREMRANGEBYRANK", group.ends, 0, -_ENDS_KEPT - 1), _ignore))
        checks = [first for due, first in self._checks if due <= now or self._ending]
        is_beat = now >= self._next_beat
        if checks or is_beat:
            jobs.append(_Job(("XRANGE", group.stream, "-", "+", "COUNT", 1), self._note_oldest))
        for first in checks:
            command = ("ZREVRANGEBYSCORE", group.ends, first - 1, "-inf", "LIMIT", 0, 1)
            jobs.append(_Job(command, partial(self._check, first)))
        if is_beat:
            jobs += self._beat()
        if self._ending:
            jobs.append(_Job(("EVAL", _REMOVE_IDLE, 1, group.stream, group.name, 0, group.me), _ignore))
        return jobs

    def _acknowledged(self, done: list[bytes]) -> None:
        del self._done[: len(done)]
        for entry_id in done:
            self.held.pop(entry_id, None)
        self._dropped.difference_update(done)
        self._room.set()

    def _drop_ends(self, count: int) -> None:
        del self._ends[:count]

    def _beat(self) -> list[_Job]:
        """Renew the hold on entries, and remove consumers that have been idle for long."""
        self._next_beat = time.monotonic() + self._beat_s
        group, handled = self._group, {*self._done, *self._dropped}
        jobs: list[_Job] = []
        if held := [entry_id for entry_id in list(self.held) if entry_id not in handled]:
            command = ("XCLAIM", group.stream, group.name, group.me, 0, *held, "JUSTID")
            jobs.append(_Job(command, partial(self._note_dropped, held)))
        jobs.append(_Job(("EVAL", _REMOVE_IDLE, 1, group.stream, group.name, self._idle_ms, ""), _ignore))
        return jobs

    def _note_oldest(self, entries: list[Any]) -> None:
        self._oldest = entries[0] if entries else None

    def _note_dropped(self, held: list[bytes], claimed: list[bytes]) -> None:
        """Report entries that the server no longer lists as held by this engine because they were trimmed."""
        dropped = set(held).difference(claimed)
        self._dropped |= dropped
        # Entries still in the stream were acknowledged by another engine, which had taken them over.
        oldest = None if self._oldest is None else place_of(self._oldest[0])
        trimmed = [entry_id for entry_id in dropped if oldest is None or place_of(entry_id) < oldest]
        if trimmed:
            self._note_loss(
                0,
                f"{len(trimmed)} events were trimmed from the stream {self._group.stream!r} of Redis at "
                f"{self._target.address}, or it was deleted, while this engine was still handling them: they are lost "
                "if it dies first; raise events_kept",
            )

    def _check(self, first: int, found: list[bytes]) -> None:
        """Report a gap before the batch that began with `first`: numbers before it that no batch and no entry has."""
        del self._checks[0]
        if not found or self._oldest is None:
            return
        # Entries in the stream were taken by an engine that died or was disconnected before it could note the end.
        oldest = number_of(self._oldest[1])
        before = (first if oldest is None else min(first, oldest)) - 1
        count = before - int(found[0])
        if count > 0:
            self._note_loss(
                count,
                f"{count} events ({int(found[0]) + 1} to {before}) were trimmed from the stream "
                f"{self._group.stream!r} of Redis at {self._target.address}, or it was deleted, before any engine of "
                f"the group {self._group.name!r} had taken them: no trigger has seen them; raise events_kept; "
                f"{CUT_FILE}",
            )

    def _exchange(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        """Send the commands together and return the replies. Raises NotConnected and Broken."""
        connection = self._connection
        if connection is None:
            connection = self._connection = self._target.dial()
        connection.send(b"".join(pack(command) for command in commands))
        replies: list[Any] = []
        while len(replies) < len(commands):
            reply = connection.next_reply()
            if reply is NOT_ALL:
                connection.receive()
            else:
                replies.append(reply)
        return replies


def _is_gone(refusal: Refusal) -> bool:
    """Tell whether the group is gone. The reader creates it again; until then there is nothing to acknowledge."""
    return "NOGROUP" in refusal.text or "no such key" in refusal.text


def _ignore(reply: object) -> None:
    """Ignore a reply."""
