"""The events of another engine, for the triggers of this one (docs/how-to/bridge.md).

It polls for the changes of the scopes that its plain triggers are about, so changes that no trigger wants cost the
other engine nothing. A poll has a cursor, so changes that were made while there was no connection also fire.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.loops import LoopReply
from scopestate.actors.router import Expired
from scopestate.errors import (
    Compacted,
    DeserializationError,
    Forbidden,
    FunctionNotFound,
    RemoteFailure,
    ScopestateError,
    StorageError,
    Unsupported,
)
from scopestate.ops.cursors import ManyCursor, read_cursor
from scopestate.ops.polls import FUNCTION_ID
from scopestate.ops.trace_context import TracedDepth, context_of, read_text
from scopestate.ops.values import parse
from scopestate.persistence.bridge.changes import AWAY, error_of
from scopestate.signals import wait_for
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.actors.router import EventRouter
    from scopestate.actors.scope import Surroundings
    from scopestate.wire.client import Client

log = logging.getLogger("scopestate.persistence.bridge")

Places = tuple[tuple[str | None, str], ...]
"""Which scopes triggers are about: each a name, or None and a prefix."""

MOST: Final = 500
"""Changes that are requested at a time."""
AGAIN_S: Final = 0.05
"""Pause after a poll that has failed because there is no connection."""
MOST_PLACES: Final = 32
"""If the triggers are about more scopes and prefixes than this, every change is requested."""
REFUSED_S: Final = 2.0
"""Pause after a poll that the other engine refuses."""
SHOWN_S: Final = 300.0
"""How long health reports that changes were lost."""
FIRST_S: Final = 10.0
"""How long the first trigger waits, at most, to learn whether there is a connection."""
_KINDS: Final = ("created", "updated", "deleted", "expired")


class _Told(msgspec.Struct):
    """A change, as it is in the answer to a poll."""

    kind: Literal["put", "delete", "expire"]
    scope: str
    key: str
    revision: int = 0
    value: msgspec.Raw = msgspec.Raw()
    old_value: msgspec.Raw = msgspec.Raw()
    transaction: int = 0
    expired_at: int | None = None
    late_ms: int = 0
    time_ms: int = 0
    depth: int = 0
    trace: str = ""
    cursor: str = ""

    def arrived(self) -> _Arrived:
        """Return the event to fire. Raises DeserializationError."""
        return _Arrived(
            self.scope,
            self.key,
            parse(bytes(self.old_value)) if self.old_value else None,
            parse(bytes(self.value)) if self.value else None,
            self.revision,
            TracedDepth.of(self.depth, read_text(self.trace)) if self.trace else self.depth,
            None if self.expired_at is None else (self.expired_at, self.late_ms),
            self.transaction or self.revision,
            self.time_ms,
        )


class _Arrived(msgspec.Struct):
    """The arguments of `EventRouter.arrive`."""

    scope: str
    key: str
    old: bytes | None
    new: bytes | None
    revision: int
    depth: int
    expired: Expired | None
    transaction: int = 0
    time_ms: int = 0


class _Answer(msgspec.Struct):
    changes: list[_Told]
    cursor: str


_decode: Final = msgspec.json.Decoder(_Answer).decode


class _Event(msgspec.Struct):
    """The input of the function of a `state` trigger (docs/reference/protocol.md, section 5)."""

    event_type: str
    scope: str
    key: str
    old_value: msgspec.Raw = msgspec.Raw(b"null")
    new_value: msgspec.Raw = msgspec.Raw(b"null")
    expired_at: int | None = None
    late_ms: int = 0

    def arrived(self, number: int, depth: int) -> _Arrived:
        """Return the event to fire, with a number instead of the revision, which it does not contain."""
        old: bytes | None = parse(bytes(self.old_value))
        # The event type tells a stored null from a missing key, except for a delete, where both look alike.
        if old == b"null" and self.event_type not in {"state:updated", "state:expired"}:
            old = None
        removed = self.event_type in {"state:deleted", "state:expired"}
        new = None if removed else parse(bytes(self.new_value))
        expired = None if self.expired_at is None else (self.expired_at, self.late_ms)
        return _Arrived(self.scope, self.key, old, new, number, depth, expired)


class RemoteEvents:
    """Fires an event here for every change in the other engine, including those made while there was no connection.

    `start`, `listen`, `problem`, `catch_up` and `stop` may be called from any thread except that of the client's event
    loop; the rest runs there. On each new connection, before anything else is sent, it asks for the current cursor:
    this is where to begin, the first time and whenever the changes after the last cursor are gone. If they are gone
    later, it asks again.
    """

    def __init__(self, client: Client, loop: asyncio.AbstractEventLoop, longest_wait_ms: int) -> None:
        self._client = client
        self._loop = loop
        self._longest_wait_ms = longest_wait_ms
        self._router: EventRouter | None = None
        self._task: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        """Set while plain triggers are registered, and until the poll in progress at that time has ended."""
        self.cursor: str | None = None
        """The change after which the next poll continues: all changes up to it have fired. None: it has not begun."""
        self._begin: asyncio.Future[bytes] | None = None
        self._version = -1
        self._places: Places = ()
        """The places that the triggers were about when their table had this version."""
        self._asked: Places = ()
        """The places that the last poll asked for."""
        self._begin_places: Places = ()
        """The places that `_begin` asked for."""
        self._known: Places = ()
        """The places that the answer up to `cursor` was about."""
        self._from: dict[tuple[str | None, str], int] = {}
        """Scopes of triggers that came later -> the position after which their changes are reported."""
        self._changed = asyncio.Event()
        """Set when the poll in progress does not ask for everything that is wanted."""
        self._tried = asyncio.Event()
        """Set once it is known whether there is a connection."""
        self._moved = asyncio.Event()
        """Set, and replaced, when an answer was processed."""
        self._stopped = False
        self._by_polls = False
        """True once the other engine has reported its changes."""
        self._decided = asyncio.Event()
        """Set once it is known whether the other engine can be asked for changes."""
        self._by_trigger = False
        """True if it cannot: it is iii, or an older engine. Then a trigger there reports them, while there is a
        connection."""
        self._deciding: asyncio.Task[None] | None = None
        self._numbered = 0
        self._lost = ""
        self._lost_s = 0.0
        self._refusal = ""

    # ----------------------------------------------------------------------------------------------- from any thread

    def start(self, around: Surroundings) -> None:
        """Fire events for the triggers of this engine from now on, if there are any."""
        self._router = around.router
        self.listen()

    def listen(self, *, wait: bool = True) -> None:
        """Listen for a new trigger.

        On return the other engine, if it is connected, reports every change from now on.
        """
        if self._router is None or not self._router.triggers.has_plain() or self._stopped:
            return
        begun = self._submit(self._listen())
        if wait:
            wait_for(lambda slice_s: bool(concurrent.futures.wait([begun], slice_s).done))

    def catch_up(self, timeout_s: float | None) -> bool:
        """Wait until the events of all writes so far have arrived; False if that took longer than `timeout_s`.

        Raises StorageError if the other engine cannot be asked.
        """
        if self._stopped or self._by_trigger or not self._wanted.is_set():
            return True
        there = self._submit(self._catch_up())
        if not wait_for(lambda slice_s: bool(concurrent.futures.wait([there], slice_s).done), timeout_s):
            there.cancel()
            return False
        try:
            there.result()
        except concurrent.futures.CancelledError:
            return True  # this engine has closed
        except ScopestateError as error:
            if self._has_stopped():
                return True
            raise StorageError(f"the events of the other engine do not arrive: {error}") from error
        return True

    def stop(self) -> None:
        """Fire no more events. Idempotent."""
        self._stopped = True
        ended = self._submit(self.end())
        wait_for(lambda slice_s: bool(concurrent.futures.wait([ended], slice_s).done))

    def problem(self) -> str | None:
        """Return what is wrong, for health."""
        if self._lost and time.monotonic() - self._lost_s < SHOWN_S:
            return self._lost
        return self._refusal or None

    def _has_stopped(self) -> bool:
        return self._stopped

    def _submit(self, job: Coroutine[Any, Any, None]) -> concurrent.futures.Future[None]:
        try:
            return asyncio.run_coroutine_threadsafe(job, self._loop)
        except RuntimeError:  # the loop has ended
            job.close()
            ended: concurrent.futures.Future[None] = concurrent.futures.Future()
            ended.cancel()
            return ended

    # ------------------------------------------------------------------------------------------- on the loop's thread

    def note_connection(self, connected: bool) -> None:
        """Note that the connection was made, or lost."""
        self._tried.set()
        if connected:
            self._refusal = ""
            if self._wanted.is_set() and not self._by_trigger:
                self._ask_begin()

    def note_refusal(self, error: ScopestateError) -> None:
        """Record that the other engine refuses the trigger that would report its changes."""
        self._refusal = (
            f"the remote reports no changes to the bridge: {error} ({error.code}); local triggers hear of none"
        )
        log.error("bridge to %s: %s", self._client.url, self._refusal)

    def settle(self, timeout_s: float, is_over: Callable[[], bool]) -> None:
        """If triggers listen, wait until the present other engine knows from where on to report changes.

        On any thread except that of the loop; at most for `timeout_s`, and not if `is_over()`.
        """
        if not self._wanted.is_set():
            return
        settling = self._submit(self._settle())
        until = time.monotonic() + timeout_s
        while time.monotonic() < until and not is_over():
            if concurrent.futures.wait([settling], 0.05).done:
                return
        settling.cancel()

    async def _settle(self) -> None:
        # The first calls of a connection are sent before this one, and the same engine answers all of them.
        while not self._stopped:
            try:
                await self._post({"limit": 1, "_once": True, "_among": self._wanted_now()})
            except AWAY:
                await asyncio.sleep(0.002)
            except ScopestateError:
                return
            else:
                return

    @property
    def misses(self) -> bool:
        """True if changes made while there is no connection are not reported."""
        return self._by_trigger

    async def end(self) -> None:
        """Stop."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._tell_moved()

    async def _listen(self) -> None:
        self._wanted.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())
            if not self._by_polls:
                self._await_decision()
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_S):
                await self._tried.wait()
        if self._client.connected and not self._by_trigger:
            if self.cursor is None and self._begin is None:
                self._ask_begin()
            else:
                await self._ask_for_more()
            if self._begin is not None:
                await asyncio.wait([self._begin])

    def _ask_begin(self) -> None:
        self._begin_places = self._wanted_now()
        self._begin = self._post({"limit": MOST, "_among": self._begin_places}, first=True)

    async def _ask_for_more(self) -> None:
        """Make the other engine keep the changes that new triggers want, and start a poll that asks for them."""
        told = (*(self._begin_places if self.cursor is None else self._known), *self._from)
        more = [place for place in self._wanted_now() if not _has(told, place)]
        if not more:
            return
        try:
            # Once it has answered, the changes of these scopes are kept there. Earlier ones are not for the new
            # triggers.
            answer = await self._post({"limit": 1, "_settled": True, "_among": more})
            position = _position_of(_decode(answer).cursor)
        except (ScopestateError, msgspec.DecodeError):
            position = 0  # the next poll shows what is wrong
        for place in more:
            # Unless they are reported already: then no change may be left out from there on.
            if not _has(self._known, place):
                self._from.setdefault(place, position)
        if not all(_has(self._asked, place) for place in more):
            self._changed.set()

    def _wanted_now(self) -> Places:
        """Return which scopes the plain triggers are about."""
        assert self._router is not None  # it was started
        table = self._router.triggers
        version = table.version
        if version != self._version:
            self._places = _places(table.plain_places(MOST_PLACES))
            self._version = version
        return self._places

    def _post(self, asked: dict[str, Any], *, first: bool = False) -> asyncio.Future[bytes]:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def done(text: bytes | None, error: ScopestateError | None) -> None:
            error = error_of(text, error)
            if future.done():
                return
            if isinstance(error, RemoteFailure) and error.code in (FunctionNotFound.code, Forbidden.code):
                future.set_exception(Unsupported(FUNCTION_ID, str(error)))
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(text or b"")
            future.exception()  # not every answer at the start of a connection is needed

        # Without asking for the features of the other engine first: an engine without the function says so.
        _ = self._client.post(FUNCTION_ID, msgspec.json.encode({**asked, "_events": True}), done, first=first)
        return future

    async def _run(self) -> None:
        try:
            while True:
                await self._wanted.wait()
                await self._follow()
        except Unsupported as error:
            log.info("bridge to %s: changes come by a trigger, as %s", self._client.url, error)
            self._by_polls, self._by_trigger = False, True
            if self._decided.is_set():  # the other engine was replaced by an older one
                self._register_trigger()
            self._decided.set()

    async def _follow(self) -> None:
        """Process changes until there are no triggers. Raises Unsupported if the other engine cannot be asked."""
        assert self._router is not None  # it was started
        while self._router.triggers.has_plain():
            try:
                await self._poll()
            except Unsupported:
                raise
            except Compacted as error:
                if error.reason == "lost in a crash" and error.oldest not in (None, self.cursor):
                    # The lost changes never existed, so no event of them is missing.
                    log.warning("bridge: triggers were fired for changes that the previous owner had not saved")
                    self.cursor = error.oldest
                else:
                    self._report_lost(error)
                    self.cursor = None
            except AWAY:
                await asyncio.sleep(AGAIN_S)
            except (ScopestateError, msgspec.DecodeError) as error:
                self._refusal = f"the other engine does not tell its changes: {error}; local triggers hear of none"
                log.error("bridge: %s", self._refusal)  # noqa: TRY400 - the text says it all
                self.cursor = None
                await asyncio.sleep(REFUSED_S)
                self._ask_begin()
            else:
                self._refusal = ""
                self._by_polls = True
                self._decided.set()
        self._wanted.clear()
        self.cursor = self._begin = None
        self._tell_moved()

    async def _poll(self) -> None:
        begin = self._begin
        if self.cursor is None:
            if begin is None:
                self._ask_begin()
                begin = self._begin
            assert begin is not None  # it was asked for
            try:
                answer = _decode(await asyncio.shield(begin))
                if self._begin is not begin:
                    return  # there is a new connection, whose first poll was sent before this one was answered
                self._asked = self._begin_places
            except AWAY:
                if self._begin is begin:
                    self._begin = None
                raise
        else:
            text = await self._next_answer()
            if text is None:
                return
            answer = _decode(text)
        before, self._known = self._known, self._asked
        for told in answer.changes:
            try:
                if not self._from or _has(before, (told.scope, "")) or self._is_behind_begin(told):
                    await self._fire(told.arrived())
            except DeserializationError as error:
                log.error("bridge: a change of key %r of scope %r is not JSON: %s", told.key, told.scope, error)  # noqa: TRY400 - as above
            self.cursor = told.cursor or self.cursor
        self.cursor = answer.cursor
        if self._begin is begin:
            self._begin = None  # too old a start if changes are lost later
        if self._from:
            position = _position_of(answer.cursor)
            self._from = {place: begin for place, begin in self._from.items() if begin > position}
        self._tell_moved()

    async def _next_answer(self) -> bytes | None:
        """Poll after the cursor. None: something else is wanted now; the next poll continues after the same cursor."""
        self._changed.clear()
        self._asked = self._wanted_now()
        poll = self._post({"limit": MOST, "wait_ms": self._longest_wait_ms, **self._behind_cursor()})
        changed = asyncio.ensure_future(self._changed.wait())
        either: set[asyncio.Future[Any]] = {poll, changed}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        # An answer that lacks newly wanted scopes must not move the cursor: that would skip their changes.
        return None if self._changed.is_set() else poll.result()

    def _behind_cursor(self) -> dict[str, Any]:
        """Return the input of a poll for the wanted changes after the cursor."""
        # Scopes that were reported before are named beside a wider prefix: all their changes after the cursor are
        # needed.
        known = {place: None for place in self._known if _has(self._asked, place)}
        known |= {place: None for place in self._asked if _has(self._known, place)}
        fresh = [place for place in self._asked if not _has(self._known, place)]
        return {"cursor": self.cursor, "_among": [*known, *fresh], "_fresh": len(fresh)}

    def _is_behind_begin(self, told: _Told) -> bool:
        """Return whether a trigger existed when a change was made."""
        if not told.cursor:
            return True
        position = _position_of(told.cursor)
        places = (*self._asked, *self._from)
        return any(self._from.get(place, -1) < position for place in places if _has((place,), (told.scope, "")))

    def _tell_moved(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def _fire(self, event: _Arrived) -> None:
        """Fire the event of a change. While a handler is full this waits, and so does the other engine."""
        router = self._router
        assert router is not None  # it was started
        while not self._stopped:
            try:
                router.arrive(
                    event.scope,
                    event.key,
                    event.old,
                    event.new,
                    event.revision,
                    event.depth,
                    event.expired,
                    event.transaction,
                    event.time_ms,
                    here=False,
                )
            except HandlerFull as full:
                room = LoopReply()
                router.backlog.when_room(room.set, full)
                try:
                    await room.future
                finally:
                    router.backlog.stop_waiting(room.set)
            else:
                return

    async def _catch_up(self) -> None:
        """Wait until every change made by now has fired here."""
        asked = {"limit": 1, "_settled": True, "_among": self._wanted_now(), "_once": True}
        target = _decode(await self._post(asked)).cursor
        while self._wanted.is_set() and not self._by_trigger and not self._stopped:
            moved, cursor = self._moved, self.cursor
            if self._changed.is_set():
                await asyncio.sleep(0)  # a poll for what is wanted now is sent
                continue
            if cursor is not None:
                if _is_behind(cursor, target):
                    return
                try:
                    found = _decode(await self._post({"limit": 1, "_once": True, **self._behind_cursor()}))
                    if not found.changes and not self._changed.is_set():
                        return
                except Compacted:
                    pass  # the poll in progress gets that too
            await moved.wait()

    def _report_lost(self, error: Compacted) -> None:
        """Report that changes are lost: in health, from time to time in the log, and each time to the hooks."""
        now_s = time.monotonic()
        if not self._lost or now_s - self._lost_s > SHOWN_S:
            log.error("bridge: changes in the other engine fired no local trigger: %s; give it `history`", error.reason)
        self._lost = f"changes in the other engine fired no local trigger: {error.reason}; give it `history`"
        self._lost_s = now_s
        router = self._router
        assert router is not None  # it was started
        router.report_missed(router.triggers.plain(), error)

    # ------------------------------------------------------------------- another engine that cannot be asked

    def _await_decision(self) -> None:
        """Until it is known whether the other engine can be asked for changes, also register a trigger there.

        Its events wait: if the engine cannot be asked, they are the changes from the first moment on.
        """
        withdraw = self._register_trigger()

        async def decide() -> None:
            await self._decided.wait()
            if not self._by_trigger:
                withdraw()

        self._deciding = asyncio.create_task(decide())

    def _register_trigger(self) -> Callable[[], object]:
        """Make the other engine call a function here for every change. Returns a function that withdraws this."""

        async def on_event(payload: bytes) -> bytes | None:
            await self._decided.wait()
            if self._by_trigger:
                event = _read_event(payload)
                deep = event_depth.get()
                # The depth of the event; that of this handler is one more.
                depth = TracedDepth.of(max(0, deep - 1), context_of(deep))
                self._numbered += 1
                await self._fire(event.arrived(self._numbered, depth))
            return None

        function_id = f"scopestate::bridge::{os.urandom(8).hex()}"
        self._client.register_function(
            function_id, on_event, description="changes for a scopestate bridge", ordered=True
        )
        # iii and older scopestate engines ignore `events`: they report changes of the first three kinds.
        trigger_id = self._client.register_trigger("state", function_id, {"events": _KINDS})

        # The function stays: calls of it may still arrive.
        return lambda: self._client.unregister_trigger(trigger_id)


def _places(found: set[tuple[str | None, str]] | None) -> Places:
    """Return places without those that others cover. None: everything."""
    if found is None:
        return ((None, ""),)
    wide = [place for place in found if place[0] is None]
    covered = {place for place in found for other in wide if other != place and _has((other,), place)}
    return tuple(sorted(found - covered, key=repr))


def _has(places: Places, place: tuple[str | None, str]) -> bool:
    """Return whether places cover another one."""
    scope, prefix = place
    name = prefix if scope is None else scope
    return any(
        (scope is not None and one == scope) or (one is None and name.startswith(begin)) for one, begin in places
    )


def _position_of(cursor: str) -> int:
    found = read_cursor(cursor)
    return found.position or 0 if isinstance(found, ManyCursor) else 0


def _is_behind(cursor: str, other: str) -> bool:
    """Return whether a cursor is at the place of another one of the same store, or after it."""
    one, two = read_cursor(cursor), read_cursor(other)
    return one.store == two.store and _place(one) >= _place(two)


def _place(cursor: Any) -> tuple[int, int]:
    return cursor.epoch, cursor.position or 0


def _read_event(payload: bytes) -> _Event:
    """Return an event that the other engine has sent. Raises DeserializationError."""
    try:
        return msgspec.json.decode(payload, type=_Event)
    except msgspec.DecodeError as error:
        raise DeserializationError(f"not a state event: {error}") from error
