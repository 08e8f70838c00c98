"""The lock of a directory, for one engine at a time. The operating system releases it when its holder dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Mapping
from io import FileIO
from typing import Final

import msgspec

from scopestate.errors import StoreLocked, StoreUnusable
from scopestate.persistence.sqlite.files import make_private

if sys.platform == "win32":  # pragma: no cover - the tests run on POSIX
    import msvcrt

    def _lock(descriptor: int) -> None:
        # One byte far after the content, which other processes can then still read.
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        # flock belongs to the open file, so a second engine in the same process is refused too.
        # Refused: lockf/fcntl locks. They do not exclude the process itself, and any close of the file releases them.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


_FACTS_BYTES = 64 * 1024
_LONGEST_SCOPE = 250
_RECORD_BYTES = 2048
"""Room for a scope name of that length with each character escaped."""
_FLAGS = (
    os.O_RDWR
    | os.O_CREAT
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)  # the target of a link would be overwritten
    | getattr(os, "O_NONBLOCK", 0)  # opening a pipe of this name must not wait
)
_HELD: Final = frozenset({errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK})
"""Errors that mean that another process holds the lock. Any other error: the system cannot lock this file."""
NOT_SHARED: Final = "it has opened the store without an engine, or with an earlier version"


class Terms(msgspec.Struct, frozen=True):
    """What a process that takes a directory tells other processes in its record."""

    alone: str | None = NOT_SHARED
    """Why its engine does not share the directory; None: it does."""
    passing: bool = False
    """Whether it is a tool, which ends soon."""
    settings: dict[str, str] = {}
    """Name of a setting -> a text for its value, which a follower compares with its own."""


ALONE: Final = Terms()
"""The terms of a program that is not an engine."""


class Holder(Terms, frozen=True, kw_only=True):
    """The process that holds a directory, as its record says. It may be wrong: a killed process leaves its record."""

    pid: int
    host: str = ""
    program: str = ""
    since: str = ""
    """UTC, as `2026-01-31T12:00:00Z`."""

    @property
    def is_here(self) -> bool:
        """Whether it runs on this host, so that `pid` is that of a process here."""
        return self.host == socket.gethostname()

    def may_live(self) -> bool:
        """Return whether the process may still exist."""
        if not self.is_here:
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            return True  # a process of another user
        return True

    def describe(self) -> str:
        """Name it, for a message."""
        this = " (this process)" if self.pid == os.getpid() and self.is_here else ""
        program = f": {self.program}" if self.program else ""
        return f"process {self.pid}{this} on {self.host} since {self.since}{program}"


class StoreLock:
    """Holds `state.lock` of a directory from construction to `release()`. Not inherited by exec."""

    created: str
    """When the store in this directory was created, as earlier holders have recorded it; "" if never."""
    committed: tuple[str, int] | None
    """The scope and the number of the write that the previous holder saved last; None after a clean end."""

    def __init__(self, path: str, *, created: str = "", terms: Terms = ALONE) -> None:
        """Take the lock. Raises `StoreLocked`, which names the holder, or `StoreUnusable`: it cannot be written."""
        self.path = path
        self._terms = terms
        self._file = _take(path)
        earlier = _facts(self._file.fileno())
        self.committed = _committed(self._file.fileno())
        self._record_at = 0
        self._since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            self.note(created=str(earlier.get("created", created)))
        except StoreUnusable:
            self._file.close()
            raise

    def note(self, *, created: str) -> None:
        """Record in the file which process holds the store, and when it was created. Raises `StoreUnusable`."""
        self.created = created
        self._write(
            {
                "created": created,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                # Not the command line: its arguments may hold secrets, and this file stays after a crash.
                "program": os.path.basename(sys.argv[0] if sys.argv else sys.executable)[:200],
                "since": self._since,
                **msgspec.structs.asdict(self._terms),
            }
        )

    def note_alone(self, reason: str) -> None:
        """Record that the directory is not shared after all, and why."""
        self._terms = msgspec.structs.replace(self._terms, alone=reason)
        with contextlib.suppress(StoreUnusable):  # for the messages of other processes
            self.note(created=self.created)

    def note_commit(self, scope: str, sequence: int) -> None:
        """Record the last commit outside the database.

        SQLite cannot tell a damaged end of the write-ahead log from one that was never written: without this record,
        acknowledged writes could be missing unnoticed. It is not synced: after a power cut it may be too old, but
        never too new.
        """
        if self._file.closed or len(scope) > _LONGEST_SCOPE:
            return
        record = json.dumps([scope, sequence]).encode().ljust(_RECORD_BYTES) + b"\n"
        with contextlib.suppress(OSError):  # the commit itself has succeeded
            os.lseek(self._file.fileno(), self._record_at, os.SEEK_SET)
            os.write(self._file.fileno(), record)

    def held(self) -> bool:
        """Tell whether `path` is still the locked file: it may have been removed or replaced."""
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._file.fileno()))

    def release(self) -> None:
        """Release the lock. Idempotent."""
        if self._file.closed:
            return
        # The record is for people, so writing it may fail.
        with contextlib.suppress(StoreUnusable):
            self._write({"created": self.created})
        self.leave()

    def leave(self) -> None:
        """Release the lock as the end of the process does: the record stays. Idempotent."""
        if self._file.closed:
            return
        # Closing alone does not release it at once: a process that is being started shares the descriptor until its
        # exec, which can be after the call that starts it has returned (seen on Linux).
        _unlock(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the descriptor only: in a forked child, where the parent keeps the lock, or when the file is gone."""
        self._file.close()

    def _write(self, facts: Mapping[str, object]) -> None:
        descriptor = self._file.fileno()
        content = json.dumps(facts).encode() + b"\n"
        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, content)
            os.ftruncate(descriptor, len(content))
            self._record_at = len(content)
        except OSError as error:
            raise StoreUnusable(f"cannot write {self.path}: {error.strerror or error}") from error


