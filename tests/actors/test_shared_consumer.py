"""One consumer for several engines: which of them gets which event, and what becomes of what they hold."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from scopestate.actors.consuming import Held, Outcome, Verdict
from scopestate.actors.holders import Holder
from scopestate.actors.pace import MOST_AHEAD
from scopestate.actors.shared_consumer import ENDED, HERE, SharedConsumer
from scopestate.errors import StorageError, Unsupported
from scopestate.ops.results import StateEvent
from scopestate.ops.triggers import Order, Trigger


class Events:
    """What a consumer of the journal is to a shared one, in lists."""

    name = "ship"
    number = 1

    def __init__(self) -> None:
        self.reading = threading.Lock()
        self.forgotten = False
        self.waiting: list[Held] = []
        self.known: dict[int, Held] = {}
        self.open: dict[int, Held] = {}
        self.over: list[int] = []
        self.noted: list[tuple[int, int]] = []
        self.outcomes: list[Outcome] = []
        self.failed: list[int] = []
        self.why: str | None = None
        self.trigger: Trigger | None = None
        self.is_alone = False

    def put(self, *keys: str, order: str = "orders") -> None:
        for key in keys:
            position = len(self.known) + 1
            event = StateEvent("state:created", order, key, None, b"1", position, position=position)
            self.known[position] = Held(event)
            self.waiting.append(self.known[position])

    def read(self, most: int) -> list[Held]:
        found, self.waiting = self.waiting[:most], self.waiting[most:]
        self.open.update((one.event.position, one) for one in found)
        return found

    def open_items(self) -> list[Held]:
        return list(self.open.values())

    def claim(self, positions: Sequence[int]) -> list[Held]:
        found = [one for one in self.waiting if one.event.position in positions]
        self.waiting = [one for one in self.waiting if one.event.position not in positions]
        self.open.update((one.event.position, one) for one in found)
        return found

    def take(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes += outcomes
        for one in outcomes:
            if one.verdict in ("done", "dead"):
                self.over.append(one.position)
                del self.open[one.position]

    def note(self, attempts: Sequence[tuple[int, int]]) -> None:
        self.noted += attempts

    def follow(self, trigger: Trigger) -> None:
        self.trigger = trigger

    def transaction(self, position: int, scope: str) -> Any:
        return ((self.number, position),)

    def transaction_failed(self, position: int) -> None:
        self.failed.append(position)

    def full(self, letters: int) -> bool:
        return False

    def flush(self) -> None:
        pass

    def is_acknowledged(self, position: int) -> bool:
        return position not in self.open

    def paused(self) -> str | None:
        return self.why

    def is_read_to(self, mark: int) -> bool:
        return all(one.event.position > mark for one in self.waiting)

    def end_sharing(self) -> None:
        self.is_alone = True


class Engine:
    """One engine that takes events, and what it was told."""

    def __init__(self, shared: SharedConsumer, name: str, since: int = 0, **options: Any) -> None:
        self.shared = shared
        self.lost: list[int] = []
        self.woken = 0
        trigger = Trigger(f"t-{name}", "f", durable="ship", **{"order": "key", "concurrency": 4, **options})
        self.holder = Holder(name, trigger, since, self._wake, self.lost.extend, lambda: 0.0)
        self.gone = shared.join(self.holder)

    def _wake(self) -> None:
        self.woken += 1

    def fetch(self, most: int = 100) -> list[int]:
        return [one.event.position for one in self.shared.fetch(self.holder, most)]

    def begin(self, *positions: int, attempt: int = 1, serial: int = 7) -> list[int]:
        return self.shared.began(self.holder, [(position, attempt) for position in positions], serial)

    def end(self, *positions: int, verdict: Verdict = "done", **more: Any) -> None:
        self.shared.ended(self.holder, [Outcome(position, verdict, **more) for position in positions])


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def shared(events: Events) -> SharedConsumer:
    return SharedConsumer(events, lambda: 1_000_000, lambda: 0.0)


def test_the_engine_that_has_an_event_of_a_key_gets_the_later_ones(events: Events, shared: SharedConsumer) -> None:
    one, two = Engine(shared, "one"), Engine(shared, "two")
    events.put("a", "a", "b", "a", "b", "c")
    assert one.fetch(2) == [1, 2]
    assert two.fetch() == [3, 5, 6]  # 4 is of the first one's key
    assert one.fetch() == []
    one.end(1)
    assert one.fetch() == two.fetch() == []
    one.end(2)
    assert two.woken > 0
    assert two.fetch() == [4]
    two.end(3, 4, 5, 6)
    assert sorted(events.over) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("order", "given"), [("none", [3, 4, 5, 6]), ("scope", []), ("trigger", []), ("key", [3, 4, 5, 6])]
)
def test_the_order_says_what_waits(events: Events, shared: SharedConsumer, order: Order, given: list[int]) -> None:
    one, two = Engine(shared, "one", order=order), Engine(shared, "two", order=order)
    events.put("a", "b", "c", "d", "e", "f")
    assert one.fetch(2) == [1, 2]
    assert two.fetch() == given
    one.end(1, 2)
    assert two.fetch() == ([] if given else [3, 4, 5, 6])


def test_an_engine_is_given_what_it_handles_side_by_side(events: Events, shared: SharedConsumer) -> None:
    one, two = Engine(shared, "one"), Engine(shared, "two")
    events.put(*"abcdefgh")
    assert one.fetch() == [1, 2, 3, 4]
    assert one.fetch() == []
    assert two.fetch() == [5, 6, 7, 8]
    one.end(1, verdict="retry", attempts=1, due_ms=2_000_000)
    events.put("i", "j")
    assert one.fetch() == [9, 10]  # what waits takes no room, and what has just ended makes some


def test_what_waits_for_its_lane_takes_no_room(events: Events, shared: SharedConsumer) -> None:
    one, two = (Engine(shared, name, order="scope", concurrency=2) for name in ("one", "two"))
    events.put(*"abcdef")
    events.put("a", order="others")
    events.put("a", order="more")
    assert one.fetch() == [1, 2, 3, 4, 5, 6, 7]
    assert two.fetch() == [8]
    one.end(7)
    events.put("b", order="others")
    assert one.fetch() == [9]


def test_what_an_engine_holds_is_bounded_within_its_lanes_too(events: Events, shared: SharedConsumer) -> None:
    one = Engine(shared, "one", order="scope", concurrency=2)
    events.put(*map(str, range(1000)))
    assert len(one.fetch(1000)) == MOST_AHEAD + 2
    assert one.fetch(1000) == []


def test_what_follows_in_a_lane_is_given_to_its_engine_while_another_may_have_room(
    events: Events, shared: SharedConsumer
) -> None:
    one, two = (Engine(shared, name, order="scope", concurrency=2) for name in ("one", "two"))
    events.put("a", "b")
    assert one.fetch() == [1, 2]
    events.put("c")
    events.put("a", order="others")
    assert two.fetch() == [4]
    one.end(1, 2)
    assert two.fetch() == [3]
    two.end(3, verdict="retry", attempts=1)
    assert (two.holder.lanes, two.holder.active) == (1, 1)
    two.begin(3, attempt=2)
    assert (two.holder.lanes, two.holder.active) == (2, 2)
    two.end(3, 4)
    assert (two.holder.lanes, two.holder.active) == (0, 0)


def test_a_pause_holds_back_its_key_and_no_other(events: Events, shared: SharedConsumer) -> None:
    one, two = Engine(shared, "one"), Engine(shared, "two")
    events.put("a", "b")
    assert one.fetch(1) == [1]
    one.begin(1)
    one.end(1, verdict="retry", attempts=1, due_ms=2_000_000)
    events.put("a", "c")
    assert two.fetch() == [2, 4]
    assert one.fetch() == []
    one.begin(1, attempt=2)
    one.end(1)
    assert one.fetch() == [3]


def test_what_an_engine_held_is_given_to_another_in_order_with_its_attempts(
    events: Events, shared: SharedConsumer
) -> None:
    one, two = Engine(shared, "one"), Engine(shared, "two")
    events.put("a", "a", "b")
    assert one.fetch() == [1, 2, 3]
    one.begin(1, attempt=3)
    events.put("a")
    assert two.fetch() == []
    shared.leave("one")
    found = shared.fetch(two.holder, 100)
    assert [one.event.position for one in found] == [1, 2, 4, 3]
    assert [(one.attempts, one.cut_off) for one in found] == [(3, True), (0, False), (0, False), (0, False)]
    one.end(1)
    assert events.over == []  # it does not hold it any more
    assert one.begin(2) == [2]
    assert one.fetch() == []


def test_an_engine_that_retires_ends_what_it_handles(events: Events, shared: SharedConsumer) -> None:
    one, two = Engine(shared, "one"), Engine(shared, "two")
    events.put("a", "a", "b")
    assert one.fetch() == [1, 2, 3]
    one.begin(1)
    shared.retire("one")
    assert sorted(one.lost) == [2, 3]
    assert two.fetch() == [3]
    one.end(1)
    assert two.fetch() == [2]
    assert shared.holder("one") is None


def test_an_engine_that_retires_is_given_nothing_more(events: Events, shared: SharedConsumer) -> None:
    one, two = Engine(shared, "one"), Engine(shared, "two")
    events.put("a", "b")
    items = shared.fetch(one.holder, 2)
    shared.keep(one.holder, items[1:])
    one.begin(1)
    shared.retire("one")
    assert one.fetch() == []
    assert two.fetch() == [2]


def test_an_engine_that_is_back_keeps_what_it_names(events: Events, shared: SharedConsumer) -> None:
    one, two = Engine(shared, "one"), Engine(shared, "two")
    events.put("a", "b", "c")
    assert one.fetch() == [1, 2, 3]
    one.begin(1)
    again = Engine(shared, "two")
    assert again.gone == []
    back = Holder("one", one.holder.trigger, 0, one._wake, one.lost.extend, lambda: 0.0)
    assert shared.join(back, [(1, 1, 7), (2, 0, 0), (9, 1, 7)]) == [9]
    assert again.fetch() == [3]  # whose answer was lost
    shared.ended(back, [Outcome(1, "done"), Outcome(2, "done")])
    assert sorted(events.over) == [1, 2]
    assert two.fetch() == []


def test_what_ran_in_the_session_before_waits_for_its_engine(events: Events, shared: SharedConsumer) -> None:
    shared.expect_claims()
    events.put("a", "a", "b")
    for position in (1, 3):
        events.known[position].cut_off, events.known[position].attempts = True, 1
    two = Engine(shared, "two")
    assert two.fetch() == []
    one = Holder("one", two.holder.trigger, 0, lambda: None, lambda lost: None, lambda: 0.0)
    assert shared.join(one, [(1, 1, 7)]) == []
    shared.ended(one, [Outcome(1, "done")])
    assert two.fetch() == [2]
    shared.end_claims()
    found = shared.fetch(two.holder, 100)
    assert [(one.event.position, one.attempts, one.cut_off) for one in found] == [(3, 1, True)]


def test_nothing_overtakes_what_ran_in_the_session_before(events: Events, shared: SharedConsumer) -> None:
    shared.expect_claims()
    events.put("a", "a", "a", "a", order="orders")
    events.known[2].cut_off, events.known[2].attempts = True, 1
    one = Engine(shared, "one")
    assert one.fetch() == [1]  # 2 is in the lane of 1, and may be running elsewhere
    one.end(1)
    assert one.fetch() == []
    shared.end_claims()
    assert one.fetch() == [2, 3, 4]


def test_what_is_claimed_goes_back_into_its_place(events: Events, shared: SharedConsumer) -> None:
    shared.expect_claims()
    events.put("a", "a", "a", "a")
    for position in (1, 3):
        events.known[position].cut_off, events.known[position].attempts = True, 1
    one = Engine(shared, "one")
    assert one.fetch() == []
    shared.end_claims()
    assert one.fetch() == [1, 2, 3, 4]


def test_an_engine_keeps_what_is_running_and_gets_the_rest_in_order(events: Events, shared: SharedConsumer) -> None:
    events.put("a", "a", "a", "a", "a")
    two = Engine(shared, "two")
    assert two.fetch(2) == [1, 2]
    one = Holder("one", two.holder.trigger, 0, lambda: None, lambda lost: None, lambda: 0.0)
    # It has them from the owner before. 4 was not begun, and 3 is not read yet; 5 has ended.
    assert shared.join(one, [(4, 0, 0), (5, ENDED, 3)]) == [4]
    assert two.fetch() == []
    shared.ended(one, [Outcome(5, "done")])
    two.end(1, 2)
    assert two.fetch() == [3, 4]
    assert events.over == [5, 1, 2]


def test_what_was_not_begun_is_kept_if_it_is_next(events: Events, shared: SharedConsumer) -> None:
    events.put("a", "a", "a", "b")
    two = Engine(shared, "two")
    assert two.fetch() == [1, 2, 3, 4]
    two.begin(1)
    shared.leave("two")
    back = Engine(shared, "three")
    shared.leave("three")
    named = [(3, 0, 0), (1, 1, 9), (2, 0, 0)]
    assert shared.join(back.holder, named) == []  # all three, in whichever order it names them
    assert back.fetch() == [4]
    shared.leave("three")
    assert shared.join(back.holder, [(2, 0, 0), (3, 0, 0)]) == [2, 3]  # 1 comes before them
    assert back.fetch() == [1, 2, 3, 4]


def test_a_lane_with_events_of_two_engines_is_open_to_none(events: Events, shared: SharedConsumer) -> None:
    events.put("a", "a", "a")
    one, two = Engine(shared, "one"), Engine(shared, "two")
    shared.join(one.holder, [(1, 1, 1)])  # each was running one when the owner before ended
    shared.join(two.holder, [(2, 1, 1)])
    assert one.fetch() == two.fetch() == []
    one.end(1)
    assert one.fetch() == []
    assert two.fetch() == []
    two.end(2)
    assert one.fetch() == [3]


def test_the_newest_filters_count_and_other_engines_stand_by(events: Events, shared: SharedConsumer) -> None:
    one = Engine(shared, "one", since=1)
    events.put("a", "b")
    assert one.fetch(1) == [1]
    one.begin(1)
    assert one.fetch() == [2]
    two = Engine(shared, "two", since=2, prefix="k")
    assert one.holder.stands_by
    assert one.lost == [2]
    assert one.fetch() == []
    assert events.trigger is two.holder.trigger
    late = Engine(shared, "late", since=0)
    assert late.holder.stands_by
    assert two.fetch() == [2]
    shared.leave("two")
    assert not one.holder.stands_by
    assert events.trigger is one.holder.trigger
    assert one.fetch() == [2]


def test_another_order_sorts_what_is_there_again(events: Events, shared: SharedConsumer) -> None:
    one = Engine(shared, "one", since=1)
    events.put("a", "b", "a")
    assert one.fetch(1) == [1]
    one.begin(1)
    two = Engine(shared, "two", since=2, order="trigger", concurrency=1)
    assert two.fetch() == []
    one.end(1)
    assert two.fetch() == [2]
    two.end(2)
    assert two.fetch() == [3]


def test_a_letter_that_held_back_its_key_is_given_to_the_engine_that_waits(
    events: Events, shared: SharedConsumer
) -> None:
    one, two = Engine(shared, "one"), Engine(shared, "two")
    events.put("a", "a")
    assert one.fetch() == [1, 2]
    one.begin(1)
    one.end(1, verdict="held", attempts=1)
    assert events.outcomes[-1].event is events.known[1].event
    events.waiting.append(Held(events.known[1].event))  # it is replayed
    assert two.fetch() == []
    assert one.woken > 0
    assert one.fetch() == [1]
    shared.lose([1])
    assert one.lost == [1]
    assert one.begin(1) == [1]


def test_nothing_is_given_while_the_consumer_is_paused(events: Events, shared: SharedConsumer) -> None:
    one = Engine(shared, "one")
    events.put("a")
    events.why = "by the program"
    assert one.fetch() == []
    assert shared.is_settled(1)
    events.why = None
    assert not shared.is_settled(1)
    assert one.fetch() == [1]
    assert not shared.is_settled(1)
    one.begin(1)
    one.end(1, verdict="retry", attempts=1, due_ms=1_000_000 + 60_000)
    assert shared.is_settled(1)
    one.begin(1, attempt=2)
    assert not shared.is_settled(1)
    one.end(1)
    assert shared.is_settled(1)


def test_a_transaction_counts_while_its_attempt_runs(events: Events, shared: SharedConsumer) -> None:
    one = Engine(shared, "one")
    events.put("a", "b")
    one.fetch()
    one.begin(1, 2, serial=3)
    fence = shared.fence(one.holder, 1, 3)
    with pytest.raises(Unsupported):
        shared.fence(one.holder, 2, 2)
    one.end(1, verdict="retry", attempts=1)
    assert fence == {"won": "end"}  # it can no longer happen
    assert events.failed == [1]
    with pytest.raises(Unsupported):
        shared.fence(one.holder, 1, 3)

    fence = shared.fence(one.holder, 2, 3)
    fence["won"], fence["changed"] = "turn", "yes"
    del events.open[2]  # and it was saved
    assert shared.resolve(one.holder, 2, 3)
    with pytest.raises(Unsupported):
        shared.fence(one.holder, 2, 3)


def test_what_a_transaction_has_acknowledged_is_not_given_to_another(events: Events, shared: SharedConsumer) -> None:
    one, two = Engine(shared, "one"), Engine(shared, "two")
    events.put("a", "a")
    one.fetch()
    one.begin(1, serial=3)
    fence = shared.fence(one.holder, 1, 3)
    fence["won"], fence["changed"] = "turn", "yes"
    del events.open[1]
    shared.leave("one")
    assert two.fetch() == [2]


def test_this_engine_goes_on_alone_when_the_others_are_gone(events: Events, shared: SharedConsumer) -> None:
    events.put("a", "b")
    here = Holder(HERE, Trigger("t", "f", durable="ship", order="key"), 0, lambda: None, lambda lost: None, lambda: 0.0)
    shared.expect(here)
    shared.begin(events.read(1), {1: 1})
    one = Engine(shared, "one")
    assert one.fetch() == [2]
    assert not events.is_alone
    shared.leave("one")
    assert [held.event.position for held in shared.fetch(here, 100)] == [2]
    assert events.is_alone


@pytest.mark.parametrize("seed", range(60))
def test_any_history_handles_each_event_once_and_in_order(seed: int) -> None:
    """Engines come, go, fail and are back in any order; each does what `DurableHandler` may do."""
    chance = random.Random(seed)
    events = Events()
    shared = SharedConsumer(events, lambda: 1_000_000, lambda: 0.0)
    engines: dict[str, Engine] = {}
    running: dict[str, dict[int, str]] = {}
    held: dict[str, list[Held]] = {}
    names = itertools.count()
    handled: dict[str, list[int]] = {}

    def lose(name: str) -> None:
        lost = set(engines[name].lost)
        engines[name].lost.clear()
        held[name] = [one for one in held[name] if one.event.position not in lost]

    def come() -> None:
        name = f"e{next(names)}"
        engines[name], running[name], held[name] = Engine(shared, name), {}, []

    def go(name: str) -> None:
        shared.leave(name)
        del engines[name], running[name], held[name]

    def begin(name: str) -> None:
        busy = set(running[name].values())
        for one in held[name]:
            key, position = one.event.key, one.event.position
            if key not in busy:
                others = [other for at in running.values() for other in at.values()]
                assert key not in others, f"two engines handle {key}"
                earlier = [p for p, known in events.known.items() if known.event.key == key and p < position]
                assert set(earlier) <= set(handled.get(key, ())), f"{position} of {key} before {earlier}"
                assert engines[name].begin(position, attempt=one.attempts + 1) == []
                running[name][position] = key
                held[name].remove(one)
                return
            busy.add(key)

    def end(name: str) -> None:
        if not running[name]:
            return
        position = chance.choice(list(running[name]))
        key = running[name].pop(position)
        if chance.random() < 0.3:
            one = msgspec.structs.replace(events.known[position], attempts=1)
            held[name].insert(0, one)
            engines[name].end(position, verdict="retry", attempts=1)
        else:
            engines[name].end(position)
            handled.setdefault(key, []).append(position)

    come()
    for _ in range(600):
        name = chance.choice(list(engines))
        lose(name)
        action = chance.random()
        if action < 0.2:
            events.put(*chance.choices("abcdef", k=chance.randrange(4)))
        elif action < 0.25 and len(engines) < 4:
            come()
        elif action < 0.28 and len(engines) > 1:
            go(name)
        elif action < 0.5:
            held[name] += shared.fetch(engines[name].holder, chance.randrange(1, 6))
        elif action < 0.75:
            begin(name)
        else:
            end(name)
    for _ in range(2000):
        for name in list(engines):
            lose(name)
            held[name] += shared.fetch(engines[name].holder, 100)
            begin(name)
            end(name)
    assert sorted(events.over) == sorted(events.known)
    assert not events.open
    assert {(engine.holder.lanes, engine.holder.active) for engine in engines.values()} == {(0, 0)}
    for key, positions in handled.items():
        assert positions == sorted(positions), key


def test_what_begins_and_ends_while_sharing_begins_counts(events: Events, shared: SharedConsumer) -> None:
    events.put("a", "b", "c")
    items = events.read(3)
    here = Holder(HERE, Trigger("t", "f", durable="ship"), 0, lambda: None, lambda positions: None, lambda: 0.0)
    shared.expect(here)
    assert shared.began(here, [(2, 1)]) == []
    shared.ended(here, [Outcome(1, "done", 1)])
    assert (events.noted, events.over) == ([(2, 1)], [1])

    shared.begin(items, {1: 1})
    assert {position: hold.begun for position, hold in here.holds.items()} == {2: 1, 3: 0}
    shared.ended(here, [Outcome(2, "done", 1)])
    assert events.over == [1, 2]
    assert not shared.is_settled(3)
    shared.ended(here, [Outcome(3, "done", 1)])
    assert shared.is_settled(3)


def test_what_was_found_before_reading_failed_is_given_the_next_time(
    events: Events, shared: SharedConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = Engine(shared, "one"), Engine(shared, "two")
    events.put("a", "b")
    assert one.fetch() == [1, 2]
    shared.leave("one")  # both may go to any engine

    def fail(most: int) -> list[Held]:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(events, "read", fail)
        with pytest.raises(StorageError):
            two.fetch()
    assert two.fetch() == [1, 2]


def test_what_ran_before_is_waited_for_until_its_engine_may_not_come_any_more(
    events: Events, shared: SharedConsumer
) -> None:
    shared.expect_claims()
    events.put("a")
    assert not shared.is_settled(1)
    shared.end_claims()
    assert shared.is_settled(1)
