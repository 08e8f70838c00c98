"""How much of the journal is kept for consumers, and which events are kept for one consumer."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Final

import msgspec

from scopestate.actors.journal import Needed, Rules

_LOGGED: Final = "SELECT number, scope, events, bytes FROM scopes INDEXED BY scopes_logged WHERE events > 0"
_BEHIND: Final = (
    "SELECT count(*) FROM journal WHERE scope = ?"
    " AND (position > ? OR position IN (SELECT position FROM deliveries WHERE NOT over))"
)
_OPEN: Final = (
    "SELECT position FROM deliveries WHERE consumer = :consumer AND NOT over AND NOT held AND position <= :done"
    " AND position <= :upto ORDER BY position LIMIT :most"
)
_REST: Final = (
    "SELECT position FROM journal WHERE position > :done AND position <= :upto"
    " AND scope IN (SELECT value FROM json_each(:scopes))"
    " AND position NOT IN (SELECT position FROM deliveries WHERE consumer = :consumer AND held)"
    " ORDER BY position LIMIT :most"
)


def measure(connection: sqlite3.Connection, rules: Rules | None) -> Needed:
    """Return what is kept for consumers. Reads as of one moment."""
    events = size = 0
    done: dict[int, int] = {}
    wanted: dict[int, tuple[int, int]] = {}
    groups: set[frozenset[int]] = set()
    connection.execute("BEGIN")
    try:
        dones: dict[int, int] = dict(connection.execute("SELECT number, done FROM consumers").fetchall())
        for number, name, logged, bytes_of_all, consumers in _wanted(connection, rules):
            group = frozenset(dones.keys() & consumers)
            if not group:
                continue
            groups.add(group)
            done.update({consumer: dones[consumer] for consumer in group})
            count, bytes_ = logged, bytes_of_all
            if rules is not None and rules.history(name) is not None:
                # What the rule keeps is bounded by the rule.
                ((behind,),) = connection.execute(_BEHIND, (number, min(dones[one] for one in group))).fetchall()
                count, bytes_ = behind, bytes_of_all * behind // logged
            events += count
            size += bytes_
            for consumer in group:
                before = wanted.get(consumer, (0, 0))
                wanted[consumer] = before[0] + count, before[1] + bytes_
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return Needed(events, size, done, wanted, frozenset(groups))


def _wanted(connection: sqlite3.Connection, rules: Rules | None) -> Iterator[tuple[int, str, int, int, frozenset[int]]]:
    """Yield the scopes that have changes and may be wanted by consumers: number, name, changes, bytes, consumers."""
    if rules is not None:
        for number, name, count, size in connection.execute(_LOGGED).fetchall():
            if consumers := rules.consumers(name):
                yield number, name, count, size, frozenset(consumers)


def oldest_of(connection: sqlite3.Connection, rules: Rules | None, consumer: int, upto: int, most: int) -> list[int]:
    """Return the positions of the oldest events that are kept for a consumer."""
    connection.execute("BEGIN")
    try:
        found = connection.execute("SELECT done FROM consumers WHERE number = ?", (consumer,)).fetchall()
        if not found:
            return []
        scopes = [number for number, *_, consumers in _wanted(connection, rules) if consumer in consumers]
        asked = {
            "consumer": consumer,
            "done": found[0][0],
            "upto": upto,
            "most": most,
            "scopes": msgspec.json.encode(scopes).decode(),
        }
        positions = [position for (position,) in connection.execute(_OPEN, asked).fetchall()]
        asked["most"] = most - len(positions)
        positions += [position for (position,) in connection.execute(_REST, asked).fetchall()]
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return positions
