"""Simulate whole engines: `python -m tests.simulation --seeds 1000`; on a played Redis server with `--redis`;

with watches and durable triggers, on real files, with `--durable`.
"""

# ruff: noqa: T201 - a command talks to its user

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.durable import simulator as durable_simulator
from tests.simulation import redis_simulator
from tests.simulation.expiry_simulator import quiet, simulate_expiry
from tests.simulation.simulator import observed, simulate


def main(arguments: list[str] | None = None) -> int:
    """Run the seeds; return 1 if any of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="how many seeds to run (default: 1000)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first of them (default: 0)")
    parser.add_argument("--seed", type=int, metavar="SEED", help="run this seed alone and print what happens in it")
    parser.add_argument("--file", action="store_true", help="on real files instead of a disk in memory")
    parser.add_argument("--redis", action="store_true", help="on a played Redis server, with a network that fails")
    parser.add_argument("--most", type=int, default=10, metavar="N", help="stop after so many failures (default: 10)")
    parser.add_argument("--expiry", action="store_true", help="keys with deadlines, and clocks that jump")
    parser.add_argument("--durable", action="store_true", help="watches and durable triggers, on files in memory")
    options = parser.parse_args(arguments)
    seeds = range(options.first, options.first + options.seeds) if options.seed is None else [options.seed]
    began = time.perf_counter()
    done = failures = 0
    how = next((f" --{name}" for name in ("redis", "expiry", "durable", "file") if getattr(options, name)), "")
    with _worlds(how):
        for seed in seeds:
            failure = _simulated(seed, how, trace=options.seed is not None)
            done += 1
            if failure is None:
                continue
            failures += 1
            print(*failure.trace, sep="\n", end="\n" if failure.trace else "")
            print(f"seed {seed}: {failure.problem}")
            print(f"  again: python -m tests.simulation --seed {seed}{how}")
            if failures == options.most:
                break
    print(f"{done} seeds run, {failures} failures, {time.perf_counter() - began:.1f} s")
    return 1 if failures else 0


def _worlds(how: str) -> contextlib.AbstractContextManager[Any]:
    """Return what the runs of this kind happen in."""
    kinds: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        " --redis": redis_simulator.played,
        " --expiry": quiet,
        " --durable": durable_simulator.noted,
    }
    return kinds.get(how, observed)()


def _simulated(seed: int, how: str, *, trace: bool) -> Any:
    """Run a seed; return what went wrong, or None."""
    if "redis" in how:
        return redis_simulator.simulate(seed, trace=trace)
    if "durable" in how:
        return durable_simulator.simulate(seed, trace=trace)
    if "expiry" in how:
        return simulate_expiry(seed, trace=trace)
    with tempfile.TemporaryDirectory(prefix="scopestate-simulation-") as directory:
        path = str(Path(directory) / "store") if how else None
        return simulate(seed, path=path, trace=trace)


if __name__ == "__main__":
    sys.exit(main())
