"""Programs for test_ends.py, by name: each opens an engine, writes, and ends in a way that has no exit hooks.

Usage: child_ends.py NAME DIRECTORY. The engine saves by itself once an hour. Descriptor 1 gets `ready` when a signal
may come.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from reliability.living import settings

from scopestate import Engine, StateEvent

DIRECTORY = sys.argv[2]
WRITES = 100

kept: list[Engine] = []
"""Engines that outlive the function that opens them."""


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def open_engine(name: str = "store", **limits: int) -> Engine:
    config = settings("interval", f"{DIRECTORY}/{name}", save_interval_ms=3_600_000, limits=limits)
    return Engine.from_config(config)


def fill(engine: Engine, count: int = WRITES) -> None:
    for number in range(count):
        engine.set("s", str(number), number)


def wait_for_ever() -> None:
    while True:
        threading.Event().wait(0.05)


# --- workers that end by os._exit ------------------------------------------------------------------------------------


def work(name: str) -> None:
    fill(open_engine(name))


def work_and_derive(name: str) -> None:
    engine = open_engine(name)

    @engine.on_change(scope="s")
    def derive(event: StateEvent) -> None:
        engine.set("derived", event.key, event.new_value)

    fill(engine)


def work_in_a_thread(name: str) -> None:
    thread = threading.Thread(target=work, args=(name,))
    thread.start()
    thread.join()


def leave_a_thread_behind(name: str) -> None:
    """The function returns at once; the thread that it started continues to write, as in any program."""
    engine = open_engine(name)
    returned = threading.Event()

    def write() -> None:
        returned.wait()
        threading.Event().wait(0.1)
        fill(engine)

    threading.Thread(target=write).start()
    threading.Timer(0.05, returned.set).start()


def fail(name: str) -> None:
    work(name)
    raise SystemExit(3)


def in_a_pool(name: str) -> None:
    engine = open_engine(name)
    kept.append(engine)
    fill(engine)


def in_process(method: str, target: str) -> None:
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=globals()[target], args=("store",))
    process.start()
    process.join()
    say(f"worker {process.exitcode}")


def work_and_miss_a_signal(name: str) -> None:
    """As when SIGTERM falls between the interpreter's last look at its signals and a wait without a time limit."""
    fill(open_engine(name))
    noted = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(noted)
    os.write(noted, bytes([signal.SIGTERM]))  # as the interpreter's C code does when the signal arrives
    threading.Event().wait()


