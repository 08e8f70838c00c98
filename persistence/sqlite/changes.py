"""The rows of the journal: written with the state, and read in pages."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from scopestate.actors.journal import EVENT_OVERHEAD, Gone, Letter
from scopestate.errors import StorageError, UnsavableValue
from scopestate.ops.results import EventType, StateEvent
from scopestate.ops.trace_context import TracedDepth
from scopestate.ops.turns import end_of_prefix
from scopestate.persistence.sqlite.database import primary_code
from scopestate.persistence.sqlite.schema import RESERVED
from scopestate.persistence.sqlite.statements import Parameter, Write, ladder
from scopestate.persistence.sqlite.traces import restore_traces, write_traces

KINDS: Final[tuple[EventType, ...]] = ("state:created", "state:updated", "state:deleted", "state:expired")
"""The column `kind` is an index into this."""
_NUMBERS: Final = {kind: number for number, kind in enumerate(KINDS)}

PAGE_ROWS: Final = 1000
PAGE_BYTES: Final = 1024 * 1024
"""Bytes of the events that one statement reads: half a page of SQLite's length limit even if each byte is escaped."""
LETTER_TEXT: Final = 64 * 1024
"""Characters that a dead letter keeps of its error, and of its traceback."""
ROOM_FOR_TEXTS: Final = 16 * LETTER_TEXT
"""Bytes of a row that a change leaves free, so that a dead letter can hold it."""

EVENT_COLUMNS: Final = "position, scope, revision, last, kind, time, depth, size, expired, late, key, old, new"
_INSERT: Final = ladder(
    f"INSERT INTO journal ({EVENT_COLUMNS}) VALUES",
    "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, CAST(? AS TEXT), CAST(? AS TEXT))",
    "",
)
EVENT_WIDTH: Final = 13
_STEP: Final = 64 * EVENT_WIDTH
_STEP_BYTES: Final = 32 * 1024
"""How many parameters, or bytes, of rows are passed on at a time."""

EventRow = tuple[Parameter, ...]


def sizes_of(events: Iterable[StateEvent]) -> list[int]:
    """Return how many bytes each change counts in the journal."""
    return [
        EVENT_OVERHEAD + len(event.key) + len(event.old_json or b"") + len(event.new_json or b"") for event in events
    ]


def event_row(event: StateEvent, scope: int, size: int) -> EventRow:
    """Return the columns of a change. `scope`: its number."""
    return (
        event.position,
        scope,
        event.revision,
        event.transaction if event.transaction > event.revision else None,
        _NUMBERS[event.event_type],
        event.time_ms,
        event.depth,
        size,
        event.expired_at,
        event.late_ms,
        event.key,
        event.old_json,
        event.new_json,
    )


def write_changes(
    connection: sqlite3.Connection, logs: Sequence[tuple[int, Sequence[StateEvent], list[int]]], room: int
) -> None:
    """Write changes: for each scope its number, its log, and their sizes. `room`: bytes that a row can hold.

    Raises `UnsavableValue`, which names scope and key, for a change that no row can hold.
    """
    rows = [
        (event.position, scope, event, size)
        for scope, log, sizes in logs
        for event, size in zip(log, sizes, strict=True)
    ]
    if len(logs) > 1:
        # In the order of the table: appended rows are written a third quicker. No two have the same position.
        rows.sort()
    if max(size for _, _, sizes in logs for size in sizes) > room // 4:
        _check_room(rows, room)
    written = Write(connection, _INSERT, EVENT_WIDTH)
    numbers = _NUMBERS
    parameters: list[Parameter] = []
    total = 0
    for position, scope, event, size in rows:
        revision, last = event.revision, event.transaction
        # Written inline, as is the collecting: with a call for each row it takes a third longer.
        parameters += (
            position,
            scope,
            revision,
            last if last > revision else None,
            numbers[event.event_type],
            event.time_ms,
            event.depth,
            size,
            event.expired_at,
            event.late_ms,
            event.key,
            event.old_json,
            event.new_json,
        )
        total += size
        if total >= _STEP_BYTES or len(parameters) >= _STEP:
            written.extend(parameters, total)
            parameters, total = [], 0
    written.extend(parameters, total)
    written.flush()
    if TracedDepth.is_used:
        write_traces(connection, (event for _, _, event, _ in rows))


def _check_room(rows: Iterable[tuple[int, int, StateEvent, int]], room: int) -> None:
    for _, _, event, size in rows:
        if size + 3 * len(event.key) > room:
            raise UnsavableValue(
                f"the change of key {event.key!r} of scope {event.scope!r} takes {size} bytes with the value "
                f"before, which is more than a row of the journal can hold ({room} bytes). Split the value over "
                "several keys, or keep no history of the scope",
                event.scope,
                event.key,
            )


