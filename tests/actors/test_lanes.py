"""The lanes of a trigger against a model: what may begin, in which order, and when a barrier is reached."""

from __future__ import annotations

from typing import Any, Final, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scopestate import StateEvent
from scopestate.actors.lanes import Barrier, Lanes, Run

ORDERS: Final = ("scope", "key", "none", "trigger")
PLACES: Final = 3


def event(scope: str, key: str, number: int) -> StateEvent:
    return StateEvent("state:updated", scope, key, b"0", b"1", number, 0)


class Model(RuleBasedStateMachine):
    """The model keeps one list: every run and barrier that is not over, oldest first."""

    order: Any

    def __init__(self) -> None:
        super().__init__()
        self.lanes = Lanes(self.order)
        self.all: list[Run | str] = []
        self.free: list[Run] = []
        """Entered, and the first of its lane, as `enter` said."""
        self.under_way: list[Run] = []
        self.pausing: list[Run] = []
        self.dropped: set[Run] = set()
        self.number = 0

    def lane(self, run: Run) -> object:
        scope, key = run.event.scope, run.event.key
        return {"scope": scope, "key": (scope, key), "none": run, "trigger": None}[self.order]

    def before(self, run: Run) -> list[Run]:
        earlier = self.all[: self.all.index(run)]
        return [one for one in earlier if isinstance(one, Run) and self.lane(one) == self.lane(run)]

    def over(self, run: Run) -> None:
        self.all.remove(run)

    def check_barriers(self) -> None:
        expected = []
        while self.all and isinstance(self.all[0], str):
            expected.append(self.all.pop(0))
        assert cast("list[Any]", self.lanes.reached()) == expected

    # ------------------------------------------------------------------------------------------------------- steps

    @rule(scope=st.sampled_from("ab"), key=st.sampled_from("xy"))
    def enter(self, scope: str, key: str) -> None:
        self.number += 1
        run = Run()
        run.event = event(scope, key, self.number)
        self.all.append(run)
        is_first = not self.before(run)
        assert self.lanes.enter(run) == is_first
        if is_first:
            self.free.append(run)

    @precondition(lambda self: self.free)
    @rule()
    def begin_first_of_lane(self) -> None:
        run = self.free.pop(0)
        self.lanes.begin(run)
        self.under_way.append(run)

    @precondition(lambda self: len(self.under_way) < PLACES)
    @rule()
    def begin_ready(self) -> None:
        run = self.lanes.next_ready()
        self.forget_dropped()
        if run is None:
            return
        assert run not in self.dropped
        assert self.before(run) == []
        assert run not in self.under_way
        if run in self.pausing:
            self.pausing.remove(run)
        self.lanes.begin(run)
        self.under_way.append(run)
        self.check_barriers()

    def forget_dropped(self) -> None:
        """A run that was dropped leaves its lane when its turn would have come."""
        for run in [run for run in self.dropped if not run.entered]:
            self.dropped.remove(run)
            self.over(run)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.under_way))
        self.under_way.remove(run)
        self.lanes.end(run)
        self.over(run)
        self.check_barriers()

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.under_way))
        self.under_way.remove(run)
        self.lanes.pause(run)
        self.pausing.append(run)

    @precondition(lambda self: any(run.paused for run in self.pausing))
    @rule()
    def resume(self) -> None:
        run = next(run for run in self.pausing if run.paused)
        self.pausing.remove(run)
        self.pausing.append(run)
        self.lanes.resume(run)
        self.begin_all_ready()

    def begin_all_ready(self) -> None:
        while self.lanes.has_ready():
            self.begin_ready()

    @rule()
    def drop_oldest(self) -> None:
        waiting = [
            run
            for run in self.all
            if isinstance(run, Run) and run not in self.dropped and run not in self.under_way + self.free + self.pausing
        ]
        dropped = self.lanes.drop_oldest()
        assert dropped == (waiting[0] if waiting else None)
        if dropped is not None:
            self.dropped.add(dropped)

    @rule()
    def place_barrier(self) -> None:
        if self.lanes.is_idle():
            return  # it arrives at once
        self.number += 1
        name = f"barrier {self.number}"
        self.lanes.place(cast("Barrier", name))
        self.all.append(name)

    @precondition(lambda self: any(isinstance(one, str) for one in self.all))
    @rule(data=st.data())
    def withdraw_barrier(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([one for one in self.all if isinstance(one, str)]))
        self.lanes.withdraw(name)
        self.all.remove(name)
        assert name not in cast("list[Any]", self.lanes.barriers())

    # -------------------------------------------------------------------------------------------------- what holds

    @invariant()
    def counts_agree(self) -> None:
        assert self.lanes.running == len(self.under_way)
        waiting = [run for run in self.all if isinstance(run, Run) and run not in self.dropped]
        assert len(self.lanes.aside) == len(waiting) - len(self.under_way) - len(self.free)

    def teardown(self) -> None:
        """Whatever was done, everything can end, and then nothing is left."""
        self.free.reverse()
        while self.free:
            self.begin_first_of_lane()
        while any(isinstance(one, Run) for one in self.all):
            for run in [run for run in self.pausing if run.paused]:
                self.pausing.remove(run)
                self.pausing.append(run)
                self.lanes.resume(run)
            for run in self.under_way[:]:
                self.under_way.remove(run)
                self.lanes.end(run)
                self.over(run)
            self.begin_all_ready()
            self.forget_dropped()
        self.lanes.reached()
        assert self.lanes.is_idle()
        assert not self.lanes.aside
        assert not self.lanes.begun
        assert not self.lanes._behind


def _case(order: str) -> Any:
    machine = type(f"Lanes_{order}", (Model,), {"order": order})
    case = machine.TestCase
    case.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    return case


TestScope = _case("scope")
TestKey = _case("key")
TestNone = _case("none")
TestTrigger = _case("trigger")
