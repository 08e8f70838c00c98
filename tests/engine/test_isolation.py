"""What the program's code raises, or does to its event loop, ends one call and takes nothing else along."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import sys
import threading
import time
import types
import xmlrpc.client
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ids import stable
from watching import PATIENCE_S, Failures, Gate, LoopThread, Seen, SlowUpdate, in_thread, until

from scopestate import Engine, StateEvent, messages
from scopestate.actors import gate
from scopestate.actors.local import LocalScope
from scopestate.actors.reply import Envelope, Reply
from scopestate.actors.services import Reporter
from scopestate.config import from_mapping
from scopestate.errors import FunctionFailed, HandlerTimeout, InvalidRegistration, ReplyTimeout, StorageError
from scopestate.ops.results import DeliveryFailure


class Odd(BaseException):
    """A base exception of the program's own."""


class Unreadable(Exception):
    """An exception whose text ends the process, if it can."""

    def __str__(self) -> str:
        raise SystemExit("in __str__")

    __repr__ = __str__


THROWN: list[type[BaseException]] = [
    SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, RecursionError, StopIteration, StopAsyncIteration,
    asyncio.CancelledError, Odd, Unreadable, ValueError,
]  # fmt: skip


def throw(error: type[BaseException]) -> Any:
    raise error


@pytest.fixture
def quiet_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """No thread may die: what would kill one is kept here."""
    died: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    yield died
    assert died == []


@pytest.fixture(autouse=True)
def no_thread_dies(quiet_threads: list[Any]) -> None:
    """For every test here."""


# --------------------------------------------------------------------------------------- handlers, conditions, hooks


def handler_for(place: str, error: type[BaseException], engine: Engine, seen: Seen) -> None:
    """Have code at `place` throw for the key "bad"; the events of the other keys reach `seen`."""

    def bad(event: StateEvent) -> None:
        if event.key == "bad":
            throw(error)

    async def bad_later(event: StateEvent) -> None:
        await asyncio.sleep(0)
        bad(event)

    def plain(event: StateEvent) -> None:
        bad(event)
        seen(event)

    async def coroutine(event: StateEvent) -> None:
        await bad_later(event)
        seen(event)

    if place == "handler":
        engine.on_change(scope="s")(plain)
    elif place == "async handler":
        engine.on_change(scope="s")(coroutine)
    else:
        engine.register_function("app::condition", bad if place == "condition" else bad_later)
        engine.on_change(scope="s", condition="app::condition")(seen)


@pytest.mark.parametrize("place", ["handler", "async handler", "condition", "async condition"])
@pytest.mark.parametrize("error", THROWN)
def test_whatever_a_handler_raises_fails_its_event_and_no_other(
    error: type[BaseException], place: str, open_engine: Any
) -> None:
    failures, seen, other = Failures(), Seen(), Seen()
    engine = open_engine(on_error=failures)
    handler_for(place, error, engine, seen)

    @engine.on_change(scope="s")
    async def beside(event: StateEvent) -> None:
        other(event)

    for key in ("a", "bad", "b"):
        engine.set("s", key, 1)
    engine.drain(PATIENCE_S)

    assert (seen.keys, other.keys) == (["a", "b"], ["a", "bad", "b"])
    [failure] = failures.all
    if error is StopIteration and place.startswith("async"):
        error = RuntimeError  # Python's own doing, in every coroutine
    assert (failure.event.key, type(failure.error), failure.final) == ("bad", error, True)
    assert engine.stats().failures == 1
    assert engine.health().ok


@pytest.mark.parametrize("error", THROWN)
def test_whatever_a_hook_raises_ends_that_report_alone(error: type[BaseException], open_engine: Any) -> None:
    letters, seen = Failures(), Seen()
    engine = open_engine(on_error=lambda failure: throw(error), on_dead_letter=letters)
    handler_for("handler", ValueError, engine, seen)
    for key in ("a", "bad", "b"):
        engine.set("s", key, 1)
    engine.drain(PATIENCE_S)

    assert seen.keys == ["a", "b"]
    assert [letter.event.key for letter in letters.all] == ["bad"]

    engine.on_dead_letter(lambda failure: throw(error))
    engine.set("s", "bad", 2)
    engine.set("s", "c", 1)
    engine.drain(PATIENCE_S)
    assert seen.keys == ["a", "b", "c"]


