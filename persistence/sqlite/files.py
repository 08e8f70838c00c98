"""The files of a store: private to their owner, and set aside, never overwritten, when they are damaged."""

from __future__ import annotations

import errno
import glob
import logging
import os
import shutil
import stat
import time
from typing import IO

log = logging.getLogger("scopestate.persistence.file")

PRIVATE = 0o600
PRIVATE_DIRECTORY = 0o700
SUFFIXES = ("", "-wal", "-shm", "-journal")
"""What SQLite appends to the name of a database to name its files."""


def open_regular(path: str) -> IO[bytes]:
    """Open a regular file for reading. Raises `OSError`, for a pipe too: opening it would wait for a writer."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", path)


def create_private(path: str) -> None:
    """Create an empty file that only its owner may access, unless the name is taken. Raises `OSError`.

    SQLite itself would create it with the permissions that the umask leaves. It gives the log those of the database.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    try:
        os.close(os.open(path, flags, PRIVATE))
    except FileExistsError:
        return


def read_whole(path: str) -> bytes | None:
    """Return the content of a file; None: there is none."""
    try:
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def write_whole(path: str, content: bytes | None) -> None:
    """Give a file this content, and create it private if it is missing. None: leave it as it is."""
    if content is not None:
        create_private(path)
        with open(path, "r+b") as file:
            file.write(content)
            file.truncate()


def half_written(before: bytes, after: bytes) -> bytes:
    """Return the content of a file in the middle of a write: half of the differing bytes are those of `after`."""
    old = before.ljust(len(after), b"\0")[: len(after)]
    begin = _same(old, after)
    if begin == len(after):
        return before
    middle = (begin + len(after) - _same(old[::-1], after[::-1])) // 2
    return after[:middle] + before[middle:]


def _same(one: bytes, other: bytes) -> int:
    """Return how many bytes at the beginning are the same in two texts of the same length."""
    least, most = 0, len(one)
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def make_private(path: str) -> None:
    """Remove the permissions of other users from `path`, if it exists; a change is logged."""
    if os.name == "nt":  # pragma: no cover - has no such permissions
        return
    try:
        found = os.stat(path)
        mode = stat.S_IMODE(found.st_mode)
        if not mode & 0o077:
            return
        if found.st_uid != os.geteuid():
            log.info("%r belongs to user %d, and other users may read it", path, found.st_uid)
            return
        os.chmod(path, mode & 0o700)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning(
            "other users may read %r, and its permissions cannot be changed (%s)", path, error.strerror or error
        )
    else:
        log.warning("other users could read or write %r (mode %04o); now only its owner can", path, mode)


def copy_aside(path: str) -> str:
    """Copy a file to an unused name beside it and return the new path. Raises `OSError`."""
    target = _unused(f"{path}.damaged", ("",))
    create_private(target)
    shutil.copyfile(path, target)
    return target


def find_copies(path: str) -> list[str]:
    """Return the copies of `path` that `copy_aside` has made, oldest first."""
    return sorted(glob.glob(glob.escape(path) + ".damaged-*"))


def set_aside(path: str) -> str:
    """Move a database and its log to an unused name beside it and return the new path. Raises `OSError`.

    The log keeps its suffix, so the sqlite3 tool can open the moved database together with it: it is part of the
    evidence and of any repair.
    """
    target = _unused(f"{path}.corrupt", SUFFIXES)
    # The database first: if this is interrupted, a log without its database remains, which the next start recognises as
    # damage. A database without its log would look sound, and would lack the writes in the log.
    for suffix in SUFFIXES:
        if os.path.lexists(path + suffix):
            os.rename(path + suffix, target + suffix)
    return target


def _unused(beginning: str, suffixes: tuple[str, ...]) -> str:
    """Return a name with the time in it, such that no file has it with any of the suffixes."""
    first = target = f"{beginning}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    count = 1
    while any(os.path.lexists(target + suffix) for suffix in suffixes):
        count += 1
        target = f"{first}-{count}"
    return target


def sync_directory(path: str) -> None:
    """Sync a directory: its names then survive a power cut (docs/reference/semantics.md 8.17). Raises `OSError`."""
    if os.name == "nt":  # pragma: no cover - directories cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
