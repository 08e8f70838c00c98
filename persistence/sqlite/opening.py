"""Opening a store, loudly: each thing that is wrong is one clear error, and nothing is ever overwritten."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from typing import Final

from scopestate.errors import ConfigError, StorageError, StoreCorrupt, StoreUnusable
from scopestate.paths import expand_home
from scopestate.persistence.sqlite import quarantine, schema
from scopestate.persistence.sqlite.connection import LIBRARY_ERRORS, connect, database_uri, is_corruption, storage_error
from scopestate.persistence.sqlite.files import create_private, make_private, open_regular
from scopestate.persistence.sqlite.lock import StoreLock

log = logging.getLogger("scopestate.persistence.sqlite.adapter")

Open = Callable[[str], sqlite3.Connection]


def open_directory(directory: str | bytes | os.PathLike[str]) -> str:
    """Create the directory if it is missing and return its real path; `~` is expanded. Raises `StoreUnusable`."""
    given = os.fsdecode(directory)
    try:
        if not given:
            raise ValueError("its path is empty")
        path = os.path.realpath(expand_home(given))
        _create_directory(path)
    except (OSError, ValueError, ConfigError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileExistsError):
            problem = "a file has this name"
        raise StoreUnusable(
            f"the directory {given!r} cannot be used as a store: {problem}. Choose a path where this process may "
            "create and write files"
        ) from error
    return path


def _create_directory(path: str) -> None:
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _create_directory(parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    # The name of a new directory survives a power loss only once its parent is synced (docs/semantics.md 8.17).
    _sync_directory(parent)


def _sync_directory(path: str) -> None:
    if os.name == "nt":  # pragma: no cover - directories cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_store(
    directory: str, path: str, open_: Open
) -> tuple[StoreLock, sqlite3.Connection, os.stat_result, str | None]:
    """Lock the directory and open its database, creating or migrating it; the lock is released on any raise.

    The third result identifies the database file (device and inode); the fourth says what is missing in it, or is None.
    """
    lock = StoreLock(os.path.join(directory, "state.lock"))
    try:
        _warn_of_strangers(directory)
        new = not os.path.lexists(path)
        connection = _open_locked(path, lock, open_)
        missing = _report_lost(connection, path, lock.committed)
        log_opened(connection, directory, new=new)
        return lock, connection, os.stat(path), missing
    except BaseException:
        lock.release()
        raise


def _open_locked(path: str, lock: StoreLock, open_: Open) -> sqlite3.Connection:
    try:
        _check_files(path, lock)
        create_private(path)
        for suffix in quarantine.SUFFIXES:
            make_private(path + suffix)
        connection = open_(database_uri(path, "rwc"))
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
        if not lock.created:
            lock.note(created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        return connection
    except schema.DamagedError as error:
        raise _quarantined(path, lock, str(error)) from error
    except UnicodeDecodeError as error:
        # SQLite's complaint about a damaged schema quotes it, and what it quotes is no text.
        raise _quarantined(path, lock, f"its schema is not UTF-8: {error}") from error
    except sqlite3.Error as error:
        if is_corruption(error):
            raise _quarantined(path, lock, str(error)) from error
        translated = storage_error(error, "open the database", path)
        if isinstance(error, sqlite3.OperationalError) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _UNUSABLE:
            raise StoreUnusable(str(translated)) from error
        raise translated from error
    except OSError as error:
        raise StoreUnusable(f"cannot read {path}: {error.strerror or error}") from error


_UNUSABLE = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}


def _check_files(path: str, lock: StoreLock) -> None:
    """Look at the files before SQLite does, which deletes the log of a database that is empty."""
    try:
        with open_regular(path) as file:
            header = file.read(100)
    except FileNotFoundError:
        header = None
    # With a rollback journal the database is half-written, and SQLite makes it whole (a crash while creating it).
    journal, logged = _size(path + "-journal") > 0, _size(path + "-wal") > 0
    if header and not journal:
        schema.check_header(header, _size(path), path, logged=logged)
    elif logged:
        raise schema.DamagedError("it is empty but has a write-ahead log")
    elif header is not None and lock.created and not journal:
        # Empty and never created is what a crash during the first opening leaves; this one had content.
        raise schema.DamagedError(f"it is empty, but was created {lock.created}")
    elif header is None and lock.created:
        log.warning("%s is gone; it was created %s. Starting with an empty store", path, lock.created)
        lock.note(created="")


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    schema.migrate(connection, path)
    schema.probe(connection)
    # After the migration: a half-made database is rolled back by its journal, and no log exists without a database.
    ((mode,),) = connection.execute("PRAGMA journal_mode = WAL").fetchall()
    if mode != "wal":
        raise StoreUnusable(
            f"{path} cannot use a write-ahead log (journal mode stays {mode!r}): its file system lacks shared memory "
            "or locks, as network file systems do. Choose a directory on a local disk"
        )
    # Finds a database that may not be written now instead of at the first save. A statement, because BEGIN IMMEDIATE
    # alone succeeds on a read-only file.
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("DELETE FROM scopes WHERE 0")
    connection.execute("ROLLBACK")


_COUNTED: Final = 100_000
"""Keys are counted up to here, which takes some milliseconds: opening takes the same time for a store of any size."""
_COUNTS: Final = f"""
    SELECT (SELECT count(*) FROM (SELECT 1 FROM scopes WHERE EXISTS
                (SELECT 1 FROM state WHERE state.scope = scopes.scope) LIMIT {_COUNTED + 1})),
           (SELECT count(*) FROM (SELECT 1 FROM state LIMIT {_COUNTED + 1}))
