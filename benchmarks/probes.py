"""Measures that need a process of their own: `python -m benchmarks.probes NAME ARGUMENT...` prints a JSON object."""

from __future__ import annotations

import bisect
import gc
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.harness import make_value

ROOT = Path(__file__).parents[1]
Findings = dict[str, float]


def run_probe(name: str, *arguments: object) -> Findings:
    """Run a probe in a new interpreter; raise CalledProcessError, its complaint on stderr, if it fails."""
    command = [sys.executable, "-m", "benchmarks.probes", name, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    findings: Findings = json.loads(done.stdout)
    return findings


def time_import(program: str) -> float:
    """Return the seconds a new interpreter takes to run `program`, from start to end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    return time.perf_counter() - began


def _resident_bytes() -> int:
    gc.collect()
    return _resident_now()


def _resident_now() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def engine_memory(count: str) -> Findings:
    """Grow one scope in memory."""
    from scopestate import Engine

    with Engine() as engine:
        engine.set("warm", "up", make_value(0))
        before = _resident_bytes()
        for index in range(int(count)):
            # A value at a time: a list of them all would count as memory of the engine.
            engine.set("bench", f"key-{index}", make_value(index))
        return {"grown_bytes": _resident_bytes() - before}


def dict_memory(count: str) -> Findings:
    """Grow a plain dict with the same content."""
    import msgspec

    encode = msgspec.json.Encoder().encode
    encode(make_value(0))
    before = _resident_bytes()
    values: dict[str, bytes] = {}
    for index in range(int(count)):
        values[f"key-{index}"] = encode(make_value(index))
    grown = _resident_bytes() - before
    assert len(values) == int(count)
    return {"grown_bytes": grown}


def many_scopes(folder: str, count: str) -> Findings:
    """Create scopes with one small key each, in memory if `folder` is empty; then close the engine."""
    from benchmarks.ours import on_disk
    from scopestate import Engine

    engine = Engine.from_config(on_disk(folder)) if folder else Engine()
    engine.set("warm", "up", 0)
    before = _resident_bytes()
    began = time.perf_counter()
    for index in range(int(count)):
        engine.set(f"scope-{index}", "k", 1)
    created = time.perf_counter()
    grown = _resident_bytes() - before
    threads = threading.active_count() - 1
    closing = time.perf_counter()
    engine.close()
    return {
        "create_s": created - began,
        "close_s": time.perf_counter() - closing,
        "grown_bytes": grown,
        "threads": threads,
    }


def fill_store(folder: str, keys: str, scopes: str) -> Findings:
    """Write a store of `keys` keys spread evenly over `scopes` scopes."""
    from benchmarks.ours import on_disk
    from scopestate import Engine

    began = time.perf_counter()
    with Engine.from_config(on_disk(folder)) as engine:
        for index in range(int(keys)):
            engine.set(f"scope-{index % int(scopes)}", f"key-{index}", make_value(index))
    size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {"fill_s": time.perf_counter() - began, "file_bytes": size}


def open_store(folder: str, scopes: str) -> Findings:
    """Open the store and get one key from a scope in the middle."""
    from benchmarks.ours import on_disk
    from scopestate import Engine

    index = int(scopes) // 2
    began = time.perf_counter()
    engine = Engine.from_config(on_disk(folder))
    value = engine.get(f"scope-{index}", f"key-{index}")
    taken = time.perf_counter() - began
    engine.close()
    assert value == make_value(index), value
    return {"first_get_s": taken}


def load_scope(folder: str, keys: str) -> Findings:
    """Open the store, load its one scope, and see what it takes in memory."""
    from benchmarks.ours import on_disk
    from scopestate import Engine

    engine = Engine.from_config(on_disk(folder))
    before = _resident_bytes()
    began, cpu = time.perf_counter(), time.process_time()
    value = engine.get("scope-0", "key-0")
    taken, cpu = time.perf_counter() - began, time.process_time() - cpu
    grown = _resident_bytes() - before
    assert value == make_value(0), value
    assert engine.stats().keys == int(keys)
    engine.close()
    return {"load_s": taken, "load_cpu_s": cpu, "grown_bytes": grown}


def expiry_at_random(count: str, span_s: str) -> Findings:
    """Give keys random deadlines within some seconds, read them all the while, and note when their events come."""
    from datetime import UTC, datetime, timedelta

    from scopestate import Engine

    rng, late_ms, readable, reads = random.Random(1), list[float](), 0, 0
    with Engine() as engine:
        engine.on_change(scope="s", events=("expired",))(
            lambda event: late_ms.append(time.time() * 1000 - (event.expired_at or 0))
        )
        begin = datetime.now(UTC) + timedelta(seconds=2)
        deadlines = {
            f"k{index}": begin + timedelta(seconds=rng.random() * float(span_s)) for index in range(int(count))
        }
        for key, deadline in deadlines.items():
            engine.set("s", key, 1, expires_at=deadline)
        keys, end = list(deadlines), begin + timedelta(seconds=float(span_s) + 1)
        while (now := datetime.now(UTC)) < end:
            key = rng.choice(keys)
            reads += 1
            readable += engine.get("s", key) is not None and now >= deadlines[key]
            time.sleep(0.001)  # the machine is idle otherwise
        engine.drain(timeout=10)
        late_ms.sort()
        return {
            "events": len(late_ms),
            "reads": reads,
            "readable_after_deadline": readable,
            "late_ms_median": late_ms[len(late_ms) // 2],
            "late_ms_99": late_ms[len(late_ms) * 99 // 100],
            "late_ms_worst": late_ms[-1],
        }


def expiry_together(folder: str, count: str) -> Findings:
    """Have many keys fall due at one moment, and note how long writers of the same scope wait meanwhile."""
    from datetime import UTC, datetime, timedelta

    from scopestate import Engine

    number, told, waits, over = int(count), list[float](), list[float](), threading.Event()
    kv = {"store_method": "file_based", "file_path": folder}
    with Engine.from_config(
        {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]}
    ) as engine:
        engine.on_change(scope="s", events=("expired",))(lambda event: told.append(time.perf_counter()))
        deadline = datetime.now(UTC) + timedelta(seconds=3 + number / 20_000)
        for index in range(number):
            engine.set("s", f"k{index}", index, expires_at=deadline)
        engine.flush()

        def write(name: str) -> None:
            while not over.is_set():
                began = time.perf_counter()
                engine.set("s", name, 1)
                waits.append(time.perf_counter() - began)
                time.sleep(0.0005)

        time.sleep(max(0.0, (deadline - datetime.now(UTC)).total_seconds() - 0.5))
        before = largest = _resident_bytes()
        writers = [threading.Thread(target=write, args=(f"w{index}",)) for index in range(2)]
        for writer in writers:
            writer.start()
        while len(told) < number:
            time.sleep(0.02)
            largest = max(largest, _resident_now())
        over.set()
        for writer in writers:
            writer.join()
        waits.sort()
        return {
            "seconds": told[-1] - told[0],
            "events_in_100_ms": max(bisect.bisect(told, told[index] + 0.1) - index for index in range(0, number, 100)),
            "writes": len(waits),
            "wait_ms_99": waits[len(waits) * 99 // 100] * 1000,
            "wait_ms_worst": waits[-1] * 1000,
            "grown_bytes": largest - before,
        }


PROBES = {
    probe.__name__: probe
    for probe in (
        engine_memory,
        dict_memory,
        many_scopes,
        fill_store,
        open_store,
        load_scope,
        expiry_at_random,
        expiry_together,
    )
}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](*sys.argv[2:])))
