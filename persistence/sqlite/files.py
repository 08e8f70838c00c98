"""The files of a store: readable and writable by their owner alone."""

from __future__ import annotations

import errno
import logging
import os
import stat
from typing import IO

log = logging.getLogger("scopestate.persistence.sqlite.adapter")

PRIVATE = 0o600


def open_regular(path: str) -> IO[bytes]:
    """Open a file for reading. Raises `OSError`, also if it is not a regular file: a pipe would wait for a writer."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", path)


def create_private(path: str) -> None:
    """Create an empty file that only its owner may use, if nothing has this name. Raises `OSError`.

    SQLite would create it with the rights that the umask leaves, and gives its log the rights of its database.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    try:
        os.close(os.open(path, flags, PRIVATE))
    except FileExistsError:
        return


def make_private(path: str) -> None:
    """Take the rights of all others away from `path`, if it exists and they have any; what changes is logged."""
    if os.name == "nt":  # pragma: no cover - has no such rights
        return
    try:
        found = os.stat(path)
        mode = stat.S_IMODE(found.st_mode)
        if not mode & 0o077:
            return
        if found.st_uid != os.geteuid():
            log.info("others than this process's user may read %r, which belongs to user %d", path, found.st_uid)
            return
        os.chmod(path, mode & 0o700)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("others may read %r, and that cannot be changed (%s)", path, error.strerror or error)
    else:
        log.warning("others could read or write %r (mode %04o); now only its owner can", path, mode)
