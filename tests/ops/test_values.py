"""Values as JSON bytes: what encode, normalise and parse accept, change and refuse (docs/reference/semantics.md 1)."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import ipaddress
import json
import math
import re
import sys
import types
import warnings
from collections import OrderedDict, UserDict, UserString, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock
from uuid import UUID

import attrs
import msgspec
import numpy as np
import pandas as pd
import pydantic
import pytest
from conformance import same
from hypothesis import given
from json_values import (
    ANYTHING,
    PLAIN,
    Account,
    Colour,
    Level,
    Real,
    Row,
    Text,
    Whole,
    Word,
    nested,
)
from value_changes import encode_with_change_at

from scopestate.errors import DeserializationError, InvalidValue
from scopestate.ops import values
from scopestate.ops.apply import MISSING
from scopestate.ops.results import SetResult, StateEvent, UpdateResult
from scopestate.ops.writes import DELETE


class Point(NamedTuple):
    x: int
    y: int


class Lying(dict[str, Any]):
    def items(self) -> Any:
        return [("made up", math.nan)]


class LyingList(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([math.nan])


@Mapping.register
class Fields(msgspec.Struct):
    """A struct that is also a mapping, as an event of the engine is."""


class Opaque:
    pass


ACCEPTED: list[tuple[object, bytes]] = [
    (None, b"null"),
    (True, b"true"),
    (0, b"0"),
    (-(2**63), b"-9223372036854775808"),
    (2**64 - 1, b"18446744073709551615"),
    (2.0, b"2.0"),
    (-0.0, b"-0.0"),
    (5e-324, b"5e-324"),
    ("é✓𝄞\x00", '"é✓𝄞\\u0000"'.encode()),
    ("null", b'"null"'),
    ({"": None, "a b": [1, 1.0, True]}, b'{"":null,"a b":[1,1.0,true]}'),
    ([], b"[]"),
    ({}, b"{}"),
    ({"a": {"b": [{"c": []}]}}, b'{"a":{"b":[{"c":[]}]}}'),
]


@pytest.mark.parametrize(("value", "data"), ACCEPTED)
def test_plain_data_is_written_compactly_and_comes_back_as_it_was(value: object, data: bytes) -> None:
    assert values.encode(value) == data
    assert same(values.decode(data), value)
    assert same(values.normalise(value), value)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ((1, (2,)), [1, [2]]),
        (Point(1, 2), [1, 2]),
        (OrderedDict(a=1), {"a": 1}),
        (Level.HIGH, 3),
        (Word.YES, "yes"),
        (Text("t"), "t"),
        (Whole(7), 7),
        (Real(2.0), 2.0),
        (Whole(2**64), 2.0**64),
        ({Word.YES: Text("t")}, {"yes": "t"}),
        (Lying(a=1), {"a": 1}),
        (LyingList([1]), [1]),
        ({"deep": [Whole(7), {"t": (Real(0.5),)}]}, {"deep": [7, {"t": [0.5]}]}),
    ],
)
def test_subclasses_become_the_plain_json_they_hold(value: object, plain: object) -> None:
    assert same(values.normalise(value), plain)
    assert same(values.decode(values.encode(value)), plain)


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**25, -(10**308)])
@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: {"n": n}, lambda n: [[n]]])
def test_an_integer_beyond_64_bits_becomes_a_float(number: int, wrap: Any) -> None:
    assert same(values.decode(values.encode(wrap(number))), wrap(float(number)))


NOT_JSON: list[tuple[object, str]] = [
    (math.nan, "nan is not a JSON number"),
    (math.inf, "inf is not a JSON number"),
    (-math.inf, "-inf is not a JSON number"),
    (Real(math.nan), "nan is not a JSON number"),
    ("\ud800", "lone surrogate"),
    ("a\udfffb", "lone surrogate"),
    (10**400, "overflows a 64-bit float"),
    (-(10**5000), "overflows a 64-bit float"),
    (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "datetime is not JSON; store value.isoformat()"),
    (dt.date(2026, 1, 1), "date is not JSON; store value.isoformat()"),
    (dt.timedelta(1), "timedelta is not JSON; store value.total_seconds()"),
    (Decimal("1.5"), "Decimal is not JSON; store str(value)"),
    (Fraction(1, 2), "Fraction is not JSON; store str(value)"),
    (UUID(int=1), "UUID is not JSON; store str(value)"),
    (b"bytes", "bytes is not JSON; store base64"),
    (bytearray(b"b"), "bytearray is not JSON; store base64"),
    ({1, 2}, "set is not JSON; store sorted(value)"),
    (frozenset(), "frozenset is not JSON; store sorted(value)"),
    (Colour.RED, "Colour is not JSON; store value.value"),
    (MISSING, "Missing is not JSON; MISSING stands for a key that does not exist"),
    (DELETE, "Absence is not JSON; KEEP and DELETE are what the function of `modify` may return; to remove the key"),
    (Account(), "Account is not JSON; store msgspec.to_builtins(value)"),
    (Row(), "Row is not JSON; store msgspec.to_builtins(value)"),
    (msgspec.Raw(b"1"), "Raw is not JSON; store msgspec.json.decode(value)"),
    (Fields(), "Fields is not JSON; store dict(value)"),
    (UserDict(a=1), "UserDict is not JSON; store dict(value)"),
    (deque([1]), "deque is not JSON; store list(value)"),
    (Opaque(), "Opaque is not JSON; store what describes it"),
    (msgspec.UNSET, "UnsetType is not JSON"),
]


@pytest.mark.parametrize(("value", "problem"), NOT_JSON, ids=lambda item: type(item).__name__)
@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda v: v, "$"),
        (lambda v: {"name": "Ada", "score": v}, "$.score"),
        (lambda v: {"users": [0, {}, (), {"score": v}]}, "$.users[3].score"),
        (lambda v: [[v]], "$[0][0]"),
        (lambda v: {"odd key": {"": [v]}}, '$["odd key"][""][0]'),
        (lambda v: {"é": {'a"b': {"0": v}}}, '$.é["a\\"b"]["0"]'),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_place(value: object, problem: str, wrap: Any, path: str) -> None:
    for check in (values.encode, values.normalise):
        with pytest.raises(InvalidValue) as caught:
            check(wrap(value))
        assert caught.value.path == path
        assert problem in caught.value.problem


@pytest.mark.parametrize(
    ("value", "path", "problem"),
    [
        ({1: "a"}, "$", "strings, found 1 (number); use str(key)"),
        ({"a": [{None: 1}]}, "$.a[0]", "found None (null)"),
        ({"a": {True: 1}}, "$.a", "found True (boolean)"),
        ({Level.HIGH: 1}, "$", "found a key of type Level"),
        ({10**5000: 1}, "$", "found a key of type int"),
        ({"ok": 1, "a\ud800": 1}, '$["a\\ud800"]', "a key with a lone surrogate"),
        ([{"\udc00": {}}], '$[0]["\\udc00"]', "a key with a lone surrogate"),
    ],
)
def test_a_key_that_is_not_unicode_text_is_refused_not_turned_into_text(value: object, path: str, problem: str) -> None:
    for check in (values.encode, values.normalise):
        with pytest.raises(InvalidValue) as caught:
            check(value)
        assert caught.value.path == path
        assert problem in caught.value.problem


class Model(pydantic.BaseModel):
    day: dt.date = dt.date(2026, 1, 1)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Python 3.14, that this old interface is not made for it
    import pydantic.v1


class OldModel(pydantic.v1.BaseModel):
    name: str = "Ada"


@attrs.define
class Part:
    name: str = "bolt"


async def count_up() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("value", "advice", "stored"),
    [
        (Model(), 'store value.model_dump(mode="json")', Model().model_dump(mode="json")),
        (pydantic.RootModel[list[int]]([1]), 'store value.model_dump(mode="json")', [1]),
        (OldModel(), "store json.loads(value.json())", json.loads(OldModel().json())),
        (pydantic.AnyUrl("http://a/"), "store str(value)", "http://a/"),
        (Part(), "store msgspec.to_builtins(value)", msgspec.to_builtins(Part())),
        (np.int64(3), "store value.item()", 3),
        (np.bool_(True), "store value.item()", True),
        (np.array([1, 2]), "store value.tolist()", [1, 2]),
        (pd.Series([1, 2]), "store value.tolist()", [1, 2]),
        (pd.DataFrame({"a": [1]}), 'store value.to_dict("records")', [{"a": 1}]),
        (pd.Timestamp("2026-01-01"), "store value.isoformat()", "2026-01-01T00:00:00"),
        (pd.NaT, "store None", None),
        (pd.NA, "store None", None),
        (Path("a"), "store str(value)", "a"),
        (ipaddress.ip_address("::1"), "store str(value)", "::1"),
        (ipaddress.ip_network("10.0.0.0/31"), "store str(value)", "10.0.0.0/31"),
        (UserString("x"), "store str(value)", "x"),
        (ValueError("x"), "store str(value)", "x"),
        (re.compile("a+"), "store value.pattern", "a+"),
        (1j, "store [value.real, value.imag]", [0.0, 1.0]),
        (memoryview(b"a"), "store base64", "YQ=="),
        (range(2), "store list(value)", [0, 1]),
        ((n for n in (1, 2)), "store list(value)", [1, 2]),
        ({"a": 1}.keys(), "store list(value)", ["a"]),
        (count_up(), "store [item async for item in value]", [1]),
        (SetResult(None, b"1"), "store value.to_dict()", SetResult(None, b"1").to_dict()),
        (UpdateResult(None, b"1"), "store value.to_dict()", UpdateResult(None, b"1").to_dict()),
        (StateEvent("state:created", "s", "k", None, b"1", 1), "store dict(value)", {"scope": "s"}),
    ],
    ids=lambda item: type(item).__name__ if not isinstance(item, str) else "",
)
def test_what_to_store_instead_is_said_and_can_be_stored(value: object, advice: str, stored: object) -> None:
    with pytest.raises(InvalidValue) as caught:
        values.encode({"a": value})

    assert f"{type(value).__name__} is not JSON; {advice}" in caught.value.problem
    assert same(values.decode(values.encode(stored)), stored)


def test_a_coroutine_is_to_be_awaited() -> None:
    async def answer() -> int:
        return 1

    with contextlib.closing(answer()) as value, pytest.raises(InvalidValue, match="await it, and store its result"):
        values.encode(value)


class Meta(type):
    """Answers no question about its classes."""

    def __getattr__(cls, name: str) -> Any:
        raise RuntimeError(name)


class Elusive(type):
    """Ends the program that asks about its classes, if it can."""

    def __getattribute__(cls, name: str) -> Any:
        raise SystemExit(name)


class Unbound:
    """A proxy of something that is not there: each look at it raises."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError("nothing is bound here")


