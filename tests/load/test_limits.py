"""Load that a bounded engine survives: at a bound, calls wait or are refused, or events are dropped; all is counted."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from reliability.living import PATIENCE_S, InThread, Seen

from scopestate import Engine, messages
from scopestate.actors.router import Routed
from scopestate.errors import EventLoopDetected, EventNotDelivered, HandlerTimeout, Overloaded, ValueTooLarge

OpenEngine = Callable[..., Engine]
ADD = [{"type": "increment", "path": "", "by": 1}]


class Gate:
    """A handler that stands still until the test lets it go."""

    def __init__(self) -> None:
        self.inside = threading.Event()
        self.open = threading.Event()
        self.values: list[Any] = []

    def __call__(self, event: Any) -> None:
        self.inside.set()
        assert self.open.wait(PATIENCE_S)
        self.values.append(event.new_value)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


# --- handlers slower than writers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "kept"), [("drop_oldest", range(990, 1000)), ("reject", range(1, 11))])
def test_a_slow_handler_loses_events_by_its_policy_and_each_is_counted(
    open_engine: OpenEngine, gate: Gate, policy: str, kept: range
) -> None:
    letters: list[Any] = []
    engine = open_engine(limits={"handler_mailbox": 10, "handler_when_full": policy}, on_dead_letter=letters.append)
    quick = Seen()
    engine.on_change(scope="s", function_id="slow")(gate)
    engine.on_change(scope="s", function_id="quick")(quick)
    engine.set("s", "k", 0)
    assert gate.inside.wait(PATIENCE_S)

    for number in range(1, 1000):
        engine.set("s", "k", number)
        quick.wait_for(number + 1)  # so that the fast one never fills up
    gate.open.set()
    engine.drain(PATIENCE_S)

    assert gate.values == [0, *kept]
    assert [event.new_value for event in quick.events] == list(range(1000))
    stats = engine.stats()
    assert (stats.dropped, stats.deliveries, stats.events) == (989, 1011, 1000)
    wait_until(lambda: len(letters) == 989)  # `drain` does not wait for hooks
    assert {type(letter.error) for letter in letters} == {EventNotDelivered}


def test_with_block_writers_wait_and_are_refused_after_their_time(open_engine: OpenEngine, gate: Gate) -> None:
    engine = open_engine(limits={"handler_mailbox": 10, "call_timeout_ms": 50})
    engine.on_change(scope="s")(gate)
    refused = 0
    texts: set[str] = set()

    engine.set("s", "k", 0)
    assert gate.inside.wait(PATIENCE_S)
    for number in range(1, 30):
        try:
            engine.set("s", "k", number)
        except Overloaded as error:
            refused += 1
            texts.add(str(error))
        else:
            assert refused == 0, "a write was taken after one had been refused"
            wait_until_routed(engine)
    written = 30 - refused
    assert all("handler" in text for text in texts)

    assert 10 <= written <= 12
    assert engine.get("s", "k") == written - 1
    assert engine.set("other", "k", 1).created
    stats = engine.stats()
    assert stats.refused == refused
    assert stats.blocked >= refused
    assert engine.stats().mailboxes.handlers <= 11
    gate.open.set()
    engine.drain(PATIENCE_S)
    assert gate.values == list(range(written))
    assert engine.stats().dropped == 0


def test_with_block_nothing_piles_up_behind_a_handler_that_stands_still(open_engine: OpenEngine, gate: Gate) -> None:
    engine = open_engine(limits={"handler_mailbox": 1, "call_timeout_ms": 1, "scope_mailbox": 100})
    engine.on_change(scope="s")(gate)
    engine.set("s", "k", 0)
    assert gate.inside.wait(PATIENCE_S)

    engine.set("s", "k", 0)
    wait_until_routed(engine)
    for number in range(200):
        with pytest.raises(Overloaded):
            engine.set("s", "k", number)
    assert len(engine._router.backlog._writers) == 0

    for number in range(1000):
        engine.tell(messages.Set("s", "k", number))
    replies: list[Any] = []
    for number in range(1000):
        with contextlib.suppress(Overloaded):  # while the scope is busy, its mailbox may be full
            replies.append(engine.ask(messages.Set("s", "k", number), block=False))

    assert len(engine._router.backlog._writers) + engine.stats().mailboxes.scopes <= 200
    with pytest.raises(Overloaded):
        replies[-1].get(timeout=PATIENCE_S)
    gate.open.set()


def test_asyncio_writers_wait_without_blocking_their_loop(open_engine: OpenEngine, gate: Gate) -> None:
    engine = open_engine(limits={"handler_mailbox": 5})
    engine.on_change(scope="s")(gate)

    async def main() -> None:
        writers = [asyncio.create_task(engine.aio.set("s", "k", number)) for number in range(100)]
        for number in range(100):  # the loop continues, and so do other scopes
            await engine.aio.set("other", "k", number)
            await asyncio.sleep(0)
        assert sum(writer.done() for writer in writers) <= 7
        gate.open.set()
        await asyncio.wait_for(asyncio.gather(*writers), PATIENCE_S)

    asyncio.run(main())
    engine.drain(PATIENCE_S)

    assert sorted(gate.values) == list(range(100))


# --- a handler that never returns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["block", "drop_oldest", "reject"])
def test_a_handler_that_never_returns_harms_no_other_and_is_reported(
    open_engine: OpenEngine, gate: Gate, policy: str
) -> None:
    failures: list[Any] = []
    engine = open_engine(
        limits={"handler_timeout_ms": 1_000, "close_grace_ms": 100, "handler_when_full": policy},
        on_error=failures.append,
    )
    seen = Seen()
    engine.on_change(scope="s", key="bad", function_id="hangs")(gate)
    engine.on_change(scope="s", function_id="works")(seen)
    engine.set("s", "bad", 1)
    assert gate.inside.wait(PATIENCE_S)

    for number in range(1000):
        engine.set("s", "good", number)

    assert len(seen.wait_for(1001)) == 1001
    InThread(lambda: wait_until(lambda: failures)).result()
    assert isinstance(failures[0].error, HandlerTimeout)
    assert any("hangs" in problem for problem in engine.health().problems)
    assert engine.stats().timeouts == 1
    engine.close()
    assert engine.closed


def test_a_hundred_handlers_that_never_return_do_not_take_the_threads_of_the_others(
    open_engine: OpenEngine, gate: Gate
) -> None:
    engine = open_engine(limits={"close_grace_ms": 100})
    for number in range(100):
        engine.on_change(scope="s", function_id=f"hangs {number}")(gate)
    seen = Seen()
    engine.on_change(scope="s", function_id="works")(seen)

    for number in range(100):
        engine.set("s", "k", number)

    assert len(seen.wait_for(100)) == 100
    gate.open.set()


def wait_until_routed(engine: Engine) -> None:
    """Wait until the handlers have every event: of those in the router's hand one is counted nowhere."""
    engine._router.ask(Routed()).get(timeout=PATIENCE_S)


