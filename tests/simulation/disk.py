"""The disk under a simulated engine: what is durable, how slow it is, and how it fails."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.ports import ANSWER_BYTES_OF_A_SCOPE, ANSWERS_KEPT_MS, ANSWERS_OF_A_SCOPE
from scopestate.errors import StorageError
from scopestate.persistence import Answer, FileAdapter, Row, ScopeChange, ScopeState, Store
from tests.simulation.model import Items, Model, Violation
from tests.stored import values_of


class Stored(msgspec.Struct):
    """One scope on the disk."""

    rows: dict[int, tuple[str, Row]]
    """The number of the write that created a key -> the key, and what is saved of it."""
    revision: int = 0
    due_ms: int | None = None
    answers: dict[str, Answer] = {}

    def items(self) -> Items:
        """Keys and values in order of their creation."""
        return tuple((key, entry.json) for _, (key, entry) in sorted(self.rows.items()))

    def entries(self) -> dict[str, Row]:
        """Keys and entries in that order."""
        return {key: entry for _, (key, entry) in sorted(self.rows.items())}

    def check_due(self, scope: str) -> None:
        """Check that the scope will be looked at in time, even if it leaves memory now."""
        first = min((row.expires_ms for _, row in self.rows.values() if row.expires_ms is not None), default=None)
        if first is not None and (self.due_ms is None or self.due_ms > first):
            raise Violation(f"{scope}: a key expires at {first}, but the scope is noted as due at {self.due_ms}")

    def check_answers(self, scope: str) -> None:
        """Check that the kept answers are bounded."""
        size = sum(len(answer.answer) for answer in self.answers.values())
        if len(self.answers) > ANSWERS_OF_A_SCOPE or (len(self.answers) > 1 and size > ANSWER_BYTES_OF_A_SCOPE):
            raise Violation(f"{scope}: {len(self.answers)} answers of {size} bytes are kept")


class Disk:
    """Outlives the engines that write to it. With `path`, a real store beside the model has to agree with it."""

    def __init__(self, path: str | None = None) -> None:
        self.stored: dict[str, Stored] = {}
        self.path = path
        self.failing_saves = 0
        """How many of the next saves fail."""
        self.failing_loads = 0
        self.slow_s = self.slowest_s = 0.0
        """How long a save takes now, and the longest so far, in virtual seconds."""
        self.saves = self.failed = 0
        self.clock_ms = 0
        """The time of the last save."""

    def heal(self) -> None:
        """Work from now on."""
        self.failing_saves = self.failing_loads = 0

    def sequence(self, scope: str) -> int:
        """Number of the last write of `scope` that is durable."""
        stored = self.stored.get(scope)
        return 0 if stored is None else stored.revision

    def items(self, scope: str) -> Items:
        """The durable values of `scope`, in order."""
        stored = self.stored.get(scope)
        return () if stored is None else stored.items()

    def write(self, change: ScopeChange) -> None:
        """Make one change durable, as the contract of adapters says."""
        stored = self.stored.setdefault(change.scope, Stored({}))
        if change.revision < stored.revision:
            raise Violation(f"{change.scope}: write {change.revision} is saved over the newer write {stored.revision}")
        stored.revision, stored.due_ms = change.revision, change.due_ms
        for token, answer in change.answers.items():
            stored.answers.pop(token, None)
            if answer is not None:
                stored.answers[token] = answer
        stored.check_answers(change.scope)
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
        stored.check_due(change.scope)

    def note_time(self, now_ms: int) -> None:
        """Note the time of a save, which removes the answers that are too old."""
        if now_ms < self.clock_ms:
            raise Violation(f"the time of a save, {now_ms}, is before that of an earlier one, {self.clock_ms}")
        self.clock_ms = now_ms
        for stored in self.stored.values():
            for token in [
                token for token, answer in stored.answers.items() if answer.time_ms + ANSWERS_KEPT_MS <= now_ms
            ]:
                del stored.answers[token]

    def answers(self, scope: str) -> dict[str, Answer]:
        """The kept answers of `scope`, the oldest first."""
        stored = self.stored.get(scope)
        return {} if stored is None else dict(stored.answers)

    def due(self) -> list[tuple[int, str]]:
        """When each scope with deadlines must be looked at, the earliest first."""
        return sorted((stored.due_ms, scope) for scope, stored in self.stored.items() if stored.due_ms is not None)


class DiskAdapter(Store):
    """The disk as one engine sees it; useless once that engine has crashed."""

    def __init__(self, disk: Disk, dispatcher: DeterministicDispatcher, model: Model) -> None:
        self._disk = disk
        self._dispatcher = dispatcher
        self.model = model
        self._real: FileAdapter | None = None if disk.path is None else FileAdapter(disk.path)
        self.clock_ms = disk.clock_ms
        self.id = "simulated"
        self.crashed = False

    def load(self, scope: str) -> ScopeState:
        """Load a scope, and check it against the model: if they differ, a write is lost."""
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
                stored = disk.stored.get(scope)
                if stored is not None and (state.entries, state.answers) != (stored.entries(), stored.answers):
                    raise Violation(f"{scope}: the store holds {state}, saved was {stored}")
            self.model.check_load(scope, items, sequence)
        self._dispatcher.give_way()
        stored = disk.stored.get(scope)
        return ScopeState.of({} if stored is None else stored.entries(), sequence, disk.answers(scope))

    def scopes(self) -> list[str]:
        """Names of the scopes that hold a saved key."""
        return [scope for scope, stored in self._disk.stored.items() if stored.rows]

    def due(self, limit: int) -> list[tuple[int, str]]:
        """Up to `limit` scopes with the time at which their first key expires."""
        return self._disk.due()[:limit]

    def save(self, batch: Sequence[ScopeChange]) -> None:
        """Save all or nothing; callers continue in the meantime."""
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
            self._real.clock_ms = self.clock_ms
            self._real.save(batch)
        disk.saves += 1
        with self.model.watching():
            disk.note_time(self.clock_ms)
            for change in batch:
                disk.write(change)
                self.model.check_saved(change.scope, disk.items(change.scope), disk.sequence(change.scope))
        self._dispatcher.give_way()

    def close(self) -> None:
        """Release the store."""
        if self._real is not None:
            self._real.close()
