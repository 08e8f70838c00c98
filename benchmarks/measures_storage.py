"""What keeping the state costs: during calls, in a save, at opening."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
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


MEASURES: dict[str, Measure] = {
    "file_set": file_set,
    "save_one_key": save_one_key,
    "callers_during_save": callers_during_save,
    "open_store": open_store,
    "load_scope": load_scope,
    "save_many_keys": save_many_keys,
}
