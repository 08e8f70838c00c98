"""New functions of the wire, and new fields of the six: what they are read into, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from turns.stored import Limits, Stored

from scopestate.errors import (
    BatchTooLarge,
    Conflict,
    DeserializationError,
    InvalidPageLimits,
    UpdateRefused,
    ValueTooLarge,
)
from scopestate.ops import Increment
from scopestate.ops.functions import BUILT_IN, read_request
from scopestate.ops.turns import Deadline, Delete, Get, Set, Turn, Update
from scopestate.ops.values import decode
from scopestate.ops.writes import DeleteWith, Once, SetWith, UpdateWith, unwrapped


@pytest.fixture
def stored() -> Stored:
    found = Stored()
    found.put(a={"n": 1}, b=None, c=3)
    return found


def call(stored: Stored, function_id: str, **fields: Any) -> Any:
    """Call a function as a worker does."""
    request = read_request(function_id, {"scope": "s", **fields}, Limits())
    assert request.scope == "s"
    row = BUILT_IN[function_id]
    assert ("write" in row.rights) == request.turn.writes
    assert unwrapped(request.turn).function_id == function_id
    try:
        text = row.answer(stored.run(request.turn), request.tell)
    except (Conflict, UpdateRefused) as error:
        text = row.refusal(error)
    assert text is not None
    return decode(text)


def test_get_entry(stored: Stored) -> None:
    assert call(stored, "state::get-entry", key="a") == {"value": {"n": 1}, "revision": 1}
    stored.run(SetWith("a", b"1", deadline=Deadline(ttl_ms=5)))
    assert call(stored, "state::get-entry", key="a") == {"value": 1, "revision": 4, "expires_at": 1005}
    assert call(stored, "state::get-entry", key="b") == {"value": None, "revision": 2}
    assert call(stored, "state::get-entry", key="x") is None


def test_compare_and_set(stored: Stored) -> None:
    cas = "state::compare-and-set"
    assert call(stored, cas, key="c", expected=3, value=4) == {"swapped": True}
    assert call(stored, cas, key="c", expected=3, value=5) == {"swapped": False, "current": 4}
    assert call(stored, cas, key="b", value=1) == {"swapped": True}
    assert call(stored, cas, key="new", expected=None, value=1) == {"swapped": True}
    assert call(stored, cas, key="new", value=2) == {"swapped": False, "current": 1}
    assert call(stored, cas, key="c", expected_revision=4, value=6) == {"swapped": True, "old_value": 4, "revision": 7}
    again = {"key": "c", "expected": 6, "value": 7, "idempotency_key": "i"}
    assert call(stored, cas, **again) == {"swapped": True, "old_value": 6, "revision": 8}
    assert call(stored, cas, **again) == {"swapped": True, "old_value": 6, "revision": 8, "replayed": True}


def test_a_transaction_commits_with_its_results(stored: Stored) -> None:
    answer = call(
        stored,
        "state::transaction",
        checks=[{"key": "a", "revision": 1}, {"key": "x", "absent": True}, {"key": "c", "value": 3}],
        ops=[
            {"type": "set", "key": "x", "value": None, "ttl_ms": 5},
            {"type": "update", "key": "a", "ops": [{"type": "increment", "path": "n", "by": 2}]},
            {"type": "delete", "key": "c"},
            {"type": "touch", "key": "b", "expires_at": 2000},
        ],
    )
    assert answer == {
        "committed": True,
        "revision": 6,
        "results": [
            {"old_value": None, "new_value": None},
            {"old_value": {"n": 1}, "new_value": {"n": 3}},
            {"old_value": 3},
            {"touched": True},
        ],
    }
    assert stored.entries["x"].expires_ms == 1005
    assert stored.entries["b"].expires_ms == 2000


def test_a_transaction_that_does_not_commit_says_why(stored: Stored) -> None:
    checks = [{"key": "a", "revision": 9}, {"key": "c", "revision": 3}, {"key": "x", "revision": 2}]
    assert call(stored, "state::transaction", checks=checks, ops=[]) == {
        "committed": False,
        "conflicts": [{"index": 0, "key": "a", "revision": 1}, {"index": 2, "key": "x", "revision": 0}],
        "errors": [],
    }
    ops = [{"type": "delete", "key": "a"}, {"type": "update", "key": "c", "ops": [{"type": "remove", "path": "n"}]}]
    answer = call(stored, "state::transaction", ops=ops)
    (error,) = answer["errors"]
    assert (answer["committed"], answer["conflicts"]) == (False, [])
    assert (error["index"], error["op_index"], error["code"]) == (1, 0, "remove.target_not_object")
    assert stored.revision == 3


def test_keys_counts_and_deletes(stored: Stored) -> None:
    assert call(stored, "state::list_keys") == {"keys": ["a", "b", "c"]}
    assert call(stored, "state::list_keys", after="a", reverse=True, limit=1) == {"keys": ["c"]}
    assert call(stored, "state::count", start="b") == {"count": 2}
    assert call(stored, "state::delete-range", prefix="b") == {"deleted": 1, "more": False}
    assert call(stored, "state::touch", key="a", ttl_ms=5) == {"touched": True}
    assert call(stored, "state::touch", key="a", expires_at=9_000_000_000_000) == {"touched": True}
    assert call(stored, "state::touch", key="x", ttl_ms=None) == {"touched": False}


def test_pages(stored: Stored) -> None:
    first = call(stored, "state::list_entries", limit=2, prefix="")
    assert first["entries"] == [["a", {"n": 1}], ["b", None]]
    assert not first["done"]
    second = call(stored, "state::list_entries", limit=2, prefix="", cursor=first["next_cursor"])
    assert second == {"entries": [["c", 3]], "next_cursor": None, "done": True}


MISFITS: list[tuple[str, Any, str]] = [
    ("state::get-entry", [], "expected an object, got array"),
    ("state::get-entry", {"scope": "s"}, "missing required field `key`"),
    ("state::get-entry", {"scope": "s", "key": 1}, r"Expected `string`, got `integer` - at `\$.key`"),
    ("state::compare-and-set", {"scope": "s", "key": "k"}, "missing required field `value`"),
    (
        "state::compare-and-set",
        {"scope": "s", "key": "k", "value": 1, "expected_revision": -1},
        "a revision is a whole number",
    ),
    ("state::transaction", {"scope": "s"}, "missing required field `ops`"),
    ("state::transaction", {"scope": "s", "ops": [{"type": "set", "key": "k"}]}, r"`value` - at `\$.ops\[0\].value`"),
    ("state::transaction", {"scope": "s", "ops": [{"type": "update", "key": "k"}]}, r"`ops` - at `\$.ops\[0\].ops`"),
    ("state::transaction", {"scope": "s", "ops": [{"type": "merge", "key": "k"}]}, "Invalid enum value"),
    ("state::transaction", {"scope": "s", "ops": [{"type": ["set"], "key": "k"}]}, r"at `\$.ops\[0\].type`"),
    ("state::transaction", {"scope": "s", "ops": [{"type": "delete", "key": "k", "value": 1}]}, "of type `set`"),
    ("state::transaction", {"scope": "s", "ops": [{"type": "set", "key": "k", "value": 1, "ops": []}]}, "`update`"),
    ("state::transaction", {"scope": "s", "ops": [{"type": "delete", "key": "k", "ttl_ms": 1}]}, "no deadline"),
    (
        "state::transaction",
        {"scope": "s", "ops": [{"type": "delete", "key": "k", "tll_ms": 1}]},
        "unknown field `tll_ms`",
    ),
    ("state::transaction", {"scope": "s", "ops": {}}, "Expected `array`, got `object`"),
    (
        "state::transaction",
        {"scope": "s", "ops": [], "checks": [{"key": "k", "revison": 1}]},
        "unknown field `revison`",
    ),
    ("state::transaction", {"scope": "s", "ops": [], "checks": [{"key": "k", "revision": 1.0}]}, "got `number`"),
    ("state::transaction", {"scope": "s", "ops": [], "checks": [{"key": "k", "revision": 2**53}]}, "a whole number"),
    ("state::delete-range", {"scope": "s"}, "name what to delete"),
    ("state::delete-range", {"scope": "s", "perfix": "a"}, "name what to delete"),
    ("state::delete-range", {"scope": "s", "prefix": "a", "limit": 0}, "1 or more"),
    ("state::count", {"scope": 1}, r"Expected `string`, got `integer` - at `\$.scope`"),
    ("state::transaction", {"scope": "s", "ops": [{"type": "touch", "key": "k", "keep_ttl": True}]}, "not for a touch"),
    ("state::transaction", {"scope": "s", "ops": [{"type": "touch", "key": "k"}]}, "give `ttl_ms` or `expires_at`"),
    ("state::transaction", {"scope": "s", "ops": [], "checks": [{"key": "k"}]}, "a check has one of"),
    ("state::transaction", {"scope": "s", "ops": [], "checks": [{"key": "k", "absent": True, "value": 1}]}, "one of"),
    ("state::list_keys", {"scope": "s", "limit": -1}, "a limit is 0 or more"),
    ("state::touch", {"scope": "s", "key": "k"}, "give `ttl_ms` or `expires_at`"),
    ("state::touch", {"scope": "s", "key": "k", "ttl_ms": 0}, "`ttl` is more than 0"),
]


@pytest.mark.parametrize(("function_id", "payload", "problem"), MISFITS)
def test_input_that_does_not_fit_names_the_function_and_the_problem(
    function_id: str, payload: Any, problem: str
) -> None:
    with pytest.raises(DeserializationError, match=problem) as caught:
        read_request(function_id, payload, Limits())
    assert f"input for {function_id}: " in str(caught.value)


@pytest.mark.parametrize("limits", [{"limit": 0}, {"limit": 1001}, {"max_bytes": 255}, {"max_bytes": 8_000_001}])
def test_the_size_of_a_page_is_bounded(limits: Any) -> None:
    with pytest.raises(InvalidPageLimits, match="is from") as caught:
        read_request("state::list_entries", {"scope": "s", **limits}, Limits())
    assert caught.value.code == "INVALID_PAGE_LIMITS"


def test_a_transaction_keeps_to_the_limits_of_the_engine() -> None:
    ops = [{"type": "set", "key": "k", "value": "x" * 100}]
    with pytest.raises(BatchTooLarge, match="102 bytes, over the limit of 101"):
        read_request("state::transaction", {"scope": "s", "ops": ops}, Limits(max_batch_bytes=101))
    with pytest.raises(ValueTooLarge):
        read_request("state::transaction", {"scope": "s", "ops": ops}, Limits(max_value_bytes=101))
    with pytest.raises(ValueTooLarge):
        read_request(
            "state::compare-and-set", {"scope": "s", "key": "k", "value": "x" * 100}, Limits(max_value_bytes=101)
        )


def test_a_batch_that_is_too_large_is_refused_when_it_is_read() -> None:
    ops = [{"type": "delete", "key": str(number)} for number in range(1001)]
    with pytest.raises(BatchTooLarge):
        read_request("state::transaction", {"scope": "s", "ops": ops}, Limits())


def test_every_string_may_have_unknown_fields_beside_it(stored: Stored) -> None:
    assert call(stored, "state::count", unknown=1) == {"count": 3}


PLAIN: dict[str, tuple[dict[str, Any], Turn[Any]]] = {
    "state::set": ({"value": 1}, Set("k", b"1")),
    "state::update": ({"ops": [{"type": "increment", "path": "", "by": 1}]}, Update("k", (Increment("", 1),))),
    "state::delete": ({}, Delete("k")),
    "state::get": ({}, Get("k")),
}


def asked(function_id: str, **options: Any) -> tuple[Turn[Any], bool | None]:
    """Read a call of one of the reference's functions with options."""
    request = read_request(function_id, {"scope": "s", "key": "k", **PLAIN[function_id][0], **options}, Limits())
    assert request.scope == "s"
    return request.turn, request.durable


