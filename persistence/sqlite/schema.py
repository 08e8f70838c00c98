"""The schema of a store's database, how it is recognised, and what is wrong with a database that has it.

A row of `state` is found by its `id`, which is made of an extent and the number of the write that created the key
(docs/design/0036-schema-2.md). The view `entries` shows the keys with the names of their scopes.
"""

from __future__ import annotations

import sqlite3
from typing import Final, NamedTuple
from uuid import uuid4

from scopestate.errors import StoreUnusable

APPLICATION_ID: Final = 0x73636F70
"""`scop` in ASCII, at offset 68 of the file: shown by `file state.db`, and how a store of ours is recognised."""

VERSION: Final = 2

RESERVED: Final = 2**32
"""Numbers that a scope may give after those that are saved. They are skipped if the store was not closed in order."""
HIGHEST_REVISION: Final = 2**53 - 1
"""Programs in JavaScript read numbers as doubles."""

EXTENT_BITS: Final = 24
"""An extent has the ids of the keys that were created by 2**24 writes in a row of one scope."""
EXTENT_MASK: Final = (1 << EXTENT_BITS) - 1

_MAGIC = b"SQLite format 3\x00"
_HEADER_BYTES = 100


class DamagedError(Exception):
    """The file is not the complete database that was written here; the text says why. Stays inside this package."""


_TABLES: Final = f"""
CREATE TABLE store (  -- one row
    id TEXT NOT NULL,
    clean INTEGER NOT NULL,    -- 1: it was closed after everything was saved
    extents INTEGER NOT NULL,  -- the highest extent ever given
    clock INTEGER NOT NULL     -- the time of the last save, in ms since 1970
);
CREATE TABLE epochs (  -- an epoch begins with each session after one that was not closed in order
    epoch INTEGER PRIMARY KEY,
    position INTEGER NOT NULL  -- of the journal at that moment
);
CREATE TABLE scopes (
    number INTEGER PRIMARY KEY,
    scope TEXT NOT NULL UNIQUE,
    revision INTEGER NOT NULL, -- the number of its last write
    epoch INTEGER NOT NULL,    -- in which that was saved
    due INTEGER                -- when its first key expires, in ms since 1970, or earlier
);
CREATE INDEX scopes_due ON scopes (due) WHERE due IS NOT NULL;
CREATE TABLE extents (
    extent INTEGER PRIMARY KEY,
    scope INTEGER NOT NULL,
    high INTEGER NOT NULL,     -- the number of the write that created a key, without its lowest {EXTENT_BITS} bits
    UNIQUE (scope, high)
);
CREATE TABLE state (
    id INTEGER PRIMARY KEY,    -- the extent, and the lowest {EXTENT_BITS} bits of the write that created the key
    key TEXT NOT NULL,
    revision INTEGER NOT NULL, -- the write that changed it last
    expires INTEGER,
    value TEXT NOT NULL        -- last: reading another column does not read through a large value
);
CREATE VIEW entries AS
    SELECT scopes.scope AS scope, state.key AS key, state.value AS value, state.revision AS revision,
        (extents.high << {EXTENT_BITS}) | (state.id & {EXTENT_MASK}) AS created, state.expires AS expires,
        state.id AS id
    FROM scopes JOIN extents ON extents.scope = scopes.number JOIN state
        ON state.id BETWEEN extents.extent << {EXTENT_BITS} AND (extents.extent << {EXTENT_BITS}) + {EXTENT_MASK};
CREATE TABLE journal (  -- the changes of scopes that keep a history
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    scope INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    batch INTEGER,             -- the last revision of its transaction, if that changed several keys
    kind INTEGER NOT NULL,
    time INTEGER NOT NULL,
    depth INTEGER NOT NULL,    -- how many handlers deep it was caused
    key TEXT NOT NULL,
    old TEXT,
    new TEXT
);
CREATE UNIQUE INDEX journal_scope ON journal (scope, revision);
CREATE TABLE consumers (  -- durable triggers
    number INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    filter TEXT NOT NULL,
    created INTEGER NOT NULL,
    paused INTEGER NOT NULL,
    done INTEGER NOT NULL      -- everything up to this position of the journal is acknowledged
);
CREATE TABLE deliveries (  -- what is tried again, and what is acknowledged out of order
    consumer INTEGER NOT NULL,
    position INTEGER NOT NULL,
    done INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    first_at INTEGER,
    due INTEGER,
    error TEXT,
    PRIMARY KEY (consumer, position)
) WITHOUT ROWID;
CREATE TABLE dead_letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    consumer INTEGER NOT NULL,
    position INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    first_at INTEGER NOT NULL,
    died_at INTEGER NOT NULL,
    event TEXT NOT NULL,       -- a copy: the journal may be trimmed
    error TEXT NOT NULL
);
CREATE INDEX dead_letters_consumer ON dead_letters (consumer, id);
CREATE TABLE answers (  -- to calls with an idempotency key, in the order in which they were saved
    id INTEGER PRIMARY KEY,
    scope INTEGER NOT NULL,
    token TEXT NOT NULL,       -- the idempotency key
    time INTEGER NOT NULL,
    request BLOB NOT NULL,     -- a digest of the call, to notice another one with the same key
    answer BLOB NOT NULL,
    UNIQUE (scope, token)
)
"""  # noqa: S608 - constants

