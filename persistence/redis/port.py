"""One durable trigger in Redis, as an engine sees it: a port of the runtime (docs/design/0050-redis-journal.md).

What each engine holds is kept in Redis, by the script in `consuming.py`. This module has its operations, and tells the
runtime when Redis says that an event no longer belongs to this engine.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from scopestate.actors.consuming import ConsumerStatus, Held, Outcome
from scopestate.actors.pace import Pace
from scopestate.errors import NotConnected, StorageError
from scopestate.ops.results import StateEvent
from scopestate.ops.triggers import Trigger
from scopestate.persistence.connections.connection import NOT_ALL, Broken, Target
from scopestate.persistence.redis.connection import Connection, Refusal, pack
from scopestate.persistence.redis.consuming import Begin, Names
from scopestate.persistence.redis.damage import explain_refusal, number_in
from scopestate.persistence.redis.entries import state_event_of
from scopestate.persistence.redis.history import store_key
from scopestate.persistence.redis.keeping import KeptPort
from scopestate.persistence.redis.script import Shape, with_source

log = logging.getLogger("scopestate.persistence.redis")

NOTES_AT_ONCE: Final = 16
"""Attempts that are recorded by one command: the one that begins, and those that will begin next, if known."""
LONGEST_BEAT_S: Final = 1.0
"""How long a change of another engine (a pause, a replay) may go unnoticed here."""
_MOST_OUTCOMES: Final = 1000
"""The most outcomes in one command."""
REFUSED_S: Final = 1.0
"""Pause after an operation that Redis has refused."""
_MARKS: Final = 1 << 60
_REASONS: Final = {"dead": "its list of dead letters is full (max_dead): replay or purge them, then resume it"}
"""The reason of a pause as it is kept in Redis -> its description."""


class Place:
    """Where the consumers of one engine are: the keys, the server, and which database its numbers belong to."""

    def __init__(
        self, shape: Shape, target: Target[Connection], engine: str, patience_s: float, published: Callable[[], int]
    ) -> None:
        """`engine`: a name of this engine that no other one has. `patience_s`: how long to wait for an answer.
        `published` returns the number of the newest event that this engine has published.
        """
        self.shape = shape
        self.target = target
        self.engine = engine
        self.patience_s = patience_s
        self.published = published

    def names(self, consumer: str) -> Names:
        """Return the keys and commands of a consumer."""
        return Names(self.shape, consumer, self.engine)

    @property
    def address(self) -> str:
        """The address of the server, for messages."""
        return self.target.address

    def event_of(self, entry_id: bytes, fields: list[bytes], base: int) -> StateEvent | None:
        """Return a stream entry as an event, with its position; None if it is not one."""
        return state_event_of(entry_id, fields, base)

    def line(self) -> Line:
        """Return a connection for operations on consumers, which is made with the first one."""
        return Line(self)


class Line:
    """A connection for operations that may be repeated: one that was lost with its connection is sent again, once."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._connection: Connection | None = None
        self.breaks = 0
        """How often an answer was lost: the operation may have been done."""

    def ask(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Send the commands and return their replies. Raises StorageError. One thread at a time."""
        try:
            return self._exchange(commands)
        except Broken:
            self.breaks += 1
        try:
            return self._exchange(commands)
        except Broken as error:
            self.breaks += 1
            raise StorageError(f"the connection to Redis at {self._place.address} was lost: {error}") from error

    def close(self) -> None:
        """Close the connection. Another thread that waits in it gets an error."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _exchange(self, commands: tuple[tuple[Any, ...], ...]) -> list[Any]:
        connection, self._connection = self._connection, None
        try:
            if connection is None:
                connection = self._place.target.dial()
                connection.wait_at_most(self._place.patience_s)
            replies = _replies(connection, commands)
            for i, command in enumerate(commands):
                if type(replies[i]) is Refusal and replies[i].word == "NOSCRIPT":
                    replies[i] = connection.exchange(pack(with_source(command)))
        except NotConnected as error:
            raise StorageError(str(error)) from error
        except Broken:
            if connection is not None:
                connection.close()
            raise
        for command, reply in zip(commands, replies, strict=True):
            if type(reply) is Refusal:
                try:
                    raise explain_refusal(reply, command, self._place.address, partial(_replies, connection))
                finally:
                    connection.close()
        self._connection = connection
        return replies


def _replies(connection: Connection, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Send commands and return their replies, which may be Refusals. Raises Broken."""
    connection.send(b"".join([pack(command) for command in commands]))
    replies: list[Any] = []
    while len(replies) < len(commands):
        reply = connection.next_reply()
        if reply is NOT_ALL:
            connection.receive()
        else:
            replies.append(reply)
    return replies


class RedisPort(KeptPort):
    """One consumer, as this engine sees it."""

    notes_at_once = NOTES_AT_ONCE
    next_beat = next_wake = 0.0
    problem: str | None = None
    trouble: str | None = None
    lost = 0

    def __init__(
        self,
        name: str,
        place: Place,
        trigger: Trigger,
        limit: str,
        ring: Callable[[], object],
        nudge: Callable[[], object],
        enlist: Callable[[RedisPort], object],
    ) -> None:
        """`limit`: see `script.LIMITED`.

        `ring` makes the keeper check now, `nudge` in a few milliseconds; `enlist` makes it take care of this consumer
        too.
        """
        self.name = name
        self._place = place
        self._names = place.names(name)
        self._limit = limit
        self._ring = ring
        self._nudge = nudge
        self._enlist = enlist
        self._trigger = trigger
        self._wake: Callable[[], object] = _nothing
        self._lost: Callable[[Sequence[int]], object] = _nothing
        self._line = place.line()
        self._exclusive = threading.Lock()
        """Held for one operation. Only worker threads and the keeper's get here."""
        self._base = 0
        """The position before that of the first event."""
        self._number = self._lives = 0
        """The last number that the consumer has read, and how often the numbers have begun again."""
        self._breaks = 0
        self._held: dict[int, bytes] = {}
        """Position -> member, of the events that this engine holds."""
        self._running: dict[int, None] = {}
        """The positions of attempts that have begun and not ended."""
        self._next: dict[int, int] = {}
        """Position -> attempts, of those that have not begun for the first time, in order."""
        self._noted: dict[int, None] = {}
        """Positions of those that have not begun, and whose attempt is recorded."""
        self._waiting: dict[int, None] = {}
        """Positions of those that wait for their next attempt."""
        self._outcomes: list[tuple[int, tuple[Any, ...]]] = []
        self._pace = Pace()
        self._pause = ""
        self._refused_s = -math.inf
        """When Redis refused an operation. On the monotonic clock."""
        self._is_full = self._has_failed = False
        """True: the last call of `fetch` found no room; an operation has failed, and the runtime may wait for it."""

    # ---------------------------------------------------------------------------------------------- for the runtime

    def join(self, begin: Begin) -> None:
        """Make the consumer if there is none. Raises StorageError."""
        trigger = self._trigger
        store, made = self._ask(*self._joining(begin, trigger))[-2:]
        self._base = self._base_in(store)
        if made == 2:
            self._report_loss("its group was gone")

    def _joining(self, begin: Begin, trigger: Trigger) -> tuple[tuple[Any, ...], ...]:
        key = store_key(self._place.shape)
        return (
            ("HSETNX", key, "base", time.time_ns() // 1000),
            ("HGET", key, "base"),
            self._names.join(begin, self._limit, trigger.max_dead),
        )

    def start(
        self,
        trigger: Trigger,
        wake: Callable[[], object],
        lost: Callable[[Sequence[int]], object],
        running: Callable[[], Mapping[int, int]],
    ) -> None:
        del running  # each is recorded when it begins
        self._trigger, self._wake, self._lost = trigger, wake, lost
        self.stopping = self.is_over = False
        self._enlist(self)
        wake()

    def stop(self) -> None:
        self.stopping = True
        self._wake = _nothing
        self._ring()

    def fetch(self, most: int) -> list[Held]:
        with self._exclusive:
            self._send_outcomes()  # they make room
            for _ in range(10):
                most = min(most, self._room())
                self._is_full = most <= 0
                if self.stopping or most <= 0:
                    return []
                found, more = self._fetch(most)
                if found or not more:
                    break
            return found

    def began(self, attempts: Sequence[tuple[int, int]]) -> None:
        gone: list[int] = []
        with self._exclusive:
            noted: list[tuple[bytes, int]] = []
            for position, attempt in attempts:
                self._waiting.pop(position, None)
                self._next.pop(position, None)
                member = self._held.get(position)
                if member is None:
                    gone.append(position)
                    continue
                self._running[position] = None
                if position not in self._noted:
                    noted.append((member, attempt))
                self._noted.pop(position, None)
            if noted:
                gone += self._note(noted)
        if gone:
            self._lost(gone)

    def ended(self, outcomes: Sequence[Outcome]) -> None:
        # No lock: a handler's thread must not wait for the server here.
        entered: list[tuple[int, tuple[Any, ...]]] = []
        for one in outcomes:
            position, member = one.position, self._held.get(one.position)
            self._running.pop(position, None)
            if member is not None:
                if one.verdict == "retry":
                    self._waiting[position] = None
                entered.append((position, _said(member, one)))
        self._outcomes += entered
        self._pace.ended += len(entered)
        self._nudge()

    def flush(self) -> None:
        with self._exclusive:
            self._send_outcomes()

    def transaction(self, position: int, scope: str) -> Any:
        member = self._held.get(position)
        if member is None:
            raise StorageError(f"delivery {self.name}:{position} is no longer this engine's: it took too long")
        return self._names.acknowledging(member)

    def is_acknowledged(self, position: int) -> bool:
        member = self._held.get(position)
        if member is None:
            return True
        try:
            with self._exclusive:
                (score,) = self._ask(self._names.holds(member))
        except StorageError:
            return False  # the next attempt finds out: it then cannot be recorded
        return score is None

    def mark(self) -> int:
        return self._lives * _MARKS + self._place.published()

    def reached(self, mark: int) -> bool:
        lives, number = divmod(mark, _MARKS)
        return lives != self._lives or number <= self._number

    def status(self) -> ConsumerStatus:
        with self._exclusive:
            (reply,) = self._ask(self._names.status())
        status = status_of(self.name, reply)
        if status is None:
            raise StorageError(f"consumer {self.name!r} is not in Redis: it was forgotten, or flushed")
        return status

    def pause(self, why: str) -> None:
        with self._exclusive:
            self._ask(self._names.pause(why))
            self._pause = why

    def paused(self) -> str | None:
        return reason_of(self._pause)

    # ----------------------------------------------------------------------------------------------- for the keeper

    @property
    def beat_s(self) -> float:
        """The seconds between renewals of its hold: it is renewed four times before it would end."""
        return min(self._trigger.ack_wait / 4, LONGEST_BEAT_S)

    @property
    def has_outcomes(self) -> bool:
        return bool(self._outcomes)

    @property
    def has_failed(self) -> bool:
        return self._has_failed

    def wake(self) -> None:
        self.next_wake = 0.0  # before it: what follows may set it again
        self._wake()

    def keep(self) -> None:
        with self._exclusive:
            self._send_outcomes(always=True)
            self.next_beat = time.monotonic() + self.beat_s
            if self.stopping:
                self._give_back()
            # An operation of another kind may be refused again at once, although this one was not.
            is_early = time.monotonic() - self._refused_s < REFUSED_S
            may_go_on = (self._has_failed and not is_early) or (self._is_full and self._room() > 0)
            self._has_failed = self._has_failed and is_early
        if may_go_on:
            self._wake()

    def clear_problem(self) -> None:
        self.problem = None

    def leave(self) -> None:
        with self._exclusive:
            self._send_outcomes()
            self._unnote()
            self._ask(self._names.leave())
            self._drop_all()
            self.is_over = True
        self._line.close()

    def close(self) -> None:
        """Close the connection."""
        self.is_over = True
        self._line.close()

    # ------------------------------------------------------------------------------------------------ under the lock

    def _ask(self, *commands: tuple[Any, ...]) -> list[Any]:
        try:
            return self._line.ask(*commands)
        except StorageError as error:
            if type(error.__cause__) is Refusal:
                self._refused_s = time.monotonic()
                self.trouble = str(error)
            self._has_failed = True
            self._ring()
            raise

    @property
    def _wait_ms(self) -> int:
        return max(int(self._trigger.ack_wait * 1000), 1)

    def _room(self) -> int:
        """Return how many more events this engine may hold. Those of lanes that wait for an attempt do not count."""
        late = {lane_of(self._held[position]) for position in list(self._waiting) if position in self._held}
        held = len(self._held)
        if late:
            held = sum(lane_of(member) not in late for member in list(self._held.values()))
        room = self._pace.room(self._trigger, held, held)
        if room <= 0 and held > 1:
            # Counted only now, because it takes long: many of them may be in few lanes.
            lanes = {lane_of(member) for member in list(self._held.values())} - late
            room = self._pace.room(self._trigger, held, len(lanes))
        return room

    def _note(self, noted: list[tuple[bytes, int]]) -> list[int]:
        """Record attempts, together with those that will begin soon. Return the positions of those that are gone."""
        # Alone, if the handler is slow. And an event whose attempt began and never ended may have crashed an engine.
        is_quick = self._pace.ahead() >= NOTES_AT_ONCE
        others = NOTES_AT_ONCE - 1 if is_quick and all(attempt == 1 for _, attempt in noted) else 0
        for position, attempts in itertools.islice(list(self._next.items()), others):
            member = self._held.get(position)
            if member is not None and not attempts and position not in self._noted:
                noted.append((member, 1))
                self._noted[position] = None
        outcomes = self._outcomes[:_MOST_OUTCOMES]
        names, said = self._names, [said for _, said in outcomes]
        *ended, reply = self._ask(
            *([names.ended(self._wait_ms, said)] if said else []), names.began(self._wait_ms, noted)
        )
        gone = self._sent(outcomes, ended[0]) if ended else []
        return gone + (self._begin_anew() if reply == b"gone" else self._drop(reply))

    def _fetch(self, most: int) -> tuple[list[Held], bool]:
        names, trigger = self._names, self._trigger
        found: list[Held] = []
        if self._line.breaks != self._breaks:
            breaks = self._line.breaks
            (rows,) = self._ask(names.again(list(self._held.values())))
            self._breaks = breaks
            found = self._taken(rows)
        try:
            (reply,) = self._ask(names.fetch(self._wait_ms, most, trigger.order, trigger))
        except StorageError:
            self._breaks = -1  # a script that has failed may have given it events
            raise
        if self._line.breaks != self._breaks:
            return found, True  # the reply to the first attempt was lost, together with its events
        if reply == b"gone":
            self._lost(self._begin_anew())
            return [], True
        self.trouble = None
        is_new, pause, lost, wait_ms, more, number = reply[:6]
        self._number = int(number)
        if is_new:
            if self._held:
                self._lost(self._drop_all())
                found = []
            self._look_at_base()
        if lost:
            self._report_loss(f"{lost} events were trimmed from the stream, or it was deleted", lost)
        self.note_pause(pause.decode())
        self.next_wake = 0.0 if wait_ms == b"" else time.monotonic() + int(wait_ms) / 1000
        if wait_ms != b"":
            self._ring()
        found += self._taken(reply[6:])
        return found, bool(more)

    def _taken(self, rows: Sequence[Any]) -> list[Held]:
        found: list[Held] = []
        for member, entry_id, fields, attempts, first, due, error in rows:
            event = self._place.event_of(entry_id, fields, self._base) if fields else None
            if event is None:
                log.error("entry %r of stream %r is not an event", entry_id, self._place.shape.stream)
                self._outcomes.append((0, ("d", member)))
                continue
            self._held[event.position] = member
            self._next[event.position] = int(attempts)
            found.append(
                Held(event, int(attempts), int(first), int(due), error.decode(errors="replace") if error else None)
            )
        return found

    def _send_outcomes(self, *, always: bool = False) -> None:
        while self._outcomes or always:
            always = False
            sent = self._outcomes[:_MOST_OUTCOMES]
            (reply,) = self._ask(self._names.ended(self._wait_ms, [said for _, said in sent]))
            gone = self._sent(sent, reply)
            if gone:
                self._lost(gone)

    def _sent(self, sent: list[tuple[int, tuple[Any, ...]]], reply: Any) -> list[int]:
        """Record that these outcomes were sent. Return the positions that this engine no longer holds."""
        del self._outcomes[: len(sent)]
        gone: list[int] = []
        for position, said in sent:
            if said[0] != "r":
                self._held.pop(position, None)
            if said[0] == "b":
                gone.append(position)  # its lane is held back in Redis
        if reply == b"gone":
            return self._begin_anew()
        lost, back, is_new, pause = reply
        # Nothing more is to be reported about ended ones; one to be retried is over, or another engine has it.
        retries = {said[1] for _, said in sent if said[0] == "r"}
        gone += self._drop([*back, *[member for member in lost if member in retries]])
        if is_new and self._held:
            gone += self._drop_all()
        self.note_pause(pause.decode())
        return gone

    def _give_back(self) -> None:
        """Give back events that have not begun, of lanes in which nothing is running here."""
        busy = {lane_of(self._held[position]) for position in list(self._running) if position in self._held}
        free = [member for member in list(self._held.values()) if lane_of(member) not in busy]
        if free:
            self._unnote()
            (reply,) = self._ask(self._names.ended(self._wait_ms, [("p", member) for member in free]))
            if reply != b"gone":
                self._drop(free)
        if not self._held:
            self._ask(self._names.leave())
            self.is_over = True
            self._line.close()

    def _drop(self, members: Sequence[bytes]) -> list[int]:
        """Forget these events; return their positions."""
        gone = set(members)
        positions = [position for position, member in list(self._held.items()) if member in gone] if gone else []
        for position in positions:
            for known in (self._held, self._running, self._next, self._noted, self._waiting):
                known.pop(position, None)
        return positions

    def _drop_all(self) -> list[int]:
        positions = list(self._held)
        for known in (self._held, self._running, self._next, self._noted, self._waiting):
            known.clear()
        return positions

    def _unnote(self) -> None:
        """Remove the records of attempts that have not begun."""
        noted = [self._held[position] for position in list(self._noted) if position in self._held]
        if noted:
            self._ask(self._names.ended(self._wait_ms, [("r", member, 0, 0, 0, "") for member in noted]))
            self._noted.clear()

    def _begin_anew(self) -> list[int]:
        """Make the consumer again, because it is gone.

        Return the positions of what this engine held. If another engine has forgotten it, it begins with the events
        from now on; if Redis was flushed, with all that exist.
        """
        positions = self._drop_all()
        self._outcomes.clear()
        self._lives += 1
        (base,) = self._ask(("HGET", store_key(self._place.shape), "base"))
        if base is not None and self._base_in(base) == self._base and self._was_forgotten():
            log.warning(
                "consumer %r was forgotten by another engine, and starts again because its trigger is here", self.name
            )
            self._ask(*self._joining(Begin("now"), self._trigger))
            return positions
        self._report_loss("it was gone because Redis was flushed")
        _, base, _ = self._ask(*self._joining(Begin("earliest"), self._trigger))
        self._base = self._base_in(base)
        return positions

    def _was_forgotten(self) -> bool:
        """Return whether an engine has forgotten the consumer, which is gone from a database that was not flushed."""
        return True

    def _look_at_base(self) -> None:
        """This engine counts as new: Redis may have been flushed, and another engine have made the consumer again."""
        (base,) = self._ask(("HGET", store_key(self._place.shape), "base"))
        if base is not None and self._base_in(base) != self._base:
            self._base = self._base_in(base)
            self._lives += 1
            self._report_loss("it was gone because Redis was flushed")

    def _base_in(self, reply: Any) -> int:
        return number_in(reply, store_key(self._place.shape), self._place.address)

    def _report_loss(self, what: str, count: int = 0) -> None:
        self.lost += count
        self.problem = f"consumer {self.name!r} of Redis at {self._place.address}: {what}"
        log.error("%s: the events in between did not reach it", self.problem)

    def note_pause(self, why: str) -> None:
        before, self._pause = self._pause, why
        if before and not why:
            self._wake()


def status_of(name: str, reply: Any) -> ConsumerStatus | None:
    """Return the status of a consumer from the script's reply; None if there is no such consumer."""
    if reply == b"gone":
        return None
    number, counter, pause, _, held, parked, dead, _, oldest, now, _ = reply
    waiting = int(held) + int(parked)
    lag = max(int(counter) - int(number), 0) + waiting
    lag_s = (int(now) - int(oldest)) / 1000 if int(oldest) and lag else 0.0
    return ConsumerStatus(name, lag, max(lag_s, 0.0), 0, 0, int(dead), reason_of(pause.decode()))


def reason_of(pause: str) -> str | None:
    """Return why a consumer is paused; None if it is not."""
    return _REASONS.get(pause, pause) or None


def _said(member: bytes, one: Outcome) -> tuple[Any, ...]:
    """Return an outcome in the form that the script takes."""
    if one.verdict == "done":
        return "d", member
    if one.verdict == "retry":
        return "r", member, one.attempts, one.first_ms, one.due_ms, one.error
    details = msgspec.json.encode([one.error, one.traceback])
    letter = b"%d %d %d %b" % (time.time_ns() // 1_000_000, one.attempts, one.first_ms, details)
    return ("x" if one.verdict == "dead" else "b"), member, letter


def lane_of(member: bytes) -> bytes:
    """Return the lane of an event that an engine holds."""
    return member.rpartition(b"\n")[0]


def _nothing(*_: Any) -> None:
    """Do nothing: there is no runtime."""
