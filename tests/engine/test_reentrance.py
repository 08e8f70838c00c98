"""Code that interrupts a thread of the engine, as a finalizer or a signal handler does, and little memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from watching import PATIENCE_S, Gate, Seen, in_thread

from scopestate import Engine, StateEvent
from scopestate.actors.dispatcher import ThreadDispatcher
from scopestate.actors.local import LocalScope
from scopestate.actors.scope import Passivate
from scopestate.actors.stretch import Collected
from scopestate.config import from_mapping
from scopestate.errors import Overloaded, WouldDeadlock
from scopestate.ops import turns
from scopestate.persistence import ScopeChange


class Interrupting(ThreadDispatcher):
    """Runs code on the thread that schedules, before it has scheduled anything: where a finalizer may run."""

    def __init__(self) -> None:
        super().__init__()
        self.interruptions: dict[str, Callable[[], object]] = {}
        """Name of the actor that is being scheduled -> what to run, once."""

    def schedule(self, actor: Any) -> None:
        interrupt = self.interruptions.pop(actor.name, None)
        if interrupt is not None:
            interrupt()
        super().schedule(actor)


def settings(tmp_path: Any = None, durability: str = "interval", **limits: Any) -> Any:
    adapter: dict[str, Any] = {}
    if tmp_path is not None:
        adapter = {"store_method": "file_based", "file_path": str(tmp_path), "durability": durability}
    worker = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": adapter}}}
    return from_mapping({"workers": [worker], "limits": {"call_timeout_ms": 50_000, **limits}})


def test_a_finalizer_that_writes_while_a_scope_is_being_scheduled_does_not_wait_for_itself() -> None:
    dispatcher = Interrupting()
    with Engine(settings(), dispatcher=dispatcher) as engine:
        engine.set("s", "k", 0)
        actor = engine._scopes["s"]
        gate = Gate()
        holder = in_thread(lambda: hold(actor, gate))
        gate.wait_until_reached()
        wrote: list[Any] = []
        # The holder gives the claim back and schedules what waits; there the finalizer runs.
        dispatcher.interruptions["scope 's'"] = lambda: wrote.append(engine.update("s", "k", INCREMENT).new_value)
        waiting = in_thread(lambda: engine.update("s", "k", INCREMENT))
        while not actor._mailbox:
            threading.Event().wait(0.001)
        actor._direct = False  # as behind a `tell`: the finalizer must queue
        began = time.monotonic()
        gate.open()
        holder()
        waiting()

        assert len(wrote) == 1
        assert engine.get("s", "k") == 2
        assert time.monotonic() - began < 40.0


INCREMENT = [{"type": "increment", "path": "", "by": 1}]


def hold(actor: Any, gate: Gate) -> None:
    """Be in a turn of `actor` until the gate opens."""
    original = actor.on_receive

    def held(message: Any) -> Any:
        del actor.on_receive
        gate()
        return original(message)

    actor.on_receive = held
    actor.run(turns.Get("k"))


def test_a_finalizer_that_commits_while_a_commit_is_being_asked_for_does_not_wait_for_itself(tmp_path: Any) -> None:
    dispatcher = Interrupting()
    with Engine(settings(tmp_path, "commit"), dispatcher=dispatcher) as engine:
        engine.set("other", "k", 0)
        engine.set("s", "k", 0)
        refused: list[BaseException] = []

        def finalizer() -> None:
            try:
                engine.set("other", "k", 1)
            except WouldDeadlock as error:  # the commit of the one waits for the turn of the other, which is here
                refused.append(error)

        dispatcher.interruptions["SnapshotActor"] = finalizer
        began = time.monotonic()
        engine.set("s", "k", 1)
        engine.set("other", "k", 2)

        assert len(refused) == 1
        assert time.monotonic() - began < 40.0


def test_a_commit_asked_for_in_the_middle_of_asking_is_asked_for_again(tmp_path: Any) -> None:
    dispatcher = Interrupting()
    with Engine(settings(tmp_path, "commit"), dispatcher=dispatcher) as engine:
        engine.set("s", "k", 0)
        answers: list[Any] = []
        dispatcher.interruptions["SnapshotActor"] = lambda: answers.append(engine.set("s", "k", 1).new_value)
        began = time.monotonic()
        engine._snapshot.commit_anyway()

        assert answers == [1]
        assert time.monotonic() - began < 40.0


def test_code_that_interrupts_the_routers_turn_is_refused_instead_of_waiting_for_room_there() -> None:
    with Engine(settings(handler_mailbox=1)) as engine:
        gate, seen = Gate(), Seen()
        engine.on_change(scope="s")(gate)
        engine.set("s", "k", 0)
        gate.wait_until_reached()
        engine.set("s", "k", 1)
        router = engine._router
        refused: list[BaseException] = []

        def within(message: Any) -> None:
            for call in (lambda: engine.set("s", "k", 2), engine.drain):
                try:
                    call()
                except (Overloaded, WouldDeadlock) as error:
                    refused.append(error)

        router.on_receive = within  # type: ignore[method-assign]
        router.ask("now").get(timeout=PATIENCE_S)
        del router.on_receive
        gate.open()
        del seen

        assert [type(error) for error in refused] == [Overloaded, WouldDeadlock]


def test_a_function_whose_replacement_runs_its_finalizer_may_register_another_there(engine: Engine) -> None:
    class Last:
        def __call__(self, payload: Any) -> None:
            """Does nothing."""

        def __del__(self) -> None:
            engine.register_function("g", lambda payload: "registered by a finalizer")

    engine.register_function("f", Last())
    in_thread(lambda: engine.register_function("f", lambda payload: None))()

    assert engine.call("g") == "registered by a finalizer"


# ----------------------------------------------------------------------------------------------------- little memory


class Short(dict):  # type: ignore[type-arg]
    """A table that has no memory for one more key, `fails` times."""

    fails = 1

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.fails and key not in self:
            self.fails -= 1
            raise MemoryError
        super().__setitem__(key, value)


class ShortList(list):  # type: ignore[type-arg]
    """The same for a list."""

    fails = 1

    def __iadd__(self, more: Any) -> Any:
        if self.fails:
            self.fails -= 1
            raise MemoryError
        return super().__iadd__(more)


@pytest.mark.parametrize("table", ["_values", "_revisions", "_dirty", "_created", "_removed", "_registry", "_outbox"])
@pytest.mark.parametrize("write", ["create", "update", "delete"])
def test_a_write_for_which_memory_does_not_suffice_has_not_happened_at_all(
    write: str, table: str, tmp_path: Any
) -> None:
    seen = Seen()
    with Engine(settings(tmp_path)) as engine:
        engine.on_change(scope="s")(seen)
        engine.set("s", "old", "before")
        engine.set("s", "other", 1)
        engine.flush()
        engine.drain(PATIENCE_S)
        actor = engine._scopes["s"]
        state = (dict(actor._values or {}), actor._sequence)
        original = getattr(actor, table)
        setattr(actor, table, ShortList(original) if isinstance(original, list) else Short(original))
        failed = False
        try:
            act(engine, write)
        except MemoryError:
            failed = True
        if not failed:  # this kind of write adds nothing to that table
            return
        setattr(actor, table, original)

        assert (dict(actor._values or {}), actor._sequence) == state
        act(engine, write)
        engine.drain(PATIENCE_S)
        assert [event.revision for event in seen.events] == [1, 2, 3]
        expected = {key: engine.get("s", key, "absent") for key in ("old", "other", "new")}
    with Engine(settings(tmp_path)) as again:
        assert {key: again.get("s", key, "absent") for key in expected} == expected


def act(engine: Engine, write: str) -> None:
    if write == "create":
        engine.set("s", "new", 5)
    elif write == "update":
        engine.set("s", "old", "after")
    else:
        engine.delete("s", "old")


def test_what_was_collected_without_memory_for_its_rows_is_saved_later(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, fails = Collected.change, [1]

    def change(collected: Collected) -> ScopeChange:
        if fails:
            fails.pop()
            raise MemoryError
        return original(collected)

    monkeypatch.setattr(Collected, "change", change)
    with Engine(settings(tmp_path)) as engine:
        engine.set("s", "old", 1)
        with pytest.raises(MemoryError):
            engine.flush()
        engine.set("s", "new", 2)
        engine.flush()
        actor = engine._scopes["s"]
        assert isinstance(actor, LocalScope)
        assert actor._is_saved()
    with Engine(settings(tmp_path)) as again:
        assert again.list("s") == [1, 2]


def test_an_event_for_which_the_router_has_no_memory_at_first_is_delivered_all_the_same(engine: Engine) -> None:
    seen = Seen()
    engine.on_change(scope="s")(seen)
    [handler] = engine._router.triggers.handlers()
    original, fails = handler.offer, [3]

    def short(event: StateEvent) -> None:
        if fails[0]:
            fails[0] -= 1
            if fails[0] == 1:
                original(event)  # it is queued, and then memory runs out
            raise MemoryError
        original(event)

    handler.offer = short  # type: ignore[method-assign]
    for number in range(3):
        engine.set("s", "k", number)
    engine.drain(PATIENCE_S)

    assert [event.new_value for event in seen.events] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------- tables


async def until(holds: Callable[[], object]) -> None:
    """Let the loop go on until `holds()` is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)


