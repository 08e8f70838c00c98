"""How an engine ends: callers are refused, events delivered or reported, everything acknowledged saved."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path
from typing import Any

import pytest
from watching import PATIENCE_S, Failures, Gate, GatedStore, LoopThread, Seen, broken, in_thread

from scopestate import DeliveryFailure, Engine, StateEvent, StorageError, lifecycle, messages
from scopestate.errors import EngineClosed, EventNotDelivered
from scopestate.ops.functions import BUILT_IN_IDS
from scopestate.persistence.sqlite.reading import StoreReader

CALLS: dict[str, Callable[[Engine], Any]] = {
    "set": lambda engine: engine.set("s", "k", 1),
    "set, new scope": lambda engine: engine.set("new", "k", 1),
    "get": lambda engine: engine.get("s", "k"),
    "delete": lambda engine: engine.delete("s", "k"),
    "update": lambda engine: engine.update("s", "k", []),
    "list": lambda engine: engine.list("s"),
    "list_groups": lambda engine: engine.list_groups(),
    "call": lambda engine: engine.call("state::get", {"scope": "s", "key": "k"}),
    "call list_groups": lambda engine: engine.call("state::list_groups", {}),
    "ask": lambda engine: engine.ask(messages.Get("s", "k")),
    "ask, block=False": lambda engine: engine.ask(messages.Get("s", "k"), block=False).get(timeout=PATIENCE_S),
    "ask list_groups": lambda engine: engine.ask(messages.ListGroups()),
    "tell": lambda engine: engine.tell(messages.Set("s", "k", 2)),
    "tell, new scope": lambda engine: engine.tell(messages.Set("new", "k", 2)),
    "call of a registered function": lambda engine: engine.call("app::f"),
    "aio.call of a registered function": lambda engine: asyncio.run(engine.aio.call("app::f")),
    "ref": lambda engine: engine.scope("s").actor_ref.ask(messages.Get("s", "k")),
    "handle": lambda engine: engine.scope("s").get("k"),
    "flush": lambda engine: engine.flush(),
    "aio.set": lambda engine: asyncio.run(engine.aio.set("s", "k", 1)),
    "aio.set, new scope": lambda engine: asyncio.run(engine.aio.set("new", "k", 1)),
    "aio.get": lambda engine: asyncio.run(engine.aio.get("s", "k")),
    "aio.delete": lambda engine: asyncio.run(engine.aio.delete("s", "k")),
    "aio.update": lambda engine: asyncio.run(engine.aio.update("s", "k", [])),
    "aio.list": lambda engine: asyncio.run(engine.aio.list("s")),
    "aio.list_groups": lambda engine: asyncio.run(engine.aio.list_groups()),
    "aio.call": lambda engine: asyncio.run(engine.aio.call("state::get", {"scope": "s", "key": "k"})),
    "drain": lambda engine: engine.drain(),
    "aio.drain": lambda engine: asyncio.run(engine.aio.drain()),
    "aio.flush": lambda engine: asyncio.run(engine.aio.flush()),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_closed_engine_refuses_every_call(call: Callable[[Engine], Any], open_store: Any) -> None:
    engine = open_store()
    engine.on_change()(Seen())
    engine.register_function("app::f", print)
    engine.set("s", "k", 1)
    engine.close()

    with pytest.raises(EngineClosed) as refused:
        call(engine)

    assert refused.value.code == "ENGINE_CLOSED"
    assert engine.closed


def test_what_only_looks_still_works_on_a_closed_engine(engine: Engine) -> None:
    engine.on_change()(Seen())
    engine.set("s", "k", 1)
    engine.close()
    engine.close()

    assert engine.stats().calls["state::set"] == 1
    assert engine.health().problems == ("the engine is closed",)
    assert len(engine.functions()) == len(BUILT_IN_IDS) + 1
    assert len(engine.triggers()) == 1


def test_with_closes(tmp_path: Any) -> None:
    with Engine() as engine:
        engine.set("s", "k", 1)

    async def main() -> Engine:
        async with Engine() as other:
            await other.aio.set("s", "k", 1)
        async with Engine().aio as calls:
            await calls.set("s", "k", 1)
        with pytest.raises(EngineClosed):
            await calls.set("s", "k", 1)
        return other

    assert engine.closed
    assert asyncio.run(main()).closed


def test_two_engines_in_one_process_know_nothing_of_each_other(open_engine: Any) -> None:
    one, other = open_engine(), open_engine()
    seen = Seen()
    other.on_change()(seen)
    one.set("s", "k", 1)
    one.close()
    other.set("s", "k", 2)

    assert other.get("s", "k") == 2
    assert [event.new_value for event in seen.wait_for(1)] == [2]


# ---------------------------------------------------------------------------------------------------------- the events


def test_close_delivers_the_events_that_wait(engine: Engine) -> None:
    gate, seen = Gate(), Seen()
    engine.on_change()(lambda event: (gate(), seen(event)))
    for number in range(100):
        engine.set("s", str(number), number)
    gate.wait_until_reached()

    closed = in_thread(engine.close)
    gate.open()
    closed()

    assert len(seen.events) == 100
    assert engine.stats().dropped == 0


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_handlers_may_write_while_the_engine_closes_and_it_is_saved(kind: str, open_file_store: Any) -> None:
    engine = open_file_store()
    gate = Gate()

    def plain(event: StateEvent) -> None:
        gate()
        engine.set("derived", event.key, event.new_value)
        engine.set("new scope", event.key, engine.get("source", event.key))

    async def coroutine(event: StateEvent) -> None:
        await asyncio.to_thread(gate)
        await engine.aio.set("derived", event.key, event.new_value)
        await engine.aio.set("new scope", event.key, await engine.aio.get("source", event.key))

    engine.on_change(scope="source")(plain if kind == "plain" else coroutine)
    for number in range(3):
        engine.set("source", str(number), number)
    gate.wait_until_reached()
    closed = in_thread(engine.close)
    gate.open()
    closed()

    reopened = open_file_store()
    assert reopened.list("derived") == [0, 1, 2]
    assert reopened.list("new scope") == [0, 1, 2]


def test_callers_are_refused_while_handlers_still_finish(engine: Engine) -> None:
    gate = Gate()
    engine.set("s", "k", 1)
    engine.on_change()(gate)
    engine.set("s", "k", 2)
    gate.wait_until_reached()
    begun = threading.Event()
    refuse = engine._scopes.refuse
    engine._scopes.refuse = lambda *args, **options: (refuse(*args, **options), begun.set())  # type: ignore[method-assign]

    closed = in_thread(engine.close)
    assert begun.wait(PATIENCE_S)
    with pytest.raises(EngineClosed):
        engine.set("new", "k", 1)
    gate.open()
    closed()


def test_events_that_outlast_the_grace_are_reported_one_by_one(
    open_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scopestate.closing.HOOKS_S", PATIENCE_S)
    dead, gate = Failures(), Gate()
    refused: list[BaseException] = []
    ended = threading.Event()
    engine = open_engine(on_dead_letter=dead, limits={"close_grace_ms": 50})

    def handler(event: StateEvent) -> None:
        gate()
        try:
            engine.set("late", "k", 1)
        except EngineClosed as error:
            refused.append(error)
        ended.set()

    engine.on_change(function_id="app::hung")(handler)
    for number in range(4):
        engine.set("s", str(number), number)
    gate.wait_until_reached()

    engine.close()

    assert engine.closed
    assert [failure.event.key for failure in dead.all] == ["1", "2", "3", "0"]
    assert all(isinstance(failure.error, EventNotDelivered) for failure in dead.all)
    assert all("closed before its turn came" in str(failure.error) for failure in dead.all[:3])
    assert "still being handled" in str(dead.all[3].error)
    assert engine.stats().dropped == 3
    gate.open()
    assert ended.wait(PATIENCE_S)
    assert len(refused) == 1


@pytest.mark.parametrize("kind", ["plain", "coroutine", "coroutine, aio"])
def test_closing_from_a_handler_returns_at_once_and_happens_when_it_has_ended(kind: str, engine: Engine) -> None:
    after: list[bool] = []
    ended = threading.Event()

    def plain(event: StateEvent) -> None:
        engine.close()
        engine.set("s", "last words", 1)  # still served
        after.append(True)
        ended.set()

    async def coroutine(event: StateEvent) -> None:
        plain(event)

    async def through_aio(event: StateEvent) -> None:
        await engine.aio.close()
        await engine.aio.set("t", "last words", 1)
        after.append(True)
        ended.set()

    engine.on_change(scope="s", key="k")({"plain": plain, "coroutine": coroutine}.get(kind, through_aio))
    engine.set("s", "k", 1)

    assert ended.wait(PATIENCE_S)
    engine.close()  # waits for the other one
    assert engine.closed
    assert after == [True]
    assert engine.stats().failures == 0


def test_aio_close_lets_handlers_on_the_same_loop_go_on(engine: Engine) -> None:
    seen = Seen()

    async def main() -> None:
        async def handler(event: StateEvent) -> None:
            await asyncio.sleep(0)
            seen(event)

        engine.on_change()(handler)
        for number in range(10):
            await engine.aio.set("s", str(number), number)
        await engine.aio.close()

    asyncio.run(main())

    assert len(seen.events) == 10


def test_several_threads_may_close_at_once(engine: Engine) -> None:
    start = threading.Barrier(8)

    def close() -> bool:
        start.wait(PATIENCE_S)
        engine.close()
        return engine.health().ok

    assert [wait() for wait in [in_thread(close) for _ in range(8)]] == [False] * 8


def test_a_coroutine_handler_that_hangs_on_the_engines_own_loop_is_cancelled_in_the_end(open_engine: Any) -> None:
    cancelled, reached = threading.Event(), threading.Event()
    engine = open_engine(limits={"close_grace_ms": 20})

    async def hang(event: StateEvent) -> None:
        reached.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    engine.on_change()(hang)
    engine.set("s", "k", 1)
    assert reached.wait(PATIENCE_S)

    engine.close()

    assert cancelled.wait(PATIENCE_S)


# ------------------------------------------------------------------------------------------------------------ the data


def test_closing_while_16_threads_write_keeps_every_acknowledged_write(open_file_store: Any) -> None:
    engine = open_file_store()
    started = threading.Barrier(17)

    def write(name: str) -> int:
        started.wait(PATIENCE_S)
        acknowledged = 0
        try:
            while True:
                engine.set(name, "k", acknowledged + 1)
                acknowledged += 1
        except EngineClosed:
            return acknowledged

    results = {f"scope {number % 8}/{number}": None for number in range(16)}
    waits = {name: in_thread(lambda name=name: write(name)) for name in results}
    started.wait(PATIENCE_S)
    engine.close()
    acknowledged = {name: wait() for name, wait in waits.items()}

    reopened = open_file_store()
    assert {name: reopened.get(name, "k", 0) for name in results} == acknowledged


def test_a_last_save_that_fails_keeps_everything_and_can_be_tried_again(open_engine: Any) -> None:
    store = GatedStore()
    engine = open_engine(store=store)
    engine.set("s", "k", 1)
    store.at_save = broken

    with pytest.raises(StorageError, match=r"the disk is on fire.*close\(\) again"):
        engine.close()

    assert engine.closed
    assert not store.closed
    with pytest.raises(EngineClosed):
        engine.set("s", "k", 2)
    assert any("saving fails" in problem for problem in engine.health().problems)

    store.at_save = lambda: None
    engine.close()

    assert store.values("s") == {"k": b"1"}
    assert store.closed
    assert engine.health().unsaved_scopes == 0


def test_tasks_on_another_loop_are_answered_by_a_closing_engine(engine: Engine, loop_thread: LoopThread) -> None:
    async def write() -> int:
        count = 0
        try:
            while True:
                await engine.aio.set("s", "k", count)
                count += 1
                await asyncio.sleep(0)
        except EngineClosed:
            return count

    tasks = loop_thread.do(lambda: [asyncio.ensure_future(write()) for _ in range(10)])
    engine.close()

    async def results() -> list[int]:
        return [await task for task in tasks]

    assert len(loop_thread.do(results)) == 10


def test_many_events_that_outlast_the_grace_are_one_line_in_the_log(
    open_engine: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scopestate.closing.HOOKS_S", PATIENCE_S)
    dead, gate = Failures(), Gate()
    engine = open_engine(on_dead_letter=dead, limits={"close_grace_ms": 20, "handler_mailbox": 100_000})
    for name in ("first", "second"):
        engine.on_change(function_id=f"app::{name}")(lambda event: gate())
    for number in range(5_000):
        engine.set("s", "k", number)
    gate.wait_until_reached()

    engine.close()
    gate.open()

    assert len(dead.all) == 10_000
    lines = [record.getMessage() for record in caplog.records if "app::first" in record.getMessage()]
    about_all = [line for line in lines if "before" in line]
    assert len(about_all) == 1
    assert "before 9998 events were delivered and while 2 were being handled" in about_all[0]
    assert "app::second" in about_all[0]
    assert len(caplog.records) <= 3


def test_a_hook_that_hangs_does_not_keep_close_from_ending(
    open_engine: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scopestate.closing.HOOKS_S", 1.0)
    gate, hung, over = Gate(), threading.Event(), threading.Event()

    def hang(failure: DeliveryFailure) -> None:
        hung.set()
        over.wait(PATIENCE_S)

    engine = open_engine(on_dead_letter=hang, limits={"close_grace_ms": 20})
    engine.on_change()(lambda event: gate())
    engine.set("s", "k", 1)
    gate.wait_until_reached()

    engine.close()

    assert hung.wait(PATIENCE_S)
    assert "did not end in 1 s" in caplog.text
    over.set()
    gate.open()


def test_close_saves_before_it_waits_for_handlers(open_engine: Any, tmp_path: Path) -> None:
    gate = Gate()
    config = {"store_method": "file_based", "file_path": str(tmp_path / "store"), "save_interval_ms": 3_600_000}
    engine = open_engine(adapter=config, limits={"close_grace_ms": 600_000})

    def derive(event: StateEvent) -> None:
        gate()
        engine.set("derived", "k", event.new_value)

    engine.on_change(scope="s")(derive)
    engine.set("s", "k", 1)
    gate.wait_until_reached()

    ending = in_thread(engine.close)
    until_saved(tmp_path / "store", ["s"])
    gate.open()
    ending()

    until_saved(tmp_path / "store", ["derived", "s"])


def until_saved(directory: Path, scopes: list[str]) -> None:
    """Wait until these are the scopes on disk, which no event announces."""
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while True:
        with StoreReader(directory) as reader:
            found = reader.scopes()
        if found == scopes:
            return
        assert time.monotonic() < deadline, found
        pause.wait(0.005)


def test_engines_that_were_opened_and_closed_leave_nothing_in_the_tables_for_the_end_of_the_process(
    open_engine: Any, tmp_path: Path
) -> None:
    def sizes() -> list[int]:
        tables: list[Any] = [util._finalizer_registry, lifecycle._stores, lifecycle._live, lifecycle._dropped]  # type: ignore[attr-defined]  # it is private, and the only place to look
        return [len(table) for table in tables]

    store = {"store_method": "file_based", "file_path": str(tmp_path)}
    open_engine(adapter=store).close()
    before = sizes()
    for _ in range(3):
        engine = open_engine(adapter=store)
        assert sizes() == [before[0], before[1] + 1, before[2] + 1, before[3]]
        engine.set("s", "k", 1)
        engine.close()
        assert sizes() == before
