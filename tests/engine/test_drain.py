"""drain(): every event fired so far has been handled, and every event that those handlers fired."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from watching import PATIENCE_S, Failures, Gate, Seen, in_thread

from scopestate import Engine, StateEvent, messages
from scopestate.errors import ReplyTimeout, WouldDeadlock


def test_there_is_nothing_to_wait_for_without_triggers(engine: Engine) -> None:
    engine.set("s", "k", 1)

    engine.drain()
    engine.drain(timeout=0)


def test_drain_waits_until_the_handler_has_ended(engine: Engine) -> None:
    gate, ended = Gate(), list[int]()

    def handler(event: StateEvent) -> None:
        gate()
        ended.append(1)

    engine.on_change()(handler)
    engine.set("s", "k", 1)
    gate.wait_until_reached()

    drained = in_thread(lambda: engine.drain(timeout=PATIENCE_S) or list(ended))
    gate.open()

    assert drained() == [1]


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_drain_waits_for_what_handlers_fire_and_what_those_fire(kind: str, engine: Engine) -> None:
    seen = Seen()

    def plain(event: StateEvent) -> None:
        step = event.new_value
        if step < 50:
            engine.set(f"scope {step + 1}", "k", step + 1)
        else:
            seen(event)

    async def coroutine(event: StateEvent) -> None:
        await asyncio.sleep(0)
        plain(event)

    engine.on_change()(plain if kind == "plain" else coroutine)
    for _ in range(20):
        engine.set("scope 0", "k", 0)
        engine.drain(timeout=PATIENCE_S)
        assert len(seen.take()) == 1


def test_drain_waits_for_messages_that_were_told(engine: Engine) -> None:
    seen = Seen()
    engine.on_change()(seen)
    for number in range(200):
        engine.tell(messages.Set("s", str(number), number))

    engine.drain(timeout=PATIENCE_S)

    assert len(seen.events) == 200


def test_drain_waits_for_events_that_a_commit_holds_back(open_store: Any) -> None:
    engine = open_store()
    seen = Seen()
    engine.on_change()(seen)
    for number in range(20):
        engine.tell(messages.Set(f"s{number % 3}", str(number), number))

    engine.drain(timeout=PATIENCE_S)

    assert len(seen.events) == 20


def test_drain_waits_for_retries(open_engine: Any) -> None:
    failures = Failures()
    engine = open_engine(on_error=failures, limits={"handler_attempts": 3, "handler_backoff_ms": 1})

    def handler(event: StateEvent) -> None:
        raise ValueError

    engine.on_change()(handler)
    engine.set("s", "k", 1)

    engine.drain(timeout=PATIENCE_S)

    assert [failure.attempt for failure in failures.all] == [1, 2, 3]


def test_drain_out_of_time_names_the_triggers_that_are_behind(engine: Engine) -> None:
    gate = Gate()
    engine.register_function("slow", gate)
    engine.register_function("quick", Seen())
    engine.register_trigger(function_id="slow", trigger_id="the slow one")
    engine.register_trigger(function_id="quick", trigger_id="the quick one")
    engine.set("s", "k", 1)
    gate.wait_until_reached()

    for attempt in (lambda: engine.drain(timeout=0.05), lambda: asyncio.run(engine.aio.drain(timeout=0.05))):
        with pytest.raises(ReplyTimeout, match="the slow one") as late:
            attempt()
        assert late.value.behind == "the slow one (slow)"
        assert late.value.code == "TIMEOUT"
    gate.open()


@pytest.mark.parametrize("kind", ["handler", "condition", "coroutine handler", "coroutine handler, aio"])
def test_drain_in_a_handler_would_wait_for_itself(kind: str, open_engine: Any) -> None:
    failures = Failures()
    engine = open_engine(on_error=failures)

    async def coroutine(event: StateEvent) -> None:
        engine.drain()

    async def through_aio(event: StateEvent) -> None:
        await engine.aio.drain()

    if kind == "condition":
        engine.on_change(condition=lambda event: engine.drain())(Seen())
    elif kind == "handler":
        engine.on_change()(lambda event: engine.drain())
    else:
        engine.on_change()(through_aio if "aio" in kind else coroutine)
    engine.set("s", "k", 1)

    assert isinstance(failures.wait_for(1)[0].error, WouldDeadlock)


def test_several_threads_may_drain_while_others_write(engine: Engine) -> None:
    seen, stop = Seen(), threading.Event()
    engine.on_change()(seen)

    def write() -> None:
        number = 0
        while not stop.is_set():
            engine.set("noise", "k", number)
            number += 1

    writer = in_thread(write)

    def check(name: str) -> None:
        for number in range(10):
            engine.set(name, str(number), number)
            engine.drain(timeout=PATIENCE_S)
            assert (name, str(number)) in [(event.scope, event.key) for event in seen.events if event.scope == name]

    for wait in [in_thread(lambda name=name: check(name)) for name in ("a", "b")]:
        wait()
    stop.set()
    writer()


def test_only_a_loop_that_some_trigger_needs_is_kept_from_blocking_in_drain(engine: Engine) -> None:
    seen = Seen()
    engine.register_function("app::plain", seen)

    async def needed(event: object) -> bool:
        return True

    async def main() -> None:
        engine.register_function("app::needed", needed)
        plain = engine.register_trigger(function_id="app::plain", scope="s")
        engine.set("s", "k", 1)
        engine.drain(timeout=PATIENCE_S)
        assert len(seen.events) == 1

        for trigger in ({"function_id": "app::needed"}, {"function_id": "f", "condition_function_id": "app::needed"}):
            needing = engine.register_trigger(scope="t", **trigger)
            for blocking in (engine.drain, engine.close):
                with pytest.raises(WouldDeadlock, match=r"await engine\.aio\."):
                    blocking()
            needing.unregister()
            engine.drain(timeout=PATIENCE_S)
        plain.unregister()

    asyncio.run(main())