@pytest.mark.parametrize("kind", [str, int, float, dict, list, tuple])
def test_a_mock_of_a_json_type_is_none(kind: type) -> None:
    for value in (Mock(spec=kind), {"a": Mock(spec=kind)}):
        with pytest.raises(InvalidValue, match="Mock is not JSON"):
            values.encode(value)


@pytest.mark.parametrize("meta", [Meta, Elusive, type(Unbound)])
def test_what_cannot_be_described_is_refused_all_the_same(meta: type) -> None:
    value = Unbound() if meta is type else meta("Odd", (), {})()  # made here: pytest asks about its parameters
    with pytest.raises(InvalidValue, match="store what describes it"):
        values.encode([value])
    with pytest.raises(InvalidValue, match="a key of type"):
        values.encode({value: 1})


def flat() -> tuple[Any, Any]:
    value = {"low": 0, "high": 0}
    return value, value


def objects_inside() -> tuple[Any, Any]:
    inner = {"low": 0}
    return {"a": [inner], "high": 0}, inner


def a_list() -> tuple[Any, Any]:
    inner = {"low": 0}
    return [{"high": 0}, inner], inner


def with_tuple() -> tuple[Any, Any]:
    inner = {"low": 0}
    return {"a": (inner, 1), "high": 0}, inner


