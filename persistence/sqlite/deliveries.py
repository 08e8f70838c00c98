"""Consumers, their deliveries and their dead letters, in the database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from scopestate.actors.journal import ConsumerChange, Letter, Pending, SavedConsumer
from scopestate.errors import StorageError
from scopestate.persistence.sqlite.changes import EVENT_COLUMNS, read_letter_events, write_letters
from scopestate.persistence.sqlite.statements import Write, ladder

_PUT_PENDING: Final = ladder(
    "REPLACE INTO deliveries (consumer, position, over, attempts, first, due, held, error) VALUES",
    "(?, ?, 0, ?, ?, ?, ?, ?)",
    "",
)
_PUT_OVER: Final = ladder(
    "REPLACE INTO deliveries (consumer, position, over, attempts, first, due, held, error) VALUES",
    "(?, ?, 1, 0, 0, 0, 0, NULL)",
    "",
)
_DROP: Final = "DELETE FROM deliveries WHERE consumer = ? AND position IN (SELECT value FROM json_each(?))"
_LONGEST_ERROR: Final = 4096
"""Characters that a pending delivery keeps of its last error; its dead letter has all of it."""


class Progress(msgspec.Struct):
    """The saved progress of a consumer."""

    done: int
    pending: set[int]
    over: set[int]
    """Positions above `done` of deliveries that are over."""

    def is_over(self, position: int) -> bool:
        """Tell whether a delivery is over."""
        return position not in self.pending and (position <= self.done or position in self.over)


class Deliveries:
    """The saved state of consumers, and the statements that change it. Within transactions of the store's writer."""

    def __init__(self) -> None:
        self._known: dict[int, Progress] | None = None
        self.settled: set[int] = set()
        """Positions of pending deliveries that have ended since the trimmer last checked: it may have passed them."""

    def forget(self) -> None:
        """Forget what is known, because a transaction was rolled back: it is read again."""
        self._known = None
        self.settled.clear()

    def progress(self, connection: sqlite3.Connection) -> dict[int, Progress]:
        """Return the progress of each consumer."""
        if self._known is None:
            known = {
                consumer: Progress(done, set(), set())
                for consumer, done in connection.execute("SELECT number, done FROM consumers")
            }
            for consumer, position, over in connection.execute("SELECT consumer, position, over FROM deliveries"):
                if consumer in known:
                    (known[consumer].over if over else known[consumer].pending).add(position)
            self._known = known
        return self._known

    def write(self, connection: sqlite3.Connection, changes: Iterable[ConsumerChange]) -> None:
        """Apply the changes of consumers, in order. Those for a consumer that does not exist are left out."""
        known = self.progress(connection)
        for change in changes:
            of = known.get(change.consumer)
            if of is not None:
                self._write_one(connection, change, of)

    def _write_one(self, connection: sqlite3.Connection, change: ConsumerChange, of: Progress) -> None:
        number, done = change.consumer, max(of.done, change.done)
        dropped: list[int] = []
        if change.pending:
            put = Write(connection, _PUT_PENDING, 7)
            for one in {one.position: one for one in change.pending}.values():
                error = None if one.error is None else _storable(one.error[:_LONGEST_ERROR])
                put.add(
                    (number, one.position, one.attempts, one.first_ms, one.due_ms, int(one.held), error),
                    64 + len(error or ""),
                )
                of.pending.add(one.position)
                of.over.discard(one.position)
            put.flush()
        held = {one.position for one in change.pending if one.held}
        over = {*change.acked, *(letter.event.position for letter in change.letters)} - held
        if over:
            ahead = Write(connection, _PUT_OVER, 2)
            for position in sorted(over):
                if position > done:
                    ahead.add((number, position), 16)
                    of.over.add(position)
                elif position in of.pending:
                    dropped.append(position)
                    self.settled.add(position)
                of.pending.discard(position)
            ahead.flush()
        if change.letters:
            self._write_letters(connection, change.letters)
        if done > of.done:
            connection.execute("UPDATE consumers SET done = ? WHERE number = ?", (done, number))
            passed = [position for position in of.over if position <= done]
            dropped += passed
            of.over.difference_update(passed)
            of.done = done
        if dropped:
            connection.execute(_DROP, (number, _json(dropped)))

    @staticmethod
    def _write_letters(connection: sqlite3.Connection, letters: Sequence[Letter]) -> None:
        names = sorted({letter.event.scope for letter in letters})
        numbers = dict(
            connection.execute(
                "SELECT scope, number FROM scopes WHERE scope IN (SELECT value FROM json_each(?))", (_json(names),)
            ).fetchall()
        )
        # The journal had the event, so its scope exists.
        write_letters(connection, [(numbers[letter.event.scope], letter) for letter in letters])

    # --------------------------------------------------------------------------------------------- single transactions

    def create(self, connection: sqlite3.Connection, name: str, wanted: str, done: int, now_ms: int) -> SavedConsumer:
        """Make a consumer."""
        if connection.execute("SELECT 1 FROM consumers WHERE name = ?", (name,)).fetchall():
            raise ValueError(f"there is a consumer {name!r}")
        known = self.progress(connection)
        number = connection.execute(
            "INSERT INTO consumers (name, filter, created, paused, done) VALUES (?, ?, ?, NULL, ?)",
            (name, wanted, now_ms, done),
        ).lastrowid
        assert number is not None  # it was inserted
        known[number] = Progress(done, set(), set())
        return SavedConsumer(number, name, wanted, now_ms, None, done, set(), {}, {}, 0)

    def skip(self, connection: sqlite3.Connection, consumer: int, positions: Sequence[int], paused: str) -> None:
        """Drop the oldest deliveries of a consumer, and record why it is paused."""
        of = self.progress(connection).get(consumer)
        if of is None:
            return
        done = max(of.done, *positions)
        gone = of.pending.intersection(positions)
        passed = {position for position in of.over if position <= done}
        connection.execute("UPDATE consumers SET done = ?, paused = ? WHERE number = ?", (done, paused, consumer))
        connection.execute(_DROP, (consumer, _json(sorted(gone | passed))))
        of.done = done
        of.pending -= gone
        of.over -= passed
        self.settled |= gone

    def remove(self, connection: sqlite3.Connection, consumer: int) -> None:
        """Remove a consumer with its deliveries and dead letters."""
        known = self.progress(connection)
        for statement in (
            "DELETE FROM deliveries WHERE consumer = ?",
            "DELETE FROM dead_letters WHERE consumer = ?",
            "DELETE FROM consumers WHERE number = ?",
        ):
            connection.execute(statement, (consumer,))
        gone = known.pop(consumer, None)
        if gone is not None:
            self.settled |= gone.pending

    def replay(
        self, connection: sqlite3.Connection, ids: Sequence[int] | None, consumer: int | None, *, reset: bool
    ) -> list[tuple[int, Pending]]:
        """Make pending deliveries of dead letters, and remove the letters."""
        known = self.progress(connection)
        # An event that the journal has forgotten is put back: a pending delivery always has its event there.
        connection.execute("CREATE TEMP TABLE IF NOT EXISTS replayed (id INTEGER PRIMARY KEY)")
        connection.execute("DELETE FROM replayed")
        connection.execute(f"INSERT INTO replayed SELECT id {_CHOSEN}", _asked(ids, consumer, None))
        once = (
            f"(SELECT {EVENT_COLUMNS} FROM dead_letters WHERE id IN replayed"  # noqa: S608 - ours
            " AND NOT EXISTS (SELECT 1 FROM journal WHERE journal.position = dead_letters.position) GROUP BY position)"
        )
        connection.execute(
            "UPDATE scopes SET events = events + more, bytes = bytes + sizes FROM"  # noqa: S608 - ours
            f" (SELECT scope AS number_, count(*) AS more, sum(size) AS sizes FROM {once} GROUP BY scope)"
            " WHERE number = number_"
        )
        connection.execute(f"INSERT INTO journal ({EVENT_COLUMNS}) SELECT * FROM {once}")  # noqa: S608 - ours
        attempts = ("0", "0", "NULL") if reset else ("attempts", "first", "substr(error, 1, 4096)")
        connection.execute(
            "REPLACE INTO deliveries (consumer, position, over, attempts, first, due, held, error)"  # noqa: S608 - ours
            f" SELECT consumer, position, 0, {attempts[0]}, {attempts[1]}, 0, 0, {attempts[2]} FROM dead_letters"
            " WHERE id IN replayed"
        )
        found = connection.execute(
            "SELECT consumer, dead_letters.position, deliveries.attempts, deliveries.first, deliveries.error"
            " FROM dead_letters JOIN deliveries USING (consumer, position) WHERE id IN replayed ORDER BY id"
        ).fetchall()
        connection.execute("DELETE FROM dead_letters WHERE id IN replayed")
        connection.execute("DELETE FROM replayed")
        replayed = []
        for number, position, begun, first_ms, error in found:
            if number in known:
                known[number].pending.add(position)
                known[number].over.discard(position)
            replayed.append((number, Pending(position, begun, first_ms, 0, error)))
        return replayed

    def purge(
        self,
        connection: sqlite3.Connection,
        ids: Sequence[int] | None,
        consumer: int | None,
        before_ms: int | None,
    ) -> tuple[int, list[tuple[int, int]]]:
        """Remove dead letters; return how many, and the deliveries that were held and are over now."""
        known, asked = self.progress(connection), _asked(ids, consumer, before_ms)
        released: list[tuple[int, int]] = connection.execute(
            f"SELECT consumer, position FROM deliveries JOIN (SELECT consumer, position {_CHOSEN})"  # noqa: S608 - ours
            " USING (consumer, position) WHERE held ORDER BY consumer, position",
            asked,
        ).fetchall()
        chosen = f"DELETE FROM dead_letters WHERE id IN (SELECT id {_CHOSEN})"  # noqa: S608 - ours
        count = connection.execute(chosen, asked).rowcount
        for number in {number for number, _ in released}:
            positions = [position for of, position in released if of == number]
            self._write_one(connection, ConsumerChange(number, acked=positions), known[number])
        return count, released


