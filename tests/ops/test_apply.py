"""Ops applied to values: every conformance vector, and promises for any ops (docs/reference/semantics.md 3)."""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

import pytest
from conformance import load, same
from hypothesis import given
from hypothesis import strategies as st

from scopestate.errors import DeserializationError
from scopestate.ops import (
    MISSING,
    Append,
    Decrement,
    Increment,
    Merge,
    Remove,
    Set,
    UpdateOp,
    apply,
    checked,
    convert_ops,
    values,
)

VECTORS = load("vectors.json")


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_conformance_vector(vector: dict[str, Any]) -> None:
    old = vector.get("old", MISSING)
    ops = convert_ops(vector["ops"])
    before = copy.deepcopy((old, ops))

    new, errors = apply(old, ops)

    assert same(new, vector["new"])
    assert [(e.op_index, e.code) for e in errors] == [(e["op_index"], e["code"]) for e in vector["errors"]]
    for error, expected in zip(errors, vector["errors"], strict=True):
        assert [fact for fact in expected["mentions"] if fact not in error.message] == []
        assert error.doc_url is None
    assert (old, ops) == before


def test_increment_of_text_is_an_error_and_leaves_the_value_alone() -> None:
    before = {"hits": "many"}

    after, errors = apply(before, [Increment("hits", 1)])

    assert after == {"hits": "many"}
    assert errors[0].code == "increment.not_number"
    assert "string" in errors[0].message


def test_a_result_out_of_range_says_so_honestly() -> None:
    after, errors = apply({"n": 2**64 - 1}, [Increment("n", 1), Decrement("n", 1)])

    assert same(after, {"n": 2**64 - 2})
    assert [(e.op_index, e.code) for e in errors] == [(0, "increment.not_number")]
    assert "range" in errors[0].message
    assert "18446744073709551615" in errors[0].message


def test_a_float_result_out_of_range_is_refused_too() -> None:
    # `by` is far too small to move a float this large; an infinite value that got in by hand must not go on.
    after, errors = apply({"n": float("inf")}, [Increment("n", 1)])

    assert after == {"n": float("inf")}
    assert errors[0].code == "increment.not_number"
    assert "64-bit floats" in errors[0].message


def test_the_boolean_true_is_not_the_number_1() -> None:
    after, errors = apply({"n": True}, [Increment("n", 1)])

    assert same(after, {"n": True})
    assert "boolean" in errors[0].message


def test_a_missing_key_stays_fresh_until_an_op_succeeds() -> None:
    assert apply(MISSING, [Set("__proto__", 1), Increment("", 4)])[0] == 4
    after, errors = apply(MISSING, [Remove("x"), Increment("", 4)])
    assert same(after, {})
    assert errors[0].code == "increment.not_number"


@pytest.mark.parametrize("old", [{}, None])
def test_a_stored_empty_value_is_not_fresh(old: object) -> None:
    after, errors = apply(old, [Increment("", 4)])

    assert same(after, old)
    assert errors[0].code == "increment.not_number"


def test_appending_to_null_or_nothing_starts_a_string_or_an_array() -> None:
    assert apply(MISSING, [Append("", "a"), Append("", "b")])[0] == "ab"
    assert apply(None, [Append("", 1), Append("", [2])])[0] == [1, [2]]
    assert apply({"f": None}, [Append("f", None)])[0] == {"f": [None]}


LONG = "x" * 257


@pytest.mark.parametrize("old", [MISSING, None, "a", [1], {"f": 1}, 5])
@pytest.mark.parametrize("value", ["b", 2, None, [3]])
@pytest.mark.parametrize("path", [None, []])
def test_a_null_or_empty_path_of_append_is_the_root(old: Any, value: Any, path: Any) -> None:
    def facts(path: Any) -> tuple[Any, list[tuple[str, str]]]:
        new, errors = apply(old, [Append(path, value)])
        return new, [(error.code, error.message) for error in errors]

    assert facts(path) == facts("")


