"""What a process of the proof does: threads and tasks that call one engine, and write down each call and its outcome.

A fact is a line of JSON: the time (`time.monotonic_ns`, which all processes of a machine share), a word, and more. A
call has a fact before it begins and one after it has ended, so a call without the second was cut off.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from linearizability.model import text_of
from linearizability.revised_history import RevisedHistory

from scopestate import Compacted, Delivery, Engine, Retry, StateEvent
from scopestate.errors import (
    CallTimeout,
    ConnectionLost,
    EngineClosed,
    NotConnected,
    Overloaded,
    ReplyTimeout,
    ScopestateError,
)
from scopestate.ops import Increment

REGISTERS: Final = "registers"
"""Scopes that begin so have registers: every kind of call, checked to be linearizable."""
GROUPS: Final = 2
"""So many groups of registers for each process."""
EPOCH_S: Final = 4.0
"""Registers are used for this long. Clients then continue with new ones, so that no history is too long to check."""
REGISTER_KEYS: Final = ("k", "l", "m")
COUNTERS: Final = 3
ACCOUNTS: Final = tuple(f"account-{number}" for number in range(6))
ORDER_KEYS: Final = tuple(f"order-{number}" for number in range(6))
CONSUMERS: Final = ("plain", "counts")
SOON: Final = Retry(attempts=100_000, first=0.005, factor=1.5, longest=0.05)


class Log:
    """A file of facts, each written in one call."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def __call__(self, *words: object) -> None:
        os.write(self._file, json.dumps([time.monotonic_ns(), *words]).encode() + b"\n")


def fate_of(error: ScopestateError) -> str:
    """Return `refused` if a call that failed so was certainly not done, else `unknown`."""
    cause = error.__cause__ if isinstance(error.__cause__, ScopestateError) else error
    match cause:
        case NotConnected() | Overloaded():
            return "refused"
        case ConnectionLost():
            return "unknown" if cause.may_be_applied else "refused"
        case CallTimeout():
            return "unknown" if cause.sent else "refused"
        case ReplyTimeout():
            return "unknown"
    return "unknown"


def told(error: ScopestateError) -> str:
    """Return an error with its cause as text."""
    cause = f", by {error.__cause__!r}" if error.__cause__ is not None else ""
    return f"{error!r}{cause}"[:1000]


class Life:
    """What the clients of one process share."""

    def __init__(self, engine: Engine, log: Log, name: str, facts: dict[str, Any]) -> None:
        self.engine = engine
        self.log = log
        self.name = name
        self.processes: int = facts["processes"]
        self._seed = facts["seed"]
        self._quiet = Path(facts["quiet"])

    def over(self) -> bool:
        """True if no call shall begin any more."""
        return self.engine.closed or self._quiet.exists()

    def rng(self, client: str) -> random.Random:
        return random.Random(f"{self._seed} {client}")


class Client:
    """One thread or task, with calls one after the other."""

    def __init__(self, life: Life, name: str) -> None:
        self.life = life
        self.name = f"{life.name}.{name}"
        self.rng = life.rng(self.name)
        self.log = life.log
        self._number = 0

    def steps(self) -> Iterator[int]:
        """The numbers of the calls to make, until it is over."""
        while not self.life.over():
            self._number += 1
            yield self._number

    def pause_s(self) -> float:
        return self.rng.choice([0.0, 0.001, 0.004, 0.01])

    def begun(self, number: int, kind: str, scope: str, arguments: Any) -> None:
        self.log("begin", self.name, number, kind, scope, arguments)

    def failed(self, number: int, error: ScopestateError) -> None:
        self.log(fate_of(error), self.name, number, told(error))

    def ended(self, number: int, result: Any) -> None:
        self.log("end", self.name, number, result)


