"""What an adapter promises to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec


class ScopeState(msgspec.Struct):
    """One scope as it was saved."""

    values: dict[str, bytes]
    """key -> value as JSON bytes, in first-insertion order."""
    sequence: int
    """The number of the last write saved; 0 for a scope that was never saved. It never goes back."""


class ScopeChange(msgspec.Struct):
    """What changed in one scope since its last save; the newest content only."""

    scope: str
    sequence: int
    """The number of the last write that `values` includes."""
    values: dict[str, bytes | None]
    """key -> new JSON bytes, or None for a deleted key."""
    positions: dict[str, int]
    """Rank of each key created since the last save (the number of the write that created it).

    A key of `values` that is not here keeps the rank it has in the store.
    """


class Adapter(Protocol):
    """Keeps scopes. Every method may be called from any thread.

    `load` and `scopes` may run beside each other and beside `save`; `save` runs in one thread at a time.
    Library errors never escape: each method raises `StorageError` or a subclass.
    """

    keeps: bool
    """False if nothing is kept: then the engine neither collects changes nor forgets idle scopes."""

    def load(self, scope: str) -> ScopeState:
        """Return what was saved for `scope`, in insertion order; empty with sequence 0 if it was never saved."""

    def scopes(self) -> list[str]:
        """Return the names of the scopes that hold at least one saved key, in no particular order."""

    def save(self, batch: Sequence[ScopeChange]) -> None:
        """Write the batch in order, as one transaction.

        On return every change survives power loss; on raise none of them was written. A scope may occur more than
        once; the later change is the newer one.
        """

    def close(self) -> None:
        """Release the store. Idempotent."""
