"""Events for each engine: every published event, once and in order."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from scopestate.persistence.redis.connection import Broken, Connection, Refusal, Target, pack
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.reading import BLOCK_S, CUT_FILE, Handler, Reader, event_of, number_of, place_of
from scopestate.persistence.redis.script import Shape
from scopestate.signals import wait_for

log = logging.getLogger("scopestate.persistence.redis")

_COUNT: Final = 100
"""Entries in one reply, at most."""
_BEGINNING: Final = b"0-0"
_REMEMBERED: Final = 1000
"""Entries that are recognised after a fail-over. A replica is less far behind, or a gap is reported."""


class EachReader(Reader):
    """Reads from its own position, which is kept in this process only.

    The numbers of the events show whether it has read all of them: each is one more than the one before. Source: the
    script counts and publishes in one step.
    """

    def __init__(
        self,
        target: Target,
        options: RedisOptions,
        shape: Shape,
        published: Callable[[], int],
        note_restart: Callable[[int], object],
    ) -> None:
        """`published` returns the newest number that this engine has published.

        `note_restart` is called with the newest number in Redis when the numbers have gone back.
        """
        super().__init__(target, options, shape)
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

    def catch_up(self, number: int, restarts: int, timeout_s: float | None, *, look: bool) -> bool:
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

    def stop(self) -> None:
        super().stop()
        self._tell_all()

    def _has(self, number: int, restarts: int, wanted: int) -> bool:
        is_there = self._number >= number and self._looked >= wanted
        return is_there or self.restarts != restarts or self._stopped.is_set()

    def _tell_all(self) -> None:
        for _, there in list(self._waiting):
            there.set()

    # ------------------------------------------------------------------------------------------ the reader's thread

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

    def _resume(self, connection: Connection) -> None:
        self._look(connection)

    def _take(self, connection: Connection) -> Handler | None:
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
        here = len(entries) == 1 and not self._is_away
        handler: Handler | None = None
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
        counted = self._counted(connection)  # first: if the connection breaks here, nothing has changed yet
        last, self._number = self._number, number
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
