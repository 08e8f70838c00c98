"""The index of a scope's keys: what it finds in a range, whatever was created and deleted since it was made."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scopestate.actors import index
from scopestate.actors.index import KeyIndex, KeysApart, OrderedKeys, TooLong, created_since
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
        patch.setattr(index, "READ_WITHIN_TURN", 10)
        # Where the keys are divided depends on a sample, and what a test asserts may not depend on chance.
        patch.setattr(index, "_sample", random.Random(1).sample)
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


def test_it_knows_about_how_many_keys_a_range_may_have() -> None:
    names = [f"{number:03}" for number in range(99)]
    made = KeyIndex(names, 0)

    assert made.most(Range()) >= 90
    assert made.most(Range(limit=5)) == 5
    assert 10 <= made.most(Range(prefix="03")) <= 20
    assert made.most(Range(start="050", end="050\0")) <= 4
    assert made.most(Range(start="9", end="0")) <= 4


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("start", ["0", "010:5", "010:95"])
@pytest.mark.parametrize("end", [None, "010:05", "010:7", "010:98", "02"])
def test_many_keys_that_come_between_two_are_divided_when_they_are_met(
    start: str, end: str | None, reverse: bool
) -> None:
    scope = Scope([f"{number:03}" for number in range(30)])
    for number in range(100):
        scope.create(f"010:{number * 37 % 100:02}")
    within = Range(start=start, end=end, reverse=reverse)

    assert scope.find(within) == expected(scope.values, within)
    assert max(map(len, scope.index._buckets)) <= 6


# ------------------------------------------------------------------------------------- as the turns of a scope use it


class Turns:
    """A dict of values, whose keys are asked for as a scope does it. What is apart answers some steps later."""

    def __init__(self, names: list[str]) -> None:
        self.values = dict.fromkeys(names, b"1")
        self.creations = len(self.values)
        self.keys = OrderedKeys(self.values, lambda: self.creations)
        self.apart: list[tuple[KeysApart, dict[str, bytes], Range]] = []
        self.too_long = 0

    def create(self, name: str) -> None:
        if name not in self.values:
            self.values[name] = b"1"
            self.creations += 1

    def find(self, within: Range) -> None:
        try:
            found = self.keys.find(within, self.values.__contains__)
        except TooLong:
            self.too_long += 1
            copied = self.values.copy()
            self.apart.append((self.keys.apart(copied), copied, within))
        else:
            assert found == expected(self.values, within)

    def answer(self) -> None:
        """Answer what was asked first."""
        if self.apart:
            keys, copied, within = self.apart.pop(0)
            assert keys.find(within, copied.__contains__) == expected(copied, within)


@settings(max_examples=300)
@given(
    st.lists(NAMES, max_size=40),
    st.lists(
        st.tuples(st.just("create"), NAMES)
        | st.tuples(st.just("delete"), NAMES)
        | st.tuples(st.just("find"), RANGES)
        | st.sampled_from([("answer", ""), ("patient find", Range()), ("sweep", "")]),
        max_size=40,
    ),
)
def test_each_answer_is_that_of_its_turn_whenever_it_is_made(
    names: list[str], steps: list[tuple[str, str | Range]]
) -> None:
    turns = Turns(names)
    for kind, what in steps:
        match kind:
            case "create":
                turns.create(str(what))
            case "delete":
                turns.values.pop(str(what), None)
            case "answer":
                turns.answer()
            case "sweep":
                turns.keys.forget_if_unused()
            case _:
                assert isinstance(what, Range)
                turns.keys.patient = kind == "patient find"
                turns.find(what)
                turns.keys.patient = False
    while turns.apart:
        turns.answer()
    turns.find(Range(limit=3))


def test_the_first_look_at_many_keys_and_one_at_many_new_keys_are_too_long_for_a_turn() -> None:
    turns = Turns([f"{number:03}" for number in range(30)])

    turns.find(Range(limit=2))
    assert turns.too_long == 1
    turns.answer()
    turns.find(Range(limit=2))  # the index that the answer has made
    turns.find(Range(prefix="014"))
    assert turns.too_long == 1
    turns.find(Range())
    assert turns.too_long == 2
    for number in range(11):
        turns.create(f"new {number}")
    turns.find(Range(limit=2))
    assert turns.too_long == 3
    turns.answer()
    turns.answer()
    turns.find(Range(limit=2))
    assert turns.too_long == 3


def test_few_keys_are_read_within_the_turn_all_of_them() -> None:
    turns = Turns(list("gfedcba"))

    turns.find(Range())
    assert turns.too_long == 0


def test_a_patient_turn_reads_any_number_of_keys() -> None:
    turns = Turns([f"{number:03}" for number in range(100)])
    turns.keys.patient = True

    turns.find(Range())
    for number in range(100):
        turns.create(f"new {number}")
    turns.find(Range())
    assert turns.too_long == 0


def test_an_index_that_no_turn_uses_is_dropped_by_the_second_sweep() -> None:
    turns = Turns(["a", "b"])
    turns.find(Range())
    turns.keys.forget_if_unused()
    assert turns.keys._index is not None

    turns.keys.forget_if_unused()
    assert turns.keys._index is None
    turns.find(Range())


def test_what_is_cut_short_leaves_no_index_behind() -> None:
    turns = Turns(["a", "b"])
    turns.find(Range())

    def cut(key: str) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turns.keys.find(Range(), cut)
    assert turns.keys._index is None
    turns.find(Range())


def test_a_wasteful_index_is_made_again() -> None:
    turns = Turns([f"{number:03}" for number in range(10)])
    turns.find(Range())
    made = turns.keys._index
    for _ in range(10):
        for key in list(turns.values)[:5]:
            del turns.values[key]
            turns.create(key)
        turns.find(Range(limit=1, start="9"))
    assert turns.keys._index is not made
    turns.find(Range())
