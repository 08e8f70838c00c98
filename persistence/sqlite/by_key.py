"""Reads parts of a scope by key, for scopes that are too large to be loaded whole.

Rows of the table `state` are ordered by the write that created the key. Two indices find rows by key and by deadline.
They are created when a scope with many keys is first read in part, not earlier, because they slow down the creation of
keys. Versions of scopestate that do not know the indices can use a database that has them
(docs/design/0081-scopes-larger-than-memory.md).
"""

from __future__ import annotations

import heapq
import logging
import sqlite3
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from operator import itemgetter
from types import NoneType
from typing import Any, Final

import msgspec

from scopestate.actors.ports import Row, ScopeState, StoredKeys
from scopestate.errors import StorageError, StoreCorrupt
from scopestate.ops.turns import Range
from scopestate.persistence.sqlite.answers import read_answers
from scopestate.persistence.sqlite.database import primary_code, writing
from scopestate.persistence.sqlite.journal import Run
from scopestate.persistence.sqlite.rows import decoded, no_number, read_pages, revision_of, utf8
from scopestate.persistence.sqlite.schema import EXTENT_BITS, EXTENT_MASK

log = logging.getLogger("scopestate.persistence.file")

_MADE: Final = (
    f"CREATE INDEX IF NOT EXISTS state_keys ON state (id >> {EXTENT_BITS}, key, expires)",
    f"CREATE INDEX IF NOT EXISTS state_expires ON state (id >> {EXTENT_BITS}, expires) WHERE expires IS NOT NULL",
)
_ARE_MADE: Final = "SELECT count(*) FROM sqlite_master WHERE name IN ('state_keys', 'state_expires')"

_MORE: Final = (
    "SELECT 1 FROM scopes CROSS JOIN extents ON extents.scope = scopes.number CROSS JOIN state"  # noqa: S608 - constants
    f" ON state.id BETWEEN extents.extent << {EXTENT_BITS} AND (extents.extent << {EXTENT_BITS}) + {EXTENT_MASK}"
    " WHERE scopes.scope = :scope LIMIT 1 OFFSET :most"
)
"""Returns a row if a scope has more than `most` keys."""
_EXTENTS: Final = (
    "SELECT high, extent FROM scopes CROSS JOIN extents ON extents.scope = scopes.number"
    " WHERE scopes.scope = ? ORDER BY high"
)
_ASKED: Final = (256, 16, 1)
"""Keys for each statement, as in `statements.py`."""
_COLUMNS: Final = (
    f"SELECT id & {EXTENT_MASK}, CAST(key AS BLOB), revision, expires, CAST(value AS BLOB) FROM state"  # noqa: S608 - constants
    " INDEXED BY state_keys"
)
_ROWS: Final = {
    count: f"{_COLUMNS} WHERE id >> {EXTENT_BITS} = ? AND key IN ({','.join('?' * count)})" for count in _ASKED
}
_COUNTED: Final = {
    count: f"SELECT count(*) FROM state INDEXED BY state_keys WHERE id >> {EXTENT_BITS} = ?"  # noqa: S608 - constants
    f" AND key IN ({','.join('?' * count)}) AND (expires IS NULL OR expires > ?)"
    for count in _ASKED
}
_DUE: Final = (
    f"SELECT expires, id & {EXTENT_MASK}, CAST(key AS BLOB) FROM state INDEXED BY state_expires"  # noqa: S608 - constants
    f" WHERE id >> {EXTENT_BITS} = ? AND expires"
)
_PAGE_KEYS: Final = 1000
_RETRY_S: Final = 60.0
"""After a failure to make the indices: it may have taken seconds."""
_WHOLE_ROW: Final = 0x7FFFFFFF
"""SQLite's length limit while rows are read one by one."""

_key_of: Final = itemgetter(0)
_decode_names = msgspec.json.Decoder(list[str]).decode


