"""Scopes in the memory of this engine: saved into a store, or kept nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from scopestate.actors.commit import CommitScopeActor
from scopestate.actors.ports import Backend, Store
from scopestate.actors.scope import ScopeActor, Surroundings

Durability = Literal["memory", "interval", "commit"]
"""How long a write lasts: as long as the engine, from the next save on, or from its acknowledgement on."""


class LocalBackend(Backend):
    """Scopes that this engine alone reads and writes."""

    def __init__(self, store: Store | None, durability_of: Callable[[str], Durability]) -> None:
        """`store` None: nothing is kept. `durability_of` says for each scope how long its writes last."""
        self.store = store
        self.keeps = store is not None
        self._durability_of = durability_of
        if store is not None:
            self.largest_value = store.largest_value
            self.longest_name = store.longest_name

    def make_scope(self, scope: str, around: Surroundings) -> ScopeActor:
        """Return a new actor for `scope`."""
        if self.store is None:
            return ScopeActor(scope, around, keeps=False)
        durability = self._durability_of(scope)
        if durability == "commit":
            return CommitScopeActor(scope, around, keeps=True)
        return ScopeActor(scope, around, keeps=durability != "memory")

    def scopes(self) -> list[str]:
        """Return the names of the scopes that have a saved key.

        A scope whose writes last in memory only is not among them: what the store has of it is from before the rule.
        """
        if self.store is None:
            return []
        return [scope for scope in self.store.scopes() if self._durability_of(scope) != "memory"]

    def problem(self) -> str | None:
        """Return what is wrong with the store; None if all is well."""
        return None if self.store is None else self.store.problem()

    def close(self) -> None:
        """Release the store. Idempotent."""
        if self.store is not None:
            self.store.close()
