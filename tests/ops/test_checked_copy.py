"""Long arrays and objects are checked as a whole: accepted and refused exactly as by the check of each part."""

from __future__ import annotations

import datetime as dt
import functools
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from decimal import Decimal
from enum import Enum
from typing import Any, NamedTuple, Self

import msgspec
import pytest
from conformance import same
from hypothesis import given
from hypothesis import strategies as st
from json_values import ANYTHING, KEYS, SCALARS, Account, Colour, Level, Real, Row, Text, Whole, Word, nested
from value_changes import encode_with_change_at

from scopestate.errors import InvalidValue
from scopestate.ops import checked_copy, values

LONG = 2 * checked_copy.MANY


class Price(float):
    def __radd__(self, other: object) -> float:
        return 0.0


class Odd(str, Enum):  # noqa: UP042  # its text and its value differ
    ONE = "one"

    def __new__(cls, text: str) -> Self:
        made = str.__new__(cls, text)
        made._value_ = 1
        return made


class Lying(int):
    def __int__(self) -> int:
        return 99

    def __radd__(self, other: object) -> float:
        return 0.0

    __index__ = __int__


class Raising(int):
    def __eq__(self, other: object) -> bool:
        raise LookupError("the own comparison of an item")

    __hash__ = int.__hash__


class Unhashed(type):
    """The class of classes that no set can hold."""

    def __eq__(cls, other: object) -> bool:
        return cls is other

    __hash__ = None  # type: ignore[assignment]  # what Python does for a class with `__eq__` only


class Named(str, metaclass=Unhashed):
    __slots__ = ()


class Thing(metaclass=Unhashed):
    pass


class Pair(NamedTuple):
    x: int
    y: int


def outcome(check: Callable[[Any], Any], value: object) -> tuple[str, object]:
    try:
        return "accepted", check(value)
    except InvalidValue as error:
        return "refused", str(error)


def assert_as_part_by_part(value: object) -> None:
    """`encode` gives the JSON of what `normalise` gives, or the error that it raises: text and place."""
    expected = outcome(lambda given: msgspec.json.encode(values.normalise(given)), value)
    assert outcome(values.encode, value) == expected


ITEMS: list[object] = [
    *(None, True, 0, -1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.5, 1e300, 5e-324, "", "null", "9" * 25),
    *(2**64, -(2**63) - 1, 10**400, math.nan, math.inf, -math.inf, 1.7976931348623157e308, "\ud800"),
    *(Level.HIGH, Word.YES, Odd.ONE, Colour.RED, Text("t"), Whole(3), Whole(2**64), Lying(3), Real(0.5), Price(1.5)),
    *(Decimal("0.5"), Decimal("NaN"), b"", b"abc", bytearray(b"x"), memoryview(b"x"), dt.date(2026, 1, 1), 1j, ...),
    *((), (1, 2), Pair(1, 2), set(), {1}, frozenset({1}), [], {}, [1], {"a": 1}, Row(), Account(), msgspec.Raw(b"1")),
    *({1: 2}, {None: 1}, {Word.YES: 1}, {Odd.ONE: 1}, {Text("t"): 1}, {"\ud800": 1}, OrderedDict(a=1)),
    *(defaultdict(list, a=1), defaultdict(None, a=1), [[math.nan]], {"a": {"b": {1}}}, nested(126), nested(127)),
]
"""What may stand in the middle of a long container."""

USUAL: list[object] = [0.5, 7, "text", None, True, [1, 2.5], {"a": "b", "c": "d"}, {"id": 5, "at": 0.5}, {}, []]
"""What a long container has otherwise."""


