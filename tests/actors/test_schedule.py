"""Which delivery of a durable trigger is next: against a plain model, for any course of events."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scopestate.actors.consuming import Held
from scopestate.actors.schedule import Lane, Schedule
from scopestate.ops.results import StateEvent
from scopestate.ops.triggers import Order


def held(position: int, key: str = "k", scope: str = "s", due_ms: int = 0) -> Held:
    return Held(StateEvent("state:updated", scope, key, b"1", b"2", position, position=position), due_ms=due_ms)


class AgainstAModel(RuleBasedStateMachine):
    """The model: a list of deliveries in order, and for each of them what has become of it."""

    @initialize(order=st.sampled_from(get_args(Order)))
    def begin(self, order: Order) -> None:
        self.schedule = Schedule(order)
        self.order = order
        self.now = 1
        self.position = 0
        self.waiting: list[Held] = []  # in order; the running ones too
        self.running: dict[int, Lane] = {}
        self.blocked: set[int] = set()
        self.begun: list[int] = []

    def lane_of(self, item: Held) -> object:
        event = item.event
        return {
            "key": (event.scope, event.key),
            "scope": event.scope,
            "none": event.position,
            "trigger": None,
        }[self.order]

    @rule(key=st.sampled_from("ab"), scope=st.sampled_from("st"), due=st.sampled_from([0, 0, 3]))
    def add(self, key: str, scope: str, due: int) -> None:
        self.position += 1
        item = held(self.position, key, scope, self.now + due if due else 0)
        self.schedule.add(item)
        self.waiting.append(item)

    def may_begin(self) -> set[int]:
        firsts: dict[object, Held] = {}
        for item in self.waiting:
            firsts.setdefault(self.lane_of(item), item)
        return {
            item.event.position
            for item in firsts.values()
            if item.event.position not in self.running
            and item.event.position not in self.blocked
            and item.due_ms <= self.now
        }

    @rule()
    def take(self) -> None:
        expected = self.may_begin()
        lane = self.schedule.take(self.now)
        if lane is None:
            assert not expected
        else:
            position = lane.items[0].event.position
            assert position in expected
            self.running[position] = lane

    @rule(by=st.integers(1, 4))
    def wait(self, by: int) -> None:
        self.now += by

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["over", "again", "block", "back"]))
    def end(self, data: st.DataObject, how: str) -> None:
        position = data.draw(st.sampled_from(sorted(self.running)))
        lane = self.running.pop(position)
        if how == "over":
            self.schedule.over(lane)
            self.waiting = [item for item in self.waiting if item.event.position != position]
        elif how == "again":
            self.schedule.again(lane, self.now + 2)
        elif how == "block":
            self.schedule.block(lane)
            self.blocked.add(position)
        else:
            self.schedule.give_back(lane)

    @precondition(lambda self: self.blocked)
    @rule(data=st.data(), again=st.booleans())
    def act(self, data: st.DataObject, again: bool) -> None:
        position = data.draw(st.sampled_from(sorted(self.blocked)))
        self.blocked.discard(position)
        index = next(index for index, item in enumerate(self.waiting) if item.event.position == position)
        if again:
            old = self.waiting[index]
            self.waiting[index] = held(position, old.event.key, old.event.scope)
            self.schedule.add(self.waiting[index])
        else:
            del self.waiting[index]
            assert self.schedule.release(position)

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        some = {
            item.event.position
            for item in self.waiting
            if item.event.position not in self.running and item.event.position not in self.blocked
        }
        gone = set(data.draw(st.lists(st.sampled_from(sorted(some)), max_size=3))) if some else set()
        self.schedule.drop(gone)
        self.waiting = [item for item in self.waiting if item.event.position not in gone]

    @precondition(lambda self: not self.running)
    @rule(order=st.sampled_from(get_args(Order)))
    def reorder(self, order: Order) -> None:
        self.order = order
        self.schedule.reorder(order)

    @invariant()
    def counts(self) -> None:
        assert len(self.schedule) == len(self.waiting)
        assert self.schedule.running == len(self.running)
        long = {self.lane_of(item) for item in self.waiting if item.event.position in self.blocked}
        sure = [item for item in self.waiting if self.lane_of(item) not in long]
        assert len(self.schedule.positions_before(10**9)) == len(sure)
        assert self.schedule.active == len(self.schedule.positions_before(-1))
        dues = [
            item.due_ms
            for item in {self.lane_of(item): item for item in reversed(self.waiting)}.values()
            if item.due_ms and item.event.position not in self.running and item.event.position not in self.blocked
        ]
        due = self.schedule.next_due_ms()
        assert due is None or due in dues
        assert due is not None or all(one <= self.now for one in dues)


TestAgainstAModel = AgainstAModel.TestCase
TestAgainstAModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_failing_key_holds_back_itself_alone() -> None:
    schedule = Schedule("key")
    for position, key in enumerate("aab", 1):
        schedule.add(held(position, key))

    first = schedule.take(10)
    assert first is not None
    schedule.again(first, due_ms=50)

    second = schedule.take(10)
    assert second is not None
    assert second.items[0].event.position == 3
    assert schedule.take(10) is None
    assert schedule.next_due_ms() == 50
    third = schedule.take(50)
    assert third is not None
    assert third.items[0].event.position == 1


@pytest.mark.parametrize("order", ["key", "scope", "trigger"])
def test_what_is_released_makes_room_for_the_next_of_its_lane(order: Order) -> None:
    schedule = Schedule(order)
    schedule.add(held(1))
    schedule.add(held(2))
    lane = schedule.take(1)
    assert lane is not None

    schedule.block(lane)

    assert schedule.take(1) is None
    assert not schedule.release(2)
    assert schedule.release(1)
    following = schedule.take(1)
    assert following is not None
    assert following.items[0].event.position == 2
