"""What the journal costs: writes that it keeps, durable deliveries, watches; and queues that make the same promise."""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue  # noqa: TID251 - a put wakes the thread that measures, with nothing in between
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import Measure, Row, Sizes, Value, compare, in_threads, make_pairs, percentile
from benchmarks.ours import SCOPE, on_disk, set_batch
from benchmarks.peer_queues import by_huey, by_litequeue, by_procrastinate, by_redis_stream
from benchmarks.redis_load import config as redis_config
from benchmarks.redis_load import redis_server
from scopestate import Engine

PATIENCE_S = 120.0
WRITERS = 64
WATCHERS = 8
SLEEP_S = 0.01
"""How long each call of the handler takes in `side_by_side`."""
SCOPES = 100

Peer = Callable[[Sequence[Value]], float]
"""Delivers the values; returns the seconds."""


@contextmanager
def _engine(durability: str = "interval", *, history: int = 0, save_interval_ms: int = 1_000) -> Iterator[Engine]:
    """An engine on a disk; `history`: how many changes of the scopes that begin with `journaled` are kept."""
    with (
        TemporaryDirectory() as folder,
        Engine.from_config(_settings(folder, durability, history, save_interval_ms)) as engine,
    ):
        yield engine


def _settings(folder: str, durability: str, history: int, save_interval_ms: int) -> dict[str, Any]:
    found = on_disk(folder, save_interval_ms=save_interval_ms)
    found["workers"][0]["config"]["adapter"]["config"]["durability"] = durability
    if history:
        found["scopes"] = [{"prefix": "journaled", "history": {"events": history}}]
    return found


# --------------------------------------------------------------------------------------------------------------- writes


def journaled_set(sizes: Sizes) -> list[Row]:
    """A `set` of a scope with a history beside one without; both are saved each second while it runs."""
    with _engine(history=1_000_000) as engine:
        pairs = make_pairs(sizes.calls)
        found = compare(set_batch(engine, "journaled"), set_batch(engine, SCOPE), pairs, sizes.repeats)
    figures = {"ours_us": found.ours_s * 1e6, "set_us": found.theirs_s * 1e6}
    what = "journaled set / set, interval"
    return [Row("journaled_set", what, 1 / found.ratio, "x", 2, figures=figures, own="ours_us")]


# ----------------------------------------------------------------------------------------------------------- deliveries


