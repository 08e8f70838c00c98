"""Worker threads and the timer: enough of them, not too many, and none left at the end."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from scopestate.actors.dispatcher import ThreadDispatcher
from scopestate.actors.turn import TurnActor

PATIENCE_S = 60.0


class Worker(TurnActor):
    """Calls what it is sent."""

    def on_receive(self, message: Any) -> Any:
        return message()


class Handler(Worker):
    """The same, as code of the program."""

    runs_program = True


def until(holds: Any) -> None:
    """Wait until `holds()` is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.002)


def test_no_thread_is_started_before_it_is_needed(threads: ThreadDispatcher) -> None:
    assert threads.threads() == 0
    Worker(threads).ask(lambda: None).get(timeout=PATIENCE_S)
    assert threads.threads() == 1


def test_one_worker_serves_many_actors(threads: ThreadDispatcher) -> None:
    actors = [Worker(threads) for _ in range(2000)]
    replies = [actor.ask(lambda number=number: number) for number, actor in enumerate(actors)]

    assert [reply.get(timeout=PATIENCE_S) for reply in replies] == list(range(2000))
    assert threads.threads() < 10


def test_the_pool_grows_while_handlers_block_so_that_the_others_go_on(threads: ThreadDispatcher) -> None:
    gate, inside = threading.Event(), threading.Semaphore(0)

    def block() -> None:
        inside.release()
        assert gate.wait(PATIENCE_S)

    blocked = [Worker(threads).ask(block) for _ in range(20)]
    for _ in blocked:
        assert inside.acquire(timeout=PATIENCE_S)

    assert Worker(threads).ask(lambda: "went on").get(timeout=PATIENCE_S) == "went on"
    assert threads.threads() >= 21
    gate.set()
    for reply in blocked:
        reply.get(timeout=PATIENCE_S)


