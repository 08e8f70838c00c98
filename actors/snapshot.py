"""The actor that saves: what is dirty every interval, and what waits for a commit at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.containment import Log, described, is_from_outside
from scopestate.actors.dispatcher import weakly
from scopestate.actors.gate import Batch, Outcome, TakeBatch
from scopestate.actors.ports import ScopeChange, Store
from scopestate.actors.reply import deliver
from scopestate.actors.scope import Collect
from scopestate.actors.turn import TurnActor, arranging, is_arranging
from scopestate.errors import StorageError, UnsavableValue
from scopestate.ops.values import class_name
from scopestate.signals import certainly

if TYPE_CHECKING:
    from scopestate.actors.dispatcher import Dispatcher, Timer
    from scopestate.actors.local import LocalScope

log = Log("scopestate.persistence")

LONGEST_BACKOFF_S: Final = 30.0
SOONEST_OVERDUE_S: Final = 0.2
"""A save that is less late than this is not called overdue, however short the interval: a busy machine is enough."""


class Tick(msgspec.Struct, frozen=True):
    """The interval is over: save what is dirty."""


class Commit(msgspec.Struct, frozen=True):
    """Some scope has writes that wait for their commit."""


class Flush(msgspec.Struct, frozen=True):
    """Save everything now. Answer: None once it is on disk; raises StorageError if it cannot be saved."""


class SnapshotActor(TurnActor):
    """Writes changes to the store, one transaction at a time. Without a store there is never anything to write.

    A save that fails keeps its batch, in front of what is newer; it is tried again, with growing pauses, until it is on
    disk, and `failing` says why meanwhile. Nothing is dropped and nothing newer is overwritten by something older.
    Scopes with commit durability are saved as soon as one of them has written: every write that came meanwhile shares
    the next transaction (docs/design/0006-durability.md).
    """

    def __init__(self, dispatcher: Dispatcher, store: Store | None, interval_s: float) -> None:
        super().__init__(dispatcher)
        self._store = store
        self._interval_s = interval_s
        self._timer: Timer | None = None
        self._began_s = 0.0
        self._fresh_s: float | None = None
        self._backlog: dict[str, tuple[LocalScope, ScopeChange]] = {}
        self._failures = 0
        self._commit_asked = False
        self._stopped = False
        self.dirty: dict[str, LocalScope] = {}
        """Scope name -> actor, for scopes with changes that the next save will take. Written within scopes' turns."""
        self.committing: dict[str, LocalScope] = {}
        """The same for scopes whose callers wait for the commit."""
        self.failing: StorageError | None = None
        """Why the last save failed; None if it worked."""
        self.unsavable: dict[tuple[str, str], str] = {}
        """(scope, key) -> why the store cannot hold its value, for what is in memory only."""
        self.saves = self.saved_keys = self.failed_saves = 0
        self.last_save_s = 0.0
        """How long the last successful save took, in seconds."""

    def waiting_scopes(self) -> int:
        """Scopes with changes that are not on disk."""
        return len(self.dirty.keys() | self._backlog.keys())

    def has_open_commits(self) -> bool:
        """True if a commit is under way or on its way: then it may hold events back."""
        return bool(self.committing or self._commit_asked or self._claim)

    # ---------------------------------------------------------------------------------------------------- timing

    def start_interval(self) -> None:
        """Begin to save every interval."""
        if self._store is not None and not self._stopped:
            self._began_s = self._fresh_s = self._dispatcher.monotonic()
            self._arm(self._interval_s)

    def set_interval(self, interval_s: float) -> None:
        """Change the interval, the one that runs now included. From any thread."""
        self._interval_s = interval_s
        if self._store is not None and not self._stopped:
            now_s = self._dispatcher.monotonic()
            # From the last save on, not from now: else what is dirty would wait for parts of both intervals.
            self._arm(max(self._began_s + interval_s - now_s, 0.001))
            if self._fresh_s is not None:
                self._fresh_s = max(self._fresh_s, now_s - interval_s)  # due now: not late by the shorter interval

    def stop_interval(self) -> None:
        """Save no more by itself; `Flush` still does."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def overdue_s(self) -> float:
        """Return how many seconds ago the save by interval that is overdue was due; 0.0 if none is. From any thread.

        Overdue is one that has not ended two intervals after it was due, whatever the reason: a timer that does not
        ring, no thread for it, a disk that hangs. So this looks at the clock, and rests on none of them.
        """
        if self._fresh_s is None or self._stopped:
            return 0.0
        interval_s = self._interval_s
        late_s = self._dispatcher.monotonic() - self._fresh_s - interval_s
        return late_s if late_s > max(2 * interval_s, SOONEST_OVERDUE_S) else 0.0

    def _arm(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._dispatcher.call_later(delay_s, weakly(self._ring))

    def _ring(self) -> None:
        self.tell(Tick())

    def commit_soon(self) -> None:
        """See that a commit comes. Called within a scope's turn, so that it is cheap once one is on its way."""
        if not self._commit_asked or is_arranging():
            arranging(self._ask_for_commit)

    def commit_anyway(self) -> None:
        """As `commit_soon`, for when that was cut short. Once too often does no harm."""
        arranging(self._ask_for_commit)

    def _ask_for_commit(self) -> None:
        self._commit_asked = True
        self.tell(Commit())

    def refuse_in_turns(self) -> None:
        """Raise WouldDeadlock if this thread is in the middle of a turn that a save must wait for."""
        for table in (self.dirty, self.committing):
            for actor in list(table.values()):
                actor._refuse_own_turn()

    # ----------------------------------------------------------------------------------------------------- turns

    def on_receive(self, message: Any) -> Any:
        match message:
            case Commit():
                self._commit()
            case Tick():
                self._began_s = began = self._dispatcher.monotonic()
                try:
                    if self._save_quietly():
                        self._fresh_s = began
                finally:
                    if not self._stopped:
                        took_s = self._dispatcher.monotonic() - began
                        pause_s = self._interval_s - took_s if self.failing is None else self._backoff_s()
                        self._arm(max(pause_s, 0.001))
            case Flush():
                self._commit()
                self._save()
            case _:
                raise TypeError(f"a snapshot actor does not understand {message!r:.80}")

    def _backoff_s(self) -> float:
        return min(0.1 * 2.0 ** min(self._failures, 20), LONGEST_BACKOFF_S, max(self._interval_s, 0.1))

    def _save_quietly(self) -> bool:
        try:
            self._save()
        except StorageError:
            log.debug("save failed; it is tried again", exc_info=True)  # logged at ERROR where it began
            return False
        return True

    def _fail(self) -> None:
        """A bug in a turn: the log has it, and saving goes on."""
        log.error("a turn of the snapshot actor failed", exc_info=sys.exc_info()[1])

    def _save(self) -> None:
        """Save what is dirty, behind what earlier saves left. Raises StorageError, and keeps it all, on failure."""
        dirty = self.dirty
        for scope in list(dirty):
            # Out of the table before it is collected: a write that comes in between puts it in again.
            actor = dirty.pop(scope, None)
            if actor is None:
                continue
            try:
                change = actor.housekeep(Collect())
            except BaseException:
                certainly(lambda scope=scope, actor=actor: dirty.setdefault(scope, actor))  # type: ignore[misc]  # mypy cannot infer a default argument
                raise
            if change is None:
                continue
            _, waiting = self._backlog.get(scope, (actor, None))
            self._backlog[scope] = (actor, change if waiting is None else merged(waiting, change))
        if not self._backlog:
            return  # `failing` stays: that there is nothing to save does not mean that it could be saved
        began = time.perf_counter()
        while self._backlog:
            try:
                self._write([change for _, change in self._backlog.values()])
                break
            except UnsavableValue as error:
                self._leave_out(error)
        self.last_save_s = time.perf_counter() - began
        for scope, (actor, change) in self._backlog.items():
            self._note_saved(scope, actor, change.values)
            actor.saved(change.sequence)
        self._backlog.clear()

    def _leave_out(self, error: UnsavableValue) -> None:
        """Take out of the backlog what the store cannot hold, so that the rest is saved: it stays in memory only."""
        scope = error.scope
        if scope not in self._backlog:
            raise error
        actor, change = self._backlog[scope]
        keys = list(change.values) if error.key is None else [error.key]
        for key in keys:
            if self.unsavable.get((scope, key)) != str(error):
                log.error("not saved, and kept in memory only: %s", error)
                self.unsavable[scope, key] = str(error)
            change.values.pop(key)
            change.positions.pop(key, None)
        actor.pinned = True
        if error.key is None:
            del self._backlog[scope]
            actor.saved(change.sequence)

    def _note_saved(self, scope: str, actor: LocalScope, keys: Iterable[str]) -> None:
        """What was left out earlier and has another value now, or is deleted, is saved."""
        if not actor.pinned:
            return
        for key in keys:
            self.unsavable.pop((scope, key), None)
        actor.pinned = any(left == scope for left, _ in self.unsavable)

    def _commit(self) -> None:
        """Save the scopes that wait for their commit, and answer their callers."""
        self._commit_asked = False
        committing = self.committing
        batches: list[Batch] = []
        actor: LocalScope | None = None
        try:
            for scope in list(committing):
                actor = committing.pop(scope, None)
                if actor is not None:
                    batches.append(actor.housekeep(TakeBatch()))
            actor = None
            self._commit_batches(batches)
        except BaseException as problem:
            name = class_name(problem)
            certainly(lambda: self._break_off(actor, batches, name))
            raise

    @staticmethod
    def _settled(batch: Batch) -> Iterable[Outcome]:
        try:
            return batch.settle()
        except MemoryError:
            return batch.settle()  # it is on disk: its events must go out

    def _break_off(self, taking: LocalScope | None, batches: list[Batch], why: str) -> None:
        """A commit was cut short, as by a MemoryError: no caller may wait for an answer that will not come."""
        if taking is not None:
            self.committing.setdefault(taking.scope, taking)
        self.commit_anyway()
        error = StorageError(f"the commit broke off ({why}); it may have been written: read the key before retrying")
        for batch in batches:
            outcomes = batch.roll_back(error)
            deliver([outcome for outcome in outcomes if not getattr(outcome[0], "done", False)])

    def _commit_batches(self, batches: list[Batch]) -> None:
        try:
            if changes := [batch.change for batch in batches if batch.change is not None]:
                self._write(changes)
        except UnsavableValue as error:
            # That scope's callers alone are refused; the others are saved without it.
            refused = [batch for batch in batches if batch.actor.scope == error.scope] or batches
            deliver([outcome for batch in refused for outcome in batch.roll_back(error)])
            if others := [batch for batch in batches if batch not in refused]:
                self._commit_batches(others)
        except StorageError as error:
            deliver([outcome for batch in batches for outcome in batch.roll_back(error)])
        else:
            deliver([outcome for batch in batches for outcome in self._settled(batch)])

    def _write(self, changes: list[ScopeChange]) -> None:
        store = self._store
        assert store is not None  # only scopes that are kept hand over changes
        try:
            store.save(changes)
        except BaseException as problem:
            if is_from_outside(problem):
                raise
            # A store promises StorageError; whatever else one raises must not stop the saving for good either.
            error = (
                problem
                if isinstance(problem, StorageError)
                else StorageError(f"the store failed: {class_name(problem)}: {described(problem)}")
            )
            if isinstance(error, UnsavableValue):
                raise  # the store works
            self.failed_saves += 1
            self._failures += 1
            if self.failing is None or str(self.failing) != str(error):
                log.error("saving failed, the data stays in memory and is saved later: %s", error)  # noqa: TRY400 - it says all
            self.failing = error
            raise error from (None if error is problem else problem)
        self.saves += 1
        self.saved_keys += sum(len(change.values) for change in changes)
        self._note_success()

    def _note_success(self) -> None:
        if self.failing is not None:
            log.warning("saving works again after %d failed attempts", self._failures)
        self.failing = None
        self._failures = 0


def merged(older: ScopeChange, newer: ScopeChange) -> ScopeChange:
    """Return one change for two of one scope: while saving fails, memory grows with the keys, not with the tries."""
    values = {**older.values, **newer.values}
    positions = {key: rank for key, rank in older.positions.items() if values[key] is not None}
    return ScopeChange(newer.scope, newer.sequence, values, {**positions, **newer.positions})
