"""Batches and transactions, decided over values alone: all or nothing, each key once, own writes are read."""

from __future__ import annotations

from typing import Any

import pytest
from turns.stored import Stored

from scopestate.errors import (
    BatchTooLarge,
    Conflict,
    DeserializationError,
    IdempotencyMismatch,
    InvalidValue,
    UpdateRefused,
    ValueTooLarge,
)
from scopestate.ops import Decrement, Increment
from scopestate.ops.transactions import (
    MAX_KEYS,
    Batch,
    Check,
    DeleteStep,
    Draft,
    SetAll,
    SetStep,
    TouchStep,
    Transact,
    Transaction,
    UpdateStep,
)
from scopestate.ops.turns import Deadline, Get, Set, Turn
from scopestate.ops.writes import Expire, Modify, Once, SetWith


@pytest.fixture
def stored() -> Stored:
    found = Stored()
    found.put(a={"n": 10}, b={"n": 0}, c=1)
    return found


def refused(stored: Stored, turn: Turn[Any], kind: type[Exception]) -> Any:
    """Return the error; nothing may have changed."""
    before = dict(stored.entries), stored.revision, dict(stored.answers)
    with pytest.raises(kind) as caught:
        stored.run(turn)
    assert (stored.entries, stored.revision, stored.answers) == before
    return caught.value


# --------------------------------------------------------------------------------------------------------- batches


def test_each_step_sees_what_those_before_it_have_done(stored: Stored) -> None:
    batch = Batch(
        (
            SetStep("new", b'{"n":1}'),
            UpdateStep("new", (Increment("n", 1),)),
            DeleteStep("c"),
            UpdateStep("c", (Increment("n", 5),)),
            DeleteStep("absent"),
        )
    )
    result, events = stored.run_seeing(batch)

    assert result.to_json() == {
        "committed": True,
        "revision": 5,
        "results": [
            {"old_value": None, "new_value": {"n": 1}},
            {"old_value": {"n": 1}, "new_value": {"n": 2}},
            {"old_value": 1},
            {"old_value": None, "new_value": {"n": 5}},
            {"old_value": None},
        ],
    }
    # Each key once, whatever the number of steps; in the order of the first one.
    assert events == [("created", "new", None, b'{"n":2}', 4), ("updated", "c", b"1", b'{"n":5}', 5)]


def test_a_key_that_is_created_and_deleted_again_has_not_changed(stored: Stored) -> None:
    result, events = stored.run_seeing(Batch((SetStep("x", b"1"), DeleteStep("x"))))

    assert events == []
    assert result.revision == 3


def test_a_key_that_has_expired_and_is_created_and_deleted_again_is_left_to_its_expiry(stored: Stored) -> None:
    stored.run(SetWith("x", b"1", None, Deadline(ttl_ms=1)))
    stored.now_ms += 1

    result, events = stored.run_seeing(Batch((SetStep("x", b"2"), DeleteStep("x"))))
    done = stored.run(Transact(lambda tx: (tx.set("x", 2), tx.delete("x"))))
    draft = Draft(stored)
    Transact(lambda tx: (tx.set("x", 2), tx.delete("x"))).run(draft)

    assert (events, result.revision) == ([], 4)
    assert done == (None, 2)
    assert draft.as_batch(1000).steps == ()
    assert stored.run(Expire(10)).keys == 1


def test_all_checks_that_fail_are_told_and_nothing_is_done(stored: Stored) -> None:
    batch = Batch(
        (SetStep("a", b"1"),),
        (Check("a", 1), Check("b", 9), Check("c", 0), Check("x", 1), Check("x", 0), Check("c", value=b"2")),
    )
    error = refused(stored, batch, Conflict)

    assert [(one.index, one.key, one.expected_revision, one.revision) for one in error.conflicts] == [
        (1, "b", 9, 2),
        (2, "c", 0, 3),
        (3, "x", 1, 0),
        (5, "c", None, 3),
    ]
    assert (error.key, error.expected_revision, error.revision) == ("b", 9, 2)
    assert "3 more keys" in str(error)


def test_a_check_may_be_of_the_value_or_of_the_whole_scope(stored: Stored) -> None:
    stored.put(nothing=None)
    checks = (Check("c", value=b"1"), Check("absent", value=None), Check("nothing", value=b"null"), Check("c"))
    assert stored.run(Batch((), checks, if_revision=4)).revision == 4
    error = refused(stored, Batch((), if_revision=3), Conflict)
    assert (error.key, error.expected_revision, error.revision) == ("", 3, 4)


