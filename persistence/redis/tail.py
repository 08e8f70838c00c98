"""How far one stream of events has been read, and what happens if it is no longer the stream that was read."""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from scopestate.persistence.redis.connection import Connection
from scopestate.persistence.redis.entries import event_of, number_of, place_of
from scopestate.persistence.redis.history import Life, end_epoch, read_life
from scopestate.persistence.redis.script import Shape
from scopestate.signals import wait_for

if TYPE_CHECKING:
    from scopestate.actors.handler import HandlerActor
    from scopestate.persistence.redis.events import Arrivals

log = logging.getLogger("scopestate.persistence.redis")

CUT_FILE: Final = "after a restart of the server with a cut AOF: Valkey 9.1.2 or later, or `aof-load-truncated no`"
"""Another possible cause of lost events, and what to do about it.

Redis 7.0 does not remove all of a transaction that is cut off at the end of its append-only file. The rest becomes part
of the next transaction, and takes effect when the file is loaded again: it counts events that are not in the stream.
"""
COUNT: Final = 100
"""The most entries in one reply."""
BEGINNING: Final = b"0-0"
_REMEMBERED: Final = 1000
"""Entries that are recognised after a fail-over. A replica is less far behind, or a gap is reported."""
_LEAST_REMEMBERED: Final = 10


class Published:
    """The numbers of the events of one stream that this engine has published."""

    def __init__(self) -> None:
        self.newest = 0
        self.latest = 0
        """If it is lower than `newest`, answers came out of order, or numbers have restarted."""
        self.restarts = 0
        """How often the numbers are known to have gone back."""
        self.lost: tuple[int, int] | None = None
        """Numbers of the first and the last event that the server has lost, as far as answers to writes show it."""
        self.look_soon: Callable[[], object] = lambda: None
        """Called when `lost` has been set."""

    def note(self, number: int) -> None:
        """Note the number of an event that this engine has published."""
        # A number that was there before belongs to another event now, if the numbers have restarted.
        self.latest = number if number > self.newest else number - 1
        self.newest = max(self.newest, number)

    def go_back(self, number: int) -> None:
        """Note a number as `note` does, if it was used before: a server that lacks the newest events has taken over.

        Later writes soon have higher numbers than the lost events, so the counter alone would not show the loss.
        """
        if self.lost is None:
            self.lost = number, self.newest
        self.newest = self.latest = number
        self.restarts += 1
        self.look_soon()

    def restart(self, number: int) -> None:
        """Note that the numbers of events have gone back, and that this was reported: earlier ones no longer count."""
        self.newest = self.latest = number
        self.restarts += 1
        self.lost = None


