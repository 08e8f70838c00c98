"""How the cost grows with engines, scopes, keys and events, and what is full first: `python -m benchmarks.capacity`.

`[--quick] [--only SECTION ...] [--json FILE] [--resume]`. The tables of docs/explanation/capacity.md are from here.
What is measured is measured in processes of their own (`capacity_probes`); limits are computed from that, and waiting
times simulated (`capacity_model`). A full run takes about an hour. Each finding is in the file as soon as it is there,
and `--resume` measures only what the file does not have.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.capacity_model import (
    PRIMARIES,
    SHARES,
    ServiceTimes,
    compared,
    demands,
    first_full,
    scaled,
    setups,
    simulated,
)
from benchmarks.capacity_probes import PROBES, Findings, run_probe
from benchmarks.probes import PROBES as PLAIN_PROBES
from benchmarks.probes import run_probe as run_plain_probe
from benchmarks.redis_load import redis_cluster, redis_server
from benchmarks.report import environment, number

RESULT = Path("bench-results") / "capacity.json"
MOST_OF_SOME = 100_000
"""Scopes that are made in Redis, and that leave memory; beyond that in proportion."""
MOST_IN_CLUSTER = 10
"""Engines of a cluster in one process. Each has nine threads: a hundred keep two cores busy for minutes."""


@dataclass(frozen=True, slots=True)
class Sizes:
    kinds: Sequence[str] = ("memory", "file", "follower", "redis", "shared", "cluster")
    """Of engines."""
    engines: Sequence[int] = (1, 10, 100, 1_000)
    scopes: Sequence[int] = (1_000, 10_000, 100_000, 1_000_000)
    beyond: Sequence[int] = (10_000_000, 100_000_000)
    """Numbers of scopes that are computed from the largest that was measured."""
    keys: int = 1_000_000
    writes: int = 50_000
    slow_writes: int = 20_000
    commits: int = 300
    """Of each thread."""
    threads: Sequence[int] = (1, 4, 16, 64)
    readers: tuple[int, int] = (1, 7)
    """Processes that read the events of another one's writes."""
    rounds: int = 3
    """Of the probes of writes."""
    idle_s: float = 5.0
    jobs: int = 20_000
    """Of a simulation."""
    apart: bool = True
    """Whether each probe runs in an interpreter of its own. Without it no figure of memory means anything."""

    def run(self, probe: str, *arguments: object) -> Findings:
        """Run a probe, of `capacity_probes` or of `probes`."""
        if probe in PROBES:
            return run_probe(probe, *arguments) if self.apart else PROBES[probe](*map(str, arguments))
        return run_plain_probe(probe, *arguments) if self.apart else PLAIN_PROBES[probe](*map(str, arguments))