@pytest.mark.parametrize("old", [MISSING, None, {}, {"f": None}, {"f": "a"}, {"f": [1]}, {"f": {}}, {"f": 1}])
@pytest.mark.parametrize("value", ["b", 2, None, [3]])
@pytest.mark.parametrize("name", ["f", "a.b", "__proto__", LONG])
def test_one_segment_of_append_is_the_field_of_that_name(old: Any, value: Any, name: str) -> None:
    def facts(path: Any) -> tuple[Any, list[tuple[str, str]]]:
        new, errors = apply(old, [Append(path, value)])
        return new, [(error.code, error.message) for error in errors]

    assert facts([name]) == facts(name)


@pytest.mark.parametrize(
    ("old", "path", "value", "new"),
    [
        # An absent leaf starts an array, for a string too.
        (MISSING, ["a", "b"], 1, {"a": {"b": [1]}}),
        (MISSING, ["a", "b"], "x", {"a": {"b": ["x"]}}),
        ({}, ["a", "b", "c"], "x", {"a": {"b": {"c": ["x"]}}}),
        ({"a": {}}, ["a", "b"], None, {"a": {"b": [None]}}),
        ({"a": {}}, ["a", "b"], [1], {"a": {"b": [[1]]}}),
        # A leaf that is there follows the rule of fields.
        ({"a": {"b": None}}, ["a", "b"], "x", {"a": {"b": "x"}}),
        ({"a": {"b": None}}, ["a", "b"], 1, {"a": {"b": [1]}}),
        ({"a": {"b": "x"}}, ["a", "b"], "y", {"a": {"b": "xy"}}),
        ({"a": {"b": [1]}, "c": 2}, ["a", "b"], [2], {"a": {"b": [1, [2]]}, "c": 2}),
        # Steps that are not objects are replaced.
        ({"a": None}, ["a", "b"], 1, {"a": {"b": [1]}}),
        ({"a": [0], "c": 2}, ["a", "b"], "x", {"a": {"b": ["x"]}, "c": 2}),
        ({"a": {"b": "text"}}, ["a", "b", "c"], 1, {"a": {"b": {"c": [1]}}}),
        ({"a": 5}, ["a", "0"], 1, {"a": {"0": [1]}}),
        ({}, ["a.b", "é"], 1, {"a.b": {"é": [1]}}),
        ({}, ["s"] * 32, 1, None),
    ],
)
def test_append_walks_a_path_of_segments(old: Any, path: list[str], value: Any, new: Any) -> None:
    if new is None:
        new = [value]
        for segment in reversed(path):
            new = {segment: new}

    assert apply(old, [Append(path, value)]) == (new, [])


@pytest.mark.parametrize(
    ("old", "path", "code", "mentions"),
    [
        (None, ["a", "b"], "append.target_not_object", ['["a", "b"]', "null"]),
        ([1], ["a", "b"], "append.target_not_object", ["array"]),
        ("x", ["a", "b"], "append.target_not_object", ["string"]),
        ({"a": {"b": 1}}, ["a", "b"], "append.type_mismatch", ['["a", "b"]', "number"]),
        ({"a": {"b": {}}}, ["a", "b"], "append.type_mismatch", ["object"]),
        ({"a": {"b": "x"}}, ["a", "b"], "append.type_mismatch", ["boolean"]),
        ({}, ["s"] * 33, "append.path.too_deep", ["33", "32"]),
        ({}, [""], "append.path.empty_segment", []),
        (5, ["a", ""], "append.path.empty_segment", []),
        ({}, ["a", LONG], "append.path.segment_too_long", ["257", "256"]),
        ({}, ["a", "prototype"], "append.path.proto_polluted", ["prototype"]),
    ],
)
def test_append_at_a_path_is_refused_with_the_code_of_its_problem(
    old: Any, path: list[str], code: str, mentions: list[str]
) -> None:
    new, (error,) = apply(old, [Append(path, True)])

    assert same(new, old)
    assert error.code == code
    assert [fact for fact in mentions if fact not in error.message] == []


def test_a_refused_append_ends_no_freshness_and_one_at_a_path_does() -> None:
    assert apply(MISSING, [Append([""], 1), Append("", "x")])[0] == "x"
    new, errors = apply(MISSING, [Append(["a", "b"], 1), Append("", "x")])

    assert new == {"a": {"b": [1]}}
    assert [(error.op_index, error.code) for error in errors] == [(1, "append.type_mismatch")]