def with_subclass() -> tuple[Any, Any]:
    inner = OrderedDict(low=0)
    return {Text("a"): inner, "high": 0}, inner


@pytest.mark.parametrize("shape", [flat, objects_inside, a_list, with_tuple, with_subclass])
@pytest.mark.parametrize(
    "bad", [math.nan, {1, 2}, dt.date(2026, 1, 1), {1: 2}, nested(129), 10**400], ids=lambda item: type(item).__name__
)
def test_what_another_thread_puts_in_between_is_refused_or_not_stored(
    shape: Callable[[], tuple[Any, Any]], bad: object
) -> None:
    step = 17 if isinstance(bad, dict) and "k" in bad else 1  # the deep one is read for long
    for change in (lambda inner: inner.update(low=bad), lambda inner: inner.update(new=bad)):
        came, opcode = True, 0
        while came:
            opcode += step
            value, inner = shape()
            clean = values.encode(value)
            stored, came = encode_with_change_at(opcode, value, functools.partial(change, inner))
            assert stored is None or stored == clean, f"opcode {opcode}"
        assert opcode > 20


@pytest.mark.parametrize("shape", [flat, objects_inside, a_list, with_tuple, with_subclass])
def test_a_value_that_another_thread_changes_is_stored_as_of_one_moment(shape: Callable[[], tuple[Any, Any]]) -> None:
    came, opcode = True, 0
    while came:
        opcode += 1
        value, inner = shape()
        before = values.encode(value)

        def change(value: Any = value, inner: Any = inner) -> None:
            (value[0] if isinstance(value, list) else value)["high"] = 1
            inner.update(low=1, new=1)

        stored, came = encode_with_change_at(opcode, value, change)
        assert stored in (before, values.encode(value)), f"opcode {opcode}: {stored!r}"
    assert opcode > 20


