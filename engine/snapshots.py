"""Snapshots of scopes that callers of `state::list_entries` page through, and calls of built-in functions.

A snapshot keeps values of one moment in memory, even if they have been replaced since. So the number and size of
snapshots are limited for the whole engine, and the limits are shared fairly. If a new snapshot does not fit, those of
the caller that holds most are dropped; if that is the caller itself, it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Final

from scopestate.errors import Conflict, InvalidCursor, RowTooLarge, SnapshotCapacity, UpdateRefused
from scopestate.ops import answers
from scopestate.ops.requests import SNAPSHOT_CURSOR, SNAPSHOT_ROWS, PageLimits, Request

if TYPE_CHECKING:
    from scopestate.actors.dispatcher import Dispatcher
    from scopestate.ops.functions import BuiltIn

MOST: Final = 16
"""Snapshots of one engine."""
MOST_BYTES: Final = 64_000_000
"""Bytes of keys and values in them."""
LIFETIME_S: Final = 120.0
"""How long a cursor can be used."""

_ROOM: Final = len("[,],") + len('""')
"""Bytes of a row in JSON, beside its key and its value."""


class Caller:
    """A caller that pages through snapshots. Other callers cannot use its cursors."""

    __slots__ = ("limited", "share")

    def __init__(self, share: Hashable = None, *, limited: bool = True) -> None:
        self.share = share
        """Callers with the same share count as one for the limits, such as the workers with one token."""
        self.limited = limited
        """False for this program, or a worker with all its rights: it may have any number of polls in progress."""


PROGRAM: Final = Caller()
"""The program around the engine."""


class _Snapshot:
    __slots__ = ("caller", "expires", "offset", "rows", "scope", "size")

    def __init__(self, caller: Caller, scope: str, rows: list[tuple[str, bytes]], size: int) -> None:
        self.caller = caller
        self.scope = scope
        self.rows = rows
        self.size = size
        self.offset = 0
        self.expires = 0.0


class Snapshots:
    """Cursor -> snapshot. From any thread: each step is one operation of a dict, so no lock is needed."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._by_cursor: dict[str, _Snapshot] = {}

    def __len__(self) -> int:
        return len(self._by_cursor)

    def next_page(self, caller: Caller, scope: str, asked: PageLimits) -> bytes | None:
        """Return the page after a cursor, as JSON; None without a cursor: then a snapshot must be made.

        Raises InvalidCursor, and RowTooLarge, after which the cursor can be used again.
        """
        cursor = asked.cursor
        if cursor is None:
            return None
        self._drop_expired()
        snapshot = self._by_cursor.get(cursor)
        # The error does not reveal whether another caller has such a cursor.
        if snapshot is None or snapshot.caller is not caller or self._by_cursor.pop(cursor, None) is None:
            raise InvalidCursor("no snapshot")
        if snapshot.scope != scope:
            self._by_cursor[cursor] = snapshot
            raise InvalidCursor("another scope")
        try:
            return self._page(snapshot, asked)
        except RowTooLarge:
            self._by_cursor[cursor] = snapshot
            raise

    def first_page(self, caller: Caller, scope: str, asked: PageLimits, rows: list[tuple[str, bytes]]) -> bytes:
        """Return the first page of a new snapshot, as JSON. Raises SnapshotCapacity and RowTooLarge."""
        if len(rows) > SNAPSHOT_ROWS:
            raise SnapshotCapacity(f"scope {scope!r} has more than {SNAPSHOT_ROWS} keys")
        size = sum([len(key) + len(data) + _ROOM for key, data in rows])
        if size > MOST_BYTES:
            raise SnapshotCapacity(f"scope {scope!r} holds {size} bytes, and snapshots may hold {MOST_BYTES}")
        self._drop_expired()
        snapshot = _Snapshot(caller, scope, rows, size)
        return self._page(snapshot, asked)

    def forget(self, caller: Caller) -> None:
        """Drop the snapshots of a caller that is gone."""
        for cursor, snapshot in list(self._by_cursor.items()):
            if snapshot.caller is caller:
                self._by_cursor.pop(cursor, None)

    def _page(self, snapshot: _Snapshot, asked: PageLimits) -> bytes:
        rows: list[bytes] = []
        offset, size = snapshot.offset, 2
        total = len(snapshot.rows)
        for key, data in snapshot.rows[offset : offset + asked.limit]:
            row = answers.row(key, data)
            size += len(row) + 1
            if size > asked.max_bytes:
                if not rows:
                    raise RowTooLarge(snapshot.scope, key, len(row), asked.max_bytes)
                break
            rows.append(row)
        behind = offset + len(rows)
        cursor = None if behind == total else self._put(snapshot, behind)
        return answers.snapshot_page(rows, cursor, offset, total)

    def _put(self, snapshot: _Snapshot, offset: int) -> str:
        """Keep a snapshot for the next page, and return its cursor."""
        if not snapshot.offset:
            self._make_room(snapshot)
        snapshot.offset = offset
        snapshot.expires = self._dispatcher.monotonic() + LIFETIME_S
        cursor = SNAPSHOT_CURSOR + os.urandom(24).hex()
        self._by_cursor[cursor] = snapshot
        self._dispatcher.call_later(LIFETIME_S, self._drop_expired)
        return cursor

    def _make_room(self, new: _Snapshot) -> None:
        """Drop snapshots of the share that holds most, oldest first. Raises SnapshotCapacity if it is the caller's."""
        while True:
            held = [*self._by_cursor.items(), ("", new)]
            if len(held) <= MOST and sum(one.size for _, one in held) <= MOST_BYTES:
                return
            by_number = len(held) > MOST
            holds: dict[Hashable, int] = {}
            for _, one in held:
                share = one.caller.share
                holds[share] = holds.get(share, 0) + (1 if by_number else one.size)
            # If two hold the same, the new one is refused: otherwise each would drop the other's at each attempt.
            most = max(holds, key=lambda share: (holds[share], share == new.caller.share))
            if most == new.caller.share:
                raise SnapshotCapacity(
                    f"this caller would hold {holds[most]} {'snapshots' if by_number else 'bytes of snapshots'}, and "
                    "there is no room for more: read those to the end, or wait until they expire"
                )
            self._by_cursor.pop(next(cursor for cursor, one in held if one.caller.share == most), None)

    def _drop_expired(self) -> None:
        now = self._dispatcher.monotonic()
        for cursor, snapshot in list(self._by_cursor.items()):
            if snapshot.expires <= now:
                self._by_cursor.pop(cursor, None)


class Call:
    """One call of a built-in function on one scope, from its input to the JSON text of its answer."""

    __slots__ = ("_caller", "_snapshots", "request", "row")

    def __init__(self, row: BuiltIn, request: Request, snapshots: Snapshots, caller: Caller = PROGRAM) -> None:
        self.row = row
        self.request = request
        self._snapshots = snapshots
        self._caller = caller

    def answer_at_hand(self) -> bytes | None:
        """Return the answer if it needs no turn: a further page of a snapshot."""
        page = self.request.page
        return None if page is None else self._snapshots.next_page(self._caller, self.request.scope, page)

    def answer(self, answer: Any) -> bytes | None:
        """Return the turn's answer as JSON text; None: no value."""
        page = self.request.page
        if page is not None:
            return self._snapshots.first_page(self._caller, self.request.scope, page, answer)
        return self.row.answer(answer, self.request.tell)

    def refusal(self, error: Conflict | UpdateRefused) -> bytes:
        """Return the answer that says why nothing was written, or raise `error` if the function has none."""
        return self.row.refusal(error)


REFUSED: Final = (Conflict, UpdateRefused)
"""Errors of a turn that `Call.refusal` may turn into an answer."""
