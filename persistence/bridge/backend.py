"""Scopes that live in another engine, reached over one connection (docs/protocol.md, section 13)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import msgspec

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.loops import LoopReply
from scopestate.actors.ports import Backend
from scopestate.actors.router import Expired
from scopestate.actors.scope import ScopeActor, Surroundings
from scopestate.errors import DeserializationError, EngineClosed, ScopestateError, StorageError, Unsupported
from scopestate.ops.remote import Everything
from scopestate.ops.turns import Deadline, Delete, Entry, Set, Turn
from scopestate.ops.values import parse
from scopestate.ops.writes import SetWith
from scopestate.persistence.bridge.changes import Fire, Follower, RemoteChanges, RemoteEvent
from scopestate.persistence.bridge.computed import Waiter
from scopestate.persistence.bridge.options import BridgeOptions
from scopestate.persistence.bridge.scope import BridgeScope, Done, ReportedChange, message_of
from scopestate.signals import join, wait_for
from scopestate.wire.address import Address
from scopestate.wire.client import Client
from scopestate.wire.depth import event_depth
from scopestate.wire.features import Needs
from scopestate.wire.options import ClientOptions

log = logging.getLogger("scopestate.persistence.bridge")

_EVENTS = ("created", "updated", "deleted", "expired")


class _Event(msgspec.Struct):
    """What a `state` trigger's function is given (docs/protocol.md, section 5)."""

    event_type: str
    scope: str
    key: str
    old_value: msgspec.Raw = msgspec.Raw(b"null")
    new_value: msgspec.Raw = msgspec.Raw(b"null")
    expired_at: int | None = None
    late_ms: int = 0

    def old(self) -> bytes | None:
        """Return the old value; None if there was none."""
        old = parse(bytes(self.old_value))
        # The event type tells a stored null from a missing key, except for a delete, where both look alike.
        return old if self.event_type in {"state:updated", "state:expired"} or old != b"null" else None

    def new(self) -> bytes | None:
        """Return the new value; None if the key was removed."""
        removed = self.event_type in {"state:deleted", "state:expired"}
        return None if removed else parse(bytes(self.new_value))

    def expired(self) -> Expired | None:
        """Return the deadline of a key that has expired, and how late it was removed."""
        return None if self.expired_at is None else (self.expired_at, self.late_ms)


def _writing(key: str, entry: Entry | None) -> Turn[Any]:
    if entry is None:
        return Delete(key)
    if entry.expires_ms is None:
        return Set(key, entry.json)
    return SetWith(key, entry.json, deadline=Deadline(expires_ms=entry.expires_ms))


class _Groups(msgspec.Struct):
    groups: list[str]


