"""Conditional writes, deadlines and idempotency keys, decided over values alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from turns.stored import Stored

from scopestate.errors import (
    Conflict,
    DeserializationError,
    IdempotencyMismatch,
    InvalidValue,
    UpdateRefused,
    ValueTooLarge,
)
from scopestate.ops import Decrement, Increment
from scopestate.ops.options import checked_revision
from scopestate.ops.turns import Deadline, Delete, Get, Range, Set, TtlRule, Turn, Update
from scopestate.ops.writes import (
    DELETE,
    KEEP,
    UNSET,
    CompareAndSet,
    DeleteWith,
    Durable,
    Expire,
    Expired,
    GetEntry,
    Modify,
    Once,
    SetWith,
    Touch,
    Ttl,
    UpdateWith,
    asked_deadline,
    checked_deadline,
    fingerprint_of,
    same_json,
    unwrapped,
)


@pytest.fixture
def stored() -> Stored:
    found = Stored()
    found.put(a={"n": 1}, b=None)
    return found


def conflict(stored: Stored, turn: Turn[Any]) -> tuple[str, int | None, int]:
    with pytest.raises(Conflict) as caught:
        stored.run(turn)
    assert caught.value.code == "CONFLICT"
    assert caught.value.scope == "s"
    return caught.value.key, caught.value.expected_revision, caught.value.revision


# ----------------------------------------------------------------------------------------------------- conditions


def test_a_write_with_the_right_revision_takes_the_next_one(stored: Stored) -> None:
    result = stored.run(SetWith("a", b"2", if_revision=1))

    assert (result.old_value, result.new_value, result.created, result.revision) == ({"n": 1}, 2, False, 3)
    entry = stored.run(GetEntry("a"))
    assert entry is not None
    assert (entry.value, entry.revision, entry.expires_ms) == (2, 3, None)


def test_a_write_with_another_revision_raises_and_changes_nothing(stored: Stored) -> None:
    for turn in (SetWith("a", b"2", 2), UpdateWith("a", (), 7), DeleteWith("a", 2)):
        assert conflict(stored, turn) == ("a", turn.if_revision, 1)
    assert conflict(stored, SetWith("a", b"2", 0)) == ("a", 0, 1)
    assert conflict(stored, SetWith("new", b"2", 1)) == ("new", 1, 0)
    assert stored.revision == 2
    assert stored.run(SetWith("new", b"2", 0)).created


def test_the_text_of_a_conflict_says_what_was_expected_and_what_was_found(stored: Stored) -> None:
    with pytest.raises(Conflict, match=r"key 'a' .* expected to have revision 9 but has revision 1; nothing was"):
        stored.run(SetWith("a", b"1", 9))
    with pytest.raises(Conflict, match="expected not to exist but has revision 1"):
        stored.run(SetWith("a", b"1", 0))
    with pytest.raises(Conflict, match="revision 3 but does not exist"):
        stored.run(SetWith("x", b"1", 3))


def test_a_stored_null_exists_for_a_revision_and_not_for_compare_and_set(stored: Stored) -> None:
    assert conflict(stored, SetWith("b", b"1", 0)) == ("b", 0, 2)
    result, events = stored.run_seeing(CompareAndSet("b", None, b"1"))

    assert (result.swapped, result.to_json()) == (True, {"swapped": True})
    assert events == [("updated", "b", b"null", b"1", 3)]


@pytest.mark.parametrize(
    ("current", "expected", "swapped"),
    [
        (b"1", b"1", True),
        (b"1", b"1.0", False),
        (b"true", b"1", False),
        (b'{"a":1,"b":[2]}', b'{"b":[2],"a":1}', True),
        (b'{"a":[1,2]}', b'{"a":[2,1]}', False),
        (b'{"a":1}', b'{"a":1.0}', False),
        (b"0", b"null", False),
        (b"null", b"null", True),
    ],
)
def test_compare_and_set_compares_as_json(current: bytes, expected: bytes, swapped: bool) -> None:
    stored = Stored()
    stored.run(Set("k", current))

    result = stored.run(CompareAndSet("k", expected, b'"new"'))

    assert result.swapped is swapped
    assert stored.run(Get("k")) == (b'"new"' if swapped else current)
    assert same_json(current, expected) is swapped


def test_a_miss_of_compare_and_set_says_what_is_there_and_fires_nothing(stored: Stored) -> None:
    result, events = stored.run_seeing(CompareAndSet("a", b"0", b"1"))

    assert result.to_json() == {"swapped": False, "current": {"n": 1}}
    assert events == []
    assert stored.run(CompareAndSet("x", b"0", b"1")).to_json() == {"swapped": False, "current": None}


def test_compare_and_set_can_compare_the_revision_too_or_alone(stored: Stored) -> None:
    assert not stored.run(CompareAndSet("a", b'{"n":1}', b"2", 9)).swapped
    missed = stored.run(CompareAndSet("a", UNSET, b"2", 2))
    assert missed.to_json() == {"swapped": False, "current": {"n": 1}, "revision": 1}
    swapped = stored.run(CompareAndSet("a", UNSET, b"2", 1))
    assert swapped.to_json() == {"swapped": True, "old_value": {"n": 1}, "revision": 3}


def test_modify_computes_deletes_or_keeps(stored: Stored) -> None:
    added = stored.run(Modify("a", lambda value: {"n": value["n"] + 1}))
    assert (added.old_value, added.new_value, added.revision) == ({"n": 1}, {"n": 2}, 3)

    kept, events = stored.run_seeing(Modify("a", lambda _: KEEP))
    assert (kept.new_value, kept.revision, events) == ({"n": 2}, 3, [])

    deleted, events = stored.run_seeing(Modify("a", lambda _: DELETE))
    assert (deleted.new_json, deleted.revision) == (None, 4)
    assert events == [("deleted", "a", b'{"n":2}', None, 4)]
    assert stored.run_seeing(Modify("a", lambda _: DELETE))[1] == []

    assert stored.run(Modify("a", lambda value: value + 1, default=0)).new_value == 1


def test_what_the_function_of_modify_raises_reaches_the_caller(stored: Stored) -> None:
    with pytest.raises(ZeroDivisionError):
        stored.run(Modify("a", lambda _: 1 / 0))
    with pytest.raises(InvalidValue):
        stored.run(Modify("a", lambda _: {1, 2}))
    stored.limits.max_value_bytes = 3
    with pytest.raises(ValueTooLarge):
        stored.run(Modify("a", lambda _: "long"))
    assert stored.revision == 2


def test_an_atomic_update_with_an_op_that_does_not_fit_changes_nothing(stored: Stored) -> None:
    ops = (Increment("n", 1), Increment("", 1), Decrement("x.y", 1), Increment("__proto__", 1))
    with pytest.raises(UpdateRefused) as caught:
        stored.run(UpdateWith("a", ops, atomic=True))

    assert [(error.index, error.op_index, error.code) for error in caught.value.errors] == [
        (0, 1, "increment.not_number"),
        (0, 3, "increment.path.proto_polluted"),
    ]
    assert "increment.not_number" in str(caught.value)
    assert stored.revision == 2
    assert stored.run(UpdateWith("a", ops)).new_value == {"n": 2, "x.y": -1}


def test_in_a_strict_scope_every_update_is_atomic(stored: Stored) -> None:
    stored.strict = True
    for turn in (Update("a", (Increment("", 1),)), UpdateWith("a", (Increment("", 1),))):
        with pytest.raises(UpdateRefused):
            stored.run(turn)
    assert stored.run(Update("a", (Increment("n", 1),))).new_value == {"n": 2}


def test_new_fields_are_in_an_answer_only_if_a_new_argument_was_used(stored: Stored) -> None:
    assert stored.run(Set("a", b"1")).to_json() == {"old_value": {"n": 1}, "new_value": 1}
    assert stored.run(Update("a", ())).to_json() == {"old_value": 1, "new_value": 1}
    assert stored.run(SetWith("a", b"2")).to_json() == {"old_value": 1, "new_value": 2, "revision": 5}
    assert stored.run(UpdateWith("a", ())).to_json() == {"old_value": 2, "new_value": 2, "revision": 6}
    assert stored.run(DeleteWith("a")).to_json() == {"old_value": 2, "revision": 7}


def test_every_plain_write_knows_its_revision_too(stored: Stored) -> None:
    assert stored.run(Set("a", b"1")).revision == 3
    assert stored.run(Update("a", ())).revision == 4


@pytest.mark.parametrize("revision", [-1, 2**53, True, 1.0, "1"])
def test_a_revision_is_a_whole_number_that_a_double_can_hold(revision: Any) -> None:
    with pytest.raises(DeserializationError, match="a revision is a whole number"):
        checked_revision(revision)


def test_if_absent_means_revision_0() -> None:
    assert checked_revision(None) is None
    assert checked_revision(2**53 - 1) == 2**53 - 1
    assert checked_revision(None, if_absent=True) == checked_revision(0, if_absent=True) == 0
    with pytest.raises(DeserializationError, match="contradict"):
        checked_revision(1, if_absent=True)


# ------------------------------------------------------------------------------------------------------- deadlines


def later(stored: Stored, ms: int) -> None:
    stored.now_ms += ms


def test_at_its_deadline_a_key_does_not_exist(stored: Stored) -> None:
    stored.run(SetWith("k", b"1", deadline=Deadline(ttl_ms=10)))
    later(stored, 9)
    assert stored.run(Get("k")) == b"1"
    assert stored.run(Ttl("k")) == 1

    later(stored, 1)
    assert stored.run(Get("k")) is None
    assert stored.run(GetEntry("k")) is None
    assert stored.run(Ttl("k")) is None
    assert stored.run(Touch("k", Deadline(ttl_ms=5))) is False
    assert list(stored.keys(Range())) == ["a", "b"]
    assert conflict(stored, SetWith("k", b"1", 3)) == ("k", 3, 0)


def test_setting_it_again_fires_expired_first_and_then_created(stored: Stored) -> None:
    for again in (
        Set("k", b"2"),
        SetWith("k", b"2", 0),
        Update("k", ()),
        UpdateWith("k", ()),
        CompareAndSet("k", None, b"2"),
        Modify("k", lambda _: 2),
    ):
        stored.run(SetWith("k", b"1", deadline=Deadline(ttl_ms=10)))
        later(stored, 10)
        before = stored.revision
        answer, events = stored.run_seeing(again)

        assert [event[0] for event in events] == ["expired", "created"]
        assert events[0] == ("expired", "k", b"1", None, before + 1)
        assert (events[1][2], events[1][4]) == (None, before + 2)
        assert answer.revision == before + 2  # type: ignore[attr-defined]
        stored.run(Delete("k"))


def test_deleting_it_again_fires_expired_first_and_then_deleted_of_nothing(stored: Stored) -> None:
    stored.run(SetWith("k", b"1", deadline=Deadline(ttl_ms=10)))
    later(stored, 10)

    assert stored.run_seeing(Delete("k")) == (None, [("expired", "k", b"1", None, 4), ("deleted", "k", None, None, 5)])


def test_set_clears_a_deadline_and_update_keeps_it(stored: Stored) -> None:
    def deadline_after(*turns: Turn[Any]) -> int | None:
        for turn in turns:
            stored.run(turn)
        return stored.entries["k"].expires_ms

    with_ttl = SetWith("k", b"{}", deadline=Deadline(ttl_ms=50))
    assert deadline_after(with_ttl) == 1050
    assert deadline_after(Update("k", (Increment("n", 1),))) == 1050
    assert deadline_after(UpdateWith("k", ())) == 1050
    assert deadline_after(UpdateWith("k", (), deadline=Deadline(ttl_ms=7))) == 1007
    assert deadline_after(Modify("k", lambda value: value)) == 1007
    assert deadline_after(SetWith("k", b"1", deadline=Deadline(keep=True))) == 1007
    assert deadline_after(SetWith("k", b"1", deadline=Deadline(expires_ms=2000))) == 2000
    assert deadline_after(Set("k", b"1")) is None
    assert deadline_after(with_ttl, CompareAndSet("k", b"{}", b"1")) is None


def test_touch_changes_the_deadline_and_nothing_else(stored: Stored) -> None:
    stored.run(SetWith("k", b"1", deadline=Deadline(ttl_ms=50)))
    before = stored.entries["k"]

    answer, events = stored.run_seeing(Touch("k", Deadline(ttl_ms=500)))
    assert (answer, events) == (True, [])
    assert stored.entries["k"] == type(before)(before.json, before.revision, 1500)
    stored.run(Touch("k"))
    assert stored.entries["k"].expires_ms is None
    assert stored.run(Touch("absent", Deadline(ttl_ms=1))) is False


def test_a_rule_of_the_scope_gives_keys_a_deadline(stored: Stored) -> None:
    stored.ttl_rule = TtlRule(100)
    stored.run(Set("k", b"1"))
    later(stored, 30)
    stored.run(Update("k", ()))
    assert stored.entries["k"].expires_ms == 1130
    stored.run(SetWith("k", b"1", deadline=Deadline(ttl_ms=5)))
    assert stored.entries["k"].expires_ms == 1035

    stored.ttl_rule = TtlRule(100, from_creation=True)
    stored.run(Set("j", b"1"))
    later(stored, 3)
    stored.run(Set("j", b"2"))
    stored.run(Update("j", ()))
    assert stored.entries["j"].expires_ms == 1130


def test_expire_removes_the_oldest_first_and_no_more_than_asked(stored: Stored) -> None:
    for key, ttl in (("c", 3), ("d", 1), ("e", 1), ("f", 9)):
        stored.run(SetWith(key, b"1", deadline=Deadline(ttl_ms=ttl)))
    later(stored, 5)

    count, events = stored.run_seeing(Expire(2))
    assert (count, [(kind, key) for kind, key, *_ in events]) == (Expired(2, 4), [("expired", "d"), ("expired", "e")])
    count, events = stored.run_seeing(Expire(2))
    assert (count, [key for _, key, *_ in events]) == (Expired(1, 2), ["c"])
    assert stored.run_seeing(Expire(2)) == (Expired(0), [])
    assert stored.run(Get("f")) == b"1"


def test_a_deadline_is_given_once_and_within_bounds() -> None:
    assert checked_deadline() == Deadline()
    assert checked_deadline(1) == Deadline(ttl_ms=1)
    assert checked_deadline(None, 0) == Deadline(expires_ms=0)
    for wrong in ((0, None, False), (-1, None, False), (None, -1, False), (2**53, None, False), (True, None, False)):
        with pytest.raises(DeserializationError):
            checked_deadline(*wrong[:2], keep=wrong[2])
    for several in ((1, 1, False), (1, None, True), (None, 1, True)):
        with pytest.raises(DeserializationError, match="give one of"):
            checked_deadline(*several[:2], keep=several[2])


def test_python_gives_seconds_a_timedelta_or_a_moment_with_a_time_zone() -> None:
    assert asked_deadline(1.5) == asked_deadline(timedelta(milliseconds=1500)) == Deadline(ttl_ms=1500)
    assert asked_deadline(1e-9) == Deadline(ttl_ms=1)
    assert asked_deadline(2.007) == asked_deadline(timedelta(milliseconds=2007)) == Deadline(ttl_ms=2007)
    assert asked_deadline(expires_at=datetime(1970, 1, 1, 0, 0, 2, tzinfo=UTC)) == Deadline(expires_ms=2000)
    assert asked_deadline(keep_ttl=True) == Deadline(keep=True)
    for wrong in (0, -1, float("nan"), float("inf"), True, "1"):
        with pytest.raises(DeserializationError, match="`ttl` is a number of seconds"):
            asked_deadline(wrong)  # type: ignore[arg-type]
    for moment in (datetime(2030, 1, 1), "2030-01-01", 4_102_444_800):  # noqa: DTZ001 - that is the mistake
        with pytest.raises(DeserializationError, match="time zone"):
            asked_deadline(expires_at=moment)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ idempotency keys


def test_a_repetition_gets_the_first_answer_and_changes_nothing(stored: Stored) -> None:
    turn = Once(UpdateWith("a", (Increment("n", 1), Increment("", 1))), "i")
    first, events = stored.run_seeing(turn)
    again, none = stored.run_seeing(turn)

    assert (len(events), none, stored.revision) == (1, [], 3)
    assert not first.replayed
    assert again.replayed
    assert again.to_json() == {**first.to_json(), "replayed": True}
    assert first.to_json()["errors"] == again.to_json()["errors"]


@pytest.mark.parametrize(
    "turn",
    [
        SetWith("a", b"2", 1, Deadline(ttl_ms=5)),
        UpdateWith("a", (Increment("n", 1),)),
        DeleteWith("a"),
        CompareAndSet("a", b'{"n":1}', b"2"),
        CompareAndSet("a", b"0", b"2"),
    ],
)
def test_each_kind_of_answer_is_kept_as_it_is(stored: Stored, turn: Turn[Any]) -> None:
    first = stored.run(Once(turn, "i"))
    stored.run(Set("a", b'"meanwhile"'))
    again = stored.run(Once(turn, "i"))

    assert type(again) is type(first)
    assert again.to_json() == {**first.to_json(), "replayed": True}
    assert again.revision == first.revision


def test_touch_is_kept_too(stored: Stored) -> None:
    assert stored.run(Once(Touch("a", Deadline(ttl_ms=5)), "i")) is True
    stored.run(Delete("a"))
    assert stored.run(Once(Touch("a", Deadline(ttl_ms=5)), "i")) is True
    assert stored.run(Touch("a", Deadline(ttl_ms=5))) is False


def test_a_key_that_was_used_for_another_write_is_refused(stored: Stored) -> None:
    stored.run(Once(SetWith("a", b"2"), "i"))
    for other in (SetWith("a", b"3"), SetWith("b", b"2"), SetWith("a", b"2", 3), UpdateWith("a", ()), DeleteWith("a")):
        with pytest.raises(IdempotencyMismatch, match="'i' was used for another write"):
            stored.run(Once(other, "i"))
    assert stored.revision == 3


def test_what_is_refused_is_not_kept(stored: Stored) -> None:
    turn = Once(SetWith("a", b"2", 2), "i")
    assert conflict(stored, turn) == ("a", 2, 1)
    stored.run(Set("b", b"1"))
    stored.run(Delete("a"))
    stored.run(Set("a", b"1"))
    assert stored.answers == {}
    assert not stored.run(Once(SetWith("a", b"2", 5), "i")).replayed


def test_a_fingerprint_sees_every_part_of_a_write() -> None:
    turns: list[Turn[Any]] = [
        SetWith("a", b"1"),
        SetWith("b", b"1"),
        SetWith("a", b"2"),
        SetWith("a", b"1", 0),
        SetWith("a", b"1", 1),
        SetWith("a", b"1", None, Deadline(ttl_ms=1)),
        SetWith("a", b"1", None, Deadline(keep=True)),
        UpdateWith("a", ()),
        UpdateWith("a", (Increment("", 1),)),
        UpdateWith("a", (Decrement("", 1),)),
        UpdateWith("a", (), atomic=True),
        DeleteWith("a"),
        CompareAndSet("a", b"1", b"1"),
        CompareAndSet("a", None, b"1"),
        CompareAndSet("a", UNSET, b"1", 3),
    ]
    assert len({fingerprint_of(turn) for turn in turns}) == len(turns)
    assert fingerprint_of(SetWith("a", b"1")) == fingerprint_of(SetWith("a", b"1"))


def test_a_durable_turn_decides_as_the_turn_and_asks_another_engine_for_the_same() -> None:
    turn = Durable(Once(Set("k", b"1"), "i"))

    assert (turn.keys, turn.size(), unwrapped(turn)) == (("k",), 1, Set("k", b"1"))
    assert turn.call("s")["durable"] is True
    assert turn.call("s")["idempotency_key"] == "i"
    assert turn.failed(ValueError("x")).code == "SET_ERROR"
    assert Durable(Delete("k")).failed(ValueError("x")).code == "DELETE_ERROR"


@pytest.mark.parametrize("key", ["", "k" * 256, "\ud800", 7])
def test_an_idempotency_key_that_a_store_could_not_hold_is_refused(key: Any) -> None:
    """At once: a store that finds it in a save could not save anything."""
    with pytest.raises(DeserializationError, match="idempotency key"):
        Once(Set("k", b"1"), key)
