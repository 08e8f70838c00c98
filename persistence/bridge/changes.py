"""The changes of the other engine: for watches, and as events for the triggers of this one (docs/bridge.md)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from scopestate.actors.containment import Log
from scopestate.actors.ports import ChangeSource
from scopestate.errors import (
    CallTimeout,
    Compacted,
    ConnectionLost,
    DeserializationError,
    Forbidden,
    FunctionNotFound,
    NotConnected,
    RemoteFailure,
    ScopestateError,
    Unsupported,
)
from scopestate.ops.polls import FUNCTION_ID, LONGEST_WAIT_MS
from scopestate.ops.results import DeliveryFailure, StateEvent
from scopestate.ops.values import parse
from scopestate.persistence.bridge.computed import Waiter
from scopestate.wire.features import Needs
from scopestate.wire.refusals import refusal_of

if TYPE_CHECKING:
    from scopestate.actors.router import Expired
    from scopestate.actors.scope import Surroundings
    from scopestate.persistence.bridge.scope import Done
    from scopestate.wire.client import Client

log = Log("scopestate.persistence.bridge")

Call = Callable[[str, bytes, "Done", int, Needs | None], None]

MOST: Final = 500
"""Changes that are asked for at a time."""
AGAIN_S: Final = 0.5
"""Pause after a poll that has failed."""
SHOWN_S: Final = 300.0
"""How long health reports that changes were lost."""
_AWAY: Final = (CallTimeout, ConnectionLost, NotConnected)


class RemoteChanges(ChangeSource):
    """Polls the other engine. One that does not have `state::changes`, such as iii, is refused with Unsupported."""

    def __init__(self, call: Call, call_timeout_ms: int) -> None:
        self._call = call
        self.longest_wait_ms = min(LONGEST_WAIT_MS, call_timeout_ms // 2)

    def poll(self, asked: Mapping[str, Any], done: Done) -> None:
        def finish(text: bytes | None, error: ScopestateError | None) -> None:
            done(text, _error_of(text, error))

        needs = Needs(FUNCTION_ID, tuple(asked))
        self._call(FUNCTION_ID, msgspec.json.encode(asked), finish, 0, needs)

    def poll_now(self, asked: Mapping[str, Any]) -> bytes:
        waiter = Waiter()
        self.poll(asked, waiter.done)
        return waiter.get() or b""


def _error_of(text: bytes | None, error: ScopestateError | None) -> ScopestateError | None:
    """Return the error of a poll as it would be raised in the other engine."""
    if isinstance(error, RemoteFailure):
        return refusal_of(error) or error
    if error is None and text is None:
        return RemoteFailure(FUNCTION_ID, "serialization_error", "its answer has no value")
    return error


class RemoteEvent(msgspec.Struct):
    """A change, as another engine reports it to a bridge."""

    kind: Literal["put", "delete", "expire"]
    scope: str
    key: str
    value: msgspec.Raw = msgspec.Raw()
    old_value: msgspec.Raw = msgspec.Raw()
    expired_at: int | None = None
    late_ms: int = 0
    depth: int = 0

    def old(self) -> bytes | None:
        """Return the old value; None if there was none."""
        return parse(bytes(self.old_value)) if self.old_value else None

    def new(self) -> bytes | None:
        """Return the new value; None if the key was removed."""
        return parse(bytes(self.value)) if self.value else None

    def expired(self) -> Expired | None:
        """Return the deadline of a key that has expired, and how late it was removed."""
        return None if self.expired_at is None else (self.expired_at, self.late_ms)


class _Answer(msgspec.Struct):
    changes: list[RemoteEvent]
    cursor: str


_decode: Final = msgspec.json.Decoder(_Answer).decode

Fire = Callable[[RemoteEvent], Awaitable[None]]


class Follower:
    """Fires an event here for every change in the other engine, also for those made while there was no connection.

    On the thread of the client's event loop only. At each connection, before anything else is sent, it asks for the
    cursor of that moment: where to begin, the first time and if the changes behind the last cursor are gone.
    """

    def __init__(self, client: Client, longest_wait_ms: int, around: Surroundings, fire: Fire) -> None:
        self._client = client
        self._longest_wait_ms = longest_wait_ms
        self._around = around
        self._fire = fire
        self._cursor: str | None = None
        self._connected = asyncio.Event()
        self._begin: asyncio.Future[bytes] | None = None
        self._lost = ""
        self._lost_s = 0.0
        self._refusal = ""

    def problem(self) -> str | None:
        """Return what is wrong, for health. From any thread."""
        if self._lost and time.monotonic() - self._lost_s < SHOWN_S:
            return self._lost
        return self._refusal or None

    def connected(self) -> None:
        """Take note of a new connection."""
        self._begin = self._post({"limit": MOST}, first=True)
        self._connected.set()

    def _post(self, asked: dict[str, Any], *, first: bool = False) -> asyncio.Future[bytes]:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def done(text: bytes | None, error: ScopestateError | None) -> None:
            error = _error_of(text, error)
            if future.done():
                return
            if isinstance(error, RemoteFailure) and error.code in (FunctionNotFound.code, Forbidden.code):
                future.set_exception(Unsupported(FUNCTION_ID, str(error)))
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(text or b"")
            future.exception()  # not every answer at the begin of a connection is needed

        # Without asking for the features of the other engine before: one without the function says so.
        _ = self._client.post(FUNCTION_ID, msgspec.json.encode({**asked, "_events": True}), done, first=first)
        return future

    async def run(self, begun: Callable[[], object]) -> None:
        """Follow the other engine until this one closes. Raises Unsupported if it cannot be asked for changes.

        `begun()` is called when it is known that it can be asked.
        """
        await self._connected.wait()
        while True:
            try:
                await self._poll()
                begun()
            except Unsupported:
                raise
            except Compacted as error:
                self._report_lost(error)
                self._cursor = None
            except _AWAY:
                await asyncio.sleep(AGAIN_S)
            except (ScopestateError, msgspec.DecodeError) as error:
                self._refusal = f"the other engine does not tell its changes: {error}; local triggers hear of none"
                log.error("bridge: %s", self._refusal)  # noqa: TRY400 - the text says it all
                self._cursor = None
                await asyncio.sleep(4 * AGAIN_S)
                self._begin = self._post({"limit": MOST})
            else:
                self._refusal = ""

    async def _poll(self) -> None:
        if self._cursor is None:
            begin = self._begin
            assert begin is not None  # it is connected, or was
            try:
                answer = _decode(await asyncio.shield(begin))
            except _AWAY:
                if self._begin is begin:
                    self._begin = self._post({"limit": MOST})
                raise
        else:
            asked = {"limit": MOST, "wait_ms": self._longest_wait_ms, "cursor": self._cursor}
            answer = _decode(await self._post(asked))
        for event in answer.changes:
            try:
                await self._fire(event)
            except DeserializationError as error:
                log.error("bridge: a change of key %r of scope %r is not JSON: %s", event.key, event.scope, error)  # noqa: TRY400 - as above
        self._cursor = answer.cursor

    def _report_lost(self, error: Compacted) -> None:
        """Say that changes are lost: in the log, in health, and to the hooks, once for each trigger."""
        self._lost = f"changes in the other engine fired no local trigger: {error.reason}; give it `history`"
        self._lost_s = time.monotonic()
        log.error("bridge: %s", self._lost)
        router = self._around.router
        for handler in router.triggers.handlers():
            trigger = handler.trigger
            event = StateEvent("state:updated", trigger.scope or "", trigger.key or "", None, None, 0)
            router.report(DeliveryFailure(trigger.trigger_id, trigger.function_id, event, error, 0, True))