def test_every_op_that_is_refused_is_told_with_its_place(stored: Stored) -> None:
    batch = Batch(
        (
            UpdateStep("a", (Decrement("n", 1),)),
            UpdateStep("c", (Increment("", 1), Increment("n", 1))),
            UpdateStep("b", (Increment("", 1),)),
        )
    )
    error = refused(stored, batch, UpdateRefused)

    assert [(one.index, one.op_index, one.code) for one in error.errors] == [
        (1, 1, "increment.target_not_object"),
        (2, 0, "increment.not_number"),
    ]


def test_a_batch_that_is_too_large_is_refused_before_anything_happens(stored: Stored) -> None:
    many = Batch(tuple([SetStep(str(number), b"1") for number in range(MAX_KEYS + 1)]))
    assert refused(stored, many, BatchTooLarge).code == "BATCH_TOO_LARGE"
    with pytest.raises(BatchTooLarge, match=r"has 1001 keys, over the limit of 1000"):
        many.refuse_size("s")
    checked = Batch((SetStep("x", b"1"),), tuple([Check(str(number), 0) for number in range(MAX_KEYS)]))
    with pytest.raises(BatchTooLarge, match="1001 keys"):
        checked.refuse_size("s")
    stored.run(Batch(tuple([SetStep(str(number % MAX_KEYS), b"1") for number in range(MAX_KEYS + 1)])))

    large = Batch((SetStep("x", b"12345"), SetStep("y", b"67890")), max_bytes=9)
    with pytest.raises(BatchTooLarge, match="has 10 bytes, over the limit of 9"):
        large.refuse_size("s")
    refused(stored, large, BatchTooLarge)
    # Known only once the ops have run.
    grown = Batch((UpdateStep("a", (Increment("a long name", 1),)),), max_bytes=20)
    grown.refuse_size("s")
    refused(stored, grown, BatchTooLarge)


def test_the_limit_of_a_value_holds_for_each_step(stored: Stored) -> None:
    stored.limits.max_value_bytes = 9
    assert refused(stored, Batch((SetStep("k", b"[1,2,3,4,5]"),)), ValueTooLarge).key == "k"
    assert refused(stored, Batch((UpdateStep("a", (Increment("x", 1),)),)), ValueTooLarge).key == "a"


def test_deadlines_in_a_batch(stored: Stored) -> None:
    stored.run(SetWith("old", b"0", deadline=Deadline(ttl_ms=10)))
    stored.now_ms += 10
    batch = Batch(
        (
            TouchStep("a", Deadline(ttl_ms=5)),
            SetStep("k", b"1", Deadline(ttl_ms=7)),
            UpdateStep("k", (Increment("", 1),)),
            TouchStep("k", Deadline(ttl_ms=9)),
            TouchStep("absent", Deadline(ttl_ms=9)),
            SetStep("old", b"1"),
        )
    )
    result, events = stored.run_seeing(batch)

    assert [event[:2] for event in events] == [("expired", "old"), ("created", "k"), ("created", "old")]
    assert [result.results[index].to_json() for index in (0, 3, 4)] == [
        {"touched": True},
        {"touched": True},
        {"touched": False},
    ]
    assert stored.entries["a"].expires_ms == 1015
    assert stored.entries["a"].revision == 1
    assert stored.entries["k"].expires_ms == 1019


def test_the_answer_of_a_batch_is_kept_whole(stored: Stored) -> None:
    batch = Batch(
        (
            SetStep("x", b"1"),
            UpdateStep("x", (Increment("", 1),)),
            DeleteStep("c"),
            TouchStep("a", Deadline(ttl_ms=5)),
        ),
        (Check("c", 3),),
    )
    first = stored.run(Once(batch, "i"))
    again, events = stored.run_seeing(Once(batch, "i"))

    assert events == []
    assert [type(result) for result in again.results] == [type(result) for result in first.results]
    assert again.to_json() == {**first.to_json(), "replayed": True}
    for other in (Batch(batch.steps), Batch(batch.steps[:3], batch.checks), Batch(batch.steps, batch.checks, 3)):
        refused(stored, Once(other, "i"), IdempotencyMismatch)