@pytest.mark.parametrize("function_id", PLAIN)
def test_without_a_new_field_a_turn_stays_what_it_is(function_id: str) -> None:
    plain = PLAIN[function_id][1]
    for options in ({}, {"other": 2, "_caller_worker_id": "x"}):
        found, durable = asked(function_id, **options)
        assert (type(found), found, durable) == (type(plain), plain, None)


def test_new_fields_make_a_turn_with_conditions() -> None:
    assert asked("state::set", if_revision=3, ttl_ms=5, durable=True) == (
        SetWith("k", b"1", 3, Deadline(ttl_ms=5)),
        True,
    )
    assert asked("state::set", if_absent=True) == (SetWith("k", b"1", 0), None)
    assert asked("state::set", if_absent=False) == (SetWith("k", b"1"), None)
    assert asked("state::set", if_revision=None) == (SetWith("k", b"1"), None)
    assert asked("state::update", atomic=True, keep_ttl=True) == (
        UpdateWith("k", (Increment("", 1),), None, Deadline(keep=True), True),
        None,
    )
    assert asked("state::delete", if_revision=2) == (DeleteWith("k", 2), None)
    assert asked("state::delete", idempotency_key="i") == (Once(DeleteWith("k"), "i"), None)


def test_an_option_of_another_function_is_a_field_that_is_not_known() -> None:
    assert asked("state::delete", ttl_ms="x", atomic=1) == (Delete("k"), None)
    assert asked("state::set", atomic=1) == (Set("k", b"1"), None)
    assert asked("state::get", if_revision="x") == (Get("k"), None)