def test_many_ops_on_one_object_leave_the_old_object_alone() -> None:
    old = {"n": 1, "list": [1], "deep": {"a": {"b": 1}}}
    before = copy.deepcopy(old)
    value = {"b": 2}

    new, errors = apply(
        old,
        [Increment("n", 1), Append("list", 2), Merge(value, path=["deep", "a"]), Set("v", value), Merge({"c": 3}, "v")],
    )

    assert errors == []
    assert new == {"n": 2, "list": [1, 2], "deep": {"a": {"b": 2}}, "v": {"b": 2, "c": 3}}
    assert old == before
    assert value == {"b": 2}


def test_a_root_set_by_an_op_is_not_changed_by_the_ops_after_it() -> None:
    value: dict[str, Any] = {"n": 1}
    ops: list[UpdateOp] = [Set("", value), Increment("n", 1), Set("m", 1), Remove("n")]

    assert apply(None, ops)[0] == {"m": 1}
    assert value == {"n": 1}
    assert apply(None, ops)[0] == {"m": 1}


def test_overwriting_keeps_the_place_of_a_field() -> None:
    new, _ = apply({"a": 1, "b": 2}, [Set("a", 3), Set("c", 4), Remove("b"), Set("b", 5)])

    assert list(new) == ["a", "c", "b"]


def test_half_a_surrogate_pair_in_a_name_counts_its_bytes_instead_of_crashing() -> None:
    name = "\ud800" * 86

    _, errors = apply({}, [Set(name, 1), Set("\ud800" * 85, 1)])

    assert [(e.op_index, e.code) for e in errors] == [(0, "set.path.segment_too_long")]
    assert "258" in errors[0].message


def test_a_merge_value_of_any_depth_is_measured_not_recursed_into() -> None:
    value: Any = 1
    for _ in range(50_000):
        value = {"k": value}

    _, errors = apply({}, [Merge(value)])

    assert errors[0].code == "merge.value.too_deep"
    assert "50000" in errors[0].message


def test_something_else_than_an_op_is_a_bug_and_raises() -> None:
    with pytest.raises(AssertionError):
        apply({}, [{"type": "remove", "path": "x"}])  # type: ignore[list-item]


# --- what holds for any ops -------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["", "a", "b", "a.b", "é", "__proto__", "constructor", "x" * 257, "é" * 129])
NUMBERS = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([-(2**63), 2**63 - 1, 2**63, 2**64 - 1, 0]),
    st.floats(allow_nan=False, allow_infinity=False),
)
BY = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([-(2**63), 2**63 - 1, 0, 1]))
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", "b", "", "__proto__"]), inner, max_size=3)
    ),
    max_leaves=8,
)
OPS = st.one_of(
    st.builds(Set, NAMES, PLAIN),
    st.builds(Merge, PLAIN, st.one_of(st.none(), NAMES, st.lists(NAMES, max_size=3), st.just(["d"] * 33))),
    st.builds(Increment, NAMES, BY),
    st.builds(Decrement, NAMES, BY),
    st.builds(Append, st.one_of(st.none(), NAMES, st.lists(NAMES, max_size=3), st.just(["d"] * 33)), PLAIN),
    st.builds(Remove, NAMES),
)
OLD = st.one_of(st.just(MISSING), PLAIN)


@given(OLD, st.lists(OPS, max_size=6))
def test_neither_the_old_value_nor_an_op_is_ever_changed(old: object, ops: list[UpdateOp]) -> None:
    before = copy.deepcopy((old, ops))

    apply(old, ops)

    assert same(old, before[0])
    assert all(
        type(op) is type(was) and same(getattr(op, field), getattr(was, field))
        for op, was in zip(ops, before[1], strict=True)
        for field in op.__struct_fields__
    )


@given(OLD, st.lists(OPS, max_size=6))
def test_a_refused_op_changes_nothing_at_all(old: object, ops: list[UpdateOp]) -> None:
    new, errors = apply(old, ops)

    refused = {error.op_index for error in errors}
    assert len(refused) == len(errors)
    again, none = apply(old, [op for index, op in enumerate(ops) if index not in refused])

    assert none == []
    assert same(again, new)


@given(OLD, st.lists(OPS, max_size=6))
def test_whatever_the_ops_the_result_is_json(old: object, ops: list[UpdateOp]) -> None:
    new, _ = apply(old, ops)

    assert same(values.decode(values.encode(new)), new)


