"""The events that engines share through Redis: reading their stream, and giving them to the handlers of this engine.

Each engine reads every event, for triggers in memory. `consumers.py` has durable triggers, where one engine gets each.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.dispatcher import Dispatcher
from scopestate.actors.handler import HandlerActor
from scopestate.actors.router import EventRouter
from scopestate.errors import NotConnected, StorageError
from scopestate.persistence.connections.attempts import Backoff
from scopestate.persistence.connections.connection import Broken, Target
from scopestate.persistence.redis.connection import Connection, Refusal, pack
from scopestate.persistence.redis.entries import Event, event_of, number_of, place_of, state_event_of
from scopestate.persistence.redis.history import Life, end_epoch, read_life
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.script import Shape, explain
from scopestate.signals import wait_for

if TYPE_CHECKING:
    from scopestate.persistence.redis.backend import RedisBackend

log = logging.getLogger("scopestate.persistence.redis")

BLOCK_S: Final = 2.0
"""How long a reader waits for the server. Then it checks whether the stream is still the one that it knows."""
CUT_FILE: Final = "after a restart of the server with a cut AOF: Valkey 9.1.2 or later, or `aof-load-truncated no`"
"""Another possible cause of lost events, and what to do about it.

Redis 7.0 does not remove all of a transaction that is cut off at the end of its append-only file. The rest becomes part
of the next transaction, and takes effect when the file is loaded again: it counts events that are not in the stream.
"""
_SHOWN_S: Final = 600.0
"""How long `problem` returns a loss."""
_COUNT: Final = 100
"""Entries in one reply, at most."""
_BEGINNING: Final = b"0-0"
_REMEMBERED: Final = 1000
"""Entries that are recognised after a fail-over. A replica is less far behind, or a gap is reported."""


class Arrivals:
    """Gives the events that engines publish in Redis to the router of this one: the outlet of the reader."""

    def __init__(self, adapter: RedisBackend, reader: Reader, router: EventRouter, dispatcher: Dispatcher) -> None:
        self._adapter = adapter
        self._reader = reader
        self._router = router
        self._dispatcher = dispatcher
        self._room: threading.Event | None = None
        self._interrupted = False

    # ------------------------------------------------------------------------------------------- the engine's side

    def catch_up(self, timeout_s: float | None) -> bool:
        """Wait until the events of this engine's own writes are here; False if that took longer than `timeout_s`."""
        adapter, reader = self._adapter, self._reader
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            # In this order: a restart in between is seen below.
            restarts, latest, number = reader.restarts, adapter.latest, adapter.published
            left_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not reader.catch_up(number, restarts, left_s, look=latest < number):
                return False
            if reader.restarts == restarts:
                if adapter.latest == latest:
                    adapter.latest = number  # checked, so not again the next time
                return True
            # Redis was flushed, so the numbers start again: this number now belongs to another event.

    def stop(self) -> None:
        """Stop taking events; those that are here may still be handled. Idempotent."""
        self._reader.stop()

    # ------------------------------------------------------------------------------------------ the reader's thread

    def publish(self, event: Event, *, here: bool) -> tuple[tuple[HandlerActor, ...], HandlerActor | None] | None:
        """Give an event to the router, as `EventRouter.arrive`; wait while a handler is full.

        None if that was interrupted.
        """
        while not self._interrupted:
            try:
                return self._router.arrive(
                    event.scope, event.key, event.old, event.new, event.revision, event.depth, event.expired, here=here
                )
            except HandlerFull as full:
                room = self._room = threading.Event()
                self._router.backlog.when_room(room.set, full)
                # Checked after the assignment: an interruption either sees `room`, or is seen here.
                if not self._interrupted:
                    room.wait()
                self._router.backlog.stop_waiting(room.set)
        return None

    def feed(self, entry_id: bytes, fields: list[bytes], event: Event) -> None:
        """Give an event to the watches of this engine."""
        base = self._reader.life.base
        self._router.feed.arrive(event.scope, base + event.number, lambda: state_event_of(entry_id, fields, base))

    def begin_anew(self, life: Life, number: int, why: str) -> None:
        """The events go on behind this number, and those before are not complete: watches end with the reason."""
        self._router.feed.begin_anew(self._adapter.store_of(life), life.epoch, life.base + number, why)

    def note_arrivals(self) -> None:
        """The stream has new entries: durable triggers may have something to do."""
        consumers = self._adapter.durable
        if consumers is not None:
            consumers.note_arrivals()

    def interrupt(self) -> None:
        """Stop `publish` from waiting."""
        self._interrupted = True
        room = self._room
        if room is not None:
            room.set()


