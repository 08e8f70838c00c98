"""Writing and reading rows in few large steps.

Each `sqlite3` call releases the interpreter lock and takes it again, which waits up to 5 ms (the switch interval) while
another thread is CPU-bound. Row by row, 100,000 rows would then take minutes. So several hundred rows are written by
one INSERT, and a page of a scope is read as one JSON text. Both are bounded in rows and bytes, so that preparing one
does not keep other threads waiting for more than about a millisecond.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator

import msgspec

from scopestate.actors.ports import ScopeChange, ScopeState
from scopestate.errors import StorageError, UnsavableValue
from scopestate.persistence.sqlite.database import primary_code

_CHUNK_ROWS = (256, 32, 4, 1)
"""Rows for each statement. Only these few sizes, so that the connection's cache of compiled statements has them."""
_CHUNK_BYTES = 256 * 1024
_PAGE_ROWS = 1000
_PAGE_BYTES = 256 * 1024
PAGE_LIMIT = 8 * 1024 * 1024
"""Bytes. Set as SQLite's length limit for readers: it refuses a larger page before it allocates the memory."""
HIGHEST_SEQUENCE = 2**63 - 1
LONGEST_NAME = 1024 * 1024
"""Characters. More than any use needs, and it leaves nearly all of a row to the value."""
_ROW_OVERHEAD = 1024
"""Bytes reserved for a row's record header; the real one is much smaller."""

_Parameter = str | bytes | int
_Row = tuple[int, int, str, msgspec.Raw]
"""rowid, position, key, value."""

_decode_page = msgspec.json.Decoder(list[_Row]).decode
_decode_value = msgspec.json.Decoder(msgspec.Raw).decode
_decode_names = msgspec.json.Decoder(list[str]).decode

_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Write:
    """One kind of statement: collects its rows and runs them, many at a time."""

    def __init__(self, connection: sqlite3.Connection, texts: dict[int, str], width: int) -> None:
        self._connection = connection
        self._texts = texts
        self._width = width
        self._parameters: list[_Parameter] = []
        self._bytes = 0

    def add(self, row: tuple[_Parameter, ...], size: int) -> None:
        """Collect a row of about `size` bytes. Runs the collected rows when they fill the largest statement."""
        self._parameters += row
        self._bytes += size
        if self._bytes >= _CHUNK_BYTES or len(self._parameters) >= _CHUNK_ROWS[0] * self._width:
            self.flush()

    def flush(self) -> None:
        """Run the collected rows."""
        parameters, self._parameters, self._bytes = self._parameters, [], 0
        start = 0
        for rows, text in self._texts.items():
            step = rows * self._width
            while len(parameters) - start >= step:
                self._connection.execute(text, parameters[start : start + step])
                start += step


def _ladder(head: str, row: str, tail: str) -> dict[int, str]:
    return {rows: f"{head} {','.join([row] * rows)} {tail}" for rows in _CHUNK_ROWS}


# The value is bound as bytes and converted to text by SQLite. Refused: decoding it first, which copies every value once
# more while other threads wait.
_STATE_HEAD = "INSERT INTO state (scope, key, position, value) VALUES"
_STATE_ROW = "(?, ?, ?, CAST(? AS TEXT))"
_CREATE = _ladder(
    _STATE_HEAD,
    _STATE_ROW,
    "ON CONFLICT (scope, key) DO UPDATE SET position = excluded.position, value = excluded.value",
)
# Not one statement with a CASE: SQLite rewrites an index entry when its column is assigned, even the same value.
_OVERWRITE = _ladder(_STATE_HEAD, _STATE_ROW, "ON CONFLICT (scope, key) DO UPDATE SET value = excluded.value")
# The join finds the rows by their index. Refused: `WHERE (scope, key) IN (VALUES ...)`: SQLite scans the whole table.
_DELETE = _ladder(
    "WITH gone (scope, key) AS (VALUES",
    "(?, ?)",
    ") DELETE FROM state WHERE rowid IN (SELECT state.rowid FROM gone CROSS JOIN state USING (scope, key))",
)
_SEQUENCE = _ladder(
    "INSERT INTO scopes (scope, sequence) VALUES",
    "(?, ?)",
    "ON CONFLICT (scope) DO UPDATE SET sequence = max(sequence, excluded.sequence)",
)


def row_room(connection: sqlite3.Connection) -> int:
    """Return the size that the names and the value of a row may have together, in bytes."""
    return connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) - _ROW_OVERHEAD


