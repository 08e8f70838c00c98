"""Our actors through Pykka's eyes: our refs behave like Pykka's, and a host's Pykka leaves engines alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pykka
import pytest
from watching import PATIENCE_S, Gate, in_thread

from scopestate import Engine, messages, ops
from scopestate.actors.dispatcher import ThreadDispatcher
from scopestate.actors.reply import Reply
from scopestate.actors.turn import TurnActor
from scopestate.errors import DeserializationError, WouldDeadlock


class Counter(TurnActor):
    """Counts; knows how to fail, to hold up, and to tell what Pykka's hooks were called."""

    name_tag = "a counter"

    def __init__(self, dispatcher: ThreadDispatcher) -> None:
        super().__init__(dispatcher)
        self.count = 0
        self.hooks: list[str] = []

    def add(self, number: int, *, times: int = 1) -> int:
        self.count += number * times
        return self.count

    def on_start(self) -> None:
        self.hooks.append("start")

    def on_stop(self) -> None:
        self.hooks.append("stop")

    def on_failure(self, *failure: Any) -> None:
        self.hooks.append(f"failure: {failure[1]}")

    def on_receive(self, message: Any) -> Any:
        if isinstance(message, BaseException):
            raise message
        if callable(message):
            return message()
        self.count += message
        return self.count


class CallerCounter(Counter):
    """The same, on its callers' threads."""

    caller_runs = True


@pytest.fixture
def dispatcher() -> Iterator[ThreadDispatcher]:
    dispatcher = ThreadDispatcher("scopestate-test")
    yield dispatcher
    dispatcher.close()


@pytest.fixture(params=[Counter, CallerCounter])
def ref(request: pytest.FixtureRequest, dispatcher: ThreadDispatcher) -> pykka.ActorRef[Counter]:
    started: pykka.ActorRef[Counter] = request.param.start(dispatcher)
    return started


# ----------------------------------------------------------------------------------------------- refs as Pykka has them


def test_a_ref_asks_and_tells(ref: pykka.ActorRef[Counter]) -> None:
    assert isinstance(ref, pykka.ActorRef)
    ref.tell(1)
    assert ref.ask(2) == 3
    future = ref.ask(3, block=False)
    assert isinstance(future, pykka.Future)
    assert future.get(timeout=PATIENCE_S) == 6
    assert future.get(timeout=0) == 6


def test_a_ref_knows_its_actor(ref: pykka.ActorRef[Counter]) -> None:
    assert ref.actor_class in (Counter, CallerCounter)
    assert ref.actor_urn.startswith("urn:uuid:")
    assert ref.actor_urn in repr(ref)
    assert ref.ask(lambda: 5) == 5


def test_an_error_during_ask_reaches_the_caller_and_the_actor_lives(ref: pykka.ActorRef[Counter]) -> None:
    with pytest.raises(LookupError, match="no"):
        ref.ask(LookupError("no"))
    future = ref.ask(LookupError("no"), block=False)
    with pytest.raises(LookupError, match="no"):
        future.get(timeout=PATIENCE_S)

    assert ref.ask(1) == 1
    assert ref.is_alive()


def test_an_error_during_tell_stops_the_actor_and_is_logged(
    ref: pykka.ActorRef[Counter], caplog: pytest.LogCaptureFixture
) -> None:
    hooks = ref.proxy().hooks.get(timeout=PATIENCE_S)
    ref.tell(LookupError("no"))
    assert ref.actor_stopped.wait(PATIENCE_S)

    assert not ref.is_alive()
    with pytest.raises(pykka.ActorDeadError):
        ref.ask(1)
    with pytest.raises(pykka.ActorDeadError):
        ref.tell(1)
    assert hooks == ["start", "failure: no"]
    assert "LookupError" in caplog.text


def test_stop_ends_an_actor_behind_what_waits(ref: pykka.ActorRef[Counter]) -> None:
    hooks = ref.proxy().hooks.get(timeout=PATIENCE_S)
    ref.tell(1)

    assert ref.stop(timeout=PATIENCE_S) is True
    assert not ref.is_alive()
    assert ref.stop(timeout=PATIENCE_S) is False
    assert ref.ask(1, block=False) is not None
    with pytest.raises(pykka.ActorDeadError):
        ref.ask(1)
    assert hooks == ["start", "stop"]


def test_stopping_without_waiting_gives_a_future(ref: pykka.ActorRef[Counter]) -> None:
    assert ref.stop(block=False).get(timeout=PATIENCE_S) is True


def test_messages_behind_a_stop_are_refused(dispatcher: ThreadDispatcher) -> None:
    gate = Gate()
    ref = Counter.start(dispatcher)
    ref.tell(gate)
    gate.wait_until_reached()
    stopping = ref.stop(block=False)
    late = ref.ask(1, block=False)
    gate.open()

    assert stopping.get(timeout=PATIENCE_S) is True
    with pytest.raises(pykka.ActorDeadError):
        late.get(timeout=PATIENCE_S)


