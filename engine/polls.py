"""`state::changes`: polls for changes, each answered with the changes since the one before.

Between two polls their watch is kept for a minute: the next poll, with the cursor of the last answer, continues with
it. This only saves time: without the watch, the cursor says where to continue. Only to read a snapshot to its end must
the polls come in time.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Hashable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from scopestate.actors.dispatcher import weakly
from scopestate.actors.interests import Among
from scopestate.actors.router import Routed
from scopestate.actors.snapshot import Commit
from scopestate.errors import (
    DeserializationError,
    EngineClosed,
    InvalidCursor,
    Overloaded,
    SnapshotCapacity,
    WatchOverrun,
)
from scopestate.ops.cursors import ScopeCursor, read_cursor
from scopestate.ops.polls import FUNCTION_ID, Poll, change_text, changes_text, read_poll
from scopestate.ops.ranges import Count
from scopestate.ops.requests import SNAPSHOT_ROWS, misfit
from scopestate.ops.turns import Range
from scopestate.ops.values import json_type, normalise
from scopestate.polled_watching import watch_later, watch_now
from scopestate.signals import Guard
from scopestate.snapshots import PROGRAM, Caller
from scopestate.watch_settings import WatchSettings
from scopestate.watching import AioChanges, Changes, scopes_there

if TYPE_CHECKING:
    from scopestate.engine import Engine
    from scopestate.ops.changes import Change

    _Watch = Changes | AioChanges

KEPT: Final = 16
"""Watches that are kept for one caller between its polls."""
KEPT_FOR_A_FOLLOWER: Final = 1_000
"""As KEPT, for a follower, which polls for each of its watches. A closed watch is kept until its time is over."""
KEPT_S: Final = 60.0
"""Seconds for which a watch is kept."""
SOONEST_S: Final = 1.0
"""The shortest pause between two looks for watches whose time is over."""
MOST_POLLS: Final = 64
"""Polls of one caller that may be in progress at the same time."""
SNAPSHOTS: Final = 16
"""Snapshots of one engine that polls may be reading at the same time."""
SNAPSHOTS_OF_A_SHARE: Final = 4
BUFFER: Final = 2_000
"""Changes that may wait in a kept watch; with more, the next poll reads them from the ring or the journal."""
PROGRAM_LATER: Final = Caller()
"""The program when it uses asyncio: its watches are of another kind."""
SNAPSHOT: Final = "poll."
"""The prefix of cursors within a snapshot. Cursors of watches have no full stop."""


class _Watched:
    """A watch, and the change that the last poll has read but could not send."""

    __slots__ = ("ahead", "asked", "caller", "goes_on", "snapshot", "tells", "until_s", "watch")

    def __init__(self, watch: _Watch, asked: Poll, caller: Caller, *, snapshot: bool = False) -> None:
        self.watch = watch
        self.asked = _filter_of(asked)
        self.caller = caller
        self.ahead: Change | None = None
        """A change that did not fit into the last answer."""
        self.until_s = 0.0
        self.snapshot = snapshot
        """True while polls may be reading its snapshot."""
        self.tells = asked.tell
        self.goes_on = not asked.settled
        """False: no poll continues with it. It only makes the feed keep the changes until another watch is open."""

    def is_behind(self) -> bool:
        """Return whether the next poll finds something at once."""
        return self.goes_on and (self.ahead is not None or self.watch.has_ready)


class _UnderWay:
    """A poll in progress."""

    __slots__ = ("caller", "watched")

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.watched: _Watched | None = None
        """None until it is open."""

    def is_behind(self) -> bool:
        """Return whether there may be something that can be read at once."""
        return self.watched is None or self.watched.is_behind()


class _Open(NamedTuple):
    """A step: open a watch."""

    settings: WatchSettings


class _Names(NamedTuple):
    """A step: name the scopes that a snapshot would include."""

    watch: WatchSettings


class _Size(NamedTuple):
    """A step: count the keys that a snapshot would include."""

    scope: str
    within: Range


class _Entered(NamedTuple):
    """A step: wait until every change made by now is in the feed."""


class _Settled(NamedTuple):
    """A step: wait for the commits that have begun by now, which hold back later changes."""


class _Next(NamedTuple):
    """A step: get the next change of a watch; None if none comes in time."""

    watch: _Watch
    timeout_s: float


_Step = _Open | _Names | _Size | _Entered | _Settled | _Next
_Steps = Generator[_Step, Any, bytes]


class Polls:
    """The polls of one engine. Every method may be called from any thread; `answer` waits, `answer_later` does not."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._exclusive = Guard()
        self._kept: dict[tuple[Caller, str, tuple[Any, ...]], _Watched] = {}
        self._polling: Counter[Caller] = Counter()
        self._armed = False
        """True if a look at the kept watches is scheduled, for when the time of one is over."""
        self._under_way: dict[_UnderWay, None] = {}
        self._telling: dict[Caller, _UnderWay] = {}
        """Caller -> its last poll for the events of its triggers. An earlier one has been given up for it."""
        self._cut: dict[tuple[Caller, tuple[Any, ...]], float] = {}
        """Caller, and the filter of a watch that has missed changes, which its next poll reads -> when it ended."""
        self._snapshots: Counter[Hashable] = Counter()
        """Share -> number of snapshots that its polls are reading."""

    def answer(self, payload: object) -> bytes:
        """Answer a poll of the program as JSON text; this thread waits. Raises as `answer_later`."""
        steps = self._begin(payload, PROGRAM, lambda scope: True)
        try:
            step = next(steps)
            while True:
                try:
                    outcome = self._take_step(step)
                except Exception as error:  # noqa: BLE001 - the poll decides
                    step = steps.throw(error)
                else:
                    step = steps.send(outcome)
        except StopIteration as end:
            return bytes(end.value)
        finally:
            steps.close()

    def _take_step(self, step: _Step) -> Any:
        match step:
            case _Open(settings=settings):
                return watch_now(self._engine, settings)
            case _Names(watch=settings):
                return scopes_there(self._engine, settings.scope_prefix)
            case _Size(scope=scope, within=within):
                return self._engine._run(scope, Count(within))
            case _Entered():
                return self._engine._router.ask(Routed()).get()
            case _Settled():
                return self._engine._snapshot.ask(Commit()).get()
            case _Next(watch=watch, timeout_s=timeout_s):
                assert isinstance(watch, Changes)  # `_take` gives this caller no other kind
                try:
                    return watch.get(timeout_s)
                except TimeoutError:
                    return None

    def answer_later(
        self, payload: object, caller: Caller = PROGRAM_LATER, readable: Callable[[str], bool] = lambda scope: True
    ) -> Coroutine[Any, Any, bytes]:
        """Begin a poll, and return the coroutine that answers it as JSON text, without blocking the event loop.

        The poll's watch includes every change made after this has returned. Cancelling the awaiting task ends the poll.
        Changes of scopes for which `readable(scope)` is false are left out; it is asked again for each answer. Raises
        DeserializationError, InvalidPageLimits, InvalidCursor, Compacted, SnapshotCapacity, Overloaded, Unsupported and
        EngineClosed.
        """
        steps = self._begin(payload, caller, readable)
        step = next(steps)
        opened: AioChanges | None = None
        if type(step) is _Open:
            opened = watch_later(self._engine, step.settings)
            opened.begin_soon()
        return self._answer_later(steps, step, opened)

    async def _answer_later(self, steps: _Steps, step: _Step, opened: AioChanges | None) -> bytes:
        try:
            while True:
                try:
                    outcome = await self._take_step_later(step, opened)
                except Exception as error:  # noqa: BLE001 - the poll decides
                    step = steps.throw(error)
                else:
                    step = steps.send(outcome)
                opened = None
        except StopIteration as end:
            return bytes(end.value)
        finally:
            steps.close()

    async def _take_step_later(self, step: _Step, opened: AioChanges | None) -> Any:
        from scopestate.aio import _answer  # noqa: PLC0415 - brings asyncio, which takes 20 ms

        match step:
            case _Open(settings=settings):
                watch = opened or watch_later(self._engine, settings)
                await watch._begin()
                return watch
            case _Names(watch=settings):
                return await self._engine.aio.elsewhere(lambda: scopes_there(self._engine, settings.scope_prefix))
            case _Size(scope=scope, within=within):
                return await self._engine.aio._run(scope, Count(within))
            case _Entered():
                return await _answer(self._engine._router.ask(Routed()), None)
            case _Settled():
                return await _answer(self._engine._snapshot.ask(Commit()), None)
            case _Next(watch=kept, timeout_s=timeout_s):
                assert isinstance(kept, AioChanges)  # as above
                try:
                    return await kept.get(timeout_s)
                except TimeoutError:
                    return None

    def are_behind(self, active_s: float) -> bool:
        """Return whether a follower that keeps polling has not got every change yet. From any thread.

        It keeps polling if its last poll was answered less than `active_s` seconds ago: from then until its next poll,
        it handles what it was sent.
        """
        soon_s = self._engine._parts.dispatcher.monotonic() - active_s
        if any(cut_s > soon_s for cut_s in list(self._cut.values())):
            return True
        # In this order: after a poll, its watch is kept before it is no longer under way.
        under_way, kept = list(self._under_way), list(self._kept.values())
        return any(poll.is_behind() for poll in under_way if not poll.caller.limited) or any(
            watched.is_behind() for watched in kept if watched.until_s > soon_s + KEPT_S and not watched.caller.limited
        )

    def forget(self, caller: Caller) -> None:
        """End the watches that are kept for a caller that is gone."""
        self._telling.pop(caller, None)
        for cut in [cut for cut in list(self._cut) if cut[0] is caller]:
            self._cut.pop(cut, None)
        for kept in self._exclusive.run(self._pop, lambda one: one.caller is caller):
            self._end(kept)

    # ---------------------------------------------------------------------------------------------------- the poll

    def _begin(self, payload: object, caller: Caller, readable: Callable[[str], bool]) -> _Steps:
        """Read the input and return the steps of the poll. Raises Overloaded too."""
        try:
            if not isinstance(payload, Mapping):
                raise DeserializationError(f"expected an object, got {json_type(payload)}")
            poll = read_poll(normalise(payload))
        except DeserializationError as error:
            raise misfit(FUNCTION_ID, str(error)) from error
        return self._counted(poll, caller, readable)

    def _counted(self, poll: Poll, caller: Caller, readable: Callable[[str], bool]) -> _Steps:
        under_way = _UnderWay(caller)
        self._exclusive.run(self._enter, under_way)
        try:
            return (yield from self._poll(poll, under_way, readable))
        finally:
            self._exclusive.run(self._leave, under_way)

    def _enter(self, under_way: _UnderWay) -> None:
        caller = under_way.caller
        if self._polling[caller] >= MOST_POLLS and caller.limited:
            raise Overloaded(f"{MOST_POLLS} polls of this caller are in progress; wait for some of them")
        self._polling[caller] += 1
        self._under_way[under_way] = None

    def _leave(self, under_way: _UnderWay) -> None:
        caller = under_way.caller
        del self._under_way[under_way]
        self._polling[caller] -= 1
        if not self._polling[caller]:
            del self._polling[caller]

    def _poll(self, poll: Poll, under_way: _UnderWay, readable: Callable[[str], bool]) -> _Steps:
        caller = under_way.caller
        now_s = self._engine._parts.dispatcher.monotonic
        deadline_s = now_s() + poll.wait_ms / 1000
        if poll.settled:
            yield _Entered()
            if self._engine._snapshot.has_open_commits():
                yield _Settled()
        watched = self._take(poll, caller)
        kept = watched is not None
        if watched is None:
            watched = yield from self._open(poll, caller)
        answer = _Answer(poll, readable)
        under_way.watched = watched
        self._cut.pop((caller, watched.asked), None)
        if poll.tell and not poll.settled:
            self._telling[caller] = under_way
            for earlier in self._exclusive.run(self._pop, lambda one: one.tells and one.caller is caller):
                self._end(earlier)
        try:
            if kept and self._engine._router.feed.incoming:
                yield _Entered()
            while not answer.is_full:
                change = watched.ahead
                watched.ahead = None
                if change is None:
                    wait_s = 0.0 if answer.changes else max(0.0, deadline_s - now_s())
                    try:
                        change = yield _Next(watched.watch, wait_s)
                    except WatchOverrun:
                        # The changes that it has missed are in the ring or in the journal.
                        answer.more = True
                        if not caller.limited:
                            self._note_cut(watched)
                        return self._finish(watched, answer, kept=False)
                    except EngineClosed:
                        if not answer.changes and (caller.limited or not self._engine._router.feed.ended):
                            raise
                        # These are the last changes, or there are no more: the next owner continues after them.
                        return self._finish(watched, answer, kept=False)
                    if change is None:
                        break
                if not answer.add(change):
                    watched.ahead = change
        except BaseException:
            self._end(watched)
            raise
        given_up = poll.tell and not poll.settled and self._telling.get(caller) is not under_way
        return self._finish(watched, answer, kept=not (poll.once or given_up))

    def _note_cut(self, watched: _Watched) -> None:
        now_s = self._engine._parts.dispatcher.monotonic()
        for cut in [cut for cut, cut_s in list(self._cut.items()) if cut_s < now_s - KEPT_S]:
            self._cut.pop(cut, None)
        self._cut[watched.caller, watched.asked] = now_s

    def _open(self, poll: Poll, caller: Caller) -> Generator[_Step, Any, _Watched]:
        cursor = poll.cursor
        if cursor is not None and cursor.startswith(SNAPSHOT):
            raise InvalidCursor("no snapshot")
        snapshot = poll.snapshot if cursor is None else _begins_with_snapshot(cursor)
        since = cursor if poll.revision is None else poll.revision
        options: dict[str, Any] = {"since": since, "snapshot": snapshot}
        options |= {"key": poll.key, "prefix": poll.prefix, "events": poll.events, "values": poll.values}
        try:
            settings = WatchSettings(poll.scope, poll.scope_prefix, {**options, "buffer": BUFFER})  # type: ignore[typeddict-item]
            settings.everything = poll.tell
            settings.until_end = not caller.limited
            if poll.among is not None:
                settings.among = Among(poll.among, poll.fresh)
            if not snapshot:
                return _Watched((yield _Open(settings)), poll, caller)
        except DeserializationError as error:
            raise misfit(FUNCTION_ID, str(error).replace("`since`", "`cursor`")) from error
        if not caller.limited:
            return _Watched((yield _Open(settings)), poll, caller)
        yield from self._check_size(poll, settings)
        self._exclusive.run(self._enter_snapshot, caller.share)
        try:
            return _Watched((yield _Open(settings)), poll, caller, snapshot=True)
        except BaseException:
            self._exclusive.run(self._leave_snapshot, caller.share)
            raise

    @staticmethod
    def _check_size(poll: Poll, settings: WatchSettings) -> Generator[_Step, Any, None]:
        """Refuse a snapshot of too many keys."""
        scopes = [poll.scope]
        if poll.scope is None:
            scopes = yield _Names(settings)
        keys = 0
        for scope in scopes:
            keys += yield _Size(scope or "", settings.within())
            if keys > SNAPSHOT_ROWS:
                where = f"scope {poll.scope!r} has" if poll.scope is not None else "these scopes have"
                raise SnapshotCapacity(
                    f"{where} more than {SNAPSHOT_ROWS} keys: poll without `snapshot` for a cursor first, then read "
                    "the keys by pages"
                )

    def _enter_snapshot(self, share: Hashable) -> None:
        if self._snapshots.total() >= SNAPSHOTS or self._snapshots[share] >= SNAPSHOTS_OF_A_SHARE:
            raise SnapshotCapacity(
                f"{self._snapshots[share]} snapshots of this caller, and {self._snapshots.total()} in all, are being "
                "read: read those to the end, or wait until they expire"
            )
        self._snapshots[share] += 1

    def _leave_snapshot(self, share: Hashable) -> None:
        self._snapshots[share] -= 1
        if not self._snapshots[share]:
            del self._snapshots[share]

    def _finish(self, watched: _Watched, answer: _Answer, *, kept: bool) -> bytes:
        watch, last, ahead = watched.watch, answer.last, watched.ahead is not None
        # A change after the snapshot that did not fit: the cursor at the end of the snapshot is no longer known.
        reading = watched.snapshot and (watch.in_snapshot or (ahead and last is not None and last.initial))
        if reading:
            cursor = SNAPSHOT + os.urandom(18).hex()
        elif ahead and last is not None:
            cursor = last.cursor
        else:
            cursor = watch.cursor
        if not reading:
            self._snapshot_read(watched)
        if kept:
            self._keep(cursor, watched)
        else:
            self._end(watched)
        more = answer.more or ahead or reading or (answer.is_full and watch.has_ready)
        return changes_text(answer.changes, cursor, more=more)

    def _snapshot_read(self, watched: _Watched) -> None:
        if watched.snapshot:
            watched.snapshot = False
            self._exclusive.run(self._leave_snapshot, watched.caller.share)

    # ------------------------------------------------------------------------------------------------ between polls

    def _take(self, poll: Poll, caller: Caller) -> _Watched | None:
        """Return the watch that was kept for a poll, if the poll asks for the same changes."""
        if poll.cursor is None or poll.once:
            return None
        name = caller, poll.cursor, _filter_of(poll)
        found = self._exclusive.run(self._kept.pop, name, None)
        if found is not None and found.watch.over and not found.snapshot:
            self._end(found)
            return None
        return found

    def _keep(self, cursor: str, watched: _Watched) -> None:
        dispatcher = self._engine._parts.dispatcher
        watched.until_s = dispatcher.monotonic() + KEPT_S
        for ended in self._exclusive.run(self._put, cursor, watched):
            self._end(ended)
        self._arm(KEPT_S)

    def _arm(self, delay_s: float) -> None:
        if not self._armed:
            self._armed = True
            self._engine._parts.dispatcher.call_later(delay_s, weakly(self._drop_expired))

    def _put(self, cursor: str, watched: _Watched) -> list[_Watched]:
        caller = watched.caller
        name = caller, cursor, watched.asked
        before = self._kept.pop(name, None)
        self._kept[name] = watched
        ended = [] if before is None else [before]
        most = KEPT if caller.limited else KEPT_FOR_A_FOLLOWER
        if len(self._kept) > most:
            mine = [one for one in self._kept if one[0] is caller]
            if len(mine) > most:
                ended.append(self._kept.pop(mine[0]))
        return ended

    def _drop_expired(self) -> None:
        self._armed = False
        now_s = self._engine._parts.dispatcher.monotonic()
        for kept in self._exclusive.run(self._pop, lambda one: one.until_s <= now_s):
            self._end(kept)
        left = [kept.until_s - now_s for kept in self._exclusive.run(lambda: list(self._kept.values()))]
        if left:
            self._arm(max(min(left), SOONEST_S))

    def _pop(self, which: Callable[[_Watched], bool]) -> list[_Watched]:
        names = [name for name, kept in self._kept.items() if which(kept)]
        return [self._kept.pop(name) for name in names]

    def _end(self, watched: _Watched) -> None:
        self._snapshot_read(watched)
        watched.watch.close()


