"""How the memory of a scope is changed: everything that a turn has decided, or nothing.

**The rule.** CPython runs signal handlers, and lets other threads run, only at calls, at jumps back, and at the start
of a function. A *stretch* is code without any of these: nothing comes between its lines, so all its changes take effect
as a whole for signal handlers, for exceptions that they raise, and for threads that read without a turn. In a stretch:

- Single keys are written by `table[key] = value` and `del table[key]`. Many keys are written by `table |= other`, an
  instruction and not a call. The tables are dicts and lists, not subclasses, and their keys are of type `str` or `int`:
  so no code written in Python runs.
- Many keys are removed by the only call of a stretch, its last instruction. The called function is written in C, so a
  signal handler runs only after it has finished. It is made beforehand, and allocates nothing.
- Steps that may need memory come first: the entry of the feed, then the event. If one fails, the steps before it are
  undone, which needs no memory. Overwriting existing keys, even by a union, and removing keys need no memory either,
  so these steps come last and are never undone.
- Other threads may read between two stretches, so changes that are only consistent together are made in one. The
  removal of an expired key is consistent on its own: it is a separate stretch, before the write of the same key.

A build of CPython without the interpreter lock would need more: there a union is one step, and five of them are not.

tests/reliability/test_interruption.py and test_stretch.py guard this: by the instructions of the functions here, by an
interruption at each of them, by refusing memory at each allocation, and by threads that read at the same time.
docs/design/0037-many-changes-as-one.md has the reasons.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, Final, NoReturn

import msgspec

from scopestate.actors.answers import NO_ANSWERS, Answers
from scopestate.actors.gate import Gate
from scopestate.actors.ports import Answer, Row, ScopeChange
from scopestate.actors.router import Expired, Prepared
from scopestate.actors.scope import ScopeActor, Surroundings
from scopestate.actors.view import InMemory, Unexpired, WithDeadlines
from scopestate.actors.wheel import NEVER, Wheel
from scopestate.errors import StorageError
from scopestate.ops.results import StateEvent
from scopestate.ops.turns import Change, NewDeadline, Stored, checked_length
from scopestate.wire.depth import event_depth

LAST_SEQUENCE: Final = 2**53 - 2**32
"""A scope that reaches this number is read-only: numbers must stay below 2**53, and acknowledged writes must be
saved."""
MOST_UNSAVED: Final = 2**31
"""This many writes of a scope may wait to be saved: 2**32 numbers are skipped if the process ends before that, and no
write may have had a higher one. It is checked at each save, so the remaining numbers are for the writes until the next
save.
"""

_COMMITS: Final = ("_write", "_create", "_write_timed", "_write_deadline", "_remove", "_write_all", "_apply")
"""All methods that have a stretch: in a scope that takes no writes, other methods replace them."""
_UNUSED: Final[dict[str, int]] = {}
_NONE_GONE: Final[dict[int, None]] = {}
"""Shared by the scopes that are not kept: nothing is put into it."""
NO_DEADLINES: Final[dict[str, int]] = {}
"""Shared by the scopes that have no deadlines: nothing is put into it."""


class Collected(msgspec.Struct, frozen=True, eq=False):
    """What changed in a scope since its last save, as tables that are not changed any more."""

    scope: str
    revision: int
    keys: dict[str, None]
    """The keys that were written, created or deleted."""
    values: dict[str, bytes]
    revisions: dict[str, int]
    created: dict[str, int]
    deadlines: dict[str, int]
    removed: dict[int, None]
    answers: dict[str, Answer | None]
    due_ms: int | None
    acks: tuple[tuple[int, int], ...] = ()
    """Deliveries that the changes acknowledge."""

    def change(self) -> ScopeChange:
        """Return it as the store takes it. Outside of the scope's turn: it takes 0.5 us for each key."""
        values, revisions, created, deadlines = self.values, self.revisions, self.created, self.deadlines
        rows = {
            key: Row(values[key], revisions[key], created[key], deadlines.get(key)) if key in values else None
            for key in self.keys
        }
        removed = list(self.removed)
        return ScopeChange(self.scope, self.revision, rows, removed, self.due_ms, self.answers, acks=self.acks)