def test_a_proxy_calls_methods_reads_and_writes_attributes(ref: pykka.ActorRef[Counter]) -> None:
    proxy = ref.proxy()

    assert proxy.add(2, times=3).get(timeout=PATIENCE_S) == 6
    proxy.count = 40
    assert proxy.count.get(timeout=PATIENCE_S) == 40
    assert proxy.add(2).join(proxy.add(3)).get(timeout=PATIENCE_S) == [42, 45]
    assert proxy.name_tag.get(timeout=PATIENCE_S) == "a counter"
    with pytest.raises(AttributeError, match="nothing"):
        proxy.nothing  # noqa: B018 - reading it is the test
    assert pykka.get_all([proxy.add(0), proxy.add(1)], timeout=PATIENCE_S) == [45, 46]


def test_a_proxy_reaches_what_an_attribute_holds(dispatcher: ThreadDispatcher) -> None:
    class Clock:
        ticks = 3

        def add(self, number: int) -> int:
            self.ticks += number
            return self.ticks

    class Holder(Counter):
        clock = pykka.traversable(Clock())

    proxy = Holder.start(dispatcher).proxy()

    assert proxy.clock.ticks.get(timeout=PATIENCE_S) == 3
    proxy.clock.ticks = 5
    assert proxy.clock.add(2).get(timeout=PATIENCE_S) == 7


def test_an_actor_whose_start_fails_is_stopped_and_that_is_logged(
    dispatcher: ThreadDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Counter):
        def on_start(self) -> None:
            raise LookupError("no start")

    ref = Failing.start(dispatcher)

    assert not ref.is_alive()
    assert "no start" in caplog.text
    with pytest.raises(pykka.ActorDeadError):
        ref.ask(1)


def test_futures_can_be_mapped_filtered_reduced_and_joined(ref: pykka.ActorRef[Counter]) -> None:
    numbers = ref.ask(lambda: [1, 2, 3], block=False)

    assert numbers.map(len).get(timeout=PATIENCE_S) == 3
    assert numbers.filter(lambda number: number > 1).get(timeout=PATIENCE_S) == [2, 3]
    assert numbers.reduce(lambda a, b: a + b).get(timeout=PATIENCE_S) == 6
    assert numbers.join(ref.ask(5, block=False)).get(timeout=PATIENCE_S) == [[1, 2, 3], 5]
    assert asyncio.run(awaited(numbers.map(len))) == 3


async def awaited(future: Any) -> Any:
    return await future


def test_a_future_out_of_time_raises_pykkas_timeout(dispatcher: ThreadDispatcher) -> None:
    gate = Gate()
    ref = Counter.start(dispatcher)
    future = ref.ask(gate, block=False)
    gate.wait_until_reached()

    with pytest.raises(pykka.Timeout):
        future.get(timeout=0.01)
    with pytest.raises(pykka.Timeout):
        ref.ask(1, timeout=0.01)
    gate.open()
    assert future.get(timeout=PATIENCE_S) is None


def test_replies_keep_pykkas_promises() -> None:
    reply: Reply[int] = Reply()
    called: list[Any] = []
    assert "open" in repr(reply)
    reply.add_done_callback(called.append)
    reply.set(5)
    reply.add_done_callback(called.append)

    assert "delivered" in repr(reply)
    assert called == [reply, reply]
    with pytest.raises(RuntimeError, match="twice"):
        reply.set(6)
    assert reply.get() == 5

    failed: Reply[int] = Reply()
    with pytest.raises(ValueError, match="exception"):
        failed.set_exception()
    try:
        raise LookupError("no")
    except LookupError:
        failed.set_exception()
    with pytest.raises(LookupError):
        failed.get()

    given: Reply[int] = Reply()
    given.set_exception((ValueError, ValueError("given"), None))
    with pytest.raises(ValueError, match="given"):
        given.get()


def test_an_actor_that_asks_itself_is_refused_at_once(ref: pykka.ActorRef[Counter]) -> None:
    with pytest.raises(WouldDeadlock):
        ref.ask(lambda: ref.ask(1))
    assert ref.ask(1) == 1


def test_our_actors_are_not_in_pykkas_registry(ref: pykka.ActorRef[Counter], engine: Engine) -> None:
    engine.set("s", "k", 1)

    assert pykka.ActorRegistry.get_all() == []
    assert ref not in pykka.ActorRegistry.get_by_class(Counter)


# ------------------------------------------------------------------------------------------------------- scopes' refs


class HostActor(pykka.ThreadingActor):
    """An actor of the program that embeds the engine."""

    def on_receive(self, message: Any) -> Any:
        return message


