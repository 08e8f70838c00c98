"""Setting a damaged database aside: moved to a name of its own, never overwritten, never deleted."""

from __future__ import annotations

import glob
import os
import shutil
import time

from scopestate.persistence.sqlite.files import create_private

SUFFIXES = ("", "-wal", "-shm", "-journal")
"""Behind the name of an SQLite database: its files. The log belongs to the evidence, and to any repair."""


def copy_aside(path: str) -> str:
    """Copy the file `path` beside itself, under a name of its own, and return that. Raises `OSError`."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    target = f"{path}.damaged-{stamp}"
    count = 1
    while os.path.lexists(target):
        count += 1
        target = f"{path}.damaged-{stamp}-{count}"
    create_private(target)
    shutil.copyfile(path, target)
    return target


def find_copies(path: str) -> list[str]:
    """Return the copies that `copy_aside` has made of `path`, oldest first."""
    return sorted(glob.glob(glob.escape(path) + ".damaged-*"))


def set_aside(path: str) -> str:
    """Move the database `path` and its log away and return the new path. Raises `OSError`.

    The log keeps its suffix behind the new name, so the sqlite3 tool can open the moved database as it was.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    target = f"{path}.corrupt-{stamp}"
    count = 1
    while any(os.path.lexists(target + suffix) for suffix in SUFFIXES):
        count += 1
        target = f"{path}.corrupt-{stamp}-{count}"
    # The database first: if we are stopped half-way, a log without its database stays, which the next start recognises
    # as damage. A database without its log would look sound and be older than it was.
    for suffix in SUFFIXES:
        if os.path.lexists(path + suffix):
            os.rename(path + suffix, target + suffix)
    return target
