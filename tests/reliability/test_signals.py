"""What signals may do to the main thread: the patterns of `scopestate.signals`."""

from __future__ import annotations

import ast
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from reliability.living import PATIENCE_S, InThread, saved, settings

from scopestate import Engine
from scopestate.persistence import FileAdapter
from scopestate.signals import SLICE_S, Guard, SignalPipe, exclusive, join, wait_for

SIGNALS = 500
PRODUCT = [
    Path(__file__).parents[2] / folder
    for folder in ("actors", "config", "console", "engine", "integrations", "ops", "persistence", "wire")
]


class Cut(Exception):
    pass


@pytest.fixture
def caught() -> Iterator[list[int]]:
    """The SIGUSR1s whose handler has run."""
    came: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = signal.signal(signal.SIGUSR1, take)
    yield came
    signal.signal(signal.SIGUSR1, before)


# --- waiting for signals ---------------------------------------------------------------------------------------------


def test_a_signal_that_came_before_the_wait_ends_it_at_once(caught: list[int]) -> None:
    pipe = SignalPipe()
    with pipe.open():
        signal.raise_signal(signal.SIGUSR1)
        began = time.monotonic()

        pipe.wait(PATIENCE_S)

        assert time.monotonic() - began < PATIENCE_S / 2
        pipe.wait(0.001)  # and the next wait is a new one
    assert caught == [signal.SIGUSR1]


def test_no_signal_is_lost_at_whatever_moment_it_comes(caught: list[int]) -> None:
    moments, seen = random.Random(9), threading.Semaphore(0)

    def send() -> None:
        for _ in range(SIGNALS):
            stop = time.perf_counter() + moments.random() * 200e-6
            while time.perf_counter() < stop:
                continue
            os.kill(os.getpid(), signal.SIGUSR1)
            assert seen.acquire(timeout=PATIENCE_S)

    pipe = SignalPipe()
    with pipe.open():
        sending = InThread(send)
        for number in range(1, SIGNALS + 1):
            while len(caught) < number:
                began = time.monotonic()
                pipe.wait(PATIENCE_S)
                assert time.monotonic() - began < PATIENCE_S / 2, f"signal {number} was lost"
            seen.release()
        sending.result()


def test_the_wake_up_descriptor_is_given_back() -> None:
    here = os.open(os.devnull, os.O_WRONLY | os.O_NONBLOCK)
    before = signal.set_wakeup_fd(here)
    try:
        with SignalPipe().open():
            pass
        assert signal.set_wakeup_fd(here) == here
    finally:
        signal.set_wakeup_fd(before)
        os.close(here)


def test_a_wait_without_limit_sleeps_in_slices() -> None:
    """A signal that falls between the interpreter's last look and the sleep of a lock is noticed after a slice."""
    slept: list[float] = []

    def wait(slice_s: float) -> bool:
        slept.append(slice_s)
        return len(slept) == 5

    assert wait_for(wait) is True
    assert slept == [SLICE_S] * 5


def test_a_wait_with_a_limit_ends_in_time_whether_or_not_it_came_true() -> None:
    event = threading.Event()

    assert wait_for(event.wait, 0.01) is False
    began = time.monotonic()
    assert wait_for(event.wait, SLICE_S + 0.1) is False
    assert SLICE_S + 0.1 <= time.monotonic() - began < PATIENCE_S
    event.set()
    assert wait_for(event.wait, 0.0) is True
    assert wait_for(event.wait) is True


def test_joining_a_thread_says_whether_it_has_ended() -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()

    assert join(thread, 0.01) is False
    over.set()
    assert join(thread) is True


# --- mutual exclusion ------------------------------------------------------------------------------------------------


class Counter:
    def __init__(self) -> None:
        self._exclusive = Guard()
        self.count = 0

    @exclusive
    def add(self, step: int, *, again: bool = False) -> int:
        count = self.count
        time.sleep(0)
        if again:
            self.add(0)
        self.count = count + step
        return self.count


def test_one_thread_at_a_time_is_in_a_guard() -> None:
    counter = Counter()
    threads = [InThread(lambda: [counter.add(1) for _ in range(200)]) for _ in range(8)]
    for thread in threads:
        thread.result()

    assert counter.count == 1600


def test_a_thread_may_enter_a_guard_that_it_is_in(caught: list[int]) -> None:
    counter = Counter()

    assert counter.add(3, again=True) == 3
    assert InThread(lambda: counter.add(1)).result() == 4


def test_what_is_raised_in_a_guard_frees_it() -> None:
    guard = Guard()

    with pytest.raises(Cut):
        guard.run(_raise)

    assert InThread(lambda: guard.run(lambda: "free")).result() == "free"


