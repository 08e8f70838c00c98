"""The index of a scope's keys: what it finds in a range, whatever was created and deleted since it was made."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scopestate.actors import index
from scopestate.actors.index import KeyIndex, created_since
from scopestate.ops.turns import Range

# Code points at the edges of UTF-8's lengths, and around the surrogates.
NAMES = st.text(st.sampled_from("\0ab\x7f\x80\ud7ff\ue000\uffff\U00010000\U0010ffff"), max_size=3)
BOUND = st.none() | NAMES
RANGES = st.builds(Range, BOUND, BOUND, BOUND, BOUND, st.booleans(), st.none() | st.integers(0, 9))


@pytest.fixture(autouse=True)
def small_buckets() -> Iterator[None]:
    """Let a few keys fill many buckets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "BUCKET", 3)
        patch.setattr(index, "_LARGEST", 6)
        patch.setattr(index, "SORTED_AT_ONCE", 16)
        yield


def expected(values: dict[str, bytes], within: Range) -> list[str]:
    there = sorted(filter(within.holds, values), key=str.encode, reverse=within.reverse)
    return there[: within.limit]


class Scope:
    """A dict of values with its index, as a scope has them."""

    def __init__(self, names: list[str]) -> None:
        self.values = dict.fromkeys(names, b"1")
        self.creations = len(self.values)
        self.index = KeyIndex(list(self.values), self.creations)

    def create(self, name: str) -> None:
        if name not in self.values:
            self.values[name] = b"1"
            self.creations += 1

    def delete(self, name: str) -> None:
        self.values.pop(name, None)

    def refresh(self, index: KeyIndex) -> None:
        new = self.creations - index.creations
        if new:
            index.add(created_since(self.values, new), self.creations)

    def find(self, within: Range) -> list[str]:
        self.refresh(self.index)
        found = self.index.find(within, self.values.__contains__)
        check(self.index)
        return found


def check(index: KeyIndex) -> None:
    """Assert what holds of an index at any time."""
    lows, buckets = index._lows, index._buckets
    assert len(lows) == len(buckets) == len(index._added)
    assert lows[0] == ""
    assert lows == sorted(set(lows))
    for place, bucket in enumerate(buckets):
        assert bucket == sorted(set(bucket))
        for key in [*bucket, *(index._added[place] or ())]:
            assert key >= lows[place]
            assert place + 1 == len(lows) or key < lows[place + 1]
    assert index._size == sum(map(len, buckets)) + sum(len(added) for added in index._added if added)


STEPS = st.lists(
    st.tuples(st.just("create"), NAMES)
    | st.tuples(st.just("delete"), NAMES)
    | st.tuples(st.just("find"), RANGES)
    | st.tuples(st.just("delete range"), RANGES),
    max_size=40,
)


@settings(max_examples=300)
@given(st.lists(NAMES, max_size=60), STEPS)
def test_a_range_has_the_keys_that_exist_in_order_whatever_came_and_went(
    names: list[str], steps: list[tuple[str, str | Range]]
) -> None:
    scope = Scope(names)
    check(scope.index)
    for kind, what in steps:
        if isinstance(what, str):
            scope.create(what) if kind == "create" else scope.delete(what)
        elif kind == "find":
            assert scope.find(what) == expected(scope.values, what)
        else:
            for key in expected(scope.values, what):
                scope.delete(key)
    for within in (Range(), Range(reverse=True)):
        assert scope.find(within) == expected(scope.values, within)


@given(st.lists(NAMES, max_size=60), STEPS)
def test_a_copy_answers_for_the_moment_at_which_it_was_made(
    names: list[str], steps: list[tuple[str, str | Range]]
) -> None:
    scope = Scope(names)
    scope.create("before")
    scope.refresh(scope.index)  # waits beside its bucket
    copied, values = scope.index.copy(), scope.values.copy()
    for kind, what in steps:
        if isinstance(what, Range):
            scope.find(what)
        else:
            scope.create(what) if kind == "create" else scope.delete(what)
    scope.find(Range())
    check(copied)
    assert copied.find(Range(), values.__contains__) == sorted(values)
    check(copied)
    # It can take the place of the other one: what was created since comes behind it.
    scope.refresh(copied)
    assert copied.find(Range(), scope.values.__contains__) == sorted(scope.values)


def test_a_key_that_was_deleted_and_created_again_comes_once() -> None:
    scope = Scope(["a", "b", "c"])
    for _ in range(10):
        scope.delete("b")
        scope.create("b")
        scope.refresh(scope.index)
    assert scope.find(Range()) == ["a", "b", "c"]


@pytest.mark.parametrize("reverse", [False, True])
def test_the_keys_at_the_border_of_two_buckets_come_once(reverse: bool) -> None:
    names = [f"{number:03}" for number in range(100)]
    scope = Scope(names)
    for low in [name for bucket in scope.index._buckets for name in (bucket[0], bucket[-1])]:
        for within in (
            Range(start=low, reverse=reverse, limit=4),
            Range(after=low, reverse=reverse, limit=4),
            Range(end=low, reverse=reverse, limit=4),
            Range(start=low, end=low + "\0", reverse=reverse),
        ):
            assert scope.find(within) == expected(scope.values, within)


@pytest.mark.parametrize("reverse", [False, True])
def test_buckets_whose_keys_are_deleted_are_given_up(reverse: bool) -> None:
    scope = Scope([f"{number:03}" for number in range(100)])
    for number in range(100):
        if number % 10:
            scope.delete(f"{number:03}")

    assert (
        scope.find(Range(reverse=reverse)) == [f"{number:03}" for number in range(0, 100, 10)][:: -1 if reverse else 1]
    )
    assert len(scope.index._buckets) < 20
    for key in list(scope.values):
        scope.delete(key)
    assert scope.find(Range(reverse=reverse)) == []
    assert scope.index._buckets == [[]]


def test_an_index_of_which_most_keys_are_deleted_is_wasteful() -> None:
    scope = Scope([f"{number:03}" for number in range(100)])
    assert not scope.index.is_wasteful(100)
    assert not scope.index.is_wasteful(50)
    assert scope.index.is_wasteful(40)


def test_buckets_are_even_whatever_the_order_of_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    names = [f"key-{number}" for number in range(60_000)]
    random.Random(1).shuffle(names)
    for keys in (names, sorted(names), sorted(names, reverse=True)):
        made = KeyIndex(keys, 0)
        check(made)
        assert [key for bucket in made._buckets for key in bucket] == sorted(names)
        assert max(map(len, made._buckets)) <= 4 * 512


def test_a_range_touches_the_buckets_between_its_bounds() -> None:
    scope = Scope([f"{number:03}" for number in range(99)])
    everything = len(scope.index._buckets)

    assert scope.index.buckets_within(Range()) == everything
    assert scope.index.buckets_within(Range(prefix="03")) < everything / 5
    assert scope.index.buckets_within(Range(start="050", end="050\0")) == 1
    assert scope.index.buckets_within(Range(start="9", end="0")) == 1


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("start", ["0", "010:5", "010:95"])
def test_many_keys_that_come_between_two_are_divided_when_they_are_met(start: str, reverse: bool) -> None:
    scope = Scope([f"{number:03}" for number in range(30)])
    for number in range(100):
        scope.create(f"010:{number * 37 % 100:02}")
    within = Range(start=start, reverse=reverse)

    assert scope.find(within) == expected(scope.values, within)
    assert max(map(len, scope.index._buckets)) <= 6