class Reader:
    """Reads the stream on its own connection: `open`, `start`, `stop`, in this order.

    Its position is kept in this process only. The numbers of the events show whether it has read all of them: each is
    one more than the one before, since the script counts and publishes in one step.

    Two threads alternate. One reads; if an event is for one idle handler, it runs that handler itself and lets the
    other thread read. Waking a worker thread for it would take longer than the round trip. While a handler keeps one of
    the two busy, events that the other one reads go to worker threads.
    """

    def __init__(
        self,
        target: Target[Connection],
        options: RedisOptions,
        shape: Shape,
        published: Callable[[], int],
        note_restart: Callable[[int], object],
    ) -> None:
        """`published` returns the newest number that this engine has published.

        `note_restart` is called with the newest number in Redis when the numbers have gone back.
        """
        self._target = target
        self._shape = shape
        self._patience_s = BLOCK_S + options.call_timeout_s
        self._join_s = options.connect_timeout_s + 1.0
        self._connection: Connection | None = None
        self._outlet: Arrivals
        self._baton = threading.Lock()
        """Held by the thread that reads."""
        self._is_away = False
        """True while one of the two runs a handler."""
        self._is_proven = True
        """False until this connection has returned something: if it breaks before, the next attempt waits."""
        self._started = False
        self._ended = threading.Event()
        self._stopped = threading.Event()
        self._backoff = Backoff()
        self._why_not: str | None = None
        self._loss: tuple[float, str] | None = None
        self._noting = threading.Lock()
        self.missed = 0
        """Events that this engine has missed, as far as their number is known."""
        self.restarts = 0
        """How often the numbers of events have gone back."""
        self.life = Life("", 0, 0)
        """Which database this reads; known once it is open."""
        self._published = published
        self._note_restart = note_restart
        self._id = _BEGINNING
        self._number = 0
        self._opened: tuple[bytes, int] = (_BEGINNING, 0)
        """Id and number of the newest entry when reading began. It and earlier ones are never published here."""
        self._recent: deque[tuple[bytes, int]] = deque(maxlen=_REMEMBERED)
        self._waiting: list[tuple[int, threading.Event]] = []
        self._wanted = self._looked = 0
        """Number of requested checks of the stream, and of those made which found that it is still the same."""

    # ------------------------------------------------------------------------------------------- the engine's side

    def open(self) -> None:
        """Connect, and note where reading begins: everything written from now on is read.

        Raises NotConnected, and StorageError if the server refuses it.
        """
        connection = self._target.dial()
        try:
            self._begin(connection)
        except Refusal as refusal:
            connection.close()
            raise explain(refusal, self._target.address, self._shape.stream.encode()) from refusal
        except Broken as error:
            raise StorageError(f"the connection to Redis at {self._target.address} was lost: {error}") from error
        connection.wait_at_most(self._patience_s)
        self._connection = connection

    def start(self, outlet: Arrivals) -> None:
        """Start reading."""
        self._outlet = outlet
        self._started = True
        for _ in range(2):
            threading.Thread(target=self._run, name="scopestate-redis-events", daemon=True).start()

    def stop(self) -> None:
        """Stop reading: nothing is published after this has returned. Idempotent."""
        self._stopped.set()
        connection = self._connection
        if self._started:
            self._outlet.interrupt()
            if connection is not None:
                connection.shut()
            # Not for both threads: one may be running a handler, which may take any time.
            self._ended.wait(self._join_s)
        if connection is not None:
            connection.close()
        self._tell_all()

    @property
    def number(self) -> int:
        """The number of the last event that was given to the handlers and watches of this engine."""
        return self._number

    def catch_up(self, number: int, restarts: int, timeout_s: float | None, *, look: bool) -> bool:
        """Wait until the event of this number, which this engine has published, was taken from the stream, and given to
        the handlers if it was taken here. False if that took longer than `timeout_s`.

        True as well if the numbers have started again more than `restarts` times, and after `stop`. `look`: they may
        have done so unnoticed, so this must be checked.
        """
        there = threading.Event()
        entry = (number, there)
        wanted = 0
        if look:
            self._wanted += 1
            wanted = self._wanted
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self._waiting.append(entry)
        try:
            # Checked after the append: what arrives after the check sets the flag.
            while not self._has(number, restarts, wanted):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                wait_for(there.wait, None if left_s == math.inf else left_s)
                there.clear()
            return True
        finally:
            self._waiting.remove(entry)

    def problem(self) -> str | None:
        """Return the current problem as text, or a recent loss."""
        if self._why_not is not None:
            return f"events of other engines do not arrive: {self._why_not}"
        if self._loss is not None:
            when, what = self._loss
            ago_s = time.monotonic() - when
            if ago_s < _SHOWN_S:
                return f"{what} ({ago_s:.0f} s ago; {self.missed} events missed since the engine was opened)"
        return None

    def note_loss(self, count: int, what: str) -> None:
        """Report that `count` events did not arrive; 0 if the number is unknown. From any thread."""
        # Logged first, so that the reason is in the log when the count is seen.
        log.error("%s", what)
        with self._noting:
            self._loss = (time.monotonic(), what)
            self.missed += count

    def _has(self, number: int, restarts: int, wanted: int) -> bool:
        is_there = self._number >= number and self._looked >= wanted
        return is_there or self.restarts != restarts or self._stopped.is_set()

    def _tell_all(self) -> None:
        for _, there in list(self._waiting):
            there.set()

    # ------------------------------------------------------------------------------------------ the reader's thread

    def _run(self) -> None:
        while True:
            with self._baton:
                handler = self._read()
                if handler is None:
                    self._ended.set()
                    return
                self._is_away = True
            try:
                handler.run_batch()
            except Exception:
                log.exception("a turn failed outside its actor")
            self._is_away = False

    def _read(self) -> HandlerActor | None:
        """Read until there is a handler to run on this thread. None at the end."""
        # No exception may leave this loop, or reading would stop.
        while not self._stopped.is_set():
            try:
                connection = self._connected()
                if connection is not None:
                    handler = self._take(connection)
                    self._backoff.reset()
                    self._is_proven = True
                    if handler is not None:
                        return handler
            except Broken as error:
                self._lose(f"lost the connection to Redis at {self._target.address}: {error}")
                if not self._is_proven:
                    self._pause()
            except Refusal as refusal:
                self._lose(str(explain(refusal, self._target.address, self._shape.stream.encode())))
                self._pause()
            except Exception as error:
                log.exception("reading the events of Redis at %s failed", self._target.address)
                self._lose(f"reading the events of Redis at {self._target.address} failed: {error!r}")
                self._pause()
        connection = self._connection
        if connection is not None:
            connection.close()
        return None

    def _connected(self) -> Connection | None:
        connection = self._connection
        if connection is not None:
            return connection
        try:
            connection = self._target.dial()
        except NotConnected as error:
            if self._why_not is None:
                log.warning("%s; events of other engines wait for it, and it is tried again", error)
            self._why_not = str(error)
            self._pause()
            return None
        # In this order: a `stop` in between either closes this connection, or is seen here.
        self._connection = connection
        if self._stopped.is_set():
            return None
        connection.wait_at_most(self._patience_s)
        if self._why_not is not None:
            log.warning("reading events of Redis at %s again", connection.address)
        self._why_not = None
        self._is_proven = False
        self._look(connection)
        return connection

    def _lose(self, why: str) -> None:
        if not self._stopped.is_set():
            self._why_not = why
            log.warning("%s; it is tried again", why)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _pause(self) -> None:
        self._stopped.wait(self._backoff.next_pause_s())

    def _begin(self, connection: Connection) -> None:
        stream = self._shape.stream
        # Counted first: what is added between the two commands is in the second reply.
        self._number = self._counted(connection)
        for entry_id, fields in connection.call("XREVRANGE", stream, "+", "-", "COUNT", 1):
            self._id = entry_id
            number = number_of(fields)
            if number is not None:
                self._number = number
        self._opened = (self._id, self._number)
        self.life = read_life(connection, self._shape)

    def _take(self, connection: Connection) -> HandlerActor | None:
        if self._looked < self._wanted:
            self._look(connection)
        if connection.is_stale():
            # An answer that came twice would be taken for the next one, and its events published again.
            raise Broken("the server has closed it, or answered what it was not asked")
        reply = connection.exchange(
            pack(("XREAD", "COUNT", _COUNT, "BLOCK", int(BLOCK_S * 1000), "STREAMS", self._shape.stream, self._id))
        )
        if reply is None:
            self._look(connection)
            return None
        if type(reply) is Refusal:
            raise reply
        publish, entries = self._outlet.publish, reply[0][1]
        self._outlet.note_arrivals()
        here = len(entries) == 1 and not self._is_away
        handler: HandlerActor | None = None
        for entry_id, fields in entries:
            try:
                event = event_of(fields)
            except (ValueError, IndexError) as error:
                log.error("entry %r of stream %r is no event: %s", entry_id, self._shape.stream, error)  # noqa: TRY400
                self._id = entry_id
                continue
            number = event.number
            if number != self._number + 1:
                self._mend(connection, number)
            self._outlet.feed(entry_id, fields, event)
            published = publish(event, here=here)
            if published is None:
                break
            handler = published[1]
            self._id, self._number = entry_id, number
            self._recent.append((entry_id, number))
            if self._waiting:
                self._tell()
        return handler

    def _tell(self) -> None:
        for number, there in list(self._waiting):
            if number <= self._number:
                there.set()

    # -------------------------------------------------------------------------------------------------------- losses

    def _mend(self, connection: Connection, number: int) -> None:
        """Report what is missing: the next event does not have the next number."""
        expected = self._number + 1
        where = f"the stream {self._shape.stream!r} of Redis at {self._target.address}"
        if number > expected:
            count = number - expected
            self.note_loss(
                count,
                f"{count} events ({expected} to {number - 1}) were trimmed from {where}, or it was deleted, before "
                "this engine had read them: its triggers have not seen them; raise events_kept, or make the handlers "
                f"faster; {CUT_FILE}",
            )
            self._outlet.begin_anew(self.life, number - 1, "trimmed")
        elif number > self._oldest_known():
            self._restart(connection, number - 1, f"{where} lost its end")
        else:
            self._restart(connection, number - 1, f"{where} has begun anew", missed=number - 1)
            self._opened = (_BEGINNING, 0)

    def _oldest_known(self) -> int:
        """Return the number of the oldest event that is still remembered."""
        recent = self._recent
        return recent[0][1] if len(recent) == _REMEMBERED else max(self._opened[1], 1)

    def _look(self, connection: Connection) -> None:
        """Check whether the last entry that was read is still there; if not, find where to continue."""
        stream, wanted = self._shape.stream, self._wanted
        published = self._published()  # before the counter, which is then at least as high
        counted = self._counted(connection)
        before = connection.call("XREVRANGE", stream, self._id, "-", "COUNT", 1)
        where = f"the stream {stream!r} of Redis at {self._target.address}"
        if not before and counted < self._number:
            self._begin_again(connection, where)
            return
        # No entry up to it: it was trimmed, which the next number shows, or it is another stream.
        if not before or (before[0][0] == self._id and number_of(before[0][1]) in (self._number, None)):
            if published > counted:
                self._note_unread(published, counted, where)
            if before or counted == self._number:
                self._looked = wanted
                self._tell_all()
            return
        # A fail-over: the new primary lacks entries that were read here, and may have used their ids again.
        known = dict(self._recent)
        while before:
            for entry_id, fields in before:
                number = number_of(fields)
                if place_of(entry_id) <= place_of(self._opened[0]):
                    # All that was read is lost, and perhaps more. Entries from before reading began are not read.
                    number = self._opened[1] if number is None else min(number, self._opened[1])
                    self._opened = (entry_id, number)
                elif number is None or known.get(entry_id) != number:
                    continue
                self._restart(connection, number, f"{where} lost its end")
                self._id = entry_id
                return
            before = connection.call("XREVRANGE", stream, b"(" + before[-1][0], "-", "COUNT", _COUNT)
        self._begin_again(connection, where)

    def _begin_again(self, connection: Connection, where: str) -> None:
        """Continue with the first event of another stream than the one that was read."""
        self._restart(connection, 0, f"{where} has begun anew")
        self._id = _BEGINNING
        self._opened = (_BEGINNING, 0)

    def _restart(self, connection: Connection, number: int, what: str, *, missed: int = 0) -> None:
        """Continue after the event with this number, which is before those that were read."""
        # First: if the connection breaks here, nothing has changed yet.
        counted = self._counted(connection)
        before, life = self.life, end_epoch(connection, self._shape, self.life, number)
        last, self._number, self.life = self._number, number, life
        self._outlet.begin_anew(life, number, "lost in a crash" if life.name == before.name else "other store")
        self._begin_anew(counted)
        self.note_loss(
            missed,
            f"{what} after event {last} (it was flushed, or a fail-over lost what was newest): this engine goes on "
            f"with event {number + 1}; what was published in between may be missing; {CUT_FILE}",
        )

    def _note_unread(self, published: int, counted: int, where: str) -> None:
        """Report that events are gone which this engine has published and not read yet."""
        self._begin_anew(counted)
        self.note_loss(
            published - counted,
            f"{where} lost its end (a restart or a fail-over lost what was newest): the events {counted + 1} to "
            f"{published}, as they were, went to no trigger of this engine; {CUT_FILE}",
        )

    def _begin_anew(self, counted: int) -> None:
        self._note_restart(counted)
        self.restarts += 1
        self._tell_all()

    def _counted(self, connection: Connection) -> int:
        return int(connection.call("GET", self._shape.counter) or 0)
