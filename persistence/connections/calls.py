"""A call that a connection owner carries: how its caller learns that it has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scopestate.actors.reply import Envelope, ReplyTo

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop


class Call(Envelope):
    """One call from its admission to its end. `message` is its turn."""

    # Defaults of the class, not of each instance: most calls need none of them.

    done = False
    answer: Any = None
    error: Exception | None = None
    lock: Any = None
    """Held until the call has ended, if a thread waits for that."""
    thread = 0
    """The thread that leads for it, or 0."""
    gave_up = False
    """True if its caller waits no longer. A call that was not sent is then skipped; nothing else depends on the
    flag."""
    loop: AbstractEventLoop | None = None
    """The event loop whose thread sends it, if that loop may drive the connection."""

    def __init__(self, turn: Any, reply_to: ReplyTo | None, depth: int) -> None:
        self.message = turn
        self.reply_to: ReplyTo | None = reply_to  # type: ignore[assignment]  # None: its caller does it, or has a lock
        self.depth = depth

    @property
    def is_abandoned(self) -> bool:
        """True if the answer would reach no caller."""
        return self.gave_up or (self.reply_to is not None and self.reply_to.abandoned)