def test_a_value_that_never_stands_still_is_refused() -> None:
    inner: list[Any] = []

    value = {"a": inner, "b": (inner,)}

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_name == "_is_unchanged":
            inner.append(len(inner))
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(InvalidValue, match="another thread changed the value") as caught:
            values.encode(value)
    finally:
        sys.settrace(before)
    assert caught.value.path == "$"


@pytest.mark.parametrize("innermost", [1, "x", Whole(1), {}, []])
def test_128_levels_are_accepted_and_129_refused(innermost: object) -> None:
    own = 1 if isinstance(innermost, dict | list) else 0

    assert same(
        values.decode(values.encode(nested(128 - own, innermost))), values.normalise(nested(128 - own, innermost))
    )

    with pytest.raises(InvalidValue, match="more than 128 nested levels"):
        values.encode(nested(129 - own, innermost))


@pytest.mark.parametrize("levels", [129, 5_000, 100_000])
def test_too_deep_is_refused_however_deep(levels: int) -> None:
    with pytest.raises(InvalidValue, match="more than 128 nested levels"):
        values.encode(nested(levels))


def test_a_value_that_contains_itself_is_refused() -> None:
    ring: dict[str, Any] = {}
    ring["a"] = ring
    ring["b"] = [ring]

    with pytest.raises(InvalidValue, match="contains itself") as caught:
        values.encode(ring)

    assert caught.value.path == "$" + ".a" * 128


def test_the_text_of_the_error_names_problem_and_place() -> None:
    with pytest.raises(InvalidValue) as caught:
        values.normalise([math.nan], "$.value")

    assert str(caught.value) == "nan is not a JSON number; store None or a string - at `$.value[0]`"


def test_normalise_shares_no_container_with_its_argument() -> None:
    value: dict[str, Any] = {"a": [{"b": []}]}

    plain = values.normalise(value)
    plain["a"][0]["b"].append(1)

    assert value == {"a": [{"b": []}]}


# --- the fast check and the exact one agree ---------------------------------------------------------------------------


