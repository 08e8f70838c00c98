"""The changes of the other engine, by its `state::changes`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.ports import ChangeSource
from scopestate.errors import (
    CallTimeout,
    ConnectionLost,
    EngineClosed,
    NotConnected,
    RemoteFailure,
    ScopestateError,
)
from scopestate.ops.polls import FUNCTION_ID, LONGEST_WAIT_MS
from scopestate.persistence.bridge.computed import Waiter
from scopestate.signals import wait_for
from scopestate.wire.features import Needs
from scopestate.wire.refusals import refusal_of

if TYPE_CHECKING:
    from scopestate.persistence.bridge.calls import Done

Call = Callable[[str, bytes, "Done", int, Needs | None], None]

AWAY: Final = (CallTimeout, ConnectionLost, NotConnected)
"""There is no connection, or no answer: the next poll may have one."""


RESENT: Final = 10
"""How often a call that reads is sent again after its connection was lost."""

_AGAIN_S: Final = 0.02
"""Pause until an engine that closes is asked again, or the next one."""


class _Closes(NotConnected):
    """The other engine is closing: another one may take its place."""


class RemoteChanges(ChangeSource):
    """Polls the other engine. One that does not have `state::changes`, such as iii, is refused with Unsupported."""

    def __init__(self, call: Call, call_timeout_ms: int, connect_wait_ms: int, is_leaving: Callable[[], bool]) -> None:
        """`is_leaving()`: True once no call is sent any more, because another backend takes over."""
        self._call = call
        self.longest_wait_ms = min(LONGEST_WAIT_MS, call_timeout_ms // 2)
        self._connect_wait_s = connect_wait_ms / 1000
        self._is_leaving = is_leaving
        self._waiting: list[tuple[Mapping[str, Any], Done]] = []
        """Polls that were begun while this side was leaving, for its successor."""
        self._successor: ChangeSource | None = None
        self._has_successor = threading.Event()

    def poll(self, asked: Mapping[str, Any], done: Done) -> None:
        def finish(text: bytes | None, error: ScopestateError | None) -> None:
            done(text, error_of(text, error))

        if self._successor is not None:
            self._successor.poll(asked, done)
            return
        # Names with "_" are not listed. An engine that does not know one keeps a watch that no poll continues.
        needs = Needs(FUNCTION_ID, tuple(name for name in asked if not name.startswith("_")))
        try:
            self._call(FUNCTION_ID, msgspec.json.encode(asked), finish, 0, needs)
        except EngineClosed:
            if not self._is_leaving():
                raise
            self._waiting.append((asked, done))
            if self._has_successor.is_set():
                self._pass_on(self._wait_for_successor())

    def poll_now(self, asked: Mapping[str, Any]) -> bytes:
        resent, ends_s = 0, time.monotonic() + self._connect_wait_s
        while not self._is_leaving():
            waiter = Waiter()
            self.poll(asked, waiter.done)
            try:
                return waiter.get() or b""
            except _Closes:
                if time.monotonic() > ends_s:
                    raise
                time.sleep(_AGAIN_S)
            except NotConnected:
                if not self._is_leaving():
                    raise
            except ConnectionLost:
                resent += 1
                if resent > RESENT:
                    raise
        return self._wait_for_successor().poll_now(asked)

    def _wait_for_successor(self) -> ChangeSource:
        wait_for(self._has_successor.wait)
        assert self._successor is not None  # it was waited for
        return self._successor

    def hand_over(self, to: ChangeSource) -> None:
        self._successor = to
        self._has_successor.set()
        self._pass_on(to)

    def _pass_on(self, to: ChangeSource) -> None:
        while self._waiting:
            try:
                asked, done = self._waiting.pop(0)
            except IndexError:
                return  # another thread has passed it on
            try:
                to.poll(asked, done)
            except ScopestateError as error:
                done(None, error)


def error_of(text: bytes | None, error: ScopestateError | None) -> ScopestateError | None:
    """Return the error of a poll as it would be raised in the other engine."""
    if isinstance(error, RemoteFailure):
        if error.code == EngineClosed.code:
            return _Closes("the other engine is closing")
        return refusal_of(error) or error
    if error is None and text is None:
        return RemoteFailure(FUNCTION_ID, "serialization_error", "its answer has no value")
    return error
