"""The calls of a bridge: those that callers wait for, and those that are sent to the other engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from scopestate.errors import ScopestateError
from scopestate.persistence.connections.calls import Call
from scopestate.wire.features import Needs

Done = Callable[[bytes | None, ScopestateError | None], object]
"""Takes the outcome of a call: the result as JSON (None: no value), or an error."""


@final
class RemoteCall(Call):
    """One call of the other engine. Its answer is the result as JSON, or None: no value."""

    since = 0.0
    """When it began to wait for a connection. Seconds on the monotonic clock."""
    deadline = 0.0
    """When the wait for its answer ends."""
    invocation_id = ""
    """The id that its answer names; a new one each time that it is sent."""

    def __init__(
        self, function_id: str, payload: bytes, done_to: Done | None, depth: int = 0, needs: Needs | None = None
    ) -> None:
        """`done_to` takes the outcome, on a thread of the connection; None: its caller waits for it.

        `needs`: what the other engine must be able to do.
        """
        # The base's `__init__`, written inline: one object is made for each call.
        self.message = self.reply_to = None
        self.depth = depth
        self.function_id = function_id
        self.payload = payload
        self.done_to = done_to
        self.needs = needs


@final
class TurnCall(Call):
    """A turn whose caller waits for it on its own thread. It is also the reply."""

    remote: RemoteCall | None = None
    """The call that was sent to the other engine for it, if its caller leads."""
    late: Any = None
    """What is left to do for it after its caller was interrupted."""
    loop_reply = None

    # From here on: for a turn that is sent itself, instead of a `RemoteCall` and the scope's own record.

    home: Any = None
    """The scope that has sent it in this way."""
    turn: Any = None
    function_id = ""
    payload = b""
    needs: Needs | None = None
    done_to: Done | None = None
    since = 0.0
    deadline = 0.0
    invocation_id = ""
    waits_for = 0
    resent = 0
    runs = False
    followers: list[Any]
    """The calls that wait for this one, in order of arrival."""

    def __init__(self, turn: Any, depth: int) -> None:
        # The base's `__init__`, written inline.
        self.message = turn
        self.reply_to = None
        self.depth = depth

    @property
    def reply(self) -> TurnCall:
        """Where its answer goes."""
        return self

    @property
    def abandoned(self) -> bool:
        """True if its caller waits no longer."""
        return self.gave_up

    def set(self, value: Any = None) -> None:
        """Deliver the answer."""
        self.answer = value
        self.end()

    def fail(self, error: BaseException) -> None:
        """Deliver an error instead."""
        self.error = error  # type: ignore[assignment]  # whatever it is, its caller gets it
        self.end()

    def end(self) -> None:
        """Wake the caller: it has its outcome."""
        self.done = True
        lock, self.lock = self.lock, None
        if lock is not None:
            lock.release()
