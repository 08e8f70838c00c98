"""What keeping the state costs: during calls, in a save, at opening."""

from __future__ import annotations

import json
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from tempfile import TemporaryDirectory

from benchmarks.hand_over import handing_over
from benchmarks.harness import Measure, Row, Sizes, compare, in_threads, make_pairs, percentile
from benchmarks.measures_writes import committing
from benchmarks.ours import SCOPE, on_disk, set_batch
from benchmarks.probes import run_probe
from scopestate import Engine


def file_set(sizes: Sizes) -> list[Row]:
    """`engine.set` with a store that is saved every second, beside `engine.set` in memory."""
    with (
        TemporaryDirectory() as folder,
        Engine() as in_memory,
        Engine.from_config(on_disk(folder, save_interval_ms=1_000)) as stored,
    ):
        pairs = make_pairs(sizes.calls * 5)
        found = compare(set_batch(stored), set_batch(in_memory), pairs, sizes.repeats)
    what = "set: file_based, interval durability / in memory"
    return [Row("file_set", what, 1 / found.ratio, "x", 1.5, figures=found.figures, own="ours_us")]


def save_one_key(sizes: Sizes) -> list[Row]:
    """`engine.flush()` after one `set` in a large scope that is saved already."""
    taken = []
    with TemporaryDirectory() as folder, Engine.from_config(on_disk(folder)) as engine:
        pairs = make_pairs(sizes.large_scope_keys, keys=sizes.large_scope_keys)
        set_batch(engine)(pairs)
        began = time.perf_counter()
        engine.flush()
        first_s = time.perf_counter() - began
        for number in range(sizes.repeats * 3):
            engine.set(SCOPE, pairs[number * 37 % len(pairs)][0], {"changed": number})
            began = time.perf_counter()
            engine.flush()
            taken.append(time.perf_counter() - began)
    figures = {"worst_ms": max(taken) * 1e3, "first_save_of_all_s": first_s}
    what = f"saving 1 changed key of a scope of {sizes.large_scope_keys}"
    return [Row("save_one_key", what, statistics.median(taken) * 1e3, "ms", 10, figures=figures)]


