"""One trigger, many events: what runs side by side, and what keeps its order."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from watching import PATIENCE_S, Failures, Gate, Seen, until

from scopestate import Engine, StateEvent
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.handler import HandlerActor, Hold
from scopestate.config import from_mapping
from scopestate.errors import Overloaded, WouldDeadlock


class Side:
    """A handler that takes virtual time, sometimes fails, and remembers what ran beside what."""

    def __init__(self, dispatcher: DeterministicDispatcher, order: str, *, fails: bool) -> None:
        self.dispatcher = dispatcher
        self.order = order
        self.fails = fails
        self.running: Counter[object] = Counter()
        self.begun: dict[object, list[int]] = {}
        self.done: dict[object, list[int]] = {}
        self.attempts: Counter[int] = Counter()
        self.most = 0

    def lane(self, event: StateEvent) -> object:
        lanes = {"scope": event.scope, "key": (event.scope, event.key), "none": event.new_value, "trigger": ""}
        return lanes[self.order]

    def __call__(self, event: StateEvent) -> None:
        lane, number = self.lane(event), event.new_value
        self.running[lane] += 1
        self.attempts[number] += 1
        self.begun.setdefault(lane, []).append(number)
        assert self.running[lane] == 1, "two events of one lane at the same time"
        self.most = max(self.most, self.running.total())
        try:
            self.dispatcher.sleep(0.002 * (number % 4))
            if self.fails and number % 3 == 0 and self.attempts[number] < 3:
                raise ValueError("not yet")
            self.done.setdefault(lane, []).append(number)
        finally:
            self.running[lane] -= 1


def in_virtual_time(seed: int, **limits: Any) -> tuple[DeterministicDispatcher, Engine]:
    dispatcher = DeterministicDispatcher(seed)
    return dispatcher, Engine(from_mapping({"limits": limits}), dispatcher=dispatcher)


@pytest.mark.parametrize("fails", [False, True], ids=["well", "with failures"])
@pytest.mark.parametrize("order", ["scope", "key", "none", "trigger"])
def test_each_lane_is_in_order_and_others_go_on_beside_it(order: str, fails: bool) -> None:
    at_once = 0
    for seed in range(25):
        dispatcher, engine = in_virtual_time(seed, handler_attempts=3, handler_backoff_ms=7)
        with engine:
            side = Side(dispatcher, order, fails=fails)
            engine.register_function("side", side)
            concurrency = 1 if order == "trigger" else 1 + seed % 4
            engine.register_trigger(function_id="side", order=order, concurrency=concurrency)
            for number in range(40):
                engine.set(f"scope-{number % 3}", f"key-{number % 2}", number)
                if number % 7 == 0:
                    dispatcher.advance(0.001)
            engine.drain()

            assert sorted(number for numbers in side.done.values() for number in numbers) == list(range(40)), seed
            for numbers in side.done.values():
                assert numbers == sorted(numbers), f"seed {seed}: a later event of a lane was handled first"
            for numbers in side.begun.values():
                assert numbers == sorted(numbers), f"seed {seed}: a retry was overtaken in its lane"
            assert side.most <= concurrency
            at_once = max(at_once, side.most)
            [handler] = engine._router.triggers.handlers()
            assert handler._lanes is None
            assert not handler.is_busy()
            assert engine.stats().deliveries == 40
    assert at_once == (1 if order == "trigger" else 3 if order == "scope" else 4)


def test_what_takes_long_is_handled_in_the_time_of_its_longest_lane() -> None:
    dispatcher, engine = in_virtual_time(1)
    with engine:
        engine.register_function("slow", lambda _: dispatcher.sleep(1.0))
        engine.register_trigger(function_id="slow", concurrency=50)
        for number in range(100):
            engine.set(f"s{number % 50}", "k", number)
        engine.drain()

        assert 2.0 <= dispatcher.monotonic() < 2.1


def test_a_drain_waits_for_all_that_came_before_it_and_for_nothing_else() -> None:
    for seed in range(30):
        dispatcher, engine = in_virtual_time(seed, handler_attempts=2, handler_backoff_ms=50)
        with engine:
            done: list[int] = []
            failed: set[int] = set()

            def handler(
                event: StateEvent, sleep: Any = dispatcher.sleep, done: Any = done, failed: Any = failed
            ) -> None:
                number = event.new_value
                sleep(0.003 * (7 - number % 7))
                if number % 5 == 0 and number not in failed:
                    failed.add(number)
                    raise ValueError("once")
                done.append(number)

            engine.register_function("handler", handler)
            engine.register_trigger(function_id="handler", order="none", concurrency=3)
            for number in range(10):
                engine.set("s", f"k{number}", number)
            engine.drain()

            assert sorted(done) == list(range(10)), f"seed {seed}"


def test_a_trigger_that_is_unregistered_begins_nothing_more_and_leaves_nothing() -> None:
    for seed in range(20):
        dispatcher, engine = in_virtual_time(seed, handler_attempts=3, handler_backoff_ms=10)
        with engine:
            begun: list[int] = []

            def handler(event: StateEvent, sleep: Any = dispatcher.sleep, begun: list[int] = begun) -> None:
                begun.append(event.new_value)
                sleep(0.01)
                raise ValueError("always")

            engine.register_function("handler", handler)
            trigger = engine.register_trigger(function_id="handler", concurrency=2)
            for number in range(12):
                engine.set(f"s{number % 4}", "k", number)
            dispatcher.advance(0.013)
            [entry] = engine._router.triggers.handlers()
            trigger.unregister()
            before = len(begun)
            dispatcher.advance(1.0)

            assert len(begun) == before, f"seed {seed}"
            assert entry._lanes is None
            assert not entry.is_busy()
            stats = engine.stats()
            assert stats.deliveries == 0
            assert stats.dropped + stats.failures == 12, f"seed {seed}"


def test_a_new_order_applies_when_what_has_begun_is_over() -> None:
    for seed in range(20):
        dispatcher, engine = in_virtual_time(seed)
        with engine:
            side = Side(dispatcher, "scope", fails=False)
            engine.register_function("side", side)
            register: Any = engine.register_trigger
            register(function_id="side", trigger_id="t", order="key", concurrency=4)
            for number in range(8):
                engine.set(f"scope-{number}", "k", number)
            dispatcher.advance(0.002)
            register(function_id="side", trigger_id="t", order="scope", concurrency=4)
            for number in range(8, 30):
                engine.set(f"scope-{number % 2}", f"key-{number % 5}", number)
            engine.drain()

            for numbers in side.done.values():
                assert numbers == sorted(numbers), f"seed {seed}"


def test_events_that_wait_in_lanes_are_dropped_oldest_first() -> None:
    dispatcher, engine = in_virtual_time(3, handler_mailbox=5, handler_when_full="drop_oldest")
    with engine:
        failures, done = Failures(), list[int]()
        engine.on_dead_letter(failures)

        def handler(event: StateEvent) -> None:
            dispatcher.sleep(1.0)
            done.append(event.new_value)

        engine.register_function("handler", handler)
        engine.register_trigger(function_id="handler", concurrency=2)
        for number in range(4):  # 0 and 1 begin; the others wait in their lanes
            engine.set(f"s{number % 2}", "k", number)
        dispatcher.advance(0.1)
        for number in range(4, 10):
            engine.set("s0", "k", number)
        dispatcher.advance(0.1)

        assert [failure.event.new_value for failure in failures.all] == [2, 3, 4]
        engine.drain()
        assert sorted(done) == [0, 1, 5, 6, 7, 8, 9]
        assert engine.stats().dropped == 3


def test_a_writer_waits_for_room_in_lanes_too() -> None:
    dispatcher, engine = in_virtual_time(3, handler_mailbox=4)
    with engine:
        engine.register_function("handler", lambda _: dispatcher.sleep(1.0))
        engine.register_trigger(function_id="handler", concurrency=2)
        [handler] = engine._router.triggers.handlers()
        in_lanes = 0
        for number in range(9):  # of one scope: one is handled, and there is room for a second one beside it
            engine.set("s", "k", number)
            dispatcher.run_until_idle()
            assert handler.depth() <= 4
            in_lanes = max(in_lanes, len(handler._aside))

        assert in_lanes == 4
        assert dispatcher.monotonic() >= 4.0
        assert engine.stats().blocked > 0
        engine.drain()
        assert engine.stats().deliveries == 9


def test_a_paused_trigger_begins_nothing_and_keeps_what_comes() -> None:
    for seed in range(10):
        dispatcher, engine = in_virtual_time(seed)
        with engine:
            done: list[int] = []
            engine.register_function("handler", lambda event, done=done: done.append(event.new_value))
            engine.register_trigger(function_id="handler")
            [handler] = engine._router.triggers.handlers()
            handler.pause()
            for number in range(10):
                engine.set(f"s{number % 2}", "k", number)
            dispatcher.advance(1.0)
            assert done == []
            assert handler.depth() == 10
            handler.go_on()
            engine.drain()

            assert sorted(done) == list(range(10))


# ------------------------------------------------------------------------------------------------------ on real threads


@pytest.fixture
def gates() -> Iterator[dict[str, Gate]]:
    made = {name: Gate() for name in ("a", "b", "c")}
    yield made
    for gate in made.values():
        gate.open()


@pytest.mark.parametrize("kind", ["plain", "async", "condition"])
def test_a_slow_event_holds_up_its_scope_and_no_other(kind: str, engine: Engine, gates: dict[str, Gate]) -> None:
    seen = Seen()

    def wait(event: StateEvent) -> None:
        if event.key == "slow":
            gates[event.scope]()

    def handler(event: StateEvent) -> None:
        if kind == "plain":
            wait(event)
        seen(event)

    async def coroutine(event: StateEvent) -> None:
        if event.key == "slow":
            await asyncio.to_thread(gates[event.scope])
        seen(event)

    condition = wait if kind == "condition" else None
    engine.on_change(condition=condition)(coroutine if kind == "async" else handler)
    engine.set("a", "slow", 1)
    gates["a"].wait_until_reached()
    engine.set("a", "behind", 2)
    engine.set("b", "k", 3)
    engine.set("c", "k", 4)

    assert {event.scope for event in seen.wait_for(2)} == {"b", "c"}
    gates["a"].open()
    engine.drain(timeout=PATIENCE_S)
    assert [event.key for event in seen.events if event.scope == "a"] == ["slow", "behind"]


def test_a_handler_may_wait_for_an_event_of_another_scope_of_its_own_trigger(engine: Engine) -> None:
    told = threading.Event()
    outcome: list[bool] = []

    @engine.on_change()
    def handler(event: StateEvent) -> None:
        if event.scope == "first":
            engine.set("second", "k", 1)
            outcome.append(told.wait(PATIENCE_S))
        else:
            told.set()

    engine.set("first", "k", 1)
    engine.drain(timeout=PATIENCE_S)
    assert outcome == [True]


def test_a_handler_beside_others_is_refused_what_would_wait_for_itself(open_engine: Any) -> None:
    engine = open_engine(limits={"handler_mailbox": 2})
    refused: list[type[Exception]] = []
    held = Gate()

    @engine.on_change(scope="s")
    def handler(event: StateEvent) -> None:
        if event.new_value == 0:
            held()
            try:
                for number in range(1, 9):
                    engine.set("s", "k", number)
            except Overloaded as error:
                refused.append(type(error))
            try:
                engine.drain()
            except WouldDeadlock as error:
                refused.append(type(error))

    engine.set("s", "k", 0)
    held.wait_until_reached()
    held.open()
    engine.drain(timeout=PATIENCE_S)
    assert refused == [Overloaded, WouldDeadlock]


def test_blocked_handlers_leave_the_rest_of_the_engine_quick(engine: Engine) -> None:
    gate, other = Gate(), Seen()
    engine.register_function("blocks", gate)
    engine.register_trigger(function_id="blocks", scope="busy", order="none", concurrency=64)
    engine.on_change(scope="idle")(other)
    try:
        for number in range(200):
            engine.set("busy", str(number), number)
        for _ in range(64):
            gate.wait_until_reached()
        took = []
        for number in range(200):
            began = time.perf_counter()
            engine.set("idle", "k", number)
            other.wait_for(number + 1)
            took.append(time.perf_counter() - began)
        # A new thread is started only after 5 ms. Not all of them: the machine may be busy with something else.
        assert sorted(took)[2] < 0.004, took
    finally:
        gate.open()
    engine.drain(timeout=PATIENCE_S)
    assert engine.stats().deliveries == 400


def test_events_behind_a_blocked_call_begin_though_the_first_look_came_before_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, drain, looked = HandlerActor._look, HandlerActor._drain_quickly, threading.Event()

    def look_when_all_are_here(handler: HandlerActor) -> None:
        until(lambda: looked.is_set() or len(handler._mailbox) == 10)
        look(handler)
        looked.set()

    def begin_after_the_look(handler: HandlerActor, hold: Hold, left: int) -> int:
        assert looked.wait(PATIENCE_S), "the call was not looked at"
        return drain(handler, hold, left)

    monkeypatch.setattr(HandlerActor, "_look", look_when_all_are_here)
    monkeypatch.setattr(HandlerActor, "_drain_quickly", begin_after_the_look)
    gate = Gate()
    engine.on_change(order="none", concurrency=10)(gate)
    try:
        for number in range(10):
            engine.set("s", str(number), number)
        for _ in range(10):
            gate.wait_until_reached()
    finally:
        gate.open()


def test_an_event_begins_that_was_offered_while_a_turn_was_scheduled_in_vain(engine: Engine) -> None:
    gates = {"a": Gate(), "b": Gate()}
    engine.on_change(scope="s", order="key")(lambda event: gates[event.key]())
    (handler,) = engine._parts.router.triggers.handlers()
    engine.set("s", "a", 0)
    gates["a"].wait_until_reached()
    until(lambda: not handler._scheduled)
    handler._scheduled = True  # as the router does if it offers an event just before the claim is taken
    try:
        engine.set("s", "b", 0)
        until(lambda: handler._mailbox)
        assert not handler._looking

        handler.run_batch()

        gates["b"].wait_until_reached()
        assert [event.key for event in handler.under_way()] == ["a", "b"]
    finally:
        for gate in gates.values():
            gate.open()


def test_many_lanes_leave_nothing_behind(engine: Engine) -> None:
    gate = Gate()
    gate.open()
    count = 0

    def handler(event: StateEvent) -> None:
        nonlocal count
        count += 1
        if event.new_value == 0:
            gate()

    engine.register_function("count", handler)
    engine.register_trigger(function_id="count", order="key")
    for number in range(20_000):
        engine.set("s", f"key-{number}", number)
    engine.drain(timeout=PATIENCE_S)

    [found] = engine._router.triggers.handlers()
    assert count == 20_000
    assert found._lanes is None
    assert not found._news
    assert not found._aside
    assert not found._inline
    assert found.depth() == 0


def test_as_many_threads_as_events_block_and_the_sum_is_right(engine: Engine) -> None:
    done = Counter[str]()
    lock = threading.Lock()

    def handler(event: StateEvent) -> None:
        time.sleep(0.0005 * (event.new_value % 3))
        with lock:
            done[event.scope] += 1

    engine.register_function("handler", handler)
    engine.register_trigger(function_id="handler", concurrency=16)
    writers = [
        threading.Thread(target=lambda base=base: [engine.set(f"s{n % 20}", "k", n) for n in range(base, base + 500)])
        for base in (0, 500, 1000)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    engine.drain(timeout=PATIENCE_S)

    assert done.total() == engine.stats().deliveries == 1500
    assert set(done.values()) == {75}