@given(ANYTHING)
def test_encode_accepts_and_refuses_exactly_what_the_slow_check_does(value: object) -> None:
    def outcome(check: Callable[[object], object]) -> tuple[str, object]:
        try:
            return "accepted", check(value)
        except InvalidValue as error:
            return "refused", str(error)

    fast_verdict, fast = outcome(lambda given: values.decode(values.encode(given)))
    slow_verdict, slow = outcome(values.normalise)

    assert fast_verdict == slow_verdict
    assert same(fast, slow)


@given(ANYTHING)
def test_encoding_what_was_normalised_is_the_same_text(value: object) -> None:
    try:
        plain = values.normalise(value)
    except InvalidValue:
        return
    assert values.encode(plain) == values.encode(value)
    assert same(values.normalise(plain), plain)


@given(PLAIN)
def test_parsing_what_was_encoded_changes_nothing(value: object) -> None:
    try:
        data = values.encode(value)
    except InvalidValue:
        return
    assert values.parse(data) == data
    assert values.parse(data.decode()) == data
    assert same(values.decode(data), json.loads(data))


# --- text from outside ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "data"),
    [
        (' { "a" : [ 1 ,\t2.0 ] }\r\n', b'{"a":[1,2.0]}'),
        ("-0", b"-0.0"),
        ("[-0, -0.0, 0, 1e-0]", b"[-0.0,-0.0,0,1.0]"),
        ('{"day": "2026-01-02", "-0": -0}', b'{"day":"2026-01-02","-0":-0.0}'),
        ("[-0,18446744073709551616]", b"[-0.0,18446744073709552000.0]"),
        ("18446744073709551615", b"18446744073709551615"),
        ("-9223372036854775808", b"-9223372036854775808"),
        ("-9223372036854775809", None),
        ("1" + "0" * 308, b"1e308"),
        ("1e5", b"100000.0"),
        ("1E4", b"10000.0"),
        ('{"a":1,"b":2,"a":3}', b'{"a":3,"b":2}'),
        ('{"a":-0,"b":2,"a":3}', b'{"a":3,"b":2}'),
        ('"\\ud834\\udd1e\\u00e9\\/"', '"𝄞é/"'.encode()),
        ("1e-400", b"0.0"),
    ],
)
def test_text_from_outside_becomes_the_text_we_would_write(text: str, data: bytes | None) -> None:
    expected = data if data is not None else values.encode(float(text))

    for given_text in (text, text.encode()):
        parsed = values.parse(given_text)
        assert same(values.decode(parsed), values.decode(expected))
        assert parsed == values.encode(values.decode(parsed))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "nul",
        "NaN",
        "Infinity",
        "-Infinity",
        "[-0, NaN]",
        "1e400",
        "-1e400",
        "1" + "0" * 309,
        "1" + "0" * 5000,
        '"\\ud800"',
        '"\\udc00 tail"',
        '{"\\ud800 tail": 1}',
        "\ud800",
        '"\ud800"',
        "01",
        "-00",
        "1 2",
        "[1,]",
        "{'a': 1}",
        "\ufeff1",
        "[" * 129 + "]" * 129,
        "[" * 129 + "-0" + "]" * 129,
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        b'"\xff"',
        b'"\xed\xa0\x80"',
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_text_that_is_not_json_for_us_is_a_deserialization_error(text: str | bytes) -> None:
    with pytest.raises(DeserializationError):
        values.parse(text)


def test_128_levels_of_text_are_read() -> None:
    text = "[" * 128 + "]" * 128

    assert values.parse(text) == text.encode()


@pytest.mark.parametrize("read", [values.parse, values.check])
def test_text_that_is_not_unicode_is_refused_with_the_place(read: Callable[[bytes], object]) -> None:
    """With every version of msgspec, whose own errors differ."""
    with pytest.raises(DeserializationError, match=r"not Unicode text: .* 0xff in position 6"):
        read(b'{"key"\xff:1}')
    with pytest.raises(DeserializationError, match=r"not Unicode text: .* 0xe9 in position 8"):
        read(b'{"key":"\xe9"}')
