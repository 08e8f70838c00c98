"""Removes changes that the journal no longer needs, some of them in each save.

A change is needed by the consumers that may want events of its scope and have not finished with it, and by the history
rule of its scope. Without a history rule, whole sections of the journal are removed up to the slowest of the consumers;
scopes with the same consumers are handled together. With a rule, the oldest changes of the scope are removed first.
"""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from scopestate.actors.journal import History, Rules
from scopestate.persistence.sqlite.deliveries import Progress
from scopestate.persistence.sqlite.statements import Write, ladder

Group = frozenset[int]
"""The consumers that may need events of a scope."""

_PAGE: Final = 1000
_SCOPES_AT_ONCE: Final = 256
_LOOK_AGAIN_MS: Final = 1000
"""In each such period some of the scopes are checked, in turn: for the age of changes, and for new rules."""
_LOOK_COST: Final = 16
"""Checking this many changes costs as much as removing one."""
_SLACK: Final = 32
"""A history is cut when it exceeds a limit by one part in this many, instead of by a change or two in each save."""
_KNOWN_SCOPES: Final = 16384

_DELETE: Final = ladder("DELETE FROM journal WHERE position IN (", "?", ")")
_LOWER: Final = ladder(
    "WITH cut (cut_scope, cut_revision, cut_position, cut_events, cut_bytes) AS (VALUES",
    "(?, ?, ?, ?, ?)",
    ") UPDATE scopes SET floor = max(floor, cut_revision), floor_at = max(floor_at, cut_position),"
    " events = events - cut_events, bytes = bytes - cut_bytes FROM cut WHERE number = cut_scope",
)
_COLUMNS: Final = (
    "'[' || group_concat(position) || ']', '[' || group_concat(scope) || ']', '[' || group_concat(revision) || ']',"
    " '[' || group_concat(size) || ']', '[' || group_concat(time) || ']'"
)
_SWEEP: Final = (
    f"SELECT {_COLUMNS} FROM (SELECT position, scope, revision, size, time FROM journal"  # noqa: S608 - constants
    " WHERE position > :after AND position <= :upto ORDER BY position LIMIT :limit)"
)
_OLDEST: Final = (
    f"SELECT {_COLUMNS} FROM (SELECT position, scope, revision, size, time FROM journal"  # noqa: S608 - constants
    " WHERE scope = :scope AND revision > :after ORDER BY revision LIMIT :limit)"
)
_AT: Final = (
    f"SELECT {_COLUMNS} FROM (SELECT position, scope, revision, size, time FROM journal"  # noqa: S608 - constants
    " WHERE position IN (SELECT value FROM json_each(:positions)) ORDER BY position)"
)
_IN_TURN: Final = (
    "SELECT number, scope, events, bytes,"
    " (SELECT time FROM journal WHERE journal.scope = number ORDER BY revision LIMIT 1)"
    " FROM scopes INDEXED BY scopes_logged WHERE events > 0 AND number > ? ORDER BY number LIMIT ?"
)
_FIRST_OF_SCOPE: Final = (
    "SELECT coalesce(max(revision), 0), coalesce(max(position), 0), count(*), coalesce(sum(size), 0) FROM"
    " (SELECT revision, position, size FROM journal WHERE scope = ? ORDER BY revision LIMIT ?)"
)
_DELETE_OF_SCOPE: Final = "DELETE FROM journal WHERE scope = ? AND revision <= ?"
_DELETE_RANGE: Final = "DELETE FROM journal WHERE position BETWEEN ? AND ?"
_SIZES: Final = "SELECT number, scope, events, bytes, NULL FROM scopes WHERE number IN (SELECT value FROM json_each(?))"
_NAMES: Final = "SELECT number, scope FROM scopes WHERE number IN (SELECT value FROM json_each(?))"

_numbers = msgspec.json.Decoder(list[int]).decode


class _Row(msgspec.Struct, frozen=True, gc=False, array_like=True):
    position: int
    scope: int
    revision: int
    size: int
    time_ms: int


class _Kept(msgspec.Struct, frozen=True):
    """What a scope needs of the journal."""

    group: Group
    history: History | None


