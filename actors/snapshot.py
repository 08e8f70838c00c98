"""The actor that saves: dirty scopes in each interval, and scopes that wait for a commit at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import msgspec

from scopestate.actors.containment import Log, described, is_from_outside
from scopestate.actors.dispatcher import weakly
from scopestate.actors.gate import Batch, Outcome, TakeBatch
from scopestate.actors.gathering import Gathering
from scopestate.actors.ports import ScopeChange, Store
from scopestate.actors.reply import ReplyTo, deliver
from scopestate.actors.scope import Collect
from scopestate.actors.turn import TurnActor, arranging, is_arranging
from scopestate.errors import StorageError, UnsavableValue
from scopestate.ops.turns import Turn
from scopestate.ops.values import class_name
from scopestate.signals import certainly

if TYPE_CHECKING:
    from scopestate.actors.clock import Clock
    from scopestate.actors.dispatcher import Dispatcher, Timer
    from scopestate.actors.journal import ConsumerChange
    from scopestate.actors.local import LocalScope
    from scopestate.actors.stretch import Collected
    from scopestate.ops.results import StateEvent

log = Log("scopestate.persistence")

LONGEST_BACKOFF_S: Final = 30.0
TRIM_EVERY_S: Final = 60.0
"""How often the journal is trimmed without a save: changes become too old even if nothing is saved."""
SOONEST_OVERDUE_S: Final = 0.2
"""A save is not overdue before it is this late: a busy machine may delay it, however short the interval."""


class Tick(msgspec.Struct, frozen=True):
    """The interval is over: save what is dirty."""


class Commit(msgspec.Struct, frozen=True):
    """A scope has writes that wait for a commit."""


class Flush(msgspec.Struct, frozen=True):
    """Save everything now. Answer: None once it is on disk; raises StorageError if it cannot be saved."""


class SaveSoon(msgspec.Struct, frozen=True):
    """Some scopes, or what consumers have done, are to be saved before the interval is over."""


class Feed(Protocol):
    """Numbers the changes of the scopes, as the actor that saves needs it."""

    position: int
    """The last position that was assigned."""

    def number(self) -> None:
        """Assign positions to the changes that were entered."""

    def take(self, scope: str, revision: int) -> tuple[Sequence[StateEvent], int | None]:
        """Return the changes of a scope, up to a revision, that no save has taken.

        And the revision after which all of them were entered.
        """

    def take_held(self, batch: Batch) -> tuple[Sequence[StateEvent], int | None]:
        """As `take`, for the changes that wait for a commit."""

    def settled(self, batches: Sequence[Batch]) -> int:
        """Return the position up to which everything is on disk once these commits and all changes taken so far are."""

    def committed(self, events: Sequence[StateEvent]) -> None:
        """Note that these changes are on disk."""


class Progress(Protocol):
    """Knows how far consumers have come, as the actor that saves needs it."""

    def collect(self, *, everything: bool) -> list[ConsumerChange]:
        """Return what must be saved of consumers, with what the last save failed to save.

        `everything`: include what could wait for a later save.
        """

    def saved(self) -> None:
        """Note that what was collected last is on disk."""

    def acks_saved(self, acks: Iterable[tuple[int, int]]) -> None:
        """Note that these acknowledgements of transactions are on disk: consumer and position."""


class WaitsForSave(NamedTuple):
    """The answer to a `durable` write, which waits until it is on disk."""

    actor: LocalScope
    turn: Turn[Any]
    reply: ReplyTo
    answer: Any

    def failed(self, why: object) -> Outcome:
        """Return the outcome for the caller if the save has failed."""
        turn = self.turn
        error = StorageError(
            f"{turn.failure.words}: the write to scope {self.actor.scope!r} is in memory, and saving it has failed; it "
            f"is saved later, if the engine does not end before: {why}",
            code=turn.failure.code,
        )
        return self.reply, None, error


class SnapshotActor(TurnActor):
    """Writes changes to the store, one transaction at a time. Without a store there is nothing to write.

    If a save fails, its batch is kept and tried again with growing pauses, before newer changes, until it is on disk;
    `failing` is the reason. Nothing is dropped, and nothing newer is overwritten with something older. Scopes with
    commit durability are saved as soon as one of them has written: all writes made during a commit share the next one
    (docs/design/0006-durability.md).
    """

    def __init__(self, dispatcher: Dispatcher, interval_s: float, clock: Clock) -> None:
        super().__init__(dispatcher)
        self._store: Store | None = None
        self._clock = clock
        self._interval_s = interval_s
        self._timer: Timer | None = None
        self._began_s = 0.0
        self._due_s = 0.0
        """When the timer rings."""
        self._fresh_s: float | None = None
        self._backlog: dict[str, tuple[LocalScope, ScopeChange]] = {}
        self._failures = 0
        self._commit_asked = False
        self._gathering = Gathering(dispatcher.monotonic, time.sleep)
        self._stopped = False
        self.dirty: dict[str, LocalScope] = {}
        """Scope name -> actor, for scopes with changes for the next save. Written within turns of the scopes."""
        self.committing: dict[str, LocalScope] = {}
        """The same for scopes whose callers wait for the commit."""
        self.failing: StorageError | None = None
        """Why the last save failed; None if it worked."""
        self._taken: list[tuple[LocalScope, Collected]] = []
        """What was collected and is not in the backlog yet: making its rows may need more memory than there is."""
        self._waiting: list[WaitsForSave] = []
        """Answers to `durable` writes, for the next commit."""
        self.feed: Feed | None = None
        """Numbers the changes; None: there is no journal."""
        self.consumers: Progress | None = None
        """Knows how far consumers have come; None: there are none."""
        self._soon: dict[str, None] = {}
        """Scopes to be saved before the interval is over."""
        self._soon_asked = False
        self._acks_timer: Timer | None = None
        self._trim_s = 0.0
        self.unsavable: dict[tuple[str, str], str] = {}
        """(scope, key) -> why the store cannot hold its value, which is in memory only."""
        self.saves = self.saved_keys = self.failed_saves = 0
        self.saving_keys = 0
        """Keys of the save that is running; 0: none is."""
        self.last_save_s = 0.0
        """Duration of the last successful save in seconds."""

    def keep_in(self, store: Store | None, feed: Feed | None) -> None:
        """Save into this store from now on. Nothing was written into another one."""
        self._store, self.feed = store, feed

    def waiting_scopes(self) -> int:
        """Return the number of scopes with changes that are not on disk."""
        return len(self.dirty.keys() | self._backlog.keys())

    def has_open_commits(self) -> bool:
        """Tell whether a commit is running or was asked for: it may hold events back."""
        return bool(self.committing or self._commit_asked or self._claim)

    # ---------------------------------------------------------------------------------------------------- timing

    def start_interval(self) -> None:
        """Start saving in each interval."""
        if self._store is not None and not self._stopped:
            self._began_s = self._fresh_s = self._dispatcher.monotonic()
            self._arm(self._interval_s)

    def set_interval(self, interval_s: float) -> None:
        """Change the interval, the current one included. From any thread."""
        self._interval_s = interval_s
        if self._store is not None and not self._stopped:
            now_s = self._dispatcher.monotonic()
            # Counted from the last save, not from now: otherwise changes would wait for parts of both intervals.
            self._arm(max(self._began_s + interval_s - now_s, 0.001))
            if self._fresh_s is not None:
                self._fresh_s = max(
                    self._fresh_s, now_s - interval_s
                )  # due now, and not late because of the shorter interval

    def stop_interval(self) -> None:
        """Stop saving in each interval; `Flush` still saves."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def overdue_s(self) -> float:
        """Return how many seconds ago the overdue save was due; 0.0 if none is overdue. From any thread.

        A save is overdue if it has not ended two intervals after it was due, for any reason: a timer that does not
        fire, no thread, a disk that hangs. So this uses the clock only, and none of them.
        """
        if self._fresh_s is None or self._stopped:
            return 0.0
        interval_s = self._interval_s
        late_s = self._dispatcher.monotonic() - self._fresh_s - interval_s
        return late_s if late_s > max(2 * interval_s, SOONEST_OVERDUE_S) else 0.0

    def _arm(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due_s = self._dispatcher.monotonic() + delay_s
        self._timer = self._dispatcher.call_later(delay_s, weakly(self._ring))

    def _ring(self) -> None:
        self.tell(Tick())

    def save_soon(self, scopes: Iterable[str]) -> None:
        """Save scopes before the interval is over: a consumer waits for their changes. From any thread."""
        self._soon.update(dict.fromkeys(scopes))
        if self._soon and not self._soon_asked:
            self._ask_for_save()

    def end_interval(self) -> None:
        """Save all dirty scopes now: their keys are to leave memory. From any thread."""
        if self.failing is None and not self._stopped and Tick() not in self._mailbox:
            self.tell(Tick())

    def save_acks_soon(self, delay_s: float) -> None:
        """Save what consumers have done, with the next save or this many seconds later. From any thread."""
        if delay_s <= 0:
            self._ask_for_save()
        elif self._acks_timer is None:
            self._acks_timer = self._dispatcher.call_later(delay_s, weakly(self._ring_acks))

    def _ring_acks(self) -> None:
        self._acks_timer = None
        self._ask_for_save()

    def _ask_for_save(self) -> None:
        self._soon_asked = True
        self.tell(SaveSoon())

    def note_positions(self) -> None:
        """Store the last assigned position. Called before the store is closed, once everything is saved."""
        if self.feed is not None and self._store is not None and self._store.journal is not None:
            self.feed.number()
            self._store.journal.given = self._store.journal.settled = self.feed.position

    def commit_soon(self) -> None:
        """Ask for a commit, unless one was asked for. Called within turns of scopes."""
        if not self._commit_asked or is_arranging():
            arranging(self._ask_for_commit)

    def commit_anyway(self) -> None:
        """As `commit_soon`, for when that was interrupted. An extra commit does no harm."""
        arranging(self._ask_for_commit)

    def answer_when_saved(self, actor: LocalScope, turn: Turn[Any], reply: ReplyTo, answer: Any) -> None:
        """Deliver an answer when the writes of its scope are on disk. Called within the turn; many share one save."""
        self._waiting += (WaitsForSave(actor, turn, reply, answer),)
        self.commit_soon()

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
                self._commit(gathers=True)
            case Tick():
                self._began_s = began = self._dispatcher.monotonic()
                try:
                    if self._save_quietly():
                        self._fresh_s = began
                        self._tidy()
                finally:
                    if not self._stopped:
                        took_s = self._dispatcher.monotonic() - began
                        pause_s = self._interval_s - took_s if self.failing is None else self._backoff_s()
                        self._arm(max(pause_s, 0.001))
            case SaveSoon():
                self._save_soon()
            case Flush():
                self._commit()
                self._save()
                self._save_acks()
            case _:
                raise TypeError(f"a snapshot actor does not understand {message!r:.80}")

    def _backoff_s(self) -> float:
        return min(0.1 * 2.0 ** min(self._failures, 20), LONGEST_BACKOFF_S, max(self._interval_s, 0.1))

    def _save_quietly(self) -> bool:
        try:
            self._save()
        except StorageError:
            log.debug("save failed and will be retried", exc_info=True)  # `_write` has logged it at ERROR
            return False
        return True

    def _fail(self) -> None:
        """Log a bug in a turn. Saving continues."""
        log.error("a turn of the snapshot actor failed", exc_info=sys.exc_info()[1])

    def _save_soon(self) -> None:
        """Save the scopes that consumers wait for, and what consumers have done."""
        self._soon_asked = False
        if self.failing is not None:
            self._try_again_soon()
            return
        soon = list(self._soon)
        for scope in soon:
            del self._soon[scope]
        try:
            if soon:
                self._save(soon)
            else:
                self._save_acks()
        except StorageError:
            log.debug("save failed and will be retried", exc_info=True)  # `_write` has logged it at ERROR
            self._try_again_soon()

    def _try_again_soon(self) -> None:
        """Call if something waits for a save and saving fails: ends the interval, which may be long, after a pause."""
        pause_s = self._backoff_s()
        if not self._stopped and self._due_s - self._dispatcher.monotonic() > pause_s:
            self._arm(pause_s)

    def _save_acks(self) -> None:
        """Save what consumers have done, if the last save has left something."""
        if self.consumers is None:
            return
        if changes := self.consumers.collect(everything=True):
            self._write([], changes)
        self._tell_of([])  # even without a save: the limit of the journal may have changed

    def _tidy(self) -> None:
        """After an interval: save what no save of a scope has included, and trim the journal."""
        store, now_s = self._store, self._dispatcher.monotonic()
        if store is None or store.journal is None:
            return
        try:
            # Even if saving has failed: there may be no change of a scope to try it with.
            self._save_acks()
            if self.feed is not None and not self._backlog and self.feed.settled(()) > store.journal.settled:
                self._write([])  # positions of changes that are not kept: cursors after them survive a crash
            if self.failing is not None:
                return
            if store.journal.rules is not None and (store.journal.behind or now_s >= self._trim_s):
                self._trim_s = now_s + TRIM_EVERY_S
                store.clock_ms = self._clock.now_ms()
                store.journal.trim()
        except StorageError as error:
            if self.failing is None:  # else `_write` has logged it at ERROR
                log.warning("the journal could not be trimmed; this will be retried: %s", error)

    def _save(self, scopes: Iterable[str] | None = None) -> None:
        """Save what earlier saves have left, and all dirty scopes.

        If that fails, keep all of it and raise StorageError.

        `scopes`: of the dirty scopes, only these.
        """
        dirty, feed = self.dirty, self.feed
        for scope in list(dirty) if scopes is None else scopes:
            # Removed from the table before it is collected: a write in between enters it again.
            actor = dirty.pop(scope, None)
            if actor is None:
                continue
            try:
                collected = actor.housekeep(Collect())
            except BaseException:
                certainly(lambda scope=scope, actor=actor: dirty.setdefault(scope, actor))  # type: ignore[misc]  # mypy cannot infer a default argument
                raise
            if collected is not None:
                self._taken += ((actor, collected),)
        if feed is not None:
            feed.number()  # all that was collected was entered before
        while self._taken:
            actor, collected = self._taken[0]
            change = collected.change()
            _, waiting = self._backlog.get(actor.scope, (actor, None))
            if feed is not None:
                change.log, change.logged_since = feed.take(actor.scope, change.revision)
            self._backlog[actor.scope] = (actor, change if waiting is None else merged(waiting, change))
            del self._taken[0]  # a second time would change nothing
        if not self._backlog:
            return  # `failing` stays: having nothing to save does not show that saving works
        began = time.perf_counter()
        while self._backlog:
            try:
                self._write([change for _, change in self._backlog.values()], self._collect_acks(), all_taken=True)
                break
            except UnsavableValue as error:
                self._leave_out(error)
        self.last_save_s = time.perf_counter() - began
        saved = [change for _, change in self._backlog.values()]
        for scope, (actor, change) in self._backlog.items():
            self._note_saved(scope, actor, change.entries)
            actor.saved(change.revision)
        self._backlog.clear()
        self._tell_of(saved)

    def _collect_acks(self) -> Sequence[ConsumerChange]:
        return () if self.consumers is None else self.consumers.collect(everything=False)

    def _tell_of(self, saved: Sequence[ScopeChange]) -> None:
        """Tell the feed and the consumers which changes are on disk now."""
        if self.consumers is not None and (acks := [ack for change in saved for ack in change.acks]):
            self.consumers.acks_saved(acks)
        if self.feed is not None:
            self.feed.committed(sorted([event for change in saved for event in change.log], key=_position))

    def _leave_out(self, error: UnsavableValue) -> None:
        """Remove from the backlog a value that the store cannot hold, so that the rest is saved.

        It stays in memory only.
        """
        scope = error.scope
        if scope not in self._backlog:
            raise error
        actor, change = self._backlog[scope]
        keys = list(change.entries) if error.key is None else [error.key]
        for key in keys:
            if self.unsavable.get((scope, key)) != str(error):
                log.error("not saved, and kept in memory only: %s", error)
                self.unsavable[scope, key] = str(error)
            change.entries.pop(key, None)
        if any(event.key in keys for event in change.log):
            # A change that is not saved reaches no consumer, and the journal has a gap.
            change.log = [event for event in change.log if event.key not in keys]
            change.logged_since = None
        actor.pinned = True
        if error.key is None:
            del self._backlog[scope]
            actor.saved(change.revision)

    def _note_saved(self, scope: str, actor: LocalScope, keys: Iterable[str]) -> None:
        """Note that values which were left out have been replaced or deleted, and that this is saved."""
        if not actor.pinned:
            return
        for key in keys:
            self.unsavable.pop((scope, key), None)
        actor.pinned = any(left == scope for left, _ in self.unsavable)

    def _commit(self, *, gathers: bool = False) -> None:
        """Save the scopes that wait for their commit, and answer their callers.

        `gathers`: wait a moment for more calls, if more are expected.
        """
        committing = self.committing
        batches: list[Batch] = []
        actor: LocalScope | None = None
        try:
            if gathers and self._dispatcher.waiter is None:  # else a simulation: nothing else runs during a pause
                self._gathering.wait(self._calls_waiting)
            self._commit_asked = False
            for scope in list(committing):
                actor = committing.pop(scope, None)
                if actor is not None:
                    batches.append(actor.housekeep(TakeBatch()))
            actor = None
            self._commit_batches(batches)
            self._save_for_callers()
        except BaseException as problem:
            name = class_name(problem)
            certainly(lambda: self._break_off(actor, batches, name))
            raise

    def _calls_waiting(self) -> int:
        """Return how many calls wait for the next commit."""
        return len(self._waiting) + sum(actor.held_calls() for actor in list(self.committing.values()))

    def _save_for_callers(self) -> None:
        """Save the scopes whose callers wait for that, and answer them."""
        waiting = self._waiting[:]
        if not waiting:
            return
        began_s = self._dispatcher.monotonic()
        try:
            self._save({one.actor.scope: None for one in waiting})
        except StorageError as error:
            outcomes = [one.failed(error) for one in waiting]
        else:
            outcomes = [self._saved(one) for one in waiting]
            took_s = self._dispatcher.monotonic() - began_s
            self._gathering.note_answers(len(waiting), self._calls_waiting() - len(waiting), took_s)
        # Removed only now: if the save was interrupted, they wait for the next one.
        del self._waiting[: len(waiting)]
        deliver(outcomes)

    def _saved(self, one: WaitsForSave) -> Outcome:
        """Return the answer to a write, unless the store cannot hold its value."""
        for scope, key in self.unsavable:
            if scope == one.actor.scope and key in (one.turn.keys or (key,)):
                return one.failed(self.unsavable[scope, key])
        return one.reply, one.answer, None

    @staticmethod
    def _settled(batch: Batch) -> Iterable[Outcome]:
        try:
            return batch.settle()
        except MemoryError:
            return batch.settle()  # it is on disk, so its events must be published

    def _break_off(self, taking: LocalScope | None, batches: list[Batch], why: str) -> None:
        """Answer the callers of a commit that was interrupted, as by a MemoryError."""
        if taking is not None:
            self.committing.setdefault(taking.scope, taking)
        self.commit_anyway()
        error = StorageError(
            f"the commit was interrupted ({why}); it may have been written: read the key before retrying"
        )
        for batch in batches:
            outcomes = batch.roll_back(error)
            deliver([outcome for outcome in outcomes if not getattr(outcome[0], "done", False)])

    def _commit_batches(self, batches: list[Batch]) -> None:
        began_s = self._dispatcher.monotonic()
        try:
            changes = [self._change_of(batch) for batch in batches if batch.collected is not None]
            if changes:
                self._write(changes, self._collect_acks(), batches)
        except UnsavableValue as error:
            # Only the callers of that scope are refused; the other scopes are saved without it.
            refused = [batch for batch in batches if batch.actor.scope == error.scope] or batches
            deliver([outcome for batch in refused for outcome in batch.roll_back(error)])
            if others := [batch for batch in batches if batch not in refused]:
                self._commit_batches(others)
        except StorageError as error:
            deliver([outcome for batch in batches for outcome in batch.roll_back(error)])
        else:
            outcomes = [outcome for batch in batches for outcome in self._settled(batch)]
            if outcomes:
                took_s = self._dispatcher.monotonic() - began_s
                # Before they are answered: later, they could not be told from those that wait already.
                self._gathering.note_answers(len(outcomes), self._calls_waiting() - len(self._waiting), took_s)
            deliver(outcomes)
            self._tell_of(changes)

    def _change_of(self, batch: Batch) -> ScopeChange:
        assert batch.collected is not None  # the caller has made sure of it
        change = batch.collected.change()
        if self.feed is not None:
            change.log, change.logged_since = self.feed.take_held(batch)
        return change

    def _write(
        self,
        changes: list[ScopeChange],
        consumers: Sequence[ConsumerChange] = (),
        batches: Sequence[Batch] = (),
        *,
        all_taken: bool = False,
    ) -> None:
        """Save changes. `all_taken`: what earlier saves have left, and what was taken from the feed, is among them."""
        store = self._store
        assert store is not None  # only scopes that are kept hand over changes
        store.clock_ms = self._clock.now_ms()
        journal, feed, settled = store.journal, self.feed, 0
        if journal is not None and feed is not None:
            settled, journal.given = journal.settled, feed.position
            if all_taken or not self._backlog:
                journal.settled = max(feed.settled(batches), settled)
        keys = self.saving_keys = sum(len(change.entries) for change in changes)
        try:
            if consumers:
                store.save(changes, consumers)
            else:
                store.save(changes)
        except BaseException as problem:
            if journal is not None and feed is not None:
                journal.settled = settled
            if is_from_outside(problem):
                raise
            # A store promises StorageError. Any other exception must not stop the saving either.
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
                log.error("saving failed, the data stays in memory and is saved later: %s", error)  # noqa: TRY400 - the text says it all
            self.failing = error
            raise error from (None if error is problem else problem)
        finally:
            self.saving_keys = 0
        if consumers and self.consumers is not None:
            self.consumers.saved()
        self.saves += 1
        self.saved_keys += keys
        self._note_success()

    def _note_success(self) -> None:
        if self.failing is not None:
            log.warning("saving works again after %d failed attempts", self._failures)
        self.failing = None
        self._failures = 0


_position: Final[Callable[[StateEvent], int]] = attrgetter("position")


def merged(older: ScopeChange, newer: ScopeChange) -> ScopeChange:
    """Return one change for two of a scope. While saving fails, memory grows with the keys, not with the attempts.

    It also grows with the changes for the journal, each of which is kept.
    """
    return ScopeChange(
        newer.scope,
        newer.revision,
        {**older.entries, **newer.entries},
        [*older.removed, *newer.removed],
        newer.due_ms,
        {**older.answers, **newer.answers},
        [*older.log, *newer.log] if older.log else newer.log,
        newer.logged_since,
        [*older.acks, *newer.acks],
    )
