"""From arguments and messages to turns: what callers may ask for, and what is refused before anything is done."""

from __future__ import annotations

import functools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from ids import stable
from turns.stored import Limits

from scopestate.errors import BatchTooLarge, DeserializationError, InvalidValue, ValueTooLarge
from scopestate.ops import MISSING, Increment, arguments, messages, turns
from scopestate.ops.callbacks import run_plainly
from scopestate.ops.options import range_of
from scopestate.ops.ranges import Count, DeleteRange, Entries, Keys, Pairs, Values
from scopestate.ops.transactions import Batch, Check, DeleteStep, SetStep, TouchStep, Transact, UpdateStep
from scopestate.ops.turns import Deadline, Entry, Range
from scopestate.ops.writes import (
    UNSET,
    CompareAndSet,
    DeleteWith,
    GetEntry,
    Modify,
    Once,
    SetWith,
    Touch,
    UpdateWith,
)

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
NOON_MS = 1_893_499_200_000


def turn_of(message: object, **limits: int) -> arguments.Asked[Any]:
    return arguments.turn_of(message, Limits(**limits), run_plainly)


def first(values: Any) -> Any:
    return values


OPS = (Increment("", 1),)
MESSAGES: list[tuple[Any, Any]] = [
    (messages.Set("s", "k", [1]), turns.Set("k", b"[1]")),
    (messages.Update("s", "k", OPS), turns.Update("k", OPS)),
    (messages.Delete("s", "k"), turns.Delete("k")),
    (messages.Get("s", "k"), turns.Get("k")),
    (messages.List("s"), turns.List()),
    (messages.Set("s", "k", 1, if_revision=3), SetWith("k", b"1", 3)),
    (messages.Set("s", "k", 1, if_absent=True, ttl=5), SetWith("k", b"1", 0, Deadline(ttl_ms=5000))),
    (messages.Set("s", "k", 1, expires_at=NOON), SetWith("k", b"1", None, Deadline(expires_ms=NOON_MS))),
    (messages.Set("s", "k", 1, keep_ttl=True), SetWith("k", b"1", None, Deadline(keep=True))),
    (messages.Set("s", "k", 1, idempotency_key="i"), Once(SetWith("k", b"1"), "i")),
    (messages.Update("s", "k", OPS, atomic=True), UpdateWith("k", OPS, atomic=True)),
    (messages.Delete("s", "k", if_revision=2), DeleteWith("k", 2)),
    (messages.GetEntry("s", "k"), GetEntry("k")),
    (messages.CompareAndSet("s", "k", 1, 2), CompareAndSet("k", b"1", b"2")),
    (messages.CompareAndSet("s", "k", MISSING, 2), CompareAndSet("k", None, b"2")),
    (messages.CompareAndSet("s", "k", None, 2), CompareAndSet("k", None, b"2")),
    (messages.Modify("s", "k", first, 0), Modify("k", first, 0)),
    (messages.Touch("s", "k", 1.5), Touch("k", Deadline(ttl_ms=1500))),
    (messages.Touch("s", "k", None), Touch("k")),
    (messages.Touch("s", "k", expires_at=NOON), Touch("k", Deadline(expires_ms=NOON_MS))),
    (messages.Transact("s", first), Transact(first)),
    (messages.Keys("s", prefix="a", limit=2), Keys(Range(prefix="a", limit=2))),
    (messages.Items("s", start="a", reverse=True), Pairs(Range(start="a", reverse=True))),
    (messages.Entries("s", after="a"), Entries(Range(after="a"))),
    (messages.Values("s", end="a"), Values(Range(end="a"))),
    (messages.Count("s", prefix="a"), Count(Range(prefix="a"))),
    (messages.DeleteRange("s", prefix="", idempotency_key="i"), Once(DeleteRange(Range(prefix="")), "i")),
    (
        messages.Batch(
            "s",
            [
                messages.SetStep("a", 1, ttl=timedelta(seconds=2)),
                messages.UpdateStep("b", OPS, keep_ttl=True),
                messages.DeleteStep("c"),
                messages.TouchStep("d", ttl=None),
            ],
            [
                messages.Check("e", revision=4),
                messages.Check("f", absent=True),
                messages.Check("g", value=None),
                messages.Check("h", value=MISSING),
            ],
        ),
        Batch(
            (
                SetStep("a", b"1", Deadline(ttl_ms=2000)),
                UpdateStep("b", OPS, Deadline(keep=True)),
                DeleteStep("c"),
                TouchStep("d"),
            ),
            (Check("e", 4, UNSET), Check("f", 0, UNSET), Check("g", None, b"null"), Check("h", None, None)),
        ),
    ),
]


