"""The view of a scope of which only a part is in memory."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from scopestate.actors.index import OrderedKeys
from scopestate.actors.ports import Answer, Row, StoredKeys
from scopestate.actors.view import WithDeadlines
from scopestate.actors.wheel import Wheel
from scopestate.ops.ranges import Count, DeleteRange, Entries, Keys, Pairs, ReadPage, State, Values
from scopestate.ops.turns import Entry, Items, List, Range, Turn
from scopestate.ops.writes import Durable, Expire, Once

if TYPE_CHECKING:
    from scopestate.actors.scope import Surroundings

_NO_KEYS: Final = OrderedKeys({}, lambda: 0)
_FEW: Final = 1000
"""This many keys, with what is stored under them, are read in a few milliseconds."""
_READ_AHEAD: Final = 256
"""Entries that are read together for a turn that has listed keys."""
_LIKE_A_PAGE: Final = 100
"""A page of entries takes about as long as reading this many keys one by one: 5 ms."""
_LIKE_A_COUNT: Final = 2000
"""Counting a million keys takes about as long as reading this many keys one by one."""
_LOOK_AT_EACH: Final = (Pairs, Values, Entries, State, ReadPage, DeleteRange)
"""Turns that read what is stored under each key that they list."""


class Part(Protocol):
    """The part of a scope that is in memory, as its view uses it."""

    scope: str

    def bring(self, keys: Iterable[str]) -> int:
        """Read keys that are not in memory. Returns how many those were."""

    def bring_due(self, now_ms: int) -> int:
        """Read the next deadlines, if those in memory may not be the first. All up to the returned time are there."""

    def drop_deadlines(self, keys: Iterable[str]) -> None:
        """Drop the deadlines of keys that do not exist."""

    def changed(self) -> dict[str, None]:
        """Return the keys that may differ from the store, deleted ones too."""


def is_long(turn: Turn[Any]) -> bool:
    """True if a turn that only reads may read any number of entries."""
    if isinstance(turn, (List, Items)):
        return True
    if isinstance(turn, (Keys, Pairs, Values, Entries, State, ReadPage)):
        limit = turn.within.limit
        return limit > _FEW if limit is not None else not isinstance(turn, ReadPage)
    return False


def is_of_everything(turn: Turn[Any]) -> bool:
    """True if a long turn reads the whole scope."""
    if isinstance(turn, (List, Items)):
        return True
    within: Range = turn.within  # type: ignore[attr-defined]  # of all other long ones
    return within.low() == ("", True) and within.high() is None and within.limit is None


def keys_read(turn: Turn[Any]) -> int:
    """Return the cost of a turn without given keys, as a number of keys to read."""
    while isinstance(turn, (Once, Durable)):
        turn = turn.turn
    if isinstance(turn, Expire):
        return 0  # it would cost as much if the whole scope were in memory
    return _LIKE_A_COUNT if isinstance(turn, Count) else _LIKE_A_PAGE


class Keyed(WithDeadlines):
    """The view of such a scope. Reads keys that are not in memory, and merges the store with changes in memory."""

    __slots__ = ("_by_page", "_created", "_listed", "_looks_at_each", "_rows", "_scope", "_stored", "_writes")

    def __init__(
        self,
        scope: Part,
        around: Surroundings,
        stored: StoredKeys,
        values: dict[str, bytes],
        revisions: dict[str, int],
        created: dict[str, int],
        answers: dict[str, Answer],
        deadlines: dict[str, int],
        wheel: Wheel,
    ) -> None:
        super().__init__(scope.scope, around, _NO_KEYS, values, revisions, answers, deadlines, wheel)
        self._scope = scope
        self._stored = stored
        self._created = created
        self._rows: dict[str, Row] = {}
        """Rows that a read-only turn has read for the keys that it listed. They do not stay in memory."""
        self._listed: list[str] = []
        """Keys that the turn has listed and not read yet, the last one first."""
        self._looks_at_each = self._by_page = self._writes = False
        self.get = self._get

    def begin(self, turn: Turn[Any] | None) -> None:
        """Begin a turn. `turn`: one without given keys; None: one with given keys."""
        self._rows, self._listed = {}, []
        self._looks_at_each = False
        if turn is not None:
            self._writes = turn.writes
            while isinstance(turn, (Once, Durable)):
                turn = turn.turn
            self._looks_at_each, self._by_page = isinstance(turn, _LOOK_AT_EACH), isinstance(turn, ReadPage)

    def _get(self, key: str) -> bytes | None:
        row = self._row(key)
        if row is None:
            return self._get_unexpired(key)
        return None if self._is_over(row) else row.json

    def entry(self, key: str) -> Entry | None:
        row = self._row(key)
        if row is None:
            return super().entry(key)
        return None if self._is_over(row) else Entry(row.json, row.revision, row.expires_ms)

    def lapsed(self, key: str) -> Entry | None:
        if key not in self._values:
            self._scope.bring((key,))
        return super().lapsed(key)

    def due(self, limit: int) -> Sequence[str]:
        """Return keys that have expired and are still stored, by deadline. Reads them into memory."""
        complete_ms = self._scope.bring_due(self.now_ms)
        found = [key for key in super().due(limit) if self._deadlines[key] <= complete_ms]
        self._scope.bring(found)
        if gone := [key for key in found if key not in self._values]:
            self._scope.drop_deadlines(gone)
        return found

    def _is_over(self, row: Row) -> bool:
        return row.expires_ms is not None and row.expires_ms <= self.now_ms

    def _row(self, key: str) -> Row | None:
        """Read a key into memory and return None, or return its row if it need not stay in memory."""
        if key in self._values:
            return None
        if key not in self._rows:
            listed = self._listed
            if not self._looks_at_each or not listed:
                self._scope.bring((key,))
                return None
            ahead = [listed.pop() for _ in range(min(_READ_AHEAD, len(listed)))]
            if key not in ahead:  # it is read a second time
                ahead.append(key)
            if self._writes:
                self._scope.bring(ahead)
                return None
            self._rows = self._stored.rows(self.scope, [one for one in ahead if one not in self._values])
        return self._rows.get(key)

    def keys(self, within: Range) -> Sequence[str]:
        """Return the keys within a range, in its order, at most `limit`."""
        changed = {key: None for key in self._scope.changed() if within.holds(key)}
        found = self._merged(self._stored.keys(self.scope, within, self.now_ms, changed), changed, within)
        self._listed = found[::-1] if self._looks_at_each else []
        return found

    def _merged(self, stored: list[str], changed: dict[str, None], within: Range) -> list[str]:
        """Return the keys of a range: those that were found in the store, with the changed ones."""
        here = sorted(filter(self._is_here, changed), reverse=within.reverse)
        found = list(heapq.merge(stored, here, reverse=within.reverse)) if here else stored
        if within.limit is not None:
            del found[within.limit :]
        return found

    def count(self, within: Range) -> int:
        """Return how many keys `keys` would return."""
        changed = [key for key in self._scope.changed() if within.holds(key)]
        unlimited = msgspec.structs.replace(within, limit=None)
        stored = self._stored.count(self.scope, unlimited, self.now_ms, changed)
        there = stored + sum(map(self._is_here, changed))
        return there if within.limit is None else min(there, within.limit)

    def _is_here(self, key: str) -> bool:
        """True if a key that may differ from the store exists."""
        return key in self._values and not self._is_expired(key)

    def items(self) -> list[tuple[str, bytes]]:
        """Return all keys that have not expired with their JSON, in the order of creation."""
        values, created = self._values, self._created
        changed = self._scope.changed()
        found: list[tuple[str, bytes]] = []

        def take(key: str, row: Row) -> None:
            if key not in changed:
                if not self._is_over(row):
                    found.append((key, row.json))
            elif created.get(key) == row.created:
                del changed[key]
                if not self._is_expired(key):
                    found.append((key, values[key]))

        self._stored.each(self.scope, take)
        new = sorted([(created[key], key) for key in changed if self._is_here(key)])
        return found + [(key, values[key]) for _, key in new]

    def values(self) -> list[bytes]:
        """Return the JSON of all keys that have not expired, in the order of creation."""
        return [data for _, data in self.items()]


class KeyedApart(Keyed):
    """The view of what the store holds at one moment, and of copies of what differed from it in memory."""

    __slots__ = ()

    def keys(self, within: Range) -> Sequence[str]:
        if not self._looks_at_each or self._by_page:
            return super().keys(within)
        changed = {key: None for key in self._scope.changed() if within.holds(key)}
        # Keys and rows together: reading them by key would take several times as long.
        self._rows = rows = dict(self._stored.entries(self.scope, within, self.now_ms, changed))
        return self._merged(list(rows), changed, within)


class Changes:
    """The keys that differed from the store at one moment."""

    def __init__(self, scope: str, keys: dict[str, None]) -> None:
        self.scope = scope
        self._keys = keys

    def bring(self, keys: Iterable[str]) -> int:
        """Nothing is read into copies."""
        del keys
        return 0

    def bring_due(self, now_ms: int) -> int:
        """Nothing expires in copies."""
        return now_ms

    def drop_deadlines(self, keys: Iterable[str]) -> None:
        """Nothing expires in copies."""

    def changed(self) -> dict[str, None]:
        """Return a copy of the keys."""
        return self._keys.copy()
