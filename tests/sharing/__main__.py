"""The proof that several processes share one directory: `python -m tests.sharing --runs 20 --seconds 60`."""

# ruff: noqa: T201 - a command talks to its user

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from sharing import checks, killing
from sharing.facts import Run, by


def main(arguments: list[str] | None = None) -> int:
    """Do the runs; return 1 if any of them found something."""
    parser = argparse.ArgumentParser(prog="python -m tests.sharing", description=__doc__)
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="how many runs (default: 1)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="how long each kills (default: 60)")
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes (default: 4 to 16 by the seed)")
    parser.add_argument("--seed", type=int, default=0, metavar="SEED", help="of the first run (default: 0)")
    parser.add_argument("--plant", help="break the code, to see that it is found: a name of planted.py")
    parser.add_argument("--calm", action="store_true", help="stop no process with SIGSTOP")
    parser.add_argument("--plain", action="store_true", help="without durable triggers")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the logs of runs that found something there")
    options = parser.parse_args(arguments)
    bad = 0
    all_figures = []
    for seed in range(options.seed, options.seed + options.runs):
        began = time.monotonic()
        processes = options.processes or processes_of(seed)
        plan = killing.Plan(options.seconds, processes, seed, options.calm, not options.plain, options.plant)
        with tempfile.TemporaryDirectory(prefix="scopestate-sharing-") as folder:
            try:
                run = killing.run(plan, Path(folder))
                found = found_in(run)
                all_figures.append(figures_of(run))
                print(f"seed {seed}, {processes} processes: {text_of(all_figures[-1])}")
            except AssertionError as error:
                found = [f"the run does not end: {error}"]
            if found and options.keep:
                killing.keep(Path(folder), Path(options.keep) / str(seed))
        bad += bool(found)
        for promise, texts in by(lambda text: text.partition(":")[0], found).items():
            print(f"  {promise}: {len(texts)} violations")
            for text in texts[:3]:
                print(f"    {text}")
        print(f"  {time.monotonic() - began:.1f} s", flush=True)
    print(f"{options.runs} runs, {bad} bad: {text_of(together(all_figures))}")
    return 1 if bad else 0


def processes_of(seed: int) -> int:
    """Return how many processes a run has: 4 to 16."""
    return 4 + seed * 5 % 13


def found_in(run: Run) -> list[str]:
    """Return what is wrong with a run."""
    return [text for check in checks.CHECKS for text in check(run)]


def text_of(figures: dict[str, float]) -> str:
    """Return figures as text."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())


def figures_of(run: Run) -> dict[str, float]:
    """Return the figures of a run."""
    outcomes = Counter(one.outcome for one in run.attempts)
    ends = Counter(f"{'owners' if death.was_owner else 'followers'}_{death.how}" for death in run.deaths)
    figures: dict[str, float] = {
        "acknowledged": outcomes["end"],
        "unknown": outcomes["unknown"],
        "refused": outcomes["refused"],
        "owners_killed": ends["owners_kill"],
        "owners_closed": ends["owners_close"],
        "owners_stopped": ends["owners_stop"],
        "followers_killed": ends["followers_kill"],
        "deliveries": len(run.words("began")),
        "told": len(run.words("told", "saw")),
        "gaps_reported": len(run.words("watch compacted", "on_error")),
    }
    for name, followers in (("service", False), ("service_of_followers", True)):
        if service := checks.service_ms(run, followers=followers):
            figures[f"{name}_p50_ms"] = round(service[len(service) // 2], 1)
            figures[f"{name}_p90_ms"] = round(service[len(service) * 9 // 10], 1)
            figures[f"{name}_max_ms"] = round(service[-1], 1)
    return figures


def together(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the figures of several runs: sums, of times at which something was served the median and the longest."""
    names = dict.fromkeys(name for run in runs for name in run)
    found: dict[str, float] = {"runs": len(runs)}
    for name in names:
        values = sorted(run[name] for run in runs if name in run)
        if name.endswith("_max_ms"):
            found[name] = values[-1]
        else:
            found[name] = values[len(values) // 2] if name.endswith("_ms") else sum(values)
    return found


if __name__ == "__main__":
    sys.exit(main())
