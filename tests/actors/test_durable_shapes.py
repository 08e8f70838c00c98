"""Debounced and batched deliveries of durable triggers: all events that one stands for have one fate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keeping import Stage

from scopestate.actors.consuming import Held
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.functions import Function
from scopestate.actors.lanes import Barrier
from scopestate.errors import Unsupported
from scopestate.ops.deliveries import Delivery, Discard, Retry
from scopestate.ops.results import StateEvent

Virtual = tuple[Stage, DeterministicDispatcher]


@pytest.fixture
def virtual() -> Iterator[Virtual]:
    dispatcher = DeterministicDispatcher(seed=7)
    yield Stage(dispatcher), dispatcher
    dispatcher.close()


def test_a_list_is_acknowledged_as_a_whole(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[list[str]] = []
    stage.begin(lambda events: seen.append([event.key for event in events]), order="trigger", batch=2, batch_wait=0.5)

    stage.port.put("a", "b", "c")
    dispatcher.run_until_idle()
    assert (seen, stage.port.ended_as()) == ([["a", "b"]], [(1, "done"), (2, "done")])
    dispatcher.advance(1)

    assert seen == [["a", "b"], ["c"]]
    assert sorted(stage.port.begun) == [(1, 1), (2, 1), (3, 1)]
    assert stage.port.ended_as() == [(1, "done"), (2, "done"), (3, "done")]
    assert stage.handler.delivered == 3


def test_a_list_that_fails_is_tried_again_as_a_whole_and_each_event_gets_a_dead_letter(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[tuple[int, int]] = []

    def fail(events: list[StateEvent], delivery: Delivery) -> None:
        seen.append((len(events), delivery.attempt))
        events.clear()
        raise OSError("away")

    stage.begin(fail, order="trigger", batch=10, batch_wait=0.1, retry=Retry(attempts=2, jitter=0.0))
    stage.port.put("a", "b")
    dispatcher.advance(10)

    assert seen == [(2, 1), (2, 2)]
    assert stage.port.ended_as() == [(1, "retry"), (2, "retry"), (1, "dead"), (2, "dead")]
    dead = [one for one in stage.port.outcomes if one.verdict == "dead"]
    assert [(one.event and one.event.key, one.attempts) for one in dead] == [("a", 2), ("b", 2)]
    assert [(one.event.key, one.final, one.batched) for one in stage.failures] == [
        ("a", False, 2),
        ("b", False, 2),
        ("a", True, 2),
        ("b", True, 2),
    ]


def test_a_debounced_event_acknowledges_all_that_it_stands_for(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[Any] = []
    stage.begin(
        lambda event: seen.append((event.key, event.new_value, event.coalesced, event.metadata)),
        debounce=1.0,
        debounce_max=5.0,
        metadata_json=b'{"team":"x"}',
    )

    stage.port.put("a", "b", "a")
    dispatcher.advance(0.5)
    assert (seen, stage.port.begun) == ([], [])
    dispatcher.advance(1)

    assert sorted(seen) == [("a", 3, 2, {"team": "x"}), ("b", 2, 1, {"team": "x"})]
    assert sorted(stage.port.begun) == [(1, 1), (2, 1), (3, 1)]
    assert sorted(stage.port.ended_as()) == [(1, "done"), (2, "done"), (3, "done")]


def test_what_is_as_it_was_is_acknowledged_without_a_delivery(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[Any] = []
    stage.begin(seen.append, debounce=1.0, debounce_max=5.0, only_if_changed=True)
    for position, (old, new) in enumerate([(b"1", b"2"), (b"2", b"1")], 1):
        event = StateEvent("state:updated", "s", "k", old, new, position, position=position)
        stage.port.events.append(Held(event))
    stage.port.wake()
    dispatcher.advance(2)

    assert (seen, stage.port.ended_as()) == ([], [(1, "done"), (2, "done")])


def test_an_event_that_was_tried_before_a_restart_goes_by_itself(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[list[str]] = []
    tried = Held(StateEvent("state:updated", "s", "bad", b"1", b"2", 1, position=1), attempts=1, cut_off=True)
    stage.port.events.append(tried)
    stage.port.last = 1  # type: ignore[attr-defined]  # `put` goes on behind it
    stage.begin(lambda events: seen.append([event.key for event in events]), order="trigger", batch=10, batch_wait=0.1)
    stage.port.put("a", "b")
    dispatcher.advance(1)

    assert seen == [["bad"], ["a", "b"]]


def test_the_condition_is_asked_of_each_event_of_a_list(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[list[str]] = []

    stage.functions.add(Function("c", lambda event: event.key != "b"))
    stage.begin(
        lambda events: seen.append([event.key for event in events]),
        order="trigger",
        batch=3,
        condition_function_id="c",
    )
    stage.port.put("a", "b", "c")
    dispatcher.advance(1)

    assert seen == [["a", "c"]]
    assert stage.port.ended_as() == [(1, "done"), (2, "done"), (3, "done")]


def test_a_discarded_list_is_dead_at_once(virtual: Virtual) -> None:
    stage, dispatcher = virtual

    def discard(events: list[StateEvent]) -> None:
        raise Discard("useless")

    stage.begin(discard, order="trigger", batch=2)
    stage.port.put("a", "b")
    dispatcher.advance(1)

    assert stage.port.ended_as() == [(1, "dead"), (2, "dead")]


def test_a_delivery_of_several_events_has_no_transaction(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    refused: list[str] = []

    def try_it(events: list[StateEvent], delivery: Delivery) -> None:
        try:
            delivery.transaction("s")
        except Unsupported as error:
            refused.append(str(error))

    stage.begin(try_it, order="trigger", batch=2)
    stage.port.put("a", "b")
    dispatcher.advance(1)

    assert len(refused) == 1
    assert "a transaction of several events" in refused[0]


def test_what_is_lost_is_neither_delivered_nor_acknowledged(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[Any] = []
    stage.begin(seen.append, debounce=1.0, debounce_max=5.0)
    stage.port.put("a", "b")
    dispatcher.run_until_idle()

    stage.port.lost([1])
    dispatcher.advance(2)

    assert [event.key for event in seen] == ["b"]
    assert stage.port.ended_as() == [(2, "done")]
    assert stage.handler.depth() == 0


@pytest.mark.parametrize("options", [{"debounce": 60.0, "debounce_max": 600.0}, {"batch": 10, "batch_wait": 60.0}])
def test_a_drain_does_not_wait_for_the_time(virtual: Virtual, options: dict[str, Any]) -> None:
    stage, dispatcher = virtual
    seen: list[Any] = []
    handler = stage.begin(lambda what: seen.extend(what if isinstance(what, list) else [what]), **options)
    stage.port.put("a", "b")
    dispatcher.run_until_idle()
    assert seen == []

    reply: Any = dispatcher.reply()
    handler.tell(Barrier([handler], reply))
    dispatcher.run_until_idle()

    assert reply.done
    assert sorted(event.key for event in seen) == ["a", "b"]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.2, 1.5])), max_size=25),
    st.sampled_from(
        [{"debounce": 0.5, "debounce_max": 2.0}, {"batch": 3}, {"debounce": 0.5, "debounce_max": 2.0, "batch": 2}]
    ),
    st.sampled_from(["key", "trigger", "none", "scope"]),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_every_event_is_acknowledged_once(
    history: list[tuple[str, float]], options: dict[str, Any], order: str, fail: int, seed: int
) -> None:
    dispatcher = DeterministicDispatcher(seed=seed)
    stage = Stage(dispatcher)
    left = [fail]
    newest: dict[str, list[int]] = {}

    def handle(what: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError("away")
        for event in what if isinstance(what, list) else [what]:
            newest.setdefault(event.key, []).append(event.revision)

    stage.begin(handle, order=order, retry=Retry(attempts=9, first=0.3, jitter=0.0), **options)
    for number, (key, pause_s) in enumerate(history, 1):
        event = StateEvent("state:updated", "s", key, b"0", str(number).encode(), number, position=number)
        stage.port.events.append(Held(event))
        stage.port.wake()
        dispatcher.advance(pause_s)
    dispatcher.advance(60)

    done = [position for position, verdict in stage.port.ended_as() if verdict == "done"]
    assert sorted(done) == list(range(1, len(history) + 1))
    for key in {key for key, _ in history}:
        expected = [number for number, (name, _) in enumerate(history, 1) if name == key]
        assert newest[key][-1:] == expected[-1:] or order == "none"
        if order != "none":
            assert newest[key] == sorted(newest[key])
        if "debounce" not in options:
            assert sorted(newest[key]) == expected
    assert stage.handler.depth() == 0
    assert not stage.handler.is_busy()
    dispatcher.close()