def test_code_of_the_program_beyond_its_share_of_threads_waits_while_the_engines_own_work_goes_on(
    threads: ThreadDispatcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(threads, "MOST", 3)
    gate, inside = threading.Event(), threading.Semaphore(0)

    def block() -> None:
        inside.release()
        assert gate.wait(PATIENCE_S)

    blocked = [Handler(threads).ask(block) for _ in range(3)]
    for _ in blocked:
        assert inside.acquire(timeout=PATIENCE_S)
    waiting = [Handler(threads).ask(lambda number=number: number) for number in range(5)]
    ran: list[str] = []
    threads.submit_program(lambda: ran.append("a function"))

    # The engine's own work, twice, so that a worker has seen all that came before the first.
    for _ in range(2):
        assert Worker(threads).ask(lambda: "went on").get(timeout=PATIENCE_S) == "went on"
    until(lambda: threads.held() == 6)
    assert not any(reply.done for reply in waiting)
    assert ran == []
    assert caplog.text.count("all 3 threads for handlers and functions are in use") == 1

    gate.set()
    assert [reply.get(timeout=PATIENCE_S) for reply in waiting] == list(range(5))
    until(lambda: ran == ["a function"] and threads.held() == 0 and not threads._in_program)


def test_16_threads_that_bring_more_than_the_share_lose_nothing(
    threads: ThreadDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "MOST", 2)
    barrier, done, most = threading.Barrier(16), threading.Semaphore(0), [0]

    def work() -> None:
        most[0] = max(most[0], len(threads._in_program))
        done.release()

    def bring() -> None:
        barrier.wait(PATIENCE_S)
        for _ in range(200):
            threads.submit_program(work)

    senders = [threading.Thread(target=bring) for _ in range(16)]
    for sender in senders:
        sender.start()
    for _ in range(16 * 200):
        assert done.acquire(timeout=PATIENCE_S)
    for sender in senders:
        sender.join(PATIENCE_S)

    until(lambda: not threads._in_program and threads.held() == 0)


def test_a_worker_that_got_nothing_until_its_idle_end_leaves_nothing_undone(
    threads: ThreadDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers end all the time here: each piece of work races with the end of one.
    monkeypatch.setattr(threads, "IDLE_S", 0.0005)
    for number in range(300):
        assert Worker(threads).ask(lambda number=number: number).get(timeout=PATIENCE_S) == number
        threading.Event().wait(0.0001 * (number % 10))

    until(lambda: threads.threads() == 0)
    assert threads._idle == []


def test_workers_with_nothing_to_do_end(threads: ThreadDispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "IDLE_S", 0.01)
    ended: list[threading.Thread] = []
    Worker(threads).ask(lambda: ended.append(threading.current_thread())).get(timeout=PATIENCE_S)

    ended[0].join(PATIENCE_S)
    assert threads.threads() == 0
    assert Worker(threads).ask(lambda: "again").get(timeout=PATIENCE_S) == "again"


def test_a_worker_survives_what_it_calls(threads: ThreadDispatcher, caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()
    threads.submit(lambda: 1 // 0)
    threads.submit(done.set)

    assert done.wait(PATIENCE_S)
    assert "a turn, outside its actor, failed" in caplog.text


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, StopIteration])
def test_no_exception_costs_a_worker_or_the_timer(error: type[BaseException], threads: ThreadDispatcher) -> None:
    def fail() -> None:
        raise error

    rang, done = threading.Event(), threading.Event()
    threads.call_later(0.0, fail)
    threads.call_later(0.01, rang.set)
    threads.submit(fail)
    threads.submit_program(fail)
    threads.submit_program(done.set)

    assert rang.wait(PATIENCE_S)
    assert done.wait(PATIENCE_S)
    until(lambda: not threads._in_program)
    assert Worker(threads).ask(lambda: "here").get(timeout=PATIENCE_S) == "here"
    assert threads.threads() == sum(t.name.startswith("scopestate-test-") for t in threading.enumerate()) - 1


def test_16_threads_that_schedule_at_once_wake_every_actor(threads: ThreadDispatcher) -> None:
    barrier, left = threading.Barrier(16), threading.Semaphore(0)

    def schedule() -> None:
        barrier.wait(PATIENCE_S)
        for _ in range(200):
            Worker(threads).tell(left.release)

    senders = [threading.Thread(target=schedule) for _ in range(16)]
    for sender in senders:
        sender.start()
    for _ in range(16 * 200):
        assert left.acquire(timeout=PATIENCE_S)
    for sender in senders:
        sender.join(PATIENCE_S)


# ---------------------------------------------------------------------------------------------------------- timers


def test_timers_ring_in_the_order_in_which_they_are_due_and_not_after_cancel(threads: ThreadDispatcher) -> None:
    rang: list[str] = []
    last = threading.Event()
    threads.call_later(0.06, last.set)
    threads.call_later(0.04, lambda: rang.append("second"))
    threads.call_later(0.02, lambda: rang.append("first"))
    never = threads.call_later(0.03, lambda: rang.append("never"))
    never.cancel()
    never.cancel()

    assert last.wait(PATIENCE_S)
    assert rang == ["first", "second"]


def test_a_timer_rings_no_earlier_than_it_is_due(threads: ThreadDispatcher) -> None:
    rang = threading.Event()
    at: list[float] = []
    began = threads.monotonic()
    threads.call_later(0.03, lambda: (at.append(threads.monotonic()), rang.set()))

    assert rang.wait(PATIENCE_S)
    assert at[0] - began >= 0.03


def test_a_timer_that_fails_does_not_stop_the_others(
    threads: ThreadDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    rang = threading.Event()
    threads.call_later(0.0, lambda: 1 // 0)
    threads.call_later(0.01, rang.set)

    assert rang.wait(PATIENCE_S)
    assert "a timer's callback failed" in caplog.text


# ------------------------------------------------------------------------------------------------------------- end


def test_close_ends_every_thread_and_drops_timers(no_thread_left: None) -> None:
    dispatcher = ThreadDispatcher("scopestate-ending")
    rang: list[str] = []
    for _ in range(3):
        Worker(dispatcher).ask(lambda: None).get(timeout=PATIENCE_S)
    dispatcher.call_later(1.0, lambda: rang.append("never"))
    dispatcher.close()
    dispatcher.close()
    for thread in threading.enumerate():
        if thread.name.startswith("scopestate-ending"):
            thread.join(PATIENCE_S)

    assert dispatcher.threads() == 0
    assert rang == []
    dispatcher.call_later(0.0, lambda: rang.append("never"))
    assert rang == []


def test_what_comes_after_the_end_runs_on_the_thread_that_brings_it(no_thread_left: None) -> None:
    dispatcher = ThreadDispatcher("scopestate-ending")
    Worker(dispatcher).ask(lambda: None).get(timeout=PATIENCE_S)
    dispatcher.close()
    for thread in threading.enumerate():
        if thread.name.startswith("scopestate-ending"):
            thread.join(PATIENCE_S)

    assert Worker(dispatcher).ask(threading.get_ident).get(timeout=PATIENCE_S) == threading.get_ident()
