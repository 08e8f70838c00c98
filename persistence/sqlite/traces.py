"""The traces of the changes in the journal and of dead letters: a separate table, made when the first trace is written.

The store of a program without traces does not have the table, and is the same file as without this module. An earlier
scopestate ignores the table; the triggers of the database keep it in step there as well.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from scopestate.ops.results import StateEvent
from scopestate.ops.trace_context import TracedDepth, context_of, read_text
from scopestate.persistence.sqlite.statements import Write, ladder

_IN_LETTER: Final = """EXISTS (
    SELECT 1 FROM consumers CROSS JOIN dead_letters
        ON dead_letters.consumer = consumers.number AND dead_letters.position = old.position)"""
_TABLES: Final = (
    # `trace` is a traceparent; the tracestate, if there is one, follows a space.
    "CREATE TABLE traces (position INTEGER PRIMARY KEY, trace TEXT NOT NULL)",
    # A trace is needed as long as the journal has the change, or a dead letter has a copy of it.
    f"""CREATE TRIGGER traces_of_journal AFTER DELETE ON journal BEGIN
        DELETE FROM traces WHERE position = old.position AND NOT {_IN_LETTER};
    END""",  # noqa: S608 - constants
    f"""CREATE TRIGGER traces_of_dead_letters AFTER DELETE ON dead_letters BEGIN
        DELETE FROM traces WHERE position = old.position AND NOT {_IN_LETTER}
            AND NOT EXISTS (SELECT 1 FROM journal WHERE journal.position = old.position);
    END""",  # noqa: S608 - constants
)
_WRITE: Final = ladder("REPLACE INTO traces (position, trace) VALUES", "(?, ?)", "")
_READ: Final = "SELECT position, trace FROM traces WHERE position IN (SELECT value FROM json_each(?))"


def note_traces(connection: sqlite3.Connection) -> None:
    """Make `restore_traces` look for traces from now on, in this process, if the database has any."""
    if _has_table(connection):
        TracedDepth.is_used = True


def write_traces(connection: sqlite3.Connection, events: Iterable[StateEvent]) -> None:
    """Write the traces that events carry, within the caller's transaction."""
    if not TracedDepth.is_used:
        return
    rows = [(event.position, context.text) for event in events if (context := context_of(event.depth)) is not None]
    if not rows:
        return
    if not _has_table(connection):
        for statement in _TABLES:
            connection.execute(statement)
    written = Write(connection, _WRITE, 2)
    for row in rows:
        written.add(row, len(row[1]))
    written.flush()


def restore_traces(connection: sqlite3.Connection, events: Sequence[StateEvent]) -> None:
    """Give events that were read the traces that they had. A text that is not one is ignored."""
    if not TracedDepth.is_used or not events or not _has_table(connection):
        return
    positions = msgspec.json.encode([event.position for event in events]).decode()
    found = dict(connection.execute(_READ, (positions,)).fetchall())
    for event in events:
        text = found.get(event.position)
        if isinstance(text, str):
            event.depth = TracedDepth.of(event.depth, read_text(text))


def _has_table(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'traces'").fetchall())
