"""Runs one heavy load in a process of its own, so that its memory can be measured; prints the figures as JSON.

python child.py NAME DIRECTORY
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scopestate import Engine
from scopestate.actors.directory import Sweep

MIB = 1024 * 1024


def peak_mib() -> float:
    """The most memory that this process has held so far."""
    # Not getrusage: its figure begins with that of the parent process.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM")


def settings(directory: str, *, durability: str = "interval", interval_ms: int = 50, **limits: Any) -> dict[str, Any]:
    kv = {
        "store_method": "file_based",
        "file_path": directory,
        "save_interval_ms": interval_ms,
        "durability": durability,
    }
    worker = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}
    return {"workers": [worker], "limits": limits}


@contextmanager
def bystander(engine: Engine) -> Iterator[dict[str, float]]:
    """Another user of the engine, on another scope at the same time: how often, and how long the longest call took.

    How long: while this process was using a processor. That others use it, or the machine stops, says nothing.
    """
    figures: dict[str, float] = {"calls": 0, "longest_ms": 0.0}
    stop = threading.Event()

    def work() -> None:
        count = 0
        longest = 0.0
        while not stop.wait(0.001):
            began, used = time.perf_counter(), time.process_time()
            engine.update("bystander", "n", [{"type": "increment", "path": "", "by": 1}])
            longest = max(longest, min(time.perf_counter() - began, time.process_time() - used))
            count += 1
        figures["calls"], figures["longest_ms"] = count, longest * 1000
        assert engine.get("bystander", "n") == count

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield figures
    finally:
        stop.set()
        thread.join()


def large_values(directory: str) -> dict[str, Any]:
    """Set, read, grow and delete values of 64 MiB, with a trigger on them; then read one after a restart."""
    value = "x" * (64 * MIB - 2)
    seen: list[int] = []
    before = peak_mib()
    with Engine.from_config(settings(directory)) as engine:
        engine.on_change(scope="s")(lambda event: seen.append(len(event.new_json or b"")))
        with bystander(engine) as figures:
            engine.set("s", "k", value)
            assert len(engine.get("s", "k")) == 64 * MIB - 2
            engine.update("s", "k", [{"type": "append", "path": "", "value": "!"}])
            engine.set("s", "gone", value)
            assert len(engine.delete("s", "gone")) == 64 * MIB - 2
            engine.flush()
        engine.drain(30)
    with Engine.from_config(settings(directory)) as engine:
        assert engine.get("s", "k").endswith("x!")
        assert len(engine.list("s")) == 1
    return {"grew_mib": peak_mib() - before, "seen": seen, **figures}


def large_scope(directory: str) -> dict[str, Any]:
    """A scope of 1,000,000 keys: written, saved, one key changed and saved, read in order after a restart."""
    count = 1_000_000
    keys = [f"key-{number}" for number in range(count)]
    before = peak_mib()
    with Engine.from_config(settings(directory, interval_ms=200)) as engine:
        with bystander(engine) as figures:
            for number, key in enumerate(keys):
                engine.set("big", key, number)
            engine.flush()
            began = time.process_time()
            engine.set("big", "key-500000", "changed")
            engine.flush()
            one_key_ms = (time.process_time() - began) * 1000
        assert engine.stats().keys == count + 1
        # The longest part of a turn on this scope that anybody could wait for.
        assert engine.list("big")[500_000] == "changed"
    with Engine.from_config(settings(directory)) as engine:
        assert engine.get("big", "key-999999") == 999_999
        values = engine.list("big")
        assert values[500_000] == "changed"
        assert len(values) == count
    return {"grew_mib": peak_mib() - before, "one_key_ms": one_key_ms, **figures}


def many_scopes(directory: str) -> dict[str, Any]:
    """100,000 scopes with a key each: written, saved, named, left by the sweep, read again, closed."""
    count = 100_000
    before = peak_mib()
    with Engine.from_config(settings(directory, interval_ms=200)) as engine:
        began = time.perf_counter()
        with bystander(engine) as figures:
            for number in range(count):
                engine.set(f"scope-{number}", "k", number)
            created_s = time.perf_counter() - began
            engine.flush()
            assert len(engine.list_groups()) >= count
            housekeeper = engine._parts.housekeeper
            swept = threading.Event()
            arm = housekeeper.arm
            housekeeper.arm = lambda: (arm(), swept.set())  # type: ignore[method-assign]
            while engine.stats().scopes > 1000:
                swept.clear()
                housekeeper.tell(Sweep())
                assert swept.wait(30)
            assert engine.get("scope-77777", "k") == 77_777
        grew = peak_mib() - before
        began = time.process_time()
    closed_s = time.process_time() - began
    return {"grew_mib": grew, "created_s": created_s, "closed_s": closed_s, **figures}


def many_triggers(directory: str) -> dict[str, Any]:
    """100,000 triggers on one key each, and 100,000 on the same key: registered, fired, unregistered."""
    count = 100_000
    before = peak_mib()
    deliveries: list[None] = []
    # close() asks each of the 100,000 handlers, which takes seconds where coverage is traced.
    with Engine.from_config({"limits": {"close_grace_ms": 60_000}}) as engine:
        engine.register_function("test::note", lambda event: deliveries.append(None))
        with bystander(engine) as figures:
            began = time.perf_counter()
            handles = [
                engine.register_trigger(function_id="test::note", scope="s", key=f"k{number}")
                for number in range(count)
            ]
            registered_s = time.perf_counter() - began
            for number in range(1000):
                engine.set("s", "unwatched", number)
                engine.set("s", f"k{number}", number)
            engine.drain(60)
            assert len(deliveries) == 1000
            for handle in handles:
                handle.unregister()
            engine.set("s", "k1", 1)
            handles = [engine.register_trigger(function_id="test::note", scope="s", key="same") for _ in range(count)]
            engine.set("s", "same", 1)
            engine.drain(60)
            assert len(deliveries) == 1000 + count
    return {"grew_mib": peak_mib() - before, "registered_s": registered_s, **figures}


def many_writers(directory: str) -> dict[str, Any]:
    """1,000 asyncio tasks that increment one number on a scope with commit durability, beside threads that do too."""
    before = peak_mib()
    with Engine.from_config(settings(directory, durability="commit")) as engine:
        add = [{"type": "increment", "path": "", "by": 1}]

        async def writer() -> None:
            for _ in range(20):
                await engine.aio.update("hot", "n", add)

        async def main() -> None:
            await asyncio.gather(*(writer() for _ in range(1000)))

        def thread() -> None:
            for _ in range(100):
                engine.update("hot", "n", add)

        threads = [threading.Thread(target=thread) for _ in range(4)]
        with bystander(engine) as figures:
            for each in threads:
                each.start()
            asyncio.run(main())
            for each in threads:
                each.join()
        assert engine.get("hot", "n") == 20_400
        commits = engine.stats().saves
    with Engine.from_config(settings(directory)) as engine:
        assert engine.get("hot", "n") == 20_400
    return {"grew_mib": peak_mib() - before, "commits": commits, **figures}


LOADS: dict[str, Callable[[str], dict[str, Any]]] = {
    load.__name__: load for load in (large_values, large_scope, many_scopes, many_triggers, many_writers)
}

if __name__ == "__main__":
    began = time.perf_counter()
    result = LOADS[sys.argv[1]](sys.argv[2])
    sys.stdout.write(json.dumps({**result, "took_s": time.perf_counter() - began}))
