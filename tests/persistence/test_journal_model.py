"""Random histories of the journal of a file store, restarts and crashes included, against lists and dicts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from stored import crash

from scopestate.actors.journal import ConsumerChange, History, Letter, Pending, Rules, SavedConsumer
from scopestate.errors import StorageError
from scopestate.ops.results import EventType, StateEvent
from scopestate.persistence import FileAdapter, ScopeChange

MEMORY = Path("/dev/shm")
NOW_MS = 1_800_000_000_000
SCOPES = ("a", "ab", "b")
scopes = st.sampled_from(SCOPES)
keys = st.sampled_from(["k", "\x00", "é", ""])
documents = st.sampled_from([b"null", b'{"a":[1,"],["]}', b'"\xc3\xa9"', b"[[],[]]"])


def fields(event: StateEvent) -> tuple[object, ...]:
    """Everything that an event is, for comparing."""
    return tuple(getattr(event, name) for name in event.__struct_fields__)


def revision_of(change: StateEvent | int) -> int:
    return change if isinstance(change, int) else change.revision


class Cursor(NamedTuple):
    """Where a watcher of one scope was."""

    epoch: int
    position: int
    scope: str
    revision: int


class Scope:
    """One scope as an engine has it in memory, and what is saved of it."""

    def __init__(self) -> None:
        self.revision = self.saved = 0
        self.since: int | None = None
        """Behind this revision each change is logged; None: the scope is not fed."""
        self.unsaved: list[StateEvent | int] = []
        """Changes: events, or numbers of those that are not logged."""
        self.changes: list[StateEvent | int] = []
        """The same of what is saved."""


class JournalMachine(RuleBasedStateMachine):
    """An engine that numbers changes, saves them, and keeps consumers; the store must tell what it was told."""

    def __init__(self) -> None:
        super().__init__()
        # In memory if there is such a place: nothing here is about syncing.
        self.directory = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.scopes = {name: Scope() for name in SCOPES}
        self.consumers: dict[int, SavedConsumer] = {}
        self.letters: dict[tuple[int, int], Letter] = {}
        self.wants: dict[int, frozenset[str]] = {}
        self.history = {"ab": History(3, 0, 0)}
        self.cursors: list[Cursor] = []
        self.lost: set[Cursor] = set()
        """Cursors behind a change that a crash took back."""
        self.unsure: set[Cursor] = set()
        """Cursors behind a position that was not noted before a crash."""
        self.now_ms = NOW_MS
        self.open()

    def open(self) -> None:
        self.adapter = FileAdapter(self.directory)
        self.journal = self.adapter.journal
        self.adapter.clock_ms = self.now_ms
        self.position = self.journal.first
        for name, scope in self.scopes.items():
            scope.revision = self.adapter.load(name).revision
            scope.since, scope.unsaved = None if name == "b" else scope.revision, []
        self.give_rules()

    def give_rules(self) -> None:
        history, wants = dict(self.history), dict(self.wants)
        self.journal.rules = Rules(history.get, lambda scope: [number for number in wants if scope in wants[number]])

    # ------------------------------------------------------------------------------------------------------- writing

    @rule(
        name=scopes,
        writes=st.lists(st.tuples(keys, st.none() | documents, st.none() | documents), min_size=1, max_size=8),
        expired=st.booleans(),
    )
    def write(self, name: str, writes: list[tuple[str, bytes | None, bytes | None]], expired: bool) -> None:
        """Change keys as one transaction, in a scope that is fed or not."""
        scope = self.scopes[name]
        last = scope.revision + len(writes)
        for key, old, new in writes:
            scope.revision += 1
            if scope.since is None:
                scope.unsaved.append(scope.revision)
                continue
            self.position += 1
            kind: EventType = "state:deleted"
            if new is not None:
                kind = "state:created" if old is None else "state:updated"
            late = (1, 2) if new is None and expired else (None, None)
            scope.unsaved.append(
                StateEvent(
                    "state:expired" if late[0] else kind,
                    name,
                    key,
                    old,
                    new,
                    scope.revision,
                    3,
                    *late,
                    last,
                    self.now_ms,
                    self.position,
                )
            )

    @rule(name=scopes)
    def feed(self, name: str) -> None:
        """The scope is fed from now on, or no more."""
        scope = self.scopes[name]
        scope.since = scope.revision if scope.since is None else None
        self.position += 1

    @rule(name=scopes)
    def look(self, name: str) -> None:
        """A watcher of a fed scope has seen everything up to here."""
        scope = self.scopes[name]
        if scope.since is not None:
            self.cursors.append(Cursor(self.journal.epoch, self.position, name, scope.revision))

    @rule(names=st.sets(scopes, min_size=1), later_ms=st.integers(0, 5000))
    def save(self, names: set[str], later_ms: int) -> None:
        """Save some of the scopes."""
        self.now_ms += later_ms
        self.save_all(sorted(names), [])

    def save_all(self, names: list[str], consumers: list[ConsumerChange]) -> None:
        batch = []
        for name in names:
            scope = self.scopes[name]
            log = [one for one in scope.unsaved if isinstance(one, StateEvent)]
            batch.append(
                ScopeChange(
                    name,
                    scope.revision,
                    {},
                    log=log,
                    logged_since=scope.since,
                )
            )
        open_ = [
            one.position
            for name, scope in self.scopes.items()
            if name not in names
            for one in scope.unsaved
            if isinstance(one, StateEvent)
        ]
        self.adapter.clock_ms = self.now_ms
        self.journal.given = self.position
        self.journal.settled = max(min([self.position + 1, *open_]) - 1, self.journal.settled)
        self.adapter.save(batch, consumers)
        for name in names:
            scope = self.scopes[name]
            scope.changes += scope.unsaved
            scope.saved, scope.unsaved = scope.revision, []

    # ----------------------------------------------------------------------------------------------------- consumers

    @rule(wanted=st.frozensets(scopes, min_size=1), behind=st.integers(0, 3))
    def create(self, wanted: frozenset[str], behind: int) -> None:
        name = f"c{len(self.consumers)}{len(self.letters)}"
        if any(one.name == name for one in self.consumers.values()):
            with pytest.raises(ValueError, match=name):
                self.journal.create_consumer(name, "", 0, self.now_ms)
            return
        made = self.journal.create_consumer(name, "{}", max(self.journal.settled - behind, 0), self.now_ms)
        assert made.number not in self.consumers
        self.consumers[made.number] = made
        self.wants[made.number] = wanted
        self.give_rules()

    @rule(data=st.data())
    def handle(self, data: st.DataObject) -> None:
        """A consumer has done with some events, and others are tried again, or given up."""
        if not self.consumers:
            return
        consumer = self.consumers[data.draw(st.sampled_from(sorted(self.consumers)))]
        events = [
            event
            for event in self.journal.read(0)
            if event.scope in self.wants[consumer.number]
            and event.position <= self.journal.settled
            and (event.position > consumer.done or event.position in consumer.pending)
            and event.position not in consumer.acked
            and (consumer.number, event.position) not in self.letters
        ]
        change = ConsumerChange(consumer.number)
        acked, pending, letters = [], [], []
        for event in events:
            position = event.position
            match data.draw(st.sampled_from(["leave", "done", "retry", "dead", "held"])):
                case "done":
                    acked.append(position)
                case "retry":
                    pending.append(Pending(position, 3, 4, self.now_ms, "boo"))
                case "dead" | "held" as verdict:
                    letters.append(Letter(0, consumer.number, event, 5, 6, self.now_ms, "err", "trace"))
                    if verdict == "held":
                        pending.append(Pending(position, 5, 6, 0, "err", held=True))
        for one in pending:
            consumer.pending[one.position] = one
            consumer.acked.discard(one.position)
        over = {*acked, *(letter.event.position for letter in letters)} - {one.position for one in pending if one.held}
        open_ = {event.position for event in events} - over
        change.acked, change.pending, change.letters = acked, pending, letters
        change.done = max(min([self.journal.settled + 1, *(open_ - consumer.pending.keys())]) - 1, consumer.done)
        consumer.done = change.done
        consumer.acked = {position for position in consumer.acked | over if position > consumer.done}
        for position in over:
            consumer.pending.pop(position, None)
        for letter in letters:
            self.letters[consumer.number, letter.event.position] = letter
        self.save_all([], [change])

    @rule(every=st.booleans(), reset=st.booleans(), purge=st.booleans())
    def act_on_letters(self, every: bool, reset: bool, purge: bool) -> None:
        found = self.journal.letters()
        ids = None if every else [letter.id for letter in found[::2]] + [10**6]
        chosen = [(letter.consumer, letter.event.position) for letter in (found if every else found[::2])]
        if purge:
            count, released = self.journal.purge(ids)
            assert count == len(chosen)
            assert released == sorted(one for one in chosen if one[1] in self.consumers[one[0]].pending)
        else:
            replayed = self.journal.replay(ids, reset=reset)
            assert [(number, one.position) for number, one in replayed] == chosen
        for number, position in chosen:
            consumer, letter = self.consumers[number], self.letters.pop((number, position))
            if not purge:
                consumer.acked.discard(position)
                consumer.pending[position] = Pending(position) if reset else Pending(position, 5, 6, 0, letter.error)
            elif consumer.pending.pop(position, None) is not None and position > consumer.done:
                consumer.acked.add(position)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        if not self.consumers:
            return
        number = data.draw(st.sampled_from(sorted(self.consumers)))
        self.journal.forget_consumer(number)
        del self.consumers[number], self.wants[number]
        self.letters = {of: letter for of, letter in self.letters.items() if of[0] != number}
        self.give_rules()

    @rule(why=st.none() | st.just("tired"))
    def pause(self, why: str | None) -> None:
        for consumer in self.consumers.values():
            self.journal.pause_consumer(consumer.number, why)
            consumer.paused = why

    # ------------------------------------------------------------------------------------------ rules, ends, failures

    @rule(
        name=scopes, rule=st.none() | st.builds(History, st.integers(1, 6), st.integers(0, 3000), st.integers(0, 900))
    )
    def keep(self, name: str, rule: History | None) -> None:
        self.history.pop(name, None)
        if rule is not None:
            self.history[name] = rule
        self.give_rules()

    @rule()
    def trim(self) -> None:
        self.journal.trim()

    @rule()
    def fail(self) -> None:
        """A save fails after everything was written."""
        self.journal.given = self.position
        consumers = [ConsumerChange(number, done=self.position, acked=[1]) for number in self.consumers]
        with pytest.raises(StorageError):
            self.adapter.save(
                [
                    ScopeChange("b", self.scopes["b"].revision, {}, logged_since=self.scopes["b"].since),
                    ScopeChange("b", 2**53, {}),
                ],
                consumers,
            )

    @rule()
    def restart(self) -> None:
        self.save_all([name for name in SCOPES if self.scopes[name].unsaved], [])
        self.journal.given = self.journal.settled = self.position
        self.adapter.close()
        self.open()

    @rule()
    def die(self) -> None:
        for cursor in self.cursors:
            scope = self.scopes[cursor.scope]
            if scope.unsaved and revision_of(scope.unsaved[0]) <= cursor.revision:
                self.lost.add(cursor)
            if cursor.epoch == self.journal.epoch and cursor.position > self.journal.settled:
                self.unsure.add(cursor)
        crash(self.adapter)
        self.open()

    # ------------------------------------------------------------------------------------------------------- promises

    @invariant()
    def consumers_are_as_they_were_saved(self) -> None:
        dead = dict.fromkeys(self.consumers, 0)
        for number, _ in self.letters:
            dead[number] += 1
        for number, consumer in self.consumers.items():
            consumer.dead = dead[number]
        assert self.journal.consumers() == sorted(self.consumers.values(), key=lambda one: one.name)
        found = {(letter.consumer, letter.event.position): letter for letter in self.journal.letters()}
        assert found.keys() == self.letters.keys()
        for of, letter in found.items():
            expected = self.letters[of]
            assert fields(letter.event) == fields(expected.event)
            assert (letter.attempts, letter.first_ms, letter.died_ms) == (5, 6, expected.died_ms)
            assert (letter.error, letter.traceback) == ("err", "trace")
            assert self.journal.letter(letter.id) is not None

    @invariant()
    def what_is_needed_is_there_and_as_it_was(self) -> None:
        known = {
            one.position: one for scope in self.scopes.values() for one in scope.changes if isinstance(one, StateEvent)
        }
        found = self.journal.read(0)
        assert [event.position for event in found] == sorted(event.position for event in found)
        for event in found:
            assert fields(event) == fields(known[event.position])
        there = {event.position for event in found}
        for consumer in self.consumers.values():
            assert there >= consumer.pending.keys()
        size = self.journal.size()
        assert (size.events, size.oldest, size.newest) == (len(there), min(there, default=0), max(there, default=0))

    @invariant()
    def a_cursor_leads_on_without_a_gap_or_says_so(self) -> None:
        found = self.journal.read(0)
        for cursor in self.cursors:
            scope = self.scopes[cursor.scope]
            behind = [one for one in scope.changes if revision_of(one) > cursor.revision]
            of_scope = self.journal.gone_in_scope(cursor.scope, cursor.revision)
            of_many = self.journal.gone(cursor.epoch, cursor.position, scope=cursor.scope)
            if cursor in self.unsure:
                assert of_many == "lost in a crash"
            else:
                assert of_many in (None, "trimmed")
            if cursor in self.lost:
                assert of_scope is not None
                continue
            assert of_scope in (None, "trimmed")
            logged = [fields(one) for one in behind if isinstance(one, StateEvent)]
            if of_scope is None:
                assert len(logged) == len(behind)
                assert [fields(one) for one in self.journal.read_scope(cursor.scope, cursor.revision)] == logged
            if of_many is None:
                assert len(logged) == len(behind)
                events = [event for event in found if event.scope == cursor.scope]
                assert [fields(one) for one in events if one.position > cursor.position] == logged

    def teardown(self) -> None:
        assert self.adapter.check() == []
        self.adapter.close()
        shutil.rmtree(self.directory)


TestJournal = JournalMachine.TestCase
TestJournal.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
