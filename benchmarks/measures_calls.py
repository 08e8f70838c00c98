"""What one call costs, from one thread and from asyncio."""

from __future__ import annotations

import asyncio
import statistics
from contextlib import ExitStack
from tempfile import TemporaryDirectory

from benchmarks import peers
from benchmarks.harness import Measure, Row, Sizes, compare, make_pairs, seconds_per_call
from benchmarks.ours import SCOPE, get_batch, increment_batch, on_disk, set_batch
from scopestate import Engine


def set_vs_pykka(sizes: Sizes) -> list[Row]:
    """`engine.set` in memory beside a Pykka ask that sets a dict."""
    with Engine() as engine, peers.plain_pykka() as peer:
        found = compare(set_batch(engine), peer.set, make_pairs(sizes.calls), sizes.repeats)
    return [
        Row(
            "set_vs_pykka",
            "set: plain Pykka ask / ours",
            found.ratio,
            "x",
            8,
            at_least=True,
            figures=found.figures,
            own="ours_us",
        )
    ]


def set_vs_floor(sizes: Sizes) -> list[Row]:
    """`engine.set` in memory beside lock + encode + dict."""
    with Engine() as engine, peers.floor() as peer:
        found = compare(set_batch(engine), peer.set, make_pairs(sizes.calls), sizes.repeats)
    return [
        Row(
            "set_vs_floor",
            "set: ours / lock + encode + dict",
            1 / found.ratio,
            "x",
            5,
            figures=found.figures,
            own="ours_us",
        )
    ]


def get_vs_pykka(sizes: Sizes) -> list[Row]:
    """`engine.get` beside a Pykka ask that gets from a dict."""
    pairs = make_pairs(sizes.calls)
    with Engine() as engine, peers.plain_pykka() as peer:
        set_batch(engine)(pairs)
        peer.set(pairs)
        found = compare(get_batch(engine), peer.get, pairs, sizes.repeats)
    return [
        Row(
            "get_vs_pykka",
            "get: plain Pykka ask / ours",
            found.ratio,
            "x",
            10,
            at_least=True,
            figures=found.figures,
            own="ours_us",
        )
    ]


def update_vs_pykka(sizes: Sizes) -> list[Row]:
    """`engine.update` with one increment beside a Pykka ask that sets a dict."""
    pairs = make_pairs(sizes.calls)
    with Engine() as engine, peers.plain_pykka() as peer:
        set_batch(engine)(pairs)
        found = compare(increment_batch(engine), peer.set, pairs, sizes.repeats)
    what = "update, one increment: plain Pykka ask / ours"
    return [Row("update_vs_pykka", what, found.ratio, "x", 5, at_least=True, figures=found.figures, own="ours_us")]


def aio_set(sizes: Sizes) -> list[Row]:
    """`await engine.aio.set` on an idle scope beside `engine.set` on the same thread; and whether it ever suspends."""
    pairs = make_pairs(sizes.calls)

    async def measure() -> tuple[list[tuple[float, float]], int]:
        with Engine() as engine:
            plain = set_batch(engine)
            aio_set = engine.aio.set
            loop_time = asyncio.get_running_loop().time
            samples = []
            for _ in range(sizes.repeats):
                began = loop_time()
                for key, value in pairs:
                    await aio_set(SCOPE, key, value)
                samples.append(((loop_time() - began) / len(pairs), seconds_per_call(plain, pairs)))
            suspended = 0
            for key, value in pairs:
                call = aio_set(SCOPE, key, value)
                steps = call.__await__()
                for step in steps:
                    # What a suspended coroutine yields is a future: awaiting it here lets the call finish in order.
                    suspended += 1
                    if step is not None:
                        await step
            return samples, suspended

    samples, suspended = asyncio.run(measure())
    ratio = statistics.median(ours / plain for ours, plain in samples)
    figures = {
        "aio_us": statistics.median(ours for ours, _ in samples) * 1e6,
        "set_us": statistics.median(plain for _, plain in samples) * 1e6,
    }
    return [
        Row("aio_set", "await aio.set on an idle scope / set", ratio, "x", 1.5, figures=figures, own="aio_us"),
        Row("aio_suspensions", f"suspensions in {len(pairs)} aio.set on an idle scope", suspended, "", 0),
    ]


def peer_calls(sizes: Sizes) -> list[Row]:
    """set and get beside the other stores: in memory beside in memory, on disk beside on disk. Shown, not judged."""
    pairs = make_pairs(sizes.slow_calls)
    rows = []
    with ExitStack() as stack:
        in_memory = stack.enter_context(Engine())
        folder = stack.enter_context(TemporaryDirectory())
        on_disk_engine = stack.enter_context(Engine.from_config(on_disk(folder, save_interval_ms=1_000)))
        for engine, stores in ((in_memory, peers.IN_MEMORY), (on_disk_engine, peers.ON_DISK)):
            for name, open_peer in stores.items():
                with open_peer() as peer:
                    for verb, ours, theirs in (
                        ("set", set_batch(engine), peer.set),
                        ("get", get_batch(engine), peer.get),
                    ):
                        found = compare(ours, theirs, pairs, sizes.repeats)
                        label = f"{verb}: {name} / ours, {'in memory' if engine is in_memory else 'on disk'}"
                        row_name = f"{verb}_vs_{name.replace('-', '_')}"
                        rows.append(Row(row_name, label, found.ratio, "x", figures=found.figures, own="ours_us"))
    return rows


MEASURES: dict[str, Measure] = {
    "set_vs_pykka": set_vs_pykka,
    "set_vs_floor": set_vs_floor,
    "get_vs_pykka": get_vs_pykka,
    "update_vs_pykka": update_vs_pykka,
    "aio_set": aio_set,
    "peer_calls": peer_calls,
}
