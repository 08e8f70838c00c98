"""Watches of scopes that are kept in another engine: each polls that engine for changes while it is read.

A poll is in progress only while a caller waits for a change: if the caller does not read, the other engine keeps the
changes. If the connection is lost, the next poll continues from the cursor of the last answer.

The cursor of an answer is after all of its changes. The caller's cursor is before those that it has not read yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Generic

import msgspec

from scopestate.actors.reply import Reply, ReplyTo
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
from scopestate.ops.cursors import cursor_before, cursor_of_snapshot, read_cursor
from scopestate.ops.results import T
from scopestate.ops.values import parse
from scopestate.watch_settings import WatchSettings
from scopestate.watching import PROGRESS_S, AioChanges, Changes, Steps, _Watch

if TYPE_CHECKING:
    from scopestate.actors.ports import ChangeSource
    from scopestate.engine import Engine

MOST: Final = 1_000
"""Changes requested at a time."""
AGAIN_S: Final = 0.05
"""Pause in seconds after a poll that has failed because there is no connection."""
LOOK_S: Final = 1.0
"""Seconds that a caller whose timeout is over waits for the other engine to say whether something has changed."""
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
        """Return the change as a watch yields it."""
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
    """The parts of a watch that polls which differ from other watches."""

    def __init__(self, engine: Engine, settings: WatchSettings, source: ChangeSource) -> None:
        self._remote = source
        self._polling = False
        self._round = 0
        """Answers to polls of an earlier round are ignored."""
        self._answered: str | None = None
        """The cursor of the next poll. It changes together with the waiting changes."""
        self._more = True
        """True: the last answer was not complete."""
        self._behind: int | None = None
        """The revision after which the first poll begins, instead of a cursor."""
        self._before = ""
        """The cursor that starts the snapshot again."""
        self._resynced = False
        self._known: set[tuple[str, str]] = set(settings.known)
        """The keys that the caller has: always with `on_compacted="resync"`, otherwise during a snapshot."""
        self._there: set[tuple[str, str]] = set()
        """The keys of the snapshot."""
        self._error: ScopestateError | None = None
        self._told = ""
        """The cursor of the last mark."""
        self._lookers: list[Reply[None]] = []
        """Callers that wait for the end of a poll, whatever it finds."""
        super().__init__(engine, settings)
        key, table = id(self), engine._polled
        table[key] = weakref.ref(self, lambda _: table.pop(key, None))

    # ------------------------------------------------------------------------------------------------------ beginning

    def _begin_steps(self) -> Steps[None]:
        settings = self._settings
        since = settings.since
        if type(since) is int:
            _ = settings.cursor("")  # refuses an invalid cursor
            self._behind = since
        elif since is not None:
            settings.check_cursor(read_cursor(since))
            self._answered = self._before = since
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
        self._exclusive.run(self._forget_answers)
        self._there.clear()

    def _forget_answers(self) -> None:
        self._before = self._cursor()
        self._answered, self._behind, self._snapshot, self._resynced = None, None, True, True

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
        """Take in an answer. Called for one answer at a time."""
        answer = _decode(text)
        changes = [found.change() for found in answer.changes]
        if self._settings.resync or self._snapshot:
            for change in changes:
                self._note_key(change)
        self._exclusive.run(self._add_answer, answer, changes)
        self._watcher.wake()

    def _add_answer(self, answer: _Answer, changes: list[Change]) -> None:
        if self._snapshot:
            place = next((index for index, one in enumerate(changes) if not one.initial), len(changes))
            self._before = changes[0].cursor if place else cursor_of_snapshot(answer.cursor)
            if place < len(changes) or not (place and answer.more):
                behind = cursor_before(changes[place].cursor) if place < len(changes) else answer.cursor
                marks = [self._mark("synced", behind)] if self._settings.markers else []
                changes[place:place] = chain(self._deletes(), marks)
                self._snapshot = False
        self._watcher._add(changes)
        self._answered, self._more = answer.cursor, answer.more

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
        """Note that a poll begins, unless one is in progress: then return False."""
        if self._polling or self._watcher.closed or self._error is not None:
            return False
        self._polling = True
        return True

    def _poll_soon(self, *, waits: bool = True) -> bool:
        """Start a poll, unless one is in progress: then return False. From any thread."""
        if not self._exclusive.run(self._begin_poll):
            return False
        try:
            longest_ms = self._remote.longest_wait_ms if waits else 0
            if self._settings.markers:  # the cursor moves on when a poll ends
                longest_ms = min(longest_ms, int(PROGRESS_S * 1000))
            asked = self._asked(longest_ms)
            self._remote.poll(asked, partial(self._polled, self._round))
        except EngineClosed:
            self._polling = False
            self._end_with_engine()
            self._end_looks()
        except BaseException:
            self._polling = False
            raise
        return True

    def _polled(self, asked_in: int, text: bytes | None, error: ScopestateError | None) -> None:
        """Take the outcome of a poll. On the thread of the connection."""
        if asked_in != self._round:
            return
        again: Callable[[], None] = self._poll_if_awaited
        if error is None and text is not None:
            try:
                self._take_in(text)
            except ScopestateError as problem:
                error = problem
        self._polling = False
        self._end_looks()
        if isinstance(error, EngineClosed):  # of this engine, which has taken over the scopes
            self._end_with_engine()
        elif isinstance(error, _AWAY):
            if self._engine.closed:
                self._end_with_engine()
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

    def _end_with_engine(self) -> None:
        """End the watch after the changes that wait, as the engine has closed."""
        self._watcher.ending = True
        self._watcher.wake()

    def _begins_anew(self, error: ScopestateError | None) -> bool:
        """Return whether to begin again with a snapshot: the changes, or the rest of a snapshot, are gone."""
        if isinstance(error, Compacted):
            return bool(self._settings.resync)
        # The pages of a snapshot belong to one moment and one connection.
        return isinstance(error, InvalidCursor) and self._snapshot and self._answered is not None

    def _poll_if_awaited(self) -> None:
        if self._watcher.waiters:
            self._poll_soon()

    def _look_steps(self) -> Steps[None]:
        """Ask the other engine whether something has changed by now."""
        if self.over or self._watcher.has_next():
            return
        dispatcher = self._engine._parts.dispatcher
        looker: Reply[None] = dispatcher.reply()
        self._lookers.append(looker)
        timer = dispatcher.call_later(LOOK_S, partial(self._end_look, looker))
        try:
            if not self._poll_soon(waits=False):
                self._ask_beside(looker)
            yield looker
        finally:
            timer.cancel()
            self._end_look(looker)

    def _ask_beside(self, looker: Reply[None]) -> None:
        """Wait for the answer of the poll in progress, but only if it will bring something."""
        asked_in, cursor = self._round, self._answered

        def answered(text: bytes | None, error: ScopestateError | None) -> None:
            finds = text is not None and error is None and bool(_decode(text).changes)
            if not finds or self._answered != cursor or asked_in != self._round or not self._polling:
                self._end_look(looker)

        try:
            self._remote.poll({**self._asked(0), "limit": 1, "_once": True}, answered)
        except EngineClosed:
            self._end_look(looker)

    def _end_look(self, looker: Reply[None]) -> None:
        try:
            self._lookers.remove(looker)
        except ValueError:
            return  # another thread has ended it
        looker.set(None)

    def _end_looks(self) -> None:
        for looker in self._lookers.copy():
            self._end_look(looker)

    # ---------------------------------------------------------------------------------------------------- taking over

    def prepare(self) -> None:
        """Keep changes from now on, as this engine takes over the scopes, until a poll continues from its cursor.

        At this time no call to the other engine is in progress, and nothing is changed here yet.
        """
        self._round += 1
        self._polling = False
        self._end_looks()
        if not self.over:
            self._feed.unwant(
                self._feed.want(self._settings.scope, self._settings.scope_prefix, began=self._feed.primed)
            )

    def go_on(self, source: ChangeSource) -> None:
        """Poll `source` from now on."""
        self._remote = source
        self._watcher.wake()

    # -------------------------------------------------------------------------------------------------------- reading

    def _take(self) -> Change | None:
        waiting = self._watcher.pending
        if self._ready is self._early and self._has_begun():
            self._note_synced()
        if not waiting:
            return self._take_latest()
        change = waiting[0]
        self._last = change
        del waiting[0]
        return change

    def _has_begun(self) -> bool:
        """Return whether the snapshot, or the missed changes, have been read."""
        if (self._settings.snapshot and self._settings.since is None) or self._resynced:
            return self._answered is not None and not self.in_snapshot
        return not (self._more or self._watcher.has_next())

    def _mark(self, kind: Any, cursor: str) -> Change:  # type: ignore[override]  # nothing else makes one
        self._told, self._marked_s = cursor, self._now_s()
        return Change(kind, self._settings.scope or "", "", None, None, 0, 0, False, 0, KnownCursor(cursor))

    def _progress(self) -> Change | None:
        if not self._settings.markers or self._now_s() - self._marked_s < PROGRESS_S or self.in_snapshot:
            return None
        cursor, last = self.cursor, self._last
        known = cursor in ("", self._told) or (last is not None and cursor == last.cursor)
        return None if known else self._mark("progress", cursor)

    def _first(self) -> Change | None:
        """Return the next change; None if none waits."""
        watcher = self._watcher
        try:
            return watcher.pending[0] if watcher.newest is None else next(iter(watcher.newest.values()), None)
        except (IndexError, RuntimeError):
            return None  # another thread has taken it

    @property
    def in_snapshot(self) -> bool:
        """True while entries of a snapshot are left to be yielded."""
        waits = self._first()
        return self._snapshot or (waits is not None and waits.initial)

    @property
    def over(self) -> bool:
        """True if it takes no more changes."""
        return self._watcher.is_over() or self._error is not None

    @property
    def cursor(self) -> str:
        """As of any watch."""
        return self._exclusive.run(self._cursor)

    def _cursor(self) -> str:
        waits = self._first()
        if self._snapshot or (waits is not None and waits.initial):
            return self._before
        if waits is None:
            return self._answered or ""
        return waits.cursor if waits.kind == "synced" else cursor_before(waits.cursor)

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
        self._end_looks()
        while self._waiting:
            self._waiting.pop().set(None)


_decode: Final = msgspec.json.Decoder(_Answer).decode


class PolledChanges(Polled, Changes[T], Generic[T]):
    """A watch of scopes that are in another engine, or were when it began."""


class AioPolledChanges(Polled, AioChanges[T], Generic[T]):
    """A watch of scopes in another engine, for asyncio."""


def watch_now(engine: Engine, settings: WatchSettings) -> Changes:
    """Open a watch of the kind that the engine's scopes need. Raises as `Engine.watch`."""
    source = engine._parts.backend.changes
    return Changes(engine, settings) if source is None else PolledChanges(engine, settings, source)


def watch_later(engine: Engine, settings: WatchSettings) -> AioChanges:
    """Return a watch for asyncio of the kind that the engine's scopes need."""
    source = engine._parts.backend.changes
    return AioChanges(engine, settings) if source is None else AioPolledChanges(engine, settings, source)
