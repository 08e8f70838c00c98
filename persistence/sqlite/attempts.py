"""The file of attempts that have begun, so that they count even if the process is killed.

A record is appended before a handler runs, without syncing: the page cache of the operating system outlives the
process. The outcome of an attempt is in the database, so a record whose outcome is there is outdated and does no harm.
When the file has grown, it is rewritten without those records. If it is missing or damaged, attempts that were
interrupted by a kill are not counted; nothing else is lost.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Final

from scopestate.persistence.sqlite.files import open_regular
from scopestate.signals import Guard

log = logging.getLogger("scopestate.persistence.file")

_RECORD: Final = struct.Struct("<qqII")
"""Consumer, position, attempt, checksum."""
_FACTS: Final = struct.Struct("<qqI")
_REWRITE_BYTES: Final = 1024 * 1024
_LARGEST: Final = 64 * 1024 * 1024
"""Bytes. A larger file is not one of ours."""
_FLAGS: Final = (
    os.O_WRONLY
    | os.O_CREAT
    | os.O_APPEND
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)  # opening a pipe of this name must not wait
)

Delivery = tuple[int, int]
"""Consumer and position."""


class AttemptsFile:
    """Attempts whose outcome is not saved. From any thread; it raises nothing."""

    def __init__(self, path: str, store_id: str) -> None:
        """Read what the previous process has left. `store_id`: records of another store do not count."""
        self._path = path
        self._seed = zlib.crc32(store_id.encode())
        self._pid = os.getpid()
        self._guard = Guard()
        self._descriptor = -1
        self._size = 0
        self._failed = False
        self.open: dict[Delivery, int] = {}
        """A delivery -> the number of its attempt that has begun."""
        self._read()

    def note(self, attempts: Sequence[tuple[int, int, int]]) -> None:
        """Record attempts that are about to begin."""
        if attempts and os.getpid() == self._pid:
            self._guard.run(self._note, attempts)

    def settle(self, known: Iterable[tuple[Delivery, int]]) -> None:
        """Remove these attempts, and earlier ones of the same deliveries: their outcomes are saved."""
        known = iter(known)
        while some := list(itertools.islice(known, 64)):  # attempts that begin must not wait for all of it
            self._guard.run(self._settle, some)

    def forget(self, deliveries: Iterable[Delivery]) -> None:
        """Forget all attempts of these deliveries, which are about to start again."""
        self._guard.run(self._forget, deliveries)

    def close(self) -> None:
        """Close the file, and remove it if nothing is open. Idempotent."""
        self._guard.run(self._close)

    def abandon(self) -> None:
        """In a forked child: the file belongs to the parent."""
        self._pid = -1

    # ---------------------------------------------------------------------------------------------- under the guard

    def _note(self, attempts: Sequence[tuple[int, int, int]]) -> None:
        data = b""
        for consumer, position, attempt in attempts:
            self.open[consumer, position] = attempt
            data += self._record(consumer, position, attempt)
        self._append(data)

    def _settle(self, known: Iterable[tuple[Delivery, int]]) -> None:
        opened = self.open
        for delivery, attempt in known:
            if opened.get(delivery, attempt + 1) <= attempt:
                del opened[delivery]
        if self._size >= _REWRITE_BYTES and len(opened) * _RECORD.size * 4 <= self._size:
            self._rewrite()

    def _forget(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            self.open.pop(delivery, None)
        if self._size:
            self._rewrite()

    def _close(self) -> None:
        if os.getpid() != self._pid:
            return
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if not self.open and self._size:
            self._remove()
        self._pid = -1

    def _record(self, consumer: int, position: int, attempt: int) -> bytes:
        facts = _FACTS.pack(consumer, position, attempt)
        return facts + zlib.crc32(facts, self._seed).to_bytes(4, "little")

    def _append(self, data: bytes) -> None:
        try:
            if self._descriptor < 0:
                self._descriptor = os.open(self._path, _FLAGS, 0o600)
            written = os.write(self._descriptor, data)
            if written != len(data):
                # Half a record would hide the records after it.
                os.ftruncate(self._descriptor, self._size)
                raise OSError(f"only {written} of {len(data)} bytes could be written")
        except OSError as error:
            self._report(error)
        else:
            self._size += len(data)
            self._failed = False

    def _rewrite(self) -> None:
        """Rewrite the file with the open attempts. It is complete at every moment."""
        new = self._path + ".new"
        data = b"".join(self._record(*delivery, attempt) for delivery, attempt in self.open.items())
        try:
            if os.path.lexists(new):
                os.unlink(new)
            descriptor = os.open(new, _FLAGS | os.O_EXCL, 0o600)
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError("the disk is full")
                os.replace(new, self._path)
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            self._report(error)
            return
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._size = descriptor, len(data)

    def _remove(self) -> None:
        try:
            os.unlink(self._path)
        except OSError as error:
            self._report(error)
        self._size = 0

    def _report(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            log.warning(
                "attempts of durable triggers cannot be recorded in %s (%s): those that are interrupted by a kill "
                "will not be counted",
                self._path,
                error.strerror or error,
            )

    # ------------------------------------------------------------------------------------------------------- reading

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path + ".new")  # left by a process that was killed
        try:
            with open_regular(self._path) as file:
                data = file.read(_LARGEST + 1)
        except FileNotFoundError:
            return
        except OSError as error:
            self._report(error)
            return
        damaged = len(data) > _LARGEST
        for start in range(0, min(len(data), _LARGEST) - _RECORD.size + 1, _RECORD.size):
            consumer, position, attempt, checksum = _RECORD.unpack_from(data, start)
            if zlib.crc32(data[start : start + _RECORD.size - 4], self._seed) == checksum:
                self.open[consumer, position] = attempt
            else:
                damaged = True
        if damaged:
            log.warning("%s is damaged: attempts that it recorded may not be counted", self._path)
        self._size = len(data)
        if damaged or len(data) % _RECORD.size:
            self._rewrite()