@given(OLD, st.lists(OPS, max_size=6), st.integers(0, 6))
def test_ops_in_one_update_do_what_two_updates_would(old: object, ops: list[UpdateOp], cut: int) -> None:
    first, head = apply(old, ops[:cut])
    if old is MISSING and len(head) == len(ops[:cut]):
        return  # still fresh in one update, `{}` in two: the one difference that docs/reference/semantics.md 3.2 makes

    second, tail = apply(first, ops[cut:])
    new, errors = apply(old, ops)

    assert same(second, new)
    assert [e.code for e in head + tail] == [e.code for e in errors]


@given(NUMBERS, BY)
def test_adding_then_subtracting_brings_a_whole_number_back(number: float, by: int) -> None:
    new, errors = apply({"n": number}, [Increment("n", by), Decrement("n", by)])

    if errors == [] and type(number) is int:
        assert same(new, {"n": number})
    assert type(new["n"]) is type(number)


# ---------------------------------------------------------------------------------------- what one update may cost

NAMES = st.sampled_from(["", "a", "b"])
PATHS = st.lists(st.sampled_from("ab"), max_size=3)
WORDS = st.sampled_from(["", "x", "yz"])
SMALL = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)
OPS = st.one_of(
    st.builds(Append, NAMES | PATHS, WORDS | SMALL),
    st.builds(Append, NAMES | PATHS, WORDS),
    st.builds(Set, NAMES, SMALL),
    st.builds(Remove, NAMES),
    st.builds(Increment, NAMES, st.integers(-2, 2)),
    st.builds(
        Merge,
        st.dictionaries(st.sampled_from("ab"), SMALL, max_size=2),
        PATHS | NAMES,
    ),
)


@given(SMALL, st.lists(OPS, max_size=12))
def test_ops_together_do_what_they_do_one_by_one(old: Any, ops: list[UpdateOp]) -> None:
    before = copy.deepcopy((old, ops))
    expected, codes = old, []
    for index, op in enumerate(ops):
        expected, errors = apply(copy.deepcopy(expected), [op])
        codes += [(index, error.code, error.message) for error in errors]

    new, errors = apply(old, ops)

    assert same(new, expected)
    assert [(error.op_index, error.code, error.message) for error in errors] == codes
    assert (old, ops) == before


@pytest.mark.parametrize(
    ("old", "op"),
    [
        ("x" * 20_000_000, Append("", "y")),
        ({"a": "x" * 20_000_000}, Append("a", "y")),
        ([None] * 2_000_000, Append("", 1)),
        ({"a": [None] * 2_000_000}, Append("a", 1)),
        ({"a": {"b": "x" * 20_000_000}}, Append(["a", "b"], "y")),
        ({"a": {"b": [None] * 2_000_000}}, Append(["a", "b"], 1)),
        ({"a": {str(n): n for n in range(200_000)}}, Append(["a", "b"], 1)),
        ({"a": {"b": {str(n): n for n in range(200_000)}}}, Merge({"n": 1}, ["a", "b"])),
        ({str(n): n for n in range(200_000)}, Increment("n", 1)),
    ],
    ids=[
        "text",
        "text field",
        "array",
        "array field",
        "nested text",
        "nested array",
        "nested object",
        "nested merge",
        "root",
    ],
)
def test_many_ops_copy_a_large_value_once(old: Any, op: UpdateOp) -> None:
    mixed = [op, Append("a", []) if isinstance(old, dict) else Increment("", 1)]  # the second is mostly refused
    began = time.thread_time()
    apply(old, mixed * 2_500)
    # Copying at each op takes more than ten seconds, idle; copying once takes a few milliseconds.
    assert time.thread_time() - began < 5.0


def test_an_update_has_at_most_ten_thousand_ops() -> None:
    ops = [{"type": "increment", "path": "n", "by": 1}] * 10_000
    assert len(convert_ops(ops)) == len(checked(ops)) == 10_000

    for read in (convert_ops, checked):
        with pytest.raises(DeserializationError, match=r"an update has at most 10000 ops, found .* - at `\$\.ops`"):
            read([*ops, ops[0]])
    with pytest.raises(DeserializationError, match="at most 10000 ops, found more"):
        checked(itertools.repeat(Increment("n", 1)))
