"""A handle on one scope."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pykka

from scopestate.ops.results import SetResult, UpdateResult

if TYPE_CHECKING:
    from scopestate.actors.scope import ScopeActor
    from scopestate.engine import Engine


class Scope:
    """One scope of an engine. It has no state of its own, so it may be kept and shared."""

    def __init__(self, engine: Engine, scope: str) -> None:
        self._engine = engine
        self.name = scope

    def set(self, key: str, value: object) -> SetResult:
        """As `Engine.set` on this scope."""
        return self._engine.set(self.name, key, value)

    def get(self, key: str, default: Any = None) -> Any:
        """As `Engine.get` on this scope."""
        return self._engine.get(self.name, key, default)

    def delete(self, key: str) -> Any:
        """As `Engine.delete` on this scope."""
        return self._engine.delete(self.name, key)

    def update(self, key: str, ops: Iterable[object]) -> UpdateResult:
        """As `Engine.update` on this scope."""
        return self._engine.update(self.name, key, ops)

    def list(self) -> list[Any]:
        """As `Engine.list` on this scope."""
        return self._engine.list(self.name)

    @property
    def actor_ref(self) -> pykka.ActorRef[ScopeActor]:
        """The Pykka ref of the scope's current actor, for the messages in `scopestate.messages`.

        After passivation the scope has a new actor; the old ref passes messages on to it.
        """
        ref: pykka.ActorRef[ScopeActor] = self._engine._scopes[self.name].actor_ref
        return ref

    def __repr__(self) -> str:
        return f"<Scope {self.name!r}>"
