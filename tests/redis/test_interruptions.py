"""Signal handlers that raise, or call the engine, during a call to Redis: the next call gets its own answer."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from effort import size
from opening import INCREMENT, at_rest, open_at, owners_of
from reliability.interrupting import Interruption, interrupt_at
from reliability.living import InThread, until
from reliability.test_interruption import alarms, untraced  # noqa: F401 - a fixture
from servers import Server, StartServer

from scopestate import Engine
from scopestate.errors import ConnectionLost, ScopestateError, StorageError, WouldDeadlock
from scopestate.server.server import new_loop

# As in reliability/test_interruption.py: an exception that comes within a weakref callback is dropped with a warning.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LIMITS = {"call_timeout_ms": 10_000}


# -------------------------------------------------------------------------------------------------------- interruptions

INTERRUPTED: dict[str, Callable[[Engine, int], Any]] = {
    "set": lambda engine, number: engine.set("s", "k", number),
    "update": lambda engine, number: engine.update("s", "k", INCREMENT),
    "update of what another program wrote": lambda engine, number: engine.update("s", "other", INCREMENT),
    "update that looks first": lambda engine, number: engine.update("s", f"new-{number}", INCREMENT),
    "delete": lambda engine, number: engine.delete("s", "k"),
    "get": lambda engine, number: engine.get("s", "k"),
    "list": lambda engine, number: engine.list("s"),
    "set if it has a revision": lambda engine, number: engine.set(
        "s", "k", number, if_revision=engine.entry("s", "k").revision
    ),
    "modify": lambda engine, number: engine.modify("s", "n", lambda value: value + 1, default=0),
    "transact": lambda engine, number: engine.transact("s", _add_to_both),
    "keys": lambda engine, number: engine.keys("s"),
}


def _add_to_both(tx: Any) -> None:
    for key in ("one", "two"):
        tx[key] = tx.get(key, 0) + 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interruption])
@pytest.mark.parametrize("work", INTERRUPTED)
def test_a_call_interrupted_at_any_opcode_leaves_the_next_ones_their_own_answers(
    valkey: Server, work: str, error: type[BaseException]
) -> None:
    elsewhere = valkey.client()
    with open_at(valkey.url, LIMITS) as engine:
        engine.set("s", "k", 0)
        step = size(6, 2)  # other places in the other variant
        for place in itertools.count(1 + step // 2 * (error is Interruption), step):
            elsewhere.hset("state:s", "other", str(place))
            reached = interrupt_at(place, lambda: INTERRUPTED[work](engine, place), error)  # noqa: B023 - runs at once
            at_rest(engine)
            looked = f"new-{place}" if "looks" in work else "new"
            asked = InThread(lambda: engine.update("s", looked, INCREMENT).new_value)  # noqa: B023
            assert asked.result() in ((1, 2) if "looks" in work else range(1, 10**6)), f"at opcode {place}"
            for key in ("k", "other"):
                engine.set("s", key, {key: place})
                assert engine.update("s", key, []).old_value == {key: place}, f"at opcode {place}"
                assert engine.get("s", key) == {key: place}, f"at opcode {place}"
            if not reached:
                break
        assert place > 50


LARGE = [{"type": "append", "path": "", "value": "x" * 100_000}]
"""Its command goes by another connection."""
AWAITED: dict[str, Callable[[Engine, int], Any]] = {
    "set": lambda engine, number: engine.aio.set("s", "k", number),
    "update that looks first": lambda engine, number: engine.aio.update("s", f"new-{number}", INCREMENT),
    "update of what another program wrote": lambda engine, number: engine.aio.update("s", "other", INCREMENT),
    "large update that looks first": lambda engine, number: engine.aio.update(f"large-{number}", "k", LARGE),
    "get": lambda engine, number: engine.aio.get("s", f"other-{number}"),
}


@pytest.mark.parametrize("step", ["call_for_task", "_drive_for_task"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Interruption])
@pytest.mark.parametrize("work", AWAITED)
def test_an_event_loop_interrupted_at_any_opcode_answers_its_tasks(
    valkey: Server, work: str, error: type[BaseException], step: str
) -> None:
    """On the main thread, in the two functions that work for a task: one sends its call, one takes the reply."""
    elsewhere = valkey.client()
    with open_at(valkey.url, LIMITS) as engine:
        engine.set("s", "k", 0)
        engine.update("s", "counter", INCREMENT)
        owner = owners_of(engine)[0]
        do = getattr(owner, step)
        place = 0
        is_next = reached = False

        def cut(*arguments: Any) -> None:
            nonlocal is_next, reached
            if not is_next:
                do(*arguments)
                return
            is_next = False
            reached = interrupt_at(place, lambda: do(*arguments), error)
            if step == "call_for_task" and reached:
                raise error

        setattr(owner, step, cut)

        async def one_cut_call() -> str:
            nonlocal is_next, reached
            elsewhere.hset("state:s", "other", "0")
            owner._to_post, is_next, reached = 0, True, False
            try:
                await asyncio.wait_for(AWAITED[work](engine, place), 20)
            except (error, StorageError) as failed:
                return type(failed.__cause__ or failed).__name__
            return "done"

        def check_once(outcome: str) -> None:
            """The call was done once; perhaps not at all, if it has failed."""
            if "large" in work:
                found = engine.get(f"large-{place}", "k", "")
            else:
                found = engine.get("s", "other" if "another program" in work else f"new-{place}", 0)
            times = len(found) // 100_000 if type(found) is str else found
            assert times == 1 or (times == 0 and outcome != "done"), f"at opcode {place}: {outcome}, {times} times"

        async def next_calls() -> None:
            for number in range(3):
                assert (await engine.aio.set("s", "k", [place, number])).new_value == [place, number]
                assert await engine.aio.get("s", "k") == [place, number], f"at opcode {place}"

        outcomes: set[str] = set()
        stride = size(6, 2)
        # That of asyncio is written in Python: it may lose the wake-up of a task if it is interrupted itself.
        with asyncio.Runner(loop_factory=new_loop) as runner:
            for place in itertools.count(1 + stride // 2 * (error is Interruption), stride):
                try:
                    outcome = runner.run(one_cut_call())
                except KeyboardInterrupt:
                    outcome = error.__name__
                outcomes.add(outcome)
                asked = InThread(lambda: engine.update("s", "counter", INCREMENT).new_value)
                assert asked.result() > place / stride, f"at opcode {place}"
                at_rest(engine)
                assert owner._claim == {}
                if "update" in work:
                    check_once(outcome)
                runner.run(next_calls())
                if not reached:
                    break
        assert place > 50
        raised = error.__name__ if step == "call_for_task" else ConnectionLost.__name__
        # An error of a signal handler may also be taken for that of a value, which refuses the call.
        assert {raised, "done"} <= outcomes <= {raised, "done", error.__name__}


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interruption])
def test_an_event_loop_interrupted_while_a_reply_takes_long_answers_its_task(
    start_server: StartServer, error: type[BaseException]
) -> None:
    server = start_server()
    with open_at(server.url, LIMITS) as engine:
        engine.set("s", "k", 0)
        owner = owners_of(engine)[0]
        check = owner._check_led
        place = 0
        is_next = reached = False

        def cut(watch: Any) -> None:
            nonlocal is_next, reached
            if is_next:
                is_next = False
                reached = interrupt_at(place, lambda: check(watch), error)
                server.resume()
            else:
                check(watch)

        owner._check_led = cut  # type: ignore[method-assign]

        async def one_cut_call() -> None:
            nonlocal is_next, reached
            await engine.aio.set("s", "k", -1)
            owner._to_post, is_next, reached = 0, True, False
            server.pause()
            try:
                assert (await asyncio.wait_for(engine.aio.set("s", "k", place), 20)).new_value == place
            finally:
                server.resume()

        with asyncio.Runner(loop_factory=new_loop) as runner:
            for number in itertools.count(1 + (error is Interruption), size(6, 2)):
                owner._to_post, place = 0, number
                runner.run(one_cut_call())
                at_rest(engine)
                if not reached:
                    break
        assert place > 20


@pytest.mark.usefixtures("untraced")
@pytest.mark.timeout(method="thread")  # the other method needs the timer that is used here
@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Interruption])
def test_signals_at_random_moments_lose_and_mix_up_nothing(
    redis_server: Server, others: int, error: type[BaseException]
) -> None:
    interruptions = 150
    with open_at(redis_server.url, LIMITS) as engine:
        over = threading.Event()

        def count() -> int:
            done = 0
            while not over.is_set():
                engine.update("s", "counter", INCREMENT)
                done += 1
            return done

        threads = [InThread(count) for _ in range(others)]
        draw = random.Random(7)
        mine = 0

        # A function of its own: CPython 3.13.0 skips `except` for a signal at the end of a loop inside `try`.
        def calls_until_one_more(before: int) -> None:
            nonlocal mine
            while len(came) == before:
                match draw.randrange(4):
                    case 0:
                        engine.update("s", "counter", INCREMENT)
                        mine += 1
                    case 1:
                        number = draw.randrange(10**6)
                        engine.set("s", f"k{number % 5}", number)
                        assert engine.get("s", f"k{number % 5}") == number
                    case 2:
                        engine.update("s", f"new-{draw.randrange(10**6)}", INCREMENT)
                    case _:
                        assert type(engine.list("s")) is list

        with alarms(error, seed=others, longest_us=3000) as (set_alarm, came):
            while (before := len(came)) < interruptions or mine <= 20:  # on a slow machine most calls are cut off
                try:
                    set_alarm()
                    calls_until_one_more(before)
                except error:
                    continue
            interruptions = len(came)
        over.set()
        acknowledged = mine + sum(thread.result() for thread in threads)
        at_rest(engine)
        counter = engine.get("s", "counter", 0)
        assert acknowledged <= counter <= acknowledged + interruptions
        assert acknowledged > 20


@pytest.mark.usefixtures("untraced")
@pytest.mark.timeout(method="thread")  # the other method needs the timer that is used here
def test_a_signal_handler_may_call_the_engine(valkey: Server) -> None:
    answers: list[Any] = []

    def handle(number: int, frame: FrameType | None) -> None:
        for scope in ("s", "elsewhere"):
            try:
                answers.append(engine.update(scope, "handled", INCREMENT).new_value)
            except WouldDeadlock as error:
                answers.append(error)  # in the middle of a turn of that scope

    before = signal.signal(signal.SIGALRM, handle)
    over = threading.Event()
    try:
        with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:

            def write() -> None:
                while not over.is_set():
                    engine.update("s", "theirs", INCREMENT)
                    engine.update("elsewhere", "theirs", INCREMENT)

            threads = [InThread(write) for _ in range(2)]
            draw = random.Random(5)
            number = 0
            while len(answers) < 300:
                seen = len(answers)
                signal.setitimer(signal.ITIMER_REAL, draw.randrange(1, 600) / 1e6)
                while len(answers) == seen:
                    number += 1
                    engine.set("s", "k", number)
                    assert engine.get("s", "k") == number
            over.set()
            for thread in threads:
                thread.result()
            done = [answer for answer in answers if type(answer) is int]
            assert {type(answer) for answer in answers} <= {int, WouldDeadlock}
            assert len(done) > 50
            assert engine.get("s", "handled", 0) + engine.get("elsewhere", "handled", 0) == len(done)
    finally:
        over.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("untraced")
def test_a_handler_that_needs_what_the_interrupted_call_holds_is_told_so_at_once(start_server: StartServer) -> None:
    """Its thread has the connection, which another call of the scope that the handler wants waits for."""
    server = start_server()
    raised: list[BaseException] = []

    def handle(number: int, frame: FrameType | None) -> None:
        began = time.monotonic()
        try:
            engine.set("theirs", "k", 1)
        except ScopestateError as error:
            raised.append(error)
        assert time.monotonic() - began < 15  # the calls would wait 20 s or more
        server.resume()

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with open_at(server.url, {"call_timeout_ms": 30_000}, call_timeout_ms=20_000) as engine:
            engine.set("theirs", "k", 0)
            owner = owners_of(engine)[0]
            server.pause()
            others: list[InThread] = []

            def another_comes() -> None:
                until(lambda: owner._led is not None, "the call is not sent")
                others.append(InThread(lambda: engine.set("theirs", "k", 2)))
                until(lambda: bool(engine._scopes["theirs"]._mailbox), "the other call is not there")
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

            helper = InThread(another_comes)
            engine.set("mine", "k", 1)
            helper.result()
            others[0].result()

            assert [type(error) for error in raised] == [WouldDeadlock]
            assert engine.get("theirs", "k") == 2
    finally:
        signal.signal(signal.SIGUSR1, before)
