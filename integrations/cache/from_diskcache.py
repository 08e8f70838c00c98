"""Import the entries of a diskcache directory into a cache. Nothing is unpickled: pickles are only counted.

from scopestate.integrations.cache import Cache
from scopestate.integrations.cache.from_diskcache import import_diskcache

report = import_diskcache("./old-cache", Cache("./data/cache", size_limit=None))
"""

from __future__ import annotations

import math
import os
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec

from scopestate.errors import Conflict, DeserializationError, ValueTooLarge
from scopestate.integrations.cache.cache import Cache
from scopestate.integrations.cache.diskcache_files import Database, Row, Unreadable, databases
from scopestate.integrations.cache.values import name_of, pack
from scopestate.ops.transactions import Transaction
from scopestate.ops.values import encode

__all__ = ["LeftOut", "Report", "import_diskcache"]

_STEP_KEYS: Final = 200
_STEP_BYTES: Final = 2**21
_YEAR_9999_S: Final = 253_402_300_799
"""A later deadline is left out: no datetime can be later."""


class LeftOut(msgspec.Struct, frozen=True):
    """An entry that was not imported."""

    database: str
    """The directory of its database."""
    row: int
    """Its `rowid` there."""
    reason: str
    """The field of `Report` that counts it."""
    key: Any = None
    """None if it is a pickle, or damaged."""
    bytes: int = 0
    """The size of its value, or 0 if unknown."""


class Report(msgspec.Struct):
    """The result of an import: what was imported, and what was left out."""

    read: int = 0
    """Entries found."""
    imported: int = 0
    """Entries written. With `dry_run`: those that would be written into an empty cache."""
    present: int = 0
    """Entries that were already in the cache, and were left as they are."""
    expired: int = 0
    """Entries that had expired."""
    pickled_keys: int = 0
    """The key is a pickle, as for each result of diskcache's `memoize`."""
    pickled_values: int = 0
    """The value is a pickle."""
    missing_files: int = 0
    """The file of the value is missing, or cannot be read."""
    damaged: int = 0
    """Not what diskcache writes: text that is not UTF-8, a file outside of the directory, a bad compression."""
    refused: int = 0
    """The cache refuses the key or value: it is over `max_value_bytes`, or is text that is not valid Unicode."""
    changed: int = 0
    """Removed by the program that uses the directory while it was being read."""
    problems: list[str] = []
    """Databases that could not be read to their end, with the reason."""

    @property
    def ok(self) -> bool:
        """False if something is damaged or missing."""
        return not (self.missing_files or self.damaged or self.problems)


class _Entry(NamedTuple):
    row: Row
    key: Any
    name: str
    stored: Any
    expires_at: datetime | None
    size: int


def import_diskcache(
    directory: str | os.PathLike[str],
    cache: Cache,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    left_out: Callable[[LeftOut], object] | None = None,
    progress: Callable[[Report], object] | None = None,
) -> Report:
    """Copy the entries of a diskcache directory, or of each shard of a FanoutCache, with deadlines and tags.

    Numbers, text and bytes are imported, whether they are in the database or in separate files; with JSONDisk, all
    values are. Pickles are not loaded. The directory is not changed, and a program may be using it. Entries that the
    cache already has are left as they are, unless `overwrite` is true: so an interrupted import can be repeated.

    `left_out` is called for each entry that was not imported, and `progress` after each step of at most 200 entries.
    `dry_run` writes nothing. Raises StoreUnusable if there is no such directory, and what the engine raises; then the
    earlier steps are written. A cache with a `size_limit` removes its oldest entries as usual.
    """
    report = Report()
    importing = _Import(cache, report, left_out, overwrite=overwrite, dry_run=dry_run)
    for found in databases(directory):
        database = Database(found)
        last = None
        try:
            for row in database.rows():
                last = row.id
                importing.take(database, row)
                if progress is not None and report.read % _STEP_KEYS == 0:
                    progress(report)
        except (sqlite3.Error, OSError) as error:
            behind = "" if last is None else f" after row {last}, so later entries were not read"
            report.problems.append(f"{found}: {error}{behind}")
        importing.write()
    if progress is not None:
        progress(report)
    return report