_BOTH_ENDS = {
    "state": ("id",),
    "scopes": ("number", "scope"),
    "scopes WHERE due IS NOT NULL": ("due",),
    "sqlite_sequence": ("rowid",),
    "extents": ("extent", "scope, high"),
    "epochs": ("epoch",),
    "journal": ("position", "scope, revision"),
    "consumers": ("number", "name"),
    "deliveries": ("consumer, position",),
    "dead_letters": ("id", "consumer, id"),
    "answers": ("id", "scope, token"),
}
"""Table -> the orders in which it can be read without sorting: its B-trees."""


def create_tables(connection: sqlite3.Connection) -> None:
    """Create the tables of an empty store, and its marks, within the caller's transaction."""
    # Not executescript, which would end the transaction.
    for statement in _TABLES.split(";"):
        connection.execute(statement)
    connection.execute("INSERT INTO store VALUES (?, 1, 0, 0)", (uuid4().hex,))
    connection.execute("INSERT INTO epochs VALUES (0, 0)")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {VERSION}")


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


def version_of(connection: sqlite3.Connection, path: str) -> int:
    """Return the schema version of a database; 0 if it is empty.

    Raises `StoreUnusable` for the database of another program or of a newer scopestate.
    """
    version = number(connection, "PRAGMA user_version")
    if number(connection, "PRAGMA application_id") != APPLICATION_ID:
        if number(connection, "SELECT count(*) FROM sqlite_master"):
            raise StoreUnusable(_foreign(path, "its tables are not ours"))
        if version:
            raise StoreUnusable(_foreign(path, f"user_version is {version}"))
    if not 0 <= version <= VERSION:
        raise StoreUnusable(
            f"the database {path} has schema version {version}, this scopestate knows versions up to {VERSION}: it was "
            "written by a newer scopestate. Use that version, or another directory; nothing was changed"
        )
    return version


