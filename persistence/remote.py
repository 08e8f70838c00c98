"""What a scope needs of a connection to another engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from scopestate.errors import ScopestateError

Done = Callable[[bytes | None, ScopestateError | None], object]
"""Takes the outcome of a call: the result as JSON (None: no value), or an error."""


class Remote(Protocol):
    """A connection to another engine. Every method may be called from any thread."""

    sequence_floor: int
    """Where a scope's event numbers begin here, so that they never go back when a scope leaves memory and returns."""

    @property
    def reports_changes(self) -> bool:
        """True if the remote reports every change, those made through here included: then answers fire no events."""

    def call(self, function_id: str, payload: bytes, done: Done) -> None:
        """Send a call with its input as JSON, and return at once; calls are sent in the order in which they are made.

        `done` is called exactly once, later and on another thread, never before `call` returns; it must not block.
        Raises EngineClosed, and calls nothing, if the connection was closed for good.
        """