def _storable(text: str) -> str:
    # Lone surrogates cannot be stored.
    return text.encode(errors="backslashreplace").decode()


def _json(values: Sequence[int] | Sequence[str]) -> str:
    return msgspec.json.encode(values).decode()


# ------------------------------------------------------------------------------------------------------------- reading

_CHOSEN: Final = (
    "FROM dead_letters WHERE (:ids IS NULL OR id IN (SELECT value FROM json_each(:ids)))"
    " AND (:consumer IS NULL OR consumer = :consumer) AND (:before IS NULL OR died < :before)"
)


def _asked(ids: Sequence[int] | None, consumer: int | None, before_ms: int | None) -> dict[str, str | int | None]:
    return {"ids": None if ids is None else _json(ids), "consumer": consumer, "before": before_ms}


def read_consumers(connection: sqlite3.Connection) -> list[SavedConsumer]:
    """Return the consumers, by name. Reads as of one moment."""
    connection.execute("BEGIN")
    try:
        consumers = {
            number: SavedConsumer(number, name, wanted, created_ms, paused, done, set(), {}, {}, dead)
            for number, name, wanted, created_ms, paused, done, dead in connection.execute(
                "SELECT number, name, filter, created, paused, done,"
                " (SELECT count(*) FROM dead_letters WHERE consumer = number) FROM consumers ORDER BY name"
            )
        }
        for consumer, position, over, attempts, first_ms, due_ms, held, error in connection.execute(
            "SELECT consumer, position, over, attempts, first, due, held, error FROM deliveries ORDER BY position"
        ):
            of = consumers.get(consumer)
            if of is None:
                continue
            if over:
                of.acked.add(position)
            else:
                of.pending[position] = Pending(position, attempts, first_ms, due_ms, error, bool(held))
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return list(consumers.values())


