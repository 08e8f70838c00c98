"""One command on its way to Redis and back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from scopestate.errors import ScopestateError
from scopestate.persistence.redis.connection import pack_text

if TYPE_CHECKING:
    from scopestate.persistence.redis.link import Link


class Flight:
    """A command from its making until its reply has come, or the reason why none will.

    Whoever made it may wait for it (`expect`, `wait`); if nobody does, `landed` is called on the link's thread.
    """

    # Defaults of the class, not of each instance: most flights need none of them.

    reply: Any = None
    """What Redis answered, a Refusal included."""
    error: ScopestateError | None = None
    """Why there is no reply: NotConnected (nothing was sent), ConnectionLost (it may have been done)."""
    away = False
    """True from its boarding on. A maker who was interrupted does not know if the link has it, and puts it again."""
    told = False
    """True once its maker has taken the reply in."""
    deadline = 0.0
    """When the link gives up sending it again; set when it is sent first. Seconds on the monotonic clock."""
    not_before = 0.0
    """When it may be sent again."""
    since = 0.0
    """When it began to wait for a link."""
    prefix = b""
    """A command that must come right before it: `ASKING`, after a redirection."""
    skips = 0
    """Replies to that which are still to come."""
    _arrival: threading.Lock | None = None
    _owner: list[None] | tuple[()] = ()

    def __init__(
        self, parts: tuple[Any, ...], link: Link, landed: Callable[[Flight, list[Any]], object], calls: Any
    ) -> None:
        self.parts = parts
        """The command: text, no numbers, which `connection.pack` says why."""
        self.command = pack_text(parts)
        self.link = link
        """The link that it goes by."""
        self.landed = landed
        self.calls = calls
        """What its maker wants to remember with it."""

    def board(self, outcomes: list[Any]) -> Flight | None:
        """It is ready to be sent, once: see `link.Passenger`. The link must be given it again for another time."""
        if self.away:
            return None
        self.away = True
        return self

    def refuse(self, error: ScopestateError, outcomes: list[Any]) -> None:
        """It is not sent, for this reason."""
        self.error = error
        self.arrive(outcomes)

    def expect(self) -> None:
        """Its maker is about to wait. To be called before the link gets it."""
        arrival = threading.Lock()
        arrival.acquire()
        self._arrival = arrival
        self._owner = [None]

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until it has landed; False if that took too long."""
        return self._arrival.acquire(timeout=-1 if timeout_s is None else timeout_s)  # type: ignore[union-attr]

    def arrive(self, outcomes: list[Any]) -> None:
        """Reply or error is there: tell who waits. Called by the link, once; `outcomes` is what it delivers later."""
        if self.leave():
            self._arrival.release()  # type: ignore[union-attr]  # who owns it waits for it
        else:
            self.landed(self, outcomes)

    def leave(self) -> bool:
        """Who waited goes away. True: `landed` will be called. False: it has landed already, or nobody waited."""
        owner = self._owner
        if not owner:
            return False
        try:
            owner.pop()  # one step, also for two threads
        except IndexError:
            return False
        return True
