"""What watches read from the stream of events: the changes after a cursor, or why they are gone."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

from scopestate.actors.journal import MOST_EVENTS, Gone
from scopestate.errors import Compacted
from scopestate.ops.cursors import ManyCursor, read_start
from scopestate.ops.results import StateEvent
from scopestate.persistence.redis.connection import Connection
from scopestate.persistence.redis.consuming import Begin
from scopestate.persistence.redis.entries import number_of, place_of, state_event_of
from scopestate.persistence.redis.script import Shape

_CHUNK: Final = 1000
_SKEW_MS: Final = 60_000
"""How far the clocks of engines and server may differ before a read of one scope has to begin with the first entry."""


class Life(NamedTuple):
    """One life of a database, which a flush ends, and one stretch of it, which a fail-over that loses events ends."""

    name: str
    """No other life has it."""
    base: int
    """The position before that of the first event."""
    epoch: int
    """How many times events were lost with the end of the stream."""


def store_key(shape: Shape) -> str:
    """Return the key of what is known of the life of a database."""
    return f"scopestate:store:{shape.place}"


def read_life(connection: Connection, shape: Shape) -> Life:
    """Return the life of the database, which begins with this if there is none. Raises Refusal and Broken."""
    key = store_key(shape)
    connection.call("HSETNX", key, "name", secrets.token_hex(8))
    connection.call("HSETNX", key, "base", time.time_ns() // 1000)
    life = life_in(connection.call(*life_parts(shape)))
    assert life is not None  # made above
    return life


def life_parts(shape: Shape) -> tuple[str, ...]:
    """Return the command that reads the life of the database, whose reply `life_in` takes."""
    return "HMGET", store_key(shape), "name", "base", "epoch"


def life_in(reply: list[bytes | None]) -> Life | None:
    """Return the life of the database; None if no engine has asked for it yet."""
    name, base, epoch = reply
    return None if name is None or base is None else Life(name.decode(), int(base), int(epoch or 0))


def end_epoch(connection: Connection, shape: Shape, before: Life, number: int) -> Life:
    """Record that the events after this number are lost. Several engines may find this. Raises Refusal and Broken."""
    life = read_life(connection, shape)
    if life == before:
        key = store_key(shape)
        connection.call("HSETNX", key, f"last:{life.epoch}", number)
        connection.call("HSET", key, "epoch", life.epoch + 1)
        life = read_life(connection, shape)
    return life


class StreamHistory:
    """The stream as the journal of watches. Its methods may wait for the server, and raise StorageError."""

    def __init__(self, shape: Shape, visit: Callable[[], AbstractContextManager[Connection]]) -> None:
        self._shape = shape
        self._visit = visit

    def read(self, after: int, upto: int | None = None, *, most: int = MOST_EVENTS) -> list[StateEvent]:
        """Return the events after position `after`, up to `upto`, in order."""
        found: list[StateEvent] = []
        with self._visit() as connection:
            base = read_life(connection, self._shape).base
            for event in self._events(connection, self._place_of(connection, after - base), base):
                if upto is not None and event.position > upto:
                    break
                if event.position > after:
                    found.append(event)
                    if len(found) >= most:
                        break
        return found

    def read_scope(
        self, scope: str, after: int, upto: int | None = None, *, most: int = MOST_EVENTS
    ) -> list[StateEvent]:
        """Return the events of a scope after the revision `after`, up to revision `upto`, in order."""
        found: list[StateEvent] = []
        with self._visit() as connection:
            base = read_life(connection, self._shape).base
            for event in self._events(connection, f"{max(after // 1000 - _SKEW_MS, 0)}-0", base):
                if event.scope != scope or event.revision <= after:
                    continue
                if upto is not None and event.revision > upto:
                    break
                found.append(event)
                if len(found) >= most:
                    break
        return found

    def gone(self, epoch: int, position: int, *, scope: str | None = None, prefix: str = "") -> Gone | None:
        """Return why `read(position)` would miss changes; None if it would not."""
        del scope, prefix  # the stream is of all scopes
        with self._visit() as connection:
            life = read_life(connection, self._shape)
            number = position - life.base
            key = store_key(self._shape)
            counted = int(connection.call("GET", self._shape.counter) or 0)
            if number > counted:
                return "lost in a crash"
            for ended in range(epoch, life.epoch):
                last = connection.call("HGET", key, f"last:{ended}")
                if last is not None and number > int(last):
                    return "lost in a crash"
            first = self._first(connection)
            oldest = counted + 1 if first is None else first
        return "trimmed" if number + 1 < oldest else None

    def gone_in_scope(self, scope: str, revision: int) -> Gone | None:
        """As `gone`, for `read_scope(scope, revision)`.

        It is certain that nothing is missing if the stream has a change of the scope up to that revision, or each one.
        """
        with self._visit() as connection:
            if self._first(connection) == 1:
                return None
            for begin in (f"{max(revision // 1000 - _SKEW_MS, 0)}-0", "-"):
                for event in self._events(connection, begin, 0):
                    if event.scope == scope:
                        if event.revision <= revision:
                            return None
                        break
        return "trimmed"

    def oldest(self, scope: str) -> tuple[int, int] | None:
        """Return None: that is not known without reading the stream."""
        del scope
        return None

    def begin_of(self, start: str, store: str) -> Begin:
        """Return where a new consumer begins: "now", "earliest", or after a cursor of `store`.

        Raises InvalidCursor, and Compacted if the stream does not reach back to it.
        """
        if start in ("now", "earliest"):
            return Begin(start)
        cursor = read_start(start)
        with self._visit() as connection:
            life = read_life(connection, self._shape)
        if cursor.store != f"{store}:{life.name}":
            raise Compacted(start, "other store")
        if isinstance(cursor, ManyCursor):
            position = cursor.position
            gone = None if position is None else self.gone(cursor.epoch, position)
        else:
            gone = None if cursor.revision is None else self.gone_in_scope(cursor.scope, cursor.revision)
            found = self.read_scope(cursor.scope, cursor.revision or 0, most=1)
            position = found[0].position - 1 if found else None
            if not found:
                return Begin("now")
        if gone is not None:
            raise Compacted(start, gone)
        if position is None:
            return Begin("earliest")
        number, entry_id = position - life.base, "0"
        with self._visit() as connection:
            for there, its_number in self._numbers(connection, self._place_of(connection, number)):
                if its_number > number:
                    break
                entry_id = there.decode()
        return Begin("at", entry_id, number)

    # --------------------------------------------------------------------------------------------------- in the stream

    def _first(self, connection: Connection) -> int | None:
        """Return the number of the oldest event; None if there is none."""
        for _, number in self._numbers(connection, "-"):
            return number
        return None

    def _numbers(self, connection: Connection, begin: str) -> Iterator[tuple[bytes, int]]:
        for entry_id, fields in self._entries(connection, begin, 10):
            number = number_of(fields)
            if number is not None:
                yield entry_id, number

    def _place_of(self, connection: Connection, number: int) -> str:
        """Return the id of an entry that is not after the event with this number, and is close to it."""
        ends = connection.call("XREVRANGE", self._shape.stream, "+", "-", "COUNT", 1)
        starts = connection.call("XRANGE", self._shape.stream, "-", "+", "COUNT", 1)
        if not ends or not starts:
            return "-"
        low, high = place_of(starts[0][0])[0], place_of(ends[0][0])[0]
        while low < high:  # the first entry of `low` is not after the event
            middle = (low + high + 1) // 2
            there = next(self._numbers(connection, f"{middle}-0"), None)
            if there is not None and there[1] <= number:
                low = place_of(there[0])[0]
                if low < middle:
                    break
            else:
                high = middle - 1
        return f"{low}-0"

    def _events(self, connection: Connection, begin: str, base: int) -> Iterator[StateEvent]:
        for entry_id, fields in self._entries(connection, begin, _CHUNK):
            event = state_event_of(entry_id, fields, base)
            if event is not None:
                yield event

    def _entries(self, connection: Connection, begin: str, chunk: int) -> Iterator[Any]:
        while True:
            entries = connection.call("XRANGE", self._shape.stream, begin, "+", "COUNT", chunk)
            yield from entries
            if len(entries) < chunk:
                return
            begin = "(" + entries[-1][0].decode()
