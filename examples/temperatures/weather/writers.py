"""The writers: threads and asyncio tasks that replay the readings together, into the same scopes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from scopestate import Engine, messages, ops
from weather.data import Reading

THREADS = 4
TASKS = 3
"""With the threads an odd number, so that each writer gets readings of both stations."""
STEP = 100
"""Readings between two notes of progress."""


class Share(NamedTuple):
    """What one writer has to write."""

    writer: str
    readings: list[Reading]


def shares(readings: Sequence[Reading]) -> list[Share]:
    """Distribute the readings: neighbouring hours of a day go to different writers, which write to the same scope."""
    names = [f"thread-{n}" for n in range(1, THREADS + 1)] + [f"task-{n}" for n in range(1, TASKS + 1)]
    return [Share(name, list(readings[place :: len(names)])) for place, name in enumerate(names)]


def script(share: Share) -> Iterator[messages.Message]:
    """Return everything that one writer sends, in order. How it is sent is up to the thread or the task."""
    done = 0
    for month, readings in itertools.groupby(share.readings, key=lambda reading: reading.month):
        before = done
        for reading in readings:
            yield from _writes(reading)
            done += 1
            if done % STEP == 0:
                yield messages.Update("progress", share.writer, (ops.Increment("", STEP),))
        entry = {"month": month, "readings": done - before}
        yield messages.Update(f"journal/{share.writer}", "months", (ops.Append("", entry),))
    yield messages.Update("progress", share.writer, (ops.Increment("", done % STEP),))


def _writes(reading: Reading) -> tuple[messages.Message, ...]:
    station, date, hour, tenths = reading
    return (
        messages.Set(f"readings/{station}", f"{date}T{hour}", {"tenths": tenths}),
        messages.Update(f"days/{station}/{date}", "hours", (ops.Merge({hour: tenths}),)),
        messages.Update(
            f"months/{station}", reading.month, (ops.Increment("readings", 1), ops.Increment("sum_tenths", tenths))
        ),
    )


def start(engine: Engine, readings: Sequence[Reading], pool: ThreadPoolExecutor) -> list[Future[None]]:
    """Start all writers; the futures end when they do, with what they raised if they failed."""
    all_shares = shares(readings)
    threads = [pool.submit(_write, engine, share) for share in all_shares[:THREADS]]
    # Any number of event loops may use one engine; this one has a thread of its own so that the main thread can report.
    loop = pool.submit(asyncio.run, _write_all(engine, all_shares[THREADS:]))
    return [*threads, loop]


def _write(engine: Engine, share: Share) -> None:
    for message in script(share):
        engine.ask(message)


async def _write_all(engine: Engine, task_shares: Sequence[Share]) -> None:
    async with asyncio.TaskGroup() as group:
        for share in task_shares:
            group.create_task(_write_awaiting(engine, share))


async def _write_awaiting(engine: Engine, share: Share) -> None:
    for message in script(share):
        await engine.aio.ask(message)
        # An idle scope answers without suspending; without this the first task would do all its work before the second.
        await asyncio.sleep(0)
