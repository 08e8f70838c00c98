"""A program that forks while its threads write, for test_fork.py. Usage: child_fork.py DIRECTORY DURABILITY.

It prints a line of JSON at the end; each forked child prints a line of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from forking import beside_threads
from reliability.living import settings

from scopestate import Engine, StateEvent, messages
from scopestate.errors import EngineClosed

DIRECTORY, DURABILITY = sys.argv[1:3]
CHILDREN = 12


def say(**facts: object) -> None:
    os.write(1, json.dumps(facts).encode() + b"\n")


def written_by_batch(engine: Engine) -> None:
    with engine.batch("s") as b:
        b.set("k", 1)


def every_call(engine: Engine, known: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Each way to ask something of an engine; `known` was got from it before the fork."""
    handle, ref, aio, aio_handle = known["handle"], known["ref"], engine.aio, known["aio_handle"]
    ops = [{"type": "increment", "path": "", "by": 1}]
    return {
        "set": lambda: engine.set("s", "k", 1),
        "set in a new scope": lambda: engine.set("new", "k", 1),
        "get": lambda: engine.get("s", "k"),
        "delete": lambda: engine.delete("s", "k"),
        "update": lambda: engine.update("s", "k", ops),
        "list": lambda: engine.list("s"),
        "list_groups": engine.list_groups,
        "ask": lambda: engine.ask(messages.Get("s", "k")),
        "ask without waiting": lambda: engine.ask(messages.Get("s", "k"), block=False).get(timeout=5),
        "tell": lambda: engine.tell(messages.Set("s", "k", 1)),
        "call": lambda: engine.call("state::get", {"scope": "s", "key": "k"}),
        "drain": engine.drain,
        "flush": engine.flush,
        "register_function": lambda: engine.register_function("f", print),
        "register_trigger": lambda: engine.register_trigger(function_id="f"),
        "set with options": lambda: engine.set("s", "k", 1, if_revision=1, ttl=5),
        "entry": lambda: engine.entry("s", "k"),
        "compare_and_set": lambda: engine.compare_and_set("s", "k", 1, 2),
        "modify": lambda: engine.modify("s", "k", str),
        "touch": lambda: engine.touch("s", "k", 5),
        "transact": lambda: engine.transact("s", print),
        "batch": lambda: written_by_batch(engine),
        "keys": lambda: engine.keys("s"),
        "count": lambda: engine.count("s"),
        "delete_range": lambda: engine.delete_range("s", prefix=""),
        "pages": lambda: next(engine.pages("s")),
        "mapping": lambda: dict(engine.mapping("s")),
        "handle.in": lambda: "k" in handle,
        "aio.transact": lambda: asyncio.run(aio.transact("s", print)),
        "aio.keys": lambda: asyncio.run(aio.keys("s")),
        "ref.ask for keys": lambda: ref.ask(messages.Keys("s"), timeout=5),
        "handle.set": lambda: handle.set("k", 1),
        "handle.get": lambda: handle.get("k"),
        "handle.list": handle.list,
        "handle.actor_ref": lambda: handle.actor_ref,
        "ref.ask": lambda: ref.ask(messages.Set("s", "k", 1), timeout=5),
        "aio.set": lambda: asyncio.run(aio.set("s", "k", 1)),
        "aio.get": lambda: asyncio.run(aio.get("s", "k")),
        "aio.delete": lambda: asyncio.run(aio.delete("s", "k")),
        "aio.update": lambda: asyncio.run(aio.update("s", "k", ops)),
        "aio.list": lambda: asyncio.run(aio.list("s")),
        "aio.list_groups": lambda: asyncio.run(aio.list_groups()),
        "aio.call": lambda: asyncio.run(aio.call("state::list", {"scope": "s"})),
        "aio.ask": lambda: asyncio.run(aio.ask(messages.Get("s", "k"))),
        "aio.drain": lambda: asyncio.run(aio.drain()),
        "aio.flush": lambda: asyncio.run(aio.flush()),
        "aio handle.set": lambda: asyncio.run(aio_handle.set("k", 1)),
    }


def in_child(engine: Engine, known: dict[str, Any], number: int) -> None:
    """Try everything, open an engine of its own elsewhere, and end in one of three ways."""
    signal.alarm(20)  # a hang ends the child, and shows
    answers = {}
    for name, call in every_call(engine, known).items():
        try:
            answers[name] = f"returned {call()!r:.50}"
        except Exception as error:  # noqa: BLE001 - the test compares what it was
            answers[name] = type(error).__name__
    engine.stats()
    engine.health()
    engine.triggers()
    engine.close()
    own = DIRECTORY + f"-child-{number}"
    with Engine.from_config(settings("commit", own)) as mine:
        heard = threading.Event()
        mine.on_change(scope="s")(lambda event: heard.set())
        mine.set("s", "k", number)
        mine.drain(60)
        answers["own engine"] = str(mine.get("s", "k") == number and heard.is_set())
    say(child=number, answers=answers)
    if number % 3 == 0:
        os._exit(0)
    if number % 3 == 1:
        del engine
        known.clear()
        sys.exit(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait()


def main() -> None:
    engine = Engine.from_config(settings(DURABILITY, DIRECTORY))
    events: list[int] = []

    @engine.on_change(scope="s", key="k")
    def hear(event: StateEvent) -> None:
        events.append(event.new_value)

    engine.set("s", "k", 0)
    known = {"handle": engine.scope("s"), "ref": engine.scope("s").actor_ref, "aio_handle": engine.aio.scope("s")}
    acknowledged = [0] * 4
    over = threading.Event()

    def write(which: int) -> None:
        try:
            while not over.is_set():
                engine.set("s", f"k{which}", acknowledged[which] + 1)
                acknowledged[which] += 1
        except EngineClosed as error:
            say(writer=which, error=repr(error))

    threads = [threading.Thread(target=write, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    statuses = []
    for number in range(CHILDREN):
        with beside_threads():
            pid = os.fork()
        if pid == 0:
            in_child(engine, known, number)
            os._exit(9)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    over.set()
    for thread in threads:
        thread.join()
    engine.set("s", "k", 1)
    engine.drain(60)
    engine.close()
    say(statuses=statuses, acknowledged=acknowledged, events=events)


if __name__ == "__main__":
    main()
