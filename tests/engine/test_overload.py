"""Full mailboxes: what waits, what is refused, what is dropped, and that each is counted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from watching import PATIENCE_S, Failures, Gate, GatedStore, Seen, in_thread

from scopestate import Engine, StateEvent, messages, ops
from scopestate.config import from_mapping
from scopestate.errors import EventNotDelivered, Overloaded


def held_up(engine: Engine, **filters: Any) -> tuple[Gate, Seen]:
    """Register a handler that stops at its first event until the gate is opened, and make it stop there."""
    gate, seen = Gate(), Seen()

    def handler(event: StateEvent) -> None:
        gate()
        seen(event)

    engine.on_change(function_id="app::slow", **filters)(handler)
    engine.set("s", "first", 1)
    gate.wait_until_reached()
    return gate, seen


def told_to_wait(engine: Engine) -> threading.Event:
    """An event that is set as soon as somebody begins to wait for room."""
    waiting = threading.Event()
    when_room = engine._router.backlog.when_room

    def noting(*arguments: Any) -> None:
        when_room(*arguments)
        waiting.set()

    engine._router.backlog.when_room = noting  # type: ignore[method-assign]
    return waiting


WRITES: dict[str, Callable[[Engine, str], Any]] = {
    "set": lambda engine, key: engine.set("s", key, 1),
    "update": lambda engine, key: engine.update("s", key, [ops.Set("", 1)]),
    "call": lambda engine, key: engine.call("state::set", {"scope": "s", "key": key, "value": 1}),
    "handle": lambda engine, key: engine.scope("s").set(key, 1),
    "aio.set": lambda engine, key: asyncio.run(engine.aio.set("s", key, 1)),
    "aio.update": lambda engine, key: asyncio.run(engine.aio.update("s", key, [ops.Set("", 1)])),
    "ask": lambda engine, key: engine.ask(messages.Set("s", key, 1)),
    "ask, block=False": lambda engine, key: engine.ask(messages.Set("s", key, 1), block=False).get(timeout=PATIENCE_S),
    "delete": lambda engine, key: engine.delete("s", key),
    "aio.delete": lambda engine, key: asyncio.run(engine.aio.delete("s", key)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_block_lets_a_writer_wait_until_the_handler_has_made_room(
    write: Callable[[Engine, str], Any], open_engine: Any
) -> None:
    engine = open_engine(limits={"handler_mailbox": 2, "handler_when_full": "block"})
    gate, seen = held_up(engine)
    engine.set("s", "second", 1)
    engine.set("s", "third", 1)
    waiting = told_to_wait(engine)

    result = in_thread(lambda: write(engine, "fourth"))
    assert waiting.wait(PATIENCE_S)
    assert engine.get("s", "fourth", "not yet") == "not yet"
    gate.open()
    result()

    assert [event.key for event in seen.wait_for(4)] == ["first", "second", "third", "fourth"]
    assert engine.stats().dropped == 0


def test_a_message_that_was_told_waits_for_room_too_while_its_sender_goes_on(open_engine: Any) -> None:
    engine = open_engine(limits={"handler_mailbox": 1})
    gate, seen = held_up(engine)
    engine.set("s", "second", 1)
    waiting = told_to_wait(engine)

    engine.tell(messages.Set("s", "third", 1))
    assert waiting.wait(PATIENCE_S)
    gate.open()

    assert [event.key for event in seen.wait_for(3)] == ["first", "second", "third"]


@pytest.mark.parametrize("way", ["set", "update", "delete", "aio.set", "aio.update", "aio.delete"])
def test_block_ends_with_a_refusal_when_no_room_is_made_in_time(way: str, open_engine: Any) -> None:
    engine = open_engine(limits={"handler_mailbox": 1, "call_timeout_ms": 500})
    gate, _ = held_up(engine)
    engine.set("s", "second", 1)

    with pytest.raises(Overloaded, match="handler_mailbox") as refused:
        WRITES[way](engine, "second" if "delete" in way else "third")

    assert refused.value.code == "OVERLOADED"
    assert engine.list("s") == [1, 1]
    gate.open()


@pytest.mark.parametrize("way", ["set", "update", "delete", "call", "handle", "aio.set", "aio.update", "aio.delete"])
def test_each_refusal_counts_once_and_leaves_nobody_waiting(way: str, open_engine: Any) -> None:
    engine = open_engine(limits={"handler_mailbox": 1, "call_timeout_ms": 300})
    gate, seen = held_up(engine)
    engine.set("s", "second", 1)
    for number in range(1, 4):
        with pytest.raises(Overloaded):
            WRITES[way](engine, "second")
        assert engine.stats().refused == number
        assert engine._router.backlog._writers == {}
    assert engine.stats().blocked >= 3
    gate.open()
    seen.wait_for(2)
    engine.drain(timeout=PATIENCE_S)

    engine.reconfigure(from_mapping({"limits": {"handler_mailbox": 1}}))
    WRITES[way](engine, "second")
    engine.drain(timeout=PATIENCE_S)
    assert len(seen.events) == 3
    assert (engine.stats().refused, engine.stats().dropped) == (3, 0)
    assert engine._router.backlog._writers == {}


def test_scopes_without_that_handler_are_not_held_up(open_engine: Any) -> None:
    engine = open_engine(limits={"handler_mailbox": 1})
    gate, _ = held_up(engine, scope="s")
    engine.set("s", "second", 1)

    for number in range(100):
        engine.set("other", str(number), 1)

    assert len(engine.list("other")) == 100
    gate.open()


def test_a_handler_that_would_wait_for_itself_is_refused_at_once(open_engine: Any) -> None:
    failures, refusals = Failures(), list[BaseException]()
    engine = open_engine(on_error=failures, limits={"handler_mailbox": 3, "call_timeout_ms": 0})

    def flood(event: StateEvent) -> None:
        try:
            for number in range(10):
                engine.set("s", str(number), 1)
        except Overloaded as error:
            refusals.append(error)
            raise

    engine.on_change(scope="s", key="start")(lambda event: None)
    engine.on_change(scope="s", condition=lambda event: event.key == "start")(flood)
    engine.set("s", "start", 1)

    failures.wait_for(1)
    engine.drain(timeout=PATIENCE_S)
    assert isinstance(refusals[0], Overloaded)
    assert "comes from a handler" in str(refusals[0])


@pytest.mark.parametrize(
    ("policy", "delivered", "dropped"),
    [
        ("drop_oldest", ["first", "4", "5"], ["1", "2", "3"]),
        ("reject", ["first", "1", "2"], ["3", "4", "5"]),
    ],
)
def test_the_other_policies_never_hold_up_a_writer_and_report_each_event_they_drop(
    policy: str, delivered: list[str], dropped: list[str], open_engine: Any
) -> None:
    failures, dead = Failures(), Failures()
    limits = {"handler_mailbox": 2, "handler_when_full": policy}
    engine = open_engine(on_error=failures, on_dead_letter=dead, limits=limits)
    gate, seen = held_up(engine)
    for number in range(1, 6):
        engine.set("s", str(number), number)

    letters = dead.wait_for(3)
    assert [letter.event.key for letter in letters] == dropped
    for letter in letters:
        assert isinstance(letter.error, EventNotDelivered)
        assert letter.error.code == "EVENT_NOT_DELIVERED"
        assert policy in str(letter.error)
        assert (letter.attempt, letter.final, letter.function_id) == (0, True, "app::slow")
    assert [failure.event.key for failure in failures.all] == dropped
    assert engine.stats().dropped == 3
    assert engine.stats().mailboxes.deepest_handler == 2
    gate.open()
    engine.drain(timeout=PATIENCE_S)
    assert seen.keys == delivered


def test_dropping_never_drops_what_a_drain_waits_behind(open_engine: Any) -> None:
    engine = open_engine(limits={"handler_mailbox": 2, "handler_when_full": "drop_oldest"})
    gate, seen = held_up(engine)
    drained = in_thread(lambda: engine.drain(timeout=PATIENCE_S))
    for number in range(20):
        engine.set("s", str(number), number)
    gate.open()

    drained()
    engine.drain(timeout=PATIENCE_S)
    assert seen.keys[0] == "first"
    assert seen.keys[-1] == "19"
    assert len(seen.keys) + engine.stats().dropped == 21


# -------------------------------------------------------------------------------------------------- a scope's mailbox


def test_a_scopes_full_mailbox_refuses_the_next_message_and_keeps_the_others(open_engine: Any) -> None:
    store, gate = GatedStore(), Gate()
    store.at_load = gate
    engine = open_engine(store=store, limits={"scope_mailbox": 3})
    replies = [engine.ask(messages.Set("s", "0", 0), block=False)]
    gate.wait_until_reached()
    replies += [engine.ask(messages.Set("s", str(number), number), block=False) for number in (1, 2, 3)]

    for refused_call in (
        lambda: engine.ask(messages.Set("s", "4", 4), block=False).get(timeout=PATIENCE_S),
        lambda: engine.set("s", "4", 4),
        lambda: asyncio.run(engine.aio.set("s", "4", 4)),
    ):
        with pytest.raises(Overloaded, match="3 messages already wait for scope 's'"):
            refused_call()

    gate.open()
    for reply in replies:
        reply.get(timeout=PATIENCE_S)
    assert engine.list("s") == [0, 1, 2, 3]


def test_who_asks_through_a_ref_is_refused_with_an_error_of_our_tree(open_engine: Any) -> None:
    engine = open_engine(limits={"handler_mailbox": 1})
    entered, leave = threading.Event(), threading.Event()

    @engine.on_change(scope="s")
    def slow(event: Any) -> None:
        entered.set()
        assert leave.wait(PATIENCE_S)

    ref = engine.scope("s").actor_ref
    ref.ask(messages.Set("s", "k", 1))
    assert entered.wait(PATIENCE_S)
    try:
        ref.ask(messages.Set("s", "k", 2))
        with pytest.raises(Overloaded, match="try again"):
            ref.ask(messages.Set("s", "k", 3))
    finally:
        leave.set()
