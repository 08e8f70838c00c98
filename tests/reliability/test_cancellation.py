"""Tasks that are cancelled wherever a call of `engine.aio` can wait: for a busy scope, its loading, its commit."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from reliability.conftest import OpenEngine
from reliability.figures import record
from reliability.living import PATIENCE_S, InThread, saved
from reliability.slow import Gate, SlowDisk, busy, check_agreement, watched

from scopestate import Engine, messages

DURABILITIES = ["memory", "interval", "commit"]

AioCall = Callable[[Engine, int], Awaitable[Any]]

AIO_WRITES: dict[str, AioCall] = {
    "set": lambda engine, number: engine.aio.set("s", "k", number),
    "update": lambda engine, number: engine.aio.update("s", "k", [{"type": "set", "path": "n", "value": number}]),
    "delete": lambda engine, number: engine.aio.delete("s", "k"),
}
AIO_READS: dict[str, AioCall] = {
    "get": lambda engine, number: engine.aio.get("s", "k"),
    "list": lambda engine, number: engine.aio.list("s"),
}
AIO_CALLS = {**AIO_WRITES, **AIO_READS}


async def let_it_come(task: asyncio.Task[Any], rounds: int = 5) -> None:
    """Let a task come as far as it can by itself."""
    for _ in range(rounds):
        await asyncio.sleep(0)
    assert not task.done()


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("name", AIO_CALLS)
def test_a_task_cancelled_while_the_scope_is_busy_has_done_nothing(
    open_engine: OpenEngine, durability: str, name: str
) -> None:
    engine = open_engine(durability)
    seen = watched(engine)
    engine.set("s", "k", {"n": 0})
    gate, holder = busy(engine)

    async def main() -> None:
        engine.tell(messages.Set("s", "told", 1))  # so that reads need a turn as well: they must not overtake it
        doomed = asyncio.create_task(AIO_CALLS[name](engine, 1))  # type: ignore[arg-type]  # they are coroutines
        patient = asyncio.create_task(engine.aio.set("s", "other", 2))
        await let_it_come(doomed)
        await cancelled(doomed)
        gate.open()
        await asyncio.wait_for(patient, PATIENCE_S)
        assert await engine.aio.get("s", "k") == {"n": 0}

    asyncio.run(main())
    holder.result()
    check_agreement(engine, seen)
    assert engine.get("s", "other") == 2


@pytest.mark.parametrize("name", AIO_WRITES)
def test_a_task_cancelled_while_its_commit_is_under_way_has_written_all_the_same(
    slow_disk: tuple[Engine, SlowDisk], tmp_path: Path, name: str
) -> None:
    engine, disk = slow_disk
    seen = watched(engine)
    engine.set("s", "k", {"n": 0})
    gate = Gate()
    disk.at_save = gate

    async def main() -> None:
        doomed = asyncio.create_task(AIO_WRITES[name](engine, 1))  # type: ignore[arg-type]
        await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
        patient = asyncio.create_task(engine.aio.set("s", "other", 2))
        reader = asyncio.create_task(engine.aio.get("s", "k"))
        await let_it_come(doomed)
        await cancelled(doomed)
        await cancelled(reader)
        gate.open()
        await asyncio.wait_for(patient, PATIENCE_S)

    asyncio.run(main())
    check_agreement(engine, seen)
    assert engine._scopes["s"]._sequence == 3
    assert engine.get("s", "k") == {"set": 1, "update": {"n": 1}, "delete": None}[name]
    engine.close()
    assert saved(tmp_path / "store", "s")[0] == 3


@pytest.mark.parametrize("name", AIO_CALLS)
def test_a_task_cancelled_while_its_scope_is_loaded_leaves_a_scope_that_works(
    slow_disk: tuple[Engine, SlowDisk], name: str
) -> None:
    engine, disk = slow_disk
    seen = watched(engine)
    gate = Gate()
    disk.at_load = gate

    async def main() -> None:
        first = asyncio.create_task(AIO_CALLS[name](engine, 1))  # type: ignore[arg-type]
        await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
        second = asyncio.create_task(AIO_CALLS[name](engine, 2))  # type: ignore[arg-type]
        patient = asyncio.create_task(engine.aio.set("s", "other", 3))
        await let_it_come(first)
        await cancelled(second)  # its turn has not begun
        await cancelled(first)  # its turn has begun, with the load
        gate.open()
        await asyncio.wait_for(patient, PATIENCE_S)

    asyncio.run(main())
    check_agreement(engine, seen)
    writes = 1 if name in AIO_WRITES else 0
    assert engine._scopes["s"]._sequence == writes + 1
    assert engine.get("s", "other") == 3


@pytest.mark.parametrize("durability", DURABILITIES)
def test_tasks_cancelled_at_random_leave_everything_in_agreement(
    open_engine: OpenEngine, tmp_path: Path, durability: str
) -> None:
    engine = open_engine(durability)
    seen = watched(engine)
    engine.set("s", "k", 0)
    draw = random.Random(durability)
    names = list(AIO_CALLS)
    over = threading.Event()

    def disturb() -> None:
        number = 0
        while not over.is_set():
            number += 1
            engine.set("s", "k", -number)

    async def main() -> int:
        gave_up = turn = 0
        while gave_up < 150:
            turn += 1
            tasks = [
                asyncio.create_task(AIO_CALLS[draw.choice(names)](engine, turn * 10 + number))  # type: ignore[arg-type]
                for number in range(10)
            ]
            for _ in range(draw.randrange(6)):
                await asyncio.sleep(0)
            for task in draw.sample(tasks, 5):
                task.cancel()
            outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE_S)
            assert {type(outcome) for outcome in outcomes if isinstance(outcome, BaseException)} <= {
                asyncio.CancelledError
            }
            gave_up += sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        return gave_up

    disturber = InThread(disturb)
    cancelled_tasks = asyncio.run(main())
    over.set()
    disturber.result()
    check_agreement(engine, seen)
    expected = engine._scopes["s"]._sequence, dict(engine._scopes["s"]._values or {})
    engine.close()
    if durability != "memory":
        assert saved(tmp_path / "store", "s") == expected
    record(f"tasks cancelled: {durability}", cancelled=cancelled_tasks)
