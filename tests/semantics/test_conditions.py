"""Revisions, and writes that happen only if a key is as the caller expects it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from places import IN_AN_HOUR, Events, Place, together

from scopestate import DELETE, KEEP, MISSING, Engine, ops
from scopestate.engine import Scope
from scopestate.errors import (
    Conflict,
    DeserializationError,
    InvalidValue,
    ScopestateError,
    Unsupported,
    UpdateRefused,
)

INCREMENT = [ops.Increment("", 1)]


def revision_of(scope: Scope, key: str) -> int:
    entry = scope.entry(key)
    return 0 if entry is None else entry.revision


# ------------------------------------------------------------------------------------------------------- revisions


def test_an_entry_has_the_value_and_the_revision_of_its_last_change(users: Scope) -> None:
    written = users.set("ada", {"age": 36}, if_absent=True)

    entry = users.entry("ada")
    assert entry is not None
    assert (entry.key, entry.value, entry.revision, entry.expires_at) == ("ada", {"age": 36}, written.revision, None)


def test_a_key_that_does_not_exist_has_no_entry(users: Scope) -> None:
    assert users.entry("ada") is None
    users.set("ada", 1)
    users.delete("ada")
    assert users.entry("ada") is None


def test_a_stored_null_is_an_entry(users: Scope) -> None:
    users.set("ada", None)

    entry = users.entry("ada")
    assert entry is not None
    assert entry.value is None
    assert entry.revision > 0


def test_every_change_of_a_scope_takes_a_larger_revision(users: Scope) -> None:
    seen = []
    for change in (
        lambda: users.set("a", 1),
        lambda: users.set("b", 1),
        lambda: users.set("a", 1),
        lambda: users.update("a", INCREMENT),
        lambda: users.modify("b", lambda value: value + 1),
        lambda: users.compare_and_set("b", 2, 3),
    ):
        change()
        seen.append(max(revision_of(users, "a"), revision_of(users, "b")))

    assert seen == sorted(set(seen))
    assert seen[-1] < 2**53


def test_an_unchanged_value_that_is_written_again_has_a_new_revision(users: Scope) -> None:
    first = users.set("ada", 1, if_absent=True).revision

    assert users.set("ada", 1, if_revision=first).revision > first


def test_a_key_that_was_deleted_and_made_again_does_not_have_its_old_revision(users: Scope) -> None:
    old = users.set("ada", 1, if_absent=True).revision
    users.delete("ada")
    users.set("ada", 1)

    with pytest.raises(Conflict):
        users.set("ada", 2, if_revision=old)
    assert users.get("ada") == 1


def test_a_touch_takes_no_revision(users: Scope) -> None:
    revision = users.set("ada", 1, if_absent=True).revision
    users.touch("ada", ttl=3600)

    assert revision_of(users, "ada") == revision
    users.set("ada", 2, if_revision=revision)


def test_revisions_go_on_in_the_next_engine(place: Place) -> None:
    with place.open() as engine:
        first = engine.scope("users").set("ada", 1, if_absent=True).revision
    with place.open() as engine:
        users = engine.scope("users")
        if not place.facts.outlives:
            assert users.entry("ada") is None
            return
        assert revision_of(users, "ada") == first
        assert users.set("ada", 2, if_revision=first).revision > first


def test_events_have_the_revision_of_their_change(users: Scope, events: Events, place: Place) -> None:
    first = users.set("ada", 1, if_absent=True).revision
    second = users.set("ada", 2, if_revision=first).revision

    assert [event.revision for event in events.wait_for(2)] == [first, second]


# -------------------------------------------------------------------------------------------- if_revision, if_absent


def test_a_write_with_the_right_revision_is_made(users: Scope, events: Events) -> None:
    users.set("ada", 1)

    result = users.set("ada", 2, if_revision=revision_of(users, "ada"))

    assert (result.old_value, result.new_value, result.created, result.replayed) == (1, 2, False, False)
    assert result.revision == revision_of(users, "ada")
    assert events.take() == [("created", "ada", None, 1), ("updated", "ada", 1, 2)]


def test_a_write_with_another_revision_is_a_conflict_and_changes_nothing(users: Scope, events: Events) -> None:
    users.set("ada", 1)
    stale = revision_of(users, "ada")
    users.set("ada", 2)
    now = revision_of(users, "ada")

    for write in (
        lambda: users.set("ada", 3, if_revision=stale),
        lambda: users.update("ada", INCREMENT, if_revision=stale),
        lambda: users.delete("ada", if_revision=stale),
    ):
        with pytest.raises(Conflict) as caught:
            write()
        conflict = caught.value
        assert conflict.code == "CONFLICT"
        assert (conflict.scope, conflict.key) == ("users", "ada")
        assert (conflict.expected_revision, conflict.revision) == (stale, now)
        assert "'ada'" in str(conflict)
        assert "'users'" in str(conflict)

    assert (users.get("ada"), revision_of(users, "ada")) == (2, now)
    assert events.take() == [("created", "ada", None, 1), ("updated", "ada", 1, 2)]


def test_if_absent_creates_a_key_once(users: Scope) -> None:
    assert users.set("ada", 1, if_absent=True).created
    with pytest.raises(Conflict) as caught:
        users.set("ada", 2, if_absent=True)

    assert (caught.value.expected_revision, caught.value.revision) == (0, revision_of(users, "ada"))
    assert users.get("ada") == 1


def test_revision_0_means_absent(users: Scope) -> None:
    assert users.set("ada", 1, if_revision=0).created
    with pytest.raises(Conflict):
        users.set("ada", 2, if_revision=0)
    with pytest.raises(Conflict):
        users.delete("ada", if_revision=0)
    assert users.update("bob", INCREMENT, if_revision=0).created


def test_a_stored_null_is_not_absent(users: Scope) -> None:
    users.set("ada", None)

    with pytest.raises(Conflict) as caught:
        users.set("ada", 1, if_absent=True)
    assert caught.value.revision == revision_of(users, "ada") > 0


def test_a_conflict_with_a_key_that_is_gone_says_revision_0(users: Scope) -> None:
    stale = users.set("ada", 1, if_absent=True).revision
    users.delete("ada")

    with pytest.raises(Conflict) as caught:
        users.update("ada", INCREMENT, if_revision=stale)
    assert caught.value.revision == 0
    assert users.entry("ada") is None


def test_a_conditional_delete_removes_the_key(users: Scope, events: Events) -> None:
    revision = users.set("ada", 1, if_absent=True).revision

    users.delete("ada", if_revision=revision)

    assert users.entry("ada") is None
    assert events.take() == [("created", "ada", None, 1), ("deleted", "ada", 1, None)]


def test_a_conditional_update_applies_its_ops(users: Scope) -> None:
    revision = users.set("ada", {"n": 1}, if_absent=True).revision

    result = users.update("ada", [ops.Increment("n", 2)], if_revision=revision)

    assert (result.new_value, result.errors) == ({"n": 3}, ())
    assert result.revision == revision_of(users, "ada") > revision


def test_two_scopes_have_their_own_revisions(engine: Engine) -> None:
    one, other = engine.scope("one"), engine.scope("other")
    first = one.set("k", 1, if_absent=True).revision
    other.set("k", 1, if_absent=True)
    for _ in range(3):
        other.set("k", 2)

    assert revision_of(one, "k") == first
    one.set("k", 2, if_revision=first)


@pytest.mark.parametrize("revision", [True, -1, 2**53, 1.0, "1", [1]])
def test_what_is_no_revision_is_refused(users: Scope, revision: Any) -> None:
    users.set("ada", 1)

    for write in (
        lambda: users.set("ada", 2, if_revision=revision),
        lambda: users.delete("ada", if_revision=revision),
        lambda: users.update("ada", INCREMENT, if_revision=revision),
    ):
        with pytest.raises(DeserializationError, match="revision"):
            write()
    assert users.get("ada") == 1


def test_contradictions_are_refused(users: Scope) -> None:
    users.set("ada", 1)

    with pytest.raises(DeserializationError, match="if_absent"):
        users.set("ada", 2, if_revision=3, if_absent=True)
    with pytest.raises(DeserializationError, match="ttl"):
        users.set("ada", 2, ttl=5, keep_ttl=True)
    with pytest.raises(DeserializationError, match="ttl"):
        users.set("ada", 2, ttl=5, expires_at=IN_AN_HOUR)
    assert users.get("ada") == 1


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        1.0,
        -0.0,
        2**53,
        -(2**63),
        1e300,
        "",
        "é\u2028\U0001f600",
        [],
        {},
        [[1, {"a": [None]}]],
        "x" * 70_000,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_any_value_goes_through_a_conditional_write(users: Scope, value: object) -> None:
    result = users.set("ada", value, if_absent=True)

    entry = users.entry("ada")
    assert entry is not None
    assert repr(entry.value) == repr(value) == repr(result.new_value)
    assert users.compare_and_set("ada", value, "next").swapped


@pytest.mark.parametrize(
    "key", ["", "a/b", "nul\x00", "é", "\U0010ffff", "{tag}", "}{", "__proto__", "x" * 500, "\ue000"]
)
def test_any_key_goes_through_a_conditional_write(users: Scope, key: str) -> None:
    revision = users.set(key, 1, if_absent=True).revision
    with pytest.raises(Conflict) as caught:
        users.set(key, 2, if_absent=True)

    assert caught.value.key == key
    users.update(key, INCREMENT, if_revision=revision)
    entry = users.entry(key)
    assert entry is not None
    assert (entry.key, entry.value) == (key, 2)


@pytest.mark.parametrize("scope", ["", "a/b", "é", "{tag}", "}{", "a}b", "../x"])
def test_any_scope_takes_conditional_writes(engine: Engine, scope: str) -> None:
    users = engine.scope(scope)
    revision = users.set("ada", 1, if_absent=True).revision

    with users.batch() as batch:
        batch.check("ada", revision=revision)
        batch.set("bob", 2, ttl=60)

    assert users.keys() == ["ada", "bob"]
    assert users.transact(lambda tx: tx.get("ada")) == 1


def test_a_value_that_json_cannot_hold_is_refused_before_the_condition_is_looked_at(users: Scope) -> None:
    users.set("ada", 1)

    with pytest.raises(InvalidValue):
        users.set("ada", {"x": {1, 2}}, if_revision=99)
    with pytest.raises(InvalidValue):
        users.compare_and_set("ada", 1, float("nan"))
    assert users.get("ada") == 1


# ----------------------------------------------------------------------------------------------------------- atomic


def test_a_plain_update_keeps_what_fits(users: Scope) -> None:
    users.set("ada", {"n": "many"})

    result = users.update("ada", [ops.Increment("n", 1), ops.Set("m", 2)])

    assert result.new_value == {"n": "many", "m": 2}
    assert [error.code for error in result.errors] == ["increment.not_number"]


def test_an_atomic_update_is_made_whole_or_not_at_all(users: Scope, events: Events) -> None:
    users.set("ada", {"n": "many"})
    revision = revision_of(users, "ada")

    with pytest.raises(UpdateRefused) as caught:
        users.update("ada", [ops.Set("m", 2), ops.Increment("n", 1)], atomic=True)

    assert caught.value.code == "UPDATE_REFUSED"
    assert [(error.code, error.op_index) for error in caught.value.errors] == [("increment.not_number", 1)]
    assert (users.get("ada"), revision_of(users, "ada")) == ({"n": "many"}, revision)
    assert events.take() == [("created", "ada", None, {"n": "many"})]
    assert users.update("ada", [ops.Set("m", 2)], atomic=True).new_value == {"n": "many", "m": 2}


def test_in_a_strict_scope_every_update_is_atomic(place: Place) -> None:
    engine = place.open(scopes=[{"prefix": "strict-", "strict": True}])
    strict, plain = engine.scope("strict-users"), engine.scope("users")
    for scope in (strict, plain):
        scope.set("ada", "text")

    assert plain.update("ada", INCREMENT).errors
    with pytest.raises(UpdateRefused):
        strict.update("ada", INCREMENT)
    assert strict.get("ada") == "text"


# -------------------------------------------------------------------------------------------------- compare_and_set


def test_compare_and_set_swaps_the_expected_value(users: Scope, events: Events) -> None:
    users.set("ada", {"a": 1, "b": [2]})

    result = users.compare_and_set("ada", {"b": [2], "a": 1}, "new")

    assert (result.swapped, result.current, result.replayed) == (True, None, False)
    assert users.get("ada") == "new"
    assert result.revision == revision_of(users, "ada")
    assert events.take()[1:] == [("updated", "ada", {"a": 1, "b": [2]}, "new")]


def test_compare_and_set_answers_a_miss_with_what_is_there(users: Scope, events: Events) -> None:
    users.set("ada", 1)
    revision = revision_of(users, "ada")

    result = users.compare_and_set("ada", 2, 3)

    assert (result.swapped, result.current) == (False, 1)
    assert revision_of(users, "ada") == revision
    assert events.take() == [("created", "ada", None, 1)]


@pytest.mark.parametrize(
    ("stored", "expected", "equal"),
    [
        (1, 1.0, False),
        (1.0, 1.0, True),
        (True, 1, False),
        (0, False, False),
        ("1", 1, False),
        ([1, 2], [2, 1], False),
        ({"a": 1}, {"a": 1, "b": None}, False),
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 2, "x": 1}}, True),
        ("é", "é", True),
        (10**15, 10**15, True),
        ([], {}, False),
    ],
)
def test_compare_and_set_compares_json(users: Scope, stored: object, expected: object, equal: bool) -> None:
    users.set("ada", stored)

    assert users.compare_and_set("ada", expected, "new").swapped is equal


def test_compare_and_set_expects_absence(users: Scope) -> None:
    assert users.compare_and_set("ada", MISSING, 1).swapped
    miss = users.compare_and_set("ada", MISSING, 2)
    assert (miss.swapped, miss.current) == (False, 1)
    assert not users.compare_and_set("bob", 1, 2).swapped
    assert users.entry("bob") is None


def test_a_stored_null_counts_as_absent_for_compare_and_set(users: Scope) -> None:
    users.set("ada", None)

    assert users.compare_and_set("ada", MISSING, 1).swapped
    users.set("ada", None)
    assert users.compare_and_set("ada", None, 2).swapped
    assert users.compare_and_set("bob", None, 3).swapped
    assert (users.get("ada"), users.get("bob")) == (2, 3)


def test_compare_and_set_counts_exactly_under_contention(users: Scope) -> None:
    users.set("n", 0)

    def count() -> None:
        for _ in range(20):
            while True:
                value = users.get("n")
                if users.compare_and_set("n", value, value + 1).swapped:
                    break

    together(*[count] * 4)

    assert users.get("n") == 80


def test_conditional_writes_count_exactly_under_contention(users: Scope) -> None:
    users.set("n", 0)
    conflicts = []

    def count() -> None:
        for _ in range(20):
            while True:
                entry = users.entry("n")
                assert entry is not None
                try:
                    users.set("n", entry.value + 1, if_revision=entry.revision)
                    break
                except Conflict as conflict:
                    conflicts.append(conflict)

    together(*[count] * 4)

    assert users.get("n") == 80


def test_one_of_many_creates_a_key(users: Scope) -> None:
    winners: list[int] = []

    def create(number: int) -> None:
        try:
            users.set("ada", number, if_absent=True)
            winners.append(number)
        except Conflict:
            pass

    together(*[lambda number=number: create(number) for number in range(8)])

    assert winners == [users.get("ada")]


# ----------------------------------------------------------------------------------------------------------- modify


def test_modify_computes_the_new_value_from_the_old_one(users: Scope, events: Events) -> None:
    users.set("ada", {"n": 1})

    result = users.modify("ada", lambda value: {**value, "m": 2})

    assert (result.old_value, result.new_value) == ({"n": 1}, {"n": 1, "m": 2})
    assert result.revision == revision_of(users, "ada")
    assert events.take()[1:] == [("updated", "ada", {"n": 1}, {"n": 1, "m": 2})]


def test_modify_begins_with_the_default(users: Scope) -> None:
    seen: list[object] = []

    def note(value: object) -> object:
        seen.append(value)
        return 1

    users.modify("ada", note)
    users.modify("bob", note, default={"n": 0})
    users.modify("ada", note, default="not used")

    assert seen == [None, {"n": 0}, 1]


def test_modify_may_change_the_value_that_it_gets(users: Scope) -> None:
    users.set("ada", {"n": [1]})

    def push(value: Any) -> Any:
        value["n"].append(2)
        return value

    assert users.modify("ada", push).old_value == {"n": [1]}
    assert users.get("ada") == {"n": [1, 2]}


def test_a_default_is_not_changed_by_modify(users: Scope) -> None:
    default: dict[str, int] = {}

    def push(value: Any) -> Any:
        value["n"] = 1
        return value

    users.modify("ada", push, default=default)
    users.modify("bob", push, default=default)

    assert users.get("bob") == {"n": 1}


def test_modify_deletes_and_keeps(users: Scope, events: Events) -> None:
    users.set("ada", 1)
    revision = revision_of(users, "ada")

    kept = users.modify("ada", lambda _: KEEP)
    assert (kept.old_value, kept.new_value, kept.revision) == (1, 1, revision)
    gone = users.modify("ada", lambda _: DELETE)
    assert (gone.old_value, gone.new_value) == (1, None)
    users.modify("ada", lambda _: DELETE)
    users.modify("ada", lambda _: KEEP)

    assert users.entry("ada") is None
    assert events.take() == [("created", "ada", None, 1), ("deleted", "ada", 1, None)]


class Broken(Exception):
    """Raised by the functions of the tests."""


def test_what_the_function_of_modify_raises_reaches_the_caller(users: Scope, events: Events) -> None:
    users.set("ada", 1)

    def broken(value: object) -> object:
        raise Broken(value)

    with pytest.raises(Broken) as caught:
        users.modify("ada", broken)
    assert caught.value.args == (1,)
    with pytest.raises(KeyboardInterrupt):
        users.modify("ada", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))

    assert users.get("ada") == 1
    users.set("ada", 2)
    assert events.take() == [("created", "ada", None, 1), ("updated", "ada", 1, 2)]


def test_a_value_that_json_cannot_hold_is_refused_by_modify(users: Scope) -> None:
    users.set("ada", 1)

    with pytest.raises(InvalidValue):
        users.modify("ada", lambda _: {"x": object()})
    assert users.get("ada") == 1


def test_a_value_over_the_limit_is_refused_by_every_write(place: Place) -> None:
    engine = place.open(limits={"max_value_bytes": 20})
    users = engine.scope("users")
    users.set("ada", 1)
    large = "x" * 30

    def in_batch() -> None:
        with users.batch() as batch:
            batch.set("bob", 1)
            batch.set("ada", large)

    def in_transaction(tx: Any) -> None:
        tx.set("bob", 1)
        tx.set("ada", large)

    for write in (
        lambda: users.set("ada", large, if_revision=revision_of(users, "ada")),
        lambda: users.compare_and_set("ada", 1, large),
        lambda: users.modify("ada", lambda _: large),
        lambda: users.update("ada", [ops.Set("", large)], atomic=True),
        in_batch,
        lambda: users.transact(in_transaction),
    ):
        with pytest.raises(ScopestateError, match="over the limit max_value_bytes"):
            write()
    assert users.items() == [("ada", 1)]


async def _coroutine_function(value: object) -> object:
    return value


def test_a_coroutine_function_is_refused_by_modify(users: Scope) -> None:
    users.set("ada", 1)

    with pytest.raises(DeserializationError):
        users.modify("ada", _coroutine_function)
    with pytest.raises((DeserializationError, InvalidValue)):
        users.modify("ada", lambda value: _closed(_coroutine_function(value)))
    assert users.get("ada") == 1


def _closed(coroutine: Any) -> Any:
    coroutine.close()
    return coroutine


def test_a_function_of_modify_that_calls_the_engine_is_refused_at_once(users: Scope) -> None:
    users.set("ada", 1)

    for call in (
        lambda: users.set("ada", 2),
        lambda: users.get("bob"),
        users.list,
        lambda: users.modify("ada", lambda value: value),
        lambda: users.transact(lambda tx: tx.get("ada")),
    ):
        with pytest.raises(ScopestateError):
            users.modify("ada", lambda _, call=call: call())
    assert users.get("ada") == 1
    assert users.modify("ada", lambda value: value + 1).new_value == 2


def test_modify_counts_exactly_under_contention(users: Scope) -> None:
    def count() -> None:
        for _ in range(25):
            users.modify("n", lambda value: value + 1, default=0)

    together(*[count] * 4)

    assert users.get("n") == 100


# ---------------------------------------------------------------------------------------------------------- durable


def test_a_durable_write_waits_for_the_disk_or_is_refused(users: Scope, place: Place, engine: Engine) -> None:
    if not place.facts.saves:
        for write in (
            lambda: users.set("ada", 1, durable=True),
            lambda: users.update("ada", INCREMENT, durable=True),
            lambda: users.delete("ada", durable=True),
        ):
            with pytest.raises(ScopestateError) as caught:
                write()
            assert caught.value.code == "UNSUPPORTED"
            if place.local:
                assert isinstance(caught.value, Unsupported)
        assert users.entry("ada") is None
        return
    before = place.saves(engine)

    assert users.set("ada", 1, durable=True).created

    assert place.saves(engine) > before
    assert engine.stats().unsaved_scopes == 0


def test_durable_false_is_refused_where_every_write_is_durable(users: Scope, place: Place) -> None:
    if place.name == "commit":
        with pytest.raises(ScopestateError):
            users.set("ada", 1, durable=False)
        assert users.entry("ada") is None
    else:
        assert users.set("ada", 1, durable=False).created


def test_a_conditional_write_may_be_interrupted_by_another_thread_at_any_time(users: Scope) -> None:
    """Readers see each value with its own revision, never another's."""
    users.set("ada", 0)
    stop = threading.Event()
    revisions: dict[int, set[int]] = {}

    def read() -> None:
        while not stop.is_set():
            entry = users.entry("ada")
            assert entry is not None
            revisions.setdefault(entry.revision, set()).add(entry.value)

    def write() -> None:
        try:
            for number in range(1, 40):
                users.set("ada", number, if_revision=revision_of(users, "ada"))
        finally:
            stop.set()

    together(write, read, read)

    assert [values for values in revisions.values() if len(values) != 1] == []