def wait_until(condition: Callable[[], Any]) -> None:
    pause = threading.Event()
    while not condition():
        pause.wait(0.002)


# --- handlers that fire themselves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["memory", "interval", "commit"])
def test_a_handler_that_writes_what_fires_it_is_cut_at_the_bound_and_reported(
    open_engine: OpenEngine, durability: str
) -> None:
    letters: list[Any] = []
    engine = open_engine(durability, limits={"max_event_depth": 50}, on_dead_letter=letters.append)
    engine.on_change(scope="s")(lambda event: engine.update("s", "n", ADD))
    seen = Seen()
    engine.on_change(scope="other")(seen)

    engine.set("s", "n", 0)
    engine.drain(PATIENCE_S)

    assert engine.get("s", "n") == 51
    assert engine.stats().loops_cut == 1
    wait_until(lambda: letters)  # `drain` does not wait for hooks
    assert [type(letter.error) for letter in letters] == [EventLoopDetected]
    assert "max_event_depth = 50" in str(letters[0].error)
    engine.set("other", "k", 1)
    seen.wait_for(1)
    engine.set("s", "n", 0)  # a new chain from outside begins at depth 0 again
    engine.drain(PATIENCE_S)
    assert engine.stats().loops_cut == 2


def test_two_handlers_that_fire_each_other_are_cut_too_also_coroutines(open_engine: OpenEngine) -> None:
    engine = open_engine(limits={"max_event_depth": 20})

    async def ping(event: Any) -> None:
        await engine.aio.update("pong", "n", ADD)

    engine.on_change(scope="ping")(ping)
    engine.on_change(scope="pong")(
        lambda event: engine.call("state::update", {"scope": "ping", "key": "n", "ops": ADD})
    )

    engine.set("ping", "n", 0)
    engine.drain(PATIENCE_S)

    assert engine.stats().loops_cut == 1
    assert engine.get("ping", "n") + engine.get("pong", "n") == 21


def test_a_loop_that_doubles_stays_within_the_mailboxes(open_engine: OpenEngine) -> None:
    """Two handlers that both write what fires both: depth alone does not end that, the mailboxes bound it."""
    engine = open_engine(limits={"handler_mailbox": 200, "max_event_depth": 10_000, "close_grace_ms": 50})
    deepest: list[int] = []
    for _ in range(2):
        engine.on_change(scope="s", function_id=f"double {_}")(lambda event: engine.update("s", "n", ADD))

    engine.set("s", "n", 0)
    while len(deepest) < 200:
        stats = engine.stats()
        deepest.append(max(stats.mailboxes.deepest_handler, stats.mailboxes.router))
        engine.set("other", "k", 1)
        threading.Event().wait(0.001)

    assert max(deepest) <= 201
    assert engine.stats().refused > 0
    for handle in engine.triggers():
        handle.unregister()


