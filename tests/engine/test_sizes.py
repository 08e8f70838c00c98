"""What waits is bounded in bytes too, and what is counted comes back to nothing."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
from watching import PATIENCE_S, Failures, Gate, Seen, in_thread

from scopestate import Engine, StateEvent, messages
from scopestate.actors import scope as scope_module
from scopestate.actors.scope import weight
from scopestate.errors import EventNotDelivered, Overloaded
from scopestate.ops import turns

VALUE = "x" * 398  # 400 bytes as JSON


def held_up(engine: Engine, **filters: Any) -> tuple[Gate, Seen]:
    """Register a handler that stops at its first event, whose value counts nothing by then."""
    gate, seen = Gate(), Seen()

    def handler(event: StateEvent) -> None:
        gate()
        seen(event)

    engine.on_change(**filters)(handler)
    engine.set("s", "first", 1)
    gate.wait_until_reached()
    return gate, seen


def settled(engine: Engine) -> None:
    """All that was counted has come back."""
    engine.drain(PATIENCE_S)
    backlog, handlers = engine._router.backlog, engine._router.triggers.handlers()
    assert backlog.offered - backlog._taken - sum(backlog.released) == 0
    assert [handler.offered - handler.taken for handler in handlers] == [0] * len(handlers)
    assert not backlog.is_over()


@pytest.mark.parametrize("limits", [{"handler_mailbox_bytes": 1200}, {"events_bytes": 1200}], ids=str)
@pytest.mark.parametrize("way", ["set", "aio.set"])
def test_a_writer_waits_when_the_events_that_wait_hold_as_many_bytes_as_may_be(
    way: str, limits: dict[str, int], open_engine: Any
) -> None:
    engine = open_engine(limits={**limits, "call_timeout_ms": 50})
    gate, seen = held_up(engine, scope="s")

    def write(number: int) -> None:
        if way == "set":
            engine.set("s", str(number), VALUE)
        else:
            asyncio.run(engine.aio.set("s", str(number), VALUE))

    for number in range(3):  # 0, 400 and 800 bytes wait before
        write(number)
    with pytest.raises(Overloaded, match="handler_mailbox_bytes"):
        write(3)
    assert engine.get("s", "3") is None
    engine.set("elsewhere", "k", VALUE)
    gate.open()
    seen.wait_for(4)
    write(4)
    assert [event.key for event in seen.wait_for(5)] == ["first", "0", "1", "2", "4"]
    settled(engine)


def test_a_writer_that_waits_for_bytes_goes_on_when_there_is_room(open_engine: Any) -> None:
    engine = open_engine(limits={"handler_mailbox_bytes": 400})
    gate, seen = held_up(engine, scope="s")
    engine.set("s", "a", VALUE)
    waiting = in_thread(lambda: [engine.set("s", key, VALUE) for key in ("b", "c", "d")])
    while not engine._router.backlog._writers:
        engine.stats()
    gate.open()
    waiting()

    assert [event.key for event in seen.wait_for(5)] == ["first", "a", "b", "c", "d"]
    settled(engine)


def test_an_event_larger_than_the_limit_is_delivered_all_the_same(open_engine: Any) -> None:
    engine = open_engine(limits={"handler_mailbox_bytes": 10, "events_bytes": 10})
    seen = Seen()
    engine.on_change(scope="s")(seen)
    for number in range(5):
        engine.set("s", str(number), VALUE)

    assert len(seen.wait_for(5)) == 5
    settled(engine)


@pytest.mark.parametrize("limit", ["handler_mailbox_bytes", "events_bytes"])
@pytest.mark.parametrize("mode", ["drop_oldest", "reject"])
def test_what_is_too_many_bytes_is_dropped_and_reported(mode: str, limit: str, open_engine: Any) -> None:
    failures = Failures()
    engine = open_engine(on_error=failures, limits={limit: 800, "handler_when_full": mode})
    gate, seen = held_up(engine, scope="s")
    for number in range(5):
        engine.set("s", str(number), VALUE)
    lost = failures.wait_for(3)
    gate.open()
    engine.drain(PATIENCE_S)

    kept = ["0", "1"] if mode == "reject" else ["3", "4"]
    assert seen.keys == ["first", *kept]
    assert {type(failure.error) for failure in lost} == {EventNotDelivered}
    assert engine.stats().dropped == 3
    settled(engine)


def test_a_full_mailbox_that_holds_nothing_but_a_barrier_takes_an_event(open_engine: Any) -> None:
    engine = open_engine(limits={"handler_mailbox": 1, "handler_when_full": "drop_oldest"})
    gate, seen = held_up(engine, scope="s")
    drained = in_thread(lambda: engine.drain(PATIENCE_S))
    while not engine.stats().mailboxes.handlers:
        engine.health()
    in_thread(lambda: engine.set("s", "k", 1))()
    gate.open()
    drained()

    assert [event.key for event in seen.wait_for(2)] == ["first", "k"]


def test_a_value_that_waits_for_several_triggers_counts_once_over_all(open_engine: Any) -> None:
    engine = open_engine(limits={"events_bytes": 1200, "call_timeout_ms": 50})
    gates = [held_up(engine, scope="s", key=None)[0]]
    gates += [Gate() for _ in range(9)]
    for gate in gates[1:]:
        engine.on_change(scope="s")(gate)
    for number in range(3):
        engine.set("s", str(number), VALUE)  # ten copies of each, 12,000 bytes if each counted
    with pytest.raises(Overloaded):
        engine.set("s", "3", VALUE)
    for gate in gates:
        gate.open()
    settled(engine)


def test_messages_that_wait_for_a_scope_are_bounded_in_bytes(open_engine: Any) -> None:
    engine = open_engine(limits={"scope_mailbox_bytes": 1200})
    engine.set("s", "k", 0)
    actor, gate = engine._scopes["s"], Gate()
    original = actor.on_receive

    def held(message: Any) -> Any:
        del actor.on_receive
        gate()
        return original(message)

    actor.on_receive = held
    holder = in_thread(lambda: actor.run(turns.Get("k")))
    gate.wait_until_reached()
    replies = [engine.ask(messages.Set("s", str(number), VALUE), block=False) for number in range(3)]
    with pytest.raises(Overloaded, match="scope_mailbox_bytes"):
        engine.ask(messages.Set("s", "3", VALUE), block=False)
    with pytest.raises(Overloaded, match="scope_mailbox_bytes"):
        engine.tell(messages.Set("s", "3", 1))
    assert engine.stats().refused == 2
    gate.open()
    holder()

    assert [reply.get(timeout=PATIENCE_S).new_value for reply in replies] == [VALUE] * 3
    engine.set("s", "3", VALUE)


def test_many_small_messages_behind_a_large_one_are_not_weighed_again_each_time(
    open_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighed = 0

    def counted(item: Any) -> int:
        nonlocal weighed
        weighed += 1
        return weight(item)

    monkeypatch.setattr(scope_module, "weight", counted)
    engine = open_engine(limits={"scope_mailbox_bytes": 100_000})
    engine.set("s", "k", 0)
    actor, gate = engine._scopes["s"], Gate()
    original = actor.on_receive

    def held(message: Any) -> Any:
        del actor.on_receive
        gate()
        return original(message)

    actor.on_receive = held
    holder = in_thread(lambda: actor.run(turns.Get("k")))
    gate.wait_until_reached()
    replies = [engine.ask(messages.Set("s", "large", "x" * 50_000), block=False)]
    replies += [engine.ask(messages.Set("s", "k", number), block=False) for number in range(1000)]
    gate.open()
    holder()

    assert replies[-1].get(timeout=PATIENCE_S).new_value == 999
    assert weighed < 10_000  # 500,000 if each message that comes weighs all that wait


def test_messages_that_wait_for_room_at_a_handler_are_bounded_in_bytes(open_engine: Any) -> None:
    engine = open_engine(limits={"handler_mailbox": 1, "scope_mailbox_bytes": 1200})
    gate, seen = held_up(engine, scope="s")
    engine.set("s", "waits", 1)
    while engine._router.depth() or engine._router._claim:  # the end of its turn sends again what waits for room
        engine.stats()

    replies = [engine.ask(messages.Set("s", str(number), VALUE), block=False) for number in range(3)]
    with pytest.raises(Overloaded, match="too many messages wait"):
        engine.ask(messages.Set("s", "3", VALUE), block=False).get(timeout=PATIENCE_S)
    gate.open()

    assert [reply.get(timeout=PATIENCE_S).new_value for reply in replies] == [VALUE] * 3
    assert seen.wait_for(5)
    settled(engine)


def test_a_message_is_not_kept_by_its_answer(engine: Engine) -> None:
    gc.disable()  # only what nothing refers to any more goes
    try:
        reply = engine.ask(messages.Set("s", "k", VALUE), block=False)
        reply.get(timeout=PATIENCE_S)
        here = weakref.ref(reply)
        del reply
        assert here() is None
    finally:
        gc.enable()


def test_a_scope_takes_exactly_as_many_messages_as_its_limit(open_engine: Any) -> None:
    engine = open_engine(limits={"scope_mailbox": 3})
    engine.set("s", "k", 0)
    actor, gate = engine._scopes["s"], Gate()
    original = actor.on_receive

    def held(message: Any) -> Any:
        del actor.on_receive
        gate()
        return original(message)

    actor.on_receive = held
    holder = in_thread(lambda: actor.run(turns.Get("k")))
    gate.wait_until_reached()
    replies = [engine.ask(messages.Set("s", "k", number), block=False) for number in range(3)]
    with pytest.raises(Overloaded):
        engine.ask(messages.Set("s", "k", 3), block=False)
    gate.open()
    holder()

    assert [reply.get(timeout=PATIENCE_S).new_value for reply in replies] == [0, 1, 2]