@pytest.mark.parametrize("error", THROWN)
def test_whatever_a_logging_filter_or_handler_raises_changes_nothing_else(
    error: type[BaseException], open_engine: Any
) -> None:
    class Bad(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            throw(error)

    failures, seen = Failures(), Seen()
    engine = open_engine(on_error=failures)
    handler_for("handler", ValueError, engine, seen)
    root, bad, filtering = logging.getLogger("scopestate"), Bad(), logging.NullHandler()
    filtering.addFilter(lambda record: throw(error))
    root.addHandler(bad)
    root.addHandler(filtering)
    try:
        for key in ("a", "bad", "b"):
            engine.set("s", key, 1)
        engine.drain(PATIENCE_S)
    finally:
        root.removeHandler(bad)
        root.removeHandler(filtering)

    assert seen.keys == ["a", "b"]
    assert [failure.event.key for failure in failures.all] == ["bad"]


def test_a_filter_that_raises_stops_no_saving(open_engine: Any, tmp_path: Any) -> None:
    logger = logging.getLogger("scopestate.persistence")

    def bad(record: logging.LogRecord) -> bool:
        raise SystemExit

    from watching import GatedStore, broken

    store = GatedStore()
    engine = open_engine(store=store, workers=[])
    store.at_save = broken
    logger.addFilter(bad)
    try:
        engine.set("s", "k", 1)
        with pytest.raises(Exception, match="on fire"):
            engine.flush()
        store.at_save = lambda: None
        engine.flush()
    finally:
        logger.removeFilter(bad)

    assert store.values("s") == {"k": b"1"}


class Everything:
    """Answers every attribute, as proxies of remote objects and mocks do."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self

    def __bool__(self) -> bool:
        raise SystemExit


class Rude:
    """Every look at it raises."""

    def __getattribute__(self, name: str) -> Any:
        raise SystemExit(name)

    def __bool__(self) -> bool:
        raise SystemExit


class BadAwait:
    """Is awaitable by its class, and fails as such."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    def __await__(self) -> Any:
        if isinstance(self.outcome, type):
            raise self.outcome
        return self.outcome


MAKERS: dict[str, Callable[[], Any]] = {
    "xmlrpc": lambda: xmlrpc.client.ServerProxy("http://127.0.0.1:1"),
    "everything": Everything,
    "rude": Rude,
    "object": object,
    "0": int,
    "text": str,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("place", ["handler", "condition"])
def test_a_result_that_is_no_awaitable_is_a_plain_result_whatever_attributes_it_has(
    place: str, make: Callable[[], Any], open_engine: Any
) -> None:
    failures, seen = Failures(), Seen()
    engine = open_engine(on_error=failures)
    result = make()

    def returns(event: StateEvent) -> Any:
        if place == "handler":
            seen(event)
        return result

    if place == "handler":
        engine.on_change(scope="s")(returns)
    else:
        engine.on_change(scope="s", condition=returns)(seen)
    engine.set("s", "a", 1)
    engine.set("s", "b", 1)
    engine.drain(PATIENCE_S)

    assert (seen.keys, failures.all) == (["a", "b"], [])


@pytest.mark.parametrize("outcome", [SystemExit, StopIteration, 5, iter([1]), None], ids=stable)
def test_an_awaitable_that_is_a_bad_one_fails_its_event_alone(outcome: Any, open_engine: Any) -> None:
    failures, seen = Failures(), Seen()
    engine = open_engine(on_error=failures)

    @engine.on_change(scope="s")
    def returns(event: StateEvent) -> Any:
        seen(event)
        return BadAwait(outcome) if event.key == "bad" else None

    for key in ("a", "bad", "b"):
        engine.set("s", key, 1)
    engine.drain(PATIENCE_S)

    assert seen.keys == ["a", "bad", "b"]
    assert [failure.event.key for failure in failures.all] == ["bad"]


def test_a_generator_that_a_handler_returns_is_reported_since_nothing_of_it_runs(open_engine: Any) -> None:
    failures = Failures()
    engine = open_engine(on_error=failures)

    def generator(event: StateEvent) -> Iterator[None]:
        yield

    async def async_generator(event: StateEvent) -> Any:
        yield

    @types.coroutine
    def coroutine(event: StateEvent) -> Any:
        ran.append(event.key)
        yield from asyncio.sleep(0).__await__()

    ran: list[str] = []
    for key, makes in (("a", generator), ("b", async_generator), ("c", coroutine)):
        engine.on_change(scope="s", key=key)(lambda event, makes=makes: makes(event))
    for key in ("a", "b", "c"):
        engine.set("s", key, 1)
    engine.drain(PATIENCE_S)

    assert sorted(failure.event.key for failure in failures.all) == ["a", "b"]
    assert all("has not run" in str(failure.error) for failure in failures.all)
    assert ran == ["c"]


# ---------------------------------------------------------------------------------------------- functions and replies


@pytest.mark.parametrize("way", ["plain", "async", "aio plain", "aio async", "aio on its own loop"])
@pytest.mark.parametrize("error", THROWN)
def test_whatever_a_function_raises_fails_its_call_alone(
    error: type[BaseException], way: str, engine: Engine, loop_thread: LoopThread
) -> None:
    async def coroutine(payload: Any) -> Any:
        await asyncio.sleep(0)
        return payload if payload != "bad" else throw(error)

    def plain(payload: Any) -> Any:
        return payload if payload != "bad" else throw(error)

    function = plain if way.endswith("plain") else coroutine
    if way == "aio on its own loop":
        loop_thread.do(lambda: engine.register_function("f", function))
    else:
        engine.register_function("f", function)

    def call(payload: str) -> Any:
        if way.startswith("aio"):
            return loop_thread.do(lambda: engine.aio.call("f", payload))
        return in_thread(lambda: engine.call("f", payload))()

    with pytest.raises(FunctionFailed, match=error.__name__):
        call("bad")
    assert call("good") == "good"


def elusive_error() -> type[Exception]:
    """Make a class that answers no question, nor do its instances. Not in the module, which pytest asks about."""

    class Elusive(type):
        def __getattribute__(cls, name: str) -> Any:
            sys.exit(f"{name} of a class")

    class ElusiveError(Exception, metaclass=Elusive):
        def __getattribute__(self, name: str) -> Any:
            sys.exit(f"{name} of an error")

    return ElusiveError


def test_an_error_that_cannot_be_asked_anything_fails_its_call_alone(engine: Engine) -> None:
    kind = elusive_error()

    def function(payload: Any) -> None:
        raise kind

    engine.register_function("f", function)

    with pytest.raises(FunctionFailed, match="ElusiveError"):
        engine.call("f")
    with pytest.raises(FunctionFailed, match="ElusiveError"):
        asyncio.run(engine.aio.call("f"))


@pytest.mark.parametrize("way", ["call", "aio.call"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_a_function_raises_on_another_thread_is_no_ctrl_c_of_this_one(
    way: str, asynchronous: bool, engine: Engine
) -> None:
    assert threading.current_thread() is threading.main_thread()

    def plain(payload: Any) -> None:
        raise KeyboardInterrupt("its own")

    async def coroutine(payload: Any) -> None:
        raise KeyboardInterrupt("its own")

    engine.register_function("f", coroutine if asynchronous else plain)
    if way == "call" and not asynchronous:
        with pytest.raises(KeyboardInterrupt):  # it ran here: nothing tells it from Ctrl-C
            engine.call("f")
        return
    with pytest.raises(FunctionFailed, match="KeyboardInterrupt: its own"):
        engine.call("f") if way == "call" else asyncio.run(engine.aio.call("f"))


class Stopper:
    def stop(self, *args: Any) -> None:
        sys.exit(7)

    def __call__(self, *args: Any) -> None:
        sys.exit(7)

    def __getattr__(self, name: str) -> Any:
        sys.exit(f"{name} of a signal handler")


@pytest.mark.parametrize(
    "handler",
    [
        Stopper(),
        Stopper().stop,
        functools.partial(Stopper().stop, "again"),
        functools.partial(functools.partial(Stopper())),
        functools.wraps(print)(lambda *args: sys.exit(7)),
    ],
    ids=["object", "method", "partial of a method", "partial of an object", "wrapped"],
)
def test_what_a_signal_handler_of_any_kind_raises_passes_and_what_others_raise_does_not(
    handler: Any, engine: Engine
) -> None:
    def function(payload: Any) -> None:
        if payload == "signal":
            signal.raise_signal(signal.SIGUSR1)
        raise SystemExit(3)

    engine.register_function("f", function)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(SystemExit) as passed:
            engine.call("f", "signal")
        with pytest.raises(FunctionFailed, match="SystemExit: 3"):
            engine.call("f", "no signal")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert passed.value.code == 7


@pytest.mark.parametrize("error", THROWN)
def test_whatever_a_callback_of_a_reply_raises_the_others_get_their_answers(
    error: type[BaseException], engine: Engine
) -> None:
    gate, told = Gate(), threading.Event()
    engine.set("s", "k", 0)
    holder = in_thread(lambda: engine._scopes["s"].run(SlowUpdate("k", (), gate)))
    gate.wait_until_reached()
    replies = [engine.ask(messages.Set("s", "k", number), block=False) for number in range(20)]
    replies[3].add_done_callback(lambda reply: throw(error))
    replies[3].add_done_callback(lambda reply: told.set())
    gate.open()
    holder()

    assert [reply.get(timeout=PATIENCE_S).new_value for reply in replies] == list(range(20))
    assert told.wait(PATIENCE_S)


@pytest.mark.parametrize("error", THROWN)
def test_a_turn_that_raises_costs_the_others_nothing(error: type[BaseException], engine: Engine) -> None:
    gate = Gate()
    engine.set("s", "k", 0)
    actor, bad = engine._scopes["s"], Reply[Any]()
    holder = in_thread(lambda: engine._scopes["s"].run(SlowUpdate("k", (), gate)))
    gate.wait_until_reached()
    actor.send(Envelope(SlowUpdate("k", (), lambda: throw(error)), bad))
    replies = [engine.ask(messages.Set("s", "k", number), block=False) for number in range(20)]
    gate.open()
    holder()

    assert [reply.get(timeout=PATIENCE_S).new_value for reply in replies] == list(range(20))
    with pytest.raises(error):
        bad.get(timeout=PATIENCE_S)


# ------------------------------------------------------------------------------------------------------------- loops


def test_the_engines_event_loop_survives_what_its_tasks_and_callbacks_do(open_engine: Any) -> None:
    seen, failures = Seen(), Failures()
    engine = open_engine(on_error=failures)
    tasks: list[Any] = []

    @engine.on_change(scope="s")
    async def handler(event: StateEvent) -> None:
        loop = asyncio.get_running_loop()
        if event.key == "task":
            tasks.append(loop.create_task(exits()))
        elif event.key == "callback":
            loop.call_soon(sys.exit)
        elif event.key == "stop":
            loop.stop()
        await asyncio.sleep(0)
        seen(event)

    async def exits() -> None:
        sys.exit(3)

    for key in ("task", "callback", "stop", "last"):
        engine.set("s", key, 1)
    engine.drain(PATIENCE_S)

    assert seen.keys == ["task", "callback", "stop", "last"]
    assert failures.all == []


def test_an_event_for_a_loop_that_is_closed_is_reported_and_the_trigger_goes_on(open_engine: Any) -> None:
    failures, seen = Failures(), Seen()
    engine = open_engine(on_error=failures)

    async def register() -> None:
        @engine.on_change(scope="s", function_id="app::f")
        async def handler(event: StateEvent) -> None:
            """Never runs."""

    asyncio.run(register())
    engine.set("s", "a", 1)
    assert "event loop" in str(failures.wait_for(1)[0].error)
    engine.register_function("app::f", seen)
    engine.set("s", "b", 1)

    assert seen.wait_for(1)[0].key == "b"


def stopped_loop(engine: Engine, seen: Seen) -> asyncio.AbstractEventLoop:
    """Register a handler on a loop that does not run."""
    loop = asyncio.new_event_loop()

    async def register() -> None:
        @engine.on_change(scope="s")
        async def handler(event: StateEvent) -> None:
            seen(event)

    loop.run_until_complete(register())
    return loop


def test_an_event_for_a_loop_that_is_closed_while_it_waits_is_reported(open_engine: Any) -> None:
    failures, seen = Failures(), Seen()
    engine = open_engine(on_error=failures)
    loop = stopped_loop(engine, seen)
    engine.set("s", "a", 1)
    until(lambda: not engine.health().ok)
    assert "event loop that is not running" in engine.health().problems[0]
    loop.close()

    assert "was closed" in str(failures.wait_for(1)[0].error)
    engine.drain(PATIENCE_S)
    assert engine.health().ok


def test_a_loop_that_stands_still_makes_events_late_and_serves_later_ones_when_it_is_back(open_engine: Any) -> None:
    failures, seen = Failures(), Seen()
    engine = open_engine(on_error=failures, limits={"handler_timeout_ms": 50})
    loop = stopped_loop(engine, seen)
    engine.set("s", "a", 1)
    engine.set("s", "b", 1)
    assert [type(failure.error) for failure in failures.wait_for(2)] == [HandlerTimeout] * 2
    engine.drain(PATIENCE_S)
    engine.reconfigure(from_mapping({"limits": {"handler_timeout_ms": 0}}))
    engine.set("s", "c", 1)

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    assert seen.wait_for(1)[0].key == "c"
    engine.drain(PATIENCE_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(PATIENCE_S)
    loop.close()
    assert seen.keys == ["c"], "what was reported as late must not run afterwards"


def test_a_blocked_loop_is_seen_from_outside_and_the_trigger_recovers(
    open_engine: Any, loop_thread: LoopThread
) -> None:
    failures, seen, gate = Failures(), Seen(), threading.Event()
    engine = open_engine(on_error=failures, limits={"handler_timeout_ms": 50})

    async def handler(event: StateEvent) -> None:
        seen(event)

    loop_thread.do(lambda: engine.on_change(scope="s")(handler))
    loop_thread.loop.call_soon_threadsafe(gate.wait, PATIENCE_S)
    engine.set("s", "a", 1)

    [late] = failures.wait_for(1)
    assert (late.event.key, type(late.error)) == ("a", HandlerTimeout)
    gate.set()
    engine.reconfigure(from_mapping({"limits": {"handler_timeout_ms": 0}}))
    engine.set("s", "b", 1)
    seen.wait_for(1)
    engine.drain(PATIENCE_S)
    assert seen.keys == ["b"]


def test_health_names_the_handler_whose_loop_is_blocked_without_any_time_limit(
    engine: Engine, loop_thread: LoopThread
) -> None:
    seen, gate = Seen(), threading.Event()

    async def blocks(event: StateEvent) -> None:
        seen(event)
        gate.wait(PATIENCE_S)

    loop_thread.do(lambda: engine.on_change(scope="s", function_id="app::blocks")(blocks))
    engine.set("s", "a", 1)
    seen.wait_for(1)
    until(lambda: not engine.health().ok)

    [problem] = engine.health().problems
    assert "app::blocks" in problem
    assert "blocked" in problem
    gate.set()
    engine.drain(PATIENCE_S)
    assert engine.health().ok


def test_the_engines_own_loop_is_replaced_when_a_handler_blocks_it_past_its_limit(open_engine: Any) -> None:
    failures, seen, gate = Failures(), Seen(), threading.Event()
    engine = open_engine(on_error=failures, limits={"handler_timeout_ms": 100})

    @engine.on_change(scope="s", key="blocks")
    async def blocks(event: StateEvent) -> None:
        gate.wait(PATIENCE_S)

    @engine.on_change(scope="s", key="fine")
    async def fine(event: StateEvent) -> None:
        seen(event)

    engine.set("s", "blocks", 1)
    assert failures.wait_for(1)[0].event.key == "blocks"
    engine.reconfigure(from_mapping({"limits": {"handler_timeout_ms": 0}}))
    engine.set("s", "fine", 1)
    assert seen.wait_for(1)[0].key == "fine"
    engine.drain(PATIENCE_S)
    gate.set()


def test_a_coroutine_that_swallows_its_cancellation_is_given_up(open_engine: Any) -> None:
    failures, seen, go = Failures(), Seen(), threading.Event()
    engine = open_engine(on_error=failures, limits={"handler_timeout_ms": 50})

    @engine.on_change(scope="s")
    async def handler(event: StateEvent) -> None:
        while event.key == "bad" and not go.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        seen(event)

    engine.set("s", "bad", 1)
    failures.wait_for(1)
    engine.reconfigure(from_mapping({"limits": {"handler_timeout_ms": 0}}))
    engine.set("s", "b", 1)

    assert seen.wait_for(1)[0].key == "b"
    assert [(failure.event.key, type(failure.error)) for failure in failures.all] == [("bad", HandlerTimeout)]
    go.set()
    engine.drain(PATIENCE_S)


def test_a_call_to_a_loop_that_does_not_run_fails_within_its_limit(open_engine: Any) -> None:
    engine = open_engine(limits={"call_timeout_ms": 50})
    loop = asyncio.new_event_loop()

    async def register() -> None:
        async def function(payload: Any) -> None:
            """Never runs."""

        engine.register_function("f", function)

    loop.run_until_complete(register())
    with pytest.raises(FunctionFailed, match="not running"):
        engine.call("f")
    with pytest.raises(FunctionFailed, match="not running"):
        asyncio.run(engine.aio.call("f"))
    loop.close()
    with pytest.raises(FunctionFailed, match="closed"):
        engine.call("f")


@pytest.mark.parametrize("way", ["call", "aio.call"])
def test_a_call_to_a_loop_that_is_blocked_fails_within_its_limit_and_is_never_begun(
    way: str, open_engine: Any, loop_thread: LoopThread
) -> None:
    engine, gate, begun = open_engine(), Gate(), threading.Event()

    async def function(payload: Any) -> None:
        begun.set()

    async def blocks(payload: Any) -> None:
        gate()

    loop_thread.do(lambda: engine.register_function("f", function))
    loop_thread.do(lambda: engine.register_function("blocks", blocks))
    blocked = in_thread(lambda: engine.call("blocks"))
    gate.wait_until_reached()
    engine.reconfigure(from_mapping({"limits": {"call_timeout_ms": 50}}))

    with pytest.raises(FunctionFailed, match=r"blocked for 0\.05 s, so it was not begun"):
        engine.call("f") if way == "call" else asyncio.run(engine.aio.call("f"))

    gate.open()
    blocked()  # a call that has begun takes as long as it takes
    assert not begun.is_set()


def test_a_look_at_event_loops_that_was_asked_for_and_never_came_keeps_no_other_from_coming(open_engine: Any) -> None:
    engine = open_engine(limits={"call_timeout_ms": 50})
    loop = asyncio.new_event_loop()

    async def register() -> None:
        async def function(payload: Any) -> None:
            """Never runs."""

        engine.register_function("f", function)

    loop.run_until_complete(register())
    # As a signal leaves it that comes between the note and the timer.
    engine._parts.services.loop_calls._next_look = engine._parts.dispatcher.monotonic() - 1.0

    with pytest.raises(FunctionFailed, match="not running"):
        engine.call("f")
    loop.close()


# ------------------------------------------------------------------------------------------------------------- pools


def test_saving_commits_reports_and_closing_go_on_while_all_threads_for_handlers_are_blocked(
    open_engine: Any, tmp_path: Any
) -> None:
    engine = open_engine(
        adapter={"store_method": "file_based", "file_path": str(tmp_path), "save_interval_ms": 20},
        scopes=[{"prefix": "c", "durability": "commit"}],
        limits={"close_grace_ms": 50},
    )
    engine._parts.dispatcher.MOST = 4
    gate = Gate()
    for number in range(6):
        engine.on_change(scope="s", key=str(number))(gate)
    for number in range(6):
        engine.set("s", str(number), 1)
    for _ in range(4):
        gate.wait_until_reached()

    engine.set("plain", "k", "acknowledged")
    assert engine.set("c1", "k", 1).created
    until(lambda: engine.stats().unsaved_scopes == 0)
    until(lambda: any("all threads for handlers" in problem for problem in engine.health().problems))
    in_thread(engine.close)()
    gate.open()


def test_a_hook_that_blocks_stops_neither_events_nor_timers_nor_saving(open_engine: Any) -> None:
    gate, seen = Gate(), Seen()
    engine = open_engine(
        on_error=gate, limits={"handler_mailbox": 1, "handler_when_full": "reject", "handler_timeout_ms": 30}
    )
    slow = Gate()
    engine.on_change(scope="s", key="slow")(slow)
    engine.on_change(scope="s", key="fine")(seen)
    for number in range(5):  # one is under way and becomes late, one waits, the others are rejected
        engine.set("s", "slow", number)
    slow.wait_until_reached()
    gate.wait_until_reached()
    rang = threading.Event()
    engine._parts.dispatcher.call_later(0.1, rang.set)
    engine.set("s", "fine", 1)

    assert seen.wait_for(1)
    assert rang.wait(PATIENCE_S)
    gate.open()
    slow.open()
    engine.drain(PATIENCE_S)


@pytest.mark.parametrize("bound", ["number", "bytes"])
def test_reports_that_wait_for_a_hook_that_blocks_are_bounded_and_counted(
    bound: str, open_engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    most = 5
    if bound == "number":
        monkeypatch.setattr(Reporter, "MOST", most)
    else:
        monkeypatch.setattr(Reporter, "MOST_BYTES", 2 * 100 * most)  # an event holds the old value and the new one
    hook, slow, told = Gate(), Gate(), Failures()

    def on_error(failure: DeliveryFailure) -> None:
        hook()
        told(failure)

    engine = open_engine(on_error=on_error, limits={"handler_mailbox": 1, "handler_when_full": "drop_oldest"})
    engine.on_change(scope="s")(slow)
    engine.set("s", "k", "x" * 98)
    slow.wait_until_reached()
    for _ in range(20):
        engine.set("s", "k", "x" * 98)
    until(lambda: engine.stats().dropped == 19)

    [problem] = engine.health().problems
    assert problem == f"{19 - most} failed deliveries were not reported: the hooks or the log are too slow"
    hook.open()
    until(lambda: engine.health().ok)
    assert len(told.all) == most
    until(lambda: f"{19 - most} failed deliveries were not reported" in caplog.text)
    slow.open()
    engine.drain(PATIENCE_S)


def test_a_hook_that_blocks_does_not_keep_close_waiting(open_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from scopestate import closing

    monkeypatch.setattr(closing, "HOOKS_S", 0.05)
    hook, slow = Gate(), Gate()
    engine = open_engine(on_dead_letter=hook, limits={"close_grace_ms": 10})
    engine.on_change(scope="s")(slow)
    for number in range(3):
        engine.set("s", "k", number)
    slow.wait_until_reached()

    in_thread(engine.close)()
    slow.open()
    hook.open()


def test_drain_after_a_time_out_leaves_nothing_in_the_mailbox_of_a_handler_that_hangs(engine: Engine) -> None:
    gate = Gate()
    engine.on_change(scope="s")(gate)
    engine.set("s", "k", 1)
    gate.wait_until_reached()
    for _ in range(20):
        with pytest.raises(ReplyTimeout):
            engine.drain(0.005)

    until(lambda: engine.stats().mailboxes.handlers == 0)
    assert engine.stats().mailboxes.router == 0
    gate.open()


def test_a_callback_that_blocks_keeps_neither_its_scope_nor_saving_waiting(open_engine: Any, tmp_path: Any) -> None:
    engine = open_engine(adapter={"store_method": "file_based", "file_path": str(tmp_path), "durability": "commit"})
    gate = Gate()
    reply = engine.ask(messages.Set("s", "k", 1), block=False)
    reply.add_done_callback(gate)
    through_a_ref = engine._scopes["s"].actor_ref.ask(messages.Set("s", "k", 2), block=False)
    through_a_ref.add_done_callback(gate)

    assert engine.set("s", "k", 3).new_value == 3
    assert engine.set("other", "k", 3).created
    engine.flush()
    gate.open()
    assert through_a_ref.get(timeout=PATIENCE_S).new_value == 2


def test_a_hook_that_would_run_nothing_is_refused(engine: Engine) -> None:
    async def coroutine(failure: Any) -> None:
        """Would never run."""

    def generator(failure: Any) -> Iterator[None]:
        yield

    class Generator:
        def __call__(self, failure: Any) -> Iterator[None]:
            yield

    for hook in (coroutine, generator, functools.partial(generator), Generator(), 5):
        for register in (engine.on_error, engine.on_dead_letter):
            with pytest.raises(InvalidRegistration, match="takes a"):
                register(hook)  # type: ignore[arg-type]  # what is refused
        with pytest.raises(InvalidRegistration):
            Engine(on_error=hook)  # type: ignore[arg-type]  # as above


# ------------------------------------------------------------------------------------------- too little memory for once


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> threading.Event:
    """Have one call of a method end with a MemoryError."""
    original, failed = getattr(owner, name), threading.Event()

    def method(*args: Any) -> Any:
        if not failed.is_set():
            failed.set()
            raise MemoryError
        return original(*args)

    monkeypatch.setattr(owner, name, method)
    return failed


def test_a_save_that_has_no_memory_to_collect_a_scope_leaves_it_to_the_next_one(
    open_engine: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = {"store_method": "file_based", "file_path": str(tmp_path), "save_interval_ms": 20}
    engine = open_engine(adapter=store)
    failed = once(monkeypatch, LocalScope, "collect")
    engine.set("s", "k", 1)
    assert failed.wait(PATIENCE_S)

    until(lambda: engine.stats().unsaved_scopes == 0 and engine.stats().saved_keys == 1)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(gate.Gate, "_take_batch"), (gate.Gate, "_settle"), (gate.Batch, "settle"), (Reply, "_arrive")],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_a_commit_that_has_no_memory_leaves_no_caller_without_an_answer(
    owner: type, name: str, open_engine: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(
        adapter={"store_method": "file_based", "file_path": str(tmp_path)},
        scopes=[{"prefix": "c", "durability": "commit"}],
        limits={"call_timeout_ms": int(1000 * PATIENCE_S)},
    )
    seen = Seen()
    engine.set("c", "first", 1)
    engine.on_change(scope="c")(seen)
    failed = once(monkeypatch, owner, name)
    began = time.monotonic()
    with contextlib.suppress(StorageError, MemoryError):
        engine.set("c", "k", 1)

    assert failed.is_set()
    assert time.monotonic() - began < PATIENCE_S / 2
    engine.set("c", "k", 2)
    assert engine.get("c", "k") == 2
    if "settle" in name:  # it was on disk: it counts, and its event goes out
        assert seen.wait_for(2)


def test_what_a_worker_thread_has_taken_when_its_memory_ends_is_done_by_another(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, quiet_threads: list[Any]
) -> None:
    seen, dispatcher = Seen(), engine._parts.dispatcher
    engine.on_change(scope="s")(seen)
    failed = threading.Event()

    class Taken(list[None]):
        """The list of idle workers, whose next `pop` fails: a worker has its work by then."""

        def pop(self, *args: Any) -> None:
            super().pop(*args)
            if dispatcher._ready.empty() and not failed.is_set():
                failed.set()
                raise MemoryError

    monkeypatch.setattr(dispatcher, "_idle", Taken())
    engine.set("s", "k", 1)

    assert seen.wait_for(1)
    assert failed.is_set()
    until(lambda: quiet_threads)
    quiet_threads.clear()
