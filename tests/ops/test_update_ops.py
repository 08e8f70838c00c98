"""How ops are read from JSON (`convert_ops`) and Python (`checked`): places, values (docs/reference/semantics.md 3)."""

from __future__ import annotations

import datetime as dt
import math
from enum import IntEnum
from typing import Any

import msgspec
import pytest
from conformance import same

from scopestate import ops
from scopestate.errors import DeserializationError, InvalidValue
from scopestate.ops import Append, Decrement, Increment, Merge, OpError, Remove, Set, UpdateOp, checked, convert_ops
from scopestate.ops.update_ops import json_type


class Step(IntEnum):
    TWO = 2


class Text(str):
    __slots__ = ()


WELL_FORMED: list[tuple[dict[str, Any], UpdateOp]] = [
    ({"type": "set", "path": "a.b", "value": [1]}, Set("a.b", [1])),
    ({"type": "set", "path": ""}, Set("", None)),
    ({"type": "set", "path": "", "value": None}, Set("", None)),
    ({"type": "merge", "value": {"a": 1}}, Merge({"a": 1})),
    ({"type": "merge", "value": None, "path": None}, Merge(None, None)),
    ({"type": "merge", "value": 1, "path": ""}, Merge(1, "")),
    ({"type": "merge", "value": {}, "path": ["a", ""]}, Merge({}, path=["a", ""])),
    ({"type": "merge", "value": {}, "path": []}, Merge({}, path=[])),
    ({"type": "increment", "path": "n", "by": 2**63 - 1}, Increment("n", 2**63 - 1)),
    ({"type": "decrement", "path": "n", "by": -(2**63)}, Decrement("n", -(2**63))),
    ({"type": "append", "path": "e", "value": None}, Append("e", None)),
    ({"type": "append", "path": "é", "value": {"k": 1}}, Append("é", {"k": 1})),
    ({"type": "append", "value": 1}, Append(None, 1)),
    ({"type": "append", "path": None, "value": "x"}, Append(None, "x")),
    ({"type": "append", "path": [], "value": 1}, Append([], 1)),
    ({"type": "append", "path": ["a", "", "é"], "value": 1}, Append(["a", "", "é"], 1)),
    ({"type": "remove", "path": "x"}, Remove("x")),
]


@pytest.mark.parametrize(("payload", "op"), WELL_FORMED)
def test_each_op_reads_the_same_from_json_and_from_python(payload: dict[str, Any], op: UpdateOp) -> None:
    assert convert_ops([payload]) == (op,)
    assert checked([payload]) == (op,)
    assert checked([op]) == (op,)
    assert convert_ops([{**payload, "comment": "ignored", "ignored": None}]) == (op,)


@pytest.mark.parametrize(("payload", "op"), WELL_FORMED)
def test_each_op_is_written_as_the_wire_has_it(payload: dict[str, Any], op: UpdateOp) -> None:
    assert convert_ops([msgspec.json.decode(msgspec.json.encode(op))]) == (op,)
    assert msgspec.json.decode(msgspec.json.encode(op))["type"] == payload["type"]
    assert msgspec.json.decode(msgspec.json.encode(op), type=UpdateOp) == op


