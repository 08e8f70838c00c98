"""Where the scopes of an engine are found."""

from __future__ import annotations

from collections.abc import Callable

from scopestate.actors.scope import ScopeActor
from scopestate.ops.turns import checked_name
from scopestate.signals import Guard, exclusive
from scopestate.wire.depth import event_depth


class Directory(dict[str, ScopeActor]):
    """Scope name -> its actor. Looking up a scope that is not in memory makes its actor.

    Thread rules: a look-up is a single dict operation. Making an actor and letting one go exclude each other: an actor
    takes its table of triggers along from the router, which forgets the table when the scope leaves memory.
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