# -------------------------------------------------------------------------------------------------------------- reading

# As the pages of a scope: one text for each column. An absent value is an empty array among arrays of one value.
_COLUMNS: Final = (
    "count(*), '[' || group_concat(position) || ']', CAST(json_group_array(name) AS BLOB),"
    " '[' || group_concat(revision) || ']', '[' || group_concat(coalesce(last, revision)) || ']',"
    " '[' || group_concat(kind) || ']', '[' || group_concat(time) || ']', '[' || group_concat(depth) || ']',"
    " '[' || group_concat(coalesce(expired, 'null')) || ']', '[' || group_concat(coalesce(late, 'null')) || ']',"
    " CAST(json_group_array(key) AS BLOB),"
    " CAST('[' || group_concat(CASE WHEN old IS NULL THEN '[]' ELSE '[' || old || ']' END) || ']' AS BLOB),"
    " CAST('[' || group_concat(CASE WHEN new IS NULL THEN '[]' ELSE '[' || new || ']' END) || ']' AS BLOB)"
)
_ROWS: Final = (
    "SELECT journal.position, scopes.scope AS name, journal.revision, last, kind, time, depth, expired, late, key, old,"
    " new FROM {journal} AS journal CROSS JOIN scopes ON scopes.number = journal.scope"
)
_PLAIN: Final = (
    "SELECT position, CAST(name AS BLOB), revision, coalesce(last, revision), kind, time, depth, expired, late,"
    " CAST(key AS BLOB), CAST(old AS BLOB), CAST(new AS BLOB) FROM"
)


class _Source:
    """The statements for one order in which changes can be read."""

    def __init__(self, table: str, where: str, order: str) -> None:
        rows = f"({_ROWS.format(journal=table)} WHERE {where} ORDER BY {order} LIMIT :limit)"
        self.sizes = (
            "SELECT '[' || group_concat(place) || ']', '[' || group_concat(size) || ']' FROM"  # noqa: S608 - ours
            f" (SELECT {order} AS place, size FROM {table} AS journal WHERE {where} ORDER BY {order} LIMIT :limit)"
        )
        self.page = f"SELECT {_COLUMNS} FROM {rows}"  # noqa: S608 - ours
        self.plain = f"{_PLAIN} {rows}"


_BY_POSITION: Final = _Source("journal", "journal.position > :after AND journal.position <= :upto", "journal.position")
_OF_SCOPE: Final = _Source(
    "journal",
    "journal.scope = (SELECT number FROM scopes WHERE scope = :scope) AND journal.revision > :after"
    " AND journal.revision <= :upto",
    "journal.revision",
)
_AT: Final = _Source(
    "journal",
    "journal.position IN (SELECT value FROM json_each(:positions)) AND journal.position > :after"
    " AND journal.position <= :upto",
    "journal.position",
)
LETTER_EVENTS: Final = _Source(
    "(SELECT *, id AS place FROM dead_letters)",
    "journal.place IN (SELECT value FROM json_each(:positions)) AND journal.place > :after AND journal.place <= :upto",
    "journal.place",
)

_HIGHEST: Final = 2**63 - 1
_numbers = msgspec.json.Decoder(list[int]).decode
_optional = msgspec.json.Decoder(list[int | None]).decode
_texts = msgspec.json.Decoder(list[str]).decode
_values = msgspec.json.Decoder(list[list[msgspec.Raw]]).decode
_NOT_A_PAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, IndexError)


def read_by_position(
    connection: sqlite3.Connection, after: int, upto: int | None, most: int, most_bytes: int
) -> list[StateEvent]:
    """Return the changes after a position, up to and including another one, in order."""
    return _read(connection, _BY_POSITION, {}, after, upto, most, most_bytes)


def read_of_scope(
    connection: sqlite3.Connection, scope: str, after: int, upto: int | None, most: int, most_bytes: int
) -> list[StateEvent]:
    """Return the changes of a scope after a revision, up to and including another one, in order."""
    return _read(connection, _OF_SCOPE, {"scope": scope}, after, upto, most, most_bytes)


def read_at(connection: sqlite3.Connection, positions: Iterable[int]) -> list[StateEvent]:
    """Return the changes at these positions in order, leaving out those that are not there."""
    return _read_listed(connection, _AT, positions)


def read_letter_events(connection: sqlite3.Connection, ids: Iterable[int]) -> list[StateEvent]:
    """Return the events of dead letters, all of which exist, by id."""
    return _read_listed(connection, LETTER_EVENTS, ids)