_LETTERS: Final = (
    "SELECT id, consumer, attempts, first, died, error, traceback, size"
    f" {_CHOSEN} AND id > :after ORDER BY id LIMIT :most"
)


def read_letters(
    connection: sqlite3.Connection,
    ids: Sequence[int] | None,
    consumer: int | None,
    after: int,
    before_ms: int | None,
    most: int,
    most_bytes: int,
) -> list[Letter]:
    """Return dead letters by id, up to a number of them and of bytes; at least one."""
    asked = {**_asked(ids, consumer, before_ms), "after": after, "most": most}
    connection.execute("BEGIN")
    try:
        rows: list[tuple[int, int, int, int, int, str, str, int]] = []
        cursor = connection.execute(_LETTERS, asked)
        for row in cursor:
            most_bytes -= row[7] + len(row[5]) + len(row[6])
            if most_bytes < 0 and rows:
                break
            rows.append(row)
        cursor.close()
        events = read_letter_events(connection, [row[0] for row in rows])
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    if len(events) != len(rows):
        raise StorageError("a dead letter belongs to no scope; was the database edited? `store verify` names it")
    return [
        Letter(id_, number, event, attempts, first_ms, died_ms, error, traceback)
        for (id_, number, attempts, first_ms, died_ms, error, traceback, _), event in zip(rows, events, strict=True)
    ]


def count_letters(connection: sqlite3.Connection, consumer: int | None, before_ms: int | None) -> int:
    """Return how many dead letters there are."""
    ((count,),) = connection.execute(
        f"SELECT count(*) {_CHOSEN}",
        _asked(None, consumer, before_ms),
    ).fetchall()
    return int(count)
