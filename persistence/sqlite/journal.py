"""The journal of a store in a directory: implements `actors/journal.py` on the connections of the adapter."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol, TypeVar

from scopestate.actors.journal import (
    MOST_BYTES,
    MOST_EVENTS,
    ConsumerChange,
    Gone,
    Journal,
    JournalSize,
    Letter,
    Needed,
    Pending,
    SavedConsumer,
)
from scopestate.ops.results import StateEvent
from scopestate.persistence.sqlite import changes, needed
from scopestate.persistence.sqlite.attempts import AttemptsFile
from scopestate.persistence.sqlite.deliveries import (
    Deliveries,
    count_letters,
    read_consumers,
    read_letters,
)
from scopestate.persistence.sqlite.schema import Session, note_settled
from scopestate.persistence.sqlite.trimming import Trimmer

_T = TypeVar("_T")

TRIMMED_BY_A_SAVE: Final = 2000
"""Changes that a save removes, in addition to four for each that it writes. Takes a millisecond or two."""
TRIMMED_ALONE: Final = 20_000
"""Changes that `trim` removes: 50 to 100 ms, in which no save runs."""

_SIZE: Final = (
    "SELECT coalesce(sum(events), 0), coalesce(sum(bytes), 0), (SELECT coalesce(min(position), 0) FROM journal),"
    " (SELECT coalesce(max(position), 0) FROM journal) FROM scopes INDEXED BY scopes_logged WHERE events > 0"
)


_OLDEST_OF_NEWEST: Final = "SELECT coalesce((SELECT position FROM journal ORDER BY position DESC LIMIT 1 OFFSET ?), 0)"
"""The position of the oldest of the newest changes; 0 if there are fewer."""


class Run(Protocol):
    """Calls `work` with a connection. `doing` completes "cannot ..." in the text of an error."""

    def __call__(self, doing: str, work: Callable[[sqlite3.Connection], _T]) -> _T: ...


class SavedJournal(Journal):
    """The journal in the database of a store."""

    def __init__(self, read: Run, transact: Run, clock: Callable[[], int], directory: str, session: Session) -> None:
        """`read` gives a connection that sees committed data only, `transact` one that is in a transaction."""
        self._read = read
        self._transact = transact
        self._clock = clock
        self.epoch = session.epoch
        self._epochs = session.epochs
        self.first = self.settled = self.given = self._noted = session.epochs[session.epoch]
        self._deliveries = Deliveries()
        self._trimmer = Trimmer()
        self._attempts = AttemptsFile(os.path.join(directory, "state.attempts"), session.store_id)

    # --------------------------------------------------------------------------------------------- within transactions

    def write(
        self,
        connection: sqlite3.Connection,
        consumers: Sequence[ConsumerChange],
        logged: Sequence[int],
        written: int,
        now_ms: int,
    ) -> None:
        """Write the changes of consumers in a save, and trim.

        `logged`: scopes that got changes; `written`: how many.
        """
        if consumers:
            self._deliveries.write(connection, consumers)
        if self.settled > self._noted:
            note_settled(connection, self.settled)
        if written or consumers or self.behind:
            self._trim(connection, logged, now_ms, TRIMMED_BY_A_SAVE + 4 * written)

    def _trim(self, connection: sqlite3.Connection, logged: Sequence[int], now_ms: int, most: int) -> None:
        self._trimmer.trim(
            connection,
            self.rules,
            self._deliveries.progress(connection),
            logged=logged,
            settled=self._deliveries.settled,
            now_ms=now_ms,
            most=most,
        )

    def written(self, consumers: Sequence[ConsumerChange]) -> None:
        """Note that the transaction is on disk."""
        self._noted = max(self._noted, self.settled)
        self.behind = self._trimmer.behind
        if consumers:
            self._attempts.settle(
                outcome
                for change in consumers
                for outcome in (
                    *(((change.consumer, position), _ANY) for position in change.acked),
                    *(((change.consumer, position), _ANY) for position in change.over),
                    *(((change.consumer, letter.event.position), _ANY) for letter in change.letters),
                    *(((change.consumer, one.position), one.attempts) for one in change.pending),
                )
            )

    def rolled_back(self) -> None:
        """Note that the transaction was rolled back."""
        self._deliveries.forget()
        self._trimmer.forget()

    def close(self) -> None:
        """Close it with the store, which ends cleanly."""
        self._attempts.close()

    def abandon(self) -> None:
        """In a forked child: leave everything to the parent."""
        self._attempts.abandon()

    # -------------------------------------------------------------------------------------------------------- reading

    def read(
        self, after: int, upto: int | None = None, *, most: int = MOST_EVENTS, most_bytes: int = MOST_BYTES
    ) -> list[StateEvent]:
        return self._read(
            "read the journal",
            lambda connection: changes.read_by_position(connection, after, upto, most, most_bytes),
        )

    def read_scope(
        self, scope: str, after: int, upto: int | None = None, *, most: int = MOST_EVENTS, most_bytes: int = MOST_BYTES
    ) -> list[StateEvent]:
        return self._read(
            f"read the journal of scope {scope!r}",
            lambda connection: changes.read_of_scope(connection, scope, after, upto, most, most_bytes),
        )

    def read_at(self, positions: Iterable[int]) -> list[StateEvent]:
        wanted = list(positions)
        return self._read("read the journal", lambda connection: changes.read_at(connection, wanted))

    def gone(self, epoch: int, position: int, *, scope: str | None = None, prefix: str = "") -> Gone | None:
        if self.was_lost(epoch, position):
            return "lost in a crash"
        trimmed = self._read(
            "look into the journal", lambda connection: changes.trimmed_up_to(connection, scope, prefix)
        )
        return "trimmed" if position < trimmed else None

    def was_lost(self, epoch: int, position: int) -> bool:
        return epoch != self.epoch and position > self._epochs.get(epoch, -1)

    def newest(self, most: int) -> tuple[list[StateEvent], int]:
        def work(connection: sqlite3.Connection) -> tuple[list[StateEvent], int]:
            ((oldest,),) = connection.execute(_OLDEST_OF_NEWEST, (most - 1,)).fetchall()
            behind = max(changes.trimmed_up_to(connection, None, ""), oldest - 1)
            found = changes.read_by_position(connection, behind, None, most, MOST_BYTES)
            while (
                rest := changes.read_by_position(connection, found[-1].position, None, most, MOST_BYTES)
                if found
                else []
            ):
                found, behind = rest, found[-1].position
            return found, behind

        return self._read("read the newest changes", work)

    def gone_in_scope(self, scope: str, revision: int) -> Gone | None:
        return self._read(
            f"look into the journal of scope {scope!r}",
            lambda connection: changes.gone_in_scope(connection, scope, revision, self.epoch),
        )

    def size(self) -> JournalSize:
        return self._read(
            "measure the journal", lambda connection: JournalSize(*connection.execute(_SIZE).fetchall()[0])
        )

    def needed(self) -> Needed:
        return self._read("measure the journal", lambda connection: needed.measure(connection, self.rules))

    def oldest_of(self, consumer: int, upto: int, most: int) -> list[int]:
        return self._read(
            "look into the journal",
            lambda connection: needed.oldest_of(connection, self.rules, consumer, upto, most),
        )

    def count_behind(self, position: int) -> int:
        """See Journal."""
        return self._read("count the events in the journal", lambda connection: _count_behind(connection, position))

    def oldest(self, scope: str) -> tuple[int, int] | None:
        return self._read(
            f"look into the journal of scope {scope!r}", lambda connection: changes.oldest_of(connection, scope)
        )

    def trim(self) -> None:
        def work(connection: sqlite3.Connection) -> None:
            self._trim(connection, (), self._clock(), TRIMMED_ALONE)

        self._transact("trim the journal", work)
        self.behind = self._trimmer.behind

    # ------------------------------------------------------------------------------------------------------ consumers

    def consumers(self) -> list[SavedConsumer]:
        found = self._read("read the consumers", read_consumers)
        begun = dict(self._attempts.open)
        for consumer in found:
            for (number, position), attempt in begun.items():
                if number != consumer.number:
                    continue
                pending = consumer.pending.get(position)
                over = pending is None and (position <= consumer.done or position in consumer.acked)
                if not over and attempt > (pending.attempts if pending is not None else 0):
                    consumer.begun[position] = attempt
        return found

    def create_consumer(self, name: str, filter: str, done: int, now_ms: int) -> SavedConsumer:  # noqa: A002 - as in `Journal`
        return self._transact(
            f"make the consumer {name!r}",
            lambda connection: self._deliveries.create(connection, name, filter, done, now_ms),
        )

    def change_filter(self, consumer: int, filter: str) -> None:  # noqa: A002 - as in `Journal`
        self._update("change the filter of a consumer", "filter = ?", consumer, filter)

    def pause_consumer(self, consumer: int, why: str | None) -> None:
        self._update("pause a consumer", "paused = ?", consumer, why)

    def _update(self, doing: str, what: str, consumer: int, value: str | None) -> None:
        statement = f"UPDATE consumers SET {what} WHERE number = ?"  # noqa: S608 - ours
        self._transact(doing, lambda connection: connection.execute(statement, (value, consumer)))

    def skip(self, consumer: int, positions: Sequence[int], paused: str) -> None:
        self._transact(
            "skip events of a consumer",
            lambda connection: self._deliveries.skip(connection, consumer, positions, paused),
        )
        gone = set(positions)
        self._attempts.forget([one for one in self._attempts.open if one[0] == consumer and one[1] in gone])

    def forget_consumer(self, consumer: int) -> None:
        self._transact("forget a consumer", lambda connection: self._deliveries.remove(connection, consumer))
        self._attempts.forget([delivery for delivery in self._attempts.open if delivery[0] == consumer])

    def note_attempts(self, attempts: Sequence[tuple[int, int, int]]) -> None:
        self._attempts.note(attempts)

    # --------------------------------------------------------------------------------------------------- dead letters

    def letters(
        self,
        consumer: int | None = None,
        *,
        after: int = 0,
        before_ms: int | None = None,
        most: int = 100,
        most_bytes: int = MOST_BYTES,
    ) -> list[Letter]:
        return self._read(
            "read the dead letters",
            lambda connection: read_letters(connection, None, consumer, after, before_ms, most, most_bytes),
        )

    def letter(self, id: int) -> Letter | None:  # noqa: A002 - as in `Journal`
        found = self._read(
            f"read the dead letter {id}",
            lambda connection: read_letters(connection, [id], None, 0, None, 1, MOST_BYTES),
        )
        return found[0] if found else None

    def count_letters(self, consumer: int | None = None, *, before_ms: int | None = None) -> int:
        return self._read("count the dead letters", lambda connection: count_letters(connection, consumer, before_ms))

    def replay(
        self, ids: Sequence[int] | None, consumer: int | None = None, *, reset: bool = True
    ) -> list[tuple[int, Pending]]:
        def work(connection: sqlite3.Connection) -> list[tuple[int, Pending]]:
            replayed = self._deliveries.replay(connection, ids, consumer, reset=reset)
            # Before the commit: records of the attempts that failed would count for the new ones.
            self._attempts.forget([(number, one.position) for number, one in replayed])
            return replayed

        return self._transact("replay dead letters", work)

    def purge(
        self, ids: Sequence[int] | None, consumer: int | None = None, *, before_ms: int | None = None
    ) -> tuple[int, list[tuple[int, int]]]:
        return self._transact(
            "purge dead letters", lambda connection: self._deliveries.purge(connection, ids, consumer, before_ms)
        )


_ANY: Final = 2**32
"""More than the number of any attempt."""


def _count_behind(connection: sqlite3.Connection, position: int) -> int:
    ((count,),) = connection.execute("SELECT count(*) FROM journal WHERE position > ?", (position,)).fetchall()
    return int(count)
