"""Timing and results, shared by all measures. Nothing here depends on the engine or a peer."""

from __future__ import annotations

import gc
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Value = dict[str, Any]
Pairs = Sequence[tuple[str, Value]]
Batch = Callable[[Pairs], object]
"""Makes one call per (key, value). The loop is inside, so that no contender pays for a wrapper around each call."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the measures. Counts are per repeat."""

    repeats: int = 7
    calls: int = 20_000
    """Calls of a microbenchmark."""
    slow_calls: int = 2_000
    """Calls of a contender that takes ten times as long or more."""
    contended_asks: int = 100
    """Asks of plain Pykka beside a CPU-bound thread: about 10 ms each."""
    threads: int = 16
    events: int = 100_000
    idle_triggers: int = 1_000
    handovers: int = 2_000
    large_scope_keys: int = 1_000_000
    dirty_keys: int = 100_000
    changed_keys: int = 10_000
    memory_keys: int = 1_000_000
    scopes: int = 100_000
    store_keys: int = 1_000_000
    store_scopes: int = 1_000


FULL = Sizes()
QUICK = Sizes(
    repeats=2,
    calls=100,
    slow_calls=20,
    contended_asks=3,
    threads=4,
    events=200,
    idle_triggers=20,
    handovers=20,
    large_scope_keys=500,
    dirty_keys=500,
    changed_keys=50,
    memory_keys=1_000,
    scopes=200,
    store_keys=1_000,
    store_scopes=10,
)
"""Says whether the benchmarks work, not how fast anything is."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report: a figure, and its limit if it has one."""

    name: str
    what: str
    value: float
    unit: str
    """`x` (a ratio within this run), `ms`, `s`, `bytes`, `per s` or empty (a count)."""
    limit: float | None = None
    """The limit that the figure must keep; None if it is only shown."""
    at_least: bool = False
    """Whether more is better; else `limit` is an upper bound."""
    figures: dict[str, float] = field(default_factory=dict)
    """The figures that `value` was computed from; each name ends with its unit."""
    own: str = ""
    """The figure that two commits are compared by: of `figures`, the engine's own one. Empty: `value`.

    A ratio to a peer is not such a figure: where the peer is the engine too, as in `file_set`, a quicker peer makes
    the ratio worse.
    """

    @property
    def passed(self) -> bool | None:
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def compared(self) -> Compared | None:
        """The figure that two commits are compared by; None if the row says nothing about the engine alone."""
        if self.own:
            return Compared(self.own, self.figures[self.own], more_is_better=self.own.endswith("_per_s"))
        if self.unit == "x":
            return None
        name = f"value_{self.unit.replace(' ', '_')}" if self.unit else "value"
        return Compared(name, self.value, more_is_better=self.at_least or self.unit == "per s")


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of a row: its name, which ends with its unit, and which way is better."""

    name: str
    value: float
    more_is_better: bool

    def cost_against(self, old: Compared) -> float:
        """Return how many times as much as the old one this costs: 1 is equal, above 1 is worse."""
        after, before = (old.value, self.value) if self.more_is_better else (self.value, old.value)
        if after == before:
            return 1.0
        return after / before if before > 0 else math.inf


Measure = Callable[[Sizes], list[Row]]


def make_value(index: int) -> Value:
    """Return a dict of about 60 bytes of JSON."""
    return {"id": index, "name": f"sensor-{index % 997:05}", "value": index % 400 / 10, "ok": True}


def make_pairs(count: int, *, keys: int = 1_000) -> list[tuple[str, Value]]:
    """Return `count` (key, value) over at most `keys` keys."""
    return [(f"key-{index % keys}", make_value(index)) for index in range(count)]


def seconds_per_call(batch: Batch, pairs: Pairs) -> float:
    """Time one batch. Garbage is collected before it and not during it, because a collection could hit either side."""
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        batch(pairs)
        return (time.perf_counter() - began) / len(pairs)
    finally:
        gc.enable()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two contenders timed alternately. `ratio` is theirs / ours: how many times as long the peer takes."""

    ours_s: float
    theirs_s: float
    ratio: float

    @property
    def figures(self) -> dict[str, float]:
        return {"ours_us": self.ours_s * 1e6, "peer_us": self.theirs_s * 1e6}


def compare(
    ours: Batch, theirs: Batch, our_pairs: Pairs, repeats: int, *, their_pairs: Pairs | None = None
) -> Comparison:
    """Time both alternately and take the median of the ratios of neighbours.

    A machine that slows down half-way slows both sides of a ratio. Refused: all of one, then all of the other.
    """
    their_pairs = our_pairs if their_pairs is None else their_pairs
    seconds_per_call(ours, our_pairs)
    seconds_per_call(theirs, their_pairs)
    samples = [(seconds_per_call(ours, our_pairs), seconds_per_call(theirs, their_pairs)) for _ in range(repeats)]
    return Comparison(
        ours_s=statistics.median(ours_s for ours_s, _ in samples),
        theirs_s=statistics.median(theirs_s for _, theirs_s in samples),
        ratio=statistics.median(theirs_s / ours_s for ours_s, theirs_s in samples),
    )


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the smallest sample that at least `share` (0 to 1) of all samples do not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def latencies(call: Callable[[str, Value], object], pairs: Pairs) -> list[float]:
    """Return the duration of each call, in seconds."""
    clock = time.perf_counter
    taken = []
    for key, value in pairs:
        began = clock()
        call(key, value)
        taken.append(clock() - began)
    return taken


@contextmanager
def cpu_bound_thread() -> Iterator[None]:
    """Keep one Python thread computing, so that other threads must wait for the interpreter's switch interval."""
    stop = False

    def compute() -> None:
        while not stop:
            sum(range(1_000))

    thread = threading.Thread(target=compute, name="cpu-bound", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop = True
        thread.join()


def in_threads(jobs: Sequence[Callable[[], object]]) -> float:
    """Run each job in a thread of its own, all started together; return the seconds until the last one ended."""
    start = threading.Barrier(len(jobs) + 1)
    failures: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        start.wait()
        try:
            job()
        except BaseException as failure:  # noqa: BLE001  # handed to the caller below
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - began
    if failures:
        raise failures[0]
    return taken