class _Handled:
    """Counts deliveries, and records when the last one came."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.all = threading.Event()

    def __call__(self, _event: object) -> None:
        self.left -= 1
        if not self.left:
            self.all.set()

    def wait(self) -> None:
        assert self.all.wait(PATIENCE_S), f"{self.left} events are not handled"


def _delivered(engine: Engine, values: Sequence[Value], writers: int, *, consumer: str = "bench") -> float:
    """Set the values from this many threads; return the seconds until a durable trigger has handled each of them."""
    share = len(values) // writers
    handled = _Handled(share * writers)
    engine.on_change(scope=SCOPE, durable=consumer)(handled)
    set_value = engine.set

    def write(first: int) -> None:
        for place in range(first, first + share):
            set_value(SCOPE, f"key-{place % 1_000}", values[place])

    began = time.perf_counter()
    if writers == 1:
        write(0)
    else:
        in_threads([lambda first=number * share: write(first) for number in range(writers)])  # type: ignore[misc]  # bound now
    handled.wait()
    return time.perf_counter() - began


def _values(count: int) -> list[Value]:
    return [value for _, value in make_pairs(count)]


def durable_deliveries(sizes: Sizes) -> list[Row]:
    """From the first `set` until a plain handler of a durable trigger has seen the last event."""
    rows = []
    for durability, writers, least in (("commit", WRITERS, 10_000), ("interval", 1, 25_000)):
        count = sizes.events // 2 // writers * writers or writers
        rates = []
        for _ in range(max(2, sizes.repeats // 2)):
            with _engine(durability) as engine:
                rates.append(count / _delivered(engine, _values(count), writers))
        what = f"durable deliveries, {durability}, {writers} writer{'s' if writers > 1 else ''}"
        rows.append(Row(f"durable_{durability}", what, statistics.median(rates), "per s", least, at_least=True))
    return rows


def durable_latency(sizes: Sizes) -> list[Row]:
    """From before `set` until the durable handler runs, on an idle interval scope, beside one raw commit of SQLite."""
    arrived: SimpleQueue[float] = SimpleQueue()
    ours: list[float] = []
    theirs: list[float] = []
    clock = time.perf_counter
    with TemporaryDirectory() as folder, _engine() as engine:
        connection = sqlite3.connect(Path(folder) / "raw.db", isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID")
        engine.on_change(scope=SCOPE, durable="bench")(lambda _event: arrived.put(clock()))
        for key, value in make_pairs(max(20, sizes.handovers // 4)):
            began = clock()
            engine.set(SCOPE, key, value)
            ours.append(arrived.get(timeout=PATIENCE_S) - began)
            began = clock()
            connection.execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", (key, json.dumps(value)))
            theirs.append(clock() - began)
        connection.close()
    figures = {
        "ours_p50_us": percentile(ours, 0.5) * 1e6,
        "ours_p99_us": percentile(ours, 0.99) * 1e6,
        "sqlite_p50_us": percentile(theirs, 0.5) * 1e6,
        "sqlite_p99_us": percentile(theirs, 0.99) * 1e6,
    }
    ratio = percentile(ours, 0.5) / percentile(theirs, 0.5)
    what = "set to durable handler p50, interval / raw SQLite commit p50"
    return [Row("durable_latency", what, ratio, "x", 3, figures=figures, own="ours_p50_us")]


def deliveries_vs_queues(sizes: Sizes) -> list[Row]:
    """One producer and one consumer: each event, or job, is handled and acknowledged; `commit` and `fsync` sync."""
    many = _values(sizes.slow_calls)
    few = many[:300]  # procrastinate in memory looks through all jobs for each one
    peers: dict[str, tuple[str, str, Sequence[Value], Peer]] = {
        "huey_commit": ("huey, fsync", "commit", many, lambda values: by_huey(values, fsync=True)),
        "huey_interval": ("huey", "interval", many, lambda values: by_huey(values, fsync=None)),
        "litequeue_interval": ("litequeue", "interval", many, by_litequeue),
        "procrastinate": ("procrastinate in memory", "interval", few, by_procrastinate),
    }
    return [
        _beside(name, f"{what}, {durability}", values, partial(_on_files, durability), theirs)
        for name, (what, durability, values, theirs) in peers.items()
    ]


def _on_files(durability: str, values: Sequence[Value]) -> float:
    with _engine(durability) as engine:
        return _delivered(engine, values, 1)


def deliveries_vs_redis_stream(sizes: Sizes) -> list[Row]:
    """A stream with XREADGROUP by redis-py, beside durable triggers on the same Redis, and on files with `interval`."""
    values = _values(sizes.slow_calls)
    runs = itertools.count()
    with redis_server() as url:

        def on_redis(values: Sequence[Value]) -> float:
            with Engine.from_config(redis_config(url, events="shared")) as engine:
                return _delivered(engine, values, 1, consumer=f"bench-{next(runs)}")

        stream = partial(by_redis_stream, url=url)
        return [
            _beside("redis_stream", "XREADGROUP by redis-py, ours on Redis", values, on_redis, stream),
            _beside(
                "redis_stream_interval",
                "XREADGROUP by redis-py, interval",
                values,
                partial(_on_files, "interval"),
                stream,
            ),
        ]


def _beside(name: str, what: str, values: Sequence[Value], ours: Peer, theirs: Peer) -> Row:
    """Return our deliveries a second as a multiple of a peer's: the median of three runs in turn."""
    samples = [(len(values) / ours(values), len(values) / theirs(values)) for _ in range(3)]
    ratio = statistics.median(mine / other for mine, other in samples)
    figures = {
        "ours_per_s": statistics.median(mine for mine, _ in samples),
        "peer_per_s": statistics.median(other for _, other in samples),
    }
    label = f"durable deliveries: ours / {what}"
    return Row(f"deliveries_vs_{name}", label, ratio, "x", 1, at_least=True, figures=figures, own="ours_per_s")


# -------------------------------------------------------------------------------------------------------------- watches


