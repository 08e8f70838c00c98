"""The schema of a store's database, how it is recognised, and what is wrong with a database that has it.

A row of `state` is found by its `id`, which is made of an extent and the number of the write that created the key
(docs/design/0036-schema-2.md). The view `entries` shows the keys with the names of their scopes.
"""

from __future__ import annotations

import sqlite3
from typing import Final, NamedTuple
from uuid import uuid4

from scopestate.actors.journal import EPOCH_STEP
from scopestate.errors import StoreUnusable
from scopestate.persistence.sqlite.database import writing

APPLICATION_ID: Final = 0x73636F70
"""`scop` in ASCII, at offset 68 of the file: shown by `file state.db`, and how a store of ours is recognised."""

VERSION: Final = 3

RESERVED: Final = 2**32
"""Numbers that a scope may assign after the saved ones. They are skipped if the store was not closed cleanly."""
HIGHEST_REVISION: Final = 2**53 - 1
"""Programs in JavaScript read numbers as doubles."""

EXTENT_BITS: Final = 24
"""An extent has the ids of the keys that were created by 2**24 writes in a row of one scope."""
EXTENT_MASK: Final = (1 << EXTENT_BITS) - 1

_MAGIC = b"SQLite format 3\x00"
_HEADER_BYTES = 100


class DamagedError(Exception):
    """The file is not the complete database that was written here; the text says why. Stays inside this package."""


JOURNAL_TABLES: Final = """
CREATE TABLE journal (  -- the changes that a history rule or a consumer needs
    position INTEGER PRIMARY KEY,
    scope INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    last INTEGER,              -- the last revision of its transaction, if that is not its own
    kind INTEGER NOT NULL,     -- 0 created, 1 updated, 2 deleted, 3 expired
    time INTEGER NOT NULL,
    depth INTEGER NOT NULL,    -- how many handlers deep it was caused
    size INTEGER NOT NULL,     -- what it counts in bytes
    expired INTEGER,           -- the deadline that has passed
    late INTEGER,              -- and by how many ms
    key TEXT NOT NULL,
    old TEXT,
    new TEXT
);
CREATE UNIQUE INDEX journal_scope ON journal (scope, revision);
CREATE TABLE consumers (  -- durable triggers
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    filter TEXT NOT NULL,
    created INTEGER NOT NULL,
    paused TEXT,               -- why, or NULL if it is not
    done INTEGER NOT NULL      -- up to this position every delivery is over, unless `deliveries` has it as not over
);
CREATE TABLE deliveries (  -- what is not over yet, and what is over before what stands in front of it
    consumer INTEGER NOT NULL,
    position INTEGER NOT NULL,
    over INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    first INTEGER NOT NULL,
    due INTEGER NOT NULL,
    held INTEGER NOT NULL,     -- 1: it was given up, and holds back what follows
    error TEXT,
    PRIMARY KEY (consumer, position)
) WITHOUT ROWID;
CREATE TABLE dead_letters (  -- each with a copy of its event: the journal may be trimmed
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    consumer INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    first INTEGER NOT NULL,
    died INTEGER NOT NULL,
    error TEXT NOT NULL,
    traceback TEXT NOT NULL,
    position INTEGER NOT NULL,
    scope INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    last INTEGER,
    kind INTEGER NOT NULL,
    time INTEGER NOT NULL,
    depth INTEGER NOT NULL,
    size INTEGER NOT NULL,
    expired INTEGER,
    late INTEGER,
    key TEXT NOT NULL,
    old TEXT,
    new TEXT
);
CREATE UNIQUE INDEX dead_letters_consumer ON dead_letters (consumer, position);
CREATE INDEX dead_letters_died ON dead_letters (died)
"""
"""The tables that version 3 has replaced: in a store of version 2 they are empty."""

