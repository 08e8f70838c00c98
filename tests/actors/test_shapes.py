"""Debounced and batched events, in virtual time: nothing is lost, doubled or late, whatever the order of events."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scopestate.actors.backlog import Limits
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.functions import Function, Functions
from scopestate.actors.handler import HandlerActor
from scopestate.actors.lanes import Barrier
from scopestate.actors.loops import LoopThread
from scopestate.actors.router import EventRouter
from scopestate.actors.services import HandlerServices
from scopestate.ops.results import DeliveryFailure, StateEvent
from scopestate.ops.triggers import Trigger, read_options


class House:
    """A router with one trigger, whose handler notes when it gets what."""

    def __init__(self, seed: int = 1, *, fail: int = 0, limits: dict[str, Any] | None = None, **options: Any) -> None:
        self.dispatcher = DeterministicDispatcher(seed, switch=0, busy=0)
        self.calls: list[tuple[float, Any]] = []
        self.failures: list[DeliveryFailure] = []
        self.fail = fail
        functions = Functions()
        functions.add(Function("f", self.handle))
        functions.add(Function("odd", lambda event: event.new_value % 2 == 1))
        self.router = EventRouter(
            HandlerServices(
                self.dispatcher, functions, Limits(**(limits or {})), LoopThread("loop"), self.failures.append
            )
        )
        self.handler = self.register(**options)
        self.values: dict[tuple[str, str], bytes] = {}
        self.revision = 0
        self.written: list[tuple[float, StateEvent]] = []

    def register(self, **options: Any) -> HandlerActor:
        fields, mistakes = read_options(options)
        assert not mistakes
        return self.router.triggers.register(Trigger("t", "f", **fields))

    def handle(self, what: Any) -> None:
        self.calls.append((self.now, what))
        if self.fail:
            self.fail -= 1
            raise ValueError("no")

    @property
    def now(self) -> float:
        return self.dispatcher.monotonic()

    def write(self, key: str, new: bytes | None, scope: str = "s") -> None:
        self.revision += 1
        old = self.values.pop((scope, key), None)
        if new is not None:
            self.values[scope, key] = new
        watch = self.router.triggers.watch(scope)
        events = self.router.prepare(scope, watch, key, old, new, self.revision, 0)
        self.written += [(self.now, event.copy()) for _, event in events]
        self.router.publish(events)
        self.dispatcher.run_until_idle()

    def drain(self) -> bool:
        """Send a barrier, and return whether it came through at once."""
        reply: Any = self.dispatcher.reply()
        self.router.tell(Barrier(self.router.triggers.handlers(), reply))
        self.dispatcher.run_until_idle()
        return bool(reply.done)

    @property
    def told(self) -> list[Any]:
        return [what for _, what in self.calls]


# ------------------------------------------------------------------------------------------------------ debounce


def test_a_key_that_changes_again_and_again_is_one_event_with_the_first_old_value() -> None:
    house = House(debounce=0.5)
    for value in (b"1", b"2", b"3"):
        house.write("k", value)
        house.dispatcher.advance(0.4)
    assert house.calls == []
    house.dispatcher.advance(0.1)

    [(at, event)] = house.calls
    assert (event.event_type, event.old_value, event.new_value, event.revision) == ("state:created", None, 3, 3)
    assert event.coalesced == 3
    assert at == pytest.approx(house.written[-1][0] + 0.5)


@pytest.mark.parametrize(
    ("values", "kind", "old", "new"),
    [
        ((b"1", b"2", None), "state:deleted", None, None),
        ((b"0", "wait", b"1", b"2", None), "state:deleted", 0, None),
        ((b"0", "wait", None, b"2"), "state:updated", 0, 2),
        ((b"0", "wait", b"2"), "state:updated", 0, 2),
    ],
)
def test_the_kind_of_a_debounced_event_says_what_has_happened_from_end_to_end(
    values: tuple[Any, ...], kind: str, old: Any, new: Any
) -> None:
    house = House(debounce=0.5)
    for value in values:
        if value == "wait":
            house.dispatcher.advance(1)
        else:
            house.write("k", value)
    house.dispatcher.advance(1)

    event = house.told[-1]
    assert (event.event_type, event.old_value, event.new_value) == (kind, old, new)


def test_a_key_that_never_rests_is_delivered_after_debounce_max() -> None:
    house = House(debounce=1, debounce_max=3)
    start = house.now
    for value in range(10):
        house.write("k", b"%d" % value)
        house.dispatcher.advance(0.5)

    assert [(round(at - start, 6), event.coalesced) for at, event in house.calls] == [(3.0, 6)]


def test_a_value_that_is_what_it_was_is_no_change_from_end_to_end() -> None:
    house = House(debounce=1, only_if_changed=True)
    for value in (b"1", "wait", b"2", b"1", "wait", b"2"):
        if value == "wait":
            house.dispatcher.advance(2)
        else:
            house.write("k", value)  # type: ignore[arg-type]
    house.dispatcher.advance(2)

    assert [(event.old_value, event.new_value) for event in house.told] == [(None, 1), (1, 2)]
    assert house.handler.offered == house.handler.taken


def test_the_condition_is_asked_of_the_debounced_event() -> None:
    house = House(debounce=1, condition_function_id="odd")
    for value in (b"1", b"2"):
        house.write("a", value)
    house.write("b", b"3")
    house.dispatcher.advance(2)

    assert [event.new_value for event in house.told] == [3]
    assert house.handler.skipped == 1


# --------------------------------------------------------------------------------------------------------- batches


def test_a_full_batch_is_delivered_at_once_and_the_rest_after_its_wait() -> None:
    house = House(batch=3, batch_wait=0.5)
    start = house.now
    for value in range(7):
        house.write(f"k{value}", b"%d" % value)
    house.dispatcher.advance(1)

    told = [(round(at - start, 6), [event.new_value for event in batch]) for at, batch in house.calls]
    assert told == [(0.0, [0, 1, 2]), (0.0, [3, 4, 5]), (0.5, [6])]
    assert all(type(batch) is list for _, batch in house.calls)
    assert house.handler.delivered == 7
    assert house.handler.offered == house.handler.taken


def test_an_attempt_of_a_batch_fails_as_a_whole_and_each_event_is_reported() -> None:
    house = House(batch=3, batch_wait=0.5, fail=2, limits={"handler_attempts": 2, "handler_backoff_s": 1.0})
    told = list[Any]()
    house.router._services.tell_hooks = told.append
    for value in range(3):
        house.write(f"k{value}", b"%d" % value)
    house.dispatcher.advance(5)

    assert [[event.new_value for event in batch] for batch in house.told] == [[0, 1, 2], [0, 1, 2]]
    assert [(failure.attempt, failure.final, failure.batched) for failure in house.failures] == [
        (1, False, 3),
        (2, True, 3),
    ]
    assert [(one.event.key, one.final) for one in told] == [("k1", False), ("k2", False), ("k1", True), ("k2", True)]
    assert (house.handler.failed, house.handler.delivered, house.handler.retried) == (3, 0, 1)
    assert house.handler.offered == house.handler.taken


def test_a_handler_may_empty_its_list_and_fail() -> None:
    house = House(batch=2, limits={"handler_attempts": 2})
    seen: list[int] = []

    def emptying(events: list[StateEvent]) -> None:
        seen.append(len(events))
        events.clear()
        raise ValueError("no")

    house.router._services.functions.add(Function("f", emptying))
    house.write("a", b"1")
    house.write("b", b"1")
    house.dispatcher.advance(5)

    assert seen == [2, 2]


def test_events_that_come_while_a_batch_is_handled_fill_the_next_one() -> None:
    house = House(batch=4, batch_wait=1, fail=1, limits={"handler_attempts": 2, "handler_backoff_s": 10.0})
    house.write("a", b"0")
    house.dispatcher.advance(1)  # the first batch fails, and waits for its next attempt
    for value in range(9):
        house.write("a", b"%d" % value)
        house.dispatcher.advance(1)
    assert len(house.calls) == 1
    house.dispatcher.advance(10)

    assert [len(batch) for batch in house.told] == [1, 1, 4, 4, 1]
    assert [event.revision for batch in house.told[1:] for event in batch] == list(range(1, 11))


@pytest.mark.parametrize(("order", "expected"), [("scope", 2), ("key", 4), ("trigger", 1), ("none", 1)])
def test_a_batch_has_events_of_one_lane(order: str, expected: int) -> None:
    house = House(batch=10, batch_wait=0.1, order=order)
    for scope in ("s", "t"):
        for key in ("a", "b"):
            house.write(key, b"1", scope)
    house.dispatcher.advance(1)

    assert len(house.calls) == expected


def test_the_condition_is_asked_of_each_event_of_a_batch() -> None:
    house = House(batch=4, condition_function_id="odd")
    for value in range(8):
        house.write("k", b"%d" % (value if value < 4 else 2))
    house.dispatcher.advance(1)

    assert [[event.new_value for event in batch] for batch in house.told] == [[1, 3]]
    assert (house.handler.skipped, house.handler.delivered) == (6, 2)
    assert house.handler.offered == house.handler.taken


# --------------------------------------------------------------------------------------- bounds, drain, pause, reload


def test_with_as_many_keys_as_may_wait_they_are_delivered_early() -> None:
    house = House(debounce=60, limits={"handler_mailbox": 5})
    for value in range(12):
        house.write(f"k{value}", b"1")

    assert [event.key for event in house.told] == [f"k{number}" for number in range(10)]
    assert house.handler.depth() == 2


def test_with_as_many_bytes_as_may_wait_they_are_delivered_early() -> None:
    house = House(debounce=60, limits={"handler_mailbox_bytes": 100})
    for number in range(4):
        house.write(f"k{number}", b"1" * 30)

    assert [event.key for event in house.told] == ["k0", "k1", "k2", "k3"]


def test_what_is_replaced_by_a_newer_event_is_not_counted_any_more() -> None:
    house = House(debounce=60, limits={"handler_mailbox_bytes": 1000})
    for _ in range(100):
        house.write("k", b"1" * 30)

    assert house.calls == []
    assert house.handler.offered - house.handler.taken == 30
    assert house.handler.waiting() == 1


@pytest.mark.parametrize("options", [{"debounce": 60}, {"batch": 10, "batch_wait": 60}, {"debounce": 60, "batch": 3}])
def test_a_drain_does_not_wait_for_the_time(options: dict[str, Any]) -> None:
    house = House(**options)
    for value in range(5):
        house.write(f"k{value}", b"1")
    assert house.drain()

    events = [event for what in house.told for event in (what if type(what) is list else [what])]
    assert [event.key for event in events] == [f"k{value}" for value in range(5)]
    assert house.drain()


def test_unregistering_drops_what_is_held_back() -> None:
    house = House(debounce=1, batch=2)
    house.write("a", b"1")
    house.router.triggers.unregister("t")
    house.dispatcher.advance(5)

    assert house.calls == []
    assert (house.handler.dropped, house.handler.is_busy()) == (1, False)


def test_a_new_shape_applies_at_once_and_loses_nothing() -> None:
    house = House(debounce=60)
    house.write("a", b"1")
    house.register(batch=2, batch_wait=60)
    house.write("b", b"1")
    house.write("c", b"1")
    house.register()
    house.write("d", b"1")
    house.dispatcher.run_until_idle()

    told = [what if type(what) is StateEvent else [event.key for event in what] for what in house.told]
    assert told[0].key == "a"
    assert told[1] == ["b", "c"]
    assert told[2].key == "d"


def test_what_waits_at_the_end_is_reported_to_the_hooks() -> None:
    house = House(debounce=60)
    told = list[Any]()
    house.router._services.tell_hooks = told.append
    house.write("a", b"1")
    house.write("b", b"1")

    house.handler.abandon("the end")

    assert [failure.event.key for failure in told] == ["a", "b"]
    assert house.handler.waiting() == 0


@pytest.mark.parametrize("options", [{}, {"debounce": 1}, {"batch": 2}, {"order": "key"}])
def test_a_paused_trigger_begins_nothing_and_loses_nothing(options: dict[str, Any]) -> None:
    house = House(**options)
    house.write("a", b"0")
    house.dispatcher.advance(5)
    before = len(house.calls)
    house.handler.pause()
    for value in range(3):
        house.write("b", b"%d" % value)
    house.dispatcher.advance(5)
    assert len(house.calls) == before
    assert house.drain()  # it does not wait for a trigger that is paused

    house.handler.go_on()
    house.dispatcher.advance(5)

    last = house.told[-1]
    assert (last[-1] if type(last) is list else last).new_value == 2


def test_a_pause_lets_a_drain_that_waits_for_it_go() -> None:
    house = House(fail=1, limits={"handler_attempts": 2, "handler_backoff_s": 100.0})
    house.write("a", b"0")
    reply: Any = house.dispatcher.reply()
    house.router.tell(Barrier([house.handler], reply))
    house.dispatcher.run_until_idle()
    assert not reply.done

    house.handler.pause()

    assert reply.done
    house.dispatcher.advance(200)
    assert len(house.calls) == 1  # the next attempt waits as well
    house.handler.go_on()
    house.dispatcher.run_until_idle()
    assert len(house.calls) == 2


# ----------------------------------------------------------------------------------------------------- any history

writes = st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from([0.0, 0.1, 0.7, 1.5]))


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(writes, max_size=25),
    st.sampled_from([None, 0.5, 1.0]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from(["scope", "key", "trigger", "none"]),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_each_event_is_delivered_once_in_order_and_in_time(
    history: list[tuple[str, str, float]], debounce: float | None, batch: int | None, order: str, fail: int, seed: int
) -> None:
    options: dict[str, Any] = {"order": order}
    if debounce is not None:
        options |= {"debounce": debounce, "debounce_max": 2.0}
    if batch is not None:
        options |= {"batch": batch, "batch_wait": 0.3}
    house = House(seed, fail=fail, limits={"handler_attempts": 5, "handler_backoff_s": 0.2}, **options)
    for number, (scope, key, pause_s) in enumerate(history):
        house.write(key, b"%d" % number, scope)
        house.dispatcher.advance(pause_s)
    house.dispatcher.advance(30)

    # What was tried again is the same as before.
    successes = list[tuple[float, list[StateEvent]]]()
    for index, (at, what) in enumerate(house.calls):
        if index >= fail:
            successes.append((at, what if type(what) is list else [what]))
    delivered: dict[tuple[str, str], list[tuple[float, StateEvent]]] = defaultdict(list)
    for at, events in successes:
        assert batch is None or len(events) <= batch
        if order in ("scope", "key"):
            assert len({(event.scope, event.key if order == "key" else "") for event in events}) == 1
        for event in events:
            delivered[event.scope, event.key].append((at, event))
    for name, events_of_key in _by_key(house.written).items():
        left = list(events_of_key)
        told = delivered[name]
        if order == "none":
            told.sort(key=lambda one: one[1].revision)
        for at, event in told:
            several, left = left[: max(event.coalesced, 1)], left[max(event.coalesced, 1) :]
            assert event.coalesced == (0 if debounce is None else len(several))
            assert (event.old_json, event.new_json) == (several[0][1].old_json, several[-1][1].new_json)
            assert event.revision == several[-1][1].revision
            if not fail:
                latest = min(several[-1][0] + (debounce or 0), several[0][0] + (2.0 if debounce else 0))
                assert latest - 1e-6 <= at <= latest + (0.3 if batch else 0) + 1e-6
        assert not left
    assert house.handler.offered == house.handler.taken
    assert not house.handler.is_busy()


def _by_key(written: list[tuple[float, StateEvent]]) -> dict[tuple[str, str], list[tuple[float, StateEvent]]]:
    found: dict[tuple[str, str], list[tuple[float, StateEvent]]] = defaultdict(list)
    for at, event in written:
        found[event.scope, event.key].append((at, event))
    return found