MALFORMED: list[tuple[object, str, str]] = [
    ("increment", "", "invalid type: string, expected an op"),
    (None, "", "invalid type: null, expected an op"),
    ([], "", "invalid type: array, expected an op"),
    (["remove", "x"], "", "invalid type: array, expected an op"),
    ({}, ".type", "missing field `type`"),
    ({"path": "x"}, ".type", "missing field `type`"),
    ({"type": None, "path": "x"}, ".type", "invalid type: null, expected one of `set`"),
    ({"type": 1, "path": "x"}, ".type", "invalid type: number, expected one of `set`"),
    ({"type": "Set", "path": "x"}, ".type", "unknown variant `Set`, expected one of `set`"),
    ({"type": " set", "path": "x"}, ".type", "unknown variant ` set`"),
    ({"type": "", "path": "x"}, ".type", "unknown variant ``"),
    *(
        ({**fields, **path}, ".path", problem)
        for fields in (
            {"type": "set", "value": 1},
            {"type": "increment", "by": 1},
            {"type": "decrement", "by": 1},
            {"type": "remove"},
        )
        for path, problem in (
            ({}, "missing field `path`"),
            ({"path": None}, "invalid type: null, expected a string"),
            ({"path": 1}, "invalid type: number, expected a string"),
            ({"path": ["a"]}, "invalid type: array, expected a string"),
            ({"path": {}}, "invalid type: object, expected a string"),
        )
    ),
    *(
        ({"type": word, "path": "n", **by}, ".by", problem)
        for word in ("increment", "decrement")
        for by, problem in (
            ({}, "missing field `by`"),
            ({"by": None}, "invalid type: null, expected a whole number within 64 bits"),
            ({"by": True}, "invalid type: boolean, expected a whole number"),
            ({"by": 1.0}, "invalid type: floating point number, expected a whole number"),
            ({"by": "1"}, "invalid type: string, expected a whole number"),
            ({"by": [1]}, "invalid type: array, expected a whole number"),
            ({"by": 2**63}, "invalid value: expected a whole number from -9223372036854775808"),
            ({"by": -(2**63) - 1}, "invalid value: expected a whole number from -9223372036854775808"),
        )
    ),
    ({"type": "merge"}, ".value", "missing field `value`"),
    ({"type": "append", "path": "x"}, ".value", "missing field `value`"),
    *(
        ({"type": word, "value": {}, "path": path}, place, problem)
        for word in ("merge", "append")
        for path, place, problem in (
            (1, ".path", "expected a string, an array of strings or null"),
            ({}, ".path", "expected a string, an array of strings or null"),
            (["a", 1], ".path[1]", "invalid type: number, expected a string"),
            ([None], ".path[0]", "invalid type: null, expected a string"),
        )
    ),
]


@pytest.mark.parametrize(("payload", "place", "problem"), MALFORMED)
def test_a_malformed_op_is_refused_with_problem_and_place(payload: object, place: str, problem: str) -> None:
    for read in (convert_ops, checked):
        with pytest.raises(DeserializationError) as caught:
            read([{"type": "remove", "path": "fine"}, payload])
        assert problem in str(caught.value)
        assert str(caught.value).endswith(f" - at `$.ops[1]{place}`")


@pytest.mark.parametrize("payload", [None, {}, {"type": "remove", "path": "x"}, "remove", 1])
def test_ops_of_a_call_must_be_an_array(payload: object) -> None:
    with pytest.raises(DeserializationError, match=r"expected an array of ops - at `\$\.ops`"):
        convert_ops(payload)


def test_no_ops_is_a_valid_update() -> None:
    assert convert_ops([]) == ()
    assert checked([]) == ()
    assert checked(iter([])) == ()


def test_a_tuple_of_ops_counts_as_an_array_as_it_does_in_values() -> None:
    assert convert_ops(({"type": "remove", "path": "a"},)) == (Remove("a"),)


@pytest.mark.parametrize("single", [Increment("n", 1), 5, None])
def test_one_op_instead_of_a_list_of_ops_is_named_as_the_mistake(single: Any) -> None:
    with pytest.raises(DeserializationError, match=r"expected a list of ops - at `\$\.ops`"):
        checked(single)


# --- checked: what type checkers cannot see ---------------------------------------------------------------------------


