"""The actor that passivates scopes which have not been used for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.containment import Log
from scopestate.actors.dispatcher import weakly
from scopestate.actors.scope import Passivate, ScopeActor
from scopestate.actors.turn import TurnActor

if TYPE_CHECKING:
    from scopestate.actors.directory import Directory
    from scopestate.actors.dispatcher import Dispatcher, Timer
    from scopestate.actors.limits import Limits

log = Log("scopestate.scope")

SLICE: Final = 500
"""Scopes checked in one turn. That takes about a millisecond, so that 100,000 scopes delay no other work."""


class Sweep(msgspec.Struct, frozen=True):
    """Begin to check every scope. Answer: None; `Slice` messages that follow do the work."""


class Slice(msgspec.Struct, frozen=True):
    """Check the next scopes of the running sweep."""


class Housekeeper(TurnActor):
    """Passivates idle scopes (docs/design/0003-turns.md).

    Every half of `passivate_after_s` it checks each scope in memory: one that was used since the last check is marked,
    one that was not is asked to leave. So a scope leaves after between half and all of that time without a call. It
    stays while it has unsaved changes or is busy, and for good if it is never saved and has been written to. Time is
    that of the dispatcher.
    """

    def __init__(self, dispatcher: Dispatcher, directory: Directory, limits: Limits) -> None:
        super().__init__(dispatcher)
        self._directory = directory
        self._limits = limits
        self._timer: Timer | None = None
        self._left: list[ScopeActor] = []
        self._ended = False
        self.passivated = 0
        """Number of scopes passivated so far."""

    def arm(self) -> None:
        """Start sweeping, or apply a new `passivate_after_s`. From any thread."""
        if self._timer is not None:
            self._timer.cancel()
        after_s = self._limits.passivate_after_s
        if self._ended or after_s <= 0:
            return
        self._timer = self._dispatcher.call_later(after_s / 2, weakly(self._ring))

    def _ring(self) -> None:
        self.tell(Sweep())

    def end(self) -> None:
        """Stop sweeping. From any thread, idempotent."""
        self._ended = True
        self._left = []
        if self._timer is not None:
            self._timer.cancel()

    def on_receive(self, message: Any) -> Any:
        match message:
            case Sweep():
                self._left = list(self._directory.values())
                self._next_slice()
            case Slice():
                self._next_slice()
            case _:
                raise TypeError(f"the housekeeper does not understand {message!r:.80}")

    def _next_slice(self) -> None:
        left = self._left
        actors = left[-SLICE:]
        del left[-SLICE:]
        for actor in actors:
            if actor.touched:
                actor.touched = False
            # Does not wait: a busy scope is not idle.
            elif actor.housekeep_now(Passivate()) is True:
                self.passivated += 1
        if self._ended:
            return
        if left:
            self.tell(Slice())
        else:
            self.arm()
