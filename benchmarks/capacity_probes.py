"""What the capacity figures are measured with: `python -m benchmarks.capacity_probes NAME ARGUMENT...` prints JSON.

Each probe runs in a process of its own. Service times are processor time: unlike elapsed time, other programs on the
machine do not add to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import resource
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import redis

from benchmarks.harness import Value, in_threads, make_pairs, make_value
from benchmarks.ours import on_disk
from benchmarks.redis_load import config as redis_config
from benchmarks.sharing_load import line, shared, started
from scopestate import Engine
from scopestate.errors import ScopestateError

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120.0
SAVE_MS = 1_000
TASKS = 64
KEYS = 1_000
NEVER_REACHED = 1_000_000_000
"""A limit of events, bytes or milliseconds."""
COUNT_EVERY_S = 0.3
MOST_COUNTS = 20
Findings = dict[str, float]
Settings = dict[str, Any]


def run_probe(name: str, *arguments: object) -> Findings:
    """Run a probe in a new interpreter; raise CalledProcessError, its complaint on stderr, if it fails."""
    command = [sys.executable, "-m", "benchmarks.capacity_probes", name, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    findings: Findings = json.loads(done.stdout)
    return findings


# -------------------------------------------------------------------------------------------------- what a process has


def _resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def _wake_ups() -> int:
    """Return how often the threads of this process have slept, and so how often they were woken."""
    count = 0
    for status in Path("/proc/self/task").glob("*/status"):
        with contextlib.suppress(OSError):  # the thread has ended
            for row in status.read_text(encoding="utf-8").splitlines():
                if row.startswith("voluntary_ctxt_switches"):
                    count += int(row.split()[1])
    return count


def _idle(seconds: float) -> Findings:
    """Do nothing for some seconds: the processor time and the wake-ups of each."""
    # To count the wake-ups takes processor time too: outside of what is measured.
    wake_ups = _wake_ups()
    cpu, began = time.process_time(), time.perf_counter()
    time.sleep(seconds)
    cpu, taken = time.process_time() - cpu, time.perf_counter() - began
    return {"idle_cpu": cpu / taken, "idle_wake_ups_per_s": max(0, _wake_ups() - wake_ups - 1) / taken}


def _info(client: redis.Redis, section: str, name: str) -> float:
    """Return a figure of a Redis server."""
    info: Any = client.info(section)
    return float(info[name])


def _size(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def _median_s(call: Callable[[], object], repeats: int = 3) -> float:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _in_memory() -> Settings:
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": {}}}}]}


def _kept(folder: str, durability: str = "interval", rule: Mapping[str, Any] | None = None) -> Settings:
    """Return the configuration of an engine in `folder` that saves each second; `rule` is for the scope `bench`."""
    found = on_disk(folder, save_interval_ms=SAVE_MS)
    found["workers"][0]["config"]["adapter"]["config"].update(durability=durability, share="never")
    if rule:
        found["scopes"] = [{"name": "bench", **rule}]
    found["limits"] = {"journal_events": NEVER_REACHED, "journal_bytes": 0, "passivate_after_ms": NEVER_REACHED}
    return found


# ------------------------------------------------------------------------------------------------------------- engines


def engines(kind: str, place: str, count: str, idle_s: str) -> Findings:
    """Open engines in one process, each with one key; then let them do nothing.

    Each figure but `opened` and `process_bytes` is for one of those that opened.

    `kind`: memory, file (a directory for each), follower (all of one directory, which another process owns), redis,
    shared (redis with `events: shared`), cluster (the same in a cluster). `place`: a folder, or the URLs of servers.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        owner: psutil.Process | None = None
        clients: list[redis.Redis] = []
        if kind == "follower":
            (child,) = stack.enter_context(started("own", place))
            line(child)
            owner = psutil.Process(child.pid)
        elif kind not in {"memory", "file"}:
            clients = [
                stack.enter_context(redis.Redis.from_url(url, decode_responses=True)) for url in place.split(",")
            ]

        def settings(number: int) -> Settings:
            if kind == "memory":
                return _in_memory()
            if kind == "file":
                found = on_disk(f"{place}/{number}")
                del found["workers"][0]["config"]["adapter"]["config"]["save_interval_ms"]
                return found
            if kind == "follower":
                return shared(place)
            return redis_config(place.split(",", maxsplit=1)[0], events="local" if kind == "redis" else "shared")

        # The first engine of a process also imports what its kind needs.
        began = time.perf_counter()
        stack.enter_context(Engine.from_config(settings(0))).set("s", "k", 1)
        first_s = time.perf_counter() - began
        process = psutil.Process()

        def elsewhere() -> tuple[float, float, float]:
            if owner is not None:
                return owner.num_fds(), owner.num_threads(), owner.memory_info().rss
            connected = sum(_info(client, "clients", "connected_clients") for client in clients)
            return connected, 0, sum(_info(client, "memory", "used_memory") for client in clients)

        def settle() -> None:
            """Wait until what opening has begun, such as a look at the server, has ended: three equal counts."""
            counts: list[float] = []
            while len(counts) < MOST_COUNTS and (len(counts) < 3 or len(set(counts[-3:])) > 1):
                time.sleep(min(COUNT_EVERY_S, float(idle_s)))
                counts.append(elsewhere()[0])

        settle()
        before = process.num_fds(), process.num_threads(), _resident(), *elsewhere()
        opened: list[Engine] = []
        failed = ""
        began = time.perf_counter()
        for number in range(1, int(count) + 1):
            try:
                opened.append(Engine.from_config(settings(number)))
                opened[-1].set(f"s{number}", "k", 1)
            except (ScopestateError, OSError, RuntimeError) as error:
                failed = str(error)
                break
        open_s = time.perf_counter() - began
        if failed:
            print(f"{kind}: stopped at {len(opened)} engines: {failed}", file=sys.stderr)
        settle()
        after = process.num_fds(), process.num_threads(), _resident(), *elsewhere()
        idle = _idle(float(idle_s))
        began = time.perf_counter()
        for engine in opened:
            engine.close()
        close_s = time.perf_counter() - began
    many = max(1, len(opened))
    grown = [(new - old) / many for old, new in zip(before, after, strict=True)]
    names = ("fds", "threads", "bytes", "there_fds", "there_threads", "there_bytes")
    found = {
        "opened": len(opened),
        "first_s": first_s,
        "open_s": open_s / many,
        "close_s": close_s / many,
        "process_bytes": before[2],
    }
    return {**found, **dict(zip(names, grown, strict=True)), **{name: each / many for name, each in idle.items()}}


