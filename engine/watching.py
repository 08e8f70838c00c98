"""Watches: what `Engine.watch` and its asyncio half return."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import pykka

from scopestate.actors.callbacks import IN_CALLBACK, refuse_in_callback
from scopestate.actors.loops import LoopReply
from scopestate.actors.reply import Reply, ReplyTo
from scopestate.actors.router import Routed
from scopestate.actors.snapshot import Flush
from scopestate.actors.watcher import Filter, Watcher, changes_of
from scopestate.errors import Compacted, DeserializationError, EngineClosed, Unsupported, WatchOverrun
from scopestate.ops.changes import Change, KnownCursor
from scopestate.ops.cursors import ManyCursor, ManyCursors, ScopeCursor, ScopeCursors, read_cursor
from scopestate.ops.options import WatchOptions
from scopestate.ops.ranges import State
from scopestate.ops.triggers import KINDS
from scopestate.ops.turns import LAST_REVISION, Entry, Range, Turn, checked_name
from scopestate.persistence.local import LocalBackend

if TYPE_CHECKING:
    from scopestate.actors.journal import Journal
    from scopestate.engine import Engine
    from scopestate.ops.results import StateEvent

BUFFER: Final = 10_000
"""Changes that may wait for a watch, if the caller does not say.

A thread keeps the interpreter for 5 ms before others run, in which a writer makes thousands of changes.
"""
PROGRESS_S: Final = 1.0
"""So often a mark `progress` comes at most."""
PAGE: Final = 2_000
"""Changes that are read from the journal at a time."""

A = TypeVar("A")
Wanted = tuple[str, Turn[Any]] | Reply[Any] | Callable[[], Any]
"""What a step waits for: a turn of a scope, an answer, or a call that may wait for the disk."""
Steps = Generator[Wanted, Any, A]


class WatchSettings:
    """The checked arguments of a watch."""

    def __init__(self, scope: str | None, scope_prefix: str | None, options: WatchOptions) -> None:
        if scope is not None and scope_prefix is not None:
            raise DeserializationError("a watch takes `scope` or `scope_prefix`, not both")
        self.scope = None if scope is None else checked_name("scope", scope)
        self.scope_prefix = checked_name("scope prefix", scope_prefix or "")
        given: dict[str, Any] = {**options}
        known = given.pop("known", ())
        self.snapshot = _flag("snapshot", given.pop("snapshot", True))
        self.values = _flag("values", given.pop("values", True))
        self.everything = False
        """True: deletes of keys that did not exist as well; asked by a bridge, which fires their events."""
        self.latest = _flag("latest", given.pop("latest", False))
        self.markers = _flag("markers", given.pop("markers", False))
        self.buffer = given.pop("buffer", BUFFER)
        if type(self.buffer) is not int or self.buffer < 1:
            raise DeserializationError(f"`buffer` is a number of changes, 1 or more, not {self.buffer!r:.40}")
        compacted = given.pop("on_compacted", "raise")
        if compacted not in ("raise", "resync"):
            raise DeserializationError(f'`on_compacted` is "raise" or "resync", not {compacted!r:.40}')
        self.resync = compacted == "resync"
        self.since = given.pop("since", None)
        key, prefix = given.pop("key", None), given.pop("prefix", None)
        if key is not None and prefix is not None:
            raise DeserializationError("a watch takes `key` or `prefix`, not both")
        self.key = None if key is None else checked_name("key", key)
        self.prefix = checked_name("prefix", prefix or "")
        self.filter = Filter(self.key, self.prefix, _events(given.pop("events", None)))
        self.known = _known(known, self.scope)
        if given:
            raise TypeError(f"a watch has no option {next(iter(given))!r}")

    def within(self) -> Range:
        """Return the range of keys for a snapshot."""
        if self.key is not None:
            return Range(start=self.key, end=self.key + "\0")
        return Range(prefix=self.prefix or None)

    def cursor(self, store_id: str) -> ScopeCursor | ManyCursor | None:
        """Return `since`, read. None: there is none. Raises InvalidCursor, and Compacted for another store."""
        since = self.since
        if since is None:
            return None
        if type(since) is int:
            if self.scope is None:
                raise DeserializationError("`since` may be a revision only in a watch of one scope: take a cursor")
            if not 0 <= since <= LAST_REVISION:
                raise DeserializationError(f"`since` is a cursor or a revision, not {since}")
            return ScopeCursor(store_id, self.scope, since)
        cursor = read_cursor(since)
        if isinstance(cursor, ScopeCursor) != (self.scope is not None) or (
            isinstance(cursor, ScopeCursor) and cursor.scope != self.scope
        ):
            raise DeserializationError(
                "`since` is the cursor of a watch of other scopes: a cursor is for watches of the same scope, or, if "
                "it is of many scopes, for any of these"
            )
        if cursor.store != store_id:
            raise Compacted(since, "other store")
        return cursor


def _flag(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise DeserializationError(f"`{name}` is True or False, not {value!r:.40}")
    return value


def _events(events: object) -> frozenset[Any] | None:
    if events is None:
        return None
    if not isinstance(events, (list, tuple, set, frozenset)) or not events or not set(events) <= set(KINDS):
        raise DeserializationError(f"`events` is a list of {', '.join(KINDS)}, not {events!r:.60}")
    return frozenset(events)


def _known(known: Iterable[Any], scope: str | None) -> set[tuple[str, str]]:
    if scope is not None:
        return {(scope, checked_name("key", key)) for key in known}
    return {(checked_name("scope", name), checked_name("key", key)) for name, key in known}


class _Watch:
    """What watches for threads and for event loops have in common. Steps say what they wait for; drivers wait."""

    def __init__(self, engine: Engine, settings: WatchSettings) -> None:
        engine._refuse_if_closed()
        self._engine = engine
        self._settings = settings
        self._feed = feed = engine._router.feed
        self._cursors: ScopeCursors | ManyCursors = feed.cursors
        if settings.scope is not None:
            self._cursors = ScopeCursors(feed.store_id, settings.scope)
        self._watcher = Watcher(
            settings.scope,
            settings.scope_prefix,
            settings.filter,
            values=settings.values,
            latest=settings.latest,
            everything=settings.everything,
            buffer=settings.buffer,
        )
        self._first: Iterator[Change] | None = None
        """What comes first: a snapshot, or a page of the journal."""
        self._pages: _Pages | None = None
        """What is to be read from the journal behind that; None: nothing."""
        self._snapshot = False
        """True while a snapshot is read."""
        self._synced = False
        self._waiting: list[ReplyTo] = []
        self._quick: deque[Change] | None = None
        """The changes that wait, once nothing comes before them; None with `latest`."""
        self._last: Change | None = None
        self._start = 0
        """The revision, or the position, behind which the changes begin."""
        self._marked = 0
        self._marked_s = 0.0

    # ------------------------------------------------------------------------------------------------------ beginning

    def _begin_steps(self) -> Steps[None]:
        feed, settings = self._feed, self._settings
        if not isinstance(self._engine._parts.backend, LocalBackend):
            raise Unsupported("`watch`", "the scopes are not kept by this engine")
        try:
            cursor = settings.cursor(feed.store_id)
            if cursor is None and settings.scope is None and not settings.snapshot:
                yield self._engine._router.ask(Routed())  # what is entered by now is numbered
            feed.add(self._watcher, self)
            if cursor is None or _position_of(cursor) is None:
                yield from self._begin_now(snapshot=settings.snapshot or cursor is not None)
            else:
                yield from self._resume(cursor)
        except Compacted:
            if not settings.resync:
                feed.remove(self._watcher)
                raise
            if self._watcher.interest is None:
                feed.add(self._watcher, self)
            yield from self._begin_now(snapshot=True)
            self._first = _Ahead(chain(self._first or (), self._deletes()))
        except BaseException:
            feed.remove(self._watcher)
            raise
        self._marked = self._start
        if self._first is None and self._pages is None:
            self._note_synced()

    def _begin_now(self, *, snapshot: bool) -> Steps[None]:
        """Begin with a snapshot, or with what changes from now on."""
        settings, feed = self._settings, self._feed
        within = settings.within() if snapshot else Range(limit=0)
        found: dict[str, list[tuple[str, Entry]]] = {}
        revisions: dict[str, int] = {}
        position = feed.shown()
        scopes = [] if settings.scope is None else [settings.scope]
        if settings.scope is None and snapshot:
            scopes = yield self._scopes_there
        for scope in scopes:
            revisions[scope], found[scope] = yield scope, State(within)
        feed.begin_at(self._watcher, revisions, 0 if snapshot else position)
        self._start = position if settings.scope is None else revisions[settings.scope]
        if snapshot:
            self._snapshot = True
            self._first = _Ahead(self._entries(found))

    def _scopes_there(self) -> list[str]:
        engine, prefix = self._engine, self._settings.scope_prefix
        there = {*list(engine._scopes), *engine._parts.backend.scopes()}
        return sorted(scope for scope in there if scope.startswith(prefix))

    def _entries(self, found: dict[str, list[tuple[str, Entry]]]) -> Iterator[Change]:
        settings, cursors = self._settings, self._cursors
        for scope, entries in found.items():
            for key, entry in entries:
                self._settings.known.discard((scope, key))
                json = entry.json if settings.values else None
                yield Change("put", scope, key, json, None, entry.revision, entry.revision, True, 0, cursors)

    def _deletes(self) -> Iterator[Change]:
        """Yield a delete for each key that the caller has and that is not there any more, behind the snapshot."""
        settings, cursors = self._settings, self._cursors
        for scope, key in sorted(settings.known):
            change = Change("delete", scope, key, None, None, 0, 0, True, 0, cursors)
            if settings.filter.wants_key(key) and scope.startswith(settings.scope_prefix):
                yield change

    def _resume(self, cursor: ScopeCursor | ManyCursor) -> Steps[None]:
        """Begin behind a cursor: with what the ring has, or the journal. Raises Compacted."""
        feed, watcher, settings = self._feed, self._watcher, self._settings
        scope = settings.scope
        after = _position_of(cursor) or 0
        self._start = after
        yield self._engine._router.ask(Routed())  # what is entered by now is in the ring, or in a commit
        found = feed.from_ring(watcher, cursor)
        if found is not None:
            if found:
                self._first = self._changes_of(found)
            return
        journal = feed.journal
        if scope is not None:
            upto, _ = yield scope, State(Range(limit=0))
            if upto == after:
                feed.begin_at(watcher, {scope: after}, 0)
                return
        else:
            upto = feed.shown()
        if journal is None or upto < after:
            raise self._compacted("trimmed" if upto > after else "lost in a crash")
        yield self._engine._snapshot.ask(Flush())
        self._pages = _Pages(journal, feed.epoch, cursor, settings.scope_prefix, after, upto)
        gone = yield self._pages.gone
        if gone is not None:
            self._pages = None
            raise self._compacted(gone)
        feed.begin_at(watcher, {} if scope is None else {scope: upto}, 0 if scope is not None else upto)

    def _changes_of(self, events: list[StateEvent]) -> Iterator[Change]:
        """Yield the changes that this watch gets for these events. Made in parts: a reader may want a few of them."""
        watcher = self._watcher
        part = len(events) if self._settings.latest else PAGE
        for begin in range(0, len(events), part):
            made = changes_of(events[begin : begin + part], self._cursors, everything=watcher.everything)
            yield from watcher.filtered(made)

    def _compacted(self, reason: str) -> Compacted:
        feed, scope = self._feed, self._settings.scope
        oldest = None
        if scope is not None:
            floor = feed.scope(scope).floor
            there = feed.journal.oldest(scope) if feed.journal is not None else None
            if there is not None:
                floor = there[0] - 1
            oldest = None if floor is None else self._cursors.at(floor)
        return Compacted(str(self._settings.since), reason, oldest)

    def _page_steps(self) -> Steps[None]:
        """Read the next page of the journal."""
        pages = self._pages
        assert pages is not None  # else it is not called
        events = yield pages.read
        gone = (yield pages.gone) if events else None
        if gone is not None:
            raise self._compacted(gone)
        if not events:
            self._pages = None
            self._note_synced()
            return
        pages.note(events)
        self._first = self._changes_of(events)

    # -------------------------------------------------------------------------------------------------------- reading

    def _take(self) -> Change | None:
        """Return the next change; None: none is there, and it may be necessary to read, or to wait."""
        first = self._first
        if first is not None:
            change = next(first, None)
            if change is not None:
                self._last = change
                return change
            self._first = None
            if self._pages is None:
                self._note_synced()
            if self._snapshot:
                self._snapshot = False
                if self._settings.markers:
                    return self._mark("synced")
        if self._pages is not None:
            return None
        change = self._watcher.next_now()
        if change is not None:
            self._last = change
        return change

    def _mark(self, kind: Any) -> Change:
        scope, at = self._settings.scope, self._at()
        self._marked, self._marked_s = at, self._now_s()
        position = at if scope is None else 0
        return Change(kind, scope or "", "", None, None, at, at, False, position, KnownCursor(self._cursor_at(at)))

    def _progress(self) -> Change | None:
        """Return a mark, if the cursor has moved on without a change that was yielded, and the last one is old."""
        if not self._settings.markers or self._now_s() - self._marked_s < PROGRESS_S:
            return None
        last = self._position(self._last) if self._last is not None else 0
        return self._mark("progress") if self._at() > max(self._marked, last) else None

    def _now_s(self) -> float:
        return self._engine._parts.dispatcher.monotonic()

    def _position(self, change: Change) -> int:
        return change.position if self._settings.scope is None else change.revision

    def _at(self) -> int:
        """Return the revision, or the position, behind which this goes on."""
        scope, watcher = self._settings.scope, self._watcher
        # In this order: what is shown after the first line may wait, or not.
        shown = self._feed.shown() if scope is None else self._feed.last_of(scope)
        at = self._start if self._last is None or self._last.initial else self._position(self._last)
        if (self._first is not None and not self._snapshot) or self._pages is not None or watcher.lost:
            return at
        waits = watcher.peek()
        if waits is None:
            return max(at, shown)
        return max(at, min(self._position(waits) - 1, shown))

    def _cursor_at(self, at: int | None) -> str:
        return self._cursors.at(at)

    @property
    def in_snapshot(self) -> bool:
        """True while entries of a snapshot are left to be yielded."""
        return self._snapshot and isinstance(self._first, _Ahead) and self._first.more

    @property
    def over(self) -> bool:
        """True if no more changes are taken in: it was closed, its engine was, or too many have waited."""
        return self._watcher.is_over()

    @property
    def cursor(self) -> str:
        """Where a watch goes on, with `since=`: behind the last change that was yielded, or later if nothing else came.

        While a snapshot is yielded it is its begin, so that the whole snapshot comes again.
        """
        if self.in_snapshot:
            return self._cursor_at(None)
        return self._cursor_at(self._at())

    def _over(self) -> bool:
        """Return whether no more changes come. Raises WatchOverrun."""
        watcher = self._watcher
        if watcher.has_next():
            return False
        if watcher.lost and not watcher.closed:
            raise WatchOverrun(self.cursor, watcher.lost)
        return watcher.closed or (watcher.ending and not self._feed.incoming)

    def _note_synced(self) -> None:
        self._synced = True
        if not self._settings.latest:
            self._quick = self._watcher.pending
        while self._waiting:
            self._waiting.pop().set(None)

    def _sleep(self, reply: ReplyTo) -> bool:
        """Have `reply` set when there is something to read. Returns False if there is by now."""
        watcher, feed = self._watcher, self._feed
        watcher.waiters.append(reply)
        feed.awaited[watcher] = None
        if watcher.has_next() or watcher.is_over():
            return False
        feed.look_soon()
        return True

    def _wake_up(self, reply: ReplyTo) -> None:
        watcher = self._watcher
        if reply in watcher.waiters:
            watcher.waiters.remove(reply)
        if not watcher.waiters:
            self._feed.awaited.pop(watcher, None)

    def close(self) -> None:
        """End the watch. A thread or a task that waits for a change of it goes on. Idempotent, from any thread."""
        self._watcher.closed = True
        self._feed.remove(self._watcher)
        self._watcher.wake()
        self._note_synced()

    def _closed(self) -> EngineClosed:
        return EngineClosed("this watch has ended: it was closed, or its engine was")

    def __repr__(self) -> str:
        settings = self._settings
        where = f"scope {settings.scope!r}" if settings.scope is not None else f"scopes {settings.scope_prefix!r}*"
        return f"<watch of {where}{', closed' if self._watcher.closed else ''}>"


class _Ahead:
    """An iterator that knows whether there is more."""

    def __init__(self, changes: Iterator[Change]) -> None:
        self._changes = changes
        self._next = next(changes, None)

    @property
    def more(self) -> bool:
        """True if there is another one."""
        return self._next is not None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change:
        change = self._next
        if change is None:
            raise StopIteration
        self._next = next(self._changes, None)
        return change


class _Pages:
    """The changes between a cursor and the moment at which a watch has begun, read from the journal in pages."""

    def __init__(
        self, journal: Journal, epoch: int, cursor: ScopeCursor | ManyCursor, prefix: str, after: int, upto: int
    ) -> None:
        self._journal = journal
        self._scope = cursor.scope if isinstance(cursor, ScopeCursor) else None
        self._epoch = cursor.epoch if isinstance(cursor, ManyCursor) else 0
        self._current = epoch
        self._prefix = prefix
        self._after, self._upto = after, upto

    def gone(self) -> str | None:
        """Return why changes behind the last page are missing."""
        if self._scope is not None:
            return self._journal.gone_in_scope(self._scope, self._after)
        return self._journal.gone(self._epoch, self._after, prefix=self._prefix)

    def read(self) -> list[StateEvent]:
        """Read the next page."""
        if self._scope is not None:
            return self._journal.read_scope(self._scope, self._after, self._upto, most=PAGE)
        return self._journal.read(self._after, self._upto, most=PAGE)

    def note(self, events: list[StateEvent]) -> None:
        """These were read."""
        last = events[-1]
        self._after = last.revision if self._scope is not None else last.position
        self._epoch = self._current


def _position_of(cursor: ScopeCursor | ManyCursor) -> int | None:
    return cursor.revision if isinstance(cursor, ScopeCursor) else cursor.position


class Changes(_Watch):
    """A watch: an iterator of the changes of keys, in order, each once, without a gap. `Engine.watch` returns it.

    Use it in a `with` statement, or call `close()`. It may be read by several threads: each change goes to one. An
    iterator ends when the watch is closed, by `close()` or with its engine; the last changes before come first.
    """

    def __init__(self, engine: Engine, settings: WatchSettings) -> None:
        super().__init__(engine, settings)
        self._drive(self._begin_steps())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change:
        quick = self._quick
        if quick:
            try:
                change: Change | None = quick.popleft()
            except IndexError:  # another thread was quicker
                change = None
            if change is not None:
                self._last = change
                return change
        change = self._take()
        if change is None:
            change = self._next(None)
        if change is None:
            raise StopIteration
        return change

    def get(self, timeout: float | None = None) -> Change:
        """Return the next change; wait for it, at most `timeout` seconds.

        Raises TimeoutError, WatchOverrun, Compacted if the journal is trimmed while it is read, and EngineClosed if the
        watch has ended.
        """
        change = self._take()
        if change is None:
            change = self._next(timeout)
        if change is None:
            raise self._closed()
        return change

    def _next(self, timeout: float | None) -> Change | None:
        """Wait for a change; None: the watch has ended."""
        if IN_CALLBACK:
            refuse_in_callback()
        deadline = None if timeout is None else self._now_s() + timeout
        while True:
            if self._pages is not None and self._first is None:
                self._drive(self._page_steps())
            change = self._take() or (None if self._pages is not None else self._progress())
            if change is not None:
                return change
            if self._pages is not None:
                continue
            if self._over():
                return None
            left_s = None if deadline is None else deadline - self._now_s()
            if left_s is not None and left_s <= 0:
                raise TimeoutError("no change has come in time")
            self._wait(left_s)

    def _wait(self, timeout_s: float | None) -> None:
        if self._settings.markers:
            timeout_s = PROGRESS_S if timeout_s is None else min(timeout_s, PROGRESS_S)
        reply: Reply[None] = self._engine._parts.dispatcher.reply()
        try:
            if self._sleep(reply):
                reply.get(timeout=timeout_s)
        except pykka.Timeout:
            return
        finally:
            self._wake_up(reply)

    def wait_synced(self, timeout: float | None = None) -> bool:
        """Wait until another thread has read all of the snapshot, or of what was missed. False: not in time.

        It returns False too if the watch was closed before.
        """
        reply: Reply[None] = self._engine._parts.dispatcher.reply()
        self._waiting.append(reply)
        if not self._synced and not self._watcher.closed:
            try:
                reply.get(timeout=timeout)
            except pykka.Timeout:
                return False
        return not self._snapshot and self._pages is None

    def _drive(self, steps: Steps[A]) -> A:
        outcome: Any = None
        try:
            while True:
                wanted = steps.send(outcome)
                if isinstance(wanted, tuple):
                    scope, turn = wanted
                    outcome = self._engine._scopes[scope].run(turn)
                else:
                    outcome = wanted.get() if isinstance(wanted, Reply) else wanted()
        except StopIteration as end:
            answer: A = end.value
            return answer
        finally:
            steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AioChanges(_Watch):
    """A watch for asyncio: `async with` begins it, `async for` reads it. `AioEngine.watch` returns it.

    As `Changes`; no call blocks the event loop.
    """

    def __init__(self, engine: Engine, settings: WatchSettings) -> None:
        super().__init__(engine, settings)
        self._began = False

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        change = self._take() or await self._next(None)
        if change is None:
            raise StopAsyncIteration
        return change

    async def get(self, timeout: float | None = None) -> Change:  # noqa: ASYNC109 - as for threads
        """As `Changes.get`."""
        change = self._take() or await self._next(timeout)
        if change is None:
            raise self._closed()
        return change

    async def wait_synced(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - as for threads
        """As `Changes.wait_synced`, for another task."""
        reply = LoopReply()
        self._waiting.append(reply)
        if not self._synced and not self._watcher.closed and not await _in_time(reply, timeout):
            return False
        return not self._snapshot and self._pages is None

    async def _begin(self) -> None:
        if not self._began:
            self._began = True
            await self._drive(self._begin_steps())

    async def _next(self, timeout: float | None) -> Change | None:  # noqa: ASYNC109 - as above
        await self._begin()
        deadline = None if timeout is None else self._now_s() + timeout
        while True:
            if self._pages is not None and self._first is None:
                await self._drive(self._page_steps())
            change = self._take() or (None if self._pages is not None else self._progress())
            if change is not None:
                return change
            if self._pages is not None:
                continue
            if self._over():
                return None
            left_s = None if deadline is None else deadline - self._now_s()
            if left_s is not None and left_s <= 0:
                raise TimeoutError("no change has come in time")
            if self._settings.markers:
                left_s = PROGRESS_S if left_s is None else min(left_s, PROGRESS_S)
            reply = LoopReply()
            try:
                if self._sleep(reply):
                    await _in_time(reply, left_s)
            finally:
                self._wake_up(reply)

    async def _drive(self, steps: Steps[A]) -> A:
        from scopestate.aio import _answer, _outcome  # noqa: PLC0415 - the two modules need each other

        outcome: Any = None
        try:
            while True:
                wanted = steps.send(outcome)
                if isinstance(wanted, tuple):
                    outcome = await self._engine.aio._at_once(*wanted)
                elif isinstance(wanted, Reply):
                    outcome = await _answer(wanted, None)
                else:
                    outcome = await _outcome(self._engine._parts.dispatcher.submit, wanted)
        except StopIteration as end:
            answer: A = end.value
            return answer
        finally:
            steps.close()


async def _in_time(reply: LoopReply, timeout_s: float | None) -> bool:
    """Wait for a reply; False: it was not there in time."""
    import asyncio  # noqa: PLC0415 - it takes 20 ms to import

    try:
        await asyncio.wait_for(reply.future, timeout_s)
    except TimeoutError:
        return False
    return True