_PART: Final = 8
"""A table is copied as a whole, unless at most one in this many of its keys is wanted."""


def part(table: dict[str, Any], keys: dict[str, None]) -> dict[str, Any]:
    """Return a copy of a table's entries for these keys, or of the whole table if that is quicker."""
    if len(keys) * _PART > len(table):
        return table.copy()
    return {key: table[key] for key in keys if key in table}


class ScopeInMemory(ScopeActor):
    """The memory of a scope, and how it is changed. Only the thread that runs its turn changes it.

    Reading needs no turn: values are immutable bytes, and a dict lookup sees them before or after a stretch.
    """

    # CPython looks up at most 30 attributes of an object quickly, unless they are slots.
    __slots__ = (
        "_answers",
        "_awaited",
        "_created",
        "_creations",
        "_deadlines",
        "_dirty",
        "_gate",
        "_incoming",
        "_no_writes",
        "_outbox",
        "_registry",
        "_removed",
        "_revisions",
        "_timed_view",
        "_unexpired",
        "_values",
        "_view",
        "_wheel",
        "collected",
    )

    def __init__(self, scope: str, around: Surroundings, *, keeps: bool) -> None:
        """`keeps`: the store keeps it."""
        super().__init__(scope, around)
        self._gate: Gate | None = None
        self._outbox: list[Any] = around.router.outlet
        self._incoming: dict[int, StateEvent] = around.router.feed.incoming
        self._awaited = around.router.feed.awaited
        """Not empty if something waits for the events that are entered into `_incoming`."""
        self._registry: MutableMapping[str, Any] = around.snapshot.dirty
        self._values: dict[str, bytes] | None = None
        """key -> JSON, in the order of creation; expired keys too, until a turn removes them. None: not in memory."""
        self._revisions: dict[str, int] = {}
        """key -> the number of the write that changed it last. The same keys as `_values`."""
        self._created: dict[str, int] = {} if keeps else _UNUSED
        """key -> the write that created it, of a scope that is kept. The same keys as `_values`."""
        self._deadlines = NO_DEADLINES
        """key -> when it expires, in milliseconds since the epoch; only keys that have a deadline."""
        self._wheel: Wheel | None = None
        """When to check the keys that have deadlines; None: there has been no deadline yet."""
        self._view: InMemory | None = None
        self._timed_view: WithDeadlines | None = None
        self._unexpired: Unexpired | None = None
        self._answers = NO_ANSWERS
        self._creations = 0
        """Keys that were created since this actor was made."""
        self._dirty: dict[str, None] | None = {} if keeps else None
        """Keys to save; None: the scope is not kept. An extra key does no harm."""
        self._removed: dict[int, None] = {} if keeps else _NONE_GONE
        """`_created` of keys that may be in the store, and are deleted."""
        self.collected = 0
        """The number of the last write that was collected: keys created after it are not in the store."""
        self._no_writes = ""
        """Why it takes no writes; "" if it does."""

    # ---------------------------------------------------------------------------------------------------- one change

    def _write(self, key: str, old: bytes | None, new: bytes | None) -> None:
        """Commit a change of a key that has no deadline: memory, what to save, and the event, all or none of them."""
        if new is None:
            self._remove(key, old)
            return
        if old is None:
            self._create(key, new)
            return
        sequence = self._sequence + 1
        watch = self._watch
        anywhere = watch.anywhere
        routed: tuple[Any, ...] = ()
        logged = None
        if (watch and (key in watch or None in watch)) or (anywhere and (key in anywhere or None in anywhere)):
            if watch.fed or watch.anywhere.fed:
                routed, logged, mark = self._router.prepare_fed(
                    self.scope, watch, key, old, new, sequence, event_depth.get()
                )
            else:
                routed = self._router.prepare(self.scope, watch, key, old, new, sequence, event_depth.get())
        values, revisions, dirty = self._values, self._revisions, self._dirty
        outbox, gate = self._outbox, self._gate
        assert values is not None  # within a turn
        if gate is not None:
            gate.unsettled = True
            self.readable = None  # before the value can be seen
        self.touched = True
        # The stretch begins here. An extra dirty key need not be removed again.
        if dirty is not None:
            dirty[key] = None
            self._registry[self.scope] = self
        if logged is not None:
            self._incoming[mark] = logged
        if routed:
            try:
                outbox += routed
            except MemoryError:
                if logged is not None:
                    del self._incoming[mark]
                raise
        values[key] = new
        revisions[key] = sequence
        self._sequence = sequence
        # The stretch has ended.
        if gate is not None:
            self._around.snapshot.commit_soon()  # the events wait for the commit
        elif routed or (logged is not None and self._awaited):
            self._router.wake()

    def _create(self, key: str, new: bytes, expires_ms: int | None = None, now_ms: int | None = None) -> None:
        """Commit a key that did not exist. `now_ms`: the time, if it is known."""
        if len(key) > self._around.limits.longest_name:
            checked_length("key", key, self._around.limits.longest_name)
        sequence = self._sequence + 1
        watch = self._watch
        anywhere = watch.anywhere
        routed: tuple[Any, ...] = ()
        logged = None
        if (watch and (key in watch or None in watch)) or (anywhere and (key in anywhere or None in anywhere)):
            if watch.fed or watch.anywhere.fed:
                routed, logged, mark = self._router.prepare_fed(
                    self.scope, watch, key, None, new, sequence, event_depth.get()
                )
            else:
                routed = self._router.prepare(self.scope, watch, key, None, new, sequence, event_depth.get())
        sooner = expires_ms is not None and self._place(key, expires_ms, now_ms)
        values, revisions, created, deadlines = self._values, self._revisions, self._created, self._deadlines
        dirty, outbox, gate = self._dirty, self._outbox, self._gate
        assert values is not None  # within a turn
        creations = self._creations + 1
        if gate is not None:
            gate.unsettled = True
            self.readable = None  # before the value can be seen
        self.touched = True
        # The stretch begins here.
        try:
            if dirty is not None:
                dirty[key] = None
                self._registry[self.scope] = self
                created[key] = sequence
            if expires_ms is not None:
                deadlines[key] = expires_ms
            revisions[key] = sequence
            values[key] = new
            if logged is not None:
                self._incoming[mark] = logged
            if routed:
                outbox += routed
        except MemoryError:
            if logged is not None and mark in self._incoming:
                del self._incoming[mark]
            if key in values:
                del values[key]
            if key in revisions:
                del revisions[key]
            if key in deadlines:
                del deadlines[key]
            if key in created:
                del created[key]
            raise
        self._creations = creations
        self._sequence = sequence
        # The stretch has ended.
        if gate is not None or routed or logged is not None:
            self._tell()
        if sooner:
            self._expect()

    def _write_timed(self, key: str, old: bytes, new: bytes, expires_ms: int | None, now_ms: int | None) -> None:
        """As `_write`, for a key that exists and has a deadline or gets one."""
        sequence = self._sequence + 1
        watch = self._watch
        routed: tuple[Any, ...] = ()
        logged = None
        if watch or watch.anywhere:
            if watch.fed or watch.anywhere.fed:
                routed, logged, mark = self._router.prepare_fed(
                    self.scope, watch, key, old, new, sequence, event_depth.get()
                )
            else:
                routed = self._router.prepare(self.scope, watch, key, old, new, sequence, event_depth.get())
        sooner = False
        if expires_ms is not None:
            if now_ms is None or not self._deadlines:
                sooner = self._place(key, expires_ms, now_ms)
            else:
                sooner = self._wheel.place(key, expires_ms, now_ms)  # type: ignore[union-attr]  # there are deadlines
        values, revisions, deadlines, dirty = self._values, self._revisions, self._deadlines, self._dirty
        outbox, gate = self._outbox, self._gate
        assert values is not None  # within a turn
        timed = key in deadlines
        if gate is not None:
            gate.unsettled = True
            self.readable = None  # before the value can be seen
        self.touched = True
        # The stretch begins here.
        try:
            if dirty is not None:
                dirty[key] = None
                self._registry[self.scope] = self
            if expires_ms is not None and not timed:
                deadlines[key] = expires_ms
            if logged is not None:
                self._incoming[mark] = logged
            outbox += routed
        except MemoryError:
            if logged is not None and mark in self._incoming:
                del self._incoming[mark]
            if not timed and key in deadlines:
                del deadlines[key]
            raise
        if timed:
            if expires_ms is not None:
                deadlines[key] = expires_ms
            else:
                del deadlines[key]
        values[key] = new
        revisions[key] = sequence
        self._sequence = sequence
        # The stretch has ended.
        if gate is not None or routed or logged is not None:
            self._tell()
        if expires_ms is None:
            self._wheel.forget(key)  # type: ignore[union-attr]  # there was a deadline
        elif sooner:
            self._expect()

    def _remove(self, key: str, old: bytes | None, expired: Expired | None = None) -> None:
        """Commit that a key no longer exists. `old` None: it did not exist before, which still fires an event."""
        sequence = self._sequence + 1
        watch = self._watch
        anywhere = watch.anywhere
        routed: tuple[Any, ...] = ()
        logged = None
        if (watch and (key in watch or None in watch)) or (anywhere and (key in anywhere or None in anywhere)):
            if watch.fed or watch.anywhere.fed:
                routed, logged, mark = self._router.prepare_fed(
                    self.scope, watch, key, old, None, sequence, event_depth.get(), expired
                )
            else:
                routed = self._router.prepare(self.scope, watch, key, old, None, sequence, event_depth.get(), expired)
        values, revisions, created, deadlines = self._values, self._revisions, self._created, self._deadlines
        dirty, removed, outbox, gate = self._dirty, self._removed, self._outbox, self._gate
        assert values is not None  # within a turn
        gone = 0
        if dirty is not None and old is not None and created[key] <= self.collected:
            gone = created[key]
        timed = key in deadlines
        if gate is not None:
            gate.unsettled = True
            self.readable = None  # before it can be missed
        self.touched = True
        # The stretch begins here.
        try:
            if dirty is not None:
                self._registry[self.scope] = self
                if old is not None:
                    dirty[key] = None
                if gone:
                    removed[gone] = None
            if logged is not None:
                self._incoming[mark] = logged
            if routed:
                outbox += routed
        except MemoryError:
            if logged is not None and mark in self._incoming:
                del self._incoming[mark]
            if gone and gone in removed:
                del removed[gone]
            raise
        if old is not None:
            del values[key]
            del revisions[key]
            if dirty is not None:
                del created[key]
            if timed:
                del deadlines[key]
        self._sequence = sequence
        # The stretch has ended.
        if gate is not None or routed or logged is not None:
            self._tell()
        if timed:
            self._wheel.forget(key)  # type: ignore[union-attr]  # there was a deadline

    def _write_deadline(self, key: str, expires_ms: int, now_ms: int) -> None:
        """Commit a new deadline of an existing key, and nothing else: as `_commit`, in less time."""
        sooner = self._place(key, expires_ms, now_ms)
        deadlines, dirty, gate = self._deadlines, self._dirty, self._gate
        if gate is not None:
            gate.unsettled = True
            self.readable = None  # before the deadline can be seen
        self.touched = True
        # The stretch begins here. If there is no memory for the deadline, the key is saved once more as it was.
        if dirty is not None:
            dirty[key] = None
            self._registry[self.scope] = self
        deadlines[key] = expires_ms
        # The stretch has ended.
        if gate is not None:
            self._tell()
        if sooner:
            self._expect()

    # -------------------------------------------------------------------------------------------------- many changes

    def _store(self, stored: Sequence[Stored]) -> None:
        """Commit what a turn has decided."""
        if len(stored) == 1 and type(stored[0]) is Change:
            self._write_change(stored[0])
            return
        # No generators here and below: CPython 3.12 crashes if there is no memory for one.
        expired = [one for one in stored if type(one) is Change and one.expired]
        if expired:
            written = {one.key for one in stored if type(one) is Change and not one.expired}
            first = [one for one in expired if one.key in written]
            if first:
                for change in first:
                    self._write_change(change)
                again = {change.key for change in first}
                self._store([one for one in stored if not (type(one) is Change and one.expired and one.key in again)])
                return
        self._commit(stored)

    def _write_change(self, change: Change) -> None:
        key, before, after, expires_ms = change.key, change.before, change.after, change.expires_ms
        if after is None:
            self._remove(key, before, self._lateness(expires_ms) if change.expired else None)
        elif before is None:
            self._create(key, after, expires_ms)
        elif expires_ms is None and key not in self._deadlines:
            self._write(key, before, after)
        else:
            self._write_timed(key, before, after, expires_ms, None)

    def _commit(self, stored: Sequence[Stored]) -> None:
        """Commit several changes, each of another key: all or none of them, and their events."""
        changes = _Changes()
        number = self._sequence
        watched = bool(self._watch or self._watch.anywhere)
        if watched and (self._watch.fed or self._watch.anywhere.fed):
            self._router.check_fed(self.scope, event_depth.get())
        for one in stored:
            if isinstance(one, Change):
                number += 1
                if watched:
                    changes.routed += self._event(one, number)
                self._add(changes, one, number)
            elif isinstance(one, NewDeadline):
                changes.dirty[one.key] = None
                changes.set_deadline(self._deadlines, one.key, one.expires_ms)
            else:
                kept = one.kept
                changes.answers[one.idempotency_key] = Answer(
                    kept.fingerprint, kept.answer, self._around.clock.now_ms()
                )
        if changes.answers:
            if self._answers is NO_ANSWERS:
                self._answers = Answers({})
                for view in (self._view, self._timed_view):
                    if view is not None:
                        view.answers = self._answers.kept
            self._answers.drop_old(self._around.clock.now_ms())
        if watched:
            changes.routed, changes.logged = self._entries_of(changes.routed, number)
        sooner = bool(changes.times or changes.new_times) and self._place_all({**changes.times, **changes.new_times})
        self._apply(changes, number)
        if changes.untimed and self._wheel is not None:
            self._wheel.forget_all(changes.untimed)
        if changes.answers:
            self._answers.note(changes.answers)
        if sooner:
            self._expect()

    def _event(self, change: Change, number: int) -> tuple[Any, ...]:
        late = self._lateness(change.expires_ms) if change.expired else None
        return self._router.prepare(
            self.scope, self._watch, change.key, change.before, change.after, number, event_depth.get(), late
        )

    def _entries_of(self, routed: list[Prepared], last: int) -> tuple[list[Prepared], dict[int, StateEvent]]:
        """Return which of the prepared events of a transaction are published, and the entries for the feed.

        `last`: the revision of its last change.
        """
        for _, event in routed:
            event.transaction = last
        if not (self._watch.fed or self._watch.anywhere.fed):
            return routed, {}
        now_ms = self._around.clock.now_ms()
        for _, event in routed:
            event.time_ms = now_ms
        return [one for one in routed if one[0]], {id(event): event for _, event in routed}

    def _lateness(self, expires_ms: int | None) -> Expired:
        """Return a deadline that has passed, and by how much."""
        assert expires_ms is not None  # of a key that has expired
        return expires_ms, self._around.clock.now_ms() - expires_ms

    def _add(self, changes: _Changes, change: Change, number: int) -> None:
        """Add one change to those that are committed together."""
        key, before, after = change.key, change.before, change.after
        if after is not None:
            changes.dirty[key] = None
            if before is None:
                checked_length("key", key, self._around.limits.longest_name)
                changes.created[key] = after
                changes.created_numbers[key] = number
            else:
                changes.values[key] = after
                changes.numbers[key] = number
            changes.set_deadline(self._deadlines, key, change.expires_ms)
        elif before is not None:
            changes.dirty[key] = None
            changes.gone.append(key)
            if key in self._deadlines:
                changes.untimed.append(key)
            if self._dirty is not None and self._created[key] <= self.collected:
                changes.removed[self._created[key]] = None

    def _apply(self, changes: _Changes, number: int) -> None:
        """Change the tables, by one stretch. `number` is that of the last change."""
        values, revisions, deadlines, dirty = self._values, self._revisions, self._deadlines, self._dirty
        created, removed, outbox, incoming = self._created, self._removed, self._outbox, self._incoming
        answers, unsaved = self._answers.kept, self._answers.unsaved
        assert values is not None  # within a turn
        made, made_numbers, made_times = changes.created, changes.created_numbers, changes.new_times
        new, numbers, times = changes.values, changes.numbers, changes.times
        routed, kept, gone, doomed, keys = changes.routed, changes.answers, changes.gone, changes.removed, changes.dirty
        logged = changes.logged
        creations = self._creations + len(made)
        take_back = remover(
            (values, made),
            (revisions, made),
            (created, made),
            (deadlines, made_times),
            (removed, doomed),
            (answers, kept),
            (unsaved, kept),
            (incoming, logged),
        )
        remove = None
        if gone or changes.untimed:
            remove = remover((values, gone), (revisions, gone), (created, gone), (deadlines, changes.untimed))
        if self._gate is not None:
            self._gate.unsettled = True
            self.readable = None  # before the values can be seen
        self.touched = True
        # The stretch begins here. Steps that may need memory come first, with the events as the last of them.
        try:
            if dirty is not None:
                dirty |= keys
                self._registry[self.scope] = self
                created |= made_numbers
                removed |= doomed
                unsaved |= kept
            answers |= kept
            deadlines |= made_times
            revisions |= made_numbers
            values |= made
            incoming |= logged
            outbox += routed
        except MemoryError:
            take_back()
            raise
        values |= new
        revisions |= numbers
        deadlines |= times
        self._creations = creations
        self._sequence = number
        if remove is not None:
            remove()
        # The stretch has ended.
        self._tell()

    def _write_all(self, sets: dict[str, bytes], before: list[bytes | None]) -> None:
        """Commit sets of several keys that have no deadlines: as `_commit`, in a third of the time."""
        values, revisions, dirty, created = self._values, self._revisions, self._dirty, self._created
        outbox, incoming, gate, watch = self._outbox, self._incoming, self._gate, self._watch
        assert values is not None  # within a turn
        number = self._sequence + len(sets)
        numbers = dict(zip(sets, range(self._sequence + 1, number + 1)))  # noqa: B905 - `strict=` is slow, and they are as many
        routed: list[Prepared] = []
        logged: dict[int, StateEvent] = {}
        take_back = None
        if watch or watch.anywhere:
            routed, logged = self._router.prepare_sets(
                self.scope, watch, sets, before, self._sequence + 1, event_depth.get()
            )
            if logged:
                take_back = remover((incoming, logged))
        made: dict[str, bytes] = {}
        if None in before:
            longest = self._around.limits.longest_name
            made = {checked_length("key", key, longest): data for key, data in sets.items() if key not in values}
            made_numbers = {key: numbers[key] for key in made}
            take_back = remover((values, made), (revisions, made), (created, made), (incoming, logged))
        keys = dict.fromkeys(sets) if dirty is not None else None
        creations = self._creations + len(made)
        if gate is not None:
            gate.unsettled = True
            self.readable = None  # before the values can be seen
        self.touched = True
        # The stretch begins here, as in `_apply`.
        try:
            if dirty is not None:
                dirty |= keys  # type: ignore[arg-type]  # not None then
                self._registry[self.scope] = self
            if made:
                if dirty is not None:
                    created |= made_numbers
                revisions |= made_numbers
                values |= made
            if logged:
                incoming |= logged
            if routed:
                outbox += routed
        except MemoryError:
            if take_back is not None:
                take_back()
            raise
        values |= sets
        revisions |= numbers
        self._creations = creations
        self._sequence = number
        # The stretch has ended.
        if gate is not None or routed or logged is not None:
            self._tell()

    def _tell(self) -> None:
        """Arrange that the events of a commit are passed on, or are committed first."""
        if self._gate is not None:
            self._around.snapshot.commit_soon()
        else:
            self._router.wake()

    # ------------------------------------------------------------------------------------------------------ deadlines

    def _place(self, key: str, expires_ms: int, now_ms: int | None) -> bool:
        """Enter a key into the wheel before it gets a deadline. Return whether the next check becomes earlier."""
        if not self._deadlines:
            self._begin_deadlines()
        assert self._wheel is not None  # from then on
        return self._wheel.place(key, expires_ms, self._around.clock.now_ms() if now_ms is None else now_ms)

    def _place_all(self, times: dict[str, int]) -> bool:
        """As `_place`, for several keys."""
        if not self._deadlines:
            self._begin_deadlines()
        assert self._wheel is not None  # from then on
        return self._wheel.place_all(times, self._around.clock.now_ms())

    @abstractmethod
    def _begin_deadlines(self) -> None:
        """Prepare for the first deadline of the scope, which a key is about to get."""

    def _expect(self) -> None:
        """Tell the actor that removes expired keys when to check this scope."""
        due_ms = self.next_due()
        if due_ms < NEVER:
            self._around.expiry.expect(self.scope, due_ms)

    # ---------------------------------------------------------------------------------------------------- no numbers

    def _refuse_writes(self, why: str) -> None:
        """Take no more writes, for the reason `why`. Costs nothing in scopes for which it is not called."""
        self._no_writes = f"scope {self.scope!r} takes no more writes: {why}"
        for name in _COMMITS:
            setattr(self, name, partial(self._refuse_write, name))

    def _accept_writes(self) -> None:
        """Take writes again. From any thread."""
        self._no_writes = ""
        for name in _COMMITS:
            self.__dict__.pop(name, None)

    def refuse_commits(self, refusal: Callable[[], Exception]) -> None:
        """Raise `refusal()` wherever a turn, even a running one, would change the scope. Permanent. From any thread."""
        for name in _COMMITS:
            setattr(self, name, partial(_raise, refusal))

    def _refuse_write(self, name: str, *what: Any) -> NoReturn:
        """Replaces the methods that commit."""
        deletes = name == "_remove" or (name == "_write" and what[2] is None)
        raise StorageError(self._no_writes, code="DELETE_ERROR" if deletes else "SET_ERROR")


