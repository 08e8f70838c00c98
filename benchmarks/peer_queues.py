"""Peers of durable triggers: each takes jobs from one producer and has one consumer do and acknowledge them.

A job is in the peer's store before the producer continues, and is removed after it was done: at least once. Each
function takes the values, and returns the seconds from the first `put` until the last acknowledgement.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huey
import litequeue
import procrastinate
import procrastinate.testing
import redis

from benchmarks.harness import Value

PATIENCE_S = 120.0


def _beside(produce: Callable[[], None], consume: Callable[[], None]) -> float:
    """Run the consumer on a thread of its own beside the producer; return the seconds until both have ended."""
    consumer = threading.Thread(target=consume, name="consumer")
    began = time.perf_counter()
    consumer.start()
    produce()
    consumer.join(PATIENCE_S)
    assert not consumer.is_alive(), "the consumer does not end"
    return time.perf_counter() - began


def by_litequeue(values: Sequence[Value]) -> float:
    """litequeue in a file: its journal is the write-ahead log, synced at checkpoints, not at each `put`."""
    with TemporaryDirectory() as folder:
        file = str(Path(folder) / "queue.db")
        litequeue.LiteQueue(filename_or_conn=file)  # makes the tables

        def produce() -> None:
            queue = litequeue.LiteQueue(filename_or_conn=file)
            for value in values:
                queue.put(json.dumps(value))

        def consume() -> None:
            queue = litequeue.LiteQueue(filename_or_conn=file)
            done = 0
            while done < len(values):
                message = queue.pop()
                if message is None:
                    time.sleep(0.0005)
                    continue
                json.loads(message.data)
                queue.done(message.message_id)
                done += 1

        return _beside(produce, consume)


def by_huey(values: Sequence[Value], *, fsync: bool | None) -> float:
    """huey in a file, with SQLite's default of its write-ahead log; with `fsync` each commit is synced to the disk."""
    with TemporaryDirectory() as folder:
        tasks = huey.SqliteHuey(filename=str(Path(folder) / "queue.db"), fsync=fsync, results=False)
        done = 0

        @tasks.task()  # type: ignore[untyped-decorator]  # it has no types
        def handle(_value: Value) -> None:
            nonlocal done
            done += 1

        def produce() -> None:
            for value in values:
                handle(value)

        def consume() -> None:
            while done < len(values):
                task = tasks.dequeue()
                if task is None:
                    time.sleep(0.0005)
                    continue
                tasks.execute(task)

        taken = _beside(produce, consume)
        tasks.storage.close()
        return taken


def by_procrastinate(values: Sequence[Value]) -> float:
    """procrastinate with its connector for tests: in memory, so that nothing survives anything."""

    async def run() -> float:
        app = procrastinate.App(connector=procrastinate.testing.InMemoryConnector())
        done = 0

        @app.task(name="handle")
        async def handle(value: Any) -> None:
            nonlocal done
            done += 1

        async with app.open_async():
            began = time.perf_counter()
            for value in values:
                await handle.defer_async(value=value)
            await app.run_worker_async(wait=False, install_signal_handlers=False, listen_notify=False)
            taken = time.perf_counter() - began
        assert done == len(values)
        return taken

    return asyncio.run(run())


def by_redis_stream(values: Sequence[Value], url: str) -> float:
    """A stream of a Redis with one consumer group, by redis-py: as durable as the server is."""
    with redis.Redis.from_url(url) as client, redis.Redis.from_url(url) as reader:
        client.delete("jobs")
        client.xgroup_create("jobs", "workers", id="0", mkstream=True)

        def produce() -> None:
            for value in values:
                client.xadd("jobs", {"value": json.dumps(value)})

        def consume() -> None:
            done = 0
            while done < len(values):
                found: Any = reader.xreadgroup("workers", "one", {"jobs": ">"}, count=100, block=1000)
                for _, entries in found or ():
                    for number, fields in entries:
                        json.loads(fields[b"value"])
                        reader.xack("jobs", "workers", number)
                        done += 1

        return _beside(produce, consume)
