"""The queue between threads: a wait with a time limit ends, whatever comes in its way."""

from __future__ import annotations

import math
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from scopestate.actors.dispatcher import ThreadDispatcher
from scopestate.inbox import Empty, Inbox

PATIENCE_S = 60.0


def ends(work: Callable[[], object]) -> bool:
    """Run `work()` on a daemon thread; False if it has not returned within the patience."""
    over = threading.Event()

    def run() -> None:
        work()
        over.set()

    threading.Thread(target=run, name="test-waits", daemon=True).start()
    return over.wait(PATIENCE_S)


def test_a_wait_of_a_few_microseconds_ends() -> None:
    draws = random.Random(1)
    inbox: Inbox[int] = Inbox()

    def many_short_waits() -> None:
        for _ in range(30_000):
            # An item that is taken without waiting leaves the queue's lock free: the next wait takes it at once.
            inbox.put(1)
            assert inbox.get_nowait() == 1
            with pytest.raises(Empty):
                inbox.get_within(draws.uniform(0, 2e-6))

    assert ends(many_short_waits)


@pytest.fixture
def unhurried_interpreter() -> Iterator[None]:
    """Let a thread wait so long for the interpreter that its deadline passes after the signal has interrupted it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.05)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("unhurried_interpreter")
def test_a_wait_that_signals_interrupt_until_its_time_is_over_ends() -> None:
    inbox: Inbox[int] = Inbox()
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    over, sent = threading.Event(), threading.Event()

    def wait() -> None:
        with pytest.raises(Empty):
            inbox.get_within(0.1)
        over.set()
        assert sent.wait(PATIENCE_S)  # a thread that has ended gets no signals

    try:
        thread = threading.Thread(target=wait, name="test-waits", daemon=True)
        thread.start()
        assert thread.ident is not None
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            signal.pthread_kill(thread.ident, signal.SIGUSR1)
        assert over.wait(PATIENCE_S)
        sent.set()
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_thread_that_has_waited_lets_signals_come_as_before() -> None:
    masks: list[set[int]] = []

    def wait() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        for _ in range(2):
            with pytest.raises(Empty):
                Inbox[int]().get_within(0.001)
            masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    assert ends(wait)
    assert masks == [{signal.SIGUSR2}] * 2


def test_an_item_that_comes_ends_the_wait() -> None:
    inbox: Inbox[int] = Inbox()
    got: list[int] = []
    waits = [
        lambda: inbox.get_within(PATIENCE_S),
        lambda: inbox.get_within(None),
        lambda: inbox.get_or_idle(PATIENCE_S),
    ]

    for number, wait in enumerate(waits):
        thread = threading.Thread(target=lambda wait=wait: got.append(wait()), name="test-waits", daemon=True)
        thread.start()
        inbox.put(number)
        thread.join(PATIENCE_S)

    assert got == [0, 1, 2]


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
def test_no_time_to_wait_is_a_look(timeout_s: float) -> None:
    inbox: Inbox[int] = Inbox()

    with pytest.raises(Empty):
        inbox.get_within(timeout_s)
    inbox.put(1)
    assert inbox.get_within(timeout_s) == 1


@pytest.mark.parametrize("delay_s", [1e300, math.inf])
def test_a_timer_due_later_than_the_system_can_count_leaves_the_others_alone(
    threads: ThreadDispatcher, delay_s: float
) -> None:
    rung = threading.Event()
    threads.call_later(delay_s, rung.set).cancel()
    threads.call_later(0.05, lambda: threads.call_later(0.05, rung.set))

    assert rung.wait(PATIENCE_S)


def test_a_callback_that_exits_leaves_the_other_timers_alone(
    threads: ThreadDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    rung = threading.Event()
    threads.call_later(0.0, sys.exit)
    threads.call_later(0.01, rung.set)

    assert rung.wait(PATIENCE_S)
    assert "a timer's callback failed" in caplog.text


def test_every_timer_of_many_short_ones_rings(threads: ThreadDispatcher) -> None:
    draws = random.Random(2)

    def many() -> None:
        for _ in range(3_000):
            rung = threading.Event()
            threads.call_later(draws.uniform(0, 20e-6), rung.set)
            assert rung.wait(PATIENCE_S)

    assert ends(many)
