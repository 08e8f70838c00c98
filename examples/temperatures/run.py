"""Replays a year of temperatures through scopestate, reacts to them, checks the result, and reopens the store.

    python examples/temperatures/run.py

Exit status: 0 if the result equals that of a plain computation over the same readings, 1 if anything differs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from scopestate import Engine, ScopestateError
from scopestate.config import load
from scopestate.persistence import FileAdapter
from weather import check, data, expected, report, writers
from weather.reactions import desk

CONFIG = Path(__file__).with_name("engine.yaml")

MOST_SHOWN = 10


def main() -> int:
    """Run the example and return its exit status."""
    try:
        return run(data.load())
    except (data.DataMissing, ScopestateError) as error:
        print(f"temperatures: {error}", file=sys.stderr)
        return 1


def run(readings: Sequence[data.Reading]) -> int:
    """Replay, check, close, open again, check again."""
    store = load(CONFIG).adapter.kv.file_path
    print(f"{len(readings):,} readings, written by {writers.THREADS} threads and {writers.TASKS} asyncio tasks")
    print(f"configuration: {CONFIG.name}, store: {store}")
    make_fresh(store)
    wanted = expected.compute(readings, writers.shares(readings))
    keys = sum(map(len, wanted.values()))

    with Engine.from_config(CONFIG) as engine:
        desk.engine = engine
        began = time.perf_counter()
        replay(engine, readings)
        replayed_s = time.perf_counter() - began
        print_results(engine, replayed_s)
        wrong = check.differences(engine, wanted, besides=frozenset({"progress"})) + troubles(engine)
    if failed("the engine's result differs from the plain computation", wrong):
        return 1
    print(f"checked: {keys:,} keys in {len(wanted)} scopes are equal to a plain computation over the same readings")

    began = time.perf_counter()
    with Engine.from_config(CONFIG) as engine:
        # Scopes are loaded when they are first used, so this reads all of them from disk. `progress` must be gone.
        wrong = check.differences(engine, wanted)
    if failed("the store differs after it was closed and opened again", wrong):
        return 1
    print(
        f"reopened: everything is there after reopening: {keys:,} keys in {len(wanted)} scopes, "
        f"read and compared in {time.perf_counter() - began:.1f} s"
    )
    return 0


def make_fresh(directory: str) -> None:
    """Remove the store of an earlier run. Raises StoreLocked while another run still has it."""
    FileAdapter(directory).close()  # takes the lock, or raises an error that names its holder
    for file in Path(directory).glob("state.*"):
        file.unlink()


def replay(engine: Engine, readings: Sequence[data.Reading]) -> None:
    """Run all writers, show how far they are, and wait until every reaction is done. Raises what a writer raised."""
    progress = report.Progress(sys.stdout, engine, len(readings))
    try:
        with ThreadPoolExecutor(writers.THREADS + 1) as pool:
            futures = writers.start(engine, readings, pool)
            while wait(futures, timeout=0.1, return_when=FIRST_EXCEPTION).not_done:
                progress.show()
                for future in futures:
                    if future.done():
                        future.result()
        for future in futures:
            future.result()
        engine.drain(timeout=60)
    finally:
        progress.end()


def print_results(engine: Engine, replayed_s: float) -> None:
    """Print the results, and how long they took."""
    print(f"\n{report.months(engine)}\n\n{report.bands(engine)}\n\n{report.alerts(engine)}\n")
    stats = engine.stats()
    calls = sum(stats.calls[f"state::{name}"] for name in ("set", "update"))
    events = stats.deliveries + stats.skipped
    print(
        f"took {replayed_s:.1f} s: {calls:,} writes ({calls / replayed_s:,.0f}/s) and {events:,} events "
        f"({events / replayed_s:,.0f}/s): {stats.deliveries:,} handled, {stats.skipped:,} skipped by a condition"
    )


def troubles(engine: Engine) -> list[str]:
    """Return what went wrong besides the result: events that failed or were lost, saves that failed."""
    stats, health = engine.stats(), engine.health()
    counts = {"failed events": stats.failures, "dropped events": stats.dropped, "failed saves": stats.failed_saves}
    return [f"{count} {what}" for what, count in counts.items() if count] + list(health.problems)


def failed(what: str, wrong: Sequence[str]) -> bool:
    """Print what is wrong, if anything is."""
    if wrong:
        print(f"FAILED: {what}: {len(wrong)} differences", file=sys.stderr)
        for line in wrong[:MOST_SHOWN]:
            print(f"  {line}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
