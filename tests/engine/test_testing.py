"""Engines on a clock that the test moves, and their crash."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scopestate import Delivery, Engine, Retry, StateEvent
from scopestate.errors import ConfigError, EngineClosed, Unsupported
from scopestate.testing import VirtualClock


def files(directory: Path, **more: Any) -> dict[str, Any]:
    kv = {"store_method": "file_based", "file_path": str(directory), "save_interval_ms": 1000, **more}
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]}


def test_what_falls_due_runs_at_its_own_time() -> None:
    clock = VirtualClock(datetime(2030, 1, 1, tzinfo=UTC))
    engine = clock.open()
    seen: list[tuple[str, timedelta]] = []

    def again(event: StateEvent) -> None:
        seen.append((event.key, clock.now - datetime(2030, 1, 1, tzinfo=UTC)))
        if event.key == "first":
            engine.set("s", "second", 1, ttl=10)

    engine.register_function("again", again)
    engine.register_trigger(function_id="again", events=["expired"])
    engine.set("s", "first", 1, ttl=10)
    engine.set("s", "late", 1, ttl=61)
    clock.advance(60)
    assert seen == [("first", timedelta(seconds=10)), ("second", timedelta(seconds=20))]
    assert clock.now == datetime(2030, 1, 1, 0, 1, tzinfo=UTC)
    clock.advance(1)
    assert seen[-1] == ("late", timedelta(seconds=61))
    clock.close()


def test_retries_wait_for_the_clock_and_errors_come_out_of_it() -> None:
    clock = VirtualClock()
    engine = clock.open({"limits": {"handler_attempts": 3}})
    tries: list[datetime] = []

    def fail(event: StateEvent) -> None:
        tries.append(clock.now)
        raise ValueError(event.key)

    engine.register_function("fail", fail)
    engine.register_trigger(function_id="fail", scope="s")
    engine.set("s", "a", 1)
    assert tries == []
    with pytest.raises(ExceptionGroup, match="1 event was not handled:") as caught:
        clock.advance(3600)
    assert [str(error) for error in caught.value.exceptions] == ["a"]
    assert len(tries) == 3
    assert len(clock.failures) == 1
    clock.failures.clear()
    clock.close()


def test_time_does_not_go_back_and_is_kept_by_engines_here() -> None:
    with VirtualClock() as clock, VirtualClock() as other:
        with pytest.raises(ValueError, match="0 or more"):
            clock.advance(-1)
        with pytest.raises(Unsupported, match="real clock"):
            clock.open({"workers": [{"name": "iii-state", "config": {"adapter": {"name": "redis"}}}]})
        with pytest.raises(ValueError, match="this clock has opened"):
            clock.crash(other.open())


def test_a_crashed_engine_refuses_and_writes_nothing(tmp_path: Path) -> None:
    clock = VirtualClock()
    engine = clock.open(files(tmp_path))
    scope, handled = engine.scope("s"), list[str]()
    engine.register_function("handle", lambda event: handled.append(event.key))
    engine.register_trigger(function_id="handle")
    engine.set("s", "saved", 1)
    clock.advance(2)
    engine.set("s", "lost", 1)
    again = clock.crash(engine)
    for call in (lambda: engine.get("s", "saved"), lambda: scope.set("x", 1), lambda: scope.get("saved"), engine.flush):
        with pytest.raises(EngineClosed):
            call()
    engine.close()
    clock.advance(60)
    assert handled == ["saved"]
    assert again.scope("s").keys() == ["saved"]
    assert again.set("s", "lost", 2).created
    clock.close()


CHILD = """
import json, os, signal, sys
from scopestate.testing import VirtualClock
clocks = []
for config, steps in json.load(sys.stdin):
    clocks.append(clock := VirtualClock())
    engine = clock.open(config)
    for what, key in steps:
        if what == "set": engine.set("s", key, what)
        elif what == "delete": engine.delete("s", key)
        elif what == "advance": clock.advance(1)
        else: engine.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def _after_crash(config: dict[str, Any], steps: list[tuple[str, str]]) -> list[Any]:
    clock = VirtualClock()
    engine = clock.open(config)
    for what, key in steps:
        match what:
            case "set":
                engine.set("s", key, what)
            case "delete":
                engine.delete("s", key)
            case "advance":
                clock.advance(1)
            case _:
                engine.flush()
    entries = list(clock.crash(engine).scope("s").entries())
    clock.close()
    return entries


