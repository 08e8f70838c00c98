"""The store in a directory: one SQLite database and one lock file.

docs/design/0006 says why SQLite and what is promised; docs/reference/semantics.md 8, points 16 to 27, lists the
failures of other stores that this one avoids.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from threading import get_ident
from typing import TypeVar

from scopestate.actors.journal import ConsumerChange
from scopestate.actors.ports import ScopeChange, ScopeState, Store
from scopestate.errors import StorageError, StoreCorrupt
from scopestate.persistence.sqlite.by_key import SavedKeys
from scopestate.persistence.sqlite.database import (
    LIBRARY_ERRORS,
    Connect,
    abandon,
    connect,
    database_uri,
    is_corruption,
    storage_error,
)
from scopestate.persistence.sqlite.files import half_written, read_whole, write_whole
from scopestate.persistence.sqlite.journal import Run, SavedJournal
from scopestate.persistence.sqlite.lock import ALONE, StoreLock, Terms
from scopestate.persistence.sqlite.opening import copy_database, open_directory, open_store, publish
from scopestate.persistence.sqlite.rows import (
    LONGEST_NAME,
    PAGE_LIMIT,
    Writer,
    read_due,
    read_names,
    read_scope,
    row_room,
)
from scopestate.persistence.sqlite.schema import end_session, find_problems
from scopestate.signals import Guard, exclusive

log = logging.getLogger("scopestate.persistence.file")

_IDLE_READERS = 4
"""Connections kept open for later loads. Further ones are opened when more loads run at once, and closed after use."""

_FORK_PATIENCE_S = 2.0
"""How long a fork waits for a running save or load."""

_T = TypeVar("_T")


class _Loan:
    """A connection for one read."""

    connection: sqlite3.Connection | None = None
    ended_well = False
    stays = False
    """True if the connection stays with the loan after the read."""


class _Moment(_Loan):
    """A connection for several reads, which all see the database as it was at one moment."""

    stays = True
    ended = False

    def end(self) -> None:
        """Close the connection. While no read is running."""
        self.ended = True
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()

    __del__ = end


class FileAdapter(Store):
    """Keeps scopes in `directory`. Thread-safe; loads run concurrently with each other and with a save."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        connect: Connect = connect,
        busy_timeout_ms: int = 5000,
        terms: Terms = ALONE,
        existing: bool = False,
    ) -> None:
        """Open the store in constant time, creating the directory and the database if they are missing.

        `busy_timeout_ms`: how long to wait while another process, such as a sqlite3 tool, holds the database.
        `terms`: what the lock file tells other processes. `existing`: a missing database is an error, as for a
        directory that another process had open until now. Raises `StoreLocked`, `StoreUnusable`, `StoreCorrupt` (the
        files were set aside), or `StorageError`.
        """
        self._pid = os.getpid()
        self.directory = open_directory(directory)
        self.path = os.path.join(self.directory, "state.db")
        self._connect = connect
        self._busy_timeout_ms = busy_timeout_ms
        self._closed = False
        self._released = False
        self._held: list[tuple[Guard, list[int] | None]] = []
        self._damage = ""
        self._saving = Guard()
        self._importing = 0
        """The thread inside `save_whole`; 0 if there is none."""
        self._exclusive = Guard()
        self._idle: list[sqlite3.Connection] = []
        self._lent: dict[_Loan, None] = {}
        self._moments: weakref.WeakSet[_Moment] = weakref.WeakSet()
        self._writer: sqlite3.Connection | None
        self._lock, self._writer, self._identity, self._lost, session = open_store(
            self.directory, self.path, self._open, terms=terms, existing=existing
        )
        self._rows = Writer(session.epoch)
        self.id, self.clock_ms = session.store_id, session.clock_ms
        self.follows_close = session.follows_close
        """Whether the store was closed before this opening, not left by a process that was killed or failed."""
        self.journal: SavedJournal = SavedJournal(
            self._read, self._transact, lambda: self.clock_ms, self.directory, session
        )
        self.stored = SavedKeys(self._read, self._make, self._at_one_moment)
        room = row_room(self._writer)
        self.longest_name = min(LONGEST_NAME, room // 64)
        """Characters of a scope or key name at most; see `largest_value`."""
        self.largest_value = room - 8 * self.longest_name
        """Bytes of a value at most, as JSON. Its row then has room for the longest names (4 bytes a character)."""
        _opened.add(self)

    def load(self, scope: str) -> ScopeState:
        """Return what was saved for `scope`; raises `StorageError` for a row that is not JSON."""
        return self._read(f"load scope {scope!r}", lambda connection: read_scope(connection, scope))

    def scopes(self) -> list[str]:
        """Return the names of the scopes that hold at least one saved key."""
        return self._read("list the scopes", read_names)

    def due(self, limit: int) -> list[tuple[int, str]]:
        """Return up to `limit` scopes with the time at which their first key expires (ms), the earliest first."""
        return self._read("find what expires", lambda connection: read_due(connection, limit))

    def save(self, batch: Sequence[ScopeChange], consumers: Sequence[ConsumerChange] = ()) -> None:
        """Write the batch in one transaction and sync it to the disk. If it raises, nothing was written.

        After an error the next call may succeed. Once damage was seen every call raises `StoreCorrupt`: nothing is
        written to a damaged database.
        """
        self._save(batch, consumers, f"save {len(batch)} changed scopes")

    def save_whole(self, changes: Iterable[ScopeChange]) -> None:
        """As `save`, for more changes than fit into memory: `changes` is iterated inside the transaction.

        If the iterator raises, so does this call, and nothing was written.
        """
        self._importing = get_ident()
        try:
            self._save(changes, (), "import")
        finally:
            self._importing = 0

    def _save(self, batch: Iterable[ScopeChange], consumers: Sequence[ConsumerChange], doing: str) -> None:
        self._saving.run(self._save_alone, partial(self._rows_of, batch, consumers), doing, consumers)

    def _rows_of(
        self, batch: Iterable[ScopeChange], consumers: Sequence[ConsumerChange], connection: sqlite3.Connection
    ) -> tuple[str, int] | None:
        """Write the rows of a save, in its transaction."""
        self._rows.given = self.journal.given
        last = self._rows.write(connection, batch, self.clock_ms)
        done = [*self._rows.acks, *consumers] if self._rows.acks else consumers
        self.journal.write(connection, done, self._rows.logged, self._rows.log_size, self.clock_ms)
        return last

    def _transact(self, doing: str, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Call `work` in a transaction of its own. Raises what `save` raises."""
        return self._saving.run(self._write_alone, work, doing)

    def _make(self, doing: str, work: Callable[[sqlite3.Connection], None]) -> None:
        """Call `work`, which writes, with a connection of its own. Raises what `save` raises."""

        def make() -> None:
            self._check_usable(doing)
            if self._damage:
                raise StoreCorrupt(self._damage)
            self._secure_place(doing)
            try:
                with closing(self._open(database_uri(self.path, "rw"))) as connection:
                    work(connection)
            except LIBRARY_ERRORS as error:
                raise self._translate(error, doing) from error

        self._saving.run(make)

    def _save_alone(
        self,
        write: Callable[[sqlite3.Connection], tuple[str, int] | None],
        doing: str,
        consumers: Sequence[ConsumerChange],
    ) -> None:
        last = self._write_alone(write, doing)
        self.journal.written([*self._rows.acks, *consumers])
        if last is not None:
            self._lock.note_commit(*last)

    def _write_alone(self, work: Callable[[sqlite3.Connection], _T], doing: str) -> _T:
        self._check_usable(doing)
        if self._damage:
            raise StoreCorrupt(self._damage)
        self._secure_place(doing)
        try:
            connection = self._writer = self._writer or self._open(database_uri(self.path, "rw"))
            result = self._write(connection, work)
        except LIBRARY_ERRORS as error:
            raise self._translate(error, doing) from error
        # Checked again: if the database was removed while this wrote, the batch is lost with it.
        self._check_place(doing)
        return result

    def keys_written(self) -> int:
        """Return how many keys the running or last save has written so far."""
        return self._rows.keys_written

    def size_bytes(self) -> int:
        """Return the size of the database on the disk in bytes, its write-ahead log included."""
        total = 0
        for suffix in ("", "-wal"):
            try:
                total += os.stat(self.path + suffix).st_size
            except OSError:
                # The log does not always exist; `save` and `load` report a missing database.
                continue
        return total

    def problem(self) -> str | None:
        """Return what was found missing when the store was opened; None if nothing was."""
        return self._lost

    def check(self) -> list[str]:
        """Read the whole database and return its problems; empty if it is sound. Slow: for tests and tools."""

        def read_all(connection: sqlite3.Connection) -> list[str]:
            before = connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 0x7FFFFFFF)
            try:
                return find_problems(connection)
            finally:
                connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, before)

        return self._read("check the store", read_all)

    def note_alone(self, reason: str) -> None:
        """Note for other processes that the engine does not share the directory after all, and why."""
        self._lock.note_alone(reason)

    def close(self) -> None:
        """Checkpoint the write-ahead log and release the lock. Idempotent; waits for running calls.

        In a forked child it does nothing: the connections and the lock belong to the parent.
        """
        if os.getpid() != self._pid:
            return
        self._saving.run(self._close)
        _opened.discard(self)

    def leave(self, torn: tuple[Sequence[ScopeChange], Sequence[ConsumerChange]] | None = None) -> None:
        """Release the files in the state in which a killed process leaves them. Idempotent; waits for running calls.

        The write-ahead log stays, for the next opening, and the end of the session is not noted. `torn`: what a save
        was writing; half of it is on disk, as after a power cut. For tests: the database is read into memory in the
        meantime.
        """
        self._saving.run(self._leave, torn)
        _opened.discard(self)

    def _leave(self, torn: tuple[Sequence[ScopeChange], Sequence[ConsumerChange]] | None) -> None:
        self._closed = True
        self._when_nothing_is_lent(partial(self._release_as_killed, torn))

    def _release_as_killed(self, torn: tuple[Sequence[ScopeChange], Sequence[ConsumerChange]] | None) -> None:
        if not self._released:
            # SQLite ends the log when its last connection is closed, so the files are put back. The lock is still held.
            files = {path: read_whole(path) for path in (self.path, self.path + "-wal")}
            if torn is not None:
                self._write(self._writer or self._open(database_uri(self.path, "rw")), partial(self._rows_of, *torn))
                log_path = self.path + "-wal"
                files[log_path] = half_written(files[log_path] or b"", read_whole(log_path) or b"")
            self._disconnect()
            self.journal.abandon()  # what a thread still records reaches no file
            for path, content in files.items():
                write_whole(path, content)
            self._lock.leave()
            self._released = True

    def _close(self) -> None:
        if not self._closed and not self._damage:
            self._end_session()
        self._closed = True
        self._when_nothing_is_lent(self._release)

    def _end_session(self) -> None:
        try:
            if self._in_place() and self._writer is not None:
                end_session(self._writer, self.clock_ms, self.journal.given)
        except LIBRARY_ERRORS as error:
            # Harmless: the numbers of the next session leave a gap.
            log.warning("noting the end of the session in %s: %s", self.path, error)

    def _release(self) -> None:
        if self._released:
            return
        self._disconnect()
        self._lock.release()
        self._released = True

    def _disconnect(self) -> None:
        self._end_moments()
        connections = [*self._idle, *([self._writer] if self._writer else [])]
        self._idle, self._writer = [], None
        # Safe if another database has replaced ours: SQLite notices and leaves the log of that one alone.
        self._close_connections(connections)
        self.journal.close()

    def _end_moments(self) -> None:
        for moment in list(self._moments):
            moment.end()

    def _when_nothing_is_lent(self, work: Callable[[], object]) -> None:
        """Call `work` while no load is running and none can begin."""

        def attempt() -> bool:
            if self._lent:
                return False
            work()
            return True

        while not self._exclusive.run(attempt):
            time.sleep(0.001)

    def _open(self, uri: str) -> sqlite3.Connection:
        connection = self._connect(uri)
        try:
            connection.execute(f"PRAGMA busy_timeout = {self._busy_timeout_ms:d}")
            # FULL: each commit is synced, and so is the directory when the log is created.
            connection.execute("PRAGMA synchronous = FULL")
            # The log shrinks again at the checkpoint after a very large save.
            connection.execute("PRAGMA journal_size_limit = 67108864")
        except BaseException:
            connection.close()
            raise
        return connection

    def _write(self, connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            connection.execute("BEGIN IMMEDIATE")
            result = work(connection)
            connection.execute("COMMIT")
            return result
        except BaseException:
            self._rows.forget()
            self.journal.rolled_back()
            # For KeyboardInterrupt too, and for a COMMIT that failed: SQLite leaves that transaction open.
            try:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            except sqlite3.Error as error:
                log.warning("rolling back in %s failed, reopening the database: %s", self.path, error)
                self._writer = None
                connection.close()
            raise

    def _open_reader(self) -> sqlite3.Connection:
        # `rw`, not `rwc`: with that, SQLite would create an empty database if ours was just removed.
        connection = self._open(database_uri(self.path, "rw"))
        connection.execute("PRAGMA query_only = 1")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, PAGE_LIMIT)
        return connection

    def _at_one_moment(self, doing: str) -> tuple[Run, Callable[[], None]]:
        """Return a function like `_read` that sees the database as it is now, and one that ends it.

        Until then the write-ahead log grows with every save.
        """
        moment = _Moment()

        def begin(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN")
            connection.execute("SELECT 1 FROM store").fetchall()  # the moment is that of the first read

        def read(doing: str, work: Callable[[sqlite3.Connection], _T]) -> _T:
            return self._read(doing, work, moment)

        self._read(doing, begin, moment)
        return read, moment.end

    def _read(self, doing: str, work: Callable[[sqlite3.Connection], _T], loan: _Loan | None = None) -> _T:
        """Call `work` with a connection that sees committed data only. Raises `StorageError` for library errors."""
        self._check_usable(doing)
        if not self._in_place():
            if self._importing == get_ident():
                self._check_place(doing)  # `_saving` is held by this thread: the import reads here
            self._saving.run(self._secure_place_for, doing)
        loan = loan or _Loan()
        try:
            try:
                self._lend(loan, doing)
                if loan.connection is None:
                    loan.connection = self._open_reader()
                # After opening: the file may be another database that has just replaced ours.
                self._check_place(doing)
                result = work(loan.connection)
                loan.ended_well = True
            except LIBRARY_ERRORS as error:
                raise self._translate(error, doing) from error
            finally:
                self._give_back(loan)
        except BaseException:
            # Again, in case a KeyboardInterrupt interrupted the first call: `close` waits for every loan.
            self._give_back(loan)
            raise
        return result

    def _secure_place_for(self, doing: str) -> None:
        self._check_usable(doing)
        self._secure_place(doing)

    @exclusive
    def _lend(self, loan: _Loan, doing: str) -> None:
        self._check_usable(doing)
        if isinstance(loan, _Moment) and loan.ended:
            raise StorageError(f"cannot {doing}: the database was opened again in the meantime; try again")
        if isinstance(loan, _Moment):
            self._moments.add(loan)
        self._lent[loan] = None
        if loan.connection is None and self._idle:
            loan.connection = self._idle.pop()

    @exclusive
    def _give_back(self, loan: _Loan) -> None:
        """End a loan. Idempotent."""
        if loan.stays and loan.ended_well:
            self._lent.pop(loan, None)
            return
        connection, loan.connection = loan.connection, None
        if connection is not None:
            # A connection left in a transaction would return old data and keep the log from shrinking.
            if loan.ended_well and len(self._idle) < _IDLE_READERS and not connection.in_transaction:
                self._idle.append(connection)
            else:
                connection.close()
        self._lent.pop(loan, None)

    def _translate(self, error: BaseException, doing: str) -> StorageError:
        translated = storage_error(error, doing, self.path)
        if is_corruption(error):
            log.error("%s", translated)
            self._damage = str(translated)
        return translated

    def _check_usable(self, doing: str) -> None:
        if os.getpid() != self._pid:
            raise StorageError(
                f"cannot {doing}: the store {self.directory} belongs to process {self._pid}, of which this is a fork; "
                "open a store of its own here"
            )
        if self._closed:
            raise StorageError(f"cannot {doing}: the store {self.directory} is closed")

    def _in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), self._identity)
        except OSError:
            return False

    def _check_place(self, doing: str) -> None:
        if not self._in_place():
            raise StorageError(
                f"cannot {doing}: the store vanished: {self.path} was removed or replaced while the engine runs. Put "
                f"the file back, or create the directory {self.directory} again, empty: its content is then written "
                "there again and saving resumes"
            )

    def _secure_place(self, doing: str) -> None:
        """Make sure that the database and the lock are still the files in the directory. The caller holds `_saving`.

        An open connection still reaches a database that was removed, so its content is written again as soon as the
        directory exists. Refused: continuing with an empty database, which would silently lose everything saved before.
        """
        vanished = not self._in_place()
        if vanished and (not os.path.isdir(self.directory) or os.path.lexists(self.path) or self._writer is None):
            self._check_place(doing)
        if not self._lock.held():
            earlier, self._lock = self._lock, StoreLock(self._lock.path, created=self._lock.created)
            earlier.abandon()
        if vanished and self._writer is not None:
            self._put_back(self._writer, doing)

    def _put_back(self, writer: sqlite3.Connection, doing: str) -> None:
        try:
            copy = copy_database(writer, self.path)
            self._when_nothing_is_lent(lambda: self._replace_connections(writer, copy))
        except LIBRARY_ERRORS as error:
            raise self._translate(error, doing) from error
        except OSError as error:
            raise StorageError(f"cannot {doing}: putting {self.path} back failed: {error}") from error
        log.warning("%s had been removed; its content was written again", self.path)

    def _replace_connections(self, writer: sqlite3.Connection, copy: str) -> None:
        # All of them: one that stayed open would still read the removed database.
        self._end_moments()
        self._close_connections([*self._idle, writer])
        self._idle, self._writer = [], None
        self._identity = publish(copy, self.path)

    def _close_connections(self, connections: list[sqlite3.Connection]) -> None:
        for connection in connections:
            try:
                connection.close()
            except sqlite3.Error as error:
                # What was saved is safe in the log; the next opening recovers it.
                log.warning("closing %s: %s", self.path, error)

    def hold_still(self) -> None:
        """Before a fork: wait until no thread is inside SQLite. Limited in time: this thread may be inside itself."""
        self._held = [(self._saving, self._saving.take(_FORK_PATIENCE_S))]
        deadline = time.monotonic() + _FORK_PATIENCE_S
        while True:
            ticket = self._exclusive.take(_FORK_PATIENCE_S)
            if not self._lent or time.monotonic() >= deadline:
                break
            if ticket is not None:
                self._exclusive.give_back(ticket)
            time.sleep(0.001)
        self._held.append((self._exclusive, ticket))

    def go_on(self) -> None:
        """After a fork, in both processes: let the waiting threads continue."""
        while self._held:
            guard, ticket = self._held.pop()
            if ticket is not None:
                guard.give_back(ticket)

    def leave_to_parent(self) -> None:
        """In a forked child: abandon what belongs to the parent, without changing it."""
        moments = [moment.connection for moment in self._moments if moment.connection is not None]
        abandon([*self._idle, *moments, *([self._writer] if self._writer else [])])
        for moment in list(self._moments):
            moment.connection, moment.ended = None, True
        self._lock.abandon()
        self.journal.abandon()


_opened: weakref.WeakSet[FileAdapter] = weakref.WeakSet()
_forking = threading.RLock()
_still: list[FileAdapter] = []


def _before_fork() -> None:
    # A thread inside SQLite may hold one of its process-wide mutexes. The child would inherit the mutex locked, without
    # the thread that unlocks it, and hang at its first use of any database (seen in 2 of 1,300 forks under load).
    _forking.acquire()
    _still.extend(_opened)
    for adapter in _still:
        adapter.hold_still()


def _after_fork() -> None:
    while _still:
        _still.pop().go_on()
    _forking.release()


def _after_fork_in_child() -> None:
    _after_fork()
    for adapter in list(_opened):
        adapter.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
