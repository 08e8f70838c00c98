"""Reading a store without opening it, for tools, even while an engine uses it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final, Self

import msgspec

from scopestate.actors.ports import Answer, Row
from scopestate.errors import StorageError, StoreCorrupt, StoreUnusable
from scopestate.ops.turns import Entry, Range
from scopestate.paths import expand_home
from scopestate.persistence.sqlite.answers import read_answers
from scopestate.persistence.sqlite.database import LIBRARY_ERRORS, connect, database_uri, storage_error
from scopestate.persistence.sqlite.files import create_private, find_copies, open_regular
from scopestate.persistence.sqlite.lock import may_be_held, read_committed
from scopestate.persistence.sqlite.migration import rebuild, upgrade
from scopestate.persistence.sqlite.opening import lost
from scopestate.persistence.sqlite.rows import read_keys, read_names, read_pages, revision_of
from scopestate.persistence.sqlite.schema import (
    VERSION,
    DamagedError,
    check_header,
    find_problems,
    number,
    probe,
    version_of,
)

_STEPS_OF_A_ROW: Final = 85
"""Measured with SQLite 3.40, 2,000 to 200,000 rows of 50 to 1,000 bytes."""
_STEPS_TOLD: Final = 20_000


class ScopeSize(msgspec.Struct, frozen=True):
    """The size of a scope. Keys that have expired do not count."""

    scope: str
    keys: int
    bytes: int
    """Size of all its values, as JSON."""
    revision: int
    """The number of its last write."""
    expiring: int
    """How many of its keys have a deadline."""


class StoreFacts(msgspec.Struct, frozen=True):
    """What a store notes about itself."""

    id: str
    """Given to the store when it was created; a copy of the directory has the same."""
    in_use: bool
    """True while an engine has it open, or if the last one ended without closing it."""
    ends: int
    """How often an engine ended without closing it. After each such end, the numbers of writes continue with a gap."""
    saved_ms: int
    """When it was saved last, in milliseconds since the epoch; 0 if that is not known."""
    expired: int
    """Keys that have expired, and whose removal is not saved yet."""
    answers: int
    """Kept answers to calls with an idempotency key."""


class StoreReader:
    """Reads the committed content of a store's directory, as of the moment of opening. Takes no lock, writes nothing.

    Unlike opening the store, it never sets a damaged database aside. For most readers SQLite creates files beside the
    database. To avoid that, it reads in one of three ways:

    - an engine holds the store: those files exist already;
    - no engine does, and the write-ahead log is empty: the database file alone, which must not change in that time;
    - no engine does, and the log has content, as after a crash: a copy of both in a temporary directory.

    A store of an earlier version is not migrated: a migrated copy in a temporary directory is read.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Raises StoreUnusable if there is no store of scopestate, StoreCorrupt if it is damaged, or StorageError."""
        self.directory = os.path.realpath(expand_home(directory))
        self.path = os.path.join(self.directory, "state.db")
        # Read before the database, which an engine may be writing: it then holds at least this commit.
        try:
            with open_regular(os.path.join(self.directory, "state.lock")) as file:
                self._committed = read_committed(file.read())
        except OSError:
            self._committed = None
        try:
            size = os.stat(self.path).st_size
            with open_regular(self.path) as file:
                header = file.read(100)
        except OSError as error:
            raise StoreUnusable(
                f"there is no store in {self.directory}: {self.path}: {error.strerror or error}"
            ) from error
        try:
            check_header(header, size, self.path, logged=os.path.exists(self.path + "-wal"))
        except DamagedError as error:
            raise StoreCorrupt(f"the database {self.path} is damaged: {error}; nothing was changed") from error
        self._resources = ExitStack()
        self._unchanged: tuple[int, ...] | None = None
        """Identifies the content of a database that is read without locks; None otherwise."""
        self._interrupted = False
        try:
            with self._translated("open the database"):
                uri = self._uri()
                self._connection = self._original = self._resources.enter_context(closing(connect(uri)))
            now_ms = time.time_ns() // 1_000_000
            with self._translated("read the database"):
                if 0 < (version := version_of(self._original, self.path)) < VERSION:
                    self._connection = self._migrated(uri, version)
                self._connection.execute("PRAGMA query_only = 1")
                self._connection.execute("BEGIN")
                probe(self._connection)
                self._now_ms = max(now_ms, number(self._connection, "SELECT clock FROM store"))
        except DamagedError as error:
            self.close()
            raise StoreCorrupt(f"the database {self.path} is damaged: {error}; nothing was changed") from error
        except BaseException:
            self.close()
            raise

    def facts(self) -> StoreFacts:
        """Return what the store notes about itself. Reads the deadline of every row."""
        with self._translated("read what the store notes"):
            ((id_, clean, saved_ms, ends, expired, answers),) = self._connection.execute(
                "SELECT id, clean, clock, (SELECT max(epoch) FROM epochs),"
                " (SELECT count(*) FROM state WHERE expires <= :now), (SELECT count(*) FROM answers) FROM store",
                {"now": self._now_ms},
            ).fetchall()
            return StoreFacts(id_, not clean, ends, saved_ms, expired, answers)

    def sizes(self) -> list[ScopeSize]:
        """Return the sizes of the scopes that hold a key, sorted by name. Reads the length of every row."""
        with self._translated("measure the scopes"):
            return [
                ScopeSize(*row)
                for row in self._connection.execute(
                    "SELECT scope, count(*), sum(length(CAST(value AS BLOB))),"
                    " (SELECT revision FROM scopes WHERE scopes.scope = entries.scope), count(expires)"
                    " FROM entries WHERE expires IS NULL OR expires > :now GROUP BY scope ORDER BY scope",
                    {"now": self._now_ms},
                )
            ]

    def scopes(self, *, empty: bool = False) -> list[str]:
        """Return the scopes that hold a key, sorted by name; with `empty`, also those that were written before."""
        with self._translated("list the scopes"):
            return read_names(self._connection, empty=empty)

    def revision(self, scope: str) -> int:
        """Return the number of a scope's last write."""
        with self._translated(f"read scope {scope!r}"):
            return revision_of(self._connection, scope)

    def entries(self, scope: str) -> Iterator[tuple[str, Entry]]:
        """Yield keys and entries in insertion order, without those that have expired.

        Raises StorageError for a row that is not JSON.
        """
        for key, row in self.rows(scope):
            yield key, Entry(row.json, row.revision, row.expires_ms)

    def rows(self, scope: str) -> Iterator[tuple[str, Row]]:
        """As `entries`, with what the store needs to write the key again."""
        with self._translated(f"read scope {scope!r}"):
            for key, row in read_pages(self._connection, scope):
                if row.expires_ms is None or row.expires_ms > self._now_ms:
                    yield key, row

    def keys(self, scope: str, within: Range) -> Iterator[str]:
        """Yield the keys within a range, in its order, without those that have expired. Reads no values."""
        with self._translated(f"read the keys of scope {scope!r}"):
            yield from read_keys(self._connection, scope, within, self._now_ms)

    def answers(self, scope: str) -> dict[str, Answer]:
        """Return the kept answers of a scope: idempotency key -> answer, the oldest first."""
        with self._translated(f"read the answers of scope {scope!r}"):
            return read_answers(self._connection, scope)

    def size_bytes(self) -> int:
        """Return the size of the database on the disk in bytes, its write-ahead log included."""
        return sum(os.stat(path).st_size for path in (self.path, self.path + "-wal") if os.path.exists(path))

    def is_own_file(self, path: str) -> bool:
        """Tell whether `path` is one of the files of this store."""
        for suffix in ("state.db", "state.db-wal", "state.db-shm", "state.lock", "state.attempts"):
            try:
                if os.path.samefile(path, os.path.join(self.directory, suffix)):
                    return True
            except OSError:
                continue
        return False

    def steps_to_check(self) -> int:
        """Return about how many steps `problems` takes: instructions of SQLite."""
        with self._translated("count the rows"):
            counted = "(SELECT count(*) FROM {})".format
            rows = " + ".join(map(counted, ("state", "journal", "answers", "dead_letters", "deliveries")))
            return _STEPS_OF_A_ROW * number(self._connection, f"SELECT {rows}")

    def problems(self, progress: Callable[[int], object] = bool) -> list[str]:
        """Read the whole database and return its problems as text; empty if it is sound.

        `progress(steps)` is called from time to time, on this thread. Raises StorageError if another thread has called
        `interrupt`.
        """
        steps = 0

        def step() -> bool:
            nonlocal steps
            steps += _STEPS_TOLD
            progress(steps)
            return self._interrupted  # True ends the statement

        with self._translated("check the database"):
            self._connection.set_progress_handler(step, _STEPS_TOLD)
            try:
                problems = find_problems(self._connection)
            finally:
                self._connection.set_progress_handler(None, 0)
            if self._original is not self._connection:
                found = self._original.execute("PRAGMA integrity_check(100)").fetchall()
                problems += [str(text) for (text,) in found if text != "ok"]
            missing = lost(self._original, self.path, self._committed)
            if missing is not None:
                problems.append(missing)
            problems += [
                f"acknowledged writes were lost before: {copy} is the log of that time. Remove it after use"
                for copy in find_copies(self.path + "-wal")
            ]
            return problems

    def interrupt(self) -> None:
        """End a call of `problems` on another thread. From any thread."""
        self._interrupted = True
        # Some of the work of an integrity check is one instruction, in which the progress handler is not called.
        self._connection.interrupt()
        self._original.interrupt()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._resources.close()

    def _uri(self) -> str:
        logged = os.path.exists(self.path + "-wal") and os.stat(self.path + "-wal").st_size > 0
        if may_be_held(os.path.join(self.directory, "state.lock")) and os.path.exists(self.path + "-shm"):
            return database_uri(self.path, "ro")
        if not logged:
            self._unchanged = self._content()
            return database_uri(self.path, "ro") + "&immutable=1"
        copy = os.path.join(self._resources.enter_context(TemporaryDirectory(prefix="scopestate-")), "state.db")
        for suffix in ("", "-wal"):
            shutil.copyfile(self.path + suffix, copy + suffix)
        return database_uri(copy, "ro")

    def _migrated(self, uri: str, version: int) -> sqlite3.Connection:
        path = os.path.join(self._resources.enter_context(TemporaryDirectory(prefix="scopestate-")), "migrated.db")
        create_private(path)
        if version == 1:
            rebuild(uri, path)
        else:
            with closing(connect(database_uri(path, "rw"))) as copy:
                self._original.backup(copy)
                upgrade(copy, path)
        return self._resources.enter_context(closing(connect(database_uri(path, "ro"))))

    def _content(self) -> tuple[int, ...]:
        status = os.stat(self.path)
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
            if self._unchanged is not None and self._content() != self._unchanged:
                raise StorageError(
                    f"cannot {doing}: {self.path} was changed while it was read, by an engine that has just been "
                    "started; try again"
                )
        except OSError as error:
            raise StorageError(f"cannot {doing}: {error.filename or self.path}: {error.strerror or error}") from error
        except LIBRARY_ERRORS as error:
            if isinstance(error, sqlite3.DatabaseError) and "malformed" in str(error):
                raise StoreCorrupt(f"cannot {doing}: the database {self.path} is damaged: {error}") from error
            raise storage_error(error, doing, self.path) from error
