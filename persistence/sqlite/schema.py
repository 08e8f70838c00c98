"""The database of the file adapter: its tables, its marks, and how older versions are brought up to date."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping

from scopestate.errors import StoreUnusable

APPLICATION_ID = 0x73636F70
"""`scop` in ASCII, at offset 68 of the file: `file state.db` and we recognise our own."""

_MAGIC = b"SQLite format 3\x00"
_HEADER_BYTES = 100


class DamagedError(Exception):
    """The file cannot be the whole database that was written here; the text says why. Stays inside this package."""


def _create(connection: sqlite3.Connection) -> None:
    # A table with rowids, not WITHOUT ROWID: measured with 1.5 KB values it takes half the disk (100 against 225 MB)
    # and a quarter of the saving time, because clustered rows of that size leave four to a page or overflow.
    # `position` stands before `value`: reading it does not walk through a large value.
    connection.execute(
        "CREATE TABLE state ("
        " scope TEXT NOT NULL, key TEXT NOT NULL, position INTEGER NOT NULL, value TEXT NOT NULL,"
        " UNIQUE (scope, key))"
    )
    # Costs a second index entry per *created* key only (overwriting touches neither index); in return a scope of any
    # size is read in order, page by page. Refused: sorting at load, 1.3 s instead of 0.3 s for 500,000 keys.
    connection.execute("CREATE INDEX state_order ON state (scope, position)")
    connection.execute("CREATE TABLE scopes (scope TEXT NOT NULL PRIMARY KEY, sequence INTEGER NOT NULL) WITHOUT ROWID")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


MIGRATIONS: Mapping[int, Callable[[sqlite3.Connection], None]] = {0: _create}
"""Schema version -> the step to the next one. A step runs inside the transaction that raises `user_version`."""

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
    """Judge the first bytes of a non-empty file of `size` bytes, before SQLite may touch it.

    `logged`: a write-ahead log lies beside it; then a stopped checkpoint may have left the last page half-written.
    Raises `StoreUnusable` for somebody else's database, `DamagedError` for what is no database.
    """
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise DamagedError("it is not an SQLite database")
    found = int.from_bytes(header[68:72], "big")
    if found not in (0, APPLICATION_ID):
        raise StoreUnusable(_foreign(path, f"application_id is {found:#x}"))
    page_size = int.from_bytes(header[16:18], "big")
    # SQLite counts a half page as a whole one and would take the missing half for zeros. (65536 is stored as 1.)
    if page_size > 1 and size % page_size and not logged:
        raise DamagedError("its last page is cut off")


def migrate(connection: sqlite3.Connection, path: str) -> None:
    """Create the tables, or bring an older version up to date; all in one transaction.

    Raises `StoreUnusable` if the database belongs to something else or to a newer scopestate.
    """
    version = _number(connection, "PRAGMA user_version")
    if version == VERSION and _number(connection, "PRAGMA application_id") == APPLICATION_ID:
        return
    # The locked transaction starts before the decision: two processes may be creating the file at once.
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
    """Touch both ends of every tree: constant time, finds truncation and missing tables.

    Refused: `PRAGMA quick_check`, which reads the whole file (seconds for a million keys).
    Raises `DamagedError`, or lets SQLite's own error through.
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
    """Read everything and return what is wrong, in words; empty if nothing is."""
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
