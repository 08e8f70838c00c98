"""A program with durable triggers that kills itself: `child_durable.py STORE DURABILITY WHERE NOTES`.

It notes each call of its handler in a file. `test_crash_durable.py` decides what it does.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from scopestate import Delivery, Engine, Retry, StateEvent
from scopestate.actors.consumers import JournalConsumers
from scopestate.actors.journal_consumer import JournalConsumer
from scopestate.persistence.sqlite.adapter import FileAdapter
from scopestate.persistence.sqlite.deliveries import Deliveries


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: type, name: str, condition: Callable[..., bool] = lambda *given: True) -> None:
    """Kill the process as `owner.name` is called."""
    real = getattr(owner, name)

    def deadly(*given: Any, **named: Any) -> Any:
        if condition(*given):
            die()
        return real(*given, **named)

    setattr(owner, name, deadly)


def after(owner: type, name: str, condition: Callable[..., bool] = lambda *given: True) -> None:
    """Kill the process as `owner.name` returns."""
    real = getattr(owner, name)

    def deadly(*given: Any, **named: Any) -> Any:
        answer = real(*given, **named)
        if condition(*given):
            die()
        return answer

    setattr(owner, name, deadly)


def saves(*scopes: str) -> Callable[..., bool]:
    return lambda store, batch, *rest: any(change.scope in scopes for change in batch)


def open_engine(path: str, durability: str) -> Engine:
    options = {"store_method": "file_based", "file_path": path, "durability": durability, "save_interval_ms": 60_000}
    workers = [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": options}}}]
    return Engine.from_config({"workers": workers})


def register(engine: Engine, notes: str, where: str = "") -> None:
    """Register the handler, which notes its call and then does what `where` names."""
    handle = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    @engine.on_change(scope="orders", durable="ship", retry=Retry(attempts=1 if "letter" in where else 10))
    def ship(event: StateEvent, delivery: Delivery) -> None:
        os.write(handle, f"{event.new_value} {delivery.attempt} {delivery.id}\n".encode())
        if where == "in the handler":
            engine.set("others", "x", 1, durable=True)  # a save in between does not acknowledge it
            die()
        if "letter" in where:
            raise ValueError("no")
        if "transaction" in where or where == "count":
            with delivery.transaction("totals") as tx:
                tx.update("n", [{"type": "increment", "path": "", "by": 1}])
                if where == "in the transaction":
                    die()


def prepare(where: str) -> None:
    match where:
        case "before the commit":
            before(FileAdapter, "save", saves("orders"))
        case "before the handler":
            before(JournalConsumer, "began")
        case "before the acknowledgement":
            JournalConsumers.collect = lambda self, *, everything: []  # type: ignore[method-assign]
            after(JournalConsumer, "ended")
        case "before the transaction is saved":
            before(FileAdapter, "save", saves("totals"))
        case "after the transaction is saved":
            after(FileAdapter, "save", saves("totals"))
        case "within the replay of letters":
            after(Deliveries, "replay")
        case "within the purge of letters":
            after(Deliveries, "purge")


def main() -> None:
    logging.disable()
    path, durability, where, notes = sys.argv[1:]
    prepare(where)
    engine = open_engine(path, durability)
    register(engine, notes, where)
    engine.set("orders", "a", 1)
    if durability == "commit":
        os.write(1, b"committed\n")
    engine.drain(60)
    if "letter" in where:
        engine.set("orders", "b", 2)
        engine.drain(60)
        letters = engine.dead_letters("ship")
        if "replay" in where:
            engine.consumers().pause("ship")
            letters.replay(all=True)
            if where == "after the replay of letters":
                die()
        else:
            letters.purge(all=True)
            die()
    engine.flush()
    threading.Event().wait(20)


if __name__ == "__main__":
    main()