@pytest.mark.parametrize(("message", "turn"), MESSAGES, ids=lambda one: type(one).__name__)
def test_a_message_becomes_a_turn(message: Any, turn: turns.Turn[Any]) -> None:
    assert turn_of(message) == (turn, None)


@pytest.mark.parametrize("durable", [True, False])
def test_durable_is_told_beside_the_turn(durable: bool) -> None:
    assert turn_of(messages.Set("s", "k", 1, durable=durable)) == (SetWith("k", b"1"), durable)
    assert turn_of(messages.Modify("s", "k", first, durable=durable)) == (Modify("k", first), durable)


async def awaited(value: Any) -> Any:
    return value


def generated(value: Any) -> Any:
    yield value


class Awaited:
    async def __call__(self, value: Any) -> Any:
        return value


NO_FUNCTIONS: list[Any] = [None, "f", awaited, generated, Awaited(), functools.partial(awaited)]
SET = functools.partial(messages.Set, "s", "k", 1)
REFUSED: list[Any] = [
    "set",
    messages.ListGroups(),
    messages.Set("s", "\ud800", 1),
    messages.Get("s", 5),  # type: ignore[arg-type]
    *[SET(if_revision=wrong) for wrong in (True, "3", 3.0, -1, 2**53)],  # type: ignore[arg-type]
    *[SET(if_absent=wrong) for wrong in (1, "yes", None)],  # type: ignore[arg-type]
    SET(if_absent=True, if_revision=3),
    *[SET(ttl=wrong) for wrong in (0, -1, True, float("nan"), float("inf"), "60", timedelta(0), 10**30, [])],  # type: ignore[arg-type]
    *[SET(expires_at=wrong) for wrong in (datetime(2030, 1, 1), "2030", 5)],  # type: ignore[arg-type]  # noqa: DTZ001 - what is refused
    *[SET(keep_ttl=wrong) for wrong in (1, "yes", None)],  # type: ignore[arg-type]
    SET(ttl=1, expires_at=NOON),
    SET(ttl=1, keep_ttl=True),
    SET(expires_at=NOON, keep_ttl=True),
    *[SET(durable=wrong) for wrong in (1, "yes")],  # type: ignore[arg-type]
    *[SET(idempotency_key=wrong) for wrong in ("", "i" * 256, 5, b"i", "\ud800")],  # type: ignore[arg-type]
    messages.Update("s", "k", OPS, atomic=1),  # type: ignore[arg-type]
    messages.Update("s", "k", ("increment",)),  # type: ignore[arg-type]
    messages.Touch("s", "k"),
    messages.Touch("s", "k", 1, NOON),
    messages.Touch("s", "k", 0),
    *[
        messages.Modify("s", "k", wrong)
        for wrong in (None, "f", awaited, generated, Awaited(), functools.partial(awaited))
    ],  # type: ignore[arg-type]
    *[messages.Transact("s", wrong) for wrong in NO_FUNCTIONS],
    *[messages.Keys("s", limit=wrong) for wrong in (-1, True, 1.5, "3")],  # type: ignore[arg-type]
    *[messages.Keys("s", prefix=wrong) for wrong in (5, b"a", "\ud800")],  # type: ignore[arg-type]
    messages.Keys("s", reverse=1),  # type: ignore[arg-type]
    messages.DeleteRange("s"),
    messages.Batch("s", ["set"]),  # type: ignore[list-item]
    messages.Batch("s", [messages.SetStep("a", 1, ttl=0)]),
    messages.Batch("s", [messages.SetStep(5, 1)]),  # type: ignore[arg-type]
    messages.Batch("s", [], ["check"]),  # type: ignore[list-item]
    messages.Batch("s", [], [messages.Check("k")]),
    messages.Batch("s", [], [messages.Check("k", 1, True)]),
    messages.Batch("s", [], [messages.Check("k", 1, value=1)]),
    messages.Batch("s", [], [messages.Check("k", True)]),
]


