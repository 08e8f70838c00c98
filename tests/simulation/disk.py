"""The disk under a simulated engine: what is durable, how slow it is, and how it fails."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from stored import values_of

from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.errors import StorageError
from scopestate.persistence import FileAdapter, Row, ScopeChange, ScopeState, Store
from tests.simulation.model import Items, Model, Violation


class Stored(msgspec.Struct):
    """One scope on the disk."""

    rows: dict[int, tuple[str, Row]]
    """The number of the write that created a key -> the key, and what is saved of it."""
    revision: int = 0

    def items(self) -> Items:
        """Keys and values in order of their creation."""
        return tuple((key, entry.json) for _, (key, entry) in sorted(self.rows.items()))

    def entries(self) -> dict[str, Row]:
        """Keys and entries in that order."""
        return {key: entry for _, (key, entry) in sorted(self.rows.items())}


class Disk:
    """Outlives the engines that write to it. With `path`, a real store beside the model has to agree with it."""

    def __init__(self, path: str | None = None) -> None:
        self.stored: dict[str, Stored] = {}
        self.path = path
        self.failing_saves = 0
        """So many of the next saves fail."""
        self.failing_loads = 0
        self.slow_s = self.slowest_s = 0.0
        """How long a save takes, in virtual seconds, now and at most so far."""
        self.saves = self.failed = 0

    def heal(self) -> None:
        """Work from now on."""
        self.failing_saves = self.failing_loads = 0

    def sequence(self, scope: str) -> int:
        """Number of the last write of `scope` that is durable."""
        stored = self.stored.get(scope)
        return 0 if stored is None else stored.revision

    def items(self, scope: str) -> Items:
        """What is durable of `scope`, in order."""
        stored = self.stored.get(scope)
        return () if stored is None else stored.items()

    def write(self, change: ScopeChange) -> None:
        """Make one change durable, by the adapter's contract."""
        stored = self.stored.setdefault(change.scope, Stored({}))
        if change.revision < stored.revision:
            raise Violation(f"{change.scope}: write {change.revision} is saved over the newer write {stored.revision}")
        stored.revision = change.revision
        for created in change.removed:
            stored.rows.pop(created, None)
        for key, entry in change.entries.items():
            if entry is None:
                continue
            before = stored.rows.get(entry.created)
            if before is not None and before[0] != key:
                raise Violation(f"{change.scope}: key {key!r} is saved over the key {before[0]!r}")
            stored.rows[entry.created] = key, entry
        if len(stored.entries()) != len(stored.rows):
            raise Violation(f"{change.scope}: a key is saved twice")
        for key, entry in change.entries.items():
            if entry is None and key in stored.entries():
                raise Violation(f"{change.scope}: the deleted key {key!r} is still saved")


class DiskAdapter(Store):
    """The disk as one engine sees it; useless once that engine has crashed."""

    def __init__(self, disk: Disk, dispatcher: DeterministicDispatcher, model: Model) -> None:
        self._disk = disk
        self._dispatcher = dispatcher
        self.model = model
        self._real: FileAdapter | None = None if disk.path is None else FileAdapter(disk.path)
        self.crashed = False

    def load(self, scope: str) -> ScopeState:
        """Load a scope; it must be what the model says, or somebody's write is gone."""
        self._dispatcher.give_way()
        disk = self._disk
        if self.crashed or disk.failing_loads > 0:
            disk.failing_loads -= 1
            self.model.note_failed_load()
            raise StorageError("the simulated disk cannot be read")
        items, sequence = disk.items(scope), disk.sequence(scope)
        with self.model.watching():
            if self._real is not None:
                state = self._real.load(scope)
                if (tuple(values_of(state).items()), state.revision) != (items, sequence):
                    raise Violation(f"{scope}: the store holds {state}, saved was {items} at {sequence}")
            self.model.check_load(scope, items, sequence)
        self._dispatcher.give_way()
        stored = disk.stored.get(scope)
        return ScopeState({} if stored is None else stored.entries(), sequence)

    def scopes(self) -> list[str]:
        """Names of the scopes that hold a saved key."""
        return [scope for scope, stored in self._disk.stored.items() if stored.rows]

    def save(self, batch: Sequence[ScopeChange]) -> None:
        """Save all or nothing; callers go on meanwhile."""
        disk = self._disk
        self._dispatcher.give_way()
        if disk.slow_s:
            self._dispatcher.sleep(disk.slow_s)
        if self.crashed or disk.failing_saves > 0:
            disk.failing_saves -= 1
            disk.failed += 1
            self.model.note_failed_save()
            self._dispatcher.give_way()
            raise StorageError("the simulated disk is full")
        if self._real is not None:
            self._real.save(batch)
        disk.saves += 1
        with self.model.watching():
            for change in batch:
                disk.write(change)
                self.model.check_saved(change.scope, disk.items(change.scope), disk.sequence(change.scope))
        self._dispatcher.give_way()

    def close(self) -> None:
        """Release the store."""
        if self._real is not None:
            self._real.close()