class BridgeBackend(Backend):
    """A connection to another engine, on a thread with an event loop of its own.

    It connects in the background: opening one succeeds while the other engine is down, and calls wait for it,
    `connect_wait_ms` at most. Its scopes are called, not loaded and saved: others may change them at the same time.
    """

    def __init__(
        self,
        options: BridgeOptions,
        find: Callable[[], Address] | None = None,
        *,
        on_lost: Callable[[str, bool], object] | None = None,
        describe: Callable[[], str] | None = None,
    ) -> None:
        """`find()` is asked where the other engine is at each attempt to connect, in the place of the options.

        It may raise NotConnected, which says why there is nothing to connect to; it is called on several threads.
        `on_lost(reason, goodbye)` is called each time that a connection has ended or cannot be made, on the loop's
        thread; `goodbye`: the other engine has ended it in order. `describe()` says more about that engine in the error
        of a call that it does not answer. Raises ConfigError: address, token, TLS file.
        """
        self._address: Final = Address(
            options.bridge_url,
            token=options.token,
            tls_ca_file=options.tls_ca_file,
            tls_verify=options.tls_verify,
        )
        self._address.tls()  # raises now
        self._remote_events = options.events == "remote"
        self._pid = os.getpid()
        self._closed = False
        self.leaving = False
        """As in `Connection`."""
        self._open = [None]
        self._refusal = ""
        self.changes: RemoteChanges = RemoteChanges(self.call, options.call_timeout_ms)
        self._follower: Follower | None = None
        self._following: asyncio.Task[None] | None = None
        self._by_polls = False
        """True once the other engine has told its changes."""
        self._by_trigger = False
        """True if the other engine can only tell its changes by a trigger, while there is a connection."""
        client_options = ClientOptions(
            connect_wait_s=options.connect_wait_ms / 1000,
            call_timeout_s=options.call_timeout_ms / 1000,
            name=f"scopestate-bridge:{self._pid}",
        )
        if find is not None:  # on this machine, where a refusal costs nothing
            client_options = msgspec.structs.replace(client_options, backoff_first_s=0.002, backoff_most_s=0.05)
        self._client = Client(
            find or self._address,
            client_options,
            on_change=self._note_connection,
            on_lost=on_lost,
            on_trigger_refused=self._note_refusal,
            describe=describe,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="scopestate-bridge", daemon=True)
        self._thread.start()
        self._loop.call_soon_threadsafe(self._client.start)

    # ------------------------------------------------------------------------------------------------------- calls

    @property
    def reports_changes(self) -> bool:
        """True if all events come from the other engine (`events: remote`)."""
        return self._remote_events

    @property
    def url(self) -> str:
        """Where the other engine is, for messages."""
        return self._client.url

    @property
    def connected(self) -> bool:
        """True while there is a connection."""
        return self._client.connected

    def call(self, function_id: str, payload: bytes, done: Done, depth: int = 0, needs: Needs | None = None) -> None:
        """As `Connection.call`: send and return at once."""
        if self._closed or os.getpid() != self._pid:
            raise EngineClosed("the bridge is closed")
        try:
            self._loop.call_soon_threadsafe(
                partial(self._client.post, function_id, payload, done, depth=depth, needs=needs)
            )
        except RuntimeError as error:
            raise EngineClosed("the bridge is closed") from error

    def call_and_wait(self, function_id: str, payload: bytes) -> bytes | None:
        """Call and wait for the result; not on an event loop's thread. Raises the error of the call."""
        waiter = Waiter()
        self.call(function_id, payload, waiter.done)
        return waiter.get()

    # ---------------------------------------------------------------------------------------- as an engine's backend

    def make_scope(self, scope: str, around: Surroundings) -> ScopeActor:
        """Return a new actor for `scope`."""
        return BridgeScope(scope, around, self)

    def start(self, around: Surroundings) -> None:
        """With `events: remote`, have an event fired for every change that happens from now on.

        The other engine tells of those made through this bridge too, and, if it has `state::changes`, of those made
        while there was no connection.
        """
        if not self._remote_events:
            return

        async def fire(event: RemoteEvent) -> None:
            change = event.key, event.old(), event.new()
            await _fire(around, event.scope, change, event.depth, event.expired())

        begun = asyncio.run_coroutine_threadsafe(self._begin_to_follow(around, fire), self._loop)
        wait_for(lambda slice_s: bool(concurrent.futures.wait([begun], slice_s).done))

    async def _begin_to_follow(self, around: Surroundings, fire: Fire) -> None:
        self._follower = Follower(self._client, self.changes.longest_wait_ms, around, fire)
        if self._client.connected:
            self._follower.connected()
        self._following = asyncio.create_task(self._follow(self._follower, around))

    async def _follow(self, follower: Follower, around: Surroundings) -> None:
        # Until it is known that the other engine can be asked for changes, there is a trigger as well, whose events
        # wait: if it cannot, they are what has changed from the first moment on.
        decided = asyncio.Event()
        withdraw = self._register_trigger(around, decided)

        def begun() -> None:
            self._by_polls = True
            if not decided.is_set():
                decided.set()
                withdraw()

        try:
            await follower.run(begun)
        except Unsupported as error:
            log.info("bridge to %s: changes come by a trigger, as %s", self.url, error)
            self._by_polls, self._by_trigger = False, True
            if decided.is_set():  # another engine, older than the one before, is there now
                self._register_trigger(around, decided)
            decided.set()

    def _register_trigger(self, around: Surroundings, decided: asyncio.Event) -> Callable[[], object]:
        """Have the other engine call a function here for every change. Return what withdraws that."""

        async def on_event(payload: bytes) -> bytes | None:
            await decided.wait()
            if not self._by_trigger:
                return None
            event = _read_event(payload)
            depth = max(0, event_depth.get() - 1)  # the depth of the event; that of this handler is one more
            await _fire(around, event.scope, (event.key, event.old(), event.new()), depth, event.expired())
            return None

        function_id = f"scopestate::bridge::{os.urandom(8).hex()}"
        self._client.register_function(
            function_id, on_event, description="changes for a scopestate bridge", ordered=True
        )
        # iii and older scopestate engines ignore `events`: they report changes of the first three kinds.
        trigger_id = self._client.register_trigger("state", function_id, {"events": _EVENTS})

        # The function stays: calls of it may be on their way.
        return lambda: self._client.unregister_trigger(trigger_id)

    def scopes(self) -> list[str]:
        """Return the names of the other engine's scopes that hold a key."""
        try:
            result = self.call_and_wait("state::list_groups", b"{}")
            return msgspec.json.decode(result or b"null", type=_Groups).groups
        except msgspec.DecodeError as error:
            raise StorageError(f"Failed to list groups via bridge: the result has no groups: {error}") from error
        except ScopestateError as error:
            raise StorageError(f"Failed to list groups via bridge: {error}") from error

    def problem(self) -> str | None:
        """Return what is wrong now, as text; None if all is well."""
        why_not = self._client.why_not
        if why_not is not None:
            return f"the bridge has no connection: {why_not}; calls wait for one"
        if self._by_polls and self._follower is not None:
            return self._follower.problem()
        return self._refusal or None

    # ----------------------------------------------------------------------------------------- for export and import

    def read(self, scope: str) -> dict[str, Entry]:
        """Return what a scope holds, as of one moment, in the other engine's order. Revision 0: it does not tell.

        Raises StorageError if the other engine is not scopestate: its `state::list` names no keys.
        """
        try:
            turn = Everything()
            result = self.call_and_wait(turn.function_id, msgspec.json.encode(turn.call(scope)))
            _, entries = turn.effects_of(result)
            return dict(entries)
        except ScopestateError as error:
            raise StorageError(f"scope {scope!r} cannot be loaded via bridge: {error}") from error

    def write(self, changes: Mapping[str, Mapping[str, Entry | None]]) -> None:
        """Set each key of each scope, or delete it (None), and wait for the answers. Its revision is not kept.

        Each key is a call of its own: on a raise, some of the keys may be written.
        """
        waiting: list[tuple[str, str, Waiter]] = []
        for scope, values in changes.items():
            for key, entry in values.items():
                turn = _writing(key, entry)
                waiter = Waiter()
                waiting.append((scope, key, waiter))
                try:
                    function_id, payload, needs = message_of(turn, scope)
                    self.call(function_id, payload, waiter.done, needs=needs)
                except EngineClosed as error:
                    waiter.done(None, error)
        for scope, key, waiter in waiting:
            try:
                waiter.get()
            except ScopestateError as error:
                raise StorageError(f"key {key!r} of scope {scope!r} was not written: {error}") from error

    def leave(self) -> None:
        self.leaving = True
        self.close()

    def close(self) -> None:
        """Close the connection; calls in progress fail. Idempotent. In a forked child it does nothing."""
        if os.getpid() != self._pid:
            return
        try:
            self._open.pop()  # one step: only one of two threads continues
        except IndexError:
            return
        self._closed = True
        ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        wait_for(lambda slice_s: bool(concurrent.futures.wait([ending], slice_s).done))
        ending.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        join(self._thread)

    async def _end(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        await self._client.close()

    # --------------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _note_refusal(self, error: ScopestateError) -> None:
        self._refusal = (
            f"the remote reports no changes to the bridge: {error} ({error.code}); local triggers hear of none"
        )
        log.error("bridge to %s: %s", self.url, self._refusal)

    def _note_connection(self, connected: bool, reason: str) -> None:
        if connected:
            self._refusal = ""
            if self._follower is not None and not self._by_trigger:
                self._follower.connected()
        if connected and self._client.connections == 1:
            log.info("bridge to %s: connected", self.url)
        elif connected:
            missed = "; changes that others made meanwhile fired no local trigger" if self._by_trigger else ""
            log.warning("bridge to %s: connected again%s", self.url, missed)
        elif not self._closed:
            log.warning("bridge: %s; calls wait for it and it is tried again", reason)


async def _fire(
    around: Surroundings,
    scope: str,
    change: tuple[str, bytes | None, bytes | None],
    depth: int,
    expired: Expired | None,
) -> None:
    """Fire the event of a reported change. While a handler is full this waits, and so does the other engine."""
    room: LoopReply | None = None
    while True:
        told = LoopReply()
        try:
            around.directory[scope].take_in(ReportedChange(*change, told, depth, expired))  # type: ignore[attr-defined]
            await told.future
            return
        except EngineClosed:
            return
        except HandlerFull:
            # Asked for before the next attempt, so that room made in between is not missed.
            if room is not None:
                await room.future
            room = LoopReply()
            around.router.backlog.when_room(room.set)


def _read_event(payload: bytes) -> _Event:
    """Return an event that the other engine has sent. Raises DeserializationError."""
    try:
        return msgspec.json.decode(payload, type=_Event)
    except msgspec.DecodeError as error:
        raise DeserializationError(f"not a state event: {error}") from error
