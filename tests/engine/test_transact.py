"""Functions that read and write a scope as if they were alone: `transact` and `modify`, in memory and in files."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from ids import stable
from watching import PATIENCE_S, Gate, Seen, in_steps, in_thread

from scopestate import KEEP, Engine, messages, ops
from scopestate.actors import callbacks
from scopestate.errors import (
    BatchTooLarge,
    DeserializationError,
    IdempotencyMismatch,
    InvalidValue,
    UpdateRefused,
    WouldDeadlock,
)
from scopestate.handles import Scope
from scopestate.ops.transactions import Transaction
from tests.engine.conftest import OpenEngine


@pytest.fixture
def users(open_store: OpenEngine) -> Scope:
    return open_store().scope("users")


def test_a_transaction_reads_its_own_writes_and_is_written_in_one_step(users: Scope) -> None:
    users.set("ada", {"balance": 30})
    users.set("bob", {"balance": 0})

    def transfer(tx: Transaction) -> int:
        tx.update("ada", [ops.Decrement("balance", 10)])
        tx["bob"] = {"balance": tx["bob"]["balance"] + 10}
        tx.set("log", [1], ttl=60)
        assert tx.get("bob") == {"balance": 10}
        assert tx.keys() == ["ada", "bob", "log"]
        assert tx.items(prefix="b") == [("bob", {"balance": 10})]
        assert "log" in tx
        assert users.name == "users"
        return tx.get("ada")["balance"]  # type: ignore[no-any-return]  # it is a number

    assert users.transact(transfer) == 20
    assert users.items() == [("ada", {"balance": 20}), ("bob", {"balance": 10}), ("log", [1])]
    revisions = [entry.revision for entry in users.entries()]
    assert revisions == list(range(revisions[0], revisions[0] + 3))
    assert 50 < (users.ttl("log") or 0) <= 60


def test_a_transaction_is_a_mapping_of_keys(users: Scope) -> None:
    users.set("a", 1)

    def play(tx: Transaction) -> Any:
        del tx["a"]
        with pytest.raises(KeyError):
            tx["a"]
        with pytest.raises(KeyError):
            del tx["a"]
        tx["b"] = None
        assert (list(tx), len(tx), "b" in tx, "a" in tx, 5 in tx) == (["b"], 1, True, False, False)
        assert tx.touch("b", 60)
        assert not tx.touch("a", 60)
        entry = tx.entry("b")
        assert entry is not None
        assert (entry.value, entry.revision) == (None, 0)
        return tx.delete("nothing"), tx.get("nothing", "default")

    assert users.transact(play) == (None, "default")
    assert users.items() == [("b", None)]


def test_what_the_function_raises_reaches_the_caller_and_nothing_is_written(users: Scope) -> None:
    users.set("a", 1)
    for problem in (ValueError("x"), KeyboardInterrupt(), SystemExit(2), StopIteration(1), MemoryError()):

        def fail(tx: Transaction, problem: BaseException = problem) -> None:
            tx.set("a", 2)
            raise problem

        with pytest.raises(type(problem)) as caught:
            users.transact(fail)
        assert caught.value is problem

        def fail_too(_: Any, problem: BaseException = problem) -> None:
            raise problem

        with pytest.raises(type(problem)):
            users.modify("a", fail_too)
    with pytest.raises(UpdateRefused):
        users.transact(lambda tx: tx.update("a", [ops.Append("x", 1)]))
    assert users.items() == [("a", 1)]
    users.set("a", 3)
    assert users.transact(lambda tx: tx["a"]) == 3


CALLS: list[Callable[[Scope], Any]] = [
    lambda scope: scope.get("a"),
    lambda scope: scope.set("a", 5),
    lambda scope: scope.update("a", []),
    lambda scope: scope.delete("a"),
    lambda scope: scope.list(),
    lambda scope: scope.keys(),
    lambda scope: "a" in scope,
    lambda scope: scope.transact(lambda _: None),
    lambda scope: scope.modify("a", lambda _: KEEP),
    lambda scope: scope.actor_ref.ask(messages.Get(scope.name, "a")),
    lambda scope: scope._engine.ask(messages.Set(scope.name, "a", 5)),
    lambda scope: scope._engine.ask(messages.Set(scope.name, "a", 5), block=False),
    lambda scope: scope._engine.tell(messages.Set(scope.name, "a", 5)),
    lambda scope: scope._engine.call("state::set", {"scope": scope.name, "key": "a", "value": 5}),
    lambda scope: scope._engine.call("state::count", {"scope": scope.name}),
    lambda scope: scope._engine.list_groups(),
    lambda scope: scope._engine.flush(),
    lambda scope: scope._engine.drain(),
    lambda scope: in_steps(scope.aio.get("a")),
    lambda scope: in_steps(scope.aio.set("a", 5)),
    lambda scope: in_steps(scope.aio.delete("a")),
    lambda scope: in_steps(scope.aio.list()),
    lambda scope: in_steps(scope._engine.aio.list_groups()),
]


@pytest.mark.parametrize("other", ["users", "elsewhere"])
@pytest.mark.parametrize("call", CALLS)
def test_a_function_that_calls_the_engine_is_refused_at_once(
    call: Callable[[Scope], Any], other: str, engine: Engine
) -> None:
    users = engine.scope("users")
    users.set("a", 1)
    engine.set("elsewhere", "a", 1)
    with pytest.raises(WouldDeadlock, match="`transact` has called an engine"):
        users.transact(lambda tx: (tx.set("a", 2), call(engine.scope(other))))
    with pytest.raises(WouldDeadlock, match="`modify` has called an engine"):
        users.modify("a", lambda _: call(engine.scope(other)))
    assert users.items() == engine.items("elsewhere") == [("a", 1)]
    assert callbacks.IN_CALLBACK == {}


def test_a_batch_within_a_function_is_refused_when_it_would_be_written(engine: Engine) -> None:
    def play(_: Transaction) -> None:
        with engine.batch("elsewhere") as b:
            b.set("a", 1)

    with pytest.raises(WouldDeadlock):
        engine.transact("users", play)
    assert engine.list_groups() == []


def test_other_threads_are_served_while_a_function_runs(engine: Engine) -> None:
    """Only the thread of the function is refused the engine; a call of the same scope waits for it."""
    gate = Gate()

    def wait(tx: Transaction) -> Any:
        tx.set("a", 1)
        gate()
        return tx.get("a")

    running = in_thread(lambda: engine.transact("users", wait))
    gate.wait_until_reached()
    assert engine.set("elsewhere", "a", 1).created
    assert engine.get("users", "a") is None
    waiting = in_thread(lambda: engine.set("users", "a", 2))
    gate.open()
    assert running() == 1
    assert waiting().old_value == 1


async def coroutine(tx: Transaction) -> None:
    del tx


def generator(tx: Transaction) -> Any:
    yield tx


@pytest.mark.parametrize("function", [coroutine, generator, lambda tx: coroutine(tx), None, 5], ids=stable)  # noqa: PLW0108 - one that hides it
def test_what_is_no_plain_function_is_refused(function: Any, users: Scope) -> None:
    for call in (
        lambda: users.transact(function),
        lambda: users.modify("a", function),
        lambda: asyncio.run(users.aio.transact(function)),
        lambda: users.actor_ref.ask(messages.Transact("users", function)),
    ):
        with pytest.raises(DeserializationError, match=r"takes a function|plain function"):
            call()
    assert users.keys() == []


def test_a_transaction_is_of_no_use_behind_its_function(users: Scope) -> None:
    kept: list[Transaction] = []
    users.transact(kept.append)
    for call in (lambda: kept[0].get("a"), lambda: kept[0].set("a", 1), kept[0].keys):
        with pytest.raises(DeserializationError, match="has ended"):
            call()


def test_a_transaction_over_the_limits_changes_nothing(open_store: OpenEngine) -> None:
    users = open_store(limits={"max_batch_bytes": 1000}).scope("users")

    def many(tx: Transaction) -> None:
        for number in range(1001):
            tx.set(f"k{number}", 1)

    with pytest.raises(BatchTooLarge, match="1001 keys"):
        users.transact(many)
    with pytest.raises(BatchTooLarge, match="1002 bytes"):
        users.transact(lambda tx: tx.set("k", "v" * 1000))
    with pytest.raises(InvalidValue):
        users.transact(lambda tx: tx.set("k", {1}))
    assert users.keys() == []


def test_a_transaction_with_an_idempotency_key_runs_once(users: Scope) -> None:
    ran = []

    def work(tx: Transaction) -> dict[str, int]:
        ran.append(1)
        tx.set("n", tx.get("n", 0) + 1)
        return {"n": tx["n"]}

    assert users.transact(work, idempotency_key="i") == {"n": 1}
    assert users.transact(work, idempotency_key="i") == {"n": 1}
    assert (len(ran), users.get("n")) == (1, 1)
    with pytest.raises(IdempotencyMismatch):
        users.set("n", 5, idempotency_key="i")


def test_with_an_idempotency_key_the_answer_must_be_json(users: Scope) -> None:
    def work(tx: Transaction) -> set[int]:
        tx.set("n", 1)
        return {1}

    with pytest.raises(InvalidValue):
        users.transact(work, idempotency_key="i")
    assert users.keys() == []
    assert users.transact(work) == {1}


def test_a_function_that_takes_long_is_logged(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(callbacks, "LONG_S", 0.0)
    with caplog.at_level(logging.WARNING, "scopestate.scope"):
        engine.transact("users", lambda tx: threading.Event().wait(0.001) or tx.set("a", 1))
    assert any("a transact on scope 'users'" in record.getMessage() for record in caplog.records)


def test_modify_loses_no_increment_of_many_threads(users: Scope) -> None:
    def work() -> None:
        for _ in range(200):
            users.modify("n", lambda n: n + 1, 0)

    for wait in [in_thread(work) for _ in range(4)]:
        wait()
    assert users.get("n") == 800


def test_sums_hold_in_every_snapshot_while_threads_move_money(users: Scope) -> None:
    accounts = [f"a{number}" for number in range(10)]
    with users.batch() as b:
        for name in accounts:
            b.set(name, 100)
    open_ends = [1]

    def work(first: int) -> None:
        for number in range(100):
            source, target = accounts[(first + number) % 10], accounts[(first * 3 + number * 7 + 1) % 10]

            def move(tx: Transaction, source: str = source, target: str = target) -> None:
                tx[source] = tx[source] - 1
                tx[target] = tx[target] + 1

            users.transact(move)

    def watch() -> int:
        sums = 0
        while open_ends:
            assert sum(users.list()) == sum(dict(users.mapping()).values()) == 1000
            sums += 1
        return sums

    watcher = in_thread(watch)
    for wait in [in_thread(lambda first=first: work(first)) for first in range(4)]:
        wait()
    open_ends.clear()
    assert watcher() > 0
    assert sum(users.values()) == 1000


# ------------------------------------------------------------------------------------------------------- event loops


def test_a_task_waits_for_a_busy_scope_without_blocking_its_loop(engine: Engine) -> None:
    gate, users = Gate(), engine.scope("users")

    def hold(tx: Transaction) -> None:
        tx.set("a", 1)
        gate()

    running = in_thread(lambda: users.transact(hold))
    gate.wait_until_reached()

    async def main() -> int:
        task = asyncio.create_task(users.aio.transact(lambda tx: tx["a"] + 1))
        for _ in range(3):
            await asyncio.sleep(0)  # the loop runs
        assert not task.done()
        gate.open()
        return await asyncio.wait_for(task, PATIENCE_S)

    assert asyncio.run(main()) == 2
    running()


def test_what_a_function_raises_reaches_a_task_that_waits(engine: Engine) -> None:
    users = engine.scope("users")
    for problem in (ValueError("x"), StopIteration(1)):
        gate = Gate()
        running = in_thread(lambda gate=gate: users.transact(gate))
        gate.wait_until_reached()

        def fail(_: Any, problem: Exception = problem) -> None:
            raise problem

        async def main(gate: Gate = gate, fail: Any = fail) -> None:
            task = asyncio.create_task(users.aio.transact(fail))
            await asyncio.sleep(0)
            gate.open()
            await asyncio.wait_for(task, PATIENCE_S)

        with pytest.raises((ValueError, RuntimeError)):
            asyncio.run(main())
        running()


def test_all_of_it_works_in_asyncio(open_store: OpenEngine) -> None:
    users = open_store().scope("users")

    async def main() -> None:
        aio = users.aio
        assert (await aio.set("a", 1, if_absent=True)).created
        assert (await aio.modify("a", lambda n: n + 1)).new_value == 2
        assert await aio.transact(lambda tx: tx.get("a")) == 2
        entry = await aio.entry("a")
        assert entry is not None
        assert (await aio.update("a", [ops.Increment("", 1)], if_revision=entry.revision)).new_value == 3
        assert (await aio.compare_and_set("a", 3, 4)).swapped
        assert await aio.touch("a", ttl=60)
        assert 0 < (await aio.ttl("a") or 0) <= 60
        assert await aio.ttl("nothing") is None
        assert await aio.delete("a", if_revision=(await aio.entries())[0].revision) == 4
        await asyncio.gather(*(aio.set(f"k{number}", number) for number in range(5)))
        assert await aio.keys(limit=2) == ["k0", "k1"]
        assert await aio.items(start="k4") == [("k4", 4)]
        assert await aio.values(end="k2") == [0, 1]
        assert await aio.count() == 5
        assert [pair async for pair in aio.iter(prefix="k3")] == [("k3", 3)]
        assert await aio.delete_range(prefix="k") == 5

    asyncio.run(main())


# -------------------------------------------------------------------------------------------------------- in handlers


def test_handlers_may_use_all_of_it(engine: Engine) -> None:
    seen = Seen()
    engine.on_change(scope="total")(seen)

    @engine.on_change(scope="orders")
    def add(event: Any) -> None:
        engine.modify("total", "n", lambda n: n + event.new_value, 0)
        with engine.batch("done") as b:
            b.set(event.key, True)

    with engine.batch("orders") as b:
        b.set("o1", 2)
        b.set("o2", 3)
    engine.drain(timeout=PATIENCE_S)

    assert (engine.get("total", "n"), engine.keys("done")) == (5, ["o1", "o2"])
    assert [event.depth for event in seen.events] == [1, 1]


def test_a_chain_of_handlers_that_transact_is_cut(open_engine: OpenEngine) -> None:
    engine = open_engine(limits={"max_event_depth": 5})

    @engine.on_change(scope="s")
    def again(event: Any) -> None:
        engine.transact("s", lambda tx: tx.set("k", event.new_value + 1))

    engine.set("s", "k", 0)
    engine.drain(timeout=PATIENCE_S)
    assert engine.stats().loops_cut == 1
    assert engine.get("s", "k") == 6
