"""Several keys in one step: `batch`, `transact`, and writes that are made once for their idempotency key."""

from __future__ import annotations

import random
import threading
from datetime import timedelta
from typing import Any

import pytest
from places import LONG_AGO, Events, Place, lasting, shared, together

from scopestate import MISSING, Engine, ops
from scopestate.engine import Scope
from scopestate.errors import (
    BatchTooLarge,
    Conflict,
    DeserializationError,
    IdempotencyMismatch,
    InvalidValue,
    ScopestateError,
    UpdateRefused,
)
from scopestate.ops import transactions

INCREMENT = [ops.Increment("", 1)]


class Broken(Exception):
    """Raised by the functions of the tests."""


def revision_of(scope: Scope, key: str) -> int:
    entry = scope.entry(key)
    return 0 if entry is None else entry.revision


# ------------------------------------------------------------------------------------------------------------ batch


def test_a_batch_is_committed_at_the_end_of_its_block(users: Scope, events: Events) -> None:
    users.set("old", 1)
    with users.batch() as batch:
        batch.set("a", 1)
        batch.update("a", INCREMENT)
        batch.update("n", [ops.Increment("x", 5)])
        batch.delete("old")
        batch.touch("a", ttl=3600)
        assert users.items() == [("old", 1)]

    assert users.items() == [("a", 2), ("n", {"x": 5})]
    assert events.take() == [
        ("created", "old", None, 1),
        ("created", "a", None, 2),
        ("created", "n", None, {"x": 5}),
        ("deleted", "old", 1, None),
    ]
    results = batch.result.results
    assert [(one.old_value, one.new_value) for one in results[:3]] == [(None, 1), (1, 2), (None, {"x": 5})]
    assert results[3].old_value == 1
    assert results[4].touched
    assert not batch.result.replayed
    assert (users.ttl("a") or 0) > 3500


def test_each_result_of_a_batch_has_the_revision_of_its_key(users: Scope) -> None:
    users.set("old", 1)
    users.set("lapsed", 1, expires_at=LONG_AGO)
    with users.batch() as batch:
        batch.delete("late")
        batch.set("a", 1)
        batch.update("n", [ops.Increment("x", 5)])
        batch.update("a", INCREMENT)
        batch.set("gone", 1)
        batch.delete("gone")
        batch.delete("absent")
        batch.delete("old")
        batch.set("lapsed", 2)
        batch.set("late", 1)

    absent, a, n, a_again, *nothing, old, lapsed, late = [one.revision for one in batch.result.results]  # type: ignore[union-attr]  # no touch
    assert [a, n, lapsed, late] == [revision_of(users, key) for key in ("a", "n", "lapsed", "late")]
    assert (a_again, absent) == (a, late)
    assert nothing == [0, 0, 0]
    assert [n, old, lapsed, late] == [a + 1, a + 2, a + 3, a + 4]
    assert late == batch.result.revision
    users.set("a", 3, if_revision=a)

    with users.batch(idempotency_key="once") as first:
        first.update("a", INCREMENT)
        first.delete("absent")
    with users.batch(idempotency_key="once") as again:
        again.update("a", INCREMENT)
        again.delete("absent")
    assert again.result.replayed
    for batch in (first, again):
        assert [one.revision for one in batch.result.results] == [revision_of(users, "a"), 0]  # type: ignore[union-attr]  # no touch


@pytest.mark.parametrize("count", [1, 2, 60])
def test_each_plain_set_of_a_batch_has_its_own_revision(users: Scope, count: int) -> None:
    with users.batch(idempotency_key="once") as batch:
        for n in range(count):
            batch.set(f"{n:02}", n)
    with users.batch(idempotency_key="once") as again:
        for n in range(count):
            again.set(f"{n:02}", n)
    with users.batch() as last:
        for n in range(count):
            last.set(f"z{n:02}", n)

    stored = [entry.revision for entry in users.entries()]
    results = last.result.results
    told = [[one.revision for one in one.result.results] for one in (batch, again, last)]  # type: ignore[union-attr]  # they are sets
    assert told == [stored[:count], stored[:count], stored[count:]]
    assert (results[0].revision, results[-1].revision) == (stored[count], stored[-1])  # type: ignore[union-attr]  # they are sets


