"""Runs the benchmarks: `python -m benchmarks [--quick] [--only NAME ...] [--json FILE] [--svg FILE]`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import (
    measures_calls,
    measures_events,
    measures_redis,
    measures_size,
    measures_storage,
    measures_threads,
    measures_wire,
)
from benchmarks.harness import FULL, QUICK, Measure, Row
from benchmarks.report import environment, summary, table, write_json, write_svg

MEASURES: dict[str, Measure] = {
    **measures_calls.MEASURES,
    **measures_threads.MEASURES,
    **measures_events.MEASURES,
    **measures_storage.MEASURES,
    **measures_size.MEASURES,
    **measures_wire.MEASURES,
    **measures_redis.MEASURES,
}
RESULTS = Path("bench-results")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for and report it. The exit status says that it ran, not what it reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, not how fast it is")
    parser.add_argument("--only", action="append", choices=MEASURES, metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--json", type=Path, default=RESULTS / "benchmarks.json", metavar="FILE")
    parser.add_argument("--svg", type=Path, default=RESULTS / "benchmarks.svg", metavar="FILE")
    options = parser.parse_args(arguments)

    rows: list[Row] = []
    for name in options.only or MEASURES:
        began = time.perf_counter()
        rows += MEASURES[name](QUICK if options.quick else FULL)
        # On stderr: the table alone is the output.
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)

    where = environment()
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    print(f"{where['implementation']} {where['python']}, {where['system']}, {where['cores']} cores; {versions}\n")
    print(table(rows))
    print(f"\n{summary(rows)}")
    write_json(rows, options.json)
    write_svg(rows, options.svg)
    print(f"written: {options.json}, {options.svg}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
