"""Writing and reading rows in few large steps.

`statements.py` says why. Several hundred rows are written by one INSERT, and a page of a scope is read as one JSON
text, bounded in rows and bytes as well.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from types import NoneType

import msgspec

from scopestate.actors.journal import ConsumerChange
from scopestate.actors.ports import Answer, Row, ScopeChange, ScopeState
from scopestate.errors import StorageError, UnsavableValue
from scopestate.ops.turns import Range
from scopestate.persistence.sqlite.answers import HAS_ANSWERS, AnswerWriter, read_answers
from scopestate.persistence.sqlite.changes import ROOM_FOR_TEXTS, sizes_of, write_changes
from scopestate.persistence.sqlite.database import primary_code
from scopestate.persistence.sqlite.schema import EXTENT_BITS, EXTENT_MASK, HIGHEST_REVISION, RESERVED, number
from scopestate.persistence.sqlite.statements import CHUNK_ROWS, Parameter, Write, ladder

_PAGE_ROWS = 1000
_PAGE_BYTES = 256 * 1024
PAGE_LIMIT = 8 * 1024 * 1024
"""Bytes. Set as SQLite's length limit for readers: it refuses a larger page before it allocates the memory."""
LONGEST_NAME = 1024 * 1024
"""Characters. More than any use needs, and it leaves nearly all of a row to the value."""
_ROW_OVERHEAD = 1024
"""Bytes reserved for a row's record header; the real one is much smaller."""
_KNOWN_SCOPES = 4096
"""Scopes whose extents are remembered from one save to the next."""
_CLOCK_STEP_MS = 1000
"""The time is saved again only when it is this much later: it takes a page of its own in each commit."""

_Row = tuple[int, int, str, int, int | None, msgspec.Raw]
"""id, created, key, revision, expires, value."""

_decode_numbers = msgspec.json.Decoder(list[int]).decode
_decode_deadlines = msgspec.json.Decoder(list[int | None]).decode
_decode_values = msgspec.json.Decoder(list[tuple[msgspec.Raw]]).decode
_decode_value = msgspec.json.Decoder(msgspec.Raw).decode
_decode_names = msgspec.json.Decoder(list[str]).decode

_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NOT_A_PAGE = (*_NOT_JSON, ValueError)


class _WriteState(Write):
    def __init__(self, writer: Writer, connection: sqlite3.Connection) -> None:
        super().__init__(connection, _STATE, 5)
        self._writer = writer

    def _run(self, text: str, parameters: list[Parameter], rows: int) -> None:
        if self._connection.execute(text, parameters).rowcount != rows:
            keys = [parameter for parameter in parameters[1 :: self._width] if isinstance(parameter, str)]
            raise StorageError(
                f"a row of the table `state` holds another key than the one that is saved (one of {keys[:3]!r}); was "
                "the database edited? Nothing was written"
            )
        self._writer.keys_written += rows


# The value is bound as bytes and converted to text by SQLite. Refused: decoding it first, which copies every value once
# more while other threads wait. The condition keeps an id that is wrong from overwriting another key.
_STATE = ladder(
    "INSERT INTO state (id, key, revision, expires, value) VALUES",
    "(?, ?, ?, ?, CAST(? AS TEXT))",
    "ON CONFLICT (id) DO UPDATE SET revision = excluded.revision, expires = excluded.expires, value = excluded.value"
    " WHERE key = excluded.key",
)
_DELETE = ladder("DELETE FROM state WHERE id IN (", "?", ")")
_GOES_ON = f"(revision + max(excluded.epoch - epoch, 0) * {RESERVED})"
_SCOPES = ladder(
    "INSERT INTO scopes (number, scope, revision, epoch, due, floor, floor_at, events, bytes) VALUES",
    "(?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "ON CONFLICT (scope) DO UPDATE SET epoch = max(epoch, excluded.epoch), due = excluded.due,"
    f" revision = max(excluded.revision, {_GOES_ON}),"
    # A log that begins where the scope continues leaves the floor where it is.
    f" floor = CASE WHEN excluded.floor > {_GOES_ON} THEN excluded.floor ELSE floor END,"
    f" floor_at = CASE WHEN excluded.floor > {_GOES_ON} THEN max(floor_at, excluded.floor_at) ELSE floor_at END,"
    " events = events + excluded.events, bytes = bytes + excluded.bytes",
)
_EXTENTS = ladder("INSERT INTO extents (extent, scope, high) VALUES", "(?, ?, ?)", "")
_PLACES = ladder(
    "SELECT scopes.scope, number, extent, high FROM scopes LEFT JOIN extents ON extents.scope = number"
    " WHERE scopes.scope IN (",
    "?",
    ")",
)