def test_a_touch_without_a_time_is_refused(users: Scope) -> None:
    users.set("k", 1, ttl=3600)

    with pytest.raises(DeserializationError, match="`ttl=None`: the key never expires"):
        users.transact(lambda tx: tx.touch("k"))
    with users.batch() as batch, pytest.raises(DeserializationError, match="`ttl=None`: the key never expires"):
        batch.touch("k")
    assert users.ttl("k") is not None
    assert users.transact(lambda tx: tx.touch("k", None))
    assert users.ttl("k") is None


def test_the_changes_of_a_batch_have_consecutive_revisions(users: Scope, events: Events) -> None:
    with users.batch() as batch:
        for key in "abc":
            batch.set(key, 1)

    numbers = [event.revision for event in events.wait_for(3)]
    assert numbers == [numbers[0], numbers[0] + 1, numbers[0] + 2]
    assert batch.result.revision == numbers[-1]
    assert [revision_of(users, key) for key in "abc"] == numbers


def test_nothing_of_a_batch_is_written_if_its_block_raises(users: Scope, events: Events) -> None:
    with pytest.raises(Broken), users.batch() as batch:
        batch.set("a", 1)
        raise Broken

    assert users.keys() == []
    assert events.take() == []


def test_a_batch_writes_each_key_once(users: Scope, events: Events) -> None:
    users.set("b", 1)
    with users.batch() as batch:
        batch.set("a", 1)
        batch.set("b", 2)
        batch.set("a", 3)
        batch.set("gone", 1)
        batch.delete("gone")
        batch.delete("never")

    assert events.take()[1:] == [("created", "a", None, 3), ("updated", "b", 1, 2)]
    assert [getattr(one, "old_value", None) for one in batch.result.results] == [None, 1, 1, None, 1, None]


def test_an_empty_batch_changes_nothing(users: Scope, events: Events) -> None:
    with users.batch() as batch:
        pass

    assert batch.result.results == ()
    assert events.take() == []


def test_a_batch_with_checks_alone_checks(users: Scope) -> None:
    users.set("a", 1)
    with users.batch() as batch:
        batch.check("a", revision=revision_of(users, "a"))
        batch.check("b", absent=True)
    with pytest.raises(Conflict), users.batch() as batch:
        batch.check("a", absent=True)


def test_the_checks_of_a_batch_see_the_scope_before_it(users: Scope) -> None:
    revision = users.set("a", 1, if_absent=True).revision
    with users.batch() as batch:
        batch.set("a", 2)
        batch.set("b", 2)
        batch.check("a", revision=revision)
        batch.check("b", absent=True)
        batch.check("a", value=1)

    assert users.items() == [("a", 2), ("b", 2)]


def test_a_check_that_fails_stops_the_whole_batch(users: Scope, events: Events) -> None:
    users.set("a", 1)
    users.set("b", {"x": 1})
    events.take()

    with pytest.raises(Conflict) as caught, users.batch() as batch:
        batch.check("a", absent=True)
        batch.check("b", value={"x": 2})
        batch.check("c", revision=7)
        batch.check("b", value={"x": 1})
        batch.set("a", 2)
        batch.delete("b")

    conflicts = [(one.index, one.key, one.revision) for one in caught.value.conflicts]
    assert conflicts == [(0, "a", revision_of(users, "a")), (1, "b", revision_of(users, "b")), (2, "c", 0)]
    assert (caught.value.scope, caught.value.key) == ("users", "a")
    assert users.items() == [("a", 1), ("b", {"x": 1})]
    assert events.take() == []


def test_a_refused_op_stops_the_whole_batch(users: Scope, events: Events) -> None:
    users.set("text", "many")
    events.take()

    with pytest.raises(UpdateRefused) as caught, users.batch() as batch:
        batch.set("a", 1)
        batch.update("text", INCREMENT)
        batch.update("a", [ops.Increment("", 1), ops.Merge({"x": 1}), ops.Increment("y", 1)])

    errors = [(error.index, error.code) for error in caught.value.errors]
    assert errors[0] == (1, "increment.not_number")
    assert {index for index, _ in errors} <= {1, 2}
    assert users.items() == [("text", "many")]
    assert events.take() == []


def test_a_value_that_json_cannot_hold_stops_the_whole_batch(users: Scope) -> None:
    with pytest.raises(InvalidValue), users.batch() as batch:
        batch.set("a", 1)
        batch.set("b", {"x": {1}})

    assert users.keys() == []


