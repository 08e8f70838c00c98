"""The adapter that keeps nothing: state lives in the engine's memory and ends with it."""

from __future__ import annotations

from collections.abc import Sequence

from scopestate.actors.ports import ScopeChange, ScopeState


class MemoryAdapter:
    """Keeps nothing (`store_method: in_memory`). The engine sees `keeps` and never collects changes for it."""

    keeps = False

    def load(self, scope: str) -> ScopeState:
        """Return an empty scope with sequence 0."""
        return ScopeState(values={}, sequence=0)

    def scopes(self) -> list[str]:
        """Return an empty list: no scope holds a saved key."""
        return []

    def save(self, batch: Sequence[ScopeChange]) -> None:
        """Accept the batch and forget it."""

    def close(self) -> None:
        """Nothing to release."""