def row_room(connection: sqlite3.Connection) -> int:
    """Return the size that the names and the value of a row may have together, in bytes."""
    return connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) - _ROW_OVERHEAD


class _Place(msgspec.Struct):
    """The place of the rows of a scope."""

    number: int
    extents: dict[int, int]
    """The higher bits of `created` -> the extent with those keys."""


class Writer:
    """Writes changes into one database, in one epoch of it. One thread at a time."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._places: dict[str, _Place] = {}
        self._answers = AnswerWriter()
        self._clock_ms = 0
        """The time that is saved."""
        self.given = 0
        """The last position of the journal that was assigned. Set before `write`."""
        self.logged: list[int] = []
        """The numbers of the scopes with changes for the journal that the last call of `write` has written."""
        self.log_size = 0
        """How many changes it has written into the journal."""
        self.acks: list[ConsumerChange] = []
        """The acknowledgements of the changes that it has written."""
        self.keys_written = 0
        """Keys that the running or last call of `write` has written so far. Any thread may read it."""

    def write(
        self, connection: sqlite3.Connection, batch: Iterable[ScopeChange], now_ms: int
    ) -> tuple[str, int] | None:
        """Write the batch inside the caller's transaction; return scope and revision of its last change, None if empty.

        Raises `UnsavableValue`, which names the key, for a value too large for SQLite, and library errors.
        """
        last: tuple[str, int] | None = None
        self.logged, self.log_size, self.acks, self.keys_written = [], 0, [], 0
        changes = iter(batch)
        while some := list(islice(changes, CHUNK_ROWS[0])):
            self._write_some(connection, some)
            last = some[-1].scope, some[-1].revision
        if now_ms:
            self._answers.drop_old(connection, now_ms)
            if now_ms - self._clock_ms >= _CLOCK_STEP_MS:
                connection.execute("UPDATE store SET clock = max(clock, ?)", (now_ms,))
                self._clock_ms = now_ms
        return last

    def forget(self) -> None:
        """Forget the scopes and extents of a transaction that was rolled back: they do not exist."""
        self._places.clear()
        self._answers.forget()
        self._clock_ms = 0

    def _write_some(self, connection: sqlite3.Connection, changes: Sequence[ScopeChange]) -> None:
        sizes = {at: sizes_of(change.log) for at, change in enumerate(changes) if change.log}
        self._find(connection, changes, sizes)
        state = _WriteState(self, connection)
        deleted = Write(connection, _DELETE, 1)
        emptied: set[tuple[str, int]] = set()
        room = row_room(connection)
        seen: set[str] = set()
        for change in changes:
            scope, place = change.scope, self._places[change.scope]
            if scope in seen:
                # Two statements may have collected the same key. Running the earlier rows first keeps the order.
                state.flush()
                deleted.flush()
                seen.clear()
            seen.add(scope)
            for created in change.removed:
                extent = place.extents.get(created >> EXTENT_BITS)
                if extent is not None:
                    deleted.add((extent << EXTENT_BITS | created & EXTENT_MASK,), 8)
                    emptied.add((scope, created >> EXTENT_BITS))
            for key, entry in change.entries.items():
                if entry is None:
                    continue
                size = len(scope) + len(key) + len(entry.json)
                # Names are counted at four bytes for each character, the most that UTF-8 takes.
                if size + 3 * (len(scope) + len(key)) > room:
                    raise UnsavableValue(
                        f"the value for key {key!r} of scope {scope!r} takes {len(entry.json)} bytes as JSON; together "
                        f"with its names that is more than a row can hold ({room} bytes). Split it over several keys",
                        scope,
                        key,
                    )
                created = entry.created
                id_ = place.extents[created >> EXTENT_BITS] << EXTENT_BITS | created & EXTENT_MASK
                state.add((id_, key, entry.revision, entry.expires_ms, entry.json), size)
        state.flush()
        deleted.flush()
        self._forget_empty(connection, emptied)
        if answers := [(self._places[change.scope].number, change.answers) for change in changes if change.answers]:
            self._answers.write(connection, answers, room)
        self.acks += [ConsumerChange(to, acked=(at,)) for change in changes for to, at in change.acks]
        if sizes:
            logs = [(self._places[changes[at].scope].number, changes[at].log, of) for at, of in sizes.items()]
            write_changes(connection, logs, room - ROOM_FOR_TEXTS)
            self.logged += [number for number, _, _ in logs]
            self.log_size += sum(len(log) for _, log, _ in logs)

    def _find(
        self, connection: sqlite3.Connection, changes: Sequence[ScopeChange], sizes: dict[int, list[int]]
    ) -> None:
        """Write the scopes of the changes, and find out where their rows are, or will be.

        `sizes`: of the changes for the journal, by the place of the scope's change in the batch.
        """
        places = self._places
        if len(places) > _KNOWN_SCOPES:
            places.clear()
        unknown = list({change.scope: None for change in changes if change.scope not in places})
        start = 0
        for rows, text in _PLACES.items():
            while len(unknown) - start >= rows:
                for scope, found, extent, high in connection.execute(text, unknown[start : start + rows]):
                    place = places.setdefault(scope, _Place(found, {}))
                    if extent is not None:
                        place.extents[high] = extent
                start += rows
        scopes = Write(connection, _SCOPES, 9)
        next_scope = 0
        for at, change in enumerate(changes):
            scope, revision = change.scope, change.revision
            if not 0 <= revision <= HIGHEST_REVISION:
                raise UnsavableValue(
                    f"the last write of scope {scope!r} has the number {revision}, the store holds numbers up to "
                    f"{HIGHEST_REVISION}. Export the scope and import it under another name, without its numbers",
                    scope,
                    None,
                )
            if scope not in places:
                next_scope = next_scope or number(connection, "SELECT coalesce(max(number), 0) + 1 FROM scopes")
                places[scope] = _Place(next_scope, {})
                next_scope += 1
            scopes.add(
                (
                    places[scope].number,
                    scope,
                    revision,
                    self._epoch,
                    change.due_ms,
                    *self._logged(change, sizes.get(at, [])),
                ),
                len(scope),
            )
        scopes.flush()
        self._make_extents(connection, changes)

    def _logged(self, change: ScopeChange, sizes: list[int]) -> tuple[int, int, int, int]:
        """Return where the journal of a scope begins to be complete, if it was not before, and what is added to it."""
        added = len(sizes), sum(sizes)
        since = change.logged_since
        if since is None:
            return change.revision, self.given, *added
        if since <= self._epoch * RESERVED:
            return 0, 0, *added  # everything that the scope ever had
        return since, change.log[0].position - 1 if change.log else self.given, *added

    def _make_extents(self, connection: sqlite3.Connection, changes: Sequence[ScopeChange]) -> None:
        made = Write(connection, _EXTENTS, 3)
        highest = first = -1
        for change in changes:
            place = self._places[change.scope]
            for high in sorted({entry.created >> EXTENT_BITS for entry in change.entries.values() if entry}):
                if high in place.extents:
                    continue
                if highest < 0:
                    highest = first = number(connection, "SELECT extents FROM store")
                highest += 1
                place.extents[high] = highest
                made.add((highest, place.number, high), 8)
        made.flush()
        if highest > first:
            # Counted, not max(extent): an extent that is assigned twice may come before an older one of its scope.
            connection.execute("UPDATE store SET extents = ?", (highest,))

    def _forget_empty(self, connection: sqlite3.Connection, emptied: Iterable[tuple[str, int]]) -> None:
        """Remove extents that have no rows left. The newest one of a scope stays: it will be written to again."""
        for scope, high in emptied:
            extents = self._places[scope].extents
            if high == max(extents):
                continue
            first = extents[high] << EXTENT_BITS
            found = connection.execute(
                "DELETE FROM extents WHERE extent = ? AND NOT EXISTS (SELECT 1 FROM state WHERE id BETWEEN ? AND ?)",
                (extents[high], first, first + EXTENT_MASK),
            )
            if found.rowcount:
                del extents[high]


# Named placeholders. Refused: `?1`, which CPython 3.12.0 to 3.12.3 deprecate with a sequence (python/cpython#117995).
# The joins go from the scope over its extents to its rows; CROSS keeps that order. An extent of a scope with a higher
# `high` has the higher number, so ids rise with it, and the id of the last row is where the next page begins.
_ORDERED = (
    "FROM scopes CROSS JOIN extents ON extents.scope = scopes.number CROSS JOIN state"
    f" ON state.id > max(:after, (extents.extent << {EXTENT_BITS}) - 1)"
    f" AND state.id <= (extents.extent << {EXTENT_BITS}) + {EXTENT_MASK}"
    f" WHERE scopes.scope = :scope AND extents.extent >= :after >> {EXTENT_BITS}"
    " ORDER BY extents.high, state.id LIMIT :limit"
)
_CREATED = f"(extents.high << {EXTENT_BITS}) | (state.id & {EXTENT_MASK})"
_REVISION = (
    f"SELECT coalesce((SELECT revision - epoch * {RESERVED} FROM scopes WHERE scope = :scope), 0)"  # noqa: S608 - constants
    f" + (SELECT max(epoch) FROM epochs) * {RESERVED}"
)
# A page is read as the texts of JSON arrays, one for each column: decoding them both splits them and checks that each
# value is JSON. Values have brackets of their own, so that what is not JSON cannot pass for two values, or for a half.
# Refused: one array for each row, for which SQLite joins texts twice as long; and rows with json_valid(value), which
# needs up to 40 times the size of a value in memory.
_PAGE = (
    f"SELECT ({_REVISION}), {HAS_ANSWERS}, count(*),"  # noqa: S608 - constants
    " '[' || group_concat(id) || ']', '[' || group_concat(created) || ']', CAST(json_group_array(key) AS BLOB),"
    " '[' || group_concat(revision) || ']', '[' || group_concat(coalesce(expires, 'null')) || ']',"
    " CAST('[[' || group_concat(value, '],[') || ']]' AS BLOB)"
    f" FROM (SELECT id, {_CREATED} AS created, key, state.revision AS revision, expires, value {_ORDERED})"
)
_PLAIN = f"SELECT id, {_CREATED}, CAST(key AS BLOB), state.revision, expires, CAST(value AS BLOB) {_ORDERED}"


def read_scope(connection: sqlite3.Connection, scope: str) -> ScopeState:
    """Read a scope as of one moment. Takes the memory of its entries and one page.

    Raises `StorageError`, which names the row, for a row that is not JSON, and library errors.
    """
    try:
        revision, answered, rows = _read_page(connection, scope, -1, _PAGE_ROWS)
        if len(rows) < _PAGE_ROWS and not answered:
            return _state(scope, _Tables(rows), len(rows), revision, {})
    except sqlite3.DataError as error:
        if primary_code(error) != sqlite3.SQLITE_TOOBIG:
            raise
    # Only several statements need a transaction to read as of one moment: it takes two more calls.
    connection.execute("BEGIN")
    try:
        tables = _Tables()
        count = 0
        for rows in _pages(connection, scope):
            tables.add(rows)
            count += len(rows)
        revision = revision_of(connection, scope)
        answers = read_answers(connection, scope)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return _state(scope, tables, count, revision, answers)


class _Tables:
    """The content of a scope's rows, in the tables that a scope in memory uses."""

    def __init__(self, rows: Iterable[_Row] = ()) -> None:
        self.values: dict[str, bytes] = {}
        self.revisions: dict[str, int] = {}
        self.created: dict[str, int] = {}
        self.deadlines: dict[str, int] = {}
        self.add(rows)

    def add(self, rows: Iterable[_Row]) -> None:
        """Take the rows of a page. Refused: `dict.update(zip(...))`, which takes nearly twice as long."""
        values, revisions, created, deadlines = self.values, self.revisions, self.created, self.deadlines
        for _, first, key, last, expires_ms, value in rows:
            values[key] = bytes(value)
            created[key] = first
            # The same number is one object in both tables: 32 bytes for each key that was never overwritten.
            revisions[key] = first if last == first else last
            if expires_ms is not None:
                deadlines[key] = expires_ms