@pytest.mark.parametrize("usual", USUAL, ids=repr)
@pytest.mark.parametrize("place", [0, LONG // 2 + 1])  # one that is in the sample, and one that is not
def test_one_item_among_many_is_checked_as_exactly_as_alone(usual: object, place: int) -> None:
    for item in ITEMS:
        items = [usual] * LONG
        items[place] = item
        assert_as_part_by_part(items)
        assert_as_part_by_part({"a": items})
        assert_as_part_by_part({"": 1, "objects": dict(enumerate_as_keys(items))})
        assert_as_part_by_part({**dict(enumerate_as_keys(items)), "list": []})


def enumerate_as_keys(items: list[object]) -> list[tuple[str, object]]:
    return [(f"k{index}", item) for index, item in enumerate(items)]


@pytest.mark.parametrize("usual", [{"a": "b", "c": "d"}, {"id": 5, "at": 0.5}, ["a"], [0.5, 1], [None]], ids=repr)
@pytest.mark.parametrize("place", [0, LONG // 2 + 1])  # one that is in the sample, and one that is not
def test_what_is_inside_of_one_container_among_many_is_checked_as_exactly_as_alone(usual: object, place: int) -> None:
    for item in ITEMS:
        for one in ({"a": item}, {"a": "b", "c": item}, [item], ["a", item]):
            rows = [usual] * LONG
            rows[place] = one
            assert_as_part_by_part(rows)
            assert_as_part_by_part({"rows": rows})


@pytest.mark.parametrize("usual", [{"a": "b"}, {"a": 1}, {"a": None}], ids=repr)
@pytest.mark.parametrize("key", [1, 1.5, None, True, Word.YES, Odd.ONE, Text("t"), Level.HIGH, "\ud800", (1,), b"k"])
def test_a_key_of_one_object_among_many_is_checked_as_exactly_as_alone(usual: object, key: object) -> None:
    for place in (0, LONG // 2 + 1):
        for one in ({key: "b"}, {key: 1}, {"a": "b", key: None}):
            rows = [usual] * LONG
            rows[place] = one
            assert_as_part_by_part(rows)
    assert_as_part_by_part({**dict.fromkeys(map(str, range(LONG)), 1), key: 1})
    assert_as_part_by_part([{**dict(enumerate_as_keys([{}] * LONG)), key: {}}])


@pytest.mark.parametrize("item", [Raising(3), Named("x"), Thing()], ids=["comparison", "a string", "refused"])
@pytest.mark.parametrize("usual", [1, "text", {"id": 1}], ids=["numbers", "texts", "objects"])
def test_code_of_the_class_of_an_item_changes_no_answer(usual: object, item: object) -> None:
    for value in ([usual] * LONG + [item], [[usual, item] for _ in range(LONG)], {"items": [item] + [usual] * LONG}):
        assert_as_part_by_part(value)


def test_an_object_that_once_had_another_key_is_accepted() -> None:
    once: dict[Any, Any] = {1: "a", "b": 1}
    del once[1]
    assert_as_part_by_part([once] * LONG)
    assert_as_part_by_part([{"b": "c"}] * LONG + [once])


@pytest.mark.parametrize("levels", range(122, 131))
@pytest.mark.parametrize("row", [{"a": 1}, {"a": "b"}, [0.5], {"a": {"b": [1]}}, []], ids=repr)
def test_levels_are_counted_in_long_containers_too(levels: int, row: object) -> None:
    for long in ([row] * LONG, dict(enumerate_as_keys([row] * LONG))):
        assert_as_part_by_part(nested(levels, long))


def test_a_long_value_that_contains_itself_is_refused() -> None:
    ring: list[Any] = [{"a": "b"}] * LONG
    ring[LONG - 1] = {"a": ring}
    with pytest.raises(InvalidValue, match="contains itself"):
        values.encode(ring)
    every: list[Any] = []
    every += [every] * LONG
    with pytest.raises(InvalidValue, match="contains itself"):
        values.encode(every)


def test_numbers_whose_sum_is_not_finite_are_accepted() -> None:
    assert_as_part_by_part([1e308] * LONG)
    assert_as_part_by_part([2**63 - 1] * LONG)
    assert_as_part_by_part([2**64 - 1] * LONG)
    assert_as_part_by_part([0.5] * LONG + [2**64 - 1])
    assert_as_part_by_part([{"a": 2**64 - 1, "b": 1e308, "c": "d"}] * LONG)


ROWS = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.text(max_size=3), SCALARS, max_size=3),
    st.dictionaries(st.sampled_from("abc"), st.one_of(SCALARS, st.lists(SCALARS, max_size=2)), max_size=3),
)


@st.composite
def long_values(draw: st.DrawFn) -> object:
    """A long list or object of a few kinds of items, some odd ones among them, perhaps inside other containers."""
    kinds = draw(st.lists(ROWS, min_size=1, max_size=4))
    items: list[Any] = (kinds * LONG)[: draw(st.integers(LONG - 40, LONG + 20))]
    for item in draw(st.lists(st.one_of(ANYTHING, ROWS), max_size=3)):
        items[draw(st.integers(0, len(items) - 1))] = item
    value: Any = items
    if draw(st.booleans()):
        value = dict(enumerate_as_keys(items))
        if draw(st.booleans()):
            value[draw(KEYS)] = draw(ANYTHING)
    return nested(draw(st.sampled_from([0, 0, 1, 2, 125, 126, 127])), value)


@given(long_values())
def test_long_values_are_accepted_and_refused_exactly_as_part_by_part(value: object) -> None:
    assert_as_part_by_part(value)


def test_the_copy_of_a_long_value_shares_nothing_that_can_change_it() -> None:
    value: dict[str, Any] = {"rows": [{"a": [1]} for _ in range(LONG)], "flat": [{"a": 1} for _ in range(LONG)]}
    data = values.encode(value)
    value["rows"][0]["a"].append(math.nan)
    value["flat"][0]["a"] = {1}
    assert same(values.decode(data)["rows"][0], {"a": [1]})
    assert same(values.decode(data)["flat"][0], {"a": 1})


# --- other threads ----------------------------------------------------------------------------------------------------


MORE = checked_copy.MANY + 2


def messages() -> tuple[Any, Any]:
    rows = [{"low": "a", "high": "b"} for _ in range(MORE)]
    return rows, rows[1]


def records() -> tuple[Any, Any]:
    rows = [{"low": 0, "high": 0.5} for _ in range(MORE)]
    return {"rows": rows, "high": 0}, rows[MORE // 2 + 1]


def some_nested() -> tuple[Any, Any]:
    rows: list[Any] = [{"low": 0, "high": 0} for _ in range(MORE)]
    rows[2]["more"] = [1]
    return {"rows": rows, "high": 0}, rows[1]


def long_object() -> tuple[Any, Any]:
    value = {f"k{index}": {"low": 0} for index in range(MORE)}
    return value, value["k1"]


def numbers() -> tuple[Any, Any]:
    value: dict[str, Any] = {"all": [0.5] * MORE, "high": 0}
    return value, value


SHAPES = [messages, records, some_nested, long_object, numbers]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "bad", [{"low": math.nan}, {"low": {1, 2}}, {"low": Decimal("0.5")}, {"new": {1: 2}}, {1: "a"}], ids=repr
)
def test_what_another_thread_puts_in_between_is_refused_or_not_stored(
    shape: Callable[[], tuple[Any, Any]], bad: dict[Any, Any]
) -> None:
    for opcode in steps(shape):
        value, inner = shape()
        clean = values.encode(value)
        stored, _ = encode_with_change_at(opcode, value, functools.partial(inner.update, bad))
        assert stored is None or stored == clean, f"opcode {opcode}"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_value_that_another_thread_changes_is_stored_as_of_one_moment(shape: Callable[[], tuple[Any, Any]]) -> None:
    for opcode in steps(shape):
        value, inner = shape()
        before = values.encode(value)

        def change(value: Any = value, inner: Any = inner) -> None:
            (value[0] if isinstance(value, list) else value)["high"] = "c"
            inner.update(low="c", new="c")

        stored, _ = encode_with_change_at(opcode, value, change)
        assert stored in (before, values.encode(value)), f"opcode {opcode}: {stored!r}"


def steps(shape: Callable[[], tuple[Any, Any]]) -> range:
    """The opcodes of one call before which the value may change: all of them, or about 60 if there are many."""
    low, high = 1, 2
    while encode_with_change_at(high, shape()[0], lambda: None)[1]:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if encode_with_change_at(middle, shape()[0], lambda: None)[1] else (low, middle)
    return range(1, low + 1, max(1, low // 60))