class Trimmer:
    """Removes changes within transactions of the store's writer. Remembers how far it has checked."""

    def __init__(self) -> None:
        self.behind = False
        """True if there was more to do than the last call was allowed to."""
        self._rules: Callable[[], Rules | None] = lambda: None
        """A weak reference to the rules of the last call: they refer to the engine, which may be dropped before its
        store."""
        self._kept: dict[int, _Kept] = {}
        self._swept: dict[Group, int] = {}
        """Consumers of scopes -> the position up to which their changes were checked."""
        self._over: set[int] = set()
        """Scopes whose histories were not cut to their limits yet."""
        self._looked_ms = 0
        self._looked_at = 0
        """The last scope that was checked in turn."""

    def forget(self) -> None:
        """Check everything again, because a transaction was rolled back."""
        self._swept.clear()
        self._kept.clear()
        self._over.clear()
        self._looked_ms = self._looked_at = 0

    def trim(
        self,
        connection: sqlite3.Connection,
        rules: Rules | None,
        progress: dict[int, Progress],
        *,
        logged: Iterable[int],
        settled: set[int],
        now_ms: int,
        most: int,
    ) -> None:
        """Remove changes that are not needed, about `most` of them.

        `logged`: the numbers of the scopes that got changes. `settled`: positions to check again; each is removed once
        it was checked.
        """
        if rules is not self._rules():
            self.forget()
            self._rules = (lambda: None) if rules is None else weakref.ref(rules)
        self.behind = False
        if rules is None:
            return
        work = _Work(connection, progress, now_ms, most)
        self._look_at(work, sorted(settled), settled)
        self._cut(work, {*self._over, *logged})
        work.flush()  # the code below reads how much there is of each scope
        self._look_in_turn(work)
        for group in list(self._swept):
            self._sweep(work, group)
        work.flush()
        self.behind = work.left <= 0

    def _look_at(self, work: _Work, positions: Sequence[int], settled: set[int]) -> None:
        some = positions[: max(work.left, 0)]
        if some:
            rows = work.rows(_AT, positions=msgspec.json.encode(some).decode())
            self._learn(work, rows)
            work.remove([row for row in rows if self._is_free(work, row)])
            settled.difference_update(some)
            if len(some) < len(positions):
                work.left = min(work.left, 0)

    def _is_free(self, work: _Work, row: _Row) -> bool:
        kept = self._kept[row.scope]
        return kept.history is None and row.position <= work.low(kept.group) and row.position not in work.pending

    def _learn(self, work: _Work, rows: Iterable[_Row]) -> None:
        """Find out what the scopes of these changes need."""
        scopes = {row.scope for row in rows}
        unknown = scopes - self._kept.keys()
        if not unknown:
            return
        if len(self._kept) + len(unknown) > _KNOWN_SCOPES:
            self._kept.clear()
            unknown = scopes
        for number, name in work.connection.execute(_NAMES, (msgspec.json.encode(sorted(unknown)).decode(),)):
            self._keep(number, name)
        for number in unknown - self._kept.keys():
            self._kept[number] = _Kept(frozenset(), None)  # it belongs to no scope: `check` reports it

    def _keep(self, number: int, name: str) -> _Kept:
        if (kept := self._kept.get(number)) is not None:
            return kept
        rules = self._rules()
        assert rules is not None  # `trim` has made sure of it
        kept = self._kept[number] = _Kept(frozenset(rules.consumers(name)), rules.history(name))
        if kept.history is None:
            self._swept.setdefault(kept.group, 0)
        return kept

    # ------------------------------------------------------------------------------------------------------ histories

    def _cut(self, work: _Work, scopes: Iterable[int]) -> None:
        numbers = msgspec.json.encode(sorted(scopes)).decode()
        if numbers != "[]":
            self._look_at_scopes(work, work.connection.execute(_SIZES, (numbers,)).fetchall())

    def _look_in_turn(self, work: _Work) -> None:
        if work.now_ms < self._looked_ms + _LOOK_AGAIN_MS and self._looked_ms:
            return
        self._looked_ms = work.now_ms
        found = work.connection.execute(_IN_TURN, (self._looked_at, _SCOPES_AT_ONCE)).fetchall()
        self._looked_at = found[-1][0] if len(found) == _SCOPES_AT_ONCE else 0
        self._look_at_scopes(work, found)

    def _look_at_scopes(self, work: _Work, found: Iterable[tuple[int, str, int, int, int | None]]) -> None:
        if len(self._kept) > _KNOWN_SCOPES:
            self._kept.clear()
        for number, name, events, size, oldest_ms in found:
            kept = self._keep(number, name)
            self._over.discard(number)
            if kept.history is None:
                if not work.is_needed(kept.group):
                    self._swept.setdefault(kept.group, 0)  # changes of an earlier rule
                continue
            limits = kept.history
            aged = bool(limits.age_ms and oldest_ms is not None and oldest_ms < work.now_ms - limits.age_ms)
            if not (aged or _exceeds(events, limits.events) or _exceeds(size, limits.bytes)):
                continue
            if work.left <= 0 or not self._cut_scope(work, number, kept, events, size):
                self._over.add(number)

    def _cut_scope(self, work: _Work, number: int, kept: _Kept, events: int, size: int) -> bool:
        """Remove the oldest changes of a scope; False if there are more of them to remove."""
        limits, low, after = kept.history, work.low(kept.group), 0
        assert limits is not None
        while limits.events and events > limits.events and not work.pending:
            if work.left <= 0:
                return False
            removed = work.remove_first(number, min(events - limits.events, _PAGE), low)
            if removed is None:
                break  # a consumer needs one of them
            events, size = events - removed[0], size - removed[1]
        too_old = work.now_ms - limits.age_ms if limits.age_ms else -1
        while True:
            rows = work.rows(_OLDEST, scope=number, after=after, limit=_PAGE)
            gone: list[_Row] = []
            for row in rows:
                within = not (limits.events and events > limits.events) and not (limits.bytes and size > limits.bytes)
                if row.position > low or (within and row.time_ms >= too_old):
                    work.remove(gone)
                    return True
                if row.position not in work.pending:
                    gone.append(row)
                    events, size = events - 1, size - row.size
            work.remove(gone)
            if len(rows) < _PAGE:
                return True
            after = rows[-1].revision
            if work.left <= 0:
                return False

    # --------------------------------------------------------------------------------------------------------- others

    def _sweep(self, work: _Work, group: Group) -> None:
        """Remove the changes of scopes without a history that all consumers of a group have finished with."""
        after, low = self._swept[group], work.low(group)
        while work.left > 0 and after < low:
            rows = work.rows(_SWEEP, after=after, upto=low, limit=_PAGE)
            self._learn(work, rows)
            kept, pending = self._kept, work.pending
            free = {number for number in {row.scope for row in rows} if kept[number] == _Kept(group, None)}
            gone = [row for row in rows if row.scope in free and row.position not in pending]
            work.remove(gone, whole=len(gone) == len(rows))
            after = rows[-1].position if len(rows) == _PAGE else low
        if after >= low and not work.is_needed(group):
            self._swept.pop(group, None)  # no consumer: no more such changes are written
        elif group in self._swept:
            self._swept[group] = after


