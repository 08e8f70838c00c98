"""Calls, watches and triggers of one engine while the process that it follows ends, and it takes over."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from processes import PATIENCE_S, Process, role_of, wait_until

from scopestate import DELETE, Engine, ScopestateError, ops
from scopestate.errors import ConnectionLost

Open = Callable[..., Engine]
Start = Callable[..., Process]

THREADS, TASKS = 4, 4


class Writer:
    """Appends numbers to a key of its own, in every way that there is; each with an idempotency key."""

    def __init__(self, engine: Engine, name: str, seed: int) -> None:
        self.engine = engine
        self.name = name
        self.random = random.Random(seed)
        self.count = 0
        self.problem: BaseException | None = None

    def step(self) -> Callable[[], Any]:
        """Return the next call."""
        number, key = self.count, self.name
        self.count += 1
        scope, once = self.engine.scope("s"), f"{key}-{number}"
        ways: list[Callable[[], Any]] = [
            lambda: scope.update(key, [ops.Append("", number)], idempotency_key=once),
            lambda: scope.update(key, [ops.Append("", number)], idempotency_key=once, durable=True),
            lambda: scope.transact(lambda tx: tx.set(key, [*(tx.get(key) or []), number]), idempotency_key=once),
        ]
        return self.random.choice(ways)

    def check(self) -> None:
        assert self.problem is None, repr(self.problem)
        assert self.engine.get("s", self.name) == list(range(self.count))


def run_threads(writers: list[Writer], stop: threading.Event) -> list[threading.Thread]:
    def write(writer: Writer) -> None:
        try:
            while not stop.is_set():
                writer.step()()
                assert writer.engine.get("s", writer.name)[-1] == writer.count - 1
        except BaseException as error:  # noqa: BLE001 - the test raises it
            writer.problem = error

    threads = [threading.Thread(target=write, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    return threads


def run_tasks(engine: Engine, names: list[str], stop: threading.Event, counts: dict[str, int]) -> threading.Thread:
    async def write(name: str) -> None:
        while not stop.is_set():
            number = counts[name]
            counts[name] += 1
            done = await engine.aio.scope("s").update(name, [ops.Append("", number)], idempotency_key=f"{name}{number}")
            assert done.new_value[-1] == number

    async def all_of_them() -> None:
        await asyncio.gather(*map(write, names))

    thread = threading.Thread(target=lambda: asyncio.run(all_of_them()))
    thread.start()
    return thread


@pytest.mark.parametrize("ends", ["closes", "is killed"])
def test_no_call_is_lost_or_done_twice(open_engine: Open, start: Start, ends: str) -> None:
    owner = start()
    engine = open_engine(limits={"call_timeout_ms": 60_000})
    told: dict[str, list[Any]] = {}
    failures: list[Any] = []
    engine.on_error(failures.append)
    engine.on_change(scope="s")(lambda event: told.setdefault(event.key, []).append(event.new_value))
    writers = [Writer(engine, f"t{number}", number) for number in range(THREADS)]
    counts = {f"a{number}": 0 for number in range(TASKS)}
    stop = threading.Event()
    threads = [*run_threads(writers, stop), run_tasks(engine, list(counts), stop, counts)]

    wait_until(lambda: all(writer.count > 10 or writer.problem for writer in writers))
    if ends == "closes":
        owner.close()
    else:
        owner.kill()
    wait_until(lambda: role_of(engine) == "owner")
    aims = [writer.count + 10 for writer in writers]
    wait_until(lambda: all(w.count > aim or w.problem for w, aim in zip(writers, aims, strict=True)))
    stop.set()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()

    for writer in writers:
        writer.check()
    for name, count in counts.items():
        assert engine.get("s", name) == list(range(count))
    engine.drain(PATIENCE_S)
    for name, values in told.items():
        lengths = [len(value) for value in values]
        assert lengths == sorted(set(lengths)), name  # in order, and none twice
        if ends == "closes":
            assert lengths == list(range(1, len(lengths) + 1)), name
            assert values[-1] == engine.get("s", name)
    if ends == "closes":
        assert failures == []


def test_calls_without_a_key_fail_or_are_done_once(open_engine: Open, start: Start) -> None:
    owner = start()
    engine = open_engine()
    done, unknown = [0] * THREADS, [0] * THREADS
    stop = threading.Event()
    problems: list[BaseException] = []

    def write(number: int) -> None:
        while not stop.is_set():
            try:
                engine.scope("s").modify(f"k{number}", lambda value: (value or 0) + 1)
                done[number] += 1
            except ScopestateError as error:
                if not isinstance(error.__cause__, ConnectionLost):
                    problems.append(error)
                    return
                unknown[number] += 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    wait_until(lambda: min(done) > 10 or problems)
    owner.kill()
    aims = list(done)
    wait_until(lambda: all(now > aim + 10 for now, aim in zip(done, aims, strict=True)) or problems)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE_S)

    assert problems == []
    for number in range(THREADS):
        assert done[number] <= engine.get("s", f"k{number}") <= done[number] + unknown[number]
    assert engine.scope("s").modify("k0", lambda value: DELETE).new_value is None


def test_closing_while_the_owner_ends_hangs_nowhere(open_engine: Open, start: Start) -> None:
    for _ in range(3):
        owner = start()
        engine = open_engine(limits={"close_grace_ms": 100})
        engine.set("s", "k", 1)
        killer = threading.Thread(target=owner.kill)
        killer.start()
        engine.close()
        killer.join(PATIENCE_S)
        assert engine.closed