class _Answer:
    """The changes of one answer."""

    def __init__(self, poll: Poll, readable: Callable[[str], bool]) -> None:
        self._limit = poll.limit
        self._bytes = poll.max_bytes
        self._readable = readable
        self._tell = poll.tell
        self.changes: list[bytes] = []
        self.last: Change | None = None
        """The last change that it contains or leaves out."""
        self.more = False

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another change, of any size."""
        return self.more or len(self.changes) >= self._limit

    def add(self, change: Change) -> bool:
        """Add a change if there is room; return False if there is not. The first one is always added."""
        if self._readable(change.scope):
            text = change_text(change, tell=self._tell)
            self._bytes -= len(text) + 1
            if self._bytes < 0 and self.changes:
                self.more = True
                return False
            self.changes.append(text)
        self.last = change
        return True


def begins_with_snapshot(payload: object) -> bool:
    """Return whether a poll with this input may begin with a snapshot."""
    if not isinstance(payload, Mapping):
        return False
    cursor = payload.get("cursor")
    if not isinstance(cursor, str):
        return bool(payload.get("snapshot"))
    return not cursor.startswith(SNAPSHOT) and _begins_with_snapshot(cursor)


def _begins_with_snapshot(cursor: str) -> bool:
    found = read_cursor(cursor)
    return (found.revision if isinstance(found, ScopeCursor) else found.position) is None


def _filter_of(poll: Poll) -> tuple[Any, ...]:
    among = None if poll.among is None else frozenset(poll.among)
    return poll.scope, poll.scope_prefix, poll.key, poll.prefix, poll.events, poll.values, poll.tell, among