class NoExecutor(ThreadPoolExecutor):
    """Refuses all work: it belongs to the program."""

    def submit(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the engine used the default executor of the event loop")


def test_no_call_for_asyncio_uses_the_default_executor_of_the_loop(tmp_path: Any) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(NoExecutor())
        engine = Engine(settings(tmp_path))
        seen = Seen()
        engine.on_change(scope="s")(seen)
        engine.register_function("f", lambda payload: payload)
        await engine.aio.set("s", "k", 1)
        await engine.aio.drain()
        await engine.aio.drain(timeout=PATIENCE_S)
        await engine.aio.flush()
        assert await engine.aio.list_groups() == ["s"]
        assert await engine.aio.call("f", 5) == 5
        await engine.aio.close()
        assert seen.keys == ["k"]

    asyncio.run(main())


def test_a_drain_that_is_cancelled_leaves_nothing_behind(engine: Engine) -> None:
    gate = Gate()
    engine.on_change(scope="s")(gate)
    engine.set("s", "k", 1)
    gate.wait_until_reached()

    async def main() -> None:
        for _ in range(10):
            drain = asyncio.create_task(engine.aio.drain())
            await until(lambda: engine.stats().mailboxes.handlers)
            drain.cancel()
            with pytest.raises(asyncio.CancelledError):
                await drain

    asyncio.run(main())
    assert engine.stats().mailboxes.handlers == 0
    gate.open()


def test_writers_that_gave_up_waiting_for_room_leave_nothing_behind() -> None:
    with Engine(settings(handler_mailbox=1)) as engine:
        gate = Gate()
        engine.on_change(scope="s")(gate)
        engine.set("s", "k", 0)
        gate.wait_until_reached()
        engine.set("s", "k", 1)

        async def main() -> None:
            writers = [asyncio.create_task(engine.aio.set("s", "k", number)) for number in range(50)]
            await until(lambda: len(engine._router.backlog._writers) == 50)
            for writer in writers:
                writer.cancel()
            await asyncio.gather(*writers, return_exceptions=True)

        asyncio.run(main())
        assert len(engine._router.backlog._writers) == 0
        gate.open()


def test_threads_that_make_room_at_the_same_time_tell_each_writer_once(engine: Engine) -> None:
    backlog = engine._router.backlog
    told: list[int] = []
    for round_ in range(50):
        callbacks = [lambda number=number: told.append(number) for number in range(20)]
        for callback in callbacks:
            backlog.when_room(callback)
        barrier = threading.Barrier(4)

        def make_room(barrier: threading.Barrier = barrier) -> None:
            barrier.wait(PATIENCE_S)
            backlog.made_room()

        results = [in_thread(make_room) for _ in range(4)]
        for result in results:
            result()
        assert sorted(told) == sorted(list(range(20)) * (round_ + 1))
    assert len(backlog._writers) == 0


def test_triggers_that_are_gone_leave_no_table_behind(engine: Engine) -> None:
    before = len(engine._router.triggers._by_scope)
    for number in range(300):
        handle = engine.register_trigger(function_id="f", scope=f"never touched {number}", key="k")
        handle.unregister()
    engine.set("touched", "k", 1)
    engine.register_trigger(function_id="f", scope="touched").unregister()

    assert len(engine._router.triggers._by_scope) == before + 1
    assert engine.triggers() == []
    assert len(engine._router.triggers._retiring) <= 64
    engine.register_trigger(function_id="f", scope="touched", trigger_id="again")
    assert [handle.trigger_id for handle in engine.triggers()] == ["again"]


def test_ids_made_for_functions_are_free_and_cost_the_same_however_many_there_are(engine: Engine) -> None:
    def same(event: StateEvent) -> None:
        """One name for all."""

    first = engine.on_change(scope="s")
    for _ in range(2000):
        engine.on_change(scope="s")(same)
    del first
    ids = [entry["name"] for entry in engine.functions() if "same" in entry["name"]]
    assert len(ids) == len(set(ids)) == 2000
    for function_id in ids[1:]:
        engine.unregister_function(function_id)
    assert engine._functions._numbered == {}
    engine.on_change(scope="s")(same)
    assert engine.functions()[-1]["name"] == f"{ids[0]}#2"


@pytest.mark.parametrize("durability", [None, "memory"])
def test_an_emptied_scope_that_is_not_kept_leaves_memory_and_its_numbers_go_on(
    durability: str | None, open_engine: Any, tmp_path: Any
) -> None:
    if durability is None:
        engine = open_engine()
    else:
        engine = open_engine(
            adapter={"store_method": "file_based", "file_path": str(tmp_path)},
            scopes=[{"prefix": "", "durability": durability}],
        )
    seen = Seen()
    engine.on_change(scope="s")(seen)
    engine.set("s", "k", 1)
    assert engine._scopes["s"].housekeep(Passivate()) is False, "it holds a key"
    engine.delete("s", "k")
    actor = engine._scopes["s"]
    assert actor.housekeep(Passivate()) is True
    assert "s" not in engine._scopes
    engine.set("s", "k", 2)
    engine.drain(PATIENCE_S)

    numbers = [event.revision for event in seen.events]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 3
