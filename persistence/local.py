"""Scopes in the memory of this engine, saved in a store or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Literal

from scopestate.actors.keyed import KeyedScope
from scopestate.actors.local import LocalScope
from scopestate.actors.ports import Backend, Durability, Mistake, Options, Store, Wait
from scopestate.actors.scope import ScopeActor, Surroundings
from scopestate.paths import expand_home


class KvOptions(Options, frozen=True):
    """`adapter: {name: kv, config: ...}`."""

    store_method: Literal["in_memory", "file_based"] = "in_memory"
    """`in_memory`: nothing is saved. `file_based`: saved in the directory `file_path`. A reload does not change it."""
    file_path: str = "kv_store_data.db"
    """The directory of a file_based store, despite the suffix that iii gives it. A reload does not change it."""
    save_interval_ms: Wait = 5000
    """Milliseconds between saves. With `durability: interval` a crash loses what was written in the last interval and
    while its save ran. A reload applies at once."""
    durability: Literal["interval", "commit"] = "interval"
    """`interval`: a write is acknowledged from memory. `commit`: when it is on disk. A reload does not change it."""

    share: Literal["auto", "never"] | None = None
    """For a file_based store. `auto`: several processes may use the directory: the first one opens it and serves the
    others, and when it ends, another takes its place; needs the extra `wire`. `never`: a second engine is refused. If
    left out, `auto`. A reload does not change it."""
    connect_wait_ms: Wait = 5_000
    """In a process that shares a directory: how long a call waits for another process to become the owner after the
    previous one has ended. A reload does not change it."""

    @property
    def shares(self) -> bool:
        """Whether other processes may use the directory too."""
        return self.share != "never"

    def mistakes(self) -> Iterator[Mistake]:
        """Yield the mistakes that the types do not show."""
        if self.share is not None and self.store_method != "file_based":
            yield Mistake(
                "share",
                "only a directory can be shared: with `store_method: in_memory` each process has a state of its own. "
                "Write `store_method: file_based`, or leave `share` out",
            )

    def described(self) -> str:
        """Describe where the state is kept."""
        if self.store_method == "in_memory":
            return "in memory: lost when this process ends"
        when = "on each write" if self.durability == "commit" else f"every {self.save_interval_ms} ms"
        return f"{os.path.realpath(expand_home(self.file_path))}, saved {when}"


class LocalBackend(Backend):
    """Scopes that this engine alone reads and writes."""

    def __init__(self, store: Store | None, durability_of: Callable[[str], Durability]) -> None:
        """`store` None: nothing is saved. `durability_of` returns the durability of a scope."""
        self.store = store
        self.keeps = store is not None
        self._durability_of = durability_of
        if store is not None:
            self.largest_value = store.largest_value
            self.longest_name = store.longest_name

    def make_scope(self, scope: str, around: Surroundings) -> ScopeActor:
        """Return a new actor for `scope`."""
        durability = self.durability(scope)
        gated, stored = durability == "commit", None if self.store is None else self.store.stored
        if durability == "memory" or stored is None:
            return LocalScope(scope, around, keeps=durability != "memory", gated=gated)
        return KeyedScope(scope, around, stored, gated=gated)

    def durability(self, scope: str) -> Durability:
        """Return when the writes of a scope are saved."""
        return "memory" if self.store is None else self._durability_of(scope)

    def scopes(self) -> list[str]:
        """Return the names of the scopes that have a saved key.

        Scopes with durability `memory` are left out: what the store has of them is older than that rule.
        """
        if self.store is None:
            return []
        return [scope for scope in self.store.scopes() if self._durability_of(scope) != "memory"]

    def problem(self) -> str | None:
        """Return what is wrong with the store, as text; None if all is well."""
        return None if self.store is None else self.store.problem()

    def close(self) -> None:
        """Release the store. Idempotent."""
        if self.store is not None:
            self.store.close()