@pytest.mark.parametrize("message", REFUSED, ids=stable)
def test_what_makes_no_sense_never_becomes_a_turn(message: Any) -> None:
    with pytest.raises(DeserializationError) as caught:
        turn_of(message)
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize(
    "message",
    [
        messages.Set("s", "k", {"a": [1, {2}]}),
        messages.CompareAndSet("s", "k", 1, {"a": [1, {2}]}),
        messages.CompareAndSet("s", "k", {"a": [1, {2}]}, 1),
        messages.Batch("s", [messages.SetStep("k", {"a": [1, {2}]})]),
        messages.Batch("s", [], [messages.Check("k", value={"a": [1, {2}]})]),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_value_that_json_cannot_hold_is_refused_with_its_place(message: Any) -> None:
    with pytest.raises(InvalidValue) as caught:
        turn_of(message)
    assert caught.value.path == "$.a[1]"


def test_values_over_the_limit_are_refused() -> None:
    for message in (
        messages.Set("s", "k", "long"),
        messages.CompareAndSet("s", "k", 1, "long"),
        messages.Batch("s", [messages.SetStep("k", "long")]),
    ):
        with pytest.raises(ValueTooLarge):
            turn_of(message, max_value_bytes=5)


def test_batches_over_the_limits_are_refused() -> None:
    many = messages.Batch("s", [messages.SetStep(f"k{number}", 1) for number in range(1001)])
    with pytest.raises(BatchTooLarge, match="1001 keys"):
        turn_of(many)
    with pytest.raises(BatchTooLarge, match="12 bytes"):
        turn_of(messages.Batch("s", [messages.SetStep("k", "long"), messages.SetStep("l", "long")]), max_batch_bytes=11)


def test_a_key_of_a_class_of_its_own_becomes_plain_text() -> None:
    class Shouting(str):
        __slots__ = ()

        def __hash__(self) -> int:
            raise AssertionError

    turn, _ = turn_of(messages.Get("s", Shouting("k")))

    assert isinstance(turn, turns.Get)
    assert type(turn.key) is str
    assert type(range_of(prefix=Shouting("k")).prefix) is str


@pytest.mark.parametrize("limit", [0, -1, None, 1.5, "5", True])
def test_a_page_has_a_size(limit: Any) -> None:
    with pytest.raises(DeserializationError, match="limit"):
        arguments.page_turn(limit)


def test_a_cursor_is_text() -> None:
    with pytest.raises(DeserializationError, match="cursor"):
        arguments.page_turn(5, b"cursor")  # type: ignore[arg-type]  # what is refused


def test_answers_are_python_values() -> None:
    entry = Entry(b"[1]", 7, NOON_MS)

    assert arguments.answer_of(messages.Get("s", "k"), b"[1]") == [1]
    assert arguments.answer_of(messages.Get("s", "k"), None) is None
    assert arguments.answer_of(messages.Delete("s", "k"), b"[1]") == [1]
    assert arguments.answer_of(messages.Values("s"), [b"1", b"2"]) == [1, 2]
    assert arguments.answer_of(messages.Items("s"), [("k", b"1")]) == [("k", 1)]
    assert arguments.answer_of(messages.Count("s"), 3) == 3
    view = arguments.answer_of(messages.GetEntry("s", "k"), entry)
    assert arguments.answer_of(messages.Entries("s"), [("k", entry)]) == [view]
    assert (view.key, view.value, view.revision, view.expires_at) == ("k", [1], 7, NOON)
    assert view.value is not view.value
    assert arguments.answer_of(messages.GetEntry("s", "k"), None) is None


def test_a_deadline_that_datetime_cannot_hold_is_shown_as_its_end() -> None:
    view = turns.view_of("k", Entry(b"1", 1, 2**53 - 1))

    assert view is not None
    assert view.expires_at == datetime.max.replace(tzinfo=UTC)