def watch_rate(sizes: Sizes) -> list[Row]:
    """From the first `set` until each watcher of the scope has yielded the last change: one writer."""
    rows = []
    pairs = make_pairs(sizes.events)
    for watchers, least in ((1, 200_000), (WATCHERS, WATCHERS * 100_000)):
        rates = []
        for _ in range(max(2, sizes.repeats // 2)):
            with Engine() as engine:
                rates.append(watchers * len(pairs) / _watched(engine, pairs, watchers))
        plural = f"{watchers} watchers, in sum" if watchers > 1 else "one watcher"
        rows.append(
            Row(f"watch_{watchers}", f"changes to {plural}", statistics.median(rates), "per s", least, at_least=True)
        )
    return rows


def _watched(engine: Engine, pairs: Any, watchers: int) -> float:
    opened = threading.Barrier(watchers + 1)

    def watch() -> None:
        with engine.watch(scope=SCOPE, snapshot=False, buffer=len(pairs)) as changes:
            opened.wait(PATIENCE_S)
            for _ in range(len(pairs)):
                changes.get(timeout=PATIENCE_S)

    threads = [threading.Thread(target=watch) for _ in range(watchers)]
    for thread in threads:
        thread.start()
    opened.wait(PATIENCE_S)
    began = time.perf_counter()
    set_batch(engine)(pairs)
    for thread in threads:
        thread.join(PATIENCE_S)
    return time.perf_counter() - began


def resume(sizes: Sizes) -> list[Row]:
    """After a restart: from opening a watch with a cursor until all journaled changes after it have come."""
    pairs = make_pairs(sizes.events)
    with TemporaryDirectory() as folder:
        settings = _settings(folder, "interval", 1_000_000, 1_000)
        with Engine.from_config(settings) as engine, engine.watch(scope="journaled", snapshot=False) as changes:
            cursor = changes.cursor
            set_batch(engine, "journaled")(pairs)
        taken = []
        for _ in range(3):
            with Engine.from_config(settings) as engine:
                began = time.perf_counter()
                with engine.watch(scope="journaled", since=cursor) as changes:
                    for _ in range(len(pairs)):
                        changes.get(timeout=PATIENCE_S)
                taken.append(time.perf_counter() - began)
    what = f"resume of a watch over {len(pairs):,} journaled changes"
    return [Row("watch_resume", what, statistics.median(taken), "s", 1)]


# --------------------------------------------------------------------------------------------------------- side by side


def side_by_side(sizes: Sizes) -> list[Row]:
    """Events over SCOPES scopes to a handler that takes 10 ms: all at once, and in the order of each scope."""
    count = min(500, sizes.slow_calls * 5)
    at_once = _seconds_side_by_side(count, asynchronous=True, order="none", concurrency=count)
    eight = _seconds_side_by_side(count, asynchronous=False, order="scope", concurrency=8)
    return [
        Row("side_by_side_none", f"{count} events, 10 ms async handler, order none", at_once, "s", 0.2),
        Row(
            "side_by_side_scope",
            "rate of a 10 ms plain handler, order scope, concurrency 8 / of one at a time",
            count * SLEEP_S / eight,
            "x",
            0.9 * 8,
            at_least=True,
            figures={"ours_s": eight},
            own="ours_s",
        ),
    ]


def _seconds_side_by_side(count: int, *, asynchronous: bool, **options: Any) -> float:
    handled = _Handled(count)

    async def later(event: object) -> None:
        await asyncio.sleep(SLEEP_S)
        handled(event)

    lock = threading.Lock()

    def slow(event: object) -> None:
        time.sleep(SLEEP_S)
        with lock:
            handled(event)

    with Engine() as engine:
        engine.on_change(scope_prefix="side-", **options)(later if asynchronous else slow)
        began = time.perf_counter()
        for number in range(count):
            engine.set(f"side-{number % SCOPES}", "key", number)
        handled.wait()
        return time.perf_counter() - began


MEASURES: dict[str, Measure] = {
    "journaled_set": journaled_set,
    "durable_deliveries": durable_deliveries,
    "durable_latency": durable_latency,
    "deliveries_vs_queues": deliveries_vs_queues,
    "deliveries_vs_redis_stream": deliveries_vs_redis_stream,
    "watch_rate": watch_rate,
    "watch_resume": resume,
    "side_by_side": side_by_side,
}
