"""Opening a store: each problem is one clear error, and no file is ever overwritten."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from scopestate.errors import ConfigError, StorageError, StoreCorrupt, StoreUnusable
from scopestate.paths import expand_home
from scopestate.persistence.sqlite.database import (
    LIBRARY_ERRORS,
    connect,
    database_uri,
    is_corruption,
    primary_code,
    storage_error,
)
from scopestate.persistence.sqlite.files import (
    PRIVATE_DIRECTORY,
    SUFFIXES,
    copy_aside,
    create_private,
    make_private,
    open_regular,
    set_aside,
    sync_directory,
)
from scopestate.persistence.sqlite.lock import StoreLock, Terms
from scopestate.persistence.sqlite.migration import migrate, upgrade
from scopestate.persistence.sqlite.rows import COUNTS
from scopestate.persistence.sqlite.schema import (
    DamagedError,
    Session,
    begin_session,
    check_header,
    create_if_empty,
    probe,
    version_of,
)
from scopestate.persistence.sqlite.traces import note_traces

log = logging.getLogger("scopestate.persistence.file")

Open = Callable[[str], sqlite3.Connection]

LOCK_FILE: Final = "state.lock"


def open_directory(directory: str | bytes | os.PathLike[str]) -> str:
    """Create the directory if it is missing and return its real path; `~` is expanded. Raises `StoreUnusable`.

    Only its owner may use a directory that this creates.
    """
    given = os.fsdecode(directory)
    try:
        if not given:
            raise ValueError("its path is empty")
        path = os.path.realpath(expand_home(given))
        _create_directory(path, PRIVATE_DIRECTORY)
    except (OSError, ValueError, ConfigError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileExistsError):
            problem = "a file has this name"
        raise StoreUnusable(
            f"the directory {given!r} cannot be used as a store: {problem}. Choose a path where this process may "
            "create and write files"
        ) from error
    return path


def _create_directory(path: str, mode: int = 0o777) -> None:
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _create_directory(parent)
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    # The name of a new directory survives a power cut only after its parent is synced (docs/reference/semantics.md
    # 8.17).
    sync_directory(parent)


class Opened(NamedTuple):
    """A store that was opened."""

    lock: StoreLock
    connection: sqlite3.Connection
    identity: os.stat_result
    """The status of the database file."""
    lost: str | None
    """The saved writes that are missing in it; None if none are."""
    session: Session


def open_store(directory: str, path: str, open_: Open, *, terms: Terms, existing: bool) -> Opened:
    """Lock the directory and open its database, creating or migrating it. If it raises, the lock is released.

    `existing`: do not create the database; StoreUnusable is raised if it is missing.
    """
    lock = StoreLock(os.path.join(directory, LOCK_FILE), terms=terms)
    try:
        if existing and not os.path.exists(path):
            raise StoreUnusable(
                f"the database {path} is gone: it was removed, or moved aside because it is damaged. Restore it, or "
                "stop every process that uses the directory and start again, which begins an empty store"
            )
        _warn_of_foreign_files(directory)
        new = not os.path.lexists(path)
        connection, missing, session = _open_locked(path, lock, open_)
        log_opened(connection, directory, new=new)
        return Opened(lock, connection, os.stat(path), missing, session)
    except BaseException:
        lock.release()
        raise


def _open_locked(path: str, lock: StoreLock, open_: Open) -> tuple[sqlite3.Connection, str | None, Session]:
    try:
        _check_files(path, lock)
        create_private(path)
        for suffix in SUFFIXES:
            make_private(path + suffix)
        connection = open_(database_uri(path, "rwc"))
        try:
            killed = False
            if version_of(connection, path) == 1:
                killed = lock.committed is not None  # version 1 records its end nowhere else
                missing = _report_lost(connection, path, lock.committed)
                migrate(connection, path, open_)
                connection = open_(database_uri(path, "rw"))
                _prepare(connection, path)
            else:
                _prepare(connection, path)
                missing = _report_lost(connection, path, lock.committed)
            # To find out now, not at the first save, whether the database may be written.
            session = begin_session(connection, lost=missing is not None or killed)
            note_traces(connection)
        except BaseException:
            connection.close()
            raise
        if not lock.created:
            lock.note(created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        return connection, missing, session
    except DamagedError as error:
        raise _set_aside(path, lock, str(error)) from error
    except UnicodeDecodeError as error:
        # SQLite's message about a damaged schema quotes it, and the quoted part is not UTF-8.
        raise _set_aside(path, lock, f"its schema is not UTF-8: {error}") from error
    except sqlite3.Error as error:
        if is_corruption(error):
            raise _set_aside(path, lock, str(error)) from error
        translated = storage_error(error, "open the database", path)
        if isinstance(error, sqlite3.OperationalError) and primary_code(error) in _UNUSABLE:
            raise StoreUnusable(str(translated)) from error
        raise translated from error
    except OSError as error:
        raise StoreUnusable(f"cannot read {path}: {error.strerror or error}") from error


_UNUSABLE = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}


def _check_files(path: str, lock: StoreLock) -> None:
    """Check the files before SQLite opens them: it deletes the log of an empty database."""
    try:
        with open_regular(path) as file:
            header = file.read(100)
    except FileNotFoundError:
        header = None
    # A rollback journal means a crash while the database was created: SQLite will repair it.
    journal, logged = _size(path + "-journal") > 0, _size(path + "-wal") > 0
    if header and not journal:
        check_header(header, _size(path), path, logged=logged)
    elif logged:
        raise DamagedError("it is empty but has a write-ahead log")
    elif header is not None and lock.created and not journal:
        # A crash during the first opening leaves an empty database without a date. This one had content.
        raise DamagedError(f"it is empty, but was created {lock.created}")
    elif header is None and lock.created:
        log.warning("%s is gone; it was created %s. Starting with an empty store", path, lock.created)
        lock.note(created="")


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    create_if_empty(connection, path)
    upgrade(connection, path)
    probe(connection)
    # After the migration: its journal rolls back an incomplete one, and there is never a log without a database.
    ((mode,),) = connection.execute("PRAGMA journal_mode = WAL").fetchall()
    if mode != "wal":
        raise StoreUnusable(
            f"{path} cannot use a write-ahead log (journal mode stays {mode!r}): its file system lacks shared memory "
            "or locks, as network file systems do. Choose a directory on a local disk"
        )


_COUNTED: Final = 100_000
"""Keys are counted up to this number, in a few milliseconds: opening takes the same time for a store of any size."""


def log_opened(connection: sqlite3.Connection, directory: str, *, new: bool) -> None:
    """Log which directory was opened, and what it holds: a changed working directory looks like lost data."""
    if not log.isEnabledFor(logging.INFO):
        return
    try:
        ((scopes, keys),) = connection.execute(COUNTS, {"limit": _COUNTED + 1}).fetchall()
    except LIBRARY_ERRORS as error:
        log.debug("counting the keys of %r: %s", directory, error)  # a load will raise it
        log.info("opened the store %r", directory)
        return
    what = "which is new" if new else f"which holds {_counted(keys)} keys in {_counted(scopes)} scopes"
    log.info("opened the store %r, %s", directory, what)


def _report_lost(connection: sqlite3.Connection, path: str, committed: tuple[str, int] | None) -> str | None:
    """Return, and log, which saved writes are missing in the database; None if none are.

    The store is used nevertheless: it holds the consistent state of an earlier moment. Refused: setting it aside as
    a damaged database is; the next start would find an empty store. A copy of the log is kept, as it may be repairable.
    """
    try:
        problem = lost(connection, path, committed)
    except LIBRARY_ERRORS as error:
        log.debug("looking for the last commit in %r: %s", path, error)  # a load of that scope will raise it
        return None
    if problem is None:
        return None
    log_path = path + "-wal"
    try:
        kept = copy_aside(log_path) if _size(log_path) else ""
    except OSError as error:
        kept, problem = "", f"{problem} (its log could not be copied: {error})"
    problem += f". A copy of the log as it was found is {kept}" if kept else ""
    log.error("%s", problem)
    return problem


def lost(connection: sqlite3.Connection, path: str, committed: tuple[str, int] | None) -> str | None:
    """Return a message if the database lacks the commit that was recorded outside of it, else None."""
    if committed is None:
        return None
    scope, saved = committed
    there = _saved_revision(connection, scope)
    if there >= saved:
        return None
    return (
        f"acknowledged writes are missing in {path}: scope {scope!r} is at write {there}, and write {saved} had "
        "been saved. Its write-ahead log is damaged or was removed, or an older database was put in its place. The "
        "store is used as it is: restore a backup if that is newer"
    )


def _saved_revision(connection: sqlite3.Connection, scope: str) -> int:
    column = "sequence" if version_of(connection, "") == 1 else "revision"
    found = connection.execute(f"SELECT {column} FROM scopes WHERE scope = ?", (scope,)).fetchall()  # noqa: S608 - ours
    return int(found[0][0]) if found else 0


def _counted(number: int) -> str:
    return f"more than {_COUNTED:,}" if number > _COUNTED else f"{number:,}"


def _set_aside(path: str, lock: StoreLock, reason: str) -> StorageError:
    try:
        target = set_aside(path)
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


def _warn_of_foreign_files(directory: str) -> None:
    """Warn of `*.bin` files: iii keeps one for each scope in such a directory (docs/reference/semantics.md 6)."""
    with os.scandir(directory) as entries:
        count = sum(entry.name.endswith(".bin") for entry in entries)
    if count:
        log.warning(
            "%s holds %d `*.bin` files, as iii's own store writes them; scopestate cannot read them and ignores them",
            directory,
            count,
        )


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def copy_database(source: sqlite3.Connection, path: str) -> str:
    """Copy the database of the connection `source` to a file beside `path`, synced, and return its name.

    The file of `source` may have been removed. Raises `OSError` and library errors.
    """
    copy = path + ".restoring"
    if os.path.lexists(copy):
        # Left by an interrupted copy, which was made under this same lock.
        os.unlink(copy)
    create_private(copy)
    target = connect(database_uri(copy, "rw"))
    try:
        target.execute("PRAGMA synchronous = FULL")
        # In steps, so that other threads can run between them.
        source.backup(target, pages=1000)
    finally:
        target.close()
    return copy


def publish(copy: str, path: str) -> os.stat_result:
    """Rename `copy` to `path` and return its status. Raises `FileExistsError` if `path` exists."""
    # Not `rename`, which would replace a database that another program has put there.
    os.link(copy, path)
    os.unlink(copy)
    sync_directory(os.path.dirname(path))
    return os.stat(path)