def in_pool(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    with context.Pool(1) as pool:  # which ends its workers by SIGTERM
        pool.apply(in_a_pool, ("store",))


def in_pool_that_is_closed(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    pool = context.Pool(1)
    pool.apply(in_a_pool, ("store",))
    pool.close()
    pool.join()


def in_executor(method: str) -> None:
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        executor.submit(in_a_pool, "store").result()


def forked_with_an_engine_of_the_parent() -> None:
    parent = open_engine("parent")
    fill(parent)
    in_process("fork", "work")


# --- hosts that handle SIGTERM ---------------------------------------------------------------------------------------


def gives_sigterm_back(raise_again: Callable[[int], Any], *, opened_in_thread: bool = False) -> None:
    """As uvicorn: take the signal, work, finish, give it back to whom it was taken from, and raise it again."""
    came: list[int] = []  # not an event: `Event.set` waits for ever if the signal comes inside `Event.wait`
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    opened: list[Engine] = []
    if opened_in_thread:
        thread = threading.Thread(target=lambda: opened.append(open_engine()))
        thread.start()
        thread.join()
    else:
        opened.append(open_engine())
    fill(opened[0], WRITES // 2)
    say("ready")
    while not came:
        threading.Event().wait(0.02)
    for number in range(WRITES // 2, WRITES):  # requests under way are still answered
        opened[0].set("s", str(number), number)
    signal.signal(signal.SIGTERM, before)
    raise_again(signal.SIGTERM)


def gives_sigterm_back_and_raises_it() -> None:
    gives_sigterm_back(signal.raise_signal)


def gives_sigterm_back_and_sends_it() -> None:
    gives_sigterm_back(lambda number: os.kill(os.getpid(), number))


def gives_sigterm_back_from_a_thread_that_opened() -> None:
    gives_sigterm_back(signal.raise_signal, opened_in_thread=True)


def handles_it_on_its_event_loop() -> None:
    async def main() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        engine = open_engine()
        fill(engine, WRITES // 2)
        say("ready")
        await stop.wait()
        for number in range(WRITES // 2, WRITES):
            await engine.aio.set("s", str(number), number)

    asyncio.run(main())
    os.kill(os.getpid(), signal.SIGTERM)  # whatever the loop has put in the place of its handler


def ends_itself_in_its_handler() -> None:
    """The fastest exit that a handler can make: none of the engine's code runs after it."""
    kept.append(fill_under_a_handler_that_ends_the_process())
    say("ready")
    wait_for_ever()


def drops_its_engine_and_ends_itself_in_its_handler() -> None:
    fill_under_a_handler_that_ends_the_process()  # what it returns is collected, and closed on another thread
    say("ready")
    wait_for_ever()


def fill_under_a_handler_that_ends_the_process() -> Engine:
    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(7)

    signal.signal(signal.SIGTERM, leave)
    engine = open_engine()
    fill(engine)
    return engine


def replaces_our_handler_later() -> None:
    fill(open_engine())
    ours = signal.getsignal(signal.SIGTERM)

    def chain(number: int, frame: FrameType | None) -> None:
        assert callable(ours)
        ours(number, frame)

    signal.signal(signal.SIGTERM, chain)
    say("ready")
    wait_for_ever()


# --- signals ---------------------------------------------------------------------------------------------------------


def waits() -> None:
    fill(open_engine())
    say("ready")
    wait_for_ever()


def waits_with_sigint_at_its_default() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    waits()


def opened_in_a_thread_that_main_waits_for() -> None:
    def run() -> None:
        fill(open_engine())
        # Whether the main thread has set the handler is seen from here.
        while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            threading.Event().wait(0.01)
        say("ready")
        wait_for_ever()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def opened_in_a_thread_whose_first_signals_do_not_wake_main() -> None:
    """As on a busy machine: the signal arrives just before main sleeps, or its handler is removed too early."""
    lost: list[int] = []
    send = signal.pthread_kill

    def lose_three(thread: int, number: int) -> None:
        if len(lost) < 3:
            lost.append(number)
        else:
            send(thread, number)

    signal.pthread_kill = lose_three
    opened_in_a_thread_that_main_waits_for()


def has_a_handler_that_hangs() -> None:
    engine = open_engine()
    hung = threading.Event()

    @engine.on_change(scope="mail")
    def send(event: StateEvent) -> None:
        hung.set()
        threading.Event().wait()

    fill(engine)
    engine.set("mail", "1", "hello")
    hung.wait()
    say("ready")
    wait_for_ever()


def has_two_engines_whose_handlers_hang() -> None:
    hung = threading.Semaphore(0)
    for name in ("store", "other"):
        engine = open_engine(name)

        @engine.on_change(scope="mail")
        def send(event: StateEvent) -> None:
            hung.release()
            threading.Event().wait()

        fill(engine)
        engine.set("mail", "1", "hello")
    hung.acquire()
    hung.acquire()
    say("ready")
    wait_for_ever()


# --- executors at the exit -------------------------------------------------------------------------------------------


def exits_with_handlers_that_need_executors() -> None:
    engine = open_engine()
    pool = concurrent.futures.ThreadPoolExecutor(2)

    @engine.on_change(scope="s", key="to_thread")
    async def to_thread(event: StateEvent) -> None:
        await asyncio.sleep(0.2)
        await asyncio.to_thread(engine.set, "done", "to_thread", 1)

    @engine.on_change(scope="s", key="run_in_executor")
    async def run_in_executor(event: StateEvent) -> None:
        await asyncio.sleep(0.2)
        await asyncio.get_running_loop().run_in_executor(pool, engine.set, "done", "run_in_executor", 1)

    @engine.on_change(scope="s", key="submit")
    def submit(event: StateEvent) -> None:
        threading.Event().wait(0.2)
        pool.submit(engine.set, "done", "submit", 1).result()

    for key in ("to_thread", "run_in_executor", "submit"):
        engine.set("s", key, 1)


def goes_on_in_a_thread_when_main_has_returned() -> None:
    engine = open_engine()

    def write() -> None:
        threading.main_thread().join()
        fill(engine)

    threading.Thread(target=write).start()


def main() -> None:
    globals()[sys.argv[1]](*sys.argv[3:])


if __name__ == "__main__":
    main()
