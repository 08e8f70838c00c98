"""Programs for test_shutdown.py, by name: each opens an engine on a store, writes, and ends in its own way.

Usage: child_shutdown.py NAME DIRECTORY DURABILITY. Descriptor 1 gets a line per `write`: what is there was said.

    ready            everything is set up
    ack SCOPE N      write N of the scope, which sets its key "n" to N, is acknowledged
    event SCOPE N    ... was handled
    report SCOPE N   ... was reported as not handled
"""

from __future__ import annotations

import _thread
import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from reliability.living import settings

from scopestate import DeliveryFailure, Engine, StateEvent
from scopestate.errors import EngineClosed

DIRECTORY, DURABILITY = sys.argv[2:4]
ONE_HOUR_MS = 3_600_000
GRACE_MS = 50_000
"""How long the end may take to deliver what threads have written up to then: thousands of events, on a busy machine."""


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def hear(event: StateEvent) -> None:
    say("event", event.scope, event.new_value)


def report(failure: DeliveryFailure) -> None:
    say("report", failure.event.scope, failure.event.new_value)


def open_engine(directory: str = DIRECTORY, *, close_grace_ms: int = GRACE_MS) -> Engine:
    """An engine that saves by itself once an hour: what is on disk later, its end has put there."""
    limits = {"close_grace_ms": close_grace_ms}
    config = settings(DURABILITY, directory, save_interval_ms=ONE_HOUR_MS, limits=limits)
    engine = Engine.from_config(config, on_error=report)
    engine.register_function("hear", hear)
    engine.register_trigger(function_id="hear")
    return engine


def write(engine: Engine, scope: str, count: int | None = None) -> None:
    """Write `count` times, or until the engine is closed."""
    number = 0
    while count is None or number < count:
        try:
            engine.set(scope, "n", number + 1)
        except EngineClosed:
            return
        number += 1
        say("ack", scope, number)


def in_threads(engine: Engine, *, daemon: bool, count: int = 4) -> list[threading.Thread]:
    threads = [
        threading.Thread(target=write, args=(engine, f"thread-{number}"), daemon=daemon) for number in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads


def wait_for_ever() -> None:
    # Not in one wait without a limit: CPython can miss a signal that arrives just as such a wait begins.
    while True:
        threading.Event().wait(0.05)


def exits_without_close() -> None:
    write(open_engine(), "main", 50)
    say("ready")


def dies_of_an_exception() -> None:
    write(open_engine(), "main", 50)
    raise LookupError("a bug of the program")


def exits_while_daemons_write() -> None:
    in_threads(open_engine(), daemon=True)
    say("ready")
    sys.stdin.readline()


def exits_with_two_engines() -> None:
    first, second = open_engine(), open_engine(DIRECTORY + "-2")
    write(first, "main", 20)
    write(second, "main", 30)


def drops_its_engine() -> None:
    def use_once() -> None:
        write(open_engine(), "main", 50)

    use_once()
    gc.collect()
    gc.collect()


def exits_when_no_thread_can_be_started() -> None:
    """As in Python 3.12 and later, whose exit hooks run when the interpreter starts no threads any more."""
    engine = Engine.from_config(settings(DURABILITY, DIRECTORY, save_interval_ms=ONE_HOUR_MS))

    def refuse(*_: Any, **__: Any) -> int:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    def forbid() -> None:
        _thread.start_new_thread = refuse
        threading._start_new_thread = refuse  # type: ignore[attr-defined]  # what Thread.start calls

    atexit.register(forbid)  # runs before the engine's own hook, which was registered earlier
    write(engine, "main", 50)


def writes_for_ever() -> None:
    engine = open_engine()
    threads = in_threads(engine, daemon=False)
    say("ready")
    write(engine, "main")
    for thread in threads:
        thread.join()
    wait_for_ever()


def writes_while_daemons_write() -> None:
    engine = open_engine()
    in_threads(engine, daemon=True)
    say("ready")
    write(engine, "main")


def waits_for_ever() -> None:
    write(open_engine(), "main", 50)
    say("ready")
    wait_for_ever()


def has_its_own_handler() -> None:
    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(7)

    signal.signal(signal.SIGTERM, leave)
    engine = open_engine()
    in_threads(engine, daemon=True)
    say("ready")
    write(engine, "main")


def closes_in_its_own_handler() -> None:
    engine: Engine

    def leave(number: int, frame: FrameType | None) -> None:
        engine.close()
        sys.exit(7)

    signal.signal(signal.SIGTERM, leave)
    engine = open_engine()
    in_threads(engine, daemon=True)
    say("ready")
    write(engine, "main")
    wait_for_ever()


def has_a_handler_that_hangs() -> None:
    engine = open_engine(close_grace_ms=300)
    hung = threading.Event()

    @engine.on_change(scope="hang")
    def hang(event: StateEvent) -> None:
        hung.set()
        threading.Event().wait()

    write(engine, "main", 20)
    engine.set("hang", "n", 1)
    engine.set("hang", "n", 2)
    hung.wait()
    say("ready")
    wait_for_ever()


def main() -> None:
    programs: dict[str, Callable[[], None]] = {
        program.__name__: program
        for program in (
            exits_without_close, dies_of_an_exception, exits_while_daemons_write, exits_with_two_engines,
            drops_its_engine, exits_when_no_thread_can_be_started, writes_for_ever, waits_for_ever,
            writes_while_daemons_write,
            has_its_own_handler, closes_in_its_own_handler, has_a_handler_that_hangs,
        )
    }  # fmt: skip
    programs[sys.argv[1]]()


if __name__ == "__main__":
    main()