class _Import:
    """Collects entries, and writes them in steps."""

    def __init__(
        self,
        cache: Cache,
        report: Report,
        left_out: Callable[[LeftOut], object] | None,
        *,
        overwrite: bool,
        dry_run: bool,
    ) -> None:
        self._cache = cache
        self._report = report
        self._left_out = left_out
        self._overwrite = overwrite
        self._dry_run = dry_run
        self._now_s = time.time()
        self._step: list[_Entry] = []
        self._bytes = 0
        self._directory = ""

    def take(self, database: Database, row: Row) -> None:
        """Take a row, and write a step if it is full."""
        self._report.read += 1
        self._directory = database.directory
        key = None
        try:
            key = database.key(row)
            entry = self._entry(database, row, key)
        except Unreadable as problem:
            self._leave_out(row, key, str(problem))
            return
        except (DeserializationError, UnicodeError, OverflowError):
            self._leave_out(row, key, "refused")
            return
        if self._bytes + entry.size > _STEP_BYTES or len(self._step) == _STEP_KEYS:
            self.write()
        self._step.append(entry)
        self._bytes += entry.size

    def _entry(self, database: Database, row: Row, key: Any) -> _Entry:
        at = row.expire_time
        if at is not None and not isinstance(at, (int, float)):
            raise Unreadable("damaged")
        if at is not None and (math.isnan(at) or at > _YEAR_9999_S):
            at = None
        if at is not None and at <= self._now_s:
            raise Unreadable("expired")
        value = database.value(row)
        name = name_of(key)
        stored = pack(value, None if row.tag is None else name_of(row.tag))
        size = len(name.encode()) + len(encode(stored))
        return _Entry(row, key, name, stored, None if at is None else datetime.fromtimestamp(at, UTC), size)

    def write(self) -> None:
        """Write the collected entries. Entries that are too large for the cache are left out."""
        step, self._step, self._bytes = self._step, [], 0
        if not step or self._dry_run:
            self._report.imported += len(step)
            return
        try:
            present = self._write(step)
        except ValueTooLarge:
            if len(step) == 1:
                self._leave_out(step[0].row, step[0].key, "refused")
                return
            for entry in step:
                self._step = [entry]
                self.write()
            return
        self._report.imported += len(step) - len(present)
        for entry in present:
            self._leave_out(entry.row, entry.key, "present")

    def _write(self, step: list[_Entry]) -> list[_Entry]:
        """Write entries in one step, and return those that already existed."""
        cache = self._cache
        if len(step) == 1:  # a single entry may exceed the limit of a transaction
            return [] if self._write_one(step[0]) else step

        def write(tx: Transaction[Any]) -> list[_Entry]:
            present = []
            for entry in step:
                if not self._overwrite and entry.name in tx:
                    present.append(entry)
                else:
                    tx.set(entry.name, entry.stored, expires_at=entry.expires_at)
            return present

        present = cache.engine.transact(cache.scope, write)
        cache._grown(sum([entry.size for entry in step]))
        return present

    def _write_one(self, entry: _Entry) -> bool:
        cache = self._cache
        try:
            cache.engine.set(
                cache.scope,
                entry.name,
                entry.stored,
                expires_at=entry.expires_at,
                if_absent=not self._overwrite,
            )
        except Conflict:
            return False
        cache._grown(entry.size)
        return True

    def _leave_out(self, row: Row, key: Any, reason: str) -> None:
        setattr(self._report, reason, getattr(self._report, reason) + 1)
        if self._left_out is not None:
            self._left_out(LeftOut(self._directory, row.id, reason, key, row.size))
