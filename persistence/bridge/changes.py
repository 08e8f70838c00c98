"""The changes of the other engine, by its `state::changes`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.ports import ChangeSource
from scopestate.errors import (
    CallTimeout,
    ConnectionLost,
    NotConnected,
    RemoteFailure,
    ScopestateError,
)
from scopestate.ops.polls import FUNCTION_ID, LONGEST_WAIT_MS
from scopestate.persistence.bridge.computed import Waiter
from scopestate.wire.features import Needs
from scopestate.wire.refusals import refusal_of

if TYPE_CHECKING:
    from scopestate.persistence.bridge.scope import Done

Call = Callable[[str, bytes, "Done", int, Needs | None], None]

AWAY: Final = (CallTimeout, ConnectionLost, NotConnected)
"""There is no connection, or no answer: the next poll may have one."""


class RemoteChanges(ChangeSource):
    """Polls the other engine. One that does not have `state::changes`, such as iii, is refused with Unsupported."""

    def __init__(self, call: Call, call_timeout_ms: int) -> None:
        self._call = call
        self.longest_wait_ms = min(LONGEST_WAIT_MS, call_timeout_ms // 2)

    def poll(self, asked: Mapping[str, Any], done: Done) -> None:
        def finish(text: bytes | None, error: ScopestateError | None) -> None:
            done(text, error_of(text, error))

        needs = Needs(FUNCTION_ID, tuple(asked))
        self._call(FUNCTION_ID, msgspec.json.encode(asked), finish, 0, needs)

    def poll_now(self, asked: Mapping[str, Any]) -> bytes:
        waiter = Waiter()
        self.poll(asked, waiter.done)
        return waiter.get() or b""


def error_of(text: bytes | None, error: ScopestateError | None) -> ScopestateError | None:
    """Return the error of a poll as it would be raised in the other engine."""
    if isinstance(error, RemoteFailure):
        return refusal_of(error) or error
    if error is None and text is None:
        return RemoteFailure(FUNCTION_ID, "serialization_error", "its answer has no value")
    return error
