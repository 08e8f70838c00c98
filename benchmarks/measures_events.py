"""What triggers cost, and how soon a handler gets an event."""

from __future__ import annotations

import statistics
import threading
import time
from queue import SimpleQueue  # noqa: TID251 - the bare queue is what is measured against

from benchmarks.harness import Measure, Row, Sizes, compare, make_pairs, percentile
from benchmarks.ours import SCOPE, set_batch
from scopestate import Engine

PATIENCE_S = 60.0


def events_per_second(sizes: Sizes) -> list[Row]:
    """From the first `set` until the handler has seen the last event: one trigger, one sync handler, one writer."""
    pairs = make_pairs(sizes.events)
    rates = []
    for _ in range(sizes.repeats):
        handled = 0

        def count(_event: object) -> None:
            nonlocal handled
            handled += 1

        with Engine() as engine:
            engine.register_function("bench::count", count)
            engine.register_trigger(function_id="bench::count", scope=SCOPE)
            batch = set_batch(engine)
            began = time.perf_counter()
            batch(pairs)
            engine.drain(timeout=PATIENCE_S)
            rates.append(len(pairs) / (time.perf_counter() - began))
        assert handled == len(pairs), f"{handled} of {len(pairs)} events handled"
    what = "events end to end, one trigger, sync handler"
    return [Row("events_per_second", what, statistics.median(rates), "per s", 200_000, at_least=True)]


def idle_triggers(sizes: Sizes) -> list[Row]:
    """A write beside many triggers, none of which matches: half in the written scope, half in others."""
    with Engine() as bare, Engine() as watched:
        watched.register_function("bench::never", lambda _event: None)
        for number in range(sizes.idle_triggers):
            scope = SCOPE if number % 2 else f"other-{number}"
            watched.register_trigger(function_id="bench::never", scope=scope, key=f"other-{number}")
        found = compare(set_batch(watched), set_batch(bare), make_pairs(sizes.calls), sizes.repeats * 2)
    what = f"set with {sizes.idle_triggers} non-matching triggers / with none"
    return [Row("idle_triggers", what, 1 / found.ratio, "x", 1.1, figures=found.figures, own="ours_us")]


def set_to_handler(sizes: Sizes) -> list[Row]:
    """From before `set` until the handler runs, beside a bare SimpleQueue hand-off to a waiting thread."""
    arrived: SimpleQueue[float] = SimpleQueue()
    inbox: SimpleQueue[object] = SimpleQueue()

    def forward() -> None:
        while inbox.get() is not None:
            arrived.put(time.perf_counter())

    def handler(_event: object) -> None:
        arrived.put(time.perf_counter())

    ours: list[float] = []
    theirs: list[float] = []
    receiver = threading.Thread(target=forward, name="bare-hand-off", daemon=True)
    receiver.start()
    with Engine() as engine:
        engine.register_function("bench::arrived", handler)
        engine.register_trigger(function_id="bench::arrived", scope=SCOPE)
        for key, value in make_pairs(sizes.handovers):
            began = time.perf_counter()
            engine.set(SCOPE, key, value)
            ours.append(arrived.get(timeout=PATIENCE_S) - began)
            began = time.perf_counter()
            inbox.put(value)
            theirs.append(arrived.get(timeout=PATIENCE_S) - began)
    inbox.put(None)
    receiver.join()
    ratio = percentile(ours, 0.5) / percentile(theirs, 0.5)
    figures = {
        "ours_p50_us": percentile(ours, 0.5) * 1e6,
        "ours_p99_us": percentile(ours, 0.99) * 1e6,
        "peer_p50_us": percentile(theirs, 0.5) * 1e6,
        "peer_p99_us": percentile(theirs, 0.99) * 1e6,
    }
    return [
        Row(
            "set_to_handler",
            "set to handler p50 / SimpleQueue hand-off p50",
            ratio,
            "x",
            3,
            figures=figures,
            own="ours_p50_us",
        )
    ]


MEASURES: dict[str, Measure] = {
    "events_per_second": events_per_second,
    "idle_triggers": idle_triggers,
    "set_to_handler": set_to_handler,
}