FULL = Sizes()
QUICK = Sizes(
    kinds=("memory", "file", "redis", "shared"),
    engines=(2,),
    scopes=(50,),
    beyond=(500,),
    keys=500,
    writes=500,
    slow_writes=200,
    commits=5,
    threads=(1, 2),
    readers=(0, 1),
    rounds=1,
    idle_s=0.1,
    jobs=300,
    apart=False,
)
"""Says whether it works, not how much anything is."""


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Return it as a Markdown table."""
        lines = ["| " + " | ".join(row) + " |" for row in (self.columns, ["---"] * len(self.columns), *self.rows)]
        return "\n".join([f"\n### {self.title}\n", *lines])


@dataclass(slots=True)
class Run:
    """One run of the script: its sizes, and what it has found."""

    sizes: Sizes
    file: Path
    quick: bool
    found: dict[str, dict[str, Findings]] = field(default_factory=dict)
    """By section and name."""

    def has(self, section: str, name: str) -> bool:
        return name in self.found.get(section, {})

    def probe(self, section: str, name: str, probe: str, *arguments: object) -> Findings:
        """Return what a probe finds, and keep it in the file under this name. What the file has is not measured."""
        if not self.has(section, name):
            began = time.perf_counter()
            self.found.setdefault(section, {})[name] = self.sizes.run(probe, *arguments)
            # On stderr: only the tables are the output.
            print(f"{section}, {name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
            self._save()
        return self.found[section][name]

    def _save(self) -> None:
        """Replace the file at once, so that a run that is ended leaves all that it has found."""
        content = {"environment": environment(), "quick": self.quick, "findings": self.found}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        new.replace(self.file)

    def resume(self) -> None:
        """Take over what an earlier run has found; raise ValueError if it had other sizes."""
        if not self.file.exists():
            return
        content = json.loads(self.file.read_text(encoding="utf-8"))
        if content["quick"] != self.quick:
            raise ValueError(f"{self.file} is from a run {'with' if content['quick'] else 'without'} --quick")
        self.found = content["findings"]


# ------------------------------------------------------------------------------------------------------------- engines


def engines(run: Run) -> list[Table]:
    """Engines in one process: what each costs, and what it costs the process that it is connected to."""
    found = {
        f"{kind} {count}": _engines(run, kind, count)
        for kind in run.sizes.kinds
        for count in run.sizes.engines
        if kind != "cluster" or count <= MOST_IN_CLUSTER
    }
    columns = ["engines", "open, ms", "close, ms", "threads", "files", "KiB", "there: connections", "there: KiB"]
    rows = [
        [
            name,
            *(number(each[key] * 1e3) for key in ("open_s", "close_s")),
            *(number(each[key]) for key in ("threads", "fds")),
            number(each["bytes"] / 1024),
            number(each["there_fds"]),
            number(each["there_bytes"] / 1024),
        ]
        for name, each in found.items()
    ]
    idle = [
        [
            name,
            number(each["idle_wake_ups_per_s"]),
            number(each["idle_cpu"] * 1e6),
            number(each["process_bytes"] / 2**20),
        ]
        for name, each in found.items()
    ]
    idle_columns = ["engines", "wake-ups a second", "processor, us a second", "process with one engine, MiB"]
    return [
        Table("Engines: each of them", columns, rows),
        Table("Engines that do nothing: each of them", idle_columns, idle),
    ]


def _engines(run: Run, kind: str, count: int) -> Findings:
    name = f"{kind} {count}"
    with ExitStack() as stack:
        place = ""
        if run.has("engines", name):
            pass
        elif kind == "cluster":
            place = ",".join(stack.enter_context(redis_cluster(PRIMARIES)))
        elif kind in {"redis", "shared"}:
            place = stack.enter_context(redis_server())
        else:
            place = stack.enter_context(TemporaryDirectory())
        return run.probe("engines", name, "engines", kind, place, count, run.sizes.idle_s)


# -------------------------------------------------------------------------------------------------------------- scopes


def scopes(run: Run) -> list[Table]:
    """Scopes with one small key: in memory, at rest, and in Redis; beyond what is measured, in proportion."""
    sizes = run.sizes
    found: dict[str, Findings] = {}

    def probe(kind: str, count: int, name: str, *arguments: object) -> None:
        found[f"{kind} {count}"] = run.probe("scopes", f"{kind} {count}", name, *arguments)

    for count in sizes.scopes:
        probe("memory", count, "scopes", "", count, sizes.idle_s)
        with TemporaryDirectory() as folder:
            if not run.has("scopes", f"stored {count}"):
                # It needs what this probe writes.
                run.found.get("scopes", {}).pop(f"file {count}", None)
            probe("file", count, "scopes", folder, count, sizes.idle_s)
            probe("stored", count, "stored_scopes", folder, count, sizes.idle_s)
        if count > MOST_OF_SOME:
            continue
        with TemporaryDirectory() as folder:
            probe("passivated", count, "passivated_scopes", folder, count)
        with redis_server() as url:
            probe("redis", count, "redis_scopes", url, count)

    rows = []
    for count in (*sizes.scopes, *sizes.beyond):
        base = min(count, sizes.scopes[-1])
        memory, file, stored = (found[f"{kind} {base}"] for kind in ("memory", "file", "stored"))
        least = min(base, MOST_OF_SOME)
        there = found[f"redis {least}"]
        times = count / base
        rows.append(
            [
                f"{count:,}" if times == 1 else f"{count:,} (computed)",
                number(memory["bytes"] * count / 1e6),
                number(file["bytes"] * count / 1e6),
                number(file["file_bytes"] * count / 1e6),
                number(there["there_bytes"] * count / 1e6),
                *(number(each["list_groups_s"] * times * 1e3) for each in (memory, stored)),
                number(there["list_groups_s"] * count / least * 1e3),
                number(stored["open_s"] * times * 1e3),
            ]
        )
    columns = ["scopes", "in memory, MB", "in use, file_based, MB", "on disk, MB", "in Redis, MB"]
    columns += [
        "list_groups: memory, ms",
        "list_groups: file_based, ms",
        "list_groups: Redis, ms",
        "open the store, ms",
    ]
    unused = [
        [
            f"{count:,}",
            number(found[f"stored {count}"]["bytes"]),
            number(found[f"passivated {min(count, MOST_OF_SOME)}"]["bytes"]),
            number(found[f"passivated {min(count, MOST_OF_SOME)}"]["leave_cpu_s"] * 1e6),
            number(found[f"stored {count}"]["idle_cpu"] * 1e6),
            number(found[f"memory {count}"]["idle_cpu"] * 1e6),
            number(found[f"file {count}"]["idle_cpu"] * 1e6),
            number(found[f"stored {count}"]["first_get_s"] * 1e3),
            number(found[f"stored {count}"]["get_s"] * 1e6),
            number(found[f"memory {count}"]["create_s"] * 1e6),
            number(found[f"file {count}"]["create_s"] * 1e6),
        ]
        for count in sizes.scopes
    ]
    unused_columns = ["scopes", "stored and not used: bytes in memory of each", "has left memory: bytes that stay"]
    unused_columns += ["to leave memory, us", "stored and not used: processor of all, us a second"]
    unused_columns += ["in memory, not called: the same", "in use, file_based, not called: the same"]
    unused_columns += [
        "first get of a store, ms",
        "first get of a scope, us",
        "create, memory, us",
        "create, file_based, us",
    ]
    return [
        Table("Scopes with one small key", columns, rows),
        Table("A scope that is not used", unused_columns, unused),
    ]


# ---------------------------------------------------------------------------------------------------------------- keys


def keys(run: Run) -> list[Table]:
    """Keys with values of 60 bytes: in the memory of an engine, of a dict, and on disk."""
    count = run.sizes.keys
    ours = run.probe("keys", "engine", "engine_memory", count)["grown_bytes"] / count
    plain = run.probe("keys", "dict", "dict_memory", count)["grown_bytes"] / count
    with TemporaryDirectory() as folder:
        file = run.probe("keys", "file", "fill_store", folder, count, 1)["file_bytes"] / count
    rows = [[f"{count:,}", number(ours), number(plain), number(file)]]
    columns = ["keys of one scope", "in memory, bytes", "in a dict[str, bytes], bytes", "on disk, bytes"]
    return [Table("Keys with values of 60 bytes: each of them", columns, rows)]


# -------------------------------------------------------------------------------------------------------------- writes


def writes(run: Run) -> list[Table]:
    """What a write takes of each part, how many writes a second that allows, and how long they wait before that."""
    sizes = run.sizes
    alone: list[tuple[object, ...]] = [
        *(("writes", *each, sizes.writes) for each in ((0, 0), (1, 0), (8, 0), (0, 1), (0, 8))),
        *(("saved", kind, sizes.writes) for kind in ("plain", "new", "history", "durable")),
        *(("commits", threads, sizes.commits) for threads in sizes.threads),
        *(("raw_commits", rows, sizes.commits) for rows in (1, 64)),
        *(("follower", triggers, sizes.slow_writes) for triggers in (0, 1)),
    ]
    rounds: dict[str, list[Findings]] = {}

    def probe(name: str, turn: int, *arguments: object) -> None:
        found = run.probe("writes", f"{name}, round {turn}", str(arguments[0]), *arguments[1:])
        rounds.setdefault(name, []).append(found)

    # All probes of a round run before those of the next: what else the machine does is not in all rounds of one probe.
    for turn in range(1, sizes.rounds + 1):
        for each in alone:
            probe(" ".join(map(str, each[:-1])), turn, *each)
        shared = [f"cluster shared {count}" for count in sizes.readers]
        missing = [name for name in shared if not run.has("writes", f"{name}, round {turn}")]
        cluster: AbstractContextManager[list[str]] = redis_cluster(PRIMARIES) if missing else nullcontext([])
        with redis_server() as url, cluster as urls:
            probe("redis local 0", turn, "redis_writes", url, "local", 0, sizes.slow_writes)
            for kind, place in (("redis", url), ("cluster", ",".join(urls))):
                for count in sizes.readers:
                    probe(f"{kind} shared {count}", turn, "redis_writes", place, "shared", count, sizes.slow_writes)
    found = {name: _middle(each) for name, each in rounds.items()}

    times = ServiceTimes.of(found, sizes.threads, sizes.readers)
    return [*_measured(times, found, sizes), *_limits(times), *_waits(times, found, sizes)]


def _middle(runs: Sequence[Findings]) -> Findings:
    """Return the median of each figure."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _measured(times: ServiceTimes, found: dict[str, Findings], sizes: Sizes) -> list[Table]:
    rows = [[what, number(seconds * 1e6)] for what, seconds in times.described()]
    plain, history, durable = (found[f"saved {kind}"]["file_bytes"] for kind in ("plain", "history", "durable"))
    at_rest = [
        ["a change in the journal of a directory (`history`)", number(history - plain)],
        ["a change in the journal of a directory (a durable trigger that keeps up)", number(max(0.0, durable - plain))],
        ["an event in the stream of Redis", number(found[f"redis shared {sizes.readers[1]}"]["event_bytes"])],
        [
            "an event in the streams of a cluster, 64 scopes",
            number(found[f"cluster shared {sizes.readers[1]}"]["event_bytes"]),
        ],
    ]
    return [
        Table("What a write takes", ["part", "us"], rows),
        Table("What a change takes in a journal", ["change", "bytes"], at_rest),
    ]