_TABLES: Final = f"""
CREATE TABLE store (  -- one row
    id TEXT NOT NULL,
    clean INTEGER NOT NULL,    -- 1: it was closed after everything was saved
    extents INTEGER NOT NULL,  -- the highest extent ever given
    clock INTEGER NOT NULL     -- the time of the last save, in ms since 1970
);
CREATE TABLE epochs (  -- an epoch begins with each session after one that was not closed in order
    epoch INTEGER PRIMARY KEY,
    position INTEGER NOT NULL  -- of the journal: everything up to it is saved, what the epoch gave behind it is lost
);
CREATE TABLE scopes (
    number INTEGER PRIMARY KEY,
    scope TEXT NOT NULL UNIQUE,
    revision INTEGER NOT NULL, -- the number of its last write
    epoch INTEGER NOT NULL,    -- in which that was saved
    due INTEGER,               -- when its first key expires, in ms since 1970, or earlier
    floor INTEGER NOT NULL,    -- every change of a higher number is in the journal
    floor_at INTEGER NOT NULL, -- every change of a higher position is in the journal
    events INTEGER NOT NULL,   -- how many changes of it are in the journal
    bytes INTEGER NOT NULL     -- and the sum of their sizes
);
CREATE INDEX scopes_due ON scopes (due) WHERE due IS NOT NULL;
CREATE INDEX scopes_logged ON scopes (number) WHERE events > 0;
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
{JOURNAL_TABLES};
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
    "scopes WHERE events > 0": ("number",),
    "sqlite_sequence": ("rowid",),
    "extents": ("extent", "scope, high"),
    "epochs": ("epoch",),
    "journal": ("position", "scope, revision"),
    "consumers": ("number", "name"),
    "deliveries": ("consumer, position",),
    "dead_letters": ("id", "consumer, position", "died"),
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
    with writing(connection):
        if not version_of(connection, path):
            create_tables(connection)


class Session(NamedTuple):
    """One opening of a store, until it is closed."""

    store_id: str
    epochs: dict[int, int]
    """Epoch -> the position up to which it has saved everything. The last one is that of the session."""
    clock_ms: int
    """The time of the last save before it, in milliseconds since the epoch."""
    follows_close: bool
    """Whether the session before it was closed, or there was none; False: that process was killed, or failed."""

    @property
    def epoch(self) -> int:
        """The epoch of the session."""
        return max(self.epochs)


def begin_session(connection: sqlite3.Connection, *, lost: bool) -> Session:
    """Record on disk that the store is in use.

    `lost`: saved writes are missing. Then, or if the store was not closed cleanly, a new epoch begins: scopes may have
    assigned numbers that are not saved, and must not assign them again. One commit, before any scope assigns a number.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        ((store_id, clean, clock_ms),) = connection.execute("SELECT id, clean, clock FROM store").fetchall()
        epochs = dict(connection.execute("SELECT epoch, position FROM epochs ORDER BY epoch").fetchall())
        if lost or not clean:
            epoch, position = max(epochs) + 1, max(epochs.values()) + EPOCH_STEP
            epochs[epoch] = position
            connection.execute("INSERT INTO epochs VALUES (?, ?)", (epoch, position))
        # One position is left out, so that changes saved without a log come after every cursor of an earlier session.
        epochs[max(epochs)] += 1
        connection.execute("UPDATE epochs SET position = ? WHERE epoch = ?", (epochs[max(epochs)], max(epochs)))
        connection.execute("UPDATE store SET clean = 0")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return Session(store_id, epochs, clock_ms, bool(clean) and not lost)


def end_session(connection: sqlite3.Connection, clock_ms: int, settled: int) -> None:
    """Record that everything was saved, so that the next session continues with the next numbers.

    `settled` is the last position that was assigned. What an interrupted call has left open is started again.
    """
    if connection.in_transaction:
        connection.execute("ROLLBACK")
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("UPDATE store SET clean = 1, clock = max(clock, ?)", (clock_ms,))
        note_settled(connection, settled)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def note_settled(connection: sqlite3.Connection, position: int) -> None:
    """Record that everything up to a position is saved, within the caller's transaction."""
    connection.execute(
        "UPDATE epochs SET position = ? WHERE epoch = (SELECT max(epoch) FROM epochs) AND position < ?",
        (position, position),
    )


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
    if number(connection, "SELECT count(*) FROM epochs WHERE typeof(position) != 'integer'"):
        raise DamagedError("its table `epochs` has a position that is not a number")
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


