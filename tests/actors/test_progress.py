"""How far a consumer is: whatever happens and whenever it ends, nothing is lost, and what is saved is not repeated."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scopestate.actors import progress as tested
from scopestate.actors.consuming import Outcome
from scopestate.actors.journal import ConsumerChange, Pending, SavedConsumer
from scopestate.actors.progress import Progress
from scopestate.ops.results import StateEvent


def event(position: int) -> StateEvent:
    return StateEvent("state:updated", "s", "k", b"1", b"2", position, position=position)


class Disk:
    """What a store keeps of a consumer, by the rules of `ConsumerChange`."""

    def __init__(self) -> None:
        self.done = 0
        self.acked: set[int] = set()
        self.pending: dict[int, Pending] = {}
        self.letters: list[int] = []

    def write(self, change: ConsumerChange) -> None:
        held = {one.position for one in change.pending if one.held}
        for one in change.pending:
            self.pending[one.position] = one
        for position in [*change.acked, *(one.event.position for one in change.letters)]:
            if position in held:
                continue
            self.pending.pop(position, None)
            self.acked.add(position)
        self.letters += [one.event.position for one in change.letters]
        assert change.done >= self.done
        self.done = change.done
        self.acked = {position for position in self.acked if position > self.done}

    def acknowledge(self, position: int) -> None:
        self.write(ConsumerChange(1, self.done, [position]))

    def open(self, events: set[int]) -> set[int]:
        return {one for one in events if (one > self.done and one not in self.acked) or one in self.pending}

    def consumer(self) -> SavedConsumer:
        return SavedConsumer(1, "c", "", 0, None, self.done, set(self.acked), dict(self.pending), {}, len(self.letters))


class AgainstADisk(RuleBasedStateMachine):
    """Positions are settled in order, and fetched in any order above what is settled."""

    @initialize(many=st.sampled_from([0, 3, 1000]))
    def begin(self, many: int) -> None:
        tested.MANY = many  # type: ignore[misc]  # so that each of the two ways of saving is taken
        self.disk = Disk()
        self.position = 0
        self.events: set[int] = set()
        self.over: set[int] = set()
        self.joined: set[int] = set()
        self.held: set[int] = set()
        self.start()

    def start(self) -> None:
        self.progress = Progress(self.disk.consumer())
        self.open = set(self.progress.pending_at_start())
        for position in sorted(self.open):
            assert self.progress.held(event(position)).event.position == position
        self.fetched = set(self.open)
        self.joined = set()
        self.held = {position for position, pending in self.disk.pending.items() if pending.held}
        self.unsaved: ConsumerChange | None = None

    @rule(count=st.integers(1, 4))
    def write(self, count: int) -> None:
        self.events |= set(range(self.position + 1, self.position + count + 1))
        self.position += count

    @rule(data=st.data(), wanted=st.booleans())
    def fetch(self, data: st.DataObject, wanted: bool) -> None:
        left = sorted(self.events - self.fetched - self.over)
        if not left:
            return
        position = data.draw(st.sampled_from(left[:3]))
        if wanted:
            if self.progress.fetched(position):
                self.fetched.add(position)
                self.open.add(position)
            else:
                # It was over before the restart.
                assert position not in self.disk.open(self.events)
                self.over.add(position)
        else:
            self.progress.passed(position)
            self.over.add(position)
            self.events.discard(position)

    @rule()
    def settle(self) -> None:
        unknown = self.events - self.fetched - self.over
        self.progress.reach(min(unknown) - 1 if unknown else self.position)

    @precondition(lambda self: self.open - self.held)
    @rule(data=st.data(), verdict=st.sampled_from(["done", "done", "retry", "dead", "held"]))
    def end(self, data: st.DataObject, verdict: str) -> None:
        position = data.draw(st.sampled_from(sorted(self.open - self.held)))
        if verdict == "held" and position not in self.joined:
            self.held.add(position)
        self.progress.end(Outcome(position, verdict, 1, 1, 1, "e", "t", event(position)), 9)  # type: ignore[arg-type]
        if position not in self.joined and verdict in ("done", "dead"):
            self.open.discard(position)
            self.over.add(position)

    @precondition(lambda self: self.open - self.joined - self.held)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        position = data.draw(st.sampled_from(sorted(self.open - self.joined - self.held)))
        self.progress.join(position)
        self.joined.add(position)

    @precondition(lambda self: self.joined)
    @rule(data=st.data(), works=st.booleans())
    def commit(self, data: st.DataObject, works: bool) -> None:
        position = data.draw(st.sampled_from(sorted(self.joined)))
        self.joined.discard(position)
        if works:
            self.disk.acknowledge(position)
            self.progress.joined_is_saved(position)
            self.open.discard(position)
            self.over.add(position)
        else:
            self.progress.part(position)

    @rule(works=st.booleans())
    def save(self, works: bool) -> None:
        change = self.progress.change()
        if change is not None and works:
            self.disk.write(change)
            self.progress.saved(change)

    @precondition(lambda self: self.joined)
    @rule()
    def save_with_a_transaction(self) -> None:
        """The acknowledgement of a transaction is in the same save, and is written first."""
        change = self.progress.change()
        position = min(self.joined)
        self.disk.acknowledge(position)
        if change is not None:
            self.disk.write(change)
            self.progress.saved(change)
        self.progress.joined_is_saved(position)
        self.joined.discard(position)
        self.open.discard(position)
        self.over.add(position)

    @rule()
    def collect_and_end(self) -> None:
        """An outcome comes while a save is being written."""
        change = self.progress.change()
        ended = sorted(self.open - self.joined - self.held)[:1]
        for position in ended:
            self.progress.end(Outcome(position, "done"), 9)
            self.open.discard(position)
            self.over.add(position)
        if change is not None:
            self.disk.write(change)
            self.progress.saved(change)

    @rule()
    def crash(self) -> None:
        again = self.disk.open(self.events)
        self.over = self.events - again
        self.start()

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.events - self.over <= self.disk.open(self.events)

    @invariant()
    def a_save_saves_all(self) -> None:
        if self.progress.unsaved() == 0 and self.progress.change() is None:
            assert self.disk.open(self.events) - self.open - (self.events - self.fetched) == set()


TestAgainstADisk = AgainstADisk.TestCase
TestAgainstADisk.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def test_a_transaction_behind_a_failed_attempt_is_saved_with_it_and_the_delivery_is_over() -> None:
    disk, progress = Disk(), Progress(SavedConsumer(1, "c", "", 0, None, 0, set(), {}, {}, 0))
    progress.fetched(1)
    progress.end(Outcome(1, "retry", 1, 1, 1, "e", "t", event(1)), 9)
    progress.join(1)

    change = progress.change()
    disk.acknowledge(1)
    if change is not None:
        disk.write(change)
        progress.saved(change)
    progress.joined_is_saved(1)

    assert disk.open({1}) == set()


def test_a_delivery_that_was_begun_waits_for_the_events_before_it_that_were_not_saved_as_over() -> None:
    """Killed when event 7 was over and not saved, and a failed attempt of event 17, of the same key perhaps, was."""
    progress = Progress(SavedConsumer(1, "c", "", 0, None, 5, set(), {17: Pending(17, attempts=1)}, {}, 0))

    assert progress.pending_at_start() == []
    assert [position for position in (7, 17) if progress.fetched(position)] == [7, 17]
    assert progress.held(event(17)).attempts == 1


def test_a_delivery_that_was_begun_and_is_not_on_its_page_is_asked_for() -> None:
    progress = Progress(SavedConsumer(1, "c", "", 0, None, 5, set(), {17: Pending(17, attempts=1)}, {}, 0))

    progress.reach(20)

    assert progress.overlooked() == [17]


def test_a_save_names_each_delivery_that_is_over_so_that_no_attempt_of_it_is_kept() -> None:
    progress = Progress(SavedConsumer(1, "c", "", 0, None, 5, set(), {}, {}, 0))
    for position in (6, 7):
        progress.fetched(position)
    progress.reach(7)
    progress.join(6)
    progress.joined_is_saved(6)
    progress.end(Outcome(7, "done"), 0)

    change = progress.change()

    assert change is not None
    assert (change.done, list(change.acked), list(change.over)) == (7, [], [6, 7])
    progress.saved(change)
    progress.fetched(8)
    progress.reach(8)
    progress.end(Outcome(8, "done"), 0)
    following = progress.change()
    assert following is not None
    assert list(following.over) == [8]
