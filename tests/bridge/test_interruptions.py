"""Signal handlers that raise, or call the engine, during a call of a bridge: the next call gets its own answer."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from effort import size
from reliability.interrupting import Interruption, interrupt_at
from reliability.living import InThread, until
from reliability.test_interruption import alarms, untraced  # noqa: F401 - a fixture
from second_engine import OpenBridge, RemoteProcess, Seen

from scopestate import Engine, ops
from scopestate.errors import WouldDeadlock
from scopestate.persistence.bridge.backend import BridgeBackend

# As in reliability/test_interruption.py: an exception that comes within a weakref callback is dropped with a warning.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

INCREMENT = [ops.Increment("", 1)]


@pytest.fixture
def engine(remote: RemoteProcess, open_bridge: OpenBridge) -> Iterator[Engine]:
    engine = open_bridge(remote.url, limits={"call_timeout_ms": 10_000})
    yield engine
    engine.close()


def at_rest(engine: Engine) -> None:
    """Wait until nothing is under way."""
    backend = engine._parts.backend
    assert isinstance(backend, BridgeBackend)
    owner = backend.owner
    until(lambda: not owner.load() and not any(scope.has_waiting() for scope in engine._scopes.values()), "not at rest")


def _connects(engine: Engine) -> int:
    backend = engine._parts.backend
    assert isinstance(backend, BridgeBackend)
    return backend.owner.connects


def _add_to_both(tx: Any) -> None:
    for key in ("one", "two"):
        tx[key] = tx.get(key, 0) + 1


INTERRUPTED: dict[str, Callable[[Engine, int], Any]] = {
    "set": lambda engine, number: engine.set("s", "k", number),
    "update": lambda engine, number: engine.update("s", "k", INCREMENT),
    "delete": lambda engine, number: engine.delete("s", "k"),
    "get": lambda engine, number: engine.get("s", "k"),
    "list": lambda engine, number: engine.list("s"),
    "set if it is absent": lambda engine, number: engine.set("s", f"new-{number}", number, if_absent=True),
    "modify": lambda engine, number: engine.modify("s", "n", lambda value: value + 1, default=0),
    "transact": lambda engine, number: engine.transact("s", _add_to_both),
    "keys": lambda engine, number: engine.keys("s"),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interruption])
@pytest.mark.parametrize("work", INTERRUPTED)
def test_a_call_interrupted_at_any_opcode_leaves_the_next_ones_their_own_answers(
    engine: Engine, work: str, error: type[BaseException]
) -> None:
    engine.set("s", "k", 0)
    engine.keys("s")
    step = size(23, 3)  # other places in the other variant
    for place in itertools.count(1 + step // 2 * (error is Interruption), step):
        reached = interrupt_at(place, lambda: INTERRUPTED[work](engine, place), error)  # noqa: B023 - runs at once
        at_rest(engine)
        asked = InThread(lambda: engine.update("s", "counter", INCREMENT).new_value)
        assert asked.result() in range(1, 10**6), f"at opcode {place}"
        engine.set("s", "k", {"k": place})
        assert engine.update("s", "k", []).old_value == {"k": place}, f"at opcode {place}"
        assert engine.get("s", "k") == {"k": place}, f"at opcode {place}"
        if not reached:
            break
    assert place > 50


def test_a_write_that_was_made_fires_its_event_wherever_its_caller_was_cut_short(
    engine: Engine,
) -> None:
    seen = Seen()
    engine.on_change(scope="s")(seen)
    engine.set("s", "k", 0)
    step = size(11, 2)
    connects = _connects(engine)
    for place in itertools.count(1, step):
        before = engine.get("s", "k")
        reached = interrupt_at(place, lambda: engine.set("s", "k", place), KeyboardInterrupt)  # noqa: B023 - as above
        at_rest(engine)
        engine.drain()
        told = any(event.new_value == place for event in seen.events)
        if engine.get("s", "k") == before:
            assert not told, f"at opcode {place}"
        elif not told:
            # Only if its answer could not be awaited: then the connection was given up.
            assert _connects(engine) > connects, f"at opcode {place}"
        connects = _connects(engine)
        if not reached:
            break
    assert told


@pytest.mark.usefixtures("untraced")
@pytest.mark.timeout(method="thread")  # the other method needs the timer that is used here
@pytest.mark.parametrize("others", [0, 2])
def test_signals_at_random_moments_lose_and_mix_up_nothing(engine: Engine, others: int) -> None:
    interruptions = size(60, 600)
    over = threading.Event()

    def count() -> int:
        done = 0
        while not over.is_set():
            engine.update("s", "counter", INCREMENT)
            done += 1
        return done

    threads = [InThread(count) for _ in range(others)]
    mine = number = 0

    # A function of its own: CPython 3.13.0 skips `except` for a signal at the end of a loop inside `try`.
    def calls_until_one_more(before: int) -> None:
        nonlocal mine, number
        while len(came) == before:
            number += 1
            if number % 2:
                engine.update("s", "counter", INCREMENT)
                mine += 1
            else:
                engine.set("s", f"k{number % 5}", number)
                assert engine.get("s", f"k{number % 5}") == number

    with alarms(Interruption, seed=others, longest_us=10_000) as (set_alarm, came):
        while (before := len(came)) < interruptions:
            try:
                set_alarm()
                calls_until_one_more(before)
            except Interruption:
                continue
    over.set()
    acknowledged = mine + sum(thread.result() for thread in threads)
    at_rest(engine)
    counter = engine.get("s", "counter", 0)
    assert acknowledged <= counter <= acknowledged + interruptions
    assert acknowledged > 0


@pytest.mark.usefixtures("untraced")
def test_a_signal_handler_that_needs_the_connection_is_told_so(engine: Engine) -> None:
    answers: list[Any] = []

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            answers.append(engine.update("elsewhere", "handled", INCREMENT).new_value)
        except WouldDeadlock as error:
            answers.append(error)

    before = signal.signal(signal.SIGALRM, handle)
    try:
        number = 0
        while len(answers) < 100:
            seen = len(answers)
            signal.setitimer(signal.ITIMER_REAL, (1 + number * 7 % 600) / 1e6)
            while len(answers) == seen:
                number += 1
                engine.set("s", "k", number)
                assert engine.get("s", "k") == number
        done = [answer for answer in answers if type(answer) is int]
        assert engine.get("elsewhere", "handled", 0) == len(done)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
