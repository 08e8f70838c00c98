"""A turn that another engine does: what it sends, and what it makes of the answer, is as if it were done here."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from turns.stored import Stored

from scopestate.errors import Conflict, UpdateRefused
from scopestate.ops import Increment
from scopestate.ops.functions import BUILT_IN, read_request
from scopestate.ops.ranges import Count, DeleteRange, Entries, Keys, Pairs, ReadPage, Values, make_cursor
from scopestate.ops.transactions import Batch, Check, DeleteStep, SetAll, SetStep, TouchStep, UpdateStep
from scopestate.ops.turns import Change, Deadline, Range, Turn
from scopestate.ops.writes import (
    UNSET,
    CompareAndSet,
    DeleteWith,
    GetEntry,
    Once,
    SetWith,
    Touch,
    Ttl,
    UpdateWith,
    unwrapped,
)


def filled() -> Stored:
    found = Stored()
    found.put(a={"n": 1}, b=None, c=3)
    found.run(SetWith("timed", b"4", deadline=Deadline(ttl_ms=500)))
    return found


def answer_elsewhere(far: Stored, turn: Turn[Any]) -> bytes:
    """Return the JSON that another engine answers to what the turn sends it."""
    payload = msgspec.json.decode(msgspec.json.encode(turn.call("s")))
    row = BUILT_IN[unwrapped(turn).function_id]
    request = read_request(row.function_id, payload, far.limits)
    try:
        text = row.answer(far.run(request.turn), request.tell)
    except (Conflict, UpdateRefused) as error:
        text = row.refusal(error)
    assert text is not None
    return text


INCREMENT = (Increment("n", 1), Increment("", 1))
TURNS: list[Turn[Any]] = [
    SetWith("a", b"[1]"),
    SetWith("a", b"[1]", 1, Deadline(ttl_ms=5)),
    SetWith("new", b"1", 0, Deadline(expires_ms=2000)),
    SetWith("a", b"1", None, Deadline(keep=True)),
    UpdateWith("a", INCREMENT, 1),
    UpdateWith("a", INCREMENT[:1], None, Deadline(ttl_ms=5), True),
    DeleteWith("a", 1),
    DeleteWith("absent"),
    DeleteWith("b"),
    SetWith("b", b"5"),
    CompareAndSet("c", b"3", b"4"),
    CompareAndSet("c", b"4", b"5"),
    CompareAndSet("new", None, b"5"),
    CompareAndSet("b", None, b"5"),
    CompareAndSet("b", b"3", b"5"),
    CompareAndSet("c", UNSET, b"5", 3),
    CompareAndSet("c", UNSET, b"5", 2),
    GetEntry("a"),
    GetEntry("b"),
    GetEntry("absent"),
    Touch("a", Deadline(ttl_ms=5)),
    Touch("a", Deadline(expires_ms=2000)),
    Touch("absent"),
    Batch(
        (
            SetStep("new", b"1", Deadline(ttl_ms=5)),
            UpdateStep("new", (Increment("", 1),)),
            DeleteStep("c"),
            SetStep("c", b"null"),
            TouchStep("a", Deadline(ttl_ms=9)),
            SetStep("x", b"1"),
            DeleteStep("x"),
            DeleteStep("b"),
        ),
        (Check("a", 1), Check("absent", 0), Check("c", 3, b"3")),
        4,
    ),
    Batch(()),
    SetAll({"a": b"1", "z": b"2"}),
    Keys(Range(after="a", reverse=True)),
    Count(Range(prefix="a")),
    Count(Range(after="a")),
    DeleteRange(Range(limit=2)),
    DeleteRange(),
    DeleteRange(Range(start="b")),
    Ttl("a"),
    Ttl("timed"),
    Ttl("absent"),
    Pairs(Range(start="b")),
    Values(Range(reverse=True)),
    Entries(),
    Entries(Range(prefix="x")),
    ReadPage(Range(limit=2)),
    ReadPage(Range(limit=2_000)),
    ReadPage(Range(limit=2), max_bytes=9),
    ReadPage(Range(limit=2), cursor=make_cursor("store", "s", Range(), "a")),
]
ONCE: list[Once[Any]] = [Once(turn, "i") for turn in TURNS if turn.writes]


@pytest.mark.parametrize("turn", [*TURNS, *ONCE], ids=lambda turn: type(turn).__name__)
def test_a_turn_elsewhere_has_the_answer_the_changes_and_the_state_of_one_here(turn: Turn[Any]) -> None:
    here, far = filled(), filled()
    expected, events = here.run_seeing(turn)

    stored, answer = turn.effects_of(answer_elsewhere(far, turn))

    plain = answer.to_json() if hasattr(answer, "to_json") else answer
    assert plain == (expected.to_json() if hasattr(expected, "to_json") else expected)
    assert getattr(answer, "revision", 0) in (0, getattr(expected, "revision", 0))
    assert far.entries == here.entries
    told = [(one.key, one.before, one.after) for one in stored if isinstance(one, Change)]
    assert told == [(key, before, after) for _, key, before, after, _ in events]


@pytest.mark.parametrize("turn", ONCE, ids=lambda turn: type(turn.turn).__name__)
def test_a_repetition_elsewhere_is_told_as_one_and_fires_nothing(turn: Turn[Any]) -> None:
    far = filled()
    first = turn.effects_of(answer_elsewhere(far, turn))[1]
    stored, again = turn.effects_of(answer_elsewhere(far, turn))

    assert stored == ()
    assert getattr(again, "replayed", True)
    assert getattr(again, "revision", 0) == getattr(first, "revision", 0)


def test_a_transaction_that_another_engine_refuses_raises_here() -> None:
    conflicting = Batch((), (Check("a", 9), Check("x", 4)))
    with pytest.raises(Conflict) as conflict:
        conflicting.effects_of(answer_elsewhere(filled(), conflicting))
    assert [(one.index, one.key, one.revision) for one in conflict.value.conflicts] == [(0, "a", 1), (1, "x", 0)]

    refused = Batch((SetStep("a", b"1"), UpdateStep("a", INCREMENT)))
    with pytest.raises(UpdateRefused) as refusal:
        refused.effects_of(answer_elsewhere(filled(), refused))
    assert [(one.index, one.op_index, one.code) for one in refusal.value.errors] == [
        (1, 0, "increment.target_not_object"),
    ]