def callers_during_save(sizes: Sizes) -> list[Row]:
    """Each `engine.set` on the scope whose many dirty keys are being saved, from start to end of the save."""
    clock = time.perf_counter
    p999s, worst, counts, saves_s = [], [], [], []
    with TemporaryDirectory() as folder, Engine.from_config(on_disk(folder)) as engine:
        pairs = make_pairs(sizes.dirty_keys, keys=sizes.dirty_keys)
        dirty = set_batch(engine)
        for _ in range(max(1, sizes.repeats // 2)):
            dirty(pairs)
            save = threading.Thread(target=engine.flush, name="save")
            taken: list[float] = []
            started = clock()
            save.start()
            while save.is_alive() or not taken:
                key, value = pairs[len(taken) % 1_000 % len(pairs)]
                began = clock()
                engine.set(SCOPE, key, value)
                taken.append(clock() - began)
            save.join()
            saves_s.append(clock() - started)
            p999s.append(percentile(taken, 0.999))
            worst.append(max(taken))
            counts.append(len(taken))
    figures = {
        "worst_ms": max(worst) * 1e3,
        "calls": statistics.median(counts),
        "save_s": statistics.median(saves_s),
    }
    what = f"set p99.9 while {sizes.dirty_keys} dirty keys of its scope are saved"
    return [Row("callers_during_save", what, statistics.median(p999s) * 1e3, "ms", 5, figures=figures)]


def open_store(sizes: Sizes) -> list[Row]:
    """A new process opens a large store: from `Engine.from_config` to the first answer, the import left out."""
    with TemporaryDirectory() as folder:
        filled = run_probe("fill_store", folder, sizes.store_keys, sizes.store_scopes)
        opened = [run_probe("open_store", folder, sizes.store_scopes) for _ in range(sizes.repeats)]
    taken = [probe["first_get_s"] for probe in opened]
    figures = {"worst_ms": max(taken) * 1e3, "fill_s": filled["fill_s"]}
    what = f"opening {sizes.store_keys} keys in {sizes.store_scopes} scopes: first get"
    size = f"file of {sizes.store_keys} keys with values of about 60 bytes, for each key"
    return [
        Row("open_store", what, statistics.median(taken) * 1e3, "ms", 100, figures=figures),
        Row("store_size", size, filled["file_bytes"] / sizes.store_keys, "bytes", 100),
    ]


def load_scope(sizes: Sizes) -> list[Row]:
    """A new process loads one large scope; its memory beside a plain dict[str, bytes] with the same content."""
    with TemporaryDirectory() as folder:
        run_probe("fill_store", folder, sizes.large_scope_keys, 1)
        loaded = run_probe("load_scope", folder, sizes.large_scope_keys)
    plain = run_probe("dict_memory", sizes.large_scope_keys)["grown_bytes"]
    figures = {"cpu_s": loaded["load_cpu_s"], "load_s": loaded["load_s"]}
    memory = {"ours_mb": loaded["grown_bytes"] / 1e6, "dict_mb": plain / 1e6}
    count = sizes.large_scope_keys
    return [
        Row("load_scope", f"loading a scope of {count} keys", loaded["load_s"], "s", figures=figures, own="cpu_s"),
        Row(
            "memory_loaded",
            f"memory of a loaded scope of {count} keys / dict[str, bytes]",
            loaded["grown_bytes"] / max(plain, 1),
            "x",
            1.5,
            figures=memory,
            own="ours_mb",
        ),
    ]


def save_many_keys(sizes: Sizes) -> list[Row]:
    """`engine.flush()` after many changes of a large scope: processor time, because a busy disk says little."""
    overwritten, created = [], []
    with TemporaryDirectory() as folder, Engine.from_config(on_disk(folder)) as engine:
        pairs = make_pairs(sizes.dirty_keys, keys=sizes.dirty_keys)
        write = set_batch(engine)
        write(pairs)
        engine.flush()
        for number in range(sizes.repeats):
            write(pairs[:: max(1, len(pairs) // sizes.changed_keys)])
            overwritten.append(_cpu_of(engine.flush))
            write([(f"new-{number}-{key}", value) for key, value in pairs[: sizes.changed_keys]])
            created.append(_cpu_of(engine.flush))
    what = f"saving {sizes.changed_keys} {{}} keys of a scope of {sizes.dirty_keys}, processor time"
    return [
        Row("save_many_keys", what.format("changed"), statistics.median(overwritten) * 1e3, "ms"),
        Row("save_new_keys", what.format("new"), statistics.median(created) * 1e3, "ms"),
    ]


def _cpu_of(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def commit_threads(sizes: Sizes) -> list[Row]:
    """Threads that each write a scope with durability `commit`, beside raw commits of SQLite, one after another.

    And beside threads that hand a row each over to one that commits all that wait: the least that threads can take
    which share commits.
    """
    pairs = make_pairs(max(1, sizes.slow_calls // 40))
    calls = sizes.threads * len(pairs)
    with (
        TemporaryDirectory() as folder,
        TemporaryDirectory() as peer_folder,
        Engine.from_config(committing(folder)) as engine,
        closing(_raw_database(peer_folder)) as database,
    ):

        def commit(rows: Sequence[tuple[str, str]]) -> None:
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", rows)
            database.execute("COMMIT")

        def ours() -> float:
            return in_threads([partial(set_batch(engine, f"s{number}"), pairs) for number in range(sizes.threads)])

        def hand_all_over(scope: str) -> None:
            for key, value in pairs:
                hand_over((f"{scope} {key}", json.dumps(value)))

        def floor() -> float:
            return in_threads([partial(hand_all_over, f"s{number}") for number in range(sizes.threads)])

        def raw() -> float:
            began = time.perf_counter()
            for key, value in pairs:
                commit([(key, json.dumps(value))])
            return (time.perf_counter() - began) * sizes.threads

        with handing_over(commit) as hand_over:
            ours(), floor(), raw()
            samples = [(ours(), floor(), raw()) for _ in range(sizes.repeats)]
    figures = {
        "ours_per_s": calls / statistics.median(mine for mine, _, _ in samples),
        "floor_per_s": calls / statistics.median(least for _, least, _ in samples),
        "raw_per_s": calls / statistics.median(raw for _, _, raw in samples),
    }
    what = f"{sizes.threads} threads, durability commit"
    against_raw = statistics.median(raw / mine for mine, _, raw in samples)
    against_floor = statistics.median(mine / least for mine, least, _ in samples)
    row = partial(Row, figures=figures, own="ours_per_s")
    return [
        row("commit_threads", f"{what}: sets / raw commits, per second", against_raw, "x", 4, at_least=True),
        row("commit_threads_floor", f"{what}: set / rows handed over through a queue", against_floor, "x", 1.3),
    ]


def _raw_database(folder: str) -> sqlite3.Connection:
    """Open a database that syncs each commit, for one thread at a time."""
    database = sqlite3.connect(f"{folder}/raw.db", isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE state (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
    return database


MEASURES: dict[str, Measure] = {
    "file_set": file_set,
    "save_one_key": save_one_key,
    "callers_during_save": callers_during_save,
    "open_store": open_store,
    "load_scope": load_scope,
    "save_many_keys": save_many_keys,
    "commit_threads": commit_threads,
}