def make_indices(connection: sqlite3.Connection) -> None:
    """Create the indices, in one transaction. Takes about a second for a million keys."""
    # On the disk: in memory, sorting the keys would take as much memory as they do.
    connection.execute("PRAGMA temp_store = FILE")
    with writing(connection):
        for statement in _MADE:
            connection.execute(statement)


class SavedKeys(StoredKeys):
    """The keys of the scopes in a database. May be used from any thread."""

    def __init__(
        self,
        read: Run,
        make: Callable[[str, Callable[[sqlite3.Connection], None]], None],
        at_one_moment: Callable[[str], tuple[Run, Callable[[], None]]],
    ) -> None:
        """`read` calls a function with a connection that sees committed data only; `make` with one that may write.

        `at_one_moment` returns a function like `read` of which all calls see the same, and one that ends that.
        """
        self._read = read
        self._make = make
        self._at_one_moment = at_one_moment
        self._ready = False
        self._again_s = 0.0
        """When to try again to make the indices, by the monotonic clock."""

    def begin(self, scope: str, most: int) -> ScopeState | None:
        """Return the state of a scope without its keys; None: load the scope whole. Raises StorageError.

        The result is not None if the scope has more than `most` keys and the indices exist or can be created.
        """
        doing = f"load scope {scope!r}"
        if not self._read(doing, lambda connection: self._is_large(connection, scope, most)):
            return None
        if not self.is_ready():
            return None
        return self._read(doing, lambda connection: _without_keys(connection, scope))

    def _is_large(self, connection: sqlite3.Connection, scope: str, most: int) -> bool:
        """Return whether a scope has more than `most` keys; if so, note whether the indices exist."""
        if not connection.execute(_MORE, {"scope": scope, "most": most}).fetchall():
            return False
        if not self._ready:
            ((made,),) = connection.execute(_ARE_MADE).fetchall()
            self._ready = made == len(_MADE)
        return True

    def is_ready(self) -> bool:
        """Make the indices, if there are none. False if that is not possible: scopes are loaded whole then."""
        if self._ready or time.monotonic() < self._again_s:
            return self._ready
        try:
            log.info("making indices for scopes with many keys, once for this store")
            self._make("make the indices for its keys", make_indices)
        except StoreCorrupt:
            raise
        except StorageError as error:
            log.warning("scopes with many keys are loaded whole, and none of their keys leave memory: %s", error)
            self._again_s = time.monotonic() + _RETRY_S
            return False
        self._ready = True
        return True

    def at_one_moment(self, scope: str) -> tuple[StoredKeys, Callable[[], None]]:
        """Return the keys of a store as they are now, for some calls, and a function that ends that."""
        read, end = self._at_one_moment(f"read scope {scope!r}")
        return SavedKeys(read, self._make, self._at_one_moment), end

    def rows(self, scope: str, keys: Sequence[str]) -> dict[str, Row]:
        """Return the rows of those of these keys that exist. Raises StorageError for a row that is not JSON."""
        return self._read(f"read keys of scope {scope!r}", lambda connection: _rows(connection, scope, keys))

    def keys(self, scope: str, within: Range, now_ms: int, besides: Container[str]) -> list[str]:
        """Return the keys of a range, in its order, at most `limit`, without expired ones and those in `besides`."""

        def read(connection: sqlite3.Connection) -> list[str]:
            found: list[str] = []
            limit = within.limit
            if limit == 0:
                return found
            with _one_moment(connection):
                parts = [_keys(connection, extent, within, now_ms) for _, extent in _extents(connection, scope)]
                for key in heapq.merge(*parts, reverse=within.reverse):
                    if key not in besides:
                        found.append(key)
                        if len(found) == limit:
                            break
            return found

        return self._read(f"read the keys of scope {scope!r}", read)

    def entries(self, scope: str, within: Range, now_ms: int, besides: Container[str]) -> list[tuple[str, Row]]:
        """Return the keys that `keys` would return, each with its row.

        Raises StorageError for a row that is not JSON.
        """

        def read(connection: sqlite3.Connection) -> list[tuple[str, Row]]:
            found: list[tuple[str, Row]] = []
            limit = within.limit
            if limit == 0:
                return found
            with _one_moment(connection), _whole_rows(connection):
                parts = [
                    _entries(connection, scope, high, extent, within, now_ms)
                    for high, extent in _extents(connection, scope)
                ]
                for entry in heapq.merge(*parts, key=_key_of, reverse=within.reverse):
                    if entry[0] not in besides:
                        found.append(entry)
                        if len(found) == limit:
                            break
            return found

        return self._read(f"read the entries of scope {scope!r}", read)

    def count(self, scope: str, within: Range, now_ms: int, besides: Sequence[str]) -> int:
        """Return how many keys `keys` would return without a limit."""

        def read(connection: sqlite3.Connection) -> int:
            count = 0
            with _one_moment(connection):
                for _, extent in _extents(connection, scope):
                    count += _count(connection, extent, within, now_ms)
                    for some in _portions(besides):
                        found = connection.execute(_COUNTED[len(some)], (extent, *some, now_ms)).fetchall()
                        count -= int(found[0][0])
            return count

        return self._read(f"count the keys of scope {scope!r}", read)

    def each(self, scope: str, take: Callable[[str, Row], object]) -> None:
        """Call `take` with each key and its row, in the order of creation, including keys that have expired."""

        def read(connection: sqlite3.Connection) -> None:
            with _one_moment(connection):
                for key, row in read_pages(connection, scope):
                    take(key, row)

        self._read(f"read scope {scope!r}", read)

    def due(self, scope: str, after: tuple[int, int], most: int) -> list[tuple[int, int, str]]:
        """Return the next keys with deadlines, in the order of their deadlines and of their creation."""

        def read(connection: sqlite3.Connection) -> list[tuple[int, int, str]]:
            with _one_moment(connection):
                parts = [_due(connection, scope, high, extent, after) for high, extent in _extents(connection, scope)]
                return list(islice(heapq.merge(*parts), most))

        return self._read(f"read the deadlines of scope {scope!r}", read)