def _read_listed(connection: sqlite3.Connection, source: _Source, wanted: Iterable[int]) -> list[StateEvent]:
    listed = sorted(set(wanted))
    found: list[StateEvent] = []
    for start in range(0, len(listed), PAGE_ROWS):
        some = listed[start : start + PAGE_ROWS]
        text = msgspec.json.encode(some).decode()
        found += _read(connection, source, {"positions": text}, some[0] - 1, some[-1], len(some), _HIGHEST)
    return found


def _read(
    connection: sqlite3.Connection,
    source: _Source,
    asked: Mapping[str, str],
    after: int,
    upto: int | None,
    most: int,
    most_bytes: int,
) -> list[StateEvent]:
    """Read pages until there are `most` rows, or rows of `most_bytes`. At least one, if one exists."""
    found: list[StateEvent] = []
    names: dict[str, str] = {}
    last = _HIGHEST if upto is None else upto
    while most > 0 and (most_bytes > 0 or not found):
        limits: dict[str, str | int] = {**asked, "after": after, "upto": last, "limit": min(most, PAGE_ROWS)}
        ((places_text, sizes_text),) = connection.execute(source.sizes, limits).fetchall()
        if places_text is None:
            break
        places, sizes = _numbers(places_text), _numbers(sizes_text)
        if found and sizes[0] > most_bytes:
            break
        rows = _rows_within(sizes, min(most_bytes, PAGE_BYTES))
        limits["upto"] = after = places[rows - 1]
        found += _page(connection, source, limits, names)
        most -= rows
        most_bytes -= sum(sizes[:rows])
        if rows == len(places) < PAGE_ROWS:
            break
    if TracedDepth.is_used:
        restore_traces(connection, found)
    return found


def _rows_within(sizes: Sequence[int], most_bytes: int) -> int:
    total = 0
    for rows, size in enumerate(sizes):
        total += size
        if total > most_bytes and rows:
            return rows
    return len(sizes)


def _page(
    connection: sqlite3.Connection, source: _Source, limits: Mapping[str, str | int], names: dict[str, str]
) -> list[StateEvent]:
    try:
        ((count, *columns),) = connection.execute(source.page, limits).fetchall()
        if not count:
            return []
        events = _decode(columns, names)
        if len(events) == count:
            return events
    except _NOT_A_PAGE:
        pass  # reading the rows one by one finds the damaged one
    except sqlite3.DataError as error:
        if primary_code(error) != sqlite3.SQLITE_TOOBIG:
            raise
    return list(_read_plain(connection, source, limits))


def _decode(columns: Sequence[Any], names: dict[str, str]) -> list[StateEvent]:
    """Return the events of a page. Raises `_NOT_A_PAGE` if a row is not as it was written."""
    positions, scopes, revisions, lasts, kinds, times, depths, expired, late, keys, old, new = columns
    known = names.setdefault
    kind_of = KINDS
    return [
        StateEvent(
            kind_of[kind],
            known(scope, scope),
            key,
            bytes(before[0]) if before else None,
            bytes(after[0]) if after else None,
            revision,
            depth,
            deadline,
            late_ms,
            last,
            time_ms,
            position,
        )
        for position, scope, revision, last, kind, time_ms, depth, deadline, late_ms, key, before, after in zip(
            _numbers(positions),
            _texts(_utf8(scopes)),
            _numbers(revisions),
            _numbers(lasts),
            _numbers(kinds),
            _numbers(times),
            _numbers(depths),
            _optional(expired),
            _optional(late),
            _texts(_utf8(keys)),
            _checked(_values(_utf8(old))),
            _checked(_values(_utf8(new))),
            strict=True,
        )
    ]


def _checked(values: list[list[msgspec.Raw]]) -> list[list[msgspec.Raw]]:
    # A text that is not JSON, such as `1,2`, could pass for two values.
    if any(len(value) > 1 for value in values):
        raise ValueError("a value is not JSON")
    return values


def _utf8(text: bytes) -> bytes:
    if not text.isascii():
        text.decode()
    return text


def _read_plain(
    connection: sqlite3.Connection, source: _Source, limits: Mapping[str, str | int]
) -> Iterator[StateEvent]:
    """Yield changes of any size, one at a time. Raises `StorageError` for a row that is damaged."""
    before = connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 0x7FFFFFFF)
    try:
        rows = connection.execute(source.plain, limits)
        try:
            for position, scope, revision, last, kind, time_ms, depth, expired, late, key, old, new in rows:
                try:
                    if not all(type(number) is int for number in (revision, last, time_ms, depth)):
                        raise TypeError("it has no number where one belongs")
                    for value in (old, new):
                        if value is not None:
                            msgspec.json.decode(_utf8(value), type=msgspec.Raw)
                    yield StateEvent(
                        KINDS[kind],
                        scope.decode(),
                        key.decode(),
                        old,
                        new,
                        revision,
                        depth,
                        expired,
                        late,
                        last,
                        time_ms,
                        position,
                    )
                except (*_NOT_A_PAGE, TypeError) as error:
                    raise StorageError(
                        f"the change at position {position} of the journal is damaged ({error}); was the database "
                        "edited? Correct or delete that row with the sqlite3 tool (table `journal`) and try again"
                    ) from error
        finally:
            rows.close()
    finally:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, before)