_WRONG_SIZES: Final = """
    SELECT scopes.scope, events, bytes, count(position), coalesce(sum(size), 0) FROM scopes
    LEFT JOIN journal ON journal.scope = number GROUP BY number
    HAVING events != count(position) OR bytes != coalesce(sum(size), 0) LIMIT 100
"""
_NO_PLACE_IN_THE_JOURNAL: Final = """
    SELECT position, CASE
        WHEN number IS NULL THEN 'belongs to no scope'
        WHEN journal.revision > scopes.revision THEN 'has a revision above that of its scope'
        WHEN last < journal.revision THEN 'has a revision above the last one of its transaction'
        WHEN kind NOT BETWEEN 0 AND 3 THEN 'has an unknown kind'
        WHEN old NOT NULL AND NOT json_valid(old) OR new NOT NULL AND NOT json_valid(new) THEN 'does not hold JSON'
        WHEN position > (SELECT max(position) FROM epochs) + {EPOCH_STEP} THEN 'has a position that was never given'
        END AS problem
    FROM journal LEFT JOIN scopes ON number = journal.scope WHERE problem NOT NULL LIMIT 100
""".replace("{EPOCH_STEP}", str(EPOCH_STEP))
_OUT_OF_ORDER: Final = """
    SELECT later.position, scopes.scope FROM journal AS later JOIN scopes ON number = later.scope
    WHERE later.position < (SELECT position FROM journal AS earlier WHERE earlier.scope = later.scope
        AND earlier.revision < later.revision ORDER BY earlier.revision DESC LIMIT 1) LIMIT 100
"""
_DELIVERIES: Final = """
    SELECT position, consumer, CASE
        WHEN name IS NULL THEN 'belongs to no consumer'
        WHEN NOT over AND NOT EXISTS (SELECT 1 FROM journal WHERE journal.position = deliveries.position)
            THEN 'is not over, and its event is not in the journal'
        WHEN over AND position <= done THEN 'is kept although it is over'
        END AS problem
    FROM deliveries LEFT JOIN consumers ON number = consumer WHERE problem NOT NULL LIMIT 100
"""
_LETTERS: Final = """
    SELECT id, CASE
        WHEN NOT EXISTS (SELECT 1 FROM consumers WHERE number = consumer) THEN 'belongs to no consumer'
        WHEN NOT EXISTS (SELECT 1 FROM scopes WHERE number = dead_letters.scope) THEN 'belongs to no scope'
        WHEN EXISTS (SELECT 1 FROM deliveries WHERE deliveries.consumer = dead_letters.consumer
            AND deliveries.position = dead_letters.position AND NOT over AND NOT held) THEN 'is still being delivered'
        WHEN old NOT NULL AND NOT json_valid(old) OR new NOT NULL AND NOT json_valid(new) THEN 'does not hold JSON'
        END AS problem
    FROM dead_letters WHERE problem NOT NULL LIMIT 100
"""


def _find_in_journal(connection: sqlite3.Connection) -> list[str]:
    problems = [
        f"scope {scope!r} is recorded with {events} changes of {size} bytes in the journal, which has {found} of "
        f"{bytes_}"
        for scope, events, size, found, bytes_ in connection.execute(_WRONG_SIZES)
    ]
    problems += [
        f"the change at position {position} of the journal {problem}"
        for position, problem in connection.execute(_NO_PLACE_IN_THE_JOURNAL)
    ]
    problems += [
        f"the change at position {position} of the journal, of scope {scope!r}, comes before an earlier one"
        for position, scope in connection.execute(_OUT_OF_ORDER)
    ]
    problems += [
        f"the delivery of position {position} to consumer {consumer} {problem}"
        for position, consumer, problem in connection.execute(_DELIVERIES)
    ]
    return problems + [f"the dead letter {id_} {problem}" for id_, problem in connection.execute(_LETTERS)]


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
    return problems + _find_in_journal(connection)