def test_structs_and_dicts_may_be_mixed() -> None:
    given = (op for op in [Increment("n", 1), {"type": "set", "path": "a", "value": (1,)}, Remove("x")])

    assert checked(given) == (Increment("n", 1), Set("a", [1]), Remove("x"))


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (Increment("n", True), "invalid type: boolean, expected a whole number within 64 bits - at `$.ops[0].by`"),
        (Increment("n", 1.0), "invalid type: floating point number"),  # type: ignore[arg-type]
        (Decrement("n", 2**63), "invalid value: expected a whole number from"),
        (Increment(None, 1), "invalid type: null, expected a string - at `$.ops[0].path`"),  # type: ignore[arg-type]
        (Increment("n\ud800", 1), "lone surrogate is not Unicode text; JSON cannot hold it - at `$.ops[0].path`"),
        (Set(["a"], 1), "invalid type: array, expected a string"),  # type: ignore[arg-type]
        (Merge({}, path=7), "expected a string, an array of strings or null"),  # type: ignore[arg-type]
        (Merge({}, path=["a", "\ud800"]), "JSON cannot hold it - at `$.ops[0].path[1]`"),
        (OpError(0, "x", "y"), "invalid type: OpError, expected an op"),
        (object(), "invalid type: object, expected an op"),
    ],
)
def test_a_wrong_field_of_a_struct_is_refused(op: object, message: str) -> None:
    with pytest.raises(DeserializationError) as caught:
        checked([op])

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("op", "plain"),
    [
        (Increment("n", Step.TWO), Increment("n", 2)),
        (Increment(Text("n"), 1), Increment("n", 1)),
        (Increment("né", 1), Increment("né", 1)),
        (Set(Text("a"), Text("b")), Set("a", "b")),
        (Set("a", {"t": (1, 2), "big": 2**64}), Set("a", {"t": [1, 2], "big": 2.0**64})),
        (Merge({"a": ()}, path=("x", "y")), Merge({"a": []}, path=["x", "y"])),  # type: ignore[arg-type]
        (Append("a", Step.TWO), Append("a", 2)),
    ],
)
def test_fields_come_back_as_json_would_hold_them(op: UpdateOp, plain: UpdateOp) -> None:
    (found,) = checked([op])

    assert type(found) is type(plain)
    assert same(msgspec.structs.asdict(found), msgspec.structs.asdict(plain))


@pytest.mark.parametrize(
    ("op", "path"),
    [
        (Set("a", math.nan), "$.ops[1].value"),
        (Set("a", {"b": [math.nan]}), "$.ops[1].value.b[0]"),
        (Merge({"a": dt.date(2026, 1, 1)}), "$.ops[1].value.a"),
        (Append("a", [{1: 2}]), "$.ops[1].value[0]"),
        ({"type": "append", "path": "a", "value": {"odd key": b"x"}}, '$.ops[1].value["odd key"]'),
    ],
)
def test_a_value_that_json_cannot_hold_is_refused_with_its_place(op: object, path: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        checked([Remove("fine"), op])

    assert caught.value.path == path
    assert str(caught.value).endswith(f" - at `{path}`")


def test_checked_ops_share_nothing_with_the_caller() -> None:
    value: dict[str, Any] = {"list": [1]}
    path = ["a"]

    found = checked([Set("x", value), Merge(value, path=path), {"type": "append", "path": "x", "value": value}])
    value["list"].append(math.nan)
    path.append("\ud800")

    assert found == (Set("x", {"list": [1]}), Merge({"list": [1]}, path=["a"]), Append("x", {"list": [1]}))


def test_ops_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Increment("n", 1).by = 2  # type: ignore[misc]


def test_an_error_leaves_doc_url_out_when_there_is_none() -> None:
    assert msgspec.to_builtins(OpError(0, "c", "m")) == {"op_index": 0, "code": "c", "message": "m"}
    assert msgspec.to_builtins(OpError(0, "c", "m", "https://x"))["doc_url"] == "https://x"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, "null"), (True, "boolean"), (0, "number"), (0.5, "number"), ("", "string"), ([], "array"), ((), "array"),
        ({}, "object"), (b"", "bytes"),
    ],
)  # fmt: skip
def test_types_have_their_json_names(value: object, name: str) -> None:
    assert json_type(value) == name


def test_the_package_exports_what_it_names() -> None:
    assert all(hasattr(ops, name) for name in ops.__all__)
    assert list(ops.__all__) == sorted(ops.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
