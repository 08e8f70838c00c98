"""Where a link deals with those who want something sent."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from scopestate.errors import ScopestateError
from scopestate.inbox import Empty, Inbox
from scopestate.persistence.redis.flight import Flight

log = logging.getLogger("scopestate.persistence.redis")


class Passenger(Protocol):
    """Who may have a command to send. The link's thread calls both methods."""

    since: float
    """When it began to wait for the link. Seconds on the monotonic clock."""

    def board(self, outcomes: list[Any]) -> Flight | None:
        """Return the next command, if there is one. `outcomes` takes answers that are there already."""

    def refuse(self, error: ScopestateError, outcomes: list[Any]) -> None:
        """There is no connection: fail what waits, into `outcomes`."""


class Desk:
    """Asks passengers and tells them; a bug in one of them is logged, and does not stop the others.

    Used by whoever drives the link, but for `ready` and `refuse_late`, which anybody may use.
    """

    def __init__(self, deliver: Callable[[list[Any]], None]) -> None:
        """`deliver` takes the outcomes that passengers leave, many at once."""
        self.ready: Inbox[Passenger | None] = Inbox()
        """Who has come. Anybody may put a passenger; None only wakes the link's thread."""
        self.outcomes: list[Any] = []
        """What passengers have left since `hand_out`."""
        self._deliver = deliver

    def collect(self, boarding: deque[Passenger]) -> None:
        """Move who has come to `boarding`."""
        ready = self.ready
        try:
            while not ready.empty():
                passenger = ready.get_nowait()
                if passenger is not None:
                    boarding.append(passenger)
        except Empty:
            log.debug("a command that came too late has been refused already")

    def refuse_late(self, error: ScopestateError) -> None:
        """Refuse who has come while the link ended, or later: on any thread, and each of them once."""
        late, boarding = Desk(self._deliver), deque[Passenger]()
        self.collect(boarding)
        for passenger in boarding:
            late.refuse(passenger, error)
        late.hand_out()
        self.ready.put(None)  # for the link's thread, in case that has been taken from it

    def board(self, passenger: Passenger) -> Flight | None:
        """Ask for the passenger's command."""
        try:
            return passenger.board(self.outcomes)
        except Exception:
            log.exception("a scope failed to say what it wants of Redis")
            return None

    def tell(self, flight: Flight) -> None:
        """Tell that reply or error is there."""
        try:
            flight.arrive(self.outcomes)
        except Exception:
            log.exception("a scope failed to take in what Redis answered")

    def refuse(self, passenger: Passenger, error: ScopestateError) -> None:
        """Tell that nothing will be sent."""
        try:
            passenger.refuse(error, self.outcomes)
        except Exception:
            log.exception("a scope failed to take in that there is no connection to Redis")

    def hand_out(self) -> None:
        """Deliver what the passengers left, if anything, each event loop being woken one time only."""
        if not self.outcomes:
            return
        outcomes, self.outcomes = self.outcomes, []
        try:
            self._deliver(outcomes)
        except Exception:
            log.exception("answers from Redis could not be delivered")
