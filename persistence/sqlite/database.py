"""The database of a store: opening connections, SQLite's errors as ours, the schema and its migrations."""

from __future__ import annotations

import ctypes
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import quote

from scopestate.errors import StorageError, StoreCorrupt, StoreUnusable

Connect = Callable[[str], sqlite3.Connection]
"""Opens a database, given a `file:` URI. Tests pass one that injects faults."""

LIBRARY_ERRORS = (sqlite3.Error, OverflowError, UnicodeError)
"""What the sqlite3 module raises: its own errors, and others for ints over 64 bits and for lone surrogates."""

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


# -------------------------------------------------------------------------------------------------------------- schema

APPLICATION_ID = 0x73636F70
"""`scop` in ASCII, at offset 68 of the file: shown by `file state.db`, and how a store of ours is recognised."""

_MAGIC = b"SQLite format 3\x00"
_HEADER_BYTES = 100


class DamagedError(Exception):
    """The file is not the complete database that was written here; the text says why. Stays inside this package."""


def _create(connection: sqlite3.Connection) -> None:
    # A table with rowids: measured with values of 1.5 KB, it takes half of the disk (100 against 225 MB) and a quarter
    # of the saving time of one WITHOUT ROWID, whose rows of that size fill a page with four, or overflow.
    # `position` comes before `value`, so that reading it does not read through a large value.
    connection.execute(
        "CREATE TABLE state ("
        " scope TEXT NOT NULL, key TEXT NOT NULL, position INTEGER NOT NULL, value TEXT NOT NULL,"
        " UNIQUE (scope, key))"
    )
    # With this index a scope of any size is read in order, page by page. It costs a second index entry for each key
    # that is created; overwriting changes neither index. Refused: sorting at load, 1.3 s instead of 0.3 s for 500,000
    # keys.
    connection.execute("CREATE INDEX state_order ON state (scope, position)")
    connection.execute("CREATE TABLE scopes (scope TEXT NOT NULL PRIMARY KEY, sequence INTEGER NOT NULL) WITHOUT ROWID")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


MIGRATIONS: Mapping[int, Callable[[sqlite3.Connection], None]] = {0: _create}
"""Schema version -> the step to the next one. A step runs in the transaction that increases `user_version`."""

VERSION = max(MIGRATIONS) + 1

_PROBES = (
    "SELECT scope, key, position FROM state ORDER BY scope, key LIMIT 1",
    "SELECT scope, key, position FROM state ORDER BY scope DESC, key DESC LIMIT 1",
    "SELECT scope, position FROM state ORDER BY scope, position LIMIT 1",
    "SELECT scope, position FROM state ORDER BY scope DESC, position DESC LIMIT 1",
    "SELECT scope, sequence FROM scopes ORDER BY scope LIMIT 1",
    "SELECT scope, sequence FROM scopes ORDER BY scope DESC LIMIT 1",
)


def check_header(header: bytes, size: int, path: str, *, logged: bool) -> None:
    """Check the first bytes of a file of `size` bytes, which is not empty, before SQLite opens it.

    `logged`: there is a write-ahead log, so an interrupted checkpoint may have left the last page half-written.
    Raises `StoreUnusable` for the database of another program, `DamagedError` if it is not a database.
    """
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise DamagedError("it is not an SQLite database")
    found = int.from_bytes(header[68:72], "big")
    if found not in (0, APPLICATION_ID):
        raise StoreUnusable(_foreign(path, f"application_id is {found:#x}"))
    page_size = int.from_bytes(header[16:18], "big")
    # SQLite would treat half a page as a whole one, with zeros for the missing half. (65536 is stored as 1.)
    if page_size > 1 and size % page_size and not logged:
        raise DamagedError("its last page is cut off")


def migrate(connection: sqlite3.Connection, path: str) -> None:
    """Create the tables, or migrate an older version, in one transaction.

    Raises `StoreUnusable` for the database of another program or of a newer scopestate.
    """
    version = _number(connection, "PRAGMA user_version")
    if version == VERSION and _number(connection, "PRAGMA application_id") == APPLICATION_ID:
        return
    # The transaction takes the write lock before the decision: two processes may be creating the file at once.
    connection.execute("BEGIN IMMEDIATE")
    try:
        _migrate_locked(connection, path)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _migrate_locked(connection: sqlite3.Connection, path: str) -> None:
    version = _number(connection, "PRAGMA user_version")
    ours = _number(connection, "PRAGMA application_id") == APPLICATION_ID
    if not ours and _number(connection, "SELECT count(*) FROM sqlite_master"):
        raise StoreUnusable(_foreign(path, "its tables are not ours"))
    if not ours and version:
        raise StoreUnusable(_foreign(path, f"user_version is {version}"))
    if not 0 <= version <= VERSION:
        raise StoreUnusable(
            f"the database {path} has schema version {version}, this scopestate knows versions up to {VERSION}: it was "
            "written by a newer scopestate. Use that version, or another directory; nothing was changed"
        )
    for step in range(version, VERSION):
        MIGRATIONS[step](connection)
    connection.execute(f"PRAGMA user_version = {VERSION}")


def probe(connection: sqlite3.Connection) -> None:
    """Read both ends of every B-tree, in constant time: finds truncation and missing tables.

    Refused: `PRAGMA quick_check`, which reads the whole file (seconds for a million keys).
    Raises `DamagedError`, or an error of SQLite.
    """
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    missing = {"state", "scopes", "state_order"} - names
    if missing:
        raise DamagedError(f"it has no {' and no '.join(sorted(missing))}")
    for statement in _PROBES:
        connection.execute(statement).fetchall()


def _number(connection: sqlite3.Connection, statement: str) -> int:
    (row,) = connection.execute(statement).fetchall()
    return int(row[0])


def _foreign(path: str, reason: str) -> str:
    return (
        f"{path} is an SQLite database, but not one of scopestate ({reason}). Choose another directory; "
        "the file was not changed"
    )


def find_problems(connection: sqlite3.Connection) -> list[str]:
    """Read the whole database and return its problems as text; empty if it is sound."""
    problems = [str(text) for (text,) in connection.execute("PRAGMA integrity_check(100)") if text != "ok"]
    problems += [
        f"the value for key {key!r} of scope {scope!r} is not JSON"
        for scope, key in connection.execute("SELECT scope, key FROM state WHERE NOT json_valid(value) LIMIT 100")
    ]
    problems += [
        f"scope {scope!r} holds keys but has no sequence"
        for (scope,) in connection.execute(
            "SELECT DISTINCT scope FROM state WHERE NOT EXISTS"
            " (SELECT 1 FROM scopes WHERE scopes.scope = state.scope) LIMIT 100"
        )
    ]
    return problems