"""  # noqa: S608 - a constant


def log_opened(connection: sqlite3.Connection, directory: str, *, new: bool) -> None:
    """Say at INFO which directory was opened, and what it holds: a changed working directory looks like lost data."""
    if not log.isEnabledFor(logging.INFO):
        return
    try:
        ((scopes, keys),) = connection.execute(_COUNTS).fetchall()
    except LIBRARY_ERRORS as error:
        log.debug("counting the keys of %r: %s", directory, error)  # the call that needs them raises it
        log.info("opened the store %r", directory)
        return
    what = "which is new" if new else f"which holds {_counted(keys)} keys in {_counted(scopes)} scopes"
    log.info("opened the store %r, %s", directory, what)


def _report_lost(connection: sqlite3.Connection, path: str, committed: tuple[str, int] | None) -> str | None:
    """Say, in the log too, if a write that was saved before is not in the database; None if nothing is missing.

    The store is used all the same: what it holds is whole, as of an earlier moment. Refused: setting it aside, as is
    done with a damaged database; the next start would find nothing at all. The log is kept, as it may be mended.
    """
    try:
        problem = lost(connection, path, committed)
    except LIBRARY_ERRORS as error:
        log.debug("looking for the last commit in %r: %s", path, error)  # the first one who reads there gets it
        return None
    if problem is None:
        return None
    log_path = path + "-wal"
    try:
        kept = quarantine.copy_aside(log_path) if _size(log_path) else ""
    except OSError as error:
        kept, problem = "", f"{problem} (its log could not be copied: {error})"
    problem += f". A copy of the log as it was found is {kept}" if kept else ""
    log.error("%s", problem)
    return problem


def lost(connection: sqlite3.Connection, path: str, committed: tuple[str, int] | None) -> str | None:
    """Return what is wrong if the database lacks the write that was noted outside of it."""
    if committed is None:
        return None
    scope, sequence = committed
    found = connection.execute("SELECT sequence FROM scopes WHERE scope = ?", (scope,)).fetchall()
    there = int(found[0][0]) if found else 0
    if there >= sequence:
        return None
    return (
        f"acknowledged writes are missing in {path}: scope {scope!r} is at write {there}, and write {sequence} had "
        "been saved. Its write-ahead log is damaged or was removed, or an older database was put in its place. The "
        "store is used as it is: restore a backup if that is newer"
    )


def _counted(number: int) -> str:
    return f"more than {_COUNTED:,}" if number > _COUNTED else f"{number:,}"


def _quarantined(path: str, lock: StoreLock, reason: str) -> StorageError:
    try:
        target = quarantine.set_aside(path)
        lock.note(created="")
    except OSError as error:
        failed = StoreCorrupt(
            f"the database {path} is damaged ({reason}) and could not be set aside ({error}). It was not changed; move "
            "it away, or restore a backup"
        )
        log.error("%s", failed)  # noqa: TRY400 - the text is for operators; the traceback comes with the raise
        return failed
    corrupt = StoreCorrupt(
        f"the database {path} is damaged ({reason}). It was moved to {target}, unchanged. Restore a backup as {path} "
        "or repair the moved file (sqlite3's `.recover`); opening again without that starts with an empty store",
        quarantined=target,
    )
    log.error("%s", corrupt)
    return corrupt


def _warn_of_strangers(directory: str) -> None:
    """iii keeps one `*.bin` file per scope in the same directory (docs/semantics.md 6); we cannot read them."""
    with os.scandir(directory) as entries:
        count = sum(entry.name.endswith(".bin") for entry in entries)
    if count:
        log.warning(
            "%s holds %d `*.bin` files, as iii's own store writes them; scopestate cannot read and does not touch them",
            directory,
            count,
        )


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def copy_database(source: sqlite3.Connection, path: str) -> str:
    """Copy everything that `source` reaches into a file beside `path`, synced, and return the file's name.

    `source` may be a database whose file was removed. Raises `OSError` and library errors.
    """
    copy = path + ".restoring"
    if os.path.lexists(copy):
        # Left by a copying that was interrupted, under this same lock.
        os.unlink(copy)
    create_private(copy)
    target = connect(database_uri(copy, "rw"))
    try:
        target.execute("PRAGMA synchronous = FULL")
        # In steps, so that other threads run between them.
        source.backup(target, pages=1000)
    finally:
        target.close()
    return copy


def publish(copy: str, path: str) -> os.stat_result:
    """Give `copy` the name `path`, unless that exists by now (`FileExistsError`); return what identifies the file."""
    # Not rename, which would replace a database that somebody put there in the meantime.
    os.link(copy, path)
    os.unlink(copy)
    _sync_directory(os.path.dirname(path))
    return os.stat(path)