# ------------------------------------------------------------------------------------------------------ what is missing

_TRIMMED_UP_TO: Final = (
    "SELECT coalesce(max(floor_at), 0) FROM scopes WHERE (:scope IS NULL OR scope = :scope)"
    " AND scope >= :prefix AND (:high IS NULL OR scope < :high)"
)
_OF_ONE: Final = f"""
    SELECT revision, revision + ((SELECT max(epoch) FROM epochs) - epoch) * {RESERVED}, floor,
        (SELECT revision FROM journal WHERE scope = number AND revision <= :revision ORDER BY revision DESC LIMIT 1),
        (SELECT revision FROM journal WHERE scope = number AND revision > :revision ORDER BY revision LIMIT 1)
    FROM scopes WHERE scope = :scope
"""  # noqa: S608 - constants


def trimmed_up_to(connection: sqlite3.Connection, scope: str | None, prefix: str) -> int:
    """Return the position after which every change of a scope, or of those with a prefix, is in the journal."""
    asked = {"scope": scope, "prefix": prefix, "high": end_of_prefix(prefix)}
    ((position,),) = connection.execute(_TRIMMED_UP_TO, asked).fetchall()
    return int(position)


def gone_in_scope(connection: sqlite3.Connection, scope: str, revision: int, epoch: int) -> Gone | None:
    """Return why the changes of a scope after a revision are not all in the journal; None if they are."""
    rows = connection.execute(_OF_ONE, {"scope": scope, "revision": revision}).fetchall()
    # A scope that was never saved begins each epoch at a multiple of RESERVED.
    saved, begins, floor, before, behind = rows[0] if rows else (0, epoch * RESERVED, 0, None, None)
    if revision < floor:
        return "trimmed"
    if revision >= begins:
        return None  # of this session, or the last one that was saved
    known = floor if before is None else max(before, floor)
    # A session that began and ended without a saved write left no row. One that began at this number saw all before it.
    if (revision - known) % RESERVED == 0:
        return None
    following = behind if behind is not None else begins if revision > saved else saved
    # Numbers of one session are closer together than half of the gap after an unclean end.
    return "lost in a crash" if following - revision >= RESERVED // 2 else None


def oldest_of(connection: sqlite3.Connection, scope: str) -> tuple[int, int] | None:
    """Return revision and position of the oldest change of a scope; None if there is none."""
    rows = connection.execute(
        "SELECT revision, position FROM journal WHERE scope = (SELECT number FROM scopes WHERE scope = ?)"
        " ORDER BY revision LIMIT 1",
        (scope,),
    ).fetchall()
    return (int(rows[0][0]), int(rows[0][1])) if rows else None


# --------------------------------------------------------------------------------------------------------- dead letters

LETTER_COLUMNS: Final = f"consumer, attempts, first, died, error, traceback, {EVENT_COLUMNS}"
_INSERT_LETTERS: Final = ladder(
    f"REPLACE INTO dead_letters ({LETTER_COLUMNS}) VALUES",
    "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, CAST(? AS TEXT), CAST(? AS TEXT))",
    "",
)


def write_letters(connection: sqlite3.Connection, letters: Iterable[tuple[int, Letter]]) -> None:
    """Write dead letters, each with the number of the scope of its event."""
    written = Write(connection, _INSERT_LETTERS, EVENT_WIDTH + 6)
    events: list[StateEvent] = []
    for scope, letter in letters:
        (size,) = sizes_of([letter.event])
        row = (
            letter.consumer,
            letter.attempts,
            letter.first_ms,
            letter.died_ms,
            _text(letter.error),
            _text(letter.traceback),
            *event_row(letter.event, scope, size),
        )
        written.add(row, size + len(letter.error) + len(letter.traceback))
        events.append(letter.event)
    written.flush()
    write_traces(connection, events)  # the journal may have forgotten them


def _text(text: str) -> str:
    # The beginning of an error says most, and the end of a traceback. Lone surrogates cannot be stored.
    kept = text if len(text) <= LETTER_TEXT else f"{text[: LETTER_TEXT // 2]}\n...\n{text[-LETTER_TEXT // 2 :]}"
    return kept.encode(errors="backslashreplace").decode()