def _take(path: str) -> FileIO:
    while True:
        try:
            file = FileIO(os.open(path, _FLAGS, 0o600), "r+")
        except OSError as error:
            if os.path.islink(path):
                raise StoreUnusable(
                    f"the lock file {path} is a symbolic link, which is not followed: what it names would be "
                    "overwritten. Remove the link"
                ) from error
            raise StoreUnusable(
                f"cannot write in {os.path.dirname(path)}: {error.strerror or error}. {_advice(os.path.dirname(path))}"
            ) from error
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise StoreUnusable(f"the lock file {path} is not a regular file. Remove it")
        try:
            _lock(file.fileno())
        except OSError as error:
            holder = _holder(file.fileno())
            file.close()
            if error.errno not in _HELD:
                raise StoreUnusable(
                    f"{path} cannot be locked: {error.strerror or error}. Its file system has no locks, as some "
                    "network file systems: choose a directory on a local disk"
                ) from error
            raise _held_by(path, holder) from error
        # The file may have been removed between open and lock, and a lock on a removed file excludes no other process.
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            make_private(path)
            return file
        file.close()


def _advice(directory: str) -> str:
    """Say what to do about a directory that cannot be written."""
    with contextlib.suppress(OSError):
        user = os.stat(directory).st_uid
        if os.name != "nt" and user != os.geteuid():
            return (
                f"It belongs to user {user}, and this process is of user {os.geteuid()}: run every process that uses "
                "it as the same user, or choose another directory"
            )
    return "Make the directory writable for this process, or choose another one"


def read_holder(path: str) -> Holder | None:
    """Return the process that the record in the file names; None: it was released. Takes no lock, changes nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | (_FLAGS & ~(os.O_RDWR | os.O_CREAT)))
    except OSError:
        return None
    try:
        return _holder(descriptor)
    finally:
        os.close(descriptor)


def may_be_held(path: str) -> bool:
    """Tell, from the record in the file, whether a process may hold the lock. Takes no lock and changes nothing."""
    holder = read_holder(path)
    return holder is not None and holder.may_live()  # None: released


def _facts(descriptor: int) -> dict[str, object]:
    """Read the record of the holder; empty if it is unreadable or incomplete."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        found = json.loads(os.read(descriptor, _FACTS_BYTES).partition(b"\n")[0])
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _committed(descriptor: int) -> tuple[str, int] | None:
    """Read the record of the last commit; None if there is none or it is unreadable."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        return read_committed(os.read(descriptor, _FACTS_BYTES))
    except OSError:
        return None


def read_committed(content: bytes) -> tuple[str, int] | None:
    """Return the record of the last commit from the content of a lock file."""
    try:
        scope, sequence = json.loads(content.partition(b"\n")[2])
    except (ValueError, TypeError):
        return None
    return (scope, sequence) if isinstance(scope, str) and isinstance(sequence, int) else None


def _holder(descriptor: int) -> Holder | None:
    facts = _facts(descriptor)
    try:
        return msgspec.convert(facts, Holder)
    except msgspec.ValidationError:
        return None


def _held_by(path: str, holder: Holder | None) -> StoreLocked:
    directory = os.path.dirname(path)
    if holder is None:
        return StoreLocked(
            f"the store {directory} is in use by another process (its lock file {path} does not name it). Stop it "
            "first",
            alone=NOT_SHARED,
        )
    return StoreLocked(
        f"the store {directory} is in use by {holder.describe()}. Stop it first, or choose another directory",
        pid=holder.pid,
        host=holder.host,
        alone=holder.alone,
    )
