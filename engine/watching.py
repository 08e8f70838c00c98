"""Watches, as `Engine.watch` and `AioEngine.watch` return them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar

import pykka

from scopestate.actors.callbacks import IN_CALLBACK, refuse_in_callback
from scopestate.actors.loops import LoopReply
from scopestate.actors.reply import Reply, ReplyTo
from scopestate.actors.router import Routed
from scopestate.actors.snapshot import Flush
from scopestate.actors.watcher import Watcher, changes_of
from scopestate.errors import Compacted, EngineClosed, Unsupported, WatchOverrun
from scopestate.ops.changes import Change, KnownCursor
from scopestate.ops.cursors import ManyCursor, ManyCursors, ScopeCursor, ScopeCursors, read_cursor
from scopestate.ops.ranges import State
from scopestate.ops.results import T
from scopestate.ops.turns import Entry, Range, Turn
from scopestate.signals import Guard
from scopestate.watch_settings import WatchSettings

if TYPE_CHECKING:
    from scopestate.actors.journal import Past
    from scopestate.engine import Engine
    from scopestate.ops.results import StateEvent

PROGRESS_S: Final = 1.0
"""Shortest time between two `progress` marks, in seconds."""
PAGE: Final = 2_000
"""Changes read from the journal at a time."""

A = TypeVar("A")
Wanted = tuple[str, Turn[Any]] | Reply[Any] | Callable[[], Any]
"""What a step waits for: a turn of a scope, an answer, or a call that may use the disk."""
Steps = Generator[Wanted, Any, A]
_Row = tuple[str, str, Entry | None]
"""Scope, key and entry of a snapshot. None: the caller has the key, but it no longer exists."""


class _Watch:
    """The part common to watches for threads and for event loops. Steps yield what they wait for; subclasses wait."""

    def __init__(self, engine: Engine, settings: WatchSettings) -> None:
        if not (settings.until_end and engine._closing.begun and not engine._router.feed.ended):
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
            among=settings.among,
            buffer=settings.buffer,
        )
        self._exclusive = Guard()
        self._early: deque[Change] = deque()
        """Changes of a snapshot, or missed changes, that can be yielded."""
        self._ready = self._early
        """The changes that are yielded now. After the beginning these are the ones that wait in the watcher."""
        self._source: Sequence[Any] = ()
        """The events, or entries of a snapshot, from which further early changes are made."""
        self._index = 0
        """How many of them were used."""
        self._pages: _Pages | None = None
        """The part of the journal to read after that; None: nothing."""
        self._snapshot = False
        """True until the snapshot has been yielded."""
        self._waiting: list[ReplyTo] = []
        self._last: Change | None = None
        self._start = 0
        """The revision, or the position, after which the changes begin."""
        self._marked = 0
        self._marked_s = 0.0

    # ------------------------------------------------------------------------------------------------------ beginning

    def _begin_steps(self) -> Steps[None]:
        feed, settings = self._feed, self._settings
        why_not = self._engine._parts.backend.unwatchable
        if why_not is not None:
            raise Unsupported("`watch`", why_not)
        try:
            cursor = settings.cursor(feed.store_id)
            before = list(feed.incoming.values())
            many = cursor is None and settings.scope is None and not settings.snapshot
            elsewhere = self._engine._parts.backend.catch_up is not None
            if many and elsewhere:
                yield self._caught_up()  # everything changed by now is numbered
            # At once, so that the watch includes changes made while it is still beginning.
            feed.add(self._watcher, self)
            if many and not elsewhere:
                yield from self._begin_with_many(before)
            elif cursor is None or _position_of(cursor) is None:
                yield from self._begin_now(snapshot=settings.snapshot or cursor is not None)
            else:
                yield from self._resume(cursor)
        except Compacted:
            if not settings.resync:
                feed.remove(self._watcher)
                raise
            if not self._watcher.interests:
                feed.add(self._watcher, self)
            yield from self._begin_now(snapshot=True)
            self._source = [*self._source, *self._deletes(self._source)]
        except BaseException:
            feed.remove(self._watcher)
            raise
        self._marked = self._start
        if not self._source and self._pages is None and not self._snapshot:
            self._end_early()

    def _begin_with_many(self, before: list[StateEvent]) -> Steps[None]:
        """Begin with the changes from now on. `before`: changes already entered that have no numbers yet."""
        feed = self._feed
        given, position = feed.position, feed.shown()
        if before:
            yield self._engine._router.ask(Routed())  # they have numbers then
            if [event.position for event in before] == list(range(given + 1, given + 1 + len(before))):
                position = given + len(before)
            # Otherwise a commit got numbers in between, perhaps for changes made after this point: all of them are
            # yielded.
        self._start = position
        feed.begin_at(self._watcher, {}, position)

    def _begin_now(self, *, snapshot: bool) -> Steps[None]:
        """Begin with a snapshot, or with the changes from now on."""
        settings, feed = self._settings, self._feed
        within = settings.within() if snapshot else Range(limit=0)
        found: dict[str, list[tuple[str, Entry]]] = {}
        revisions: dict[str, int] = {}
        elsewhere = self._engine._parts.backend.catch_up is not None
        if elsewhere and snapshot:
            yield self._caught_up()  # earlier changes are not yielded, also those of scopes without keys
        position = feed.shown()
        scopes = [] if settings.scope is None else [settings.scope]
        if settings.scope is None and snapshot:
            scopes = yield lambda: scopes_there(self._engine, settings.scope_prefix)
        for scope in scopes:
            revisions[scope], found[scope] = yield scope, State(within)
        feed.begin_at(self._watcher, revisions, 0 if snapshot and not elsewhere else position)
        self._start = position if settings.scope is None else revisions[settings.scope]
        if snapshot:
            self._snapshot = True
            self._source = [(scope, key, entry) for scope, entries in found.items() for key, entry in entries]

    def _caught_up(self) -> Wanted:
        """Return what to wait for until the feed has every change made by now."""
        catch_up = self._engine._parts.backend.catch_up
        return self._engine._router.ask(Routed()) if catch_up is None else catch_up

    def _deletes(self, there: Iterable[_Row]) -> list[_Row]:
        """Return a row that becomes a delete for each key that the caller has and that no longer exists."""
        settings = self._settings
        gone = settings.known - {(scope, key) for scope, key, _ in there} if settings.known else set()
        return [
            (scope, key, None)
            for scope, key in sorted(gone)
            if settings.filter.wants_key(key) and scope.startswith(settings.scope_prefix)
        ]

    def _resume(self, cursor: ScopeCursor | ManyCursor) -> Steps[None]:
        """Begin after a cursor, with changes from the ring or the journal. Raises Compacted."""
        feed, watcher, settings = self._feed, self._watcher, self._settings
        scope = settings.scope
        after = _position_of(cursor) or 0
        self._start = after
        yield self._caught_up()  # everything changed by now is in the ring, or in a commit
        if scope is not None and after > feed.last_of(scope):
            upto, _ = yield scope, State(Range(limit=0))
            if upto < after:
                raise self._compacted("lost in a crash")  # otherwise it would wait until the revisions reach the cursor
        found = feed.from_ring(watcher, cursor)
        if found is not None:
            self._source = found
            return
        past = feed.past
        if scope is not None:
            upto, _ = yield scope, State(Range(limit=0))
            if upto == after:
                feed.begin_at(watcher, {scope: after}, 0)
                return
        else:
            upto = feed.shown()
        if past is None or upto < after:
            raise self._compacted("trimmed" if upto > after else "lost in a crash")
        if feed.journal is not None:
            yield self._engine._snapshot.ask(Flush())
        self._pages = _Pages(past, feed.epoch, cursor, settings, after, upto)
        gone = yield self._pages.gone
        if gone is not None:
            self._pages = None
            raise self._compacted(gone)
        feed.begin_at(watcher, {} if scope is None else {scope: upto}, 0 if scope is not None else upto)

    def _make(self, source: Sequence[Any]) -> Sequence[Change]:
        """Return the changes for events, or for entries of a snapshot."""
        cursors = self._cursors
        if not self._snapshot:
            watcher = self._watcher
            if self._settings.scope is None:
                source = [event for event in source if watcher.wants_scope(event.scope)]
            return watcher.filtered(changes_of(source, cursors, everything=watcher.everything))
        values = self._settings.values
        return [
            Change("delete", scope, key, None, None, 0, 0, True, 0, cursors)
            if entry is None
            else Change(
                "put",
                scope,
                key,
                entry.json if values else None,
                None,
                entry.revision,
                entry.revision,
                True,
                0,
                cursors,
            )
            for scope, key, entry in source
        ]

    def _compacted(self, reason: str) -> Compacted:
        feed, scope = self._feed, self._settings.scope
        oldest = None
        if scope is not None:
            floor = feed.scope(scope).floor
            there = feed.past.oldest(scope) if feed.past is not None else None
            if there is not None:
                floor = there[0] - 1
            oldest = None if floor is None else self._cursors.at(floor)
        elif reason == "lost in a crash" and feed.journal is not None:
            cursor = read_cursor(self._settings.since)
            # Positions are never given twice: lost changes do not come again, and no other change has a position up to
            # there.
            if isinstance(cursor, ManyCursor):
                oldest = ManyCursor(cursor.store, feed.epoch, cursor.position).text()
        return Compacted(str(self._settings.since), reason, oldest)

    def _page_steps(self) -> Steps[None]:
        """Read the next page of the journal."""
        pages = self._pages
        if pages is None:
            return
        after = pages.after
        events = yield pages.read
        gone = (yield pages.gone) if events else None
        if gone is not None:
            raise self._compacted(gone)
        self._exclusive.run(self._add_page, pages, after, events)

    def _add_page(self, pages: _Pages, after: int, events: list[StateEvent]) -> None:
        if pages is not self._pages or after != pages.after:
            return  # another thread has read it too
        if not events:
            self._pages = None
            return
        upto, epoch = pages.upto_of(events), self._feed.epoch
        # No call between these lines, so that everything noted as read is yielded.
        self._source = events
        self._index = 0
        pages.after = upto
        pages.epoch = epoch

    # -------------------------------------------------------------------------------------------------------- reading

    # Taking a change removes it and notes it as the last one yielded, in one stretch: no signal handler and no other
    # thread runs between the lines from the look at what is ready to `del` (as in `actors/stretch.py`). So a change is
    # not lost if an exception comes from outside: `cursor` is before it, or after it if the caller has it.

    def _take(self) -> Change | None:
        """Return the next change; None if none is ready: then it may be necessary to read, or to wait."""
        while True:
            ready = self._ready
            if ready:
                change = ready[0]
                self._last = change
                del ready[0]
                return change
            if ready is not self._early:
                return self._take_latest()
            if self._exclusive.run(self._fill):
                continue
            if self._pages is not None:
                return None
            mark = self._exclusive.run(self._end_early)
            if mark is not None:
                return mark

    def _take_latest(self) -> Change | None:
        newest = self._watcher.newest
        if newest:
            for name in newest:
                change = newest[name]
                self._last = change
                del newest[name]
                return change
        return None

    def _fill(self) -> bool:
        """Make some of the early changes. Returns False if none are left."""
        early, source, index = self._early, self._source, self._index
        part = len(source) if self._settings.latest else PAGE
        while not early and index < len(source):
            made = self._make(source[index : index + part])
            index += part
            # No call between these lines.
            early += made
            self._index = index
        return bool(early)

    def _end_early(self) -> Change | None:
        """Note that the early changes were yielded. Returns the mark for that, if marks are wanted."""
        if self._ready is not self._early:
            return None
        mark = self._mark("synced") if self._snapshot and self._settings.markers else None
        # No call between these lines.
        self._source = ()
        self._snapshot = False
        self._ready = self._watcher.pending
        while self._waiting:
            self._waiting.pop().set(None)
        return mark

    def _mark(self, kind: Any) -> Change:
        scope, at = self._settings.scope, self._at()
        self._marked, self._marked_s = at, self._now_s()
        position = at if scope is None else 0
        return Change(kind, scope or "", "", None, None, at, at, False, position, KnownCursor(self._cursor_at(at)))

    def _progress(self) -> Change | None:
        """Return a mark if the cursor has moved without a yielded change and the last mark is old enough."""
        if not self._settings.markers or self._now_s() - self._marked_s < PROGRESS_S:
            return None
        last = self._position(self._last) if self._last is not None else 0
        return self._mark("progress") if self._at() > max(self._marked, last) else None

    def _now_s(self) -> float:
        return self._engine._parts.dispatcher.monotonic()

    def _position(self, change: Change) -> int:
        return change.position if self._settings.scope is None else change.revision

    def _at(self) -> int:
        """Return the revision, or the position, after which this continues."""
        scope, watcher = self._settings.scope, self._watcher
        # In this order: a change that is shown after the first line may or may not wait here.
        shown = self._feed.shown() if scope is None else self._feed.last_of(scope)
        at = self._start if self._last is None or self._last.initial else self._position(self._last)
        if (self._ready is self._early and not self._snapshot) or watcher.lost or watcher.broken:
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
        return self._snapshot and (bool(self._early) or self._index < len(self._source))

    @property
    def has_ready(self) -> bool:
        """True if something can be read without waiting."""
        return bool(self._ready or self._source or self._pages) or self._watcher.has_next()

    @property
    def over(self) -> bool:
        """True if it takes no more changes: it was closed, its engine was closed, or too many changes waited."""
        return self._watcher.is_over()

    @property
    def cursor(self) -> str:
        """Where a new watch continues, given as `since=`: after the last yielded change, or later if no other came.

        While a snapshot is yielded it is the snapshot's beginning, so that the whole snapshot comes again.
        """
        if self.in_snapshot:
            return self._cursor_at(None)
        return self._cursor_at(self._at())

    def _over(self) -> bool:
        """Return whether no more changes can come. Raises WatchOverrun."""
        watcher = self._watcher
        if watcher.has_next():
            return False
        if watcher.lost and not watcher.closed:
            raise WatchOverrun(self.cursor, watcher.lost)
        if watcher.broken and not watcher.closed:
            raise Compacted(self.cursor, watcher.broken)
        return watcher.closed or (watcher.ending and not self._feed.incoming)

    def _sleep(self, reply: ReplyTo) -> bool:
        """Have `reply` set when there is something to read. Returns False if there already is."""
        watcher, feed = self._watcher, self._feed
        watcher.waiters.append(reply)
        feed.awaited[watcher] = None
        if watcher.has_next() or watcher.is_over():
            return False
        feed.look_soon()
        return True

    def _look_steps(self) -> Steps[None]:
        """Hand on the changes entered by now that have no numbers yet because nothing waits for them."""
        if self._feed.incoming and not self.over:
            yield self._engine._router.ask(Routed())

    def _wake_up(self, reply: ReplyTo) -> None:
        watcher = self._watcher
        if reply in watcher.waiters:
            watcher.waiters.remove(reply)
        if not watcher.waiters:
            self._feed.awaited.pop(watcher, None)

    def close(self) -> None:
        """End the watch, and wake the threads and tasks that wait for it. Idempotent, from any thread."""
        self._watcher.closed = True
        self._feed.remove(self._watcher)
        self._watcher.wake()
        while self._waiting:
            self._waiting.pop().set(None)

    def _closed(self) -> EngineClosed:
        return EngineClosed("this watch has ended: it was closed, or its engine was")

    def __repr__(self) -> str:
        settings = self._settings
        where = f"scope {settings.scope!r}"
        if settings.scope is None:
            where = f"the scopes {settings.scope_prefix}*" if settings.scope_prefix else "all scopes"
        return f"<watch of {where}{', closed' if self._watcher.closed else ''}>"


def scopes_there(engine: Engine, prefix: str) -> list[str]:
    """Return the scopes that hold or may hold keys and whose names have this prefix. Raises StorageError."""
    there = {*list(engine._scopes), *engine._parts.scopes()}
    return sorted(scope for scope in there if scope.startswith(prefix))


class _Pages:
    """The changes between a cursor and the moment at which a watch has begun, read from the journal in pages."""

    def __init__(
        self, past: Past, epoch: int, cursor: ScopeCursor | ManyCursor, settings: WatchSettings, after: int, upto: int
    ) -> None:
        self._past = past
        self._scope = cursor.scope if isinstance(cursor, ScopeCursor) else None
        among = settings.among
        self._wanted = [(None, settings.scope_prefix)] if among is None else among.before()
        self._upto = upto
        self.epoch = cursor.epoch if isinstance(cursor, ManyCursor) else epoch
        """The epoch of `after`."""
        self.after = after
        """The revision, or the position, up to which the journal was read."""

    def gone(self) -> str | None:
        """Return why changes after the last page are missing; None if they are not."""
        if self._scope is not None:
            return self._past.gone_in_scope(self._scope, self.after)
        found = [self._past.gone(self.epoch, self.after, scope=scope, prefix=prefix) for scope, prefix in self._wanted]
        return next((why for why in found if why is not None), None)

    def read(self) -> list[StateEvent]:
        """Read the next page."""
        if self._scope is not None:
            return self._past.read_scope(self._scope, self.after, self._upto, most=PAGE)
        return self._past.read(self.after, self._upto, most=PAGE)

    def upto_of(self, events: list[StateEvent]) -> int:
        """Return the revision or position of the last of these events."""
        return events[-1].revision if self._scope is not None else events[-1].position


def _position_of(cursor: ScopeCursor | ManyCursor) -> int | None:
    return cursor.revision if isinstance(cursor, ScopeCursor) else cursor.position


class Changes(_Watch, Generic[T]):
    """A watch: an iterator of the changes of keys, in order, each once, without a gap. `Engine.watch` returns it.

    Use it in a `with` statement, or call `close()`. Several threads may read it: each change goes to one of them.
    Iteration ends when the watch is closed. If that is because its engine closes, the last changes are yielded first;
    after `close()`, changes that were not read yet may be missing.
    """

    def __init__(self, engine: Engine, settings: WatchSettings) -> None:
        super().__init__(engine, settings)
        self._drive(self._begin_steps())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change[T]:
        ready = self._ready
        if ready:  # `_take` written inline, which saves a call for most changes
            change: Change | None = ready[0]
            self._last = change
            del ready[0]
            return change  # type: ignore[return-value]  # it is one
        change = self._take()
        if change is None:
            change = self._next(None)
        if change is None:
            raise StopIteration
        return change

    def get(self, timeout: float | None = None) -> Change[T]:
        """Return the next change; wait for it at most `timeout` seconds, or without a limit if that is None.

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
        looked = False
        while True:
            change = self._take()
            if change is None and self._pages is not None:
                self._drive(self._page_steps())
                continue
            change = change or self._progress()
            if change is not None:
                return change
            if self._over():
                return None
            left_s = None if deadline is None else deadline - self._now_s()
            if left_s is not None and left_s <= 0:
                if looked:
                    raise TimeoutError(f"no change has come within {timeout:g} s")
                looked = True
                self._drive(self._look_steps())
                continue
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
        """Wait until another thread has read the whole snapshot, or all missed changes. False: not in time.

        Also returns False if the watch was closed before that.
        """
        reply: Reply[None] = self._engine._parts.dispatcher.reply()
        self._waiting.append(reply)
        if self._ready is self._early and not self._watcher.closed:
            try:
                reply.get(timeout=timeout)
            except pykka.Timeout:
                return False
        return self._ready is not self._early

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