def test_setting_many_keys_at_once_is_a_batch_of_sets(stored: Stored) -> None:
    turn = SetAll({"b": b"1", "new": b"2", "a": b"3"})
    as_steps = Stored()
    as_steps.put(a={"n": 10}, b={"n": 0}, c=1)

    result, events = stored.run_seeing(turn)
    expected, same_events = as_steps.run_seeing(turn.as_batch())

    assert result.to_json() == expected.to_json()
    assert events == same_events
    assert [event[:2] for event in events] == [("updated", "b"), ("created", "new"), ("updated", "a")]
    assert turn.keys == ("b", "new", "a")


def test_setting_many_keys_at_once_has_the_limits_of_a_batch(stored: Stored) -> None:
    refused(stored, SetAll({str(number): b"1" for number in range(MAX_KEYS + 1)}), BatchTooLarge)
    refused(stored, SetAll({"a": b"12345", "b": b"67890"}, max_bytes=9), BatchTooLarge)
    stored.limits.max_value_bytes = 3
    assert refused(stored, SetAll({"a": b"1", "b": b"1234"}), ValueTooLarge).key == "b"


def test_an_empty_batch_is_a_check_of_nothing(stored: Stored) -> None:
    assert stored.run(Batch(())).to_json() == {"committed": True, "revision": 3, "results": []}


# ---------------------------------------------------------------------------------------------------- transactions


def transfer(tx: Transaction) -> int:
    tx["a"] = {"n": tx["a"]["n"] - 4}
    tx.update("b", [Increment("n", 4)])
    left: int = tx["a"]["n"]
    return left


def test_a_function_reads_its_own_writes_and_returns_the_answer(stored: Stored) -> None:
    left, events = stored.run_seeing(Transact(transfer))

    assert left == 6
    assert events == [("updated", "a", b'{"n":10}', b'{"n":6}', 4), ("updated", "b", b'{"n":0}', b'{"n":4}', 5)]


def test_the_methods_of_a_transaction(stored: Stored) -> None:
    def play(tx: Transaction) -> None:
        assert tx.get("absent") is None
        assert tx.get("absent", 7) == 7
        assert "absent" not in tx
        assert 5 not in tx
        with pytest.raises(KeyError):
            tx["absent"]
        with pytest.raises(KeyError):
            del tx["absent"]
        tx.set("d", [1], ttl=1.5)
        entry = tx.entry("d")
        assert entry is not None
        assert (entry.value, entry.revision, entry.expires_ms) == ([1], 0, 2500)
        assert tx.delete("c") == 1
        assert tx.delete("c") is None
        del tx["b"]
        tx["aa"] = 2
        assert tx.keys() == list(tx) == ["a", "aa", "d"]
        assert tx.keys(reverse=True, limit=2) == ["d", "aa"]
        assert tx.keys(prefix="a") == ["a", "aa"]
        assert tx.items(start="aa") == [("aa", 2), ("d", [1])]
        assert len(tx) == 3
        assert tx.touch("a", 1)
        assert not tx.touch("c", 1)
        assert tx.update("aa", [Increment("", 1)]) == 3

    _, events = stored.run_seeing(Transact(play))

    assert [event[:2] for event in events] == [("created", "d"), ("deleted", "c"), ("deleted", "b"), ("created", "aa")]
    assert stored.entries["a"].expires_ms == 2000
    assert stored.entries["a"].revision == 1


def test_keys_that_were_not_written_are_listed_from_the_scope(stored: Stored) -> None:
    assert stored.run(Transact(lambda tx: tx.keys(after="a"))) == ["b", "c"]
    with pytest.raises(DeserializationError, match="from 0 to"):
        stored.run(Transact(lambda tx: tx.keys(limit=-1)))


@pytest.mark.parametrize(
    ("fail", "kind"),
    [
        (lambda tx: 1 / 0, ZeroDivisionError),
        (lambda tx: tx.update("c", [Increment("n", 1)]), UpdateRefused),
        (lambda tx: tx.set("k", {1}), InvalidValue),
        (lambda tx: tx.set(1, 1), DeserializationError),
        (lambda tx: tx.set("k", 1, ttl=-1), DeserializationError),
    ],
)
def test_what_the_function_raises_aborts_everything(stored: Stored, fail: Any, kind: type[Exception]) -> None:
    def play(tx: Transaction) -> None:
        tx["a"] = "written"
        fail(tx)

    refused(stored, Transact(play), kind)