def _without_keys(connection: sqlite3.Connection, scope: str) -> ScopeState:
    with _one_moment(connection):
        revision = revision_of(connection, scope)
        ((due_ms,),) = connection.execute("SELECT due FROM scopes WHERE scope = ?", (scope,)).fetchall()
        return ScopeState({}, {}, {}, {}, revision, read_answers(connection, scope), due_ms)


def _due(
    connection: sqlite3.Connection, scope: str, high: int, extent: int, after: tuple[int, int]
) -> Iterator[tuple[int, int, str]]:
    """Yield the keys of one extent that have deadlines behind `after`."""
    ms, created = after
    first = extent << EXTENT_BITS
    if high < created >> EXTENT_BITS:
        last = first | EXTENT_MASK  # all of them were created before
    elif high == created >> EXTENT_BITS:
        last = first | created & EXTENT_MASK
    else:
        last = first - 1
    for text, parameters in (
        (f"{_DUE} = ? AND id > ? ORDER BY id", (extent, ms, last)),
        (f"{_DUE} > ? ORDER BY expires, id", (extent, ms)),
    ):
        for expires_ms, low, key in connection.execute(text, parameters):
            name = utf8(key).decode()
            if type(expires_ms) is not int:
                raise no_number(scope, name)
            yield expires_ms, high << EXTENT_BITS | low, name


@contextmanager
def _one_moment(connection: sqlite3.Connection) -> Iterator[None]:
    """Make several statements read the database as it is at one moment."""
    begun = connection.in_transaction  # by `at_one_moment`
    if begun:
        yield
        return
    connection.execute("BEGIN")
    try:
        yield
    finally:
        with suppress(sqlite3.ProgrammingError):  # closed: a signal has interrupted the read, and its end comes late
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def _extents(connection: sqlite3.Connection, scope: str) -> list[tuple[int, int]]:
    """Return the extents of a scope, each with the high bits of its writes' numbers."""
    return connection.execute(_EXTENTS, (scope,)).fetchall()