class AioChanges(_Watch, Generic[T]):
    """A watch for asyncio: `async with` begins it, `async for` reads it. `AioEngine.watch` returns it.

    As `Changes`; no call blocks the event loop.
    """

    def __init__(self, engine: Engine, settings: WatchSettings) -> None:
        super().__init__(engine, settings)
        self._began = False
        self._begun: tuple[Steps[None], Wanted] | None = None

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change[T]:
        change = self._take() or await self._next(None)
        if change is None:
            raise StopAsyncIteration
        return change

    async def get(self, timeout: float | None = None) -> Change[T]:  # noqa: ASYNC109 - as for threads
        """As `Changes.get`."""
        change = self._take() or await self._next(timeout)
        if change is None:
            raise self._closed()
        return change

    async def wait_synced(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - as for threads
        """As `Changes.wait_synced`, for another task."""
        reply = LoopReply()
        self._waiting.append(reply)
        if self._ready is self._early and not self._watcher.closed and not await _in_time(reply, timeout):
            return False
        return self._ready is not self._early

    def begin_soon(self) -> None:
        """Begin as far as possible without waiting: the watch includes every change from here on."""
        self._began = True
        steps = self._begin_steps()
        with suppress(StopIteration):
            self._begun = steps, next(steps)

    async def _begin(self) -> None:
        if not self._began:
            self.begin_soon()
        if self._begun is not None:
            (steps, wanted), self._begun = self._begun, None
            await self._drive(steps, wanted)

    async def _next(self, timeout: float | None) -> Change | None:  # noqa: ASYNC109 - as above
        await self._begin()
        deadline = None if timeout is None else self._now_s() + timeout
        looked = False
        while True:
            change = self._take()
            if change is None and self._pages is not None:
                await self._drive(self._page_steps())
                continue
            change = change or self._progress()
            if change is not None:
                return change
            if self._over():
                return None
            left_s = None if deadline is None else deadline - self._now_s()
            if left_s is not None and left_s <= 0:
                if looked:
                    raise TimeoutError(f"no change has come within {timeout:g} s")
                looked = True
                await self._drive(self._look_steps())
                continue
            if self._settings.markers:
                left_s = PROGRESS_S if left_s is None else min(left_s, PROGRESS_S)
            reply = LoopReply()
            try:
                if self._sleep(reply):
                    await _in_time(reply, left_s)
            finally:
                self._wake_up(reply)

    async def _drive(self, steps: Steps[A], wanted: Wanted | None = None) -> A:
        from scopestate.aio import _answer, _outcome  # noqa: PLC0415 - the two modules need each other

        outcome: Any = None
        try:
            while True:
                wanted = wanted or steps.send(outcome)
                if isinstance(wanted, tuple):
                    outcome = await self._engine.aio._at_once(*wanted)
                elif isinstance(wanted, Reply):
                    outcome = await _answer(wanted, None)
                else:
                    outcome = await _outcome(self._engine._parts.dispatcher.submit, wanted)
                wanted = None
        except StopIteration as end:
            answer: A = end.value
            return answer
        finally:
            steps.close()


async def _in_time(reply: LoopReply, timeout_s: float | None) -> bool:
    """Wait for a reply; False: it was not there in time."""
    import asyncio  # noqa: PLC0415 - it takes 20 ms to import

    try:
        # Not `wait_for`: in CPython 3.11 it drops a cancellation that comes together with the answer.
        async with asyncio.timeout(timeout_s):
            await reply.future
    except TimeoutError:
        return False
    return True
