"""Handlers that are slow, fail, or never end: each one's trouble is its own, and all of it is reported."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest
from watching import PATIENCE_S, Failures, Gate, Seen

from scopestate import DeliveryFailure, Engine, StateEvent
from scopestate.actors.dispatcher import ThreadDispatcher
from scopestate.errors import EventLoopDetected, FunctionNotFound, HandlerTimeout, InvalidRegistration


class Clock(ThreadDispatcher):
    """A dispatcher whose timers go off when the test says so; remembers how long each was set for."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.pauses: list[float] = []
        self._waiting: list[tuple[float, Any]] = []
        self._changed = threading.Condition()

    def monotonic(self) -> float:
        return self.now

    def call_later(self, delay_s: float, callback: Any) -> Any:
        with self._changed:
            self.pauses.append(delay_s)
            self._waiting.append((self.now + delay_s, callback))
            self._changed.notify_all()
        return self

    def cancel(self) -> None:
        """Timers are never cancelled here."""

    def advance(self) -> None:
        """Wait for a timer, go to its time, and let it go off."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._waiting, PATIENCE_S), "no timer was set"
            self._waiting.sort(key=lambda entry: entry[0])
            self.now, callback = self._waiting.pop(0)
        callback()


# ------------------------------------------------------------------------------------------------------------ isolation


def test_a_handler_that_hangs_holds_up_no_other_and_no_writer(engine: Engine) -> None:
    gate, other = Gate(), Seen()
    engine.on_change(scope="s")(gate)
    engine.on_change(scope="s")(other)

    for number in range(100):
        engine.set("s", str(number), number)

    gate.wait_until_reached()
    assert len(other.wait_for(100)) == 100
    gate.open()


def test_many_handlers_that_hang_hold_up_no_other(engine: Engine) -> None:
    gates, other = [Gate() for _ in range(20)], Seen()
    for gate in gates:
        engine.on_change(scope="s")(gate)
    engine.on_change(scope="s")(other)

    engine.set("s", "k", 1)

    for gate in gates:
        gate.wait_until_reached()
    other.wait_for(1)
    for gate in gates:
        gate.open()


def test_a_coroutine_handler_that_waits_keeps_no_thread_and_holds_up_no_other(engine: Engine) -> None:
    go_on = asyncio.Event()
    reached, other, loops = threading.Event(), Seen(), []

    async def waiting(event: StateEvent) -> None:
        loops.append(asyncio.get_running_loop())
        reached.set()
        await go_on.wait()

    async def quick(event: StateEvent) -> None:
        other(event)

    engine.on_change(scope="s")(waiting)
    engine.on_change(scope="s")(quick)
    engine.set("s", "a", 1)
    engine.set("s", "b", 1)

    assert reached.wait(PATIENCE_S)
    assert [event.key for event in other.wait_for(2)] == ["a", "b"]
    loops[0].call_soon_threadsafe(go_on.set)
    engine.drain(timeout=PATIENCE_S)
    assert engine.stats().deliveries == 4


def test_a_handler_that_fails_is_reported_and_goes_on_with_the_next_event(open_engine: Any) -> None:
    failures, seen = Failures(), Seen()
    engine = open_engine(on_error=failures)

    def handler(event: StateEvent) -> None:
        if event.key == "bad":
            raise ValueError("this one is bad")
        seen(event)

    engine.on_change(scope="s", function_id="app::h")(handler)
    for key in ("a", "bad", "b"):
        engine.set("s", key, 1)

    engine.drain(timeout=PATIENCE_S)
    assert seen.keys == ["a", "b"]
    [failure] = failures.all
    assert isinstance(failure, DeliveryFailure)
    assert (failure.function_id, failure.attempt, failure.final) == ("app::h", 1, True)
    assert (failure.event.scope, failure.event.key, failure.event.revision) == ("s", "bad", 2)
    assert failure.trigger_id == engine.triggers()[0].trigger_id
    assert str(failure.error) == "this one is bad"
    assert (engine.stats().deliveries, engine.stats().failures) == (2, 1)


@pytest.mark.parametrize(
    "error", [SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError(), StopIteration()], ids=repr
)
def test_not_even_an_exception_that_ends_programs_ends_a_handler(error: BaseException, open_engine: Any) -> None:
    failures, seen = Failures(), Seen()
    engine = open_engine(on_error=failures)

    def handler(event: StateEvent) -> None:
        if event.key == "bad":
            raise error
        seen(event)

    engine.on_change()(handler)
    engine.set("s", "bad", 1)
    engine.set("s", "good", 1)

    assert [event.key for event in seen.wait_for(1)] == ["good"]
    assert failures.all[0].error is error


def test_a_failure_is_logged_with_the_facts_that_find_it(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.register_trigger(function_id="nobody", trigger_id="t", scope="s")
    engine.set("s", "k", 1)
    engine.drain(timeout=PATIENCE_S)

    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.name == "scopestate.triggers"
    assert (record.scope, record.key, record.revision) == ("s", "k", 1)  # type: ignore[attr-defined]
    assert (record.function_id, record.trigger_id) == ("nobody", "t")  # type: ignore[attr-defined]
    assert isinstance(record.exc_info[1], FunctionNotFound)  # type: ignore[index]


def test_a_hook_may_be_set_later_and_may_fail_itself(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures()

    @engine.on_error
    def fails(failure: DeliveryFailure) -> None:
        raise RuntimeError("the hook is broken too")

    assert engine.on_dead_letter(failures) is failures
    engine.register_trigger(function_id="nobody")
    engine.set("s", "k", 1)

    failures.wait_for(1)
    assert "the error hook failed" in caplog.text
    assert fails is not None


# --------------------------------------------------------------------------------------------------------------- retry


def fails_until(attempt: int, seen: Seen) -> Any:
    """A handler that fails before its attempt number `attempt`."""
    attempts = 0

    def handler(event: StateEvent) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < attempt:
            raise ValueError(f"attempt {attempts}")
        seen(event)

    return handler


def test_by_default_an_event_is_tried_once(open_engine: Any) -> None:
    failures, dead, seen = Failures(), Failures(), Seen()
    engine = open_engine(on_error=failures, on_dead_letter=dead)
    engine.on_change()(fails_until(2, seen))
    engine.set("s", "a", 1)

    engine.drain(timeout=PATIENCE_S)
    assert [(failure.attempt, failure.final) for failure in failures.all] == [(1, True)]
    assert [(failure.attempt, failure.final) for failure in dead.all] == [(1, True)]
    assert seen.events == []


def engine_on(clock: Clock, **limits: int) -> Engine:
    from scopestate.config import from_mapping

    return Engine(from_mapping({"limits": limits}), dispatcher=clock)


def test_a_failed_event_is_tried_again_after_pauses_that_double_and_before_newer_ones() -> None:
    clock, failures, dead, seen = Clock(), Failures(), Failures(), Seen()
    with engine_on(clock, handler_attempts=4, handler_backoff_ms=100) as engine:
        engine.on_error(failures)
        engine.on_dead_letter(dead)
        engine.on_change()(fails_until(4, seen))
        clock.pauses.clear()
        engine.set("s", "a", 1)
        engine.set("s", "b", 1)
        for attempts in (1, 2, 3):
            failures.wait_for(attempts)
            clock.advance()

        assert [event.key for event in seen.wait_for(2)] == ["a", "b"]
        engine.drain(timeout=PATIENCE_S)
        assert clock.pauses == [0.1, 0.2, 0.4]
        assert [(failure.attempt, failure.final) for failure in failures.all] == [(1, False), (2, False), (3, False)]
        assert dead.all == []
        stats = engine.stats()
        assert (stats.deliveries, stats.retries, stats.failures) == (2, 3, 0)


def test_an_event_that_fails_at_every_attempt_goes_to_the_dead_letter_hook_once() -> None:
    clock, failures, dead = Clock(), Failures(), Failures()
    with engine_on(clock, handler_attempts=3) as engine:
        engine.on_error(failures)
        engine.on_dead_letter(dead)
        engine.on_change()(fails_until(100, Seen()))
        engine.set("s", "a", {"n": 1})
        for attempts in (1, 2):
            failures.wait_for(attempts)
            clock.advance()

        [letter] = dead.wait_for(1)
        engine.drain(timeout=PATIENCE_S)
        assert [(failure.attempt, failure.final) for failure in failures.all] == [(1, False), (2, False), (3, True)]
        assert (letter.attempt, letter.event.new_value, str(letter.error)) == (3, {"n": 1}, "attempt 3")
        assert engine.stats().failures == 1


def test_a_retry_holds_up_no_other_handler_and_the_pause_is_bounded() -> None:
    clock, failures, other = Clock(), Failures(), Seen()
    with engine_on(clock, handler_attempts=2, handler_backoff_ms=31_000_000_000) as engine:
        engine.on_error(failures)
        engine.on_change()(fails_until(2, Seen()))
        engine.on_change()(other)
        engine.set("s", "a", 1)
        failures.wait_for(1)
        other.wait_for(1)
        clock.advance()
        engine.drain(timeout=PATIENCE_S)

        assert 0 < max(clock.pauses[-1:]) <= 60


def test_more_attempts_than_a_float_has_powers_of_two_end_like_fewer(open_engine: Any) -> None:
    failures, dead = Failures(), Failures()
    engine = open_engine(on_error=failures, limits={"handler_attempts": 1030, "handler_backoff_ms": 0})
    engine.on_dead_letter(dead)
    engine.on_change()(fails_until(2000, Seen()))
    engine.set("s", "a", 1)

    assert dead.wait_for(1)[0].attempt == 1030
    engine.drain(timeout=PATIENCE_S)


def test_an_event_that_waits_for_its_retry_is_dropped_when_its_trigger_goes() -> None:
    clock, failures, seen = Clock(), Failures(), Seen()
    with engine_on(clock, handler_attempts=2) as engine:
        engine.on_error(failures)
        engine.register_function("h", fails_until(2, seen))
        handle = engine.register_trigger(function_id="h")
        engine.set("s", "a", 1)
        failures.wait_for(1)
        handle.unregister()
        clock.advance()
        engine.drain(timeout=PATIENCE_S)

        assert seen.events == []
        assert (engine.stats().deliveries, engine.stats().dropped) == (0, 1)


def test_a_handler_is_not_begun_if_its_trigger_went_while_the_condition_ran(engine: Engine) -> None:
    gate, seen = Gate(), Seen()
    engine.register_function("h", seen)
    engine.register_function("c", gate)
    handle = engine.register_trigger(function_id="h", condition_function_id="c")
    engine.set("s", "a", 1)
    gate.wait_until_reached()
    handle.unregister()
    gate.open()

    engine.drain(timeout=PATIENCE_S)
    assert seen.events == []
    assert engine.stats().dropped == 1


# ------------------------------------------------------------------------------------------------------------- timeouts


def test_a_plain_handler_past_its_time_is_reported_while_it_runs_on() -> None:
    clock, gate, failures = Clock(), Gate(), Failures()
    with engine_on(clock, handler_timeout_ms=1000, handler_attempts=3) as engine:
        engine.on_error(failures)
        engine.on_change(function_id="app::slow")(gate)
        engine.set("s", "a", 1)
        gate.wait_until_reached()
        clock.advance()

        [failure] = failures.wait_for(1)
        assert isinstance(failure.error, HandlerTimeout)
        assert failure.error.code == "HANDLER_TIMEOUT"
        assert (failure.function_id, failure.final) == ("app::slow", True)
        assert not engine.health().ok
        assert "app::slow" in engine.health().problems[0]

        gate.open()
        engine.drain(timeout=PATIENCE_S)
        assert engine.health().ok
        assert len(failures.all) == 1
        stats = engine.stats()
        assert (stats.timeouts, stats.failures, stats.deliveries, stats.retries) == (1, 1, 0, 0)


def test_an_overdue_condition_is_reported_under_its_own_name_and_skips_the_handler() -> None:
    clock, gate, failures, seen = Clock(), Gate(), Failures(), Seen()
    with engine_on(clock, handler_timeout_ms=1000) as engine:
        engine.on_error(failures)
        engine.register_function("app::condition", gate)
        engine.on_change(function_id="app::handler", condition="app::condition")(seen)
        engine.set("s", "a", 1)
        gate.wait_until_reached()
        clock.advance()

        [failure] = failures.wait_for(1)
        assert failure.function_id == "app::condition"
        assert "app::condition" in str(failure.error)
        gate.open()
        engine.drain(timeout=PATIENCE_S)
        assert seen.events == []
        assert len(failures.all) == 1


def test_a_handler_within_its_time_is_left_alone() -> None:
    clock, failures, seen = Clock(), Failures(), Seen()
    with engine_on(clock, handler_timeout_ms=1000) as engine:
        engine.on_error(failures)
        engine.on_change()(seen)
        for key in ("a", "b"):
            engine.set("s", key, 1)
            engine.drain(timeout=PATIENCE_S)
        clock.advance()  # the timer of the first finds nothing to do
        engine.set("s", "c", 1)
        engine.drain(timeout=PATIENCE_S)

        assert seen.keys == ["a", "b", "c"]
        assert failures.all == []
        assert engine.stats().timeouts == 0


def test_a_time_limit_that_a_reload_lowered_holds_for_the_next_event() -> None:
    clock, gate, failures = Clock(), Gate(), Failures()

    def handler(event: StateEvent) -> None:
        if event.key == "slow":
            gate()

    with engine_on(clock, handler_timeout_ms=60_000) as engine:
        engine.on_error(failures)
        engine.on_change()(handler)
        engine.set("s", "quick", 1)
        engine.drain(timeout=PATIENCE_S)
        engine._parts.limits.handler_timeout_s = 1.0  # as a reload sets it
        engine.set("s", "slow", 1)
        gate.wait_until_reached()
        clock.advance()

        assert clock.now == 1.0
        assert [failure.event.key for failure in failures.wait_for(1)] == ["slow"]

        gate.open()
        engine.drain(timeout=PATIENCE_S)


def test_the_watch_follows_to_a_later_handler_that_began_after_it_was_set() -> None:
    clock, gate, failures = Clock(), Gate(), Failures()

    def handler(event: StateEvent) -> None:
        if event.key == "slow":
            gate()

    with engine_on(clock, handler_timeout_ms=1000) as engine:
        engine.on_error(failures)
        engine.on_change()(handler)
        engine.set("s", "quick", 1)
        engine.drain(timeout=PATIENCE_S)
        clock.now = 0.5
        engine.set("s", "slow", 1)
        gate.wait_until_reached()
        clock.advance()  # at 1.0: half of its time is left
        assert failures.all == []
        clock.advance()  # at 1.5
        assert [failure.event.key for failure in failures.wait_for(1)] == ["slow"]
        gate.open()
        engine.drain(timeout=PATIENCE_S)


def test_an_overdue_handler_that_fails_in_the_end_is_reported_once() -> None:
    clock, gate, failures = Clock(), Gate(), Failures()

    def handler(event: StateEvent) -> None:
        gate()
        raise ValueError("late")

    with engine_on(clock, handler_timeout_ms=1000) as engine:
        engine.on_error(failures)
        engine.on_change()(handler)
        engine.set("s", "a", 1)
        gate.wait_until_reached()
        clock.advance()
        failures.wait_for(1)
        gate.open()
        engine.drain(timeout=PATIENCE_S)

        assert [type(failure.error) for failure in failures.all] == [HandlerTimeout]
        assert engine.stats().failures == 1


@pytest.mark.parametrize("role", ["handler", "condition"])
def test_a_coroutine_past_its_time_is_cancelled_and_reported(role: str, open_engine: Any) -> None:
    failures, cancelled, seen = Failures(), threading.Event(), Seen()
    engine = open_engine(on_error=failures, limits={"handler_timeout_ms": 500})

    async def hang(event: StateEvent) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    if role == "handler":
        engine.on_change(function_id="app::hang")(hang)
    else:
        engine.register_function("app::hang", hang)
        engine.on_change(condition="app::hang")(seen)
    engine.set("s", "k", 1)

    [failure] = failures.wait_for(1)
    assert cancelled.wait(PATIENCE_S)
    assert isinstance(failure.error, HandlerTimeout)
    assert failure.function_id == "app::hang"
    engine.drain(timeout=PATIENCE_S)
    assert seen.events == []
    assert (engine.stats().timeouts, engine.stats().failures) == (1, 1)


def test_a_coroutine_that_is_late_after_a_plain_function_was_late_is_reported_too() -> None:
    clock, gate, failures = Clock(), Gate(), Failures()
    begun = threading.Event()

    async def hang(event: StateEvent) -> None:
        begun.set()
        await asyncio.Event().wait()

    with engine_on(clock, handler_timeout_ms=20) as engine:
        engine.on_error(failures)
        engine.on_change(function_id="app::h")(gate)
        engine.set("s", "a", 1)
        gate.wait_until_reached()
        clock.advance()
        failures.wait_for(1)
        gate.open()
        engine.drain(timeout=PATIENCE_S)
        engine.register_function("app::h", hang)
        engine.set("s", "b", 1)
        assert begun.wait(PATIENCE_S)
        clock.advance()

        assert [failure.event.key for failure in failures.wait_for(2)] == ["a", "b"]
        engine.drain(timeout=PATIENCE_S)
        assert engine.stats().failures == 2


def test_a_coroutine_that_makes_something_else_of_its_cancellation_is_late_all_the_same(open_engine: Any) -> None:
    failures = Failures()
    engine = open_engine(on_error=failures, limits={"handler_timeout_ms": 20})

    async def stubborn(event: StateEvent) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("cancelled?") from None

    engine.on_change()(stubborn)
    engine.set("s", "k", 1)

    assert isinstance(failures.wait_for(1)[0].error, HandlerTimeout)


@pytest.mark.parametrize("handler_timeout_ms", [0, 60_000])
def test_a_timeout_error_of_the_handlers_own_is_no_overdue_handler(handler_timeout_ms: int, open_engine: Any) -> None:
    failures = Failures()
    engine = open_engine(on_error=failures, limits={"handler_timeout_ms": handler_timeout_ms})

    async def handler(event: StateEvent) -> None:
        raise TimeoutError("some server did not answer")

    engine.on_change()(handler)
    engine.set("s", "k", 1)

    [failure] = failures.wait_for(1)
    assert type(failure.error) is TimeoutError
    engine.drain(timeout=PATIENCE_S)
    assert engine.stats().timeouts == 0


# -------------------------------------------------------------------------------------------------------------- loops


def test_handlers_may_write_also_to_the_scope_that_fired_them(engine: Engine) -> None:
    depths: list[int] = []

    def count_up(event: StateEvent) -> None:
        depths.append(event.depth)
        if event.new_value < 5:
            engine.set("s", "k", event.new_value + 1)

    engine.on_change(scope="s")(count_up)
    engine.set("s", "k", 0)

    engine.drain(timeout=PATIENCE_S)
    assert engine.get("s", "k") == 5
    assert depths == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["plain", "coroutine", "coroutine with plain calls", "call", "ask", "tell", "chain"])
def test_a_loop_of_handlers_is_cut_at_the_configured_depth_and_reported(kind: str, open_engine: Any) -> None:
    from scopestate import messages

    failures = Failures()
    engine = open_engine(on_dead_letter=failures, limits={"max_event_depth": 20})

    def plain(event: StateEvent) -> None:
        engine.set("s", "k", 1)

    async def coroutine(event: StateEvent) -> None:
        await engine.aio.set("s", "k", 1)

    async def mixed(event: StateEvent) -> None:
        engine.set("s", "k", 1)

    def by_call(event: StateEvent) -> None:
        engine.call("state::set", {"scope": "s", "key": "k", "value": 1})

    def by_ask(event: StateEvent) -> None:
        engine.ask(messages.Set("s", "k", 1))

    def by_tell(event: StateEvent) -> None:
        engine.tell(messages.Set("s", "k", 1))

    def there(event: StateEvent) -> None:
        engine.set("t", "k", 1)

    handlers = {
        "plain": plain,
        "coroutine": coroutine,
        "coroutine with plain calls": mixed,
        "call": by_call,
        "ask": by_ask,
        "tell": by_tell,
        "chain": there,
    }
    engine.on_change(scope="s", function_id="app::loop")(handlers[kind])
    if kind == "chain":
        engine.on_change(scope="t")(plain)
    engine.set("s", "k", 0)

    [failure] = failures.wait_for(1)
    engine.drain(timeout=PATIENCE_S)
    assert isinstance(failure.error, EventLoopDetected)
    assert failure.error.code == "EVENT_LOOP"
    assert (failure.attempt, failure.final) == (0, True)
    assert failure.event.depth == 21
    assert "max_event_depth = 20" in str(failure.error)
    assert len(failures.all) == 1
    stats = engine.stats()
    assert (stats.loops_cut, stats.deliveries, stats.events) == (1, 21, 22)


def test_a_write_from_outside_starts_at_depth_0_again(open_engine: Any) -> None:
    engine = open_engine(limits={"max_event_depth": 1})
    seen = Seen()

    def once(event: StateEvent) -> None:
        seen(event)
        if event.scope == "s":
            engine.set("t", "k", 1)

    engine.on_change()(once)
    for _ in range(5):
        engine.set("s", "k", 1)
        engine.drain(timeout=PATIENCE_S)

    assert [event.depth for event in seen.events] == [0, 1] * 5
    assert engine.stats().loops_cut == 0


@pytest.mark.parametrize("name", ["on_error", "on_dead_letter"])
def test_a_hook_that_could_not_be_called_is_refused_at_once_and_the_one_before_stays(
    name: str, open_engine: Any
) -> None:
    async def coroutine(failure: object) -> None:
        """Would never run."""

    def generator(failure: object) -> Any:
        yield failure

    failures = Failures()
    engine = open_engine(**{name: failures})
    for bad in (5, "text", coroutine, generator):
        with pytest.raises(InvalidRegistration, match=name):
            Engine(**{name: bad})
        with pytest.raises(InvalidRegistration, match=name):
            getattr(engine, name)(bad)

    engine.on_change(scope="s")(lambda event: 1 / 0)
    engine.set("s", "k", 1)

    assert failures.wait_for(1)[0].event.key == "k"