def write_batch(connection: sqlite3.Connection, batch: Iterable[ScopeChange]) -> tuple[str, int] | None:
    """Write the batch inside the caller's transaction; return scope and sequence of its last change, None if empty.

    Raises `UnsavableValue`, which names the key, for a value too large for SQLite, and library errors.
    """
    created = _Write(connection, _CREATE, 4)
    overwritten = _Write(connection, _OVERWRITE, 4)
    deleted = _Write(connection, _DELETE, 2)
    sequences = _Write(connection, _SEQUENCE, 2)
    writes = (created, overwritten, deleted, sequences)
    room = row_room(connection)
    seen: set[str] = set()
    last: tuple[str, int] | None = None
    for change in batch:
        scope, sequence, positions = change.scope, change.sequence, change.positions
        if scope in seen:
            # Two statements may have collected the same key. Running the earlier rows first keeps the order.
            for write in writes:
                write.flush()
            seen.clear()
        seen.add(scope)
        if not 0 <= sequence <= HIGHEST_SEQUENCE:
            raise UnsavableValue(
                f"the last write of scope {scope!r} has the number {sequence}, the store holds numbers up to "
                f"{HIGHEST_SEQUENCE}. Export the scope and import it under another name, without its numbers",
                scope,
                None,
            )
        sequences.add((scope, sequence), len(scope))
        last = (scope, sequence)
        for key, value in change.values.items():
            if value is None:
                deleted.add((scope, key), len(scope) + len(key))
                continue
            size = len(scope) + len(key) + len(value)
            # Names are counted at four bytes for each character, the most that UTF-8 takes.
            if size + 3 * (len(scope) + len(key)) > room:
                raise UnsavableValue(
                    f"the value for key {key!r} of scope {scope!r} takes {len(value)} bytes as JSON; together with its "
                    f"names that is more than a row can hold ({room} bytes). Split it over several keys",
                    scope,
                    key,
                )
            position = positions.get(key)
            if position is None:
                # The position is used only if the key is not in the store after all.
                overwritten.add((scope, key, sequence, value), size)
            else:
                created.add((scope, key, position, value), size)
    for write in writes:
        write.flush()
    return last


# Named placeholders. Refused: `?1`, which CPython 3.12.0 to 3.12.3 deprecate with a sequence (python/cpython#117995).
_FIRST = "scope = :scope"
_NEXT = "scope = :scope AND position >= :position AND (position, rowid) > (:position, :rowid)"
_ORDERED = "FROM state WHERE {where} ORDER BY position, rowid LIMIT :limit"
# A page is read as the text of a JSON array: decoding it both splits it and checks that each value is JSON.
# Refused: rows with json_valid(value), which needs up to 40 times the size of a value in memory.
_PAGE = (
    "SELECT (SELECT sequence FROM scopes WHERE scope = :scope), count(*), CAST('[' || group_concat("  # noqa: S608 - constants
    "'[' || rowid || ',' || position || ',' || json_quote(key) || ',' || value || ']') || ']' AS BLOB) "
    f"FROM (SELECT rowid, position, key, value {_ORDERED})"
)
_PLAIN = f"SELECT rowid, position, CAST(key AS BLOB), CAST(value AS BLOB) {_ORDERED}"
_PAGE_FIRST, _PAGE_NEXT = _PAGE.format(where=_FIRST), _PAGE.format(where=_NEXT)
_PLAIN_FIRST, _PLAIN_NEXT = _PLAIN.format(where=_FIRST), _PLAIN.format(where=_NEXT)

_Place = tuple[int, int] | None
"""Position and rowid of the last row read; None before the first."""


def read_scope(connection: sqlite3.Connection, scope: str) -> ScopeState:
    """Read a scope as of one moment. Takes the memory of its values and one page.

    Raises `StorageError`, which names the row, for a row that is not JSON, and library errors.
    """
    try:
        sequence, rows = _read_page(connection, scope, None, _PAGE_ROWS)
        if len(rows) < _PAGE_ROWS:
            return ScopeState(values={key: bytes(value) for _, _, key, value in rows}, sequence=sequence)
    except sqlite3.DataError as error:
        if primary_code(error) != sqlite3.SQLITE_TOOBIG:
            raise
    # Only a scope of several pages needs a transaction to be read as of one moment: it takes two more calls.
    connection.execute("BEGIN")
    try:
        values: dict[str, bytes] = {}
        for key, value in read_pages(connection, scope):
            values[key] = bytes(value)
        found = connection.execute("SELECT sequence FROM scopes WHERE scope = ?", (scope,)).fetchall()
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return ScopeState(values=values, sequence=found[0][0] if found else 0)