# -------------------------------------------------------------------------------------------------------------- scopes


def scopes(place: str, count: str, idle_s: str) -> Findings:
    """Make scopes with one small key each, in memory if `place` is empty."""
    number = int(count)
    with Engine.from_config(_kept(place) if place else _in_memory()) as engine:
        engine.set("warm", "up", 0)
        before, began = _resident(), time.perf_counter()
        for index in range(number):
            engine.set(f"scope-{index}", "k", 1)
        created_s = time.perf_counter() - began
        grown = _resident() - before
        groups_s = _median_s(engine.list_groups)
        engine.flush()
        time.sleep(min(1.0, float(idle_s)))
        idle = _idle(float(idle_s))
        threads = threading.active_count() - 1
        began = time.perf_counter()
    found = {"create_s": created_s / number, "bytes": grown / number, "list_groups_s": groups_s, "threads": threads}
    return {
        **found,
        **idle,
        "close_s": time.perf_counter() - began,
        "file_bytes": _size(place) / number if place else 0,
    }


def stored_scopes(place: str, count: str, idle_s: str) -> Findings:
    """Open a store that has scopes, and use none of them; then use one, and list the names of all."""
    number = int(count)
    with TemporaryDirectory() as empty, Engine.from_config(_kept(empty)) as engine:
        engine.set("warm", "up", 0)
    before, began = _resident(), time.perf_counter()
    with Engine.from_config(_kept(place)) as engine:
        opened_s = time.perf_counter() - began
        grown = _resident() - before
        idle = _idle(float(idle_s))
        began = time.perf_counter()
        assert engine.get(f"scope-{number // 2}", "k") == 1
        first_get_s = time.perf_counter() - began
        some = range(0, number, max(1, number // 1_000))
        began = time.perf_counter()
        for index in some:
            engine.get(f"scope-{index}", "k")
        get_s = (time.perf_counter() - began) / len(some)
        found = {"open_s": opened_s, "bytes": grown / number, "first_get_s": first_get_s, "get_s": get_s}
        return {**found, **idle, "list_groups_s": _median_s(engine.list_groups)}


def passivated_scopes(place: str, count: str) -> Findings:
    """Make scopes, save them, and let them leave memory: what that takes, and what stays in memory of each."""
    number = int(count)
    settings = _kept(place)
    settings["limits"]["passivate_after_ms"] = 500
    with Engine.from_config(settings) as engine:
        engine.set("warm", "up", 0)
        before = _resident()
        for index in range(number):
            engine.set(f"scope-{index}", "k", 1)
        engine.flush()
        cpu, deadline = time.process_time(), time.monotonic() + PATIENCE_S
        left = engine.stats().scopes
        leaving = left
        while left > 1:
            assert time.monotonic() < deadline, f"{left} scopes are still in memory"
            time.sleep(0.05)
            left = engine.stats().scopes
        cpu = time.process_time() - cpu
        return {"leave_cpu_s": cpu / max(1, leaving), "bytes": (_resident() - before) / number}


def redis_scopes(url: str, count: str) -> Findings:
    """Make scopes with one small key each in Redis: what the server keeps for each."""
    number = int(count)
    with Engine.from_config(redis_config(url)) as engine, redis.Redis.from_url(url, decode_responses=True) as client:
        engine.set("warm", "up", 0)

        server, here = _info(client, "memory", "used_memory"), _resident()
        asyncio.run(_set_by_tasks(engine, [(f"scope-{index}", "k", 1) for index in range(number)]))
        grown = (_info(client, "memory", "used_memory") - server) / number
        return {
            "there_bytes": grown,
            "bytes": (_resident() - here) / number,
            "list_groups_s": _median_s(engine.list_groups),
        }


# --------------------------------------------------------------------------------------------------------------- writes


async def _set_by_tasks(engine: Engine, calls: Sequence[tuple[str, str, object]]) -> None:
    async def some(first: int) -> None:
        for scope, key, value in calls[first::TASKS]:
            await engine.aio.set(scope, key, value)

    await asyncio.gather(*(some(first) for first in range(TASKS)))


def _calls(count: int, scopes: int = TASKS) -> list[tuple[str, str, Value]]:
    return [(f"bench-{index % scopes}", f"key-{index % KEYS}", make_value(index)) for index in range(count)]


def _set_all(engine: Engine, calls: Sequence[tuple[str, str, object]]) -> None:
    for scope, key, value in calls:
        engine.set(scope, key, value)


def writes(triggers: str, watchers: str, count: str) -> Findings:
    """Write in memory with triggers that want each event, and watches of it: the processor time of each write."""
    number = int(count)
    calls = [("bench", key, value) for key, value in make_pairs(number)]
    with Engine() as engine, ExitStack() as stack:
        _set_all(engine, calls[: number // 10])
        for index in range(int(triggers)):
            engine.register_function(f"bench::{index}", lambda _event: None)
            engine.register_trigger(function_id=f"bench::{index}", scope="bench")

        def read(changes: Any) -> None:
            for _ in range(number):
                changes.get(timeout=PATIENCE_S)

        watching = [
            stack.enter_context(engine.watch("bench", snapshot=False, buffer=number)) for _ in range(int(watchers))
        ]
        threads = [threading.Thread(target=read, args=(changes,)) for changes in watching]
        for thread in threads:
            thread.start()
        cpu, began = time.process_time(), time.perf_counter()
        _set_all(engine, calls)
        engine.drain(timeout=PATIENCE_S)
        for thread in threads:
            thread.join()
        return {"cpu_s": (time.process_time() - cpu) / number, "s": (time.perf_counter() - began) / number}


def saved(kind: str, count: str) -> Findings:
    """Write to a directory that is saved each second.

    `kind`: plain (the same keys again and again), new (a new key each time), history, durable (a durable trigger).
    """
    number = int(count)
    rule = {"history": {"events": NEVER_REACHED, "bytes": 0}} if kind == "history" else {}
    calls = [("bench", key, value) for key, value in make_pairs(number, keys=number if kind == "new" else KEYS)]
    with TemporaryDirectory() as folder:
        with Engine.from_config(_kept(folder, rule=rule)) as engine:
            if kind == "durable":
                engine.on_change(scope="bench", durable="bench")(lambda _event: None)
            _set_all(engine, calls[:KEYS])
            engine.flush()
            engine.drain(timeout=PATIENCE_S)
            cpu, began = time.process_time(), time.perf_counter()
            _set_all(engine, calls)
            engine.flush()
            engine.drain(timeout=PATIENCE_S)
            cpu, taken = time.process_time() - cpu, time.perf_counter() - began
        return {"cpu_s": cpu / number, "s": taken / number, "file_bytes": _size(folder) / number}


def commits(threads: str, count: str) -> Findings:
    """Threads that each write a scope with durability `commit`, one write after the other.

    `sync_s`: a commit by SQLite alone, measured before and after. A disk may take ten times as long a minute later.
    """
    number = int(count)
    syncs = [raw_commits("1", count)["commit_s"]]
    with TemporaryDirectory() as folder, Engine.from_config(_kept(folder, "commit")) as engine:
        jobs = [
            partial(_set_all, engine, [(f"bench-{index}", key, value) for key, value in make_pairs(number)])
            for index in range(int(threads))
        ]
        engine.set("warm", "up", 0)
        saves, cpu = engine.stats().saves, time.process_time()
        taken = in_threads(jobs)
        cpu, saves = time.process_time() - cpu, engine.stats().saves - saves
    syncs.append(raw_commits("1", count)["commit_s"])
    made = number * len(jobs)
    return {
        "per_s": made / taken,
        "cpu_s": cpu / made,
        "batch": made / max(1, saves),
        "sync_s": statistics.fmean(syncs),
    }


def raw_commits(rows: str, count: str) -> Findings:
    """Commit rows with SQLite alone, each commit synced: the time of a commit, and the processor time in it."""
    number = int(rows)
    with (
        TemporaryDirectory() as folder,
        contextlib.closing(sqlite3.connect(f"{folder}/raw.db", isolation_level=None)) as database,
    ):
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("CREATE TABLE state (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
        pairs = [(key, json.dumps(value)) for key, value in make_pairs(number)]
        cpu, taken = time.process_time(), []
        for _ in range(int(count)):
            began = time.perf_counter()
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", pairs)
            database.execute("COMMIT")
            taken.append(time.perf_counter() - began)
        return {"commit_s": statistics.fmean(taken), "cpu_s": (time.process_time() - cpu) / int(count)}


# -------------------------------------------------------------------------------------------------- several processes


def follower(triggers: str, count: str) -> Findings:
    """Write through a follower: what a write costs here, and what in the process that owns the directory.

    The owner saves each second. `triggers`: 1 if the follower has a trigger that wants each change.
    """
    calls = _calls(int(count))
    with TemporaryDirectory() as folder, started("own", folder) as (child,):
        line(child)
        owner = psutil.Process(child.pid)

        def used() -> float:
            return sum(owner.cpu_times()[:2])

        with Engine.from_config(shared(folder)) as engine:
            if int(triggers):
                engine.on_change(scope_prefix="bench")(lambda _event: None)
            _set_all(engine, calls[: len(calls) // 10])
            found = {}
            ways: dict[str, Callable[[], object]] = {
                "one": lambda: _set_all(engine, calls),
                "tasks": lambda: asyncio.run(_set_by_tasks(engine, calls)),
            }
            for name, write in ways.items():
                engine.drain(timeout=PATIENCE_S)
                there, here, began = used(), time.process_time(), time.perf_counter()
                write()
                found[f"{name}_s"] = (time.perf_counter() - began) / len(calls)
                engine.drain(timeout=PATIENCE_S)
                found[f"{name}_there_s"] = (used() - there) / len(calls)
                found[f"{name}_here_s"] = (time.process_time() - here) / len(calls)
            return found


def redis_writes(urls: str, events: str, readers: str, count: str) -> Findings:
    """Write to Redis by many tasks of one engine: what a write costs here, in the servers together, and in readers.

    `readers`: how many other processes have an engine with a trigger for each event.
    """
    calls = _calls(int(count))
    warm = calls[: len(calls) // 10]
    places = urls.split(",")
    with ExitStack() as stack:
        clients = [stack.enter_context(redis.Redis.from_url(url, decode_responses=True)) for url in places]
        writer = stack.enter_context(Engine.from_config(redis_config(places[0], events=events)))
        command = [sys.executable, "-m", "benchmarks.capacity_probes", "redis_reads"]
        command += [places[0], str(len(warm)), str(len(calls))]
        children = [
            stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
            for _ in range(int(readers))
        ]
        for child in children:
            assert line(child) == "ready"

        def used() -> float:
            names = ("used_cpu_user", "used_cpu_sys")
            return sum(_info(client, "cpu", name) for client in clients for name in names)

        asyncio.run(_set_by_tasks(writer, warm))
        writer.drain(timeout=PATIENCE_S)
        there, here, began = used(), time.process_time(), time.perf_counter()
        asyncio.run(_set_by_tasks(writer, calls))
        taken = time.perf_counter() - began
        writer.drain(timeout=PATIENCE_S)
        here = time.process_time() - here
        read = [json.loads(line(child))["cpu_s"] for child in children]
        there = used() - there
        length, size = 0, 0
        for client in clients:
            for name in client.scan_iter("scopestate:events*", _type="stream"):
                kept: Any = client.xlen(name)
                held: Any = client.memory_usage(name, samples=0)
                length, size = length + kept, size + held
        found = {name: each / len(calls) for name, each in {"s": taken, "here_s": here, "there_s": there}.items()}
        return {**found, "read_s": statistics.fmean(read) if read else 0.0, "event_bytes": size / max(1, length)}


def redis_reads(url: str, warm: str, count: str) -> Findings:
    """Read the events of another process's writes: the processor time of each, without the first `warm` of them."""
    first, last = int(warm), int(warm) + int(count)
    seen, began, ended = 0, 0.0, threading.Event()
    with Engine.from_config(redis_config(url, events="shared")) as engine:

        @engine.on_change(scope_prefix="bench", order="trigger")
        def arrived(_event: object) -> None:
            nonlocal seen, began
            seen += 1
            if seen == first:
                began = time.process_time()
            if seen == last:
                ended.set()

        print("ready", flush=True)
        assert ended.wait(PATIENCE_S), f"{seen} of {last} events arrived"
        return {"cpu_s": (time.process_time() - began) / int(count)}


PROBES: dict[str, Callable[..., Findings]] = {
    probe.__name__: probe
    for probe in (
        engines,
        scopes,
        stored_scopes,
        passivated_scopes,
        redis_scopes,
        writes,
        saved,
        commits,
        raw_commits,
        follower,
        redis_writes,
        redis_reads,
    )
}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](*sys.argv[2:])))
