"""The explorer of interleavings finds what it is there for, in code small enough to be sure of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from interleaving import Graph, Latch, Problem, SharedDeque, SharedDict, World, explore, sharing


class Desk:
    """One of two callers serves both: it takes the claim, or leaves its call and asks the thread that is there."""

    def __init__(self, world: World, *, looks_again: bool) -> None:
        self.world = world
        self.claim = SharedDict(world, "claim")
        self.inbox = SharedDeque(world, "inbox")
        self.asked = 0
        self._looks_again = looks_again

    def call(self) -> None:
        if self.claim.setdefault("holder", self.world.ident()) == self.world.ident():
            del self.claim["holder"]
            if self._looks_again and self.inbox:
                self.asked += 1
            return
        latch = Latch(self.world)
        self.inbox.append(latch)
        if not self.claim:
            self.asked += 1
        latch.acquire()

    def serve(self) -> None:
        for _ in range(2):
            self.world.wait("nothing to do", lambda: self.asked > 0)
            self.asked -= 1
            while self.inbox:
                self.inbox.popleft().release()


def two_callers(world: World, *, looks_again: bool) -> None:
    desk = Desk(world, looks_again=looks_again)
    world.roots.append(desk)
    threads = [world.spawn("first", desk.call), world.spawn("second", desk.call)]
    world.spawn("server", desk.serve)
    world.is_at_rest = lambda: all(thread.is_over for thread in threads)


def test_a_wake_up_that_is_missed_is_found() -> None:
    with pytest.raises(Problem, match="rest") as found:
        explore(lambda world: two_callers(world, looks_again=False), {})

    assert "second: waits for its answer" in str(found.value)


def test_each_state_of_what_is_right_has_a_way_to_rest() -> None:
    graph = explore(lambda world: two_callers(world, looks_again=True), {})

    assert graph.states > 50
    assert graph.ends > 0


class Counter:
    world: World

    def __init__(self) -> None:
        self.__dict__["count"] = 0

    def increment(self) -> None:
        self.count: int = self.count + 1


def test_a_race_for_an_attribute_is_found() -> None:
    def scenario(world: World) -> None:
        counter = sharing(Counter, "count")()
        counter.world = world
        world.roots.append(counter)
        for name in "ab":
            world.spawn(name, counter.increment)

        def check() -> None:
            assert not all(thread.is_over for thread in world.threads) or counter.__dict__["count"] == 2, "one is lost"

        world.check = check

    with pytest.raises(Problem, match="one is lost"):
        explore(scenario, {})


@pytest.mark.parametrize(
    ("budgets", "ends"), [({}, {"done"}), ({"cuts": 1}, {"done", "cut"}), ({"timeouts": 1}, {"done", "late"})]
)
def test_faults_happen_as_often_as_they_may(budgets: dict[str, int], ends: set[str]) -> None:
    seen: set[str] = set()

    def scenario(world: World) -> None:
        outcome: list[str] = []
        latch = Latch(world)

        def wait() -> None:
            try:
                world.point("before")
                outcome.append("done" if latch.acquire() else "late")
            except KeyboardInterrupt:
                outcome.append("cut")

        world.roots.append(outcome)
        world.spawn("caller", wait, can_be_cut=True)
        world.spawn("other", latch.release)
        world.check = lambda: seen.update(outcome)

    graph: Callable[[], Graph] = lambda: explore(scenario, budgets)  # noqa: E731 - the name says what it gives

    assert graph().states > 3
    assert seen == ends