def test_a_batch_of_a_thousand_keys_is_one_transaction_and_one_more_is_too_large(
    users: Scope, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    with users.batch() as batch:
        for number in range(1000):
            batch.set(f"k{number:04}", number)
    assert users.count() == 1000
    assert len(batch.result.results) == 1000
    before = users.keys()
    events.take()

    with pytest.raises(BatchTooLarge) as caught, users.batch() as batch:
        for number in range(1001):
            batch.set(f"n{number}", number)
    assert caught.value.code == "BATCH_TOO_LARGE"
    assert (caught.value.size, caught.value.limit, caught.value.unit) == (1001, 1000, "keys")

    # Redis runs the function again for each key that it turns out to need: a thousand keys would take 20 s.
    monkeypatch.setattr(transactions, "MAX_KEYS", 50)

    def too_many(tx: Any) -> None:
        for number in range(51):
            tx.set(f"n{number}", number)

    with pytest.raises(BatchTooLarge):
        users.transact(too_many)
    assert users.keys() == before
    assert events.take() == []


def test_a_batch_of_too_many_bytes_is_refused(users: Scope) -> None:
    large = "x" * 3_000_000

    with pytest.raises(BatchTooLarge) as caught, users.batch() as batch:
        for key in "abc":
            batch.set(key, large)
    assert caught.value.unit == "bytes"
    assert users.keys() == []


def test_max_batch_bytes_is_a_limit_of_the_configuration(place: Place) -> None:
    users = place.open(limits={"max_batch_bytes": 100}).scope("users")

    with pytest.raises(BatchTooLarge), users.batch() as batch:
        batch.set("a", "x" * 60)
        batch.set("b", "x" * 60)
    with pytest.raises(BatchTooLarge):
        users.transact(lambda tx: [tx.set(key, "x" * 60) for key in "ab"])
    assert users.keys() == []
    users.set("a", "x" * 200)


def test_a_batch_is_of_no_use_after_its_block(users: Scope) -> None:
    with users.batch() as batch:
        batch.set("a", 1)

    with pytest.raises(ScopestateError):
        batch.set("b", 1)
    with pytest.raises(ScopestateError), batch:
        pass
    assert users.keys() == ["a"]


def test_the_result_of_a_batch_cannot_be_read_too_early(users: Scope) -> None:
    with users.batch() as batch:
        batch.set("a", 1)
        with pytest.raises(ScopestateError):
            _ = batch.result
    assert batch.result.revision == revision_of(users, "a")


def test_a_batch_sets_with_deadlines(users: Scope) -> None:
    with users.batch() as batch:
        batch.set("a", 1, ttl=60)
        batch.set("b", 1, ttl=timedelta(hours=1))
        batch.set("over", 1, expires_at=LONG_AGO)
        batch.set("c", 1)

    assert users.keys() == ["a", "b", "c"]
    assert 50 < (users.ttl("a") or 0) <= 60
    assert 3500 < (users.ttl("b") or 0) <= 3600
    assert users.ttl("c") is None


def test_sums_hold_in_everything_that_is_seen_while_batches_are_committed(users: Scope) -> None:
    """Readers of a scope see a batch whole, whichever call they read it with."""
    keys = [f"k{number:02}" for number in range(10)]
    with users.batch() as batch:
        for key in keys:
            batch.set(key, 0)
    stop = threading.Event()
    reads = 0

    def write() -> None:
        try:
            for number in range(1, 60):
                with users.batch() as batch:
                    for key in keys:
                        batch.set(key, number)
        finally:
            stop.set()

    def read() -> None:
        nonlocal reads
        while not stop.is_set():
            for values in (
                users.list(),
                users.values(),
                [value for _, value in users.items()],
                [entry.value for entry in users.entries()],
                users.transact(lambda tx: [tx.get(key) for key in keys]),
                list(dict(users.mapping()).values()),
                [entry.value for page in users.pages(limit=100) for entry in page.entries],
            ):
                assert len(values) == len(keys)
                assert len(set(values)) == 1
                reads += 1

    together(write, read, read)
    assert reads > 0


@shared
def test_another_engine_sees_batches_whole(place: Place) -> None:
    one, other = place.open().scope("users"), place.open().scope("users")
    stop = threading.Event()
    with one.batch() as batch:
        batch.set("a", 0)
        batch.set("b", 0)

    def write() -> None:
        try:
            for number in range(80):
                with one.batch() as batch:
                    batch.set("a", number)
                    batch.set("b", number)
        finally:
            stop.set()

    def read() -> None:
        while not stop.is_set():
            assert len(set(other.list())) == 1
            assert len({value for _, value in other.items()}) == 1

    together(write, read)


# --------------------------------------------------------------------------------------------------------- transact


def test_what_the_function_returns_is_returned_as_it_is(users: Scope) -> None:
    earlier = users.set("a", 1, if_absent=True)
    revision = earlier.revision

    def work(tx: Any) -> object:
        tx.set("b", 2)
        return earlier

    assert users.transact(work) is earlier
    assert earlier.revision == revision


def test_a_transaction_reads_its_own_writes(users: Scope, events: Events) -> None:
    users.set("a", {"n": 1})
    users.set("b", 2)
    events.take()

    def work(tx: Any) -> object:
        assert tx.get("a") == {"n": 1}
        tx.set("c", 3)
        assert tx.get("c") == 3
        assert tx.update("a", [ops.Increment("n", 1)]) == {"n": 2}
        assert tx.delete("b") == 2
        assert tx.get("b", "none") == "none"
        assert tx.keys() == ["a", "c"]
        assert tx.items() == [("a", {"n": 2}), ("c", 3)]
        assert users_of_mapping(tx) == {"a": {"n": 2}, "c": 3}
        assert tx.entry("b") is None
        return tx.get("a")["n"]

    assert users.transact(work) == 2
    assert users.items() == [("a", {"n": 2}), ("c", 3)]
    assert events.take() == [("created", "c", None, 3), ("updated", "a", {"n": 1}, {"n": 2}), ("deleted", "b", 2, None)]


def users_of_mapping(tx: Any) -> dict[str, Any]:
    return {key: tx[key] for key in tx}


def test_a_transaction_is_used_as_a_mapping(users: Scope) -> None:
    users.set("a", 1)

    def work(tx: Any) -> None:
        assert "a" in tx
        assert "b" not in tx
        assert len(tx) == 1
        tx["b"] = tx["a"] + 1
        del tx["a"]
        with pytest.raises(KeyError):
            tx["a"]
        with pytest.raises(KeyError):
            del tx["a"]

    users.transact(work)
    assert users.items() == [("b", 2)]


def test_values_that_a_transaction_reads_are_its_own(users: Scope) -> None:
    users.set("a", {"n": [1]})

    def work(tx: Any) -> None:
        tx.get("a")["n"].append(2)
        value = {"n": 1}
        tx.set("b", value)
        value["n"] = 2

    users.transact(work)
    assert users.items() == [("a", {"n": [1]}), ("b", {"n": 1})]


def test_a_transaction_that_raises_changes_nothing(users: Scope, events: Events) -> None:
    users.set("a", 1)
    events.take()

    for error in (Broken("no"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()):

        def work(tx: Any, error: BaseException = error) -> None:
            tx.set("a", 2)
            tx.set("b", 2)
            raise error

        with pytest.raises(type(error)) as caught:
            users.transact(work)
        assert caught.value is error

    assert users.items() == [("a", 1)]
    assert events.take() == []
    users.transact(lambda tx: tx.set("a", 3))
    assert users.get("a") == 3


def test_a_refused_op_of_a_transaction_reaches_its_function(users: Scope) -> None:
    users.set("text", "many")

    def lenient(tx: Any) -> object:
        tx.set("a", 1)
        with pytest.raises(UpdateRefused):
            tx.update("text", INCREMENT)
        return tx.get("text")

    def careless(tx: Any) -> None:
        tx.set("b", 1)
        tx.update("text", INCREMENT)

    assert users.transact(lenient) == "many"
    with pytest.raises(UpdateRefused):
        users.transact(careless)
    assert users.items() == [("a", 1), ("text", "many")]


def test_a_transaction_that_only_reads_changes_nothing(users: Scope, events: Events) -> None:
    users.set("a", 1)
    revision = revision_of(users, "a")

    assert users.transact(lambda tx: tx.items()) == [("a", 1)]

    assert revision_of(users, "a") == revision
    assert len(events.take()) == 1


def test_a_transaction_touches_keys(users: Scope) -> None:
    users.set("a", 1, ttl=60)
    users.set("b", 1, ttl=60)
    revision = revision_of(users, "a")

    def work(tx: Any) -> tuple[bool, bool, bool]:
        return tx.touch("a", 3600), tx.touch("b", None), tx.touch("none", 5)

    assert users.transact(work) == (True, True, False)
    assert (users.ttl("a") or 0) > 3500
    assert users.ttl("b") is None
    assert revision_of(users, "a") == revision


def test_a_transaction_is_of_no_use_after_its_function(users: Scope) -> None:
    kept: list[Any] = []
    users.transact(kept.append)

    with pytest.raises(DeserializationError, match="ended"):
        kept[0].get("a")
    with pytest.raises(DeserializationError, match="ended"):
        kept[0].set("a", 1)
    assert users.keys() == []


async def _coroutine_function(tx: Any) -> None:
    tx.set("a", 1)


def test_a_function_that_would_have_to_be_awaited_is_refused(users: Scope) -> None:
    with pytest.raises(DeserializationError):
        users.transact(_coroutine_function)
    with pytest.raises(DeserializationError):
        users.transact(lambda tx: [_coroutine_function(tx)][0])

    def generator(tx: Any) -> Any:
        tx.set("a", 1)
        yield

    with pytest.raises(DeserializationError):
        users.transact(generator)
    assert users.keys() == []


def test_a_transaction_that_calls_the_engine_is_refused_at_once(users: Scope, engine: Engine) -> None:
    users.set("a", 1)
    other = engine.scope("other")

    def opened() -> None:
        with users.batch() as batch:
            batch.set("a", 2)

    for call in (
        lambda: users.set("a", 2),
        lambda: users.get("a"),
        users.list,
        lambda: other.set("a", 1),
        lambda: users.transact(lambda tx: tx.set("a", 3)),
        opened,
    ):

        def work(tx: Any, call: Any = call) -> None:
            tx.set("b", 1)
            call()

        with pytest.raises(ScopestateError):
            users.transact(work)
    assert users.items() == [("a", 1)]
    assert other.keys() == []
    users.transact(lambda tx: tx.set("a", 4))
    assert users.get("a") == 4


def test_a_transaction_that_recurses_without_end_ends(users: Scope) -> None:
    def work(tx: Any) -> None:
        tx.set("a", 1)
        work(tx)

    with pytest.raises(RecursionError):
        users.transact(work)
    assert users.keys() == []
    users.set("a", 2)


def test_what_a_transaction_returns_is_given_as_it_is(users: Scope) -> None:
    thing = object()

    assert users.transact(lambda tx: thing) is thing


def test_money_that_transactions_move_is_neither_made_nor_lost(users: Scope) -> None:
    accounts = [f"account-{number}" for number in range(10)]
    with users.batch() as batch:
        for account in accounts:
            batch.set(account, 100)
    stop = threading.Event()

    def mover(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(30):
            giver, taker = rng.sample(accounts, 2)
            amount = rng.randrange(1, 150)

            def move(tx: Any, giver: str = giver, taker: str = taker, amount: int = amount) -> bool:
                if tx[giver] < amount:
                    return False
                tx[giver] -= amount
                tx[taker] += amount
                return True

            users.transact(move)

    def watch() -> None:
        while not stop.is_set():
            values = users.values()
            assert sum(values) == 1000
            assert min(values) >= 0

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        together(*[lambda seed=seed: mover(seed) for seed in range(4)])
    finally:
        stop.set()
        watcher.join()
    assert sum(users.values()) == 1000


def test_of_two_transactions_that_need_the_same_key_one_sees_what_the_other_wrote(users: Scope) -> None:
    users.set("seats", 1)

    def book(tx: Any) -> bool:
        if tx["seats"] == 0:
            return False
        tx["seats"] -= 1
        return True

    booked: list[bool] = []
    together(*[lambda: booked.append(users.transact(book))] * 6)

    assert sorted(booked) == [False] * 5 + [True]
    assert users.get("seats") == 0


# ------------------------------------------------------------------------------------------------- idempotency keys


def test_a_repetition_with_the_same_idempotency_key_gets_the_first_answer(users: Scope, events: Events) -> None:
    first = users.set("a", 1, idempotency_key="once")
    users.set("a", 2)
    again = users.set("a", 1, idempotency_key="once")

    assert (first.replayed, again.replayed) == (False, True)
    assert (again.old_value, again.new_value, again.revision) == (None, 1, first.revision)
    assert users.get("a") == 2
    assert events.take() == [("created", "a", None, 1), ("updated", "a", 1, 2)]


def test_every_write_takes_an_idempotency_key(users: Scope, events: Events) -> None:
    users.set("n", 1)
    for _ in range(2):
        updated = users.update("n", INCREMENT, idempotency_key="update")
        assert updated.new_value == 2
        swapped = users.compare_and_set("m", MISSING, 1, idempotency_key="swap")
        assert swapped.swapped
        with users.batch(idempotency_key="batch") as batch:
            batch.update("n", INCREMENT)
            batch.set("b", 1)
        assert [one.new_value for one in batch.result.results] == [3, 1]
        assert users.transact(count_up, idempotency_key="transact") == 4
    users.delete("m", idempotency_key="delete")
    users.set("m", 5)
    assert users.delete("m", idempotency_key="delete") == 1

    assert (updated.replayed, swapped.replayed, batch.result.replayed) == (True, True, True)
    assert users.items() == [("b", 1), ("m", 5), ("n", 4)]
    assert len(events.take()) == 8


def count_up(tx: Any) -> int:
    tx["n"] += 1
    value: int = tx["n"]
    return value


def test_an_idempotency_key_with_another_write_is_refused(users: Scope) -> None:
    users.set("a", 1, idempotency_key="once")

    for write in (
        lambda: users.set("a", 2, idempotency_key="once"),
        lambda: users.set("b", 1, idempotency_key="once"),
        lambda: users.set("a", 1, ttl=5, idempotency_key="once"),
        lambda: users.update("a", INCREMENT, idempotency_key="once"),
        lambda: users.delete("a", idempotency_key="once"),
    ):
        with pytest.raises(IdempotencyMismatch) as caught:
            write()
        assert caught.value.code == "IDEMPOTENCY_MISMATCH"
        assert "once" in str(caught.value)
    assert users.items() == [("a", 1)]


def test_a_write_that_was_refused_does_not_use_its_idempotency_key_up(users: Scope) -> None:
    users.set("a", 1)
    with pytest.raises(Conflict):
        users.set("a", 2, if_absent=True, idempotency_key="once")
    users.delete("a")

    assert not users.set("a", 2, if_absent=True, idempotency_key="once").replayed
    assert users.set("a", 2, if_absent=True, idempotency_key="once").replayed


def test_each_scope_has_its_own_idempotency_keys(engine: Engine) -> None:
    for name in ("one", "other"):
        assert not engine.scope(name).set("a", name, idempotency_key="once").replayed


@pytest.mark.parametrize("idempotency_key", ["", "x" * 256, 7, b"once"])
def test_what_is_no_idempotency_key_is_refused(users: Scope, idempotency_key: Any) -> None:
    with pytest.raises(DeserializationError):
        users.set("a", 1, idempotency_key=idempotency_key)
    assert users.keys() == []
    assert not users.set("a", 1, idempotency_key="x" * 255).replayed


def test_many_threads_that_send_one_write_make_it_once(users: Scope, events: Events) -> None:
    users.set("n", 0)
    answers: list[Any] = []

    together(*[lambda: answers.append(users.update("n", INCREMENT, idempotency_key="once"))] * 6)

    assert users.get("n") == 1
    assert sorted(answer.replayed for answer in answers) == [False] + [True] * 5
    assert {answer.revision for answer in answers} == {revision_of(users, "n")}
    assert len(events.take()) == 2


@lasting
def test_an_answer_is_kept_for_the_next_engine(place: Place) -> None:
    with place.open() as engine:
        first = engine.scope("users").set("a", 1, idempotency_key="once")
    with place.open() as engine:
        users = engine.scope("users")
        users.set("a", 2)
        again = users.set("a", 1, idempotency_key="once")
        assert (again.replayed, again.revision) == (True, first.revision)
        assert users.get("a") == 2
        with pytest.raises(IdempotencyMismatch):
            users.set("a", 3, idempotency_key="once")


@lasting
def test_a_batch_outlives_its_engine_whole(place: Place) -> None:
    with place.open() as engine:
        users = engine.scope("users")
        users.set("gone", 1)
        with users.batch() as batch:
            batch.set("a", 1)
            batch.set("b", 2, ttl=3600)
            batch.delete("gone")
        before = [(entry.key, entry.value, entry.revision, entry.expires_at) for entry in users.entries()]
    with place.open() as engine:
        after = [
            (entry.key, entry.value, entry.revision, entry.expires_at) for entry in engine.scope("users").entries()
        ]
    assert after == before
    assert [key for key, *_ in after] == ["a", "b"]
