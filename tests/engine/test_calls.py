"""The six functions, as methods and through `call`: what goes in, what comes out, what is refused."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections import OrderedDict
from typing import Any

import pytest
from conformance import same
from ids import stable
from watching import Seen

from scopestate import Engine, ScopestateError, SetResult, UpdateResult, messages, ops
from scopestate.errors import DeserializationError, FunctionNotFound, InvalidValue, ValueTooLarge

HOSTILE_NAMES = [
    "",
    " ",
    "\x00",
    "a\x00b",
    "\n",
    "../../etc/passwd",
    "/",
    ".",
    "C:\\con",
    "%2e%2e",
    "'; DROP TABLE state; --",
    "state:x",
    "__proto__",
    "constructor",
    "é",
    "e\u0301",
    "\U0001f642",
    "\u202e",
    "\ufeff",
    "\uffff",
    "Users",
    "users",
    "x" * 10_000,
]


def refusal_of(engine: Engine, function_id: str, payload: Any) -> ScopestateError:
    """Make a call that must be refused, and return why."""
    with pytest.raises(ScopestateError) as refused:
        engine.call(function_id, payload)
    return refused.value


# ------------------------------------------------------------------------------------------------------ set and get


def test_set_tells_the_old_value_the_new_one_and_whether_the_key_is_new(engine: Engine) -> None:
    first = engine.set("s", "k", {"n": 1})
    second = engine.set("s", "k", None)

    assert isinstance(first, SetResult)
    assert (first.old_value, first.new_value, first.created) == (None, {"n": 1}, True)
    assert (second.old_value, second.new_value, second.created) == ({"n": 1}, None, False)


def test_results_of_calls_are_plain_json_values(engine: Engine) -> None:
    assert same(engine.call("state::set", {"scope": "s", "key": "k", "value": 1}), {"old_value": None, "new_value": 1})
    assert same(engine.call("state::get", {"scope": "s", "key": "k"}), 1)
    assert same(engine.call("state::update", {"scope": "s", "key": "k", "ops": []}), {"old_value": 1, "new_value": 1})
    assert same(engine.call("state::list", {"scope": "s"}), [1])
    assert same(engine.call("state::list_groups", {}), {"groups": ["s"]})
    assert same(engine.call("state::delete", {"scope": "s", "key": "k"}), 1)


def test_results_compare_by_content_and_show_it(engine: Engine) -> None:
    one, other = engine.set("s", "a", [1]), engine.set("s", "b", [1])
    update = engine.update("s", "c", [])

    assert one == other
    with pytest.raises(TypeError, match="unhashable"):  # equal whatever the order of the keys: no hash of bytes fits
        hash(one)
    assert engine.set("s", "d", {"a": 1, "b": 2}) == engine.set("s", "e", {"b": 2, "a": 1})
    assert one != update
    assert one != "something else"
    assert repr(one) == "SetResult(old_value=None, new_value=[1], revision=1)"
    assert repr(update) == "UpdateResult(old_value=None, new_value={}, revision=3)"


def test_get_tells_a_missing_key_from_a_stored_null_by_its_default(engine: Engine) -> None:
    engine.set("s", "null", None)

    assert engine.get("s", "null", "missing") is None
    assert engine.get("s", "nothing", "missing") == "missing"
    assert engine.get("s", "nothing") is None
    assert engine.call("state::get", {"scope": "s", "key": "nothing"}) is None


def test_a_value_may_be_given_as_data_but_not_twice(engine: Engine) -> None:
    assert engine.call("state::set", {"scope": "s", "key": "k", "data": None}) == {"old_value": None, "new_value": None}

    refusal = refusal_of(engine, "state::set", {"scope": "s", "key": "k", "value": 1, "data": 1})

    assert "duplicate field" in str(refusal)
    assert engine.get("s", "k", "missing") is None


def test_fields_that_nobody_knows_are_ignored(engine: Engine) -> None:
    engine.call("state::set", {"scope": "s", "key": "k", "value": 1, "ttl": 5, "Scope": "other"})
    engine.call("state::update", {"scope": "s", "key": "k", "ops": [{"type": "set", "path": "", "value": 2, "x": 1}]})

    assert engine.call("state::list", {"scope": "s", "key": 5}) == [2]
    assert engine.call("state::list_groups", {"scope": 1}) == {"groups": ["s"]}


@pytest.mark.parametrize(
    ("function_id", "payload", "facts"),
    [
        ("state::set", {"key": "k", "value": 1}, ["scope", "missing"]),
        ("state::set", {"scope": "s", "value": 1}, ["key", "missing"]),
        ("state::set", {"scope": "s", "key": "k"}, ["value", "missing"]),
        ("state::set", {"scope": 5, "key": "k", "value": 1}, ["$.scope", "string", "number"]),
        ("state::set", {"scope": "s", "key": None, "value": 1}, ["$.key", "string", "null"]),
        ("state::get", {"scope": "s"}, ["key", "missing"]),
        ("state::get", {"scope": "s", "key": True}, ["$.key", "string", "boolean"]),
        ("state::delete", {"scope": "s", "key": ["k"]}, ["$.key", "string", "array"]),
        ("state::delete", {}, ["scope", "missing"]),
        ("state::list", {}, ["scope", "missing"]),
        ("state::list", {"scope": {}}, ["$.scope", "string"]),
        ("state::update", {"scope": "s", "key": "k"}, ["ops", "missing"]),
        ("state::update", {"scope": "s", "key": "k", "ops": None}, ["$.ops", "null", "array"]),
        ("state::update", {"scope": "s", "key": "k", "ops": {}}, ["$.ops", "object", "array"]),
        ("state::update", {"scope": "s", "key": "k", "ops": ["x"]}, ["$.ops[0]"]),
        ("state::update", {"scope": "s", "key": "k", "ops": [{"type": "explode", "path": ""}]}, ["explode"]),
        ("state::update", {"scope": "s", "key": "k", "ops": [{"type": "increment", "path": "n"}]}, ["$.ops[0].by"]),
        ("state::set", None, ["object"]),
        ("state::get", ["s", "k"], ["object"]),
        ("state::list", "s", ["object"]),
        ("state::list_groups", None, ["object"]),
        ("state::list_groups", [], ["object"]),
    ],
)
def test_input_that_does_not_fit_is_refused_whole_by_name_and_place(
    function_id: str, payload: Any, facts: list[str], engine: Engine
) -> None:
    engine.set("s", "k", "before")
    seen = Seen()
    engine.on_change()(seen)

    refusal = refusal_of(engine, function_id, payload)

    assert refusal.code == "deserialization_error"
    assert str(refusal).startswith(f"Failed to deserialize input for {function_id}: ")
    assert [fact for fact in facts if fact not in str(refusal)] == []
    assert engine.get("s", "k") == "before"
    engine.drain(timeout=20)
    assert seen.events == []


def test_an_unknown_function_is_named(engine: Engine) -> None:
    with pytest.raises(FunctionNotFound, match="state::explode") as refused:
        engine.call("state::explode", {})

    assert refused.value.code == "function_not_found"
    with pytest.raises(FunctionNotFound):
        engine.call(["not", "a", "name"], {})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [None, 5, b"bytes", ["s"], {"s": 1}, "half \ud800"], ids=repr)
@pytest.mark.parametrize("what", ["scope", "key"])
def test_methods_refuse_names_that_are_no_text(name: Any, what: str, engine: Engine) -> None:
    scope, key = (name, "k") if what == "scope" else ("s", name)
    calls = [
        lambda: engine.set(scope, key, 1),
        lambda: engine.get(scope, key),
        lambda: engine.delete(scope, key),
        lambda: engine.update(scope, key, []),
        lambda: engine.ask(messages.Set(scope, key, 1)),
        lambda: engine.ask(messages.Get(scope, key)),
        lambda: engine.ask(messages.Delete(scope, key)),
        lambda: engine.ask(messages.Update(scope, key, ())),
    ]
    if what == "scope":
        calls += [lambda: engine.list(scope), lambda: engine.scope(scope), lambda: engine.ask(messages.List(scope))]

    for call in calls:
        with pytest.raises(DeserializationError, match=what):
            call()
    assert engine.list_groups() == []


def test_names_may_be_of_a_subclass_of_str(engine: Engine) -> None:
    class Name(str):
        __slots__ = ()

    engine.set(Name("s"), Name("k"), 1)

    assert engine.get("s", "k") == 1
    assert [type(group) for group in engine.list_groups()] == [str]


# ------------------------------------------------------------------------------------------------------ isolation


def test_what_the_caller_does_to_a_value_later_never_reaches_the_engine(engine: Engine) -> None:
    value: dict[str, Any] = {"list": [1]}
    merged: dict[str, Any] = {"inner": {}}

    result = engine.set("s", "k", value)
    engine.update("s", "k", [ops.Merge(merged)])
    value["list"].append(2)
    merged["inner"]["x"] = 1
    result.new_value["list"].append(3)
    engine.get("s", "k")["list"].append(4)
    engine.list("s")[0]["list"].append(5)

    assert engine.get("s", "k") == {"list": [1], "inner": {}}


def test_a_payload_and_an_op_may_be_changed_after_the_call(engine: Engine) -> None:
    payload: dict[str, Any] = {"scope": "s", "key": "k", "value": {"a": []}}
    appended: list[Any] = []
    engine.call("state::set", payload)
    engine.call(
        "state::update",
        {"scope": "s", "key": "k", "ops": [{"type": "append", "path": "a", "value": appended}]},
    )

    payload["value"]["a"].append("late")
    appended.append("late")

    assert engine.get("s", "k") == {"a": [[]]}


# --------------------------------------------------------------------------------------------------- limits of JSON

RECURSIVE: list[Any] = []
RECURSIVE.append(RECURSIVE)


def nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (math.nan, "$"),
        (math.inf, "$"),
        ({"a": [1, -math.inf]}, "$.a[1]"),
        ({"users": [{"score": math.nan}]}, "$.users[0].score"),
        ({"a": {1: 2}}, "$.a"),
        ({"a": {None: 2}}, "$.a"),
        ({"a": "half \ud800"}, "$.a"),
        ({"half \udfff": 1}, '$["half \\udfff"]'),
        ([b"bytes"], "$[0]"),
        ({"t": dt.datetime(2024, 1, 1, tzinfo=dt.UTC)}, "$.t"),
        ([{1, 2}], "$[0]"),
        ({"o": object()}, "$.o"),
        ({"big": 10**400}, "$.big"),
        ({"a b": [object()]}, '$["a b"][0]'),
        (nested(129), "$" + "[0]" * 128),
        (RECURSIVE, "$" + "[0]" * 128),
    ],
    ids=lambda value: stable(value)[:40],
)
def test_what_json_cannot_hold_is_refused_with_its_path(value: Any, path: str, engine: Engine) -> None:
    engine.set("s", "k", "before")
    calls = [
        lambda: engine.set("s", "k", value),
        lambda: engine.call("state::set", {"scope": "s", "key": "k", "value": value}),
        lambda: engine.ask(messages.Set("s", "k", value)),
        lambda: engine.tell(messages.Set("s", "k", value)),
    ]

    for call in calls:
        with pytest.raises(InvalidValue) as refused:
            call()
        assert refused.value.code == "deserialization_error"
        assert refused.value.path == path
    with pytest.raises(InvalidValue) as refused:
        engine.update("s", "k", [ops.Set("", 1), ops.Set("", value)])
    assert refused.value.path == "$.ops[1].value" + path.removeprefix("$")
    assert engine.get("s", "k") == "before"


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (nested(128), nested(128)),
        (2**64 - 1, 2**64 - 1),
        (-(2**63), -(2**63)),
        (2**64, float(2**64)),
        (-(2**63) - 1, float(-(2**63) - 1)),
        (-0.0, -0.0),
        (2.0, 2.0),
        (True, True),
        ((1, (2,)), [1, [2]]),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        ("\x00", "\x00"),
        ({"": {"": None}}, {"": {"": None}}),
        (5e-324, 5e-324),
        ({"__proto__": 1}, {"__proto__": 1}),
    ],
    ids=lambda value: stable(value)[:40],
)
def test_what_json_can_hold_comes_back_with_its_type(value: Any, stored: Any, engine: Engine) -> None:
    result = engine.set("s", "k", value)

    assert same(result.new_value, stored)
    assert same(engine.get("s", "k"), stored)
    assert same(engine.list("s"), [stored])
    assert same(engine.call("state::get", {"scope": "s", "key": "k"}), stored)


def test_an_update_that_would_nest_too_deep_is_refused_and_leaves_the_value_alone(engine: Engine) -> None:
    engine.set("s", "k", [])

    with pytest.raises(InvalidValue, match="128"):
        engine.update("s", "k", [ops.Append("", nested(128))])

    assert engine.get("s", "k") == []


# ---------------------------------------------------------------------------------------------------------- update


def test_update_takes_structs_dicts_and_any_iterable(engine: Engine) -> None:
    engine.update("s", "k", [ops.Increment("n", 1), {"type": "increment", "path": "n", "by": 1}])
    engine.update("s", "k", (ops.Decrement("n", 5),))
    engine.update("s", "k", (ops.Merge({"x": x}) for x in range(3)))

    assert engine.get("s", "k") == {"n": -3, "x": 2}


def test_a_refused_op_is_reported_and_the_others_are_applied(engine: Engine) -> None:
    engine.set("s", "k", {"text": "many"})

    result = engine.update(
        "s", "k", [ops.Increment("text", 1), ops.Increment("n", 1), ops.Remove("a"), ops.Append("n", 1)]
    )

    assert isinstance(result, UpdateResult)
    assert result.new_value == {"text": "many", "n": 1}
    assert [(error.op_index, error.code) for error in result.errors] == [
        (0, "increment.not_number"),
        (3, "append.type_mismatch"),
    ]
    assert "string" in result.errors[0].message
    wire = engine.call(
        "state::update", {"scope": "s", "key": "k", "ops": [{"type": "increment", "path": "text", "by": 1}]}
    )
    assert type(wire["errors"]) is list
    assert type(wire["errors"][0]) is dict
    assert set(wire["errors"][0]) == {"op_index", "code", "message"}
    assert same(json.loads(json.dumps(wire)), wire)


def test_an_update_whose_ops_all_fail_still_creates_the_key(engine: Engine) -> None:
    result = engine.update("s", "k", [ops.Set("__proto__", 1)])

    assert (result.created, result.new_value) == (True, {})
    assert engine.list("s") == [{}]


def test_what_is_no_op_refuses_the_whole_update(engine: Engine) -> None:
    for bad in (5, None, "ops", [5], [{"path": ""}], [ops.Increment("n", 1.0)], [ops.Increment("n", 2**63)]):  # type: ignore[arg-type]
        with pytest.raises(DeserializationError, match=r"\$\.ops"):
            engine.update("s", "k", bad)  # type: ignore[arg-type]
    assert engine.get("s", "k", "missing") == "missing"


# -------------------------------------------------------------------------------------------- delete, list, groups


def test_delete_returns_the_value_and_is_no_error_for_a_missing_key(engine: Engine) -> None:
    engine.set("s", "k", {"n": 1})

    assert engine.delete("s", "k") == {"n": 1}
    assert engine.delete("s", "k") is None
    assert engine.call("state::delete", {"scope": "unknown", "key": "k"}) is None
    assert engine.list_groups() == []


def test_list_keeps_the_order_in_which_keys_were_first_set(engine: Engine) -> None:
    for key in ("c", "a", "b"):
        engine.set("s", key, key)
    engine.set("s", "c", "C")
    engine.update("s", "b", [ops.Append("", "!")])
    assert engine.list("s") == ["C", "a", "b!"]

    engine.delete("s", "c")
    engine.set("s", "c", "again")

    assert engine.list("s") == ["a", "b!", "again"]
    assert engine.list("unknown") == []


def test_groups_are_sorted_by_bytes_and_only_those_with_keys(engine: Engine) -> None:
    names = ["b", "a", "B", "é", "\U0001f642", "\uffff", "", "a.b", "a/b"]
    for name in names:
        engine.set(name, "k", 1)
    engine.get("only read", "k")
    engine.list("only listed")
    engine.set("emptied", "k", 1)
    engine.delete("emptied", "k")

    assert engine.list_groups() == sorted(names, key=str.encode)


def test_every_name_is_safe_and_no_two_are_the_same(open_store: Any) -> None:
    engine = open_store()
    for number, name in enumerate(HOSTILE_NAMES):
        engine.set(name, name, number)
        engine.set("keys", name, number)

    def check(engine: Engine) -> None:
        assert engine.list("keys") == list(range(len(HOSTILE_NAMES)))
        assert engine.list_groups() == sorted([*HOSTILE_NAMES, "keys"], key=str.encode)
        assert [engine.get(name, name) for name in HOSTILE_NAMES] == list(range(len(HOSTILE_NAMES)))

    check(engine)
    if open_store.kind != "memory":
        engine.close()
        check(open_store())


# ------------------------------------------------------------------------------------------------------ size limit


def test_a_value_over_the_limit_is_refused_by_each_way_in(open_engine: Any) -> None:
    engine = open_engine(limits={"max_value_bytes": 10})
    engine.set("s", "k", "12345678")  # ten bytes with its quotes
    calls = [
        lambda: engine.set("s", "k", "123456789"),
        lambda: engine.call("state::set", {"scope": "s", "key": "k", "value": "123456789"}),
        lambda: engine.ask(messages.Set("s", "k", "123456789")),
        lambda: engine.ask(messages.Set("s", "k", "123456789"), block=False).get(timeout=20),
        lambda: engine.update("s", "k", [ops.Append("", "9")]),
        lambda: engine.ask(messages.Update("s", "k", (ops.Append("", "9"),))),
        lambda: engine.scope("s").actor_ref.ask(messages.Set("s", "k", "123456789")),
    ]

    for call in calls:
        with pytest.raises(ValueTooLarge, match="max_value_bytes = 10") as refused:
            call()
        assert refused.value.code == "VALUE_TOO_LARGE"
        assert (refused.value.scope, refused.value.key, refused.value.size, refused.value.limit) == ("s", "k", 11, 10)
    assert engine.get("s", "k") == "12345678"


def test_a_refused_update_fires_nothing(open_engine: Any) -> None:
    engine = open_engine(limits={"max_value_bytes": 10})
    seen = Seen()
    engine.on_change()(seen)

    with pytest.raises(ValueTooLarge):
        engine.update("s", "k", [ops.Merge({"long": "value"})])

    engine.drain(timeout=20)
    assert seen.events == []
    assert engine.list_groups() == []


# ----------------------------------------------------------------------------------------------------- ask and tell


def test_ask_answers_what_the_method_of_the_same_name_returns(engine: Engine) -> None:
    assert engine.ask(messages.Set("s", "k", 1)) == engine.set("t", "k", 1)
    assert engine.ask(messages.Get("s", "k")) == 1
    assert engine.ask(messages.Get("s", "missing")) is None
    assert engine.ask(messages.Update("s", "k", (ops.Increment("", 1),))).new_value == 2
    assert engine.ask(messages.List("s")) == [2]
    assert engine.ask(messages.ListGroups()) == ["s", "t"]
    assert engine.ask(messages.ListGroups(), block=False).get(timeout=20) == ["s", "t"]
    assert engine.ask(messages.Delete("s", "k")) == 2


def test_a_message_that_was_told_is_seen_by_the_next_call(engine: Engine) -> None:
    engine.tell(messages.Set("s", "k", 1))
    engine.tell(messages.Update("s", "k", (ops.Increment("", 1),)))

    assert engine.get("s", "k") == 2


@pytest.mark.parametrize("message", [None, "set", {"type": "set"}, ops.Set("", 1), object()], ids=stable)
def test_what_is_no_message_is_refused(message: Any, engine: Engine) -> None:
    for call in (engine.ask, engine.tell):
        with pytest.raises(DeserializationError, match="not a message"):
            call(message)


def test_a_scope_handle_makes_the_same_calls(engine: Engine) -> None:
    users = engine.scope("users")

    assert users.set("ada", 1) == engine.set("other", "ada", 1)
    assert users.get("ada") == 1
    assert users.get("bob", "nobody") == "nobody"
    assert users.update("ada", [ops.Increment("", 1)]).new_value == 2
    assert users.list() == [2]
    assert users.delete("ada") == 2
    assert users.name == "users"
    assert repr(users) == "<Scope 'users'>"
    assert engine.list_groups() == ["other"]


# ------------------------------------------------------------------------------------------------- calls that wait
