"""Stores of earlier versions.

Version 2 gets its new tables in one transaction, because it has all the rows already. The content of a version 1 store
is written into a new file, which then replaces the old one.

The old file is not changed until the new one is complete and on the disk, so a killed process leaves one of them
intact. The same copy is what `StoreReader` reads, in a temporary directory, without changing the store.

Refused: changing the tables in one transaction. The file would keep the pages of the old tables (244 MB instead of 94
for a million keys), and it takes longer.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from typing import Final

from scopestate.errors import StoreCorrupt
from scopestate.persistence.sqlite.database import Connect, connect, database_uri, is_corruption, writing
from scopestate.persistence.sqlite.files import create_private, sync_directory
from scopestate.persistence.sqlite.schema import (
    EXTENT_BITS,
    EXTENT_MASK,
    HIGHEST_REVISION,
    JOURNAL_TABLES,
    RESERVED,
    VERSION,
    create_tables,
    version_of,
)

log = logging.getLogger("scopestate.persistence.file")

_HIGHEST: Final = HIGHEST_REVISION - RESERVED
"""A scope with a higher number could hardly be written to: it continues after the numbers of its keys."""

_SCOPES: Final = """
    INSERT INTO scopes (scope, revision, epoch, due, floor, floor_at, events, bytes)
    SELECT scope, max(keys, CASE WHEN sequence > :highest THEN 0 ELSE sequence END), 0, NULL,
        max(keys, CASE WHEN sequence > :highest THEN 0 ELSE sequence END), 0, 0, 0
    FROM (SELECT scope, max(sequence) AS sequence, max(keys) AS keys
          FROM (SELECT scope, sequence, 0 AS keys FROM old.scopes
                UNION ALL SELECT scope, 0, count(*) FROM old.state GROUP BY scope)
          GROUP BY scope)
    ORDER BY scope
"""
# The keys of a scope are renumbered in their order: positions of version 1 may be equal, or too high for us.
_EXTENTS: Final = f"""
    WITH RECURSIVE needed (scope, high, highest) AS (
        SELECT number, 0, count(*) >> {EXTENT_BITS} FROM old.state JOIN scopes USING (scope) GROUP BY number
        UNION ALL SELECT scope, high + 1, highest FROM needed WHERE high < highest
    )
    INSERT INTO extents (extent, scope, high) SELECT row_number() OVER (ORDER BY scope, high), scope, high FROM needed
"""  # noqa: S608 - constants
# The last write of a key is not known; it was the scope's last one, or an earlier one.
_STATE: Final = f"""
    INSERT INTO state (id, key, revision, expires, value)
    SELECT extents.extent << {EXTENT_BITS} | (place & {EXTENT_MASK}), key, scopes.revision, NULL, value
    FROM (SELECT scope, key, value, row_number() OVER (PARTITION BY scope ORDER BY position, rowid) AS place
          FROM old.state) AS kept
    CROSS JOIN scopes ON scopes.scope = kept.scope
    CROSS JOIN extents ON extents.scope = scopes.number AND extents.high = place >> {EXTENT_BITS}
"""  # noqa: S608 - constants


def rebuild(old_uri: str, path: str, connect: Connect = connect) -> int:
    """Write the content of the version 1 database `old_uri` into the empty file `path`; return the number of keys.

    The file is complete and synced on return. Raises library errors.
    """
    connection = connect(database_uri(path, "rw"))
    try:
        # Nothing needs protection: a file that is not complete is removed.
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -16384")
        connection.execute("ATTACH ? AS old", (old_uri,))
        connection.execute("BEGIN")
        create_tables(connection)
        connection.execute(_SCOPES, {"highest": _HIGHEST})
        for scope, sequence in connection.execute(
            "SELECT scope, sequence FROM old.scopes WHERE sequence > ? LIMIT 100", (_HIGHEST,)
        ):
            log.warning(
                "scope %r had the number %d, above the highest one: it continues after the revisions of its keys",
                scope,
                sequence,
            )
        connection.execute(_EXTENTS)
        keys = connection.execute(_STATE).rowcount
        connection.execute("UPDATE store SET extents = (SELECT coalesce(max(extent), 0) FROM extents)")
        connection.execute("COMMIT")
    finally:
        connection.close()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return keys


def migrate(connection: sqlite3.Connection, path: str, connect: Connect) -> None:
    """Migrate the version 1 database `path`, open as `connection`, to the present version. Closes the connection.

    Raises `StoreCorrupt` if it cannot be read whole, and library errors; then it is unchanged.
    """
    new = path + ".migrating"
    try:
        # Both fail while another program has the database open. Afterwards the file is complete without a log.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
        connection.execute("BEGIN IMMEDIATE")  # no other program writes until the new file is in place
        if os.path.lexists(new):
            os.unlink(new)  # left by a process that was killed
        create_private(new)
        log.info("migrating the store %r to a new version", path)
        keys = rebuild(database_uri(path, "ro"), new, connect)
        if os.name == "nt":  # pragma: no cover - an open file cannot be replaced there
            connection.close()
        os.replace(new, path)
        sync_directory(os.path.dirname(path))
        log.info("migrated the store %r, with %d keys", path, keys)
    except sqlite3.Error as error:
        if not is_corruption(error):
            raise
        raise StoreCorrupt(
            f"the database {path} was written by an earlier version and is damaged ({error}), so it cannot be "
            "migrated. It was not changed. Repair a copy (sqlite3's `.recover`), or restore a backup"
        ) from error
    finally:
        connection.close()
        if os.path.lexists(new):
            os.unlink(new)


_UPGRADE: Final = f"""
DROP TABLE journal;
DROP TABLE consumers;
DROP TABLE deliveries;
DROP TABLE dead_letters;
{JOURNAL_TABLES};
ALTER TABLE scopes ADD COLUMN floor INTEGER NOT NULL DEFAULT 0;
ALTER TABLE scopes ADD COLUMN floor_at INTEGER NOT NULL DEFAULT 0;
ALTER TABLE scopes ADD COLUMN events INTEGER NOT NULL DEFAULT 0;
ALTER TABLE scopes ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
CREATE INDEX scopes_logged ON scopes (number) WHERE events > 0;
UPDATE scopes SET floor = revision;
PRAGMA user_version = {VERSION}
"""  # noqa: S608 - constants


def upgrade(connection: sqlite3.Connection, path: str) -> None:
    """Migrate a database of version 2 to the present version, in one transaction; others stay unchanged."""
    if version_of(connection, path) != 2:
        return
    with writing(connection):
        if version_of(connection, path) == 2:
            for statement in _UPGRADE.split(";"):
                connection.execute(statement)
    log.info("migrated the store %r to a new version", path)
