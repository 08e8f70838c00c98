"""Several writes in one step: `with scope.batch()`, in memory and in files."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from watching import Seen, in_thread

from scopestate import Conflict, Engine, ops
from scopestate.batch import Batch
from scopestate.errors import (
    BatchTooLarge,
    DeserializationError,
    IdempotencyMismatch,
    InvalidValue,
    Unsupported,
    UpdateRefused,
    ValueTooLarge,
)
from scopestate.handles import Scope
from tests.engine.conftest import OpenEngine


@pytest.fixture
def users(open_store: OpenEngine) -> Scope:
    return open_store().scope("users")


@pytest.fixture
def rows(engine: Engine) -> Scope:
    """A scope in memory."""
    return engine.scope("rows")


def test_plain_sets_are_written_together(users: Scope) -> None:
    users.set("b", 0)
    with users.batch() as b:
        b.set("a", 1)
        b.set("b", [2])
        assert users.items() == [("b", 0)]

    assert users.items() == [("a", 1), ("b", [2])]
    results = b.result.results
    assert [(one.old_value, one.new_value, one.created) for one in results] == [(None, 1, True), (0, [2], False)]  # type: ignore[union-attr]  # they are sets
    entry = users.entry("b")
    assert entry is not None
    assert entry.revision == b.result.revision


def test_every_kind_of_step_sees_those_before_it(users: Scope) -> None:
    users.set("ada", {"balance": 30})
    users.set("old", 1)
    with users.batch() as b:
        b.check("ada", value={"balance": 30})
        b.check("bob", absent=True)
        b.update("ada", [ops.Decrement("balance", 10)])
        b.set("bob", {"balance": 10}, ttl=60)
        b.update("bob", [ops.Increment("balance", 1)])
        b.delete("old")
        b.delete("nothing")
        b.touch("ada", ttl=5)
        b.touch("nothing", ttl=5)

    assert users.items() == [("ada", {"balance": 20}), ("bob", {"balance": 11})]
    assert 0 < (users.ttl("ada") or 0) <= 5
    assert 50 < (users.ttl("bob") or 0) <= 60
    results: Any = b.result.results
    assert results[0].new_value == {"balance": 20}
    assert (results[3].old_value, results[4].old_value) == (1, None)
    assert (results[5].touched, results[6].touched) == (True, False)


def test_each_key_fires_one_event_and_all_have_consecutive_revisions(engine: Engine) -> None:
    seen = Seen()
    engine.on_change(scope="s")(seen)
    engine.set("s", "b", 0)
    with engine.batch("s") as b:
        b.set("a", 1)
        b.set("a", 2)
        b.delete("b")
        b.delete("b")
        b.set("c", 3)
        b.delete("c")

    events = seen.wait_for(3)
    engine.drain()
    assert [(one.event_type, one.key, one.old_value, one.new_value) for one in events[1:]] == [
        ("state:created", "a", None, 2),
        ("state:deleted", "b", 0, None),
    ]
    assert len(seen.events) == 3
    assert [one.revision for one in events] == [1, 2, 3]
    assert b.result.revision == 3
    assert [one.old_value for one in b.result.results] == [None, 1, 0, None, None, 3]  # type: ignore[union-attr]


def test_a_plain_set_that_names_a_key_again_has_a_result_of_its_own(users: Scope) -> None:
    with users.batch() as b:
        b.set("a", 1)
        b.set("b", 1)
        b.set("a", 2)
    assert [one.old_value for one in b.result.results] == [None, None, 1]  # type: ignore[union-attr]
    assert users.items() == [("a", 2), ("b", 1)]


def test_a_check_that_fails_refuses_everything_and_names_every_conflict(users: Scope) -> None:
    revision = users.set("ada", 1).revision
    with pytest.raises(Conflict) as caught, users.batch() as b:
        b.check("ada", revision=revision + 7)
        b.check("ada", revision=revision)
        b.check("ada", absent=True)
        b.check("ada", value=5)
        b.set("bob", 1)
    assert [(one.index, one.key, one.revision) for one in caught.value.conflicts] == [
        (0, "ada", revision),
        (2, "ada", revision),
        (3, "ada", revision),
    ]
    assert users.items() == [("ada", 1)]
    with pytest.raises(DeserializationError, match="nothing was written"):
        _ = b.result


def test_an_op_that_does_not_fit_refuses_everything(users: Scope) -> None:
    users.set("name", "Ada")
    with pytest.raises(UpdateRefused) as caught, users.batch() as b:
        b.set("a", 1)
        b.update("name", [ops.Increment("", 1)])
    assert [(one.index, one.code) for one in caught.value.errors] == [(1, "increment.not_number")]
    assert users.items() == [("name", "Ada")]


def test_a_block_that_raises_writes_nothing(users: Scope) -> None:
    for problem in (ValueError("x"), KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises(type(problem)), users.batch() as b:
            b.set("a", 1)
            raise problem
        with pytest.raises(DeserializationError, match="has ended"):
            b.set("a", 1)
    assert users.keys() == []


def test_an_iterator_that_raises_in_the_middle_writes_nothing(users: Scope) -> None:
    def values() -> Any:
        yield 1
        raise OSError("the file ended")

    with pytest.raises(OSError, match="the file ended"), users.batch() as b:
        for number, value in enumerate(values()):
            b.set(f"k{number}", value)
    assert users.keys() == []


def test_a_wrong_argument_raises_where_it_stands_and_the_rest_can_go_on(rows: Scope) -> None:
    with rows.batch() as b:
        b.set("a", 1)
        for call in (
            lambda: b.set("k", {1}),
            lambda: b.set(5, 1),  # type: ignore[arg-type]
            lambda: b.set("k", 1, ttl=0),
            lambda: b.set("k", 1, ttl=1, keep_ttl=True),
            lambda: b.update("k", ["increment"]),
            lambda: b.delete(None),  # type: ignore[arg-type]
            lambda: b.touch("k"),
            lambda: b.check("k"),
            lambda: b.check("k", revision=1, absent=True),
            lambda: b.check("k", revision=True),
        ):
            with pytest.raises(DeserializationError):
                call()
        with pytest.raises(InvalidValue) as caught:
            b.set("k", {"a": {1}})
        assert caught.value.path == "$.a"
        with pytest.raises(TypeError, match="if_revision"):
            b.set("k", 1, if_revision=3)  # type: ignore[call-arg]
    assert rows.items() == [("a", 1)]


def test_a_batch_is_refused_when_it_is_not_entered_and_when_it_has_ended(rows: Scope) -> None:
    b = rows.batch()
    for call in (
        lambda: b.set("a", 1),
        lambda: b.update("a", []),
        lambda: b.delete("a"),
        lambda: b.touch("a", 5),
        lambda: b.check("a", absent=True),
    ):
        with pytest.raises(DeserializationError, match="was not entered"):
            call()
    with b:
        b.set("a", 1)
        with pytest.raises(DeserializationError, match="has not ended"):
            _ = b.result
        with pytest.raises(DeserializationError, match="entered before"), b:
            pass
    for call in (lambda: b.set("b", 1), lambda: b.delete("a"), lambda: b.check("a", absent=True)):
        with pytest.raises(DeserializationError, match="has ended"):
            call()
    with pytest.raises(DeserializationError, match="entered before"), b:
        pass
    assert rows.items() == [("a", 1)]
    assert len(b.result.results) == 1


def test_a_batch_belongs_to_the_thread_that_has_entered_it(rows: Scope) -> None:
    with rows.batch() as b:
        b.set("a", 1)

        def meddle() -> None:
            with pytest.raises(DeserializationError, match="belongs to the thread"):
                b.set("b", 1)
            with pytest.raises(DeserializationError, match="belongs to the thread"):
                b.delete("a")

        in_thread(meddle)()
    assert rows.items() == [("a", 1)]


def test_batches_of_several_scopes_may_be_open_at_once(engine: Engine) -> None:
    with engine.batch("one") as one, engine.batch("two") as two:
        one.set("a", 1)
        two.set("b", 2)
    assert (engine.items("one"), engine.items("two")) == ([("a", 1)], [("b", 2)])


def test_an_empty_batch_changes_nothing_and_a_batch_of_checks_only_checks(users: Scope) -> None:
    with users.batch() as b:
        pass
    assert b.result.results == ()
    users.set("a", 1)
    with users.batch() as b:
        b.check("a", value=1)
    with pytest.raises(Conflict), users.batch() as b:
        b.check("a", absent=True)


def test_a_batch_over_the_limits_is_refused_before_anything_is_done(open_store: OpenEngine) -> None:
    users = open_store(limits={"max_batch_bytes": 2000, "max_value_bytes": 1000}).scope("users")
    with pytest.raises(BatchTooLarge, match="1001 keys"), users.batch() as b:
        for number in range(1001):
            b.set(f"k{number}", 1)
    with pytest.raises(BatchTooLarge, match="1001 keys"), users.batch() as b:
        for number in range(1001):
            b.delete(f"k{number}")
    for options in ({}, {"ttl": 60}):
        with pytest.raises(BatchTooLarge, match="2706 bytes"), users.batch() as b:
            for number in range(3):
                b.set(f"k{number}", "v" * 900, **options)  # type: ignore[arg-type]
    with users.batch() as b, pytest.raises(ValueTooLarge):
        b.set("k", "v" * 999)
    with pytest.raises(ValueTooLarge), users.batch() as b:
        b.set("text", "v" * 900)
        b.update("text", [ops.Append("", "v" * 900)])
    assert users.keys() == []


def test_a_thousand_keys_are_one_batch(users: Scope) -> None:
    with users.batch() as b:
        for number in range(1000):
            b.set(f"k{number:04}", number)
    assert users.count() == 1000
    assert [one.new_value for one in b.result.results] == list(range(1000))  # type: ignore[union-attr]


def test_a_batch_with_an_idempotency_key_is_done_once(users: Scope) -> None:
    def pay(amount: int) -> Batch:
        with users.batch(idempotency_key="pay-7") as b:
            b.update("ada", [ops.Increment("balance", amount)])
            b.delete("open")
        return b

    users.set("open", 1)
    first, again = pay(5), pay(5)

    assert (first.result.replayed, again.result.replayed) == (False, True)
    assert again.result.revision == first.result.revision
    assert [one.old_value for one in again.result.results] == [None, 1]  # type: ignore[union-attr]
    assert users.items() == [("ada", {"balance": 5})]
    with pytest.raises(IdempotencyMismatch):
        pay(6)
    with users.batch(idempotency_key="sets") as b:
        b.set("x", 1)
    with users.batch(idempotency_key="sets") as b:
        b.set("x", 1)
    assert b.result.replayed


@pytest.mark.parametrize("options", [{"idempotency_key": ""}, {"durable": 1}])
def test_options_of_a_batch_are_checked_when_it_is_made(options: Any, rows: Scope) -> None:
    with pytest.raises(DeserializationError):
        rows.batch(**options)
    with pytest.raises(TypeError):
        rows.batch(atomic=True)  # type: ignore[call-arg]


def test_a_durable_batch_in_memory_is_refused(rows: Scope) -> None:
    with pytest.raises(Unsupported), rows.batch(durable=True) as b:
        b.set("a", 1)
    assert rows.keys() == []


def test_readers_see_a_whole_batch_or_nothing_of_it(users: Scope) -> None:
    names = [f"k{number}" for number in range(5)]
    enough = threading.Event()

    def write() -> int:
        number = 0
        while not enough.is_set():
            with users.batch() as b:
                for name in names:
                    b.set(name, number)
            number += 1
        return number

    wait = in_thread(write)
    try:
        for _ in range(100):
            for values in (users.list(), users.values(), list(dict(users.mapping()).values())):
                assert len(values) in (0, 5)
                assert len(set(values)) <= 1
    finally:
        enough.set()
    assert wait() > 0


def test_in_asyncio_the_end_of_the_block_is_awaited(engine: Engine) -> None:
    users = engine.scope("users")

    async def main() -> None:
        async with users.aio.batch() as b:
            b.check("a", absent=True)
            await asyncio.gather(*(_set(b, name) for name in "abc"))
            assert await users.aio.keys() == []
        assert await users.aio.items() == [("a", 1), ("b", 1), ("c", 1)]
        assert len(b.result.results) == 3
        with pytest.raises(Conflict):
            async with engine.aio.batch("users") as b:
                b.check("a", absent=True)
        with pytest.raises(ValueError, match="x"):
            async with users.aio.batch() as b:
                b.set("d", 1)
                raise ValueError("x")
        assert await users.aio.count() == 3

    asyncio.run(main())


async def _set(batch: Any, key: str) -> None:
    batch.set(key, 1)