def _raise(refusal: Callable[[], Exception], *_: Any) -> NoReturn:
    raise refusal()


class _Changes:
    """What a set of changes adds to each table, and removes from it."""

    __slots__ = (
        "answers",
        "created",
        "created_numbers",
        "dirty",
        "gone",
        "logged",
        "new_times",
        "numbers",
        "removed",
        "routed",
        "times",
        "untimed",
        "values",
    )

    def __init__(self) -> None:
        self.created: dict[str, bytes] = {}
        self.created_numbers: dict[str, int] = {}
        self.values: dict[str, bytes] = {}
        """Of keys that exist, as in the next two tables."""
        self.numbers: dict[str, int] = {}
        self.times: dict[str, int] = {}
        """Of keys that have a deadline."""
        self.new_times: dict[str, int] = {}
        self.gone: list[str] = []
        self.untimed: list[str] = []
        """Keys that no longer have a deadline."""
        self.removed: dict[int, None] = {}
        self.dirty: dict[str, None] = {}
        self.answers: dict[str, Answer] = {}
        self.routed: list[Prepared] = []
        self.logged: dict[int, StateEvent] = {}

    def set_deadline(self, deadlines: dict[str, int], key: str, expires_ms: int | None) -> None:
        """Give a key a deadline, or none."""
        if key in deadlines:
            if expires_ms is None:
                self.untimed.append(key)
            else:
                self.times[key] = expires_ms
        elif expires_ms is not None:
            self.new_times[key] = expires_ms


def remover(*tables: tuple[dict[Any, Any], Iterable[Any]]) -> Callable[[], object]:
    """Return a function that removes the existing keys from each table in one step, without allocating memory."""
    steps = chain(*[map(table.pop, [*keys], repeat(None)) for table, keys in tables if keys])
    return partial(deque[object](maxlen=0).extend, steps)
