"""The calls on a scope in Redis: what each of them waits for, and how it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from scopestate.actors.reply import ReplyTo
from scopestate.errors import ConnectionLost, DeserializationError, NotConnected, ScopestateError, StorageError
from scopestate.ops.turns import Update

NEVER: Final = float("inf")

Known = tuple[bytes | None, bytes | None]
"""What a key held: as it is in Redis, and as we would write it, which is the same unless somebody else wrote it."""
NOTHING: Final[Known] = (None, None)

Outcome = tuple[ReplyTo, Any, BaseException | None]
"""What `reply.deliver` takes."""


class Call:
    """One call from its admission to its answer."""

    # Defaults of the class, not of each instance: most calls need none of them.

    done = False
    answer: Any = None
    error: Exception | None = None
    tries = 0
    """Attempts that failed because the key was changed elsewhere."""
    before: bytes | None = None
    after: bytes | None = None
    """What an update found, and made of it; `after` is None while it only looks."""
    problems: tuple[Any, ...] = ()

    def __init__(self, turn: Any, reply: ReplyTo | None, depth: int) -> None:
        self.turn = turn
        self.reply = reply
        """None: its caller runs the turn himself, or has his answer."""
        self.depth = depth

    def fail(self, error: ScopestateError) -> None:
        """End it with an error, worded for what it wanted."""
        turn = self.turn
        if isinstance(error, ConnectionLost):
            changes = turn.writes and not (type(turn) is Update and self.after is None)
            worded = ConnectionLost(turn.function_id, error.url, error.problem, may_be_applied=changes)
            worded.__cause__ = error.__cause__
            error = worded
        if isinstance(error, (ConnectionLost, NotConnected, StorageError, DeserializationError)):
            failure = turn.failed(error)
            failure.__cause__ = error
            error = failure
        self.error = error
        self.done = True


class Lane:
    """The calls on one key that wait behind an update which looks first, or must be tried again."""

    __slots__ = ("calls", "due", "known")

    def __init__(self, due: float) -> None:
        self.calls: deque[Call] = deque()
        self.due = due
        """When they may go, in seconds on the monotonic clock."""
        self.known: Known | None = None
        """What the key holds, if that was seen a moment ago."""


def tell(calls: Iterable[Call], outcomes: list[Outcome]) -> None:
    """Add the answers of those calls that are done to the outcomes."""
    for call in calls:
        reply = call.reply
        if reply is not None and call.done:
            call.reply = None
            outcomes.append((reply, call.answer, call.error))


def contended(scope: str, key: str, tries: int) -> StorageError:
    """Return the error of an update that always found the key changed."""
    return StorageError(
        f"key {key!r} of scope {scope!r} was changed elsewhere during each of {tries} attempts to update it; nothing "
        "was written: try again, or raise update_attempts"
    )
