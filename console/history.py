"""The changes of one key, as far as the journal or the ring of the engine still has them."""

from __future__ import annotations

import time
from collections import deque
from typing import Final, NamedTuple

from scopestate.engine import Engine
from scopestate.errors import Compacted, DeserializationError, InvalidCursor, StorageError, Unsupported
from scopestate.ops.changes import Change
from scopestate.ops.results import EntryView
from scopestate.watching import Changes

SHOWN: Final = 50
"""The number of newest changes that are shown."""
WINDOW: Final = 20_000
"""The number of changes of the whole scope that are searched."""
LONGEST_S: Final = 2.0
COUNTED: Final = 2**40
"""Revisions below this count writes. In Redis revisions are made from the time, and do not count anything."""


class Past(NamedTuple):
    """The changes of a key, the newest first."""

    changes: list[Change]
    note: str
    """What is missing, and why; empty if nothing is."""


def history(engine: Engine, scope: str, key: str, entry: EntryView | None) -> Past:
    """Return the known changes of a key. `entry` is its current entry."""
    last = 0 if entry is None else entry.revision
    since: int | str = max(0, last - WINDOW) if last < COUNTED else 0
    ends = time.monotonic() + LONGEST_S
    try:
        try:
            found, whole = _read(engine, scope, key, since, last, ends)
            return Past(found, _note(since, whole=whole))
        except Compacted as compacted:
            if compacted.oldest is None:
                return Past([], "No earlier changes are kept: the rule `history` of the scope keeps them.")
            found, whole = _read(engine, scope, key, compacted.oldest, last, ends)
            return Past(found, _note(1, whole=whole))
    except Unsupported as error:
        return Past([], str(error))
    except (Compacted, InvalidCursor, DeserializationError, StorageError) as error:
        return Past([], f"The changes cannot be read: {error}")


def _note(since: int | str, *, whole: bool) -> str:
    if not whole:
        return "Reading took too long, so the newest changes may be missing."
    return "Earlier changes are not kept, or were not looked through." if since else ""


def _read(engine: Engine, scope: str, key: str, since: int | str, last: int, ends: float) -> tuple[list[Change], bool]:
    """Return the changes after a cursor or a revision, and whether they are complete."""
    found: deque[Change] = deque(maxlen=SHOWN)
    with engine.watch(scope, key=key, since=since) as changes:
        while (change := _next(changes)) is not None:
            found.append(change)
            if change.revision == last:
                break
            if time.monotonic() > ends:
                return list(reversed(found)), False
    return list(reversed(found)), True


def _next(changes: Changes) -> Change | None:
    try:
        return changes.get(0)
    except TimeoutError:
        return None