def test_events_that_the_router_is_passing_on_count_as_waiting(open_engine: OpenEngine) -> None:
    """Or a writer that comes just then would be let in once more for each of them."""
    engine = open_engine(limits={"handler_mailbox": 10, "call_timeout_ms": 300})
    router, passing, go_on = engine._parts.router, threading.Event(), threading.Event()
    pass_on = router._pass_on

    def pass_on_later(item: Any) -> None:
        passing.set()
        assert go_on.wait(PATIENCE_S)
        pass_on(item)

    seen: list[int] = []
    engine.on_change(scope="s")(lambda event: seen.append(event.new_value))
    router._pass_on = pass_on_later  # type: ignore[method-assign]
    with engine.batch("s") as batch:
        for number in range(10):
            batch.set(f"key {number}", number)
    assert passing.wait(PATIENCE_S)

    with pytest.raises(Overloaded, match="is full"):
        for number in range(10, 25):
            engine.set("s", f"key {number}", number)
    refused_at = number
    go_on.set()
    engine.drain(PATIENCE_S)

    assert refused_at <= 11  # one is in the hand of the router
    assert seen == list(range(refused_at))


# --- too many writers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_writers_over_the_bound_of_a_mailbox_are_refused_counted_and_nothing_else_is_lost(
    open_engine: OpenEngine, durability: str, tmp_path: Any
) -> None:
    engine = open_engine(durability, limits={"scope_mailbox": 20})
    hold_turn = threading.Event()
    in_turn = threading.Event()
    actor = engine._scopes["hot"]
    engine.set("hot", "n", 0)
    collect = actor.collect

    def slow_collect() -> Any:
        in_turn.set()
        assert hold_turn.wait(PATIENCE_S)
        return collect()

    actor.collect = slow_collect  # type: ignore[method-assign]
    engine.tell(messages.Update("hot", "n", ADD))  # type: ignore[arg-type]
    flush = InThread(engine.flush)
    assert in_turn.wait(PATIENCE_S)

    async def main() -> list[Any]:
        writers = [asyncio.create_task(engine.aio.update("hot", "n", ADD)) for _ in range(1000)]
        await asyncio.sleep(0)
        assert await engine.aio.set("other", "k", 1)
        hold_turn.set()
        return await asyncio.gather(*writers, return_exceptions=True)

    if durability == "commit":
        hold_turn.set()
    results = asyncio.run(main())
    flush.result()

    refused = [result for result in results if isinstance(result, Overloaded)]
    assert [result for result in results if isinstance(result, Exception)] == refused
    if durability == "interval":
        assert len(refused) == 980
    assert engine.stats().refused == len(refused)
    assert engine.get("hot", "n") == 1 + 1000 - len(refused)
    engine.flush()
    assert engine.health().ok


def test_saving_goes_on_when_the_mailbox_of_a_scope_is_full(open_engine: OpenEngine) -> None:
    """The snapshot actor's message must get in, or what the scope holds would never be saved again."""
    engine = open_engine("interval", save_interval_ms=3_600_000, limits={"scope_mailbox": 1, "call_timeout_ms": 20})
    engine.set("s", "k", 1)
    actor = engine._scopes["s"]
    actor._claim["holder"] = -1  # another thread is in a long turn
    engine.tell(messages.Set("s", "k", 2))
    with pytest.raises(Overloaded):
        engine.tell(messages.Set("s", "k", 3))

    flush = InThread(engine.flush)
    InThread(lambda: wait_until(lambda: len(actor._mailbox) == 2)).result()
    del actor._claim["holder"]
    actor.wake()
    flush.result()

    assert engine.get("s", "k") == 2
    engine.flush()
    assert engine.stats().unsaved_scopes == 0


# --- too large values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["memory", "interval", "commit"])
def test_a_value_over_the_limit_is_refused_also_when_an_update_grows_it(
    open_engine: OpenEngine, durability: str
) -> None:
    engine = open_engine(durability, limits={"max_value_bytes": 100})
    seen = Seen()
    engine.on_change(scope="s")(seen)
    engine.set("s", "k", "x" * 98)

    for write in (
        lambda: engine.set("s", "k", "x" * 99),
        lambda: engine.update("s", "k", [{"type": "append", "path": "", "value": "x"}]),
        lambda: engine.call("state::set", {"scope": "s", "key": "k", "value": "x" * 99}),
        lambda: engine.ask(messages.Set("s", "k", "x" * 99)),
        lambda: asyncio.run(engine.aio.set("s", "k", "x" * 99)),
        lambda: asyncio.run(engine.aio.update("s", "k", [{"type": "append", "path": "", "value": "x"}])),
    ):
        with pytest.raises(ValueTooLarge) as caught:
            write()
        assert caught.value.code == "VALUE_TOO_LARGE"

    assert engine.get("s", "k") == "x" * 98
    engine.drain(PATIENCE_S)
    assert len(seen.events) == 1
