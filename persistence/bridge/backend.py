"""Scopes that live in another engine, reached over one connection (docs/reference/protocol.md, section 13)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Final

import msgspec

from scopestate.actors.ports import Backend
from scopestate.actors.scope import ScopeActor, Surroundings
from scopestate.errors import ConnectionLost, EngineClosed, NotConnected, ScopestateError, StorageError, Unsupported
from scopestate.ops.functions import FLUSH
from scopestate.ops.remote import Everything
from scopestate.ops.turns import Deadline, Delete, Entry, Set, Turn
from scopestate.ops.writes import SetWith
from scopestate.persistence.bridge.calls import Done, RemoteCall
from scopestate.persistence.bridge.changes import RemoteChanges
from scopestate.persistence.bridge.computed import Waiter
from scopestate.persistence.bridge.consumers import RemoteConsumers
from scopestate.persistence.bridge.dialling import BridgeTarget
from scopestate.persistence.bridge.events import RemoteEvents
from scopestate.persistence.bridge.options import BridgeOptions
from scopestate.persistence.bridge.owner import BridgeConnectionOwner
from scopestate.persistence.bridge.scope import MOST_REPEATS, BridgeScope, message_of
from scopestate.persistence.sharing.sockets import replace_by_nothing
from scopestate.signals import join, wait_for
from scopestate.wire.address import Address
from scopestate.wire.client import Client
from scopestate.wire.features import Needs
from scopestate.wire.options import ClientOptions

log = logging.getLogger("scopestate.persistence.bridge")


def _writing(key: str, entry: Entry | None) -> Turn[Any]:
    if entry is None:
        return Delete(key)
    if entry.expires_ms is None:
        return Set(key, entry.json)
    return SetWith(key, entry.json, deadline=Deadline(expires_ms=entry.expires_ms))


async def _end_other_tasks() -> None:
    """End the tasks that still run on a closing loop: a thread may wait for their outcome."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class _Groups(msgspec.Struct):
    groups: list[str]


_decode_groups: Final = msgspec.json.Decoder(_Groups).decode

LARGEST_MESSAGE: Final = 1 << 30
"""Bytes of the largest message between two engines of a directory."""


