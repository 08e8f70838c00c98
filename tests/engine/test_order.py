"""Calls of one sender take effect in the order in which it made them, also those it did not wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from watching import PATIENCE_S, Gate, Seen, SlowUpdate, in_thread

from scopestate import Engine, messages, ops
from scopestate.actors.dispatcher import ThreadDispatcher
from scopestate.actors.reply import Envelope, Reply
from scopestate.actors.turn import TurnActor


class Held(ThreadDispatcher):
    """Lets no worker thread begin a turn until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[TurnActor] | None = []

    def schedule(self, actor: TurnActor) -> None:
        if self._held is None:
            super().schedule(actor)
        else:
            self._held.append(actor)

    def release(self) -> None:
        held, self._held = self._held or [], None
        for actor in held:
            super().schedule(actor)


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def engine(held: Held, nothing_left_behind: None) -> Iterator[Engine]:
    """An engine whose scope `s` was busy when a message was told to it: the message waits, the scope is idle."""
    with Engine(dispatcher=held) as engine:
        engine.set("s", "k", 0)
        actor, gate = engine._scopes["s"], Gate()
        original = actor.on_receive

        def slow(turn: Any) -> Any:
            del actor.on_receive  # type: ignore[method-assign]  # the class's own is used again
            gate()
            return original(turn)

        actor.on_receive = slow  # type: ignore[method-assign]  # for one turn
        busy = in_thread(lambda: engine.set("s", "k", 0))
        gate.wait_until_reached()
        engine.tell(messages.Set("s", "k", 1))
        gate.open()
        busy()
        yield engine
        held.release()


def test_a_call_comes_after_a_message_that_its_sender_told_before(engine: Engine, held: Held) -> None:
    later = engine.ask(messages.Set("s", "k", 2), block=False)
    last = engine.ask(messages.Get("s", "k"), block=False)
    held.release()

    assert later.get(timeout=PATIENCE_S).old_value == 1
    assert last.get(timeout=PATIENCE_S) == 2


@pytest.mark.parametrize("way", ["get", "list", "set", "update", "delete", "aio.get", "aio.list", "aio.set", "ref"])
def test_whichever_way_it_is_made(way: str, engine: Engine, held: Held) -> None:
    sees = {
        "get": lambda: engine.get("s", "k"),
        "list": lambda: engine.list("s")[0],
        "set": lambda: engine.set("s", "k", 2).old_value,
        "update": lambda: engine.update("s", "k", []).old_value,
        "delete": lambda: engine.delete("s", "k"),
        "aio.get": lambda: asyncio.run(engine.aio.get("s", "k")),
        "aio.list": lambda: asyncio.run(engine.aio.list("s"))[0],
        "aio.set": lambda: asyncio.run(engine.aio.set("s", "k", 2)).old_value,
        "ref": lambda: engine.scope("s").actor_ref.ask(messages.Get("s", "k")),
    }
    call = in_thread(sees[way])
    held.release()

    assert call() == 1


def test_once_they_are_handled_calls_run_on_their_callers_threads_again(engine: Engine, held: Held) -> None:
    held.release()
    engine.get("s", "k")
    held._held = []  # no worker begins a turn any more

    assert engine.set("s", "k", 3).old_value == 1
    assert engine.get("s", "k") == 3
    held.release()


@pytest.mark.parametrize("read", ["get", "list", "aio.get", "aio.list"])
def test_a_read_does_not_overtake_what_its_sender_told_while_that_is_handled(read: str) -> None:
    """Neither when the message waits, nor in the middle of its turn."""
    with Engine() as engine:
        engine.set("s", "k", 0)
        actor, busy, told = engine._scopes["s"], Gate(), Gate()
        holder = in_thread(lambda: actor.run(SlowUpdate("k", (), busy)))
        busy.wait_until_reached()
        actor.send(Envelope(SlowUpdate("k", (ops.Set("", 1),), told), Reply()))
        actor.keep_order()
        busy.open()
        holder()
        told.wait_until_reached()
        reads = {
            "get": lambda: engine.get("s", "k"),
            "list": lambda: engine.list("s")[0],
            "aio.get": lambda: asyncio.run(engine.aio.get("s", "k")),
            "aio.list": lambda: asyncio.run(engine.aio.list("s"))[0],
        }
        answers: list[Any] = []
        reading = in_thread(lambda: answers.append(reads[read]()))
        while not actor._mailbox and not answers:
            engine.health()
        told.open()
        reading()
        assert answers == [1]

        while actor.readable is None:  # until reads need no turn again
            engine.health()


def test_told_messages_keep_their_order_under_load() -> None:
    seen = Seen()
    with Engine() as engine:
        engine.on_change()(seen)

        def work(name: str) -> None:
            for number in range(0, 200, 2):
                engine.tell(messages.Set("s", name, number))
                assert engine.set("s", name, number + 1).old_value == number

        for wait in [in_thread(lambda name=name: work(name)) for name in "abcd"]:
            wait()
        engine.drain(timeout=PATIENCE_S)

    for name in "abcd":
        assert [event.new_value for event in seen.events if event.key == name] == list(range(200))