class Registers(Client):
    """Calls of every kind on a few keys that many clients share."""

    def __init__(self, life: Life, name: str) -> None:
        super().__init__(life, name)
        self._kinds = RevisedHistory(life.engine, [], REGISTER_KEYS)
        self._groups = self.rng.sample(range(GROUPS * life.processes), 2)

    def choose(self, number: int) -> tuple[str, str, tuple[Any, ...]]:
        """Choose a call. Each value is written once, so a reader knows which write it sees."""
        epoch = int(time.monotonic() / EPOCH_S)
        scope = f"{REGISTERS}-{epoch}-{self.rng.choice(self._groups)}"
        self._kinds.scopes = (scope,)
        kind, scope, arguments = self._kinds.choose(self.rng)
        while kind == "list_groups":  # not of one scope
            kind, scope, arguments = self._kinds.choose(self.rng)
        # The `;` ends it: no other one begins with it.
        unique = f"{self.name}-{number};" if self.rng.random() < 0.7 else self.rng.randrange(10**11, 10**12)
        match kind:
            case "set" | "set_if" | "pair":
                place = 2 if kind == "pair" else 1
                arguments = (*arguments[:place], text_of(unique), *arguments[place + 1 :])
            case "compare_and_set":
                arguments = (*arguments[:2], text_of(unique))
            case "update":
                op = ("increment", self.rng.randrange(1, 99)) if self.rng.random() < 0.5 else ("append", unique)
                arguments = (arguments[0], (op,))
        return kind, scope, arguments

    def run(self) -> None:
        for number in self.steps():
            kind, scope, arguments = self.choose(number)
            self.begun(number, kind, scope, arguments)
            try:
                result = self._kinds._make(self.life.engine, kind, scope, arguments)
            except ScopestateError as error:
                self.failed(number, error)
            else:
                self.ended(number, result)
            time.sleep(self.pause_s())

    async def run_on_loop(self) -> None:
        for number in self.steps():
            kind, scope, arguments = self.choose(number)
            self.begun(number, kind, scope, arguments)
            try:
                result = await self._kinds._make(self.life.engine.aio, kind, scope, arguments)
            except ScopestateError as error:
                self.failed(number, error)
            else:
                self.ended(number, result)
            await asyncio.sleep(self.pause_s())


def counter_arguments(number: int) -> tuple[str, str]:
    """Return scope and kind of the count `number` of a client."""
    return f"counter-{number % COUNTERS}", "transact" if number % 3 == 0 else "update"


def count(engine: Any, scope: str, kind: str, token: str) -> Any:
    """Add one to a counter, once for the idempotency key `token`; its answer has the number. `engine.aio` too."""
    if kind == "transact":
        return engine.transact(scope, add_one, idempotency_key=token)
    return engine.update(scope, "n", [Increment("", 1)], idempotency_key=token)


def add_one(tx: Any) -> int:
    """Count in a transaction; return the number."""
    number: int = (tx.get("n") or 0) + 1
    tx.set("n", number)
    return number


def number_of(answer: Any) -> int:
    return answer if isinstance(answer, int) else int(answer.new_value)


class Counts(Client):
    """Counts with idempotency keys; a count that failed is tried again with its key until it is answered."""

    def run(self) -> None:
        for number in self.steps():
            scope, kind = counter_arguments(number)
            token = f"{self.name}-{number}"
            self.begun(number, kind, scope, token)
            while True:
                try:
                    answer = count(self.life.engine, scope, kind, token)
                except EngineClosed:
                    return
                except ScopestateError as error:
                    self.log("again", self.name, number, told(error))
                    time.sleep(0.01)
                    continue
                self.ended(number, number_of(answer))
                break
            time.sleep(self.pause_s())

    async def run_on_loop(self) -> None:
        for number in self.steps():
            scope, kind = counter_arguments(number)
            token = f"{self.name}-{number}"
            self.begun(number, kind, scope, token)
            while True:
                try:
                    answer = await count(self.life.engine.aio, scope, kind, token)
                except EngineClosed:
                    return
                except ScopestateError as error:
                    self.log("again", self.name, number, told(error))
                    await asyncio.sleep(0.01)
                    continue
                self.ended(number, number_of(answer))
                break
            await asyncio.sleep(self.pause_s())


class Bank(Client):
    """Moves amounts between accounts, whose sum is 0 for every reader."""

    def run(self) -> None:
        for number in self.steps():
            kind = self.rng.choice(["move", "move", "items", "read"])
            self.begun(number, kind, "bank", None)
            try:
                result = getattr(self, kind)()
            except ScopestateError as error:
                self.failed(number, error)
            else:
                self.ended(number, result)
            time.sleep(self.pause_s())

    def move(self) -> None:
        one, other = self.rng.sample(ACCOUNTS, 2)
        amount = self.rng.randrange(1, 100)

        def moved(tx: Any) -> None:
            tx.set(one, (tx.get(one) or 0) - amount)
            tx.set(other, (tx.get(other) or 0) + amount)

        self.life.engine.transact("bank", moved)

    def items(self) -> int:
        return sum(value for _, value in self.life.engine.items("bank"))

    def read(self) -> int:
        return int(self.life.engine.transact("bank", lambda tx: sum(tx.get(name) or 0 for name in ACCOUNTS)))