def _state(scope: str, tables: _Tables, rows: int, revision: int, answers: dict[str, Answer]) -> ScopeState:
    if len(tables.values) != rows:
        raise StorageError(
            f"scope {scope!r} holds a key twice; was the database edited? `store verify` names the key: delete "
            "one of its rows with the sqlite3 tool (the view `entries` shows them)"
        )
    return ScopeState(tables.values, tables.revisions, tables.created, tables.deadlines, revision, answers)


def revision_of(connection: sqlite3.Connection, scope: str) -> int:
    """Return the number after which a scope continues."""
    ((revision,),) = connection.execute(_REVISION, {"scope": scope}).fetchall()
    return _checked_revision(scope, revision)


def _checked_revision(scope: str, revision: object) -> int:
    if type(revision) is not int or revision < 0:
        raise StorageError(
            f"the row of scope {scope!r} in the table `scopes` holds no number of its last write; was the database "
            "edited? Correct it with the sqlite3 tool and try again"
        )
    return revision


def read_pages(connection: sqlite3.Connection, scope: str) -> Iterator[tuple[str, Row]]:
    """Yield keys and entries in the order of their creation, in pages of about `_PAGE_BYTES`."""
    for rows in _pages(connection, scope):
        yield from _entries(rows).items()


def _pages(connection: sqlite3.Connection, scope: str) -> Iterator[list[_Row]]:
    after = -1
    limit = _PAGE_ROWS
    while True:
        try:
            _, _, rows = _read_page(connection, scope, after, limit)
        except sqlite3.DataError as error:
            if primary_code(error) != sqlite3.SQLITE_TOOBIG:
                raise
            if limit > 1:
                limit = max(1, limit // 8)
                continue
            rows = list(_read_plain(connection, scope, after, 1))
        yield rows
        if len(rows) < limit:
            return
        after = rows[-1][0]
        size = sum(memoryview(row[5]).nbytes for row in rows)
        limit = max(1, min(_PAGE_ROWS, len(rows) * _PAGE_BYTES // max(size, 1)))


def _entries(rows: list[_Row]) -> dict[str, Row]:
    return {key: Row(bytes(value), revision, created, expires) for _, created, key, revision, expires, value in rows}


def _read_page(connection: sqlite3.Connection, scope: str, after: int, limit: int) -> tuple[int, bool, list[_Row]]:
    """Read up to `limit` rows after an id, with one statement.

    Before them: the number after which the scope continues, and whether it has kept answers.
    """
    asked = {"scope": scope, "after": after, "limit": limit}
    ((revision, answered, count, *columns),) = connection.execute(_PAGE, asked).fetchall()
    revision = _checked_revision(scope, revision)
    if not count:
        return revision, answered, []
    try:
        rows = _decode_page(*columns)
        whole = len(rows) == count
    except _NOT_A_PAGE:
        whole = False
    if not whole:
        # One bad value makes the page unreadable: read its rows one by one to name it.
        rows = list(_read_plain(connection, scope, after, limit))
    return revision, answered, rows


def _decode_page(ids: str, created: str, keys: bytes, revisions: str, deadlines: str, values: bytes) -> list[_Row]:
    """Return the rows of a page. Raises `_NOT_A_PAGE` if there is one that is not as it was written."""
    return list(
        zip(
            _decode_numbers(ids),
            _decode_numbers(created),
            _decode_names(utf8(keys)),
            _decode_numbers(revisions),
            _decode_deadlines(deadlines),
            [value for (value,) in _decode_values(utf8(values))],
            strict=True,
        )
    )


def _read_plain(connection: sqlite3.Connection, scope: str, after: int, limit: int) -> Iterator[_Row]:
    """Yield rows of any size, one at a time. Raises `StorageError` for a row that is not JSON."""
    before = connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 0x7FFFFFFF)
    try:
        found = connection.execute(_PLAIN, {"scope": scope, "after": after, "limit": limit})
        try:
            for id_, created, key, revision, expires, value in found:
                name, data = decoded(scope, key or b"", value or b"")
                if type(revision) is not int or type(expires) not in (int, NoneType):
                    raise no_number(scope, name)
                yield id_, created, name, revision, expires, data
        finally:
            found.close()
    finally:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, before)


def no_number(scope: str, key: str) -> StorageError:
    """Return the error for a row whose numbers are not numbers."""
    return StorageError(
        f"the row for key {key!r} of scope {scope!r} has no number as its revision or deadline; was the database "
        "edited? Correct that row with the sqlite3 tool (table `state`) and try again"
    )


def decoded(scope: str, key: bytes, value: bytes) -> tuple[str, msgspec.Raw]:
    """Return the key and the value of a row. Raises `StorageError`, which names the row, if it does not hold JSON."""
    try:
        return key.decode(), _decode_value(utf8(value))
    except _NOT_JSON as error:
        raise StorageError(
            f"the row for key {key.decode(errors='replace')!r} of scope {scope!r} does not hold JSON ({error}); was "
            "the database edited? Correct that row with the sqlite3 tool (table `state`) and try again"
        ) from error


def utf8(text: bytes) -> bytes:
    """Return `text`. Raises `UnicodeDecodeError` if it is not UTF-8, which neither SQLite nor the decoder checks."""
    if not text.isascii():
        text.decode()
    return text


_HOLDS_A_KEY = (
    "EXISTS (SELECT 1 FROM extents CROSS JOIN state"  # noqa: S608 - constants
    f" ON state.id BETWEEN extents.extent << {EXTENT_BITS} AND (extents.extent << {EXTENT_BITS}) + {EXTENT_MASK}"
    " WHERE extents.scope = scopes.number)"
)
_NAMES = (
    "SELECT json_group_array(scope) FROM (SELECT scope FROM scopes WHERE scope {after} :after"  # noqa: S608 - constants
    f" AND (:empty OR {_HOLDS_A_KEY}) ORDER BY scope LIMIT :limit)"
)
_NAMES_FIRST, _NAMES_NEXT = _NAMES.format(after=">="), _NAMES.format(after=">")


def read_names(connection: sqlite3.Connection, *, empty: bool = False) -> list[str]:
    """Return the scopes that hold a key, sorted by name; with `empty`, all of them. Reads them page by page."""
    names: list[str] = []
    page = _page_of_names(connection, _NAMES_FIRST, "", empty=empty)
    while page:
        names += page
        page = _page_of_names(connection, _NAMES_NEXT, page[-1], empty=empty)
    return names


def _page_of_names(connection: sqlite3.Connection, statement: str, after: str, *, empty: bool) -> list[str]:
    asked = {"after": after, "empty": empty, "limit": _PAGE_ROWS}
    ((text,),) = connection.execute(statement, asked).fetchall()
    return _decode_names(text)


# SQLite compares the UTF-8 bytes of names, which is the order of `Range`. The keys of a scope have no index: they are
# sorted here, for tools.
_KEYS = (
    "SELECT key FROM entries WHERE scope = :scope AND (expires IS NULL OR expires > :now)"
    " AND (key > :low OR (:included AND key = :low)) AND (:high IS NULL OR key < :high) ORDER BY key {order}"
    " LIMIT coalesce(:limit, -1)"
)
_KEYS_UP, _KEYS_DOWN = _KEYS.format(order="ASC"), _KEYS.format(order="DESC")


def read_keys(connection: sqlite3.Connection, scope: str, within: Range, now_ms: int) -> Iterator[str]:
    """Yield the keys within a range, in its order, that have not expired at `now_ms`."""
    low, included = within.low()
    asked = {
        "scope": scope,
        "now": now_ms,
        "low": low,
        "included": included,
        "high": within.high(),
        "limit": within.limit,
    }
    for (key,) in connection.execute(_KEYS_DOWN if within.reverse else _KEYS_UP, asked):
        yield key


_DUE = "SELECT due, scope FROM scopes WHERE due IS NOT NULL ORDER BY due LIMIT ?"


def read_due(connection: sqlite3.Connection, limit: int) -> list[tuple[int, str]]:
    """Return up to `limit` scopes with the time at which their first key expires (ms), the earliest first."""
    return connection.execute(_DUE, (limit,)).fetchall()


COUNTS = (
    "SELECT (SELECT count(*) FROM (SELECT 1 FROM scopes WHERE"  # noqa: S608 - constants
    f" {_HOLDS_A_KEY} LIMIT :limit)), (SELECT count(*) FROM (SELECT 1 FROM state LIMIT :limit))"
)
"""Scopes that hold a key, and keys, up to a limit."""
