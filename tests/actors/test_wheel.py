"""The wheel finds every key at its deadline: compared with a search through all of them."""

from __future__ import annotations

import random
import sys

import pytest

from scopestate.actors.wheel import NEVER, Wheel


class Scope:
    """Keys with deadlines, and the wheel beside them, as a scope has them."""

    def __init__(self) -> None:
        self.deadlines: dict[str, int] = {}
        self.wheel = Wheel(self.deadlines)
        self.told = NEVER
        """When the actor for expiry looks here next."""

    def write(self, key: str, ms: int, now_ms: int) -> None:
        sooner = self.wheel.place(key, ms, now_ms)
        self.deadlines[key] = ms
        if sooner:
            self.told = min(self.told, self.wheel.next_due())

    def tell_again(self) -> None:
        """As after a turn that was cut short."""
        self.told = min(self.told, self.wheel.next_due())

    def remove(self, *keys: str) -> None:
        for key in keys:
            self.deadlines.pop(key, None)
        self.wheel.forget_all(keys)

    def expire(self, now_ms: int, limit: int = 256) -> list[str]:
        """Remove what is due, in as many looks as it takes."""
        gone: list[str] = []
        while self.wheel.next_due() <= now_ms:
            # A scope without deadlines shows its turns no wheel.
            keys = self.wheel.due(now_ms, limit) if self.deadlines else []
            self.remove(*keys)
            gone += keys
        self.told = self.wheel.next_due()
        return gone

    def due(self, now_ms: int) -> list[int]:
        return sorted(ms for ms in self.deadlines.values() if ms <= now_ms)


SPANS = (5, 60, 5_000, 100_000, 10_000_000, 900_000_000)


@pytest.mark.parametrize("seed", range(200))
def test_what_is_due_is_found_by_its_deadline_and_nothing_earlier(seed: int) -> None:
    rng, scope, now = random.Random(seed), Scope(), 1_000_000_000
    span = rng.choice(SPANS)

    for _ in range(300):
        key, draw = f"k{rng.randrange(30)}", rng.random()
        if draw < 0.5:
            scope.write(key, now + rng.randint(-span if draw < 0.05 else 1, span), now)
        elif draw < 0.6:
            scope.remove(key)
        elif draw < 0.65:
            scope.deadlines.pop(key, None)  # and the write was cut short before `forget`
            scope.tell_again()
        elif draw < 0.7:
            scope.wheel.place(key, now + rng.randint(1, span), now)  # and the write was refused
            scope.tell_again()
        elif draw < 0.9:
            now += rng.randint(0, span // 4)
        else:
            want = scope.due(now)
            limit = rng.choice([1, 7, 256])
            before = dict(scope.deadlines)
            gone = scope.expire(now, limit)
            assert [before[key] for key in gone] == want
            assert not scope.due(now)
        first = min(scope.deadlines.values(), default=NEVER)
        assert scope.wheel.next_due() <= first
        assert scope.told <= first

    scope.expire(now + 10 * span)
    assert scope.deadlines == {}
    assert (len(scope.wheel), scope.wheel.next_due()) == (0, NEVER)


def test_other_threads_see_what_is_due_during_a_look() -> None:
    """A look takes names off the heap, and puts them back at its end."""
    seen: list[int] = []

    class Seen(Wheel):
        def _push(self, names: list[tuple[int, int]]) -> None:
            seen.append(self.next_due())
            super()._push(names)

    deadlines = {"a": 10, "b": 20}
    wheel = Seen(deadlines)
    wheel.fill(0)

    assert wheel.due(30, 5) == ["a", "b"]
    assert seen == [10]
    assert wheel.next_due() == 10


def test_a_key_that_was_not_removed_is_found_again() -> None:
    scope = Scope()
    for number in range(10):
        scope.write(f"k{number}", 1000 + number, 900)

    first = scope.wheel.due(1004, 3)

    assert first == ["k0", "k1", "k2"]
    assert scope.wheel.due(1004, 3) == first
    scope.remove("k1")
    assert scope.wheel.due(1004, 10) == ["k0", "k2", "k3", "k4"]


def test_a_deadline_that_is_put_off_again_and_again_needs_no_more_memory() -> None:
    scope, now = Scope(), 1_000_000
    for _ in range(1000):
        now += 1000
        for number in range(10):
            scope.write(f"s{number}", now + 1_800_000, now)
        scope.expire(now)

    assert len(scope.wheel) == 10
    assert sum(map(len, scope.wheel._slots.values())) == 10
    assert len(scope.wheel._starts) < 50


def test_keys_that_are_deleted_long_before_their_deadline_leave_nothing_behind() -> None:
    scope, now = Scope(), 1_000_000
    for number in range(10_000):
        scope.write(f"job{number}", now + 86_400_000 + number * 1000, now)
        scope.remove(f"job{number}")

    assert (len(scope.wheel), len(scope.wheel._slots)) == (0, 0)
    assert len(scope.wheel._starts) == 0


def test_one_look_costs_the_same_however_many_keys_are_due() -> None:
    """Counted in steps, not in time: what a look does is bounded by its limit."""
    costs = []
    for many in (2_000, 20_000):
        scope = Scope()
        scope.deadlines.update({f"k{number}": 1000 + number % 7 for number in range(many)})
        scope.wheel.fill(700_000_000)  # a week later
        worst = 0
        while scope.deadlines:
            worst = max(worst, steps_of(scope, 256))
        costs.append(worst)

    assert costs[1] < 1.5 * costs[0]


def steps_of(scope: Scope, limit: int) -> int:
    """Return the lines of Python that one look runs, with the removal of what it found."""
    lines = 0

    def count(frame: object, event: str, argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)  # type: ignore[arg-type]  # typeshed wants its own protocol
    try:
        scope.remove(*scope.wheel.due(700_000_000, limit))
    finally:
        sys.settrace(before)
    return lines