def test_a_crash_leaves_what_sigkill_leaves(tmp_path: Path) -> None:
    chosen, cases = random.Random(62), []
    for number in range(10):
        kinds = ["set", "set", "delete", "advance", "flush"]
        steps = [(chosen.choice(kinds), chosen.choice("abc")) for _ in range(chosen.randrange(12))]
        cases.append((("interval", "commit")[number % 2], steps))
    theirs = [(files(tmp_path / f"other{n}", durability=kept), steps) for n, (kept, steps) in enumerate(cases)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(theirs),
        text=True,
        env=dict(os.environ),
        timeout=100,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    for number, (durability, steps) in enumerate(cases):
        with VirtualClock() as clock:
            killed = list(clock.open(theirs[number][0]).scope("s").entries())
        mine = files(tmp_path / f"mine{number}", durability=durability)
        assert _after_crash(mine, steps) == killed, (durability, steps)


def test_what_cannot_be_opened_leaves_the_files_to_the_next(tmp_path: Path) -> None:
    with VirtualClock() as clock:
        with pytest.raises(ConfigError, match="durable"):
            clock.open({"triggers": [{"function_id": "ship", "durable": "ship"}]})
        with pytest.raises(ConfigError, match="state::set"):
            clock.open({**files(tmp_path), "functions": {"state::set": "json:dumps"}})
        assert clock.open(files(tmp_path)).set("s", "a", 1).created


def test_many_failures_are_counted_and_the_first_are_named() -> None:
    with VirtualClock() as clock:
        engine = clock.open()
        engine.register_function("fail", lambda event: event.no_such_attribute)
        engine.register_trigger(function_id="fail")
        for number in range(12):
            engine.set("s", str(number), 1)
        with pytest.raises(ExceptionGroup, match=r"12 events were not handled:(?s:.*)and 2 more"):
            clock.run()
        assert len(clock.failures) == 12


def test_durable_events_that_were_not_handled_come_again(tmp_path: Path) -> None:
    with VirtualClock() as clock:
        engine = clock.open(files(tmp_path, durability="commit"))
        seen: list[tuple[str, str]] = []

        def listen(to: Any, name: str) -> None:
            to.register_function("ship", lambda event: seen.append((name, event.key)))
            to.register_trigger(function_id="ship", durable="ship", scope="orders")

        listen(engine, "old")
        engine.set("orders", "one", 1)
        clock.advance(5)
        engine.set("orders", "two", 1)
        again = clock.crash(engine)
        listen(again, "new")
        clock.advance(60)
        assert seen == [("old", "one"), ("new", "two")]


def test_examples_of_events() -> None:
    event = StateEvent.example(scope="users", key="ada", new_value={"name": "Ada"})
    assert (event.event_type, event.scope, event.key, event.old_value) == ("state:created", "users", "ada", None)
    assert event == StateEvent.example(scope="users", key="ada", new_value={"name": "Ada"})
    assert event != StateEvent.example(scope="users", key="ada", new_value={"name": "Bob"})
    assert StateEvent.example().new_value == {}
    assert StateEvent.example(old_value=1, new_value=None).event_type == "state:updated"
    assert StateEvent.example(old_value=1).event_type == "state:deleted"
    expired = StateEvent.example("state:expired", old_value=1)
    assert (expired.expired_at, expired["late_ms"], expired.new_value) == (expired.time_ms, 0, None)


def _pass_on(to: Engine, event: StateEvent) -> None:
    if event.new_value:
        to.set("n", "n", event.new_value - 1)


def test_two_engines_are_on_one_clock_and_a_handler_of_one_writes_to_the_other() -> None:
    with VirtualClock() as clock:
        one, other, began, seen = clock.open(), clock.open(), clock.now, list[tuple[str, float]]()
        one.register_function("pass on", lambda event: other.set("there", event.key, 1, ttl=5))
        one.register_trigger(function_id="pass on", events=["expired"])
        other.register_function("note", lambda event: seen.append((event.key, (clock.now - began).total_seconds())))
        other.register_trigger(function_id="note", events=["expired"])
        one.set("here", "a", 1, ttl=10)
        clock.advance(12)
        assert (other.get("there", "a"), seen) == (1, [])
        clock.advance(10)
        assert seen == [("a", 15.0)]
        # Back and forth at one moment.
        for mine, theirs in ((one, other), (other, one)):
            mine.register_function("count", partial(_pass_on, theirs))
            mine.register_trigger(function_id="count", scope="n")
        one.set("n", "n", 6)
        clock.run()
        assert (one.get("n", "n"), other.get("n", "n")) == (0, 1)


def test_retries_debounce_and_batches_of_durable_triggers_go_by_the_clock(tmp_path: Path) -> None:
    with VirtualClock() as clock:
        engine, began = clock.open(files(tmp_path, durability="commit")), clock.now
        seen: list[tuple[str, Any, float]] = []

        def note(name: str, what: Any) -> None:
            seen.append((name, what, (clock.now - began).total_seconds()))

        def fail_twice(event: StateEvent, delivery: Delivery) -> None:
            note("retry", delivery.attempt)
            if delivery.attempt < 3:
                raise ValueError(event.key)

        engine.register_function("retry", fail_twice)
        engine.register_function("debounce", lambda event: note("debounce", event.new_value))
        engine.register_function("batch", lambda events: note("batch", [event.key for event in events]))
        retry = Retry(attempts=3, first=10, factor=2, jitter=0)
        engine.register_trigger(function_id="retry", scope="r", durable="retry", retry=retry)
        engine.register_trigger(function_id="debounce", scope="d", durable="debounce", debounce=30)
        engine.register_trigger(function_id="batch", scope="b", durable="batch", batch=3, batch_wait=60)
        engine.set("r", "a", 1)
        engine.set("d", "a", 1)
        engine.set("b", "a", 1)
        clock.advance(20)
        engine.set("d", "a", 2)
        engine.set("b", "b", 1)
        clock.advance(100)
        rounded = sorted((name, what, round(at)) for name, what, at in seen if name != "batch")
        assert rounded == [("debounce", 2, 50), ("retry", 1, 0), ("retry", 2, 10), ("retry", 3, 30)]
        assert [(what, round(at)) for name, what, at in seen if name == "batch"] == [(["a", "b"], 60)]
        assert clock.failures == []


async def coroutine(event: StateEvent) -> None:
    """Stands in a configuration."""


def test_what_needs_an_event_loop_is_refused_and_names_what_to_use(tmp_path: Path) -> None:
    with VirtualClock() as clock:
        engine = clock.open()
        for call in (
            lambda: engine.register_function("handle", coroutine),
            lambda: engine.on_change(scope="s")(coroutine),
            lambda: engine.aio,
            lambda: engine.scope("s").aio,
        ):
            with pytest.raises(Unsupported, match="state_engine"):
                call()
        engine.register_function("late", lambda event: coroutine(event) if event else None)
        engine.register_trigger(function_id="late")
        engine.set("s", "a", 1)
        with pytest.raises(ExceptionGroup, match="returns a coroutine"):
            clock.run()
        with pytest.raises(Unsupported, match="state_engine"):
            clock.open(files(tmp_path) | {"functions": {"handle": "asyncio:sleep"}})
        assert clock.open(files(tmp_path)).list_groups() == []