def _portions(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the keys in portions of the sizes for which there are statements."""
    start = 0
    for count in _ASKED:
        while len(keys) - start >= count:
            yield keys[start : start + count]
            start += count


def _rows(connection: sqlite3.Connection, scope: str, keys: Sequence[str]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    with _whole_rows(connection):
        extents = _extents(connection, scope)
        for some in _portions(keys):
            for high, extent in extents:
                for row in connection.execute(_ROWS[len(some)], (extent, *some)):
                    name, entry = _entry(scope, high, row)
                    if name in found:
                        raise StorageError(
                            f"scope {scope!r} holds the key {name!r} twice; was the database edited? Delete one of its "
                            "rows with the sqlite3 tool (the view `entries` shows them)"
                        )
                    found[name] = entry
    return found


@contextmanager
def _whole_rows(connection: sqlite3.Connection) -> Iterator[None]:
    """Read rows one by one: a value may be larger than a page."""
    before = connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _WHOLE_ROW)
    try:
        yield
    finally:
        with suppress(sqlite3.ProgrammingError):  # closed, as above
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, before)


def _entry(scope: str, high: int, row: tuple[Any, ...]) -> tuple[str, Row]:
    """Return the key of a row, and what it holds."""
    low, key, revision, expires_ms, value = row
    name, data = decoded(scope, key, value)
    if type(revision) is not int or type(expires_ms) not in (int, NoneType):
        raise no_number(scope, name)
    return name, Row(bytes(data), revision, high << EXTENT_BITS | low, expires_ms)


def _entries(
    connection: sqlite3.Connection, scope: str, high: int, extent: int, within: Range, now_ms: int
) -> Iterator[tuple[str, Row]]:
    """Yield the keys of one extent within a range, each with its row."""
    order = "DESC" if within.reverse else "ASC"
    condition, parameters = _bounds(extent, within, now_ms)
    text = f"{_COLUMNS} WHERE {condition} ORDER BY key {order}"
    for row in connection.execute(text, parameters):
        yield _entry(scope, high, row)


def _bounds(extent: int, within: Range, now_ms: int) -> tuple[str, list[int | str]]:
    """Return the condition for the keys of a range, and its parameters."""
    low, included = within.low()
    high = within.high()
    text = f"id >> {EXTENT_BITS} = ? AND key {'>=' if included else '>'} ?"
    parameters: list[int | str] = [extent, low]
    if high is not None:
        text += " AND key < ?"
        parameters.append(high)
    return text + " AND (expires IS NULL OR expires > ?)", [*parameters, now_ms]


def _count(connection: sqlite3.Connection, extent: int, within: Range, now_ms: int) -> int:
    condition, parameters = _bounds(extent, within, now_ms)
    text = f"SELECT count(*) FROM state INDEXED BY state_keys WHERE {condition}"  # noqa: S608 - ours
    return int(connection.execute(text, parameters).fetchall()[0][0])


def _keys(connection: sqlite3.Connection, extent: int, within: Range, now_ms: int) -> Iterator[str]:
    """Yield the keys of one extent within a range, read in pages."""
    order = "DESC" if within.reverse else "ASC"
    wanted = _PAGE_KEYS if within.limit is None else min(within.limit, _PAGE_KEYS)
    while True:
        condition, parameters = _bounds(extent, within, now_ms)
        text = (
            "SELECT CAST(json_group_array(key) AS BLOB) FROM (SELECT key FROM state INDEXED BY state_keys"  # noqa: S608 - ours
            f" WHERE {condition} ORDER BY key {order} LIMIT ?)"
        )
        try:
            ((page,),) = connection.execute(text, [*parameters, wanted]).fetchall()
        except sqlite3.DataError as error:
            if primary_code(error) != sqlite3.SQLITE_TOOBIG or wanted == 1:
                raise
            wanted = max(1, wanted // 8)  # these keys are long
            continue
        keys = _decode_names(utf8(page))
        yield from keys
        if len(keys) < wanted:
            return
        last = keys[-1]
        within = msgspec.structs.replace(within, **({"end": last} if within.reverse else {"after": last}))