def test_a_function_that_catches_a_refused_update_goes_on_without_it(stored: Stored) -> None:
    def play(tx: Transaction) -> None:
        with pytest.raises(UpdateRefused):
            tx.update("c", [Increment("", 1), Increment("n", 1)])
        assert tx["c"] == 1
        tx["d"] = 1

    _, events = stored.run_seeing(Transact(play))
    assert [event[:2] for event in events] == [("created", "d")]


def test_a_transaction_is_bounded_as_a_batch_is(stored: Stored) -> None:
    def write_many(tx: Transaction) -> None:
        for number in range(MAX_KEYS + 1):
            tx[str(number)] = 1

    def read_many(tx: Transaction) -> int:
        return sum(str(number) in tx for number in range(MAX_KEYS + 1))

    refused(stored, Transact(write_many), BatchTooLarge)
    refused(stored, Transact(lambda tx: tx.set("k", "x" * 20), max_bytes=21), BatchTooLarge)
    assert stored.run(Transact(read_many)) == 0


def test_a_function_that_would_have_to_be_awaited_changes_nothing(stored: Stored) -> None:
    called = []

    async def play(tx: Transaction) -> None:
        called.append(tx)

    async def generate(tx: Transaction) -> Any:
        yield called.append(tx)

    def steps(tx: Transaction) -> Any:
        yield called.append(tx)

    def hidden(tx: Transaction) -> Any:
        return play(tx)

    for function in (play, generate, steps, hidden):
        assert "plain function" in str(refused(stored, Transact(function), DeserializationError))
        with pytest.raises(DeserializationError, match="plain function"):
            stored.run(Modify("a", function))
    assert called == []


def test_a_transaction_is_of_no_use_once_its_function_has_ended(stored: Stored) -> None:
    kept: list[Transaction] = []
    stored.run(Transact(kept.append))

    for use in (lambda: kept[0].get("a"), lambda: kept[0].set("a", 1), kept[0].keys):
        with pytest.raises(DeserializationError, match="has ended"):
            use()


def test_the_answer_of_a_transaction_is_kept_as_json(stored: Stored) -> None:
    assert stored.run(Once(Transact(transfer), "i")) == 6
    assert stored.run_seeing(Once(Transact(transfer), "i")) == (6, [])
    refused(stored, Once(Transact(lambda tx: {1, 2}), "j"), InvalidValue)


def test_what_a_function_did_can_be_sent_as_a_batch_that_checks_what_it_has_read(stored: Stored) -> None:
    def play(tx: Transaction) -> None:
        tx.get("absent")
        transfer(tx)
        tx.touch("c", 5)
        del tx["b"]

    draft = Draft(stored)
    Transact(play).run(draft)
    batch = draft.as_batch(1000)

    assert batch.checks == (Check("absent", 0), Check("a", 1), Check("b", 2), Check("c", 3))
    assert batch.steps == (
        SetStep("a", b'{"n":6}'),
        DeleteStep("b"),
        TouchStep("c", Deadline(expires_ms=6000)),
    )
    assert batch.if_revision is None
    stored.run(Set("absent", b"1"))
    assert refused(stored, batch, Conflict).key == "absent"


def test_a_batch_of_what_a_function_did_has_the_last_deadline_that_it_gave(stored: Stored) -> None:
    def play(tx: Transaction) -> None:
        tx.set("d", 1)
        tx.touch("d", None)
        tx.touch("d", 5)
        tx.set("e", 1, ttl=5)
        tx.touch("e", None)

    draft = Draft(stored)
    Transact(play).run(draft)
    stored.run(draft.as_batch(1000))

    assert stored.entries["d"].expires_ms == 6000
    assert stored.entries["e"].expires_ms is None


def test_what_is_looked_at_after_a_listing_needs_no_check_of_its_own(stored: Stored) -> None:
    draft = Draft(stored)
    Transact(lambda tx: (tx.get("a"), tx.set("sum", len(tx.items())), tx.get("absent"))).run(draft)
    batch = draft.as_batch(1000)

    assert batch.checks == (Check("a", 1),)
    assert batch.if_revision == 3
    stored.run(batch)


def test_after_a_listing_any_other_write_is_a_conflict(stored: Stored) -> None:
    draft = Draft(stored)
    Transact(lambda tx: tx.set("count", len(tx))).run(draft)
    batch = draft.as_batch(1000)

    stored.run(Set("d", b"1"))
    assert refused(stored, batch, Conflict).expected_revision == 3
    assert stored.run(Get("count")) is None
