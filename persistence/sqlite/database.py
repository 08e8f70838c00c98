"""The database of a store: how connections are opened, and what SQLite's errors mean."""

from __future__ import annotations

import ctypes
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from urllib.parse import quote

from scopestate.errors import StorageError, StoreCorrupt

Connect = Callable[[str], sqlite3.Connection]
"""Opens a database, given a `file:` URI. Tests pass one that injects faults."""

LIBRARY_ERRORS = (sqlite3.Error, OverflowError, UnicodeError)
"""The errors that the sqlite3 module raises: its own, and others for ints over 64 bits and for lone surrogates."""

_CACHED_STATEMENTS = 64
_CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

_CAUSES = {
    sqlite3.SQLITE_FULL: "the disk is full or the database reached its largest allowed size; free some space",
    sqlite3.SQLITE_BUSY: "another process holds the database (a sqlite3 tool with an open transaction?); stop it",
    sqlite3.SQLITE_LOCKED: "another connection holds the database; end its transaction",
    sqlite3.SQLITE_READONLY: "the database may not be written; check its permissions and whether the disk is read-only",
    sqlite3.SQLITE_IOERR: "the disk reported an input/output error; check the disk",
    sqlite3.SQLITE_CANTOPEN: "a file of the store cannot be opened; check the directory and its permissions",
    sqlite3.SQLITE_TOOBIG: "a row is larger than SQLite can hold",
}


def connect(uri: str) -> sqlite3.Connection:
    """Open a `file:` URI with explicit transactions. Any thread may use the connection, one at a time."""
    connection = sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, cached_statements=_CACHED_STATEMENTS
    )
    try:
        # There may be no place for temporary files: the rest of the file system may be read-only.
        connection.execute("PRAGMA temp_store = MEMORY")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def writing(connection: sqlite3.Connection) -> Iterator[None]:
    """Run the block in one transaction, which holds the write lock from its beginning: all of it counts, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def database_uri(path: str, mode: str) -> str:
    """Return the URI of a database file. `mode`: `ro`, `rw` (never creates the file) or `rwc`."""
    return f"file:{quote(os.fsencode(path))}?mode={mode}"


def primary_code(error: BaseException) -> int:
    """Return SQLite's primary result code; -1 if the error does not come from SQLite."""
    code = getattr(error, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else -1


def is_corruption(error: BaseException) -> bool:
    """Tell whether SQLite found that the file is damaged or not a database."""
    return primary_code(error) in _CORRUPT


def storage_error(error: BaseException, doing: str, path: str) -> StorageError:
    """Translate a library error. `doing` completes "cannot ...": `save 3 scopes`."""
    if is_corruption(error):
        return StoreCorrupt(
            f"cannot {doing}: the database {path} is damaged ({error}). Nothing is overwritten and saving "
            "has stopped. Close the engine, then repair a copy (sqlite3's `.recover`) or restore a backup"
        )
    cause = _CAUSES.get(primary_code(error))
    detail = f"{cause} ({error})" if cause else str(error)
    return StorageError(f"cannot {doing} in {path}: {detail}")


def abandon(connections: Iterable[sqlite3.Connection]) -> None:
    """Make sure that these connections are never closed, not even when the interpreter ends. For a forked child.

    Closing them does harm: the last connection to close checkpoints and deletes the write-ahead log, based on what it
    knew at the time of the fork (https://sqlite.org/howtocorrupt.html, section 2.6). Refused: keeping them in a list of
    the module, which the interpreter clears at exit. The cost is a few open descriptors until the child ends.
    """
    for connection in connections:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
