"""Read directories of diskcache, without unpickling or changing anything.

The tables are those of diskcache 5. A row has its key and value as SQLite has them, as a pickle, or in a file.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import msgspec

from scopestate.errors import StoreUnusable

DATABASE: Final = "cache.db"
_ROWS: Final = 200
"""Rows of one query. Each query ends at once, so that a program that uses the directory can clean up its log."""
_LARGEST: Final = 2**30
"""Largest value that is read, in bytes."""
_RAW, _BINARY, _TEXT, _PICKLE = 1, 2, 3, 4


class Unreadable(Exception):
    """A key or value that is not imported. `args[0]` is the reason, one of those that `Report` counts."""


class _NotUtf8(NamedTuple):
    """Text in the database that is not UTF-8."""

    data: bytes


class Row(NamedTuple):
    """One entry. Key and value are read by `Database.key` and `Database.value`."""

    id: int
    key: Any
    """None if it is a pickle."""
    raw: int
    expire_time: float | None
    tag: Any
    mode: int
    filename: Any
    value: Any
    """None if it is a pickle or in a file."""
    size: int


_SELECT: Final = """
SELECT rowid, CASE WHEN raw THEN key END, raw, expire_time, tag, mode, filename,
    CASE WHEN mode = 1 THEN value END, coalesce(length(value), size, 0)
FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT ?
"""


def databases(directory: str | os.PathLike[str]) -> list[str]:
    """Return the directories with a database: this one, or the shards of a FanoutCache. Raises StoreUnusable."""
    top = os.path.abspath(os.path.expanduser(os.fspath(directory)))
    if os.path.isfile(os.path.join(top, DATABASE)):
        return [top]
    try:
        names = sorted(name for name in os.listdir(top) if name.isdecimal())
    except OSError as error:
        raise StoreUnusable(f"{top} cannot be read: {error.strerror}") from error
    found = [os.path.join(top, name) for name in names if os.path.isfile(os.path.join(top, name, DATABASE))]
    if not found:
        raise StoreUnusable(f"{top} is not a directory of diskcache: it has no {DATABASE}, and no folder 000 with one")
    return found


class Database:
    """One directory with a database. A program may be using it."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._file = os.path.join(directory, DATABASE)
        self._json = self._compressed_json()

    def _connect(self) -> tuple[sqlite3.Connection, tuple[int, ...] | None]:
        """Open the database for reading. Also return the state of its file if no program is using it, else None.

        If no program is using it, SQLite is told that the file does not change: otherwise it would create a log beside
        it.
        """
        before = self._looks()
        mode = "mode=ro" if before is None else "mode=ro&immutable=1"
        connection = sqlite3.connect(f"file:{quote(self._file)}?{mode}", uri=True, timeout=30)
        connection.text_factory = _text
        with suppress(sqlite3.Error):
            connection.execute("PRAGMA trusted_schema=OFF")
        return connection, before

    def _looks(self) -> tuple[int, ...] | None:
        if os.path.exists(f"{self._file}-wal") or os.path.exists(f"{self._file}-journal"):
            return None
        found = os.stat(self._file)
        return found.st_ino, found.st_size, found.st_mtime_ns

    def rows(self) -> Iterator[Row]:
        """Yield the entries in the order in which they were created. Raises sqlite3.Error where it is damaged."""
        last = -(2**63)
        while True:
            connection, before = self._connect()
            with closing(connection):
                while True:
                    found = [Row(*columns) for columns in connection.execute(_SELECT, (last, _ROWS))]
                    if before is not None and self._looks() != before:
                        break  # a program has begun to use it: the rows read may be of two moments
                    yield from found
                    if len(found) < _ROWS:
                        return
                    last = found[-1].id

    def count(self) -> int:
        """Return how many rows there are."""
        connection, _ = self._connect()
        with closing(connection):
            return int(connection.execute("SELECT count(*) FROM Cache").fetchone()[0])

    def _compressed_json(self) -> bool:
        """Return whether the directory was written with diskcache's JSONDisk, which only the keys show."""
        try:
            connection, _ = self._connect()
            with closing(connection):
                keys = connection.execute("SELECT raw, key FROM Cache LIMIT ?", (_ROWS,)).fetchall()
            for raw, key in keys:
                if not raw or not isinstance(key, bytes):
                    return False
                _of_json(key)
            return bool(keys)
        except (sqlite3.Error, OSError, Unreadable):
            return False  # if the database is damaged, `rows` says so

    def _is_there(self, row: Row) -> bool:
        connection, _ = self._connect()
        with closing(connection):
            query = "SELECT count(*) FROM Cache WHERE rowid = ? AND filename IS ?"
            return bool(connection.execute(query, (row.id, row.filename)).fetchone()[0])

    def key(self, row: Row) -> Any:
        """Return the key of a row. Raises Unreadable."""
        if not row.raw:
            raise Unreadable("pickled_keys")
        key = self._content(row.key)
        if self._json:
            key = _hashable(_of_json(key))
        if key is None or isinstance(key, dict):
            raise Unreadable("damaged")
        return key

    def value(self, row: Row) -> Any:
        """Return the value of a row. Raises Unreadable."""
        if row.mode == _PICKLE:
            raise Unreadable("pickled_values")
        if row.mode == _RAW and row.value is not None:
            value = self._content(row.value)
        elif row.mode in (_BINARY, _TEXT) and isinstance(row.filename, str):
            value = self._read(row)
        else:
            raise Unreadable("damaged")
        return _of_json(value) if self._json and row.mode != _TEXT else value

    def _content(self, found: Any) -> Any:
        if isinstance(found, _NotUtf8):
            raise Unreadable("damaged")
        return found

    def _read(self, row: Row) -> Any:
        """Return the content of a value's file. A name that leads out of the directory is not followed."""
        file = os.path.join(self.directory, row.filename)
        if os.path.isabs(row.filename) or os.path.realpath(file) != os.path.join(
            os.path.realpath(self.directory), os.path.normpath(row.filename)
        ):
            raise Unreadable("damaged")
        try:
            with open(file, "rb", opener=_without_waiting) as stream:
                status = os.fstat(stream.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                    raise Unreadable("damaged")
                data = stream.read(_LARGEST + 1)
        except FileNotFoundError:
            # A program that uses the directory may have replaced or removed the entry.
            raise Unreadable("missing_files" if self._is_there(row) else "changed") from None
        except (OSError, ValueError) as error:
            raise Unreadable("missing_files") from error
        if row.mode == _BINARY:
            return data
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise Unreadable("damaged") from error


def _of_json(data: Any) -> Any:
    """Return the JSON data that JSONDisk has compressed."""
    try:
        decompressor = zlib.decompressobj()
        text = decompressor.decompress(data, _LARGEST)
        if decompressor.unconsumed_tail:
            raise Unreadable("damaged")
        return msgspec.json.decode(text)
    except (TypeError, zlib.error, msgspec.DecodeError, RecursionError) as error:
        raise Unreadable("damaged") from error


def _without_waiting(file: str, flags: int) -> int:
    """Open a file without blocking: opening a pipe would wait for its writer."""
    return os.open(file, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))


def _text(data: bytes) -> str | _NotUtf8:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return _NotUtf8(data)


def _hashable(key: Any) -> Any:
    """Return the original key: JSONDisk has turned tuples into lists."""
    return tuple(map(_hashable, key)) if isinstance(key, list) else key