class Writes(Client):
    """Three writes in turn: a new key, a key of its own with durability `interval`, and an order."""

    def run(self) -> None:
        engine = self.life.engine
        for number in self.steps():
            kind = ("new", "soft", "order")[number % 3]
            key = {"new": str(number), "soft": self.name, "order": self.rng.choice(ORDER_KEYS)}[kind]
            scope = {"new": f"new-{self.name}", "soft": "soft", "order": "orders"}[kind]
            self.begun(number, kind, scope, key)
            try:
                if kind == "order":
                    result: Any = engine.update(scope, key, [Increment("", 1)]).new_value
                else:
                    result = engine.set(scope, key, number).old_value
            except ScopestateError as error:
                self.failed(number, error)
            else:
                self.ended(number, result)
            time.sleep(self.pause_s())


class Watches(Client):
    """Reads a watch of the orders, and continues by its cursor."""

    def run(self) -> None:
        cursor: str | None = None
        while True:
            try:
                with self.life.engine.watch("orders", snapshot=False, since=cursor) as changes:
                    self.log("watch begins", cursor is None)
                    for change in changes:
                        self.log("saw", change.key, change.value, change.revision)
                        cursor = changes.cursor
                return
            except EngineClosed:
                return
            except Compacted as error:
                self.log("watch compacted", error.reason)
                cursor = None
            except ScopestateError as error:
                self.log("watch failed", told(error), traceback.format_exc(limit=-3))
                if self.life.engine.closed:
                    return
                time.sleep(0.05)


def start_triggers(life: Life, *, durable: bool) -> None:
    """Register a plain trigger and, if they are wanted, two durable ones on the orders."""
    engine, log = life.engine, life.log

    @engine.on_change(scope="orders")
    def plain_trigger(event: StateEvent) -> None:
        log("told", event.key, event.new_value)

    if not durable:
        log("triggers")
        return

    @engine.on_change(scope="orders", durable="plain", retry=SOON)
    def plain(event: StateEvent, delivery: Delivery) -> None:
        log("began", "plain", delivery.id, event.key, event.new_value, delivery.attempt)
        log("handled", "plain", delivery.id, event.key, event.new_value)

    @engine.on_change(scope="orders", durable="counts", retry=SOON)
    def counts(event: StateEvent, delivery: Delivery) -> None:
        log("began", "counts", delivery.id, event.key, event.new_value, delivery.attempt)
        with delivery.transaction("effects") as tx:
            name = f"{event.key} {event.new_value}"
            last = tx.get(event.key) or 0
            tx.set(name, (tx.get(name) or 0) + 1)
            tx.set(event.key, event.new_value)
        log("handled", "counts", delivery.id, event.key, event.new_value)
        log("effect", event.key, event.new_value, last)

    log("triggers")


def start_clients(life: Life, *, durable: bool) -> list[threading.Thread]:
    """Start everything that this process does; return the threads."""
    engine = life.engine
    engine.on_error(lambda failure: life.log("on_error", str(failure)[:1000]))
    start_triggers(life, durable=durable)
    on_loop = [Registers(life, "task-1"), Registers(life, "task-2"), Counts(life, "task-3")]

    async def tasks() -> None:
        await asyncio.gather(*(client.run_on_loop() for client in on_loop))

    runs: dict[str, Callable[[], None]] = {
        "tasks": lambda: asyncio.run(tasks()),
        "registers": Registers(life, "registers").run,
        "counts": Counts(life, "counts").run,
        "bank": Bank(life, "bank").run,
        "writes": Writes(life, "writes").run,
        "watch": Watches(life, "watch").run,
    }

    def guarded(run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            life.log("crashed", threading.current_thread().name, repr(error))
            raise

    threads = [threading.Thread(target=guarded, args=(run,), name=name) for name, run in runs.items()]
    for thread in threads:
        thread.start()
    return threads