def _exceeds(found: int, limit: int) -> bool:
    return limit > 0 and found > limit + limit // _SLACK


class _Work:
    """One call of the trimmer: what may be removed, and what was."""

    def __init__(self, connection: sqlite3.Connection, progress: dict[int, Progress], now_ms: int, most: int) -> None:
        self.connection = connection
        self.now_ms = now_ms
        self.left = most
        """How many changes may still be removed."""
        self.pending: set[int] = set()
        """Positions that are needed by deliveries that are not over."""
        for one in progress.values():
            if one.pending:
                self.pending |= one.pending
        self._progress = progress
        self._lows: dict[Group, int] = {}
        self._deleted = Write(connection, _DELETE, 1)
        self._cut: dict[int, list[int]] = {}
        """Scope -> the highest revision and position that were removed, how many changes, and their sizes."""

    def is_needed(self, group: Group) -> bool:
        """Tell whether one of the consumers exists."""
        return any(consumer in self._progress for consumer in group)

    def low(self, group: Group) -> int:
        """Return the position up to which every consumer of a group has finished its events, except pending ones."""
        low = self._lows.get(group)
        if low is None:
            dones = [self._progress[consumer].done for consumer in group if consumer in self._progress]
            if dones:
                low = min(dones)
            else:
                ((low,),) = self.connection.execute("SELECT coalesce(max(position), 0) FROM journal").fetchall()
            self._lows[group] = low
        return low

    def rows(self, statement: str, **asked: int | str) -> list[_Row]:
        """Return changes, without their values."""
        self._deleted.flush()
        ((positions, *others),) = self.connection.execute(statement, asked).fetchall()
        if positions is None:
            return []
        columns = [_numbers(text) for text in (positions, *others)]
        self.left -= len(columns[0]) // _LOOK_COST + 1
        return [_Row(*row) for row in zip(*columns, strict=True)]

    def remove(self, rows: Sequence[_Row], *, whole: bool = False) -> None:
        """Remove changes.

        Earlier changes of the same scopes are removed too, or are only needed for a pending delivery. `whole`: there
        are no others between the first and the last of them.
        """
        self.left -= len(rows)
        if whole and rows:
            self.connection.execute(_DELETE_RANGE, (rows[0].position, rows[-1].position))
        else:
            for row in rows:
                self._deleted.add((row.position,), 8)
        cuts = self._cut
        for row in rows:
            cut = cuts.get(row.scope)
            if cut is None:
                cuts[row.scope] = [row.revision, row.position, 1, row.size]
            else:
                cut[0] = max(cut[0], row.revision)
                cut[1] = max(cut[1], row.position)
                cut[2] += 1
                cut[3] += row.size

    def remove_first(self, scope: int, count: int, low: int) -> tuple[int, int] | None:
        """Remove the oldest changes of a scope; return how many, and their sizes. None: one after `low` is needed."""
        self._deleted.flush()
        ((revision, position, found, size),) = self.connection.execute(_FIRST_OF_SCOPE, (scope, count)).fetchall()
        if position > low or not found:
            return None
        self.connection.execute(_DELETE_OF_SCOPE, (scope, revision))
        self.left -= found
        cut = self._cut.setdefault(scope, [0, 0, 0, 0])
        cut[0], cut[1] = max(cut[0], revision), max(cut[1], position)
        cut[2] += found
        cut[3] += size
        return found, size

    def flush(self) -> None:
        """Run the collected removals, and record them in the rows of the scopes."""
        self._deleted.flush()
        lower = Write(self.connection, _LOWER, 5)
        for scope, cut in self._cut.items():
            lower.add((scope, *cut), 40)
        lower.flush()
        self._cut.clear()
