"""Runs the benchmarks: `python -m benchmarks [--quick] [--only NAME ...] [--json FILE] [--svg FILE]`.

With `--against REV [--rounds N] [--limit X]`: beside a build of that commit, each row as a ratio new / old.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import (
    against,
    measures_cache,
    measures_calls,
    measures_cluster,
    measures_events,
    measures_journal,
    measures_keys,
    measures_redis,
    measures_sharing,
    measures_size,
    measures_storage,
    measures_threads,
    measures_values,
    measures_wire,
    measures_writes,
)
from benchmarks.builds import BuildError
from benchmarks.harness import FULL, QUICK, Measure, Row
from benchmarks.report import environment, summary, table, write_json, write_svg

MEASURES: dict[str, Measure] = {
    **measures_calls.MEASURES,
    **measures_values.MEASURES,
    **measures_writes.MEASURES,
    **measures_keys.MEASURES,
    **measures_cache.MEASURES,
    **measures_threads.MEASURES,
    **measures_events.MEASURES,
    **measures_journal.MEASURES,
    **measures_storage.MEASURES,
    **measures_size.MEASURES,
    **measures_wire.MEASURES,
    **measures_redis.MEASURES,
    **measures_cluster.MEASURES,
    **measures_sharing.MEASURES,
}
RESULTS = Path("bench-results")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the selected benchmarks and report the results.

    The exit status is 0 if they ran, whatever their results; with `--against` it is 1 if a row costs more than the
    limit.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, not how fast it is")
    parser.add_argument("--only", action="append", choices=MEASURES, metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"default: in {RESULTS}/")
    parser.add_argument("--svg", type=Path, default=RESULTS / "benchmarks.svg", metavar="FILE")
    parser.add_argument("--against", metavar="REV", help="compare the working tree with a build of this commit")
    parser.add_argument("--rounds", type=_at_least_one, default=5, metavar="N", help="alternations of --against")
    parser.add_argument(
        "--limit", type=float, default=1.1, metavar="X", help="--against: ratio above which a row fails"
    )
    options = parser.parse_args(arguments)
    measures = {name: MEASURES[name] for name in options.only or MEASURES}

    if options.against is not None:
        file = options.json or RESULTS / "against.json"
        try:
            return against.run(
                options.against, measures, rounds=options.rounds, limit=options.limit, quick=options.quick, file=file
            )
        except BuildError as error:
            parser.error(str(error))

    rows: list[Row] = []
    for name, measure in measures.items():
        began = time.perf_counter()
        rows += measure(QUICK if options.quick else FULL)
        # On stderr: only the table is the output.
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)

    where = environment()
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    print(f"{where['implementation']} {where['python']}, {where['system']}, {where['cores']} cores; {versions}\n")
    print(table(rows))
    print(f"\n{summary(rows)}")
    file = options.json or RESULTS / "benchmarks.json"
    write_json(rows, file)
    write_svg(rows, options.svg)
    print(f"written: {file}, {options.svg}")
    return 0


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