def test_a_condition_and_a_check_read_and_a_plain_write_does_not() -> None:
    def reads(function_id: str, **fields: Any) -> bool:
        return read_request(function_id, {"scope": "s", "key": "k", **fields}, Limits()).reads

    assert reads("state::set", value=1, if_revision=1)
    assert reads("state::set", value=1, if_absent=True)
    assert reads("state::delete", if_revision=0)
    assert reads("state::compare-and-set", value=1)
    assert reads("state::transaction", ops=[], checks=[{"key": "k", "absent": True}])
    assert reads("state::transaction", ops=[], if_revision=1)
    assert not reads("state::set", value=1, if_revision=None, if_absent=False, ttl_ms=1)
    assert not reads("state::transaction", ops=[{"type": "delete", "key": "k"}])
    assert not reads("state::touch", ttl_ms=1)


@pytest.mark.parametrize(
    "options",
    [
        {"if_revision": "1"},
        {"if_revision": 1.0},
        {"if_revision": 2**53},
        {"if_revision": 2**70},
        {"if_revision": -1},
        {"if_revision": True},
        {"if_revision": 1, "if_absent": True},
        {"ttl_ms": 1, "expires_at": 1},
        {"ttl_ms": 2**53},
        {"durable": 1},
        {"idempotency_key": 1},
        {"idempotency_key": ""},
        {"idempotency_key": "x" * 257},
        {"idempotency_key": chr(0xD800)},
        {"keep_ttl": None},
    ],
)
@pytest.mark.parametrize("function_id", ["state::set", "state::update"])
def test_new_fields_that_do_not_fit_are_refused(function_id: str, options: Any) -> None:
    with pytest.raises(DeserializationError, match=f"input for {function_id}: ") as caught:
        asked(function_id, **options)
    assert caught.value.code == "deserialization_error"
