"""What an engine tells about itself: figures that add up, and problems in words."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from watching import PATIENCE_S, Gate, GatedStore, Seen, broken, in_thread

from scopestate import Engine, StateEvent, StorageError, messages, ops
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.config import from_mapping
from scopestate.errors import DeserializationError, ScopestateError
from scopestate.ops.functions import BUILT_IN


def wait_until(condition: Callable[[], bool]) -> None:
    until, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not condition():
        assert time.monotonic() < until
        pause.wait(0.01)


def test_a_new_engine_has_done_nothing_and_is_well(engine: Engine) -> None:
    stats, health = engine.stats(), engine.health()

    names = {entry["name"] for entry in engine.functions()}
    assert set(stats.calls) == {name for name in names if name.startswith("state::")}
    assert set(stats.calls.values()) == {0}
    assert (stats.events, stats.deliveries, stats.failures, stats.dropped) == (0, 0, 0, 0)
    assert (stats.scopes, stats.keys, stats.saves, stats.threads) == (0, 0, 0, 0)
    assert (health.ok, health.problems, health.unsaved_scopes) == (True, (), 0)


def test_calls_are_counted_whichever_way_they_are_made(engine: Engine) -> None:
    async def main() -> None:
        await engine.aio.set("s", "k", 1)
        await engine.aio.get("s", "k")
        await engine.aio.delete("s", "k")
        await engine.aio.update("s", "k", [])
        await engine.aio.list("s")
        await engine.aio.list_groups()
        await engine.aio.ask(messages.Set("s", "k", 1))
        await engine.aio.call("state::get", {"scope": "s", "key": "k"})

    engine.set("s", "k", 1)
    engine.get("s", "k")
    engine.delete("s", "k")
    engine.update("s", "k", [])
    engine.list("s")
    engine.list_groups()
    engine.call("state::set", {"scope": "s", "key": "k", "value": 1})
    engine.ask(messages.Get("s", "k"))
    engine.tell(messages.Delete("s", "k"))
    engine.scope("s").update("k", [])
    asyncio.run(main())

    assert engine.stats().calls == dict.fromkeys([*BUILT_IN, "state::changes", "state::flush"], 0) | {
        "state::set": 4,
        "state::get": 4,
        "state::delete": 3,
        "state::update": 3,
        "state::list": 2,
        "state::list_groups": 2,
    }


def test_no_call_is_lost_from_the_count_when_threads_make_them(engine: Engine) -> None:
    def work() -> None:
        for number in range(500):
            engine.set("s", "k", number)

    for wait in [in_thread(work) for _ in range(8)]:
        wait()

    assert engine.stats().calls["state::set"] == 4000


def test_what_is_no_call_at_all_is_not_counted(engine: Engine) -> None:
    for bad in ({"scope": "s"}, None):
        with pytest.raises(DeserializationError):
            engine.call("state::set", bad)
    with pytest.raises(ScopestateError):
        engine.set("s", "k", object())

    assert engine.stats().calls["state::set"] == 0


def test_sizes_are_those_of_now(engine: Engine) -> None:
    for scope in ("a", "b"):
        for key in ("x", "y", "z"):
            engine.set(scope, key, 1)
    engine.delete("a", "x")

    assert (engine.stats().scopes, engine.stats().keys) == (2, 5)


def test_events_and_what_became_of_them_add_up(open_engine: Any) -> None:
    engine = open_engine(limits={"handler_attempts": 2, "handler_backoff_ms": 1})

    def handler(event: StateEvent) -> None:
        if event.new_value == "fail":
            raise ValueError

    engine.on_change(scope="s", condition=lambda event: event.new_value != "skip")(handler)
    for number, value in enumerate(["good", "skip", "fail", "good", "fail"]):
        engine.set("s", str(number), value)
    engine.set("nobody listens", "k", 1)
    engine.drain(timeout=PATIENCE_S)

    stats = engine.stats()
    assert (stats.events, stats.deliveries, stats.skipped, stats.failures, stats.retries) == (5, 2, 1, 2, 2)
    assert stats.events == stats.deliveries + stats.skipped + stats.failures + stats.dropped


def test_mailboxes_show_what_waits(open_engine: Any) -> None:
    store, load, handle = GatedStore(), Gate(), Gate()
    engine = open_engine(store=store)
    engine.on_change(scope="s")(handle)
    for number in range(4):
        engine.set("s", str(number), number)
    handle.wait_until_reached()
    store.at_load = load
    replies = [engine.ask(messages.Get("slow", "k"), block=False)]
    load.wait_until_reached()
    replies += [engine.ask(messages.Get("slow", "k"), block=False) for _ in range(2)]

    boxes = engine.stats().mailboxes
    assert (boxes.scopes, boxes.deepest_scope) == (2, 2)
    assert boxes.router + boxes.handlers == 3
    assert engine.stats().threads >= 2
    load.open()
    handle.open()
    for reply in replies:
        reply.get(timeout=PATIENCE_S)
    engine.drain(timeout=PATIENCE_S)
    assert engine.stats().mailboxes.handlers == 0


def test_saves_are_counted_and_timed(open_engine: Any) -> None:
    engine = open_engine(store=GatedStore())
    for scope in ("a", "b"):
        for key in ("x", "y"):
            engine.set(scope, key, 1)
    assert engine.stats().unsaved_scopes == engine.health().unsaved_scopes == 2

    engine.flush()

    stats = engine.stats()
    assert (stats.saves, stats.saved_keys, stats.failed_saves, stats.unsaved_scopes) == (1, 4, 0, 0)
    assert engine.health().last_save_ms > 0
    engine.flush()
    assert engine.stats().saves == 1


def test_a_store_that_fails_shows_in_health_until_it_works_again(open_engine: Any) -> None:
    store = GatedStore()
    engine = open_engine(store=store)
    engine.set("s", "k", 1)
    store.at_save = broken

    with pytest.raises(StorageError, match="on fire"):
        engine.flush()

    health = engine.health()
    assert not health.ok
    assert health.unsaved_scopes == 1
    assert any("saving fails" in problem and "on fire" in problem for problem in health.problems)
    assert engine.stats().failed_saves == 1
    assert engine.set("s", "k", 2).old_value == 1

    store.at_save = lambda: None
    engine.flush()
    assert engine.health().ok
    assert store.values("s") == {"k": b"2"}


def test_figures_can_be_written_as_json(engine: Engine) -> None:
    engine.update("s", "k", [ops.Increment("n", 1)])

    for figures in (engine.stats(), engine.health()):
        json.dumps(msgspec.to_builtins(figures))


def test_looking_stops_nobody(engine: Engine) -> None:
    seen, stop = Seen(), []
    engine.on_change()(seen)

    def look() -> None:
        while not stop:
            engine.stats()
            engine.health()

    looking = in_thread(look)
    for number in range(300):
        engine.set(f"s{number}", "k", number)
        engine.register_trigger(function_id="h", scope=str(number)).unregister()
    engine.drain(timeout=PATIENCE_S)
    stop.append(True)
    looking()

    assert engine.stats().deliveries == 300


def test_health_stays_bad_after_a_failed_commit_until_something_is_saved_again(
    open_engine: Any, tmp_path: Path
) -> None:
    engine = open_engine(
        adapter={"store_method": "file_based", "file_path": str(tmp_path / "store"), "durability": "commit"}
    )
    adapter = engine._parts.backend.store
    save = adapter.save

    def refuse(batch: Any) -> None:
        raise StorageError("the disk is gone")

    adapter.save = refuse
    with pytest.raises(StorageError, match="the disk is gone"):
        engine.set("s", "k", 1)
    engine.flush()  # nothing is left to save, which proves nothing

    assert not engine.health().ok
    assert "the disk is gone" in engine.health().problems[0]

    adapter.save = save
    engine.set("s", "k", 2)

    assert engine.health().ok


@pytest.fixture
def clock() -> DeterministicDispatcher:
    """Threads and a clock that only the test moves."""
    return DeterministicDispatcher(1, switch=0.0, busy=0.0)


SAVED_EVERY_5_S = from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": {
    "store_method": "file_based", "save_interval_ms": 5000}}}}]})  # fmt: skip


def test_health_says_that_a_save_hangs_two_intervals_after_it_was_due_and_no_sooner(
    clock: DeterministicDispatcher,
) -> None:
    store = GatedStore()
    with Engine(SAVED_EVERY_5_S, adapter=store, dispatcher=clock) as engine:
        engine.set("s", "k", 1)
        store.at_save = lambda: clock.sleep(100.0)
        clock.advance(15.0)

        assert engine.health().ok

        clock.advance(1.0)
        (problem,) = engine.health().problems

        assert "the save that was due 11.0 s ago has not ended" in problem

        store.at_save = lambda: None
        clock.advance(100.0)

        assert engine.health().ok


def test_health_says_that_no_save_begins_any_more(clock: DeterministicDispatcher) -> None:
    with Engine(SAVED_EVERY_5_S, adapter=GatedStore(), dispatcher=clock) as engine:
        clock.advance(1000.0)

        assert engine.health().ok

        timer = engine._parts.snapshot._timer
        assert timer is not None
        timer.cancel()
        engine.set("s", "k", 1)
        clock.advance(16.0)

        assert "has not ended" in engine.health().problems[0]

        engine.flush()  # this saves, but nothing will save what comes after it

        assert not engine.health().ok


def test_a_shorter_interval_makes_no_save_overdue_at_once(clock: DeterministicDispatcher) -> None:
    with Engine(SAVED_EVERY_5_S, adapter=GatedStore(), dispatcher=clock) as engine:
        clock.advance(4.9)
        engine._parts.snapshot.set_interval(0.1)

        assert engine.health().ok

        clock.advance(1.0)

        assert engine.health().ok


def test_an_engine_that_keeps_nothing_has_no_overdue_save(clock: DeterministicDispatcher) -> None:
    with Engine(dispatcher=clock) as engine:
        engine.set("s", "k", 1)
        clock.advance(1000.0)

        assert engine.health().ok


def test_health_says_that_a_save_hangs_while_it_does(open_engine: Any, tmp_path: Path) -> None:
    engine = open_engine(
        adapter={"store_method": "file_based", "file_path": str(tmp_path / "store"), "save_interval_ms": 50}
    )
    gate = Gate()
    engine._parts.backend.store.save = gate  # a disk that hangs
    try:
        engine.set("s", "k", 1)
        gate.wait_until_reached()
        wait_until(lambda: not engine.health().ok)

        assert "has not ended" in engine.health().problems[0]
    finally:
        gate.open()
    wait_until(lambda: engine.health().ok)


def test_scopes_that_a_rule_moved_to_memory_are_no_groups_of_the_store(open_engine: Any, tmp_path: Path) -> None:
    store = {"store_method": "file_based", "file_path": str(tmp_path / "store")}
    with open_engine(adapter=store) as engine:
        engine.set("sessions", "k", 1)
        engine.set("orders", "k", 1)

    engine = open_engine(adapter=store, scopes=[{"name": "sessions", "durability": "memory"}])

    assert engine.list_groups() == ["orders"]
    assert engine.get("sessions", "k") is None