def test_a_host_that_stops_all_its_actors_stops_no_engine(open_file_store: Any) -> None:
    engine = open_file_store()
    engine.set("s", "k", 1)
    ref = engine.scope("s").actor_ref
    host = HostActor.start()

    pykka.ActorRegistry.stop_all()

    assert not host.is_alive()
    assert ref.is_alive()
    assert engine.set("s", "k", 2).old_value == 1
    engine.close()
    assert open_file_store().get("s", "k") == 2


def test_a_scopes_ref_takes_the_public_messages(open_store: Any) -> None:
    engine = open_store()
    ref = engine.scope("s").actor_ref

    assert isinstance(ref, pykka.ActorRef)
    assert ref.ask(messages.Set("s", "k", 1)).created
    assert ref.ask(messages.Update("s", "k", (ops.Increment("", 1),))).new_value == 2
    assert ref.ask(messages.Get("s", "k")) == 2
    assert ref.ask(messages.Get("s", "missing")) is None
    assert ref.ask(messages.List("s")) == [2]
    assert ref.ask(messages.Get("s", "k"), block=False).get(timeout=PATIENCE_S) == 2
    ref.tell(messages.Set("s", "told", [1]))
    assert pykka.get_all([ref.ask(messages.Get("s", "told"), block=False)], timeout=PATIENCE_S) == [[1]]
    assert ref.ask(messages.Delete("s", "k")) == 2
    assert engine.list("s") == [[1]]
    assert ref.is_alive()


@pytest.mark.parametrize(
    "message",
    [None, 5, "set", {"type": "set"}, messages.ListGroups(), messages.Set("other", "k", 1), messages.Get("s", 5)],  # type: ignore[arg-type]
    ids=repr,
)
def test_what_is_no_message_for_a_scope_is_refused_and_the_scope_lives_on(
    message: Any, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    ref = engine.scope("s").actor_ref

    with pytest.raises(DeserializationError):
        ref.ask(message)
    ref.tell(message)
    assert ref.ask(messages.Set("s", "k", 1)).created
    assert "was refused" in caplog.text
    assert engine.list_groups() == ["s"]


def test_a_proxy_of_a_scope_is_refused_and_the_scope_lives_on(open_store: Any) -> None:
    engine = open_store()
    engine.set("s", "k", 1)
    proxy = engine.scope("s").actor_ref.proxy()

    with pytest.raises(DeserializationError, match="ProxyGetAttr is not a message"):
        proxy.scope.get(timeout=PATIENCE_S)
    with pytest.raises(DeserializationError, match="ProxyCall is not a message"):
        proxy.key_count().get(timeout=PATIENCE_S)
    assert engine.get("s", "k") == 1


def test_stopping_a_scopes_ref_loses_nothing(open_store: Any) -> None:
    engine = open_store()
    engine.set("s", "k", 1)
    ref = engine.scope("s").actor_ref

    ref.stop(timeout=PATIENCE_S)

    assert engine.get("s", "k") == 1
    assert engine.set("s", "k", 2).old_value == 1
    assert engine.ask(messages.Update("s", "k", (ops.Increment("", 1),))).new_value == 3
    assert engine.ask(messages.Get("s", "k"), block=False).get(timeout=PATIENCE_S) == 3
    assert asyncio.run(engine.aio.delete("s", "k")) == 3
    engine.set("s", "k", 4)
    engine.drain(timeout=PATIENCE_S)
    if open_store.kind != "memory":
        engine.close()
        assert open_store().get("s", "k") == 4


def test_a_host_actor_may_use_the_engine_and_be_used_by_handlers(engine: Engine) -> None:
    class Host(pykka.ThreadingActor):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []
            self.arrived = threading.Event()

        def on_receive(self, message: Any) -> Any:
            self.seen.append(message)
            engine.update("seen", "count", [ops.Increment("", 1)])
            self.arrived.set()
            return list(self.seen)

    host = Host.start()
    arrived = host.proxy().arrived.get(timeout=PATIENCE_S)
    try:
        engine.on_change(scope="s")(lambda event: host.tell(dict(event)))
        engine.set("s", "k", 1)
        assert arrived.wait(PATIENCE_S)
        assert host.ask("end", timeout=PATIENCE_S)[0]["new_value"] == 1
    finally:
        host.stop()
    assert engine.get("seen", "count") == 2


def test_many_threads_ask_one_ref(engine: Engine) -> None:
    ref = engine.scope("s").actor_ref

    def work() -> None:
        for _ in range(100):
            ref.ask(messages.Update("s", "n", (ops.Increment("", 1),)))

    for wait in [in_thread(work) for _ in range(8)]:
        wait()

    assert engine.get("s", "n") == 800
