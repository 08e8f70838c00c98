"""The scopes of an engine that are in memory: how they are found, and when they leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.dispatcher import weakly
from scopestate.actors.scope import Passivate, ScopeActor
from scopestate.actors.turn import TurnActor
from scopestate.ops.turns import checked_name
from scopestate.signals import Guard, exclusive
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.actors.backlog import Limits
    from scopestate.actors.dispatcher import Dispatcher, Timer

SLICE: Final = 500
"""Scopes checked in one turn. That takes about a millisecond, so that 100,000 scopes delay no other work."""


class Directory(dict[str, ScopeActor]):
    """Scope name -> its actor. Looking up a scope that is not in memory makes its actor.

    Thread rules: a look-up is a single dict operation. Making an actor and letting one go exclude each other: an actor
    gets its table of triggers from the router, which forgets the table when the scope leaves memory.
    """

    def __init__(self, make: Callable[[str], ScopeActor]) -> None:
        super().__init__()
        self._make = make
        self._exclusive = Guard()
        self._refusal: Callable[[], Exception] | None = None
        self._handlers_may = False

    def __missing__(self, scope: object) -> ScopeActor:
        name = checked_name("scope", scope)
        return self._exclusive.run(self._find_or_make, name)

    def _find_or_make(self, name: str) -> ScopeActor:
        if self._refusal is not None and not (self._handlers_may and event_depth.get()):
            raise self._refusal()
        return self.get(name) or self.setdefault(name, self._make(name))

    @exclusive
    def let_go(self, actor: ScopeActor, forget: Callable[[str], object]) -> bool:
        """Remove `actor`, calling `forget(scope)` before its successor can be made. False: it was not there."""
        if self.get(actor.scope) is not actor:
            return False
        forget(actor.scope)
        del self[actor.scope]
        return True

    @exclusive
    def exclusively(self, action: Callable[[], object]) -> None:
        """Call `action`, which is quick, while no actor is made."""
        action()

    @exclusive
    def replace(self, actor: ScopeActor) -> ScopeActor | None:
        """Replace an actor by a new one, to which it hands over, and return the new one. None: it was not there."""
        if self.get(actor.scope) is not actor:
            return None
        successor = self._make(actor.scope)
        actor.hand_over(successor)
        self[actor.scope] = successor
        return successor

    @exclusive
    def each(self, action: Callable[[ScopeActor], object]) -> None:
        """Call `action`, which is quick, for each actor, while none is made."""
        for actor in list(self.values()):
            action(actor)

    @exclusive
    def refuse(self, refusal: Callable[[], Exception], *, handlers_may: bool = False) -> None:
        """Make no more actors: raise `refusal()` instead. `handlers_may`: code that runs in handlers still gets them.

        On return every actor that was made is in the directory, where a closing engine finds it.
        """
        self._handlers_may = handlers_may
        self._refusal = refusal

    def disown(self, refusal: Callable[[], Exception]) -> None:
        """In a forked child: forget every actor, and refuse. The guard may be held by a thread that is not here."""
        self._exclusive = Guard()
        for actor in list(self.values()):
            actor.disown(refusal)
        self.clear()
        self.refuse(refusal)


class Sweep(msgspec.Struct, frozen=True):
    """Begin to check every scope. Answer: None; `Slice` messages that follow do the work."""


class Slice(msgspec.Struct, frozen=True):
    """Check the next scopes of the running sweep."""


class Housekeeper(TurnActor):
    """Passivates idle scopes (docs/design/0003-turns.md).

    Every half of `passivate_after_s` it checks each scope in memory: a scope that was used since the last check is
    marked, any other is asked to leave. So a scope leaves after between half and all of that time without a call. It
    stays while it has unsaved changes or is busy, and permanently if it is never saved and has been written to. Time is
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
            actor.forget_unused()
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