def create_if_empty(connection: sqlite3.Connection, path: str) -> None:
    """Create the tables in an empty database, in one transaction. Raises what `version_of` raises."""
    if version_of(connection, path):
        return
    # The transaction takes the write lock before the decision: two processes may be creating the file at once.
    connection.execute("BEGIN IMMEDIATE")
    try:
        if not version_of(connection, path):
            create_tables(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


class Session(NamedTuple):
    """One opening of a store, until it is closed."""

    store_id: str
    epoch: int
    clock_ms: int
    """The time of the last save before it, in milliseconds since the epoch."""


def begin_session(connection: sqlite3.Connection, *, lost: bool) -> Session:
    """Note on the disk that the store is in use.

    `lost`: saved writes are missing. Then, or if the store was not closed in order, a new epoch begins: scopes may have
    given numbers that are not saved, and must not give them again. One commit, before any scope gives a number.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        ((store_id, clean, clock_ms),) = connection.execute("SELECT id, clean, clock FROM store").fetchall()
        epoch = number(connection, "SELECT max(epoch) FROM epochs")
        if lost or not clean:
            epoch += 1
            # Not max(position): the rows behind it may have been trimmed.
            given = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'journal'), 0)"
            connection.execute("INSERT INTO epochs VALUES (?, ?)", (epoch, number(connection, given)))
        connection.execute("UPDATE store SET clean = 0")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return Session(store_id, epoch, clock_ms)


def end_session(connection: sqlite3.Connection, clock_ms: int) -> None:
    """Note that everything was saved: the next session goes on with the next number of each scope."""
    connection.execute("UPDATE store SET clean = 1, clock = max(clock, ?)", (clock_ms,))


def probe(connection: sqlite3.Connection) -> None:
    """Read both ends of every B-tree, in constant time: finds truncation and missing tables.

    Refused: `PRAGMA quick_check`, which reads the whole file (seconds for a million keys).
    Raises `DamagedError`, or an error of SQLite.
    """
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    missing = {table.partition(" ")[0] for table in _BOTH_ENDS} | {"store", "entries"}
    missing -= names
    if missing:
        raise DamagedError(f"it has no {' and no '.join(sorted(missing))}")
    read = "SELECT id, clean, extents, clock, (SELECT max(epoch) FROM epochs) FROM store"
    if [[type(fact) for fact in row] for row in connection.execute(read)] != [[str, int, int, int, int]]:
        raise DamagedError("its table `store` does not have one row with an id and numbers, or `epochs` is empty")
    for table, orders in _BOTH_ENDS.items():
        for order in orders:
            columns, backwards = f"SELECT {order} FROM {table}", order.replace(",", " DESC,")  # noqa: S608 - ours
            connection.execute(f"{columns} ORDER BY {order} LIMIT 1").fetchall()
            connection.execute(f"{columns} ORDER BY {backwards} DESC LIMIT 1").fetchall()


def number(connection: sqlite3.Connection, statement: str) -> int:
    """Return the only number of a statement's only row."""
    (row,) = connection.execute(statement).fetchall()
    return int(row[0])


def _foreign(path: str, reason: str) -> str:
    return (
        f"{path} is an SQLite database, but not one of scopestate ({reason}). Choose another directory; "
        "the file was not changed"
    )


_ABOVE_ITS_SCOPE: Final = f"""
    SELECT entries.scope, key, entries.revision FROM entries JOIN scopes USING (scope)
    WHERE max(entries.created, entries.revision)
        > scopes.revision + ((SELECT max(epoch) FROM epochs) - scopes.epoch) * {RESERVED} LIMIT 100
"""  # noqa: S608 - constants
_OF_NO_SCOPE: Final = f"""
    SELECT id, key FROM state WHERE NOT EXISTS (SELECT 1 FROM extents JOIN scopes ON scopes.number = extents.scope
        WHERE extents.extent = state.id >> {EXTENT_BITS}) LIMIT 100
"""  # noqa: S608 - constants


_DUE_TOO_LATE: Final = """
    SELECT scopes.scope, min(expires), due FROM entries JOIN scopes USING (scope) WHERE expires IS NOT NULL
    GROUP BY scope HAVING due IS NULL OR due > min(expires) LIMIT 100
"""
_ANSWERS_OF_NO_SCOPE: Final = """
    SELECT token FROM answers WHERE NOT EXISTS (SELECT 1 FROM scopes WHERE number = answers.scope) LIMIT 100
"""


def find_problems(connection: sqlite3.Connection) -> list[str]:
    """Read the whole database and return its problems as text; empty if it is sound."""
    problems = [str(text) for (text,) in connection.execute("PRAGMA integrity_check(100)") if text != "ok"]
    problems += [
        f"the value for key {key!r} of scope {scope!r} is not JSON"
        for scope, key in connection.execute("SELECT scope, key FROM entries WHERE NOT json_valid(value) LIMIT 100")
    ]
    problems += [
        f"key {key!r} of scope {scope!r} is stored {count} times"
        for scope, key, count in connection.execute(
            "SELECT scope, key, count(*) FROM entries GROUP BY scope, key HAVING count(*) > 1 LIMIT 100"
        )
    ]
    problems += [
        f"key {key!r} of scope {scope!r}, with the revision {revision}, has a number above that of its scope"
        for scope, key, revision in connection.execute(_ABOVE_ITS_SCOPE)
    ]
    problems += [
        f"the row {id_} of the table `state`, for key {key!r}, belongs to no scope"
        for id_, key in connection.execute(_OF_NO_SCOPE)
    ]
    problems += [
        f"a key of scope {scope!r} expires at {first_ms}, and the scope is looked at {'never' if due is None else due}"
        for scope, first_ms, due in connection.execute(_DUE_TOO_LATE)
    ]
    problems += [
        f"the answer for the idempotency key {token!r} belongs to no scope"
        for (token,) in connection.execute(_ANSWERS_OF_NO_SCOPE)
    ]
    return problems
