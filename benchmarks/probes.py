"""What is measured in a process of its own: `python -m benchmarks.probes NAME ARGUMENT...` prints a JSON object."""

from __future__ import annotations

import gc
import json
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
    import psutil

    gc.collect()
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


PROBES = {
    probe.__name__: probe for probe in (engine_memory, dict_memory, many_scopes, fill_store, open_store, load_scope)
}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](*sys.argv[2:])))
