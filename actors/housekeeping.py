"""The actor that lets scopes leave memory when nobody has touched them for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.containment import Log
from scopestate.actors.control import Passivate
from scopestate.actors.dispatcher import weakly
from scopestate.actors.scope import ScopeActor
from scopestate.actors.turn import TurnActor

if TYPE_CHECKING:
    from scopestate.actors.directory import Directory
    from scopestate.actors.dispatcher import Dispatcher, Timer
    from scopestate.actors.limits import Limits

log = Log("scopestate.scope")

SLICE: Final = 500
"""Scopes looked at in one turn: about a millisecond, so that 100,000 of them hold nobody up."""


class Sweep(msgspec.Struct, frozen=True):
    """It is time to look at every scope. Answer: None; the rounds of `Slice` that follow do the work."""


class Slice(msgspec.Struct, frozen=True):
    """Look at the next scopes of the sweep that is under way."""


class Housekeeper(TurnActor):
    """Passivates idle scopes (docs/design/0003-turns.md).

    Every half of `passivate_after_s` it looks at each scope in memory: one that was touched since the last look is
    marked, one that was not is asked to leave. So a scope leaves between half of that time and all of it after the last
    call. It stays if something of it is not saved, if somebody is at it, or if it is never saved and was ever written.
    Time is the dispatcher's; turns run on its threads.
    """

    def __init__(self, dispatcher: Dispatcher, directory: Directory, limits: Limits) -> None:
        super().__init__(dispatcher)
        self._directory = directory
        self._limits = limits
        self._timer: Timer | None = None
        self._left: list[ScopeActor] = []
        self._ended = False
        self.passivated = 0
        """Scopes that have left memory so far."""

    def arm(self) -> None:
        """Begin to sweep, or go by a new `passivate_after_s` from now on. From any thread."""
        if self._timer is not None:
            self._timer.cancel()
        after_s = self._limits.passivate_after_s
        if self._ended or after_s <= 0:
            return
        self._timer = self._dispatcher.call_later(after_s / 2, weakly(self._ring))

    def _ring(self) -> None:
        self.tell(Sweep())

    def end(self) -> None:
        """Sweep no more. From any thread, idempotent."""
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
            # Never waits: a busy scope is not idle.
            elif actor.run(Passivate(), False):
                self.passivated += 1
        if self._ended:
            return
        if left:
            self.tell(Slice())
        else:
            self.arm()