def _limits(times: ServiceTimes) -> list[Table]:
    rows = []
    for setup in setups(times):
        full, rate = first_full(setup)
        parts = ", ".join(f"{name} {number(seconds * 1e6)} us" for name, seconds in demands(setup).items())
        rows.append([setup.name, parts, full, number(rate)])
    columns = [
        "engines",
        "share",
        "Redis, events local",
        "Redis, events shared",
        f"cluster of {PRIMARIES}, events shared",
    ]
    grown = [[f"{count:,}", *cells] for count, cells in scaled(times, (1, 10, 100, 1_000))]
    return [
        Table("The first limit", ["setup", "each write takes", "full first", "at writes a second"], rows),
        Table("The first limit by engines: writes a second of all together, and what is full then", columns, grown),
    ]


def _waits(times: ServiceTimes, found: dict[str, Findings], sizes: Sizes) -> list[Table]:
    columns = ["setup", "of the limit", "writes a second", "answer p50, ms", "answer p99", "handler p50", "handler p99"]
    rows = []
    for setup in setups(times):
        for share in SHARES:
            rate, outcome = simulated(setup, share, sizes.jobs)
            busiest = max(outcome.utilisation.items(), key=lambda item: item[1])
            waits = (outcome.answer_ms(0.5), outcome.answer_ms(0.99), outcome.end_ms(0.5), outcome.end_ms(0.99))
            rows.append(
                [setup.name, f"{share:.0%}", number(rate), *map(number, waits), f"{busiest[0]} {busiest[1]:.0%}"]
            )
    beside = [
        [what, number(real), number(made), number(made / real)]
        for what, real, made in compared(times, found, sizes.threads, sizes.readers[0], sizes.jobs, os.cpu_count() or 0)
    ]
    return [
        Table("How long writes wait (simulated)", [*columns, "busiest part"], rows),
        Table("The simulation beside the engine", ["", "measured", "simulated", "ratio"], beside),
    ]


SECTIONS: dict[str, Callable[[Run], list[Table]]] = {
    "engines": engines,
    "scopes": scopes,
    "keys": keys,
    "writes": writes,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, compute and simulate the selected sections; print their tables, and keep the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: show that it works, not how much anything is")
    parser.add_argument("--only", action="append", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE", help=f"default: {RESULT}")
    parser.add_argument("--resume", action="store_true", help="measure only what FILE does not have")
    options = parser.parse_args(arguments)

    run = Run(QUICK if options.quick else FULL, options.json, options.quick)
    if options.resume:
        try:
            run.resume()
        except ValueError as error:
            parser.error(str(error))
    where = environment()
    print(f"{where['implementation']} {where['python']}, {where['system']}, {where['cores']} cores")
    for name in options.only or SECTIONS:
        for table in SECTIONS[name](run):
            print(table.text(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