def read_pages(connection: sqlite3.Connection, scope: str) -> Iterator[tuple[str, msgspec.Raw]]:
    """Yield keys and values in order, in pages of about `_PAGE_BYTES`."""
    place: _Place = None
    limit = _PAGE_ROWS
    while True:
        try:
            _, rows = _read_page(connection, scope, place, limit)
        except sqlite3.DataError as error:
            if primary_code(error) != sqlite3.SQLITE_TOOBIG:
                raise
            if limit > 1:
                limit = max(1, limit // 8)
                continue
            rows = list(_read_plain(connection, scope, place, 1))
        for _, _, key, value in rows:
            yield key, value
        if len(rows) < limit:
            return
        place = (rows[-1][1], rows[-1][0])
        size = sum(memoryview(value).nbytes for _, _, _, value in rows)
        limit = max(1, min(_PAGE_ROWS, len(rows) * _PAGE_BYTES // max(size, 1)))


def _read_page(connection: sqlite3.Connection, scope: str, place: _Place, limit: int) -> tuple[int, list[_Row]]:
    """Read the scope's sequence, and up to `limit` rows after `place`, with one statement."""
    found = connection.execute(_PAGE_FIRST if place is None else _PAGE_NEXT, _parameters(scope, place, limit))
    ((sequence, count, text),) = found.fetchall()
    if not count:
        return sequence or 0, []
    try:
        rows = _decode_page(_utf8(text))
        whole = len(rows) == count
    except _NOT_JSON:
        whole = False
    if not whole:
        # One bad value makes the page unreadable: read its rows one by one to name it.
        rows = list(_read_plain(connection, scope, place, limit))
    return sequence or 0, rows


def _read_plain(connection: sqlite3.Connection, scope: str, place: _Place, limit: int) -> Iterator[_Row]:
    """Yield rows of any size, one at a time. Raises `StorageError` for a row that is not JSON."""
    before = connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 0x7FFFFFFF)
    try:
        found = connection.execute(_PLAIN_FIRST if place is None else _PLAIN_NEXT, _parameters(scope, place, limit))
        try:
            for rowid, position, key, value in found:
                yield rowid, position, *_decoded(scope, key, value)
        finally:
            found.close()
    finally:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, before)


def _parameters(scope: str, place: _Place, limit: int) -> dict[str, str | int]:
    position, rowid = place or (0, 0)  # unused by the statements of a first page
    return {"scope": scope, "limit": limit, "position": position, "rowid": rowid}


def _decoded(scope: str, key: bytes, value: bytes) -> tuple[str, msgspec.Raw]:
    try:
        return key.decode(), _decode_value(_utf8(value))
    except _NOT_JSON as error:
        raise StorageError(
            f"the row for key {key.decode(errors='replace')!r} of scope {scope!r} does not hold JSON ({error}); was "
            "the database edited? Correct that row with the sqlite3 tool (table `state`) and try again"
        ) from error


def _utf8(text: bytes) -> bytes:
    """Return `text`. Raises `UnicodeDecodeError` if it is not UTF-8, which neither SQLite nor the decoder checks."""
    if not text.isascii():
        text.decode()
    return text


_NAMES = (
    "SELECT json_group_array(scope) FROM (SELECT scope FROM scopes WHERE scope {after} :after"
    " AND EXISTS (SELECT 1 FROM state WHERE state.scope = scopes.scope) ORDER BY scope LIMIT :limit)"
)
_NAMES_FIRST, _NAMES_NEXT = _NAMES.format(after=">="), _NAMES.format(after=">")


def read_names(connection: sqlite3.Connection) -> list[str]:
    """Return the scopes that hold a key, sorted by name. Reads them page by page."""
    names: list[str] = []
    page = _page_of_names(connection, _NAMES_FIRST, "")
    while page:
        names += page
        page = _page_of_names(connection, _NAMES_NEXT, page[-1])
    return names


def _page_of_names(connection: sqlite3.Connection, statement: str, after: str) -> list[str]:
    ((text,),) = connection.execute(statement, {"after": after, "limit": _PAGE_ROWS}).fetchall()
    return _decode_names(text)
