"""What a cache stores: reversible, without collisions, plain where it can be, and what is refused says why."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ids import stable

from scopestate import Engine
from scopestate.errors import DeserializationError, InvalidValue
from scopestate.integrations.cache import Cache
from scopestate.integrations.cache.values import call_name, key_of, name_of, pack, tag_of, value_of
from scopestate.ops.values import decode, encode

TEXT = st.text(st.characters(codec="utf-8"), max_size=5) | st.sampled_from(["~", "~1", "~None", "~sx", "~[]", "v"])
KEYS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)
HASHABLE = (
    KEYS
    | st.datetimes(timezones=st.none() | st.just(UTC))
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.uuids()
)
VALUES = st.recursive(
    HASHABLE,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(TEXT, inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.frozensets(HASHABLE, max_size=3)
        | st.sets(HASHABLE, max_size=3)
    ),
    max_leaves=8,
)


def _shape(value: Any) -> Any:
    """Return a value with the types of its parts: 1, 1.0 and True are equal otherwise, and so are 0.0 and -0.0."""
    if isinstance(value, dict):
        return "dict", [(_shape(key), _shape(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_shape(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted(repr(_shape(item)) for item in value)
    return type(value).__name__, repr(value)


@given(VALUES, st.none() | KEYS)
def test_a_value_comes_back_as_it_was_through_json(value: Any, tag: Any) -> None:
    stored = decode(encode(pack(value, None if tag is None else name_of(tag))))

    assert _shape(value_of(stored)) == _shape(value)
    assert tag_of(stored) == (None if tag is None else name_of(tag))


@given(KEYS)
def test_a_key_comes_back_from_its_name(key: Any) -> None:
    found = key_of(name_of(key))

    assert found == key
    assert name_of(found) == name_of(key)


@given(KEYS, KEYS)
def test_different_keys_have_different_names(one: Any, other: Any) -> None:
    # As in a dict: equal keys are one key, but True is no number.
    assert (name_of(one) == name_of(other)) == (_without_types(one) == _without_types(other))


def _without_types(key: Any) -> Any:
    if isinstance(key, tuple):
        return tuple(map(_without_types, key))
    return ("bool", key) if isinstance(key, bool) else key


@given(st.lists(VALUES, max_size=3), st.lists(VALUES, max_size=3))
def test_different_calls_have_different_names(one: list[Any], other: list[Any]) -> None:
    same = call_name("f", tuple(one), {}) == call_name("f", tuple(other), {})
    if same:  # dicts are the same in any order
        assert one == other
    elif _shape(one) == _shape(other):
        raise AssertionError("one call has two names")


def test_plain_values_and_keys_are_stored_as_they_are() -> None:
    with Engine() as engine:
        cache = Cache(engine)
        cache["ada"] = {"name": "Ada", "tags": ["a"]}
        cache[5] = "five"
        assert engine.get("cache", "ada") == {"name": "Ada", "tags": ["a"]}
        assert engine.scope("cache").items() == [("ada", {"name": "Ada", "tags": ["a"]}), ("~5", "five")]


def test_what_other_programs_have_written_is_read_as_it_is() -> None:
    with Engine() as engine:
        cache = Cache(engine)
        for value in ({"~": 5}, {"~": "plain"}, {"~": "other", "v": 1}):
            engine.set("cache", "k", value)
            assert cache["k"] == value
        for name in ("~", "~x", "~b!", "~[1", "~ione"):
            engine.set("cache", name, 1)
        assert set(cache) >= {"~", "~x", "~b!", "~[1", "~ione"}
        engine.set("cache", "k", {"~": "typed", "v": {"~": "datetime", "v": "soon"}})
        with pytest.raises(DeserializationError, match="not a value of a cache"):
            cache["k"]


class Point(NamedTuple):
    x: int


class Level(enum.IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    ("value", "path", "text"),
    [
        (Level.HIGH, "$", r"store int\(value\)"),
        ({"a": [Point(1)]}, "$.a[0]", r"store tuple\(value\)"),
        (OrderedDict(a=1), "$", r"store dict\(value\)"),
        ({"a": {object()}}, "$.a[0]", "pickles nothing"),
        ({1: object()}, "$[1]", "pickles nothing"),
        ({Level.HIGH: 1}, "$.keys()", r"store int\(value\)"),
    ],
    ids=stable,
)
def test_what_is_refused_says_where_and_what_to_do(value: Any, path: str, text: str) -> None:
    with pytest.raises(InvalidValue, match=text) as refused:
        pack(value)
    assert refused.value.path == path


def test_endless_nesting_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(InvalidValue, match="128 levels"):
        pack(endless)
    with pytest.raises(InvalidValue, match="128 levels"):
        pack({"a": endless})


def test_keys_of_subclasses_are_their_text_and_number_and_others_are_refused() -> None:
    class Text(str):
        __slots__ = ()

        def __str__(self) -> str:
            return "other"

    assert name_of(Text("x")) == "x"
    assert name_of(Level.HIGH) == name_of(3)
    assert math.isnan(key_of(name_of(float("nan"))))
    for key in ([1], {1}, Point(1), datetime(2026, 1, 1, tzinfo=UTC)):
        with pytest.raises(DeserializationError, match="a key of a cache is text"):
            name_of(key)


def test_arguments_of_calls() -> None:
    def name(*args: Any, **kwargs: Any) -> str:
        return call_name("f", args, kwargs)

    assert name(1, "a") == 'f[1,"a"]'
    assert name(1, b=2, a=1) == name(1, a=1, b=2) == 'f[1]{"a":1,"b":2}'
    names = [
        name(x) for x in (1, 1.0, True, None, "1", b"1", [1], (1,), {1}, 2**70, Decimal(1), timedelta(1), Level.HIGH)
    ]
    assert len(set(names)) == len(names)
    assert name({"a": 1, "b": 2}) == name({"b": 2, "a": 1})
    assert name({1, 2, 3}) == name({3, 2, 1})
    assert name({"~": "bytes", "v": "eA=="}) != name(b"x")
    with pytest.raises(InvalidValue, match="argument 1"):
        name(1, object())
    with pytest.raises(InvalidValue, match="surrogate"):
        name("\ud800")
