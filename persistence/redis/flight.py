"""One command on its way to Redis and back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

from scopestate.errors import ScopestateError
from scopestate.persistence.redis.connection import pack_text

if TYPE_CHECKING:
    from scopestate.persistence.redis.link import Link

_BY: Final = "by"
_MAKER: Final = "maker"
_LINK: Final = "link"


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
    over = False
    """True once it has arrived. A link that has it a second time lets go of it."""
    queued = False
    """True once the link has it for certain."""
    maker = 0
    """The thread that waits for it, if one does."""
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
    _ending: dict[str, str] | None = None

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
        if self.away or self.over:
            return None
        self.away = True
        return self

    def refuse(self, error: ScopestateError, outcomes: list[Any]) -> None:
        """It is not sent, for this reason."""
        if self.away or self.over:
            return
        self.error = error
        self.arrive(outcomes)

    def expect(self) -> None:
        """Its maker is about to wait. To be called before the link gets it."""
        arrival = threading.Lock()
        arrival.acquire()
        self._arrival = arrival
        self._ending = {}
        self.maker = get_ident()

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until it has landed; False if that took too long."""
        return self._arrival.acquire(timeout=-1 if timeout_s is None else timeout_s)  # type: ignore[union-attr]

    def arrive(self, outcomes: list[Any]) -> None:
        """Reply or error is there: tell who waits. Called by the link, once; `outcomes` is what it delivers later."""
        self.over = True
        ending = self._ending
        if ending is not None and ending.setdefault(_BY, _LINK) == _LINK:  # one step, also for two threads
            self._arrival.release()  # type: ignore[union-attr]  # who expects it waits for it
        else:
            self.landed(self, outcomes)

    def leave(self) -> bool:
        """Who waits goes away; may be repeated. True: `landed` is called. False: it has landed, or nobody waited."""
        ending = self._ending
        return ending is not None and ending.setdefault(_BY, _MAKER) == _MAKER
