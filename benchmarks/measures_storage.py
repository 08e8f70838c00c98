"""What keeping the state costs: during calls, in a save, at opening."""

from __future__ import annotations

import statistics
import threading
import time
from tempfile import TemporaryDirectory

from benchmarks.harness import Measure, Row, Sizes, compare, make_pairs, percentile
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
    figures = {"worst_ms": max(taken) * 1e3, "fill_s": filled["fill_s"], "file_mb": filled["file_bytes"] / 1e6}
    what = f"opening {sizes.store_keys} keys in {sizes.store_scopes} scopes: first get"
    return [Row("open_store", what, statistics.median(taken) * 1e3, "ms", 100, figures=figures)]


MEASURES: dict[str, Measure] = {
    "file_set": file_set,
    "save_one_key": save_one_key,
    "callers_during_save": callers_during_save,
    "open_store": open_store,
}
