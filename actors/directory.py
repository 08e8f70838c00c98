"""Where the scopes of an engine are found."""

from __future__ import annotations

from collections.abc import Callable

from scopestate.actors.scope import ScopeActor, checked_name, event_depth


class Directory(dict[str, ScopeActor]):
    """Scope name -> its actor. Looking up a scope that is not in memory makes its actor.

    Thread rules: look-ups and `setdefault` are single dict operations; of two threads that make the same actor at once,
    one wins and both get the winner.
    """

    def __init__(self, make: Callable[[str], ScopeActor]) -> None:
        super().__init__()
        self._make = make
        self._refusal: Callable[[], Exception] | None = None
        self._handlers_may = False

    def __missing__(self, scope: object) -> ScopeActor:
        if self._refusal is not None and not (self._handlers_may and event_depth.get()):
            raise self._refusal()
        name = checked_name("scope", scope)
        return self.setdefault(name, self._make(name))

    def refuse(self, refusal: Callable[[], Exception], *, handlers_may: bool = False) -> None:
        """Make no more actors: raise `refusal()` instead. `handlers_may`: code that runs in handlers still gets them."""
        self._handlers_may = handlers_may
        self._refusal = refusal
