"""Writers that wait for a full handler: each goes on when there is room, none spins, none is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from scopestate import Engine, StateEvent
from scopestate.actors.backlog import Backlog, Limits
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.functions import Functions
from scopestate.actors.handler import HandlerActor
from scopestate.actors.loops import LoopThread
from scopestate.actors.services import HandlerServices
from scopestate.actors.triggers import TriggerTable
from scopestate.config import Config, LimitsConfig, ScopeRule
from scopestate.errors import Overloaded
from scopestate.ops import messages
from scopestate.ops.triggers import Trigger
from scopestate.persistence import ScopeChange, ScopeState, Store

SLOW_S = 10.0


class KeepsAdapter(Store):
    """Accepts every save and remembers when it came."""

    def __init__(self, dispatcher: DeterministicDispatcher) -> None:
        self._dispatcher = dispatcher
        self.saved_at: list[float] = []

    def load(self, scope: str) -> ScopeState:
        return ScopeState.of({}, 0)

    def scopes(self) -> list[str]:
        return []

    def save(self, batch: Sequence[ScopeChange]) -> None:
        self.saved_at.append(self._dispatcher.monotonic())

    def close(self) -> None:
        """Nothing to release."""


@pytest.fixture
def dispatcher(no_thread_left: None) -> DeterministicDispatcher:
    return DeterministicDispatcher(1, switch=0, busy=0)


@pytest.fixture
def open_slow(dispatcher: DeterministicDispatcher) -> Iterator[Callable[..., Engine]]:
    """Open an engine whose one handler takes ten virtual seconds per event and has room for one that waits."""
    engines: list[Engine] = []

    def open_(**limits: Any) -> Engine:
        limits = {"handler_mailbox": 1, "call_timeout_ms": 0, "close_grace_ms": 600_000, **limits}
        config = Config(limits=LimitsConfig(**limits), scopes=(ScopeRule("commit", prefix="commit"),))
        engine = Engine(config, adapter=KeepsAdapter(dispatcher), dispatcher=dispatcher, handle_sigterm=False)
        engine.on_change()(lambda event: dispatcher.sleep(SLOW_S))
        engines.append(engine)
        return engine

    yield open_
    for engine in engines:
        engine.close()


def fill(engine: Engine, dispatcher: DeterministicDispatcher) -> None:
    """Have one event in the handler and one in its mailbox."""
    engine.set("s", "k", 1)
    dispatcher.run_until_idle()
    engine.set("s", "k", 2)
    dispatcher.run_until_idle()


def test_a_writer_that_waits_takes_no_turns_meanwhile(
    dispatcher: DeterministicDispatcher, open_slow: Callable[..., Engine]
) -> None:
    engine = open_slow()
    fill(engine, dispatcher)
    dispatcher.submit(lambda: engine.set("s", "k", 3))
    before = len(dispatcher.history)
    dispatcher.advance(SLOW_S / 2)

    assert len(dispatcher.history) - before < 10
    dispatcher.advance(SLOW_S)
    assert engine.get("s", "k") == 3


@pytest.mark.parametrize("scope", ["s", "commit"])
def test_messages_that_went_without_their_sender_take_no_turns_meanwhile(
    scope: str, dispatcher: DeterministicDispatcher, open_slow: Callable[..., Engine]
) -> None:
    engine = open_slow()
    fill(engine, dispatcher)
    replies = [engine.ask(messages.Set(scope, "k", value), block=False) for value in (3, 4)]
    before = len(dispatcher.history)
    dispatcher.advance(SLOW_S / 2)

    assert len(dispatcher.history) - before < 20
    assert [reply.done for reply in replies] == [False, False]
    dispatcher.advance(4 * SLOW_S)
    assert sorted(reply.get().new_value for reply in replies) == [3, 4]


def test_a_message_that_is_refused_at_its_second_try_says_so_and_the_others_go_on(
    dispatcher: DeterministicDispatcher, open_slow: Callable[..., Engine]
) -> None:
    engine = open_slow(scope_mailbox=1)
    fill(engine, dispatcher)
    replies = [engine.ask(messages.Set("s", "k", value), block=False) for value in (3, 4, 5)]

    for _ in range(8):
        dispatcher.advance(SLOW_S)

    assert all(reply.done for reply in replies)
    refused = 0
    for reply in replies:
        try:
            reply.get()
        except Overloaded:
            refused += 1
    assert 0 < refused < 3


def test_room_that_came_before_the_writer_asked_for_it_counts(
    dispatcher: DeterministicDispatcher, open_slow: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_slow()
    fill(engine, dispatcher)
    when_room = Backlog.when_room

    def too_late(backlog: Backlog, *waiting: Any) -> None:
        monkeypatch.setattr(Backlog, "when_room", when_room)
        dispatcher.advance(3 * SLOW_S)  # every handler is done before the writer is on the list
        when_room(backlog, *waiting)

    monkeypatch.setattr(Backlog, "when_room", too_late)
    reply = engine.ask(messages.Set("s", "k", 3), block=False)

    dispatcher.run_until_idle()
    assert reply.done
    assert reply.get().new_value == 3


def test_a_trigger_that_is_registered_while_a_write_looks_for_triggers_sees_the_next_write() -> None:
    table = TriggerTable(lambda trigger: HandlerActor(trigger, _services()))
    first = table.register(Trigger("a", "a", scope="s"))
    bucket = table.watch("s")[None]
    late: list[HandlerActor] = []

    class Registers(dict[int, HandlerActor]):
        def values(self) -> Any:
            seen = list(super().values())
            if not late:  # between the look-up and the keeping of what was found
                late.append(table.register(Trigger("b", "b", scope="s")))
            return seen

    bucket.members = Registers(bucket.members)

    assert table.watch("s").match("k") == (first,)
    assert table.watch("s").match("k") == (first, *late)


def test_a_new_interval_counts_from_the_last_save(dispatcher: DeterministicDispatcher, no_thread_left: None) -> None:
    adapter = KeepsAdapter(dispatcher)
    with Engine(Config(), adapter=adapter, dispatcher=dispatcher, handle_sigterm=False) as engine:
        engine._snapshot.set_interval(1.0)
        engine.set("s", "k", 1)
        for interval_s in (2.0, 1.0, 2.0, 1.0):
            dispatcher.advance(0.2)
            engine._snapshot.set_interval(interval_s)
        dispatcher.advance(0.5)

        assert adapter.saved_at == [1.0]


@pytest.mark.parametrize("seed", range(20))
def test_closing_answers_whoever_waits_for_a_busy_scope(seed: int, no_thread_left: None) -> None:
    dispatcher = DeterministicDispatcher(seed, switch=0.2, busy=1)
    engine = Engine(dispatcher=dispatcher)
    seen: list[StateEvent] = []
    engine.on_change(scope="s")(seen.append)
    replies = [engine.ask(messages.Set("s", "k", value), block=False) for value in range(3)]

    engine.close()

    assert all(reply.done for reply in replies)
    answered = [reply for reply in replies if reply._error is None]
    assert len(seen) == len(answered)


def _services() -> HandlerServices:
    return HandlerServices(
        DeterministicDispatcher(1), Functions(), Limits(), LoopThread("scopestate-loop"), lambda failure: None
    )
