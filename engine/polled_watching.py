"""Watches of scopes that are kept in another engine: each asks that one for changes as long as it is read.

A poll is under way while a caller waits for a change, and none else: a caller that does not read lets the other engine
wait. If the connection is lost, the next poll goes on with the cursor of the last answer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic

import msgspec

from scopestate.actors.reply import ReplyTo
from scopestate.errors import (
    CallTimeout,
    Compacted,
    ConnectionLost,
    EngineClosed,
    InvalidCursor,
    NotConnected,
    ScopestateError,
)
from scopestate.ops.changes import Change, ChangeKind, KnownCursor
from scopestate.ops.cursors import read_cursor
from scopestate.ops.results import T
from scopestate.ops.values import parse
from scopestate.watch_settings import WatchSettings
from scopestate.watching import PROGRESS_S, AioChanges, Changes, Steps, _Watch

if TYPE_CHECKING:
    from scopestate.actors.ports import ChangeSource
    from scopestate.engine import Engine

MOST: Final = 1_000
"""Changes that are asked for at a time."""
AGAIN_S: Final = 0.05
"""Pause after a poll that has failed because there is no connection."""
_AWAY: Final = (CallTimeout, ConnectionLost, NotConnected)

_ABSENT: Final = msgspec.Raw()


class _Found(msgspec.Struct):
    kind: ChangeKind
    scope: str
    key: str
    revision: int
    cursor: str = ""
    value: msgspec.Raw = _ABSENT
    old_value: msgspec.Raw = _ABSENT
    transaction: int = 0
    initial: bool = False

    def change(self) -> Change:
        """Return it as a watch yields it."""
        return Change(
            self.kind,
            self.scope,
            self.key,
            _json(self.value),
            _json(self.old_value),
            self.revision,
            self.transaction or self.revision,
            self.initial,
            0,
            KnownCursor(self.cursor),
        )


class _Answer(msgspec.Struct):
    changes: list[_Found]
    cursor: str
    more: bool


def _json(text: msgspec.Raw) -> bytes | None:
    return parse(bytes(text)) if text else None


class Polled(_Watch):
    """What is different in a watch that polls."""

    def __init__(self, engine: Engine, settings: WatchSettings, source: ChangeSource) -> None:
        self._remote = source
        self._polling = False
        self._round = 0
        """Answers to polls of an earlier round are of no use."""
        self._answered: str | None = None
        """The cursor of the next poll."""
        self._behind: int | None = None
        """The revision that the first poll goes on behind, in the place of a cursor."""
        self._before = ""
        """The cursor that begins with the snapshot again."""
        self._resynced = False
        self._known: set[tuple[str, str]] = set(settings.known)
        """The keys that the caller has: always with `on_compacted="resync"`, otherwise during a snapshot."""
        self._there: set[tuple[str, str]] = set()
        """Those of the snapshot."""
        self._error: ScopestateError | None = None
        self._told = ""
        """The cursor of the last mark."""
        super().__init__(engine, settings)
        key, table = id(self), engine._polled
        table[key] = weakref.ref(self, lambda _: table.pop(key, None))

    # ------------------------------------------------------------------------------------------------------ beginning

    def _begin_steps(self) -> Steps[None]:
        settings = self._settings
        since = settings.since
        if type(since) is int:
            _ = settings.cursor("")  # refuses one that makes no sense
            self._behind = since
        elif since is not None:
            settings.check_cursor(read_cursor(since))
            self._answered = since
        self._snapshot = settings.snapshot and since is None
        try:
            answer = yield self._poll_now
        except Compacted:
            if not settings.resync:
                raise
            self._begin_anew()
            answer = yield self._poll_now
        self._take_in(answer)

    def _begin_anew(self) -> None:
        self._answered, self._behind, self._snapshot, self._resynced = None, None, True, True
        self._there.clear()

    def _poll_now(self) -> bytes:
        return self._remote.poll_now(self._asked(0))

    def _asked(self, wait_ms: int) -> dict[str, Any]:
        settings = self._settings
        asked: dict[str, Any] = {"limit": MOST, "wait_ms": wait_ms}
        given = {
            "scope": settings.scope,
            "scope_prefix": settings.scope_prefix or None,
            "key": settings.key,
            "prefix": settings.prefix or None,
            "events": None if settings.filter.events is None else sorted(settings.filter.events),
            "values": None if settings.values else False,
            "cursor": self._answered,
            "revision": self._behind if self._answered is None else None,
            "snapshot": True if self._snapshot and self._answered is None else None,
        }
        return asked | {name: value for name, value in given.items() if value is not None}

    def _take_in(self, text: bytes) -> None:
        """Take an answer. One at a time."""
        answer = _decode(text)
        changes = [found.change() for found in answer.changes]
        initial = bool(answer.changes) and answer.changes[-1].initial
        for change in changes:
            if change.initial:
                self._before = change.cursor
            if self._settings.resync or self._snapshot:
                self._note_key(change)
        self._answered = answer.cursor
        if self._snapshot and not (initial and answer.more):
            self._snapshot = False
            place = next((index for index, one in enumerate(changes) if not one.initial), len(changes))
            changes[place:place] = [*self._deletes(), *([self._mark("synced")] if self._settings.markers else ())]
        self._watcher._add(changes)
        if not self._snapshot:
            self._note_synced()
        self._watcher.wake()

    def _note_key(self, change: Change) -> None:
        name = change.scope, change.key
        if change.initial:
            self._there.add(name)
        if change.kind == "put":
            self._known.add(name)
        else:
            self._known.discard(name)

    def _deletes(self) -> Iterable[Change]:  # type: ignore[override]  # it is used as one
        """Return a delete for each key that the caller has and that a snapshot after a gap does not have."""
        gone = sorted(self._known - self._there) if self._resynced else []
        self._known.difference_update(gone)
        self._there.clear()
        if not self._settings.resync:
            self._known.clear()
        cursor, wants, prefix = KnownCursor(self._before), self._settings.filter.wants_key, self._settings.scope_prefix
        return [
            Change("delete", scope, key, None, None, 0, 0, True, 0, cursor)
            for scope, key in gone
            if wants(key) and scope.startswith(prefix)
        ]

    def _note_synced(self) -> None:
        self._ready = self._watcher.pending
        while self._waiting:
            self._waiting.pop().set(None)

    # -------------------------------------------------------------------------------------------------------- polling

    def _begin_poll(self) -> bool:
        if self._polling or self._watcher.closed or self._error is not None:
            return False
        self._polling = True
        return True

    def _poll_soon(self) -> None:
        """Have a poll under way, unless there is one. From any thread."""
        if not self._exclusive.run(self._begin_poll):
            return
        try:
            longest_ms = self._remote.longest_wait_ms
            if self._settings.markers:  # the cursor moves on when a poll ends
                longest_ms = min(longest_ms, int(PROGRESS_S * 1000))
            asked = self._asked(longest_ms)
            self._remote.poll(asked, partial(self._polled, self._round))
        except EngineClosed:
            self._watcher.ending = True
            self._polling = False
            self._watcher.wake()
        except BaseException:
            self._polling = False
            raise

    def _polled(self, asked_in: int, text: bytes | None, error: ScopestateError | None) -> None:
        """Take what has come of a poll. On the thread of the connection."""
        if asked_in != self._round:
            return
        again: Callable[[], None] = self._poll_if_awaited
        if error is None and text is not None:
            try:
                self._take_in(text)
            except ScopestateError as problem:
                error = problem
        self._polling = False
        if isinstance(error, _AWAY):
            if self._engine.closed:
                self._watcher.ending = True
                self._watcher.wake()
            else:
                self._engine._parts.dispatcher.call_later(AGAIN_S, again)
        elif self._begins_anew(error):
            self._begin_anew()
            again()
        elif error is not None:
            self._error = error
            self._watcher.wake()
        else:
            again()

    def _begins_anew(self, error: ScopestateError | None) -> bool:
        """Return whether to go on with a snapshot: the changes are gone, or the rest of a snapshot is."""
        if isinstance(error, Compacted):
            return bool(self._settings.resync)
        # The pages of a snapshot are of one moment, and of one connection.
        return isinstance(error, InvalidCursor) and self._snapshot and self._answered is not None

    def _poll_if_awaited(self) -> None:
        if self._watcher.waiters:
            self._poll_soon()

    # ---------------------------------------------------------------------------------------------------- taking over

    def prepare(self) -> None:
        """The scopes are about to be in this engine: have what comes entered, until a poll goes on from its cursor.

        Nothing of the other engine is under way, and nothing is changed here yet.
        """
        self._round += 1
        self._polling = False
        if not self.over:
            self._feed.unwant(
                self._feed.want(self._settings.scope, self._settings.scope_prefix, began=self._feed.primed)
            )

    def go_on(self, source: ChangeSource) -> None:
        """Poll this one from now on."""
        self._remote = source
        self._watcher.wake()

    # -------------------------------------------------------------------------------------------------------- reading

    def _take(self) -> Change | None:
        waiting = self._watcher.pending
        if not waiting:
            return self._take_latest()
        change = waiting[0]
        self._last = change
        del waiting[0]
        return change

    def _mark(self, kind: Any) -> Change:
        self._told, self._marked_s = self._answered or "", self._now_s()
        return Change(kind, self._settings.scope or "", "", None, None, 0, 0, False, 0, KnownCursor(self._told))

    def _progress(self) -> Change | None:
        if not self._settings.markers or self._now_s() - self._marked_s < PROGRESS_S or self.in_snapshot:
            return None
        return self._mark("progress") if self._answered not in (self._told, None) else None

    @property
    def in_snapshot(self) -> bool:
        """True while entries of a snapshot are left to be yielded."""
        waits = self._watcher.peek()
        return self._snapshot or (waits is not None and waits.initial)

    @property
    def over(self) -> bool:
        """True if no more changes are taken in."""
        return self._watcher.is_over() or self._error is not None

    @property
    def cursor(self) -> str:
        """As of any watch."""
        if self.in_snapshot:
            return self._before
        waits, last = self._watcher.peek(), self._last
        if waits is None or last is None or last.initial or not last.cursor:
            return self._answered or ""
        return last.cursor

    def _over(self) -> bool:
        watcher = self._watcher
        if watcher.has_next():
            return False
        if self._error is not None and not watcher.closed:
            raise self._error
        return watcher.closed or watcher.ending

    def _sleep(self, reply: ReplyTo) -> bool:
        watcher = self._watcher
        watcher.waiters.append(reply)
        if watcher.has_next() or self.over:
            return False
        self._poll_soon()
        return True

    def _wake_up(self, reply: ReplyTo) -> None:
        if reply in self._watcher.waiters:
            self._watcher.waiters.remove(reply)

    def close(self) -> None:
        """As of any watch."""
        self._watcher.closed = True
        self._watcher.wake()
        self._note_synced()


_decode: Final = msgspec.json.Decoder(_Answer).decode


class PolledChanges(Polled, Changes[T], Generic[T]):
    """A watch of scopes in another engine, or that were in one when it began."""


class AioPolledChanges(Polled, AioChanges[T], Generic[T]):
    """A watch of scopes in another engine, for asyncio."""


def watch_now(engine: Engine, settings: WatchSettings) -> Changes:
    """Open a watch, of the kind that the scopes of the engine need. Raises as `Engine.watch`."""
    source = engine._parts.backend.changes
    return Changes(engine, settings) if source is None else PolledChanges(engine, settings, source)


def watch_later(engine: Engine, settings: WatchSettings) -> AioChanges:
    """Return a watch for asyncio, of the kind that the scopes of the engine need."""
    source = engine._parts.backend.changes
    return AioChanges(engine, settings) if source is None else AioPolledChanges(engine, settings, source)
