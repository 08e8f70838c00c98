"""The calls for asyncio: no suspension on an idle scope, never a blocked loop, many loops, cancellation anywhere."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from conformance import same
from watching import PATIENCE_S, Gate, GatedStore, LoopThread, Seen, SlowUpdate, broken, in_steps, in_thread

from scopestate import Engine, messages, ops
from scopestate.config.schema import Config, LimitsConfig
from scopestate.errors import DeserializationError, InvalidValue, ReplyTimeout, StorageError, ValueTooLarge

Call = Callable[[Engine], Awaitable[Any]]

CALLS: dict[str, Call] = {
    "set": lambda engine: engine.aio.set("s", "k", 2),
    "get": lambda engine: engine.aio.get("s", "k"),
    "get missing": lambda engine: engine.aio.get("s", "missing"),
    "delete": lambda engine: engine.aio.delete("s", "k"),
    "update": lambda engine: engine.aio.update("s", "k", [ops.Increment("", 1)]),
    "list": lambda engine: engine.aio.list("s"),
    "handle set": lambda engine: engine.aio.scope("s").set("k", 2),
    "handle get": lambda engine: engine.aio.scope("s").get("k"),
    "handle delete": lambda engine: engine.aio.scope("s").delete("k"),
    "handle update": lambda engine: engine.aio.scope("s").update("k", []),
    "handle list": lambda engine: engine.aio.scope("s").list(),
    "ask set": lambda engine: engine.aio.ask(messages.Set("s", "k", 2)),
    "ask get": lambda engine: engine.aio.ask(messages.Get("s", "k")),
    "ask delete": lambda engine: engine.aio.ask(messages.Delete("s", "k")),
    "ask update": lambda engine: engine.aio.ask(messages.Update("s", "k", ())),
    "ask list": lambda engine: engine.aio.ask(messages.List("s")),
    "call": lambda engine: engine.aio.call("state::set", {"scope": "s", "key": "k", "value": 2}),
}


# -------------------------------------------------------------------------------------------------------- idle scopes


@pytest.mark.parametrize("call", [*CALLS.values()], ids=CALLS)
def test_an_idle_scope_answers_without_suspending(call: Call, engine: Engine) -> None:
    engine.set("s", "k", 1)

    in_steps(call(engine))


def test_neither_do_a_new_scope_and_the_groups(engine: Engine) -> None:
    assert in_steps(engine.aio.set("s", "k", 1)).created
    assert in_steps(engine.aio.list_groups()) == ["s"]
    assert in_steps(engine.aio.ask(messages.ListGroups())) == ["s"]
    assert in_steps(engine.aio.call("state::list_groups", {})) == {"groups": ["s"]}


def test_an_idle_scope_of_a_store_answers_without_suspending_once_it_is_loaded(open_engine: Any) -> None:
    engine = open_engine(store=GatedStore())
    engine.set("s", "k", 1)

    assert in_steps(engine.aio.get("s", "k")) == 1
    assert in_steps(engine.aio.set("s", "k", 2)).old_value == 1


def test_results_are_those_of_the_plain_calls(engine: Engine) -> None:
    async def main() -> None:
        aio = engine.aio
        assert await aio.set("s", "k", {"n": 1}) == engine.set("t", "k", {"n": 1})
        assert await aio.get("s", "k") == {"n": 1}
        assert await aio.get("s", "missing", "nothing") == "nothing"
        assert (await aio.update("s", "k", [ops.Increment("n", 1)])).new_value == {"n": 2}
        assert same(await aio.call("state::list", {"scope": "s"}), [{"n": 2}])
        assert await aio.list("s") == [{"n": 2}]
        assert await aio.delete("s", "k") == {"n": 2}
        assert await aio.delete("s", "k") is None
        assert await aio.scope("t").get("missing", 5) == 5

    asyncio.run(main())


@pytest.mark.parametrize("name", [None, 5, b"s", ["s"], "\ud800"], ids=repr)
def test_names_that_are_no_text_are_refused(name: Any, engine: Engine) -> None:
    aio = engine.aio
    calls = [
        lambda: aio.set(name, "k", 1),
        lambda: aio.set("s", name, 1),
        lambda: aio.get(name, "k"),
        lambda: aio.get("s", name),
        lambda: aio.delete(name, "k"),
        lambda: aio.delete("s", name),
        lambda: aio.update(name, "k", []),
        lambda: aio.update("s", name, []),
        lambda: aio.list(name),
    ]

    async def main() -> None:
        for call in calls:
            with pytest.raises(DeserializationError):
                await call()
        with pytest.raises(DeserializationError):
            aio.scope(name)

    asyncio.run(main())
    assert engine.list_groups() == []


def test_refusals_are_those_of_the_plain_calls(open_engine: Any) -> None:
    engine = open_engine(limits={"max_value_bytes": 10})

    async def main() -> None:
        with pytest.raises(ValueTooLarge):
            await engine.aio.set("s", "k", "0123456789")
        with pytest.raises(ValueTooLarge):
            await engine.aio.update("s", "k", [ops.Set("", "0123456789")])
        with pytest.raises(InvalidValue, match=r"\$\.a"):
            await engine.aio.set("s", "k", {"a": float("nan")})
        with pytest.raises(DeserializationError, match=r"\$\.ops"):
            await engine.aio.update("s", "k", 5)  # type: ignore[arg-type]
        with pytest.raises(DeserializationError, match="str is not a message"):
            await engine.aio.ask("set")  # type: ignore[arg-type]

    asyncio.run(main())


def test_a_value_of_exactly_the_limit_is_taken_by_each_coroutine_and_one_byte_more_is_not(open_engine: Any) -> None:
    engine = open_engine(limits={"max_value_bytes": 10})
    aio = engine.aio
    place = {"scope": "s", "key": "k"}
    ways: list[Callable[[str], Any]] = [
        lambda text: aio.set("s", "k", text),
        lambda text: aio.scope("s").set("k", text),
        lambda text: aio.update("s", "k", [ops.Set("", text)]),
        lambda text: aio.scope("s").update("k", [ops.Set("", text)]),
        lambda text: aio.ask(messages.Set("s", "k", text)),
        lambda text: aio.ask(messages.Update("s", "k", (ops.Set("", text),))),
        lambda text: aio.call("state::set", {**place, "value": text}),
        lambda text: aio.call("state::update", {**place, "ops": [{"type": "set", "path": "", "value": text}]}),
    ]

    async def main() -> None:
        for number, way in enumerate(ways):
            exact = f"{number}1234567"  # ten bytes with its quotes
            await way(exact)
            with pytest.raises(ValueTooLarge) as refused:
                await way(f"{exact}8")
            assert (refused.value.size, refused.value.limit) == (11, 10)
            assert await aio.get("s", "k") == exact

    asyncio.run(main())


# ------------------------------------------------------------------------------------------- the loop is never blocked


class Loading:
    """An engine over a store whose scope `s` takes as long to load as the gate is shut."""

    def __init__(self, open_engine: Any) -> None:
        self.store, self.gate = GatedStore(), Gate()
        seed = open_engine(store=self.store)
        seed.set("s", "k", 1)
        seed.close()
        self.engine = open_engine(store=self.store)
        self.engine.set("other", "k", 1)
        self.store.at_load = self.gate


@pytest.fixture
def loading(open_engine: Any) -> Loading:
    return Loading(open_engine)


async def other_work(engine: Engine) -> None:
    """What the loop does meanwhile; if it were blocked, this would not run and the gate would stay shut."""
    for number in range(10):
        await engine.aio.set("other", "k", number)
        await asyncio.sleep(0)


async def waits_without_blocking(engine: Engine, gate: Gate, call: Call) -> Any:
    """Make a call that must wait for the gate, do other things on its loop, open the gate, and return the result."""
    task = asyncio.ensure_future(call(engine))
    await asyncio.to_thread(gate.wait_until_reached)
    await other_work(engine)
    assert not task.done()
    gate.open()
    return await asyncio.wait_for(task, PATIENCE_S)


@pytest.mark.parametrize("call", [*CALLS.values()], ids=CALLS)
def test_a_scope_that_is_being_loaded_blocks_no_loop(call: Call, loading: Loading) -> None:
    asyncio.run(waits_without_blocking(loading.engine, loading.gate, call))


@pytest.mark.parametrize("call", [*CALLS.values()], ids=CALLS)
def test_a_scope_that_another_thread_loads_blocks_no_loop(call: Call, loading: Loading) -> None:
    loader = in_thread(lambda: loading.engine.get("s", "k"))
    loading.gate.wait_until_reached()

    async def main() -> None:
        task = asyncio.ensure_future(call(loading.engine))
        await other_work(loading.engine)
        assert not task.done()
        loading.gate.open()
        await asyncio.wait_for(task, PATIENCE_S)

    asyncio.run(main())
    assert loader() == 1


def busy_with(engine: Engine, gate: Gate) -> Callable[[], Any]:
    """Occupy the scope `s` with a turn that lasts until the gate opens."""
    update = SlowUpdate("k", (ops.Increment("", 10),), gate)
    return in_thread(lambda: engine._scopes["s"].run(update))


@pytest.mark.parametrize("call", [*CALLS.values()], ids=CALLS)
def test_a_busy_scope_blocks_no_loop(call: Call, engine: Engine) -> None:
    gate = Gate()
    engine.set("s", "k", 1)
    turn = busy_with(engine, gate)
    gate.wait_until_reached()

    async def main() -> None:
        task = asyncio.ensure_future(call(engine))
        await other_work(engine)
        gate.open()
        await asyncio.wait_for(task, PATIENCE_S)

    asyncio.run(main())
    assert turn().new_value == 11


def test_listing_the_groups_of_a_slow_store_blocks_no_loop(open_engine: Any) -> None:
    store, gate = GatedStore(), Gate()
    store.at_scopes = gate
    engine = open_engine(store=store)
    engine.set("other", "k", 1)

    groups = asyncio.run(waits_without_blocking(engine, gate, lambda engine: engine.aio.list_groups()))

    assert groups == ["other"]


COMMIT = [{"name": "s", "durability": "commit"}]


@pytest.mark.parametrize("name", ["set", "delete", "update", "ask set", "call"])
def test_a_commit_blocks_no_loop(name: str, open_engine: Any) -> None:
    store, gate = GatedStore(), Gate()
    engine = open_engine(store=store, scopes=COMMIT)
    engine.set("s", "k", 1)
    store.at_save = gate

    asyncio.run(waits_without_blocking(engine, gate, CALLS[name]))


def test_a_flush_blocks_no_loop(open_engine: Any) -> None:
    store, gate = GatedStore(), Gate()
    engine = open_engine(store=store)
    engine.set("s", "k", 1)
    store.at_save = gate

    asyncio.run(waits_without_blocking(engine, gate, lambda engine: engine.aio.flush()))
    assert store.values("s") == {"k": b"1"}


def test_a_drain_and_a_full_handler_block_no_loop(open_engine: Any) -> None:
    engine = open_engine(limits={"handler_mailbox": 1})
    gate, seen = Gate(), Seen()
    engine.on_change(scope="s")(lambda event: (gate(), seen(event)))

    async def main() -> None:
        await engine.aio.set("s", "a", 1)
        await asyncio.to_thread(gate.wait_until_reached)
        await engine.aio.set("s", "b", 1)
        full = asyncio.ensure_future(engine.aio.set("s", "c", 1))
        drained = asyncio.ensure_future(engine.aio.drain(PATIENCE_S))
        await other_work(engine)
        assert not full.done()
        assert not drained.done()
        gate.open()
        await full
        await drained
        await engine.aio.drain(PATIENCE_S)

    asyncio.run(main())
    assert seen.keys == ["a", "b", "c"]


def test_a_store_that_fails_to_load_is_an_error_of_the_call_and_the_next_one_tries_again(open_engine: Any) -> None:
    store = GatedStore()
    engine = open_engine(store=store)
    store.at_load = broken
    codes = {
        "ask set": "SET_ERROR",
        "set": "SET_ERROR",
        "get": "GET_ERROR",
        "delete": "DELETE_ERROR",
        "update": "UPDATE_ERROR",
        "list": "LIST_ERROR",
    }

    async def main() -> None:
        for name, code in codes.items():
            with pytest.raises(StorageError, match=r"Failed to .*on fire") as failed:
                await CALLS[name](engine)
            assert failed.value.code == code
        store.at_load = lambda: None
        await engine.aio.set("s", "k", 1)

    asyncio.run(main())
    assert engine.get("s", "k") == 1


# ----------------------------------------------------------------------------------------------------------- many loops


def test_several_loops_in_several_threads_use_one_engine_at_once(engine: Engine) -> None:
    loops, tasks, turns = 4, 25, 8
    start = threading.Barrier(loops)

    def work(number: int) -> None:
        async def client(task: int) -> None:
            for turn in range(turns):
                await engine.aio.update("hot", "n", [ops.Increment("", 1)])
                await engine.aio.set(f"own {number}", str(task), turn)
                await asyncio.sleep(0)

        async def main() -> None:
            start.wait(PATIENCE_S)
            await asyncio.gather(*(client(task) for task in range(tasks)))

        asyncio.run(main())

    for wait in [in_thread(lambda number=number: work(number)) for number in range(loops)]:
        wait()

    assert engine.get("hot", "n") == loops * tasks * turns
    assert [engine.list(f"own {number}") for number in range(loops)] == [[turns - 1] * tasks] * loops


def test_a_loop_that_ends_while_it_waits_leaves_the_engine_well(loading: Loading) -> None:
    async def main() -> None:
        waiting = asyncio.ensure_future(loading.engine.aio.set("s", "k", 2))
        await asyncio.to_thread(loading.gate.wait_until_reached)
        waiting.cancel()  # what asyncio.run() does to whatever is left

    asyncio.run(main())
    loading.gate.open()

    assert loading.engine.get("s", "k") in (1, 2)
    assert loading.engine.set("s", "k", 3).created is False


def test_replies_awaited_on_a_loop_suspend_instead_of_blocking(loading: Loading) -> None:
    async def main() -> Any:
        reply = loading.engine.ask(messages.Get("s", "k"), block=False)
        await asyncio.to_thread(loading.gate.wait_until_reached)
        waiting = asyncio.ensure_future(wait_for(reply))
        await other_work(loading.engine)
        assert not waiting.done()
        loading.gate.open()
        return await waiting, await reply

    async def wait_for(reply: Any) -> Any:
        return await reply

    assert asyncio.run(main()) == (1, 1)


# --------------------------------------------------------------------------------------------------------- cancellation


async def cancel(task: asyncio.Future[Any]) -> None:
    """Cancel a task that waits, and see that it ends so."""
    await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_task_cancelled_before_its_turn_writes_nothing(loading: Loading) -> None:
    engine = loading.engine

    async def main() -> None:
        reader = asyncio.ensure_future(engine.aio.get("s", "k"))
        await asyncio.to_thread(loading.gate.wait_until_reached)
        for call in ("set", "delete", "update", "list", "ask set", "call"):
            await cancel(asyncio.ensure_future(CALLS[call](engine)))
        loading.gate.open()
        assert await reader == 1

    asyncio.run(main())
    assert engine.list("s") == [1]


def test_a_task_cancelled_while_its_commit_runs_has_written(open_engine: Any) -> None:
    store, gate, seen = GatedStore(), Gate(), Seen()
    engine = open_engine(store=store, scopes=COMMIT)
    engine.on_change(scope="s")(seen)
    engine.set("s", "k", 1)
    store.at_save = gate

    async def main() -> None:
        writer = asyncio.ensure_future(engine.aio.set("s", "k", 2))
        await asyncio.to_thread(gate.wait_until_reached)
        await cancel(writer)
        gate.open()

    asyncio.run(main())
    assert engine.get("s", "k") == 2
    engine.drain(PATIENCE_S)
    assert [event.new_value for event in seen.events] == [1, 2]


def test_a_task_cancelled_while_it_waits_for_a_full_handler_writes_nothing(open_engine: Any) -> None:
    engine = open_engine(limits={"handler_mailbox": 1})
    gate, seen = Gate(), Seen()
    engine.on_change(scope="s")(lambda event: (gate(), seen(event)))

    async def main() -> None:
        await engine.aio.set("s", "a", 1)
        await asyncio.to_thread(gate.wait_until_reached)
        await engine.aio.set("s", "b", 1)
        for _ in range(3):
            waiting = asyncio.ensure_future(engine.aio.set("s", "c", 1))
            await other_work(engine)
            await cancel(waiting)
        gate.open()
        await engine.aio.drain(PATIENCE_S)

    asyncio.run(main())
    assert seen.keys == ["a", "b"]
    assert engine.get("s", "c", "nothing") == "nothing"


def test_waiting_for_a_function_a_flush_a_drain_or_the_groups_can_be_cancelled(open_engine: Any) -> None:
    store, gate = GatedStore(), Gate()
    engine = open_engine(store=store)
    engine.register_function("app::slow", gate)
    engine.on_change(scope="s")(gate)

    async def hang(payload: Any) -> None:
        await asyncio.Event().wait()

    engine.register_function("app::hang", hang)

    async def main() -> None:
        await engine.aio.set("s", "k", 1)
        await asyncio.to_thread(gate.wait_until_reached)
        store.at_save = store.at_scopes = gate
        for waiting in (
            engine.aio.call("app::slow"),
            engine.aio.flush(),
            engine.aio.drain(),
            engine.aio.list_groups(),
        ):
            task = asyncio.ensure_future(waiting)
            await other_work(engine)
            await cancel(task)
        task = asyncio.ensure_future(engine.aio.call("app::hang"))
        await other_work(engine)
        await cancel(task)
        gate.open()
        store.at_save = store.at_scopes = lambda: None
        assert await engine.aio.list_groups() == ["other", "s"]

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------------------- timeouts


def test_a_call_that_waits_too_long_says_what_may_still_happen(open_engine: Any) -> None:
    store, gate = GatedStore(), Gate()
    store.at_load = gate
    engine = open_engine(store=store, limits={"call_timeout_ms": 30})
    loader = in_thread(lambda: engine.get("s", "k"))
    gate.wait_until_reached()
    calls: list[Callable[[], Any]] = [
        lambda: engine.set("s", "k", 1),
        lambda: engine.update("s", "k", []),
        lambda: engine.get("s", "k"),
        lambda: engine.list("s"),
        lambda: engine.ask(messages.Set("s", "k", 2)),
        lambda: engine.ask(messages.Get("s", "k"), timeout=0.01),
        lambda: asyncio.run(engine.aio.set("s", "k", 3)),  # type: ignore[arg-type]
        lambda: asyncio.run(engine.aio.get("s", "k")),  # type: ignore[arg-type]
    ]

    for call in calls:
        with pytest.raises(ReplyTimeout, match="may still be applied") as late:
            call()
        assert late.value.code == "TIMEOUT"
        assert late.value.scope == "s"
        assert 0 < late.value.waited_s <= 0.03
    gate.open()
    loader()
    assert engine.set("s", "end", 1).created


def test_a_time_limit_that_a_reload_lowered_holds_behind_an_older_wait(open_engine: Any) -> None:
    store, gate = GatedStore(), Gate()
    store.at_load = gate
    engine = open_engine(store=store, limits={"call_timeout_ms": 60_000})
    loader = in_thread(lambda: engine.get("s", "k"))
    gate.wait_until_reached()

    async def main() -> None:
        older = asyncio.create_task(engine.aio.set("s", "older", 1))
        await asyncio.sleep(0)
        engine.reconfigure(Config(limits=LimitsConfig(call_timeout_ms=30)))
        with pytest.raises(ReplyTimeout, match=r"within 0\.03 s"):
            await asyncio.wait_for(engine.aio.set("s", "newer", 1), PATIENCE_S)
        assert not older.done()
        engine.reconfigure(Config(limits=LimitsConfig(call_timeout_ms=60_000)))
        gate.open()
        assert (await asyncio.wait_for(older, PATIENCE_S)).created

    asyncio.run(main())
    loader()


def test_without_a_timeout_a_call_waits_as_long_as_it_takes(open_engine: Any) -> None:
    store, gate = GatedStore(), Gate()
    store.at_load = gate
    engine = open_engine(store=store, limits={"call_timeout_ms": 0})
    loader = in_thread(lambda: engine.get("s", "k", "nothing"))
    gate.wait_until_reached()
    waiting = [
        in_thread(lambda: engine.set("s", "a", 1)),
        in_thread(lambda: engine.ask(messages.Set("s", "b", 1))),
        in_thread(lambda: asyncio.run(engine.aio.set("s", "c", 1))),  # type: ignore[arg-type]
    ]
    gate.open()

    assert [wait().created for wait in waiting] == [True] * 3
    assert loader() == "nothing"


def test_async_with_closes_the_engine(loop_thread: LoopThread) -> None:
    async def main() -> Engine:
        async with Engine() as engine:
            await engine.aio.set("s", "k", 1)
            return engine

    assert loop_thread.do(main).closed
