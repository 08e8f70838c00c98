"""The clock of deadlines: it follows the time of day forward, and never goes back."""

from __future__ import annotations

import threading
import time

from scopestate.actors.clock import Clock
from scopestate.actors.deterministic import START_S, DeterministicDispatcher
from scopestate.actors.dispatcher import ThreadDispatcher

START_MS = round(START_S * 1000)


def test_it_is_the_time_of_day() -> None:
    dispatcher = DeterministicDispatcher(1)
    clock = Clock(dispatcher)

    assert clock.now_ms() == START_MS
    dispatcher.advance(1.5)
    assert clock.now_ms() == START_MS + 1500


def test_a_time_of_day_that_is_set_back_neither_moves_it_nor_stops_it() -> None:
    dispatcher = DeterministicDispatcher(1)
    clock = Clock(dispatcher)
    clock.now_ms()

    dispatcher.set_clock(-3600)
    assert clock.now_ms() == START_MS
    dispatcher.advance(2)

    assert clock.now_ms() == START_MS + 2000
    assert clock.ahead_ms() == 3_600_000


def test_a_time_of_day_that_is_set_forward_is_followed_at_once() -> None:
    dispatcher = DeterministicDispatcher(1)
    clock = Clock(dispatcher)

    dispatcher.set_clock(60)
    assert clock.now_ms() == START_MS + 60_000
    dispatcher.set_clock(-60)
    assert clock.now_ms() == START_MS + 60_000


def test_the_time_for_which_the_machine_was_suspended_counts_even_if_the_time_of_day_does_not_show_it() -> None:
    dispatcher = DeterministicDispatcher(1)
    clock = Clock(dispatcher)

    dispatcher.suspend(100)
    dispatcher.set_clock(-100)

    assert clock.now_ms() == START_MS + 100_000


def test_it_goes_on_from_where_an_earlier_process_has_stopped() -> None:
    dispatcher = DeterministicDispatcher(1)
    clock = Clock(dispatcher, at_least_ms=START_MS + 5000)

    assert clock.now_ms() == START_MS + 5000
    dispatcher.advance(6)
    assert clock.now_ms() == START_MS + 11_000
    assert Clock(dispatcher, at_least_ms=START_MS).now_ms() == START_MS + 6000


def test_a_thread_that_is_delayed_between_two_clocks_does_not_put_it_ahead() -> None:
    dispatcher = DeterministicDispatcher(1)
    clock = Clock(dispatcher)
    uptime_ns = dispatcher.uptime_ns

    def after_a_pause() -> int:
        dispatcher.advance(30)
        return uptime_ns()

    clock._uptime_ns = after_a_pause
    clock.now_ms()
    clock._uptime_ns = uptime_ns

    assert clock.now_ms() == START_MS + 30_000


def test_it_never_goes_back_between_threads_while_the_time_of_day_jumps() -> None:
    dispatcher = ThreadDispatcher("scopestate-test")
    offset_ns, over = [0], threading.Event()
    dispatcher.wall_ns = lambda: time.time_ns() + offset_ns[0]  # type: ignore[method-assign]
    clock = Clock(dispatcher)
    latest, wrong = [clock.now_ms()], []

    def look() -> None:
        while not over.is_set():
            seen = latest[0]
            now = clock.now_ms()
            if now < seen:
                wrong.append((seen, now))
            latest[0] = now

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in range(300):
        offset_ns[0] = (step % 7 - 3) * step * 1_000_000
        clock.now_ms()
    over.set()
    for thread in threads:
        thread.join()
    dispatcher.close()

    assert wrong == []