def _client_options(options: BridgeOptions, *, one_machine: bool) -> ClientOptions:
    made = ClientOptions(
        connect_wait_s=options.connect_wait_ms / 1000,
        call_timeout_s=options.call_timeout_ms / 1000,
        name=f"scopestate-bridge:{os.getpid()}",
    )
    if not one_machine:
        return made
    return msgspec.structs.replace(
        made,
        name=f"{made.name}:{os.urandom(4).hex()}",  # there may be another engine in this process
        backoff_first_s=0.002,  # a refusal costs nothing
        backoff_most_s=0.05,
        max_message_bytes=LARGEST_MESSAGE,  # the other engine must be able to receive everything that one can hold
    )


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
        on_lost: Callable[[str], object] | None = None,
        describe: Callable[[], str] | None = None,
    ) -> None:
        """`find()` returns where the other engine is, at each attempt to connect; it replaces the options.

        It may raise NotConnected, which says why there is nothing to connect to; it is called on several threads.
        `on_lost(reason)` is called each time that a connection has ended or cannot be made, on the loop's thread.
        `describe()` says more about that engine in the error of a call that it does not answer. Raises ConfigError:
        address, token, TLS file.
        """
        self._address: Final = Address(
            options.bridge_url,
            token=options.token,
            tls_ca_file=options.tls_ca_file,
            tls_verify=options.tls_verify,
        )
        self._address.tls()  # raises now
        self.transparent = find is not None
        """As in `Connection`: there is a `find` if this is the engine of the same directory."""
        self._remote_events = options.events == "remote"
        self._level: Final = logging.WARNING if find is None else logging.DEBUG
        """The log level of messages about connections: a caller that gives `find` logs what matters itself."""
        self._pid = os.getpid()
        self._closed = False
        self.leaving = False
        """As in `Connection`."""
        self._open = [None]
        self.call_elsewhere = self.read_now
        self.changes: RemoteChanges = RemoteChanges(
            self._post, options.call_timeout_ms, options.connect_wait_ms, lambda: self.leaving
        )
        client_options = _client_options(options, one_machine=find is not None)
        self.owner: Final = BridgeConnectionOwner(
            BridgeTarget(find or (lambda: self._address), client_options, self._settle_events),
            client_options,
            pauses_s=None if find is None else (client_options.backoff_first_s, client_options.backoff_most_s),
            describe=describe,
        )
        """The connection owner for calls."""
        self._client = Client(
            find or self._address,
            client_options,
            on_change=self._note_connection,
            on_lost=on_lost,
            on_trigger_refused=self._note_refusal,
            describe=describe,
        )
        self.consumers: RemoteConsumers = RemoteConsumers(self, options.call_timeout_ms / 2000)
        self._loop = asyncio.new_event_loop()
        self._events = RemoteEvents(self._client, self._loop, self.changes.longest_wait_ms)
        if self._remote_events:
            self.arrivals = self._events
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
        self.owner.submit(RemoteCall(function_id, payload, done, depth, needs))

    def read_now(self, function_id: str, payload: bytes) -> bytes | None:
        """Call a function that changes nothing and wait for the result; not on an event loop's thread.

        Raises the error of the call. A call whose connection was lost is repeated.
        """
        for _ in range(MOST_REPEATS):
            with contextlib.suppress(ConnectionLost):
                return self.call_and_wait(function_id, payload)
        return self.call_and_wait(function_id, payload)

    def _post(self, function_id: str, payload: bytes, done: Done, depth: int = 0, needs: Needs | None = None) -> None:
        """As `call`, for calls that may take long: uses the connection for calls that the other engine starts."""
        try:
            self._loop.call_soon_threadsafe(
                partial(self._client.post, function_id, payload, done, depth=depth, needs=needs)
            )
        except RuntimeError as error:
            raise EngineClosed("the bridge is closed") from error

    def call_and_wait(self, function_id: str, payload: bytes) -> bytes | None:
        """Call and wait for the result; not on an event loop's thread. Raises the error of the call."""
        if self._closed or os.getpid() != self._pid:
            raise EngineClosed("the bridge is closed")
        call = RemoteCall(function_id, payload, None)
        self.owner.call(None, call, None)
        if call.error is not None:
            raise call.error
        result: bytes | None = call.answer
        return result

    async def call_on_loop(self, function_id: str, payload: bytes, timeout_s: float | None = None) -> bytes | None:
        """Call, and await the result, on the loop of the connection."""
        return await self._client.call_raw(function_id, payload, timeout_s=timeout_s)

    def spawn(self, work: Coroutine[Any, Any, None]) -> concurrent.futures.Future[None] | None:
        """Run a coroutine on the loop of the connection; None: the loop is closed."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            return None

    def on_loop(self, work: Callable[[], object]) -> None:
        """Call `work()` on that loop, soon; never if the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work)

    # ---------------------------------------------------------------------------------------- as an engine's backend

    def make_scope(self, scope: str, around: Surroundings) -> ScopeActor:
        """Return a new actor for `scope`."""
        return BridgeScope(scope, around, self)

    def start(self, around: Surroundings) -> None:
        """With `events: remote`, fire an event for every change that a trigger here may want from now on.

        The other engine also reports changes made through this bridge, and, if it has `state::changes`, those made
        while there was no connection.
        """
        if self._remote_events:
            self._events.start(around)

    def listen(self, *, wait: bool = True) -> None:
        """As `Backend.listen`."""
        self._events.listen(wait=wait)

    def scopes(self) -> list[str]:
        """Return the names of the other engine's scopes that hold a key."""
        try:
            result = self.read_now("state::list_groups", b"{}")
            return _decode_groups(result or b"null").groups
        except msgspec.DecodeError as error:
            raise StorageError(f"Failed to list groups via bridge: the result has no groups: {error}") from error
        except ScopestateError as error:
            raise StorageError(f"Failed to list groups via bridge: {error}") from error

    saves_elsewhere = True

    def flush(self) -> None:
        """Wait until the other engine has saved.

        Raises StorageError. iii and older versions of scopestate cannot be asked, and save on their own. If this engine
        continues with a store of its own before the call was sent, there is nothing left to wait for here.
        """
        waiter = Waiter()
        try:
            self.call(FLUSH, b"{}", waiter.done, needs=Needs(FLUSH))
            waiter.get()
        except Unsupported:
            return
        except (NotConnected, EngineClosed) as error:
            if not self.leaving:
                raise StorageError(f"cannot find out what is saved: {error}") from error
        except ScopestateError as error:
            raise StorageError(f"cannot find out what is saved: {error}") from error

    def problem(self) -> str | None:
        """Return what is wrong now, as text; None if all is well."""
        why_not = self.owner.why_not or self._client.why_not
        if why_not is not None:
            return f"the bridge has no connection: {why_not}; calls wait for one"
        return self._events.problem()

    # ----------------------------------------------------------------------------------------- for export and import

    def read(self, scope: str) -> dict[str, Entry]:
        """Return what a scope holds, as of one moment, in the other engine's order.

        Revision 0: it does not report revisions.

        Raises StorageError if the other engine is not scopestate: its `state::list` names no keys.
        """
        try:
            turn = Everything()
            result = self.read_now(turn.function_id, msgspec.json.encode(turn.call(scope)))
            _, entries = turn.effects_of(result)
            return dict(entries)
        except ScopestateError as error:
            raise StorageError(f"scope {scope!r} cannot be loaded via bridge: {error}") from error

    def write(self, changes: Mapping[str, Mapping[str, Entry | None]]) -> None:
        """Set each key of each scope, or delete it (None), and wait for the answers. Its revision is not kept.

        Each key is a separate call: if it raises, some of the keys may be written.
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

    def leave(self) -> str | None:
        self.leaving = True
        self.close()
        return self._events.cursor

    def abandon(self) -> None:
        """In a forked child: leave the connections to the parent, whose end the other engine notices then."""
        for descriptor in (self.owner.fileno(), self._client.fileno()):
            replace_by_nothing(descriptor)

    def close(self) -> None:
        """Close the connection; calls in progress fail. Idempotent. In a forked child it does nothing."""
        if os.getpid() != self._pid:
            return
        try:
            self._open.pop()  # one step: only one of two threads continues
        except IndexError:
            return
        if not self.leaving:
            self.consumers.close()
        self._closed = True
        self.owner.close()
        ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        wait_for(lambda slice_s: bool(concurrent.futures.wait([ending], slice_s).done))
        ending.result()
        self.consumers.join()
        self._loop.call_soon_threadsafe(self._loop.stop)
        join(self._thread)

    async def _end(self) -> None:
        await self._events.end()
        await self.consumers.end()
        await self._client.close()

    # --------------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(_end_other_tasks())
        finally:
            self._loop.close()

    def _settle_events(self, timeout_s: float) -> None:
        """Wait for events before the first call of a connection: those of this engine's own writes must arrive too."""
        self._events.settle(timeout_s, lambda: self._closed)

    def _note_refusal(self, error: ScopestateError) -> None:
        self._events.note_refusal(error)

    def _note_connection(self, connected: bool, reason: str) -> None:
        self._events.note_connection(connected)
        if connected and self.owner.why_not is not None:
            self.owner.try_now()
        if connected and self._client.connections == 1:
            log.info("bridge to %s: connected", self.url)
        elif connected:
            missed = "; changes that others made meanwhile fired no local trigger" if self._events.misses else ""
            log.log(self._level, "bridge to %s: connected again%s", self.url, missed)
        elif not self._closed:
            log.log(self._level, "bridge: %s; calls wait for it and it is tried again", reason)