class Tail(ABC):
    """The position of this engine in one stream. It is kept in this process only.

    The numbers of the events show whether all of them were read: each is one more than the one before, since the script
    counts and publishes in one step. One thread at a time reads; `catch_up` may be called from any.
    """

    def __init__(self, shape: Shape, published: Published) -> None:
        self.published = published
        published.look_soon = self._look_soon
        self.restarts = 0
        """How often the numbers of events have gone back."""
        self.life = Life("", 0, 0)
        """Which database this reads; known once `_begin` has read it."""
        self._shape = shape
        self._id = BEGINNING
        self._number = 0
        self._opened: tuple[bytes, int] = (BEGINNING, 0)
        """Id and number of the newest entry when reading began. It and earlier ones are never published here."""
        self._recent: deque[tuple[bytes, int]] = deque(maxlen=_REMEMBERED)
        self._forgets = False
        """True if older entries were dropped from that."""
        self._number_then = 0
        """The number at the last call of `_forget_old`."""
        self._waiting: list[tuple[int, threading.Event]] = []
        self._wanted = self._looked = 0
        """Number of requested checks of the stream, and of those made which found that it is still the same."""

    # ------------------------------------------------------------------------------------- what the reader provides

    @property
    @abstractmethod
    def _server(self) -> str:
        """The address of the server, for messages."""

    @property
    @abstractmethod
    def _is_over(self) -> bool:
        """True once nothing is read any more."""

    @property
    @abstractmethod
    def _outlet(self) -> Arrivals:
        """The object that gets the events."""

    @abstractmethod
    def note_loss(self, count: int, what: str) -> None:
        """Report that `count` events did not arrive; 0 if the number is unknown. From any thread."""

    @abstractmethod
    def _look_soon(self) -> None:
        """Make the reading thread call `_look` soon."""

    @abstractmethod
    def _begin_feed_anew(self, life: Life, number: int, why: str) -> None:
        """Continue after this number; earlier events are not complete, so watches end with the reason."""

    # ------------------------------------------------------------------------------------------- the engine's side

    @property
    def number(self) -> int:
        """The number of the last event that was given to the handlers and watches of this engine."""
        return self._number

    def catch_up(self, number: int, restarts: int, timeout_s: float | None, *, look: bool) -> bool:
        """Wait until an event published by this engine was read, and passed to the handlers if it was read here.

        False if that took longer than `timeout_s`. True as well if the numbers have started again more than `restarts`
        times, and at the end. `look`: they may have done so unnoticed, so this must be checked.
        """
        there = threading.Event()
        entry = (number, there)
        wanted = 0
        if look:
            self._wanted += 1
            wanted = self._wanted
            self._look_soon()
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

    def catch_up_own(self, timeout_s: float | None) -> bool:
        """As `catch_up`, for the newest event that this engine has published."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        published = self.published
        while True:
            # In this order: a restart in between is seen below.
            restarts, latest, number = self.restarts, published.latest, published.newest
            look = latest < number or published.lost is not None
            left_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not self.catch_up(number, restarts, left_s, look=look):
                return False
            if self.restarts == restarts:
                if published.latest == latest:
                    published.latest = number  # checked, so not again the next time
                return True
            # Redis was flushed, so the numbers start again: this number now belongs to another event.

    def _has(self, number: int, restarts: int, wanted: int) -> bool:
        is_there = self._number >= number and self._looked >= wanted
        return is_there or self.restarts != restarts or self._is_over

    def _tell_all(self) -> None:
        for _, there in list(self._waiting):
            there.set()

    def _tell(self) -> None:
        for number, there in list(self._waiting):
            if number <= self._number:
                there.set()

    # ------------------------------------------------------------------------------------------ the reader's thread

    def _begin(self, connection: Connection) -> None:
        """Begin after the newest entry."""
        # Counted first: what is added between the two commands is in the second reply.
        counted = self._counted(connection)
        self._begin_behind(counted, connection.call("XREVRANGE", self._shape.stream, "+", "-", "COUNT", 1))
        self.life = read_life(connection, self._shape)

    def _begin_behind(self, counted: int, newest: Sequence[Any]) -> None:
        self._number = counted
        for entry_id, fields in newest:
            self._id = entry_id
            number = number_of(fields)
            if number is not None:
                self._number = number
        self._opened = (self._id, self._number)

    def _take_in(
        self, connection: Connection, entries: Sequence[tuple[bytes, list[bytes]]], *, here: bool
    ) -> tuple[HandlerActor | None, bool]:
        """Give the events of these entries to the outlet.

        Return a handler that the caller must run, if there is one, and whether all of the entries were taken in: not if
        the engine is closing. `here`: see `EventRouter.arrive`.
        """
        outlet = self._outlet
        if self._pass_over(outlet, entries):
            return None, True
        publish = outlet.publish
        handler: HandlerActor | None = None
        for entry_id, fields in entries:
            try:
                event = event_of(fields)
            except (ValueError, IndexError) as error:
                log.error("entry %r of stream %r is not an event: %s", entry_id, self._shape.stream, error)  # noqa: TRY400
                self._id = entry_id
                continue
            number = event.number
            if number != self._number + 1:
                self._mend(connection, number)
            outlet.feed(self, entry_id, fields, event)
            published = publish(event, here=here)
            if published is None:
                return handler, False
            handler = published[1]
            self._id, self._number = entry_id, number
            self._recent.append((entry_id, number))
            if self._waiting:
                self._tell()
        return handler, True

    def _pass_over(self, outlet: Arrivals, entries: Sequence[tuple[bytes, list[bytes]]]) -> bool:
        """Skip these entries, if none of them is missing and nothing in this engine wants any of their events.

        So an engine that only writes does not spend most of its time on its own events.
        """
        if not outlet.is_idle:
            return False
        number = self._number
        places: list[tuple[bytes, int]] = []
        scopes: set[bytes] = set()
        for entry_id, fields in entries:
            number += 1
            if fields[:6:2] != [b"n", b"s", b"k"] or fields[1] != b"%d" % number:
                return False
            scopes.add(fields[3])
            places.append((entry_id, number))
        try:
            names = [scope.decode() for scope in scopes]
        except ValueError:
            return False  # another program wrote it: this is reported
        if not outlet.pass_over(self, names, len(entries)):
            return False
        self._id, self._number = entries[-1][0], number
        self._recent.extend(places)
        if self._waiting:
            self._tell()
        return True

    # -------------------------------------------------------------------------------------------------------- losses

    def _mend(self, connection: Connection, number: int) -> None:
        """Report missing events: the event after the last one does not have the next number."""
        expected = self._number + 1
        where = f"the stream {self._shape.stream!r} of Redis at {self._server}"
        if number > expected:
            count = number - expected
            self.note_loss(
                count,
                f"{count} events ({expected} to {number - 1}) were trimmed from {where}, or it was deleted, before "
                "this engine had read them: its triggers have not seen them; raise events_kept, or make the handlers "
                f"faster; {CUT_FILE}",
            )
            self._begin_feed_anew(self.life, number - 1, "trimmed")
        elif number > self._oldest_known():
            self._restart(connection, number - 1, f"{where} lost its end")
        else:
            self._restart(connection, number - 1, f"{where} has begun anew", missed=number - 1)
            self._opened = (BEGINNING, 0)

    def _oldest_known(self) -> int:
        """Return the number of the oldest event that is still remembered."""
        recent = self._recent
        forgets = self._forgets or len(recent) == _REMEMBERED
        return recent[0][1] if forgets and recent else max(self._opened[1], 1)

    def _forget_old(self) -> None:
        """Forget the entries that were read before the last call of this: by now every replica has them."""
        keep = max(self._number - self._number_then, _LEAST_REMEMBERED)
        self._number_then = self._number
        while len(self._recent) > keep:
            self._forgets = True
            self._recent.popleft()

    def _look(self, connection: Connection) -> None:
        """Check whether the last entry that was read is still there; if not, find where to continue."""
        stream, wanted, lost = self._shape.stream, self._wanted, self.published.lost
        published = self.published.newest  # before the counter, which is then at least as high
        counted = self._counted(connection)
        before = connection.call("XREVRANGE", stream, self._id, "-", "COUNT", 1)
        where = f"the stream {stream!r} of Redis at {self._server}"
        if not before and counted < self._number:
            self._begin_again(connection, where)
            return
        # If there is no entry up to it, it was trimmed, which the next number will show, or this is another stream.
        if not before or (before[0][0] == self._id and number_of(before[0][1]) in (self._number, None)):
            if lost is not None and (before or not self._number):
                self._note_unread(*lost, counted, where)
            elif published > counted:
                self._note_unread(counted + 1, published, counted, where)
            if before or (counted == self._number and not self._has_next(connection)):
                self._looked = wanted
                self._tell_all()
            return
        # A fail-over: the new primary lacks entries that were read here, and may have used their ids again.
        known = dict(self._recent)
        while before:
            for entry_id, fields in before:
                number = number_of(fields)
                if place_of(entry_id) <= place_of(self._opened[0]):
                    # All entries that were read are lost, and perhaps more. Those before reading began are not read.
                    number = self._opened[1] if number is None else min(number, self._opened[1])
                    self._opened = (entry_id, number)
                elif number is None or known.get(entry_id) != number:
                    continue
                self._restart(connection, number, f"{where} lost its end")
                self._id = entry_id
                return
            before = connection.call("XREVRANGE", stream, b"(" + before[-1][0], "-", "COUNT", COUNT)
        self._begin_again(connection, where)

    def _has_next(self, connection: Connection) -> bool:
        """Return whether there is an entry that was not read: also in another stream with as many events."""
        return bool(connection.call("XRANGE", self._shape.stream, b"(" + self._id, "+", "COUNT", 1))

    def _begin_again(self, connection: Connection, where: str) -> None:
        """Continue with the first event of another stream than the one that was read."""
        self._restart(connection, 0, f"{where} has begun anew")
        self._id = BEGINNING
        self._opened = (BEGINNING, 0)

    def _restart(self, connection: Connection, number: int, what: str, *, missed: int = 0) -> None:
        """Continue after the event with this number, which is before those that were read."""
        # First: if the connection breaks here, nothing has changed yet.
        counted = self._counted(connection)
        before, life = self.life, end_epoch(connection, self._shape, self.life, number)
        last, self._number, self.life = self._number, number, life
        self._begin_feed_anew(life, number, "lost in a crash" if life.name == before.name else "other store")
        self._begin_anew(counted)
        self.note_loss(
            missed,
            f"{what} after event {last} (it was flushed, or a fail-over lost the newest events): this engine "
            f"continues with event {number + 1}; events published in between may be missing; {CUT_FILE}",
        )

    def _note_unread(self, first: int, last: int, counted: int, where: str) -> None:
        """Report that events are gone that this engine has published and not read yet."""
        self._begin_anew(counted)
        self.note_loss(
            last - first + 1,
            f"{where} lost its end (a restart or a fail-over lost the newest events): the original events "
            f"{first} to {last} reached no trigger of this engine; {CUT_FILE}",
        )

    def _begin_anew(self, counted: int) -> None:
        self.published.restart(counted)
        self.restarts += 1
        self._tell_all()

    def _counted(self, connection: Connection) -> int:
        return int(connection.call("GET", self._shape.counter) or 0)
