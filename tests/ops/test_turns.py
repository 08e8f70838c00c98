"""What each turn decides, with values alone: no engine, no actor, no store."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from scopestate.errors import StorageError, ValueTooLarge
from scopestate.ops import Increment, OpError, turns
from scopestate.ops.results import SetResult, UpdateResult
from scopestate.ops.turns import Change, Turn


class Limits:
    def __init__(self, max_value_bytes: int) -> None:
        self.max_value_bytes = max_value_bytes


class Holding(turns.PlainView):
    """A view of a dict."""

    def __init__(self, table: dict[str, bytes] | None = None, *, max_value_bytes: int = 0) -> None:
        self.scope = "s"
        self.limits = Limits(max_value_bytes)
        self._table = table or {}

    def get(self, key: str) -> bytes | None:
        return self._table.get(key)

    def values(self) -> list[bytes]:
        return list(self._table.values())

    def items(self) -> list[tuple[str, bytes]]:
        return list(self._table.items())


TABLE = {"a": b"1", "b": b'"text"'}


def test_a_set_changes_its_key_and_answers_with_both_values() -> None:
    assert turns.Set("a", b"2").decide(Holding(TABLE)) == ((Change("a", b"1", b"2"),), SetResult(b"1", b"2"))


def test_a_set_of_a_new_key_finds_nothing_before() -> None:
    assert turns.Set("new", b"null").decide(Holding(TABLE)) == (
        (Change("new", None, b"null"),),
        SetResult(None, b"null"),
    )


def test_an_update_applies_its_ops_to_the_value() -> None:
    assert turns.Update("a", (Increment("", 4),)).decide(Holding(TABLE)) == (
        (Change("a", b"1", b"5"),),
        UpdateResult(b"1", b"5", ()),
    )


def test_an_update_of_a_new_key_begins_with_an_empty_object() -> None:
    assert turns.Update("new", (Increment("n", 1),)).decide(Holding(TABLE)) == (
        (Change("new", None, b'{"n":1}'),),
        UpdateResult(None, b'{"n":1}', ()),
    )


def test_an_op_that_does_not_fit_is_told_and_the_others_are_applied() -> None:
    changes, answer = turns.Update("b", (Increment("", 1),)).decide(Holding(TABLE))

    assert changes == (Change("b", b'"text"', b'"text"'),)
    assert [type(error) for error in answer.errors] == [OpError]


def test_an_update_whose_value_grows_past_the_limit_is_refused() -> None:
    view = Holding({"a": b"9"}, max_value_bytes=1)

    assert turns.Update("a", ()).decide(view)[1].new_json == b"9"
    with pytest.raises(ValueTooLarge, match="2 bytes"):
        turns.Update("a", (Increment("", 1),)).decide(view)


def test_a_delete_changes_its_key_even_if_there_is_nothing() -> None:
    assert turns.Delete("a").decide(Holding(TABLE)) == ((Change("a", b"1", None),), b"1")
    assert turns.Delete("new").decide(Holding(TABLE)) == ((Change("new", None, None),), None)


@pytest.mark.parametrize(
    ("turn", "answer"),
    [
        (turns.Get("a"), b"1"),
        (turns.Get("new"), None),
        (turns.List(), [b"1", b'"text"']),
        (turns.Items(), [("a", b"1"), ("b", b'"text"')]),
    ],
    ids=repr,
)
def test_a_read_answers_and_changes_nothing(turn: Turn[Any], answer: object) -> None:
    assert turn.decide(Holding(TABLE)) == ((), answer)


ALL: list[Turn[Any]] = [
    turns.Set("k", b"1"),
    turns.Update("k", ()),
    turns.Delete("k"),
    turns.Get("k"),
    turns.List(),
    turns.Items(),
]


@pytest.mark.parametrize("turn", ALL, ids=repr)
def test_what_a_turn_says_of_itself_is_what_it_decides(turn: Turn[Any]) -> None:
    """`writes` and `keys` are read by every backend; a turn that changes something else would be lost there."""
    changes, _ = turn.decide(Holding(TABLE))

    assert turn.writes is bool(changes)
    assert turn.keys is None or {change.key for change in changes} <= set(turn.keys)


@pytest.mark.parametrize("turn", ALL, ids=repr)
def test_a_decision_leaves_the_view_alone_and_is_the_same_again(turn: Turn[Any]) -> None:
    view = Holding(dict(TABLE))
    before = view.items()

    assert turn.decide(view) == turn.decide(view)
    assert view.items() == before


@pytest.mark.parametrize(
    ("turn", "code", "words"),
    [
        (turns.Set("k", b"1"), "SET_ERROR", "Failed to set value: no"),
        (turns.Update("k", ()), "UPDATE_ERROR", "Failed to update value: no"),
        (turns.Delete("k"), "DELETE_ERROR", "Failed to delete value: no"),
        (turns.Get("k"), "GET_ERROR", "Failed to get value: no"),
        (turns.List(), "LIST_ERROR", "Failed to list values: no"),
        (turns.Items(), "LIST_ERROR", "Failed to list values: no"),
    ],
    ids=repr,
)
def test_the_failure_of_a_store_is_worded_for_the_operation(turn: Turn[Any], code: str, words: str) -> None:
    failure = turn.failed(StorageError("no"))

    assert (failure.code, str(failure)) == (code, words)


def test_a_turn_weighs_what_its_values_weigh() -> None:
    assert turns.Set("k", b"x" * 1000).size() == 1000
    assert turns.Update("k", (Increment("", 1),) * 3).size() == 24
    assert turns.Get("k").size() == turns.Delete("k").size() == turns.List().size() == 0


def test_turns_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        turns.Get("k").key = "other"  # type: ignore[misc]  # what is refused
    assert msgspec.structs.asdict(turns.Get("k")) == {"key": "k"}