def test_what_a_signal_handler_raises_in_the_inner_of_two_entries_frees_neither_more_nor_less() -> None:
    guard = Guard()

    def outer() -> bool:
        with pytest.raises(Cut):
            guard.run(_raise)
        other = guard.take  # another thread is still kept out
        return InThread(lambda: other(0.01)).result() is None

    assert guard.run(outer)
    assert InThread(lambda: guard.take(PATIENCE_S)).result() is not None


def test_a_guard_that_is_taken_can_be_given_back_once_and_only_by_its_ticket() -> None:
    guard = Guard()
    ticket = guard.take(0.0)
    assert ticket is not None

    assert InThread(lambda: guard.take(0.01)).result() is None
    guard.give_back([ticket[0]])
    assert InThread(lambda: guard.take(0.01)).result() is None
    guard.give_back(ticket)
    guard.give_back(ticket)
    assert InThread(lambda: guard.run(lambda: "free")).result() == "free"


def test_signals_that_raise_at_random_moments_never_leave_a_guard_taken() -> None:
    counter, cuts = Counter(), 0
    moments = random.Random(7)

    def cut(number: int, frame: FrameType | None) -> None:
        raise Cut

    before = signal.signal(signal.SIGALRM, cut)
    try:
        while cuts < 2000:
            try:
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-6, 60e-6))
                while True:
                    counter.add(1, again=True)
            except Cut:
                cuts += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert counter._exclusive._tickets == {}
    finally:
        signal.signal(signal.SIGALRM, before)


def _raise() -> None:
    raise Cut


class CutBehindTheLock(dict[str, list[int]]):
    """As CPython 3.14 may do: an exception comes when a guard is taken, before the next instruction."""

    def setdefault(self, key: str, value: list[int]) -> list[int]:  # type: ignore[override]  # as a guard calls it
        found = super().setdefault(key, value)
        if threading.current_thread() is threading.main_thread() and not self.was_cut:
            self.was_cut = True
            raise Cut
        return found

    was_cut = False


@pytest.mark.parametrize("part", ["directory", "triggers", "functions", "store", "saving", "loop", "dispatcher"])
def test_no_part_of_an_engine_hangs_when_its_guard_was_taken_at_that_very_moment(tmp_path: Path, part: str) -> None:
    config = settings("interval", tmp_path / "store", limits={"close_grace_ms": 1000})
    engine = Engine.from_config(config)
    parts = engine._parts
    store = parts.backend.store
    assert isinstance(store, FileAdapter)
    guard: Guard = {
        "directory": parts.directory._exclusive,
        "triggers": parts.router.triggers._exclusive,
        "functions": parts.functions._exclusive,
        "store": store._exclusive,
        "saving": store._saving,
        "loop": parts.loop_thread._exclusive,
        "dispatcher": parts.dispatcher._exclusive,  # type: ignore[attr-defined]  # it is a ThreadDispatcher
    }[part]
    guard._tickets = tickets = CutBehindTheLock()

    def use() -> None:
        engine.set("new", "k", 1)
        engine.register_function("f", print)
        engine.register_trigger(function_id="f")
        engine.get("another", "k")
        parts.loop_thread.get()

    with contextlib.suppress(Cut):
        use()
    InThread(use).result()
    InThread(lambda: engine.drain(PATIENCE_S)).result()
    with contextlib.suppress(Cut):
        engine.close()
    InThread(engine.close).result()

    assert tickets.was_cut or part == "saving"  # saves run on another thread
    assert saved(tmp_path / "store", "new")[1] == {"k": b"1"}


# --- nothing goes around it ------------------------------------------------------------------------------------------

MAY_USE_LOCKS = {
    "actors/deterministic.py",  # for tests: one thread runs at a time, and hands over
    "persistence/redis",  # its tables of servers: held for a few lines; a known gap from 3.14 on
    "config/watch.py",  # a Condition: `stop` is all that the main thread does there
}
"""Where a bare `with lock` is let through, and why."""


def test_no_bare_lock_stands_where_the_main_thread_may_come() -> None:
    """From 3.14 on an exception may come between taking a lock and entering its block (scopestate.signals, rule 1)."""
    found = []
    for folder in PRODUCT:
        for path in folder.rglob("*.py"):
            name = str(path.relative_to(folder.parent))
            if any(name.startswith(let) for let in MAY_USE_LOCKS):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.With):
                    texts = [ast.unparse(item.context_expr) for item in node.items]
                    found += [
                        f"{name}:{node.lineno}: with {text}"
                        for text in texts
                        if "(" not in text
                        and any(word in text.lower() for word in ("lock", "guard", "saving", "changed"))
                    ]
    assert found == []
